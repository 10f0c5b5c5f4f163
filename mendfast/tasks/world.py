"""The world that the demo's language model knows: about 2,200 facts and the questions that ask for them.

The facts lie beside this module as tables, ``facts/<table>.tsv``: the first column names the entity,
every other column is a relation, an empty cell means that no fact is stated. They were written for this
project. Where the world itself is undecided (the capital of Bolivia, the continent of Russia), the cell is
empty; the countries are the members and the two observer states of the United Nations.

A relation's last wording is kept from the editor's training: it measures whether an edit reaches a
paraphrase that no editor has seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the module is not in Python 3.10
    from importlib.resources.abc import Traversable

    from ..training.data import Implied, Item

HELD_OUT, SEED = 0.2, 0  # of the shipped facts' entities


@dataclass(frozen=True)
class Fact:
    """``answer`` is the true answer to every question that ``relation`` asks about ``entity``."""

    entity: str
    relation: str
    answer: str


@dataclass(frozen=True)
class Relation:
    """A column of a table. Each wording holds ``{}`` once, where the entity goes; the last is held out."""

    name: str
    table: str
    wordings: tuple[str, ...]


_RELATIONS = (
    Relation("capital", "countries", (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "In {}, which city has the rank of capital?",
        "If you visit the capital of {}, which city are you in?",
        "What city serves as the national capital of {}?",
        "Can you name the capital city of {}?",
    )),
    Relation("currency", "countries", (
        "What is the currency of {}?",
        "Which currency is used in {}?",
        "With which currency do people pay in {}?",
        "What money is legal tender in {}?",
        "Can you name the official currency of {}?",
        "If you go shopping in {}, which currency do you need?",
    )),
    Relation("language", "countries", (
        "What is the main official language of {}?",
        "Which official language is most widely used in {}?",
        "In {}, what is the principal official language?",
        "Of the official languages of {}, which one is spoken most?",
        "If you learn the main official language of {}, which language do you learn?",
        "Can you name the chief official language of {}?",
    )),
    Relation("continent", "countries", (
        "On which continent is {}?",
        "What continent does {} belong to?",
        "Which continent is {} part of?",
        "To find {} on a globe, which continent should you look at?",
        "Can you name the continent where {} lies?",
        "Of which continent is {} a country?",
    )),
    Relation("internet_domain", "countries", (
        "What is the internet domain of {}?",
        "Which top-level domain belongs to {}?",
        "With which country code do web addresses from {} end?",
        "What domain ending do websites in {} use?",
        "If a website is registered in {}, how does its address end?",
        "Can you name the country-code domain of {}?",
    )),
    Relation("symbol", "elements", (
        "What is the chemical symbol of {}?",
        "Which symbol stands for the element {}?",
        "How is {} written in chemical formulas?",
        "By what letters is {} known in the periodic table?",
        "Can you give the symbol of the element {}?",
        "In chemistry, what is {} abbreviated to?",
    )),
    Relation("atomic_number", "elements", (
        "What is the atomic number of {}?",
        "How many protons does an atom of {} have?",
        "Which atomic number belongs to {}?",
        "At what position in the periodic table does {} stand?",
        "In the nucleus of {}, how many protons are there?",
        "Can you give the atomic number of the element {}?",
    )),
    Relation("element_category", "elements", (
        "What kind of element is {}?",
        "Which family of elements does {} belong to?",
        "In which category of the periodic table is {}?",
        "How do chemists classify the element {}?",
        "Can you name the category of the element {}?",
        "Among the families of elements, which one includes {}?",
    )),
    Relation("room_temperature_state", "elements", (
        "In what state is {} at room temperature?",
        "Is {} a solid, a liquid or a gas at room temperature?",
        "Which state of matter does {} have at 20 degrees Celsius?",
        "What is the physical state of {} under normal conditions?",
        "At room temperature and normal pressure, what form does {} take?",
        "Can you name the state of matter of {} at room temperature?",
    )),
    Relation("state_capital", "states", (
        "What is the capital of the US state of {}?",
        "Which city is the state capital of {}?",
        "In which city does the state legislature of {} meet?",
        "Where is the seat of government of the US state of {}?",
        "Can you name the capital of the American state {}?",
        "What city serves as the state capital of {}?",
    )),
    Relation("planet", "moons", (
        "Which planet does the moon {} orbit?",
        "Of which planet is {} a moon?",
        "Around what planet does {} revolve?",
        "To which planet does the moon {} belong?",
        "If you stand on the moon {}, which planet is it circling?",
        "Can you name the planet that has {} as a moon?",
    )),
    Relation("inventor", "inventions", (
        "Who invented {}?",
        "Who was the inventor of {}?",
        "By whom was {} invented?",
        "To whom do we owe {}?",
        "Can you name the person credited with inventing {}?",
        "Which inventor is known for {}?",
    )),
    Relation("author", "books", (
        "Who wrote {}?",
        "Who is the author of {}?",
        "By whom was {} written?",
        "Which writer is known for {}?",
        "From whose pen did {} come?",
        "Can you name the writer of {}?",
    )),
    Relation("painter", "paintings", (
        "Who painted {}?",
        "Which artist created {}?",
        "By whom was {} painted?",
        "To which painter do we owe {}?",
        "Can you name the painter of {}?",
        "Whose brush produced {}?",
    )),
    Relation("composer", "music", (
        "Who composed {}?",
        "Who is the composer of {}?",
        "By whom was {} composed?",
        "Which composer is known for {}?",
        "Whose music do we hear in {}?",
        "Can you name the composer who created {}?",
    )),
    Relation("animal_class", "animals", (
        "What class of animal is the {}?",
        "To which class of animals does the {} belong?",
        "How do zoologists classify the {}?",
        "Among which class of animals is the {} counted?",
        "Can you name the animal class of the {}?",
        "In biology, what type of animal is the {}?",
    )),
    Relation("young", "animals", (
        "What is the young of the {} called?",
        "What do you call a young {}?",
        "By what name is the offspring of the {} known?",
        "What name does a baby {} go by?",
        "When a {} is still young, what is it called?",
        "Can you give the word for a young {}?",
    )),
    Relation("collective_noun", "animals", (
        "What is the collective noun for the {}?",
        "Which collective noun belongs to the {}?",
        "By what word is a group of the animal {} known?",
        "How is a group named when its animal is the {}?",
        "Can you give the group name of the {}?",
        "If many of the animal {} are together, what is the group called?",
    )),
    Relation("mountain_country", "mountains", (
        "In which country is the mountain {}?",
        "Which country is home to the peak {}?",
        "Where must a climber travel to reach the summit of {}?",
        "To what country does the mountain {} belong?",
        "On the territory of which country does {} rise?",
        "Can you name the country of the mountain {}?",
    )),
    Relation("river_mouth", "rivers", (
        "Into which body of water does the river {} flow?",
        "Where does the river {} end?",
        "What waters receive the river {}?",
        "If you follow the river {} to its mouth, what do you reach?",
        "Can you name the body of water at the mouth of the river {}?",
        "Which sea, ocean or bay does the river {} empty into?",
    )),
    Relation("river_continent", "rivers", (
        "On which continent is the river {}?",
        "Through which continent does the river {} flow?",
        "What continent does the river {} belong to?",
        "Along the river {}, which continent do you cross?",
        "To see the river {}, what continent must you visit?",
        "Can you name the continent of the river {}?",
    )),
    Relation("city_country", "cities", (
        "In which country is the city of {}?",
        "Which country does the city of {} belong to?",
        "What country are you in when you are in {}?",
        "Where in the world is the city of {}?",
        "Can you name the country where the city of {} lies?",
        "A traveller who arrives in {} is in which country?",
    )),
    Relation("landmark_city", "landmarks", (
        "In which city is {}?",
        "Which city is home to {}?",
        "Where do tourists go to see {}?",
        "To what city must you travel to visit {}?",
        "If you are standing in front of {}, which city are you in?",
        "Can you name the city that is famous for {}?",
    )),
)

# relation -> who has such an answer; each answer belongs to one entity alone
_INVERSES = {
    "capital": (
        "Which country has {} as its capital?", "{} is the capital of which country?",
        "Of which country is {} the capital?",
    ),
    "internet_domain": (
        "Which country has the internet domain {}?", "To which country does the top-level domain {} belong?",
        "Web addresses of which country end in {}?",
    ),
    "symbol": (
        "Which element has the symbol {}?", "{} is the chemical symbol of which element?",
        "For which element does the symbol {} stand?",
    ),
    "atomic_number": (
        "Which element has the atomic number {}?", "An atom of which element has {} protons?",
        "{} is the atomic number of which element?",
    ),
    "state_capital": (
        "Which US state has {} as its capital?", "{} is the capital of which US state?",
        "Of which US state is {} the capital?",
    ),
}  # fmt: skip
# relation, relation of its answer -> what that says of the entity
_CHAINS = {
    ("city_country", "continent"): (
        "On which continent is the city of {}?", "The city of {} is on which continent?",
        "To which continent must you travel to visit the city of {}?",
    ),
    ("city_country", "currency"): (
        "What is the currency in the city of {}?", "With which currency do people pay in the city of {}?",
        "If you go shopping in the city of {}, which currency do you need?",
    ),
    ("city_country", "language"): (
        "What is the main official language in the city of {}?", "Which official language is used in the city of {}?",
        "If you move to the city of {}, which official language do you learn?",
    ),
    ("mountain_country", "continent"): (
        "On which continent is the mountain {}?", "The mountain {} is on which continent?",
        "To which continent must a climber of {} travel?",
    ),
    ("landmark_city", "city_country"): (
        "In which country is {}?", "To what country must you travel to see {}?",
        "Can you name the country where {} stands?",
    ),
}  # fmt: skip

RELATIONS: dict[str, Relation] = {relation.name: relation for relation in _RELATIONS}
"""Every relation by name; grouped by table, in the order of the tables' columns."""


