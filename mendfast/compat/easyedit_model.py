"""The model and the editor that EasyEdit's settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..editor import CONFIG_FILE, MendEditor
from ..schema import shown
from .easyedit_hparams import HyperParams
from .mend_archive import load_mend_archive


def load_model(hparams: HyperParams) -> tuple[nn.Module, Any]:
    """The model and tokenizer of ``hparams.model_name``: a name, a directory, or a pair of the two."""
    import transformers as hf

    name, device = hparams.model_name, device_of(hparams)
    if not isinstance(name, str):
        if not (isinstance(name, (tuple, list)) and len(name) == 2 and isinstance(name[0], nn.Module)):
            raise TypeError(f"model_name is {shown(name)}; pass a name, a directory, or (model, tokenizer).")
        model, tokenizer = name
        return (model if hparams.device is None else model.to(device)).eval(), tokenizer
    try:
        config = hf.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name!r} is no model here, and the Hub did not give it either: {error}") from error
    kind = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    parallel = bool(getattr(hparams, "model_parallel", False))
    model = kind.from_pretrained(
        name,
        dtype=torch.float16 if getattr(hparams, "fp16", False) else torch.float32,
        device_map="auto" if parallel else None,
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(hparams.tokenizer_name or name)
    return (model if parallel else model.to(device)).eval(), tokenizer


def device_of(hparams: HyperParams) -> torch.device:
    """EasyEdit writes a GPU's number, or a device's name; without a GPU all is done on the CPU."""
    device = hparams.device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if isinstance(device, (int, float)) and not isinstance(device, bool):
        return torch.device("cuda", int(device))
    return torch.device("cuda" if device is None else device)


def load_archive(hparams: HyperParams, model: nn.Module, tokenizer: Any) -> MendEditor:
    """The editor that ``hparams.archive`` names: a file of EasyEdit or of the released code, or what mendfast wrote."""
    archive = hparams.archive
    if archive is None:
        raise ValueError("archive is not set: train an editor first (EditTrainer), and name what it wrote there.")
    path = Path(archive)
    if path.is_file():
        if not hparams.inner_params:
            raise ValueError(
                f"inner_params is {shown(hparams.inner_params)}; {path} does not say which weights it edits, so name "
                "them, in the order of its training."
            )
        options = {"inner_params": hparams.inner_params, "norm": hparams.norm, "init": hparams.init}
        return load_mend_archive(path, model, tokenizer=tokenizer, **options)
    inside = path / "best"  # of a training run
    source = inside if (inside / CONFIG_FILE).is_file() and not (path / CONFIG_FILE).is_file() else archive
    return MendEditor.from_pretrained(source, model, tokenizer)
