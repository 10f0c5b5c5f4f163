"""Archives of the released MEND code: a torch pickle ``{"model": {...}, ...}``, in and out.

The state under "model", for a layer of m inputs and n outputs (D = m + n)::

    edit_lrs                          [layers], in the order of the released code's inner_params
    mend.<K>.{u,v}_{mean,std,s}       [m] for u, [n] for v (our delta); s is the running M2
    mend.<K>.k                        [1] rows seen; NaN, like the others, before the first
    mend.<K>.<part>.layers.<i>.       part: "mlp" [u ; delta], or "mlp1" (u) and "mlp2" (delta), one may be absent
        u [D, R], v [R, D], bias [D], mode_scale.weight [modes, D], mode_shift.weight [modes, D]
    model_config                      the base model's configuration, optional

K is "(m, n)" for a network that the layers of one shape share, else the weight's name with # for "." (then
without mode_scale and mode_shift). Older archives say "gtn." for "mend.". The released code computes
W + edit_lr * update, with the loss averaged over all tokens of a batch: alpha = -edit_lr.

Source: ``algs/mend.py``, ``nn.py`` and ``trainer.py`` of github.com/eric-mitchell/mend.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..choice import find_layers
from ..config import MendConfig
from ..editor import MendEditor
from ..files import atomic_write
from ..network import EditorNetwork, planned_networks
from ..schema import brief, differences, shown
from ..schema import some as _some
from .torch_file import Inert, StoredTensor, TorchFile

PREFIXES = ("mend", "gtn")
INITS = ("id", "xavier")
_MEANS = {"u_mean": "u_mean", "v_mean": "delta_mean"}
_STDS = {"u_std": "u_std", "v_std": "delta_std"}
_M2S = {"u_s": "u_m2", "v_s": "delta_m2"}
_STATISTICS = {**_MEANS, **_STDS, **_M2S}
_PARTS = {"mlp": "both", "mlp1": "u", "mlp2": "delta"}
_PARAMETERS = {"u": "U", "v": "V", "bias": "b", "mode_shift.weight": "o", "mode_scale.weight": "s"}
_SHARED = re.compile(r"\(\d+, \d+\)")
_SIZES = (
    "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "d_ff", "num_hidden_layers", "n_layer",
    "num_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip


@dataclass(frozen=True)
class _Style:
    """What differs between archives that mean the same; kept with an editor, so that a round trip is exact."""

    prefix: str = "mend"
    with_model_config: bool = True


def load_mend_archive(
    path: str | Path,
    model: nn.Module,
    *,
    inner_params: Sequence[str],
    norm: bool = True,
    init: str = "id",
    tokenizer: Any = None,
) -> MendEditor:
    """The editor in an archive of the released MEND code; nothing that the file names is imported or run.

    Its step sizes are alpha = -edit_lr, its ``loss_reduction`` is "batch". Tensors are read as float32. Which
    sides the network sees, its rank, its number of blocks and whether layers share it follow from the file.

    Args:
        path: the file, as ``torch.save`` wrote it (either layout).
        model: the base model that the editor was trained for.
        inner_params: names of the edited weights *in the order of the released configuration*: the order says
            which edit_lr and which mode belongs to which weight.
        norm: the released ``mend.norm``: whether u and delta are normalised.
        init: the released ``mend.init``: "id" (residual blocks) or "xavier" (without the residual connection).
        tokenizer: the model's tokenizer; needed for :meth:`MendEditor.edit`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated or foreign file; an archive for other weights, shapes or another kind of model.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}; choose one of {', '.join(INITS)}.")
    if isinstance(inner_params, str):
        raise TypeError(f"inner_params is the string {inner_params!r}; pass a list of weight names.")
    with TorchFile(path) as file:
        state = _state(file)
        prefix, networks = _networks(state, path)
        edit_lrs = _read(file, state, "edit_lrs")
        if edit_lrs.shape != (len(inner_params),):
            raise ValueError(
                f"{path} holds edit_lrs of shape {tuple(edit_lrs.shape)}, and inner_params names "
                f"{len(inner_params)} weights; pass the weights of the released configuration, in its order."
            )
        _check_model(state.get("model_config"), model, path)
        config = MendConfig(
            layers=list(inner_params),
            normalize=bool(norm),
            identity_init=init == "id",
            loss_reduction="batch",
            step_size=1.0,
            **_architecture(networks, path),
        )
        # Shapes first: what an archive of some hundred bytes announces may be of any size.
        planned = planned_networks(find_layers(model, config.layers), config)
        _check_names(planned, config.shared, networks, path)
        for name, network in planned.items():
            _check_shapes(network, networks[name], f"{path}: {prefix}.{name}")
        editor = MendEditor(model, tokenizer, config)
        _check_finite(edit_lrs, f"{path}: edit_lrs")
        with torch.no_grad():
            editor.alpha_multiplier.copy_(-edit_lrs)
            for name, network in editor.networks.items():
                values = _values(file, state, f"{prefix}.{name}", network)
                _fill(network, values, f"{path}: {prefix}.{name}")
    editor._mend_archive = _Style(prefix, "model_config" in state)
    return editor


