"""EasyEdit's interface on mendfast: change the import, keep the program. docs/easyedit.md says what differs.

>>> from mendfast.compat.easyedit import BaseEditor, MENDHyperParams
>>> editor = BaseEditor.from_hparams(MENDHyperParams.from_hparams("hparams/MEND/gpt2-xl"))
>>> metrics, edited_model, weights_copy = editor.edit(prompts=[...], target_new=[...])

The interface: github.com/zjunlp/EasyEdit, ``easyeditor/editors/editor.py``; ROME's (and MEMIT's) ``apply_*_to_model``.
"""

from __future__ import annotations

import copy as copying
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..edit import Edit
from ..editor import MendEditor
from ..layers import named_layers
from ..ledger import forget_edits
from ..memory import EditMemory
from ..objective import target_rows, to_device
from ..requests import EditRequest
from ..schema import shown, some
from ..updates import checksum
from .easyedit_hparams import HyperParams, MENDHyperParams, MENDTrainingHparams
from .easyedit_model import load_archive, load_model
from .easyedit_training import CounterFactDataset, EditTrainer, ZsreDataset

__all__ = [
    "BaseEditor",
    "CounterFactDataset",
    "EditTrainer",
    "MENDHyperParams",
    "MENDTrainingHparams",
    "ZsreDataset",
    "apply_mend_to_model",
]

log = logging.getLogger("mendfast")

Weights = dict[str, torch.Tensor]
_KNOWN = ("subject", "loc_prompts", "requests")


