"""SLIM as a tuner of PEFT: puts the layers into a model and keeps their clusters in step with the training.

Knows nothing about training loops. What the layers compute is in `layer.py`, `router.py` and `clustering.py`.
"""

import re
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig, PeftModelForCausalLM, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks import feed_forward_layers, hidden_size_of, is_mixture
from ..decoder import decoder_of
from ..errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from ..fingerprint import BaseFingerprint, fingerprint
from .clustering import SlidingClusters
from .config import SLIM, SlimConfig
from .layer import SlimLayer
from .router import Passing, Router, Routing
from .targets import sizes_of


class SlimModel(BaseTuner):
    """The tuner: `get_slim_model` and `PeftModel.from_pretrained` make it."""

    prefix = "slim_"
    tuner_layer_cls = SlimLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    passing: Passing

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if "passing" not in self.__dict__:
            self.passing = Passing()
            self._hooks = []
            # The decoder is called without the model around it by some trainers.
            for module in {model, _decoder_of(model)}:
                self._hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passing = self.passing
        if module in passing.entered:  # the last pass was interrupted: torch calls no hook then
            passing.entered.clear()
            self._forget()
        if not passing.entered:
            passing.settled, passing.attention_mask = False, None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            passing.attention_mask = mask
        passing.entered.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        passing = self.passing
        passing.entered.pop()
        if passing.entered:
            return
        passing.attention_mask = None
        if output is None:  # it has failed
            self._forget()
            return
        for routing in passing.routings:
            routing.release()
        for clusters in passing.clusters:
            if clusters.training and clusters.track_running_stats:
                clusters.share()

    def _forget(self) -> None:
        for routing in self.passing.routings:
            routing.release()
        for clusters in self.passing.clusters:
            clusters.forget()

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # the model itself says which layers: see _prepare_model

    def _prepare_model(self, peft_config: SlimConfig, model: nn.Module) -> None:  # type: ignore[override]
        configs: list[Any] = [config for config in self.peft_config.values() if config is not peft_config]
        known = next((c.base_fingerprint for c in configs if getattr(c, "base_fingerprint", None)), None)
        own = fingerprint(model) if known is None else BaseFingerprint(**known)  # of a base that is adapted already
        recorded = peft_config.base_fingerprint
        if recorded is not None and (differences := own.differences(_read(recorded))):
            raise BaseMismatchError(
                f"This SLIM adapter was made for another base than this {type(model).__name__}: they differ in "
                f"{' and '.join(differences)}. Load the base it was trained on."
            )
        peft_config.base_fingerprint = own.to_dict()
        if peft_config.target_modules is None:
            names = _in_blocks(feed_forward_layers(model), peft_config.layers_to_transform)
            peft_config.target_modules = set(names)  # type: ignore[assignment]

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SlimConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        shared = _routing_of_siblings(parent, target, adapter_name) if peft_config.router_sharing == "input" else None
        layer = target
        if not isinstance(layer, SlimLayer):
            layer = SlimLayer(target, current_key, adapter_name, hidden_size_of(self.model))
        layer.update_layer(adapter_name, peft_config, self.passing, shared)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. In training the loss it computes has the L1 term in it."""
        output = super().forward(*args, **kwargs)
        if not self.training or kwargs.get("labels") is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + self._share_of_l1(**kwargs), *output[1:])
        if isinstance(getattr(output, "loss", None), Tensor):
            output.loss = output.loss + self._share_of_l1(**kwargs)
        if _is_for_sft(output):
            output.log_probs = output.log_probs - self.l1_loss() * output.label_mask
        return output

    def l1_loss(self) -> Tensor:
        """The L1 term, μ Σ over layers and experts of ‖B‖₁ / (r·C_out) + ‖A‖₁ / (r·C_in), of the adapters in training;
        for losses that are computed outside the model."""
        terms = [
            layer.configs[name].l1_weight * layer.l1_norm(name)
            for layer in self.model.modules()
            if isinstance(layer, SlimLayer)
            for name in layer.active_adapters
            if name in layer.configs and layer.configs[name].l1_weight and layer.slim_A[name].requires_grad
            if not layer.disable_adapters
        ]
        if not terms:
            return torch.zeros((), device=next(self.model.parameters()).device)
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def _share_of_l1(self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Tensor:
        """The term, or the batch's share of it: Trainer sums the losses of the batches it accumulates, each divided by
        the labels in all of them."""
        term = self.l1_loss()
        if num_items_in_batch is None:
            return term
        return term * (labels[..., 1:] != -100).sum() / num_items_in_batch

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT."""
        super().delete_adapter(adapter_name)
        left = {m for m in self.model.modules() if isinstance(m, (SlidingClusters, Router))}
        self.passing.clusters = [clusters for clusters in self.passing.clusters if clusters in left]
        self.passing.routings = [routing for routing in self.passing.routings if routing.router in left]

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model


