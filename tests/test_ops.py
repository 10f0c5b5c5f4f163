"""What holds for every op: torch.library's contract, compilation without graph breaks, the choice of backend."""

import pytest
import torch
from op_cases import CPU, ON_CPU, EditorCase, poisoned  # noqa: F401

import mendfast
from mendfast import backends, ops, reference

OPS = torch.ops.mendfast


def editor_arguments(**kwargs):
    case = EditorCase(5, 4, 3, 2, 2, **kwargs)
    stats = [s.detach() for s in case.stats or ()]
    params = [p.detach() for block in case.blocks for p in block if p is not None]
    return case, (case.u.detach(), case.delta.detach(), stats, params, case.mode)


def opcheck_arguments():
    """(op, arguments) of every registered op, contiguous and permuted layouts."""
    tail = (2, True, True, "ieee", True)
    case, arguments = editor_arguments()
    yield OPS.editor_mlp_fwd, (*arguments, *tail, True, "aten")
    yield OPS.editor_mlp_fwd, (*arguments, *tail, False, "aten")
    saved = OPS.editor_mlp_fwd(*arguments, *tail, True, "aten")[2:]
    yield OPS.editor_mlp_bwd, (*case.grads, *arguments[:4], saved, case.mode, *tail, True, "aten")
    _, bare = editor_arguments(tables=False, stats=False)
    yield OPS.editor_mlp_fwd, (*bare, 2, False, False, "ieee", False, True, "aten")
    _, half = editor_arguments(rows=torch.bfloat16)
    yield OPS.editor_mlp_fwd, (half[0].T.contiguous().T, *half[1:], *tail, True, "aten")

    count, mean, m2 = torch.zeros((), dtype=torch.int64), torch.zeros(4), torch.zeros(4)
    for backend in ON_CPU:
        yield OPS.running_stats_, (count, mean, m2, torch.randn(6, 4), None, backend)
        yield OPS.running_stats_, (count, mean, m2, torch.randn(4, 6).T, torch.ones(6, dtype=torch.bool), backend)

    y, x, u, delta = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 2, 4), torch.randn(2, 2, 5)
    alpha = torch.tensor(0.5)
    for backend in ON_CPU:
        yield OPS.lowrank_linear_fwd, (y, x, u, delta, alpha, 1.0, backend)
        yield OPS.lowrank_linear_fwd, (y.bfloat16(), x.bfloat16(), u[0], delta[0], None, 0.5, backend)
        yield OPS.lowrank_linear_fwd, (y.transpose(0, 1), x.transpose(0, 1), u[0], delta[0], alpha, 1.0, backend)
    c = OPS.lowrank_linear_fwd(y, x, u, delta, alpha, 1.0, "aten")[1]
    yield OPS.lowrank_linear_bwd, (y, x, u, delta, c, alpha, 1.0, True, True, True, True, "aten")
    yield OPS.lowrank_linear_bwd, (y, x, u, delta, c, None, 0.5, False, True, False, False, "aten")

    logits, base, grad = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.randn(2, 3)
    labels, keep = torch.tensor([[1, -100, 3], [0, 6, -100]]), torch.tensor([[1, 0, 1], [1, 1, 0]]) > 0
    for logits_, base_ in ((logits, base), (torch.randn(3, 2, 7).transpose(0, 1), base.half())):
        nll, lse = OPS.token_nll_fwd(logits_, labels, "aten")
        yield OPS.token_nll_fwd, (logits_, labels, "aten")
        yield OPS.token_nll_bwd, (nll, logits_, labels, lse, "aten")
        _, lse_base, lse = OPS.kl_divergence_fwd(base_, logits_, keep, "aten")
        for backend in ON_CPU:
            yield OPS.kl_divergence_fwd, (base_, logits_, keep, backend)
            yield OPS.kl_divergence_bwd, (grad, base_, logits_, keep, lse_base, lse, backend)


CHECKS = list(opcheck_arguments())


@pytest.mark.parametrize("at", range(len(CHECKS)), ids=[f"{i}-{op}" for i, (op, _) in enumerate(CHECKS)])
def test_opcheck(at):
    op, arguments = CHECKS[at]
    torch.library.opcheck(op.default, arguments)


def uses_every_op(u, delta, stats, blocks, mode, y, x, alpha, logits, base, labels, mask, count, mean, m2):
    ops.running_stats_(count, mean, m2, u)
    new_u, new_delta = ops.editor_mlp(u, delta, stats, blocks, mode)
    edited = ops.lowrank_linear(y, x, new_u, new_delta, alpha)
    loss = ops.token_nll(logits + edited.sum(), labels).sum() + ops.kl_divergence(base, logits, mask).sum()
    return loss + edited.square().sum()


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    case = EditorCase(6, 5, 4, 3, 2, rows_need_grad=False)
    y, x = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    alpha, logits, base = torch.tensor(0.1, requires_grad=True), torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    logits.requires_grad_()
    labels, mask = torch.tensor([[1, -100, 3], [0, 6, -100]]), torch.ones(2, 3)
    asking = [alpha, logits, *(p for block in case.blocks for p in block)]

    def run(function):
        state = torch.zeros((), dtype=torch.int64), torch.zeros(5), torch.zeros(5)
        loss = function(
            case.u, case.delta, case.stats, case.blocks, case.mode, y, x, alpha, logits, base, labels, mask, *state
        )
        return [loss, *torch.autograd.grad(loss, asking), *state]

    # aot_eager traces forward and backward, as inductor does, and needs no compiler on this machine
    compiled = torch.compile(uses_every_op, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(uses_every_op), run(compiled), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_ops_and_reference_have_the_same_names():
    assert set(reference.__all__) <= set(ops.__all__)


def test_every_op_names_its_backends():
    rows = {row["op"]: row for row in backends.explain(torch.device("cpu"))}
    assert rows["lowrank_linear"]["backend"] == CPU  # its Triton kernels serve only who asks for them
    for op in ("editor_mlp", "running_stats_", "token_nll", "kl_divergence"):
        library = "aten" if op == "token_nll" else CPU
        assert rows[op]["backend"] == library and "CUDA" in rows[op]["left"]
    with pytest.raises(ValueError, match="auto, reference"):
        ops.token_nll(torch.randn(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64), backend="fastest")
    with pytest.raises(RuntimeError, match="no backend 'cuda'"), mendfast.backend("cuda"):
        ops.token_nll(torch.randn(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_finite(dtype):
    values = torch.full((7, 300), torch.finfo(dtype).max, dtype=dtype)  # a sum of these would overflow
    values[::2] *= -1
    assert ops.all_finite(values) and ops.all_finite(values[:0]) and ops.all_finite(values.T[3])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for i in (0, 1234, values.numel() - 1):
            spoiled = values.clone()
            spoiled.view(-1)[i] = bad
            assert not ops.all_finite(spoiled)
