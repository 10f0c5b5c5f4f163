"""The meta-training loop: it learns, resumes to the same bits after a kill, and stops on nonsense."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import make_model
from make_qa import ANSWERS, WORDINGS
from safetensors.torch import load_file

from mendfast import MendConfig, MendEditor
from mendfast.base_model import fit_base_model, small_gpt2, small_t5, train_tokenizer
from mendfast.files import read_tensors, write_tensors
from mendfast.training import EditorLearner, FactSampler, Item, TrainConfig, Trainer, TrainingError
from mendfast.training.data import Draw

PEOPLE = ("Anna Marsh", "Bela Novak", "Carl Olsen", "Dora Petit", "Emil Quirk", "Fay Rossi")


def facts() -> list[Item]:
    rng = random.Random(0)
    return [
        Item(tuple(w.format(person) for w in wordings), rng.choice(ANSWERS[relation]), relation, person)
        for person in PEOPLE
        for relation, wordings in WORDINGS.items()
    ]


@pytest.fixture(scope="module")
def base():
    items = facts()
    pairs = [(w, item.answer) for item in items for w in item.wordings]
    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"{p} {t}" for p, t in pairs], 320)
    model = small_gpt2(len(tokenizer), width=48, depth=3, heads=4)
    loss = fit_base_model(model, tokenizer, pairs, steps=250, batch_size=32, warmup=20, progress=False)
    assert loss < 0.5
    return model, tokenizer


def make(base, **config) -> tuple[MendEditor, TrainConfig]:
    torch.manual_seed(0)
    editor = MendEditor.from_model(*base, MendConfig(rank=32, step_size=2e-3, scale_v=True, append_eos=True))
    defaults = dict(steps=6, batch_size=4, joint=[1, 2], validate_every=3, validation_size=4, checkpoint_every=2)
    return editor, TrainConfig(**{**defaults, **config})


def test_it_learns(base, tmp_path):
    editor, config = make(base, steps=60, batch_size=8, joint=[1], validate_every=60, learning_rate=2e-3)
    validation = FactSampler(facts(), seed=5)
    trainer = Trainer(editor, FactSampler(facts()), config, output=tmp_path, validation=validation, progress=False)
    before = trainer.validate()
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    first, last = (sum(line["loss"] for line in part) for part in (lines[:10], lines[-10:]))
    assert last < 0.7 * first
    assert lines[59]["val_loss"] < 0.7 * before["val_loss"]
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page and f"<td>{lines[59]['val_loss']:g}</td>" in page
    assert not editor.training
    again = MendEditor.from_pretrained(tmp_path / "best", *base)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), editor.parameters(), strict=True))


def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path):
    def trainer(output):
        editor, config = make(base)
        return Trainer(editor, FactSampler(facts()), config, output=output,
                       validation=FactSampler(facts(), seed=5), progress=False)  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.run()
    half = trainer(tmp_path / "half")
    half.config.steps = 6
    gradients = half._gradients

    def stop_after_five(joint):
        if half.step == 5:
            raise KeyboardInterrupt
        return gradients(joint)

    half._gradients = stop_after_five
    with pytest.raises(KeyboardInterrupt):
        half.run()
    rest = trainer(tmp_path / "half")
    assert rest.resume() and rest.step == 4
    rest.run()
    for (name, a), b in zip(whole.editor.state_dict().items(), rest.editor.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [(tmp_path / d / "metrics.jsonl").read_text() for d in ("whole", "half")]
    assert logs[0] == logs[1]


def test_resume_refuses_other_settings(base, tmp_path):
    editor, config = make(base, steps=2)
    Trainer(editor, FactSampler(facts()), config, output=tmp_path, progress=False).run()
    editor, config = make(base, steps=2, batch_size=8)
    with pytest.raises(ValueError, match="batch_size"):
        Trainer(editor, FactSampler(facts()), config, output=tmp_path, progress=False).resume()


SCRIPT = """
    import sys, torch
    sys.path[:0] = {paths!r}
    torch.set_num_threads(1)
    from test_training import facts, make
    from mendfast.training import FactSampler, Trainer
    from mendfast.base_model import small_gpt2, train_tokenizer
    torch.manual_seed(0)
    tokenizer = train_tokenizer([w for item in facts() for w in item.wordings], 320)
    model = small_gpt2(len(tokenizer), width=32, depth=3, heads=4).eval()
    editor, config = make((model, tokenizer), steps=12, checkpoint_every=1, validate_every=4)
    trainer = Trainer(editor, FactSampler(facts()), config, output=sys.argv[1],
                      validation=FactSampler(facts(), seed=5), progress=False)
    trainer.resume()
    print("ready", flush=True)
    trainer.run()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_at_random_moments(tmp_path):
    """SIGKILL, again and again; the run still ends in the bits of one that was left alone."""
    script = tmp_path / "run.py"
    paths = [p for p in sys.path if p]
    script.write_text(textwrap.dedent(SCRIPT).format(paths=paths))

    def start(output):
        return subprocess.Popen([sys.executable, script, tmp_path / output], stdout=subprocess.PIPE, text=True)

    whole = start("whole")
    begun = time.monotonic()
    assert whole.stdout.readline() == "ready\n"
    ready = time.monotonic()
    assert whole.wait(120) == 0
    length = time.monotonic() - ready
    rng, kills = random.Random(0), 0
    for _ in range(3):
        run = start("killed")
        if run.stdout.readline() == "ready\n":
            time.sleep(rng.uniform(0.1, 0.6) * length)
            kills += run.poll() is None
            run.kill()
        run.wait()
    assert start("killed").wait(120) == 0 and kills >= 1, f"the run took {length:.1f} s of {ready - begun:.1f} s"
    # The order of a safetensors header is not fixed; its tensors are.
    for file in ("last/editor.safetensors", "best/editor.safetensors"):
        one, two = (load_file(tmp_path / output / file) for output in ("whole", "killed"))
        assert all(torch.equal(one[name], two[name]) for name in {**one, **two}), file
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()


