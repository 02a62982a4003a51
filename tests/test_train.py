"""train.py: what it prints, saves, refuses and survives, on models that train in a tenth of a second."""

import glob
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from data import DataError, bins, codec, runlog
from data import checkpoint as ckpt
from model import GPT, GPTConfig

from .conftest import ROOT, TINY, flags, run, save, torchrun

FLOAT = r'\d+\.\d{4}'
STEP = re.compile(rf'step (\d+): train loss ({FLOAT}), val loss ({FLOAT})')
ITER = re.compile(rf'iter (\d+): loss ({FLOAT}), time (\d+\.\d\d)ms, mfu (-?\d+\.\d\d)%, '
                  r'([\d,]+) tok/s(?:, ((?:\d+ days?, )?\d+:\d\d:\d\d) left)?')


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / 'out'


@pytest.fixture
def train(script, dataset, out_dir, capsys):
    """train(**options) runs train.py into out_dir and returns what it printed, its exit code and its names."""
    torch.set_num_threads(1)  # so little work is done faster by one

    def execute(on_step=lambda step, model: None, **options):
        capsys.readouterr()
        code, names = 0, {}
        try:
            names = script('train.py', *flags(**{**TINY, 'dataset': dataset, 'out_dir': out_dir, **options}),
                           on_step=on_step)
        except SystemExit as e:
            code = e.code or 0
        printed = capsys.readouterr()
        lines = [line for line in printed.out.splitlines() if not line.startswith('Overriding: ')]
        return SimpleNamespace(out=printed.out, err=printed.err, lines=lines, code=code, names=names)
    return execute


def records(out_dir, kind: str) -> list[dict]:
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        return [r for r in map(json.loads, f) if r['kind'] == kind]


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'run.lock'}


def iters(done) -> list[int]:
    return [int(m[1]) for m in map(ITER.fullmatch, done.lines) if m]


def steps(done) -> list[int]:
    return [int(m[1]) for m in map(STEP.fullmatch, done.lines) if m]


def char_dataset(folder, chars: str) -> str:
    """A dataset of 300 tokens over the given characters."""
    tokenizer = codec.CharCodec(chars)
    ids = tokenizer.encode((chars * 300)[:300])
    bins.write(str(folder), tokenizer, train=[ids], val=[ids])
    return str(folder)


# -- a plain run ----------------------------------------------------------------------------------------------------

def test_the_loss_falls(train, out_dir):
    train(max_iters=100, lr_decay_iters=100, learning_rate=1e-2, min_lr=1e-3, eval_interval=50, batch_size=32,
          gradient_accumulation_steps=1)
    first, middle, last = (r['val/loss'] for r in records(out_dir, 'eval'))
    assert abs(first - math.log(11)) < 0.1  # 11 characters, and a fresh model knows none of them
    assert last < middle < first - 0.2 and last < 2.0


def test_every_line_of_a_run(train, out_dir):
    done = train()
    saving = re.escape(f'saving checkpoint to {out_dir}')
    expected = [r'device cpu, dtype float32, processes 1',
                r'tokens per iteration will be: 128; in all 1,024, 0\.\d\d times the train part',
                'number of parameters: 0.03M', STEP.pattern.replace(r'(\d+)', '0', 1)]
    for i in range(8):
        expected.append(ITER.pattern.replace(r'(\d+)', str(i), 1))
        if i in (3, 7):
            expected += [STEP.pattern.replace(r'(\d+)', str(i + 1), 1), saving]
    assert len(done.lines) == len(expected), done.out
    for line, pattern in zip(done.lines, expected):
        assert re.fullmatch(pattern, line), (pattern, line)
    assert done.code == 0 and done.err == ''
    assert 'Overriding: n_embd = 32\n' in done.out


def test_tokens_per_iteration_has_thousands_separators(train):
    done = train(batch_size=64, gradient_accumulation_steps=16, max_iters=1)
    assert any(line.startswith('tokens per iteration will be: 16,384; in all ') for line in done.lines)


def test_mfu_is_unknown_on_a_cpu(train):
    done = train(max_iters=8)
    assert [ITER.fullmatch(line)[4] for line in done.lines if ITER.fullmatch(line)] == ['-100.00'] * 8


@pytest.mark.parametrize('log_interval, expected', [(1, [*range(8)]), (3, [0, 3, 6]), (100, [0])])
def test_log_interval(train, log_interval, expected):
    assert iters(train(log_interval=log_interval)) == expected


@pytest.mark.parametrize('max_iters, eval_interval, evaluated', [
    (8, 4, [0, 4, 8]), (6, 4, [0, 4, 6]), (3, 10, [0, 3]), (2, 1, [0, 1, 2]), (1, 1, [0, 1]), (0, 4, [0])])
