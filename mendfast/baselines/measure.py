"""One edit of a system in figures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .. import ops
from ..answers import can_match, contains, exact_match, first_sentence, first_word, has_got, rouge_l, yes_or_no
from ..capture import frozen
from ..editable import EditableModel
from ..generation import Answer, agreed, answer, follow, generate_answers
from ..labels import IGNORE, encode_prompt, has_template
from ..metrics import Pair, Told, perplexity, tell
from ..objective import Batch, Below, Rows, per_sample_mean, target_rows, to_device
from ..prompt_keys import PromptKeys
from ..training.cache import PrefixCache
from ..training.memory import PeakMemory
from .asking import Asking, at_once
from .figures import FIGURES, Interval, bootstrap, summarise
from .system import System

__all__ = [
    "FIGURES", "Before", "Interval", "Outcome", "PeakMemory", "bootstrap", "measure", "other_forms", "summarise",
]  # fmt: skip

KL_TOKENS = 16
PREMISE_TOKENS = 8
"""Of an answer of yes or no, which is judged by its first word."""
LEAK_TOKENS = 12
"""After an answer that must stay has parted from what it was: where a target leaks, it is what comes instead."""
CACHED = 1 << 29
"""Bytes of states below the edited layers that are kept: what is asked again of other edits and systems."""
KEYS = 1 << 30
"""Bytes of prompts' keys and values below the edited layers."""
SYSTEM_PROMPT = "system:You answer questions."


@dataclass
class Outcome:
    """What :func:`measure` saw of one edit."""

    figures: dict[str, float]
    shown: list[tuple[str, str, str]]
    """Prompt, answer before, answer after."""
    right: list[bool] = field(default_factory=list)
    """Of each edit whether it is answered with all target tokens, teacher-forced."""
    exact: list[bool] = field(default_factory=list)
    """Of each edit whether the generated answer is the target, as in exact_match."""
    tokens: list[int] = field(default_factory=list)
    """Of each edit how many tokens the target has, its end included; none of a classifier."""


