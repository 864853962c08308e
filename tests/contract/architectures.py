"""A tiny model with random weights for every architecture in transformers' causal-LM mapping.

Sizes follow from the names of a config's fields, by rule, and a short table has the exceptions. Knows nothing about
what is checked.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from twinweave import SlimConfig
from twinweave.decoder import decoder_of

from .subject import PAD, Subject, start_clusters

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, HIDDEN, HEADS, FIRST = 96, 64, 4, 10

Rule = tuple[str, Any]


def _kv_heads(value: int, values: dict[str, Any]) -> int:
    """One key-value head stays one, as many as query heads stay as many, and fewer are half as many."""
    heads = next((values[n] for n in ("num_attention_heads", "n_head", "n_heads") if n in values), None)
    return 1 if value == 1 else HEADS if value == heads else HEADS // 2


# The first rule whose pattern is a field's whole name says its value, from the default and all defaults of the config.
RULES: list[Rule] = [
    ("pad_token_id", PAD),
    ("bos_token_id|decoder_start_token_id", 1),
    ("eos_token_id|sep_token_id|eod_token_id|forced_eos_token_id", 2),
    (r"\w+_(token_id|token_index)", 3),
    (r"(\w+_)?vocab_size|prompt_types|segment_types|vocab_size_per_layer_input", VOCAB),
    ("type_vocab_size|task_type_vocab_size", lambda v, _: v),
    (r"(\w*num_key_value_heads|num_kv_heads|kv_n_heads)", _kv_heads),
    (r"(\w*num_attention_heads|n_heads?|num_heads|(encoder_|decoder_)?attention_heads|index_n_heads)", HEADS),
    ("linear_num_key_heads", 2),
    ("linear_num_value_heads|linear_num_heads", 4),
    ("qk_head_dim", 2 * HIDDEN // HEADS),
    (r"(\w*head_dim|dim_head|d_kv|d_head|kv_channels)", HIDDEN // HEADS),
    (r"(num_hidden_layers|n_layers?|num_layers|num_blocks|\w*coder_layers|depth|conf_num_hidden_layers)", 2),
    (r"(\w*intermediate_size\w*|\w*ffn_dim|ffn_hidden_size|dim_ff|dff|d_ff|d_inner|mlp_dim|\w*ffn_hidden_size)", 48),
    (r"(hidden_size|d_model|n_embd|embedding_dim|emb_dim|hidden_size_global|word_embed_proj_dim|dim)", HIDDEN),
    ("out_hidden_size|attention_hidden_size|lru_width|embedding_size|vision_output_dim", HIDDEN),
    ("hidden_size_per_layer_input", 8),
    (r"(\w*num_experts|n_routed_experts|num_local_experts|moe_num_experts)", lambda v, _: min(v, 4)),
    (r"(\w*experts_per_tok(en)?|moe_topk|moe_top_k|moe_k)", lambda v, _: min(v, 2)),
    ("n_group|num_expert_group", lambda v, _: min(v, 2)),
    ("topk_group", 1),
    (r"(\w*lora_rank)", 16),
    ("max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions|model_max_length", 64),
    (r"(sliding_window|window_size|attention_window_size|local_attention|sliding_window_size)", lambda v, _: v and 6),
    (r"(\w*chunk_size)", lambda v, _: v if v < 8 else 8),
    (r"(\w*state_size|\w*d_state)", 8),
    ("first_k_dense_replace|num_dense_layers|moe_layer_start_index", lambda v, _: min(v, 1)),
    ("image_size|crop_size", 28),
    ("patch_size", 14),
    ("rotary_dim", 8),
]

# What no name tells: sizes that hang together, and periods that must fit into a few layers.
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_NGRAMS = {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1}
_QWEN4 = {
    "eos_token_id": 2,
    **_INDEXER,
    **_NGRAMS,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ple_embed_dim": HIDDEN,
    "heads_per_ngram": 2,
    "hc_lowrank": 8,
}
_DOTS3 = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 8,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": HIDDEN}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_assistant": {"text_config": {"global_head_dim": 16, "hidden_size_per_layer_input": 0}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_assistant": {"text_config": {"global_head_dim": 16, "num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"rescale_every": 0},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "hash_seed": 0, "num_buckets": 2},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, "mamba_headdim": 16},
}

# Fields that some configs leave open, and whose models then cannot be made.
OPEN = {"head_dim": HIDDEN // HEADS, "num_key_value_heads": HEADS}

# Linear layers that LoRA cannot take: PEFT refuses Mamba's output projection, whose weight fused kernels read past the
# layer, a grouped projection has other shapes than its weight says, and a router that is a linear layer gives a tuple.
_MAMBA = ("out_proj", "conv1d")
UNADAPTED = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), _MAMBA)
UNADAPTED |= {"deepseek_v4": ("o_a_proj",), "phimoe": ("router",)}
UNADAPTED |= dict.fromkeys(("llama4", "llama4_text"), ("router",))

LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The config of architecture `name` (a model type of transformers), shrunk; `changes` win."""
    return CONFIG_MAPPING[name](**_small(CONFIG_MAPPING[name], EXCEPTIONS.get(name, {})) | changes)


