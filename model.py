"""
GPT-2, whole and plain: embeddings, blocks, loss, generation, optimizer groups, weights in and out.

Names are those of its released weights (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"):
wte and wpe embed tokens and positions, h are the blocks, ln_* LayerNorms, c_* matrices: c_attn makes queries, keys and
values, c_fc widens to 4 C, c_proj leads back to C. Shapes: B sequences of T tokens; C = n_embd channels, split over
nh = n_head heads of hs = C / nh each; V = vocab_size. What only makes the same thing faster is in fast.py.
"""

import inspect
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn as nn
import torch.nn.functional as F

PUBLISHED = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # OpenAI's released weights, by their names on the hub
# GPT-2's own layers, Conv1D, keep these as (in, out); Linear wants (out, in)
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError with one argument for each broken rule."""
    block_size: int = 1024  # the longest sequence the model can read
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which GPUs multiply faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # whether Linears (but lm_head) and LayerNorms have one
    gelu: str = 'exact'  # or 'tanh', the approximation that the published GPT-2 weights were trained with

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')}
        wrong = [name for name, n in sizes.items() if not isinstance(n, Integral) or n < 1]
        problems = [f'{name}={sizes[name]} must be at least 1' for name in wrong]
        if 'n_head' not in wrong and 'n_embd' not in wrong and self.n_embd % self.n_head:
            problems.append(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            problems.append(f'dropout={self.dropout} must lie in [0, 1)')
        if self.gelu not in ('exact', 'tanh'):
            problems.append(f'gelu={self.gelu} must be exact or tanh')
        if problems:
            raise ValueError(*problems)
        self.dropout = float(self.dropout)  # numpy's numbers become plain ones: a checkpoint takes no others
        for name, n in sizes.items():
            setattr(self, name, int(n))


class KVCache:
    """
    For generation: the keys and values of the tokens read so far, at most `size` of them, in one layer. Only attention
    looks at other tokens, so with these kept, a step only has to read the new token.
    """

    def __init__(self, size: int):
        self.size, self.length = size, 0

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, (B, nh, T, hs): of a prompt at first, then of one token at a time; returns those of all
        tokens so far. Raises ValueError for several tokens after the first call."""
        if self.length == 0:
            self.k, self.v = (t.new_empty(t.size(0), t.size(1), self.size, t.size(3)) for t in (k, v))
        elif k.size(2) > 1:
            raise ValueError(f'a cache that holds {self.length} tokens takes one more at a time, not {k.size(2)}')
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position sees itself and what stands before (Vaswani et al. 2017, 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C). With a cache, x are the tokens that follow those in it."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if cache is not None:
            k, v = cache.extend(k, v)
        y = self.attend(q, k, v).transpose(1, 2).reshape(B, T, C)  # the channels of all heads side by side again
        return self.resid_dropout(self.c_proj(y))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """softmax(q k.T / sqrt(hs)) v, head by head, where no position sees a later one."""
        p = self.attn_dropout.p if self.training else 0.0  # torch's function applies this dropout itself
        # a single query is the last token and may see all keys; a plain bool: torch.compile may make `>` a symbol
        return F.scaled_dot_product_attention(q, k, v, is_causal=True if q.size(2) > 1 else False, dropout_p=p)


