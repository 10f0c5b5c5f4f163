"""What training survives: signals, NaN, a second training beside it, other settings and data on resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from test_chat import chatty  # noqa: F401
from test_training import facts, make

from mendfast import MendConfig, MendEditor
from mendfast.base_model import small_gpt2, train_tokenizer
from mendfast.cli import main
from mendfast.commands import editor_texts, editors
from mendfast.files import read_tensors, write_tensors
from mendfast.metric import Metric
from mendfast.training import FactSampler, FormSampler, TrainConfig, Trainer, TrainingError
from mendfast.training.lock import NAME, Occupied, occupied

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Terminated(KeyboardInterrupt):
    pass


@pytest.fixture(scope="module")
def base():
    """A model that knows nothing: what a run survives does not depend on what it learns."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([w for item in facts() for w in item.wordings], 320)
    return small_gpt2(len(tokenizer), width=32, depth=3, heads=4).eval(), tokenizer


@pytest.fixture
def handlers():
    """Python's own handler of Ctrl-C, and for SIGTERM one that raises, as the command line has."""
    before = [signal.getsignal(number) for number in SIGNALS]

    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    yield signal.default_int_handler, terminate
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def trainer(base, output, *, sampler=None, validation=None, editor=None, **config) -> Trainer:
    made, settings = make(base, **{"checkpoint_every": 1000, "validate_every": 3, **config})
    return Trainer(editor or made, sampler or FactSampler(facts()), settings, output=output,
                   validation=validation or FactSampler(facts(), seed=5), progress=False)  # fmt: skip


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Trainer:
    """A run that was left alone."""
    run = trainer(base, tmp_path_factory.mktemp("whole"))
    run.run()
    return run


def at_step(run: Trainer, step: int, do) -> None:
    """Call ``do`` in the middle of the step."""
    means = run._means

    def then(draw, joint, *rest, **options):
        if run.step == step and options:
            do()
        return means(draw, joint, *rest, **options)

    run._means = then


