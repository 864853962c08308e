"""Which models and adapters can carry two memories, and what to tell those who bring another.

Knows nothing about how the memories are woven.
"""

from typing import Any, cast

from peft import PeftConfig, PeftModel, PeftType, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..decoder import check_causal_lm
from ..errors import UnsupportedModelError, UsageError
from .adapters import adapter_layers
from .starts import START, moved_start

# Models that change something of themselves while they run.
_STATEFUL = {
    "rwkv": "divides its own weights in place whenever it goes from training to evaluation, and both memories need "
    "them as they are. Load the base with rescale_every=0, which gives the same results.",
    "recurrent_gemma": "keeps what it has read in its own modules instead of a cache, where there is room for one "
    "memory only. Take a model whose state is in its cache.",
}


def check_base(base: Any) -> None:
    """Raise UnsupportedModelError unless `base` is a transformers causal LM: decoder, then head, able to generate."""
    check_causal_lm(base, "its memories cannot be woven", bare=False)
    if base.config.model_type in _STATEFUL and getattr(base.config, "rescale_every", 1) > 0:
        raise UnsupportedModelError(f"{type(base).__name__} {_STATEFUL[base.config.model_type]}")
    if adapter_layers(base):
        raise UnsupportedModelError(
            f"This {type(base).__name__} already carries an adapter, so its frozen weights are not the base's alone. "
            "Wrapping changes a base in place: load it again to wrap it again."
        )


def check_adapter(peft_config: PeftConfig) -> None:
    """Raise UnsupportedModelError for adapters that change the base's own weights, or cannot be one of two memories."""
    if peft_config.peft_type == PeftType.XLORA:
        raise UnsupportedModelError(
            "XLORA runs the whole model twice, once to choose among finished adapters, and refuses a cache, so it "
            "cannot be one of two memories. Use one of its adapters, or train a new one."
        )
    if peft_config.task_type != TaskType.CAUSAL_LM:
        raise UnsupportedModelError(
            f"The adapter's task_type is {peft_config.task_type!r}; a causal model needs task_type='CAUSAL_LM'."
        )
    if str(getattr(peft_config, "init_lora_weights", True)).lower() == "loftq":
        raise UnsupportedModelError(
            "init_lora_weights='loftq' puts a quantised copy in the place of the base's weights, and the base must "
            "stay as it is. Quantise the base when it is loaded, and use True."
        )
    for name in ("kasa_config", "layer_replication"):
        if getattr(peft_config, name, None) is not None:
            raise UnsupportedModelError(
                f"{name} changes the base itself (its weights, or which blocks it has), and the base must stay as it "
                "is. Leave it out."
            )
    bias = getattr(peft_config, "bias", "none")
    if bias not in ("none", None, False):
        raise UnsupportedModelError(
            f"bias={bias!r} trains biases of the base itself, and the base must stay as it is. Use bias='none'."
        )


def check_plain_adapter(peft_config: PeftConfig) -> None:
    """Raise UnsupportedModelError for adapters that only the IMSM methods can be trained with: plain PEFT's logits
    have columns for virtual tokens, and it makes some starts out of the base's weights."""
    check_adapter(peft_config)
    if start := moved_start(peft_config):
        raise UnsupportedModelError(
            f"init_lora_weights={start!r} moves part of the base's weights into the adapter, and without IMSM the base "
            "must stay as it is too. Use True, 'gaussian', 'eva' or 'orthogonal'."
        )
    if peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{_name_of(peft_config)} adds virtual tokens to the sequence, which only the IMSM methods can be trained "
            "with here. Use one of those, or an adapter inside the layers (LoRA, DoRA, IA3, AdaLoRA, OFT, …)."
        )


def check_goes_on(peft_config: PeftConfig) -> None:
    """Raise UnsupportedModelError for a saved adapter that cannot be trained further: only its result was saved."""
    made = peft_config.peft_type in (PeftType.P_TUNING, PeftType.CPT) or getattr(
        peft_config, "prefix_projection", False
    )
    if made:
        raise UnsupportedModelError(
            f"A saved {_name_of(peft_config)} holds what its encoder made, not the encoder, so it cannot be trained "
            "on. Load it with is_trainable=False; a run that was stopped goes on from its own checkpoints."
        )


def adapted_behind(decoder: nn.Module, base: nn.Module) -> list[str]:
    """The names of adapted layers outside the decoder: they would read the woven state, and neither memory could be
    had alone."""
    shared = set(adapter_layers(base)) - set(adapter_layers(decoder))
    return [name for name, module in base.named_modules() if module in shared]


def refuse_outside(names: list[str]) -> None:
    """Raise UnsupportedModelError where there are such names: see `adapted_behind`."""
    if names:
        raise UnsupportedModelError(
            f"The adapter changes {', '.join(names)}, which both memories share. Leave it out of target_modules, "
            "modules_to_save and trainable_token_indices."
        )


def take_adapter_out(base: nn.Module, names: list[str] | None = None) -> None:
    """Put the base's own layers back where adapted ones are: those of the names, or all."""
    adapted = set(adapter_layers(base))
    for name, module in list(base.named_modules()):
        if module in adapted and (names is None or name in names):
            own = ("original_module", "base_layer", "model")
            base.set_submodule(name, next(getattr(module, n) for n in own if hasattr(module, n)))


def base_alone(model: PeftModel) -> PreTrainedModel:
    """The base out of `model`, with its own modules: PEFT's unload leaves trained copies in the place of some."""
    base: Any = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)
    if isinstance(model.base_model, BaseTuner):
        return cast(PreTrainedModel, model.base_model.unload())
    take_adapter_out(base)
    return cast(PreTrainedModel, base)


def check_added(peft_config: PeftConfig, adapter_name: str) -> None:
    """Raise UnsupportedModelError or UsageError for what cannot be added beside a first adapter."""
    if adapter_name == START:
        raise UsageError(f"The name '{START}' is taken. Give the adapter another one.")
    if peft_config.task_type is None:
        peft_config.task_type = TaskType.CAUSAL_LM
    check_adapter(peft_config)
    if start := moved_start(peft_config):
        raise UnsupportedModelError(
            f"init_lora_weights={start!r} would move part of the base's weights, and only a model's first adapter can "
            "be started so without. Use True."
        )


def misfit(base: PreTrainedModel, peft_config: PeftConfig, error: Exception) -> UnsupportedModelError:
    """The error for an adapter whose target modules PEFT cannot find in, or adapt in, `base`."""
    names = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear)})
    return UnsupportedModelError(
        f"The adapter's target modules {_shown(getattr(peft_config, 'target_modules', None))} do not fit "
        f"{type(base).__name__}: {error} Its linear layers are called {', '.join(names)}; name some of them in "
        "target_modules, or use target_modules='all-linear'."
    )


def _name_of(peft_config: PeftConfig) -> str:
    kind = peft_config.peft_type
    return str(getattr(kind, "value", kind))


def _shown(modules: Any) -> str:
    return repr(sorted(modules)) if isinstance(modules, (set, list, tuple)) else repr(modules)
