"""The rank-1 update on a GPU: both backends, both kernels, graphs, streams, and weights beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from test_rank1_update import DTYPES, GPU_BACKENDS, GPU_SHAPES, SHAPES, TERMS, assert_close, check, make

from mendfast import ops
from mendfast.ops import rank1_update as op


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("layout", op.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_against_float64(dtype, layout, backend):
    for shape in (*SHAPES, *GPU_SHAPES):
        for terms in TERMS:
            for factor in {dtype, torch.float32}:
                check(*shape, terms, dtype, factor, layout, backend, "cuda", pad=3 if terms % 2 else 8)


@pytest.mark.gpu
@pytest.mark.parametrize(("path", "dtype"), [("fma", dtype) for dtype in DTYPES] + [("mma", d) for d in DTYPES[1:]])
def test_gpu_both_kernels(path, dtype):
    from mendfast import _C

    for factor in {dtype, torch.float32}:
        for terms in (1, 17, 300):
            _, weight, u, delta = make(301, 1000, terms, dtype, factor, pad=8, device="cuda")
            before = weight.clone()
            row = (*(t.data_ptr() for t in (weight, delta, u)), *(t.stride(0) for t in (weight, delta, u)),
                   301, 1000, terms, 0.5, 0)  # fmt: skip
            names = [str(kind).removeprefix("torch.") for kind in (dtype, factor)]
            launches = _C.rank1_update_group(
                [row], weight_dtype=names[0], factor_dtype=names[1], stochastic=False, device=0,
                stream=torch.cuda.current_stream().cuda_stream, path=path,
            )  # fmt: skip
            assert launches == 1
            assert_close(weight, before, u, delta, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gpu_stochastic_is_the_references(dtype, backend):
    _, weight, u, delta = make(300, 1001, 2, dtype, torch.float32, device="cuda")
    u, delta = u.round(), delta.round()  # exact sums
    other = weight.clone()
    for target, name in ((weight, backend), (other, "reference")):
        ops.rank1_update_(target, u, delta, 2.0**-8, rounding="stochastic", seed=77, backend=name)
    assert torch.equal(weight, other)


@pytest.mark.gpu
def test_gpu_beyond_32_bit_indices():
    rows, cols = 2**16 + 1, 2**15 + 8
    weight = torch.zeros(rows, cols, dtype=torch.bfloat16, device="cuda")
    u, delta = torch.ones(3, cols, device="cuda"), torch.ones(3, rows, device="cuda")
    for backend in ("cuda", "triton"):
        ops.rank1_update_(weight, u, delta, -1.0, backend=backend)
        assert bool((weight == 3).all())
        weight.zero_()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_graph(backend):
    """Recorded once, replayed: no synchronisation, no allocation of the extension's own."""
    _, weight, u, delta = make(512, 768, 20, torch.bfloat16, torch.float32, device="cuda")
    start = weight.clone()
    ops.rank1_update_(weight, u, delta, backend=backend)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rank1_update_(weight, u, delta, backend=backend)
    want = weight.clone()
    ops.rank1_update_(want, u, delta, backend=backend)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(weight, want) and not torch.equal(weight, start)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_thousand_replays(backend):
    """Restoring the bits and replaying the updates that stay gives what a weight without the others has."""
    generator = torch.Generator().manual_seed(0)
    made = [make(256, 384, 1 + i % 40, torch.bfloat16, torch.float32, device="cuda", seed=i) for i in range(8)]
    start = made[0][1].clone()
    updates = [(u, delta, 0.1 * (i + 1), i) for i, (_, _, u, delta) in enumerate(made)]

    def replay(order):
        weight = start.clone()
        for i in order:
            u, delta, alpha, seed = updates[i]
            rounding = op.ROUNDINGS[i % 2]
            ops.rank1_update_(weight, u, delta, alpha, rounding=rounding, seed=seed, backend=backend)
        return weight

    for _ in range(1000):
        count = int(torch.randint(1, 5, (1,), generator=generator))
        order = torch.randperm(8, generator=generator)[:count].tolist()
        assert torch.equal(replay(order), replay(order))


@pytest.mark.gpu
def test_gpu_streams_and_devices():
    stream = torch.cuda.Stream()
    _, weight, u, delta = make(2048, 2048, 8, device="cuda")
    before = weight.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        u.mul_(2)
        ops.rank1_update_(weight, u, delta, backend="cuda")
    stream.synchronize()
    assert_close(weight, before, u, delta, 1.0)
    with pytest.raises(ValueError, match="u is on cpu"):
        ops.rank1_update_(weight, u.cpu(), delta)


@pytest.mark.gpu
def test_gpu_group_of_few_and_many_terms():
    """One call, some of its float32 weights by the kernel and some by cuBLAS, each as if alone."""
    sizes = [(300, 768, op.KERNEL_TERMS), (768, 300, op.KERNEL_TERMS + 1), (64, 64, 1), (301, 500, 400)]
    made = [make(*size, pad=8, device="cuda", seed=i)[1:] for i, size in enumerate(sizes)]
    starts = [weight.clone() for weight, _, _ in made]
    ops.rank1_update_group_(*map(list, zip(*made, strict=True)), [0.5] * len(made), backend="cuda")
    for start, (weight, u, delta) in zip(starts, made, strict=True):
        assert_close(weight, start, u, delta, 0.5)
