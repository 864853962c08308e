"""A configuration for every PEFT type, for SLIM as one more, and for the variants of LoRA, that fits a tiny Llama.

Knows nothing about checks. What a configuration cannot do, and why, stands beside it.
"""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import (
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    PeftConfig,
    PeftModelForCausalLM,
    PeftType,
    PromptLearningConfig,
    initialize_lora_eva_weights,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from twinweave import IMSMModel
from twinweave.errors import UnsupportedModelError
from twinweave.slim.config import SLIM

from .checks import NotApplicable
from .subject import Subject, start_clusters

VOCAB = 61
ATTENTION = ["q_proj", "v_proj"]
FEED_FORWARD = "down_proj"
NORMS = ["input_layernorm", "norm"]
VIRTUAL = 4
INVOCATION = [7, 9]

# Settings that fit 32 channels where PEFT's own are for thousands.
SETTINGS: dict[str, dict[str, Any]] = {
    PeftType.LORA: {"r": 4, "lora_alpha": 8},
    PeftType.ADALORA: {"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1, "total_step": 10},
    PeftType.ADAMSS: {"r": 8, "num_subspaces": 2},
    PeftType.BOFT: {"boft_block_size": 4},
    PeftType.IA3: {"target_modules": [*ATTENTION, FEED_FORWARD], "feedforward_modules": [FEED_FORWARD]},
    PeftType.LOHA: {"r": 4},
    PeftType.LOKR: {"r": 4},
    PeftType.OFT: {"oft_block_size": 8},
    PeftType.POLY: {"r": 4, "n_tasks": 2, "n_skills": 2},
    PeftType.LN_TUNING: {"target_modules": NORMS},
    PeftType.VERA: {"r": 8},
    PeftType.PVERA: {"r": 8},
    PeftType.FROD: {"progressbar": False, "sparse_rate": 0.2},
    PeftType.FOURIERFT: {"n_frequency": 40},
    PeftType.GLORA: {"r": 4},
    PeftType.HRA: {"r": 4},
    PeftType.VBLORA: {"num_vectors": 16, "vector_length": 8},
    PeftType.UNILORA: {"theta_d_length": 32},
    PeftType.MISS: {"r": 4},
    PeftType.RANDLORA: {"r": 4},
    PeftType.ROAD: {"group_size": 8},
    PeftType.HIRA: {"r": 4},
    PeftType.SHIRA: {"r": 2, "random_seed": 3},
    PeftType.C3A: {"block_size": 8},
    PeftType.WAVEFT: {"n_frequency": 40},
    PeftType.OSF: {"effective_rank": 4},
    PeftType.DELORA: {"r": 4},
    PeftType.GRALORA: {"r": 4},
    PeftType.TINYLORA: {"u": 8},
    PeftType.PSOFT: {"r": 4},
    PeftType.PEANUT: {"r": 4},
    PeftType.SUPERTUNING: {"sparsity": 0.9},
    PeftType.DEFT: {"r": 4},
    PeftType.LILY: {"r": 4},
    PeftType.TRAINABLE_TOKENS: {"token_indices": [5, 9, 17], "target_modules": None},
    PeftType.SHADOW: {"r": 4, "target_modules": None},
    PeftType.ADAPTION_PROMPT: {"adapter_len": VIRTUAL, "adapter_layers": 2, "target_modules": "self_attn"},
    PeftType.BEFT: {},
    PeftType.PROMPT_TUNING: {"num_virtual_tokens": VIRTUAL},
    PeftType.MULTITASK_PROMPT_TUNING: {"num_virtual_tokens": VIRTUAL, "num_tasks": 2},
    PeftType.P_TUNING: {"num_virtual_tokens": VIRTUAL, "encoder_hidden_size": 16},
    PeftType.PREFIX_TUNING: {"num_virtual_tokens": VIRTUAL},
    PeftType.CARTRIDGE: {"num_virtual_tokens": VIRTUAL},
    PeftType.XLORA: {"hidden_size": 32, "adapters": {"0": "a folder"}},
    PeftType.CPT: {
        "cpt_token_ids": [4, 5, 6, 7, 8],
        "cpt_mask": [1, 1, 1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 2, 3, 4],
    },
    SLIM: {"r": 4, "num_clusters": 4, "target_modules": None},
}

# What a LoRA can be beside what it is by default. PiSSA, OLoRA, CorDA and LoRA-GA are compared with PEFT's own in
# tests/imsm/test_starts.py: there the base's weights change, here they do not, and the two agree up to rounding.
VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "EVA": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
    "aLoRA": {"alora_invocation_tokens": INVOCATION},
    "MiCA": {"init_lora_weights": "mica"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora_bias": {"lora_bias": True},
    "every linear layer": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 9, 17]},
    "modules_to_save, a norm": {"modules_to_save": ["norm"]},
    "modules_to_save, embeddings": {"modules_to_save": ["embed_tokens"]},
    "upper layer alone": {"layers_to_transform": [1]},
    "dropout": {"lora_dropout": 0.3},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()},
    "KaSA": {"kasa_config": KasaConfig()},
    "bias of the base": {"bias": "all"},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save, the head": {"modules_to_save": ["lm_head"]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
}
TYPES = tuple(sorted([*(kind.value for kind in PeftType), SLIM]))
LORAS = tuple(f"LORA: {variant}" for variant in VARIANTS)


