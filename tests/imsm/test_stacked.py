"""The stacked pass against two plain passes: the same numbers and tokens; what both memories share is computed once."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DynamicCache,
    Mamba2Config,
    MixtralConfig,
    RwkvConfig,
    StaticCache,
)

from twinweave.errors import UsageError
from twinweave.imsm.cache import PairedCache, StackedCache, stack
from twinweave.imsm.memory import extend
from twinweave.imsm.stacked import StackedPass

CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # fp32: the same products, summed over another number of rows at once
TRUNK = {"layers_to_transform": [1]}


def padded(tokens):
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids.where(mask.bool(), 0), mask


@torch.no_grad()
def run(model, plan, ids, mask, cache=None):
    """Logits and gates of a prompt, of one more token and of two more; and the cache."""
    model.plan = plan
    chunks = []
    for start, end in ((0, 4), (4, 5), (5, 7)):
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:end],
            past_key_values=cache,
            use_cache=True,
            output_gate=True,
        )
        cache = out.past_key_values
        chunks.append((out.logits, out.gate))
    return [torch.cat(parts, dim=1)[mask.bool()] for parts in zip(*chunks, strict=True)], cache


def test_stacked_equals_two_passes(arch, peft_kind, make_imsm, tokens):
    try:
        model = make_imsm(arch, peft_kind)
    except Exception as error:  # PEFT has no OFT and LoHa for GPT-2's Conv1D
        pytest.skip(str(error))
    ids, mask = padded(tokens)
    expected, pair = run(model, "two_pass", ids, mask)
    assert isinstance(pair, PairedCache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that it cannot be stacked
        found, cache = run(model, "stacked", ids, mask)
    assert isinstance(cache, StackedCache)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mistral"])
def test_one_sequence_token_by_token(arch, make_imsm, make_base, tokens):
    """A few rows of one token each are multiplied in another order (benchmarks/few_rows.py); a base alone never is."""
    model, ids = make_imsm(arch), tokens(1, 6)
    expected, _ = run(model, "two_pass", ids, torch.ones_like(ids))
    found, cache = run(model, "stacked", ids, torch.ones_like(ids))
    assert isinstance(cache, StackedCache)
    torch.testing.assert_close(found, expected, **CLOSE)
    few_rows = tokens(2, 1)
    with torch.no_grad(), model.use_memory("original"):
        assert torch.equal(model(input_ids=few_rows).logits, make_base(arch)(input_ids=few_rows).logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 8), (1, 2, 8), (4, 1, 8), (5, 1, 8)])
def test_a_turned_product_is_the_product(bias, shape):
    blocks = nn.ModuleList([nn.Linear(8, 5, bias=bias)])
    x = torch.randn(shape)
    expected = blocks[0](x)
    stacked = StackedPass(blocks, 0, [])
    for hook in stacked._hooks:
        hook.remove()  # they double rows
    assert torch.equal(blocks[0](x), expected)
    stacked.begin(1, 1)
    found = blocks[0](x)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    stacked.remove()
    assert type(blocks[0]) is nn.Linear


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral"])
def test_the_shared_trunk_is_computed_and_kept_once(arch, make_imsm, tokens):
    model = make_imsm(arch, peft_changes=TRUNK)
    ids, mask = padded(tokens)
    expected, _ = run(model, "two_pass", ids, mask)
    rows = []
    blocks = model.get_base_model().get_decoder().layers
    hooks = [b.register_forward_hook(lambda b, a, out: rows.append(out.shape[0])) for b in blocks]
    found, cache = run(model, "auto", ids, mask)
    for hook in hooks:
        hook.remove()
    assert rows[-2:] == [2, 4]
    assert [layer.keys.shape[0] for layer in cache.layers] == [2, 4]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize("training", [False, True])
def test_without_a_cache_the_frozen_pass_leaves_the_trunk_out(arch, training, make_imsm, tokens, monkeypatch):
    changes = TRUNK | ({"layers_pattern": "h"} if arch == "gpt2" else {})
    model = make_imsm(arch, peft_changes=changes)
    ids, mask = padded(tokens)
    labels = ids.where(torch.arange(7) > 3, -100)

    def loss_and_gradients():
        torch.manual_seed(0)  # GPT-2 has dropout
        model.train(training)
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    dropped = training and arch == "gpt2"  # its own dropout below the fork, which the frozen pass must not see
    loss_and_gradients()  # the first call tries it out
    calls = []
    decoder = model.get_base_model().get_decoder()
    blocks = decoder.h if arch == "gpt2" else decoder.layers
    for i, block in enumerate(blocks):
        mlp = block.mlp
        mlp.register_forward_hook(lambda m, a, o, i=i: calls.append(i))
    found = loss_and_gradients()
    assert calls == ([0, 1, 0, 1] if dropped else [0, 1, 1])
    calls.clear()
    monkeypatch.setattr(model._twin, "_replayable", False)
    expected = loss_and_gradients()
    assert calls == [0, 1, 0, 1]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_cache_made_by_a_pass_without_the_trunk_can_be_continued(arch, make_imsm, tokens):
    model = make_imsm(arch, peft_changes=TRUNK)
    ids = tokens(2, 7)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        model(input_ids=ids)
        cache = model(input_ids=ids[:, :4]).past_key_values  # use_cache is on by default, no cache is given
        assert isinstance(cache, PairedCache)
        rest = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 7)]
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, 4:], **CLOSE)


def recurrent(kind):
    """Mamba-2 blocks, in `hybrid` an attention above one; what they have read they overwrite in place."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "initializer_range": 0.3}
    heads = {"n_groups": 1, "state_size": 8, "num_heads": 8, "head_dim": 8, "chunk_size": 8}
    if kind == "mamba2":
        config = Mamba2Config(**sizes, **heads)
    else:
        mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
        attention = {"attn_layer_indices": [1], "num_attention_heads": 4, "num_key_value_heads": 2}
        config = BambaConfig(**sizes, **mamba, **attention, intermediate_size=48)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
