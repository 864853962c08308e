"""Shared by all tests: offline, one thread, and tiny models with random weights that need no download.

Helpers are handed out as fixtures, because test folders are not packages.
"""

import os
import shutil
import string

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from twinweave import IMSMConfig, IMSMModel, get_imsm_model

torch.set_num_threads(1)

VOCAB, HIDDEN, PAD = 61, 32, 0
CHARACTERS = string.ascii_lowercase + string.digits + " \n\r.,:?!-'"
ARCHITECTURES = ("llama", "gpt2", "gemma3", "mistral")
PEFT_KINDS = ("lora", "dora", "ia3", "adalora", "oft", "loha", "vera", "ln_tuning")


def base_config(arch: str) -> Any:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    match arch:
        case "llama":  # grouped queries, untied head
            return LlamaConfig(**common, tie_word_embeddings=False)
        case "gpt2":  # learned positions, dropout, Conv1D layers
            return GPT2Config(
                vocab_size=VOCAB,
                n_embd=HIDDEN,
                n_layer=2,
                n_head=4,
                n_positions=128,
                initializer_range=0.15,
                resid_pdrop=0.1,
                embd_pdrop=0.1,
                attn_pdrop=0.1,
                pad_token_id=PAD,
                bos_token_id=1,
                eos_token_id=None,
            )
        case "gemma3":  # tied embeddings, sliding and full attention in turn
            return Gemma3TextConfig(
                **common,
                head_dim=8,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"],
                tie_word_embeddings=True,
            )
        case "mistral":  # every layer has a sliding window, shorter than the test sequences
            return MistralConfig(**common, sliding_window=5, tie_word_embeddings=False)
    raise AssertionError(arch)


def make_base_model(arch: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A causal LM of about 20,000 random weights in fp32, in evaluation mode. `changes` go into its config."""
    config = base_config(arch)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms and biases of a fresh model are all ones and zeros, which hides mistakes
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_peft_config(kind: str = "lora", arch: str = "llama", **changes: Any) -> PeftConfig:
    """An adapter of the given kind for the given architecture; dropout is off unless `changes` says otherwise."""
    attention = ["c_attn"] if arch == "gpt2" else ["q_proj", "v_proj"]
    feed_forward = "mlp.c_proj" if arch == "gpt2" else "down_proj"
    norms = ["ln_1", "ln_f"] if arch == "gpt2" else ["input_layernorm", "norm"]
    common = {"task_type": "CAUSAL_LM"}
    makers: dict[str, Callable[[], PeftConfig]] = {
        "lora": lambda: LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": attention} | common | changes),
        "dora": lambda: LoraConfig(**{"r": 4, "target_modules": attention, "use_dora": True} | common | changes),
        "ia3": lambda: IA3Config(
            **{"target_modules": [*attention, feed_forward], "feedforward_modules": [feed_forward]} | common | changes
        ),
        "adalora": lambda: AdaLoraConfig(
            **{"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1, "total_step": 10, "target_modules": attention}
            | common
            | changes
        ),
        "oft": lambda: OFTConfig(
            **{"r": 0, "oft_block_size": 8, "target_modules": attention} | common | changes,
        ),
        "loha": lambda: LoHaConfig(**{"r": 4, "target_modules": attention} | common | changes),
        "vera": lambda: VeraConfig(**{"r": 8, "target_modules": attention} | common | changes),
        "ln_tuning": lambda: LNTuningConfig(**{"target_modules": norms} | common | changes),
    }
    return makers[kind]()


def perturb_trainable(model: torch.nn.Module, seed: int = 1) -> None:
    """Move everything trainable away from its start, as training would: the adapter a little, the gate a lot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.4 if name.startswith("gate.") else 0.2
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((scale * noise).to(parameter.dtype))


def make_imsm_model(
    arch: str = "llama",
    kind: str = "lora",
    *,
    trained: bool = True,
    base: PreTrainedModel | None = None,
    peft_changes: dict[str, Any] | None = None,
    **imsm: Any,
) -> IMSMModel:
    """An IMSM model in evaluation mode. `imsm` are settings of IMSMConfig; rank 3 unless given."""
    base = make_base_model(arch) if base is None else base
    config = IMSMConfig(**{"gate_rank": 3} | imsm)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = get_imsm_model(base, make_peft_config(kind, arch, **(peft_changes or {})), config)
    if trained:
        perturb_trainable(model)
    return model.eval()


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length] without padding or special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PEFT_KINDS)
def peft_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_base() -> Callable[..., PreTrainedModel]:
    return make_base_model


@pytest.fixture(scope="session")
def make_peft() -> Callable[..., PeftConfig]:
    return make_peft_config


@pytest.fixture(scope="session")
def make_imsm() -> Callable[..., IMSMModel]:
    return make_imsm_model


@pytest.fixture(scope="session")
def perturb() -> Callable[..., None]:
    return perturb_trainable


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    return random_tokens


@pytest.fixture(scope="session")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_runs  # loads the whole package, which most tests have no need of

    return tiny_runs.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, also the working directory, with a base, rows and nothing else (tiny_runs.py)."""
    shutil.copytree(_world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, `<s>` in front."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {c: i for i, c in enumerate(CHARACTERS, start=3)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")
