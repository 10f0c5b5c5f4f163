"""mendfast eval --table sequential, and what is asked beside the edits themselves."""

from __future__ import annotations

import io
import json
import random

import pytest
import torch
from rich.console import Console
from test_baselines import edits, make
from test_evaluate import certain, data, editor, few_answers_are_shown, model, records, run  # noqa: F401
from transformers import GPT2Config, GPT2LMHeadModel

from mendfast import MendConfig, MendEditor
from mendfast.baselines import FineTuning, turns
from mendfast.baselines.measure import measure
from mendfast.baselines.mend import Mend
from mendfast.baselines.system import System
from mendfast.baselines.turns import Turns
from mendfast.commands import eval_report, sequences
from mendfast.commands.questions import NEAR, TEXT_TOKENS, Questions
from mendfast.tasks.load import load_task

SYSTEMS = ("mend", "mend_sum", "ultraedit", "ft", "ft_breadth_first")
IN_TURN = ("--table", "sequential", "--sizes", 1, 3, 50, "--validation", 0, "--option", "ft_breadth_first.epochs=3")


def test_ages_are_decades_and_survival_is_their_means():
    assert [sequences.age_of(later) for later in (0, 1, 9, 10, 99, 100)] == [
        (0, 0), (1, 9), (1, 9), (10, 99), (10, 99), (100, 999),
    ]  # fmt: skip
    assert sequences.sizes_for((1, 10, 100, 1000), 300) == [1, 10, 100, 300]
    rows = [{"right": [0, 1, 1]}, {"right": [0, 0, 0]}, {"error": "none"}]
    found = [(part["from"], part["to"], part["mean"], part["n"]) for part in sequences.survival(rows)]
    assert found == [(0, 0, 0.5, 2), (1, 9, 0.25, 4)]
    by_edit = sequences.by_edit([{"right": [0, 1, 1], "exact": [0, 0, 1]}])
    assert by_edit["efficacy"].mean == pytest.approx(2 / 3) and by_edit["exact_match"].n == 3


def test_the_table_of_sequences(editor, data, tmp_path):  # noqa: F811
    before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    result = run(editor, data, *IN_TURN, "--systems", *SYSTEMS, "--output", tmp_path / "out")
    assert [(row["system"], row["k"], row["measured"], row["failed"]) for row in result["rows"]] == [
        (key, size, count, 0) for size, count in ((1, 3), (3, 2), (7, 1)) for key in SYSTEMS
    ]
    for row in result["rows"]:
        assert {"efficacy", "exact_match", "perplexity_rise", "text_kl", "seconds"} <= set(row["figures"])
        assert row["figures"]["efficacy"]["n"] == row["k"] * row["measured"]
        assert sum(part["n"] for part in row["survival"]) == row["k"] * row["measured"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in editor.model.state_dict().items())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Old edits" in page and "MEND, summed" in page
    assert "| system | in turn | 0 | 1 to 9 |" in (tmp_path / "out" / "table.md").read_text()
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    console.print(eval_report.console_table(result))
    shown = console.export_text()
    assert all(len(line) <= 80 for line in shown.splitlines()) and "…" not in shown
    assert "FT, breadth first" in shown and "MEND, summed" in shown


def test_what_is_asked_at_the_end_is_the_model_after_all_edits(editor, data):  # noqa: F811
    """The figure of a sequence is what the system's own edits, made in turn by hand, leave."""
    result = run(editor, data, *IN_TURN, "--systems", "ft")
    (row,) = [row for row in result["rows"] if row["k"] == 7]
    pairs = [(record["prompt"], record["target"]) for record in records()]
    outcome = measure(FineTuning(editor, 1e-2, 4), pairs, in_turn=True)
    assert row["figures"]["efficacy"]["mean"] == pytest.approx(sum(outcome.right) / 7)
    assert row["figures"]["exact_match"]["mean"] == pytest.approx(sum(outcome.exact) / 7)


def test_a_sequence_that_was_cut_off_goes_on(editor, data, tmp_path, monkeypatch):  # noqa: F811
    options = (*IN_TURN, "--systems", "mend", "ft")
    whole = run(editor, data, *options)
    edit, calls = System.edit, []

    def counted(self, requests, **how):
        calls.append(len(requests))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return edit(self, requests, **how)

    monkeypatch.setattr(System, "edit", counted)
    with pytest.raises(KeyboardInterrupt):
        run(editor, data, *options, "--output", tmp_path / "out")
    resumed = run(editor, data, *options, "--output", tmp_path / "out")
    assert certain(resumed["rows"]) == certain(whole["rows"])
    assert calls == [1, 1, 1, 3, 3, 3, 7, 1, 1, 1, 3, 3, 7]  # of MEND the fourth again, and what was left


