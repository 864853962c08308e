"""Training: recipes, loading the base, transformers' Trainer with whole checkpoints, and one fit of one method."""

from .base import default_device, free_memory, load_base, load_tokenizer, load_window
from .fit import Training, fit, load_training_data
from .recipe import Recipe, load_recipe
from .trainer import TwinweaveTrainer

__all__ = [
    "Recipe",
    "Training",
    "TwinweaveTrainer",
    "default_device",
    "fit",
    "free_memory",
    "load_base",
    "load_recipe",
    "load_tokenizer",
    "load_training_data",
    "load_window",
]
