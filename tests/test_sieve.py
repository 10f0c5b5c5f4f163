"""What a model can't be asked is found at the start, and training never dies of one record."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import make_model
from tokenizers import normalizers

from mendfast import MendConfig, MendEditor
from mendfast.base_model import make_base
from mendfast.cli import main
from mendfast.editable import EditableModel
from mendfast.tasks.generation import Generation
from mendfast.tasks.qa import read_qa
from mendfast.tasks.sieve import sieve
from mendfast.tasks.task import refusal
from mendfast.training import FactSampler, Item

ANSWERS = ("Paris", "Rome", "Berlin", "Madrid")


def facts(*more: Item) -> list[Item]:
    """Four facts of one relation, from a file whose first lines they are."""
    items = [
        Item((f"What is the capital of {i}?", f"Which is the capital of {i}?"), answer, 0, str(i), f"data.tsv:{i + 1}")
        for i, answer in enumerate(ANSWERS)
    ]
    return [*items, *more]


def subject(name: str, tokenizer, **config) -> EditableModel:
    torch.manual_seed(0)
    model = make_model(name)
    if name != "bert_one_logit":
        model.resize_token_embeddings(len(tokenizer))
    return MendEditor.from_model(model, tokenizer, MendConfig(rank=4, step_size=1e-3, **config))


def every_draw_is_right(subject: EditableModel, items: list[Item]) -> None:
    for step in range(60):
        for pairs in FactSampler(items).draw(step, 4):
            subject.check(subject.tokenize(pairs))


LONG = "word " * 80


def test_texts_longer_than_the_context(tokenizer):
    made = subject("gpt2", tokenizer, append_eos=True)
    bad = [
        Item((LONG,), "Rome", 0, source="data.tsv:5"),
        Item(("Who?", LONG, "Which one?"), "Rome", 0, source="data.tsv:6"),
        Item(("What?",), LONG, 0, source="data.tsv:7"),
    ]
    kept, problems = sieve(made, facts(*bad))
    assert kept[:4] == facts() and [item.wordings for item in kept[4:]] == [("Who?", "Which one?")]
    assert [(problem.file, problem.line) for problem in problems] == [("data.tsv", line) for line in (5, 6, 7)]
    for problem in problems:
        assert "can't be asked: Prompt and target have" in str(problem) and "the limit is 64" in str(problem)
    every_draw_is_right(made, kept)


def test_a_question_must_fit_with_every_answer_that_an_edit_may_give_it(tokenizer):
    """Each fits with its own partner; of the two sides the one goes that stands against many."""
    made = subject("gpt2", tokenizer)
    question = Item(("Rome Paris " * 20,), "Rome", 0, source="data.tsv:5")
    answer = Item(("Who?",), "Rome Paris " * 20, 0, source="data.tsv:6")
    for other in (question, answer):
        assert not refusal(made, other.wordings[0], other.answer)
    for more, gone in (((question,), []), ((question, answer), [5]), ((answer, answer, question), [5])):
        kept, problems = sieve(made, facts(*more))
        assert [problem.line for problem in problems] == gone
        every_draw_is_right(made, kept)
    longest = Item(("Who?",), "Rome Paris " * 26, 0, source="data.tsv:6")
    kept, (problem,) = sieve(made, facts(longest))
    assert kept == facts() and "data.tsv:6: its answer is too long beside the others'" in str(problem)


def test_answers_that_become_no_tokens(tokenizer):
    """A tokenizer that drops what it does not know."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    kept, problems = sieve(subject("gpt2", tokenizer), facts(Item(("Who?",), "\u200b", 0, source="data.tsv:5")))
    assert kept == facts() and "data.tsv:5: 'Who?' can't be asked: The answer '\\u200b' becomes" in str(problems[0])


def test_encoder_decoders_hold_questions_and_answers_apart(tokenizer):
    made = subject("bart", tokenizer)
    bad = [Item((LONG,), "Rome", 0, source="data.tsv:5"), Item(("Who?",), LONG, 0, source="data.tsv:6")]
    fits = Item(("Rome Paris " * 20,), "Rome Paris " * 20, 0)
    kept, problems = sieve(made, facts(*bad, fits))
    assert kept == facts(fits) and [problem.line for problem in problems] == [5, 6]
    every_draw_is_right(made, kept)


