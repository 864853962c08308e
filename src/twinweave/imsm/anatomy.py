"""What has to be known about a base before it is wrapped, found out by running it on a few tokens.

Which module is the decoder, how wide its states are, whether the head reads them, and whether labels are shifted:
nothing about a model says so reliably. Knows nothing about memories or adapters.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..decoder import with_last_hidden_state
from ..errors import UnsupportedModelError
from .adapters import dropout_off

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anatomy:
    """A base as the weave sees it."""

    decoder: nn.Module
    width: int  # of the decoder's last hidden states, d
    shifted: bool  # the logits at t are compared with the label at t + 1, and not with that at t (BART and its kin)


@torch.no_grad()
def examine(base: PreTrainedModel, decoder: nn.Module) -> Anatomy:
    """Run the base on four tokens. Raises UnsupportedModelError if its logits do not come from the decoder's states.

    Where it cannot be run yet (weights on no device, inputs other than tokens) the head's width and shifted labels are
    taken for granted.
    """
    head: Any = base.get_output_embeddings()
    taken = Anatomy(decoder, getattr(head, "in_features", None) or head.weight.shape[-1], shifted=True)
    if any(parameter.is_meta for parameter in base.parameters()):
        return taken
    seen: list[Tensor] = []
    ids = torch.tensor([[1, 2, 3, 1]], device=next(base.parameters()).device)

    def turn_around(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(output[0])
        return with_last_hidden_state(output, output[0].flip(-1)) if len(seen) == 2 else None

    hook = decoder.register_forward_hook(turn_around)
    try:
        with dropout_off(base):
            output = base(input_ids=ids, labels=ids, use_cache=False)
            other = base(input_ids=ids, use_cache=False).logits
    except Exception as error:  # whatever a model wants that we did not foresee
        logger.info("%s cannot be run on a few tokens: %s", type(base).__name__, error)
        return taken
    finally:
        hook.remove()
    if not seen or seen[0].ndim != 3 or _some_unread(seen[0], output.logits == other):
        raise UnsupportedModelError(
            f"The logits of {type(base).__name__} do not come from the last hidden states of its decoder "
            f"({type(decoder).__name__}), so its memories cannot be woven."
        )
    return Anatomy(decoder, seen[0].shape[-1], _shifted(output.loss, output.logits[0], ids[0]))


def _some_unread(states: Tensor, equal: Tensor) -> bool:
    """Whether logits stayed the same though the state was turned around; one that is all zeros cannot be (padding)."""
    return bool((equal.all(-1) & (states != states.flip(-1)).any(-1)).any())


def _shifted(loss: Tensor | None, logits: Tensor, ids: Tensor) -> bool:
    if loss is None:
        return True
    pairs = ((logits[:-1], ids[1:]), (logits, ids))
    apart = [float((cross_entropy(found.float(), targets) - loss).abs()) for found, targets in pairs]
    return apart[0] <= apart[1]
