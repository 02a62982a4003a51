"""The prepare scripts, really run in a copy of the repo's data/ (they write beside themselves), without a network."""

import hashlib
import http.server
import json
import os
import pickle
import random
import runpy
import shutil
import sys
import threading

import numpy as np
import pytest

from data import DataError, codec, fetched
from data.bins import Bins

from .conftest import ROOT, run

NOWHERE = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9')
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
OWN = 'To be, or not to be: na\u00efve \u2014 ' * 40


@pytest.fixture
def folder(tmp_path):
    """folder('shakespeare'): a copy of data/ in which nothing is prepared yet; that dataset's folder in it."""
    def copy(name):
        code_only = shutil.ignore_patterns('__pycache__', '*.bin', '*.pkl', '*.json', '*.txt', '*.tmp')
        shutil.copytree(os.path.join(ROOT, 'data'), tmp_path / 'data', ignore=code_only)
        return tmp_path / 'data' / name
    return copy


def prepare(folder, monkeypatch) -> None:
    """The prepare.py of a folder, in this process."""
    with monkeypatch.context() as m:
        m.setattr(sys, 'path', list(sys.path))
        runpy.run_path(str(folder / 'prepare.py'), run_name='__main__')


def need_gpt2() -> None:
    try:
        codec.BPECodec().encode('a')
    except DataError:
        pytest.skip('needs the tokenizer files of GPT-2')


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- characters -----------------------------------------------------------------------------------------------------

def test_pydoc_char(folder):
    here = folder('pydoc_char')
    done = run(sys.executable, str(here / 'prepare.py'), env={**os.environ, **NOWHERE})
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(here)) == ['bins.json', 'meta.pkl', 'prepare.py', 'train.bin', 'val.bin']
    data = Bins(str(here), 256)
    tokens = {split: len(ids) for split, ids in data.tokens.items()}
    n = sum(tokens.values())
    assert 300_000 < n < 1_000_000 and 80 < data.vocab_size < 200, 'the manual differs by version, but not much'
    assert tokens['train'] == int(0.9 * n)
    chars = codec.from_state(data.state)
    text = chars.decode(np.concatenate([data.tokens['train'], data.tokens['val']]).tolist())
    assert len(set(text)) == data.vocab_size and 'The "if" statement' in text
    assert done.stdout.splitlines() == [
        f'length of the text in characters: {n:,}', f'tokenizer char, vocabulary {data.vocab_size}',
        *(f'{split} has {tokens[split]:,} tokens, sha256 {sha256(here / f"{split}.bin")}' for split in tokens)]


