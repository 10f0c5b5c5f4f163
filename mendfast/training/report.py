"""The curves of a run, as a PNG and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_write, json_lines

PANELS = (
    ("loss", ("loss", "val_loss")),
    ("edit loss", ("l_edit", "val_l_edit")),
    ("locality loss", ("l_loc", "val_l_loc")),
    ("edit success", ("edit_success", "val_edit_success")),
)


def read_metrics(directory: str | Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [metrics for _, metrics in json_lines(Path(directory) / "metrics.jsonl")]


def write_report(directory: str | Path) -> Path:
    """Draw ``directory/metrics.jsonl`` into ``curves.png`` and ``report.html``; returns the latter's path."""
    directory = Path(directory)
    metrics = read_metrics(directory)
    if not metrics:
        raise ValueError(f"{directory / 'metrics.jsonl'} holds no steps yet; train first.")
    picture = _curves(metrics)
    atomic_write(directory / "curves.png", picture)
    atomic_write(directory / "report.html", _page(metrics, picture, directory).encode())
    return directory / "report.html"


def _curves(metrics: Sequence[dict[str, float]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        trained = [(m["step"], m[names[0]]) for m in metrics if m.get("joint", 1) == 1 and names[0] in m]
        if trained:
            steps, values = zip(*trained, strict=True)
            axis.plot(steps, values, color="tab:blue", alpha=0.2, linewidth=0.8)
            axis.plot(steps, _smooth(values), color="tab:blue", label="training, one edit at a time")
        if checked := [(m["step"], m[names[1]]) for m in metrics if names[1] in m]:
            axis.plot(*zip(*checked, strict=True), "o-", color="tab:orange", label="validation")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """An exponential average, without the bias of its start."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        if value == value:  # a skipped step's loss is not a number
            total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight if weight else value)
    return smooth


def _page(metrics: Sequence[dict[str, float]], picture: bytes, directory: Path) -> str:
    checks = [m for m in metrics if "val_loss" in m]
    names = ["step", *(name for name in (checks[-1] if checks else {}) if name.startswith("val_"))]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    best = min((m["val_loss"] for m in checks), default=None)
    body = "".join(
        f"<tr{' class=best' if m['val_loss'] == best else ''}>"
        + "".join(f"<td>{m[name]:g}</td>" if name in m else "<td></td>" for name in names)
        + "</tr>"
        for m in checks
    )
    source = base64.b64encode(picture).decode()
    title = html.escape(directory.name)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>mendfast: {title}</title>
<style>body{{font:16px system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}}img{{width:100%}}
table{{border-collapse:collapse}}td,th{{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ccc}}
.best{{background:#dfd}}</style>
<h1>Meta-training of {title}</h1>
<p>{metrics[-1]["step"]:,} steps; last loss {metrics[-1]["loss"]:.4f}.</p>
<img alt="curves of the losses and of edit success" src="data:image/png;base64,{source}">
<h2>Validations</h2><table><tr>{head}</tr>{body}</table></html>
"""
