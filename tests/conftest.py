"""What every test may use: the scripts in this process or as a real one, a tiny dataset, and options for a tiny run."""

import gc
import os
import random
import runpy
import signal
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny tensors: a second thread costs more than it does
os.environ.update(WANDB_MODE='offline', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', PYTHONUNBUFFERED='1')

# runs of tests draw no pictures: that is slow, and test_curves.py looks after them
blind = os.path.join(ROOT, 'tests', 'no_pictures')
sys.path.insert(0, blind)
os.environ['PYTHONPATH'] = os.pathsep.join([blind, *filter(None, [os.environ.get('PYTHONPATH')])])

import torch  # noqa: E402

from data import checkpoint as ckpt  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell; children would, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = dict(device='cpu', dtype='float32', compile=False, n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4,
            gradient_accumulation_steps=2, eval_iters=2, eval_interval=4, max_iters=8, warmup_iters=2,
            lr_decay_iters=8, learning_rate=1e-3, min_lr=1e-4)


def save(path: str, checkpoint: dict) -> None:
    """Write a checkpoint, with nothing beside it."""
    with ckpt.saving(path, checkpoint):
        pass


def flags(**options) -> list[str]:
    """Options as command-line arguments."""
    return [f'--{key}={value}' for key, value in options.items()]


def run(*command: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
    """A script of the repo, `run('train.py', '--batch_size=2')`, as a process of its own; or any other command."""
    command = [sys.executable, os.path.join(ROOT, command[0]), *command[1:]] if command[0].endswith('.py') else command
    return subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=timeout, **options)


def torchrun(processes: int, *command: str, timeout: float = 180, **options) -> subprocess.CompletedProcess:
    """A script of the repo on several processes of this machine."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **options.pop('env', {})}
    return run(*launch, os.path.join(ROOT, command[0]), *command[1:], timeout=timeout, env=env, **options)


@pytest.fixture
def script(monkeypatch):
    """script('train.py', *arguments, on_step=...) executes a script in this process and returns its namespace."""
    def execute(name: str, *arguments: str, **names) -> dict:
        monkeypatch.setattr(sys, 'argv', [name, *arguments])
        return runpy.run_path(os.path.join(ROOT, name), init_globals=names, run_name='__main__')

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield execute
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.unfreeze()
    gc.enable()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='session')
def dataset(tmp_path_factory) -> str:
    """Folder of a character dataset of some 20,000 tokens: words that a small model soon learns to spell."""
    from data import bins, codec
    rng = random.Random(0)
    words = [''.join(rng.choices('abcdefghij', k=rng.randint(2, 6))) for _ in range(50)]
    text = ' '.join(rng.choices(words, k=4500))
    chars = codec.CharCodec.of(text)
    ids, folder = chars.encode(text), str(tmp_path_factory.mktemp('words'))
    bins.write(folder, chars, train=[ids[2000:]], val=[ids[:2000]])
    return folder


def pytest_collection_modifyitems(items):
    for item in items:
        if 'gpu' in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs CUDA'))
