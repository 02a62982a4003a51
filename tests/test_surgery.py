"""What people do to the model from their own code; each works as with plain torch modules."""

import copy
import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import codec
from model import GPT, GPTConfig, KVCache, LayerNorm

from . import test_model
from .test_model import ids

SHAPE = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=64)
PROMPT = 5


def small(**changes) -> GPT:
    return test_model.small(**{**SHAPE, **changes})


@torch.no_grad()
def assert_generates(model: nn.Module, n: int = 20) -> None:
    """generate() gives the likeliest ids of a model that reads everything again for each, past block_size too."""
    idx = ids(2, PROMPT)
    got = model.generate(idx, n, temperature=0)
    for _ in range(n):
        idx = torch.cat((idx, model(idx[:, -16:])[0].argmax(-1)), dim=1)
    assert torch.equal(got, idx)


class Scaled(nn.Module):
    """A part of the model times a number; its forward takes x alone."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part, self.scale = part, nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.part(x)


class LoRA(nn.Module):
    """A frozen Linear and two small matrices beside it (Hu et al. 2021)."""

    def __init__(self, linear: nn.Linear, rank: int = 4):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.a.T @ self.b.T


# -- other parts ----------------------------------------------------------------------------------------------------

def test_another_head():
    model, x, y = small(), ids(3, 9), ids(3, 9, vocab_size=7)
    model.lm_head = nn.Linear(64, 7, bias=False)
    logits, loss = model(x, y)
    assert logits.shape == (3, 9, 7) and model(x)[0].shape == (3, 1, 7)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    loss.backward()
    assert all(p.grad.any() for p in model.parameters())


def test_lora_by_hand():
    model, x = small(bias=False).requires_grad_(False), ids(3, 9)
    before = model(x, x)[0]
    for block in model.transformer.h:
        block.attn.c_attn = LoRA(block.attn.c_attn)
    torch.testing.assert_close(model(x, x)[0], before)
    old = {name: p.clone() for name, p in model.named_parameters()}
    model(x, x)[1].backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert changed == {f'transformer.h.{i}.attn.c_attn.b' for i in (0, 1)}, 'a has a gradient once b is not 0'
    assert (model(x, x)[0] - before).abs().max() > 0.01
    assert_generates(model)


def test_lora_of_peft():
    peft = pytest.importorskip('peft', reason='needs peft')
    model, x = small(bias=False), ids(3, 9)
    before = model(x, x)[0].detach()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=['c_attn'], init_lora_weights=True)).eval()
    torch.testing.assert_close(lora(x, x)[0], before)
    lora(x, x)[1].backward()
    torch.optim.SGD(lora.parameters(), lr=10.0).step()
    after = lora(x, x)[0].detach()
    assert (after - before).abs().max() > 0.01
    assert_generates(lora.get_base_model())
    merged = lora.merge_and_unload()
    assert merged is model and type(merged.transformer.h[0].attn.c_attn) is nn.Linear
    torch.testing.assert_close(merged(x, x)[0], after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('path', ['transformer.wte', 'transformer.wpe', 'transformer.h.0', 'transformer.h.0.attn',
                                  'transformer.h.1.mlp'])
def test_a_part_that_takes_x_alone(path):
    model, x = small(), ids(3, 9)
    before, (parent, _, name) = model(x, x)[0], path.rpartition('.')
    part = Scaled(model.get_submodule(path))
    setattr(model.get_submodule(parent), name, part)
    torch.testing.assert_close(model(x, x)[0], before)
    nn.init.constant_(part.scale, 0.5)
    logits, loss = model(x, x)
    assert (logits - before).abs().max() > 0.01
    loss.backward()
    assert all(p.grad.any() for p in model.parameters())
    assert_generates(model)


def test_position_embeddings_without_a_table():
    class Sines(nn.Module):
        def forward(self, positions):
            return torch.sin(positions[:, None] / torch.arange(1, 65))

    model, x, seen = small(), ids(3, 9), []
    model.transformer.wpe = Sines()
    model.transformer.wpe.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x, x)[1].backward()
    [positions] = seen
    assert torch.equal(positions, torch.sin(torch.arange(9)[:, None] / torch.arange(1, 65)))
    assert_generates(model)


def test_one_block_more():
    model, x = small(), ids(3, 9)
    before = model(x, x)[0]
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    parts = model.transformer
    h = parts.wte.weight[x] + parts.wpe.weight[:9]
    for block in (parts.h[0], parts.h[1], parts.h[2]):
        h = h + block.attn(block.ln_1(h))
        h = h + block.mlp(block.ln_2(h))
    logits = parts.ln_f(h) @ parts.wte.weight.T
    torch.testing.assert_close(model(x, x)[0], logits)
    assert (logits - before).abs().max() > 0.01
    assert_generates(model)


@pytest.mark.filterwarnings('ignore:torch.quantize_per')
def test_dynamic_quantization():
    model, x = small(), ids(3, 9)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    assert {name for name, module in quantized.named_modules()
            if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)} == linears
    logits, wanted = quantized(x, x)[0], model(x, x)[0]
    assert 0 < (logits - wanted).norm() < 0.1 * wanted.norm()
    out = quantized.generate(x, 20, temperature=0)
    assert out.shape == (3, 29) and torch.equal(out[:, :9], x)


# -- looking inside -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path, shape', [('transformer.wpe', (9, 64)), ('transformer.h.1', (3, 9, 64)),
                                         ('transformer.ln_f', (3, 9, 64))])
@pytest.mark.parametrize('targets', [None, ids(3, 9)], ids=['no targets', 'targets'])
def test_hooks_see_all_positions(path, shape, targets):
    model, seen = small(), []
    model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(ids(3, 9), targets)
    assert seen == [shape]


@torch.no_grad()
def test_embeddings_of_texts_from_a_hook():
    model, x, seen = small(), ids(3, 9), []
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: seen.append(out.mean(1)))
    model(x)
    h = model.transformer.wte(x) + model.transformer.wpe(torch.arange(9))
    for block in model.transformer.h:
        h = block(h)
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-5)
    h = h * model.transformer.ln_f.weight + model.transformer.ln_f.bias
    torch.testing.assert_close(seen, [h.mean(1)])


def test_modules_are_of_torchs_own_classes():
    kinds = Counter(type(module) for module in small(dropout=0.1).modules())
    assert [kinds[kind] for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.GELU)] == [9, 5, 2, 7, 2]


# -- dtypes and copies ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.int32, torch.uint16, torch.uint8])
def test_ids_of_other_integers(dtype):
    """uint16 is what a codec's encode() returns, and what the bins hold."""
    model, x = small(), ids(3, 9)
    y = x.to(dtype)
    assert torch.equal(model(y)[0], model(x)[0])
    assert all(map(torch.equal, model(y, y), model(x, x)))
    assert torch.equal(model.generate(y, 20, temperature=0), model.generate(x, 20, temperature=0))


