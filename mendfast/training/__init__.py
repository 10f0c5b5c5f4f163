"""Meta-training: the loss of Algorithm 1 for many edits side by side, and the loop around it."""

from .config import TrainConfig
from .data import FactSampler, FormSampler, Implied, Item, MixedSampler, Sampler
from .learner import EditorLearner, Learner
from .loop import Trainer, TrainingError
from .meta import editor_loss, meta_loss

__all__ = [
    "EditorLearner",
    "FactSampler",
    "FormSampler",
    "Implied",
    "Item",
    "Learner",
    "MixedSampler",
    "Sampler",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "editor_loss",
    "meta_loss",
]