class BaseEditor:
    """EasyEdit's editor, of MEND alone.

    Attributes:
        model, tok: the plain Hugging Face model and its tokenizer.
        editor: the :class:`~mendfast.MendEditor` behind it.
        memory: the :class:`~mendfast.EditMemory` of the sequential edits; what is removed from it is gone with the
            next call.
    """

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> BaseEditor:
        return cls(hparams)

    def __init__(self, hparams: HyperParams):
        if not isinstance(hparams, MENDHyperParams):
            raise TypeError(f"hparams is a {type(hparams).__name__}; pass mendfast.compat.easyedit.MENDHyperParams.")
        self.hparams, self.alg_name, self.model_name = hparams, hparams.alg_name, hparams.model_name
        self.model, self.tok = load_model(hparams)
        self.editor = load_archive(hparams, self.model, self.tok)
        self.memory = EditMemory(self.editor)  # of sequential edits
        self._written = _Written(self.model)

    def edit(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        ground_truth: str | Sequence[str | None] | None = None,
        target_neg: str | Sequence[str] | None = None,
        rephrase_prompts: str | Sequence[str] | None = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        portability_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> tuple[list[dict[str, Any]], nn.Module, Weights]:
        """Edit, and measure before and after.

        Args:
            sequential_edit: the edits go into :attr:`memory` and stay, over calls; False: each is made and measured
                alone, beside those that stay.
            kwargs: ``subject``, ``loc_prompts``, and ``requests`` as EasyEdit has them.

        Returns:
            (metrics, edited_model, weights_copy): a dictionary for each edit; the model itself, which carries the
            edits (not sequential: the last of them, until the next call); the edited weights as they were before
            the call.

        Raises:
            ValueError, TypeError: lists of unlike lengths, a target that says nothing, ...; before anything is edited.
        """
        requests = kwargs.pop("requests", None)
        if requests is None:
            requests = _requests(
                prompts, target_new, ground_truth, target_neg, rephrase_prompts, locality_inputs, portability_inputs,
                **{name: kwargs.pop(name) for name in _KNOWN if name in kwargs},
            )  # fmt: skip
        if kwargs:
            log.warning("BaseEditor.edit: %s mean nothing to mendfast and are ignored.", ", ".join(kwargs))
        return self.edit_requests(requests, sequential_edit, verbose)

    def edit_requests(
        self, requests: Sequence[Mapping[str, Any]], sequential_edit: bool = False, verbose: bool = True
    ) -> tuple[list[dict[str, Any]], nn.Module, Weights]:
        """:meth:`edit` for requests that are made already."""
        if not requests:
            raise ValueError("edit was given no requests; pass at least one prompt and its target.")
        pairs = [_pair(request) for request in requests]
        for pair in pairs:
            self.editor.tokenize([pair])  # what can't be edited is said before anything is
        self._put(self.memory.edit())
        before = {name: weight.detach().clone() for name, weight in self._written.weights(self.editor).items()}
        metrics: list[dict[str, Any]] = [{"pre": _quality(self.editor, request)} for request in requests]
        bar = tqdm(requests, disable=None if verbose else True, desc="editing")
        for i, request in enumerate(bar):
            self._written.restore()
            if sequential_edit:
                self.memory.add([pairs[i]])
                self._put(self.memory.edit())
            else:
                self._put(Edit.sum([self.memory.edit(), self.editor.edit([pairs[i]])]))
            after = _quality(self.editor, request)
            metrics[i] |= {"case_id": i, "requested_rewrite": dict(request), "post": after}
            _compare(metrics[i]["pre"]["locality"], after["locality"])
            if verbose:
                log.info("%d editing: %s -> %s\n%s", i, *pairs[i], metrics[i])
        return metrics, self.model, before

    def _put(self, edit: Edit) -> None:
        self._written.restore()
        if edit.factors:
            self._written.write(edit)


class _Written:
    """What was written into a model's weights, whose unedited bits lie here: callers of EasyEdit write them back
    themselves (``weights_copy``), past any ledger."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._base: Weights = {}
        self._sums: dict[str, list[int]] = {}  # of the weights as written, and as they were

    def weights(self, editor: MendEditor) -> Weights:
        return {layer.name: layer.weight for layer in editor.layers}

    def write(self, edit: Edit) -> None:
        weights = {layer.name: layer.weight for layer in named_layers(self.model, list(edit.factors))}
        self._base = {name: weight.detach().clone() for name, weight in weights.items()}
        edit.apply_(self.model, backup="none", again=True)
        forget_edits(self.model)
        self._sums = {name: [int(checksum(w)), int(checksum(self._base[name]))] for name, w in weights.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as they were before :meth:`write`; a ValueError if they hold anything else by now."""
        weights = {layer.name: layer.weight for layer in named_layers(self.model, list(self._base))}
        if foreign := [name for name, weight in weights.items() if int(checksum(weight)) not in self._sums[name]]:
            raise ValueError(
                f"{some(foreign)}: something else has written to these weights since they were edited, so the edit "
                "can't be taken out. Make a new BaseEditor of the model as it is now."
            )
        for name, weight in weights.items():
            weight.copy_(self._base[name])
        self._base, self._sums = {}, {}


def apply_mend_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: HyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, Weights]:
    """ROME's entry: write the simultaneous edits of ``requests`` into ``model``, or into a copy of it.

    Args:
        requests: dictionaries with "prompt" (in which {} stands for "subject", where there is one) and "target_new",
            a text or ROME's {"str": ...}.
        hparams: names the archive; the editor that it gave is kept with it for the next call on the same model.

    Returns:
        (the edited model, {weight: its values before}), the latter empty unless ``return_orig_weights`` or
        ``keep_original_weight``.
    """
    if kwargs:
        log.warning("apply_mend_to_model: %s mean nothing to mendfast and are ignored.", ", ".join(kwargs))
    if not requests:
        raise ValueError("apply_mend_to_model was given no requests; pass at least one.")
    pairs = [_pair(request) for request in requests]
    found = getattr(hparams, "_editor", None)
    if found is None or found[0] != hparams.archive or found[1].model is not model:
        found = hparams._editor = (hparams.archive, load_archive(hparams, model, tok))
    edit = found[1].edit(pairs)
    target = copying.deepcopy(model) if copy else model
    weights = {layer.name: layer.weight for layer in named_layers(target, list(edit.factors))}
    kept = return_orig_weights or keep_original_weight
    originals = {name: weight.detach().clone() for name, weight in weights.items()} if kept else {}
    edit.apply_(target, backup="none", again=True)
    forget_edits(target)  # callers write the originals back themselves
    return target, originals


# -- requests ----------------------------------------------------------------------------------------------


def _pair(request: Mapping[str, Any]) -> EditRequest:
    if not isinstance(request, Mapping):
        raise TypeError(f'A request is {shown(request)}; pass {{"prompt": ..., "target_new": ...}}.')
    if missing := [name for name in ("prompt", "target_new") if request.get(name) is None]:
        raise ValueError(f"A request lacks {', '.join(missing)}; it has {some(request) or 'nothing'}.")
    prompt, target = request["prompt"], request["target_new"]
    if isinstance(target, Mapping):
        target = target.get("str")
    if not isinstance(prompt, str) or not isinstance(target, str):
        raise TypeError(f"A request's prompt is {shown(prompt)} and its target {shown(target)}; both must be text.")
    if "{}" in prompt and isinstance(request.get("subject"), str):
        prompt = prompt.replace("{}", request["subject"])
    return EditRequest(prompt, target)


