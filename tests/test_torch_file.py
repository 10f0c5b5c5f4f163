"""Files of torch.save, read without running what they name."""

from __future__ import annotations

import io
import pickle
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
import transformers
from torch import nn

from mendfast.compat import torch_file
from mendfast.compat.torch_file import Inert, TorchFile

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickles"])


def save(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def read(path):
    """Everything in the file, all its tensors too."""
    with TorchFile(path) as file:
        for value in file.content.values():
            file.tensor(value)
        return file.content


def zip_with(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save whose pickle is ``pickled``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
    return buffer.getvalue()


@LAYOUTS
def test_tensors_are_read_as_torch_reads_them(tmp_path, zipped):
    base = torch.randn(4, 6)
    tensors = {
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "shared": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.ones(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "long": torch.arange(5),
        "bool": base > 0,
        "parameter": nn.Parameter(base.clone()),
    }
    with TorchFile(save(tmp_path / "file", tensors, zipped)) as file:
        for key, tensor in tensors.items():
            read = file.tensor(file.content[key])
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), key


@LAYOUTS
def test_what_is_not_known_keeps_its_name_and_state(tmp_path, zipped):
    content = {
        "config": transformers.GPT2Config(n_embd=48),
        "type": torch.float16,
        "set": {1, 2},
        "device": torch.device("cpu"),
        "text": "as it is",
        "numbers": [1, 2.5, None, (True,)],
    }
    with TorchFile(save(tmp_path / "file", content, zipped)) as file:
        found = file.content
    assert found["config"].origin == "transformers.models.gpt2.configuration_gpt2.GPT2Config"
    assert found["config"].state["n_embd"] == 48
    assert isinstance(found["device"], Inert) and found["device"].args == ("cpu",)
    assert isinstance(found["set"], Inert) and found["set"].args == ([1, 2],)
    assert found["text"] == "as it is" and found["numbers"] == content["numbers"]


CRAFTED = {
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x06marker\x85R.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x16serialization.os.mkdir\x93\x8c\x06marker\x85R.",
    "exec": b"cbuiltins\nexec\n(S'import os; os.mkdir(\"marker\")'\ntR.",
    "inst": b"(S'marker'\nios\nmkdir\n.",
}


@pytest.mark.parametrize("how", CRAFTED)
def test_crafted_pickles_do_nothing(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(zip_with(CRAFTED[how]))
    with TorchFile("file") as file:
        assert isinstance(file.content, Inert)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    pickle.loads(CRAFTED[how])
    assert (tmp_path / "marker").exists()  # the trap was armed


def test_a_pickle_cannot_change_this_module(tmp_path):
    """A state for a function: attributes of what the pickle may call would outlive it."""
    before = torch_file._stored_tensor.__defaults__
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        pickled = b"ctorch._utils\n%s\n(N}S'__defaults__'\n(I1\ntstb." % name.encode()
        (tmp_path / "file").write_bytes(zip_with(pickled))
        with pytest.raises(ValueError, match="a function with a state"):
            TorchFile(tmp_path / "file")
    assert torch_file._stored_tensor.__defaults__ is before


@pytest.mark.parametrize(
    "arguments",
    ["I0\n(I9\nt(I1\nt", "I5\n(I4\nt(I1\nt", "I0\n(I4\nt(I3\nt", "I-1\n(I4\nt(I1\nt", "I0\n(I999\nt(I0\nt"],
)
def test_shapes_that_leave_their_storage(arguments, tmp_path):
    pickled = (
        "ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI8\ntQ%stR."
    )
    (tmp_path / "file").write_bytes(zip_with((pickled % arguments).encode()))
    with pytest.raises(ValueError, match="no whole file.*a tensor"):
        TorchFile(tmp_path / "file")


@LAYOUTS
@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.7, 0.99, -1])
def test_cut_short(tmp_path, zipped, kept):
    whole = save(tmp_path / "file", {"a": torch.randn(500), "b": torch.randn(70)}, zipped).read_bytes()
    read(tmp_path / "file")
    (tmp_path / "file").write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="no whole file of torch.save"):
        TorchFile(tmp_path / "file")