def test_updates_evaluations_and_saves(train, out_dir, max_iters, eval_interval, evaluated):
    updates = []
    done = train(on_step=lambda step, model: updates.append(step), max_iters=max_iters, eval_interval=eval_interval)
    assert updates == [*range(1, max_iters + 1)] and iters(done) == [*range(max_iters)]
    assert steps(done) == evaluated and [r['iter'] for r in records(out_dir, 'eval')] == evaluated
    saves = [i for i, line in enumerate(done.lines) if line == f'saving checkpoint to {out_dir}']
    assert [int(STEP.fullmatch(done.lines[i - 1])[1]) for i in saves] == evaluated[1:]  # none at step 0
    if max_iters:
        saved = ckpt.load(str(out_dir / 'ckpt.pt'))
        assert saved['iter_num'] == max_iters
        assert {float(s['step']) for s in saved['optimizer']['state'].values()} == {max_iters}
    else:
        assert sorted(os.listdir(out_dir)) == ['log.jsonl']


def test_evaluation_does_not_disturb_training(train, out_dir):
    """The original drew training batches and evaluation batches from one stream."""
    logs = []
    for more in ({'eval_interval': 1, 'eval_iters': 5}, {'eval_interval': 100}):
        train(dropout=0.1, **more)
        logs.append([(r['iter'], r['loss'], r['norm']) for r in records(out_dir, 'train')])
    assert logs[0] == logs[1] and len(logs[0]) == 8


def test_the_schedule_is_followed(train, out_dir):
    train(max_iters=12, warmup_iters=2, lr_decay_iters=10, learning_rate=3e-3, min_lr=1e-3)
    warm_up = [3e-3 * (i + 1) / 3 for i in range(2)]
    cosine = [1e-3 + 1e-3 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [r['lr'] for r in records(out_dir, 'train')] == pytest.approx(warm_up + cosine + [1e-3] * 2, rel=1e-12)
    train(decay_lr=False, learning_rate=3e-3)
    assert [r['lr'] for r in records(out_dir, 'train')] == [3e-3] * 8


@pytest.mark.parametrize('warmup, decay, rates', [
    (10, 110, {0: 1e-3 / 11, 1: 2e-3 / 11, 9: 1e-2 / 11, 10: 1e-3, 35: 1e-4 + 9e-4 * (2 + math.sqrt(2)) / 4, 60: 5.5e-4,
               109: 1e-4 + 4.5e-4 * (1 + math.cos(0.99 * math.pi)), 110: 1e-4, 111: 1e-4, 10 ** 9: 1e-4}),
    (0, 10, {0: 1e-3, 10: 1e-4}), (0, 0, {0: 1e-4}), (5, 5, {4: 5e-3 / 6, 5: 1e-4}), (5, 3, {4: 5e-3 / 6})])
def test_learning_rate(train, warmup, decay, rates):
    lr_at = train(max_iters=0, eval_iters=1, learning_rate=1e-3, min_lr=1e-4, warmup_iters=warmup,
                  lr_decay_iters=decay).names['lr_at']
    assert {step: lr_at(step) for step in rates} == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize('grad_clip', [0.0, 0.25])
def test_gradients_are_clipped_to_the_norm_unless_off(train, out_dir, grad_clip):
    done = train(max_iters=1, grad_clip=grad_clip, beta1=0.0, beta2=0.0, decay_lr=False)
    [norm] = [r['norm'] for r in records(out_dir, 'train')]
    assert norm > 0.5  # before clipping
    moments = [s['exp_avg'] for s in done.names['optimizer'].state_dict()['state'].values()]  # the gradients, beta1=0
    seen = math.sqrt(sum(float((m.double() ** 2).sum()) for m in moments))
    assert seen == pytest.approx(grad_clip or norm, rel=1e-4)


def test_loss_and_gradient_are_those_of_the_whole_batch(train, out_dir, dataset):
    train(max_iters=1, gradient_accumulation_steps=3)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**{k: TINY[k] for k in ('n_layer', 'n_head', 'n_embd', 'block_size')}, bias=False,
                          vocab_size=11))
    data = bins.Bins(dataset, TINY['block_size'])
    loss = sum(model(*data.train_batch(1337, 0, row, 3, TINY['batch_size']))[1] for row in range(3)) / 3
    loss.backward()
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    [record] = records(out_dir, 'train')
    assert record['loss'] == pytest.approx(loss.item(), abs=1e-5)
    assert record['norm'] == pytest.approx(norm, rel=1e-4)


def test_the_log_says_what_ran(train, out_dir):
    done = train(max_iters=1, learning_rate=2e-3)
    [header] = records(out_dir, 'run')
    assert header['config'] == done.names['config'] and header['config']['learning_rate'] == 2e-3
    assert header['torch'] == torch.__version__ and header['device'] == 'cpu' and header['dtype'] == 'float32'
    [record] = records(out_dir, 'train')
    assert set(record) == {'kind', 'iter', 'loss', 'lr', 'norm', 'ms', 'tok_s'}
    assert set(records(out_dir, 'eval')[0]) == {'kind', 'iter', 'train/loss', 'val/loss', 'lr', 'mfu'}


@pytest.mark.skipif(not os.path.exists(os.path.join(ROOT, '.git')), reason='no git checkout')
def test_the_log_names_the_commit(train, out_dir):
    head = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip('git does not say')
    train(max_iters=1)
    [header] = records(out_dir, 'run')
    assert str(header['commit']).startswith(head.stdout[:7])


