"""Parameters that the benchmarks share: which shapes and sizes, and which of them a CPU is asked to do."""

from __future__ import annotations

from typing import NamedTuple

from .shapes import SHAPES, Shape

EVERYTHING = ("distilGPT-2", "GPT-J-6B")
"""A small and a large shape at every size; the others at the typical one."""


class Case(NamedTuple):
    """One point: a shape and a size (rows, edits, tokens or a batch).

    ``on_cpu`` False: a GPU's alone. ``typical``: where torch.compile races too, since it takes its time.
    """

    shape: Shape
    size: int
    on_cpu: bool
    typical: bool

    def __str__(self) -> str:
        return f"{self.shape.name}-{self.size}"


def cases(sizes: tuple[int, ...], *, typical: int, cpu: tuple[int, ...], cpu_others: bool = True) -> list[Case]:
    """Every size for the shapes of EVERYTHING, the typical one for the others; ``cpu`` sizes run on a CPU."""
    found = []
    for shape in SHAPES.values():
        everything = shape.name in EVERYTHING
        for size in sizes if everything else (typical,):
            on_cpu = shape.on_cpu and (size in cpu if everything else cpu_others)
            found.append(Case(shape, size, on_cpu, everything and size == typical))
    return found
