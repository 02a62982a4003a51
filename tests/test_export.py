"""export.py: transformers loads what it writes, as the same model with the same tokens; so do our own scripts."""

import glob
import json
import os
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch

from data import bins, codec
from model import GPT, GPTConfig

from .conftest import ROOT, TINY, flags, run
from .test_prepare import need_gpt2

transformers = pytest.importorskip('transformers')
WORDS = ['to', ' be', ' or', ' not', ', ', 't', 'o', '\n', ' ', 'b', 'e']
TEXTS = {'char': 'to be, or\nnot to be <|endoftext|>  \u00e9!', 'tokens': 'to be or not, to\nbe',
         'gpt2': 'To be, or not to be:\n\n  na\u00efve \u2014 that\'s 1234 <|endo'}


def codec_of(name):
    if name == 'char':
        return codec.CharCodec.of(TEXTS['char'] + 'abcdefghijklmnopqrstuvwxyz')
    if name == 'gpt2':
        need_gpt2()
    return codec.BPECodec() if name == 'gpt2' else codec.TokenCodec(WORDS)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """exported('char', bias=True): model, codec, and the folder that export.py made of its checkpoint."""
    def make(name, dtype=torch.float32, gelu='exact', **shape):
        folder, tokens = tmp_path_factory.mktemp('export'), codec_of(name)
        torch.manual_seed(1)
        size = -(-tokens.vocab_size // 64) * 64 if name == 'gpt2' else tokens.vocab_size
        args = dict(n_layer=2, n_head=4, n_embd=64, block_size=256, vocab_size=size, bias=False, dropout=0.1) | shape
        model = GPT(GPTConfig(**args, gelu=gelu)).eval()
        for p in model.parameters():  # far from zero: biases, too, and likely tokens that differ
            torch.nn.init.normal_(p, std=0.3)
        model.to(dtype).float()
        torch.save({'model': {k: v.to(dtype) for k, v in model.state_dict().items()}, 'model_args': args, 'gelu': gelu,
                    'codec': tokens.state(), 'iter_num': 7, 'best_val_loss': 1.5, 'config': {}}, folder / 'ckpt.pt')
        with pytest.MonkeyPatch.context() as m:
            m.setattr('sys.argv', ['export.py', f'--out_dir={folder}', f'--to={folder}/hf'])
            runpy.run_path(os.path.join(ROOT, 'export.py'), run_name='__main__')
        return model, tokens, f'{folder}/hf'
    return make


@pytest.mark.parametrize('name, options', [
    ('char', {}), ('gpt2', dict(gelu='tanh', bias=True)), ('tokens', dict(dtype=torch.bfloat16)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('tokens', dict(bias=True)), ('char', dict(dtype=torch.bfloat16, gelu='tanh', bias=True)),
        ('gpt2', {}), ('gpt2', dict(dtype=torch.bfloat16, bias=True))))])
def test_round_trip(exported, name, options, recwarn, capfd):
    model, tokens, folder = exported(name, **options)
    capfd.readouterr(), recwarn.clear()
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not [w for w in recwarn if 'transformers' in str(w.filename)] and not any(info.values()), info
    said = [line for line in capfd.readouterr().err.splitlines() if 'Loading weights' not in line and line.strip()]
    assert said == [], 'neither warnings nor a report of what is missing'
    hf.eval()
    # the same tokens, the same logits, the same text
    ids = tokens.encode(TEXTS[name])
    assert tokenizer(TEXTS[name])['input_ids'] == ids.tolist() and tokenizer.decode(ids.tolist()) == TEXTS[name]
    x, n = torch.from_numpy(ids.astype(np.int64))[None], tokens.vocab_size
    with torch.no_grad():
        ours, theirs = model(x, x)[0][..., :n], hf(x).logits
    assert theirs.shape == ours.shape and (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    made = hf.generate(x, max_new_tokens=200, do_sample=False)
    greedy = model.generate(x, made.size(1) - x.size(1), temperature=0, vocab_size=n)
    assert made.size(1) == x.size(1) + 200 or made[0, -1] == tokens.end_of_text
    assert tokenizer.decode(made[0]) == tokens.decode(greedy[0].tolist())
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert special == {hf.config.bos_token_id} != {None}
    # and back: the same tokens, weights bit for bit, biases that were not there as zeros
    assert codec.of_folder(folder).state() == tokens.state()
    back = GPT.from_pretrained(folder)
    for key, value in back.state_dict().items():
        was = model.state_dict().get(key, torch.zeros_like(value))
        assert torch.equal(value, was[:len(value)]), key


@pytest.mark.parametrize('texts, text, special', [
    (['x', '\n', '\n\n'], 'x\n\nx', '\n\n'), (['a', 'ab', 'c'], 'abc', 'ab'), (['A', None, 'C'], 'ACA<1>C', '<1>'),
    ([None, None], '<1><0><0>', '<0>')])
def test_tokens_that_are_parts_of_others_or_have_no_text(exported, texts, text, special, monkeypatch):
    monkeypatch.setattr('tests.test_export.WORDS', texts)
    _, tokens, folder = exported('tokens')
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)['input_ids']
    assert tokenizer.decode(ids) == text and tokenizer.bos_token == special
    if all(texts):
        assert ids == tokens.encode(text).tolist()
    else:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(special, ''), 'what no text holds'


