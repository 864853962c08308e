"""What holds for every base and every adapter that can be wrapped, each promise as one function with a name.

Knows nothing about which bases and adapters there are. A check returns a note (or None), raises NotApplicable with the
reason, or fails with any other exception. Where the base or plain PEFT breaks the same promise without us, the check
does not apply: `held_by` finds that out, by the same measurement on the plain models.
"""

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, pad

from twinweave import GuardSettings, IMSMModel, fit_guard
from twinweave.errors import UnsupportedModelError

from .subject import PAD, Subject

Measure = Callable[[Any], Any]
CLOSE = 5e-5  # of the largest value: fp32, the same sums in another order
GREEDY = {"do_sample": False, "no_repeat_ngram_size": 1, "suppress_tokens": [PAD], "max_new_tokens": 6}
BEAMS = {"do_sample": False, "num_beams": 3, "max_new_tokens": 5}


class NotApplicable(Exception):
    """The promise says nothing about this subject; the message says why."""


@dataclass
class Result:
    """What came out of one check."""

    status: Literal["pass", "n/a", "fail"]
    note: str = ""


def run_check(name: str, subject: Subject) -> Result:
    """Run the check called `name`."""
    torch.manual_seed(0)
    try:
        return Result("pass", CHECKS[name](subject) or "")
    except NotApplicable as reason:
        excused = not (subject.control is not None and str(reason).startswith("upstream: plain PEFT"))
        return Result("n/a" if excused else "fail", str(reason))
    except Exception as error:
        return Result("fail", said(error))


def refusal(subject: Subject) -> str | None:
    """Why the subject cannot be wrapped, in the library's words; None if it can."""
    try:
        subject.twin()
    except UnsupportedModelError as error:
        return str(error)
    return None


def said(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = "" if isinstance(error, AssertionError) and lines else f"{type(error).__name__}: "
    return (name + " ".join(lines[:3]))[:300]


# --- means ----------------------------------------------------------------------------------------------------------


def held_by(subject: Subject, measure: Measure, twin: Any, plain: bool = True) -> Any:
    """`measure(twin)`. If that fails, and fails on the base alone or on plain PEFT as well, it is none of our doing."""
    try:
        return measure(twin)
    except Exception as error:
        like = twin if isinstance(twin, IMSMModel) else None
        controls = {"the base alone": lambda: measure(subject.base())}
        if subject.control is not None:
            controls["plain LoRA"] = lambda: measure((c := subject.control()).plain(c.moved()))
        elif plain:
            controls["plain PEFT"] = lambda: measure(subject.plain(like))
        for who, control in controls.items():
            try:
                control()
            except Exception as cause:
                raise NotApplicable(f"upstream: {who}: {said(cause)}") from error
        raise


def equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit."""
    assert found.shape == expected.shape, f"{what}: {list(found.shape)} instead of {list(expected.shape)}"
    assert torch.isfinite(found).all(), f"{what}: not finite"
    assert torch.equal(found, expected), f"{what} differ by up to {(found - expected).abs().max():.2g}"


def close(found: Tensor, expected: Tensor, what: str, share: float = CLOSE) -> None:
    """Up to rounding: within `share` of the largest value."""
    assert found.shape == expected.shape, f"{what}: {list(found.shape)} instead of {list(expected.shape)}"
    assert torch.isfinite(found).all(), f"{what}: not finite"
    apart = float((found.float() - expected.float()).abs().max()) if found.numel() else 0.0
    most = share * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    assert apart <= most, f"{what} differ by up to {apart:.2g}, more than rounding ({most:.2g})"


def logits_of(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits [B, T, V] of a call without gradients."""
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def generated(model: Any, ids: Tensor, options: dict[str, Any], mask: Tensor | None = None, **more: Any) -> Tensor:
    """The tokens that `generate` adds to `ids` [B, T]."""
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"attention_mask": mask, "pad_token_id": PAD, "eos_token_id": None} | options | more
    return model.generate(input_ids=ids, **settings)[:, ids.shape[1] :]