def test_own_text(folder, monkeypatch, capsys):
    here = folder('shakespeare_char')
    (here / 'input.txt').write_text(OWN, encoding='utf-8')
    prepare(here, monkeypatch)
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f'note: {here}/input.txt is not the published text; going on with it as it is'
    assert err == '' and (here / 'input.txt').read_text(encoding='utf-8') == OWN
    chars, cut = sorted(set(OWN)), int(0.9 * len(OWN))
    assert pickle.loads((here / 'meta.pkl').read_bytes()) == {
        'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    for split, part in (('train', OWN[:cut]), ('val', OWN[cut:])):
        assert np.fromfile(here / f'{split}.bin', '<u2').tolist() == [chars.index(c) for c in part]
    assert Bins(str(here), 16).tokenizer == 'char'


def test_own_text_in_gpt2_tokens(folder, monkeypatch, capsys):
    need_gpt2()
    here = folder('shakespeare')
    (here / 'input.txt').write_text(OWN, encoding='utf-8')
    prepare(here, monkeypatch)
    assert capsys.readouterr().out.startswith(f'note: {here}/input.txt is not the published text;')
    bpe, cut = codec.BPECodec().bpe, int(0.9 * len(OWN))
    for split, part in (('train', OWN[:cut]), ('val', OWN[cut:])):
        assert np.fromfile(here / f'{split}.bin', '<u2').tolist() == bpe.encode_ordinary(part)
    assert sorted(os.listdir(here)) == ['bins.json', 'input.txt', 'prepare.py', 'train.bin', 'val.bin']
    data = Bins(str(here), 16)
    assert (data.tokenizer, data.vocab_size) == ('gpt2', 50257)


def test_own_text_that_is_not_utf8(folder, monkeypatch):
    here = folder('shakespeare_char')
    (here / 'input.txt').write_bytes(OWN.encode() + b'\xff')
    with pytest.raises(DataError) as e:
        prepare(here, monkeypatch)
    assert str(e.value) == f'{here}/input.txt is not UTF-8 (byte 0xff at offset {len(OWN.encode()):,}): convert it'
    assert sorted(os.listdir(here)) == ['input.txt', 'prepare.py']


@pytest.mark.parametrize('text', ['', 'a', 'too short'])
def test_own_text_without_enough_in_it(folder, monkeypatch, text):
    here = folder('shakespeare_char')
    (here / 'input.txt').write_text(text, encoding='utf-8')
    with pytest.raises(DataError):
        prepare(here, monkeypatch)
        Bins(str(here), 16)


@pytest.mark.parametrize('name, counts, vocab_size', [('shakespeare_char', (1_003_854, 111_540), 65),
                                                      ('shakespeare', (301_966, 36_059), 50257)])
def test_the_published_text(folder, monkeypatch, capsys, name, counts, vocab_size):
    """Where somebody has fetched it already: the scripts check the sha256 of what they write themselves."""
    copies = [os.path.join(ROOT, 'data', d, 'input.txt') for d in ('shakespeare_char', 'shakespeare')]
    source = next((path for path in copies if os.path.exists(path)), None)
    if source is None:
        pytest.skip('needs input.txt of Tiny Shakespeare')
    if name == 'shakespeare':
        need_gpt2()
    here = folder(name)
    shutil.copyfile(source, here / 'input.txt')
    prepare(here, monkeypatch)
    out = capsys.readouterr().out
    if 'note: ' in out:
        pytest.skip('the input.txt that stands there is another text')
    data = Bins(str(here), 1024)
    assert (len(data.tokens['train']), len(data.tokens['val'])) == counts and data.vocab_size == vocab_size


# -- fetching -------------------------------------------------------------------------------------------------------

def test_without_text_and_network(folder):
    here = folder('shakespeare_char')
    done = run(sys.executable, str(here / 'prepare.py'), env={**os.environ, **NOWHERE})
    assert done.returncode == 2
    assert done.stdout == f'fetching {URL}\n'
    [line] = done.stderr.splitlines()
    assert line.startswith(f'{here}/input.txt could not be fetched (URLError: ')
    assert line.endswith(f'Without network: save {URL} there by other means, or any UTF-8 text of your own, '
                         'and run this again')
    assert os.listdir(here) == ['prepare.py']


@pytest.fixture(scope='module')
def server():
    """Address of a server on this machine: /text serves OWN, /cut only half of it, anything else an error page."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = OWN.encode() if self.path in ('/text', '/cut') else b'<html>no such page</html>'
            self.send_response(200 if self.path in ('/text', '/cut') else 404)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if self.path == '/cut' else body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd, pytest.MonkeyPatch.context() as m:
        for name in ('no_proxy', 'NO_PROXY'):
            m.setenv(name, '127.0.0.1')
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


HASH = hashlib.sha256(OWN.encode()).hexdigest()


def test_fetched(server, tmp_path, capsys):
    path = tmp_path / 'input.txt'
    assert fetched(str(path), f'{server}/text', HASH)
    assert capsys.readouterr().out == f'fetching {server}/text\n'
    assert path.read_bytes() == OWN.encode() and os.listdir(tmp_path) == ['input.txt']
    assert fetched(str(path), 'http://nowhere', HASH)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('page, sha, why', [
    ('missing', HASH, 'HTTPError: HTTP Error 404: Not Found'), ('cut', HASH, 'RuntimeError: invalid hash value '),
    ('text', '0' * 64, 'RuntimeError: invalid hash value ')], ids=['404', 'cut short', 'wrong hash'])
def test_a_failed_download_leaves_nothing_behind(server, tmp_path, page, sha, why):
    path = tmp_path / 'input.txt'
    with pytest.raises(DataError) as e:
        fetched(str(path), f'{server}/{page}', sha)
    assert str(e.value).startswith(f'{path} could not be fetched ({why}')
    assert str(e.value).endswith(f'Without network: save {server}/{page} there by other means, '
                                 'or any UTF-8 text of your own, and run this again')
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(server, tmp_path):
    with pytest.raises(DataError, match=r'nowhere/input\.txt could not be fetched \(FileNotFoundError: '):
        fetched(str(tmp_path / 'nowhere' / 'input.txt'), f'{server}/text', HASH)


# -- OpenWebText ----------------------------------------------------------------------------------------------------

EOT = 50256


def parquet(folder, documents: list[str]) -> None:
    """The documents in two files, one of them in a folder below; with a column that nobody wants."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    (folder / 'more').mkdir(parents=True)
    for path, part in (('a.parquet', documents[:1500]), ('more/b.parquet', documents[1500:])):
        pq.write_table(pa.table({'text': part, 'id': list(range(len(part)))}), folder / path)


def openwebtext(here, home, *arguments):
    env = {**os.environ, **NOWHERE, 'HF_HOME': str(home), 'HF_DATASETS_OFFLINE': '1'}
    return run(sys.executable, str(here / 'prepare.py'), *arguments, env=env)


@pytest.mark.slow
def test_openwebtext_from_local_parquet(folder, tmp_path):
    need_gpt2()
    rng = random.Random(0)
    words = ['apple', 'na\u00efve', '\u4e16\u754c', "don't", '\n\n', '  ', '<|endoftext|>', '2026', '\U0001f600']
    documents = [f'{i}: ' + ' '.join(rng.choices(words, k=rng.randint(0, 30))) for i in range(3999)] + ['']
    parquet(tmp_path / 'parquet', documents)
    here = folder('openwebtext')
    done = openwebtext(here, tmp_path / 'home', str(tmp_path / 'parquet'))
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(here)) == ['bins.json', 'prepare.py', 'train.bin', 'val.bin']

    bpe, found = codec.BPECodec().bpe, {}
    for split in ('train', 'val'):
        ids = np.fromfile(here / f'{split}.bin', '<u2')
        ends = np.flatnonzero(ids == EOT)
        assert ends[-1] == len(ids) - 1, 'each document ends with it, the last one too'
        found[split] = [part[:-1].tolist() for part in np.split(ids, ends + 1)[:-1]]
        assert f'{split} has {len(ids):,} tokens, sha256 {sha256(here / f"{split}.bin")}' in done.stdout.splitlines()
    assert {split: len(parts) for split, parts in found.items()} == {'train': 3998, 'val': 2}
    wanted = [bpe.encode_ordinary(text) for text in documents]
    assert sorted(found['train'] + found['val']) == sorted(wanted), 'every document once, and its text stays text'
    permutation = np.random.default_rng(2357).permutation(4000)  # what datasets' train_test_split does
    held = sorted(permutation[:2])
    assert found['val'] == [wanted[i] for i in held], 'the documents of the original'
    assert found['train'] == [ids for i, ids in enumerate(wanted) if i not in held]
    index = json.loads((here / 'bins.json').read_text(encoding='utf-8'))
    assert (index['tokenizer'], index['vocab_size'], index['dtype']) == ('gpt2', 50257, 'uint16')
    assert index['splits'] == {split: {'tokens': (here / f'{split}.bin').stat().st_size // 2,
                                       'sha256': sha256(here / f'{split}.bin')} for split in ('train', 'val')}
    assert Bins(str(here), 16).vocab_size == 50257


