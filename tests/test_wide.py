"""16-bit models whose passes are in float32: the float32 model's with these weights, none of them widened whole."""

from __future__ import annotations

import pytest
import torch
from conftest import CAUSAL, make_batch, make_model
from torch import nn

from mendfast import MendEditor, backend
from mendfast.ops import few_rows, widened
from mendfast.wide import widening


@pytest.fixture(autouse=True)
def no_units(monkeypatch):
    monkeypatch.setattr(widened, "has_units", lambda dtype: False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "parts"), [*((name, False) for name in CAUSAL), ("llama", True), ("gpt2", True)])
def test_an_edits_rows_are_those_of_the_float32_model_with_these_weights(name, parts, dtype, monkeypatch):
    places = []
    make = widened._place
    monkeypatch.setattr(widened, "PART", 1 << 10)
    if parts:
        monkeypatch.setattr(few_rows, "MOST_ROWS", 0)
    monkeypatch.setattr(widened, "_place", lambda *args: places.append(make(*args)) or places[-1])
    model = make_model(name).to(dtype)
    batch = make_batch(name, 3)
    editor = MendEditor.from_model(model)
    with widening(model):
        found = editor.gradients(batch)
    exact = MendEditor.from_model(make_model(name).to(dtype).float()).gradients(batch)
    # Gemma rounds its embeddings' product with their scale to the weights' dtype
    eps = torch.finfo(dtype if name == "gemma" else torch.float32).eps
    for layer, sides in found.items():
        for one, other in zip(sides, exact[layer], strict=True):
            assert one.dtype == torch.float32
            # rows of 32 and 64 terms, through four blocks and back
            assert (one - other).norm() <= 64 * eps * other.norm(), layer
    assert bool(places) is (parts or few_rows.problem() is not None)
    assert max((place.numel() for place in places), default=0) <= 1 << 10
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_what_an_editor_wants_is_in_float32():
    model = make_model("llama").bfloat16()
    editor = MendEditor.from_model(model)
    editor.train()
    u, _, _ = next(iter(editor.wanted(make_batch("llama", 2)).values()))
    assert not u.equal(u.bfloat16().float())


@pytest.mark.parametrize("case", ["float32", "units", "aten", "another kind", "mixed", "encoder-decoder"])
def test_what_is_left_as_it_is(case, monkeypatch):
    model = make_model("t5" if case == "encoder-decoder" else "llama")
    if case != "float32":
        model.bfloat16()
    if case == "units":
        monkeypatch.setattr(widened, "has_units", lambda dtype: True)
    if case == "another kind":
        model.register_parameter("scale", nn.Parameter(torch.ones(1).bfloat16()))
    if case == "mixed":
        model.lm_head.float()
    with backend("aten" if case == "aten" else "auto"), widening(model):
        assert all("forward" not in vars(module) for module in model.modules())
