"""IMSMModel: a PeftModelForCausalLM whose last hidden state is woven from two memories of one set of weights.

Knows nothing about training loops, data or evaluation. The arithmetic is in `gate.py`, the query and the caches in
`memory.py`, the two passes in `twin.py`, files in `saving.py`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig, PeftModelForCausalLM
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from ..decoder import decoder_of, with_last_hidden_state
from ..errors import UsageError, unknown_name
from ..fingerprint import fingerprint
from . import card, saving
from .adapters import adapters_off, dropout_off, statistics_off
from .anatomy import examine
from .cache import TwinCache, is_empty, length_of
from .checks import adapted_behind, base_alone, check_added, check_goes_on, refuse_outside, take_adapter_out
from .config import IMSMConfig
from .gate import MemoryGate
from .guard import DomainGuard
from .labels import (
    FrozenStates,
    LabelPlaces,
    check_frozen,
    compared,
    find_places,
    hand_on,
    read_frozen,
    trim,
    weave_at_labels,
)
from .output import with_entries
from .own_cache import without_own_cache
from .quantized import keep_differentiable
from .starts import START, activate, load_joined, save_joined
from .switches import follow_labels, make_switchable
from .twin import Plan, Twin
from .virtual import PromptedCache, PromptedTwin
from .weave import Call, weave

SUPPORTED_PEFT_TASKS["text-generation"].append("IMSMModel")  # or `pipeline` complains, though it works

Memory = Literal["original", "enhanced", "interwoven"]
Rehearse = Literal["gate", "both"]


class IMSMModel(PeftModelForCausalLM):
    """The siamese model. Made by `get_imsm_model` or `IMSMModel.from_pretrained`.

    Attributes: `gate` (MemoryGate), `imsm_config`, `base_fingerprint`; `retention`: a float added to the gate's logits,
    0 as trained, +inf the original memory, -inf the enhanced one; and `guard`: a DomainGuard, which moves the gate to
    the original memory for queries unlike those of the training data (in evaluation mode only), or None, as published.
    `fit_guard` makes one.
    """

    guard: DomainGuard | None

    def __init__(
        self,
        base: PreTrainedModel,
        peft_config: PeftConfig,
        imsm_config: IMSMConfig,
        adapter_name: str = "default",
        **peft_kwargs: Any,
    ) -> None:
        keep_differentiable(base)
        base_fingerprint = fingerprint(base)  # before the adapter adds its own parameters
        anatomy = examine(base, decoder_of(base) or base)
        decoder, head = anatomy.decoder, base.get_output_embeddings()
        super().__init__(base, peft_config, adapter_name=adapter_name, **peft_kwargs)
        if outside := adapted_behind(decoder, base):
            take_adapter_out(base)
            refuse_outside(outside)
        self.imsm_config = imsm_config
        self.base_fingerprint = base_fingerprint
        self.retention = float(imsm_config.retention)
        self.gate = MemoryGate(anatomy.width, imsm_config).to(head.weight.device)
        self.register_module("guard", None)
        self._memory: Memory = "interwoven"
        self._call = Call()
        self._twin = self._twin_of(decoder)
        follow_labels(self.base_model, self)
        self._shifted = anatomy.shifted
        self._hooks = (
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        )

    def _twin_of(self, decoder: torch.nn.Module, plan: Plan = "auto") -> Twin:
        if self._is_prompt_learning:
            return PromptedTwin(self, decoder, plan)
        make_switchable(decoder)
        return Twin(decoder, plan)

    # --- the weave ----------------------------------------------------------------------------------------------

    def _before_decoder(self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._twin.idle()
        args, kwargs = self._twin.named(args, kwargs)
        cache, prompted = kwargs.get(self._twin.cache_name), self._prompted()
        if self._call.places is not None:
            self._prepare_labels(self._call, self._call.places, args, kwargs)
            if self._call.without_graph:
                torch.set_grad_enabled(False)  # until the decoder's end
        elif self._memory == "interwoven":
            self._twin.begin(args, kwargs)
        elif isinstance(cache, TwinCache) and not (prompted and isinstance(cache, PromptedCache)):
            raise UsageError(
                f"This cache holds both memories and cannot be continued with use_memory('{self._memory}'). "
                "Start that memory with a cache of its own."
            )
        return prompted.enter(args, kwargs, self._call.task_ids, self._memory == "enhanced") if prompted else None

    def _prompted(self) -> PromptedTwin | None:
        """The twin, where the decoder's own run has virtual tokens in it."""
        return self._twin if isinstance(self._twin, PromptedTwin) and self._memory != "original" else None

    def _after_decoder(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        args, kwargs = self._twin.named(args, kwargs)
        if prompted := self._prompted():
            args, (kwargs, output) = (), prompted.leave(output)
        if self._call.places is not None:
            if self._call.without_graph:
                torch.set_grad_enabled(True)
            return self._at_labels(self._call, self._call.places, args, kwargs, output)
        if self._memory != "interwoven":
            return output
        original, enhanced, cache = self._twin.memories(args, kwargs, output)
        guard = self._guard_of(self._call)
        fused = weave(self.gate, original, enhanced, cache, self._call, self.retention, kwargs, guard)
        return with_last_hidden_state(without_own_cache(output), fused)

    def _prepare_labels(self, call: Call, places: LabelPlaces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The frozen pass of a call that wants label positions only: first, while no activations are kept, unless it
        can leave out what the tuned pass computes."""
        needed = self._memory == "interwoven" and call.frozen is None and not call.only_frozen
        if needed and not self._twin.share_trunk():
            call.frozen = self._frozen_at_labels(places, args, kwargs)

    def _frozen_at_labels(self, places: LabelPlaces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FrozenStates:
        alone = {"use_cache": False, self._twin.cache_name: None}
        kwargs = kwargs | {name: value for name, value in alone.items() if name in kwargs}
        return read_frozen(self._twin.frozen_pass(args, kwargs)[0], places)

    def _at_labels(
        self, call: Call, places: LabelPlaces, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The decoder's output with what the head has to see for the labels: [1, N + 1, d]."""
        states = output[0]
        if call.only_frozen:
            call.frozen = read_frozen(states, places)
            return hand_on(output, states[:1, :0])
        if self._memory != "interwoven":
            return hand_on(output, places.gather(states).unsqueeze(0))
        if call.frozen is None:
            call.frozen = self._frozen_at_labels(places, args, kwargs)
        guard = self._guard_of(call)
        # in rehearsal the adapter answers for the enhanced memory alone: what the gate makes of it teaches the gate
        read = states.detach() if call.rehearse else states
        fused, share = weave_at_labels(self.gate, places, call.frozen, read, self.retention, guard)
        if call.keep_gate:
            call.gate = share
        if call.rehearse:
            original = call.frozen.states.unsqueeze(0).to(fused.dtype)
            enhanced = [] if call.rehearse == "gate" else [places.gather(states).unsqueeze(0)]
            fused = torch.cat((fused, original, *enhanced))
        return hand_on(output, fused)

    def _guard_of(self, call: Call) -> DomainGuard | None:
        """The guard, unless the call is to teach the gate (what the guard does for it, it would not learn), or an
        infinite retention has chosen one memory."""
        return None if self.training or call.rehearse or math.isinf(self.retention) else self.guard

    @contextmanager
    def _calling(self, call: Call) -> Iterator[Call]:
        """Everything said about one call lives exactly as long as the call, whatever happens in it."""
        outer, self._call = self._call, call
        try:
            yield call
        finally:
            self._call = outer

    @property
    def trains_adapter(self) -> bool:
        """Whether anything but the gate learns."""
        return any(p.requires_grad for name, p in self.named_parameters() if not name.startswith("gate."))

    def train(self, mode: bool = True) -> "IMSMModel":
        """As in torch; an adapter that does not learn is a constant, also in training: it runs without dropout."""
        super().train(mode)
        if mode and not self.trains_adapter:
            self._twin.decoder.eval()
        return self

    # --- use ----------------------------------------------------------------------------------------------------

    @property
    def memory(self) -> Memory:
        """The memory that answers now; `use_memory` changes it."""
        return self._memory

    @contextmanager
    def use_memory(self, memory: Memory) -> Iterator["IMSMModel"]:
        """Within the block, answer from one memory: "original" (the base, bit for bit), "enhanced" (plain PEFT), or
        "interwoven" (both, the default)."""
        if memory not in get_args(Memory):
            raise UsageError(unknown_name("memory", str(memory), get_args(Memory)))
        outer, self._memory = self._memory, memory
        # with off=False inside another memory's block, the adapter that it switched off is on again
        layers = self._twin.layers if "original" in (memory, outer) else []
        try:
            with adapters_off(layers, off=memory == "original"):
                yield self
        finally:
            self._memory = outer

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        query_mask: Tensor | None = None,
        output_gate: bool = False,
        logits_at_labels: bool = False,
        frozen: FrozenStates | None = None,
        rehearse: Rehearse | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, woven.

        `input_ids`, `attention_mask`, `labels`: [B, T] as in transformers. The query of an answer is what stands before
        its labels; `query_mask` (bool or int [B, T]) says it explicitly and wins; without either every token up to a
        position counts. `output_gate` adds `out.gate`, [B, T, d]: the share of the original memory.

        `logits_at_labels`, for training: gate and head run only where one of the N labels is predicted, so `out.logits`
        is [1, N, V] and `out.gate` [1, N, d], in row-major order; loss and gradients are the same, and
        `out.hidden_states` are the enhanced memory's. `frozen`: what `frozen_states` gave for the same batch; no
        frozen pass is run.

        `rehearse`: `out.loss` becomes the divergence KL(original ‖ interwoven) of the next-token distributions at the N
        label positions, in nats per token, and only the gate learns from it ("gate"); or that and KL(original ‖
        enhanced), from which only the adapter learns ("both"; `out.divergences` has the two). The labels say where, and
        their values count for nothing.
        """
        source = input_ids if input_ids is not None else inputs_embeds
        if query_mask is not None and source is not None and query_mask.shape[0] != source.shape[0]:
            raise UsageError(
                f"query_mask has {query_mask.shape[0]} rows and the input {source.shape[0]}; give both [B, T]."
            )
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        call = Call(attention_mask=mask, query_mask=query_mask, labels=labels, keep_gate=output_gate, frozen=frozen)
        if self._is_prompt_learning:
            call.task_ids = kwargs.pop("task_ids", None)
        if logits_at_labels or rehearse:
            call.places = _places(source, labels, mask, query_mask, self._shifted, kwargs.get(self._twin.cache_name))
            labels = call.places.targets if not rehearse else None
            if frozen is not None:
                check_frozen(frozen, call.places, self.gate.hidden_size)
        elif frozen is not None:
            raise UsageError("frozen holds states at label positions: it goes with logits_at_labels=True.")
        with self._calling(call), self._rehearsing(call, rehearse):
            output = self._forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                **kwargs,
            )
        if call.places is not None:
            output = trim(output, call.places.count)
        if rehearse:
            output = compared(output)
        if not output_gate:
            return output
        shape = (1, call.places.count) if call.places is not None else source.shape[:2]  # type: ignore[union-attr]
        gate = call.gate if call.gate is not None else self._constant_gate(shape)
        if isinstance(output, tuple):
            return (*output, gate)
        return with_entries(output, gate=gate)

    def _forward(self, **kwargs: Any) -> Any:
        """PEFT's forward. Where it would add virtual tokens it is passed by: they are added at the decoder."""
        return self.base_model(**kwargs) if self._is_prompt_learning else super().forward(**kwargs)

    @contextmanager
    def _rehearsing(self, call: Call, rehearse: Rehearse | None) -> Iterator[None]:
        """What is different about a call that rehearses: both memories reach the head, and for the gate's rehearsal
        the decoder's passes are constants, as at inference: no graph, no dropout."""
        if rehearse is None:
            yield
            return
        if rehearse not in get_args(Rehearse):
            raise UsageError(unknown_name("rehearse", str(rehearse), get_args(Rehearse)))
        if self._memory != "interwoven":
            raise UsageError(f"use_memory('{self._memory}') has one memory, and rehearsal compares two.")
        graph = torch.is_grad_enabled()
        call.rehearse, call.without_graph = rehearse, graph and rehearse == "gate"
        constant = dropout_off(self._twin.decoder) if rehearse == "gate" else nullcontext()
        with statistics_off(self._twin.decoder), constant:
            try:
                yield
            finally:
                torch.set_grad_enabled(graph)

    def _constant_gate(self, shape: Sequence[int]) -> Tensor:
        """With one memory in use its share is all or nothing."""
        share = 1.0 if self._memory == "original" else 0.0
        return torch.full((*shape, self.gate.hidden_size), share, device=self.get_output_embeddings().weight.device)

    @torch.no_grad()
    def frozen_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> FrozenStates:
        """The original memory of a batch, as `forward` takes it: one frozen pass and nothing else.

        All arguments are [B, T]. The result has the states at the N label positions and the M query means.
        """
        places = _places(input_ids, labels, attention_mask, query_mask, self._shifted)
        call = Call(places=places, only_frozen=True)
        with self.use_memory("original"), dropout_off(self), self._calling(call):
            self._forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        assert call.frozen is not None
        return call.frozen

    def generate(self, *args: Any, query_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate` with every standard option; the prompt (or `query_mask` within it) is the query.

        A returned cache can be continued: the query is then everything before the new answer.
        """
        named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = next((p for p in (*args[:1], *named) if p is not None), None)
        call = Call(query_mask=query_mask)
        if prompt is None:
            call.prompt_columns = 1  # generate starts from BOS by itself
        else:
            if kwargs.get("attention_mask") is None and not prompt.is_floating_point():
                kwargs["attention_mask"] = self._mask_of_prompt(prompt, kwargs)
            call.attention_mask = kwargs.get("attention_mask")
            call.prompt_columns = _prompt_columns(prompt, call.attention_mask, kwargs.get(self._twin.cache_name))
            if query_mask is not None and query_mask.shape != (prompt.shape[0], call.prompt_columns):
                raise UsageError(
                    f"query_mask is {list(query_mask.shape)}; the prompt, with what is in the cache, is "
                    f"{[prompt.shape[0], call.prompt_columns]}. Give it that shape."
                )
        if self._is_prompt_learning:
            call.task_ids = kwargs.pop("task_ids", None)
        if self._memory == "interwoven" and self._twin.without_cache:
            kwargs["use_cache"] = False  # or transformers hands on the last token alone
        with self._calling(call):
            own: Any = self.base_model if self._is_prompt_learning else super()
            return own.generate(*args, **kwargs)

    def _mask_of_prompt(self, prompt: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The attention mask that transformers would infer (padding known, never an EOS), made visible to the gate."""
        config = kwargs.get("generation_config")

        def setting(name: str) -> Any:  # an argument, then the caller's config, then the model's
            values = (kwargs.get(name), getattr(config, name, None), getattr(self.generation_config, name))
            return next((value for value in values if value is not None), None)

        pad, eos = setting("pad_token_id"), setting("eos_token_id")
        eos_ids = eos if isinstance(eos, (list, tuple)) else [eos]
        if pad is None or pad in eos_ids or kwargs.get(self._twin.cache_name) is not None:
            return None
        return prompt.ne(pad).long()

    @property
    def plan(self) -> Plan:
        """How inference runs the two passes: "stacked" (one pass over the rows of both, which reads the weights once),
        "two_pass" (half the activations at a time), or "auto": stacked in generation, two passes elsewhere. The results
        are the same up to rounding."""
        return self._twin.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if plan not in get_args(Plan):
            raise UsageError(unknown_name("plan", str(plan), get_args(Plan)))
        self._twin.plan = plan

    @contextmanager
    def _changing_adapters(self) -> Iterator[None]:
        """The twin knows the adapted layers by heart."""
        self._twin.remove()
        try:
            yield
        finally:
            self._twin = self._twin_of(self._twin.decoder, self._twin.plan)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """PEFT's `add_adapter`, of adapters that leave the base as it is."""
        if "_twin" not in self.__dict__:  # PEFT's constructor adds the first adapter of prompt learning
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
            return
        check_added(peft_config, adapter_name)
        base = self.get_base_model()
        with self._changing_adapters():
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
            if outside := adapted_behind(self._twin.decoder, base):
                super().delete_adapter(adapter_name)
                take_adapter_out(base, outside)
                refuse_outside(outside)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's `delete_adapter`."""
        started = START in self.peft_config and adapter_name == next(iter(self.peft_config))
        with self._changing_adapters():
            super().delete_adapter(adapter_name)
            if started:
                super().delete_adapter(START)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's `set_adapter`."""
        with self._changing_adapters():
            super().set_adapter(*args, **kwargs)
            if START in self.peft_config and self.active_adapter == next(iter(self.peft_config)):
                activate(self, self.active_adapter)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's `disable_adapter`: within the block, the base."""
        with self.use_memory("original"):
            yield

    def unload(self) -> PreTrainedModel:
        """The base model alone again, without adapter, gate and weave; this model is of no use afterwards."""
        self._twin.remove()
        for hook in self._hooks:
            hook.remove()
        return base_alone(self)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it would change the base's weights, and the gate chooses anew at every token."""
        raise UsageError(
            "An IMSM model cannot be merged into its base: the gate chooses between the two at every token. To merge "
            "the enhanced memory alone, load the saved folder with PeftModel.from_pretrained."
        )

    merge_and_unload = merge_adapter

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the adapter as plain PEFT does, and `imsm_config.json` + `imsm_gate.safetensors` beside it, and
        `imsm_guard.safetensors` where there is a guard.

        `kwargs` are PEFT's. No base weights are written. Each file appears whole or not at all.
        """
        own = partial(save_joined, self) if START in self.peft_config else super().save_pretrained
        saving.save(self, save_directory, own, **kwargs)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `load_adapter`; for the active adapter, gate and guard saved beside it are loaded with it."""
        config = self.peft_config.get(adapter_name)
        if config is not None and not config.inference_mode:
            check_goes_on(config)
        if config is not None and START in self.peft_config and adapter_name == next(iter(self.peft_config)):
            result = load_joined(self, model_id, adapter_name)
        else:
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        if adapter_name in self.active_adapters:
            saving.load_gate_if_present(self, model_id)
            saving.load_guard_if_present(self, model_id)
        return result

    def create_or_update_model_card(self, output_dir: str) -> None:
        """PEFT's model card, with what this model is and how it is loaded."""
        super().create_or_update_model_card(output_dir)
        card.write(output_dir)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """The last step of `push_to_hub`, which has put a card of transformers' in the place of this model's."""
        tags = card.tags_in(working_dir)
        super().create_or_update_model_card(str(working_dir))
        card.write(working_dir, repo_id, tags)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: Any,
        base: PreTrainedModel | str | None = None,
        *,
        is_trainable: bool = False,
        allow_base_mismatch: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "IMSMModel":
        """Load a saved model onto its base.

        `path`: a directory written by `save_pretrained`, or a hub name (`revision` is the saved model's). `base`: the
        base model, its name, or None for the recorded name at its recorded revision; `kwargs` go to its
        `from_pretrained`. Raises BaseMismatchError for another base unless `allow_base_mismatch`, and DamagedFileError
        for files that are missing, truncated or pickled.
        """
        return saving.load(cls, path, base, is_trainable, allow_base_mismatch, revision, kwargs)


def _places(
    source: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    query_mask: Tensor | None,
    shifted: bool,
    cache: Any = None,
) -> LabelPlaces:
    """See `find_places`. Raises UsageError for what cannot go with it."""
    if labels is None:
        raise UsageError("Without labels there are no label positions. Pass labels, or leave logits_at_labels out.")
    if source is not None and source.shape[:2] != labels.shape:
        raise UsageError(f"labels are {list(labels.shape)} and the input {list(source.shape[:2])}; give both [B, T].")
    if isinstance(cache, Cache) and not is_empty(cache):
        raise UsageError("logits_at_labels is for training on whole rows. Leave it out to go on from a cache.")
    return find_places(labels, mask, query_mask, shifted)


def _prompt_columns(prompt: Tensor, mask: Tensor | None, cache: Any) -> int:
    """How many columns the query of this `generate` spans, those already in the cache included."""
    columns = max(prompt.shape[1], mask.shape[1] if mask is not None else 0)
    seen = length_of(cache) if isinstance(cache, Cache) else 0
    return columns if columns > seen else seen + prompt.shape[1]  # only the new tokens were passed
