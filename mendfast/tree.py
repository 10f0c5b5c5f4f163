"""Many texts through a causal model as one tree: what they begin with in common is run once, and nothing is padded.

Texts (a prompt and its answer) share the tokens of their prompts as the paths of a tree share its edges: a chat
template's system turn, "Who is the", a relation asked of many subjects. The tree's nodes and the tokens that predict
the answers, of which each text has its own, are one row of tokens for the model, each at its own position; attention
alone sees texts again. Gradients are wanted at the answers' tokens alone, and none of a causal model's depends on a
token before: the prompts pass the edited blocks without, and leave their keys and values.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .capture import UNSERVED, agree, capture, ended_after, frozen, replaced_forwards, undone
from .choice import frozen_ends, stacks
from .layers import Layer
from .objective import IGNORE, Batch, Rows, counts_positions, labelled_rows, model_kind, nll, text_config
from .packing import Placed, Taken

Sides = tuple[torch.Tensor, torch.Tensor]
_QUERY = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Tree:
    """The texts of a right-padded batch (input_ids, attention_mask, labels) as rows: first the prompts' nodes, then the
    tokens from each text's first that predicts a label to its last."""

    def __init__(self, batch: Batch):
        labels = batch["labels"].cpu()
        answers = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], 1)
        predict = answers != IGNORE
        places = torch.arange(labels.shape[1])
        self.firsts = predict.long().argmax(1).tolist()
        ends = (places * predict).amax(1).add(1).tolist()
        ids = batch["input_ids"].cpu().tolist()
        children: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        positions: list[int] = []
        self.paths: list[list[int]] = []  # of nodes, for each text
        self.shared: list[int] = []  # how many of those an earlier text has made
        for text, first in zip(ids, self.firsts, strict=True):
            path, node, made = [], -1, 0
            for position in range(first):
                key = (node, text[position])
                if (found := children.get(key)) is None:
                    found = children[key] = len(tokens)
                    tokens.append(text[position])
                    positions.append(position)
                    made += 1
                path.append(node := found)
            self.paths.append(path)
            self.shared.append(first - made)
        self.nodes = len(tokens)
        self.counts = [end - first for first, end in zip(self.firsts, ends, strict=True)]
        self.starts = list(itertools.accumulate(self.counts[:-1], initial=self.nodes))  # of their own rows
        for text, first, end in zip(ids, self.firsts, ends, strict=True):
            tokens += text[first:end]
            positions += range(first, end)
        self.ids, self.positions = torch.tensor([tokens]), torch.tensor([positions])
        spans = list(zip(self.firsts, ends, strict=True))
        self.answers = torch.cat([row[a:b] for row, (a, b) in zip(answers, spans, strict=True)])  # [own rows]
        self.sample = torch.arange(len(ids)).repeat_interleave(torch.tensor(self.counts))

    def groups(self) -> list[list[int]]:
        """Texts of about one length, which lie next to each other where attention pads them."""
        order = sorted(range(len(self.firsts)), key=lambda i: self.firsts[i] + self.counts[i])
        groups: list[list[int]] = []
        for i in order:
            length = self.firsts[i] + self.counts[i]
            if groups and length <= 1.5 * (self.firsts[groups[-1][0]] + self.counts[groups[-1][0]]):
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups


class Span(NamedTuple):
    """Rows that follow each other in a text, and what they may attend to: the text up to each."""

    path: list[int]  # rows [S], the text's tokens from its first on
    start: int  # of the span in the path
    rows: list[int]  # path[start : start + len(rows)]


