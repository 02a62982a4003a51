"""
Train a GPT: from scratch, from a checkpoint, or from the published GPT-2 weights; on one device or on many.

    python train.py config/train_shakespeare_char.py
    python train.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

On several nodes, the same command on each, with its own --node_rank and the address of the first:

    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py
"""

import gc

gc.disable()  # while modules are imported here and in section 1: garbage collection takes a fifth of that time

import contextlib
import datetime
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import checkpoint as ckpt
from data.bins import Bins, draw
from data.runlog import RunLog, versions
from model import GPT, PUBLISHED, GPTConfig, captured, cosine_lr, resolve

# -- knobs ----------------------------------------------------------------------------------------------------------

out_dir = 'out'  # checkpoints and log.jsonl go here
eval_interval = 2000  # updates from one evaluation, and save, to the next
log_interval = 1  # updates from one log line to the next
eval_iters = 200  # an evaluation reads eval_iters * batch_size sequences of each split
eval_only = False  # evaluate once, write nothing, end
always_save_checkpoint = True  # ckpt.pt is the latest state; False: the best one, and last.pt a newer one
init_from = 'scratch'  # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in transformers' format
wandb_log = False  # log to wandb too
wandb_project = 'owt'
wandb_run_name = 'gpt2'
dataset = 'openwebtext'  # a folder in data/, or a path to one
gradient_accumulation_steps = 5 * 8  # micro-steps of one update, over all processes together
batch_size = 12  # sequences in a micro-step of one process
block_size = 1024  # tokens of context
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining; try 0.1 or more for small data and fine-tuning
bias = False  # in Linears and LayerNorms
learning_rate = 6e-4  # the highest, after warm-up
max_iters = 600000  # updates in all
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # AdamW
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0.0: off
decay_lr = True  # False: a constant learning_rate, no warm-up
warmup_iters = 2000  # updates of linear warm-up
lr_decay_iters = 600000  # the cosine ends here; about max_iters (Hoffmann et al. 2022)
min_lr = 6e-5  # the learning rate from then on; about learning_rate / 10
backend = 'auto'  # of torchrun's process group: nccl on GPUs, gloo elsewhere
device = 'auto'  # cuda, mps, cpu, cuda:1, ...; auto takes the first that is there
dtype = 'auto'  # float32, bfloat16 or float16; auto takes the fast one that the device computes in natively
compile = True  # torch.compile the model; where that cannot work, training goes on without
seed = 1337  # everything random follows from it and the step
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())
on_step = globals().get('on_step', lambda step, model: None)  # bench.py and tests look in from here, once an update

# -- 1 runtime: ranks, device, precision, seed ----------------------------------------------------------------------

ddp = 'RANK' in os.environ  # started by torchrun
rank, local_rank = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
first = rank == 0  # this process prints, logs and saves
shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)

problems = [message for bad, message in [
    (not dataset, 'dataset= is empty: name a folder in data/, or a path to one'),
    (batch_size < 1, f'batch_size={batch_size} must be at least 1'),
    (gradient_accumulation_steps < 1, f'gradient_accumulation_steps={gradient_accumulation_steps} must be at least 1'),
    (gradient_accumulation_steps % world_size,
     f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world_size} processes'),
    (eval_interval < 1, f'eval_interval={eval_interval} must be at least 1'),
    (log_interval < 1, f'log_interval={log_interval} must be at least 1'),
    (eval_iters < 1, f'eval_iters={eval_iters} must be at least 1'),
    (max_iters < 0, f'max_iters={max_iters} must not be negative'),
    (not 0 < learning_rate < math.inf, f'learning_rate={learning_rate} must be finite and above 0'),
    (not 0 <= min_lr < math.inf, f'min_lr={min_lr} must be finite and not negative'),
    (warmup_iters < 0, f'warmup_iters={warmup_iters} must not be negative'),
    (not 0 <= weight_decay < math.inf, f'weight_decay={weight_decay} must be finite and not negative'),
    (not (0 <= beta1 < 1 and 0 <= beta2 < 1), f'beta1={beta1} and beta2={beta2} must lie in [0, 1)'),
    (not grad_clip >= 0, f'grad_clip={grad_clip} must not be negative; 0.0 is off'),
    (init_from not in ('scratch', 'resume', *PUBLISHED) and not os.path.isfile(os.path.join(init_from, 'config.json')),
     f'init_from={init_from}: choose scratch, resume, {", ".join(PUBLISHED)}, or a folder with config.json'),
    (backend not in ('auto', 'nccl', 'gloo', 'mpi', 'xccl'), f'backend={backend}: choose auto, nccl or gloo'),
    (not 0 <= seed < 1 << 63, f'seed={seed} must lie between 0 and 2^63'),
] if bad]
try:
    GPTConfig(**shape)
