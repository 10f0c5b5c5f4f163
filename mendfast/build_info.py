"""What the installation compiled: written by setup.py beside this file, read by ``mendfast doctor``."""

from __future__ import annotations

import json
from pathlib import Path

_FILE = Path(__file__).with_name("_build_info.json")


def build_info(extension: str = "cuda") -> dict[str, object]:
    """The record of the build of an extension, "cuda" or "cpu".

    ``built`` (bool); ``reason`` it was left out, a sentence, or None; ``seconds``; of "cuda" also ``nvcc``, the
    compiler's version, and ``targets``, the GPUs it holds machine code for ("sm_90") and PTX ("compute_100").
    """
    unbuilt = {"built": False, "nvcc": None, "targets": [], "seconds": 0.0}
    never = "mendfast was not installed (pip install -e .), so nothing was compiled"
    try:
        known = json.loads(_FILE.read_text(encoding="utf-8"))
        return {**unbuilt, "reason": None, **known.get(extension, {"reason": never})}
    except FileNotFoundError:
        return {**unbuilt, "reason": never}
    except ValueError as error:
        return {**unbuilt, "reason": f"{_FILE} can't be read ({error}); install mendfast again"}
