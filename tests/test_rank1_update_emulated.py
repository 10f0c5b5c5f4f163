"""The CUDA kernels of the update, run thread by thread on the CPU (tests/cuda_emulation).

What this shows: tiles, edges, fragments, barriers, copies in flight and rounding are right, for any order of threads
and any arrival of asynchronous copies. What it can't show: that the instructions do what their description says, and
how fast.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mendfast.reference.rank1_update import draws, round_stochastic

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(torch.float32, torch.float32)] + [(w, f) for w in DTYPES[1:] for f in (w, torch.float32)]
KERNELS = [(mma, *pair) for mma in (False, True) for pair in PAIRS[mma:]]
"""Whether the one for many terms, the weight's dtype, the factors'; that one is for 16-bit weights."""
BY_KERNEL = pytest.mark.parametrize(("mma", "weight", "factor"), KERNELS)
GUARD = 24


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is needed to compile the emulation")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    header = HERE / "cuda_emulation" / "emulation.cuh"
    command = [
        compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        f"-I{CSRC}", f'-DMENDFAST_EMULATION="{header}"', str(HERE / "cuda_emulation" / "rank1_update.cpp"),
        "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    emulate = ctypes.CDLL(str(library)).emulate
    emulate.restype = ctypes.c_char_p
    emulate.library = str(library)
    return emulate


class Case:
    """One matrix in memory that is NaN wherever the kernel has no business."""

    def __init__(self, rows, cols, terms, weight=torch.float32, factor=None, pad=0, offset=0, alpha=0.7, seed=0):
        generator = torch.Generator().manual_seed(rows * 7919 + cols * 31 + terms + seed)
        self.dtype, self.factor_dtype = weight, factor or weight
        self.alpha, self.seed = alpha, seed
        self.memory, self.weight = self._within(rows, cols, weight, pad, offset, generator)
        self.left_memory, self.left = self._within(terms, rows, self.factor_dtype, pad, offset, generator)
        self.right_memory, self.right = self._within(terms, cols, self.factor_dtype, pad, offset, generator)
        self.before = self.weight.clone()

    @staticmethod
    def _within(rows, cols, dtype, pad, offset, generator):
        stride = cols + pad
        memory = torch.full((GUARD + offset + rows * stride + GUARD,), torch.nan, dtype=dtype)
        # allocations of PyTorch begin at multiples of 64 bytes, and GUARD is one of 16 bytes
        view = memory[GUARD + offset :].as_strided((rows, cols), (stride, 1))
        view.copy_(torch.randn(rows, cols, generator=generator))
        return memory, view

    def integers(self):
        tensors = (self.weight, self.left, self.right)
        return [
            *(t.data_ptr() for t in tensors), *(t.stride(0) for t in tensors), *self.weight.shape,
            self.left.shape[0], self.seed,
        ]  # fmt: skip

    def exact(self):
        return self.before.double() - self.alpha * (self.left.double().T @ self.right.double())

    def tolerance(self):
        """Half a unit of W in the last place, and what the products leave out, 2^-15 of each by bfloat16 halves;
        float32 sums 2^-24 for each step of log2 T + 2."""
        size = self.alpha * (self.left.double().abs().T @ self.right.double().abs())
        split = 2.0**-15 if self.factor_dtype != self.dtype else 0.0
        step = torch.finfo(self.dtype).eps / 2
        rounding = step * self.exact().abs().clamp(min=2.0**-14) * 1.001
        return rounding + (split + 2.0**-22) * size + 2.0**-22 * self.before.double().abs()

    def check(self, stochastic=False):
        outside = torch.ones_like(self.memory, dtype=torch.bool)
        outside.as_strided(self.weight.shape, self.weight.stride(), self.weight.storage_offset()).zero_()
        assert self.memory[outside].isnan().all(), "written outside of the matrix"
        error = (self.weight.double() - self.exact()).abs()
        tolerance = self.tolerance() * (2 if stochastic else 1)
        assert (error <= tolerance).all(), f"off by {float((error / tolerance).nan_to_num(torch.inf).max())} tolerances"


def run(emulator, cases, *, mma, stochastic=False, grid=2, order=0, eager=False):
    integers = [v for case in cases for v in case.integers()]
    error = emulator(
        (ctypes.c_int64 * len(integers))(*integers),
        (ctypes.c_float * len(cases))(*(case.alpha for case in cases)),
        len(cases), DTYPES.index(cases[0].dtype), DTYPES.index(cases[0].factor_dtype),
        stochastic, mma, grid, order, eager,
    )  # fmt: skip
    if error is not None:
        raise ValueError(error.decode())


@BY_KERNEL
@pytest.mark.parametrize("terms", [1, 17, 65])
def test_edges(emulator, weight, factor, mma, terms):
    """More tiles than blocks, tiles cut at both edges, a number of terms that is no multiple of anything."""
    case = Case(131, 150, terms, weight, factor)
    run(emulator, [case], mma=mma, grid=3)
    case.check()


@BY_KERNEL
@pytest.mark.parametrize(("pad", "offset"), [(3, 0), (8, 0), (3, 1)])
def test_alignment(emulator, weight, factor, mma, pad, offset):
    """16 bytes at a time where addresses and strides allow it, one element at a time elsewhere."""
    case = Case(69, 101, 20, weight, factor, pad=pad, offset=offset)
    assert (case.weight.data_ptr() % 16 == 0) == (offset == 0) and (case.weight.stride(0) % 8 == 0) == (pad == 3)
    run(emulator, [case], mma=mma, grid=1)
    case.check()


@pytest.mark.parametrize("mma", [False, True], ids=["fma", "mma"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 3), (300, 1, 2), (64, 256, 16), (128, 128, 32), (2, 2, 150)])
def test_shapes(emulator, mma, shape):
    for weight, factor in PAIRS[mma:]:
        case = Case(*shape, weight, factor)
        run(emulator, [case], mma=mma)
        case.check()


@BY_KERNEL
def test_any_order_of_threads_and_copies(emulator, weight, factor, mma):
    """A missing barrier or wait would show in one of these; the bits must be the same in all."""
    results = []
    for order, eager in itertools.product(range(4), (False, True)):
        case = Case(140, 40, 40, weight, factor)
        run(emulator, [case], mma=mma, grid=1, order=order, eager=eager)
        results.append(case.weight.clone())
    case.check()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("mma", [False, True], ids=["fma", "mma"])
@pytest.mark.parametrize("grid", [1, 4, 100])
def test_group(emulator, mma, grid):
    """Matrices of different shapes and numbers of terms, more of them than one launch takes, any number of blocks."""
    shapes = [(130, 40, 3), (5, 300, 40), (1, 1, 1), (64, 64, 64), (3, 5, 33)]
    cases = [Case(*shape, torch.bfloat16, torch.float32, seed=i) for i, shape in enumerate(shapes)]
    cases += [Case(2, 9, 2, torch.bfloat16, torch.float32, seed=i) for i in range(30)]
    run(emulator, cases, mma=mma, grid=grid)
    for case in cases:
        case.check()


@pytest.mark.parametrize("mma", [False, True], ids=["fma", "mma"])
@pytest.mark.parametrize(("weight", "factor"), PAIRS[1:])
def test_stochastic_draw(emulator, weight, factor, mma):
    """Every element is rounded as the reference rounds the same float32 value with the same draw."""
    case = Case(70, 141, 7, weight, factor, seed=2**40 + 12345)
    run(emulator, [case], mma=mma, stochastic=True)
    case.check(stochastic=True)
    expected = round_stochastic(case.exact().float(), weight, draws(case.seed, 70, 141))
    # sums that differ by a part of a unit round differently in that part of the cases: 2^-16 of a product, where
    # bfloat16 halves make the product, is some 2^-5 of float16's unit
    split = mma and factor != weight
    assert (case.weight != expected).double().mean() < (2**-4 if split and weight == torch.float16 else 2**-7)
    other = Case(70, 141, 7, weight, factor, seed=2**40 + 12345)
    other.seed += 1
    run(emulator, [other], mma=mma, stochastic=True)
    assert not torch.equal(other.weight, case.weight)


@pytest.mark.parametrize("weight", DTYPES[1:])
@pytest.mark.parametrize(("before", "update"), [(1.0, 2.0**-13), (-1.0, -(2.0**-14)), (3e-6, 1e-9), (65000.0, 3.0)])
def test_stochastic_mean(emulator, weight, before, update):
    """An update below half a unit: nearest stands still, the mean of the stochastic roundings moves by it."""
    means = {}
    for stochastic in (False, True):
        case = Case(128, 128, 1, weight, torch.float32, alpha=1.0)
        case.weight.fill_(before)
        case.left.fill_(1.0)
        case.right.fill_(update)
        start = case.weight.double().clone()
        run(emulator, [case], mma=False, stochastic=stochastic)
        means[stochastic] = float((start - case.weight.double()).mean())
    value = start[0, 0].to(weight)
    unit = float((value.view(torch.int16) + 1).view(weight).double() - value.double())
    assert abs(update) < abs(unit) / 2 and means[False] == 0
    # five standard errors of 16,384 draws, each within half a unit
    assert abs(means[True] - update) < 5 * 0.5 * abs(unit) / 128


READS = """
import ctypes, mmap, sys
import torch
from test_rank1_update_emulated import Case, DTYPES, run

