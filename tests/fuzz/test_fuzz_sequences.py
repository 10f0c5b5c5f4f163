"""Random sequences of apply, revert, attach and edit on a small model, an interrupt at a random line of some.

After each step the weights must be those before it or those after it, nothing else may be left on the model, and the
next step must work. ``MENDFAST_FUZZ_SECONDS`` is the time for it (20), ``MENDFAST_FUZZ_SEED`` the first seed.
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
from conftest import make_batch, make_model
from interrupts import run
from test_editor import same_bits, state, trained
from test_interrupts import FILES, traces

from mendfast import Edit, revert_all
from mendfast.ledger import ledger_of

SECONDS = float(os.environ.get("MENDFAST_FUZZ_SECONDS", 20))
SEED = int(os.environ.get("MENDFAST_FUZZ_SEED", 0))
LAYERS = ["transformer.h.2.mlp.c_proj.weight", "transformer.h.3.mlp.c_fc.weight", "transformer.h.3.attn.c_attn.weight"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Sequence:
    """A model, what is applied to it as far as the test knows, and one that is written from the start each time."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.dtype = self.rng.choice(DTYPES)
        self.model = make_model("gpt2").to(self.dtype)
        self.clean = make_model("gpt2").to(self.dtype)
        self.start = state(self.model)
        self.editor = trained(self.model, "gpt2", layers=LAYERS)
        self.edits = [self.editor.edit_tokens(make_batch("gpt2", 2, seed=i)) for i in range(4)]
        # on some of the weights alone
        self.edits.append(Edit(dict(list(self.edits[0].factors.items())[:1])))
        self.applied: list[tuple[int, dict]] = []
        ledger_of(self.model)
        self.untouched = traces(self.model)
        self.log: list[str] = []

    def expected(self, applied: list[tuple[int, dict]]) -> dict[str, torch.Tensor]:
        self.clean.load_state_dict(self.start)
        ledger_of(self.clean).forget()
        for i, options in applied:
            self.edits[i].apply_(self.clean, backup="none", again=True, **options)
        return self.clean.state_dict()

    def step(self) -> None:
        kind = self.rng.choice(["apply", "apply", "revert", "revert", "many", "all", "attach", "edit", "refused"])
        after, rng = list(self.applied), self.rng
        if kind == "apply":
            i = rng.randrange(len(self.edits))
            options = {"rounding": rng.choice(["nearest", "stochastic"]), "seed": rng.randrange(1000)}
            after.append((i, options))
            backup = rng.choice(["cpu", "device"])

            def call():
                self.edits[i].apply_(self.model, backup=backup, again=True, **options)

        elif kind in ("revert", "many") and self.applied:
            chosen = list({i for i, _ in rng.sample(self.applied, 1 if kind == "revert" else len(self.applied) // 2)})
            for i in chosen:  # the newest of each
                del after[max(at for at, (j, _) in enumerate(after) if j == i)]

            def call():
                Edit.revert_many([self.edits[i] for i in chosen], self.model) if chosen else None

        elif kind == "all":
            after = []

            def call():
                revert_all(self.model)

        elif kind == "attach":
            i = rng.randrange(len(self.edits))

            def call():
                with torch.no_grad(), self.edits[i].attached(self.model):
                    self.model(**make_batch("gpt2", 1))

        elif kind == "refused":
            u, delta, alpha = self.edits[1].factors[LAYERS[0]]
            wrong = rng.choice([(u, delta, float("inf")), (u.long(), delta, 1.0), (u, delta * float("nan"), alpha)])
            if self.dtype == torch.float16:
                wrong = rng.choice([wrong, (u, delta, 1e30)])

            def call():
                with pytest.raises((ValueError, TypeError)):
                    Edit({**self.edits[2].factors, LAYERS[0]: wrong}).apply_(self.model)

        else:

            def call():
                self.editor.edit_tokens(make_batch("gpt2", 1))

        at = rng.randrange(400) if rng.random() < 0.7 else None
        self.log.append(f"{kind} {after[-1:]} at {at}")
        _, interrupted = run(call, FILES, at)
        before = self.expected(self.applied)
        done = after != self.applied and not same_bits(self.model, before)
        if done:
            assert same_bits(self.model, self.expected(after)), "neither before nor after"
        elif not interrupted:
            assert same_bits(self.model, self.expected(after)), "not done"
            done = True
        if done:
            self.applied = after
        elif [*self._books()] != sorted(i for i, _ in self.applied):
            # the step changed no bit (an update below half a unit), so only the books tell whether it was done
            assert [*self._books()] == sorted(i for i, _ in after), "the books are wrong"
            self.applied = after
        assert traces(self.model) == self.untouched, "something was left on the model"

    def _books(self) -> list[int]:
        ledger = ledger_of(self.model)
        ledger.settle()
        handles = [application.handle for application in ledger._all_applications()]
        return sorted(next(i for i, edit in enumerate(self.edits) if edit is handle) for handle in handles)


def test_random_sequences():
    import torch._dynamo  # noqa: F401, so that it is there from the start

    end, seed = time.monotonic() + SECONDS, SEED
    while time.monotonic() < end:
        sequence = Sequence(seed)
        try:
            for _ in range(40):
                sequence.step()
                if time.monotonic() > end:
                    break
            revert_all(sequence.model)
            assert same_bits(sequence.model, sequence.start)
        except BaseException as error:
            raise AssertionError(f"seed {seed} ({sequence.dtype}): {error}; steps {sequence.log}") from error
        seed += 1
