"""W <- W - alpha sum_i delta_i u_i^T in place, for one matrix or all matrices of an edit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .. import backends, reference
from ..reference.rank1_update import draws, round_stochastic
from . import _common
from ._cpu_extension import direct, kind_of, row_stride

try:
    from .. import _cpu
except ImportError:  # then the backend is never chosen
    _cpu = None

LAYOUTS = ("out_in", "in_out")
ROUNDINGS = ("nearest", "stochastic")
CHUNK_BYTES = 16 * 2**20
"""The float32 copy of a part of a 16-bit weight that the PyTorch backend works on at a time."""
MOST_TERMS = {torch.float32: 96, torch.bfloat16: 1000, torch.float16: 1000}
"""By the weight's dtype: from about as many on PyTorch's product is faster than the CPU's kernel, though it takes a
float32 copy of a 16-bit weight."""
KERNEL_TERMS = 32
"""Of a float32 weight on a GPU: with more terms cuBLAS is taken. On an H200 it was 0.9 to 1.6 times as fast as a kernel
on tensor cores with 60 terms, and 1.1 to 2.8 times with 120 to 4,096."""
_SIXTEEN = (torch.bfloat16, torch.float16)
_SERVED = (torch.float32, *_SIXTEEN, torch.float64)


class _Matrix(NamedTuple):
    """One update as the backends see it: weight [rows, cols] -= alpha * left^T right."""

    weight: torch.Tensor
    left: torch.Tensor  # [T, rows]
    right: torch.Tensor  # [T, cols]
    alpha: float
    seed: int


def rank1_update_(
    weight: torch.Tensor,  # [n, m] ("out_in", nn.Linear) or [m, n] ("in_out", Conv1D)
    u: torch.Tensor,  # [T, m]
    delta: torch.Tensor,  # [T, n]
    alpha: float | torch.Tensor = 1.0,
    *,
    layout: str = "out_in",
    rounding: str = "nearest",
    seed: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Subtract ``alpha * sum_i delta_i u_i^T`` from ``weight`` in place and return it.

    As Mitchell et al. 2022, Algorithm 2. The sum is accumulated in float32 whatever the weight's dtype; the
    d x d gradient is never formed. Not differentiable: the weight's version counter moves, its graph doesn't.

    Args:
        weight: float32, bfloat16 or float16; rows may lie apart (a stride larger than the width). float64 by the
            "aten" and "reference" backends.
        u: [T, m], any floating dtype, any strides; used as it is when float32 or, with ``delta``, of the weight's
            dtype with contiguous rows, else copied to float32. T = 0 changes nothing.
        delta: [T, n], likewise.
        alpha: a number, or a tensor with one element, which is not read on the host.
        rounding: "nearest", or "stochastic": a 16-bit weight is rounded up or down with the probability that
            makes the mean right, so that updates below half a unit in the last place don't vanish.
        seed: of stochastic rounding, 0 to 2^63 - 1; with the row and the column it fixes the draw, the same one on
            every backend and in every memory layout (a column-major 16-bit weight by "aten" and "reference").
        backend: "cuda", "triton", "cpu", "aten", "reference" or "auto" (default: the first of these that can serve).

    Raises:
        ValueError: shapes that don't fit, tensors on several devices, a weight whose elements share memory with
            each other or with a factor, NaN or infinity in factors or alpha (seen on the CPU, or in
            ``with checking():``; elsewhere ask :func:`check_finite`). Nothing is written then.
        TypeError: a dtype that isn't served.
        RuntimeError: an explicit backend that can't serve.
    """
    rank1_update_group_(
        [weight], [u], [delta], [alpha], layouts=[layout], rounding=rounding, seed=seed, backend=backend
    )
    return weight


