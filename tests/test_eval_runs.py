"""mendfast eval: chosen rates, sequences killed in their midst, several processes, the harness, the pictures."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from test_evaluate import TOKENS, certain, data, editor, few_answers_are_shown, model, records, run  # noqa: F401
from transformers import GPT2Config, GPT2LMHeadModel

from mendfast import EditRequest, MendConfig, MendEditor
from mendfast.answers import contains, exact_match
from mendfast.baselines import SYSTEMS, FineTuning, UltraEdit, turns
from mendfast.baselines.measure import Before
from mendfast.baselines.turns import Turns, numbered, take
from mendfast.cli import main
from mendfast.commands import eval_page, eval_plots, eval_report
from mendfast.commands.questions import Questions
from mendfast.commands.rates import RATES, TRIALS, Choice, Tally
from mendfast.tasks.load import load_task
from mendfast.training.processes import Processes

# -- rates -------------------------------------------------------------------------------------------------


def test_rates_are_chosen_on_edits_that_are_not_measured(editor, data, tmp_path):  # noqa: F811
    options = ("--systems", "ft", "ultraedit", "--option", "ft.max_steps=8", "--limit", 3, "--validation", 2)
    found = run_unfixed(editor, data, *options, "--output", tmp_path / "out")
    for row, (kind, steps) in zip(found["rows"], ((FineTuning, "max_steps"), (UltraEdit, None)), strict=True):
        chosen = row["chosen"]
        assert chosen["learning_rate"] in RATES[kind] and chosen["edits"] == 2 and chosen["seconds"] > 0
        assert chosen["trials"] == TRIALS - (steps is not None)  # its steps are given
        assert row["measured"] == 3
    assert found["edits"] == 3
    prompts = [edit["questions"][0]["prompt"] for edit in found["examples"]]
    assert prompts == [record["prompt"] for record in records(3)][: len(prompts)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Chosen on validation edits" in page and "Chosen on" in (tmp_path / "out" / "table.md").read_text()
    again = run_unfixed(editor, data, *options, "--output", tmp_path / "out")
    assert again["rows"] == found["rows"]  # nothing is chosen anew
    off = run_unfixed(editor, data, *options[:-1], 0)
    assert all("chosen" not in row for row in off["rows"])


def run_unfixed(editor, data, *more):  # noqa: F811
    """As :func:`run`, without a rate that is given."""
    from mendfast.cli import read
    from mendfast.commands.evaluate import evaluate

    command = ["eval", "--data", str(data), "--unrelated", "3", *map(str, more)]
    return evaluate(editor, read(command).settings)


def test_the_best_rate_is_chosen(editor, data, monkeypatch):  # noqa: F811
    """By the harmonic mean of success and what stays: too small learns nothing, too large leaves nothing alone."""
    task = load_task("qa", str(data))
    choice = Choice(task.examples[:2], Questions(editor, task, unrelated=4), Processes())
    system = FineTuning(editor)
    before = Before(editor)
    scores = {1e-4: (0.1, 1.0), 3e-4: (0.5, 0.8), 1e-3: (0.5, 0.9), 3e-3: (0.4, 0.9), 1e-2: (0.0, 0.1)}
    seen = []

    def tally(system, before, groups):
        seen.append((system.learning_rate, system.max_steps))
        return Told(scores[system.learning_rate] if system.max_steps == 100 else (0.3, 1.0))

    monkeypatch.setattr(choice, "_tally", tally)
    found = choice.choose(system, before)
    assert (found["learning_rate"], found["max_steps"]) == (1e-3, 100) == (system.learning_rate, system.max_steps)
    assert seen == [*((rate, 100) for rate in RATES[FineTuning]), (1e-3, 25)]
    assert choice.choose(FineTuning(editor, 0.5), before, ("learning_rate", "max_steps")) is None
    monkeypatch.undo()
    assert choice._tally(FineTuning(editor, 0.0, 1), before, range(2)).score() == (0.0, 1.0)
    assert choice._tally(FineTuning(editor, 1e-2, 50), before, range(2)).score()[1] < 1.0


class Told(Tally):
    """A tally of one edit, whose score is given."""

    def __init__(self, score, steps=100):
        super().__init__(right=[True], steps=steps)
        self.given = [score]

    def __add__(self, other):
        added = Told(None, max(self.steps, other.steps))
        added.given = self.given + other.given
        return added

    def __radd__(self, other):
        return self

    def score(self):
        return tuple(sum(part) / len(part) for part in zip(*self.given, strict=True))


def test_of_many_edits_the_better_half_of_the_rates_goes_on(editor, data, monkeypatch):  # noqa: F811
    """All rates on a quarter of them, the better half on as many more, the better half of those on the rest."""
    task = load_task("qa", str(data))
    choice = Choice(task.examples[:4], Questions(editor, task, unrelated=4), Processes())
    seen = []

    def tally(system, before, groups):
        seen.append((system.learning_rate, system.max_steps, list(groups)))
        # what looks best on the first edit is not on all of them
        share = {1e-4: 0.1, 3e-4: 0.5, 1e-3: 0.8, 3e-3: 0.9, 1e-2: 0.0}[system.learning_rate]
        return Told((share if system.learning_rate != 3e-3 or 0 in groups else 0.2, 1.0), steps=20)

    monkeypatch.setattr(choice, "_tally", tally)
    found = choice.choose(FineTuning(editor), Before(editor))
    assert seen == [
        *((rate, 100, [0]) for rate in RATES[FineTuning]),
        *((rate, 100, [1]) for rate in (3e-4, 1e-3, 3e-3)),
        *((rate, 100, [2, 3]) for rate in (1e-3, 3e-3)),
    ]  # and a quarter of the steps, which none of the edits needed, would be the same again
    assert (found["learning_rate"], found["max_steps"], found["trials"], found["edits"]) == (1e-3, 100, TRIALS, 4)


def test_c_is_read_once_for_rome_and_memit_and_kept(tokenizer, data, tmp_path, monkeypatch):  # noqa: F811
    from mendfast.commands import protected

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=3, n_head=4)
    editor = MendEditor.from_model(GPT2LMHeadModel(config).eval(), tokenizer, MendConfig(rank=4))  # noqa: F811
    written, seen = [], []
    words, observe = protected.own_texts, protected.observe
    monkeypatch.setattr(protected, "own_texts", lambda *a, **o: (written.append(a[1]), words(*a, **o))[1])
    monkeypatch.setattr(protected, "observe", lambda *a, **o: (seen.append(len(a[1])), observe(*a, **o))[1])
    command = ("--limit", 2, "--validation", 0, "--systems", "rome", "memit")
    found = run(editor, data, *command, "--output", tmp_path / "out")
    assert (written, seen) == ([8], [2]) and all(row["measured"] == 2 for row in found["rows"])
    (tmp_path / "out" / "edits.jsonl").unlink()
    again = run(editor, data, *command, "--output", tmp_path / "out")
    assert written == [8] and certain(again["rows"]) == certain(found["rows"])
    assert certain(run(editor, data, *command)["rows"]) == certain(found["rows"]) and written == [8, 8]


# -- a sequence that is killed -----------------------------------------------------------------------------

KILLED = """
    import sys
    sys.path[:0] = {paths!r}
    from mendfast.baselines import turns
    from mendfast.cli import main
    turns.EVERY = -1.0  # after every edit
    import os, signal
    keep = turns.Turns.keep
    def killed(self, done, state):
        keep(self, done, state)
        if done == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
    turns.Turns.keep = killed
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("key", ["ft", "ultraedit", "mend"])
def test_a_killed_sequence_goes_on_in_its_midst(key, editor, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    editor.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    editor.save_pretrained(tmp_path / "editor")
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps(record) + "\n" for record in records(6)))
    command = ["eval", "--model", tmp_path / "model", "--editor", tmp_path / "editor", "--data", edits, "--table",
               "sequential", "--sizes", 6, "--sequences", 1, "--unrelated", 2, "--systems", key, "--validation", 0,
               *(["--option", "ultraedit.turn=2", "--option", "ultraedit.learning_rate=1e-3"] * (key == "ultraedit")),
               *(["--option", "ft.max_steps=6", "--fine-tuning-rate", 1e-2] * (key == "ft"))]  # fmt: skip
    command = [str(part) for part in command]
    out = tmp_path / "out"
    after = 6 if key == "mend" else 4  # a memory takes this many in one pass
    if key == "ft":
        script = tmp_path / "killed.py"
        script.write_text(textwrap.dedent(KILLED).format(paths=[p for p in sys.path if p], after=after))
        done = subprocess.run(
            [sys.executable, script, *command, "--output", str(out)], capture_output=True, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    else:  # another process takes its time to start
        keep = turns.Turns.keep

        def interrupted(self, done, state):
            keep(self, done, state)
            if done == after:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(turns, "EVERY", -1.0)
            patched.setattr(turns.Turns, "keep", interrupted)
            assert main([*command, "--output", str(out)]) == 130
    kept = list((out / "unfinished").glob("*.safetensors"))
    assert kept and not any("figures" in line for line in (out / "edits.jsonl").read_text().splitlines())
    made = []
    for kind, name in ((FineTuning, "_train"), (UltraEdit, "_take")):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, method=method: (made.append(1), method(*args))[1])
    assert main([*command, "--output", str(out)]) == 0
    assert len(made) == {"ft": 2, "ultraedit": 1, "mend": 0}[key]  # what was left
    assert not (out / "unfinished").exists()
    assert main([*command, "--json", str(tmp_path / "whole.json")]) == 0
    resumed, whole = (json.loads(path.read_text()) for path in (out / "results.json", tmp_path / "whole.json"))
    ((resumed,), (whole,)) = certain(resumed["rows"]), certain(whole["rows"])
    assert resumed["survival"] == whole["survival"] and not whole["failed"]
    for name, figure in whole["figures"].items():
        assert resumed["figures"][name] == pytest.approx(figure, rel=1e-3, abs=1e-5), name


