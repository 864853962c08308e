"""Which module of a causal language model is its decoder: everything below the head. Knows nothing about methods."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def decoder_of(base: PreTrainedModel) -> nn.Module | None:
    """The module below the head: it holds the input embeddings, and not the head. None if there is no such module."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    named = (getattr(base, name, None) for name in (base.base_model_prefix, "model"))
    found = [m for m in (base.get_decoder(), *named) if isinstance(m, nn.Module) and m is not base and m is not head]
    whole = (m for m in found if (inside := set(m.modules())) and embeddings in inside and head not in inside)
    return next(whole, found[0] if found else None)


def with_last_hidden_state(output: Any, state: Tensor) -> Any:
    """The decoder's output (a ModelOutput or a tuple) with another last hidden state."""
    if isinstance(output, tuple):
        return (state, *output[1:])
    output.last_hidden_state = state
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = (*output.hidden_states[:-1], state)
    return output
