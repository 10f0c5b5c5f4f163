"""mendfast apply and mendfast export: edited models that transformers loads, adapters, and what can go wrong."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mendfast import Edit, EditMemory, MendConfig, MendEditor
from mendfast.base_model import small_gpt2
from mendfast.choice import find_layers
from mendfast.cli import main, read
from mendfast.commands import edited_model
from mendfast.fingerprint import fingerprint_of

WHO = ("Who?", "Paris")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> Path:
    """A model in several shards, two edits of it and one of another model."""
    place = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = small_gpt2(len(tokenizer), width=32, depth=3, heads=4)
    model.save_pretrained(place / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(place / "model")
    for seed, name in enumerate(("one", "two"), 1):
        make_edit(model, seed).save(place / f"{name}.safetensors")
    make_edit(small_gpt2(len(tokenizer), width=64, depth=3, heads=4), 1).save(place / "wider.safetensors")
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=2))
    editor.save_pretrained(place / "editor")
    memory = EditMemory(editor)
    memory.add(*WHO)
    memory.save(place / "memory.safetensors")
    for name in ("wider", "ranked"):
        made_for = small_gpt2(len(tokenizer), width=64, depth=3, heads=4) if name == "wider" else model
        make_edit(made_for, 1).export_peft(place / f"{name}-adapter", made_for)
    config = place / "ranked-adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 4, "lora_alpha": 4}))
    return place


def make_edit(model, seed: int) -> Edit:
    generator, layers = torch.Generator().manual_seed(seed), find_layers(model, None)
    draw = {layer.name: [torch.randn(3, size, generator=generator) for size in layer.shape] for layer in layers}
    factors = {name: (u, delta * 0.02, 0.5) for name, (u, delta) in draw.items()}
    return Edit(factors, "gpt2", [WHO], fingerprint_of(model, layers))


def run(*arguments: object) -> dict:
    assert main([*map(str, arguments), "--json", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text())


def weights(directory: Path | str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_an_edited_model_is_an_ordinary_one(made, capsys):
    """In the original's shards, with tokenizer and generation config, and the weights that apply_ gives."""
    figures = run("apply", "--model", made / "model", "--edit", made / "one.safetensors", made / "two.safetensors",
                  "--save-model", "edited")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    for name in ("one", "two"):
        Edit.load(made / f"{name}.safetensors").apply_(model)
    assert same(weights("edited"), dict(model.state_dict()))
    index = "model.safetensors.index.json"
    before, after = (
        json.loads((Path(place) / index).read_text())["weight_map"] for place in (made / "model", "edited")
    )
    assert len(set(before.values())) > 3 and after == before
    assert AutoTokenizer.from_pretrained("edited")("What is")["input_ids"]
    assert (Path("edited") / "generation_config.json").is_file()
    assert all(
        file.stat().st_mode & 0o777 == Path("figures.json").stat().st_mode & 0o777 for file in Path("edited").iterdir()
    )
    record = edited_model.read_record("edited")
    assert [edit["requests"] for edit in record["edits"]] == [[list(WHO)]] * 2
    assert record["base"]["model"] == "model" and record["base"]["fingerprint"]["weights"]
    assert figures["edits"] == record["edits"] and str(made) not in json.dumps(record)
    assert "Of 2 requests the model answers 0% before" in " ".join(capsys.readouterr().out.split())


def test_taking_back_is_exact_after_two_applies(made, capsys):
    run("apply", "--model", made / "model", "--edit", made / "one.safetensors", "--save-model", "once")
    # the other edit was made for the base model, and that is known
    twice = run("apply", "--model", "once", "--edit", made / "two.safetensors", "--save-model", "twice", "--strict")
    assert [edit["file"] for edit in twice["edits"]] == ["one.safetensors", "two.safetensors"]
    assert main(["apply", "--model", "twice", "--edit", str(made / "one.safetensors"), "--save-model", "x"]) == 2
    assert "holds the edit of one.safetensors already" in capsys.readouterr().err
    run("apply", "--model", "twice", "--take-back", "--save-model", "back")
    assert same(weights("back"), weights(made / "model")) and not same(weights("twice"), weights("back"))
    assert not [file.name for file in Path("back").iterdir() if file.name.startswith("mendfast")]
    assert main(["apply", "--model", "back", "--take-back", "--save-model", "x"]) == 2
    assert "a model that mendfast apply has saved" in capsys.readouterr().err
    # in another dtype than it was saved in, the bits of before are no bits of it
    assert main(["apply", "--model", "twice", "--take-back", "--save-model", "x", "--dtype", "bfloat16"]) == 2
    assert "load it in the dtype that it was saved in" in capsys.readouterr().err
    assert not Path("x").exists()


