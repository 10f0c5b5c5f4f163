"""The editor network of one weight shape, over rows stacked from all layers of that shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from . import ops
from .config import MendConfig
from .layers import Layer
from .types import EPS, Block, Stats

Gather = Callable[[torch.Tensor], torch.Tensor]
"""[1, K] of this process -> [processes, K], the same in each."""


class LowRankBlock(nn.Module):
    """Parameters of one block; see :class:`mendfast.types.Block`."""

    def __init__(self, dim: int, modes: int | None, config: MendConfig):
        super().__init__()
        rank = min(config.rank, dim)
        self.U = nn.Parameter(torch.zeros(dim, rank))
        self.V = nn.Parameter(torch.randn(rank, dim))
        if config.scale_v:
            self.V.data.mul_(dim**-0.5)
        if not config.identity_init:
            nn.init.xavier_uniform_(self.U, gain=nn.init.calculate_gain("relu"))
            nn.init.xavier_uniform_(self.V)
        self.b = nn.Parameter(torch.zeros(dim))
        self.s = nn.Parameter(torch.ones(modes, dim)) if modes else None
        self.o = nn.Parameter(torch.zeros(modes, dim)) if modes else None

    def tuple(self) -> Block:
        return Block(self.U, self.V, self.b, self.s, self.o)


class EditorNetwork(nn.Module):
    """Maps (u, delta) rows to (u~, delta~) rows (Mitchell et al. 2022, equation 3).

    Args:
        m: width of u, the layers' input size.
        n: width of delta, the layers' output size.
        modes: number of layers that share the network, each with its own scale and shift; None for one
            layer without them.
        config: ``rank``, ``blocks``, ``sides``, ``normalize``, ``identity_init``, ``precision``.

    The statistics (``count``, and mean, std and M2 of both sides) are buffers; :meth:`observe` moves them.
    Before two rows were seen, means are 0 and deviations 1.
    """

    def __init__(self, m: int, n: int, modes: int | None, config: MendConfig):
        super().__init__()
        self.m, self.n, self.modes = m, n, modes
        self.normalize, self.precision, self.residual = config.normalize, config.precision, config.identity_init
        self.sides, self.longest = config.sides, config.longest
        if self.sides == "smaller":
            self.sides = "delta" if m > n else "u"

        def blocks(dim: int) -> nn.ModuleList:
            return nn.ModuleList(LowRankBlock(dim, modes, config) for _ in range(config.blocks))

        self.both = blocks(m + n) if self.sides == "both" else None
        self.u = blocks(m) if self.sides in ("u", "separate") else None
        self.delta = blocks(n) if self.sides in ("delta", "separate") else None

        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for side, width in (("u", m), ("delta", n)):
            self.register_buffer(f"{side}_mean", torch.zeros(width))
            self.register_buffer(f"{side}_std", torch.ones(width))
            self.register_buffer(f"{side}_m2", torch.zeros(width))

    @torch.no_grad()
    def observe(self, u: torch.Tensor, delta: torch.Tensor, gather: Gather | None = None) -> None:  # [N, m], [N, n]
        """Merge rows into the running statistics; those whose square is not finite would spoil them for good.

        With ``gather`` the rows of all processes, which then hold the same statistics, as if one had seen all.
        """
        finite = (u.square().sum(-1) + delta.square().sum(-1)).isfinite()
        if not finite.all():
            u, delta = u[finite], delta[finite]
        if gather is not None:
            self._observe_all(u, delta, gather)
        elif len(u):
            seen = self.count.clone()
            ops.running_stats_(seen, self.u_mean, self.u_m2, u)
            ops.running_stats_(self.count, self.delta_mean, self.delta_m2, delta)
        # Written without a branch on the count, which may live on a GPU: with fewer than two rows std stays 1.
        for std, m2 in ((self.u_std, self.u_m2), (self.delta_std, self.delta_m2)):
            std.copy_(torch.where(self.count > 1, (m2 / (self.count - 1)).sqrt(), torch.ones_like(m2)))

    def _observe_all(self, u: torch.Tensor, delta: torch.Tensor, gather: Gather) -> None:
        own = torch.zeros(1 + 2 * (self.m + self.n), dtype=torch.float64, device=u.device)
        if len(u):
            _, mean, m2 = own.split([1, self.m + self.n, self.m + self.n])
            ops.running_stats_(own[:1], mean, m2, torch.cat([u, delta], 1))
        mean, m2 = (torch.cat(sides).double() for sides in ((self.u_mean, self.delta_mean), (self.u_m2, self.delta_m2)))
        count = self.count.double()
        # In the order of the ranks, so that all of them end in the same bits (Chan, Golub and LeVeque 1979).
        for seen, other_mean, other_m2 in (part.split([1, len(mean), len(mean)]) for part in gather(own[None])):
            weight = seen / (count + seen).clamp(min=1)
            difference = other_mean - mean
            m2 = m2 + other_m2 + difference.square() * (count * weight)
            mean, count = mean + difference * weight, count + seen[0]
        self.count.copy_(count)
        for values, side in ((mean, "mean"), (m2, "m2")):
            self.get_buffer(f"u_{side}").copy_(values[: self.m])
            self.get_buffer(f"delta_{side}").copy_(values[self.m :])

    def stats(self) -> Stats | None:
        if not self.normalize:
            return None
        return Stats(self.u_mean, self.u_std, self.delta_mean, self.delta_std)

    def forward(
        self,
        u: torch.Tensor,  # [N, m]
        delta: torch.Tensor,  # [N, n]
        mode: torch.Tensor | None = None,  # [N] int64: each row's layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The transformed rows, float32 (float64 in an editor of float64). Rows that are padding must have been left
        out by the caller."""
        kind = torch.promote_types(self.u_mean.dtype, torch.float32)
        u, delta = u.to(kind), delta.to(kind)
        if self.both is not None:
            return self._run(u, delta, self.stats(), self.both, mode)
        # One side at a time: the other has width 0; a side without a network is normalised, no more.
        stats = self.stats()
        stats_u = stats and Stats(stats.u_mean, stats.u_std, stats.delta_mean[:0], stats.delta_std[:0])
        stats_delta = stats and Stats(stats.u_mean[:0], stats.u_std[:0], stats.delta_mean, stats.delta_std)
        new_u, _ = self._run(u, delta[:, :0], stats_u, self.u, mode)
        _, new_delta = self._run(u[:, :0], delta, stats_delta, self.delta, mode)
        return new_u, new_delta

    @torch.no_grad()
    def shares(self, u: torch.Tensor) -> torch.Tensor:  # [N, m] -> [N, 1] float32
        """(L / |u|)^2 of rows longer than L, ``config.longest`` times the root mean square of those seen; else 1.

        What a row wants, -alpha (u . u~) delta~, grows as |u|^2. A token that others attend to for want of a better one
        ("massive activations", Sun et al. 2024) may be 15 times as long as the rest in a late block, and would want 200
        times the change: a single one, as of the space before "1956", undid SmolLM2 in running text.
        """
        lengths = u.float().norm(dim=1, keepdim=True)
        if self.longest is None:
            return torch.ones_like(lengths)
        typical = (self.u_mean.square() + self.u_std.square()).sum().sqrt()
        longest = torch.where(self.count > 1, self.longest * typical, torch.inf)
        return (longest / lengths).clamp(max=1).square().nan_to_num(1.0)

    def _run(self, u, delta, stats, blocks, mode):
        if blocks is None:
            if stats is None:
                return u, delta
            return (u - stats.u_mean) / (stats.u_std + EPS), (delta - stats.delta_mean) / (stats.delta_std + EPS)
        tuples = [block.tuple() for block in blocks]
        return ops.editor_mlp(
            u, delta, stats, tuples, mode, precision=self.precision, residual=self.residual
        )

    def extra_repr(self) -> str:
        rows = int(self.count)
        return f"m={self.m}, n={self.n}, modes={self.modes}, sides={self.sides!r}, rows seen={rows}"


def make_networks(layers: Sequence[Layer], config: MendConfig) -> tuple[nn.ModuleDict, dict[str, list[Layer]]]:
    """The networks of an editor of ``layers``, and which layers each serves."""
    groups = defaultdict(list)
    for layer in layers:
        groups[str(layer.shape if config.shared else layer.name).replace(".", "#")].append(layer)
    networks = nn.ModuleDict(
        {
            name: EditorNetwork(*members[0].shape, len(members) if config.shared else None, config)
            for name, members in groups.items()
        }
    )
    return networks, dict(groups)


def planned_networks(layers: Sequence[Layer], config: MendConfig) -> nn.ModuleDict:
    """The same without numbers: what a file must hold, known before anything is built."""
    with torch.device("meta"):
        return make_networks(layers, config)[0]