class Queries:
    """The queries of several spans, as a padded batch."""

    def __init__(self, spans: Sequence[Span], own_from: int | None, device: torch.device):
        count, width = len(spans), max(len(span.rows) for span in spans)
        length = max(len(span.path) for span in spans)
        self.shape = (count, width, length)
        self.rows = torch.tensor([row for span in spans for row in span.rows])
        self.at = torch.tensor([i * width + j for i, span in enumerate(spans) for j in range(len(span.rows))])
        path = torch.zeros(count, length, dtype=torch.long)
        real = torch.zeros(count, length, dtype=torch.bool)
        for i, span in enumerate(spans):
            path[i, : len(span.path)], real[i, : len(span.path)] = torch.tensor(span.path), True
        self.path = path.flatten()
        starts = torch.tensor([span.start for span in spans])[:, None, None]
        hidden = torch.arange(length)[None, None, :] > starts + torch.arange(width)[None, :, None]  # [B, Q, S]
        self.mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
        if own_from is not None:
            place = real.flatten().nonzero().squeeze(1)
            row = self.path[place]
            mine = row >= own_from
            self.own, self.own_at = row[mine] - own_from, place[mine]
            self.kept, self.kept_at = row[~mine], place[~mine]
            self.rows = self.rows - own_from
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))

    def answer(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        """q, as rows [T, heads, D], k and v, as batches [B, heads, S, D] -> the spans' rows [n, heads * D]."""
        count, width, _ = self.shape
        heads, dim = q.shape[1:]
        queries = Placed.apply(Taken.apply(q.flatten(1), self.rows), self.at, count * width)
        queries = queries.view(count, width, heads, dim).transpose(1, 2)
        found = F.scaled_dot_product_attention(
            queries, k, v, attn_mask=self.mask.to(q.dtype), enable_gqa=k.shape[1] != heads, **options
        )
        return Taken.apply(found.transpose(1, 2).reshape(count * width, -1), self.at)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, T, D] -> [T, heads, D]"""
    return x[0].transpose(0, 1)


class _Attention(TorchFunctionMode):
    """Scaled dot-product attention of one long row as that of the tree's texts."""

    def __init__(self, rows: int, queries: Sequence[Queries]):
        super().__init__()
        self.rows, self.queries, self.calls = rows, queries, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(_QUERY, args, strict=False)) | kwargs
        q, k, v = (given[name] for name in _QUERY[:3])
        if any(x.dim() != 4 or len(x) != 1 or x.shape[2] != self.rows for x in (q, k, v)):
            raise NotServed("its attention sees other rows than the tokens'")
        found = self.attend(*map(_rows, (q, k, v)), scale=given.get("scale"))
        self.calls += 1
        return found.view(1, self.rows, q.shape[1], -1).transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        out = q.new_empty(len(q), q.shape[1] * v.shape[2])
        for part in self.queries:
            batch = (self.gathered(part, side) for side in (k, v))
            out.index_copy_(0, part.rows, part.answer(q, *batch, **options))
        return out

    def gathered(self, part: Queries, rows: torch.Tensor) -> torch.Tensor:
        count, _, length = part.shape
        return rows.flatten(1).index_select(0, part.path).view(count, length, *rows.shape[1:]).transpose(1, 2)


class _Prompts(_Attention):
    """Keeps the keys and values, and ends the pass in the last block that is to run, which is asked for no more."""

    def __init__(self, rows: int, queries: Sequence[Queries], blocks: int):
        super().__init__(rows, queries)
        self.blocks, self.kept = blocks, []

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        self.kept.append((k, v))
        if len(self.kept) == self.blocks:
            raise _Kept
        return super().attend(q, k, v, **options)


