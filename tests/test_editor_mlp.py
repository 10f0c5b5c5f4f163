import math

import pytest
import torch
from op_cases import EDITOR_CASES, EditorCase, double, editor_case, error, poisoned  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import mendfast
from mendfast import ops, reference
from mendfast.types import Block, Stats

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("name", EDITOR_CASES)
def test_matches_the_reference(name):
    editor_case(name).check(ops.editor_mlp, backend="aten")


@pytest.mark.parametrize("shape", [(300, 96, 41, 24, 3), (2, 1, 1, 1, 1), (5, 3, 200, 64, 2)])
def test_matches_at_other_shapes(shape):
    EditorCase(*shape).check(ops.editor_mlp, backend="aten")


def test_stacked_and_shuffled_rows_agree():
    """Runs of one mode are broadcast, mixed modes are gathered: the same numbers."""
    case = EditorCase(64, 20, 12, 8, 3, mode=torch.arange(64) * 3 // 64)
    out, grads = case.run(ops.editor_mlp, backend="aten")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for name in ("u", "delta"):
        setattr(case, name, getattr(case, name)[order].detach().requires_grad_())
    case.mode, case.grads = case.mode[order], tuple(g[order] for g in case.grads)
    out_shuffled, grads_shuffled = case.run(ops.editor_mlp, backend="aten")
    for a, b in zip(out, out_shuffled, strict=True):
        assert error(b, a[order]) < 1e-6
    for a, b in zip(grads[2:], grads_shuffled[2:], strict=True):
        assert error(b, a) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_the_clamp_passes_the_gradient_at_zero(backend):
    """At initialisation every pre-activation is exactly 0; a clamp that blocked there would never learn."""
    d, rank = 9, 4
    block = Block(
        torch.zeros(d, rank, requires_grad=True),
        torch.randn(rank, d, requires_grad=True),
        torch.zeros(d, requires_grad=True),
        torch.ones(2, d, requires_grad=True),
        torch.zeros(2, d, requires_grad=True),
    )
    u, delta = torch.randn(6, 5), torch.randn(6, 4)
    mode = torch.tensor([0, 1, 0, 1, 1, 1])
    out = ops.editor_mlp(u, delta, None, [block], mode, backend=backend)
    assert torch.equal(torch.cat(out, 1), torch.cat([u, delta], 1))
    grad_out = torch.randn(6, d)
    grads = torch.autograd.grad(torch.cat(out, 1), [block.U, block.b, block.o], grad_out)
    z = torch.cat([u, delta], 1)
    assert torch.allclose(grads[0], grad_out.T @ (z @ block.V.T), atol=1e-5)
    assert torch.allclose(grads[1], grad_out.sum(0), atol=1e-5)
    assert torch.allclose(grads[2], torch.stack([grad_out[mode == j].sum(0) for j in range(2)]), atol=1e-5)


@pytest.mark.parametrize("op", [reference.editor_mlp, ops.editor_mlp])
def test_gradcheck_in_float64(op):
    case = EditorCase(4, 3, 2, 2, 2)
    leaves = [double(x) for x in case.leaves()]
    stats = Stats(*(s.double() for s in case.stats))

    def function(*leaves):
        blocks = [Block(*leaves[2 + 5 * i : 7 + 5 * i]) for i in range(2)]
        return op(leaves[0], leaves[1], stats, blocks, case.mode)

    assert torch.autograd.gradcheck(function, leaves)


def test_inputs_may_be_views():
    case = editor_case("plain")
    expected, grads = case.run(ops.editor_mlp, backend="aten")
    case.u = torch.stack([case.u.detach()] * 2, 2)[..., 1].requires_grad_()
    case.delta = case.delta.detach().T.contiguous().T.requires_grad_()
    case.blocks = [Block(block.U.detach().T.contiguous().T.requires_grad_(), *block[1:]) for block in case.blocks]
    case.grads = tuple(torch.cat([g, g], 1)[:, : g.shape[1]] for g in case.grads)
    assert not case.u.is_contiguous() and not case.blocks[0].U.is_contiguous()
    out, again = case.run(ops.editor_mlp, backend="aten")
    for a, b in zip((*expected, *grads), (*out, *again), strict=True):
        assert error(b, a) < 1e-6


def test_gradients_only_where_asked():
    case = editor_case("plain", rows_need_grad=False)
    out = ops.editor_mlp(case.u, case.delta, case.stats, case.blocks, case.mode)
    torch.autograd.backward(out, case.grads)
    assert case.u.grad is None and case.delta.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for block in case.blocks for p in block)
    case.check(ops.editor_mlp, backend="aten")