def test_the_tables_row_is_what_plain_code_gives(editor, tokenizer, data):  # noqa: F811
    """One edit written into the weights, and asked with nothing but transformers."""
    record = {**records(1)[0], "locality": [["Who is of Rome?", "Madrid"], ["Paris", "Berlin"]], "portability": []}
    data.write_text(json.dumps(record) + "\n")
    figures = {
        name: figure["mean"]
        for name, figure in run(editor, data, "--systems", "mend")["rows"][0]["figures"].items()
    }
    base, end = editor.model, tokenizer.eos_token_id

    def told(prompt, target):
        start, whole = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {target}"))
        with torch.no_grad():
            chosen = base(input_ids=torch.tensor([whole])).logits[0].argmax(-1).tolist()
        return chosen[len(start) - 1 : -1] == whole[len(start) :]

    def said(prompt):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        room = min(TOKENS, base.config.n_positions - ids.shape[1])
        new = base.generate(ids, do_sample=False, max_new_tokens=room, eos_token_id=end, pad_token_id=0)
        new = new[0, ids.shape[1] :].tolist()
        text, ended = tokenizer.decode(new, skip_special_tokens=True), new[-1] == end
        line, newline, _ = text.lstrip().partition("\n")  # a base model's answer is a line
        return (line.strip(), True) if newline else (text.strip(), ended)

    prompts = [prompt for prompt, _ in record["locality"]]
    before, right = [said(prompt) for prompt in prompts], [told(*pair) for pair in record["locality"]]
    edit = editor.edit(record["prompt"], record["target"])
    edit.apply_(base)
    try:
        asked = [record["prompt"], *record["rephrasings"]]
        forced, spoken = [told(prompt, record["target"]) for prompt in asked], [said(prompt) for prompt in asked]
        after, still = [said(prompt) for prompt in prompts], [told(*pair) for pair in record["locality"]]
    finally:
        edit.revert_(base)
    exact = [exact_match(text, record["target"]) for text, _ in spoken]
    expected = {
        "edit_success": sum(forced) / 3, "generality": sum(forced[1:]) / 2, "exact_match": exact[0],
        "rephrase_exact_match": sum(exact[1:]) / 2, "never_stopped": sum(not ended for _, ended in spoken) / 3,
        "contains": sum(contains(text, record["target"]) for text, _ in spoken) / 3,
        "unchanged": sum(a == b for a, b in zip(before, after, strict=True)) / 2,
        "drawdown": (sum(right) - sum(still)) / 2,
    }  # fmt: skip
    for name, value in expected.items():
        assert figures[name] == pytest.approx(float(value)), name


