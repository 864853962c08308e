"""The methods that `train` and `compare` know: `table.py` has them all, the other files what they are made of."""

from .building import load_plain
from .method import Adapter, Knob, Method, Model, SavedAdapter, SavedGenerator, SavedMemory, Settings
from .table import METHODS, check_saved, get_method, knobs, label_of

__all__ = [
    "METHODS",
    "Adapter",
    "Knob",
    "Method",
    "Model",
    "SavedAdapter",
    "SavedGenerator",
    "SavedMemory",
    "Settings",
    "check_saved",
    "get_method",
    "knobs",
    "label_of",
    "load_plain",
]