def test_no_second_order():
    case = editor_case("plain")
    out = ops.editor_mlp(case.u, case.delta, case.stats, case.blocks, case.mode)
    grad_out = torch.ones_like(out[0]).requires_grad_()
    (grad,) = torch.autograd.grad(out[0], case.u, grad_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_does_not_reach_the_products():
    case = editor_case("plain")
    expected, grads = case.run(ops.editor_mlp, backend="aten")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, again = case.run(ops.editor_mlp, backend="aten")
    assert all(torch.equal(a, b) for a, b in zip((*expected, *grads), (*out, *again), strict=True))


def test_the_arguments_stay_as_they_were():
    case = editor_case("plain")
    copies = [x.detach().clone() for x in (*case.leaves(), *case.stats, *case.grads)]
    case.run(ops.editor_mlp, backend="aten")
    assert all(torch.equal(a, b) for a, b in zip(copies, (*case.leaves(), *case.stats, *case.grads), strict=True))


def test_a_nan_is_not_hidden():
    case = editor_case("plain")
    poisoned_b = case.blocks[0].b.detach().clone()
    poisoned_b[3] = math.nan
    case.blocks[0] = case.blocks[0]._replace(b=poisoned_b)
    out = ops.editor_mlp(case.u, case.delta, case.stats, case.blocks, case.mode, backend="aten")
    assert out[0][:, 3].isnan().all()


def bad(**changes):
    case = editor_case("plain")
    arguments = {"u": case.u, "delta": case.delta, "stats": case.stats, "blocks": case.blocks, "mode": case.mode}
    return arguments | {k: v(case) for k, v in changes.items()}


BAD = {
    "a wider u": (bad(u=lambda c: torch.randn(37, 30)), ValueError, "29|30"),
    "other rows": (bad(delta=lambda c: torch.randn(36, 18)), ValueError, "one N"),
    "no rows": (
        bad(u=lambda c: c.u[:0], delta=lambda c: c.delta[:0], mode=lambda c: c.mode[:0]),
        ValueError,
        "no rows",
    ),
    "integer rows": (bad(u=lambda c: torch.ones(37, 29, dtype=torch.int64)), TypeError, "int64"),
    "float16 parameters": (
        bad(blocks=lambda c: [Block(*(p.half() for p in b)) for b in c.blocks]),
        TypeError,
        "float16",
    ),
    "a mode too high": (bad(mode=lambda c: torch.full((37,), 3)), ValueError, "0 to 2"),
    "a negative mode": (bad(mode=lambda c: torch.full((37,), -1)), ValueError, "-1"),
    "no mode": (bad(mode=lambda c: None), ValueError, "mode"),
    "a float mode": (bad(mode=lambda c: c.mode.float()), ValueError, "integers"),
    "infinite statistics": (bad(stats=lambda c: c.stats._replace(u_std=c.stats.u_std / 0)), ValueError, "u_std"),
    "short statistics": (bad(stats=lambda c: c.stats._replace(u_mean=c.stats.u_mean[1:])), ValueError, "28"),
    "tables in one block only": (
        bad(blocks=lambda c: [c.blocks[0], Block(*c.blocks[1][:3])]),
        ValueError,
        "differs",
    ),
    "a rank that differs": (
        bad(blocks=lambda c: [c.blocks[0]._replace(U=c.blocks[0].U[:, 1:])]),
        ValueError,
        "U has shape",
    ),
}


@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    arguments, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        ops.editor_mlp(**arguments, backend=backend)


def test_unknown_precision():
    with pytest.raises(ValueError, match="tf32x3, ieee, tf32"):
        ops.editor_mlp(**bad(), precision="fp8")


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="Triton kernels run on CUDA devices"):
        ops.editor_mlp(**bad(), backend="triton")
    with mendfast.backend("reference"):
        ops.editor_mlp(**bad())


class MatrixUnits(TorchDispatchMode):
    """Products as a GPU's matrix units make them: of factors cut to the 10 bits of tf32, or of their parts."""

    def __init__(self, precision):
        super().__init__()
        self.precision = precision

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.mm.default or args[0].dtype != torch.float32:
            return function(*args, **(kwargs or {}))
        a, b = args
        product = cut(a) @ cut(b)
        if self.precision == "tf32x3":
            product = cut(a) @ cut(b - cut(b)) + cut(a - cut(a)) @ cut(b) + product
        return product


def cut(x):
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_the_tolerances_are_those_of_matrix_units(precision):
    """What tests/gpu asks of a GPU, asked of its arithmetic."""
    case = EditorCase(60, 128, 200, 96, 3)
    with MatrixUnits(precision):
        case.check(reference.editor_mlp, precision=precision)
