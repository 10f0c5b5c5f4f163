"""Edits that are taken back before their answers are generated, several at once, against each by itself."""

from __future__ import annotations

import pytest
import torch
from test_baselines import edits, make

from mendfast.baselines import asking
from mendfast.baselines.measure import Before, measure, measuring
from mendfast.commands import pending
from mendfast.commands.pending import Pending

RATES = {"ft": 1e-2, "lora": 1e-2, "ultraedit": 1e-2}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("key", ["mend", "ft", "lora", "ultraedit", "in_context", "rome"])
def test_answers_made_together_are_those_of_each_edit(key, name, tokenizer, monkeypatch):
    if key == "lora":
        pytest.importorskip("peft")
    monkeypatch.setattr(pending, "TOGETHER", 2)
    monkeypatch.setattr("mendfast.shared_prefix.SHARED", 2)
    options = {"learning_rate": RATES[key]} if key in RATES else {}
    options |= {"words": 4, "prefixes": 1, "steps": 3} if key == "rome" else {}
    system = make(key, name, tokenizer, **options)
    before, first, together = Before(system.subject), edits(name)[0], []
    requests = [[first], [(first[0], "Paris")], [(first[0], "Berlin Rome")]]
    locality = [("What is Rome?", "Rome"), ("What is 7?", "Paris"), ("What is Paris?", "Berlin")]
    asked = {"rephrasings": [("What is it?", "Rome")], "locality": locality, "show": ["What is 7?"], "before": before,
             "max_new_tokens": 12}  # fmt: skip
    expected = [measure(system, request, **asked) for request in requests]
    weights = {layer.name: layer.weight.detach().clone() for layer in system.subject.layers}
    waiting = Pending(system, lambda place, outcome: together.append((place, outcome)))
    for i, request in enumerate(requests):
        waiting.add({"group": i}, measuring(system, request, later=True, **asked))
        assert len(together) == 2 * (i >= 1)
    waiting.flush()
    assert all(torch.equal(layer.weight, weights[layer.name]) for layer in system.subject.layers)
    assert [place["group"] for place, _ in together] == [0, 1, 2]
    for (_, got), one in zip(together, expected, strict=True):
        for figures in (got.figures, one.figures):
            figures.pop("seconds"), figures.pop("peak_bytes", None)
        assert got == one
    assert expected[0] != expected[1]  # what is asked tells the edits apart


def test_an_edit_that_fails_is_told_and_spoils_no_other(tokenizer, monkeypatch):
    """One whose edit fails, and one whose answers do."""
    system, found = make("ft", "gpt2", tokenizer, learning_rate=1e-2), {}
    waiting = Pending(system, lambda place, line: found.update({place["group"]: line}))

    def line(request, show):
        try:
            outcome = yield from measuring(system, [request], show=show, later=True, max_new_tokens=4)
        except ValueError as error:
            return str(error)
        return outcome.figures["exact_match"]

    first, generate = edits("gpt2")[0], asking.generate_answers

    def failing(subject, prompts, *more, **options):
        if any(len(prompt) > 9 for prompt in prompts):
            raise ValueError("too long")
        return generate(subject, prompts, *more, **options)

    monkeypatch.setattr(asking, "generate_answers", failing)
    for i, (request, show) in enumerate([(first, []), ((first[0], ""), []), (first, ["What is 1? " * 3])]):
        waiting.add({"group": i}, line(request, show))
    assert list(found) == [1] and "says nothing" in found[1]
    waiting.flush()
    assert found[0] in (0.0, 1.0) and found[2] == "too long"
