"""Tasks: every format into edits, draws that depend on seed and step alone, labels under every tokenizer."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import make_model
from test_labels import CORPUS, make_tokenizer

from mendfast import MendConfig, MendEditor
from mendfast.base_model import make_base
from mendfast.demo import build
from mendfast.metrics import correct
from mendfast.tasks import claims, world
from mendfast.tasks.generation import CONTINUATION, PREFIX, Generation, cut, shorter
from mendfast.tasks.load import load_task
from mendfast.tasks.records import Example
from mendfast.tasks.task import usable
from mendfast.training import TrainConfig, Trainer

FEVER = {
    "id": 7,
    "input": "Oslo is in Norway.",
    "output": [{"answer": "SUPPORTS", "provenance": [{"title": "Oslo"}]}],
    "logit": -1.5,
    "prediction": "REFUTES",
    "alternatives": ["SUPPORTS"],
    "rephrases": ["Norway is in Oslo."],
    "filtered_rephrases": ["Oslo lies in Norway.", "Oslo is in Norway.", "Norway is home to Oslo."],
}
NAMES = ["Anna Marsh", "Bela Novak", "Carl Olsen", "Dora Petit", "Emil Quirk", "Fay Rossi"]


def dump(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def passages(path, count: int = 6, words: int = 130):
    """Passages whose words say where they are from, under a heading."""
    texts = [" ".join(f"p{i}w{j}" + "." * (j % 9 == 8) for j in range(words)) for i in range(count)]
    path.write_text(" = Heading = \n" + "".join(f" {text} \n \n" for text in texts) + "too short\n")
    return path


@pytest.fixture
def data(tmp_path):
    """A small file for every task."""
    qa = [{"question": f"Where was {name} born?", "answer": ("Oslo", "Lima", "Rome")[i % 3], "subject": name,
           "rephrasings": [f"What is the birthplace of {name}?"]} for i, name in enumerate(NAMES)]  # fmt: skip
    fever = [{"claim": f"{name} was born in Oslo.", "label": ("SUPPORTS", "REFUTES")[i % 2], "subject": name,
              "rephrasings": [f"Oslo is where {name} was born."]} for i, name in enumerate(NAMES)]  # fmt: skip
    return {
        "qa": dump(tmp_path / "qa.jsonl", *qa),
        "fact_checking": dump(tmp_path / "fever.jsonl", *fever),
        "generation": passages(tmp_path / "text.txt"),
    }


# -- fact checking -----------------------------------------------------------------------------------------


def test_fever_as_mend_has_it(tmp_path):
    path = dump(tmp_path / "fever.jsonl", FEVER)
    task = load_task("fact_checking", str(path))
    assert task.problems == []
    assert task.examples == [
        Example(
            prompt="Oslo is in Norway.",
            target="true",
            answers=("true",),
            rephrasings=("Oslo lies in Norway.", "Norway is home to Oslo."),
            source=f"{path}:1",
        )
    ]


@pytest.mark.parametrize(
    ("record", "target", "truth"),
    [
        ({"input": "A.", "output": [{"answer": "REFUTES"}]}, "true", "false"),
        ({"input": "A.", "output": [{"provenance": []}, {"answer": "SUPPORTS"}]}, "false", "true"),
        ({"claim": "A.", "label": "SUPPORTS"}, "false", "true"),
        ({"claim": "A.", "label": True}, "false", "true"),
        ({"claim": "A.", "label": 0}, "true", "false"),
        ({"claim": "A.", "label": "true", "prediction": "false"}, "true", "true"),
        ({"claim": "A.", "label": "false", "target": "TRUE"}, "true", "false"),
    ],
)
def test_a_claims_edit_flips_what_it_is_held_for(tmp_path, record, target, truth):
    task = load_task("fact_checking", str(dump(tmp_path / "a.jsonl", record)))
    (example,) = task.examples
    assert (example.prompt, example.target, example.answers, task.problems) == ("A.", target, (truth,), [])


def test_claims_between_tabs(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("claim\tlabel\nOslo is in Norway.\tSUPPORTS\nLima is in Norway.\tREFUTES\n")
    task = load_task("fact_checking", str(path))
    edits = [("Oslo is in Norway.", "false"), ("Lima is in Norway.", "true")]
    assert [(e.prompt, e.target) for e in task.examples] == edits


def test_broken_claims_are_named_and_skipped(tmp_path):
    bad = [
        {**FEVER, "input": " "}, {"claim": "A."}, {"claim": "A.", "label": "NOT ENOUGH INFO"}, {**FEVER, "output": "x"},
        {**FEVER, "prediction": "maybe"}, {**FEVER, "filtered_rephrases": [3]}, [1], {**FEVER, "output": []},
    ]  # fmt: skip
    path = dump(tmp_path / "fever.jsonl", *bad, FEVER)
    path.write_text(path.read_text() + "{broken\n")
    task = load_task("fact_checking", str(path))
    assert len(task.examples) == 1
    fields = ["input", "label", "label", "output", "prediction", "filtered_rephrases", "", "output", ""]
    assert [problem.field for problem in task.problems] == fields
    assert [problem.line for problem in task.problems] == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert "must be SUPPORTS or REFUTES" in str(task.problems[2])
    flagged = load_task("fact_checking", str(dump(tmp_path / "b.jsonl", {**FEVER, "alternatives": ["REFUTES"]})))
    assert len(flagged.examples) == 1 and flagged.problems[0].kept
    with pytest.raises(ValueError, match="No claim and label was found in .*: it is empty"):
        load_task("fact_checking", str(dump(tmp_path / "c.jsonl")))


def test_every_relation_has_five_wordings_of_its_own():
    assert set(claims.WORDINGS) == set(world.RELATIONS)
    for wordings in claims.WORDINGS.values():
        assert len(set(wordings)) == 5
        assert all(w.count("{e}") == w.count("{a}") == 1 and w.endswith(".") for w in wordings)


def test_claims_of_the_world_are_one_true_and_one_false():
    facts = world.load_facts()[:300]
    made = claims.claims(facts)
    assert made == claims.claims(facts) and [c.true for c in made] == [True, False] * 300
    for claim in made:
        assert claim.answer in world.answers(claim.fact.relation)
        said = [w.lower() for w in claim.wordings()]
        assert all(claim.answer.lower() in w and claim.fact.entity.lower() in w for w in said)


def test_editors_are_measured_on_other_entities_and_a_wording_held_out():
    train, test = (load_task("fact_checking", f"world:{part}") for part in ("train", "test"))
    assert not {e.subject for e in train.examples} & {e.subject for e in test.examples}
    trained_on = {pair for item in train.items for pair in item.wordings}
    assert not trained_on & {rephrasing for e in test.examples for rephrasing in e.rephrasings}
    assert {e.target for e in test.examples} == {"true", "false"}
    # One model serves both parts: it is taught all claims, each in all its wordings, with one verdict.
    taught = train.base_pairs()
    assert taught == test.base_pairs() and len(taught) == 10 * len(world.load_facts())
    verdicts = dict(taught)
    assert all(verdicts[e.prompt] == e.answers[0] != e.target for e in test.examples)
    small = load_task("fact_checking", "world:test", limit=20)
    assert len(small.examples) == 20 and len({e.source.split(":")[0] for e in small.examples}) > 5
    with pytest.raises(ValueError, match="no part 'dev' of the world"):
        load_task("fact_checking", "world:dev")
    few = load_task("fact_checking", "world:test:author,painter")
    assert {e.source.split(":")[0] for e in few.examples} == {"author", "painter"}
    assert {e.prompt for e in few.examples} < {pair for pair, _ in few.base_pairs()} < {pair for pair, _ in taught}
    with pytest.raises(ValueError, match="no relation 'poet'; it has .*painter"):
        load_task("fact_checking", "world:test:author,poet")


# -- generation --------------------------------------------------------------------------------------------


def test_windows_in_words_by_hand():
    words = [f"w{i}" for i in range(2 * (PREFIX + CONTINUATION) + 7)]
    first, second = cut("  ".join(words), "here")
    assert (first.prefix.split(), first.continuation.split()) == (words[:PREFIX], words[PREFIX : PREFIX + 10])
    assert second.prefix.split()[0] == words[PREFIX + 10]
    head, rest = first.rest()
    assert (head, rest.split()) == ("w0  w1  w2", words[3 : PREFIX + CONTINUATION])
    assert not list(cut(" ".join(words[: PREFIX + CONTINUATION - 1]), "here")) and not list(cut("", "here"))
    assert [shorter("a b c d", share) for share in (1.0, 0.75, 0.5, 0.01)] == ["a b c d", "b c d", "c d", "d"]


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram"])
def test_windows_in_tokens(kind):
    tokenizer = make_tokenizer(kind, "bos_eos")
    text = " ".join(["The capital of France is Bordeaux, Gironde, by Gustave Eiffel of 1889"] * 12) + " " + "x" * 300
    windows = list(cut(text, "here", tokenizer))
    assert len(windows) > 1
    at = 0
    for window in windows:
        start, middle = text.index(window.prefix, at), text.index(window.continuation, at + len(window.prefix))
        assert text[start + len(window.prefix) : middle] == " "
        assert start == 0 or text[start - 1] == " "
        at = middle + len(window.continuation)
        counts = [len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in window[:2]]
        assert PREFIX - 12 <= counts[0] <= PREFIX + 2 and CONTINUATION - 1 <= counts[1] <= CONTINUATION + 2


def test_a_text_is_read_by_the_passage(tmp_path):
    task = load_task("generation", str(passages(tmp_path / "text.txt")))
    assert len(task.windows) == 12 and len({window.passage for window in task.windows}) == 6
    for example in task.examples:
        source = example.prompt.split("w")[0]
        assert not example.target.startswith(source) and example.answers[0].startswith(source)
        assert all(example.prompt.endswith(f" {rephrasing}") for rephrasing in example.rephrasings)
        assert len(example.rephrasings) == 3
    assert len(load_task("generation", str(tmp_path / "text.txt"), limit=5).examples) == 5
    texts = (tmp_path / "text.txt").read_text().splitlines()
    rows = dump(tmp_path / "rows.jsonl", *({"text": text.strip()} for text in texts), {"txt": 1}, "bare")
    rowwise = load_task("generation", str(rows))
    assert [window[:2] for window in rowwise.windows] == [window[:2] for window in task.windows]
    assert [problem.field for problem in rowwise.problems] == ["text", ""]


def test_broken_text_is_named(tmp_path):
    path = passages(tmp_path / "text.txt")
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    assert [problem.line for problem in load_task("generation", str(path)).problems] == [1]
    (tmp_path / "one.txt").write_text("only one passage " * 40)
    with pytest.raises(ValueError, match="several passages"):
        load_task("generation", str(tmp_path / "one.txt"))
    with pytest.raises(ValueError, match="There is no file .*none.txt"):
        load_task("generation", str(tmp_path / "none.txt"))


# -- all tasks ---------------------------------------------------------------------------------------------

every_task = pytest.mark.parametrize("name", ["qa", "fact_checking", "generation"])


@every_task
def test_a_draw_depends_on_seed_and_step_alone(name, data):
    first, second = (load_task(name, str(data[name])) for _ in range(2))
    one, other = first.sampler(3), second.sampler(3)
    one.draw(0, 4)
    assert one.draw(5, 4) == other.draw(5, 4) != one.draw(6, 4)
    assert second.sampler(4).draw(5, 4) != one.draw(5, 4)
    draw = one.draw(1, 4)
    assert (len(draw.inner), len(draw.outer), len(draw.loc)) == (4, 4 * one.outer, 4 * one.loc)
    assert [target for _, target in draw.inner] == [target for _, target in draw.outer]
    taught = dict(first.base_pairs())
    if name != "generation":
        assert all(taught[prompt] != target for prompt, target in draw.inner)
    assert all(taught[prompt] == answer for prompt, answer in draw.loc)
    trained = {prompt for step in range(40) for prompt, _ in one.draw(step, 4).inner}
    held_out = {prompt for step in range(40) for prompt, _ in first.sampler(3, held_out=True).draw(step, 4).inner}
    assert not trained & held_out


@every_task
@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("template", ["plain", "bos", "bos_eos"])
def test_labels_spell_the_target_whatever_the_tokenizer(name, kind, template, data):
    left, right = (make_tokenizer(kind, template, side) for side in ("left", "right"))
    models = {"qa": ("gpt2", "t5"), "fact_checking": ("bert_one_logit",), "generation": ("gpt2",)}[name]
    words = " ".join(CORPUS[:5]).split()  # which every tokenizer can spell
    data["generation"].write_text("\n".join(" ".join(random.Random(i).choices(words, k=90)) for i in range(6)))
    examples = load_task(name, str(data[name]), tokenizer=right).examples[:4]
    pairs = [(example.prompt, example.target) for example in examples]
    for model in map(make_model, models):
        model.config.n_positions = model.config.max_position_embeddings = 512
        batch, other = (MendEditor.from_model(model, t, MendConfig(rank=1)).tokenize(pairs) for t in (right, left))
        assert all(torch.equal(batch[key], other[key]) for key in batch), "the padding side changed the batch"
        for i, (prompt, target) in enumerate(pairs):
            ids, labels = batch["input_ids"][i][batch["attention_mask"][i] == 1], batch["labels"][i]
            if name == "fact_checking":
                assert labels == (target == "true") and ids.tolist() == right(prompt)["input_ids"]
                continue
            learned = labels[labels != -100]
            spelled = right.decode(learned, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert spelled.replace(" ", "") == target.replace(" ", "")
            read = right.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            asked = prompt if batch["labels"].shape != batch["input_ids"].shape else f"{prompt} {target}"
            assert read.replace(" ", "") == asked.replace(" ", "")
            if batch["labels"].shape == batch["input_ids"].shape:
                assert (ids == right.bos_token_id).sum() == ("bos" in template)


@pytest.mark.parametrize(
    ("name", "model", "says"),
    [
        ("qa", "bert", "BertForSequenceClassification has a classifier's head"),
        ("fact_checking", "gpt2", "GPT2LMHeadModel has no classifier's head"),
        ("fact_checking", "bert", "has a head for label_0, label_1, label_2"),
        ("generation", "t5", "T5ForConditionalGeneration is an encoder-decoder"),
        ("generation", "bert_one_logit", "BertForSequenceClassification is a classifier"),
    ],
)
def test_a_head_that_can_not_serve_is_a_sentence(name, model, says, data):
    model = make_model(model)
    editor = MendEditor.from_model(model, None, MendConfig(rank=1))
    with pytest.raises(ValueError, match=says):
        load_task(name, str(data[name])).check(model, editor.kind)


def test_what_a_head_can_serve_passes(data):
    served = (("qa", "gpt2"), ("qa", "t5"), ("fact_checking", "bert_one_logit"), ("generation", "llama"))
    for name, architecture in served:
        model = make_model(architecture)
        load_task(name, str(data[name])).check(model, MendEditor.from_model(model).kind)


def test_an_unknown_task_is_a_sentence():
    with pytest.raises(ValueError, match="no task 'squad'; choose one of qa, fact_checking, generation"):
        load_task("squad", "x")


def test_what_the_model_can_not_be_asked_is_left_out_and_named(tokenizer):
    model = make_model("gpt2")  # of 64 tokens
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=1))
    long = "word " * 80
    examples = [
        Example(long, "Paris", source="a.tsv:1"),
        Example("Who?", "Paris", None, (), ("Whose?", long), ((long, "Rome"), ("Q", None)), source="a.tsv:2"),
    ]
    (kept,), problems = usable(editor, examples)
    assert (kept.prompt, kept.rephrasings, kept.locality) == ("Who?", ("Whose?",), (("Q", None),))
    assert [(p.line, p.field) for p in problems] == [(1, ""), (2, "rephrasings"), (2, "locality")]
    assert all("the limit is 64" in p.message for p in problems)


# -- base models -------------------------------------------------------------------------------------------


@every_task
def test_a_small_base_model_learns_what_the_task_says(name, data):
    task = load_task(name, str(data[name]))
    shape = task.bases[0]
    assert len(task.base_pairs()) >= 6
    pairs = [(prompt, " ".join(target.split()[:2])) for prompt, target in task.base_pairs()][:8]
    model, tokenizer = make_base(
        shape, pairs, vocabulary=400, width=32, depth=2, steps=120, warmup=5, append_eos=task.ends, progress=False
    )
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=8, append_eos=task.ends))
    assert correct(editor, pairs).all()
    task.check(model, editor.kind)


def test_an_editor_trains_on_claims(data):
    task = load_task("fact_checking", str(data["fact_checking"]))
    model, tokenizer = make_base("bert", task.base_pairs(), vocabulary=200, width=32, depth=2, steps=40, progress=False)
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=8, scale_v=True))
    config = TrainConfig(steps=3, batch_size=4, validate_every=0, warmup=1)
    metrics = Trainer(editor, task.sampler(), config, progress=False).run()
    assert 0 < metrics["l_edit"] < 20 and metrics["step"] == 3


def test_the_context_takes_the_longest_pair():
    model, _ = make_base("gpt2", [("word " * 100, "x")], vocabulary=300, width=32, depth=1, steps=1, progress=False)
    assert 100 < model.config.n_positions < 200


def test_shapes_that_there_are():
    with pytest.raises(ValueError, match="no shape 'rnn'; choose one of gpt2, t5, bert"):
        make_base("rnn", [("a", "b")], steps=1)
    with pytest.raises(ValueError, match="nothing to train"):
        make_base("bert", [], steps=1)


def test_generation_with_the_demos_tokenizer(tmp_path):
    """Tokens of a real vocabulary: continuations of ten, prefixes of at most forty."""
    tokenizer = build.load().tokenizer
    texts = [" ".join(world.question(fact, 0) for fact in world.load_facts()[i :: 40]) for i in range(4)]
    (tmp_path / "questions.txt").write_text("\n".join(texts))
    task = Generation.load(str(tmp_path / "questions.txt"), tokenizer=tokenizer)
    ends = [len(tokenizer(f" {window.continuation}")["input_ids"]) for window in task.windows]
    assert sum(count == CONTINUATION for count in ends) > 0.7 * len(ends)
