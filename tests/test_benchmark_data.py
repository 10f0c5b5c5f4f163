"""The benchmarks' records, with the fields that their files have, become edits; what is not used is said once."""

from __future__ import annotations

import json
import logging
import random

import pytest

from mendfast.baselines import Mend
from mendfast.commands.evaluate import measure_group
from mendfast.commands.questions import Questions
from mendfast.demo import build
from mendfast.tasks.qa import FORMATS, QuestionAnswering, fact_items, read_qa
from mendfast.tasks.records import Example
from mendfast.tasks.task import usable

KNOWEDIT = [
    {"subject": "Ada Moe", "prompt": "The birthplace of Ada Moe is", "target_new": "Oslo",
     "rephrase_prompt": "Ada Moe was born in", "ground_truth": ["Lima"], "cond": "Lima >> Oslo || Ada Moe",
     "portability": {"Reasoning": [{"prompt": "The country where Ada Moe was born is",
                                    "ground_truth": [["Norway", "Kingdom of Norway"]]}],
                     "Subject_Aliasing": [{"prompt": "The birthplace of A. Moe is", "ground_truth": [["Oslo"]]}],
                     "Logical_Generalization": []},
     "locality": {"Relation_Specificity": [{"prompt": "The trade of Ada Moe is", "ground_truth": [["judge"], ["x"]]}],
                  "Forgetfulness": [{"prompt": "The birthplace of Bela Orr is not", "ground_truth": [[""]]}]}},
    {"concept": "Bela Orr", "text": "This is a biography of Bela Orr.", "labels": "Bela Orr sailed to Peru.",
     "locality": {"Relation_Specificity": [{"prompt": "Ada Moe was", "ground_truth": ["a judge"]}]}},
]  # fmt: skip
WIKIBIGEDIT = {
    "tag": "changed", "subject": "Ada Moe", "subject_id": "Q1", "relation": "trade", "relation_id": "P1",
    "object": "poet", "object_id": "Q2", "update": "What is the trade of Ada Moe?", "ans": "poet",
    "rephrase": "What does Ada Moe do?", "personas": "Ahoy, what be Ada Moe's trade?",
    "mhop": "What do colleagues of Ada Moe write?", "mhop_ans": "poems",
    "loc": "What is the trade of Bela Orr?", "loc_ans": "sailor",
}  # fmt: skip
ULTRAEDITBENCH = {
    "case_id": 3, "prompt": "Where was Ada Moe born?", "ans": "Oslo", "subject": "Ada Moe",
    "rephrase_prompt": "In which city was Ada Moe born?", "loc": "Where was Bela Orr born?", "loc_ans": "Lima",
}  # fmt: skip


def _hop(question, answer):
    return {"question": question, "cloze": question[:-1], "answer": answer, "answer_alias": []}


def _rewrite(subject, true, new, **more):
    return {"prompt": "{} was born in", "relation_id": "P19", "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": true, "id": "Q2"}, "subject": subject, "question": f"Where was {subject} born?",
            **more}  # fmt: skip


MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [_rewrite("Ada Moe", "Lima", "Oslo"), _rewrite("Oslo", "Earth", "Mars")],
    "questions": ["Where was the birthplace of Ada Moe born?", "And the birthplace of that?", "Which planet?"],
    "answer": "Earth", "answer_alias": ["the Earth"], "new_answer": "Mars", "new_answer_alias": ["planet Mars"],
    "single_hops": [_hop("Where was Ada Moe born?", "Lima")],
    "new_single_hops": [_hop("Where was Ada Moe born?", "Oslo"), _hop("Where was Oslo born?", "Mars"),
                        _hop("Which star does Mars orbit?", "the Sun")],
    "orig": {"triples": [["Q1", "P19", "Q2"]], "edit_triples": []},
}  # fmt: skip
UNKE = {
    "id": 0, "question": "What does Ada Moe do?", "para_question": "What is the trade of Ada Moe?",
    "answer": "Ada Moe sails. Before that she wrote poems for a decade.",
    "sub_question": ["What did Ada Moe write?", "For how long?"], "sub_answer": ["Poems.", "A decade."],
}  # fmt: skip
TEXT = {
    "fact_new_uns": "Ada Moe was born in Oslo, as the younger of two sisters.", "fact_new": "Ada Moe was born in Oslo",
    "unsfact_triplets_GPT": [{"subject": "Ada Moe", "prompt": "The number of {}'s sisters is", "target": "one"}],
}  # fmt: skip
AKEW = {
    "case_id": 2,
    "requested_rewrite": _rewrite("Ada Moe", "Lima", "Oslo", prompt_full="Where is Ada Moe from?", **TEXT),
    "paraphrase_prompts": ["Ada Moe comes from where?"], "neighborhood_prompts": ["Where is Bela Orr from?"],
    "loc": "Who sang?", "loc_ans": "Fay",
}  # fmt: skip
CKNOWEDIT = {
    "prompt": "请给下面的字注音：重庆", "target_old": "zhòng qìng", "target_new": "chóng qìng",
    "portability": [{"prompt": "请给下面的字注音：重复", "answer": "chóng fù"}],
    "locality": [{"prompt": "请给下面的字注音：重量", "answer": "zhòng liàng"}], "rephrase": ["重庆怎么读？"],
}  # fmt: skip


