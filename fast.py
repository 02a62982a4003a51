"""
Speed, and nothing else. Delete this file and every script still runs, on model.py alone, equal but for rounding and
for which elements dropout drops. Delete it before you change model.py: parts below repeat code from there.
Every class names its plain twin, mostly its base class, and a test compares the two.

The scripts import it before torch and use these entry points; model.py knows nothing of it:

    for_training(model, ...)     parts of the model change class; their parameters, and the names of those, stay
    FlatAdamW(model, optimizer)  clips and steps; ranks share the work, and exchange gradients and weights
    captured(function, device)   a function of fixed shapes as one CUDA graph
    loading()                    while a model is built around weights that exist
    stream(model, ...)           GPT.stream, token for token

Which part gains what: how much longer things take without it (all figures, machines, commands: tests/README.md).

    captured, FusedLoss, AddingLinear       GPT-2 124M on a GPU, 12 x 1024 tokens a micro-step: 49%, 7%, 6%
    BFloat16Stream, FoldedLayerNorm         the same: 4% (on a CPU 12%), 2% (a small model 5%)
    PolynomialGELU, AddingEmbeddings        the same: 2%, 0.5%, and 2 s of compiling before the first update
    shared                                  on each of two GPUs one micro-step of these: 3%
    Dropout16, CPUAttention                 6 layers of 384 with dropout on a CPU: 18%, 12%; 4 of 128, bfloat16: 0, 61%
    Dropout16 on a GPU                      6 layers of 384, compiled: 2%
    token_kernels, draw_ids, launch_options a token of one sample on a GPU: 15 times as long; 31%, 12%
    OneDNNLinear, packed                    ten samples on a CPU: 48%, 24%; past block_size 12%, 5%
    FusedLoss on a CPU, kept memory         together, with GPT-2's vocabulary: 86%, and a third more memory
    loading                                 a second when sample.py starts
"""

import atexit
import contextlib
import ctypes
import gc
import os
import threading