@pytest.mark.parametrize("plan", ["auto", "stacked", "two_pass"])
def test_recurrent_states_below_the_adapter_go_on_for_each_memory(kind, plan, make_imsm, tokens):
    targets = ["in_proj"] if kind == "mamba2" else ["q_proj", "down_proj"]
    model = make_imsm("llama", base=recurrent(kind), peft_changes=TRUNK | {"target_modules": targets})
    assert model._twin._trunk == 1
    name, ids, model.plan = model._twin.cache_name, tokens(2, 8), plan
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for given in ({}, {"use_cache": True}):
            cache = getattr(model(input_ids=ids[:, :5], **given), name)
            stacked = plan == "stacked" or (plan == "auto" and bool(given))
            assert isinstance(cache, StackedCache if stacked else PairedCache)
            rest = []
            for t in range(5, 8):
                # Bamba counts positions from 0 in every call, whatever its cache holds
                at = {"position_ids": torch.tensor([[t]])} if kind == "hybrid" else {}
                rest.append(model(input_ids=ids[:, t : t + 1], **{name: cache}, **at).logits)
            torch.testing.assert_close(torch.cat(rest, 1), whole[:, 5:], **CLOSE)


def test_a_cache_of_the_models_own_kind_holds_one_memory_only(make_imsm, tokens):
    config = RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, rescale_every=0, eos_token_id=0)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model, ids = make_imsm("llama", base=base, peft_changes={"target_modules": ["key", "value"]}), tokens(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        with model.use_memory("original"):
            state = model(input_ids=ids, use_cache=True).state
            assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))
        assert isinstance(state, list)
        assert model(input_ids=ids, use_cache=True).state is None
        with pytest.raises(UsageError, match="state"):
            model(input_ids=ids[:, -1:], state=state)
        model.retention = float("-inf")  # the enhanced memory alone: a loop of calls has other queries
        expected = ids
        for _ in range(4):
            expected = torch.cat((expected, model(input_ids=expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, **options), expected)


def form_of(model, rows, **options):
    out = model(input_ids=torch.full((rows, 3), 5), use_cache=True, **options)
    return type(out.past_key_values).__mro__[1]


def test_which_form_a_call_takes(make_imsm):
    model = make_imsm("llama")
    with torch.no_grad():
        assert form_of(model, 1) is StackedCache
        assert form_of(model, 64) is StackedCache
        assert type(model(input_ids=torch.full((1, 3), 5)).past_key_values).__mro__[1] is PairedCache  # scoring
        model.plan = "two_pass"
        assert form_of(model, 1) is PairedCache
    model.plan = "stacked"
    assert form_of(model, 1) is PairedCache  # with gradients
    model.train()
    with torch.no_grad():
        assert form_of(model, 1) is PairedCache  # dropout must not reach the original memory


def test_an_unknown_plan(make_imsm):
    model = make_imsm("llama")
    with pytest.raises(UsageError, match="two_pass"):
        model.plan = "two_passes"
    assert model.plan == "auto"


def test_a_cache_goes_on_in_the_form_it_was_begun_in(make_imsm, tokens):
    model = make_imsm("llama")
    ids, mask = padded(tokens)
    expected, _ = run(model, "two_pass", ids, mask)
    cache = DynamicCache()
    with torch.no_grad():
        model.plan = "stacked"
        model(input_ids=ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    model.plan = "two_pass"
    positions = (mask.cumsum(1) - 1)[:, 4:]
    out = model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache, position_ids=positions)
    assert isinstance(cache, StackedCache)
    torch.testing.assert_close(out.logits[1], expected[0][-3:], **CLOSE)


def test_a_cache_that_has_its_rows_already_takes_two_passes(make_imsm, tokens):
    model = make_imsm("llama")
    config = model.get_base_model().config
    cache = StaticCache(config=config, max_cache_len=16)
    cache.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
    ids, mask = padded(tokens)
    found, cache = run(model, "stacked", ids, mask, cache)
    assert isinstance(cache, PairedCache)
    torch.testing.assert_close(found, run(model, "two_pass", ids, mask)[0], **CLOSE)


class StopError(Exception):
    pass


@pytest.mark.parametrize("stopped_in", ["block", "adapter"])
def test_nothing_is_left_behind_by_an_exception(stopped_in, make_imsm, make_base, tokens):
    model, base = make_imsm("llama"), make_base("llama")
    ids, mask = padded(tokens)
    expected, _ = run(model, "stacked", ids, mask)
    block = model.get_base_model().model.layers[1]
    module = block.mlp if stopped_in == "block" else block.self_attn.q_proj.lora_A["default"]

    def stop(*_):
        raise StopError

    hook = module.register_forward_hook(stop)
    with torch.no_grad(), pytest.raises(StopError):
        model(input_ids=ids, attention_mask=mask, use_cache=True)
    hook.remove()
    with torch.no_grad(), model.use_memory("original"):
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    with torch.no_grad():
        decoder = model.get_base_model().model
        model._memory = "enhanced"
        assert decoder(input_ids=ids).last_hidden_state.shape[0] == 2
        model._memory = "interwoven"
    found, _ = run(model, "stacked", ids, mask)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_copy_of_a_stacked_model_is_a_twin_of_its_own(make_imsm, perturb, tokens):
    model = make_imsm("llama")
    ids, mask = padded(tokens)
    before, _ = run(model, "stacked", ids, mask)
    other = copy.deepcopy(model)
    perturb(other, seed=9)
    expected, _ = run(other, "two_pass", ids, mask)
    found, _ = run(other, "stacked", ids, mask)
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert torch.equal(run(model, "stacked", ids, mask)[0][0], before[0])


def test_after_unloading_the_base_is_the_base(make_imsm, make_base, tokens):
    model = make_imsm("llama", peft_changes=TRUNK)
    ids, mask = padded(tokens)
    run(model, "stacked", ids, mask)
    base = model.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(base(input_ids=ids).logits, make_base("llama")(input_ids=ids).logits)


def test_an_adapter_added_later_is_part_of_the_twin(make_imsm, make_peft, perturb, tokens):
    model = make_imsm("llama", peft_changes=TRUNK)
    ids, mask = padded(tokens)
    run(model, "stacked", ids, mask)
    model.add_adapter("other", make_peft("lora", target_modules=["k_proj", "up_proj"]))
    model.set_adapter("other")
    perturb(model)
    expected, _ = run(model, "two_pass", ids, mask)
    found, cache = run(model, "stacked", ids, mask)
    assert isinstance(cache, StackedCache)
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    with torch.no_grad(), model.use_memory("original"):
        before = model(input_ids=ids).logits
    model.set_adapter("default")
    model.delete_adapter("other")
    with torch.no_grad(), model.use_memory("original"):
        assert torch.equal(model(input_ids=ids).logits, before)


def mixture():
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("changes", "stackable"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, True),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),  # both memories differ before the first block
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, False),  # rows are mixed there
    ],
    ids=["attention", "embedding", "experts"],
)
def test_what_cannot_be_stacked_takes_two_passes(changes, stackable, make_imsm, tokens):
    model = make_imsm("llama", base=mixture(), peft_changes=changes)
    ids, mask = padded(tokens)
    expected, _ = run(model, "two_pass", ids, mask)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, cache = run(model, "stacked", ids, mask)
    assert isinstance(cache, StackedCache) == stackable
    assert any("two passes" in str(w.message) for w in said) != stackable
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **CLOSE)


