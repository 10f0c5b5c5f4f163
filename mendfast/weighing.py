"""Edits by least squares whose rows weigh as much as their answers need. docs/ops/least_squares.md, section 5."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from tqdm import tqdm

from . import ops
from .aggregate import Wanted
from .capture import Factors, frozen, lowrank_updates
from .frozen_prefix import FrozenPrefix
from .layers import Layer
from .objective import Batch, Rows, per_sample_mean, target_rows
from .packing import packing
from .tree import Passes
from .wide import widening

POWER = 0.5
"""Of the quotient of a token's loss and the one that is enough, by which its weight moves in a round; halved whenever
that has gone too far."""
SLACK = 0.01
"""Nats that both are taken to be larger by, so that tokens with next to no loss don't lose all weight at once."""
STEP, MOST = 4.0, 1024.0
"""The most that a weight moves by in a round, and in all, either way."""


class Answers:
    """The answers' tokens of texts, and how surely the model gives them under a change of its weights.

    Args:
        batches: texts with labels, as :meth:`EditableModel.tokenize` gives them.
        texts: how many of them in a row make one sample of the edits' rows.
        as_tree: whether a batch's texts can go through the model as a tree (:mod:`mendfast.tree`).
        forms: how many of them in a row are one edit in as many forms.

    Attributes:
        sample: of each token the sample that it belongs to, [K] int64, in the order of the batches.
        form: the form of its edit, counted from 0, [K] int64.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        batches: Iterable[Batch],
        texts: int = 1,
        as_tree: Callable[[Batch], bool] = lambda batch: False,
        forms: int = 1,
    ):
        self._model, self._layers, self._texts, self._forms = model, layers, texts, forms
        kinds = ((Passes if as_tree(batch) else _Padded, batch) for batch in batches)
        self._passes = [(kind(model, layers, batch), len(batch["labels"])) for kind, batch in kinds]
        self.sample = self.form = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def losses(self, factors: Mapping[str, Factors]) -> torch.Tensor:
        """-log p of each token, [K] float32 on the CPU; the blocks below the edited ones run the first time alone."""
        losses, texts, first = [], [], 0
        change = lowrank_updates(self._layers, factors, self._model, private=True)
        with frozen(self._model), widening(self._model), packing(), change:
            for passes, size in self._passes:
                rows = passes.rows()
                losses.append(ops.token_nll_rows(rows.logits, rows.labels).float().cpu())
                texts.append(first + rows.sample.cpu())
                first += size
        text = torch.cat(texts)
        self.sample, self.form = text // self._texts, text % self._forms
        return torch.cat(losses)


class _Padded:
    """:class:`~mendfast.tree.Passes` of a padded batch."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], batch: Batch):
        self._model, self._batch, self._below = model, batch, FrozenPrefix(model, layers)

    def rows(self) -> Rows:
        with self._below.kept():
            return target_rows(self._model, self._batch, for_nll=True)


def weighed(
    rows: Mapping[str, Wanted], weights: torch.Tensor, sample: torch.Tensor, by_token: bool
) -> dict[str, Wanted]:
    """Rows whose least squares is that of ``rows`` with their squares weighed.

    Args:
        weights, sample: of each answer's token, [K], and the edit that it belongs to.
        by_token: whether ``rows`` are of the answers' tokens, in their order. Where they are not, or a layer lacks the
            row of one (whose gradient is 0), a row weighs what the tokens of its edit do in the mean.
    """
    edits = int(sample.max()) + 1 if len(sample) else 0
    of_edits = per_sample_mean(weights, sample, edits)
    result = {}
    for name, w in rows.items():
        own = weights if by_token and len(w.u) == len(weights) else of_edits[w.sample.cpu()]
        root = own.sqrt().unsqueeze(1).to(w.u.device)
        result[name] = Wanted(w.u * root, w.d * root, w.sample)
    return result


def moved(
    weights: torch.Tensor, losses: torch.Tensor, enough: torch.Tensor | float, power: float = POWER
) -> torch.Tensor:
    """The weights of the next round: more for tokens whose loss is above what is enough, less for those below."""
    quotient = (losses.nan_to_num(torch.inf) + SLACK) / (enough + SLACK)
    return (weights * quotient.pow(power).clamp(1 / STEP, STEP)).clamp(1 / MOST, MOST)


def balanced(
    rows: Mapping[str, Wanted],
    answers: Answers,
    solve: Callable[[Mapping[str, Wanted]], dict[str, Factors]],
    *,
    rounds: int,
    enough: tuple[float, float],
    by_token: bool,
    progress: bool | None = False,
) -> dict[str, Factors]:
    """The factors that ``solve`` gives for ``rows`` after so many rounds of weighing them.

    The first solution weighs all alike; each round reads the tokens' losses under the best one so far and solves again.
    Where the rows have no room for all, weight for some is at the others' cost, and what one round gives the next may
    take: a round after which more is missing of what is enough is taken back, and the next moves half as far.

    Args:
        enough: the loss of a token that is sure enough, in an edit's first form and in its others.
    """
    best = solve(rows)
    losses = answers.losses(best)
    weights, power = torch.ones_like(losses), POWER
    limits = torch.tensor(enough)[answers.form.clamp(max=1)]
    missing = (losses - limits).clamp(min=0).mean()
    hidden = None if progress is None else not progress
    for _ in tqdm(range(rounds), desc="weighing", unit="round", disable=hidden):
        tried = moved(weights, losses, limits, power)
        factors = solve(weighed(rows, tried, answers.sample, by_token))
        found = answers.losses(factors)
        lacks = (found - limits).clamp(min=0).mean()
        if lacks <= missing or (missing.isnan() and not lacks.isnan()):
            best, weights, losses, missing = factors, tried, found, lacks
        else:
            power /= 2
    return best
