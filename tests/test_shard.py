"""--shard and --recompute change where things are kept, not what is computed; checkpoints do not know of them."""

import os
import re

import pytest
import torch

from data.bins import Bins
from tests.conftest import ROOT, TINY, flags, torchrun
from tests.kill_loop import records

# without biases: those of keys have no gradient but rounding, which AdamW makes large
RUN = dict(TINY, n_layer=3, gradient_accumulation_steps=4, dropout=0.1, max_iters=30, eval_interval=10,
           lr_decay_iters=30, eval_iters=3)


def train(processes: int, out, script, dataset, **options) -> dict:
    """The checkpoint of a run, on one process in this one, on several by torchrun."""
    arguments = flags(**{**RUN, 'dataset': dataset, 'out_dir': out, **options})
    if processes == 1:
        script('train.py', *arguments)
    else:
        done = torchrun(processes, 'train.py', *arguments)
        assert done.returncode == 0, done.stderr
    return torch.load(os.path.join(out, 'ckpt.pt'), weights_only=True)


def distance(a, b) -> float:
    """The largest relative distance between weights, and between moments, of two checkpoints."""
    assert a['iter_num'] == b['iter_num'] and a['model'].keys() == b['model'].keys()
    pairs = [(a['model'][k], b['model'][k]) for k in a['model']]
    pairs += [(s[k], b['optimizer']['state'][i][k]) for i, s in a['optimizer']['state'].items()
              for k in ('exp_avg', 'exp_avg_sq')]
    assert all(type(t) is torch.Tensor and t.shape == u.shape for t, u in pairs)
    return max(float((t - u).norm() / u.norm()) for t, u in pairs)


def test_recomputing_changes_nothing(script, dataset, tmp_path):
    plain = train(1, tmp_path / 'plain', script, dataset, max_iters=8)
    again = train(1, tmp_path / 'again', script, dataset, max_iters=8, recompute=True)
    assert distance(plain, again) == 0


def test_recomputing_keeps_less(script, dataset, tmp_path):
    """What autograd keeps of a forward pass, in bytes."""
    kept = {}
    for recompute in (False, True):
        sizes = {}

        def count(step, model, sizes=sizes):
            def pack(t):
                sizes[t.data_ptr()] = t.numel() * t.element_size()
                return t
            if step == 1:
                x = torch.zeros(8, 16, dtype=torch.long)
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    held = model(x, x)[1]
                del held
        script('train.py', *flags(**{**RUN, 'dataset': dataset, 'out_dir': tmp_path / str(recompute), 'n_layer': 6,
                                     'max_iters': 1, 'recompute': recompute}), on_step=count)
        kept[recompute] = sum(sizes.values())
    assert kept[True] < kept[False] / 3, kept


@pytest.mark.slow
@pytest.mark.parametrize('processes, options', [
    (2, dict(shard=True)), (2, dict(recompute=True)), (4, dict(shard=True, recompute=True)),
    (3, dict(shard=True, block_size=4, gradient_accumulation_steps=6))])  # the third has no row of wpe
def test_sharded_and_recomputed_runs_are_the_plain_one(script, dataset, tmp_path, processes, options):
    plain = train(1, tmp_path / 'plain', script, dataset, **{**options, 'shard': False, 'recompute': False})
    assert distance(train(processes, tmp_path / 'other', script, dataset, **options), plain) < 1e-5


def around_train(tmp_path, code: str) -> str:
    """A program for torchrun, its path: it runs the code, then train.py, with the on_step that the code defines."""
    (tmp_path / 'around.py').write_text(f"""import runpy, sys
sys.path.insert(0, {ROOT!r})
on_step = lambda step, model: None
{code}
sys.argv[0] = {os.path.join(ROOT, 'train.py')!r}
runpy.run_path(sys.argv[0], init_globals={{'on_step': on_step}}, run_name='__main__')
""")
    return str(tmp_path / 'around.py')


