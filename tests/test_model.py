"""The network against transformers and plain formulas, its names and sizes, its optimizer, its loaders."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as model_module
from model import GPT, PUBLISHED, GPTConfig, peak_flops

SMALL = dict(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)


def small(seed: int = 0, **changes) -> GPT:
    """A tiny model in eval mode whose weights are large enough for every part of it to matter."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def ids(*shape: int, seed: int = 0, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gpt2_folder(folder, **changes):
    """A GPT-2 with random weights, biases and norms too, written by transformers; returns its model."""
    from transformers import GPT2Config, GPT2LMHeadModel
    shape = dict(vocab_size=61, n_positions=16, n_ctx=16, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(**{**shape, **changes})).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.2 * torch.randn_like(p))
    hf.save_pretrained(folder)
    return hf


# -- the function ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('activation, gelu', [('gelu_new', 'tanh'), ('gelu', 'exact')])
def test_logits_are_those_of_transformers(tmp_path, activation, gelu):
    hf = gpt2_folder(tmp_path, activation_function=activation)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    assert ours.config == GPTConfig(**SMALL, gelu=gelu)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    x = ids(3, 16)
    with torch.no_grad():
        wanted = hf(x).logits
        logits, loss = ours(x, x)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours(x[:, :9])[0], wanted[:, 8:9], rtol=0, atol=1e-4)
        assert wanted.std() > 0.5, 'a comparison of logits that are all alike proves nothing'
        other = GPT.from_state(GPTConfig(**SMALL, gelu='tanh' if gelu == 'exact' else 'exact'), ours.state_dict())
        assert (other.eval()(x, x)[0] - wanted).abs().max() > 1e-4, 'the two forms of GELU should be told apart'


def plain(net: GPT, x: torch.Tensor, p: float = 0.0) -> torch.Tensor:
    """The same network written out: dropout p on the embedding sum, the attention weights and both branches."""
    w, c = dict(net.named_parameters()), net.config
    (B, T), dropout = x.shape, nn.Dropout(p)

    def linear(x, name):
        return F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * w[f'{name}.weight'] + w.get(f'{name}.bias', 0.0)

    h = dropout(w['transformer.wte.weight'][x] + w['transformer.wpe.weight'][:T])
    for i in range(c.n_layer):
        at = f'transformer.h.{i}.'
        qkv = linear(norm(h, at + 'ln_1'), at + 'attn.c_attn').split(c.n_embd, dim=2)
        q, k, v = (t.view(B, T, c.n_head, -1).transpose(1, 2) for t in qkv)
        scores = q @ k.transpose(2, 3) / math.sqrt(c.n_embd / c.n_head)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (dropout(scores.softmax(-1)) @ v).transpose(1, 2).reshape(B, T, -1)
        h = h + dropout(linear(y, at + 'attn.c_proj'))
        z = linear(norm(h, at + 'ln_2'), at + 'mlp.c_fc')
        z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        h = h + dropout(linear(z, at + 'mlp.c_proj'))
    return norm(h, 'transformer.ln_f') @ w['transformer.wte.weight'].T


@pytest.mark.parametrize('bias', [True, False])
def test_network_is_the_formula_written_out(bias):
    net, x = small(bias=bias), ids(3, 16)
    torch.testing.assert_close(net(x, x)[0], plain(net, x), rtol=1e-5, atol=1e-5)


def test_dropout_falls_on_embeddings_attention_weights_and_both_branches():
    net, x = small(dropout=0.25).train(), ids(3, 16)
    torch.manual_seed(5)
    logits, _ = net(x, x)
    torch.manual_seed(5)  # the same masks, if they are drawn in the same places and shapes
    torch.testing.assert_close(logits, plain(net, x, 0.25), rtol=1e-4, atol=1e-4)
    net.eval()
    torch.testing.assert_close(net(x, x)[0], plain(net, x), rtol=1e-5, atol=1e-5)


def test_a_later_token_changes_nothing_before_it():
    net, x = small(), ids(1, 16)
    before = net(x, x)[0]
    for t in (1, 7, 15):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % 61
        after = net(changed, x)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 0, 'and it must reach all that follow'


