"""Claims about the facts that come with the package, true and false, each in five wordings."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from . import world


@dataclass(frozen=True)
class Claim:
    """What a fact says, or what it would say with another answer."""

    fact: world.Fact
    answer: str

    @property
    def true(self) -> bool:
        return self.answer == self.fact.answer

    def wordings(self) -> list[str]:
        """The claim in every wording; the last is the one that no editor is trained on."""
        return [_sentence(w.format(e=self.fact.entity, a=self.answer)) for w in WORDINGS[self.fact.relation]]


def claims(facts: Iterable[world.Fact], seed: int = 0) -> list[Claim]:
    """A true and a false claim of each fact; the false one has another answer of the same relation."""
    made = []
    for fact in facts:
        rng = random.Random(f"{seed}/{fact.relation}/{fact.entity}")
        wrong = rng.choice([answer for answer in world.answers(fact.relation) if answer != fact.answer])
        made += [Claim(fact, fact.answer), Claim(fact, wrong)]
    return made


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


WORDINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {e} is {a}.",
        "{a} is the capital of {e}.",
        "{e} has {a} as its capital.",
        "The government of {e} has its seat in the capital, {a}.",
        "In {e} the city with the rank of capital is {a}.",
    ),
    "currency": (
        "The currency of {e} is the {a}.",
        "People in {e} pay with the {a}.",
        "The {a} is the money of {e}.",
        "{e} uses the {a} as its currency.",
        "In shops in {e} prices are given in the {a}.",
    ),
    "language": (
        "The main official language of {e} is {a}.",
        "{a} is the chief official language of {e}.",
        "In {e} the principal official language is {a}.",
        "Most official business in {e} is done in {a}.",
        "Of the official languages of {e}, {a} is the one spoken most.",
    ),
    "continent": (
        "{e} is in {a}.",
        "{e} is a country of {a}.",
        "The continent of {e} is {a}.",
        "{e} belongs to the continent of {a}.",
        "To find {e} on a globe, look at {a}.",
    ),
    "internet_domain": (
        "The internet domain of {e} is {a}.",
        "Web addresses from {e} end in {a}.",
        "{a} is the country-code domain of {e}.",
        "Websites in {e} use the domain {a}.",
        "An address that is registered in {e} ends in {a}.",
    ),
    "symbol": (
        "The chemical symbol of {e} is {a}.",
        "{a} is the symbol of the element {e}.",
        "In chemical formulas {e} is written {a}.",
        "In the periodic table {e} has the letters {a}.",
        "Chemists abbreviate {e} to {a}.",
    ),
    "atomic_number": (
        "The atomic number of {e} is {a}.",
        "{e} has the atomic number {a}.",
        "An atom of {e} has a nucleus with {a} as its number of protons.",
        "In the periodic table {e} stands at position {a}.",
        "Number {a} among the elements is {e}.",
    ),
    "element_category": (
        "The category of the element {e} is {a}.",
        "As an element, {e} is classed as {a}.",
        "In the periodic table {e} is listed as {a}.",
        "The family of elements that {e} belongs to is called {a}.",
        "Chemists would say {a} if they were asked what kind of element {e} is.",
    ),
    "room_temperature_state": (
        "At room temperature {e} is a {a}.",
        "The state of {e} at 20 degrees Celsius is {a}.",
        "Under normal conditions {e} is found as a {a}.",
        "{e} is a {a} at normal pressure and room temperature.",
        "In an ordinary room {e} takes the form of a {a}.",
    ),
    "state_capital": (
        "The capital of the US state of {e} is {a}.",
        "{a} is the state capital of {e}.",
        "The state legislature of {e} meets in {a}.",
        "The seat of government of the US state of {e} is {a}.",
        "Among the cities of the American state {e}, {a} is the capital.",
    ),
    "planet": (
        "The moon {e} orbits {a}.",
        "{e} is a moon of {a}.",
        "{a} has {e} as one of its moons.",
        "The planet that {e} revolves around is {a}.",
        "Whoever stands on the moon {e} is circling {a}.",
    ),
    "inventor": (
        "{a} invented {e}.",
        "The inventor of {e} was {a}.",
        "We owe {e} to {a}.",
        "{e} was invented by {a}.",
        "The person credited with inventing {e} is {a}.",
    ),
    "author": (
        "{a} wrote {e}.",
        "The author of {e} is {a}.",
        "{e} was written by {a}.",
        "{e} is a work of the writer {a}.",
        "From the pen of {a} came {e}.",
    ),
    "painter": (
        "{a} painted {e}.",
        "The painter of {e} is {a}.",
        "{e} was painted by {a}.",
        "{e} is a work of the artist {a}.",
        "The brush of {a} produced {e}.",
    ),
    "composer": (
        "{a} composed {e}.",
        "The composer of {e} is {a}.",
        "{e} was composed by {a}.",
        "{e} is a work of the composer {a}.",
        "In {e} we hear the music of {a}.",
    ),
    "animal_class": (
        "The class of animal of the {e} is {a}.",
        "Zoologists classify the {e} as {a}.",
        "The {e} is counted under the class {a}.",
        "As an animal, the {e} is of the type {a}.",
        "In biology the word for what the {e} is would be {a}.",
    ),
    "young": (
        "The young of the {e} is called {a}.",
        "A baby {e} goes by the name of {a}.",
        "{a} is the word for a young {e}.",
        "The offspring of the {e} is known as {a}.",
        "While it is still young, the {e} is called {a}.",
    ),
    "collective_noun": (
        "The collective noun for the {e} is {a}.",
        "A group of the animal {e} is called {a}.",
        "{a} is the word for many of the animal {e} together.",
        "The group name of the {e} is {a}.",
        "When many of the animal {e} come together, they form what is called {a}.",
    ),
    "mountain_country": (
        "The mountain {e} is in {a}.",
        "{a} is home to the peak {e}.",
        "The summit of {e} is reached in {a}.",
        "{e} is a mountain of {a}.",
        "A climber who wants to see {e} must travel to {a}.",
    ),
    "river_mouth": (
        "The river {e} flows into the {a}.",
        "The {a} receives the river {e}.",
        "The mouth of the river {e} is at the {a}.",
        "The river {e} ends in the {a}.",
        "Whoever follows the river {e} to its mouth reaches the {a}.",
    ),
    "river_continent": (
        "The river {e} is in {a}.",
        "The river {e} flows through {a}.",
        "{a} is the continent of the river {e}.",
        "{e} is a river of {a}.",
        "To see the river {e}, travel to {a}.",
    ),
    "city_country": (
        "The city of {e} is in {a}.",
        "The city of {e} belongs to {a}.",
        "{a} is the country of the city of {e}.",
        "{e} is a city of {a}.",
        "A traveller who arrives in {e} is in {a}.",
    ),
    "landmark_city": (
        "{e} is in {a}.",
        "{a} is home to {e}.",
        "The city of {e} is {a}.",
        "Tourists see {e} in {a}.",
        "Whoever is standing in front of {e} is in {a}.",
    ),
}
"""Of each relation: {e} is the entity, {a} the answer. The last wording is held out."""
