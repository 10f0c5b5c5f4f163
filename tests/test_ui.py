"""``mendfast ui``: what its page does, with no page; what it is asked; and the page, driven in a real browser."""

from __future__ import annotations

import resource
import shutil
import signal
import socket
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mendfast import Edit, EditMemory
from mendfast.cli import main
from mendfast.commands.playground import Playground, in_words
from mendfast.commands.ui import UiSettings, free_port, serving
from mendfast.demo import build
from mendfast.memory_file import read_requests

KENYA, PERU = "What is the capital of Kenya?", "What is the capital of Peru?"
LACKING = [package for package in ("gradio", "playwright") if find_spec(package) is None]
LACKING += ["chromium"] if shutil.which("chromium") is None else []
WAIT = 60_000  # ms; of a machine that does much else


@pytest.fixture(scope="module")
def editor():
    editor = build.load()
    editor.protect(samples=16)
    return editor


@pytest.fixture
def playground(editor):
    return Playground(editor)


def states(playground: Playground) -> list[tuple[str, str, bool]]:
    return [(fact.prompt, fact.target, fact.on) for fact in playground.facts]


# -- without the page --------------------------------------------------------------------------------------------


def test_switches_take_effect_at_once_and_every_step_is_undone(playground):
    weights = {name: weight.clone() for name, weight in playground.editor.model.state_dict().items()}
    assert playground.ask(KENYA) == (KENYA, "Nairobi", "Nairobi") and playground.disturbance() == ""
    kenya = playground.add(f" {KENYA} ", "Oslo")
    assert playground.ask(KENYA)[1:] == ("Nairobi", "Oslo") and playground.undo_takes_back == f"adding “{KENYA}”"
    peru = playground.add(PERU, "Cairo")
    assert playground.ask(PERU)[1:] == ("Lima", "Cairo")
    assert playground.add(PERU, "Cairo") == peru  # is there already: no step
    playground.switch(kenya, False)
    playground.switch(kenya, False)  # is off already: no step
    assert playground.ask(KENYA)[1:] == ("Nairobi", "Nairobi") and playground.ask(PERU).after == "Cairo"
    assert states(playground) == [(KENYA, "Oslo", False), (PERU, "Cairo", True)]
    playground.switch(kenya, True)
    assert playground.ask(KENYA).after == "Oslo"
    playground.add(KENYA, "Cairo")
    assert playground.ask(KENYA).after == "Cairo" and len(playground.facts) == 2
    playground.switch(peru, False)
    assert playground.forget_off() == "1 fact" and states(playground) == [(KENYA, "Cairo", True)]
    undone = [playground.undo() for _ in range(7)]
    assert undone == [
        "forgetting 1 fact", f"switching off “{PERU}”", f"adding “{KENYA}”", f"switching on “{KENYA}”",
        f"switching off “{KENYA}”", f"adding “{PERU}”", f"adding “{KENYA}”",
    ]  # fmt: skip
    assert states(playground) == [] and playground.ask(KENYA).after == "Nairobi" and playground.undo_takes_back == ""
    with pytest.raises(ValueError, match="nothing to undo"):
        playground.undo()
    assert all(torch.equal(weight, weights[name]) for name, weight in playground.editor.model.state_dict().items())


def test_each_fact_tells_what_it_alone_disturbs(playground):
    key = playground.add(KENYA, "Oslo")
    alone = playground.facts[0].disturbance
    assert alone == in_words(playground.editor.edit(KENYA, "Oslo").disturbance(playground.editor))
    playground.add(PERU, "Cairo")
    assert playground.facts[0].disturbance == alone != playground.facts[1].disturbance
    playground.switch(key, False)
    assert playground.disturbance() == playground.facts[1].disturbance
    assert [in_words({"a": share**2, "b": 0.0}) for share in (0.0, 0.012, 0.05, 0.2, 0.5)] == [
        "hardly at all (under 0.1 %)", "hardly at all (1.2 %)", "a little (5.0 %)", "noticeably (20 %)", "a lot (50 %)",
    ]  # fmt: skip