def test_loss_is_the_mean_over_wanted_targets():
    net, x, y = small(), ids(3, 16), ids(3, 16, seed=1)
    y[0, 5:] = y[2, 0] = -1
    logits, loss = net(x, y)
    p = logits.detach().double().softmax(-1)
    wanted = [-math.log(p[b, t, y[b, t]]) for b in range(3) for t in range(16) if y[b, t] != -1]
    assert len(wanted) == 36
    assert loss.item() == pytest.approx(sum(wanted) / 36, rel=1e-5)


def test_forward_returns_what_is_asked_for():
    net, x = small(), ids(3, 9)
    logits, loss = net(x, x)
    assert logits.shape == (3, 9, 61) and loss.shape == ()
    last, none = net(x)
    assert last.shape == (3, 1, 61) and none is None
    torch.testing.assert_close(last[:, 0], logits[:, -1])


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match='^a sequence of 17 tokens is longer than block_size=16$'):
        small()(ids(1, 17))


# -- names, sizes, initialisation -----------------------------------------------------------------------------------

@pytest.mark.parametrize('bias', [True, False])
def test_names_and_their_order(bias):
    kinds = ['weight', 'bias'] if bias else ['weight']
    wanted = ['transformer.wte.weight', 'transformer.wpe.weight']
    for i in range(2):
        for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'):
            wanted += [f'transformer.h.{i}.{part}.{kind}' for kind in kinds]
    wanted += [f'transformer.ln_f.{kind}' for kind in kinds]
    net = small(bias=bias)
    assert [n for n, _ in net.named_parameters()] == wanted
    assert list(net.state_dict()) == [*wanted, 'lm_head.weight']


def test_input_and_output_embedding_are_one():
    net = small()
    assert net.lm_head.weight is net.transformer.wte.weight
    loaded = GPT.from_state(net.config, net.state_dict())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.parametrize('shape, millions', [
    (dict(bias=False), '123.59'),
    (dict(n_layer=6, n_head=6, n_embd=384, vocab_size=65, block_size=256, bias=False), '10.65'),
    (dict(n_layer=4, n_head=4, n_embd=128, vocab_size=65, block_size=64, bias=False), '0.80')])
def test_known_sizes(shape, millions):
    with torch.device('meta'):
        net = GPT(GPTConfig(**shape))
    assert f'{net.get_num_params() / 1e6:.2f}' == millions
    assert net.get_num_params(False) == net.get_num_params() + net.config.block_size * net.config.n_embd
    assert net.get_num_params(False) == sum(v.numel() for k, v in net.state_dict().items() if k != 'lm_head.weight')


def test_initial_weights():
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=256))
    for name, p in net.named_parameters():
        if name.endswith('bias'):
            assert not p.any(), name
        elif p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
            assert p.abs().max() > 3.5 * std, f'{name} is not normal'


def test_a_fresh_model_knows_nothing():
    torch.manual_seed(0)
    net, x = GPT(GPTConfig(**SMALL)), ids(8, 16)
    assert net(x, ids(8, 16, seed=1))[1].item() == pytest.approx(math.log(61), abs=0.05)


def test_crop_block_size():
    net, x = small(), ids(2, 8)
    names, before = list(net.state_dict()), net(x, x)[0]
    net.crop_block_size(8)
    assert net.config.block_size == 8 and net.transformer.wpe.weight.shape == (8, 32)
    assert list(net.state_dict()) == names
    assert torch.equal(net(x, x)[0], before)
    assert net.transformer.wpe.weight.requires_grad
    with pytest.raises(ValueError, match='longer than block_size=8'):
        net(ids(1, 9))
    with pytest.raises(ValueError, match="^block_size=9 is more than the model's 8 positions$"):
        net.crop_block_size(9)


@pytest.mark.parametrize('changes, message', [
    (dict(block_size=0), 'block_size=0 must be at least 1'),
    (dict(vocab_size=-1), 'vocab_size=-1 must be at least 1'),
    (dict(n_layer=0), 'n_layer=0 must be at least 1'),
    (dict(n_head=0), 'n_head=0 must be at least 1'),
    (dict(n_head=5, n_embd=32), 'n_embd=32 must be a multiple of n_head=5'),
    (dict(dropout=1.0), 'dropout=1.0 must lie in [0, 1)'),
    (dict(dropout=-0.1), 'dropout=-0.1 must lie in [0, 1)'),
    (dict(dropout=math.nan), 'dropout=nan must lie in [0, 1)'),
    (dict(gelu='relu'), 'gelu=relu must be exact or tanh')])
