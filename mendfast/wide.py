"""Passes of 16-bit models whose activations are float32, on CPUs that have no units for 16 bits.

Such a CPU rounds every sum for nothing: it multiplies and adds in float32 all the same. Within a block of
:func:`widening` the embeddings give float32, the norms keep it, and the linear layers of a frozen model widen their
weights as they read them (:mod:`mendfast.ops.widened`): the pass of a float32 model with these weights, in the memory
of a 16-bit one.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from . import backends
from .capture import replaced_forwards
from .ops import widened
from .ops.frozen_linear import is_linear, plain, untouched
from .types import modules_of

_RMS_NORM = re.compile(r"RMSNorm$")


@contextlib.contextmanager
def widening(model: nn.Module) -> Iterator[None]:
    """For the passes of the frozen ``model`` within the block, where its modules are of known kinds. Blocks nest."""
    with replaced_forwards(_forwards(model)):
        yield


def _forwards(model: nn.Module) -> dict[nn.Module, Callable]:
    """Of all modules that hold parameters and are no linear layers; none where one is of a kind not known here."""
    forwards: dict[nn.Module, Callable] = {}
    first = next(model.parameters())
    if first.dtype not in widened.UNITS or first.device.type != "cpu" or widened.has_units(first.dtype):
        return forwards
    if backends.preferred("frozen_linear", first.device) != "cpu" or getattr(model.config, "is_encoder_decoder", False):
        return forwards
    for module in modules_of(model):
        own = [p for p in module._parameters.values() if p is not None]
        if not own:
            continue
        if not plain(*own) or any(p.dtype != first.dtype or p.device != first.device for p in own):
            return {}
        kind = type(module)
        if is_linear(kind):
            if not untouched(module):
                return {}
        elif "forward" in vars(module):
            return {}
        elif isinstance(module, nn.Embedding):
            forwards[module] = functools.partial(_embedding, module)
        elif kind is nn.LayerNorm:
            forwards[module] = functools.partial(_layer_norm, module)
        elif not _RMS_NORM.search(kind.__name__) or len(own) > 1 or own[0].dim() != 1 or kind is nn.RMSNorm:
            return {}  # transformers' norms widen what they are given, and multiply by the weight in the end
    return forwards


def _embedding(layer: nn.Embedding, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    return type(layer).forward(layer, *args, **kwargs).float()


def _layer_norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    weight, bias = (None if p is None else p.float() for p in (layer.weight, layer.bias))
    return F.layer_norm(x.float(), layer.normalized_shape, weight, bias, layer.eps)