# -- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_the_file_is_written_beside_an_evaluation(train, out_dir, monkeypatch, device):
    """While the train split is evaluated; and it is there before the evaluation is logged or anything updated."""
    begun, weights, written, logged = threading.Event(), {}, [], []
    read, save, write = bins.Bins.eval_batches, torch.save, runlog.RunLog.write

    def eval_batches(self, split, *shape):
        (begun.set if split == 'train' else begun.clear)()
        return read(self, split, *shape)

    def slow_save(checkpoint, f):
        assert begun.wait(20), 'the file was not begun before the evaluation'
        time.sleep(0.3)
        save(checkpoint, f)
        written.append((checkpoint['iter_num'], max(weights), max(r['iter'] for r in records(out_dir, 'eval'))))

    def write_log(self, kind, **values):
        if kind == 'eval' and values['iter']:
            saved = ckpt.load(str(out_dir / 'ckpt.pt'))
            logged.append((values['iter'], saved['iter_num']))
            assert torch.equal(saved['model']['lm_head.weight'], weights[values['iter']])
        write(self, kind, **values)

    monkeypatch.setattr(bins.Bins, 'eval_batches', eval_batches)
    monkeypatch.setattr(torch, 'save', slow_save)
    monkeypatch.setattr(runlog.RunLog, 'write', write_log)
    done = train(lambda step, model: weights.update({step: model.lm_head.weight.detach().cpu().clone()}),
                 device=device)
    assert done.code == 0 and written == [(4, 4, 0), (8, 8, 4)] and logged == [(4, 4), (8, 8)]


@pytest.mark.parametrize('problem', ['nan', 'error'])
def test_a_file_begun_before_a_failed_evaluation_is_dropped(train, out_dir, monkeypatch, problem):
    read, save, slow = bins.Bins.eval_batches, torch.save, []

    def eval_batches(self, split, *shape):
        for x, y, n in read(self, split, *shape):
            if split == 'train' and os.path.exists(out_dir / 'ckpt.pt'):  # so at step 8
                if problem == 'error':
                    raise DataError('the data is gone')
                n = math.nan
            yield x, y, n

    def slow_save(checkpoint, f):
        time.sleep(0.3)
        save(checkpoint, f)
        slow.append(checkpoint['iter_num'])

    monkeypatch.setattr(bins.Bins, 'eval_batches', eval_batches)
    monkeypatch.setattr(torch, 'save', slow_save)
    if problem == 'error':
        with pytest.raises(DataError, match='the data is gone'):
            train()
    else:
        assert 'ended without a save' in train().code
    assert slow == [4, 8] and ckpt.load(str(out_dir / 'ckpt.pt'))['iter_num'] == 4
    assert contents(out_dir).keys() == {'ckpt.pt', 'log.jsonl'}
    assert [r['iter'] for r in records(out_dir, 'eval')] == [0, 4]


@pytest.mark.skipif(sys.platform == 'win32', reason='no RLIMIT_FSIZE')
def test_a_disk_that_is_full_while_a_run_saves_is_one_line(dataset, out_dir):
    limited = ('import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); '
               'runpy.run_path("train.py", run_name="__main__")')
    done = run(sys.executable, '-c', limited, *flags(**{**TINY, 'dataset': dataset, 'out_dir': out_dir}), cwd=ROOT)
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == f'saving checkpoint to {out_dir}'
    path = re.escape(str(out_dir / 'ckpt.pt'))
    assert re.fullmatch(rf'{path} could not be written \(.*File too large\): free some space or choose another '
                        r'--out_dir\n', done.stderr), done.stderr
    assert contents(out_dir).keys() == {'log.jsonl'} and [r['iter'] for r in records(out_dir, 'eval')] == [0]


def test_eval_only_leaves_a_better_last_pt_where_it_is(train, out_dir):
    train()
    os.rename(out_dir / 'ckpt.pt', out_dir / 'last.pt')
    saved = ckpt.load(str(out_dir / 'last.pt'))
    torch.save({**saved, 'best_val_loss': 9.0}, out_dir / 'last.pt')
    before = contents(out_dir)
    assert train(eval_only=True, init_from='resume').code == 0 and contents(out_dir) == before


def test_ckpt_is_the_best_and_last_what_is_newer(train, out_dir):
    options = dict(decay_lr=False, always_save_checkpoint=False)
    train(**options)
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'log.jsonl']
    best = (out_dir / 'ckpt.pt').read_bytes()
    best_loss = records(out_dir, 'eval')[-1]['val/loss']
    assert ckpt.load(str(out_dir / 'ckpt.pt'))['best_val_loss'] == best_loss

    worse = train(init_from='resume', max_iters=9, learning_rate=0.1, **options)
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'last.pt', 'log.jsonl']
    assert (out_dir / 'ckpt.pt').read_bytes() == best and records(out_dir, 'eval')[-1]['val/loss'] > best_loss
    last = ckpt.load(str(out_dir / 'last.pt'))
    assert last['iter_num'] == 9 and last['best_val_loss'] == best_loss
    assert worse.lines.count(f'saving checkpoint to {out_dir}') == 1

    train(init_from='resume', max_iters=60, learning_rate=1e-2, eval_interval=100, batch_size=16, **options)
    assert [r['iter'] for r in records(out_dir, 'run')] == [0, 8, 9]  # it went on from last.pt
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'log.jsonl']  # better again: last.pt has served its time
    saved = ckpt.load(str(out_dir / 'ckpt.pt'))
    assert saved['iter_num'] == 60 and saved['best_val_loss'] < best_loss


