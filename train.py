"""
Train a GPT: from scratch, from a checkpoint, or from the published GPT-2 weights; on one device or on many. The last
line runs on each of two nodes, with its own --node_rank; the address is that of the first.

    python train.py config/train_shakespeare_char.py
    python train.py --batch_size=32 --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 train.py
"""

try:
    import fast  # speed only; before torch, because it also makes imports faster
except ModuleNotFoundError:  # deleted: everything works without it
    fast = None
import contextlib
import math
import os

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import checkpoint as ckpt, codec, leave, unlock, versions
from data.bins import Bins, draw
from data.ranks import Stop, agreed, join_ranks, launched, mean_over_ranks
from data.runlog import RunLog, Stopwatch, claim
from model import GPT, PUBLISHED, GPTConfig

# -- options --------------------------------------------------------------------------------------------------------

out_dir = 'out'  # checkpoints, log.jsonl and loss.png go here
eval_interval = 2000  # evaluate and save every so many updates
log_interval = 1  # print and log every so many updates
eval_iters = 200  # an evaluation reads eval_iters * batch_size sequences of each split
eval_only = False  # evaluate once, write nothing, end
always_save_checkpoint = True  # False: ckpt.pt only on a new best val loss, other states go to last.pt
init_from = 'scratch'  # resume; auto: go on, or begin; gpt2, gpt2-medium, -large, -xl; or a folder of transformers
wandb_log = False  # send what log.jsonl gets to wandb, too
wandb_project = 'owt'  # the project of the run in wandb
wandb_run_name = 'gpt2'  # its name there
dataset = 'openwebtext'  # a folder in data/, or a path to one
gradient_accumulation_steps = 5 * 8  # micro-steps of one update, over all processes together
batch_size = 12  # sequences in a micro-step of one process
block_size = 1024  # tokens of context
n_layer = 12  # blocks
n_head = 12  # heads of attention in a block; n_embd must be a multiple
n_embd = 768  # channels: the width of the model
dropout = 0.0  # 0 for pretraining; try 0.1 or more for small data and fine-tuning
bias = False  # in Linears and LayerNorms
learning_rate = 6e-4  # the highest, after warm-up
max_iters = 600000  # updates in all
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # of AdamW's mean of gradients
beta2 = 0.95  # of its mean of squares
grad_clip = 1.0  # largest norm of the gradient; 0.0: off
decay_lr = True  # False: a constant learning_rate, no warm-up
warmup_iters = 2000  # updates of linear warm-up
lr_decay_iters = 600000  # the cosine ends here; about max_iters (Hoffmann et al. 2022)
min_lr = 6e-5  # the learning rate from then on; about learning_rate / 10
backend = 'auto'  # of torchrun's process group: nccl on GPUs, gloo elsewhere
device = 'auto'  # cuda, mps, cpu, cuda:1, ...; auto takes the first that is there
dtype = 'auto'  # float32, bfloat16, float16; auto: bfloat16 where native, else float16 on CUDA, float32 elsewhere
compile = True  # torch.compile the model; where that cannot work, training goes on without
shard = False  # under torchrun, each rank keeps a part of parameters, gradients and moments: for models that do not fit
recompute = False  # keep only the inputs of blocks for the backward pass, and compute the rest again: less memory
seed = 1337  # all that training draws follows from it and the step
deterministic = False  # on CUDA, too, sums in one order, so that a run repeats to the last bit; slower there
# applies config files and --key=value; defines config, and what is called below and not imported: need, resolve, ...
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), 'configurator.py'), encoding='utf-8').read())
on_step = globals().get('on_step', lambda step, model: None)  # bench.py and tests pass their own, to watch a run

# -- 1 check the options; the machine: ranks, device, precision, seed -----------------------------------------------

ddp, rank, local_rank, world_size = launched()
master = rank == 0  # the process that prints, logs and saves
stop = Stop(speaks=master)  # whether a signal has asked for an orderly end
say = stop.say  # print(), on the master alone
shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)

need(dataset, 'dataset= is empty: name a folder in data/, or a path to one')
at_least(1, 'batch_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval', 'eval_iters')
at_least(0, 'max_iters', 'warmup_iters', 'weight_decay', 'min_lr', 'grad_clip')
need(0 <= seed < 1 << 63, f'seed={seed} must lie between 0 and 2^63')
need(gradient_accumulation_steps % world_size == 0,
     f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world_size} processes')
