"""What can be turned on a trained model, each for the length of a block. Knows nothing about the methods' names."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.helpers import rescale_adapter_scale

from ..errors import UsageError
from ..imsm import IMSMModel
from ..slim.router import Router


@contextmanager
def retention(model: IMSMModel, value: float) -> Iterator[None]:
    """The gate's logits moved towards the original memory by so much more."""
    before, model.retention = model.retention, model.retention + value
    try:
        yield
    finally:
        model.retention = before


@contextmanager
def guard_strength(model: IMSMModel, value: float) -> Iterator[None]:
    """The domain guard at this strength. Raises UsageError for a model without one."""
    guard = model.guard
    if guard is None:
        raise UsageError("imsm_guard needs a model with a domain guard, and this one has none: train with guard=on.")
    before, guard.strength = guard.strength, value
    try:
        yield
    finally:
        guard.strength = before


@contextmanager
def scale(model: PeftModel, value: float) -> Iterator[None]:
    """Scale what the adapter adds by λ: for LoRA the same as interpolating the weights (WiSE-FT)."""
    try:
        context = rescale_adapter_scale(model, value)
        context.__enter__()
    except ValueError as error:
        raise UsageError(
            "peft_scaled needs an adapter that adds a scaled delta (LoRA and its variants); leave it out of the "
            f"recipe's methods for this one ({error})."
        ) from error
    try:
        yield
    finally:
        context.__exit__(None, None, None)


@contextmanager
def yielding(model: PeftModel, value: float) -> Iterator[None]:
    """How strongly distance from the training data favours SLIM's identity experts: γ, as a multiple of the trained."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    before = [router.strength for router in routers]
    try:
        for router in routers:
            router.strength *= value
        yield
    finally:
        for router, strength in zip(routers, before, strict=True):
            router.strength = strength
