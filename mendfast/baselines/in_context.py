"""In-context editing: the facts are put in front of every question, and the model is not changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ..editable import EditableModel
from ..labels import check_text, encode_prompt
from ..layers import Layer
from ..objective import context_length
from ..requests import EditRequest
from .system import Untrained


class Reader(EditableModel):
    """An editable model that reads ``facts`` before every prompt."""

    facts = ""

    def prompt_text(self, prompt: str, form: str | None = None) -> str:
        check_text("prompt", prompt)
        return super().prompt_text(prompt if form == "text" else self.facts + prompt, form)

    @contextlib.contextmanager
    def reading(self, facts: str) -> Iterator[None]:
        """Within the block ``facts`` are read."""
        before = self.facts, self._encoded
        self.facts, self._encoded = facts, {}
        try:
            yield
        finally:
            self.facts, self._encoded = before


class InContext(Untrained):
    """The opponent that costs nothing to make, and a longer prompt ever after (Zheng et al. 2023, IKE, without its
    demonstrations).

    Within an edit the system's own ``subject`` reads the facts; running text is read without them.

    Args:
        subject: see :class:`System`.
        template: of each fact.
    """

    key, name = "in_context", "in context"
    subject: Reader

    def __init__(self, subject: EditableModel, template: str = "{prompt} {target}\n"):
        if not isinstance(template, str) or "{prompt}" not in template or "{target}" not in template:
            raise ValueError(f"template is {template!r}; it must contain {{prompt}} and {{target}}.")
        super().__init__(Reader(subject.model, subject.tokenizer, subject.config))
        self.template = template

    def changed_layers(self) -> Sequence[Layer]:
        """None: other text is read by the same model."""
        return ()

    @contextlib.contextmanager
    def _edited(self, requests: Sequence[EditRequest]) -> Iterator[None]:
        facts = "".join(
            self.template.replace("{prompt}", request.prompt).replace("{target}", request.target)
            for request in requests
        )
        limit = context_length(self.subject.model)
        if limit is not None:
            length = len(encode_prompt(self.subject.tokenizer, facts))
            if length >= limit:
                raise ValueError(
                    f"{len(requests)} facts take {length} tokens, and the model reads {limit}: no question would fit "
                    "behind them. Put fewer in front."
                )
        for request in requests:  # what can't be learned is refused here as by other systems
            self.subject.tokenize([request])
        with self.subject.reading(facts):
            yield
