"""sample.py: a checkpoint becomes text, whatever is asked of it."""

import io
import shutil
from types import SimpleNamespace

import pytest
import torch

from data import DataError, codec
from data import checkpoint as ckpt
from model import GPT, GPTConfig

from .conftest import TINY, flags, save

END = '---------------\n'  # after each sample
CHARS = '\n abcdefghij'
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True)


@pytest.fixture
def out_dir(tmp_path):
    (tmp_path / 'out').mkdir()
    return tmp_path / 'out'


@pytest.fixture
def sample(script, out_dir, capsys):
    """sample(**options) runs sample.py on out_dir and returns what it printed, the samples and its exit code."""
    torch.set_num_threads(1)

    def execute(**options):
        capsys.readouterr()
        options = {'out_dir': out_dir, 'device': 'cpu', 'dtype': 'float32', 'num_samples': 2, 'max_new_tokens': 12,
                 **options}
        code = 0
        try:
            script('sample.py', *flags(**options))
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        said, _, text = out.partition(' updates\n')
        said = [line for line in (said + ' updates').split('\n') if not line.startswith('Overriding: ')]
        *samples, rest = text.split('\n' + END)
        return SimpleNamespace(out=out, err=err, code=code, said=said[0], text=text, samples=samples, rest=rest)
    return execute


def build(vocab_size: int, **more) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, 'vocab_size': vocab_size, **more})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)  # far enough from uniform that every option shows
    return model


def store(folder, model: GPT, tokenizer=None, name: str = 'ckpt.pt', iter_num: int = 7, state=None,
          **more) -> GPT:
    """A checkpoint as train.py writes it, or, without a tokenizer, as older files are."""
    args = {k: getattr(model.config, k) for k in (*SHAPE, 'vocab_size', 'dropout')}
    stored = {} if tokenizer is None else {'codec': tokenizer.state()}
    save(str(folder / name), {'model': state or dict(model.state_dict()), 'model_args': args, 'best_val_loss': 1.0,
                              'iter_num': iter_num, 'config': {}, **stored, **more})
    return model


@pytest.fixture
def chars(out_dir):
    """The codec of a character model that stands in out_dir."""
    tokenizer = codec.CharCodec(CHARS)
    store(out_dir, build(len(CHARS)), tokenizer)
    return tokenizer


@pytest.fixture
def gpt2():
    """GPT-2's codec, if its files are here."""
    tokenizer = codec.BPECodec()
    try:
        tokenizer.encode('a')
    except DataError as e:
        pytest.skip(f'no tokenizer files: {str(e)[:60]}')
    return tokenizer


# -- from training to text ------------------------------------------------------------------------------------------

def test_what_train_saves_can_be_sampled_without_its_dataset(sample, script, dataset, out_dir, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / 'copy')
    script('train.py', *flags(**{**TINY, 'max_iters': 2, 'dataset': copy, 'out_dir': out_dir}))
    shutil.rmtree(copy)
    done = sample(start='abc', num_samples=3, max_new_tokens=20)
    assert done.code == 0 and done.said == f'{out_dir}/ckpt.pt: 2 updates'
    assert len(done.samples) == 3 and done.rest == '' and done.text.count(END) == 3
    assert all(len(s) == 23 and s.startswith('abc') and set(s) <= set(' abcdefghij') for s in done.samples)
    assert len(set(done.samples)) == 3


def test_the_prompt_is_a_newline_unless_another_is_given(sample, chars):
    done = sample()
    assert all(len(s) == 13 and s[0] == '\n' for s in done.samples) and done.text.endswith('\n' + END)


def test_the_text_depends_on_the_seed_alone(sample, chars):
    first, again, other = sample(), sample(), sample(seed=1)
    assert first.samples == again.samples and first.samples != other.samples


@pytest.mark.parametrize('text', ['abc', ' a\nb\n', 'a' * 8], ids=repr)
def test_a_prompt_from_a_file(sample, chars, tmp_path, text):
    (tmp_path / 'prompt.txt').write_bytes(text.encode())
    done = sample(start=f'FILE:{tmp_path / "prompt.txt"}', max_new_tokens=4)
    assert all(s.startswith(text) and len(s) == len(text) + 4 for s in done.samples)
    assert done.samples == sample(start=text, max_new_tokens=4).samples


def test_a_prompt_file_in_utf8(sample, out_dir, tmp_path):
    tokenizer = codec.CharCodec('aé\U0001f600')
    store(out_dir, build(3), tokenizer)
    (tmp_path / 'prompt.txt').write_bytes('é\U0001f600'.encode())
    assert sample(start=f'FILE:{tmp_path / "prompt.txt"}').samples[0].startswith('é\U0001f600')


