"""Signals, kills, NaN, lost processes: a run ends in order or is cut off, and its checkpoint is whole either way."""

import functools
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
from data import bins, codec
from data import checkpoint as ckpt
from tests.conftest import ROOT, TINY, flags, run, save, torchrun
from tests.kill_loop import assert_same, ended, free_port, kill_loop, latest, records, start, start_ranks, text

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and signals')
OPTIONS = {**TINY, 'dropout': 0.2, 'max_iters': 12, 'lr_decay_iters': 12, 'eval_interval': 4}
STOPPED = re.compile(r'^stopped by a signal after (\d+) updates; --init_from=resume goes on from here$', re.MULTILINE)
TRAIN = os.path.join(ROOT, 'train.py')


@pytest.fixture
def options(dataset, tmp_path):
    """options(name=value) as arguments of a run in tmp_path/out."""
    def arguments(**more):
        return flags(**{**OPTIONS, 'dataset': dataset, 'out_dir': tmp_path / 'out', **more})
    return arguments


def until(condition, timeout=90):
    """Wait for something that another process does."""
    give_up = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < give_up, 'waited in vain'
        time.sleep(0.005)


def updates_logged(out_dir):
    return text(os.path.join(out_dir, 'log.jsonl')).count('{"kind": "train"')


def assert_stopped_in_order(out_dir, output):
    """One message, one checkpoint, and the last record belong to the same update; nothing half-written. The update."""
    said = STOPPED.findall(output)
    assert len(said) == 1, output
    done = int(said[0])
    assert latest(out_dir)['iter_num'] == done
    assert [r['iter'] for r in records(out_dir)] == list(range(done))
    assert not [name for name in os.listdir(out_dir) if name.endswith('.tmp')]
    return done


# -- what was silent ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_world_size_alone_changes_nothing(options, tmp_path):
    """As schedulers and containers set it; RANK may be there and empty."""
    runs = [{}, {'WORLD_SIZE': '2', 'RANK': ''}]
    for i, env in enumerate(runs):
        done = run('train.py', *options(out_dir=tmp_path / str(i)), env={**os.environ, **env})
        assert done.returncode == 0 and ', processes 1\n' in done.stdout, done.stderr
    assert_same(tmp_path / '0', tmp_path / '1')


@pytest.mark.parametrize('script', ['train.py', pytest.param('bench.py', marks=pytest.mark.slow)])
def test_a_rank_alone_is_one_line(options, script):
    more = options() if script == 'train.py' else ['--device=cpu', '--real_data=False', '--compile=False']
    done = run(script, *more, env={**os.environ, 'RANK': '0', 'WORLD_SIZE': '2'})
    assert done.returncode == 2 and done.stderr == (
        'RANK=0 is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start several processes with torchrun, which '
        'sets them all, or unset RANK for one\n')


@pytest.mark.skipif(data.fcntl is None, reason='no locks on Windows')
@pytest.mark.parametrize('init_from', ['scratch', pytest.param('resume', marks=pytest.mark.slow)])
def test_an_out_dir_belongs_to_one_run_until_it_ends(options, tmp_path, init_from):
    """However it ends: kill -9 gives it back, too."""
    out, output = str(tmp_path / 'out'), str(tmp_path / 'output')
    first = start(options(max_iters=10**6, eval_interval=10), output)
    until(lambda: os.path.exists(os.path.join(out, 'ckpt.pt')))
    second = start(options(init_from=init_from), f'{output}2')
    assert ended(second) == 2
    assert re.fullmatch(rf'{out} belongs to process {first.pid} on .+, since .+, which is still at work: '
                        'choose another with --out_dir\n', text(f'{output}2.err'))
    first.kill()
    ended(first)
    assert not os.path.exists(os.path.join(out, 'ckpt.prev.pt')), 'the second one touched nothing'
    [header] = records(out, 'run')
    assert header['iter'] == 0
    assert ended(start(options(init_from='resume', max_iters=latest(out)['iter_num'] + 2), output)) == 0


@pytest.mark.slow
def test_many_runs_started_together(options, tmp_path):
    """One has the folder, the others say so; nothing is mixed."""
    outputs = [str(tmp_path / f'output{i}') for i in range(4)]
    codes = [ended(process) for process in [start(options(max_iters=200), output) for output in outputs]]
    assert sorted(codes) == [0, 2, 2, 2], [text(f'{output}.err') for output in outputs]
    assert [r['iter'] for r in records(tmp_path / 'out')] == list(range(200))


