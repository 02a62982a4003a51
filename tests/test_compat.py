"""
Old files keep working, and ours work for their readers. The files are written here by hand, as the original did:
raw bins without bins.json, a pickled meta.pkl, a ckpt.pt of a compiled model with the state of a plain AdamW.
"""

import copy
import os
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.bins import Bins
from model import GPT

from .conftest import TINY, flags

CHARS = '\n abcdefgh'
ARGS = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=len(CHARS), dropout=0.0)
MODEL_ARGS = ['n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout']


def shapes(n_layer, n_embd, block_size, bias, vocab_size, **_) -> dict[str, tuple]:
    """Name and shape of every parameter, in registration order; lm_head.weight, tied to wte, is not one of them."""
    C = n_embd
    table = {'transformer.wte.weight': (vocab_size, C), 'transformer.wpe.weight': (block_size, C)}
    for i in range(n_layer):
        for name, shape in (('ln_1', (C,)), ('attn.c_attn', (3 * C, C)), ('attn.c_proj', (C, C)), ('ln_2', (C,)),
                            ('mlp.c_fc', (4 * C, C)), ('mlp.c_proj', (C, 4 * C))):
            table[f'transformer.h.{i}.{name}.weight'] = shape
            if bias:
                table[f'transformer.h.{i}.{name}.bias'] = shape[:1]
    table['transformer.ln_f.weight'] = (C,)
    if bias:
        table['transformer.ln_f.bias'] = (C,)
    return table


def adamw(parameters: list, **options) -> torch.optim.AdamW:
    """The optimizer of the original: what has two dimensions or more decays, the rest does not."""
    groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': 0.1},
              {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **options)


def write_dataset(folder, chars: str | None = CHARS, protocol: int = 4) -> str:
    """Bins of 3,000 tokens without bins.json; with a meta.pkl, or without characters in GPT-2's ids."""
    folder.mkdir()
    rng = random.Random(0)
    for split in ('train', 'val'):
        size = len(chars) if chars else 50257
        ids = [i * i % size if i % 5 else rng.randrange(size) for i in range(3000)]
        np.array(ids, dtype=np.uint16).tofile(folder / f'{split}.bin')
    if chars:
        meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
        with open(folder / 'meta.pkl', 'wb') as f:
            pickle.dump(meta, f, protocol=protocol)
    return str(folder)


def write_checkpoint(out_dir, dataset: str, prefix: str = '_orig_mod.', iter_num: int = 40, **more):
    """A ckpt.pt as the original wrote it; returns it, with its parameters and the optimizer that made the state."""
    args = {k: more.pop(k, ARGS[k]) for k in MODEL_ARGS}
    torch.manual_seed(3)
    parameters = {name: torch.nn.Parameter(torch.randn(shape) * 0.02 + (name.split('.')[-2][:2] == 'ln'))
                  for name, shape in shapes(**args).items()}
    optimizer = adamw(list(parameters.values()))
    for _ in range(3):
        for p in parameters.values():
            p.grad = torch.randn_like(p) * 0.1
        optimizer.step()
    model = {prefix + name: p.detach() for name, p in parameters.items()}
    model[f'{prefix}lm_head.weight'] = model[f'{prefix}transformer.wte.weight']
    config = {'out_dir': 'out', 'eval_interval': 2000, 'eval_only': False, 'init_from': 'scratch', 'dataset': dataset,
              'gradient_accumulation_steps': 2, 'batch_size': 4, 'block_size': 16, 'learning_rate': 1e-3,
              'backend': 'nccl', 'device': 'cuda', 'dtype': 'float16', 'compile': True}
    checkpoint = {'model': model, 'optimizer': copy.deepcopy(optimizer.state_dict()), 'model_args': args,
                  'iter_num': iter_num, 'best_val_loss': torch.tensor(2.75), 'config': config, **more}
    out_dir.mkdir()
    torch.save(checkpoint, out_dir / 'ckpt.pt')
    return SimpleNamespace(checkpoint=checkpoint, parameters=parameters, optimizer=optimizer)


