"""The recipe: everything one run needs, checked before anything starts.

Knows nothing about how any of it is carried out. Paths are relative to the folder the command is run in.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from peft import AdaLoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available
from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION

from ..cmt import CMTConfig
from ..errors import RecipeError, unknown_name
from ..evaluation import Task, read_documents, resolve_task
from ..genadapter import GenerativeAdapterConfig
from ..imsm import GuardSettings, IMSMConfig
from ..imsm.saving import check_adapter_files, read_adapter_config
from ..methods import (
    Adapter,
    Method,
    SavedAdapter,
    SavedGenerator,
    SavedMemory,
    Settings,
    check_saved,
    get_method,
    knobs,
)
from ..pretrained import local_folder
from ..rehearsal import RehearsalSettings
from ..slim import SlimConfig

# What PEFT writes down about an adapter, or what the recipe says elsewhere.
_NOT_FOR_RECIPES = {field.name for field in dataclass_fields(PeftConfig)} | {"base_fingerprint"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BaseSection(_Section):
    """The base model. A plain text in its place is the name."""

    name: str
    """A local directory, a hub name, or `pocket` (the small base shipped with twinweave)."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["8bit", "4bit"] | None = None
    """Load the base with its linear layers in 8 or 4 bits (bitsandbytes), computing in `dtype`."""
    attn_implementation: str | None = None
    pad_token: str | None = None
    """A token of the vocabulary to pad with, for tokenizers that have no padding token."""
    trust_remote_code: bool = False

    @field_validator("quantization")
    @classmethod
    def _installed_quantization(cls, value: str | None) -> str | None:
        if value is not None and not is_bitsandbytes_available():
            raise RecipeError(
                f"base.quantization: {value} needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or later, which is not "
                "installed here. Install it (pip install 'twinweave[quantization]'), or leave it out."
            )
        return value