@pytest.mark.slow
def test_weights_that_are_not_numbers_are_no_text(options, tmp_path):
    assert run('train.py', *options()).returncode == 0
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = torch.load(path)
    checkpoint['model']['transformer.ln_f.weight'][3] = math.nan
    torch.save(checkpoint, path)
    sample = ['sample.py', f'--out_dir={path.parent}', '--device=cpu', '--start=a']
    for command in (sample, ['train.py', *options(init_from='resume')]):
        done, size = run(*command), f'{path.stat().st_size:,} bytes'
        assert done.returncode == 2 and done.stderr == (
            f'{path} ({size}) cannot be used: transformer.ln_f.weight holds NaN or infinity, its run had failed before '
            'it was saved\n')
    checkpoint['model']['transformer.ln_f.weight'][:] = 3e38  # finite; what the model makes of them is not
    torch.save(checkpoint, path)
    done = run(*sample, '--dtype=float32')
    assert done.returncode == 1 and done.stderr.splitlines() == [
        'the model makes NaN or infinity of the prompt in float32: try --dtype=float32']


@pytest.mark.slow
def test_resuming_on_another_text_is_said(options, dataset, tmp_path):
    """Of the same characters and as long."""
    assert run('train.py', *options()).returncode == 0
    other = tmp_path / 'other'
    ids = {split: np.fromfile(os.path.join(dataset, f'{split}.bin'), np.uint16)[::-1] for split in ('train', 'val')}
    bins.write(str(other), codec.of_folder(str(dataset)), **{split: [tokens] for split, tokens in ids.items()})
    said = f'resumed on another text: dataset={other} has other sha256 sums than before'
    again = options(init_from='resume', max_iters=14)
    done = run('train.py', *again, f'--dataset={other}', '--max_iters=16')
    assert done.returncode == 0 and said in done.stdout.splitlines()


# -- what a person sees ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_lines_leave_when_they_are_made(options):
    """Also into a pipe, as of `| tee log`."""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}
    process = subprocess.Popen([sys.executable, TRAIN, *options(max_iters=10**6, eval_interval=10**6)], text=True,
                               stdout=subprocess.PIPE, env=env)
    try:
        assert any(line.startswith('step 0: ') for line in process.stdout) and process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_scripts_run_through_a_link(options, tmp_path):
    for name in ('train.py', 'sample.py'):
        os.symlink(os.path.join(ROOT, name), tmp_path / name)
    done = run(sys.executable, str(tmp_path / 'train.py'), *options())
    assert done.returncode == 0, done.stderr
    done = run(sys.executable, str(tmp_path / 'sample.py'), f'--out_dir={tmp_path}/out', '--device=cpu', '--start=a')
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_long_evaluation_has_a_bar_on_a_terminal(options):
    import fcntl
    import pty
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, TRAIN, *options(eval_iters=10**5, max_iters=1)], stdout=subprocess.PIPE,
                               stderr=theirs)
    os.close(theirs)
    seen = b''
    try:
        while not re.search(rb'evaluating val: +\d+%.+\d+/\d+', seen):
            seen += os.read(ours, 1000)  # OSError if the process ends
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(ours)


def piped(command: str) -> subprocess.CompletedProcess:
    """A command of bash whose last line of output is the exit code of the first part of its pipe."""
    command = ['bash', '-c', f'{command}; echo ${{PIPESTATUS[0]}}']
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


@pytest.mark.slow
def test_head_ends_a_training_in_order(options, tmp_path):
    words = ' '.join(options(max_iters=10**6, eval_interval=10**6))
    done = piped(f'{sys.executable} {TRAIN} {words} | head -50')
    assert done.stdout.splitlines()[-1] == '0' and done.stderr == ''
    assert latest(tmp_path / 'out')['iter_num'] == updates_logged(tmp_path / 'out') > 0