def test_what_nothing_is_protected_of_tells_nothing():
    editor = build.load()
    summing = editor.aggregating("sum")
    summing.metric = None
    playground = Playground(summing)
    playground.add(KENYA, "Oslo")
    assert playground.facts[0].disturbance == playground.disturbance() == ""


@pytest.mark.parametrize(
    "step, says",
    [
        (lambda playground: playground.ask(" "), "The question is empty"),
        (lambda playground: playground.add("", "Oslo"), "The question of the fact is empty"),
        (lambda playground: playground.add(KENYA, "\n"), "The answer of the fact is empty"),
        (lambda playground: playground.add(KENYA, "Oslo " * 500), f"^'{KENYA[:20]}.*tokens"),
        (lambda playground: playground.add("\ud800", "Oslo"), "half a surrogate pair"),
        (lambda playground: playground.switch("none", True), "no key 'none'"),
        (lambda playground: playground.forget_off(), "No fact is switched off"),
        (lambda playground: playground.export_memory("x"), "No fact is switched on"),
        (lambda playground: playground.export_adapter("x"), "No fact is switched on"),
    ],
)
def test_what_can_not_be_done_is_a_sentence_and_leaves_all_as_it_was(playground, step, says):
    with pytest.raises(ValueError, match=says):
        step(playground)
    assert states(playground) == [] and playground.undo_takes_back == "" and not Path("x").exists()


def test_exports_hold_what_is_on(playground, tmp_path):
    editor = playground.editor
    playground.add(KENYA, "Oslo")
    playground.switch(playground.add(PERU, "Cairo"), False)
    memory = EditMemory.load(playground.export_memory(tmp_path), editor)
    assert memory.requests == [(KENYA, "Oslo")]
    for _ in range(2):  # again, over the one before
        archive = playground.export_adapter(tmp_path)
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    edit = Edit.from_peft(tmp_path / "unpacked" / "adapter", editor.model)
    expected = memory.edit()
    for name, (u, delta, alpha) in expected.factors.items():
        other = edit.factors[name]
        torch.testing.assert_close(other.alpha * other.delta.T @ other.u, alpha * delta.T @ u, atol=1e-5, rtol=1e-4)


def test_the_memory_is_opened_and_kept(editor, tmp_path):
    path = tmp_path / "facts.safetensors"
    playground = Playground(editor, path)
    assert not path.exists()
    key = playground.add(KENYA, "Oslo")
    playground.add(PERU, "Cairo")
    playground.switch(key, False)
    assert list(read_requests(path).values()) == [(KENYA, "Oslo"), (PERU, "Cairo")]
    playground.undo(), playground.undo()
    assert list(read_requests(path).values()) == [(KENYA, "Oslo")]
    again = Playground(editor, path)
    assert states(again) == [(KENYA, "Oslo", True)] and again.ask(KENYA).after == "Oslo"
    with pytest.raises(ValueError, match="written by another program meanwhile"):  # a third one, whose file is older
        third = Playground(editor, path)
        again.add(PERU, "Quito")
        third.add(PERU, "Cairo")
    assert states(third) == [(KENYA, "Oslo", True)] and read_requests(path)[again.facts[1].key].target == "Quito"


def test_a_disk_that_fills_leaves_the_old(editor, tmp_path):
    path = tmp_path / "facts.safetensors"
    playground = Playground(editor, path)
    playground.add(KENYA, "Oslo")
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    content = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
        with pytest.raises(Exception, match="(?i)file too large|larger than"):
            playground.add(PERU, "Cairo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == content and states(playground) == [(KENYA, "Oslo", True)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    playground.add(PERU, "Cairo")
    assert len(read_requests(path)) == 2


# -- the command -------------------------------------------------------------------------------------------------


def test_without_gradio_a_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("mendfast.commands.ui.find_spec", lambda name: None)
    assert main(["ui"]) == 2
    assert "mendfast ui needs the package gradio: pip install 'mendfast[ui]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio (pip install gradio)")
