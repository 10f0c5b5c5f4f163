"""The demo: what it ships keeps its word, and is made by a command that works."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from rich.console import Console

from mendfast import MendEditor
from mendfast.answers import exact_match
from mendfast.commands import demo as run
from mendfast.demo import build
from mendfast.generation import generate_answers
from mendfast.tasks import world
from mendfast.training import TrainConfig


def test_shipped_editor():
    """The figures of a quick run on the shipped files, not on what a cache may hold."""
    assert sum(path.stat().st_size for path in build.ASSETS.rglob("*") if path.is_file()) < 12e6
    editor = build.load()
    chosen = run.cases(24, seed=11)
    trained = run.measure(editor, [[case] for case in chosen], "mend", Console(quiet=True))
    assert trained.edit_success >= 0.95 and trained.generality >= 0.9 and trained.drawdown <= 0.01
    # One edit alone takes least squares no training; many do.
    groups = list(run._groups(run.cases(75, seed=8), 25, most=3))
    many, untrained = (run.measure(e, groups, "mend", Console(quiet=True)) for e in (editor, editor.untrained()))
    assert many.edit_success >= 0.95 and many.generality >= 0.93 and many.drawdown <= 0.05
    assert untrained.drawdown > 2 * many.drawdown


def test_answers_are_judged_where_right_and_wrong_can_be_told():
    """As their full length would be, and the table shows as much of them."""
    editor = build.load()
    for case in run.cases(5, seed=3):
        (other, _) = run.unrelated([case.fact], 1, random.Random(case.question))[0]
        questions = [case.question, case.paraphrase, other]
        old = generate_answers(editor, questions, run.LONGEST)[2]
        for strength in (1.0, 0.3, 40.0):  # the edit as it is, half taken, and breaking everything
            edit = editor.edit(case.question, case.target)
            edit.factors = {name: (u, d, strength * alpha) for name, (u, d, alpha) in edit.factors.items()}
            with edit.attached(editor.model):
                full = [given.text for given in generate_answers(editor, questions, run.LONGEST)]
                said, same = run._after(editor, questions, case.target, old)
            assert same == (full[2] == old.text)
            for short, long in zip(said, full, strict=True):
                assert long.startswith(short.removesuffix(" …"))
            assert [exact_match(s, case.target) for s in said[:2]] == [exact_match(f, case.target) for f in full[:2]]


def test_held_out_facts_are_not_trained_on():
    training, held_out = world.splits()
    assert not {fact.entity for fact in training} & {fact.entity for fact in held_out}
    asked = {wording for item in world.items(training) for wording in item.wordings}
    for case in run.cases(200, seed=5):
        assert case.question not in asked and case.paraphrase not in asked
        assert case.target != case.fact.answer


def test_untrained_editor_is_the_identity_on_normalised_rows():
    editor = build.load()
    fresh = editor.untrained()
    net, trained = next(iter(fresh.networks.values())), next(iter(editor.networks.values()))
    assert torch.equal(net.u_mean, trained.u_mean) and int(net.count) == int(trained.count) > 0
    assert all((block.U == 0).all() for block in net.both)


def test_retrain(tmp_path, capsys):
    """The whole recipe in a few steps: it resumes, puts both files in place and leaves no others."""
    config = TrainConfig(steps=2, batch_size=2, validation_size=2, checkpoint_every=1)
    build.retrain(tmp_path, base_steps=2, config=config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["editor", "model"]
    editor = build.load(tmp_path)
    shipped = build.load().config
    # the step size to start from is found
    assert isinstance(editor, MendEditor) and editor.config == replace(shipped, step_size=editor.config.step_size)
    assert "facts in their held-out wording" in capsys.readouterr().out
    case = run.cases(1)[0]
    edit = editor.edit(case.question, case.target)
    before = run.bits(editor.model)
    edit.apply_(editor.model)
    assert run.bits(editor.model) != before
    edit.revert_(editor.model)
    assert run.bits(editor.model) == before


def test_plot_and_tables(tmp_path, capsys):
    row = {"edit_success": 0.9, "generality": 0.8, "drawdown": 0.01, "n": 3}
    batched = {"1": {**row, "fine_tuning": row}, "5": {**row, "edit_success": 0.7, "fine_tuning": row}}
    run._plot(batched, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    run._print_batched(batched, Console(width=80))
    shown = capsys.readouterr().out
    assert "0.700" in shown and shown.count("fine-tuning") == 2
