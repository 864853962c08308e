"""From a user's rows to token ids: reading, templates, encoding, batching, and what can be wrong with the data."""

from transformers import PreTrainedTokenizerBase

from twinweave.data.collator import IGNORED_LABEL, CompletionCollator, attention_mask_of, pad_rows
from twinweave.data.contexts import ContextCollator, ContextRows, questions_of
from twinweave.data.encode import Encoded, check_tokenizer, encode_example, encode_prompt, join_completion
from twinweave.data.formats import load_rows
from twinweave.data.prepare import DataReport, TrainingData, prepare_training_data
from twinweave.data.segments import SegmentCollator, prepare_segments
from twinweave.data.templates import Example, to_example

Collator = CompletionCollator | ContextCollator | SegmentCollator

__all__ = [
    "IGNORED_LABEL",
    "Collator",
    "CompletionCollator",
    "ContextCollator",
    "ContextRows",
    "DataReport",
    "Encoded",
    "Example",
    "SegmentCollator",
    "TrainingData",
    "attention_mask_of",
    "check_tokenizer",
    "collator_for",
    "encode_example",
    "encode_prompt",
    "join_completion",
    "load_rows",
    "pad_rows",
    "prepare_segments",
    "prepare_training_data",
    "questions_of",
    "to_example",
]


def collator_for(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> Collator:
    """What batches the rows: questions with contexts, segments of text, or rows of `input_ids` and `labels`."""
    columns = data.train.column_names
    if "questions" in columns:
        return ContextCollator(tokenizer)
    return SegmentCollator(tokenizer) if "chunks" in columns else CompletionCollator(tokenizer)