def test_nonsense_stops_the_run(base, tmp_path):
    editor, config = make(base, steps=40)
    trainer = Trainer(editor, FactSampler(facts()), config, output=tmp_path, progress=False)
    before = [p.detach().clone() for p in editor.parameters()]
    nonsense = lambda *_: [(editor.alpha_multiplier.sum() * float("nan"), {"edit_success": torch.zeros(())})]  # noqa: E731
    trainer.learner.losses = nonsense
    with pytest.raises(TrainingError, match="10 steps in a row"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, editor.parameters(), strict=True))


def test_draws_depend_on_seed_and_step_alone():
    items = facts()
    a, b = FactSampler(items, seed=3), FactSampler(items, seed=3)
    a.draw(0, 5)
    assert a.draw(7, 5) == b.draw(7, 5) != b.draw(8, 5)
    draw = FactSampler(items, outer=2, loc=3, include_inner=0.0).draw(1, 6)
    assert (len(draw.inner), len(draw.outer), len(draw.loc)) == (6, 12, 18)
    truth = {w: item.answer for item in items for w in item.wordings}
    assert all(truth[prompt] == answer for prompt, answer in draw.loc)
    for i, (prompt, target) in enumerate(draw.inner):
        assert target != truth[prompt]
        for other, same in draw.outer[2 * i : 2 * i + 2]:
            assert same == target and other != prompt and truth[other] == truth[prompt]


def test_encoder_decoder_base_model(base):
    """A T5 learns too, and its editor trains."""
    items = facts()[:8]
    pairs = [(w, item.answer) for item in items for w in item.wordings]
    torch.manual_seed(0)
    model = small_t5(len(base[1]), width=32, depth=2, heads=4)
    first = fit_base_model(model, base[1], pairs, steps=1, batch_size=16, progress=False)
    assert fit_base_model(model, base[1], pairs, steps=60, batch_size=16, warmup=10, progress=False) < 0.7 * first
    editor, config = make((model, base[1]), steps=3, joint=[1], validate_every=0)
    assert Trainer(editor, FactSampler(items), config, progress=False).run()["step"] == 3


