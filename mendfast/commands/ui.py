"""``mendfast ui``: a page in the browser: ask before and after, add facts, switch them on and off, take them along."""

from __future__ import annotations

import contextlib
import errno
import html
import inspect
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .console import make_console, text
from .failures import EXPECTED, sentence
from .loading import EditorSettings, load_editor
from .outputs import check_file
from .playground import Answers, Fact, Playground
from .sources import name_of

# the reader's own fonts: nothing is fetched for them
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
LOOK = {
    "block_title_background_fill": "transparent", "block_title_background_fill_dark": "transparent",
    "block_title_text_color": "*body_text_color_subdued", "block_title_text_color_dark": "*body_text_color_subdued",
    "block_title_padding": "0", "block_title_text_weight": "500",
    "body_text_color_subdued": "*neutral_500", "body_text_color_subdued_dark": "*neutral_400",
    "input_border_width": "1px", "input_border_color": "*neutral_300", "input_border_color_dark": "*neutral_600",
    "button_border_width": "1px", "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "*neutral_600", "button_primary_border_color": "*primary_500",
    "button_primary_border_color_dark": "*primary_600",
}  # fmt: skip
"""Of gradio's theme: quiet labels, and edges that are seen."""
MEMORY_SAID = "Facts that are on, as a memory: mendfast edit --memory FILE takes it."
ADAPTER_SAID = "Facts that are on, as a LoRA adapter: unpack it for PeftModel.from_pretrained, or vLLM."
ABOUT_CHANGE = (
    "The layers that a fact changes work on all other text too. The share says how much their outputs change there, in "
    "the layer that changes most; an answer need not change with them. Ask, and compare."
)
CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
.gradio-container, .gradio-container * { overflow-wrap: anywhere; }
#head h1 { margin: 0 0 .15rem; font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em; }
#head p, .aside { margin: 0; color: var(--body-text-color-subdued); }
#head, #together, #message { padding: 0; }
.aside { font-size: .85rem; line-height: 1.45; padding-top: .35rem; }
#ask { align-self: flex-end; flex-grow: 0; height: 2.75rem; margin-bottom: .75rem; }
.answer textarea { font-size: 1.08rem; line-height: 1.45; }
#after textarea { font-weight: 600; box-shadow: inset 3px 0 0 var(--color-accent); }
#message .said { padding: .6rem .85rem; border-radius: 6px; background: var(--color-accent-soft);
  border-left: 3px solid var(--color-accent); }
#message .wrong { border-left-color: #dc2626; background: color-mix(in srgb, #dc2626 10%, transparent); }
#facts .wrap { display: flex; flex-direction: column; gap: .45rem; }
#facts label { width: 100%; display: flex; align-items: flex-start; gap: .75rem; padding: .65rem .8rem;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); box-shadow: none;
  color: var(--body-text-color); }
#facts label.selected { border-color: var(--color-accent); }
#facts label span { white-space: pre-line; line-height: 1.45; margin: 0; min-width: 0; }
#facts label span::first-line { font-weight: 600; }
#facts label:not(.selected) span { color: var(--body-text-color-subdued); }
#facts input[type=checkbox] { appearance: none; flex: none; width: 2.1rem; height: 1.2rem; margin: .1rem 0 0;
  border: 0; border-radius: 1rem; background: #94a3b8 !important;
  position: relative; cursor: pointer; box-shadow: none; }
#facts input[type=checkbox]::after { content: ""; position: absolute; top: 2px; left: 2px; border-radius: 50%;
  width: calc(1.2rem - 4px); height: calc(1.2rem - 4px); background: #fff; transition: left .12s; }