def test_classifiers(tokenizer):
    made = subject("bert_one_logit", tokenizer)
    good = [Item((f"claim {i}",), ("true", "false")[i % 2]) for i in range(4)]
    bad = [Item((LONG,), "true", source="data.tsv:5"), Item(("claim",), "perhaps", source="data.tsv:6")]
    kept, problems = sieve(made, [*good, *bad])
    assert kept == good
    assert "5: 'word word" in str(problems[0]) and "the model takes 64" in str(problems[0])
    assert "has no label 'perhaps'" in str(problems[1])


def test_nothing_left_is_a_sentence(tokenizer):
    with pytest.raises(ValueError, match="The model can be asked none of 1 facts; the first: data.tsv:5: 'word word"):
        sieve(subject("gpt2", tokenizer), [Item((LONG,), "Rome", source="data.tsv:5")])


def test_windows_of_running_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{word} went out to see the world and " * 12 for word in "she he it we they".split()))
    task = Generation.load(str(path), tokenizer=tokenizer)
    before = list(task.windows)
    assert task.sieve(subject("gpt2", tokenizer)) == [] and task.windows == before
    made = subject("gpt2", tokenizer, prompt_template="x " * 40 + "{prompt}")
    with pytest.raises(ValueError, match="The model can be asked nothing as its requests are made. Prompt and"):
        task.sieve(made)


RECORDS = [
    {"prompt": "Who?", "target": "Rome"},
    {"prompt": "Why?", "target": 0},
    {"prompt": "When?", "target": "Paris", "year": 0},
    {"prompt": "W\ud800?", "target": "Rome"},
    {"prompt": "Which?", "target": "R\ud800me"},
    {"prompt": "Where?", "target": "Rome", "locality": ["\ud800"]},
    {"prompt": "How?", "target": "Paris"},
]


@pytest.mark.parametrize("lines", [True, False])
def test_one_record_never_ends_the_file(lines, tmp_path):
    """Integers of 5,000 digits, where they are read and where not; halves of surrogate pairs."""
    texts = [json.dumps(record).replace(": 0", ": " + "9" * 5000) for record in RECORDS]
    path = tmp_path / "data.json"
    path.write_text("\n".join(texts) if lines else "[" + ",\n".join(texts) + "]")
    examples, problems = read_qa(path)
    assert [example.prompt for example in examples] == ["Who?", "When?", "How?"]
    assert [problem.line for problem in problems] == [2, 4, 5, 6]
    assert "an integer of 5,000 digits" in str(problems[0])
    assert all("half a surrogate pair" in str(problem) for problem in problems[1:])


def test_small_base_models_leave_out_what_no_context_should_hold(tokenizer):
    pairs = [(f"What is the capital of {i}?", answer) for i, answer in enumerate(ANSWERS)]
    model, own = make_base("gpt2", [*pairs, ("a b c d " * 900, "Rome")], width=32, depth=1, vocabulary=300, steps=1,
                           progress=False)  # fmt: skip
    assert model.config.n_positions == 512
    with pytest.raises(ValueError, match="can be taught none of 1 pairs. Prompt and target have"):
        make_base("gpt2", [("a b c d " * 900, "Rome")], width=32, depth=1, vocabulary=300, steps=1, progress=False)


def test_the_command_trains_on_the_rest(tmp_path, capsys):
    data = tmp_path / "qa.tsv"
    good = [f"What is the capital of {i}?\t{ANSWERS[i % 4]}" for i in range(12)]
    data.write_text("\n".join([*good, f"{'Rome ' * 2000}?\tParis", "Who?\t" + "Paris " * 900]) + "\n")
    arguments = ["--data", data, "--output", tmp_path / "run", "--base-width", 32, "--base-depth", 3,
                 "--base-vocabulary", 300, "--base-steps", 2, "--rank", 4, "--steps", 4, "--batch-size", 8,
                 "--validate-every", 0]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    for line in (13, 14):
        assert f"qa.tsv:{line}:" in said.replace(" ", "")  # a line of the terminal may end anywhere in the path