gc.set_threshold(100_000)  # imports make many objects and no garbage: looking for it took a fifth of their time
atexit.register(gc.freeze)  # nor does Python look for it at the end, which would take a second or two
# the compiler's cache leaves out what has autograd functions like those below, unless it is told not to
os.environ.setdefault('TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD', '1')
with contextlib.suppress(OSError, ValueError):  # Linux
    running = int(open('/proc/loadavg').read().split()[3].partition('/')[0])  # threads of all programs, at this moment
    # a thread that waits for others keeps its core for a moment, but not where other programs want it
    os.environ.setdefault('GOMP_SPINCOUNT', '0' if running > os.cpu_count() else '10000')
    quota, period = map(int, open('/sys/fs/cgroup/cpu.max').read().split())  # of a container; 'max' if there is none
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, min(quota // period, len(os.sched_getaffinity(0))))))
with contextlib.suppress(OSError):  # where there is CUDA; its driver starts while torch is imported
    threading.Thread(target=ctypes.CDLL('libcuda.so.1').cuInit, args=(0,), daemon=True).start()

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, Block, CausalSelfAttention, KVCache, sample_ids

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without CUDA
    triton = None
if triton and torch.cuda.is_available():
    with contextlib.suppress(ImportError):  # a checksum of all of Triton, by which it finds kernels again: 0.4 s
        from triton.runtime.cache import triton_key
        threading.Thread(target=triton_key, daemon=True).start()

with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc: keep up to 1 GB of freed memory, since what is
    for option in (-3, -1):  # given back to the system comes again page by page (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
        ctypes.CDLL(None).mallopt(option, 1 << 30)

properties = functools.cache(torch.cuda.get_device_properties)  # asking torch each time takes as long as a launch
left_out: set[str] = set()  # parts to do without, by name: bench.py --without=... measures what each of them gains


# -- training: parts that take the place of plain ones ----------------------------------------------------------------

def for_training(model: GPT, dtype: torch.dtype, compiled: bool, flat: bool) -> bool:
    """Put in the parts that pay for training under autocast to `dtype`, with or without compiling. With `flat`, and on
    CUDA, True is returned: the caller must then use FlatAdamW."""
    device = model.lm_head.weight.device
    cpu, cuda, half = device.type == 'cpu', device.type == 'cuda', dtype.itemsize == 2
    kernels = (cuda and compiled) or triton_works(device)
    wanted = {AddingEmbeddings: flat and kernels, BFloat16Stream: dtype == torch.bfloat16, FusedLoss: cpu or kernels,
              Dropout16: cpu or kernels, CPUAttention: cpu, PolynomialGELU: cuda and compiled and half}
    parts = [part for part, pays in wanted.items() if pays and part.__name__ not in left_out]
    # the loss has nothing to be fused with; finding that out would take the compiler seconds
    model.cross_entropy = torch.compiler.disable(FusedCrossEntropy.apply) if compiled else FusedCrossEntropy.apply
    model.__class__ = type('FastGPT', (*(part for part in parts if issubclass(part, GPT)), GPT), {})
    twins = {part.__base__: part for part in parts}
    for module in list(model.modules())[1:]:
        module.__class__ = twins.get(type(module), type(module))
    # this needs cuBLAS, and a compiler that allows a backward pass to change its inputs
    if cuda and flat and half and torch.version.cuda and torch.__version__ >= '2.11' and 'AddingLinear' not in left_out:
        add_gradients(model, dtype)
    return cuda and flat


class BFloat16Stream(GPT):
    """GPT, whose activations between the blocks are bfloat16 under autocast, too: half the traffic."""

    def embed(self, idx: torch.Tensor, start: int = 0) -> torch.Tensor:
        x = super().embed(idx, start)
        return x.to(torch.bfloat16) if torch.is_autocast_enabled(x.device.type) else x


class Dropout16(nn.Dropout):
    """nn.Dropout, which draws 16 random bits an element, four elements at once: on a CPU a fifth of the time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.p > 0) or x.is_cuda and not torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.randint(-1 << 63, (1 << 63) - 1, (-(-x.numel() // 4),), device=x.device).view(torch.int16)
        dropped = min(round(self.p * (1 << 16)), (1 << 16) - 1)  # of the 1 << 16 values
        kept = bits[:x.numel()].view(x.shape) >= dropped - (1 << 15)
        return x * kept.to(x.dtype).mul_((1 << 16) / ((1 << 16) - dropped))


class CPUAttention(CausalSelfAttention):
    """CausalSelfAttention, written out where torch has no fast kernel: training with dropout, or short in bfloat16."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        T = q.size(2)
        if not self.training or (self.attn_dropout.p == 0 and (q.dtype != torch.bfloat16 or T > 256)):
            return super().attend(q, k, v)
        with torch.autocast('cpu', enabled=False):
            later = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
            weights = (q * q.size(3) ** -0.5 @ k.transpose(2, 3) + later).softmax(-1)
            return self.attn_dropout(weights) @ v


class GELUByPolynomial(torch.autograd.Function):
    """The exact GELU, x Phi(x), for 16 bits. erf takes longer than reading and writing x, so 1 - Phi(|x|) is a power of
    two, its exponent a polynomial: relative error below 1e-5 up to |x| = 6, where 1 + erf has no digit left."""

    @staticmethod
    def upper_tail(z: torch.Tensor) -> torch.Tensor:
        """1 - Phi(z) for z >= 0; the coefficients are a minimax fit on [0, 6]."""
        power = -1.7937791e-6 * z + 6.0726135e-5
        for coefficient in (-9.2318554e-4, 8.4768466e-3, -5.3890937e-2, -0.45854159, -1.1512144, -1.0):
            power = power * z + coefficient
        return power.exp2()

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        z = x.float().abs()
        return (x.float().relu() - z * GELUByPolynomial.upper_tail(z)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        x = ctx.saved_tensors[0].float()
        tail = GELUByPolynomial.upper_tail(x.abs())
        density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
        return (grad.float() * (torch.where(x > 0, 1 - tail, tail) + x * density)).to(grad.dtype)


class PolynomialGELU(nn.GELU):
    """nn.GELU, compiled and in 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return GELUByPolynomial.apply(x) if self.approximate == 'none' else super().forward(x)


class FusedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1); x: (N, C), weight: (V, C), targets: (N,). The logits
    become their gradient in place, and nothing else of their size is ever held. The gradient of weight is added to
    `total`, if there is one, and else returned."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                total: torch.Tensor | None) -> torch.Tensor:
        logits, losses, N, V = x @ weight.t(), torch.empty(len(x), device=x.device), len(x), len(weight)
        if x.is_cuda:  # one kernel, a program for each row
            lanes = min(2048, max(32, triton.next_power_of_2(V) // 8))
            loss_kernel[N,](logits, targets, losses, V, lanes, num_warps=max(1, lanes // 64))
        else:  # as many rows at a time as a cache holds
            for part, target, loss in zip(*(t.split(max(1, (1 << 21) // V)) for t in (logits, targets, losses))):
                log_p, at = part.float().log_softmax(1), target.clamp(min=0)[:, None]
                loss.copy_(F.nll_loss(log_p, target, ignore_index=-1, reduction='none'))
                part.copy_(log_p.exp_().scatter_add_(1, at, torch.full_like(loss, -1)[:, None]))
                part[target == -1] = 0
        ctx.total, n = total, (targets != -1).sum().view(1)
        ctx.save_for_backward(logits, x, weight, n)
        return losses.sum() / n[0]

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        grad, x, weight, n = ctx.saved_tensors  # grad: softmax less one-hot, n times the gradient of the logits
        scale = scale / n  # float32: the products below round once
        scaled = FusedCrossEntropy.product(x, scale, torch.empty_like(x))
        of_weight = grad.t() @ scaled if ctx.total is None else add_product(ctx.total, grad, scaled)  # None: added
        of_x = torch.mm(grad, weight, out=scaled)
        return FusedCrossEntropy.product(of_x, scale, of_x), of_weight, None, None

    @staticmethod
    def product(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # a third of the time of torch's
            scale_kernel[len(x),](x, scale, out, x.size(1), triton.next_power_of_2(x.size(1)))
            return out
        return torch.mul(x, scale, out=out)


class FusedLoss(GPT):
    """GPT, whose score() is FusedCrossEntropy where there are targets; it has no logits left to return."""

    def score(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        if targets is None or (x.is_cpu and targets.numel() * self.lm_head.out_features < 1 << 23):  # 32 MB of logits
            return super().score(x, targets)
        x, head, kind = self.transformer.ln_f(x), self.lm_head, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        adds = type(head) is AddingLinear
        weight, total = (head.weight16, head.weight.grad) if adds else (head.weight.to(dtype), None)
        return None, self.cross_entropy(x.flatten(0, 1).to(weight.dtype), weight, targets.flatten().long(), total)


# -- training: one tensor of weights, one of gradients ----------------------------------------------------------------

# torch 2.13 renamed these, and warns of the old names; a build without torch.distributed has neither
reduce_scatter, all_gather = (getattr(dist, new, getattr(dist, old, None)) for new, old in (
    ('reduce_scatter_single', 'reduce_scatter_tensor'), ('all_gather_single', 'all_gather_into_tensor')))


uncounted = 0  # bytes that are in use and not in torch.cuda.memory_allocated()


def shared(n: int, device: torch.device) -> list[torch.Tensor]:
    """A list of n zeros and, where NVLink joins the GPUs of all ranks, the n zeros of each other rank, the next one's
    first. Those stay in their GPU's memory: to read and write them there takes 2/3 to 3/4 of NCCL's time."""
    global uncounted
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    one_host = os.environ.get('LOCAL_WORLD_SIZE') == str(ranks)
    if device.type != 'cuda' or ranks == 1 or not one_host or 'shared' in left_out:
        return [torch.zeros(n, device=device)]
    found, before = [], torch.cuda.memory_allocated(device)
    # another version of torch, a GPU that other ranks do not see, a container that forbids it: NCCL will do
    with contextlib.suppress(AttributeError, ImportError, IndexError, RuntimeError):
        from torch._C._distributed_c10d import _detect_dma_connectivity
        from torch.distributed import _symmetric_memory as symmetric
        links = _detect_dma_connectivity(torch.autograd.DeviceType.CUDA, 'nvlink').matrix
        if all(links[a][b] for a, b in itertools.permutations(range(ranks), 2)):
            os.environ.setdefault('TORCH_SYMM_MEM_DISABLE_MULTICAST', '1')  # not used here, and it may fail
            flat = symmetric.empty(n, device=device, dtype=torch.float32).zero_()
            memory, rank = symmetric.rendezvous(flat, dist.group.WORLD), dist.get_rank()
            found = [flat, *(memory.get_buffer((rank + i) % ranks, (n,), torch.float32) for i in range(1, ranks))]
    agreed = torch.tensor(float(len(found)), device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    if not agreed:
        left_out.add('shared')  # no rank tries again
        return [torch.zeros(n, device=device)]
    uncounted += found[0].nbytes - (torch.cuda.memory_allocated(device) - before)
    return found


class FlatAdamW(torch.optim.AdamW):
    """
    An AdamW whose weights become slices of one float32 tensor, and their gradients, never None, of another. Of several
    ranks each updates an equal part (ZeRO stage 1, Rajbhandari et al. 2020). state_dict(), which all of them must call
    between updates, is that of the AdamW it is made from; rank 0 alone gets it whole.
    """

    def __init__(self, model: GPT, plain: torch.optim.AdamW):
        self.model, self.plain, groups = model, plain, plain.param_groups
        self.ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.params = [p for group in groups for p in group['params']]
        self.starts = [0, *itertools.accumulate(-(-p.numel() // 64) * 64 for p in self.params)]  # aligned, for matmuls
        n, device = -(-self.starts[-1] // (64 * self.ranks)) * 64, self.params[0].device
        first, last = n * rank, n * (rank + 1)  # this rank's part
        self.gradients, *their_gradients = shared(n * self.ranks, device)
        before, self.moments = [plain.state.pop(p, {}) for p in self.params], {}  # of a resumed run; else empty
        for name in ('exp_avg', 'exp_avg_sq'):  # put together in the place of the gradients, which are zeros
            for piece, state in zip(self.slices(self.gradients), before):
                piece.copy_(state.pop(name, piece))
            self.moments[name] = self.gradients[first:last].clone()
        self.zero_grad()
        self.weights, *their_weights = shared(n * self.ranks, device)
        for p, weight, grad in zip(self.params, self.slices(self.weights), self.slices(self.gradients)):
            p.data, p.grad = weight.copy_(p.detach()), grad
        self.part, self.part.grad = self.weights[first:last], self.gradients[first:last]
        self.their_gradients = [grad[first:last] for grad in their_gradients]
        self.zero = torch.zeros((), device=device)
        self.beside, pieces = (torch.cuda.Stream(device), 4) if their_weights else (None, 1)
        # a piece is of one group, whose weights stand side by side; the more pieces, the sooner the first is sent
        ends = [self.starts[i] for i in itertools.accumulate(len(group['params']) for group in groups)][:-1]
        cuts = sorted({*range(0, n, n // pieces), *(end - first for end in ends if first < end < last)})
        own, grads, *moments = (flat.tensor_split(cuts[1:]) for flat in (
            self.part, self.part.grad, *self.moments.values()))
        self.their_weights = list(zip(*(weight[first:last].tensor_split(cuts[1:]) for weight in their_weights)))
        super().__init__([{**groups[bisect.bisect(ends, first + cut)], 'params': [p]} for cut, p in zip(cuts, own)],
                         fused=True)
        for p, grad, *state in zip(own, grads, *moments):
            p.grad, step = grad, before[0].get('step', torch.zeros((), device=device)).clone()
            self.state[p] = {'step': step, **dict(zip(self.moments, state))}
        renew_copies(model)

    @staticmethod
    def fits(model: GPT, plain: torch.optim.Optimizer) -> bool:
        """Whether all parameters of the model are trained, by a plain AdamW."""
        params = {p for group in plain.param_groups for p in group['params'] if p.requires_grad}
        return type(plain) is torch.optim.AdamW and not plain.defaults['amsgrad'] and params == set(model.parameters())

    def slices(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The slice of each parameter, in its shape."""
        return [flat[a:a + p.numel()].view_as(p) for p, a in zip(self.params, self.starts)]

    def average_and_clip(self, limit: float) -> torch.Tensor:
        """Make the gradients of this rank's part the mean over all ranks, and clip them; returns their norm before."""
        finish_gradients(self.model)
        if self.their_gradients:
            self.meet()
            for grad in self.their_gradients:
                self.part.grad.add_(grad)
        elif self.ranks > 1:
            reduce_scatter(self.part.grad, self.gradients)
        square = torch.linalg.vector_norm(self.part.grad).square()
        if self.ranks > 1:
            dist.all_reduce(square)  # after this all have read, too
        norm = square.sqrt() / self.ranks
        self.part.grad.mul_((limit / (norm + 1e-6)).clamp(max=1) / self.ranks)
        return norm

    def step(self, closure: None = None) -> None:
        if self.their_weights:
            groups, main = self.param_groups, torch.cuda.current_stream()
            for group, theirs in zip(groups, self.their_weights):
                self.param_groups = [group]
                super().step()
                self.beside.wait_stream(main)
                with torch.cuda.stream(self.beside):  # a piece is sent while the next one is updated
                    for weights in theirs:
                        weights.copy_(*group['params'])
            self.param_groups = groups
            main.wait_stream(self.beside)
            self.meet()
        else:
            super().step()
            if self.ranks > 1:
                all_gather(self.weights, self.part)
        renew_copies(self.model)

    def meet(self) -> None:
        """Let the GPU wait until those of all ranks are here; if one never comes, NCCL's timeout ends the run."""
        dist.all_reduce(self.zero)

    def zero_grad(self, set_to_none: bool = False) -> None:
        self.gradients.zero_()

    def state_dict(self) -> dict:
        step, wholes = next(iter(self.state.values()))['step'], []
        for moment in self.moments.values():
            if self.ranks > 1:  # again in the place of the gradients
                all_gather(self.gradients, moment)
                moment = self.gradients.to('cpu', copy=True) if dist.get_rank() == 0 else self.gradients
            wholes.append(self.slices(moment))
        if self.ranks > 1:
            self.zero_grad()
        state = {i: {'step': step.clone(), **dict(zip(self.moments, both))} for i, both in enumerate(zip(*wholes))}
        return {**self.plain.state_dict(), 'state': state}


# Autograd would write the gradient of a weight in 16 bits, cast it and add it to .grad: three times the traffic of one
# matmul that adds. So Linears read a copy of their weight in 16 bits, made once an update, and add to weight.grad. A
# LayerNorm without bias before a Linear is folded into that copy; finish_gradients() tells their gradients apart.

AT_ONCE = 1 << 24  # at most so many weights, or one layer, in a kernel; finish_gradients() holds as many products


@torch.library.custom_op('exactgpt::add_product', mutates_args=('total',))  # the compiler would not do it in one call
def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a.T @ b in one matmul; total: (N, K) in float32, a: (M, N) and b: (M, K) in 16 bits."""
    torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)


def add_gradients(model: GPT, dtype: torch.dtype) -> None:
    """Let the Linears of a model add to their gradients by themselves; a FlatAdamW must follow."""
    blocks = model.transformer.h
    kinds = [*zip(*([m for m in block.modules() if type(m) is nn.Linear] for block in blocks)), (model.lm_head,)]
    model.alike = []  # layers at one place in the blocks, and their copies: one kernel does for all of a group
    for kind in kinds:
        n = max(1, AT_ONCE // kind[0].weight.numel())
        for layers in (kind[i:i + n] for i in range(0, len(kind), n)):
            copies = layers[0].weight.new_empty(len(layers), *layers[0].weight.shape, dtype=dtype)
            model.alike.append((layers, copies))
            for layer, copy in zip(layers, copies):
                layer.__class__, layer.weight16, layer.norm = AddingLinear, copy, None
    for block in blocks:
        for norm, layer in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
            if norm.bias is None and 'FoldedLayerNorm' not in left_out:
                norm.__class__, layer.__dict__['norm'] = FoldedLayerNorm, norm  # no submodule: checkpoints list those


def stacked(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape at equal distances in one memory, seen as one, (n, ...), without a copy."""
    first, *others = tensors
    step = others[0].storage_offset() - first.storage_offset() if others else 0
    stack = first.as_strided((1 + len(others), *first.shape), (step, *first.stride()))
    assert all(t.shape == first.shape and t.data_ptr() == s.data_ptr() for t, s in zip(others, stack[1:]))
    return stack


@torch.no_grad()
def renew_copies(model: GPT) -> None:
    """Copy the weights of AddingLinears in 16 bits, each times the weight of the LayerNorm that was folded into it."""
    for layers, copies in vars(model).get('alike', ()):
        weights = stacked(layer.weight for layer in layers)
        if layers[0].norm:
            torch.mul(weights, stacked(layer.norm.weight for layer in layers)[:, None], out=copies)
        else:
            copies.copy_(weights)


@torch.no_grad()
def finish_gradients(model: GPT) -> None:
    """By the product rule, make of the gradient of weight * norm.weight, in weight.grad, those of its factors."""
    for layers, _ in vars(model).get('alike', ()):
        if layers[0].norm:
            norms, grads = [layer.norm.weight for layer in layers], stacked(layer.weight.grad for layer in layers)
            torch.sum(stacked(layer.weight for layer in layers) * grads, 1, out=stacked(norm.grad for norm in norms))
            grads.mul_(stacked(norms)[:, None])


class AddingLinear(nn.Linear):
    """nn.Linear by weight16, which is no buffer, since no checkpoint should hold it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = AddProduct.apply(x.to(self.weight16.dtype), self.weight16, self.weight.grad)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FoldedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm but for its weight, which the next Linear applies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Normalized.apply(x, self.eps)


class Normalized(torch.autograd.Function):
    """(x - mean) / deviation, over the channels. Its backward pass reads y, which the next Linear keeps anyway if x has
    16 bits; so x itself need not be kept, which saves a twelfth of all memory."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, eps: float) -> torch.Tensor:
        y, _, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)  # autocast: y in float32
        ctx.save_for_backward(y := y.to(x.dtype), inverse)
        return y

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, inverse = ctx.saved_tensors
        y, g = y.float(), grad.float()
        g = g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True)
        return (g * inverse).to(grad.dtype), None


