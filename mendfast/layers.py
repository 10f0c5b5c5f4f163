"""Which weights of a model are edited: by name, or chosen by :mod:`mendfast.choice`.

Names are those of the model itself, whatever it is wrapped in: torch.compile's, DataParallel's and PEFT's modules are
looked through.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import experts, sharding, types
from .schema import shown, some


@dataclass(frozen=True)
class Layer:
    """One edited weight: W maps m inputs to n outputs."""

    name: str  # of the weight, "transformer.h.3.mlp.c_fc.weight"; of a stacked expert "model.….experts.down_proj[3]"
    module: nn.Module
    m: int
    n: int
    layout: str  # "out_in": W is [n, m] (nn.Linear); "in_out": [m, n] (Conv1D)

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.m, self.n

    @property
    def local(self) -> torch.Tensor:
        """What of the weight lies in this process, to be written in place: all of it where it isn't sharded."""
        return sharding.local(self.weight)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, perhaps among others."""
        return self.module.stack if isinstance(self.module, experts.ExpertMatrix) else self.module.weight

    @property
    def place(self) -> nn.Module:
        """The model's module that holds the parameter."""
        return self.module.host if isinstance(self.module, experts.ExpertMatrix) else self.module


def named_layers(model: nn.Module, names: Sequence[str]) -> list[Layer]:
    """The weights of those names ("….weight", or the module's name; "….experts.down_proj[3]" of stacked experts)."""
    return [_find(model, name) for name in names]


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D, or a class that is made of it."""
    return _derives_conv1d(type(module))


@functools.cache
def _derives_conv1d(kind: type) -> bool:
    return any(types.is_conv1d(base) for base in kind.__mro__)


def is_matrix(module: nn.Module) -> bool:
    """nn.Linear, Conv1D, or a (quantised) module that stands for one and says how wide it is."""
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Linear) or is_conv1d(module) or all(isinstance(width, int) for width in widths)


@functools.cache
def derives(kind: type, name: str, package: str) -> bool:
    """Whether the class is that one or derived from it; asked without importing the package."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in kind.__mro__)


