"""What do the products of one example's rows with a model's matrices cost on a CPU?"""

from __future__ import annotations

import pytest
import torch

from mendfast.ops import few_rows

from .cases import Case, cases
from .contest import Work

CASES = [case for case in cases((1, 5, 20, 60), typical=20, cpu=(1, 5, 20, 60), cpu_others=False) if case.on_cpu]
MATRICES = {
    "MLP, in_out": lambda s: (s.width, s.hidden, False),
    "MLP, out_in": lambda s: (s.width, s.hidden, True),
    "vocabulary, forward": lambda s: (s.width, s.vocabulary, True),
    "vocabulary, backward": lambda s: (s.vocabulary, s.width, False),
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_few_rows(contest, case: Case, matrix: str):
    if contest.on_gpu:
        pytest.skip("a kernel for CPUs")
    if few_rows.problem():
        pytest.skip(few_rows.problem())
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
