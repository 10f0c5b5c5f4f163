"""Two processes that share a model's weights write an edit each into its own slice (gloo, on this machine)."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.distributed as dist
from conftest import make_batch, make_model
from torch import nn
from torch.multiprocessing import spawn

from mendfast import Edit, MendConfig, MendEditor, revert_all

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

UP, DOWN = (f"model.layers.2.mlp.{name}.weight" for name in ("up_proj", "down_proj"))
LAYERS = {"llama": [UP, DOWN], "gpt2": ["transformer.h.2.mlp.c_fc.weight", "transformer.h.3.mlp.c_proj.weight"]}


def edits_of(name: str) -> list[Edit]:
    """One of one row, whose products are rounded once whatever their order, and one of many."""
    editor = MendEditor.from_model(make_model(name), None, MendConfig(rank=4, step_size=0.05, layers=LAYERS[name]))
    many = editor.edit_tokens(make_batch(name))
    one = Edit({key: (u[:1], delta[:1], alpha) for key, (u, delta, alpha) in many.factors.items()}, many.model_type)
    return [one, many]


def sharded(name: str, how: str) -> nn.Module:
    model = make_model(name)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.model.layers if name == "llama" else model.transformer.h:
            fully_shard(block)
        return fully_shard(model)
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2,))
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for block in model.model.layers:
        parallelize_module(block.mlp, mesh, plan)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for name, p in named}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in other.items():
        assert torch.equal(one[name], value), name


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


def apply_and_revert(name: str, how: str) -> None:
    plain, model = make_model(name), sharded(name, how)
    before, batch = whole(plain), make_batch(name)
    one, many = edits_of(name)
    with torch.no_grad():
        answered = model(**batch).logits  # FSDP2 keeps the outermost module's weights gathered after this
    one.apply_(model)
    one.apply_(plain)
    same(whole(model), whole(plain))
    assert one.fidelity(model) == pytest.approx(one.fidelity(plain), rel=1e-9)
    many.apply_(model)
    many.apply_(plain)
    close(whole(model), whole(plain))
    with torch.no_grad():
        applied = model(**batch).logits
        torch.testing.assert_close(applied, plain(**batch).logits, rtol=1e-4, atol=1e-4)
    assert (applied - answered).abs().max() > 1e-3
    one.revert_(model)
    one.revert_(plain)
    close(whole(model), whole(plain))
    many.revert_(model)
    same(whole(model), before)
    with torch.no_grad():
        plain = make_model(name)
        with many.attached(model), many.attached(plain):
            torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)
    # again from a copy of it, and by digest
    Edit(many.factors, many.model_type).apply_(model)
    many.revert_(model)
    same(whole(model), before)


def all_or_none(name: str, how: str) -> None:
    """What one process finds wrong stops both of them, and nothing is written anywhere."""
    model, (one, _) = sharded(name, how), edits_of(name)
    before = whole(model)
    huge = {key: (u, torch.zeros_like(delta), alpha) for key, (u, delta, alpha) in one.factors.items()}
    for u, delta, _ in huge.values():  # overflows in the rows of the second process alone
        delta[:, -1], u[:, -1] = 3e38, 3e38
    with pytest.raises(ValueError, match="would hold infinity"):
        Edit(huge).apply_(model)
    same(whole(model), before)
    one.apply_(model)
    after = whole(model)
    key = next(iter(one.factors))
    part = model.get_parameter(key).to_local().detach()
    if dist.get_rank():
        part[0, 0] += 1
    with pytest.raises(ValueError, match="written by something else"):
        revert_all(model)
    if dist.get_rank():
        part[0, 0] -= 1
        part[0, 0] = after[key].chunk(2, dim=model.get_parameter(key).placements[0].dim)[1][0, 0]
    same(whole(model), after)
    revert_all(model)
    same(whole(model), before)


def parallel_is_said(name: str, how: str) -> None:
    model = sharded(name, how)
    editor = MendEditor.from_model(model, None, MendConfig(rank=4, layers=LAYERS[name]))
    with pytest.raises(ValueError, match="in parallel by several processes.*make the edit on a model that is whole"):
        editor.edit_tokens(make_batch(name))


def in_a_process(rank: int, port: int, cases: list) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for case, *arguments in cases:
        case(*arguments)
    dist.destroy_process_group()


def test_each_process_writes_its_own_slice():
    cases = [(apply_and_revert, "llama", "fsdp"), (apply_and_revert, "gpt2", "fsdp"), (apply_and_revert, "llama", "tp")]
    cases += [(all_or_none, "llama", how) for how in ("fsdp", "tp")] + [(parallel_is_said, "llama", "tp")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(in_a_process, (port, cases), nprocs=2)


def test_a_division_that_is_not_known_is_refused():
    from torch.distributed.tensor import DTensor, Partial

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model, (one, _) = make_model("llama"), edits_of("llama")
        module = model.model.layers[2].mlp.up_proj
        before = copy.deepcopy(module.weight.data)
        module.weight = nn.Parameter(DTensor.from_local(module.weight.data, mesh, [Partial()]))
        with pytest.raises(ValueError, match="sharded over devices, and it is placed as P.*; attach the edit"):
            one.apply_(model)
        assert torch.equal(module.weight.to_local(), before)
    finally:
        dist.destroy_process_group()
