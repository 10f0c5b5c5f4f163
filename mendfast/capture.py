"""The (u, delta) rows out of a model, and low-rank updates into one, by hooks and replaced forwards.

What these blocks change on a model is noted before it is changed and put back however the block ends, an interrupt
in the midst of putting back included. Those that change how the whole model answers (``frozen``, ``capture``) keep
the model's lock (:func:`mendfast.locks.exclusive`) to their end; other threads' forward passes aren't held up, and
see a frozen model meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from . import experts, ops
from .choice import experts_in
from .layers import Layer, unwrapped
from .ledger import ledger_of, settle
from .locks import exclusive, holding
from .ops.frozen_linear import frozen_forwards
from .sharding import is_sharded, slices_of
from .types import modules_of

UNSERVED = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a pass by another way than the model's own raises where the model keeps other things than keys and values."""


def agree(found: torch.Tensor, expected: torch.Tensor, slack: float = 1) -> bool:
    """Whether two ways of one pass give the same, to the rounding of their dtype through many blocks; ``slack`` times
    that, where other kernels run."""
    bound = slack * min(0.05, 10 * torch.finfo(expected.dtype).eps ** 0.75)
    return bool((found - expected).norm() <= bound * expected.norm())

Factors = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | float"]
"""u [T, m], delta [T, n], alpha: one update for all samples; or u [G, T, m], delta [G, T, n]: G groups of
consecutive samples, each with its own."""