def rank1_update_group_(
    weights: Sequence[torch.Tensor],
    us: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    alphas: Sequence[float | torch.Tensor],
    *,
    layouts: Sequence[str] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """:func:`rank1_update_` of every matrix, all of them or, if an argument is refused, none.

    The matrices may differ in shape, layout, dtype, number of terms and device. The CUDA extension serves all that
    agree in dtype and device with one launch for every 32; the i-th draws its rounding from ``seed + i``.

    A sum of finite terms may leave the weight's dtype: it is written as infinity, and
    :func:`mendfast.ops.non_finite` of the weights finds it afterwards. Who holds a backup takes all of them back then.
    """
    weights, us, deltas, alphas = list(weights), list(us), list(deltas), list(alphas)
    if not torch.compiler.is_compiling() and _at_once(weights, us, deltas, alphas, layouts, rounding, seed, backend):
        return
    layouts = ["out_in"] * len(weights) if layouts is None else list(layouts)
    if len({len(weights), len(us), len(deltas), len(alphas), len(layouts)}) > 1:
        raise ValueError(
            f"rank1_update_group_: one of each per matrix is needed; got {len(weights)} weights, {len(us)} us, "
            f"{len(deltas)} deltas, {len(alphas)} alphas, {len(layouts)} layouts."
        )
    if rounding not in ROUNDINGS:
        raise ValueError(f"rank1_update_: rounding is {rounding!r}; choose one of {', '.join(ROUNDINGS)}.")
    if not 0 <= seed < 2**63 - len(weights):
        raise ValueError(f"rank1_update_: seed is {seed}; it must be from 0 to 2^63 - 1.")
    for i, arguments in enumerate(zip(weights, us, deltas, alphas, layouts, strict=True)):
        _check(f"rank1_update_{f' (matrix {i})' if len(weights) > 1 else ''}", *arguments)
    if not weights:
        return
    chosen = [_choose(weight, rounding, backend) for weight in weights]
    for i, alpha in enumerate(alphas):
        if isinstance(alpha, torch.Tensor):
            deltas[i], alphas[i] = deltas[i].to(torch.promote_types(deltas[i].dtype, torch.float32)) * alpha, 1.0
    for name in dict.fromkeys(chosen):
        mine = [i for i, other in enumerate(chosen) if other == name]
        torch.ops.mendfast.rank1_update_group_(
            [weights[i].detach() for i in mine],
            [us[i].detach() for i in mine],
            [deltas[i].detach() for i in mine],
            [float(alphas[i]) for i in mine],
            [layouts[i] == "in_out" for i in mine],
            [seed + i for i in mine],
            rounding == "stochastic",
            name,
        )


def _at_once(weights, us, deltas, alphas, layouts, rounding, seed, backend) -> bool:
    """Contiguous float32 factors of weights of one dtype, by the CPU's kernel and past PyTorch's dispatcher.

    False, and nothing is written, where anything has to be looked at more closely.
    """
    if not (0 < len(weights) == len(us) == len(deltas) == len(alphas) == len(layouts or weights)):
        return False
    if not (rounding in ROUNDINGS and isinstance(seed, int) and 0 <= seed < 2**63 - len(weights)):
        return False
    if not direct("rank1_update_", backend, *weights, *us, *deltas):
        return False
    dtype, stochastic, given = weights[0].dtype, rounding == "stochastic", []
    for i, (weight, u, delta, alpha) in enumerate(zip(weights, us, deltas, alphas, strict=True)):
        in_out = layouts is not None and layouts[i] == "in_out"
        left, right = (u, delta) if in_out else (delta, u)
        if not (
            weight.dtype == dtype
            and u.dtype == delta.dtype == torch.float32
            and weight.is_contiguous() and u.is_contiguous() and delta.is_contiguous()
            and u.dim() == delta.dim() == 2
            and weight.shape == (left.shape[1], right.shape[1])
            and 0 < len(u) == len(delta)
            and weight.numel()
            and type(alpha) is float and math.isfinite(alpha)
            and (in_out or layouts is None or layouts[i] == "out_in")
            and not weight.is_inference()
            and _kernel_serves(weight, u, stochastic)
        ):  # fmt: skip
            return False
        (rows, cols), terms, at = weight.shape, len(u), weight.data_ptr()
        given.append(
            (at, at, left.data_ptr(), right.data_ptr(), cols, cols, rows, 1, cols, rows, cols, terms, alpha, seed + i)
        )
    if not _cpu.outer_update(given, kind_of(dtype), stochastic, True, True, torch.get_num_threads()):
        return False
    torch.autograd.graph.increment_version(weights)
    return True


def check_finite(
    us: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    alphas: Sequence[float | torch.Tensor] = (),
    names: Sequence[str] | None = None,
) -> None:
    """ValueError that names the updates whose factors or alpha hold NaN or infinity.

    One synchronisation per device for all of them; a hot path that knows its factors needs none.
    """
    given = [(i, value) for values in (us, deltas, alphas) for i, value in enumerate(values)]
    tensors = [(i, value) for i, value in given if isinstance(value, torch.Tensor)]
    bad = {i for i, value in given if not isinstance(value, torch.Tensor) and not math.isfinite(value)}
    bad |= {tensors[at][0] for at in _common.non_finite([value for _, value in tensors])}
    if bad:
        which = ", ".join(names[i] if names else f"matrix {i}" for i in sorted(bad))
        raise ValueError(f"The update of {which} holds NaN or infinity; nothing was written.")


def _choose(weight: torch.Tensor, rounding: str, backend: str | None) -> str:
    name = backends.choose("rank1_update_", weight.device, backend, (weight.dtype,))
    if name in ("aten", "reference") or not (rounding == "stochastic" and _column_major(weight)):
        return name
    if weight.dtype not in _SIXTEEN:
        return name
    # the kernels count rows along memory, and would draw for the transposed element
    if (backend or backends.ambient("rank1_update_")) == "auto":
        return "aten"
    raise RuntimeError(
        f"rank1_update_: backend {name!r} can't round a column-major {weight.dtype} weight stochastically; use "
        "backend='aten', or weight.contiguous()."
    )


def _column_major(weight: torch.Tensor) -> bool:
    return weight.stride(1) != 1 and weight.shape[1] > 1


def _check(op, weight, u, delta, alpha, layout) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout is {layout!r}; choose 'out_in' (nn.Linear) or 'in_out' (Conv1D).")
    for name, value in (("weight", weight), ("u", u), ("delta", delta)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}.")
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} is {value.layout}; only dense tensors can be updated, attach the edit.")
    if weight.dtype not in _SERVED:
        raise TypeError(
            f"{op}: the weight is {weight.dtype}; float32, bfloat16 and float16 can be written in place. Attach the "
            "edit to a quantised model instead."
        )
    for name, value in (("u", u), ("delta", delta)):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} is {value.dtype}; factors are floating-point.")
    if weight.dim() != 2 or u.dim() != 2 or delta.dim() != 2:
        raise ValueError(
            f"{op}: weight, u [T, m] and delta [T, n] must be matrices; got {tuple(weight.shape)}, {tuple(u.shape)} "
            f"and {tuple(delta.shape)}."
        )
    if u.shape[0] != delta.shape[0]:
        raise ValueError(f"{op}: u has {u.shape[0]} terms and delta {delta.shape[0]}; they need the same number.")
    expected = (delta.shape[1], u.shape[1]) if layout == "out_in" else (u.shape[1], delta.shape[1])
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"{op}: with u {tuple(u.shape)}, delta {tuple(delta.shape)} and layout {layout!r} the weight must be "
            f"{expected}; it is {tuple(weight.shape)}."
        )
    _common.same_device(op, weight=weight, u=u, delta=delta)
    if isinstance(alpha, torch.Tensor):
        if alpha.numel() != 1:
            raise ValueError(f"{op}: alpha has {alpha.numel()} elements; pass one number for each matrix.")
        if alpha.device != weight.device and alpha.device.type != "cpu":
            raise ValueError(f"{op}: alpha is on {alpha.device} and the weight on {weight.device}.")
    elif not isinstance(alpha, (int, float)):
        raise TypeError(f"{op}: alpha must be a number or a tensor with one; got {type(alpha).__name__}.")


