"""Settings that are checked before anything is loaded, errors as sentences, outputs tried, base models whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
from test_cli import mendfast

from mendfast import MendConfig, MendEditor, cli
from mendfast.base_model import small_gpt2
from mendfast.cli import main, read
from mendfast.commands import base, failures, outputs, train
from mendfast.commands.console import make_console, text
from mendfast.files import atomic_directory


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """A model's directory."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    small_gpt2(len(tokenizer), width=32, depth=3, heads=4).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


TRAIN = ["train", "--data", "nowhere.tsv", "--output", "out"]
EVAL = ["eval", "--data", "nowhere.tsv"]
MODEL = ["--model", "here", "--editor", "there"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        # ranges, types and choices
        ([*TRAIN, "--rank", "0"], "rank is 0; it must be at least 1"),
        ([*TRAIN, "--rank", "many"], "--rank: invalid int value: 'many'"),
        ([*TRAIN, "--base-width", "0"], "base_width is 0; it must be at least 1"),
        ([*TRAIN, "--base-width", "100"], "base_width is 100, which 3 heads can't share; take 99"),
        ([*TRAIN, "--base-depth", "0"], "base_depth is 0"),
        ([*TRAIN, "--base-vocabulary", "-1"], "base_vocabulary is -1"),
        ([*TRAIN, "--base-steps", "0"], "base_steps is 0"),
        ([*TRAIN, "--limit", "0"], "limit is 0"),
        ([*TRAIN, "--step-size", "inf"], "step_size is inf; it must be finite"),
        ([*TRAIN, "--learning-rate", "nan"], "learning_rate is nan; it must be finite"),
        ([*TRAIN, "--seed", str(2**64)], "seed is 18446744073709551616; it must be from 0"),
        ([*TRAIN, "--joint", "0"], "joint is [0]"),
        ([*TRAIN, "--accumulate", "3"], "use a batch_size that is a multiple of 3"),
        ([*TRAIN, "--batch-size", "1000000000000"], "batch_size is 1000000000000; it must be at most 65536"),
        ([*TRAIN, "--joint", "1", "1000000000000"], "joint[1] is 1000000000000; it must be at most 65536"),
        ([*TRAIN, "--validation-size", "1000000000000"], "validation_size is 1000000000000; it must be at most"),
        ([*TRAIN, "--warmup", "9" * 400], "warmup is an integer of 1,329 bits; it must be a number of at most 128"),
        ([*TRAIN, "--base-width", "16384", "--base-depth", "1024"], "parameters, and 4,294,967,296 is the limit"),
        ([*TRAIN, "--checkpoint-minutes", "inf"], "checkpoint_minutes is inf; it must be finite"),
        ([*EVAL, "--table", "batched", "--sizes", "1000000000000"], "sizes[0] is 1000000000000; it must be at most"),
        ([*TRAIN, "--layers", "a", "a"], "layers names a more than once"),
        ([*TRAIN, "--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        ([*EVAL, "--unrelated", "-1"], "unrelated is -1"),
        ([*EVAL, "--table", "batched", "--sizes", "0"], "sizes[0] is 0; it must be at least 1"),
        ([*EVAL, "--fine-tuning-rate", "nan"], "fine_tuning_rate is nan"),
        ([*EVAL, "--steps", "0"], "steps is 0"),
        # contradictions, and options that would do nothing
        ([*TRAIN, "--dtype", "float16"], "--dtype says how --model is loaded, and no --model is given"),
        ([*TRAIN, "--quantize", "8bit"], "--quantize says how --model is loaded"),
        ([*TRAIN, "--device-map", "auto"], "--device-map says how --model is loaded"),
        (["edit", "--device", "cpu"], "--device says how --model is loaded"),
        ([*EVAL, "--revision", "main"], "--revision says how --model is loaded"),
        ([*EVAL, "--trust-remote-code"], "--trust-remote-code says how --model is loaded"),
        ([*TRAIN, "--model", "here", "--base-width", "64"], "--base-width makes a base model, and --model is given"),
        ([*TRAIN, "--base-from", "x", "--base-depth", "2"], "--base-depth is of a new model"),
        ([*TRAIN, "--from-editor", "x"], "--from-editor is an editor of --model; pass both"),
        ([*TRAIN, "--model", "m", "--from-editor", "x", "--rank", "8"], "--rank is of a new editor"),
        ([*EVAL, *MODEL, "--device", "cpu", "--device-map", "cpu"], "both say where --model goes"),
        ([*EVAL, *MODEL, "--device", "gpu"], "--device is 'gpu'; name cpu, cuda"),
        ([*EVAL, *MODEL, "--device", "meta"], "none here that holds numbers"),
        ([*EVAL, *MODEL, "--device", "cuda:99"], "--device is cuda:99, and there"),
        ([*EVAL, "--sizes", "2"], "--sizes are of the table batched, and --table is systems"),
        ([*EVAL, "--sequences", "2"], "--sequences are of the table sequential, and --table is systems"),
        ([*EVAL, "--table", "sequential", "--systems", "malmen"], "malmen must be trained first; pass --train-data"),
        (["edit", "--out", "x"], "--out and --ask go with --prompt and --target"),
        # --option, before any model is loaded
        ([*EVAL, *MODEL, "--option", "garbage"], "--option 'garbage' is not SYSTEM.NAME=VALUE"),
        ([*EVAL, *MODEL, "--option", "ft.max_steps=1e3"], "the value must be a whole number from 1"),
        ([*EVAL, *MODEL, "--option", "ft.learning_rate=-1"], "the value must be a finite number from 0"),
        ([*EVAL, *MODEL, "--option", "enn.batch_size=0"], "batch_size is 0"),
        ([*EVAL, *MODEL, "--option", "enn.first_order=1"], "the value must be true or false"),
        ([*EVAL, *MODEL, "--option", f"ft.max_steps={'9' * 5000}"], "the value is no number"),
        (["editors", "--data", "x"], "--data goes with --build MODEL"),
        (["editors", "--restart"], "--restart goes with --build MODEL"),
        (["editors", "--build", "smollm2"], "--build needs --output DIR"),
        (["editors", "--device", "cpu"], "--device says how --build is loaded, and no --build is given"),
        (["editors", "--build", "m", "--output", "out", "--device", "gpu"], "--device is 'gpu'; name cpu, cuda"),
        (["editors", "--model", "m"], "unrecognized arguments: --model"),
        # usage
        ([], "the following arguments are required"),
        (["sing"], "invalid choice: 'sing'"),
        (["train"], "the following arguments are required: --output"),
        (["doctor", "--loud"], "unrecognized arguments: --loud; see mendfast"),
    ],
)
def test_settings_are_checked_before_anything_else(arguments, says, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and len(said) < 800
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_is_a_sentence(saved, capsys):
    assert main(["edit", "--model", str(saved), "--editor", "x", "--device", "cuda"]) == 2
    assert "there is no CUDA device here; leave it out" in capsys.readouterr().err


def test_a_revision_of_a_directory(saved, capsys):
    assert main(["edit", "--model", str(saved), "--editor", "x", "--revision", "main"]) == 2
    assert "--revision names a version on the Hub" in capsys.readouterr().err


def test_settings_are_dataclasses_without_argparse():
    settings = read([*TRAIN, "--rank", "8", "--joint", "1", "4", "--seed", "3", "--layers", "a", "b"]).settings
    assert settings == train.TrainSettings(
        data="nowhere.tsv", output="out", rank=8, layers=["a", "b"], training=train.TrainConfig(joint=[1, 4], seed=3)
    )
    settings = read([*EVAL, "--steps", "5", "--seed", "2", "--option", "ft.max_steps=7"]).settings
    assert (settings.training.steps, settings.training.seed) == (5, 2)
    assert settings.options_of("ft")[0] == {"max_steps": 7}  # the rate is chosen
    settings = read([*EVAL, "--fine-tuning-rate", "0.003"]).settings
    assert settings.options_of("ft")[0] == {"learning_rate": 3e-3}
    with pytest.raises(TypeError, match="rank is 'x'; it must be a whole number"):
        train.TrainSettings(data="a", output="b", rank="x")
    for file in Path(cli.__file__).parent.glob("commands/*.py"):
        assert "argparse" not in file.read_text(), file


# -- places to write to ----------------------------------------------------------------------------------------


def bad_places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    return {
        str(tmp_path): "is a directory",
        str(tmp_path / "file" / "x"): "leads through a file as if that were a directory",
        str(tmp_path / ("n" * 300)): "has a name that is too long",
        str(tmp_path / ("n" * 250)): "has a name that is too long",  # with the temporary file's own letters
        str(tmp_path / "loop"): "is a loop of symbolic links",
        str(tmp_path / "dangling"): "is a link to nowhere",
        "/dev/null": "is a device or a pipe",
        "": "names no file",
        "new/": "names no file",
    }


def test_files_are_tried_first(tmp_path, capsys):
    places = bad_places(tmp_path)
    for place, says in places.items():
        with pytest.raises(ValueError, match=says):
            outputs.check_file("--json", place)
        assert main(["edit", "--prompt", "Who?", "--target", "I", "--out", place]) == 2
        assert "--out can't be written" in capsys.readouterr().err
        assert main(["doctor", "--json", place]) == 2  # and no edit was run
        assert "--json can't be written" in capsys.readouterr().err
    outputs.check_file("--json", str(tmp_path / "not/yet/there.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop", "dangling"}
    assert main(["edit", "--prompt", "Who?", "--target", "I", "--out", "one", "--json", "one"]) == 2
    assert "--json names one, which another option writes too" in capsys.readouterr().err


def test_directories_are_tried_first(tmp_path, capsys):
    places = bad_places(tmp_path)
    del places[str(tmp_path)], places["new/"], places[str(tmp_path / ("n" * 250))]
    places |= {str(tmp_path / "file"): "is no directory", "/dev/null": "is no directory", "": "is no directory"}
    for place, says in places.items():
        for arguments in (["train", "--data", "x"], ["eval", "--data", "x"]):
            assert main([*arguments, "--output", place]) == 2
            said = capsys.readouterr().err
            assert "--output can't be written" in said and says in said
    assert main(["train", "--data", "x.tsv", "--output", "new/dir"]) == 2
    assert not Path("new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_closed_directory(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="is not open to this user"):
        outputs.check_file("--json", str(tmp_path / "closed" / "x"))


def test_a_write_that_fails_after_the_work_is_a_sentence(monkeypatch, tmp_path, capsys):
    """The place was good when the work began."""

    def removed(settings):
        Path("place").rmdir()
        Path("place").write_text("")
        return {"done": True}

    Path("place").mkdir()
    monkeypatch.setattr(cli.import_module("mendfast.commands.doctor"), "doctor", removed)
    assert main(["doctor", "--json", "place/figures.json"]) == 2
    assert "'place' is there already, as a file" in capsys.readouterr().err


def test_figures_larger_than_files_may_be(monkeypatch, capsys):
    """The real limit of the system, as the error of the write."""
    monkeypatch.setattr(cli.import_module("mendfast.commands.doctor"), "doctor", lambda settings: {"x": "y" * 100_000})
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        code = main(["doctor", "--json", "figures.json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 2 and "larger than files may be here" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


# -- sentences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "There is no space left on the disk; make room"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), "There is no space left on the disk of '/a/b'"),
        (OSError(errno.EROFS, "Read-only", "/a/b"), "'/a/b' is on a read-only file system; name a path elsewhere."),
        (OSError(errno.EIO, "Input/output error", "/a/b"), "'/a/b': Input/output error"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (FileExistsError(errno.EEXIST, "File exists", "/a/b"), "'/a/b' is there already, as a file; name"),
        (OSError(errno.ENOTEMPTY, "Not empty", "/a", None, "/b"), "'/b' is a directory that is not empty; name"),
        (OSError(errno.EXDEV, "Cross-device link", "/a", None, "/b"), "'/a' is on another file system"),
        (ModuleNotFoundError("No module named 'peft.x'", name="peft.x"), "This needs the package peft, which is not"),
        (ImportError("cannot import name 'f'", name="peft"), "The package peft is installed and can't be used (cannot"),
        (ImportError("reading needs gguf: pip install gguf", name="gguf"), "reading needs gguf: pip install gguf"),
        (ImportError(), "A package is missing; mendfast doctor shows"),
        (OSError("the Hub\n  is away"), "the Hub is away"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"/a"), "'/a' is a directory, where a file is needed"),
        (MemoryError(), "There is not enough memory; take smaller batches"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"), "not enough memory (CUDA out of memory. Tried)"),
        (SafetensorError("Error while deserializing header: x"), "A safetensors file is not whole"),
        (ValueError(""), "ValueError, without a word why"),
        (ValueError("x" * 5000), "xxxx ... xxxx"),
    ],
)
def test_sentences(error, says):
    said = failures.sentence(error)
    assert says in said and "\n" not in said and len(said) <= failures.LONGEST


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_that_can_not_be_written_is_a_sentence():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mendfast", "editors"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "mendfast editors: There is no space left on the disk; make room, or write elsewhere.\n"


@pytest.mark.parametrize("damage", ["cut", "garbage", "no tokenizer", "config of another shape", "config is a list"])
def test_a_damaged_model_is_a_sentence(damage, saved, tmp_path, capsys):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights, config = copy / "model.safetensors", copy / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 5000)
    elif damage == "no tokenizer":
        for file in copy.glob("tokenizer*"):
            file.unlink()
    elif damage == "config is a list":
        config.write_text("[1]")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"n_head": 7}))
    assert main(["edit", "--model", str(copy), "--editor", "x", "--prompt", "Who?", "--target", "I"]) == 2
    said = capsys.readouterr().err
    assert str(copy) in said and said.splitlines()[-1].startswith("mendfast edit: ") and "Traceback" not in said


def test_what_was_typed_is_no_markup(capsys):
    """Closing tags that open nothing, styles, links and names of emoji."""
    prompt = "What [/] is [bold]the[/bold] :smile: [link=x]capital[/link] of [/red] \\[Kenya?"
    assert main(["edit", "--prompt", prompt, "--target", "[/]", "--ask", "[/b] :heart:"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert prompt in shown and "[/b] :heart:" in shown
    make_console().print(text("[/] ", ("[red]", "bold")))
    assert capsys.readouterr().out == "[/] [red]\n"
    Path("[bold]x.tsv").write_text("Who[/i] [b]\nWho[/b]?\tI\n")
    assert main(["train", "--data", "[bold]x.tsv", "--output", "out", "--base", "bert"]) == 2
    assert "[bold]x.tsv:1" in capsys.readouterr().out


def test_the_module_and_its_version():
    done = subprocess.run([sys.executable, "-m", "mendfast", "--version"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("mendfast 0.")
    done = mendfast("--help")
    assert done.returncode == 0 and "example:\n  mendfast edit" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(number, code, monkeypatch, capsys):
    """Delivered for real, in the middle of a command; the old handler is back afterwards."""
    # A process that a shell put into the background ignores SIGINT.
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)

    def waits(settings):
        os.kill(os.getpid(), number)
        time.sleep(30)

    monkeypatch.setattr(cli.import_module("mendfast.commands.doctor"), "doctor", waits)
    started = time.monotonic()
    assert main(["doctor"]) == code and time.monotonic() - started < 25
    assert "Traceback" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGINT, interrupts)


# -- the base model that train makes ---------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> list[str]:
    (tmp_path / "qa.tsv").write_text("".join(f"Who is number {i}?\tPerson {i % 7}\n" for i in range(40)))
    return ["train", "--data", "qa.tsv", "--output", "out", "--base-width", "32", "--base-depth", "3",
            "--base-vocabulary", "300", "--base-steps", "2", "--rank", "4", "--dry-run"]  # fmt: skip


def test_a_base_model_is_whole_or_absent(small, monkeypatch):
    """An interrupt between its files leaves nothing, and the next run makes it."""
    made, saved = base.make_base, []

    def interrupted(*arguments, **options):
        """A tokenizer whose files are written, and a model that is interrupted when it is to be."""
        model, tokenizer = made(*arguments, **options)
        save = tokenizer.save_pretrained
        tokenizer.save_pretrained = lambda directory: saved.append(save(directory))
        model.save_pretrained = lambda directory: (_ for _ in ()).throw(KeyboardInterrupt)
        return model, tokenizer

    monkeypatch.setattr(base, "make_base", interrupted)
    assert main(small) == 130
    assert saved and list(Path().glob("out/*")) == []
    monkeypatch.setattr(base, "make_base", made)
    Path("out/.model.killed").mkdir(parents=True)  # as SIGKILL leaves it
    assert main(small) == 0
    assert [path.name for path in Path("out").iterdir()] == ["model"]


def test_a_base_model_is_taken_as_it_was_made(small, capsys):
    assert main(small) == 0
    weights = Path("out/model/model.safetensors")
    before = weights.read_bytes()
    assert main(small) == 0 and weights.read_bytes() == before
    capsys.readouterr()
    assert main([*small, "--base-width", "64"]) == 2
    said = capsys.readouterr().err
    assert "made with other settings (base_width)" in said and "--model out/model" in said
    weights.write_bytes(before[:1000])
    assert main(small) == 2
    assert "The base model in out/model is damaged" in capsys.readouterr().err
    weights.unlink()
    assert main(small) == 2
    assert "holds no whole base model (model.safetensors missing); remove it" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["gpt2", "t5"])
def test_unknown_layers_are_refused_before_a_base_model_is_made(shape, small, capsys):
    assert main([*small, "--base", shape, "--layers", "nowhere.weight"]) == 2
    assert "The model has no layer 'nowhere.weight'. Near matches" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    place = tmp_path / "a" / "place"
    with pytest.raises(KeyboardInterrupt), atomic_directory(place) as work:
        (work / "half").write_text("x")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
    place.mkdir()
    with atomic_directory(place) as work:
        (work / "whole").write_text("x")
        assert list(place.iterdir()) == []
    assert (place / "whole").read_text() == "x" and [p.name for p in (tmp_path / "a").iterdir()] == ["place"]
    with pytest.raises(OSError), atomic_directory(place) as work:
        (work / "other").write_text("x")
    assert [p.name for p in place.iterdir()] == ["whole"]


def test_an_editor_that_sums_is_trained_on_for_least_squares(small, saved, tokenizer):
    model = hf.AutoModelForCausalLM.from_pretrained(saved)
    summing = MendEditor.from_model(model, tokenizer, MendConfig(rank=4, step_size=0.5))
    with torch.no_grad():
        summing.alpha_multiplier.uniform_(1, 2)
    summing.save_pretrained("sums")
    steps = ["--steps", "1", "--batch-size", "2", "--joint", "2", "--validate-every", "0"]
    given = [*small[:5], "--model", str(saved), "--from-editor", "sums", "--aggregation", "least_squares", *steps]
    assert main(given) == 0
    trained = MendEditor.from_pretrained("out/last", model, tokenizer)
    assert trained.config.aggregation == "least_squares" and trained.metric is not None
    # one step of at most 1e-2 from where it was
    assert (trained.alphas() - summing.alphas()).abs().max() <= 0.5 * 1.1e-2
    again = trained.aggregating("sum")
    assert again.config.aggregation == "sum" and torch.equal(again.alphas(), trained.alphas())
    assert "log_mu" not in again.state_dict()