def test_parts_of_a_step_add_up(base, tmp_path):
    """Without normalisation nothing moves between the parts: the same steps in a quarter of the memory."""
    runs = []
    for accumulate in (1, 4):
        editor, config = make(base, steps=4, batch_size=8, accumulate=accumulate, validate_every=0)
        editor = MendEditor.from_model(*base, MendConfig(rank=32, scale_v=True, normalize=False))
        Trainer(editor, FactSampler(facts()), config, output=tmp_path / str(accumulate), progress=False).run()
        runs.append(editor.state_dict())
    losses = [[json.loads(x)["loss"] for x in (tmp_path / run / "metrics.jsonl").open()] for run in ("1", "4")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_statistics_survive_a_step_that_is_not_finite(base):
    """One broken edit in a batch: the step is skipped, and the next one is as good as ever."""
    editor, config = make(base, steps=3, joint=[1], validate_every=0)
    trainer = Trainer(editor, FactSampler(facts()), config, progress=False)
    gradients, asked = editor.gradients, []

    def broken_once(batch):
        captured = gradients(batch)
        asked.append(len(captured))
        if len(asked) == 2:
            for _, delta in captured.values():
                delta[0] = float("nan")
        return captured

    editor.gradients = broken_once
    metrics = trainer.run()
    assert trainer.skipped == 1 and metrics["step"] == 3 and metrics["loss"] == metrics["loss"]
    assert all(tensor.isfinite().all() for tensor in editor.state_dict().values())
    assert all(int(network.count) > 0 for network in editor.networks.values())


def test_tensorboard_shows_the_metrics(base, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    editor, config = make(base, steps=4, validate_every=2)
    validation = FactSampler(facts(), seed=5)
    Trainer(editor, FactSampler(facts()), config, output=tmp_path, validation=validation, progress=False,
            tensorboard=True).run()  # fmt: skip
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = events.Scalars("training/loss")
    assert [(event.step, event.value) for event in shown] == [(m["step"], pytest.approx(m["loss"])) for m in lines]
    assert [event.step for event in events.Scalars("validation/loss")] == [2, 4]


def test_without_tensorboard_a_sentence_says_so(base, tmp_path, monkeypatch):
    editor, config = make(base)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match="pip install tensorboard"):
        Trainer(editor, FactSampler(facts()), config, output=tmp_path, tensorboard=True)
    with pytest.raises(ValueError, match="pass output"):
        Trainer(editor, FactSampler(facts()), config, tensorboard=True)


def test_an_older_checkpoint_goes_on(base, tmp_path):
    """One that was written before there were ``accumulate`` and ``checkpoint_activations``."""
    editor, config = make(base, steps=2, validate_every=0)
    Trainer(editor, FactSampler(facts()), config, output=tmp_path, progress=False).run()
    path = tmp_path / "last/checkpoint.safetensors"
    tensors, metadata = read_tensors(path, "checkpoint")
    settings = json.loads(metadata["config"])
    del settings["accumulate"], settings["checkpoint_activations"]
    write_tensors(path, tensors, {**metadata, "config": json.dumps(settings)})
    again = Trainer(make(base)[0], FactSampler(facts()), config, output=tmp_path, progress=False)
    assert again.resume() and again.step == 2


def test_threads_are_the_users(base):
    before = torch.get_num_threads()
    editor, config = make(base, steps=1, validate_every=0)
    Trainer(editor, FactSampler(facts()), config, progress=False).run()
    assert torch.get_num_threads() == before


def test_facts_of_one_answer_are_refused_at_once():
    items = [Item((f"Who is {name}?",), "X") for name in PEOPLE]
    with pytest.raises(ValueError, match="All 6 facts have the answer 'X'.*add facts with other answers"):
        FactSampler(items)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_locality_weighs_less_of_many_edits(base, decay):
    """The loss is c_edit l_edit + c_loc n^-decay l_loc, of n edits at once."""
    editor, config = make(base, c_loc=3.0, c_loc_decay=decay, joint=[1, 4])
    learner = Trainer(editor, FactSampler(facts()), config, progress=False).learner
    for joint in (1, 4):
        ((loss, parts),) = learner.losses(FactSampler(facts()).draw(0, 4), config, joint)
        expected = config.c_edit * parts["l_edit"] + 3.0 * joint**-decay * parts["l_loc"]
        assert float(parts["l_loc"]) > 0 and loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loc", [1, 2, 3])
def test_all_kinds_of_neighbours_are_drawn(loc):
    """However few each edit has: what is nearest to an edit is what it disturbs first."""
    items, people, relations, count = facts(), 0, 0, 0
    of_wording = {wording: item for item in items for wording in item.wordings}
    sampler = FactSampler(items, loc=loc)
    for step in range(100):
        draw = sampler.draw(step, 4)
        for i, (prompt, _) in enumerate(draw.inner):
            item = of_wording[prompt]
            for other, _ in draw.loc[i * loc : (i + 1) * loc]:
                people += of_wording[other].entity == item.entity
                relations += of_wording[other].relation == item.relation
                count += 1
    by_chance = 1 / 3 / len(WORDINGS)  # by the third that may be any fact
    assert people / count > 0.28 and relations / count > 0.28 + by_chance / 2


@pytest.mark.parametrize("root", [False, True])
def test_a_classifier_starts_where_other_answers_stay(tokenizer, root, monkeypatch):
    """To flip every answer may cost less than to tell no edit, and training does not find its way out of that."""
    model = make_model("bert")
    model.resize_token_embeddings(len(tokenizer))
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=8))
    learner, config = EditorLearner(editor), TrainConfig(calibrate=True, loc_root=root)

    def losses(draw, config, joint):
        moved = 0.7 * editor.config.step_size**0.25  # the larger the step, the better edits are told
        yield torch.tensor(5 - 8 * moved), {"l_loc": torch.tensor((moved / 2) ** 0.5 if root else moved)}

    monkeypatch.setattr(learner, "losses", losses)
    claims = [("Paris is in France", "LABEL_1"), ("Rome is in Spain", "LABEL_0")]
    learner.start(Draw(claims, claims, claims), config)
    assert editor.config.step_size == pytest.approx(10**-3.5)  # the largest that moves them by less than .1
