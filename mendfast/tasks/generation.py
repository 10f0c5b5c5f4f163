"""Generation: after a prefix of running text the model is to go on with ten given tokens.

The text is cut into windows, a prefix and the ten tokens after it. An edit's target is the continuation of
another window, one of another passage: text of the same kind that the model does not expect there. (Mitchell
et al. 2022, section 5, take a sample of a distilGPT-2; taking text instead needs no second model.) An edit's
neighbours, where it must hold too, are its prefix cut shorter at its start. Locality is the rest of the text:
how much its perplexity rises.

Data: a text file such as WikiText (Merity et al. 2016), one passage to a line; .json or .jsonl of objects with
"text"; or a Hub dataset with such rows. Headings (= ... =) and passages shorter than a window are left out.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..editable import EditableModel
from ..training import Item
from ..training.data import Draw, Pair, digest
from .records import Bad, Example, Problem, lines, open_records, required, show
from .sieve import sieve
from .task import VALIDATION_SHARE, Known, Task

PREFIX, CONTINUATION = 40, 10  # tokens
HEAD = 3  # words of a window that are given, where the rest of it is asked for
SHORTER = (0.75, 0.5, 0.25)  # of a prefix's words, what its neighbours keep
_WORD = re.compile(r"\S+")


class Window(NamedTuple):
    """A stretch of a passage."""

    prefix: str
    continuation: str
    passage: str  # where it is from

    def rest(self) -> Pair:
        """Its first words, and all the others."""
        text = f"{self.prefix} {self.continuation}"
        ends = [word.end() for word in _WORD.finditer(text)]
        head = ends[min(HEAD, len(ends) - 1) - 1]
        return text[:head], text[head:].lstrip()


class Generation(Task):
    """Running text: (prefix, continuation of another passage)."""

    key, bases, ends = "generation", ("gpt2",), False

    def __init__(self, windows: Sequence[Window], problems: list[Problem], limit: int | None = None, seed: int = 0):
        self.windows = list(windows)
        rng = random.Random(seed)
        chosen = self.windows if limit is None else rng.sample(self.windows, min(limit, len(self.windows)))
        super().__init__([self._example(window, rng) for window in chosen], problems)

    @classmethod
    def load(cls, data: str, *, limit: int | None = None, seed: int = 0, tokenizer: Any = None) -> Generation:
        """Read a text; see the module. ``limit`` is of the examples, the text is read whole."""
        windows, problems = [], []
        for line, text in _passages(data):
            if isinstance(text, Bad):
                problems.append(Problem(data, line, text.field, text.message))
            else:
                windows += cut(text, f"{data}:{line}", tokenizer)
        cls._check_passages(windows, data, "words" if tokenizer is None else "tokens")
        return cls(windows, problems, limit, seed)

    @staticmethod
    def _check_passages(windows: Sequence[Window], what: str, unit: str = "tokens") -> None:
        if len({window.passage for window in windows}) < 2:
            raise ValueError(
                f"{what} holds {len(windows)} stretches of {PREFIX + CONTINUATION} {unit}, all of one passage or none; "
                "pass a text of several passages, each on a line of its own."
            )

    def _example(self, window: Window, rng: random.Random) -> Example:
        return Example(
            prompt=window.prefix,
            target=_other(self.windows, window, rng).continuation,
            subject=window.passage,
            answers=(window.continuation,),
            rephrasings=tuple(shorter(window.prefix, share) for share in SHORTER),
            source=window.passage,
        )

    def sampler(self, seed: int = 0, *, held_out: bool = False) -> WindowSampler:
        chosen = [window for i, window in enumerate(self.windows) if (i % VALIDATION_SHARE == 0) == held_out]
        return WindowSampler(chosen or self.windows, self.windows, seed=seed)

    def sieve(self, subject: EditableModel) -> list[Problem]:
        items = [Item((w.prefix,), w.continuation, source=w.passage) for w in self.windows]
        kept, problems = sieve(subject, items)
        left = {(item.wordings[0], item.answer) for item in kept}
        self.windows = [w for w in self.windows if (w.prefix, w.continuation) in left]
        self._check_passages(self.windows, "The text, as far as this model takes it,")
        return problems

    def base_pairs(self) -> list[Pair]:
        return [window.rest() for window in self.windows]

    def known(self) -> list[Known]:
        return [Known(*window.rest(), window.passage) for window in self.windows]

    def check(self, model: Any, kind: str) -> None:
        if kind != "causal":
            raise ValueError(
                f"Generation needs a decoder-only language model, which goes on with what it is given; "
                f"{type(model).__name__} is {'a classifier' if kind == 'classifier' else 'an encoder-decoder'}."
            )


class WindowSampler:
    """Draws edits: a window's prefix with another passage's continuation, shorter prefixes, other text.

    A draw depends on (seed, step) alone.

    Args:
        windows: those to edit.
        others: those that targets and other text come from.
        outer: shorter prefixes per edit; one in four is the prefix itself.
        loc: stretches of other text per edit.
    """

    def __init__(
        self, windows: Sequence[Window], others: Sequence[Window], *, outer: int = 1, loc: int = 3, seed: int = 0
    ):
        self.windows, self.others, self.outer, self.loc, self.seed = windows, others, outer, loc, seed

    def fingerprint(self) -> str:
        texts = ([window[:2] for window in windows] for windows in (self.windows, self.others))
        return digest(*texts, self.outer, self.loc, self.seed)

    def draw(self, step: int, size: int) -> Draw:
        rng = random.Random(f"{self.seed}:{step}")
        drawn = Draw([], [], [])
        for _ in range(size):
            window = rng.choice(self.windows)
            target = _other(self.others, window, rng).continuation
            drawn.inner.append((window.prefix, target))
            drawn.outer.extend((shorter(window.prefix, rng.choice((1.0, *SHORTER))), target) for _ in range(self.outer))
            drawn.loc.extend(_other(self.others, window, rng).rest() for _ in range(self.loc))
        return drawn


def read_text(data: str, count: int) -> list[str]:
    """So many passages of a text, evenly from all of it.

    Raises:
        ValueError: there is none.
    """
    passages = [text for _, text in _passages(data) if not isinstance(text, Bad)]
    if not passages:
        raise ValueError(f"{data} holds no running text; pass a text file, one passage to a line.")
    return passages[:: max(1, len(passages) // count)][:count]


def cut(text: str, passage: str, tokenizer: Any = None) -> Iterator[Window]:
    """The windows of a text, one after the other; those of less than full length are left out.

    A prefix is whole words of at most :data:`PREFIX` tokens, a continuation the :data:`CONTINUATION` tokens
    after it, from a word's start. Tokens are those of a fast ``tokenizer``, or words.
    """
    if tokenizer is None:
        ends = [word.end() for word in _WORD.finditer(text)]
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
    words = [word.start() for word in _WORD.finditer(text)]
    start = 0
    while (stop := bisect_right(ends, start) + PREFIX) < len(ends):
        edge = ends[stop - 1]
        # A word that the prefix would end in the middle of is the continuation's first.
        following = bisect_right(words, edge) - (not text[edge].isspace())
        middle = words[following] if following < len(words) else len(text)
        last = bisect_right(ends, middle) + CONTINUATION - 1
        if last >= len(ends):
            return
        if prefix := text[start:middle].strip():
            yield Window(prefix, text[middle : ends[last]], passage)
        following = bisect_right(words, ends[last])
        if following == len(words):
            return
        start = words[following]


def shorter(prefix: str, share: float) -> str:
    """The prefix without its first words, of which the ``share`` that is given is kept."""
    words = [word.start() for word in _WORD.finditer(prefix)]
    kept = max(1, round(share * len(words)))
    return prefix[words[len(words) - kept] :]


def _other(windows: Sequence[Window], window: Window, rng: random.Random) -> Window:
    """A window of another passage."""
    for _ in range(50):
        if (other := rng.choice(windows)).passage != window.passage:
            return other
    return rng.choice([other for other in windows if other.passage != window.passage])


def _passages(data: str) -> Iterator[tuple[int, str | Bad]]:
    path = Path(data)
    if path.is_file() and path.suffix.lower() not in (".json", ".jsonl"):
        records = ((n, line if isinstance(line, Bad) else {"text": line}) for n, line in lines(path))
    else:
        records = open_records(path if path.exists() else data, None, tabs=False)
    for number, record in records:
        try:
            if isinstance(record, Bad):
                raise record
            if not isinstance(record, dict):
                raise Bad("", f"is {show(record)}; a record is a JSON object")
            if record.get("text") != "":  # a blank line, in data sets that keep a text line by line
                text = required(record, "text")
                if not _HEADING.match(text):
                    yield number, text
        except Bad as bad:
            yield number, bad


_HEADING = re.compile(r"=.*=$")