def test_always_saving_keeps_the_best_loss_too(train, out_dir):
    train(decay_lr=False)
    best = records(out_dir, 'eval')[-1]['val/loss']
    train(init_from='resume', max_iters=12, learning_rate=3.0, decay_lr=False)
    assert sorted(os.listdir(out_dir)) == ['ckpt.pt', 'log.jsonl']
    saved = ckpt.load(str(out_dir / 'ckpt.pt'))
    assert saved['iter_num'] == 12 and saved['best_val_loss'] == best < records(out_dir, 'eval')[-1]['val/loss']


def test_eval_only_writes_nothing(train, out_dir):
    done = train(eval_only=True)
    assert done.code == 0 and steps(done) == [0] and iters(done) == [] and not out_dir.exists()


def test_eval_only_with_resume_writes_nothing(train, out_dir):
    trained = train(max_iters=6)
    before = contents(out_dir)
    done = train(init_from='resume', eval_only=True, max_iters=100, learning_rate=1.0)
    assert done.code == 0 and steps(done) == [6] and iters(done) == [] and contents(out_dir) == before
    assert [line for line in trained.lines if line.startswith('step 6:')][0] in done.lines  # the same loss
    assert not any(line.startswith('saving') for line in done.lines)


def test_eval_only_needs_no_optimizer(train, out_dir):
    train(max_iters=6)
    checkpoint = torch.load(out_dir / 'ckpt.pt')
    del checkpoint['optimizer']
    torch.save(checkpoint, out_dir / 'ckpt.pt')
    assert steps(train(init_from='resume', eval_only=True)) == [6]
    with pytest.raises(DataError, match='optimizer state of the checkpoint does not fit its model: it has none'):
        train(init_from='resume', max_iters=8)


def test_a_second_fresh_run_keeps_the_first(train, out_dir):
    train()
    first = contents(out_dir)
    done = train(max_iters=4)
    assert f'an earlier run stood in {out_dir}; kept as ckpt.prev.pt, log.prev.jsonl' in done.lines
    assert (out_dir / 'ckpt.prev.pt').read_bytes() == first['ckpt.pt']
    assert (out_dir / 'log.prev.jsonl').read_bytes() == first['log.jsonl']
    assert ckpt.load(str(out_dir / 'ckpt.pt'))['iter_num'] == 4 and train().code == 0


def test_a_finished_run_is_not_resumed(train, out_dir):
    train()
    before = contents(out_dir)
    done = train(init_from='resume')
    assert done.code == 0 and done.lines[-1] == 'the checkpoint has done 8 of max_iters=8 updates: nothing to do'
    assert contents(out_dir) == before


def test_resume_without_a_checkpoint(train, out_dir):
    done = train(init_from='resume')
    assert done.code == 2 and done.err == (f'train.py: init_from=resume: no ckpt.pt or last.pt in out_dir={out_dir}; '
                                           'start with --init_from=scratch\n')
    assert steps(done) == []