LOCAL = """
def on_step(step, model):
    sizes = [(p.to_local().numel(), p.numel()) for p in model.parameters()]
    here, whole = map(sum, zip(*sizes))
    sys.stdout.write(f'of {whole} here {here}\\n')  # at once: two ranks write to one pipe
    sys.stdout.flush()
"""


@pytest.mark.slow
def test_each_rank_keeps_a_part_and_tied_weights_are_saved_once(dataset, tmp_path):
    done = torchrun(2, around_train(tmp_path, LOCAL), *flags(**{**RUN, 'dataset': dataset, 'out_dir': tmp_path / 'out',
                                                               'max_iters': 1, 'shard': True}))
    sizes = re.findall(r'^of (\d+) here (\d+)$', done.stdout, re.MULTILINE)
    assert len(sizes) == 2 and len({n for n, _ in sizes}) == 1, done.stderr
    whole, parts = int(sizes[0][0]), [int(part) for _, part in sizes]
    assert sum(parts) == whole and max(parts) < 0.6 * whole
    model = torch.load(tmp_path / 'out' / 'ckpt.pt')['model']
    assert model['lm_head.weight'].data_ptr() == model['transformer.wte.weight'].data_ptr()


@pytest.mark.slow
def test_from_two_to_four_sharded_to_one(script, dataset, tmp_path):
    """By resuming: the uninterrupted run, on the same data."""
    plain = train(1, tmp_path / 'plain', script, dataset)
    out = tmp_path / 'out'
    train(2, out, script, dataset, max_iters=10)
    train(4, out, script, dataset, max_iters=20, init_from='resume', shard=True)
    assert distance(train(1, out, script, dataset, init_from='resume'), plain) < 1e-5
    losses = [[record['loss'] for record in records(folder)] for folder in (out, tmp_path / 'plain')]
    assert len(losses[0]) == 30 and max(abs(a - b) for a, b in zip(*losses)) < 1e-5


SHARED = """
import contextlib, itertools, os
import fast, torch
import torch.distributed as dist
plain = fast.for_training
fast.for_training = lambda model, dtype, compiled, flat: plain(model, dtype, compiled, flat=False) or True
numbers = itertools.count()

class Stream:  # on a CPU all happens in the order it is written in
    wait_stream = lambda *streams: None

def of_all(n, device):
    number, rank, ranks = next(numbers), dist.get_rank(), dist.get_world_size()
    mine, *theirs = (os.path.join(folder, f'{ranks}-{number}-{(rank + i) % ranks}') for i in range(ranks))
    flat = torch.from_file(mine, shared=True, size=n).zero_()
    dist.barrier()
    return [flat, *(torch.from_file(path, shared=True, size=n) for path in theirs)]

if folder:
    fast.shared = of_all
    torch.cuda.Stream = lambda device: Stream()
    torch.cuda.current_stream, torch.cuda.stream = Stream, lambda stream: contextlib.nullcontext()
"""


@pytest.mark.slow
@pytest.mark.parametrize('reach', [False, True])
def test_ranks_that_share_the_optimizer(script, dataset, tmp_path, reach):
    """As they do on GPUs: from three ranks to two to one, it is the run of one with torch's AdamW. By collectives, and
    by memory that all ranks reach, which is here that of files."""
    pytest.importorskip('fast', reason='fast.py was deleted')
    program = around_train(tmp_path, f'folder = {str(tmp_path) if reach else None!r}\n{SHARED}')
    options = dict(gradient_accumulation_steps=6, grad_clip=0.5)
    plain, out = train(1, tmp_path / 'plain', script, dataset, **options), tmp_path / 'out'
    for ranks, max_iters in ((3, 10), (2, 20)):
        done = torchrun(ranks, program, *flags(**{
            **RUN, **options, 'dataset': dataset, 'out_dir': out, 'max_iters': max_iters, 'init_from': 'auto'}))
        assert done.returncode == 0 and 'Warning' not in done.stderr, done.stderr
        assert len(list(tmp_path.glob(f'{ranks}-*'))) == 2 * ranks * reach, 'gradients and weights of each rank'
    assert distance(train(1, out, script, dataset, **options, init_from='resume'), plain) < 1e-5
    norms = [[record['norm'] for record in records(folder)] for folder in (out, tmp_path / 'plain')]
    assert len(norms[0]) == 30 and norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_sharded_run(script, dataset, tmp_path):
    plain = train(1, tmp_path / 'plain', script, dataset, max_iters=4, eval_interval=4, dropout=0.0)
    options = dict(max_iters=4, eval_interval=4, dropout=0.0, shard=True, recompute=True, compile=True)
    assert distance(train(2, tmp_path / 'other', script, dataset, **options), plain) < 1e-5