class Before:
    """What a model says unedited, kept from edit to edit, and from system to system of the same model.

    It must not be kept once the model itself has changed, as after training it.

    Args:
        texts: running text that edits must leave alone; its logits are held, tokens times vocabulary.

    Attributes:
        parts: how many batches the running text is; :func:`measure` may be told to read one of them.
        unedited: for a batch a block in which a pass of the unedited model takes from what was computed before all
            that its blocks give.
    """

    def __init__(self, subject: EditableModel, texts: Sequence[str | Pair | Batch] = ()):
        self.subject = subject
        self._answers: dict[tuple[str, int], Answer] = {}
        self._told: dict[Pair, tuple[bool, torch.Tensor]] = {}
        self._batches = [to_device(batch, subject.device) for batch in subject.text_batches(texts)]
        self.parts = len(self._batches)
        self._texts: dict[int, tuple[Rows, torch.Tensor]] = {}
        self._caches: dict[tuple[str, ...], PrefixCache] = {}
        self._keys: dict[int, PromptKeys] = {}
        self._expected: dict[str, None] = {}
        self.unedited: Below = contextlib.nullcontext
        if subject.kind != "classifier":
            self.unedited = PrefixCache(subject.model, [], CACHED).replayed

    def below(self, system: System) -> Below:
        """For a batch a block in which a pass, whether or not it is edited by ``system``, takes what the blocks below
        its layers give from what was computed before."""
        layers = system.changed_layers()
        if layers is None or system.subject.kind == "classifier":
            return contextlib.nullcontext
        if not layers:
            return self.unedited
        names = tuple(layer.name for layer in layers)
        if names not in self._caches:
            self._caches[names] = PrefixCache(self.subject.model, layers, CACHED)
        return self._caches[names].replayed

    def keys(self, system: System) -> PromptKeys | None:
        """What is known of prompts in the blocks below the system's layers, which other systems may have too."""
        if not (layers := system.changed_layers()):
            return None
        found = PromptKeys(self.subject.model, layers, KEYS)
        return self._keys.setdefault(len(found.blocks), found) if found.blocks else None

    def serves(self, subject: EditableModel) -> bool:
        """Whether ``subject`` is the same model, asked in the same way."""
        if self.subject.model is not subject.model:
            return False
        names = ("prompt_template", "separator", "append_eos", "chat")
        return all(getattr(self.subject.config, name) == getattr(subject.config, name) for name in names)

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> list[Answer]:
        """Each prompt's generated answer."""
        keys = [(prompt, max_new_tokens) for prompt in prompts]
        if not all(key in self._answers for key in keys):
            keys += [(prompt, max_new_tokens) for prompt in self._expected]
            self._expected = {}
            new = [key for key in dict.fromkeys(keys) if key not in self._answers]
            given = generate_answers(self.subject, [prompt for prompt, _ in new], max_new_tokens)
            self._answers |= dict(zip(new, given, strict=True))
        return [self._answers[prompt, max_new_tokens] for prompt in prompts]

    def expect(self, prompts: Iterable[str]) -> None:
        """When the first answer is asked for that isn't known, make those to ``prompts`` with it: a step costs little
        more for many answers than for one."""
        self._expected |= dict.fromkeys(prompts)

    def told(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, float]:
        """Whether each pair is answered right, teacher-forced ([N] float), and the perplexity of all their tokens."""
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in self._told]:
            found = tell(self.subject, new, logits=False, below=self.unedited)
            for i, (pair, right) in enumerate(zip(new, found.correct.tolist(), strict=True)):
                self._told[pair] = right, found.nll[found.sample == i].cpu()
        right, losses = zip(*(self._told[pair] for pair in pairs), strict=True)
        return torch.tensor(right).float(), perplexity(torch.cat(losses))

    def text(self, part: int) -> tuple[Rows, torch.Tensor]:
        """Of a batch of running text the logits at every token, and the tokens' negative log-likelihoods."""
        if part not in self._texts:
            rows = self.read(part, self.unedited)
            self._texts[part] = rows, ops.token_nll_rows(rows.logits, rows.labels)
        return self._texts[part]

    @torch.no_grad()
    def read(self, part: int, below: Below = contextlib.nullcontext) -> Rows:
        """The rows that :meth:`text` holds, of the model as it is now."""
        with frozen(self.subject.model), below(self._batches[part]):
            return target_rows(self.subject.model, self._batches[part])


def measure(system: System, requests: Sequence[Pair], *asked: Sequence[Pair], **options: Any) -> Outcome:
    """:func:`measuring`, all of it at once."""
    return at_once(measuring(system, requests, *asked, **options))


