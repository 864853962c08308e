"""Prompt learning: virtual tokens that stand before the real ones in the enhanced memory, and there alone.

Knows nothing about gates, queries or losses. The base model is called with the real tokens only, whatever the memory.
The decoder's own run, which is the enhanced memory's, gets the virtual ones put before them here, and what it returns
is cut back to the real ones; so that the head, the loss, the masks and `generate` never learn of them, and the frozen
pass never had them.

A cache that others see has the columns of the real tokens. It is the original memory's and carries the enhanced one's.
"""

import inspect
from typing import Any, cast

import torch
from peft import PeftModelForCausalLM, PeftType
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig

from ..errors import UnsupportedModelError, UsageError
from .cache import TwinCache, become, is_empty
from .twin import Twin

_IN_THE_CACHE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


class PromptedCache(TwinCache):
    """The cache of the original memory, which carries the enhanced one's, longer by `virtual` tokens.

    `alone`: it was begun with the enhanced memory alone, and nothing is written for the original one.
    """

    enhanced: Cache
    virtual: int
    alone: bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of real tokens in it."""
        if self.alone:
            return max(int(self.enhanced.get_seq_length(layer_idx)) - self.virtual, 0)
        return int(super().get_seq_length(layer_idx))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See TwinCache."""
        super().reorder_cache(beam_idx)
        self.enhanced.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See TwinCache."""
        super().batch_repeat_interleave(repeats)
        self.enhanced.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See TwinCache."""
        super().batch_select_indices(indices)
        self.enhanced.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """See TwinCache."""
        super().crop(tokens_to_remove)
        self.enhanced.crop(tokens_to_remove)

    def reset(self) -> None:
        """See TwinCache. The virtual tokens are forgotten too, and are put there again by the next call."""
        super().reset()
        self.enhanced = DynamicCache()