except ValueError as e:
    problems += e.args
try:
    device, dtype = resolve(device, dtype)
except ValueError as e:
    problems += e.args
if problems:
    fail(*problems)

device_type = device.partition(':')[0]
if ddp:
    if device_type == 'cuda':
        device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # DDP stays on it, and the default stream cannot be captured
    if backend == 'auto':
        backend = 'nccl' if device_type == 'cuda' else 'gloo'
    dist.init_process_group(backend, device_id=torch.device(device) if backend == 'nccl' else None)
torch.manual_seed(seed)  # initial weights; the same on all ranks
torch.set_float32_matmul_precision('high')  # float32 on CUDA: TF32 matmuls
torch.use_deterministic_algorithms(device_type == 'cpu')  # a CPU run repeats to the last bit; imports the compiler
gc.freeze()  # what has been imported is no garbage: looking through it takes 0.3 s each time
gc.enable()
torch.utils.deterministic.fill_uninitialized_memory = False
autocast = contextlib.nullcontext if dtype == 'float32' else lambda: torch.autocast(device_type, getattr(torch, dtype))
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
if first:
    print(f'device {device}, dtype {dtype}, processes {world_size}')
    print(f'tokens per iteration will be: {tokens_per_iter:,}')

# -- 2 data and out_dir ---------------------------------------------------------------------------------------------

bins = Bins(dataset, block_size)
if first and not eval_only and init_from != 'resume':
    ckpt.claim(out_dir)


def to_device(tensor):
    """A copy on the device; to a GPU it overlaps with what the host does next."""
    return tensor.pin_memory().to(device, non_blocking=True) if device_type == 'cuda' else tensor.to(device)


# -- 3 model: scratch, resume, gpt2 ---------------------------------------------------------------------------------

iter_num, best_val_loss, resumed = 0, math.inf, None  # iter_num: updates done, so the index of the next one
try:
    if init_from == 'scratch':
        vocab_size = 50304 if bins.tokenizer == 'gpt2' else bins.vocab_size
        raw_model = GPT(GPTConfig(**shape, vocab_size=vocab_size))
    elif init_from == 'resume':
        resumed = ckpt.newest(out_dir)
        if resumed is None:
            fail(f'init_from=resume: no ckpt.pt or last.pt in out_dir={out_dir}; {ckpt.earlier(out_dir)}start with '
                 '--init_from=scratch')
        if (stored := resumed['model_args'].get('block_size', block_size)) != block_size:
            fail(f'block_size={block_size}, but the checkpoint has {stored}: resume with --block_size={stored}')
        for line in ckpt.differences(resumed, config) if first else ():
            print(line)
        raw_model = GPT.from_checkpoint(resumed, dropout=dropout)
        iter_num, best_val_loss = resumed['iter_num'], float(resumed.get('best_val_loss', math.inf))
    else:
        raw_model = GPT.from_pretrained(init_from, {'dropout': dropout})
        if block_size != raw_model.config.block_size:
            raw_model.crop_block_size(block_size)
except ValueError as e:
    fail(*e.args)
vocab_size = raw_model.config.vocab_size
if bins.vocab_size > vocab_size or (bins.tokenizer == 'char' and bins.vocab_size != vocab_size):
    fail(f'dataset={dataset} has {bins.vocab_size} token ids ({bins.tokenizer}), the model {vocab_size}: no match')
