"""MendEditor: what a user holds."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .capture import Factors, capture
from .config import MendConfig
from .edit import Edit, EditRequest
from .files import read_tensors, write_tensors
from .labels import class_ids, collate, encode_pair, pad_token_id
from .layers import device_of, execution_device, find_layers
from .network import EditorNetwork, Gather
from .objective import IGNORE, Batch, context_length, model_kind, nll, target_rows, to_device
from .ops import all_finite

log = logging.getLogger("mendfast")

ENCODED_AT_MOST = 200_000
WEIGHTS_FILE, CONFIG_FILE = "editor.safetensors", "mend_config.json"


class MendEditor(nn.Module):
    """A trained network that turns the gradient of one example into an edit of a model's weights.

    Owns its own parameters and statistics alone; the model is referred to, never registered, and never put
    into train mode. Make one with :meth:`from_model` (new) or :meth:`from_pretrained` (trained); both are in
    eval mode. In train mode each pass moves the running statistics.

    Source: Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, section 3 and Algorithms 1 and 2.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, config: MendConfig | None = None):
        super().__init__()
        config = config or MendConfig()
        self._outside = (model, tokenizer)  # a tuple, so that nn.Module registers neither
        self.kind = model_kind(model)
        self.layers = find_layers(model, config.layers)
        # A copy: the caller's configuration may make editors of other models, whose layers have other names.
        self.config = replace(config, layers=[layer.name for layer in self.layers])
        if config.layers is None:
            log.info("mendfast edits %s", ", ".join(layer.name for layer in self.layers))
        groups = defaultdict(list)
        for layer in self.layers:
            groups[layer.shape if self.config.shared else layer.name].append(layer)
        self.networks = nn.ModuleDict()
        self._groups: dict[str, list] = {}
        for key, members in groups.items():
            name = str(key).replace(".", "#")
            modes = len(members) if self.config.shared else None
            self.networks[name] = EditorNetwork(*members[0].shape, modes, self.config)
            self._groups[name] = members
        self.gather: Gather | None = None  # set by a Trainer that is one of several processes
        self._warned = False
        self._encoded: dict[tuple, dict[str, list[int]]] = {}
        self.alpha_multiplier = nn.Parameter(torch.ones(len(self.layers)))
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
    def from_pretrained(cls, source: str | Path, model: nn.Module, tokenizer: Any = None) -> MendEditor:
        """The editor that :meth:`save_pretrained` wrote to a directory, or that a Hub repository holds."""
        directory = Path(source)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            try:
                directory = Path(snapshot_download(str(source), allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
            except Exception as error:
                raise FileNotFoundError(
                    f"{source!r} is no directory here, and the Hub did not give it either: {error}"
                ) from error
        if not (directory / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{directory} holds no {CONFIG_FILE}: no editor was saved there.")
        tensors, metadata = read_tensors(directory / WEIGHTS_FILE, "editor")
        if metadata.get("model_type") not in ("", None, model.config.model_type):
            raise ValueError(
                f"{source} is an editor for a {metadata['model_type']} model; this one is a {model.config.model_type}."
            )
        editor = cls(model, tokenizer, MendConfig.load(directory / CONFIG_FILE))
        editor.load_tensors(tensors, str(source))
        return editor

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the editor (not the model) as safetensors and JSON."""
        directory = Path(directory)
        metadata = {
            "format": "mendfast.editor",
            "format_version": "1",
            "model_type": self.model.config.model_type,
        }
        write_tensors(directory / WEIGHTS_FILE, self.state_dict(), metadata)
        self.config.save(directory / CONFIG_FILE)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what :meth:`save_pretrained` writes; ``options`` as ``huggingface_hub.HfApi.create_repo``."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, exist_ok=True, **options)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory))

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """``load_state_dict`` whose errors say that the editor is for another model, and where it differs."""
        own = self.state_dict()
        wrong = [
            f"{name} is {tuple(tensors[name].shape) if name in tensors else 'missing'}, here {tuple(own[name].shape)}"
            for name in own
            if name not in tensors or tensors[name].shape != own[name].shape
        ] + [f"{name} is not known here" for name in tensors if name not in own]
        if wrong:
            raise ValueError(f"{source} is an editor for another model: {'; '.join(wrong[:3])}.")
        self.load_state_dict(dict(tensors))

    def untrained(self) -> MendEditor:
        """This editor at its initialisation, with the statistics of now: it passes the normalised gradient on."""
        fresh = MendEditor(self.model, self.tokenizer, self.config)
        for name, buffer in self.named_buffers():
            fresh.get_buffer(name).copy_(buffer)
        return fresh

    # -- what it is ----------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self._outside[0]

    @property
    def tokenizer(self) -> Any:
        return self._outside[1]

    @property
    def device(self) -> torch.device:
        return self.alpha_multiplier.device

    def alphas(self) -> torch.Tensor:
        """The learned step size of each layer, in the order of ``config.layers``: [layers]."""
        return self.config.step_size * self.alpha_multiplier

    # -- editing (Algorithm 2) -----------------------------------------------------------------------------

    def edit(self, prompt: str | Sequence[EditRequest | tuple[str, str]], target: str | None = None) -> Edit:
        """The edit that makes the model answer ``prompt`` with ``target``; the model is untouched.

        ``edit(prompt, target)`` or ``edit([EditRequest(prompt, target), ...])``, which gives the sum of the
        separate edits. Use the result with ``attached``, ``apply_`` and ``revert_``.

        Raises:
            ValueError: an empty target, one that becomes no tokens, one that is longer than the context, a
                model that holds NaN.
            TypeError: no tokenizer, or something that is not text.
        """
        if isinstance(prompt, str):
            if target is None:
                raise TypeError("edit(prompt, target) needs the target: what the model should answer.")
            requests = [EditRequest(prompt, target)]
        elif target is not None:
            raise TypeError("edit takes one prompt and its target, or a list of EditRequest(prompt, target).")
        else:
            requests = [EditRequest(*request) for request in prompt]
        if not requests:
            raise ValueError("edit was given no requests; pass at least one.")
        edit = self.edit_tokens(self.tokenize(requests))
        edit.requests = tuple(requests)
        return edit

    def tokenize(self, requests: Sequence[EditRequest | tuple[str, str]]) -> dict[str, torch.Tensor]:
        """The batch (input_ids, attention_mask, labels) that stands for the requests, right-padded."""
        if self.tokenizer is None:
            raise TypeError("This editor has no tokenizer; pass one to from_model, or use edit_tokens.")
        if self.kind == "classifier":
            prompts = [self.config.prompt_template.replace("{prompt}", prompt) for prompt, _ in requests]
            batch = dict(self.tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt"))
            return {**batch, "labels": torch.tensor([self._class(target) for _, target in requests])}
        return collate(
            [self.encode(*request) for request in requests],
            pad_token_id=pad_token_id(self.tokenizer),
            encoder_decoder=self.kind == "encoder-decoder",
        )

    def encode(self, prompt: str, target: str) -> dict[str, list[int]]:
        """One request as token ids and labels, by the template, separator and EOS of the configuration.

        Kept for the next time: training and evaluation ask for the same facts again and again, and on a small
        model tokenising one costs as much as editing it.
        """
        config = self.config
        key = (prompt, target, config.prompt_template, config.separator, config.append_eos)
        if (found := self._encoded.get(key)) is None:
            found = encode_pair(
                self.tokenizer,
                config.prompt_template.replace("{prompt}", prompt),
                target,
                encoder_decoder=self.kind == "encoder-decoder",
                separator=config.separator,
                append_eos=config.append_eos,
                max_length=context_length(self.model),
            )
            if len(self._encoded) >= ENCODED_AT_MOST:
                self._encoded.clear()
            self._encoded[key] = found
        return found

    def _class(self, target: str) -> int:
        names = class_ids(self.model.config)
        try:
            return names[str(target).strip().lower()]
        except KeyError:
            raise ValueError(f"The classifier has no label {target!r}; it has {', '.join(names)}.") from None

    def edit_tokens(self, batch: Batch) -> Edit:
        """The edit for tokenised examples: the sum of the separate updates. The model is untouched.

        Args:
            batch: "input_ids" [B, S], "attention_mask" [B, S] and "labels" [B, S] (-100 = not a target, as
                Hugging Face has them: unshifted for a causal model, the decoder's for an encoder-decoder,
                [B] for a classifier), any integer type.

        Raises:
            ValueError: labels that are all -100, inputs longer than the context, NaN in the model.
        """
        captured = self.gradients(batch)
        for name, (_, delta) in captured.items():
            if not all_finite(delta):
                raise ValueError(
                    f"The gradient at {name} holds NaN or infinity: the model's weights or its loss on this "
                    "example are not finite. Check the model, or load it in float32 or bfloat16."
                )
        if not self._warned and not self.training and any(int(net.count) < 2 for net in self.networks.values()):
            self._warned = True
            log.warning("This editor has seen no training, so its edits are plain gradient steps; train it first.")
        with torch.no_grad():
            rows = self.transform(captured)
        alphas = self.alphas().tolist()
        factors = {name: (u, delta, alpha) for (name, (u, delta, _)), alpha in zip(rows.items(), alphas, strict=True)}
        return Edit(factors, self.model.config.model_type)

    def gradients(self, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """u [B, S, m] and delta [B, S, n] of every layer, for the loss that ``config.loss_reduction`` names.

        One forward and one backward pass; no gradient below the first edited layer, none of a parameter.
        """
        self._check(batch)
        batch = to_device(batch, execution_device(self.model.get_input_embeddings()))
        size = batch["labels"].shape[0]
        with capture(self.model, self.layers, size) as captured:
            rows = target_rows(self.model, batch, for_nll=True)
            if self.config.loss_reduction == "batch":
                rows, size = rows._replace(sample=torch.zeros_like(rows.sample)), 1
            # Samples do not interact, so the gradient of the sum is each edit's own gradient.
            return captured.rows(nll(rows, size).sum())

    def _check(self, batch: Batch) -> None:
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise ValueError(f"The batch lacks {', '.join(missing)}; it has {', '.join(batch)}.")
        labels = batch["labels"]
        # A causal model predicts every token but the first.
        targets = labels[:, 1:] if self.kind == "causal" else labels
        if self.kind != "classifier":
            if targets.dim() != 2:
                raise ValueError(f"labels have the shape {tuple(labels.shape)}; they must be [batch, tokens].")
            empty = (targets == IGNORE).all(-1).nonzero().flatten().tolist()
            if empty:
                raise ValueError(
                    f"The labels of sample {', '.join(map(str, empty))} are all -100: there is nothing to learn. "
                    "Set the target tokens' labels to their ids."
                )
        limit, length = context_length(self.model), batch["input_ids"].shape[-1]
        if limit is not None and length > limit:
            raise ValueError(f"The input has {length} tokens and the model takes {limit}; shorten the prompt.")

    # -- the network ---------------------------------------------------------------------------------------

    def transform(
        self, captured: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Captured u [B, S, m], delta [B, S, n] -> u~ [N, m], delta~ [N, n], sample [N], for each layer.

        Rows whose u or delta is all zero (padding, tokens that the loss does not reach) are left out. The
        layers of one shape go through their network in one batch of rows.
        """
        rows: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for key, members in self._groups.items():
            us, deltas, samples = [], [], []
            for layer in members:
                u, delta = captured[layer.name]
                # NaN is not 0, and stays to be seen.
                keep = (u.abs().amax(-1) != 0) & (delta.abs().amax(-1) != 0)
                index = keep.flatten().nonzero().squeeze(1)
                us.append(u.flatten(0, 1).index_select(0, index))
                deltas.append(delta.flatten(0, 1).index_select(0, index))
                samples.append(index // keep.shape[1])
            network, sizes = self.networks[key], [len(s) for s in samples]
            u, delta = (torch.cat([part.to(self.device) for part in side]).float() for side in (us, deltas))
            mode = torch.repeat_interleave(
                torch.arange(len(members), device=u.device), torch.tensor(sizes, device=u.device)
            )
            if self.training:
                network.observe(u, delta, self.gather)
            # No row is left where the model is so sure of its target that the gradient is exactly 0.
            new_u, new_delta = network(u, delta, mode if network.modes else None) if len(u) else (u, delta)
            parts = zip(members, new_u.split(sizes), new_delta.split(sizes), samples, strict=True)
            rows |= {layer.name: (one, two, sample.to(one.device)) for layer, one, two, sample in parts}
        return {layer.name: rows[layer.name] for layer in self.layers}

    def group_factors(self, batch: Batch, group_size: int = 1) -> dict[str, Factors]:
        """Differentiable factors of B independent edits, for :func:`mendfast.capture.lowrank_updates`.

        Each group of ``group_size`` consecutive samples is one edit, the sum of its samples' updates:
        u [B / group_size, T, m], delta [B / group_size, T, n] (rows of zeros fill up), alpha a scalar tensor.
        """
        size = batch["labels"].shape[0]
        if size % group_size:
            raise ValueError(f"{size} edits can't be put into groups of {group_size}; pass a multiple.")
        groups, alphas, factors = size // group_size, self.alphas(), {}
        for (name, (u, delta, sample)), alpha in zip(
            self.transform(self.gradients(batch)).items(), alphas, strict=True
        ):
            group = sample // group_size
            counts = torch.bincount(group, minlength=groups)
            width = int(counts.max()) if len(group) else 0
            place = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
            slot = group * width + place
            factors[name] = tuple(
                rows.new_zeros(groups * width, rows.shape[-1]).index_copy(0, slot, rows).view(groups, width, -1)
                for rows in (u, delta)
            ) + (alpha,)
        return factors