@pytest.fixture
def execute(script, capsys):
    """execute('train.py', **options) runs a script and returns what it printed, its exit code and its names."""
    torch.set_num_threads(1)

    def run(name: str, **options):
        capsys.readouterr()
        code, names = 0, {}
        try:
            names = script(name, *flags(**options))
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(out=out, err=err, code=code, names=names)
    return run


@pytest.fixture
def old(tmp_path):
    """old(**more) writes a dataset and a checkpoint of the original and returns all that is known of them."""
    def write(**more):
        dataset = write_dataset(tmp_path / 'words')
        written = write_checkpoint(tmp_path / 'out', dataset, **more)
        written.options = {**TINY, 'dataset': dataset, 'out_dir': tmp_path / 'out', 'init_from': 'resume'}
        written.out_dir, written.iter_num = tmp_path / 'out', written.checkpoint['iter_num']
        return written
    return write


# -- old datasets ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_bins_without_an_index_and_a_meta_of_any_protocol(tmp_path, protocol):
    bins = Bins(write_dataset(tmp_path / 'words', protocol=protocol), 16)
    assert (bins.tokenizer, bins.vocab_size) == ('char', 10) and bins.state['chars'] == CHARS
    assert {split: len(tokens) for split, tokens in bins.tokens.items()} == {'train': 3000, 'val': 3000}
    raw = np.fromfile(tmp_path / 'words' / 'train.bin', np.uint16)
    assert np.array_equal(bins.tokens['train'], raw)


def test_training_on_old_characters(execute, tmp_path):
    done = execute('train.py', **{**TINY, 'max_iters': 2, 'dataset': write_dataset(tmp_path / 'words'),
                                  'out_dir': tmp_path / 'out'})
    assert done.code == 0 and done.names['model_args']['vocab_size'] == 10
    assert sorted(os.listdir(tmp_path / 'words')) == ['meta.pkl', 'train.bin', 'val.bin']  # left as they were


def test_bins_without_a_meta_hold_gpt2_tokens(execute, tmp_path):
    done = execute('train.py', **{**TINY, 'max_iters': 1, 'n_embd': 8, 'dataset': write_dataset(tmp_path / 'bpe', None),
                                  'out_dir': tmp_path / 'out'})
    assert done.code == 0 and done.names['model_args']['vocab_size'] == 50304


# -- old checkpoints ------------------------------------------------------------------------------------------------

OLD = {
    'compiled': {},
    'eager': {'prefix': ''},
    'biases': {'bias': True},
    'number as best_val_loss': {'best_val_loss': 2.75},
}


@pytest.mark.parametrize('more', OLD.values(), ids=OLD)
def test_an_old_checkpoint_is_resumed(execute, old, more):
    written = old(**more)
    done = execute('train.py', **{**written.options, 'max_iters': 41})
    assert done.code == 0, done.err
    assert 'iter 40: loss ' in done.out and 'step 40: ' in done.out and 'step 41: ' in done.out
    assert done.names['best_val_loss'] <= 2.75 and type(done.names['best_val_loss']) is float
    saved = torch.load(written.out_dir / 'ckpt.pt', weights_only=True)
    assert saved['iter_num'] == 41 and saved['model_args'] == written.checkpoint['model_args']


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('step_is_a_number', [False, True])
def test_the_next_update_is_the_one_that_a_plain_adamw_would_do(execute, old, bias, step_is_a_number):
    """Moments and step counts reach their own parameters; files of torch < 1.12 hold `step` as an int."""
    written = old(bias=bias)
    if step_is_a_number:
        for state in written.checkpoint['optimizer']['state'].values():
            state['step'] = int(state['step'])
        torch.save(written.checkpoint, written.out_dir / 'ckpt.pt')
    done = execute('train.py', **{**written.options, 'max_iters': 41, 'decay_lr': False, 'grad_clip': 0.0})
    assert done.code == 0, done.err

    model = GPT.from_checkpoint(copy.deepcopy(written.checkpoint))
    data = Bins(written.options['dataset'], 16)
    for row in range(2):
        (model(*data.train_batch(1337, 40, row, 2, 4))[1] / 2).backward()
    for name, p in model.named_parameters():
        written.parameters[name].grad = p.grad
    written.optimizer.step()
    now = dict(done.names['raw_model'].named_parameters())
    assert list(now) == list(written.parameters)
    for name, p in written.parameters.items():
        torch.testing.assert_close(now[name].detach(), p.detach(), rtol=1e-5, atol=1e-6)


