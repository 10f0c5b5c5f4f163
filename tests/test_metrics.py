"""Metrics on cases small enough to compute by hand: a model that is a table of next words."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from mendfast import MendConfig, MendEditor
from mendfast.answers import contains, exact_match
from mendfast.baselines import make_system
from mendfast.baselines.measure import (
    FIGURES,
    Before,
    Interval,
    PeakMemory,
    bootstrap,
    measure,
    other_forms,
    summarise,
)
from mendfast.generation import answer
from mendfast.labels import encode_prompt
from mendfast.metrics import Scorer, tell

WORDS = ["end", "edit", "other", "near", "far", "paris", "rome", "texas", "then"]
ID = {word: i for i, word in enumerate(WORDS)}


class Bigram(nn.Module):
    """The next word depends on the last one alone, by a table of probabilities."""

    def __init__(self, rows: dict[str, dict[str, float]]):
        super().__init__()
        self.config = SimpleNamespace(model_type="bigram", is_encoder_decoder=False)
        self.embedding = nn.Embedding.from_pretrained(torch.eye(len(WORDS)))
        self.head = nn.Linear(len(WORDS), len(WORDS), bias=False)
        self.write(rows)

    def write(self, rows: dict[str, dict[str, float]]) -> None:
        """Each row's probabilities; what is left of 1 goes to the other words in equal parts."""
        for word, chances in rows.items():
            rest = (1 - sum(chances.values())) / (len(WORDS) - len(chances))
            column = torch.full((len(WORDS),), rest)
            for following, chance in chances.items():
                column[ID[following]] = chance
            with torch.no_grad():
                self.head.weight[:, ID[word]] = column.log()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))

    def generate(self, ids, max_new_tokens, **options):
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids).logits[:, -1:].argmax(-1)], dim=1)
        return ids


BEFORE = {
    "edit": {"texas": 0.6}, "other": {"texas": 0.6}, "near": {"rome": 0.6, "paris": 0.2}, "far": {"paris": 0.8},
    "paris": {"then": 0.9}, "rome": {"end": 0.9}, "texas": {"end": 0.9}, "then": {"end": 0.9}, "end": {"end": 0.9},
}  # fmt: skip
AFTER = {"edit": {"paris": 0.7}, "near": {"rome": 0.1, "paris": 0.6}, "far": {"paris": 0.4}}


class Rewriting:
    """A system whose edit is a change of rows."""

    seconds = 0.25

    def __init__(self, subject: MendEditor, rows: dict[str, dict[str, float]]):
        self.subject, self.rows = subject, rows

    def changed_layers(self) -> None:
        return None

    @contextlib.contextmanager
    def edit(self, requests):
        before = self.subject.model.head.weight.detach().clone()
        self.subject.model.write(self.rows)
        yield self.subject.model
        with torch.no_grad():
            self.subject.model.head.weight.copy_(before)


