"""
Write a checkpoint of train.py as a folder in transformers' format, with its tokenizer:

    python export.py --out_dir=out-shakespeare-char --to=shakespeare-hf

AutoModelForCausalLM and AutoTokenizer load it. sample.py and train.py read it back by --init_from=shakespeare-hf.
"""

import os
import pickle
import re

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from data import DataError, codec
from data import checkpoint as ckpt
from model import CONV1D, GPT

# -- options --------------------------------------------------------------------------------------------------------

out_dir = 'out'  # of the training run
to = ''  # the folder to write
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), 'configurator.py'), encoding='utf-8').read())
need(to, 'to= is empty: name the folder to write')
need(not os.path.isdir(to) or not os.listdir(to), f'to={to} holds files already: name another folder')
end_if_wrong()

# -- tokenizer ------------------------------------------------------------------------------------------------------

path, checkpoint = ckpt.to_sample(out_dir)
tokenizer = codec.of_checkpoint(checkpoint)
special = tokenizer.default_prompt  # stands for what begins and ends a text; it is what an empty prompt becomes
if isinstance(tokenizer, codec.BPECodec):
    converter = TikTokenConverter(pattern=tokenizer.bpe._pat_str, extra_special_tokens=tokenizer.bpe._special_tokens)
    converter.load_tiktoken_bpe = lambda path: tokenizer.bpe._mergeable_ranks
    built = converter.converted()
else:  # the longest token that fits first
    ids = {} if getattr(tokenizer, 'raw', False) else {text: i for i, text in tokenizer.itos.items()}
    longest_first = '|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))
    built = Tokenizer(models.WordLevel(ids))
    built.pre_tokenizer, built.decoder = pre_tokenizers.Split(Regex(longest_first), 'isolated'), decoders.Fuse()
if built.get_vocab_size() != tokenizer.vocab_size:
    raise DataError(f'{tokenizer.name}: {tokenizer.vocab_size} ids, {built.get_vocab_size()} of them with a text of '
                    'their own: no tokenizer of transformers can hold that')

# -- model and files ------------------------------------------------------------------------------------------------

model = GPT.from_checkpoint(checkpoint)
c, bos = model.config, built.token_to_id(special)
hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size=tokenizer.vocab_size, n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
    n_head=c.n_head, activation_function={'exact': 'gelu', 'tanh': 'gelu_new'}[c.gelu], resid_pdrop=c.dropout,
    embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=bos, eos_token_id=bos, pad_token_id=bos))
ours, weights = model.state_dict(), hf.state_dict()
for name, weight in weights.items():  # rows beyond the vocabulary are padding; biases that are not there are zeros
    w = ours.get(name, torch.zeros_like(weight))[:len(weight) if 'wte' in name or 'lm_head' in name else None]
    weights[name] = (w.t() if name.endswith(CONV1D) else w).contiguous()
hf.load_state_dict(weights)
if tokenizer.end_of_text is None:  # a newline, or what else it is, is neither where to stop nor to be overlooked
    hf.generation_config.eos_token_id = hf.generation_config.pad_token_id = None
hf.save_pretrained(to)
transformers.PreTrainedTokenizerFast(
    tokenizer_object=built, bos_token=special, eos_token=special, pad_token=special, model_max_length=c.block_size,
    clean_up_tokenization_spaces=False).save_pretrained(to)
if hasattr(tokenizer, 'meta'):  # by this our own scripts know its tokens
    with open(os.path.join(to, 'meta.pkl'), 'wb') as f:
        pickle.dump(tokenizer.meta(), f, protocol=4)
told = {'data': checkpoint.get('config', {}).get('dataset'), 'updates': checkpoint.get('iter_num'),
        'best val loss': checkpoint.get('best_val_loss'), 'tokens': tokenizer.name, 'shape': checkpoint['model_args'],
        'options': checkpoint.get('config'), 'torch': torch.__version__, 'transformers': transformers.__version__}
with open(os.path.join(to, 'README.md'), 'w', encoding='utf-8') as f:
    f.write('---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n'
            f'A GPT of {model.get_num_params():,} parameters, trained by exactGPT\'s train.py.\n\n| | |\n|---|---|\n')
    f.writelines(f'| {key} | {value} |\n' for key, value in told.items())
print(f'{path} is now {to}, in transformers\' format')
