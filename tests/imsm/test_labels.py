"""Gate, head and loss at label positions only give what they give everywhere, and the frozen pass can be left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from twinweave.errors import UsageError
from twinweave.imsm.labels import FrozenStates, find_places, read_frozen
from twinweave.imsm.memory import ends_of_labels, extend, query_mean

LENGTH = 12
# row -> its tokens: p prompt, a answer, . padding
SHAPES = {
    "one answer each": ["ppppaaaaaaaa", "ppppppaaaa..", "pppaaap....."],
    "left padding": ["ppppaaaaaaaa", "..ppppppaaaa", "......ppaaaa"],
    "several turns": ["ppaappaaappa", "paapapapa...", "pppppppppppp"],
    "nothing before": ["aaaaaaaaaaaa", "aaappaaa....", "..aaaapaaap."],
    "no label": ["pppppppppppp", "pppppp......", "............"],
    "one label": ["apppppppppp.", "pppppppppppa", "pppppppppppp"],
}


def batch_of(shape, tokens, query=False):
    ids = tokens(len(shape), LENGTH)
    kinds = [list(row) for row in shape]
    mask = torch.tensor([[int(c != ".") for c in row] for row in kinds])
    labels = torch.where(torch.tensor([[c == "a" for c in row] for row in kinds]), ids, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if query:
        batch["query_mask"] = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(3))
    return batch


def run(model, batch, **options):
    model.zero_grad()
    torch.manual_seed(5)  # dropout must fall alike
    out = model(**batch, **options)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def predicting(batch):
    return (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)


def assert_same(found, expected, batch, tolerance=1e-5):
    (out, grads), (full, full_grads) = found, expected
    torch.testing.assert_close(out.loss, full.loss, rtol=tolerance, atol=tolerance, equal_nan=True)
    places = predicting(batch)
    assert out.logits.shape == (1, len(places[0]), full.logits.shape[-1])
    torch.testing.assert_close(out.logits[0], full.logits[places], rtol=1e-4, atol=1e-4)
    assert set(grads) == set(full_grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, full_grads[name], rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "no label"])
@pytest.mark.parametrize("query", [False, True])
def test_loss_logits_gate_and_gradients_are_those_of_the_full_path(arch, shape, query, make_imsm, tokens):
    model, batch = make_imsm(arch), batch_of(SHAPES[shape], tokens, query)
    options = {"output_gate": True, "num_items_in_batch": torch.tensor(9)}
    expected = run(model, batch, **options)
    found = run(model, batch, logits_at_labels=True, **options)
    assert_same(found, expected, batch)
    torch.testing.assert_close(found[0].gate[0], expected[0].gate[predicting(batch)], rtol=1e-5, atol=1e-5)
    frozen = model.frozen_states(**batch)
    assert_same(run(model, batch, logits_at_labels=True, frozen=frozen, **options), expected, batch)


def test_every_adapter(peft_kind, make_imsm, tokens):
    model, batch = make_imsm("llama", peft_kind).train(), batch_of(SHAPES["several turns"], tokens)
    assert_same(run(model, batch, logits_at_labels=True), run(model, batch), batch)


@pytest.mark.parametrize("fusion", ["query_gate", "gate", "average", "enhanced"])
def test_every_fusion(fusion, make_imsm, tokens):
    model, batch = make_imsm(fusion=fusion, retention=0.5), batch_of(SHAPES["one answer each"], tokens)
    expected = run(model, batch)
    assert_same(run(model, batch, logits_at_labels=True), expected, batch)
    frozen = model.frozen_states(**batch)
    assert_same(run(model, batch, logits_at_labels=True, frozen=frozen), expected, batch)


def test_dropout_of_the_tuned_pass_falls_as_before_and_the_frozen_one_has_none(make_imsm, tokens):
    model, batch = make_imsm("gpt2").train(), batch_of(SHAPES["one answer each"], tokens)
    expected = run(model, batch)
    frozen = model.frozen_states(**batch)
    assert all(m.training for m in model.modules())
    assert_same(run(model, batch, logits_at_labels=True), expected, batch)
    assert_same(run(model, batch, logits_at_labels=True, frozen=frozen), expected, batch)


@pytest.mark.parametrize("memory", ["original", "enhanced"])
def test_one_memory_alone(memory, arch, make_imsm, tokens):
    model, batch = make_imsm(arch), batch_of(SHAPES["several turns"], tokens)
    with model.use_memory(memory), torch.no_grad():
        full, found = model(**batch), model(**batch, logits_at_labels=True, output_gate=True)
    torch.testing.assert_close(found.loss, full.loss)
    torch.testing.assert_close(found.logits[0], full.logits[predicting(batch)])
    assert found.gate.shape[1] == found.logits.shape[1]
    assert (found.gate == (1.0 if memory == "original" else 0.0)).all()


@pytest.mark.parametrize("retention", [float("inf"), float("-inf")])
def test_an_infinite_retention_is_one_memory(retention, make_imsm, tokens):
    model, batch = make_imsm(), batch_of(SHAPES["several turns"], tokens)
    model.retention = retention
    with torch.no_grad():
        found = model(**batch, logits_at_labels=True)
        with model.use_memory("original" if retention > 0 else "enhanced"):
            assert torch.equal(found.logits, model(**batch, logits_at_labels=True).logits)


def test_a_batch_without_labels_has_the_loss_of_transformers(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(SHAPES["no label"], tokens)
    for options in ({}, {"num_items_in_batch": torch.tensor(7)}):
        (out, _), (full, _) = run(model, batch, logits_at_labels=True, **options), run(model, batch, **options)
        torch.testing.assert_close(out.loss, full.loss, equal_nan=True)
        assert out.logits.shape[:2] == (1, 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, make_imsm, tokens):
    batch = batch_of(SHAPES["several turns"], tokens)
    expected = run(make_imsm().train(), batch)
    model = make_imsm().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(run(model, batch, logits_at_labels=True), expected, batch)


def test_outputs_of_other_kinds(make_imsm, tokens):
    """Tuples, hidden states, a cache that was asked for: nothing of it is cut or crashes."""
    model, batch = make_imsm(), batch_of(SHAPES["one answer each"], tokens)
    full = model(**batch, logits_at_labels=True)
    loss, logits, *_, gate = model(**batch, logits_at_labels=True, return_dict=False, output_gate=True)
    assert torch.equal(loss, full.loss)
    assert torch.equal(logits, full.logits)
    assert gate.shape[:2] == logits.shape[:2]
    out = model(**batch, logits_at_labels=True, output_hidden_states=True, use_cache=True)
    assert torch.equal(out.logits, full.logits)
    with model.use_memory("enhanced"):
        enhanced = model(**batch, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, enhanced.hidden_states, strict=True))


def test_the_auxiliary_loss_of_a_mixture_of_experts_still_sees_every_token(make_imsm, tokens):
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5, max_position_embeddings=64, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = make_imsm(base=AutoModelForCausalLM.from_config(config).eval())
    batch = batch_of(SHAPES["several turns"], tokens)
    expected = run(model, batch)
    assert expected[0].aux_loss > 0
    assert_same(run(model, batch, logits_at_labels=True), expected, batch)
    assert_same(run(model, batch, logits_at_labels=True, frozen=model.frozen_states(**batch)), expected, batch)


def test_under_autocast(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(SHAPES["several turns"], tokens)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = run(model, batch), run(model, batch, logits_at_labels=True)
        frozen = model.frozen_states(**batch)
        cached = run(model, batch, logits_at_labels=True, frozen=frozen)
    assert frozen.queries.dtype == torch.float32
    for out, grads in (found, cached):
        torch.testing.assert_close(out.loss, expected[0].loss, rtol=1e-3, atol=1e-3)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[1][name], rtol=0.1, atol=2e-2)


def test_states_come_in_the_dtype_of_the_model(make_base, make_imsm, tokens):
    model = make_imsm(base=make_base().to(torch.bfloat16))
    batch = batch_of(SHAPES["one answer each"], tokens)
    frozen = model.frozen_states(**batch)
    assert (frozen.states.dtype, frozen.queries.dtype) == (torch.bfloat16, torch.float32)
    assert len(frozen.queries) == 3
    full, found = model(**batch), model(**batch, logits_at_labels=True, frozen=frozen)
    torch.testing.assert_close(found.loss, full.loss, rtol=5e-3, atol=5e-3)


def passes(model):
    """Counts forwards of the decoder, with or without its hooks."""
    decoder = model.get_base_model().get_decoder()
    forward, calls = decoder.forward, []
    decoder.forward = lambda *args, **kwargs: calls.append(len(kwargs)) or forward(*args, **kwargs)
    return calls


def test_no_frozen_pass_when_its_states_are_given_or_not_wanted(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(SHAPES["one answer each"], tokens)
    calls = passes(model)
    model(**batch, logits_at_labels=True)
    assert len(calls) == 2
    frozen = model.frozen_states(**batch)
    assert len(calls) == 3
    model(**batch, logits_at_labels=True, frozen=frozen)
    assert len(calls) == 4
    with model.use_memory("enhanced"):
        model(**batch, logits_at_labels=True)
    assert len(calls) == 5


@pytest.mark.parametrize("training", [False, True])
def test_the_frozen_pass_leaves_the_shared_trunk_out(training, make_imsm, tokens):
    model = make_imsm(peft_changes={"layers_to_transform": [1]}).train(training)
    batch = batch_of(SHAPES["one answer each"], tokens)
    expected = run(model, batch)
    run(model, batch, logits_at_labels=True)  # the first call tries it out
    ran = []
    for number, block in enumerate(model.get_base_model().model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    assert_same(run(model, batch, logits_at_labels=True), expected, batch)
    assert ran == [0, 1, 1]


@pytest.mark.parametrize("at_labels", [False, True])
def test_a_loss_that_is_fused_with_the_head_works(at_labels, make_imsm, tokens):
    """As Liger and TRL patch models: the loss is computed in chunks from the last hidden state; there are no logits."""
    model, batch = make_imsm(), batch_of(SHAPES["several turns"], tokens)
    out, expected = run(model, batch)
    base = model.get_base_model()

    def fused(input_ids=None, attention_mask=None, labels=None, **kwargs):
        states = base.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states, targets = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        pieces = zip(states.split(5), targets.split(5), strict=True)
        total = sum(cross_entropy(base.lm_head(s), t, reduction="sum", ignore_index=-100) for s, t in pieces)
        return CausalLMOutputWithPast(loss=total / (targets != -100).sum())

    base.forward = fused
    found, gradients = run(model, batch, logits_at_labels=at_labels)
    assert found.logits is None
    torch.testing.assert_close(found.loss, out.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_default_is_what_it_was(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(SHAPES["one answer each"], tokens)
    assert model(**batch).logits.shape == (3, LENGTH, 61)
    before = model(**batch).logits
    model(**batch, logits_at_labels=True)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": FrozenStates(torch.zeros(4, 32), torch.zeros(3, 32))}, r"\[4, 32\].*\[15, 32\]"),
        ({"frozen": FrozenStates(torch.zeros(15, 32), torch.zeros(1, 32))}, r"\[1, 32\].*\[3, 32\]"),
        ({"frozen": FrozenStates(torch.zeros(15, 8), torch.zeros(3, 8))}, r"\[15, 8\].*\[15, 32\]"),
        ({"labels": None}, "Without labels"),
        ({"labels": torch.zeros(3, 5, dtype=torch.long)}, r"labels are \[3, 5\].*\[3, 12\]"),
        ({"query_mask": torch.ones(3, 5)}, r"query_mask is \[3, 5\].*\[3, 12\]"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, make_imsm, tokens):
    model, batch = make_imsm(), batch_of(SHAPES["one answer each"], tokens)
    with pytest.raises(UsageError, match=message):
        model(**(batch | {"logits_at_labels": True} | options))
    expected = model(**batch).loss
    assert torch.equal(model(**batch).loss, expected)


def test_states_at_labels_without_asking_for_them_are_refused(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(SHAPES["one answer each"], tokens)
    with pytest.raises(UsageError, match="logits_at_labels=True"):
        model(**batch, frozen=model.frozen_states(**batch))


ROWS = st.lists(st.lists(st.sampled_from("ap.q"), min_size=7, max_size=7), min_size=1, max_size=4)


@given(ROWS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_means_are_those_of_the_running_sums(rows, explicit):
    """Any mixture of prompt, answer and padding, with NaN where nobody attends."""
    kinds = [list(row) for row in rows]

    def where(letters):
        return torch.tensor([[c in letters for c in row] for row in kinds])

    attended, asked = where("apq"), where("q") if explicit else None
    labels = torch.where(where("a"), 1, -100)
    states = torch.randn(len(rows), 7, 5, generator=torch.Generator().manual_seed(len(rows)))
    states = torch.where(attended.unsqueeze(-1), states, torch.nan)
    ends = torch.arange(1, 8).expand(len(rows), -1) if explicit else ends_of_labels(labels, attended)
    expected = query_mean(extend(states, attended, asked), ends)[(labels[:, 1:] != -100).nonzero(as_tuple=True)]
    places = find_places(labels, attended.long(), asked)
    found = places.query_means(states)
    assert len(found) == places.queries <= places.count
    torch.testing.assert_close(found[places.query_of], expected, rtol=1e-5, atol=1e-5)


def test_the_mean_has_the_gradient_of_a_mean():
    labels = torch.tensor([[-100, -100, 5, 6]])
    states = torch.randn(1, 4, 3, requires_grad=True)
    read_frozen(states, find_places(labels)).queries.sum().backward()
    assert torch.equal(states.grad[0, :, 0], torch.tensor([0.5, 0.5, 0.0, 0.0]))