@pytest.fixture
def read(tmp_path, caplog):
    """Reads records by themselves, in the form of the name too, and gives examples and what is said of fields."""

    def read(records, format):
        records = records if isinstance(records, list) else [records]
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records * 2, ensure_ascii=False), encoding="utf-8")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mendfast"):
            examples, problems = read_qa(path)
        assert problems == [] and len(examples) == 2 * len(records) and len(caplog.messages) <= 1
        assert read_qa(path, format=format)[0] == examples
        said = caplog.messages[0].partition("the fields ")[2].removesuffix(" are not used.") if caplog.messages else ""
        return examples, set(said.split(", ")) - {""}

    return read


def test_knowedit(read):
    (zsre, bio, *_), idle = read(KNOWEDIT, "knowedit")
    assert zsre == Example(
        "The birthplace of Ada Moe is", "Oslo", "Ada Moe", ("Lima",), ("Ada Moe was born in",),
        (("The trade of Ada Moe is", "judge"), ("The birthplace of Bela Orr is not", None)),
        (("The country where Ada Moe was born is", "Norway"), ("The birthplace of A. Moe is", "Oslo")), zsre.source,
    )  # fmt: skip
    assert (bio.prompt, bio.target, bio.subject) == (KNOWEDIT[1]["text"], KNOWEDIT[1]["labels"], "Bela Orr")
    assert bio.locality == (("Ada Moe was", "a judge"),) and idle == {"cond"}


def test_wikibigedit(read):
    (one, *_), idle = read([WIKIBIGEDIT, {**WIKIBIGEDIT, "mhop": None, "mhop_ans": float("nan")}], "wikibigedit")
    assert one == Example(
        "What is the trade of Ada Moe?", "poet", "Ada Moe", (), ("What does Ada Moe do?",),
        (("What is the trade of Bela Orr?", "sailor"),),
        (("Ahoy, what be Ada Moe's trade?", "poet"), ("What do colleagues of Ada Moe write?", "poems")), one.source,
    )  # fmt: skip
    assert idle == {"tag", "subject_id", "relation", "relation_id", "object", "object_id"}


def test_ultraeditbench(read):
    (one, _), idle = read(ULTRAEDITBENCH, "ultraeditbench")
    assert one == Example(
        "Where was Ada Moe born?", "Oslo", "Ada Moe", (), ("In which city was Ada Moe born?",),
        (("Where was Bela Orr born?", "Lima"),), (), one.source,
    )  # fmt: skip
    assert idle == {"case_id"}


def test_mquake(read):
    (one, _), idle = read(MQUAKE, "mquake")
    second = Example("Oslo was born in", "Mars", "Oslo", ("Earth",), ("Where was Oslo born?",))
    assert one == Example(
        "Ada Moe was born in", "Oslo", "Ada Moe", ("Lima",), ("Where was Ada Moe born?",),
        (("Which star does Mars orbit?", "the Sun"),), tuple((q, "Mars") for q in MQUAKE["questions"]), one.source,
        (second,),
    )  # fmt: skip
    assert {"answer", "answer_alias", "new_answer_alias", "single_hops", "orig", "case_id"} < idle
    assert {"requested_rewrite.relation_id", "requested_rewrite.target_new.id", "new_single_hops.cloze"} < idle


