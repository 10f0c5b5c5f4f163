"""EasyEdit's interface: its names, its shapes, its files, on small models."""

from __future__ import annotations

import json
import warnings
from itertools import product

import pytest
import torch
from make_qa import ANSWERS, FIRST, LAST, WORDINGS

from mendfast import MendConfig, MendEditor
from mendfast.base_model import small_gpt2, train_tokenizer
from mendfast.compat import save_mend_archive
from mendfast.compat.easyedit import (
    BaseEditor,
    CounterFactDataset,
    EditTrainer,
    MENDHyperParams,
    MENDTrainingHparams,
    ZsreDataset,
    apply_mend_to_model,
)
from mendfast.metrics import correct

LAYERS = ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"]
PROMPTS = ["Where was Anna Marsh born?", "What did Bela Novak do for a living?"]
TARGETS = ["Oslo", "judge"]
EDITING = """
alg_name: "MEND"
archive: {archive}
device: 0
model_name: {model}
model_class: GPT2LMHeadModel
tokenizer_class: GPT2Tokenizer
tokenizer_name: {model}
model_parallel: false
inner_params:
- transformer.h.1.mlp.c_fc.weight
- transformer.h.1.mlp.c_proj.weight
lr: 1e-6
edit_lr: 1e-4
norm: True
init: id
act: relu
batch_size: 1
results_dir: ./results
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's directory and an untrained editor, whose plain gradient steps are just large enough."""
    texts = [w.format("Anna Marsh") for wordings in WORDINGS.values() for w in wordings]
    tokenizer = train_tokenizer([*texts, *PROMPTS, *(a for answers in ANSWERS.values() for a in answers)], 320)
    torch.manual_seed(0)
    model = small_gpt2(len(tokenizer), width=32, depth=2, heads=4).eval()
    place = tmp_path_factory.mktemp("easyedit")
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    config = MendConfig(layers=LAYERS, rank=8, loss_reduction="batch", chat=False)
    editor = MendEditor.from_model(model, tokenizer, config)
    for step_size in (0.1 * 2**k for k in range(16)):
        editor.config.step_size = step_size
        learned = []
        for pair in zip(PROMPTS, TARGETS, strict=True):
            with editor.edit([pair]).attached(model):
                learned.append(bool(correct(editor, [pair])))
        if all(learned):
            break
    assert all(learned) and not correct(editor, list(zip(PROMPTS, TARGETS, strict=True))).any()
    editor.save_pretrained(place / "editor")
    save_mend_archive(editor, place / "archive.pt")
    return place, model, tokenizer


def settings(base, archive="editor") -> MENDHyperParams:
    place, model, tokenizer = base
    return MENDHyperParams(
        alg_name="MEND", model_name=(model, tokenizer), archive=str(place / archive), inner_params=LAYERS
    )


@pytest.fixture
def editor(base):
    model = base[1]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    yield BaseEditor.from_hparams(settings(base))
    model.load_state_dict(before)


