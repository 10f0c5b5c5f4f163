"""An edit as the matrices of a LoRA adapter: of one rank, exactly or truncated."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..experts import parsed
from ..layers import Layer
from ..schema import shown

Pair = tuple[torch.Tensor, torch.Tensor]


class Update(Protocol):
    """What is exported; an :class:`mendfast.Edit` is one."""

    @property
    def factors(self) -> Mapping[str, Any]: ...  # weight -> (u [T, m], delta [T, n], alpha)

    @property
    def requests(self) -> Sequence[Any]: ...

    def layers_of(self, model: nn.Module) -> list[Layer]: ...


class Lora(NamedTuple):
    """An edit's matrices: module path -> (A [r, m], B [n, r]), of one r; an nn.Linear's weight gains B A, that of a
    Conv1D its transpose."""

    matrices: dict[str, Pair]
    layers: list[Layer]
    rank: int  # that the largest of them needs: r is this or, padded by zeros, more
    errors: dict[str, float]  # weight -> ||truncated - exact|| / ||exact||, Frobenius


@torch.no_grad()
def lora_of(edit: Update, model: nn.Module, rank: int | None = None) -> Lora:
    """The edit's matrices on the CPU, float32, as many rows as the largest of them needs.

    Args:
        rank: at most so many directions of each weight, the strongest; None: all of them.

    Raises:
        ValueError, TypeError: a rank below 1, an edit of another model, one that changes nothing or holds NaN.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank is {shown(rank)}; it must be a whole number, or None for the exact edit.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1, or None for the exact edit.")
    if not edit.factors:
        raise ValueError("This edit changes no weights; there is nothing to export.")
    layers = edit.layers_of(model)
    if stacked := [layer.name for layer in layers if parsed(layer.name)]:
        raise ValueError(
            f"{stacked[0]} is one of a stack of experts, for which adapter files have no common name; apply the edit "
            "and save the model (`mendfast apply`), or edit other layers."
        )
    matrices, errors = {}, {}
    for layer, factor in zip(layers, edit.factors.values(), strict=True):
        a = factor.u.detach().cpu().double()
        b = factor.delta.detach().cpu().double() * -float(factor.alpha)
        keep = (a != 0).any(1) & (b != 0).any(1)
        a, b = a[keep], b[keep].T
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"The edit of {layer.name} holds NaN or infinity; it can't be exported. Make it again.")
        most = min(len(a), *layer.shape) if rank is None else rank
        errors[layer.name] = 0.0
        if len(a) > most:
            a, b, errors[layer.name] = truncated(a, b, most)
        matrices[layer.name.removesuffix(".weight")] = _single(layer.name, *_balanced(a, b))
    needed = max(1, max(len(a) for a, _ in matrices.values()))
    return Lora({path: padded(*pair, needed) for path, pair in matrices.items()}, layers, needed, errors)


def truncated(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The best B A of ``rank`` (Eckart and Young 1936), and what it lacks: ||B' A' - B A|| / ||B A||, Frobenius.

    B A = Q_b (R_b R_a^T) Q_a^T: the singular values are those of a matrix no larger than the rank, and B A is never
    formed.
    """
    q_a, r_a = torch.linalg.qr(a.T)  # [m, k], [k, T]
    q_b, r_b = torch.linalg.qr(b)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    roots = values[:rank].sqrt()
    norm = values.norm()
    error = float(values[rank:].norm() / norm) if norm > 0 else 0.0
    return roots[:, None] * (right[:rank] @ q_a.T), (q_b @ left[:, :rank]) * roots, error


def _balanced(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Each direction's two factors of about one norm, so that 16 bits hold both; by powers of two, which round
    nothing."""
    power = (0.5 * (b.norm(dim=0).log2() - a.norm(dim=1).log2())).round().nan_to_num(0, 0, 0)  # of zeros
    return torch.ldexp(a, power[:, None]), torch.ldexp(b, -power)


def _single(name: str, a: torch.Tensor, b: torch.Tensor) -> Pair:
    a, b = a.float().contiguous(), b.float().contiguous()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"The edit of {name} is too large for float32; it can't be exported.")
    return a, b


def padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> Pair:
    """A [rank, m] and B [n, rank], filled up with zeros."""
    more = rank - len(a)
    return nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))


# -- places to write to ------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(directory: str | Path, *, overwrite: bool, sign: str) -> Iterator[Path]:
    """A directory to write into that takes ``directory``'s place at the end; after an error nothing has changed.

    Args:
        overwrite: replace what is there, if it holds a file named ``sign``.

    Raises:
        FileExistsError: something is there that may not be replaced.
    """
    directory = Path(directory)
    check_free(directory, overwrite=overwrite, sign=sign)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as outer:
        inner = Path(outer) / "new"  # with the permissions that a directory usually gets
        inner.mkdir()
        yield inner
        if directory.is_dir():
            directory.rename(Path(outer) / "old")
        try:
            inner.rename(directory)
        except BaseException:
            if (Path(outer) / "old").is_dir():
                (Path(outer) / "old").rename(directory)
            raise


def check_free(path: Path, *, overwrite: bool, sign: str | None = None) -> None:
    """A FileExistsError if ``path`` holds something that may not be replaced."""
    if not path.exists() or path.is_dir() and sign is not None and not any(path.iterdir()):
        return
    if path.is_dir() != (sign is not None):
        raise FileExistsError(f"{path} is {'a directory' if path.is_dir() else 'a file'}; name another place.")
    if not overwrite:
        raise FileExistsError(f"{path} exists already; name another place, or pass overwrite=True to replace it.")
    if sign is not None and not (path / sign).is_file():
        raise FileExistsError(f"{path} holds other things (there is no {sign} in it); name another place.")