def _listed(name: str, values: Any, count: int) -> list[Any]:
    values = [values] if isinstance(values, str) else list(values)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries and prompts {count}; they must be as many.")
    return values


def _requests(
    prompts: Any,
    target_new: Any,
    ground_truth: Any,
    target_neg: Any,
    rephrase_prompts: Any,
    locality_inputs: Any,
    portability_inputs: Any,
    subject: Any = None,
    loc_prompts: Any = None,
) -> list[dict[str, Any]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    count = len(prompts)
    columns = {"prompt": prompts, "target_new": _listed("target_new", target_new, count)}
    columns["ground_truth"] = [None] * count if ground_truth is None else _listed("ground_truth", ground_truth, count)
    for name, key, values in (
        ("target_neg", "target_neg", target_neg),
        ("subject", "subject", subject),
        ("rephrase_prompts", "rephrase_prompt", rephrase_prompts),
        ("loc_prompts", "loc_prompt", loc_prompts),
    ):
        if values is not None:
            columns[key] = _listed(name, values, count)
    requests = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for kind, inputs in (("portability", portability_inputs), ("locality", locality_inputs)):
        for request in requests:
            request[kind] = {}
        for key, given in (inputs or {}).items():
            if not isinstance(given, Mapping) or not {"prompt", "ground_truth"} <= set(given):
                raise ValueError(f"{kind}_inputs[{key!r}] is {shown(given)}; it must have prompt and ground_truth.")
            where = f"{kind}_inputs[{key!r}]"
            asked = _listed(f"{where}['prompt']", given["prompt"], count)
            answers = _listed(f"{where}['ground_truth']", given["ground_truth"], count)
            for request, prompt, answer in zip(requests, asked, answers, strict=True):
                if prompt is not None:
                    request[kind][key] = {"prompt": prompt, "ground_truth": answer}
    return requests


# -- figures -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _told(editor: MendEditor, prompts: Any, targets: Any, what: str) -> tuple[list[list[int]], list[float]]:
    """Per prompt the tokens that the model puts first where the target stands, and the share that are right."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    targets = [targets] * len(prompts) if isinstance(targets, str) else list(targets or [])
    if len(prompts) != len(targets) or not all(isinstance(text, str) for text in (*prompts, *targets)):
        has = f"the prompts {shown(prompts)} and the answers {shown(targets)}"
        raise ValueError(f"{what} has {has}; pass one text each.")
    batch = to_device(editor.tokenize(list(zip(prompts, targets, strict=True))), editor.device)
    rows = target_rows(editor.model, batch)
    first, sample = rows.logits.argmax(-1), rows.sample.to(rows.logits.device)
    tokens = [first[sample == i].tolist() for i in range(len(prompts))]
    right = [float((first == rows.labels)[sample == i].float().mean()) for i in range(len(prompts))]
    return tokens, right


def _quality(editor: MendEditor, request: Mapping[str, Any]) -> dict[str, Any]:
    prompt, target = _pair(request)
    found: dict[str, Any] = {"rewrite_acc": _told(editor, prompt, target, "prompt")[1]}
    if (rephrased := request.get("rephrase_prompt")) is not None:
        found["rephrase_acc"] = _told(editor, rephrased, target, "rephrase_prompt")[1]
    found |= {"locality": {}, "portability": {}}
    for kind in ("locality", "portability"):
        for key, asked in (request.get(kind) or {}).items():
            tokens, right = _told(editor, asked["prompt"], asked["ground_truth"], f"{kind}[{key!r}]")
            if kind == "locality":
                found[kind][f"{key}_output"] = tokens
            else:
                found[kind][f"{key}_acc"] = right
    return found


def _compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Locality: the share of tokens that the edit left as they were."""
    for name in [name for name in after if name.endswith("_output")]:
        shares = []
        for old, new in zip(before[name], after[name], strict=True):
            shares.append(sum(a == b for a, b in zip(old, new, strict=True)) / max(1, len(old)))
        after[f"{name.removesuffix('_output')}_acc"] = shares