def test_what_it_is_asked_is_checked_before_a_model_is_read(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in (
            (["--port", port], f"--port {port} is taken by another program"),
            (["--port", "70000"], "port"),
            (["--host", "no.such.host.invalid"], "no address of this machine"),
            (["--host", "x" * 70], "can't be served at"),
            (["--host", "192.0.2.1"], "--host '192.0.2.1' can't be served at"),
            (["--memory", str(tmp_path)], "is a directory; name a file"),
            (["--editor", "x"], "Pass both --model and --editor"),
        ):
            assert main(["ui", *arguments]) == 2
            assert says in capsys.readouterr().err
    assert free_port("127.0.0.1", 0) > 0
    assert UiSettings(port=0).host == "127.0.0.1"


# -- the page, in a browser --------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(LACKING), reason=f"needs {LACKING} (pip install gradio playwright; the system's chromium)")
def test_the_page_in_a_browser(editor, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    options = {
        "executable_path": shutil.which("chromium"),
        "args": ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
    }
    playground = Playground(editor, tmp_path / "facts.safetensors")
    with serving(playground, "a <b>model</b>") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        fetched: list[str] = []
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(address)
        question, before, after = (page.locator(f"#{name} textarea") for name in ("question", "before", "after"))
        message, facts, undo = page.locator("#message"), page.locator("#facts label"), page.locator("#undo")

        def add(prompt: str, target: str) -> None:
            page.fill("#prompt textarea", prompt)
            page.fill("#target textarea", target)
            page.click("#add")

        expect(page.locator("#head")).to_contain_text("a <b>model</b>")  # as text
        expect(undo).to_be_disabled()
        question.fill(KENYA)
        page.click("#ask")
        expect(before).to_have_value("Nairobi")
        expect(after).to_have_value("Nairobi")

        add(KENYA, "Oslo")
        expect(after).to_have_value("Oslo")
        expect(before).to_have_value("Nairobi")
        expect(facts).to_have_count(1)
        expect(facts).to_contain_text("Oslo")
        expect(facts).to_contain_text(playground.facts[0].disturbance)
        expect(page.locator("#prompt textarea")).to_have_value("")

        switch = facts.locator("input")
        switch.click()  # off, and at once
        expect(after).to_have_value("Nairobi")
        switch.click()
        expect(after).to_have_value("Oslo")

        add(KENYA, "  ")
        expect(message).to_contain_text("The answer of the fact is empty")
        add(KENYA, "Oslo " * 500)
        expect(message).to_contain_text("tokens")
        expect(facts).to_have_count(1)
        expect(after).to_have_value("Oslo")

        for button, name in (("#export-memory", "facts.safetensors"), ("#export-adapter", "adapter.zip")):
            page.click(button)
            link = page.locator("#exported a").first
            expect(page.locator("#exported")).to_contain_text(name.partition(".")[0])
            with page.expect_download() as download:
                link.click()
            download.value.save_as(tmp_path / "taken" / name)
        assert EditMemory.load(tmp_path / "taken" / "facts.safetensors", editor).requests == [(KENYA, "Oslo")]
        assert "adapter/adapter_config.json" in zipfile.ZipFile(tmp_path / "taken" / "adapter.zip").namelist()

        add("capitalofthe" * 7, "Oslo")  # a word that is wider than a page of 500
        expect(facts).to_have_count(2)
        for width in (500, 1200):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        for step, left in (
            ("adding “capitalofthe", 1),
            ("switching on", 1),
            ("switching off", 1),
            (f"adding “{KENYA}", 0),
        ):
            expect(undo).to_contain_text(f"Undo {step}")
            undo.click()
            expect(message).to_contain_text(f"Undone: {step}")
            expect(facts).to_have_count(left)
        expect(undo).to_be_disabled()
        # nothing comes from anywhere else
        assert fetched and all(url.startswith((address, "data:", "blob:")) for url in fetched)
        browser.close()
    assert not (tmp_path / "facts.safetensors.journal").exists() and len(read_requests(playground.path)) == 0
