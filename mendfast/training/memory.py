"""How much memory training takes: predicted from a pass over one and two edits, and the peak when it is over."""

from __future__ import annotations

import contextlib
import itertools
import sys
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..editor import MendEditor
from ..objective import Batch, model_kind
from .cache import PrefixCache
from .config import TrainConfig
from .data import Draw
from .meta import editor_loss

DRAWS, TOKENISED = 2000, 2000


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own elements; of a packed or sharded one, those of the parts that lie here."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor_bytes(tensor) for tensor in tensors)


class LivePeak(TorchDispatchMode):
    """Within the context, the bytes that operations have made and that are still referred to: ``now``, ``peak``.

    Storages of ``known`` tensors are not counted. What an operation allocates and frees inside is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def predict(
    editor: MendEditor, batches: tuple[Batch, Batch, Batch], *, joint: int = 1, **options: Any
) -> dict[str, int]:
    """Bytes that training holds at most, by kind, and their "total".

    "base" and "editor" (with its statistics), "gradients" and "adam" follow from shapes. "logits" are the base
    and edited logits with their gradients. "activations" is what remains of the peak of a meta-training step,
    which is measured on one and on two of the edits (or groups of ``joint``) and goes on in a straight line: a
    process's own libraries, an allocator's gaps and the workspace inside operations come on top.

    Args:
        batches: inner, outer and locality examples of all edits that go through the model at once.
        joint, options: as :func:`~mendfast.training.meta.editor_loss` takes them.
    """
    model, parameters = editor.model, list(editor.parameters())
    groups = len(batches[0]["input_ids"]) // joint
    gradients = _bytes(parameters)
    options = {"joint": joint, "pack": False, **options}  # at most: with all padding
    one = _step_peak(editor, batches, 1 / groups, options)
    two = _step_peak(editor, batches, 2 / groups, options) if groups > 1 else one
    logits = _logit_bytes(model, *batches[1:])
    result = {
        "base": _bytes(model.parameters()) + _bytes(model.buffers()),
        "editor": _bytes(editor.state_dict().values()),
        "gradients": gradients,
        # two moments like each parameter, and a float32 count of steps for each
        "adam": 2 * gradients + 4 * len(parameters),
        "logits": logits,
        "activations": max(0, one + (groups - 1) * (two - one) - gradients - logits),
    }
    return {**result, "total": sum(result.values())}


def _step_peak(editor: MendEditor, batches: tuple[Batch, ...], part: float, options: Mapping[str, Any]) -> int:
    some = [{name: value[: round(part * len(value))] for name, value in batch.items()} for batch in batches]
    own = [*editor.model.parameters(), *editor.model.buffers(), *editor.state_dict().values()]
    training = editor.training
    editor.eval()  # statistics stay
    try:
        with LivePeak(own) as live:
            editor_loss(editor, *some, **options)[0].backward()
        return live.peak
    finally:
        editor.train(training)
        editor.zero_grad(set_to_none=True)


def _logit_bytes(model: torch.nn.Module, outer: Batch, loc: Batch) -> int:
    """Twice the rows that the edit loss reads and three times those of locality, whose base logits stay too."""
    if model_kind(model) == "classifier":
        return 0
    kept = loc["attention_mask"] != 0 if model_kind(model) == "causal" else loc["labels"] != -100
    rows = 2 * int((outer["labels"] != -100).sum()) + 3 * int(kept.sum())
    head = model.get_output_embeddings().weight
    return rows * model.config.vocab_size * max(2, head.element_size())


def predict_cache(editor: MendEditor, draws: Iterable[Draw], steps: int, config: TrainConfig) -> dict[str, int]:
    """What the cache of the frozen part will have seen and hold at the end of a run, at most: its "texts", the "bytes"
    of all of them, those "in memory" and those "on disk".

    The draws are those that the run will ask for. Of more than :data:`DRAWS` of ``steps`` the rest is taken to have as
    many new texts each as the later half, which it won't exceed, since texts come back more and more. More than
    :data:`TOKENISED` texts are taken to be as long as so many of them, evenly chosen, are on average.
    """
    cache = PrefixCache(editor.model, editor.layers, config.cache_bytes)
    seen: list[dict[tuple, None]] = [{}, {}]  # inner and outer, and locality, whose base's states are kept too
    counts: list[tuple[int, ...]] = [(0, 0)]
    for draw in itertools.islice(draws, DRAWS):
        for texts, pairs in zip(seen, ([*editor.in_forms(draw.inner), *draw.outer], draw.loc), strict=True):
            texts.update(dict.fromkeys(pairs))
        counts.append(tuple(map(len, seen)))
    total, number = 0, 0
    for side, texts in enumerate(map(list, seen)):
        chosen = texts[:: -(-len(texts) // TOKENISED) or 1]
        sizes: dict[bytes, int] = {}
        for pair in chosen:
            sizes |= cache.sizes(editor.tokenize([pair]), final=side == 1)
        done, half = len(counts) - 1, (len(counts) - 1) // 2
        more = max(0, steps - done) * (counts[-1][side] - counts[half][side]) / max(1, done - half)
        all_texts = len(texts) + round(more)
        total += round(sum(sizes.values()) / max(1, len(chosen)) * all_texts)
        number += all_texts
    if cache.why_not:
        total = 0
    return {
        "texts": number,
        "bytes": total,
        "in memory": min(total, config.cache_bytes),
        "on disk": min(total, config.cache_disk_bytes),
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that was allocated on a GPU since :func:`reset_peak`; of a CPU, the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """Measures, as a context, the bytes held at the peak beyond those held on entering.

    On a GPU they are PyTorch's; on a CPU the growth of the resident set (Linux), which memory that the allocator
    had kept back does not show in: of many edits the largest counts. ``bytes`` is None where neither is known.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._start = resident("VmRSS")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self._start is not None:
            self.bytes = max(0, resident("VmHWM") - self._start)


def resident(name: str) -> int | None:
    """Bytes of this process by a name of Linux' /proc/self/status, as VmRSS; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
