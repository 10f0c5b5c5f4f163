"""The pass that an edit needs as a CUDA graph: recorded once for a size of batch, replayed for all others of it.

For one short fact a model launches some hundreds of small kernels, forward and backward. A GPU is through with them in
a tenth of the time that Python takes to launch them one by one, so that it is the host that an edit waits for; a replay
launches all of them at once. So batches are padded to a few sizes, what depends on their values (which tokens predict,
which are padding) is worked out on the host beforehand, and the pass itself asks the GPU nothing.

A graph holds addresses and no values: weights that are written in place, as edits are, are read as they are now. Where
a parameter has moved or a module was replaced, all is recorded anew; where a module has hooks (an attached edit) or
another forward, and where a recording failed or gave something else than the pass itself, that runs as ever.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import numbers
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.overrides import TorchFunctionMode

from . import backends
from .capture import agree, capture
from .layers import Layer
from .ledger import settle
from .locks import exclusive
from .objective import Batch, Prepared, counts_positions, nll_of, prepared, text_config
from .ops._common import checks_values
from .types import modules_of

log = logging.getLogger("mendfast")

MOST_TOKENS = 1024
"""Of a batch, padding included: a longer pass has a GPU's work to wait for, and not Python's."""
MOST_LOGITS = 2**26
KEPT = 16
"""Recordings of one model; they share their scratch memory."""
WIDTH = 16
"""A causal model's tokens are padded to a multiple of this."""

Sides = tuple[torch.Tensor, torch.Tensor]


class _Recording(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    given: torch.Tensor  # where it reads its inputs: int64, one after the other
    found: dict[str, Sides]  # where it leaves u and delta


class Replays:
    """The recorded passes of one model.

    Attributes:
        why_not: why none is made any more, or None.
    """

    def __init__(self) -> None:
        self.why_not: str | None = None
        self._kept: OrderedDict[tuple, _Recording] = OrderedDict()
        self._model: tuple = ()
        self._width = WIDTH
        self._pool: Any = None
        self._last: Any = None  # torch.cuda.Event: the last replay's results are out of the graphs' memory

    def __deepcopy__(self, memo: dict) -> Replays:
        return Replays()  # of a copied model, which lies elsewhere

    def __reduce__(self) -> tuple:
        return Replays, ()

    def __len__(self) -> int:
        return len(self._kept)

    @torch.inference_mode(False)  # what is kept outlives the caller's block
    def gradients(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        batch: Batch,
        reduction: str,
        launched: Callable[[Batch], dict[str, Sides]],
    ) -> dict[str, Sides] | None:
        """What ``launched(batch)`` gives, to rounding; None where that is to be called."""
        if layers[0].weight.device.type != "cuda" or torch.version.hip is not None or self.why_not is not None:
            return None
        with exclusive(model):
            settle(model)
            modules = modules_of(model)
            device = _served(modules)
            if device is None:
                return None
            if self._model != (present := _addresses(modules)):
                self._forget()
                self._model, self._width = present, 1 if counts_positions(model) else WIDTH
            given = prepared(model, batch, reduction, self._width)
            if given is None or given.tokens > MOST_TOKENS or given.rows * _vocabulary(model) > MOST_LOGITS:
                return None
            shapes = tuple((name, *value.shape) for name, value in given.inputs.items())
            key = (shapes, reduction, _circumstances(model))
            if key not in self._kept:
                recording = self._recorded(model, layers, given, device, functools.partial(launched, batch))
                if recording is None:
                    return None
                self._kept[key] = recording
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._replayed(self._kept[key], given, device)

    def _replayed(self, recording: _Recording, given: Prepared, device: torch.device) -> dict[str, Sides]:
        stream = torch.cuda.current_stream(device)
        if self._last is not None:
            stream.wait_event(self._last)  # another stream may still be reading
        with torch.cuda.device(device), torch.no_grad():
            recording.given.copy_(_flat(given.inputs), non_blocking=True)
            recording.graph.replay()
            found = {
                name: tuple(side[:, : side.shape[1] - given.padding].clone() for side in sides)
                for name, sides in recording.found.items()
            }
            self._last = stream.record_event()
        return found

    def _recorded(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        given: Prepared,
        device: torch.device,
        launched: Callable[[], dict[str, Sides]],
    ) -> _Recording | None:
        expected = launched()  # and its errors are the caller's
        static = _flat(given.inputs).to(device)
        inputs = _split(static, given.inputs)

        def run() -> dict[str, Sides]:
            with capture(model, layers, given.samples) as captured:
                return captured.rows(nll_of(model, inputs))

        try:
            with torch.cuda.device(device):
                self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
                graph, found = _record(run, device, self._pool)
            recording = _Recording(graph, static, found)
            again = self._replayed(recording, given, device)
            wrong = [name for name, sides in expected.items() if not _same(again[name], sides)]
            if not wrong:
                return recording
            self.why_not = f"replayed, {wrong[0]} had other rows"
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            self.why_not = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._forget()
        log.info("%s's passes are launched anew each time: %s", type(model).__name__, self.why_not)
        return None

    def _forget(self) -> None:
        self._kept.clear()
        self._pool = None  # memory that no graph uses any more can't be recorded into


def _same(found: Sides, expected: Sides) -> bool:
    """To rounding, from which a wrong mask or position is far; u only where there is a gradient, for what an edit drops
    may depend on padding."""
    if any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return False
    (u, delta), (other_u, other_delta) = found, expected
    seen = other_delta.any(-1, keepdim=True)
    return agree(delta, other_delta, 4) and agree(u * seen, other_u * seen, 4)


def _record(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any]:
    """``run`` as a graph, and what it returned: tensors that a replay writes anew."""
    # Not torch.cuda.graph, which empties the allocator's cache first, so that all else is allocated anew after it.
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), _Filled():
        run()  # what a first pass loads and compiles, no graph may
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                found = run()
            finally:
                graph.capture_end()
        except BaseException:
            # a recording that a kernel's error has ended leaves the allocator believing that it goes on
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(device.index, pool)
            raise
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, found


