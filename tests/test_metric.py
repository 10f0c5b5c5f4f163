import pytest
import torch
from conftest import CLASSIFIER, SEQ2SEQ, make_batch, make_model
from safetensors.torch import load_file, save_file

from mendfast import MendConfig, MendEditor, ops
from mendfast.choice import find_layers
from mendfast.metric import Metric, observe
from mendfast.moments import SecondMoment
from mendfast.own_words import own_words


def rows(n=200, m=12, seed=0):
    """Correlated inputs, some directions far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=generator) @ torch.diag(2.0 ** -torch.arange(m)) @ torch.randn(m, m) + 0.3


def gathered(x, rank=None, chunks=1):
    moment = SecondMoment(x.shape[1], rank)
    for chunk in x.chunk(chunks):
        moment.add(chunk)
    return moment


def exact(x):
    return x.double().T @ x.double() / len(x)


def close(a, b, by=1e-6):
    return (a.double() - b.double()).norm() <= by * b.double().norm()


@pytest.mark.parametrize("chunks", [1, 7, 200])
def test_second_moment_streams(chunks):
    x = rows()
    moment = gathered(x, chunks=chunks)
    assert moment.count == 200 and close(moment.matrix(), exact(x))
    assert moment.trace() == pytest.approx(x.double().square().sum(1).mean().item(), rel=1e-12)


def test_two_thousand_chunks_lose_nothing():
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) + 5
    assert close(gathered(x, chunks=2000).matrix(), exact(x), 1e-5)


def test_one_row_has_a_second_moment():
    """The unbiased variance of one row is NaN; E[x x^T] is not centred and needs none."""
    moment = gathered(rows(1))
    spectrum = moment.spectrum()
    assert all(torch.isfinite(part).all() for part in spectrum)
    assert spectrum.values[0].item() == pytest.approx(moment.trace(), rel=1e-5)
    keys, delta = ops.least_squares(rows(3, seed=1), torch.randn(3, 5), spectrum, 1e-3, 20.0)
    assert torch.isfinite(keys).all() and torch.isfinite(delta).all()


def test_merging_is_seeing_both():
    x, y = rows(), rows(50, seed=1) * 3
    moment = gathered(x)
    moment.spectrum()
    moment.merge(gathered(y))
    assert moment.count == 250 and close(moment.matrix(), exact(torch.cat([x, y])))
    moment.merge(SecondMoment(12))
    assert moment.count == 250


@pytest.mark.parametrize("m, rank", [(12, None), (12, 4), (12, 12), (200, 10)])
def test_spectrum_is_the_second_moment(m, rank):
    x = rows(400, m)
    moment = gathered(x, rank)
    values, vectors, rest = moment.spectrum()
    k = rank or m
    assert vectors.shape == (m, k) and (values.diff() <= 0).all()
    assert close(vectors.T @ vectors, torch.eye(k), 1e-6)
    kept = vectors @ values.diag() @ vectors.T
    if k < m:
        kept = kept + rest * (torch.eye(m) - vectors @ vectors.T)
    assert moment.spectrum().trace().item() == pytest.approx(moment.trace(), rel=1e-5)
    error = (kept - exact(x)).norm() / exact(x).norm()
    assert abs(error - moment.error()) <= 1e-4
    best = torch.linalg.eigvalsh(exact(x)).flip(0)
    assert close(values, best[:k], 1e-4)
    assert moment.spectrum() is moment.spectrum()


def test_scaling_the_inputs_scales_the_metric():
    """lambda and mu are relative to tr(C): inputs a thousand times as large give the same change."""
    x, u, d = rows(), rows(4, seed=1), torch.randn(4, 5)
    small = ops.least_squares(u, d, gathered(x).spectrum(), 1e-3, 20.0)
    large = ops.least_squares(u * 1000, d, gathered(x * 1000).spectrum(), 1e-3, 20.0)
    assert close(large[0] * 1000, small[0], 1e-3)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("count", [1, 4, 30])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_disturbance(rank, count, layout):
    x, weight = rows(), torch.randn(9, 12)
    u, delta, alpha = rows(count, seed=2), torch.randn(count, 9), 0.3
    metric = Metric({"w": gathered(x, rank)})
    values, q, rest = metric.spectrum("w")
    c = q @ values.diag() @ q.T + rest * (torch.eye(12) - q @ q.T)
    s = -alpha * delta.double().T @ u.double()
    expected = (s @ c * s).sum() / (weight.double() @ c * weight.double()).sum()
    given = weight if layout == "out_in" else weight.T.contiguous()
    assert metric.disturbance("w", u, delta, alpha, given, layout) == pytest.approx(expected.item(), rel=1e-6)
    if rank is None:  # what it says of the text itself
        seen = (x.double() @ s.T).square().sum() / (x.double() @ weight.double().T).square().sum()
        assert metric.disturbance("w", u, delta, alpha, given, layout) == pytest.approx(seen.item(), rel=1e-4)


def test_the_guarantee_holds_on_the_text():
    x, u, d, mu = rows(), rows(4, seed=1), torch.randn(4, 5), 20.0
    keys, delta = ops.least_squares(u, d, gathered(x).spectrum(), 1e-3, mu)
    moved = (x.double() @ (delta.double().T @ keys.double()).T).square().sum(1).mean()
    assert 0 < moved <= d.double().square().sum() / mu


# -- the model -------------------------------------------------------------------------------------------------


def inputs_of(model, layers, batch):
    """Every layer's inputs at the positions that count, from a plain forward pass."""
    seen, handles = {}, []
    for layer in layers:
        def hook(module, args, output, name=layer.name):
            seen[name] = args[0]
        handles.append(layer.module.register_forward_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("left", [False, True])
def test_observe_counts_what_the_mask_keeps(architecture, left):
    model, batch = make_model(architecture), make_batch(architecture, left=left)
    layers = find_layers(model, None)
    metric = observe(model, layers, [batch, batch])
    metric.check(layers, model.config.model_type)
    plain = dict(batch)
    if architecture in CLASSIFIER:
        del plain["labels"]
    if left and architecture not in SEQ2SEQ and architecture not in CLASSIFIER:
        plain["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if architecture in ("opt",):
            del plain["position_ids"]
    seen = inputs_of(model, layers, plain)
    for layer in layers:
        mask = batch["attention_mask"] != 0
        if "decoder" in layer.name.split(".") and architecture in SEQ2SEQ:
            mask = batch["labels"] != -100
        x = seen[layer.name].reshape(*mask.shape, -1)[mask]
        assert metric.moments[layer.name].count == 2 * len(x)
        assert close(metric.moments[layer.name].matrix(), exact(x), 1e-4), layer.name
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert not any(layer.module._forward_hooks for layer in layers)


def test_of_pairs_only_the_answers_can_be_protected():
    """Position s predicts token s + 1; and the first token, which all others attend to."""
    model = make_model("gpt2")
    layers, batch = find_layers(model, None), make_batch("gpt2", 3, 11)
    metric = observe(model, layers, [batch], answers=True)
    keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
    keep[:, :-1] = batch["labels"][:, 1:] != -100
    assert not keep[:, 0].any()
    keep[:, 0] = True
    assert metric.tokens == keep.sum()
    seen = inputs_of(model, layers, batch)
    for layer in layers:
        x = seen[layer.name].reshape(*keep.shape, -1)[keep]
        assert close(metric.moments[layer.name].matrix(), exact(x), 1e-4), layer.name
    assert observe(model, layers, [make_batch("gpt2", 3, 11, left=True)], answers=True).tokens == keep.sum()
    with pytest.raises(ValueError, match="no labels"):
        observe(model, layers, [{"input_ids": batch["input_ids"]}], answers=True)


def test_where_answers_begin_alone_can_be_protected():
    model = make_model("gpt2")
    layers = find_layers(model, None)
    batch, left = (make_batch("gpt2", 3, 11, left=side) for side in (False, True))
    metric = observe(model, layers, [batch], answers="first")
    first = (batch["labels"] != -100).int().argmax(1) - 1
    assert metric.tokens == 3 == observe(model, layers, [left], answers="first").tokens
    for layer, x in inputs_of(model, layers, batch).items():
        x = x.reshape(3, 11, -1)[torch.arange(3), first]
        assert close(metric.moments[layer].matrix(), exact(x), 1e-4), layer
    with pytest.raises(ValueError, match="'first'"):
        observe(model, layers, [batch], answers="last")


def observed(name="gpt2", rank=None, seed=0):
    model = make_model(name)
    layers = find_layers(model, None)
    return model, layers, observe(model, layers, [make_batch(name, seed=seed)], protect_rank=rank)


def test_an_edited_head_sees_every_position():
    model = make_model("llama")
    layers = find_layers(model, ["lm_head.weight"])
    batch = make_batch("llama")
    metric = observe(model, layers, [batch])
    assert metric.moments["lm_head.weight"].count == batch["attention_mask"].sum()


@pytest.mark.parametrize("rank", [None, 6])
def test_save_and_load_keep_every_bit(rank, tmp_path):
    model, layers, metric = observed(rank=rank)
    metric.save(tmp_path / "metric.safetensors")
    loaded = Metric.load(tmp_path / "metric.safetensors")
    assert loaded.tokens == metric.tokens > 0 and loaded.model_type == "gpt2"
    assert loaded.errors() == metric.errors() and all((e > 0) == (rank is not None) for e in metric.errors().values())
    for layer in layers:
        for a, b in zip(metric.spectrum(layer.name), loaded.spectrum(layer.name), strict=True):
            assert torch.equal(a, b)
    # and it goes on
    more = observe(model, layers, [make_batch("gpt2", seed=5)])
    for m in (loaded, metric):
        m.merge(more)
    for layer in layers:
        by = 1e-5 if rank is None else max(metric.errors().values()) + loaded.errors()[layer.name]
        assert close(loaded.moments[layer.name].matrix(), metric.moments[layer.name].matrix(), by)
    assert loaded.tokens == metric.tokens


@pytest.mark.parametrize("rank", [None, 6])
def test_half_the_bytes_keep_three_digits(rank, tmp_path):
    _, layers, metric = observed(rank=rank)
    sizes = []
    for dtype in (None, torch.float16):
        path = tmp_path / f"{dtype}.safetensors"
        metric.save(path, dtype=dtype)
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in load_file(path).values()))
    loaded = Metric.load(path)
    assert sizes[1] < 0.55 * sizes[0]
    for layer in layers:
        assert loaded.spectrum(layer.name).vectors.dtype == torch.float64
        kept, halved = (m.dense(layer.name).tril() for m in (metric, loaded))
        assert (kept - halved).norm() < 2e-3 * kept.norm()  # float16 keeps 11 bits


