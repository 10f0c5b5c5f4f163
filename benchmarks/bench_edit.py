"""How long does one edit take end to end, and where does the time go?"""

from __future__ import annotations

import pytest
import torch

import mendfast
from mendfast import backend
from mendfast.capture import capture, frozen
from mendfast.ledger import ledger_of
from mendfast.objective import nll, target_rows, to_device

from . import naive_mend
from .cases import Case, cases
from .contest import Contestant, relative_error
from .counts import edit_work
from .shapes import SHAPES, batch, edited_model, make_editor

CASES = cases((1, 5, 25, 125), typical=1, cpu=(1, 5, 25))
PHASES = cases((1,), typical=1, cpu=(1,), cpu_others=False)
NAIVE_EDITS = {"cpu": 5, "cuda": 25}
"""What goes through the edits one by one takes a time proportional to them: more would say the same again."""


def _editor(contest, case: Case):
    """The editor of the row's model: float32 on a CPU and for small models, bfloat16 for large ones on a GPU."""
    dtype = torch.bfloat16 if contest.on_gpu and not case.shape.on_cpu and not contest.quick else torch.float32
    shape = contest.size(case.shape)
    return shape, edited_model(shape, contest.device.type, dtype), dtype


def _one(tokens: dict, i: int) -> dict:
    return {name: value[i : i + 1] for name, value in tokens.items()}


def weights_of(editor) -> list[torch.Tensor]:
    return [layer.weight.detach().clone() for layer in editor.layers]


def naive_edit(editor, tokens: dict, freeze_below: bool = False) -> None:
    """Algorithm 2 for each edit, one after the other, and the sum of the full updates written into the weights.

    ``freeze_below``: within :func:`benchmarks.naive_mend.frozen_below`.
    """
    if freeze_below:
        with naive_mend.frozen_below(editor):
            return naive_edit(editor, tokens)
    edits = (naive_mend.edited_weights(editor, _one(tokens, i)) for i in range(len(tokens["labels"])))
    total = {name: weight.detach() for name, weight in next(edits).items()}
    for weights in edits:
        for layer in editor.layers:
            total[layer.name] += (weights[layer.name] - layer.weight).detach()
    restore(editor, [total[layer.name] for layer in editor.layers])


@torch.no_grad()
def restore(editor, weights: list[torch.Tensor]) -> None:
    for layer, weight in zip(editor.layers, weights, strict=True):
        layer.weight.copy_(weight)


def bare_pass(editor, tokens: dict):
    """The model's forward pass on the edits' tokens and a backward pass that stops at the first edited layer."""
    first: list[torch.Tensor] = []

    def start(module, args, output):
        if not first:
            first.append(output.detach().requires_grad_())
            return first[0]

    handles = [layer.module.register_forward_hook(start) for layer in editor.layers]
    try:
        with backend("aten"), frozen(editor.model):  # PyTorch alone
            loss = nll(target_rows(editor.model, tokens), len(tokens["labels"])).sum()
            return torch.autograd.grad(loss, first)
    finally:
        for handle in handles:
            handle.remove()


def check(editor, tokens: dict, tolerance: float = 1e-3) -> None:
    """The edit's update of every weight is the naive loop's, frozen below or not, in float32, relative to its norm."""
    edit, before = editor.edit_tokens(tokens), weights_of(editor)
    edit.apply_(editor.model)
    ours = [layer.weight.detach() - old for layer, old in zip(editor.layers, before, strict=True)]
    edit.revert_(editor.model)
    for freeze_below in (False, True):
        naive_edit(editor, tokens, freeze_below)
        naive = [layer.weight.detach() - old for layer, old in zip(editor.layers, before, strict=True)]
        restore(editor, before)
        error = relative_error(ours, naive)
        assert error <= tolerance, f"the edit differs from the naive loop's by {error:.1e}, more than {tolerance:.0e}"
    assert all(torch.equal(layer.weight, old) for layer, old in zip(editor.layers, before, strict=True))