if resumed and resumed.get('codec', bins.state) != bins.state:
    fail(f'dataset={dataset} has other tokens than the run in out_dir={out_dir}, though as many: no match')
if first and not eval_only and (moved := ckpt.claim(out_dir, fresh=init_from != 'resume')):
    print(f'an earlier run stood in {out_dir}; kept as {", ".join(moved)}')
model_args = {key: getattr(raw_model.config, key) for key in (*shape, 'vocab_size')}
raw_model.to(device)
if first:
    print(f'number of parameters: {raw_model.get_num_params() / 1e6:.2f}M')

# -- 4 optimizer, compile, DDP --------------------------------------------------------------------------------------

optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
if resumed:  # moments and steps from the file, every hyperparameter from the knobs
    if misfit := ckpt.misfit(optimizer, resumed.get('optimizer')):
        fail(f'the optimizer state of the checkpoint in out_dir={out_dir} does not fit its model: {misfit}')
    groups = optimizer.state_dict()['param_groups']
    optimizer.load_state_dict({'state': resumed['optimizer']['state'], 'param_groups': groups})
    if scaler.is_enabled() and resumed.get('scaler'):
        scaler.load_state_dict(resumed['scaler'])
    resumed = True  # its tensors live in model and optimizer now
if compile:
    try:
        tried = torch.compile(lambda t: t + torch.compiler.is_compiling())(torch.zeros(1, device=device))
        compile = tried.item() == 1  # 0 with TORCHDYNAMO_DISABLE=1
        # cut the graph for DDP: a piece's gradients are exchanged while the backward pass of those before it goes on.
        # With dropout it stays whole, since masks depend on the cuts and must not depend on the number of processes
        torch._dynamo.config.optimize_ddp = dropout == 0
    except Exception as e:  # no compiler, no Triton, an unsupported Python or platform
        compile = False
        if first:
            print(f'torch.compile does not work here ({type(e).__name__}); going on without it')
# the order: compile raw_model, DDP around that; evaluation calls raw_model, where one compiled block serves for all
model = torch.compile(raw_model, dynamic=False) if compile else raw_model
for block in raw_model.transformer.h if compile else ():
    block.compile(dynamic=False)
if ddp:
    # the MB of gradients in a piece of a compiled graph: few large ones, since each cut costs time
    model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=250 if compile else None)

# -- 5 evaluate, save -----------------------------------------------------------------------------------------------


def mean_over_ranks(*values):
    """Each value averaged over all processes, as floats; waits for the device."""
    mean = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=device) for v in values]) / world_size
    if ddp:
        dist.all_reduce(mean)
    return mean.tolist()


