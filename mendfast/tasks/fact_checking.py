"""Fact checking: a claim is true or false, and an edit flips the verdict.

Formats, seen from the records themselves:

- FEVER in the KILT style, plain or as KnowledgeEditor and MEND enrich it: input, output[].answer (SUPPORTS or
  REFUTES), and prediction, alternatives, rephrases, filtered_rephrases.
- one's own, as JSON or tab-separated: claim, label, and optionally target, subject, rephrasings, locality.
- "world", "world:train", "world:test": claims made from the facts that come with the package, of all entities
  or of those that editors are trained or measured on; "world:train:author,painter": of those relations alone.

Sources: Thorne et al. 2018 (FEVER); Petroni et al. 2021 (KILT); De Cao et al. 2021 (rephrasings, alternatives).
"""

from __future__ import annotations

import random
from typing import Any

from ..labels import class_ids
from ..training import Item
from ..training.data import Pair
from . import claims, world
from .records import Bad, Example, Problem, optional, others, read_examples, required, show, texts
from .task import FactTask

TRUE, FALSE = "true", "false"
_VERDICTS = {"supports": TRUE, "supported": TRUE, "true": TRUE, "1": TRUE,
             "refutes": FALSE, "refuted": FALSE, "false": FALSE, "0": FALSE}  # fmt: skip
_REPHRASINGS = ("filtered_rephrases", "rephrasings", "rephrases", "rephrase")


class FactChecking(FactTask):
    """Claims with their verdicts, for encoders with a classifier's head: (claim, "true" or "false")."""

    key, bases = "fact_checking", ("bert",)

    def __init__(
        self, examples: list[Example], problems: list[Problem], items: list[Item], base_pairs: list[Pair] | None = None
    ):
        super().__init__(examples, problems)
        self.items, self._base_pairs = items, base_pairs

    @classmethod
    def load(cls, data: str, *, limit: int | None = None, seed: int = 0) -> FactChecking:
        """Read a file or Hub dataset, or make claims from the package's facts; see the module."""
        if data.partition(":")[0] == "world":
            return cls._world(*data.split(":", 2)[1:], limit=limit, seed=seed)
        examples, problems = read_examples(data, _parse, limit=limit, columns=("claim", "label"))
        items = [Item((e.prompt, *e.rephrasings), e.answers[0], None, e.subject, e.source) for e in examples]
        return cls(examples, problems, items)

    @classmethod
    def _world(cls, part: str = "", relations: str = "", *, limit: int | None, seed: int) -> FactChecking:
        train, test = world.splits()
        facts = world.load_facts()
        parts = {"": facts, "train": train, "test": test}
        if part not in parts:
            raise ValueError(f'There is no part {part!r} of the world; pass "world", "world:train" or "world:test".')
        known = list(claims.WORDINGS)
        chosen_relations = [name.strip() for name in relations.split(",")] if relations else known
        if unknown := [name for name in chosen_relations if name not in known]:
            raise ValueError(f"The world has no relation {unknown[0]!r}; it has {', '.join(known)}.")
        every = [claim for claim in claims.claims(facts) if claim.fact.relation in chosen_relations]
        chosen = set(parts[part])
        made = [claim for claim in every if claim.fact in chosen]
        rng = random.Random(seed)
        if limit is not None:  # of all relations, not of the first
            made = rng.sample(made, min(limit, len(made)))
        items, examples = [], []
        for i, claim in enumerate(made):
            *wordings, held_out = claim.wordings()
            verdict = TRUE if claim.true else FALSE
            fact = claim.fact
            source = f"{fact.relation}:{i + 1}"
            items.append(Item(tuple(wordings), verdict, fact.relation, fact.entity, source))
            examples.append(
                Example(
                    prompt=rng.choice(wordings),
                    target=FALSE if claim.true else TRUE,
                    subject=fact.entity,
                    answers=(verdict,),
                    rephrasings=(held_out,),
                    source=source,
                )
            )
        pairs = [(wording, TRUE if claim.true else FALSE) for claim in every for wording in claim.wordings()]
        return cls(examples, [], items, pairs)

    def base_pairs(self) -> list[Pair]:
        """Every wording of every claim; of the world's claims all parts, so that one model serves them."""
        return self._base_pairs or super().base_pairs()

    def check(self, model: Any, kind: str) -> None:
        known = class_ids(model.config) if kind == "classifier" else {}
        if not {TRUE, FALSE} <= set(known):
            found = f"a head for {', '.join(known)}" if known else "no classifier's head"
            raise ValueError(
                f"Fact checking needs a sequence classifier of one logit, or with the labels true and false; "
                f"{type(model).__name__} has {found}. Name its labels in config.label2id, or use another task."
            )


def _parse(record: Any) -> tuple[Example, str]:
    if not isinstance(record, dict):
        raise Bad("", f"is {show(record)}; a record is a JSON object")
    claim = required(record, "input") if "input" in record else required(record, "claim", "prompt", "text")
    truth = _truth(record)
    # Where the data says what a model answered, an edit is to change that.
    believed = _verdict(required(record, "prediction"), "prediction") if record.get("prediction") else truth
    field = next((name for name in ("target", "alternatives") if texts(record, name)), "")
    target = _verdict(texts(record, field)[0], field) if field else (FALSE if believed == TRUE else TRUE)
    example = Example(
        prompt=claim,
        target=target,
        subject=optional(record, "subject"),
        answers=(truth,),
        rephrasings=others(claim, texts(record, *_REPHRASINGS)),
    )
    return example, field if target == believed else ""


def _truth(record: dict[str, Any]) -> str:
    if "output" not in record:
        return _verdict(_label(record), "label")
    output = record["output"]
    if not isinstance(output, list):
        raise Bad("output", f'is {show(output)}; it must be a list of {{"answer": ...}}')
    given = [item["answer"] for item in output if isinstance(item, dict) and item.get("answer") is not None]
    return _verdict(required({"output": given}, "output"), "output")


def _label(record: dict[str, Any]) -> str:
    value = record.get("label")
    return str(int(value)) if isinstance(value, (bool, int)) else required(record, "label")


def _verdict(text: str, field: str) -> str:
    try:
        return _VERDICTS[text.strip().lower()]
    except KeyError:
        raise Bad(field, f"is {text!r}; it must be SUPPORTS or REFUTES, or true or false") from None
