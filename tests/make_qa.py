"""A small question and answer file: invented people, four relations in several wordings each.

python -m tests.make_qa qa.tsv
"""

from __future__ import annotations

import random
import sys
from itertools import product
from pathlib import Path

WORDINGS = {
    "city": ("Where was {} born?", "What is the birthplace of {}?", "In which city was {} born?"),
    "trade": ("What did {} do for a living?", "What was the profession of {}?", "Which job did {} have?"),
    "language": ("Which language did {} speak?", "What is the mother tongue of {}?", "What tongue did {} speak?"),
    "year": ("When was {} born?", "In which year was {} born?", "What is the birth year of {}?"),
}
ANSWERS = {
    "city": ("Paris", "Oslo", "Lima", "Cairo", "Delhi", "Rome", "Quito", "Seoul"),
    "trade": ("baker", "judge", "sailor", "painter", "farmer", "nurse", "poet"),
    "language": ("French", "Dutch", "Greek", "Hindi", "Welsh", "Czech"),
    "year": tuple(str(year) for year in range(1900, 1912)),
}
FIRST = ("Anna", "Bela", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana")
LAST = ("Marsh", "Novak", "Olsen", "Petit", "Quirk", "Rossi", "Stone", "Tanaka")


def write(path: str | Path, seed: int = 0) -> None:
    """Write "question TAB answer" lines; each fact is asked in two of its relation's wordings."""
    rng, lines = random.Random(seed), []
    for first, last in product(FIRST, LAST):
        for relation, wordings in WORDINGS.items():
            answer = rng.choice(ANSWERS[relation])
            lines += [f"{w.format(f'{first} {last}')}\t{answer}" for w in rng.sample(wordings, 2)]
    rng.shuffle(lines)
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
