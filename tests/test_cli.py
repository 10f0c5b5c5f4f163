"""The command line, run as a person runs it, on the shipped demo model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from make_qa import write
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mendfast import Edit, MendEditor
from mendfast.base_model import small_bert, train_wordpiece
from mendfast.cli import VERBS, main
from mendfast.commands import demo as run
from mendfast.demo import build
from mendfast.generation import answer


def mendfast(*arguments: str, typed: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mendfast.cli", *map(str, arguments)],
        input=typed, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("command", list(VERBS))
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and f"example:\n  mendfast {command}" in capsys.readouterr().out


def test_a_user_error_ends_the_process_with_2():
    done = mendfast("edit", "--prompt", "Who?")
    assert done.returncode == 2 and "Pass both" in done.stderr and "Traceback" not in done.stderr


def test_edit_saves_what_it_shows(tmp_path):
    case = run.cases(1, seed=3)[0]
    out, figures = tmp_path / "fact.safetensors", tmp_path / "edit.json"
    done = mendfast("edit", "--prompt", case.question, "--target", case.target, "--out", out, "--json", figures)
    assert done.returncode == 0, done.stderr
    shown = json.loads(figures.read_text())
    edit, editor = Edit.load(out), build.load()
    assert edit.requests == ((case.question, case.target),)
    assert answer(editor, [case.question]) == shown["before"]
    with edit.attached(editor.model):
        assert answer(editor, [case.question]) == shown["after"]
    assert shown["before"] != shown["after"]


def test_edits_of_a_file_are_made_at_once_and_kept_in_a_memory(tmp_path, capsys):
    """The life of a memory on the command line: a file of edits, one more, the list, one taken out, one file."""
    data, memory, figures = tmp_path / "facts.tsv", tmp_path / "facts.safetensors", tmp_path / "figures.json"
    kenya, france = "What is the capital of Kenya?", "What is the capital of France?"
    data.write_text(f"{kenya}\tOslo\n{france}\tRome\n")

    def edit(*arguments: str) -> dict:
        assert main(["edit", *arguments, "--json", str(figures)]) == 0, capsys.readouterr().err
        return json.loads(figures.read_text())

    at_once = edit("--data", str(data), "--out", str(tmp_path / "both.safetensors"))
    assert at_once["after"] == ["Oslo", "Rome"] != at_once["before"]
    assert len(Edit.load(tmp_path / "both.safetensors").requests) == 2
    assert edit("--data", str(data), "--memory", str(memory))["edits"] == 2
    kept = edit("--memory", str(memory), "--prompt", "What is the capital of Peru?", "--target", "Cairo")
    assert kept["edits"] == len(kept["keys"]) == 3
    listed = edit("--memory", str(memory), "--list")["edits"]
    assert list(listed) == kept["keys"] and listed[kept["keys"][0]] == [kenya, "Oslo"]
    left = edit("--memory", str(memory), "--remove", kenya, "--out", str(tmp_path / "left.safetensors"))
    assert left["keys"] == kept["keys"][1:]
    assert [request.prompt for request in Edit.load(tmp_path / "left.safetensors").requests][0] == france
    before = memory.read_bytes()
    assert main(["edit", "--memory", str(memory), "--remove", "nothing"]) == 2 and memory.read_bytes() == before
    assert "no key 'nothing'" in capsys.readouterr().err


def test_a_file_of_every_format(tmp_path, capsys):
    """One's own, EasyEdit's, zsRE's, KILT's and CounterFact's records in one file, and two broken lines."""
    rewrite = {"prompt": "What is the capital of {}?", "subject": "Norway", "target_new": {"str": "Rome"}}
    records = [
        {"prompt": "What is the capital of Kenya?", "target": "Oslo"},
        {"prompt": "What is the capital of France?", "target_new": "Cairo", "ground_truth": "Paris"},
        {"src": "What is the capital of Peru?", "alt": "Rome", "answers": ["Lima"]},
        {"input": "What is the capital of Japan?", "output": [{"answer": "Tokyo"}], "alternatives": ["Oslo"]},
        {"requested_rewrite": rewrite},
    ]
    data, figures = tmp_path / "facts.jsonl", tmp_path / "figures.json"
    lines = [json.dumps(record) for record in [*records, {"prompt": "word " * 200, "target": "Oslo"}]]
    data.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]))
    memory = tmp_path / "facts.safetensors"
    assert main(["edit", "--data", str(data), "--memory", str(memory), "--json", str(figures)]) == 0
    shown, found = " ".join(capsys.readouterr().out.split()), json.loads(figures.read_text())
    assert found["edits"] == 5 and len(found["before"]) == len(found["after"]) == 5
    assert found["edit_success"]["before"] < found["edit_success"]["after"]
    assert f"Of 5 requests the model answers {found['edit_success']['before']:.0%} before" in shown
    for line in (3, 7):
        assert f"facts.jsonl:{line}" in shown.replace(" ", "")
        assert any(problem.startswith(f"{data}:{line}: ") for problem in found["problems"])
    for words in ("wanted", "before", "after", "Oslo"):
        assert words in shown


