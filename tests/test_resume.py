"""A run that stops and resumes is the run that never stopped: to the last bit, or on other processes to rounding."""

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest
import torch

from data import DataError, bins, codec
from data import checkpoint as ckpt
from tests.conftest import ROOT, TINY, flags, run, save, torchrun
from tests.kill_loop import assert_same, ended, latest, records, start, start_ranks, text

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
OPTIONS = {**TINY, 'dropout': 0.2, 'max_iters': 12, 'lr_decay_iters': 12, 'eval_interval': 5}


def signal_at(*steps, number=signal.SIGTERM):
    """An on_step that sends a signal to its own process after these updates."""
    return lambda step, model: os.kill(os.getpid(), number) if step in steps else None


@pytest.fixture
def train(script, dataset, tmp_path):
    """train(folder, on_step, options) runs train.py in this process and returns its namespace, or its exit code."""
    def execute(folder='out', on_step=lambda step, model: None, threads=1, **options):
        torch.set_num_threads(threads)
        words = flags(**{**OPTIONS, 'dataset': dataset, 'out_dir': tmp_path / folder, **options})
        try:
            return script('train.py', *words, on_step=on_step)
        except SystemExit as e:
            return e.code
    return execute


STRAIGHT = {}  # runs that nothing disturbed, by their options


@pytest.fixture
def straight(train, tmp_path_factory):
    """straight(options): out_dir of such a run."""
    def folder(**options):
        key = str(options)
        if key not in STRAIGHT:
            STRAIGHT[key] = tmp_path_factory.mktemp('straight')
            train(STRAIGHT[key], **options)
        return STRAIGHT[key]
    return folder


# -- init_from=auto: the same command goes on, or begins --------------------------------------------------------------

def test_the_same_command_always_does_the_right_thing(train, straight, tmp_path, capsys):
    for stop in (3, 7, None):
        train(on_step=signal_at(stop), init_from='auto')
    assert_same(tmp_path / 'out', straight())
    capsys.readouterr()
    train(init_from='auto')
    assert 'the checkpoint has done 12 of max_iters=12 updates: nothing to do' in capsys.readouterr().out
    assert_same(tmp_path / 'out', straight())
    assert not [name for name in os.listdir(tmp_path / 'out') if '.prev' in name]


def test_another_spelling_of_a_dataset_is_no_other_run(train, tmp_path, dataset, capsys):
    train(max_iters=2)
    os.symlink(dataset, tmp_path / 'link')
    train(init_from='auto', max_iters=3, dataset=tmp_path / 'link')
    assert latest(tmp_path / 'out')['iter_num'] == 3 and 'another run' not in capsys.readouterr().out
    text = bins.Bins(dataset, 8).tokens
    bins.write(str(tmp_path / 'new'), codec.of_folder(dataset), **{k: [v[::-1].copy()] for k, v in text.items()})
    train(init_from='auto', max_iters=1, dataset=tmp_path / 'new')
    assert f'out_dir={tmp_path}/out holds another run (dataset=' in capsys.readouterr().out


def test_evaluating_nothing_is_refused(train, tmp_path, capsys):
    assert train(init_from='auto', eval_only=True) == 2
    assert f'init_from=auto: no ckpt.pt or last.pt in out_dir={tmp_path}/out' in capsys.readouterr().err


@pytest.mark.parametrize('data', ['text', ['a'], {'train': 5}])
def test_what_others_call_data_in_a_checkpoint_does_not_matter(train, tmp_path, data):
    train(max_iters=2)
    path = tmp_path / 'out' / 'ckpt.pt'
    torch.save({**torch.load(path), 'data': data}, path)
    train(max_iters=3, init_from='resume')
    assert latest(tmp_path / 'out')['iter_num'] == 3


