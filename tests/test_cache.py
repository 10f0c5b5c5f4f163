"""The cache of the frozen part: the same losses and gradients, the same bits after a resume, within its bounds."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSIFIER, SEQ2SEQ, make_batch, make_model
from test_editor import state, trained
from test_meta import batches, gradients
from test_training import base, facts, make  # noqa: F401  (a fixture)

from mendfast import MendConfig, MendEditor
from mendfast.choice import stacks
from mendfast.training import FactSampler, Trainer, editor_loss
from mendfast.training.cache import PrefixCache


def loss_and_gradients(editor, data, **options) -> dict[str, torch.Tensor]:
    editor.zero_grad()
    total, parts = editor_loss(editor, *data, **options)
    total.backward()
    return {**gradients(editor), "total": total.detach(), **parts}


def count_blocks(model) -> list[list[int]]:
    """How often each block's first matrix runs, filled in as the model does."""
    counts = []
    for _, blocks in stacks(model):
        counts.append([0] * len(blocks))
        for i, block in enumerate(blocks):
            inside = next(m for m in block.modules() if isinstance(m, torch.nn.Linear) or "Conv1D" in type(m).__name__)
            inside.register_forward_hook(lambda *_, own=counts[-1], i=i: own.__setitem__(i, own[i] + 1))
    return counts


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox", "gemma", *SEQ2SEQ, *CLASSIFIER])
@pytest.mark.parametrize(("joint", "recompute"), [(1, False), (2, False), (1, True)])
def test_the_step_is_that_without_cache(name, joint, recompute):
    # in float64, for the reason that test_meta.py gives
    model = make_model(name).double()
    editor = trained(model, name).double()
    options = {"joint": joint, "checkpoint_activations": recompute}
    plain = loss_and_gradients(editor, batches(name), **options)
    cache = PrefixCache(model, editor.layers, 1 << 30)
    for _ in range(2):  # cold and warm
        cached = loss_and_gradients(editor, batches(name), cache=cache, **options)
        assert set(cached) == set(plain)
        for key, value in plain.items():
            assert (cached[key] - value).norm() <= 1e-9 * value.norm() + 1e-14, key
    assert cache.why_not is None
    assert (cache.asked, cache.computed) == (32, 16)
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padding(name):
    model = make_model(name).double()
    editor = trained(model, name).double()
    plain = loss_and_gradients(editor, batches(name, left=True))
    cached = loss_and_gradients(editor, batches(name, left=True), cache=PrefixCache(model, editor.layers, 1 << 30))
    assert all((cached[key] - value).norm() <= 1e-9 * value.norm() + 1e-14 for key, value in plain.items())


@pytest.mark.parametrize(
    ("name", "expected"), [("gpt2", [[0, 3, 3, 3]]), ("bert", [[0, 3, 3, 3]]), ("t5", [[4, 4, 4], [4, 4, 4]])]
)
def test_a_warm_step_runs_no_frozen_block(name, expected):
    """But T5's first, for its position bias; the base's own pass runs none at all, where there is one stack. Of T5's
    encoder the first of three is frozen, and no more."""
    model = make_model(name)
    editor = trained(model, name)
    cache = PrefixCache(model, editor.layers, 1 << 30)
    editor_loss(editor, *batches(name), cache=cache)
    counts = count_blocks(model)
    editor_loss(editor, *batches(name), cache=cache)
    assert counts == expected


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_states_do_not_depend_on_the_batch(name):
    """Bit for bit: else a resumed run would go another way."""
    model = make_model(name)
    editor = trained(model, name)
    data = make_batch(name, 6, 20)
    results = []
    for order in (list(range(6)), [5, 3, 1, 0, 2, 4]):
        cache = PrefixCache(model, editor.layers, 1 << 30)
        for part in (order[:1], order[1:3], order):
            with cache.replayed({key: value[part] for key, value in data.items()}) as served:
                assert served
        results.append(dict(cache._states))
    assert results[0].keys() == results[1].keys()
    for key, kept in results[0].items():
        assert all(a.equal(b) for a, b in zip(kept, results[1][key], strict=True))


def test_edits_in_the_first_block_leave_nothing_to_cache():
    model = make_model("gpt2")
    editor = trained(model, "gpt2", layers=["transformer.h.0.mlp.c_fc.weight"])
    cache = PrefixCache(model, editor.layers, 1 << 30)
    plain, cached = (loss_and_gradients(editor, batches("gpt2"), cache=c) for c in (None, cache))
    assert all(cached[key].equal(value) for key, value in plain.items())
    assert "no blocks below" in cache.summary()


