"""What stands on disk, what is refused and in which words, and the batches drawn from it."""

import hashlib
import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from data import DataError, bins
from data.bins import Bins
from data.codec import BPECodec, CharCodec

from .conftest import ROOT

ALPHABET = CharCodec(''.join(map(chr, range(32, 1032))))  # 1,000 characters


def counting(folder, train: int = 1000, val: int = 200, tokenizer=ALPHABET) -> str:
    """A dataset in which token i of each split is i, so that a batch shows where it was taken from."""
    bins.write(str(folder), tokenizer, train=[np.arange(train)], val=[np.arange(val)])
    return str(folder)


def legacy(folder, train, val, vocab_size: int | None = None) -> str:
    """A folder as older scripts leave it: bins, meta.pkl for characters, and nothing else."""
    for split, ids in (('train', train), ('val', val)):
        np.array(ids, '<u2').tofile(folder / f'{split}.bin')
    if vocab_size:
        (folder / 'meta.pkl').write_bytes(pickle.dumps(CharCodec(ALPHABET.chars[:vocab_size]).meta()))
    return str(folder)


def refusal(folder, block_size: int = 8) -> str:
    with pytest.raises(DataError) as e:
        Bins(str(folder), block_size)
    return str(e.value)


OTHERWISE = '; or, if another program wrote the file, remove bins.json'


def edit_index(folder, **changes) -> None:
    path = os.path.join(folder, 'bins.json')
    with open(path, encoding='utf-8') as f:
        index = json.load(f)
    with open(path, 'w', encoding='utf-8') as f:
        json.dump({**index, **changes}, f)


# -- writing --------------------------------------------------------------------------------------------------------

def test_format_on_disk(tmp_path):
    tokenizer = CharCodec('ab')
    index = bins.write(str(tmp_path), tokenizer, train=[np.array([0, 1]), np.array([1], np.uint16)],
                       val=iter([np.array([], np.uint16), np.array([1, 0])]))
    assert sorted(os.listdir(tmp_path)) == ['bins.json', 'meta.pkl', 'train.bin', 'val.bin']
    assert (tmp_path / 'train.bin').read_bytes() == b'\0\0\1\0\1\0'
    assert (tmp_path / 'val.bin').read_bytes() == b'\1\0\0\0'
    assert pickle.loads((tmp_path / 'meta.pkl').read_bytes()) == {
        'vocab_size': 2, 'itos': {0: 'a', 1: 'b'}, 'stoi': {'a': 0, 'b': 1}}
    stored = json.loads((tmp_path / 'bins.json').read_text(encoding='utf-8'))
    assert stored == {
        'finished': True, 'tokenizer': 'char', 'vocab_size': 2, 'dtype': 'uint16', 'meta_sha256': stored['meta_sha256'],
        'splits': {
            'train': {'tokens': 3, 'sha256': hashlib.sha256(b'\0\0\1\0\1\0').hexdigest()},
            'val': {'tokens': 2, 'sha256': hashlib.sha256(b'\1\0\0\0').hexdigest()}}}
    assert stored['meta_sha256'] == hashlib.sha256((tmp_path / 'meta.pkl').read_bytes()).hexdigest()
    assert index == stored


def test_gpt2_bins_have_no_meta(tmp_path):
    counting(tmp_path)
    assert (tmp_path / 'meta.pkl').exists()
    counting(tmp_path, tokenizer=BPECodec())
    assert sorted(os.listdir(tmp_path)) == ['bins.json', 'train.bin', 'val.bin']
    data = Bins(str(tmp_path), 8)
    assert (data.tokenizer, data.vocab_size, data.state) == ('gpt2', 50257, {'tokenizer': 'gpt2'})
    assert np.array_equal(np.fromfile(tmp_path / 'train.bin', '<u2'), np.arange(1000))