need(0 < learning_rate < math.inf, f'learning_rate={learning_rate} must be finite and above 0')
need(0 <= beta1 < 1 and 0 <= beta2 < 1, f'beta1={beta1} and beta2={beta2} must lie in [0, 1)')
need(init_from in ('scratch', 'resume', 'auto', *PUBLISHED) or os.path.isfile(os.path.join(init_from, 'config.json')),
     f'init_from={init_from}: choose scratch, resume, auto, {", ".join(PUBLISHED)}, or a folder with config.json')
need(backend in ('auto', 'nccl', 'gloo', 'mpi', 'xccl'), f'backend={backend}: choose auto, nccl or gloo')
note_mistakes(GPTConfig, **shape)
device, dtype = resolve(device, dtype)
need(not shard or ddp and dtype != 'float16', f'shard=True needs torchrun, and bfloat16 or float32 (dtype={dtype})')
end_if_wrong()  # with a line for each mistake above

device_type = device.partition(':')[0]
os.environ |= {'CUBLAS_WORKSPACE_CONFIG': ':4096:8', 'NCCL_ALGO': 'Ring'} if deterministic else {}  # one order of sums
device, backend = join_ranks(ddp, device, backend, local_rank)
params = 12 * n_layer * n_embd ** 2 + block_size * n_embd  # without wte; each with a gradient and two moments: 16 bytes
least = 16 * params // (world_size if shard else 1) + 2 * n_layer * n_embd * batch_size * block_size  # and activations
least += 8 * batch_size * max(eval_iters, gradient_accumulation_steps)  # random numbers for the places of sequences
if init_from in ('scratch', 'auto') and least > (free := free_memory(device)):
    fail(f'n_layer={n_layer}, n_embd={n_embd}, block_size={block_size}, batch_size={batch_size}, eval_iters='
         f'{eval_iters} take {least / 1e9:,.1f} GB of memory or more, {free / 1e9:,.1f} GB are free: take less')
torch.manual_seed(seed)  # initial weights; the same on all ranks
torch.set_float32_matmul_precision('high')  # float32 on CUDA: TF32 matmuls
torch.use_deterministic_algorithms(deterministic or device_type == 'cpu')  # a CPU run repeats to the last bit
torch.utils.deterministic.fill_uninitialized_memory = False  # a costly extra of that mode, which nothing here needs
number_format = getattr(torch, dtype)
autocast = contextlib.nullcontext if dtype == 'float32' else lambda: torch.autocast(device_type, number_format)
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
say(f'device {device}, dtype {dtype}, processes {world_size}')

# -- 2 data and model: scratch, resume, gpt2 ------------------------------------------------------------------------

bins = Bins(dataset, block_size)
whole = 0 if eval_only else max_iters * tokens_per_iter
say(f'tokens per iteration will be: {tokens_per_iter:,}'
    + (f'; in all {whole:,}, {whole / len(bins.tokens["train"]):,.2f} times the train part' if whole else ''))
if master and not eval_only and init_from != 'resume':
    claim(out_dir)  # if it cannot be written, that should be known before a model is fetched
iter_num, best_val_loss, stored = 0, math.inf, {}  # iter_num: updates done, so the index of the next one
try:
    if init_from in ('resume', 'auto'):
        stored = ckpt.to_resume(out_dir, config, bins.digests, say, mmap=shard or device_type != 'cpu')
    if resumed := bool(stored):
        raw_model = GPT.from_checkpoint(stored, dropout=dropout)
        iter_num, best_val_loss = stored['iter_num'], float(stored.get('best_val_loss', math.inf))
    elif init_from in ('scratch', 'auto'):
        raw_model = GPT(GPTConfig(**shape, vocab_size=bins.model_vocab_size))
    else:
        if os.path.exists(own := os.path.join(init_from, 'meta.pkl')):  # export.py wrote it
            stored = {'codec': codec.read_meta(own).state()}
        raw_model = GPT.from_pretrained(init_from, {'dropout': dropout})
        raw_model.crop_block_size(block_size)
except ValueError as e:
    fail(*e.args)
vocab_size = raw_model.config.vocab_size
if bins.vocab_size > vocab_size or (bins.own and bins.vocab_size != vocab_size):  # own: not padded to a multiple of 64
    fail(f'dataset={dataset} has {bins.vocab_size} token ids ({bins.tokenizer}), the model {vocab_size}: no match')