@torch.no_grad()
def evaluate():
    """Mean loss of each split over its eval_iters * batch_size evaluation sequences, which the ranks share out."""
    raw_model.eval()
    count, sums = eval_iters * batch_size, {}
    # larger batches than in training keep a device busy with a small model, as long as their logits stay small
    fit = min((1 << 17 if device_type == 'cuda' else 1 << 13) // block_size, (1 << 28) // (block_size * vocab_size))
    rows = min(max(fit, batch_size), -(-count // world_size))
    for split in ('train', 'val'):
        sums[split] = torch.zeros((), device=device)
        for x, y, n in bins.eval_batches(split, count, rows, rank, world_size):
            with autocast():
                sums[split] += n * raw_model(to_device(x), to_device(y), keep_logits=False)[1]
    raw_model.train()
    return {split: total * world_size / count for split, total in zip(sums, mean_over_ranks(*sums.values()))}


def save(name):
    """Write the whole state of the run to out_dir/name; a last.pt that is no further on has then served its time."""
    if not first:
        return
    print(f'saving checkpoint to {out_dir}')
    optimizer_state = optimizer.state_dict()
    for group in optimizer_state['param_groups']:
        group.update(lr=lr, capturable=False)  # plain values, whatever the device needed
    ckpt.save(os.path.join(out_dir, name), {
        'model': dict(raw_model.state_dict()), 'optimizer': optimizer_state, 'model_args': model_args,
        'iter_num': iter_num, 'best_val_loss': best_val_loss, 'config': config, 'gelu': raw_model.config.gelu,
        'codec': bins.state, 'scaler': scaler.state_dict(), 'dtype': dtype})
    if name == 'ckpt.pt':
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, 'last.pt'))


def lr_at(step):
    """Learning rate of an update."""
    return cosine_lr(step, learning_rate, warmup_iters, lr_decay_iters, min_lr) if decay_lr else learning_rate


def part():
    """End the process group, all ranks together: gloo's threads, too, must be done before Python itself ends."""
    if ddp:
        dist.barrier()
        dist.destroy_process_group()


def check_finite(*losses):
    """End the run on all ranks, before anything is saved, if a gradient since last time or a loss is not finite."""
    steps = range(iter_num - len(norms), iter_num)
    values = dict(zip(steps, torch.stack(norms).tolist() if norms else ()))
    norms.clear()
    # float16 skips an update with such a gradient and lowers its loss scale; normal as long as that stays above 1
    bad = [step for step, norm in values.items() if not (math.isfinite(norm) or scaler.is_enabled())]
    if bad or scaler.get_scale() < 1 or not all(map(math.isfinite, losses)):
        at = bad[0] if bad else iter_num - 1
        part()
        sys.exit(f'iter {at}: gradient norm {values.get(at)}, loss {losses}, lr {lr_at(at):.3e}, loss scale '
                 f'{scaler.get_scale():g}: ended without a save; a lower learning_rate may help' if first else 1)


# -- 6 an update ----------------------------------------------------------------------------------------------------

micro_steps = gradient_accumulation_steps // world_size
loss_sum = torch.zeros((), device=device)  # of an update, this rank's share


def forward_backward(x, y):
    """One micro-step: gradients add up in the parameters, its part of the mean loss in loss_sum."""
    with autocast():
        _, loss = model(x, y, keep_logits=False)
    scaler.scale(loss / micro_steps).backward()
    loss_sum.add_(loss.detach() / micro_steps)


def clip_and_step():
    """Finish and clip gradients, update parameters and their copies, clear gradients; returns the norm from before."""
    if copies:
        raw_model.unfold_gradients()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not (capture or copies))
    if copies:
        raw_model.copy_weights(getattr(torch, dtype))
    return norm


accumulate = forward_backward  # the micro-steps that exchange no gradients
# small kernels wait for their launch; replayed as one CUDA graph they hardly do. Large ones need no help, float16's
# scaler waits for the device, an exchange in a graph could hang unnoticed, and on AMD one beside a capture breaks it
work = raw_model.flops_per_token() * batch_size * block_size
capture = device_type == 'cuda' and work < 2e13 and not scaler.is_enabled() and not (
    ddp and (micro_steps == 1 or torch.version.hip))  # pytorch #177309
# compiled steps in 16 bits read copies of the weights, and add to gradients that are there
copies = compile and dtype != 'float32' and not eval_only and raw_model.copy_weights(getattr(torch, dtype))
for p in raw_model.parameters() if copies else ():
    p.grad = torch.zeros_like(p)
if capture:
    for group in optimizer.param_groups:
        group.update(lr=torch.tensor(learning_rate, device=device), capturable=True)
    # the first update compiles and makes the optimizer's state. A graph holds addresses, and DDP moves the gradients
    # into its buckets in the first update, and into others, ordered anew, in the second
    updates = 1 + ddp
    accumulate = captured(forward_backward, torch.device(device), warm=updates * (micro_steps - ddp))
    clip_and_step = captured(clip_and_step, torch.device(device), warm=updates)

# -- 7 the loop -----------------------------------------------------------------------------------------------------

finished = bool(resumed) and iter_num >= max_iters and not eval_only
if finished and first:
    print(f'the checkpoint has done {iter_num} of max_iters={max_iters} updates: nothing to do')
header = {**versions(), 'config': config, 'torch': torch.__version__, 'dtype': dtype, 'compile': compile,
          'capture': capture, 'processes': world_size,
          'device': torch.cuda.get_device_name(device) if device_type == 'cuda' else device}