def test_a_damaged_checkpoint_is_no_reason_to_start_anew(train, out_dir):
    train()
    whole = (out_dir / 'ckpt.pt').read_bytes()
    (out_dir / 'ckpt.pt').write_bytes(whole[:len(whole) // 2])
    before = contents(out_dir)
    with pytest.raises(DataError, match='ckpt.pt .*damaged'):
        train(init_from='resume')
    assert contents(out_dir) == before


def test_other_options_on_resume_are_printed(train):
    train()
    done = train(init_from='resume', max_iters=9, learning_rate=5e-4, batch_size=2, n_layer=3, bias=True)
    assert 'resumed with learning_rate=0.0005, it was 0.001' in done.lines
    assert 'resumed with batch_size=2, it was 4' in done.lines
    assert 'resumed with max_iters=9, it was 8' in done.lines
    assert 'n_layer=2 comes from the checkpoint, n_layer=3 is ignored' in done.lines
    assert 'bias=False comes from the checkpoint, bias=True is ignored' in done.lines
    assert sum('resumed with' in line for line in done.lines) == 3 and iters(done) == [8]
    [group, _] = done.names['optimizer'].param_groups
    assert group['lr'] == done.names['lr_at'](8) <= 5e-4


def test_hyperparameters_come_from_the_options(train):
    train()
    done = train(init_from='resume', max_iters=9, weight_decay=0.3, beta1=0.8, beta2=0.99)
    decay, rest = done.names['optimizer'].param_groups
    assert (decay['weight_decay'], rest['weight_decay']) == (0.3, 0.0)
    assert decay['betas'] == rest['betas'] == (0.8, 0.99)


def test_another_dataset_of_the_same_vocabulary_is_printed(train, tmp_path, dataset):
    train()
    copy = shutil.copytree(dataset, tmp_path / 'copy')
    done = train(init_from='resume', max_iters=9, dataset=copy)
    assert f'resumed with dataset={copy}, it was {dataset}' in done.lines and iters(done) == [8]


@pytest.mark.parametrize('chars', ['abc', 'klmnopqrstu', 'abcdefghijklmnop'])
def test_another_vocabulary_is_refused(train, out_dir, tmp_path, chars):
    train()
    before = contents(out_dir)
    other = char_dataset(tmp_path / 'other', chars)
    done = train(init_from='resume', max_iters=9, dataset=other)
    assert done.code == 2 and done.err.count('\n') == 1
    assert (f'dataset={other} has other tokens than the model of init_from=resume, though as many' if len(chars) == 11
            else f'dataset={other} has {len(chars)} token ids (char), the model 11') in done.err
    assert contents(out_dir) == before


@pytest.mark.parametrize('block_size', [8, 32])
def test_another_block_size_is_refused(train, out_dir, block_size):
    train()
    before = contents(out_dir)
    done = train(init_from='resume', max_iters=9, block_size=block_size)
    assert done.code == 2 and done.err == (f'train.py: block_size={block_size}, but the checkpoint has 16: '
                                           'resume with --block_size=16\n')
    assert contents(out_dir) == before


def test_tensors_that_do_not_fit_are_named(train, out_dir):
    train()
    path = str(out_dir / 'ckpt.pt')
    saved = ckpt.load(path)
    saved['model']['transformer.ln_f.weight'] = torch.ones(5)
    saved['model']['stray'] = saved['model'].pop('transformer.wpe.weight')
    save(path, saved)
    done = train(init_from='resume', max_iters=9)
    assert done.code == 2 and done.err == (
        'train.py: the weights do not fit the model: transformer.wpe.weight is missing; stray is not a tensor of this '
        'model; transformer.ln_f.weight is (5,), the model needs (32,)\n')


@pytest.mark.parametrize('harm', ['gone', 'one missing', 'one more', 'misshapen'])
def test_an_optimizer_state_that_does_not_fit_is_refused(train, out_dir, harm):
    """A fused AdamW would read beyond a moment that is too small."""
    train()
    path = str(out_dir / 'ckpt.pt')
    saved = ckpt.load(path)
    state = saved['optimizer']['state']
    if harm == 'gone':
        del saved['optimizer']
    elif harm == 'one missing':
        del state[3]
    elif harm == 'one more':
        state[len(state)] = dict(state[0])
    else:
        state[2]['exp_avg'] = torch.zeros(200, 200)
    save(path, saved)
    before = contents(out_dir)
    with pytest.raises(DataError, match='the optimizer state of the checkpoint does not fit its model: '):
        train(init_from='resume', max_iters=9)
    assert contents(out_dir) == before


# -- mistakes -------------------------------------------------------------------------------------------------------

def test_all_problems_in_one_list(train, out_dir):
    wrong = dict(batch_size=-1, eval_interval=0, log_interval=0, eval_iters=0, max_iters=-1, warmup_iters=-1,
                 gradient_accumulation_steps=0, learning_rate=0, weight_decay=-1, beta1=1.0, grad_clip=-1, n_head=3,
                 dropout=1.0, dtype='bf16', init_from='foo', backend='tcp')
    if not torch.cuda.is_available():
        wrong['device'] = 'cuda'
    done = train(**wrong)
    assert done.code == 2 and done.lines == [] and not out_dir.exists()
    problems = done.err.splitlines()
    assert all(line.startswith('train.py: ') for line in problems)
    for key, value in wrong.items():
        shown = {'learning_rate': 'learning_rate=0.0', 'weight_decay': 'weight_decay=-1.0', 'beta1': 'beta1=1.0',
                 'grad_clip': 'grad_clip=-1.0'}.get(key, f'{key}={value}')
        assert sum(shown in line for line in problems if 'min_lr' not in line) == 1, key
    assert 'train.py: n_embd=32 must be a multiple of n_head=3' in problems


@pytest.mark.parametrize('option', ['batch_size', 'eval_interval', 'log_interval', 'eval_iters', 'block_size',
                                    'n_layer', 'n_head', 'n_embd', 'gradient_accumulation_steps'])
def test_zero_is_named(train, option):
    done = train(**{option: 0})
    assert done.code == 2 and f'train.py: {option}=0 must be at least 1\n' in done.err


@pytest.mark.parametrize('option', ['learning_rate', 'grad_clip', 'weight_decay', 'dropout', 'beta2', 'min_lr'])
def test_nan_is_no_value(train, option):
    done = train(**{option: 'nan'})
    assert done.code == 2 and f'{option}=nan' in done.err


@pytest.mark.parametrize('option', ['device', 'dtype', 'init_from', 'backend'])
def test_a_word_that_is_none_of_the_choices(train, option):
    done = train(**{option: 'foo'})
    assert done.code == 2 and done.err.startswith(f'train.py: {option}=foo: choose ') and done.err.count('\n') == 1


def test_out_dir_that_cannot_be_written(train, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DataError, match=r'^out_dir=\S+/out cannot be written \(.*\): choose another with --out_dir$'):
        train(out_dir=tmp_path / 'file' / 'out')
    assert 'number of parameters' not in capsys.readouterr().out


def test_missing_bins_name_the_prepare_script(train, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'prepare.py').write_text('')
    with pytest.raises(DataError, match='train.bin is missing: run python .*mine/prepare.py'):
        train(dataset=tmp_path / 'mine')
    with pytest.raises(DataError, match='dataset nowhere is neither a folder in data/ nor a path to one'):
        train(dataset='nowhere')


@pytest.mark.slow
def test_a_user_mistake_ends_the_process_with_one_line(tmp_path):
    """DataErrors too, seen from outside."""
    (tmp_path / 'mine').mkdir()
    done = run('train.py', '--dataset=mine', '--device=cpu', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == 'mine/train.bin is missing: run python data/prepare.py mine YOUR_TEXT\n'
    assert not (tmp_path / 'out').exists()


# -- a run that breaks ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [
    dict(eval_interval=1), dict(eval_interval=100), dict(eval_interval=100, log_interval=100),
    dict(eval_interval=3, log_interval=2)], ids=str)
@pytest.mark.parametrize('always_save_checkpoint', [True, False])
def test_nan_stops_the_run_and_is_not_saved(train, out_dir, options, always_save_checkpoint):
    train()
    good = (out_dir / 'ckpt.pt').read_bytes()
    done = train(init_from='resume', max_iters=20, learning_rate=1e30, decay_lr=False,
                 always_save_checkpoint=always_save_checkpoint, **options)
    assert re.match(r'iter \d+: gradient norm (nan|inf|-?[\d.e+-]+|None), .*lr 1\.000e\+30', str(done.code)), done
    assert (out_dir / 'ckpt.pt').read_bytes() == good and not (out_dir / 'last.pt').exists()
    assert not any('nan' in line for line in done.lines if STEP.fullmatch(line))


def test_nan_names_the_update_that_met_it(train, out_dir):
    def poison(step, model):
        if step == 5:
            with torch.no_grad():
                model.transformer.ln_f.weight[0] = math.nan
    done = train(on_step=poison, log_interval=4, eval_interval=100, max_iters=20, lr_decay_iters=20)
    lr = 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * 3 / 18))
    assert re.match(rf'iter 5: gradient norm nan, .*lr {lr:.3e}', str(done.code)), done.code
    assert iters(done) == [0, 4] and list(contents(out_dir)) == ['log.jsonl']


