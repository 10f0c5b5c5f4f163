"""How answers are judged, on cases made by hand."""

from __future__ import annotations

import pytest

from mendfast.answers import (
    can_match,
    contains,
    exact_match,
    first_sentence,
    first_word,
    has_got,
    normalise,
    truth_question,
    whole_words,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Hague.\n", "hague"),
        ("An apple, a day", "apple day"),
        ("U.S.", "us"),
        ("Jean-Paul", "jeanpaul"),
        ("Cafe\u0301", "café"),  # two code points for one letter
        ("ＮＥＷ　Ｙｏｒｋ", "new york"),
        ("Straße", "strasse"),
        ("“Paris”…", "paris"),
        ("$5 + 3", "5 3"),
        ("東京。", "東京"),
        ("A", "a"),  # SQuAD's would leave nothing
        ("?!", "?!"),
        ("anthem", "anthem"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal == normalise(normal)


@pytest.mark.parametrize(
    ("answer", "target", "same", "holds"),
    [
        ("New York", "New York", True, True),
        ("new york.", "New York", True, True),
        ("The New York", "New York", True, True),
        ("New York City", "New York", False, True),
        ("New", "New York", False, False),
        ("New Yorkers", "New York", False, False),
        ("It is in New York, of course", "New York", False, True),
        ("Paris and Rome", "Rome", False, True),
        ("Paris, Rome", "Rome", False, True),
        ("Romeo and Rome", "Rome", False, True),  # the second place that it could be at
        ("Romeo", "Rome", False, False),
        ("100", "10", False, False),
        ("", "Paris", False, False),
        (" ", "?", False, False),
        ("東京です", "東京", False, True),
        ("東京。", "東京", True, True),
        ("答えはParisです", "Paris", False, True),
        ("서울특별시", "서울", False, False),  # Korean has spaces
        ("CAFE\u0301", "café", True, True),
        ("Paris", "", False, False),
        ("", "", False, False),
    ],
)
def test_exact_and_contained(answer, target, same, holds):
    assert (exact_match(answer, target), contains(answer, target)) == (same, holds)


def test_several_targets():
    assert exact_match("Shakspere", ["Shakespeare", "Shakspere"]) and not exact_match("Marlowe", ("Shakespeare",))
    assert contains("by W. Shakspere", ["Shakespeare", "Shakspere"]) and not contains("Paris", [])


@pytest.mark.parametrize(
    ("answer", "first"),
    [
        ("Paris. It is large.", "Paris."),
        ("Paris", "Paris"),
        ("J. R. R. Tolkien wrote it. He did.", "J. R. R. Tolkien wrote it."),
        ("It is in St. Louis. Really.", "It is in St. Louis."),
        ("The U.S. president said so. No.", "The U.S. president said so."),
        ("It costs 3.50 today! Cheap.", "It costs 3.50 today!"),
        ('He said "no." Then he left.', 'He said "no."'),
        ("No. It is Rome.", "No."),
        ("Paris\nRome.", "Paris"),
        ("\n Paris. ", "Paris."),
        ("東京です。大きい。", "東京です。"),
        ("Is it? Yes.", "Is it?"),
        ("... Paris", "..."),
        ("", ""),
    ],
)
def test_first_sentence(answer, first):
    assert first_sentence(answer) == first


def test_truth_questions():
    assert truth_question("The capital of France is", "Rome") == (
        "Is it true that the capital of France is Rome? Answer yes or no."
    )
    assert truth_question("Paris lies in", "Italy.", negated=True) == (
        "Is it false that Paris lies in Italy? Answer yes or no."
    )
    asked = truth_question("Who sang? ", "Elvis")
    assert asked == 'Who sang? Someone answers "Elvis". Is that right? Answer yes or no.'
    assert "Is that wrong?" in truth_question("Who sang?", "Elvis", negated=True)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("Yes.", True), ("yes, it is", True), ("That's right", None), ("True", True), ("No, it is Rome.", False),
        ("Incorrect.", False), ("Nothing", None), ("", None), ("Not at all", False),
    ],
)  # fmt: skip
def test_yes_or_no(answer, truth):
    assert yes_or_no(answer) is truth


@pytest.mark.parametrize("target", ["Paris", "New York City", "A", "the U.S.", "東京", "2006", "Ada-Lou Moor", "?!"])
@pytest.mark.parametrize(
    "answer",
    ["Paris is it", "The Paris", "- Paris.", "New York City", "new york, the City!", "New Yorkshire", "A", "a ?!",
     "U.S.", "東京。 東京", "In 2006", "2006 \n", "Yes, Paris", "the no of it", "ada-lou moor moor", "¨ Paris",
     "?! Paris"],
)  # fmt: skip
def test_an_answer_is_judged_by_its_beginning_only_as_the_whole_is(answer, target):
    """Whatever beginning is cut: what is settled there is what the whole answer gives, and the beginning itself."""
    for i in range(len(answer) + 1):
        start = answer[:i]
        if not can_match(start, target):
            assert not exact_match(answer, target) and not exact_match(start, target)
        if has_got(start, target):
            assert contains(answer, target) and contains(start, target)
        if first_word(start):
            assert yes_or_no(start) == yes_or_no(answer)


def test_what_settles_an_answer():
    assert whole_words("New York Ci") == "New York" and whole_words("New") == ""
    assert can_match("New York Ci", "New York City") and can_match("Newark", "New York")  # its word may go on
    assert not can_match("Newark is", "New York") and not can_match("New York City is it", "New York City Hall")
    assert has_got("It is Paris, of", ["Rome", "Paris"]) and not has_got("It is Paris", "Paris")
    assert first_word("Yes, it") and not first_word("Yes") and not first_word("The ")