def check_same(one: Trainer, two: Trainer) -> None:
    for (name, a), b in zip(one.editor.state_dict().items(), two.editor.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for file in ("metrics.jsonl", "last/editor.safetensors", "last/checkpoint.safetensors", "best/editor.safetensors"):
        assert (one.output / file).read_bytes() == (two.output / file).read_bytes(), file


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_loses_nothing(base, whole, tmp_path, handlers, caplog, number, raised):
    """The step that it strikes is finished and saved, the earlier handler has its turn, and a resume goes on there."""
    half = trainer(base, tmp_path / "half")
    at_step(half, 3, lambda: signal.raise_signal(number))
    with pytest.raises(raised):
        half.run()
    assert f"{number.name} after step 4 of 6; everything is in {tmp_path / 'half/last'}" in caplog.text
    assert tuple(map(signal.getsignal, SIGNALS)) == handlers
    rest = trainer(base, tmp_path / "half")
    assert rest.resume() and rest.step == 4
    rest.run()
    check_same(whole, rest)


def test_terminated_again_and_again(base, whole, tmp_path, handlers):
    """At random moments, also while the run starts and ends."""
    rng, count, ended = random.Random(0), 0, False
    while not ended:
        timer = threading.Timer(rng.uniform(0, 0.05 * (count + 2)), os.kill, (os.getpid(), signal.SIGTERM))
        try:
            try:
                run = trainer(base, tmp_path)
                run.resume()
                timer.start()
                run.run()
                ended = True
            finally:
                timer.cancel()
                timer.join()
        except Terminated:
            count, ended = count + 1, False
    assert count > 0
    check_same(whole, run)


def test_a_second_interrupt_stops_at_once(base, tmp_path, handlers):
    run = trainer(base, tmp_path)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # again and again, as some clusters do
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the step went on")

    at_step(run, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.step == 3 and not (tmp_path / "last").exists() and tuple(map(signal.getsignal, SIGNALS)) == handlers


def test_a_handler_that_returns_lets_the_run_go_on(base, tmp_path, handlers):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append((number, os.listdir(tmp_path / "last"))))
    run = trainer(base, tmp_path)
    at_step(run, 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert run.run()["step"] == 6
    ((number, files),) = heard
    assert number == signal.SIGTERM and "checkpoint.safetensors" in files


def test_a_signal_during_the_last_save_is_not_lost(base, tmp_path, handlers):
    run = trainer(base, tmp_path, steps=1)
    save = run.save
    run.save = lambda: (signal.raise_signal(signal.SIGTERM), save())[1]
    with pytest.raises(Terminated):
        run.run()
    again = trainer(base, tmp_path, steps=1)
    assert again.resume() and again.step == 1


def test_without_a_handler_the_process_ends_in_order(base, tmp_path, handlers):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run = trainer(base, tmp_path)
    at_step(run, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run.run()
    assert ended.value.code == 143 and run.step == 2
    assert (tmp_path / "last/checkpoint.safetensors").is_file() and not (tmp_path / NAME).exists()


def test_other_threads_and_runs_without_output_leave_signals_alone(base, tmp_path, handlers):
    seen = []
    for output in (tmp_path, None):
        run = trainer(base, output, steps=1)
        at_step(run, 0, lambda: seen.append(tuple(map(signal.getsignal, SIGNALS))))
        if output is None:
            run.run()
        else:
            thread = threading.Thread(target=run.run)
            thread.start()
            thread.join()
    assert seen == [handlers, handlers]


SMALL = ("--base-width", "32", "--base-depth", "3", "--base-vocabulary", "320", "--base-steps", "2", "--rank", "8",
         "--batch-size", "2", "--validate-every", "0", "--checkpoint-every", "1000000")  # fmt: skip


def command(data, output, *more: str) -> int:
    return main(["train", "--data", str(data), "--output", str(output), *SMALL, *more])


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "qa.tsv"
    path.write_text("".join(f"{item.wordings[0]}\t{item.answer}\n" for item in facts()))
    return path


def test_the_command_says_where_it_goes_on(data, tmp_path, caplog, capsys):
    output = tmp_path / "run"
    metrics = output / "metrics.jsonl"

    def terminate():
        deadline = time.monotonic() + 60
        while not (metrics.is_file() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watch = threading.Thread(target=terminate)
    watch.start()
    assert command(data, output, "--steps", "100000") == 143
    watch.join()
    done = metrics.read_text().count("\n")
    assert f"SIGTERM after step {done} of 100000; everything is in {output / 'last'}" in caplog.text
    assert not (output / NAME).exists()
    assert command(data, output, "--steps", str(done + 2)) == 0
    assert f"Going on from step {done}." in capsys.readouterr().out
    assert command(data, output, "--steps", "2", "--batch-size", "4") == 2
    assert "batch_size was 2 and is 4" in " ".join(capsys.readouterr().err.split())
    assert command(data, output, "--steps", "2", "--batch-size", "4", "--restart") == 0
    assert metrics.read_text().count("\n") == 2


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "saves"), [(1e-9, 6), (10, 1)])
def test_checkpoints_by_time(base, tmp_path, minutes, saves):
    run, steps = trainer(base, tmp_path, checkpoint_minutes=minutes), []
    save = run.save
    run.save = lambda: (steps.append(run.step), save())[1]
    run.run()
    assert sorted(set(steps)) == list(range(7 - saves, 7))


def test_only_finite_parameters_are_saved(base, tmp_path):
    """Parameters that become infinite in step 4: the checkpoint of step 3 stays, and the run ends with an error."""
    run = trainer(base, tmp_path, steps=5, checkpoint_every=1)
    update = run._update

    def broken():
        update()
        if run.step == 3:
            with torch.no_grad():
                next(run.editor.parameters()).view(-1)[0] = float("inf")

    run._update = broken
    with pytest.raises(TrainingError, match=r"step 5 are not finite.*checkpoint.safetensors is the last good"):
        run.run()
    rest = trainer(base, tmp_path, steps=5, checkpoint_every=1)
    assert rest.resume() and rest.step == 3
    assert all(tensor.isfinite().all() for tensor in rest.editor.state_dict().values())


# -- one training per directory ------------------------------------------------------------------------------


def test_two_trainings_in_one_directory(base, tmp_path, data, capsys):
    run, said = trainer(base, tmp_path / "run"), []

    def others():
        try:
            trainer(base, tmp_path / "run").run()
        except Occupied as error:
            said.append(str(error))
        assert command(data, tmp_path / "run") == 2
        said.append(capsys.readouterr().err)

    def start_others():
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()

    at_step(run, 1, start_others)
    run.run()
    assert len(said) == 2
    for text in said:
        assert f"Another training is at work in {tmp_path / 'run'} (process {os.getpid()} on " in text
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run" / NAME).exists()
    lines = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 7))