class AddProduct(torch.autograd.Function):
    """x @ weight16.T, (..., K) and (N, K) in 16 bits; the gradient of the weight, in float32, is added to total."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight16: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight16)
        ctx.total = total  # save_for_backward would refuse what another layer has changed by then
        return x @ weight16.t()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight16 = ctx.saved_tensors
        add_product(ctx.total, grad.flatten(0, -2), x.flatten(0, -2))
        return grad @ weight16, None, None


class EmbedRows(torch.autograd.Function):
    """wte[idx] + wpe[:T], (B, T) -> (B, T, C), rounded once to dtype; the gradients are added to theirs."""

    @staticmethod
    def forward(ctx, idx: torch.Tensor, wte: torch.Tensor, wpe: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(idx)
        ctx.totals, (V, C) = (wte.grad, wpe.grad[:idx.size(1)]), wte.shape
        x = wte.new_empty(*idx.shape, C, dtype=dtype)
        embed_kernel[idx.numel(),](idx, wte, wpe, x, idx.size(1), V, C, triton.next_power_of_2(C))
        return x

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, None, None, None]:
        idx, C, grad = ctx.saved_tensors[0], grad.size(2), grad.contiguous()
        embed_backward_kernel[idx.numel(),](idx, grad, ctx.totals[0], C, triton.next_power_of_2(C))
        ctx.totals[1].add_(grad.sum(0, dtype=torch.float32))
        return None, None, None, None


class AddingEmbeddings(GPT):
    """GPT, whose embeddings add to their gradients by themselves, in any order."""

    def embed(self, idx: torch.Tensor, start: int = 0) -> torch.Tensor:
        if start or idx.size(1) > self.config.block_size or torch.are_deterministic_algorithms_enabled():
            return super().embed(idx, start)
        parts, dtype = self.transformer, torch.bfloat16 if isinstance(self, BFloat16Stream) else torch.float32
        return parts.drop(EmbedRows.apply(idx, parts.wte.weight, parts.wpe.weight, dtype))


# -- CUDA graphs, and generation --------------------------------------------------------------------------------------

def captured(function: Callable, device: torch.device, warm: int = 1) -> Callable:
    """The function, which after `warm` calls is replayed as one CUDA graph: tensors given to it are copied into the
    graph's own; what it returns is the graph's own, too, and changes with the next call. Shapes are fixed, and the
    function must not wait for the device. On other devices it stays what it is."""
    if device.type != 'cuda' or 'captured' in left_out:
        return function
    graph, inputs, result = None, None, None

    def call(*args):
        nonlocal warm, graph, inputs, result
        if warm:
            warm -= 1
            return function(*args)
        if graph is None:
            graph, inputs = torch.cuda.CUDAGraph(), [a.clone() for a in args]
            with torch.cuda.graph(graph):
                result = function(*inputs)
        for mine, given in zip(inputs, args):
            mine.copy_(given, non_blocking=True)
        graph.replay()
        return result

    return call


class loading(torch.overrides.TorchFunctionMode):
    """While active, modules skip initial values, as weights replace them; on the meta device those cost a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) if getattr(func, '__module__', '') != 'torch.nn.init' else None