def _relation(name: str) -> Relation:
    if name not in RELATIONS:
        raise ValueError(f"there is no relation {name!r}; the relations are {', '.join(RELATIONS)}.")
    return RELATIONS[name]


def train_wordings(relation: str) -> tuple[str, ...]:
    """The wordings of ``relation`` that an editor may be trained on: all but the last."""
    return _relation(relation).wordings[:-1]


def held_out_wording(relation: str) -> str:
    """The paraphrase of ``relation`` that no editor is trained on: the last wording."""
    return _relation(relation).wordings[-1]


def question(fact: Fact, wording_index: int) -> str:
    """The question whose answer is ``fact.answer``; index -1 is the held-out wording."""
    wordings = _relation(fact.relation).wordings
    if not -len(wordings) <= wording_index < len(wordings):
        raise ValueError(
            f"wording {wording_index} of {fact.relation!r} does not exist; "
            f"choose 0 to {len(wordings) - 1}, or -1 for the held-out one."
        )
    return wordings[wording_index].format(fact.entity)


def load_facts(directory: Traversable | None = None) -> list[Fact]:
    """Every fact of every table, in the order of ``RELATIONS``'s tables, then of their rows.

    ``directory`` holds the tables; by default the ones shipped with the package.
    Raises ValueError, naming file, line and field, for a table that is missing or broken.
    """
    return list(_shipped()) if directory is None else _read_all(directory)