def test_config_rules(changes, message):
    with pytest.raises(ValueError) as e:
        GPTConfig(**changes)
    assert e.value.args == (message,)


def test_config_names_all_problems_at_once_and_keeps_its_defaults():
    with pytest.raises(ValueError) as e:
        GPTConfig(n_layer=0, n_head=5, n_embd=32, dropout=2)
    assert len(e.value.args) == 3
    assert vars(GPTConfig()) == dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768,
                                     dropout=0.0, bias=True, gelu='exact')


# -- optimizer, FLOPs -----------------------------------------------------------------------------------------------

def test_optimizer_groups():
    net = small()
    optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')
    assert isinstance(optimizer, torch.optim.AdamW)
    matrices, vectors = optimizer.param_groups
    named = [p for _, p in net.named_parameters()]
    for group, wanted, decay in ((matrices, [p for p in named if p.dim() >= 2], 0.1),
                                 (vectors, [p for p in named if p.dim() < 2], 0.0)):
        assert [id(p) for p in group['params']] == [id(p) for p in wanted]
        assert (group['weight_decay'], group['lr'], group['betas'], group['eps']) == (decay, 6e-4, (0.9, 0.95), 1e-8)


def test_two_updates_are_adamw():
    net = small()
    lr, (b1, b2), decay, eps = 1e-2, (0.8, 0.9), 0.3, 1e-8
    optimizer = net.configure_optimizers(decay, lr, (b1, b2), 'cpu')
    wanted = {n: p.detach().double().clone() for n, p in net.named_parameters()}
    m, v = ({n: torch.zeros_like(p) for n, p in wanted.items()} for _ in range(2))
    for t in (1, 2):
        for seed, (name, p) in enumerate(net.named_parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + seed))
            g = p.grad.double()
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            if p.dim() >= 2:
                wanted[name] = wanted[name] * (1 - lr * decay)
            wanted[name] = wanted[name] - lr * (m[name] / (1 - b1 ** t)) / ((v[name] / (1 - b2 ** t)).sqrt() + eps)
        optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach().double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_flops_are_those_that_published_figures_count():
    with torch.device('meta'):
        net = GPT(GPTConfig(bias=False))
    assert net.flops_per_token() == 6 * 123_587_328 + 12 * 12 * 768 * 1024
    net.crop_block_size(256)
    assert net.flops_per_token() == 6 * 123_587_328 + 12 * 12 * 768 * 256


def test_mfu(monkeypatch):
    net = small()
    assert net.estimate_mfu(4, 0.5) == -1.0, 'the peak of a CPU is unknown'
    monkeypatch.setattr(model_module, 'peak_flops', lambda device: 2e9)
    assert net.estimate_mfu(4, 0.5) == pytest.approx(net.flops_per_token() * 16 * 4 / 0.5 / 2e9)


