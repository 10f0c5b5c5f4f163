"""The op: every backend against the specification in float64, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from op_cases import CPU, ON_CPU, at_threads
from torch.utils._python_dispatch import TorchDispatchMode

import mendfast
from mendfast import ops
from mendfast.ops import rank1_update as op
from mendfast.reference.rank1_update import draws, round_stochastic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TERMS = (0, 1, 2, 5, 17, 64, 65, 300)
SHAPES = ((1, 1), (1, 7), (5, 1), (33, 20), (128, 96), (301, 257))
GPU_SHAPES = ((1, 1), (129, 255), (4096, 16384), (20480, 5120))
TF32X3 = 3 * 2.0**-20
"""What three TF32 products leave out of one at the worst: low times low, and what a matrix unit cuts off either low
half, each below 2^-10 of 2^-10."""
GPU_BACKENDS = ("cuda", "triton", "aten")


def make(n, m, terms, dtype=torch.float32, factor=None, layout="out_in", pad=0, device="cpu", seed=0):
    """(memory, weight, u, delta): the weight a window of memory that is NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed + 7919 * n + 31 * m + terms)
    shape = (n, m) if layout == "out_in" else (m, n)
    memory = torch.full((shape[0] + 2, shape[1] + pad), torch.nan, dtype=dtype, device=device)
    weight = memory[1:-1, : shape[1]]
    weight.copy_(torch.randn(shape, generator=generator))
    u, delta = (torch.randn(terms, size, generator=generator).to(device, factor or dtype) for size in (m, n))
    return memory, weight, u, delta


def exact(weight, u, delta, alpha, layout="out_in"):
    left, right = (delta, u) if layout == "out_in" else (u, delta)
    return weight.double() - alpha * (left.double().T @ right.double())


def assert_close(weight, before, u, delta, alpha, layout="out_in", units=0.5):
    """Within ``units`` of the weight's last place and the error of float32 sums over T terms: 2^-24 for each of them
    at the worst, beside that of each product: three TF32 ones make it on a GPU, or bfloat16 halves (2^-15) for a
    16-bit weight."""
    left, right = (delta, u) if layout == "out_in" else (u, delta)
    size = abs(alpha) * (left.double().abs().T @ right.double().abs())
    want = exact(before, u, delta, alpha, layout)
    split = 0.0 if not weight.is_cuda else TF32X3 if weight.dtype == torch.float32 else 2.0**-15
    per_product = split + (2 + len(u)) * 2.0**-24
    # the last place of small float16 numbers doesn't shrink with them
    last_place = units * torch.finfo(weight.dtype).eps * want.abs().clamp(min=2.0**-14)
    tolerance = last_place * 1.001 + per_product * size + 2.0**-23 * before.double().abs()
    error = (weight.double() - want).abs()
    assert (error <= tolerance).all(), f"off by {float(error.max())}"


def check(n, m, terms, dtype, factor, layout, backend, device="cpu", pad=3):
    memory, weight, u, delta = make(n, m, terms, dtype, factor, layout, pad, device)
    before, version = weight.clone(), weight._version
    result = ops.rank1_update_(weight, u, delta, -0.3, layout=layout, backend=backend)
    assert result is weight
    assert_close(weight, before, u, delta, -0.3, layout)
    assert memory[0].isnan().all() and memory[-1].isnan().all() and memory[:, weight.shape[1] :].isnan().all()
    assert (weight._version > version) == (terms > 0)
    if terms == 0:
        assert torch.equal(weight, before)


