"""
Time what train.py and sample.py really do, beside what the hardware can do. Nothing here is a copy of their loops.

    python bench.py                                       a training step of GPT-2 124M on openwebtext
    python bench.py --real_data=False --compare=True      on random tokens, and transformers' GPT-2 beside it
    python bench.py --real_data=False --profile=True      where the time goes; a trace in bench_profile/trace.json
    python bench.py --mode=sample --batch_size=1          tokens per second of generation
    python bench.py --without=FusedLoss,Dropout16         without these parts of fast.py; --without=fast: without all
    python bench.py --estimate=True --gpu=H100            what a shape would take on 1, 2, 8, 64 of them; runs nothing
    torchrun --standalone --nproc_per_node=8 bench.py --real_data=False --gradient_accumulation_steps=8      scaling
    python bench.py --real_data=False --compile=False --batch_size=2 --block_size=128 --n_layer=4     a minute on a CPU
"""

try:
    import fast
except ModuleNotFoundError:
    fast = None
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from data import bins, codec, leave
from data.ranks import launched
from model import PEAK_TFLOPS, GPT, GPTConfig, sample_ids

# -- options --------------------------------------------------------------------------------------------------------

mode = 'train'  # train: steps of train.py; sample: tokens, as sample.py draws them
batch_size = 12  # sequences in a micro-step of one process; in mode=sample, samples at once
block_size = 1024  # tokens of context
bias = False  # in Linears and LayerNorms
real_data = True  # False: random tokens, drawn here
seed = 1337  # of weights and random tokens
device = 'auto'  # cuda, mps, cpu, cuda:1, ...; auto takes the first that is there
dtype = 'auto'  # float32, bfloat16, float16; auto: as train.py
compile = True  # in mode=sample: of a decoding step
profile = False  # print where the time goes, write a trace for ui.perfetto.dev
without = ''  # parts of fast.py to leave out, by name and separated by commas
estimate = False  # print memory and time on 1, 2, 8 and 64 GPUs, by the formulas of estimate_gpus()
gpu = 'H200'  # with estimate=True: a kind, by the names in GPUS
compare = False  # time plain code beside it: transformers' GPT-2; in mode=sample also a loop without a cache
dataset = 'openwebtext'  # with real_data: a folder in data/, or a path to one
n_layer = 12  # blocks
n_head = 12  # heads of attention in a block
n_embd = 768  # channels: the width of the model
dropout = 0.0  # while training
shard = False  # as in train.py
recompute = False  # as in train.py
deterministic = False  # as in train.py
gradient_accumulation_steps = 1  # micro-steps of one update, over all processes together
warmup_steps = 10  # not timed: compilation, caches, clocks
steps = 20  # timed
prompt_tokens = 16  # mode=sample: length of the prompt
max_new_tokens = 256  # mode=sample: tokens to time
top_k = 200  # mode=sample: draw among the k likeliest; 0: all
vocab_size = 50304  # mode=sample: 65 is that of the Shakespeare configs; 50304 draws among GPT-2's 50257
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), 'configurator.py'), encoding='utf-8').read())

at_least(1, 'warmup_steps', 'steps', 'batch_size', 'block_size', 'prompt_tokens', 'max_new_tokens', 'vocab_size',
         'gradient_accumulation_steps')
need(mode in ('train', 'sample'), f'mode={mode}: choose train or sample')
need(top_k >= 0, f'top_k={top_k} must not be negative; 0 is off')
need(mode == 'train' or not compare or prompt_tokens + max_new_tokens <= block_size,
     f'compare=True: {prompt_tokens} + {max_new_tokens} tokens do not fit in block_size={block_size}')
for name in filter(None, without.split(',')):
    named = fast and re.search(rf'^    (\w+, )*{re.escape(name)}[, ]', fast.__doc__, re.M)  # in the table there
    need(name == 'fast' or named, f'without={name}: fast.py has none')
gpt2 = dict(block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, dropout=dropout, bias=bias)
note_mistakes(GPTConfig, **gpt2)
GPUS = {'A100': (2.0, 80, 200), 'H100': (3.35, 80, 300), 'H200': (4.8, 141, 300), 'B200': (8.0, 180, 600),
        'L40S': (0.86, 48, 20), 'RTX 4090': (1.01, 24, 20)}  # TB/s, GB: memory, by their datasheets; GB/s to another