def test_merging_metrics_is_one_pass_over_both():
    model, layers, metric = observed()
    metric.merge(observe(model, layers, [make_batch("gpt2", seed=1)]))
    both = observe(model, layers, [make_batch("gpt2", seed=s) for s in (0, 1)])
    for layer in layers:
        assert close(metric.moments[layer.name].matrix(), both.moments[layer.name].matrix(), 1e-5)
    assert metric.tokens == both.tokens


@pytest.mark.parametrize("rank", [None, 5])
def test_what_is_protected_can_have_a_share_whatever_its_tokens(rank, tmp_path):
    model, layers, metric = observed(rank=rank)
    one = {layer.name: metric.moments[layer.name].matrix() for layer in layers}
    more = observe(model, layers, [make_batch("gpt2", seed=s) for s in (1, 2, 3)], protect_rank=rank)
    metric.merge(more, share=0.25)
    for layer in layers:
        moment = metric.moments[layer.name]
        expected = 0.75 * one[layer.name] + 0.25 * more.moments[layer.name].matrix()
        assert close(moment.matrix(), expected, 1e-5), layer.name
        assert moment.trace() == pytest.approx(float(expected.trace()), rel=1e-5)
    metric.save(tmp_path / "metric.safetensors")
    loaded = Metric.load(tmp_path / "metric.safetensors")
    for layer in layers:
        assert all(map(torch.equal, loaded.spectrum(layer.name), metric.spectrum(layer.name)))
    unseen = Metric.empty(layers).merge(more, share=0.25)  # as an expert that no token was sent to before
    assert all(unseen.moments[layer.name].count == more.moments[layer.name].count for layer in layers)
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            metric.merge(more, share=share)