def _small(kind: type[PretrainedConfig], exceptions: dict[str, Any]) -> dict[str, Any]:
    default = kind()
    values = {k: v for k, v in default.to_dict().items() if k != "model_type"}
    small: dict[str, Any] = {}
    for name, value in values.items():
        part = vars(default).get(name)
        if isinstance(part, PretrainedConfig):
            small[name] = _small(type(part), exceptions.get(name, {}))
        elif name in LAYERS and value and name not in exceptions:
            small[name] = value
        elif value is None and name in OPEN:
            small[name] = OPEN[name]
        elif isinstance(value, (int, list)) and not isinstance(value, bool):
            rule = next((new for pattern, new in RULES if re.fullmatch(pattern, name)), None)
            if rule is not None:
                small[name] = rule(value, values) if callable(rule) else rule
    _shorten(small)
    if "is_decoder" in values:
        small["is_decoder"] = True
    return small | {k: v for k, v in exceptions.items() if not isinstance(small.get(k), dict)}


def _shorten(small: dict[str, Any]) -> None:
    """So many layers that every kind of layer occurs, and no more."""
    kinds = {n: list(dict.fromkeys(small[n])) for n in LAYERS if n in small}
    if not kinds:
        return
    count = max(2, *(len(k) for k in kinds.values()))
    for name, found in kinds.items():
        small[name] = (found * count)[:count] if name != "mlp_layer_types" else (found + found[-1:] * count)[:count]
    small["num_hidden_layers"] = count


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """An fp32 causal LM in evaluation mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32)
        _spread(model)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Weights large enough for logits that differ; norms and biases that are not all ones and zeros."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif (std := float(parameter.std())) < 0.1:
            parameter.copy_(parameter * (0.12 / std) if std > 0 else 0.12 * torch.randn_like(parameter))


def adapter(base: PreTrainedModel) -> PeftConfig:
    """LoRA on all linear layers of the decoder."""
    decoder, head = decoder_of(base), base.get_output_embeddings()
    inside = set(decoder.modules()) if decoder is not None else set()
    left_out = UNADAPTED.get(base.config.model_type, ())
    linear = {n: m for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    targets: str | list[str] = "all-linear"
    if left_out or not inside.issuperset(linear.values()):
        targets = [n for n, m in linear.items() if m in inside and not n.endswith(left_out)]
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets)


def subject(name: str) -> Subject:
    """Architecture `name` with LoRA."""
    make: Callable[..., PreTrainedModel] = lambda **changes: tiny_model(name, **changes)  # noqa: E731
    return Subject(name, make, adapter, vocab=VOCAB, first=FIRST)


def slim(base: PreTrainedModel) -> PeftConfig:
    """SLIM where it goes by itself: beside every feed-forward. The clusters of a few random tokens find others far, so
    yielding is weak: the checks are about tokens that LoRA experts see."""
    return SlimConfig(task_type="CAUSAL_LM", r=4, num_clusters=4, yielding_strength=0.1)


def slim_subject(name: str) -> Subject:
    """Architecture `name` with SLIM."""
    return replace(subject(name), make_peft=slim, prepare=start_clusters, control=lambda: subject(name))
