"""The Triton kernel of the update in Triton's interpreter, against the specification.

The interpreter rounds float32 to bfloat16 toward zero and can't multiply bfloat16, so that bfloat16 weights are
tested here with stochastic rounding, which is made of integer operations, and float32 factors.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
from test_rank1_update import assert_close, make  # noqa: E402

from mendfast import reference  # noqa: E402
from mendfast.kernels import rank1_update as kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter's lane: TRITON_INTERPRET=1 pytest tests/interpreter",
)
PAIRS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("weight", "factor"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 150, 5), (64, 64, 16), (129, 7, 37), (3, 65, 65), (2, 3, 0)])
def test_against_float64(shape, weight, factor):
    memory, target, u, delta = make(*shape, weight, factor, pad=5)
    before = target.clone()
    kernel.rank1_update_(target, delta, u, 0.3)
    assert_close(target, before, u, delta, 0.3)
    assert memory[0].isnan().all() and memory[-1].isnan().all() and memory[:, target.shape[1] :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_stochastic_is_the_references(dtype, seed):
    """Exact sums, so that the bits must be the same; some elements infinite or the largest there are."""
    _, target, u, delta = make(70, 147, 2, dtype, torch.float32)
    u, delta = u.round(), delta.round()
    largest = torch.finfo(dtype).max
    target[0, :4] = torch.tensor([torch.inf, -torch.inf, largest, -largest])
    target[1] *= 2.0**-18
    other = target.clone()
    kernel.rank1_update_(target, delta, u, 2.0**-9, stochastic=True, seed=seed)
    reference.rank1_update_(other, u, delta, 2.0**-9, rounding="stochastic", seed=seed)
    assert torch.equal(target, other)