class MLP(nn.Module):
    """Two matrices with a GELU between them, applied to each position alone; four times as wide inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU('tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Attention, then MLP. Each reads a normalised copy of x and adds its result to x itself (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        normed = self.ln_1(x)
        x = x + (self.attn(normed) if cache is None else self.attn(normed, cache))  # your attention may take no cache
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a last LayerNorm, and a matrix that scores every token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd),
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix embeds tokens and scores them
        # 2 n_layer outputs of c_proj are summed into x; 1 / sqrt(2 n_layer) keeps the variance of the sum (GPT-2, 2.3)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                caches: list[KVCache] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        idx: (B, T) token ids; targets: (B, T), the id that follows at each position, -1 to ignore it. Returns (logits,
        loss): (B, T, V) and the mean cross-entropy in nats; without targets only the last position's logits, (B, 1, V),
        and None. caches, one for each block, hold the tokens before idx. ValueError for more than block_size tokens.
        """
        x = self.embed(idx.long(), caches[0].length if caches else 0)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i]) if caches else block(x)
        return self.score(x, targets)

    def embed(self, idx: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Token and position embeddings of idx, (B, T) -> (B, T, C), whose first token stands at position `start`."""
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f'a sequence of {end} tokens is longer than block_size={self.config.block_size}')
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(start, end, device=idx.device))
        return self.transformer.drop(x)

    def score(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the last block made of each position, (B, T, C), becomes what forward() returns."""
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long(), ignore_index=-1)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 **options) -> torch.Tensor:
        """idx (B, T) and the tokens that continue it, side by side: (B, T + max_new_tokens). Options as in stream()."""
        return torch.stack((*idx.long().T, *self.stream(idx, max_new_tokens, temperature, top_k, **options)), dim=1)

    @torch.inference_mode()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float = 1.0, vocab_size: int | None = None, uniforms: torch.Tensor | None = None,
               ) -> Iterator[torch.Tensor]:
        """
        Yield the ids (B,) that continue idx (B, T), position by position; the model sees the last block_size tokens.
        temperature 0 always takes the likeliest id; top_k draws among the k likeliest (None or 0: all), top_p among the
        fewest whose probabilities add up to it (Holtzman et al. 2019); ids from vocab_size on are padding, never drawn.
        uniforms: (B, max_new_tokens) random numbers in [0, 1), one a token; by default from torch's CPU generator.
        """
        T, block_size = idx.size(1), self.config.block_size
        uniforms = torch.rand(len(idx), max_new_tokens) if uniforms is None else uniforms
        caches = None  # where a block or attention of yours takes none, each step reads all tokens again
        parts = [part for block in self.transformer.h for part in (block, getattr(block, 'attn', block))]
        if all('cache' in inspect.signature(part.forward).parameters for part in parts):
            caches = [KVCache(min(block_size, T + max_new_tokens)) for _ in self.transformer.h]
        new = idx  # the tokens that are not in the caches yet
        for u in uniforms.to(idx.device).T:
            if caches and idx.size(1) <= block_size:
                logits, _ = self(new, caches=caches)
            else:  # past block_size each token stands at another position than before, so the caches are of no use
                logits, _ = self(idx[:, -block_size:])
            if not logits.isfinite().all():
                raise ValueError('the model makes NaN or infinity of this text')
            new = sample_ids(logits[:, -1, :vocab_size], u, temperature, top_k, top_p)[:, None]
            idx = torch.cat((idx.long(), new), dim=1)
            yield new[:, 0]

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, without position embeddings unless non_embedding=False; the tied matrix counts once."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def crop_block_size(self, block_size: int) -> None:
        """Keep the first block_size positions only. Raises ValueError if there are fewer."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is more than the model\'s {self.config.block_size} positions')
        kept = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(kept, freeze=False)
        self.config.block_size = block_size

    def flops_per_token(self) -> int:
        """Forward and backward: 6 N + 12 n_layer n_embd T; N parameters, T = block_size (Chowdhery et al. 2022)."""
        return 6 * self.get_num_params() + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Model FLOPs utilisation: fwdbwd_per_iter sequences in dt seconds over the GPU's peak; -1.0 if not known."""
        peak = peak_flops(self.transformer.wte.weight.device)
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak if peak else -1.0

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str) -> torch.optim.AdamW:
        """AdamW with two groups: matrices and embeddings decay; biases and the weights of LayerNorms do not."""
        params = list(self.parameters())
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))

    @classmethod
    def from_state(cls, config: GPTConfig, state: dict[str, torch.Tensor]) -> 'GPT':
        """A model on the tensors of a state dict (no copies if they are float32). Attention masks, LayerNorms listed
        twice, and prefixes `_orig_mod.` and `module.` are left out. Raises ValueError naming what does not fit."""
        with torch.device('meta'):  # names and shapes, but no memory
            model = cls(config)
        own = model.state_dict()
        state = {k.replace('_orig_mod.', '').removeprefix('module.'): v for k, v in state.items() if hasattr(v, 'ndim')}
        state = {k: v for k, v in state.items() if not k.endswith(('.attn.bias', '.attn.masked_bias', '.norm.weight'))}
        if 'transformer.wte.weight' in state:  # some writers leave the tied matrix out
            state.setdefault('lm_head.weight', state['transformer.wte.weight'])
        problems = [f'{k} is missing' for k in own if k not in state]
        problems += [f'{k} is not a tensor of this model' for k in state if k not in own]
        problems += [f'{k} is {tuple(state[k].shape)}, the model needs {tuple(own[k].shape)}'
                     for k in own if k in state and state[k].shape != own[k].shape]
        if problems:
            more = [f'and {len(problems) - 3} more'] if len(problems) > 3 else []
            raise ValueError('the weights do not fit the model: ' + '; '.join(problems[:3] + more))
        model.load_state_dict({k: state[k].float() for k in own}, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, dropout: float | None = None) -> 'GPT':
        """The model of a train.py checkpoint, on the CPU; dropout replaces the stored one. ValueError if misfit."""
        stored = {'dropout': 0.0, 'bias': True, **checkpoint['model_args']}  # older files have neither
        names = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
        if set(stored) != names:
            raise ValueError(f'model_args should hold {sorted(names)}; it holds {sorted(map(str, stored))}')
        args = stored if dropout is None else {**stored, 'dropout': dropout}
        return cls.from_state(GPTConfig(**args, gelu=checkpoint.get('gelu', 'exact')), checkpoint['model'])

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: dict | None = None) -> 'GPT':
        """Weights in transformers' format, float32, on the CPU: one of PUBLISHED from the hub or its local cache, or a
        folder with config.json. override_args may set dropout. Raises ValueError."""
        from safetensors import SafetensorError
        from transformers import GPT2Config, GPT2LMHeadModel

        if others := sorted({*(override_args or ())} - {'dropout'}):
            raise ValueError(f'only dropout can be overridden, not {others}')
        if model_type not in PUBLISHED and not os.path.isfile(os.path.join(model_type, 'config.json')):
            raise ValueError(f'{model_type} is none of {", ".join(PUBLISHED)} and no folder with config.json')
        try:
            if (kind := GPT2Config.get_config_dict(model_type)[0].get('model_type', 'gpt2')) != 'gpt2':
                raise ValueError(f'{model_type} holds a {kind}, not a GPT-2')
            hf, info = GPT2LMHeadModel.from_pretrained(model_type, dtype=torch.float32, output_loading_info=True,
                                                       ignore_mismatched_sizes=True)
        except (OSError, RuntimeError, SafetensorError) as e:
            why = f'{type(e).__name__}: {str(e).partition(chr(10))[0]}'
            raise ValueError(f'{model_type} cannot be loaded ({why}): give a folder that holds config.json and a whole '
                             'model.safetensors') from e
        # transformers would go on with fresh random values for what is not in the file
        if wrong := {kind: sorted(map(str, info[kind])) for kind in info if info[kind]}:
            raise ValueError(f'{model_type}: the weights do not fit its config.json: {wrong}')
        c = hf.config
        gelu = {'gelu': 'exact', 'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh'}.get(c.activation_function)
        if not (gelu and c.n_inner in (None, 4 * c.n_embd) and c.layer_norm_epsilon == 1e-5 and c.scale_attn_weights
                and not c.scale_attn_by_inverse_layer_idx and c.tie_word_embeddings):
            raise ValueError(f'{model_type} is no plain GPT-2: width, epsilon, attention scale or activation differs')
        config = GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                           n_embd=c.n_embd, bias=True, gelu=gelu, **(override_args or {}))
        state = hf.state_dict()
        return cls.from_state(config, {k: v.t().contiguous() if k.endswith(CONV1D) else v for k, v in state.items()})