@pytest.mark.slow
def test_head_ends_other_scripts_quietly(options, tmp_path):
    assert run('train.py', *options()).returncode == 0
    sample = f'{os.path.join(ROOT, "sample.py")} --out_dir={tmp_path}/out --device=cpu --start=a --num_samples=2000'
    done = piped(f'{sys.executable} {sample} --max_new_tokens=50 | head -2')
    assert done.stdout.splitlines()[-1] == '141' and done.stderr == ''


# -- kill -9 --------------------------------------------------------------------------------------------------------

def test_kill_loop(tmp_path):
    happened = kill_loop(str(tmp_path), kills=12, seed=1)
    assert happened['in a save'] > 0  # the loop does what it is for


@pytest.mark.slow
@pytest.mark.parametrize('always_save_checkpoint, kills', [(True, 50), (False, 12)])
def test_long_kill_loop(tmp_path, always_save_checkpoint, kills):
    """Longer: KILLS=500 python -m pytest -m slow tests/test_faults.py -k long; or tests/kill_loop.py itself."""
    kills = int(os.environ.get('KILLS', kills))
    happened = kill_loop(str(tmp_path), kills, seed=2, always_save_checkpoint=always_save_checkpoint)
    assert happened['in a save'] > kills / 10


@pytest.mark.parametrize('init_from', ['scratch', 'resume'])
def test_stale_tmp_is_removed_at_the_start(script, options, tmp_path, init_from):
    torch.set_num_threads(1)
    script('train.py', *options(max_iters=4))
    stale = [tmp_path / 'out' / f'{name}.tmp' for name in ('ckpt.pt', 'last.pt', 'log.jsonl')]
    for path in stale:
        path.write_bytes(b'PK\x03\x04 cut short')
    seen = []
    script('train.py', *options(max_iters=5, init_from=init_from, eval_interval=1000),
           on_step=lambda step, model: seen.append([path.exists() for path in stale]))
    assert seen[0] == [False, False, False]
    assert latest(tmp_path / 'out')['iter_num'] == 5


# -- signals, one process -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('number', [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (
    signal.SIGTERM, signal.SIGUSR1))])
def test_signal_to_a_real_process(options, tmp_path, number):
    out = tmp_path / 'out'
    process = subprocess.Popen([sys.executable, TRAIN, *options(max_iters=10**6, eval_interval=10**6)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')
    try:
        until(lambda: updates_logged(out) >= 3)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (0, 'finishing this update; a second signal quits at once\n')
    assert assert_stopped_in_order(out, stdout) >= 3
    assert stdout.splitlines()[-2] == f'saving checkpoint to {out}'


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_the_run_in_order(options, tmp_path):
    """SIGHUP, and from then on every word to the terminal is an error."""
    import fcntl
    import termios
    out, (ours, its) = tmp_path / 'out', os.openpty()

    def its_terminal():
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, TRAIN, *options(max_iters=10**6, eval_interval=10**6)], stdin=its,
                               stdout=its, stderr=its, preexec_fn=its_terminal)
    try:
        os.close(its)
        os.set_blocking(ours, False)
        until(lambda: read(ours) is not None and updates_logged(out) >= 3)
        os.close(ours)
        assert process.wait(20) == 0
    finally:
        process.kill()
    done = latest(out)['iter_num']
    assert [r['iter'] for r in records(out)] == list(range(done)) and done >= 3


def read(fd) -> bytes:
    """What has come so far."""
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b''


@pytest.mark.slow
def test_ignored_hangups_stay_ignored(options, tmp_path):
    """As nohup asks for."""
    process = start(options(max_iters=60), str(tmp_path / 'output'), setup=ignore_hangups)
    until(lambda: updates_logged(tmp_path / 'out') >= 3)
    os.kill(process.pid, signal.SIGHUP)
    assert ended(process) == 0 and latest(tmp_path / 'out')['iter_num'] == 60


def ignore_hangups():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return {}


def slow_step(at, seconds):
    """Run in the process: the given update takes this long."""
    return {'on_step': lambda step, model: time.sleep(seconds) if step == at else None}


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_second_signal_quits_at_once(options, tmp_path, number):
    out, output = tmp_path / 'out', str(tmp_path / 'output')
    process = start(options(), output, setup=functools.partial(slow_step, 6, 60))
    until(lambda: updates_logged(out) >= 5)
    time.sleep(0.3)  # it sleeps in update 6 now
    os.kill(process.pid, number)
    time.sleep(0.3)
    assert process.is_alive()  # it would finish the update
    os.kill(process.pid, number)
    assert ended(process, 3) == -number
    assert not STOPPED.search(text(output))
    assert latest(out)['iter_num'] == 4


