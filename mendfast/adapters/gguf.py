"""Edits as LoRA adapters for llama.cpp: a GGUF file, as its ``convert_lora_to_gguf.py`` writes them.

For a weight [n, m] the tensors ``<name>.lora_a`` [r, m] and ``<name>.lora_b`` [n, r] (GGUF counts dimensions from the
last), where <name> is llama.cpp's, ``blk.3.ffn_gate.weight``. llama.cpp scales by ``adapter.lora.alpha`` / r, which
is 1 here. The converter transposes the weights of GPT-2 and so the adapters of its Conv1D; here a and b are those of
the weight as llama.cpp holds it, [n, m], from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..files import atomic_path
from ..layers import unwrapped
from ..schema import shown, some
from .lora import Update, check_free, lora_of

# Hugging Face's model_type -> the name of llama.cpp's architecture, where weights are taken over as they are, or
# rearranged in a way that _rearranged knows.
ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA", "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3", "phi": "PHI2", "phi3": "PHI3", "gpt2": "GPT2", "gpt_neox": "GPTNEOX",
    "stablelm": "STABLELM", "starcoder2": "STARCODER2", "smollm3": "SMOLLM3", "t5": "T5",
}  # fmt: skip
_ROTARY_PAIRS = ("llama", "mistral", "smollm3")


class GgufExport(NamedTuple):
    """What :func:`export_gguf_lora` wrote."""

    path: Path
    rank: int
    errors: dict[str, float]  # weight -> ||exported - edit|| / ||edit||, Frobenius; 0 where nothing was truncated
    names: dict[str, str]  # weight -> llama.cpp's name of it


def export_gguf_lora(
    edit: Update, path: str | Path, model: nn.Module, rank: int | None = None, *, overwrite: bool = False
) -> GgufExport:
    """Write an adapter that ``llama-cli -m base.gguf --lora path`` loads. Needs the package ``gguf``.

    Args:
        model: the Hugging Face model that the edit was made for, of which ``base.gguf`` was converted.
        rank: the most directions that each weight's update keeps; None: all, which is exact.

    Raises:
        FileExistsError: there is such a file, and ``overwrite`` is False.
        ImportError: ``gguf`` is not installed.
        ValueError, TypeError: a model or a weight that llama.cpp has no adapters for; as
            :func:`mendfast.adapters.peft.export_peft`.
    """
    gguf, path, bare = _gguf(), Path(path), unwrapped(model)
    check_free(path, overwrite=overwrite)
    lora = lora_of(edit, model, rank)
    kind = getattr(getattr(bare, "config", None), "model_type", None)
    names = _names(gguf, bare, kind, list(lora.matrices))
    arranged = {module: _rearranged(bare.config, kind, module) for module in lora.matrices}
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch=gguf.MODEL_ARCH_NAMES[_architecture(gguf, kind)])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.rank))
        writer.add_name(path.stem)
        writer.add_file_type(int(gguf.LlamaFileType.ALL_F32))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for module, (a, b) in lora.matrices.items():
            writer.add_tensor(f"{names[module]}.lora_a", a.numpy())
            writer.add_tensor(f"{names[module]}.lora_b", arranged[module](b).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    weights = {f"{module}.weight": name for module, name in names.items()}
    return GgufExport(path, lora.rank, lora.errors, weights)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'mendfast[gguf]'.") from error
    return gguf


def _architecture(gguf: Any, kind: str | None) -> Any:
    name = ARCHITECTURES.get(kind or "")
    found = getattr(gguf.MODEL_ARCH, name, None) if name else None
    if found is None:
        raise ValueError(
            f"mendfast writes no GGUF adapters for {shown(kind)} models; it does for {', '.join(ARCHITECTURES)}. "
            "Apply the edit, save the model, and convert that with llama.cpp instead."
        )
    return found


def _names(gguf: Any, model: nn.Module, kind: str | None, modules: list[str]) -> dict[str, str]:
    fields = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
    blocks = max(getattr(model.config, name, None) or 0 for name in fields)
    mapping = gguf.get_tensor_name_map(_architecture(gguf, kind), blocks)
    names = {module: mapping.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
    if unknown := [module for module, name in names.items() if name is None]:
        raise ValueError(f"llama.cpp has no name for {some(unknown)} of a {kind} model; leave these weights unedited.")
    return names


def _rearranged(config: Any, kind: str, module: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What llama.cpp's converter does to the rows of B [n, r], as it does to those of the weight [n, m]."""
    last = module.rpartition(".")[2]
    if kind == "gpt_neox" and last == "query_key_value":
        raise ValueError(f"llama.cpp stores {module} with its rows in another order; leave this weight unedited.")
    if kind not in _ROTARY_PAIRS or last not in ("q_proj", "k_proj"):
        return lambda b: b
    heads = config.num_attention_heads
    if last == "k_proj":
        heads = getattr(config, "num_key_value_heads", None) or heads
    # The two halves of each head, which Hugging Face rotates against each other, interleaved.
    return lambda b: b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
