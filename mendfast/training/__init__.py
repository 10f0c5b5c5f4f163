"""Meta-training: the loss of Algorithm 1 for many edits side by side, and the loop around it."""

from .data import FactSampler, Item
from .loop import TrainConfig, Trainer, TrainingError
from .meta import meta_loss

__all__ = ["FactSampler", "Item", "TrainConfig", "Trainer", "TrainingError", "meta_loss"]
