"""Two tiny tokenizers: words, and bytes with a start-of-text token and a chat template."""

import os

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
# Times on a shared machine say nothing about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LINES = ["The capital of France is Paris.", "Question: who wrote it?\nAnswer: she did, in 1984."]


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """Whitespace-separated words, no start of text."""
    vocabulary = ["<unk>", "<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "yes", "no"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def bytes_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <s> before a text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    made.chat_template = CHAT_TEMPLATE
    return made
