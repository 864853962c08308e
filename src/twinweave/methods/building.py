"""How the models of the methods are built and loaded.

Knows nothing about the methods' names, data, training loops or scores.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from ..baselines.own_adapters import rank_of
from ..cmt import MemoryModel
from ..cmt.config import chunk_size_of as document_size_of
from ..cmt.saving import read_config as read_memory_config
from ..errors import BaseMismatchError, DamagedFileError, RecipeError, UnsupportedModelError
from ..files import read_safetensors
from ..genadapter import GenerativeAdapter
from ..genadapter.config import chunk_size_of
from ..genadapter.saving import read_config as read_generator_config
from ..imsm import IMSMModel, get_imsm_model
from ..imsm.checks import check_base, check_plain_adapter
from ..imsm.existing import check_trained
from ..imsm.saving import read_adapter_config
from ..pretrained import local_folder
from ..rehearsal import Materials
from ..slim import SlimConfig, get_slim_model
from .method import Adapter, Build, SavedAdapter, SavedGenerator, SavedMemory, Settings


def plain(base: PreTrainedModel, adapter: Adapter, settings: Settings, materials: Materials | None = None) -> PeftModel:
    """The recipe's adapter, as PEFT has it."""
    check_base(base)
    if isinstance(adapter, SavedAdapter):
        check_trained(read_adapter_config(local_folder(adapter.path, None)))
        return load_plain(adapter.path, base, is_trainable=adapter.train)
    check_plain_adapter(adapter)
    with _refusals(base):
        return get_peft_model(base, adapter)


def own(make: Callable[[PreTrainedModel, PeftConfig, Materials | None], PeftModel]) -> Build:
    """A method with an adapter of its own, derived from the recipe's."""

    def build(
        base: PreTrainedModel, adapter: Adapter, settings: Settings, materials: Materials | None = None
    ) -> PeftModel:
        check_base(base)
        if isinstance(adapter, SavedAdapter):
            raise RecipeError("peft.path: a method with an adapter of its own cannot go on from a saved one.")
        check_plain_adapter(adapter)
        with _refusals(base):
            model = make(base, adapter, materials)
        if not model.get_nb_trainable_parameters()[0]:
            kind = type(model.peft_config["default"]).__name__.removesuffix("Config")
            raise UnsupportedModelError(
                f"{kind} adapts none of the target modules of {type(base).__name__}: they are no linear layers of "
                "torch. Leave the method out of the recipe."
            )
        return model

    return build


def load_plain(path: str, base: PreTrainedModel, *, is_trainable: bool = False) -> PeftModel:
    """A saved plain adapter on its base.

    Raises DamagedFileError for files that are missing, truncated or pickled, BaseMismatchError for another base.
    """
    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file() and file.with_suffix(".bin").is_file():
        raise DamagedFileError(
            f"{file.with_suffix('.bin')} is a pickle, which can run any code when it is loaded, so it is refused. "
            "Convert it to safetensors where you trust it."
        )
    saved = read_safetensors(file)
    try:
        config = PeftConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"The adapter_config.json in {path} cannot be read ({error}). Save it again.") from error
    try:
        model = PeftModel.from_pretrained(base, path, is_trainable=is_trainable, config=config)
    except (RuntimeError, ValueError) as error:  # tensors of another shape, or modules that are not there
        raise BaseMismatchError(
            f"The adapter in {path} was made for another base than this {type(base).__name__} "
            f"({' '.join(str(error).split()):.200}…). Load the base it was trained on."
        ) from error
    if missing := sorted(get_peft_model_state_dict(model).keys() - saved.keys()):
        raise DamagedFileError(f"{file} lacks {len(missing)} of the adapter's tensors, the first being {missing[0]}.")
    return model


def woven(fusion: str) -> Build:
    """IMSM with the recipe's adapter and gate, and this kind of fusion."""

    def build(
        base: PreTrainedModel, adapter: Adapter, settings: Settings, materials: Materials | None = None
    ) -> PeftModel:
        gate = replace(settings.imsm, fusion=fusion)  # type: ignore[arg-type]
        if isinstance(adapter, SavedAdapter):
            return get_imsm_model(base, adapter.path, gate, train_adapter=adapter.train)
        with _refusals(base):
            return get_imsm_model(base, adapter, gate)

    return build


