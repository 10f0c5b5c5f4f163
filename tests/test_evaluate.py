"""mendfast eval: figures, resuming after a kill, trained systems kept, reports, and what bad rows do."""

from __future__ import annotations

import copy
import csv
import html.parser
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model
from transformers import GPT2Config, GPT2LMHeadModel

from mendfast import MendConfig, MendEditor
from mendfast.base_model import make_base
from mendfast.baselines import SYSTEMS
from mendfast.baselines.measure import measuring
from mendfast.baselines.mend import Mend, NoSharing
from mendfast.baselines.rome import Memit
from mendfast.cli import main, read
from mendfast.commands import eval_report
from mendfast.commands.evaluate import evaluate
from mendfast.commands.rates import RATES, Choice

ANSWERS = ("Paris", "Rome", "Berlin", "Madrid")
UNCERTAIN = {"seconds", "peak_bytes"}  # measured by the clock and the allocator


TOKENS = 12
"""Of each answer here."""
SOME = ("--systems", "mend", "ft", "identity")


def records(count: int = 7) -> list[dict]:
    return [
        {
            "prompt": f"What is the capital of {i}?",
            "target": ANSWERS[i % 4],
            "answers": [ANSWERS[(i + 1) % 4]],
            "subject": str(i),
            "rephrasings": [f"The capital of {i} <b>is</b>", f"Of {i}, what is the capital?"],
            "portability": [["Where is it?", ANSWERS[i % 3]]],
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    return path


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=4)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(autouse=True)
def few_answers_are_shown(monkeypatch):
    """A random model's answers never end."""
    monkeypatch.setattr("mendfast.commands.evaluate.SHOWN", 2)
    monkeypatch.setitem(measuring.__kwdefaults__, "max_new_tokens", TOKENS)


@pytest.fixture
def editor(model, tokenizer):
    torch.manual_seed(0)
    return MendEditor.from_model(model, tokenizer, MendConfig(rank=4, step_size=1e-2))


def run(editor, data, *more, steps: int = 2):
    """The figures of one command."""
    small = ["--steps", steps, "--batch-size", 2, "--validate-every", 1, "--unrelated", 3, "--fine-tuning-rate", 1e-2,
             "--option", "ke.hidden=8", "--option", "ke.condition=16", "--option", "ft.max_steps=4",
             "--option", "ft_kl.max_steps=2", "--option", "ft_kl.batch_size=2", "--option", "rome.words=8",
             "--option", "memit.words=8", "--option", "rome.steps=2", "--option", "memit.steps=2"]  # fmt: skip
    return evaluate(editor, read(["eval", "--data", str(data), *map(str, [*small, *more])]).settings)


def certain(rows: list[dict]) -> list[dict]:
    return [
        row | {"figures": {name: value for name, value in row["figures"].items() if name not in UNCERTAIN}}
        for row in rows
    ]


def test_the_table_of_systems(tokenizer, data, tmp_path):
    """All of them, trained where they must be; afterwards the model has its old bits."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4)  # facts in front
    editor = MendEditor.from_model(GPT2LMHeadModel(config).eval(), tokenizer, MendConfig(rank=4, step_size=1e-2))
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    out = tmp_path / "out"
    result = run(editor, data, "--limit", 3, "--train-data", data, "--output", out)
    assert [row["system"] for row in result["rows"]] == [
        "mend", "malmen", "enn", "ke", "ultraedit", "ft", "ft_one_layer", "ft_breadth_first", "ft_kl", "lora",
        "in_context", "rome", "memit", "identity",
    ]  # fmt: skip
    assert result["left_out"] == {"mend_sum": "it is mend, whose editor sums already"}
    for row in result["rows"]:
        assert (row["k"], row["measured"], row["failed"], row["name"]) == (1, 3, 0, SYSTEMS[row["system"]].name)
        assert {"edit_success", "generality", "drawdown", "kl", "portability", "seconds"} <= set(row["figures"])
        assert all(f["low"] <= f["mean"] <= f["high"] and f["n"] == 3 for f in row["figures"].values())
    parameters = {row["system"]: row["parameters"] for row in result["rows"]}
    assert parameters["mend"] == sum(p.numel() for p in editor.parameters()) and parameters["ft"] == 0
    assert parameters["enn"] > sum(p.numel() for p in editor.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.model.state_dict().items())
    assert result["seed"] == 0 and result["edits"] == 3
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result))


def test_memit_s_weight_of_c_is_chosen_on_edits_that_have_a_subject(tokenizer, data, monkeypatch):
    """Each weight is tried; no subject was known of the validation edits once, and the first weight was taken."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4)
    editor = MendEditor.from_model(GPT2LMHeadModel(config).eval(), tokenizer, MendConfig(rank=4))
    tallies, trials = [], Choice._trials
    monkeypatch.setattr(Choice, "_trials", lambda *given: tallies.append(trials(*given)) or tallies[-1])
    (row,) = run(editor, data, "--systems", "memit", "--limit", 2, "--validation", 2)["rows"]
    assert all(len(tally.right) >= 2 for found in tallies for tally in found)
    assert row["chosen"]["trials"] == len(RATES[Memit]) and row["chosen"]["weight"] in RATES[Memit]


def test_trained_systems_are_kept(editor, data, tmp_path, monkeypatch):
    options = ("--table", "variants", "--systems", "mend", "mend_no_sharing", "--train-data", data, "--limit", 2)
    first = run(editor, data, *options, "--output", tmp_path / "out")
    monkeypatch.setattr(Mend, "fit", None)
    (tmp_path / "out" / "edits.jsonl").unlink()
    assert certain(run(editor, data, *options, "--output", tmp_path / "out")["rows"]) == certain(first["rows"])
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="mend was trained with other settings; choose another --output"):
        run(editor, data, *options, "--output", tmp_path / "out", steps=3)
    assert first["rows"][1]["name"] == NoSharing.name
    assert first["rows"][1]["parameters"] != first["rows"][0]["parameters"] > 0


