"""The meta-training loss against the naive loop, and what it computes only once."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSIFIER, SEQ2SEQ, make_batch, make_model
from test_editor import same_bits, state, trained

from benchmarks.naive_mend import meta_step
from mendfast import MendConfig, MendEditor
from mendfast.choice import stacks
from mendfast.frozen_prefix import FrozenPrefix
from mendfast.training import editor_loss as meta_loss
from mendfast.training.meta import ROOT_FROM


def batches(name: str, left: bool = False) -> list[dict[str, torch.Tensor]]:
    """4 edits, 1 rephrasing and 2 neighbours each."""
    return [make_batch(name, size, length, seed, left) for size, length, seed in ((4, 9, 1), (4, 11, 2), (8, 8, 3))]


def gradients(editor: MendEditor) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in editor.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "left"),
    [(name, left) for name in ("gpt2", "llama", "opt", "gpt_neox") for left in (False, True)]
    + [(name, False) for name in (*SEQ2SEQ, *CLASSIFIER)],
)
def test_side_by_side_equals_one_at_a_time(name, left):
    # in float64: one float32 pre-activation that rounding puts on the other side of the clamp moves a gradient by 1e-3
    model = make_model(name).double()
    editor = trained(model, name).double()
    data, before = batches(name, left), state(model)
    total, parts = meta_loss(editor, *data, c_edit=0.3, c_loc=0.7)
    total.backward()
    ours = gradients(editor)
    editor.zero_grad()
    naive = meta_step(editor, *data, c_edit=0.3, c_loc=0.7)
    theirs = gradients(editor)
    editor.zero_grad()
    frozen = meta_step(editor, *data, c_edit=0.3, c_loc=0.7, freeze_below=True)  # as EasyEdit: the same
    assert torch.allclose(torch.stack(frozen), torch.stack(naive), rtol=1e-12)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(torch.stack([total.detach(), parts["l_edit"], parts["l_loc"]]), torch.stack(naive),
                               rtol=1e-10, atol=1e-12)  # fmt: skip
    assert set(ours) == set(theirs)
    for key, grad in theirs.items():
        assert grad.norm() > 0, key
        assert (ours[key] - grad).norm() <= 1e-9 * grad.norm() + 1e-14, key
    assert same_bits(model, before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("joint", [2, 4, True])
def test_joint_is_the_sum(joint):
    """k edits at once: the loss under the sum of their updates."""
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    inner, outer, loc = batches("gpt2")
    total, parts = meta_loss(editor, inner, outer, loc, joint=joint)
    size = 4 if joint is True else joint
    l_edit = []
    for start in range(0, 4, size):
        edit = editor.edit_tokens({k: v[start : start + size] for k, v in inner.items()})
        with edit.attached(model), torch.no_grad():
            for i in range(start, start + size):
                l_edit.append(model(**{k: v[i : i + 1] for k, v in outer.items()}).loss)
    torch.testing.assert_close(parts["l_edit"], torch.stack(l_edit).mean(), rtol=1e-4, atol=1e-5)
    total.backward()
    assert all(p.grad is not None for p in editor.parameters())


def test_learning_starts_at_initialisation():
    """Every pre-activation is exactly 0 there; a relu would pass no gradient to U."""
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=8))
    editor.train()
    meta_loss(editor, *batches("gpt2"))[0].backward()
    for net in editor.networks.values():
        assert all(block.U.grad.abs().sum() > 0 for block in net.both)


def test_an_edit_without_update_has_no_locality_loss():
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=8, step_size=0.0))
    _, parts = meta_loss(editor, *batches("gpt2"))
    assert parts["l_loc"].abs() < 1e-6


def test_batch_reduction_averages_over_tokens():
    model = make_model("gpt2")
    editor = MendEditor.from_model(model, None, MendConfig(rank=8, step_size=0.0, loss_reduction="batch"))
    inner, outer, loc = batches("gpt2")
    outer["labels"][0, :-4] = -100
    _, parts = meta_loss(editor, inner, outer, loc)
    torch.testing.assert_close(parts["l_edit"], model(**outer).loss.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "bert"])
def test_the_frozen_part_runs_once(name):
    model = make_model(name)
    editor = trained(model, name)
    calls: dict[str, int] = {}

    def count(key):
        return lambda *_: calls.__setitem__(key, calls.get(key, 0) + 1)

    for stack, blocks in stacks(model):
        for i, block in enumerate(blocks):
            inside = next(m for m in block.modules() if isinstance(m, torch.nn.Linear) or "Conv1D" in type(m).__name__)
            inside.register_forward_hook(count((stack, i)))
    meta_loss(editor, *batches(name))
    frozen = len(FrozenPrefix(model, editor.layers).blocks)
    # inner once, outer once, loc once below the edits and twice above (base and edited)
    assert sorted(calls.values()) == sorted([3] * frozen + [4] * (len(calls) - frozen))
    assert frozen == 1


def test_batches_that_do_not_fit():
    editor = trained(make_model("gpt2"), "gpt2")
    inner, outer, _ = batches("gpt2")
    with pytest.raises(ValueError, match="loc has 7 samples for 4 edits"):
        meta_loss(editor, inner, outer, make_batch("gpt2", 7))
    with pytest.raises(ValueError, match="groups of 3"):
        meta_loss(editor, inner, outer, outer, joint=3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "bert"])
@pytest.mark.parametrize("user_trains", [False, True])
def test_checkpointed_activations_change_nothing(name, user_trains):
    """The blocks are run again when all contexts have closed, and the user's model may want gradients then."""
    model = make_model(name).train(user_trains).requires_grad_(user_trains)
    editor = trained(model, name)
    results, held = [], []
    for recompute in (False, True):
        editor.zero_grad()
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total, parts = meta_loss(editor, *batches(name), checkpoint_activations=recompute)
        total.backward()
        results.append({**gradients(editor), "total": total.detach(), **parts})
        held.append(kept)
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key
    assert held[1] < 0.75 * held[0]
    assert all(p.grad is None and p.requires_grad == user_trains for p in model.parameters())
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_rows_that_are_not_finite_stay_out_of_the_statistics():
    net = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=8)).networks["(32, 128)"]
    u, delta = torch.randn(9, 32), torch.randn(9, 128)
    net.observe(u[2:8], delta[2:8])
    alone = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.count.zero_(), net.u_m2.zero_(), net.u_mean.zero_(), net.delta_m2.zero_(), net.delta_mean.zero_()
    u[0, 3], delta[1, 5], u[8, 0] = float("nan"), float("inf"), 1e30  # the last one's square overflows
    net.observe(u, delta)
    net.observe(u[:2], delta[:2])
    assert all(torch.equal(buffer, alone[name]) for name, buffer in net.named_buffers())
    assert net.count == 6 and net.u_std.isfinite().all()


