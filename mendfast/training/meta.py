"""The meta-training loss (Mitchell et al. 2022, Algorithm 1) for B edits side by side."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from .. import ops
from ..capture import Factors, frozen, lowrank_updates
from ..editable import EditableModel
from ..editor import MendEditor
from ..frozen_prefix import FrozenPrefix
from ..layers import execution_device, first_layer
from ..objective import (
    Batch,
    Rows,
    all_correct,
    answer_positions,
    kept_positions,
    kept_rows,
    per_sample_mean,
    target_rows,
    to_device,
)
from ..packing import packing
from ..types import C_EDIT
from .cache import PrefixCache
from .precision import lowered
from .recompute import recomputed_updates

ROOT_FROM = 5e-4
"""Half a KL, about, below which its root is made a line: at 0 the root's slope has no bound."""


def meta_loss(
    subject: EditableModel,
    factors: Mapping[str, Factors],
    edit_outer: Batch,
    loc: Batch,
    c_edit: float = C_EDIT,
    c_loc: float = 1.0,
    *,
    checkpoint_activations: bool = False,
    loc_positions: int = 0,
    loc_answers: bool = False,
    loc_root: bool = False,
    seed: int | str = 0,
    cache: PrefixCache | None = None,
    pack: bool = True,
    precision: str = "float32",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """c_edit * NLL(outer; edited) + c_loc * KL(base || edited on loc), differentiable in the factors.

    The samples of ``edit_outer`` and ``loc`` run under the update of their edit, so that one forward and one backward
    pass serve G independent edits.

    Args:
        factors: of G edits, as :meth:`mendfast.MendEditor.group_factors` gives them; or one for all samples.
        edit_outer: G * r examples that the edited models should answer, those of the first edit first.
        loc: G * q examples whose predictions should stay, in the same order. Labels are used only as an
            encoder-decoder's decoder inputs, and with ``loc_answers``.
        checkpoint_activations: keep only the inputs of the blocks that gradients pass, and compute the rest again
            in the backward pass: less memory for about one more forward pass, the results the same.
        loc_positions: compare the predictions at so many positions of each locality sample, drawn uniformly by
            ``seed``: in expectation the loss of all. 0, and samples that have no more, take all.
        loc_answers: only where a locality sample's labels are predicted, and not within its prompt.
        loc_root: of each position's KL the root of its half, which bounds the probability that moves (Pinsker's
            inequality): how many choices change goes by that, and a few large KLs outweigh the many small ones less.
        cache: what the frozen blocks give for these texts, so that they are not run again; the results are the
            same to rounding.
        pack: leave padding out of the matrix products (:mod:`mendfast.packing`), to rounding the same too.
        precision: "bfloat16": of the edited blocks' products; all else stays in the model's dtype and float32.

    Returns:
        The scalar total, and its parts, detached: "l_edit", "l_loc", and "edit_success", the share of outer
        samples all of whose labels are the edited model's first choice.
    """
    model, layers = subject.model, subject.layers
    device = execution_device(first_layer(model))
    edit_outer, loc = to_device(edit_outer, device), to_device(loc, device)
    keep, weights = (answer_positions if loc_answers else kept_positions)(model, loc), None
    if loc_positions and keep is not None:
        keep, weights = _drawn(keep, loc_positions, seed)
    prefix = FrozenPrefix(model, layers)
    cached = cache is not None and cache.serves(loc)
    low = precision == "bfloat16"
    with frozen(model), packing(pack), lowered(model, prefix.blocks, low):
        # the base's last blocks too, else rounding would be taken for what the edit does
        with torch.no_grad(), cache.replayed(loc, final=not low) if cached else prefix.recorded():
            base = kept_rows(model, loc, keep)
        updates = lowrank_updates(layers, factors)
        if checkpoint_activations:
            updates = recomputed_updates(model, layers, factors, prefix.blocks)
        with updates:
            with cache.replayed(loc) if cached else prefix.replayed():
                edited = kept_rows(model, loc, keep)
            with cache.replayed(edit_outer) if cached else contextlib.nullcontext():
                outer = target_rows(model, edit_outer)
    by_sample = subject.config.loss_reduction == "edit"
    l_edit = _mean(ops.token_nll_rows(outer.logits, outer.labels), outer, edit_outer, by_sample)
    kl = ops.kl_divergence_rows(base.logits, edited.logits)
    if loc_root:
        kl = (kl.clamp(min=0) / 2 + ROOT_FROM).sqrt() - ROOT_FROM**0.5
    if weights is not None and not by_sample:  # each sample's rows stand for all of its positions
        kl = kl * weights.to(kl.device)[edited.sample]
    l_loc = _mean(kl, edited, loc, by_sample)
    total = c_edit * l_edit + c_loc * l_loc
    return total, {
        "l_edit": l_edit.detach(),
        "l_loc": l_loc.detach(),
        "edit_success": all_correct(outer, len(edit_outer["input_ids"])).float().mean(),
    }


def editor_loss(
    editor: MendEditor,
    edit_inner: Batch,
    edit_outer: Batch,
    loc: Batch,
    c_edit: float = C_EDIT,
    c_loc: float = 1.0,
    joint: bool | int = False,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """:func:`meta_loss` of the edits that ``editor`` makes of ``edit_inner``, differentiable in the editor.

    Args:
        edit_inner: B examples to edit by: input_ids, attention_mask, labels, as ``editor.edit_tokens``.
        joint: False: each edit alone. k: each k consecutive examples are one edit (B and the sizes of the other
            batches must be multiples of B / k). True: all B are one edit.
        options: those of :func:`meta_loss`.
    """
    size = edit_inner["labels"].shape[0]
    group = size if joint is True else int(joint) or 1
    groups = size // group
    for name, batch in (("edit_outer", edit_outer), ("loc", loc)):
        samples = len(batch["input_ids"])
        if samples % groups:
            raise ValueError(f"{name} has {samples} samples for {groups} edits; pass the same number for each.")
    cache, low = options.get("cache"), options.get("precision") == "bfloat16"
    below = FrozenPrefix(editor.model, editor.layers).blocks if low else ()
    replayed = contextlib.nullcontext() if cache is None else cache.replayed(edit_inner)
    with lowered(editor.model, below, low), replayed, packing(options.get("pack", True)):
        captured = editor.gradients(edit_inner)
    factors = editor.group_factors(edit_inner, group, captured)
    return meta_loss(editor, factors, edit_outer, loc, c_edit, c_loc, **options)


def _drawn(keep: torch.Tensor, count: int, seed: int | str) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``count`` of each sample's kept positions: a mask like ``keep``, and the weights [B] with which the
    mean over all drawn rows is, in expectation, that over all kept ones."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=7).hexdigest()
    rng = torch.Generator().manual_seed(int(digest, 16))
    kept = keep.cpu()
    # The kept positions first, in random order: their ranks there say which are drawn.
    order = torch.rand(kept.shape, generator=rng).masked_fill(~kept, 2.0).argsort(1)
    drawn = kept & (order.argsort(1) < count)
    shares = kept.sum(1) / drawn.sum(1).clamp(min=1)
    return drawn.to(keep.device), shares * drawn.sum() / kept.sum().clamp(min=1)


def _mean(values: torch.Tensor, rows: Rows, batch: Batch, by_sample: bool) -> torch.Tensor:
    if not by_sample:
        return values.mean()
    return per_sample_mean(values, rows.sample, len(batch["input_ids"])).mean()
