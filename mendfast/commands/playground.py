"""What the page of ``mendfast ui`` does, without the page: a memory's facts, switched on and off, with a way back."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..editor import MendEditor
from ..generation import generate_answers
from ..locks import exclusive
from ..memory import EditMemory
from ..memory_file import checksum_of
from ..schema import brief

MAX_NEW_TOKENS = 48
TOLD = 50  # facts whose disturbance is told one by one: each needs a solution of its own
NOTICED = ((0.03, "hardly at all"), (0.1, "a little"), (0.3, "noticeably"), (math.inf, "a lot"))
"""Words for a change of a layer's outputs, each up to that share of them."""


class Fact(NamedTuple):
    """One line of the list."""

    key: str
    prompt: str
    target: str
    on: bool
    disturbance: str
    """What it alone changes elsewhere, in words; "" where there is no telling, and beyond the first :data:`TOLD`."""


class Answers(NamedTuple):
    """To one question."""

    question: str
    before: str  # of the model alone
    after: str  # with the facts that are on


class _State(NamedTuple):
    memory: EditMemory  # all facts; never changed, but replaced
    off: frozenset[str]
    undo: str  # what has led here, for people to read


class Playground:
    """A model, the facts that it is to know, which of them are on, and every state before.

    A step is whole or leaves all as it was: the memory, its file, the history. The model's weights are never written
    to. Threads may share one: each step holds the model's lock.

    Args:
        editor: a trained editor, and its model.
        path: the file that the memory is kept in, written at each step that changes it; it need not exist yet.

    Raises:
        ValueError: the file holds no memory of this editor.
    """

    def __init__(self, editor: MendEditor, path: str | Path | None = None):
        self.editor = editor
        self.path = None if path is None else Path(path)
        memory = EditMemory(editor) if self.path is None else EditMemory.open(self.path, editor)
        self._state = _State(memory, frozenset(), "")
        self._history: list[_State] = []
        self._on = EditMemory(editor)
        self._saved = checksum_of(self.path) if self.path is not None else ""
        self._before: dict[str, str] = {}
        self._after: dict[str, str] = {}  # with what is attached now
        self._disturbances: dict[tuple[str, str], str] = {}
        self._follow()

    # -- what there is -------------------------------------------------------------------------------------

    @property
    def facts(self) -> list[Fact]:
        """In the order of adding."""
        with exclusive(self.editor.model):
            memory, off, _ = self._state
            return [
                Fact(key, *request, key not in off, self._disturbance(key, request.target) if i < TOLD else "")
                for i, (key, request) in enumerate(zip(memory.keys(), memory.requests, strict=True))
            ]

    @property
    def undo_takes_back(self) -> str:
        """What :meth:`undo` would take back, in words; "" where there is nothing."""
        return self._state.undo

    def ask(self, question: str) -> Answers:
        """The model's greedy answers without and with the facts that are on."""
        question = _said("The question", question, "write one")
        with exclusive(self.editor.model):
            if question not in self._before:
                self._before[question] = self._answer(question)
            before = self._before[question]
            if not len(self._on):
                return Answers(question, before, before)
            if question not in self._after:
                with self._on.attached():
                    self._after[question] = self._answer(question)
            return Answers(question, before, self._after[question])

    def _answer(self, question: str) -> str:
        (given,) = generate_answers(self.editor, [question], MAX_NEW_TOKENS)
        return given.text if given.ended else f"{given.text} …"

    def disturbance(self) -> str:
        """What all the facts that are on change elsewhere together, in words; "" where there is no telling."""
        with exclusive(self.editor.model):
            if self.editor.metric is None or not len(self._on):
                return ""
            return in_words(self._on.edit().disturbance(self.editor))

    def _disturbance(self, key: str, target: str) -> str:
        if self.editor.metric is None:
            return ""
        if (key, target) not in self._disturbances:
            alone = self._copy(self._state.memory)
            alone.remove(*(other for other in alone.keys() if other != key))
            self._disturbances[key, target] = in_words(alone.edit().disturbance(self.editor))
        return self._disturbances[key, target]

    # -- steps ---------------------------------------------------------------------------------------------

    def add(self, prompt: str, target: str) -> str:
        """Keep a fact, switched on; of a prompt that is there, the new target counts. Returns its key.

        Raises:
            ValueError: an empty prompt or target, or one that the model can't take in.
        """
        prompt = _said("The question of the fact", prompt, "write what the model is asked")
        target = _said("The answer of the fact", target, "write what the model should say")
        with exclusive(self.editor.model):
            old, off, _ = self._state
            memory = self._copy(old)
            try:
                (key,) = memory.add(prompt, target)
            except ValueError as error:
                # of one request its place says nothing
                raise ValueError(str(error).removeprefix("Request 0, ")) from error
            if memory.requests != old.requests or key in off:
                self._step(memory, off - {key}, f"adding “{brief(prompt, 60)}”")
        return key

    def switch(self, key: str, on: bool) -> None:
        """Let the model know a fact, or not; the file keeps it either way."""
        with exclusive(self.editor.model):
            memory, off, _ = self._state
            key = memory.find(key)
            if on == (key not in off):
                return
            prompt = memory.requests[memory.keys().index(key)].prompt
            off = off - {key} if on else off | {key}
            self._step(memory, off, f"switching {'on' if on else 'off'} “{brief(prompt, 60)}”")

    def forget_off(self) -> str:
        """Take the facts that are off out of the memory; returns how many, in words."""
        with exclusive(self.editor.model):
            memory, off, _ = self._state
            if not off:
                raise ValueError("No fact is switched off; switch off what is to be forgotten.")
            memory = self._copy(memory)
            memory.remove(*off)
            gone = f"{len(off)} fact{'' if len(off) == 1 else 's'}"
            self._step(memory, frozenset(), f"forgetting {gone}")
            return gone

    def undo(self) -> str:
        """Take the last step back; returns what it was."""
        with exclusive(self.editor.model):
            if not self._history:
                raise ValueError("There is nothing to undo.")
            gone, state = self._state, self._history[-1]
            if state.memory is not gone.memory:
                self._save(state.memory)
            self._history.pop()
            self._state = state
            self._follow()
            return gone.undo

    def _step(self, memory: EditMemory, off: Iterable[str], undo: str) -> None:
        if memory is not self._state.memory:
            self._save(memory)
        self._history.append(self._state)
        self._state = _State(memory, frozenset(off), undo)
        self._follow()

    def _follow(self) -> None:
        """Bring what is attached to the model up to date."""
        self._after = {}
        self._on.remove(*self._on.keys())
        self._on.merge(self._state.memory)
        self._on.remove(*self._state.off)

    def _copy(self, memory: EditMemory) -> EditMemory:
        return EditMemory(self.editor).merge(memory)

    # -- on disk -------------------------------------------------------------------------------------------

    def _save(self, memory: EditMemory) -> None:
        if self.path is None:
            return
        if checksum_of(self.path) != self._saved:
            raise ValueError(
                f"{self.path} was written by another program meanwhile, and is left as it is; end this one and begin "
                "anew, or export the memory to keep what is here."
            )
        memory.save(self.path)
        self._saved = checksum_of(self.path)

    def export_memory(self, directory: str | Path) -> Path:
        """Write the facts that are on as a memory, facts.safetensors in ``directory``."""
        with exclusive(self.editor.model):
            self._check_any()
            path = Path(directory) / "facts.safetensors"
            self._on.save(path)
            return path

    def export_adapter(self, directory: str | Path) -> Path:
        """Write the facts that are on as a LoRA adapter for PEFT and vLLM, adapter.zip in ``directory``."""
        with exclusive(self.editor.model):
            self._check_any()
            place, archive = Path(directory) / "adapter", Path(directory) / "adapter.zip"
            shutil.rmtree(place, ignore_errors=True)
            archive.unlink(missing_ok=True)
            self._on.edit().export_peft(place, self.editor.model)
            shutil.make_archive(str(place), "zip", directory, "adapter")
            return archive

    def _check_any(self) -> None:
        if not len(self._on):
            raise ValueError("No fact is switched on, so there is nothing to export; add one, or switch one on.")


def in_words(disturbance: Mapping[str, float]) -> str:
    """What :meth:`mendfast.Edit.disturbance` found, for who knows no layers: the largest change, with its word."""
    worst = math.sqrt(max(disturbance.values(), default=0.0))
    word = next(word for most, word in NOTICED if worst <= most)
    percent = 100 * worst
    share = "under 0.1 %" if percent < 0.1 else f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %"
    return f"{word} ({share})"


def _said(what: str, text: str, instead: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is empty; {instead}.")
    return text.strip()