@torch.inference_mode()
def stream(model: GPT, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
           top_p: float = 1.0, vocab_size: int | None = None, uniforms: torch.Tensor | None = None,
           compiled: bool = False, spare: int = 0) -> Iterator[torch.Tensor]:
    """GPT.stream. On CUDA all state stays on the device, and a step is captured once and replayed. `compiled` is for
    steps past block_size, on a CPU for all of them. On a CPU copies of the weights may take `spare` bytes."""
    if any(type(block) is not Block or type(block.attn) is not CausalSelfAttention for block in model.transformer.h):
        return (yield from model.stream(idx, max_new_tokens, temperature, top_k, top_p, vocab_size, uniforms))
    (B, T), S, device = idx.shape, model.config.block_size, idx.device
    u = torch.rand(B, max_new_tokens) if uniforms is None else uniforms
    u = F.pad(u.to(device).T, (0, 0, T, 0))  # (T + max_new_tokens, B), like the ids
    out = F.pad(idx.long(), (0, max_new_tokens)).T.contiguous()
    at = torch.tensor([T - 1], device=device)  # where in `out` the last token stands
    kernels, size = triton_works(device) and 'token_kernels' not in left_out, min(S, T + max_new_tokens)
    caches = [KVCache(size) for _ in model.transformer.h]
    forward = torch.compile(model.forward) if compiled else model.forward

    def put(logits: torch.Tensor) -> None:
        at.add_(1)
        now = u.index_select(0, at)[0]  # (B,)
        out.index_copy_(0, at, draw_ids(logits[:, -1, :vocab_size], now, temperature, top_k, top_p)[None])

    def read_prompt() -> None:
        put(model(out[:T].T[:, -S:], caches=caches if T <= S else None)[0])

    def read_token() -> None:
        new = out.index_select(0, at).T  # (B, 1)
        put(forward_token(model, new, caches, at) if kernels else forward(new, caches=caches)[0])

    def read_window() -> None:  # past block_size every position shifts, so nothing of the caches stays true
        put(forward(out.index_select(0, torch.arange(1 - S, 1, device=device) + at).T)[0])

    if kernels:  # otherwise the number of keys grows, and no two steps are alike
        read_token = captured(read_token, device)
    read_window = captured(read_window, device)
    with decoding(model, B, spare if not compiled and max_new_tokens >= 32 else 0):
        for t in range(T, T + max_new_tokens):  # out[t] is drawn in this round
            (read_prompt if t == T else read_token if t <= S else read_window)()
            yield out[t]