@pytest.fixture
def editor() -> MendEditor:
    words = Tokenizer(models.WordLevel(ID, unk_token="end"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", pad_token="end")
    return MendEditor.from_model(Bigram(BEFORE), tokenizer, MendConfig(layers=["head.weight"], rank=1))


def kl(before, after):
    return sum(p * math.log(p / q) for p, q in zip(before, after, strict=True))


# near: rome, paris and the seven others; far: paris and the eight others
KL_NEAR, KL_FAR = kl((0.6, 0.2, 0.2), (0.1, 0.6, 0.3)), kl((0.8, 0.2), (0.4, 0.6))


def test_one_edit_by_hand(editor):
    system = Rewriting(editor, AFTER)
    outcome = measure(
        system,
        [("edit", "paris then")],
        rephrasings=[("other", "paris then"), ("far", "paris then")],
        locality=[("near", "rome"), ("far", "paris then")],
        portability=[("near", "paris"), ("near", "rome")],
        show=["edit", "far"],
        before=Before(editor, ["far paris then"]),
        near={"relation": ["other", "near"], "subject": ["far"]},
        premises=[("near", True)],
    )
    # After the edit: "edit" -> paris then; "other" still -> texas; "far" -> paris then.
    figures = outcome.figures
    assert figures["efficacy"] == 1
    assert figures["edit_success"] == pytest.approx(2 / 3)
    assert figures["generality"] == figures["portability"] == 0.5
    assert figures["already"] == 0
    assert (figures["exact_match"], figures["rephrase_exact_match"], figures["first_sentence"]) == (1, 0.5, 1)
    assert figures["contains"] == pytest.approx(2 / 3) and figures["never_stopped"] == 0
    # "near" -> paris then, which is neither paris nor rome, nor yes.
    assert figures["portability_exact_match"] == figures["premises"] == 0
    # Before, "near" -> rome and "far" -> paris then were right; after, "near" is wrong.
    assert figures["drawdown"] == 0.5
    before, after = (0.6, 0.8, 0.9), (0.1, 0.4, 0.9)  # of each target token
    perplexity = [math.exp(-sum(map(math.log, chances)) / 3) for chances in (before, after)]
    assert figures["ppl_drawdown"] == pytest.approx(perplexity[1] - perplexity[0], rel=1e-5)
    # Own answers before: rome end, and paris then end. "near" has got the target now, "far" had it.
    assert figures["unchanged"] == figures["leaked"] == 0.5
    assert (figures["unchanged_relation"], figures["unchanged_subject"]) == (0.5, 1)
    assert figures["first_choice_changed"] == (1 / 2 + 0 / 3) / 2
    assert figures["kl"] == pytest.approx((KL_NEAR / 2 + KL_FAR / 3) / 2, rel=1e-4)
    # Of the text, paris after far and then after paris.
    assert figures["text_kl"] == pytest.approx(KL_FAR / 2, rel=1e-4)
    assert figures["perplexity_rise"] == pytest.approx((0.4 * 0.9) ** -0.5 - (0.8 * 0.9) ** -0.5, rel=1e-4)
    assert figures["seconds"] == 0.25
    assert outcome.shown == [("edit", "texas", "paris then"), ("far", "paris then", "paris then")]
    forms = {"exact_match_plain", "exact_match_chat", "exact_match_system"}  # the tokenizer has no template
    assert other_forms(editor) == () and set(figures) == set(FIGURES) - forms - ({"peak_bytes"} - set(figures))


def test_figures_without_data_are_absent(editor):
    figures = measure(Rewriting(editor, {}), [("edit", "texas"), ("near", "paris")], generate=False).figures
    assert figures["efficacy"] == figures["edit_success"] == figures["already"] == 0.5
    assert set(figures) - {"peak_bytes"} == {"efficacy", "edit_success", "already", "seconds"}


LOCALITY = [("near", "rome"), ("far", "paris then")]


def test_a_parrot_is_good_at_edits_alone(editor):
    """Whatever it is asked it says the target."""
    parrot = Rewriting(editor, {word: {"texas": 0.9} for word in ("edit", "other", "near", "far")})
    editor.model.write({"edit": {"rome": 0.6}, "other": {"rome": 0.6}})
    figures = measure(parrot, [("edit", "texas")], [("other", "texas")], LOCALITY, [("near", "rome")]).figures
    for name in ("edit_success", "efficacy", "generality", "exact_match", "rephrase_exact_match", "contains"):
        assert figures[name] == 1, name
    assert figures["drawdown"] == figures["leaked"] == 1
    assert figures["unchanged"] == figures["already"] == figures["portability"] == 0
    assert figures["kl"] > 0.3 and figures["first_choice_changed"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_what_changes_nothing_is_good_at_locality_alone(editor):
    before = Before(editor, ["near rome", "far paris then"])
    figures = measure(Rewriting(editor, {}), [("edit", "rome")], [("other", "rome")], LOCALITY, before=before).figures
    for name in ("edit_success", "generality", "exact_match", "rephrase_exact_match", "contains", "first_sentence"):
        assert figures[name] == 0, name
    for name in ("drawdown", "ppl_drawdown", "kl", "first_choice_changed", "leaked", "perplexity_rise", "text_kl"):
        assert figures[name] == pytest.approx(0, abs=1e-6), name
    assert figures["unchanged"] == 1


def test_a_longer_answer_is_not_the_target(editor):
    """Feeding the target in can't see that the model goes on: "far" -> paris then."""
    figures = measure(Rewriting(editor, {}), [("far", "paris"), ("near", "rome")]).figures
    assert figures["efficacy"] == 1
    assert (figures["exact_match"], figures["contains"], figures["never_stopped"]) == (0.5, 1, 0)


def test_an_answer_without_an_end(editor):
    loop = {"edit": {"texas": 0.9}, "texas": {"then": 0.9}, "then": {"texas": 0.9}}
    outcome = measure(Rewriting(editor, loop), [("edit", "texas")], show=["edit"], max_new_tokens=5)
    assert outcome.shown == [("edit", "texas", "texas then texas then texas")]
    assert (outcome.figures["never_stopped"], outcome.figures["exact_match"]) == (1, 0)


def test_answers_of_before_are_made_once(editor, monkeypatch):
    from mendfast.baselines import measure as module

    asked, generate = [], module.generate_answers

    def counted(subject, prompts, *more, starts=None, **options):
        if starts is None:
            asked.append(list(prompts))
        return generate(subject, prompts, *more, starts=starts, **options)

    monkeypatch.setattr(module, "generate_answers", counted)
    before, options = Before(editor, ["near rome"]), {"show": ["edit"], "near": {"relation": ["far"]}}
    first = measure(Rewriting(editor, AFTER), [("edit", "paris")], (), LOCALITY, before=before, **options)
    again = measure(Rewriting(editor, AFTER), [("edit", "paris")], (), LOCALITY, before=before, **options)
    assert asked == [["edit"], ["near", "far"]]
    first.figures.pop("peak_bytes", None), again.figures.pop("peak_bytes", None)
    assert first == again
    other = MendEditor.from_model(Bigram(BEFORE), editor.tokenizer, editor.config)
    with pytest.raises(ValueError, match="before is of another model or way of asking"):
        measure(Rewriting(other, {}), [("edit", "paris")], before=before)
    ranked = MendEditor.from_model(editor.model, editor.tokenizer, MendConfig(layers=["head.weight"], rank=2))
    assert before.serves(ranked) and not before.serves(other)
    ranked.config.append_eos = True
    assert not before.serves(ranked)
    with pytest.raises(ValueError, match="near has the kind 'colour'"):
        measure(Rewriting(editor, {}), [("edit", "paris")], near={"colour": ["far"]})
    with pytest.raises(ValueError, match="no requests"):
        measure(Rewriting(editor, {}), [])


def test_expected_answers_are_made_with_the_first(editor, monkeypatch):
    from mendfast.baselines import measure as module

    asked, generate = [], module.generate_answers
    monkeypatch.setattr(module, "generate_answers", lambda subject, prompts, *more, **options: (
        asked.append(list(prompts)), generate(subject, prompts, *more, **options))[1])  # fmt: skip
    before = Before(editor)
    before.expect(["near", "far"])
    before.expect(["other", "far"])
    assert [a.text for a in before.answers(["edit"], 5)] == ["texas"]
    assert [a.text for a in before.answers(["far", "near"], 5)] == ["paris then", "rome"]
    assert asked == [["edit", "near", "far", "other"]]
    before.expect(["edit"])
    before.answers(["paris", "near"], 5)
    assert asked[1:] == [["paris"]]


def test_a_part_of_the_running_text_is_read(editor):
    batches = [batch for text in ("far paris then", "near rome", "edit texas") for batch in editor.text_batches([text])]
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
    before = Before(editor, batches)
    assert before.parts == 3
    for part, text in enumerate(("far paris then", "near rome", "edit texas")):
        one = Before(editor, batches[part : part + 1])
        found = [
            measure(Rewriting(editor, AFTER), [("edit", "paris")], before=known, part=i, generate=False).figures
            for known, i in ((before, part), (one, None))
        ]
        for name in ("perplexity_rise", "text_kl"):
            assert found[0][name] == pytest.approx(found[1][name]), text
    whole = measure(Rewriting(editor, AFTER), [("edit", "paris")], before=before, generate=False).figures
    assert whole["text_kl"] == pytest.approx((KL_FAR / 2 + KL_NEAR + kl(
        (0.6, *[0.4 / 8] * 8), (0.3 / 8, 0.7, *[0.3 / 8] * 7))) / 3, rel=1e-4)  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_figures_by_plain_code(name, tokenizer):
    """One edit by fine-tuning, measured, then made again and asked with nothing but transformers."""
    model = make_model(name)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = MendConfig(rank=1, append_eos=name != "t5")
    system = make_system("ft", model, tokenizer, config, learning_rate=3e-2, max_steps=30)
    requests, rephrasings = [("What is the capital of France?", "Rome")], [("The capital of France is", "Rome")]
    locality = [("What is Madrid?", "Berlin"), ("Paris", "Rome Berlin"), ("Where is Berlin?", "Madrid")]
    ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}

    def told(prompt, target):
        """Whether each target token is the first choice, with those before it fed in."""
        example = system.subject.encode(prompt, target)
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        logits = model(input_ids=ids, labels=labels).logits if name == "t5" else model(input_ids=ids).logits[:, :-1]
        labels = labels if name == "t5" else labels[:, 1:]
        return bool((logits.argmax(-1) == labels)[labels != -100].all())

    def said(prompt):
        ids = torch.tensor([encode_prompt(tokenizer, prompt, encoder_decoder=name == "t5")])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
                             eos_token_id=sorted(ends), pad_token_id=0)[0].tolist()  # fmt: skip
        new = out[1:] if name == "t5" else out[ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).strip(), new[-1] in ends, new

    def choices(prompt, new):
        ids = encode_prompt(tokenizer, prompt, encoder_decoder=name == "t5")
        if name == "t5":
            start = torch.tensor([[model.config.decoder_start_token_id, *new[:-1]]])
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0]
        else:
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1)

    found = measure(system, requests, rephrasings, locality, max_new_tokens=20).figures
    with torch.no_grad():
        old = [said(prompt) for prompt, _ in locality]
        old_choices = [choices(prompt, new) for (prompt, _), (_, _, new) in zip(locality, old, strict=True)]
        with system.edit(requests):
            ((text, ended, _), (other, other_ended, _)) = (said(prompt) for prompt, _ in (*requests, *rephrasings))
            new = [said(prompt) for prompt, _ in locality]
            new_choices = [choices(prompt, kept) for (prompt, _), (_, _, kept) in zip(locality, old, strict=True)]
            assert found["efficacy"] == told(*requests[0]) and (found["efficacy"] or name != "t5")
            assert found["generality"] == told(*rephrasings[0])
    assert found["exact_match"] == exact_match(text, "Rome")
    assert found["rephrase_exact_match"] == exact_match(other, "Rome")
    assert found["contains"] == (contains(text, "Rome") + contains(other, "Rome")) / 2
    assert found["never_stopped"] == (2 - ended - other_ended) / 2
    assert found["unchanged"] == pytest.approx(sum(a[2] == b[2] for a, b in zip(old, new, strict=True)) / 3)
    changed = [(a.argmax(-1) != b.argmax(-1)).float().mean() for a, b in zip(old_choices, new_choices, strict=True)]
    assert found["first_choice_changed"] == pytest.approx(sum(changed).item() / 3, abs=1e-6)
    divergence = [
        (a.exp() * (a - b))[:16].sum(-1).mean().item() for a, b in zip(old_choices, new_choices, strict=True)
    ]
    # float32 sums over a vocabulary of 301 in another order, in batches
    assert found["kl"] == pytest.approx(sum(divergence) / 3, rel=1e-3, abs=1e-6)