def _check_somewhere(contest, case: Case, editor, tokens: dict, dtype: torch.dtype) -> None:
    """16 bits round most of an update away, so a bfloat16 row is checked in float32 on a small model of its kind."""
    if dtype != torch.float32:
        shape = case.shape.small()
        editor = make_editor(shape, contest.device.type, torch.float32)
        tokens = to_device(batch(shape, len(tokens["labels"])), contest.device)
    check(editor, {name: value[:2] for name, value in tokens.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_end_to_end(contest, case):
    """Tokens in, weights changed: ``editor.edit_tokens(...).apply_(model)``."""
    shape, editor, dtype = _editor(contest, case)
    model, size, held = editor.model, contest.amount(case.size), []

    def data(seed: int) -> dict:
        return to_device(batch(shape, size, seed=seed), contest.device)

    _check_somewhere(contest, case, editor, data(0), dtype)

    before = weights_of(editor)

    def undo(_) -> None:
        held.pop().revert_(model)

    def one_at_a_time(tokens: dict) -> None:
        edits = [editor.edit_tokens(_one(tokens, i)) for i in range(size)]
        held.append(mendfast.Edit.sum(edits).apply_(model))

    contestants = {
        "mendfast": Contestant(lambda tokens: held.append(editor.edit_tokens(tokens).apply_(model)), finish=undo)
    }
    if size <= NAIVE_EDITS[contest.device.type]:
        contestants["naive"] = Contestant(
            lambda tokens: naive_edit(editor, tokens), finish=lambda _: restore(editor, before)
        )
        contestants["naive, frozen below"] = Contestant(
            lambda tokens: naive_edit(editor, tokens, freeze_below=True), finish=lambda _: restore(editor, before)
        )
    if 1 < size <= NAIVE_EDITS[contest.device.type]:
        contestants["one at a time"] = Contestant(one_at_a_time, finish=undo)
    contestants["bare pass"] = lambda tokens: bare_pass(editor, tokens)
    work = edit_work(editor, data(0), editor.edit_tokens(data(0)))
    ledger_of(model).free()  # so that the backup is seen in the peak
    row = {"shape": case.shape.name, "edits": case.size, "dtype": str(dtype)[6:]}
    contest(row, data, contestants, work=work, reference=None, units=size)


@pytest.mark.parametrize("phase", ["forward", "backward", "editor", "update", "revert"])
@pytest.mark.parametrize("case", PHASES, ids=str)
def test_phases(contest, case, phase):
    shape, editor, dtype = _editor(contest, case)
    model, size = editor.model, case.size

    def data(seed: int) -> dict:
        return to_device(batch(shape, size, seed=seed), contest.device)

    def forward(tokens: dict):
        with capture(model, editor.layers, size) as captured:
            return captured, nll(target_rows(model, tokens, for_nll=True), size).sum()

    def naive_forward(tokens: dict) -> torch.Tensor:
        return naive_mend.nll(model, naive_mend.logits_of(model, tokens), tokens["labels"])

    @torch.no_grad()
    def transform(captured):
        return editor.transform(captured)

    def by_reference(run):
        def call(state):
            with mendfast.backend("reference"):
                return run(state)

        return call

    def apply(edit):
        return edit.apply_(model)

    def revert(edit):
        return edit.revert_(model)

    def edit(tokens: dict):
        return editor.edit_tokens(tokens)

    fields = {
        "forward": {"mendfast": forward, "naive": naive_forward},
        "backward": {
            "mendfast": Contestant(lambda state: state[0].rows(state[1]), forward),
            "naive": Contestant(lambda loss: loss.backward(), naive_forward, lambda _: model.zero_grad()),
        },
        "editor": {
            "mendfast": Contestant(transform, editor.gradients),
            "reference": Contestant(by_reference(transform), editor.gradients),
        },
        "update": {
            "mendfast": Contestant(apply, edit, revert),
            "reference": Contestant(by_reference(apply), edit, revert),
        },
        "revert": {"mendfast": Contestant(revert, lambda tokens: apply(edit(tokens)))},
    }
    ledger_of(model).free()
    row = {"shape": case.shape.name, "phase": phase, "edits": size, "dtype": str(dtype)[6:]}
    contest(row, data, fields[phase], reference=None)


@pytest.mark.parametrize("case", PHASES, ids=str)
def test_attached(contest, case):
    """A forward pass with the edit attached and taken off again, the weights untouched."""
    shape, editor, dtype = _editor(contest, case)
    model = editor.model
    edit = editor.edit_tokens(to_device(batch(shape, case.size), contest.device))

    def data(seed: int) -> dict:
        tokens = to_device(batch(shape, 1, seed=seed), contest.device)
        return {name: value for name, value in tokens.items() if name != "labels" or shape.family in ("t5", "bart")}

    @torch.no_grad()
    def attached(tokens: dict) -> torch.Tensor:
        with edit.attached(model):
            return model(**tokens).logits

    @torch.no_grad()
    def plain(tokens: dict) -> torch.Tensor:
        return model(**tokens).logits

    contestants = {
        "mendfast": attached,
        "applied": Contestant(plain, lambda t: (edit.apply_(model), t)[1], lambda _: edit.revert_(model)),
        "unedited": plain,
    }
    row = {"shape": case.shape.name, "edits": case.size, "dtype": str(dtype)[6:]}
    # the rows must agree with the written weights; the unedited model answers differently, and is timed alone
    if dtype == torch.float32:
        state = contestants["applied"].prepare(data(0))
        expected = plain(state)
        edit.revert_(model)
        assert relative_error(attached(data(0)), expected) < 1e-4
    contest(row, data, contestants, reference=None)


def test_every_shape_is_benchmarked():
    assert {case.shape.name for case in CASES} == set(SHAPES)
