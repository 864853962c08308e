"""When a question sees the other documents of its batch, over a training of CMT. Knows nothing about losses."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..cmt import MemoryModel


def share_of_distractors(progress: float, warmup: float) -> float:
    """The share of the other documents that is seen when `progress` of the training is done: none during the warm-up,
    over as much again more and more of them, then all."""
    return 1.0 if not warmup else min(max((progress - warmup) / warmup, 0.0), 1.0)


class DistractorCallback(TrainerCallback):
    """Sets the share before each step, from nothing but the number of steps that are done."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Before the step's first batch."""
        model = kwargs["model"]
        assert isinstance(model, MemoryModel)
        model.distractors = share_of_distractors(state.global_step / state.max_steps, model.settings.distractor_warmup)
