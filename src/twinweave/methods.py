"""One table: a method's name -> how a base model becomes a model to train, and how a trained one is dialled.

Knows nothing about data, training loops or scores.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from transformers import PreTrainedModel

from .baselines import adapter_rehearsal, corda_model, ewc, l2_sp, lwf, oft_model, osf_model, replay
from .errors import BaseMismatchError, DamagedFileError, RecipeError, UnsupportedModelError, UsageError, unknown_name
from .files import read_safetensors
from .imsm import IMSMConfig, IMSMModel, get_imsm_model
from .imsm.checks import check_base, check_plain_adapter
from .imsm.existing import check_trained
from .imsm.saving import local_folder, read_adapter_config
from .rehearsal import MakeTerm, Materials, gate_rehearsal


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that is trained already, to go on from."""

    path: str
    train: bool
    """Whether it learns more, or is left as it is."""


Adapter = PeftConfig | SavedAdapter


class Build(Protocol):
    """A base, the recipe's adapter and gate, and what else there is to use -> the model to train."""

    def __call__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        imsm_config: IMSMConfig,
        materials: Materials | None = None,
        /,
    ) -> PeftModel:
        """Without `materials` the model has its size, and maybe not the start of its training."""


Load = Callable[[str, PreTrainedModel], PeftModel]


@dataclass(frozen=True)
class Knob:
    """A setting that a method is swept over."""

    name: str
    """What recipes (in `sweeps`) and results call it."""
    values: tuple[float, ...]
    """The small sweep of a recipe that does not say another."""
    multiplies: Literal["learning_rate", "gate_learning_rate", "steps", "term"] = "term"
    """Where a model is trained at each value: what of the recipe the value is a multiple of."""


@dataclass(frozen=True)
class Dial:
    """What a knob turns where nothing is trained again: the same weights are scored at several settings."""

    of: str
    """The method whose trained weights are dialled."""
    apply: Callable[[Any, float], AbstractContextManager[Any]]
    """Sets the knob of a model for the length of a block."""


@dataclass(frozen=True)
class Method:
    """One way to teach a base something new."""

    name: str
    label: str
    description: str
    build: Build | None = None
    load: Load | None = None
    dial: Dial | None = None
    knob: Knob | None = None
    term: MakeTerm | None = None
    """What is added to the task's loss."""
    rehearses: Literal["never", "if on", "always"] = "never"
    """Whether training uses the recipe's rehearsal: where it is on, or not without it."""
    guarded: bool = False
    """Whether a trained model gets the recipe's domain guard; a dial: whether it turns one."""


def _plain(
    base: PreTrainedModel, adapter: Adapter, imsm_config: IMSMConfig, materials: Materials | None = None
) -> PeftModel:
    check_base(base)
    if isinstance(adapter, SavedAdapter):
        check_trained(read_adapter_config(local_folder(adapter.path, None)))
        return load_plain(adapter.path, base, is_trainable=adapter.train)
    check_plain_adapter(adapter)
    with _refusals(base):
        return get_peft_model(base, adapter)


