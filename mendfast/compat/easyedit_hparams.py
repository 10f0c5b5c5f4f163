"""EasyEdit's hyperparameter files for MEND: what is used here, and what means nothing here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import MendConfig
from ..files import read_json_bytes
from ..schema import brief, parse_json, shown, some
from ..training import TrainConfig

# Fields whose one value says what mendfast does anyway, and needs no word.
_AGREED: dict[str, tuple[Any, ...]] = {
    "act": ("relu", None), "mlp_class": ("IDMLP", None), "dropout": (0, None), "hidden_dim": (None,),
    "no_grad_layers": (None, []), "train_base": (False, None), "debug": (False, None), "silent": (False, None),
    "lr_scale": (1, None), "opt": ("Adam", None), "half": (False, None),
}  # fmt: skip
_REFUSED = {
    "train_base": "mendfast leaves the base model as it is",
    "act": "the editor network's activation is relu",
    "mlp_class": "the editor network is IDMLP",
}
_MODEL = (
    "alg_name", "alg", "model_name", "tokenizer_name", "inner_params", "archive", "device", "fp16", "model_parallel",
)  # fmt: skip


class HyperParams:
    """Settings as attributes, as EasyEdit's; every field of the file is kept, those that are not used here are
    named in one warning."""

    used: tuple[str, ...] = ()
    required: tuple[str, ...] = ("model_name",)
    defaults: Mapping[str, Any] = {}

    def __init__(self, **fields: Any):
        self._check_method(fields)
        if missing := [name for name in self.required if name not in fields]:
            raise ValueError(f"{type(self).__name__} lacks {', '.join(missing)}; add it to the file.")
        for name, why in _REFUSED.items():
            if name in fields and fields[name] not in _AGREED[name]:
                raise ValueError(f"{name} is {shown(fields[name])}; {why}.")
        idle = [
            name
            for name, value in fields.items()
            if name not in self.used and not (name in _AGREED and value in _AGREED[name])
        ]
        if idle:
            warnings.warn(
                f"{type(self).__name__}: {', '.join(brief(name, 40) for name in idle)} mean nothing to mendfast and "
                "are ignored.",
                stacklevel=3,
            )
        self.__dict__.update({"device": None, **self.defaults, **fields, "alg_name": "MEND", "alg": "MEND"})

    @classmethod
    def from_hparams(cls, path: str | Path) -> HyperParams:
        """Read one of EasyEdit's .yaml files (whose ending may be left out), or a .json.

        Raises:
            FileNotFoundError, ValueError: no such file, or settings of another method.
            ImportError: ``yaml`` is not installed.
        """
        path = Path(path)
        if path.suffix not in (".yaml", ".yml", ".json"):
            path = path.with_name(path.name + ".yaml")
        if path.suffix == ".json":
            values = parse_json(read_json_bytes(path), str(path))
        else:
            values = _yaml(path)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"{path} holds {shown(values)}; EasyEdit's settings are lines of name: value.")
        try:
            return cls(**{name: _number(value) for name, value in values.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    from_json = from_hparams

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _check_method(self, fields: Mapping[str, Any]) -> None:
        found = {fields[name] for name in ("alg_name", "alg") if isinstance(fields.get(name), str)}
        if found - {"MEND"}:
            raise ValueError(
                f"These are the settings of {some(sorted(found))}; mendfast is MEND. Take the file of that name in "
                "EasyEdit's hparams/MEND (or hparams/TRAINING/MEND)."
            )
        if not found:
            raise ValueError("Neither alg_name nor alg says which method this is for; write alg_name: MEND.")


class MENDHyperParams(HyperParams):
    """For editing: ``model_name`` (a name, or a pair of model and tokenizer), ``archive`` (an archive of EasyEdit or
    of the released code, or a directory of mendfast), ``inner_params``, ``device``, ``fp16``, ``norm``, ``init``."""

    used = (*_MODEL, "norm", "init")
    required = ("model_name", "archive")
    defaults: Mapping[str, Any] = {"inner_params": None, "norm": True, "init": "id", "tokenizer_name": None}


class MENDTrainingHparams(HyperParams):
    """For training; :meth:`editor_config` and :meth:`train_config` say what the fields mean here."""

    used = (
        *_MODEL, "norm", "init", "rank", "n_hidden", "shared", "one_sided", "combine", "x_only", "delta_only",
        "edit_lr", "lr", "lr_lr", "cedit", "cloc", "seed", "batch_size", "accumulate_bs", "max_iters", "max_epochs",
        "val_interval", "val_batch_size", "val_steps", "early_stop_patience", "model_save_pt", "grad_clip",
        "results_dir",
    )  # fmt: skip
    defaults: Mapping[str, Any] = {
        "inner_params": None, "archive": None, "tokenizer_name": None, "norm": True, "init": "id", "rank": 1920,
        "n_hidden": 1, "shared": True, "one_sided": False, "combine": True, "x_only": False, "delta_only": False,
        "edit_lr": 1e-4, "lr": 1e-6, "lr_lr": 1e-4, "cedit": 0.1, "cloc": 1.0, "seed": 42, "batch_size": 1,
        "accumulate_bs": 10, "max_iters": None, "max_epochs": None, "val_interval": 1000, "val_batch_size": 5,
        "val_steps": 500, "early_stop_patience": 20000, "model_save_pt": 5000, "grad_clip": 100.0,
        "results_dir": "./results",
    }  # fmt: skip

    def editor_config(self) -> MendConfig:
        if self.x_only or self.delta_only:
            sides = "u" if self.x_only else "delta"
        else:
            sides = "smaller" if self.one_sided else "both" if self.combine else "separate"
        return MendConfig(
            layers=self.inner_params,
            rank=self.rank,
            blocks=self.n_hidden + 1,
            shared=self.shared,
            normalize=self.norm,
            identity_init=self.init == "id",
            sides=sides,
            step_size=float(self.edit_lr),
            chat=False,
        )

    def train_config(self, examples: int) -> TrainConfig:
        """EasyEdit counts passes of ``batch_size`` edits, and steps the optimiser each ``accumulate_bs`` of them;
        mendfast counts steps."""
        each = max(1, int(self.accumulate_bs))
        if self.max_iters is None and self.max_epochs is None:
            raise ValueError("Neither max_iters nor max_epochs says how long to train; set one of them.")
        passes = self.max_iters
        if passes is None:
            passes = self.max_epochs * math.ceil(examples / self.batch_size)
        return TrainConfig(
            steps=max(1, math.ceil(passes / each)),
            batch_size=int(self.batch_size) * each,
            accumulate=each,
            learning_rate=float(self.lr),
            alpha_learning_rate=float(self.lr_lr),
            c_edit=float(self.cedit),
            c_loc=float(self.cloc),
            warmup=0,
            final_rate=1.0,
            clip=float(self.grad_clip),
            validate_every=math.ceil(self.val_interval / each),
            validation_size=max(1, min(int(self.val_batch_size) * int(self.val_steps), 1000)),
            patience=math.ceil(self.early_stop_patience / max(1, self.val_interval)),
            checkpoint_every=max(1, math.ceil(self.model_save_pt / each)),
            seed=int(self.seed),
        )


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("EasyEdit's files need a YAML reader: pip install 'mendfast[easyedit]'.") from error
    content = read_json_bytes(path)
    try:
        return yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {brief(error)}") from error


def _number(value: Any) -> Any:
    """YAML reads 1e-6, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
