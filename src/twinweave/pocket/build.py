"""Rebuild the pocket base model: `python -m twinweave.pocket.build`.

Trains a small Llama from scratch on the corpus and writes an ordinary Hugging Face directory. The same seed on
the same machine with the same number of threads gives the same weights.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twinweave.files import atomic_directory
from twinweave.pocket.corpus import Turn, sample_question, sample_text
from twinweave.pocket.tokenizer import make_tokenizer
from twinweave.progress import console

IGNORED = -100


@dataclass(frozen=True)
class BuildSettings:
    """How the base is built; the defaults are those of the shipped one."""

    seed: int = 0
    """Of the initial weights and of the corpus."""
    steps: int = 1300
    """Optimiser steps; each takes one batch of questions and one of texts."""
    questions: int = 64
    """Sequences of one question with its answer, per step."""
    texts: int = 30
    """Texts per step, most of them with questions behind; half as many when about two people."""
    learning_rate: float = 3e-3
    """At its peak, after the warm-up."""
    prompt_weight: float = 0.1
    """Weight of a prompt's token in the loss; an answer's token has weight 1."""
    initial_scale: float = 0.05
    """Standard deviation of the initial weights; the usual 0.02 is slow to start at this width."""
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4


def make_model(settings: BuildSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model with tied embeddings, initialised from the seed."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=256,
        initializer_range=settings.initial_scale,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(
    sequences: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerFast, prompt_weight: float
) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights, both [B, T], padded on the right with weight 0.

    Each turn is its prompt, its completion and EOS. A turn without a prompt is text, weighted like a prompt.
    """
    parts = [part for turns in sequences for turn in turns for part in turn]
    ids = iter(tokenizer(parts, add_special_tokens=False)["input_ids"])
    rows: list[tuple[list[int], list[float]]] = []
    for turns in sequences:
        tokens, weights = [tokenizer.bos_token_id], [0.0]
        for prompt, _ in turns:
            asked, answer = next(ids), [*next(ids), tokenizer.eos_token_id]
            tokens += asked + answer
            weights += [prompt_weight] * len(asked) + [1.0 if prompt else prompt_weight] * len(answer)
        rows.append((tokens, weights))
    length = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    loss_weights = torch.zeros(len(rows), length)
    for index, (tokens, weights) in enumerate(rows):
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        loss_weights[index, : len(tokens)] = torch.tensor(weights)
    return input_ids, loss_weights


def weighted_loss(model: LlamaForCausalLM, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the next token in nats, averaged with `weights` [B, T] of the predicted tokens."""
    hidden = model.get_decoder()(input_ids=input_ids[:, :-1]).last_hidden_state
    chosen = weights[:, 1:] > 0
    logits = model.lm_head(hidden[chosen]).float()
    losses = torch.nn.functional.cross_entropy(logits, input_ids[:, 1:][chosen], reduction="none")
    kept = weights[:, 1:][chosen]
    return (losses * kept).sum() / kept.sum()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a fiftieth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizers(model: LlamaForCausalLM, settings: BuildSettings) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the layers, AdamW for embeddings and norms.

    With AdamW alone, picking a word from a list took several times as many steps to be learned.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    rate = settings.learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: BuildSettings) -> float:
    """Train in place; returns the mean loss of the last hundred steps in nats."""
    rng = random.Random(f"pocket corpus {settings.seed}")
    optimizers = make_optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.steps))
        for optimizer in optimizers
    ]
    model.train()
    started = time.monotonic()
    recent: list[float] = []
    for step in range(1, settings.steps + 1):
        losses = []
        people = rng.choice((1, 1, 2))
        batches = (
            [sample_question(rng) for _ in range(settings.questions)],
            [sample_text(rng, people) for _ in range(settings.texts // people)],
        )
        for sequences in batches:
            batch = encode(sequences, tokenizer, settings.prompt_weight)
            loss = weighted_loss(model, *batch)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        recent = [*recent[-99:], sum(losses)]
        if step % 100 == 0 or step == settings.steps:
            passed = time.monotonic() - started
            left = passed / step * (settings.steps - step)
            console.print(
                f"step {step}/{settings.steps}  questions {losses[0]:.3f}  texts {losses[1]:.3f}  "
                f"{passed:.0f} s, {left:.0f} s left"
            )
    return sum(recent) / len(recent)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model (weights in bfloat16) and tokenizer to `out`, whole or not at all; `out` is replaced."""
    with atomic_directory(out) as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def build(settings: BuildSettings, out: Path) -> None:
    """Train a base model from scratch and write it to `out`."""
    tokenizer = make_tokenizer()
    model = make_model(settings, tokenizer)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, settings)
    save(model, tokenizer, out)
    console.print(f"written to {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and build."""
    defaults = BuildSettings()
    parser = argparse.ArgumentParser(prog="python -m twinweave.pocket.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base", help="folder to write")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parsed = parser.parse_args(arguments)
    build(BuildSettings(seed=parsed.seed, steps=parsed.steps), parsed.out)


if __name__ == "__main__":
    main()