@pytest.mark.parametrize('content, problem', [(None, 'No such file or directory'), (b'\xff\xfe', 'is not UTF-8')])
def test_a_prompt_file_that_cannot_be_read(sample, chars, tmp_path, content, problem):
    path = tmp_path / 'prompt.txt'
    if content:
        path.write_bytes(content)
    done = sample(start=f'FILE:{path}')
    assert done.code == 2 and done.err == f'sample.py: start=FILE:{path}: {problem}\n'


# -- options ----------------------------------------------------------------------------------------------------------

def test_a_byte_order_mark_is_no_part_of_a_prompt(sample, chars, tmp_path):
    (tmp_path / 'prompt.txt').write_bytes(b'\xef\xbb\xbfab')
    assert sample(start=f'FILE:{tmp_path}/prompt.txt', num_samples=1).text == sample(start='ab', num_samples=1).text


def test_the_default_prompt_of_an_alphabet_without_newline(sample, out_dir):
    store(out_dir, build(4), codec.CharCodec('ACGT'))
    assert all(text[0] == 'A' for text in sample(num_samples=2).samples)


def test_what_only_resuming_needs_may_be_missing(sample, out_dir, chars):
    """And what older files do not have: dropout, bias."""
    path = out_dir / 'ckpt.pt'
    wanted, stored = sample().text, torch.load(path)
    kept = {key: stored[key] for key in ('model', 'model_args', 'config', 'codec')}
    assert stored['model_args']['bias'] and stored['model_args']['dropout'] == 0.0
    for name in ('dropout', 'bias'):
        del kept['model_args'][name]
    torch.save(kept, path)
    assert sample().text == wanted
    with pytest.raises(DataError, match=f'^{path} has no iter_num: sample.py can use it, but no run can go on from it'):
        ckpt.newest(str(out_dir))


def test_an_unknown_character_is_named(sample, chars):
    with pytest.raises(DataError, match=r"character 'Z' is not among the 12 known ones: '\\n abcdefghij'"):
        sample(start='abZ')


def test_an_empty_prompt_starts_from_a_newline(sample, chars):
    assert sample(start='').samples == sample(start='\n').samples


def test_an_empty_prompt_file_does_too(sample, chars, tmp_path):
    (tmp_path / 'prompt.txt').write_text('')
    assert sample(start=f'FILE:{tmp_path / "prompt.txt"}').samples == sample(start='\n').samples