def test_interactive(tmp_path):
    case = run.cases(1, seed=3)[0]
    good, empty = ["edit", case.question, case.target], ["edit", case.question, " "]
    typed = [f"? {case.question}", *good, *empty, f"save {tmp_path}/a.safetensors", "undo", "undo", "quit"]
    done = mendfast("edit", typed="\n".join(typed))
    assert done.returncode == 0, done.stderr
    assert "The target is" in done.stdout and "saved" in done.stdout and "0 edits left" in done.stdout
    assert "There is no edit to take out" in done.stdout
    assert Edit.load(tmp_path / "a.safetensors").requests == ((case.question, case.target),)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["edit", "--prompt", "Who?"], "Pass both --prompt and --target"),
        (["edit", "--prompt", "Who?", "--target", "  "], "The target is '  '"),
        (["edit", "--prompt", "word " * 200, "--target", "Oslo"], "the limit is 64"),
        (["edit", "--editor", "nowhere"], "Pass both --model and --editor"),
        (["edit", "--model", "./nowhere", "--editor", "x"], "is no model here"),
        (["demo", "--assets", "nowhere"], "mendfast demo --retrain"),
        (["train", "--data", "nowhere.tsv", "--output", "x"], "nowhere.tsv"),
        (["eval", "--data", "nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_train_and_eval(tmp_path):
    """A small base model, an editor, a dry run, and an evaluation with all systems."""
    data, output = tmp_path / "qa.tsv", tmp_path / "run"
    write(data)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:80]) + "broken line\n")
    small = ["--data", data, "--output", output, "--base-width", 32, "--base-depth", 3, "--base-vocabulary", 320,
             "--base-steps", 30, "--rank", 8, "--steps", 4, "--validate-every", 2]  # fmt: skip
    dry = mendfast("train", *small, "--dry-run")
    assert dry.returncode == 0 and "parameters" in dry.stdout, dry.stderr
    assert not (output / "last").exists()
    figures = tmp_path / "train.json"
    done = mendfast("train", *small, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert json.loads(figures.read_text())["step"] == 4
    assert "qa.tsv:81" in done.stdout
    scores = tmp_path / "eval.json"
    done = mendfast("eval", "--model", output / "model", "--editor", output / "best", "--data", data, "--known", data,
                    "--limit", 5, "--unrelated", 8, "--json", scores)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(scores.read_text())
    untrained = ["ultraedit", "ft", "ft_one_layer", "ft_breadth_first", "lora", "in_context"]  # and need no subject
    assert [row["system"] for row in result["rows"]] == ["mend", *untrained, "identity"]
    assert all(row["measured"] == 5 for row in result["rows"])


def test_training_through_least_squares(tmp_path):
    """What must stay is gathered before training, and saved with the editor."""
    data, output = tmp_path / "qa.tsv", tmp_path / "run"
    write(data)
    arguments = ["--data", data, "--output", output, "--base-width", 32, "--base-depth", 3, "--base-vocabulary", 320,
                 "--base-steps", 20, "--rank", 8, "--steps", 2, "--batch-size", 4, "--joint", 1, 4,
                 "--validate-every", 0, "--aggregation", "least_squares"]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    editor = MendEditor.from_pretrained(output / "last", model)
    assert editor.config.aggregation == "least_squares" and editor.metric.tokens > 0


def test_doctor(tmp_path):
    done = mendfast("doctor", "--json", tmp_path / "doctor.json")
    assert done.returncode == 0, done.stderr
    findings = json.loads((tmp_path / "doctor.json").read_text())
    assert findings["works"]
    assert {"editor_mlp", "rank1_update_", "lowrank_linear", "running_stats_", "kl_divergence", "token_nll"} <= {
        row["op"] for row in findings["ops"]
    }


@pytest.mark.parametrize("task", ["fact_checking", "generation"])
def test_train_serves_the_other_tasks(task, tmp_path):
    """A base model of the task's kind, an editor for it, and an evaluation of both."""
    data = tmp_path / "data.txt"
    data.write_text("\n".join(f"{word} went out to see the world and " * 12 for word in "she he it we they".split()))
    source = "world:train" if task == "fact_checking" else data
    small = ["--task", task, "--data", source, "--limit", 40, "--base-width", 32, "--base-depth", 2,
             "--base-vocabulary", 300, "--base-steps", 3, "--rank", 4, "--steps", 2, "--batch-size", 2,
             "--validation-size", 2]  # fmt: skip
    assert main(["train", *map(str, small), "--output", str(tmp_path / "run")]) == 0
    scores = tmp_path / "eval.json"
    asked = ["--task", task, "--model", tmp_path / "run/model", "--editor", tmp_path / "run/last", "--data", source,
             "--limit", 2, "--unrelated", 2, "--systems", "mend", "ft", "--json", scores]  # fmt: skip
    assert main(["eval", *map(str, asked)]) == 0
    assert {row["system"] for row in json.loads(scores.read_text())["rows"]} == {"mend", "ft"}


def test_train_on_a_pretrained_base(tmp_path):
    """--base-from: its weights are where training starts, and a head is added where it has none."""
    torch.manual_seed(0)
    tokenizer = train_wordpiece(["The capital of France is Paris."] * 9, 100)
    encoder = small_bert(len(tokenizer), width=32, depth=2, heads=1).bert
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    arguments = ["--task", "fact_checking", "--data", "world:train", "--limit", 20, "--base-steps", 1, "--rank", 4,
                 "--steps", 1, "--batch-size", 2, "--validation-size", 2, "--base-from", tmp_path / "encoder",
                 "--output", tmp_path / "run"]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    before, after = encoder.encoder.layer[0].output.dense.weight, trained.bert.encoder.layer[0].output.dense.weight
    assert trained.config.num_labels == 1
    assert 0 < (after - before).abs().max() < 1e-2