def test_signal_during_an_evaluation(options, tmp_path):
    """The evaluation and the update after it are finished, then comes the end."""
    out, output = tmp_path / 'out', str(tmp_path / 'output')
    process = start(options(eval_iters=400, max_iters=10**6), output)
    until(lambda: '{"kind": "run"' in text(str(out / 'log.jsonl')))
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process, 60) == 0
    assert assert_stopped_in_order(out, text(output)) == 1
    assert len(records(out, 'eval')) == 1


# -- data that changes while a run reads it ---------------------------------------------------------------------------

@pytest.fixture
def own_dataset(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / 'words')


@pytest.mark.parametrize('split', ['train', pytest.param('val', marks=pytest.mark.slow)])
def test_bins_cut_while_they_are_read_are_one_line(options, tmp_path, own_dataset, split):
    """Reading on in the memory map would be a SIGBUS."""
    output, path = str(tmp_path / 'output'), own_dataset / f'{split}.bin'
    process = start(options(dataset=own_dataset, max_iters=10**6, eval_interval=20), output)
    until(lambda: updates_logged(tmp_path / 'out') >= 21)
    os.truncate(path, 1000)
    assert ended(process) == 2
    assert text(f'{output}.err') == (f'{path} was cut short while it was read: run python data/prepare.py '
                                     f'{own_dataset} YOUR_TEXT again\n')
    assert latest(tmp_path / 'out')['iter_num'] % 20 == 0


@pytest.mark.slow
@pytest.mark.parametrize('how', ['prepared again', 'removed'])
def test_bins_replaced_while_they_are_read_stay_what_they_were(options, tmp_path, own_dataset, how):
    output = str(tmp_path / 'output')
    process = start(options(dataset=own_dataset, max_iters=100, eval_interval=50), output)
    until(lambda: updates_logged(tmp_path / 'out') >= 3)
    chars = codec.read_meta(str(own_dataset / 'meta.pkl'))
    if how == 'removed':
        shutil.rmtree(own_dataset)
    else:
        bins.write(str(own_dataset), chars, train=[np.zeros(5000, int)], val=[np.zeros(500, int)])
    assert ended(process) == 0, text(f'{output}.err')
    assert ended(start(options(max_iters=100, eval_interval=50, out_dir=tmp_path / 'quiet'), output)) == 0
    assert_same(tmp_path / 'out', tmp_path / 'quiet')
    if how == 'prepared again':
        assert ended(start(options(dataset=own_dataset, max_iters=101, init_from='resume'), output)) == 2
        assert f'dataset={own_dataset} was prepared anew since the checkpoint in out_dir=' in text(f'{output}.err')


@pytest.mark.slow
def test_two_that_prepare_one_folder_at_once(tmp_path):
    """The second one is told, and changes nothing."""
    write = f"""if True:
        import sys; sys.path.insert(0, {ROOT!r})
        from data import bins, codec
        def arrays():
            yield [0, 1] * 50
            print('writing', flush=True)
            sys.stdin.readline()
        bins.write({str(tmp_path)!r}, codec.CharCodec('ab'), train=arrays(), val=[[0] * 9])"""
    first = subprocess.Popen([sys.executable, '-c', write], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == 'writing\n'
        second = run(sys.executable, '-c', write, stdin=subprocess.DEVNULL)
        assert second.returncode == 2 and re.fullmatch(
            rf'{tmp_path} belongs to process {first.pid} on .+, since .+, which is still at work: wait for its end\n',
            second.stderr)
        first.communicate('go on\n', timeout=30)
    finally:
        first.kill()
    assert first.returncode == 0 and sorted(os.listdir(tmp_path)) == ['bins.json', 'meta.pkl', 'train.bin', 'val.bin']
    assert bins.Bins(str(tmp_path), 4).tokens['train'].tolist() == [0, 1] * 50


# -- places that are missing or full ----------------------------------------------------------------------------------

def few_handles():
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
    return {}


def test_few_file_handles(options, tmp_path):
    process = start(options(), str(tmp_path / 'output'), setup=few_handles)
    assert ended(process) == 0, text(str(tmp_path / 'output.err'))


@pytest.mark.slow
@pytest.mark.parametrize('env', [{'TMPDIR': '/proc/nowhere'}, {'HOME': '', 'USER': ''}], ids=['no TMPDIR', 'no HOME'])
def test_no_place_of_ones_own(options, tmp_path, env):
    """With a compiler, whose cache lies in the one or the other."""
    gone = {name for name, value in env.items() if not value}
    env = {name: value for name, value in {**os.environ, **env}.items() if name not in gone}
    done = run('train.py', *options(compile=True, max_iters=3), env=env)
    assert (done.returncode, done.stderr) == (0, '') and latest(tmp_path / 'out')['iter_num'] == 3


# -- several processes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('own', ['n_embd=64', *(pytest.param(own, marks=pytest.mark.slow) for own in (
    'seed=7', 'learning_rate=0.01', 'batch_size=2', 'max_iters=9', 'log_interval=2', 'dropout=0.1',
    'init_from=resume'))])