def test_text_to_text_without_a_word_of_dtypes():
    chars = codec.CharCodec('abcdefghij')
    model = GPT(GPTConfig(**{**test_model.SMALL, 'vocab_size': chars.vocab_size}))
    idx = torch.from_numpy(chars.encode('badge'))[None]
    assert len(chars.decode(model.generate(idx, 7)[0].tolist())) == 12 and model(idx, idx)[1].isfinite()


def test_what_was_generated_may_be_trained_on():
    model = small()
    idx = model.generate(ids(3, 2), 9)
    model(idx, idx)[1].backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize('dropout', [np.float32(0.25), np.float64(0.25)], ids=['float32', 'float64'])
def test_numpy_numbers_in_a_config(dropout):
    config = GPTConfig(**{name: np.int64(n) for name, n in SHAPE.items()}, dropout=dropout)
    assert config == GPTConfig(**SHAPE, dropout=0.25)
    assert {type(getattr(config, name)) for name in SHAPE} == {int}
    model, x = GPT(config), ids(3, 9)
    assert math.isfinite(model(x, x)[1].item())
    assert_generates(model.eval())


@pytest.mark.parametrize('n', [np.int64(0), 2.0, '2', -1, None], ids=repr)
def test_a_size_that_is_none(n):
    with pytest.raises(ValueError) as e:
        GPTConfig(n_layer=n)
    assert e.value.args == (f'n_layer={n} must be at least 1',)


