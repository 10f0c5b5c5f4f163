"""A base model's training that is interrupted goes on where it was; of something else, it is refused."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from test_nothing_lost import SIGNALS, command, data, handlers  # noqa: F401
from test_training import facts

from mendfast.base_model import fit_base_model, small_gpt2, train_tokenizer
from mendfast.base_run import BaseRun
from mendfast.files import read_tensors, write_tensors

PAIRS = [(wording, item.answer) for item in facts()[:24] for wording in item.wordings]
STEPS = 7


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([prompt for prompt, _ in PAIRS], 320)


def fit(tokenizer, run=None, *, steps=STEPS, dropout=0.1, matrix_rate=0.02):
    torch.manual_seed(0)
    model = small_gpt2(len(tokenizer), width=32, depth=2, heads=2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    options = {"batch_size": 8, "warmup": 3, "progress": False, "matrix_rate": matrix_rate, "run": run}
    fit_base_model(model, tokenizer, PAIRS, steps=steps, **options)
    return model.state_dict()


class Killed(BaseRun):
    """A run in whose step ``at`` a signal comes."""

    def __init__(self, *rest, at: int, number: int = signal.SIGTERM):
        super().__init__(*rest)
        self.at, self.number = at, number

    def after_step(self, step, *rest):
        if step == self.at:
            os.kill(os.getpid(), self.number)
        super().after_step(step, *rest)


@pytest.mark.parametrize("matrix_rate", [0.02, None])
@pytest.mark.usefixtures("handlers")
def test_interrupted_it_goes_on_to_the_same_bits(tokenizer, tmp_path, caplog, matrix_rate):
    whole, path = fit(tokenizer, matrix_rate=matrix_rate), tmp_path / "run.safetensors"
    for at, number in zip((2, 5), SIGNALS, strict=True):
        with pytest.raises(KeyboardInterrupt):
            fit(tokenizer, Killed(path, {}, at=at, number=number), matrix_rate=matrix_rate)
        assert f"after step {at} of {STEPS}; it is kept in {path}" in caplog.text
    run = BaseRun(path, {})
    for (name, a), b in zip(fit(tokenizer, run, matrix_rate=matrix_rate).items(), whole.values(), strict=True):
        assert torch.equal(a, b), name
    run.done()
    assert not path.exists()


def test_it_is_kept_by_time(tokenizer, tmp_path):
    run = BaseRun(tmp_path / "run.safetensors", {}, minutes=0)
    fit(tokenizer, run)
    assert run.path.is_file()


@pytest.mark.usefixtures("handlers")
def test_another_or_a_damaged_run_is_refused(tokenizer, tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(tokenizer, Killed(path, {"seed": 0}, at=2))
    with pytest.raises(ValueError, match=r"other settings \(seed\).*--restart"):
        fit(tokenizer, BaseRun(path, {"seed": 1}))
    with pytest.raises(ValueError, match=r"other settings \(steps\)"):
        fit(tokenizer, BaseRun(path, {"seed": 0}), steps=STEPS + 1)
    tensors, metadata = read_tensors(path, "base_run")
    moment = next(name for name in tensors if name.endswith("exp_avg"))
    wrong = (
        {moment: tensors[moment].flatten()[:1]}, {moment: tensors[moment].double()}, {"more": torch.ones(1)},
        {"rng": torch.zeros_like(tensors["rng"])},
    )  # fmt: skip
    for change in wrong:
        write_tensors(path, {**tensors, **change}, metadata)
        with pytest.raises(ValueError, match="no whole training"):
            fit(tokenizer, BaseRun(path, {"seed": 0}))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        fit(tokenizer, BaseRun(path, {"seed": 0}))


def test_the_command_keeps_its_base_model(data, tmp_path, monkeypatch, capsys, caplog):  # noqa: F811
    output, options = tmp_path / "run", ("--steps", "1", "--base-steps", "4")
    after_step = BaseRun.after_step

    def killed(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BaseRun, "after_step", killed)
        assert command(data, output, *options) == 143
    kept = output / "model.unfinished.safetensors"
    assert kept.is_file() and "SIGTERM after step 2 of 4" in caplog.text
    assert command(data, output, *options) == 0
    assert not kept.exists()
    first = (output / "model" / "model.safetensors").read_bytes()
    assert command(data, tmp_path / "whole", *options) == 0
    assert (tmp_path / "whole" / "model" / "model.safetensors").read_bytes() == first
    data.write_text(data.read_text().replace("?", " then?"))
    capsys.readouterr()
    assert command(data, output, *options) == 2
    assert "other settings (pairs)" in " ".join(capsys.readouterr().err.split())
    assert (output / "model" / "model.safetensors").read_bytes() == first
    assert command(data, output, *options, "--restart") == 0
    assert (output / "model" / "model.safetensors").read_bytes() != first
