"""How long does the editor network take, from gradient rows to edited rows, and backwards?"""

from __future__ import annotations

import pytest
import torch

from mendfast import backends, ops, reference
from mendfast.types import Block, Stats

from .cases import Case, cases
from .contest import Contestant, Work, compiled

CASES = cases((1, 20, 60, 250, 1000, 4096), typical=60, cpu=(1, 20, 60, 250))


class Rows:
    """One editor of two blocks, and rows as an edit gives them."""

    def __init__(self, shape, n_rows: int, device: torch.device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)

        def rand(*size: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(size, device=device, generator=generator) * scale

        m, n, rank, modes = shape.width, shape.hidden, min(shape.rank, shape.width + shape.hidden), shape.modes
        self.u, self.delta = rand(n_rows, m), rand(n_rows, n)
        self.stats = Stats(rand(m), rand(m).abs() + 0.5, rand(n), rand(n).abs() + 0.5)
        self.blocks = [
            Block(
                rand(m + n, rank, scale=rank**-0.5), rand(rank, m + n, scale=(m + n) ** -0.5), rand(m + n),
                rand(modes, m + n) + 1, rand(modes, m + n),
            )
            for _ in range(2)
        ]  # fmt: skip
        self.mode = torch.arange(n_rows, device=device) * modes // n_rows
        self.grads = rand(n_rows, m), rand(n_rows, n)

    def arguments(self) -> tuple:
        return self.u, self.delta, self.stats, self.blocks, self.mode


def _inputs(contest, case: Case):
    shape = contest.size(case.shape)
    n_rows = contest.amount(case.size)
    width, rank = shape.width + shape.hidden, min(shape.rank, shape.width + shape.hidden)
    return (lambda seed: Rows(shape, n_rows, contest.device, seed)), n_rows, width, rank


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(contest, case):
    data, n_rows, width, rank = _inputs(contest, case)

    def call(op):
        def run(rows: Rows):
            with torch.no_grad():
                return op(*rows.arguments())

        return run

    parameters = 2 * (2 * width * rank + width * (1 + 2 * case.shape.modes))
    work = Work(4 * (parameters + 2 * n_rows * width), 8 * n_rows * width * rank)
    contestants = {"mendfast": call(ops.editor_mlp), "reference": call(reference.editor_mlp)}
    if contest.on_gpu and case.typical:
        contestants["torch.compile"] = call(compiled(reference.editor_mlp))
    row = {"shape": case.shape.name, "rows": case.size}
    contest(row, data, contestants, work=work, queued=True, backend=_backend(contest))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(contest, case):
    data, n_rows, width, rank = _inputs(contest, case)

    def leaves(rows: Rows) -> list[torch.Tensor]:
        return [parameter for block in rows.blocks for parameter in block]

    def call(op) -> Contestant:
        def prepare(rows: Rows) -> tuple:
            for leaf in leaves(rows):
                leaf.requires_grad_()
            return op(*rows.arguments()), rows

        return Contestant(lambda state: torch.autograd.grad(state[0], leaves(state[1]), state[1].grads), prepare)

    parameters = 2 * (2 * width * rank + width * (1 + 2 * case.shape.modes))
    # U and V of the second block are read and all gradients written; of the first, V's input needs no gradient
    read = 3 * width * rank
    products = 2 * n_rows * width * rank * 7
    work = Work(4 * (read + parameters + 4 * n_rows * width), products)
    contestants = {"mendfast": call(ops.editor_mlp), "reference": call(reference.editor_mlp)}
    if contest.on_gpu and case.typical:
        contestants["torch.compile"] = call(compiled(reference.editor_mlp))
    row = {"shape": case.shape.name, "rows": case.size}
    # a pre-activation within rounding of 0 may fall on either side of it, and takes its whole gradient along
    contest(row, data, contestants, work=work, tolerance=1e-2, queued=True, backend=_backend(contest))


def _backend(contest) -> str:
    return backends.choose("editor_mlp", contest.device)