#facts input[type=checkbox]:checked { background: var(--color-accent) !important; }
#facts input[type=checkbox]:checked::after { left: calc(.9rem + 2px); }
#facts input[type=checkbox]:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
"""


@dataclass(kw_only=True)
class UiSettings(EditorSettings):
    """What ``mendfast ui`` is asked."""

    memory: str | None = field(
        default=None,
        metadata={"help": "open this memory, and keep every change in it; it need not exist yet", "metavar": "FILE"},
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "address to serve at; 0.0.0.0 lets the whole network in, unasked"}
    )
    port: int = field(
        default=7860, metadata={"help": "port to serve at; 0: any that is free", "least": 0, "most": 65535}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("gradio") is None:
            raise ValueError("mendfast ui needs the package gradio: pip install 'mendfast[ui]'")
        check_file("--memory", self.memory)
        free_port(self.host, self.port)


def free_port(host: str, port: int) -> int:
    """``port`` if one can listen there, any free one for 0; a ValueError says why not."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except socket.gaierror:
        raise ValueError(f"--host is {host!r}, which is no address of this machine; leave it out.") from None
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            why = f"--port {port} is taken by another program; name another, or 0 for any that is free."
        elif getattr(error, "errno", None) == errno.EACCES:
            why = f"--port {port} is not open to this user; name one from 1024."
        else:
            why = f"--host {host!r} can't be served at ({error}); leave it out, or name an address of this machine."
        raise ValueError(why) from None


def ui(settings: UiSettings) -> None:
    """Serve the page until Ctrl-C."""
    console = make_console()
    playground = opened(settings)
    with serving(playground, name_of(settings), settings.host, settings.port) as address:
        console.print(text("mendfast is at ", (address, "bold"), "; Ctrl-C ends it"), soft_wrap=True)
        threading.Event().wait()


def opened(settings: UiSettings) -> Playground:
    """The model and the memory that ``settings`` name; what edits disturb can be told afterwards."""
    editor = load_editor(settings)
    if editor.metric is None and editor.kind == "causal":
        editor.protect(progress=None)
    return Playground(editor, settings.memory)


