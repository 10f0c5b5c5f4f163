"""The Triton kernel of the update compiled for GPUs that this machine lacks: registers, spills, matrix units."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from mendfast.kernels import aot, configs  # noqa: E402
from mendfast.kernels import rank1_update as kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing while it interprets"
)
CASES = [
    (torch.float32, torch.float32, 200, False),
    (torch.bfloat16, torch.bfloat16, 200, False),
    (torch.bfloat16, torch.float32, 8, True),
    (torch.float16, torch.float32, 200, True),
]
UNIT = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def launch(arch, weight, factor, terms, stochastic):
    def meta(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    with configs.pretend(arch), aot.recording() as recorded:
        kernel.rank1_update_(
            meta(16384, 4096, dtype=weight), meta(terms, 16384, dtype=factor), meta(terms, 4096, dtype=factor),
            0.5, stochastic=stochastic, seed=3,
        )  # fmt: skip
    assert len(recorded) == 1
    return recorded[0]


@pytest.mark.parametrize("arch", configs.ARCHS)
@pytest.mark.parametrize(("weight", "factor", "terms", "stochastic"), CASES)
def test_compiles_without_spills(arch, weight, factor, terms, stochastic):
    source = launch(arch, weight, factor, terms, stochastic)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source.source(), target=target, options=source.options)
    ptx = compiled.asm["ptx"]
    resources = aot._resources(ptx, arch)
    assert resources["stack"] == resources["spill_stores"] == resources["spill_loads"] == 0, resources
    assert resources["registers"] <= kernel.REGISTERS
    assert UNIT[arch] in ptx
    assert compiled.metadata.shared <= 48 * 1024
    # 16 bytes of W at a time, in and out
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx
    if weight == torch.bfloat16 and not stochastic:
        assert "cvt.rn.bf16" in ptx


def test_invalid_configurations_say_why():
    assert "multiple of 8" in kernel.Rank1Config(64, 60, 16, 4, 2).problem()
    assert "at least 16" in kernel.Rank1Config(64, 64, 8, 4, 2).problem()
    assert "too many for 1 warps" in kernel.Rank1Config(64, 64, 16, 1, 2).problem()