def save_mend_archive(editor: MendEditor, path: str | Path) -> None:
    """Write an editor as the released MEND code does; atomic.

    edit_lrs are minus the step sizes. ``norm`` and ``init`` have no place in the format: pass them on loading
    (``config.normalize``; "id" where ``config.identity_init``, else "xavier"). Other settings without a place
    are warned of. ``model_config`` is written as a plain dict, readable under ``torch.load(weights_only=True)``.
    An archive that was loaded is written with the keys that it had.
    """
    style = getattr(editor, "_mend_archive", _Style())
    state: OrderedDict[str, Any] = OrderedDict(edit_lrs=-editor.alphas().detach().cpu())
    for name, network in editor.networks.items():
        for suffix, tensor in _written_statistics(network):
            state[f"{style.prefix}.{name}.{suffix}"] = tensor
        for suffix, tensor in _parameters(network):
            state[f"{style.prefix}.{name}.{suffix}"] = tensor.detach().cpu().contiguous()
    if style.with_model_config:
        # An OrderedDict: releases of transformers compare it with a configuration without failing.
        plain = json.loads(editor.model.config.to_json_string(use_diff=False))
        state["model_config"] = OrderedDict(plain)
    plain, ours = MendConfig(loss_reduction="batch"), editor.config
    lost = [
        f"{name}={getattr(ours, name)!r}"
        for name in ("loss_reduction", "precision", "prompt_template", "separator", "append_eos")
        if getattr(ours, name) != getattr(plain, name)
    ]
    if lost:
        warnings.warn(
            f"An archive of the released code has no place for {', '.join(lost)}: set it again after loading. "
            "(The released code averages the loss over all tokens of a batch; single edits are the same.)",
            stacklevel=2,
        )
    buffer = io.BytesIO()
    # The released code deletes "opt" from what it loads, so the entry has to be there.
    torch.save({"model": state, "opt": None, "lr_opt": None}, buffer)
    atomic_write(path, buffer.getvalue())


def describe_mend_archive(path: str | Path) -> dict[str, Any]:
    """What an archive says of its editor, without the model: "model_type", where it names one, "edited_weights", how
    many, "networks", their names, "shared", "sides", "rank" and "blocks".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated or foreign file.
    """
    with TorchFile(path) as file:
        state = _state(file)
        _, networks = _networks(state, path)
        edit_lrs = _read(file, state, "edit_lrs")
    config = state.get("model_config")
    values = config.state if isinstance(config, Inert) else config
    kind = values.get("model_type") if isinstance(values, dict) else None
    return {
        "model_type": brief(kind, 60) if isinstance(kind, str) else None,
        "edited_weights": edit_lrs.numel(),
        "networks": [name.replace("#", ".") for name in networks],
        **_architecture(networks, path),
    }


# -- reading ---------------------------------------------------------------------------------------------------