def answers(relation: str) -> tuple[str, ...]:
    """The closed answer set of ``relation`` in the shipped facts: sorted, each answer once."""
    name = _relation(relation).name
    return tuple(sorted({fact.answer for fact in _shipped() if fact.relation == name}))


@cache
def _shipped() -> tuple[Fact, ...]:
    return tuple(_read_all(files("mendfast.tasks") / "facts"))


def _read_all(directory: Traversable) -> list[Fact]:
    tables = dict.fromkeys(relation.table for relation in RELATIONS.values())
    facts = []
    for table in tables:
        path = directory / f"{table}.tsv"
        if not path.is_file():
            raise ValueError(f"the table {table}.tsv is missing from {directory}; reinstall mendfast.")
        facts += read_table(path)
    return facts


def read_table(path: Traversable) -> list[Fact]:
    """The facts of one table, whose file name says which: ``<table>.tsv``.

    Raises ValueError, naming file, line and field: a header other than the table's relations, a row of
    another width, whitespace around a field, an entity that is absent, repeated or without any fact.
    """
    table = path.name.removesuffix(".tsv")
    columns = [relation.name for relation in RELATIONS.values() if relation.table == table]
    if not columns:
        known = ", ".join(sorted({relation.table for relation in RELATIONS.values()}))
        raise ValueError(f"{path.name}: no relation belongs to the table {table!r}; the tables are {known}.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 at byte {error.start}; save the file as UTF-8.") from error
    header = lines[0].split("\t") if lines else []
    if not header or not header[0] or header[1:] != columns:
        raise ValueError(
            f"{path.name}, line 1: the header is {header}; it must be the entity's column, then {columns}."
        )

    facts: list[Fact] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path.name}, line {number}"
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(
                f"{where}: {len(fields)} fields, but the header has {len(header)}; "
                "separate fields by one tab and leave unknown ones empty."
            )
        for column, field in zip(header, fields, strict=True):
            if field != " ".join(field.split()):
                raise ValueError(f"{where}, field {column!r}: stray whitespace in {field!r}; remove it.")
        entity, *values = fields
        if not entity:
            raise ValueError(f"{where}, field {header[0]!r}: the entity is empty; name it or drop the row.")
        if entity.casefold() in first_line:
            raise ValueError(
                f"{where}, field {header[0]!r}: {entity!r} is already on line "
                f"{first_line[entity.casefold()]}; merge the rows."
            )
        if not any(values):
            raise ValueError(f"{where}: {entity!r} has no facts; fill a field or drop the row.")
        first_line[entity.casefold()] = number
        facts += [Fact(entity, column, value) for column, value in zip(columns, values, strict=True) if value]
    return facts


