"""Bytes and operations that an edit or a training step can't do without, counted from the model and the editor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mendfast import Edit, MendEditor
from mendfast.choice import stacks
from mendfast.frozen_prefix import FrozenPrefix

from .contest import Work

Batch = Mapping[str, torch.Tensor]
CROSS = ("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v")


class Counts:
    """Matrix elements of a model's blocks and head, weighted by the tokens that go through them."""

    def __init__(self, editor: MendEditor):
        model = self.model = editor.model
        frozen = set(FrozenPrefix(model, editor.layers).blocks)
        self.all, self.above = [], []
        for number, (_, blocks) in enumerate(stacks(model)):
            for block in blocks:
                # a decoder's keys and values of the encoder are made from the encoder's tokens
                entries = [
                    (0 if any(part in name for part in CROSS) else number, p.numel())
                    for name, p in block.named_parameters()
                    if p.dim() == 2
                ]
                self.all += entries
                if block not in frozen:
                    self.above += entries
        head = model.get_output_embeddings()
        self.head = head.weight.numel() if isinstance(head, nn.Module) else 0
        self.itemsize = next(model.parameters()).element_size()

    def tokens(self, batch: Batch, stack: int) -> int:
        return batch["labels" if stack else "input_ids"].numel()

    def products(self, blocks: list[tuple[int, int]], batch: Batch) -> int:
        """Operations of one pass through the blocks; a backward pass to the inputs has as many."""
        return 2 * sum(size * self.tokens(batch, stack) for stack, size in blocks)

    def size(self, blocks: list[tuple[int, int]]) -> int:
        return self.itemsize * sum(size for _, size in blocks)

    def targets(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    @property
    def dtype(self) -> str:
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")


def edit_work(editor: MendEditor, batch: Batch, edit: Edit) -> Work:
    """One forward pass, a backward pass to the first edited layer, the editor, the update and its backup.

    Loss and gradient can be made while the head's weight is read once.
    """
    count, rows = Counts(editor), 0
    heads = 2 * count.head * count.targets(batch)
    operations = count.products(count.all, batch) + count.products(count.above, batch) + 2 * heads
    moved = count.size(count.all) + count.size(count.above) + count.head * count.itemsize
    for layer in editor.layers:
        rows = len(edit.factors[layer.name].u)
        operations += rows * _editor_products(editor, layer) + 2 * rows * layer.m * layer.n
        moved += 3 * layer.m * layer.n * count.itemsize
    moved += sum(p.numel() * 4 for p in editor.parameters())
    return Work(moved, operations, count.dtype)


def step_work(editor: MendEditor, inner: Batch, outer: Batch, loc: Batch) -> Work:
    """The edits; the outer loss; the base pass over the locality batch, and above the edits an edited one.

    The head's weight is read once for each of the three losses.
    """
    count = Counts(editor)
    both = [count.products(count.all, b) + count.products(count.above, b) for b in (inner, outer)]
    locality = count.products(count.all, loc) + 2 * count.products(count.above, loc)
    heads = 2 * count.head * (2 * count.targets(inner) + 2 * count.targets(outer) + 3 * _kept(count, loc))
    captured = editor.gradients(inner)
    rows = {layer.name: int(captured[layer.name][1].any(-1).sum()) for layer in editor.layers}
    networks = 3 * sum(rows[layer.name] * _editor_products(editor, layer) for layer in editor.layers)
    moved = 3 * count.size(count.all) + 4 * count.size(count.above) + 3 * count.head * count.itemsize
    moved += 3 * sum(p.numel() * 4 for p in editor.parameters())
    return Work(moved, sum(both) + locality + heads + networks, count.dtype)


def _kept(count: Counts, batch: Batch) -> int:
    return count.targets(batch) if count.model.config.is_encoder_decoder else count.tokens(batch, 0)


def _editor_products(editor: MendEditor, layer) -> int:
    """Operations per row of the editor's forward pass."""
    width = layer.m + layer.n
    return 4 * editor.config.blocks * width * min(editor.config.rank, width)
