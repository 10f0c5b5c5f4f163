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
from mendfast.baselines.measure import FIGURES, Interval, PeakMemory, bootstrap, measure, says, summarise
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
            if ids[0, -1] == ID["end"]:
                break
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


def test_one_edit_by_hand(editor):
    system = Rewriting(editor, AFTER)
    outcome = measure(
        system,
        [("edit", "paris then")],
        rephrasings=[("other", "paris then"), ("far", "paris then")],
        locality=[("near", "rome"), ("far", "paris then")],
        portability=[("near", "paris"), ("near", "rome")],
        show=["edit", "far"],
    )
    # After the edit: "edit" -> paris then; "other" still -> texas; "far" -> paris then.
    figures = outcome.figures
    assert figures["efficacy"] == 1
    assert figures["edit_success"] == pytest.approx(2 / 3)
    assert figures["generality"] == figures["portability"] == 0.5
    assert figures["already"] == 0
    # Before, "near" -> rome and "far" -> paris then were right; after, "near" is wrong.
    assert figures["drawdown"] == 0.5
    before, after = (0.6, 0.8, 0.9), (0.1, 0.4, 0.9)  # of each target token
    perplexity = [math.exp(-sum(map(math.log, chances)) / 3) for chances in (before, after)]
    assert figures["ppl_drawdown"] == pytest.approx(perplexity[1] - perplexity[0], rel=1e-5)
    # KL at "near": rome, paris and seven others; at "far": paris and eight others; none at "paris".
    near = 0.6 * math.log(0.6 / 0.1) + 0.2 * math.log(0.2 / 0.6) + 0.2 * math.log(0.2 / 0.3)
    far = 0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6)
    assert figures["kl"] == pytest.approx((near + far / 2) / 2, rel=1e-4)
    assert figures["seconds"] == 0.25
    assert figures["autoregressive"] == pytest.approx(2 / 3)
    assert outcome.shown == [("edit", "texas", "paris then"), ("far", "paris then", "paris then")]
    assert set(figures) == set(FIGURES) - ({"peak_bytes"} - set(figures))


def test_figures_without_data_are_absent(editor):
    figures = measure(Rewriting(editor, {}), [("edit", "texas"), ("near", "paris")], generate=False).figures
    assert figures["efficacy"] == figures["edit_success"] == figures["already"] == 0.5
    absent = {"generality", "drawdown", "ppl_drawdown", "kl", "portability", "autoregressive"}
    assert not absent & set(figures)


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


def test_generation_counts_where_the_answer_ends(editor):
    # "far" -> paris then end
    assert says(editor, [("far", "paris"), ("far", "paris then"), ("far", "then"), ("near", "rome")]) == [1, 1, 0, 1]
    editor.config.append_eos = True
    assert says(editor, [("far", "paris"), ("far", "paris then")]) == [False, True]


def test_a_classifiers_answer_is_its_label(tokenizer):
    model = make_model("bert_one_logit")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=1))
    pairs = [("Paris", "true"), ("Rome", "true"), ("Paris", "False"), ("Rome", "FALSE")]
    assert says(editor, pairs) == tell(editor, pairs).correct.tolist()
    assert sum(says(editor, pairs)) == 2


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
