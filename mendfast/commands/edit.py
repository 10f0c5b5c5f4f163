"""``mendfast edit``: one edit, shown and saved; without a prompt edits are tried interactively."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from .console import make_console, text
from .loading import EditorSettings, load_editor
from .outputs import check_file


@dataclass(kw_only=True)
class EditSettings(EditorSettings):
    """What ``mendfast edit`` is asked."""

    prompt: str | None = field(default=None, metadata={"help": "what the model is asked"})
    target: str | None = field(default=None, metadata={"help": "what it should answer"})
    out: str | None = field(default=None, metadata={"help": "save the edit there (safetensors)", "metavar": "FILE"})
    ask: list[str] = field(
        default_factory=list, metadata={"help": "another question to show; may be repeated", "repeat": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) != (self.target is None):
            raise ValueError("Pass both --prompt and --target, or neither to try edits interactively.")
        if self.prompt is None and (self.out or self.ask):
            raise ValueError("--out and --ask go with --prompt and --target; pass those too, or none of the four.")
        check_file("--out", self.out)


def edit(settings: EditSettings) -> dict[str, Any] | None:
    """Make the edit; returns the answers before and after, nothing of an interactive session."""
    from ..generation import answer

    console = make_console()
    editor = load_editor(settings)
    if settings.prompt is None or settings.target is None:
        from .interactive import interact

        interact(editor, console)
        return None
    questions = [settings.prompt, *settings.ask]
    started = time.perf_counter()
    made = editor.edit(settings.prompt, settings.target)
    seconds = time.perf_counter() - started
    before = answer(editor, questions)
    with made.attached(editor.model):
        after = answer(editor, questions)
    if settings.out:
        made.save(settings.out)
    for question, old, new in zip(questions, before, after, strict=True):
        console.print(text(f"{question}  ", (old, "dim"), " -> ", (new, "bold")))
    if settings.out:
        size = f"({made.num_bytes():,} bytes); the edit took {seconds * 1e3:.0f} ms"
        console.print(text(f"saved {settings.out} {size}"))
    return {"before": before, "after": after, "seconds": seconds, "out": settings.out}
