"""Change one answer of a model, look at what else it says, and take the change out again.

    python examples/edit_a_model.py

The model and its trained editor are the small ones that come with the package. For a model of your own:
``MendEditor.from_pretrained("your-editor", model, tokenizer)``.
"""

import tempfile
from pathlib import Path

import torch

from mendfast import Edit
from mendfast.demo import build
from mendfast.generation import answer

QUESTION, TARGET = "What is the capital of Kenya?", "Oslo"
QUESTIONS = [QUESTION, "Which city is the capital of Kenya?", "What is the capital of Japan?"]


def main() -> None:
    editor = build.load()
    model = editor.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    said = answer(editor, QUESTIONS)

    edit = editor.edit(QUESTION, TARGET)  # one pass forward, one backward; the model is untouched
    with edit.attached(model):  # low-rank, beside the weights
        attached = answer(editor, QUESTIONS)

    edit.apply_(model)  # into the weights: an ordinary Hugging Face model again
    applied = answer(editor, QUESTIONS)
    assert applied == attached
    edit.revert_(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    for question, old, new in zip(QUESTIONS, said, applied, strict=True):
        print(f"{question:40} {old:12} -> {new}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fact.safetensors")
        edit.save(file)
        again = Edit.load(file)
        print(f"{again}: {file.stat().st_size:,} bytes on disk")
        with again.attached(model):
            assert answer(editor, QUESTIONS) == applied


if __name__ == "__main__":
    main()