@pytest.mark.parametrize('vocab_size, dtype, width', [(65536, 'uint16', 2), (65537, 'uint32', 4), (70000, 'uint32', 4)])
def test_large_vocabularies_are_written_wider_and_never_wrapped(tmp_path, vocab_size, dtype, width):
    chars = CharCodec(''.join(map(chr, [*range(0xd800), *range(0xe000, 0x20000)]))[:vocab_size])
    ids = chars.encode(chars.chars[-3000:])
    bins.write(str(tmp_path), chars, train=[ids], val=[ids])
    assert json.loads((tmp_path / 'bins.json').read_text())['dtype'] == dtype
    raw = (tmp_path / 'train.bin').read_bytes()
    assert len(raw) == 3000 * width and int.from_bytes(raw[-width:], 'little') == vocab_size - 1
    data = Bins(str(tmp_path), 8)
    assert data.vocab_size == vocab_size and data.state == chars.state()
    x, y = data.train_batch(0, 0, 0, 1, 4)
    assert x.dtype == torch.int64 and x.min() >= vocab_size - 3000 and (y == x + 1).all()


@pytest.mark.parametrize('ids', [[0, 2], [70000], [-1], [0, -65535]], ids=str)
def test_ids_outside_the_vocabulary_are_not_written(tmp_path, ids):
    with pytest.raises(DataError, match='token id '):
        bins.write(str(tmp_path), CharCodec('ab'), train=[np.array(ids)], val=[np.array([0])])
    assert refusal(tmp_path) == (f'{tmp_path} is unfinished, what prepared it was interrupted: '
                                 f'run python data/prepare.py {tmp_path} YOUR_TEXT again')


def test_report(tmp_path, capsys):
    index = bins.write(str(tmp_path), CharCodec('ab'), train=[np.zeros(1234, np.uint16)], val=[np.array([1])])
    bins.report(index, 1235)
    sha = {split: entry['sha256'] for split, entry in index['splits'].items()}
    assert capsys.readouterr().out.splitlines() == [
        'length of the text in characters: 1,235', 'tokenizer char, vocabulary 2',
        f'train has 1,234 tokens, sha256 {sha["train"]}', f'val has 1 tokens, sha256 {sha["val"]}']
    bins.report(index, None, sha)
    with pytest.raises(DataError, match=f'^val.bin should have sha256 {"0" * 64}: the tokenizer is another one$'):
        bins.report(index, None, {**sha, 'val': '0' * 64})


# -- opening --------------------------------------------------------------------------------------------------------

def test_opened(tmp_path):
    data = Bins(counting(tmp_path), 8)
    assert (data.tokenizer, data.vocab_size, data.state) == ('char', 1000, ALPHABET.state())
    assert {split: len(tokens) for split, tokens in data.tokens.items()} == {'train': 1000, 'val': 200}
    with pytest.raises(ValueError, match='read-only'):
        data.tokens['train'][0] = 1


def test_a_folder_without_bins_json_is_opened_on_its_files(tmp_path):
    data = Bins(legacy(tmp_path, range(100), range(50), vocab_size=100), 8)
    assert (data.tokenizer, data.vocab_size, len(data.tokens['train'])) == ('char', 100, 100)
    assert data.digests['train'].startswith('sampled 200 ') and data.digests['val'].startswith('sampled 100 ')
    (tmp_path / 'other').mkdir()
    other = Bins(legacy(tmp_path / 'other', range(99, -1, -1), range(50), vocab_size=100), 8).digests
    assert other['train'] != data.digests['train'] and other['val'] == data.digests['val']
    os.remove(tmp_path / 'meta.pkl')
    data = Bins(str(tmp_path), 8)
    assert (data.tokenizer, data.vocab_size, data.state) == ('gpt2', 50257, {'tokenizer': 'gpt2'})


