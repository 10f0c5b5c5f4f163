"""KnowledgeEditor (De Cao et al., EMNLP 2021): a hypernetwork reads the edit, and gates and shifts its gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from ..capture import Factors, frozen
from ..edit import Edit
from ..editable import EditableModel
from ..labels import pad_token_id
from ..layers import Layer
from ..objective import IGNORE, Batch, context_length, target_rows, to_device
from ..requests import EditRequest
from ..training import TrainConfig, meta_loss
from ..training.data import Draw
from ..training.learner import LossPart
from .fitting import Fitted, best_gradient_step

OLD_ANSWER_TOKENS = 8
"""The old answer is read so far: at most as many of the model's own greedy tokens."""


class Gates(NamedTuple):
    """What one edit makes of a matrix W [n, m]: W~ = W - scale * (outer(alpha, gamma) * grad + outer(beta, delta)).

    De Cao et al., equation 4, with W written (out, in) whatever the layout; ``alpha`` and ``beta`` are softmaxes
    and ``scale`` a sigmoid times the largest scale of the matrix; the sign is that of the gradient descent which
    the paper's sum leaves to be learned.
    """

    alpha: torch.Tensor  # [B, n], positive, of sum 1
    gamma: torch.Tensor  # [B, m]
    beta: torch.Tensor  # [B, n], positive, of sum 1
    delta: torch.Tensor  # [B, m]
    scale: torch.Tensor  # [B, 1], in (0, exp(log_scale))


class Conditioner(nn.Module):
    """The condition h [B, C] -> the :class:`Gates` of one matrix.

    Before training the gates are close to a plain gradient step of the rate ``exp(log_scale) / 2``, from which
    KE learns far sooner than from gates around 0: ``gamma`` comes in units of n, the reciprocal of a softmax over
    n rows that knows nothing yet, and is about 1 of them. ``log_scale`` is learned; the paper's sigmoid ends at 1.
    """

    def __init__(self, condition: int, hidden: int, m: int, n: int):
        super().__init__()
        self.sizes = (n, m, n, m, 1)
        out = weight_norm(nn.Linear(hidden, sum(self.sizes)))
        with torch.no_grad():
            gamma = slice(n, n + m)
            out.bias[gamma] = 1
            out.parametrizations.weight.original0[gamma] *= 0.1
        self.layers = nn.Sequential(weight_norm(nn.Linear(condition, hidden)), nn.Tanh(), out)
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, h: torch.Tensor) -> Gates:
        alpha, gamma, beta, delta, eta = self.layers(h).split(self.sizes, dim=-1)
        gamma = alpha.shape[-1] * gamma
        return Gates(alpha.softmax(-1), gamma, beta.softmax(-1), delta, self.log_scale.exp() * eta.sigmoid())