need(gpu in GPUS, f'gpu={gpu}: choose {", ".join(GPUS)}')
where, number_format = resolve(device, dtype)
end_if_wrong()
where, number_format = torch.device(where), getattr(torch, number_format)
if fast:
    fast.left_out.update(without.split(','))
if 'fast' in without.split(','):
    fast = sys.modules['fast'] = None  # train.py will not find it either
cuda = where.type == 'cuda'


def now() -> float:
    """Seconds, when the device has caught up."""
    getattr(torch, where.type).synchronize()
    return time.perf_counter()


def seconds(work, repeats: int = 5) -> float:
    """Median duration of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = now()
        work()
        times.append(now() - start)
    return statistics.median(times[1:])


def measure_ceilings() -> float:
    """Print what a large matmul and a large copy reach here; returns the matmul's FLOP/s."""
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=where, dtype=number_format) for _ in range(2))
    peak = 2 * n**3 / seconds(lambda: a @ b, 20)
    block = torch.empty(1 << 30 if cuda else 1 << 26, dtype=torch.uint8, device=where)
    bandwidth = 2 * block.numel() / seconds(block.clone, 20)
    name = torch.cuda.get_device_name(where) if cuda else f'CPU, {torch.get_num_threads()} threads'
    print(f'{name}, torch {torch.__version__}: {number_format} matmul of {n}^3 {peak / 1e12:.2f} TFLOP/s, '
          f'copy {bandwidth / 1e9:.0f} GB/s read and written')
    return peak


def transformers_gpt2(vocab_size: int):
    """transformers' GPT-2 of the same shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        n_positions=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, loss_type='ForCausalLM', bos_token_id=None,
        eos_token_id=None)).to(where)


# -- a training step ------------------------------------------------------------------------------------------------

KINDS = {'attention': ('flash', 'fmha', 'sdpa', 'attention', 'cudnn::fusion', 'aten::_softmax'),
         'matmul': ('nvjet', 'gemm', 'cutlass', 'splitk', '::mm', 'bmm', 'addmm'),
         'optimizer and clipping': ('adam', 'multi_tensor', 'norm_kernel', 'foreach'),
         'loss': ('softmax', 'cross_entropy', 'nll', 'loss_kernel'), 'GELU': ('gelu', 'exp2'),
         'LayerNorm': ('layer_norm',), 'embedding': ('embedding', 'index_put', 'index_add', 'scatter'),
         'copies': ('memcpy', 'memset', 'copy')}


def time_train() -> tuple[float, int]:
    """Seconds per update of train.py, run with our options and watched through on_step, and its model's vocab_size."""
    class Enough(Exception):
        """Raised out of train.py's loop when the last timed step is done."""

    times = []
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    profiler = torch.profiler.profile(activities=activities, acc_events=True) if profile and rank == 0 else None

    def watch(step, model):
        if step == warmup_steps:
            if profiler:
                profiler.start()
            times.append(now())
        elif step == warmup_steps + steps:
            times.append(now())
            if profiler:
                profiler.stop()
            raise Enough(model)

    here = os.path.dirname(os.path.realpath(__file__))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        source = dataset
        if not real_data:
            source = os.path.join(scratch, 'data')
            ids = bins.draw(64 * (block_size + 1), seed, 'bench') % 50257
            bins.write(source, codec.BPECodec(), train=[ids], val=[ids])
        names = ('batch_size', 'block_size', 'bias', 'seed', 'device', 'dtype', 'compile', 'n_layer', 'n_head',
                 'n_embd', 'dropout', 'gradient_accumulation_steps', 'shard', 'recompute', 'deterministic')
        sys.argv = ['train.py', *(f'--{name}={config[name]}' for name in names), f'--dataset={source}',
                    f'--out_dir={scratch}', '--eval_iters=1',
                    *(f'--{name}={warmup_steps + steps}' for name in ('log_interval', 'max_iters'))]
        try:
            runpy.run_path(os.path.join(here, 'train.py'), init_globals={'on_step': watch}, run_name='__main__')
        except Enough as e:
            model, = e.args
    if profiler:
        show_profile(profiler)
    dt = (times[1] - times[0]) / steps
    tokens = batch_size * block_size * gradient_accumulation_steps
    most = torch.cuda.max_memory_allocated() + (fast.uncounted if fast else 0)
    memory = f', peak memory {most / 2**30:.1f} GiB' if cuda else ''
    share = model.flops_per_token() * tokens / dt / peak / world_size
    print(f'{tokens / dt:,.0f} tok/s, {share:.1%} of the measured matmul peak{memory}')
    mfu = model.estimate_mfu(batch_size * gradient_accumulation_steps / world_size, dt)
    print(f'time per iteration: {dt * 1000:.4f}ms, MFU: {mfu * 100:.2f}%')
    return dt, model.config.vocab_size


