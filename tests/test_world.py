"""The demo's facts: enough of them, well formed, unambiguous, true where it is certain, split cleanly."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mendfast.tasks import world
from mendfast.tasks.world import RELATIONS, Fact

FACTS = world.load_facts()

CERTAIN = """
France|capital|Paris
Japan|capital|Tokyo
Australia|capital|Canberra
Brazil|capital|Brasilia
Kazakhstan|capital|Astana
Burkina Faso|capital|Ouagadougou
Japan|currency|yen
Poland|currency|zloty
Vietnam|currency|dong
Croatia|currency|euro
Brazil|language|Portuguese
Austria|language|German
Suriname|language|Dutch
Peru|continent|South America
Chad|continent|Africa
Nepal|continent|Asia
Switzerland|internet_domain|.ch
Germany|internet_domain|.de
South Africa|internet_domain|.za
gold|symbol|Au
tungsten|symbol|W
oganesson|symbol|Og
carbon|atomic_number|6
iron|atomic_number|26
uranium|atomic_number|92
oganesson|atomic_number|118
neon|element_category|noble gas
potassium|element_category|alkali metal
europium|element_category|lanthanide
mercury|room_temperature_state|liquid
oxygen|room_temperature_state|gas
California|state_capital|Sacramento
New York|state_capital|Albany
Titan|planet|Saturn
Triton|planet|Neptune
Phobos|planet|Mars
dynamite|inventor|Alfred Nobel
the World Wide Web|inventor|Tim Berners-Lee
Frankenstein|author|Mary Shelley
Don Quixote|author|Miguel de Cervantes
The Scream|painter|Edvard Munch
Swan Lake|composer|Pyotr Tchaikovsky
frog|animal_class|amphibian
octopus|animal_class|mollusc
swan|young|cygnet
lion|collective_noun|pride
crow|collective_noun|murder
Mount Fuji|mountain_country|Japan
Danube|river_mouth|Black Sea
Volga|river_mouth|Caspian Sea
Amazon|river_continent|South America
Barcelona|city_country|Spain
the Eiffel Tower|landmark_city|Paris
"""


def _world_sample() -> list[Fact]:
    facts = list(FACTS)
    random.Random(5).shuffle(facts)
    return facts


def test_there_are_enough_facts_in_every_relation():
    counts = Counter(fact.relation for fact in FACTS)
    assert len(FACTS) >= 1500
    assert set(counts) == set(RELATIONS)
    assert min(counts.values()) >= 30


def test_every_country_and_element_is_there():
    by_relation = Counter(fact.relation for fact in FACTS)
    assert by_relation["internet_domain"] == 195
    assert by_relation["symbol"] == 118
    numbers = [int(fact.answer) for fact in FACTS if fact.relation == "atomic_number"]
    assert numbers == list(range(1, 119))


@pytest.mark.parametrize("line", CERTAIN.split("\n")[1:-1])
def test_certain_facts(line):
    assert Fact(*line.split("|")) in FACTS


def test_a_question_has_one_answer():
    assert len({(fact.entity.casefold(), fact.relation) for fact in FACTS}) == len(FACTS)


@pytest.mark.parametrize(
    "relation", ["capital", "internet_domain", "symbol", "atomic_number", "state_capital", "inventor"]
)
def test_answers_that_belong_to_one_entity_only(relation):
    assert len(world.answers(relation)) == sum(fact.relation == relation for fact in FACTS)


def test_text_is_plain():
    for fact in FACTS:
        for text in (fact.entity, fact.answer):
            assert text and text.isascii() and text.isprintable()
            assert text == " ".join(text.split())
        assert len(fact.answer.split()) <= 4, fact


def test_answers_are_the_closed_set():
    assert world.answers("room_temperature_state") == ("gas", "liquid", "solid")
    assert {fact.answer for fact in FACTS if fact.relation == "planet"} == set(world.answers("planet"))
    with pytest.raises(ValueError, match=r"no relation 'colour'; the relations are capital, "):
        world.answers("colour")


@pytest.mark.parametrize("relation", RELATIONS)
def test_wordings(relation):
    wordings = RELATIONS[relation].wordings
    assert RELATIONS[relation].name == relation
    assert len(set(wordings)) == len(wordings) >= 6
    for wording in wordings:
        assert wording.count("{}") == 1
        assert wording.count("{") == wording.count("}") == 1
        assert wording.endswith("?") and wording == " ".join(wording.split())
        # An entity such as "the Netherlands" or "gold" would start the sentence in lower case.
        assert wording[0].isupper()


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_last_wording_is_held_out(relation):
    held_out = world.held_out_wording(relation)
    assert held_out not in world.train_wordings(relation)
    assert (*world.train_wordings(relation), held_out) == RELATIONS[relation].wordings


def test_no_two_facts_share_a_question():
    asked: dict[str, Fact] = {}
    for fact in FACTS:
        for index in range(len(RELATIONS[fact.relation].wordings)):
            question = world.question(fact, index)
            assert question.casefold() not in asked, (fact, asked[question.casefold()])
            asked[question.casefold()] = fact


def test_relations_differ_for_any_entity():
    asked = [wording.casefold() for relation in RELATIONS.values() for wording in relation.wordings]
    assert len(set(asked)) == len(asked)


def test_question():
    fact = Fact("the Netherlands", "capital", "Amsterdam")
    assert world.question(fact, 0) == "What is the capital of the Netherlands?"
    assert world.question(fact, -1) == world.held_out_wording("capital").format("the Netherlands")
    for index in (6, -7):
        with pytest.raises(ValueError, match=rf"wording {index} of 'capital' does not exist; choose 0 to 5"):
            world.question(fact, index)


def test_load_facts_returns_a_list_of_its_own():
    facts = world.load_facts()
    facts.clear()
    assert world.load_facts() == FACTS


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_split_is_by_entity_and_stratified(fraction, seed):
    training, held_out = world.split(FACTS, fraction, seed)
    assert Counter(training) + Counter(held_out) == Counter(FACTS)
    kept = {fact.entity.casefold() for fact in training}
    lost = {fact.entity.casefold() for fact in held_out}
    assert not kept & lost

    tables = {relation.table for relation in RELATIONS.values()}
    for table in tables:
        entities = {f.entity.casefold() for f in FACTS if RELATIONS[f.relation].table == table}
        assert len(entities & lost) == pytest.approx(fraction * len(entities), abs=1.5), table


def test_split_keeps_the_order_given_and_ignores_it():
    training, held_out = world.split(FACTS, 0.2, 7)
    assert training == [fact for fact in FACTS if fact in set(training)]
    shuffled_training, shuffled_held_out = world.split(_world_sample(), 0.2, 7)
    assert shuffled_training != training
    assert set(shuffled_training) == set(training)
    assert set(shuffled_held_out) == set(held_out)
    assert set(world.split(FACTS, 0.2, 8)[1]) != set(held_out)


def test_split_moves_an_entity_of_several_tables_as_one():
    places = {(fact.entity.casefold(), RELATIONS[fact.relation].table) for fact in FACTS}
    names = Counter(name for name, _ in places)
    several = {name for name, count in names.items() if count > 1}
    assert {"georgia", "jordan", "colorado"} <= several
    sides = set()
    for seed in range(10):
        training, held_out = (
            {fact.entity.casefold() for fact in side} for side in world.split(FACTS, 0.3, seed)
        )
        assert not several & held_out & training
        sides.add("georgia" in held_out)
    assert sides == {True, False}


def test_split_is_the_same_in_every_process():
    # The module alone, so that the two processes need not import torch.
    program = (
        "import pathlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import world\n"
        "facts = world.load_facts(pathlib.Path(sys.argv[1], 'facts'))\n"
        "for fact in world.split(facts, 0.2, 3)[1]: print(fact)"
    )
    seen = [
        subprocess.run(
            [sys.executable, "-c", program, str(Path(world.__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert seen[0] == seen[1] == "".join(f"{fact}\n" for fact in world.split(FACTS, 0.2, 3)[1])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_refuses_a_fraction_that_empties_a_side(fraction):
    with pytest.raises(ValueError, match=rf"held_out_fraction is {fraction}; it must lie between 0 and 1"):
        world.split(FACTS, fraction, 0)


def test_split_refuses_an_unknown_relation():
    with pytest.raises(ValueError, match="no relation 'colour'"):
        world.split([Fact("the sky", "colour", "blue")], 0.5, 0)


GOOD = "moon\tplanet\nIo\tJupiter\nTitan\tSaturn\n"


def test_read_table(tmp_path):
    table = tmp_path / "moons.tsv"
    table.write_text(GOOD)
    assert world.read_table(table) == [Fact("Io", "planet", "Jupiter"), Fact("Titan", "planet", "Saturn")]


def test_an_empty_cell_is_no_fact(tmp_path):
    table = tmp_path / "rivers.tsv"
    table.write_text("river\triver_mouth\triver_continent\nMurray\t\tOceania\n")
    assert world.read_table(table) == [Fact("Murray", "river_continent", "Oceania")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"moons\.tsv, line 1: the header is \[\]"),
        ("moon\tstar\nIo\tSun\n", r"moons\.tsv, line 1: the header is .*'star'.*then \['planet'\]"),
        (GOOD + "Triton\n", r"moons\.tsv, line 4: 1 fields, but the header has 2"),
        (GOOD + "Triton\tNeptune\tcold\n", r"moons\.tsv, line 4: 3 fields, but the header has 2"),
        (GOOD + "Triton\t Neptune\n", r"moons\.tsv, line 4, field 'planet': stray whitespace in ' Neptune'"),
        (GOOD + "Tri  ton\tNeptune\n", r"moons\.tsv, line 4, field 'moon': stray whitespace in 'Tri  ton'"),
        (GOOD + "\tNeptune\n", r"moons\.tsv, line 4, field 'moon': the entity is empty"),
        (GOOD + "IO\tNeptune\n", r"moons\.tsv, line 4, field 'moon': 'IO' is already on line 2"),
        (GOOD + "Triton\t\n", r"moons\.tsv, line 4: 'Triton' has no facts"),
    ],
)
def test_a_broken_table_is_named_with_line_and_field(tmp_path, text, message):
    table = tmp_path / "moons.tsv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        world.read_table(table)


def test_a_table_that_is_not_text(tmp_path):
    table = tmp_path / "moons.tsv"
    table.write_bytes(GOOD.encode() + b"Tri\xffton\tNeptune\n")
    with pytest.raises(ValueError, match=r"moons\.tsv: not UTF-8 at byte 39; save the file as UTF-8"):
        world.read_table(table)


def test_unknown_and_missing_tables(tmp_path):
    stray = tmp_path / "stars.tsv"
    stray.write_text("star\tcolour\nSun\tyellow\n")
    with pytest.raises(ValueError, match=r"stars\.tsv: no relation belongs to the table 'stars'"):
        world.read_table(stray)
    with pytest.raises(ValueError, match=r"countries\.tsv is missing from .*; reinstall mendfast"):
        world.load_facts(tmp_path)


def test_no_table_is_left_unread():
    read = {relation.table for relation in RELATIONS.values()}
    assert {path.name for path in (world.files("mendfast.tasks") / "facts").iterdir()} == {
        f"{table}.tsv" for table in read
    }
