"""W <- W - alpha left^T right in place, on a grid of tiles; each tile of W is read once and written once.

The sum runs on matrix units, BLOCK_T terms at a time, accumulated in float32: 16-bit factors as they are, float32
factors as three TF32 products (accurate to float32). Rounding into a 16-bit W is to nearest, or stochastic with the
bits that :func:`mendfast.reference.rank1_update.draws` defines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .configs import cdiv

THREE_TF32 = "tf32x3"


@dataclass(frozen=True)
class Rank1Config:
    """A tile of W, and the terms that are added to it in one step. Chosen by counting registers, not by timing."""

    block_rows: int
    block_cols: int
    block_terms: int
    warps: int
    stages: int

    def problem(self) -> str | None:
        """Why this configuration can't be launched, or None."""
        if self.block_cols % 8:
            return "a draw serves eight columns; block_cols must be a multiple of 8"
        if min(self.block_rows, self.block_cols, self.block_terms) < 16:
            return "every side of a product must be at least 16"
        if self.block_rows * self.block_cols > 32 * 32 * self.warps:
            return f"{self.block_rows} x {self.block_cols} elements are too many for {self.warps} warps"
        return None


FEW = Rank1Config(block_rows=64, block_cols=64, block_terms=16, warps=4, stages=2)
MANY = Rank1Config(block_rows=64, block_cols=64, block_terms=32, warps=4, stages=3)
SPLIT = Rank1Config(block_rows=64, block_cols=64, block_terms=16, warps=4, stages=3)
REGISTERS = 224
"""The cap for a thread. Left alone the assembler spills to stay below 128; two programs to a multiprocessor fit."""
for _config in (FEW, MANY, SPLIT):
    if _config.problem():
        raise ValueError(f"{_config}: {_config.problem()}")


def config_for(terms: int, factor: torch.dtype) -> Rank1Config:
    """Up to 16 terms are one step; more are pipelined, in shorter steps where float32 factors take three products."""
    if terms <= FEW.block_terms:
        return FEW
    return SPLIT if factor == torch.float32 else MANY


@triton.jit
def _draw(seed, first_row, first_col, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """16 random bits for each element of a tile: Philox with counter (column // 8, row, 0, 0)."""
    rows = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.uint32)
    blocks = (first_col // 8 + tl.arange(0, BLOCK_COLS // 8)).to(tl.uint32)
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 8), tl.uint32)
    a, b, c, d = tl.philox(seed, blocks[None, :] + zero, rows[:, None] + zero, zero, zero)
    # word 2 j + i of a block is [..., j, i] before the last two are flattened; each word is two columns
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [rows, blocks, j, i]
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (BLOCK_ROWS, BLOCK_COLS))


# Toward zero, plus one unit in the last place where what was cut off and the draw reach one together.
@triton.jit
def _stochastic_bf16(exact, draw):
    bits = exact.to(tl.uint32, bitcast=True)
    moved = bits + draw
    finite = ((bits & 0x7F800000) != 0x7F800000) & ((moved & 0x7F800000) != 0x7F800000)
    rounded = (moved >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(finite, rounded, exact.to(tl.bfloat16))


@triton.jit
def _stochastic_f16(exact, draw):
    near = exact.to(tl.float16)
    bits = near.to(tl.uint16, bitcast=True).to(tl.uint32)
    # bit patterns of floats of one sign are ordered as their magnitudes are
    low = tl.where(tl.abs(near.to(tl.float32)) > tl.abs(exact), bits - 1, bits)
    below = low.to(tl.uint16).to(tl.float16, bitcast=True)
    above = (low + 1).to(tl.uint16).to(tl.float16, bitcast=True)
    finite = ((bits & 0x7C00) != 0x7C00) & (((low + 1) & 0x7C00) != 0x7C00)
    unit = tl.where(finite, tl.abs(above.to(tl.float32) - below.to(tl.float32)), 1.0)
    # a power of two, whose reciprocal has the opposite exponent: "/" is approximate on a GPU, exact division spills
    reciprocal = (0x7F000000 - unit.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    cut_off = tl.abs(exact - below.to(tl.float32)) * reciprocal * 65536.0
    rounded = tl.where(cut_off > 65535.5 - draw.to(tl.float32), above, below)
    return tl.where(finite, rounded, near)


# a seed of 1 or a multiple of 16 is no reason to compile again
@triton.jit(do_not_specialize=["seed"])
def _rank1_update_kernel(
    weight_ptr,  # [rows, cols]
    left_ptr,  # [terms, rows]
    right_ptr,  # [terms, cols]
    alpha,
    seed,
    rows,
    cols,
    terms,
    stride_weight_row,
    stride_left_term,
    stride_right_term,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """weight[r, c] -= alpha sum_t left[t, r] right[t, c]"""
    across = tl.cdiv(cols, BLOCK_COLS)
    tile = tl.program_id(0)
    first_row, first_col = tile // across * BLOCK_ROWS, tile % across * BLOCK_COLS
    row, col = first_row + tl.arange(0, BLOCK_ROWS), first_col + tl.arange(0, BLOCK_COLS)
    row_mask, col_mask = row < rows, col < cols
    # int64 before strides are multiplied: a weight can have more than 2^31 elements
    weight_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_weight_row + col[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, terms, BLOCK_T):
        term = start + tl.arange(0, BLOCK_T)
        term_mask = (term < terms)[:, None]
        term = term.to(tl.int64)[:, None]
        left = tl.load(
            left_ptr + term * stride_left_term + row[None, :], mask=term_mask & row_mask[None, :], other=0.0
        )  # [BLOCK_T, BLOCK_ROWS]
        right = tl.load(
            right_ptr + term * stride_right_term + col[None, :], mask=term_mask & col_mask[None, :], other=0.0
        )  # [BLOCK_T, BLOCK_COLS]
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    exact = weight.to(tl.float32) - alpha * total
    if STOCHASTIC:
        draw = _draw(seed, first_row, first_col, BLOCK_ROWS, BLOCK_COLS)
        if weight.dtype == tl.bfloat16:
            result = _stochastic_bf16(exact, draw)
        else:
            result = _stochastic_f16(exact, draw)
    else:
        result = exact.to(weight.dtype)
    tl.store(weight_ptrs, result, mask=mask)


def rank1_update_(
    weight: torch.Tensor,  # [rows, cols], rows contiguous
    left: torch.Tensor,  # [T, rows], float32 or the weight's dtype, rows contiguous
    right: torch.Tensor,  # [T, cols], as left
    alpha: float,
    *,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    """Subtract ``alpha * left^T right`` from ``weight`` in place.

    A group is one launch for each matrix: pointers in a list would have to be copied to the device first.
    """
    rows, cols = weight.shape
    terms = left.shape[0]
    if not rows or not cols or not terms:
        return
    config = config_for(terms, left.dtype)
    grid = (cdiv(rows, config.block_rows) * cdiv(cols, config.block_cols),)
    with torch.cuda.device_of(weight):
        _rank1_update_kernel[grid](
            weight, left, right, float(alpha), seed, rows, cols, terms,
            weight.stride(0), left.stride(0), right.stride(0),
            STOCHASTIC=stochastic and weight.dtype != torch.float32,
            PRECISION=None if left.dtype != torch.float32 else THREE_TF32,
            BLOCK_ROWS=config.block_rows, BLOCK_COLS=config.block_cols, BLOCK_T=config.block_terms,
            num_warps=config.warps, num_stages=config.stages, maxnreg=REGISTERS,
        )  # fmt: skip