def test_an_evaluation_goes_on_where_it_was_cut_off(editor, data, tmp_path, monkeypatch):
    whole = run(editor, data, *SOME)
    out, edits = tmp_path / "out", []
    edit = Mend._edited

    def counted(self, requests):
        edits.append(requests)
        if len(edits) == 5:
            raise KeyboardInterrupt
        return edit(self, requests)

    monkeypatch.setattr(Mend, "_edited", counted)
    with pytest.raises(KeyboardInterrupt):
        run(editor, data, *SOME, "--output", out)
    journal = out / "edits.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 4
    with journal.open("a") as file:
        file.write('{"system": "mend", "k": 1, "gro')
    resumed = run(editor, data, *SOME, "--output", out)
    assert certain(resumed["rows"]) == certain(whole["rows"])
    assert resumed["examples"] == whole["examples"]
    assert len(edits) == 5 + 3 + 7  # MEND's last three, and the untrained editor's
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(lines) == 3 * (1 + 7)
    again = run(editor, data, *SOME, "--output", out)
    assert again["rows"] == resumed["rows"] and len(edits) == 15
    with pytest.raises(ValueError, match=r"other settings \(unrelated, seed\).*choose another --output"):
        run(editor, data, *SOME, "--output", out, "--seed", 1, "--unrelated", 2)


def test_a_killed_command_goes_on(editor, tokenizer, tmp_path, monkeypatch):
    """SIGKILL in the middle of a run of the command itself, at whatever line it has reached."""
    monkeypatch.setitem(measuring.__kwdefaults__, "max_new_tokens", 64)  # as in the other process
    editor.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    editor.save_pretrained(tmp_path / "editor")
    data = tmp_path / "edits.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records(40)))
    command = ["eval", "--model", tmp_path / "model", "--editor", tmp_path / "editor", "--data", data, "--unrelated", 3,
               "--systems", "ft", "--option", "ft.max_steps=10", "--validation", 0]  # fmt: skip
    command = [str(part) for part in command]
    out, journal = tmp_path / "out", tmp_path / "out" / "edits.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "mendfast.cli", *command, "--output", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and journal.read_bytes().count(b"\n") < 40
    assert main([*command, "--output", str(out)]) == 0
    assert main([*command, "--json", str(tmp_path / "whole.json")]) == 0
    resumed, whole = (json.loads(path.read_text()) for path in (out / "results.json", tmp_path / "whole.json"))
    (resumed,), (whole,) = certain(resumed["rows"]), certain(whole["rows"])
    assert resumed["measured"] == whole["measured"] == 40 and not whole["failed"]
    for name, figure in whole["figures"].items():
        # Another process, another alignment of its buffers: sums in another order, of some thousand float32 terms.
        assert resumed["figures"][name] == pytest.approx(figure, rel=1e-4, abs=1e-6), name