@pytest.mark.parametrize('where', ['', 'x', '/nowhere'])
def test_no_such_dataset(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as e:
        Bins(where or 'x/y', 8)
    assert str(e.value) == f'dataset {where or "x/y"} is neither a folder in data/ nor a path to one'


def test_a_folder_below_the_working_directory_is_named_shortly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.remove(os.path.join(counting(tmp_path / 'my_words'), 'val.bin'))
    for name in ('my_words', str(tmp_path / 'my_words')):
        assert refusal(name) == f'my_words/val.bin is missing: run python data/prepare.py {name} YOUR_TEXT'


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('old', [False, True])
def test_missing_odd_and_short_bins(tmp_path, split, old):
    if old:
        legacy(tmp_path, range(100), range(100), vocab_size=100)
    else:
        counting(tmp_path, 100, 100)
    path, again = tmp_path / f'{split}.bin', f'run python data/prepare.py {tmp_path} YOUR_TEXT'
    os.truncate(path, 199)
    assert refusal(tmp_path) == f'{path} is damaged, 199 bytes are no multiple of 2: {again} again'
    os.remove(path)
    assert refusal(tmp_path) == f'{path} is missing: {again}'
    path.touch()
    short = f'{path} has 0 tokens; block_size=8 needs 9: take a smaller --block_size or more text'
    assert refusal(tmp_path) == (short if old else f'{path} has 0 tokens, bins.json says 100: {again} again{OTHERWISE}')


def test_a_split_must_hold_one_sequence_and_its_targets(tmp_path):
    counting(tmp_path, 1000, 200)
    data = Bins(str(tmp_path), 199)
    x, y, _ = next(data.eval_batches('val', 1, 1))
    assert x[0].tolist() == list(range(199)) and y[0].tolist() == list(range(1, 200))
    assert refusal(tmp_path, 200) == (f'{tmp_path}/val.bin has 200 tokens; block_size=200 needs 201: '
                                      'take a smaller --block_size or more text')
    assert refusal(tmp_path, 1024) == (f'{tmp_path}/train.bin has 1,000 tokens; block_size=1024 needs 1,025: '
                                       'take a smaller --block_size or more text')


def test_another_number_of_tokens_than_bins_json_says(tmp_path):
    counting(tmp_path)
    with open(tmp_path / 'val.bin', 'ab') as f:
        f.write(b'\0\0')
    assert refusal(tmp_path) == (f'{tmp_path}/val.bin has 201 tokens, bins.json says 200: '
                                 f'run python data/prepare.py {tmp_path} YOUR_TEXT again{OTHERWISE}')
    os.truncate(tmp_path / 'val.bin', 398)
    assert refusal(tmp_path).startswith(f'{tmp_path}/val.bin has 199 tokens, bins.json says 200: ')


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'meta.pkl'])
def test_a_flipped_bit(tmp_path, name):
    raw = bytearray((tmp_path / counting(tmp_path) / name).read_bytes())
    for bit in (0, 8 * len(raw) // 2 + 3, 8 * len(raw) - 1):
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(flipped)
        assert refusal(tmp_path) == (
            f'{tmp_path}/{name} is not the file that bins.json describes'
            f'{"" if name == "meta.pkl" else " (sha256 differs)"}: run python data/prepare.py {tmp_path} YOUR_TEXT '
            f'again{OTHERWISE}')
    (tmp_path / name).write_bytes(raw)
    Bins(str(tmp_path), 8)


def test_meta_that_is_missing_or_of_another_dataset(tmp_path):
    again = f'run python data/prepare.py {tmp_path} YOUR_TEXT again'
    counting(tmp_path)
    os.remove(tmp_path / 'meta.pkl')
    assert refusal(tmp_path) == f'{tmp_path}/meta.pkl is missing: {again}'
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(CharCodec('abc').meta()))
    edit_index(tmp_path, meta_sha256=None)
    assert refusal(tmp_path) == f'{tmp_path}/meta.pkl has 3 tokens, not 1000: {again}'
    (tmp_path / 'meta.pkl').write_bytes(b'')
    assert refusal(tmp_path).startswith(f'{tmp_path}/meta.pkl cannot be read (ValueError')


@pytest.mark.parametrize('content', ['', '{', 'null', '[]', '7', '{}', '{"finished": true}', '[' * 100_000, '\udcff'],
                         ids=lambda text: ascii(text[:20]))