class _Span(NamedTuple):
    """The memory that a tensor reaches, in bytes; within it, rows ``stride`` apart and ``width`` wide."""

    name: str
    device: torch.device
    start: int
    end: int
    stride: int
    width: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Span:
        inner, outer = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        bytes_, start = tensor.element_size(), tensor.data_ptr()
        width = ((inner[1] - 1) * inner[0] + 1) * bytes_
        stride = outer[0] * bytes_
        return cls(name, tensor.device, start, start + (outer[1] - 1) * stride + width, stride, width)

    def meets(self, other: _Span) -> bool:
        if self.device != other.device or self.start >= other.end or other.start >= self.end:
            return False
        # two column windows of one buffer are apart though their ranges cross
        offset = (other.start - self.start) % self.stride if self.stride else 0
        apart = self.width <= offset and offset + other.width <= self.stride
        return not (self.stride == other.stride and apart)


def _check_memory(weights, us, deltas) -> None:
    """A weight that overlaps itself, a factor or another weight would be read after it was written."""
    spans = []
    for i, weight in enumerate(weights):
        if weight.numel() == 0:
            continue
        sides = sorted((stride, size) for stride, size in zip(weight.stride(), weight.shape, strict=True) if size > 1)
        if sides and (sides[0][0] < 1 or len(sides) == 2 and sides[1][0] < sides[0][0] * sides[0][1]):
            raise ValueError(
                f"rank1_update_: weight {i} has strides {weight.stride()} for shape {tuple(weight.shape)}, so that "
                "several of its elements are one place in memory; update a copy (weight.clone())."
            )
        if len(sides) == 2 and sides[0][0] != 1:
            raise ValueError(
                f"rank1_update_: weight {i} has strides {weight.stride()}; one of its dimensions must be contiguous "
                "(stride 1). Update weight.contiguous() and copy it back."
            )
        span = _Span.of(f"weight {i}", weight)
        for other in spans:
            if span.meets(other):
                raise ValueError(
                    f"rank1_update_: {other.name} and {span.name} share memory (tied weights?); give each matrix "
                    "once, with the terms of both."
                )
        spans.append(span)
    for name, factors in (("u", us), ("delta", deltas)):
        for i, factor in enumerate(factors):
            span = _Span.of(f"{name} {i}", factor) if factor.numel() else None
            for other in spans if span else ():
                if span.meets(other):
                    raise ValueError(
                        f"rank1_update_: {span.name} shares memory with {other.name}; pass {name}.clone()."
                    )


