"""General text that a method may rehearse while it is trained: written by the base itself, or brought by the user."""

from .own_text import read_sequences
from .own_trainer import self_rehearsal
from .rows import RehearsalRows, Written, make_rows
from .self_written import is_chat, write_sequences
from .settings import RehearsalSettings
from .store import load_sequences
from .terms import MakeTerm, Materials, Term, divergence, gate_rehearsal

__all__ = [
    "MakeTerm",
    "Materials",
    "RehearsalRows",
    "RehearsalSettings",
    "Term",
    "Written",
    "divergence",
    "gate_rehearsal",
    "is_chat",
    "load_sequences",
    "make_rows",
    "read_sequences",
    "self_rehearsal",
    "write_sequences",
]