class Changes:
    """How to put back what was changed; to do it twice does no harm."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def note(self, undo: Callable[[], object]) -> None:
        """To be called before the change is made."""
        self._steps.append(undo)

    def undo(self) -> None:
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def hook(self, module: nn.Module, hook: Callable, *, before: bool = False) -> None:
        """Register a forward hook, or one that runs before the forward, until the changes are undone."""
        if isinstance(module, experts.ExpertMatrix):
            user = object()
            self.note(functools.partial(experts.release, module.host, user))
            experts.engage(module.host, user)
        self.note(functools.partial(_unhook, module, hook))
        (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)


def _unhook(module: nn.Module, hook: Callable) -> None:
    # by the hook and not by its handle, which an interrupted registration doesn't give
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, other in list(hooks.items()) if other is hook]:
            hooks.pop(key, None)


@contextlib.contextmanager
def undone() -> Iterator[Changes]:
    """Within the block changes can be noted; they are put back at its end."""
    changes = Changes()
    try:
        try:
            yield changes
        finally:
            changes.undo()
    finally:  # again, for what an interrupt of the first left
        changes.undo()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode and none of its parameters asks for a gradient.

    On a CPU its linear layers then use :mod:`mendfast.ops.frozen_linear`.
    """
    with exclusive(model), undone() as changes:
        modules = modules_of(model)
        training = [module for module in modules if module.training]
        wanting = [p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad]

        def thaw() -> None:
            for module in training:
                module.training = True
            for parameter in wanting:
                parameter.requires_grad_(True)

        changes.note(thaw)
        for module in training:
            module.training = False
        for parameter in wanting:
            parameter.requires_grad_(False)
        with replaced_forwards(frozen_forwards(model)):
            yield


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within the block the modules run these functions; a forward that accelerate has put there comes back."""
    with undone() as changes:
        for module, forward in forwards.items():
            changes.note(functools.partial(_put_back, module, "forward", vars(module).get("forward")))
            module.forward = forward
        yield


class _Enough(Exception):
    """The forward pass has given what was asked for."""


@contextlib.contextmanager
def ended_after(block: nn.Module | None) -> Iterator[None]:
    """A forward pass within the block ends, and the block with it, once the module ``block`` has run; None: at its
    own end."""

    def end(module: nn.Module, args: tuple, output: object) -> None:
        raise _Enough

    with undone() as changes, contextlib.suppress(_Enough):
        if block is not None:
            changes.hook(block, end)
        yield


def _put_back(module: nn.Module, name: str, value: object | None) -> None:
    vars(module).pop(name, None)
    if value is not None:
        vars(module)[name] = value


class Captured:
    """What the edited layers saw in one forward pass of the thread that captures."""

    def __init__(self, layers: Sequence[Layer], batch_size: int):
        self.layers, self.batch_size = layers, batch_size
        self._thread = threading.get_ident()
        self._calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {layer.name: [] for layer in layers}

    def _hook(self, layer: Layer) -> Callable:
        name = layer.name

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            if threading.get_ident() != self._thread:
                return output
            if not isinstance(output, torch.Tensor):
                raise ValueError(
                    f"{name} gives a {type(output).__name__} and no tensor (a {type(module).__name__} that counts in "
                    "whole numbers, perhaps), so it can't be edited; load the model without that, or name other layers."
                )
            if not output.requires_grad:
                # The graph starts here: nothing below the first edited layer is differentiated.
                output = output.detach().requires_grad_()
            if output.shape[-1] != layer.n or is_sharded(args[0]):
                raise ValueError(
                    f"{name} is computed in parallel by several processes, each of which sees a part of its rows; make "
                    "the edit on a model that is whole or sharded by FSDP2, save it, and use it here: "
                    "Edit.load(path).apply_(model)."
                )
            # A split model may hand a layer its input on the device of the block before.
            self._calls[name].append((args[0].detach().to(output.device), output))
            return output

        return hook

    def rows(self, loss: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """u [B, S, m] and delta [B, S, n] of every layer: its inputs and the gradient of ``loss``, a sum over
        samples, at its outputs. A layer called more than once has its calls one after the other along S."""
        outputs = [output for calls in self._calls.values() for _, output in calls]
        if silent := [name for name, calls in self._calls.items() if not calls and not experts_in(name)]:
            raise ValueError(f"The forward pass did not run {', '.join(silent)}; edit layers that it runs.")
        if not loss.requires_grad:
            raise ValueError(
                f"The loss does not depend on what {', '.join(self._calls)} put out, as far as PyTorch can follow: the "
                "model computes its blocks by a function of its own (reversible blocks, as Reformer's) or without "
                "gradients. Such layers can't be edited; name others, or use a model of another kind."
            )
        gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
        result = {}
        for layer in self.layers:
            us, deltas = [], []
            for x, output in self._calls[layer.name]:
                gradient = next(gradients)
                gradient = torch.zeros_like(output) if gradient is None else gradient
                us.append(x.reshape(self.batch_size, -1, layer.m))
                deltas.append(gradient.reshape(self.batch_size, -1, layer.n))
            if not us:  # a routed expert that none of the tokens came to
                device = loss.device
                us, deltas = [torch.zeros(1, 0, layer.m, device=device)], [torch.zeros(1, 0, layer.n, device=device)]
            result[layer.name] = (torch.cat(us, 1), torch.cat(deltas, 1)) if len(us) > 1 else (us[0], deltas[0])
        return result


@contextlib.contextmanager
def capture(model: nn.Module, layers: Sequence[Layer], batch_size: int) -> Iterator[Captured]:
    """Within the block a forward pass of this thread records the layers' inputs and outputs.

    The graph starts at the first edited layer's output and holds no parameter. torch.inference_mode is left, and a
    compiled model runs uncompiled: what the compiler made of it knows no hooks.

    Raises:
        ValueError: weights that were made within torch.inference_mode, that an interrupted edit left half written, or,
            for more than one sample, of routed experts that are modules.
    """
    settle(model)
    if made := [layer.name for layer in layers if getattr(layer.weight, "is_inference", bool)()]:
        raise ValueError(
            f"{made[0]} was made within torch.inference_mode, and no gradient passes such a tensor; "
            "load the model outside of that block (torch.no_grad is fine)."
        )
    if batch_size > 1:
        _refuse_routed(layers)
    captured = Captured(layers, batch_size)
    with exclusive(model), torch.inference_mode(False), undone() as changes:
        for layer in layers:
            changes.hook(layer.module, captured._hook(layer))
        changes.note(functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()))
        _uncompiled(changes)
        with frozen(model):
            torch.set_grad_enabled(True)
            yield captured


def _refuse_routed(layers: Sequence[Layer]) -> None:
    if routed := [layer.name for layer in layers if experts_in(layer.name)]:
        raise ValueError(
            f"{routed[0]} belongs to a routed expert, which sees a selection of the tokens, so its rows can't be told "
            "apart by sample; take one at a time (batch_size=1, loss_reduction='edit'), or edit the shared expert or "
            "the attention's output projection (layers=None chooses them)."
        )


@contextlib.contextmanager
def lowrank_updates(
    layers: Sequence[Layer],
    factors: Mapping[str, Factors],
    model: nn.Module | None = None,
    *,
    private: bool = False,
) -> Iterator[None]:
    """Within the block every layer computes y - alpha (x u^T) delta, its weight untouched.

    Blocks nest: each adds its own update, since all of them see the same x. The passes of other threads see the
    update too; a copy of the model made meanwhile does not have it. With ``model``, its lock is taken for
    the moments of entering and leaving, and its ``save_pretrained`` refuses within the block.

    Args:
        private: only this thread's passes see the update, those within :func:`without_edits` too.
    """
    thread = threading.get_ident() if private else None
    with undone() as changes:
        with exclusive(model) if model is not None else contextlib.nullcontext():
            for layer in layers:
                if layer.name in factors:
                    changes.hook(layer.module, _lowrank_hook(layer, *factors[layer.name], thread))
            if model is not None:
                _refuse_saving(unwrapped(model), changes)
            _uncompiled(changes)
        yield


_here = threading.local()


@contextlib.contextmanager
def without_edits(model: nn.Module) -> Iterator[None]:
    """Within the block this thread's passes see the model as it is without edits, neither applied nor attached.

    Applied ones are taken out of the weights, and come back bit for bit; meanwhile no other thread edits the model.
    """
    with ledger_of(model).lifted():
        before = getattr(_here, "bare", False)
        try:
            try:
                _here.bare = True
                yield
            finally:
                _here.bare = before
        finally:  # again, should the first be interrupted
            _here.bare = before


def _lowrank_hook(
    layer: Layer, u: torch.Tensor, delta: torch.Tensor, alpha: torch.Tensor | float, thread: int | None
) -> Callable:
    if u.dim() == 3 and len(u) > 1:
        _refuse_routed([layer])
    placed = {u.device: (u, delta, alpha)}  # the editor's; from the second call on also where the layer is

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        # deepcopy copies hooks along, DataParallel's replicas need them
        if module is not layer.module and not getattr(module, "_is_replica", False):
            return output
        if getattr(_here, "bare", False) if thread is None else threading.get_ident() != thread:
            return output
        device = output.device
        if (found := placed.get(device)) is None:
            there = alpha.to(device) if isinstance(alpha, torch.Tensor) else alpha
            found = placed[device] = (u.to(device), delta.to(device), there)
        us, deltas, step = found
        x = (args[0].full_tensor() if is_sharded(args[0]) else args[0]).to(device)
        if output.shape[-1] != layer.n:  # tensor parallelism: these are the outputs of the rows that lie here
            deltas = deltas[..., slices_of(layer.weight)[layer.layout == "in_out"]]
        if us.dim() == 2:
            return ops.lowrank_linear(output, x, us, deltas, step)
        groups = us.shape[0]
        y, x = output.reshape(groups, -1, output.shape[-1]), x.reshape(groups, -1, layer.m)
        y = ops.lowrank_linear(y, x, us, deltas, step)
        return torch.ops.aten._unsafe_view(y, output.shape)  # some models add to it in place, which a view forbids

    return hook


# -- what surrounds a model ----------------------------------------------------------------------------------------


class _Refusal:
    """Stands for ``model.save_pretrained`` while edits are attached."""

    def __init__(self, model: nn.Module):
        self.model, self.before, self.blocks = model, vars(model).get("save_pretrained"), set()

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError(
            "An edit is attached to this model, and save_pretrained would write the weights without it. Write it "
            "into them first, with edit.apply_(model) or `mendfast apply`, or save the unedited model outside of "
            "the block."
        )

    def __deepcopy__(self, memo: dict) -> object:
        # a copy of the model has no edit attached
        copied = memo.get(id(self.model))
        return self if copied is None else functools.partial(type(copied).save_pretrained, copied)


def _refuse_saving(model: nn.Module, changes: Changes) -> None:
    if not hasattr(type(model), "save_pretrained"):
        return
    refusal, block = vars(model).get("save_pretrained"), object()
    if not isinstance(refusal, _Refusal):
        refusal = _Refusal(model)

    def allow() -> None:
        with exclusive(model):
            refusal.blocks.discard(block)
            if not refusal.blocks and vars(model).get("save_pretrained") is refusal:
                _put_back(model, "save_pretrained", refusal.before)

    changes.note(allow)
    refusal.blocks.add(block)
    vars(model)["save_pretrained"] = refusal


_stance_lock = threading.RLock()
_eager: set[object] = set()
_stance: list = []  # torch.compiler.set_stance, while there is a block


def _uncompiled(changes: Changes) -> None:
    """Let every compiled function run as it was written: the compiler doesn't look whether hooks have changed.

    What is compiled within the block, by a compiler that was not loaded before, holds the hooks, and is dropped.
    """
    if torch.compiler.is_compiling():
        return
    if "torch._dynamo" not in sys.modules:
        changes.note(lambda: sys.modules["torch._dynamo"].reset() if "torch._dynamo" in sys.modules else None)
        return
    block = object()

    def leave() -> None:
        with holding(_stance_lock):
            _eager.discard(block)
            if _stance and not _eager:
                _stance[0].__exit__(None, None, None)
                _stance.clear()

    changes.note(leave)
    with holding(_stance_lock):
        _eager.add(block)
        if not _stance:
            _stance.append(torch.compiler.set_stance("force_eager"))
