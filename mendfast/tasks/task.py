"""What an editor is trained for and measured on: a task makes everything into pairs of prompt and target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from ..editable import EditableModel
from ..training import FactSampler, Item
from ..training.data import Pair, Sampler
from .records import Example, Problem
from .sieve import sieve

VALIDATION_SHARE = 20  # one fact in so many


class Known(NamedTuple):
    """Something that an edit of other matters must leave alone."""

    prompt: str
    answer: str
    subject: str | None = None


class Task(ABC):
    """Data of one kind, read; make one with :func:`load_task`.

    Attributes:
        examples: the edits to measure, and what to ask after each.
        problems: records that could not be read, or that deserve a look.
    """

    key: ClassVar[str]
    bases: ClassVar[tuple[str, ...]]
    """Shapes of small base models that serve it; see :func:`mendfast.base_model.make_base`."""
    ends: ClassVar[bool] = True
    """Whether targets are whole answers, which a decoder-only base model learns to end with EOS."""

    def __init__(self, examples: list[Example], problems: list[Problem]):
        self.examples, self.problems = examples, problems

    @abstractmethod
    def sampler(self, seed: int = 0, *, held_out: bool = False) -> Sampler:
        """What editors are trained on; with ``held_out`` what they are validated on, of other edits."""

    @abstractmethod
    def base_pairs(self) -> list[Pair]:
        """What a base model of one's own is trained on, so that there is something to edit."""

    def known(self) -> list[Known]:
        """What an edit of another example must leave alone."""
        parts = (part for example in self.examples for part in example.parts)
        return [Known(e.prompt, e.answers[0] if e.answers else e.target, e.subject) for e in parts]

    @abstractmethod
    def check(self, model: Any, kind: str) -> None:
        """A ValueError that says why a model of this ``kind`` can't serve the task, where it can't."""


    @abstractmethod
    def sieve(self, subject: EditableModel) -> list[Problem]:
        """Leave out, of what is trained on, what the model can't be asked (longer than its context, no tokens, no such
        label); returns what that was. Called once, before :meth:`sampler`.

        Raises:
            ValueError: nothing is left.
        """


class FactTask(Task):
    """A task whose edits are facts in several wordings: :attr:`items`."""

    items: Sequence[Item]
    implied: float = 0.0
    """The share of edits that are trained for what follows from them; see :class:`FactSampler`."""
    beside: Sequence[Pair] = ()
    """What a base model of one's own is taught besides the items."""

    def sieve(self, subject: EditableModel) -> list[Problem]:
        self.items, problems = sieve(subject, self.items)
        return problems

    def sampler(self, seed: int = 0, *, held_out: bool = False) -> FactSampler:
        chosen = [item for i, item in enumerate(self.items) if (i % VALIDATION_SHARE == 0) == held_out]
        implied = self.implied if any(item.implied for item in chosen) or not held_out else 0.0
        return FactSampler(chosen or self.items, neighbours=self.items, implied=implied, seed=seed)

    def base_pairs(self) -> list[Pair]:
        pairs = [(wording, item.answer) for item in self.items for wording in item.wordings]
        return [*pairs, *(pair for item in self.items if self.implied for pair in item.follows()), *self.beside]


def usable(editor: EditableModel, examples: Sequence[Example]) -> tuple[list[Example], list[Problem]]:
    """The examples that the model can be asked, without those neighbours that it can't, and what was left out.

    An example whose edit, or one that is made with it, can't be tokenised (longer than the context, no such label) is
    dropped; of the others a rephrasing, a locality prompt or a question that can't is.
    """
    kept: list[Example] = []
    problems: list[Problem] = []
    for example in examples:
        file, _, line = example.source.rpartition(":")

        def fits(pair: tuple[str, str | None], field: str) -> bool:
            problem = refusal(editor, *pair)
            if problem:
                problems.append(Problem(file, int(line), field, problem))  # noqa: B023
            return not problem

        def trimmed(example: Example) -> Example:
            rephrased = [(wording, example.target) for wording in example.rephrasings]
            return replace(
                example,
                rephrasings=tuple(pair[0] for pair in rephrased if fits(pair, "rephrasings")),  # noqa: B023
                locality=tuple(pair for pair in example.locality if fits(pair, "locality")),  # noqa: B023
                portability=tuple(pair for pair in example.portability if fits(pair, "portability")),  # noqa: B023
            )

        if all([fits((part.prompt, part.target), "") for part in example.parts]):
            kept.append(replace(trimmed(example), together=tuple(map(trimmed, example.together))))
    return kept, problems


def refusal(editor: EditableModel, prompt: str, target: str | None) -> str:
    """Why the model can't be asked this; "" where it can."""
    try:
        if target is not None:
            editor.check(editor.tokenize([(prompt, target)]))
    except ValueError as error:
        return str(error)
    return ""
