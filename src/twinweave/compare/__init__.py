"""Comparing methods over seeds on one base: cells that are kept when finished, and one results.json."""

from .check import check_recipe
from .provenance import provenance
from .run import compare, train
from .store import RunFolder, find_model

__all__ = ["RunFolder", "check_recipe", "compare", "find_model", "provenance", "train"]