def test_a_share_of_nothing():
    editor = MendEditor.from_model(make_model("gpt2"), None, MendConfig(rank=4, aggregation="least_squares"))
    with pytest.raises(ValueError, match="protect other texts first"):
        editor.protect([make_batch("gpt2")], share=0.5)
    assert editor.metric is None


def test_nothing_to_protect():
    model, layers, _ = observed()
    silent = {**make_batch("gpt2"), "attention_mask": torch.zeros(3, 9, dtype=torch.long)}
    for batches in ([], [silent]):
        with pytest.raises(ValueError, match="nothing to protect: pass texts"):
            observe(model, layers, batches)
    metric = Metric.empty(layers)
    with pytest.raises(ValueError, match="pass texts"):
        metric.check(layers)
    with pytest.raises(ValueError, match="pass texts"):
        metric.spectrum(layers[0].name)


def test_a_metric_of_another_model(tmp_path):
    _, layers, metric = observed()
    with pytest.raises(ValueError, match="made for a gpt2 model; this one is a llama"):
        metric.check(layers, "llama")
    other = make_model("gptj")
    with pytest.raises(ValueError, match="holds no"):
        metric.check(find_layers(other, None))
    metric.moments[layers[0].name] = gathered(rows(3, 5))
    with pytest.raises(ValueError, match="32 inputs and the metric 5"):
        metric.check(layers)
    _, _, fresh = observed()
    before = {name: moment.count for name, moment in fresh.moments.items()}
    with pytest.raises(ValueError, match="can't be merged: .* has 32 inputs and 5"):
        fresh.merge(metric)
    assert before == {name: moment.count for name, moment in fresh.moments.items()}
    with pytest.raises(ValueError, match="different models"):
        fresh.disturbance(layers[0].name, torch.ones(1, 32), torch.ones(1, 7), 1.0, torch.ones(9, 32))


