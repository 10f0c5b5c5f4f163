"""ROME, MEMIT, LoRA and in-context editing, each against its paper's equations on a tiny model."""

from __future__ import annotations

import pytest
import torch
from test_baselines import SUBJECTS, base, edits, make
from test_opponents import close, moves

from mendfast import EditRequest, MendConfig
from mendfast.baselines import make_system
from mendfast.baselines.rome import TINY, Rome
from mendfast.choice import last_block, mlp_outputs
from mendfast.frozen_prefix import FrozenPrefix
from mendfast.generation import answer
from mendfast.layers import named_layers
from mendfast.metric import observe

PLAIN = dict(prefixes=0, words=8, learning_rate=0.5)


def inputs_and_outputs(layer, model, **batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer reads and gives, [S, m] and [S, n], of one text."""
    seen = []
    handle = layer.module.register_forward_hook(lambda module, args, output: seen.append((args[0][0], output[0])))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


def value(system, tokenizer, prompt: str, target: str, subject: str, site, steps: int) -> torch.Tensor:
    """v by plain Adam on NLL + .0625 KL + .5 |d|^2 / |v0|^2, from Hugging Face's own loss."""
    model = system.subject.model
    start, whole = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (prompt, f"{prompt} {target}"))
    labels = whole.clone()
    labels[:, : start.shape[1]] = -100
    place = len(tokenizer(prompt[: prompt.index(subject) + len(subject)])["input_ids"]) - 1
    essence = torch.tensor([tokenizer(f"{subject} is a")["input_ids"]])
    shift = {"at": None, "by": None}

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        if shift["by"] is None:
            shift["v0"] = x[0, place].detach().clone()
            return None
        moved = torch.cat([x[:, : shift["at"]], (x[:, shift["at"]] + shift["by"])[:, None], x[:, shift["at"] + 1 :]], 1)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with torch.no_grad():
        before = model(input_ids=essence).logits[0, -1].log_softmax(-1)
    handle = site.register_forward_hook(hook)
    model(input_ids=whole)
    change = torch.zeros_like(shift["v0"], requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        shift |= {"by": change, "at": place}
        loss = model(input_ids=whole, labels=labels).loss
        shift["at"] = len(tokenizer(subject)["input_ids"]) - 1
        after = model(input_ids=essence).logits[0, -1].log_softmax(-1)
        kl = (before.exp() * (before - after)).sum()
        (loss + 0.0625 * kl + 0.5 * change.square().sum() / shift["v0"].square().sum()).backward()
        optimizer.step()
        with torch.no_grad():
            longest = system.clamp * shift["v0"].norm()
            if change.norm() > longest:
                change.mul_(longest / change.norm())
    handle.remove()
    return (shift["v0"] + change).detach()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rome_is_the_rank_one_change_that_maps_the_key_to_the_value(name, tokenizer):
    system = make("rome", name, tokenizer, **(PLAIN | {"steps": 3}))
    system.prepare()
    prompt, target = edits(name)[0]
    (layer,), model = system.layers, system.subject.model
    expected = value(system, tokenizer, prompt, target, "1", layer.module, 3)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    place = len(tokenizer("What is 1")["input_ids"]) - 1
    key = inputs_and_outputs(layer, model, input_ids=ids)[0][place]
    old = layer.module(key).detach()
    system.subject.layers = [layer]  # of which moves() looks at the weights
    got = moves(system, [(prompt, target)])[layer.name]
    c = system.metric.moments[layer.name].matrix()
    direction = torch.linalg.solve(c.double() + TINY * c.double().trace() * torch.eye(layer.m), key.double())
    close(got, torch.outer(expected - old, (direction / (direction @ key.double())).float()))
    close(got @ key, expected - old)  # W k = v, with the bias on both sides


def test_memit_shares_what_is_lacking_among_the_blocks(tokenizer):
    """R^T K (weight C + K^T K)^-1 for both facts, block after block."""
    system = make("memit", "gpt2", tokenizer, **PLAIN, steps=2, weight=3.0, block=1)
    system.prepare()
    model, layers = system.subject.model, system.layers
    assert [layer.name for layer in layers] == [f"transformer.h.{i}.mlp.c_proj.weight" for i in (0, 1)]
    block = model.transformer.h[1]
    wanted = [value(system, tokenizer, p, t, SUBJECTS[p], block, 2) for p, t in edits("gpt2")]
    system.subject.layers = layers
    got = moves(system, edits("gpt2"))
    weights = [layer.weight.detach().clone() for layer in layers]
    for i, layer in enumerate(layers):
        keys, lacking = [], []
        for (prompt, target), z in zip(edits("gpt2"), wanted, strict=True):
            ids = torch.tensor([tokenizer(f"{prompt} {target}")["input_ids"]])
            end = prompt.index(SUBJECTS[prompt]) + len(SUBJECTS[prompt])
            place = len(tokenizer(prompt[:end])["input_ids"]) - 1
            keys.append(inputs_and_outputs(layer, model, input_ids=ids)[0][place])
            with torch.no_grad():  # hidden_states[2] is the second block's output, before the final norm
                state = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, place]
            lacking.append((z - state) / (2 - i))
        k, r = torch.stack(keys).double(), torch.stack(lacking).double()
        c = system.metric.moments[layer.name].matrix().double()
        m = 3.0 * (c + TINY * c.trace() * torch.eye(layer.m))
        expected = torch.linalg.solve(m + k.T @ k, k.T @ r).float().T
        close(got[layer.name], expected)
        with torch.no_grad():
            layer.weight.add_(expected.T)  # Conv1D holds the transpose
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data.copy_(weight)


