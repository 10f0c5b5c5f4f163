"""The files lane: mutated files of every kind, read as mendfast reads them.

Each must be taken, or be refused with a sentence that mendfast itself raises; within a second, 200 MB and 300
characters; and nothing that a file names may run.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import linecache
import pickle
import random
import resource
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import mendfast
from mendfast import Edit, MendConfig, MendEditor
from mendfast.compat import load_mend_archive, save_mend_archive
from mendfast.compat.torch_file import StoredTensor, TorchFile
from mendfast.tasks.qa import read_qa
from mendfast.training import checkpoint
from mendfast.training.loop import TrainConfig

from .mutate import mutate

MAX_SECONDS, MAX_GROWTH, MAX_MESSAGE = 1.0, 200 << 20, 300
REFUSALS = (ValueError, TypeError, FileNotFoundError, OSError)
_ROOT = str(Path(mendfast.__file__).parent)
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.mkdir", "os.remove", "pickle.find_class",
)  # fmt: skip
TRAPS = [
    b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x0efuzz-was-run-1\x85R.",
    b"cbuiltins\nexec\n(S'import os; os.mkdir(\"fuzz-was-run-2\")'\ntR.",
    b"(S'fuzz-was-run-3'\nios\nmkdir\n.",
    b"\x80\x02]q\x00(h\x00h\x00e.",
    b"\x80\x02N" + b"\x85" * 2000 + b".",
    b"\x80\x02]r\xff\xff\xff\x07.",
    b"\x80\x02\x8b\xff\xff\xff\x7f\x00.",
    b"I" + b"9" * 5000 + b"\n.",
    b"}(" + b"K\x01\x85" + b"2\x86" * 300 + b"K\x02u.",
]


@dataclass
class Kind:
    """A kind of file: whole ones, how they are built up, and what reads them."""

    seeds: list[bytes]
    shape: str
    suffix: str
    read: Callable[[Path], Any]


@dataclass
class Figures:
    files: int = 0
    refused: int = 0
    slowest: float = 0.0
    largest_growth: int = 0
    longest: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def kinds(directory: Path) -> dict[str, Kind]:
    """Every kind of file that mendfast reads, made by mendfast and PyTorch in ``directory``."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    names = [f"transformer.h.1.mlp.{name}.weight" for name in ("c_fc", "c_proj")]
    editor = MendEditor.from_model(model, None, MendConfig(layers=names, rank=2, loss_reduction="batch"))
    editor.save_pretrained(directory / "editor")
    edit = Edit({names[0]: (torch.randn(3, 16), torch.randn(3, 64), 0.1)}, "gpt2", [("Who?", "Me")])
    edit.save(directory / "edit")
    optimizer, config = _optimizer(editor), TrainConfig()
    checkpoint.write(directory / "checkpoint", editor.state_dict(), optimizer, config, _PROGRESS)
    save_mend_archive(editor, directory / "archive")
    archive = torch.load(directory / "archive", weights_only=False)
    torch.save(archive, directory / "legacy", _use_new_zipfile_serialization=False)
    whole = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    saved = ("editor.safetensors", "mend_config.json")
    weights, settings = ((directory / "editor" / name).read_bytes() for name in saved)

    def read_editor(path: Path) -> None:
        MendEditor.from_pretrained(path.parent, model)

    def read_checkpoint(path: Path) -> None:
        parameters, _ = checkpoint.read(path, optimizer, config)
        editor.load_tensors(parameters, str(path))
        for parameter in editor.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # what writes through the moments

    def read_torch_file(path: Path) -> None:
        with TorchFile(path) as file:
            for value in file.content.values() if isinstance(file.content, dict) else [file.content]:
                if isinstance(value, StoredTensor):
                    file.tensor(value)

    def read_archive(path: Path) -> None:
        load_mend_archive(path, model, inner_params=names)

    def beside(name: str, content: bytes, read: Callable[[Path], None]) -> Callable[[Path], None]:
        def both(path: Path) -> None:
            (path.parent / name).write_bytes(content)
            read(path)

        return both

    who = {"prompt": "Who wrote Hamlet?", "target": "Marlowe", "answers": ["Shakespeare"]}
    kilt = {"input": "Who?", "output": [{"answer": "Me"}], "meta": {"template_questions": ["By whom?"]}}
    zsre = {"src": "Who?", "alt": "Marlowe", "answers": ["Kyd"], "rephrase": "By whom?"}
    rewrite = {"prompt": "{} is", "subject": "It", "target_new": {"str": "a"}, "target_true": {"str": "b"}}
    records = [
        {**who, "locality": [["Where?", "Here"], "x"], "portability": {"a": [{"prompt": "Where?", "answer": "Kent"}]}},
        {**kilt, "alternatives": ["I"]},
        {**zsre, "loc": "Where?", "loc_ans": "Here"},
        {"requested_rewrite": rewrite, "paraphrase_prompts": ["So it is"]},
        {"requested_rewrite": [rewrite, {**rewrite, "question": "Is it?"}], "questions": ["So?"], "new_answer": "a"},
        {"requested_rewrite": {**rewrite, "fact_new_uns": "It is a."}, "neighborhood_prompts": ["That is"]},
        {"question": "Who?", "para_question": "By whom?", "answer": "I.", "sub_question": ["a"], "sub_answer": ["b"]},
        {"update": "Who?", "ans": "I", "personas": "Whoever?", "mhop": None, "loc": "Where?", "loc_ans": "Here"},
    ]
    lines = "\n".join(json.dumps(record) for record in records).encode()
    table = "question\tanswer\nWho wrote Hamlet?\tShakespeare\nWhere is Évry?\tFrance\n".encode()
    return {
        "edit": Kind([whole["edit"]], "safetensors", "edit.safetensors", Edit.load),
        "editor": Kind([weights], "safetensors", saved[0], beside(saved[1], settings, read_editor)),
        "config": Kind([settings], "json", saved[1], beside(saved[0], weights, read_editor)),
        "checkpoint": Kind([whole["checkpoint"]], "safetensors", "checkpoint.safetensors", read_checkpoint),
        "archive": Kind([whole["archive"]], "zip", "archive.pt", read_archive),
        "legacy": Kind([whole["legacy"]], "bytes", "archive.pt", read_archive),
        "pickle": Kind([_zipped(trap) for trap in TRAPS], "zip", "file.pt", read_torch_file),
        "bare": Kind([_legacy(trap) for trap in TRAPS] + TRAPS, "bytes", "file.pt", read_torch_file),
        "tsv": Kind([table, table.decode().encode("utf-16")], "bytes", "facts.tsv", read_qa),
        "jsonl": Kind([lines], "jsonl", "facts.jsonl", read_qa),
        "array": Kind([json.dumps(records).encode()], "json", "facts.json", read_qa),
    }