def time_alone() -> float | None:
    """Seconds per update of one process with the micro-steps of one, by rank 0; the others wait for it to join them."""
    if rank > 0 or world_size == 1 or gradient_accumulation_steps % world_size:
        return None
    env = {key: value for key, value in os.environ.items() if 'RANK' not in key and 'TORCHELASTIC' not in key}
    share = f'--gradient_accumulation_steps={gradient_accumulation_steps // world_size}'
    command = [sys.executable, *sys.argv, share, '--shard=False', '--profile=False', '--compare=False']
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    found = re.search(r'time per iteration: ([\d.]+)ms', done.stdout)
    if not found:  # where a model needs sharding, it does not fit
        print('one process alone cannot do it:', *done.stderr.strip().splitlines()[-1:])
    return float(found[1]) / 1e3 if found else None


def estimate_gpus() -> None:
    """
    Print what an update would take on 1, 2, 8 and 64 GPUs: memory of each, time. Each GPU does its share of the
    micro-steps, rounded up. N parameters, L blocks, C channels, V tokens in the vocabulary, n GPUs; in bfloat16,
    compiled, with fast.py and no dropout.

    memory     18 N bytes: weights, gradients, two moments in float32, a copy of the weights in 16 bits; a GPU has its
               share of the moments, with shard=True of all. And a token of a micro-step 28 L C, the 14 C numbers that
               a block keeps for its backward pass, with recompute=True 2 L C + 28 C; and 2 V, the logits
    compute    FLOPs at 0.707 of the peak, and 235 L C bytes of memory traffic a token: fitted to 124M and 1.5B on
               H200s; a third more with recompute=True
    optimizer  92 N bytes of memory traffic an update, fitted too; of 40 N each does its share, with shard=True of all
    exchange   8 N (n - 1) / n bytes, in GPUS between those of a host (two thirds of NVLink, or PCIe 4), at
               40 GB/s between hosts of 8; with shard=True in every micro-step. Checked on H100s and H200s
    """
    vocab, tokens, wide = 50304, batch_size * block_size, n_layer * n_embd
    with torch.device('meta'):
        model = GPT(GPTConfig(**gpt2, vocab_size=vocab))
    N, (bandwidth, size, link) = model.get_num_params(non_embedding=False), GPUS[gpu]
    token = model.flops_per_token() / (0.707e12 * PEAK_TFLOPS[gpu]) + 235e-12 * wide / bandwidth
    token *= 4 / 3 if recompute else 1
    kept = 2 * wide + 28 * n_embd if recompute else 28 * wide
    print(f'{gpu}, {N / 1e6:.1f}M parameters, micro-steps of {batch_size} x {block_size}')
    for n in (1, 2, 8, 64):
        micro_steps = -(-gradient_accumulation_steps // n)
        memory = (18 * N / n if shard else (10 + 8 / n) * N) + tokens * (kept + 2 * vocab)
        work = micro_steps * tokens * token + 1e-12 * (92 * N / n if shard else (52 + 40 / n) * N) / bandwidth
        dt = work + (micro_steps if shard else 1) * 8 * N * (n - 1) / n / (link if n <= 8 else min(link, 40)) / 1e9
        print(f'{n:2} x {micro_steps} micro-steps: {memory / 2 ** 30:.1f} GiB each'
              f'{"" if memory < 0.95e9 * size else " (more than there is)"}, {dt * 1e3:.1f} ms an update, '
              f'{n * micro_steps * tokens / dt:,.0f} tok/s, exchange {1 - work / dt:.1%}')


def show_profile(profiler) -> None:
    """A table of device time by kind of work, and the trace."""
    os.makedirs('bench_profile', exist_ok=True)
    profiler.export_chrome_trace(os.path.join('bench_profile', 'trace.json'))
    kinds, costly = {}, []
    for event in profiler.key_averages():
        kernel = event.device_type == torch.autograd.DeviceType.CUDA
        spent = (event.self_device_time_total if kernel else event.self_cpu_time_total) / 1e3 / steps  # ms
        if spent and kernel == cuda and not event.is_user_annotation:
            name = event.key.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), 'other')
            kinds[kind] = kinds.get(kind, 0) + spent
            costly.append((spent, event.count // steps, event.key))
    whole = sum(kinds.values())
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f'{kind:24}{spent:10.3f} ms a step{spent / whole:8.1%}')
    for spent, count, key in sorted(costly, reverse=True)[:25]:
        print(f'  {spent:8.3f} ms {count:4} x {key[:100]}')


def time_plain_train(vocab_size: int) -> float:
    """Seconds per update of transformers' GPT-2 in a plain loop: autocast, fused AdamW, clipping; compiled as ours."""
    model = transformers_gpt2(vocab_size)
    forward = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(min(vocab_size, 50257), (batch_size, block_size), device=where)

    def update():
        for _ in range(gradient_accumulation_steps):
            with torch.autocast(where.type, number_format, enabled=number_format != torch.float32):
                loss = forward(ids, labels=ids).loss
            (loss / gradient_accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(warmup_steps):
        update()
    start = now()
    for _ in range(steps):
        update()
    return (now() - start) / steps


# -- generation -----------------------------------------------------------------------------------------------------

def time_sample() -> None:
    """Print tokens per second of GPT.generate, and of what else does the same."""
    model = GPT(GPTConfig(**gpt2, vocab_size=vocab_size)).eval().to(where, number_format)
    known = min(vocab_size, 50257)
    prompt = torch.randint(known, (batch_size, prompt_tokens), device=where)
    made = batch_size * max_new_tokens

    def report(what, dt, than=None):
        print(f'{what}: {made / dt:,.0f} tok/s, {dt / max_new_tokens * 1e3:.3f} ms a step, {dt:.2f} s'
              + (f'; {dt / than:.1f} times as long as ours' if than else ''))
        return dt

    stream, how = (fast or GPT).stream, dict(compiled=compile, spare=free_memory(where.type)) if fast else {}
    ours = report(f'generate, {batch_size} x {max_new_tokens} tokens', seconds(
        lambda: list(stream(model, prompt, max_new_tokens, top_k=top_k, vocab_size=known, **how))))
    if not compare:
        return

    few = min(max_new_tokens, 64)

    @torch.inference_mode()
    def no_cache():  # not the whole length, but the same mean context
        idx = torch.randint(known, (batch_size, prompt_tokens + (max_new_tokens - few) // 2), device=where)
        for _ in range(few):
            logits = model(idx[:, -block_size:])[0][:, -1]
            ids = sample_ids(logits.float(), torch.rand(batch_size, device=where), 1.0, top_k, 1.0)
            idx = torch.cat((idx, ids[:, None]), dim=1)

    report('a loop without a cache', seconds(no_cache, 1) * max_new_tokens / few, ours)
    hf = transformers_gpt2(vocab_size).eval().to(number_format)
    cache = {'cache_implementation': 'static'} if cuda else {}
    report(f'transformers, {"compiled static" if cuda else "its"} cache', seconds(lambda: hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=top_k, max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens, pad_token_id=0, **cache), 2), ours)


several, rank, local_rank, world_size = launched()
if rank > 0:
    sys.stdout = open(os.devnull, 'w')  # under torchrun the first process speaks
if estimate:
    sys.exit(estimate_gpus())
if cuda:
    where = torch.device('cuda', local_rank if several else where.index or 0)
    torch.cuda.set_device(where)
peak = measure_ceilings()
if mode == 'sample':
    time_sample()
else:
    alone = time_alone()
    ours, trained_vocab = time_train()
    if alone:
        print(f'one process with its share{", not sharded," * shard} takes {alone * 1000:.4f}ms: {world_size} do '
              f'{world_size * alone / ours:.2f} times its work, and {max(0, 1 - alone / ours):.1%} of the time is '
              'communication and waiting')
    if compare:
        plain = time_plain_train(trained_vocab)
        print(f'transformers, {"compiled" if compile else "eager"}, same batch: {plain * 1000:.4f}ms, '
              f'{plain / ours:.3f} times as long as ours')
leave(at_once=world_size > 1)
