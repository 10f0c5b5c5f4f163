"""Several processes, one editor: what the loop asks of Hugging Face accelerate, and nothing more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


def launched() -> Accelerator | None:
    """The accelerator of a process that ``torchrun`` or ``accelerate launch`` started as one of several."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "LOCAL_RANK" not in os.environ:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise RuntimeError(
            "Training in several processes needs accelerate: pip install accelerate (mendfast[train] has it)."
        ) from error
    return Accelerator(cpu=not torch.cuda.is_available())


@contextlib.contextmanager
def together() -> Iterator[Accelerator | None]:
    """:func:`launched`, and at the end the processes part: one that ends within their group may be aborted by a thread
    of it, while another still writes its results."""
    accelerator = launched()
    try:
        yield accelerator
    finally:
        if accelerator and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Processes:
    """All processes of a run, of which this is number ``rank``; one alone, whose sums are its own, for None."""

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator = accelerator
        self.count = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.gather = accelerator.gather if self.count > 1 else None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, the same in each."""
        return self.accelerator.reduce(tensor, "sum") if self.count > 1 else tensor

    def most(self, value: int) -> int:
        """The largest ``value`` of any process; none goes on before all have come here."""
        if self.count == 1:
            return value
        return int(self.gather(torch.tensor([value], device=self.accelerator.device)).max())

    def objects(self, mine: Any) -> list[Any]:
        """What every process holds, by rank; none goes on before all have come here."""
        if self.count == 1:
            return [mine]
        from accelerate.utils import gather_object

        return gather_object([mine])

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Let every process hold the sum of all processes' gradients."""
        if self.count > 1:
            for parameter in parameters:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.sum(own)

    @torch.no_grad()
    def agree(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Let every process start from the main one's state, written in place.

        Raises:
            RuntimeError: another process would go on from another step: not all can read the checkpoint.
        """
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        steps = self.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"The processes would go on from steps {steps}; the output directory must be one that all of them "
                "read (a shared file system)."
            )
        for tensor in state.values():
            tensor.copy_(broadcast(tensor.clone()))
