"""What holds for every base that can carry a generated adapter, each promise as one function with a name.

Knows nothing about which bases there are. As in checks.py, where the base breaks the same promise by itself, the check
does not apply.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from twinweave import decoder
from twinweave.errors import UnsupportedModelError
from twinweave.genadapter import AdapterState, GenerativeAdapter, GenerativeAdapterConfig

from . import architectures
from .checks import GREEDY, NotApplicable, Result, close, equal, generated, labels_behind, logits_of, said, takes
from .subject import PAD

SETTINGS = {"state_size": 12, "rank": 5, "scale": 0.5, "chunk_size": 8}
STATES = 3
SHORT = GREEDY | {"max_new_tokens": 4}


@dataclass
class Reading:
    """One architecture, and a generator for it that is away from its start."""

    name: str
    pristine: PreTrainedModel

    def base(self) -> PreTrainedModel:
        return copy.deepcopy(self.pristine)

    def reader(self, moved: bool = True, **settings: Any) -> GenerativeAdapter:
        """A fresh generator over a fresh base, the same at every call."""
        torch.manual_seed(7)
        model = GenerativeAdapter(self.base(), GenerativeAdapterConfig(**{**SETTINGS, **settings}))
        if moved:
            for generator in model._generators:
                torch.nn.init.normal_(generator.output, std=0.5)
        return model.eval()

    def tokens(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Token ids [rows, length] without padding or special tokens."""
        made = torch.Generator().manual_seed(seed)
        return torch.randint(architectures.FIRST, architectures.VOCAB, (rows, length), generator=made)


def subject(name: str) -> Reading:
    """Architecture `name`."""
    return Reading(name, architectures.tiny_model(name).requires_grad_(False))


def refusal(subject: Reading) -> str | None:
    """Why the base cannot carry a generated adapter, in the library's words; None if it can."""
    try:
        subject.reader()
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:
        reason = _why_it_does_not_run(subject)
        if reason is None:
            raise
        raise RuntimeError(reason) from error
    return None


def run_check(name: str, subject: Reading) -> Result:
    """Run the check called `name`."""
    torch.manual_seed(0)
    try:
        return Result("pass", CHECKS[name](subject) or "")
    except NotApplicable as reason:
        return Result("n/a", str(reason))
    except Exception as error:
        return Result("fail", said(error))


# --- means ----------------------------------------------------------------------------------------------------------


def held_by(subject: Reading, measure: Callable[[Any], Any], reader: Any) -> Any:
    """`measure(reader)`. If that fails, and fails on the base alone as well, it is none of our doing."""
    try:
        return measure(reader)
    except Exception as error:
        try:
            measure(subject.base())
        except Exception as cause:
            raise NotApplicable(f"upstream: the base alone: {said(cause)}") from error
        raise


def state_of(subject: Reading, reader: GenerativeAdapter, seed: int) -> AdapterState:
    """What was read of a text of two chunks."""
    return reader.read_ids([subject.tokens(1, 8, seed)[0].tolist(), subject.tokens(1, 5, seed + 1)[0].tolist()])


def states_of(subject: Reading, reader: GenerativeAdapter) -> list[AdapterState]:
    return [state_of(subject, reader, 20 + 2 * i) for i in range(STATES)]


@contextlib.contextmanager
def answering(model: Any, states: Any) -> Iterator[Any]:
    """`model` adapted to the states, or as it is where it is a plain base."""
    if isinstance(model, GenerativeAdapter):
        with model.adapted(states):
            yield model
    else:
        yield model


