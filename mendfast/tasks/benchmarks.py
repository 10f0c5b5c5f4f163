"""Records of the benchmarks that papers on editing report, into examples.

- ``wikibigedit``: update, ans, rephrase, personas, mhop, mhop_ans, loc, loc_ans.
- ``ultraeditbench``: prompt, ans, rephrase_prompt, loc, loc_ans.
- ``mquake``: requested_rewrite (a list: these edits are made together), questions and new_answer, new_single_hops. The
  questions of several hops are portability; hops that are not edited are to stay, and are locality.
- ``unke``: question, para_question, a long answer, and sub_question, sub_answer about what it says: portability.
- ``akew``: CounterFact, MQuAKE and WikiUpdate with a text beside each fact, requested_rewrite.fact_new_uns, which is
  the target here, and what it says, unsfact_triplets_GPT: portability. To have the short facts of the same files edited
  name the format ``counterfact`` or ``mquake``.

KnowEdit's files (zsRE, WikiData-recent, -counterfact, WikiBio) and CKnowEdit's (Chinese; target_old is what the model
said) have the fields of ``jsonl``; ``knowedit`` and ``cknowedit`` are that. There is no space before a Chinese answer:
``MendConfig(separator="")``.

Of an answer in several spellings, as KnowEdit gives them in one list, the first counts; MQuAKE's new_answer_alias is a
field of its own, and named as not used.

Sources: Thede et al. 2025 (WikiBigEdit); Gu et al. 2026 (UltraEditBench); Zhong et al. 2023 (MQuAKE); Deng et al. 2025
(UnKE); Wu et al. 2024 (AKEW); Fang et al. 2025 (CKnowEdit); Zhang et al. 2024 (KnowEdit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from .records import Bad, Example, beside, optional, others, pairs, required, rewritten, show, texts

Parsed = tuple[Example, str]


def format_of(record: Mapping[str, Any]) -> str:
    """Whose fields these are; "" where nobody's."""
    rewrite = record.get("requested_rewrite")
    if rewrite is not None:
        several = isinstance(rewrite, list)
        facts = rewrite if several else [rewrite]
        if any(isinstance(fact, dict) and "fact_new_uns" in fact for fact in facts):
            return "akew"
        return "mquake" if several else "counterfact"
    return next((name for name, keys in _SIGNS if all(key in record for key in keys)), "")


_SIGNS = (
    ("zsre", ("src",)),
    ("kilt", ("input",)),
    ("wikibigedit", ("update", "ans")),
    ("unke", ("question", "para_question")),
    ("jsonl", ("prompt", "target")),
    ("jsonl", ("prompt", "target_new")),
    ("ultraeditbench", ("prompt", "ans")),
    ("jsonl", ("prompt",)),
    ("jsonl", ("question",)),
    ("jsonl", ("text",)),
)


def _wikibigedit(record: dict[str, Any]) -> Parsed:
    target = required(record, "ans")
    asked = [(optional(record, "personas"), target), (optional(record, "mhop"), optional(record, "mhop_ans"))]
    return _flat(record, required(record, "update"), target, asked, "rephrase")


def _ultraeditbench(record: dict[str, Any]) -> Parsed:
    return _flat(record, required(record, "prompt"), required(record, "ans"), [], "rephrase_prompt")


def _flat(
    record: dict[str, Any], prompt: str, target: str, asked: Iterable[tuple[str | None, str | None]], rephrased: str
) -> Parsed:
    example = Example(
        prompt=prompt,
        target=target,
        subject=optional(record, "subject"),
        rephrasings=others(prompt, texts(record, rephrased)),
        locality=beside(record, "loc", "loc_ans"),
        portability=tuple((question, answer) for question, answer in asked if question and answer),
    )
    return example, ""


def _unke(record: dict[str, Any]) -> Parsed:
    prompt = required(record, "question")
    questions, answers = texts(record, "sub_question"), texts(record, "sub_answer")
    if len(questions) != len(answers):
        raise Bad("sub_answer", f"has {len(answers)} answers to the {len(questions)} of sub_question")
    example = Example(
        prompt=prompt,
        target=required(record, "answer"),
        rephrasings=others(prompt, texts(record, "para_question")),
        portability=tuple(zip(questions, answers, strict=True)),
    )
    return example, ""


