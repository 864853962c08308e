"""What people use today against forgetting, to be compared with: terms of the loss, and other ways to adapt.

Read `rehearsed`, `distillation`, `weight_change`, `penalties` (terms), then `own_adapters`, `corda` (adapters of their
own). Knows nothing about the gate, the recipe, training loops and scores.
"""

from .corda import corda_model
from .distillation import lwf
from .own_adapters import oft_model, osf_model
from .penalties import ewc, l2_sp
from .rehearsed import adapter_rehearsal, reader_rehearsal, replay

__all__ = [
    "adapter_rehearsal",
    "corda_model",
    "ewc",
    "l2_sp",
    "lwf",
    "oft_model",
    "osf_model",
    "reader_rehearsal",
    "replay",
]