@pytest.mark.slow
def test_sharded_in_bfloat16(script, dataset, tmp_path):
    """Weights are sent in 16 bits; the file holds what it always does."""
    options = dict(max_iters=10, dtype='bfloat16', dropout=0.0)
    plain = train(1, tmp_path / 'plain', script, dataset, **options)
    sharded = train(2, tmp_path / 'sharded', script, dataset, **options, shard=True)
    assert {t.dtype for t in sharded['model'].values()} == {torch.float32}
    moved = distance(plain, train(1, tmp_path / 'seed', script, dataset, **options, seed=2))
    assert distance(sharded, plain) < moved / 3


@pytest.mark.slow
def test_only_under_torchrun(script, dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        train(1, tmp_path, script, dataset, shard=True)
    assert e.value.code == 2
    assert capsys.readouterr().err == 'train.py: shard=True needs torchrun, and bfloat16 or float32 (dtype=float32)\n'


def test_every_rank_gets_as_many_evaluation_batches(dataset):
    """Or a sharded model would wait for ever. The sequences that count are the same ones."""
    bins = Bins(dataset, 16)
    for count, batch_size, world in ((7, 2, 3), (4, 2, 3), (1, 4, 4), (12, 3, 2)):
        shares = [list(bins.eval_batches('val', count, batch_size, rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert all(x.shape == y.shape == (batch_size, 16) for share in shares for x, y, n in share)
        rows = [x[:n].tolist() for share in shares for x, y, n in share]
        alone = [x[:n].tolist() for x, y, n in bins.eval_batches('val', count, count)]
        assert sorted(sum(rows, [])) == sorted(sum(alone, []))
        assert all((y >= 0).any() for share in shares for x, y, n in share), 'a loss of nothing is NaN'


EXCHANGE = """
import fast
shared = fast.shared
def told(n, device):
    tensors = shared(n, device)
    sys.stdout.write(f'{len(tensors)} tensors\\n')
    sys.stdout.flush()
    return tensors
fast.shared = told
"""


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gpus_that_read_each_others_memory_do_as_nccl_does(dataset, tmp_path, dtype):
    """To the last bit; two numbers have one sum. The model is cut within parameters, and has two groups of them."""
    pytest.importorskip('fast', reason='fast.py was deleted')
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    found = []
    for tensors, code in ((2, EXCHANGE), (1, EXCHANGE + "fast.left_out.add('shared')")):
        program = around_train(tmp_path, code)
        out = tmp_path / str(tensors)
        for max_iters in (15, 30):
            done = torchrun(2, program, *flags(**{
                **RUN, 'dataset': dataset, 'out_dir': out, 'device': 'cuda', 'dtype': dtype, 'deterministic': True,
                'max_iters': max_iters, 'init_from': 'auto', 'grad_clip': 0.5}))
            assert done.returncode == 0 and 'Warning' not in done.stderr, done.stderr
            if tensors == 2 and '1 tensors' in done.stdout:
                links = torch._C._distributed_c10d._detect_dma_connectivity(torch.autograd.DeviceType.CUDA, 'nvlink')
                assert not links.matrix[0][1], 'NVLink is there, and was not used'
                pytest.skip('needs GPUs that NVLink joins')
            assert done.stdout.count(f'{tensors} tensors') == 4
        found.append(torch.load(out / 'ckpt.pt', weights_only=True))
    assert distance(*found) == 0
