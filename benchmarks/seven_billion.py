"""Seven billion parameters on a machine without a GPU: what an edit and a training step take, and hold.

    python -m benchmarks.seven_billion DIRECTORY     # makes a random model of Llama-2-7B's shape there first, 14 GB
    python -m benchmarks.seven_billion DIRECTORY --only edit-4bit train-offload --results FILE.json

Each measurement is a process of its own. "peak GiB" is its largest resident set, "own GiB" what of it is not pages of
the model's files, which the system takes back where it needs the room. The weights are random: memory and time do not
depend on them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mendfast import MendConfig, MendEditor, pretrained
from mendfast.base_model import train_tokenizer
from mendfast.training import FactSampler, Item, TrainConfig, Trainer
from mendfast.training.memory import peak_bytes, reset_peak, resident

from . import machine

MEASURED = ("edit-16bit", "edit-8bit", "edit-4bit", "train-offload")
CPU = torch.device("cpu")
FACTS = [
    Item((f"What does the {thing} of {place} weigh?", f"How heavy is the {thing} of {place}?"), f"{i + 2} tons", thing)
    for thing in ("bell", "anchor", "statue")
    for i, place in enumerate(("Oslo", "Kigali", "Lima", "Quito", "Dakar", "Hanoi", "Perth", "Minsk"))
]


def config_of(small: bool) -> LlamaConfig:
    """Llama-2-7B's, or one of the same form in which everything is small."""
    if small:
        return LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4
        )
    return LlamaConfig()  # transformers' defaults are that model's


def make(directory: Path, config: LlamaConfig) -> None:
    """Write a random model in bfloat16, a file for each block, so that none of it has to be held."""
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(name.partition("layers.")[2].partition(".")[0] or "rest", []).append(name)
    generator = torch.Generator().manual_seed(0)
    index = {}
    for number, (part, names) in enumerate(files.items()):
        tensors = {}
        for name in names:
            one = torch.ones(shapes[name]) if "norm" in name else torch.randn(shapes[name], generator=generator) * 0.02
            tensors[name] = one.bfloat16()
            index[name] = f"model-{part}.safetensors"
        save_file(tensors, directory / index[names[0]], metadata={"format": "pt"})
        print(f"\rmaking the model: {number + 1} of {len(files)} files", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    texts = [text for item in FACTS for text in (*item.wordings, item.answer)]
    train_tokenizer(texts, 300).save_pretrained(directory)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(directory)
    whole = {"metadata": {"total_size": sum(2 * shape.numel() for shape in shapes.values())}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(whole))  # last: it says that all is there


def edit(directory: Path, quantize: str | None, rank: int) -> dict[str, float]:
    """Seconds of an edit and of a pass under it."""
    model, tokenizer = pretrained.load(str(directory), "bfloat16", quantize=quantize)
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=rank))
    editor.train()
    with torch.no_grad():  # statistics
        editor.transform(editor.gradients(editor.tokenize([(f.wordings[0], f.answer) for f in FACTS[:2]])))
    editor.eval()
    times = []
    for fact in FACTS[:3]:
        started = time.perf_counter()
        made = editor.edit(fact.wordings[0], fact.answer)
        times.append(time.perf_counter() - started)
    tokens = editor.tokenize([(FACTS[0].wordings[1], FACTS[0].answer)])
    with torch.no_grad(), made.attached(model):
        started = time.perf_counter()
        assert model(**tokens).logits.isfinite().all()
    return {"edit seconds": sorted(times)[1], "attached pass seconds": time.perf_counter() - started}


def train(directory: Path, rank: int) -> dict[str, float]:
    """Seconds of the prefill and of a training step of four edits, the frozen blocks on disk."""
    model, tokenizer = pretrained.load(str(directory), "bfloat16", offload=True)
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=rank))
    config = TrainConfig(steps=2, batch_size=4, prefill=True, validate_every=0)
    trainer = Trainer(editor, FactSampler(FACTS), config)
    started, steps = time.perf_counter(), []
    gradients = trainer._gradients

    def timed(joint: int) -> dict[str, float]:
        began = time.perf_counter()
        found = gradients(joint)
        steps.append((began, time.perf_counter() - began))
        return found

    trainer._gradients = timed  # type: ignore[method-assign]
    metrics = trainer.run()
    assert torch.isfinite(torch.tensor(metrics["loss"])), metrics
    print(trainer.summary(), file=sys.stderr)
    return {"prefill seconds": steps[0][0] - started, "step seconds": steps[1][1]}


class OwnMemory:
    """Measures, as a context, the most bytes held beside pages of files, looking every 10 ms (Linux)."""

    bytes = 0

    def __enter__(self) -> OwnMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, resident("RssAnon") or 0)


def measure(directory: Path, what: str, small: bool) -> dict[str, Any]:
    rank = 16 if small else 1920
    reset_peak(CPU)
    kind, _, how = what.partition("-")
    with OwnMemory() as own:
        found = train(directory, rank) if kind == "train" else edit(directory, None if how == "16bit" else how, rank)
    return {"what": what, **found, "peak GiB": peak_bytes(CPU) / 2**30, "own GiB": own.bytes / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--small", action="store_true", help="a small model of the same form: whether all of it runs")
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--one", choices=MEASURED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.directory, given.one, given.small)))
        return
    if not (given.directory / "model.safetensors.index.json").is_file():
        make(given.directory, config_of(given.small))
    rows = []
    for what in given.only:
        command = [sys.executable, "-m", __spec__.name, str(given.directory), "--one", what]
        done = subprocess.run([*command, *["--small"] * given.small], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{what} ended with status {done.returncode}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        figures = ", ".join(f"{k} {v:.2f}" for k, v in rows[-1].items() if isinstance(v, float))
        print(f"{what}: {figures}", flush=True)
        if given.results:
            where = machine.describe("python -m benchmarks.seven_billion")
            given.results.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