class DataSection(_Section):
    """Training rows. A plain text in its place is `data`."""

    data: str
    split: str | None = None
    prompt: str | None = None
    completion: str | None = None
    context: str | None = None
    """What is read before the questions: a column (a text, or a list of several), or a format string over the columns.
    GenerativeAdapter and CMT read it apart; for every other method it goes in front of the prompt."""
    text: str | None = None
    """Format string over the columns: GenerativeAdapter learns to say what it read again, and to go on behind it."""
    questions_per_context: int | None = Field(None, ge=1)
    """The most questions that share one reading of their context; 16 where none is given."""
    segment_chunks: int | None = Field(None, ge=2)
    """Chunks of a segment of `text`; 8 where none is given."""
    limit: int | None = Field(None, ge=1)
    validation: str | None = None
    """A source of validation rows; without one a seeded share of the training rows is held out."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    max_length: int = Field(1024, ge=8)

    @model_validator(mode="after")
    def _context_or_text(self) -> "DataSection":
        if self.text is not None and (self.context, self.prompt, self.completion) != (None, None, None):
            raise RecipeError("train: text is learned by itself; leave out context, prompt and completion, or text.")
        return self


class TrainingSection(_Section):
    """How an adapter is trained; the defaults are the paper's for LoRA."""

    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    """Rows of a step; for GenerativeAdapter and CMT contexts, with all their questions, or segments of text."""
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    gate_learning_rate: float | None = Field(None, gt=0)
    """The gate's own rate. None given: 1e-3, as in the paper's code, for a model of width 4096, and for others in
    inverse proportion to the width's square root; docs/imsm.md says why."""
    optimizer: str = "adamw_torch"
    weight_decay: float = Field(0.01, ge=0)
    scheduler: str = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    frozen_store: str = "auto"
    """Whether the original memory, of IMSM and CMT, is computed once and read from disk. `auto`: where there are at
    least two epochs and it takes at most a quarter of the free disk, in the output folder until the run is finished.
    `off`: never. A folder: kept there, and used again by other runs on the same rows."""
    evaluate_every: Literal["epoch"] | int = "epoch"
    """Validation and a checkpoint after each epoch, or after so many steps."""
    deepspeed: str | None = None
    """A DeepSpeed configuration (JSON), as transformers' TrainingArguments take it; the run is to be started by
    `accelerate launch` or `deepspeed` then."""
    log_every: int = Field(10, ge=1)
    report_to: list[str] = []

    @field_validator("evaluate_every", mode="before")
    @classmethod
    def _epoch_or_steps(cls, value: Any) -> Any:
        if value != "epoch" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError("must be 'epoch' or a number of steps of at least 1")
        return value

    @field_validator("frozen_store", mode="before")
    @classmethod
    def _store_or_off(cls, value: Any) -> Any:
        if value is False:  # what YAML makes of a bare off
            return "off"
        if not isinstance(value, str) or not value.strip():
            raise ValueError("must be 'auto', 'off' or a folder")
        return value

    @field_validator("deepspeed")
    @classmethod
    def _readable_deepspeed(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                json.loads(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RecipeError(f"training.deepspeed: {value} is no readable JSON file ({error}).") from error
        return value

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in (known := [name.value for name in OptimizerNames]):
            raise RecipeError(unknown_name("optimizer", value, known))
        return value

    @field_validator("report_to")
    @classmethod
    def _installed_loggers(cls, values: list[str]) -> list[str]:
        for value in values:
            if value not in INTEGRATION_TO_CALLBACK:
                raise RecipeError(unknown_name("logger in training.report_to", value, INTEGRATION_TO_CALLBACK))
            if value not in get_available_reporting_integrations():
                raise RecipeError(f"training.report_to: {value} is not installed here. Install it, or leave it out.")
        return values

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        if value not in (known := [kind.value for kind in SchedulerType]):
            raise RecipeError(unknown_name("scheduler", value, known))
        return value


class EvaluationSection(_Section):
    """How tasks are scored, and what the lens shows."""

    batch_size: int = Field(32, ge=1)
    lens_prompts: int = Field(6, ge=0)
    """How many real prompts of target and retained tasks the report's lens shows."""
    read: str | None = None
    """Documents (a source with a `text` column) that GenerativeAdapter and CMT have read when they are scored on tasks
    without a context; none: they are the bare base there."""
    read_limit: int | None = Field(None, ge=1)
    """The first of those documents only."""


class Recipe(_Section):
    """One run: a base, a target, what must be retained, and the methods to compare."""

    name: str = "run"
    base: BaseSection
    train: DataSection
    target: Task
    """The task that scores what was learned, on rows that are not trained on."""
    retained: list[Task] = []
    """The tasks that show what was kept."""
    method: str = "imsm"
    """What `train` trains."""
    methods: list[str] = ["peft", "imsm"]
    """What `compare` compares."""
    seeds: list[int] = [0, 1, 2]
    peft: dict[str, Any] = {"type": "lora", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
    """`type` (lora, adalora, ia3, oft, …) and the fields of that PEFT configuration; or `path`, the folder of a trained
    adapter to go on from, and `train` (true): whether it learns more, or only IMSM's gate does."""
    imsm: dict[str, Any] = {}
    slim: dict[str, Any] = {}
    """Settings of SLIM for the methods that are made of it; `r` is the adapter's, divided among the experts."""
    generative_adapter: dict[str, Any] | None = None
    """Settings of GenerativeAdapter; or `path`, the folder of a trained generator to go on from, with its settings."""
    cmt: dict[str, Any] | None = None
    """Settings of CMT, whose compressor has the adapter of `peft`; or `path`, the folder of a trained memory model to
    go on from, with its settings and its adapter."""
    rehearsal: RehearsalSettings | None = RehearsalSettings()
    """What the base writes itself and IMSM's gate rehearses; `null`: nothing, as published."""
    guard: GuardSettings | None = None
    """IMSM's domain guard, fitted behind the training; `null`: none, as published."""
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    sweeps: dict[str, list[float]] = {}
    """Name of a knob -> its values, in place of the method's own small sweep."""
    output: str | None = None

    @field_validator("base", mode="before")
    @classmethod
    def _base_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("train", mode="before")
    @classmethod
    def _train_by_path(cls, value: Any) -> Any:
        return {"data": value} if isinstance(value, str) else value

    @field_validator("rehearsal", "guard", mode="before")
    @classmethod
    def _section_or_off(cls, value: Any) -> Any:
        if isinstance(value, bool):  # what YAML makes of a bare on or off
            return {} if value else None
        return value

    @field_validator("target", mode="before")
    @classmethod
    def _resolve_target(cls, value: Any) -> Any:
        return resolve_task(value)

    @field_validator("retained", mode="before")
    @classmethod
    def _resolve_retained(cls, value: Any) -> Any:
        return [resolve_task(entry) for entry in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise RecipeError(f"methods: {self.methods} must be a list of different methods, at least one.")
        for name in (self.method, *self.methods):
            method = get_method(name)
            if name in self.methods and method.dial and method.dial.of not in self.methods:
                raise RecipeError(f"methods: {name} dials the trained {method.dial.of}; add '{method.dial.of}' too.")
            if name in ("imsm_guard", "imsm_guard_alone") and self.guard is None:
                raise RecipeError(
                    f"methods: {name} needs the domain guard, which is off; set guard=on, or leave it out."
                )
        if get_method(self.method).build is None:
            raise RecipeError(f"method: '{self.method}' trains nothing itself; use it in `methods` of `compare`.")
        names = [self.target.name, *(task.name for task in self.retained)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"Two tasks are called '{twice[0]}'. Give one of them another `name`.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise RecipeError(f"seeds: {self.seeds} must be a list of different whole numbers from 0, at least one.")
        for knob, values in self.sweeps.items():
            if knob not in knobs():
                raise RecipeError(unknown_name("knob", f"sweeps.{knob}", [f"sweeps.{name}" for name in knobs()]))
            if len(set(values)) != len(values) or not all(math.isfinite(value) for value in values):
                raise RecipeError(f"sweeps.{knob}: {values} must be a list of different finite numbers.")
            if knobs()[knob].multiplies != "term" and min(values, default=1) <= 0:
                raise RecipeError(f"sweeps.{knob}: {values} multiply a rate or a number of steps; give positive ones.")
        self._check_reading()
        self.settings()
        if (saved := self.saved_adapter) is None:
            self.peft_config()
        else:
            for name in (self.method, *self.methods):
                check_saved(get_method(name), saved)
        return self

    def _check_reading(self) -> None:
        names = list(dict.fromkeys((self.method, *self.methods)))
        reading = [name for name in names if get_method(name).reads]
        if reading and self.train.context is None and self.train.text is None:
            text = " or train.text (text to learn from by itself)" if "generative_adapter" in reading else ""
            raise RecipeError(
                f"train: {reading[0]} learns to read, and there is nothing to read. Give train.context (the column with"
                f" what each question is about){text}."
            )
        if self.train.text is not None and (others := [name for name in names if name != "generative_adapter"]):
            raise RecipeError(
                f"train.text: {others[0]} learns from prompts with completions; text by itself is for "
                "generative_adapter. Set method: generative_adapter and methods: [generative_adapter]."
            )

    @property
    def output_dir(self) -> Path:
        """Where the run's files go."""
        return Path(self.output or f"runs/{self.name}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `load_recipe` makes this recipe of."""
        # a key that is None says "off" where being left out says "on"
        return {"rehearsal": None} | self.model_dump(mode="json", exclude_none=True)

    def documents(self) -> list[str]:
        """The texts of `evaluation.read`. Raises DataError."""
        section = self.evaluation
        return [] if section.read is None else read_documents(section.read, section.read_limit)

    def sweep(self, method: Method) -> list[dict[str, float]]:
        """The settings at which `compare` has the method: knob -> value, or one empty setting without a knob."""
        if method.knob is None:
            return [{}]
        return [{method.knob.name: value} for value in self.sweeps.get(method.knob.name, method.knob.values)]

    @property
    def peft_type(self) -> str:
        """The adapter's type in lower case."""
        if "path" in self.peft:
            kind = self.peft_config().peft_type
            return str(getattr(kind, "value", kind)).lower()
        return str(self.peft.get("type", "lora")).lower()

    def settings(self) -> Settings:
        """What the methods want to know beside the adapter. Raises UsageError for settings of a gate or of SLIM that do
        not exist, or cannot be."""
        known = {field.name for field in dataclass_fields(SlimConfig)} - _NOT_FOR_RECIPES
        for key in self.slim:
            if key not in known:
                raise RecipeError(unknown_name("setting of SLIM", f"slim.{key}", [f"slim.{name}" for name in known]))
        SlimConfig(**deepcopy(self.slim))
        generator, memory = self.generative_adapter or {}, self.cmt or {}
        saved_generator = _saved_path("generative_adapter", generator, "generator")
        saved_memory = _saved_path("cmt", memory, "memory model")
        return Settings(
            IMSMConfig.from_dict(self.imsm),
            deepcopy(self.slim),
            SavedGenerator(saved_generator) if saved_generator else GenerativeAdapterConfig.from_dict(generator),
            SavedMemory(saved_memory) if saved_memory else CMTConfig.from_dict(memory),
        )

    @property
    def saved_adapter(self) -> SavedAdapter | None:
        """The adapter to go on from, if the recipe names one; it is not read. Raises RecipeError."""
        if "path" not in self.peft:
            return None
        path, train = self.peft["path"], self.peft.get("train", True)
        if extra := sorted(self.peft.keys() - {"path", "train"}):
            raise RecipeError(f"peft.{extra[0]}: beside peft.path there is peft.train only; its folder says the rest.")
        if not isinstance(path, str) or not isinstance(train, bool):
            raise RecipeError(f"peft: path={path!r} must be a folder or hub name, and train={train!r} true or false.")
        return SavedAdapter(path, train)

    def adapter(self, steps: int = 10**9) -> Adapter:
        """What a method's `build` wants to know of the adapter. Raises what `peft_config` raises."""
        saved, config = self.saved_adapter, self.peft_config(steps)
        if saved is not None and saved.train and isinstance(config, AdaLoraConfig):
            raise RecipeError("peft.train: the ranks of a trained AdaLoRA adapter are settled; set peft.train=false.")
        return saved or config

    def peft_config(self, steps: int = 10**9) -> PeftConfig:
        """A fresh PEFT configuration (PEFT changes the one it is given) for a training of so many steps, or that of the
        adapter in `path`. Raises RecipeError, and DamagedFileError for a path without a whole adapter.

        Only AdaLoRA has to know the steps: it prunes ranks from 10 % to 70 % of them, unless the recipe says otherwise.
        """
        if (saved := self.saved_adapter) is not None:
            folder = local_folder(saved.path, None)
            check_adapter_files(folder)
            return read_adapter_config(folder)
        kinds = {kind.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.peft_type not in kinds:
            raise RecipeError(unknown_name("PEFT type", self.peft_type, kinds))
        kind = kinds[self.peft_type]
        settings = {key: deepcopy(value) for key, value in self.peft.items() if key != "type"}
        known = {field.name for field in dataclass_fields(kind)}
        for key in settings:
            if key not in known:
                raise RecipeError(unknown_name(f"setting of PEFT type {self.peft_type}:", key, known))
        settings = {"task_type": "CAUSAL_LM", "revision": self.base.revision} | settings
        if kind is AdaLoraConfig:
            steps = settings.get("total_step") or steps
            settings = {"tinit": round(0.1 * steps), "tfinal": round(0.3 * steps), "total_step": steps} | settings
        try:
            return kind(**settings)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"peft: {error}") from error


def _saved_path(section: str, values: dict[str, Any], what: str) -> str | None:
    """The folder that a section names in the place of settings; None where it has settings. Raises RecipeError."""
    if "path" not in values:
        return None
    path, others = values["path"], values.keys() - {"path"}
    if others:
        raise RecipeError(
            f"{section}.{min(others)}: beside {section}.path there is nothing to set; the {what} saved there has its "
            "settings."
        )
    if not isinstance(path, str) or not path.strip():
        raise RecipeError(f"{section}.path is {path!r}; it must be the folder of a saved {what}.")
    return path


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people mean the number. And of a key that is given twice the last would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        plain = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<` has no value of its own
        keys = [self.construct_object(key, deep=True) for key in plain]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe from a YAML file (or a mapping), with `key=value` overrides (`training.epochs=1`).

    Raises RecipeError with the offending key and the nearest known one.
    """
    if isinstance(source, Mapping):
        values, where = deepcopy(dict(source)), "recipe"
    else:
        values, where = _read_yaml(Path(source)), str(source)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}. Give the path of a YAML file.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {_one_line(error)}. Mend it there.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold keys and values (base: …, train: …, target: …).")
    return values


# A section given as a text stands for this one of its keys.
_SHORT_FORMS = {"base": "name", "train": "data", "target": "task"}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"'{override}' is not an override. Write key=value, for example training.epochs=1.")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        if isinstance(place.get(parent), str) and parent in _SHORT_FORMS:
            place[parent] = {_SHORT_FORMS[parent]: place[parent]}
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise RecipeError(f"'{override}': {parent} has no keys of its own.")
    try:
        place[last] = yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        raise RecipeError(f"'{override}': the value is not valid YAML ({_one_line(error)}).") from error


def _explain(error: ValidationError) -> str:
    """The first fault in one sentence, with the nearest key where a key is unknown."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = _section_at(first["loc"][:-1])
        return f"{unknown_name('recipe key', where, _full_names(section, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"'{where}' is missing."
    return f"'{where}' is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _section_at(location: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        for kind in (annotation, *get_args(annotation)):  # a section may be optional
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind
    return section


def _full_names(section: type[BaseModel], location: Sequence[Any]) -> list[str]:
    prefix = "".join(f"{part}." for part in location)
    return [prefix + name for name in section.model_fields]