def _prepare(weight, u, delta, alpha, in_out, seed, turn: bool) -> _Matrix:
    left, right = (u, delta) if in_out else (delta, u)
    if turn and _column_major(weight):  # a transposed view: the same memory, the other layout
        weight, left, right = weight.T, right, left
    if left.dtype != right.dtype or left.dtype not in (torch.float32, weight.dtype):
        kind = torch.promote_types(weight.dtype, torch.float32)
        left, right = left.to(kind), right.to(kind)
    left = left if left.stride(1) == 1 else left.contiguous()
    right = right if right.stride(1) == 1 else right.contiguous()
    return _Matrix(weight, left, right, alpha, seed)


def _impl(weights, us, deltas, alphas, in_out, seeds, stochastic, backend) -> None:
    _check_memory(weights, us, deltas)
    arguments = weights, us, deltas, alphas, in_out, seeds, stochastic, backend
    if backend == "cpu" and _kernel_checks(weights, us, alphas, stochastic):
        if not _write_group(*arguments, check=True):
            check_finite(us, deltas, alphas)  # says of which
        return
    if any(_common.checks_values(weight) for weight in weights):
        check_finite(us, deltas, alphas)
    elif not all(map(math.isfinite, alphas)):
        check_finite((), (), alphas)
    _write_group(*arguments)


def unchecked_group_(weights, us, deltas, alphas, in_out, seeds, stochastic, backend) -> None:
    """What :func:`rank1_update_group_` does once all is found to be right: for arguments that it has taken before."""
    _write_group(weights, us, deltas, alphas, in_out, seeds, stochastic, backend)


def _write_group(weights, us, deltas, alphas, in_out, seeds, stochastic, backend, check: bool = False) -> bool:
    """``check``: False, and nothing is written, where a factor is NaN or infinite; by the CPU's kernel alone."""
    everything = zip(weights, us, deltas, alphas, in_out, seeds, strict=True)
    arguments = [a for a in everything if a[0].numel() and a[1].shape[0]]
    if not arguments:
        return True
    written = [a[0] for a in arguments if not a[0].is_inference()]
    versions = [weight._version for weight in written]
    if backend == "reference":
        for weight, u, delta, alpha, conv1d, seed in arguments:
            reference.rank1_update_(
                weight, u, delta, alpha, layout=LAYOUTS[conv1d], rounding=ROUNDINGS[stochastic], seed=seed
            )
    elif backend == "cpu":
        mine = [a for a in arguments if _kernel_serves(a[0], a[1], stochastic)]
        if mine and not _by_kernel([_prepare(*a, True) for a in mine], stochastic, check):
            return False
        others = [a for a in arguments if not _kernel_serves(a[0], a[1], stochastic)]
        _aten([_prepare(*a, not stochastic) for a in others], stochastic)
    else:
        # stochastic rounding draws by row and column: those of the weight as it was handed in
        turn = not (backend == "aten" and stochastic)
        _BACKENDS[backend]([_prepare(*a, turn) for a in arguments], stochastic)
    # Autograd and the ledger of edits must learn of a write that PyTorch didn't make.
    unseen = [w for w, version in zip(written, versions, strict=True) if w._version == version]
    if unseen:
        torch.autograd.graph.increment_version(unseen)
    return True


def _groups(matrices: Sequence[_Matrix]) -> Iterator[tuple[torch.device, torch.dtype, torch.dtype, list[_Matrix]]]:
    """The matrices by device, dtype and the factors' dtype."""
    groups: dict[tuple, list[_Matrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.weight.device, matrix.weight.dtype, matrix.left.dtype), []).append(matrix)
    for key, group in groups.items():
        yield *key, group