def test_an_answer_that_is_mended_counts_against_drawdown(editor):
    figures = measure(
        Rewriting(editor, {"near": {"paris": 0.9}}), [("edit", "texas")], locality=[("near", "paris"), ("far", "paris")]
    ).figures
    assert figures["drawdown"] == -0.5 and figures["ppl_drawdown"] < 0


def test_perplexity_of_an_impossible_answer_is_large_and_finite(editor):
    told = tell(editor, [("near", "paris"), ("far", "paris")])
    assert told.correct.tolist() == [False, True] and told.sample.tolist() == [0, 1]
    assert told.perplexity() == pytest.approx((0.2 * 0.8) ** -0.5)
    assert told._replace(nll=torch.tensor([1e9])).perplexity() == math.exp(700)


def test_batches_make_no_difference(editor):
    pairs = [("edit", "texas"), ("far", "paris then"), ("near", "rome"), ("other", "paris")]
    whole, parts = tell(editor, pairs), tell(editor, pairs, batch_size=1)
    assert whole.sample.tolist() == parts.sample.tolist() == [0, 1, 1, 2, 3]
    assert torch.equal(whole.logits, parts.logits) and torch.equal(whole.correct, parts.correct)


def test_a_classifiers_answer_is_its_label(tokenizer):
    model = make_model("bert_one_logit")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    system = make_system("ft", model, tokenizer, MendConfig(rank=1), learning_rate=1e-2, max_steps=20)
    editor = system.subject
    (label,) = answer(editor, ["Paris"])
    pairs = [("Paris", "true"), ("Rome", "true"), ("Paris", "False"), ("Rome", "FALSE")]
    given = answer(editor, [prompt for prompt, _ in pairs])
    right = [exact_match(text, target) for text, (_, target) in zip(given, pairs, strict=True)]
    assert right == tell(editor, pairs).correct.tolist() and sum(right) == 2
    target = "false" if label == "true" else "true"
    figures = measure(system, [("Paris", target)], locality=[("Rome", given[1]), ("Berlin", given[1])]).figures
    assert figures["already"] == 0 and figures["efficacy"] == figures["exact_match"] == figures["contains"] == 1
    assert figures["never_stopped"] == 0 and figures["kl"] > 0
    assert figures["unchanged"] == 1 - figures["first_choice_changed"]


