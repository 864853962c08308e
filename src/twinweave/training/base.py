"""Loading the base model and its tokenizer as a recipe asks for them. Knows nothing about methods or tasks."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data import check_tokenizer
from ..errors import DamagedFileError, UnsupportedModelError
from ..imsm.quantized import keep_differentiable
from .recipe import BaseSection


def load_base(section: BaseSection) -> PreTrainedModel:
    """The base model, frozen by whoever wraps it, on the accelerator if there is one."""
    dtype = getattr(torch, section.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _location(section),
            revision=section.revision or "main",
            dtype=dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            **_quantized(section),
        )
    except ImportError as error:
        raise UnsupportedModelError(
            f"The base '{section.name}' needs a package that is missing here: {_first_line(error)}."
        ) from error
    except SafetensorError as error:
        raise DamagedFileError(
            f"The weights of the base '{section.name}' are damaged or cut short ({_first_line(error)}). Copy them "
            "again from where they came."
        ) from error
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"The base '{section.name}' cannot be loaded as a causal language model: {_first_line(error)}. Give a "
            "local directory or a hub name of one."
        ) from error
    keep_differentiable(model)
    if section.quantization is None:
        model.to(default_device())  # type: ignore[arg-type]  # the stub wants a model where a device belongs
    return model.eval()


def _quantized(section: BaseSection) -> dict[str, Any]:
    """How `from_pretrained` makes a base of 8 or 4 bits, which it has to put on its device itself."""
    if section.quantization is None:
        return {}
    settings = BitsAndBytesConfig(
        load_in_8bit=section.quantization == "8bit",
        load_in_4bit=section.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, section.dtype),
    )
    return {"quantization_config": settings, "device_map": {"": default_device()}}


def load_tokenizer(section: BaseSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with an EOS and a padding token, or UnsupportedModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _location(section), revision=section.revision or "main", trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"The base '{section.name}' has no tokenizer: {_first_line(error)}.") from error
    check_tokenizer(tokenizer, pad_token=section.pad_token)
    return tokenizer


def load_window(section: BaseSection) -> int:
    """How many tokens the base can read at once; a very large number where its config does not say."""
    try:
        config = AutoConfig.from_pretrained(
            _location(section), revision=section.revision or "main", trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"The base '{section.name}' has no readable config: {_first_line(error)}."
        ) from error
    return window_of(config)


def window_of(config: Any) -> int:
    """How many tokens a model of that config can read at once; a very large number where it does not say."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    return own if isinstance(own, int) and own > 0 else 2**30


def default_device() -> torch.device:
    """The accelerator (that of this process, where several share a machine), or the CPU where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and (local := os.environ.get("LOCAL_RANK")):
        return torch.device(accelerator.type, int(local) % torch.accelerator.device_count())
    return accelerator or torch.device("cpu")


def free_memory() -> None:
    """Give back what models that went out of use still hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _location(section: BaseSection) -> str:
    if section.name == "pocket":
        from ..pocket import base_dir

        return str(base_dir())
    looks_local = section.name.startswith((".", "/", "~")) or section.name.count("/") > 1
    if looks_local and not Path(section.name).expanduser().is_dir():
        raise UnsupportedModelError(f"There is no base directory {section.name}. Check the recipe's `base`.")
    return str(Path(section.name).expanduser()) if looks_local else section.name


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