def _kernel_serves(weight, u, stochastic: bool) -> bool:
    """Whether the CPU's kernel takes the matrix, and is the faster way."""
    if weight.dtype == torch.bfloat16 and stochastic:
        return True
    return len(u) <= MOST_TERMS.get(weight.dtype, 0) and not (stochastic and weight.dtype == torch.float16)


def _kernel_checks(weights, us, alphas, stochastic: bool) -> bool:
    """Whether one call of the CPU's kernel takes all, and so can look at the factors before it writes."""
    one_kind = len({weight.dtype for weight in weights}) == 1 and all(map(math.isfinite, alphas))
    return one_kind and all(w.numel() and _kernel_serves(w, u, stochastic) for w, u in zip(weights, us, strict=True))


def _by_kernel(matrices: Sequence[_Matrix], stochastic: bool, check: bool) -> bool:
    factors = [(m.left.float(), m.right.float()) for m in matrices]
    for dtype in dict.fromkeys(m.weight.dtype for m in matrices):
        given = []
        for m, (left, right) in zip(matrices, factors, strict=True):
            if m.weight.dtype == dtype:
                at, stride = m.weight.data_ptr(), row_stride(m.weight)
                pointers = at, at, left.data_ptr(), right.data_ptr()
                strides = stride, stride, row_stride(left), 1, row_stride(right)
                given.append((*pointers, *strides, *m.weight.shape, len(left), m.alpha, m.seed))
        if not _cpu.outer_update(given, kind_of(dtype), stochastic, False, check, torch.get_num_threads()):
            return False
    return True


def _cuda(matrices: Sequence[_Matrix], stochastic: bool) -> None:
    from .. import _C

    many = [m.weight.dtype == torch.float32 and len(m.left) > KERNEL_TERMS for m in matrices]
    _aten([m for m, by_library in zip(matrices, many, strict=True) if by_library], stochastic)
    few = [m for m, by_library in zip(matrices, many, strict=True) if not by_library]
    for device, dtype, factor_dtype, group in _groups(few):
        _C.rank1_update_group(
            [
                (
                    *(t.data_ptr() for t in m[:3]),
                    *(row_stride(t) for t in m[:3]),
                    *m.weight.shape,
                    m.left.shape[0],
                    m.alpha,
                    m.seed,
                )
                for m in group
            ],
            weight_dtype=kind_of(dtype),
            factor_dtype=kind_of(factor_dtype),
            stochastic=stochastic,
            device=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


def _triton(matrices: Sequence[_Matrix], stochastic: bool) -> None:
    from ..kernels import rank1_update as kernel

    for m in matrices:
        kernel.rank1_update_(m.weight, m.left, m.right, m.alpha, stochastic=stochastic, seed=m.seed)


def _aten(matrices: Sequence[_Matrix], stochastic: bool) -> None:
    for m in matrices:
        with _common.full_precision(m.weight.device):
            if m.weight.dtype in _SIXTEEN:
                _aten_chunks(m, stochastic)
            else:
                m.weight.addmm_(m.left.to(m.weight.dtype).T, m.right.to(m.weight.dtype), alpha=-m.alpha)


def _aten_chunks(m: _Matrix, stochastic: bool) -> None:
    """A 16-bit weight, so many rows at a time that their float32 copy takes CHUNK_BYTES."""
    rows, cols = m.weight.shape
    left, right = m.left.float(), m.right.float()
    step = max(1, CHUNK_BYTES // (4 * cols))
    for start in range(0, rows, step):
        part = m.weight[start : start + step]
        exact = part.float().addmm_(left[:, start : start + step].T, right, alpha=-m.alpha)
        if stochastic:
            draw = draws(m.seed, *part.shape, first_row=start, device=part.device)
            exact = round_stochastic(exact, part.dtype, draw)
        part.copy_(exact)


@functools.cache
def extension_problem() -> str | None:
    """Why the CUDA extension can't run anywhere on this machine, or None."""
    try:
        from .. import _C
    except ImportError as error:
        from ..build_info import build_info

        return str(build_info()["reason"] or f"the CUDA extension can't be loaded ({error}); install mendfast again")
    return _C.device_problem() or None


backends.MISSING["cuda"] = lambda: extension_problem()
_BACKENDS = {"cuda": _cuda, "triton": _triton, "aten": _aten}
_common.define(
    "rank1_update_group_(Tensor(a!)[] weights, Tensor[] us, Tensor[] deltas, float[] alphas, bool[] in_out, "
    "int[] seeds, bool stochastic, str backend) -> ()",
    _impl,
    lambda weights, us, deltas, alphas, in_out, seeds, stochastic, backend: None,
)
