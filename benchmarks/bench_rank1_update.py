"""How long does it take to write an update into one weight, or into all weights of an edit?"""

from __future__ import annotations

import pytest
import torch

from mendfast import backends, ops, reference

from .cases import Case, cases
from .contest import Work, compiled

ONE = cases((1, 20, 60, 250, 1000, 4096), typical=60, cpu=(1, 60, 250), cpu_others=False)
GROUP = cases((20, 500), typical=20, cpu=(20,), cpu_others=False)
ALPHA = 0.1  # updates of about the size of the weights, so that a missing one is seen


def _dtype(contest, case: Case) -> torch.dtype:
    """Large models are edited in bfloat16."""
    return torch.float32 if case.shape.on_cpu or not contest.on_gpu else torch.bfloat16


def _work(width: int, hidden: int, terms: int, dtype: torch.dtype, weights: int = 1) -> Work:
    moved = 2 * width * hidden * dtype.itemsize + 4 * terms * (width + hidden)
    return Work(weights * moved, weights * 2 * terms * width * hidden)


def _rand(contest, seed: int):
    generator = torch.Generator(contest.device).manual_seed(seed)
    return lambda *size: torch.randn(size, device=contest.device, generator=generator)


def addmm(weight, u, delta, alpha):
    """The product in the weight's dtype, as PyTorch's library gives it."""
    return weight.addmm_(delta.T.to(weight.dtype), u.to(weight.dtype), alpha=-alpha)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("case", ONE, ids=str)
def test_one_weight(contest, case, rounding):
    shape, terms = contest.size(case.shape), contest.amount(case.size)
    dtype = _dtype(contest, case) if rounding == "nearest" else torch.bfloat16
    m, n = shape.width, shape.hidden

    def data(seed: int) -> tuple:
        rand = _rand(contest, seed)
        return rand(n, m).to(dtype), rand(terms, m), rand(terms, n)

    def call(op, **options):
        return lambda inputs: op(*inputs, ALPHA, **options)

    contestants = {
        "mendfast": call(ops.rank1_update_, rounding=rounding),
        "reference": call(reference.rank1_update_, rounding=rounding),
    }
    if rounding == "nearest":
        contestants["addmm_"] = call(addmm)
        if contest.on_gpu and case.typical:
            contestants["torch.compile"] = call(compiled(reference.rank1_update_))
    row = {"shape": case.shape.name, "rows": case.size, "dtype": str(dtype)[6:], "rounding": rounding}
    contest(
        row, data, contestants, work=_work(m, n, terms, dtype), queued=True,
        tolerance=1e-4 if dtype == torch.float32 else 1e-2, backend=backends.choose("rank1_update_", contest.device),
    )  # fmt: skip


@pytest.mark.parametrize("case", GROUP, ids=str)
def test_all_weights(contest, case):
    shape, dtype = contest.size(case.shape), _dtype(contest, case)
    sizes = [(shape.width, shape.hidden), (shape.hidden, shape.width)] * 3

    def data(seed: int) -> tuple:
        rand = _rand(contest, seed)
        weights = [rand(n, m).to(dtype) for m, n in sizes]
        return weights, [rand(case.size, m) for m, _ in sizes], [rand(case.size, n) for _, n in sizes]

    def group(op):
        def run(inputs: tuple):
            op(*inputs, [ALPHA] * len(sizes))
            return inputs[0]

        return run

    def one_by_one(inputs: tuple):
        return [addmm(*each, ALPHA) for each in zip(*inputs, strict=True)]

    contestants = {
        "mendfast": group(ops.rank1_update_group_),
        "reference": group(reference.rank1_update_group_),
        "addmm_": one_by_one,
    }
    row = {"shape": case.shape.name, "rows": case.size, "dtype": str(dtype)[6:]}
    contest(
        row, data, contestants, work=_work(shape.width, shape.hidden, case.size, dtype, len(sizes)), queued=True,
        tolerance=1e-4 if dtype == torch.float32 else 1e-2, backend=backends.choose("rank1_update_", contest.device),
    )  # fmt: skip
