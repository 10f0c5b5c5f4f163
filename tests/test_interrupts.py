"""An exception at any line of an apply, a revert, an attached block or the making of an edit."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import make_batch, make_model
from interrupts import run
from test_editor import SMALL, logits, same_bits, state, trained

from mendfast import Edit, MendConfig, MendEditor, revert_all
from mendfast.capture import without_edits
from mendfast.ledger import ledger_of, lock_of

FILES = ("ledger.py", "updates.py", "edit.py", "capture.py", "locks.py", "objective.py", "ops/rank1_update.py")


def traces(model: torch.nn.Module) -> dict:
    """All of a model that making an edit touches for a while, and of the thread."""
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), str(torch._dynamo.eval_frame._stance))
    return {
        "modes": modes,
        "modules": [
            (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
            for module in model.modules()
        ],
        "parameters": [p.requires_grad for p in model.parameters()],
    }


def free(lock) -> bool:
    """Whether another thread gets the lock."""
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(timeout=5)) or lock.release())
    thread.start()
    thread.join()
    return got == [True]


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    layers = ["transformer.h.2.mlp.c_proj.weight", "transformer.h.3.mlp.c_fc.weight"]  # few lines to strike
    editor = trained(make_model("gpt2"), "gpt2", layers=layers)
    return [editor.edit_tokens(make_batch("gpt2", seed=seed)) for seed in range(3)]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("what", ["apply", "revert", "revert_all", "replace"])
def test_a_change_is_whole_or_not_at_all(edits, what, rounding):
    """As often as there are lines, and the next call works; the books tell what the weights hold."""
    first, second, third = edits

    edited = make_model("gpt2").bfloat16()
    untouched = state(edited)
    first.apply_(edited, rounding=rounding)
    second.apply_(edited, rounding=rounding, seed=9)

    def prepared():
        model = copy.deepcopy(edited)  # its ledger too
        calls = {
            "apply": lambda: third.apply_(model, rounding=rounding, seed=20),
            "revert": lambda: first.revert_(model),
            "revert_all": lambda: ledger_of(model).revert_all(),
            "replace": lambda: ledger_of(model).replace(first, third.factors),
        }
        return model, calls[what]

    model, call = prepared()
    before = state(model)
    lines, _ = run(call, FILES)
    after = state(model)
    assert lines > 50 and not same_bits(model, before)
    model, call = prepared()
    outcomes = set()
    for at in range(lines):
        _, interrupted = run(call, FILES, at)
        done = same_bits(model, after)
        assert done or same_bits(model, before), at
        outcomes.add((interrupted, done))
        if done:
            model, call = prepared()
        elif at % 25 == 0:
            assert free(lock_of(model)), at
    assert (True, False) in outcomes
    call()
    assert same_bits(model, after)
    ledger_of(model).revert_all()
    assert same_bits(model, untouched)


def test_a_refused_change_that_is_interrupted_while_it_is_undone(edits):
    """Two faults: the next call puts it right."""
    model = make_model("gpt2").half()
    edits[0].apply_(model)
    huge = Edit({n: (u, d, 1e9) if i == 1 else (u, d, a) for i, (n, (u, d, a)) in enumerate(edits[1].factors.items())})
    before = state(model)

    def call():
        with pytest.raises(ValueError, match="infinity"):
            huge.apply_(model)

    lines, _ = run(call, FILES)
    assert same_bits(model, before)
    for at in range(lines):
        run(call, FILES, at)
        ledger_of(model).settle()
        assert same_bits(model, before), at
    edits[0].revert_(model)
    assert same_bits(model, make_model("gpt2").half().state_dict())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lifted_edits_come_back(edits, rounding):
    """Whatever line the interrupt strikes; and the edit that is attached is seen again."""
    model = make_model("gpt2").bfloat16()
    untouched = state(model)
    edits[0].apply_(model, rounding=rounding)
    edits[1].apply_(model, rounding=rounding, seed=9)
    edited, batch = state(model), make_batch("gpt2")
    with edits[2].attached(model):
        seen = logits(model, batch)

    def call():
        with without_edits(model):
            assert same_bits(model, untouched)

    lines, _ = run(call, FILES)
    assert lines > 50 and same_bits(model, edited)
    for at in range(lines):
        assert run(call, FILES, at)[1] and same_bits(model, edited), at
        if at % 25 == 0:
            assert free(lock_of(model)), at
    with edits[2].attached(model):
        assert torch.equal(logits(model, batch), seen)
        with without_edits(model):
            bare = logits(model, batch)
    revert_all(model)
    assert same_bits(model, untouched) and torch.equal(logits(model, batch), bare)


def test_without_a_backup_a_half_written_model_says_so(edits):
    """Untouched, or whole, or refused from then on."""
    first = edits[0]
    fresh = make_model("gpt2").bfloat16()
    before = state(fresh)
    model = copy.deepcopy(fresh)
    lines, _ = run(lambda: first.apply_(model, backup="none"), FILES)
    after, seen = state(model), set()
    for at in range(lines):
        model = copy.deepcopy(fresh)
        run(lambda model=model: first.apply_(model, backup="none"), FILES, at)
        if same_bits(model, before):
            first.apply_(model, backup="none")
            assert same_bits(model, after)
            seen.add("before")
        elif same_bits(model, after) and not ledger_of(model)._damaged:
            seen.add("after")
        else:
            seen.add("damaged")
            for call in (first.apply_, first.revert_, lambda model: first.attached(model).__enter__()):
                with pytest.raises(ValueError, match="partly written.*Reload the model"):
                    call(model)
            model.load_state_dict(before)
            ledger_of(model).forget()
            first.apply_(model)
    assert seen == {"before", "after", "damaged"}


@pytest.mark.parametrize(("architecture", "step"), [("gpt2", 2), ("t5", 7)])
def test_making_an_edit_leaves_nothing_behind(architecture, step):
    import torch._dynamo  # so that it is there before and after

    model = make_model(architecture).train()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    list(model.modules())[5].eval()
    editor = MendEditor.from_model(model, None, MendConfig(**SMALL))
    batch, before = make_batch(architecture, 1), traces(model)
    editor.edit_tokens(batch)  # says once that it is untrained
    with torch.no_grad():
        inside = traces(model)
        call = lambda: editor.edit_tokens(batch)  # noqa: E731
        files = (*FILES, "editor.py", "ops/few_rows.py", "ops/linear_nll.py")
        lines, _ = run(call, files)
        for at in range(0, lines, step):
            assert run(call, files, at)[1]
            assert traces(model) == inside, at
            if at % 50 == 0:
                assert free(lock_of(model)), at
        editor.edit_tokens(batch)
    assert traces(model) == before


def test_attaching_leaves_nothing_behind(edits):
    model = make_model("gpt2")
    before, batch = traces(model), make_batch("gpt2")

    def call():
        with edits[0].attached(model), edits[1].attached(model), torch.no_grad():
            model(**batch)

    call()  # the fingerprint is looked at once for each model
    lines, _ = run(call, FILES)
    for at in range(lines):
        assert run(call, FILES, at)[1]
        assert traces(model) == before, at
        assert at % 20 or free(lock_of(model)), at


class TestThreads:
    ROUNDS = 250

    def together(self, *calls) -> None:
        errors = []

        def guarded(call):
            try:
                for i in range(self.ROUNDS):
                    call(i)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def test_edits_of_their_own_on_one_model(self, edits):
        model = make_model("gpt2")
        editor, before = trained(model, "gpt2"), state(model)

        def work(edit: Edit, seed: int):
            batch = make_batch("gpt2", 2, seed=seed)

            def once(i: int) -> None:
                made = editor.edit_tokens(batch)
                edit.apply_(model, rounding=("nearest", "stochastic")[i % 2], seed=i)
                made.apply_(model)
                with torch.no_grad(), made.attached(model):
                    assert model(**batch).logits.shape[0] == 2
                edit.revert_(model)
                made.revert_(model)

            return once

        self.together(work(edits[0], 1), work(edits[1], 2))
        assert same_bits(model, before) and traces(model)["modules"][0][1:3] == (0, 0)

    def test_the_same_edit_whatever_the_others_do(self):
        """A pass of another thread is not captured, nor cut down to the rows that a loss needs."""
        model = make_model("gpt2")
        editor, batch, other = trained(model, "gpt2"), make_batch("gpt2", seed=1), make_batch("gpt2", 5, 12, seed=2)
        expected = editor.edit_tokens(batch)
        with torch.no_grad():
            logits = model(**other).logits

        def edit(_: int) -> None:
            made = editor.edit_tokens(batch)
            for name, (u, delta, _) in made.factors.items():
                torch.testing.assert_close(u, expected.factors[name].u)
                torch.testing.assert_close(delta, expected.factors[name].delta)

        def read(_: int) -> None:
            with torch.no_grad():
                torch.testing.assert_close(model(**other).logits, logits, rtol=1e-4, atol=1e-4)

        self.together(edit, read)
