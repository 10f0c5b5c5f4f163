"""The matrices of a mixture's routed experts where they are stacked: parameters [experts, n, m], as transformers 5 has
them. "….experts.down_proj[3]" names the matrix of expert 3.

Such a matrix is no module, and what it sees is a selection of the tokens. :class:`ExpertMatrix` stands for it. While
it carries hooks, the experts' forward is replaced by one that hands it as many rows as there are tokens, those that are
routed elsewhere being zeros: then a row's place says which sample it is of, and a row of zeros, as everywhere here,
takes no part.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

_NAME = re.compile(r"(?P<path>.+)\.(?P<parameter>\w+)\[(?P<index>\d{1,6})\]")
_SAYS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
_matrices: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


class ExpertMatrix(nn.Module):
    """One expert's matrix, for hooks to hold on to. No part of the model, whose weight it reads anew each time."""

    def __init__(self, host: nn.Module, parameter: str, index: int):
        super().__init__()
        self._host, self.parameter_name, self.index = weakref.ref(host), parameter, index
        first, second = host._parameters[parameter].shape[1:]
        self.in_features, self.out_features = (first, second) if host.is_transposed else (second, first)

    @property
    def host(self) -> nn.Module:
        return self._host()

    @property
    def stack(self) -> nn.Parameter:
        """The matrices of all the experts."""
        return self.host._parameters[self.parameter_name]

    @property
    def weight(self) -> torch.Tensor:
        return self.stack[self.index]

    @property
    def layout(self) -> str:
        return "in_out" if self.host.is_transposed else "out_in"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        host, bias = self.host, None
        if host.has_bias:
            bias = host._parameters[f"{self.parameter_name}_bias"][self.index]
        weight = self.weight.to(x.dtype)
        return linear(x, weight.T if host.is_transposed else weight, bias)


def parsed(name: str) -> tuple[str, str, int] | None:
    """The experts' module, the parameter's name and the expert; None for the name of another weight."""
    found = _NAME.fullmatch(name.removesuffix(".weight"))
    return (found["path"], found["parameter"], int(found["index"])) if found else None


def matrix_of(host: nn.Module, parameter: str, index: int, name: str) -> ExpertMatrix:
    """The one :class:`ExpertMatrix` of that matrix; ``name`` is for errors.

    Raises:
        ValueError: there is no such expert, or the module calls its experts in a way that is not known here.
    """
    stack = host._parameters.get(parameter)
    count = len(stack) if stack is not None and stack.dim() == 3 else 0
    if not count:
        raise ValueError(f"{name} names no expert: {type(host).__name__} holds no stacked matrices {parameter!r}.")
    if index >= count:
        raise ValueError(f"{name} names an expert that there isn't; the last one is {parameter}[{count - 1}].")
    if reason := problem(host, parameter):
        raise ValueError(
            f"{name} can't be edited by itself: {reason}. Edit the shared expert or the attention's output projection "
            "(layers=None chooses them)."
        )
    return _matrices.setdefault(host, {}).setdefault((parameter, index), ExpertMatrix(host, parameter, index))


def problem(host: nn.Module, parameter: str) -> str | None:
    """Why single experts of ``host`` can't be edited, or None."""
    if any(not hasattr(host, name) for name in _SAYS) or not (host.has_gate or hasattr(host, "act_fn")):
        return f"{type(host).__name__} does not say how it calls its experts (transformers' experts interface does)"
    if parameter not in _order(host) or any(name not in host._parameters for name in _order(host)):
        return f"{type(host).__name__} calls {parameter} in a way of its own"
    if getattr(host, "_is_expert_parallel", False):
        return "its experts are spread over devices"
    return None


def stacked(host: nn.Module, parameter: str) -> int:
    """How many matrices of experts are stacked in that parameter; 0 if it is none."""
    stack = host._parameters.get(parameter)
    return len(stack) if stack is not None and stack.dim() == 3 and hasattr(host, "num_experts") else 0


def _order(host: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if host.has_gate else "up_proj", "down_proj"


# -- calling them ------------------------------------------------------------------------------------------------------


class _Dispatch:
    """Stands for the experts' forward while one of their matrices carries a hook."""

    def __init__(self, host: nn.Module):
        self._host, self.slot, self.users = weakref.ref(host), _slot(host), set()
        self.before = vars(host).get(self.slot)

    def __call__(
        self,
        hidden_states: torch.Tensor,  # [N, H]
        top_k_index: torch.Tensor,  # [N, k]
        top_k_weights: torch.Tensor,  # [N, k]
    ) -> torch.Tensor:  # [N, H]
        host = self._host()
        result = torch.zeros_like(hidden_states)
        hooked = {index for (_, index), m in _matrices[host].items() if m._forward_hooks or m._forward_pre_hooks}
        routed = {index for index in top_k_index.unique().tolist() if index < host.num_experts}
        for index in sorted(routed | hooked):  # an edited one is told, too, that it sees nothing
            chosen = top_k_index == index
            rows = chosen.any(-1).nonzero()[:, 0]
            up, down = _order(host)
            x = _product(host, up, index, hidden_states[rows], rows, len(hidden_states))
            x = host._apply_gate(x) if host.has_gate else host.act_fn(x)
            y = _product(host, down, index, x, rows, len(hidden_states))
            if getattr(host, "has_post_expert_norm", False):
                y = host.post_expert_norm(y)
            share = (top_k_weights * chosen).sum(-1)[rows].unsqueeze(-1)
            result = result.index_add(0, rows, (y * share).to(result.dtype))
        return result

    def __deepcopy__(self, memo: dict) -> Callable:
        # a copy of the model has no hooks of ours
        copied = memo.get(id(self._host()))
        return self if copied is None else type(copied).forward.__get__(copied)


def _product(
    host: nn.Module, parameter: str, index: int, x: torch.Tensor, rows: torch.Tensor, tokens: int
) -> torch.Tensor:
    """x [R, m] -> [R, n]; through hooks, where there are any, as rows among those of all the tokens."""
    matrix = _matrices[host].get((parameter, index)) or ExpertMatrix(host, parameter, index)
    if not (matrix._forward_hooks or matrix._forward_pre_hooks):
        return matrix.forward(x)
    return matrix(x.new_zeros(tokens, x.shape[1]).index_copy(0, rows, x))[rows]


def _slot(host: nn.Module) -> str:
    """Where to put another forward: accelerate's, which brings offloaded weights, calls ``_old_forward``."""
    return "_old_forward" if "_old_forward" in vars(host) else "forward"


def engage(host: nn.Module, user: object) -> None:
    """Let hooks on the matrices of ``host`` be called, until each user is gone (:func:`release`)."""
    found = vars(host).get(_slot(host))
    if not isinstance(found, _Dispatch):
        found = _Dispatch(host)
    found.users.add(user)
    vars(host)[found.slot] = found


def release(host: nn.Module, user: object) -> None:
    """Harmless where ``user`` has not engaged them."""
    found = vars(host).get(_slot(host))
    if isinstance(found, _Dispatch):
        found.users.discard(user)
        if not found.users:
            vars(host).pop(found.slot)
            if found.before is not None:
                vars(host)[found.slot] = found.before