@pytest.mark.parametrize('option, value', [('n_embd', 64), ('seed', 2), ('block_size', 8)])
def test_another_run_is_kept_and_this_one_begins(train, tmp_path, capsys, option, value):
    train(max_iters=2)
    capsys.readouterr()
    train(init_from='auto', max_iters=3, **{option: value})
    said = capsys.readouterr().out
    was = OPTIONS.get(option, 1337)
    assert f'out_dir={tmp_path}/out holds another run ({option}={was}): init_from=auto starts this one anew' in said
    assert 'kept as ckpt.prev.pt' in said and 'step 0: ' in said
    assert latest(tmp_path / 'out')['iter_num'] == 3


def test_a_damaged_checkpoint_is_not_another_run(train, tmp_path, capsys):
    train(max_iters=2)
    (tmp_path / 'out' / 'ckpt.pt').write_bytes(b'PK')
    with pytest.raises(DataError, match='damaged'):
        train(init_from='auto')


@pytest.mark.parametrize('bins_json', [('there', 'there'), ('there', 'gone'), ('gone', 'there')])
def test_a_text_prepared_anew_under_the_same_name_is_refused(train, tmp_path, dataset, capsys, bins_json):
    data = str(shutil.copytree(dataset, tmp_path / 'data'))
    if bins_json[0] == 'gone':
        os.remove(tmp_path / 'data' / 'bins.json')
    train(max_iters=2, dataset=data)
    ids = {split: bins.Bins(data, 8).tokens[split][::-1].copy() for split in ('train', 'val')}
    bins.write(data, codec.of_folder(data), **{split: [tokens] for split, tokens in ids.items()})
    if bins_json[1] == 'gone':
        os.remove(tmp_path / 'data' / 'bins.json')
    for init_from in ('resume', 'auto'):
        capsys.readouterr()
        assert train(max_iters=4, dataset=data, init_from=init_from) == 2
        assert f'train.py: dataset={data} was prepared anew since the checkpoint in' in capsys.readouterr().err
    shutil.move(data, tmp_path / 'renamed')
    train(max_iters=4, dataset=tmp_path / 'renamed', init_from='resume')
    assert 'resumed on another text: ' in capsys.readouterr().out and latest(tmp_path / 'out')['iter_num'] == 4


RESTARTED = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})

def on_step(step, model):  # this rank is killed at these updates, once in each attempt
    attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
    if attempt < 3 and (step, int(os.environ['RANK'])) == {kills}[attempt]:
        os.kill(os.getpid(), signal.SIGKILL)

sys.argv[0] = {root!r} + '/train.py'
runpy.run_path(sys.argv[0], init_globals={{'on_step': on_step}}, run_name='__main__')
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_ranks_are_killed(dataset, tmp_path):
    """Three times at random; the end is that of an undisturbed run, bit for bit."""
    rng = random.Random(time.time_ns())
    kills = [(rng.randint(low, low + 7), rng.randint(0, 1)) for low in (1, 9, 17)]
    options = {**OPTIONS, 'dataset': dataset, 'max_iters': 24, 'lr_decay_iters': 24, 'eval_interval': 4,
               'init_from': 'auto'}
    for name, plan in (('straight', [(0, 0)] * 3), ('killed', kills)):
        (tmp_path / f'{name}.py').write_text(RESTARTED.format(root=ROOT, kills=plan))
        done = run(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                   '--max-restarts=3', str(tmp_path / f'{name}.py'), *flags(**options, out_dir=tmp_path / name),
                   env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=240)
        assert done.returncode == 0, (kills, done.stderr)
    assert done.stdout.count('device cpu, dtype float32, processes 2') == 4
    assert_same(tmp_path / 'killed', tmp_path / 'straight')


# -- bit for bit, one process ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype, stops', [('float32', (1, 5)), ('float32', (2, 3, 7, 11)), ('bfloat16', (1, 6))],
                         ids=str)
