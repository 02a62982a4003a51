"""
Does the fast path learn what the plain one learns? Trains GPT-2 124M on the Python sources of this machine with each,
three seeds, and prints the losses. Plain: without fast.py, nothing compiled.

    python tests/loss_curves.py                          1,000 updates of 12 x 1024 tokens; all GPUs share the six runs
    python tests/loss_curves.py --tokens=200000 --device=cpu --n_layer=2 --n_embd=48        more options go to train.py
"""

import argparse
import glob
import json
import os
import queue
import random
import runpy
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

OPTIONS = ['--gradient_accumulation_steps=1', '--batch_size=12', '--max_iters=1000', '--lr_decay_iters=1000',
         '--warmup_iters=100', '--eval_interval=1000', '--eval_iters=100']


def write_text(folder: str, tokens: int) -> None:
    """Bins of the standard library's and the installed packages' sources, cut off at so many GPT-2 tokens."""
    from data import bins, codec
    gpt2, made, parts = codec.BPECodec(), 0, []
    roots = sysconfig.get_path('stdlib'), sysconfig.get_path('purelib')
    paths = sorted({path for root in roots for path in glob.glob(os.path.join(root, '**', '*.py'), recursive=True)})
    random.Random(0).shuffle(paths)
    for path in paths:
        if made < tokens and 0 < os.path.getsize(path) < 1 << 20:
            with open(path, encoding='utf-8', errors='ignore') as f:
                parts.append(gpt2.encode(f.read()))
            made += len(parts[-1])
    held = max(1, len(parts) // 50)
    bins.write(folder, gpt2, train=parts[:-held], val=parts[-held:])


def train(path: str, options: list[str]) -> None:
    """Run train.py in this process, plain or fast."""
    if path == 'plain':
        sys.modules['fast'] = None  # as if it were deleted
        options = [*options, '--compile=False']
    sys.argv = ['train.py', *options]
    runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=20_000_000, help='of text to train on')
    own, options = parser.parse_known_args()
    gpus = queue.Queue()
    count = torch.cuda.device_count()
    for gpu in os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(count)))).split(',')[:max(1, count)]:
        gpus.put(gpu)
    with tempfile.TemporaryDirectory() as scratch:
        write_text(os.path.join(scratch, 'text'), own.tokens)

        def losses(run):
            """Mean loss of the last tenth of the updates, and val loss at the end."""
            (path, seed), gpu = run, gpus.get()
            out = os.path.join(scratch, f'{path}{seed}')
            try:
                subprocess.run([sys.executable, __file__, path, *OPTIONS, f'--dataset={scratch}/text',
                                f'--out_dir={out}', f'--seed={seed}', *options], check=True, stdout=subprocess.DEVNULL,
                               env={**os.environ, 'CUDA_VISIBLE_DEVICES': gpu})
            finally:
                gpus.put(gpu)
            with open(os.path.join(out, 'log.jsonl'), encoding='utf-8') as f:
                records = [json.loads(line) for line in f]
            train = [r['loss'] for r in records if 'loss' in r]
            result = statistics.mean(train[-len(train) // 10:]), [r['val/loss'] for r in records if 'val/loss' in r][-1]
            print(f'{path}, seed {seed}: train loss {result[0]:.4f}, val loss {result[1]:.4f}', flush=True)
            return result

        runs = [(path, seed) for seed in (1, 2, 3) for path in ('fast', 'plain')]
        with ThreadPoolExecutor(gpus.qsize()) as pool:
            done = dict(zip(runs, pool.map(losses, runs)))
    for i, what in enumerate(('train', 'val')):
        fast, plain = ([done[path, seed][i] for seed in (1, 2, 3)] for path in ('fast', 'plain'))
        print(f'{what} loss: the means differ by {abs(statistics.mean(fast) - statistics.mean(plain)):.4f}, '
              f'the seeds by {max(plain) - min(plain):.4f} (plain) and {max(fast) - min(fast):.4f} (fast)')


if __name__ == '__main__':
    if sys.argv[1:2] in (['fast'], ['plain']):
        train(sys.argv[1], sys.argv[2:])
    else:
        main()