def test_temperature_zero_is_greedy(sample, chars, out_dir):
    done = sample(start='abc', temperature=0, num_samples=3)
    model = GPT.from_checkpoint(ckpt.load(str(out_dir / 'ckpt.pt'))).eval()
    ids = torch.tensor([chars.encode('abc').tolist()])
    for _ in range(12):
        ids = torch.cat([ids, model(ids[:, -8:])[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert done.samples == [chars.decode(ids[0].tolist())] * 3
    assert sample(start='abc', temperature=0, seed=5, num_samples=3).samples == done.samples


def test_top_k_of_one_is_greedy_too(sample, chars):
    assert sample(top_k=1, temperature=2.0).samples == sample(temperature=0).samples


@pytest.mark.parametrize('off', [0, 'None', 12, 13, 10 ** 6])
def test_top_k_of_none_or_of_all_is_off(sample, chars, off):
    """12 is the whole vocabulary; what is larger is capped to it."""
    done = sample(top_k=off, max_new_tokens=60)
    assert done.code == 0 and done.samples == sample(top_k=12, max_new_tokens=60).samples
    assert done.samples != sample(top_k=2, max_new_tokens=60).samples


def test_top_k_keeps_the_likeliest(sample, chars, out_dir):
    model = GPT.from_checkpoint(ckpt.load(str(out_dir / 'ckpt.pt'))).eval()
    likeliest = model(torch.tensor([[chars.ids['a']]]))[0][0, -1].topk(3).indices.tolist()
    done = sample(start='a', top_k=3, num_samples=100, max_new_tokens=1, temperature=5.0)
    assert {s[1:] for s in done.samples} == set(chars.decode(likeliest))


def test_a_long_prompt_is_cut_from_the_left_and_that_is_said(sample, chars):
    done = sample(start='abcdefgh' + 'jihgfedc', temperature=0)
    assert 'the prompt has 16 tokens; the model reads the last 8\n' in done.text
    assert len(done.samples) == 2
    assert done.samples[1][16:] == sample(start='jihgfedc', temperature=0).samples[1][8:]
    assert 'the prompt has' not in sample(start='a' * 8).text


@pytest.mark.parametrize('count', [1, 2])
def test_a_sample_ends_before_the_stop_text(sample, chars, count):
    whole = sample(num_samples=count, max_new_tokens=40).samples
    stop = whole[0][11:14]
    done = sample(num_samples=count, max_new_tokens=40, stop=stop)
    assert done.samples == [s[0] + s[1:].partition(stop)[0] for s in whole] != whole


def test_stream_prints_what_comes_at_the_end_otherwise(sample, chars, monkeypatch):
    pieces = []
    monkeypatch.setattr('builtins.print', lambda *args, real=print, **more: (pieces.append(args), real(*args, **more)))
    streamed, prints = sample(stream=True, max_new_tokens=30), len(pieces)
    pieces.clear()
    assert streamed.text == sample(max_new_tokens=30).text and prints >= len(pieces) + 30


def test_what_cannot_fit_is_said_before_it_starts(sample, chars, monkeypatch):
    free, real = 0, open
    monkeypatch.setattr('builtins.open', lambda path, *args, **kwargs: real(path, *args, **kwargs) if path !=
                        '/proc/meminfo' else io.StringIO(f'MemFree: 1 kB\nMemAvailable: {free} kB\n'))
    for length, need in (7, 16 * 2 * 2 * 7 + 12 * 16), (20, 16 * 2 * 2 * 8 + 12 * 16 * 8):  # past block_size it reads 8
        need = (need * 4 + 24 * (length - 1)) * 3  # bytes, for three samples
        free = -(-need // 1024)  # KiB
        assert sample(num_samples=3, max_new_tokens=length - 1).code == 0
        free -= 1
        done = sample(num_samples=3, max_new_tokens=length - 1)
        assert done.code == 2 and done.err.endswith(
            f'num_samples=3 of max_new_tokens={length - 1} need 0.0 GB of memory, 0.0 GB are free: take fewer\n')
    assert 'need 240000.0 GB of memory' in sample(max_new_tokens=10**13, num_samples=1).err


def test_all_problems_in_one_list(sample, chars):
    done = sample(num_samples=0, max_new_tokens=0, temperature=-1, top_k=-1, dtype='bf16', device='tpu',
                  start='FILE:nowhere')
    problems = done.err.splitlines()
    assert done.code == 2 and len(problems) == 7 and all(p.startswith('sample.py: ') for p in problems)
    for value in ('num_samples=0', 'max_new_tokens=0', 'temperature=-1.0', 'top_k=-1', 'dtype=bf16', 'device=tpu',
                  'start=FILE:nowhere'):
        assert sum(value in p for p in problems) == 1


# -- files ----------------------------------------------------------------------------------------------------------

def test_no_checkpoint(sample, out_dir):
    with pytest.raises(DataError, match=f'^no ckpt.pt or last.pt in out_dir={out_dir}: train first, or try --init'):
        sample()


def test_last_is_read_if_there_is_no_best(sample, out_dir):
    tokenizer = codec.CharCodec(CHARS)
    store(out_dir, build(12), tokenizer, 'last.pt', iter_num=9)
    assert sample().said == f'{out_dir}/last.pt: 9 updates'
    store(out_dir, build(12), tokenizer, 'ckpt.pt', iter_num=4)
    assert sample().said == f'{out_dir}/ckpt.pt: 4 updates'


def test_a_damaged_best_is_not_passed_over(sample, out_dir):
    tokenizer = codec.CharCodec(CHARS)
    store(out_dir, build(12), tokenizer, 'last.pt')
    (out_dir / 'ckpt.pt').write_bytes(b'half')
    with pytest.raises(DataError, match=r'ckpt\.pt \(4 bytes\) is damaged .*last\.pt stands beside it'):
        sample()


def test_missing_and_misshapen_tensors_are_named(sample, out_dir):
    model = build(12)
    state = {**model.state_dict(), 'transformer.wpe.weight': torch.zeros(4, 16)}
    del state['transformer.ln_f.weight']
    store(out_dir, model, codec.CharCodec(CHARS), state=state)
    done = sample()
    assert done.code == 2 and 'transformer.ln_f.weight is missing' in done.err
    assert 'transformer.wpe.weight is (4, 16), the model needs (8, 16)' in done.err


# -- vocabularies ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('chars, vocab_size', [('abc', 5), ('abcdefg', 5)])
def test_weights_and_characters_that_do_not_fit(sample, out_dir, chars, vocab_size):
    store(out_dir, build(vocab_size), codec.CharCodec(chars))
    done = sample(start='a')
    assert done.code == 2 and done.samples == []
    assert done.err == (f'sample.py: the model has {vocab_size} token ids, its tokenizer (char) {len(chars)}: '
                        'no match\n')


def test_weights_of_characters_whose_dataset_is_gone(sample, out_dir):
    store(out_dir, build(65), config={'dataset': 'no_such_dataset'})
    done = sample()
    assert done.code == 2
    assert done.err == 'sample.py: the model has 65 token ids, its tokenizer (gpt2) 50257: no match\n'


def test_a_stored_tokenizer_that_is_unknown(sample, out_dir):
    store(out_dir, build(5), codec=dict(tokenizer='bytes'))
    with pytest.raises(DataError, match='^tokenizer bytes: choose char, or one that tiktoken knows'):
        sample()


@pytest.fixture
def padded(out_dir, gpt2):
    """A model of 50304 ids that wants nothing but the 47 that mean nothing."""
    model = build(50304, n_embd=4)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[50257:] = 5.0
    assert model(torch.tensor([[0]]))[0][0, -1].argmax() >= 50257
    return store(out_dir, model, gpt2)


@pytest.mark.parametrize('options', [dict(temperature=0), dict(), dict(top_k=0, temperature=3.0), dict(top_k=10 ** 6)],
                         ids=str)
def test_padded_ids_are_never_drawn(sample, padded, gpt2, options):
    done = sample(start='Hello', num_samples=4, max_new_tokens=24, **options)
    assert done.code == 0 and len(done.samples) == 4 and all(s.startswith('Hello') for s in done.samples)


@pytest.mark.parametrize('stop', ['', '\u597d'])
def test_a_character_of_several_tokens_is_streamed_whole(sample, out_dir, gpt2, stop):
    """A model that goes on with the tokens of the text, of which each may be part of a character."""
    text = '\u4f60\U0001f600\u597d!'
    ids = gpt2.encode(text).tolist()
    assert len(ids) > len(text) and len(set(ids)) == len(ids)
    model = build(50304, n_embd=2 * len(ids) + 2, n_head=1, n_layer=1, block_size=16)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        for t, id in enumerate(ids):  # position t asks for token t, louder than token t - 1 there asks for itself
            model.transformer.wpe.weight[t, t], model.lm_head.weight[id, t] = 3.0, 1.0
    store(out_dir, model, gpt2)
    done = sample(start='Hello', temperature=0, num_samples=1, max_new_tokens=len(ids), stop=stop)
    assert done.samples == ['Hello' + (text.partition(stop)[0] if stop else text)]


def test_end_of_text_in_the_prompt_is_the_special_token(sample, padded, gpt2):
    done = sample(start=codec.END_OF_TEXT * 8, max_new_tokens=1)  # 8 tokens, not 56
    assert done.code == 0 and 'the prompt has' not in done.text
    assert all(s.startswith(codec.END_OF_TEXT * 8) for s in done.samples)


def test_an_empty_prompt_starts_from_end_of_text(sample, padded, gpt2):
    done = sample(start='')
    assert all(s.startswith(codec.END_OF_TEXT) for s in done.samples)
    assert done.samples == sample(start=codec.END_OF_TEXT).samples


def test_a_local_folder_of_transformers(sample, out_dir, tmp_path, gpt2):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50257, n_positions=16, n_ctx=16, n_layer=1, n_head=2, n_embd=8)
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.save_pretrained(tmp_path / 'weights')
    done = sample(init_from=tmp_path / 'weights', start='Hello', temperature=0, num_samples=1, max_new_tokens=5)
    ids = torch.tensor([gpt2.encode('Hello').tolist()])
    for _ in range(5):
        ids = torch.cat([ids, hf(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert done.code == 0 and done.out.endswith(f'{gpt2.decode(ids[0].tolist())}\n{END}')


def test_a_local_folder_of_another_vocabulary(sample, tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_ctx=16, n_layer=1, n_head=2, n_embd=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'weights')
    done = sample(init_from=tmp_path / 'weights')
    assert done.code == 2
    assert done.err.endswith('sample.py: the model has 11 token ids, its tokenizer (gpt2) 50257: no match\n')


def test_init_from_something_else(sample):
    done = sample(init_from='gpt3')
    assert done.code == 2 and done.err.count('\n') == 1
    assert 'gpt3' in done.err and 'gpt2, gpt2-medium, gpt2-large, gpt2-xl' in done.err
