"""What does it cost to keep many edits: to add one more, or many, and to solve for all of them as one?"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from mendfast import EditMemory, EditRequest, MendEditor
from mendfast.aggregate import Wanted
from mendfast.base_model import train_tokenizer
from mendfast.memory_file import Record, key_of
from mendfast.metric import Metric
from mendfast.moments import SecondMoment

from .cases import cases
from .contest import Contestant, relative_error
from .shapes import batch, edited_model

ROWS = 15  # of an edit
ADDING = cases((1, 10, 100, 1000), typical=10, cpu=(1, 10, 1000), cpu_others=False)
MANY = cases((32,), typical=32, cpu=(32,), cpu_others=False)
TOGETHER = [case for case in MANY if case.shape.family in ("gpt2", "gptj", "llama", "qwen2")]
SOLVING = cases((25, 125, 1000), typical=125, cpu=(25, 125), cpu_others=False)


@functools.lru_cache(maxsize=1)
def _editor(shape, device: str, dtype: torch.dtype) -> MendEditor:
    """The row's editor, by least squares, with a tokenizer and a metric of random text."""
    plain = edited_model(shape, device, dtype)
    tokenizer = train_tokenizer(["Who is number 0123456789?"], 300)
    config = replace(plain.config, aggregation="least_squares")
    editor = MendEditor.from_model(plain.model, tokenizer, config)
    editor.load_state_dict(plain.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for layer in editor.layers:
        moments[layer.name] = moment = SecondMoment(layer.m, min(256, layer.m // 4) if layer.m > 4096 else None)
        moment.add(torch.randn(layer.m + 100, layer.m, generator=generator) / torch.arange(1, layer.m + 1).sqrt())
    editor.protect_with(Metric(moments, editor.model.config.model_type, 1))
    return editor


def _prepared(contest, case, kept: int) -> EditMemory:
    """A memory of ``kept`` records of random rows."""
    large = contest.on_gpu and not case.shape.on_cpu and not contest.quick
    dtype = torch.bfloat16 if large else torch.float32
    editor = _editor(contest.size(case.shape), contest.device.type, dtype)
    memory, generator = EditMemory(editor), torch.Generator().manual_seed(1)
    widths = {width for layer in editor.layers for width in layer.shape}
    pool = {width: torch.randn(100, ROWS, width, generator=generator) for width in widths}  # shared: memory is finite
    for i in range(kept):
        request = EditRequest(f"Who was number {i}?", "nobody")
        rows = {layer.name: (pool[layer.m][i % 100], pool[layer.n][i % 100]) for layer in editor.layers}
        memory._records[key_of(request.prompt)] = Record(request, rows)
    memory._identity()
    return memory


@pytest.mark.parametrize("case", ADDING, ids=str)
def test_adding(contest, case):
    """The last one of so many: 1,000 should cost what 10 do, and keep 100 times their bytes."""
    count = contest.amount(case.size)
    memory = _prepared(contest, case, count - 1)

    def add(request: EditRequest) -> list[str]:
        return memory.add(request)

    contestants = {"mendfast": Contestant(add, finish=lambda request: memory.remove(request.prompt))}
    row = {"shape": contest.size(case.shape).name, "edits": count}
    answer = "label_1" if memory.editor.kind == "classifier" else "12345"
    contest(row, lambda seed: EditRequest(f"Who is number {seed}?", answer), contestants, reference=None, memory=False,
            kept_bytes=memory.num_bytes())  # fmt: skip
    assert len(memory) == count - 1


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_adding_many(contest, case, monkeypatch):
    """Many at once that begin alike, made of their answers' tokens: as a tree of texts, or padded texts in batches."""
    plain = _prepared(contest, case, 0).editor
    config = replace(plain.config, rows="answers")
    editor = MendEditor.from_model(plain.model, plain.tokenizer, config)
    editor.load_state_dict(plain.state_dict())
    editor.protect_with(plain.metric)

    count = contest.amount(case.size)

    def data(seed: int) -> list[EditRequest]:
        return [EditRequest(f"Who is number {seed} of {i}?", f"{i}{seed % 7}") for i in range(count)]

    def padded(requests: list[EditRequest]) -> EditMemory:
        with monkeypatch.context() as patch:
            patch.setattr("mendfast.editor.LEAST_TEXTS", 1 << 62)
            return tree(requests)

    def tree(requests: list[EditRequest]) -> EditMemory:
        memory = EditMemory(editor)
        memory.add(requests, progress=False)
        return memory

    one, other = (run(data(0)) for run in (tree, padded))
    for key in one.keys():
        for name, sides in other._records[key].rows.items():
            for side, found in zip(sides, one._records[key].rows[name], strict=True):
                assert relative_error([found], [side]) < 1e-3
    row = {"shape": contest.size(case.shape).name, "edits": count}
    contest(row, data, {"mendfast": tree, "padded": padded}, reference=None, memory=False, units=count)


@pytest.mark.parametrize("case", SOLVING, ids=str)
def test_solving(contest, case):
    """All records as one edit, from the rows (anew) and after one more was added, beside capturing their gradients.

    "at once" is MendEditor.edit's solve, which keeps nothing of the rows.
    """
    count = contest.amount(case.size)
    memory = _prepared(contest, case, count)
    editor, items = memory.editor, dict(memory._records)
    tokens = batch(contest.size(case.shape), min(count, 125), ROWS)
    last = list(items)[-1]

    rows = {}
    for layer in editor.layers:
        u, d = (torch.cat(side) for side in zip(*(record.rows[layer.name] for record in items.values()), strict=True))
        sample = torch.arange(count).repeat_interleave(ROWS)
        rows[layer.name] = Wanted(*(side.to(contest.device) for side in (u, d, sample)))

    def forget(_) -> None:
        memory._sums.clear()
        memory._solved = None

    def without_the_last(_) -> None:
        memory._records = {key: record for key, record in items.items() if key != last}
        memory._version += 1
        memory.edit()
        memory._take({last: items[last]})

    contestants = {
        "mendfast": Contestant(lambda _: memory.edit(), forget),
        "at once": lambda _: editor.change(rows),
        "one more": Contestant(lambda _: memory.edit(), without_the_last),
        "capturing 125" if count > 125 else "capturing": lambda _: editor.gradients(tokens),
    }
    row = {"shape": contest.size(case.shape).name, "edits": count}
    contest(row, lambda seed: None, contestants, reference=None, memory=False)
