"""Models and editors by the names that a command was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import editors, pretrained
from ..files import read_shapes
from ..schema import brief, check_fields
from .console import make_console, plain

if TYPE_CHECKING:
    from ..editor import MendEditor

HOW = ("device", "dtype", "device_map", "quantize", "revision", "trust_remote_code")
"""What says how ``model`` is loaded."""


@dataclass(kw_only=True)
class LoadSettings:
    """Which base model, and how it is loaded."""

    NAMES_MODEL: ClassVar[str] = "--model"
    """The option that says which; of a verb that names it otherwise."""

    model: str | None = field(
        default=None,
        metadata={"help": "base model: a directory, a Hub name, a FILE.gguf, or smollm2; default: the demo's"},
    )
    device: str | None = field(
        default=None, metadata={"help": "of the model: cpu, cuda, cuda:1, ...; default: cuda where there is one"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the model", "choices": pretrained.DTYPES})
    device_map: str | None = field(
        default=None, metadata={"help": "of the model: auto, balanced, ... splits it over devices (accelerate)"}
    )
    quantize: str | None = field(
        default=None, metadata={"help": "of the model, by bitsandbytes on a GPU", "choices": pretrained.QUANTIZED}
    )
    revision: str | None = field(default=None, metadata={"help": "of the model on the Hub: branch, tag or commit"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that the model brings"})

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model is not None and not self.model.strip():
            raise ValueError(f"{self.NAMES_MODEL} is empty; name a directory, a Hub name or a FILE.gguf.")
        if self.model is None:
            if given := [f.name for f in fields(self) if f.name in HOW and getattr(self, f.name) != f.default]:
                named = self.NAMES_MODEL
                raise ValueError(
                    f"{option(given[0])} says how {named} is loaded, and no {named} is given; "
                    "pass one, or leave the option out."
                )
            return
        if self.device and self.device_map:
            raise ValueError(f"--device and --device-map both say where {self.NAMES_MODEL} goes; pass one of them.")
        if self.device:
            check_device(self.device)
        if self.device_map:
            _needs("accelerate", "--device-map")
        if self.quantize:
            _needs("bitsandbytes", "--quantize")
        source = pretrained.resolve(self.model)
        if self.revision and source.local:
            raise ValueError(f"--revision names a version on the Hub, and {brief(source, 200)} is on this machine.")
        if source.gguf and (self.quantize or self.trust_remote_code):
            given = "--quantize" if self.quantize else "--trust-remote-code"
            raise ValueError(f"{given} does not go with a GGUF file ({brief(source, 200)}); leave it out.")


@dataclass(kw_only=True)
class EditorSettings(LoadSettings):
    """A base model and its editor; by default the demo's."""

    editor: str | None = field(
        default=None,
        metadata={"help": "directory or Hub name of the editor; default: what ships for --model, or the demo's"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.editor is not None:
            raise ValueError(
                "Pass both --model and --editor, since an editor serves one model; or neither: the demo's."
            )


def option(name: str) -> str:
    """How the command line spells a field."""
    return f"--{name.replace('_', '-')}"


def check_device(name: str) -> torch.device:
    """The device of that name; a ValueError says why there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is {brief(repr(name))}; name cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            here = f"there are {count} CUDA devices, from 0" if count else "there is no CUDA device here"
            raise ValueError(f"--device is {name}, and {here}; leave it out, or take another.")
        return device
    try:
        if device.type == "meta":
            raise RuntimeError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"--device is {name}, and there is none here that holds numbers; leave it out.") from None
    return device


def _needs(package: str, given: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{given} needs {package}: pip install {package}")


def quiet() -> None:
    """No progress bars for what loads in a moment."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def load_model(
    settings: LoadSettings, device: str | None = None, *, offload: bool | Sequence[str] = False
) -> tuple[Any, Any]:
    """The base model that ``settings`` name, and its tokenizer.

    Args:
        device: of this process, where the settings name none.
        offload: see :func:`mendfast.pretrained.load`.
    """
    device = settings.device or device or ("cuda" if torch.cuda.is_available() else "cpu")
    how = {name: getattr(settings, name) for name in HOW}
    return pretrained.load(settings.model, **{**how, "device": device}, offload=offload)


def load_editor(settings: EditorSettings, device: str | None = None) -> MendEditor:
    """The editor and model that ``settings`` name, the demo's by default; ``device`` as :func:`load_model` has it."""
    from ..editor import MendEditor

    if settings.model is None:
        from ..demo import build

        return build.load()
    model, tokenizer = load_model(settings, device)
    name = settings.editor or shipped_for(model)
    if name is None:
        raise ValueError(
            f"No editor ships for {brief(str(settings.model), 200)} (those that do: "
            f"{', '.join(editors.shipped()) or 'none'}); pass --editor, or train one: mendfast train --help."
        )
    if settings.editor is None:
        make_console().print(plain(f"Editing with {name}, the editor that ships for this model."))
    return MendEditor.from_pretrained(name, model, tokenizer)


def shipped_for(model: Any) -> str | None:
    """Name of the shipped editor whose base holds the weights of ``model``, whatever it is called; None: there is
    none."""
    from ..fingerprint import Fingerprint

    for name in editors.shipped():
        _, metadata = read_shapes(editors.HERE / name / "editor.safetensors", "editor")
        base = Fingerprint.from_json(metadata.get("fingerprint"), name)
        if base is not None and metadata.get("model_type") == model.config.model_type and base.matches(model):
            return name
    return None
