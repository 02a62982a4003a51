"""data/runlog.py: log.jsonl holds each step once, whatever happened to the run."""

import glob
import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest

from data import DataError
from data import checkpoint as ckpt
from data.runlog import RunLog, claim
from tests.conftest import ROOT, run


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'log.jsonl'


@pytest.fixture
def logged(path):
    """The log of a run of six updates."""
    log = RunLog(str(path), {'lr': 1e-3})
    for i in range(6):
        log.write('train', iter=i, loss=float(i))
    log.write('eval', **{'iter': 6, 'val/loss': 2.0})
    log.close()
    return path


def test_one_object_a_line(path):
    log = RunLog(str(path), {'config': {'out_dir': 'résumé', 'compile': False}, 'device': 'cpu'})
    log.write('train', iter=0, loss=2.5)
    log.write('eval', **{'iter': 1, 'val/loss': 2.25})
    log.close()
    assert records(path) == [
        {'kind': 'run', 'iter': 0, 'config': {'out_dir': 'résumé', 'compile': False}, 'device': 'cpu'},
        {'kind': 'train', 'iter': 0, 'loss': 2.5}, {'kind': 'eval', 'iter': 1, 'val/loss': 2.25}]


def test_a_record_is_on_disk_as_soon_as_it_is_written(path):
    log = RunLog(str(path), {})
    log.write('train', iter=0, loss=1.0)
    assert records(path)[-1] == {'kind': 'train', 'iter': 0, 'loss': 1.0}
    log.close()


def test_what_is_not_finite_is_written_by_name(path):
    log = RunLog(str(path), {})
    log.write('train', iter=0, loss=math.nan, norm=math.inf, lr=-math.inf, ms=1.0)
    log.close()

    def refuse(word):
        raise AssertionError(f'{word} is no JSON')

    last = json.loads(path.read_text().splitlines()[-1], parse_constant=refuse)
    assert last == {'kind': 'train', 'iter': 0, 'loss': 'nan', 'norm': 'inf', 'lr': '-inf', 'ms': 1.0}


@pytest.mark.parametrize('resumed_at', [1, 3, 6, 7])
def test_a_resumed_run_drops_what_it_will_do_again(logged, resumed_at):
    RunLog(str(logged), {'lr': 1e-4}, resumed_at=resumed_at).close()
    first, *steps, last = records(logged)
    assert first['kind'] == 'run' and last == {'kind': 'run', 'iter': resumed_at, 'lr': 1e-4}
    assert [(r['kind'], r['iter']) for r in steps] == [
        (kind, i) for kind, i in (*(('train', i) for i in range(6)), ('eval', 6)) if i < resumed_at + (kind == 'eval')]


def test_an_evaluation_where_a_run_resumes_is_there_once(logged):
    """Also if it is not repeated, and after a resume that came no further; where it was not logged, it is."""
    for again in (True, False):
        log = RunLog(str(logged), {}, resumed_at=6)
        if again:
            log.write('eval', **{'iter': 6, 'train/loss': 2.0, 'val/loss': 2.0})
        log.write('train', iter=6, loss=0.5)
        log.close()
    before = [('train', i) for i in range(6)]
    assert [(r['kind'], r['iter']) for r in records(logged)] == [
        ('run', 0), *before, ('eval', 6), ('run', 6), ('run', 6), ('train', 6)]
    log = RunLog(str(logged), {}, resumed_at=5)
    log.write('eval', **{'iter': 5, 'train/loss': 2.0, 'val/loss': 2.0})
    log.close()
    assert [(r['kind'], r['iter']) for r in records(logged)][-5:] == [
        ('train', 4), ('run', 6), ('run', 6), ('run', 5), ('eval', 5)]


def test_a_folder_that_is_gone_is_one_line(logged):
    log = RunLog(str(logged), {})
    os.rename(logged.parent, f'{logged.parent}-moved')
    with pytest.raises(DataError, match=rf'^{logged} could not be written \(No such file or directory\)$'):
        log.write('train', iter=0, loss=0.5)


