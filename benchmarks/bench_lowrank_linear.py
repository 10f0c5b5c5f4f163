"""What does a layer's low-rank update cost in a forward pass, with an update for each sample?"""

from __future__ import annotations

import pytest
import torch

from mendfast import backends, ops, reference

from .cases import cases
from .contest import Contestant, Work, compiled

CASES = cases((1, 8, 32), typical=8, cpu=(1, 8), cpu_others=False)
TOKENS, TERMS, ALPHA = 200, 20, 1e-2


def full_matrices(y, x, u, delta, alpha):
    """Each sample's d x d update, as the paper writes it."""
    return y - x @ (alpha * delta.mT @ u).mT


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lowrank_linear(contest, case, direction):
    shape, size = contest.size(case.shape), contest.amount(case.size)
    m, n = shape.width, shape.hidden

    def data(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(contest.device).manual_seed(seed)
        sides = ((TOKENS, n), (TOKENS, m), (TERMS, m), (TERMS, n))
        return [torch.randn(size, *side, device=contest.device, generator=generator) for side in sides]

    def call(op):
        if direction == "forward":
            return lambda inputs: op(*inputs, ALPHA)

        def prepare(inputs: list[torch.Tensor]) -> tuple:
            leaves = [tensor.requires_grad_() for tensor in inputs[1:]]
            return op(*inputs, ALPHA), leaves, inputs[0]

        return Contestant(lambda state: torch.autograd.grad(state[0], state[1], state[2]), prepare)

    contestants = {
        "mendfast": call(ops.lowrank_linear),
        "reference": call(reference.lowrank_linear),
        "d x d": call(full_matrices),
    }
    if contest.on_gpu and case.typical:
        contestants["torch.compile"] = call(compiled(reference.lowrank_linear))
    forward = direction == "forward"
    moved = 4 * size * ((m + n) * TERMS + TOKENS * (m + 2 * n if forward else 2 * m + n))
    operations = 2 * size * TOKENS * TERMS * (m + n) * (1 if forward else 2)
    row = {"shape": case.shape.name, "edits": case.size, "direction": direction}
    backend = backends.choose("lowrank_linear", contest.device)
    contest(row, data, contestants, work=Work(moved, operations), queued=True, backend=backend)