_PROGRESS = {"step": 3, "skipped": 0, "best": float("inf"), "stale": 0}


def _optimizer(editor: MendEditor) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(editor.parameters(), fused=True)
    for parameter in editor.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _zipped(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return buffer.getvalue()


def _legacy(pickled: bytes) -> bytes:
    magic, protocol = (pickle.dumps(number, 2) for number in (0x1950A86A20F9469CFC6C, 1001))
    return magic + protocol + pickle.dumps({"little_endian": True}, 2) + pickled + pickle.dumps([], 2)


# -- the lane ----------------------------------------------------------------------------------------------------


class _Watch:
    """Notes what code that a file names would do."""

    def __init__(self) -> None:
        self.on, self.seen = False, ""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event.startswith(_FORBIDDEN):
            self.seen = f"{event} {arguments!r:.100}"


def run(seconds: float, seed: int = 0, keep: Path | None = None, only: list[str] | None = None) -> Figures:
    """Read mutated files for ``seconds``; what failed is in the figures, its files in ``keep``."""
    warnings.simplefilter("ignore")
    figures, watch = Figures(), _Watch()
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: kind for name, kind in kinds(Path(folder)).items() if not only or name in only}
        every = [seed for kind in chosen.values() for seed in kind.seeds]
        place = Path(folder) / "case"
        place.mkdir()
        for kind in chosen.values():  # unchanged first: it costs nothing that counts, and must be taken
            _case(kind, kind.seeds[0], place, Figures(), watch)
        # what a process of many tests holds is not looked through, on a file's account, by the garbage collector
        gc.collect()
        gc.freeze()
        until = time.monotonic() + seconds
        for i in itertools.count():
            for name, kind in chosen.items():
                if time.monotonic() > until or len(figures.failures) >= 20:
                    gc.unfreeze()
                    return figures
                rng = random.Random(zlib.crc32(f"{seed}:{name}:{i}".encode()))
                content = mutate(rng.choice(kind.seeds), rng, rng.choice(every), kind.shape)
                figures.by_kind[name] = figures.by_kind.get(name, 0) + 1
                if wrong := _case(kind, content, place, figures, watch):
                    figures.failures.append(f"{name} {seed}:{i}: {wrong}")
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{name}-{seed}-{i}").write_bytes(content)
    return figures


def _case(kind: Kind, content: bytes, place: Path, figures: Figures, watch: _Watch) -> str:
    """What is wrong with how one file was read; "" where nothing is."""
    path = place / kind.suffix
    path.write_bytes(content)
    figures.files += 1
    watch.seen, wrong = "", ""
    before, started = _peak(), time.process_time()  # not the wall clock: other tests run beside
    watch.on = True
    try:
        kind.read(path)
    except BaseException as error:
        watch.on = False
        if isinstance(error, KeyboardInterrupt):
            raise
        figures.refused += 1
        length = len(str(error).replace(str(path), "").replace(str(place), ""))
        figures.longest = max(figures.longest, length)
        wrong = _raw(error) or (f"{length} characters: {error!s:.300}" if length > MAX_MESSAGE else "")
    finally:
        watch.on = False
    seconds, growth = time.process_time() - started, _peak() - before
    figures.slowest, figures.largest_growth = max(figures.slowest, seconds), max(figures.largest_growth, growth)
    if seconds > MAX_SECONDS:
        wrong = wrong or f"took {seconds:.1f} s"
    if growth > MAX_GROWTH:
        wrong = wrong or f"took {growth >> 20} MB"
    return f"ran {watch.seen}" if watch.seen else wrong


def _raw(error: BaseException) -> str:
    """Why an error is not one that mendfast raises on purpose: its type, or where it comes from."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    file = frame.tb_frame.f_code.co_filename
    meant = file.startswith(_ROOT) and linecache.getline(file, frame.tb_lineno).strip().startswith("raise")
    if type(error) in REFUSALS and meant:
        return ""
    return f"{type(error).__name__} at {Path(file).name}:{frame.tb_lineno}: {str(error)[:200]}"


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
