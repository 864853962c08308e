"""From a base and an adapter to a siamese model: a fresh adapter, or one that plain PEFT has trained already.

Knows nothing about how the model runs.
"""

import os
from typing import Any

from peft import PeftConfig, PeftModel, TaskType
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError, UsageError
from . import existing
from .checks import check_adapter, check_base, misfit, take_adapter_out
from .config import IMSMConfig
from .model import IMSMModel
from .starts import give_start, moved_start, without_start


def get_imsm_model(
    base: PreTrainedModel | PeftModel,
    peft_config: PeftConfig | str | os.PathLike[str] | None = None,
    imsm_config: IMSMConfig | None = None,
    adapter_name: str = "default",
    *,
    train_adapter: bool = True,
    **peft_kwargs: Any,
) -> IMSMModel:
    """Wrap a causal language model: its weights are frozen, an adapter and the gate are trained beside them.

    `peft_config`: a configuration, for a fresh adapter; or the folder (or hub name) of one that plain PEFT has trained;
    or None, where `base` is a PeftModel around one. `train_adapter=False` leaves a trained adapter as it is: the gate
    alone learns. `base` is changed in place, as by `peft.get_peft_model` (a PeftModel is taken apart); `peft_kwargs`
    are that function's (`autocast_adapter_dtype`, `low_cpu_mem_usage`). Raises UnsupportedModelError when the model is
    no causal LM or the adapter does not fit it, and for saved adapters what `existing.read_from` raises.
    """
    base, peft_config, trained = existing.unpack(base, peft_config)
    if trained is None and not train_adapter:
        raise UsageError("train_adapter=False is for an adapter that is trained already; a fresh one has to be.")
    check_base(base)
    if peft_config.task_type is None:
        peft_config.task_type = TaskType.CAUSAL_LM
    check_adapter(peft_config)
    peft_config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    usual = without_start(peft_config) if moved_start(peft_config) else peft_config
    try:
        model = IMSMModel(base, usual, imsm_config or IMSMConfig(), adapter_name, **peft_kwargs)
    except (ValueError, TypeError) as error:
        take_adapter_out(base)  # PEFT may have come to some layers already
        if "gradient checkpointing" in str(error):
            raise UnsupportedModelError(f"{error} Train without it, or use another adapter.") from error
        if "arget module" not in str(error) and "target_modules" not in str(error):
            raise
        raise misfit(base, peft_config, error) from error
    if moved_start(peft_config):
        try:
            give_start(model, peft_config, adapter_name)
        except Exception:
            model.unload()
            raise
    if trained is not None:
        existing.give_weights(model, trained, adapter_name)
    if not train_adapter:
        existing.freeze_adapter(model)
    return model
