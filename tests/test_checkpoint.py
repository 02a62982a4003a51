"""data/checkpoint.py: what is saved comes back, and nothing else ever loads."""

import argparse
import errno
import math
import os
import pickle
import random
import re
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from data import DataError
from data import checkpoint as ckpt

from .conftest import ROOT, save


def example(iter_num: int = 5) -> dict:
    """A checkpoint in miniature, with every type that a real one holds."""
    generator = torch.Generator().manual_seed(iter_num)
    weight = torch.randn(6, 4, generator=generator)
    return {
        'model': {'transformer.wte.weight': weight, 'lm_head.weight': weight, 'half': weight.bfloat16()},
        'optimizer': {'state': {0: {'step': torch.tensor(5.0), 'exp_avg': torch.zeros(6, 4)}},
                      'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.95), 'fused': None, 'params': [0]}]},
        'model_args': {'n_layer': 1, 'bias': False, 'dropout': 0.0}, 'iter_num': iter_num, 'best_val_loss': 1.5,
        'config': {'out_dir': 'résumé', 'compile': False}, 'codec': {'tokenizer': 'char', 'chars': '\n ab\U0001f600'}}


def same(a, b) -> bool:
    """Equal in type, structure and every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def refusal(path) -> str:
    """The message with which a file is refused."""
    with pytest.raises(DataError) as caught:
        ckpt.load(str(path))
    assert str(path) in str(caught.value) and 'weights_only' not in str(caught.value)
    return str(caught.value)


def test_a_file_in_the_format_before_torch_1_6(tmp_path):
    torch.save(example(), tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=False)
    assert refusal(tmp_path / 'ckpt.pt').endswith(' bytes) is damaged or not a checkpoint')


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / 'ckpt.pt').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n')
    assert refusal(tmp_path / 'ckpt.pt').endswith('; it is a pointer of git-lfs: run git lfs pull')


def test_a_name_that_is_no_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b'/\xe9t\xe9')
    os.mkdir(folder)
    save(f'{folder}/ckpt.pt', example())
    assert same(ckpt.load(f'{folder}/ckpt.pt', mmap=True), ckpt.load(f'{folder}/ckpt.pt'))


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_disk_that_cannot_sync_a_folder(tmp_path, monkeypatch, number):
    """As some network disks; there is none here, so that its system call has to be played."""
    def fsync(fd, real=os.fsync):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, 'fsync', fsync)
    save(str(tmp_path / 'ckpt.pt'), example())
    assert same(ckpt.load(str(tmp_path / 'ckpt.pt')), example())


def test_weights_that_are_infinite_are_refused(tmp_path):
    checkpoint = example()
    checkpoint['model']['lm_head.weight'].view(-1)[1] = -math.inf
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    assert 'transformer.wte.weight holds NaN or infinity' in refusal(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('before, now, said', [
    ({'train': 'a'}, {'train': 'b'}, True), ({'train': 'a'}, {'train': 'a'}, False),
    (None, {'train': 'b'}, False), ({'train': 'a'}, {}, False), ({'train': 'a'}, {'train': 'sampled b'}, False),
    ({'train': 'sampled a'}, {'train': 'sampled b'}, True)])
def test_another_text_is_a_difference_where_both_are_known(before, now, said):
    checkpoint = {**example(), **({'data': before} if before else {})}
    lines = ckpt.differences(checkpoint, {**checkpoint['config'], 'dataset': 'd'}, now)
    assert ('resumed on another text: dataset=d has other sha256 sums than before' in lines) == said


def test_what_is_saved_comes_back(tmp_path):
    path = str(tmp_path / 'ckpt.pt')
    save(path, example())
    assert same(ckpt.load(path), example())
    save(path, example(6))
    assert same(ckpt.load(path), example(6)) and not same(ckpt.load(path), example(5))
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_a_bare_file_name_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save('ckpt.pt', example())
    assert same(ckpt.load('ckpt.pt'), example())


def test_tied_tensors_are_stored_once(tmp_path):
    path = str(tmp_path / 'ckpt.pt')
    save(path, example())
    model = ckpt.load(path)['model']
    assert model['lm_head.weight'].data_ptr() == model['transformer.wte.weight'].data_ptr()


# -- damaged files --------------------------------------------------------------------------------------------------

DAMAGE = {
    'empty': lambda raw: b'',
    'one byte': lambda raw: raw[:1],
    'half': lambda raw: raw[:len(raw) // 2],
    'a byte short': lambda raw: raw[:-1],
    'start lost': lambda raw: raw[100:],
    'zeroed': lambda raw: bytes(len(raw)),
    'zeros at the end': lambda raw: raw[:len(raw) // 2] + bytes(len(raw) - len(raw) // 2),
    'a page of zeros': lambda raw: raw[:1000] + bytes(512) + raw[1512:],
    'text': lambda raw: b'<html>404</html>' * 40,
    'a bare pickle': lambda raw: pickle.dumps({'model': {}, 'model_args': {}, 'iter_num': 1}),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_named_with_the_size_and_the_other_file(tmp_path, damage):
    path, spare = tmp_path / 'ckpt.pt', tmp_path / 'last.pt'
    save(str(path), example())
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    message = refusal(path)
    assert 'damaged' in message and f'({path.stat().st_size:,} bytes)' in message and 'last.pt' not in message
    save(str(spare), example(7))
    assert str(spare) in refusal(path)
    with pytest.raises(DataError, match='ckpt.pt .*damaged'):  # the sound file is not taken in silence
        ckpt.newest(str(tmp_path))


def test_a_directory_in_its_place(tmp_path):
    (tmp_path / 'ckpt.pt').mkdir()
    assert 'damaged or not a checkpoint' in refusal(tmp_path / 'ckpt.pt')
    with pytest.raises(DataError, match='ckpt.pt'):
        ckpt.newest(str(tmp_path))


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w') as z:
        z.writestr('readme.txt', 'hello')
    assert 'not a checkpoint' in refusal(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('content, named', [
    ([1, 2], 'not a checkpoint'), (torch.zeros(3), 'not a checkpoint'), ({}, 'model missing, model_args missing'),
    ({'model': {}, 'iter_num': 1}, 'model_args missing'),
    ({**example(), 'more': torch.eye(3).to_sparse()}, 'not a checkpoint'),
    ({**example(), 'more': torch.zeros(3, device='meta')}, 'not a checkpoint'),
    ({**example(), 'more': {(1, 2): 3}}, 'not a checkpoint'), ({**example(), 'more': {1, 2}}, 'not a checkpoint'),
    ({**example(), 'more': np.float64(1)}, 'holds numpy scalars, which could run code and is not loaded: load it'),
    ({**example(), 'more': argparse.Namespace(a=1)}, 'holds argparse.Namespace, which could run code'),
    ({**example(), 'more': torch.zeros(1).expand(4)}, 'not a checkpoint'),
    ({**example(), 'more': torch.zeros(9).as_strided((4, 4), (1, 1))}, 'not a checkpoint'),
    ({**example(), 'more': torch.zeros(2, dtype=torch.complex64)}, 'not a checkpoint'),
    ({**example(), 'more': torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, 'not a checkpoint')],
    ids=['list', 'tensor', 'empty', 'no model_args', 'sparse', 'meta', 'tuple key', 'set', 'numpy', 'namespace',
         'expanded', 'overlapping', 'complex', 'quantized'])
def test_other_contents_are_no_checkpoint(tmp_path, content, named):
    torch.save(content, tmp_path / 'ckpt.pt')
    assert named in refusal(tmp_path / 'ckpt.pt')


def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save(str(path), example())
    raw, rng = path.read_bytes(), random.Random(0)
    places = rng.sample(range(8 * len(raw)), 1200)
    places += range(8 * (len(raw) - 22), 8 * len(raw), 3)  # the end record
    with zipfile.ZipFile(path) as z:  # of every member: the header, the first bytes, and the entry in the directory
        for info in z.infolist():
            places += range(8 * info.header_offset, 8 * (info.header_offset + 30), 11)
        places += range(8 * z.start_dir, 8 * (z.start_dir + 100), 5)
    refused = 0
    for place in places:
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            loaded = ckpt.load(str(path))
        except DataError as e:
            assert 'damaged' in str(e) or 'not a checkpoint' in str(e)
            refused += 1
        else:
            assert same(loaded, example()), f'bit {place} of {8 * len(raw)} was let through'
    assert refused > len(places) / 4


def test_every_bit_of_a_tensor_counts(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save(str(path), example())
    raw = path.read_bytes()
    start = raw.index(example()['model']['lm_head.weight'].numpy().tobytes())
    for place in range(8 * start, 8 * (start + 96)):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert 'damaged: its tensors do not match' in refusal(path)


def test_mapped_from_the_file(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save(str(path), example())
    loaded = ckpt.load(str(path), mmap=True)
    assert same(loaded, example())
    if os.path.exists('/proc/self/maps'):
        with open('/proc/self/maps', encoding='utf-8') as f:
            assert str(path) in f.read()
    raw = bytearray(path.read_bytes())
    raw[raw.index(example()['model']['lm_head.weight'].numpy().tobytes())] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match='do not match their checksums'):
        ckpt.load(str(path), mmap=True)


class Payload:
    """Unpickled, it would create a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    marker, path = tmp_path / 'ran', tmp_path / 'ckpt.pt'
    torch.save({**example(), 'more': Payload(marker)}, path)
    assert 'which could run code and is not loaded' in refusal(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the payload does work


# -- saving where it cannot be done ---------------------------------------------------------------------------------

SAVE_UNDER_A_LIMIT = """
import resource, sys
from data import checkpoint as ckpt
import torch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with ckpt.saving(sys.argv[1], {'model': {'w': torch.ones(int(sys.argv[2]))}, 'model_args': {}, 'iter_num': 6}):
    pass
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='no RLIMIT_FSIZE')
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save(str(path), example())
    before = path.read_bytes()
    done = subprocess.run([sys.executable, '-c', SAVE_UNDER_A_LIMIT, str(path), '1000000'], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert re.fullmatch(rf'{re.escape(str(path))} could not be written \(.*File too large\); the one that stood there '
                        r'is intact: free some space or choose another --out_dir\n', done.stderr), done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['ckpt.pt']


@pytest.mark.parametrize('wrong', [dict(best_val_loss=[1]), dict(best_val_loss=None), dict(best_val_loss=torch.ones(2)),
                                   dict(model={1: torch.ones(2)}), dict(iter_num=-5), dict(iter_num=True),
                                   dict(iter_num=10**30), dict(best_val_loss=10**400),
                                   dict(model_args={3: 4})], ids=str)
def test_a_value_of_another_kind(tmp_path, wrong):
    torch.save({**example(), **wrong}, tmp_path / 'ckpt.pt')
    assert f'cannot be used: {next(iter(wrong))} of another type' in refusal(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('size, value', [('n_layer', 10**6), ('n_layer', 4), ('n_head', 1 << 40), ('n_embd', 1 << 40),
                                         ('block_size', 10**12), ('vocab_size', 10**30)])
def test_sizes_that_no_tensors_are_there_for(tmp_path, size, value):
    """Before anything is built: a million layers would take minutes."""
    torch.save({**example(), 'model_args': {size: value}}, tmp_path / 'ckpt.pt')
    assert f'{size}={value}, but its 3 tensors hold 72 numbers' in refusal(tmp_path / 'ckpt.pt')


def test_weights_in_a_format_that_torch_cannot_compute_with(tmp_path):
    checkpoint = example()
    checkpoint['model'] = {name: weight.to(torch.float8_e4m3fn) for name, weight in checkpoint['model'].items()}
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    assert refusal(tmp_path / 'ckpt.pt').endswith('is damaged or not a checkpoint (NotImplementedError)')


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_integers_are_refused(tmp_path, dtype):
    """But for the masks that the original keeps beside its weights."""
    checkpoint = example()
    checkpoint['model'] |= {'h.0.attn.bias': torch.ones(3, 3, dtype=dtype)}
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    ckpt.load(str(tmp_path / 'ckpt.pt'))
    checkpoint['model'] |= {'h.0.mlp.bias': torch.ones(3, dtype=dtype)}
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    assert f'h.0.mlp.bias holds {dtype}' in refusal(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('dtype, fits', [(torch.float64, True), (torch.bfloat16, True), (torch.int64, False)], ids=str)
def test_moments_are_floats_of_any_width(dtype, fits):
    p = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([p])
    state = {'state': {0: {'step': torch.tensor(3.0), 'exp_avg': torch.ones(2, dtype=dtype),
                           'exp_avg_sq': torch.ones(2, dtype=dtype)}}}
    if fits:
        ckpt.restore(optimizer, torch.amp.GradScaler('cpu', enabled=False), {'optimizer': state})
        assert optimizer.state[p]['exp_avg'].dtype == torch.float32 and optimizer.state[p]['exp_avg'].tolist() == [1, 1]
    else:
        assert ckpt.misfit(optimizer, state) == (
            'exp_avg of parameter 0 is (2,) of torch.int64, the model needs (2,) of float32')


def test_moments_of_a_parameter_too_many_name_it():
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True) for _ in range(11)])
    moments = {'step': 1, 'exp_avg': torch.zeros(2), 'exp_avg_sq': torch.zeros(2)}
    assert ckpt.misfit(optimizer, {'state': dict.fromkeys(range(12), moments)}) == 'parameter 11 is unknown'


@pytest.mark.parametrize('step, fits', [(torch.tensor(3.0), True), (3, True), (torch.zeros(3), False), ('foo', False),
                                        (torch.tensor(math.nan), False), (-1, False), (None, False)], ids=str)
def test_the_step_of_an_optimizer_state(step, fits):
    p = torch.nn.Parameter(torch.ones(2))
    state = {'state': {0: {'step': step, 'exp_avg': torch.zeros(2), 'exp_avg_sq': torch.zeros(2)}}}
    assert ckpt.misfit(torch.optim.AdamW([p]), state) == (None if fits else f'step of parameter 0 is {step}')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
@pytest.mark.parametrize('size', [10, 1_000_000])
def test_no_space_left_on_the_device(tmp_path, size):
    path = tmp_path / 'ckpt.pt'
    checkpoint = {**example(), 'more': torch.ones(size)}
    for old in (False, True):
        if old:
            save(str(path), example())
        os.symlink('/dev/full', f'{path}.tmp')
        with pytest.raises(DataError, match=r'could not be written \(.*No space left') as caught:
            save(str(path), checkpoint)
        assert ('is intact' in str(caught.value)) == old
        assert os.listdir(tmp_path) == (['ckpt.pt'] if old else [])
    assert same(ckpt.load(str(path)), example())


def test_no_folder_to_save_to(tmp_path):
    with pytest.raises(DataError, match='could not be written'):
        save(str(tmp_path / 'gone' / 'ckpt.pt'), example())


# -- the files of a run ---------------------------------------------------------------------------------------------

def test_newest_is_the_one_further_on(tmp_path):
    best, last = str(tmp_path / 'ckpt.pt'), str(tmp_path / 'last.pt')
    assert ckpt.newest(str(tmp_path)) is None and ckpt.newest(str(tmp_path / 'gone')) is None
    save(last, example(4))
    assert ckpt.newest(str(tmp_path))['iter_num'] == 4
    save(best, example(8))
    assert ckpt.newest(str(tmp_path))['iter_num'] == 8
    save(last, example(12))
    assert ckpt.newest(str(tmp_path))['iter_num'] == 12