def test_stopped_by_max_iters(train, straight, tmp_path, dtype, stops):
    for n, stop in enumerate((*stops, 12)):
        train('out', dtype=dtype, max_iters=stop, init_from='resume' if n else 'scratch')
        assert latest(tmp_path / 'out')['iter_num'] == stop
    assert_same(tmp_path / 'out', straight(dtype=dtype))


@pytest.mark.parametrize('dtype, number, stops', [('float32', signal.SIGTERM, (1,)), ('float32', signal.SIGINT, (5,)),
                                                  ('float32', signal.SIGTERM, (3, 4, 10, 11)),
                                                  ('bfloat16', signal.SIGTERM, (2, 9))], ids=str)
def test_stopped_by_a_signal(train, straight, tmp_path, capsys, dtype, number, stops):
    for n, stop in enumerate(stops):
        train('out', signal_at(stop, number=number), dtype=dtype, init_from='resume' if n else 'scratch')
        said = f'stopped by a signal after {stop} updates; --init_from=resume goes on from here\n'
        assert capsys.readouterr().out.count(said) == 1
        assert latest(tmp_path / 'out')['iter_num'] == stop
    train('out', dtype=dtype, init_from='resume')
    assert_same(tmp_path / 'out', straight(dtype=dtype))


def test_runs_differ_where_they_should(train, straight, tmp_path):
    """The comparison can fail: another seed, or dropout, or one update more is seen."""
    for options in ({'seed': 1}, {'dropout': 0.1}, {'max_iters': 13}):
        train('other', **options)
        with pytest.raises(AssertionError):
            assert_same(tmp_path / 'other', straight())


def test_an_end_between_evaluations_keeps_its_own_in_the_log(train, tmp_path):
    """That of the end is not repeated by a run that goes on, and its loss may be the best there is."""
    train('out', max_iters=7, eval_interval=4)
    train('out', init_from='resume', eval_interval=4)
    assert [r['iter'] for r in records(tmp_path / 'out', 'eval')] == [0, 4, 7, 8, 12]
    assert [r['iter'] for r in records(tmp_path / 'out')] == [*range(12)]


def test_without_dropout_and_with_biases_and_clipping_off(train, straight, tmp_path):
    options = {'dropout': 0.0, 'bias': True, 'grad_clip': 0.0, 'decay_lr': False}
    train('out', **options, max_iters=7)
    train('out', **options, init_from='resume')
    assert_same(tmp_path / 'out', straight(**options))


@pytest.mark.parametrize('options', [{'eval_interval': 1, 'eval_iters': 3}, {'eval_interval': 1000}, {'eval_iters': 1},
                                   {'always_save_checkpoint': False}], ids=str)
def test_evaluation_and_saving_do_not_change_training(train, straight, tmp_path, options):
    train('out', **options)
    assert_same(tmp_path / 'out', straight())


@pytest.mark.slow
def test_on_two_threads(train, straight, tmp_path):
    options = {'threads': 2, 'n_embd': 64, 'batch_size': 16, 'max_iters': 4}  # large enough to be split among them
    train('out', **{**options, 'max_iters': 2})
    train('out', **options, init_from='resume')
    assert_same(tmp_path / 'out', straight(**options))


def test_evaluations_are_the_same_too(train, straight, tmp_path):
    train('out', signal_at(7))
    train('out', signal_at(10), init_from='resume')
    train('out', init_from='resume')
    a, b = ([{k: r[k] for k in ('iter', 'train/loss', 'val/loss')} for r in records(folder, 'eval')]
            for folder in (tmp_path / 'out', straight()))
    assert [r['iter'] for r in a] == [0, 5, 10, 12]
    assert a == b
    assert latest(tmp_path / 'out')['best_val_loss'] == latest(straight())['best_val_loss']