def test_the_interpreter_is_left_as_it_was(train):
    """As after `%run train.py` in a notebook, which goes on in the same process."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    handlers = [signal.getsignal(number) for number in numbers]
    seen = []
    train(on_step=lambda step, model: seen.append([signal.getsignal(number) for number in numbers]))
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert all(a != b for now in seen for a, b in zip(now, handlers) if b is not signal.SIG_IGN)


def test_the_home_folder_in_a_path(train, tmp_path, monkeypatch):
    """A shell leaves the ~ of --out_dir=~/run as it is."""
    monkeypatch.setenv('HOME', str(tmp_path))
    assert train(out_dir='~/run', max_iters=1).code == 0 and (tmp_path / 'run' / 'ckpt.pt').exists()


def test_in_a_thread_it_trains_without_signals(train):
    """Python takes them in the main thread only; some interfaces train in another one."""
    ended = []
    thread = threading.Thread(target=lambda: ended.append(train().lines[-2]))
    thread.start()
    thread.join()
    assert ended[0].startswith('step 8: ')


def test_a_prompt_keeps_its_own_way_to_show_errors():
    """sys.ps1 is there in an interactive Python, in IPython and notebooks."""
    here = 'import sys; {}; before = sys.excepthook; import data; print(before is sys.excepthook)'
    for prompt, stays in (('sys.ps1 = ">>> "', 'True\n'), ('pass', 'False\n')):
        assert run(sys.executable, '-c', here.format(prompt), cwd=ROOT).stdout == stays


@pytest.mark.parametrize('size', [dict(n_layer=10**9), dict(n_embd=1 << 40), dict(batch_size=10**12),
                                  dict(eval_iters=10**17), dict(gradient_accumulation_steps=10**18)], ids=str)
def test_sizes_that_no_machine_has_are_one_line(train, size):
    done = train(**size)
    assert done.code == 2 and done.err.count('\n') == 1 and not done.lines[2:]
    assert re.match(r'train.py: n_layer=\d+, .+ take [\d,.]+ GB of memory or more, [\d,.]+ GB are free: ', done.err)


@pytest.mark.slow
def test_memory_that_is_not_there_is_one_line(dataset, out_dir):
    """Whatever asks for it, here the places of an evaluation's sequences."""
    limited = ('import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); '
               'runpy.run_path("train.py", run_name="__main__")')
    done = run(sys.executable, '-c', limited, *flags(
        **{**TINY, 'dataset': dataset, 'out_dir': out_dir, 'eval_iters': 10**8}), cwd=ROOT)
    assert done.returncode == 2 and re.fullmatch(
        r'out of memory \(.+\): take a smaller model, --batch_size or --block_size\n', done.stderr), done.stderr


