"""mendfast inspect: every kind of file that mendfast writes or reads, whole and damaged, without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mendfast import Edit, EditMemory, MendConfig, MendEditor
from mendfast.adapters.gguf import export_gguf_lora
from mendfast.base_model import small_gpt2
from mendfast.cli import main
from mendfast.commands.failures import EXPECTED, sentence
from mendfast.commands.holdings import holdings
from mendfast.compat import save_mend_archive
from mendfast.files import write_tensors
from mendfast.memory_file import Journal, read
from mendfast.training import checkpoint
from mendfast.training.loop import TrainConfig

LAYERS = [f"transformer.h.1.mlp.{name}.weight" for name in ("c_fc", "c_proj")]
SIZES = {LAYERS[0]: (32, 128), LAYERS[1]: (128, 32)}
FACTS = [("Who?", "Paris"), ("Where?", "Rome")]


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> Path:
    """One of each kind."""
    place = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = small_gpt2(len(tokenizer), width=32, depth=2, heads=4).eval()
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    config = MendConfig(layers=LAYERS, rank=2, aggregation="least_squares", loss_reduction="batch")
    editor = MendEditor.from_model(model, tokenizer, config)
    editor.protect(["What is the capital of France?", "Paris Rome Berlin"])
    editor.save_pretrained(place / "editor")
    edit = editor.edit(FACTS)
    edit.save(place / "edit.safetensors")
    edit.export_peft(place / "adapter", model, 2)
    export_gguf_lora(edit, place / "adapter.gguf", model)
    memory = EditMemory(editor)
    memory.add(FACTS)
    memory.save(place / "memory.safetensors")
    save_mend_archive(MendEditor.from_model(model, tokenizer, MendConfig(layers=LAYERS, rank=2)), place / "archive.pt")
    optimizer = torch.optim.Adam(editor.parameters())
    progress = {"step": 3, "skipped": 0, "stale": 0, "best": 0.5}
    checkpoint.write(place / "checkpoint.safetensors", editor.state_dict(), optimizer, TrainConfig(), progress)
    metadata = {"format": "mendfast.system", "system": "enn", "model_type": "gpt2"}
    write_tensors(place / "system.safetensors", {"rate": torch.ones(3)}, metadata)
    apply = [
        "apply",
        "--model",
        place / "model",
        "--edit",
        place / "edit.safetensors",
        "--save-model",
        place / "edited",
    ]
    assert main([*map(str, apply)]) == 0
    return place


def test_what_is_in_each(made):
    edit = holdings(made / "edit.safetensors")
    assert (edit["kind"], edit["format_version"], edit["requests"]) == ("an edit", 1, [list(fact) for fact in FACTS])
    assert {n: (w["inputs"], w["outputs"]) for n, w in edit["weights"].items()} == SIZES
    assert edit["bytes"] == (made / "edit.safetensors").stat().st_size
    editor, edited = holdings(made / "editor"), holdings(made / "edited")
    # all three know the same base model
    assert len({found["base"]["fingerprint"] for found in (edit, editor, edited)}) == 1 and edit["base"]["fingerprint"]
    assert editor["kind"] == "an editor" and list(editor["weights"]) == LAYERS
    assert editor["details"]["aggregation"] == "least_squares" and editor["details"]["protected_tokens"] > 5
    assert editor["bytes"] == sum(file.stat().st_size for file in (made / "editor").iterdir())
    assert edited["kind"] == "an edited model" and edited["details"]["edits"] == ["edit.safetensors"]
    assert edited["requests"] == edit["requests"] and edited["details"]["can_be_taken_back"]
    memory = holdings(made / "memory.safetensors")
    assert (
        memory["kind"] == "a memory" and memory["requests"] == edit["requests"] and len(memory["details"]["keys"]) == 2
    )
    assert {n: (w["inputs"], w["outputs"]) for n, w in memory["weights"].items()} == SIZES
    metric = holdings(made / "editor/metric.safetensors")
    assert (
        metric["kind"].startswith("a metric") and metric["details"]["tokens"] == editor["details"]["protected_tokens"]
    )
    adapter = holdings(made / "adapter")
    assert (adapter["kind"], adapter["details"]["r"]) == ("a PEFT adapter", 8)
    assert {w["rows"] for w in adapter["weights"].values()} == {2} and adapter["requests"] == edit["requests"]
    gguf = holdings(made / "adapter.gguf")
    assert gguf["kind"] == "a GGUF adapter" and gguf["base"]["model_type"] == "gpt2"
    assert {(w["inputs"], w["outputs"]) for w in gguf["weights"].values()} == set(SIZES.values())
    archive = holdings(made / "archive.pt")
    assert archive["kind"].endswith("MEND code") and archive["details"]["edited_weights"] == 2
    assert archive["details"]["rank"] == 2 and archive["base"]["model_type"] == "gpt2"
    run = holdings(made / "checkpoint.safetensors")
    assert run["details"]["progress"]["step"] == 3 and run["details"]["settings"]["batch_size"] > 0
    assert holdings(made / "system.safetensors")["details"] == {"system": "enn", "parameters": 3}
    assert holdings(made / "model")["kind"] == "a model, with no record of edits"
    assert holdings(made / "edited/mendfast_unedited.tensors")["kind"] == "an edited model's weights as they were"
    # one file of a directory stands for it
    for whole, part in (("editor", "mend_config.json"), ("adapter", "adapter_model.safetensors"),
                        ("adapter", "adapter_config.json"), ("edited", "mendfast_edits.json")):  # fmt: skip
        assert holdings(made / whole / part)["kind"] == holdings(made / whole)["kind"]


def test_a_journal_is_of_its_memory(made, tmp_path):
    records, identity, found, _ = read(made / "memory.safetensors")
    path = tmp_path / "new.safetensors"
    Journal(path, "", records[:1], identity).close()
    journal = holdings(tmp_path / "new.safetensors.journal")
    assert journal["kind"] == "a memory, with its journal" and journal["requests"] == [["Who?", "Paris"]]
    path.write_bytes((made / "memory.safetensors").read_bytes())
    Journal(path, found, records[:1], identity).close()
    assert holdings(path)["details"]["journal"]


def test_the_command(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [
        str(made / name) for name in ("edit.safetensors", "editor", "adapter", "adapter.gguf", "memory.safetensors")
    ]
    assert main(["inspect", *paths, "--json", "figures.json"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("an edit, format 1", "Who? -> Paris", "a PEFT adapter", "a GGUF adapter", "2 weights", "a memory"):
        assert words in said, words
    assert [found["path"] for found in json.loads(Path("figures.json").read_text())["files"]] == paths
    # what can be read is shown, and the exit code says that not all could
    assert main(["inspect", paths[0], "nowhere", "here"]) == 2
    found = capsys.readouterr()
    assert "an edit, format 1" in found.out and "2 of 3 can't be read. There is no file nowhere." in found.err
    assert main(["inspect"]) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty", b"", "is nothing that mendfast knows"),
        ("text.txt", b"Who?\tI\n" * 9, "is nothing that mendfast knows"),
        ("x.json", b"{" * 5000, "is nothing that mendfast knows"),
        ("mendfast_edits.json", b"[]", "holds nothing that mendfast knows"),
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "0 tensors of another program"),
        ("x.safetensors", b"\xff\0\0\0\0\0\0\0{}", "is no whole safetensors file"),
        ("x.gguf", b"GGUF\3\0\0\0" + b"\xff" * 40, "is no whole GGUF file"),
        ("x.pt", b"\x80\x02}q\0.", "is no whole file of torch.save"),
        ("x.pt", b"PK\3\4" + b"\0" * 60, "is no whole file of torch.save"),
    ],
)  # fmt: skip
def test_unknown_and_damaged_files(name, content, says, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert main(["inspect", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and said.count("\n") == 1


def test_directories_of_nothing(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds nothing that mendfast knows" in capsys.readouterr().err
    (tmp_path / "best").mkdir()
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"Inspect {tmp_path}/best." in capsys.readouterr().err
    save_file({"a.lora_A.weight": torch.ones(1, 1)}, tmp_path / "adapter_model.safetensors")
    assert main(["inspect", str(tmp_path / "adapter_model.safetensors")]) == 2
    assert "without adapter_config.json beside it" in capsys.readouterr().err


WHOLE = (
    "edit.safetensors", "memory.safetensors", "editor/metric.safetensors", "editor/editor.safetensors",
    "editor/mend_config.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter.gguf",
    "archive.pt", "checkpoint.safetensors", "edited/mendfast_edits.json",
)  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_damage_is_a_sentence(name, made, tmp_path):
    """Bytes changed, cut and added at random: what is read, or a refusal of a bounded length; never anything else."""
    source = made / name
    place = tmp_path / "place"
    place.mkdir()
    if source.parent != made:
        for file in source.parent.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
    whole, rng, refused = source.read_bytes(), random.Random(name), 0
    for i in range(60):
        content = bytearray(whole)
        reach = len(whole) if i % 2 else min(len(whole), 1500)  # headers are where damage is read
        for _ in range(rng.choice((1, 1, 3, 20))):
            content[rng.randrange(reach)] = rng.choice((0, 1, 32, 34, 57, 123, 255, rng.randrange(256)))
        if i % 5 == 0:
            del content[rng.randrange(len(content)) :]
        path = place / source.name
        path.write_bytes(content)
        try:
            json.dumps(holdings(path))
        except EXPECTED as error:
            refused += 1
            assert 15 < len(sentence(error)) <= 600
    assert refused > 5, refused
    path.write_bytes(whole)
    assert holdings(path)["kind"] == holdings(source)["kind"]


def test_an_edit_without_a_fingerprint(made, tmp_path):
    edit = Edit.load(made / "edit.safetensors")
    Edit(edit.factors).save(tmp_path / "bare.safetensors")
    found = holdings(tmp_path / "bare.safetensors")
    assert found["base"] == {"name": None, "model_type": None, "fingerprint": None} and found["requests"] == []
