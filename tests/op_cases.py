"""Cases and measures that the tests of the ops share, on the CPU, in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from mendfast import reference
from mendfast.ops._cpu_extension import problem
from mendfast.types import Block, Stats

CPU = "aten" if problem() else "cpu"
"""What serves the ops on this CPU that the extension has a kernel for."""
ON_CPU = (*dict.fromkeys((CPU, "aten")),)


@pytest.fixture
def poisoned():
    """Fresh allocations hold NaN, so that an output left unwritten can't pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def at_threads(run: Callable[[], torch.Tensor], counts: Sequence[int] = (1, 2, 3)) -> list[torch.Tensor]:
    """What ``run`` returns with each number of threads."""
    before, out = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            out.append(run())
    finally:
        torch.set_num_threads(before)
    return out


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||; the plain norm where ref is 0."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape
    if ref.numel() == 0:
        return 0.0
    scale = ref.norm()
    return float((out - ref).norm() / (scale if scale > 0 else 1))


def tolerance(dtype: torch.dtype, length: int, precision: str = "ieee") -> float:
    """Two roundings, and those of a sum of ``length`` terms in float32, which grow with its square root.

    Never above what the ops promise: 2e-6 in ieee (PyTorch's own float32 products were 1.2e-6 away over 5,120 terms on
    an H100), 1e-5 in tf32x3 (whose products drop 2^-22), 2e-2 in bfloat16.
    tf32 cuts each factor to 10 bits, up to 2^-9 of a product, and what is compared here is a chain of products.
    """
    if dtype == torch.float64:
        return 1e-12
    if dtype in (torch.bfloat16, torch.float16):
        return min(2e-2, 2 * torch.finfo(dtype).eps)
    sums = torch.finfo(torch.float32).eps * (2 + math.sqrt(length) / 4)
    if precision == "tf32":
        return 2**-8
    return min(2e-6, sums) if precision == "ieee" else min(1e-5, 4 * sums)


def double(x):
    """The same in float64, a fresh leaf."""
    return None if x is None else x.detach().double().cpu().requires_grad_(x.requires_grad)


class EditorCase:
    """Random arguments of ``editor_mlp`` that need gradients, and the reference's answer in float64."""

    def __init__(self, n_rows, m, n, rank, modes, *, rows=torch.float32, params=torch.float32, blocks=2,
                 stats=True, tables=True, residual=True, mode=None, device="cpu", seed=0,
                 rows_need_grad=True):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape, dtype=torch.float32, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        d = m + n
        self.u, self.delta = (rand(n_rows, w, dtype=rows).requires_grad_(rows_need_grad) for w in (m, n))
        self.stats = None
        if stats:
            std = [(rand(w).abs() + 0.5) for w in (m, n)]
            self.stats = Stats(rand(m), std[0], rand(n), std[1])
        self.blocks = []
        for _ in range(blocks):
            block = [rand(d, rank, scale=rank**-0.5), rand(rank, d, scale=d**-0.5), rand(d)]
            block += [rand(modes, d) + 1, rand(modes, d)] if tables else [None, None]
            self.blocks.append(Block(*(None if p is None else p.to(params).requires_grad_() for p in block)))
        self.mode = None
        if tables:
            drawn = torch.randint(modes, (n_rows,), generator=generator) if mode is None else mode
            self.mode = drawn.to(device)
        self.kwargs = {"residual": residual}
        self._keep_off_zero()
        self.grads = rand(n_rows, m, dtype=rows), rand(n_rows, n, dtype=rows)
        self.length = max(d, rank, n_rows)

    @torch.no_grad()
    def _keep_off_zero(self):
        """Shift the offsets, of each mode and column, so that no rounding decides the sign of a pre-activation.

        One that falls on the other side of 0 moves a gradient by far more than the products' rounding.
        """
        mode = torch.zeros(len(self.u), dtype=torch.int64, device=self.u.device) if self.mode is None else self.mode
        for i, block in enumerate(self.blocks):
            offsets = block.b.unsqueeze(0) if block.o is None else block.o
            last = Block(*(None if p is None else p.double() for p in block))
            blocks = [Block(*(None if p is None else p.double() for p in b)) for b in self.blocks[:i]]
            rows = self.u.double(), self.delta.double()
            z = reference.editor_mlp(*rows, self.stats, blocks, self.mode, **self.kwargs)
            pre = (torch.cat(z, dim=-1) @ last.V.T) @ last.U.T + last.b
            if last.s is not None:
                pre = last.s[mode] * pre + last.o[mode]
            for value in mode.unique():
                rows, best = pre[mode == value], pre.new_zeros(pre.shape[1])
                shift = torch.zeros_like(best)
                for step in torch.linspace(-1.5, 1.5, 61).tolist():
                    away = (rows + step).abs().amin(0)
                    shift[away > best] = step
                    best = torch.maximum(best, away)
                offsets[value] += shift.to(offsets.dtype)

    def leaves(self):
        return [x for x in (self.u, self.delta, *(p for b in self.blocks for p in b)) if x is not None]

    def run(self, op, **kwargs):
        """(outputs, gradients of every leaf that asks)"""
        out = op(self.u, self.delta, self.stats, self.blocks, self.mode, **self.kwargs, **kwargs)
        asking = [x for x in self.leaves() if x.requires_grad]
        if not asking:
            return out, []
        grads = torch.autograd.grad(out, asking, self.grads, allow_unused=True)
        return out, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, asking, strict=True)]

    def expected(self):
        exact = object.__new__(EditorCase)
        exact.u, exact.delta = double(self.u), double(self.delta)
        exact.stats = None if self.stats is None else Stats(*(double(s) for s in self.stats))
        exact.blocks = [Block(*(double(p) for p in block)) for block in self.blocks]
        exact.mode = None if self.mode is None else self.mode.cpu()
        exact.kwargs, exact.grads = self.kwargs, tuple(double(g) for g in self.grads)
        return exact.run(reference.editor_mlp)

    def check(self, op, precision="ieee", **kwargs):
        """Outputs and gradients of ``op`` against the reference in float64."""
        out, grads = self.run(op, precision=precision, **kwargs)
        ref_out, ref_grads = self.expected()
        for x, ref in zip(out, ref_out, strict=True):
            assert error(x, ref) <= tolerance(x.dtype, self.length, precision)
        for g, ref, x in zip(grads, ref_grads, (x for x in self.leaves() if x.requires_grad), strict=True):
            assert g.dtype == x.dtype
            assert error(g, ref) <= tolerance(g.dtype, self.length, precision), tuple(g.shape)


EDITOR_CASES = {
    "plain": {},
    "one row": {"n_rows": 1},
    "one mode": {"modes": 1},
    "all rows on one of the modes": {"modes": 5, "mode": torch.full((37,), 3)},
    "rows stacked by mode": {"mode": torch.arange(37) // 13},
    "u only": {"n": 0},
    "delta only": {"m": 0},
    "no normalisation": {"stats": False},
    "no residual": {"residual": False},
    "not shared": {"tables": False},
    "normalised only": {"blocks": 0},
    "three blocks": {"blocks": 3},
    "bfloat16 rows": {"rows": torch.bfloat16},
    "float16 rows": {"rows": torch.float16},
    "bfloat16 parameters": {"params": torch.bfloat16},
}


def editor_case(name: str, **overrides) -> EditorCase:
    arguments = {"n_rows": 37, "m": 29, "n": 18, "rank": 11, "modes": 3} | EDITOR_CASES[name] | overrides
    if name == "one row":
        arguments["n_rows"] = 1
    return EditorCase(**arguments)
