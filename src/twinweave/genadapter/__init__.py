"""GenerativeAdapter (arXiv 2411.05877): a text becomes an ordinary LoRA in one forward pass of the frozen base."""

from .config import GenerativeAdapterConfig
from .model import GenerativeAdapter
from .state import AdapterState

__all__ = ["AdapterState", "GenerativeAdapter", "GenerativeAdapterConfig"]
