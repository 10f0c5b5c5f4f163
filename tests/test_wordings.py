"""mine_wordings on a small world: templates found, relations apart, rephrasings that keep the subject."""

from __future__ import annotations

import random

import pytest

from mendfast.tasks.wordings import SLOT, mine_wordings, normalize, rewrite

GIVEN = ["Anna", "Boris", "Clara", "Dmitri", "Elena", "Frank", "Greta", "Hugo"]
FAMILY = ["Novak", "Okafor", "Petersen", "Quist", "Rossi", "Sato", "Tanaka", "Ueda", "Vogel", "Weiss"]
PEOPLE = [f"{given} {family}" for given in GIVEN for family in FAMILY]
FILMS = [f"The {a} {b}" for a in ("Red", "Last", "Silent", "Lost") for b in ("River", "King", "Road", "Day")]
FILMS += [f"{a} of the {b}" for a in ("Night", "Song", "Shadow") for b in ("Wolf", "Sea", "Moon")]
CITIES = ["Oslo", "Turin", "Lyon", "Graz", "Porto", "Malmö"]

ANSWERS = {"birth place": CITIES, "occupation": ["painter", "writer"], "language": ["German", "French"]}
RELATIONS = {
    "birth date": [
        "When was {} born?",
        "What is the date of birth of {}?",
        "What was {}'s date of birth?",
        "The birth date of {} is what?",
    ],
    "birth place": [
        "In what city was {} born?",
        "What is {}'s city of birth?",
        "What is the place of birth of {}?",
    ],
    "death date": ["When did {} die?", "What is the date of death of {}?", "On what date did {} die?"],
    "director": ["Who directed {}?", "Who is the director of {}?", "The director of {} is who?"],
    "occupation": ["What is {}'s occupation?", "What was the occupation of {}?"],
    "language": ["Which language is {} filmed in?"],
}


def answer(relation: str, rng: random.Random) -> str:
    if relation.endswith("date"):
        return f"{rng.randint(1, 28)} {rng.choice(['May', 'June', 'March'])} {rng.randint(1850, 1990)}"
    if relation == "director":
        return rng.choice(PEOPLE)
    return rng.choice(ANSWERS[relation])


