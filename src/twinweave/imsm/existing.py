"""An adapter that plain PEFT has trained already, from a folder or around a base, for a new pair of memories.

Knows nothing about gates and training: it hands over a base, a configuration and weights, and says what does not fit.
"""

import os
import warnings
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ..decoder import decoder_of
from ..errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from ..fingerprint import fingerprint
from ..pretrained import local_folder
from . import saving
from .adapters import adapter_layers
from .checks import adapted_behind, base_alone, check_adapter, check_base, refuse_outside
from .starts import moved_start

if TYPE_CHECKING:
    from .model import IMSMModel

Weights = dict[str, Tensor]


def unpack(
    base: PreTrainedModel | PeftModel, peft_config: PeftConfig | str | os.PathLike[str] | None
) -> tuple[PreTrainedModel, PeftConfig, "Weights | Path | None"]:
    """What `get_imsm_model` is given, as a base, a configuration, and where a trained adapter's weights are (None: the
    adapter is fresh). Raises UsageError for too much or too little, and what `taken_from` and `read_from` raise."""
    if isinstance(base, PeftModel):
        if peft_config is not None:
            raise UsageError(
                f"This {type(base).__name__} brings its own adapter; leave peft_config out, or give the base alone."
            )
        return taken_from(base)
    if peft_config is None:
        raise UsageError("There is no adapter: give a PEFT configuration, the folder of a trained one, or a PeftModel.")
    if isinstance(peft_config, PeftConfig):
        return base, peft_config, None
    folder, config = read_from(peft_config, base)
    return base, config, folder


def taken_from(model: PeftModel) -> tuple[PreTrainedModel, PeftConfig, Weights]:
    """The base, the adapter's configuration and its weights out of a PeftModel, which is of no use afterwards.

    Raises UsageError for a model that cannot be taken apart; it is left as it was.
    """
    kind = type(model).__name__
    if hasattr(model, "gate"):
        raise UsageError(f"This {kind} has a gate already. Train it as it is.")
    if len(model.peft_config) != 1:
        names = ", ".join(model.peft_config)
        raise UsageError(f"This {kind} carries {len(model.peft_config)} adapters ({names}); delete all but one.")
    if any(getattr(layer, "merged", False) for layer in adapter_layers(model)):
        raise UsageError(f"The adapter is merged into the base of this {kind}. Call unmerge_adapter() first.")
    ((name, config),) = model.peft_config.items()
    config = deepcopy(config)
    config.inference_mode = False
    check_trained(config)
    base: Any = model.get_base_model()
    refuse_outside(adapted_behind(decoder_of(base) or base, base))  # before the model is of no use
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {key: tensor.detach().clone() for key, tensor in weights.items()}
    return base_alone(model), config, weights


def read_from(path: str | os.PathLike[str], base: PreTrainedModel) -> tuple[Path, PeftConfig]:
    """The folder of a saved adapter (a hub name is fetched) and its configuration, checked against `base`.

    Raises DamagedFileError for missing, cut or pickled files, and BaseMismatchError where the folder records a
    fingerprint (IMSM's own do) that is not the base's. Plain PEFT records a name only: another one is a warning.
    """
    check_base(base)
    folder = local_folder(path, None)
    saving.check_adapter_files(folder)
    config = saving.read_adapter_config(folder)
    check_trained(config)
    if (folder / saving.CONFIG_NAME).is_file():
        saving.check_recorded_base(folder, fingerprint(base))
    recorded, given = config.base_model_name_or_path, base.__dict__.get("name_or_path")
    if recorded and given and Path(recorded).name != Path(given).name:
        warnings.warn(
            f"The adapter in {folder} was trained on '{recorded}' and goes onto '{given}'. If these are different "
            "models of one shape, nothing else will tell.",
            stacklevel=4,
        )
    if given and given != recorded:
        config.revision = None  # it is the recorded base's
    config.inference_mode = False  # as every saved one says
    return folder, config


def check_trained(config: PeftConfig) -> None:
    """Raise UnsupportedModelError for a trained adapter that cannot be taken over."""
    if config.task_type is None:
        config.task_type = TaskType.CAUSAL_LM
    check_adapter(config)
    if start := moved_start(config):
        raise UnsupportedModelError(
            f"This adapter began with init_lora_weights={start!r}, so it belongs to a base without its start. Save it "
            "with PEFT's path_initial_model_for_weight_conversion: that is an adapter of the base as it is."
        )
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedModelError(
            f"{kind} adds virtual tokens, and a trained prompt cannot be taken over. Give its "
            "configuration, for a fresh one, or an adapter inside the layers."
        )


def give_weights(model: "IMSMModel", source: Weights | Path, adapter_name: str) -> None:
    """Put trained weights into the fresh adapter of `model`. Raises BaseMismatchError for weights of another shape and
    DamagedFileError for missing ones; the base is then as it was before."""
    where = f"The adapter in {source}" if isinstance(source, Path) else "The adapter"
    try:
        if isinstance(source, Path):
            result = super(type(model), model).load_adapter(str(source), adapter_name, is_trainable=True)
        else:
            result = set_peft_model_state_dict(model, source, adapter_name=adapter_name)
    except (RuntimeError, ValueError) as error:
        base = model.unload()
        raise BaseMismatchError(
            f"{where} was made for another base than this {type(base).__name__} "
            f"({' '.join(str(error).split()):.200}…). Load the base it was trained on."
        ) from error
    if isinstance(source, Path) and (missing := saving.not_loaded(model, result.missing_keys)):
        model.unload()
        raise DamagedFileError(f"{where} lacks {len(missing)} of its tensors, the first being {missing[0]}.")


def freeze_adapter(model: "IMSMModel") -> None:
    """Leave the gate as all there is to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("gate."))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"fusion='{model.imsm_config.fusion}' has no gate to train, and the adapter is not to be trained either."
        )
