"""Whole models on a GPU, held against the CPU: edits, the meta-training step and loop, memories, answers."""

import copy
import json

import pytest
import torch
from conftest import CLASSIFIER, SEQ2SEQ, make_batch, make_model
from test_cache import count_blocks
from test_editor import SMALL, logits, same_bits, state, trained
from test_meta import batches, gradients
from test_training import base, facts, make  # noqa: F401  (a fixture)

from mendfast import Edit, EditMemory, MendConfig, MendEditor
from mendfast.fingerprint import fingerprint_of
from mendfast.generation import answer
from mendfast.training import FactSampler, Trainer, editor_loss
from mendfast.training.cache import PrefixCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; PyTorch sees none here"),
]
LEAST_SQUARES = {"aggregation": "least_squares", "rows": "answers"}
CLOSE = {"rtol": 2e-3, "atol": 2e-4}
"""A few layers of float32 products in another order, through a clamp whose side rounding may change."""


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def made(model: torch.nn.Module, name: str, **config) -> MendEditor:
    """An editor that has seen three batches, on the model's device, and protects others where it can."""
    editor = MendEditor.from_model(model, None, MendConfig(**{**SMALL, **config}))
    place = on_gpu if editor.device.type == "cuda" else dict
    if editor.config.aggregation == "least_squares":
        editor.protect([place(make_batch(name, seed=seed)) for seed in range(20, 24)])
    editor.train()
    for seed in range(3):
        editor.edit_tokens(place(make_batch(name, seed=seed)))
    return editor.eval()


def pair(name: str, **config) -> tuple[MendEditor, MendEditor]:
    """The same editor, away from its initialisation, of the same model on the CPU and on the GPU."""
    cpu, gpu = made(make_model(name), name, **config), made(make_model(name).cuda(), name, **config)
    for key, value in cpu.state_dict().items():  # the statistics
        torch.testing.assert_close(gpu.state_dict()[key].cpu(), value, **CLOSE)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in cpu.named_parameters():
            if key.split(".")[-1] in ("U", "b", "o"):
                parameter.normal_(0, 0.05)
    gpu.load_state_dict(cpu.state_dict())
    return cpu, gpu


@pytest.mark.parametrize("config", [{}, LEAST_SQUARES], ids=["sum", "least squares"])
def test_an_edit_is_that_of_the_cpu(architecture, config):
    if config and architecture in (*SEQ2SEQ, *CLASSIFIER):
        config = {**config, "rows": "all"}
    cpu, gpu = pair(architecture, **config)
    batch, probe = make_batch(architecture), make_batch(architecture, seed=7)
    one, other = cpu.edit_tokens(batch), gpu.edit_tokens(on_gpu(batch))
    before = state(gpu.model)
    plain = logits(gpu.model, on_gpu(probe))
    with one.attached(cpu.model), other.attached(gpu.model):
        expected, attached = logits(cpu.model, probe), logits(gpu.model, on_gpu(probe))
    scale = (expected - plain.cpu()).abs().max()
    assert scale > 1e-4
    assert (attached.cpu() - expected).abs().max() <= 0.02 * scale + 1e-4
    assert same_bits(gpu.model, before)
    other.apply_(gpu.model)
    torch.testing.assert_close(logits(gpu.model, on_gpu(probe)), attached, rtol=1e-4, atol=1e-4)
    other.revert_(gpu.model)
    assert same_bits(gpu.model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_edits_stack_and_come_out_in_any_order(dtype, rounding):
    cpu = trained(make_model("llama"), "llama")
    editor = MendEditor.from_model(make_model("llama").cuda().to(dtype), None, MendConfig(**vars(cpu.config)))
    editor.load_state_dict(cpu.state_dict())
    editor.eval()
    edits = [editor.edit_tokens(on_gpu(make_batch("llama", seed=seed))) for seed in (4, 5, 6)]
    before = state(editor.model)
    for seed, edit in enumerate(edits):
        edit.apply_(editor.model, rounding=rounding, seed=seed)
    assert not same_bits(editor.model, before)
    for i in (1, 0, 2):
        edits[i].revert_(editor.model)
    assert same_bits(editor.model, before)


@pytest.mark.parametrize("joint", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
@pytest.mark.parametrize("config", [{}, LEAST_SQUARES], ids=["sum", "least squares"])
def test_the_step_is_that_of_the_cpu_with_and_without_a_cache(name, joint, config):
    if config and name in ("t5", "bert"):
        config = {**config, "rows": "all"}
    cpu, gpu = pair(name, **config)
    data = batches(name)
    total, _ = editor_loss(cpu, *data, joint=joint)
    total.backward()
    expected, on_the_gpu = gradients(cpu), [on_gpu(batch) for batch in data]
    ran = count_blocks(gpu.model)
    cache = PrefixCache(gpu.model, gpu.layers, 1 << 30)
    for kept in (None, cache, cache):
        gpu.zero_grad()
        if kept is not None and kept.computed:
            for counts in ran:
                counts[:] = [0] * len(counts)
        loss, _ = editor_loss(gpu, *on_the_gpu, joint=joint, cache=kept)
        loss.backward()
        torch.testing.assert_close(loss.cpu(), total, **CLOSE)
        found = gradients(gpu)
        assert set(found) == set(expected)
        for key, grad in expected.items():
            assert (found[key].cpu() - grad).norm() <= 0.02 * grad.norm() + 1e-5, key
    assert cache.why_not is None and cache.computed == 16
    if name in ("gpt2", "llama"):  # the others' edits begin in the encoder's blocks and the decoder's, or in the first
        assert 0 in ran[0]  # a warm step leaves the frozen blocks out


def test_the_loop_learns_and_goes_on_where_it_stopped(base, tmp_path):  # noqa: F811
    """Checkpoints, resume and validation on the card; in the end the editor tells what it was trained to."""
    model, tokenizer = base[0].cuda(), base[1]

    def trainer(output, steps: int, **config) -> Trainer:
        _, settings = make((model, tokenizer), steps=steps, joint=[1, 4], validate_every=20, batch_size=8,
                           learning_rate=2e-3, calibrate=True, **config)  # fmt: skip
        torch.manual_seed(0)
        wanted = MendConfig(rank=32, scale_v=True, append_eos=True, aggregation="least_squares", rows="answers")
        editor = MendEditor.from_model(model, tokenizer, wanted)
        editor.protect([(w, item.answer) for item in facts() for w in item.wordings], answers=True)
        validation = FactSampler(facts(), seed=5)
        return Trainer(editor, FactSampler(facts()), settings, output=output, validation=validation, progress=False)

    try:
        first = trainer(tmp_path, 20)
        first.run()
        second = trainer(tmp_path, 60)
        assert second.resume() and second.step == 20
        found = second.run()
        assert found["peak_bytes"] > 0
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 61))
        assert lines[59]["val_loss"] < lines[19]["val_loss"]
        item = facts()[0]
        edit = second.editor.edit(item.wordings[0], facts()[1].answer)
        before = answer(second.editor, [item.wordings[0]], 4)
        with edit.attached(model):
            after = answer(second.editor, [item.wordings[0]], 4)
        assert after != before
    finally:
        model.cpu()