# -- several processes -------------------------------------------------------------------------------------

SHARED = """
    import sys
    sys.path[:0] = {paths!r}
    import torch
    torch.set_num_threads(1)
    from mendfast.baselines.measure import measuring
    from mendfast.cli import main
    measuring.__kwdefaults__["max_new_tokens"] = {tokens}
    status = main(sys.argv[1:])
    # of one that ends within the group a thread may abort it
    sys.exit(7 if torch.distributed.is_initialized() else status)
"""


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate (pip install accelerate)")
@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)
def test_two_processes_share_the_edits(editor, tokenizer, data, tmp_path):  # noqa: F811
    editor.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    editor.save_pretrained(tmp_path / "editor")
    command = ["eval", "--model", tmp_path / "model", "--editor", tmp_path / "editor", "--data", data, "--unrelated", 3,
               "--systems", "mend", "ft", "--option", "ft.max_steps=6", "--validation", 2]  # fmt: skip
    command = [str(part) for part in command]
    script, out = tmp_path / "shared.py", tmp_path / "out"
    script.write_text(textwrap.dedent(SHARED).format(paths=[p for p in sys.path if p], tokens=TOKENS))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *command]
    done = subprocess.run(
        [*launched, "--output", out], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report:") == 1
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(out.glob("edits*.jsonl"))]
    groups = [{(line["system"], line["group"]) for line in part if "group" in line} for part in lines]
    assert len(groups) == 2 and not groups[0] & groups[1] and min(map(len, groups)) >= 5
    assert main([*command, "--json", str(tmp_path / "whole.json")]) == 0
    shared, whole = (json.loads(path.read_text()) for path in (out / "results.json", tmp_path / "whole.json"))
    assert shared["edits"] == whole["edits"] == 6
    for ours, theirs in zip(certain(shared["rows"]), certain(whole["rows"]), strict=True):
        assert ours["measured"] == theirs["measured"] == 6
        assert {**ours.get("chosen", {}), "seconds": 0} == {**theirs.get("chosen", {}), "seconds": 0}
        for name, figure in theirs["figures"].items():
            assert ours["figures"][name] == pytest.approx(figure, rel=1e-3, abs=1e-5), name


