"""Many edits of one weight as one: least squares under a metric of what must stay.

Numbers in brackets are the equations of docs/ops/least_squares.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.least_squares import least_squares as _reference
from ..types import Spectrum
from . import _common

_BLOCKS, _BLOCKS_FROM = 4, 512


def least_squares(
    u: torch.Tensor,  # [T, m], or [G, T, m]
    d: torch.Tensor,  # [T, n], or [G, T, n]
    spectrum: Spectrum,
    lam: torch.Tensor | float,
    mu: torch.Tensor | float,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (keys [.., T, m], delta [.., T, n]) of argmin_S sum_i |S u_i - d_i|^2 + tr(S M S^T) = -delta^T keys.

    With M = lam tr(C) I + mu C (1), keys = (U M^-1 U^T + I)^-1 U M^-1 = U (M + U^T U)^-1 (4, 5), whichever form takes
    fewer operations, and delta = -D: an Edit's factors at alpha 1. Each group is solved by itself, and rows of
    zeros change nothing. Differentiable in d, lam and mu, once; u and the spectrum are constants.

    Products and solves are float64 (the condition numbers are those of section 4), the factors float32 (float64 for
    float64 rows).

    Args:
        u: the raw inputs of the edits' rows; d: what each row's own edit wants added to its output.
        spectrum: C, the second moment of the layer's inputs on protected text.
        lam, mu: positive numbers, or tensors of one element.

    Raises:
        ValueError: shapes that don't fit, lam or mu not above 0, a C of zero, keys with NaN or infinity (values on
            a GPU are looked at in ``with checking():``); TypeError for dtypes.
    """
    _check(u, d, spectrum, lam, mu)
    chosen = backends.choose("least_squares", u.device, backend)
    if chosen == "reference":
        _check_keys(u)
        return _reference(u, d, spectrum, lam, mu)
    delta = -d.to(torch.promote_types(d.dtype, torch.float32))
    scales, rest = scales_of(spectrum, lam, mu)
    groups = u.detach().unsqueeze(0) if u.dim() == 2 else u.detach()
    by_rows = fewer_by_rows(*groups.shape, spectrum.vectors.shape[1])
    keys = _Keys.apply(groups, spectrum.vectors, scales, rest, by_rows)
    return keys.squeeze(0) if u.dim() == 2 else keys, delta


def wanted_changes(
    u: torch.Tensor,  # [..., m]
    new_u: torch.Tensor,  # [..., m]
    new_delta: torch.Tensor,  # [..., n]
    alpha: torch.Tensor | float,
) -> torch.Tensor:
    """d = -alpha (u . new_u) new_delta (2): what a row's own edit adds to the layer's output at its own input u."""
    return -alpha * (u.to(new_u.dtype) * new_u).sum(-1, keepdim=True) * new_delta