@pytest.mark.parametrize("backend", [*ON_CPU, "reference"])
@pytest.mark.parametrize("layout", op.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("instructions")
def test_against_float64(dtype, layout, backend):
    for shape in SHAPES:
        for terms in TERMS:
            for factor in {dtype, torch.float32}:
                check(*shape, terms, dtype, factor, layout, backend)


def test_float64_weight():
    _, weight, u, delta = make(7, 9, 4, torch.float64)
    want = exact(weight, u, delta, 0.5)
    torch.testing.assert_close(ops.rank1_update_(weight, u, delta, 0.5), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Transposed weights, factors with gaps and reversed roles of their strides, mixed dtypes."""
    _, weight, u, delta = make(40, 24, 6, dtype)
    before = weight.clone()
    turned = weight.T.contiguous().T
    assert turned.stride(1) != 1
    ops.rank1_update_(turned, u.T.contiguous().T, torch.stack([delta.double()] * 2)[1].float(), 0.1)
    assert_close(turned, before, u, delta, 0.1)
    ops.rank1_update_(weight, torch.cat([u, u], 1)[:, :24], delta, 0.1)
    assert_close(weight, before, u, delta, 0.1)


@pytest.mark.skipif(CPU != "cpu", reason="the extension is not there")
@pytest.mark.parametrize("rounding", op.ROUNDINGS)
def test_the_cpu_s_kernel_at_any_number_of_threads(rounding):
    """A weight of many blocks and odd edges, with as many terms as it takes, and with one."""
    for dtype, terms in itertools.product(DTYPES[:2], (90, 1)):
        _, weight, u, delta = make(131, 1201, terms, dtype, torch.float32, pad=5)

        def run(weight=weight, u=u, delta=delta):
            return ops.rank1_update_(weight.clone(), u, delta, 0.1, rounding=rounding, seed=3, backend="cpu")

        results = at_threads(run)
        assert all(torch.equal(result, results[0]) for result in results)
        units = 1.0 if rounding == "stochastic" and dtype != torch.float32 else 0.5
        assert_close(results[0], weight, u, delta, 0.1, units=units)


@pytest.mark.skipif(CPU != "cpu", reason="the extension is not there")
@pytest.mark.parametrize("layout", op.LAYOUTS)
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.usefixtures("instructions")
def test_few_terms_give_the_bits_of_many(terms, layout):
    """Without tiles, a row at a time: as with terms of zeros beside them."""
    for dtype, (n, m) in itertools.product(DTYPES, ((13, 77), (48, 64), (5, 3))):
        _, weight, u, delta = make(n, m, terms, dtype, torch.float32, layout, pad=3)
        more = [torch.cat([side, side.new_zeros(4, side.shape[1])]) for side in (u, delta)]
        few, many = (
            ops.rank1_update_(weight.clone(), *sides, 0.3, layout=layout, backend="cpu") for sides in ((u, delta), more)
        )
        assert torch.equal(few, many) and not torch.equal(few, weight)


def test_what_watches_every_op_sees_the_update():
    """A small update goes past PyTorch's dispatcher, but not where someone listens to it."""
    _, weight, u, delta = make(6, 7, 2)
    names, twice = [], weight.clone()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    ops.rank1_update_(weight, u, delta)
    with Names():
        ops.rank1_update_(twice, u, delta)
    assert "mendfast::rank1_update_group_" in names and torch.equal(weight, twice)


def test_window_beside_window():
    """Two windows of one buffer don't share memory though their address ranges cross."""
    memory = torch.zeros(8, 20)
    first, second, factor = memory[:, :6], memory[:, 6:12], memory[:3, 12:18]
    memory[:, 12:18] = 1
    ops.rank1_update_group_([first, second], [factor] * 2, [torch.ones(3, 8)] * 2, [1.0, 2.0])
    assert (first == -3).all() and (second == -6).all() and (memory[:, 18:] == 0).all()


def test_chunks(monkeypatch):
    """A 16-bit weight is worked on so many rows at a time; the bits don't depend on how many."""
    results = []
    for rows in (1, 7, 10**6):
        monkeypatch.setattr(op, "CHUNK_BYTES", 4 * 33 * rows)
        for rounding in op.ROUNDINGS:
            _, weight, u, delta = make(50, 33, 3, torch.bfloat16, torch.float32)
            # small whole numbers: every sum is exact, so that only the rounding could differ
            u, delta = u.round(), delta.round()
            results.append((rounding, ops.rank1_update_(weight, u, delta, 2.0**-7, rounding=rounding, seed=9)))
    for rounding in op.ROUNDINGS:
        same = [weight for name, weight in results if name == rounding]
        assert all(torch.equal(weight, same[0]) for weight in same)


@pytest.mark.parametrize("layout", op.LAYOUTS)
def test_no_square_temporary(layout):
    """The d x d gradient is never formed: one call on the weight itself, or chunks of a stated size."""
    size = 3000
    for dtype, limit in ((torch.float32, 2**20), (torch.bfloat16, op.CHUNK_BYTES + 2**20)):
        _, weight, u, delta = make(size, size, 4, dtype, torch.float32, layout)
        with torch.profiler.profile(profile_memory=True) as profile:
            ops.rank1_update_(weight, u, delta, layout=layout, backend="aten")
        largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
        peak = max(event.cpu_memory_usage / max(1, event.count) for event in profile.key_averages())
        assert peak <= limit < 4 * size * size, (dtype, peak, largest)


class TestGroup:
    def test_mixed(self):
        made = [
            make(30, 20, 3), make(8, 50, 0), make(20, 30, 65, layout="in_out", pad=2),
            make(12, 12, 5, torch.bfloat16, torch.float32), make(4, 6, 1, torch.float16),
        ]  # fmt: skip
        layouts = ["out_in", "out_in", "in_out", "out_in", "out_in"]
        alphas = [0.5, 1.0, -0.25, 1.0, 2.0]
        weights, us, deltas = (list(column) for column in list(zip(*made, strict=True))[1:])
        before = [weight.clone() for weight in weights]
        assert ops.rank1_update_group_(weights, us, deltas, alphas, layouts=layouts) is None
        for args in zip(weights, before, us, deltas, alphas, layouts, strict=True):
            assert_close(*args)

    def test_same_bits_as_one_by_one(self):
        together, alone = ([make(20, 30, 4, torch.bfloat16, seed=i) for i in range(3)] for _ in range(2))
        ops.rank1_update_group_(
            *([m[k] for m in together] for k in (1, 2, 3)), [1.0] * 3, rounding="stochastic", seed=11
        )
        for i, (_, weight, u, delta) in enumerate(alone):
            ops.rank1_update_(weight, u, delta, 1.0, rounding="stochastic", seed=11 + i)
            assert torch.equal(weight, together[i][1])

    def test_all_or_nothing(self):
        good, bad = make(5, 6, 2), make(5, 6, 2)
        before = good[1].clone()
        bad[2][0, 0] = torch.nan
        with pytest.raises(ValueError, match="matrix 1 holds NaN or infinity; nothing was written"):
            ops.rank1_update_group_([good[1], bad[1]], [good[2], bad[2]], [good[3], bad[3]], [1.0, 1.0])
        assert torch.equal(good[1], before)

    def test_empty(self):
        ops.rank1_update_group_([], [], [], [])


@pytest.mark.usefixtures("instructions")
class TestStochastic:
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_mean_converges(self, dtype):
        """400 updates of an eighth of a unit each: nearest stands still, stochastic arrives at 50 units."""
        steps, unit = 400, torch.finfo(dtype).eps
        u, delta = torch.ones(1, 64), torch.full((1, 64), unit / 8)
        still, moving = torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
        for step in range(steps):
            ops.rank1_update_(still, u, delta, -1.0)
            ops.rank1_update_(moving, u, delta, -1.0, rounding="stochastic", seed=step)
        assert (still == 1).all()
        moved = float((moving.double() - 1).mean()) / unit
        # a step's variance is 1/8 * 7/8 of a unit squared; 400 of them over 4,096 elements, five standard errors
        assert abs(moved - steps / 8) < 5 * math.sqrt(steps * 7 / 64 / 4096)

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
    def test_unbiased_everywhere(self, dtype, scale):
        """The mean over draws is the value, subnormal or large, of either sign."""
        value = torch.randn(8, generator=torch.Generator().manual_seed(1)) * scale
        rows = 4096
        draw = draws(3, rows, 8)
        rounded = round_stochastic(value.expand(rows, 8), dtype, draw)
        low, high = rounded.double().amin(0), rounded.double().amax(0)
        assert ((low <= value.double()) & (value.double() <= high)).all()
        error = (rounded.double().mean(0) - value.double()).abs()
        assert (error <= 5 * 0.5 * (high - low) / math.sqrt(rows)).all()
        if dtype == torch.bfloat16 or scale != 3e4:
            steps = rounded.view(torch.int16).amax(0) - rounded.view(torch.int16).amin(0)
            assert (steps <= 1).all(), "not one of the two neighbours"

    def test_all_draws_of_one_value(self):
        """Over the 65,536 draws the count of roundings up is the cut-off part exactly."""
        draw = torch.arange(65536)
        for part in (0, 1, 12345, 65535):
            value = torch.tensor(0x3F800000 + part, dtype=torch.int32).view(torch.float32)
            up = round_stochastic(value.expand(65536), torch.bfloat16, draw).float() > 1
            assert int(up.sum()) == part

    def test_extremes(self):
        value = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 0.0])
        for dtype in DTYPES[1:]:
            for word in (0, 65535):
                out = round_stochastic(value, dtype, torch.full((6,), word))
                assert torch.equal(out.nan_to_num(7.0), value.to(dtype).nan_to_num(7.0))

    def test_draws_are_philox(self):
        """The known answers of Philox4x32-10 for key 0, counter 0, and bits that change with seed, row and column."""
        first = draws(0, 1, 8)[0].tolist()
        words = [first[2 * i] | first[2 * i + 1] << 16 for i in range(4)]
        assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        whole = draws(7, 20, 21)
        assert torch.equal(whole[5:9, :13], draws(7, 4, 13, first_row=5))
        assert not torch.equal(whole, draws(7 + 2**32, 20, 21))
        assert abs(float(whole.double().mean()) - 32767.5) < 5 * 65536 / math.sqrt(12 * whole.numel())

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_same_draw_on_every_backend(self, dtype):
        results = []
        for backend in (*ON_CPU, "reference"):
            _, weight, u, delta = make(30, 21, 2, dtype, torch.float32)
            u, delta = u.round(), delta.round()  # exact sums
            args = {"rounding": "stochastic", "seed": 2**40 + 1, "backend": backend}
            results.append(ops.rank1_update_(weight, u, delta, 2.0**-8, **args))
        assert all(torch.equal(weight, results[-1]) for weight in results)

    @pytest.mark.parametrize("backend", ["aten", "reference"])
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_the_draw_does_not_depend_on_the_memory_layout(self, dtype, backend):
        _, weight, u, delta = make(30, 21, 2, dtype, torch.float32)
        u, delta = u.round(), delta.round()  # exact sums
        turned = weight.T.contiguous().T
        for target in (weight, turned):
            ops.rank1_update_(target, u, delta, 2.0**-8, rounding="stochastic", seed=5, backend=backend)
        assert turned.stride(0) == 1 and torch.equal(turned, weight)

    def test_kernels_that_draw_along_memory_are_not_taken_for_a_column_major_weight(self, monkeypatch):
        monkeypatch.setattr(mendfast.backends, "place_of", lambda device: mendfast.backends.Place("cuda", (9, 0)))
        monkeypatch.setattr(mendfast.backends, "MISSING", {})
        row_major = torch.zeros(4, 6, dtype=torch.bfloat16)
        turned = row_major.T.contiguous().T
        assert op._choose(row_major, "stochastic", None) == op._choose(turned, "nearest", None) == "cuda"
        assert op._choose(turned.float(), "stochastic", None) == "cuda"  # which isn't rounded
        assert op._choose(turned, "stochastic", None) == "aten"
        for name in ("cuda", "triton"):
            with pytest.raises(RuntimeError, match="column-major torch.bfloat16.*backend='aten'"):
                op._choose(turned, "stochastic", name)

    def test_float32_weights_are_not_rounded(self):
        _, weight, u, delta = make(6, 7, 2)
        other = weight.clone()
        ops.rank1_update_(weight, u, delta, rounding="stochastic")
        assert torch.equal(weight, ops.rank1_update_(other, u, delta))


