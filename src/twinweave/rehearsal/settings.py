"""The settings of rehearsal, as recipes name them. Knows nothing about models."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RehearsalSettings(BaseModel):
    """What is rehearsed, how often, and by what."""

    model_config = ConfigDict(extra="forbid")

    sequences: int = Field(4000, ge=0)
    """How many sequences the base writes itself, once for a run; 0 with `text`: the user's text alone. Different ones
    are worth more than the same ones again."""
    length: int = Field(128, ge=8)
    """The longest sequence in tokens."""
    temperature: float = Field(1.0, gt=0)
    """Of the base's own writing: 1 is its own distribution."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether the base writes conversations through its chat template; `auto`: where its tokenizer has one."""
    text: str | None = None
    """A data source of general text (any format of rows, or text), rehearsed beside what the base writes."""
    text_rows: int = Field(1000, ge=1)
    """How many pieces of `text` are used at most."""
    batch_size: int | None = Field(None, ge=1)
    """Sequences at each rehearsing step; none given: a quarter of the training's batch."""
    positions: int = Field(32, ge=1)
    """In how many places of a sequence the next-token distributions are compared."""
    every: int = Field(1, ge=1)
    """Rehearse at every so many steps; the weights are as many times larger, so that the strength stays."""
    weight: float = Field(1.0, ge=0)
    """Of the divergence of the interwoven from the original memory's next-token distributions, in nats per token."""
    adapter_weight: float = Field(1.0, ge=0)
    """Of the enhanced memory's divergence, from which the adapter learns: for where the gate cannot tell what to keep
    from what is new. 0: the adapter is left to the task, and rehearsal is cheaper."""
    gate_weight: float = Field(0.3, ge=0)
    """Of telling the gate where each memory belongs: -log g on rehearsed text and -log(1 - g) on the task's labels, g
    being the original memory's share. While the two memories hardly differ, the divergence has nothing to say, and the
    task alone would close the gate everywhere. Fades to 0 over the training."""
    seed: int = 0
    """Of the writing, the ends of queries and the places."""
