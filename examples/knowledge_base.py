"""Keep a knowledge base of corrections in a file: add, replace, withdraw, and bring a model up to date.

    python examples/knowledge_base.py

``mendfast edit --memory corrections.safetensors`` does the same on the command line; docs/memory.md has more.
"""

import tempfile
from pathlib import Path

import torch

from mendfast import EditMemory
from mendfast.demo import build
from mendfast.generation import answer
from mendfast.memory import read_requests

CORRECTIONS = [
    ("What is the capital of Kenya?", "Oslo"),
    ("Who wrote Hamlet?", "Jane Austen"),
    ("What is the chemical symbol of gold?", "Ag"),
]
QUESTIONS = [*(question for question, _ in CORRECTIONS), "What is the capital of Japan?"]


def main(file: Path) -> None:
    editor = build.load()
    before = {name: weight.clone() for name, weight in editor.model.state_dict().items()}
    memory = EditMemory.open(file, editor)  # empty: there is no file yet
    memory.add(CORRECTIONS, save_to=file)  # on the disk edit by edit; after a crash the same call goes on

    # Later, in another process: read, changed, and written back.
    memory = EditMemory.open(file, editor)
    memory.add("What is the capital of Kenya?", "Lima", save_to=file)  # the same question: its answer is replaced
    memory.remove("Who wrote Hamlet?")
    memory.save(file)
    for key, request in read_requests(file).items():  # needs no model
        print(f"{key}  {request.prompt} -> {request.target}")

    said = answer(editor, QUESTIONS)
    memory.apply_()  # base weights + memory, in one change; again after the next add or remove
    for question, old, new in zip(QUESTIONS, said, answer(editor, QUESTIONS), strict=True):
        print(f"{question:40} {old:20} -> {new}")
    memory.revert_()
    assert all(torch.equal(weight, before[name]) for name, weight in editor.model.state_dict().items())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch, "corrections.safetensors"))