def test_stored_attention_masks_are_dropped(execute, old):
    """Files of torch < 2.0 hold them."""
    written = old()
    mask = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    for i in range(2):
        written.checkpoint['model'][f'_orig_mod.transformer.h.{i}.attn.bias'] = mask
    torch.save(written.checkpoint, written.out_dir / 'ckpt.pt')
    done = execute('train.py', **{**written.options, 'eval_only': True})
    assert done.code == 0 and 'step 40: ' in done.out


def test_the_loss_of_an_old_checkpoint_is_its_own(execute, old):
    """With the exact GELU that these files were trained with, on the same evaluation sequences."""
    written = old()
    done = execute('train.py', **{**written.options, 'eval_only': True, 'eval_iters': 1})
    state = {k.removeprefix('_orig_mod.'): v for k, v in written.checkpoint['model'].items()}
    for split in ('train', 'val'):
        [(x, y, n)] = Bins(written.options['dataset'], 16).eval_batches(split, 4, 4)
        assert f'{split} loss {forward(state, x, y, n_layer=2, n_head=2):.4f}' in done.out and n == 4


def forward(w: dict, x: torch.Tensor, y: torch.Tensor, n_layer: int, n_head: int) -> float:
    """The loss of a GPT without biases, written out from its weights."""
    def norm(t, name):
        t = t - t.mean(-1, keepdim=True)
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f'transformer.{name}.weight']

    (B, T), C = x.shape, w['transformer.wte.weight'].size(1)
    h = w['transformer.wte.weight'][x] + w['transformer.wpe.weight'][:T]
    for i in range(n_layer):
        block = f'transformer.h.{i}.'
        qkv = norm(h, f'h.{i}.ln_1') @ w[f'{block}attn.c_attn.weight'].T
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in qkv.split(C, dim=2))
        scores = (q @ k.transpose(2, 3) / (C // n_head) ** 0.5).masked_fill(~torch.ones(T, T).tril().bool(), -1e30)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C) @ w[f'{block}attn.c_proj.weight'].T
        wide = norm(h, f'h.{i}.ln_2') @ w[f'{block}mlp.c_fc.weight'].T
        h = h + wide * (1 + torch.erf(wide / 2 ** 0.5)) / 2 @ w[f'{block}mlp.c_proj.weight'].T
    logits = norm(h, 'ln_f') @ w['lm_head.weight'].T
    return -logits.log_softmax(-1).gather(2, y[:, :, None]).mean().item()


def test_an_old_checkpoint_is_sampled_with_the_characters_of_its_dataset(execute, old):
    written = old()
    done = execute('sample.py', out_dir=written.out_dir, device='cpu', dtype='float32', start='abc', num_samples=2,
                   max_new_tokens=30)
    assert done.code == 0 and f'{written.out_dir}/ckpt.pt: 40 updates\n' in done.out
    *samples, rest = done.out.split('updates\n')[1].split('\n---------------\n')
    assert len(samples) == 2 and rest == ''
    assert all(len(s) == 33 and s.startswith('abc') and set(s) <= set(CHARS) for s in samples)


def test_the_machine_of_the_old_run_need_not_be_here(execute, old):
    """device='cuda', dtype='float16', backend='nccl' are in the file's config; this run's own options count."""
    done = execute('train.py', **{**old().options, 'max_iters': 41})
    assert done.code == 0 and 'device cpu, dtype float32' in done.out
    assert 'resumed with device=cpu, it was cuda\n' in done.out
    assert 'resumed with dtype=float32, it was float16\n' in done.out


# -- our checkpoints, under the original's rules --------------------------------------------------------------------

@pytest.fixture(params=[False, True], ids=['no bias', 'bias'])
def ours(request, execute, dataset, tmp_path):
    """A checkpoint of train.py, as torch reads it, and the folder it stands in."""
    done = execute('train.py', **{**TINY, 'max_iters': 4, 'bias': request.param, 'dropout': 0.1, 'dataset': dataset,
                                  'out_dir': tmp_path / 'out', 'decay_lr': False})
    assert done.code == 0
    return SimpleNamespace(saved=torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True), dataset=dataset,
                           bias=request.param, path=tmp_path / 'out' / 'ckpt.pt', options=done.names['config'])


def test_the_top_level_is_what_the_original_reads(ours):
    saved = ours.saved
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(saved)
    assert saved['model_args'] == dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=ours.bias, vocab_size=11,
                                       dropout=0.1)  # an eighth would break it
    assert type(saved['iter_num']) is int and saved['iter_num'] == 4
    assert type(saved['best_val_loss']) is float and 0 < saved['best_val_loss'] < 3
    assert saved['config'] == ours.options and saved['config']['dataset'] == ours.dataset
    assert all(type(v) in (bool, int, float, str) for v in saved['config'].values())


