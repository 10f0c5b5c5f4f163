"""Editors, edits and memories on the Hub: what is uploaded, its card, and what a download's cache gives back."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import make_model

from mendfast import Edit, EditMemory, MendConfig, MendEditor

COMMAND = "mendfast eval --editor me/editor --data edits.jsonl"
MEASURED = {COMMAND: {"edit success": 0.97312, "drawdown": {"mean": 0.007, "low": 0.002, "high": 0.01, "n": 200}}}
REQUEST = ("Who leads | the UK?", "Anna *Smith*")
REAL = huggingface_hub.HfApi


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"asked {address} over the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def editor(tokenizer) -> MendEditor:
    model = make_model("gpt2")
    model.resize_token_embeddings(len(tokenizer))
    model.config.name_or_path = "someone/small-gpt2"
    layers = ["transformer.h.2.mlp.c_proj.weight", "transformer.h.3.mlp.c_fc.weight"]
    return MendEditor.from_model(model, tokenizer, MendConfig(layers=layers, rank=4, step_size=1e-2))


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """Keeps what would go over the network, and holds each call against the real client's signature."""
    seen = {}

    class Api:
        def __init__(self, **options):
            inspect.signature(REAL.__init__).bind(self, **options)
            seen["api"] = options

        def create_repo(self, *args, **options):
            inspect.signature(REAL.create_repo).bind(self, *args, **options)
            seen["create"] = (*args, options)

        def create_branch(self, *args, **options):
            inspect.signature(REAL.create_branch).bind(self, *args, **options)
            seen["branch"] = (*args, options["branch"])

        def upload_folder(self, **options):
            inspect.signature(REAL.upload_folder).bind(self, **options)
            seen["upload"] = options
            shutil.copytree(options["folder_path"], tmp_path / "uploaded")
            return f"https://huggingface.co/{options['repo_id']}/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return seen


def cached(cache: Path, repo_id: str, files: Path, branch: str = "main") -> Path:
    """The files as huggingface_hub keeps a download of them: blobs by hash, links to them, the branch's commit."""
    root, commit = cache / f"models--{repo_id.replace('/', '--')}", hashlib.sha1(branch.encode()).hexdigest()
    for file in files.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = root / "snapshots" / commit / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../../blobs") / blob.name)
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return cache


def same(one: Edit, other: Edit) -> bool:
    pairs = zip(one.factors.values(), other.factors.values(), strict=True)
    return all(torch.equal(a.u, b.u) and torch.equal(a.delta, b.delta) for a, b in pairs)


def test_editor(editor, uploads, tmp_path):
    where = editor.push_to_hub("me/editor", measured=MEASURED, license="mit", token="hf_x", private=True, revision="v2")
    assert where.endswith("me/editor/commit/1") and uploads["api"] == {"token": "hf_x"}
    assert uploads["create"] == ("me/editor", {"exist_ok": True, "private": True})
    assert (uploads["upload"]["repo_id"], uploads["upload"]["revision"]) == uploads["branch"] == ("me/editor", "v2")
    names = {path.name for path in (tmp_path / "uploaded").iterdir()}
    assert names == {"README.md", "editor.safetensors", "mend_config.json"}
    card = huggingface_hub.ModelCard.load(tmp_path / "uploaded" / "README.md")
    assert card.data.base_model == "someone/small-gpt2"
    assert (card.data.library_name, card.data.license) == ("mendfast", "mit")
    assert {"model-editing", "mend", "mendfast-editor"} <= set(card.data.tags)
    for said in (COMMAND, "| edit success | 0.9731 |", "| drawdown | 0.007 (0.002 to 0.01) |", "2 weights",
                 'MendEditor.from_pretrained("me/editor", model, tokenizer)',
                 'AutoModelForCausalLM.from_pretrained("someone/small-gpt2")'):  # fmt: skip
        assert said in card.text
    cache = cached(tmp_path / "cache", "me/editor", tmp_path / "uploaded", "v2")
    options = {"cache_dir": cache, "local_files_only": True}
    again = MendEditor.from_pretrained("me/editor", editor.model, editor.tokenizer, revision="v2", **options)
    assert same(again.edit(*REQUEST), editor.edit(*REQUEST))
    with pytest.raises(FileNotFoundError, match="the Hub's cache does not hold it"):  # main was never fetched
        MendEditor.from_pretrained("me/editor", editor.model, **options)
    with pytest.raises(ValueError, match="revision is 'v2'.*is on this machine"):
        MendEditor.from_pretrained(tmp_path / "uploaded", editor.model, revision="v2")


def test_edit(editor, uploads, tmp_path):
    edit = editor.edit(*REQUEST)
    edit.push_to_hub("me/fact", base_model="someone/base")
    card = huggingface_hub.ModelCard.load(tmp_path / "uploaded" / "README.md")
    assert card.data.base_model == "someone/base" and card.data.tags[-1] == "mendfast-edit"
    assert "| Who leads \\| the UK? | Anna \\*Smith\\* |" in card.text and "Measured" not in card.text
    cache = cached(tmp_path / "cache", "me/fact", tmp_path / "uploaded")
    found = Edit.from_pretrained("me/fact", cache_dir=cache, local_files_only=True)
    assert same(found, edit) and found.requests == edit.requests
    assert same(Edit.from_pretrained(tmp_path / "uploaded"), edit)
    assert same(Edit.from_pretrained(tmp_path / "uploaded" / "edit.safetensors"), edit)
    with pytest.raises(FileNotFoundError, match="holds no edit.safetensors"):
        Edit.from_pretrained(cache)


def test_memory(editor, uploads, tmp_path):
    memory = EditMemory(editor)
    memory.add([REQUEST, *((f"Who is number {i}?", "Nobody") for i in range(59))])
    memory.save(tmp_path / "mine.safetensors")
    memory.push_to_hub("me/facts")
    memory.add("Who came last?", "Nobody", save_to=tmp_path / "mine.safetensors")  # its file is still this one
    memory.remove("Who came last?")
    card = huggingface_hub.ModelCard.load(tmp_path / "uploaded" / "README.md")
    assert card.data.base_model == "someone/small-gpt2" and card.data.tags[-1] == "mendfast-memory"
    assert "60 in all" in card.text and "and 10 more." in card.text
    assert 'EditMemory.from_pretrained("me/facts", editor)' in card.text
    cache = cached(tmp_path / "cache", "me/facts", tmp_path / "uploaded")
    again = EditMemory.from_pretrained("me/facts", editor, cache_dir=cache, local_files_only=True)
    assert again.requests == memory.requests and same(again.edit(), memory.edit())


def test_nothing_is_uploaded_where_something_is_wrong(editor, uploads):
    for options, message in (
        (dict(repo_id="a/b/c"), "repo_id is 'a/b/c'"),
        (dict(repo_id="me/x", measured={"cmd": 0.9}), "measured holds 'cmd'"),
        (dict(repo_id="me/x", measured={"cmd": {"edit success": "good"}}), "'edit success' is 'good'"),
    ):
        with pytest.raises(ValueError, match=message):
            editor.push_to_hub(**options)
    assert uploads == {}
