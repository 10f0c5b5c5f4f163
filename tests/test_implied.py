"""Implied facts: what follows from an edit, drawn as a further outer example."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_sieve import subject

from mendfast.cli import main, read
from mendfast.tasks import world
from mendfast.tasks.load import load_task
from mendfast.tasks.sieve import sieve
from mendfast.tasks.world import Fact
from mendfast.training import FactSampler, Item
from mendfast.training.data import Implied, fingerprint

FACTS = [
    Fact("France", "capital", "Paris"),
    Fact("Italy", "capital", "Rome"),
    Fact("Kenya", "capital", "Nairobi"),
    Fact("France", "continent", "Europe"),
    Fact("Kenya", "continent", "Africa"),
    Fact("Lyon", "city_country", "France"),
    Fact("Mombasa", "city_country", "Kenya"),
    Fact("Milan", "city_country", "Italy"),
    Fact("Jupiter's Io", "planet", "Jupiter"),
]


def answered(facts, target: str, fact: Fact) -> dict[str, str]:
    """Every implied question of a fact and its answer."""
    asked = [one.asked(target, i) for one in world.implied(facts)[fact] if one.says(target) for i in range(3)]
    return dict(asked)


def test_a_new_capital_is_the_capital_of_its_country():
    found = answered(FACTS, "Rome", FACTS[0])
    assert found == {
        "Which country has Rome as its capital?": "France",
        "Rome is the capital of which country?": "France",
        "Of which country is Rome the capital?": "France",
    }


def test_a_city_moves_to_the_continent_of_its_new_country():
    lyon = FACTS[5]
    assert set(answered(FACTS, "Kenya", lyon).values()) == {"Africa"}
    assert "On which continent is the city of Lyon?" in answered(FACTS, "Kenya", lyon)
    assert answered(FACTS, "Italy", lyon) == {}  # whose continent these facts don't say
    assert world.implied(FACTS)[FACTS[-1]] == ()


def test_the_shipped_facts_imply_what_they_say():
    facts = world.load_facts()
    follows = world.implied(facts)
    true = {(fact.relation, fact.entity): fact.answer for fact in facts}
    assert sum(map(bool, follows.values())) > 800
    for item in world.items(facts):
        for question, answer in item.follows():
            assert item.answer in question or item.entity in question
            if item.relation in ("capital", "symbol"):
                assert answer == item.entity
            if item.relation == "city_country" and "continent" in question:
                assert answer == true["continent", item.answer]
    # the last wording is left to measure with
    trained = {w for item in world.items(facts) for one in item.implied for w in one.wordings}
    assert not trained & {one.wordings[-1] for own in follows.values() for one in own}


def test_draws_depend_on_seed_and_step_and_replace_rephrasings():
    items = world.items(FACTS)
    a, b = (FactSampler(items, implied=0.5, seed=3) for _ in range(2))
    assert [a.draw(step, 4) for step in (0, 5)] == [b.draw(step, 4) for step in (0, 5)]
    every = FactSampler(items, outer=2, implied=1.0, include_inner=0.0, seed=1)
    seen = 0
    for step in range(40):
        draw = every.draw(step, 5)
        assert (len(draw.inner), len(draw.outer), len(draw.loc)) == (5, 10, 15)
        for i, (question, target) in enumerate(draw.inner):
            (item,) = [item for item in items if question in item.wordings]
            rephrased, (asked, answer) = draw.outer[2 * i : 2 * i + 2]
            assert rephrased[0] in item.wordings and rephrased[1] == target != item.answer
            allowed = [one.asked(target, k) for one in item.implied if one.says(target) for k in range(2)]
            assert (asked, answer) in allowed if item.implied else asked in item.wordings
            seen += bool(item.implied)
    assert seen > 100


def test_without_a_share_nothing_changes():
    items = world.items(FACTS)
    bare = [replace(item, implied=()) for item in items]
    plain, off, on = FactSampler(bare), FactSampler(items), FactSampler(items, implied=0.5)
    assert plain.draw(2, 4) == off.draw(2, 4) and fingerprint(plain) == fingerprint(off)
    assert len({fingerprint(s) for s in (off, on, FactSampler(items, implied=0.25))}) == 3
    other = [*items[:-1], replace(items[-1], implied=(Implied(("Where is {}?",), "Space"),))]
    assert fingerprint(FactSampler(other, implied=0.5)) != fingerprint(on)
    assert all(len(FactSampler(items, outer=0, implied=1.0).draw(0, 4)[i]) == n for i, n in enumerate((4, 0, 12)))


def test_few_targets_stay_few():
    sampler = FactSampler(world.items(FACTS), targets=1, implied=1.0)
    targets = {}
    for step in range(60):
        for question, target in sampler.draw(step, 4).inner:
            (item,) = [item for item in sampler.items if question in item.wordings]
            assert targets.setdefault(item, target) == target


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_refused(share, tmp_path):
    with pytest.raises(ValueError, match="must be a share"):
        FactSampler(world.items(FACTS), implied=share)
    with pytest.raises(ValueError, match="none of 1 facts has a question whose answer follows"):
        FactSampler(world.items(FACTS[-1:]), implied=0.5)
    with pytest.raises(ValueError, match="implied is"):
        read(["train", "--implied", str(share), "--output", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="--implied is of question answering"):
        read(["train", "--task", "fact_checking", "--implied", "0.5", "--output", str(tmp_path / "run")])


def test_data_from_which_nothing_follows_is_refused_at_once(tmp_path, capsys):
    data = tmp_path / "qa.tsv"
    data.write_text("".join(f"Who leads town {i}?\tAda {i % 3}\n" for i in range(6)))
    assert main(["train", "--data", str(data), "--implied", "0.5", "--output", str(tmp_path / "run")]) == 2
    assert "none of 5 facts has a question whose answer follows" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_portability_of_a_file_is_trained_with_its_own_target(tmp_path):
    records = [
        {"subject": f"Band {i}", "src": f"Who founded Band {i}?", "alt": f"Ada {i}", "answers": [f"Bo {i % 2}"],
         "rephrase": f"By whom was Band {i} founded?", "loc": "nq question: who?", "loc_ans": "me",
         "portability": {"question": f"Where was the founder of Band {i} born?", "answer": f"Town {i}"}}
        for i in range(6)
    ]  # fmt: skip
    path = tmp_path / "zsre.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    task = load_task("qa", str(path))
    task.implied = 1.0
    sampler = task.sampler(0)
    drawn = sampler.draw(0, 5)
    for (question, target), (asked, answer) in zip(drawn.inner, drawn.outer, strict=True):
        name = question.removesuffix("?").removesuffix(" founded").split("Band ")[1]
        assert (target, asked, answer) == (f"Ada {name}", f"Where was the founder of Band {name} born?", f"Town {name}")
    assert all(example.portability for example in load_task("qa", "world:test").examples if example.subject == "Oslo")
    # what a base model is taught of its own: no question whose answer is only known of the edit
    assert not any("born" in prompt for prompt, _ in task.base_pairs())


def test_what_a_context_does_not_hold_is_left_out(tokenizer):
    fits, long = Implied(("Where is {}?",), "Rome"), Implied(("Rome Paris " * 40 + "{}?",), "Rome")
    items = [Item((f"What is {i}?",), ("Rome", "Paris")[i % 2], 0, implied=(fits, long)) for i in range(4)]
    kept, problems = sieve(subject("gpt2", tokenizer), items)
    assert [item.implied for item in kept] == [(fits,)] * 4 and len(problems) == 4