def edited(model) -> list[torch.Tensor]:
    return [model.get_parameter(name).detach().clone() for name in LAYERS]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_readme_example(base, editor):
    locality = {"neighborhood": {"prompt": ["When was Carl Olsen born?", None], "ground_truth": ["1901", None]}}
    portability = {"reasoning": {"prompt": PROMPTS[::-1], "ground_truth": TARGETS[::-1]}}
    original = edited(base[1])
    metrics, model, weights_copy = editor.edit(
        prompts=PROMPTS,
        target_new=TARGETS,
        ground_truth=["Paris", None],
        rephrase_prompts=["What is the birthplace of Anna Marsh?", "Which job did Bela Novak have?"],
        locality_inputs=locality,
        portability_inputs=portability,
        subject=["Anna Marsh", "Bela Novak"],
        sequential_edit=False,
    )
    assert [set(m) for m in metrics] == [{"pre", "post", "case_id", "requested_rewrite"}] * 2
    assert [m["case_id"] for m in metrics] == [0, 1]
    first, second = metrics
    assert first["requested_rewrite"] == {
        "prompt": PROMPTS[0], "target_new": "Oslo", "ground_truth": "Paris", "subject": "Anna Marsh",
        "rephrase_prompt": "What is the birthplace of Anna Marsh?",
        "portability": {"reasoning": {"prompt": PROMPTS[1], "ground_truth": "judge"}},
        "locality": {"neighborhood": {"prompt": "When was Carl Olsen born?", "ground_truth": "1901"}},
    }  # fmt: skip
    for phase in ("pre", "post"):
        for key in ("rewrite_acc", "rephrase_acc"):
            (share,) = first[phase][key]
            assert 0 <= share <= 1
        assert len(first[phase]["portability"]["reasoning_acc"]) == 1
        assert isinstance(first[phase]["locality"]["neighborhood_output"][0][0], int)
    assert 0 <= first["post"]["locality"]["neighborhood_acc"][0] <= 1
    assert "neighborhood_acc" not in first["pre"]["locality"] and second["post"]["locality"] == {}
    assert first["post"]["rewrite_acc"] == second["post"]["rewrite_acc"] == [1.0]
    assert first["pre"]["rewrite_acc"] != [1.0]
    assert model is base[1] and not same(edited(model), original)
    assert list(weights_copy) == LAYERS and same(weights_copy.values(), original)
    json.dumps(metrics)


def test_each_alone_and_one_after_another(base, editor):
    original = edited(base[1])
    editor.edit(PROMPTS[0], TARGETS[0], verbose=False)
    first = edited(base[1])
    alone, _, _ = editor.edit(PROMPTS, TARGETS, verbose=False)
    last = edited(base[1])
    editor.edit(PROMPTS[1], TARGETS[1], verbose=False)
    assert same(edited(base[1]), last)  # the last of several is what it would have been alone
    kept, _, copy = editor.edit(PROMPTS, TARGETS, sequential_edit=True, verbose=False)
    assert same(copy.values(), original)
    assert kept[0]["post"] == alone[0]["post"] and [m["pre"] for m in kept] == [m["pre"] for m in alone]
    both = edited(base[1])
    parts = zip(original, first, last, both, strict=True)
    assert all(torch.allclose(a + b - o, c, atol=1e-5) for o, a, b, c in parts)
    (again,), _, copy = editor.edit(PROMPTS[0], "Lima", verbose=False)
    assert same(copy.values(), both)  # what stays stays
    editor.edit(PROMPTS[0], TARGETS[0], sequential_edit=True, verbose=False)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(edited(base[1]), both, strict=True))


def test_twenty_sequential_edits_survive(base, tmp_path):
    """Of the sum of so many edits the model makes nothing; a memory that solves for all of them at once keeps each."""
    place, model, tokenizer = base
    config = MendConfig(
        layers=LAYERS[1:], rank=8, chat=False, step_size=10.0, aggregation="least_squares", ridge=1e-6, protection=1e-3
    )
    maker = MendEditor.from_model(model, tokenizer, config)
    maker.protect(["When was Carl Olsen born?"])
    maker.save_pretrained(tmp_path / "editor")
    people, kinds = list(product(FIRST, LAST))[::3], list(WORDINGS)[:3]
    prompts = [WORDINGS[kinds[i % 3]][0].format(" ".join(people[i])) for i in range(20)]
    targets = [ANSWERS[kinds[i % 3]][i % 6] for i in range(20)]
    before = edited(model)
    editor = BaseEditor.from_hparams(settings(base, tmp_path / "editor"))
    for half in (slice(0, 10), slice(10, 20)):  # over calls too
        metrics, _, _ = editor.edit(prompts[half], targets[half], sequential_edit=True, verbose=False)
        assert all(m["post"]["rewrite_acc"] == [1.0] for m in metrics)
    edits = list(zip(prompts, targets, strict=True))
    assert len(editor.memory) == 20 and correct(editor.editor, edits).all()
    editor.memory.remove(*prompts)
    editor.edit("Who?", "judge", sequential_edit=True, verbose=False)
    editor.memory.remove("Who?")
    editor._put(editor.memory.edit())
    assert same(edited(model), before)


