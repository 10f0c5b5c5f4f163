"""The frozen part once per text, not once per step: the hidden states that the blocks below the edits give."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..capture import frozen, replaced_forwards
from ..choice import stacks
from ..frozen_prefix import FrozenPrefix
from ..layers import Layer, execution_device
from ..objective import IGNORE, Batch, kept_rows, model_kind, to_device
from ..packing import packing
from .kept_states import KeptStates, bytes_of, fingerprint

log = logging.getLogger("mendfast")


MULTIPLE = 16  # of whose tokens the texts are that are computed together
TOGETHER = 512  # tokens in one forward pass of theirs
RUN = object()
"""A form: what T5's blocks give beside their states, the position bias, belongs to the padded batch, and the first
block is run for it."""


class Text(NamedTuple):
    """One sample of a batch without its padding."""

    key: bytes
    inputs: dict[str, torch.Tensor]  # [1, length]


class _Enough(Exception):
    """The forward pass has given what was asked for."""


class PrefixCache:
    """What the frozen blocks of a model put out for each text, computed once and kept.

    >>> cache = PrefixCache(model, layers, limit=1 << 30)
    >>> with cache.replayed(batch): model(**batch)              # runs the blocks from the first edited one on
    >>> with cache.replayed(batch, final=True): model(**batch)  # of the unedited model: no block, norm and head alone

    A text is a sample's tokens and mask without trailing padding; its states are kept as [length, width] in the
    model's own dtype. Texts that are missing are computed together, each padded to a multiple of :data:`MULTIPLE`
    tokens: matrix products whose sizes are such multiples give a row the same bits in any company, so that a run that
    is resumed, or whose cache was too small, ends in the same bits as one that had everything in memory. Against a
    run without a cache results agree to rounding, since products of other sizes add in another order.

    The weights must stay as they are while the cache is used; :meth:`clear` forgets what they gave.

    Args:
        layers: those that edits may change.
        limit: bytes to keep in memory; beyond it the texts that were longest not asked for are dropped.
        directory: where dropped ones go, and where those of an earlier run with the same weights are found.
        disk_limit: bytes to write there.

    Attributes:
        asked, computed, read: texts that were asked for, and of them those that had to be computed, or came from disk.
        forgot: of states, for want of place.
        runs, saved_runs: of a block on a text, that there would be without the cache, and of them those that weren't.
        held: bytes in memory.
        why_not: why a model can't be served (then :meth:`replayed` changes nothing), or None.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        limit: int,
        *,
        directory: str | Path | None = None,
        disk_limit: int = 1 << 40,
    ):
        if limit < 0:
            raise ValueError(f"limit is {limit}; it must be the bytes to keep in memory, or 0 to keep none.")
        self.model, self.limit = model, limit
        self.asked = self.computed = self.read = self.forgot = self.held = self.runs = self.saved_runs = 0
        self._states: OrderedDict[bytes, list[torch.Tensor]] = OrderedDict()
        kind, found = model_kind(model), stacks(model)
        self._ends = FrozenPrefix(model, layers).ends
        self.seq2seq = kind == "encoder-decoder"
        # Of two stacks the first is the encoder's; where it is edited, the base's decoder has states of its own.
        self._final = [list(found[0][1])] if len(found) == 1 and not self.seq2seq else []
        self._forms: dict[nn.Module, Any] = {}  # of each stack's first block: what it gives beside its states
        self.why_not: str | None = None
        if not self._ends:
            self.why_not = "it has no blocks below its edited layers"
        elif len(found) > 1 + self.seq2seq:
            self.why_not = f"it has {len(found)} stacks of blocks"
        self._kept: KeptStates | None = None
        if directory is not None and not self.why_not:
            depths = [len(blocks) for blocks in self._ends]
            self._kept = KeptStates(directory, fingerprint(model, depths), disk_limit)

    @contextlib.contextmanager
    def replayed(self, batch: Batch, *, final: bool = False) -> Iterator[bool]:
        """A forward pass on ``batch`` within the block takes the frozen blocks' states from the cache.

        ``final``: and those of all other blocks, as the unedited model gives them; it serves models of one stack,
        and runs the blocks from the first edited one on of the others. Yields whether anything is replayed.
        """
        states = None if self.why_not else self._of(batch, final)
        if states is None:
            yield False
            return
        forwards: dict[nn.Module, Callable] = {}
        for blocks, kept in zip(self._stacks(final), states, strict=True):
            forwards |= self.replaying(blocks, kept)
        with replaced_forwards(forwards):
            yield True

    def serves(self, batch: Batch) -> bool:
        """Whether :meth:`replayed` replays anything; before anything is known, its first text is computed to see."""
        if not self.why_not and not self._forms:
            self.compute(self._texts(batch)[:1], bool(self._final))
        return self.why_not is None

    def clear(self) -> None:
        """Forget all states in memory, and count anew."""
        self._states.clear()
        self.asked = self.computed = self.read = self.forgot = self.held = self.runs = self.saved_runs = 0

    def flush(self) -> None:
        """Write what is in memory to disk too, where there is a directory: the next run starts with it."""
        if self._kept is not None:
            self._kept.put(self._states)

    def summary(self) -> str:
        """What the cache saved, in a sentence."""
        if self.why_not:
            return f"The frozen part was not cached: {self.why_not}."
        saved = self.asked - self.computed
        return (
            f"The frozen part of {saved:,} of {self.asked:,} texts came from the cache "
            f"({saved / max(1, self.asked):.0%}), and {self.saved_runs:,} of {self.runs:,} runs of a block on a text "
            f"were not needed ({self.saved_runs / max(1, self.runs):.0%}). It holds {self.held / 2**20:,.1f} MiB"
            + (f" in memory and {self._kept.held / 2**20:,.1f} MiB on disk." if self._kept is not None else ".")
        )

    def sizes(self, batch: Batch, *, final: bool = False) -> dict[bytes, int]:
        """The bytes that the states of a batch's texts take, by key: what :meth:`replayed` would keep for them."""
        if not self.serves(batch):
            return {}
        kept = next(iter(self._states.values()), None)
        if kept is None:  # dropped
            self.compute(self._texts(batch)[:1], False)
            kept = next(iter(self._states.values()))
        widths = [state.shape[1] * state.element_size() for state in kept]
        found: dict[bytes, int] = {}
        for text in self._texts(batch):
            for kind in {False, final and bool(self._final)}:
                lengths = self._lengths(text.inputs)
                found[self._key(text, kind)] = sum(n * width for n, width in zip(lengths, widths, strict=False))
        return found

    # -- states --------------------------------------------------------------------------------------------

    def _stacks(self, final: bool) -> list[list[nn.Module]]:
        return self._final if final and self._final else self._ends

    def _of(self, batch: Batch, final: bool) -> list[torch.Tensor] | None:
        """The states [B, S, width] of each stack's frozen blocks; None if the model or the batch can't be served."""
        if any(value.dim() != 2 for name, value in batch.items() if name != "labels"):
            return None
        texts = self._texts(batch)
        self.asked += 0 if final else len(texts)  # those are asked for again, without
        final = final and bool(self._final)
        if not self._forms:
            self.compute(texts[:1], final)
        keys = [self._key(text, final) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if self._found(key) is None}
        for together in self.groups(missing.values()):
            if not self.compute(together, final):
                return None
        stacks_ = self._stacks(final)
        blocks = sum(map(len, stacks_))
        run = sum(self._forms[blocks_[0]] is RUN for blocks_ in stacks_)  # to give what they give beside the states
        self.runs += len(texts) * blocks
        self.saved_runs += len(texts) * (blocks - run)
        rows = [self._states[key] for key in keys]
        self.shrink()
        columns = zip(zip(*rows, strict=True), self._lengths(batch), strict=False)  # no decoder, where none is frozen
        return [_stacked(parts, length) for parts, length in columns]

    def _lengths(self, batch: Batch) -> list[int]:
        """How long the samples are: in the encoder and the decoder, or in the one stack."""
        length = batch["input_ids"].shape[1]
        return [length, batch.get("decoder_input_ids", batch.get("labels")).shape[1]] if self.seq2seq else [length]

    def _texts(self, batch: Batch) -> list[Text]:
        inputs = {name: value.cpu() for name, value in batch.items() if name != "labels" or self.seq2seq}
        whole = torch.full((len(inputs["input_ids"]),), inputs["input_ids"].shape[1])
        ends = _ends(inputs["attention_mask"] != 0) if "attention_mask" in inputs else whole
        decoder_ends = None
        if "decoder_attention_mask" in inputs:
            decoder_ends = _ends(inputs["decoder_attention_mask"] != 0)
        elif "labels" in inputs and "decoder_input_ids" not in inputs:
            decoder_ends = _ends(inputs["labels"] != IGNORE)
        texts = []
        for i, end in enumerate(ends.tolist()):
            own: dict[str, torch.Tensor] = {}
            digest = hashlib.blake2b(digest_size=16)
            for name, value in sorted(inputs.items()):
                decoders = name == "labels" or name.startswith("decoder_")
                stop = end if not decoders else value.shape[1] if decoder_ends is None else int(decoder_ends[i])
                own[name] = value[i : i + 1, :stop]
                digest.update(f"{name}:{stop};".encode())
                digest.update(own[name].long().contiguous().numpy())
            texts.append(Text(digest.digest(), own))
        return texts

    @staticmethod
    def _key(text: Text, final: bool) -> bytes:
        return text.key + b"f" * final

    def groups(self, texts: Iterable[Text]) -> Iterator[list[Text]]:
        """Texts to compute together: of one padded shape, at most :data:`TOGETHER` tokens."""
        alike: dict[tuple, list[Text]] = {}
        for text in texts:
            alike.setdefault(tuple(_padded(text.inputs).items()), []).append(text)
        for shape, group in alike.items():
            count = max(1, TOGETHER // max(length for _, length in shape))
            yield from (group[i : i + count] for i in range(0, len(group), count))

    @torch.no_grad()
    def compute(self, texts: list[Text], final: bool) -> bool:
        """Keep the states of texts of one padded shape; with ``final`` both kinds of them. Whether it could."""
        wanted = [self._ends, self._final] if final else [self._ends]
        edges = {block for stacks_ in wanted for blocks in stacks_ for block in (blocks[0], blocks[-1])}
        last = wanted[-1][-1][-1]
        seen: dict[nn.Module, Any] = {}

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            seen[module] = output
            if module is last:
                raise _Enough

        handles = [block.register_forward_hook(keep) for block in edges]
        try:
            # not packed: rows of other counts have other bits
            with torch.inference_mode(False), torch.no_grad(), packing(False), frozen(self.model), suppress(_Enough):
                batch = together([text.inputs for text in texts])
                kept_rows(self.model, to_device(batch, execution_device(self.model.get_input_embeddings())))
        finally:
            for handle in handles:
                handle.remove()
        lengths = [self._lengths(text.inputs) for text in texts]
        for kept, ends in zip((False, True), wanted, strict=False):
            states = [self._read(blocks, seen, len(texts)) for blocks in ends]
            if self.why_not:
                log.info("%s runs whole in training: %s", type(self.model).__name__, self.why_not)
                return False
            for i, text in enumerate(texts):
                own = [
                    part[i, :n].cpu().clone() for part, n in zip(states, lengths[i], strict=False) if part is not None
                ]
                self._keep(self._key(text, kept), own)
        self.computed += len(texts)
        self.saved_runs -= len(texts) * sum(map(len, wanted[-1]))
        return True

    # -- for :mod:`mendfast.training.prefill` ---------------------------------------------------------------

    @property
    def one_stack(self) -> bool:
        """Whether states can be computed block by block."""
        return len(self._ends) == 1 and not self.seq2seq

    def blocks(self, final: bool) -> list[nn.Module]:
        """Of the one stack: the frozen blocks, or ``final`` all of them."""
        return self._stacks(final)[0]

    def missing(self, batch: Batch, final: bool) -> list[Text]:
        """The texts of a batch that would be computed."""
        final = final and bool(self._final)
        return [text for text in self._texts(batch) if self._found(self._key(text, final)) is None]

    def keep(self, texts: Sequence[Text], states: torch.Tensor, *, final: bool) -> None:
        """Keep the states [B, length, width] of texts of one padded shape."""
        for text, own in zip(texts, states, strict=True):
            self._keep(self._key(text, final), [own[: text.inputs["input_ids"].shape[1]].cpu().clone()])
        below = len(self._ends[0])
        self.computed += 0 if final else len(texts)
        self.saved_runs -= len(texts) * (len(self.blocks(True)) - below if final else below)

    def _read(self, blocks: list[nn.Module], seen: Mapping[nn.Module, Any], count: int) -> torch.Tensor | None:
        """The states [B, length, width] that a stack's last frozen block gave, its form noted."""
        outputs = [seen.get(blocks[0]), seen.get(blocks[-1])]
        bare = isinstance(outputs[1], torch.Tensor)
        states = outputs[1] if bare or not outputs[1] else outputs[1][0]
        if not isinstance(states, torch.Tensor) or states.dim() != 3 or len(states) != count:
            self.why_not = "its blocks give something else than hidden states [batch, tokens, width]"
            return None
        tails = [None, None] if bare else [tuple(output[1:]) for output in outputs]
        self._forms[blocks[0]] = tails[1]
        if not bare and any(part is not None for tail in tails for part in tail):
            self._forms[blocks[0]] = RUN
            if not all(_same(*pair) for pair in zip(*tails, strict=True)):
                self.why_not = "what its blocks give beside the hidden states differs from block to block"
                return None
        return states.detach()

    def _found(self, key: bytes) -> list[torch.Tensor] | None:
        if key in self._states:
            self._states.move_to_end(key)
        elif self._kept is not None and (found := self._kept.get(key)) is not None:
            self._keep(key, found)
            self.read += 1
        return self._states.get(key)

    def _keep(self, key: bytes, states: list[torch.Tensor]) -> None:
        self._drop(key)
        self._states[key] = states
        self.held += bytes_of(states)

    def _drop(self, key: bytes) -> None:
        self.held -= bytes_of(self._states.pop(key, ()))

    def shrink(self) -> None:
        """Forget, or write to disk, what is beyond the limit."""
        if self.held <= self.limit:
            return
        # Where they are written, many in one file.
        bound = self.limit if self._kept is None else self.limit // 4 * 3
        dropped: dict[bytes, list[torch.Tensor]] = {}
        while self.held > bound:
            key = next(iter(self._states))
            dropped[key] = self._states[key]
            self._drop(key)
        if self._kept is not None:
            self._kept.put(dropped)
        else:
            self.forgot += len(dropped)

    def replaying(self, blocks: list[nn.Module], states: torch.Tensor) -> dict[nn.Module, Callable]:
        """Forwards that give ``states`` in the form that the blocks give theirs."""
        first = blocks[0]
        given: list[Any] = []
        forward, form = first.forward, self._forms[first]

        def begin(*args: Any, **kwargs: Any) -> Any:
            given_in = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
            placed = states.to(given_in[0].device)
            tail = forward(*args, **kwargs)[1:] if form is RUN else form
            given[:] = [placed if tail is None else (placed, *tail)]
            return given[0]

        return {first: begin, **{block: lambda *_, **__: given[0] for block in blocks[1:]}}


def _stacked(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """[length_i, width] -> [B, length, width], zeros at the end."""
    out = parts[0].new_zeros(len(parts), length, parts[0].shape[1])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


def _padded(inputs: Batch) -> dict[str, int]:
    """How long each input of a text [1, length] is in a batch: without a mask as long as it is."""
    multiple = MULTIPLE if "attention_mask" in inputs else 1
    return {name: -(-value.shape[1] // multiple) * multiple for name, value in inputs.items()}


def together(texts: Sequence[Batch]) -> Batch:
    """Texts [1, length_i] of one padded shape as one batch [B, length]."""
    batch: Batch = {}
    for name, length in _padded(texts[0]).items():
        batch[name] = texts[0][name].new_full((len(texts), length), IGNORE if name == "labels" else 0)
        for row, text in zip(batch[name], texts, strict=True):
            row[: text[name].shape[1]] = text[name][0]
    return batch


def _ends(kept: torch.Tensor) -> torch.Tensor:
    """One past the last kept position of each row (of an empty row 1): [B, S] bool -> [B]."""
    return (kept * torch.arange(1, kept.shape[1] + 1)).amax(1).clamp(min=1)


def _same(a: object, b: object) -> bool:
    return a is b or isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