def test_ranks_with_other_options_are_one_line(options, tmp_path, own):
    output, (key, value) = str(tmp_path / 'output'), own.split('=')
    if key == 'init_from':
        assert ended(start(options(), output)) == 0
    ranks = start_ranks(2, options(), output, own=[f'--{own}'])
    assert [ended(rank) for rank in ranks] == [2, 2], text(f'{output}.0.err') + text(f'{output}.1.err')
    assert re.fullmatch(rf'rank 1 started with {key}={value}, rank 0 with {key}=[\w.]+: all of them need the same '
                        'options, data and checkpoint\n', text(f'{output}.0.err'))
    assert records(tmp_path / 'out') == [] or len(records(tmp_path / 'out')) == 12, 'no run has begun, none was renamed'


@pytest.mark.slow
def test_a_backend_for_gpus_where_there_is_none(options, tmp_path):
    ranks = start_ranks(2, options(backend='nccl'), output := str(tmp_path / 'output'))
    assert [ended(rank) for rank in ranks] == [2, 2]
    assert text(f'{output}.0.err') == 'backend=nccl is for GPUs, and device=cpu is none: choose gloo\n'


def own_place(place):
    """Run in each process: what is relative lies in a folder of its own, as on hosts without a common disk."""
    os.chdir(os.path.join(place, os.environ['RANK']))
    return {}


@pytest.mark.slow
@pytest.mark.parametrize('other', ['train.bin', 'val.bin', 'iter_num', 'weights'])
def test_ranks_with_other_files_are_one_line(options, tmp_path, dataset, other):
    output, chars = str(tmp_path / 'output'), codec.read_meta(os.path.join(dataset, 'meta.pkl'))
    for host in '01':
        folder = shutil.copytree(dataset, tmp_path / host / 'words')
        if host == '1' and other.endswith('bin'):
            ids = {name: np.fromfile(folder / name, '<u2') for name in ('train.bin', 'val.bin')}
            ids[other] = ids[other][::-1]
            bins.write(str(folder), chars, train=[ids['train.bin']], val=[ids['val.bin']])
        seed, ends = (8, 8) if host == '0' else (9, 8) if other == 'weights' else (8, 4)
        started = options(dataset=folder, out_dir=tmp_path / host / 'out', seed=seed, max_iters=ends)
        assert other.endswith('bin') or ended(start(started, output)) == 0
    init_from = 'scratch' if other.endswith('bin') else 'resume'
    ranks = start_ranks(2, options(dataset='words', out_dir='out', init_from=init_from, seed=8), output,
                        setup=functools.partial(own_place, str(tmp_path)))
    assert [ended(rank) for rank in ranks] == [2, 2], text(f'{output}.0.err') + text(f'{output}.1.err')
    assert re.fullmatch(rf'rank 1 started with {other}=.+, rank 0 with {other}=.+: all of them need the same options, '
                        'data and checkpoint\n', text(f'{output}.0.err'))


def test_a_mistake_in_the_data_is_said_by_the_first_rank(options, tmp_path, own_dataset):
    """torch.distributed has its own way to show errors by then, which lost this line."""
    output = str(tmp_path / 'output')
    os.remove(own_dataset / 'val.bin')
    ranks = start_ranks(2, options(dataset=own_dataset), output)
    assert [ended(rank) for rank in ranks] == [2, 2]
    assert text(f'{output}.0.err') == (f'{own_dataset}/val.bin is missing: run python data/prepare.py {own_dataset} '
                                       'YOUR_TEXT\n')


