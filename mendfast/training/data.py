"""What the loop trains on: edits drawn from facts in several wordings."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..schema import shown

Pair = tuple[str, str]


@dataclass(frozen=True)
class Implied:
    """A question whose answer follows from an edit: what the city that is France's capital by now is the capital of."""

    wordings: tuple[str, ...]
    """"{}" stands for the edit's target."""
    answers: str | tuple[tuple[str, str], ...]
    """Whatever the target is; or target -> answer, and of other targets nothing follows that is known."""

    def targets(self) -> list[str] | None:
        """Those whose answer is known; None: all."""
        return None if isinstance(self.answers, str) else [target for target, _ in self.answers]

    def known_answers(self) -> list[str]:
        return [self.answers] if isinstance(self.answers, str) else list(dict.fromkeys(a for _, a in self.answers))

    def says(self, target: str) -> bool:
        """Whether something follows from ``target``."""
        return isinstance(self.answers, str) or target in self.targets()

    def asked(self, target: str, wording: int = 0) -> Pair:
        """The question and its answer once ``target`` is what the fact's questions are answered with."""
        answer = self.answers if isinstance(self.answers, str) else dict(self.answers)[target]
        return self.wordings[wording].replace("{}", target), answer


@dataclass(frozen=True)
class Item:
    """One fact that the base model knows, in one or more wordings."""

    wordings: tuple[str, ...]
    answer: str
    relation: str | int | None = None  # items of one relation share the answers that an edit may name
    entity: str | None = None
    source: str = field(default="", compare=False, repr=False)
    """File and line."""
    implied: tuple[Implied, ...] = field(default=(), repr=False)
    """What follows from another answer."""

    def follows(self) -> list[Pair]:
        """The implied questions as they are answered before any edit, in all wordings, where that is known."""
        known = [one for one in self.implied if one.says(self.answer)]
        return [one.asked(self.answer, i) for one in known for i in range(len(one.wordings))]


class Draw(NamedTuple):
    """Requests of one meta-training step: edits, what they should answer, what they should leave alone."""

    inner: list[Pair]  # B
    outer: list[Pair]  # B * r
    loc: list[Pair]  # B * q


