"""What files may say: configurations, edits, checkpoints, and the bytes that are written."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import dataclass, field

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from mendfast import Edit, MendConfig, MendEditor
from mendfast.files import atomic_write, read_tensors, write_tensors
from mendfast.network import planned_networks
from mendfast.schema import brief, check_fields, check_version, parse_json, shown
from mendfast.training import TrainConfig, checkpoint

NAME = "transformer.h.3.mlp.c_fc.weight"
SMALL = dict(rank=4, layers=[NAME])


def config_file(path, **values):
    path.write_text(json.dumps({**MendConfig(**SMALL).to_dict(), **values}))
    return path


class TestConfig:
    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"rank": "abc"}, "rank is 'abc'; it must be a whole number"),
            ({"rank": True}, "rank is True"),
            ({"rank": 0}, "rank is 0; it must be at least 1"),
            ({"layers": 5}, "layers is 5; it must be a list"),
            ({"layers": [None]}, r"layers\[0\] is None; it must be text"),
            ({"layers": "mlp"}, "pass a list"),
            ({"blocks": 1.5}, "blocks is 1.5; it must be a whole number"),
            ({"blocks": 1_000_000}, "blocks is 1000000; it must be at most 128"),
            ({"blocks": None}, "blocks is None"),
            ({"step_size": -1}, "step_size is -1.0; it must be at least 0"),
            ({"step_size": float("nan")}, "step_size is nan; it must be finite"),
            ({"step_size": 10**299 * 10**299}, "integer of 599 digits"),
            ({"step_size": [1]}, r"step_size is \[1\]"),
            ({"normalize": "false"}, "normalize is 'false'; it must be true or false"),
            ({"sides": "left"}, "choose one of both, u"),
            ({"separator": "\ud800"}, "half a surrogate"),
            ({"prompt_template": "no slot"}, "must contain {prompt}"),
            ({"format_version": 99}, "reads up to 1: a newer one wrote it; pip install --upgrade"),
            ({"format_version": "x"}, "format_version 'x'"),
        ],
    )
    def test_values(self, values, match, tmp_path):
        with pytest.raises(ValueError, match=match) as caught:
            MendConfig.load(config_file(tmp_path / "mend_config.json", **values))
        assert len(str(caught.value)) <= 300 + len(str(tmp_path))

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"null", "is null, None; it must be an object"),
            (b"[1]", "is a list"),
            ('{"separator": "\u00e9"}'.encode("latin-1"), "not UTF-8"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"rank": ' + b"9" * 5000 + b"}", "an integer of 5,000 digits"),
            (b'{"rank": 1, "rank": 2}', "'rank' is there twice"),
            (b" " * (17 << 20), "more than 16,777,216 bytes"),
            (b"", "no JSON"),
        ],
    )
    def test_files(self, content, match, tmp_path):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=match):
            MendConfig.load(tmp_path / "file")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no file"):
            MendConfig.load(tmp_path / "missing")

    @pytest.mark.parametrize("changed", [{"blocks": 100}, {"rank": 1920}, {"sides": "u"}, {"shared": False}])
    def test_nothing_is_built_that_the_weights_do_not_fit(self, changed, tmp_path, monkeypatch):
        model = make_model("gpt2")
        MendEditor.from_model(model, None, MendConfig(**SMALL)).save_pretrained(tmp_path)
        config_file(tmp_path / "mend_config.json", **changed)
        with monkeypatch.context() as patched:
            patched.setattr(MendEditor, "__init__", lambda *_: pytest.fail("it was built"))
            with pytest.raises(ValueError, match="editor for another model"):
                MendEditor.from_pretrained(tmp_path, model)

    @pytest.mark.parametrize("sides", ["both", "u", "delta", "smaller", "separate"])
    @pytest.mark.parametrize("shared", [True, False])
    def test_what_is_planned_is_what_is_built(self, sides, shared):
        editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=4, sides=sides, shared=shared))
        planned = planned_networks(editor.layers, editor.config).state_dict()
        built = editor.networks.state_dict()
        assert {name: t.shape for name, t in planned.items()} == {name: t.shape for name, t in built.items()}

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t: t.to(torch.complex64), "is complex64"),
            (lambda t: t > 0, "is bool"),
            (lambda t: t.long(), "is int64"),
            (lambda t: t * float("nan"), "holds NaN"),
        ],
    )
    def test_weights(self, change, match, tmp_path):
        model = make_model("gpt2")
        MendEditor.from_model(model, None, MendConfig(**SMALL)).save_pretrained(tmp_path)
        path = tmp_path / "editor.safetensors"
        tensors, metadata = read_tensors(path, "editor")
        name = next(name for name in tensors if name.endswith(".V"))
        write_tensors(path, {**tensors, name: change(tensors[name])}, metadata)
        with pytest.raises(ValueError, match=match):
            MendEditor.from_pretrained(tmp_path, model)


def edit_file(path, metadata=(), **tensors):
    """An edit with some of its parts changed; None leaves one out."""
    whole = {f"{NAME}:u": torch.ones(2, 32), f"{NAME}:delta": torch.ones(2, 128)}
    whole |= {f"{NAME}:alpha": torch.tensor(0.5, dtype=torch.float64)}
    whole |= {name.replace("W", NAME, 1): tensor for name, tensor in tensors.items()}
    described = {"format": "mendfast.edit", "format_version": "1", "model_type": "gpt2"}
    described |= {"requests": '[["Who?", "Me"]]', "weights": json.dumps([NAME]), **dict(metadata)}
    kept = {name: value for name, value in described.items() if value is not None}
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, path, kept)
    return path


class TestEdit:
    @pytest.mark.parametrize(
        ("tensors", "match"),
        [
            ({"W:u": torch.ones(2, 32, dtype=torch.complex64)}, "u, is complex64"),
            ({"W:u": torch.ones(2, 32, dtype=torch.bool)}, "u, is bool"),
            ({"W:delta": torch.ones(2, 128, dtype=torch.uint32)}, "delta, is uint32"),
            ({"W:delta": torch.ones(2, 128, dtype=torch.int64)}, "delta, is int64"),
            ({"W:u": torch.ones(2, 32) * float("inf")}, "u, holds NaN or infinity"),
            ({"W:u": torch.full((2, 32), 1e300, dtype=torch.float64)}, "in float32 holds NaN or infinity"),
            ({"W:u": torch.ones(2, 4, 8)}, "it must be a matrix"),
            ({"W:u": torch.ones(3, 32)}, "3 rows of u and 2 of delta"),
            ({"W:alpha": torch.ones(2)}, "a single number"),
            ({"W:alpha": torch.tensor(float("nan"))}, "alpha, holds NaN"),
            ({"W:alpha": torch.tensor(1)}, "alpha, is int64"),
            ({"W:alpha": None}, "lacks .*alpha"),
            ({"extra": torch.ones(1)}, "holds extra, of weights that it does not name"),
        ],
    )
    def test_factors(self, tensors, match, tmp_path):
        with pytest.raises(ValueError, match=match):
            Edit.load(edit_file(tmp_path / "edit", **tensors))

    @pytest.mark.parametrize(
        ("metadata", "match"),
        [
            ({"weights": "5"}, "a list of names"),
            ({"weights": json.dumps([NAME, NAME])}, "names a weight twice"),
            ({"weights": "[" * 5000}, "nested too deeply"),
            ({"weights": None}, "lacks weights"),
            ({"model_type": None}, "lacks model_type"),
            ({"requests": '["Who?"]'}, "each must be a pair"),
            ({"requests": '[["Who?", 5]]'}, "each must be a pair"),
            ({"requests": "{}"}, "each must be a pair"),
            ({"format_version": "2"}, "a newer one wrote it"),
        ],
    )
    def test_metadata(self, metadata, match, tmp_path):
        with pytest.raises(ValueError, match=match):
            Edit.load(edit_file(tmp_path / "edit", metadata))

    def test_names(self, tmp_path):
        edit = Edit({NAME.removesuffix(".weight"): (torch.ones(1, 32), torch.ones(1, 128), 1.0)})
        with pytest.raises(ValueError, match="ends in .weight"):
            edit.save(tmp_path / "edit")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_widths_become_float32(self, dtype, tmp_path):
        u = torch.randn(2, 32).to(dtype)
        loaded = Edit.load(edit_file(tmp_path / "edit", **{"W:u": u})).factors[NAME]
        assert loaded.u.dtype == torch.float32 and torch.equal(loaded.u, u.float()) and loaded.alpha == 0.5


class TestBytes:
    def test_the_same_content_gives_the_same_bytes(self, tmp_path):
        tensors = {f"t{i}": torch.full((3,), float(i)) for i in range(20)}
        metadata = {f"é{i}": f'"{i}"\n' for i in range(20)}
        for i in range(8):
            write_tensors(tmp_path / str(i), tensors, {"format": "mendfast.edit", **metadata})
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
        read, found = read_tensors(tmp_path / "0", "edit")
        assert found == {"format": "mendfast.edit", **metadata} and list(read) == list(load_file(tmp_path / "0"))
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())

    def test_a_directory_that_cannot_be_opened(self, tmp_path, monkeypatch):
        """As on Windows, where os.open refuses directories."""
        really = os.open

        def no_directories(path, *arguments, **options):
            if os.path.isdir(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return really(path, *arguments, **options)

        monkeypatch.setattr(os, "open", no_directories)
        atomic_write(tmp_path / "file", b"one", b" two")
        assert (tmp_path / "file").read_bytes() == b"one two"


def test_a_file_that_is_overwritten_in_place_takes_no_process_with_it(tmp_path):
    """Mapped, its tensors would lie beyond its end: the system ends the process that reads them (SIGBUS)."""
    path = tmp_path / "edit.safetensors"
    Edit({"a.weight": (torch.ones(64, 4096), torch.ones(64, 4096), 1.0)}).save(path)
    edit = Edit.load(path)
    reader = os.fork() if hasattr(os, "fork") else None
    if reader == 0:
        with path.open("r+b") as file:
            file.truncate(16)
        os._exit(int(edit.factors["a.weight"].u[-1, -1].item() != 1))
    if reader:
        assert os.waitpid(reader, 0)[1] == 0


class TestCheckpoint:
    def made(self, path):
        editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(**SMALL))
        optimizer = torch.optim.Adam(editor.parameters(), fused=True)
        for parameter in editor.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        progress = {"step": 1, "skipped": 0, "best": float("inf"), "stale": 0}
        checkpoint.write(path, editor.state_dict(), optimizer, TrainConfig(), progress)
        return editor, optimizer, progress

    def test_round_trip(self, tmp_path):
        editor, optimizer, progress = self.made(tmp_path / "file")
        before = optimizer.state_dict()["state"]
        parameters, found = checkpoint.read(tmp_path / "file", optimizer, TrainConfig())
        assert found == progress and parameters.keys() == editor.state_dict().keys()
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(state[name], before[i][name]) for name in before[i])

    @pytest.mark.parametrize(
        ("name", "change", "match"),
        [
            ("adam:1:exp_avg", lambda t: t[:1], "exp_avg of parameter 1 as float32"),
            ("adam:1:exp_avg_sq", lambda t: t.half(), "exp_avg_sq of parameter 1 as float16"),
            ("adam:1:exp_avg_sq", lambda t: t - 1, "values that no run leaves"),
            ("adam:1:exp_avg", lambda t: t * float("nan"), "values that no run leaves"),
            ("adam:1:step", lambda t: t - 2, "says step -1"),
            ("adam:1:step", lambda t: t.repeat(2), "says step float32"),
            ("adam:1:step", lambda t: None, "not step, exp_avg, exp_avg_sq"),
            ("adam:99:step", lambda t: torch.tensor(1.0), "that there are none of"),
            ("adam:x:step", lambda t: torch.tensor(1.0), "that there are none of"),
            ("eve", lambda t: torch.tensor(1.0), "holds the tensor 'eve'"),
        ],
    )
    def test_adam(self, name, change, match, tmp_path):
        _, optimizer, _ = self.made(tmp_path / "file")
        tensors, metadata = read_tensors(tmp_path / "file", "checkpoint")
        tensors[name] = change(tensors.get(name))
        write_tensors(tmp_path / "file", {n: t for n, t in tensors.items() if t is not None}, metadata)
        with pytest.raises(ValueError, match=match):
            checkpoint.read(tmp_path / "file", optimizer, TrainConfig())

    @pytest.mark.parametrize(
        ("metadata", "match"),
        [
            ({"progress": "5"}, "must be an object"),
            ({"progress": '{"step": "x"}'}, "says step 'x'"),
            ({"progress": '{"step": -1}'}, "says step -1"),
            ({"progress": '{"step": 1, "skipped": 0, "stale": 0}'}, "lacks best"),
            ({"progress": '{"step": 1, "skipped": 0, "stale": 0, "best": NaN}'}, "says best nan"),
            ({"config": "{"}, "no JSON"),
        ],
    )
    def test_metadata(self, metadata, match, tmp_path):
        _, optimizer, _ = self.made(tmp_path / "file")
        tensors, found = read_tensors(tmp_path / "file", "checkpoint")
        write_tensors(tmp_path / "file", tensors, {**found, **metadata})
        with pytest.raises(ValueError, match=match):
            checkpoint.read(tmp_path / "file", optimizer, TrainConfig())


def test_fields_of_any_dataclass():
    @dataclass
    class Settings:
        sizes: list[int] = field(default_factory=list, metadata={"least": 1, "most": 9})
        rate: float = 1

    settings = Settings((1, 2))
    check_fields(settings)
    assert settings.sizes == [1, 2] and isinstance(settings.rate, float)
    with pytest.raises(ValueError, match=r"sizes\[1\] is 10; it must be at most 9"):
        check_fields(Settings([1, 10]))
    for name in ("learning_rate", "warmup", "clip", "patience"):
        with pytest.raises(ValueError, match=f"{name} is -1"):
            TrainConfig(**{name: -1})
    with pytest.raises(ValueError, match="learning_rate is nan"):
        TrainConfig(learning_rate=float("nan"))


def test_versions():
    for found in (None, 1, "1"):
        check_version(found, 1, "It")
    for found in (True, 0, -1, 1.5, "one", "2", 10**30, [], "9" * 5000):
        with pytest.raises(ValueError, match="format_version"):
            check_version(found, 1, "It")


def test_values_are_named_shortly():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    begun = time.perf_counter()
    values = (10**10_000, "x" * 10**7, "\ud800" * 10**6, deep, {"a": deep}, [deep] * 3, b"x" * 10**7, object,
              torch.zeros([1] * 1000))  # fmt: skip
    for value in values:
        assert len(shown(value)) <= 120, shown(value)
    assert len(brief("y" * 10**7)) <= 120
    assert time.perf_counter() - begun < 1
    with pytest.raises(ValueError, match="The file is no JSON"):
        parse_json("x" * 10**6, "The file")