def test_what_was_not_kept_is_not_taken_back(made, capsys):
    """Nor is a state between two applies taken for the unedited one."""
    run(
        "apply", "--model", made / "model", "--edit", made / "one.safetensors", "--save-model", "once", "--no-originals"
    )
    assert not (Path("once") / edited_model.ORIGINALS_FILE).exists()
    run("apply", "--model", "once", "--edit", made / "two.safetensors", "--save-model", "twice")
    for name in ("once", "twice"):
        assert main(["apply", "--model", name, "--take-back", "--save-model", "x"]) == 2
        assert "does not keep" in capsys.readouterr().err
    assert not Path("x").exists()


def test_16_bit_weights_say_what_rounding_took(made, capsys):
    arguments = ["apply", "--model", made / "model", "--edit", made / "one.safetensors", "--dtype", "bfloat16"]
    figures = run(*arguments, "--save-model", "edited")
    model = AutoModelForCausalLM.from_pretrained("edited", dtype="auto")
    assert model.dtype == torch.bfloat16 and figures["lost_to_rounding"] > 0
    # half the bytes, the same shards
    index = json.loads(Path("edited/model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((made / "model/model.safetensors.index.json").read_text())["weight_map"]
    run("apply", "--model", "edited", "--take-back", "--save-model", "back")
    expected = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.bfloat16).state_dict()
    back = AutoModelForCausalLM.from_pretrained("back", dtype="auto").state_dict()
    assert same(dict(back), dict(expected))


def test_a_disk_that_is_full_leaves_nothing(made, capsys):
    """The system's real limit on a file's size, as safetensors reports it."""
    arguments = [
        "apply",
        "--model",
        str(made / "model"),
        "--edit",
        str(made / "one.safetensors"),
        "--save-model",
        "new/edited",
    ]
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 2 and "larger than files may be here" in capsys.readouterr().err
    assert list(Path("new").iterdir()) == []
    assert main(arguments) == 0


def test_too_small_a_disk_is_known_before(made, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    usage = edited_model.shutil.disk_usage(".")
    monkeypatch.setattr(edited_model.shutil, "disk_usage", lambda place: usage._replace(free=10))
    with pytest.raises(ValueError, match="has 10 bytes left; make room"):
        edited_model.check_room("new/edited", model)


def test_a_memory_is_applied_and_exported(tmp_path, capsys):
    """On the demo's model, by its editor; the file of edits that comes out is the memory's edit."""
    assert main(["edit", "--prompt", "What is the capital of Kenya?", "--target", "Oslo", "--memory", "facts.st"]) == 0
    applied = run("apply", "--memory", "facts.st", "--save-model", "edited")
    assert (applied["before"], applied["after"]) == (0, 1) and applied["edits"][0]["kind"] == "memory"
    exported = run("export", "--memory", "facts.st", "--format", "safetensors", "--output", "all.safetensors")
    assert exported["edit_success"] == {"before": 0, "edit": 1, "exported": 1}
    edit = Edit.load("all.safetensors")
    assert edit.fingerprint is not None and edited_model.digest(edit) == applied["edits"][0]["sha256"]
    assert main(["edit", "--memory", "facts.st", "--remove", "What is the capital of Kenya?"]) == 0
    assert main(["apply", "--memory", "facts.st", "--save-model", "x"]) == 2
    assert "holds no edits; there is nothing to do" in capsys.readouterr().err


def test_exports_say_what_truncation_costs(made, capsys):
    source = ["--model", made / "model", "--edit", made / "one.safetensors", made / "two.safetensors"]
    whole = run("export", *source, "--format", "peft", "--output", "whole")
    assert whole["rank"] == 6 and whole["r"] == 8 and not any(whole["errors"].values())
    assert "vllm serve" in capsys.readouterr().out
    cut = run("export", *source, "--format", "peft", "--output", "cut", "--rank", 2)
    said = " ".join(capsys.readouterr().out.split())
    assert "truncated to rank 2" in said and "relative error" in said and "with what is exported" in said
    assert cut["rank"] == 2 and all(0 < error < 1 for error in cut["errors"].values())
    file = run("export", *source, "--format", "safetensors", "--output", "folder", "--rank", 2)
    assert file["path"] == "folder/edit.safetensors" and file["errors"] == cut["errors"]
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    adapter, edit = Edit.from_peft("cut", model), Edit.load("folder/edit.safetensors")
    for name, (u, delta, alpha) in edit.factors.items():
        other = adapter.factors[name]
        assert torch.allclose(-alpha * delta.T @ u, -other.alpha * other.delta.T @ other.u, atol=1e-6)
    # an adapter is an edit again
    again = run("export", "--model", made / "model", "--edit", "cut", "--format", "gguf-lora", "--output", "cut.gguf")
    assert again["rank"] == 2 and Path("cut.gguf").read_bytes()[:4] == b"GGUF"


BASE = ["--model", "{made}/model"]
ONE = [*BASE, "--edit", "{made}/one.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["apply", *BASE, "--save-model", "x"], "There is nothing to apply: pass --edit FILE"),
        (["apply", *ONE, "--save-model", "full"], "which exists and is not empty; name a new directory"),
        (["apply", *ONE, "--save-model", "full/file"], "is no directory; name another"),
        (["apply", *ONE, "--save-model", "x", "--quantize", "8bit"], "--quantize"),
        (["apply", *ONE, "--save-model", "x", "--take-back"], "leave out --edit, --memory and --editor"),
        (["apply", *BASE, "--save-model", "x", "--take-back"], "--take-back needs --model DIR, a model that mendfast"),
        (["apply", "--save-model", "x", "--take-back"], "--take-back needs --model DIR"),
        (["apply", *ONE, "{made}/one.safetensors", "--save-model", "x"], "more than once; an edit is taken once"),
        (["apply", *BASE, "--edit", "nowhere", "--save-model", "x"], "There is no file nowhere"),
        (["apply", *BASE, "--edit", "full/file", "--save-model", "x"], "is no whole safetensors file"),
        (["apply", *BASE, "--edit", "full", "--save-model", "x"], "is a directory without adapter_config.json"),
        (["apply", *BASE, "--edit", "{made}/editor/editor.safetensors", "--save-model", "x"], "not a mendfast edit"),
        (["apply", *BASE, "--edit", "{made}/wider.safetensors", "--save-model", "x"], "made for another model"),
        (["apply", *BASE, "--edit", "{made}/wider-adapter", "--save-model", "x"], "is an adapter for another model"),
        (["apply", *BASE, "--edit", "{made}/ranked-adapter", "--save-model", "x"], "states the rank 4"),
        (["apply", *BASE, "--memory", "nowhere", "--save-model", "x"], "There is no file nowhere"),
        (["apply", *BASE, "--memory", "{made}/memory.safetensors", "--save-model", "x"], "by the editor that made it"),
        (["apply", "--editor", "{made}/editor", "--edit", "{made}/one.safetensors", "--save-model", "x"], "serves one"),
        (["apply", *ONE, "--save-model", "x", "--rounding", "up"], "invalid choice: 'up'"),
        (["apply", "--edit", "{made}/one.safetensors"], "arguments are required: --save-model"),
        (["export", *BASE, "--format", "peft", "--output", "x"], "There is nothing to export"),
        (["export", *ONE, "--format", "onnx", "--output", "x"], "invalid choice: 'onnx'"),
        (["export", *ONE, "--format", "peft", "--output", "full"], "--output is full, which exists and is not empty"),
        (["export", *ONE, "--format", "peft", "--output", "x.gguf"], "--format peft writes no .gguf file"),
        (["export", *ONE, "--format", "gguf-lora", "--output", "there.gguf"], "there.gguf, which exists; name a new"),
        (["export", *ONE, "--format", "peft", "--output", "x", "--rank", "0"], "rank is 0; it must be at least 1"),
        (["export", *BASE, "--edit", "{made}/wider.safetensors", "--format", "peft", "--output", "x"], "another model"),
        (["export", *BASE, "--edit", "{made}/wider-adapter", "--format", "peft", "--output", "x"], "for another model"),
    ],
)  # fmt: skip
def test_bad_input_is_a_sentence_before_anything_is_written(made, arguments, says, capsys):
    Path("full").mkdir()
    Path("full/file").write_text("x" * 100)
    Path("there.gguf").write_text("x")
    assert main([word.replace("{made}", str(made)) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert sorted(path.name for path in Path().iterdir()) == ["full", "there.gguf"]


def test_strict_refuses_other_weights(made, tokenizer, capsys):
    torch.manual_seed(1)
    small_gpt2(len(tokenizer), width=32, depth=3, heads=4).save_pretrained("other")
    tokenizer.save_pretrained("other")
    arguments = ["apply", "--model", "other", "--edit", str(made / "one.safetensors"), "--save-model", "x"]
    assert main([*arguments, "--strict"]) == 2
    assert "one.safetensors: This edit was made for" in capsys.readouterr().err and not Path("x").exists()
    assert main(arguments) == 0  # warned of


def test_a_base_in_one_file_stays_in_one(made, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    model.save_pretrained("whole")
    tokenizer.save_pretrained("whole")
    run("apply", "--model", "whole", "--edit", made / "one.safetensors", "--save-model", "edited")
    assert [file.name for file in Path("edited").glob("model*")] == ["model.safetensors"]
    assert set(load_file("edited/model.safetensors")) == set(load_file("whole/model.safetensors"))


def test_the_settings_are_read_without_a_model(made):
    command = read(["apply", "--edit", str(made / "one.safetensors"), "--save-model", "x", "--seed", "3"])
    assert command.settings.seed == 3 and command.settings.edit == [str(made / "one.safetensors")]