def test_memit_writes_what_it_has_found_into_matrices_of_few_inputs_too(tokenizer):
    """Its weight of C follows the number of inputs: the paper's, of far wider matrices, would write next to nothing."""
    missing = {}
    for weight in (None, 15000.0):
        system = make("memit", "llama", tokenizer, **PLAIN, steps=3, block=2, weight=weight)
        system.prepare()
        fact = system._fact(EditRequest(*edits("llama")[0]))
        below = [FrozenPrefix(system.subject.model, system.layers) for _ in range(2)]
        _, before = system._seen(fact, system.layers[-1], system.last, below[0])
        wanted = system.value(fact, system.last, before)
        with system.edit(edits("llama")[:1]):
            _, after = system._seen(fact, system.layers[-1], system.last, below[1])
        missing[weight] = ((wanted - after).norm() / (wanted - before).norm()).item()
    assert missing[15000.0] > 0.9 and missing[None] < 0.5
    assert make("memit", "llama", tokenizer, block=2, weight=None).weight == 15000 / 16384 * system.layers[0].m


def test_memits_values_are_found_once_while_its_weight_is_chosen(tokenizer, monkeypatch):
    system = make("memit", "gpt2", tokenizer, **PLAIN, steps=2, block=1)
    found, value = [], Rome.value
    monkeypatch.setattr(Rome, "value", lambda self, fact, *more: (found.append(fact), value(self, fact, *more))[1])
    changes = []
    with system.remembering():
        for system.weight in (1.0, 1000.0):
            changes.append(moves_of(system, edits("gpt2")))
    assert len(found) == 2 and changes[0] > 2 * changes[1]
    assert moves_of(system, edits("gpt2")) == changes[1] and len(found) == 4


def moves_of(system, requests) -> float:
    """How far an edit moves the first of the system's weights."""
    weight = system.layers[0].weight
    before = weight.detach().clone()
    with system.edit(requests):
        return (weight.detach() - before).norm().item()


def test_a_system_that_needs_a_subject_says_so(tokenizer):
    system = make("rome", "gpt2", tokenizer, **PLAIN)
    system.subjects = {"What is 1?": "Rome"}
    with pytest.raises(ValueError, match="data names no subject for 'What is 2\\?'.*or leave rome out"):
        with system.edit([("What is 2?", "Rome")]):
            pass
    with pytest.raises(ValueError, match="The subject 'Rome' is not in 'What is 1\\?'"):
        with system.edit([("What is 1?", "Rome")]):
            pass
    with pytest.raises(ValueError, match="block is 4; the model's blocks with an MLP are 0 to 3"):
        make("rome", "gpt2", tokenizer, block=4)


def test_the_last_matrix_of_every_blocks_mlp(tokenizer):
    names = [name for _, name in mlp_outputs(base("llama", tokenizer))]
    assert names == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)]


