"""twinweave: teach a language model something new without erasing what it knew."""

from .errors import TwinweaveError
from .imsm import IMSMConfig, IMSMModel, get_imsm_model

__version__ = "0.1.0"

__all__ = ["IMSMConfig", "IMSMModel", "TwinweaveError", "__version__", "get_imsm_model"]