def test_a_signal_in_the_last_update_changes_nothing(train, out_dir):
    done = train(on_step=lambda step, model: os.kill(os.getpid(), signal.SIGINT) if step == 8 else None)
    assert done.code == 0 and steps(done) == [0, 4, 8] and 'stopped by a signal' not in done.out
    assert [r['iter'] for r in records(out_dir, 'eval')] == [0, 4, 8]
    assert ckpt.load(str(out_dir / 'ckpt.pt'))['iter_num'] == 8


def test_a_compiler_switched_off_is_not_used(train, out_dir, monkeypatch):
    monkeypatch.setenv('TORCHDYNAMO_DISABLE', '1')
    train(compile=True, max_iters=1)
    assert records(out_dir, 'run')[0]['compile'] is False


# -- several processes ----------------------------------------------------------------------------------------------

@pytest.mark.slow  # the default tier has it without torchrun, in test_resume.py
@pytest.mark.parametrize('compile, dropout', [(False, 0.1), (True, 0.1), (True, 0.0)])
@pytest.mark.parametrize('device, dtype', [('cpu', 'float32'), pytest.param('cuda', 'float32', marks=pytest.mark.gpu),
                                           pytest.param('cuda', 'bfloat16', marks=pytest.mark.gpu)])
def test_one_process_and_two_do_the_same_updates(dataset, tmp_path, device, dtype, compile, dropout):
    """4 micro-steps of one process, 2 of each of two: the same data, dropout, losses and gradients."""
    if device == 'cuda' and torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    options = {**TINY, 'dataset': dataset, 'gradient_accumulation_steps': 4, 'max_iters': 10, 'eval_interval': 10,
             'eval_iters': 3, 'dropout': dropout, 'device': device, 'dtype': dtype, 'compile': compile}
    options['n_embd'] = 192 if compile and device == 'cpu' else 32  # blocks above 1 MB, which might be cut in pieces
    for processes in (1, 2):
        arguments = 'train.py', *flags(**options, out_dir=tmp_path / str(processes))
        logs = {'env': {**os.environ, 'TORCH_LOGS': '+ddp_graphs'}}
        done = torchrun(processes, *arguments, **logs) if processes > 1 else run(*arguments)
        assert done.returncode == 0 and '[__ddp_graphs]' not in done.stderr, done.stderr
        assert re.search(rf'device {device}\S*, dtype {dtype}, processes {processes}\n', done.stdout)
        assert records(tmp_path / str(processes), 'run')[0]['capture'] == (device == 'cuda')
        assert done.stdout.count('iter 9: ') == done.stdout.count('saving checkpoint to') == 1  # rank 0 alone speaks
    # a GPU computes in TF32 or bfloat16: 1.4e-4 was seen in TF32
    near = 1e-2 if dtype == 'bfloat16' else 5e-4 if device == 'cuda' else 1e-5
    for kind in ('train', 'eval'):
        one, two = (records(tmp_path / processes, kind) for processes in '12')
        assert [r['iter'] for r in one] == [r['iter'] for r in two] == ([*range(10)] if kind == 'train' else [0, 10])
        for a, b in zip(one, two):
            a, b = ({k: v for k, v in r.items() if k not in ('kind', 'ms', 'tok_s', 'mfu')} for r in (a, b))
            assert a == pytest.approx(b, abs=near)
    one, two = (ckpt.load(str(tmp_path / processes / 'ckpt.pt'))['model'] for processes in '12')
    for name in one:  # AdamW makes a rounding of a tiny gradient a whole step, so on a GPU some weights are further off
        if device == 'cuda':
            assert (one[name] - two[name]).norm() < 2 * near * one[name].norm()
        else:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_micro_steps_that_the_processes_cannot_share(dataset, tmp_path):
    done = torchrun(2, 'train.py', *flags(**{**TINY, 'dataset': dataset, 'gradient_accumulation_steps': 3},
                                          out_dir=tmp_path / 'out'))
    assert done.returncode != 0 and 'Traceback' not in done.stderr.split('torch/distributed')[0]
    line = 'train.py: gradient_accumulation_steps=3 must be a multiple of the 2 processes\n'
    assert done.stderr.count(line) == 1 and '/train.py", line' not in done.stderr
    assert 'number of parameters' not in done.stdout and not (tmp_path / 'out').exists()


# -- wandb, compilation, published weights --------------------------------------------------------------------------

