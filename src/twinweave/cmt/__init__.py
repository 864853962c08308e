"""CMT (arXiv 2412.07393): documents are compressed once into a bank, and a frozen base answers from it."""

from .bank import Hit, MemoryBank
from .config import CMTConfig
from .model import MemoryModel

__all__ = ["CMTConfig", "Hit", "MemoryBank", "MemoryModel"]