class _Filled(TorchFunctionMode):
    """torch.tensor(a number, device=a GPU's) by a fill: a copy from the host can't be recorded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = kwargs or {}
        if function is torch.tensor and args and isinstance(args[0], numbers.Number) and "device" in given:
            return torch.full((), args[0], **given)
        return function(*args, **given)


def _served(modules: Sequence[nn.Module]) -> torch.device | None:
    """The GPU that all of a model lies on, where nothing was put into its modules and nobody watches what they do."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return None
        if "forward" in vars(m) or m._compiled_call_impl is not None:
            return None
    tensors = list(_tensors(modules))
    device = tensors[0].device
    if any(t.device != device or type(t) not in (nn.Parameter, torch.Tensor) for t in tensors):
        return None
    watched = (
        all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks
        or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
        or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing() or checks_values(tensors[0])
    )  # fmt: skip
    return None if watched else device


def _tensors(modules: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
    """All parameters and buffers, shared ones as often as they are used."""
    for module in modules:
        for part in (module._parameters, module._buffers):
            yield from (tensor for tensor in part.values() if tensor is not None)


def _addresses(modules: Sequence[nn.Module]) -> tuple:
    """Changes when a module was replaced, or a parameter or buffer moved."""
    return tuple(map(id, modules)), tuple(tensor.data_ptr() for tensor in _tensors(modules))


def _circumstances(model: nn.Module) -> tuple:
    """What else decides which kernels a pass launches."""
    products = torch.backends.cuda.matmul
    return (
        getattr(products, "fp32_precision", None) or products.allow_tf32,
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        backends.preferred("token_nll", torch.device("cuda")),
        getattr(text_config(model), "_attn_implementation", None),
    )


def _vocabulary(model: nn.Module) -> int:
    return getattr(text_config(model), "vocab_size", None) or 1


def _flat(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in inputs.values()])


def _split(flat: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}