@pytest.mark.parametrize("left", [False, True])
def test_locality_where_answers_are_predicted(left):
    """The KL of those positions alone, each text's mean, by plain code on the edited model."""
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    inner, outer, loc = batches("gpt2", left)
    _, parts = meta_loss(editor, inner, outer, loc, joint=True, loc_answers=True)
    inputs = {name: value for name, value in loc.items() if name != "labels"}
    inputs["position_ids"] = (loc["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        base = model(**inputs).logits.log_softmax(-1)
        with editor.edit_tokens(inner).attached(model):
            edited = model(**inputs).logits.log_softmax(-1)
    kl = (base.exp() * (base - edited)).sum(-1)[:, :-1]
    predicts = loc["labels"][:, 1:] != -100
    assert 0 < predicts.sum() < loc["attention_mask"].sum() / 2
    expected = torch.stack([row[kept].mean() for row, kept in zip(kl, predicts, strict=True)]).mean()
    torch.testing.assert_close(parts["l_loc"], expected, rtol=1e-3, atol=1e-6)


def test_roots_of_the_kl():
    """sqrt(KL / 2) of each position, by plain code; a slope that is finite where nothing has changed."""
    model = make_model("gpt2")
    editor = trained(model, "gpt2")
    inner, outer, loc = batches("gpt2")
    total, parts = meta_loss(editor, inner, outer, loc, joint=True, loc_root=True)
    inputs = {name: value for name, value in loc.items() if name != "labels"}
    with torch.no_grad():
        base = model(**inputs).logits.log_softmax(-1)
        with editor.edit_tokens(inner).attached(model):
            edited = model(**inputs).logits.log_softmax(-1)
    half = (base.exp() * (base - edited)).sum(-1).clamp(min=0) / 2
    roots = (half + ROOT_FROM).sqrt() - ROOT_FROM**0.5
    kept = loc["attention_mask"] != 0
    moved = (base.exp() - edited.exp()).abs().sum(-1) / 2
    assert (moved[kept] <= half[kept].sqrt() + 1e-5).all() and moved.max() > 1e-4
    expected = torch.stack([row[real].mean() for row, real in zip(roots, kept, strict=True)]).mean()
    torch.testing.assert_close(parts["l_loc"], expected, rtol=1e-3, atol=1e-6)
    total.backward()
    assert all(bool(grad.isfinite().all()) for grad in gradients(editor).values())

    editor.zero_grad()
    editor.alpha_multiplier.data.zero_()  # no edit at all
    total, parts = meta_loss(editor, inner, outer, loc, joint=True, loc_root=True)
    total.backward()
    assert parts["l_loc"] < 1e-4 and all(bool(grad.isfinite().all()) for grad in gradients(editor).values())
