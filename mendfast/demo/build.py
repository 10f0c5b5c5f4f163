"""Make what the demo ships: a small language model that knows the world's facts, and an editor for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from ..base_model import fit_base_model, small_gpt2, train_tokenizer
from ..config import MendConfig
from ..editor import MendEditor
from ..files import atomic_directory
from ..metrics import correct
from ..tasks import world
from ..training import FactSampler, TrainConfig, Trainer

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = "Q: {prompt} A:"

WIDTH, DEPTH, HEADS, VOCABULARY = 128, 4, 4, 2500
BASE_STEPS = 1200
LAYERS = [f"transformer.h.{i}.mlp.{name}.weight" for i in (1, 2, 3) for name in ("c_fc", "c_proj")]
EDITOR = MendConfig(
    layers=LAYERS,
    rank=256,
    scale_v=True,
    prompt_template=TEMPLATE,
    append_eos=True,
    aggregation="least_squares",
    ridge=1e-3,
    protection=20.0,
    longest=None,
)
STRENGTH = 1.05
"""Of the step sizes once training is over: of 1, 1.05, 1.1 and 1.15 the largest at which 125 validation facts at once
leave 90 % of the others as they were (95 % of them taken, 92 % in other words)."""
TRAINING = TrainConfig(
    steps=2300,
    batch_size=16,
    joint=[1, 1, 8, 25, 125],
    learning_rate=1e-3,
    alpha_learning_rate=2e-2,
    calibrate=True,
    c_edit=2.0,
    validate_every=250,
    validation_size=64,
    checkpoint_every=100,
)


def load(directory: str | Path = ASSETS) -> MendEditor:
    """The shipped editor, on the shipped model."""
    directory = Path(directory)
    if not (directory / "model" / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{directory} holds no demo model; make it with: mendfast demo --retrain --assets {directory}"
        )
    model = GPT2LMHeadModel.from_pretrained(directory / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    return MendEditor.from_pretrained(directory / "editor", model, tokenizer)


def build_base(seed: int = world.SEED, steps: int = BASE_STEPS) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """A GPT-2-shaped model that answers every question about every fact, in every wording."""
    facts = world.load_facts()
    pairs = [
        (TEMPLATE.replace("{prompt}", world.question(fact, i)), fact.answer)
        for fact in facts
        for i in range(len(world.RELATIONS[fact.relation].wordings))
    ]
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([f"{question} {answer}" for question, answer in pairs], VOCABULARY)
    model = small_gpt2(len(tokenizer), width=WIDTH, depth=DEPTH, heads=HEADS)
    fit_base_model(model, tokenizer, pairs, steps=steps, learning_rate=3e-3, seed=seed)
    return model, tokenizer


def build_editor(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, output: Path | None, config: TrainConfig = TRAINING
) -> MendEditor:
    """An editor trained on the training facts in their training wordings."""
    training, _ = world.splits()
    torch.manual_seed(config.seed)
    editor = MendEditor.from_model(model, tokenizer, EDITOR)
    # One fact in ten validates; it is edited in no training step, and serves as a neighbour in all.
    facts = world.items(training)
    editor.protect([(wording, fact.answer) for fact in facts for wording in fact.wordings], progress=None)
    sampler = FactSampler([f for i, f in enumerate(facts) if i % 10], neighbours=facts, seed=config.seed)
    validation = FactSampler(facts[::10], neighbours=facts, seed=config.seed + 1)
    trainer = Trainer(editor, sampler, config, output=output, validation=validation)
    trainer.resume()
    trainer.run()
    with torch.no_grad():
        editor.alpha_multiplier.mul_(STRENGTH)
    return editor


def retrain(
    directory: str | Path = ASSETS, *, base_steps: int = BASE_STEPS, config: TrainConfig = TRAINING
) -> None:
    """Train model and editor from nothing and put them into ``directory``; about an hour on one core.

    What was there stays until both are done. An interrupted run goes on from its checkpoints in ``training/``,
    which is deleted at the end.
    """
    directory = Path(directory)
    work = directory / "training"
    model_path = work / "model"
    if (model_path / "model.safetensors").is_file():
        model = GPT2LMHeadModel.from_pretrained(model_path).eval()
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    else:
        model, tokenizer = build_base(steps=base_steps)
        with atomic_directory(model_path) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
    editor = build_editor(model, tokenizer, work / "editor", config)
    questions = [(world.question(f, -1), f.answer) for f in world.load_facts()]
    known = correct(editor, questions).float().mean().item()
    print(f"The model answers {known:.1%} of {len(questions)} facts in their held-out wording.")
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    editor.save_pretrained(directory / "editor", dtype=torch.bfloat16)
    shutil.rmtree(work)
