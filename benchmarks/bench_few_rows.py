"""What do the products of one example's rows with a model's matrices, and the loss under its head, cost on a CPU?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mendfast.ops import few_rows
from mendfast.ops.linear_nll import kernel_nll

from .cases import Case, cases
from .contest import Work

CASES = [case for case in cases((1, 5, 20, 60), typical=20, cpu=(1, 5, 20, 60), cpu_others=False) if case.on_cpu]
MATRICES = {
    "MLP, in_out": lambda s: (s.width, s.hidden, False),
    "MLP, out_in": lambda s: (s.width, s.hidden, True),
    "vocabulary, forward": lambda s: (s.width, s.vocabulary, True),
    "vocabulary, backward": lambda s: (s.vocabulary, s.width, False),
}


@pytest.fixture(autouse=True)
def _only_where_the_kernel_is(contest):
    if contest.on_gpu:
        pytest.skip("a kernel for CPUs")
    if few_rows.problem():
        pytest.skip(few_rows.problem())


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_few_rows(contest, case: Case, matrix: str):
    depth, cols, transposed = MATRICES[matrix](contest.size(case.shape))
    rows = contest.amount(case.size)

    def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn((cols, depth) if transposed else (depth, cols), generator=generator)
        return torch.randn(rows, depth, generator=generator), w.T if transposed else w

    contestants = {
        "mendfast": lambda inputs: few_rows.kernel_mm(*inputs),
        "torch.mm": lambda inputs: torch.mm(*inputs),
    }
    work = Work(4 * (depth * cols + rows * (depth + cols)), 2 * rows * depth * cols)
    row = {"shape": case.shape.name, "rows": case.size, "matrix": matrix}
    contest(row, data, contestants, work=work, reference="torch.mm")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_head(contest, case: Case):
    """Losses of labelled rows under a linear head, and their gradients at the rows."""
    shape, rows = contest.size(case.shape), contest.amount(case.size)

    def data(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, shape.width, generator=generator)
        weight = torch.randn(shape.vocabulary, shape.width, generator=generator) * shape.width**-0.5
        return x, weight, torch.randint(shape.vocabulary, (rows,), generator=generator)

    def torch_alone(inputs) -> list[torch.Tensor]:
        x, weight, labels = inputs
        x = x.detach().requires_grad_()
        nll = F.cross_entropy(F.linear(x, weight), labels, reduction="none")
        return [nll.detach(), *torch.autograd.grad(nll.sum(), x)]

    def ours(inputs) -> list[torch.Tensor]:
        x, weight, labels = inputs
        return list(kernel_nll(x, weight, None, labels, gradient=True))

    size = shape.vocabulary * shape.width
    work = Work(4 * (size + 2 * rows * shape.width), 4 * rows * size)
    row = {"shape": case.shape.name, "rows": case.size, "matrix": "head, loss and gradient"}
    contest(row, data, {"mendfast": ours, "F.cross_entropy": torch_alone}, work=work, reference="F.cross_entropy")