# -- lm-evaluation-harness ---------------------------------------------------------------------------------

TASK = """
task: mendfast_capitals
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["Paris", "Rome"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness (pip install lm-eval)")
def test_the_harness_asks_before_and_after(editor, data, tmp_path, monkeypatch):  # noqa: F811
    """A task of two questions: what is edited, and one that is not; the edit turns the first."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "questions.json").write_text(
        "".join(json.dumps({"question": record["prompt"]}) + "\n" for record in records(2))
    )
    task = tmp_path / "capitals.yaml"
    task.write_text(TASK.format(file=tmp_path / "questions.json"))
    options = ("--systems", "ft", "identity", "--limit", 1, "--option", "ft.max_steps=50", "--harness", task)
    found = run(editor, data, *options, "--output", tmp_path / "out")["harness_results"]
    assert set(found) == {"ft", "identity"}
    ((name, after),) = found["ft"]["after"].items()
    assert name.startswith("mendfast_capitals acc") and after in (0.5, 1.0)
    assert after >= found["ft"]["before"][name] == found["identity"]["before"][name]
    assert "lm-evaluation-harness" in (tmp_path / "out" / "report.html").read_text()
    again = run(editor, data, *options, "--output", tmp_path / "out")
    assert again["harness_results"] == found
    with pytest.raises(FileNotFoundError, match="There is no file .*none.yaml"):
        run(editor, data, "--systems", "ft", "--harness", tmp_path / "none.yaml")


