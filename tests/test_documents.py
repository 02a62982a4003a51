"""data/documents.py and data/prepare.py: anyone's texts become the same bins, by any number of processes."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import DataError, bins, codec
from data import documents as docs
from data.prepare import prepare
from tests.conftest import ROOT, TINY, flags, run
from tests.test_prepare import need_gpt2

PREPARE = os.path.join(ROOT, 'data', 'prepare.py')
WORDS = ['apple', 'naïve', '世界', "don't", '\n\n', '  ', '<|endoftext|>', '2026', '\U0001f600', '\t', '\r\n']


def text(n: int, seed: int = 0) -> str:
    return ' '.join(random.Random(seed).choices(WORDS, k=n))


def tokens(folder) -> dict[str, list[int]]:
    found = bins.Bins(str(folder), 1).tokens
    return {split: ids.tolist() for split, ids in found.items()}


def whole(path) -> str:
    return ''.join(part for part, _, _ in docs._texts(str(path)))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that texts of a few kB come in many."""
    monkeypatch.setattr(docs, 'PIECE', 1000)


# -- plain text -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('raw, wanted', [
    ('naïve\n'.encode(), 'naïve\n'), (b'a\r\nb\n', 'a\nb\n'), (b'a\rb\r', 'a\rb\r'), (b'', ''),
    (b'\xef\xbb\xbfa', 'a'), (b'a\xef\xbb\xbf', 'a\ufeff'), (b'x' * 999 + b'\r\ny' * 999, 'x' * 999 + '\ny' * 999),
    ('世'.encode() * 5000, '世' * 5000), (b' ' * 5000 + b'a', ' ' * 5000 + 'a')], ids=range(9))
def test_a_text_file(tmp_path, raw, wanted):
    (tmp_path / 'a.txt').write_bytes(raw)
    assert whole(tmp_path / 'a.txt') == wanted


@pytest.mark.parametrize('raw, byte, offset', [
    (b'ab\xffcd', 'ff', '2'), (b'x' * 12345 + b'\xe9t\xe9', 'e9', '12,345'), (b'ab\xc3', 'c3', '2'),
    (b'\xef\xbb\xbfab\xffcd', 'ff', '5'), ('世'.encode() * 3000 + b'\xe4\xb8', 'e4', '9,000')],
    ids=['byte', 'far', 'cut', 'after a byte order mark', 'cut far'])
def test_text_that_is_not_utf8_names_the_byte(tmp_path, raw, byte, offset):
    path = tmp_path / 'input.txt'
    path.write_bytes(raw)
    with pytest.raises(DataError) as e:
        whole(path)
    assert str(e.value) == f'{path} is not UTF-8 (byte 0x{byte} at offset {offset}): convert it'


@pytest.mark.parametrize('packed', ['', '.gz', '.zst'])
@pytest.mark.parametrize('tokenizer', ['char', 'gpt2'])
def test_one_file_is_cut_by_characters(tmp_path, tokenizer, packed):
    """In many pieces, the ids of the whole."""
    if tokenizer == 'gpt2':
        need_gpt2()
    content, path = text(9000), tmp_path / f'my.txt{packed}'
    pack = {'': bytes, '.gz': gzip.compress, '.zst': lambda raw: pa.compress(raw, 'zstd', asbytes=True)}[packed]
    path.write_bytes(pack(content.encode()))
    index = prepare(str(tmp_path / 'mine'), [str(path)], tokenizer, num_proc=1)
    content = content.replace('\r\n', '\n')
    cut, codes = int(0.9 * len(content)), codec.CharCodec.of(content) if tokenizer == 'char' else codec.BPECodec()
    assert tokens(tmp_path / 'mine') == {'train': codes.encode(content[:cut]).tolist(),
                                         'val': codes.encode(content[cut:]).tolist()}
    assert index['found'] == {'documents': 1, 'characters': len(content)}


