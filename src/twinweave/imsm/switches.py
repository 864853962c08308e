"""Adapters of PEFT that cannot be switched off layer by layer, given the switch that the others have.

Knows nothing about memories. Two kinds: adaption prompts, which wrap the attention, and ShadowPEFT, whose second hidden
state travels from block to block. Each module gets a subclass of its class, in place.
"""

from typing import Any

from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from peft.tuners.shadow.layers import ShadowCarrier, ShadowLayer
from peft.tuners.shadow.model import ShadowModel
from torch import Tensor, nn


class SwitchableAttention(nn.Module):
    """An attention with adaption prompts, which can be run without them."""

    _disable_adapters = False
    model: nn.Module

    @property
    def disable_adapters(self) -> bool:
        """As in PEFT's own layers."""
        return self._disable_adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's own forward, with the prompts or without."""
        return self.model(*args, **kwargs) if self._disable_adapters else super().forward(*args, **kwargs)


class _SwitchableAttention(SwitchableAttention, AdaptedAttention):
    pass


class _SwitchableAttentionGPT(SwitchableAttention, AdaptedAttentionGPT):
    pass


class _SwitchableShadowLayer(ShadowLayer):
    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and isinstance(hidden_states, ShadowCarrier):
            hidden_states = hidden_states.hidden
        return super().forward(hidden_states, *args, **kwargs)


_SWITCHABLE: dict[type[nn.Module], type[nn.Module]] = {
    AdaptedAttention: _SwitchableAttention,
    AdaptedAttentionGPT: _SwitchableAttentionGPT,
    ShadowLayer: _SwitchableShadowLayer,
}


def make_switchable(decoder: nn.Module) -> None:
    """Give every adapted layer that lacks one a `_disable_adapters` that works."""
    for module in decoder.modules():
        if type(module) in _SWITCHABLE:
            module.__class__ = _SWITCHABLE[type(module)]


class _LabelFollowingShadow(ShadowModel):
    """ShadowPEFT's auxiliary loss of a call that hands the head its label positions only is of all labels still."""

    _imsm: list[Any]  # a list: a module of a module would be a part of it

    def shadow_auxiliary_loss(self, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        whole = self._imsm[0]._call.labels
        return super().shadow_auxiliary_loss(labels if whole is None else whole, attention_mask)


def follow_labels(tuner: nn.Module, model: nn.Module) -> None:
    """Let a tuner that has a loss of its own see the labels of `model`'s call."""
    if isinstance(tuner, ShadowModel):
        tuner.__class__ = _LabelFollowingShadow
        tuner._imsm = [model]  # type: ignore[assignment]