def test_the_harness_must_be_there(editor, data, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mendfast.commands.eval_settings.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--harness needs lm-evaluation-harness: pip install lm-eval"):
        run(editor, data, "--systems", "ft", "--harness", "hellaswag")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--harness-limit is of --harness"):
        run(editor, data, "--harness-limit", 3)


# -- what is written ---------------------------------------------------------------------------------------


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean, "high": mean, "n": 4}


def result(places: dict[str, tuple[float, float, float]], table: str = "systems", k: int = 1) -> dict:
    """Systems with these shares exact and unchanged, and seconds."""
    rows = []
    for key, (exact, unchanged, seconds) in places.items():
        figures = {"exact_match": exact, "rephrase_exact_match": exact, "unchanged": unchanged, "seconds": seconds,
                   "edit_success": exact, "generality": exact, "drawdown": 0.0, "perplexity_rise": 0.0,
                   "efficacy": exact}  # fmt: skip
        rows.append({
            "system": key, "name": SYSTEMS[key].name, "parameters": 0, "k": k, "measured": 4, "failed": 0,
            "first_error": None, "figures": {name: interval(value) for name, value in figures.items()},
        })  # fmt: skip
    return {"table": table, "task": "qa", "edits": 4, "read": 4, "data": "d", "seed": 0, "rows": rows, "examples": [],
            "problems": [], "environment": {}, "left_out": {}}  # fmt: skip


def test_the_frontier():
    places = {"mend": (0.9, 0.5, 0.1), "ft": (0.7, 0.9, 2.0), "lora": (0.6, 0.8, 1.0), "identity": (0.0, 1.0, 0.1),
              "rome": (0.9, 0.5, 9.0)}  # fmt: skip
    (found,) = eval_plots.paretos(result(places))
    assert [point.key for point in found.frontier] == ["mend", "rome", "ft", "identity"]
    sizes = [eval_plots.radius(point, found.points) for point in found.points]
    assert sizes[-1] == max(sizes) and sizes[0] == min(sizes) < sizes[2] < sizes[1]
    assert eval_plots.pareto_png(result(places)).startswith(b"\x89PNG")
    assert found.x == "unrelated answers unchanged"
    bare = copy.deepcopy(result(places))
    for row in bare["rows"]:
        del row["figures"]["unchanged"]
    (found,) = eval_plots.paretos(bare)
    assert found.x == "1 - drawdown" and {point.x for point in found.points} == {1.0}


def test_a_drawdown_of_zero_shows_its_number():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    rows = result({"mend": (0.9, 1.0, 0.1), "ft": (0.8, 1.0, 1.0)})["rows"]
    eval_plots._bars(axis, rows, [row["name"] for row in rows], "drawdown")
    assert [text.get_text() for text in axis.texts] == ["0.000", "0.000"] and axis.get_xlim()[1] >= 0.5


