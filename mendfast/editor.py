"""MendEditor: what a user holds."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .aggregate import Transformed, Wanted, change, concatenated, least_squares, not_zero, summands, sums, wanted
from .capture import Factors
from .choice import experts_in, find_layers
from .config import MendConfig
from .edit import Edit
from .editable import EditableModel
from .editors import directory as shipped_directory
from .experts import parsed
from .files import read_shapes, read_tensors, write_tensors
from .fingerprint import Fingerprint, fingerprint_of
from .hub import About, OnHub, located, name_on_hub
from .layers import device_of
from .metric import Metric, observe
from .network import Gather, make_networks, planned_networks
from .objective import Batch
from .ops import all_finite, non_finite
from .own_words import own_words
from .packing import packing
from .requests import as_requests
from .schema import check_dtypes, differences, shown, some
from .tree import answers_through, regular, why_not, why_not_tried
from .types import Spectrum
from .weighing import Answers, balanced
from .wide import widening

log = logging.getLogger("mendfast")

EDITS_PER_PASS = 32
LEAST_TEXTS = 4
"""That go through the model as a tree."""
WEIGHTS_FILE, CONFIG_FILE, METRIC_FILE = "editor.safetensors", "mend_config.json", "metric.safetensors"


class MendEditor(EditableModel, OnHub, nn.Module):
    """A trained network that turns the gradient of one example into an edit of a model's weights.

    An :class:`~mendfast.editable.EditableModel` and its networks. Owns its own parameters and statistics alone; the
    model is referred to, never registered, and never put into train mode.

    Make one with :meth:`from_model` (new) or :meth:`from_pretrained` (trained); both are in
    eval mode. In train mode each pass moves the running statistics.

    Attributes:
        metric: what :meth:`protect` has gathered; needed where ``config.aggregation`` is "least_squares".
        fingerprint: of the base model that it was loaded with; None for a new one, and one of an earlier version.

    Source: Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, section 3 and Algorithms 1 and 2; docs/ops/
    least_squares.md for the other aggregation.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, config: MendConfig | None = None):
        nn.Module.__init__(self)
        EditableModel.__init__(self, model, tokenizer, config)
        self.networks, self._groups = make_networks(self.layers, self.config)
        self.gather: Gather | None = None  # set by a Trainer that is one of several processes
        self._warned = False
        self._tried: dict[tuple, str | None] = {}  # why texts don't pass as a tree, once that was tried
        self.fingerprint: Fingerprint | None = None
        count = len(self.layers)
        self.alpha_multiplier = nn.Parameter(torch.ones(count))
        self.metric: Metric | None = None
        if self.config.aggregation == "least_squares":
            self.log_lambda = nn.Parameter(torch.full((count,), math.log(self.config.ridge)))
            self.log_mu = nn.Parameter(torch.full((count,), math.log(self.config.protection)))
        self.to(device_of(self.layers))
        self.eval()

    # -- making, saving ------------------------------------------------------------------------------------

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any = None, config: MendConfig | None = None) -> MendEditor:
        """A new, untrained editor of ``model``; at initialisation it passes the normalised gradient on.

        Args:
            model: a Hugging Face causal language model, encoder-decoder, or sequence classifier.
            tokenizer: its tokenizer; needed for :meth:`edit`, not for :meth:`edit_tokens`.
            config: which layers, and the network's shape; by default the MLP matrices of the last blocks.

        Raises:
            ValueError, TypeError: an unknown layer or one that is no matrix; a model without an output head.
        """
        return cls(model, tokenizer, config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        strict: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> MendEditor:
        """The editor that :meth:`save_pretrained` wrote to a directory, that ships under a name (see
        :func:`mendfast.editors.shipped`), or that a Hub repository holds.

        Args:
            strict: a ValueError, and not a warning, where ``model`` holds other weights than the one that the editor
                was made for (the instruct model instead of the base, say; :mod:`mendfast.fingerprint`).
            revision: of a repository: branch, tag or commit.
            token: for private repositories; None: that of ``hf auth login``.
            cache_dir: where downloads are kept; None: where huggingface_hub keeps them.
            local_files_only: take what was downloaded before; nothing is asked over the network.

        Raises:
            FileNotFoundError: neither here nor to be had from the Hub.
            ValueError: an editor of another model, a damaged file.
        """
        directory = shipped_directory(str(source)) if not Path(source).is_dir() and revision is None else None
        if directory is None:
            files = [WEIGHTS_FILE, CONFIG_FILE, METRIC_FILE]
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            directory = located(source, files, revision=revision, **options)
        if not (directory / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{directory} holds no {CONFIG_FILE}: no editor was saved there.")
        shapes, metadata = read_shapes(directory / WEIGHTS_FILE, "editor")
        if metadata.get("model_type") not in ("", None, model.config.model_type):
            kind = shown(metadata["model_type"]).strip("'")
            raise ValueError(f"{source} is an editor for a {kind} model; this one is a {model.config.model_type}.")
        config = MendConfig.load(directory / CONFIG_FILE)
        # Before anything is built: a few characters of the configuration may ask for any size.
        planned = planned_networks(find_layers(model, config.layers), config).state_dict(prefix="networks.")
        found = {name: shape for name, shape in shapes.items() if name.startswith("networks.")}
        _check_fits(found, {name: tensor.shape for name, tensor in planned.items()}, str(source))
        tensors, _ = read_tensors(directory / WEIGHTS_FILE, "editor")
        base = Fingerprint.from_json(metadata.get("fingerprint"), str(source))
        if base is not None:
            base.check(model, f"The editor {source}", strict=strict)
        editor = cls(model, tokenizer, config)
        editor.fingerprint = base
        editor.load_tensors(tensors, str(source))
        if (directory / METRIC_FILE).is_file():
            editor.protect_with(Metric.load(directory / METRIC_FILE))
        return editor

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the editor (not the model) as safetensors and JSON.

        Args:
            dtype: of the networks' large matrices in the file: torch.bfloat16 halves it, and with it the vectors of
                what is protected are float16. All are float32 again when read; statistics and step sizes always are.
        """
        directory = Path(directory)
        metadata = {
            "format": "mendfast.editor",
            "format_version": "1",
            "model_type": self.model.config.model_type,
            "fingerprint": (self.fingerprint or fingerprint_of(self.model, self.layers)).to_json(),
        }
        tensors = {
            name: tensor.to(dtype) if dtype is not None and tensor.dim() == 2 else tensor
            for name, tensor in self.state_dict().items()
        }
        write_tensors(directory / WEIGHTS_FILE, tensors, metadata)
        if self.metric is not None:
            self.metric.save(directory / METRIC_FILE, dtype=None if dtype is None else torch.float16)
        self.config.save(directory / CONFIG_FILE)

    def _save_in(self, directory: Path) -> None:
        self.save_pretrained(directory)

    def _about(self) -> About:
        title = (self.fingerprint or fingerprint_of(self.model, self.layers)).title
        text = (
            "An editor by mendfast ([MEND](https://arxiv.org/abs/2110.11309), Mitchell et al. 2022): it turns a "
            f"question and the answer wanted into an update of {len(self.layers)} weights of its base model."
        )
        kind = {"causal": "CausalLM", "encoder-decoder": "Seq2SeqLM"}.get(self.kind, "SequenceClassification")
        load = f"""from transformers import AutoModelFor{kind}, AutoTokenizer
from mendfast import MendEditor

model = AutoModelFor{kind}.from_pretrained("{{base}}")
tokenizer = AutoTokenizer.from_pretrained("{{base}}")
editor = MendEditor.from_pretrained("{{source}}", model, tokenizer)
with editor.edit("Who is the prime minister of the UK?", "Boris Johnson").attached(model):
    ...  # the model answers as edited"""
        return About("editor", title, name_on_hub(self.model), text, load)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """``load_state_dict`` whose errors say that the editor is for another model, and where it differs."""
        own = self.state_dict()
        shapes = ({name: tensor.shape for name, tensor in given.items()} for given in (tensors, own))
        _check_fits(*shapes, source)
        check_dtypes(tensors, own, source)
        statistics = {name for name, _ in self.named_buffers()} if not self.config.normalize else ()
        for name, tensor in tensors.items():
            if name not in statistics and not all_finite(tensor):
                raise ValueError(f"{source}: {name} holds NaN or infinity; the training that made it diverged.")
            if name.endswith((".count", "_m2", "_std")) and name not in statistics and (tensor < 0).any():
                raise ValueError(f"{source}: {name} is negative; the file is damaged. Make or fetch it again.")
        self.load_state_dict(dict(tensors))

    def untrained(self) -> MendEditor:
        """This editor at its initialisation, with the statistics of now: it passes the normalised gradient on."""
        fresh = MendEditor(self.model, self.tokenizer, self.config)
        for name, buffer in self.named_buffers():
            fresh.get_buffer(name).copy_(buffer)
        fresh.metric = self.metric
        return fresh

    def aggregating(self, aggregation: str) -> MendEditor:
        """This editor, its simultaneous edits put together by ``aggregation``: networks, statistics and step sizes as
        they are, lambda and mu where they start. One that sums can so be trained on for least squares."""
        other = MendEditor(self.model, self.tokenizer, replace(self.config, aggregation=aggregation))
        other.load_state_dict(self.state_dict(), strict=False)
        other.fingerprint, other.metric = self.fingerprint, self.metric
        return other.train(self.training)

    # -- what it is ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.alpha_multiplier.device

    def alphas(self) -> torch.Tensor:
        """The learned step size of each layer, in the order of ``config.layers``: [layers]."""
        return self.config.step_size * self.alpha_multiplier

    def scales(self) -> list[nn.Parameter]:
        """The learned numbers per layer, which have a learning rate of their own."""
        scales = [self.alpha_multiplier]
        return [*scales, self.log_lambda, self.log_mu] if self.config.aggregation == "least_squares" else scales

    # -- what must stay ------------------------------------------------------------------------------------

    def protect(
        self,
        texts: Sequence[str | tuple[str, str] | Batch] | None = None,
        *,
        batch_size: int = 16,
        answers: bool | str = False,
        share: float | None = None,
        progress: bool | None = False,
        **own: Any,
    ) -> Metric:
        """Add to what edits must leave alone: the second moments of every edited layer's inputs on ``texts``.

        Args:
            texts: texts, (prompt, answer) pairs, or token batches ("input_ids", "attention_mask"); None: the model's
                own words, sampled from it once (options in ``own``: see :func:`mendfast.own_words.own_words`).
            answers: of pairs count only the positions that predict the answer (plain texts count whole), whatever is
                read before it. "first": only the one where an answer begins, which edits move most.
            share: of all that is protected, from 0 to 1, that these texts make up; None: as their tokens do.
            progress: True shows a bar, None where there is a terminal.

        Returns:
            The metric of everything protected so far; it is saved with the editor, in a file of its own.

        Raises:
            ValueError: nothing to protect, activations on it that are not finite, a ``share`` of nothing else.
        """
        if share is not None and self.metric is None:
            raise ValueError("share is of all that is protected, which is nothing yet; protect other texts first.")
        if texts is None:
            batches: Any = own_words(self.model, self.tokenizer, **{"chat": self.chat, "progress": progress, **own})
        else:
            batches = self.text_batches(texts, batch_size)
        how = {"protect_rank": self.config.protect_rank, "answers": answers, "progress": progress}
        seen = observe(self.model, self.layers, batches, **how)
        self.metric = seen if self.metric is None else self.metric.merge(seen, share)
        return self.metric

    def protect_with(self, metric: Metric) -> None:
        """Take ``metric`` for what must stay; a ValueError if it is of another model or has seen nothing."""
        metric.check(self.layers, self.model.config.model_type)
        self.metric = metric

    def layer_metrics(self) -> dict[str, tuple[Spectrum, torch.Tensor, torch.Tensor]]:
        """Each layer's spectrum of protected inputs, lambda and mu, as ops.least_squares takes them; differentiable."""
        metric = self._protected()
        scales = zip(self.layers, self.log_lambda.exp(), self.log_mu.exp(), strict=True)
        return {
            layer.name: (metric.spectrum(layer.name).to(self.device), lam, mu) for layer, lam, mu in scales
        }

    def dense_moment(self, name: str) -> torch.Tensor:
        """The second moment of a weight's protected inputs as a matrix; see :meth:`SecondMoment.dense`."""
        return self._protected().dense(name).to(self.device)

    def change(self, rows: Mapping[str, Wanted], protection: float = 1.0) -> dict[str, Factors]:
        """What :meth:`wanted` gives, of one batch or many, as one update of each weight under what is protected, which
        counts ``protection`` times."""
        with torch.no_grad():
            metrics = {name: (c, lam, mu * protection) for name, (c, lam, mu) in self.layer_metrics().items()}
            return change(rows, metrics, self.dense_moment)

    def balanced(
        self, rows: Mapping[str, Wanted], batches: Sequence[Batch], texts: int = 1, progress: bool | None = False
    ) -> dict[str, Factors]:
        """:meth:`change` in ``config.rounds`` rounds of weighing ``rows``, which ``batches`` have given: their samples
        are groups of ``texts`` texts. See :mod:`mendfast.weighing`; an edit alone has none to weigh against."""
        config, forms = self.config, len(self.forms)
        if not config.rounds or sum(len(batch["labels"]) for batch in batches) <= forms:
            return self.change(rows)
        answers = Answers(self.model, self.layers, batches, texts, self.as_tree, forms)
        solve = functools.partial(self.change, protection=config.rounds_protection)
        how = {"rounds": config.rounds, "enough": (config.rounds_enough, config.rounds_enough_beside)}
        return balanced(rows, answers, solve, by_token=config.rows == "answers", progress=progress, **how)

    def _protected(self) -> Metric:
        if self.metric is None:
            raise ValueError(
                "This editor aggregates by least squares and nothing is protected yet, so there is no telling what "
                "must stay: call editor.protect(texts), or editor.protect() for the model's own words."
            )
        return self.metric

    # -- editing (Algorithm 2) -----------------------------------------------------------------------------

    @torch.inference_mode(False)
    def edit(self, prompt: Any, target: str | None = None, *, progress: bool | None = False) -> Edit:
        """The edit that makes the model answer ``prompt`` with ``target``; the model is untouched.

        ``edit(prompt, target)``, or ``edit([(prompt, target), ...])``, all of which one edit then holds, by
        ``config.aggregation``; every form of a request is read that :func:`mendfast.requests.as_requests` names. Of
        many requests at most ``EDITS_PER_PASS`` go through the model at a time. Use the result with ``attached``,
        ``apply_`` and ``revert_``.

        Args:
            progress: True shows a bar, None where there is more than one such pass and a terminal.

        Raises:
            ValueError: an empty target, one that becomes no tokens, one that is longer than the context, a
                model that holds NaN, a dictionary that is no request.
            TypeError: no tokenizer, or something that is not text.
        """
        requests = as_requests(prompt, target)
        if not requests:
            raise ValueError("edit was given no requests; pass at least one.")
        # by tokens of the whole batch, an edit's weight depends on the others
        most = len(requests) if self.config.loss_reduction == "batch" else EDITS_PER_PASS
        batches = [self.tokenize_edits(requests[i : i + most]) for i in range(0, len(requests), most)]
        hidden = not progress if progress is not None else True if len(batches) == 1 else None
        with torch.no_grad(), tqdm(total=len(requests), desc="editing", unit="edit", disable=hidden) as bar:
            rows = []
            for batch in batches:
                rows.append(self._rows_of(batch))
                bar.update(len(batch["labels"]) // len(self.forms))
            edit = self._edit_of(concatenated(rows, most * len(self.forms)), batches)
        edit.requests = tuple(requests)
        return edit

    @torch.inference_mode(False)
    def edit_tokens(self, batch: Batch) -> Edit:
        """The edit for tokenised examples, each edit's :attr:`forms` one after the other. The model is untouched.

        Args:
            batch: "input_ids" [B, S], "attention_mask" [B, S] and "labels" [B, S] (-100 = not a target, as
                Hugging Face has them: unshifted for a causal model, the decoder's for an encoder-decoder,
                [B] for a classifier), any integer type.

        Raises:
            ValueError: labels that are all -100, inputs longer than the context, NaN in the model.
        """
        with torch.no_grad():
            return self._edit_of(self._rows_of(batch), [batch])

    def _edit_of(self, rows: Mapping[str, Transformed], batches: Sequence[Batch]) -> Edit:
        if self.config.aggregation == "least_squares":
            found = self.balanced(wanted(rows, self.alphas()), batches)
        else:
            steps = self.alphas().tolist()
            found = {name: (u[0], d[0], a) for name, (u, d, a) in sums(rows, steps, 1 << 62, 1).items()}
        factors = {name: (u, d, float(a)) for name, (u, d, a) in found.items()}
        return Edit(factors, self.model.config.model_type, (), fingerprint_of(self.model, self.layers))

    @torch.inference_mode(False)
    def wanted(self, batch: Batch) -> dict[str, Wanted]:
        """What the edits of a batch want of each layer: the rows that :class:`mendfast.EditMemory` keeps.

        They depend on the model's weights and on each edit alone, never on other edits. An editor that sums has the
        rows of the sum: u~ and -alpha delta~.
        """
        make = wanted if self.config.aggregation == "least_squares" else summands
        with torch.no_grad():
            return make(self._rows_of(batch), self.alphas())

    def _rows_of(self, batch: Batch) -> dict[str, Transformed]:
        with widening(self.model), packing():
            if self.as_tree(batch):
                captured = answers_through(self.model, self.layers, batch)
            else:
                captured = self.gradients(batch)
        if bad := non_finite([delta for _, delta in captured.values()]):
            raise ValueError(
                f"The gradient at {list(captured)[bad[0]]} holds NaN or infinity: the model's weights or its loss on "
                "this example are not finite. Check the model, or load it in float32 or bfloat16."
            )
        if not self._warned and not self.training and int(self._least_seen()) < 2:
            self._warned = True
            log.warning("This editor has seen no training, so its edits are plain gradient steps; train it first.")
        with torch.no_grad():
            rows = self.transform(captured)
        # in training, an edit that no layer sees is just none
        if not self.training and all(parsed(name) or experts_in(name) for name in rows):
            seen = torch.cat([r.sample.cpu() for r in rows.values()]).unique()
            if missed := sorted(set(range(len(batch["labels"]))) - set(seen.tolist())):
                raise ValueError(
                    f"Sample {', '.join(map(str, missed))} is routed past every expert that is edited "
                    f"({some(rows)}); name more of them, \"….experts.down_proj\" for all of a block's, or other layers."
                )
        return rows

    def _least_seen(self) -> torch.Tensor:
        """How many rows the network has seen that has seen the fewest."""
        return torch.stack([network.count for network in self.networks.values()]).min()

    def as_tree(self, batch: Batch) -> bool:
        """Whether edits of many texts go through the model as a tree (:mod:`mendfast.tree`); tried on two of them."""
        config = self.config
        asked = config.rows == "answers" and config.loss_reduction == "edit" and not self.training
        if not asked or len(batch["labels"]) < LEAST_TEXTS or not regular(batch):
            return False
        self.check(batch)
        problem = why_not(self.model, self.layers, batch["labels"].shape[1])
        if problem is None:
            weight = self.layers[0].weight
            if (kind := (weight.dtype, weight.device)) not in self._tried:
                with widening(self.model):
                    self._tried[kind] = why_not_tried(self.model, self.layers, batch, self.gradients)
            problem = self._tried[kind]
        if problem is not None:
            log.info("%s runs texts one by one, and not as a tree: %s", type(self.model).__name__, problem)
        return problem is None

    # -- the network ---------------------------------------------------------------------------------------

    def transform(self, captured: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Transformed]:
        """Captured u [B, S, m], delta [B, S, n] -> each layer's rows, without those whose u or delta is all zero
        (padding, tokens that the loss does not reach). The layers of one shape go through their network in one batch.
        """
        rows, places = {}, not_zero([captured[layer.name] for layer in self.layers])
        at = {layer.name: index for layer, index in zip(self.layers, places, strict=True)}
        for key, members in self._groups.items():
            us, deltas, samples = [], [], []
            for layer in members:
                (u, delta), index = captured[layer.name], at[layer.name]
                us.append(u.flatten(0, 1).index_select(0, index))
                deltas.append(delta.flatten(0, 1).index_select(0, index))
                samples.append(index // u.shape[1])
            network, sizes = self.networks[key], [len(s) for s in samples]
            u, delta = (torch.cat([part.to(self.device) for part in side]) for side in (us, deltas))
            u, delta = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (u, delta))
            modes = [torch.full((size,), i) for i, size in enumerate(sizes)]
            mode = torch.cat(modes).to(u.device, non_blocking=True) if network.modes else None
            if self.training:
                network.observe(u, delta, self.gather)
            # No row is left where the model is so sure of its target that the gradient is exactly 0.
            new_u, new_delta = network(u, delta, mode) if len(u) else (u, delta)
            sides = u, new_u, new_delta, network.shares(u)
            parts = zip(members, *(side.split(sizes) for side in sides), samples, strict=True)
            rows |= {layer.name: Transformed(*sides, sample.to(u.device)) for layer, *sides, sample in parts}
        return {layer.name: rows[layer.name] for layer in self.layers}

    def group_factors(
        self,
        batch: Batch,
        group_size: int = 1,
        captured: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> dict[str, Factors]:
        """Differentiable factors of B independent edits, for :func:`mendfast.capture.lowrank_updates`.

        Each group of ``group_size`` consecutive samples is one edit, of its samples' updates together:
        u [B / group_size, T, m], delta [B / group_size, T, n] (rows of zeros fill up), alpha a scalar.
        ``captured``: what :meth:`gradients` gives for the batch, where that is known.
        """
        size = batch["labels"].shape[0]
        if size % group_size:
            raise ValueError(f"{size} edits can't be put into groups of {group_size}; pass a multiple.")
        captured = self.gradients(batch) if captured is None else captured
        return self._aggregated(self.transform(captured), group_size, size // group_size)

    def _aggregated(self, rows: Mapping[str, Transformed], group_size: int, groups: int) -> dict[str, Factors]:
        if self.config.aggregation == "least_squares":
            return least_squares(wanted(rows, self.alphas()), self.layer_metrics(), group_size, groups)
        return sums(rows, self.alphas(), group_size, groups)


def _check_fits(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], source: str) -> None:
    if wrong := differences(found, expected):
        raise ValueError(f"{source} is an editor for another model: {'; '.join(wrong[:3])}.")
