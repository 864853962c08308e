"""IMSM: a frozen and a PEFT-tuned twin of one language model, fused by a query-aware gate (arXiv 2412.17383).

Read `config`, `gate`, `memory`, `twin`, `checks`, `model`, `wrap`, `saving` in this order, with the paper beside them;
then `guard` and `fitting`, which are not in the paper. The rest is about speed (`stacked`, `trial`, `labels`) and about
kinds of bases and adapters (`anatomy`, `cache`, `quantized`, `existing`, `starts`, `switches`, `virtual`).
"""

from .config import IMSMConfig
from .fitting import fit_guard
from .gate import MemoryGate
from .guard import DomainGuard, GuardSettings
from .model import IMSMModel
from .wrap import get_imsm_model

__all__ = ["DomainGuard", "GuardSettings", "IMSMConfig", "IMSMModel", "MemoryGate", "fit_guard", "get_imsm_model"]
