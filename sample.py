"""
Write text with a trained model: a checkpoint of train.py, or the published GPT-2 weights.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --max_new_tokens=200
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
    python sample.py --start=FILE:prompt.txt
"""

import contextlib
import os

import torch

from data import checkpoint as ckpt
from data import codec
from model import GPT, resolve

# -- knobs ----------------------------------------------------------------------------------------------------------

init_from = 'resume'  # resume: the checkpoint in out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a local folder
out_dir = 'out'  # of the training run
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file, <|endoftext|> is the special token
num_samples = 10
max_new_tokens = 500  # in each sample
temperature = 0.8  # 1.0: as trained; below: likelier text; 0: always the likeliest token
top_k = 200  # draw among the k likeliest tokens; 0: among all
seed = 1337
device = 'auto'  # cuda, mps, cpu, cuda:1, ...; auto takes the first that is there
dtype = 'auto'  # float32, bfloat16 or float16; auto takes the fast one that the device computes in natively
compile = False  # torch.compile the model; pays only for very many tokens
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

problems = [message for bad, message in [
    (num_samples < 1, f'num_samples={num_samples} must be at least 1'),
    (max_new_tokens < 1, f'max_new_tokens={max_new_tokens} must be at least 1'),
    (not temperature >= 0, f'temperature={temperature} must not be negative; 0 always takes the likeliest token'),
    (top_k < 0, f'top_k={top_k} must not be negative; 0 is off'),
    (not 0 <= seed < 1 << 63, f'seed={seed} must lie between 0 and 2^63'),
] if bad]
try:
    device, dtype = resolve(device, dtype)
except ValueError as e:
    problems += e.args
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        problems.append(f'start=FILE:{start[5:]}: {getattr(e, "strerror", None) or "is not UTF-8"}')
if problems:
    fail(*problems)

# -- model and tokenizer --------------------------------------------------------------------------------------------

tokenizer = codec.GPT2Codec()
try:
    if init_from == 'resume':
        path = next((p for p in (os.path.join(out_dir, name) for name in ckpt.NAMES) if os.path.lexists(p)), None)
        if path is None:
            fail(f'no ckpt.pt or last.pt in out_dir={out_dir}: train first, or try --init_from=gpt2')
        checkpoint = ckpt.load(path)
        print(f'{path}: {checkpoint["iter_num"]} updates')
        model = GPT.from_checkpoint(checkpoint)
        if 'codec' in checkpoint:
            tokenizer = codec.from_state(checkpoint['codec'])
        else:  # an older file: the dataset folder knows
            folder = str(checkpoint.get('config', {}).get('dataset', ''))
            tokenizer = codec.of_folder(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', folder))
    else:
        model = GPT.from_pretrained(init_from)
except OSError as e:
    fail(str(e))
except ValueError as e:
    fail(*e.args)
vocab_size = model.config.vocab_size
if tokenizer.vocab_size > vocab_size or (tokenizer.name == 'char' and tokenizer.vocab_size != vocab_size):
    fail(f'the model has {vocab_size} token ids, its tokenizer ({tokenizer.name}) {tokenizer.vocab_size}: no match')
torch.manual_seed(seed)
torch.set_float32_matmul_precision('high')
model.eval().to(device)
if compile:
    model.forward = torch.compile(model.forward, dynamic=True)
device_type = device.partition(':')[0]
autocast = contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))

# -- prompt, samples ------------------------------------------------------------------------------------------------

if not start:
    start = '\n' if tokenizer.name == 'char' else codec.END_OF_TEXT
ids = tokenizer.encode(start, special=True)
if len(ids) > model.config.block_size:
    print(f'the prompt has {len(ids)} tokens; the model reads the last {model.config.block_size}')
prompt = torch.tensor(ids.astype('int64'), device=device).expand(num_samples, -1)  # (num_samples, T)
with autocast:
    samples = model.generate(prompt, max_new_tokens, temperature, top_k, vocab_size=tokenizer.vocab_size)
for sample in samples.tolist():
    print(tokenizer.decode(sample))
    print('---------------')
