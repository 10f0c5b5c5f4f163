"""How long do many edits of one weight take to be solved for as one, and what is the backward pass of that?"""

from __future__ import annotations

import functools

import pytest
import torch

from mendfast import backends, ops
from mendfast.moments import SecondMoment
from mendfast.ops.least_squares import fewer_by_rows
from mendfast.types import Spectrum

from .cases import cases
from .contest import Contestant, Work

CASES = cases((1, 25, 125), typical=25, cpu=(1, 25, 125), cpu_others=False)
ROWS, RANK = 15, 256  # of an edit; protect_rank of the wide side
LAMBDA, MU = 1e-3, 30.0


def by_inverse(u, d, c, lam, mu):
    """What the formula says, in float64: M is inverted anew for every call."""
    m = lam * c.trace() * torch.eye(len(c), dtype=torch.float64, device=c.device) + mu * c
    u, d = u.double(), d.double()
    v = u @ torch.linalg.inv(m)
    b = v @ u.T
    b.diagonal().add_(1)
    return torch.linalg.solve(b, v).float(), -d.float()


@functools.lru_cache(maxsize=2)
def spectrum_of(m: int, rank: int | None, device: torch.device) -> Spectrum:
    generator = torch.Generator().manual_seed(0)
    moment = SecondMoment(m, rank)
    moment.add(torch.randn(m + 100, m, generator=generator) / torch.arange(1, m + 1).sqrt())
    return moment.spectrum().to(device)


@pytest.mark.parametrize("side", ["width", "hidden", "hidden, low rank"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_least_squares(contest, case, direction, side):
    shape, edits = contest.size(case.shape), contest.amount(case.size)
    m, n = (shape.width, shape.hidden) if side == "width" else (shape.hidden, shape.width)
    rank = min(RANK, m // 4) if "low" in side else None
    if m > 4096 and rank is None:
        pytest.skip("a metric so wide is kept in low rank")
    spectrum, rows = spectrum_of(m, rank, contest.device), ROWS * edits
    k = spectrum.vectors.shape[1]
    lam, mu = (torch.tensor(x, device=contest.device, requires_grad=direction == "backward") for x in (LAMBDA, MU))

    def data(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(contest.device).manual_seed(seed)
        return [torch.randn(rows, x, device=contest.device, generator=generator) for x in (m, n)]

    def ours(inputs: list[torch.Tensor]) -> tuple:
        return ops.least_squares(*inputs, spectrum, lam, mu)

    contestants = {"mendfast": ours}
    if direction == "forward":
        q = spectrum.vectors
        c = (q * (spectrum.values if k == m else spectrum.values - spectrum.rest)) @ q.T
        c.diagonal().add_(0.0 if k == m else spectrum.rest)
        contestants["by inverse"] = lambda inputs: by_inverse(*inputs, c, LAMBDA, MU)
    else:
        def prepare(inputs: list[torch.Tensor]) -> tuple:
            keys, _ = ours(inputs)
            return keys, inputs[0]

        contestants["mendfast"] = Contestant(
            lambda state: torch.autograd.grad(state[0], (lam, mu), state[1]), prepare
        )
    by_rows = fewer_by_rows(1, rows, m, k)
    operations = 4 * rows * m * k + rows**2 * (k + 2 * m) if by_rows else rows * m * m * 3 + m**3 // 3
    work = Work(4 * (2 * rows * (m + n)) + 8 * m * k, operations)
    row = {"shape": shape.name, "edits": edits, "side": side, "direction": direction}
    backend = backends.choose("least_squares", contest.device)
    reference = "by inverse" if direction == "forward" else None
    contest(row, data, contestants, work=work, reference=reference, queued=True, backend=backend)