class TestRefused:
    """A sentence that says which argument, what it was and what is allowed; the weight stays as it was."""

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"u": torch.zeros(3, 7)}, ValueError, r"the weight must be \(4, 7\); it is \(4, 6\)"),
            ({"delta": torch.zeros(2, 4)}, ValueError, "u has 3 terms and delta 2"),
            ({"u": torch.zeros(6)}, ValueError, "must be matrices"),
            ({"layout": "in_out"}, ValueError, "layout 'in_out'"),
            ({"layout": "rows"}, ValueError, "layout is 'rows'; choose"),
            ({"rounding": "up"}, ValueError, "rounding is 'up'; choose"),
            ({"seed": -1}, ValueError, "seed is -1"),
            ({"alpha": float("nan")}, ValueError, "NaN or infinity"),
            ({"alpha": torch.zeros(2)}, ValueError, "alpha has 2 elements"),
            ({"alpha": "1"}, TypeError, "alpha must be a number"),
            ({"u": torch.full((3, 6), torch.inf)}, ValueError, "NaN or infinity; nothing was written"),
            ({"u": torch.zeros(3, 6, dtype=torch.long)}, TypeError, "u is torch.int64"),
            ({"weight": torch.zeros(4, 6, dtype=torch.int8)}, TypeError, "torch.int8.*Attach"),
            ({"weight": torch.zeros(4, 6).to_sparse()}, TypeError, "only dense tensors"),
            ({"weight": torch.zeros(1, 6).expand(4, 6)}, ValueError, "one place in memory"),
            ({"weight": torch.zeros(4, 12)[:, ::2]}, ValueError, "one of its dimensions must be contiguous"),
            ({"u": torch.zeros(3, 6, device="meta")}, ValueError, "u is on meta"),
            ({"backend": "cuda"}, RuntimeError, "can't serve cpu"),
            ({"backend": "cublas"}, ValueError, "unknown"),
        ],
    )  # fmt: skip
    def test_argument(self, change, error, match):
        _, weight, u, delta = make(4, 6, 3)
        before = weight.clone()
        arguments = {"weight": weight, "u": u, "delta": delta, "alpha": 1.0, **change}
        with pytest.raises(error, match=match):
            ops.rank1_update_(**arguments)
        assert torch.equal(weight, before)

    def test_shared_memory(self):
        memory = torch.randn(6, 8)
        before = memory.clone()
        cases = [
            ([memory[:4]], [memory[3:6]], [torch.ones(3, 4)], "u 0 shares memory with weight 0"),
            ([memory[:4, :6]], [torch.ones(2, 6)], [memory[:2, 5:8].repeat(1, 2)[:, :4]], None),
            ([memory[:4, :4]], [torch.ones(2, 4)], [memory[:2, 2:6]], "delta 0 shares memory with weight 0"),
            ([memory[:4], memory[3:]], [torch.ones(1, 8)] * 2, [torch.ones(1, 4), torch.ones(1, 3)], "tied weights"),
        ]
        for weights, us, deltas, match in cases:
            if match is None:
                ops.rank1_update_group_(weights, us, deltas, [0.0] * len(weights))
                continue
            with pytest.raises(ValueError, match=match):
                ops.rank1_update_group_(weights, us, deltas, [1.0] * len(weights))
        assert torch.equal(memory, before)

    def test_uneven_lists(self):
        with pytest.raises(ValueError, match="got 1 weights, 2 us"):
            ops.rank1_update_group_([torch.zeros(1, 1)], [torch.zeros(1, 1)] * 2, [torch.zeros(1, 1)], [1.0])

    def test_check_finite(self):
        fine, bad = torch.ones(2, 3), torch.tensor([[1.0, torch.inf]])
        ops.check_finite([fine, fine], [fine, fine], [1.0, torch.tensor(2.0)])
        with pytest.raises(ValueError, match="of layer b, layer c holds NaN"):
            names = ["layer a", "layer b", "layer c"]
            ops.check_finite([fine] * 3, [fine, bad, fine], [1.0, 1.0, math.nan], names)


