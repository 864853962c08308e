"""What holds for every base that can answer from memories, each promise as one function with a name.

Knows nothing about which bases there are, nor about banks: memories are given. As in checks.py, where the base breaks
the same promise by itself, going on from keys and values of ordinary tokens, the check does not apply.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from twinweave import decoder
from twinweave.cmt import CMTConfig, MemoryModel
from twinweave.cmt.aggregator import pooled
from twinweave.cmt.compressor import takes_positions
from twinweave.cmt.model import Found
from twinweave.errors import DamagedFileError, UnsupportedModelError

from . import architectures
from .checks import NotApplicable, Result, close, equal, labels_behind, logits_of, said
from .subject import PAD

K = 5
SETTINGS = {
    "memory_tokens": K,
    "document_tokens": 8,
    "aggregator_layers": 2,
    "aggregator_heads": 2,
    "aggregator_head_size": 8,
    "prefix_rank": 7,
}
MEMORIES = 3
GREEDY = {"do_sample": False, "max_new_tokens": 4}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@dataclass
class Remembering:
    """One architecture, and a memory model for it that is away from its start."""

    name: str
    pristine: PreTrainedModel
    _made: MemoryModel | None = None

    def base(self) -> PreTrainedModel:
        return copy.deepcopy(self.pristine)

    def model(self, **settings: Any) -> MemoryModel:
        """A fresh memory model over a fresh base, the same at every call; it has no memories."""
        torch.manual_seed(7)
        base = self.base()
        model = MemoryModel(base, CMTConfig(**{**SETTINGS, **settings}), architectures.adapter(base))
        with torch.no_grad():
            for name, parameter in model.compressor.own_parameters():
                if name != "tokens":
                    parameter.add_(0.2 * torch.randn_like(parameter))
            for layer in model.prefix.layers:
                layer.bias.add_(0.3 * torch.randn_like(layer.bias))
        return model.eval()

    def with_memories(self) -> MemoryModel:
        """The same with memories given in a bank's place, others for each row; made once."""
        if self._made is None:
            self._made = self.model()
            give(self._made, self.memories(self._made))
        return self._made

    def memories(self, model: MemoryModel, seed: int = 20) -> Tensor:
        """What texts are compressed into, [MEMORIES, k, D]."""
        ids = self.tokens(MEMORIES, 8, seed)
        with torch.no_grad():
            return model.compressor(ids, torch.ones_like(ids))

    def tokens(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Token ids [rows, length] without padding or special tokens."""
        made = torch.Generator().manual_seed(seed)
        return torch.randint(architectures.FIRST, architectures.VOCAB, (rows, length), generator=made)


class Continued:
    """The base alone, going on from keys and values of k ordinary tokens: what a prefix is to be like."""

    def __init__(self, base: PreTrainedModel, front: Tensor) -> None:
        self.base, self.front = base, front

    def _inputs(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        cache, front = DynamicCache(config=self.base.config), self.front[:1].expand(len(ids), -1)
        self.base(input_ids=front, past_key_values=cache, use_cache=True)
        mask = torch.ones_like(ids) if mask is None else mask
        given = {"input_ids": ids, "attention_mask": torch.cat((torch.ones_like(front), mask), 1)}
        return given | {"past_key_values": cache}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        given = self._inputs(input_ids, attention_mask)
        if takes_positions(decoder.decoder_of(self.base)):
            given["position_ids"] = (given["attention_mask"].cumsum(1) - 1)[:, K:].clamp(min=0)
        return self.base(**given, use_cache=True)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        copies = options.get("num_beams", 1)
        given = self._inputs(input_ids, attention_mask)
        if copies > 1:
            given["past_key_values"].batch_repeat_interleave(copies)
        return self.base.generate(**given, **options)


def subject(name: str) -> Remembering:
    """Architecture `name`."""
    return Remembering(name, architectures.tiny_model(name).requires_grad_(False))


def refusal(subject: Remembering) -> str | None:
    """Why the base cannot answer from memories, in the library's words; None if it can."""
    try:
        subject.model()
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:
        reason = _why_it_does_not_run(subject)
        if reason is None:
            raise
        raise RuntimeError(reason) from error
    return None


def run_check(name: str, subject: Remembering) -> Result:
    """Run the check called `name`."""
    torch.manual_seed(0)
    try:
        return Result("pass", CHECKS[name](subject) or "")
    except NotApplicable as reason:
        return Result("n/a", str(reason))
    except Exception as error:
        return Result("fail", said(error))


# --- means ----------------------------------------------------------------------------------------------------------


def give(model: MemoryModel, memories: Tensor) -> None:
    """Let `model` find all of `memories` [N, k, D] for every question, each row's weighed anew by what it asks."""

    def retrieved(ids: Tensor, mask: Tensor, *_: Any) -> Found:
        seen = torch.ones(len(ids), len(memories), dtype=torch.bool)
        return Found(model.reader.compressed(ids, mask), memories[None].expand(len(ids), -1, -1, -1), seen, seen.any(1))

    model._retrieved = retrieved


def held_by(subject: Remembering, measure: Callable[[Any], Any], model: Any) -> Any:
    """`measure(model)`. If that fails, and fails on the base alone as well, it is none of our doing."""
    try:
        return measure(model)
    except Exception as error:
        try:
            measure(Continued(subject.base(), subject.tokens(1, K, seed=77)))
        except Exception as cause:
            raise NotApplicable(f"upstream: the base alone: {said(cause)}") from error
        raise


def asked(model: Any, ids: Tensor, prompt: int, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Logits of a call in which the first `prompt` columns are the question."""
    mask = torch.ones_like(ids) if mask is None else mask
    question = (torch.arange(ids.shape[1]) < prompt).expand(ids.shape)
    return logits_of(model, ids, attention_mask=mask, query_mask=question, **more)


def answers(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """What `generate` gives for prompts `ids` [B, T]."""
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    given = {"attention_mask": mask, "pad_token_id": PAD, "eos_token_id": None} | GREEDY | options
    return model.generate(input_ids=ids, **given)


def _why_it_does_not_run(subject: Remembering) -> str | None:
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


def base_runs(subject: Remembering) -> None:
    """The plain base runs, with a mask and without its head; otherwise nothing is said about memories."""
    if reason := _why_it_does_not_run(subject):
        raise NotApplicable(reason)


def empty_is_the_base(subject: Remembering) -> None:
    """Without memories, logits and answers are the base's, bit for bit, also after something was compressed."""
    ids, plain, model = subject.tokens(2, 9), subject.base(), subject.model()
    expected = logits_of(plain, ids)
    equal(logits_of(model, ids), logits_of(plain, ids, attention_mask=torch.ones_like(ids)), "logits without memories")
    subject.memories(model)
    equal(logits_of(model.base, ids), expected, "the base's own logits after a compression")
    equal(logits_of(model, ids), logits_of(plain, ids, attention_mask=torch.ones_like(ids)), "logits without memories")
    try:
        tokens = answers(plain, ids)
    except Exception as error:
        raise NotApplicable(f"upstream: the base alone: {said(error)}") from error
    assert torch.equal(answers(model, ids), tokens), "answers without memories are others than the base's"


def memories_matter(subject: Remembering) -> None:
    """Two texts have two memories, and other memories give other logits."""
    model, ids = subject.model(), subject.tokens(2, 9)
    alone, found = logits_of(model, ids), []
    for seed in (20, 30):
        memories = subject.memories(model, seed)
        assert torch.isfinite(memories).all(), "a memory is not finite"
        apart = (memories[0] - memories[1]).abs().max() / memories.abs().max()
        assert apart > 1e-4, "two texts have the same memory"
        give(model, memories)
        found.append(logits_of(model, ids))
    least = 1e-5 * alone.abs().max()
    assert (found[0] - alone).abs().max() > least, "memories change nothing"
    assert (found[0] - found[1]).abs().max() > least, "other memories change nothing"


def order(subject: Remembering) -> None:
    """The order of the memories does not matter, and one that comes twice changes nothing if all do."""
    model, ids = subject.model(), subject.tokens(2, 9)
    memories = subject.memories(model)
    give(model, memories)
    expected = logits_of(model, ids)
    for other in (memories.flip(0), memories[[1, 2, 0]], torch.cat((memories, memories.flip(0)))):
        give(model, other)
        close(logits_of(model, ids), expected, "logits of memories in another order", 1e-3)


def layers_found(subject: Remembering) -> str | None:
    """There is a layer that the prefix can be put in front of; the note says which, where it is not every one."""
    shapes, layers = subject.with_memories().prefix.shapes, DynamicCache(config=subject.pristine.config).layers
    assert shapes
    carried = [shape.index for shape in shapes]
    return None if carried == list(range(len(layers))) else f"in layers {carried} of {len(layers)}"


def prefix_is_plain(subject: Remembering) -> None:
    """The keys and values of ordinary tokens as the prefix give the logits of those tokens in front of the row, also
    where rows are padded, and in generation."""
    model, base, front = subject.model(), subject.base(), subject.tokens(2, K, seed=40)
    ids = subject.tokens(2, 9)
    give(model, subject.memories(model))
    carried = [shape.index for shape in model.prefix.shapes]
    states = any(hasattr(layer, "conv_states") for layer in DynamicCache(config=base.config).layers)
    if states or carried != list(range(len(DynamicCache(config=base.config).layers))):
        raise NotApplicable("tokens in front leave more than keys and values")
    cache = DynamicCache()  # of no config, which keeps what has left a sliding window
    with torch.no_grad():
        base(input_ids=front, past_key_values=cache, use_cache=True)
    pairs = {index: (cache.layers[index].keys, cache.layers[index].values) for index in carried}
    model.prefix.forward = lambda memory: pairs  # type: ignore[method-assign]

    def measure(one: Any) -> None:
        both = front if isinstance(one, MemoryModel) else front[:1].expand(2, -1)
        if not isinstance(one, MemoryModel):
            one.front = front
        whole = torch.cat((both, ids), 1)
        expected = logits_of(base, whole, attention_mask=torch.ones_like(whole))[:, K:]
        close(logits_of(one, ids), expected, "logits behind keys and values of tokens, and behind the tokens", 1e-4)
        found = answers(one, ids, **LOGITS)
        tokens = torch.cat((both, found.sequences), 1)
        expected = logits_of(base, tokens, attention_mask=torch.ones_like(tokens))[:, K + 8 : -1]
        close(torch.stack(found.logits, 1), expected, "logits of generation behind the same", 1e-4)

    held_by(subject, measure, model)


def document_padding(subject: Remembering) -> None:
    """A text that is padded, on either side, has the memory that it has alone."""
    model = subject.with_memories()
    row, other = subject.tokens(1, 5, seed=8), subject.tokens(1, 8, seed=9)

    def measure(one: Any) -> None:
        alone = _compressed(one, row, torch.ones_like(row))
        for amount in ((0, 3), (3, 0)):
            ids = torch.cat((pad(row, amount, value=PAD), other))
            mask = torch.cat((pad(torch.ones_like(row), amount), torch.ones_like(other)))
            close(_compressed(one, ids, mask)[:1], alone, f"memory of a text padded by {amount}", 1e-4)

    held_by(subject, measure, model)


@torch.no_grad()
def _compressed(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    if isinstance(model, MemoryModel):
        return model.compressor(ids, mask)
    order = mask.argsort(dim=1, stable=True)  # the base alone: its last state of a row that is padded in front
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    below = decoder.decoder_of(model.base)
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes_positions(below) else {}
    return below(input_ids=ids, attention_mask=mask, use_cache=False, **given)[0][:, -1:]


def prompt_padding(subject: Remembering) -> None:
    """A row in a batch, padded on either side, is the row alone."""
    row, other = subject.tokens(1, 7), subject.tokens(1, 11, seed=3)

    def measure(one: Any) -> None:
        alone = asked(one, row, 11)
        for amount in ((0, 4), (4, 0)):
            ids = torch.cat((pad(row, amount, value=PAD), other))
            mask = torch.cat((pad(torch.ones_like(row), amount), torch.ones_like(other)))
            found = asked(one, ids, 11, mask)
            close(found[0, mask[0] == 1], alone[0], f"logits of a row padded by {amount}", 1e-4)

    held_by(subject, measure, subject.with_memories())


def causal(subject: Remembering) -> None:
    """No logit depends on a later token of the answer."""
    ids = subject.tokens(2, 10)
    other = torch.cat((ids[:, :6], subject.tokens(2, 4, seed=9)), 1)

    def measure(one: Any) -> None:
        close(asked(one, other, 4)[:, :6], asked(one, ids, 4)[:, :6], "logits before a changed token")

    held_by(subject, measure, subject.with_memories())


def cached(subject: Remembering) -> None:
    """Every logit of greedy generation is that of one call with the whole answer."""
    ids = subject.tokens(2, 7)

    def measure(one: Any) -> None:
        found = answers(one, ids, **LOGITS)
        expected = asked(one, found.sequences, 7)[:, 6:-1]
        close(torch.stack(found.logits, 1), expected, "logits of generation and of one call", 1e-4)

    held_by(subject, measure, subject.with_memories())


def static(subject: Remembering) -> None:
    """A static cache gives the logits of a dynamic one."""
    ids = subject.tokens(2, 7)
    model = subject.with_memories()
    expected = torch.stack(answers(model, ids, **LOGITS).logits, 1)

    def measure(one: Any) -> None:
        found = answers(one, ids, cache_implementation="static", **LOGITS)
        if isinstance(one, MemoryModel):
            close(torch.stack(found.logits, 1), expected, "logits with a static cache", 1e-4)

    try:
        measure(model)
    except Exception as error:
        plain = subject.base()
        try:
            usual, found = (answers(plain, ids, **LOGITS, **more) for more in ({}, {"cache_implementation": "static"}))
            close(torch.stack(found.logits, 1), torch.stack(usual.logits, 1), "logits with a static cache", 1e-4)
        except Exception as cause:
            raise NotApplicable(f"upstream: the base alone: {said(cause)}") from error
        raise


def batch(subject: Remembering) -> None:
    """Left-padded prompts generate the logits that each has alone."""
    prompts = [subject.tokens(1, length, seed=length) for length in (4, 9, 6)]
    ids = torch.cat([pad(p, (9 - p.shape[1], 0), value=PAD) for p in prompts])
    mask = torch.cat([pad(torch.ones_like(p), (9 - p.shape[1], 0)) for p in prompts])

    def measure(one: Any) -> None:
        found = torch.stack(answers(one, ids, mask, **LOGITS, max_new_tokens=2).logits, 1)
        for i, prompt in enumerate(prompts):
            alone = torch.stack(answers(one, prompt, **LOGITS, max_new_tokens=2).logits, 1)
            close(found[i : i + 1, 0], alone[:, 0], "the first logits in a batch and alone", 1e-4)
            if found[i, 0].argmax() == alone[0, 0].argmax():
                close(found[i : i + 1, 1], alone[:, 1], "the second logits in a batch and alone", 1e-4)

    held_by(subject, measure, subject.with_memories())


def beams(subject: Remembering) -> None:
    """What beam search gives scores what one call with the whole answer says that it scores."""
    ids = subject.tokens(2, 7)
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}

    def measure(one: Any) -> None:
        found = answers(one, ids, **options, return_dict_in_generate=True)
        logits = asked(one, found.sequences, 7)[:, 6:-1].log_softmax(-1)
        expected = logits.gather(-1, found.sequences[:, 7:, None]).sum((1, 2))
        close(found.sequences_scores, expected, "scores of beams and of one call", 1e-3)

    held_by(subject, measure, subject.with_memories())


def contrast(subject: Remembering) -> None:
    """Contrastive decoding takes the base's own logits from those with memories, token by token, padded rows too."""
    ids = torch.cat((pad(subject.tokens(1, 5, seed=5), (2, 0), value=PAD), subject.tokens(1, 7)))
    mask = (ids != PAD).long()
    model, plain = subject.with_memories(), subject.base()

    def measure(one: Any) -> None:
        own = isinstance(one, MemoryModel)
        given = {"contrast": 0.7} if own else {}
        found = answers(one, ids, mask, **given, return_dict_in_generate=True, output_scores=True)
        whole = found.sequences
        seen = torch.cat((mask, torch.ones_like(whole[:, 7:])), 1)
        expected = asked(one, whole, 7, seen)[:, 6:-1]
        if own:
            at = {"position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
            given = at if takes_positions(decoder.decoder_of(plain)) else {}
            without = logits_of(plain, whole, attention_mask=seen, **given)[:, 6:-1]
            expected = 1.7 * expected - 0.7 * without
        close(torch.stack(found.scores, 1), expected, "contrasted logits and those of two passes", 1e-4)

    held_by(subject, measure, model)


def _step(subject: Remembering) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    ids = subject.tokens(4, 9)
    documents = subject.tokens(2, 7, seed=3)
    return ids, labels_behind(ids, 5), {"context_ids": documents, "context_mask": torch.ones_like(documents)}


def loss(subject: Remembering) -> None:
    """A training call's logits and loss are those of answering, of the base alone, and of the formula."""
    model = subject.model(self_matching_weight=0.0)
    ids, labels, documents = _step(subject)
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels, **documents)
        give(model, model.compressor(documents["context_ids"], documents["context_mask"]))

    def measure(one: Any) -> None:
        answering = asked(one, ids, 5)
        own = isinstance(one, MemoryModel)
        close(asked(one, ids, 5), answering, "logits of two calls")
        if own:
            at_labels = answering[:, 4:-1].flatten(0, 1)
            close(out.logits[0], at_labels.float(), "logits in training and in answering", 1e-4)
            plain = logits_of(subject.base(), ids, attention_mask=torch.ones_like(ids))[:, 4:-1].flatten(0, 1)
            expected = cross_entropy(1.5 * at_labels - 0.5 * plain, ids[:, 5:].flatten())
            close(out.loss, expected, "the loss and its formula", 1e-4)

    held_by(subject, measure, model)


def gradients(subject: Remembering) -> None:
    """A training step reaches every trained parameter, and no weight of the base."""
    model = subject.model(similarity_bias=True).train()
    ids, labels, documents = _step(subject)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(input_ids=ids, labels=labels, **documents).loss
    assert torch.isfinite(loss), "the loss is not finite"
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    assert all(torch.isfinite(p.grad).all() for p in trained.values() if p.grad is not None), "a gradient is not finite"
    optimizer.step()
    own = model.compressor.prefix
    for name, tensor in model.base.state_dict().items():
        assert own in name or torch.equal(tensor, before[name]), f"the base's {name} has changed"
    if without:  # of experts that no token is sent to, say: are they reached by plain PEFT?
        plain = _reached_by_peft(subject, torch.cat((ids, subject.tokens(4, 7, seed=3)), 1))
        ours = [name for name in without if name.removeprefix("compressor.peft.") not in plain]
        assert len(ours) == len(without), f"no gradient for {', '.join(n for n in without if n not in ours)[:200]}"
        raise NotApplicable(f"upstream: plain PEFT: no gradient for {len(without)} parameters either")


def _reached_by_peft(subject: Remembering, ids: Tensor) -> set[str]:
    base = subject.base()
    plain = get_peft_model(base, architectures.adapter(base))
    below: Any = decoder.decoder_of(base)
    below(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0].float().sum().backward()
    return {name for name, p in plain.named_parameters() if p.grad is not None}


def checkpointing(subject: Remembering) -> None:
    """Gradient checkpointing runs blocks again in compression, and gives the same gradients."""
    model = subject.model().train()
    if not model.base.supports_gradient_checkpointing:
        raise NotApplicable("upstream: the base alone: no gradient checkpointing")
    ids, labels, documents = _step(subject)

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=labels, **documents).loss
        called.clear()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    called: list[torch.nn.Module] = []
    expected = grads()
    model.gradient_checkpointing_enable()
    blocks = [m for m in model.compressor.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {part for block in blocks for part in block.modules()}
    for layer in model.compressor._layers:  # of blocks themselves a call may not be seen
        if layer in inside:
            layer.register_forward_pre_hook(lambda module, args: called.append(module))
    found = grads()
    model.gradient_checkpointing_disable()
    assert called or not blocks, "no block was run again"
    assert found.keys() == expected.keys(), "not the same parameters have gradients"
    try:
        for name, grad in found.items():
            close(grad, expected[name], f"gradient of {name}", 1e-4)
    except AssertionError as error:
        if reason := _base_checkpoints_otherwise(subject):
            raise NotApplicable(f"upstream: the base alone: {reason}") from error
        raise


def _base_checkpoints_otherwise(subject: Remembering) -> str | None:
    """Why checkpointing changes the gradients of the base by itself."""
    base, ids, found = subject.base().train(), subject.tokens(2, 7), []
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    table: Any = base.get_input_embeddings()
    table.weight.requires_grad_(True)
    below: Any = decoder.decoder_of(base)
    try:
        for _ in range(2):
            states = below(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
            found.append(torch.autograd.grad((states.float() ** 3).sum(), table.weight)[0])
            base.gradient_checkpointing_enable()
        close(found[1], found[0], "gradients of embeddings with checkpointing and without", 1e-4)
    except Exception as error:
        return said(error)
    return None


def saved(subject: Remembering) -> None:
    """A saved model on a fresh base makes the same memories and gives the same logits, bit for bit."""
    model, ids = subject.with_memories(), subject.tokens(2, 9)
    memories, expected = subject.memories(model), logits_of(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            again = MemoryModel.from_pretrained(folder, subject.base(), is_trainable=True).eval()
        except DamagedFileError as error:
            raise _lost_by_peft(subject, error) from error
    assert again.fingerprint() == model.fingerprint(), "another fingerprint"
    found = subject.memories(again)
    equal(found, memories, "memories after loading")
    equal(pooled(found), pooled(memories), "keys after loading")
    give(again, found)
    equal(logits_of(again, ids), expected, "logits after loading")


def _lost_by_peft(subject: Remembering, error: Exception) -> Exception:
    base = subject.base()
    plain = get_peft_model(base, architectures.adapter(base))
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder, save_embedding_layers=False)
        again = PeftModel.from_pretrained(subject.base(), folder).state_dict()
    own = plain.state_dict()
    lost = [name for name, tensor in again.items() if "lora_" in name and not torch.equal(tensor, own[name])]
    return NotApplicable(f"upstream: plain PEFT: {lost[0]} is not what was saved") if lost else error


CHECKS: dict[str, Callable[[Remembering], str | None]] = {
    "base runs": base_runs,
    "layers found": layers_found,
    "empty is the base": empty_is_the_base,
    "memories matter": memories_matter,
    "order": order,
    "prefix is plain": prefix_is_plain,
    "document padding": document_padding,
    "prompt padding": prompt_padding,
    "causal": causal,
    "cached": cached,
    "static": static,
    "batch": batch,
    "beams": beams,
    "contrast": contrast,
    "loss": loss,
    "gradients": gradients,
    "checkpointing": checkpointing,
    "saved": saved,
}
