"""data/curves.py: what a log says, as a picture and in characters."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest

from data import DataError, curves
from data.runlog import RunLog, claim
from tests.conftest import ROOT, TINY, flags

CONFIG = {'dataset': 'words', 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'batch_size': 4, 'block_size': 16,
          'gradient_accumulation_steps': 2}
LOADED = {}  # modules of matplotlib
VAL = {0: 4.0, 10: 2.5, 20: 2.25, 30: 2.75}


@pytest.fixture
def matplotlib(monkeypatch):
    """It is kept from all other tests, since each of their runs would draw."""
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if 'no_pictures' not in p])
    monkeypatch.setenv('PYTHONPATH', ROOT)
    sys.modules.update(LOADED)
    yield pytest.importorskip('matplotlib', reason='needs matplotlib')
    LOADED.update({name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith('matplotlib')})


def logged(folder, updates: int = 30, val: dict = VAL, **config) -> str:
    """The out_dir of a run whose train loss is 3 - update / 100 after each."""
    os.makedirs(folder)
    log = RunLog(os.path.join(folder, 'log.jsonl'), {'config': {**CONFIG, **config}})
    for i in range(updates):
        log.write('train', iter=i, loss=3 - (i + 1) / 100, lr=1e-3, norm=0.5, ms=1.0, tok_s=128000.0)
    log.undrawn = False
    with open(log.path, 'a') as f:
        for i, loss in val.items():
            f.write(json.dumps({'kind': 'eval', 'iter': i, 'train/loss': loss - 0.125, 'val/loss': loss}) + '\n')
    return str(folder)


def test_read(tmp_path):
    curve = curves.read(logged(tmp_path / 'out'))
    assert (curve.name, curve.title, curve.tokens) == ('out', 'dataset=words, n_layer=2, n_head=2, n_embd=32', 128)
    assert curve.updates.shape == (30, 4) and curve.updates[9].tolist() == [10, 2.9, 1e-3, 0.5]
    assert curve.evals.tolist() == [[i, loss - 0.125, loss] for i, loss in VAL.items()]


def test_what_is_broken_is_left_out(tmp_path):
    folder = logged(tmp_path / 'out')
    with open(os.path.join(folder, 'log.jsonl'), 'ab') as f:
        f.write(b'{"kind": "train", "iter": 30, "loss": 1.0}\n17\nnull\n{"kind": "train", "iter": "x"}\n\xff\n'
                b'{"kind": "eval", "iter": "x", "train/loss": 1, "val/loss": 1}\n{"kind": "run", "config": null}\n'
                b'{"kind": "train", "iter": 30, "loss": "nan", "lr": 0.001, "norm": "inf"}\n{"kind": "ev')
    updates = curves.read(folder).updates
    assert len(updates) == 31 and np.isnan(updates[30, 1]) and np.isinf(updates[30, 3])


@pytest.mark.parametrize('content', [None, '', '{"kind": "run", "iter": 0}\n'])
def test_no_log_or_nothing_in_it(tmp_path, content):
    if content is not None:
        (tmp_path / 'log.jsonl').write_text(content)
    with pytest.raises(DataError, match=r'log\.jsonl (cannot be read|holds no updates and no evaluations yet)'):
        curves.read(str(tmp_path))


def test_thinned():
    points = np.arange(20).reshape(10, 2).astype(float)
    assert np.array_equal(curves._thinned(points, 10), points)
    assert curves._thinned(points, 4).tolist() == [[2, 3], [8, 9], [14, 15], [18, 19]]
    assert curves._thinned(points[:0], 4).shape == (0, 2)


def test_picture_of_one_run(tmp_path, matplotlib):
    loss, rate, norm = curves.picture([curves.read(logged(tmp_path / 'out'))]).axes
    lines = {line.get_label(): line for line in loss.lines}
    assert lines['val, evaluated'].get_xdata().tolist() == [*VAL]
    assert lines['val, evaluated'].get_ydata().tolist() == [*VAL.values()]
    assert lines['train, evaluated'].get_ydata().tolist() == [loss - 0.125 for loss in VAL.values()]
    assert lines['train, as logged'].get_xdata().tolist() == [*range(1, 31)]
    best = lines['best val: 2.2500 after 20 updates']
    assert (best.get_xdata().tolist(), best.get_ydata().tolist()) == ([20], [2.25])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [*lines]
    assert loss.get_title() == 'out: dataset=words, n_layer=2, n_head=2, n_embd=32'
    assert set(rate.lines[0].get_ydata()) == {1e-3} and set(norm.lines[0].get_ydata()) == {0.5}
    [top] = loss.child_axes
    loss.set_xlim(0, 100)
    loss.figure.draw_without_rendering()
    assert top.get_xlabel() == 'tokens' and top.get_xlim() == (0, 12800)


def test_picture_of_several_runs(tmp_path, matplotlib):
    """Runs with updates of other sizes lie on one axis of tokens, and each has a colour of its own."""
    names = ['a', 'b', 'c']
    runs = [curves.read(logged(tmp_path / name, batch_size=4 * (i + 1))) for i, name in enumerate(names)]
    loss = curves.picture(runs).axes[0]
    stars = [line for line in loss.lines if line.get_marker() == '*']
    assert [line.get_label() for line in stars] == [
        f'{name}, best val: 2.2500 after {n:,} tokens' for name, n in zip(names, (2560, 5120, 7680))]
    assert ' after 5,120 tokens' in curves.sketch(runs)
    assert [line.get_xdata()[0] for line in stars] == [20 * 128, 20 * 256, 20 * 384]
    assert len({line.get_color() for line in stars}) == 3 and not loss.child_axes
    same = curves.picture([curves.read(logged(tmp_path / 'd')), runs[0]]).axes[0]
    assert [line.get_xdata()[0] for line in same.lines if line.get_marker() == '*'] == [20, 20] and same.child_axes


@pytest.mark.filterwarnings('error')
def test_a_name_may_hold_any_characters(tmp_path, matplotlib):
    curves.draw([curves.read(logged(tmp_path / 'a$^$ 🙂'))], str(tmp_path / 'loss.png'))
    assert os.path.getsize(tmp_path / 'loss.png') > 10_000


@pytest.mark.parametrize('updates, val', [(3, {}), (0, {0: float('nan')}), (1, {1: 3.0})])
def test_few_or_no_evaluations(tmp_path, matplotlib, updates, val):
    curve = curves.read(logged(tmp_path / 'out', updates=updates, val=val))
    curves.draw([curve], str(tmp_path / 'loss.png'))
    assert os.path.getsize(tmp_path / 'loss.png') > 10_000
    assert curves.sketch([curve]) == 'no loss is finite' if not updates else 'a: out' in curves.sketch([curve])


def test_a_run_draws(tmp_path, matplotlib, monkeypatch):
    """At an evaluation when there is time for it, and at the end."""
    now, path = [0.0], tmp_path / 'loss.png'
    monkeypatch.setattr('time.perf_counter', lambda: now[0])
    log = RunLog(str(tmp_path / 'log.jsonl'), {'config': CONFIG})

    def drawn_at(second: float, kind: str = 'eval') -> bool:
        now[0], before = second, path.stat().st_mtime_ns if path.exists() else 0
        record = {'iter': int(second), 'train/loss': 1.0, 'val/loss': 1.0, 'loss': 1.0, 'lr': 1e-3, 'norm': 1.0}
        log.write(kind, **record) if kind != 'close' else log.close()
        return (path.stat().st_mtime_ns if path.exists() else 0) > before

    real = curves.redraw
    monkeypatch.setattr(curves, 'redraw', lambda folder: real(folder) + 2)
    assert [drawn_at(s) for s in (0, 30, 61, 62, 160, 162)] == [False, False, True, False, False, True]
    assert not drawn_at(400, 'train') and drawn_at(401, 'close') and not drawn_at(402, 'close')


def test_the_picture_of_a_run(tmp_path, matplotlib, script, dataset, capsys):
    """That of an earlier run is kept with its other files."""
    import matplotlib.image
    script('train.py', *flags(**TINY, dataset=dataset, out_dir=tmp_path / 'out'))
    image = matplotlib.image.imread(tmp_path / 'out' / 'loss.png')
    assert image.shape == (770, 990, 4) and image.std() > 0.05
    assert 'loss.prev.png' in claim(str(tmp_path / 'out'), fresh=True)
    assert 'could not be drawn' not in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_does_not_end_a_run(tmp_path, matplotlib, script, dataset, capsys):
    script('train.py', *flags(**TINY, dataset=dataset, out_dir=tmp_path / 'out'),
           on_step=lambda *_: (tmp_path / 'out' / 'loss.png.tmp').mkdir(exist_ok=True))
    said = capsys.readouterr().out
    assert said.count('loss.png could not be drawn (DataError: ') == 1
    with open(tmp_path / 'out' / 'log.jsonl') as f:
        assert [r['iter'] for r in map(json.loads, f) if r['kind'] == 'train'] == [*range(8)]


def test_without_matplotlib_a_run_says_nothing(tmp_path, script, dataset, capsys):
    script('train.py', *flags(**TINY, dataset=dataset, out_dir=tmp_path / 'out'))
    assert not os.path.exists(tmp_path / 'out' / 'loss.png') and 'png' not in capsys.readouterr().out


def test_sketch(tmp_path):
    falling = curves.read(logged(tmp_path / 'one', updates=0, val={0: 4.0, 50: 3.0, 100: 2.0}))
    other = falling._replace(name='two', evals=np.array([[0, 3, 3.0], [100, 3, np.inf]]))
    assert curves.sketch([falling, other], width=11, height=5).splitlines() == [
        '   loss |',
        '  4.000 |a',
        '        |',
        '        |B    a',
        '        |',
        '  2.000 |          A',
        '        +-----------',
        '         0100 updates',
        'a: one, best val loss 2.0000 (A) after 100 updates',
        'b: two, best val loss 3.0000 (B) after 0 updates',
        'letters: val loss, dots: train loss, as logged']


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, os.path.join(ROOT, 'data', 'runlog.py'), *arguments], cwd=cwd,
                          capture_output=True, text=True)


@pytest.mark.slow
def test_the_command(tmp_path, matplotlib):
    for name in ('a', 'b'):
        logged(tmp_path / name)
    ran = command('a', 'b', cwd=tmp_path)
    assert (ran.stdout, ran.stderr, ran.returncode) == ('wrote loss.png\n', '', 0)
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
    ran = command('a', '--to=other.png', cwd=tmp_path)
    assert ran.returncode == 0 and (tmp_path / 'other.png').exists()
    ran = command('a', '--to=none/other.png', cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith('none/other.png could not be written (')
    ran = command('a', 'c', cwd=tmp_path)
    assert ran.returncode == 2 and ran.stderr == (
        'c/log.jsonl cannot be read (No such file or directory): name the out_dir of a run\n')


def test_the_command_without_matplotlib(tmp_path):
    logged(tmp_path / 'a')
    ran = command('a', cwd=tmp_path)
    assert (ran.stderr, ran.returncode) == ('', 0) and not (tmp_path / 'loss.png').exists()
    assert 'a: a, best val loss 2.2500 (A) after 20 updates\n' in ran.stdout
    assert ran.stdout.endswith('\n(for a picture: pip install matplotlib)\n')


def test_imported_from_anywhere():
    """data/runlog.py finds the repo by its own path, as a script does."""
    assert 'RunLog' in runpy.run_path(os.path.join(ROOT, 'data', 'runlog.py'))