HOLD = """
import sys, time
from mendfast.training.lock import occupied
with occupied(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(Occupied, match=rf"process {holder.pid} on .*Wait for it, end it, or choose another"):
        with occupied(tmp_path):
            pass
    holder.kill()
    holder.wait()
    assert (tmp_path / NAME).is_file()
    with occupied(tmp_path), occupied(tmp_path):  # what holds it may ask again
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_locks_that_say_nothing_or_are_of_another_host(tmp_path, monkeypatch):
    for content in (b"", b"{", b"[]", b'{"pid": "x"}', b"\xff" * 9000):
        (tmp_path / NAME).write_bytes(content)
        with occupied(tmp_path):
            pass
    (tmp_path / NAME).write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(Occupied, match=f"process 1 on elsewhere.*if it is gone, remove .*{NAME}"), occupied(tmp_path):
        pass


def test_where_files_can_not_be_locked_the_process_id_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("mendfast.training.lock.fcntl", None)
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / NAME).write_text(json.dumps({"pid": other.pid}))
        with pytest.raises(Occupied), occupied(tmp_path):
            pass
        other.kill()
    with occupied(tmp_path):
        pass


# -- what a resume takes -------------------------------------------------------------------------------------


def changed_editor(base, **changes) -> MendEditor:
    config = MendConfig(rank=32, step_size=2e-3, scale_v=True, append_eos=True)
    return MendEditor.from_model(*base, replace(config, **changes))


def other_model(base):
    torch.manual_seed(1)
    return small_gpt2(len(base[1]), width=32, depth=3, heads=4).eval(), base[1]


LAYERS = [f"transformer.h.{i}.mlp.{name}.weight" for i in (1, 2) for name in ("c_fc", "c_proj")]


@pytest.fixture(scope="module")
def one_step(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("one_step")
    trainer(base, output, steps=1, editor=changed_editor(base, layers=LAYERS)).run()
    return output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda base: {"batch_size": 8}, "batch_size was 4 and is 8"),
        (lambda base: {"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
        (lambda base: {"editor": changed_editor(base, step_size=1e-3)}, "step_size was 0.002 and is 0.001"),
        (lambda base: {"editor": changed_editor(base, layers=LAYERS[::-1])}, r"layers\[0\] was .*h.1.mlp.c_fc"),
        (lambda base: {"editor": changed_editor(base, append_eos=False)}, "append_eos was True and is False"),
        (lambda base: {"editor": changed_editor(base, prompt_template="Q: {prompt}")}, "tokens of a question"),
        (lambda base: {"editor": changed_editor(other_model(base))}, "base model was"),
        (lambda base: {"sampler": FactSampler(facts()[1:])}, "training data was"),
        (lambda base: {"sampler": FactSampler(facts(), seed=1)}, "training data was"),
        (lambda base: {"sampler": FormSampler(FactSampler(facts()), forms={"plain": 1})}, "training data was"),
        (lambda base: {"validation": FactSampler(facts()[1:], seed=5)}, "validation data was"),
    ],
)
def test_a_resume_refuses_what_differs(base, one_step, change, says):
    before = {path: path.read_bytes() for path in one_step.rglob("*") if path.is_file()}
    given = {"editor": changed_editor(base, layers=LAYERS), "steps": 1, **change(base)}
    with pytest.raises(ValueError, match=f"last was trained otherwise: .*{says}.*--restart"):
        trainer(base, one_step, **given).resume()
    assert before == {path: path.read_bytes() for path in one_step.rglob("*") if path.is_file()}


def test_what_does_not_move_the_steps_may_differ(base, whole):
    free = dict(steps=9, checkpoint_every=1, checkpoint_minutes=1, validate_every=1, patience=9, cache_bytes=0)
    again = trainer(base, whole.output, checkpoint_activations=True, cache_disk_bytes=9, **free)
    assert again.resume() and again.step == 6


def test_a_restart_forgets_the_run(base, whole, tmp_path):
    output = shutil.copytree(whole.output, tmp_path / "run")
    (output / "model").mkdir()
    run = trainer(base, output, batch_size=8)
    run.restart()
    assert [path.name for path in output.iterdir()] == ["model"]
    assert not run.resume()


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on(base, whole, tmp_path):
    """As earlier versions wrote it."""
    path = shutil.copytree(whole.output, tmp_path / "run") / "last/checkpoint.safetensors"
    tensors, metadata = read_tensors(path, "checkpoint")
    del metadata["run"]
    write_tensors(path, tensors, metadata)
    assert trainer(base, tmp_path / "run", sampler=FactSampler(facts()[1:])).resume()


def test_editors_are_built_of_what_they_were_begun_with(chatty, tmp_path, monkeypatch, data):  # noqa: F811
    """The model's own words and the metric are kept beside the run, and must be of the same model and data."""
    for name, few in (("SAMPLED", 4), ("TURNS", 4), ("ANSWERED", 4), ("SAID", 8), ("PROTECTED", 8)):
        monkeypatch.setattr(editor_texts, name, few)
    torch.manual_seed(0)
    model = small_gpt2(len(chatty), width=32, depth=3, heads=2, context=256).eval()
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("\n".join("one two three four " * 12 for _ in range(4)))
    settings = TrainConfig(steps=1, batch_size=2, validate_every=0)

    def build(**changes):
        given = {"data": str(data), "text": str(text), "editor": replace(editors.EDITOR, rank=4), "training": settings}
        return editors.build(model, chatty, output, **{**given, **changes})

    build()
    metric = (output / "metric.safetensors").read_bytes()
    assert MendEditor.from_pretrained(output / "editor", model, chatty).metric.tokens > Metric.load(
        output / "metric.safetensors"
    ).tokens  # what is looked at in training is protected in the end
    text.write_text("\n".join("five six seven eight " * 12 for _ in range(4)))
    with pytest.raises(ValueError, match=r"was begun with other settings \(text\).*--restart"):
        build()
    with pytest.raises(ValueError, match="rank was 4 and is 8"):
        text.write_text("\n".join("one two three four " * 12 for _ in range(4)))
        build(editor=replace(editors.EDITOR, rank=8))
    assert (output / "metric.safetensors").read_bytes() == metric
    text.write_text("\n".join("five six seven eight " * 12 for _ in range(4)))
    build(restart=True)
    assert (output / "metric.safetensors").read_bytes() != metric