@pytest.mark.slow
def test_our_scripts_read_it_with_its_tokens(exported, tmp_path):
    model, tokens, folder = exported('char')
    how = flags(device='cpu', dtype='float32', num_samples=1, start='or not', max_new_tokens=30)
    places = f'--out_dir={os.path.dirname(folder)}', f'--init_from={folder}'
    sampled = [run('sample.py', *how, place) for place in places]
    texts = [done.stdout.rpartition('or not')[2] for done in sampled]
    assert len(texts[0]) > 30 and texts[0] == texts[1], sampled[1].stderr
    ids = np.resize(tokens.encode(TEXTS['char']), 3000)
    options = {**TINY, 'init_from': folder, 'max_iters': 1, 'out_dir': tmp_path / 'out'}
    bins.write(str(tmp_path / 'same'), tokens, train=[ids], val=[ids])
    done = run('train.py', *flags(**options, dataset=tmp_path / 'same'))
    assert done.returncode == 0 and 'step 1: ' in done.stdout, done.stderr
    bins.write(str(tmp_path / 'other'), codec.CharCodec(tokens.chars[::-1]), train=[ids], val=[ids])
    done = run('train.py', *flags(**options, dataset=tmp_path / 'other'))
    assert done.returncode == 2 and done.stderr.endswith(
        f'dataset={tmp_path}/other has other tokens than the model of init_from={folder}, though as many: no match\n')


TASK = """
task: exact_val
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: loglikelihood
test_split: test
doc_to_text: context
doc_to_target: target
target_delimiter: ""
metric_list: [{metric: perplexity, aggregation: mean, higher_is_better: false}]
"""


BOTH = """
import sys
from lm_eval.__main__ import cli_evaluate
for folder in sys.argv[1:]:
    sys.argv = ['lm_eval', '--model', 'hf', '--model_args', f'pretrained={folder}/hf,dtype=float32', '--device', 'cpu',
                '--tasks', 'exact_val', '--include_path', folder, '--output_path', f'{folder}/found']
    cli_evaluate()
"""


@pytest.mark.slow
def test_lm_eval_finds_the_loss_of_train(exported, tmp_path):
    """On the same tokens: val.bin is one evaluation sequence, and the task a document of its text."""
    pytest.importorskip('lm_eval')
    losses = {}
    for name in ('char', 'gpt2'):
        _, tokens, folder = exported(name)
        shutil.copytree(folder, tmp_path / name / 'hf')
        ids = tokens.encode((TEXTS[name] + ' ') * 30)[:257]
        text, first = tokens.decode(ids.tolist()), tokens.decode(ids[:1].tolist())
        assert tokens.encode(text).tolist() == ids.tolist()
        bins.write(str(tmp_path / name / 'data'), tokens, train=[ids], val=[ids])
        done = run('train.py', *flags(device='cpu', dtype='float32', compile=False, eval_only=True, eval_iters=1,
                                      batch_size=1, init_from=folder, dataset=tmp_path / name / 'data', block_size=256))
        losses[name] = float(re.search('val loss ([0-9.]+)', done.stdout)[1])
        docs = tmp_path / name / 'docs.jsonl'
        docs.write_text(json.dumps({'context': first, 'target': text[len(first):]}) + '\n')
        (tmp_path / name / 'exact_val.yaml').write_text(TASK % docs)
    done = run(sys.executable, '-c', BOTH, *(str(tmp_path / name) for name in losses), timeout=240,
               env={**os.environ, 'HF_HOME': str(tmp_path / 'cache')})
    for name, loss in losses.items():
        [found] = glob.glob(str(tmp_path / name / 'found' / '**' / 'results*.json'), recursive=True) or [done.stderr]
        with open(found, encoding='utf-8') as f:
            log_perplexity = -json.load(f)['results']['exact_val']['perplexity,none']  # of the document as a whole
        assert abs(log_perplexity / 256 - loss) < 1e-3 and loss > 0.5, name


@pytest.mark.slow
def test_mistakes_are_one_line(exported, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'a').write_text('')
    for arguments, says in (([], '--to=: name a new folder'),
                            ([f'--to={tmp_path}/full'], f'--to={tmp_path}/full: name a new folder'),
                            ([f'--to={tmp_path}/full/a'], f'--to={tmp_path}/full/a: name a new folder'),
                            ([f'--to={tmp_path}/x', f'--out_dir={tmp_path}'], 'no ckpt.pt or last.pt in out_dir='),
                            ([f'--to={tmp_path}/full/a/b', f'--out_dir={os.path.dirname(exported("char")[2])}'],
                             f'{tmp_path}/full/a/b could not be written (Not a directory)')):
        done = run('export.py', *arguments)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count('\n') == 1, done.stderr


@pytest.mark.slow
def test_a_tokenizer_of_its_own_is_said(tmp_path):
    for name, raw in (('tokenizer.json', '{"model": {"vocab": {"a": 0, "b": 1}}}'), ('vocab.json', '{"!": 0}'),
                      ('vocab.json', '[1, ')):
        (tmp_path / name).write_text(raw)
        (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
        done = run('sample.py', f'--init_from={tmp_path}', '--device=cpu')
        assert done.returncode == 2 and done.stderr == (
            f'{tmp_path}/{name} is not GPT-2\'s tokenizer, and the meta.pkl that export.py writes is not there\n')
        os.remove(tmp_path / name)
