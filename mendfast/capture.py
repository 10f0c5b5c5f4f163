"""The (u, delta) rows out of a model, and low-rank updates into one, by hooks and replaced forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from . import ops
from .layers import Layer
from .ops.frozen_linear import frozen_forwards

Factors = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | float"]
"""u [T, m], delta [T, n], alpha: one update for all samples; or u [G, T, m], delta [G, T, n]: G groups of
consecutive samples, each with its own."""


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode and none of its parameters asks for a gradient.

    On a CPU its linear layers then use :mod:`mendfast.ops.frozen_linear`.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    wanting = [p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in wanting:
            parameter.requires_grad_(False)
        with replaced_forwards(frozen_forwards(model)):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in wanting:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within the block the modules run these functions; a forward that accelerate has put there comes back."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


class Captured:
    """What the edited layers saw in one forward pass."""

    def __init__(self, layers: Sequence[Layer], batch_size: int):
        self.layers, self.batch_size = layers, batch_size
        self._calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {layer.name: [] for layer in layers}

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if not output.requires_grad:
                # The graph starts here: nothing below the first edited layer is differentiated.
                output = output.detach().requires_grad_()
            # A split model may hand a layer its input on the device of the block before.
            self._calls[name].append((args[0].detach().to(output.device), output))
            return output

        return hook

    def rows(self, loss: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """u [B, S, m] and delta [B, S, n] of every layer: its inputs and the gradient of ``loss``, a sum over
        samples, at its outputs. A layer called more than once has its calls one after the other along S."""
        outputs = [output for calls in self._calls.values() for _, output in calls]
        if silent := [name for name, calls in self._calls.items() if not calls]:
            raise ValueError(f"The forward pass did not run {', '.join(silent)}; edit layers that it runs.")
        gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
        result = {}
        for layer in self.layers:
            us, deltas = [], []
            for x, output in self._calls[layer.name]:
                gradient = next(gradients)
                gradient = torch.zeros_like(output) if gradient is None else gradient
                us.append(x.reshape(self.batch_size, -1, layer.m))
                deltas.append(gradient.reshape(self.batch_size, -1, layer.n))
            result[layer.name] = (torch.cat(us, 1), torch.cat(deltas, 1)) if len(us) > 1 else (us[0], deltas[0])
        return result


@contextlib.contextmanager
def capture(model: nn.Module, layers: Sequence[Layer], batch_size: int) -> Iterator[Captured]:
    """Within the block a forward pass records the layers' inputs and outputs.

    The graph starts at the first edited layer's output and holds no parameter.
    """
    captured = Captured(layers, batch_size)
    handles = [layer.module.register_forward_hook(captured._hook(layer.name)) for layer in layers]
    try:
        with frozen(model), torch.enable_grad():
            yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def lowrank_updates(layers: Sequence[Layer], factors: Mapping[str, Factors]) -> Iterator[None]:
    """Within the block every layer computes y - alpha (x u^T) delta, its weight untouched.

    Blocks nest: each adds its own update, since all of them see the same x.
    """

    def hook_of(layer: Layer, u: torch.Tensor, delta: torch.Tensor, alpha: torch.Tensor | float) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            nonlocal u, delta, alpha
            if u.device != output.device:  # the editor's; from the second call on they are the layer's
                u, delta = u.to(output.device), delta.to(output.device)
                alpha = alpha.to(output.device) if isinstance(alpha, torch.Tensor) else alpha
            x = args[0].to(output.device)
            if u.dim() == 2:
                return ops.lowrank_linear(output, x, u, delta, alpha)
            groups = u.shape[0]
            y = ops.lowrank_linear(output.reshape(groups, -1, layer.n), x.reshape(groups, -1, layer.m), u, delta, alpha)
            return y.view(output.shape)

        return hook

    handles = []
    try:
        for layer in layers:
            if layer.name in factors:
                handles.append(layer.module.register_forward_hook(hook_of(layer, *factors[layer.name])))
        yield
    finally:
        for handle in handles:
            handle.remove()