def make_facts(seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    facts = []
    for relation, templates in RELATIONS.items():
        subjects = FILMS if relation in ("director", "language") else PEOPLE
        for template in templates:
            facts += [(template.replace(SLOT, s), answer(relation, rng)) for s in rng.sample(subjects, 12)]
    rng.shuffle(facts)
    return facts


FACTS = make_facts()


@pytest.fixture(scope="module")
def wordings():
    return mine_wordings(FACTS)


def test_every_template_is_found_and_nothing_else(wordings):
    found = [template for group in wordings.groups for template in group]
    assert sorted(found) == sorted(template for templates in RELATIONS.values() for template in templates)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_is_a_group(wordings, relation):
    """Birth and death, and the date and place of birth, share words and stay apart."""
    groups = {frozenset(group) for group in wordings.groups}
    assert frozenset(RELATIONS[relation]) in groups


@pytest.mark.parametrize("seed", range(1, 4))
def test_groups_do_not_hang_on_the_order_of_the_lines(seed):
    facts = FACTS.copy()
    random.Random(seed).shuffle(facts)
    expected = {frozenset(group) for group in mine_wordings(FACTS).groups}
    assert {frozenset(group) for group in mine_wordings(facts).groups} == expected


def test_split_on_questions_seen_and_unseen(wordings):
    assert wordings.split("When was Ana de Armas born?") == ("When was {} born?", "Ana de Armas")
    assert wordings.split("Who  directed   The Third Man ?") == ("Who directed {}?", "The Third Man")
    assert wordings.split("What is R2-D2's occupation?") == ("What is {}'s occupation?", "R2-D2")
    # Names that end, or begin, in lower case are not the span that the mining looks for.
    assert wordings.split("Who directed Gone with the wind?") == ("Who directed {}?", "Gone with the wind")
    assert wordings.split("Who directed amélie?") == ("Who directed {}?", "amélie")


def test_split_refuses_what_is_no_template(wordings):
    assert wordings.split("How tall is Mount Fuji?") is None
    assert wordings.split("") is None
    assert wordings.split("Who directed ?") is None
    assert wordings.relation("How tall is Mount Fuji?") is None
    assert wordings.rephrasings("How tall is Mount Fuji?") == []
    assert wordings.rephrase("How tall is Mount Fuji?", random.Random(0)) is None


def test_relation_is_the_index_of_the_group(wordings):
    relation = wordings.relation("When was Ana de Armas born?")
    assert set(wordings.groups[relation]) == set(RELATIONS["birth date"])
    assert relation == wordings.relation("The birth date of Li Wei is what?")
    assert relation != wordings.relation("When did Li Wei die?")


def test_rephrasings_are_the_groups_other_wordings_of_the_same_subject(wordings):
    question = "When was Ana de Armas born?"
    found = wordings.rephrasings(question)
    others = [t.replace(SLOT, "Ana de Armas") for t in RELATIONS["birth date"] if t != "When was {} born?"]
    assert set(others) <= set(found)
    assert all("Ana de Armas" in wording for wording in found)
    assert question not in found
    assert len(found) == len(set(found))
    drawn = {wordings.rephrase(question, random.Random(seed)) for seed in range(200)}
    assert drawn == set(found)
    assert wordings.rephrase(question, random.Random(5)) == wordings.rephrase(question, random.Random(5))


def test_a_template_without_a_group_still_has_its_rewrites(wordings):
    assert wordings.rephrasings("Which language is The Red Road filmed in?") == [
        "What language is The Red Road filmed in?"
    ]


def test_double_spaces_are_one(wordings):
    assert wordings.rephrasings("When  was Li Wei  born?") == wordings.rephrasings("When was Li Wei born?")
    assert normalize(" When  was Li Wei born ?") == "When was Li Wei born?"


def test_answers_are_those_of_the_relation_most_frequent_first(wordings):
    relation = wordings.relation("In what city was Li Wei born?")
    answers = wordings.answers(relation)
    seen = [answer for question, answer in FACTS if wordings.relation(question) == relation]
    assert set(answers) == set(seen) <= set(CITIES)
    assert len(answers) == len(set(answers))
    counts = [seen.count(a) for a in answers]
    assert counts == sorted(counts, reverse=True)


def test_equal_words_with_other_answers_are_another_relation():
    """A seat is an office or a city: only the answers tell the two apart."""
    rng = random.Random(0)
    offices = ["chairman", "speaker", "warden"]
    facts = [(f"What is the seat of {person}?", rng.choice(offices)) for person in PEOPLE[:20]]
    facts += [(f"What was {person}'s seat?", rng.choice(offices)) for person in PEOPLE[20:40]]
    facts += [(f"Which is the seat of {person}?", rng.choice(CITIES)) for person in PEOPLE[40:60]]
    groups = {frozenset(group) for group in mine_wordings(facts).groups}
    assert groups == {
        frozenset({"What is the seat of {}?", "What was {}'s seat?"}),
        frozenset({"Which is the seat of {}?"}),
    }
    unanswered = mine_wordings([(question, "") for question, _ in facts])
    assert len(unanswered.groups) == 1


def test_rare_templates_and_empty_input():
    facts = [("Who owns Alpha?", "Ann"), ("Who owns Beta?", "Bob"), ("Who owns Beta?", "Bob")]
    assert mine_wordings(facts).groups == []
    assert mine_wordings(facts, min_subjects=2).groups == [["Who owns {}?"]]
    empty = mine_wordings([])
    assert empty.groups == []
    assert empty.rephrase("Who owns Alpha?", random.Random(0)) is None
    with pytest.raises(ValueError, match="min_subjects is 1"):
        mine_wordings(facts, min_subjects=1)


def test_empty_answers_are_no_evidence_and_no_answers():
    facts = [(f"Who owns {p}?", "") for p in PEOPLE[:5]]
    facts += [(f"Who is the owner of {p}?", "Ann") for p in PEOPLE[:5]]
    wordings = mine_wordings(facts)
    assert wordings.answers(wordings.relation("Who is the owner of Li Wei?")) == ["Ann"]
    alone = mine_wordings(facts[:5])
    assert alone.answers(0) == []


@pytest.mark.parametrize(
    "template, others",
    [
        (
            "What is the record label of {}?",
            [
                "The record label of {} is what?",
                "What is {}'s record label?",
                "What's the record label of {}?",
            ],
        ),
        ("The mother of {} was who?", ["Who was the mother of {}?"]),
        ("What was {}'s career?", ["What was the career of {}?"]),
        ("What was the name of {}'s team?", ["What was {}'s team called?"]),
        ("In what city was {} born?", ["In which city was {} born?", "What city was {} born in?"]),
        ("Which network aired {}?", ["What network aired {}?"]),
        ("On what planet is {} on?", ["On which planet is {} on?"]),
        ("What did {} die of?", []),
        ("What kind of family is {} of?", []),
        ("The group which performed {} is?", []),
        ("How did {} die?", []),
    ],
)
def test_rewrites_keep_the_meaning(template, others):
    assert rewrite(template) == others
