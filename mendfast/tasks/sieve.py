"""Facts that a model can be trained on: what it can't be asked is found once, at the start, and not by a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..editable import EditableModel
from ..objective import context_length
from ..schema import brief, shown
from ..training import Item
from .records import Problem

LONGEST = 4096
"""Tokens of a request, whatever the model's context: training plans no memory for more."""
_SPARE = 4  # tokens by which a text may be longer than its parts
_AT_ONCE = 1024  # texts that are tokenised together
Forms = Sequence[str | None]


class _Sized(NamedTuple):
    item: Item
    prompt: int  # tokens of the longest wording, with all that stands around prompt and target
    target: int


def sieve(
    subject: EditableModel, items: Sequence[Item], forms: Forms = (None,)
) -> tuple[list[Item], list[Problem]]:
    """The items without the wordings and answers that ``subject`` can't be asked in one of the ``forms``, and what was
    left out.

    An edit gives a fact another fact's answer. So a decoder-only model's context must hold each wording with each
    answer that it may get: where a long one of either stands against many of the other, it goes.

    Raises:
        ValueError: nothing is left.
    """
    limit = min(context_length(subject.model) or LONGEST, LONGEST)
    around = max(_around(subject, form) for form in forms) + _SPARE
    prompts = _lengths(subject, [wording for item in items for wording in item.wordings])
    together = subject.kind == "causal"
    targets = {} if subject.kind == "classifier" else _lengths(subject, [item.answer for item in items])
    good = {
        answer: 0 < targets[answer] <= limit - around if targets else not _refusal(subject, "a", answer, forms, limit)
        for answer in {item.answer: None for item in items}
    }
    kept: list[_Sized] = []
    problems: list[Problem] = []
    for item in items:
        target, fits = targets.get(item.answer, 0), []
        for wording in item.wordings:
            length = prompts[wording] + around + (target if together else 0)
            sure = good[item.answer] and prompts[wording] and length <= limit
            if why := "" if sure else _refusal(subject, wording, item.answer, forms, limit):
                problems.append(_problem(item, f"{shown(wording)} can't be asked: {why}"))
            else:
                fits.append(wording)
        if fits:
            longest = max(prompts[wording] for wording in fits)
            kept.append(_Sized(replace(item, wordings=tuple(fits)), longest + around, target))
    if together:
        kept = _without_conflicts(kept, limit, problems)
    kept = _with_fitting_implications(subject, kept, around, limit, problems)
    if not kept:
        raise ValueError(
            f"The model can be asked none of {len(items):,} facts{f'; the first: {problems[0]}' if problems else ''}"
        )
    return [sized.item for sized in kept], problems


def _with_fitting_implications(
    subject: EditableModel, sized: list[_Sized], around: int, limit: int, problems: list[Problem]
) -> list[_Sized]:
    """The facts without the implied questions that the context does not hold, whatever the target in them is."""
    implied = [one for fact in sized for one in fact.item.implied]
    if not implied:
        return sized
    lengths = _lengths(subject, [text for one in implied for text in (*one.wordings, *one.known_answers())])
    longest: dict[object, int] = defaultdict(int)
    for fact in sized:
        longest[fact.item.relation] = max(longest[fact.item.relation], fact.target)
    kept = []
    for fact in sized:
        fits = []
        for one in fact.item.implied:
            answers = [lengths[answer] for answer in one.known_answers()]
            asked = max(lengths[wording] for wording in one.wordings) + longest[fact.item.relation] + around
            if min(answers) and asked + max(answers) <= limit:
                fits.append(one)
            else:
                problems.append(_problem(fact.item, f"{shown(one.wordings[0])}, which follows from it, can't be asked"))
        kept.append(fact._replace(item=replace(fact.item, implied=tuple(fits))))
    return kept


def fitting(subject: EditableModel, texts: Sequence[tuple[str, str, str | None]]) -> list[tuple[str, str, str | None]]:
    """The texts, each as (beginning, rest, form), that the model's context holds."""
    limit = min(context_length(subject.model) or LONGEST, LONGEST)
    return [text for text in texts if not _refusal(subject, text[0], text[1], text[2:], limit)]


def _problem(item: Item, message: str) -> Problem:
    file, _, line = item.source.rpartition(":")
    place = (file, int(line)) if file and line.isdigit() else (item.source or "the facts", 0)
    return Problem(*place, "", brief(message, 300))


def _around(subject: EditableModel, form: str | None) -> int:
    """Tokens of a request beside those of prompt and target: template, BOS, end of turn."""
    if subject.kind == "classifier":
        return len(subject.tokenizer(subject.config.prompt_template.replace("{prompt}", "a"))["input_ids"])
    try:
        return len(subject.encode("a", "a", form)["input_ids"])
    except ValueError as error:
        raise ValueError(f"The model can be asked nothing as its requests are made. {error}") from error


def _lengths(subject: EditableModel, texts: Sequence[str]) -> dict[str, int]:
    """How many tokens each text is by itself."""
    texts = list(dict.fromkeys(texts))
    found: dict[str, int] = {}
    for i in range(0, len(texts), _AT_ONCE):
        part = texts[i : i + _AT_ONCE]
        ids = subject.tokenizer(part, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        found.update(zip(part, map(len, ids), strict=True))
    return found


def _refusal(subject: EditableModel, prompt: str, target: str, forms: Forms, limit: int) -> str:
    """Why the model can't be asked this in one of the forms; "" where it can."""
    try:
        if subject.kind != "classifier" and not _lengths(subject, [target])[target]:
            return f"The answer {shown(target)} becomes no tokens with this tokenizer."
        if subject.kind == "classifier":
            batch = subject.tokenize([(prompt, target)])
            subject.check(batch)
            length = batch["input_ids"].shape[-1]
        else:
            length = max(len(row) for form in forms for row in subject.encode(prompt, target, form).values())
    except ValueError as error:
        return str(error)
    return f"It has {length:,} tokens, and training takes {limit:,}." if length > limit else ""


def _without_conflicts(sized: list[_Sized], limit: int, problems: list[Problem]) -> list[_Sized]:
    """The facts of which each may get any answer that others of its relation have."""
    everything = sized
    while True:
        by_relation = defaultdict(list)
        for fact in everything:
            by_relation[fact.item.relation].append(fact)
        gone: dict[int, str] = {}
        for facts in by_relation.values():
            # of one answer alone there is no other; then an edit takes one of another relation
            givers = facts if len({fact.item.answer for fact in facts}) > 1 else everything
            prompt, target = max(fact.prompt for fact in facts), max(fact.target for fact in givers)
            if prompt + target <= limit:
                continue
            asked = [fact for fact in facts if fact.prompt + target > limit]
            given = [fact for fact in givers if fact.target + prompt > limit]
            fewer, what = (asked, "question") if len(asked) <= len(given) else (given, "answer")
            gone |= {id(fact): what for fact in fewer}
        if not gone:
            return everything
        for fact in everything:
            if id(fact) in gone:
                problems.append(
                    _problem(
                        fact.item,
                        f"its {gone[id(fact)]} is too long beside the others': together they may have {limit:,} tokens",
                    )
                )
        everything = [fact for fact in everything if id(fact) not in gone]
