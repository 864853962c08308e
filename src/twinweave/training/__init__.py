"""Training: recipes, loading the base, transformers' Trainer with whole checkpoints, and one fit of one method."""

from .base import default_device, free_memory, load_base, load_tokenizer, load_window
from .fit import Training, fit
from .frozen_choice import remove_store
from .frozen_store import FrozenStore
from .recipe import Recipe, load_recipe
from .rows import load_rehearsal, load_training_data, reading_size
from .term import TermTrainer
from .trainer import TwinweaveTrainer

__all__ = [
    "FrozenStore",
    "Recipe",
    "TermTrainer",
    "Training",
    "TwinweaveTrainer",
    "default_device",
    "fit",
    "free_memory",
    "load_base",
    "load_recipe",
    "load_rehearsal",
    "load_tokenizer",
    "load_training_data",
    "load_window",
    "reading_size",
    "remove_store",
]