@pytest.mark.slow
def test_openwebtext_from_an_odd_folder(folder, tmp_path):
    """Of a name that is a pattern, with null texts; or without texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    need_gpt2()
    here = folder('openwebtext')
    tables = {'data[1]': {'text': ['a', None, 'b']}, 'other': {'content': ['a', 'b']}}
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(table), tmp_path / name / 'part[0].parquet')
        done = openwebtext(here, tmp_path / 'home', str(tmp_path / name))
        if name == 'data[1]':
            assert done.returncode == 0, done.stderr
            ids = [np.fromfile(here / f'{split}.bin', '<u2').tolist() for split in ('train', 'val')]
            assert sorted(ids[0] + ids[1]) == [64, 65, EOT, EOT, EOT]
        else:
            last = done.stderr.splitlines()[-1]
            assert done.returncode == 2 and last.startswith(f'{tmp_path / name}') and 'Traceback' not in done.stderr
            assert 'has no column text, but content: choose one with --field' in last
    part = tmp_path / 'data[1]' / 'part[0].parquet'
    os.truncate(part, part.stat().st_size - 4)
    last = openwebtext(here, tmp_path / 'home', str(part.parent)).stderr.splitlines()[-1]
    assert last.startswith(f'{part} cannot be read as parquet (')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pydoc_char', 'shakespeare', 'openwebtext'])
def test_a_prepare_that_finds_no_repo_is_one_line(folder, tmp_path, name):
    (here := tmp_path / 'far' / 'from' / 'data').mkdir(parents=True)
    path = shutil.copy(folder(name) / 'prepare.py', here)
    done = run(sys.executable, str(path), cwd=here)
    assert done.returncode == 1 and done.stderr == (
        f'{here} is neither in the repo nor linked from it: set PYTHONPATH to the folder of train.py\n')
    if name == 'pydoc_char':
        done = run(sys.executable, str(path), cwd=here, env={**os.environ, 'PYTHONPATH': ROOT})
        assert done.returncode == 0 and (here / 'train.bin').exists()


@pytest.mark.slow
def test_a_dataset_that_is_a_link(folder, tmp_path):
    """The folder lies elsewhere; the script runs by its path through the link, and after `cd` through it."""
    here = folder('pydoc_char')
    elsewhere = tmp_path / 'elsewhere'
    shutil.move(here, elsewhere)
    os.symlink(elsewhere, here)
    done = run(sys.executable, str(here / 'prepare.py'))
    assert done.returncode == 0 and (elsewhere / 'train.bin').exists(), done.stderr
    os.remove(elsewhere / 'train.bin')
    done = run('sh', '-c', f'cd {here} && {sys.executable} prepare.py')
    assert done.returncode == 0 and (elsewhere / 'train.bin').exists(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('name', ['openwebtext', 'fineweb_edu'])
def test_it_is_the_same_when_run_twice(folder, tmp_path, name):
    need_gpt2()
    parquet(tmp_path / 'parquet', [f'document {i}' * (i % 7) for i in range(4000)])
    here, seen = folder(name), []
    for home in ('one', 'two'):
        done = openwebtext(here, tmp_path / home, str(tmp_path / 'parquet'))
        assert done.returncode == 0, done.stderr
        seen.append({name: sha256(here / name) for name in ('bins.json', 'train.bin', 'val.bin')})
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_openwebtext_without_parquet_or_network(folder, tmp_path):
    need_gpt2()
    here = folder('openwebtext')
    (tmp_path / 'empty').mkdir()
    done = openwebtext(here, tmp_path / 'home', str(tmp_path / 'empty'))
    assert (done.returncode, done.stderr) == (
        2, f'{tmp_path / "empty"}: no such file, or no .txt, .md, .jsonl, .ndjson, .parquet (.gz, .zst) in it\n')
    assert os.listdir(here) == ['prepare.py']


@pytest.mark.slow
def test_openwebtext_without_network(folder, tmp_path):
    need_gpt2()
    here = folder('openwebtext')
    done = openwebtext(here, tmp_path / 'home')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr[-500:]
    assert 'parquet' in done.stderr.splitlines()[-1], 'the offline way is named: parquet files in a FOLDER'
    assert os.listdir(here) == ['prepare.py']
