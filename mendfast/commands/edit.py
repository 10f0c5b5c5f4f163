"""``mendfast edit``: one edit or a file of them, shown, saved or kept in a memory; interactively without any."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .console import make_console, text
from .loading import EditorSettings, load_editor
from .outputs import check_file
from .sources import in_words, success

if TYPE_CHECKING:
    from ..edit import Edit
    from ..editor import MendEditor

SHOWN = 20  # edits of a file whose answers are shown
LINES = 3  # questions that are shown a line each, and not as a table


@dataclass(kw_only=True)
class EditSettings(EditorSettings):
    """What ``mendfast edit`` is asked."""

    prompt: str | None = field(default=None, metadata={"help": "what the model is asked"})
    target: str | None = field(default=None, metadata={"help": "what it should answer"})
    data: str | None = field(
        default=None,
        metadata={
            "help": "edits, made at once: question TAB answer, JSON lines, zsRE, CounterFact; a file or a Hub dataset",
            "metavar": "FILE",
        },
    )
    out: str | None = field(default=None, metadata={"help": "save the edit there (safetensors)", "metavar": "FILE"})
    memory: str | None = field(
        default=None, metadata={"help": "keep the edits in this memory, which need not exist yet", "metavar": "FILE"}
    )
    remove: list[str] = field(
        default_factory=list,
        metadata={"help": "take the edit of this key or prompt out of --memory; may be repeated", "repeat": True},
    )
    list_: bool = field(default=False, metadata={"help": "list what --memory holds, and stop"})
    ask: list[str] = field(
        default_factory=list, metadata={"help": "another question to show; may be repeated", "repeat": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) != (self.target is None):
            raise ValueError("Pass both --prompt and --target, or neither to try edits interactively.")
        if self.prompt is not None and self.data is not None:
            raise ValueError("Pass --prompt and --target, or --data, and not both.")
        if self.memory is None and (self.remove or self.list_):
            raise ValueError("--remove and --list are of a memory; name it with --memory FILE.")
        if self.list_ and (self.asks_for_edits or self.remove or self.out):
            raise ValueError("--list only lists; leave the other options out.")
        if not self.asks_for_edits and self.memory is None and (self.out or self.ask):
            raise ValueError("--out and --ask go with --prompt and --target; pass those too, or none of the four.")
        check_file("--out", self.out)
        check_file("--memory", self.memory)

    @property
    def asks_for_edits(self) -> bool:
        return self.prompt is not None or self.data is not None


def edit(settings: EditSettings) -> dict[str, Any] | None:
    """Make the edits; returns the answers before and after, nothing of an interactive session."""
    console = make_console()
    if settings.list_:
        return _listed(settings, console)
    editor = load_editor(settings)
    if not settings.asks_for_edits and settings.memory is None:
        from .interactive import interact

        interact(editor, console)
        return None
    requests, problems = _requests(settings, editor, console)
    started = time.perf_counter()
    if settings.memory is None:
        made = editor.edit(requests, progress=None)
        figures: dict[str, Any] = {}
    else:
        from ..memory import update_file

        memory = update_file(settings.memory, editor, requests, settings.remove)
        made = memory.edit()
        figures = {"memory": settings.memory, "edits": len(memory), "keys": memory.keys()}
        console.print(text(f"{settings.memory} holds {len(memory):,} edit{'' if len(memory) == 1 else 's'}"))
    seconds = time.perf_counter() - started
    figures |= _shown(editor, made, requests, settings.ask, console)
    figures |= _disturbance(editor, made, console)
    if settings.out:
        made.save(settings.out)
        size = f"({made.num_bytes():,} bytes); the edit took {seconds * 1e3:.0f} ms"
        console.print(text(f"saved {settings.out} {size}"))
    return {**figures, "problems": problems, "seconds": seconds, "out": settings.out}


def _requests(settings: EditSettings, editor: MendEditor, console: Console) -> tuple[list[tuple[str, str]], list[str]]:
    """What is asked for, and the lines of a file that can't be had, by file and line."""
    if settings.prompt is not None and settings.target is not None:
        return [(settings.prompt, settings.target)], []
    if settings.data is None:
        return [], []
    from ..tasks.load import load_task
    from ..tasks.task import usable
    from .evaluate import tell

    task = load_task("qa", settings.data)
    examples, refused = usable(editor, task.examples)
    problems = [*task.problems, *refused]
    tell(problems, console)
    if not examples:
        raise ValueError(f"None of the edits in {settings.data} can be made; the first problem: {refused[0]}")
    requests = [(part.prompt, part.target) for example in examples for part in example.parts]
    return requests, [str(problem) for problem in problems]


def _shown(
    editor: MendEditor, made: Edit, requests: Sequence[tuple[str, str]], asked: Sequence[str], console: Console
) -> dict[str, Any]:
    """The answers before and after, of the first edits and of what else is asked, and how many edits took."""
    from ..generation import answer

    rows = [*requests[:SHOWN], *((question, "") for question in asked)]
    if not rows:
        return {"before": [], "after": []}
    questions = [question for question, _ in rows]
    before, taken_before = answer(editor, questions), success(editor, requests)
    with made.attached(editor.model):
        after, taken = answer(editor, questions), success(editor, requests)
    if len(questions) <= LINES:
        for question, old, new in zip(questions, before, after, strict=True):
            console.print(text(f"{question}  ", (old, "dim"), " -> ", (new, "bold")))
    else:
        table = Table(expand=True)
        for name, ratio in (("question", 5), ("wanted", 2), ("before", 2), ("after", 2)):
            table.add_column(name, ratio=ratio)
        for (question, target), old, new in zip(rows, before, after, strict=True):
            table.add_row(text(question), text(target), text((old, "dim")), text((new, "bold")))
        console.print(table)
    if len(requests) > 1 and (said := in_words(taken_before, taken, len(requests))):
        console.print(text(said))
    return {"before": before, "after": after, "edit_success": {"before": taken_before, "after": taken}}


def _disturbance(editor: MendEditor, made: Edit, console: Console) -> dict[str, Any]:
    """What the edit can change elsewhere, where the editor knows what must stay."""
    if editor.metric is None or not made.factors:
        return {}
    from ..edit import disturbance_in_words

    found = made.disturbance(editor)
    console.print(text(disturbance_in_words(found)))
    return {"disturbance": found}


def _listed(settings: EditSettings, console: Console) -> dict[str, Any]:
    from ..memory_file import read_requests

    found = read_requests(settings.memory)
    table = Table(title=text(f"{settings.memory}: {len(found):,} edits"))
    for name in ("key", "question", "answer"):
        table.add_column(name)
    for key, (prompt, target) in found.items():
        table.add_row(text(key), text(prompt), text(target))
    console.print(table)
    return {"memory": settings.memory, "edits": {key: list(request) for key, request in found.items()}}
