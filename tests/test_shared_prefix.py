"""The tokens that many texts begin with, once through the frozen blocks: the same rows as by plain passes."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from conftest import CAUSAL, VOCAB, make_model
from test_editor import trained

from mendfast import EditMemory, MendConfig, MendEditor
from mendfast.choice import stacks
from mendfast.labels import collate
from mendfast.shared_prefix import SharedPrefix

PREFIX = 9


def texts(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(3, VOCAB, (PREFIX,), generator=generator).tolist()
    # the first of the others is each another, so that the prefix ends where it does
    return [[*first, 3 + i, *torch.randint(3, VOCAB, (4 + i % 4,), generator=generator).tolist()] for i in range(count)]


def batch_of(ids: list[list[int]]) -> dict[str, torch.Tensor]:
    examples = []
    for own in ids:
        labels = [-100] * (len(own) - 3) + own[-3:]
        examples.append({"input_ids": own, "attention_mask": [1] * len(own), "labels": labels})
    return collate(examples, pad_token_id=0)


def count_rows(model) -> list[int]:
    rows: list[int] = []
    first = stacks(model)[0][1][0]
    inside = next(m for m in first.modules() if isinstance(m, torch.nn.Linear) or "Conv1D" in type(m).__name__)
    inside.register_forward_hook(lambda module, args, output: rows.append(output.shape[0] * output.shape[1]))
    return rows


@pytest.mark.parametrize("name", [*CAUSAL])
def test_gradients_are_those_of_plain_passes(name):
    model = make_model(name)
    editor = trained(model, name)
    ids = texts()
    batch = batch_of(ids)
    plain = editor.gradients(batch)
    prefix = SharedPrefix.of(model, editor.layers, ids)
    if name == "gpt_neo":  # its windows are no layer types of transformers
        assert prefix is None or prefix.ids.shape[1] == PREFIX
        if prefix is None:
            return
    assert prefix is not None and prefix.ids.shape[1] == PREFIX
    rows = count_rows(model)
    with prefix.replayed(batch):
        shared = editor.gradients(batch)
    assert rows == [len(ids) * (batch["input_ids"].shape[1] - PREFIX)]
    eps = torch.finfo(model.dtype).eps
    for layer in plain:
        for one, other in zip(plain[layer], shared[layer], strict=True):
            # rows of 32 and 64 terms, through three blocks and back
            kept = (plain[layer][1] != 0).any(-1)
            assert (one - other)[kept].norm() <= 64 * eps * one[kept].norm(), layer
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_where_there_is_nothing_to_share(name):
    model = make_model(name)
    layers = trained(model, name).layers
    ids = texts()
    if name != "gpt2":
        assert SharedPrefix.of(model, layers, ids) is None
        return
    assert SharedPrefix.of(model, layers, ids[:1]) is None
    assert SharedPrefix.of(model, layers, [own[-4:] for own in ids]) is None
    first = MendEditor.from_model(model, None, MendConfig(layers=["transformer.h.0.mlp.c_fc.weight"])).layers
    assert SharedPrefix.of(model, first, ids) is None
    with pytest.raises(ValueError, match="doesn't begin with the 9 tokens"):
        with SharedPrefix.of(model, layers, ids).replayed(batch_of([own[1:] for own in ids])):
            pass


def test_a_model_that_goes_on_wrongly_is_left_alone(monkeypatch):
    """Its positions start anew after the keys and values that are kept: one text shows it."""
    model = make_model("gpt2")
    layers = trained(model, "gpt2").layers
    forward = model.transformer.forward

    def anew(*args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        return forward(*args, **{**kwargs, "position_ids": torch.arange(ids.shape[1])[None]})

    monkeypatch.setattr(model.transformer, "forward", anew)
    assert SharedPrefix.of(model, layers, texts()) is None


def test_a_memory_runs_a_template_once(tokenizer):
    """The records are those of one at a time, to rounding; longer texts go in smaller passes."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    template = "You are a helpful assistant that answers briefly. Question: {prompt} Answer:"
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=8, prompt_template=template))
    editor.train()
    requests = [(f"Who is number {i}{' really' * (i % 5)}?", f"Person {i}") for i in range(24)]
    editor.wanted(editor.tokenize(requests[:8]))
    editor.eval()
    rows = count_rows(model)
    memory = EditMemory(editor)
    memory.add(requests)
    longest = max(editor.tokenize([request])["input_ids"].shape[1] for request in requests)
    tokens = sum(editor.tokenize([request])["input_ids"].shape[1] for request in requests)
    # what follows the prefix of 24 texts, and before that the prefix and one text twice
    assert sum(rows) < 0.75 * tokens + 3 * longest
    assert max(rows) <= 1024
    one_by_one = EditMemory(editor)
    for request in requests:
        one_by_one.add([request])
    assert memory.keys() == one_by_one.keys()
    for key in memory.keys():
        for name, (u, d) in memory._records[key].rows.items():
            other_u, other_d = one_by_one._records[key].rows[name]
            assert (u - other_u).norm() <= 1e-4 * other_u.norm() and (d - other_d).norm() <= 1e-4 * other_d.norm()