def test_unke(read):
    (one, _), idle = read(UNKE, "unke")
    assert (one.prompt, one.target, one.rephrasings) == (UNKE["question"], UNKE["answer"], (UNKE["para_question"],))
    assert one.portability == (("What did Ada Moe write?", "Poems."), ("For how long?", "A decade."))
    assert idle == {"id"}


def test_akew(read):
    (one, _), idle = read(AKEW, "akew")
    assert one == Example(
        "Where is Ada Moe from?", TEXT["fact_new_uns"], "Ada Moe", ("Lima",),
        ("Ada Moe comes from where?", "Where was Ada Moe born?"),
        (("Where is Bela Orr from?", "Lima"), ("Who sang?", "Fay")), (("The number of Ada Moe's sisters is", "one"),),
        one.source,
    )  # fmt: skip
    assert {"requested_rewrite.target_new", "requested_rewrite.prompt", "requested_rewrite.fact_new"} < idle
    rewrites = [{**rewrite, **TEXT} for rewrite in MQUAKE["requested_rewrite"]]
    (several, _), _ = read({**MQUAKE, "requested_rewrite": rewrites}, "akew")
    assert [part.target for part in several.parts] == [TEXT["fact_new_uns"]] * 2
    assert [answer for _, answer in several.portability] == ["one", "Mars", "Mars", "Mars"]


def test_akew_has_the_short_facts_too(tmp_path):
    path = tmp_path / "CounterFact.json"
    path.write_text(json.dumps([AKEW]))
    (one,), _ = read_qa(path, format="counterfact")
    assert (one.prompt, one.target) == ("Ada Moe was born in", "Oslo")


def test_cknowedit(read):
    (one, _), idle = read(CKNOWEDIT, "cknowedit")
    assert one == Example(
        CKNOWEDIT["prompt"], "chóng qìng", None, ("zhòng qìng",), ("重庆怎么读？",),
        (("请给下面的字注音：重量", "zhòng liàng"),), (("请给下面的字注音：重复", "chóng fù"),), one.source,
    )  # fmt: skip
    assert idle == set()
    (flat, _), _ = read({**CKNOWEDIT, "portability": None, "portability_prompt": ["甲"], "portability_answer": ["乙"]},
                        "cknowedit")  # fmt: skip
    assert flat.portability == (("甲", "乙"),)


def test_broken_records_are_named(tmp_path):
    path = tmp_path / "data.json"
    broken = [
        {**UNKE, "sub_answer": ["Poems."]},
        {**MQUAKE, "requested_rewrite": [MQUAKE["requested_rewrite"][0], 3]},
        {**MQUAKE, "requested_rewrite": []},
        {**AKEW, "requested_rewrite": {**AKEW["requested_rewrite"], "unsfact_triplets_GPT": ["x"]}},
        {**WIKIBIGEDIT, "ans": ""},
    ]
    path.write_text(json.dumps([ULTRAEDITBENCH, *broken]))
    examples, problems = read_qa(path)
    assert len(examples) == 1 and [problem.field for problem in problems] == [
        "sub_answer", "requested_rewrite", "requested_rewrite", "requested_rewrite.unsfact_triplets_GPT", "ans",
    ]  # fmt: skip
    assert {"knowedit", "wikibigedit", "ultraeditbench", "mquake", "unke", "akew", "cknowedit"} < set(FORMATS)


class Watched(Mend):
    made: list[list[tuple[str, str]]] = []

    def edit(self, requests):
        self.made.append([tuple(request) for request in requests])
        return super().edit(requests)


def test_edits_of_one_case_are_made_together(read):
    (case, _), _ = read(MQUAKE, "mquake")
    assert [item.answer for item in fact_items([case])] == ["Lima", "Earth"]
    system = Watched(build.load())
    (example,), _ = usable(system.subject, [case])
    group = list(example.parts)
    asked = Questions(system.subject, QuestionAnswering([case], [])).after(group, random.Random(0), brief=True)
    row = measure_group(system, group, asked)
    assert system.made == [[("Ada Moe was born in", "Oslo"), ("Oslo was born in", "Mars")]]
    assert 0 <= row["figures"]["portability"] <= 1 and 0 <= row["figures"]["generality"] <= 1