def test_stop_at_an_evaluation_keeps_the_best_checkpoint(train, tmp_path):
    """always_save_checkpoint=False: the state at step 5 is the best of the run, stopped right there or not."""
    def spoil(step, model):
        if step == 6:
            with torch.no_grad():
                model.lm_head.weight.mul_(-30)

    def stop_and_spoil(step, model):
        signal_at(5)(step, model)
        spoil(step, model)

    train('straight', spoil, always_save_checkpoint=False)
    train('out', stop_and_spoil, always_save_checkpoint=False)
    train('out', spoil, always_save_checkpoint=False, init_from='resume')
    assert_same(tmp_path / 'out', tmp_path / 'straight')
    for folder in ('straight', 'out'):
        assert {p.name: ckpt.load(p)['iter_num'] for p in (tmp_path / folder).glob('*.pt')} == \
            {'ckpt.pt': 5, 'last.pt': 12}


def test_resumes_from_the_file_that_is_further_on(train, straight, tmp_path):
    """A kill between the rename to ckpt.pt and the removal of last.pt leaves both; either one may be ahead."""
    for older, newer in (('last.pt', 'ckpt.pt'), ('ckpt.pt', 'last.pt')):
        train('out', max_iters=5)
        shutil.copy(tmp_path / 'out/ckpt.pt', tmp_path / 'older.pt')
        train('out', signal_at(8), init_from='resume')
        shutil.copy(tmp_path / 'out/ckpt.pt', tmp_path / 'newer.pt')
        shutil.move(tmp_path / 'older.pt', tmp_path / 'out' / older)
        shutil.move(tmp_path / 'newer.pt', tmp_path / 'out' / newer)
        train('out', init_from='resume')
        assert_same(tmp_path / 'out', straight())
        assert not (tmp_path / 'out/last.pt').exists()


def test_log_line_cut_short_by_a_kill_is_dropped(train, straight, tmp_path):
    train('out', max_iters=6)
    with open(tmp_path / 'out/log.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"kind": "train", "iter": 6, "loss": 2.0, "norm": 1.0, "lr": 0.1}\n{"kind": "train", "iter": 7, "lo')
    train('out', init_from='resume')
    assert_same(tmp_path / 'out', straight())
    assert [r['iter'] for r in records(tmp_path / 'out', 'run')] == [0, 6]


def test_nothing_left_to_do(train, tmp_path, capsys):
    train()
    before = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
    train(init_from='resume')
    assert 'the checkpoint has done 12 of max_iters=12 updates: nothing to do' in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()} == before


# -- what comes from the file, what from the options ------------------------------------------------------------------

def test_hyperparameters_come_from_the_options(train, straight, tmp_path):
    train('out', max_iters=6)
    path = str(tmp_path / 'out/ckpt.pt')
    state = ckpt.load(path)
    for group in state['optimizer']['param_groups']:  # a file may say anything here
        group.update(lr=9.0, betas=(0.1, 0.1), eps=1.0, weight_decay=9.0, fused=None, maximize=True)
    save(path, state)
    train('out', init_from='resume')
    assert_same(tmp_path / 'out', straight())

    names = train('out', init_from='resume', max_iters=13, beta1=0.7, beta2=0.8, weight_decay=0.3, decay_lr=False,
                  learning_rate=3e-3)
    groups = names['optimizer'].param_groups
    assert [(g['lr'], g['betas'], g['weight_decay'], g['fused']) for g in groups] == \
        [(3e-3, (0.7, 0.8), 0.3, True), (3e-3, (0.7, 0.8), 0.0, True)]
    assert records(tmp_path / 'out')[-1]['lr'] == 3e-3


def test_moments_come_from_the_file(train, tmp_path):
    """With a learning rate of nearly 0 and betas of nearly 1 they pass through an update as they are."""
    train(max_iters=6)
    before = latest(tmp_path / 'out')['optimizer']['state']
    still = 1 - 1e-9
    train(init_from='resume', max_iters=7, learning_rate=1e-30, min_lr=0.0, beta1=still, beta2=still, weight_decay=0.0)
    after = latest(tmp_path / 'out')['optimizer']['state']
    assert before.keys() == after.keys()
    for i, state in before.items():
        assert state['step'] == 6 and after[i]['step'] == 7
        for name in ('exp_avg', 'exp_avg_sq'):
            assert state[name].abs().max() > 0
            torch.testing.assert_close(after[i][name], state[name], rtol=1e-4, atol=1e-7)