def _why_it_does_not_run(subject: Reading) -> str | None:
    try:
        ids = subject.tokens(2, 8)
        base = subject.base()
        assert torch.isfinite(logits_of(base, ids, attention_mask=torch.ones_like(ids))).all(), "logits are not finite"
        below = decoder.decoder_of(base)
        assert below is not None
        with torch.no_grad():
            below(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:
        return f"upstream: the base alone: {said(error)}"
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def base_runs(subject: Reading) -> None:
    """The plain base runs, with a mask and without its head; otherwise nothing is said about the generator."""
    if reason := _why_it_does_not_run(subject):
        raise NotApplicable(reason)


def layers_found(subject: Reading) -> str:
    """Every block that has a token mixer gets an adapter, all of them by row; the note says which layers."""
    reader = subject.reader()
    assert all(target.by_row for target in reader.targets)
    return ", ".join(dict.fromkeys(target.name.rsplit(".", 1)[-1] for target in reader.targets))


def zero_is_the_base(subject: Reading) -> None:
    """A generator at its start gives the base's logits, bit for bit, in training and read; so does an empty state."""
    reader, ids, context = subject.reader(moved=False), subject.tokens(2, 9), subject.tokens(2, 7, seed=3)
    expected = logits_of(subject.base(), ids)
    for training in (True, False):
        reader.train(training)
        equal(logits_of(reader, ids, context_ids=context), expected, "logits of a generator at its start")
    with reader.adapted(state_of(subject, reader, 20)):
        equal(logits_of(reader, ids), expected, "logits of a state of a generator at its start")
    reader = subject.reader()
    with reader.adapted(reader.empty_state()):
        equal(logits_of(reader, ids), expected, "logits of an empty state")
    for name, tensor in subject.base().state_dict().items():
        assert torch.equal(tensor, reader.base.state_dict()[name]), f"the base's {name} has changed"


def reading_is_exact(subject: Reading) -> None:
    """The same text gives the same bits, states add in any order, and what is taken out leaves no trace."""
    reader = subject.reader()
    a, b = state_of(subject, reader, 20), state_of(subject, reader, 30)
    assert a == state_of(subject, reader, 20), "the same text gave another state"
    assert a != b, "two texts gave one state"
    assert all(tensor.any() for tensor in a.sums.values()), "a layer has read nothing"
    assert a + b == b + a, "the order matters"
    assert (a + b) - b == a, "taking out leaves a trace"
    again = subject.reader()
    assert state_of(subject, again, 20).sums.keys() == a.sums.keys()
    assert a == state_of(subject, again, 20), "another reader of the same weights reads something else"


def adapted_and_off(subject: Reading) -> None:
    """What was read changes the logits, differently for different texts; afterwards the base is as it was."""
    reader, ids = subject.reader(), subject.tokens(2, 9)
    expected = logits_of(subject.base(), ids)
    found = []
    for state in states_of(subject, reader):
        with reader.adapted(state):
            found.append(logits_of(reader, ids))
    least = 1e-4 * expected.abs().max()
    assert all((one - expected).abs().max() > least for one in found), "what was read changes nothing"
    assert (found[0] - found[1]).abs().max() > least, "two texts give the same logits"
    equal(logits_of(reader, ids), expected, "logits after the block")
    logits_of(reader, ids, context_ids=subject.tokens(2, 7, seed=3))
    equal(logits_of(reader, ids), expected, "logits after a context in the call")


def batch_of_states(subject: Reading) -> None:
    """A batch over several states, two rows for each, is each state alone; a context in the call is its state."""
    reader, ids = subject.reader(), subject.tokens(2 * STATES, 9)
    states = states_of(subject, reader)

    def measure(model: Any) -> None:
        with answering(model, states):
            together = logits_of(model, ids)
        for i, state in enumerate(states):
            with answering(model, state):
                close(together[2 * i : 2 * i + 2], logits_of(model, ids[2 * i : 2 * i + 2]), "logits in a batch, alone")

    held_by(subject, measure, reader)
    # a context in the call is iterated upon and a state decomposed; divided by a number both are the same
    reader = subject.reader(normalization="frobenius", rank=SETTINGS["state_size"])
    context = subject.tokens(STATES, 8, seed=40)
    live = logits_of(reader, ids, context_ids=context)
    with reader.adapted([reader.read_ids([row.tolist()]) for row in context]):
        close(live, logits_of(reader, ids), "logits of contexts in the call and of their states", 1e-3)


def generated_batch(subject: Reading) -> None:
    """Left-padded prompts over several states generate, with a cache, what each does alone and without one."""
    reader = subject.reader()
    states = states_of(subject, reader)
    prompts = [subject.tokens(1, length, seed=length) for length in (4, 9, 6)]
    ids = torch.cat([pad(p, (9 - p.shape[1], 0), value=PAD) for p in prompts])
    mask = torch.cat([pad(torch.ones_like(p), (9 - p.shape[1], 0)) for p in prompts])

    def measure(model: Any) -> None:
        with answering(model, states):
            found = generated(model, ids, SHORT, mask)
        for i, state in enumerate(states):
            with answering(model, state):
                alone = generated(model, prompts[i], SHORT)
            assert torch.equal(found[i : i + 1], alone), f"tokens in a batch {found[i].tolist()}, {alone[0].tolist()}"

    held_by(subject, measure, reader)


def cached_greedy(subject: Reading) -> None:
    """Greedy generation gives the same tokens with and without a cache."""
    reader, ids = subject.reader(), subject.tokens(STATES, 7)
    states = states_of(subject, reader)

    def measure(model: Any) -> None:
        with answering(model, states):
            expected = generated(model, ids, SHORT, use_cache=False)
            found = generated(model, ids, SHORT)
        assert torch.equal(found, expected), f"tokens with a cache {found.tolist()}, without {expected.tolist()}"

    held_by(subject, measure, reader)


def prompt_padding(subject: Reading) -> None:
    """A row in a batch padded on the right, or on the left with its positions, is the row alone."""
    reader, row, other = subject.reader(), subject.tokens(1, 7), subject.tokens(1, 11, seed=3)
    states = states_of(subject, reader)[:2]

    def measure(model: Any) -> None:
        for amount in ((0, 4), (4, 0)):
            ids = torch.cat((pad(row, amount, value=PAD), other))
            mask = torch.cat((pad(torch.ones_like(row), amount), torch.ones_like(other)))
            base = model.base if isinstance(model, GenerativeAdapter) else model
            given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes(base, "position_ids") else {}
            with answering(model, states[0]):
                alone = logits_of(model, row, attention_mask=torch.ones_like(row))
            with answering(model, states):
                found = logits_of(model, ids, attention_mask=mask, **given)
            close(found[0, mask[0] == 1], alone[0], f"logits of a row padded by {amount}")

    held_by(subject, measure, reader)


def context_padding(subject: Reading) -> None:
    """A chunk that is padded, on either side, is read as it is without."""
    reader = subject.reader()
    row, other = subject.tokens(1, 5, seed=8), subject.tokens(1, 8, seed=9)
    with torch.no_grad():
        expected = [s[0] for s in reader._chunk_sums(row, torch.ones_like(row))]

    def measure(model: Any) -> None:
        for amount in ((0, 3), (3, 0)):
            chunks = torch.cat((pad(row, amount, value=PAD), other))
            mask = torch.cat((pad(torch.ones_like(row), amount), torch.ones_like(other)))
            if isinstance(model, GenerativeAdapter):
                with torch.no_grad():
                    found = model._chunk_sums(chunks, mask)
                for one, alone in zip(found, expected, strict=True):
                    close(one[0], alone, f"sums of a chunk padded by {amount}")
            elif amount == (0, 3):
                alone = logits_of(model, row, attention_mask=torch.ones_like(row))
                close(logits_of(model, chunks, attention_mask=mask)[0, :5], alone[0], "the base's padded logits")

    with torch.no_grad():
        held_by(subject, measure, reader)


def causal(subject: Reading) -> None:
    """No logit depends on a later token of the prompt."""
    reader, ids = subject.reader(), subject.tokens(2, 10)
    other = torch.cat((ids[:, :6], subject.tokens(2, 4, seed=9)), 1)
    state = state_of(subject, reader, 20)

    def measure(model: Any) -> None:
        with answering(model, state):
            close(logits_of(model, other)[:, :6], logits_of(model, ids)[:, :6], "logits before a changed token")

    held_by(subject, measure, reader)


def exported(subject: Reading) -> None:
    """The exported LoRA, loaded by plain PEFT, gives the live logits, and has r·(in + out) numbers per layer."""
    reader, ids = subject.reader(), subject.tokens(2, 9)
    state = state_of(subject, reader, 20)
    with tempfile.TemporaryDirectory() as folder:
        state.to_lora(folder)
        plain = PeftModel.from_pretrained(subject.base(), folder).eval()
    with reader.adapted(state):
        close(logits_of(plain, ids), logits_of(reader, ids), "logits of plain PEFT and live", 1e-5)
    numbers = sum(p.numel() for name, p in plain.named_parameters() if "lora_" in name)
    assert numbers == sum(SETTINGS["rank"] * (t.in_features + t.out_features) for t in reader.targets)


def gradients(subject: Reading) -> None:
    """A training step reaches every parameter of the generator, and none of the base."""
    reader = subject.reader().train()
    ids, context = subject.tokens(2, 9), subject.tokens(2, 7, seed=3)

    def measure(model: Any) -> None:
        if not isinstance(model, GenerativeAdapter):
            model.requires_grad_(True)
            model(input_ids=ids, labels=labels_behind(ids, 3)).loss.backward()
            names = {t.name for t in reader.targets}
            found = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
            assert all(f"{name}.weight" in found for name in names), "no gradient reaches the layers"
            return
        loss = model(input_ids=ids, labels=labels_behind(ids, 3), context_ids=context).loss
        assert torch.isfinite(loss), "the loss is not finite"
        loss.backward()
        grads = {name: p.grad for name, p in model.generators.named_parameters()}
        without = [name for name, grad in grads.items() if grad is None or not grad.any()]
        assert not without, f"no gradient for {', '.join(without[:3])}"
        assert all(torch.isfinite(grad).all() for grad in grads.values()), "a gradient is not finite"
        assert all(p.grad is None for p in model.base.parameters()), "the base has gradients"

    held_by(subject, measure, reader)


def checkpointing(subject: Reading) -> None:
    """Gradient checkpointing runs blocks again, and gives the same gradients."""
    ids, context = subject.tokens(4, 9), subject.tokens(2, 7, seed=3)
    called: list[torch.nn.Module] = []

    def grads(model: Any) -> dict[str, Tensor]:
        given = {"context_ids": context} if isinstance(model, GenerativeAdapter) else {}
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=labels_behind(ids, 3), **given).loss
        called.clear()
        loss.backward()
        named = model.generators.named_parameters() if given else model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def measure(model: Any) -> None:
        own = isinstance(model, GenerativeAdapter)
        model = copy.deepcopy(model)
        if not own:
            model.requires_grad_(True)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        model.train()
        expected = {name: grad.clone() for name, grad in grads(model).items()}
        model.zero_grad()
        model.gradient_checkpointing_enable()
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        within = {part for layer in layers for part in layer.modules()}
        targets = [t.module for t in model.targets if t.module in within] if own else []
        for target in targets:  # before the call, which may be stopped early
            target.register_forward_pre_hook(lambda module, args: called.append(module))
        found = grads(model)
        assert called or not targets, "no block was run again"
        assert found.keys() == expected.keys(), "not the same parameters have gradients"
        for name, grad in found.items():
            close(grad, expected[name], f"gradient of {name}", 1e-4)

    held_by(subject, measure, subject.reader())


def saved(subject: Reading) -> None:
    """Generator and state, saved and loaded, give the same logits, bit for bit."""
    reader, ids = subject.reader(), subject.tokens(2, 9)
    state = state_of(subject, reader, 20)
    with reader.adapted(state):
        expected = logits_of(reader, ids)
    with tempfile.TemporaryDirectory() as folder:
        reader.save_pretrained(folder)
        state.save(folder)
        again = GenerativeAdapter.from_pretrained(folder, subject.base())
        loaded = AdapterState.load(folder, again)
    assert loaded == state
    with again.adapted(loaded):
        equal(logits_of(again, ids), expected, "logits after loading")


CHECKS: dict[str, Callable[[Reading], str | None]] = {
    "base runs": base_runs,
    "layers found": layers_found,
    "zero is the base": zero_is_the_base,
    "reading is exact": reading_is_exact,
    "adapted and off": adapted_and_off,
    "batch of states": batch_of_states,
    "generated batch": generated_batch,
    "cached greedy": cached_greedy,
    "prompt padding": prompt_padding,
    "context padding": context_padding,
    "causal": causal,
    "exported": exported,
    "gradients": gradients,
    "checkpointing": checkpointing,
    "saved": saved,
}