def labels_behind(ids: Tensor, start: int) -> Tensor:
    """Labels for everything from column `start` on."""
    return torch.where(torch.arange(ids.shape[1]) >= start, ids, -100)


def predicting(loss: Tensor, logits: Tensor, ids: Tensor, start: int) -> tuple[slice, float]:
    """The columns of `logits` [B, T, V] that predict `ids[:, start:]`, and how far `loss` is from their cross-entropy.

    Causal models shift their labels by one; decoders cut out of encoder-decoders leave that to the caller.
    """
    found = []
    for columns in (slice(start - 1, -1), slice(start, None)):
        own = cross_entropy(logits[:, columns].flatten(0, 1).float(), ids[:, start:].flatten())
        found.append((columns, float((own - loss).abs())))
    return min(found, key=lambda pair: pair[1])


def columns_before(subject: Subject, ids: Tensor, start: int) -> slice:
    """The columns of logits that predict `ids[:, start:]`, as the base has it: an adapter may add to the loss."""
    with torch.no_grad():
        out = subject.base()(input_ids=ids, labels=labels_behind(ids, start))
    return predicting(out.loss, out.logits, ids, start)[0]


def takes(model: Any, name: str) -> bool:
    """Whether the base's forward has an argument of this name."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return name in inspect.signature(base.forward).parameters


def gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradients that are not zero, of a training step without an update. Buffers are left as they were, so
    that the next such step is compared with this one: SLIM's clusters slide."""
    torch.manual_seed(11)
    model.zero_grad()
    model.state_dict()  # clusters take in what they have gathered
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    model.eval()
    model.state_dict()
    for name, buffer in model.named_buffers():
        buffer.copy_(before.get(name, buffer))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    model.zero_grad()
    return loss.detach(), found


def trained(subject: Subject, model: IMSMModel, rehearse: bool = False, steps: int = 3) -> IMSMModel:
    """A few steps of training, with rehearsal of both memories after each where `rehearse` is set."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        ids = subject.tokens(3, 9, seed=50 + step)
        losses = [model(input_ids=ids, labels=labels_behind(ids, 4)).loss]
        if rehearse:
            other = subject.tokens(2, 9, seed=60 + step)
            losses.append(model(input_ids=other, labels=labels_behind(other, 2), rehearse="both").loss)
        for loss in losses:
            assert torch.isfinite(loss), "the loss is not finite"
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def guarded(subject: Subject, model: IMSMModel) -> IMSMModel:
    """`model` with a guard whose border runs through the test's own queries."""

    def batches(seed: int) -> list[dict[str, Tensor]]:
        rows = [subject.tokens(4, 8, seed=seed + i) for i in range(6)]
        return [{"input_ids": ids, "labels": labels_behind(ids, 4)} for ids in rows]

    guard = fit_guard(model, batches(100), batches(200), GuardSettings(affected=0.1, clusters=2, directions=8))
    guard.border[0] *= 0.5
    return model


# --- the two ends ---------------------------------------------------------------------------------------------------


def base_runs(subject: Subject) -> None:
    """The plain base, and plain PEFT over it, run and learn at all; otherwise nothing is said about the twin."""
    makers = {"the base alone": subject.base, "plain PEFT": subject.plain}
    for who, make in makers.items():
        try:
            _runs(subject, make())
        except Exception as error:
            if who == "plain PEFT" and subject.control is not None:
                control = subject.control()
                try:
                    _runs(control, control.plain())
                except Exception as cause:
                    raise NotApplicable(f"upstream: plain LoRA: {said(cause)}") from error
            raise NotApplicable(f"upstream: {who}: {said(error)}") from error


def _runs(subject: Subject, model: Any) -> None:
    ids = subject.tokens(2, 8)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels_behind(ids, 3))
    assert torch.isfinite(out.logits).all(), "logits are not finite"
    assert torch.isfinite(out.loss), "the loss is not finite"
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            if hasattr(config, "l1_weight"):
                config.l1_weight = 0.0  # SLIM's own term has a gradient even where none comes through the base
        assert gradients(model, input_ids=ids, labels=labels_behind(ids, 3))[1], "no gradient reaches it"


