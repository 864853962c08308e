"""Reading and answering: what a state does to the base, in every way it can be asked, and that nothing stays behind."""

import copy

import pytest
import torch
from torch.nn.functional import pad

from twinweave.errors import UnsupportedModelError, UsageError
from twinweave.genadapter import GenerativeAdapter, GenerativeAdapterConfig
from twinweave.genadapter.config import chunk_size_of

STATES = 10
EXACT = {"normalization": "frobenius", "rank": 12}  # a loss and a reading are the same to rounding


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.fixture
def states(reader):
    return [reader.read(f"document {i} says {chr(97 + i) * (i + 1)}.") for i in range(STATES)]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize("training", [True, False])
def test_a_generator_at_its_start_is_the_base(make_reader, make_base, tokens, arch, training):
    reader, ids = make_reader(moved=False, arch=arch).train(training), tokens(4, 9)
    expected = logits(make_base(arch).requires_grad_(False), ids)
    assert torch.equal(logits(reader, ids, context_ids=tokens(2, 7, 3)), expected)
    with reader.adapted(reader.read("some text")):
        assert torch.equal(logits(reader, ids), expected)


def test_the_adapted_base_is_the_base_with_the_change_added_to_its_weights(reader, make_base, tokens):
    ids, changed = tokens(2, 7), make_base()
    state = reader.read("a text to read. it has some chunks")
    for target, generator in zip(reader.targets, reader._generators, strict=True):
        a, b = generator.lora(state.values()[target.name])
        changed.get_submodule(target.name).weight.data += b @ a
    with reader.adapted(state):
        torch.testing.assert_close(logits(reader, ids), logits(changed, ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prefixes_in_one_pass_are_separate_reads(make_reader, tokens):
    reader, context, ids = make_reader(**EXACT), tokens(3, 8, 4), tokens(6, 7)
    together = logits(reader, ids, context_ids=context, reads=torch.tril(torch.ones(3, 3)))
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        alone = logits(reader, ids[rows], context_ids=context[: i + 1], reads=torch.ones(1, i + 1))
        torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-4)
        with reader.adapted(reader.read_ids(context[: i + 1].tolist())):
            torch.testing.assert_close(together[rows], logits(reader, ids[rows]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_chunks_do_not_see_each_other(reader, tokens):
    context = tokens(3, 8, 4)
    together = reader._chunk_sums(context, torch.ones_like(context))
    for i in range(3):
        for all_of, one in zip(together, reader._chunk_sums(context[i : i + 1], torch.ones(1, 8)), strict=True):
            torch.testing.assert_close(all_of[i], one[0])


@torch.no_grad()
def test_sequential_is_chunk_by_chunk(make_reader, tokens):
    reader, context, ids = make_reader(mode="sequential", **EXACT), tokens(3, 8, 4), tokens(6, 7)
    together = logits(reader, ids, context_ids=context, reads=torch.tril(torch.ones(3, 3)))
    state = reader.empty_state()
    for i, chunk in enumerate(context):
        state = reader.read_ids([chunk.tolist()], state=state)
        with reader.adapted(state):
            expected = logits(reader, ids[2 * i : 2 * i + 2])
        torch.testing.assert_close(together[2 * i : 2 * i + 2], expected, rtol=1e-3, atol=1e-3)
    parallel = make_reader(**EXACT).read_ids(context.tolist())
    assert any(not torch.equal(state.sums[name], parallel.sums[name]) for name in state.sums)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_ten_questions_over_ten_states_in_one_batch(reader, states, tokens, options):
    prompts = [tokens(1, 3 + i % 4, i) for i in range(STATES)]
    ids = torch.cat([pad(p, (6 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([pad(torch.ones_like(p), (6 - p.shape[1], 0)) for p in prompts])
    with reader.adapted(states):
        together = generate(reader, ids, mask, **options)
    plain = generate(reader, ids, mask, **options)
    found = []
    for prompt, state in zip(prompts, states, strict=True):
        with reader.adapted(state):
            found.append(generate(reader, prompt, **options))
    assert torch.equal(together, torch.cat(found))
    assert not torch.equal(together, plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_cached_is_uncached(reader, states, tokens, options):
    with reader.adapted(states[:2]):
        uncached = {k: v for k, v in options.items() if k != "cache_implementation"}
        expected = generate(reader, tokens(2, 6), use_cache=False, **uncached)
        assert torch.equal(generate(reader, tokens(2, 6), **options), expected)


def test_samples_of_a_prompt_belong_to_its_state(reader, states, tokens):
    ids = tokens(2, 5)
    with reader.adapted(states[:2]):
        torch.manual_seed(0)
        found = generate(reader, ids, do_sample=True, top_k=1, num_return_sequences=3)
        expected = generate(reader, ids)
    assert torch.equal(found, expected.repeat_interleave(3, 0))


@pytest.mark.parametrize("amount", [(0, 3), (3, 0)], ids=["right", "left"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_padding_changes_nothing(make_reader, tokens, amount, arch):
    reader, ids, context = make_reader(arch=arch), tokens(1, 5), tokens(1, 6, 3)
    expected = logits(reader, ids, context_ids=context)
    mask = pad(torch.ones_like(context), amount)
    found = logits(reader, ids, context_ids=pad(context, amount), context_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mask = pad(torch.ones_like(ids), amount)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found = logits(reader, pad(ids, amount), context_ids=context, **given)[mask == 1]
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)


def test_a_row_that_has_read_nothing_is_the_base(reader, tokens):
    ids, context = tokens(2, 5), tokens(2, 6, 3)
    mask = torch.ones_like(context)
    mask[1] = 0
    for given in ({"context_mask": mask}, {"reads": torch.tensor([[1, 0], [0, 0]])}):
        found = logits(reader, ids, context_ids=context, **given)
        torch.testing.assert_close(found[1], logits(reader, ids)[1])
        assert (found[0] - logits(reader, ids)[0]).abs().max() > 1e-3


def test_no_logit_depends_on_a_later_token(reader, states, tokens):
    ids, other = tokens(1, 8), tokens(1, 8)
    other[:, 5:] = tokens(1, 3, 9)
    with reader.adapted(states[0]):
        torch.testing.assert_close(logits(reader, ids)[:, :5], logits(reader, other)[:, :5])


def test_rows_that_cannot_be_shared_out_are_refused(reader, states, tokens):
    with reader.adapted(states[:2]), pytest.raises(UsageError, match="3 rows cannot be shared out among 2"):
        reader(input_ids=tokens(3, 4))
    with pytest.raises(UsageError, match="got no state"), reader.adapted([]):
        pass


def test_flattened_rows_are_shared_out_right_or_refused(make_base, make_reader, tokens):
    base = make_base()
    for layer in base.model.layers:
        inner = layer.self_attn.o_proj
        inner.register_forward_pre_hook(lambda m, args: (args[0].flatten(0, 1),))
        layer.self_attn.register_forward_hook(
            lambda m, args, kw, out: (out[0].view(kw["hidden_states"].shape), out[1]), with_kwargs=True
        )
    flat, plain = make_reader(base=base), make_reader()
    states = [[r.read(text) for text in ("one", "two")] for r in (flat, plain)]
    for r, own in zip((flat, plain), states, strict=True):
        with r.adapted(own):
            ids = tokens(4, 6)
            found = logits(r, ids)
        if r is flat:
            first = found
    torch.testing.assert_close(first, found)
    with flat.adapted(states[0]), pytest.raises(UsageError, match="3 rows"):
        flat(input_ids=tokens(3, 4))  # 12 flattened tokens would divide


def test_layers_that_mix_rows_answer_from_one_state_only(make_base, make_reader, tokens):
    base = make_base()
    for layer in base.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0].transpose(0, 1),))
        layer.mlp.down_proj.register_forward_hook(lambda m, args, out: out.transpose(0, 1))
    reader = make_reader(base=base, target_modules=["down_proj"])
    states = [reader.read(text) for text in ("one", "two")]
    with reader.adapted(states[0]):
        assert torch.isfinite(logits(reader, tokens(2, 2))).all()
    with reader.adapted(states), pytest.raises(UnsupportedModelError, match="one at a time"):
        reader(input_ids=tokens(2, 2))


def test_exceptions_leave_the_base_clean(reader, states, tokens, monkeypatch):
    before = hooks(reader)
    expected = logits(reader, tokens(2, 5))
    with pytest.raises(ZeroDivisionError), reader.adapted(states[:2]):
        1 / 0  # noqa: B018
    assert hooks(reader) == before == []

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle")

    for module in (reader.base.model.layers[1].mlp, reader.base.lm_head):
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                reader(input_ids=tokens(2, 5), context_ids=tokens(2, 5, 3))
        assert hooks(reader) == []
    assert torch.equal(logits(reader, tokens(2, 5)), expected)


def test_a_copy_stands_alone(reader, states, tokens):
    again = copy.deepcopy(reader)
    with again.adapted(states[0]):
        found = logits(again, tokens(1, 5))
        assert not hooks(reader)
    with reader.adapted(states[0]):
        assert torch.equal(logits(reader, tokens(1, 5)), found)


def test_a_base_in_bfloat16(make_base, make_reader, tokens):
    reader = make_reader(base=make_base().bfloat16())
    with reader.adapted([reader.read("one"), reader.read("two")]):
        found = logits(reader, tokens(2, 5))
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
    assert all(p.dtype == torch.float32 for p in reader.generators.parameters())


def test_autocast_reads_in_float32(reader, tokens):
    ids, context = tokens(2, 7), tokens(2, 7, 3)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        sums = reader._sums_of(context, torch.ones_like(context), torch.eye(2))
        for generator, s in zip(reader._generators, sums, strict=True):
            assert s.dtype == generator.normalized(s).dtype == torch.float32
        with reader.adapted(reader.read("one")):
            assert torch.isfinite(reader(input_ids=ids).logits).all()


def attention_calls(reader):
    """A list that grows with each call of an attention. Counted before the call, which may be stopped early."""
    calls = []
    for module in reader.base.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(lambda m, args: calls.append(m))
    return calls


def grads(reader, tokens, rehearsed=None, backward=lambda loss: loss.backward()):
    """Of a loss, and where `rehearsed` states are given, of a second one for as many, before the backward pass."""
    reader.train()
    ids, context = tokens(4, 8), tokens(2, 7, 3)
    reader.zero_grad()
    loss = reader(input_ids=ids, labels=ids, context_ids=context).loss
    if rehearsed:
        with torch.no_grad():
            base = reader(input_ids=ids).logits
        answers = reader(input_ids=ids, context_ids=tokens(rehearsed, 7, 5)).logits
        loss = loss + (answers - base).pow(2).mean()
    backward(loss)
    return {name: p.grad.clone() for name, p in reader.generators.named_parameters()}


@pytest.mark.parametrize("rehearsed", [None, 2, 1])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(make_reader, tokens, arch, reentrant, rehearsed):
    reader = make_reader(arch=arch)  # GPT-2's config has dropout, which must stay off
    expected = grads(reader, tokens, rehearsed)
    reader.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        reader.base.enable_input_require_grads()
    before, calls, again = hooks(reader), attention_calls(reader), []

    def backward(loss):
        calls.clear()
        loss.backward()
        again.extend(calls)

    found = grads(reader, tokens, rehearsed, backward)
    assert len(again) == reader.config.num_hidden_layers * (2 if rehearsed else 1)
    assert all(expected[name].any() for name in expected)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    assert all(m in before or type(m).__name__.endswith("Attention") for m in hooks(reader))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_nothing_of_a_checkpointed_pass_stays(make_reader, tokens, arch):
    reader, plain, ids = make_reader(arch=arch), make_reader(arch=arch), tokens(2, 5)
    reader.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reader.train()
    attributes, before = [dict(vars(module)) for module in reader.base.modules()], hooks(reader)
    loss = reader(input_ids=ids, labels=ids, context_ids=tokens(2, 6, 3)).loss
    for _ in range(2):
        assert hooks(reader) == before
        assert [dict(vars(module)) for module in reader.base.modules()] == attributes
        assert not any(module.training for module in reader.base.modules())
        assert torch.equal(logits(reader.base, ids), logits(plain.base, ids))
        assert torch.equal(generate(reader, ids), generate(plain, ids))
        if loss.requires_grad:
            loss.backward()
            loss = loss.detach()


def test_a_backward_pass_is_that_of_its_own_forward_wherever_it_is_run(make_reader, tokens):
    reader = make_reader()
    state, expected = reader.read("something else"), grads(reader, tokens)
    reader.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def within(loss):
        with reader.adapted(state):
            before = logits(reader, tokens(1, 5))
            loss.backward()
            assert torch.equal(logits(reader, tokens(1, 5)), before)

    for name, grad in grads(reader, tokens, backward=within).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_checkpointed_pass_that_fails_leaves_the_base_clean(make_reader, tokens, monkeypatch):
    reader = make_reader()
    reader.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reader.train()

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle")

    attributes, before = [dict(vars(module)) for module in reader.base.model.layers], hooks(reader)
    with monkeypatch.context() as patch:
        patch.setattr(reader.base.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            reader(input_ids=tokens(2, 5), context_ids=tokens(2, 5, 3))
    assert hooks(reader) == before
    assert [dict(vars(module)) for module in reader.base.model.layers] == attributes


@pytest.mark.parametrize("pattern", ["aaaa", "aabb", "aaab", "abab", "aabbbb"])
def test_neighbours_of_one_state_share_its_factors(reader, states, tokens, pattern, monkeypatch):
    of, ids = dict(zip("ab", states, strict=False)), tokens(2 * len(pattern), 5)
    alone = []
    for i, letter in enumerate(pattern):
        with reader.adapted(of[letter]):
            alone.append(logits(reader, ids[2 * i : 2 * i + 2]))
    stacked, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors, *a: stacked.append(len(tensors)) or stack(tensors, *a))
    with reader.adapted([of[letter] for letter in pattern]):
        assert max(stacked) == {"aaaa": 1, "aabb": 2, "aabbbb": 3}.get(pattern, 4)
        torch.testing.assert_close(logits(reader, ids), torch.cat(alone))
        if len(pattern) == 4:
            with pytest.raises(UsageError, match="6 rows cannot be shared out among 4"):
                reader(input_ids=tokens(6, 4))


def test_training_lowers_the_loss_and_leaves_the_base(make_reader, make_base, tokens):
    reader = make_reader(moved=False, scale=1.0).train()
    optimizer = torch.optim.Adam([p for p in reader.parameters() if p.requires_grad], lr=1e-2)
    context = tokens(4, 8)
    losses = []
    for _ in range(15):
        loss = reader(input_ids=context, labels=context, context_ids=context).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    base = make_base().state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in reader.base.state_dict().items())


@pytest.mark.parametrize("extra", ["token_gate", "topic_key"])
def test_beyond_the_paper(make_reader, tokens, extra):
    reader = make_reader(**{extra: True}, **EXACT)
    live = logits(reader, tokens(1, 5), context_ids=tokens(1, 8, 3))
    with reader.adapted(reader.read_ids(tokens(1, 8, 3).tolist())):
        torch.testing.assert_close(logits(reader, tokens(1, 5)), live, rtol=1e-4, atol=1e-4)


def test_nothing_is_read_and_no_other_state_answers_within_adapted(make_reader, tokens):
    reader = make_reader()
    a, b = (reader.read_ids(tokens(1, 8, seed).tolist()) for seed in (1, 2))
    with reader.adapted(a):
        for forbidden in (
            lambda: reader.read_ids(tokens(1, 4).tolist()),
            lambda: reader(input_ids=tokens(1, 4), context_ids=tokens(1, 4)),
            lambda: reader.adapted(b).__enter__(),
        ):
            with pytest.raises(UsageError, match="within adapted"):
                forbidden()
    with reader.adapted(b):  # and all is as before
        pass


def test_a_state_is_decomposed_once(make_reader, tokens, monkeypatch):
    reader, made = make_reader(), []
    fresh = reader.read_ids(tokens(1, 8, 3).tolist())
    own = reader._factors_of
    monkeypatch.setattr(reader, "_factors_of", lambda sums: made.append(1) or own(sums))
    for _ in range(3):
        with reader.adapted([fresh, fresh]):
            pass
    assert made == [1]


def test_layers_by_name_and_bases_that_are_refused(make_reader, make_base):
    reader = make_reader(target_modules=["down_proj", "q_proj"])
    assert {t.name.rsplit(".", 1)[-1] for t in reader.targets} == {"down_proj", "q_proj"}
    with pytest.raises(UnsupportedModelError, match=r"called are .*o_proj"):
        make_reader(target_modules=["none"])
    with pytest.raises(UnsupportedModelError, match="language-model head"):
        GenerativeAdapter(make_base().model, GenerativeAdapterConfig(state_size=4, rank=2))
    base = make_base()
    base.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(UnsupportedModelError, match=r"cannot be run on a few tokens .*ZeroDivision"):
        make_reader(base=base)


@torch.no_grad()
def test_the_loss_is_that_of_what_reading_gives_and_of_training(reader, tokens):
    ids, context = tokens(2, 7), tokens(1, 4, 3)
    live = logits(reader, ids, context_ids=context)
    with reader.adapted(reader.read_ids(context.tolist())):
        read = logits(reader, ids)
    assert (live - read).norm() < 0.05 * (read - logits(reader, ids)).norm()
    assert torch.equal(logits(reader.train(), ids, context_ids=context), live)


def test_a_base_that_computes_no_numbers_is_not_read(make_base, make_reader):
    reader = make_reader(base=make_base())
    with torch.no_grad():
        reader.base.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"What model\.layers.* is not a number.*bfloat16"):
        reader.read_ids([[3, 4, 5]])


def test_the_fingerprint_follows_settings_and_weights(make_reader):
    reader = make_reader()
    first = reader.fingerprint()
    reader.settings.scale = 0.25
    assert reader.fingerprint() != first
    reader.settings.scale = 0.5
    assert reader.fingerprint() == first
    reader._generators[0].output.data.mul_(2)  # leaves no trace in the tensor's version
    reader.train()
    assert reader.fingerprint() != first


def test_the_generator_stays_in_float32(make_reader):
    reader, text = make_reader(), "a text"
    before, state = reader.fingerprint(), reader.read(text)
    assert reader.to(torch.bfloat16).fingerprint() == before
    assert reader.base.dtype == torch.bfloat16
    assert reader.read(text).tokens == state.tokens
    for weight in reader.generators.parameters():  # by force
        weight.data = weight.data.bfloat16()
    assert reader.train().fingerprint() != before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": "1/16"}, r"scale is '1/16'.*0\.0625"),
        ({"tolerance": "1e-5"}, r"tolerance is '1e-5'.*1\.0e-5"),
        ({"scale": True}, "must be a number"),
        ({"scale": float("nan")}, "positive"),
        ({"rank": 2.0}, "rank is 2.0; it must be a whole number of at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"token_gate": "false"}, "token_gate is 'false'.*without quotes"),
        ({"topic_key": 1}, "topic_key is 1"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": ["q_proj", 3]}, "list of names"),
        ({"normalization": ["svd"]}, "normalization"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(UsageError, match=message):
        GenerativeAdapterConfig(**wrong)


def test_a_chunk_fits_into_the_window():
    settings = GenerativeAdapterConfig(chunk_size=8)
    assert [chunk_size_of(settings, window) for window in (None, 1, 5, 9, 2**30)] == [8, 8, 4, 8, 8]
