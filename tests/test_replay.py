"""The pass of an edit whose launches don't depend on values: the same rows; test_gpu_replay.py records it."""

import copy
import pickle

import pytest
import torch
from conftest import make_batch, make_model
from test_editor import SMALL

from mendfast import MendConfig, MendEditor
from mendfast.capture import capture
from mendfast.objective import nll_of, prepared
from mendfast.replay import WIDTH, Replays, _flat, _same, _split


def fixed(editor: MendEditor, batch: dict, reduction: str = "edit") -> dict:
    """u and delta by the pass that is recorded on a GPU."""
    given = prepared(editor.model, batch, reduction, WIDTH)
    inputs = _split(_flat(given.inputs).clone(), given.inputs)
    with capture(editor.model, editor.layers, given.samples) as captured:
        found = captured.rows(nll_of(editor.model, inputs))
    kept = {name: [side[:, : side.shape[1] - given.padding] for side in sides] for name, sides in found.items()}
    for name, (_, delta) in found.items():
        assert not delta[:, kept[name][1].shape[1] :].any(), name
    return kept


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("reduction", ["edit", "batch"])
def test_the_rows_of_every_architecture(architecture, reduction, left):
    editor = MendEditor.from_model(make_model(architecture), None, MendConfig(**SMALL, loss_reduction=reduction))
    batch = make_batch(architecture, left=left)
    found = fixed(editor, batch, reduction)
    for name, sides in editor._launched(batch).items():
        for side, expected in zip(found[name], sides, strict=True):
            seen = batch["attention_mask"].bool() if side.shape[1] == batch["input_ids"].shape[1] else ...
            torch.testing.assert_close(side[seen], expected[seen], rtol=1e-4, atol=1e-6)


def test_batches_of_many_lengths_have_few_shapes():
    model = make_model("llama")
    shapes = set()
    for length in range(4, 4 + 2 * WIDTH):
        ids = torch.randint(3, 90, (1, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["labels"][:, :-3] = -100
        given = prepared(model, batch, "edit", WIDTH)
        shapes.add(tuple(value.shape for value in given.inputs.values()))
        assert given.padding == -length % WIDTH and given.rows == 8
    assert len(shapes) == 3


def test_what_is_not_known_is_left_alone():
    model, batch = make_model("llama"), make_batch("llama")
    assert prepared(model, batch, "edit", WIDTH) is not None
    assert prepared(model, {**batch, "inputs_embeds": torch.zeros(1, 2, 3)}, "edit", WIDTH) is None
    assert prepared(model, {**batch, "attention_mask": batch["attention_mask"].float()}, "edit", WIDTH) is None
    assert prepared(model, {**batch, "attention_mask": torch.ones(1, 1, 4, 4)}, "edit", WIDTH) is None


def test_no_text_is_padded_past_the_context():
    model = make_model("gpt2")
    limit = model.config.n_positions
    ids = torch.randint(3, 90, (1, limit - 1))
    for width, expected in ((limit, limit), (2 * limit, limit - 1)):
        given = prepared(model, {"input_ids": ids, "labels": ids}, "edit", width)
        assert given.inputs["input_ids"].shape[1] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_told_from_a_mistake(dtype):
    torch.manual_seed(0)
    u, delta = torch.randn(1, 5, 8).to(dtype), torch.randn(1, 5, 8).to(dtype)
    delta[:, 3] = 0
    noise = 1 + torch.finfo(dtype).eps * torch.randn(1, 5, 8)
    other = u.clone()
    other[:, 3] += 7  # where there is no gradient
    assert _same(((other * noise).to(dtype), (delta * noise).to(dtype)), (u, delta))
    assert not _same((u, delta.roll(1, 1)), (u, delta)) and not _same((u.roll(1, 1), delta), (u, delta))
    assert not _same((u[:, :4], delta[:, :4]), (u, delta)) and not _same((u, delta * torch.nan), (u, delta))


def test_an_editor_is_copied_without_recordings():
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(**SMALL))
    for copied in (copy.deepcopy(editor.replays), pickle.loads(pickle.dumps(editor.replays))):
        assert isinstance(copied, Replays) and not len(copied)
    assert editor.gradients(make_batch("gpt2")) and not len(editor.replays)  # a CPU has none
