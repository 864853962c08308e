"""Results of a comparison as something to read: one HTML file, one sentence, one table, one picture.

Knows the layout of `results.json` and nothing about models, training or how the numbers came to be.
"""

from .finding import finding
from .frontier import frontier_png
from .page import build_report
from .table import terminal_tables

__all__ = ["build_report", "finding", "frontier_png", "terminal_tables"]