# for LD_PRELOAD: after arm(), gloo's next work is held up until release(), which then keeps Python's lock for a moment
HOLD = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <unistd.h>
static atomic_int armed, released;
void arm(void) { armed = 1; }
void release(void) { released = 1; usleep(2000); }
void finish(void *work) __asm__("_ZN4c10d16ProcessGroupGloo9AsyncWork14finishWorkGlooEv");
void finish(void *work) {
    void (*real)(void *) = dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD),
                                 "_ZN4c10d16ProcessGroupGloo9AsyncWork14finishWorkGlooEv");
    real(work);
    if (atomic_exchange(&armed, 0))
        for (int i = 0; i < 100000 && !released; i++) usleep(50);
}
'''
HELD = '''
import atexit, ctypes, runpy, sys
hold = ctypes.PyDLL(None)
atexit.register(hold.release)  # the last thing before Python's end, with Python's lock held
if sys.argv.pop() == 'through Python':
    import data
    data.leave = lambda *args, **kwargs: None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], init_globals={'on_step': lambda step, model: step == 2 and hold.arm()}, run_name='__main__')
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux' or not shutil.which('cc'), reason='needs Linux and a C compiler')
def test_a_thread_of_gloo_that_is_late_at_the_end(options, tmp_path):
    """
    It marks an all-reduce as done, and only then lets go of its tensor, for which it needs Python's lock. If Python
    ends while it waits (before 3.14), the thread is ended in C++ code, which aborts. Here it is held up until then.
    """
    (tmp_path / 'hold.c').write_text(HOLD)
    (tmp_path / 'held.py').write_text(HELD)
    subprocess.run(['cc', '-shared', '-fPIC', '-o', 'hold.so', 'hold.c', '-ldl'], cwd=tmp_path, check=True)

    def codes(how):
        env = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(),
               'PYTHONPATH': ROOT, 'LD_PRELOAD': str(tmp_path / 'hold.so'), 'OMP_NUM_THREADS': '1'}
        command = [sys.executable, str(tmp_path / 'held.py'), TRAIN, *options(max_iters=2), how]
        ranks = [subprocess.Popen(command, env={**env, 'RANK': rank, 'LOCAL_RANK': rank}, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True) for rank in '01']
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
        return [(rank.returncode, text) for rank, text in zip(ranks, said)]

    if sys.version_info < (3, 14):
        aborts = (code == -signal.SIGABRT and 'terminate called' in said
                  for _ in range(5) for code, said in codes('through Python'))
        assert any(aborts), 'the schedule no longer does it'
    for _ in range(int(os.environ.get('LAUNCHES', 3))):
        assert codes('as it is') == [(0, ''), (0, '')]


@pytest.mark.slow
def test_what_only_one_rank_misses_is_said(options, tmp_path):
    """Under torchrun, which ends the others: here the checkpoint is not on the second host."""
    path = tmp_path / 'host.py'
    path.write_text(f"""import os, runpy, sys
sys.path.insert(0, {ROOT!r})
sys.argv[1:] = [word.replace('RANK', os.environ['RANK']) for word in sys.argv[1:]]
runpy.run_path({TRAIN!r}, run_name='__main__')""")
    assert run('train.py', *options(out_dir=tmp_path / 'out0')).returncode == 0
    done = torchrun(2, str(path), *options(out_dir=tmp_path / 'outRANK', init_from='resume', max_iters=20))
    assert done.returncode != 0
    assert f'train.py, rank 1: init_from=resume: no ckpt.pt or last.pt in out_dir={tmp_path}/out1; ' in done.stderr
    assert '/train.py", line' not in done.stderr