def test_damaged(tmp_path):
    tensor = torch.randn(500)
    content = bytearray(save(tmp_path / "file", {"a": tensor}).read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 9] ^= 0xFF
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged.*Fetch it again"):
        read(tmp_path / "file")


def test_a_damaged_name(tmp_path):
    """In a member's own header, which is not looked at before its numbers are."""
    content = save(tmp_path / "file", {"a": torch.randn(500)}).read_bytes()
    (tmp_path / "file").write_bytes(content.replace(b"file/data/0", b"\x80ile/data/0", 1))
    with pytest.raises(ValueError, match="is damaged.*Fetch it again"):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"\x00" * 4096,
        pickle.dumps({"model": {}}),
        pickle.dumps([1]),
        b"PK\x03\x04" + b"\x00" * 99,
        zip_with(b""),
        zip_with(pickle.dumps({}), zipfile.ZIP_DEFLATED),
        struct.pack("<Q", 8) + b'{"a":1} ',
    ],
)
def test_foreign_files(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="no whole file of torch.save"):
        TorchFile(tmp_path / "file")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        TorchFile(tmp_path / "missing")


def legacy_with(pickled: bytes, storages: bytes = b"") -> bytes:
    """A file in the older layout whose content is ``pickled``."""
    parts = (torch_file.LEGACY_MAGIC, torch_file.LEGACY_PROTOCOL, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts) + pickled + (storages or pickle.dumps([], 2))


STORED = "ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI%d\ntQI0\n(I4\nt(I1\ntt"
HOSTILE = {
    "a place of the memo that takes gigabytes": (b"\x80\x02]r\xff\xff\xff\x07.", "place 134217727 of the memo"),
    "an integer of 2 GiB": (b"\x80\x02\x8b\xff\xff\xff\x7f\x00.", "an integer of 2,147,483,647 bytes"),
    "an integer of 5,000 digits": (b"I" + b"9" * 5000 + b"\n.", "a line that does not end"),
    "an integer of 1,000 digits": (b"I" + b"9" * 1000 + b"\n.", "an integer of 1,000 digits"),
    "a text of 4 GiB": (b"\x80\x02X\xff\xff\xff\xff.", "past the end of the file"),
    "a text of 2^63": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "past the end of the file"),
    "a key whose hash takes for ever": (b"\x80\x02}K\x01\x85" + b"2\x86" * 100 + b"K\x02s.", "as a key"),
    "a key that is nested deeply": (b"\x80\x02}N" + b"\x85" * 200_000 + b"K\x02s.", "as a key"),
    "a storage of 4 TB": ((STORED % 10**12).encode() + b"R.", "more than the file has"),
    "more instructions than any file has": (b"]" + b"0]" * 400_000 + b".", "more than 500,000 instructions"),
    "another protocol": (b"\x80\x09N.", "protocol 9"),
    "nothing to take": (b"0.", "nothing to work on"),
    "an end without a start": (b"t.", "an end without a start"),
}


@LAYOUTS
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_cost_nothing(what, zipped, tmp_path):
    pickled, match = HOSTILE[what]
    (tmp_path / "file").write_bytes(zip_with(pickled) if zipped else legacy_with(pickled))
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            TorchFile(tmp_path / "file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 5 and peak < 100 << 20  # tracing makes it several times slower
    assert len(str(caught.value)) <= 300 + len(str(tmp_path))


@LAYOUTS
def test_nested_and_circular_content_is_read(zipped, tmp_path):
    for pickled in (b"\x80\x02]q\x00(h\x00h\x00e.", b"\x80\x02N" + b"\x85" * 100_000 + b"."):
        (tmp_path / "file").write_bytes(zip_with(pickled) if zipped else legacy_with(pickled))
        with TorchFile(tmp_path / "file") as file:
            assert len(file.content) in (1, 2)


def test_a_member_that_announces_more_than_the_file_has(tmp_path):
    content = bytearray(zip_with(b"N."))
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 20 : directory + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="past the end of the file"):
        TorchFile(tmp_path / "file")