def measuring(
    system: System,
    requests: Sequence[Pair],
    rephrasings: Sequence[Pair] = (),
    locality: Sequence[Pair] = (),
    portability: Sequence[Pair] = (),
    *,
    show: Sequence[str] = (),
    generate: bool = True,
    before: Before | None = None,
    near: Mapping[str, Sequence[str]] | None = None,
    premises: Sequence[tuple[str, bool]] = (),
    forms: Sequence[str] = (),
    max_new_tokens: int = 64,
    in_turn: bool = False,
    part: int | None = None,
    later: bool = False,
) -> Generator[Asking, list[Answer], Outcome]:
    """Make one edit, or several simultaneous ones, ask, and take it back; :data:`FIGURES` says what comes out.

    Edit success is that of Mitchell et al. (2022, section 2), over an edit and its equivalents; perplexity
    drawdown is theirs for generation, accuracy drawdown theirs for the other tasks. All of these feed the target's
    tokens in. What is generated is told nothing of the target, and locality is judged by what the model itself said
    before the edit, the data's answers apart. Before is the system's own model (that of ENN is another than the
    others').

    Args:
        requests: (prompt, target) of the edit.
        rephrasings: other wordings of the prompts, each with its target.
        locality: prompts that the edit must leave alone, with the answers to judge accuracy by.
        portability: questions whose answers follow from the edit.
        show: prompts to answer by greedy decoding, before and after.
        generate: also generate answers, which takes a pass for each token; without it there are no figures of them.
        before: keeps what doesn't change over edits, and holds the running text.
        near: locality prompts to count apart: "relation", "subject".
        premises: questions of yes (True) or no, as :func:`mendfast.answers.truth_question` makes them.
        forms: other forms to ask the edits in, of :func:`other_forms`.
        max_new_tokens: of each answer; the same for all, whatever the target.
        in_turn: make the edits one after the other, and ask after the last.
        part: read that batch of ``before``'s running text alone.
        later: where the edit can be had again as weights, take it back, yield what is to be answered under those, and
            go on when the answers are sent; without it nothing is ever yielded.

    Raises:
        ValueError: no requests; a ``before`` of another model; whatever the system's edit raises.
    """
    editor, n, r = system.subject, len(requests), len(rephrasings)
    if not requests:
        raise ValueError("measure was given no requests; pass at least one (prompt, target).")
    before = before or Before(editor)
    if not before.serves(editor):
        raise ValueError("before is of another model or way of asking than the system's; make one for its subject.")
    below = before.below(system)
    already, _ = before.told(requests)
    base = before.told(locality) if locality else None
    texts = range(before.parts) if part is None else [part]
    for i in texts if before.parts else ():
        before.text(i)
    said = before.answers(show, max_new_tokens)
    others = None
    if generate:
        others = _Others(editor, before, [prompt for prompt, _ in locality], near or {}, max_new_tokens, below)
    pairs, exact = [*requests, *rephrasings, *portability], []
    with contextlib.ExitStack() as stack:
        with PeakMemory(editor.device) as memory:
            stack.enter_context(system.edit(requests, in_turn=True) if in_turn else system.edit(requests))
        told = tell(editor, pairs, logits=False, below=below)
        asked = told.correct.float()
        figures = {
            "edit_success": asked[: n + r].mean().item(),
            "efficacy": asked[:n].mean().item(),
            "already": already.mean().item(),
            "seconds": system.seconds,
        }
        if r:
            figures["generality"] = asked[n : n + r].mean().item()
        if portability:
            figures["portability"] = asked[n + r :].mean().item()
        if memory.bytes is not None:
            figures["peak_bytes"] = memory.bytes
        if base is not None:
            after = tell(editor, locality, logits=False, below=below)
            figures["drawdown"] = (base[0] - after.correct.float().cpu()).mean().item()
            figures["ppl_drawdown"] = after.perplexity() - base[1]
        if before.parts:
            figures |= _text_figures(before, texts, below)
        if generate:
            # one batch of all that is asked: a step costs little more for many answers than for one
            asking = Asking(editor, max_new_tokens, before.keys(system))
            starts, targets = _target_starts(editor, pairs, told), [target for _, target in pairs]
            matched = [_no_match(target) for target in targets]
            first = asking.add([prompt for prompt, _ in pairs], starts, enough=[None] * (n + r) + matched[n + r :])
            others.follow()
            parted = asking.add(*others.parted(targets[:n]))
            formed = {form: asking.add([p for p, _ in requests], form=form, enough=matched[:n]) for form in forms}
            judged = asking.add(
                [prompt for prompt, _ in premises], tokens=[PREMISE_TOKENS] * len(premises),
                enough=[first_word] * len(premises),
            )  # fmt: skip
            again = {prompt: i for i, (prompt, _) in enumerate(pairs[: n + r])}
            known = dict(zip(others.prompts, others.starts, strict=False))
            again |= {p: asking.add([p], [known.get(p, ())]).start for p in show if p not in again}
            asking.weights = system.written() if later and editor.kind == "causal" else None
            given = asking.answers() if asking.weights is None else []
        else:
            now = answer(editor, show, max_new_tokens)
    if generate:
        if asking.weights is not None:
            given = yield asking
        spoken = given[first]
        exact = [exact_match(a.text, target) for a, target in zip(spoken, targets[:n], strict=False)]
        figures |= _spoken(spoken, pairs, n, r)
        if editor.kind != "classifier":
            figures["token_accuracy"] = _token_accuracy(editor, requests, told)
        for form, place in formed.items():
            name = f"exact_match_{form.partition(':')[0]}"
            figures[name] = _mean(exact_match(a.text, t) for a, t in zip(given[place], targets, strict=False))
        if premises:
            truths = [truth for _, truth in premises]
            figures["premises"] = _mean(yes_or_no(a.text) is t for a, t in zip(given[judged], truths, strict=True))
        figures |= others.figures(targets[:n], given[parted])
        now = [given[again[prompt]].text for prompt in show]
    answers = [(p, b.text, a) for p, b, a in zip(show, said, now, strict=True)]
    tokens = [] if editor.kind == "classifier" else [len(row) for row in _target_labels(editor, requests)]
    return Outcome(figures, answers, told.correct[:n].tolist(), exact, tokens)