def drop_tensor(state):
    del state['model']['transformer.h.1.mlp.c_fc.weight']


def add_tensor(state):
    state['model']['transformer.h.2.ln_1.weight'] = torch.ones(32)


def bend_tensor(state):
    state['model']['transformer.wpe.weight'] = torch.zeros(15, 32)


def drop_moments(state):
    del state['optimizer']['state'][3]


def bend_moments(state):
    state['optimizer']['state'][2]['exp_avg'] = torch.zeros(7, 5)


def drop_optimizer(state):
    del state['optimizer']


FIT = 'train.py: the weights do not fit the model: '


@forks
@pytest.mark.parametrize('damage, words', [
    (drop_tensor, [FIT + 'transformer.h.1.mlp.c_fc.weight is missing\n']),
    (add_tensor, [FIT + 'transformer.h.2.ln_1.weight is not a tensor of this model\n']),
    (bend_tensor, [FIT + 'transformer.wpe.weight is (15, 32), the model needs (16, 32)\n']),
    (drop_moments, ['optimizer state', 'parameter 3']), (bend_moments, ['optimizer state', 'parameter 2', '(7, 5)']),
    (drop_optimizer, ['optimizer state'])],
    ids=lambda v: getattr(v, '__name__', ''))
def test_tensors_that_do_not_fit_are_named(train, dataset, tmp_path, damage, words):
    """In a process of its own, since torch reads past the end of moments that are too short."""
    train(max_iters=6)
    path = str(tmp_path / 'out/ckpt.pt')
    state = ckpt.load(path)
    damage(state)
    save(path, state)
    with open(path, 'rb') as f:
        before = f.read()
    options = {**OPTIONS, 'dataset': dataset, 'out_dir': tmp_path / 'out', 'init_from': 'resume'}
    code, said = ended(start(flags(**options), str(tmp_path / 'output'))), text(str(tmp_path / 'output.err'))
    assert code == 2 and said.count('\n') == 1, f'exit code {code}: {said}'
    assert [word for word in words if word not in said] == []
    with open(path, 'rb') as f:
        assert f.read() == before


@pytest.mark.parametrize('size', [15, 32])
def test_another_block_size_is_refused(train, tmp_path, capsys, size):
    train(max_iters=6)
    capsys.readouterr()
    assert train(init_from='resume', block_size=size) == 2
    assert capsys.readouterr().err == \
        f'train.py: block_size={size}, but the checkpoint has 16: resume with --block_size=16\n'


# -- any number of processes ----------------------------------------------------------------------------------------

def record_batches(path):
    """Run in each process: every training batch that train.py draws is written to a file of its own."""
    original = bins.Bins.train_batch

    def train_batch(self, seed, step, row, rows, batch_size):
        x, y = original(self, seed, step, row, rows, batch_size)
        with open(f'{path}.{os.environ["RANK"]}.jsonl', 'a', encoding='utf-8') as f:
            digest = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
            f.write(json.dumps([step, row, digest]) + '\n')
        return x, y

    bins.Bins.train_batch = train_batch
    return {}


def elastic(dataset, folder, plan):
    """A run of len(plan) legs, leg i up to update plan[i][1] on plan[i][0] processes: {(step, row): batch drawn}."""
    os.makedirs(folder)
    drawn = {}
    for leg, (processes, until) in enumerate(plan):
        words = flags(**{**OPTIONS, 'dataset': dataset, 'out_dir': folder / 'out', 'gradient_accumulation_steps': 4,
                         'eval_interval': 20, 'lr_decay_iters': 50, 'max_iters': until,
                         'init_from': 'resume' if leg else 'scratch'})
        path = str(folder / f'leg{leg}')
        ranks = start_ranks(processes, words, path, functools.partial(record_batches, path))
        codes = [ended(rank) for rank in ranks]
        assert codes == [0] * processes, text(f'{path}.0.err')
        for rank in range(processes):
            for line in text(f'{path}.{rank}.jsonl').splitlines():
                step, row, digest = json.loads(line)
                assert (step, row) not in drawn, 'drawn twice'
                assert row % processes == rank
                drawn[step, row] = digest
    return drawn