# -- LoRA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lora_is_adam_on_two_factors_of_each_matrix(name, tokenizer):
    """W x + (alpha / r) B A x, one step: A has no gradient while B is 0, and Adam's first step on B is a sign."""
    system = make("lora", name, tokenizer, rank=2, max_steps=1, learning_rate=1e-2)
    model, layers = system.subject.model, system.subject.layers
    batch = system.subject.tokenize(edits(name))
    rows = system.subject.gradients(batch)
    modules = {path for path, _ in model.named_modules()}
    with system.edit(edits(name)) as edited:
        found = dict(edited.named_parameters())
        for layer in layers:
            path = layer.name.removesuffix(".weight")
            a, b = (found[f"{path}.lora_{side}.default.weight"].detach() for side in "AB")
            u, delta = (side.flatten(0, 1) for side in rows[layer.name])
            gradient = 0.5 * (16 / 2) * delta.T @ (u @ a.T)  # the loss is the mean over the two edits
            sure = gradient.abs() > 1e-3 * gradient.abs().max()
            assert sure.float().mean() > 0.5
            torch.testing.assert_close(b[sure], -1e-2 * gradient.sign()[sure], rtol=0.01, atol=0)
    assert {path for path, _ in model.named_modules()} == modules and not hasattr(model, "peft_config")


def test_lora_without_peft_is_a_sentence(tokenizer, monkeypatch):
    monkeypatch.setattr("mendfast.baselines.lora.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="LoRA needs peft: pip install peft"):
        make("lora", "gpt2", tokenizer)


# -- in context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_in_context_the_facts_are_read_before_every_question(name, tokenizer):
    model = base(name, tokenizer)
    system = make_system("in_context", model, tokenizer, MendConfig(rank=8), template="{prompt} {target}. ")
    plain = make_system("ft", model, tokenizer, MendConfig(rank=8)).subject
    facts = "".join(f"{prompt} {target}. " for prompt, target in edits(name))
    target = edits(name)[0][1]
    with system.edit(edits(name)):
        inside = system.subject.tokenize([("What is 4?", target)])
        assert answer(system.subject, ["What is 4?"], 4) == answer(plain, [facts + "What is 4?"], 4)
        assert system.subject.prompt_text("running", "text") == "running"
    expected = plain.tokenize([(facts + "What is 4?", target)])
    assert all(torch.equal(inside[key], expected[key]) for key in expected)
    assert answer(system.subject, ["What is 4?"], 4) == answer(plain, ["What is 4?"], 4)
    if name != "t5":
        with pytest.raises(ValueError, match="50 facts take .* the model reads 64.*Put fewer in front"):
            with system.edit([(f"What is {i}?", target) for i in range(50)]):
                pass
    with pytest.raises(ValueError, match="template is 'no'"):
        make_system("in_context", model, tokenizer, MendConfig(rank=8), template="no")


# -- C -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_c_is_gathered_without_the_blocks_above(name, tokenizer):
    model = base(name, tokenizer)
    blocks = mlp_outputs(model)
    layers = named_layers(model, [weight for _, weight in blocks[:2]])
    batches = [{"input_ids": torch.randint(0, len(tokenizer), (3, 7)), "attention_mask": torch.ones(3, 7).long()}]
    ran = []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, (block, _) in enumerate(blocks)]
    found = observe(model, layers, batches)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1] and last_block(model, [layer.name for layer in layers]) is blocks[1][0]
    for layer in layers:
        seen = []
        handle = layer.module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**batches[0])
        handle.remove()
        x = seen[0].reshape(-1, layer.m).double()
        close(found.moments[layer.name].matrix().double(), x.T @ x / len(x))


def test_a_block_that_comes_again_is_run_again(tokenizer):
    model = base("gpt2", tokenizer)
    names = [weight for _, weight in mlp_outputs(model)]
    assert last_block(model, [*names[:1], "lm_head.weight"]) is None
    model.config.num_hidden_layers = 8  # more than there are
    assert last_block(model, names[:1]) is None
    model.config.num_hidden_layers = 4
    model.transformer.h[3].mlp = model.transformer.h[0].mlp
    assert last_block(model, names[:1]) is None and last_block(model, names[1:2]) is None