if stored.get('codec', bins.state) != bins.state:
    fail(f'dataset={dataset} has other tokens than the model of init_from={init_from}, though as many: no match')
if ddp:
    agreed({**config, 'dtype': dtype, 'iter_num': iter_num}, bins.digests, raw_model)
if master and not eval_only and (moved := claim(out_dir, fresh=not resumed)):  # fresh moves earlier files: only now
    say(f'an earlier run stood in {out_dir}; kept as {", ".join(moved)}')
model_args = {key: getattr(raw_model.config, key) for key in (*shape, 'vocab_size')}
config.update({key: model_args[key] for key in shape})  # a checkpoint or a folder brings its own
if shard:  # from here on its parameters are DTensors; blocks fetch theirs when they run (FSDP2, Zhao et al. 2023)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = dist.init_device_mesh(device_type, (world_size,))
    for part in (*raw_model.transformer.h, raw_model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(number_format, reduce_dtype=torch.float32))
raw_model.to(device)
say(f'number of parameters: {raw_model.get_num_params() / 1e6:.2f}M')
if device_type == 'cpu' and whole * raw_model.flops_per_token() > 1e15:
    say('note: on a CPU this may take many hours; config/train_shakespeare_char_cpu.py has a model for one')

# -- 3 optimizer, fast parts, compile, data parallel ----------------------------------------------------------------

optimizer = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
if resumed and not eval_only:  # moments and steps from the file, hyperparameters from the options
    ckpt.restore(optimizer, scaler, stored)
    stored = {'wandb_id': stored.get('wandb_id')}  # its tensors live in model and optimizer now
if compile:
    try:  # a trial: 1 if it really was compiled, 0 with TORCHDYNAMO_DISABLE=1
        compile = torch.compile(lambda t: t + torch.compiler.is_compiling())(torch.zeros(1, device=device)).item() == 1
    except Exception as e:  # no compiler, no Triton, an unsupported Python or platform
        compile = False
        say(f'torch.compile does not work here ({type(e).__name__}); going on without it')
# fast.py swaps in faster parts. flat: whether it also makes all weights one tensor, of which each rank updates a part;
# not on several ranks in float16, where each would see the infinities of its own part only
can_be_flat = not (eval_only or shard or recompute) and (not ddp or backend == 'nccl' and dtype != 'float16')
flat = fast is not None and fast.for_training(raw_model, number_format, compile,
                                              flat=can_be_flat and fast.FlatAdamW.fits(raw_model, optimizer))
optimizer = fast.FlatAdamW(raw_model, optimizer) if flat else optimizer
for block in raw_model.transformer.h:
    if compile:  # piece by piece: the code of one block serves all, so it is ready in a fraction of the time
        block.forward = torch.compile(block.forward, dynamic=False)
    if recompute:  # activation checkpointing (Chen et al. 2016)
        block.forward = lambda *x, f=block.forward: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=False)
if compile:
    raw_model.score = torch.compile(raw_model.score, dynamic=False)
    torch._dynamo.config.optimize_ddp = False  # it would cut a block in two, each with random numbers of its own
model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True) if ddp and not (flat or shard) else raw_model

# -- 4 one update ---------------------------------------------------------------------------------------------------

micro_steps = gradient_accumulation_steps // world_size  # of this process
mean_loss = torch.zeros((), device=device)  # of this rank, over the micro-steps of an update
norms = []  # of the gradients since the last check_finite()


def to_device(tensor):
    """A copy on the device; to a GPU it overlaps with what the host does next."""
    return tensor.pin_memory().to(device, non_blocking=True) if device_type == 'cuda' else tensor.to(device)


def forward_backward(x, y):
    """One micro-step: adds its gradients to those of the parameters, and its share of the loss to mean_loss."""
    with autocast():
        loss = model(x, y)[1]
    scaler.scale(loss / micro_steps).backward()
    mean_loss.add_(loss.detach() / micro_steps)


