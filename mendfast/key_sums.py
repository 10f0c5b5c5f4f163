"""The sums over a memory's records that its solve needs, kept in step with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from .ops.least_squares import add_lower

ROWS = 4096  # that enter the sums at a time


class KeySums:
    """M + U^T U (of which the lower triangle) and U^T D of one layer's rows, in float64, in step with the records.

    What a record adds is subtracted when it goes; when more went than is left, all is added anew, so that the
    rounding of what went stays below that of what is there.
    """

    def __init__(self, m: int, n: int, device: torch.device):
        self.gram = torch.zeros(m, m, dtype=torch.float64, device=device)
        self.cross = torch.zeros(m, n, dtype=torch.float64, device=device)
        self._members: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._there = self._gone = torch.zeros(2, dtype=torch.float64)
        self._of: tuple | None = None  # the state of the metric; None while the sums are being changed

    def follow(self, rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]], metric: Callable, state: tuple) -> None:
        gone = [pair for key, pair in self._members.items() if rows.get(key) is not pair]
        new = [pair for key, pair in rows.items() if self._members.get(key) is not pair]
        there, lost = self._there - _sizes(gone), self._gone + _sizes(gone)
        anew = self._of != state or bool((lost > there).any())
        self._of = None
        if anew:
            self.gram.copy_(metric())
            self.cross.zero_()
            gone, new, there, lost = [], list(rows.values()), torch.zeros_like(there), torch.zeros_like(lost)
        self._add(gone, -1)
        self._add(new, 1)
        self._members, self._there, self._gone = dict(rows), there + _sizes(new), lost
        self._of = state

    def _add(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], sign: int) -> None:
        if not pairs:
            return
        u, d = (torch.cat(side) for side in zip(*pairs, strict=True))
        for start in range(0, len(u), ROWS):
            some_u, some_d = (s[start : start + ROWS].to(self.gram.device, torch.float64) for s in (u, d))
            add_lower(self.gram, some_u.T, some_u.T, sign)
            self.cross.addmm_(some_u.T, some_d, alpha=sign)


def _sizes(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """What the two sums can hold of these rows at most: sum |u|^2 and sum |u| |d|."""
    total = torch.zeros(2, dtype=torch.float64)
    for u, d in pairs:
        lengths = u.double().norm(dim=1)
        total += torch.stack([lengths.square().sum(), (lengths * d.double().norm(dim=1)).sum()])
    return total