def test_the_data_is_not_written_over(editor, data, tmp_path):  # noqa: F811
    before = data.read_bytes()
    assert data.name == "edits.jsonl"
    with pytest.raises(ValueError, match="--output is where --data lies, and edits.jsonl is a name that is written"):
        run(editor, data, "--output", data.parent)
    assert data.read_bytes() == before


def test_what_is_asked_beside_an_edit(tokenizer, tmp_path):
    """Neighbours by what the questions ask for and of whom; yes, no, and no to what was before."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=4)
    editor = MendEditor.from_model(GPT2LMHeadModel(config).eval(), tokenizer, MendConfig(rank=4))  # noqa: F811
    names = ("Ada Moor", "Bo Lind", "Cy Hart", "Di Fenn")
    facts = [
        {"prompt": question.format(name), "target": answer, "answers": [before]}
        for question, answer, before in (
            ("Where was {} born?", "Rome", "Paris"), ("Who is the mother of {}?", "Berlin", "Madrid"),
        )
        for name in names
    ]  # fmt: skip
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    task = load_task("qa", str(path))
    questions = Questions(editor, task, own_text=True)
    asked = questions.after(task.examples[:1], random.Random(0))
    assert sorted(asked["near"]["relation"]) == [f"Where was {name} born?" for name in names[1:]]
    assert asked["near"]["subject"] == ["Who is the mother of Ada Moor?"]
    assert len(asked["near"]["relation"]) <= NEAR and asked["forms"] == ()
    assert [truth for _, truth in asked["premises"]] == [True, False, False]
    assert ["Rome" in question for question, _ in asked["premises"]] == [True, True, False]
    assert not {"Where was Ada Moor born?"} & {prompt for prompt, _ in asked["locality"]}
    batches = questions.texts()
    assert batches and all(batch["input_ids"].shape[1] <= TEXT_TOKENS for batch in batches)
    assert all(((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all() for batch in batches)
    figures = measure(
        Mend(editor), [("Where was Ada Moor born?", "Rome")], **{**asked, "max_new_tokens": 4}
    ).figures
    assert {"unchanged_relation", "unchanged_subject", "premises"} <= set(figures)


def test_running_text(editor, data, tmp_path):  # noqa: F811
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["Paris and Rome are towns.", "= A heading =", "Berlin is in Germany."]))
    result = run(editor, data, "--systems", "ft", "--limit", 2, "--text", path)
    assert {"perplexity_rise", "text_kl", "premises"} <= set(result["rows"][0]["figures"])
    path.write_text("= A heading =\n")
    with pytest.raises(ValueError, match="holds no running text"):
        run(editor, data, "--systems", "ft", "--text", path)


@pytest.mark.parametrize("key", ["ft_breadth_first", "memit"])
def test_a_sequence_made_as_one_goes_on_too(key, tokenizer, tmp_path, monkeypatch):
    options = {
        "ft_breadth_first": {"epochs": 5, "learning_rate": 1e-2, "batch_size": 1, "enough": 0.0},
        "memit": {"words": 4, "prefixes": 0, "steps": 2, "block": 1},
    }[key]
    system, kept, keep = make(key, "gpt2", tokenizer, **options), [], Turns.keep

    def weights():
        with system.edit(edits("gpt2"), in_turn=True):
            return [layer.weight.detach().clone() for layer in system.changed_layers()]

    def interrupted(self, *state):
        keep(self, *state)
        kept.append(state)
        if len(kept) == 1:
            raise KeyboardInterrupt

    whole = weights()
    monkeypatch.setattr(turns, "EVERY", -1.0)
    monkeypatch.setattr(Turns, "keep", interrupted)
    system.turns = Turns(tmp_path / "kept.safetensors")
    with pytest.raises(KeyboardInterrupt):
        weights()
    system.turns = Turns(tmp_path / "kept.safetensors")
    assert all(torch.equal(got, expected) for got, expected in zip(weights(), whole, strict=True))
    assert len(kept) == {"ft_breadth_first": 5, "memit": 2}[key]  # nothing twice