class PromptedTwin(Twin):
    """A Twin whose enhanced memory reads the virtual tokens of `model`'s active adapter before the real ones.

    It takes two passes whatever the plan: the memories do not have the same columns.
    """

    def __init__(self, model: PeftModelForCausalLM, decoder: nn.Module, plan: Any = "auto") -> None:
        super().__init__(decoder, plan)
        self._stackable = False
        self._model = model
        self._given: dict[str, Any] = {}
        self._outer: PromptedCache | None = None
        self._alone = False

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See Twin. The form is always the same."""

    def share_trunk(self) -> bool:
        """See Twin. Nothing is shared."""
        return False

    def enter(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tensor | None, alone: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The decoder's inputs with the virtual tokens in them. `alone`: no frozen pass will follow."""
        given = dict(inspect.signature(self.decoder.forward).bind_partial(*args).arguments) | kwargs
        self._given, self._alone = given, alone
        source = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, length = source.shape[:2]
        count = self._model.active_peft_config.num_virtual_tokens
        self._outer = self._prompted(given.get("past_key_values"), count)
        cache = self._outer.enhanced if self._outer is not None else None
        fresh = cache is None or is_empty(cache)
        in_front = count if fresh and not self._in_the_cache else 0

        changed: dict[str, Any] = {"past_key_values": cache}
        if fresh and self._in_the_cache:
            self._check_not_checkpointed()
            changed["past_key_values"] = self._model.get_prompt(rows, max_cache_len=-1)
            if self._outer is not None:
                self._outer.enhanced = changed["past_key_values"]
        elif fresh:
            changed |= {"input_ids": None, "inputs_embeds": self._with_prompt(given, rows, task_ids)}
        changed["attention_mask"] = _with_virtual_columns(given.get("attention_mask"), count)
        changed["position_ids"] = self._positions(given, length, count, in_front)
        for name in ("cache_position", "token_type_ids"):
            changed[name] = None
        return (), given | {name: value for name, value in changed.items() if value is not None or name in given}

    def leave(self, output: Any) -> tuple[dict[str, Any], Any]:
        """What the decoder was given before `enter`, and its output without the virtual tokens."""
        given, length = self._given, _length(self._given)
        virtual = output[0].shape[1] - length

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == virtual + length:
                return value[:, virtual:]  # states [B, V + T, d]
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == virtual + length:
                return value[:, :, virtual:]  # attention [B, heads, V + T, columns]
            if isinstance(value, Cache):
                return self._seen_from_outside(value)
            return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

        if isinstance(output, tuple):
            output = cut(output)
        else:
            for name, value in list(output.items()):
                output[name] = cut(value)
        self._given, self._outer = {}, None
        return given, output

    def memories(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor, TwinCache | None]:
        """See Twin; for what `leave` gave back."""
        found = (kwargs.get("past_key_values"), *(output if isinstance(output, tuple) else output.values()))
        cache = next((value for value in found if isinstance(value, PromptedCache)), None)
        frozen = self.frozen_pass(args, kwargs if cache is None else kwargs | {"past_key_values": cache})
        return frozen[0], output[0], cache

    # --- the parts ------------------------------------------------------------------------------------------------

    @property
    def _in_the_cache(self) -> bool:
        """Whether the virtual tokens are keys and values, not embeddings."""
        return self._model.active_peft_config.peft_type in _IN_THE_CACHE

    def _with_prompt(self, given: dict[str, Any], rows: int, task_ids: Tensor | None) -> Tensor:
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = cast(nn.Module, self._model.word_embeddings)(given["input_ids"])
        if task_ids is not None:  # every row of the caller's may have become several: beams
            task_ids = task_ids.repeat_interleave(rows // len(task_ids), dim=0)
        prompt = self._model.get_prompt(rows, task_ids=task_ids)
        return torch.cat((prompt.to(embeds.dtype), embeds), dim=1)

    def _positions(self, given: dict[str, Any], length: int, count: int, in_front: int) -> Tensor | None:
        """Real tokens count on behind the virtual ones; padding counts for nothing, wherever it stands, or the virtual
        tokens would be further away from a row in a batch than from the same row alone."""
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if positions is None and mask is not None and self._takes_positions:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        if positions is None:
            return None
        positions = positions + count
        first = torch.arange(in_front, device=positions.device).expand(*positions.shape[:-1], -1)
        return torch.cat((first.to(positions.dtype), positions), dim=-1)

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.decoder.forward).parameters

    def _prompted(self, cache: Any, count: int) -> PromptedCache | None:
        """The caller's cache, made into one of both memories; None where the caller gave none."""
        if cache is None:
            return None
        if isinstance(cache, PromptedCache):
            if cache.alone != self._alone or cache.virtual != count:
                raise UsageError(
                    "This cache was begun with other memories or another adapter in use. Start it with those that "
                    "continue it."
                )
            return cache
        if not is_empty(cache):
            raise UsageError(
                f"The cache passed as past_key_values already holds {cache.get_seq_length()} tokens of one memory "
                "only. Pass an empty cache, or one returned by this model with the same memories in use."
            )
        return _prompted_cache(cache, self._empty_cache(), count, self._alone)

    def _empty_cache(self) -> Cache:
        return DynamicCache(config=cast(PreTrainedConfig, self.decoder.config))

    def _seen_from_outside(self, enhanced: Cache) -> Cache | None:
        """What the caller gets for the enhanced memory's cache. One that only brought the virtual tokens is nobody's,
        though some decoders hand back whatever cache they were given."""
        if self._outer is not None or self._given.get("use_cache") is False:
            return self._outer
        count = self._model.active_peft_config.num_virtual_tokens
        return _prompted_cache(self._empty_cache(), enhanced, count, self._alone)

    def _check_not_checkpointed(self) -> None:
        layers = self.decoder.modules()
        if self.decoder.training and any(getattr(m, "gradient_checkpointing", False) for m in layers):
            raise UnsupportedModelError(
                f"{self._model.active_peft_config.peft_type.value} reaches the layers through their cache, which "
                "gradient checkpointing takes away from them. Train without gradient checkpointing, or use "
                "PROMPT_TUNING."
            )


def _prompted_cache(cache: Cache, enhanced: Cache, virtual: int, alone: bool) -> PromptedCache:
    prompted = cast(PromptedCache, become(cache, PromptedCache))
    prompted.enhanced, prompted.virtual, prompted.alone, prompted.query = enhanced, virtual, alone, None
    return prompted


def _length(given: dict[str, Any]) -> int:
    source = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    return int(source.shape[1])


def _with_virtual_columns(mask: Any, count: int) -> Tensor | None:
    """The attention mask of the real tokens, [B, columns], with the virtual ones before them."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UsageError(
            "Virtual tokens need an attention mask of one row per sequence ([B, columns]), and this one has another "
            "form. A cache of fixed size makes such masks: leave cache_implementation out, or use 'dynamic'."
        )
    return torch.cat((mask.new_ones(len(mask), count), mask), dim=1)