def by_pickle(model: GPT) -> GPT:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('clone', [copy.deepcopy, by_pickle])
def test_a_copy_is_a_whole_model_of_its_own(clone):
    model, x = small(), ids(3, 9)
    twin, before = clone(model), model(x, x)[0].clone()
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert torch.equal(twin(x, x)[0], before) and twin.config == model.config
    nn.init.zeros_(twin.transformer.wte.weight)
    assert torch.equal(model(x, x)[0], before)
    assert_generates(clone(model))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_another_precision(dtype):
    model, x = small(), ids(3, 9)
    wanted = model(x, x)[0].detach()
    model.to(dtype)
    logits, loss = model(x, x)
    assert logits.dtype == dtype
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}
    assert (logits - wanted).abs().max() < 0.02 * wanted.abs().max()
    if dtype == torch.float64:
        assert_generates(model)
    else:  # reading one token at a time may round otherwise
        assert model.generate(x, 20).shape == (3, 29)


# -- public names ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bias', [True, False])
def test_layer_norm(bias):
    norm, twin = LayerNorm(8, bias), LayerNorm(8, bias=bias)
    assert list(norm.state_dict()) == list(twin.state_dict()) == ['weight', 'bias'][:1 + bias]
    for p in norm.parameters():
        nn.init.normal_(p)
    x = 0.01 * torch.randn(3, 8)  # so small that eps matters
    wanted = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(norm(x), wanted + norm.bias if bias else wanted)


@torch.no_grad()
def test_a_cache_fed_by_hand():
    model, x = small(), ids(3, 16)
    caches = [KVCache(16) for _ in model.transformer.h]
    torch.testing.assert_close(model(x[:, :PROMPT], caches=caches)[0], model(x[:, :PROMPT])[0])
    for t in range(PROMPT, 16):
        logits, _ = model(x[:, t:t + 1], caches=caches)
        torch.testing.assert_close(logits, model(x[:, :t + 1])[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_takes_one_token_more():
    model, x = small(), ids(3, 7)
    caches = [KVCache(16) for _ in model.transformer.h]
    model(x[:, :PROMPT], caches=caches)
    with pytest.raises(ValueError, match='^a cache that holds 5 tokens takes one more at a time, not 2$'):
        model(x[:, PROMPT:], caches=caches)


# -- the calls of nanoGPT's scripts ---------------------------------------------------------------------------------

def updates(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """The losses of three updates of two micro-steps, under autocast."""
    scaler, losses = torch.amp.GradScaler('cpu', enabled=False), []
    for _ in range(3):
        for _ in range(2):
            with torch.autocast('cpu', torch.bfloat16):
                logits, loss = model(x, y)
                loss = loss / 2
            assert logits.shape == (*x.shape, 61)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_a_training_script():
    model_args = dict(**SHAPE, bias=False, dropout=0.0)
    model, (x, y) = GPT(GPTConfig(**model_args)), ids(2, 4, 16)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    first, _, last = updates(model, optimizer, x, y)
    assert last < first
    assert model.get_num_params() == sum(p.numel() for p in model.parameters()) - 16 * 64
    assert model.estimate_mfu(4 * 2, 0.1) == -1.0, 'the peak of a CPU is unknown'

    stored = {f'_orig_mod.{name}': p for name, p in model.state_dict().items()}
    resumed = GPT(GPTConfig(**model_args))
    resumed.load_state_dict({name[len('_orig_mod.'):]: p for name, p in stored.items()})
    assert resumed.lm_head.weight is resumed.transformer.wte.weight
    again = resumed.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
    assert updates(resumed, again, x, y) == updates(model, optimizer, x, y)


def test_fine_tuning_with_a_shorter_context():
    model, (x, y) = small(), ids(2, 4, 8)
    wanted = model(x, y)[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 64)
    assert torch.equal(model(x, y)[0], wanted)
    first, _, last = updates(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu'), x, y)
    assert last < first
    assert model.generate(x, 9).shape == (4, 17)


def test_a_sampling_script():
    model, x, samples = small(), torch.tensor([3, 1, 4])[None], []
    torch.manual_seed(1337)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        for _ in range(3):
            y = model.generate(x, 30, temperature=0.8, top_k=200)
            samples.append(y[0].tolist())
    assert all(len(sample) == 33 and sample[:3] == [3, 1, 4] and max(sample) < 61 for sample in samples)
    assert samples[0] != samples[1] != samples[2]


@pytest.mark.slow
def test_a_compiled_model():
    model, plain, (x, y) = small(), small(), ids(2, 4, 16)
    compiled = torch.compile(model)
    assert list(compiled.state_dict()) == [f'_orig_mod.{name}' for name in model.state_dict()]
    losses = [updates(net, net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu'), x, y) for net in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0][2] < losses[0][0]
    assert torch.equal(compiled.generate(x, 20, temperature=0), model.generate(x, 20, temperature=0))
