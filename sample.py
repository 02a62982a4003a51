"""
Write text with a trained model: a checkpoint of train.py, or the published GPT-2 weights.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --max_new_tokens=200
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
    python sample.py --start=FILE:prompt.txt
"""

try:
    import fast  # speed only; before torch, because it also makes imports faster
except ModuleNotFoundError:  # deleted: everything works without it
    fast = None
import codecs
import contextlib
import math
import os
import sys

import numpy as np
import torch

from data import checkpoint as ckpt
from data import codec
from data.bins import draw
from model import GPT

# -- options --------------------------------------------------------------------------------------------------------

init_from = 'resume'  # resume: the checkpoint in out_dir; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a local folder
out_dir = 'out'  # of the training run
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file, <|endoftext|> is the special token
num_samples = 10  # texts to write
max_new_tokens = 500  # in each sample
temperature = 0.8  # 1.0: as trained; below: likelier text; 0: always the likeliest token
top_k = 200  # draw among the k likeliest tokens; 0: among all
top_p = 1.0  # draw among the fewest tokens that have this much probability together; 1.0: among all
stop = ''  # end a sample where this text appears in it; <|endoftext|> for GPT-2's end of a document
stream = False  # show the first sample while it is made; with num_samples=1 it always is
seed = 1337  # sample i follows from (seed, i), whatever the number of samples
device = 'auto'  # cuda, mps, cpu, cuda:1, ...; auto takes the first that is there
dtype = 'auto'  # float32, bfloat16 or float16; auto takes the fast one that the device computes in natively
compile = False  # with fast.py: compile steps past block_size, on a CPU all; takes a minute, pays for many tokens
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), 'configurator.py'), encoding='utf-8').read())

at_least(1, 'num_samples', 'max_new_tokens')
need(0 <= temperature < math.inf,
     f'temperature={temperature} must be finite and not negative; 0 always takes the likeliest token')
need(top_k >= 0, f'top_k={top_k} must not be negative; 0 is off')
need(0 < top_p <= 1, f'top_p={top_p} must lie in (0, 1]; 1.0 is off')
need(0 <= seed < 1 << 63, f'seed={seed} must lie between 0 and 2^63')
device, dtype = resolve(device, dtype)
if start.startswith('FILE:'):
    try:
        with open(os.path.expanduser(start[5:]), encoding='utf-8-sig') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        need(False, f'start=FILE:{start[5:]}: {getattr(e, "strerror", None) or "is not UTF-8"}')
end_if_wrong()

# -- model and tokenizer --------------------------------------------------------------------------------------------

try:
    if init_from == 'resume':
        path, checkpoint = ckpt.to_sample(out_dir)
        with fast.loading() if fast else contextlib.nullcontext():
            model = GPT.from_checkpoint(checkpoint)
        tokenizer = codec.of_checkpoint(checkpoint)
    else:
        tokenizer = codec.of_folder(init_from)
        model = GPT.from_pretrained(init_from)
except OSError as e:
    fail(str(e))
except ValueError as e:
    fail(*e.args)
if init_from == 'resume':
    print(f'{path}: {checkpoint.get("iter_num", "an unknown number of")} updates')
vocab_size = model.config.vocab_size
if tokenizer.vocab_size > vocab_size or (tokenizer.end_of_text is None and tokenizer.vocab_size != vocab_size):
    fail(f'the model has {vocab_size} token ids, its tokenizer ({tokenizer.name}) {tokenizer.vocab_size}: no match')
number_format = getattr(torch, dtype)
if device.startswith('cuda:'):
    torch.cuda.set_device(device)  # on which kernels run
model.eval().to(device, number_format)

# -- prompt, samples ------------------------------------------------------------------------------------------------

if not start or (start == '\n' and tokenizer.end_of_text is None):
    start = tokenizer.default_prompt
ids = tokenizer.encode(start, special=True)
if len(ids) > model.config.block_size:
    print(f'the prompt has {len(ids)} tokens; the model reads the last {model.config.block_size}')
ids = ids[-model.config.block_size:].tolist()
# memory: keys and values of every token, and about 12 C values for each that a block reads at once: of the prompt, or,
# past block_size, of a window; ids and random numbers
C, block_size, total = model.config.n_embd, model.config.block_size, len(ids) + max_new_tokens
window = block_size if total > block_size else len(ids)
needed = (2 * model.config.n_layer * min(block_size, total) + 12 * window) * C * num_samples * number_format.itemsize
needed += 24 * num_samples * max_new_tokens
free = free_memory(device)
if needed > free:
    fail(f'num_samples={num_samples} of max_new_tokens={max_new_tokens} need {needed / 1e9:.1f} GB of memory, '
         f'{free / 1e9:.1f} GB are free: take fewer')
prompt = torch.tensor(ids, device=device).expand(num_samples, -1)  # (num_samples, T)
with torch.inference_mode():
    if not model(prompt[:1])[0].isfinite().all():
        sys.exit(f'the model makes NaN or infinity of the prompt in {dtype}: try --dtype=float32')
# 24 bits of each uint64: exact in float32, and below 1
uniforms = np.stack([draw(max_new_tokens, seed, 'sample', i) >> 40 for i in range(num_samples)]) / np.float32(1 << 24)
how = dict(temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=tokenizer.vocab_size,
           uniforms=torch.from_numpy(uniforms.astype(np.float32)))
if fast:
    steps = fast.stream(model, prompt, max_new_tokens, **how, compiled=compile, spare=free - needed)
else:
    steps = model.stream(prompt, max_new_tokens, **how)


def until_stop(text):
    """The text as far as the stop text, and whether that was in it."""
    head, found, _ = text.partition(stop) if stop else (text, '', '')
    return head, bool(found)


made = []  # ids (num_samples,), one tensor a step
first_shown = live = stream or num_samples == 1
if live:
    print(start, end='', flush=True)
    decoder, text, shown = codecs.getincrementaldecoder('utf-8')('replace'), '', 0
for step in steps:
    made.append(step)
    if live:  # a token may be half a character, and the end of the text half the stop text: both wait for the rest
        text, ended = until_stop(text + decoder.decode(tokenizer.decode_bytes(step[:1].tolist())))
        sure = len(text) if ended else max(shown, len(text) - max(0, len(stop) - 1))
        print(text[shown:sure], end='', flush=True)
        shown = sure
        live = not ended
        if ended and num_samples == 1:
            break
    elif stop and len(made) % 16 == 0:  # now and then, since looking at the tokens waits for the device
        if all(until_stop(tokenizer.decode(sample))[1] for sample in torch.stack(made, dim=1).tolist()):
            break
steps.close()
if first_shown:
    print(text[shown:] if live else '')
    print('---------------')
for sample in torch.stack(made, dim=1).tolist()[1 if first_shown else 0:]:
    print(start + until_stop(tokenizer.decode(sample))[0])
    print('---------------')
