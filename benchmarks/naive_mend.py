"""MEND as Algorithms 1 and 2 of the paper write it: one edit at a time, with d x d gradients and weights.

The opponent and the check of ``mendfast.training.meta_loss``. It shares the editor's parameters, and no code
with the package but the reference.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mendfast import MendEditor, reference
from mendfast.types import C_EDIT

Batch = Mapping[str, torch.Tensor]


def logits_of(model: nn.Module, batch: Batch, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """All logits [B, S, V] of a batch; a causal model's positions follow its mask, so that padding moves none."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    elif "Causal" in type(model).__name__ or "LMHead" in type(model).__name__:
        inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return functional_call(model, dict(weights or {}), kwargs=inputs).logits


def _wide(values: torch.Tensor) -> torch.Tensor:
    """float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def nll(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the labels of one example."""
    if labels.dim() == 1:
        if logits.shape[-1] == 1:
            return F.binary_cross_entropy_with_logits(_wide(logits[:, 0]), _wide(labels.to(logits.dtype)))
        return F.cross_entropy(_wide(logits), labels)
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(_wide(logits.flatten(0, 1)), labels.flatten(), ignore_index=-100)


def kl(base: torch.Tensor, edited: torch.Tensor, batch: Batch, model: nn.Module) -> torch.Tensor:
    """KL(base || edited), the mean over the positions that the (decoder's) mask keeps."""
    if base.dim() == 2:
        base, edited = base.unsqueeze(1), edited.unsqueeze(1)
        mask = torch.ones(base.shape[:2], device=base.device)
    elif model.config.is_encoder_decoder:
        mask = batch["labels"] != -100
    else:
        mask = batch["attention_mask"]
    if base.shape[-1] == 1:
        base, edited = (torch.cat([torch.zeros_like(z), z], -1) for z in (base, edited))
    log_p, log_q = _wide(base).log_softmax(-1), _wide(edited).log_softmax(-1)
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (per_token * mask).sum() / mask.sum()


@contextlib.contextmanager
def frozen_below(editor: MendEditor) -> Iterator[None]:
    """As EasyEdit has its model: no parameter that is registered before the first edited weight asks for a gradient,
    so that no backward pass goes below it. Its results are the same."""
    edited = {id(layer.weight) for layer in editor.layers}
    below = list(itertools.takewhile(lambda p: id(p) not in edited, editor.model.parameters()))
    asked = [parameter for parameter in below if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def inner_rows(editor: MendEditor, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """u [N, m] and delta [N, n] of every layer, by a backward pass through the whole model."""
    model, seen = editor.model, {}

    def hook(name: str):
        def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0], output)

        return keep

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in editor.layers]
    nll(model, logits_of(model, batch), batch["labels"]).backward()
    for handle in handles:
        handle.remove()
    rows = {}
    for name, (u, y) in seen.items():
        u, delta = _wide(u.detach().flatten(0, -2)), _wide(y.grad.flatten(0, -2))
        kept = (u != 0).any(-1) & (delta != 0).any(-1)
        rows[name] = (u[kept], delta[kept])
    model.zero_grad(set_to_none=True)
    return rows


def edited_weights(editor: MendEditor, batch: Batch) -> dict[str, torch.Tensor]:
    """Algorithm 2 for one example: W~ = W - alpha sum_i delta~_i u~_i^T, each W~ a full matrix."""
    rows, weights, position = inner_rows(editor, batch), {}, {}
    for layer, alpha in zip(editor.layers, editor.alphas(), strict=True):
        key = str(layer.shape)
        mode = position[key] = position.get(key, -1) + 1
        net, (u, delta) = editor.networks[key], rows[layer.name]
        blocks = [block.tuple() for block in net.both]
        modes = torch.full((len(u),), mode, device=u.device)
        u, delta = reference.editor_mlp(u, delta, net.stats(), blocks, modes)
        gradient = delta.T @ u if layer.layout == "out_in" else u.T @ delta
        weights[layer.name] = layer.weight - (alpha * gradient).to(layer.weight.dtype)
    return weights


def meta_step(
    editor: MendEditor,
    inner: Batch,
    outer: Batch,
    loc: Batch,
    c_edit: float = C_EDIT,
    c_loc: float = 1.0,
    *,
    freeze_below: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Algorithm 1 on a batch, one edit after the other; adds to the editor's gradients.

    ``outer`` and ``loc`` hold the same number of samples for each edit, in order. Returns total, edit and
    locality loss, each the mean over edits. ``freeze_below``: within :func:`frozen_below`.
    """
    if freeze_below:
        with frozen_below(editor):
            return meta_step(editor, inner, outer, loc, c_edit, c_loc)
    model, size = editor.model, len(inner["labels"])
    per_outer, per_loc = len(outer["input_ids"]) // size, len(loc["input_ids"]) // size
    sums = torch.zeros(3, dtype=torch.promote_types(model.dtype, torch.float32), device=editor.device)
    for i in range(size):
        weights = edited_weights(editor, {k: v[i : i + 1] for k, v in inner.items()})
        l_edit = l_loc = 0.0
        for j in range(i * per_outer, (i + 1) * per_outer):
            one = {k: v[j : j + 1] for k, v in outer.items()}
            l_edit = l_edit + nll(model, logits_of(model, one, weights), one["labels"]) / per_outer
        for j in range(i * per_loc, (i + 1) * per_loc):
            one = {k: v[j : j + 1] for k, v in loc.items()}
            base = logits_of(model, one).detach()
            l_loc = l_loc + kl(base, logits_of(model, one, weights), one, model) / per_loc
        total = c_edit * l_edit + c_loc * l_loc
        (total / size).backward()
        model.zero_grad(set_to_none=True)
        sums += torch.stack([total, l_edit, l_loc]).detach() / size
    return sums[0], sums[1], sums[2]