def test_wandb_offline_for_real(train, out_dir, tmp_path, monkeypatch, request):
    wandb = pytest.importorskip('wandb')
    wandb.teardown()  # its service would remember another folder
    request.addfinalizer(wandb.teardown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    done = train(wandb_log=True, wandb_project='exact', wandb_run_name='tiny', max_iters=2)
    assert done.code == 0 and iters(done) == [0, 1] and not any('could not start' in line for line in done.lines)
    wandb.teardown()  # its service writes the file, and may lag behind
    [file] = glob.glob(str(tmp_path / 'wandb' / 'offline-run-*' / '*.wandb'))
    with open(file, 'rb') as f:
        raw = f.read()
    assert all(key in raw for key in (b'iter', b'train/loss', b'val/loss', b'lr', b'mfu', b'learning_rate', b'tok_s'))
    assert len(records(out_dir, 'train')) == 2
    # resumed, it is the same run
    done = train(wandb_log=True, wandb_project='exact', wandb_run_name='tiny', max_iters=4, init_from='resume')
    assert done.code == 0 and iters(done) == [2, 3]
    wandb.teardown()
    folders = glob.glob(str(tmp_path / 'wandb' / 'offline-run-*'))
    ids = {re.search(r'run-\d+_\d+-(\w+)', folder)[1] for folder in folders}
    assert len(folders) == 2 and ids == {ckpt.newest(str(out_dir))['wandb_id']}


@pytest.mark.slow
def test_wandb_without_a_key_or_network(dataset, tmp_path):
    pytest.importorskip('wandb')
    env = {k: v for k, v in os.environ.items() if not k.startswith('WANDB_')}
    done = run('train.py', *flags(**{**TINY, 'max_iters': 2}, dataset=dataset, out_dir='out', wandb_log=True),
               cwd=tmp_path, env={**env, 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1'}, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    [at] = [i for i, line in enumerate(lines) if line.startswith('wandb could not start (')]
    assert lines[at].endswith('WANDB_MODE=offline needs neither key nor network. The run is logged to log.jsonl only.')
    assert lines[at + 1].startswith('step 0: ')
    assert len(records(tmp_path / 'out', 'train')) == 2 and (tmp_path / 'out' / 'ckpt.pt').exists()


@pytest.mark.slow
def test_where_nothing_can_be_compiled_training_goes_on(dataset, tmp_path):
    env = {**os.environ, 'CXX': '/nonexistent', 'PATH': str(tmp_path), 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1',
           'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    done = run('train.py', *flags(**{**TINY, 'max_iters': 2, 'compile': True}, dataset=dataset, out_dir='out'),
               cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    [line] = [line for line in lines if 'torch.compile' in line]
    assert re.fullmatch(r'torch\.compile does not work here \(\w+\); going on without it', line)
    assert lines.index(line) < next(i for i, line in enumerate(lines) if line.startswith('step 0: '))
    assert 'Traceback' not in done.stderr and sum(map(bool, map(ITER.fullmatch, lines))) == 2
    assert records(tmp_path / 'out', 'run')[0]['compile'] is False


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_second_of_two_gpus(dataset, tmp_path, dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    losses = []
    for device in ('cuda:0', 'cuda:1'):
        options = {**TINY, 'device': device, 'dtype': dtype, 'log_interval': 1, 'dropout': 0.1, 'dataset': dataset}
        done = run('train.py', *flags(**options, out_dir=tmp_path / device[-1]))
        assert done.returncode == 0 and f'device {device}, ' in done.stdout, done.stderr
        losses.append([r['loss'] for r in records(tmp_path / device[-1], 'train')])
    assert len(losses[1]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-2)
    done = run('sample.py', *flags(out_dir=tmp_path / device[-1], device=device, num_samples=1, max_new_tokens=20))
    assert done.returncode == 0, done.stderr


@pytest.fixture
def published(tmp_path):
    """A folder in transformers' format: a GPT-2 with small random weights and 11 token ids."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=32, n_ctx=32, n_layer=2, n_head=2, n_embd=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'weights')
    return tmp_path / 'weights'


def test_fine_tuning_from_a_local_folder(train, out_dir, published):
    """The shape is the folder's, block_size cropped to the option's; n_layer and its like are not asked."""
    done = train(init_from=published, n_layer=5, dropout=0.1, max_iters=60, eval_interval=60, learning_rate=1e-2,
                 batch_size=16, decay_lr=False)
    first, last = (r['val/loss'] for r in records(out_dir, 'eval'))
    assert done.code == 0 and last < first - 0.1
    saved = ckpt.load(str(out_dir / 'ckpt.pt'))
    assert saved['model_args'] == dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=True, vocab_size=11,
                                       dropout=0.1)
    assert saved['gelu'] == 'tanh' and saved['iter_num'] == 60
    done = train(init_from='resume', max_iters=61)
    assert iters(done) == [60] and done.names['raw_model'].config.gelu == 'tanh'


def test_published_weights_and_another_vocabulary(train, out_dir, published, tmp_path):
    other = char_dataset(tmp_path / 'other', 'abc')
    done = train(init_from=published, dataset=other)
    assert done.code == 2 and f'dataset={other} has 3 token ids (char), the model 11' in done.err


def test_published_weights_with_too_few_positions(train, published):
    done = train(init_from=published, block_size=64)
    assert done.code == 2 and done.err.endswith("train.py: block_size=64 is more than the model's 32 positions\n")


@pytest.mark.slow
def test_loss_curves_of_one_function_are_one():
    """tests/loss_curves.py, where fast and plain are the same: eager, in float32, on a CPU."""
    small = {**TINY, 'gradient_accumulation_steps': 1, 'max_iters': 4}
    ran = run('tests/loss_curves.py', '--tokens=20000', *flags(**small))
    if 'tokenizer could not be loaded' in ran.stderr:
        pytest.skip('no tokenizer files')
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count('means differ by 0.0000') == 2
    assert len(set(re.findall(r'val loss (\d+\.\d{4})$', ran.stdout, re.M))) == 3  # one a seed