def forward_token(model: GPT, idx: torch.Tensor, caches: list[KVCache], at: torch.Tensor) -> torch.Tensor:
    """GPT.forward for one more token, idx (B, 1), at position `at` (1,), with the kernels below: (B, 1, V)."""
    x = model.transformer.wte(idx) + model.transformer.wpe(at)  # (B, 1, C)
    for block, cache in zip(model.transformer.h, caches):
        qkv = linear_token(x, block.attn.c_attn, norm=block.ln_1).view(len(x), 1, 3, model.config.n_head, -1)
        x = linear_token(attend_token(qkv, cache, at).flatten(2), block.attn.c_proj, add=x)
        x = linear_token(linear_token(x, block.mlp.c_fc, norm=block.ln_2, gelu=model.config.gelu), block.mlp.c_proj,
                         add=x)
    return linear_token(x, model.lm_head, norm=model.transformer.ln_f)


@contextlib.contextmanager
def decoding(model: GPT, rows: int, spare: int) -> Iterator[None]:
    """On a CPU, Linears meanwhile run in oneDNN, `rows` at a time; if there are `spare` bytes for it, on copies of
    their weights in its own order. The weights must not change."""
    there = model.lm_head.weight.is_cpu and torch.backends.mkldnn.is_available() and 'OneDNNLinear' not in left_out
    changed = [m for m in model.modules() if there and type(m) is nn.Linear and OneDNNLinear.pays(m.weight)]
    packs = 2 * sum(m.weight.nbytes for m in changed) < spare and 'packed' not in left_out
    try:
        for m in changed:
            reorders = packs and (rows > 1 or m.weight.dtype == torch.bfloat16)
            m.packed = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach(), rows) if reorders else None
            m.__class__ = OneDNNLinear
        yield
    finally:
        for m in changed:
            m.__class__, m.packed = nn.Linear, None


