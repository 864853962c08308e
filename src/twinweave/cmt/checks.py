"""Which bases and adapters can carry memories. Knows nothing about how they do."""

from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel

from ..decoder import decoder_of
from ..errors import UnsupportedModelError


def check_base(base: Any) -> None:
    """Raise UnsupportedModelError for a base that cannot answer from memories."""
    fault = None
    if not isinstance(base, PreTrainedModel):
        fault = "is not a transformers model"
    elif not base.can_generate() or base.get_output_embeddings() is None:
        fault = "has no language-model head"
    elif decoder_of(base) is None:
        fault = "has no decoder of its own below its head"
    elif base.config.is_encoder_decoder:
        fault = "is an encoder-decoder"
    elif getattr(base, "peft_config", None) or any("lora_" in name for name, _ in base.named_parameters()):
        fault = "already carries an adapter"
    if fault:
        raise UnsupportedModelError(
            f"{type(base).__name__} {fault}, so it cannot carry memories. Load the base with "
            "AutoModelForCausalLM.from_pretrained."
        )


def check_adapter(adapter: PeftConfig) -> None:
    """Raise UnsupportedModelError for an adapter that is no change of the base's layers."""
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    beside = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(adapter, name, None)]
    if adapter.is_prompt_learning or kind == "ADAPTION_PROMPT" or beside:
        what = f"with {beside[0]}" if beside else f"of type {kind}"
        raise UnsupportedModelError(
            f"An adapter {what} cannot be switched on for compression alone. Use LoRA, or another adapter of layers."
        )