def test_memory_is_bounded_and_a_small_cache_gives_the_same_bits():
    model = make_model("llama")
    editor = trained(model, "llama")
    whole = PrefixCache(model, editor.layers, 1 << 30)
    first = loss_and_gradients(editor, batches("llama"), cache=whole)
    small = PrefixCache(model, editor.layers, whole.held // 3)
    for _ in range(2):
        again = loss_and_gradients(editor, batches("llama"), cache=small)
        assert small.held <= small.limit
        assert small.held == sum(t.numel() * t.element_size() for kept in small._states.values() for t in kept)
        assert all(again[key].equal(value) for key, value in first.items())
    assert small.computed > 16
    with pytest.raises(ValueError, match="limit is -1"):
        PrefixCache(model, editor.layers, -1)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_what_memory_does_not_hold_goes_to_disk(name, tmp_path):
    model = make_model(name)
    editor = trained(model, name)
    whole = PrefixCache(model, editor.layers, 1 << 30)
    first = loss_and_gradients(editor, batches(name), cache=whole)
    small = PrefixCache(model, editor.layers, whole.held // 3, directory=tmp_path)
    for _ in range(2):
        again = loss_and_gradients(editor, batches(name), cache=small)
        assert all(again[key].equal(value) for key, value in first.items())
    assert small.computed == 16 and small.read > 0 and small.held <= small.limit
    small.flush()
    later = PrefixCache(model, editor.layers, 1 << 30, directory=tmp_path)
    again = loss_and_gradients(editor, batches(name), cache=later)
    assert all(again[key].equal(value) for key, value in first.items())
    assert later.computed <= 1  # to see what the blocks give
    assert "on disk" in later.summary()


def test_another_model_is_not_served_from_an_old_disk_cache(tmp_path):
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    data = batches("gpt2")

    def run() -> tuple[PrefixCache, dict[str, torch.Tensor]]:
        cache = PrefixCache(model, editor.layers, 1 << 30, directory=tmp_path)
        found = loss_and_gradients(editor, data, cache=cache)
        cache.flush()
        return cache, found

    run()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[3] += 0.5
    cache, changed = run()
    assert cache.computed == 16 and cache.read == 0
    fresh = loss_and_gradients(editor, data, cache=PrefixCache(model, editor.layers, 1 << 30))
    assert changed["total"].equal(fresh["total"])
    cache, again = run()
    assert cache.computed <= 1 and again["total"].equal(changed["total"])


def test_the_disk_is_bounded_and_a_damaged_file_passed_over(tmp_path):
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    full = PrefixCache(model, editor.layers, 4096, directory=tmp_path / "full", disk_limit=20_000)
    for seed in range(3):
        with full.replayed(make_batch("gpt2", 8, 12, seed)):
            pass
    full.flush()
    assert 0 < sum(f.stat().st_size for f in (tmp_path / "full").rglob("*") if f.is_file()) <= 20_000
    one = PrefixCache(model, editor.layers, 1 << 30, directory=tmp_path / "cut")
    with one.replayed(make_batch("gpt2", 8, 12)):
        pass
    one.flush()
    (path,) = (tmp_path / "cut").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    two = PrefixCache(model, editor.layers, 1 << 30, directory=tmp_path / "cut")
    with two.replayed(make_batch("gpt2", 8, 12)):
        pass
    assert two.computed == 8 and two.read == 0
    assert all(a.equal(b) for key, kept in one._states.items() for a, b in zip(kept, two._states[key], strict=True))


def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path):  # noqa: F811
    def trainer(output, **config):
        _, settings = make(base, loc_positions=3, **config)
        layers = ["transformer.h.2.mlp.c_fc.weight", "transformer.h.2.mlp.c_proj.weight"]  # of three blocks
        editor = MendEditor.from_model(*base, MendConfig(rank=32, layers=layers, append_eos=True))
        validation = FactSampler(facts(), seed=5)
        return Trainer(editor, FactSampler(facts()), settings, output=output, validation=validation, progress=False)

    whole = trainer(tmp_path / "whole", cache_bytes=20_000, cache_disk_bytes=1 << 30)
    whole.run()
    assert list((tmp_path / "whole/cache").rglob("*.safetensors"))
    assert "texts came from the cache" in whole.summary()
    stopped = trainer(tmp_path / "stopped", cache_bytes=20_000)
    step = stopped._gradients

    def stop_at_five(joint):
        if stopped.step == 5:
            raise KeyboardInterrupt
        return step(joint)

    stopped._gradients = stop_at_five
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = trainer(tmp_path / "stopped", cache_bytes=20_000)
    assert resumed.resume() and resumed.step == 4
    resumed.run()
    left, right = state(whole.editor), state(resumed.editor)
    assert left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.mark.parametrize(("draws", "band"), [(2000, 1.05), (10, 2.0)])
def test_the_bytes_are_predicted(base, monkeypatch, draws, band):  # noqa: F811
    """Not less than there are, and hardly more: where the run's draws are all looked at, and where some are."""
    monkeypatch.setattr("mendfast.training.memory.DRAWS", draws)
    layers = ["transformer.h.2.mlp.c_fc.weight"]  # of three blocks

    def trainer(**config) -> Trainer:
        editor = MendEditor.from_model(*base, MendConfig(rank=8, layers=layers, append_eos=True))
        settings = make(base, steps=40, batch_size=4, **config)[1]
        return Trainer(editor, FactSampler(facts(), targets=2), settings, progress=False)

    whole = trainer()
    planned = whole.plan_cache()
    whole.run()
    held = whole.learner.cache.held
    assert 0 < held <= planned["bytes"] <= band * held
    assert planned["in memory"] == planned["bytes"] and planned["on disk"] == 0
    assert trainer(cache_bytes=5000).plan_cache()["in memory"] == 5000
    assert trainer(cache_bytes=0).plan_cache() == {}


def test_the_summary_counts_runs_of_blocks():
    """Of four blocks the first is frozen: a warm step saves it for 16 texts, and all four for the base's pass."""
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    cache = PrefixCache(model, editor.layers, 1 << 30)
    editor_loss(editor, *batches("gpt2"), cache=cache)
    # 8 locality texts are asked for twice, of which the first time computes both
    assert (cache.runs, cache.saved_runs) == (8 * 4 + 8 + 4 + 4, 8)
    editor_loss(editor, *batches("gpt2"), cache=cache)
    assert (cache.runs, cache.saved_runs) == (96, 8 + 48)
    assert "56 of 96 runs of a block on a text were not needed" in cache.summary()


def test_without_a_cache(base):  # noqa: F811
    editor, config = make(base, steps=2, cache_bytes=0)
    trainer = Trainer(editor, FactSampler(facts()), config, progress=False)
    trainer.run()
    assert trainer.learner.cache is None and trainer.summary() == ""


@pytest.mark.parametrize("reduction", ["edit", "batch"])
def test_drawn_positions_are_unbiased_and_repeatable(reduction):
    model = make_model("gpt2").double()
    editor = trained(model, "gpt2", loss_reduction=reduction).double()
    data = batches("gpt2")  # locality texts of 6 to 8 tokens
    cache = PrefixCache(model, editor.layers, 1 << 30)

    def l_loc(count: int, seed: int) -> torch.Tensor:
        with torch.no_grad():
            return editor_loss(editor, *data, loc_positions=count, seed=seed, cache=cache)[1]["l_loc"]

    full = l_loc(0, 0)
    draws = torch.stack([l_loc(2, seed) for seed in range(400)])
    error = draws.std() / len(draws) ** 0.5
    assert 0 < error < 0.1 * full
    assert (draws.mean() - full).abs() < 4 * error
    assert l_loc(2, 7).equal(draws[7])
    assert l_loc(8, 3).equal(full)


@pytest.mark.parametrize("name", [*SEQ2SEQ, *CLASSIFIER])
def test_positions_are_drawn_of_decoders_and_not_of_classes(name):
    editor = trained(make_model(name), name)
    full = editor_loss(editor, *batches(name))[1]["l_loc"]
    assert editor_loss(editor, *batches(name), loc_positions=1)[1]["l_loc"].equal(full) == (name in CLASSIFIER)


def test_few_targets_let_texts_come_back():
    few, any_of = FactSampler(facts(), targets=2), FactSampler(facts())
    seen = [{}, {}]
    for step in range(60):
        for sampler, found in zip((few, any_of), seen, strict=True):
            for (prompt, target), (_, again) in zip(*sampler.draw(step, 8)[:2], strict=True):
                assert target == again
                found.setdefault(prompt, set()).add(target)
    assert {len(targets) for targets in seen[0].values()} <= {1, 2}
    assert max(len(targets) for targets in seen[1].values()) > 2
    answers = {wording: item.answer for item in facts() for wording in item.wordings}
    assert all(answers[prompt] not in targets for prompt, targets in seen[0].items())
    with pytest.raises(ValueError, match="targets is -1"):
        FactSampler(facts(), targets=-1)