def test_a_fresh_run_starts_an_empty_log(logged):
    RunLog(str(logged), {}).close()
    assert records(logged) == [{'kind': 'run', 'iter': 0}]


@pytest.mark.parametrize('broken', [b'{"kind": "train", "iter": 2, "lo', b'\xff\xfe\n', b'\n\n', b'17\n', b'"text"\n',
                                    b'[1]\n', b'\0' * 300])
def test_lines_that_a_kill_broke_are_dropped(logged, broken):
    with open(logged, 'ab') as f:
        f.write(broken)
    log = RunLog(str(logged), {}, resumed_at=3)
    log.write('train', iter=3, loss=0.5)
    log.close()
    assert [(r['kind'], r['iter']) for r in records(logged)] == [
        ('run', 0), ('train', 0), ('train', 1), ('train', 2), ('run', 3), ('train', 3)]


def test_resuming_without_a_log_begins_one(path):
    RunLog(str(path), {}, resumed_at=3).close()
    assert records(path) == [{'kind': 'run', 'iter': 3}]


def test_without_a_path_nothing_happens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, {'lr': 1.0}, wandb={'project': 'p', 'name': 'n'})
    log.write('train', iter=0, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ''


def test_wandb_offline_for_real(path, tmp_path, monkeypatch, request):
    wandb = pytest.importorskip('wandb')
    wandb.teardown()  # its service would remember another folder
    request.addfinalizer(wandb.teardown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    log = RunLog(str(path), {'config': {'seed': 1}}, wandb={'project': 'exact', 'name': 'tiny'})
    log.write('train', iter=0, loss=1.0, norm=2.0)
    log.write('eval', **{'iter': 1, 'train/loss': 2.0, 'val/loss': 2.5, 'lr': 1e-3, 'mfu': -100.0})
    log.close()
    wandb.teardown()  # its service writes the file, and may lag behind
    [file] = glob.glob(str(tmp_path / 'wandb' / 'offline-run-*' / '*.wandb'))
    with open(file, 'rb') as f:
        raw = f.read()
    sent = (b'exact', b'tiny', b'train/loss', b'val/loss', b'lr', b'mfu', b'iter', b'norm')
    assert [w for w in sent if w not in raw] == []
    assert [r['kind'] for r in records(path)] == ['run', 'train', 'eval']


WANDB_DIES = """
import os, subprocess, sys, time
sys.path.insert(0, os.getcwd())
from data.runlog import RunLog
log = RunLog(sys.argv[1], {}, wandb={'project': 'exact', 'name': 'tiny'})
log.write('eval', iter=0, lr=1.0)
assert subprocess.run(['pkill', '-KILL', '-P', str(os.getpid())]).returncode == 0  # wandb-core is the only child
time.sleep(1)
for i in range(1, 4):
    log.write('eval', iter=i, lr=1.0)
    time.sleep(0.2)
log.close()
print('the end')
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('pkill'), reason='needs pkill')
def test_wandb_that_dies_costs_one_line(path, tmp_path):
    pytest.importorskip('wandb')
    done = run(sys.executable, '-c', WANDB_DIES, str(path), cwd=ROOT, env={**os.environ, 'WANDB_DIR': str(tmp_path)})
    assert done.returncode == 0 and done.stdout.endswith('the end\n'), done.stderr
    assert done.stdout.count('the run goes on without it') == 1 and 'Traceback' not in done.stderr
    assert [r['iter'] for r in records(path) if r['kind'] == 'eval'] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('pkill'), reason='needs pkill')
@pytest.mark.parametrize('when', ['while logging', 'at the end', 'where there is no pkill'])
def test_wandb_that_hangs_costs_one_line(path, tmp_path, when):
    """Its process is stopped; log() blocks when its socket is full, finish() at once."""
    pytest.importorskip('wandb')
    code = WANDB_DIES.replace('log = ', "import data.runlog\ndata.runlog.PATIENCE = {'log': 2, 'finish': 3}\nlog = ", 1)
    code = code.replace('-KILL', '-STOP').replace('time.sleep(0.2)', 'pass')
    code = code.replace('range(1, 4)', 'range(1, 20000)') if when == 'while logging' else code
    code = code.replace('time.sleep(1)', "os.environ['PATH'] = ''") if 'pkill' in when else code
    other = tmp_path / 'a name with spaces'  # among the processes of this machine
    other.write_text('#!/bin/sh\nread line\n')
    other.chmod(0o755)
    began = time.monotonic()
    with subprocess.Popen([str(other)], stdin=subprocess.PIPE):
        done = run(sys.executable, '-c', code, str(path), cwd=ROOT, env={**os.environ, 'WANDB_DIR': str(tmp_path)})
    assert done.returncode == 0 and done.stdout.endswith('the end\n'), done.stderr
    said = f'wandb failed (TimeoutError: no answer for {2 if when == "while logging" else 3} s); the run goes on'
    assert done.stdout.count(said) == done.stdout.count('wandb failed') == 1 and 'Traceback' not in done.stderr
    assert len(records(path)) == (20001 if when == 'while logging' else 5) and time.monotonic() - began < 60


def test_a_line_cut_before_its_end_does_not_swallow_the_next(logged, path):
    path.write_text(path.read_text(encoding='utf-8').rstrip('\n') + '\n{"kind": "train", "iter": 7}', encoding='utf-8')
    log = RunLog(str(path), {}, resumed_at=9)
    log.close()
    assert [r['iter'] for r in records(path)[-2:]] == [7, 9]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk_is_one_line(logged, path):
    before = path.read_text(encoding='utf-8')
    os.symlink('/dev/full', f'{path}.tmp')
    with pytest.raises(DataError, match=rf'^{path} could not be written \(No space left on device\): free some space$'):
        RunLog(str(path), {}, resumed_at=3)
    assert path.read_text(encoding='utf-8') == before and os.listdir(path.parent) == ['log.jsonl']
    log = RunLog(str(path), {}, resumed_at=3)
    os.remove(path)
    os.symlink('/dev/full', path)
    with pytest.raises(DataError, match='No space left'):
        log.write('train', iter=3)


@pytest.mark.parametrize('fresh', [True, False])
def test_claim_removes_what_a_killed_save_left(tmp_path, fresh):
    for name in ('ckpt.pt.tmp', 'last.pt.tmp', 'log.jsonl.tmp', 'notes.tmp'):
        (tmp_path / name).write_bytes(b'half')
    assert claim(str(tmp_path), fresh) == [] and sorted(os.listdir(tmp_path)) == ['notes.tmp', 'run.lock']


def test_claim_keeps_an_earlier_run_under_other_names(tmp_path):
    names = ['ckpt.pt', 'last.pt', 'log.jsonl']
    kept = ['ckpt.prev.pt', 'last.prev.pt', 'log.prev.jsonl']
    for name in names:
        (tmp_path / name).write_text(name)
    assert claim(str(tmp_path), fresh=False) == [] and sorted(os.listdir(tmp_path)) == [*names, 'run.lock']
    assert claim(str(tmp_path), fresh=True) == kept and sorted(os.listdir(tmp_path)) == [*kept, 'run.lock']
    (tmp_path / 'ckpt.pt').write_text('newer')
    assert claim(str(tmp_path), fresh=True) == ['ckpt.prev2.pt']  # nothing earlier is written over
    (tmp_path / 'log.jsonl').write_text('newest')
    assert claim(str(tmp_path), fresh=True) == ['log.prev3.jsonl']  # and no two runs are mixed
    assert (tmp_path / 'ckpt.prev2.pt').read_text() == 'newer' and (tmp_path / 'ckpt.prev.pt').read_text() == 'ckpt.pt'
    assert ckpt.earlier(str(tmp_path)).startswith(f'{tmp_path}/ckpt.prev.pt is of an earlier run')


def test_claim_makes_the_folder_or_says_why_not(tmp_path):
    assert claim(str(tmp_path / 'a' / 'b'), fresh=True) == [] and (tmp_path / 'a' / 'b').is_dir()
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match=r'out_dir=\S+ cannot be written \(.+\): choose another with --out_dir'):
        claim(str(tmp_path / 'file' / 'out'), fresh=True)