def _own(make: Callable[[PreTrainedModel, PeftConfig, Materials | None], PeftModel]) -> Build:
    """A method with an adapter of its own, derived from the recipe's."""

    def build(
        base: PreTrainedModel, adapter: Adapter, imsm_config: IMSMConfig, materials: Materials | None = None
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


def _woven(fusion: str) -> Build:
    def build(
        base: PreTrainedModel, adapter: Adapter, imsm_config: IMSMConfig, materials: Materials | None = None
    ) -> PeftModel:
        settings = replace(imsm_config, fusion=fusion)  # type: ignore[arg-type]
        if isinstance(adapter, SavedAdapter):
            return get_imsm_model(base, adapter.path, settings, train_adapter=adapter.train)
        with _refusals(base):
            return get_imsm_model(base, adapter, settings)

    return build


@contextmanager
def _refusals(base: PreTrainedModel) -> Iterator[None]:
    """PEFT's complaints about settings are of several kinds."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"PEFT refuses this adapter for {type(base).__name__}: {str(error).rstrip('.')}. Mend `peft` in the recipe."
        ) from error


def _load_woven(path: str, base: PreTrainedModel) -> PeftModel:
    return IMSMModel.from_pretrained(path, base)


@contextmanager
def _retention(model: IMSMModel, value: float) -> Iterator[None]:
    before, model.retention = model.retention, model.retention + value
    try:
        yield
    finally:
        model.retention = before


@contextmanager
def _guard_strength(model: IMSMModel, value: float) -> Iterator[None]:
    guard = model.guard
    if guard is None:
        raise UsageError("imsm_guard needs a model with a domain guard, and this one has none: train with guard=on.")
    before, guard.strength = guard.strength, value
    try:
        yield
    finally:
        guard.strength = before


@contextmanager
def _scale(model: PeftModel, value: float) -> Iterator[None]:
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


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("peft", "plain PEFT", "The adapter alone, as PEFT trains it.", _plain, load_plain),
        Method(
            "peft_scaled",
            "plain PEFT × λ",
            "The trained adapter scaled by λ afterwards (WiSE-FT); swept, nothing is trained again.",
            load=load_plain,
            dial=Dial("peft", _scale),
            knob=Knob("scale", (0.25, 0.5, 0.75)),
        ),
        Method("peft_rate", "plain PEFT, other learning rates", "The adapter alone, at multiples of its learning rate.",
               _plain, load_plain, knob=Knob("rate", (0.1, 0.3), "learning_rate")),
        Method("peft_steps", "plain PEFT, fewer steps", "The adapter alone, with a share of the steps.",
               _plain, load_plain, knob=Knob("steps", (0.1, 0.3), "steps")),
        Method("peft_rehearsal", "plain PEFT + rehearsal", "The adapter alone, with the same rehearsal and no gate.",
               _plain, load_plain, knob=Knob("rehearsal_weight", (1.0, 4.0)), term=adapter_rehearsal,
               rehearses="always"),
        Method("peft_replay", "plain PEFT + replay", "The adapter alone, trained on general text beside the task.",
               _plain, load_plain, knob=Knob("replay_weight", (0.3, 1.0)), term=replay, rehearses="always"),
        Method("peft_lwf", "plain PEFT + KL to the base (LwF)",
               "The adapter alone, kept near the base's predictions on the task's own data.",
               _plain, load_plain, knob=Knob("lwf_weight", (0.01, 0.03, 0.1)), term=lwf),
        Method("peft_l2", "plain PEFT + L2-SP", "The adapter alone, with a penalty on how far it moves the weights.",
               _plain, load_plain, knob=Knob("l2_weight", (10.0, 100.0, 1000.0)), term=l2_sp),
        Method("peft_ewc", "plain PEFT + EWC",
               "The adapter alone, with a penalty on moving the weights that the base needs for general text.",
               _plain, load_plain, knob=Knob("ewc_weight", (10.0, 100.0, 1000.0)), term=ewc, rehearses="always"),
        Method("peft_osf", "OSF", "PEFT's OSF: only the smallest singular directions of the weights are trained.",
               _own(osf_model), load_plain, knob=Knob("osf_rate", (1.0, 3.0), "learning_rate")),
        Method("peft_oft", "OFT", "PEFT's OFT: the inputs of the layers are rotated, in blocks.",
               _own(oft_model), load_plain, knob=Knob("oft_rate", (0.03, 0.1, 0.3), "learning_rate")),
        Method("peft_corda", "CorDA (knowledge-preserved)",
               "LoRA that starts in the directions of the weights that general text uses least.",
               _own(corda_model), load_plain, knob=Knob("corda_rate", (0.1, 0.3, 1.0), "learning_rate"),
               rehearses="always"),
        Method("imsm", "IMSM", "Both memories, fused by the query-aware gate, with the recipe's rehearsal and guard.",
               _woven("query_gate"), _load_woven, term=gate_rehearsal, rehearses="if on",
               guarded=True),
        Method("imsm_published", "IMSM as published", "IMSM without rehearsal and guard, as in its paper.",
               _woven("query_gate"), _load_woven),
        Method("imsm_published_rate", "IMSM as published, gate rates",
               "IMSM as published, at multiples of its gate's learning rate.",
               _woven("query_gate"), _load_woven, knob=Knob("gate_rate", (2.0, 6.0), "gate_learning_rate")),
        Method("imsm_gate", "IMSM, gate without query", "Both memories, fused by a gate that does not see the query.",
               _woven("gate"), _load_woven),
        Method("imsm_average", "IMSM, 1:1 average", "Both memories in equal shares, without a gate.",
               _woven("average"), _load_woven),
        Method("imsm_guard_alone", "plain PEFT + domain guard",
               "The adapter alone within the training data's domain, the base beyond: the guard without the gate.",
               _woven("enhanced"), _load_woven, guarded=True),
        Method(
            "imsm_retention",
            "IMSM, retention dial",
            "The trained IMSM model, its gate shifted towards the original memory; swept, nothing is trained again.",
            load=_load_woven,
            dial=Dial("imsm", _retention),
            knob=Knob("retention", (1.0, 2.0, 3.0)),
        ),
        Method(
            "imsm_guard",
            "IMSM, guard dial",
            "The trained IMSM model with its domain guard at other strengths, 0 being off; nothing is trained again.",
            load=_load_woven,
            dial=Dial("imsm", _guard_strength),
            knob=Knob("guard", (0.0, 5.0)),
            guarded=True,
        ),
        Method(
            "imsm_published_retention",
            "IMSM as published, retention dial",
            "IMSM as published, its gate shifted towards the original memory; swept, nothing is trained again.",
            load=_load_woven,
            dial=Dial("imsm_published", _retention),
            knob=Knob("retention", (1.0, 2.0, 3.0)),
        ),
    )
}  # fmt: skip


def get_method(name: str) -> Method:
    """The method of that name. Raises UsageError, with the nearest name, for one that does not exist."""
    if name not in METHODS:
        raise UsageError(unknown_name("method", name, METHODS))
    return METHODS[name]


def check_saved(method: Method, adapter: SavedAdapter) -> None:
    """Raise RecipeError for a method that a saved adapter leaves nothing to do. `peft` is then the adapter as it is."""
    if not adapter.train and method.name == "imsm_average":
        raise RecipeError("peft.train: imsm_average has no gate, so nothing is left to train. Leave it out.")
    if method.build is None or method.load is _load_woven:
        return
    if method.build is not _plain:
        raise RecipeError(f"peft.path: {method.name} has an adapter of its own and cannot go on from a saved one.")
    if not adapter.train and method.name != "peft":
        raise RecipeError(f"peft.train: {method.name} trains the adapter, and it is to be left as it is.")


def knobs() -> dict[str, Knob]:
    """Every knob by its name."""
    return {method.knob.name: method.knob for method in METHODS.values() if method.knob}


def label_of(name: str, peft_type: str) -> str:
    """What a report calls the method, with the adapter's own name in place of "plain PEFT"."""
    kinds = {"lora": "LoRA", "adalora": "AdaLoRA", "ia3": "(IA)³", "oft": "OFT", "loha": "LoHa", "lokr": "LoKr"}
    return get_method(name).label.replace("plain PEFT", kinds.get(peft_type, peft_type))
