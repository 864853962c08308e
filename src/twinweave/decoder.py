"""Which module of a causal language model is its decoder: everything below the head. Knows nothing about methods."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError


def decoder_of(base: PreTrainedModel) -> nn.Module | None:
    """The module below the head: it holds the input embeddings, and not the head. None if there is no such module."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    named = (getattr(base, name, None) for name in (base.base_model_prefix, "model"))
    found = [m for m in (base.get_decoder(), *named) if isinstance(m, nn.Module) and m is not base and m is not head]
    whole = (m for m in found if (inside := set(m.modules())) and embeddings in inside and head not in inside)
    return next(whole, found[0] if found else None)


def check_causal_lm(base: Any, consequence: str, bare: bool = True) -> None:
    """Raise UnsupportedModelError unless `base` is a causal LM of transformers: decoder, then head, able to generate;
    and, if it has to be `bare`, without an adapter. `consequence`: what the message says cannot be done with it."""
    fault = None
    if not isinstance(base, PreTrainedModel):
        fault = "is not a transformers model"
    elif not base.can_generate() or base.get_output_embeddings() is None:
        fault = "has no language-model head"
    elif decoder_of(base) is None:
        fault = "has no decoder of its own below its head"
    elif base.config.is_encoder_decoder:
        fault = "is an encoder-decoder"
    elif bare and (getattr(base, "peft_config", None) or any("lora_" in name for name, _ in base.named_parameters())):
        fault = "already carries an adapter"
    if fault:
        raise UnsupportedModelError(
            f"{type(base).__name__} {fault}, so {consequence}. Load the base with AutoModelForCausalLM.from_pretrained."
        )


def with_last_hidden_state(output: Any, state: Tensor) -> Any:
    """The decoder's output (a ModelOutput or a tuple) with another last hidden state."""
    if isinstance(output, tuple):
        return (state, *output[1:])
    output.last_hidden_state = state
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = (*output.hidden_states[:-1], state)
    return output
