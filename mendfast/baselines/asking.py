"""What a measurement asks of an edited model, to be answered in one batch, with other edits' questions too."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from ..editable import EditableModel
from ..generation import Answer, generate_answers, tokens_of
from ..layers import Layer
from ..prompt_keys import PromptKeys
from ..variants import Variants, Weights


class Asking:
    """Questions of several kinds, to be answered in one batch.

    Attributes:
        weights: of the edit under which they are asked, where that has been taken back.
    """

    def __init__(self, subject: EditableModel, max_new_tokens: int, keys: PromptKeys | None = None):
        self.subject, self.limit, self.keys = subject, max_new_tokens, keys
        self.prompts: list[str | list[int]] = []
        self.starts: list[tuple[int, ...]] = []
        self.tokens: list[int] = []
        self.enough: list[Callable[[str], bool] | None] = []
        self.weights: Weights | None = None

    def add(
        self,
        prompts: Sequence[str],
        starts: Sequence[tuple[int, ...]] | None = None,
        tokens: Sequence[int] | None = None,
        enough: Sequence[Callable[[str], bool] | None] | None = None,
        *,
        form: str | None = None,
    ) -> slice:
        """Where these prompts' answers will be.

        ``tokens``: how many of each are enough to judge it, of the most that there may be; ``enough``: whether its
        first words are.
        """
        place = slice(len(self.prompts), len(self.prompts) + len(prompts))
        causal = self.subject.kind == "causal"  # which may be asked when the edit, and facts in front, are gone
        self.prompts += [tokens_of(self.subject, prompt, form) if causal else prompt for prompt in prompts]
        self.starts += starts or [()] * len(prompts)
        self.tokens += [min(self.limit, most) for most in tokens or [self.limit] * len(prompts)]
        self.enough += enough or [None] * len(prompts)
        return place

    def take(self, other: Asking) -> slice:
        """Where another's answers will be, asked along with these."""
        place = slice(len(self.prompts), len(self.prompts) + len(other.prompts))
        for name in ("prompts", "starts", "tokens", "enough"):
            getattr(self, name).extend(getattr(other, name))
        return place

    def answers(self, variants: Variants | None = None) -> list[Answer]:
        if not self.prompts:
            return []
        return generate_answers(
            self.subject, self.prompts, self.tokens, starts=self.starts, enough=self.enough, variants=variants,
            keys=self.keys,
        )  # fmt: skip


Result = TypeVar("Result")


def at_once(measuring: Generator[Asking, list[Answer], Result]) -> Result:
    """What a measurement gives that waits for no answers."""
    try:
        next(measuring)
    except StopIteration as end:
        return end.value
    raise ValueError("The measurement was told later=True, and waits for answers; send them.")


def answer_together(askings: Sequence[Asking], layers: Sequence[Layer]) -> list[list[Answer]]:
    """The answers that several edits of one model wait for, as one batch: a step costs little more for many rows.

    ``layers``: those that the edits write into.
    """
    whole = Asking(askings[0].subject, askings[0].limit, askings[0].keys)
    places = [whole.take(asking) for asking in askings]
    of = [i for i, asking in enumerate(askings) for _ in asking.prompts]
    given = whole.answers(Variants(layers, [asking.weights or {} for asking in askings], of))
    return [given[place] for place in places]