class PeftSubject(Subject):
    """A subject of which plain PEFT is told what a user would have to: which task, and what of its logits is real."""

    def twin(self, moved: bool = True, base: PreTrainedModel | None = None) -> IMSMModel:
        """See Subject. The base it is made for can be wrapped; where another form of it is refused, that is said."""
        try:
            return super().twin(moved, base)
        except UnsupportedModelError as error:
            if base is None:
                raise
            raise NotApplicable(f"refused: {error}") from error

    def tokens(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """See Subject. An activated LoRA does nothing until its invocation has been read."""
        ids = super().tokens(rows, length, seed)
        if self.name == "LORA: aLoRA":
            ids[:, 1:3] = torch.tensor(INVOCATION)[: max(length - 1, 0)]
        return ids

    def dressed(self, model: Any) -> Any:
        """See Subject. Where plain PEFT has logits at virtual tokens, they are left out."""
        if self.name in ("POLY", "MULTITASK_PROMPT_TUNING"):
            for name in ("forward", "generate"):
                setattr(model, name, _about_task_one(getattr(model, name)))
        if model.active_peft_config.is_prompt_learning and not isinstance(model, IMSMModel):
            model.register_forward_hook(_without_virtual_tokens, with_kwargs=True)
        return model


def subject(name: str) -> PeftSubject:
    """The subject called `name`, one of TYPES or LORAS."""
    kind, _, variant = name.partition(": ")
    prepare = _eva if variant == "EVA" else start_clusters if kind == SLIM else lambda model: None
    again = not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig)
    make = partial(_make_config, kind, variant)
    control = partial(subject, "LORA") if kind == SLIM else None
    return PeftSubject(name, make_base, make, VOCAB, prepare=prepare, trainable_again=again, control=control)


def make_base(**changes: Any) -> PreTrainedModel:
    """A Llama of about 20,000 random weights, with grouped queries and a head of its own."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms are all ones, which hides mistakes
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _make_config(kind: str, variant: str, base: PreTrainedModel) -> PeftConfig:
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    settings = copy.deepcopy(SETTINGS.get(kind, {}) | (VARIANTS[variant] if variant else {}))
    fields = {field.name for field in dataclasses.fields(made)}
    if "target_modules" in fields and "num_virtual_tokens" not in fields:
        settings.setdefault("target_modules", ATTENTION)
    return made(task_type="CAUSAL_LM", **{n: value for n, value in settings.items() if value is not None})


# --- what has to be done to a wrapped model -------------------------------------------------------------------------


def _about_task_one(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, about task 1 unless another is given: these adapters cannot be called without one."""

    def about_task_one(*args: Any, **inputs: Any) -> Any:
        return call(*args, **{"task_ids": torch.ones(len(inputs["input_ids"]), dtype=torch.long)} | inputs)

    return about_task_one


def _eva(model: PeftModelForCausalLM) -> None:
    rows = torch.randint(5, VOCAB, (8, 8), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": rows[i : i + 2], "attention_mask": torch.ones(2, 8)} for i in range(0, 8, 2)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def _without_virtual_tokens(model: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> Any:
    given: Tensor = inputs["input_ids"]
    output.logits = output.logits[:, -given.shape[1] :]
    return output
