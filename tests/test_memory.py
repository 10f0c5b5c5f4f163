"""Memory: predicted from shapes and two small passes, and held against tensors that are there."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_batch, make_model
from test_cli import mendfast
from test_editor import same_bits, state
from test_training import facts, make

from mendfast import MendConfig, MendEditor
from mendfast.base_model import small_gpt2, train_tokenizer
from mendfast.training import FactSampler, Trainer
from mendfast.training import editor_loss as meta_loss
from mendfast.training.memory import LivePeak, peak_bytes, predict


def batches(size: int) -> tuple[dict[str, torch.Tensor], ...]:
    return make_batch("gpt2", size, 9, 1), make_batch("gpt2", size, 11, 2), make_batch("gpt2", 2 * size, 20, 3)


def real(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_predicted_bytes_are_those_of_the_tensors():
    model = make_model("gpt2").to(torch.bfloat16)
    editor = MendEditor.from_model(model, None, MendConfig(rank=16))
    before = state(editor)
    predicted = predict(editor, batches(4))
    assert same_bits(editor, before) and all(p.grad is None for p in editor.parameters())
    optimizer = torch.optim.Adam(editor.parameters())
    meta_loss(editor, *batches(4))[0].backward()
    optimizer.step()
    moments = [tensor for values in optimizer.state.values() for tensor in values.values()]
    assert predicted["adam"] == real(moments)
    assert predicted["gradients"] == real(p.grad for p in editor.parameters())
    assert predicted["editor"] == real(editor.state_dict().values())
    assert predicted["base"] == real({p.data_ptr(): p for p in model.parameters()}.values()) + real(model.buffers())
    assert predicted["total"] == sum(size for kind, size in predicted.items() if kind != "total")


@pytest.mark.parametrize("recompute", [False, True])
def test_the_straight_line_meets_the_peak_of_many_edits(recompute):
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=16))
    predicted = predict(editor, batches(12), checkpoint_activations=recompute)
    with LivePeak([*editor.model.parameters(), *editor.model.buffers(), *editor.state_dict().values()]) as live:
        meta_loss(editor, *batches(12), checkpoint_activations=recompute)[0].backward()
    ours = predicted["gradients"] + predicted["logits"] + predicted["activations"]
    assert ours == pytest.approx(live.peak, rel=0.1)


def test_checkpointing_is_predicted_to_save():
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=16))
    kept, again = (predict(editor, batches(12), checkpoint_activations=recompute) for recompute in (False, True))
    assert again["activations"] < 0.8 * kept["activations"] and again["adam"] == kept["adam"]


def test_live_peak_follows_what_lives():
    known = torch.ones(1000)
    with LivePeak([known]) as live:
        a = torch.zeros(256)
        b = a + 1
        view = b[:3]
        known.mul_(2)
        del b
        assert live.now == 2048
        del view
        assert (live.now, live.peak) == (1024, 2048)


@pytest.mark.filterwarnings("error:No artists:UserWarning")  # of a run too short to have been validated
def test_the_peak_of_a_run_is_reported(tmp_path):
    tokenizer = train_tokenizer([w for item in facts() for w in item.wordings], 320)
    model = small_gpt2(len(tokenizer), width=32, depth=3, heads=4).eval()
    editor, config = make((model, tokenizer), steps=1, validate_every=0)
    trainer = Trainer(editor, FactSampler(facts()), config, output=tmp_path, progress=False)
    planned = trainer.plan()
    metrics = trainer.run()
    assert planned["total"] < metrics["peak_bytes"] <= peak_bytes(editor.device)
    assert "peak_bytes" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_dry_run_says_it_all(tmp_path):
    data, figures = tmp_path / "qa.tsv", tmp_path / "plan.json"
    data.write_text("".join(f"Who is number {i}?\tPerson {i % 7}\n" for i in range(40)))
    done = mendfast("train", "--data", data, "--output", tmp_path / "run", "--base-width", 32, "--base-depth", 3,
                    "--base-vocabulary", 300, "--base-steps", 2, "--rank", 8,
                    "--dry-run", "--json", figures)  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(figures.read_text())
    assert set(plan["bytes"]) == {"base", "editor", "gradients", "adam", "logits", "activations", "total"}
    assert plan["bytes"]["gradients"] == 4 * plan["parameters"]
    assert len(plan["layers"]) == 6 and f"{plan['parameters']:,} parameters; predicted memory" in done.stdout
    assert not (tmp_path / "run/last").exists() and not (tmp_path / "run/metrics.jsonl").exists()