class OneDNNLinear(nn.Linear):
    """nn.Linear for inference on a CPU: where there are few rows, MKL would read the weight with one thread."""

    @staticmethod
    def pays(weight: torch.Tensor) -> bool:
        if weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32 and weight.numel() >= 1 << 17  # it takes longer to start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or (self.packed is None and x.numel() > 64 * self.in_features):
            return super().forward(x)
        weight = self.weight if self.packed is None else self.packed
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, 'none', [], '')


# -- Triton kernels for CUDA: the loss, and generation of a token -----------------------------------------------------

@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton can be used on this device: it needs CUDA and, among other things, a C compiler."""
    try:
        x = torch.ones(1, device=device)
        norm_kernel[1,](x, None, None, x, 1, 1, OVERLAP=False)
        return x.is_cuda
    except Exception:
        return False


def launch_options(device: torch.device) -> dict:
    """From Hopper on, a kernel may start while the one before it ends, and waits for its result when it needs that."""
    overlap = bool(torch.version.cuda) and properties(device).major >= 9 and 'launch_options' not in left_out
    return {'OVERLAP': True, 'launch_pdl': True} if overlap else {'OVERLAP': False}


def draw_ids(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int | None,
             top_p: float) -> torch.Tensor:
    """sample_ids, by two CUDA kernels where there is no top_p."""
    if temperature < 1e-20 or top_p < 1 or not triton_works(logits.device) or 'draw_ids' in left_out:
        return sample_ids(logits, u, temperature, top_k, top_p)
    (B, V), G, options = logits.shape, triton.cdiv(logits.size(1), 16), launch_options(logits.device)
    ids, tops = torch.empty_like(u, dtype=torch.long), u.new_empty(B, G)
    groups, kept = torch.empty_like(tops, dtype=torch.int32), u.new_empty(B, 16 * G)
    tops_kernel[B, triton.cdiv(G, 256)](logits, tops, logits.stride(0), V, G, **options)
    sample_kernel[B,](logits, u, ids, tops, groups, kept, logits.stride(0), V, G, min(top_k or V, V), 1 / temperature,
                      16 * (logits.dtype == torch.bfloat16), num_warps=16, **options)
    return ids


def attend_token(qkv: torch.Tensor, cache: KVCache, at: torch.Tensor) -> torch.Tensor:
    """Store the keys and values of a token; attend to all so far: (B, 1, 3, nh, hs) -> (B, 1, nh, hs)."""
    (B, _, _, nh, hs), y = qkv.shape, torch.empty_like(qkv[:, :, 0])
    span, warps = (256, 8) if B * nh < 100 else (32, 2)  # timed on an H100
    attend_kernel[B, nh](qkv, cache.k, cache.v, y, at, cache.size, nh, hs ** -0.5, hs, triton.next_power_of_2(hs), span,
                         num_warps=warps, **launch_options(qkv.device))
    return y


def linear_token(x: torch.Tensor, layer: nn.Linear, norm: nn.LayerNorm | None = None, gelu: str = '',
           add: torch.Tensor | None = None) -> torch.Tensor:
    """add + GELU(layer(norm(x))), (B, 1, K) -> (B, 1, N), each part where it is given; may overwrite add. For one or
    two sequences one CUDA kernel, whose time is that of reading the weight; for more, torch's matmul."""
    (N, K), B, wide = layer.weight.shape, len(x), triton.next_power_of_2(layer.in_features)
    options = launch_options(x.device)
    if B <= 2:
        y, rows = x.new_empty(B, 1, N), max(1, 4096 // wide)
        each = max(1, 32768 // (rows * wide))  # programs for a multiprocessor; timed on an H200
        programs = min(triton.cdiv(N, rows), each * properties(x.device).multi_processor_count)
        linear_kernel[programs, B](x, layer.weight, layer.bias, norm and norm.weight, norm and norm.bias, add, y, N, K,
                                   wide, rows, gelu, num_warps=min(32, max(4, wide // 1024)), **options)
        return y
    if norm:
        raw, x = x, torch.empty_like(x)
        norm_kernel[B,](raw, norm.weight, norm.bias, x, K, wide, num_warps=4, **options)
    if add is not None and layer.bias is None:
        return add.view(B, N).addmm_(x.view(B, K), layer.weight.t()).view(B, 1, N)
    y = layer(x) if add is None else add + layer(x)
    return F.gelu(y, approximate='tanh' if gelu == 'tanh' else 'none') if gelu else y


if triton:
    @triton.jit
    def take_turn(OVERLAP: tl.constexpr):
        """Wait for the results of the kernel before; the next one may start and come as far as this, too."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def read(values, at, n, hint: tl.constexpr = None):
        """Values at some positions, -inf from n on."""
        return tl.load(values + at, mask=at < n, other=-float('inf'), eviction_policy=hint).to(tl.float32)

    @triton.jit
    def embed_kernel(idx, wte, wpe, x, T, V, C, WIDE: tl.constexpr):
        """wte[idx] + wpe[:T], a row of it; NaN for an unknown id."""
        row, k = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
        id = tl.load(idx + row)
        token = tl.load(wte + id * C + k, (k < C) & (id >= 0) & (id < V), float('nan'))
        tl.store(x + row * C + k, token + tl.load(wpe + row % T * C + k, k < C), k < C)

    @triton.jit
    def embed_backward_kernel(idx, grad, total, C, WIDE: tl.constexpr):
        """Add a row's gradient to that of its token."""
        row, k = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
        more = tl.load(grad + row * C + k, k < C).to(tl.float32)
        tl.atomic_add(total + tl.load(idx + row) * C + k, more, k < C, sem='relaxed')

    @triton.jit
    def scale_kernel(x, scale, y, C, WIDE: tl.constexpr):
        """y = x * scale, a row of it."""
        at, k = tl.program_id(0).to(tl.int64) * C, tl.arange(0, WIDE)
        tl.store(y + at + k, tl.load(x + at + k, k < C).to(tl.float32) * tl.load(scale), k < C)

    @triton.jit
    def exp_less(x, bound):
        """exp(x - bound), sooner: from a power of two and one multiply-add."""
        return tl.exp2(x * 1.4426950408889634 - bound * 1.4426950408889634)

    @triton.jit
    def loss_kernel(logits, targets, losses, V, LANES: tl.constexpr):
        """The loss of one row of logits, which become softmax less one-hot, or 0 where the target is -1."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None]
        logits, target = logits + row * V, tl.load(targets + row)
        known, wanted = (target >= 0) & (target < V), target != -1
        hit = tl.load(logits + target, known, float('nan')).to(tl.float32)  # the loss of an unknown id is NaN
        # each lane's softmax so far, from a power of two on: -inf less -inf would be NaN, and this does not round
        top, total = tl.full((LANES,), -2.0 ** 100, tl.float32), tl.zeros((LANES,), tl.float32)
        for s in range(0, V, 8 * LANES):
            x = read(logits, s + i, V, 'evict_last')  # it is read again
            new = tl.maximum(top, tl.max(x, 1))
            total, top = total * exp_less(top, new) + tl.sum(exp_less(x, new[:, None]), 1), new
        most = tl.max(top, 0)
        whole = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
        tl.store(losses + row, tl.where(wanted, whole - hit, 0.0))
        whole = tl.where(wanted, whole, float('inf'))
        for s in range(0, V, 8 * LANES):
            grad = exp_less(read(logits, s + i, V, 'evict_first'), whole)
            tl.store(logits + s + i, grad, s + i < V, eviction_policy='evict_first')
        tl.debug_barrier()  # another thread may have stored this one
        tl.store(logits + target, tl.exp(hit - whole) - 1, known)

    @triton.jit
    def load_rows(x, n, N, k, K):
        """Channels k of rows n of x, (N, K); zeros outside."""
        return tl.load(x + n[:, None] * K + k[None], (n < N)[:, None] & (k < K)[None], 0)

    @triton.jit
    def load_row(x, gain, shift, k, K):
        """A row of K channels in float32, normalised where there is a gain."""
        v = tl.load(x + k, k < K, 0).to(tl.float32)
        if gain is not None:
            v = tl.where(k < K, v - tl.sum(v, 0) / K, 0.0)
            v *= tl.rsqrt(tl.sum(v * v, 0) / K + 1e-5) * tl.load(gain + k, k < K, 0)
        if shift is not None:
            v += tl.load(shift + k, k < K, 0).to(tl.float32)
        return v

    @triton.jit
    def norm_kernel(x, gain, shift, y, K: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr):
        """LayerNorm of a row."""
        take_turn(OVERLAP)
        at, k = tl.program_id(0) * K, tl.arange(0, WIDE)
        tl.store(y + at + k, load_row(x + at, gain, shift, k, K), k < K)

    @triton.jit
    def linear_kernel(x, weight, bias, gain, shift, add, y, N, K: tl.constexpr, WIDE: tl.constexpr,
                      ROWS: tl.constexpr, GELU: tl.constexpr, OVERLAP: tl.constexpr):
        """linear_token() for one sequence, some rows of the weight; reading those takes the time, and begins early."""
        b, k, step = tl.program_id(1), tl.arange(0, WIDE), tl.num_programs(0) * ROWS
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        w = load_rows(weight, n, N, k, K)
        take_turn(OVERLAP)
        v = load_row(x + b * K, gain, shift, k, K)
        for first in range(tl.program_id(0) * ROWS, N, step):
            n = first + tl.arange(0, ROWS)
            coming = load_rows(weight, n + step, N, k, K)
            given = 0.0 if bias is None else tl.load(bias + n, n < N, 0).to(tl.float32)
            rest = 0.0 if add is None else tl.load(add + b * N + n, n < N, 0).to(tl.float32)
            out = tl.sum(w.to(tl.float32) * v[None], 1) + given
            if GELU == 'exact':
                out *= 0.5 * (1 + tl.erf(out * 0.7071067811865476))
            elif GELU == 'tanh':
                out *= tl.sigmoid(1.5957691216057308 * (out + 0.044715 * out * out * out))
            tl.store(y + b * N + n, out + rest, n < N)
            w = coming

    @triton.jit
    def attend_kernel(qkv, keys, values, y, at, S, HEADS, SCALE: tl.constexpr, HS: tl.constexpr, WIDE: tl.constexpr,
                      SPAN: tl.constexpr, OVERLAP: tl.constexpr):
        """attend_token(), a program for each sequence and head; reads the filled part of the cache only, and at once,
        since that is of earlier steps, and a step begins with torch's kernels, which start late."""
        b, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDE)
        t, C, inside = tl.load(at).to(tl.int32), HEADS * HS, d < HS
        keys, values, i = keys + (b * HEADS + h) * S * HS, values + (b * HEADS + h) * S * HS, tl.arange(0, SPAN)
        k, v = load_rows(keys, i, t, d, HS), load_rows(values, i, t, d, HS)
        take_turn(OVERLAP)
        qkv += b * 3 * C + h * HS + d
        q = tl.load(qkv, inside, 0).to(tl.float32) * SCALE
        key, value = tl.load(qkv + C, inside, 0), tl.load(qkv + 2 * C, inside, 0)
        tl.store(keys + t * HS + d, key, inside)
        tl.store(values + t * HS + d, value, inside)
        top, total, acc = tl.sum(q * key.to(tl.float32), 0), 1.0, value.to(tl.float32)  # of the softmax, so far
        for s in range(0, t, SPAN):
            score = tl.where(s + i < t, tl.sum(q[None] * k.to(tl.float32), 1), -float('inf'))
            new = tl.maximum(top, tl.max(score, 0))
            old, p, top = tl.exp(top - new), tl.exp(score - new), new
            acc, total = acc * old + tl.sum(p[:, None] * v.to(tl.float32), 0), total * old + tl.sum(p, 0)
            k, v = load_rows(keys, s + SPAN + i, t, d, HS), load_rows(values, s + SPAN + i, t, d, HS)
        tl.store(y + b * C + h * HS + d, acc / total, inside)

    @triton.jit
    def tops_kernel(logits, tops, stride, V, G, OVERLAP: tl.constexpr):
        """The largest of every 16 logits: (B, V) -> (B, G)."""
        take_turn(OVERLAP)
        row, g = tl.program_id(0), tl.program_id(1) * 256 + tl.arange(0, 256)
        x = read(logits + row * stride, g[:, None] * 16 + tl.arange(0, 16)[None], V)
        tl.store(tops + row * G + g, tl.max(x, 1), g < G)

    @triton.jit
    def kth_largest(values, n, k, LOWEST_BIT: tl.constexpr):  # those below are the same in all bfloat16 of one sign
        """The largest float that k of n values reach, or -inf: as integers of equal order, two bits a round."""
        key, j = tl.full((), -2**31, tl.int32), tl.arange(0, 4)
        for bit in range(LOWEST_BIT, 32, 2):
            bit = LOWEST_BIT + 30 - bit
            trial, reached = key + (j << bit), tl.zeros((4,), tl.int32)
            value = (trial ^ ((trial >> 31) & 0x7fffffff)).to(tl.float32, bitcast=True)
            for s in range(0, n, 4096):
                reached += tl.sum((read(values, s + tl.arange(0, 4096), n)[None] >= value[:, None]).to(tl.int32), 1)
            key += tl.max(tl.where(reached >= k, j, 0), 0) << bit
        kth = (key ^ ((key >> 31) & 0x7fffffff)).to(tl.float32, bitcast=True)
        return tl.where(kth == kth, kth, -float('inf'))

    @triton.jit
    def sample_kernel(logits, u, ids, tops, groups, kept, stride, V, G, k, beta, LOWEST_BIT: tl.constexpr,
                      OVERLAP: tl.constexpr):
        """sample_ids, a program for each row: only groups of 16 whose top is among the k largest tops need be read."""
        take_turn(OVERLAP)
        row, i, n = tl.program_id(0), tl.arange(0, 4096), tl.zeros((), tl.int32)
        logits, tops, groups, kept = logits + row * stride, tops + row * G, groups + row * G, kept + row * G * 16
        bound, most = kth_largest(tops, G, k, LOWEST_BIT), tl.full((), -float('inf'), tl.float32)
        for s in range(0, G, 4096):
            x = read(tops, s + i, G)
            keep = ((x >= bound) & (s + i < G)).to(tl.int32)
            tl.store(groups + n + tl.cumsum(keep, 0) - 1, s + i, keep > 0)
            n, most = n + tl.sum(keep, 0), tl.maximum(most, tl.max(x, 0))
        tl.debug_barrier()  # what other threads stored is read below
        n *= 16
        for s in range(0, n, 4096):
            id = tl.load(groups + (s + i) // 16, s + i < n, 0) * 16 + i % 16
            tl.store(kept + s + i, read(logits, id, V), s + i < n)
        tl.debug_barrier()
        kth, total = kth_largest(kept, n, k, LOWEST_BIT), tl.zeros((), tl.float32)
        for s in range(0, n, 4096):
            x = read(kept, s + i, n)
            total += tl.sum(tl.where(x >= kth, tl.exp((x - most) * beta), 0.0), 0)
        goal, cdf = tl.load(u + row) * total, tl.zeros((), tl.float32)
        at, last = n, tl.zeros((), tl.int32)  # the first with probability that passes the goal, the last with any
        for s in range(0, n, 4096):
            x = read(kept, s + i, n)
            p = tl.where(x >= kth, tl.exp((x - most) * beta), 0.0)
            at = tl.minimum(at, tl.min(tl.where((p > 0) & (cdf + tl.cumsum(p, 0) > goal), s + i, n), 0))
            last = tl.maximum(last, tl.max(tl.where(p > 0, s + i, 0), 0))
            cdf += tl.sum(p, 0)
        at = tl.minimum(at, last)
        tl.store(ids + row, (tl.load(groups + at // 16, n > 0, 0) * 16 + at % 16).to(tl.int64))  # n = 0: all are NaN