def test_inputs_that_are_not_finite():
    model, layers, _ = observed()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        observe(model, layers, [make_batch("gpt2")])
    assert not any(layer.module._forward_hooks for layer in layers)
    moment = gathered(rows())
    before = moment.matrix().clone()
    for value in (float("inf"), 1e30):
        with pytest.raises(ValueError):
            moment.add(torch.full((2, 12), value))
    assert torch.equal(moment.matrix(), before) and moment.count == 200
    with pytest.raises(ValueError, match=r"\[N, 12\]"):
        moment.add(torch.ones(2, 11))


def test_damaged_files(tmp_path):
    _, layers, metric = observed()
    path = tmp_path / "metric.safetensors"
    metric.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="no whole safetensors"):
            Metric.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors.pop(f"{layers[0].name}:vectors")
    save_file(tensors, path, {"format": "mendfast.metric", "weights": "{}", "model_type": ""})
    with pytest.raises(ValueError, match="lacks"):
        Metric.load(path)
    with pytest.raises(ValueError, match="protect_rank is 0"):
        SecondMoment(4, 0)


# -- own words -------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def writer(tokenizer, seed=0, context=64):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=context, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("chat", [False, True])
def test_own_words_are_protected_text(tokenizer, chat, monkeypatch):
    if chat:
        monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    model = writer(tokenizer).train()
    state = torch.random.get_rng_state()
    batches = own_words(model, tokenizer, samples=5, max_new_tokens=12, batch_size=2, seed=3)
    assert torch.equal(state, torch.random.get_rng_state()) and model.training
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    again = own_words(model, tokenizer, samples=5, max_new_tokens=12, batch_size=2, seed=3)
    for shared in (1, 1000):  # whether or not what all begin with is read once
        monkeypatch.setattr("mendfast.shared_prefix.SHARED", shared)
        alike = own_words(model, tokenizer, samples=5, max_new_tokens=12, batch_size=2, seed=3)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, alike, strict=True))
    other = own_words(model, tokenizer, samples=5, max_new_tokens=12, batch_size=2, seed=4)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other, strict=True))
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and ids.shape[1] <= 64
        assert (mask.diff(dim=1) <= 0).all() and mask[:, 0].all()  # right-padded
        text = tokenizer.decode(ids[0][mask[0] != 0]).replace(" ", "")
        assert text.startswith("<|user|>" if chat else "<eos>") and ("<|assistant|>" in text) == chat
    layers = find_layers(model, None)
    metric = observe(model, layers, batches)
    assert metric.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    metric.check(layers)


def test_own_words_end_at_the_end_token(tokenizer):
    model = writer(tokenizer)
    with torch.no_grad():  # <eos> is likely everywhere
        model.lm_head.weight[1] = 0
        model.lm_head.weight[2:] *= 0.01
    batches = own_words(model, tokenizer, samples=400, max_new_tokens=40, batch_size=200)
    ids, mask = batches[0]["input_ids"], batches[0]["attention_mask"]
    inside = (ids == 1) & (mask != 0)
    inside[:, 0] = False  # the start
    assert (inside.sum(1) <= 1).all() and inside.any()
    last = mask.sum(1) - 1
    assert all(inside[i, last[i]] for i in range(len(ids)) if inside[i].any())


def test_own_words_refuses(tokenizer, monkeypatch):
    model = writer(tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        own_words(model, tokenizer, chat=True)
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    with pytest.raises(ValueError, match="template alone takes .* tokens and the model 8"):
        own_words(writer(tokenizer, context=8), tokenizer)
    with pytest.raises(ValueError, match="samples is 0"):
        own_words(model, tokenizer, samples=0)
    with pytest.raises(TypeError, match="tokenizer"):
        own_words(model, None)
    for name in ("t5", "bert"):
        with pytest.raises(ValueError, match="does not write by itself"):
            own_words(make_model(name), tokenizer)


