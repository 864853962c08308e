"""CMT (arXiv 2412.07393): documents are compressed once into a bank, and a frozen base answers from it."""

from .bank import MemoryBank
from .config import CMTConfig
from .model import MemoryModel
from .rows import Hit

__all__ = ["CMTConfig", "Hit", "MemoryBank", "MemoryModel"]
