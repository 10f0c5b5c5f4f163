"""ROME (Meng et al., NeurIPS 2022) and MEMIT (Meng et al., ICLR 2023): facts written where their subject is read."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..capture import ended_after, frozen, undone
from ..choice import mlp_outputs
from ..editable import EditableModel
from ..editor import METRIC_FILE
from ..frozen_prefix import FrozenPrefix
from ..labels import collate, encode_prompt, pad_token_id
from ..layers import Layer, named_layers
from ..metric import Metric, observe
from ..moments import SecondMoment
from ..objective import IGNORE, Batch, Rows, kept_rows, nll, to_device
from ..own_words import own_words
from ..requests import EditRequest
from ..shared_prefix import cache_of
from ..training import Sampler, TrainConfig
from .fine_tuning import descend
from .system import System, restored

ENOUGH = 5e-2
"""The loss below which the search for a value stops, as in the released code."""
TINY = 1e-6
"""A ridge on C, in units of its trace: what few protected words leave out has no inverse."""
LEARNED_FROM = 512
"""Locality inputs of the training data that C is taken from, where it is taken from those."""


WORDS, TOGETHER = 32, 50
"""Of the model's own, that C is taken from: tokens of each turn, and texts that are sampled at once."""


def own_texts(
    subject: EditableModel, samples: int, *, part: int = 0, of: int = 1, progress: bool | None = False
) -> list[Batch]:
    """Of the texts that C is taken from the share of process ``part``; all of them together are the same for any
    number ``of`` processes."""
    found: list[Batch] = []
    for seed in range(part, -(-samples // TOGETHER), of):
        size = min(TOGETHER, samples - seed * TOGETHER)
        found += own_words(
            subject.model, subject.tokenizer, samples=size, max_new_tokens=WORDS, batch_size=size, chat=subject.chat,
            seed=seed, progress=progress,
        )  # fmt: skip
    return found


def as_kept(metric: Metric) -> Metric:
    """As its file holds it: what is loaded edits as what was saved does."""
    moments = {name: SecondMoment.from_state(*moment.state()) for name, moment in metric.moments.items()}
    return Metric(moments, metric.model_type, metric.tokens)


FOR_EACH_INPUT = 15000 / 16384
"""MEMIT's weight of C, for each of the matrix's m inputs. The paper's 15,000 is for the 16,384 of GPT-J: on the average
k^T C^-1 k = m, so that one ordinary key takes q / (1 + q) of the change that it wants, q = m / weight. With 15,000 for
the 1,536 inputs of SmolLM2 each of the five blocks would make a tenth of its share."""


class Fact(NamedTuple):
    """One edit as these methods need it: prompt and target, each time behind another beginning, and last "<subject> is
    a"; and where the subject ends."""

    request: EditRequest
    batch: Batch  # [P + 1, S]
    place: torch.Tensor  # [P + 1] int64: the subject's last token


class Rome(System):
    """One matrix, one fact at a time: the least change of W, as C weighs it, under which W k = v.

    k is the MLP's inner activation at the subject's last token, mean over beginnings that the model wrote itself; v
    the output there that makes the model give the target, by ``steps`` of Adam on ``NLL + kl KL + decay |v - v0|^2 /
    |v0|^2``, the KL of what follows "<subject> is a". With C the second moment of such activations on protected text,
    ``W <- W + (v - W k) (C^-1 k)^T / (k^T C^-1 k)`` (section 3.1, equation 2). Several facts come one after the other.

    C is taken from the model's own words, from texts that :meth:`protect` is given, or, by :meth:`fit`, from locality
    inputs of training data.

    Args:
        subject: see :class:`System`; a causal language model. Which matrix is edited is not its choice but ``block``.
        block: whose MLP is edited; None: the one a third of the way up.
        steps, learning_rate: Adam's, of v; the rate None: a first step half as long as v0. (The papers' 0.5 is that of
            GPT-J, about.)
        kl, decay: weights of the loss.
        clamp: the longest change of v, in lengths of v0.
        prefixes: beginnings, beside none.
        words: texts of the model's own that C is taken from, of up to 32 tokens for each turn.
    """

    key, name, fitted = "rome", "ROME", False
    depth = 1
    """Blocks that are edited, up to ``block``."""

    def __init__(
        self,
        subject: EditableModel,
        *,
        block: int | None = None,
        steps: int = 25,
        learning_rate: float | None = None,
        kl: float = 0.0625,
        decay: float = 0.5,
        clamp: float = 4.0,
        prefixes: int = 5,
        words: int = 200,
    ):
        super().__init__(subject)
        if subject.kind != "causal":
            raise ValueError(f"{self.name} edits causal language models; this is a {subject.kind}. Leave it out.")
        found = mlp_outputs(subject.model)
        block = len(found) // 3 if block is None else block
        if not isinstance(block, int) or not 0 <= block < len(found):
            raise ValueError(f"block is {block!r}; the model's blocks with an MLP are 0 to {len(found) - 1}.")
        chosen = found[max(0, block - self.depth + 1) : block + 1]
        self.layers: list[Layer] = named_layers(subject.model, [name for _, name in chosen])
        self.last = chosen[-1][0]  # the block
        self.steps, self.learning_rate, self.prefixes = steps, learning_rate, prefixes
        self.kl, self.decay, self.clamp, self.words = kl, decay, clamp, words
        self.metric: Metric | None = None
        self._ridged: dict[str, torch.Tensor] = {}
        self._beginnings: list[str] | None = None

    # -- once ----------------------------------------------------------------------------------------------

    def protect(self, texts: Sequence[str | tuple[str, str] | Batch] | None = None) -> None:
        """Take C from ``texts``, by default from the model's own words."""
        model, subject = self.subject.model, self.subject
        own: Sequence[str | tuple[str, str] | Batch] = texts or ()
        if texts is None:
            own = own_texts(subject, self.words)
        self.protect_with(as_kept(observe(model, self.layers, subject.text_batches(own))))

    def protect_with(self, metric: Metric) -> None:
        """Take C from ``metric``, which may hold that of other layers too."""
        metric.check(self.layers, self.subject.model.config.model_type)
        self.metric, self._ridged = metric, {}

    def prepare(self) -> None:
        if self.metric is None:
            self.protect()
        if self._beginnings is None:
            self._beginnings = [""]
            if self.prefixes:
                tokenizer = self.subject.tokenizer
                written = own_words(
                    self.subject.model, tokenizer, samples=self.prefixes, max_new_tokens=10, chat=False, seed=1
                )
                rows = [row for batch in written for row in batch["input_ids"]]
                texts = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
                self._beginnings += [f"{text}. " for text in texts if text]

    def fit(
        self,
        sampler: Sampler,
        config: TrainConfig,
        *,
        output: str | Path | None = None,
        validation: Sampler | None = None,
        progress: bool = True,
    ) -> dict[str, float]:
        """Take C from locality inputs; nothing is trained."""
        draws = -(-LEARNED_FROM // max(1, sampler.loc * config.batch_size))
        pairs = [pair for step in range(draws) for pair in sampler.draw(step, config.batch_size).loc]
        self.protect(list(dict.fromkeys(pairs))[:LEARNED_FROM])
        return {}

    def parameter_count(self) -> int:
        return 0

    def save(self, directory: str | Path) -> None:
        self.prepare()
        assert self.metric is not None
        self.metric.save(Path(directory) / METRIC_FILE)

    def load(self, directory: str | Path) -> None:
        self.protect_with(Metric.load(Path(directory) / METRIC_FILE))

    # -- for each edit -------------------------------------------------------------------------------------

    def changed_layers(self) -> Sequence[Layer]:
        return self.layers

    @contextlib.contextmanager
    def _edited(self, requests: Sequence[EditRequest]) -> Iterator[None]:
        facts = [self._fact(request) for request in requests]
        with restored([layer.weight for layer in self.layers]):
            self._write(facts)
            yield

    def _write(self, facts: Sequence[Fact]) -> None:
        (layer,) = self.layers
        for fact in facts:
            key, origin = self._seen(fact, layer, layer.module, FrozenPrefix(self.subject.model, self.layers))
            value = self.value(fact, layer.module, origin)
            with torch.no_grad():
                self._add(layer, *self.rank_one(layer, key, value))

    def rank_one(self, layer: Layer, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u [1, m] and d [1, n] of W <- W + d^T u, under which W k = v (the bias included)."""
        u = torch.cholesky_solve(key.double()[:, None], self._factor(layer).to(key.device))[:, 0]
        missing = value.double() - layer.module(key.to(layer.weight.dtype)).double()
        return (u / (u @ key.double()))[None].float(), missing[None].float()

    def _factor(self, layer: Layer) -> torch.Tensor:
        """Cholesky's, [m, m] float64, of C with its ridge: the same for every edit."""
        if layer.name not in self._ridged:
            assert self.metric is not None
            c = self.metric.moments[layer.name].matrix().double()
            c.diagonal().add_(TINY * c.trace())
            self._ridged[layer.name] = torch.linalg.cholesky(c)
        return self._ridged[layer.name]

    @staticmethod
    def _add(layer: Layer, u: torch.Tensor, d: torch.Tensor) -> None:
        ops.rank1_update_(layer.weight.data, u.contiguous(), d.contiguous(), -1.0, layout=layer.layout)

    def value(self, fact: Fact, site: nn.Module, origin: torch.Tensor) -> torch.Tensor:
        """[n]: what ``site`` should give at the subject's last token, so that the model gives the target, and not the
        ``origin`` that it gives."""
        model, size = self.subject.model, len(fact.place) - 1
        with frozen(model):
            change = torch.zeros_like(origin, requires_grad=True)
            rate = 0.5 * origin.norm().item() / len(origin) ** 0.5 if self.learning_rate is None else self.learning_rate
            optimizer = torch.optim.Adam([change], lr=rate)
            longest, base = self.clamp * origin.norm(), None
            below, texts = FrozenPrefix(model, self.layers[-1:]), _Rest.of(model, fact)
            with torch.enable_grad():
                for step in range(self.steps + 1):
                    with _at(site, texts.place, lambda x: x + change.to(x.dtype)), below.kept():
                        rows = kept_rows(model, texts.batch(), texts.keep)
                    loss = nll(Rows(rows.logits[:-1], texts.labels, rows.sample[:-1]), size).mean()
                    if step == self.steps or loss.item() < ENOUGH:
                        break
                    now = rows.logits[-1].float().log_softmax(-1)
                    base = now.detach() if base is None else base
                    divergence = (base.exp() * (base - now)).sum()
                    decay = change.square().sum() / origin.square().sum()
                    descend(optimizer, loss + self.kl * divergence + self.decay * decay)
                    with torch.no_grad():
                        change.mul_((longest / change.norm().clamp(min=1e-30)).clamp(max=1))
        return (origin + change).detach()

    @torch.no_grad()
    def _seen(
        self, fact: Fact, layer: Layer, site: nn.Module, below: FrozenPrefix
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """At the subject's last token the layer's input, mean over the beginnings, [m], and what ``site`` gives of the
        prompt without one, [n]. What stands behind that token, and above the last of the blocks, is not run.

        ``below``: of the fact; keeps what the blocks below the edited ones give.
        """
        keys: list[torch.Tensor] = []
        states: list[torch.Tensor] = []

        def read(module: nn.Module, args: tuple) -> None:
            keys.append(args[0])

        def written(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        model, size, width = self.subject.model, len(fact.place) - 1, int(fact.place[:-1].max()) + 1
        batch = {name: fact.batch[name][:-1, :width] for name in ("input_ids", "attention_mask")}
        with frozen(model), undone() as changes:
            changes.hook(layer.module, read, before=True)
            changes.hook(site, written)
            with below.kept(), ended_after(self.last):
                kept_rows(model, batch)
        place = fact.place[:-1].to(keys[0].device)
        key = keys[0].reshape(size, -1, layer.m)[torch.arange(size, device=place.device), place].float().mean(0)
        return key, states[0].reshape(size, width, -1)[0, fact.place[0]].float()

    def _fact(self, request: EditRequest) -> Fact:
        subject = self.subjects.get(request.prompt)
        if not subject:
            raise ValueError(
                f"{self.name} writes a fact where its subject is read, and the data names no subject for "
                f"{request.prompt!r}: give the records a field subject, or leave {self.key} out."
            )
        if subject not in request.prompt:
            raise ValueError(f"The subject {subject!r} is not in {request.prompt!r}, where {self.name} looks for it.")
        assert self._beginnings is not None
        prompts = [beginning + request.prompt for beginning in self._beginnings]
        essence = f"{subject} is a"
        examples = [self.subject.encode(prompt, request.target) for prompt in prompts]
        ids = encode_prompt(self.subject.tokenizer, essence)
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * len(ids)})
        batch = collate(examples, pad_token_id=pad_token_id(self.subject.tokenizer), encoder_decoder=False)
        places = [self._place(self.subject.prompt_text(prompt), subject) for prompt in prompts]
        places.append(self._place(essence, subject))
        device = self.subject.device
        return Fact(request, to_device(batch, device), torch.tensor(places, device=device))

    def _place(self, text: str, subject: str) -> int:
        """The token that the subject's last letter is in."""
        whole = encode_prompt(self.subject.tokenizer, text)
        start = encode_prompt(self.subject.tokenizer, text[: text.rindex(subject) + len(subject)])
        # where a token goes on beyond the subject, the two part at that token
        parted = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start) - 1)
        return min(parted, len(whole) - 1)


class Memit(Rome):
    """Many facts at once, spread over several blocks' matrices.

    Each fact's value z is found as in ROME, at the output of the last of the blocks. Then block after block takes its
    share of what z still lacks, r = (z - h) / (blocks left), for all facts together: ``W <- W + R^T K (weight C + K^T
    K)^-1`` (section 4, equation 14), which is ops.least_squares.

    Args:
        subject, block, steps, learning_rate, kl, decay, clamp, prefixes, words: see :class:`Rome`; ``clamp`` in
            lengths of the block's output.
        weight: of C beside the facts' own keys; None: :data:`FOR_EACH_INPUT`.
    """

    key, name = "memit", "MEMIT"
    depth = 5
    _values: dict[tuple, torch.Tensor] | None = None

    def __init__(
        self,
        subject: EditableModel,
        *,
        block: int | None = None,
        steps: int = 25,
        learning_rate: float | None = None,
        kl: float = 0.0625,
        decay: float = 0.5,
        clamp: float = 0.75,
        prefixes: int = 5,
        words: int = 200,
        weight: float | None = None,
    ):
        super().__init__(
            subject, block=block, steps=steps, learning_rate=learning_rate, kl=kl, decay=decay, clamp=clamp,
            prefixes=prefixes, words=words,
        )  # fmt: skip
        self.weight = FOR_EACH_INPUT * self.layers[0].m if weight is None else weight

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        self._values = {}
        try:
            yield
        finally:
            self._values = None

    def value(self, fact: Fact, site: nn.Module, origin: torch.Tensor) -> torch.Tensor:
        key = (fact.request, self.learning_rate, self.steps)
        if self._values is None or key not in self._values:
            found = super().value(fact, site, origin)
            if self._values is None:
                return found
            self._values[key] = found
        return self._values[key]

    def _edited_in_turn(self, requests: Sequence[EditRequest]) -> contextlib.AbstractContextManager:
        return self._edited(requests)

    def _write(self, facts: Sequence[Fact]) -> None:
        assert self.metric is not None
        model = self.subject.model
        belows = [FrozenPrefix(model, self.layers) for _ in facts]

        def seen(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
            found = [self._seen(fact, layer, self.last, below) for fact, below in zip(facts, belows, strict=True)]
            keys, states = zip(*found, strict=True)
            return torch.stack(keys), torch.stack(states)

        keys, states = seen(self.layers[0])
        values = self._all_values(facts, states)
        for i, layer in enumerate(self.layers):
            if i:
                keys, states = seen(layer)
            with torch.no_grad():
                lacking = (values - states) / (len(self.layers) - i)
                spectrum = self.metric.spectrum(layer.name).to(keys.device)
                u, delta = ops.least_squares(keys, lacking, spectrum, TINY * self.weight, self.weight)
                self._add(layer, u, -delta)


    def _all_values(self, facts: Sequence[Fact], origins: torch.Tensor) -> torch.Tensor:
        """[N, n]: those of all facts; a sequence that was cut off has kept what it had found."""
        turns, found = self.turns if len(facts) > 1 else None, []
        if turns is not None:
            _, state = turns.resume([fact.request for fact in facts])
            found = list(state.get("values", ()))
        for i in range(len(found), len(facts)):
            found.append(self.value(facts[i], self.last, origins[i]))
            if turns is not None and turns.due(i + 1, len(facts)):
                turns.keep(i + 1, {"values": torch.stack(found)})
        return torch.stack(found).to(origins.device)


class _Rest(NamedTuple):
    """A fact's texts from the subject's last token on: what comes before it never changes, and is read once."""

    inputs: dict[str, torch.Tensor]
    cache: dict[str, Any]
    place: torch.Tensor  # [P + 1]: the subject's last token
    keep: torch.Tensor  # [P + 1, S] bool: what predicts a target's token, and last what follows "<subject> is a"
    labels: torch.Tensor  # those targets' tokens

    def batch(self) -> Batch:
        """For one pass, with a cache of its own."""
        return self.inputs | copy.deepcopy(self.cache)

    @classmethod
    def whole(cls, fact: Fact) -> _Rest:
        """From the first token on."""
        ids, mask, labels = (fact.batch[name] for name in ("input_ids", "attention_mask", "labels"))
        labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], 1)  # what a token predicts
        keep = labels != IGNORE
        targets = labels[keep]
        keep[-1, int(mask[-1].sum()) - 1] = True
        return cls({"input_ids": ids, "attention_mask": mask}, {}, fact.place, keep, targets)

    @classmethod
    def of(cls, model: nn.Module, fact: Fact) -> _Rest:
        """:meth:`whole` where the model keeps no keys and values that a pass can go on from."""
        whole = cls.whole(fact)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        start = int(fact.place.max())
        plain = "position_ids" in inspect.signature(model.forward).parameters
        if start < 1 or not plain or getattr(config, "sliding_window", None) is not None:
            return whole
        shifts = (start - fact.place).tolist()
        ids, mask, keep = (_shifted(part, shifts) for part in (*whole.inputs.values(), whole.keep))
        width = int(keep.any(0).nonzero().max()) + 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            first = {"input_ids": ids[:, :start], "attention_mask": mask[:, :start]}
            cache = cache_of(model(**first, position_ids=positions[:, :start], use_cache=True))
        if not cache:
            return whole
        rest = {"input_ids": ids[:, start:width], "attention_mask": mask[:, :width]}
        rest["position_ids"] = positions[:, start:width]
        return cls(rest, cache, torch.zeros_like(fact.place), keep[:, start:width], whole.labels)


def _shifted(rows: torch.Tensor, shifts: Sequence[int]) -> torch.Tensor:
    """Each row moved to the right, by zeros."""
    out = rows.new_zeros(len(rows), rows.shape[1] + max(shifts))
    for row, new, shift in zip(rows, out, shifts, strict=True):
        new[shift : shift + len(row)] = row
    return out


@contextlib.contextmanager
def _at(site: nn.Module, place: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block ``site`` gives ``change(x)`` for its outputs x [P, h] at the token ``place`` of each text."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        x = output[0] if isinstance(output, tuple) else output
        flat = x.reshape(len(place), -1, x.shape[-1])
        rows = torch.arange(len(place), device=x.device)
        places = place.to(x.device)
        changed = flat.index_put((rows, places), change(flat[rows, places]).to(x.dtype).expand(len(place), -1))
        changed = changed.reshape(x.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with undone() as changes:
        changes.hook(site, hook)
        yield
