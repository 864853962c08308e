"""Rehearsal for those who train with a Trainer of their own: everything in one call.

Knows nothing about recipes and runs; what the base writes is not kept.
"""

from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import CompletionCollator
from ..imsm import IMSMModel
from ..processes import from_first
from .rows import RehearsalRows, make_rows
from .self_written import write_sequences
from .settings import RehearsalSettings
from .terms import Materials, Term, gate_rehearsal


def self_rehearsal(
    model: IMSMModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: RehearsalSettings | None = None,
    *,
    steps: int,
    batch_size: int = 4,
    seed: int = 0,
) -> Term:
    """The term to give to a `TermTrainer` for `steps` optimizer steps: the original memory writes `settings.sequences`
    texts now, and `batch_size` of them are rehearsed at each step (a quarter of the training's batch is enough).

    Takes as long as writing does; of several processes the first one writes (where TrainingArguments or an Accelerator
    was made before; else each writes the same), and `batch_size` is each one's. Raises what `write_sequences` raises.
    """
    settings = settings or RehearsalSettings()
    base: Any = model.get_base_model()
    with model.use_memory("original"):
        written = from_first(partial(write_sequences, base, tokenizer, settings))
    rows = RehearsalRows(make_rows(written, settings), CompletionCollator(tokenizer), settings, batch_size)
    term = gate_rehearsal(model, Materials(seed, steps, rehearsal=rows))
    assert term is not None
    return term