@pytest.mark.parametrize('told, log_interval', [(0, 5), (1, 1)])
def test_all_ranks_stop_when_one_is_told_to(options, tmp_path, told, log_interval):
    out, output = tmp_path / 'out', str(tmp_path / 'output')
    ranks = start_ranks(2, options(max_iters=10**6, eval_interval=10**6, log_interval=log_interval), output)
    until(lambda: updates_logged(out) >= 2)
    os.kill(ranks[told].pid, signal.SIGTERM)
    assert [ended(rank, 20) for rank in ranks] == [0, 0], text(f'{output}.0.err') + text(f'{output}.1.err')
    done = int(STOPPED.findall(text(f'{output}.0'))[0])
    assert latest(out)['iter_num'] == done and done % log_interval == (0 if log_interval == 1 else 1)
    assert text(f'{output}.1') == ''  # only rank 0 speaks


def break_weights(value, rank, at):
    """Run in each process: after an update one weight of one rank is no number any more."""
    def on_step(step, model):
        if step == at and os.environ['RANK'] == str(rank):
            with torch.no_grad():
                model.transformer['h'][0].mlp.c_fc.weight[0, 0] = value
    return {'on_step': on_step}


@pytest.mark.parametrize('value, rank, log_interval', [(math.nan, 1, 1), (math.inf, 0, 100)])
def test_one_rank_that_is_not_finite_stops_all(options, tmp_path, value, rank, log_interval):
    out, output = tmp_path / 'out', str(tmp_path / 'output')
    ranks = start_ranks(2, options(log_interval=log_interval), output, functools.partial(break_weights, value, rank, 6))
    assert [ended(process) for process in ranks] == [1, 1]
    said = text(f'{output}.0.err')
    assert re.fullmatch(r'iter 6: gradient norm (nan|inf), loss \(.*\), lr \d\.\d{3}e-\d\d, loss scale 1: '
                        r'ended without a save; a lower learning_rate may help\n', said), said
    assert text(f'{output}.1.err') == ''
    state = latest(out)
    assert state['iter_num'] == 4 and all(t.isfinite().all() for t in state['model'].values())
    assert os.listdir(out).count('last.pt') == 0
    assert all(isinstance(r['loss'], float) for r in records(out))