def step_zero(subject: Subject) -> str:
    """Before training, whatever the gate says, the woven model is the base; bit for bit if its adapter is."""
    model, ids = subject.twin(moved=False), subject.tokens(2, 9)
    if hasattr(model.gate, "w_b"):
        torch.nn.init.normal_(model.gate.w_b)
    expected = logits_of(subject.base(), ids)
    found, plain = logits_of(model, ids), logits_of(subject.plain(), ids)
    if torch.equal(found, expected):
        return "bit for bit"
    try:
        close(plain, expected, "logits")
    except AssertionError as error:
        raise NotApplicable(f"this adapter does not start at the base: {said(error)}") from None
    close(found, expected, "logits before training and the base's")
    return "to rounding"


def _original_is_base(subject: Subject, model: IMSMModel) -> None:
    base, ids = subject.base(), subject.tokens(2, 9)
    mask = torch.ones_like(ids)
    expected = logits_of(base, ids, attention_mask=mask)
    with model.use_memory("original"):
        equal(logits_of(model, ids, attention_mask=mask), expected, "original and base logits")
    model.retention = float("inf")
    close(logits_of(model, ids, attention_mask=mask), expected, "logits at infinite retention and the base's")
    model.retention = 0.0
    assert not torch.equal(logits_of(model, ids, attention_mask=mask), expected), "training has changed nothing"
    inside = {n.replace(".base_layer.", "."): t for n, t in model.get_base_model().state_dict().items()}
    for name, tensor in base.state_dict().items():
        own = inside.get(name)
        if own is not None and ".original_module." not in name:
            assert torch.equal(own, tensor), f"the base's {name} has changed"
    if base.can_generate():
        expected = generated(base, ids, GREEDY)
        with model.use_memory("original"):
            assert torch.equal(generated(model, ids, GREEDY), expected), "original generates other tokens than the base"


def original_after_training(subject: Subject) -> None:
    """The original memory is the base, bit for bit, after training steps; no tensor of the base has moved."""
    model = trained(subject, subject.twin(moved=False))
    _original_is_base(subject, model)


def original_after_rehearsal(subject: Subject) -> None:
    """The same after training with rehearsal of both memories."""
    _original_is_base(subject, trained(subject, subject.twin(moved=False), rehearse=True))


def enhanced_is_plain(subject: Subject) -> None:
    """The enhanced memory is plain PEFT with the same adapter, bit for bit; so is a retention of minus infinity."""
    model, ids = subject.moved(), subject.tokens(2, 9)
    plain = subject.plain(model)
    expected = logits_of(plain, ids)
    with model.use_memory("enhanced"):
        equal(logits_of(model, ids), expected, "enhanced and plain PEFT logits")
    model.retention = float("-inf")
    close(logits_of(model, ids), expected, "logits at retention -inf and plain PEFT's")


def memories_differ(subject: Subject) -> None:
    """The woven model is neither of its memories, so that the other checks compare something."""
    model, ids = subject.moved(), subject.tokens(2, 9)
    woven, expected = logits_of(model, ids), logits_of(subject.base(), ids)
    with model.use_memory("enhanced"):
        enhanced = logits_of(model, ids)
    scale = expected.abs().max()
    for name, other in (("original", expected), ("enhanced", enhanced)):
        assert (woven - other).abs().max() > 1e-3 * scale, f"woven and {name} logits are the same"
    out = model(input_ids=ids, output_gate=True)
    assert out.gate.shape == (*ids.shape, model.gate.hidden_size)


# --- causality, padding, generation ---------------------------------------------------------------------------------


def causal(subject: Subject) -> None:
    """No logit depends on a later token, with and without labels."""
    ids = subject.tokens(2, 10)
    other = ids.clone()
    other[:, 6:] = subject.tokens(2, 4, seed=9)

    def measure(model: Any) -> None:
        for start in (None, 3):
            given = [{"labels": labels_behind(x, start)} if start else {} for x in (ids, other)]
            before, after = logits_of(model, ids, **given[0]), logits_of(model, other, **given[1])
            close(after[:, :6], before[:, :6], "logits before a changed token")

    held_by(subject, measure, subject.moved())


