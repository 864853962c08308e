"""Model shapes by name, with random weights, and the systems that are compared on them.

Speed and memory depend on shapes only, so nothing is downloaded. Knows nothing about what is measured.
"""

import copy
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

import twinweave

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=8192,
        **{"tie_word_embeddings": False, **more},
    )


SHAPES: dict[str, Any] = {
    "tiny": _llama(64, 4, 4, 2, 128, vocab_size=256),  # for tests
    "25m": _llama(512, 6, 8, 4, 1408, vocab_size=8000),
    "200m": _llama(1024, 12, 16, 8, 2816, vocab_size=32000),
    "1b": _llama(2048, 16, 32, 8, 8192, tie_word_embeddings=True, **_LLAMA3),  # as Llama-3.2-1B
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, **_LLAMA3),
    "qwen3-4b": Qwen3Config(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True, **_QWEN3),
    "qwen3-8b": Qwen3Config(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False, **_QWEN3),
}


def build_base(shape: str, device: str, dtype: str, seed: int = 0) -> PreTrainedModel:
    """The shape with random weights, made on its device; without an EOS, so that every generation runs to its end."""
    config = copy.deepcopy(SHAPES[shape])
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, None, 0
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same tensors: two systems side by side, neither of which sees the other's modules."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def lora(base: PreTrainedModel, adapters: str) -> peft.LoraConfig:
    """r 16 on q_proj and v_proj, of all layers or of the upper half."""
    layers = base.config.num_hidden_layers
    upper = list(range(layers // 2, layers)) if adapters == "upper" else None
    return peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=upper, task_type="CAUSAL_LM"
    )


def _fill(model: nn.Module, seed: int) -> None:
    """Small random numbers for everything trainable, so that the two memories differ; alike for the same adapter."""
    generator: torch.Generator | None = None
    for name, parameter in model.named_parameters():
        if "lora_" in name or name == "gate.w_b":
            generator = generator or torch.Generator(parameter.device).manual_seed(seed)
            nn.init.normal_(parameter, std=0.02, generator=generator)


def plain_model(base: PreTrainedModel, adapters: str, seed: int = 0) -> peft.PeftModel:
    """PEFT and nothing else: no gate, no hooks of ours. Changes `base` in place."""
    model: Any = peft.get_peft_model(base, lora(base, adapters))
    _fill(model, seed)
    return model.eval()


def imsm_model(base: PreTrainedModel, adapters: str, seed: int = 0) -> twinweave.IMSMModel:
    """The same adapter with the gate. Changes `base` in place."""
    model = twinweave.get_imsm_model(base, lora(base, adapters))
    _fill(model, seed)
    return model.eval()
