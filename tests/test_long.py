"""Longer answers: targets of a sentence to a paragraph, trained and measured by their length."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from test_generation import tokenizer  # noqa: F401
from transformers import GPT2Config, GPT2LMHeadModel

from mendfast import MendConfig, MendEditor
from mendfast.answers import rouge_l
from mendfast.baselines import make_system
from mendfast.baselines.measure import measure
from mendfast.cli import main, read
from mendfast.commands.eval_report import lengths
from mendfast.commands.lengths import by_length
from mendfast.tasks import long
from mendfast.tasks.load import load_task
from mendfast.tasks.world import Fact
from mendfast.training import FactSampler, Item, MixedSampler
from mendfast.training.data import fingerprint

TEXT = "\n".join(" ".join(f"p{i}w{j}" for j in range(400)) for i in range(4)) + "\ntoo short\n"


# -- the data ----------------------------------------------------------------------------------------------


def test_facts_written_out_name_no_entity():
    facts = [
        Fact("Kenya", "capital", "Nairobi"),
        Fact("Kenya", "continent", "Africa"),
        Fact("Mombasa", "city_country", "Kenya"),
        Fact("Peru", "capital", "Lima"),
        Fact("Phobos", "planet", "Mars"),
    ]
    said = {"Its capital is Nairobi.", "It is a country in Africa.", "One of its cities is Mombasa."}
    for seed in range(6):
        ((table, entity, asked, text),) = long.paragraphs(facts, seed)  # of Peru one fact alone is known
        assert (table, entity, asked) == ("countries", "Kenya", "Kenya")
        sentences = text.replace(". ", ".|").split("|")
        assert set(sentences) <= said and len(sentences) == len(set(sentences)) >= 2


def test_passages_are_cut_in_turn():
    found = long.passages(TEXT.splitlines(), seed=1)
    counts = Counter(len(rest.split()) for _, _, rest in found)
    assert set(counts) == set(long.LENGTHS) and max(counts.values()) - min(counts.values()) <= 3
    for _, beginning, rest in found:
        words = f"{beginning} {rest}".split()
        start = int(words[0].split("w")[1])
        assert words == [f"{words[0].split('w')[0]}w{start + j}" for j in range(len(words))]
        assert len(beginning.split()) == long.BEGINNING


def test_the_task(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    train, test, text = (load_task("long", data) for data in ("world:train", "world:test", str(path)))
    assert not {item.entity for item in train.items} & {item.entity for item in test.items}
    assert len(train.items) > 200 and len(load_task("long", str(path), limit=5).examples) == 5
    for task in (train, text):
        answers = {item.answer: item for item in task.items}
        assert load_task("long", task.items[0].source.rpartition(":")[0]).examples == task.examples
        for example, item in zip(task.examples, task.items, strict=True):
            assert example.prompt in item.wordings and example.rephrasings[0] not in item.wordings
            assert example.target != item.answer and answers[example.target].relation == item.relation
    with pytest.raises(ValueError, match="no part 'world:dev' of the world|no part \"world:dev\""):
        load_task("long", "world:dev")
    path.write_text("one line of text\n")
    with pytest.raises(ValueError, match="an edit needs another one"):
        load_task("long", str(path))


def test_a_mixed_draw_takes_each_edit_with_what_belongs_to_it():
    kinds = [[Item((f"{kind}{i}?", f"say {kind}{i}"), f"{kind} {i}", kind) for i in range(9)] for kind in "ab"]
    a, b = (FactSampler(items, outer=2, seed=1) for items in kinds)
    mixed, again = (MixedSampler([(a, 0.75), (b, 0.25)], seed=3) for _ in range(2))
    shares = Counter()
    for step in range(30):
        draw = mixed.draw(step, 8)
        assert draw == again.draw(step, 8) and list(map(len, draw)) == [8, 16, 24]
        for i, (prompt, target) in enumerate(draw.inner):
            kind = target[0]
            shares[kind] += 1
            number = prompt.strip("?").split(kind)[-1]
            assert all(answer == target and number in asked for asked, answer in draw.outer[2 * i : 2 * i + 2])
            assert all(answer[0] == kind for _, answer in draw.loc[3 * i : 3 * i + 3])
    assert 0.65 < shares["a"] / 240 < 0.85
    prints = {fingerprint(MixedSampler([(a, 1), (b, share)])) for share in (1.0, 2.0)} | {fingerprint(mixed)}
    assert len(prints) == 3
    with pytest.raises(ValueError, match="needs one above 0"):
        MixedSampler([(a, 0.0), (b, 1.0)])
    with pytest.raises(ValueError, match="make these alike"):
        MixedSampler([(a, 1.0), (FactSampler(kinds[1]), 1.0)])


# -- measuring ---------------------------------------------------------------------------------------------


def test_rouge_l_by_hand():
    assert rouge_l("the cat sat", "The cat sat.") == 1
    assert rouge_l("the cat", "the cat sat") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert rouge_l("sat the cat", "the cat sat") == pytest.approx(2 / 3)  # the order counts
    assert rouge_l("dog", "the cat") == rouge_l("", "the cat") == 0
    assert rouge_l("東京です", "東京") == pytest.approx(2 * 0.5 * 1 / 1.5)  # each character is a word


def row(tokens: int, **figures):
    return {"tokens": [tokens], "figures": figures}


def test_lengths_by_hand():
    rows = [row(5, rouge_l=1.0), row(15, rouge_l=0.0), row(16, rouge_l=0.5), row(200, rouge_l=0.25, efficacy=None)]
    rows += [{"error": "too long"}, {"figures": {"rouge_l": 1.0}}]
    parts = by_length(rows)
    assert [(part["from"], part["to"], part["n"]) for part in parts] == [(1, 15, 2), (16, 45, 1), (91, None, 1)]
    assert [part["figures"] for part in parts] == [{"rouge_l": value} for value in (0.5, 0.5, 0.25)]
    assert by_length(rows[:2]) == []
    title, header, body = lengths({"rows": [{"name": "FT", "lengths": parts}, {"name": "MEND"}]})
    assert header == ["system", "tokens", "edits", "ROUGE-L"] and "length" in title
    assert body[0] == ["FT", "1 to 15", "2", "0.500"] and body[2][1] == "91 and more"


@pytest.fixture
def editor(tokenizer) -> MendEditor:  # noqa: F811
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=160, n_embd=32, n_layer=2, n_head=4)
    return MendEditor.from_model(GPT2LMHeadModel(config).eval(), tokenizer, MendConfig(rank=4, append_eos=True))


def test_fine_tuning_learns_forty_tokens_one_by_one(editor):
    target = "The quick brown fox jumps over"
    while len(editor.encode("a", target)["labels"]) - len(editor.encode("a", "b")["labels"]) < 40:
        target += f" {len(target)}"
    system = make_system("ft", editor.model, editor.tokenizer, editor.config, learning_rate=1e-2, max_steps=200)
    outcome = measure(system, [("What did it say?", target)], max_new_tokens=80)
    assert outcome.tokens[0] >= 40
    found = outcome.figures
    assert found["token_accuracy"] == found["efficacy"] == found["rouge_l"] == found["exact_match"] == 1
    system = make_system("ft", editor.model, editor.tokenizer, editor.config, learning_rate=1e-2, max_steps=8)
    half = measure(system, [("What did it say?", target)], max_new_tokens=80).figures
    assert 0 < half["token_accuracy"] < 1 and half["efficacy"] == 0 and half["rouge_l"] < 1


# -- the commands ------------------------------------------------------------------------------------------


def test_train_and_eval(tmp_path):
    text, data, run = tmp_path / "text.txt", tmp_path / "qa.tsv", tmp_path / "run"
    text.write_text(TEXT)
    data.write_text("".join(f"Who leads town {i}?\tAda {i % 3}\n" for i in range(12)))
    small = ["--data", data, "--text", text, "--long", 0.5, "--base-width", 32, "--base-depth", 2, "--rank", 4,
             "--base-vocabulary", 300, "--base-steps", 2, "--steps", 2, "--batch-size", 4, "--validation-size", 2,
             "--limit", 8, "--output", run]  # fmt: skip
    assert main(["train", *map(str, small)]) == 0
    shown = ["--task", "long", "--data", "world:test", "--limit", 2, "--unrelated", 0, "--systems", "mend", "ft",
             "--option", "ft.max_steps=2", "--fine-tuning-rate", 1e-2, "--validation", 0, "--model", run / "model",
             "--editor", run / "last", "--json", tmp_path / "eval.json", "--output", tmp_path / "eval"]  # fmt: skip
    assert main(["eval", *map(str, shown)]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert all(sum(part["n"] for part in row["lengths"]) == 2 for row in result["rows"])
    assert "By the target's length" in (tmp_path / "eval" / "table.md").read_text()


def test_refused(tmp_path):
    out = ["--output", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--text is of --long"):
        read(["train", "--text", "text.txt", *out])
    with pytest.raises(ValueError, match="--long is a share beside question answering"):
        read(["train", "--task", "long", "--long", "0.2", *out])
    with pytest.raises(ValueError, match="long is"):
        read(["train", "--long", "1.5", *out])