def _mquake(record: dict[str, Any]) -> Parsed:
    return _rewrites(record, _fact)


def _akew(record: dict[str, Any]) -> Parsed:
    return _rewrites(record, _text)


def _rewrites(record: dict[str, Any], parse: Callable[[dict[str, Any], str], Example]) -> Parsed:
    given = record.get("requested_rewrite")
    rewrites = given if isinstance(given, list) else [given]
    if not rewrites or not all(isinstance(rewrite, dict) for rewrite in rewrites):
        raise Bad("requested_rewrite", f"is {show(given)}; it must be a JSON object or a list of them")
    prefixes = [f"requested_rewrite[{i}]." if given is rewrites else "requested_rewrite." for i in range(len(rewrites))]
    first, *more = (parse(rewrite, prefix) for rewrite, prefix in zip(rewrites, prefixes, strict=True))
    edited = {question for part in (first, *more) for question in (part.prompt, *part.rephrasings)}
    hops = [pair for pair in pairs(record, "new_single_hops", answer_needed=True) if pair[0] not in edited]
    near = tuple((text, next(iter(first.answers), None)) for text in texts(record, "neighborhood_prompts"))
    answer = optional(record, "new_answer")
    questions = texts(record, "questions") if answer else ()
    example = replace(
        first,
        rephrasings=others(first.prompt, (*texts(record, "paraphrase_prompts"), *first.rephrasings)),
        locality=(*hops, *near, *beside(record, "loc", "loc_ans")),
        portability=(*first.portability, *((question, answer) for question in questions)),
        together=tuple(more),
    )
    same = [prefix for part, prefix in zip(example.parts, prefixes, strict=True) if part.target in part.answers]
    return example, f"{same[0]}target_new" if len(same) == len(prefixes) else ""


def _fact(rewrite: dict[str, Any], prefix: str) -> Example:
    subject = required(rewrite, "subject", prefix=prefix)
    prompt = _filled(rewrite, subject, prefix)
    return Example(
        prompt=prompt,
        target=rewritten(rewrite, "target_new", prefix),
        subject=subject,
        answers=_true(rewrite, prefix),
        rephrasings=others(prompt, texts(rewrite, "question", prefix=prefix)),
    )


def _text(rewrite: dict[str, Any], prefix: str) -> Example:
    """The same fact, told by a text; a text answers a question rather than the beginning of a sentence."""
    subject = required(rewrite, "subject", prefix=prefix)
    wordings = [*texts(rewrite, "prompt_full", prefix=prefix), *texts(rewrite, "question", prefix=prefix)]
    prompt, *more = wordings or [_filled(rewrite, subject, prefix)]
    said = rewrite.get("unsfact_triplets_GPT") or []
    if not isinstance(said, list) or not all(isinstance(fact, dict) for fact in said):
        raise Bad(f"{prefix}unsfact_triplets_GPT", f"is {show(said)}; it must be a list of JSON objects")
    where = f"{prefix}unsfact_triplets_GPT."
    return Example(
        prompt=prompt,
        target=required(rewrite, "fact_new_uns", prefix=prefix),
        subject=subject,
        answers=_true(rewrite, prefix),
        rephrasings=others(prompt, more),
        portability=tuple(
            (_filled(fact, optional(fact, "subject") or "", where), required(fact, "target", prefix=where))
            for fact in said
        ),
    )


def _filled(rewrite: dict[str, Any], subject: str, prefix: str) -> str:
    return required(rewrite, "prompt", prefix=prefix).replace("{}", subject)


def _true(rewrite: dict[str, Any], prefix: str) -> tuple[str, ...]:
    name = next((name for name in ("target_true", "answer_true") if rewrite.get(name) is not None), None)
    return (rewritten(rewrite, name, prefix),) if name else ()


PARSERS: dict[str, Callable[[dict[str, Any]], Parsed]] = {
    "wikibigedit": _wikibigedit,
    "ultraeditbench": _ultraeditbench,
    "mquake": _mquake,
    "unke": _unke,
    "akew": _akew,
}
