"""IMSM: a frozen and a PEFT-tuned twin of one language model, fused by a query-aware gate (arXiv 2412.17383).

Read `config`, `gate`, `memory`, `twin`, `checks`, `model`, `saving` in this order, with the paper beside them.
"""

from .config import IMSMConfig
from .gate import MemoryGate
from .model import IMSMModel, get_imsm_model

__all__ = ["IMSMConfig", "IMSMModel", "MemoryGate", "get_imsm_model"]
