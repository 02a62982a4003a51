"""bench.py: times train.py's own loop, and says so in the lines that people parse."""

import json
import os
import re
import tempfile

import pytest
import torch

from .conftest import flags, torchrun

SMALL = dict(device='cpu', dtype='float32', compile=False, real_data=False, batch_size=2, block_size=16, n_layer=1,
             n_head=2, n_embd=8, warmup_steps=1, steps=2)
TIME = re.compile(r'^time per iteration: (\d+\.\d{4})ms, MFU: (-?\d+\.\d\d)%$', re.M)
RATE = re.compile(r'^([\d,]+) tok/s, ', re.M)


@pytest.fixture
def bench(script, capsys, tmp_path, monkeypatch):
    """bench(**options) runs bench.py in an empty working directory and returns what it printed."""
    torch.set_num_threads(1)
    (tmp_path / 'cwd').mkdir()
    (tmp_path / 'temp').mkdir()
    monkeypatch.chdir(tmp_path / 'cwd')
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temp'))

    def execute(**options):
        script('bench.py', *flags(**{**SMALL, **options}))
        return capsys.readouterr().out
    return execute


def test_the_lines_that_people_parse(bench, tmp_path):
    out = bench()
    [(ms, mfu)], [rate] = TIME.findall(out), RATE.findall(out)
    assert mfu == '-100.00'  # the peak of a CPU is unknown
    assert int(rate.replace(',', '')) == pytest.approx(2 * 16 / (float(ms) / 1000), rel=0.01)
    assert 'number of parameters: 0.40M' in out  # 50304 rows of 8 and one block
    left = [name for name in os.listdir(tmp_path / 'temp') if not name.startswith('torchinductor')]  # torch's own
    assert os.listdir() == left == []  # nothing stays behind