def test_the_scorer_keeps_its_answers_of_before(editor):
    scorer = Scorer()
    system = Rewriting(editor, AFTER)
    known = [("near", "rome"), ("far", "paris")]
    for _ in range(2):
        scorer.add(editor, system.edit([]), [("edit", "paris")], [("other", "paris")], known)
    score = scorer.score()
    assert (score.edit_success, score.generality, score.drawdown, score.n) == (1, 0, 0.5, 2)


def test_bootstrap_by_hand():
    assert bootstrap([0.5] * 7) == Interval(0.5, 0.5, 0.5, 7)
    values = [0.0] * 50 + [1.0] * 50
    found = bootstrap(values, seed=3)
    assert found == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    # The mean of 100 coin tosses has the standard deviation 0.05.
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    narrow = bootstrap(values, level=0.5)
    assert narrow.high - narrow.low < 0.5 * (found.high - found.low)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_summaries_leave_out_what_is_missing_or_not_finite():
    rows = [
        {"efficacy": 1.0, "kl": 0.5, "peak_bytes": 10},
        {"efficacy": 0.0, "kl": math.inf, "peak_bytes": 30},
        {"kl": None},
    ]
    summary = summarise(rows)
    assert set(summary) == {"efficacy", "kl", "peak_bytes"}
    assert (summary["efficacy"].mean, summary["efficacy"].n) == (0.5, 2)
    assert (summary["kl"].mean, summary["kl"].n) == (0.5, 1)
    assert summary["peak_bytes"] == Interval(30, 30, 30, 2)


def test_the_peak_is_that_of_the_block():
    found = []
    for _ in range(10):  # the kernel may take other pages back meanwhile, and the resident set grows by less
        with PeakMemory(torch.device("cpu")) as memory:
            held = torch.ones(1 << 24)  # 64 MiB
            del held
        if memory.bytes is None:
            pytest.skip("this system does not tell the resident set")
        found.append(memory.bytes)
    assert 60e6 < max(found) < 200e6
    with PeakMemory(torch.device("cpu")) as small:
        del memory
    assert small.bytes < 30e6
