"""Which adapters and options of generation go with memories. Knows nothing about how they are carried."""

from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError, UsageError
from .prefix import setting

# what runs ahead of the base counts the tokens that are in its cache, and the prefix is none of them
_AHEAD = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_OF_THE_BASE = ("modules_to_save", "trainable_token_indices", "layer_replication", "kasa_config")
_MOVED_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def check_adapter(adapter: PeftConfig) -> None:
    """Raise UnsupportedModelError for an adapter that is not beside the base's layers, where it can be switched off."""
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    beside = [name for name in _OF_THE_BASE if getattr(adapter, name, None)]
    if adapter.is_prompt_learning or kind in ("ADAPTION_PROMPT", "XLORA") or beside:
        what = f"with {beside[0]}" if beside else f"of type {kind}"
        raise UnsupportedModelError(
            f"An adapter {what} cannot be switched on for compression alone. Use LoRA, or another adapter of layers."
        )
    start, bias = getattr(adapter, "init_lora_weights", True), getattr(adapter, "bias", "none")
    if str(start).lower().startswith(_MOVED_STARTS):
        raise UnsupportedModelError(
            f"init_lora_weights={start!r} changes the base's own weights, and the base must stay as it is. Use True."
        )
    if bias not in ("none", None, False):
        raise UnsupportedModelError(
            f"bias={bias!r} trains biases of the base itself, and the base must stay as it is. Use bias='none'."
        )


def check_generation(base: PreTrainedModel, options: dict[str, Any], contrast: float) -> None:
    """Raise UsageError for options of `generate` that do not go with memories."""
    if isinstance(contrast, bool) or not isinstance(contrast, int | float) or not 0 <= contrast < float("inf"):
        raise UsageError(f"contrast is {contrast!r}; it must be a number of at least 0.")
    if contrast and (setting(base, options, "num_beams") or 1) > 1:
        raise UsageError("contrast cannot be used with beams. Leave num_beams out, or contrast.")
    if ahead := next((name for name in _AHEAD if setting(base, options, name)), None):
        raise UsageError(
            f"{ahead} cannot be used with memories: what guesses ahead takes them for tokens. Leave it out."
        )
