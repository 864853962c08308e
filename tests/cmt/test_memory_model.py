"""What an answer depends on, and what it leaves as it was."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from twinweave.cmt import MemoryModel
from twinweave.cmt.bank import Memory
from twinweave.cmt.model import Found
from twinweave.errors import UnsupportedModelError, UsageError

OPTIONS = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def asked(model, ids, prompt, **inputs):
    return logits(model, ids, query_mask=(torch.arange(ids.shape[1]) < prompt).expand(ids.shape), **inputs)


def test_an_empty_bank_answers_as_the_base(make_memory, make_base, arch, tokens, tmp_path, texts):
    base, ids = make_base(arch), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    without = make_memory(arch)
    model = make_memory(arch, bank=tmp_path / "bank.lance")
    names = model.memorize(texts[:2])
    with_memories = logits(model, ids, attention_mask=mask)
    assert not torch.equal(with_memories, logits(base, ids, attention_mask=mask))
    assert model.forget(names) == sorted(names)
    for one in (without, model, make_memory(arch, bank=tmp_path / "none.lance")):
        assert torch.equal(logits(one, ids, attention_mask=mask), logits(base, ids, attention_mask=mask))
        for options in (OPTIONS, OPTIONS | {"num_beams": 3}, OPTIONS | {"do_sample": True}):
            torch.manual_seed(0)
            expected = base.generate(input_ids=ids, attention_mask=mask, **options)
            torch.manual_seed(0)
            more = {} if "num_beams" in options else {"contrast": 0.5}
            assert torch.equal(one.generate(input_ids=ids, attention_mask=mask, **more, **options), expected)


def test_with_a_bank_the_base_called_by_itself_is_the_base(make_memory, make_base, arch, tokens, tmp_path, texts):
    base, ids = make_base(arch), tokens(2, 9)
    model = make_memory(arch, bank=tmp_path / "bank.lance")
    model.memorize(texts)
    model.generate(input_ids=ids, **OPTIONS)
    assert torch.equal(logits(model.base, ids), logits(base, ids))
    expected = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    assert torch.equal(model.base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS), expected)


def hooks_of(model):
    named = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {(name, kind): len(getattr(m, kind)) for name, m in model.named_modules() for kind in named}


@pytest.mark.parametrize("where", ["compression", "answer", "documents", "checkpointing"])
def test_an_exception_leaves_nothing_behind(given, make_base, tokens, step, where):
    model, ids = given(), tokens(2, 9)
    before, modes = hooks_of(model), {n: m.training for n, m in model.named_modules()}
    own = copy.deepcopy(model.state_dict())
    seen = []

    def stop(module, args, output=None):
        seen.append(module)
        if len(seen) > {"compression": 0, "answer": 1, "documents": 2, "checkpointing": 0}[where]:
            raise KeyboardInterrupt

    handle = model.compressor.decoder.layers[1].register_forward_hook(stop)
    if where == "checkpointing":
        model.gradient_checkpointing_enable()
        modes = {n: m.training for n, m in model.train().named_modules()}
    run = partial(model.generate, input_ids=ids, **OPTIONS) if where in ("compression", "answer") else None
    with pytest.raises(KeyboardInterrupt):
        run() if run else model(**step())
    handle.remove()
    model.gradient_checkpointing_disable()
    assert hooks_of(model) == before
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(logits(model.base, ids), logits(make_base(), ids))
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_text_that_moved_to_another_document_is_kept(make_memory, tmp_path, texts):
    model = make_memory(bank=tmp_path / "bank.lance")
    a, b, c, d = texts[:4]

    def outcomes(*documents):
        entries = next(model.memorizing([(text, name, {}) for name, text in documents]))
        digests = [row["digest"] for row in model.bank.documents()]
        assert len(set(digests)) == len(digests)
        return [(entry.id, entry.outcome) for entry in entries]

    assert outcomes(("z", a), ("y", b)) == [("z", "added"), ("y", "added")]
    assert outcomes(("x", a), ("z", c)) == [("x", "added"), ("z", "replaced")]
    # from one to the next: x has what z had, which has what y had, which has something new
    assert outcomes(("x", c), ("z", b), ("y", d)) == [("x", "replaced"), ("z", "replaced"), ("y", "replaced")]
    facts = {row["id"]: row["digest"] for row in model.bank.documents()}
    assert facts == model.bank.digests_of(["x", "y", "z"])
    assert outcomes(("x", c), ("z", b), ("y", d)) == [("x", "known"), ("z", "known"), ("y", "known")]


def test_order_in_the_bank_changes_no_bit(make_memory, tokens, tmp_path, texts):
    found, ids = [], tokens(3, 9)
    for number, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2])):
        model = make_memory(bank=tmp_path / f"{number}.lance")
        for index in order:
            model.memorize(texts[index], ids=f"doc {index}")
        found.append(logits(model, ids))
    assert torch.equal(*found)


def test_top_k_of_the_bank_is_no_filter(make_memory, tokens, tmp_path, texts):
    model, ids = make_memory(bank=tmp_path / "bank.lance"), tokens(2, 9)
    model.memorize(texts)
    options = OPTIONS | {"return_dict_in_generate": True, "output_logits": True}
    every = [model.generate(input_ids=ids, top_k=k, **options).logits for k in (len(texts), len(texts) + 1, 1000)]
    assert all(torch.equal(a, b) for other in every[1:] for a, b in zip(every[0], other, strict=True))
    fewer = model.generate(input_ids=ids, top_k=1, **options).logits
    assert not torch.equal(fewer[0], every[0][0])
    # by hand: every block that is in the bank, whatever its similarity
    question = model.reader.compressed(ids, torch.ones_like(ids))
    blocks = torch.stack([hit.block for hit in model.bank.search(torch.randn(1, 32), 100)[0]])
    seen = torch.ones(2, len(texts), dtype=torch.bool)
    model._retrieved = lambda *_: Found(question, blocks[None].expand(2, -1, -1, -1), seen, seen.any(1))
    torch.testing.assert_close(model.generate(input_ids=ids, **options).logits[0], every[0][0])


def test_adding_changes_no_older_row(make_memory, tmp_path, texts):
    model = make_memory(bank=tmp_path / "bank.lance")
    model.memorize(texts[:2])
    key = torch.randn(1, 32)
    before = {hit.id: hit for hit in model.bank.search(key, 10)[0]}
    model.memorize(texts[2:])
    after = {hit.id: hit for hit in model.bank.search(key, 10)[0]}
    assert len(after) == 4
    for name, hit in before.items():
        assert torch.equal(hit.block, after[name].block)
        assert hit.similarity == after[name].similarity


def test_a_row_does_not_depend_on_its_batch(given, arch, tokens):
    if arch in ("gemma3", "mistral"):
        model = given(arch, base=None, memories=3)
        for layer in [model.base.config]:
            assert layer.sliding_window in (4, 5)
    model = given(arch)
    row, others = tokens(1, 6), tokens(2, 11, seed=4)
    alone = asked(model, row, 4, attention_mask=torch.ones_like(row))
    # padding within a window takes the places of tokens, in the base as well, so there only padding behind is free
    windowed = arch in ("gemma3", "mistral")
    for front in (0,) if windowed else (0, 5, 2):
        ids = torch.cat((pad(row, (front, 5 - front)), others))
        mask = torch.cat((pad(torch.ones_like(row), (front, 5 - front)), torch.ones_like(others)))
        question = torch.zeros_like(ids, dtype=torch.bool)
        question[0, front : front + 4] = True
        question[1:, :7] = True
        found = logits(model, ids, attention_mask=mask, query_mask=question)
        torch.testing.assert_close(found[:1, front : front + 6], alone, rtol=1e-4, atol=1e-4)


def test_no_logit_depends_on_a_later_token(given, arch, tokens):
    model, ids = given(arch), tokens(2, 10)
    other = torch.cat((ids[:, :6], tokens(2, 4, seed=9)), 1)
    assert torch.equal(asked(model, ids, 4)[:, :6], asked(model, other, 4)[:, :6])
    labels = torch.where(torch.arange(10) >= 4, ids, -100)
    torch.testing.assert_close(logits(model, ids, labels=labels), asked(model, ids, 4))
    assert not torch.equal(asked(model, ids, 4), asked(model, ids, 6)), "what is asked counts"


def test_the_prefix_is_keys_and_values_in_front(given, make_base, arch, tokens):
    """The keys and values of ordinary tokens as the prefix: they act, and leave a window, as those tokens do."""
    model, base, front, ids = given(arch), make_base(arch), tokens(2, 4, seed=5), tokens(2, 9)
    cache = DynamicCache()
    with torch.no_grad():
        base(input_ids=front, past_key_values=cache, use_cache=True)
    model.prefix.forward = lambda memory: {n: (layer.keys, layer.values) for n, layer in enumerate(cache.layers)}
    expected = logits(base, torch.cat((front, ids), 1))[:, 4:]
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_behind_a_sliding_window_there_is_no_memory(given, tokens):
    """Two layers with a window of 5 reach eight tokens back: what comes later is as if there were no memories."""
    ids = tokens(1, 14)
    found = asked(given("mistral"), ids, 14)
    other = given("mistral")
    other.prefix.forward = lambda memory, pi=other.prefix.forward: {n: (-k, v + 1) for n, (k, v) in pi(memory).items()}
    changed = asked(other, ids, 14)
    assert not torch.allclose(found[:, 7], changed[:, 7])
    torch.testing.assert_close(found[:, 8:], changed[:, 8:])


@pytest.mark.parametrize("window", [None, 64])
def test_grouped_queries(given, make_base, window):
    base = make_base("llama", num_key_value_heads=1) if window is None else make_base("mistral", sliding_window=window)
    model = given(base=base)
    assert [shape.heads for shape in model.prefix.shapes] == [1, 1] if window is None else [2, 2]


def test_a_base_in_bfloat16(given, make_base, tokens, step):
    model, ids = given(base=make_base().bfloat16()), tokens(2, 9)
    assert logits(model, ids).dtype == torch.bfloat16
    found = model.generate(input_ids=ids, **OPTIONS, return_dict_in_generate=True, output_logits=True)
    whole = asked(model, found.sequences, 9)[:, 8:-1]
    torch.testing.assert_close(torch.stack(found.logits, 1).float(), whole.float(), rtol=0.1, atol=0.3)
    loss = model.train()(**step()).loss
    assert loss.dtype == torch.float32
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trained)


def test_cast_as_a_whole_or_under_autocast(given, tokens, step):
    model, ids = given(similarity_bias=True), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(input_ids=ids, **OPTIONS)
        model.train()(**step()).loss.backward()
    model.distractors = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        model(**step()).loss.backward()
    model.distractors = 1.0
    cast = given(similarity_bias=True).bfloat16()
    assert cast.generate(input_ids=ids, **OPTIONS).shape == expected.shape
    assert torch.isfinite(cast.train()(**step()).loss)


def test_memory_tokens_start_as_the_decoder_gets_embeddings(make_memory, tokenizer, arch):
    model = make_memory(arch, init_text="who is", seed=1)
    ids = torch.tensor(tokenizer("who ", add_special_tokens=False)["input_ids"])
    # gemma3's embeddings come out larger than its table has them
    assert torch.equal(model.compressor.tokens, model.base.get_input_embeddings()(ids))


def test_what_cannot_be_given_with_memories(given, make_memory, step, tokens):
    model, ids = given(), tokens(2, 9)
    cache = DynamicCache()
    with pytest.raises(UsageError, match="past_key_values cannot be given"):
        model(input_ids=ids, past_key_values=cache)
    with pytest.raises(UsageError, match="position_ids cannot be given"):
        model(input_ids=ids, position_ids=torch.arange(9)[None])
    with pytest.raises(UsageError, match="no labels"):
        model(input_ids=ids, context_ids=ids)
    batch = step()
    for reads in (torch.eye(3), torch.ones(3, 2), torch.ones(0, 2)):
        with pytest.raises(UsageError, match="reads is"):
            model(**batch, reads=reads)
    assert make_memory()(input_ids=ids, position_ids=torch.arange(9)[None], use_cache=True).past_key_values is not None


def test_bases_that_cannot_carry_memories(make_base, make_imsm):
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    mamba = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4))
    sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    for base, why in (
        (torch.nn.Linear(2, 2), "is not a transformers model"),
        (make_base().model, "has no language-model head"),
        (make_imsm().get_base_model(), "already carries an adapter"),
        (T5ForConditionalGeneration(T5Config(**sizes)), "is an encoder-decoder"),
        (mamba, "keeps no keys and values"),
    ):
        with pytest.raises(UnsupportedModelError, match=why):
            MemoryModel(base)


def test_a_memory_of_another_dtype_is_kept_as_bfloat16(make_memory, tmp_path):
    model = make_memory(bank=tmp_path / "bank.lance")
    block = torch.randn(4, 32)
    model.bank.add([Memory("a", "d", torch.nn.functional.normalize(block.mean(0), dim=0), block)])
    assert torch.equal(model.bank.search(torch.randn(1, 32), 1)[0][0].block, block.bfloat16().float())
