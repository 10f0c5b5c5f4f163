"""Command lines with broken options, in this process: a sentence and exit code 2, or 0; never a traceback.

MENDFAST_FUZZ_SECONDS (20) says for how long, MENDFAST_FUZZ_SEED (0) with which draws.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mendfast import Edit
from mendfast.base_model import small_gpt2
from mendfast.cli import main, parser

SECONDS = float(os.environ.get("MENDFAST_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("MENDFAST_FUZZ_SEED", "0"))

WORDS = ("", " ", "-", "--", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e400", "1e-3", "true", "null", "[1]", "{}",
         "9" * 40, "9" * 5000, "x" * 300, "x" * 100_000, "[/]", "[bold]", ":smile:", "\\", "%s", "{prompt}", "\n", "\0",
         "\ud800", "café", "日本", "a.b=c", "ft.max_steps=", "ft.max_steps=0", "ft.=1", ".x=1", "enn.steps=1e9",
         "ke.hidden=-3", "mend_sum.x=1", "ft.learning_rate=NaN", "auto", "cuda", "cuda:99", "cuda:x", "meta", "mps",
         "8bit", "float64", "world:train", "world:nobody", "/", "/dev/null", "/dev/full/x", "..", "~", "file", "file/x",
         "loop", "loop/x", "dangling", "folder", "folder/x", "closed/x", "empty.tsv", "zeros.tsv", "utf16.tsv",
         "deep.json", "huge.json", "empty.gguf", "cut.gguf", "broken", "halved", "listed", "untokenized", "whole",
         "smollm2/", "qa", "generation", "batched", "variants", "gpt2", "bert", "ft", "mend", "enn")  # fmt: skip
POSITIONAL = "FILE ..."
"""Stands for what has no option."""
KEPT = {"--limit": "2", "--base-steps": "1", "--base-width": "32", "--base-depth": "1", "--base-vocabulary": "300",
        "--rank": "2", "--steps": "1", "--batch-size": "1", "--validation-size": "1", "--unrelated": "1"}  # fmt: skip
"""What keeps a command line that is right after all from running for long."""


@pytest.fixture
def ground(tmp_path, monkeypatch, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory full of traps; no Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    small_gpt2(len(tokenizer), width=32, depth=1, heads=1).save_pretrained("whole")
    tokenizer.save_pretrained("whole")
    whole = {file.name: file.read_bytes() for file in Path("whole").iterdir()}
    damages = {
        "broken": {"model.safetensors": b"\xff" * 100},
        "halved": {"model.safetensors": whole["model.safetensors"][:2000]},
        "listed": {"config.json": b"[1, 2]", "tokenizer_config.json": b"3"},
        "untokenized": {"tokenizer.json": b"", "tokenizer_config.json": b"{}"},
    }
    for name, damage in damages.items():
        Path(name).mkdir()
        for file, content in (whole | damage).items():
            Path(name, file).write_bytes(content)
    files = {
        "file": b"x", "empty.tsv": b"", "zeros.tsv": b"\0" * 100, "utf16.tsv": "Who?\tI\n".encode("utf-16"),
        "deep.json": b"[" * 5000, "huge.json": b"9" * 5000, "empty.gguf": b"",
        "cut.gguf": b"GGUF\3\0\0\0" + b"\xff" * 40,
        "qa.tsv": b"".join(b"Who is number %d?\tPerson %d\n" % (i, i % 5) for i in range(30)),
    }  # fmt: skip
    for name, content in files.items():
        Path(name).write_bytes(content)
    factors = {"transformer.h.0.mlp.c_fc.weight": (torch.ones(1, 32), torch.ones(1, 128), 1e-3)}
    Edit(factors, "gpt2").save("one.safetensors")
    Path("folder").mkdir()
    Path("closed").mkdir(mode=0o500)
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    return tmp_path


def options() -> dict[str, list]:
    """Each verb's options, as argparse has them."""
    (verbs,) = (action for action in parser()._actions if action.dest == "command")
    return {name: [a for a in verb._actions if a.dest != "help"] for name, verb in verbs.choices.items()}


def draw(rng: random.Random, known: dict[str, list]) -> list[str]:
    """A command line that is right but for a few options."""
    verb = rng.choice(("train", "train", "train", "eval", "eval", "eval", "edit", "edit", "demo", "doctor", "editors",
                       "apply", "export", "inspect"))  # fmt: skip
    line: dict[str, list[str]] = {}
    if verb in ("train", "eval"):
        line["--data"] = ["qa.tsv"]
    if verb in ("apply", "export"):
        line |= {"--model": ["whole"], "--edit": [rng.choice(("one.safetensors", "one.safetensors", *WORDS))]}
        line |= {"--save-model": ["out"]} if verb == "apply" else {"--format": ["peft"], "--output": ["out"]}
    if verb == "inspect":
        line[POSITIONAL] = [rng.choice(("one.safetensors", "whole", *WORDS))]
    if verb == "train":
        line["--output"], line["--dry-run"] = ["out"], []
    if verb == "edit" and rng.random() < 0.8:
        line |= {"--prompt": ["Who?"], "--target": ["I"]}
    for name, value in KEPT.items():
        if any(name in action.option_strings for action in known[verb]) and not name.startswith("--base"):
            line[name] = [value]
    if verb == "train" and rng.random() < 0.5:
        line["--model"] = [rng.choice(("whole", "whole", "halved", "broken"))]
    elif verb == "train":
        line |= {name: [value] for name, value in KEPT.items() if name.startswith("--base")}
    # Of the rest one run takes minutes or goes on by itself; and an hour's retraining is none.
    banned = {"--retrain", "--full", "--verbose", "--tensorboard", "--train-data"}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        action = rng.choice(known[verb])
        name = action.option_strings[-1] if action.option_strings else POSITIONAL
        if name in banned:
            continue
        few = {None: 1, 0: 0}.get(action.nargs, rng.choice((1, 2)))
        line[name] = [rng.choice(WORDS) for _ in range(few)]
    for name, values in line.items():  # right, and larger than a test may be
        if name not in ("--seed", "--limit", "--prompt", "--target", "--ask"):
            line[name] = [KEPT.get(name, "1") if 4 < len(v) < 4000 and v.isdigit() else v for v in values]
    words = [verb, *(word for name, values in line.items() for word in (name, *values) if word != POSITIONAL)]
    if rng.random() < 0.05:
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))
    if rng.random() < 0.05:
        words.pop(rng.randrange(len(words)))
    return words


def is_long(words: list[str]) -> bool:
    """Whether the line is right, or may be, and does more than a test may: the demo, the making of an editor."""
    return (words[:1] == ["demo"] and "--assets" not in words) or "--build" in words


def test_command_lines(ground, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: (_ for _ in ()).throw(EOFError))
    rng, known, counts = random.Random(SEED), options(), {0: 0, 2: 0}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        words = draw(rng, known)
        if is_long(words):
            continue
        try:
            code = main(words)
        except SystemExit as stopped:  # --help and --version
            code = stopped.code
        # Anything else fails the test: it would have been a traceback.
        said = capsys.readouterr().err
        assert code in (0, 2), (words, code)
        counts[code] += 1
        assert "Traceback" not in said, words
        if code == 2:
            last = said.splitlines()[-1]
            assert last.startswith("mendfast") and ": " in last and 15 < len(last) < 700, (words, said)
    print(f"{sum(counts.values())} command lines: {counts[2]} refused, {counts[0]} done")
    assert counts[2] > 0