def test_the_state_dict_has_the_original_s_names_in_their_order(ours):
    table = shapes(**ours.saved['model_args'])
    state = ours.saved['model']
    assert list(state) == [*table, 'lm_head.weight']
    assert {k: tuple(v.shape) for k, v in state.items()} == {**table, 'lm_head.weight': (11, 32)}
    assert all(v.dtype == torch.float32 and v.device.type == 'cpu' and type(v) is torch.Tensor for v in state.values())
    assert state['lm_head.weight'].data_ptr() == state['transformer.wte.weight'].data_ptr()


def test_the_optimizer_state_fits_a_plain_adamw(ours):
    parameters = [torch.nn.Parameter(ours.saved['model'][name].clone()) for name in shapes(**ours.saved['model_args'])]
    stored = ours.saved['optimizer']
    decay, rest = stored['param_groups']
    matrices = sum(p.dim() >= 2 for p in parameters)
    assert decay['params'] == [*range(matrices)] and rest['params'] == [*range(matrices, len(parameters))]
    assert (decay['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    optimizer = adamw(parameters, fused=False)
    optimizer.load_state_dict(stored)
    for p in parameters:
        state = optimizer.state[p]
        assert state['exp_avg'].shape == state['exp_avg_sq'].shape == p.shape and float(state['step']) == 4
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_a_plain_adamw_goes_on_as_we_would(ours, execute):
    """The original, resumed from our file, does the update that we do."""
    parameters = {name: torch.nn.Parameter(ours.saved['model'][name].clone())
                  for name in shapes(**ours.saved['model_args'])}
    model = GPT.from_checkpoint(torch.load(ours.path, weights_only=True), dropout=0.0)
    data = Bins(ours.dataset, 16)
    for row in range(2):
        (model(*data.train_batch(1337, 4, row, 2, 4))[1] / 2).backward()
    optimizer = adamw(list(parameters.values()))
    optimizer.load_state_dict(ours.saved['optimizer'])
    for name, p in model.named_parameters():
        parameters[name].grad = p.grad
    optimizer.step()
    done = execute('train.py', **{**TINY, 'init_from': 'resume', 'max_iters': 5, 'dataset': ours.dataset,
                                  'out_dir': ours.path.parent, 'decay_lr': False, 'grad_clip': 0.0})
    assert done.code == 0
    for name, p in done.names['raw_model'].named_parameters():
        torch.testing.assert_close(p.detach(), parameters[name].detach(), rtol=1e-5, atol=1e-6)
