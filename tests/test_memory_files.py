"""EditMemory on the disk: saved, loaded, resumed after a kill, cut anywhere."""

# ruff: noqa: F811 (fixtures of another file are imported by name, and asked for by name)

from __future__ import annotations

import json
import logging

import pytest
from interrupts import Interrupt
from safetensors.torch import load_file
from test_edit_memory import LAYERS, REQUESTS, all_300, close, editor, make, of, path, same_rows  # noqa: F401

from mendfast import EditMemory, EditRequest, MendEditor
from mendfast import memory as memory_module
from mendfast.memory import read_requests, update_file
from mendfast.memory_file import journal_of, key_of


def test_save_and_load_keep_every_bit(editor, all_300, path):
    all_300.save(path)
    first = path.read_bytes()
    loaded = EditMemory.load(path, editor)
    assert same_rows(loaded, all_300) and loaded.keys() == all_300.keys() and loaded.requests == all_300.requests
    assert close(loaded.edit(), all_300.edit(), 1e-6) and read_requests(path) == dict(
        zip(all_300.keys(), map(EditRequest._make, REQUESTS), strict=True)
    )
    loaded.save(path)
    assert path.read_bytes() == first and not journal_of(path).exists()
    assert repr(loaded) == f"EditMemory(300 edits, {loaded.num_bytes():,} bytes)"


def test_a_saved_editor_reads_its_memory(tokenizer, tmp_path, path):
    editor = make(tokenizer)
    memory = EditMemory(editor)
    memory.add(REQUESTS[:3])
    memory.save(path)
    editor.save_pretrained(tmp_path / "editor")
    again = MendEditor.from_pretrained(tmp_path / "editor", editor.model, tokenizer)
    assert close(EditMemory.load(path, again).edit(), memory.edit(), 1e-5)


def test_a_killed_addition_goes_on_where_it_was(editor, path, monkeypatch):
    """A kill leaves file and journal as they are at the time: copies of them are taken after each pass."""
    memory = EditMemory(editor)
    memory.add(REQUESTS[:5], save_to=path)
    before, frames, write = path.read_bytes(), [], memory_module.Journal.write

    def recorded(journal, records):
        write(journal, records)
        frames.append(journal.path.read_bytes())

    monkeypatch.setattr(memory_module.Journal, "write", recorded)
    memory.add(REQUESTS[:60], save_to=path, batch_size=16)
    assert len(frames) == 4 and not journal_of(path).exists()
    whole, passes, rows_of = EditMemory.load(path, editor), [], EditMemory._records_of
    assert whole.keys() == memory.keys() and same_rows(whole, memory)

    def counted(self, requests, *others):
        passes.append(len(requests))
        return rows_of(self, requests, *others)

    monkeypatch.setattr(EditMemory, "_records_of", counted)
    ends = [0, *(len(frame) for frame in frames)]
    for done, frame in enumerate(list(frames), 1):  # those below write more
        for cut in (len(frame), (ends[done - 1] + len(frame)) // 2 if done > 1 else len(frame), len(frame) - 1):
            path.write_bytes(before)
            journal_of(path).write_bytes(frame[:cut])
            kept = min(55, 16 * (done if cut == len(frame) else done - 1))
            if done == 1 and cut < len(frame):
                kept = 0
            found = EditMemory.open(path, editor)
            assert len(found) == len(read_requests(path)) == 5 + kept
            passes.clear()
            keys = found.add(REQUESTS[:60], save_to=path)
            assert sum(passes) == 55 - kept and keys == [key_of(prompt) for prompt, _ in REQUESTS[:60]]
            assert set(found.keys()) == set(whole.keys()) and not journal_of(path).exists()
            assert set(EditMemory.load(path, editor).keys()) == set(whole.keys())
            assert close(found.edit(), whole.edit())


def test_a_killed_first_addition_goes_on_too(editor, path, monkeypatch):
    memory, write, passes = EditMemory(editor), memory_module.Journal.write, []

    def interrupted(journal, records):
        write(journal, records)
        passes.append(len(records))
        if len(passes) == 2:
            raise Interrupt

    monkeypatch.setattr(memory_module.Journal, "write", interrupted)
    with pytest.raises(Interrupt):
        memory.add(REQUESTS[:50], save_to=path, batch_size=16)
    assert len(memory) == 0 and not path.exists() and len(EditMemory.load(path, editor)) == 32
    with pytest.raises(ValueError, match="holds a memory already.*EditMemory.open"):
        EditMemory(editor).add(REQUESTS[:50], save_to=path)
    memory.add(REQUESTS[:50], save_to=path, batch_size=16)  # in the same process, without loading
    assert passes == [16, 16, 16, 2] and len(memory) == len(EditMemory.load(path, editor)) == 50


def test_a_journal_of_another_file_is_left_out(editor, path, caplog):
    """A crash between the writing of the file and the removal of its journal."""
    memory = EditMemory(editor)
    memory.add(REQUESTS[:3], save_to=path)
    journal = memory_module.Journal(path, memory._file[1], list(memory._records.values()), memory._identity())
    journal.close()
    content = journal_of(path).read_bytes()
    memory.remove(memory.keys()[0])
    memory.save(path)
    assert not journal_of(path).exists()
    journal_of(path).write_bytes(content)
    with caplog.at_level(logging.WARNING, "mendfast"):
        assert len(EditMemory.load(path, editor)) == 2
    assert "continues another file" in caplog.text


def test_a_file_cut_anywhere(editor, path):
    memory = EditMemory(editor)
    memory.add(REQUESTS[:2])
    memory.save(path)
    content = path.read_bytes()
    for cut in [*range(0, 40), *range(40, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:cut])
        for read in (lambda: EditMemory.load(path, editor), lambda: read_requests(path)):
            with pytest.raises(ValueError, match="no whole safetensors file"):
                read()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="damaged"):
        EditMemory.load(path, editor)