def test_weights_written_back_by_the_caller(base, editor):
    original = edited(base[1])
    for _ in range(2):  # the second call finds the weights as they were
        (metric,), model, weights_copy = editor.edit(PROMPTS[0], TARGETS[0], verbose=False)
        assert metric["post"]["rewrite_acc"] == [1.0]
        with torch.no_grad():
            for name, weight in weights_copy.items():
                model.get_parameter(name)[...] = weight
        assert same(edited(model), original)
    editor.edit(PROMPTS[0], TARGETS[0], verbose=False)
    with torch.no_grad():
        model.get_parameter(LAYERS[0]).add_(1)
    with pytest.raises(ValueError, match="something else has written"):
        editor.edit(PROMPTS[0], TARGETS[0], verbose=False)


def test_archives_of_the_released_code(base):
    (mine, theirs) = (apply_mend_to_model(*base[1:], [{"prompt": PROMPTS[0], "target_new": "Oslo"}],
                                          settings(base, name), copy=True)[0]
                      for name in ("editor", "archive.pt"))  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(edited(mine), edited(theirs), strict=True))


def test_rome_entry(base):
    model, tokenizer = base[1:]
    hparams, original = settings(base), edited(model)
    rome = {"prompt": "Where was {} born?", "subject": "Anna Marsh", "target_new": {"str": "Oslo", "id": "Q585"}}
    copy, weights = apply_mend_to_model(model, tokenizer, [rome], hparams, copy=True)
    assert copy is not model and weights == {} and same(edited(model), original)
    found, weights = apply_mend_to_model(model, tokenizer, [rome], hparams, return_orig_weights=True)
    assert found is model and same(weights.values(), original) and same(edited(model), edited(copy))
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name)[...] = weight
    assert same(edited(model), original)
    for requests, message in (([], "no requests"), ([{"prompt": "Who?"}], "lacks target_new")):
        with pytest.raises(ValueError, match=message):
            apply_mend_to_model(model, tokenizer, requests, hparams)


