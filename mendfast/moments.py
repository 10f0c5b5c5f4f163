"""Second moments of layers' inputs, and their leading eigenvectors."""

from __future__ import annotations

import torch

from .ops import all_finite
from .ops.least_squares import second_moment_matrix
from .types import Spectrum

OVERSAMPLE, ITERATIONS = 16, 12
"""Of the subspace iteration that finds the leading eigenvectors of a wide matrix."""
BLOCK = 1024


class SecondMoment:
    """C = E[x x^T] of one layer's inputs, [m, m], gathered by chunks.

    The sum is float32, each chunk's Gram matrix added in place: its rounding, 6e-8 of C's largest eigenvalue or a
    little more, lies far below lambda tr(C). Count and trace are exact; the eigenvalues are found in float64.

    Args:
        m: how wide the inputs are.
        rank: keep in files, and in :meth:`spectrum`, only so many leading eigenvectors, and one number for the rest;
            None: all of them.
    """

    def __init__(self, m: int, rank: int | None = None, device: torch.device | str = "cpu"):
        if rank is not None and not 0 < rank:
            raise ValueError(f"protect_rank is {rank}; it must be at least 1, or None to keep every direction.")
        self.m, self.rank = m, None if rank is None or rank >= m else rank
        self.count: float = 0  # of rows, some of them weighed
        self._trace = 0.0  # of the sum
        self._sum: torch.Tensor | None = torch.zeros(m, m, device=device)
        self._spectrum: Spectrum | None = None
        self._dense: torch.Tensor | None = None
        self._error = 0.0

    def __repr__(self) -> str:
        return f"SecondMoment(m={self.m}, rows={self.count:,.0f}, rank={self.rank})"

    @property
    def device(self) -> torch.device:
        return (self._spectrum.vectors if self._sum is None else self._sum).device

    def to(self, device: torch.device | str) -> SecondMoment:
        """Move to ``device``, in place."""
        self._sum = None if self._sum is None else self._sum.to(device)
        self._spectrum = None if self._spectrum is None else self._spectrum.to(device)
        self._dense = None if self._dense is None else self._dense.to(device)
        return self

    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Count the rows [N, m] in. A ValueError for rows of another width, or with NaN or infinity."""
        if rows.dim() != 2 or rows.shape[1] != self.m:
            raise ValueError(f"The rows have the shape {tuple(rows.shape)}; this second moment takes [N, {self.m}].")
        if not len(rows):
            return
        rows = rows.to(self.device, torch.float32)
        if not all_finite(rows):
            raise ValueError(
                "The inputs of a layer hold NaN or infinity on the text to be protected. Check the model, or load it "
                "in float32 or bfloat16."
            )
        trace = self._trace + float(rows.double().square_().sum())
        if trace > torch.finfo(torch.float32).max:
            raise ValueError(f"The inputs of a layer are so large that their squares add up to {trace:.1e}.")
        self._whole().addmm_(rows.T, rows)
        self._trace, self.count = trace, self.count + len(rows)
        self._spectrum = self._dense = None

    @torch.no_grad()
    def merge(self, other: SecondMoment, weight: float = 1) -> None:
        """Count in what ``other`` has seen, each row ``weight`` times; of low rank, what it has kept of it."""
        if other.m != self.m:
            raise ValueError(f"Second moments of {self.m} and {other.m} inputs belong to different layers.")
        if not other.count:
            return
        self._whole().add_(other._whole().to(self.device), alpha=weight)
        self._trace += weight * other._trace
        self.count += weight * other.count
        self._spectrum = self._dense = None

    def matrix(self) -> torch.Tensor:
        """C, [m, m] float32; of a second moment of low rank that was read from a file, what the file keeps of it."""
        self._check()
        return self._whole() / self.count

    def trace(self) -> float:
        """tr(C) = E |x|^2."""
        self._check()
        return self._trace / self.count

    def spectrum(self) -> Spectrum:
        """C's eigenvalues and vectors, or the ``rank`` leading ones and the mean of the rest; computed once.

        Vectors and values are numbers of float32, held in float64: a file keeps all of their bits.
        """
        self._check()
        if self._spectrum is None:
            values, vectors, rest, self._error = _leading(self.matrix(), self.rank, self.trace())
            self._spectrum = Spectrum(values.float().double(), vectors.float().double(), rest.float().double())
        return self._spectrum

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """C as :meth:`spectrum` has it, [m, m] float64, of which the lower triangle is right.

        Kept unless it is of low rank, which makes it cheap: from all m vectors it takes as long as the factorisation of
        a matrix of its size several times over.
        """
        if self._dense is not None:
            return self._dense
        found = second_moment_matrix(self.spectrum())
        if self.rank is None:
            self._dense = found
        return found

    def error(self) -> float:
        """What low rank leaves out: |C - C_kept| / |C|, Frobenius norms."""
        self.spectrum()
        return self._error

    def mean_square(self, factor: torch.Tensor) -> float:
        """E |F x|^2 = tr(F C F^T) for F [n, m], in O(n m k)."""
        return float(self._gram_of(factor, diagonal=True).sum())

    def disturbance(self, u: torch.Tensor, delta: torch.Tensor, alpha: float) -> float:
        """E |S x|^2 for S = -alpha delta^T u of an Edit's factors u [T, m], delta [T, n]; S is not made."""
        if len(u) > delta.shape[1]:  # more rows than outputs: S is the smaller
            return self.mean_square(alpha * (delta.double().T @ u.double()))
        delta = delta.to(self.device, torch.float64)
        return float(alpha**2 * (self._gram_of(u) * (delta @ delta.T)).sum())

    def _gram_of(self, rows: torch.Tensor, diagonal: bool = False) -> torch.Tensor:
        """rows C rows^T, [T, T], or its diagonal."""
        spectrum = self.spectrum()
        rows = rows.detach().to(self.device, torch.float64)
        p = rows @ spectrum.vectors
        full = p.shape[1] == self.m
        if diagonal:
            inside = (p.square() * spectrum.values).sum(1)
            return inside if full else inside + spectrum.rest * (rows.square().sum(1) - p.square().sum(1)).clamp(min=0)
        inside = (p * spectrum.values) @ p.T
        return inside if full else inside + spectrum.rest * (rows @ rows.T - p @ p.T)

    def _whole(self) -> torch.Tensor:
        """The sum; made again from its spectrum where a file kept no more."""
        if self._sum is None:
            values, q, rest = self._spectrum
            matrix = (q * (values if q.shape[1] == self.m else values - rest)) @ q.T
            if q.shape[1] < self.m:
                matrix.diagonal().add_(rest)
            self._sum = (matrix * self.count).float()
        return self._sum

    def _check(self) -> None:
        if not self.count:
            raise ValueError(
                "Nothing is protected yet, so there is no telling what must stay: pass texts, (prompt, answer) pairs "
                "or token batches."
            )

    # -- on disk -------------------------------------------------------------------------------------------

    def state(self, dtype: torch.dtype | None = None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What a file keeps: tensors, the vectors in ``dtype`` (None: float32, all of their bits), and numbers."""
        spectrum = self.spectrum()
        tensors = {name: part.float() for name, part in spectrum._asdict().items()}
        tensors["vectors"] = tensors["vectors"].to(dtype or torch.float32)
        numbers = {"m": self.m, "rank": self.rank, "count": self.count, "trace": self._trace, "error": self._error}
        return tensors, numbers

    @classmethod
    def from_state(cls, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> SecondMoment:
        moment = cls.__new__(cls)
        moment.m, moment.rank, moment.count = numbers["m"], numbers["rank"], numbers["count"]
        moment._trace, moment._error, moment._sum = numbers["trace"], numbers["error"], None
        moment._dense = None
        moment._spectrum = Spectrum(*(tensors[name].double() for name in Spectrum._fields))
        values, vectors, rest = moment._spectrum
        if vectors.dim() != 2 or len(vectors) != moment.m or values.shape != vectors.shape[1:] or rest.shape != ():
            shapes = f"{tuple(vectors.shape)} and values {tuple(values.shape)}"
            raise ValueError(f"eigenvectors {shapes} of {moment.m} inputs")
        return moment


def _leading(
    matrix: torch.Tensor, rank: int | None, trace: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """The leading eigenvalues [k] and vectors [m, k], the mean of the other values, and the error of so much."""
    m = len(matrix)
    if rank is None or 4 * (rank + OVERSAMPLE) >= m:
        values, vectors = torch.linalg.eigh(matrix.double())
    else:
        values, vectors = _subspace(matrix, rank + OVERSAMPLE)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if rank is None:
        return values, vectors, values.new_zeros(()), 0.0
    values, vectors = values[:rank], vectors[:, :rank].contiguous()
    rest = ((trace - values.sum()) / (m - rank)).clamp(min=0)
    left = total = 0.0
    for start in range(0, m, BLOCK):  # by blocks of rows, in float64: the difference of the two norms would cancel
        block = matrix[start : start + BLOCK].double()
        total += float(block.square().sum())
        block -= (vectors[start : start + BLOCK] * (values - rest)) @ vectors.T
        block.diagonal(start).sub_(rest)
        left += float(block.square_().sum())
    return values, vectors, rest, (left / total) ** 0.5


def _subspace(matrix: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``size`` leading eigenpairs, ascending, by subspace iteration and Rayleigh-Ritz: O(m^2 size), not O(m^3).

    Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm 4.4.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), size, generator=generator).to(matrix)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    basis = torch.linalg.qr(basis.double())[0]
    values, inner = torch.linalg.eigh(basis.T @ (matrix @ basis.float()).double())
    return values, basis @ inner
