"""What the model says: greedy answers that end where the model ends them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .capture import frozen
from .editable import EditableModel
from .labels import collate, encode_prompt, pad_token_id
from .layers import execution_device
from .objective import IGNORE, Below, Rows, context_length, kept_rows, target_rows, to_device
from .prompt_keys import PromptKeys
from .shared_prefix import SHARED, cache_of, padded, read_once, shared_start
from .variants import Variants

BATCH_TOKENS = 4096
"""Prompt and answer tokens of one batch, padding included, at most."""
ALIKE = 8
"""Rows that begin alike from which on they are a batch of their own."""
ROUND = 8
"""Tokens after which rows whose answer has ended leave a batch."""
SHORT = (2, 2, 4)
"""The first of these rounds where answers are judged before they end: few tokens are enough for many."""
_PLAINLY = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}  # fmt: skip
"""Against a model's own generation_config: each token is the first choice, as in teacher forcing."""


class Answer(NamedTuple):
    """What a model said."""

    text: str
    ended: bool
    """Whether it ended by itself, within the tokens that it might use."""
    ids: tuple[int, ...] = ()
    """Its tokens, the end token included; none of a classifier."""


def answer(
    subject: EditableModel, prompts: Sequence[str], max_new_tokens: int = 64, form: str | None = None
) -> list[str]:
    """The model's greedy answers (edits attached or applied included), as text; a classifier's label.

    Args:
        form: how the prompts are put, as in :meth:`mendfast.editable.EditableModel.encode`.

    Raises:
        ValueError: a prompt that fills the model's context, so that no token of an answer fits.
    """
    return [given.text for given in generate_answers(subject, prompts, max_new_tokens, form)]


@torch.no_grad()
def generate_answers(
    subject: EditableModel,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int | Sequence[int] = 64,
    form: str | None | Sequence[str | None] = None,
    *,
    starts: Sequence[Sequence[int]] | None = None,
    enough: Sequence[Callable[[str], bool] | None] | None = None,
    variants: Variants | None = None,
    keys: PromptKeys | None = None,
) -> list[Answer]:
    """:func:`answer`, with whether each answer ended by itself, and its tokens.

    An answer ends at any end token of the model, of its tokenizer and of its chat template; that of a decoder-only
    model which is taught no end (neither chat nor ``append_eos``) also at a line's end, once something is said.
    Batched: in a 16-bit model, where two tokens may tie, an answer can differ from the one that it gives alone.

    Args:
        prompts: as text, or as tokens that nothing is put around (a classifier's as text).
        max_new_tokens, form: of all prompts, or a list with each one's own.
        starts: tokens that each answer is known to begin with (:func:`agreed`), and which need not be found again.
        enough: of each answer a judge of whether what it begins with will do, and it may be cut there.
        variants: the edit under which each prompt is answered (by a causal model).
        keys: what is known of the prompts in the blocks below the edit.

    Raises:
        ValueError: as :func:`answer`; other than one start for each prompt.
    """
    rooms = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    forms = [form] * len(prompts) if form is None or isinstance(form, str) else list(form)
    if min(rooms, default=1) < 1 or isinstance(max_new_tokens, int) and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if subject.kind == "classifier":
        return [Answer(label, True) for label in _labels(subject, [str(prompt) for prompt in prompts])]
    starts = [tuple(start) for start in starts or [()] * len(prompts)]
    if set(map(len, (starts, rooms, forms))) != {len(prompts)}:
        raise ValueError(f"There are {len(starts)} starts for {len(prompts)} prompts; pass one for each.")
    ends, limit = _Ends(subject, enough), context_length(subject.model)
    causal = subject.kind == "causal"
    found: dict[int, Answer] = {}
    stems: dict[int, int] = {}  # how long the prompt is
    waiting: list[tuple[list[int], int, int]] = []  # what is read, how many tokens may follow, the place
    for i, (prompt, start, room) in enumerate(zip(prompts, starts, rooms, strict=True)):
        ids = tokens_of(subject, prompt, forms[i])
        if limit is not None:
            room = min(room, limit - len(ids) if causal else limit)
        if room < 1 or (limit is not None and len(ids) > limit):
            raise ValueError(f"The prompt has {len(ids)} tokens and the model takes {limit}; shorten it.")
        stems[i], known = len(ids), ends.cut(start[:room])
        if len(known.ids) == room or ends.reached(known, i):
            found[i] = known
        elif causal:
            starts[i] = known.ids
            waiting.append((ids + list(known.ids), room - len(known.ids), i))
        else:
            starts[i] = ()  # a decoder that goes on from several places at once would need positions of its own
            waiting.append((ids, room, i))
    while waiting:
        batches, waiting = _batches(waiting), []
        for batch in batches:
            steps = max(room for _, room, _ in batch)
            if causal and limit is not None:  # no row may go beyond it: what the longest cuts off goes on next round
                steps = min(steps, limit - max(len(ids) for ids, _, _ in batch))
            said = _generate(subject, batch, starts, steps, ends, variants, keys, stems)
            for (ids, room, i), new in zip(batch, said, strict=True):
                starts[i] = (*starts[i], *new[:room])
                found[i] = ends.cut(starts[i])
                if room > steps and not ends.reached(found[i], i):
                    waiting.append((ids + new, room - steps, i))
    return [found[i] for i in range(len(prompts))]


