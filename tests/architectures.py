"""Every family of the installed transformers that can be made small, and what mendfast does with it.

    python -m tests.architectures --write docs/architectures.md
    python -m tests.architectures --only mixtral qwen2_moe
    python -m tests.architectures --check docs/architectures.md

The check runs one family after another, those of every kind in turn, for so many seconds, and compares what it found
with the file; it also reads the file for cells that say nothing.

Each model is built from its configuration alone, shrunk by the names of its numbers; nothing is downloaded. A cell is
"yes" where the step works and is right, else says why not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from mendfast import Edit, EditMemory, MendConfig, MendEditor
from mendfast.training import editor_loss
from tests.small_architectures import batch_of, build, words

LIMIT_SECONDS, LEAST = 40, 60
RAW = r"\b[A-Z]\w*(Error|Exception): "
KINDS = {
    "vision and text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "classifier": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
STEPS = ("edit", "attach = apply", "exact revert", "train", "sum", "memory")


# -- what is asked of each ---------------------------------------------------------------------------------------------


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            if "decoder_input_ids" in batch:
                batch = {name: value for name, value in batch.items() if name != "labels"}
            return model(**batch).logits
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To float32 of two different orders of summation, through some layers."""
    return bool((one - other).abs().max() <= 1e-4 * (1 + other.abs().max()))


def padding_moves(model: nn.Module, kind: str) -> bool:
    """Whether the model itself answers a text otherwise where padding follows it."""
    batch = {name: value[1:] for name, value in batch_of(kind).items()}  # whose last token is padding
    if kind == "encoder-decoder":
        read = torch.arange(5, 9).unsqueeze(0)
        read, longer = ({**batch, "decoder_input_ids": ids} for ids in (read, nn.functional.pad(read, (0, 1))))
        one, other = logits(model, read), logits(model, longer)
    else:
        one = logits(model, {name: value if value.dim() == 1 else value[:, :7] for name, value in batch.items()})
        other = logits(model, batch)
    return not close(one, other[:, : one.shape[1]])


