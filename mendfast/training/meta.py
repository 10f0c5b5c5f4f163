"""The meta-training loss (Mitchell et al. 2022, Algorithm 1) for B edits side by side."""

from __future__ import annotations

import torch

from .. import ops
from ..capture import frozen, lowrank_updates
from ..editor import MendEditor
from ..layers import execution_device
from ..objective import Batch, Rows, kept_rows, per_sample_mean, target_rows, to_device
from .prefix import FrozenPrefix
from .recompute import recomputed_updates


def meta_loss(
    editor: MendEditor,
    edit_inner: Batch,
    edit_outer: Batch,
    loc: Batch,
    c_edit: float = 0.1,
    c_loc: float = 1.0,
    joint: bool | int = False,
    *,
    checkpoint_activations: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """c_edit * NLL(outer; edited) + c_loc * KL(base || edited on loc), differentiable in the editor.

    Every sample of ``edit_inner`` becomes a low-rank update of its own, and the samples of ``edit_outer`` and
    ``loc`` run under the update of their edit, so that one forward and one backward pass serve B independent
    edits.

    Args:
        edit_inner: B examples to edit by: input_ids, attention_mask, labels, as ``editor.edit_tokens``.
        edit_outer: B * r examples that the edited models should answer, those of the first edit first.
        loc: B * q examples whose predictions should stay, in the same order. Labels are used only as an
            encoder-decoder's decoder inputs.
        joint: False: each edit alone. k: each k consecutive examples are one edit, the sum of their updates
            (B and the sizes of the other batches must be multiples of B / k). True: all B are one edit.
        checkpoint_activations: keep only the inputs of the blocks that gradients pass, and compute the rest again
            in the backward pass: less memory for about one more forward pass, the results the same.

    Returns:
        The scalar total, and its parts, detached: "l_edit", "l_loc", and "edit_success", the share of outer
        samples all of whose labels are the edited model's first choice.
    """
    size = edit_inner["labels"].shape[0]
    group = size if joint is True else int(joint) or 1
    model = editor.model
    device = execution_device(model.get_input_embeddings())
    edit_outer, loc = to_device(edit_outer, device), to_device(loc, device)
    groups = size // group
    for name, batch in (("edit_outer", edit_outer), ("loc", loc)):
        samples = len(batch["input_ids"])
        if samples % groups:
            raise ValueError(f"{name} has {samples} samples for {groups} edits; pass the same number for each.")

    factors = editor.group_factors(edit_inner, group)
    prefix = FrozenPrefix(model, editor.layers)
    with frozen(model):
        with torch.no_grad(), prefix.recorded():
            base = kept_rows(model, loc)
        updates = lowrank_updates(editor.layers, factors)
        if checkpoint_activations:
            updates = recomputed_updates(model, editor.layers, factors, prefix.blocks)
        with updates:
            with prefix.replayed():
                edited = kept_rows(model, loc)
            outer = target_rows(model, edit_outer)
    by_sample = editor.config.loss_reduction == "edit"
    l_edit = _mean(ops.token_nll_rows(outer.logits, outer.labels), outer, edit_outer, by_sample)
    l_loc = _mean(ops.kl_divergence_rows(base.logits, edited.logits), edited, loc, by_sample)
    total = c_edit * l_edit + c_loc * l_loc
    return total, {
        "l_edit": l_edit.detach(),
        "l_loc": l_loc.detach(),
        "edit_success": all_correct(outer, len(edit_outer["input_ids"])).float().mean(),
    }


def _mean(values: torch.Tensor, rows: Rows, batch: Batch, by_sample: bool) -> torch.Tensor:
    if not by_sample:
        return values.mean()
    return per_sample_mean(values, rows.sample, len(batch["input_ids"])).mean()


def all_correct(rows: Rows, batch_size: int) -> torch.Tensor:
    """Whether each sample's labels are all the model's first choice (teacher-forced exact match): [B] bool."""
    wrong = (rows.logits.argmax(-1) != rows.labels).long()
    return torch.zeros(batch_size, dtype=torch.long, device=wrong.device).index_add(0, rows.sample, wrong) == 0
