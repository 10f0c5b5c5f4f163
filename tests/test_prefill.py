"""The cache of the frozen part filled ahead of training, and models whose frozen blocks stay on disk."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import SEQ2SEQ, make_model
from test_editor import trained
from test_meta import batches
from test_training import facts

from mendfast import MendConfig, MendEditor, pretrained
from mendfast.base_model import small_gpt2, train_tokenizer
from mendfast.cli import main
from mendfast.training import FactSampler, TrainConfig, Trainer, editor_loss
from mendfast.training.cache import PrefixCache
from mendfast.training.prefill import prefill as fill


def pairs(data):
    return zip(data, (False, False, True), strict=True)


def kept(cache: PrefixCache) -> dict[bytes, list[torch.Tensor]]:
    return dict(cache._states)


@pytest.mark.parametrize("name", ["gpt2", "llama", *SEQ2SEQ])
def test_what_is_filled_is_what_would_be_computed(name):
    model = make_model(name)
    editor = trained(model, name)
    lazy, ahead = (PrefixCache(model, editor.layers, 1 << 30) for _ in range(2))
    loss, _ = editor_loss(editor, *batches(name), cache=lazy)
    count = fill(ahead, pairs(batches(name)))
    assert count == ahead.computed == lazy.computed > 0
    assert kept(lazy).keys() <= kept(ahead).keys()
    for key, states in kept(lazy).items():
        assert all(one.equal(other) for one, other in zip(states, kept(ahead)[key], strict=True))
    filled, _ = editor_loss(editor, *batches(name), cache=ahead)
    assert filled.equal(loss) and ahead.computed == count
    assert fill(ahead, pairs(batches(name))) == 0


def test_a_cache_that_is_too_small_is_filled_as_far_as_it_goes(caplog, monkeypatch):
    monkeypatch.setattr("mendfast.training.cache.TOGETHER", 16)  # tokens: a text in each pass
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    whole = PrefixCache(model, editor.layers, 1 << 30)
    count = fill(whole, pairs(batches("gpt2")))
    cache = PrefixCache(model, editor.layers, whole.held // 2)
    with caplog.at_level(logging.WARNING, logger="mendfast"):
        assert 0 < fill(cache, pairs(batches("gpt2"))) < count
    assert "is full with" in caplog.text and "cache_bytes" in caplog.text
    assert cache.held <= cache.limit


@pytest.fixture
def saved(tmp_path):
    """A directory with a model of five blocks, the last three of which are edited by default."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([wording for item in facts() for wording in item.wordings], 320)
    model = small_gpt2(len(tokenizer), width=32, depth=5, heads=4).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(base, output, **config) -> Trainer:
    torch.manual_seed(0)
    editor = MendEditor.from_model(*base, MendConfig(rank=8, step_size=2e-3, scale_v=True))
    config = TrainConfig(**{**dict(steps=4, batch_size=4, joint=[1, 2], validate_every=2, validation_size=4), **config})
    validation = FactSampler(facts(), seed=5)
    trainer = Trainer(editor, FactSampler(facts()), config, output=output, validation=validation, progress=False)
    trainer.resume()
    trainer.run()
    return trainer


def test_a_run_from_disk_reads_each_frozen_block_once_and_ends_in_the_same_bits(saved, tmp_path):
    plain = run(pretrained.load(str(saved), "float32"), tmp_path / "plain")
    model, tokenizer = pretrained.load(str(saved), "float32", offload=True)
    assert [block.mlp.c_fc.weight.is_meta for block in model.transformer.h] == [True, True, False, False, False]
    assert not model.transformer.wte.weight.is_meta
    passes = [0] * 5
    for i, block in enumerate(model.transformer.h):
        block.mlp.c_fc.register_forward_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
    ahead = run((model, tokenizer), tmp_path / "ahead", prefill=True)
    for name, tensor in plain.editor.state_dict().items():
        assert ahead.editor.state_dict()[name].equal(tensor), name
    assert ahead.learner.cache.computed == plain.learner.cache.computed
    assert passes[0] == passes[1] < passes[4] / 2  # once for each group of texts, and no more in the steps
    ended = run((model, tokenizer), tmp_path / "ahead", prefill=True)
    assert ended.step == 4


@pytest.mark.parametrize("given", [{"device_map": "auto"}, {"quantize": "8bit"}])
def test_what_does_not_go_with_offloading_is_refused(saved, given):
    with pytest.raises(ValueError, match=f"does not go with {next(iter(given))}"):
        pretrained.load(str(saved), offload=True, **given)


def test_the_command_trains_from_disk(saved, tmp_path, capsys):
    questions = tmp_path / "questions.tsv"
    rows = [f"{item.wordings[0]}\t{item.answer}" for item in facts()[:40]]
    questions.write_text("question\tanswer\n" + "\n".join(rows) + "\n")
    command = ["train", "--task", "qa", "--data", str(questions), "--steps", "2", "--batch-size", "4", "--rank", "4",
               "--validate-every", "0", "--prefill"]  # fmt: skip
    assert main([*command, "--model", str(saved), "--offload", "--output", str(tmp_path / "run")]) == 0
    assert "of a block on a text were not needed" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--offload", "--output", str(tmp_path / "other")]) == 2
    assert "no --model is given" in capsys.readouterr().err
