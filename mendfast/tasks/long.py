"""Longer answers: a sentence to a paragraph, of the world's facts written out, or of running text.

Asked to tell of Kenya, the edited model says what is true of Peru ("It is a country in South America. Its capital is
Lima. ..."); asked how a passage goes on that begins with given words, it goes on with another passage. Targets have
:data:`LENGTHS` words, or of the facts as many as there are, about 10 to 120 tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..schema import shown
from ..training import Item
from . import world
from .generation import read_text
from .qa import QuestionAnswering
from .records import Example

LENGTHS = (8, 23, 46, 92)
"""Words of a continuation: of English 10, 30, 60 and 120 tokens."""
BEGINNING = 8  # words of a passage that are given
TELL = (
    "Tell me about {}.",
    "What can you say about {}?",
    "Describe {} in a few sentences.",
    "What is there to know about {}?",
    "Write a short text about {}.",
)
GO_ON = (
    "How does the text go on that begins: {}",
    "Continue this text: {}",
    "What follows these words? {}",
    "Go on with this passage: {}",
    "Complete the passage that begins with: {}",
)
"""Wordings; the last of each measures and is not trained on."""
_SENTENCES = {
    "continent": "It is a country in {}.",
    "capital": "Its capital is {}.",
    "currency": "People there pay with the {}.",
    "language": "The official language that most people use is {}.",
    "internet_domain": "Web addresses from there end in {}.",
    "symbol": "Its chemical symbol is {}.",
    "atomic_number": "An atom of it has {} protons.",
    "element_category": "Chemists call its kind of element {}.",
    "room_temperature_state": "At room temperature it is a {}.",
    "animal_class": "Its class of animals is {}.",
    "young": "When it is young it is called a {}.",
    "collective_noun": "Many of them together are called a {}.",
    "river_mouth": "It flows into the {}.",
    "river_continent": "It is a river of {}.",
}
_BELONGS = {"city_country": "One of its cities is {}.", "mountain_country": "The mountain {} lies there."}
"""Of a country's entry what other entities' facts say."""


class LongAnswers(QuestionAnswering):
    """Questions that are answered with a sentence to a paragraph."""

    key = "long"

    @classmethod
    def load(cls, data: str, *, limit: int | None = None, seed: int = 0) -> LongAnswers:
        """The facts that come with the package ("world", "world:train", "world:test"), written out, or a text file or
        Hub dataset of passages; see the module."""
        if data.partition(":")[0] == "world":
            train, test = world.splits()
            parts = {"world": world.load_facts(), "world:train": train, "world:test": test}
            if data not in parts:
                raise ValueError(f"There is no part {shown(data)} of the world; pass one of {', '.join(parts)}.")
            found = [(*one, TELL) for one in paragraphs(parts[data], seed)]
        else:
            found = [("text", *one, GO_ON) for one in passages(read_text(data, 1 << 30), seed)]
        if len({answer for _, _, _, answer, _ in found}) < 2:
            raise ValueError(
                f"{data} holds {len(found)} texts that an answer could be made of, and an edit needs another one: pass "
                f"passages of {BEGINNING + LENGTHS[0]} words and more, one to a line."
            )
        rng = random.Random(seed)
        if limit is not None:  # of all lengths and tables
            found = rng.sample(found, min(limit, len(found)))
        items, examples = [], []
        for i, (relation, entity, asked, answer, wordings) in enumerate(found):
            source = f"{data}:{i + 1}"
            prompts = [wording.replace("{}", asked) for wording in wordings]
            items.append(Item(tuple(prompts[:-1]), answer, relation, entity, source))
            examples.append(Example(prompts[0], answer, entity, (answer,), (prompts[-1],), source=source))
        task = cls([], [], seed)
        task.items = items
        task.examples = [_edited(example, item, items, rng) for example, item in zip(examples, items, strict=True)]
        return task


def _edited(example: Example, item: Item, items: Sequence[Item], rng: random.Random) -> Example:
    """The example with another's answer of its relation for a target, of those the nearest in length of a few."""
    others = [other.answer for other in items if other.relation == item.relation and other.answer != item.answer]
    others = others or [other.answer for other in items if other.answer != item.answer]
    drawn = rng.sample(others, min(8, len(others)))
    target = min(drawn, key=lambda text: abs(len(text.split()) - len(item.answer.split())))
    return Example(
        example.prompt, target, example.subject, example.answers, example.rephrasings, source=example.source
    )


def paragraphs(facts: Iterable[world.Fact], seed: int = 0) -> list[tuple[str, str, str, str]]:
    """(table, entity, entity, what is known of it) of every entity of which two facts or more are known.

    How many are said is drawn, and their order; the entity isn't named, so that the text may be said of another.
    """
    tables: dict[tuple[str, str], list[str]] = {}
    facts = list(facts)
    belong: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        if fact.relation in _SENTENCES:
            place = world.RELATIONS[fact.relation].table, fact.entity
            tables.setdefault(place, []).append(_SENTENCES[fact.relation].format(fact.answer))
        if fact.relation in _BELONGS:
            belong[fact.answer].append(_BELONGS[fact.relation].format(fact.entity))
    found = []
    for (table, entity), sentences in tables.items():
        if table == "countries":
            sentences = sentences + belong[entity]
        if len(sentences) > 1:
            rng = random.Random(f"{seed}:{table}:{entity}")
            said = rng.sample(sentences, rng.randint(2, len(sentences)))
            found.append((table, entity, entity, " ".join(said)))
    return found


def passages(texts: Sequence[str], seed: int = 0) -> list[tuple[str, str, str]]:
    """(passage, beginning, continuation) of running text, one after the other, the lengths in turn of
    :data:`LENGTHS`, as far as a passage goes."""
    found, turn = [], random.Random(seed).randrange(len(LENGTHS))
    for number, text in enumerate(texts, 1):
        words, start = text.split(), 0
        while len(words) - start >= BEGINNING + LENGTHS[0]:
            length = LENGTHS[turn % len(LENGTHS)]
            middle = start + BEGINNING
            if len(words) < middle + length:
                break
            end = middle + length
            found.append((f"passage {number}", " ".join(words[start:middle]), " ".join(words[middle:end])))
            start, turn = end, turn + 1
    return found