@pytest.mark.parametrize("table", ["systems", "batched", "sequential"])
def test_the_terminals_table_fits(table):
    """All names that there are, whole, in 80 columns."""
    found = result({key: (0.123, 0.456, 123.456) for key in SYSTEMS}, table, 1 if table == "systems" else 1000)
    for row in found["rows"]:
        row["figures"]["perplexity_rise"] = interval(-1.2e10)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(eval_report.console_table(found))
    lines = console.export_text().splitlines()
    assert all(len(line) <= 80 for line in lines) and not any("…" in line for line in lines)
    words = " ".join(" ".join(lines).split())
    for system in SYSTEMS.values():
        assert all(word in words for word in system.name.split()), system.name
    assert words.count("123,456") == len(SYSTEMS)


def test_differences_are_marked():
    assert eval_page.marked_difference("It is Paris.", "It is Rome.") == "It is <del>Paris</del><ins>Rome</ins>."
    assert eval_page.marked_difference("a b", "a b") == "a b"
    assert eval_page.marked_difference("It was long ago", "<Oslo>") == "<ins>&lt;Oslo&gt;</ins>"


CHROMIUM = "/usr/bin/chromium"


@pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright (pip install playwright)")
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"needs a browser at {CHROMIUM}")
def test_the_page_in_a_browser(tmp_path):
    """Nothing scrolls sideways at 500 and 1,200 pixels; columns sort, systems and groups of figures can be hidden."""
    from playwright.sync_api import sync_playwright

    places = {key: (0.9 - 0.1 * i, 0.5 + 0.05 * i, 0.1 * i) for i, key in enumerate(list(SYSTEMS)[:9])}
    found = result(places)
    question = {"kind": "edit", "prompt": "Who?" * 30, "before": {}, "after": {}}
    for key in places:
        question["before"][key], question["after"][key] = "a " * 40, "b" * 90
    found["examples"] = [{"target": "b", "questions": [question]}]
    for row in found["rows"]:
        row["figures"] |= {name: interval(0.5) for name in eval_report.COLUMNS if name not in row["figures"]}
    path = eval_page.write_report(tmp_path, found)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.goto(path.as_uri())
            groups = page.locator("button[data-group]").count()
            for width in (500, 1200):
                page.set_viewport_size({"width": width, "height": 900})
                for i in range(groups):
                    page.locator("button[data-group]").nth(i).click()
                    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                    assert wide <= 0, (width, i)
                    wider = "e => e.scrollWidth > e.parentElement.clientWidth"
                    tables = "[...document.querySelectorAll('table, svg, img')]"
                    assert page.evaluate(f"{tables}.filter({wider}).length") == 0
            page.locator("button[data-group]").first.click()
            title = page.locator("th button", has_text="exact match").first
            column = "[...document.querySelectorAll('table.wide tbody tr')].filter(r=>!r.hidden).map(r=>r.dataset.s)"
            title.click()
            assert page.evaluate(column) == list(places)
            title.click()
            assert page.evaluate(column) == list(places)[::-1]
            page.locator("button[data-system=ft]").click()
            assert "ft" not in page.evaluate(column)
            assert page.locator("svg g[data-s=ft]").first.is_hidden()
        finally:
            browser.close()


def test_a_damaged_sequence_is_refused(tmp_path):
    """What is gone on from is held to what it is written through."""
    requests = [EditRequest("a", "b"), EditRequest("c", "d")]
    turns, weight = Turns(tmp_path / "turns.safetensors"), torch.ones(3, 2)
    assert turns.resume(requests) == (0, {})
    turns.keep(3, numbered([weight]))
    with pytest.raises(ValueError, match="no whole sequence of edits"):
        turns.resume(requests)
    turns.keep(1, numbered([weight]))
    done, state = turns.resume(requests)
    assert done == 1
    for other in (torch.zeros(1, 2), torch.zeros(2, 3)):  # the first would broadcast
        with pytest.raises(ValueError, match="of other weights"):
            take([weight], numbered([other]))
    with pytest.raises(ValueError, match="of other weights"):
        take([weight, weight], state)
    assert bool((weight == 1).all())
