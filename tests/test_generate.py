"""Generation: the cache, the window past block_size and the sampling give what re-reading everything would."""

import math

import pytest
import torch

from model import GPT, GPTConfig, KVCache, sample_ids

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]
GREEDY = dict(temperature=0, top_k=None, top_p=1.0)
TOP_K = dict(temperature=0.8, top_k=20, top_p=1.0)
TOP_P = dict(temperature=1.0, top_k=None, top_p=0.9)
BLOCK = 24


@pytest.fixture(scope='module')
def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=65, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)  # sharp distributions, unlike fresh weights
    return model


@pytest.fixture(scope='module')
def trained(gpt) -> GPT:
    """Trained on sequences that go on by 1, 2 or 5."""
    torch.manual_seed(0)
    model = GPT(gpt.config)
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.99), 'cpu')
    for _ in range(150):
        ids = (torch.randint(65, (16, 1)) + torch.tensor([1, 2, 5])[torch.randint(3, (16, BLOCK + 1))].cumsum(1)) % 65
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2, 'of 4.2 at the start and 1.1 at best'
    return model.eval()


def reference(model, idx, uniforms, temperature, top_k, top_p):
    """Re-reads the whole context at every step; also returns how close a uniform came to a boundary of the CDF."""
    closest = 1.0
    for u in uniforms.T:
        logits = model(idx[:, -BLOCK:])[0][:, -1].double()
        p = torch.softmax(logits / (temperature or 1), -1)
        if top_k:
            p[p < p.sort(-1).values[:, -top_k, None]] = 0
        for row in p if top_p < 1 else ():
            order = row.argsort(descending=True)
            row[order[1:][row[order].cumsum(0)[:-1] >= top_p]] = 0
        cdf = (p / p.sum(-1, keepdim=True)).cumsum(-1)
        new = p.argmax(-1) if temperature == 0 else (cdf <= u[:, None]).sum(-1)
        closest = min(closest, (cdf - u[:, None]).abs().min().item()) if temperature else closest
        idx = torch.cat((idx, new[:, None]), dim=1)
    return idx, closest


def test_weights_that_are_not_numbers_make_no_tokens():
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=1, n_embd=8)).eval()
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    with pytest.raises(ValueError, match='^the model makes NaN or infinity of this text$'):
        model.generate(torch.zeros(2, 3, dtype=torch.long), 5)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('how', [GREEDY, TOP_K, TOP_P], ids=['greedy', 'top_k', 'top_p'])
@pytest.mark.parametrize('length', [1, 17, BLOCK - 1, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize('batch', [1, 3, pytest.param(10, marks=pytest.mark.slow)])
def test_the_cache_changes_no_token(gpt, batch, length, how, device):
    assert_the_same_tokens(gpt, batch, length, how, device)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('how', [GREEDY, TOP_K, TOP_P], ids=['greedy', 'top_k', 'top_p'])
@pytest.mark.parametrize('length', [1, 2 * BLOCK])
def test_nor_does_it_with_trained_weights(trained, length, how, device):
    assert_the_same_tokens(trained, 3, length, how, device)


@torch.no_grad()
def assert_the_same_tokens(gpt, batch, length, how, device, stream=GPT.stream):
    """Those of re-reading everything; test_fast.py has this done for fast.stream."""
    g = torch.Generator().manual_seed(length)
    idx = torch.randint(65, (batch, length), generator=g).to(device)
    uniforms = torch.rand(batch, 3 * BLOCK, generator=g)
    model = gpt.to(device)
    torch.set_float32_matmul_precision('highest')
    wanted, closest = reference(model, idx, uniforms.to(device), **how)
    got = torch.stack((*idx.T, *stream(model, idx, 3 * BLOCK, uniforms=uniforms, **how)), dim=1)
    gpt.to('cpu')
    differ = (got != wanted).any(dim=1)
    assert not differ.any() or closest < 1e-5
    assert got.shape == (batch, length + 3 * BLOCK)


def test_greedy_equals_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=77, bos_token_id=None,
                                    eos_token_id=None)).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.15)
    hf.save_pretrained(tmp_path)
    idx = torch.randint(77, (3, 9))
    theirs = hf.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=50, pad_token_id=0)
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).eval().generate(idx, 50, temperature=0), theirs)


