"""
The GPT: configuration, blocks, loss, generation, weights in and out, optimizer groups, FLOPs.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), and the names of its released
    weights: wte, wpe, h, ln_1, c_attn, c_proj, ln_2, c_fc, ln_f.

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V = vocab_size.
"""

import math
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

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
        rules = [(getattr(self, name) < 1, f'{name}={getattr(self, name)} must be at least 1')
                 for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')]
        rules += [(self.n_head >= 1 and self.n_embd % self.n_head,
                   f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}'),
                  (not 0 <= self.dropout < 1, f'dropout={self.dropout} must lie in [0, 1)'),
                  (self.gelu not in ('exact', 'tanh'), f'gelu={self.gelu} must be exact or tanh')]
        if problems := [message for bad, message in rules if bad]:
            raise ValueError(*problems)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which position t sees positions <= t (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        # 3 times (B, nh, T, hs)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Position-wise feed-forward layer, four times as wide inside."""

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
    """Attention, then MLP, each reading a normalised copy of the residual stream and adding to it (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
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
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix reads tokens in and scores them out
        # every residual branch adds variance: the 2 n_layer projections into the stream start smaller (section 2.3)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                keep_logits: bool = True) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        idx: (B, T) token ids, T <= block_size; targets: (B, T) ids, -1 where no loss is wanted.
        Returns (logits, loss): without targets (B, 1, V) for the last position and None; with targets (B, T, V), or
        None where keep_logits is False so that they need not outlive the loss, and the mean cross-entropy in nats.
        Raises ValueError for a sequence longer than block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f'a sequence of {T} tokens is longer than block_size={self.config.block_size}')
        tok = self.transformer.wte(idx)  # (B, T, C)
        pos = self.transformer.wpe.weight[:T]  # (T, C)
        x = self.transformer.drop(tok + pos)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits if keep_logits else None, loss

    @torch.inference_mode()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, vocab_size: int | None = None) -> torch.Tensor:
        """
        Continue idx (B, T) by max_new_tokens sampled ids: (B, T + max_new_tokens). The model sees the last block_size
        tokens. temperature 0 is greedy; top_k keeps the k likeliest ids (None or 0: all); vocab_size excludes the ids
        of a padded vocabulary from there on. Sampling uses torch's generator.
        """
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1, :vocab_size].float()  # (B, V)
            if top_k:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
        return idx

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
        with torch.device('meta'):
            model = cls(config)
        state = {k.removeprefix('_orig_mod.'): v for k, v in state.items()}
        state = {k: v for k, v in state.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        state.setdefault('lm_head.weight', state.get('transformer.wte.weight'))  # some writers leave the tied copy out
        own = model.state_dict()
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
        config.json. override_args may set dropout. float32, on the CPU. Raises ValueError or OSError.
        """
        from safetensors import SafetensorError
        from transformers import GPT2Config, GPT2LMHeadModel

        override_args = override_args or {}
        if set(override_args) - {'dropout'}:
            raise ValueError(f'only dropout can be overridden, not {sorted(set(override_args) - {"dropout"})}')
        if model_type not in PUBLISHED and not os.path.isfile(os.path.join(model_type, 'config.json')):
            raise ValueError(f'{model_type} is none of {", ".join(PUBLISHED)} and no folder with config.json')
        if (kind := GPT2Config.get_config_dict(model_type)[0].get('model_type', 'gpt2')) != 'gpt2':
            raise ValueError(f'{model_type} holds a {kind}, not a GPT-2')
        try:
            hf, info = GPT2LMHeadModel.from_pretrained(model_type, dtype=torch.float32, output_loading_info=True,
                                                       ignore_mismatched_sizes=True)
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