def steps(model: nn.Module, kind: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """The name of each step, and what makes it: "yes" or why not."""
    batch, other = batch_of(kind), batch_of(kind, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editor = MendEditor.from_model(model, None, MendConfig(rank=4, step_size=0.05))
    attached: list[torch.Tensor] = []
    edits: list[Edit] = []

    def untouched() -> bool:
        return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def edit() -> str:
        edits.append(editor.edit_tokens(batch))
        edits.append(editor.edit_tokens(other))
        if not untouched():
            return "the model changed"
        moved = [bool(u.any() and delta.any()) for u, delta, _ in edits[0].factors.values()]
        return "yes" if all(moved) else f"{len(moved) - sum(moved)} of {len(moved)} layers get no gradient"

    def attach() -> str:
        plain = logits(model, batch)
        with edits[0].attached(model):
            attached.append(logits(model, batch))
        edits[0].apply_(model)
        if close(attached[0], plain) and (attached[0] - plain).abs().max() < 1e-6:
            return "the edit changes nothing"
        return "yes" if close(attached[0], logits(model, batch)) else "they differ"

    def revert() -> str:
        edits[0].revert_(model)
        return "yes" if untouched() else "the bits differ"

    def train() -> str:
        inner, outer, loc = batch, batch_of(kind, 2), batch_of(kind, 3)
        editor.train()
        optimizer = torch.optim.SGD(editor.parameters(), 1e-2)
        total, parts = editor_loss(editor, inner, outer, loc)
        total.backward()
        optimizer.step()
        editor.eval()
        if not all(torch.isfinite(p).all() for p in editor.parameters()):
            return "the loss is not finite"
        with torch.no_grad():
            _, parts = editor_loss(editor, inner, outer, loc, joint=True)
        if kind != "classifier":
            with editor.edit_tokens(inner).attached(model):
                z, labels = logits(model, outer), outer["labels"]
            if kind == "causal":
                z, labels = z[:, :-1], labels[:, 1:]
            losses = zip(z, labels, strict=True)
            expected = torch.stack([nn.functional.cross_entropy(*one) for one in losses]).mean()
            if not close(parts["l_edit"], expected):
                return f"the loss is {parts['l_edit']:.4f}, that of the edited model {expected:.4f}"
        return "yes" if untouched() else "the model changed"

    def both() -> str:
        with Edit.sum(edits[:2]).attached(model):
            summed = logits(model, other)
        with edits[0].attached(model), edits[1].attached(model):
            return "yes" if close(summed, logits(model, other)) else "not that of both"

    def remember() -> str:
        with_words = MendEditor.from_model(model, words(), MendConfig(rank=4, step_size=0.05))
        prompts, targets = ["w10 w11 w12 w13", "w20 w21 w22 w23"], ["w40", "w41 w42"]
        if kind == "classifier":
            prompts, targets = [f"{prompt} </s>" for prompt in prompts], list(model.config.label2id)[:2]
        requests = list(zip(prompts, targets, strict=True))
        memory = EditMemory(with_words)
        keys = memory.add(requests)  # in one batch, the shorter one padded
        one, two = (with_words.edit(*request) for request in requests)
        with memory.attached():
            of_memory = logits(model, batch)
        with one.attached(model), two.attached(model):
            if not close(of_memory, logits(model, batch)):
                said = "answers of this model change with the padding beside them, and its edits too"
                return said if padding_moves(model, kind) else "not the two edits that it holds"
        memory.apply_()
        if not close(of_memory, logits(model, batch)):
            return "attached and applied differ"
        memory.remove(keys[0])
        memory.apply_()
        left = logits(model, batch)
        memory.revert_()
        with two.attached(model):
            if not close(left, logits(model, batch)):
                return "what was removed is not gone"
        return "yes" if untouched() else "the bits differ"

    yield from zip(STEPS, (edit, attach, revert, train, both, remember), strict=True)


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def reason(error: BaseException) -> str:
    if isinstance(error, _TooLong):
        return f"takes more than {LIMIT_SECONDS} s"
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = re.sub(r"\s+", " ", f"{kind}{error}").replace("|", "/").strip()
    text = re.sub(r"(/[\w.+-]+){3,}", "…", text)
    return text if len(text) <= 120 else text[:119] + "…"


def chosen(names: list[str]) -> str:
    """The default layers, blocks written as a range: "model.layers.1-3.mlp.{up,down}_proj"."""
    blocks: dict[str, dict[str, None]] = {}
    paths: dict[str, dict[str, None]] = {}
    for name in names:
        stack, number, path = re.match(r"(.*?)\.(\d+)\.(.*)\.weight$", name).groups()
        blocks.setdefault(stack, {})[number] = None
        paths.setdefault(stack, {})[path] = None
    return "; ".join(f"{stack}.[{' '.join(blocks[stack])}].({', '.join(paths[stack])})" for stack in blocks)


def row_of(model_type: str, class_name: str, kind: str) -> dict[str, str]:
    """One line of the table; "model" says why where it could not be built."""
    row = {"family": model_type, "class": class_name, "kind": kind}
    try:
        with limited(LIMIT_SECONDS):
            try:
                model = build(model_type, class_name, kind)
                if kind != "classifier":
                    kind = "encoder-decoder" if model.config.is_encoder_decoder else "causal"
                logits(model, batch_of(kind))
            except Exception as error:
                return {**row, "model": reason(error)}
            try:
                todo = list(steps(model, kind))
                row["layers"] = chosen(MendEditor.from_model(model, None, MendConfig(rank=1)).config.layers)
            except Exception as error:
                return {**row, "layers": reason(error)}
            for name, step in todo:
                try:
                    row[name] = step()
                except Exception as error:
                    row[name] = reason(error)
                    if name == "edit":
                        break
    except _TooLong as error:
        row.setdefault("layers", reason(error))
        row[next((name for name in STEPS if name not in row), STEPS[-1])] = reason(error)
    return row


def families() -> list[tuple[str, str, str]]:
    """(model type, class, kind) of all that the installed transformers has, each class once."""
    found: dict[tuple[str, str], str] = {}
    for kind, mapping in KINDS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault((name, "classifier" if kind == "classifier" else ""), f"{model_type}\n{kind}")
    return [(*value.split("\n")[:1], name, value.split("\n")[1]) for (name, _), value in found.items()]


# -- the table ---------------------------------------------------------------------------------------------------------


def line_of(row: dict[str, str]) -> str:
    cells = [row["family"], row.get("layers", "-"), *(row.get(step, "-") for step in STEPS)]
    return "| " + " | ".join(cells) + " |"


def in_turn(found: list[tuple[str, str, str]], start: int) -> list[tuple[str, str, str]]:
    """One of each kind after another, beginning at another place each time that ``start`` is another."""
    of_kind = {kind: [one for one in found if one[2] == kind] for kind in KINDS}
    of_kind = {kind: mine[start % len(mine) :] + mine[: start % len(mine)] for kind, mine in of_kind.items() if mine}
    return [mine[i] for i in range(len(found)) for mine in of_kind.values() if i < len(mine)]


def table(rows: list[dict[str, str]]) -> str:
    built = [row for row in rows if "model" not in row]
    whole = [row for row in built if all(row.get(step) == "yes" for step in STEPS)]
    lines = [
        "# Architectures",
        "",
        "Written by `python -m tests.architectures --write docs/architectures.md`, which builds every family of the "
        "installed transformers from its configuration, a few layers deep and with random weights, and edits it "
        "(without an image: those that see are asked text alone).",
        "",
        f"transformers {transformers.__version__}, PyTorch {torch.__version__.split('+')[0]}: {len(rows)} classes, "
        f"{len(built)} could be made small, {len(whole)} of them do everything.",
        "",
    ]
    for kind in KINDS:
        mine = sorted((row for row in built if row["kind"] == kind), key=lambda row: row["family"])
        if mine:
            lines += [f"## {kind.capitalize()} ({len(mine)})", "", "| family | default layers | " + " | ".join(STEPS)]
            lines[-1] += " |"
            lines.append("|---" * (2 + len(STEPS)) + "|")
        for row in mine:
            lines.append(line_of(row))
        lines += [""] if mine else []
    absent = sorted((row for row in rows if "model" in row), key=lambda row: (row["kind"], row["family"]))
    if absent:
        lines += ["## Not built", "", "Models that their configuration alone, shrunk, does not make run on tokens.", ""]
        lines += ["| family | class | why |", "|---|---|---|"]
        lines += [f"| {row['family']} | {row['class']} | {row['model']} |" for row in absent]
        lines.append("")
    return "\n".join(lines)


def faults(text: str) -> list[str]:
    """What a written table must not hold: fewer than 60 architectures, or a cell that says nothing or a raw error."""
    rows, head = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("| ") else []
        if cells[:1] == ["family"]:
            head = cells
        elif cells and "edit" in head:
            rows.append((head, cells))
    found = [] if len({cells[0] for _, cells in rows}) >= LEAST else [f"fewer than {LEAST} architectures"]
    for head, cells in rows:
        if len(cells) != len(head) or not all(cells):
            found.append(f"{cells[0]} has an empty cell")
            continue
        found += [f"{cells[0]} gives a raw error: {cell}" for cell in cells[1:] if re.match(RAW, cell)]
        said = cells[cells.index("-") - 1] if "-" in cells[1:] else "why not"
        found += [f"{cells[0]} stops without saying why"] if said in ("yes", "-") else []
    return found


def check(path: Path, seconds: float, start: int) -> list[str]:
    """Faults of the table in ``path``, and rows of it that are other ones now, as far as the seconds reach.

    Rows of another transformers than the table's are only looked at for raw errors.
    """
    text, until, seen = path.read_text(encoding="utf-8"), time.monotonic() + seconds, dict.fromkeys(KINDS, 0)
    found, same_version = faults(text), f"transformers {transformers.__version__}, " in text
    for family in in_turn(families(), start):
        if time.monotonic() > until:
            break
        if f"| {family[1]} |" in text:  # among those that can't be built
            continue
        row = quietly(*family)
        seen[family[2]] += 1
        line, known = line_of(row), [old for old in text.splitlines() if old.startswith(f"| {family[0]} |")]
        found += [f"a raw error: {line}"] if re.search(RAW, line) and "model" not in row else []
        if any("takes more than" in one for one in (line, *known)) or "model" in row or not same_version:
            continue
        if line not in known:
            found.append(f"{path} does not hold what was found: {line}")
    print("tried again: " + ", ".join(f"{count} {kind}" for kind, count in seen.items()))
    return found


def quietly(*family: str) -> dict[str, str]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return row_of(*family)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare that table's rows with those of now")
    parser.add_argument("--seconds", type=float, default=100, help="how long the check may take")
    parser.add_argument("--start", type=int, default=0, help="where among the families the check begins")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="these families alone")
    parser.add_argument("--kind", choices=list(KINDS), help="this kind alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("mendfast").setLevel(logging.ERROR)
    if args.check:
        found = check(args.check, args.seconds, args.start)
        print("\n".join(found) or f"{args.check} holds")
        return bool(found)
    rows = []
    for family in families():
        if args.only and family[0] not in args.only or args.kind and family[2] != args.kind:
            continue
        started = time.monotonic()
        rows.append(quietly(*family))
        said = {name: cell for name, cell in rows[-1].items() if cell != "yes" and name not in ("family", "kind")}
        print(f"{family[0]} ({family[2]}, {time.monotonic() - started:.1f} s): {said}", flush=True)
        if args.write:  # as it goes, so that a run that is stopped leaves what it has
            args.write.parent.mkdir(parents=True, exist_ok=True)
            args.write.write_text(table(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
