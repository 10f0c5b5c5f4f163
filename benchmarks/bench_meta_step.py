"""How long does a step of meta-training take per edit, and where does the time go?"""

from __future__ import annotations

import pytest
import torch

from mendfast.objective import to_device
from mendfast.training import editor_loss

from .bench_edit import _editor
from .cases import cases
from .contest import Contestant, relative_error
from .counts import step_work
from .naive_mend import meta_step
from .shapes import LOCALITY_TOKENS, batch, make_editor

CASES = cases((1, 4, 8, 16, 32), typical=4, cpu=(4,), cpu_others=False)
PHASES = cases((1, 8), typical=8, cpu=(1,), cpu_others=False)
NAIVE_EDITS = 8


def _batches(shape, size: int, seed: int, device) -> tuple[dict, dict, dict]:
    """One rephrasing and one locality sample for each edit."""
    return tuple(
        to_device(batch(shape, size, length, seed=3 * seed + i), device)
        for i, length in enumerate((20, 20, LOCALITY_TOKENS))
    )


def ours(editor, batches: tuple) -> torch.Tensor:
    editor.zero_grad()
    total, _ = editor_loss(editor, *batches)
    total.backward()
    return total.detach()


def naive(editor, batches: tuple, freeze_below: bool = False) -> torch.Tensor:
    editor.zero_grad()
    return meta_step(editor, *batches, freeze_below=freeze_below)[0]


def check(editor, batches: tuple, tolerance: float = 1e-2) -> None:
    """Loss and every gradient are the naive loop's. In eval mode: the naive loop moves no statistics.

    The tolerance is for gradients: a pre-activation within rounding of 0 may fall on either side of it.
    """
    results = []
    for step in (ours, naive):
        total = step(editor, batches)
        results.append([total, *(parameter.grad.clone() for parameter in editor.parameters())])
    error = relative_error(*results)
    assert error <= tolerance, f"loss or gradients differ from the naive loop's by {error:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_step(contest, case):
    """Loss and gradients; ours moves the running statistics as well. The optimiser's step is a phase of its own."""
    shape, editor, dtype = _editor(contest, case)
    size = contest.amount(case.size)
    if dtype == torch.float32:
        check(editor, _batches(shape, 2 if contest.quick else 1, 0, contest.device))
    else:
        small = case.shape.small()
        other = make_editor(small, contest.device.type, torch.float32)
        check(other, _batches(small, 2, 0, contest.device))

    def data(seed: int) -> tuple:
        return _batches(shape, size, seed, contest.device)

    contestants = {
        "mendfast": Contestant(
            lambda batches: ours(editor, batches),
            lambda batches: (editor.train(), batches)[1],
            lambda _: editor.eval(),
        )
    }
    if size <= NAIVE_EDITS:
        contestants["naive"] = lambda batches: naive(editor, batches)
        contestants["naive, frozen below"] = lambda batches: naive(editor, batches, freeze_below=True)
    row = {"shape": case.shape.name, "edits": case.size, "dtype": str(dtype)[6:]}
    work = step_work(editor, *data(0))
    contest(row, data, contestants, work=work, reference=None, units=size)
    editor.zero_grad(set_to_none=True)


@pytest.mark.parametrize("phase", ["inner gradients and editor", "loss", "backward", "optimiser"])
@pytest.mark.parametrize("case", PHASES, ids=str)
def test_phases(contest, case, phase):
    """The loss includes the inner gradients and the editor."""
    shape, editor, dtype = _editor(contest, case)

    def data(seed: int) -> tuple:
        return _batches(shape, case.size, seed, contest.device)

    if phase == "optimiser":
        optimiser = torch.optim.Adam(editor.parameters(), lr=0.0)
        ours(editor, data(0))
        call = Contestant(lambda _: optimiser.step())
    elif phase == "backward":
        call = Contestant(lambda total: total.backward(), lambda batches: editor_loss(editor, *batches)[0])
    elif phase == "loss":
        call = Contestant(lambda batches: editor_loss(editor, *batches))
    else:
        call = Contestant(lambda batches: editor.group_factors(batches[0]))
    row = {"shape": case.shape.name, "phase": phase, "edits": case.size, "dtype": str(dtype)[6:]}
    contest(row, data, {"mendfast": call}, reference=None)
    editor.zero_grad(set_to_none=True)