def scales_of(
    spectrum: Spectrum, lam: torch.Tensor | float, mu: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """M's eigenvalues (1): lam tr(C) + mu values, [k], and that of all other directions, []; float64."""
    lam, mu = (value.reshape(()).double() if isinstance(value, torch.Tensor) else value for value in (lam, mu))
    floor = lam * spectrum.trace().double()
    return floor + mu * spectrum.values.double(), floor + mu * spectrum.rest.double()


def fewer_by_rows(groups: int, rows: int, m: int, k: int) -> bool:
    """Whether the T x T form (4) takes fewer operations than the m x m form (5), which makes M once for all groups."""
    gram = rows * rows * (k if k == m else k + m)
    by_rows = groups * (4 * rows * m * k + 2 * gram + rows**3 // 3 + 2 * rows * rows * m)
    by_columns = 2 * m * m * k + groups * (2 * rows * m * m + m**3 // 3 + 2 * rows * m * m)
    return by_rows <= by_columns


def sums_serve(rows: int, m: int, n: int) -> bool:
    """Whether a caller who adds rows to those that are there should keep their sums (6): each time that costs the
    factor of M + U^T U and n solves with it, the rows' share being done, and by columns is not far from by rows."""
    return rows > min(m, max(n, m // 2))


def change_by_rows(rows: int, m: int, n: int, k: int, kept: bool) -> bool:
    """Whether S itself, [n, m], takes fewer operations from B (4) than from M + U^T U (6), with C kept or made."""
    sides = k if k == m else k + m
    gram = 5 * rows * rows * sides // 4
    by_rows = 2 * rows * m * (k if k == m else 2 * k) + gram + rows**3 // 3 + 2 * rows * n * (rows + sides)
    by_rows += 2 * n * m * k
    by_columns = (0 if kept else 5 * m * m * k // 4) + 5 * rows * m * m // 4 + m**3 // 3 + 2 * m * n * (rows + m)
    return by_rows <= by_columns


@torch.no_grad()
def least_squares_change(
    u: torch.Tensor,  # [T, m]
    d: torch.Tensor,  # [T, n]
    spectrum: Spectrum,
    lam: torch.Tensor | float,
    mu: torch.Tensor | float,
    *,
    dense: Callable[[], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The change of :func:`least_squares` for use and not for training: no graph, and at most n rows.

    More rows than outputs come back as the change itself, keys = S [n, m] and delta = -I: D enters before the way back
    from the eigenbasis, which then is of n rows and not of T, and so is everything that uses the factors.

    Args:
        dense: gives C, [m, m] float64, of which the lower triangle is right; for a caller who keeps it. Called only
            where it serves, which is where the rows are not much fewer than the inputs.

    Raises:
        ValueError, TypeError: as :func:`least_squares`.
    """
    if u.dim() != 2 or len(u) <= d.shape[-1]:
        return least_squares(u, d, spectrum, lam, mu)
    _check(u, d, spectrum, lam, mu)
    _check_keys(u)
    (rows, m), n, k = u.shape, d.shape[1], spectrum.vectors.shape[1]
    dtypes = [torch.promote_types(side.dtype, torch.float32) for side in (u, d)]
    with _common.full_precision(u.device):
        u, d = u.double(), d.double()
        scales, rest = scales_of(spectrum, lam, mu)
        if change_by_rows(rows, m, n, k, dense is not None):
            q = spectrum.vectors.double()
            _, scaled, outside, factor = _gram_by_rows(u, q, scales, rest)
            x = torch.cholesky_solve(d, factor).mT
            keys = (x @ scaled) @ q.T
            if outside is not None:
                keys += x @ outside / rest
        else:
            c = None if dense is None else dense()
            h = add_lower(metric_matrix(spectrum, lam, mu, c), u.T, u.T)
            keys = solve_normal(h, u.T @ d).T
    return keys.to(dtypes[0]).contiguous(), -torch.eye(n, dtype=dtypes[1], device=u.device)


@torch.no_grad()
def least_squares_statistics(
    gram: torch.Tensor,  # [m, m]: U^T U
    cross: torch.Tensor,  # [m, n]: U^T D
    spectrum: Spectrum,
    lam: torch.Tensor | float,
    mu: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same change from sums over the rows (6), for more rows than m: keys = I [m, m], delta [m, n], float32.

    The two sums are all that the solution knows of the rows, so that its cost and its factors do not grow with them.
    Keep the sums in float64: what float32 rounds away of U^T U may be larger than M.
    """
    m = spectrum.vectors.shape[0]
    if gram.shape != (m, m) or cross.dim() != 2 or len(cross) != m:
        raise ValueError(
            f"least_squares_statistics: gram must be [{m}, {m}] and cross [{m}, n]; got {tuple(gram.shape)} and "
            f"{tuple(cross.shape)}."
        )
    _check_metric(spectrum, lam, mu)
    if not (_common.all_finite(gram) and _common.all_finite(cross)):
        raise ValueError("least_squares_statistics: the sums hold NaN or infinity; check the rows that they are of.")
    h = metric_matrix(spectrum, lam, mu).add_(gram)
    return torch.eye(m, device=gram.device), -solve_normal(h, cross).float()


@torch.no_grad()
def metric_matrix(
    spectrum: Spectrum, lam: torch.Tensor | float, mu: torch.Tensor | float, c: torch.Tensor | None = None
) -> torch.Tensor:
    """M (1), of which the lower triangle is right: [m, m] float64. With C in the same form it takes O(m^2)."""
    if c is None:
        return _metric_matrix(spectrum.vectors, *scales_of(spectrum, lam, mu))
    lam, mu = (value.reshape(()).double() if isinstance(value, torch.Tensor) else value for value in (lam, mu))
    matrix = mu * c
    matrix.diagonal().add_(lam * spectrum.trace().double())
    return matrix


@torch.no_grad()
def second_moment_matrix(spectrum: Spectrum) -> torch.Tensor:
    """C, of which the lower triangle is right: [m, m] float64."""
    return _metric_matrix(spectrum.vectors, spectrum.values.double(), spectrum.rest.double())


def solve_normal(h: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """S^T (6) = (M + U^T U)^-1 U^T D [m, n] float64, of the first matrix its lower triangle and the second whole."""
    return torch.cholesky_solve(cross.double(), _factor(h))


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, vectors, scales, rest, by_rows):
        keys, *saved = torch.ops.mendfast.least_squares_fwd(u, vectors, scales, rest, by_rows)
        ctx.by_rows = by_rows
        ctx.save_for_backward(u, vectors, scales, rest, *saved)
        return keys

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = torch.ops.mendfast.least_squares_bwd(grad, *ctx.saved_tensors, ctx.by_rows)
        return None, None, *grads, None


def _check(u, d, spectrum, lam, mu) -> None:
    shapes = f"u {tuple(u.shape)}, d {tuple(d.shape)}"
    if u.dim() not in (2, 3) or d.dim() != u.dim() or u.shape[:-1] != d.shape[:-1]:
        raise ValueError(f"least_squares: u and d must be [T, m], [T, n] or [G, T, m], [G, T, n]; got {shapes}.")
    m, k = spectrum.vectors.shape
    if u.shape[-1] != m or spectrum.values.shape != (k,):
        raise ValueError(
            f"least_squares: the metric is of {m} inputs (vectors {(m, k)}, values {tuple(spectrum.values.shape)}) and "
            f"the keys have {u.shape[-1]}; pass the metric of this layer."
        )
    for name, value in (("u", u), ("d", d)):
        if value.dtype not in _common.ROW_DTYPES:
            raise TypeError(f"least_squares: {name} is {value.dtype}; use float32, bfloat16 or float16.")
    _common.same_device("least_squares", u=u, d=d, vectors=spectrum.vectors, values=spectrum.values)
    _check_metric(spectrum, lam, mu)


def _check_metric(spectrum, lam, mu) -> None:
    for name, value in (("lam", lam), ("mu", mu)):
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(f"least_squares: {name} must be one number; got shape {tuple(value.shape)}.")
            if torch.compiler.is_compiling() or not _common.checks_values(value):
                continue
            value = value.detach()
        if not 0 < float(value) < float("inf"):
            raise ValueError(
                f"least_squares: {name} is {float(value)}; it must be a number above 0. Without protected text "
                "pass a spectrum that is a multiple of the identity."
            )
    if torch.compiler.is_compiling() or not _common.checks_values(spectrum.values):
        return
    if not 0 < float(spectrum.trace()) < float("inf"):
        raise ValueError(
            f"least_squares: the trace of the metric's second moment is {float(spectrum.trace())}; it must be above 0. "
            "Gather it over protected text that reaches this layer."
        )


def _check_keys(u) -> None:
    if _common.checks_values(u) and not bool(_common.all_finite(u)):
        raise ValueError(
            "least_squares: the keys hold NaN or infinity: the model's activations on these edits are not finite. "
            "Check the model, or load it in float32 or bfloat16."
        )


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    """Its lower Cholesky factor. B >= I and H >= M, so that only numbers that are not finite have none."""
    if _common.checks_values(matrix):
        try:
            return torch.linalg.cholesky(matrix)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                "least_squares: the matrix of these rows is singular in float64: some are more than 10^7 times as "
                f"large as what the metric is of. Leave such edits out, or raise lambda. ({error})"
            ) from error
    return torch.linalg.cholesky_ex(matrix)[0]  # does not wait for the GPU


def add_lower(
    matrix: torch.Tensor,  # [.., T, T]
    a: torch.Tensor,  # [.., T, k]
    b: torch.Tensor,  # [.., T, k]
    alpha: float = 1.0,
) -> torch.Tensor:
    """matrix += alpha a b^T, for a symmetric product of which a Cholesky factor needs the lower triangle: in place.

    PyTorch has no syrk; by blocks of rows, each up to the diagonal, a large product takes 5/8 of the operations.
    """
    size = a.shape[-2]
    steps = _BLOCKS if size >= _BLOCKS_FROM else 1
    for i in range(steps):
        start, end = i * size // steps, (i + 1) * size // steps
        target = matrix[..., start:end, :end]
        torch.add(target, a[..., start:end, :] @ b[..., :end, :].mT, alpha=alpha, out=target)
    return matrix


def _metric_matrix(vectors, scales, rest) -> torch.Tensor:
    """M = Q diag(scales - rest) Q^T + rest I, [m, m] float64: its lower triangle."""
    q = vectors.double()
    full = q.shape[0] == q.shape[1]
    matrix = add_lower(q.new_zeros(q.shape[0], q.shape[0]), q * (scales if full else scales - rest), q)
    if not full:
        matrix.diagonal().add_(rest)
    return matrix


def _fwd(u, vectors, scales, rest, by_rows):
    _check_keys(u)
    with _common.full_precision(u.device):
        out = _by_rows(u.double(), vectors, scales, rest) if by_rows else _by_columns(u.double(), vectors, scales, rest)
    keys, *kept = out
    dtype = torch.promote_types(u.dtype, torch.float32)
    keys = keys.to(dtype, copy=True, memory_format=torch.contiguous_format)  # a copy: none of the outputs is another
    return keys, *(part.contiguous() for part in kept)


def _gram_by_rows(u, q, scales, rest):
    """P = U Q, P diag(1/s), what of U lies outside Q (None: nothing), and the Cholesky factor of B (4, 7)."""
    p = u @ q
    scaled = p / scales
    b = add_lower(p.new_zeros(*p.shape[:-1], p.shape[-2]), scaled, p)
    outside = None
    if q.shape[0] > q.shape[1]:  # what lies outside the leading directions, by one number
        outside = u - p @ q.T
        add_lower(b, outside / rest, outside)
    b.diagonal(dim1=-2, dim2=-1).add_(1)
    return p, scaled, outside, _factor(b)


def _by_rows(u, vectors, scales, rest):
    """(4), in the eigenbasis: P = U Q, B = I + P diag(1/s) P^T, K Q = B^-1 P diag(1/s)."""
    q = vectors.double()
    p, scaled, outside, factor = _gram_by_rows(u, q, scales, rest)
    solved = torch.cholesky_solve(scaled, factor)
    if outside is None:
        return solved @ q.T, p, solved, u.new_empty(0)
    whole = torch.cholesky_solve(outside / rest, factor) + solved @ q.T
    return whole, p, solved, whole


def _by_columns(u, vectors, scales, rest):
    """(5): H = M + U^T U, K = U H^-1."""
    h = _metric_matrix(vectors, scales, rest).expand(len(u), -1, -1).clone()
    factor = _factor(add_lower(h, u.mT, u.mT))
    keys = torch.cholesky_solve(u.mT, factor).mT.contiguous()
    return keys, factor.mT, keys.new_empty(0), keys  # LAPACK's factor lies by columns: transposed, it is contiguous


def _bwd(grad, u, vectors, scales, rest, p, solved, whole, by_rows):
    """The gradients of M's eigenvalues (8, 9), summed over the groups: [k] and []."""
    with _common.full_precision(grad.device):
        q, grad, full = vectors.double(), grad.double(), vectors.shape[0] == vectors.shape[1]
        if not by_rows:  # (10): N = R^T K, R = F H^-1 by two solves with the factor of the forward pass
            r = torch.cholesky_solve(grad.mT, p, upper=True).mT
            n = r.flatten(0, 1).T @ whole.flatten(0, 1)
            leading = ((n @ q) * q).sum(0)
            return -leading, torch.zeros_like(rest) if full else leading.sum() - n.trace()
        f = grad @ q
        a = (f / scales) @ p.mT
        if not full:  # what lies outside the leading directions of each; differences of products would cancel
            grad_out, u_out, k_out = grad - f @ q.T, u.double() - p @ q.T, whole - solved @ q.T
            a += grad_out @ u_out.mT / rest
        r = f / scales - a @ solved
        leading = -(r * solved).sum((0, 1))
        if full:
            return leading, torch.zeros_like(rest)
        return leading, (a * (k_out @ k_out.mT)).sum() - (grad_out * k_out).sum() / rest


def _fwd_fake(u, vectors, scales, rest, by_rows):
    groups, rows, m = u.shape
    k = vectors.shape[1]
    keys = u.new_empty(u.shape, dtype=torch.promote_types(u.dtype, torch.float32))
    if not by_rows:
        shapes = (groups, m, m), (0,), u.shape
    else:
        shapes = (groups, rows, k), (groups, rows, k), (0,) if k == m else u.shape
    return keys, *(u.new_empty(shape, dtype=torch.float64) for shape in shapes)


def _bwd_fake(grad, u, vectors, scales, rest, p, solved, whole, by_rows):
    return torch.empty_like(scales), torch.empty_like(rest)


_common.define(
    "least_squares_fwd(Tensor u, Tensor vectors, Tensor scales, Tensor rest, bool by_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_common.define(
    "least_squares_bwd(Tensor grad, Tensor u, Tensor vectors, Tensor scales, Tensor rest, Tensor p, Tensor solved, "
    "Tensor whole, bool by_rows) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