@pytest.mark.parametrize('name, tflops', [
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA A100-PCIE-40GB', 312), ('NVIDIA A10', 125), ('NVIDIA A10G', 70),
    ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 NVL', 835), ('NVIDIA H200', 989),
    ('NVIDIA H200 NVL', 835), ('NVIDIA B200', 2250), ('NVIDIA L4', 121), ('NVIDIA L40', 181), ('NVIDIA L40S', 362),
    ('Tesla T4', 65), ('Tesla V100-SXM2-16GB', 125), ('AMD Instinct MI300X', 1307),
    ('NVIDIA GeForce RTX 3090', 71), ('NVIDIA GeForce RTX 3090 Ti', 80), ('NVIDIA GeForce RTX 4090', 165),
    ('NVIDIA GeForce RTX 4070 Ti', 80), ('NVIDIA GeForce RTX 4070 Ti SUPER', 88),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA GeForce GTX 1080', None), ('Quadro K4000', None)])
def test_peak_flops(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert peak_flops(torch.device('cuda')) == (tflops and tflops * 1e12)
    assert peak_flops(torch.device('cpu')) is None


# -- loading --------------------------------------------------------------------------------------------------------

def test_from_state_gives_the_same_model():
    net, x = small(), ids(2, 16)
    for state in (net.state_dict(),
                  *({f'{prefix}{k}': v for k, v in net.state_dict().items()} for prefix in (
                      '_orig_mod.', 'module.', '_orig_mod.module.', 'module._orig_mod.')),
                  {**net.state_dict(), **{f'transformer.h.{i}.attn.bias': torch.ones(1, 1, 16, 16) for i in (0, 1)}},
                  {**net.state_dict(), 'transformer.h.0.attn.masked_bias': torch.tensor(-1e4)},
                  {**net.state_dict(), 'transformer.h.1.mlp.c_fc.norm.weight': torch.ones(32)},  # as fast.py once did
                  {k: v for k, v in net.state_dict().items() if k != 'lm_head.weight'}):
        loaded = GPT.from_state(net.config, state).eval()
        assert list(loaded.state_dict()) == list(net.state_dict())
        assert torch.equal(loaded(x, x)[0], net(x, x)[0])


def test_from_state_keeps_biases_of_attention():
    net = small()
    loaded = GPT.from_state(net.config, net.state_dict())
    assert torch.equal(loaded.transformer.h[1].attn.c_attn.bias, net.transformer.h[1].attn.c_attn.bias)


def test_from_state_reads_half_precision_as_float32():
    loaded = GPT.from_state(GPTConfig(**SMALL), {k: v.bfloat16() for k, v in small().state_dict().items()})
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


FC, LN = 'transformer.h.1.mlp.c_fc.weight', 'transformer.ln_f.weight'


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop(FC), f'{FC} is missing'),
    (lambda s: s.update(extra=torch.ones(1)), 'extra is not a tensor of this model'),
    (lambda s: s.update({FC: s[FC].T}), f'{FC} is (32, 128), the model needs (128, 32)'),
    (lambda s: (s.pop(FC), s.update(extra=torch.ones(1), **{LN: torch.ones(33)})),
     f'{FC} is missing; extra is not a tensor of this model; {LN} is (33,), the model needs (32,)'),
    (lambda s: [s.pop(k) for k in list(s) if '.h.1.ln_' in k or '.h.1.attn.c_attn' in k],
     'transformer.h.1.ln_1.weight is missing; transformer.h.1.ln_1.bias is missing; '
     'transformer.h.1.attn.c_attn.weight is missing; and 3 more')])
def test_from_state_names_what_does_not_fit(change, message):
    state = dict(small().state_dict())
    change(state)
    with pytest.raises(ValueError) as e:
        GPT.from_state(GPTConfig(**SMALL), state)
    assert e.value.args == (f'the weights do not fit the model: {message}',)


def test_from_state_without_an_embedding():
    state = {k: v for k, v in small().state_dict().items() if 'wte' not in k and 'lm_head' not in k}
    with pytest.raises(ValueError, match='transformer.wte.weight is missing'):
        GPT.from_state(GPTConfig(**SMALL), state)


def test_from_checkpoint():
    args, net, x = {**SMALL, 'bias': True, 'dropout': 0.1}, small(), ids(2, 16)
    loaded = GPT.from_checkpoint({'model_args': args, 'model': net.state_dict()})
    assert loaded.config == GPTConfig(**args) and args['dropout'] == 0.1
    assert torch.equal(loaded.eval()(x, x)[0], net(x, x)[0])
    tanh = GPT.from_checkpoint({'model_args': args, 'model': net.state_dict(), 'gelu': 'tanh'}, dropout=0.3)
    assert tanh.config == GPTConfig(**{**args, 'dropout': 0.3}, gelu='tanh')
    assert tanh.transformer.h[0].attn.attn_dropout.p == 0.3


@pytest.mark.parametrize('change', [dict(gelu='exact'), dict(n_head=None)])
def test_from_checkpoint_wants_exactly_seven_arguments(change):
    args = {**SMALL, 'bias': True, 'dropout': 0.0, **change}
    args = {k: v for k, v in args.items() if v is not None}
    with pytest.raises(ValueError) as e:
        GPT.from_checkpoint({'model_args': args, 'model': small().state_dict()})
    names = ['bias', 'block_size', 'dropout', 'n_embd', 'n_head', 'n_layer', 'vocab_size']
    assert e.value.args == (f'model_args should hold {names}; it holds {sorted(args)}',)