@pytest.mark.slow
def test_under_torchrun_one_process_speaks_for_all(tmp_path):
    done = torchrun(2, 'bench.py', *flags(**SMALL, gradient_accumulation_steps=2), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(TIME.findall(done.stdout)) == 1 and 'processes 2' in done.stdout
    said = r'^one process with its share takes ([\d.]+)ms: 2 do ([\d.]+) times its work, and ([\d.]+)% of the time is'
    [(alone, gain, share)], [(ms, _)] = re.findall(said, done.stdout, re.M), TIME.findall(done.stdout)
    assert float(gain) == pytest.approx(2 * float(alone) / float(ms), abs=0.01)
    assert float(share) == pytest.approx(max(0, 100 - 100 * float(alone) / float(ms)), abs=0.1)


XL, GPT_7B = dict(n_layer=48, n_head=25, n_embd=1600), dict(n_layer=32, n_head=32, n_embd=4096)


def test_estimates_of_what_does_not_fit(bench, capsys):
    shape = dict(**GPT_7B, block_size=1024, batch_size=4, gradient_accumulation_steps=64)
    said = []
    for options in ({}, dict(shard=True), dict(shard=True, recompute=True)):
        with pytest.raises(SystemExit):
            bench(estimate=True, gpu='H100', **shape, **options)
        found = re.findall(r'micro-steps: ([\d.]+) GiB each( \(more than there is\))?', capsys.readouterr().out)
        said.append([(float(gib), bool(more)) for gib, more in found])
    assert [more for _, more in said[0]] == [True] * 4 and [more for _, more in said[2]] == [True] + [False] * 3
    assert said[1][3] < said[1][2] < said[1][1] < said[1][0] == said[0][0] and said[2][2] < said[1][2]


@pytest.mark.parametrize('shape, gpu, gib, ms', [  # measured until 2026-11-28; GiB of 350M are of an older commit
    (dict(batch_size=12, gradient_accumulation_steps=40), 'H200', 6.4, 862.7),
    (dict(batch_size=60, gradient_accumulation_steps=8), 'H200', 23.0, 827.0),
    (dict(batch_size=240, gradient_accumulation_steps=2), 'H200', 85.5, 814.0),
    (dict(batch_size=12, gradient_accumulation_steps=1), 'H200', 6.4, 24.02),
    (dict(batch_size=60, gradient_accumulation_steps=8), 'H100', 23.0, 919.4),
    (dict(batch_size=32, gradient_accumulation_steps=4, **XL), 'H200', 104.8, 2419.3),
    (dict(batch_size=128, gradient_accumulation_steps=4, n_layer=24, n_head=16, n_embd=1024), 'H200', None, 2296.4),
    (dict(batch_size=12, gradient_accumulation_steps=2, processes=2), 'H200', 5.9, 25.06),
    (dict(batch_size=12, gradient_accumulation_steps=40, processes=2), 'H200', 5.9, 426.6),
    (dict(batch_size=16, gradient_accumulation_steps=4, processes=2, **XL), 'H200', None, 637.4),
    (dict(batch_size=16, gradient_accumulation_steps=4, processes=2, shard=True, **XL), 'H200', 51.4, 686.8),
    (dict(batch_size=4, gradient_accumulation_steps=4, processes=2, shard=True, recompute=True, **GPT_7B), 'H200', 53.6,
     936.6)])
def test_estimates_are_near_what_was_measured(bench, capsys, shape, gpu, gib, ms):
    shape = dict(shape)
    processes = shape.pop('processes', 1)
    with pytest.raises(SystemExit) as ended:
        bench(estimate=True, gpu=gpu, block_size=1024, **{'n_layer': 12, 'n_head': 12, 'n_embd': 768, **shape})
    assert not ended.value.code
    out = capsys.readouterr().out
    lines = re.findall(r'^ *(\d+) x (\d+) micro-steps: ([\d.]+) GiB each.*?, ([\d.]+) ms an update', out, re.M)
    steps = shape['gradient_accumulation_steps']
    assert [(int(n), int(m)) for n, m, *_ in lines] == [(n, max(1, steps // n)) for n in (1, 2, 8, 64)]
    memory, dt = lines[processes - 1][2:]
    assert gib is None or float(memory) == pytest.approx(gib, rel=0.1)
    assert float(dt) == pytest.approx(ms, rel=0.15)
    assert 'tok/s, of' not in out and 'TFLOP/s' not in out, 'nothing is measured'


def test_it_times_as_many_tokens_as_the_options_say(bench):
    out = bench(gradient_accumulation_steps=3, steps=1)
    assert 'tokens per iteration will be: 96' in out
    [(ms, _)], [rate] = TIME.findall(out), RATE.findall(out)
    assert int(rate.replace(',', '')) == pytest.approx(96 / (float(ms) / 1000), rel=0.01)


@pytest.mark.parametrize('vocab_size', [7, pytest.param(50304, marks=pytest.mark.slow)])
def test_generation(bench, vocab_size):
    out = bench(mode='sample', vocab_size=vocab_size, max_new_tokens=5, prompt_tokens=3, top_k=5, compare=True)
    assert re.search(r'^generate, 2 x 5 tokens: [\d,]+ tok/s, \d+\.\d+ ms a step, \d+\.\d\d s$', out, re.M)
    assert re.search(r'^a loop without a cache: [\d,]+ tok/s, .* times as long as ours$', out, re.M)
    assert re.search(r'^transformers, its cache: [\d,]+ tok/s, .* times as long as ours$', out, re.M)


def test_real_data(bench, dataset):
    out = bench(real_data=True, dataset=dataset)
    assert TIME.search(out) and 'number of parameters: 0.00M' in out  # 11 rows of 8, not 50304


def test_a_profile_is_written_beside_the_caller(bench):
    out = bench(profile=True)
    assert TIME.search(out) and 'aten::' in out
    assert re.search(r'^matmul +\d+\.\d+ ms a step +\d+\.\d%$', out, re.M)
    with open(os.path.join('bench_profile', 'trace.json'), encoding='utf-8') as f:
        events = json.load(f)['traceEvents']
    assert any('scaled_dot_product' in str(e.get('name')) for e in events)


def test_mistakes_are_one_line_each(bench, capsys):
    for options, problems in ((dict(steps=0, warmup_steps=0), ['bench.py: warmup_steps=0 must be at least 1',
                                                               'bench.py: steps=0 must be at least 1']),
                              (dict(without='FusedLos,GPU'), [f'bench.py: without={name}: fast.py has none'
                                                              for name in ('FusedLos', 'GPU')]),
                              (dict(n_head=3), ['bench.py: n_embd=8 must be a multiple of n_head=3'])):
        with pytest.raises(SystemExit) as ended:
            bench(**options)
        assert ended.value.code == 2 and capsys.readouterr().err.splitlines() == problems