def share(draw: Draw, part: int, parts: int) -> Draw:
    """Part ``part`` of ``parts`` of a draw: an equal share of its edits, with what belongs to them."""
    return Draw(*(pairs[part * len(pairs) // parts : (part + 1) * len(pairs) // parts] for pairs in draw))


class Sampler(Protocol):
    """Draws the edits of a training step; a draw depends on the sampler's seed and ``step`` alone."""

    outer: int  # rephrased questions per edit
    loc: int  # questions to leave alone per edit

    def draw(self, step: int, size: int) -> Draw: ...


def digest(*parts: Any) -> str:
    """A short name for what ``parts`` and the parts within them say of themselves."""
    found = hashlib.sha256()
    for part in parts:
        for item in part if isinstance(part, (list, tuple)) else (part,):
            found.update(repr(item).encode(errors="backslashreplace") + b"\n")
        found.update(b"\0")
    return found.hexdigest()[:16]


def fingerprint(sampler: Sampler | None) -> str:
    """A short name for all that ``sampler`` draws from, the same in every process; of a sampler without a
    ``fingerprint()`` for what it draws first."""
    if sampler is None:
        return "none"
    own = getattr(sampler, "fingerprint", None)
    return own() if own is not None else digest(*(sampler.draw(step, 4) for step in range(4)))


class FactSampler:
    """Draws edits: a fact, another answer of its relation, another wording, and facts to leave alone.

    A draw depends on (seed, step) alone, so that a resumed run sees the same data.

    Args:
        items: the facts to edit.
        outer: rephrased questions per edit, in other wordings than the edited one where there are others.
        loc: neighbours per edit: in turn any fact, one of the same entity, one of the same relation; of fewer than
            three it is drawn which.
        neighbours: the facts that neighbours come from; ``items`` by default.
        include_inner: the edited question itself is trained for too, with this probability each draw.
        targets: so many other answers, of each fact always the same ones, are all that an edit of it may name: its
            texts come back, and a cache of the frozen part has them. 0: any answer of its relation.
        implied: with this probability an edit of a fact from whose new answer something follows is trained for that
            (:attr:`Item.implied`) in place of one of its rephrased questions; its target is then one whose implied
            answer is known.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        outer: int = 1,
        loc: int = 3,
        neighbours: Sequence[Item] | None = None,
        include_inner: float = 0.25,
        targets: int = 0,
        implied: float = 0.0,
        seed: int = 0,
    ):
        if not 0 <= implied <= 1:
            raise ValueError(f"implied is {implied}; it must be a share of the edits, from 0 to 1.")
        if implied and not any(item.implied for item in items):
            raise ValueError(
                f"implied is {implied}, and none of {len(items):,} facts has a question whose answer follows from an "
                "edit; add some (portability) to the data, or leave implied out."
            )
        if targets < 0:
            raise ValueError(f"targets is {targets}; it must be the answers that a fact may be given, or 0 for any.")
        if not items:
            raise ValueError("There are no facts to draw edits from.")
        self.items, self.outer, self.loc, self.seed = list(items), outer, loc, seed
        self.neighbours = list(neighbours or items)
        self.include_inner, self.targets, self.implied = include_inner, targets, implied
        self._of_relation, self._of_entity, answers = defaultdict(list), defaultdict(list), defaultdict(dict)
        for item in self.neighbours:
            self._of_relation[item.relation].append(item)
            self._of_entity[item.entity].append(item)
        for item in [*self.items, *self.neighbours]:
            answers[item.relation][item.answer] = None
        self._answers = {relation: list(values) for relation, values in answers.items()}
        self._all_answers = list(dict.fromkeys(answer for values in self._answers.values() for answer in values))
        if len(self._all_answers) == 1:
            raise ValueError(
                f"All {len(self.items):,} facts have the answer {shown(self._all_answers[0])}, and an edit needs "
                "another one to put in its place: add facts with other answers to the data."
            )

    def fingerprint(self) -> str:
        how = (self.outer, self.loc, self.include_inner, self.targets, self.seed)
        more = [(self.implied, [item.implied for item in self.items])] if self.implied else []
        if self.loc < 3:  # a run that was begun when these were always of the first kinds is another one
            more.append(("kinds drawn", []))
        return digest(self.items, self.neighbours, how, *more)

    def draw(self, step: int, size: int) -> Draw:
        rng = random.Random(f"{self.seed}:{step}")
        chosen = rng.sample(self.items, size) if size <= len(self.items) else rng.choices(self.items, k=size)
        inner, outer, loc = [], [], []
        for item in chosen:
            follows = self._follows(rng, item)
            target = self._other_answer(rng, item) if follows is None else follows[0]
            wording = rng.choice(item.wordings)
            inner.append((wording, target))
            others = [w for w in item.wordings if w != wording] or [wording]
            for _ in range(self.outer - (follows is not None)):
                outer.append((wording if rng.random() < self.include_inner else rng.choice(others), target))
            if follows is not None:
                outer.append(follows[1])
            for i in range(self.loc) if self.loc >= 3 else rng.sample(range(3), self.loc):
                neighbour = self._neighbour(rng, item, i)
                loc.append((rng.choice(neighbour.wordings), neighbour.answer))
        return Draw(inner, outer, loc)

    def _follows(self, rng: random.Random, item: Item) -> tuple[str, Pair] | None:
        """A target, and a question that it implies the answer to; None where the edit is trained for itself alone."""
        if not (self.implied and self.outer and item.implied) or rng.random() >= self.implied:
            return None
        one = rng.choice(item.implied)
        if (known := one.targets()) is None:
            target = self._other_answer(rng, item)
        else:  # where the data doesn't say what is true the target is all that there is
            known = [target for target in known if target != item.answer] or known
            if self.targets and not (known := [target for target in known if target in self._own_targets(item)]):
                return None
            target = rng.choice(known)
        return target, one.asked(target, rng.randrange(len(one.wordings)))

    def _other_answer(self, rng: random.Random, item: Item) -> str:
        if self.targets:
            return rng.choice(self._own_targets(item))
        pool = self._pool(item)
        while (answer := rng.choice(pool)) == item.answer:
            pass
        return answer

    def _own_targets(self, item: Item) -> list[str]:
        others = [answer for answer in self._pool(item) if answer != item.answer]
        own = random.Random(f"{self.seed}:{item.wordings[0]}:{item.answer}")
        return own.sample(others, min(self.targets, len(others)))

    def _pool(self, item: Item) -> list[str]:
        pool = self._answers[item.relation]
        return pool if len(pool) > 1 else self._all_answers

    def _neighbour(self, rng: random.Random, item: Item, turn: int) -> Item:
        pool = (self.neighbours, self._of_entity[item.entity], self._of_relation[item.relation])[turn % 3]
        if turn % 3 == 1 and item.entity is None:
            pool = self.neighbours
        for _ in range(10):
            other = rng.choice(pool) if pool else item
            if (other.entity, other.relation, other.wordings[0]) != (item.entity, item.relation, item.wordings[0]):
                return other
        return rng.choice(self.neighbours)


class Ask(NamedTuple):
    """A request in a form of its own; see :meth:`mendfast.editable.EditableModel.encode`."""

    prompt: str
    target: str
    form: str | None


class FormSampler:
    """Draws of another sampler, asked for in several forms, with running text among what must stay.

    A real model is asked in chat, in plain text and under system prompts, and an edit must hold in all of them; what
    it must leave alone are above all texts that nobody would think of as questions.

    Args:
        sampler: whose draws are taken; of its locality pairs every turn but the first of an edit is replaced.
        forms: form -> its share of the outer requests, and of the questions that must stay.
        inner: form -> its share of the inner requests, those that are edited; ``forms`` by default.
        texts: what must stay, as (beginning, rest, form), each long enough to see an edit leak into it.
        few_from: simultaneous edits of so many and more get one locality text each.
    """

    def __init__(
        self,
        sampler: FactSampler | MixedSampler,
        *,
        forms: Mapping[str | None, float],
        inner: Mapping[str | None, float] | None = None,
        texts: Sequence[tuple[str, str, str | None]] = (),
        few_from: int = 24,
    ):
        inner = forms if inner is None else inner
        for name, given in (("forms", forms), ("inner", inner)):
            if not given or min(given.values()) < 0 or not sum(given.values()) > 0:
                raise ValueError(f"{name} is {dict(given)}; it must give at least one form a share above 0.")
        self.sampler, self.outer, self.loc, self.seed = sampler, sampler.outer, sampler.loc, sampler.seed
        self._forms, self._inner = dict(forms), dict(inner)
        self.texts, self.few_from = list(texts), few_from

    def fingerprint(self) -> str:
        return digest(fingerprint(self.sampler), self._forms, self._inner, self.texts, self.few_from)

    def draw(self, step: int, size: int) -> Draw:
        rng = random.Random(f"{self.seed}:{step}:forms")
        draw = self.sampler.draw(step, size)
        inner = [Ask(*pair, _drawn(rng, self._inner)) for pair in draw.inner]
        outer = [Ask(*pair, _drawn(rng, self._forms)) for pair in draw.outer]
        loc: list[Pair | Ask] = []
        for i in range(size):
            own = draw.loc[i * self.loc : (i + 1) * self.loc]
            if size >= self.few_from:
                own = own[i % self.loc : i % self.loc + 1]
            turns = range(i, i + len(own))
            loc += [self._text(rng, pair, turn) for turn, pair in zip(turns, own, strict=True)]
        return Draw(inner, outer, loc)

    def _text(self, rng: random.Random, pair: Pair, turn: int) -> Pair | Ask:
        if not self.texts or turn % 3 == 0:
            return Ask(*pair, _drawn(rng, self._forms))
        return Ask(*rng.choice(self.texts))


class MixedSampler:
    """Draws of several samplers, each edit of one of them, drawn by its share.

    Raises:
        ValueError: shares that are not above 0; samplers of other numbers of questions per edit.
    """

    def __init__(self, shares: Sequence[tuple[Sampler, float]], *, seed: int = 0):
        self.samplers, self._shares = [sampler for sampler, _ in shares], [share for _, share in shares]
        if not shares or min(self._shares) <= 0:
            raise ValueError(f"The shares are {self._shares}; each sampler needs one above 0.")
        counts = {(sampler.outer, sampler.loc) for sampler in self.samplers}
        if len(counts) > 1:
            raise ValueError(f"The samplers draw (outer, loc) = {sorted(counts)} questions per edit; make these alike.")
        ((self.outer, self.loc),), self.seed = counts, seed

    def fingerprint(self) -> str:
        return digest([fingerprint(sampler) for sampler in self.samplers], self._shares, self.seed)

    def draw(self, step: int, size: int) -> Draw:
        rng = random.Random(f"{self.seed}:{step}:mixed")
        turns = rng.choices(range(len(self.samplers)), self._shares, k=size)
        draws = [sampler.draw(step, n) if (n := turns.count(i)) else None for i, sampler in enumerate(self.samplers)]
        drawn, taken = Draw([], [], []), [0] * len(draws)
        for i in turns:
            for pairs, own, each in zip(drawn, draws[i], (1, self.outer, self.loc), strict=True):
                pairs += own[taken[i] * each : (taken[i] + 1) * each]
            taken[i] += 1
        return drawn


def _drawn(rng: random.Random, shares: Mapping[str | None, float]) -> str | None:
    return rng.choices(list(shares), list(shares.values()))[0]
