"""What a model can do, and what it kept: tasks, metrics, the runner, retention and statistics."""

from twinweave.evaluation.frontier import Paired, forgetting_at, mean_along, mixed, mixture_at
from twinweave.evaluation.generate import generate_texts
from twinweave.evaluation.lens import has_lens, original_shares, read_lens, token_texts
from twinweave.evaluation.likelihood import forward_logits, log_likelihoods
from twinweave.evaluation.metrics import (
    METRICS,
    Metric,
    contains_alias,
    exact_match,
    exact_text,
    f1_binary,
    matthews_correlation,
    normalize_answer,
    number_match,
    token_f1,
)
from twinweave.evaluation.retention import forgetting, retained_score
from twinweave.evaluation.rows import read_documents, read_examples
from twinweave.evaluation.runner import TaskScore, evaluate_task, evaluate_tasks
from twinweave.evaluation.statistics import bootstrap_ci95, mean_ci95, paired_difference, ratio_ci95
from twinweave.evaluation.tasks import KNOWN_TASKS, Task, resolve_task

__all__ = [
    "KNOWN_TASKS",
    "METRICS",
    "Metric",
    "Paired",
    "Task",
    "TaskScore",
    "bootstrap_ci95",
    "contains_alias",
    "evaluate_task",
    "evaluate_tasks",
    "exact_match",
    "exact_text",
    "f1_binary",
    "forgetting",
    "forgetting_at",
    "forward_logits",
    "generate_texts",
    "has_lens",
    "log_likelihoods",
    "matthews_correlation",
    "mean_along",
    "mean_ci95",
    "mixed",
    "mixture_at",
    "normalize_answer",
    "number_match",
    "original_shares",
    "paired_difference",
    "ratio_ci95",
    "read_documents",
    "read_examples",
    "read_lens",
    "resolve_task",
    "retained_score",
    "token_f1",
    "token_texts",
]