def test_from_pretrained_overrides_dropout_only(tmp_path):
    gpt2_folder(tmp_path)
    assert GPT.from_pretrained(str(tmp_path), {'dropout': 0.2}).config.dropout == 0.2
    with pytest.raises(ValueError, match=r"^only dropout can be overridden, not \['bias'\]$"):
        GPT.from_pretrained(str(tmp_path), {'bias': False, 'dropout': 0.2})


@pytest.mark.parametrize('changes', [
    dict(n_inner=64), dict(layer_norm_epsilon=1e-6), dict(scale_attn_weights=False),
    dict(scale_attn_by_inverse_layer_idx=True), dict(activation_function='relu'), dict(tie_word_embeddings=False),
    dict(add_cross_attention=True)], ids=lambda changes: next(iter(changes)))
def test_from_pretrained_refuses_what_is_no_plain_gpt2(tmp_path, changes):
    gpt2_folder(tmp_path, **changes)
    with pytest.raises(ValueError):
        GPT.from_pretrained(str(tmp_path))


def test_from_pretrained_refuses_other_folders(tmp_path):
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(str(tmp_path))
    assert e.value.args == (f'{tmp_path} is none of {", ".join(PUBLISHED)} and no folder with config.json',)
    with pytest.raises(ValueError, match='^gpt3 is none of gpt2, gpt2-medium, gpt2-large, gpt2-xl and no folder'):
        GPT.from_pretrained('gpt3')


def test_from_pretrained_refuses_another_architecture(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('change', [lambda s: s.pop('transformer.h.1.mlp.c_fc.weight'),
                                    lambda s: s.update({'transformer.h.2.ln_1.weight': torch.ones(32)}),
                                    lambda s: s.update({'transformer.ln_f.weight': torch.ones(33)})],
                         ids=['missing', 'extra', 'misshapen'])
def test_from_pretrained_refuses_weights_that_do_not_fit(tmp_path, change):
    """Rather than train on with whatever a tensor that is not in the file happened to be initialised to."""
    from safetensors.torch import load_file, save_file
    gpt2_folder(tmp_path)
    path = tmp_path / 'model.safetensors'
    state = load_file(path)
    change(state)
    save_file(state, path, {'format': 'pt'})
    with pytest.raises(ValueError):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('damage', ['weights', 'weights cut', 'config'])
def test_from_pretrained_of_an_incomplete_folder(tmp_path, damage):
    gpt2_folder(tmp_path)
    if damage == 'weights':
        os.remove(tmp_path / 'model.safetensors')
    elif damage == 'weights cut':
        os.truncate(tmp_path / 'model.safetensors', 1000)
    else:
        (tmp_path / 'config.json').write_text('{"model_type": ')
    with pytest.raises(ValueError):
        GPT.from_pretrained(str(tmp_path))


def test_a_base_model_without_head_is_a_gpt2_too(tmp_path):
    from transformers import GPT2Model
    hf = gpt2_folder(tmp_path / 'head')
    hf.transformer.save_pretrained(tmp_path / 'base')
    assert json.loads((tmp_path / 'base' / 'config.json').read_text())['architectures'] == [GPT2Model.__name__]
    states = [GPT.from_pretrained(str(tmp_path / name)).state_dict() for name in ('head', 'base')]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))


def test_the_layout_of_the_published_files_is_read(tmp_path):
    """Names without `transformer.`, and the attention masks among the tensors."""
    from safetensors.torch import load_file, save_file
    gpt2_folder(tmp_path)
    wanted, path = GPT.from_pretrained(str(tmp_path)).state_dict(), tmp_path / 'model.safetensors'
    state = {k.removeprefix('transformer.'): v for k, v in load_file(path).items()}
    assert 'wte.weight' in state and 'lm_head.weight' not in state
    state |= {f'h.{i}.attn.bias': torch.ones(1, 1, 16, 16).tril() for i in (0, 1)}
    save_file(state, path, {'format': 'pt'})
    loaded = GPT.from_pretrained(str(tmp_path)).state_dict()
    assert list(loaded) == list(wanted) and all(torch.equal(loaded[k], wanted[k]) for k in wanted)