def tokens_of(subject: EditableModel, prompt: str | Sequence[int], form: str | None = None) -> list[int]:
    """What a model that writes is given for a prompt."""
    if not isinstance(prompt, str):
        return list(prompt)
    return encode_prompt(subject.tokenizer, subject.prompt_text(prompt, form), encoder_decoder=subject.kind != "causal")


def _labels(subject: EditableModel, prompts: Sequence[str]) -> list[str]:
    found: list[str] = []
    for start in range(0, len(prompts), 64):
        logits = subject.model(**_read(subject, prompts[start : start + 64])).logits
        if logits.shape[-1] == 1:
            found += ["true" if z > 0 else "false" for z in logits[:, 0].tolist()]
        else:
            found += [str(subject.model.config.id2label[i]) for i in logits.argmax(-1).tolist()]
    return found


def _read(subject: EditableModel, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """A classifier's inputs."""
    texts = [subject.prompt_text(prompt, "plain") for prompt in prompts]
    return to_device(subject.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"), subject.device)


class _Ends:
    """Where the answers of a model end."""

    def __init__(self, subject: EditableModel, enough: Sequence[Callable[[str], bool] | None] | None = None):
        self.judges = enough
        self.tokenizer = tokenizer = subject.tokenizer
        found = [getattr(getattr(subject.model, "generation_config", None), "eos_token_id", None)]
        found.append(getattr(tokenizer, "eos_token_id", None))
        if subject.chat:
            found.append(tokenizer.convert_tokens_to_ids(subject.end))
        lists = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in found]
        self.ids = {int(i) for ids in lists for i in ids if i is not None}
        self.at_line = subject.kind == "causal" and not (subject.chat or subject.config.append_eos)
        self._newlines: dict[int, bool] = {}

    def cut(self, ids: Sequence[int]) -> Answer:
        """The answer that begins ``ids``, up to where it ends."""
        at = next((i for i, token in enumerate(ids) if token in self.ids), None)
        kept = tuple(ids if at is None else ids[: at + 1])
        if self.at_line and (line := self._line(kept)) is not None:
            return line
        return Answer(self._text(kept).strip(), at is not None, kept)

    def reached(self, said: Answer, i: int) -> bool:
        """Whether the i-th answer has ended, or what it begins with will do."""
        judge = self.judges[i] if self.judges else None
        return said.ended or (judge is not None and judge(said.text))

    def _line(self, ids: Sequence[int]) -> Answer | None:
        """The first line in which something is said, where another follows."""
        for i, token in enumerate(ids):
            if self._has_newline(token):
                line, newline, _ = self._text(ids[: i + 1]).lstrip().partition("\n")
                if newline:
                    return Answer(line.strip(), True, tuple(ids[: i + 1]))
        return None

    def _has_newline(self, token: int) -> bool:
        if (found := self._newlines.get(token)) is None:
            found = self._newlines[token] = "\n" in self.tokenizer.decode([token])
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def lines_ended(self, width: int, starts: Sequence[Sequence[int]]) -> Any:
        """A stopping criterion for the rows that have left their first line, which ``starts`` begin.

        ``width``: of what was read, the starts included.
        """

        def criterion(ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            rows = zip(starts, ids[:, width:].tolist(), strict=True)
            return torch.tensor([self._line((*start, *new)) is not None for start, new in rows], device=ids.device)

        return criterion


def _batches(waiting: Sequence[tuple[list[int], int, int]]) -> list[list[tuple[list[int], int, int]]]:
    """Batches of like lengths; where :data:`ALIKE` rows or more begin with the same tokens, of those alone, which are
    then read once."""
    begun = Counter(tuple(ids[:SHARED]) for ids, _, _ in waiting)

    def kind(ids: list[int]) -> tuple[int, ...]:
        start = tuple(ids[:SHARED])
        return start if begun[start] >= ALIKE else ()

    found: list[list[tuple[list[int], int, int]]] = [[]]
    for item in sorted(waiting, key=lambda item: (kind(item[0]), item[1], len(item[0]))):
        batch = [*found[-1], item]
        width = max(len(ids) for ids, _, _ in batch) + max(room for _, room, _ in batch)
        if found[-1] and (width * len(batch) > BATCH_TOKENS or kind(found[-1][0][0]) != kind(item[0])):
            found.append([])
        found[-1].append(item)
    return found


def _generate(
    subject: EditableModel,
    batch: Sequence[tuple[list[int], int, int]],
    starts: Sequence[Sequence[int]],
    steps: int,
    ends: _Ends,
    variants: Variants | None,
    keys: PromptKeys | None,
    stems: Mapping[int, int],
) -> list[list[int]]:
    """What follows each row, whose answer has begun with its own of ``starts``; what is beyond its end means nothing.

    A causal model reads what all rows begin with (a chat template's) once for all; it goes on in rounds, and rows that
    have ended leave the batch between them.
    """
    model, pad, causal = subject.model, pad_token_id(subject.tokenizer), subject.kind == "causal"
    rows = [ids for ids, _, _ in batch]
    shared = shared_start(model, rows) if causal else 0
    # where the prompts' keys are known, they stand before all that is to be read, which is a token at least
    stem = [row[: min(stems[place], len(row) - 1)] for row, (_, _, place) in zip(rows, batch, strict=True)]
    known_to = sorted(map(len, stem))
    known = keys is not None and bool(keys.blocks) and 0 < shared <= known_to[0] and shared < known_to[-1]
    if known:
        parts = padded(stem, pad, behind=shared), padded(
            [row[len(start) :] for row, start in zip(rows, stem, strict=True)], pad, behind=0
        )
        ids, mask = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    else:
        ids, mask = padded(rows, pad, behind=shared if causal else None)
    width = ids.shape[1]
    first = width if causal else 1
    device = execution_device(model.get_input_embeddings())
    ids, mask = ids.to(device), mask.to(device)
    options: dict[str, Any] = dict(_PLAINLY, pad_token_id=pad, eos_token_id=sorted(ends.ids) or None)
    live, found, made = list(range(len(rows))), [[] for _ in rows], 0
    cache: dict[str, Any] = {}  # under the name that this transformers has for it
    lengths = iter(SHORT if ends.judges else ())
    edits = [variants.of[place] for _, _, place in batch] if variants else [0] * len(rows)
    edited = variants.rows if variants else contextlib.nullcontext
    with frozen(model):  # eval mode, and on a CPU the faster product of few rows
        if shared:
            kinds = sorted(set(edits))
            with edited(kinds):
                cache = read_once(model, ids[0, :shared], [kinds.index(edit) for edit in edits])
            if known and cache:
                end = max(map(len, stem))
                with edited(edits):
                    keys.read(cache, stem, ids[:, :end], mask[:, :end], shared)
        while live and made < steps:
            rounds = causal and (made == 0 or bool(cache))
            count = min(next(lengths, ROUND), steps - made) if rounds else steps - made
            if ends.at_line:
                options["stopping_criteria"] = [ends.lines_ended(first, [starts[batch[i][2]] for i in live])]
            with edited([edits[i] for i in live]):
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=count, return_dict_in_generate=True, **options, **cache
                )
            ids, cache = (out, {}) if isinstance(out, torch.Tensor) else (out.sequences, cache_of(out))
            made += count
            for i, new in zip(live, ids[:, first:].tolist(), strict=True):
                found[i] = new
            if made >= steps:
                break
            kept = []
            for k, i in enumerate(live):
                _, room, place = batch[i]
                if room > made and not ends.reached(ends.cut((*starts[place], *found[i])), place):
                    kept.append(k)
            if not kept:
                break
            chosen = torch.tensor(kept, device=device)
            if len(kept) < len(live):
                live, ids, mask = [live[k] for k in kept], ids[chosen], mask[chosen]
                for one in cache.values():
                    one.batch_select_indices(chosen)
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
    return found


# -- teacher-forced along an answer ------------------------------------------------------------------------


@torch.no_grad()
def follow(
    subject: EditableModel,
    prompts: Sequence[str],
    answers: Sequence[Sequence[int]],
    form: str | None = None,
    *,
    first: int | None = None,
    below: Below = contextlib.nullcontext,
) -> Rows:
    """The model's logits at every token of ``answers`` (:attr:`Answer.ids`), each after its prompt and those before it.

    One pass tells whether a greedy answer is still the same: it is if every token is the first choice. A
    classifier's row is that of its classes.

    Args:
        form: how the prompts are put, as in :meth:`mendfast.editable.EditableModel.encode`.
        first: give the rows of each answer's first so many tokens alone (of a causal model).
        below: what each pass is made within.
    """
    logits, labels, sample = [], [], []
    for start in range(0, len(prompts), 16):
        chosen = slice(start, start + 16)
        if subject.kind == "classifier":
            rows = kept_rows(subject.model, _read(subject, prompts[chosen]))
            rows = rows._replace(labels=rows.logits.argmax(-1))
        else:
            pairs = zip(prompts[chosen], answers[chosen], strict=True)
            examples = [_example(subject, *pair, form, first) for pair in pairs]
            batch = collate(
                examples, pad_token_id=pad_token_id(subject.tokenizer), encoder_decoder=subject.kind != "causal"
            )
            batch = to_device(batch, subject.device)
            with frozen(subject.model), below(batch):
                rows = target_rows(subject.model, batch)
        for values, part in zip((logits, labels, sample), (rows.logits, rows.labels, rows.sample + start), strict=True):
            values.append(part)
    return Rows(torch.cat(logits), torch.cat(labels), torch.cat(sample))


def _example(
    subject: EditableModel, prompt: str, given: Sequence[int], form: str | None, first: int | None
) -> dict[str, list[int]]:
    causal = subject.kind == "causal"
    ids = encode_prompt(subject.tokenizer, subject.prompt_text(prompt, form), encoder_decoder=not causal)
    labels = list(given)
    limit = context_length(subject.model)
    if causal and limit is not None and len(ids) + len(labels) > limit:
        raise ValueError(
            f"The prompt has {len(ids)} tokens and the answer {len(labels)}, and the model takes {limit} in all."
        )
    if causal:
        ids, labels = ids + labels, [IGNORE] * len(ids) + labels
        if first is not None:
            labels[len(ids) - len(given) + first :] = [IGNORE] * max(0, len(given) - first)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def agreed(chosen: torch.Tensor, labels: torch.Tensor, sample: torch.Tensor, size: int) -> list[tuple[int, ...]]:
    """How each greedy answer begins, as ``starts`` of :func:`generate_answers`: the tokens on which the first choices
    agree with ``labels``, and the first choice where they part.

    Args:
        chosen: [K] first choices; ``labels`` and ``sample`` as in :class:`mendfast.objective.Rows`.
    """
    starts: list[list[int]] = [[] for _ in range(size)]
    parted = [False] * size
    for choice, label, i in zip(chosen.tolist(), labels.tolist(), sample.tolist(), strict=True):
        if not parted[i]:
            starts[i].append(choice)
            parted[i] = choice != label
    return [tuple(start) for start in starts]
