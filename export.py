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

from data import DataError, codec, versions, writing
from data import checkpoint as ckpt
from model import CONV1D, GPT

# -- options --------------------------------------------------------------------------------------------------------

out_dir = 'out'  # of the training run
to = ''  # the folder to write
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), 'configurator.py'), encoding='utf-8').read())
need(to and (not os.path.lexists(to) or os.path.isdir(to) and not os.listdir(to)), f'--to={to}: name a new folder')
end_if_wrong()

# -- tokenizer ------------------------------------------------------------------------------------------------------

path, checkpoint = ckpt.to_sample(out_dir)
tokenizer = codec.of_checkpoint(checkpoint)
if isinstance(tokenizer, codec.BPECodec):
    converter = TikTokenConverter(pattern=tokenizer.bpe._pat_str, extra_special_tokens=tokenizer.bpe._special_tokens)
    converter.load_tiktoken_bpe = lambda path: tokenizer.bpe._mergeable_ranks
    built, special = converter.converted(), codec.END_OF_TEXT
else:  # the longest token that fits first; <i> for an id without a text
    texts = list(tokenizer.chars if tokenizer.name == 'char' else tokenizer.texts)
    ids = {text or f'<{i}>': i for i, text in enumerate(texts) if not re.search('[\ud800-\udfff]', text or '')}
    # bos, eos and pad: an id without a text, or a token that is no part of another, since this one is looked for first
    wanted = [*sorted({*ids} - {*texts})[:1], tokenizer.default_prompt, *sorted(ids, key=len)[-1:]]
    special = next((t for t in wanted if t in ids and not any(t in other and t != other for other in ids)), None)
    longest_first = '|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))
    built = Tokenizer(models.WordLevel(ids))
    built.pre_tokenizer, built.decoder = pre_tokenizers.Split(Regex(longest_first), 'isolated'), decoders.Fuse()
if built.get_vocab_size() != tokenizer.vocab_size:
    raise DataError(f'{tokenizer.name}: {tokenizer.vocab_size} ids, {built.get_vocab_size()} of them with a text of '
                    'their own in Unicode: no tokenizer of transformers can hold that')

# -- model and files ------------------------------------------------------------------------------------------------

model = GPT.from_checkpoint(checkpoint)
c, bos = model.config, built.token_to_id(special)
hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size=tokenizer.vocab_size, n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
    n_head=c.n_head, activation_function={'exact': 'gelu', 'tanh': 'gelu_new'}[c.gelu], resid_pdrop=c.dropout,
    embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=bos, eos_token_id=bos, pad_token_id=bos))
ours = model.state_dict()
for name, weight in hf.state_dict().items():  # rows beyond the vocabulary are padding; biases not there are zeros
    w = ours.get(name, torch.zeros_like(weight))[:len(weight) if 'wte' in name or 'lm_head' in name else None]
    weight.copy_(w.t() if name.endswith(CONV1D) else w)
if tokenizer.end_of_text is None:  # a newline, or what else it is, is neither where to stop nor to be overlooked
    hf.generation_config.eos_token_id = hf.generation_config.pad_token_id = None
told = {**checkpoint.get('config', {}), **checkpoint['model_args'], 'vocab_size': tokenizer.vocab_size, 'gelu': c.gelu,
        'parameters': hf.num_parameters(), 'updates': checkpoint.get('iter_num'), 'dtype': checkpoint.get('dtype'),
        "the run's best val loss": checkpoint.get('best_val_loss'), 'tokens': tokenizer.name, 'bos': repr(special),
        **versions(), 'transformers': transformers.__version__}
with writing(to):
    hf.save_pretrained(to)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token=special, eos_token=special, pad_token=special,
        model_max_length=c.block_size, clean_up_tokenization_spaces=False).save_pretrained(to)
    if hasattr(tokenizer, 'meta'):  # by this our own scripts know its tokens
        with open(os.path.join(to, 'meta.pkl'), 'wb') as f:
            pickle.dump(tokenizer.meta(), f, protocol=4)
    with open(os.path.join(to, 'README.md'), 'w', encoding='utf-8') as f:
        f.write('---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n| exactGPT | |\n|---|---|\n')
        f.writelines(f'| {key} | {value} |\n' for key, value in told.items())
print(f'{path} is now {to}, in transformers\' format')
