import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CPU, ON_CPU, at_threads, poisoned  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from mendfast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")


class Named(TorchDispatchMode):
    """What every operation within is called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def fresh(width, count_dtype=torch.int64, dtype=torch.float32):
    return torch.zeros((), dtype=count_dtype), torch.zeros(width, dtype=dtype), torch.zeros(width, dtype=dtype)


@pytest.mark.parametrize("backend", [*ON_CPU, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("instructions")
def test_chunks_give_what_all_rows_give(backend, dtype, masked):
    rows = torch.randn(57, 13).to(dtype)
    mask = torch.rand(57) > 0.4 if masked else torch.ones(57, dtype=torch.bool)
    count, mean, m2 = fresh(13)
    for at in (slice(0, 1), slice(1, 30), slice(30, 57)):
        if mask[at].any():
            ops.running_stats_(count, mean, m2, rows[at], mask[at] if masked else None, backend=backend)
    kept = rows[mask].double()
    assert count == len(kept)
    assert torch.allclose(mean.double(), kept.mean(0), rtol=1e-6, atol=1e-6)
    assert torch.allclose((m2 / (count - 1)).double(), kept.var(0), rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_any_way_to_cut_the_rows_is_the_same(sizes, seed):
    rows = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cut, one_by_one = fresh(5, dtype=torch.float64), fresh(5, dtype=torch.float64)
    for chunk in rows.split(sizes):
        ops.running_stats_(*cut, chunk)
    for row in rows.split(1):
        ops.running_stats_(*one_by_one, row)
    for a, b in zip(cut, one_by_one, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-11, atol=1e-11)


def test_a_mean_far_larger_than_the_deviations():
    """Where E[x^2] - E[x]^2 in float32 has no correct digit left, merging keeps four."""
    rows = torch.randn(4000, 3) + 10_000
    count, mean, m2 = fresh(3)
    for chunk in rows.split(500):
        ops.running_stats_(count, mean, m2, chunk)
    exact = rows.double().var(0)
    naive = (rows.square().mean(0) - rows.mean(0).square()) * (4000 / 3999)
    assert ((naive.double() - exact) / exact).abs().max() > 0.5
    assert (((m2 / (count - 1)).double() - exact) / exact).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("stats", [torch.float32, torch.float64])
@pytest.mark.usefixtures("instructions")
def test_rows_that_lie_apart_or_far_out(backend, stats):
    """Windows, expanded and transposed rows, buffers with gaps; a first row far from the others."""
    wide = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    wide[0] = 1e4
    mask = torch.arange(20) % 3 != 0
    for rows in (wide[:, 7:200], wide[:, :1], wide[3:4], wide[:1].expand(5, 300), wide.T, wide[:, ::2]):
        for kept in (None, mask[: len(rows)] if len(rows) <= 20 and mask[: len(rows)].any() else None):
            ours, theirs = fresh(rows.shape[1], dtype=stats), fresh(rows.shape[1], dtype=torch.float64)
            gaps = torch.zeros(rows.shape[1], 2, dtype=stats)[:, 0]
            for mean in (ours[1], gaps):
                state = (torch.zeros(()), mean, torch.zeros_like(mean))
                for _ in range(2):
                    ops.running_stats_(*state, rows, kept, backend=backend)
                for _ in range(2 if mean is gaps else 0):
                    ops.running_stats_(*theirs, rows, kept, backend="reference")
                if mean is gaps:
                    assert all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5)
                               for a, b in zip(state, theirs, strict=True))  # fmt: skip
                    assert torch.allclose(state[1], ours[1], rtol=1e-6)


@pytest.mark.skipif(CPU != "cpu", reason="the extension is not there")
def test_the_kernel_s_writes_are_seen():
    """By autograd, by a mode that watches every op, and the same at any number of threads."""
    rows = torch.randn(300, 200)

    def run():
        state = fresh(200)
        ops.running_stats_(*state, rows, backend="cpu")
        return torch.stack([state[1], state[2], state[0].expand(200)])

    results = at_threads(run)
    assert all(torch.equal(result, results[0]) for result in results)
    count, mean, m2 = fresh(4)
    versions = mean._version, m2._version
    loss = (mean * torch.ones(4, requires_grad=True) * m2).sum()
    ops.running_stats_(count, mean, m2, torch.randn(3, 4))
    assert mean._version > versions[0] and m2._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with Named() as seen:
        ops.running_stats_(count, mean, m2, torch.randn(3, 4))
    assert "mendfast::running_stats_" in seen.names and count == 6


@pytest.mark.parametrize("count_dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_any_dtype_of_the_count(count_dtype):
    count, mean, m2 = fresh(4, count_dtype)
    ops.running_stats_(count, mean, m2, torch.randn(6, 4))
    ops.running_stats_(count, mean, m2, torch.randn(6, 4), torch.tensor([1, 0, 0, 1, 1, 0]))
    assert count == 9 and count.dtype == count_dtype


def test_what_the_mask_drops_may_hold_anything():
    rows = torch.randn(6, 4)
    rows[2] = torch.nan
    mask = torch.ones(6, dtype=torch.bool)
    mask[2] = False
    state, clean = fresh(4), fresh(4)
    ops.running_stats_(*state, rows, mask)
    ops.running_stats_(*clean, rows[mask])
    assert all(torch.allclose(a, b) for a, b in zip(state, clean, strict=True))


@pytest.mark.parametrize("width", [1, 7])
def test_the_reference_agrees(width):
    ours, theirs = fresh(width), fresh(width)
    for chunk in torch.randn(20, width).split(6):
        ops.running_stats_(*ours, chunk)
        reference.running_stats_(*theirs, chunk)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
@pytest.mark.parametrize(
    "rows, mask, kind, words",
    [
        (torch.randn(5, 3), None, ValueError, r"\[N, d\]"),
        (torch.randn(5), None, ValueError, r"\[N, d\]"),
        (torch.randn(0, 4), None, ValueError, "no rows"),
        (torch.randn(5, 4), torch.zeros(5, dtype=torch.bool), ValueError, "none of the 5 rows"),
        (torch.randn(5, 4), torch.ones(4, dtype=torch.bool), ValueError, r"mask must be \[5\]"),
        (torch.ones(5, 4, dtype=torch.int64), None, TypeError, "int64"),
    ],
)
def test_bad_input_changes_nothing(rows, mask, kind, words, backend):
    state = fresh(4)
    with pytest.raises(kind, match=words):
        ops.running_stats_(*state, rows, mask, backend=backend)
    assert all((x == 0).all() for x in state)


def test_half_precision_buffers_are_refused():
    with pytest.raises(TypeError, match="float32 or float64"):
        ops.running_stats_(*fresh(4, dtype=torch.bfloat16), torch.randn(3, 4))