@contextmanager
def _refusals(base: PreTrainedModel) -> Iterator[None]:
    """PEFT's complaints about settings are of several kinds."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"PEFT refuses this adapter for {type(base).__name__}: {str(error).rstrip('.')}. Mend `peft` in the recipe"
            " (of SLIM, `slim`)."
        ) from error


def load_woven(path: str, base: PreTrainedModel) -> PeftModel:
    """A saved IMSM model on its base."""
    return IMSMModel.from_pretrained(path, base)


def reading(
    base: PreTrainedModel, adapter: Adapter, settings: Settings, materials: Materials | None = None
) -> GenerativeAdapter:
    """GenerativeAdapter with a fresh generator, or with a saved one that learns more; `adapter` is unused."""
    if isinstance(settings.generator, SavedGenerator):
        return load_reading(settings.generator.path, base)
    return GenerativeAdapter(base, settings.generator)


def load_reading(path: str, base: PreTrainedModel) -> GenerativeAdapter:
    """A saved generator of adapters on its base."""
    return GenerativeAdapter.from_pretrained(path, base)


def generator_reads(settings: Settings, window: int) -> int:
    """Tokens that GenerativeAdapter reads at once. Raises DamagedFileError for a path without a generator."""
    saved = settings.generator
    return chunk_size_of(read_generator_config(saved.path) if isinstance(saved, SavedGenerator) else saved, window)


def remembering(**changes: Any) -> Build:
    """CMT with a fresh compressor that is adapted by `adapter`, or a saved one that learns more; with these changes of
    its settings."""

    def build(
        base: PreTrainedModel, adapter: Adapter, settings: Settings, materials: Materials | None = None
    ) -> MemoryModel:
        if isinstance(settings.memory, SavedMemory):
            model = MemoryModel.from_pretrained(settings.memory.path, base, is_trainable=True)
            model.settings = replace(model.settings, **changes)
            return model
        if isinstance(adapter, SavedAdapter):
            raise RecipeError("peft.path: CMT has an adapter of its own; go on from a trained one with cmt.path.")
        if isinstance(adapter, AdaLoraConfig):  # whose ranks are pruned by what only PEFT's own models do
            raise UnsupportedModelError("CMT's compressor cannot be adapted by AdaLoRA. Use LoRA in the recipe's peft.")
        with _refusals(base):
            return MemoryModel(base, replace(settings.memory, **changes), adapter)

    return build


def load_remembering(path: str, base: PreTrainedModel) -> MemoryModel:
    """A saved memory model on its base, without a bank."""
    return MemoryModel.from_pretrained(path, base)


def memory_reads(settings: Settings, window: int) -> int:
    """Tokens that CMT compresses at once. Raises DamagedFileError for a path without a memory model."""
    saved = settings.memory
    return document_size_of(read_memory_config(saved.path) if isinstance(saved, SavedMemory) else saved, window)


def slim_config(adapter: Adapter, settings: Settings, **changes: Any) -> SlimConfig:
    """SLIM of the rank of the recipe's adapter, divided among the experts, unless the recipe's `slim` says another.

    Where they go is for `slim` to say too (the feed-forwards). Where the adapter is SLIM itself, `slim` changes it.
    """
    if isinstance(adapter, SavedAdapter):
        raise RecipeError("peft.path: SLIM has an adapter of its own and cannot go on from a saved one.")
    if isinstance(adapter, SlimConfig):
        return replace(adapter, **{**settings.slim, **changes})
    values = {"task_type": adapter.task_type, "revision": adapter.revision, **settings.slim, **changes}
    config = SlimConfig(**values)
    if "r" not in settings.slim:
        config.r = max(1, rank_of(adapter) // config.num_experts)
    return config


def slim(**changes: Any) -> Build:
    """SLIM with the recipe's settings and these ones."""

    def build(
        base: PreTrainedModel, adapter: Adapter, settings: Settings, materials: Materials | None = None
    ) -> PeftModel:
        check_base(base)
        with _refusals(base):
            return get_slim_model(base, slim_config(adapter, settings, **changes))

    return build


def woven_slim(
    base: PreTrainedModel, adapter: Adapter, settings: Settings, materials: Materials | None = None
) -> PeftModel:
    """IMSM over SLIM."""
    with _refusals(base):
        return get_imsm_model(base, slim_config(adapter, settings), settings.imsm)
