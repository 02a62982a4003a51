"""
The GPT: configuration, blocks, loss, generation, weights in and out, optimizer groups, FLOPs.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), and the names of its released
    weights: wte, wpe, h, ln_1, c_attn, c_proj, ln_2, c_fc, ln_f.

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V = vocab_size.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch
    triton = None

PUBLISHED = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # OpenAI's released weights, by their hub names


@dataclass
class GPTConfig:
    """Shape of a model. Raises ValueError, one argument per broken rule."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64: the matmuls run faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms
    gelu: str = 'exact'  # 'tanh' is what the published GPT-2 weights were trained with

    def __post_init__(self):
        sizes = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')
        rules = [(not isinstance(getattr(self, name), int) or getattr(self, name) < 1,  # a file may hold anything
                  f'{name}={getattr(self, name)} must be at least 1') for name in sizes]
        whole = isinstance(self.n_embd, int) and isinstance(self.n_head, int) and self.n_head >= 1
        rules += [(whole and self.n_embd % self.n_head,
                   f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}'),
                  (not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1,
                   f'dropout={self.dropout} must lie in [0, 1)'),
                  (self.gelu not in ('exact', 'tanh'), f'gelu={self.gelu} must be exact or tanh')]
        if problems := [message for bad, message in rules if bad]:
            raise ValueError(*problems)


@torch.library.custom_op('exactgpt::add_product', mutates_args=('total',))  # the compiler would not do it in one call
def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a.T @ b in one CUDA matmul, total: (N, K) in float32, a: (M, N) and b: (M, K) in 16 bits."""
    torch.addmm(total, a.t(), b, out_dtype=torch.float32, out=total)


def adds_products(device: torch.device) -> bool:
    """Whether it can; torch 2.10's compiler does not let a backward pass change what two pieces of a graph share."""
    return device.type == 'cuda' and bool(torch.version.cuda) and torch.__version__ >= '2.11'


class AddingLinear(torch.autograd.Function):
    """
    x @ weight16.T, (..., K) and (N, K) in 16 bits; the gradient of weight, (N, K) in float32, is added to total, its
    .grad. weight is an argument so that autograd still reaches it: it gets nothing to add, but DDP's hooks run.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, weight16: torch.Tensor,
                total: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight16)
        ctx.total = total  # save_for_backward would refuse what another layer has changed by then
        return x @ weight16.t()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight16 = ctx.saved_tensors
        add_product(ctx.total, grad.flatten(0, -2), x.flatten(0, -2))
        return grad @ weight16, None, None, None


class AddingEmbedding(torch.autograd.Function):
    """weight[idx], (N, K) and (B, T) -> (B, T, K); the gradient of weight is added to total, as in AddingLinear."""

    @staticmethod
    def forward(ctx, idx: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(idx)
        ctx.total = total
        return weight[idx]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[None, None, None]:
        ctx.total.index_add_(0, ctx.saved_tensors[0].flatten(), grad.flatten(0, 1))
        return None, None, None


class Reached(torch.autograd.Function):
    """x as it is; autograd reaches weight, which gets nothing to add, as in AddingLinear."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Linear(nn.Linear):
    """nn.Linear, with faster paths: compiled training steps, and few rows on a CPU."""
    weight16 = None  # a copy in 16 bits, see GPT.copy_weights(); no buffer, since no checkpoint should hold it
    packed = None  # a copy in oneDNN's order, see GPT.packed()

    def adds(self) -> bool:
        """Whether the backward pass adds the gradient of the weight to its .grad by itself."""
        ready = self.weight16 is not None and self.weight.grad is not None
        return ready and torch.compiler.is_compiling() and torch.is_grad_enabled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        if self.adds():
            y = AddingLinear.apply(x.to(self.weight16.dtype), self.weight, self.weight16, self.weight.grad)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled('cpu'))
        if plain and self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')
        # oneDNN for few rows and a large weight, since MKL reads that with one thread; it takes longer to start
        pays = x.is_cpu and x.numel() <= 64 * self.in_features and self.weight.numel() >= 1 << 17
        if plain and pays and x.dtype == self.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        return super().forward(x)