class Crosswise(nn.Module):
    """A feed-forward layer that lets the rows of a batch see each other."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x):
        return self.own(x) + x.mean(0, keepdim=True)


def test_rows_that_see_each_other_are_noticed(make_base, make_imsm, tokens):
    base = make_base("llama")
    for block in base.model.layers:
        block.mlp = Crosswise(block.mlp)
    model = make_imsm("llama", base=base)
    ids, mask = padded(tokens)
    expected, _ = run(model, "two_pass", ids, mask)
    found, cache = run(model, "auto", ids, mask)
    assert isinstance(cache, PairedCache)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_half_precision(arch, make_base, make_imsm, tokens):
    model = make_imsm(arch, base=make_base(arch).to(torch.bfloat16))
    ids, mask = padded(tokens)
    expected, _ = run(model, "two_pass", ids, mask)
    found, cache = run(model, "stacked", ids, mask)
    assert isinstance(cache, StackedCache)
    torch.testing.assert_close(found[0].float(), expected[0].float(), atol=0.1, rtol=0.1)


def test_hidden_states_and_attentions_are_the_enhanced_ones(make_imsm, tokens):
    model = make_imsm("llama", peft_changes=TRUNK)
    model.set_attn_implementation("eager")
    ids, _ = padded(tokens)
    outputs = {}
    for plan in ("two_pass", "stacked"):
        model.plan = plan
        with torch.no_grad():
            outputs[plan] = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        pairs = zip(outputs["stacked"][name], outputs["two_pass"][name], strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, **CLOSE)


def test_compiled(make_imsm, tokens):
    """With a static cache, as transformers compiles; nothing is compiled again for a second call."""
    model = make_imsm("llama")
    ids, mask = padded(tokens)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask, "cache_implementation": "static"}
    expected = model.generate(input_ids=ids, disable_compile=True, **options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend=backend)
    try:
        assert torch.equal(model.generate(input_ids=ids, disable_compile=True, **options), expected)
        compiled = len(graphs)
        assert compiled > 0
        assert torch.equal(model.generate(input_ids=ids, disable_compile=True, **options), expected)
        assert len(graphs) == compiled
    finally:
        torch._dynamo.reset()


# --- the cache ------------------------------------------------------------------------------------------------------


def filled(rows, columns):
    """Layer 0 is the trunk's; numbers tell rows, columns and memories apart."""
    values = torch.arange(rows * columns, dtype=torch.float32).view(rows, 1, columns, 1)
    cache = stack(DynamicCache(), trunk=1, rows=rows)
    cache.update(values, values, 0)
    cache.update(torch.cat((values, values + 1000)), torch.cat((values, values + 1000)), 1)
    cache.query = extend(values.view(rows, columns, 1))
    return cache, values


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_operations_on_rows_and_columns_reach_both_memories(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(3, 6))
    cache, expected = filled(rows, columns)
    for _ in range(data.draw(st.integers(1, 4))):
        rows, columns = expected.shape[0], expected.shape[2]
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
        match data.draw(st.sampled_from(["reorder", "select", "mask", "repeat", "crop"])):
            case "reorder":
                cache.reorder_cache(chosen)
                expected = expected[chosen]
            case "select":
                cache.batch_select_indices(chosen)
                expected = expected[chosen]
            case "mask":
                mask = torch.zeros(rows, dtype=torch.bool).index_fill(0, chosen, True)
                cache.batch_select_indices(mask)
                expected = expected[mask]
            case "repeat":
                cache.batch_repeat_interleave(2)
                expected = expected.repeat_interleave(2, dim=0)
            case "crop" if columns > 1:
                cache.crop(-1)
                expected = expected[:, :, :-1]
        assert torch.equal(cache.layers[0].keys, expected)
        assert torch.equal(cache.layers[1].values, torch.cat((expected, expected + 1000)))
        assert torch.equal(cache.query.features, expected.view(*expected.shape[::2], 1))
        assert cache.rows == expected.shape[0] == cache.query.rows
    cache.reset()
    assert cache.query is None
    assert cache.get_seq_length() == 0