def test_a_damaged_file_is_refused_with_a_sentence(editor, path):
    from mendfast.files import write_tensors
    from mendfast.memory_file import _checksum, pack, read

    memory = EditMemory(editor)
    memory.add(REQUESTS[:2])
    tensors, metadata = pack(list(memory._records.values()), memory._identity())
    name = LAYERS[0]

    def written(**parts):
        t = {**tensors, **{k: v for k, v in parts.pop("tensors", {}).items()}}
        t = {k: v for k, v in t.items() if v is not None}
        m = {k: v for k, v in {**metadata, **parts}.items() if v is not None}
        write_tensors(path, t, {**m, "checksum": _checksum(t, m)})
        return read(path)

    assert len(written()[0]) == 2
    rows = tensors[f"{name}:rows"]
    for says, parts in {
        "lacks editor": dict(editor=None),
        "lacks transformer.*:u": dict(tensors={f"{name}:u": None}),
        "holds more": dict(tensors={"more": rows.clone()}),
        "not one for each request": dict(tensors={f"{name}:rows": -rows}),
        r"it must be \[": dict(tensors={f"{name}:rows": rows + 1}),
        "holds NaN or infinity": dict(tensors={f"{name}:d": tensors[f"{name}:d"] / 0}),
        "is no JSON": dict(requests="[["),
        "must be a pair": dict(requests="[[1, 2], [3, 4]]"),
        "holds a prompt twice": dict(requests=json.dumps([["a", "b"], ["a", "c"]])),
        r"must be \[m, n\]": dict(weights=json.dumps({name: [True, 3]})),
        "must be an object": dict(weights="[]"),
        "a newer one wrote it": dict(format_version="9"),
    }.items():
        with pytest.raises(ValueError, match=says):
            written(**parts)
    assert load_file(path)


def test_a_file_is_updated_from_the_command_line(editor, path):
    memory = update_file(path, editor, REQUESTS[:4])
    keys = memory.keys()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no key 'nothing'"):
        update_file(path, editor, [("New?", "yes")], ["nothing"])
    with pytest.raises(ValueError, match="Request 1"):
        update_file(path, editor, [("New?", "yes"), ("Long " * 80, "yes")], [keys[0]])
    assert path.read_bytes() == before and not journal_of(path).exists()
    update_file(path, editor, [(REQUESTS[0][0], "New")], [keys[0], REQUESTS[1][0]])
    assert [*read_requests(path).values()] == [(REQUESTS[0][0], "New"), *REQUESTS[2:4]]
    update_file(path, editor, remove=[keys[2][:6]])
    assert [*read_requests(path)] == [keys[0], keys[3]]