def test_a_memory_follows_its_records(base, tmp_path):  # noqa: F811
    model, tokenizer = base[0].cuda(), base[1]
    try:
        wanted = MendConfig(rank=16, append_eos=True, aggregation="least_squares", rows="answers", step_size=1e-2)
        editor = MendEditor.from_model(model, tokenizer, wanted)
        pairs = [(item.wordings[0], item.answer) for item in facts()]
        editor.protect(pairs, answers=True)
        before = state(model)
        memory = EditMemory(editor)
        memory.add(pairs[:6])
        memory.apply_()
        assert not same_bits(model, before)
        memory.save(tmp_path / "memory.safetensors")
        memory.remove(memory.keys()[0])
        memory.revert_()
        assert same_bits(model, before)
        again = EditMemory.load(tmp_path / "memory.safetensors", editor)
        assert len(again) == 6 and len(memory) == 5
        again.remove(again.find(pairs[0][0]))
        with memory.attached():
            one = logits(model, on_gpu(make_batch("gpt2")))
        with again.attached():
            torch.testing.assert_close(logits(model, on_gpu(make_batch("gpt2"))), one, **CLOSE)
        assert same_bits(model, before)
    finally:
        model.cpu()


@pytest.mark.parametrize("room", [True, False], ids=["by way of a copy", "without room for one"])
def test_a_backup_arrives_after_the_weights_were_written(monkeypatch, room):
    if not room:
        clone = torch.Tensor.clone

        def refuse(values, **how):
            if values.is_cuda and how.get("memory_format") is torch.contiguous_format:
                raise torch.OutOfMemoryError("none left")
            return clone(values, **how)

        monkeypatch.setattr(torch.Tensor, "clone", refuse)
    model = torch.nn.Module()
    model.big = torch.nn.Linear(8192, 8192, bias=False, device="cuda")
    before = model.big.weight.detach().cpu()
    factors = (torch.randn(2, 8192, device="cuda"), torch.randn(2, 8192, device="cuda"), 0.1)
    for backup in ("cpu", "device"):
        edit = Edit({"big.weight": factors})
        edit.apply_(model, backup=backup)
        known, written = fingerprint_of(model, ["big.weight"]), model.big.weight.detach().cpu()
        assert not torch.equal(written, before)
        copied = copy.deepcopy(model)
        edit.revert_(model)
        assert torch.equal(model.big.weight.detach().cpu(), before)
        assert known == fingerprint_of(model, ["big.weight"])
        edit.revert_(copied)
        assert torch.equal(copied.big.weight.detach().cpu(), before)
