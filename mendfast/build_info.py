"""What the installation compiled: written by setup.py beside this file, read by ``mendfast doctor``."""

from __future__ import annotations

import json
from pathlib import Path

_FILE = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, object]:
    """The record of the CUDA extension's build.

    ``built`` (bool); ``reason`` it was left out, a sentence, or None; ``nvcc``, the compiler's version;
    ``targets``, the GPUs it holds machine code for ("sm_90") and PTX ("compute_100"); ``seconds``.
    """
    unbuilt = {"built": False, "nvcc": None, "targets": [], "seconds": 0.0}
    try:
        return {**unbuilt, "reason": None, **json.loads(_FILE.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {**unbuilt, "reason": "mendfast was not installed (pip install -e .), so nothing was compiled"}
    except ValueError as error:
        return {**unbuilt, "reason": f"{_FILE} can't be read ({error}); install mendfast again"}