writes = first and not (eval_only or finished)
log = RunLog(os.path.join(out_dir, 'log.jsonl') if writes else None, header, resumed_at=iter_num,
             wandb={'project': wandb_project, 'name': wandb_run_name} if wandb_log else None)

signals = []  # the first SIGTERM or SIGINT asks for an orderly end, a second one has its usual effect


def on_signal(number, frame):
    signals.append(number)
    if first:  # print() is not safe in here
        os.write(2, b'finishing this update; a second signal quits at once\n')
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


signal.signal(signal.SIGTERM, on_signal)
signal.signal(signal.SIGINT, on_signal)

norms = []  # gradient norms since check_finite, on the device
mfu, eval_time = -1.0, 0.0
started_at, saved_at = iter_num, iter_num if resumed else 0
logged_at, spent, clock = iter_num, 0.0, time.perf_counter()  # trained since the last log line: spent + now - clock
raw_model.train()

while not finished:
    lr = lr_at(iter_num)
    for group in optimizer.param_groups:
        if capture:
            group['lr'].fill_(lr)  # the graph reads this very tensor
        else:
            group['lr'] = lr

    # evaluate and save; the time this takes is not training time
    if iter_num % eval_interval == 0 or iter_num == max_iters or eval_only:
        check_finite()
        spent, clock = spent + time.perf_counter() - clock, time.perf_counter()
        losses = evaluate()
        check_finite(*losses.values())
        if first:
            print(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
        if eval_only:
            break
        log.write('eval', **{'iter': iter_num, 'train/loss': losses['train'], 'val/loss': losses['val'], 'lr': lr,
                             'mfu': 100 * mfu})
        improved = losses['val'] < best_val_loss
        best_val_loss = min(losses['val'], best_val_loss)
        if iter_num > saved_at or (improved and resumed):  # or a signal had it saved as last.pt before it was evaluated
            save('ckpt.pt' if improved or always_save_checkpoint else 'last.pt')
            saved_at = iter_num
        eval_time, clock = time.perf_counter() - clock, time.perf_counter()
    if iter_num >= max_iters:
        break

    # one update from all micro-steps
    loss_sum.zero_()
    for m in range(micro_steps):
        row = m * world_size + rank
        x, y = bins.train_batch(seed, iter_num, row, gradient_accumulation_steps, batch_size)
        if dropout > 0:
            torch.manual_seed(int(draw(1, seed, 'dropout', iter_num, row)[0]))
        exchange = ddp and m == micro_steps - 1  # gradients are exchanged in the last backward pass
        if ddp:
            model.require_backward_grad_sync = exchange
        (forward_backward if exchange else accumulate)(to_device(x), to_device(y))
    norms.append(clip_and_step().clone())
    iter_num += 1
    on_step(iter_num, raw_model)

    # log; the ranks also agree here on whether one of them was told to stop
    stop = bool(signals) and not ddp
    if (iter_num - 1) % log_interval == 0:
        norm = float(norms[-1])
        loss, stop = mean_over_ranks(loss_sum, float(bool(signals)))
        check_finite(loss)
        dt = (spent + time.perf_counter() - clock) / (iter_num - logged_at)
        logged_at, spent, clock = iter_num, 0.0, time.perf_counter()
        if iter_num - started_at > 5:  # the first few are slower: compilation, caches
            now = raw_model.estimate_mfu(batch_size * micro_steps, dt)
            mfu = now if mfu < 0 else 0.9 * mfu + 0.1 * now
        left = datetime.timedelta(seconds=int((max_iters - iter_num) * (dt + eval_time / eval_interval)))
        if first:
            print(f'iter {iter_num - 1}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {mfu * 100:.2f}%, '
                  f'{tokens_per_iter / dt:,.0f} tok/s' + (f', {left} left' if iter_num - started_at > 1 else ''))
        log.write('train', iter=iter_num - 1, loss=loss, lr=lr, norm=norm, ms=dt * 1000)
    if stop:
        check_finite()
        if iter_num > saved_at:
            save('ckpt.pt' if always_save_checkpoint else 'last.pt')
        if first:
            print(f'stopped by a signal after {iter_num} updates; --init_from=resume goes on from here')
        break

log.close()
part()
