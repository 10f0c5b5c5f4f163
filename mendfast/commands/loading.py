"""Models and editors by the names that a command was given."""

from __future__ import annotations

import argparse
from typing import Any


def quiet(arguments: argparse.Namespace) -> None:
    """No progress bars for what loads in a moment."""
    from transformers.utils import logging as hf_logging

    if not arguments.verbose:
        hf_logging.disable_progress_bar()


def load_editor(arguments: argparse.Namespace) -> Any:
    """The editor and model that the options name, the demo's by default."""
    from ..demo import build

    if (arguments.model is None) != (arguments.editor is None):
        raise ValueError("Pass both --model and --editor, since an editor serves one model; or neither: the demo's.")
    quiet(arguments)
    if arguments.model is None:
        return build.load()
    from ..editor import MendEditor

    model, tokenizer = load_model(arguments.model, arguments)
    return MendEditor.from_pretrained(arguments.editor, model, tokenizer)


def load_model(name: str, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A Hugging Face model of whichever kind its configuration names, and its tokenizer."""
    import torch
    import transformers as hf

    try:
        config = hf.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name!r} is no model here, and the Hub did not give it either: {error}") from error
    names = config.architectures or []
    kind = hf.AutoModelForCausalLM
    if any("SequenceClassification" in n for n in names):
        kind = hf.AutoModelForSequenceClassification
    elif config.is_encoder_decoder:
        kind = hf.AutoModelForSeq2SeqLM
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"device_map": getattr(arguments, "device_map", None)}
    if quantize := getattr(arguments, "quantize", None):
        options["quantization_config"] = hf.BitsAndBytesConfig(**{f"load_in_{quantize}": True})
        options["device_map"] = options["device_map"] or device
    try:
        model = kind.from_pretrained(name, dtype=dtype, **options)
    except ImportError as error:
        raise RuntimeError(f"{name} can't be loaded so: {error}") from error
    # A device map has placed the model already.
    return (model if options["device_map"] else model.to(device)).eval(), hf.AutoTokenizer.from_pretrained(name)


