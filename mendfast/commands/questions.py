"""What is asked after an edit beside the edit itself: what must stay, what lies near it, yes or no, running text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ..answers import truth_question
from ..baselines.measure import other_forms
from ..editable import EditableModel
from ..own_words import own_words
from ..tasks.generation import read_text
from ..tasks.load import load_task
from ..tasks.records import Example
from ..tasks.task import Known, Task, refusal
from ..tasks.wordings import Wordings, mine_wordings
from ..types import IGNORE

NEAR = 4
"""Neighbours of the same relation, and of the same subject, that are asked after an edit."""
TEXTS, TEXT_TOKENS = 24, 96
"""How much running text there is: its logits before are held."""
PART = 4
"""Texts of it that are read after an edit, in turn, where there are edits enough for all of it to be read."""

SHORT = 48
"""Tokens of the longest target up to which answers need no more room than they have by default."""


class Questions:
    """Draws what is asked after each edit; a draw depends on the seed and the edit alone.

    Args:
        task: whose examples are edited.
        known: data that must stay as it is; None: the edits' own locality, or each other.
        unrelated: questions of those to ask after each edit.
        text: running text, a file or Hub name; None: none.
        own_text: take the model's own words where there is no ``text``.
        read: how data is read; see :func:`mendfast.tasks.load.load_task`.
    """

    def __init__(
        self,
        subject: EditableModel,
        task: Task,
        known: str | None = None,
        unrelated: int = 64,
        text: str | None = None,
        own_text: bool = False,
        **read: Any,
    ):
        self.subject, self.task, self.unrelated = subject, task, unrelated
        self.known = _known(subject, task, known, read)
        self._text, self._own = text, own_text and subject.kind == "causal"
        self._places: dict[str, tuple[int | None, str] | None] = {}

    def after(self, group: Sequence[Example], rng: random.Random, *, brief: bool = False) -> dict[str, Any]:
        """What :func:`mendfast.baselines.measure.measure` is asked beside the requests of ``group``.

        ``brief``: of many edits, without what costs several more answers of each.
        """
        return {
            "rephrasings": [(wording, example.target) for example in group for wording in example.rephrasings],
            "locality": self._locality(group, rng),
            "portability": [pair for example in group for pair in example.portability],
            "near": self._near(group, rng),
            "premises": [] if brief else self._premises(group),
            "forms": () if brief else other_forms(self.subject),
            **self._room,
        }

    @cached_property
    def _room(self) -> dict[str, int]:
        """How many tokens an answer may have, the same of all, where some target has more than few."""
        if self.subject.kind == "classifier":
            return {}
        texts = [part.target for example in self.task.examples for part in example.parts]
        ids = self.subject.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        longest = max(map(len, ids), default=0)
        return {} if longest <= SHORT else {"max_new_tokens": -(-(longest + 16) // 32) * 32}

    def _locality(self, group: Sequence[Example], rng: random.Random) -> list[tuple[str, str]]:
        if not self.known:
            own = [(prompt, answer) for example in group for prompt, answer in example.locality if answer]
            return own if len(group) == 1 or len(own) <= self.unrelated else rng.sample(own, self.unrelated)
        prompts = {prompt for example in group for prompt in (example.prompt, *example.rephrasings)}
        subjects = {example.subject for example in group} - {None}
        drawn = rng.sample(range(len(self.known)), min(len(self.known), self.unrelated + 8 * len(prompts)))
        others = [self.known[i] for i in drawn]
        others = [known for known in others if known.prompt not in prompts and known.subject not in subjects]
        return [(item.prompt, item.answer) for item in others[: self.unrelated]]

    def _near(self, group: Sequence[Example], rng: random.Random) -> dict[str, list[str]]:
        if self.task.key != "qa" or not self.known or not self.unrelated:
            return {}
        prompts = {prompt for example in group for prompt in (example.prompt, *example.rephrasings)}
        edited = {place for example in group if (place := self._place(example.prompt))}
        relations, subjects = {relation for relation, _ in edited}, {subject for _, subject in edited}
        found: dict[str, list[str]] = {"relation": [], "subject": []}
        for known in self.known:
            place = self._place(known.prompt)
            if place is None or known.prompt in prompts or place in edited:
                continue
            if place[0] in relations and place[1] not in subjects:
                found["relation"].append(known.prompt)
            elif place[1] in subjects:
                found["subject"].append(known.prompt)
        return {kind: rng.sample(texts, min(NEAR, len(texts))) for kind, texts in found.items() if texts}

    def _place(self, prompt: str) -> tuple[int | None, str] | None:
        """The relation that a question asks for, and of whom."""
        if prompt not in self._places:
            split = self._wordings.split(prompt)
            self._places[prompt] = None if split is None else (self._wordings.relation(prompt), split[1])
        return self._places[prompt]

    @cached_property
    def _wordings(self) -> Wordings:
        return mine_wordings(
            [
                *((known.prompt, known.answer) for known in self.known),
                *((example.prompt, next(iter(example.answers), "")) for example in self.task.examples),
            ]
        )

    def _premises(self, group: Sequence[Example]) -> list[tuple[str, bool]]:
        """Is it the target (yes), is it not (no), is it what it was before (no)?"""
        if self.task.key != "qa":
            return []
        found = []
        for example in group:
            found.append((truth_question(example.prompt, example.target), True))
            found.append((truth_question(example.prompt, example.target, negated=True), False))
            if example.answers and example.target not in example.answers:
                found.append((truth_question(example.prompt, example.answers[0]), False))
        return [(question, truth) for question, truth in found if not refusal(self.subject, question, "yes")]

    def texts(self) -> list[dict[str, torch.Tensor]]:
        """Token batches of running text, of :data:`PART` texts, each cut to its first tokens."""
        subject = self.subject
        if self._text is not None:
            if subject.kind != "causal":
                raise ValueError(f"--text is read by a causal language model; this is a {subject.kind}. Leave it out.")
            batches = list(subject.text_batches(read_text(self._text, TEXTS), PART))
        elif self._own:
            batches = own_words(
                subject.model, subject.tokenizer, samples=TEXTS, max_new_tokens=TEXT_TOKENS, chat=subject.chat
            )
            batches = [_rows(batch, i) for batch in batches for i in range(0, len(batch["input_ids"]), PART)]
        else:
            return []
        found = []
        for batch in batches:
            ids, mask = (batch[name][:, :TEXT_TOKENS] for name in ("input_ids", "attention_mask"))
            labels = ids.masked_fill(mask == 0, IGNORE)
            kept = (labels[:, 1:] != IGNORE).any(1)  # a text of one token predicts nothing
            if kept.any():
                found.append({"input_ids": ids[kept], "attention_mask": mask[kept], "labels": labels[kept]})
        return found


def _known(subject: EditableModel, task: Task, known: str | None, read: dict[str, Any]) -> list[Known]:
    """What an edit must leave alone; empty where each example has its own."""
    if known:
        found = load_task(task.key, known, **read).known()
    elif any(answer for example in task.examples for _, answer in example.locality):
        return []
    else:
        found = task.known()
    return [item for item in found if not refusal(subject, item.prompt, item.answer)]


def _rows(batch: dict[str, torch.Tensor], start: int) -> dict[str, torch.Tensor]:
    return {name: value[start : start + PART] for name, value in batch.items()}
