"""Rehearsal for those who train with a Trainer of their own: everything in one call.

Knows nothing about recipes and runs; what the base writes is not kept.
"""

from transformers import PreTrainedTokenizerBase

from ..data import CompletionCollator
from ..imsm import IMSMModel
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

    Takes as long as writing does. Raises what `write_sequences` raises.
    """
    settings = settings or RehearsalSettings()
    with model.use_memory("original"):
        written = write_sequences(model.get_base_model(), tokenizer, settings)  # type: ignore[arg-type]
    rows = RehearsalRows(make_rows(written, settings), CompletionCollator(tokenizer), settings, batch_size)
    term = gate_rehearsal(model, Materials(seed, steps, rehearsal=rows))
    assert term is not None
    return term