def _read(recorded: Any) -> BaseFingerprint:
    try:
        return BaseFingerprint(**recorded)
    except TypeError as error:
        raise DamagedFileError(
            f"base_fingerprint in adapter_config.json cannot be read ({error}). Save the adapter again."
        ) from error


def _is_for_sft(output: Any) -> bool:
    """Whether TRL's SFTTrainer will take its loss from the labels' log-probabilities. Its other trainers read them as a
    policy's, which they have to stay; what is asked for beside them tells who asks."""
    asked = [getattr(output, name, None) is not None for name in ("log_probs", "label_mask", "is_top1", "mean_logits")]
    return asked == [True, True, True, False]


def _decoder_of(model: Any) -> nn.Module:
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else None
    return cast(nn.Module, model) if decoder is None else decoder


def _in_blocks(names: list[str], blocks: list[int] | int | None) -> list[str]:
    """Those layers that are in one of the blocks: PEFT asks this of names that it completes, and these are whole.

    Raises UnsupportedModelError where there are none.
    """
    if blocks is None:
        return names
    wanted = {blocks} if isinstance(blocks, int) else set(blocks)
    numbers = {name: int(re.findall(r"\.(\d+)\.", name)[0]) for name in names}
    if not (found := [name for name in names if numbers[name] in wanted]):
        raise UnsupportedModelError(
            f"layers_to_transform is {blocks}, and the feed-forwards are in blocks {min(numbers.values())} to "
            f"{max(numbers.values())}. Name some of these."
        )
    return found


def _routing_of_siblings(parent: nn.Module, target: nn.Module, adapter_name: str) -> Routing | None:
    """The routing of a layer beside this one that reads the same input. Layers of one module with the same sizes do,
    where input and output differ (a square layer may be a projection of the output); if not, they share the router's
    weights all the same, and each input is routed by itself."""
    if is_mixture(target) or isinstance(parent, nn.ModuleList):
        return None
    sizes = sizes_of(target)
    if sizes[0] == sizes[1]:
        return None
    siblings = (m for m in parent.children() if isinstance(m, SlimLayer) and m is not target)
    return next(
        (
            m.routings[adapter_name]
            for m in siblings
            if adapter_name in m.routings and (m.in_features, m.out_features) == sizes
        ),
        None,
    )


def get_slim_model(
    base: PreTrainedModel, config: SlimConfig | None = None, adapter_name: str = "default", **peft_kwargs: Any
) -> PeftModelForCausalLM:
    """Put SLIM into a causal language model, which is frozen and changed in place: `peft.get_peft_model` for SLIM.

    The result is a PeftModel, to be trained, saved, loaded (`PeftModel.from_pretrained`) and given to `get_imsm_model`
    as any other. `peft_kwargs` are those of `peft.get_peft_model`. Raises UnsupportedModelError when the model is no
    causal LM or has none of the layers, UsageError when it carries SLIM already.
    """
    config = SlimConfig() if config is None else config
    if not isinstance(config, SlimConfig):
        raise UsageError(f"get_slim_model takes a SlimConfig, not {type(config).__name__}; peft has get_peft_model.")
    if any(isinstance(module, SlimLayer) for module in base.modules()):
        raise UsageError(
            f"This {type(base).__name__} carries SLIM already: wrapping changes a base in place. Take it out with the "
            "PeftModel's unload(), give it another adapter with add_adapter, or load the base again."
        )
    if not isinstance(base, PreTrainedModel) or not base.can_generate() or base.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(base).__name__} is no causal language model. Load the base with "
            "AutoModelForCausalLM.from_pretrained."
        )
    if config.task_type is None:
        config.task_type = TaskType.CAUSAL_LM
    try:
        return cast(PeftModelForCausalLM, get_peft_model(base, config, adapter_name, **peft_kwargs))
    except ValueError as error:  # PEFT has found none of the target modules
        raise UnsupportedModelError(f"SLIM does not fit {type(base).__name__}: {error}") from error


def register() -> None:
    """Make PEFT know SLIM by name, so that its own functions save and load it.

    PEFT's `register_peft_method` takes only names in its enum, so the name goes into the tables that it would fill.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[SLIM] = SlimConfig
    PEFT_TYPE_TO_TUNER_MAPPING[SLIM] = SlimModel
    PEFT_TYPE_TO_PREFIX_MAPPING[SLIM] = SlimModel.prefix
