"""How the rows of several edits become one update of a layer: their sum, or least squares under a metric."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from . import ops
from .capture import Factors
from .ops.least_squares import wanted_changes


class Transformed(NamedTuple):
    """The rows of one layer that an editor has seen, of all samples of a batch."""

    u: torch.Tensor  # [N, m]: the layer's inputs, as they were
    new_u: torch.Tensor  # [N, m]: u~
    new_delta: torch.Tensor  # [N, n]: delta~
    share: torch.Tensor  # [N, 1]: of d that is wanted; see EditorNetwork.shares
    sample: torch.Tensor  # [N] int64


class Wanted(NamedTuple):
    """What edits want of one layer, whatever other edits there are: the rows of an edit's record."""

    u: torch.Tensor  # [N, m] float32
    d: torch.Tensor  # [N, n] float32: what the row's own edit adds to the layer's output at u
    sample: torch.Tensor  # [N] int64


def not_zero(sides: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Of each pair of u [B, S, m] and delta [B, S, n] the rows, [N] int64, where neither is all zero. A GPU is asked
    once for all pairs, and sent the answer."""
    # NaN is not 0, and stays to be seen.
    keeps = [(u.any(-1) & delta.any(-1)).flatten() for u, delta in sides]
    result: list[torch.Tensor] = keeps.copy()
    for device in {keep.device for keep in keeps}:
        mine = [i for i, keep in enumerate(keeps) if keep.device == device]
        flags = torch.cat([keeps[i] for i in mine]).cpu().split([len(keeps[i]) for i in mine])
        found = [each.nonzero().squeeze(1) for each in flags]
        sent = torch.cat(found).to(device, non_blocking=True).split([len(each) for each in found])
        for i, index in zip(mine, sent, strict=True):
            result[i] = index
    return result


def wanted(rows: Mapping[str, Transformed], alphas: torch.Tensor) -> dict[str, Wanted]:
    """d_i = -alpha (u_i . u~_i) delta~_i of every layer, or a share of it; differentiable."""
    return {
        name: Wanted(r.u, r.share * wanted_changes(r.u, r.new_u, r.new_delta, alpha.to(r.u.device)), r.sample)
        for (name, r), alpha in zip(rows.items(), alphas, strict=True)
    }


def summands(rows: Mapping[str, Transformed], alphas: torch.Tensor) -> dict[str, Wanted]:
    """u~_i and -alpha delta~_i of every layer: the rows whose sum of products is the sum of the edits' updates."""
    return {
        name: Wanted(r.new_u, -alpha.to(r.new_delta.device) * r.new_delta, r.sample)
        for (name, r), alpha in zip(rows.items(), alphas, strict=True)
    }


def concatenated(passes: Sequence[Mapping[str, Transformed]], size: int) -> dict[str, Transformed]:
    """The rows of several batches of ``size`` samples each as those of one."""
    result = {}
    for name in passes[0]:
        parts = [p[name]._replace(sample=p[name].sample + i * size) for i, p in enumerate(passes)]
        result[name] = parts[0] if len(parts) == 1 else Transformed(*map(torch.cat, zip(*parts, strict=True)))
    return result


def grouped(sample: torch.Tensor, group_size: int, groups: int, *sides: torch.Tensor) -> list[torch.Tensor]:
    """Rows [N, k] of each side -> [groups, T, k], each group's rows in their order; rows of zeros fill up.

    Of one group they are the rows themselves, not a copy, and a GPU is not waited for.
    """
    if groups == 1:
        return [rows.unsqueeze(0) for rows in sides]
    group = sample // group_size
    counts = torch.bincount(group, minlength=groups)
    width = int(counts.max()) if len(group) else 0
    place = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
    slot = group * width + place
    return [
        rows.new_zeros(groups * width, rows.shape[-1]).index_copy(0, slot, rows).view(groups, width, rows.shape[-1])
        for rows in sides
    ]


def sums(
    rows: Mapping[str, Transformed], alphas: torch.Tensor | Sequence[float], group_size: int, groups: int
) -> dict[str, Factors]:
    """Each group's update as the sum of its samples' updates (Mitchell et al. 2022, Algorithm 2)."""
    return {
        name: (*grouped(r.sample, group_size, groups, r.new_u, r.new_delta), alpha)
        for (name, r), alpha in zip(rows.items(), alphas, strict=True)
    }


def least_squares(
    rows: Mapping[str, Wanted],
    metric: Mapping[str, tuple],  # weight -> (spectrum, lambda, mu)
    group_size: int,
    groups: int,
) -> dict[str, Factors]:
    """Each group's update as the least-squares solution for its samples' rows, under each layer's metric."""
    factors: dict[str, Factors] = {}
    for name, w in rows.items():
        u, d = grouped(w.sample, group_size, groups, w.u, w.d)
        spectrum, lam, mu = metric[name]
        factors[name] = (*ops.least_squares(u, d, spectrum, lam.to(u.device), mu.to(u.device)), 1.0)
    return factors


def change(
    rows: Mapping[str, Wanted], metric: Mapping[str, tuple], dense: Callable[[str], torch.Tensor]
) -> dict[str, Factors]:
    """All rows as one update, for use and not for training: :func:`mendfast.ops.least_squares_change`.

    ``dense`` gives a weight's second moment as a matrix; it is kept between calls.
    """
    factors: dict[str, Factors] = {}
    for name, w in rows.items():
        spectrum, lam, mu = metric[name]
        lam, mu = lam.to(w.u.device), mu.to(w.u.device)
        pair = ops.least_squares_change(w.u, w.d, spectrum, lam, mu, dense=functools.partial(dense, name))
        factors[name] = (*pair, 1.0)
    return factors
