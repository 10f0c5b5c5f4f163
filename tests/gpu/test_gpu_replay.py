"""Passes as CUDA graphs on a GPU: the rows of the launched pass, whatever happens to the model in between."""

import threading

import pytest
import torch
from conftest import make_batch, make_model
from test_editor import SMALL
from test_gpu_model import on_gpu

from mendfast import MendConfig, MendEditor
from mendfast.capture import agree
from mendfast.replay import KEPT, _same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; PyTorch sees none here"),
]


def made(name: str, **config) -> MendEditor:
    return MendEditor.from_model(make_model(name).cuda(), None, MendConfig(**{**SMALL, **config}))


def as_launched(editor: MendEditor, batch: dict) -> None:
    """The rows of gradients() are those of the pass that launches every kernel."""
    found, expected = editor.gradients(batch), editor._launched(batch)
    for name, sides in expected.items():
        assert [s.dtype for s in found[name]] == [s.dtype for s in sides] and _same(found[name], sides), name


@pytest.mark.parametrize("config", [{}, {"loss_reduction": "batch"}], ids=["edit", "batch"])
def test_every_architecture_is_recorded(architecture, config):
    editor = made(architecture, **config)
    for seed in range(3):
        as_launched(editor, on_gpu(make_batch(architecture, seed=seed)))
    as_launched(editor, make_batch(architecture, seed=3))  # from the CPU
    assert editor.replays.why_not is None and len(editor.replays) == 1
    as_launched(editor, make_batch(architecture, left=True))
    as_launched(editor, make_batch(architecture, size=1, length=20))
    assert editor.replays.why_not is None and len(editor.replays) >= 2


def test_sixteen_bits():
    editor = MendEditor.from_model(make_model("llama").cuda().bfloat16(), None, MendConfig(**SMALL))
    as_launched(editor, make_batch("llama"))
    assert len(editor.replays) == 1


def test_the_same_bits_each_time():
    editor, batch = made("gpt2"), make_batch("gpt2")
    first = editor.gradients(batch)
    editor.gradients(make_batch("gpt2", seed=5))
    for name, sides in editor.gradients(batch).items():
        assert all(torch.equal(a, b) for a, b in zip(sides, first[name], strict=True))


def test_edits_are_seen_and_what_moves_is_recorded_anew():
    editor, batch = made("llama"), make_batch("llama")
    before = editor.gradients(batch)
    edit = editor.edit_tokens(batch)
    edit.apply_(editor.model)
    as_launched(editor, batch)
    after = editor.gradients(batch)
    assert any(not torch.equal(before[name][1], after[name][1]) for name in before)
    edit.revert_(editor.model)
    again = editor.gradients(batch)
    assert all(torch.equal(before[name][1], again[name][1]) for name in before)
    with torch.no_grad():
        for parameter in editor.model.parameters():
            parameter.data = parameter.data * 1.5
    as_launched(editor, batch)
    editor.model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    as_launched(editor, batch)
    assert editor.replays.why_not is None and len(editor.replays) == 1


def test_hooks_are_obeyed():
    editor, batch = made("llama"), make_batch("llama")
    edit = editor.edit_tokens(batch)
    count = len(editor.replays)
    with edit.attached(editor.model):
        as_launched(editor, batch)
    seen = []
    handle = editor.model.model.layers[1].register_forward_hook(lambda *args: seen.append(1))
    editor.gradients(batch)
    handle.remove()
    assert seen and len(editor.replays) == count == 1


class Asking(torch.nn.Module):
    """Waits for the GPU in the midst of a pass."""

    def forward(self, x):
        return torch.nn.functional.silu(x) if float(x.sum()) < torch.inf else x


def test_a_model_that_waits_for_the_gpu_is_launched():
    editor, batch = made("llama"), make_batch("llama")
    for layer in editor.model.model.layers:
        layer.mlp.act_fn = Asking()
    as_launched(editor, batch)
    assert editor.replays.why_not and not len(editor.replays)
    as_launched(editor, batch)
    # the device and its allocator are as before: memory that two streams have used comes back
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    for _ in range(3):
        block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        block.record_stream(other)
        del block
        torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held
    assert editor.edit_tokens(batch).apply_(editor.model).revert_(editor.model)


def test_recordings_are_few():
    editor = made("gpt2")
    for size in range(1, KEPT + 3):
        editor.gradients(make_batch("gpt2", size=size))
    assert len(editor.replays) == KEPT
    as_launched(editor, make_batch("gpt2", size=1))


def test_threads_and_streams_take_turns():
    editor = made("gpt2")
    batches = [on_gpu(make_batch("gpt2", seed=seed)) for seed in range(6)]
    expected = [editor._launched(batch) for batch in batches]
    wrong = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                for name, sides in editor.gradients(batches[i]).items():
                    if not all(agree(a, b) for a, b in zip(sides, expected[i][name], strict=True)):
                        wrong.append((i, name))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(editor.replays) == 1