def _padded(subject: Subject, side: str) -> None:
    row, other = subject.tokens(1, 7), subject.tokens(1, 11, seed=3)
    amount = (4, 0) if side == "left" else (0, 4)
    ids = torch.cat((pad(row, amount, value=PAD), other))
    mask = torch.cat((pad(torch.ones_like(row), amount), torch.ones_like(other)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def measure(model: Any) -> None:
        given = {"position_ids": positions} if takes(model, "position_ids") else {}
        for start in (None, 3):
            labels = labels_behind(row, start) if start else None
            alone = logits_of(model, row, attention_mask=torch.ones_like(row), labels=labels)
            if labels is not None:
                labels = torch.full_like(ids, -100)
                labels[0, mask[0] == 1] = labels_behind(row, 3)[0]
            batched = logits_of(model, ids, attention_mask=mask, labels=labels, **given)
            close(batched[0, mask[0] == 1], alone[0], f"logits of a row alone and padded on the {side}")

    held_by(subject, measure, subject.moved())


def padding_right(subject: Subject) -> None:
    """A row in a batch padded on the right is the row alone."""
    _padded(subject, "right")


def padding_left(subject: Subject) -> None:
    """A row in a batch padded on the left, with its positions where the model takes them, is the row alone."""
    _padded(subject, "left")


def _cached(subject: Subject, options: dict[str, Any], guard: bool = False) -> None:
    ids = subject.tokens(2, 7)

    def measure(model: Any) -> None:
        expected = generated(model, ids, options, use_cache=False)
        for plan in ("stacked", "two_pass") if isinstance(model, IMSMModel) else ("",):
            model.plan = plan
            found = generated(model, ids, options)
            assert torch.equal(found, expected), f"tokens with a cache {found.tolist()}, without {expected.tolist()}"

    twin = subject.moved()
    held_by(subject, measure, guarded(subject, twin) if guard else twin)


def cached_greedy(subject: Subject) -> None:
    """Greedy generation gives the same tokens with and without a cache, in both forms of the twin."""
    _cached(subject, GREEDY)


def cached_beams(subject: Subject) -> None:
    """So does beam search."""
    _cached(subject, BEAMS)


def cached_guarded(subject: Subject) -> None:
    """So does greedy generation with a guard."""
    _cached(subject, GREEDY, guard=True)


def _batched(subject: Subject, guard: bool) -> None:
    prompts = [subject.tokens(1, length, seed=length) for length in (4, 9)]
    ids = torch.cat([pad(p, (9 - p.shape[1], 0), value=PAD) for p in prompts])
    mask = torch.cat([pad(torch.ones_like(p), (9 - p.shape[1], 0)) for p in prompts])

    def measure(model: Any) -> None:
        found = generated(model, ids, GREEDY, mask)
        alone = torch.cat([generated(model, p, GREEDY) for p in prompts])
        assert torch.equal(found, alone), f"tokens in a batch {found.tolist()}, alone {alone.tolist()}"

    twin = subject.moved()
    held_by(subject, measure, guarded(subject, twin) if guard else twin)


def batch_left_padded(subject: Subject) -> None:
    """A left-padded batch generates what its rows generate alone."""
    _batched(subject, guard=False)


def batch_guarded(subject: Subject) -> None:
    """So it does with a guard."""
    _batched(subject, guard=True)


def stacked(subject: Subject) -> str:
    """One pass over the rows of both memories gives what two passes give: a padded prompt, then token by token."""
    model, ids = subject.moved(), subject.tokens(2, 8)
    mask = torch.ones_like(ids)
    found, forms, name = {}, {}, "cache_params" if takes(model, "cache_params") else "past_key_values"
    for plan in ("two_pass", "stacked"):
        model.plan = plan
        parts, cache = [], None
        with torch.no_grad():
            for start, end in ((0, 6), (6, 7), (7, 8)):
                given = {"attention_mask": mask[:, :end], "use_cache": True}
                if cache is not None:
                    given[name] = cache
                try:
                    out = model(input_ids=ids[:, start:end], **given)
                except Exception as error:
                    raise _no_cache(subject, ids, error) from error
                cache = getattr(out, name, None)
                parts.append(out.logits)
                if cache is None:
                    break
        found[plan], forms[plan] = torch.cat(parts, 1), type(cache).__name__
    close(found["stacked"], found["two_pass"], "stacked and two-pass logits")
    return "one pass" if forms["stacked"].startswith("Stacked") else "two passes always"


def _no_cache(subject: Subject, ids: Tensor, error: Exception) -> Exception:
    """NotApplicable where the base cannot go on from its cache by plain calls either, else `error`."""
    try:
        base = subject.base()
        with torch.no_grad():
            cache = base(input_ids=ids[:, :6], use_cache=True).past_key_values
            base(input_ids=ids[:, 6:7], attention_mask=torch.ones_like(ids[:, :7]), past_key_values=cache)
    except Exception as cause:
        return NotApplicable(f"upstream: the base alone: {said(cause)}")
    return error


# --- learning -------------------------------------------------------------------------------------------------------


def gradient(subject: Subject) -> None:
    """The gradient reaches the gate, all of the adapter that plain PEFT's gradient reaches, and nothing else."""
    model, ids = subject.moved(), subject.tokens(2, 9)
    inputs = {"input_ids": ids, "labels": labels_behind(ids, 4)}
    _, expected = gradients(subject.plain(model), **inputs)
    _, found = gradients(model, **inputs)
    gates = {name for name in found if name.startswith("gate.")}
    assert gates == {f"gate.{n}" for n, _ in model.gate.named_parameters()}, f"the gate's gradient: {sorted(gates)}"
    missing = sorted(set(expected) - set(found))
    assert not missing, f"no gradient at {missing[:3]}"
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) <= trainable, f"a gradient at {sorted(set(found) - trainable)[:3]}"
    assert trainable == {n for n, p in subject.plain(model).named_parameters() if p.requires_grad} | gates


def at_labels(subject: Subject) -> None:
    """Loss and gradients are the same where only the label positions are woven, with frozen states given or not."""
    model, ids = subject.moved(), subject.tokens(2, 9)
    inputs = {"input_ids": ids, "labels": labels_behind(ids, 4), "attention_mask": torch.ones_like(ids)}
    loss, expected = gradients(model, **inputs)
    for frozen in (None, model.frozen_states(**inputs)):
        found, grads = gradients(model, **inputs, logits_at_labels=True, frozen=frozen)
        close(found, loss, "losses")
        for name, value in expected.items():
            close(grads[name], value, f"gradients of {name}", share=1e-3)
    with torch.no_grad():
        out = model(**inputs)
        few = model(**inputs, logits_at_labels=True).logits
    columns = columns_before(subject, ids, 4)
    close(few.flatten(0, 1), out.logits[:, columns].flatten(0, 1), "logits at labels")


def rehearsal(subject: Subject) -> None:
    """Rehearsal's divergences are those between the memories; each part teaches the gate, or the adapter, alone."""
    model, ids = subject.moved(), subject.tokens(2, 9)
    inputs = {"input_ids": ids, "labels": labels_behind(ids, 4), "attention_mask": torch.ones_like(ids)}
    log_probs, columns = {}, columns_before(subject, ids, 4)
    with torch.no_grad():
        for memory in ("original", "enhanced", "interwoven"):
            with model.use_memory(memory):
                out = model(**inputs)
            log_probs[memory] = out.logits[:, columns].float().log_softmax(-1)
        out = model(**inputs, rehearse="both")
    for found, memory in zip(out.divergences, ("interwoven", "enhanced"), strict=True):
        expected = kl_div(log_probs[memory], log_probs["original"], log_target=True, reduction="none").sum(-1).mean()
        # of a tiny model that is sure of every token the divergence itself is lost in rounding
        assert not torch.equal(log_probs[memory], log_probs["original"]), "the memories say the same"
        close(found, expected, f"the divergence of the {memory} memory", share=1e-3)
    for what, kind in (("gate", {"gate"}), ("both", {"gate", "adapter"})):
        learning = gradients(model, **inputs, rehearse=what)[1]
        names = {"gate" if name.startswith("gate.") else "adapter" for name in learning}
        assert names == kind, f"rehearse={what!r} teaches {sorted(names)}"


def loss_is_cross_entropy(subject: Subject) -> str | None:
    """The loss is the mean cross-entropy of the logits at the labels."""
    ids = subject.tokens(2, 9)
    labels = labels_behind(ids, 4)

    def measure(model: Any) -> str | None:
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels)
        columns, apart = predicting(out.loss, out.logits, ids, 4)
        assert apart < 1e-4 * float(out.loss), f"the loss is {apart:.2g} away from the labels' cross-entropy"
        return "the base does not shift labels: give them shifted" if columns.start == 4 else None

    return held_by(subject, measure, subject.moved())


