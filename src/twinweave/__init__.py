"""twinweave: teach a language model something new without erasing what it knew."""

from .cmt import CMTConfig, MemoryBank, MemoryModel
from .errors import TwinweaveError
from .genadapter import AdapterState, GenerativeAdapter, GenerativeAdapterConfig
from .imsm import GuardSettings, IMSMConfig, IMSMModel, fit_guard, get_imsm_model
from .slim import SlimConfig, get_slim_model

__version__ = "0.1.0"

__all__ = [
    "AdapterState",
    "CMTConfig",
    "GenerativeAdapter",
    "GenerativeAdapterConfig",
    "GuardSettings",
    "IMSMConfig",
    "IMSMModel",
    "MemoryBank",
    "MemoryModel",
    "SlimConfig",
    "TwinweaveError",
    "__version__",
    "fit_guard",
    "get_imsm_model",
    "get_slim_model",
]