emulate = ctypes.CDLL(sys.argv[1]).emulate
emulate.restype = ctypes.c_char_p
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def at_the_end(tensor, gap):
    # the tensor's last element is followed by a page that may not be touched, `gap` elements later
    page, size = mmap.PAGESIZE, tensor.element_size()
    used = ((tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1] + gap) * size
    pages = (used + page - 1) // page
    area = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    whole = torch.frombuffer(area, dtype=tensor.dtype, count=pages * page // size)
    kept.append(area)
    return whole[pages * page // size - used // size:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

for weight, factor in ((0, 0), (1, 1), (1, 0), (2, 0)):
    for mma in (False, True) if weight else (False,):
        for rows, cols, terms, gap in ((33, 40, 5, 0), (130, 131, 17, 0), (64, 264, 33, 8)):
            case = Case(rows, cols, terms, DTYPES[weight], DTYPES[factor])
            case.weight, case.left, case.right = (at_the_end(t, gap) for t in (case.weight, case.left, case.right))
            run(emulate, [case], mma=mma)
            error = (case.weight.double() - case.exact()).abs()
            assert (error <= case.tolerance()).all()
print("nothing out of bounds")
"""


def test_no_access_past_the_end(emulator):
    """Behind the last element of W and of the factors lies memory that can't be read."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, "-c", READS, emulator.library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing out of bounds" in done.stdout, done.stderr


def test_infinity_and_nan_stay(emulator):
    for weight in DTYPES:
        for mma in (False, True) if weight.itemsize == 2 else (False,):
            case = Case(4, 8, 2, weight, torch.float32)
            case.weight[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
            case.weight[1, 0] = torch.finfo(weight).max
            case.right[:, 0] = 0
            run(emulator, [case], mma=mma, stochastic=True)
            assert case.weight[0, 0] == torch.inf and case.weight[0, 1] == -torch.inf
            assert case.weight[0, 2].isnan() and case.weight[1, 0] == torch.finfo(weight).max


def test_emulation_notices_what_it_is_for(emulator):
    """A misread stride must not pass: the harness compares against what was asked, in memory that is NaN around it."""
    case = Case(40, 40, 3, pad=8)
    integers = case.integers()
    integers[3] -= 1
    case.integers = lambda: integers
    run(emulator, [case], mma=False)
    with pytest.raises(AssertionError):
        case.check()
    case = Case(4, 4, 3)
    integers = case.integers()
    integers[3] = 3
    case.integers = lambda: integers
    with pytest.raises(ValueError, match="weight_stride is 3, less than the 4 columns"):
        run(emulator, [case], mma=False)