def test_simultaneous_edits(editor, data, tmp_path):
    out = tmp_path / "out"
    result = run(editor, data, "--table", "batched", "--systems", "mend", "ft", "--sizes", 1, 3, 50, "--output", out)
    assert [(row["system"], row["k"], row["measured"]) for row in result["rows"]] == [
        ("mend", 1, 7), ("ft", 1, 7), ("mend", 3, 2), ("ft", 3, 2),
    ]  # fmt: skip
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [(row["system"], row["k"]) for row in rows] == [("mend", "1"), ("ft", "1"), ("mend", "3"), ("ft", "3")]
    assert float(rows[0]["drawdown_low"]) <= float(rows[0]["drawdown_mean"]) <= float(rows[0]["drawdown_high"])
    assert "| MEND | 3 |" in (out / "table.md").read_text()
    with pytest.raises(ValueError, match=r"There are 7 edits, fewer than --sizes \[25\]"):
        run(editor, data, "--table", "batched", "--sizes", 25, "--validation", 0)


class Page(html.parser.HTMLParser):
    """Tags that are open, and the text of the cells."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_that_needs_nothing_else(editor, data, tmp_path):
    run(editor, data, *SOME, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "figures.png").read_bytes().startswith(b"\x89PNG")
    source = (tmp_path / "out" / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert [source.split(",")[0] for source in page.sources] == ["data:image/png;base64"]
    assert not re.search(r'(src|href)="?(http|/)', source) and "prefers-color-scheme:dark" in source
    for shown in ("MEND", "untrained editor", "edit success", "The capital of 0 <b>is</b>"):
        assert shown in page.text
    assert "<b>is</b>" not in source  # the data's markup is text
    assert "As published" in page.text and "0.98" in page.text


def test_published_figures_stand_apart_and_only_beside_their_task():
    rows = [{"system": key, "name": key} for key in ("mend", "identity")]
    title, header, found = eval_report.published({"table": "systems", "task": "generation", "rows": rows})
    assert found == [["mend", "0.86", "0.225"]] and header[2] == "perplexity drawdown" and "As published" in title
    assert eval_report.published({"table": "batched", "task": "qa", "rows": rows}) is None


def test_a_bad_row_is_kept_and_counted(editor, data, tmp_path, monkeypatch, capsys):
    lines = data.read_text().splitlines()
    long = json.dumps({**records(1)[0], "prompt": "word " * 100})
    already = json.dumps({**records(1)[0], "answers": ["Paris"]})
    data.write_text("\n".join([lines[0], "{broken", long, already, *lines[1:3]]))
    edit = Mend._edited

    def failing(self, requests):
        if "of 1?" in requests[0].prompt:
            raise RuntimeError("out of memory")
        return edit(self, requests)

    monkeypatch.setattr(Mend, "_edited", failing)
    result = run(editor, data, "--systems", "mend", "ft", "--output", tmp_path / "out")
    mend, ft = result["rows"]
    assert (mend["measured"], mend["failed"], mend["first_error"]) == (3, 1, "RuntimeError: out of memory")
    assert (ft["measured"], ft["failed"]) == (4, 0)
    assert (result["edits"], result["read"]) == (4, 5)
    assert [int(re.search(r":(\d+)", problem)[1]) for problem in result["problems"]] == [2, 4, 3]
    assert "is already the answer" in result["problems"][1] and "limit is 64" in result["problems"][2]
    assert "out of memory" in (tmp_path / "out" / "report.html").read_text()
    assert "1 edits could not be asked" in capsys.readouterr().out
    monkeypatch.setattr(Mend, "_edited", lambda self, requests: 1 / 0)
    with pytest.raises(ValueError, match="No edit worked with any system; the first error: ZeroDivisionError"):
        run(editor, data, "--systems", "mend")


def test_what_must_stay_is_never_what_is_edited(editor, data, monkeypatch):
    from mendfast.commands import evaluate as module

    seen, measuring = [], module.measuring

    def spied(system, requests, rephrasings, locality, portability, **options):
        seen.append((requests[0], locality))
        return measuring(system, requests, rephrasings, locality, portability, generate=False)

    monkeypatch.setattr(module, "measuring", spied)
    run(editor, data, "--systems", "ft", "--known", data)
    assert len(seen) == 7
    for (prompt, _), locality in seen:
        assert len(locality) == 3 and prompt not in dict(locality)
    known = {record["prompt"]: record["answers"][0] for record in records()}
    assert all(known[prompt] == answer for _, locality in seen for prompt, answer in locality)
    own = [{**record, "locality": [["Who?", "Rome"], ["Unknown?"]]} for record in records(2)]
    data.write_text("".join(json.dumps(record) + "\n" for record in own))
    seen.clear()
    run(editor, data, "--systems", "ft")
    assert [locality for _, locality in seen] == [[("Who?", "Rome")]] * 2


def test_without_locality_there_is_no_drawdown(editor, data, capsys):
    """Nothing to compare is a figure that is missing, and not one that is zero."""
    data.write_text(json.dumps(records(1)[0]) + "\n")
    (row,) = run(editor, data, "--systems", "ft")["rows"]
    assert row["measured"] == 1 and "edit_success" in row["figures"] and "drawdown" not in row["figures"]


def test_claims_and_running_text(editor, tmp_path):
    """The other two tasks, end to end, on small models of their own."""
    claims = [(f"Town {i} is in land {j}.", str(i == j).lower()) for i in range(4) for j in range(2)]
    path = tmp_path / "claims.tsv"
    path.write_text("".join(f"{claim}\t{label}\n" for claim, label in claims))
    bert, tokens = make_base("bert", claims, vocabulary=120, width=32, depth=2, steps=3, progress=False)
    checker = MendEditor.from_model(bert, tokens, MendConfig(rank=4))
    result = run(checker, path, "--task", "fact_checking", "--systems", "mend", "ft", "--limit", 3)
    assert [row["measured"] for row in result["rows"]] == [3, 3]
    assert all("generality" not in row["figures"] and "drawdown" in row["figures"] for row in result["rows"])
    said = {question["after"]["ft"] for edit in result["examples"] for question in edit["questions"]}
    assert said <= {"true", "false"}
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join("Paris Rome Berlin Madrid France"[i:].split() * 15) for i in (0, 6, 11)))
    result = run(editor, text, "--task", "generation", "--systems", "mend", "--output", tmp_path / "out")
    assert result["rows"][0]["measured"] > 1 and "ppl_drawdown" in result["rows"][0]["figures"]
    with pytest.raises(ValueError, match="Fact checking needs a sequence classifier"):
        run(editor, path, "--task", "fact_checking")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--systems", "roma"], "System 'roma' is unknown; choose from"),
        (["--systems", "ft", "enn"], "enn must be trained first; pass --train-data"),
        (["--table", "variants"], "mend_no_sharing.*must be trained first"),
        (["--option", "steps=3"], "is not SYSTEM.NAME=VALUE"),
        (["--option", "ft.depth=3"], "ft has no option 'depth'; it has .*max_steps"),
        (["--option", "ft.max_steps=many"], "the value is no number"),
        (["--known", "nowhere.tsv"], "There is no file nowhere.tsv"),
    ],
)
def test_bad_options_are_sentences(editor, data, options, says):
    with pytest.raises(ValueError, match=says):
        run(editor, data, *options)


def test_exit_code_2(editor, tokenizer, data, tmp_path, capsys):
    editor.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    other = make_model("llama")
    MendEditor.from_model(other, None, MendConfig(rank=4)).save_pretrained(tmp_path / "editor")
    command = ["eval", "--model", str(tmp_path / "model"), "--editor", str(tmp_path / "editor"), "--data", str(data)]
    assert main(command) == 2
    assert "is an editor for a llama model; this one is a gpt2" in capsys.readouterr().err
    data.write_text("")
    assert main(["eval", "--data", str(data)]) == 2
    assert "No question and answer was found" in capsys.readouterr().err


def test_another_editor_of_the_same_name_is_told(editor, data, tmp_path):
    options = ("--systems", "mend", "ft", "--limit", 2, "--output", tmp_path / "out")
    found = run(editor, data, *options)
    assert run(editor, data, *options)["rows"] == found["rows"]
    other = copy.deepcopy(editor)
    with torch.no_grad():
        other.alpha_multiplier[0] *= 1.001
    with pytest.raises(ValueError, match="measured of mend is of another editor .* choose another --output"):
        run(other, data, *options)
    alone = run(other, data, "--systems", "ft", *options[3:])  # which knows nothing of editors
    assert alone["rows"] == [row for row in found["rows"] if row["system"] == "ft"]
