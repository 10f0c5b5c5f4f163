"""One row of the benchmarks: contestants on the same data, checked against each other, then timed in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import machine
from .shapes import Shape

OURS = "mendfast"
SECONDS = {"cpu": 0.6, "cuda": 1.0}
"""Spent on one row by all its contestants together, more only where MIN_ROUNDS take longer."""
MIN_ROUNDS, MIN_ROUNDS_OF_SLOW, MAX_ROUNDS, MAX_SETS = 7, 3, 200, 256
SLOW = 2.0
"""Seconds of a round of all contestants from which on it is slow."""
QUICK_AMOUNT = 9
AHEAD = 8_000_000
"""Cycles that a GPU waits before a queued call, some 4 ms, so that the host's share of the call is over when it starts:
up to 3 ms for a backward pass of a few kernels."""


class Contestant(NamedTuple):
    """``run(prepare(data))`` is timed, the run alone; ``finish`` takes the state that prepare returned."""

    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda data: data
    finish: Callable[[Any], Any] = lambda state: None


class Work(NamedTuple):
    """What no implementation can do without."""

    bytes: int
    operations: int
    dtype: str = "float32"


def compiled(function: Callable) -> Callable:
    """torch.compile of a function, each contest its own."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes allocated at the peak of a call above its start.

    On a GPU by the caching allocator's own count; on a CPU from the profiler's record of every allocation and
    release of PyTorch's CPU allocator (libraries' own scratch memory is in neither).
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(records, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def relative_error(out: Any, expected: Any) -> float:
    """max over tensors of ||out - expected|| / ||expected||."""
    if isinstance(out, torch.Tensor):
        out, expected = [out], [expected]
    worst = 0.0
    for a, b in zip(out, expected, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def _copies(values: Any) -> Any:
    return values.clone() if isinstance(values, torch.Tensor) else [value.clone() for value in values]


class Contest:
    """What the benchmarks get as the fixture ``contest``; one call makes one row."""

    def __init__(self, benchmark: Any, question: str, rows: list[dict], quick: bool):
        self._benchmark, self._question, self._rows, self.quick = benchmark, question, rows, quick
        self.device = machine.device()
        self.on_gpu = self.device.type == "cuda"

    def size(self, shape: Shape) -> Shape:
        return shape.small() if self.quick else shape

    def amount(self, size: int) -> int:
        """Rows, edits, tokens."""
        return min(size, QUICK_AMOUNT) if self.quick else size

    def __call__(
        self,
        row: Mapping[str, Any],
        data: Callable[[int], Any],
        contestants: Mapping[str, Contestant | Callable],
        *,
        work: Work | None = None,
        reference: str | None = "reference",
        tolerance: float = 1e-4,
        queued: bool = False,
        memory: bool = True,
        units: int = 1,
        **more: Any,
    ) -> None:
        """Check every contestant against ``reference``, then time all of them in turns.

        Args:
            row: what tells this row from the question's others: the shape's name, rows, edits, ...
            data: seed -> one set of inputs. As many sets as go past the cache four times are made and rotated.
            contestants: by name, mendfast's first. One that runs out of memory or can't be compiled is
                reported as that.
            work: what the floor is counted from; None where a floor makes no sense.
            reference: the contestant whose outputs the others must equal, relative to their norm; None where
                the caller has checked.
            queued: time a GPU's work alone, the host running ahead; otherwise all that the caller waits for.
            memory: measure the peak too; False for what runs in another process.
            units: how many edits a call makes, for rates.
        """
        field = {
            name: c if isinstance(c, Contestant) else Contestant(c) for name, c in contestants.items()
        }
        assert next(iter(field)) == OURS, "mendfast's own contestant comes first"
        failed = {} if reference is None else self._check(field, data, reference, tolerance)
        bytes_moved = work.bytes if work else 0
        sets = 1
        if not self.quick and bytes_moved:
            sets = min(MAX_SETS, math.ceil(4 * machine.cache_bytes() / bytes_moved))
        pool = [data(seed) for seed in range(sets)]
        # apart from each other, so that none finds in the cache what another has just read
        turns = {name: i * sets // len(field) for i, name in enumerate(field)}

        def draw(name: str) -> Any:
            turns[name] += 1
            return pool[turns[name] % sets]

        def once(name: str, queue: bool = False) -> float:
            state = field[name].prepare(draw(name))
            seconds = self._seconds(field[name].run, state, queue)
            field[name].finish(state)
            return seconds

        def peak(name: str) -> int:
            state = field[name].prepare(draw(name))
            taken = peak_bytes(lambda: field[name].run(state))
            field[name].finish(state)
            return taken

        cost, peaks = 0.0, {}
        if not self.quick:
            machine.measure_ceilings()
        for name in [] if self.quick else [name for name in field if name not in failed]:
            try:
                start = time.perf_counter()
                if memory:
                    peaks[name] = {"peak_bytes": peak(name)}  # a warm-up too: allocations, threads, compilation
                first = time.perf_counter() - start
                if memory and self.on_gpu:  # without what only a first call takes
                    peaks[name] = {"peak_bytes": peak(name)}
                cost += once(name) if first < SECONDS[self.device.type] or self.on_gpu else first
            except _expected() as error:
                self._excuse(failed, name, error)
        racing = [name for name in field if name not in failed]
        least = MIN_ROUNDS if cost < SLOW else MIN_ROUNDS_OF_SLOW
        rounds = 1 if self.quick else int(min(MAX_ROUNDS, max(least, SECONDS[self.device.type] / cost)))
        times: dict[str, list[float]] = {name: [] for name in racing}

        def setup() -> tuple:
            for name in racing[1:]:
                times[name].append(once(name))
            return (field[OURS].prepare(draw(OURS)),), {}

        def target(state: Any) -> Any:
            times[OURS].append(self._seconds(field[OURS].run, state))
            return state

        last = self._benchmark.pedantic(target, setup=setup, teardown=field[OURS].finish, rounds=rounds)
        if self.quick:
            field[OURS].finish(last)  # pytest-benchmark does not, where it only runs and times nothing
            return
        walls = times
        if queued and self.on_gpu:
            times = {name: [] for name in racing}
            for _ in range(rounds):
                for name in racing:
                    times[name].append(once(name, True))
        figures: dict[str, dict] = {name: {"error": reason} for name, reason in failed.items()}
        for name in racing:
            figures[name] = _figures(times[name], walls[name]) | peaks.get(name, {})
        self._record(row, work, figures, units, more)

    def _check(self, field: dict, data: Callable, reference: str, tolerance: float) -> dict[str, str]:
        def outputs(name: str) -> Any:
            state = field[name].prepare(data(0))
            result = _copies(field[name].run(state))
            field[name].finish(state)
            return result

        expected, failed = outputs(reference), {}
        for name in field:
            if name == reference:
                continue
            try:
                error = relative_error(outputs(name), expected)
            except _expected() as reason:
                self._excuse(failed, name, reason)
                continue
            assert error <= tolerance, f"{name} differs from {reference} by {error:.1e}, more than {tolerance:.0e}"
        return failed

    def _excuse(self, failed: dict[str, str], name: str, error: Exception) -> None:
        if name == OURS:
            raise error
        failed[name] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _seconds(self, run: Callable, state: Any, queue: bool = False) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            run(state)
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if queue:
            torch.cuda._sleep(AHEAD)
        start.record()
        run(state)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _record(self, row: Mapping, work: Work | None, figures: dict, units: int, more: dict) -> None:
        record = {
            "question": self._question,
            **row,
            "device": self.device.type,
            "units": units,
            "contestants": figures,
            **more,
        }
        if work:
            record |= {"bytes": work.bytes, "operations": work.operations, "floor_dtype": work.dtype}
            set_floor(record)
        self._rows.append(record)
        self._benchmark.extra_info |= record


def set_floor(row: dict) -> None:
    """By the ceilings as they are now."""
    row["floor_s"] = machine.floor(row["bytes"], row["operations"], row["floor_dtype"])
    row["times_floor"] = row["contestants"][OURS]["median_s"] / row["floor_s"]


def _figures(times: list[float], walls: list[float]) -> dict:
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    found = {"median_s": median, "first_quartile_s": first, "third_quartile_s": third, "rounds": len(times)}
    return found if times is walls else found | {"wall_s": statistics.median(walls)}


def _expected() -> tuple[type[Exception], ...]:
    """What an opponent may fail by without failing the row."""
    return torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException
