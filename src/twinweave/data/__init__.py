"""From a user's rows to token ids: reading, templates, encoding, batching, and what can be wrong with the data."""

from twinweave.data.collator import IGNORED_LABEL, CompletionCollator, attention_mask_of, pad_rows
from twinweave.data.encode import Encoded, check_tokenizer, encode_example, encode_prompt, join_completion
from twinweave.data.formats import load_rows
from twinweave.data.prepare import DataReport, TrainingData, prepare_training_data
from twinweave.data.templates import Example, to_example

__all__ = [
    "IGNORED_LABEL",
    "CompletionCollator",
    "DataReport",
    "Encoded",
    "Example",
    "TrainingData",
    "attention_mask_of",
    "check_tokenizer",
    "encode_example",
    "encode_prompt",
    "join_completion",
    "load_rows",
    "pad_rows",
    "prepare_training_data",
    "to_example",
]