def assert_close_runs(folder, straight, a, b):
    assert a == b, 'other batches'
    assert len(a) == 4 * latest(straight / 'out')['iter_num']
    a, b = records(folder / 'out'), records(straight / 'out')
    assert [r['iter'] for r in a] == [r['iter'] for r in b] == list(range(len(b)))
    for key in ('loss', 'lr'):
        torch.testing.assert_close(*(torch.tensor([r[key] for r in run], dtype=torch.float64) for run in (a, b)),
                                   rtol=1e-5, atol=0)
    torch.testing.assert_close(*(torch.tensor([r['norm'] for r in run], dtype=torch.float64) for run in (a, b)),
                               rtol=1e-3, atol=0)
    a, b = records(folder / 'out', 'eval'), records(straight / 'out', 'eval')
    at = {r['iter']: r['val/loss'] for r in a}
    assert all(at[r['iter']] == pytest.approx(r['val/loss'], rel=1e-5) for r in b)


@forks
def test_two_processes_see_what_one_sees(dataset, tmp_path):
    one = elastic(dataset, tmp_path / 'one', [(1, 25)])
    two = elastic(dataset, tmp_path / 'two', [(2, 25)])
    assert_close_runs(tmp_path / 'two', tmp_path / 'one', two, one)


@forks
def test_two_processes_resume_bit_for_bit(dataset, tmp_path):
    elastic(dataset, tmp_path / 'straight', [(2, 12)])
    elastic(dataset, tmp_path / 'out', [(2, 5), (2, 12)])
    assert_same(tmp_path / 'out/out', tmp_path / 'straight/out')


@forks
@pytest.mark.slow
@pytest.mark.parametrize('plan', [[(4, 50)], [(1, 13), (2, 20), (4, 37), (1, 50)], [(4, 9), (2, 21), (1, 40), (2, 50)]],
                         ids=str)
def test_any_number_of_processes(dataset, tmp_path, plan):
    one = elastic(dataset, tmp_path / 'one', [(1, 50)])
    many = elastic(dataset, tmp_path / 'many', plan)
    assert_close_runs(tmp_path / 'many', tmp_path / 'one', many, one)


# -- whole processes ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_compiled_run_resumes_bit_for_bit(dataset, tmp_path):
    for folder, stops in (('straight', [12]), ('out', [5, 12])):
        for n, stop in enumerate(stops):
            words = {**OPTIONS, 'dataset': dataset, 'out_dir': tmp_path / folder, 'compile': True, 'max_iters': stop,
                     'dropout': 0.1, 'eval_iters': 3}  # shapes of a test in test_train.py: compiled once for both
            done = run('train.py', *flags(**words, init_from='resume' if n else 'scratch'))
            assert done.returncode == 0 and 'torch.compile does not work' not in done.stdout, done.stderr
    assert records(tmp_path / 'out', 'run')[-1]['compile'] is True
    assert_same(tmp_path / 'out', tmp_path / 'straight')


SHAPES = {
    'shakespeare': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, max_iters=200),
    '124M': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12, max_iters=20, dropout=0.0),
    'tiny': dict(dtype='float32', compile=False, max_iters=30)}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('shape', SHAPES)