def test_bins_json_that_is_none(tmp_path, content):
    counting(tmp_path)
    (tmp_path / 'bins.json').write_bytes(content.encode('utf-8', 'surrogateescape'))
    assert refusal(tmp_path).startswith(f'{tmp_path}/bins.json ')
    assert refusal(tmp_path).endswith(f': run python data/prepare.py {tmp_path} YOUR_TEXT again')


@pytest.mark.parametrize('changes', [
    {'tokenizer': 'bert'}, {'tokenizer': ['gpt2']}, {'dtype': 'int64'}, {'dtype': []}, {'vocab_size': '65'},
    {'vocab_size': 0}, {'vocab_size': True}, {'splits': {}}, {'splits': None}, {'splits': {'train': {}, 'val': {}}},
    {'splits': {'train': {'tokens': 1.0, 'sha256': ''}, 'val': {'tokens': 1, 'sha256': ''}}},
    {'splits': {'train': {'tokens': 1, 'sha256': ''}}}], ids=str)
def test_bins_json_with_wrong_values(tmp_path, changes):
    counting(tmp_path)
    edit_index(tmp_path, **changes)
    assert refusal(tmp_path) == (f'{tmp_path}/bins.json is damaged: run python data/prepare.py {tmp_path} YOUR_TEXT '
                                 'again')


@pytest.mark.parametrize('finished', [False, None, 0, 1, 'yes'])
def test_an_unfinished_dataset(tmp_path, finished):
    counting(tmp_path)
    edit_index(tmp_path, finished=finished)
    assert refusal(tmp_path) == (f'{tmp_path} is unfinished, what prepared it was interrupted: '
                                 f'run python data/prepare.py {tmp_path} YOUR_TEXT again')


def test_a_half_written_folder_of_an_older_script(tmp_path):
    legacy(tmp_path, range(100), range(100), vocab_size=100)
    (tmp_path / 'notes.tmp').touch()
    Bins(str(tmp_path), 8)
    (tmp_path / 'val.bin.tmp').touch()
    assert refusal(tmp_path) == (f'{tmp_path} is half-written (it holds .tmp files): run python data/prepare.py '
                                 f'{tmp_path} YOUR_TEXT')


# -- killed ---------------------------------------------------------------------------------------------------------

PREPARE = '''
import os, sys, time
sys.path.insert(0, os.environ['REPO'])
import numpy as np
from data import bins, codec

def halves():
    yield np.arange(500)
    if os.environ.get('HANG'):
        print('half-way', flush=True)
        time.sleep(100)
    yield np.arange(500)

tokenizer = codec.CharCodec(''.join(map(chr, range(32, 1032))))
bins.write(os.path.dirname(os.path.abspath(__file__)), tokenizer, train=halves(), val=[np.arange(200)])
'''


def test_prepare_killed_half_way_then_train_then_prepare_again(tmp_path, monkeypatch):
    counting(tmp_path, 300)
    (tmp_path / 'prepare.py').write_text(PREPARE, encoding='utf-8')
    process = subprocess.Popen([sys.executable, str(tmp_path / 'prepare.py')], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, 'REPO': ROOT, 'HANG': '1'})
    try:
        assert process.stdout.readline() == 'half-way\n'
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert refusal(tmp_path) == (f'{tmp_path} is unfinished, what prepared it was interrupted: '
                                 f'run python {tmp_path}/prepare.py again')
    monkeypatch.setenv('REPO', ROOT)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    runpy.run_path(str(tmp_path / 'prepare.py'))
    assert len(Bins(str(tmp_path), 8).tokens['train']) == 1000
    assert sorted(os.listdir(tmp_path)) == ['bins.json', 'meta.pkl', 'prepare.py', 'train.bin', 'val.bin']