@functools.cache
def _wrapper(kind: type) -> str:
    """Which wrapper modules of that class are, "" for none: a model's many modules are of few classes."""
    if issubclass(kind, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "parallel"
    found = [name for name in ("PeftModel", "BaseTuner") if derives(kind, name, "peft")]
    return found[0] if found else ""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's, DistributedDataParallel's and PEFT's wrappers.

    What PEFT has put into the model's own layers stays at work; a learned prompt, which its wrapper alone adds, does
    not, and such a model is left as it is.
    """
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif not (kind := _wrapper(type(model))):
            return model
        elif kind == "parallel":
            model = model.module
        elif kind == "BaseTuner":
            model = model.model
        elif derives(type(model.base_model), "BaseTuner", "peft"):
            model = model.base_model.model
        else:
            return model


def inner(module: nn.Module) -> nn.Module:
    """The layer itself, inside a compiled one or one that PEFT has put an adapter around."""
    while True:
        below = unwrapped(module)
        if "base_layer" in below._modules:
            below = below._modules["base_layer"]
        if below is module:
            return module
        module = below


def walk(
    module: nn.Module, path: str = "", enter: Callable[[nn.Module], bool] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, without wrappers and their adapters: paths are those of the plain model.

    ``enter``: whether what lies below a module that was given is given too.
    """
    seen, left = set(), [(path, module)]
    while left:
        path, module = left.pop()
        module = inner(module)
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        if enter is None or enter(module):
            left += _children(path, module)


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Last first."""
    before = f"{path}." if path else ""
    return [(before + name, child) for name, child in reversed(module._modules.items()) if child is not None]


def _submodule(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module at ``path``, and its path without the names of wrappers; AttributeError if there is none."""
    module, plain = unwrapped(model), []
    parts = path.split(".") if path else []
    if parts[:2] == ["base_model", "model"] and "base_model" not in module._modules:
        parts = parts[2:]  # as PEFT's wrapper has them
    for part in parts:
        if part in ("_orig_mod", "base_layer") or part == "module" and part not in module._modules:
            continue
        child = module._modules.get(part)
        module = inner(module.get_submodule(part) if child is None else child)
        plain.append(part)
    return module, ".".join(plain)


def expanded(model: nn.Module, name: str) -> list[str]:
    """The names of all the experts' matrices, where ``name`` is that of their stack; else ``name`` itself."""
    path, _, parameter = name.removesuffix(".weight").rpartition(".")
    try:
        host, path = _submodule(model, path)
    except AttributeError:
        return [name]
    count = experts.stacked(host, parameter)
    return [f"{path}.{parameter}[{i}]" for i in range(count)] or [name]


def _find(model: nn.Module, name: str) -> Layer:
    path = name.removesuffix(".weight")
    try:
        if stacked := experts.parsed(name):
            host, path = _submodule(model, stacked[0])
            matrix = experts.matrix_of(host, *stacked[1:], shown(name))
            name = f"{path}.{stacked[1]}[{stacked[2]}]"
            return Layer(name, matrix, matrix.in_features, matrix.out_features, matrix.layout)
        module, path = _submodule(model, path)
    except AttributeError:
        if len(every := expanded(model, name)) > 1:
            raise ValueError(f"{shown(name)} holds {len(every)} experts; name one of them, {every[0]!r}.") from None
        matrices = [f"{p}.weight" for p, m in walk(model) if is_matrix(m)]
        near = difflib.get_close_matches(name[:200], matrices, n=3, cutoff=0.5) or matrices[-3:]
        raise ValueError(f"The model has no layer {shown(name)}. Near matches: {some(near)}.") from None
    if is_conv1d(module):
        m, n = module.weight.shape
        return Layer(f"{path}.weight", module, m, n, "in_out")
    if is_matrix(module):
        return Layer(f"{path}.weight", module, module.in_features, module.out_features, "out_in")
    raise ValueError(
        f"Layer {shown(name)} is a {type(module).__name__}, not a matrix that can be edited; "
        "name the weight of an nn.Linear or of a Hugging Face Conv1D."
    )


def keep_differentiable(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit layers stay as gradients can pass them, or be so again.

    On CPUs with units for bfloat16 products a pass without gradients packs their weights anew, in place, for a product
    that has none: what is asked of it later is wrong, with no more than a warning.
    """
    for module in types.modules_of(model):
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # which brings the weight back


def check_writable(layer: Layer) -> None:
    """A ValueError that says why a weight can't be written in place, and what to do instead."""
    weight, instead = layer.weight, "attach the edit instead: with edit.attached(model): ..."
    or_dense = f"{instead} Or apply it to the model unquantised (model.dequantize(), or loaded so), and quantise that."
    if not isinstance(weight, torch.Tensor):
        packer = type(layer.module).__name__
        raise ValueError(f"{layer.name} is quantised by {packer} and can't be edited in place; {or_dense}")
    kind = type(weight.data)
    if hasattr(weight, "quant_state") or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ValueError(f"{layer.name} is quantised ({weight.dtype}) and can't be edited in place; {or_dense}")
    if weight.is_meta:
        raise ValueError(
            f"{layer.name} is on the meta device and holds no numbers; load the model's weights first. "
            f"If a device map offloads them, {instead}"
        )
    if sharding.is_sharded(weight):
        try:
            sharding.slices_of(weight)
        except ValueError as error:
            raise ValueError(f"{layer.name} is sharded over devices, and {error}; {instead}") from error
        kind = type(sharding.local(weight))
    if weight.is_inference():
        raise ValueError(
            f"{layer.name} was made within torch.inference_mode and can't be written outside of it; load the model "
            "outside of that block (torch.no_grad is fine)."
        )
    if kind is not torch.Tensor:
        raise ValueError(f"{layer.name} is quantised (a {kind.__name__}) and can't be edited in place; {or_dense}")
    module = layer.module
    if not isinstance(module, experts.ExpertMatrix) and "weight" not in {**module._parameters, **module._buffers}:
        raise ValueError(
            f"{layer.name} is made anew of other parameters in each pass (weight_norm, spectral_norm, a "
            f"parametrization), so that what is written there is lost; {instead} Or bake them in first: "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')."
        )
    expected = (layer.n, layer.m) if layer.layout == "out_in" else (layer.m, layer.n)
    if tuple(weight.shape) != expected:
        raise ValueError(f"{layer.name} is stored as {tuple(weight.shape)}, not as {expected}; {instead}")


def check_untied(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Writing a weight that another module reads too would edit both: refuse."""
    names: dict[int, list[str]] = {id(layer.parameter): [] for layer in layers}
    left = [("", unwrapped(model))]
    while left:  # every way to a module that several hold
        path, module = left.pop()
        left += _children(path, module)
        for name, parameter in module._parameters.items():
            if id(parameter) in names:
                parts = [part for part in path.split(".") if part not in ("", "_orig_mod", "base_layer")]
                names[id(parameter)].append(".".join([*parts, name]))
    for layer in layers:
        own = layer.name.partition("[")[0]
        others = [name for name in names[id(layer.parameter)] if name != own]
        if others:
            raise ValueError(
                f"{layer.name} is tied to {', '.join(others)}: writing it would change both. "
                "Attach the edit instead: with edit.attached(model): ..."
            )


def first_layer(model: nn.Module) -> nn.Module:
    """Where tokens enter: the input embeddings, or the first module that has parameters where a model hides them."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if found is None:
        found = next(module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    return found


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: with its weights, or where accelerate brings offloaded ones to.

    Raises:
        ValueError: the weights are on the meta device, and nothing brings them anywhere.
    """
    module = getattr(module, "host", module) if isinstance(module, experts.ExpertMatrix) else module
    weight = next(iter(module.parameters(recurse=False)), None)
    if weight is None:  # packed weights may be buffers
        weight = next(iter(module.buffers()), torch.empty(0))
    if not weight.is_meta:
        return weight.device
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        raise ValueError(
            f"A {type(module).__name__} of the model is on the meta device and holds no numbers; load the model's "
            "weights (from_pretrained, with device_map if they must be split or offloaded)."
        )
    return torch.device(device if isinstance(device, str) else f"cuda:{device}" if isinstance(device, int) else device)


def device_of(layers: Sequence[Layer]) -> torch.device:
    """Where the editor lives: with the last edited layer, whose model may be split over devices."""
    return execution_device(layers[-1].module)