def test_settings_from_a_file(base, tmp_path):
    path = tmp_path / "gpt2.yaml"
    path.write_text(EDITING.format(archive=base[0] / "editor", model=base[0] / "model"))
    with pytest.warns(UserWarning, match="lr, edit_lr, batch_size, results_dir mean nothing") as caught:
        hparams = MENDHyperParams.from_hparams(str(tmp_path / "gpt2"))
    assert len(caught) == 1 and "act" not in str(caught[0].message)
    assert hparams.edit_lr == 1e-4 and hparams.inner_params == LAYERS and hparams.device == 0
    editor = BaseEditor.from_hparams(hparams)
    (metric,), _, _ = editor.edit(PROMPTS[0], TARGETS[0])
    assert metric["post"]["rewrite_acc"] == [1.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ('alg_name: "ROME"\nmodel_name: x', "settings of ROME; mendfast is MEND"),
        ("model_name: x", "which method"),
        ("alg_name: MEND\nmodel_name: x", "lacks archive"),
        ("- 1\n- 2", "lines of name: value"),
        ("a: [", "no YAML"),
        ("alg_name: MEND\nmodel_name: x\narchive: y\ntrain_base: True", "train_base is True"),
    ],
)
def test_settings_that_are_refused(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        MENDHyperParams.from_hparams(tmp_path / "bad.yaml")


def test_requests_that_are_refused(base, editor):
    original = edited(base[1])
    for given, message in (
        (dict(prompts=PROMPTS, target_new=["Oslo"]), "target_new has 1 entries and prompts 2"),
        (dict(prompts=PROMPTS, target_new=TARGETS, rephrase_prompts=["x"]), "rephrase_prompts has 1"),
        (dict(prompts=PROMPTS, target_new=["Oslo", ""]), "target"),
        (dict(prompts="a", target_new="b", locality_inputs={"n": ["x"]}), "must have prompt and ground_truth"),
        (dict(prompts="a", target_new="b", locality_inputs={"n": {"prompt": "x", "ground_truth": [None]}}), "answers"),
        (dict(prompts=[], target_new=[]), "no requests"),
    ):
        with pytest.raises(ValueError, match=message):
            editor.edit(**given)
    assert same(edited(base[1]), original)
    hparams = settings(base)
    hparams.archive = None
    with pytest.raises(ValueError, match="train an editor first"):
        BaseEditor.from_hparams(hparams)


def test_training(base, tmp_path):
    records = [
        {"src": wordings[0].format(person), "rephrase": wordings[1].format(person), "answers": [answers[i]],
         "alt": answers[i + 1], "loc": "nq question: when was it built", "loc_ans": "1901", "subject": person}
        for i, person in enumerate(("Anna Marsh", "Bela Novak", "Carl Olsen"))
        for wordings, answers in zip(WORDINGS.values(), ANSWERS.values(), strict=True)
    ]  # fmt: skip
    (tmp_path / "zsre.json").write_text(json.dumps(records))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hparams = MENDTrainingHparams(
            alg="MEND", model_name=str(base[0] / "model"), inner_params=LAYERS, archive=None, rank=8, lr=1e-3,
            edit_lr=0.1, lr_lr=1e-2, batch_size=1, accumulate_bs=2, max_iters=4, val_interval=2, val_batch_size=2,
            val_steps=1, results_dir=str(tmp_path / "results"), opt="Adam", act="relu", dropout=0.0,
        )  # fmt: skip
    data = ZsreDataset(tmp_path / "zsre.json", config=hparams)
    assert len(data) == 12 and data[0]["target_new"] == "Oslo" and data[0]["locality_ground_truth"] == "1901"
    assert data[-1]["case_id"] == 11 and len(list(data)) == 12
    assert len(ZsreDataset(tmp_path / "zsre.json", size=5)) == 5
    trainer = EditTrainer(config=hparams, train_set=data, val_set=data)
    assert (trainer.trainer.config.steps, trainer.trainer.config.batch_size) == (2, 2)
    trainer.run()
    hparams = MENDHyperParams(alg_name="MEND", model_name=str(base[0] / "model"), archive=str(trainer.output))
    (metric,), _, _ = BaseEditor.from_hparams(hparams).edit(PROMPTS[0], TARGETS[0])
    assert set(metric["post"]) == {"rewrite_acc", "locality", "portability"}


def test_counterfact_in_both_forms(tmp_path):
    flat = {"case_id": 0, "prompt": "The mother tongue of Anna is", "target_new": "Dutch", "subject": "Anna",
            "ground_truth": "French", "rephrase_prompt": "Anna speaks", "locality_prompt": "Bela speaks",
            "locality_ground_truth": "Greek"}  # fmt: skip
    rome = {
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is", "subject": "Anna", "target_new": {"str": "Dutch"},
            "target_true": {"str": "French"},
        },
        "paraphrase_prompts": ["Anna speaks"],
        "neighborhood_prompts": ["Bela speaks"],
    }  # fmt: skip
    (tmp_path / "cf.json").write_text(json.dumps([flat, rome]))
    data = CounterFactDataset(tmp_path / "cf.json")
    for record in data:
        assert (record["prompt"], record["target_new"], record["ground_truth"]) == (
            "The mother tongue of Anna is", "Dutch", "French",
        )  # fmt: skip
        assert record["rephrase_prompt"] == "Anna speaks" and record["locality_prompt"] == "Bela speaks"
        assert record["cond"] == "French >> Dutch || The mother tongue of Anna is"
