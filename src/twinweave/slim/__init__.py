"""SLIM: LoRA experts beside identity experts, and a router that yields to identity far from the training data.

Read `layer.py`, then `router.py` and `clustering.py`; `model.py` puts them into a model by PEFT's means.
"""

from .config import SlimConfig
from .model import SlimModel, get_slim_model, register

register()

__all__ = ["SlimConfig", "SlimModel", "get_slim_model"]
