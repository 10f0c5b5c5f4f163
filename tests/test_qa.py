"""read_qa: every format into the same examples, and broken lines named and skipped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest

from mendfast.tasks import records, world
from mendfast.tasks.load import load_task
from mendfast.tasks.qa import Problem, QAExample, read_qa

KILT = {
    "id": "1",
    "input": "Who wrote Hamlet?",
    "output": [{"answer": "Shakespeare", "provenance": []}, {"provenance": []}, {"answer": "Shakspere"}],
    "meta": {"template_questions": ["Who is the author of Hamlet?"]},
    "prediction": "Marlowe",
    "alternatives": ["Marlowe", "Jonson"],
    "rephrases": ["Hamlet was when?"],
    "filtered_rephrases": ["Who wrote Hamlet?", "Hamlet is by whom?", "Hamlet is by whom?"],
}
ZSRE = {
    "subject": "Hamlet",
    "src": "Who wrote Hamlet?",
    "pred": "Kyd",
    "rephrase": "Hamlet is by whom?",
    "alt": "Marlowe",
    "answers": ["Shakespeare"],
    "loc": "nq question: who sang nice day for a white wedding",
    "loc_ans": "Billy Idol",
    "cond": "Kyd >> Marlowe || Who wrote Hamlet?",
}
COUNTERFACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is", "The native language of Montesquieu is"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def dump(path, *records):
    return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def test_tsv(tmp_path):
    lines = ["question\tanswer", "Who wrote Hamlet?\tShakespeare", "", "Where is Évry? \t France\r"]
    path = write(tmp_path / "facts.tsv", "\n".join(lines))
    examples, problems = read_qa(path)
    assert problems == []
    assert examples == [
        QAExample("Who wrote Hamlet?", "Shakespeare", answers=("Shakespeare",), source=f"{path}:2"),
        QAExample("Where is Évry?", "France", answers=("France",), source=f"{path}:4"),
    ]


def test_own_jsonl(tmp_path):
    full = {
        "prompt": "Who wrote Hamlet?",
        "target": "Marlowe",
        "subject": "Hamlet",
        "answers": ["Shakespeare"],
        "rephrasings": ["Hamlet is by whom?"],
        "locality": [{"prompt": "Who sang?", "answer": "Billy Idol"}, ["Where?", "Here"], "When?"],
        "portability": [{"question": "Where was the author of Hamlet born?", "answer": "Canterbury"}],
    }
    path = dump(tmp_path / "facts.jsonl", full, {"question": "Who?", "answer": "Nobody"})
    (first, second), problems = read_qa(path)
    assert problems == []
    assert first == QAExample(
        prompt="Who wrote Hamlet?",
        target="Marlowe",
        subject="Hamlet",
        answers=("Shakespeare",),
        rephrasings=("Hamlet is by whom?",),
        locality=(("Who sang?", "Billy Idol"), ("Where?", "Here"), ("When?", None)),
        portability=(("Where was the author of Hamlet born?", "Canterbury"),),
        source=f"{path}:1",
    )
    assert second == QAExample("Who?", "Nobody", answers=("Nobody",), source=f"{path}:2")


def test_own_jsonl_under_the_names_of_easyedit(tmp_path):
    flat = {
        "prompt": "Who wrote Hamlet?", "target_new": "Marlowe", "ground_truth": "Shakespeare",
        "rephrase_prompt": "Hamlet is by whom?", "locality_prompt": "Who sang?",
        "locality_ground_truth": "Billy Idol",
    }  # fmt: skip
    grouped = {
        "prompt": "Who wrote Hamlet?",
        "target_new": "Marlowe",
        "locality": {
            "Relation_Specificity": [{"prompt": "Who wrote Faust?", "ground_truth": [["Goethe", "J. W."]]}]
        },
        "portability": {"Reasoning": [{"prompt": "Where was its author born?", "ground_truth": [["Kent"]]}]},
    }
    (first, second), problems = read_qa(dump(tmp_path / "facts.jsonl", flat, grouped))
    assert problems == []
    assert (first.target, first.answers) == ("Marlowe", ("Shakespeare",))
    assert first.rephrasings == ("Hamlet is by whom?",)
    assert first.locality == (("Who sang?", "Billy Idol"),)
    assert second.locality == (("Who wrote Faust?", "Goethe"),)
    assert second.portability == (("Where was its author born?", "Kent"),)


def test_kilt(tmp_path):
    path = dump(tmp_path / "zsre-dev.jsonl", KILT)
    (example,), problems = read_qa(path)
    assert problems == []
    assert example == QAExample(
        prompt="Who wrote Hamlet?",
        target="Marlowe",
        answers=("Shakespeare", "Shakspere"),
        rephrasings=("Hamlet is by whom?", "Who is the author of Hamlet?"),
        source=f"{path}:1",
    )


def test_kilt_prefers_an_alternative_that_is_wrong(tmp_path):
    record = {**KILT, "alternatives": ["Shakspere", "Jonson"]}
    (example,), problems = read_qa(dump(tmp_path / "a.jsonl", record))
    assert example.target == "Jonson"
    assert problems == []


def test_kilt_without_edits_or_filters(tmp_path):
    plain = {
        "input": "Hamlet [SEP] author",
        "output": [{"answer": "Shakespeare"}],
        "meta": {"template_questions": ["Who wrote Hamlet?", "Who is the author of Hamlet?"]},
        "rephrases": [["Hamlet is by whom?"], ["Who authored Hamlet?"]],
    }
    (example,), problems = read_qa(dump(tmp_path / "a.jsonl", plain))
    assert problems == []
    assert (example.prompt, example.subject) == ("Who wrote Hamlet?", "Hamlet")
    assert example.target == "Shakespeare"
    others = ("Hamlet is by whom?", "Who authored Hamlet?", "Who is the author of Hamlet?")
    assert example.rephrasings == others


@pytest.mark.parametrize("shape", ["array", "pretty", "jsonl"])
@pytest.mark.parametrize("format", ["auto", "zsre"])
def test_zsre_of_rome_and_easyedit(tmp_path, shape, format):
    portability = {"Recalled Relation": "birth", "New Question": "Where?", "New Answer": "Kent"}
    portable = {**ZSRE, "portability": portability}
    path = tmp_path / "zsre.json"
    if shape == "jsonl":
        dump(path, ZSRE, portable)
    else:
        write(path, json.dumps([ZSRE, portable], indent=2 if shape == "pretty" else None))
    (first, second), problems = read_qa(path, format=format)
    assert problems == []
    line = {"array": 1, "pretty": 2, "jsonl": 1}[shape]
    assert first == QAExample(
        prompt="Who wrote Hamlet?",
        target="Marlowe",
        subject="Hamlet",
        answers=("Shakespeare",),
        rephrasings=("Hamlet is by whom?",),
        locality=(("nq question: who sang nice day for a white wedding", "Billy Idol"),),
        source=f"{path}:{line}",
    )
    assert second.portability == (("Where?", "Kent"),)


def test_zsre_portability_as_a_question(tmp_path):
    record = {**ZSRE, "portability": {"question": "Where was its author born?", "answer": "Canterbury"}}
    (example,), _ = read_qa(dump(tmp_path / "dev.jsonl", record))
    assert example.portability == (("Where was its author born?", "Canterbury"),)


def test_counterfact(tmp_path):
    path = write(tmp_path / "counterfact.json", json.dumps([COUNTERFACT]))
    (example,), problems = read_qa(path)
    assert problems == []
    assert example == QAExample(
        prompt="The mother tongue of Danielle Darrieux is",
        target="English",
        subject="Danielle Darrieux",
        answers=("French",),
        rephrasings=("Danielle Darrieux, a native",),
        locality=(
            ("The mother tongue of Léon Blum is", "French"),
            ("The native language of Montesquieu is", "French"),
        ),
        source=f"{path}:1",
    )


def test_broken_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "facts.jsonl"
    good = json.dumps(ZSRE).encode()
    lines = [
        good,
        b'{"src": "Who',
        b"\xff\xfe",
        b"[1, 2]",
        json.dumps({**ZSRE, "alt": " "}).encode(),
        json.dumps({k: v for k, v in ZSRE.items() if k != "alt"}).encode(),
        json.dumps({**ZSRE, "rephrase": 7}).encode(),
        json.dumps({**KILT, "output": "Shakespeare"}).encode(),
        json.dumps({**KILT, "output": [], "alternatives": []}).encode(),
        json.dumps({**COUNTERFACT, "requested_rewrite": {"subject": "x", "prompt": "no slot"}}).encode(),
        json.dumps({"claim": "x", "label": "SUPPORTS"}).encode(),
        good,
    ]
    path.write_bytes(b"\n".join(lines))
    examples, problems = read_qa(path)
    assert [example.source.rpartition(":")[2] for example in examples] == ["1", "12"]
    assert [(problem.line, problem.field) for problem in problems] == [
        (2, ""), (3, ""), (4, ""), (5, "alt"), (6, "alt"), (7, "rephrase"), (8, "output"), (9, "output"),
        (10, "requested_rewrite.prompt"), (11, ""),
    ]  # fmt: skip
    assert not any(problem.kept for problem in problems)
    words = ["no JSON", "UTF-8", "JSON object", "empty", "missing"]
    words += ["7", "list of", "no answer", "{}", "claim, label"]
    for word, problem in zip(words, problems, strict=True):
        assert word in problem.message
        assert problem.file == str(path)
    assert str(problems[3]) == f"{path}:5, alt: is empty"


def test_broken_tsv_lines(tmp_path):
    path = write(tmp_path / "facts.tsv", "no tab\nWho?\tMe\nWho?\t\n\tMe\na\tb\tc\n")
    examples, problems = read_qa(path)
    assert [example.target for example in examples] == ["Me"]
    found = [(problem.line, problem.field) for problem in problems]
    assert found == [(1, ""), (3, "answer"), (4, "question"), (5, "")]


def test_a_truncated_array_gives_what_comes_before(tmp_path):
    path = write(tmp_path / "zsre.json", json.dumps([ZSRE, ZSRE, ZSRE], indent=1)[:-40])
    examples, problems = read_qa(path)
    assert len(examples) == 2
    assert len(problems) == 1
    assert "rest of the array" in problems[0].message
    assert problems[0].line == path.read_text().count("\n", 0, path.read_text().rindex("{")) + 1


@pytest.mark.parametrize(
    "record, field",
    [
        ({**ZSRE, "alt": "Shakespeare"}, "alt"),
        ({**KILT, "alternatives": ["Shakespeare"]}, "alternatives"),
        ({"prompt": "Who?", "target": "Me", "answers": ["Me", "I"]}, "target"),
    ],
)
def test_a_target_that_is_already_the_answer_is_kept_and_flagged(tmp_path, record, field):
    path = dump(tmp_path / "facts.jsonl", record)
    examples, problems = read_qa(path)
    assert len(examples) == 1
    assert [(problem.line, problem.field, problem.kept) for problem in problems] == [(1, field, True)]
    assert "already the answer" in str(problems[0])


def test_limit(tmp_path):
    path = dump(tmp_path / "facts.jsonl", ZSRE, {}, ZSRE, ZSRE, {})
    examples, problems = read_qa(path, limit=2)
    assert len(examples) == 2
    assert len(problems) == 1
    with pytest.raises(ValueError, match="limit is 0"):
        read_qa(path, limit=0)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="it is empty"):
        read_qa(write(tmp_path / "empty.tsv", ""))
    with pytest.raises(ValueError, match="2 skipped, the first: .*:1, answer: is empty"):
        read_qa(write(tmp_path / "bad.tsv", "Who?\t\nWho?\t\n"))
    with pytest.raises(ValueError, match="'squad' is unknown; take one of auto, tsv"):
        read_qa(tmp_path / "empty.tsv", format="squad")
    with pytest.raises(ValueError, match="is a folder"):
        read_qa(tmp_path)
    with pytest.raises(ValueError, match="no file .*missing.tsv"):
        read_qa(tmp_path / "missing.tsv")
    with pytest.raises(ValueError, match="nor a Hub dataset's name"):
        read_qa("not a name")


def test_a_hub_name_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_qa("somebody/some-data")


def test_a_hub_name_that_is_not_there_is_a_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="No file nobody-here/no-such-data here, and no such dataset"):
        read_qa("nobody-here/no-such-data")


def test_importing_the_tasks_does_not_import_datasets():
    code = "import sys, mendfast.tasks; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_problem_reads_as_a_sentence():
    assert str(Problem("a.tsv", 3, "", "has 1 field")) == "a.tsv:3: has 1 field"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused(tmp_path, encoding):
    (tmp_path / "facts.tsv").write_bytes("Who wrote Hamlet?\tShakespeare\n".encode(encoding))
    with pytest.raises(ValueError, match=r"facts.tsv is in UTF-\d\d.*save it as UTF-8"):
        read_qa(tmp_path / "facts.tsv")


def test_records_that_are_no_text_or_cost_too_much_are_named(tmp_path):
    good = '{"prompt": "Who?", "target": "Me"}'
    bad = {
        '{"prompt": "Who?", "target": ' + "9" * 5000 + "}": "an integer of 5,000 digits",
        '{"prompt": "Who?", "target": "\\ud800"}': "half a surrogate pair",
        '{"prompt": "Who?", "target": "a\\u0000b"}': "a NUL character",
        '{"prompt": "Wh\0o?", "target": "a"}': "a NUL character",
        '{"prompt": "' + "Who " * 750_000 + '", "target": "a"}': "2,999,999 characters; at most 100,000",
        '{"prompt": "Who?", "target": ' + "[" * 900 + "]" * 900 + "}": "nested too deeply|is empty|no JSON",
        "[" * 100_000: "no JSON",
        '{"prompt": "Who?", "target": {"' + "a" * 10**6 + '": 1}}': "it must be text",
        '{"' + "a" * 10**6 + '": 1}': "no known format",
    }
    path = write(tmp_path / "facts.jsonl", "\n".join([good, *bad, good]))
    begun = time.process_time()
    examples, problems = read_qa(path)
    assert time.process_time() - begun < 2
    assert [example.source.rpartition(":")[2] for example in examples] == ["1", str(len(bad) + 2)]
    assert [problem.line for problem in problems] == list(range(2, len(bad) + 2))
    for problem, match in zip(problems, bad.values(), strict=True):
        assert re.search(match, problem.message), problem.message[:300]
        assert len(problem.message) <= 300
        problem.message.encode()


def test_a_line_longer_than_any_record(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    path = write(tmp_path / "facts.tsv", "Who?\tMe\n" + "x" * 5000 + "\nWhere?\tHere\n")
    examples, problems = read_qa(path)
    assert [example.target for example in examples] == ["Me", "Here"]
    assert [(problem.line, problem.message) for problem in problems] == [
        (2, "has more than 1,000 bytes, which is no record")
    ]


def test_the_worlds_facts_are_questions_without_a_file():
    train, test, everything = (load_task("qa", name) for name in ("world:train", "world:test", "world"))
    assert len(everything.items) == len(train.items) + len(test.items) == len(world.load_facts())
    assert not {item.entity for item in train.items} & {item.entity for item in test.items}
    for example, item in zip(test.examples, test.items, strict=True):
        assert example.prompt in item.wordings and example.answers == (item.answer,) and example.target != item.answer
        assert example.target in world.answers(item.relation) and not set(example.rephrasings) & set(item.wordings)
    assert len(load_task("qa", "world:test", limit=7).items) == 7
    with pytest.raises(ValueError, match='no part "world:dev" of the world; pass one of world, world:train'):
        load_task("qa", "world:dev")
