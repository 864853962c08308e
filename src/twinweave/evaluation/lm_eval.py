"""Tasks of lm-evaluation-harness on IMSM models: its own HFLM, which also says where a request's context ends.

The context is the query, so that what the gate reads never depends on the continuation being judged. Importing this
registers the model `twinweave` with the harness. Knows nothing about runs or files.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from yaml import YAMLError

from ..errors import DataError, UnsupportedModelError, UsageError, unknown_name
from ..imsm import IMSMModel

try:
    from lm_eval import evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UsageError(
        f"lm-evaluation-harness is needed for its tasks ({error}). Install it: pip install 'twinweave[eval]'."
    ) from error

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The harness's: (context, continuation) as texts, None in rolling likelihoods; and both as tokens."""

_SEED = 1234  # of the harness's own command line
_BOOTSTRAPS = 1000  # the harness's standard errors of means need none of them, but come only where there are some


@register_model("twinweave")
class TwinweaveLM(HFLM):
    """HFLM for IMSM models. For every other model, and for one memory alone, it is HFLM exactly.

    The query memory of a likelihood is the request's context. Where the harness asks without one (rolling
    likelihoods, an empty context), nothing was asked: it is the running mean over everything read, as in our own
    `text_loss` and `minimal_pairs`. In generation it is the prompt.
    """

    logits_cache: bool

    def __init__(
        self,
        pretrained: str | PreTrainedModel | torch.nn.Module,
        base: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **kwargs: Any,
    ) -> None:
        """`pretrained`: a model, or a folder with a saved IMSM model on `base` (the recorded one if not given).

        `kwargs` are HFLM's. Raises what `IMSMModel.from_pretrained` raises.
        """
        if isinstance(pretrained, str):
            device = device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
            pretrained = IMSMModel.from_pretrained(pretrained, base, dtype=dtype).to(device)
        self._upcoming: Iterator[Request] | None = None
        super().__init__(pretrained, **kwargs)

    @property
    def _woven(self) -> bool:
        return isinstance(self.model, IMSMModel) and self.model.memory == "interwoven"

    def _loglikelihood_tokens(self, requests: list[Request], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        if not self._woven:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        grouped = self.logits_cache
        # the harness shares logits between requests with the same tokens, wherever their contexts end
        self.logits_cache = grouped and not _ambiguous(requests)
        self._upcoming = _in_order(requests, self.logits_cache)
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self.logits_cache, self._upcoming = grouped, None

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._upcoming is None:
            return super()._model_call(inps, *args, **kwargs)
        mask = torch.zeros_like(inps, dtype=torch.bool)
        for row, (texts, context, continuation) in enumerate(islice(self._upcoming, len(inps))):
            # the harness's own cut: the last token is only predicted, and what is too long loses its start
            read = (context + continuation)[-(self.max_length + 1) :][:-1]
            if inps[row, : len(read)].tolist() != read:
                raise UnsupportedModelError("This version of lm-eval orders requests unlike ours. Install 0.4.13.")
            asked = texts is not None and texts[0] != ""
            mask[row, : len(read) + 1 - len(continuation) if asked else len(read)] = True
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            return self.model(inps, query_mask=mask, use_cache=False).logits

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """The trial batches are nobody's requests."""
        upcoming, self._upcoming = self._upcoming, None
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._upcoming = upcoming


def _read_before_last(request: Request) -> tuple[int, ...]:
    return (*request[1], *request[2][:-1])


def _longest_first(request: Request) -> tuple[int, tuple[int, ...]]:
    tokens = (*request[1], *request[2])
    return -len(tokens), tokens


def _ambiguous(requests: list[Request]) -> bool:
    """Whether two requests read the same tokens with contexts that end at different places."""
    ends: dict[tuple[int, ...], int] = {}
    return any(ends.setdefault(_read_before_last(r), len(r[1])) != len(r[1]) for r in requests)


def _in_order(requests: list[Request], grouped: bool) -> Iterator[Request]:
    """The requests as HFLM runs through them: longest first, one of each group."""
    group_by = "contexts" if grouped else None
    collator = Collator(requests, sort_fn=_longest_first, group_by=group_by, group_fn=_read_before_last)
    return (request for batch in collator.get_batched(n=1) for request in batch)


@dataclass(frozen=True)
class LMScore:
    """One metric of one task. `value` and `stderr` are None where the harness gives no finite number."""

    task: str
    metric: str
    """The harness's name with its filter, such as `acc,none`."""
    value: float | None
    stderr: float | None
    higher_is_better: bool
    count: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def find_tasks(names: Sequence[str], folder: str | None = None) -> TaskManager:
    """A manager that knows the tasks, those of the YAML files in `folder` first.

    Raises UsageError for a name that neither has.
    """
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):  # reading the harness's own thousands takes a while
            return own
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(unknown_name("lm-eval task", name, manager.all_tasks))
    return manager


def score_lm_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: TaskManager,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> list[LMScore]:
    """Every metric of the tasks, for a model of transformers, adapted or not. See `find_tasks` for `manager`.

    Raises DataError where a task's data cannot be read (most are on the hub).
    """
    set_seed(_SEED)  # for tasks that sample
    try:
        loaded = manager.load(list(names))
    except (ConnectionError, FileNotFoundError, DatasetsError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(f"The data of {', '.join(names)} cannot be read: {first}.") from error
    except (KeyError, TypeError, ValueError, TemplateError, YAMLError) as error:
        raise DataError(
            f"The lm-eval task {', '.join(names)} cannot be read ({type(error).__name__}: {error}). Mend its YAML file."
        ) from error
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(_SEED)
    lm = TwinweaveLM(model, tokenizer=tokenizer, batch_size=batch_size)
    with redirect_stdout(sys.stderr):
        # not its simple_evaluate, which looks for git and pip first
        results = evaluate(lm, loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
    return [
        LMScore(
            task=name,
            metric=metric,
            value=_finite(value),
            stderr=_finite(found.get(_stderr_of(metric))),
            higher_is_better=results["higher_is_better"].get(name, {}).get(metric.split(",")[0]) is not False,
            count=found.get("sample_len", 0),
        )
        for name, found in results["results"].items()
        for metric, value in found.items()
        if "," in metric and "_stderr," not in metric
    ]


def _stderr_of(metric: str) -> str:
    name, _, filtered = metric.partition(",")
    return f"{name}_stderr,{filtered}"


def _finite(value: Any) -> float | None:
    """The harness writes N/A, and perplexities overflow."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