def _state(file: TorchFile) -> dict[str, Any]:
    state = file.content.get("model") if isinstance(file.content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(
            f"{file.path} is no archive of the released MEND code: that is a dict with the state under 'model'."
        )
    return state


def _networks(
    state: Mapping[str, Any], path: str | Path
) -> tuple[str, dict[str, dict[str, tuple[int, ...]]]]:
    """The prefix, and for each network the shapes of its tensors, by their names within it."""
    networks: dict[str, dict[str, tuple[int, ...]]] = {}
    prefixes, other = set(), []
    for key, value in state.items():
        prefix, _, rest = key.partition(".")
        name, _, suffix = rest.partition(".")
        if prefix in PREFIXES and suffix:
            prefixes.add(prefix)
            networks.setdefault(name, {})[suffix] = tuple(getattr(value, "shape", ()))
        elif key not in ("edit_lrs", "model_config"):
            other.append(key)
    if not networks or other or len(prefixes) > 1:
        shown = other or sorted(prefixes) or list(state) or ["nothing"]
        raise ValueError(
            f"{path} is no archive of a released MEND editor: its state should hold edit_lrs and keys under "
            f"'mend.' or 'gtn.', and it holds {_some(shown)}."
        )
    return prefixes.pop(), networks


def _architecture(networks: Mapping[str, Mapping[str, tuple[int, ...]]], path: str | Path) -> dict[str, Any]:
    """``shared``, ``sides``, ``rank`` and ``blocks`` of the configuration, from the keys and shapes."""
    shared = {bool(_SHARED.fullmatch(name)) for name in networks}
    if len(shared) > 1:
        raise ValueError(f"{path} holds shared and unshared networks together: {_some(networks)}.")
    sides, smaller, blocks, ranks = set(), True, set(), []
    for name, shapes in networks.items():
        parts = {suffix.split(".")[0] for suffix in shapes if suffix.split(".")[0] in _PARTS}
        side = {("mlp",): "both", ("mlp1", "mlp2"): "separate", ("mlp1",): "u", ("mlp2",): "delta"}.get(
            tuple(sorted(parts))
        )
        if side is None:
            raise ValueError(
                f"{path}: network {brief(name, 48)} holds {_some(sorted(parts) or shapes)}; "
                "it should hold mlp, or mlp1, mlp2 or both."
            )
        sides.add(side)
        m, n = (math.prod(shapes.get(key, ())) for key in ("u_mean", "v_mean"))
        smaller &= side == ("delta" if m > n else "u")
        for part in parts:
            indices = {match[1] for s in shapes if (match := re.match(rf"{part}\.layers\.(\d+)\.", s))}
            if indices != {str(i) for i in range(len(indices))} or not indices:
                found = _some(s for s in shapes if s.startswith(part + "."))
                raise ValueError(
                    f"{path}: {brief(name, 48)}.{part} holds {found}, not "
                    "layers.0, layers.1, ...: only the released code's mlp_class IDMLP is known."
                )
            blocks.add(len(indices))
            ranks += [shapes[s][0] for i in indices if shapes.get(s := f"{part}.layers.{i}.v")]
    if len(sides) > 1 and not smaller:
        raise ValueError(f"{path}: its networks see different sides ({', '.join(sorted(sides))}).")
    if len(blocks) > 1:
        raise ValueError(f"{path}: its networks have different numbers of layers ({sorted(blocks)}).")
    return {
        "shared": shared.pop(),
        "sides": sides.pop() if len(sides) == 1 else "smaller",
        "blocks": blocks.pop(),
        # A network narrower than the rank has its own width as rank.
        "rank": max(ranks, default=1) or 1,
    }


def _check_names(
    planned: Mapping[str, EditorNetwork], shared: bool, networks: Mapping[str, Any], path: str | Path
) -> None:
    here, there = list(planned), list(networks)
    if set(here) != set(there):
        kind = "shapes (inputs, outputs)" if shared else "weights"
        raise ValueError(
            f"{path} holds networks for the {kind} {_some(n.replace('#', '.') for n in there)}, and inner_params "
            f"needs {_some(n.replace('#', '.') for n in here)}: another model, or other weights of it."
        )
    if here != there:
        warnings.warn(
            f"{path} lists its networks as {_some(n.replace('#', '.') for n in there)}, and inner_params as "
            f"{_some(n.replace('#', '.') for n in here)}. The released code writes them in the order of its "
            "inner_params, which says whose edit_lr and mode is whose: pass them in that order.",
            stacklevel=3,
        )


def _expected(network: EditorNetwork) -> dict[str, tuple[int, ...]]:
    """The names and shapes of one network's tensors in the archive."""
    expected = {"k": (1,)}
    expected |= {name: tuple(network.get_buffer(ours).shape) for name, ours in _STATISTICS.items()}
    return expected | {name: tuple(parameter.shape) for name, parameter in _parameters(network)}


def _check_shapes(network: EditorNetwork, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    if wrong := differences(shapes, _expected(network)):
        raise ValueError(f"{where} does not fit the weights that inner_params names: {'; '.join(wrong[:3])}.")


def _values(file: TorchFile, state: Mapping[str, Any], prefix: str, network: EditorNetwork) -> dict[str, torch.Tensor]:
    """The tensors of one network, by name."""
    return {name: _read(file, state, f"{prefix}.{name}") for name in _expected(network)}


def _read(file: TorchFile, state: Mapping[str, Any], key: str) -> torch.Tensor:
    if key not in state:
        raise ValueError(f"{file.path} holds no {key}; it is no whole archive of a released MEND editor.")
    if not isinstance(state[key], StoredTensor):
        found = repr(state[key]) if isinstance(state[key], Inert) else shown(state[key])
        raise ValueError(f"{file.path}: {brief(key, 60)} is {found}, not a tensor.")
    return file.tensor(state[key])


def _fill(network: EditorNetwork, values: Mapping[str, torch.Tensor], where: str) -> None:
    k = values["k"].item()
    if k == k and not (0 <= k <= 2**53 and k == int(k)):
        raise ValueError(
            f"{where}.k is {k}; the number of rows seen should be a whole number, or NaN for none."
        )
    network.count.fill_(0 if k != k else int(k))
    for name, ours in _STATISTICS.items():
        # Before two rows were seen the released code has NaN where we have 0, and 1 for the deviations.
        if not (values[name].isnan().all() and network.count < 2):
            _check_finite(values[name], f"{where}.{name}", unless=not network.normalize)
            if network.normalize and name not in _MEANS and (values[name] < 0).any():
                raise ValueError(f"{where}.{name} is negative; the archive is damaged. Fetch it again.")
            network.get_buffer(ours).copy_(values[name])
    for name, parameter in _parameters(network):
        _check_finite(values[name], f"{where}.{name}")
        parameter.copy_(values[name])


def _check_finite(tensor: torch.Tensor, name: str, unless: bool = False) -> None:
    if not unless and not tensor.float().isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinity; the archive was saved from a training run that diverged."
        )


def _check_model(found: Any, model: nn.Module, path: str | Path) -> None:
    """A readable ``model_config`` must be of the model's kind; other sizes are warned of."""
    values = found.state if isinstance(found, Inert) else found
    if not isinstance(values, dict):
        return
    kind, here = values.get("model_type"), model.config.model_type
    if isinstance(found, Inert) and found.origin.startswith("transformers."):
        name = found.origin.rsplit(".", 1)[-1]
        if name.endswith("Config") and name not in (cls.__name__ for cls in type(model.config).__mro__):
            raise ValueError(
                f"{path} was trained for a model of {brief(name, 60)}; this one has {type(model.config).__name__}."
            )
    elif isinstance(kind, str) and kind != here:
        raise ValueError(f"{path} was trained for a {brief(kind, 60)} model; this one is a {here}.")
    differing = [
        f"{name} {values[name]} (here {getattr(model.config, name)})"
        for name in _SIZES
        if isinstance(values.get(name), int) and getattr(model.config, name, values[name]) != values[name]
    ]
    if differing:
        warnings.warn(f"{path} was trained for a model with {', '.join(differing)}.", stacklevel=3)


# -- both ways -------------------------------------------------------------------------------------------------


def _parameters(network: EditorNetwork) -> Iterator[tuple[str, torch.Tensor]]:
    """A network's parameters by their names in the archive."""
    for part, side in _PARTS.items():
        for i, block in enumerate(getattr(network, side) or ()):
            for name, ours in _PARAMETERS.items():
                if getattr(block, ours) is not None:
                    yield f"{part}.layers.{i}.{name}", getattr(block, ours)


def _written_statistics(network: EditorNetwork) -> Iterator[tuple[str, torch.Tensor]]:
    count = int(network.count)
    for name, ours in _STATISTICS.items():
        tensor = network.get_buffer(ours).detach().cpu().contiguous()
        unseen = count == 0 or (count == 1 and name in _STDS)
        if unseen and (tensor == (1 if name in _STDS else 0)).all():
            tensor = torch.full_like(tensor, float("nan"))
        yield name, tensor
    k = torch.tensor([float("nan") if count == 0 else count], dtype=torch.float32)
    # Beyond 2^24 a float32 may round the count.
    yield "k", k if count == 0 or int(k) == count else torch.tensor([count], dtype=torch.float64)
