import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import poisoned  # noqa: F401

from mendfast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def fresh(width, count_dtype=torch.int64, dtype=torch.float32):
    return torch.zeros((), dtype=count_dtype), torch.zeros(width, dtype=dtype), torch.zeros(width, dtype=dtype)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
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


@pytest.mark.parametrize("backend", ["reference", "aten"])
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