def test_deterministic_runs_on_a_gpu_repeat_to_the_last_bit(tmp_path, shape, processes):
    """Two runs, and one that stops and resumes; their losses are those of losses.json, which STORE_LOSSES=1 adds to."""
    if torch.cuda.device_count() < processes:
        pytest.skip('needs two GPUs')
    tokens = codec.BPECodec() if shape == '124M' else codec.CharCodec(string.printable[:65])
    ids = (bins.draw(1 << 20, 1, 'ids') >> 32) ** 2 % tokens.vocab_size  # squares: a few of them are more frequent
    bins.write(str(tmp_path / 'data'), tokens, train=[ids], val=[ids[:1 << 17]])
    words = {**OPTIONS, 'dataset': tmp_path / 'data', 'device': 'cuda', 'dtype': 'bfloat16', 'compile': True,
             **SHAPES[shape], 'deterministic': True, 'eval_interval': 1000, 'init_from': 'auto'}
    for folder, stops in (('one', [1]), ('other', [1]), ('stopped', [0.4, 1])):
        for stop in stops:
            updates = {'max_iters': int(stop * words['max_iters']), 'lr_decay_iters': words['max_iters']}
            command = 'train.py', *flags(**{**words, **updates, 'out_dir': tmp_path / folder})
            done = torchrun(processes, *command) if processes > 1 else run(*command)
            assert done.returncode == 0, done.stderr
    assert_same(tmp_path / 'other', tmp_path / 'one')
    assert_same(tmp_path / 'stopped', tmp_path / 'one')
    losses = [record['loss'] for record in records(tmp_path / 'one')][::words['max_iters'] // 10]
    key = f'{shape}, {processes} x {torch.cuda.get_device_name()}, torch {torch.__version__}'
    with open(os.path.join(ROOT, 'tests', 'losses.json'), encoding='utf-8') as f:
        stored = json.load(f)
    if os.environ.get('STORE_LOSSES') == '1':
        with open(f.name, 'w', encoding='utf-8') as f:
            json.dump({**stored, key: losses}, f, indent=1)
    elif key not in stored:
        pytest.skip(f'the runs are equal, but losses.json has none of {key}')
    else:
        assert losses == stored[key]


@pytest.mark.slow
def test_kill_from_outside(dataset, tmp_path):
    words = {**OPTIONS, 'dataset': dataset, 'eval_interval': 7, 'max_iters': 10**6, 'lr_decay_iters': 500}
    train = [sys.executable, os.path.join(ROOT, 'train.py')]
    one_thread = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([*train, *flags(**words, out_dir=tmp_path / 'out')], stdout=subprocess.DEVNULL,
                               env=one_thread)
    give_up = time.monotonic() + 60
    while text(str(tmp_path / 'out/log.jsonl')).count('"train"') < 25 and time.monotonic() < give_up:
        time.sleep(0.01)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    done = latest(tmp_path / 'out')['iter_num']
    assert done >= 21 and done % 7 == 0
    words['max_iters'] = done + 10
    for folder, init_from in (('out', 'resume'), ('straight', 'scratch')):
        done = run('train.py', *flags(**words, out_dir=tmp_path / folder, init_from=init_from), env=one_thread)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / 'out', tmp_path / 'straight')


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'wait4'), reason='needs wait4')
def test_resume_needs_no_more_memory_than_scratch(dataset, tmp_path):
    """20M parameters: the file is 240 MB, which would show if any of it were held beside model and optimizer."""
    words = {**OPTIONS, 'dataset': dataset, 'out_dir': tmp_path / 'out', 'n_layer': 6, 'n_embd': 512, 'batch_size': 1,
             'gradient_accumulation_steps': 1, 'eval_iters': 1, 'eval_interval': 1000}
    peak = {}
    for init_from, until in (('scratch', 2), ('resume', 4)):
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'),
                                    *flags(**{**words, 'init_from': init_from, 'max_iters': until})],
                                   stdout=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peak[init_from] = usage.ru_maxrss
    assert os.path.getsize(tmp_path / 'out/ckpt.pt') > 200e6
    assert peak['resume'] < 1.2 * peak['scratch'], peak
