"""Which blocks to edit, by measurement: what untrained edits of equal strength do in each of them.

MEND edits the last blocks because that worked for the models of its paper (Mitchell et al. 2022, section 4). Whether it
does for another model is cheap to ask ahead of a training: an edit by least squares with an editor that knows nothing
is a gradient step away from what must stay. Its step size is raised until the edited question is answered to a given
loss, the same in all blocks; what it then does to the question in other words, and to other texts, differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from . import ops
from .choice import blocks_of
from .config import MendConfig
from .edit import Edit
from .editor import MendEditor
from .metrics import Pair, Told, tell

STRENGTH = 0.5  # nats a token: the loss that an edit must bring its own question to
STEP_SIZES = tuple(10 ** (k / 2) for k in range(-12, 3))


class Case(NamedTuple):
    """An edit, and its question in other words."""

    prompt: str
    target: str
    rephrased: str


class Candidate(NamedTuple):
    """Consecutive blocks, and what would be edited in them."""

    blocks: str
    layers: list[str]


@dataclass(frozen=True)
class Measured:
    """Means over edits of one candidate."""

    blocks: str
    layers: list[str]
    energy: float  # of the gradient: ||grad W||_F / ||W||_F
    step_size: float  # geometric mean
    reached: float  # share of edits that reached STRENGTH
    generality: float  # share of rephrased questions answered with the target, teacher-forced
    rephrased_nll: float
    kl: float  # of other answers, a token

    @property
    def loss(self) -> float:
        """What meta-training minimises (equation 4): the rephrased question's loss and the others' KL."""
        return self.rephrased_nll + self.kl

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "loss": self.loss}


def candidates(model: nn.Module, span: int = 3, stride: int | None = None) -> list[Candidate]:
    """Runs of ``span`` consecutive blocks, the last ones last, each ``stride`` (``span``) blocks after the one before.

    Raises:
        ValueError: no stack of blocks with matrices to edit.
    """
    found, stacks = [], blocks_of(model)
    for stack, blocks in stacks:
        name = f"{stack}: " if len(stacks) > 1 else ""
        for end in range(len(blocks), 0, -(stride or span)):
            run = blocks[max(0, end - span) : end]
            if len(run) < min(span, len(blocks)):
                break
            (first, _), (last, _) = run[0], run[-1]
            shown = f"{first}" if first == last else f"{first} to {last}"
            found.append(Candidate(name + shown, [weight for _, weights in run for weight in weights]))
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks with matrices that an edit could go to.")
    return found[::-1]


def locate(
    model: nn.Module,
    tokenizer: Any,
    cases: Sequence[Case],
    protected: Sequence[Any],
    unrelated: Sequence[Pair],
    *,
    among: Sequence[Candidate] | None = None,
    progress: bool | None = None,
) -> list[Measured]:
    """Measure each candidate; the one with the least :attr:`Measured.loss` is the choice.

    Args:
        cases: edits, each made alone.
        protected: what every edit is to leave alone, as :meth:`MendEditor.protect` takes it.
        unrelated: (prompt, answer) pairs on which the disturbance is measured; none of ``protected``.
        among: the candidates, of :func:`candidates` by default.
        progress: True shows a bar, None where there is a terminal.

    Raises:
        ValueError: no cases or nothing to protect, questions that the model can't be asked.
    """
    if not cases or not unrelated:
        raise ValueError("There is nothing to measure with; pass at least one case and one unrelated question.")
    among = list(among) if among is not None else candidates(model)
    disable = None if progress is None else not progress
    return [
        _measured(model, tokenizer, candidate, cases, protected, unrelated)
        for candidate in tqdm(among, desc="blocks", disable=disable)
    ]


def _measured(
    model: nn.Module,
    tokenizer: Any,
    candidate: Candidate,
    cases: Sequence[Case],
    protected: Sequence[Any],
    unrelated: Sequence[Pair],
) -> Measured:
    config = MendConfig(layers=candidate.layers, rank=1, step_size=1.0, aggregation="least_squares", protect_rank=64)
    editor = MendEditor.from_model(model, tokenizer, config)
    editor.protect(protected)
    captured = editor.gradients(editor.tokenize([(case.prompt, case.target) for case in cases]))
    with torch.no_grad():
        editor.train().transform(captured)  # an editor normalises by what it has seen
    editor.eval()
    before = tell(editor, unrelated)
    found = [list(_edited(editor, case, unrelated, before)) for case in cases]
    steps, reached, correct, nll, kl = (sum(column) / len(cases) for column in zip(*found, strict=True))
    energy = _energy(captured) / sum(float(layer.weight.detach().float().square().sum()) for layer in editor.layers)
    return Measured(candidate.blocks, candidate.layers, math.sqrt(energy), math.exp(steps), reached, correct, nll, kl)


def _edited(editor: MendEditor, case: Case, unrelated: Sequence[Pair], before: Told) -> Iterator[float]:
    """log step size, whether the strength was reached; at it the rephrased question's success and loss, and the KL."""
    edit = editor.edit(case.prompt, case.target)
    best, step = math.inf, STEP_SIZES[0]
    for size in STEP_SIZES:
        with _scaled(edit, size).attached(editor.model):
            loss = float(tell(editor, [(case.prompt, case.target)], logits=False).nll.mean())
        if loss < best:
            best, step = loss, size
        if best <= STRENGTH or loss > 2 * best + 1:  # strong enough, or beyond the best
            break
    with _scaled(edit, step).attached(editor.model):
        rephrased = tell(editor, [(case.rephrased, case.target)], logits=False)
        after = tell(editor, unrelated)
    yield math.log(step)
    yield float(best <= STRENGTH)
    yield float(rephrased.correct.float().mean())
    yield float(rephrased.nll.mean())
    yield float(ops.kl_divergence_rows(before.logits, after.logits).mean())


def _scaled(edit: Edit, size: float) -> Edit:
    factors = {name: (u, delta, alpha * size) for name, (u, delta, alpha) in edit.factors.items()}
    return Edit(factors, edit.model_type, (), edit.fingerprint)


def _energy(captured: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The mean over samples of sum over layers ||delta^T u||_F^2, without the products themselves."""
    total, size = 0.0, 1
    for u, delta in captured.values():
        u, delta, size = u.double(), delta.double(), len(u)
        total += float(((u @ u.mT) * (delta @ delta.mT)).sum())
    return total / size