@pytest.mark.parametrize("backend", [*ON_CPU, "reference"])
@pytest.mark.parametrize("rounding", op.ROUNDINGS)
@pytest.mark.usefixtures("instructions")
def test_a_sum_that_leaves_the_dtype_is_found(backend, rounding):
    """Finite factors, a finite sum in float32, infinity in float16: seen after the write, by which weight."""
    made = [make(5, 6, 2, torch.float16, torch.float32, seed=i) for i in range(3)]
    weights, us, deltas = (list(column) for column in list(zip(*made, strict=True))[1:])
    us[1][:, 2], deltas[1][:, 3] = 300.0, 300.0
    ops.rank1_update_group_(weights, us, deltas, [1.0] * 3, rounding=rounding, backend=backend)
    assert weights[1][3, 2] == -torch.inf
    assert ops.non_finite(weights) == [1] and ops.non_finite(weights[::2]) == ops.non_finite([]) == []


def test_alpha_tensor():
    """A tensor is not read on the host: it goes into delta."""
    _, weight, u, delta = make(5, 6, 2)
    before = weight.clone()
    ops.rank1_update_(weight, u, delta, torch.tensor(0.25))
    assert_close(weight, before, u, delta, 0.25)


def test_frozen_and_trained_parameters():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    ops.rank1_update_(parameter, torch.ones(1, 3), torch.ones(1, 2))
    assert parameter.grad_fn is None and (parameter == -1).all()
    product = (parameter * parameter).sum()
    ops.rank1_update_(parameter, torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode_and_autocast():
    with torch.inference_mode():
        weight = torch.zeros(2, 3)
        ops.rank1_update_(weight, torch.ones(1, 3), torch.ones(1, 2))
        assert (weight == -1).all()
    _, weight, u, delta = make(5, 6, 2)
    before = weight.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.rank1_update_(weight, u, delta)
    assert_close(weight, before, u, delta, 1.0)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_opcheck(dtype, backend):
    made = [make(5, 6, 2, dtype, torch.float32), make(6, 5, 3, dtype, torch.float32, "in_out", pad=2)]
    weights, us, deltas = (list(column) for column in list(zip(*made, strict=True))[1:])
    us[1] = us[1].T.contiguous().T
    arguments = (weights, us, deltas, [0.5, 1.0], [False, True], [0, 1], dtype != torch.float32, backend)
    torch.library.opcheck(torch.ops.mendfast.rank1_update_group_.default, arguments)


def test_compiled():
    """In one graph, the weight written in place, the result the same bits."""

    def apply(weights, us, deltas):
        ops.rank1_update_group_(weights, us, deltas, [0.5, 1.0], layouts=["out_in", "in_out"])
        return ops.rank1_update_(weights[0], us[0], deltas[0], -0.5, rounding="stochastic") * 2

    results = []
    for function in (apply, torch.compile(apply, fullgraph=True, backend="aot_eager")):
        made = [make(5, 6, 2, torch.bfloat16, torch.float32), make(6, 5, 3, layout="in_out")]
        weights, us, deltas = (list(column) for column in list(zip(*made, strict=True))[1:])
        results.append((function(weights, us, deltas), *weights))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_backend_choice():
    _, weight, u, delta = make(5, 6, 2)
    with mendfast.backend("reference"):
        assert op._choose(weight, "nearest", None) == "reference"
    assert op._choose(weight, "nearest", None) == op._choose(weight.double(), "nearest", None) == CPU
    turned = weight.bfloat16().T.contiguous().T
    assert op._choose(turned, "nearest", None) == CPU and op._choose(turned, "stochastic", None) == "aten"
    if not torch.cuda.is_available():
        assert isinstance(mendfast.backends.probe("rank1_update_", "cuda", torch.device("cuda", 0)), str)


# -- on a GPU ------------------------------------------------------------------------------------------------