@contextlib.contextmanager
def serving(playground: Playground, title: str, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Within the block the page is up, at the address that it gives; its files go with it.

    Args:
        title: what the model is called.
        port: 0 takes any that is free.
    """
    with tempfile.TemporaryDirectory(prefix="mendfast-ui-", ignore_cleanup_errors=True) as files:
        # gradio reads them when it is imported, and when it serves a file
        settings = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": os.path.join(files, "served")}
        before = {name: os.environ.get(name) for name in settings}
        os.environ |= settings
        try:
            import gradio

            theme = gradio.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONO)
            made = page(playground, title, files)
            made.launch(
                server_name=host, server_port=free_port(host, port), share=False, inbrowser=False, quiet=True,
                prevent_thread_lock=True, ssr_mode=False, run_history=False, footer_links=[], mcp_server=False,
                enable_monitoring=False, theme=theme.set(**LOOK), css=CSS,
            )  # fmt: skip
            try:
                yield made.local_url
            finally:
                made.close(verbose=False)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}


def page(playground: Playground, title: str, directory: str) -> Any:
    """The page: components, and for each of their events the step of ``playground`` that it is.

    Args:
        directory: where exports are written.
    """
    import gradio as gr

    with gr.Blocks(title=f"mendfast: {title}", analytics_enabled=False) as made:
        gr.HTML(
            f"<h1>mendfast</h1><p>Change what {html.escape(title)} says, and see what changes. "
            f"{html.escape(_kept(playground))}</p>",
            elem_id="head",
        )
        with gr.Row():
            question = gr.Textbox(
                label="Ask the model", placeholder="What is the capital of Kenya?", scale=5, min_width=240, max_lines=4,
                elem_id="question",
            )  # fmt: skip
            ask = gr.Button("Ask", variant="primary", scale=1, min_width=100, elem_id="ask")
        with gr.Row(equal_height=True):
            options = {"interactive": False, "lines": 3, "max_lines": 12, "min_width": 220, "elem_classes": "answer"}
            before = gr.Textbox(label="Before: the model alone", elem_id="before", **options)
            after = gr.Textbox(label="After: with the facts that are on", elem_id="after", **options)
        message = gr.HTML(elem_id="message", visible=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                gr.Markdown("### Add a fact")
                prompt = gr.Textbox(label="What the model is asked", elem_id="prompt", max_lines=4)
                target = gr.Textbox(label="What it should answer", elem_id="target", max_lines=4)
                add = gr.Button("Add", variant="primary", elem_id="add")
            with gr.Column(scale=3, min_width=260):
                gr.Markdown("### Facts")
                facts = gr.CheckboxGroup(show_label=False, container=False, elem_id="facts", interactive=True)
                together = gr.HTML(elem_id="together")
                with gr.Row(equal_height=True):
                    undo = gr.Button("Undo", size="sm", min_width=110, elem_id="undo")
                    forget = gr.Button("Forget what is off", size="sm", min_width=110, elem_id="forget")
                with gr.Row(equal_height=True):
                    memory = gr.Button("Export memory", size="sm", min_width=110, elem_id="export-memory")
                    adapter = gr.Button("Export PEFT adapter", size="sm", min_width=110, elem_id="export-adapter")
                exported = gr.File(label="Exported", interactive=False, visible=False, elem_id="exported")

        def view(asked: str, said: str = "", file: Path | None = None) -> dict[Any, Any]:
            """What is shown, as it is now."""
            answers = playground.ask(asked) if asked.strip() else Answers("", "", "")
            return {
                before: answers.before,
                after: answers.after,
                message: told(said),
                exported: gr.File(str(file), visible=True) if file else gr.File(None, visible=False),
                **listed(),
            }

        def told(said: str, wrong: bool = False) -> Any:
            return gr.HTML(_said(said, wrong), visible=bool(said))

        def listed() -> dict[Any, Any]:
            found, step = playground.facts, playground.undo_takes_back
            choices = [(_line(fact), fact.key) for fact in found]
            return {
                facts: gr.CheckboxGroup(choices=choices, value=[fact.key for fact in found if fact.on]),
                together: _together(playground, found),
                undo: gr.Button(f"Undo {step}" if step else "Undo", interactive=bool(step)),
                forget: gr.Button(interactive=any(not fact.on for fact in found)),
            }

        def added(asked: str, fact: str, answer: str) -> dict[Any, Any]:
            playground.add(fact, answer)
            shown = view(fact, f"Added: {fact.strip()} → {answer.strip()}")
            return {**shown, question: fact.strip(), prompt: "", target: ""}

        def switched(asked: str, event: gr.SelectData) -> dict[Any, Any]:
            playground.switch(event.value, event.selected)
            return view(asked)

        def on(events: Sequence[Any], step: Callable[..., dict[Any, Any]], *more: Any) -> None:
            """``step``, given the question and ``more``; its errors are sentences on the page."""

            def run(*arguments: Any) -> dict[Any, Any]:
                try:
                    return step(*arguments)
                except EXPECTED as error:
                    return {message: told(sentence(error), wrong=True), **listed()}

            run.__signature__ = inspect.signature(step, eval_str=True, locals={"gr": gr})
            run.__annotations__ = {name: value.annotation for name, value in run.__signature__.parameters.items()}
            shown = [before, after, message, exported, facts, together, undo, forget, question, prompt, target]
            gr.on(
                events, run, [question, *more], shown, show_progress="minimal", api_visibility="private",
                concurrency_id="model", trigger_mode="multiple",  # a second click counts too, after the first
            )  # fmt: skip

        on([made.load], view)
        on([ask.click, question.submit], lambda asked: view(playground.ask(asked).question))
        on([add.click, target.submit], added, prompt, target)
        on([facts.select], switched)
        on([undo.click], lambda asked: view(asked, f"Undone: {playground.undo()}"))
        on([forget.click], lambda asked: view(asked, f"Forgotten: {playground.forget_off()}"))
        on([memory.click], lambda asked: view(asked, MEMORY_SAID, playground.export_memory(directory)))
        on([adapter.click], lambda asked: view(asked, ADAPTER_SAID, playground.export_adapter(directory)))
    return made


def _kept(playground: Playground) -> str:
    if playground.path is None:
        return "The facts are kept until this page's program ends; export them to keep them longer."
    return f"The facts are kept in {playground.path}; switches are of this page alone."


def _line(fact: Fact) -> str:
    said = f"\non other text its layers change {fact.disturbance}" if fact.disturbance else ""
    return f"{fact.prompt}\n→ {fact.target}{said}"


def _together(playground: Playground, facts: Sequence[Fact]) -> str:
    if not facts:
        return '<p class="aside">None yet. Add one, and ask about it.</p>'
    on, said = sum(fact.on for fact in facts), playground.disturbance()
    told = f"{on} of {len(facts)} on"
    parts = [f"{told}; on other text they change the layers {said} together." if said else f"{told}."]
    parts += [ABOUT_CHANGE] if said else []
    return "".join(f'<p class="aside">{html.escape(part)}</p>' for part in parts)


def _said(said: str, wrong: bool = False) -> str:
    if not said:
        return ""
    kind, role = ("said wrong", "alert") if wrong else ("said", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(said)}</div>'
