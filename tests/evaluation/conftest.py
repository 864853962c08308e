"""A word tokenizer with a start of text and a chat template, and two tiny models with random weights."""

import os

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
# Times on a shared machine say nothing about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "<s>{% for m in messages %} <|{{ m.role }}|> {{ m.content }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", "yes", "no", "?"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[4:],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=36,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        initializer_range=0.4,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def make_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=36,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return make_llama()


@pytest.fixture(scope="session")
def gpt2() -> PreTrainedModel:
    return make_gpt2()


@pytest.fixture(params=[make_llama, make_gpt2], ids=["llama", "gpt2"], scope="session")
def model(request) -> PreTrainedModel:
    return request.param()
