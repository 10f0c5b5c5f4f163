"""The editor network over stacked rows, forward and backward.

Few rows (an edit): the time is that of reading U and V once. A block takes three launches, x V^T split over
the chip with the normalisation in its prologue, the sum of the splits, t U^T with everything else in its
epilogue. Many rows: the products are bound by arithmetic, a library does them, and one kernel does the rest;
see :func:`uses_library` for the line between the two.

Kept between the passes, per block: t = V x (N x R), w = U t + b (N x D), and from the second block on its
input x (N x D). Making w anew would read U again, D x R numbers, more than N x D as long as N < R; the first
input is made anew from the rows, in the prologue that reads them. Masks and pre-activations follow from w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..types import EPS
from . import configs
from ._library import matmul
from ._products import _contract, expand, outer, project, row_major
from .configs import cdiv

LIBRARY_ROWS = {"ieee": 0, "tf32x3": 512, "tf32": 32}


def uses_library(n_rows: int, precision: str) -> bool:
    """Whether the products go to a library GEMM: where that was the faster way on an H200.

    Graphs of forward passes, widths of SmolLM2, distilGPT-2, GPT-2-XL and GPT-J. In tf32x3, three of a library's
    products over split factors, the kernels took 0.14 to 0.34 of its time for a row, 0.4 to 0.9 for 500 rows and 0.75
    to 1.15 for 1,000; in tf32 0.9 to 1.2 for 16 to 64 rows, 1.7 to 2.3 from 256 on; by plain multiply-adds 2.4 to 6.7
    from the fewest rows timed, 16, on.
    """
    return n_rows > LIBRARY_ROWS[precision]


@triton.jit
def _finish_block(
    w, x_ptr, mean_ptr, std_ptr, mode_ptr, s_ptr, o_ptr, w_ptr, out_ptr,
    offs_d, offs_n, first, mask_d, mask_n, width, stride_x_row, stride_out_row, eps,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, HAS_MODE: tl.constexpr, HAS_S: tl.constexpr,
    HAS_O: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Scale, shift, clamp, residual of a tile w [BLOCK_D, BLOCK_N] = U t + b; columns start at ``first``."""
    mask = mask_d[:, None] & mask_n[None, :]
    row = offs_n.to(tl.int64)[None, :]
    column = first + offs_d
    if KEEP:
        tl.store(w_ptr + row * width + column[:, None], w, mask=mask)
    mode = tl.zeros_like(offs_n).to(tl.int64)
    if HAS_MODE:
        mode = tl.load(mode_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    table = mode[None, :] * width + column[:, None]
    if HAS_S:
        w = w * tl.load(s_ptr + table, mask=mask, other=0.0).to(tl.float32)
    if HAS_O:
        w = w + tl.load(o_ptr + table, mask=mask, other=0.0).to(tl.float32)
    # not maximum(w, 0), which would hide a NaN
    out = tl.where(w < 0, 0.0, w)
    if RESIDUAL:
        x = tl.load(x_ptr + row * stride_x_row + offs_d[:, None], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.load(mean_ptr + offs_d, mask=mask_d, other=0.0)
            scale = 1.0 / (tl.load(std_ptr + offs_d, mask=mask_d, other=1.0) + eps)
            x = (x - mean[:, None]) * scale[:, None]
        out += x
    tl.store(out_ptr + row * stride_out_row + offs_d[:, None], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _editor_block_fwd_kernel(
    t_ptr, weight_ptr, b_ptr, s_ptr, o_ptr, mode_ptr,
    x0_ptr, x1_ptr, mean0_ptr, std0_ptr, mean1_ptr, std1_ptr, out0_ptr, out1_ptr, w_ptr,
    n_rows, n_rank, width0, width1, tiles0,
    stride_x0_row, stride_x1_row, stride_out0_row, stride_out1_row, eps,
    MATMUL: tl.constexpr,  # False: U t is already in w, and b is added to it
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, HAS_MODE: tl.constexpr, HAS_S: tl.constexpr,
    HAS_O: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w = U t + b;  out = x + max(0, s[mode] w + o[mode])"""
    tiles = tiles0 + tl.cdiv(width1, BLOCK_O)
    tile = tl.program_id(0) % tiles
    offs_n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr = x0_ptr
    mean_ptr = mean0_ptr
    std_ptr = std0_ptr
    out_ptr = out0_ptr
    stride_x_row = tl.full([], 1, tl.int64) * stride_x0_row
    stride_out_row = tl.full([], 1, tl.int64) * stride_out0_row
    first = tl.zeros([], dtype=tl.int64)
    side_width = width0 + tl.zeros([], tl.int32)  # a width of 1 is a constant, which can't be given another value
    if tile >= tiles0:
        x_ptr = x1_ptr
        mean_ptr = mean1_ptr
        std_ptr = std1_ptr
        out_ptr = out1_ptr
        stride_x_row = tl.full([], 1, tl.int64) * stride_x1_row
        stride_out_row = tl.full([], 1, tl.int64) * stride_out1_row
        first = tl.full([], 1, tl.int64) * width0
        side_width = width1 + tl.zeros([], tl.int32)
        tile -= tiles0
    width = width0 + width1
    offs_d = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_d = offs_d < side_width
    mask_n = offs_n < n_rows
    if MATMUL:
        w = _contract(
            weight_ptr + first * n_rank, t_ptr, t_ptr, t_ptr,
            offs_d, offs_n, mask_d, mask_n, 0, n_rank, n_rank,
            n_rank, 1, n_rank, 1, 0.0,
            False, False, BLOCK_O, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        mask = mask_d[:, None] & mask_n[None, :]
        w = tl.load(w_ptr + offs_n.to(tl.int64)[None, :] * width + (first + offs_d)[:, None], mask=mask, other=0.0)
    w += tl.load(b_ptr + first + offs_d, mask=mask_d, other=0.0).to(tl.float32)[:, None]
    _finish_block(
        w, x_ptr, mean_ptr, std_ptr, mode_ptr, s_ptr, o_ptr, w_ptr, out_ptr,
        offs_d, offs_n, first, mask_d, mask_n, width, stride_x_row, stride_out_row, eps,
        NORM, RESIDUAL, HAS_MODE, HAS_S, HAS_O, KEEP,
    )  # fmt: skip


@triton.jit
def _editor_normalise_kernel(
    x_ptr, mean_ptr, std_ptr, out_ptr, n_rows, width, stride_x_row, stride_out_row, eps, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) / (std + eps)"""
    tiles = tl.cdiv(width, BLOCK_D)
    offs_d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_d = offs_d < width
    mask = (offs_n < n_rows)[:, None] & mask_d[None, :]
    row = offs_n.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * stride_x_row + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.load(mean_ptr + offs_d, mask=mask_d, other=0.0)
        x = (x - mean[None, :]) / (tl.load(std_ptr + offs_d, mask=mask_d, other=1.0) + eps)[None, :]
    tl.store(out_ptr + row * stride_out_row + offs_d[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _editor_gate_bwd_kernel(
    g0_ptr, g1_ptr, w_ptr, s_ptr, o_ptr, mode_ptr, d_w_ptr, g_ptr, d_s_ptr, d_o_ptr,
    n_rows, width0, width1, tiles0, stride_g0_row, stride_g1_row,
    HAS_MODE: tl.constexpr, HAS_S: tl.constexpr, HAS_O: tl.constexpr, STORE_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gated = g where s w + o >= 0, else 0;  d_w = s gated;  d_s = sum_n w gated;  d_o = sum_n gated

    One program per tile of columns and mode: it visits the rows of its mode only, in order.
    """
    tile = tl.program_id(0)
    own = tl.program_id(1)
    g_in_ptr = g0_ptr
    stride_g_row = tl.full([], 1, tl.int64) * stride_g0_row
    first = tl.zeros([], dtype=tl.int64)
    side_width = width0 + tl.zeros([], tl.int32)  # a width of 1 is a constant, which can't be given another value
    if tile >= tiles0:
        g_in_ptr = g1_ptr
        stride_g_row = tl.full([], 1, tl.int64) * stride_g1_row
        first = tl.full([], 1, tl.int64) * width0
        side_width = width1 + tl.zeros([], tl.int32)
        tile -= tiles0
    width = width0 + width1
    offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < side_width
    column = first + offs_d
    table = own.to(tl.int64) * width + column
    if HAS_S:
        s = tl.load(s_ptr + table, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_O:
        o = tl.load(o_ptr + table, mask=mask_d, other=0.0).to(tl.float32)
    sum_s = tl.zeros([BLOCK_D], dtype=tl.float32)
    sum_o = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n_rows
        if HAS_MODE:
            mask_n = mask_n & (tl.load(mode_ptr + offs_n, mask=mask_n, other=-1) == own)
        mask = mask_n[:, None] & mask_d[None, :]
        row = offs_n.to(tl.int64)[:, None]
        at = row * width + column[None, :]
        g = tl.load(g_in_ptr + row * stride_g_row + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
        pre = w
        if HAS_S:
            pre = pre * s[None, :]
        if HAS_O:
            pre = pre + o[None, :]
        gated = tl.where(pre >= 0, g, 0.0)
        sum_o += tl.sum(gated, axis=0)
        if HAS_S:
            sum_s += tl.sum(gated * w, axis=0)
            gated = gated * s[None, :]
        tl.store(d_w_ptr + at, gated, mask=mask)
        if STORE_G:
            tl.store(g_ptr + at, g, mask=mask)
    tl.store(d_o_ptr + table, sum_o, mask=mask_d)
    if HAS_S:
        tl.store(d_s_ptr + table, sum_s, mask=mask_d)


def _sides(x: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:, :m], x[:, m:]


def _present(*sides: torch.Tensor) -> list[torch.Tensor]:
    return [side for side in sides if side.shape[-1]] or [sides[0]]


def _rows(u: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides row-major and of one dtype: a program reads either through the same pointer."""
    if u.dtype != delta.dtype:
        u, delta = u.float(), delta.float()
    return row_major(u), row_major(delta)


def _float_stats(stats) -> list[torch.Tensor]:
    return [s.float().contiguous() for s in stats]


def _stats_of_present(stats, u, delta) -> list[torch.Tensor]:
    if not stats:
        return []
    return (stats[:2] if u.shape[1] else []) + (stats[2:] if delta.shape[1] else [])


def normalise(u, delta, stats, out) -> None:
    """out[0], out[1] = the rows of both sides, normalised."""
    for x, pair, y in ((u, stats[:2], out[0]), (delta, stats[2:], out[1])):
        if x.shape[1] == 0:
            continue
        config = configs.lookup("normalise", x.device, x.shape[0])
        # on one axis: the second takes 65,535 programs, and rows may be more
        grid = (cdiv(x.shape[1], config.block_d) * cdiv(x.shape[0], config.block_n),)
        mean, std = pair or (x, x)
        with torch.cuda.device_of(x):
            _editor_normalise_kernel[grid](
                x, mean, std, y, *x.shape, x.stride(0), y.stride(0), EPS, NORM=bool(pair),
                BLOCK_N=config.block_n, BLOCK_D=config.block_d, num_warps=config.warps,
            )  # fmt: skip


def _block_fwd(block, *, t, mode, x, stats, out, w, residual, keep, precision, by_library) -> None:
    """One block's second product and epilogue, or the epilogue alone over w = U t."""
    n_rows, m = x[0].shape
    n, rank = x[1].shape[1], block.V.shape[0]
    U, b, s, o = block.U.contiguous(), block.b.contiguous(), block.s, block.o
    if by_library:
        config = configs.lookup("pointwise_fwd", U.device, n_rows)
        block_o, block_n, block_k, extra = config.block_d, config.block_n, 16, {}
    else:
        config = configs.lookup("block_fwd", U.device, n_rows, precision)
        block_o, block_n, block_k = config.block_o, config.block_n, config.block_k
        extra = {"num_stages": config.stages, **config.limits()}
    tiles0 = cdiv(m, block_o)
    grid = ((tiles0 + cdiv(n, block_o)) * cdiv(n_rows, block_n),)
    mean0, std0, mean1, std1 = stats or (b, b, b, b)
    with torch.cuda.device_of(U):
        _editor_block_fwd_kernel[grid](
            t, U, b, b if s is None else s.contiguous(), b if o is None else o.contiguous(),
            b if mode is None else mode, *x, mean0, std0, mean1, std1, *out, w,
            n_rows, rank, m, n, tiles0,
            x[0].stride(0), x[1].stride(0), out[0].stride(0), out[1].stride(0), EPS,
            MATMUL=not by_library, NORM=bool(stats), RESIDUAL=residual, HAS_MODE=mode is not None,
            HAS_S=s is not None, HAS_O=o is not None, KEEP=keep,
            BLOCK_O=block_o, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION=precision,
            num_warps=config.warps, **extra,
        )  # fmt: skip


def forward(u, delta, stats, blocks, mode, *, precision, residual, keep) -> list[torch.Tensor]:
    """[out_u, out_delta], and if ``keep`` what :func:`backward` takes: t, w of block 0, x, t, w of others."""
    stats = _float_stats(stats)
    n_rows, m = u.shape
    width = m + delta.shape[1]
    x = _rows(u, delta)
    # a program writes either side through the same pointer, so that both have one dtype
    out = [torch.empty(side.shape, dtype=side.dtype, device=u.device) for side in x]
    if not blocks:
        normalise(*x, stats, out)
        return [out[0].to(u.dtype), out[1].to(delta.dtype)]
    mode = _mode_of(blocks, mode)
    by_library = uses_library(n_rows, precision)
    saved = []
    x_full = None  # the input as one tensor: for a library, and from the second block on
    if by_library:
        x_full = torch.empty((n_rows, width), dtype=torch.float32, device=u.device)
        normalise(*x, stats, _sides(x_full, m))
        x, stats = _sides(x_full, m), []
    for i, block in enumerate(blocks):
        last = i == len(blocks) - 1
        if by_library:
            t = matmul(x_full, block.V.float().T, precision)
            w = matmul(t, block.U.float().T, precision)
        else:
            sides = _present(*x) if x_full is None else [x_full]
            t = project(sides, block.V, _stats_of_present(stats, *x), EPS, precision)
            w = torch.empty((n_rows, width), dtype=torch.float32, device=u.device) if keep else t
        if keep:
            saved += [t, w] if i == 0 else [x_full, t, w]
        x_next = None if last else torch.empty((n_rows, width), dtype=torch.float32, device=u.device)
        target = out if last else _sides(x_next, m)
        _block_fwd(
            block, t=t, mode=mode, x=x, stats=stats, out=target, w=w,
            residual=residual, keep=keep, precision=precision, by_library=by_library,
        )  # fmt: skip
        if not last:
            x_full, x, stats = x_next, _sides(x_next, m), []
    return [out[0].to(u.dtype), out[1].to(delta.dtype), *saved]


def _mode_of(blocks, mode) -> torch.Tensor | None:
    """The rows' modes, or None where no table is indexed by them."""
    if blocks and blocks[0].s is None and blocks[0].o is None:
        return None
    return None if mode is None else mode.contiguous()


def backward(grads_out, inputs, stats, blocks, saved, mode, *, precision, residual, needs_rows):
    """Gradients of every parameter in the order of ``blocks``, then of u and delta if ``needs_rows``.

    ``grads_out`` and ``inputs`` are pairs, (u's, delta's).
    """
    u, delta = inputs
    stats = _float_stats(stats)
    n_rows, m = u.shape
    n = delta.shape[1]
    width, device = m + n, u.device
    rows = _rows(u, delta)
    g = _rows(*grads_out)
    by_library = uses_library(n_rows, precision)
    mode = _mode_of(blocks, mode)
    grads: list[list[torch.Tensor]] = []
    full = None  # g as one float32 tensor
    for i in reversed(range(len(blocks))):
        block = blocks[i]
        t, w = saved[0:2] if i == 0 else saved[3 * i : 3 * i + 2]
        needs_input = i > 0 or needs_rows
        store = needs_input and residual and full is None
        d_w = torch.empty((n_rows, width), dtype=torch.float32, device=device)
        full = torch.empty_like(d_w) if store else full
        d_s, d_o = _gate(block, g=g, w=w, mode=mode, d_w=d_w, full=full, store=store)
        if block.s is not None:
            d_b = (d_o * block.s.float()).sum(0)  # d_w is s times what d_o sums, mode by mode
        else:
            d_b = d_o.sum(0)
        x = saved[3 * i - 1] if i else None
        own = _weight_grads(
            block, d_w=d_w, t=t, x=x, rows=rows, stats=stats, precision=precision, by_library=by_library
        )
        d_t = own.pop()
        own.append(d_b.to(block.b.dtype))
        own += [] if block.s is None else [d_s.to(block.s.dtype)]
        own += [] if block.o is None else [d_o.to(block.o.dtype)]
        grads.insert(0, own)
        if needs_input:
            if by_library:
                d_x = matmul(d_t, block.V.float(), precision)
                full = d_x.add_(full) if residual else d_x
            else:
                d_x = torch.empty((n_rows, width), dtype=torch.float32, device=device)
                full = expand(d_t, block.V.contiguous().T, full if residual else None, d_x, precision)
            g = _sides(full, m)
    flat = [gradient for own in grads for gradient in own]
    if not needs_rows:
        return flat
    d_u, d_delta = g
    if stats:
        d_u, d_delta = d_u / (stats[1] + EPS), d_delta / (stats[3] + EPS)
    return [*flat, d_u.to(u.dtype, copy=True), d_delta.to(delta.dtype, copy=True)]


def _gate(block, *, g, w, mode, d_w, full, store) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill d_w, and ``full`` with g if ``store``; return (d_s, d_o), each [modes, D] float32."""
    n_rows, m = g[0].shape
    n = g[1].shape[1]
    table = block.s if block.s is not None else block.o
    modes = 1 if table is None else table.shape[0]
    d_o = torch.empty((modes, m + n), dtype=torch.float32, device=w.device)
    d_s = torch.empty_like(d_o) if block.s is not None else d_o
    config = configs.lookup("gate_bwd", w.device, n_rows)
    tiles0 = cdiv(m, config.block_d)
    grid = (tiles0 + cdiv(n, config.block_d), modes)
    with torch.cuda.device_of(w):
        _editor_gate_bwd_kernel[grid](
            *g, w,
            w if block.s is None else block.s.contiguous(), w if block.o is None else block.o.contiguous(),
            w if mode is None else mode, d_w, full if store else d_w, d_s, d_o,
            n_rows, m, n, tiles0, g[0].stride(0), g[1].stride(0),
            HAS_MODE=mode is not None, HAS_S=block.s is not None, HAS_O=block.o is not None, STORE_G=store,
            BLOCK_N=config.block_n, BLOCK_D=config.block_d, num_warps=config.warps,
        )  # fmt: skip
    return d_s, d_o


def _weight_grads(block, *, d_w, t, x, rows, stats, precision, by_library) -> list[torch.Tensor]:
    """[dU, dV, d_t] of a block with input x; None: the first, whose input is made from the rows."""
    m = rows[0].shape[1]
    if by_library:
        if x is None:
            x = torch.empty_like(d_w)
            normalise(*rows, stats, _sides(x, m))
        d_t = matmul(d_w, block.U.float(), precision)
        d_u, d_v = matmul(d_w.T, t, precision), matmul(d_t.T, x, precision)
        return [d_u.to(block.U.dtype), d_v.to(block.V.dtype), d_t]
    d_u = torch.empty(block.U.shape, dtype=block.U.dtype, device=d_w.device)
    outer([d_w], t, [], EPS, d_u, precision)
    d_t = project([d_w], block.U.contiguous().T, [], EPS, precision)
    d_v = torch.empty(block.V.shape, dtype=block.V.dtype, device=d_w.device)
    sides, own = (_present(*rows), _stats_of_present(stats, *rows)) if x is None else ([x], [])
    outer(sides, d_t, own, EPS, d_v.T, precision)
    return [d_u, d_v, d_t]
