"""Question answering: edits read from the formats that the field uses, one broken line never ending the run.

Formats, seen from the records themselves:

- ``tsv``: question TAB answer.
- ``jsonl``: one's own: prompt, target, and optionally subject, answers, rephrasings, locality, portability;
  also under EasyEdit's names (target_new, ground_truth, rephrase_prompt, locality_prompt, ...).
- ``kilt``: zsRE in the KILT style, plain or as KnowledgeEditor and MEND enrich it: input, output[].answer,
  and alternatives, rephrases, filtered_rephrases, meta.template_questions.
- ``zsre``: subject, src, pred, rephrase, alt, answers, loc, loc_ans, cond of ROME and EasyEdit.
- ``counterfact``: requested_rewrite, paraphrase_prompts, neighborhood_prompts of ROME.
- ``knowedit``, ``wikibigedit``, ``ultraeditbench``, ``mquake``, ``unke``, ``akew``, ``cknowedit``: see
  :mod:`mendfast.tasks.benchmarks`.

Sources: Levy et al. 2017 (zsRE); Petroni et al. 2021 (KILT); De Cao et al. 2021 and Mitchell et al. 2022
(the enriched zsRE); Meng et al. 2022 (CounterFact); Yao et al. 2023 (portability).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..schema import some
from ..training import Implied, Item
from . import world
from .benchmarks import PARSERS, format_of
from .records import (
    Bad,
    Example,
    Noted,
    Problem,
    beside,
    optional,
    others,
    pairs,
    printable,
    read_examples,
    required,
    rewritten,
    show,
    texts,
)
from .task import FactTask
from .wordings import mine_wordings

log = logging.getLogger("mendfast")

QAExample = Example

_NAMED = 40  # unused fields that the warning names
FORMATS = ("auto", "tsv", "jsonl", "kilt", "zsre", "counterfact", "knowedit", "cknowedit", *PARSERS)


def read_qa(
    path_or_hub_name: str | Path, *, limit: int | None = None, format: str = "auto"
) -> tuple[list[QAExample], list[Problem]]:
    """Read question answering edits; see :func:`mendfast.tasks.records.read_examples`. Fields of the data that are
    not used are named in one warning.

    Args:
        format: one of :data:`FORMATS`; "auto" goes by each record's fields.

    Raises:
        ValueError: an unknown format, no such file or dataset, ``datasets`` not installed, no example in it.
    """
    if format not in FORMATS:
        raise ValueError(f"The format {format!r} is unknown; take one of {', '.join(FORMATS)}.")
    tabs = {"auto": None, "tsv": True}.get(format, False)
    idle: dict[str, None] = {}
    found = read_examples(path_or_hub_name, lambda record: _parse(record, format, idle), limit=limit, tabs=tabs)
    if idle:
        log.warning("%s: the fields %s are not used.", path_or_hub_name, some(map(printable, idle), _NAMED))
    return found


# -- records into examples -------------------------------------------------------------------------


def _parse(record: Any, format: str, idle: dict[str, None]) -> tuple[QAExample, str]:
    """The example, and the field whose target is already the answer ("" where it is not); ``idle`` gets the fields
    that it is not made of."""
    if not isinstance(record, dict):
        raise Bad("", f"is {show(record)}; a record is a JSON object")
    if format in ("auto", "tsv"):
        format = format_of(record)
        if not format:
            fields = some(map(printable, record)) or "(none)"
            raise Bad("", f"has the fields {fields}, which are those of no known format")
    noted = Noted(record)
    found = _PARSERS[format](noted)
    idle |= dict.fromkeys(noted.unread())
    return found


_TRUE = ("answers", "ground_truth", "answer", "target_true", "target_old")


def _own(record: dict[str, Any]) -> tuple[QAExample, str]:
    prompt = required(record, "prompt", "question", "text")
    target = required(record, "target", "target_new", "answer", "labels", "answers")
    answers = texts(record, *_TRUE) or (target,)
    explicit = next((key for key in ("target", "target_new") if record.get(key) is not None), "")
    stated = any(record.get(key) is not None for key in _TRUE)
    locality = pairs(record, "locality", answer_needed=False)
    portability = pairs(record, "portability", answer_needed=True)
    more = beside(record, "portability_prompt", "portability_ground_truth", "portability_answer")
    example = QAExample(
        prompt=prompt,
        target=target,
        subject=optional(record, "subject", "concept"),
        answers=answers,
        rephrasings=others(prompt, texts(record, *_REPHRASINGS)),
        locality=locality + beside(record, "locality_prompt", "locality_ground_truth", "locality_answer"),
        portability=portability + tuple((question, answer) for question, answer in more if answer),
    )
    return example, explicit if stated and target in answers else ""


_REPHRASINGS = ("rephrasings", "rephrases", "rephrase", "rephrase_prompt")


def _kilt(record: dict[str, Any]) -> tuple[QAExample, str]:
    prompt, subject = required(record, "input"), None
    meta = record.get("meta") or {}
    if not isinstance(meta, dict):
        raise Bad("meta", f"is {show(meta)}; it must be a JSON object")
    wordings = texts(meta, "template_questions", prefix="meta.")
    if " [SEP] " in prompt:  # the plain KILT release: subject [SEP] relation, its questions beside it
        subject = prompt.partition(" [SEP] ")[0].strip()
        prompt, wordings = (wordings[0], wordings[1:]) if wordings else (prompt, ())
    output = record.get("output")
    if not isinstance(output, list):
        raise Bad("output", f'is {show(output)}; it must be a list of {{"answer": ...}}')
    given = [item["answer"] for item in output if isinstance(item, dict) and item.get("answer") is not None]
    answers = texts({"output": given}, "output")
    alternatives = texts(record, "alternatives")
    if not (answers or alternatives):
        raise Bad("output", "has no answer")
    target = next((text for text in alternatives if text not in answers), (alternatives or answers)[0])
    # Where the filtered ones are given the others were found to change the meaning.
    kept = "filtered_rephrases" if "filtered_rephrases" in record else "rephrases"
    rephrasings = others(prompt, texts(record, kept) + wordings)
    example = QAExample(prompt, target, subject or optional(record, "subject"), answers, rephrasings)
    return example, "alternatives" if alternatives and target in answers else ""


def _zsre(record: dict[str, Any]) -> tuple[QAExample, str]:
    prompt, target = required(record, "src"), required(record, "alt", "ans")
    answers = texts(record, "answers")
    loc = optional(record, "loc")
    example = QAExample(
        prompt=prompt,
        target=target,
        subject=optional(record, "subject"),
        answers=answers,
        rephrasings=others(prompt, texts(record, "rephrase")),
        locality=((loc, optional(record, "loc_ans")),) if loc else (),
        portability=pairs(record, "portability", answer_needed=True),
    )
    return example, "alt" if target in answers else ""


def _counterfact(record: dict[str, Any]) -> tuple[QAExample, str]:
    rewrite = record.get("requested_rewrite")
    if not isinstance(rewrite, dict):
        raise Bad("requested_rewrite", f"is {show(rewrite)}; it must be a JSON object")
    prefix = "requested_rewrite."
    subject = required(rewrite, "subject", prefix=prefix)
    prompt = required(rewrite, "prompt", prefix=prefix)
    if "{}" not in prompt and subject not in prompt:
        raise Bad(prefix + "prompt", f"is {show(prompt)}; it must have {{}} where the subject goes")
    prompt = prompt.replace("{}", subject)
    target = rewritten(rewrite, "target_new", prefix)
    true = rewritten(rewrite, "target_true", prefix) if rewrite.get("target_true") is not None else None
    example = QAExample(
        prompt=prompt,
        target=target,
        subject=subject,
        answers=(true,) if true else (),
        rephrasings=others(prompt, texts(record, "paraphrase_prompts")),
        locality=tuple((text, true) for text in texts(record, "neighborhood_prompts")),
    )
    return example, prefix + "target_new" if target == true else ""


_PARSERS: dict[str, Callable[[dict[str, Any]], tuple[QAExample, str]]] = {
    "jsonl": _own, "knowedit": _own, "cknowedit": _own, "kilt": _kilt, "zsre": _zsre, "counterfact": _counterfact,
    **PARSERS,
}  # fmt: skip


# -- the task ---------------------------------------------------------------------------------------------

WORDINGS_PER_FACT = 4


class QuestionAnswering(FactTask):
    """Questions and answers, in every format of :func:`mendfast.tasks.read_qa`."""

    key, bases = "qa", ("gpt2", "t5")

    def __init__(self, examples: list[Example], problems: list[Problem], seed: int = 0):
        super().__init__(examples, problems)
        self.seed = seed
        self._items: list[Item] | None = None

    @classmethod
    def load(cls, data: str, *, limit: int | None = None, seed: int = 0) -> QuestionAnswering:
        """Read a file or Hub dataset; "world", "world:train" and "world:test" are the facts that come with the package,
        all of them, those that editors are trained on, and those of other entities."""
        if data.partition(":")[0] != "world":
            return cls(*read_qa(data, limit=limit), seed)
        train, test = world.splits()
        parts = {"world": world.load_facts(), "world:train": train, "world:test": test}
        if data not in parts:
            raise ValueError(f"There is no part {show(data)} of the world; pass one of {', '.join(parts)}.")
        rng, facts = random.Random(seed), parts[data]
        if limit is not None:  # of all relations, not of the first
            facts = rng.sample(facts, min(limit, len(facts)))
        items = [replace(item, source=f"{data}:{i + 1}") for i, item in enumerate(world.items(facts))]
        follows = world.implied(facts, facts if data == "world:train" else world.load_facts())
        examples = []
        for item, fact in zip(items, facts, strict=True):
            prompt = rng.choice(item.wordings)
            target = rng.choice([answer for answer in world.answers(fact.relation) if answer != fact.answer])
            examples.append(
                Example(
                    prompt=prompt,
                    target=target,
                    subject=fact.entity,
                    answers=(fact.answer,),
                    rephrasings=(world.question(fact, -1),),
                    portability=tuple(one.asked(target, -1) for one in follows[fact] if one.says(target)),
                    source=item.source,
                )
            )
        task = cls(examples, [], seed)
        task.items = items
        return task

    @property
    def items(self) -> list[Item]:
        """The facts, in wordings of the data's own; mined when first asked for, which takes a while."""
        if self._items is None:
            self._items = fact_items(self.examples, self.seed)
        return self._items

    @items.setter
    def items(self, items: list[Item]) -> None:
        self._items = items

    def check(self, model: Any, kind: str) -> None:
        if kind == "classifier":
            raise ValueError(
                f"Question answering needs a model that writes; {type(model).__name__} has a classifier's head. "
                "Load it as a causal language model or an encoder-decoder, or use the task fact_checking."
            )


def fact_items(examples: Sequence[Example], seed: int = 0) -> list[Item]:
    """Facts in the data's own rephrasings, or, where it has none, in the wordings of its other questions."""
    examples = [part for example in examples for part in example.parts]
    answers = [example.answers[0] if example.answers else example.target for example in examples]
    wordings = mine_wordings([(example.prompt, answer) for example, answer in zip(examples, answers, strict=True)])
    items = []
    for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        rng = random.Random(f"{seed}:{i}")
        drawn = (wordings.rephrase(example.prompt, rng) for _ in range(2 * WORDINGS_PER_FACT))
        others = list(example.rephrasings) or [w for w in dict.fromkeys(drawn) if w and w != example.prompt]
        split = wordings.split(example.prompt)
        implied = (Implied((question,), ((example.target, follows),)) for question, follows in example.portability)
        items.append(
            Item(
                (example.prompt, *others[:WORDINGS_PER_FACT]),
                answer,
                wordings.relation(example.prompt),
                example.subject or (split[1] if split else None),
                example.source,
                tuple(implied),
            )
        )
    return items
