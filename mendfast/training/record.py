"""What a run writes while it goes on: ``metrics.jsonl``, and TensorBoard's events if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import keep_json_lines


class Record:
    """The metrics of a run in ``output``; ``None`` writes nothing."""

    def __init__(self, output: Path | None, tensorboard: bool = False):
        if tensorboard and output is None:
            raise ValueError("TensorBoard's events go into the output directory; pass output.")
        self._path = output / "metrics.jsonl" if output else None
        self._summary_writer = _summary_writer() if tensorboard else None
        self._writer: Any = None

    def open(self, step: int) -> None:
        """Go on after ``step``: what was written of later steps is dropped, since they are run again."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            keep_json_lines(self._path, lambda metrics: metrics["step"] <= step)
        if self._summary_writer is not None:
            self._writer = self._summary_writer(self._path.parent / "tensorboard", purge_step=step + 1)

    def add(self, metrics: Mapping[str, float]) -> None:
        if self._path is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                group = "validation" if name.startswith("val_") else "training"
                self._writer.add_scalar(f"{group}/{name.removeprefix('val_')}", value, metrics["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            "TensorBoard is not installed: pip install tensorboard (mendfast[train] has it), or leave it out."
        ) from error
    return SummaryWriter
