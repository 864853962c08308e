"""The logits against the paper's equations, written out slowly from two separate runs of the model."""

import pytest
import torch


def two_runs(model, **inputs):
    """Last hidden states of the frozen and of the tuned model, each from a run of its own."""
    decoder = model.get_base_model().get_decoder()
    with torch.no_grad():
        with model.use_memory("original"):
            h = decoder(**inputs).last_hidden_state
        with model.use_memory("enhanced"):
            h_tuned = decoder(**inputs).last_hidden_state
    return h, h_tuned


def woven_by_hand(model, h, h_tuned, query_of):
    """Logits from u = [q; h; h'; q'], g = σ(u W_A W_B), z = g∘h + (1-g)∘h'; query_of(row, t): the query's columns."""
    gate, rows, length, d = model.gate, *h.shape
    logits = []
    for b in range(rows):
        for t in range(length):
            if model.imsm_config.fusion == "average":
                g = torch.full((d,), 0.5)
            else:
                u = torch.cat((h[b, t], h_tuned[b, t]))
                if model.imsm_config.fusion == "query_gate":
                    columns = query_of(b, t)
                    q = h[b, columns].mean(0) if columns else torch.zeros(d)
                    q_tuned = h_tuned[b, columns].mean(0) if columns else torch.zeros(d)
                    u = torch.cat((q, u, q_tuned))
                g = 1 / (1 + torch.exp(-((u @ gate.w_a) @ gate.w_b)))
            z = g * h[b, t] + (1 - g) * h_tuned[b, t]
            logits.append(z @ model.get_output_embeddings().weight.T)
    return torch.stack(logits).view(rows, length, -1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["query_gate", "gate", "average"])
@torch.no_grad()
def test_one_answer_behind_one_prompt(arch, fusion, make_imsm, tokens):
    model = make_imsm(arch, fusion=fusion)
    ids = tokens(3, 12)
    starts = (4, 7, 9)  # where each row's answer starts
    labels = ids.clone()
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    h, h_tuned = two_runs(model, input_ids=ids)
    expected = woven_by_hand(model, h, h_tuned, lambda b, t: list(range(min(t + 1, starts[b]))))
    got = model(input_ids=ids, labels=labels).logits
    close(got, expected)
    for row, start in enumerate(starts):  # the paper's fixed q, at every position that predicts a label
        fixed = woven_by_hand(model, h, h_tuned, lambda b, t, n=start: list(range(n)))
        close(got[row, start - 1 : -1], fixed[row, start - 1 : -1])


@torch.no_grad()
def test_each_answer_of_a_conversation_has_everything_before_it_as_query(arch, make_imsm, tokens):
    model = make_imsm(arch)
    ids = tokens(2, 14)
    runs = [[(3, 6), (9, 14)], [(1, 2), (5, 11)]]
    labels = torch.full_like(ids, -100)
    for row, spans in enumerate(runs):
        for start, end in spans:
            labels[row, start:end] = ids[row, start:end]

    def query_of(row, t):
        inside = [start for start, end in runs[row] if start <= t < end]
        return list(range(inside[0] if inside else t + 1))

    h, h_tuned = two_runs(model, input_ids=ids)
    close(model(input_ids=ids, labels=labels).logits, woven_by_hand(model, h, h_tuned, query_of))


@torch.no_grad()
def test_everything_so_far_is_the_query_when_nobody_says(arch, make_imsm, tokens):
    model = make_imsm(arch)
    ids = tokens(2, 9)
    h, h_tuned = two_runs(model, input_ids=ids)
    close(model(input_ids=ids).logits, woven_by_hand(model, h, h_tuned, lambda b, t: list(range(t + 1))))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_labels", [True, False])
@torch.no_grad()
def test_query_mask_wins_and_padding_is_no_query(side, with_labels, make_imsm, tokens):
    model = make_imsm()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(9, 12)] = 0
    ids[mask == 0] = 0
    query = torch.randint(0, 2, (2, 12), generator=torch.Generator().manual_seed(4))
    labels = torch.where((torch.arange(12) > 6) & (mask == 1), ids, -100) if with_labels else None
    h, h_tuned = two_runs(model, input_ids=ids, attention_mask=mask)
    expected = woven_by_hand(
        model, h, h_tuned, lambda b, t: [c for c in range(t + 1) if mask[b, c] == 1 and query[b, c] == 1]
    )
    for given in (query, query.bool()):
        got = model(input_ids=ids, attention_mask=mask, query_mask=given, labels=labels).logits
        close(got[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_labels_beside_padding(side, make_imsm, tokens):
    model = make_imsm()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    padding = slice(0, 4) if side == "left" else slice(8, 12)
    mask[1, padding], ids[1, padding] = 0, 0
    start = (5, 7)
    labels = torch.where((torch.arange(12) >= torch.tensor(start)[:, None]) & (mask == 1), ids, -100)
    h, h_tuned = two_runs(model, input_ids=ids, attention_mask=mask)
    expected = woven_by_hand(
        model, h, h_tuned, lambda b, t: [c for c in range(min(t + 1, start[b])) if mask[b, c] == 1]
    )
    got = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    close(got[mask == 1], expected[mask == 1])


@torch.no_grad()
def test_an_answer_without_a_query_averages_up_to_itself(make_imsm, tokens):
    model = make_imsm()
    ids = tokens(2, 8)
    h, h_tuned = two_runs(model, input_ids=ids)
    expected = woven_by_hand(model, h, h_tuned, lambda b, t: list(range(t + 1)))
    close(model(input_ids=ids, labels=ids).logits, expected)


@torch.no_grad()
def test_labels_of_an_answer_behind_a_cached_prompt(make_imsm, tokens):
    """Scoring several answers behind one prompt: what is in the cache is the query."""
    model = make_imsm()
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[:, :5] = -100
    expected = model(input_ids=ids, labels=labels).logits
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    got = model(input_ids=ids[:, 5:], labels=ids[:, 5:], past_key_values=cache).logits
    close(got, expected[:, 5:])


@pytest.mark.parametrize("retention", [-2.0, 0.7])
@torch.no_grad()
def test_retention_is_added_to_the_gates_logits(retention, make_imsm, tokens):
    model = make_imsm()
    ids = tokens(2, 6)
    gate = model(input_ids=ids, output_gate=True).gate
    model.retention = retention
    shifted = model(input_ids=ids, output_gate=True).gate
    close(torch.logit(shifted.double()) - torch.logit(gate.double()), torch.full(gate.shape, retention).double())


@torch.no_grad()
def test_generation_is_the_paper_loop(arch, make_imsm, tokens):
    """Greedy tokens and their logits against: no cache, two runs a token, q fixed over the prompt."""
    model = make_imsm(arch)
    prompt = tokens(2, 7)
    ids, expected = prompt, []
    for _ in range(6):
        h, h_tuned = two_runs(model, input_ids=ids)
        logits = woven_by_hand(model, h, h_tuned, lambda b, t: list(range(min(t + 1, 7))))[:, -1]
        expected.append(logits)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    got = model.generate(
        input_ids=prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(got.sequences, ids)
    close(torch.stack(got.logits), torch.stack(expected))