def test_a_folder_of_texts_is_one_text_with_ends_between(tmp_path):
    need_gpt2()
    (tmp_path / 'in' / 'deeper').mkdir(parents=True)
    parts = {'b.txt': text(300, 1), 'deeper/a.md': text(500, 2), 'c.txt': '', 'd.TXT': text(200, 3), 'e.png': 'no text'}
    for name, part in parts.items():
        (tmp_path / 'in' / name).write_bytes(part.encode())
    prepare(str(tmp_path / 'mine'), [str(tmp_path / 'in')], num_proc=1)
    ordered = [parts[name].replace('\r\n', '\n') for name in ('b.txt', 'd.TXT', 'deeper/a.md')]
    cut, wanted, codes = int(0.9 * len(''.join(ordered))), {'train': [], 'val': []}, codec.BPECodec()
    for part in ordered:
        head = min(cut, len(part))
        cut -= head
        for split, piece in (('train', part[:head]), ('val', part[head:])):
            wanted[split] += codes.encode(piece).tolist() if piece else []
        wanted['val' if head < len(part) else 'train'].append(50256)
    assert tokens(tmp_path / 'mine') == wanted


def test_characters_of_several_documents_have_an_empty_line_between(tmp_path):
    for name, part in (('a.txt', 'abcabc'), ('b.txt', 'cba' * 10)):
        (tmp_path / name).write_text(part)
    prepare(str(tmp_path / 'mine'), [str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt')], 'char', num_proc=1)
    chars, found = codec.read_meta(str(tmp_path / 'mine' / 'meta.pkl')), tokens(tmp_path / 'mine')
    assert chars.decode(found['train'] + found['val']) == 'abcabc\n\n' + 'cba' * 10 + '\n\n'


# -- records ----------------------------------------------------------------------------------------------------------

def reference(texts: list, seed: int = 1337, val: float = 0.1) -> dict:
    """What the bins of some documents should hold, in a few lines."""
    random, codes, out = np.random.Philox(key=seed).random_raw(4 * len(texts))[::4], codec.BPECodec(), {}
    for i, document in enumerate(texts):
        ids = [*codes.bpe.encode_ordinary(document), 50256] if document else []
        out.setdefault('val' if random[i] < val * 2**64 or i == 1 else 'train', []).extend(ids)
    return out


@pytest.mark.parametrize('kind', ['jsonl', 'jsonl.gz', 'parquet'])
@pytest.mark.parametrize('processes', [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_records(tmp_path, kind, processes):
    """Empty ones, null, and one larger than a piece among them; the same for any number of processes."""
    need_gpt2()
    texts = [text(random.Random(i).randint(0, 40), i) for i in range(400)] + ['', None, text(3000), 'end']
    half = len(texts) // 2
    for name, part in (('a', texts[:half]), ('b', texts[half:])):
        path = tmp_path / f'{name}.{kind}'
        if kind == 'parquet':
            pq.write_table(pa.table({'n': range(len(part)), 'body': part}), path, row_group_size=150)
        else:
            lines = ''.join(json.dumps({'body': t, 'n': 1}, ensure_ascii=i % 2 == 0) + '\n' for i, t in enumerate(part))
            path.write_bytes(gzip.compress(lines.encode()) if kind.endswith('gz') else lines.encode())
    index = prepare(str(tmp_path / 'mine'), [str(tmp_path / f'*.{kind}')], field='body', num_proc=processes)
    assert tokens(tmp_path / 'mine') == reference(texts)
    assert index['found'] == {'documents': sum(map(bool, texts)), 'characters': sum(len(t or '') for t in texts)}


def test_a_limit(tmp_path):
    need_gpt2()
    texts = [f'document {i}' for i in range(100)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': t}) for t in texts))
    prepare(str(tmp_path / 'mine'), [str(tmp_path / 'a.jsonl')], num_proc=1, limit=7)
    assert tokens(tmp_path / 'mine') == reference(texts[:7])


def test_a_limit_of_texts_and_any_name(tmp_path):
    """The first files are all there is, for val, too; a file that is named may have any name."""
    for name in ('a', 'b.log', 'c.txt'):
        (tmp_path / name).write_text(name[0] * 50)
    prepare(str(tmp_path / 'mine'), [str(tmp_path / name) for name in ('a', 'b.log', 'c.txt')], 'char', num_proc=1,
            limit=2, documents=False)
    found, chars = tokens(tmp_path / 'mine'), codec.read_meta(str(tmp_path / 'mine' / 'meta.pkl'))
    assert (chars.decode(found['train']), chars.decode(found['val'])) == ('a' * 50 + 'b' * 40, 'b' * 10)


@pytest.mark.parametrize('name, content, message', [
    ('a.jsonl', b'{"text": "a"}\n{"body": "b"}\n', 'a.jsonl, line 2 has no field text (body): choose one with'),
    ('a.jsonl', b'{"text": "a"}\n\nnonsense\n',
     'a.jsonl, line 3 is no JSON (Expecting value: line 1 column 1 (char 0)): each line must be one object'),
    ('a.jsonl', b'[1, 2]\n', 'a.jsonl, line 1 has no fields, but list'),
    ('a.jsonl', b'{"text": 3}\n', 'a.jsonl, line 1: text is no text, but int'),
    ('a.jsonl', b'{"text": "\xff"}\n', 'a.jsonl, line 1 is no JSON ('),
    ('a.parquet', b'PAR1 no', 'a.parquet cannot be read as parquet ('),
    ('a.parquet', pa.table({'body': ['a'], 'n': [1]}), 'a.parquet has no column text, but body, n: choose'),
    ('a.parquet', pa.table({'text': [1, 2]}), 'a.parquet, line 1: text is no text, but int'),
    ('a.txt.gz', b'no gzip', "a.txt.gz cannot be read to its end (Not a gzipped file"),
    ('a.txt.gz', gzip.compress(b'abc' * 9999)[:-20], 'a.txt.gz cannot be read to its end (Compressed file ended'),
    ('a.txt.zst', b'no zstandard', 'a.txt.zst cannot be read to its end (')],
    ids=['field', 'nonsense', 'list', 'number', 'UTF-8', 'no parquet', 'column', 'numbers', 'gzip', 'cut', 'zst'])
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    need_gpt2()
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        prepare(str(tmp_path / 'mine'), [str(tmp_path / name)], num_proc=1)
    assert str(e.value).startswith(f'{tmp_path}/{message}') and '\n' not in str(e.value)


def test_each_file_once_and_its_own_line(tmp_path):
    """Whatever ways lead to it; and a mistake is named by the line of its file."""
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.jsonl').write_text('{"text": "a"}\n' * 3)
    (tmp_path / 'in' / 'b.JSONL').write_text('{"text": "b"}\n\n{"body": "c"}\n')
    os.symlink(tmp_path / 'in', tmp_path / 'in' / 'loop')
    files = docs.files_of([str(tmp_path / 'in' / 'a.jsonl'), str(tmp_path / 'in'), str(tmp_path / 'in' / '*.jsonl')])
    assert [os.path.basename(path) for path in files] == ['a.jsonl', 'b.JSONL']
    with pytest.raises(DataError, match=r'b\.JSONL, line 3 has no field text \(body\): choose one with --field'):
        prepare(str(tmp_path / 'mine'), files, 'char', num_proc=1)


@pytest.mark.parametrize('name, raw', [('a.txt', b''), ('a.txt', b'\xef\xbb\xbf'), ('a.jsonl', b'\n\n')])
def test_nothing_to_read_is_one_line(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=f'{name}: there is no text in it$'):
        prepare(str(tmp_path / 'mine'), [str(tmp_path / name)], 'char', num_proc=1)
    assert not (tmp_path / 'mine').exists()


def test_files_that_are_not_there(tmp_path):
    (tmp_path / 'data[1]').mkdir()
    (tmp_path / 'data[1]' / 'a.txt').write_text('a')
    assert docs.files_of([str(tmp_path / 'data[1]')]) == [str(tmp_path / 'data[1]' / 'a.txt')]
    for path in ('nowhere', '*.txt'):
        with pytest.raises(DataError, match=re.escape(f'{tmp_path}/{path}: no such file, or no .txt, .md, .jsonl')):
            docs.files_of([f'{tmp_path}/{path}'])


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_text_to_a_sample(tmp_path):
    """The commands that it prints, pasted."""
    (tmp_path / 'my.txt').write_text('the quick brown fox jumps over the lazy dog\n' * 60)
    done = run(sys.executable, PREPARE, f'{tmp_path}/mine', f'{tmp_path}/my.txt', '--tokenizer=char')
    assert done.returncode == 0, done.stderr
    train, sample = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith('    python ')]
    assert train[0] == 'train.py' and sample[0] == 'sample.py'
    small = flags(**{k: v for k, v in TINY.items() if k != 'block_size'}, out_dir=tmp_path / 'out', block_size=32)
    assert run(*train, *small, cwd=ROOT).returncode == 0
    done = run(*sample, *flags(out_dir=tmp_path / 'out', device='cpu', num_samples=1, max_new_tokens=20), cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith('---------------\n'), done.stderr


@pytest.mark.parametrize('length, says', [(500, '--block_size=49'), pytest.param(
    40, 'too few to train on; add text', marks=pytest.mark.slow)])
def test_a_short_text_gets_a_smaller_block_size(tmp_path, length, says):
    (tmp_path / 'my.txt').write_text('abcdefghij' * (length // 10))
    done = run(sys.executable, PREPARE, f'{tmp_path}/mine', f'{tmp_path}/my.txt', '--tokenizer=char')
    assert done.returncode == 2 * (length < 100) and says in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize('arguments, says', [
    (['--val=1.5'], '--val must lie between 0 and 1'), (['--num_proc=0'], '--num_proc and --limit be at least 1'),
    (['--tokenizer=bert'], 'tokenizer bert: choose char, or one that tiktoken knows: cl100k_base, '),
    (['shakespeare_char'], 'data/shakespeare_char has a prepare.py of its own, or bins of another program: choose')])
def test_mistakes_are_one_line(tmp_path, arguments, says):
    (tmp_path / 'my.txt').write_text('abc')
    name = [arguments.pop()] if arguments[0][0] != '-' else [f'{tmp_path}/mine']
    done = run(sys.executable, PREPARE, *name, f'{tmp_path}/my.txt', *arguments)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_another_encoding_of_tiktoken(tmp_path, monkeypatch):
    """tiktoken takes more of them as plugins; one with more ids than 16 bits, from the folder to the model."""
    (tmp_path / 'tiktoken_ext').mkdir()
    (tmp_path / 'tiktoken_ext' / 'own.py').write_text("""def wide():
    ranks = {bytes([i]): i + 70000 for i in range(256)}
    return {'name': 'wide', 'pat_str': r'\\S+|\\s+', 'mergeable_ranks': ranks,
            'special_tokens': {'<|endoftext|>': 70256}}
ENCODING_CONSTRUCTORS = {'wide': wide}""")
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    (tmp_path / 'my.txt').write_text('hello, hello' * 30)
    done = run(sys.executable, PREPARE, f'{tmp_path}/mine', f'{tmp_path}/my.txt', '--tokenizer=wide', env=env)
    assert done.returncode == 0, done.stderr
    data = bins.Bins(str(tmp_path / 'mine'), 8)
    assert (data.tokenizer, data.vocab_size, data.model_vocab_size) == ('wide', 70257, 70272)
    assert data.tokens['train'].dtype == np.dtype('<u4') and data.tokens['train'][0] == 70000 + ord('h')
    small = {**TINY, 'block_size': 8, 'max_iters': 2, 'n_embd': 8, 'dataset': tmp_path / 'mine'}
    assert run('train.py', *flags(**small, out_dir=tmp_path / 'out')).returncode == 0
    done = run('sample.py', *flags(out_dir=tmp_path / 'out', device='cpu', num_samples=1, max_new_tokens=3), env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('meta', [{'vocab_size': 12}, {'vocab_size': 12, 'itos': ['C', 'D', 'E', 'F', 'G', 'A', 'B']}],
                         ids=['ids', 'notes'])
def test_tokens_of_ones_own_to_a_sample(tmp_path, meta):
    """Bins as people write them, with a meta.pkl and nothing else."""
    import pickle
    for split in ('train', 'val'):
        np.arange(500, dtype=np.uint16).__mod__(7).astype(np.uint16).tofile(tmp_path / f'{split}.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    learns = {**TINY, 'max_iters': 60, 'learning_rate': 1e-2, 'dataset': tmp_path, 'out_dir': tmp_path / 'out'}
    done = run('train.py', *flags(**learns))
    assert done.returncode == 0, done.stderr
    start = '0 1 2' if 'itos' not in meta else 'CDE'
    done = run('sample.py', *flags(out_dir=tmp_path / 'out', device='cpu', num_samples=1, max_new_tokens=4, start=start,
                                   temperature=0))
    assert done.returncode == 0 and done.stdout.endswith(
        ('0 1 23 4 5 6 \n' if 'itos' not in meta else 'CDEFGAB\n') + '---------------\n'), done.stdout + done.stderr


def test_gpt2_bins_with_ids_that_the_model_has_room_for(tmp_path):
    """As of people who added special tokens; the original trains on them, too."""
    for split in ('train', 'val'):
        np.full(300, 50300, np.uint16).tofile(tmp_path / f'{split}.bin')
    data = bins.Bins(str(tmp_path), 8)
    x, _ = data.train_batch(1, 0, 0, 1, 4)
    assert (x == 50300).all() and data.model_vocab_size == 50304
    np.full(300, 50304, np.uint16).tofile(tmp_path / 'train.bin')
    with pytest.raises(DataError, match='holds token id 50304 at offset .+; vocab_size is 50257: run '):
        bins.Bins(str(tmp_path), 8).train_batch(1, 0, 0, 1, 4)


# -- killed, full, large ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_killed_at_random_moments_and_started_again(tmp_path):
    need_gpt2()
    texts = [text(60, i) for i in range(20000)]
    pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet', row_group_size=500)
    command = [sys.executable, PREPARE, f'{tmp_path}/mine', f'{tmp_path}/a.parquet', '--num_proc=2']
    began = time.monotonic()
    prepare(str(tmp_path / 'straight'), [str(tmp_path / 'a.parquet')], num_proc=1)
    took, rng = time.monotonic() - began, random.Random(5)
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
        time.sleep(rng.uniform(0.5, 2 + took))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        try:
            bins.Bins(str(tmp_path / 'mine'), 8)
        except DataError as e:
            assert 'run python data/prepare.py' in str(e) or 'is neither a folder' in str(e)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    for name in ('train.bin', 'val.bin', 'bins.json'):
        sums = {hashlib.sha256((tmp_path / f / name).read_bytes()).hexdigest() for f in ('mine', 'straight')}
        assert len(sums) == 1, name


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    """A real one, of 2 MB: train.bin takes 4."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=2m tmpfs {disk}'
    if not shutil.which('unshare') or run('unshare', '-rm', 'sh', '-c', mount).returncode:
        pytest.skip('this system lets nobody mount a disk of their own')
    (tmp_path / 'a.txt').write_text('abcdefghij' * 220_000)
    command = f'{sys.executable} {PREPARE} {disk}/mine {tmp_path}/a.txt --tokenizer=char --num_proc=2'
    done = run('unshare', '-rm', 'sh', '-c', f'{mount}; {command}; echo $?; ls {disk}/mine')
    assert done.stdout.split() == ['2', 'bins.json'], 'unfinished, and nothing half-written'
    said = done.stderr.splitlines()[-1]  # on a slow machine after a bar
    assert re.fullmatch(rf'{disk}/mine/train.bin could not be written \(No space left on device\).*', said)
    assert 'Traceback' not in done.stderr


def leave_without_a_word(piece):
    os._exit(9)


def test_a_process_that_is_killed_is_one_line():
    piece = docs.Piece('a.txt', 0, ['abc'], 1, False, np.zeros(1, bool), 3)
    with pytest.raises(DataError, match='a process that tokenizes was ended from outside, .* fewer than --num_proc=2'):
        list(docs.by_all_cores(leave_without_a_word, [piece] * 20, {}, 2))


@pytest.mark.parametrize('processes', [1, 2])
def test_a_row_group_of_many_parts_and_a_column_of_bytes(tmp_path, monkeypatch, processes):
    need_gpt2()
    monkeypatch.setattr(docs, 'PIECE', 1 << 10)
    texts = [text(20, i) for i in range(2000)]
    pq.write_table(pa.table({'text': pa.array([t.encode() for t in texts], pa.binary())}), tmp_path / 'a.parquet')
    prepare(str(tmp_path / 'mine'), [str(tmp_path / 'a.parquet')], num_proc=processes)
    assert tokens(tmp_path / 'mine') == reference(texts)
    pq.write_table(pa.table({'text': pa.array([b'abc', b'\xff'], pa.binary())}), tmp_path / 'b.parquet')
    with pytest.raises(DataError, match=f'^{tmp_path}/b.parquet, line 2: text is not UTF-8$'):
        prepare(str(tmp_path / 'other'), [str(tmp_path / 'b.parquet')], num_proc=processes)


@pytest.mark.slow
def test_ctrl_c_ends_it_quietly(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "To be, or not to be"}\n' * 10**6)
    process = subprocess.Popen([sys.executable, PREPARE, f'{tmp_path}/mine', f'{tmp_path}/a.jsonl', '--tokenizer=char',
                                '--num_proc=2'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and 'Traceback' not in said, said


@pytest.mark.slow
def test_a_million_documents_of_ten_bytes(tmp_path):
    need_gpt2()
    texts = [None if i % 1000 == 7 else '' if i % 1000 == 8 else f'{i:09d}\n' for i in range(10**6)]
    pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet', row_group_size=100_000)
    prepare(str(tmp_path / 'mine'), [str(tmp_path / 'a.parquet')], num_proc=2)
    assert tokens(tmp_path / 'mine') == reference(texts)


@pytest.mark.slow
@pytest.mark.parametrize('unit, times', [('a', 10**6), ('the quick brown fox ', 5 * 10**6)], ids=['equal', '100 MB'])
def test_one_large_document(tmp_path, monkeypatch, unit, times):
    need_gpt2()
    monkeypatch.setattr(docs, 'PIECE', 1 << 21)
    (tmp_path / 'a.txt').write_text(unit * times)
    index = prepare(str(tmp_path / 'mine'), [str(tmp_path / 'a.txt')], num_proc=2)
    assert index['found']['characters'] == len(unit) * times
    codes = codec.BPECodec()
    assert codes.decode(bins.Bins(str(tmp_path / 'mine'), 8).tokens['val'][:50].tolist()) in unit * times


@pytest.mark.slow
def test_a_large_file_of_tokens_is_read_in_place(tmp_path):
    """17 GB, sparse: opened at once, 64 x 1024 tokens in a few ms, and next to no memory."""
    for split, size in (('train', 17 << 30), ('val', 1 << 20)):
        with open(tmp_path / f'{split}.bin', 'wb') as f:
            f.write(np.arange(1, 99, dtype=np.uint16).tobytes())  # all zeros would not look like ids
            f.truncate(size)
    code = f"""if True:
        import resource, sys, time
        sys.path.insert(0, {ROOT!r})
        from data.bins import Bins
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        data = Bins({str(tmp_path)!r}, 1024)
        opened, times = time.perf_counter() - began, []
        for step in range(1, 1001):
            began = time.perf_counter()
            data.train_batch(1, step, 0, 1, 64)
            times.append(time.perf_counter() - began)
        print(opened, sorted(times)[500], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    opened, batch, grown = map(float, run(sys.executable, '-c', code).stdout.split())
    assert opened < 0.5 and batch < 0.01 and grown < 20_000, (opened, batch, grown)  # kB