def other_forms(subject: EditableModel) -> tuple[str, ...]:
    """The forms that a question can be asked in besides the editor's own; none without a chat template."""
    if subject.kind != "causal" or not has_template(subject.tokenizer):
        return ()
    return ("plain" if subject.chat else "chat", SYSTEM_PROMPT)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _target_starts(subject: EditableModel, pairs: Sequence[Pair], told: Told) -> list[tuple[int, ...]] | None:
    """How each pair's greedy answer begins, seen from the pass with the target's tokens: it costs nothing more."""
    if subject.kind == "classifier":
        return None
    labels = _target_labels(subject, pairs)
    flat = torch.tensor([label for row in labels for label in row])
    starts = agreed(told.choice, flat, told.sample, len(pairs))
    if subject.kind == "causal":
        for i, ((prompt, target), row) in enumerate(zip(pairs, labels, strict=True)):
            # a target whose first token has merged with the prompt's last follows other tokens than the prompt's
            ids = subject.encode(prompt, target)["input_ids"]
            read = ids[: len(ids) - len(row)]
            if read != encode_prompt(subject.tokenizer, subject.prompt_text(prompt)):
                starts[i] = ()
    return starts


def _target_labels(subject: EditableModel, pairs: Sequence[Pair]) -> list[list[int]]:
    examples = [subject.encode(*pair) for pair in pairs]
    return [[label for label in example["labels"] if label != IGNORE] for example in examples]


def _token_accuracy(subject: EditableModel, requests: Sequence[Pair], told: Told) -> float:
    """The share of each request's target tokens that are the first choice, mean over requests, which ``told`` begins
    with."""
    labels = _target_labels(subject, requests)
    flat = torch.tensor([label for row in labels for label in row])
    same = (told.choice[: len(flat)].cpu() == flat).float()
    return _mean(part.mean().item() for part in same.split([len(row) for row in labels]))


def _spoken(given: Sequence[Answer], pairs: Sequence[Pair], n: int, r: int) -> dict[str, float]:
    """The figures of generated answers: of n edits, r rephrasings, and what follows from them."""
    texts, targets = [a.text for a in given], [target for _, target in pairs]
    right = [exact_match(*pair) for pair in zip(texts, targets, strict=True)]
    figures = {
        "exact_match": _mean(right[:n]),
        "contains": _mean(contains(*pair) for pair in zip(texts[: n + r], targets[: n + r], strict=True)),
        "first_sentence": _mean(
            exact_match(first_sentence(text), target) for text, target in zip(texts[:n], targets[:n], strict=True)
        ),
        "never_stopped": _mean(not a.ended for a in given[: n + r]),
    }
    rouge = [rouge_l(*pair) for pair in zip(texts[:n], targets[:n], strict=True)]
    if None not in rouge:
        figures["rouge_l"] = _mean(rouge)
    if r:
        figures["rephrase_exact_match"] = _mean(right[n : n + r])
    if len(pairs) > n + r:
        figures["portability_exact_match"] = _mean(right[n + r :])
    return figures


def _text_figures(before: Before, parts: Iterable[int], below: Below) -> dict[str, float]:
    old, new, divergences = [], [], []
    for part in parts:
        (was, losses), now = before.text(part), before.read(part, below)
        old.append(losses)
        new.append(ops.token_nll_rows(now.logits, now.labels))
        kl = ops.kl_divergence_rows(was.logits, now.logits)
        divergences.append(per_sample_mean(kl, was.sample, int(was.sample.max()) + 1))
    return {
        "perplexity_rise": perplexity(torch.cat(new)) - perplexity(torch.cat(old)),
        "text_kl": torch.cat(divergences).mean().item(),
    }


def _no_match(target: str) -> Callable[[str], bool]:
    """Whether an answer that begins so can't be the target."""
    return lambda said: not can_match(said, target)