def clip_and_step():
    """Clip gradients, update parameters, clear gradients; returns the norm of the gradients before clipping."""
    scaler.unscale_(optimizer)
    limit = grad_clip or math.inf  # inf: the norm is only measured
    norm = optimizer.average_and_clip(limit) if flat else torch.nn.utils.clip_grad_norm_(raw_model.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm.full_tensor() if shard else norm


# A small kernel takes longer to launch than to run, so small models replay a micro-step, and clip_and_step, as one CUDA
# graph each. From about 2e13 FLOPs a micro-step that does not pay. Not with float16: its scaler waits for the device
flops = raw_model.flops_per_token() * batch_size * block_size
capture = flat and flops < 2e13 and not scaler.is_enabled() and not (ddp and torch.version.hip)  # ROCm: pytorch #177309
micro_step, finish_update = forward_backward, clip_and_step
if capture:
    for group in optimizer.param_groups:
        group.update(lr=torch.tensor(learning_rate, device=device), capturable=True)
    # not the first update, which compiles; nor, of several ranks, the exchange: in a graph NCCL misses a lost one
    micro_step = fast.captured(forward_backward, torch.device(device), warm=micro_steps)
    finish_update = clip_and_step if ddp else fast.captured(clip_and_step, torch.device(device))


def update(step):
    """Set the rate, sum gradients over all micro-steps, step the optimizer; returns their norm, still on the device."""
    for group in optimizer.param_groups:
        group['lr'] = group['lr'].fill_(lr_at(step)) if capture else lr_at(step)  # captured: always the same tensor
    mean_loss.zero_()
    for m in range(micro_steps):
        part = m * world_size + rank  # which of the gradient_accumulation_steps micro-batches of this update
        x, y = bins.train_batch(seed, step, part, gradient_accumulation_steps, batch_size)
        if dropout > 0:
            torch.manual_seed(int(draw(1, seed, 'dropout', step, part)[0]))
        model.require_backward_grad_sync = m == micro_steps - 1  # DistributedDataParallel exchanges in the last only
        micro_step(to_device(x), to_device(y))
    return finish_update().clone()  # a captured function returns the same tensor each time


def lr_at(step):
    """Learning rate of an update: linear warm-up, half a cosine down to min_lr (Loshchilov and Hutter 2016)."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    done = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


# -- 5 evaluate, save, stop -----------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(split):
    """Mean loss of a split over its eval_iters * batch_size evaluation sequences, which the ranks share out."""
    raw_model.eval()
    count, total = eval_iters * batch_size, torch.zeros((), device=device)
    # without gradients more than batch_size may fit: up to 131,072 tokens (without CUDA 8,192) and 2^28 logits
    fit = min((1 << 17 if device_type == 'cuda' else 1 << 13) // block_size, (1 << 28) // (block_size * vocab_size))
    rows = min(max(fit, batch_size), -(-count // world_size))
    batches = bins.eval_batches(split, count, rows, rank, world_size)
    for x, y, n in tqdm(batches, f'evaluating {split}', -(-count // (rows * world_size)), leave=False, delay=2,
                        disable=None if master else True):  # a bar: on a terminal, if it takes long
        with autocast():
            total += n * raw_model(to_device(x), to_device(y))[1]
    raw_model.train()
    return mean_over_ranks(total)()[0] * world_size / count


@contextlib.contextmanager
def saving(name):
    """Write the whole state of the run to out_dir/name while the body of a with statement runs; no updates in there."""
    state = ckpt.whole({'model': dict(raw_model.state_dict()), 'optimizer': optimizer.state_dict()}, keep=master)
    for group in state['optimizer']['param_groups']:
        group.update(lr=lr_at(iter_num), capturable=False)  # in the file a number, where a CUDA graph needs a tensor
    state.update(model_args=model_args, dtype=dtype, iter_num=iter_num, best_val_loss=best_val_loss, config=config,
                 gelu=raw_model.config.gelu, codec=bins.state, data=bins.digests, scaler=scaler.state_dict(),
                 wandb_id=log.wandb_id)
    with ckpt.saving(os.path.join(out_dir, name), state, device_type) if master else contextlib.nullcontext():
        yield
        say(f'saving checkpoint to {out_dir}')


def leave_together(status=0):
    """End the run, and the process group on all ranks. With status 0 it returns, but under gloo the process ends."""
    log.close()
    stop.forget()
    unlock(out_dir)
    if ddp:
        dist.barrier()
        dist.destroy_process_group()
    leave(status, at_once=ddp and backend == 'gloo')


def check_finite(*losses):
    """End the run on all ranks, without a save, if one of `losses`, or of the norms since last time, is not finite."""
    norm_at = dict(enumerate(map(float, norms), iter_num - len(norms)))
    norms.clear()
    # float16: the scaler skips such an update and lowers its scale, which is normal while that is at least 1
    bad = [] if scaler.is_enabled() else [step for step, norm in norm_at.items() if not math.isfinite(norm)]
    if bad or scaler.get_scale() < 1 or not all(map(math.isfinite, losses)):
        at = bad[0] if bad else max(iter_num - 1, 0)
        leave_together(f'iter {at}: gradient norm {norm_at.get(at)}, loss {losses}, lr {lr_at(at):.3e}, loss scale '
                       f'{scaler.get_scale():g}: ended without a save; a lower learning_rate may help' if master else 1)


# -- 6 the loop -----------------------------------------------------------------------------------------------------

if nothing_to_do := resumed and iter_num >= max_iters and not eval_only:
    say(f'the checkpoint has done {iter_num} of max_iters={max_iters} updates: nothing to do')
header = {**versions(), 'config': config, 'dtype': dtype, 'compile': compile, 'capture': capture,
          'processes': world_size, 'device': torch.cuda.get_device_name(device) if device_type == 'cuda' else device}
log = RunLog(os.path.join(out_dir, 'log.jsonl') if master and not (eval_only or nothing_to_do) else None, header,
             resumed_at=iter_num, wandb={'project': wandb_project, 'name': wandb_run_name,
                                         'id': stored.get('wandb_id')} if wandb_log else None)
stop.listen()
saved_at = iter_num  # updates up to this one need no save
watch = Stopwatch(iter_num, lambda dt: raw_model.estimate_mfu(batch_size * micro_steps, dt))
stops, numbers = False, None  # whether to end; a function that waits for the last update's numbers, if it is logged

while not nothing_to_do:  # every end is a break below
    stops = stops or (bool(stop) and not ddp)  # of several ranks all must know: by `told`, where they log
    evaluates = iter_num % eval_interval == 0 or iter_num == max_iters or eval_only
    # the GPU never waits for a log: a small model's next update begins before it, but not before evaluation or save
    begun = update(iter_num) if capture and not (evaluates or stops) else None

    # log the last update
    if numbers:
        loss, told, *norms_since = numbers()  # told: the share of ranks that were told to stop
        stops, numbers, norms[:] = stops or told > 0, None, norms_since  # on the host now
        step, norm = iter_num - 1, norms_since[-1]
        check_finite(loss)
        dt = watch.lap(iter_num)
        say(f'iter {step}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {watch.mfu * 100:.2f}%, '
            f'{tokens_per_iter / dt:,.0f} tok/s{watch.left(max_iters, eval_interval)}')
        log.write('train', iter=step, loss=loss, lr=lr_at(step), norm=norm, ms=dt * 1000, tok_s=tokens_per_iter / dt)

    # stop, unless an update has begun that iter_num does not count yet; at max_iters the save below comes anyway
    if stops and begun is None and saved_at < iter_num < max_iters:
        check_finite()
        with saving('ckpt.pt' if always_save_checkpoint else 'last.pt'):
            pass
        say(f'stopped by a signal after {iter_num} updates; --init_from=resume goes on from here')
        break

    # evaluate and save
    if evaluates:
        check_finite()
        with watch.paused():
            val_loss = evaluate('val')
            check_finite(val_loss)
            improved = val_loss < best_val_loss
            best_val_loss = min(val_loss, best_val_loss)
            # a state just resumed is in a file already; if that is a last.pt never evaluated, and best, ckpt.pt gets it
            saves = not eval_only and (iter_num > saved_at or (improved and resumed))
            name = 'ckpt.pt' if improved or always_save_checkpoint else 'last.pt'
            with saving(name) if saves else contextlib.nullcontext():
                train_loss = evaluate('train')  # meanwhile the file is written
                check_finite(train_loss)
                say(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}')
            if eval_only:
                break
            saved_at = iter_num
            log.write('eval', **{'iter': iter_num, 'train/loss': train_loss, 'val/loss': val_loss,
                                 'lr': lr_at(iter_num), 'mfu': 100 * watch.mfu})
    if iter_num >= max_iters:
        break

    norms.append(update(iter_num) if begun is None else begun)
    iter_num += 1
    on_step(iter_num, raw_model)
    if (iter_num - 1) % log_interval == 0:
        numbers = mean_over_ranks(mean_loss, torch.full_like(mean_loss, bool(stop)), *norms)

leave_together()
