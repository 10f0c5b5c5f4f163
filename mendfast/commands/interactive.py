"""``mendfast edit`` without a prompt: ask, edit, ask again."""

from __future__ import annotations

from rich.console import Console

from ..edit import Edit
from ..editor import MendEditor
from ..generation import answer
from .console import text
from .failures import EXPECTED, sentence

HELP = """[bold]?[/] question          ask the model
[bold]edit[/]                make an edit: it asks for question and answer
[bold]undo[/]                take the last edit out
[bold]save[/] FILE           save all edits made here as one
[bold]quit[/]"""


def interact(editor: MendEditor, console: Console) -> None:
    """Read commands until "quit" or the end of input; every edit made is taken out at the end."""
    made: list[Edit] = []
    console.print(HELP)
    try:
        while True:
            try:
                line = console.input("[cyan]mendfast>[/] ").strip()
            except EOFError:
                return
            if line in ("quit", "exit"):
                return
            try:
                _step(editor, console, made, line)
            except EXPECTED as error:
                console.print(text((sentence(error), "red")))
    finally:
        for edit in reversed(made):
            edit.revert_(editor.model)


def _step(editor: MendEditor, console: Console, made: list[Edit], line: str) -> None:
    if line == "edit":
        prompt, target = console.input("question: "), console.input("new answer: ")
        edit = editor.edit(prompt, target)
        old = answer(editor, [prompt])[0]
        made.append(edit.apply_(editor.model))
        console.print(text((old, "dim"), " -> ", (answer(editor, [prompt])[0], "bold")))
    elif line == "undo":
        if not made:
            raise ValueError("There is no edit to take out.")
        made.pop().revert_(editor.model)
        console.print(f"{len(made)} edits left")
    elif line.startswith("save"):
        path = line.removeprefix("save").strip()
        if not made or not path:
            raise ValueError("Make an edit first, and name a file: save fact.safetensors")
        Edit.sum(made).save(path)
        console.print(text(f"saved {path}"))
    elif line.startswith("?"):
        console.print(text(answer(editor, [line.removeprefix("?").strip()])[0]))
    elif line:
        console.print(HELP)