@pytest.mark.parametrize('error', [DataError('line 7 is no JSON'), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_what_fails_before_it_is_complete_leaves_the_dataset_that_stood_there(tmp_path, error):
    def ids():
        yield np.arange(50)
        raise error

    counting(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(type(error)):
        bins.write(str(tmp_path), BPECodec(), train=ids(), val=ids())
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert len(Bins(str(tmp_path), 8).tokens['train']) == 1000


def test_a_path_that_begins_with_a_dot_is_a_path(tmp_path, monkeypatch):
    counting(tmp_path / 'data')
    monkeypatch.chdir(tmp_path / 'data')
    assert len(Bins('.', 8).tokens['train']) == len(Bins('../data', 8).tokens['train']) == 1000


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('before', ['nothing', 'an older dataset', 'a finished dataset'])
def test_killed_at_every_step_of_writing_a_dataset_is_old_or_refused_or_new(tmp_path, before):
    """A child that kills itself at its n-th fsync, replace or remove, over what stood there, for every n."""
    def files(folder):
        return {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    old, new = tmp_path / 'old', tmp_path / 'new'
    old.mkdir()
    if before == 'an older dataset':
        legacy(old, range(300), range(100), vocab_size=300)
    elif before == 'a finished dataset':
        counting(old, 300, 100)
    counting(new, 400, 90, BPECodec())
    seen, n, status = [], 0, None
    while status != 0:
        folder = tmp_path / str(n)
        shutil.copytree(old, folder)
        if (child := os.fork()) == 0:
            left, code = n, 1

            def lethal(function):
                def call(*args):
                    nonlocal left
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
                    return function(*args)
                return call

            try:
                os.fsync, os.replace, os.remove = map(lethal, (os.fsync, os.replace, os.remove))
                counting(folder, 400, 90, BPECodec())
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        try:
            data = Bins(str(folder), 8)
            seen.append({300: 'old', 400: 'new'}[len(data.tokens['train'])])
            wanted = files(old if seen[-1] == 'old' else new)
            assert {name: raw for name, raw in files(folder).items() if not name.endswith(('.tmp', '.lock'))} == wanted
        except DataError as e:
            assert 'is unfinished, what prepared it was interrupted' in str(e) or 'is half-written' in str(e)
            seen.append('refused')
        if n % 3 == 0:  # whatever is left, another prepare starts clean
            counting(folder, 400, 90, BPECodec())
            assert files(folder) == files(new)
        n += 1
    assert seen == sorted(seen, key=['old', 'refused', 'new'].index)
    assert seen.count('old') == (2 if before == 'a finished dataset' else 0) and seen.count('refused') >= 5


# -- batches --------------------------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path):
    return Bins(counting(tmp_path), 8)


def test_y_is_x_shifted_by_one(data):
    for x, y in [data.train_batch(0, 3, 1, 4, 50), *((x, y) for x, y, _ in data.eval_batches('val', 100, 50))]:
        assert x.shape == y.shape == (50, 8) and x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        assert (x[:, 1:] == x[:, :-1] + 1).all() and (y == x + 1).all()


def test_every_place_can_be_drawn_and_none_beyond(tmp_path):
    data = Bins(counting(tmp_path, 12, 12), 8)
    starts = data.train_batch(0, 0, 0, 1, 400)[0][:, 0]
    counts = torch.bincount(starts)
    assert len(counts) == 4 and counts.min() > 60, '12 tokens hold 4 sequences of 8 and a target'


def test_draw_is_philox_and_stays_so():
    """Frozen: with other numbers an old run could not be resumed. Philox4x64-10 by its definition, from counter 1."""
    key = [int.from_bytes(hashlib.sha256(b'a/1').digest()[i:i + 8], 'little') for i in (0, 8)]
    counter, mask = [1, 0, 0, 0], (1 << 64) - 1
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(b >> 64) ^ counter[1] ^ key[0], b & mask, (a >> 64) ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    assert bins.draw(4, 'a', 1).tolist() == counter
    assert counter == [12100088058179327416, 5170796255665330153, 12553712230274732644, 2353875406743864497]
    assert bins.draw(2, 'a', 1).tolist() == counter[:2]


def test_train_batch_is_a_function_of_seed_step_and_row(data):
    assert data.train_batch(1337, 7, 1, 3, 4)[0][:, 0].tolist() == [794, 851, 908, 652], 'old runs cannot be resumed'
    for _ in range(2):  # whatever was drawn before, from here or from any other generator
        np.random.seed(0)
        torch.manual_seed(0)
        list(data.eval_batches('train', 10, 5))
        data.train_batch(1337, 8, 1, 3, 4)
        assert data.train_batch(1337, 7, 1, 3, 4)[0][:, 0].tolist() == [794, 851, 908, 652]
    assert data.train_batch(1337, 7, 0, 3, 4)[0][:, 0].tolist() == [881, 243, 893, 670]
    assert data.train_batch(1338, 7, 1, 3, 4)[0][:, 0].tolist() == [285, 142, 25, 753]


def test_drawing_leaves_other_generators_alone(data):
    torch.manual_seed(0)
    np.random.seed(0)
    wanted = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    data.train_batch(0, 0, 0, 1, 4)
    list(data.eval_batches('val', 4, 2))
    assert torch.equal(torch.rand(3), wanted[0]) and np.array_equal(np.random.rand(3), wanted[1])


def test_the_rows_of_a_step_are_the_same_on_any_split_of_processes(data):
    whole = data.train_batch(1, 2, 0, 1, 24)  # one process, one micro-step
    for rows in (2, 8, 24):
        for world_size in (w for w in (1, 2, 4, 8) if rows % w == 0):
            places = {m * world_size + rank: data.train_batch(1, 2, m * world_size + rank, rows, 24 // rows)
                      for rank in range(world_size) for m in range(rows // world_size)}
            for i in (0, 1):
                assert torch.equal(torch.cat([places[row][i] for row in range(rows)]), whole[i])


def eval_rows(data, split, count, batch_size, world_size):
    """The sequences that count, put together again from all ranks; checks the padding on the way."""
    rows = {}
    for rank in range(world_size):
        mine = []
        for x, y, n in data.eval_batches(split, count, batch_size, rank, world_size):
            assert x.shape == y.shape == (batch_size, data.block_size) and 0 <= n <= batch_size
            assert (y[:n] == x[:n] + 1).all() and (n == 0 or (y[n:] == -1).all())
            mine += x[:n].tolist()
        rows.update({rank + world_size * i: row for i, row in enumerate(mine)})
    assert sorted(rows) == list(range(count)), 'the shares are disjoint and complete'
    return [rows[j] for j in range(count)]


def test_evaluation_is_the_same_for_any_batch_size_and_world_size(data):
    wanted = eval_rows(data, 'val', 13, 1, 1)
    for batch_size in (1, 2, 5, 13, 16):
        for world_size in (1, 2, 3, 8, 16):
            assert eval_rows(data, 'val', 13, batch_size, world_size) == wanted
    assert eval_rows(data, 'val', 20, 4, 2)[:13] == wanted
    assert eval_rows(Bins(data.folder, 8), 'val', 13, 4, 2) == wanted


def test_evaluation_sequences_stay_as_they_are(data):
    assert [row[0] for row in eval_rows(data, 'train', 5, 2, 1)] == [625, 836, 971, 700, 434]
    assert [row[0] for row in eval_rows(data, 'val', 5, 2, 1)] == [
        int(r) % 192 for r in bins.draw(5, 'eval', 'val').tolist()]


def test_a_file_cut_while_it_is_read_is_an_error_not_a_signal(tmp_path):
    """Cut and restored by another thread as fast as it can, so also between any two steps of drawing."""
    folder = counting(tmp_path, train=50_000, tokenizer=BPECodec())
    path = os.path.join(folder, 'train.bin')
    script = """if True:
        import itertools, os, sys, threading
        from data import DataError, bins
        path, size = os.path.join(sys.argv[1], 'train.bin'), 100_000
        data, done, said = bins.Bins(sys.argv[1], 64), False, set()

        def cut():
            while not done:
                os.truncate(path, 1000)
                os.truncate(path, size)

        thread = threading.Thread(target=cut)
        thread.start()
        for step in itertools.count():
            try:
                data.train_batch(1, step, 0, 1, 32)
            except DataError as e:
                said.add(str(e))
            if said and step > 500:
                break
        done = True
        print(*sorted(said), sep=chr(10))"""
    ran = subprocess.run([sys.executable, '-c', script, folder], cwd=ROOT, capture_output=True, text=True)
    said = f'{path} was cut short while it was read: run python data/prepare.py {folder} YOUR_TEXT again'
    assert (ran.returncode, ran.stderr) == (0, ''), ran.stderr
    assert ran.stdout.splitlines() == [said]


@pytest.mark.parametrize('dtype', [None, 'uint32'])
def test_an_id_outside_the_vocabulary_is_named_when_drawn(tmp_path, dtype):
    ids = np.zeros(100, np.int64)
    ids[57] = 65535
    legacy(tmp_path, ids, ids, vocab_size=10)
    if dtype:
        ids[57] = 1 << 31
        for split in ('train', 'val'):
            ids.astype('<u4').tofile(tmp_path / f'{split}.bin')
        entry = {'tokens': 100, 'sha256': ''}
        (tmp_path / 'bins.json').write_text(json.dumps({
            'finished': True, 'tokenizer': 'char', 'vocab_size': 10, 'dtype': dtype, 'meta_sha256': None,
            'splits': {'train': entry, 'val': entry}}))
    data = Bins(str(tmp_path), 8)
    for split, batches in (('train', lambda: data.train_batch(0, 0, 0, 1, 200)),
                           ('val', lambda: list(data.eval_batches('val', 200, 200)))):
        with pytest.raises(DataError) as e:
            batches()
        assert str(e.value) == (f'{tmp_path}/{split}.bin holds token id {ids[57]} at offset 57; vocab_size is 10: '
                                f'run python data/prepare.py {tmp_path} YOUR_TEXT again')


def test_ids_up_to_the_vocabulary_are_fine(tmp_path):
    data = Bins(legacy(tmp_path, [9] * 100, [9] * 100, vocab_size=10), 8)
    assert (data.train_batch(0, 0, 0, 1, 4)[0] == 9).all()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
@pytest.mark.parametrize('name', ['train.bin', 'meta.pkl'])
def test_a_full_disk_while_preparing(tmp_path, name):
    chars = CharCodec.of('abc')
    os.symlink('/dev/full', tmp_path / f'{name}.tmp')
    with pytest.raises(DataError, match=r'could not be written \(No space left on device\): free some space'):
        bins.write(str(tmp_path), chars, train=[chars.encode('abc' * 9000)], val=[chars.encode('cab' * 9000)])
    assert os.listdir(tmp_path) == ['bins.json'] and not json.loads((tmp_path / 'bins.json').read_text())['finished']


@pytest.mark.parametrize('dtype, header', [('<i4', b''), ('<i8', b''), ('<u2', b'\x93NUMPY\x01\x00'),
                                           ('<u2', np.array([20240520, 1], '<i4').tobytes())],
                         ids=['int32', 'int64', 'npy', "llm.c's header"])
def test_token_ids_of_another_type_are_not_read_as_others(tmp_path, dtype, header):
    """Without bins.json nothing says what a file holds. Read as uint16, every second id would be 0: a low loss."""
    for split in ('train', 'val'):
        (tmp_path / f'{split}.bin').write_bytes(header + np.arange(1, 3001).astype(dtype).tobytes())
    with pytest.raises(DataError, match=r'train\.bin does not look like uint16 token ids: int32 or int64, or'):
        Bins(str(tmp_path), 8)


def test_ids_that_are_0_are_uint16_too(tmp_path):
    legacy(tmp_path, [0, 1] * 300, [1, 0, 2] * 100, vocab_size=300)
    assert Bins(str(tmp_path), 8).tokens['train'][1] == 1