def _checkpointed(subject: Subject, reentrant: bool) -> None:
    if not subject.base().supports_gradient_checkpointing:
        raise NotApplicable("upstream: the base alone: no gradient checkpointing")
    ids = subject.tokens(2, 9)
    inputs = {"input_ids": ids, "labels": labels_behind(ids, 4), "use_cache": False}

    def measure(model: Any) -> None:
        if not isinstance(model, PeftModel):
            model.get_input_embeddings().requires_grad_(True)  # a frozen base has no gradient to compare
        loss, expected = gradients(model, **inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found, grads = gradients(model, **inputs)
        model.gradient_checkpointing_disable()
        close(found, loss, "losses with and without checkpointing")
        for name, value in expected.items():
            assert name in grads, f"no gradient of {name} with checkpointing"
            close(grads[name], value, f"gradients of {name}", share=1e-3)

    held_by(subject, measure, subject.twin())


def checkpointing(subject: Subject) -> None:
    """Gradient checkpointing (the non-reentrant kind) changes neither loss nor gradients."""
    _checkpointed(subject, reentrant=False)


def checkpointing_reentrant(subject: Subject) -> None:
    """Nor does the reentrant kind."""
    _checkpointed(subject, reentrant=True)


# --- files and forms of the base ------------------------------------------------------------------------------------


def saved(subject: Subject) -> None:
    """A saved model, with a guard, loads onto a fresh base as the same model, bit for bit."""
    model, ids = guarded(subject, subject.moved()), subject.tokens(2, 9)
    model.retention = 0.5
    expected = logits_of(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            # trainable like the one saved: matmul may take another kernel for weights that require a gradient
            again = IMSMModel.from_pretrained(folder, subject.base(), is_trainable=subject.trainable_again).eval()
            again = subject.dressed(again)
            equal(logits_of(again, ids), expected, "logits before saving and after loading")
        except Exception as error:
            raise _lost_by_peft(subject, model, ids) or error from error


def saved_for_peft(subject: Subject) -> None:
    """Plain PEFT loads the saved folder as the enhanced memory, bit for bit."""
    model, ids = subject.moved(), subject.tokens(2, 9)
    with model.use_memory("enhanced"):
        expected = logits_of(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            plain = subject.plain_from(folder)
            equal(logits_of(plain, ids), expected, "plain PEFT's logits and the enhanced memory's")
        except Exception as error:
            raise _lost_by_peft(subject, model, ids) or error from error


def _lost_by_peft(subject: Subject, model: IMSMModel, ids: Tensor) -> NotApplicable | None:
    """The reason if plain PEFT does not load what it has itself saved."""
    plain = subject.plain(model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain.save_pretrained(folder, save_embedding_layers=False)
            again = subject.plain_from(folder)
            equal(logits_of(again, ids), logits_of(plain, ids), "logits before saving and after loading")
    except Exception as error:
        return NotApplicable(f"upstream: plain PEFT: {said(error)}")
    return None


def resized(subject: Subject) -> None:
    """A base with resized embeddings is woven like any other."""
    more = subject.vocab + 8

    def base() -> Any:
        made = subject.base()
        made.resize_token_embeddings(more)
        return made.eval().requires_grad_(False)

    ids = torch.randint(subject.first, more, (2, 9), generator=torch.Generator().manual_seed(4))
    try:
        torch.manual_seed(0)
        expected = logits_of(base(), ids)
        assert expected.shape[-1] >= more, f"logits for {expected.shape[-1]} tokens"
        assert torch.isfinite(expected).all(), "logits are not finite"
        generated(base(), ids, GREEDY)
    except Exception as error:
        raise NotApplicable(f"upstream: the base alone: {said(error)}") from error
    torch.manual_seed(0)
    _woven_like(subject, base, ids, expected)


def _woven_like(subject: Subject, make: Callable[[], Any], ids: Tensor, expected: Tensor) -> None:
    """The ends are exact and generation runs on another form of the base."""
    model = subject.twin(base=make())
    with model.use_memory("original"):
        equal(logits_of(model, ids), expected, "original and base logits")
    model.retention = float("inf")
    close(logits_of(model, ids), expected, "logits at infinite retention and the base's")
    model.retention = 0.0
    assert generated(model, ids, GREEDY).shape[0] == len(ids)


def _tied(subject: Subject, tie: bool) -> None:
    def base() -> Any:
        return subject.base(tie_word_embeddings=tie)

    ids, word = subject.tokens(2, 9), "tied" if tie else "untied"
    try:
        made = base()
        head, embedding = made.get_output_embeddings().weight, made.get_input_embeddings().weight
        assert (head is embedding) == tie, f"the config asks for a head that is {word}, and the model has another"
        expected = logits_of(made, ids)
    except Exception as error:
        raise NotApplicable(f"upstream: the base alone: {said(error)}") from error
    _woven_like(subject, base, ids, expected)


def tied(subject: Subject) -> None:
    """A head that shares its weights with the input embeddings."""
    _tied(subject, tie=True)


def untied(subject: Subject) -> None:
    """A head with weights of its own."""
    _tied(subject, tie=False)


def bfloat16(subject: Subject) -> None:
    """In bf16 the ends are the base and plain PEFT, bit for bit, the gate stays in fp32, and generation runs."""
    ids = subject.tokens(2, 9)

    def base() -> Any:
        return subject.base().to(torch.bfloat16)

    try:
        expected = logits_of(base(), ids)
        assert torch.isfinite(expected).all(), "logits are not finite"
        generated(base(), ids, GREEDY)
        plain = subject.plain(base=base())
        logits_of(plain, ids)
    except Exception as error:
        raise NotApplicable(f"upstream: in bf16: {said(error)}") from error
    model = subject.twin(base=base())
    assert all(p.dtype == torch.float32 for p in model.gate.parameters())
    assert torch.isfinite(logits_of(model, ids)).all(), "logits are not finite"
    with model.use_memory("enhanced"):
        enhanced = logits_of(model, ids)
    equal(logits_of(subject.plain(model, base()), ids), enhanced, "plain PEFT's logits and the enhanced memory's")
    _woven_like(subject, base, ids, expected)


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "base runs": base_runs,
    "memories differ": memories_differ,
    "step 0 is the base": step_zero,
    "original after training": original_after_training,
    "original after rehearsal": original_after_rehearsal,
    "enhanced is plain PEFT": enhanced_is_plain,
    "causal": causal,
    "padding right": padding_right,
    "padding left": padding_left,
    "cached greedy": cached_greedy,
    "cached beams": cached_beams,
    "cached, guarded": cached_guarded,
    "left-padded batch": batch_left_padded,
    "left-padded, guarded": batch_guarded,
    "stacked": stacked,
    "loss": loss_is_cross_entropy,
    "gradient": gradient,
    "at labels": at_labels,
    "rehearsal": rehearsal,
    "checkpointing": checkpointing,
    "checkpointing, reentrant": checkpointing_reentrant,
    "saved": saved,
    "saved for PEFT": saved_for_peft,
    "resized": resized,
    "tied": tied,
    "untied": untied,
    "bf16": bfloat16,
}