def normed(x: torch.Tensor, norm: nn.LayerNorm, layer: Linear) -> torch.Tensor:
    """norm(x) for layer; without the weight of norm where layer reads a copy that contains it, see GPT.folded()."""
    if norm.bias is None and layer.adds():
        return Reached.apply(F.layer_norm(x, x.shape[-1:]), norm.weight)
    return norm(x)


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU it draws 16 bits an element, four elements at once: a fifth of the time of torch's draw."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: any shape, as it is outside training."""
        if not (self.training and self.p > 0 and x.is_cpu):
            return super().forward(x)
        bits = torch.randint(-1 << 63, (1 << 63) - 1, (-(-x.numel() // 4),)).view(torch.int16)
        dropped = min(round(self.p * (1 << 16)), (1 << 16) - 1)  # of the 1 << 16 values
        kept = bits[:x.numel()].view(x.shape) >= dropped - (1 << 15)
        return x * kept.to(x.dtype).mul_((1 << 16) / ((1 << 16) - dropped))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which position t sees positions <= t (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one matmul
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout, self.resid_dropout = Dropout(config.dropout), Dropout(config.dropout)
        self.n_head = config.n_head

    def forward(self, x: torch.Tensor, past: 'Past | None' = None) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C). With `past`, the keys and values of earlier tokens, x is what follows them."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, nh, hs)
        y = past.attend(qkv) if past else self.attend(qkv)  # (B, T, nh, hs)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """softmax(q k.T / sqrt(hs)) v of each head: (B, T, 3, nh, hs) -> (B, T, nh, hs)."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        with torch.autocast(q.device.type, enabled=False):
            p, slow = self.attn_dropout.p, q.dtype == torch.bfloat16 and q.size(2) <= 256
            if self.training and q.is_cpu and (p > 0 or slow):  # written out, where that is faster
                later = torch.full((q.size(2),) * 2, -math.inf, dtype=q.dtype).triu(1)
                weights = (q * q.size(3) ** -0.5 @ k.transpose(2, 3) + later).softmax(-1)
                y = self.attn_dropout(weights) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p * self.training)
        return y.transpose(1, 2)


class FastGELU(torch.autograd.Function):
    """
    The exact GELU, x Phi(x), for 16 bits: computing erf takes a GPU longer than reading and writing x. The relative
    error of 1 - Phi(|x|) stays below 1e-5 as far as |x| = 6, where 1 + erf has lost all digits. torch.compile makes one
    kernel of each pass; F.gelu is its plain twin.
    """

    @staticmethod
    def upper_tail(z: torch.Tensor) -> torch.Tensor:
        """1 - Phi(z), z >= 0: a power of two, whose exponent is nearly a parabola; a minimax fit on [0, 6]."""
        power = -1.7937791e-6 * z + 6.0726135e-5
        for coefficient in (-9.2318554e-4, 8.4768466e-3, -5.3890937e-2, -0.45854159, -1.1512144, -1.0):
            power = power * z + coefficient
        return power.exp2()

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        z = x.float().abs()
        return (x.float().relu() - z * FastGELU.upper_tail(z)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        x = ctx.saved_tensors[0].float()
        tail = FastGELU.upper_tail(x.abs())
        density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
        return (grad.float() * (torch.where(x > 0, 1 - tail, tail) + x * density)).to(grad.dtype)


class MLP(nn.Module):
    """Position-wise feed-forward layer, four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU('tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        fast = torch.compiler.is_compiling() and x.is_cuda and x.dtype.itemsize == 2 and self.act.approximate == 'none'
        return self.dropout(self.c_proj(FastGELU.apply(x) if fast else self.act(x)))


class Block(nn.Module):
    """Attention, then MLP, each reading a normalised copy of the residual stream and adding to it (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, past: 'Past | None' = None, last: bool = False) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C), or (B, 1, C) where only the last position is wanted."""
        x = x + self.attn(normed(x, self.ln_1, self.attn.c_attn), past)
        if last:
            x = x[:, -1:]
        return x + self.mlp(normed(x, self.ln_2, self.mlp.c_fc))


class Past:
    """One layer's share of a KVCache, handed to its attention."""

    def __init__(self, kv: torch.Tensor, cache: 'KVCache'):
        self.kv, self.cache = kv, cache  # (2, B, nh, S, hs)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Store keys and values of the next T tokens; attend to all so far: (B, T, 3, nh, hs) -> (B, T, nh, hs)."""
        B, T, _, nh, hs = qkv.shape
        if T == 1 and self.cache.fused:
            y = qkv.new_empty(B, 1, nh, hs)
            span, warps = (256, 8) if B * nh < 100 else (32, 2)  # timed on an H100
            attend_kernel[B, nh](qkv, self.kv, y, self.cache.at, self.kv.size(3), nh, hs ** -0.5, hs,
                                 triton.next_power_of_2(hs), span, num_warps=warps, **early(qkv.device))
            return y
        q, *kv = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        for old, new in zip(self.kv, kv):
            old.index_copy_(2, self.cache.at, new)
        if T == 1:
            kv = self.kv[:, :, :, :self.cache.reach]
        y = F.scaled_dot_product_attention(q, *kv, attn_mask=self.cache.mask, is_causal=T > 1)
        return y.transpose(1, 2)


class KVCache:
    """
    Keys and values of the tokens read so far, (n_layer, 2, B, nh, S, hs): a step of generation then reads one token.
    `pos`, where the last of them stands, is on the device, so that a step is the same kernels every time: a CUDA graph.
    """

    def __init__(self, config: GPTConfig, batch: int, size: int, device: torch.device, dtype: torch.dtype):
        self.kv = torch.zeros(config.n_layer, 2, batch, config.n_head, size, config.n_embd // config.n_head,
                              device=device, dtype=dtype)
        self.pos = torch.full((1,), -1, device=device)
        self.reach, self.fused = 0, triton_works(device)
        self.layers = [Past(self.kv[i], self) for i in range(config.n_layer)]

    def read(self, T: int) -> torch.Tensor:
        """Get ready for a prompt of T tokens, or for one more token; returns the positions (T,)."""
        self.pos += T
        self.at = self.pos if T == 1 else torch.arange(1 - T, 1, device=self.pos.device) + self.pos
        self.reach, self.mask = self.reach + T, None
        if self.kv.is_cuda:  # where the host does not see captured steps: the whole cache, but for what is not filled
            self.reach = self.kv.size(4)
            if T == 1 and not self.fused:
                seen = torch.arange(self.reach, device=self.pos.device) <= self.pos
                self.mask = torch.where(seen, 0.0, -math.inf).to(self.kv.dtype).expand(1, 1, 1, self.reach)
        return self.at

    @staticmethod
    def nbytes(config: GPTConfig, batch: int, size: int, dtype: torch.dtype) -> int:
        """Memory of a cache."""
        return 2 * config.n_layer * batch * size * config.n_embd * dtype.itemsize


class FusedCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of logits x @ weight.T against targets, x: (N, C), weight: (V, C), targets: (N,) with -1 where no
    loss is wanted. One kernel turns the logits into their gradient, where they are, and nothing else of their size is
    ever held; the weight's gradient is added to `total`, if given. Needs Triton; F.cross_entropy is its plain twin.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                total: torch.Tensor | None) -> torch.Tensor:
        logits, losses = x @ weight.t(), torch.empty(len(x), device=x.device)  # (N, V), (N,)
        lanes = min(2048, max(32, triton.next_power_of_2(logits.size(1)) // 8))
        loss_kernel[len(x),](logits, targets, losses, logits.stride(0), logits.size(1), lanes,
                             num_warps=max(1, lanes // 64))
        n = (targets != -1).sum().view(1)
        ctx.save_for_backward(logits, x, weight, n)
        ctx.total = total
        return losses.sum() / n[0]

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        grad, x, weight, n = ctx.saved_tensors  # softmax less one-hot, n times the gradient
        scale = scale / n  # float32, of one dimension: the products below round once
        scaled = x.clone().mul_(scale)
        of_weight = None
        if ctx.total is None:
            of_weight = grad.t() @ scaled
        else:
            add_product(ctx.total, grad, scaled)
        return (grad @ weight).mul_(scale), of_weight, None, None


def lm_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
            total: torch.Tensor | None = None) -> torch.Tensor:
    """
    Mean cross-entropy in nats of logits x @ weight.T, (N, C) and (V, C), against targets (N,), -1: none wanted. With
    total, in compiled steps on CUDA, the gradient of weight is added to that instead of returned.
    """
    if x.is_cuda and (torch.compiler.is_compiling() or triton_works(x.device)):  # where the first works, so does Triton
        return FusedCrossEntropy.apply(x, weight, targets, total)
    return F.cross_entropy((x @ weight.t()).float(), targets, ignore_index=-1)


class NoInit(torch.overrides.TorchFunctionMode):
    """Modules built inside it get no initial values: even on the meta device those cost most of a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) if getattr(func, '__module__', '') != 'torch.nn.init' else None


class GPT(nn.Module):
    """A GPT-2 of any shape: embeddings, n_layer blocks, a final LayerNorm, and the tied matrix that scores tokens."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd),
            'drop': Dropout(config.dropout),
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix reads tokens in and scores them out
        # every residual branch adds variance: the 2 n_layer projections into the stream start smaller (section 2.3)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, keep_logits: bool = True,
                cache: KVCache | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        idx: (B, T) token ids, T <= block_size; targets: (B, T) ids, -1 where no loss is wanted. With a cache, idx is
        what follows the tokens it holds: a prompt, then one token at a time.
        Returns (logits, loss): without targets (B, 1, V) for the last position and None; with targets (B, T, V), or
        None where keep_logits is False so that they need not outlive the loss, and the mean cross-entropy in nats.
        Raises ValueError for a sequence longer than block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f'a sequence of {T} tokens is longer than block_size={self.config.block_size}')
        wte, head = self.transformer.wte, self.lm_head
        tok = AddingEmbedding.apply(idx, wte.weight, wte.weight.grad) if head.adds() else wte(idx)  # (B, T, C)
        pos = self.transformer.wpe(cache.read(T)) if cache else self.transformer.wpe.weight[:T]  # (T, C)
        x = self.transformer.drop(tok + pos)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if dtype == torch.bfloat16:
            x = x.to(dtype)  # the residual stream too: half the traffic between blocks; LayerNorm computes in float32
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache.layers[i] if cache else None, last=targets is None and i == self.config.n_layer - 1)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x), None
        if not keep_logits:
            weight, total = (head.weight16, head.weight.grad) if head.adds() else (head.weight.to(dtype), None)
            return None, lm_loss(x.flatten(0, 1).to(dtype), weight, targets.flatten(), total)
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def forward_token(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """forward for one more token, idx (B, 1), with the Triton kernels below: (B, 1, V)."""
        x = self.transformer.wte(idx) + self.transformer.wpe(cache.read(1))  # (B, 1, C)
        for block, past in zip(self.transformer.h, cache.layers):
            qkv = linear(x, block.attn.c_attn, norm=block.ln_1).view(len(x), 1, 3, self.config.n_head, -1)
            x = linear(past.attend(qkv).flatten(2), block.attn.c_proj, add=x)
            x = linear(linear(x, block.mlp.c_fc, norm=block.ln_2, gelu=self.config.gelu), block.mlp.c_proj, add=x)
        return linear(x, self.lm_head, norm=self.transformer.ln_f)

    # -- generation -------------------------------------------------------------------------------------------------

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 **options) -> torch.Tensor:
        """Continue idx (B, T) by max_new_tokens ids: (B, T + max_new_tokens). See stream() for the options."""
        return torch.stack((*idx.T, *self.stream(idx, max_new_tokens, temperature, top_k, **options)), dim=1)

    @torch.inference_mode()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float = 1.0, vocab_size: int | None = None, uniforms: torch.Tensor | None = None,
               compiled: bool = False) -> Iterator[torch.Tensor]:
        """
        Yield the ids (B,) that continue idx (B, T), position by position; the model sees the last block_size tokens.
        temperature 0 is greedy; top_k keeps the k likeliest ids (None or 0: all), top_p the fewest that have
        this much probability together (Holtzman et al. 2019); ids from vocab_size on, a padding, are never drawn.
        A token is the inverse of the distribution's CDF at uniforms (B, max_new_tokens) in [0, 1); by default they come
        from torch's CPU generator. On CUDA a step is captured once and replayed.
        """
        (B, T), S, device = idx.shape, self.config.block_size, idx.device
        # glibc keeps freed memory, up to twice the largest block of at most 32 MB that it has seen freed. What it gives
        # back to the system comes again page by page, a fifth of read_window's time for ten windows of 64 x 128
        if device.type == 'cpu':
            torch.empty(30 << 20, dtype=torch.uint8)
        if uniforms is None:
            uniforms = torch.rand(B, max_new_tokens)
        u = F.pad(uniforms.to(device).T, (0, 0, T, 0))  # (T + max_new_tokens, B), like the ids
        out = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1).T.contiguous()
        at = torch.tensor([T - 1], device=device)  # where in `out` the last token stands

        forward, fused = self.forward, triton_works(device) and not (compiled and B > 2)
        if compiled:
            # matrix-vector products as fused reductions: only tuned do they reach the memory's speed
            options = {'coordinate_descent_tuning': True} if device.type == 'cuda' else None
            forward = torch.compile(forward, options=options)

        def put(logits: torch.Tensor) -> None:
            at.add_(1)
            now = u.index_select(0, at)[0]  # (B,)
            out.index_copy_(0, at, sample_ids(logits[:, -1, :vocab_size], now, temperature, top_k, top_p)[None])

        def read_prompt() -> None:
            put(self(out[:T].T, cache=cache)[0])

        def read_token() -> None:
            idx = out.index_select(0, at).T  # (B, 1)
            put(self.forward_token(idx, cache) if fused else forward(idx, cache=cache)[0])

        def read_window() -> None:  # past block_size every position shifts, so nothing of the cache stays true
            put(forward(out.index_select(0, torch.arange(1 - S, 1, device=device) + at).T)[0])

        size, dtype = min(S, T + max_new_tokens - 1), self.lm_head.weight.dtype
        cache = KVCache(self.config, B, size, device, dtype) if T <= S else None
        read_token, read_window = captured(read_token, device), captured(read_window, device)
        with contextlib.nullcontext() if compiled or max_new_tokens < 32 else self.packed(B):
            for t in range(T, T + max_new_tokens):  # out[t] is drawn in this round
                if t > S:
                    read_window()
                elif t > T:
                    read_token()
                else:
                    read_prompt()
                yield out[t]

    @contextlib.contextmanager
    def packed(self, rows: int) -> Iterator[None]:
        """
        Meanwhile, on a CPU, Linears read copies of their weights in oneDNN's own order, if there is memory for them: a
        matmul of `rows` rows then takes a quarter less time. The weights must not change.
        """
        def pays(weight: torch.Tensor) -> bool:
            if weight.dtype == torch.float32:  # for one row the order does not matter, and MKL is faster for small ones
                return rows > 1 and weight.numel() >= 1 << 17
            return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()

        layers, device = [], self.lm_head.weight.device
        if device.type == 'cpu' and torch.backends.mkldnn.is_available():
            layers = [layer for layer in self.modules() if isinstance(layer, Linear) and pays(layer.weight)]
        if layers and 2 * sum(layer.weight.nbytes for layer in layers) > free_memory(device):
            layers = []
        try:
            for layer in layers:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            yield
        finally:
            for layer in layers:
                layer.packed = None

    # -- sizes ------------------------------------------------------------------------------------------------------

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; the tied matrix counts once, position embeddings do not count unless asked for."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def crop_block_size(self, block_size: int) -> None:
        """Keep only the first block_size positions. Raises ValueError if there are fewer."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is more than the model\'s {self.config.block_size} positions')
        kept = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)
        self.config.block_size = block_size

    def flops_per_token(self) -> int:
        """Forward and backward, counted as 6 N + 12 n_layer n_embd T (Chowdhery et al. 2022, PaLM, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Model FLOPs utilisation: fwdbwd_per_iter sequences of block_size tokens in dt seconds, as a share of the
        bf16 peak of the GPU that holds the model; -1.0 where that peak is unknown, as on a CPU."""
        peak = peak_flops(self.lm_head.weight.device)
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak if peak else -1.0

    # -- optimizer --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def copy_weights(self, dtype: torch.dtype) -> bool:
        """
        Give every Linear a copy of its weight in 16 bits, or renew the copies after an update. A compiled training step
        under autocast reads them instead of casting the weights, and adds the gradient of a weight to its .grad, where
        it has one, inside the matmul: autograd would write it in 16 bits, cast it to 32 and add it, which takes three
        times the traffic. unfold_gradients() must follow the last backward pass of an update. Returns False, and does
        nothing, where add_product does not work.
        """
        if not adds_products(self.lm_head.weight.device):
            return False
        gains = {layer: norm.weight for norm, layer in self.folded()}
        for layer in self.modules():
            if isinstance(layer, Linear):
                if layer.weight16 is None:
                    layer.weight16 = torch.empty_like(layer.weight, dtype=dtype)
                torch.mul(layer.weight, gains.get(layer, 1), out=layer.weight16)
        return True

    def folded(self) -> list[tuple[nn.LayerNorm, Linear]]:
        """
        LayerNorms without a bias, each with the Linear behind it, whose copy is weight * norm.weight. Compiled training
        steps then leave norm.weight out, and with it the sum of its gradient over all tokens.
        """
        pairs = [pair for h in self.transformer.h for pair in ((h.ln_1, h.attn.c_attn), (h.ln_2, h.mlp.c_fc))]
        return [(norm, layer) for norm, layer in pairs if norm.bias is None]

    @torch.no_grad()
    def unfold_gradients(self) -> None:
        """Make of the gradient of each product weight * norm.weight, which is in weight.grad, those of its factors."""
        for norm, layer in self.folded():
            torch.sum(layer.weight * layer.weight.grad, 0, out=norm.weight.grad)
            layer.weight.grad.mul_(norm.weight)

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str) -> torch.optim.AdamW:
        """AdamW with two groups: matrices and embeddings decay, biases and LayerNorm weights do not."""
        params = list(self.parameters())
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))

    # -- weights ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_state(cls, config: GPTConfig, state: dict[str, torch.Tensor]) -> 'GPT':
        """
        A model on the CPU around the tensors of a state dict, which it takes over without a copy. Reads older
        files too: the `_orig_mod.` prefix of compiled models and stored attention masks are dropped.
        Raises ValueError naming what is missing, unknown or of another shape.
        """
        with torch.device('meta'), NoInit():
            model = cls(config)
        state = {k.removeprefix('_orig_mod.'): v for k, v in state.items()}
        state = {k: v for k, v in state.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        state.setdefault('lm_head.weight', state.get('transformer.wte.weight'))  # some writers leave the tied copy out
        own = model.state_dict()
        state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        problems = [f'{k} is missing' for k in own if state.get(k) is None]
        problems += [f'{k} is not a tensor of this model' for k in state if k not in own]
        problems += [f'{k} is {tuple(state[k].shape)}, the model needs {tuple(own[k].shape)}'
                     for k in own if state.get(k) is not None and state[k].shape != own[k].shape]
        if problems:
            more = [f'and {len(problems) - 3} more'] if len(problems) > 3 else []
            raise ValueError('the weights do not fit the model: ' + '; '.join(problems[:3] + more))
        model.load_state_dict({k: state[k].float() for k in own}, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, dropout: float | None = None) -> 'GPT':
        """The model of a train.py checkpoint, on the CPU; dropout replaces the stored one. Raises ValueError."""
        args = dict(checkpoint['model_args'])
        names = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
        if set(args) != names:
            raise ValueError(f'model_args should hold {sorted(names)}; it holds {sorted(map(str, args))}')
        if dropout is not None:
            args['dropout'] = dropout
        return cls.from_state(GPTConfig(**args, gelu=checkpoint.get('gelu', 'exact')), checkpoint['model'])

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> 'GPT':
        """
        GPT-2 weights in transformers' format: one of PUBLISHED from the hub (or its local cache), or a folder with
        config.json. override_args may set dropout. float32, on the CPU. Raises ValueError.
        """
        from safetensors import SafetensorError
        from transformers import GPT2Config, GPT2LMHeadModel

        override_args = override_args or {}
        if set(override_args) - {'dropout'}:
            raise ValueError(f'only dropout can be overridden, not {sorted(set(override_args) - {"dropout"})}')
        if model_type not in PUBLISHED and not os.path.isfile(os.path.join(model_type, 'config.json')):
            raise ValueError(f'{model_type} is none of {", ".join(PUBLISHED)} and no folder with config.json')
        try:
            if (kind := GPT2Config.get_config_dict(model_type)[0].get('model_type', 'gpt2')) != 'gpt2':
                raise ValueError(f'{model_type} holds a {kind}, not a GPT-2')
            hf, info = GPT2LMHeadModel.from_pretrained(model_type, dtype=torch.float32, output_loading_info=True,
                                                       ignore_mismatched_sizes=True)
        except OSError as e:
            where = 'is not in the cache, nor can it be fetched' if model_type in PUBLISHED else 'cannot be read'
            raise ValueError(f'{model_type} {where} ({str(e).splitlines()[0]}): init_from also takes a folder with '
                             'config.json and model.safetensors') from e
        except (SafetensorError, RuntimeError) as e:
            raise ValueError(f'{model_type}: the weights cannot be read ({type(e).__name__}: {e})') from e
        # transformers would go on with fresh random values for what is not in the file
        if wrong := {kind: sorted(map(str, info[kind])) for kind in info if info[kind]}:
            raise ValueError(f'{model_type}: the weights do not fit its config.json: {wrong}')
        c = hf.config
        wide = c.n_inner or 4 * c.n_embd
        activations = {'gelu': 'exact', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}
        if (wide != 4 * c.n_embd or c.layer_norm_epsilon != 1e-5 or not c.scale_attn_weights
                or c.scale_attn_by_inverse_layer_idx or not c.tie_word_embeddings
                or c.activation_function not in activations):
            raise ValueError(f'{model_type} is no plain GPT-2: width, epsilon, attention scale or activation differs')
        config = GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                           n_embd=c.n_embd, bias=True, gelu=activations[c.activation_function], **override_args)
        # transformers keeps GPT-2's Conv1D layers as (in, out); Linear wants (out, in)
        conv1d = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
        state = hf.state_dict()
        return cls.from_state(config, {k: v.t().contiguous() if k.endswith(conv1d) else v for k, v in state.items()})


def captured(function, device: torch.device, warm: int = 1):
    """
    A function of tensors of fixed shapes, which runs as it is for `warm` calls and is then replayed as one CUDA graph:
    arguments are copied into the graph's own, the result is the graph's own and changes with the next call.
    The function must not wait for the device. On other devices it is returned as it is.
    """
    if device.type != 'cuda':
        return function
    graph, inputs, result = None, None, None

    def call(*args):
        nonlocal warm, graph, inputs, result
        if warm:
            warm -= 1
            return function(*args)
        if graph is None:
            graph, inputs = torch.cuda.CUDAGraph(), [a.clone() for a in args]
            stream = torch.cuda.current_stream(device)
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph, stream=stream if stream.cuda_stream else None):  # not on 0, the default one
                result = function(*inputs)
        for mine, given in zip(inputs, args):
            mine.copy_(given, non_blocking=True)
        graph.replay()
        return result

    return call


def sample_ids(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int | None,
               top_p: float) -> torch.Tensor:
    """Token ids (B,) from logits (B, V) and uniforms u (B,): the inverse CDF, ids in their order, after the cuts."""
    if temperature < 1e-20:  # 0, or so little that float32 cannot divide by it
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    if top_p == 1 and triton_works(logits.device):
        return sample_fused(logits, u, temperature, k)
    logits = logits.float()
    if k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(k, sorted=False).values.amin(-1, keepdim=True), -math.inf)
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()  # no need for a sum of 1
    if top_p < 1:
        likely = p.sort(-1, descending=True).values
        before = likely.cumsum(-1) - likely
        enough = (before < top_p * likely.sum(-1, keepdim=True)).sum(-1, keepdim=True)  # how many it takes
        p = p.masked_fill(p < likely.gather(-1, (enough - 1).clamp(min=0)), 0.0)
    cdf = p.cumsum(-1)
    whole = cdf[:, -1:]
    return ((cdf <= u[:, None] * whole) & (cdf < whole)).sum(-1)  # never past the last id that has probability


def cosine_lr(it: int, learning_rate: float, warmup_iters: int, lr_decay_iters: int, min_lr: float) -> float:
    """Learning rate of update `it`: linear warm-up, half a cosine to min_lr (Loshchilov and Hutter 2016)."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


# -- the machine ----------------------------------------------------------------------------------------------------

# Dense bf16 (fp16 on V100 and T4) matrix peaks with float32 accumulation, in TFLOP/s, from the vendors' datasheets.
# The first name found as whole words in the device's name wins, so longer names stand first.
PEAK_TFLOPS = {
    'V100': 125, 'T4': 65, 'A100': 312, 'A10': 125, 'A10G': 70, 'L4': 121, 'L40': 181, 'L40S': 362,
    'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'H200 NVL': 835, 'H200': 989, 'B200': 2250,
    'MI300X': 1307, 'MI300A': 981,
    'RTX 3060 Ti': 32, 'RTX 3060': 25, 'RTX 3070 Ti': 43, 'RTX 3070': 41, 'RTX 3080 Ti': 68, 'RTX 3080': 60,
    'RTX 3090 Ti': 80, 'RTX 3090': 71, 'RTX 4060 Ti': 44, 'RTX 4060': 30,
    'RTX 4070 Ti SUPER': 88, 'RTX 4070 Ti': 80, 'RTX 4070 SUPER': 71,
    'RTX 4070': 58, 'RTX 4080 SUPER': 104, 'RTX 4080': 97, 'RTX 4090': 165, 'RTX 5060 Ti': 47, 'RTX 5060': 38,
    'RTX 5070 Ti': 88, 'RTX 5070': 62, 'RTX 5080': 113, 'RTX 5090': 210,
}


def peak_flops(device: torch.device) -> float | None:
    """Datasheet peak of a CUDA device in FLOP/s (dense bf16); None where it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'Laptop'
    if 'Laptop' in name:  # those parts share a desktop card's name, not its peak
        return None
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if re.search(rf'\b{part}\b', name)), None)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU an estimate, and no limit where the system does not tell."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):  # not on this system
        return 1 << 62


def resolve(device: str, dtype: str) -> tuple[str, str]:
    """
    What 'auto' means on this machine: the device is cuda, else mps, else cpu; the dtype is bfloat16 where the device
    computes in it natively, float16 on other CUDA cards, float32 elsewhere. ValueError: one argument per problem.
    """
    problems = []
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind = device.partition(':')[0]
    there = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    if kind not in there:
        problems.append(f'device={device}: choose auto, cpu, cuda, cuda:N or mps')
    elif not there[kind]:
        problems.append(f'device={device} is not available here; try --device=auto or --device=cpu')
    elif ':' in device and not (device[5:].isdecimal() and int(device[5:]) < torch.cuda.device_count()):
        problems.append(f'device={device}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0')
    if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
        problems.append(f'dtype={dtype}: choose auto, float32, bfloat16 or float16')
    elif dtype == 'float16' and kind in ('cpu', 'mps'):
        problems.append(f'dtype=float16 needs CUDA, device is {device}; try --dtype=auto')
    if problems:
        raise ValueError(*problems)
    if dtype == 'auto' and kind == 'cuda':
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':
        native = kind == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        dtype = 'bfloat16' if native else 'float32'
    return device, dtype


# -- Triton kernels for CUDA: one token, and the loss; torch's own calls above are their twins ------------------------

@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether the kernels below can be used: on a CUDA device, with all that Triton needs, such as a C compiler."""
    if not triton or device.type != 'cuda':
        return False
    try:
        sample_fused(torch.ones(1, 1, device=device), torch.ones(1, device=device), 1.0, 1)
    except Exception:
        return False
    return True


@functools.cache
def properties(device: torch.device):
    """Of a CUDA device; asking torch again takes as long as a launch."""
    return torch.cuda.get_device_properties(device)


def early(device: torch.device) -> dict:
    """Launch options: from Hopper on a kernel may start while the one before it ends, and then waits for its result."""
    # torch.compile cannot tell what a kernel that waits writes to
    if torch.compiler.is_compiling() or not torch.version.cuda or properties(device).major < 9:
        return {'EARLY': False}
    return {'EARLY': True, 'launch_pdl': True}


def sample_fused(logits: torch.Tensor, u: torch.Tensor, temperature: float, k: int) -> torch.Tensor:
    """sample_ids without top_p in two CUDA kernels."""
    (B, V), lowest_bit = logits.shape, 16 if logits.dtype == torch.bfloat16 else 0
    G = triton.cdiv(V, 16)
    ids, tops = torch.empty_like(u, dtype=torch.long), u.new_empty(B, G)
    groups, kept = torch.empty_like(tops, dtype=torch.int32), u.new_empty(B, 16 * G)
    tops_kernel[B, triton.cdiv(G, 256)](logits, tops, logits.stride(0), V, G, **early(logits.device))
    sample_kernel[B,](logits, u, ids, tops, groups, kept, logits.stride(0), V, G, k, 1 / temperature, lowest_bit,
                      num_warps=16, **early(logits.device))
    return ids


def linear(x: torch.Tensor, layer: nn.Linear, norm: nn.LayerNorm | None = None, gelu: str = '',
           add: torch.Tensor | None = None) -> torch.Tensor:
    """
    add + GELU(layer(norm(x))), x: (B, 1, K) -> (B, 1, N), each part where it is given; may overwrite add. One CUDA
    kernel for one or two sequences, whose time is that of reading the weight; for more, torch's matmul.
    """
    (N, K), B, wide = layer.weight.shape, len(x), triton.next_power_of_2(layer.in_features)
    if B <= 2:
        y, rows = x.new_empty(B, 1, N), max(1, 4096 // wide)
        each = max(1, 32768 // (rows * wide))  # programs for a multiprocessor; timed on an H200
        programs = min(triton.cdiv(N, rows), each * properties(x.device).multi_processor_count)
        linear_kernel[programs, B](x, layer.weight, layer.bias, norm and norm.weight, norm and norm.bias, add, y, N, K,
                                   wide, rows, gelu, num_warps=min(32, max(4, wide // 1024)), **early(x.device))
        return y
    if norm:
        y = torch.empty_like(x)
        norm_kernel[B,](x, norm.weight, norm.bias, y, K, wide, num_warps=4, **early(x.device))
        x = y
    if add is not None and layer.bias is None:
        return add.view(B, N).addmm_(x.view(B, K), layer.weight.t()).view(B, 1, N)
    y = layer(x) if add is None else add + layer(x)
    return F.gelu(y, approximate='tanh' if gelu == 'tanh' else 'none') if gelu else y


if triton:
    @triton.jit
    def take_turn(EARLY: tl.constexpr):
        """Wait for the results of the kernel before; the next one may start and come as far as this, too."""
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def read(values, at, n, hint: tl.constexpr = None):
        """Values at some positions, -inf from n on."""
        return tl.load(values + at, mask=at < n, other=-float('inf'), eviction_policy=hint).to(tl.float32)

    @triton.jit
    def exp_less(x, bound):
        """exp(x - bound), from a power of two and a multiply-add."""
        return tl.exp2(x * 1.4426950408889634 - bound * 1.4426950408889634)

    @triton.jit
    def loss_kernel(logits, targets, losses, stride, V, LANES: tl.constexpr):
        """The loss of one row of logits, which become softmax less one-hot, or 0 where the target is -1."""
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None]
        logits, target = logits + row * stride, tl.load(targets + row)
        known, wanted = (target >= 0) & (target < V), target != -1
        hit = tl.load(logits + target, known, float('nan')).to(tl.float32)  # the loss of an unknown id is NaN
        # each lane's softmax so far; exp_less of two powers of two, where a lane has seen nothing, does not round
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
            g = tl.load(gain + k, k < K, 0).to(tl.float32)
            v = tl.where(k < K, v - tl.sum(v, 0) / K, 0.0)
            v *= tl.rsqrt(tl.sum(v * v, 0) / K + 1e-5) * g
        if shift is not None:
            v += tl.load(shift + k, k < K, 0).to(tl.float32)
        return v

    @triton.jit
    def norm_kernel(x, gain, shift, y, K: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr):
        """LayerNorm of a row."""
        take_turn(EARLY)
        at, k = tl.program_id(0) * K, tl.arange(0, WIDE)
        tl.store(y + at + k, load_row(x + at, gain, shift, k, K), k < K)

    @triton.jit
    def linear_kernel(x, weight, bias, gain, shift, add, y, N, K: tl.constexpr, WIDE: tl.constexpr,
                      ROWS: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr):
        """linear() for one sequence and some rows of the weight; reading those takes the time, so it begins early."""
        b, n, k = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE)
        step = tl.num_programs(0) * ROWS
        w = load_rows(weight, n, N, k, K)
        take_turn(EARLY)
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
    def attend_kernel(qkv, kv, y, at, S, HEADS, SCALE: tl.constexpr, HS: tl.constexpr, WIDE: tl.constexpr,
                      SPAN: tl.constexpr, EARLY: tl.constexpr):
        """
        Past.attend for one token, a program for each sequence and head; reads the filled part of the cache only. Those
        keys and values are of earlier steps, and a step begins with torch's kernels, which start late: no need to wait.
        """
        b, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, WIDE)
        t, C, inside = tl.load(at).to(tl.int32), HEADS * HS, d < HS
        keys = kv + (b * HEADS + h) * S * HS
        values = keys + tl.num_programs(0).to(tl.int64) * HEADS * S * HS
        i = tl.arange(0, SPAN)
        k, v = load_rows(keys, i, t, d, HS), load_rows(values, i, t, d, HS)
        take_turn(EARLY)
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
    def tops_kernel(logits, tops, stride, V, G, EARLY: tl.constexpr):
        """The largest of every 16 logits: (B, V) -> (B, G)."""
        take_turn(EARLY)
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
                      EARLY: tl.constexpr):
        """sample_ids, a program for each row: only groups of 16 whose top is among the k largest tops need be read."""
        take_turn(EARLY)
        row, i = tl.program_id(0), tl.arange(0, 4096)
        logits, tops, groups, kept = logits + row * stride, tops + row * G, groups + row * G, kept + row * G * 16
        bound, most = kth_largest(tops, G, k, LOWEST_BIT), tl.full((), -float('inf'), tl.float32)
        n = tl.zeros((), tl.int32)
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
