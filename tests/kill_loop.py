"""
A run that saves after every update is killed with SIGKILL, at random moments and in the middle of saves, and resumed,
again and again; then it is compared, bit for bit, with one that nothing disturbed.

    python tests/kill_loop.py --kills=200
    python tests/kill_loop.py --kills=200 --seed=7 --always_save_checkpoint=False        further options go to train.py

Linux and macOS. The processes are forked from a server that has imported torch once: a start costs some 50 ms.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from data import bins, codec  # noqa: E402
from data import checkpoint as ckpt  # noqa: E402
from tests.conftest import TINY, flags  # noqa: E402

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torch', 'torch.distributed', 'torch.nn.parallel', 'torch._dynamo', 'pytest'])


def _train(arguments: list[str], output: str, env: dict, setup) -> None:
    """What a forked process does: train.py, stdout to the file `output`, stderr to `output`.err."""
    for fd, path in ((1, output), (2, output + '.err')):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.environ.update(env)
    torch.set_num_threads(1)
    names = setup() if setup else {}
    sys.argv = ['train.py', *arguments]
    try:
        runpy.run_path(os.path.join(ROOT, 'train.py'), init_globals=names, run_name='__main__')
    except Exception:  # multiprocessing would print it without asking the script's excepthook
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def start(arguments: list[str], output: str, env: dict | None = None, setup=None) -> multiprocessing.Process:
    """
    train.py in a forked process on one thread. setup: a function of a module, called there first, that returns names
    for the script (on_step).
    """
    process = SERVER.Process(target=_train, args=(arguments, output, env or {}, setup), daemon=True)
    process.start()
    return process


def free_port() -> str:
    """A TCP port that nobody uses."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def start_ranks(processes: int, arguments: list[str], output: str, setup=None,
                own: tuple = ()) -> list[multiprocessing.Process]:
    """The same on several gloo processes, without torchrun: rank r writes to f'{output}.{r}'. The last rank gets
    arguments of its `own`, too."""
    env = {'WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port()}
    return [start([*arguments, *(own if r == processes - 1 else ())], f'{output}.{r}',
                  {**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}, setup) for r in range(processes)]


def ended(process: multiprocessing.Process, timeout: float = 60) -> int:
    """Its exit code (minus the number of the signal that ended it); killed and AssertionError if it goes on."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f'still running after {timeout} s')
    return process.exitcode


def text(path: str) -> str:
    """A text file, '' if there is none."""
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8') as f:
        return f.read()


def records(out_dir: str, kind: str = 'train') -> list[dict]:
    """Records of one kind in log.jsonl."""
    lines = map(json.loads, text(os.path.join(out_dir, 'log.jsonl')).splitlines())
    return [line for line in lines if line['kind'] == kind]


def latest(out_dir: str) -> dict:
    """The checkpoint that is further on."""
    return ckpt.newest(out_dir)


def tensors(checkpoint: dict) -> dict:
    """Every tensor of model and optimizer by name."""
    moments = {f'optimizer.{i}.{k}': t for i, s in checkpoint['optimizer']['state'].items() for k, t in s.items()}
    return {**checkpoint['model'], **moments}


def assert_same(out_dir: str, straight: str) -> None:
    """Both runs ended in the same state, to the last bit, and logged the same updates, each once."""
    a, b = latest(out_dir), latest(straight)
    assert a['iter_num'] == b['iter_num']
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    logs = [[{k: r[k] for k in ('iter', 'loss', 'norm', 'lr')} for r in records(d)] for d in (out_dir, straight)]
    assert [r['iter'] for r in logs[0]] == list(range(latest(out_dir)['iter_num']))
    assert logs[0] == logs[1]


def kill_loop(folder: str, kills: int, seed: int = 0, **options) -> dict:
    """Kill and resume a run in `folder`; AssertionError if anything is lost. Returns what happened, in numbers."""
    rng, data = random.Random(seed), os.path.join(folder, 'data')
    sentence = 'the quick brown fox jumps over the lazy dog '
    chars = codec.CharCodec.of(sentence)
    ids = chars.encode(' '.join(rng.choices(sentence.split(), k=1000)))
    bins.write(data, chars, train=[ids[500:]], val=[ids[:500]])
    base = {**TINY, 'dataset': data, 'dropout': 0.2, 'lr_decay_iters': 300, 'eval_iters': 1, **options}
    out_dir, straight, output = (os.path.join(folder, name) for name in ('killed', 'straight', 'output'))
    run = {**base, 'out_dir': out_dir, 'eval_interval': 1}

    warm = SERVER.Process(target=os.getpid)  # the first start waits for the server's imports
    warm.start()
    warm.join()

    done, before_first, torn = 0, 0, 0
    for n in range(kills):
        process = start(flags(**{**run, 'max_iters': 10**6, 'init_from': 'resume' if done else 'scratch'}), output)
        time.sleep(rng.uniform(0, 0.3))
        if n % 2:  # every other one dies in the middle of a save
            tmp = [os.path.join(out_dir, name + '.tmp') for name in ckpt.NAMES]
            give_up = time.monotonic() + 5
            while time.monotonic() < give_up and not any(map(os.path.exists, tmp)):
                pass
            time.sleep(rng.choice((0, 0, rng.uniform(0, 0.005))))
        process.kill()
        code = ended(process)
        assert code == -signal.SIGKILL, f'start {n + 1} ended by itself with {code}:\n{text(output + ".err")}'
        there = [os.path.join(out_dir, name) for name in ckpt.NAMES]
        torn += any(os.path.exists(path + '.tmp') for path in there)
        found = [ckpt.load(path)['iter_num'] for path in there if os.path.exists(path)]  # raises if damaged
        assert max(found, default=0) >= done, f'kill {n + 1} took the run back from {done} to {found} updates'
        done = max(found, default=0)
        before_first += not done

    last = {'max_iters': done + 3, 'init_from': 'resume' if done else 'scratch'}
    code = ended(start(flags(**{**run, **last}), output))
    assert code == 0, text(output + '.err')
    assert not [name for name in os.listdir(out_dir) if name.endswith('.tmp')]
    undisturbed = {**base, 'out_dir': straight, 'eval_interval': 10**6, 'max_iters': done + 3}
    code = ended(start(flags(**undisturbed), output), 600)
    assert code == 0, text(output + '.err')
    assert_same(out_dir, straight)
    return {'kills': kills, 'in a save': torn, 'before the first checkpoint': before_first, 'updates': done + 3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    own, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        print(kill_loop(folder, own.kills, own.seed, **dict(word.removeprefix('--').split('=', 1) for word in rest)))


if __name__ == '__main__':
    main()