def sample_ids(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int | None,
               top_p: float) -> torch.Tensor:
    """
    Token ids (B,) from logits (B, V) and uniforms u (B,). Lay the probabilities end to end on the line from 0 to 1 and
    take the token whose stretch contains u. So what a row draws depends on its own logits and u, and on nothing else.
    """
    if temperature < 1e-20:  # 0, or as good as that
        return logits.argmax(-1)
    logits = logits.float()
    if 0 < (top_k or 0) < logits.size(-1):
        kth = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()  # probabilities, up to a common factor
    if top_p < 1:
        likely = p.sort(-1, descending=True).values
        before = likely.cumsum(-1) - likely
        count = (before < top_p * likely.sum(-1, keepdim=True)).sum(-1, keepdim=True)  # the fewest that reach top_p
        p = p.masked_fill(p < likely.gather(-1, (count - 1).clamp(min=0)), 0.0)
    ends = p.cumsum(-1)  # where each token ends on the line
    index = (ends <= u[:, None] * ends[:, -1:]).sum(-1)  # so many tokens end at or before u: the next contains it
    return index.minimum((ends < ends[:, -1:]).sum(-1))  # if rounding leads past them all: the last that can be drawn


# Peaks of matrix multiplication in bfloat16 (V100 and T4: float16), dense, summed in float32, in TFLOP/s, from the
# vendors' datasheets. The first that is found in a device's name as whole words counts: 'H100 PCIe' before 'H100'.
PEAK_TFLOPS = {
    'V100': 125, 'T4': 65, 'A100': 312, 'A10': 125, 'A10G': 70, 'L4': 121, 'L40': 181, 'L40S': 362, 'H100 PCIe': 756,
    'H100 NVL': 835, 'H100': 989, 'H200 NVL': 835, 'H200': 989, 'B200': 2250, 'MI300X': 1307, 'MI300A': 981,
    'RTX 3060 Ti': 32, 'RTX 3060': 25, 'RTX 3070 Ti': 43, 'RTX 3070': 41, 'RTX 3080 Ti': 68, 'RTX 3080': 60,
    'RTX 3090 Ti': 80, 'RTX 3090': 71, 'RTX 4060 Ti': 44, 'RTX 4060': 30, 'RTX 4070 Ti SUPER': 88, 'RTX 4070 Ti': 80,
    'RTX 4070 SUPER': 71, 'RTX 4070': 58, 'RTX 4080 SUPER': 104, 'RTX 4080': 97, 'RTX 4090': 165, 'RTX 5060 Ti': 47,
    'RTX 5060': 38, 'RTX 5070 Ti': 88, 'RTX 5070': 62, 'RTX 5080': 113, 'RTX 5090': 210,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of a CUDA device in FLOP/s by the table above; None if it is not there, or a laptop's, which is slower."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    peaks = [1e12 * peak for part, peak in PEAK_TFLOPS.items() if re.search(rf'\b{part}\b', name)]
    return peaks[0] if peaks and 'Laptop' not in name else None


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with the arguments of nanoGPT's class, for code that imports it from here; nothing here uses it."""

    def __init__(self, ndim: int, bias: bool = True):
        super().__init__(ndim, bias=bias)
