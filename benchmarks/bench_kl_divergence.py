"""How long does the locality loss take over a whole vocabulary, forward and backward together?"""

from __future__ import annotations

import pytest
import torch

from mendfast import backends, ops, reference

from .cases import cases
from .contest import Work, compiled

CASES = cases((40, 200, 800), typical=200, cpu=(40, 200), cpu_others=False)


def in_pytorch(base: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The two calls that PyTorch's documentation suggests."""
    p, q = base.log_softmax(-1), logits.log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def in_liger():
    """Liger-Kernel's KL over log-probabilities, or None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        return None
    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def rows(base: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return loss(logits.log_softmax(-1), base.log_softmax(-1)) * len(logits)

    return rows


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kl_divergence(contest, case):
    shape = contest.size(case.shape)
    size = contest.amount(case.size)

    def data(seed: int) -> tuple:
        generator = torch.Generator(contest.device).manual_seed(seed)
        base = torch.randn(size, shape.vocabulary, device=contest.device, generator=generator)
        noise = torch.randn(base.shape, device=contest.device, generator=generator)
        return base, (base + 0.3 * noise).requires_grad_()

    def call(op):
        def run(inputs: tuple) -> tuple:
            value = op(*inputs).sum()
            return value, torch.autograd.grad(value, inputs[1])[0]

        return run

    contestants = {
        "mendfast": call(ops.kl_divergence_rows),
        "reference": call(reference.kl_divergence_rows),
        "F.kl_div": call(in_pytorch),
    }
    if contest.on_gpu and case.typical:
        contestants["torch.compile"] = call(compiled(reference.kl_divergence_rows))
    if contest.on_gpu and (liger := in_liger()) is not None:
        contestants["Liger-Kernel"] = call(liger)
    # both logits are read by each pass, and the gradient is written
    work = Work(4 * 5 * size * shape.vocabulary, 16 * size * shape.vocabulary)
    row = {"shape": case.shape.name, "tokens": case.size}
    contest(row, data, contestants, work=work, queued=True, backend=backends.choose("kl_divergence", contest.device))
