"""How long does it take to merge token rows into the running mean and variance?"""

from __future__ import annotations

import pytest
import torch

from mendfast import backends, ops, reference

from .cases import cases
from .contest import Contestant, Work, compiled

CASES = cases((1, 60, 1000, 4096), typical=1000, cpu=(1, 60, 1000), cpu_others=False)


def two_pass_(count, mean, m2, rows) -> None:
    """The same merge in plain float32 PyTorch: what one would write without the op."""
    n = rows.shape[0]
    var, mu = torch.var_mean(rows, 0, correction=0)
    difference, total = mu - mean, count + n
    m2 += var * n + difference**2 * (count * n / total)
    mean += difference * (n / total)
    count += n


@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_stats(contest, case):
    width, size = contest.size(case.shape).hidden, contest.amount(case.size)

    def data(seed: int) -> tuple:
        generator = torch.Generator(contest.device).manual_seed(seed)
        rows = torch.randn(size, width, device=contest.device, generator=generator) + 3
        return rows, torch.randn(width, device=contest.device, generator=generator)

    def call(op) -> Contestant:
        def prepare(inputs: tuple) -> tuple:
            rows, mean = inputs
            return torch.full((1,), 100.0, device=rows.device), mean.clone(), mean.abs() * 100, rows

        def run(state: tuple) -> tuple:
            op(*state)
            return state[:3]

        return Contestant(run, prepare)

    contestants = {"mendfast": call(ops.running_stats_), "reference": call(reference.running_stats_)}
    contestants["torch.var_mean"] = call(two_pass_)
    if contest.on_gpu and case.typical:
        contestants["torch.compile"] = call(compiled(two_pass_))
    work = Work(4 * width * (size + 4), 6 * size * width)
    row = {"shape": case.shape.name, "rows": case.size}
    backend = backends.choose("running_stats_", contest.device)
    contest(row, data, contestants, work=work, queued=True, backend=backend)