class _Answers(_Attention):
    """Takes the prompts' keys and values from those; differentiable."""

    def __init__(self, rows: int, queries: Sequence[Queries], kept: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(rows, queries)
        self.kept = kept

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        found = []
        for part in self.queries:
            sides = []
            for own, kept in zip((k, v), self.kept[self.calls] if self.kept else (None, None), strict=True):
                count, _, length = part.shape
                rows = Placed.apply(Taken.apply(own.flatten(1), part.own), part.own_at, count * length)
                if kept is not None:
                    rows.data.index_copy_(0, part.kept_at, kept.flatten(1).index_select(0, part.kept))
                sides.append(rows.view(count, length, *own.shape[1:]).transpose(1, 2))
            found.append(part.answer(q, *sides, **options))
        order = torch.cat([part.rows for part in self.queries])
        return Placed.apply(torch.cat(found), order, len(q))


class NotServed(ValueError):
    """The model's pass is not one that a tree can run through."""


class _Kept(Exception):
    """The last keys and values are there."""


def regular(batch: Batch) -> bool:
    """Whether these are right-padded texts and their labels, and nothing else."""
    if set(batch) != {"input_ids", "attention_mask", "labels"} or batch["labels"].dim() != 2:
        return False
    mask, labels = batch["attention_mask"], batch["labels"]
    padded_right = mask.shape == labels.shape and bool(mask[:, 0].all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())
    return padded_right and not bool(((labels != IGNORE) & (mask == 0)).any())


def why_not(model: nn.Module, layers: Sequence[Layer], length: int) -> str | None:
    """Why texts of up to so many tokens can't pass the model as a tree, as far as its configuration tells; or None."""
    found = stacks(model)
    if model_kind(model) != "causal" or len(found) != 1:
        return "it is no causal model of one stack of blocks"
    (name, _), config = found[0], text_config(model)
    if outside := [layer.name for layer in layers if not layer.name.startswith(f"{name}.")]:
        return f"{outside[0]} is in none of its blocks"
    window = getattr(config, "sliding_window", None) or length
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or window < length:
        return "its blocks attend to windows, or not at all"
    if getattr(config, "_attn_implementation", None) != "sdpa" or getattr(model, "_is_stateful", False):
        return "its attention is not PyTorch's scaled_dot_product_attention"
    if "position_ids" not in inspect.signature(model.forward).parameters or counts_positions(model):
        return "it takes no position_ids"
    return None


def answers_through(
    model: nn.Module, layers: Sequence[Layer], batch: Batch
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """u [B, A, m] and delta [B, A, n] of every layer at the tokens that predict an answer, zeros behind: the gradients
    of each text's mean loss. ``batch``: right-padded texts with labels, on the CPU or the model's device.

    Raises:
        NotServed: the pass is none that a tree can run through.
    """
    tree = Tree(batch)
    run = _run_of(model, layers, tree)
    device = run.device
    with torch.inference_mode(False):
        with frozen(model), torch.no_grad():
            run.through_frozen()
            kept = run.through_prompts()
        with capture(model, layers, 1) as captured:
            rows = run.through_answers(kept)
            found = captured.rows(nll(rows, len(tree.firsts)).sum())
    width = max(tree.counts)
    slot = torch.cat([torch.arange(i * width, i * width + count) for i, count in enumerate(tree.counts)]).to(device)
    size = len(tree.firsts) * width
    predict = (tree.answers != IGNORE).unsqueeze(1).to(device)
    result = {}
    for name, (u, delta) in found.items():
        sides = []
        for side in (u[0], delta[0] * predict.to(delta.device)):
            placed = side.new_zeros(size, side.shape[1]).index_copy_(0, slot.to(side.device), side)
            sides.append(placed.view(len(tree.firsts), width, -1))
        result[name] = tuple(sides)
    return result


class Passes:
    """Forward passes of the texts of ``batch``, as :func:`answers_through` takes them, while edits of ``layers`` come
    and go: the blocks below those run the first time alone."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], batch: Batch):
        tree = Tree(batch)
        self._run = _run_of(model, layers, tree)
        prompts = torch.full((tree.nodes,), IGNORE)
        self._answers = torch.cat([prompts, tree.answers]), torch.cat([torch.zeros_like(prompts), tree.sample])

    def rows(self) -> Rows:
        """The rows that predict a label, for :func:`mendfast.objective.nll` alone."""
        if self._run.states is None:
            self._run.through_frozen()
        return self._run.through_all(*self._answers)


def _run_of(model: nn.Module, layers: Sequence[Layer], tree: Tree) -> _Run:
    (blocks,) = (list(blocks) for _, blocks in stacks(model))
    below = frozen_ends(model, layers)
    device = model.get_input_embeddings().weight.device
    return _Run(model, tree, blocks, below[0] if below else [], device)


def why_not_tried(
    model: nn.Module, layers: Sequence[Layer], batch: Batch, plain: Callable[[Batch], Mapping[str, Sides]]
) -> str | None:
    """Why the pass as a tree does not do, seen from two texts of ``batch`` whose rows ``plain`` gives too; or None."""
    lengths = batch["attention_mask"].sum(1)
    two = [int(lengths.argmin()), int(lengths.argmax())]
    batch = {name: value[two] for name, value in batch.items()}
    tree = Tree(batch)
    try:
        found = answers_through(model, layers, batch)
    except UNSERVED as problem:
        return str(problem)  # whatever a model that attends to other things than tokens makes of them
    place = torch.tensor(tree.firsts)[:, None] + torch.arange(max(tree.counts))
    real = torch.arange(max(tree.counts)) < torch.tensor(tree.counts)[:, None]
    place = place.clamp(max=batch["input_ids"].shape[1] - 1)
    for name, sides in plain(batch).items():
        for side, other in zip(sides, found[name], strict=True):
            at = place.to(side.device)
            expected = side[torch.arange(2, device=side.device)[:, None], at] * real.to(side.device)[..., None]
            if not agree(other, expected):
                return "it gives other rows"
    return None


class _Run:
    """One tree's pass through one model, in its three parts."""

    def __init__(self, model: nn.Module, tree: Tree, blocks: list[nn.Module], frozen: list[nn.Module], device: Any):
        self.model, self.tree, self.blocks, self.frozen, self.device = model, tree, blocks, frozen, device
        self.states: torch.Tensor | None = None
        self.tail: tuple | None = None

    def _inputs(self, rows: slice) -> dict[str, torch.Tensor]:
        ids, positions = (side[:, rows].to(self.device) for side in (self.tree.ids, self.tree.positions))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}

    def _given(self, rows: slice) -> contextlib.AbstractContextManager[None]:
        """The frozen blocks, for some of the rows."""
        if not self.frozen:
            return contextlib.nullcontext()
        states = self.states[:, rows]
        given = states if self.tail is None else (states, *self.tail)
        return replaced_forwards({block: lambda *_, **__: given for block in self.frozen})

    def _queries(self, spans: Sequence[Sequence[Span]], own_from: int | None = None) -> list[Queries]:
        asked = [[span for span in group if span.rows] for group in spans]
        return [Queries(group, own_from, self.device) for group in asked if group]

    def _spans(self, *, prompts: bool, answers: bool) -> list[list[Span]]:
        """Each row once, in the first text that has it; what a group's texts all begin with, apart from them."""
        tree, spans, made = self.tree, [], set()
        for texts in tree.groups():
            group = []
            trunk = len(os.path.commonprefix([tree.paths[i] for i in texts])) if len(texts) > 1 else 0
            root = tree.paths[texts[0]][:trunk]
            if prompts and trunk and root[-1] not in made:
                start = next(i for i, node in enumerate(root) if node not in made)
                spans.append([Span(root, start, root[start:])])
                made.update(root)
            for i in texts:
                path, own = tree.paths[i], list(range(tree.starts[i], tree.starts[i] + tree.counts[i]))
                new = [node for node in path if node not in made] if prompts else []
                made.update(new)
                rows = new + (own if answers else [])
                whole = path + own if answers else path
                group.append(Span(whole, len(whole) - len(rows), rows))
            spans.append(group)
        return spans

    @functools.cached_property
    def _whole(self) -> list[Queries]:
        return self._queries(self._spans(prompts=True, answers=True))

    def through_frozen(self) -> None:
        if not self.frozen:
            return
        seen: list[Any] = []

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            seen.append(output)

        attention = _Attention(self.tree.ids.shape[1], self._whole)
        with undone() as changes, attention:
            changes.hook(self.frozen[-1], keep)  # before the one that ends the pass
            with ended_after(self.frozen[-1]):
                self.model(**self._inputs(slice(None)), use_cache=False)
        self._check(attention, len(self.frozen))
        (output,) = seen
        self.states, self.tail = (output, None) if isinstance(output, torch.Tensor) else (output[0], output[1:])
        if any(part is not None for part in self.tail or ()):
            raise NotServed("its blocks give more than hidden states")

    def through_prompts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The keys and values of the edited blocks and those above."""
        rows, count = slice(0, self.tree.nodes), len(self.blocks) - len(self.frozen)
        if not self.tree.nodes:
            return []
        prompts = _Prompts(self.tree.nodes, self._queries(self._spans(prompts=True, answers=False)), count)
        with contextlib.suppress(_Kept), self._given(rows), prompts:
            self.model(**self._inputs(rows), use_cache=False)
        self._check(prompts, count - 1)
        return prompts.kept

    def through_answers(self, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> Rows:
        rows = slice(self.tree.nodes, None)
        queries = self._queries(self._spans(prompts=False, answers=True), self.tree.nodes)
        answers = _Answers(len(self.tree.answers), queries, kept)
        with self._given(rows), answers:
            found = labelled_rows(self.model, self._inputs(rows), self.tree.answers, self.tree.sample)
        self._check(answers, len(self.blocks) - len(self.frozen))
        return found

    def through_all(self, answers: torch.Tensor, sample: torch.Tensor) -> Rows:
        rows = slice(None)
        attention = _Attention(self.tree.ids.shape[1], self._whole)
        with self._given(rows), attention:
            found = labelled_rows(self.model, self._inputs(rows), answers, sample)
        self._check(attention, len(self.blocks) - len(self.frozen))
        return found

    def _check(self, attention: _Attention, count: int) -> None:
        if attention.calls != count:
            raise NotServed(f"its {count} blocks call scaled_dot_product_attention {attention.calls} times")


