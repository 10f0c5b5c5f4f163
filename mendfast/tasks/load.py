"""Which task a name stands for, and its data, read."""

from __future__ import annotations

from typing import Any

from .task import Task

TASKS = ("qa", "fact_checking", "generation", "long")


def load_task(
    name: str, data: str, *, limit: int | None = None, seed: int = 0, tokenizer: Any = None
) -> Task:
    """Read a task's data.

    Args:
        name: one of :data:`TASKS`.
        data: a local file or the name of a Hub dataset; but for generation also "world", "world:train" or
            "world:test", made from the facts that come with the package (for fact checking also of
            some relations, "world:test:author,painter").
        limit: use the first so many examples.
        seed: of the targets and wordings that are drawn.
        tokenizer: measures what generation cuts, in tokens; without one words are counted.

    Raises:
        ValueError: an unknown task, no such data, nothing usable in it.
    """
    if name == "qa":
        from .qa import QuestionAnswering

        return QuestionAnswering.load(data, limit=limit, seed=seed)
    if name == "fact_checking":
        from .fact_checking import FactChecking

        return FactChecking.load(data, limit=limit, seed=seed)
    if name == "generation":
        from .generation import Generation

        return Generation.load(data, limit=limit, seed=seed, tokenizer=tokenizer)
    if name == "long":
        from .long import LongAnswers

        return LongAnswers.load(data, limit=limit, seed=seed)
    raise ValueError(f"There is no task {name!r}; choose one of {', '.join(TASKS)}.")
