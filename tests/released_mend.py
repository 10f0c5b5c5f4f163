"""What the released MEND code computes and saves, in plain PyTorch of its own: the measure for mendfast.compat.

Source: ``algs/mend.py`` and ``nn.py`` of github.com/eric-mitchell/mend, in other words.
"""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
from torch import nn

NAN = float("nan")
# In the orders of the released configurations: GPT-2's names the second matrix of a block first.
INNER = {
    "gpt2": [f"transformer.h.{i}.mlp.{name}.weight" for i in (2, 3) for name in ("c_proj", "c_fc")],
    "llama": [f"model.layers.{i}.mlp.{n}.weight" for i in (2, 3) for n in ("gate_proj", "up_proj", "down_proj")],
    "t5": [
        f"{stack}.block.{i}.layer.{j}.DenseReluDense.{name}.weight"
        for stack, j in (("encoder", 1), ("decoder", 2)) for i in (1, 2) for name in ("wi", "wo")
    ],
    "bart": [f"model.{s}.layers.{i}.fc{j}.weight" for s in ("encoder", "decoder") for i in (1, 2) for j in (1, 2)],
    "bert": [
        f"bert.encoder.layer.{i}.{name}.dense.weight" for i in (2, 3) for name in ("intermediate", "output")
    ],
}  # fmt: skip


class Block(nn.Module):
    """A low-rank map of R^d to itself and a clamp; with a residual connection if ``residual``."""

    def __init__(self, d: int, rank: int, modes: int | None, residual: bool):
        super().__init__()
        rank, self.residual = min(rank, d), residual
        self.u, self.v = nn.Parameter(torch.randn(d, rank) * 0.1), nn.Parameter(torch.randn(rank, d) * 0.3)
        self.bias = nn.Parameter(torch.randn(d) * 0.1)
        if modes:
            self.mode_shift, self.mode_scale = nn.Embedding(modes, d), nn.Embedding(modes, d)
            self.mode_shift.weight.data.mul_(0.1)

    def forward(self, x: torch.Tensor, mode: int | None) -> torch.Tensor:
        y = x @ self.v.T @ self.u.T + self.bias
        if mode is not None:
            y = y * self.mode_scale.weight[mode] + self.mode_shift.weight[mode]
        y = torch.maximum(y, torch.zeros_like(y))
        return x + y if self.residual else y


class Net(nn.Module):
    def __init__(self, d: int, modes: int | None, residual: bool, depth: int, rank: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(d, rank, modes, residual) for _ in range(depth))

    def forward(self, x: torch.Tensor, mode: int | None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mode)
        return x


class Transform(nn.Module):
    """One network with its statistics, one row at a time (Welford)."""

    def __init__(self, m, n, modes, sides, residual, depth=2, rank=8):
        super().__init__()
        for name in ("mean", "std", "s"):
            self.register_buffer(f"u_{name}", torch.full((m,), NAN))
            self.register_buffer(f"v_{name}", torch.full((n,), NAN))
        self.register_buffer("k", torch.full((1,), NAN))
        args = modes, residual, depth, rank
        sides = {"smaller": "delta" if m > n else "u"}.get(sides, sides)
        self.mlp = Net(m + n, *args) if sides == "both" else None
        self.mlp1 = Net(m, *args) if sides in ("u", "separate") else None
        self.mlp2 = Net(n, *args) if sides in ("delta", "separate") else None

    def see(self, u: torch.Tensor, v: torch.Tensor) -> None:
        for side, rows in (("u", u), ("v", v)):
            k = 0 if self.k.isnan() else int(self.k)
            mean, s = (
                torch.zeros(rows.shape[1]) if k == 0 else getattr(self, f"{side}_{n}") for n in ("mean", "s")
            )
            for row in rows:
                k += 1
                step = row - mean
                mean = mean + step / k
                s = s + step * (row - mean)
            for name, value in (("mean", mean), ("s", s), ("std", (s / (k - 1)).sqrt())):
                getattr(self, f"{side}_{name}").copy_(value)
        self.k.fill_(k)

    def forward(self, u, v, mode, norm):
        if norm:
            u, v = (u - self.u_mean) / (self.u_std + 1e-7), (v - self.v_mean) / (self.v_std + 1e-7)
        if self.mlp:
            return self.mlp(torch.cat([u, v], 1), mode).split([u.shape[1], v.shape[1]], 1)
        return (self.mlp1(u, mode) if self.mlp1 else u), (self.mlp2(v, mode) if self.mlp2 else v)


class Released(nn.Module):
    """What the released code's editor of ``model`` computes; ``archive`` is what it saves."""

    def __init__(
        self, model, inner_params, *, sides="both", shared=True, norm=True, init="id", seed=0, **shape
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.outside, self.names, self.norm, self.shared = (model,), list(inner_params), norm, shared
        self.modules_of = {name: model.get_submodule(name.removesuffix(".weight")) for name in inner_params}
        self.edit_lrs = nn.Parameter(torch.rand(len(inner_params)) * 1e-2 + 1e-3)
        groups: dict[str, list[str]] = {}
        for name in inner_params:
            groups.setdefault(str(self.shape(name)) if shared else name.replace(".", "#"), []).append(name)
        self.place = {name: (key, i) for key, names in groups.items() for i, name in enumerate(names)}
        self.mend = nn.ModuleDict({
            key: Transform(*self.shape(names[0]), len(names) if shared else None, sides, init == "id", **shape)
            for key, names in groups.items()
        })  # fmt: skip

    def shape(self, name: str) -> tuple[int, int]:
        """Inputs and outputs."""
        module = self.modules_of[name]
        rows, columns = module.weight.shape
        return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)

    @torch.enable_grad()
    def rows(self, batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and output gradients of the edited matrices, for the mean loss over all target tokens."""
        (model,), seen, handles = self.outside, {}, []
        for name, module in self.modules_of.items():

            def keep(module, args, output, name=name):
                output.retain_grad()
                seen[name] = args[0].detach(), output

            handles.append(module.register_forward_hook(keep))
        model(**batch).loss.backward()
        model.zero_grad()
        for handle in handles:
            handle.remove()
        pairs = {}
        for name, (x, y) in seen.items():
            x, delta = x.flatten(0, -2), y.grad.flatten(0, -2)
            reached = (x != 0).any(1) & (delta != 0).any(1)
            pairs[name] = x[reached], delta[reached]
        return pairs

    def see(self, batch) -> None:
        for name, (x, delta) in self.rows(batch).items():
            self.mend[self.place[name][0]].see(x, delta)

    @torch.no_grad()
    def edited(self, batch) -> dict[str, torch.Tensor]:
        """The new weights: W + edit_lr * sum of outer products."""
        weights, pairs = {}, self.rows(batch)
        for lr, name in zip(self.edit_lrs, self.names, strict=True):
            key, mode = self.place[name]
            x, delta = self.mend[key](*pairs[name], mode if self.shared else None, self.norm)
            update = delta.double().T @ x.double()
            linear = isinstance(self.modules_of[name], nn.Linear)
            weights[name] = self.modules_of[name].weight.double() + lr * (update if linear else update.T)
        return weights

    def archive(self, prefix="mend", **model_config) -> dict:
        state = OrderedDict((re.sub("^mend", prefix, k), v) for k, v in self.state_dict().items())
        state.update(model_config)
        return {"model": state, "opt": {"state": {0: {"exp_avg": torch.ones(3)}}}, "lr_opt": None, "step": 7,
                "val_stats": {"edit/acc_val": 0.9}, "start_time": "01/01/2022-00:00:00/000000"}  # fmt: skip