def launch(*command):
    """torchrun on two processes, left running."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return subprocess.Popen([*torchrun, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding='utf-8', env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.slow
def test_sigterm_to_torchrun(options, tmp_path):
    out = tmp_path / 'out'
    process = launch(TRAIN, *options(max_iters=10**6, eval_interval=10**6))
    try:
        until(lambda: updates_logged(out) >= 3)
        told = time.monotonic()
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - told < 30
    assert assert_stopped_in_order(out, stdout) >= 3
    assert 'SIGKILL' not in stderr and stderr.count('Traceback') == 1  # torchrun's own; its workers had no trouble


WRAPPER = '''
import os, runpy, signal, sys
sys.path[0] = os.path.dirname({train!r})
def on_step(step, model):
    if os.environ['RANK'] == {rank!r} and step == 6:
        {fault}
runpy.run_path({train!r}, init_globals={{'on_step': on_step}}, run_name='__main__')
'''


def faulty(tmp_path, rank, fault):
    """A script that runs train.py, in which one rank meets with something after its sixth update."""
    path = tmp_path / 'faulty.py'
    path.write_text(WRAPPER.format(rank=str(rank), fault=fault, train=TRAIN), encoding='utf-8')
    return str(path)


def assert_goes_on_as_if_nothing_had_happened(script, options, tmp_path):
    """What two processes left is resumed on one, and equals a run on one process to rounding."""
    torch.set_num_threads(1)
    assert latest(tmp_path / 'out')['iter_num'] == 4
    script('train.py', *options(init_from='resume'))
    script('train.py', *options(out_dir=tmp_path / 'straight'))
    a, b = records(tmp_path / 'out'), records(tmp_path / 'straight')
    assert [r['iter'] for r in a] == [r['iter'] for r in b] == list(range(12))
    assert [r['loss'] for r in a] == pytest.approx([r['loss'] for r in b], rel=1e-5)


@pytest.mark.parametrize('rank', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_rank_ends_the_other(script, options, tmp_path, rank):
    output = str(tmp_path / 'output')
    ranks = start_ranks(2, options(), output, functools.partial(slow_step, 6, 1))
    until(lambda: updates_logged(tmp_path / 'out') >= 5)
    ranks[rank].kill()
    assert ended(ranks[rank]) == -signal.SIGKILL
    assert ended(ranks[1 - rank], 20) == 1
    assert 'Traceback (most recent call last)' in text(f'{output}.{1 - rank}.err')
    assert not STOPPED.search(text(f'{output}.0'))
    assert_goes_on_as_if_nothing_had_happened(script, options, tmp_path)


@pytest.mark.slow
def test_killed_rank_ends_the_job(script, options, tmp_path):
    done = torchrun(2, faulty(tmp_path, 1, 'os.kill(os.getpid(), signal.SIGKILL)'), *options(), timeout=60)
    assert done.returncode == 1
    assert 'exitcode  : -9' in done.stderr, done.stderr
    assert not STOPPED.search(done.stdout)
    assert_goes_on_as_if_nothing_had_happened(script, options, tmp_path)


@pytest.mark.slow
def test_rank_that_raises_ends_the_job(options, tmp_path):
    done = torchrun(2, faulty(tmp_path, 1, "raise RuntimeError('the trouble of rank 1')"), *options(), timeout=60)
    assert done.returncode == 1
    assert 'Traceback (most recent call last)' in done.stderr
    assert 'RuntimeError: the trouble of rank 1' in done.stderr
    assert 'faulty.py", line 6, in on_step' in done.stderr  # where it happened
    assert latest(tmp_path / 'out')['iter_num'] == 4


@pytest.mark.slow
def test_a_loss_of_train_that_is_not_finite_leaves_no_file_that_was_begun(options, tmp_path):
    """Gloo's processes end without Python's own end, but not without those of with statements."""
    nan = ("from data.bins import Bins; read = Bins.eval_batches; Bins.eval_batches = lambda self, split, *shape: ("
           "(x, y, n if split == 'val' else float('nan')) for x, y, n in read(self, split, *shape))")
    done = torchrun(2, faulty(tmp_path, 1, nan), *options(), timeout=60)
    assert done.returncode == 1 and ': ended without a save; a lower learning_rate may help\n' in done.stderr
    assert latest(tmp_path / 'out')['iter_num'] == 4
    assert sorted(os.listdir(tmp_path / 'out')) == ['ckpt.pt', 'log.jsonl']


@pytest.mark.slow
def test_hung_rank_does_not_outlive_sigterm(options, tmp_path):
    """torchrun kills after 30 s what did not stop; the checkpoint from before stays."""
    path, out = faulty(tmp_path, 1, "__import__('time').sleep(1000)"), tmp_path / 'out'
    process = launch(path, *options())
    try:
        until(lambda: updates_logged(out) >= 5)
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 1
    finally:
        process.kill()
    assert latest(out)['iter_num'] == 4


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_bit_for_bit(options, tmp_path):
    """Signals to one rank, then to the other, then to the end: equal to two processes that nobody disturbed."""
    output, leg = str(tmp_path / 'output'), 0
    for told in (1, 0):
        seen = latest(tmp_path / 'out')['iter_num'] if leg else 0
        ranks = start_ranks(2, options(max_iters=400, eval_interval=10**6, init_from='resume' if leg else 'scratch'),
                            output)
        until(lambda seen=seen: updates_logged(tmp_path / 'out') >= seen + 10)
        os.kill(ranks[told].pid, signal.SIGINT)
        assert [ended(rank, 20) for rank in ranks] == [0, 0]
        leg += 1
    final = latest(tmp_path / 'out')['iter_num'] + 10
    for more in ({'init_from': 'resume'}, {'out_dir': tmp_path / 'straight'}):
        ranks = start_ranks(2, options(max_iters=final, eval_interval=10**6, **more), output)
        assert [ended(rank) for rank in ranks] == [0, 0]
    assert_same(tmp_path / 'out', tmp_path / 'straight')


def test_damage_is_noticed(tmp_path):
    """What the kill loop relies on: a checkpoint cut short anywhere does not load."""
    path = str(tmp_path / 'ckpt.pt')
    save(path, {'model': {'a': torch.ones(50)}, 'model_args': {}, 'iter_num': 1})
    size = os.path.getsize(path)
    for cut in (0, 1, size // 2, size - 1):
        with open(path, 'r+b') as f:
            f.truncate(size - 1 - cut)
        with pytest.raises(ckpt.DataError, match='damaged'):
            ckpt.load(path)
        save(path, {'model': {'a': torch.ones(50)}, 'model_args': {}, 'iter_num': 1})