class _Others:
    """Answers that an edit must leave alone: made before it, with the logits along them; :meth:`follow` and then
    :meth:`figures` after it."""

    def __init__(
        self,
        subject: EditableModel,
        before: Before,
        prompts: Sequence[str],
        near: Mapping[str, Sequence[str]],
        max_new_tokens: int,
        below: Below,
    ):
        if unknown := [kind for kind in near if f"unchanged_{kind}" not in FIGURES]:
            raise ValueError(f'near has the kind {unknown[0]!r}; use "relation" and "subject".')
        self.subject, self.below, self.n = subject, below, len(prompts)
        self.spans, self.prompts = {"": slice(0, len(prompts))}, list(prompts)
        for kind, more in near.items():
            self.spans[f"_{kind}"] = slice(len(self.prompts), len(self.prompts) + len(more))
            self.prompts += more
        self.said = before.answers(self.prompts, max_new_tokens)
        self.ids = [a.ids for a in self.said]
        if self.n:
            self.rows = self._early(
                follow(subject, self.prompts[: self.n], self.ids[: self.n], first=KL_TOKENS, below=before.unedited)
            )

    def _early(self, rows: Rows) -> Rows:
        """The first :data:`KL_TOKENS` of each prompt's rows, which come one prompt after the other."""
        counts = torch.bincount(rows.sample, minlength=self.n)
        place = torch.arange(len(rows.sample), device=rows.sample.device) - (counts.cumsum(0) - counts)[rows.sample]
        return Rows(*(part[place < KL_TOKENS] for part in rows))

    def follow(self) -> None:
        """See, of the edited model, how far it says the same."""
        self.found: dict[str, float] = {}
        self.kept: list[bool] = []
        self.starts: list[tuple[int, ...]] = []
        if not self.prompts:
            return
        rows = follow(self.subject, self.prompts, self.ids, below=self.below)
        chosen = rows.logits.argmax(-1)
        if self.n:
            mine = rows.sample < self.n
            # a classifier's label is what it says now
            said = self.rows.logits.argmax(-1) if self.subject.kind == "classifier" else rows.labels[mine]
            changed = (chosen[mine] != said).float()
            self.found["first_choice_changed"] = per_sample_mean(changed, rows.sample[mine], self.n).mean().item()
            early = self._early(Rows(rows.logits[mine], rows.labels[mine], rows.sample[mine]))
            divergence = ops.kl_divergence_rows(self.rows.logits, early.logits)
            self.found["kl"] = per_sample_mean(divergence, early.sample, self.n).mean().item()
        if self.subject.kind == "classifier":
            now = generate_answers(self.subject, self.prompts)
            self.kept = [a.text == b.text for a, b in zip(self.said, now, strict=True)]
            self.starts = [()] * len(now)
        else:
            self.starts = agreed(chosen, rows.labels, rows.sample, len(self.prompts))
            self.kept = [start == ids for start, ids in zip(self.starts, self.ids, strict=True)]

    def parted(self, targets: Sequence[str]) -> tuple[Sequence[Any], ...]:
        """The questions that are answered otherwise now, how their answers begin, and how much of them tells a leak:
        what had a target in it before leaks none."""
        self.asked = [
            i for i in range(self.n) if not self.kept[i] and not all(contains(self.said[i].text, t) for t in targets)
        ]
        starts = [self.starts[i] for i in self.asked]
        enough = []
        for i in self.asked:
            new = [target for target in targets if not contains(self.said[i].text, target)]
            enough.append(partial(has_got, target=new))
        return [self.prompts[i] for i in self.asked], starts, [len(start) + LEAK_TOKENS for start in starts], enough

    def figures(self, targets: Sequence[str], now: Sequence[Answer]) -> dict[str, float]:
        """Given what the edited model answers to those that :meth:`parted` names."""
        figures = self.found
        for kind, span in self.spans.items():
            if self.kept[span]:
                figures[f"unchanged{kind}"] = _mean(self.kept[span])
        if self.n:
            said = [self.said[i] for i in self.asked]
            leaks = [
                any(contains(b.text, target) and not contains(a.text, target) for target in targets)
                for a, b in zip(said, now, strict=True)
            ]
            figures["leaked"] = sum(leaks) / self.n
        return figures
