"""EditMemory: many edits of one model kept as one, added and taken out in any order. docs/memory.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .aggregate import Wanted
from .capture import Factors, without_edits
from .edit import Edit
from .editor import EDITS_PER_PASS, MendEditor
from .fingerprint import fingerprint_of
from .hub import About, OnHub
from .key_sums import KeySums
from .ledger import ledger_of
from .locks import exclusive
from .memory_file import (
    Identity,
    Journal,
    Record,
    check_same,
    checksum_of,
    journal_of,
    key_of,
    read,
    read_journal,
    read_requests,
    write,
)
from .ops.least_squares import metric_matrix, solve_normal, sums_serve
from .record_rows import Maker
from .requests import EditRequest, as_requests
from .schema import shown, some
from .updates import checksum
from .wide import widening

__all__ = ["EditMemory", "read_requests", "update_file"]

_LONG = 32  # edits; a bar is shown for more
_LEAST_PREFIX = 4
# Of the configuration, what an edit's rows depend on.
_SETTINGS = (
    "layers", "aggregation", "loss_reduction", "step_size", "shared", "normalize", "identity_init", "sides",
    "prompt_template", "separator", "append_eos", "chat",
)  # fmt: skip


class EditMemory(OnHub):
    """Many edits of one model, kept as one.

    Each edit's record is its request and its rows (u, d) of every layer, made on the unedited model, so that it
    depends on no other edit: whatever the order in which they came, the same records give the same edit, and what is
    removed leaves nothing behind. The rows lie in ordinary memory; where a layer has many of them for its size, what
    the solution needs of them is their sums (docs/ops/least_squares.md, equation 6), so that neither :meth:`edit` nor
    what it returns grows any further.

    Args:
        editor: a trained editor in eval mode; it may go on to protect more, not to be trained on.
    """

    hub_file = "memory.safetensors"

    def __init__(self, editor: MendEditor):
        if not isinstance(editor, MendEditor):
            raise TypeError(f"EditMemory takes a MendEditor; got {shown(editor)}.")
        self.editor = editor
        self._records: dict[str, Record] = {}
        self._sums: dict[str, KeySums] = {}
        self._handle = object()  # what the ledger knows it by
        self._identified: tuple[tuple, Identity] | None = None
        self._solved: tuple[tuple, Edit] | None = None
        self._version = 0
        self._file: tuple[Path, str, int] | None = None  # the file, its checksum, and the version that it holds

    # -- what it holds -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __repr__(self) -> str:
        return f"EditMemory({len(self)} edits, {self.num_bytes():,} bytes)"

    @property
    def model(self) -> nn.Module:
        return self.editor.model

    @property
    def requests(self) -> list[EditRequest]:
        """In the order of adding."""
        return [record.request for record in self._records.values()]

    def keys(self) -> list[str]:
        """The records' names, in the order of adding: of each prompt the same, everywhere and always."""
        return list(self._records)

    def num_bytes(self) -> int:
        """Of the records' rows."""
        sides = (side for record in self._records.values() for pair in record.rows.values() for side in pair)
        return sum(side.numel() * side.element_size() for side in sides)

    def find(self, name: str) -> str:
        """The key that ``name`` means: a key, the beginning of one that no other has, or a prompt.

        Raises:
            ValueError: there is none, or more than one.
        """
        if not isinstance(name, str):
            raise TypeError(f"A key is a str, as memory.keys() lists them; got {shown(name)}.")
        if name in self._records:
            return name
        if (key := key_of(name)) in self._records:
            return key
        found = [key for key in self._records if len(name) >= _LEAST_PREFIX and key.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{shown(name)} is the beginning of several keys: {some(found)}. Write more of it.")
        has = f"{len(self)} of them, such as {some(self._records, 3)}" if self._records else "none"
        raise ValueError(f"The memory has no key {shown(name)}; it has {has}. memory.keys() lists them.")

    # -- adding, removing ----------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def add(
        self,
        prompt: Any,
        target: str | None = None,
        *,
        save_to: str | Path | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> list[str]:
        """Keep edits, one or many; all of them, or none where one is wrong.

        A prompt that the memory has already gets its new target, in its old place; with the target that it has, nothing
        is to be done. Of a prompt that is there twice the last target counts. Edits that are applied or attached to the
        model don't matter: they are taken out for as long as this takes.

        Args:
            prompt: as :meth:`mendfast.MendEditor.edit` takes it (:func:`mendfast.requests.as_requests`).
            target: likewise.
            save_to: keep the memory in this file. What is made is on the disk after each pass, in a journal beside the
                file, and the same call after a crash or an interrupt goes on from there (a new process begins with
                :meth:`open`).
            batch_size: edits that go through the model at a time; None: as many as have
                :data:`mendfast.record_rows.TOKENS_PER_PASS` tokens.
            progress: True shows a bar, None where there are many edits and a terminal.

        Returns:
            The key of each request.

        Raises:
            ValueError, TypeError: names the request that is wrong by its place in the list, counted from 0.
        """
        requests = as_requests(prompt, target)
        if not requests:
            raise ValueError("add was given no requests; pass at least one.")
        if self.editor.training:
            raise ValueError("The editor is in train mode, where edits move its statistics: call editor.eval().")
        keys = [key_of(request.prompt) for request in requests]
        places = {key: i for i, key in enumerate(keys)}
        todo = {key: requests[i] for key, i in places.items()}
        todo = {key: r for key, r in todo.items() if key not in self._records or self._records[key].request != r}
        identity = self._identity()
        for key, request in todo.items():
            self._check(request, places[key])
        with exclusive(self.model):
            made: dict[str, Record] = {}
            journal = None
            if save_to is not None:
                base = self._continued(save_to)
                made = {key_of(r.request.prompt): r for r, other in read_journal(save_to, base) if other == identity}
                made = {key: record for key, record in made.items() if todo.get(key) == record.request}
                journal = Journal(save_to, base, list(made.values()), identity) if todo else None
            try:
                self._make(todo, made, places, batch_size, progress, journal)
            except (ValueError, TypeError):
                if journal is not None:
                    journal.discard()
                raise
            finally:
                if journal is not None:
                    journal.close()
            self._take({key: made[key] for key in todo})
            if save_to is not None:
                self.save(save_to)
        return keys

    def remove(self, *keys: str) -> None:
        """Forget these edits, all or none; see :meth:`find` for what a key may be.

        Where the memory is applied, the weights follow with the next :meth:`apply_`.
        """
        gone = {self.find(key) for key in keys}
        with exclusive(self.model):
            self._records = {key: record for key, record in self._records.items() if key not in gone}
            self._version += 1

    def merge(self, other: EditMemory) -> EditMemory:
        """Keep what ``other`` keeps too; of a prompt that both have, its target counts."""
        if not isinstance(other, EditMemory):
            raise TypeError(f"merge takes an EditMemory; got {shown(other)}.")
        check_same(self._identity(), other._identity(), "The other memory")
        self._take(dict(other._records))
        return self

    def _take(self, records: Mapping[str, Record]) -> None:
        """All at once: a dictionary keeps the place of a key that it has."""
        self._records = {**self._records, **records}
        self._version += 1

    def _make(
        self,
        todo: Mapping[str, EditRequest],
        made: dict[str, Record],
        places: Mapping[str, int],
        batch_size: int | None,
        progress: bool | None,
        journal: Journal | None,
    ) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size is {shown(batch_size)}; it must be a whole number from 1.")
        left = [key for key in todo if key not in made]
        if not left:
            return
        hidden = not progress if progress is not None else True if len(left) <= _LONG else None
        bar = tqdm(total=len(left), desc="adding", unit="edit", disable=hidden)
        with without_edits(self.model), widening(self.model), bar:
            maker = Maker(self.editor, [todo[key] for key in left])
            for keys in maker.passes({key: todo[key] for key in left}, batch_size):
                records = self._records_of([todo[key] for key in keys], [places[key] for key in keys], maker)
                made.update(zip(keys, records, strict=True))
                if journal is not None:
                    journal.write(records)
                bar.update(len(keys))

    def _check(self, request: EditRequest, place: int) -> None:
        """A ValueError where the model can't learn it."""
        try:
            self.editor.check(self.editor.tokenize_edits([request]))
        except ValueError as error:
            raise ValueError(f"{_named(request, place)}: {error}") from error

    def _records_of(self, requests: Sequence[EditRequest], places: Sequence[int], maker: Maker) -> list[Record]:
        try:
            rows = maker.rows_of(requests)
        except ValueError as error:
            if len(requests) > 1:  # which one is it?
                for request, place in zip(requests, places, strict=True):
                    self._records_of([request], [place], maker)
                raise
            raise ValueError(f"{_named(requests[0], places[0])}: {error}") from error
        return [Record(request, part) for request, part in zip(requests, rows, strict=True)]

    def _identity(self) -> Identity:
        """Whose the records are; a ValueError where the editor is not the one that made those which are there."""
        own = self.editor.state_dict(keep_vars=True)
        own = {name: tensor for name, tensor in own.items() if name not in ("log_lambda", "log_mu")}
        given = [getattr(self.editor.config, name) for name in _SETTINGS]
        younger = {"forms": None, "rows": "all", "longest": None}  # than the first memories, which had these
        given += [value for name, usual in younger.items() if (value := getattr(self.editor.config, name)) != usual]
        settings = json.dumps(given)
        # counters that every write to a tensor moves on: to read an editor takes as long as an edit
        state = (settings, *((id(tensor), tensor._version) for tensor in own.values()))
        if self._identified is not None and self._identified[0] == state:
            return self._identified[1]
        parts = [[name, str(t.dtype), list(t.shape), int(checksum(t))] for name, t in sorted(own.items())]
        digest = hashlib.sha256(json.dumps([settings, parts]).encode()).hexdigest()
        weights = {layer.name: layer.shape for layer in self.editor.layers}
        found = Identity(self.model.config.model_type, digest, self.editor.config.aggregation, weights)
        if self._identified is not None and self._records:
            check_same(found, self._identified[1], "This memory")
        self._identified = state, found
        return found

    # -- as one edit ---------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def edit(self) -> Edit:
        """All records as one :class:`Edit`, whatever the order in which they were added; of none, one that changes
        nothing. Made again when the records or the editor's metric have changed."""
        with exclusive(self.model):
            solving = bool(self._records) and self.editor.config.aggregation == "least_squares"
            metrics = self.editor.layer_metrics() if solving else {}
            state = (self._version, *(self._metric_state() if solving else ()))
            if self._solved is not None and self._solved[0] == state:
                return self._solved[1]
            factors: dict[str, Factors] = {}
            rows: dict[str, Wanted] = {}
            rounds = self.editor.config.rounds if solving else 0
            # by key, so that not even rounding depends on the order of adding
            records = [self._records[key] for key in sorted(self._records)]
            for layer in self.editor.layers if records else ():
                pairs = [record.rows[layer.name] for record in records]
                counts = torch.tensor([len(u) for u, _ in pairs])
                if solving and not rounds and sums_serve(int(counts.sum()), layer.m, layer.n):
                    factors[layer.name] = self._from_sums(layer.name, layer.m, layer.n, metrics[layer.name])
                    continue
                self._sums.pop(layer.name, None)
                u, d = (torch.cat(side).to(self.editor.device) for side in zip(*pairs, strict=True))
                rows[layer.name] = Wanted(u, d, torch.arange(len(pairs)).repeat_interleave(counts))
            if rounds:
                factors = self._balanced(rows, [record.request for record in records])
            else:
                factors |= self.editor.change(rows) if solving else {name: (w.u, -w.d, 1.0) for name, w in rows.items()}
            factors = {layer.name: factors[layer.name] for layer in self.editor.layers if layer.name in factors}
            base = fingerprint_of(self.model, self.editor.layers)
            edit = Edit(factors, self.model.config.model_type, self.requests, base)
            self._solved = state, edit
            return edit

    def _balanced(self, rows: Mapping[str, Wanted], requests: Sequence[EditRequest]) -> dict[str, Factors]:
        """In rounds of weighing, on the unedited model."""
        parts = [requests[i : i + EDITS_PER_PASS] for i in range(0, len(requests), EDITS_PER_PASS)]
        batches = [self.editor.tokenize_edits(part) for part in parts]
        with without_edits(self.model):
            progress = None if len(requests) > _LONG else False
            return self.editor.balanced(rows, batches, len(self.editor.forms), progress)

    def _from_sums(self, name: str, m: int, n: int, metric: tuple) -> tuple[torch.Tensor, torch.Tensor, float]:
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = KeySums(m, n, self.editor.device)
        rows = {key: record.rows[name] for key, record in self._records.items()}
        sums.follow(rows, lambda: metric_matrix(*metric, self.editor.dense_moment(name)), self._metric_state())
        change = solve_normal(sums.gram, sums.cross).float()  # S^T
        # as few rows as the smaller side of the weight has
        sides = (torch.eye(m, device=change.device), -change) if m <= n else (-change.T, torch.eye(n).to(change.device))
        return *(side.contiguous() for side in sides), 1.0

    def _metric_state(self) -> tuple:
        """What the solution depends on beside the records."""
        editor = self.editor
        if editor.config.aggregation != "least_squares":
            return ()
        config = editor.config
        learned = *editor.log_lambda.tolist(), *editor.log_mu.tolist()
        enough = config.rounds_enough, config.rounds_enough_beside
        return id(editor.metric), editor.metric.tokens, *learned, config.rounds, config.rounds_protection, *enough

    @contextlib.contextmanager
    def attached(self) -> Iterator[nn.Module]:
        """Within the block the editor's model answers as edited, its weights untouched; see :meth:`Edit.attached`."""
        if self.is_applied:
            raise ValueError("This memory is applied to the model already; attached too, it would count twice.")
        with self.edit().attached(self.model) as model:
            yield model

    @property
    def is_applied(self) -> bool:
        """Whether the weights hold this memory, as it was at the last :meth:`apply_`."""
        return ledger_of(self.model).holds(self._handle)

    def apply_(self, *, backup: str = "cpu", rounding: str = "nearest", seed: int = 0) -> EditMemory:
        """Write the memory into the model's weights: base + memory, and other edits that are applied.

        Applied already, the weights are brought up to date in one change, never holding neither. An empty memory
        leaves them without. Arguments and errors as of :meth:`Edit.apply_`.
        """
        with exclusive(self.model):
            ledger_of(self.model).replace(
                self._handle, self.edit().factors, backup=backup, rounding=rounding, seed=seed, again=False
            )
        return self

    def revert_(self) -> EditMemory:
        """Take the memory out of the weights again, bit for bit; see :meth:`Edit.revert_`."""
        with exclusive(self.model):
            if self.is_applied:
                ledger_of(self.model).revert([self._handle])
            elif self._records:
                raise ValueError("This memory is not applied to the model, so there is nothing to revert.")
        return self

    # -- on disk -------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of the records; whole, or not at all. The editor is not in it."""
        found = write(path, list(self._records.values()), self._identity())
        self._file = Path(path).absolute(), found, self._version

    @classmethod
    def load(cls, path: str | Path, editor: MendEditor) -> EditMemory:
        """Read what :meth:`save` wrote, and what an :meth:`add` that didn't come to its end has left beside it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no memory, a damaged one, or that of another editor or model.
        """
        memory = cls(editor)
        records, identity, found, more = read(path)
        if identity is not None:
            check_same(memory._identity(), identity, str(path))
        memory._records = {key_of(record.request.prompt): record for record in records}
        memory._file = Path(path).absolute(), found, -1 if more else memory._version
        return memory

    @classmethod
    def open(cls, path: str | Path, editor: MendEditor) -> EditMemory:
        """The memory in ``path``, or an empty one where there is none yet."""
        return cls.load(path, editor) if Path(path).is_file() or journal_of(path).is_file() else cls(editor)

    def _save_in(self, directory: Path) -> None:  # not save(): the file that this memory goes on in stays the same
        write(directory / self.hub_file, list(self._records.values()), self._identity())

    def _about(self) -> About:
        return self.editor._about().of_memory(self.requests)

    def _continued(self, path: str | Path) -> str:
        """The checksum of the file at ``path``, which holds this memory as it is now."""
        there = checksum_of(path)
        known = self._file is not None and self._file[0] == Path(path).absolute() and self._file[1] == there
        if not known and (there or journal_of(path).is_file()):
            raise ValueError(
                f"{path} holds a memory already, and not what this one was read from or saved as; begin with "
                f"EditMemory.open({str(path)!r}, editor), or choose another file."
            )
        if known and self._file[2] == self._version:
            return there
        if self._records or known:
            self.save(path)
            return self._file[1]
        self._file = Path(path).absolute(), "", self._version
        return ""


def update_file(
    path: str | Path, editor: MendEditor, requests: Any = (), remove: Iterable[str] = (),
    *, progress: bool | None = None,
) -> EditMemory:  # fmt: skip
    """Add to the memory in a file, which need not exist yet, and remove from it: ``mendfast edit --memory FILE``.

    The file is as it was where a key is unknown or a request is wrong.
    """
    memory = EditMemory.open(path, editor)
    gone = [memory.find(key) for key in remove]
    requests = as_requests(requests)
    if requests:
        memory.add(requests, save_to=path, progress=progress)
    new = {key_of(request.prompt) for request in requests}
    if gone := [key for key in gone if key not in new]:
        memory.remove(*gone)
    if gone or not requests:
        memory.save(path)
    return memory


def _named(request: EditRequest, place: int) -> str:
    return f"Request {place}, {shown(request.prompt)}"