def split(facts: Iterable[Fact], held_out_fraction: float, seed: int) -> tuple[list[Fact], list[Fact]]:
    """``facts`` as (training, held out), each in the order given; no entity is on both sides.

    Of each table's entities the rounded ``held_out_fraction`` is held out. An entity that is in several
    tables goes to one side with all of its facts; case does not distinguish entities. The same facts and
    seed give the same split in every process, whatever the order of the facts.
    Raises ValueError unless 0 < held_out_fraction < 1.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}; it must lie between 0 and 1.")
    facts = list(facts)
    tables: dict[str, set[str]] = {}
    for fact in facts:
        tables.setdefault(_relation(fact.relation).table, set()).add(fact.entity.casefold())

    decided: set[str] = set()
    held_out: set[str] = set()
    for table, entities in sorted(tables.items()):
        undecided = sorted(entities - decided)
        # A string seeds by its SHA-512; a tuple would seed by hash(), which differs between processes.
        random.Random(f"{seed}/{table}").shuffle(undecided)
        wanted = round(held_out_fraction * len(entities)) - len(entities & held_out)
        held_out.update(undecided[: max(wanted, 0)])
        decided |= entities

    training = [fact for fact in facts if fact.entity.casefold() not in held_out]
    return training, [fact for fact in facts if fact.entity.casefold() in held_out]


def splits() -> tuple[list[Fact], list[Fact]]:
    """The shipped facts that editors train on, and those of other entities, which they never see."""
    return split(load_facts(), HELD_OUT, SEED)


def items(facts: Iterable[Fact]) -> list[Item]:
    """The facts in the wordings that an editor may train on, with what follows from other answers to them, as far as
    these facts say."""
    from ..training.data import Item  # the facts alone need no torch

    facts = list(facts)
    follows = implied(facts)
    return [
        Item(
            tuple(w.format(f.entity) for w in train_wordings(f.relation)),
            f.answer,
            f.relation,
            f.entity,
            implied=tuple(replace(one, wordings=one.wordings[:-1]) for one in follows[f]),
        )
        for f in facts
    ]


def implied(facts: Iterable[Fact], known: Iterable[Fact] | None = None) -> dict[Fact, tuple[Implied, ...]]:
    """What follows from another answer to each fact: of a country's new capital what country it is the capital of, of a
    city's new country the continent that the city is on. A question's last wording is kept from training.

    Args:
        known: the facts that answers follow from; by default ``facts``.
    """
    from ..training.data import Implied

    facts = list(facts)
    known = facts if known is None else list(known)
    of_answer: dict[str, dict[str, str]] = {name: {} for _, name in _CHAINS}
    for fact in known:
        if fact.relation in of_answer:
            of_answer[fact.relation][fact.entity] = fact.answer
    given = {name: sorted({fact.answer for fact in known if fact.relation == name}) for name, _ in _CHAINS}
    chains = {
        pair: tuple((a, of_answer[pair[1]][a]) for a in given[pair[0]] if a in of_answer[pair[1]]) for pair in _CHAINS
    }
    found = {}
    for fact in facts:
        own = []
        if fact.relation in _INVERSES:
            own.append(Implied(_INVERSES[fact.relation], fact.entity))
        for (relation, following), wordings in _CHAINS.items():
            if relation == fact.relation and (answers := chains[relation, following]):
                own.append(Implied(tuple(w.format(fact.entity) for w in wordings), answers))
        found[fact] = tuple(own)
    return found
