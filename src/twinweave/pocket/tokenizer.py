"""The pocket world's tokenizer: one token per word and punctuation mark, over a closed vocabulary.

An ordinary fast tokenizer that `AutoTokenizer` loads. Knows nothing about models.
"""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from twinweave.pocket import language, skills, words

BOS, EOS, PAD, UNKNOWN = "<bos>", "<eos>", "<pad>", "<unk>"


def vocabulary() -> list[str]:
    """Every token, in the order of its id."""
    templates = [
        *(form for forms in language.QUESTIONS.values() for form in forms),
        *(form for forms in language.PREDICATES.values() for form in forms),
        *language.TOWN_QUESTIONS.values(),
        *language.STATEMENTS.values(),
        *language.TOWN_STATEMENTS.values(),
        language.LAND_QUESTION,
        *skills.TEMPLATES,
    ]
    function_words = {word for text in templates for word in re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", " ", text))}
    lists = [
        words.FIRST_NAMES,
        words.LAST_NAMES,
        *(words.TOWNS, words.JOBS, words.PETS, words.COLOURS, words.LANDS, words.RIVERS, words.GOODS),
        *(words.WORDS, words.LETTERS, words.NUMBERS),
    ]
    tokens = [PAD, BOS, EOS, UNKNOWN, "and", *sorted(function_words), *(word for group in lists for word in group)]
    return list(dict.fromkeys(tokens))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS in front, never adds EOS, and pads on the right unless told otherwise."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Joins words with spaces and takes away the space before punctuation marks.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
