"""Train an editor on facts of your own, save it, and edit with it.

    python examples/train_on_your_facts.py                    # a small model that learns invented facts first

The command line does the same: ``mendfast train --task qa --data facts.tsv --model NAME --output runs/mine``.
"""

import random
import tempfile
from pathlib import Path

import torch

from mendfast import MendConfig, MendEditor
from mendfast.base_model import make_base
from mendfast.generation import answer
from mendfast.tasks.load import load_task
from mendfast.training import TrainConfig, Trainer

WORDINGS = ("Where was {} born?", "What is the birthplace of {}?", "In which city was {} born?")
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Delhi", "Rome", "Quito", "Seoul")


def write_facts(path: Path) -> None:
    """Lines of question TAB answer; wordings of one fact are found by what they have in common."""
    names = [f"{first} {last}" for first in ("Ada", "Bela", "Carl", "Dora") for last in ("Moe", "Nash", "Orr")]
    rng = random.Random(0)
    facts = [(name, rng.choice(CITIES)) for name in names]
    path.write_text("".join(f"{wording.format(name)}\t{city}\n" for name, city in facts for wording in WORDINGS))


def main(folder: Path, base_steps: int = 100, steps: int = 40) -> None:
    write_facts(folder / "facts.tsv")
    task = load_task("qa", str(folder / "facts.tsv"))
    # Here a model of your own would be loaded; this one is made to know the facts.
    model, tokenizer = make_base(
        "gpt2", task.base_pairs(), vocabulary=300, width=64, depth=3, steps=base_steps, append_eos=True, progress=False
    )
    torch.manual_seed(0)
    editor = MendEditor.from_model(model, tokenizer, MendConfig(rank=32, step_size=2e-3, scale_v=True, append_eos=True))
    print("left out, as this model can't be asked:", *task.sieve(editor) or ["nothing"])
    settings = TrainConfig(steps=steps, batch_size=8, learning_rate=2e-3, validate_every=steps // 2, validation_size=16)
    held_out, run = task.sampler(1, held_out=True), folder / "run"
    trainer = Trainer(editor, task.sampler(), settings, output=run, validation=held_out)
    trainer.resume()  # a run that was cut off goes on from its last checkpoint
    metrics = trainer.run()
    print(f"validation: edit success {metrics['val_edit_success']:.0%}, loss {metrics['val_loss']:.2f}")

    editor = MendEditor.from_pretrained(run / "best", model, tokenizer)
    questions = [WORDINGS[0].format("Ada Moe"), WORDINGS[1].format("Ada Moe"), WORDINGS[0].format("Carl Orr")]
    before = answer(editor, questions)
    with editor.edit(questions[0], next(city for city in CITIES if city != before[0])).attached(model):
        for question, old, new in zip(questions, before, answer(editor, questions), strict=True):
            print(f"{question:34} {old:8} -> {new}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