def test_sample_i_does_not_depend_on_the_batch(gpt):
    idx, uniforms = torch.zeros(6, 3, dtype=torch.long), torch.rand(6, 60)
    together = gpt.generate(idx, 60, 0.9, 30, uniforms=uniforms)
    alone = [gpt.generate(idx[:1], 60, 0.9, 30, uniforms=uniforms[i:i + 1])[0] for i in range(6)]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_bfloat16_logits_through_the_cache(gpt):
    idx = torch.randint(65, (2, BLOCK))
    plain = gpt(idx)[0]
    half = GPT(gpt.config).eval()
    half.load_state_dict(gpt.state_dict())
    half.bfloat16()
    caches = [KVCache(BLOCK) for _ in half.transformer.h]
    half(idx[:, :10], caches=caches)
    for t in range(10, BLOCK):
        logits = half(idx[:, t:t + 1], caches=caches)[0]
    assert (logits.float() - plain).abs().max() <= 2e-2 * plain.abs().max()
    assert caches[0].k.shape == (2, 2, BLOCK, 16) and caches[0].k.dtype == caches[0].v.dtype == torch.bfloat16


@pytest.mark.parametrize('device', DEVICES)
@torch.no_grad()
def test_what_lies_beyond_the_filled_part_does_not_matter(gpt, device):
    torch.set_float32_matmul_precision('highest')
    idx = torch.randint(65, (2, 8), device=device)
    caches, model = [KVCache(BLOCK) for _ in gpt.transformer.h], gpt.to(device)
    model(idx[:, :7], caches=caches)
    for cache in caches:
        cache.k[:, :, 7:], cache.v[:, :, 7:] = 1e4, 1e4
    logits, wanted = model(idx[:, 7:], caches=caches)[0], model(idx)[0]
    gpt.to('cpu')
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]])
    u = (torch.arange(10000) + 0.5) / 10000  # every quantile once
    drawn = sample_ids(logits.expand(10000, -1), u, 0.5, None, 1.0)
    wanted = torch.softmax(logits[0] / 0.5, -1)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 10000, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize('how, allowed', [((1.0, 2, 1.0), {1, 3}), ((1.0, 0, 0.6), {3}), ((1.0, None, 0.7), {1, 3}),
                                          ((1.0, 9, 1.0), {0, 1, 3}), ((0, 2, 1.0), {3}), ((1e-300, 2, 1.0), {3}),
                                          ((1.0, 1, 0.5), {3})])
def test_what_top_k_and_top_p_leave(how, allowed):
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]]).expand(1000, -1)
    assert set(sample_ids(logits, torch.arange(1000) / 1000, *how).tolist()) == allowed


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('V', [7, 64, 65, 1000, 50257])
def test_an_id_is_where_the_cdf_passes_its_uniform(V, dtype, device, draw=sample_ids):
    g = torch.Generator().manual_seed(0)
    for top_k in (None, 1, 20, 200, V):
        logits = (3 * torch.randn(16, V, generator=g) - 20).to(dtype)
        logits[:, ::7] = -math.inf
        u = torch.rand(16, generator=g)
        ids = draw(logits.to(device), u.to(device), 0.8, top_k, 1.0).cpu()[:, None]
        p = torch.softmax(logits.double() / 0.8, -1)
        p[p < p.sort(-1).values[:, -min(top_k or V, V), None]] = 0
        p /= p.sum(-1, keepdim=True)
        high, mine = p.cumsum(-1).gather(1, ids)[:, 0], p.gather(1, ids)[:, 0]
        assert (mine > 0).all() and (u <= high + 1e-5).all() and (u >= high - mine - 1e-5).all()


@pytest.mark.parametrize('device', DEVICES)
def test_the_largest_uniform_below_one_draws_a_possible_id(device, draw=sample_ids):
    logits = torch.full((4, 1000), -math.inf, device=device)
    logits[:, 500] = logits[:, 20] = 3.0
    u = torch.tensor([0.0, 0.4999, 0.5, 1 - 2**-24], device=device)
    for top_k in (None, 200):
        assert draw(logits, u, 1.0, top_k, 1.0).tolist() == [20, 20, 500, 500]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('V', [40, 48])
def test_logits_that_are_nan_draw_an_id_all_the_same(V, device, draw=sample_ids):
    logits, u = torch.full((3, V), math.nan, device=device), torch.rand(3, device=device)
    for top_k in (None, 5):
        ids = draw(logits, u, 1.0, top_k, 1.0)
        assert ((0 <= ids) & (ids < V)).all()


def test_ids_of_a_padded_vocabulary_are_never_drawn(gpt):
    out = gpt.generate(torch.zeros(4, 1, dtype=torch.long), 100, 5.0, None, vocab_size=7)
    assert out.max() < 7


def test_it_streams(gpt):
    steps = gpt.stream(torch.zeros(2, 3, dtype=torch.long), 5, uniforms=torch.full((2, 5), 0.5))
    first = next(steps).clone()
    assert first.shape == (2,)
    assert len(list(steps)) == 4
