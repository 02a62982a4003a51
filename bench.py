"""
Time a training step: of train.py itself, run from here with the knobs below, not of a copy of its loop.

    python bench.py                                          GPT-2 124M on openwebtext
    python bench.py --real_data=False                        the same on random tokens; needs no dataset
    python bench.py --real_data=False --profile=True         and where the time goes: bench_profile/trace.json
    python bench.py --real_data=False --compile=False --batch_size=2 --block_size=128 --n_layer=4     a minute on a CPU
"""

import os
import runpy
import sys
import tempfile
import time

import torch

from data import bins, codec

# -- knobs ----------------------------------------------------------------------------------------------------------

batch_size = 12
block_size = 1024
bias = False
real_data = True  # False: random tokens, drawn here
seed = 1337
device = 'auto'
dtype = 'auto'
compile = True
profile = False  # print where the time goes, write a trace for ui.perfetto.dev
dataset = 'openwebtext'
n_layer = 12
n_head = 12
n_embd = 768
gradient_accumulation_steps = 1
warmup_steps = 10  # not timed: compilation, caches, clocks
steps = 20  # timed
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

if problems := [f'{name}={config[name]} must be at least 1' for name in ('warmup_steps', 'steps') if config[name] < 1]:
    fail(*problems)

# -- train.py, watched ----------------------------------------------------------------------------------------------


class Enough(Exception):
    """Raised out of train.py's loop when the last timed step is done."""


def now() -> float:
    """Seconds, when the device has caught up."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(step, model):
    """train.py calls this after every update."""
    if step == warmup_steps:
        if profile:
            profiler.start()
        times.append(now())
    elif step == warmup_steps + steps:
        times.append(now())
        if profile:
            profiler.stop()
        models.append(model)
        raise Enough


times, models = [], []
activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
profiler = torch.profiler.profile(activities=activities)
here = os.path.dirname(os.path.abspath(__file__))
with tempfile.TemporaryDirectory() as scratch:
    if not real_data:
        ids = bins.draw(20 * (block_size + 1), seed, 'bench') % 50257
        bins.write(os.path.join(scratch, 'data'), codec.GPT2Codec(), train=[ids], val=[ids])
        dataset = os.path.join(scratch, 'data')
    passed_on = ('batch_size', 'block_size', 'bias', 'seed', 'device', 'dtype', 'compile', 'dataset', 'n_layer',
                 'n_head', 'n_embd', 'gradient_accumulation_steps')
    sys.argv[1:] = [f'--{name}={globals()[name]}' for name in passed_on]
    sys.argv += [f'--out_dir={scratch}', '--eval_iters=1', f'--log_interval={warmup_steps + steps}', '--warmup_iters=0']
    try:
        runpy.run_path(os.path.join(here, 'train.py'), init_globals={'on_step': watch}, run_name='__main__')
    except Enough:
        pass

dt = (times[1] - times[0]) / steps
tokens = batch_size * block_size * gradient_accumulation_steps
if profile:
    os.makedirs('bench_profile', exist_ok=True)
    profiler.export_chrome_trace(os.path.join('bench_profile', 'trace.json'))
    key = 'self_cuda_time_total' if torch.cuda.is_available() else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))
print(f'{tokens / dt:,.0f} tokens per second')
mfu = models[0].estimate_mfu(batch_size * gradient_accumulation_steps, dt)
print(f'time per iteration: {dt * 1000:.4f}ms, MFU: {mfu * 100:.2f}%')