class HyperNetwork(nn.Module):
    """A bidirectional LSTM over the tokens of an edit, and a conditioner for each edited matrix.

    Its embedding starts as the model's, followed by the two separators and a symbol for each class.
    """

    def __init__(self, embedding: torch.Tensor, symbols: int, layers: Sequence[Layer], hidden: int, condition: int):
        super().__init__()
        words, width = embedding.shape
        self.embedding = nn.Embedding(words + symbols, width, device=embedding.device)
        with torch.no_grad():
            self.embedding.weight[words:] *= embedding.float().std()
            self.embedding.weight[:words] = embedding
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.read = nn.Linear(2 * hidden, condition)
        self.conditioners = nn.ModuleList(Conditioner(condition, hidden, layer.m, layer.n) for layer in layers)
        self.to(embedding.device)

    def forward(self, edits: Sequence[torch.Tensor]) -> list[Gates]:
        """Token ids of each of B edits -> the gates of each matrix."""
        packed = pack_sequence([self.embedding(ids) for ids in edits], enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # [2, B, hidden]: where each direction ended
        h = self.read(torch.cat([last[0], last[1]], dim=-1)).tanh()
        return [conditioner(h) for conditioner in self.conditioners]


class KnowledgeEditor(Fitted):
    """KE: the gradient of the edit, gated and shifted by what a hypernetwork reads in the edit.

    The condition is the paper's: input, old answer and new answer with separators between. The old answer is the
    model's own, made by greedy decoding for every edit. Since a rank-1 gate scales the rows and columns of
    ``grad = sum_i delta_i u_i^T``, a gated gradient is as low-rank as MEND's, and shares its machinery: edits run
    side by side, and an edit is an :class:`mendfast.Edit`. Simultaneous edits are the sum of separate ones.

    Trained on MEND's loss, ``c_edit NLL + c_loc KL`` on the same samples, as Mitchell et al. (2022) train it for
    their comparison; De Cao et al. minimise the KL under the constraint that the NLL falls below a margin, which
    weights the same two terms by a multiplier that moves. Sizes and weight normalisation are those of the released
    code; it edits the matrices that MEND edits.

    Args:
        subject: see :class:`mendfast.baselines.System`.
        hidden: width of the LSTM in each direction and of the conditioners.
        condition: width of h.
        rate: of the plain gradient step that the gates start from; by default
            :func:`~mendfast.baselines.fitting.best_gradient_step`.
    """

    key, name, of_parameters = "ke", "KE", True

    def __init__(self, subject: EditableModel, *, hidden: int = 128, condition: int = 1024, rate: float | None = None):
        super().__init__(subject)
        embedding = subject.model.get_input_embeddings().weight.detach()
        self._words = len(embedding)
        classes = max(2, subject.model.config.num_labels) if subject.kind == "classifier" else 0
        self.network = HyperNetwork(embedding, 2 + classes, subject.layers, hidden, condition)
        self.rate = rate
        if rate is not None:
            self._start_at(rate)

    @torch.no_grad()
    def _start_at(self, rate: float) -> None:
        for conditioner in self.network.conditioners:
            conditioner.log_scale.fill_(math.log(2 * rate))

    def start(self, draw: Draw, config: TrainConfig) -> None:
        if self.rate is None:
            self._start_at(best_gradient_step(self.subject, draw, config))

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        scales = [conditioner.log_scale for conditioner in self.network.conditioners]
        chosen = set(map(id, scales))
        gates = [parameter for parameter in self.trained().values() if id(parameter) not in chosen]
        return [
            {"params": gates, "lr": config.learning_rate},
            {"params": scales, "lr": config.alpha_learning_rate},
        ]

    def losses(self, draw: Draw, config: TrainConfig, joint: int) -> Iterator[LossPart]:
        inner, outer, loc = (self.subject.tokenize(pairs) for pairs in draw)
        weights = config.c_edit, config.locality_weight(joint)
        yield meta_loss(self.subject, self.group_factors(inner, joint), outer, loc, *weights)

    def group_factors(self, batch: Batch, group_size: int = 1) -> dict[str, Factors]:
        """Differentiable factors of the edits; see :meth:`mendfast.MendEditor.group_factors`."""
        captured = self.subject.gradients(batch)
        gates = self.network(self.condition(batch))
        groups, factors = len(batch["input_ids"]) // group_size, {}
        for (name, (u, delta)), gate in zip(captured.items(), gates, strict=True):
            us = torch.cat([u * gate.gamma.unsqueeze(1), gate.delta.unsqueeze(1)], dim=1)
            deltas = torch.cat([delta * gate.alpha.unsqueeze(1), gate.beta.unsqueeze(1)], dim=1)
            deltas = deltas * gate.scale.unsqueeze(1)
            factors[name] = (*(rows.reshape(groups, -1, rows.shape[-1]) for rows in (us, deltas)), 1.0)
        return factors

    def edit_tokens(self, batch: Batch) -> Edit:
        """The edit for tokenised examples; see :meth:`mendfast.MendEditor.edit_tokens`."""
        with torch.no_grad():
            factors = self.group_factors(batch, len(batch["input_ids"]))
        factors = {name: (u[0], delta[0], alpha) for name, (u, delta, alpha) in factors.items()}
        return Edit(factors, self.subject.model.config.model_type)

    def _edited(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self.edit_tokens(self.subject.tokenize(requests)).attached(self.subject.model)

    # -- the condition -------------------------------------------------------------------------------------

    def condition(self, batch: Batch) -> list[torch.Tensor]:
        """The ids that the LSTM reads for each example: input, separator, old answer, separator, new answer."""
        batch = to_device(batch, self.subject.device)
        prompts = self._prompts(batch)
        first, second = (batch["input_ids"].new_tensor([self._words + i]) for i in (0, 1))
        triples = zip(prompts, self._old_answers(batch, prompts), self._new_answers(batch), strict=True)
        return [torch.cat([prompt, first, old, second, new]) for prompt, old, new in triples]

    def _prompts(self, batch: Batch) -> list[torch.Tensor]:
        ids = batch["input_ids"]
        keep = batch.get("attention_mask", torch.ones_like(ids)) != 0
        if self.subject.kind == "causal":
            keep = keep & (batch["labels"] == IGNORE)
        return [row[kept] for row, kept in zip(ids, keep, strict=True)]

    def _new_answers(self, batch: Batch) -> list[torch.Tensor]:
        if self.subject.kind == "classifier":
            return list(self._class_symbols(batch["labels"]))
        return [row[row != IGNORE] for row in batch["labels"]]

    @torch.no_grad()
    def _old_answers(self, batch: Batch, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        model = self.subject.model
        with frozen(model):
            if self.subject.kind == "classifier":
                return list(self._class_symbols(target_rows(model, batch).logits.argmax(-1)))
            decoder_only = self.subject.kind == "causal"
            room, limit = OLD_ANSWER_TOKENS, context_length(model)
            if decoder_only and limit is not None:
                room = min(room, limit - max(map(len, prompts)))
            if room < 1:
                return [prompt[:0] for prompt in prompts]
            pad = pad_token_id(self.subject.tokenizer)
            side = "left" if decoder_only else "right"
            ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side=side)
            ones = [torch.ones_like(prompt) for prompt in prompts]
            mask = pad_sequence(ones, batch_first=True, padding_side=side)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=pad)
        out = out[:, ids.shape[1] if decoder_only else 1 :]
        ends = model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=out.device).reshape(-1)
        # Whatever follows the first end is padding.
        ended = torch.isin(out, ends).cumsum(-1) > 0
        return [row[~end] for row, end in zip(out, ended, strict=True)]

    def _class_symbols(self, labels: torch.Tensor) -> torch.Tensor:  # [B] -> [B, 1]
        return (self._words + 2 + labels).reshape(-1, 1)
