"""The embedded default: a small seeded world, a small base model that knows it, and tasks with exact answers."""

from pathlib import Path

from twinweave.pocket.tasks import TASKS, names, retained_tasks, rows

__all__ = ["TASKS", "base_dir", "demo_recipe", "memory_dir", "names", "reader_dir", "retained_tasks", "rows"]


def base_dir() -> Path:
    """The shipped base model: an ordinary Hugging Face directory with model and tokenizer."""
    return Path(__file__).parent / "base"


def reader_dir() -> Path:
    """The shipped generator of adapters for the shipped base, as GenerativeAdapter.from_pretrained finds it."""
    return Path(__file__).parent / "reader"


def memory_dir() -> Path:
    """The shipped memory model for the shipped base, as MemoryModel.from_pretrained finds it."""
    return Path(__file__).parent / "memory"


def demo_recipe() -> Path:
    """The recipe that `twinweave demo` runs."""
    return Path(__file__).parent / "demo.yaml"
