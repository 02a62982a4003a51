"""Options: values, config files, every mistake with its message, --help; and nothing but exit codes 0 and 2 ever."""

import contextlib
import io
import math
import os
import random
import re
import runpy
import string
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import DataError
from data.ranks import launched
from model import GPTConfig
from tests.conftest import ROOT

CONFIGURATOR = os.path.join(ROOT, 'configurator.py')
OPTIONS = dict(batch_size=12, block_size=1024, top_k=200, seed=1337, learning_rate=6e-4, dropout=0.0, bias=False,
             compile=True, dataset='openwebtext', start='\n')
TOY = f'''"""
Toy: a script of nothing but options.

    python toy.py config/small.py
"""
import os

batch_size = 3 * 4  # sequences in a micro-step
block_size = 1024
top_k = 200  # draw among the k likeliest tokens; 0: among all
seed = 1337
learning_rate = 6e-4  # the highest # after warm-up
dropout = 0.0
bias = False
compile = True  # an option that hides a builtin
dataset = 'openwebtext'
start = '\\n'  # the prompt
_hidden = 1
pair = (1, 2)
nothing = None
exec(open({CONFIGURATOR!r}, encoding='utf-8').read())
later = 3
if __name__ == '__main__' and os.environ.get('SHOW'):
    print(ascii(config))
'''


class Toy:
    """toy.py in a folder `repo`, run from a folder `elsewhere`, in this process."""

    def __init__(self, tmp_path, monkeypatch, capsys):
        self.repo, self.cwd = tmp_path / 'repo', tmp_path / 'elsewhere'
        self.path, self.patch, self.capsys = str(self.repo / 'toy.py'), monkeypatch, capsys
        (self.repo / 'config').mkdir(parents=True)
        self.cwd.mkdir()
        (self.repo / 'toy.py').write_text(TOY, encoding='utf-8')
        monkeypatch.chdir(self.cwd)

    def file(self, body, name='my.py', folder=None):
        """Write a config file into the working directory, or another folder."""
        path = (folder or self.cwd) / name
        path.write_bytes(body if isinstance(body, bytes) else body.encode())
        return name

    def __call__(self, *arguments):
        """Run it; its namespace. What it printed is in self.out, self.err."""
        self.patch.setattr(sys, 'argv', ['toy.py', *arguments])
        try:
            return runpy.run_path(self.path, run_name='__main__')
        finally:
            self.out, self.err = self.capsys.readouterr()

    def mistake(self, *arguments):
        """Run it with a mistake: exit code 2, and the lines on stderr without the script's name."""
        with pytest.raises(SystemExit) as end:
            self(*arguments)
        assert end.value.code == 2
        lines = self.err.removesuffix('\n').split('\n')
        assert all(line.startswith('toy.py: ') for line in lines), self.err
        return [line.removeprefix('toy.py: ') for line in lines]


@pytest.fixture
def toy(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('RANK', raising=False)
    return Toy(tmp_path, monkeypatch, capsys)


# -- what a script asks the configurator ----------------------------------------------------------------------------

def test_mistakes_are_noted_and_named_together(toy, capsys):
    space = toy('--batch_size=0', '--learning_rate=inf', '--dropout=nan')
    space['at_least'](1, 'batch_size', 'block_size')
    space['at_least'](0, 'learning_rate', 'dropout', 'seed')
    space['need'](True, 'not this one')
    space['need']([], 'but this one')
    space['note_mistakes'](GPTConfig, n_layer=0, n_head=5)
    with pytest.raises(SystemExit) as end:
        space['end_if_wrong']()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        'toy.py: batch_size=0 must be at least 1', 'toy.py: learning_rate=inf must be finite and at least 0',
        'toy.py: dropout=nan must be finite and at least 0', 'toy.py: but this one',
        'toy.py: n_layer=0 must be at least 1', 'toy.py: n_embd=768 must be a multiple of n_head=5']


def test_nothing_wrong_is_no_end(toy):
    space = toy()
    space['at_least'](1, 'batch_size')
    space['note_mistakes'](GPTConfig, n_layer=2)
    assert space['end_if_wrong']() is None


def test_free_memory(toy):
    assert 1 << 20 < toy()['free_memory']('cpu') <= 1 << 62


@pytest.fixture
def resolve(toy):
    """resolve(device, dtype) of the configurator; resolve.mistakes are what it noted in the last call."""
    def call(*asked):
        found, call.mistakes = space['resolve'](*asked), space['_mistakes'][:]
        space['_mistakes'].clear()
        return found
    space = toy()
    return call


def test_resolve_auto(resolve):
    device, dtype = resolve('auto', 'auto')
    if torch.cuda.is_available():
        assert (device, dtype) == ('cuda', 'bfloat16' if torch.cuda.get_device_capability() >= (8, 0) else 'float16')
    elif torch.backends.mps.is_available():
        assert (device, dtype) == ('mps', 'float32')
    else:
        assert device == 'cpu' and resolve('cpu', 'auto') == (device, dtype)
    assert not resolve.mistakes


def test_resolve_takes_bfloat16_on_a_cpu_that_computes_in_it(resolve):
    if not os.path.exists('/proc/cpuinfo'):
        pytest.skip('needs /proc/cpuinfo')
    with open('/proc/cpuinfo', encoding='utf-8') as f:
        words = set(f.read().split())
    native = bool(words & {'avx512_bf16', 'amx_tile', 'amx_bf16'})
    assert resolve('cpu', 'auto') == ('cpu', 'bfloat16' if native else 'float32')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_resolve_keeps_what_is_possible(resolve, dtype):
    assert resolve('cpu', dtype) == ('cpu', dtype) and not resolve.mistakes


@pytest.mark.parametrize('device, dtype, problems', [
    ('gpu', 'auto', ['device=gpu: choose auto, cpu, cuda, cuda:N or mps']),
    ('', 'auto', ['device=: choose auto, cpu, cuda, cuda:N or mps']),
    ('cpu', 'bf16', ['dtype=bf16: choose auto, float32, bfloat16 or float16']),
    ('cpu', 'float16', ['dtype=float16 needs CUDA, device is cpu; try --dtype=auto']),
    ('gpu', 'bf16', ['device=gpu: choose auto, cpu, cuda, cuda:N or mps',
                     'dtype=bf16: choose auto, float32, bfloat16 or float16'])])
def test_resolve_names_what_is_wrong(resolve, device, dtype, problems):
    resolve(device, dtype)
    assert resolve.mistakes == problems


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
@pytest.mark.parametrize('device', ['cuda', 'cuda:0'])
def test_resolve_without_cuda(resolve, device):
    resolve(device, 'auto')
    assert resolve.mistakes == [f'device={device} is not available here; try --device=auto or --device=cpu']


@pytest.mark.gpu
def test_resolve_counts_gpus(resolve):
    n = torch.cuda.device_count()
    assert resolve('cuda:0', 'float32') == ('cuda:0', 'float32') and not resolve.mistakes
    resolve(f'cuda:{n}', 'float32')
    assert resolve.mistakes == [f'device=cuda:{n}: there are {n} GPUs, counted from cuda:0']


def test_help_needs_no_torch(toy):
    """It shall come at once; whatever takes long to import is imported where it is needed."""
    done = subprocess.run([sys.executable, '-X', 'importtime', toy.path, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'learning_rate' in done.stdout and ' torch' not in done.stderr


# -- values on the command line -------------------------------------------------------------------------------------

VALUES = [
    ('batch_size', '32', 32), ('batch_size', '-1', -1), ('batch_size', '0', 0), ('batch_size', '1e3', 1000),
    ('batch_size', '2.0', 2), ('seed', '1e3', 1000), ('seed', '12345678901234567890', 12345678901234567890),
    ('top_k', 'None', 0), ('batch_size', '1_000', 1000),
    ('learning_rate', '1', 1.0), ('learning_rate', '1e-3', 1e-3), ('learning_rate', '-1', -1.0),
    ('learning_rate', '.5', 0.5), ('learning_rate', 'inf', math.inf), ('dropout', '0', 0.0),
    ('compile', 'false', False), ('compile', 'False', False), ('compile', 'FALSE', False), ('compile', 'true', True),
    ('bias', 'True', True), ('bias', 'tRuE', True),
    ('start', '42', '42'), ('start', 'a=b', 'a=b'), ('start', '', ''), ('start', 'None', 'None'),
    ('start', 'True', 'True'), ('start', '1e3', '1e3'), ('start', '[1, 2]', '[1, 2]'), ('start', "'q'", "'q'"),
    ('start', ' two  spaces ', ' two  spaces '), ('start', '-x', '-x'), ('start', '\\n', '\\n'),
    ('start', '<|endoftext|>', '<|endoftext|>'), ('start', 'FILE:prompt.txt', 'FILE:prompt.txt'),
    ('start', 'What is the answer to life, the universe, and everything?',
     'What is the answer to life, the universe, and everything?'),
    ('start', 'größe \N{SNOWMAN}', 'größe \N{SNOWMAN}'), ('start', '=', '='), ('dataset', 'a/b', 'a/b'),
]


@pytest.mark.parametrize('joined', [True, False], ids=['--key=value', '--key value'])
@pytest.mark.parametrize('key, text, value', VALUES)
def test_value(toy, key, text, value, joined):
    space = toy(f'--{key}={text}') if joined else toy(f'--{key}', text)
    assert (space[key], type(space[key])) == (value, type(value))
    assert space['config'] == {**OPTIONS, key: value}
    assert toy.out == f'Overriding: {key} = {value}\n' and toy.err == ''


def test_value_that_starts_with_dashes_is_joined_by_an_equals_sign(toy):
    assert toy('--start=--x')['start'] == '--x'
    assert toy('--start=--help')['start'] == '--help'


def test_the_word_after_a_option_is_its_value_even_if_it_is_dash_h(toy):
    assert toy('--start', '-h')['start'] == '-h'


def test_value_of_several_lines(toy):
    assert toy('--start=ROMEO:\n\tto be')['start'] == 'ROMEO:\n\tto be'


def test_no_arguments_no_change(toy):
    space = toy()
    assert {k: space[k] for k in OPTIONS} == space['config'] == OPTIONS
    assert toy.out == toy.err == ''


def test_later_wins(toy):
    toy.file('batch_size = 2\nseed = 2\n')
    assert toy('my.py', '--batch_size=3')['batch_size'] == 3
    assert toy('--batch_size=3', 'my.py')['batch_size'] == 2
    assert toy('--batch_size=3', '--batch_size', '4')['batch_size'] == 4
    toy.file('seed = 5\n', 'other.py')
    config = toy('my.py', 'other.py')['config']
    assert (config['batch_size'], config['seed']) == (2, 5)
    assert toy.out == ''.join(f'Overriding: {line}\n' for line in ('batch_size = 2', 'seed = 2', 'seed = 5'))


def test_it_leaves_few_names(toy):
    """Beside modules, and names with an underscore."""
    space = toy('--seed=1')
    names = {k for k, v in space.items() if not k.startswith('_') and not isinstance(v, type(os))}
    assert names == {*OPTIONS, 'pair', 'nothing', 'later', 'config', 'fail', 'end_if_wrong', 'need', 'at_least',
                     'note_mistakes', 'resolve', 'free_memory'}


def test_config_is_a_copy(toy):
    space = toy()
    space['config']['seed'] = 7
    assert space['seed'] == 1337


def test_fail(toy, capsys):
    with pytest.raises(SystemExit) as end:
        toy()['fail']('one thing', 'another')
    assert end.value.code == 2
    assert capsys.readouterr().err == 'toy.py: one thing\ntoy.py: another\n'


def test_the_first_rank_speaks_for_all(toy, monkeypatch):
    """Another one says its mistake only if it is still there 2 s later: torchrun would have ended it with the first."""
    monkeypatch.setenv('RANK', '1')
    toy.file('seed = 3\ngpus = 8\n')
    assert toy('--batch_size=2', 'my.py')['config'] == {**OPTIONS, 'batch_size': 2, 'seed': 3}
    assert toy.out == toy.err == ''
    with pytest.raises(SystemExit) as end:
        toy('--batchsize=2')
    assert end.value.code == 2 and toy.out == ''
    assert toy.err == 'toy.py, rank 1: unknown option --batchsize; did you mean --batch_size?\n'


def test_a_terminal_without_unicode(toy):
    """`Overriding: ...` and the notes must not fail where stdout cannot encode them."""
    toy.file('größe = 3\n')
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii', 'SHOW': '1'}
    end = subprocess.run([sys.executable, toy.path, '--start=größe', 'my.py'], env=env, capture_output=True, timeout=60)
    assert (end.returncode, end.stderr) == (0, b'')
    assert b"'start': 'gr\\xf6\\xdfe'" in end.stdout and b'is no option of toy.py, ignored' in end.stdout


def test_text_that_is_not_unicode(toy):
    """A lone surrogate is what Python makes of a byte on the command line that is not UTF-8."""
    assert toy('--start=\udcff')['start'] == '\udcff'


# -- mistakes on the command line -----------------------------------------------------------------------------------

MISTAKES = [
    # wrong type: option, value, type
    (['--batch_size=abc'], '--batch_size=abc: batch_size takes an int'),
    (['--batch_size', 'abc'], '--batch_size=abc: batch_size takes an int'),
    (['--batch_size=2.5'], '--batch_size=2.5: batch_size takes an int'),
    (['--batch_size='], '--batch_size=: batch_size takes an int'),
    (['--batch_size', ''], '--batch_size=: batch_size takes an int'),
    (['--batch_size=True'], '--batch_size=True: batch_size takes an int'),
    (['--batch_size=nan'], '--batch_size=nan: batch_size takes an int'),
    (['--batch_size=inf'], '--batch_size=inf: batch_size takes an int'),
    (['--batch_size=5*8'], '--batch_size=5*8: batch_size takes an int'),
    (['--batch_size=none'], '--batch_size=none: batch_size takes an int'),
    (['--batch_size=1\n2'], '--batch_size=1\\n2: batch_size takes an int'),
    (['--batch_size=' + 'x' * 80], '--batch_size=' + 'x' * 80 + ': batch_size takes an int'),
    (['--batch_size=' + 'x' * 81], '--batch_size=' + 'x' * 77 + '...: batch_size takes an int'),
    (['--batch_size=' + 'x' * 200], '--batch_size=' + 'x' * 77 + '...: batch_size takes an int'),
    (['--learning_rate=fast'], '--learning_rate=fast: learning_rate takes a float'),
    (['--learning_rate='], '--learning_rate=: learning_rate takes a float'),
    (['--learning_rate=None'], '--learning_rate=None: learning_rate takes a float'),
    (['--learning_rate=True'], '--learning_rate=True: learning_rate takes a float'),
    (['--learning_rate=' + '9' * 400], '--learning_rate=' + '9' * 77 + '...: learning_rate takes a float'),
    (['--compile=2'], '--compile=2: compile takes True or False'),
    (['--compile=no'], '--compile=no: compile takes True or False'),
    (['--compile='], '--compile=: compile takes True or False'),
    (['--compile=None'], '--compile=None: compile takes True or False'),
    # unknown option: the nearest
    (['--batchsize=32'], 'unknown option --batchsize; did you mean --batch_size?'),
    (['--batchsize', '32'], 'unknown option --batchsize; did you mean --batch_size?'),
    (['--batch-size=32'], 'unknown option --batch-size; did you mean --batch_size?'),
    (['--Seed=1'], 'unknown option --Seed; did you mean --seed?'),
    (['--bais=True'], 'unknown option --bais; did you mean --bias?'),
    (['--learning_rte=1'], 'unknown option --learning_rte; did you mean --learning_rate?'),
    (['--compile_=False'], 'unknown option --compile_; did you mean --compile?'),
    (['--no-compile'], 'unknown option --no-compile; did you mean --compile?'),
    (['--wandb=True'], 'unknown option --wandb; --help lists them'),
    (['--x'], 'unknown option --x; --help lists them'),
    (['--'], 'unknown option --; --help lists them'),
    (['--=3'], 'unknown option --; --help lists them'),
    (['--a\nb=3'], 'unknown option --a\\nb; --help lists them'),
    # not options: no underscored names, no other types, nothing that comes after
    (['--_hidden=2'], 'unknown option --_hidden; --help lists them'),
    (['--pair=2'], 'unknown option --pair; --help lists them'),
    (['--nothing=2'], 'unknown option --nothing; --help lists them'),
    (['--later=2'], 'unknown option --later; --help lists them'),
    (['--__file__=2'], 'unknown option --__file__; --help lists them'),
    # no value
    (['--compile'], '--compile needs a value: --compile=True'),
    (['--bias'], '--bias needs a value: --bias=True'),
    (['--batch_size'], '--batch_size needs a value: --batch_size=12'),
    (['--learning_rate', '--bias=True'], '--learning_rate needs a value: --learning_rate=0.0006'),
    (['--dataset'], '--dataset needs a value: --dataset=openwebtext'),
    # bare words, missing config files
    (['config/absent.py'], 'config/absent.py: no such config file; options are written --key=value'),
    (['config'], 'config: no such config file; options are written --key=value'),
    (['nonsense'], 'nonsense: no such config file; options are written --key=value'),
    (['batch_size'], 'batch_size: no such config file; an option is set with --batch_size=value'),
    (['batchsize'], 'batchsize: no such config file; an option is set with --batch_size=value'),
    (['batch_size=32'], 'batch_size=32: write --batch_size=32'),
    (['start=a=b'], 'start=a=b: write --start=a=b'),
    (['-compile=False'], '-compile=False: no such config file; options are written --key=value'),
    ([''], ': no such config file; options are written --key=value'),
    (['a\nb'], 'a\\nb: no such config file; options are written --key=value'),
    (['--compile=True', 'False'], 'False: no such config file; options are written --key=value'),
]


@pytest.mark.parametrize('arguments, message', MISTAKES)
def test_mistake(toy, arguments, message):
    assert toy.mistake(*arguments) == [message]


def test_a_missing_value_is_said_in_one_line_for_a_default_of_a_newline(toy):
    assert toy.mistake('--start') == ['--start needs a value: --start=\\n']


def test_all_mistakes_are_listed(toy):
    toy.file('batch_size = 1.5\ndropuot = 0.1\n')
    assert toy.mistake('--seed=x', 'my.py', 'absent.py', '--Bias=True', '--compile') == [
        '--seed=x: seed takes an int',
        'my.py, line 1: batch_size=1.5: batch_size takes an int',
        'my.py, line 2: unknown option dropuot, did you mean dropout?',
        'absent.py: no such config file; options are written --key=value',
        'unknown option --Bias; did you mean --bias?',
        '--compile needs a value: --compile=True']


def test_a_mistake_ends_a_real_process_with_2(toy):
    end = subprocess.run([sys.executable, os.path.join('..', 'repo', 'toy.py'), '--seed=3', '--batchsize=3'],
                         capture_output=True, text=True, timeout=60)
    assert end.returncode == 2
    assert end.stdout == 'Overriding: seed = 3\n'
    assert end.stderr == 'toy.py: unknown option --batchsize; did you mean --batch_size?\n'


# -- config files: values -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('body, key, value', [
    ('batch_size = 5 * 8', 'batch_size', 40),
    ('batch_size = 1e3', 'batch_size', 1000),
    ('batch_size = "32"', 'batch_size', 32),
    ('batch_size: int = 3', 'batch_size', 3),
    ('top_k = None', 'top_k', 0),
    ('learning_rate = 1', 'learning_rate', 1.0),
    ('from fractions import Fraction\nlearning_rate = Fraction(1, 4)', 'learning_rate', 0.25),
    ('import numpy as np\nbatch_size = np.int64(7)', 'batch_size', 7),
    ('import numpy as np\nlearning_rate = np.float32(0.5)', 'learning_rate', 0.5),
    ('compile = False', 'compile', False),
    ('compile = "false"', 'compile', False),
    ('start = "42"', 'start', '42'),
    ('start = ""', 'start', ''),
    ('start = "größe \N{SNOWMAN}"', 'start', 'größe \N{SNOWMAN}'),
    ('import math\n_root = math.sqrt(16)\nbatch_size = _root', 'batch_size', 4),
    ('batch_size *= 2', 'batch_size', 24),
    ('batch_size = block_size // 256', 'batch_size', 4),
    ('if bias:\n    seed = 1\nelse:\n    seed = 2', 'seed', 2),
    ('for seed in range(4):\n    pass', 'seed', 3),
    ('def _double(n):\n    return 2 * n\nbatch_size = _double(batch_size)', 'batch_size', 24),
    ('import os\nseed = len(os.path.basename(__file__))', 'seed', 5),
    ('seed = 1 if __name__ != "__main__" else 2', 'seed', 1),
    ('batch_size = 8\r\n', 'batch_size', 8),
])
def test_config_value(toy, body, key, value):
    config = toy(toy.file(body))['config']
    assert (config[key], type(config[key])) == (value, type(value))
    assert config == {**OPTIONS, key: value}
    assert toy.out == f'Overriding: {key} = {value}\n' and toy.err == ''


@pytest.mark.parametrize('body', ['', '# nothing', 'pass', '_x = 3', 'import math', 'from os.path import join',
                                  'def double(n):\n    return 2 * n', 'double = lambda n: 2 * n', '[1 for i in "ab"]'])
def test_config_that_says_nothing(toy, body):
    assert toy(toy.file(body))['config'] == OPTIONS
    assert toy.out == toy.err == ''


def test_a_config_sees_what_came_before_it(toy):
    toy.file('block_size = batch_size * 2\n')
    assert toy('--batch_size=8', 'my.py')['block_size'] == 16


def test_names_of_a_config_stay_in_it(toy):
    assert 'math' not in toy(toy.file('import math\nseed = math.floor(2.5)\n'))


def test_a_config_with_its_default_written_out_is_said(toy):
    toy(toy.file('bias = False\n'))
    assert toy.out == 'Overriding: bias = False\n'


def test_config_is_looked_up_here_then_in_the_repo(toy):
    toy.file('seed = 1\n', 'a.py', toy.repo / 'config')
    toy.file('seed = 2\n', 'b.py', toy.repo / 'config')
    (toy.cwd / 'config').mkdir()
    toy.file('seed = 3\n', 'b.py', toy.cwd / 'config')
    assert toy('config/a.py')['seed'] == 1
    assert toy('config/b.py')['seed'] == 3
    assert toy(str(toy.repo / 'config' / 'b.py'))['seed'] == 2
    assert toy(os.path.join('..', 'repo', 'config', 'b.py'))['seed'] == 2
    assert toy(toy.file('seed = 4', 'no_ending'))['seed'] == 4


def test_a_mistake_in_a_config_of_the_repo(toy):
    toy.file('\nseed = = 2\n', 'bad.py', toy.repo / 'config')
    assert toy.mistake('config/bad.py') == ['config/bad.py, line 2: SyntaxError: invalid syntax']


# -- config files: mistakes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('body, message', [
    ('batch_size = "many"', 'line 1: batch_size=many: batch_size takes an int'),
    ('\n\nbatch_size = 2.5', 'line 3: batch_size=2.5: batch_size takes an int'),
    ('batch_size = True', 'line 1: batch_size=True: batch_size takes an int'),
    ('batch_size = [8]', 'line 1: batch_size=[8]: batch_size takes an int'),
    ('batch_size = 1j', 'line 1: batch_size=1j: batch_size takes an int'),
    ('batch_size = float("nan")', 'line 1: batch_size=nan: batch_size takes an int'),
    ('if True:\n    seed = "a\\nb"', 'line 2: seed=a\\nb: seed takes an int'),
    ('learning_rate = True', 'line 1: learning_rate=True: learning_rate takes a float'),
    ('learning_rate = None', 'line 1: learning_rate=None: learning_rate takes a float'),
    ('learning_rate = (1, 2)', 'line 1: learning_rate=(1, 2): learning_rate takes a float'),
    ('compile = 2', 'line 1: compile=2: compile takes True or False'),
    ('compile = 1.0', 'line 1: compile=1.0: compile takes True or False'),
    ('compile = "yes"', 'line 1: compile=yes: compile takes True or False'),
    ('dataset = 3', 'line 1: dataset=3: dataset takes a str'),
    ('dataset = None', 'line 1: dataset=None: dataset takes a str'),
    ('dataset = b"owt"', "line 1: dataset=b'owt': dataset takes a str"),
    # a misspelt option is an error, whatever its value
    ('seed = 1\nbatchsize = 3', 'line 2: unknown option batchsize, did you mean batch_size?'),
    ('batch_sise = 3', 'line 1: unknown option batch_sise, did you mean batch_size?'),
    ('bacth_size = 3', 'line 1: unknown option bacth_size, did you mean batch_size?'),
    ('BATCH_size = 3\nlearning_rates = 1.0', 'line 2: unknown option learning_rates, did you mean learning_rate?'),
    ('dropuot = 0.1', 'line 1: unknown option dropuot, did you mean dropout?'),
    ('compile_ = False', 'line 1: unknown option compile_, did you mean compile?'),
    ('sed = 1', 'line 1: unknown option sed, did you mean seed?'),
    ('bais = True', 'line 1: unknown option bais, did you mean bias?'),
    ('datasets = "owt"', 'line 1: unknown option datasets, did you mean dataset?'),
    ('topk = None', 'line 1: unknown option topk, did you mean top_k?'),
    # an exception is one line: file, line, error
    ('seed = 1\n\n1 / 0', 'line 3: ZeroDivisionError: division by zero'),
    ('seed = undefined', "line 1: NameError: name 'undefined' is not defined"),
    ('import nowhere_at_all', "line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ('def _f():\n    raise OSError("a\\nb")\n_f()', 'line 2: OSError: a\\nb'),
    ('import json\nseed = json.loads("{")', 'line 2: JSONDecodeError: Expecting property name enclosed in double '
                                            'quotes: line 1 column 2 (char 1)'),
    ('\nexec("1 +")', 'line 2: SyntaxError: invalid syntax'),
    ('raise ValueError("x" * 200)', 'line 1: ValueError: ' + 'x' * 77 + '...'),
    ('def _f():\n    _f()\n_f()', 'line 2: RecursionError: maximum recursion depth exceeded'),
    ('seed = 1\nseed = = 2', 'line 2: SyntaxError: invalid syntax'),
    ('if True:\nseed = 1', "line 2: IndentationError: expected an indented block after 'if' statement on line 1"),
    ('seed = 1\n  dropout = 0.1', 'line 2: IndentationError: unexpected indent'),
    ('\nseed = "abc', 'line 2: SyntaxError: unterminated string literal (detected at line 2)'),
    ('seed = (1', "line 1: SyntaxError: '(' was never closed"),
    ('seed = 1\nreturn', "line 2: SyntaxError: 'return' outside function"),
    ('seed = 1\nraise SystemExit(3)', 'line 2: SystemExit: 3'),
    ('\nimport sys\nsys.exit(None)', 'line 3: SystemExit: '),  # None: wandb's sys.exit has a 0
])
def test_config_mistake(toy, body, message):
    assert toy.mistake(toy.file(body)) == [f'my.py, {message}']


@pytest.mark.parametrize('body, error', [
    (b'seed = 1\nstart = "\xff"', 'UnicodeDecodeError'),
    (b'seed = 1\0', '(SyntaxError|ValueError)'),  # differs between versions of Python
    (b'\x80PK\x03\x04' * 99, 'UnicodeDecodeError'),
    (b'seed = ' + b'(' * 5000, '(SyntaxError|MemoryError|RecursionError)'),
    (b'seed = ' + b'-' * 100_000 + b'1', '(SyntaxError|MemoryError|RecursionError)'),
    (b'seed = ' + b'9' * 9999, 'SyntaxError'),
])
def test_config_that_is_no_python(toy, body, error):
    line, = toy.mistake(toy.file(body))
    assert re.match(rf'my\.py, line \d+: {error}: ', line)
    assert len(line) < 150


@pytest.mark.parametrize('value', ['3', '1.5', 'True', '"x"', 'None', '1j', '[1]', '(1, 2)', '{}', '{1}', 'b"x"'])
def test_a_stranger_in_a_config_gets_a_note(toy, value):
    toy.file(f'seed = 2\ngpus = {value}\n')
    assert toy('my.py')['config'] == {**OPTIONS, 'seed': 2}
    assert toy.out == 'Overriding: seed = 2\nnote: my.py, line 2: gpus is no option of toy.py, ignored\n'
    assert toy.err == ''


def test_what_stands_under_main_in_a_config_gets_a_note(toy):
    toy.file('seed = 2\nif __name__ == "__main__":\n    seed = 3\n')
    assert toy('my.py')['config'] == {**OPTIONS, 'seed': 2}
    assert toy.out == ('note: my.py: a config file is not run as __main__, what stands under that is skipped\n'
                       'Overriding: seed = 2\n')


@pytest.mark.parametrize('name, content', [('conf.yaml', 'batch_size: 2\n'), ('conf.json', '{"batch_size": 2}')])
def test_a_config_of_another_kind(toy, name, content):
    """Both are Python, too, and would do nothing."""
    toy.file(content, name)
    with pytest.raises(SystemExit):
        toy(name)
    assert toy.err == f'toy.py: {name}: a config file is Python, with a line for each option: batch_size = 12\n'


@pytest.mark.parametrize('name', ['i', 'x', 'lr', 'tokens', 'block', 'weight_decay', 'BATCH'])
def test_a_stranger_far_from_every_option_is_no_mistake(toy, name):
    toy(toy.file(f'{name} = 1\n'))
    assert toy.out == f'note: my.py, line 1: {name} is no option of toy.py, ignored\n'


# -- --help ---------------------------------------------------------------------------------------------------------

HELP = '''\
Toy: a script of nothing but options.

    python toy.py config/small.py

Options, set by --key=value or in a config file:

  --batch_size=12                          sequences in a micro-step
  --block_size=1024
  --top_k=200                              draw among the k likeliest tokens; 0: among all
  --seed=1337
  --learning_rate=0.0006                   the highest # after warm-up
  --dropout=0.0
  --bias=False
  --compile=True                           an option that hides a builtin
  --dataset='openwebtext'
  --start='\\n'                             the prompt
'''


@pytest.mark.parametrize('name', ['train.py', pytest.param('sample.py', marks=pytest.mark.slow)])
def test_help_into_a_pipe_that_closes(name):
    process = subprocess.Popen([sys.executable, '-u', os.path.join(ROOT, name), '--help'], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) == 0
    process.stderr.close()


@pytest.mark.parametrize('arguments', [['--help'], ['-h'], ['--seed=3', '--help'], ['--help', '--batchsize=3'],
                                       ['absent.py', '-h'], ['my.py', '--help']])
def test_help(toy, arguments):
    toy.file('seed = 4\n')
    with pytest.raises(SystemExit) as end:
        toy(*arguments)
    assert end.value.code == 0
    assert toy.out == HELP and toy.err == ''


# -- the real scripts (FAULTS.md, rows 19 and 20) -------------------------------------------------------------------

@pytest.fixture
def refused(script, monkeypatch, capsys, tmp_path):
    """refused('train.py', ...): its lines on stderr; it ended with code 2, before there was a model or a file."""
    monkeypatch.chdir(tmp_path)
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)

    def execute(name, *arguments):
        with pytest.raises(SystemExit) as end:
            script(name, *arguments)
        assert end.value.code == 2
        out, err = capsys.readouterr()
        assert 'number of parameters' not in out and 'tokens per iteration' not in out
        assert os.listdir(tmp_path) == []
        lines = err.removesuffix('\n').split('\n')
        assert all(line.startswith(name + ': ') for line in lines), err
        return [line.removeprefix(name + ': ') for line in lines]

    return execute


@pytest.mark.parametrize('name, argument, message', [
    ('train.py', '--batchsize=2', 'unknown option --batchsize; did you mean --batch_size?'),
    ('train.py', '--lr=1', 'unknown option --lr; did you mean --learning_rate?'),
    ('sample.py', '--lr=1', 'unknown option --lr; --help lists them'),
    ('train.py', 'train_pydoc_char.py', 'train_pydoc_char.py: no such config file; did you mean '
     'config/train_pydoc_char.py?'),
    ('train.py', '--n_layers=2', 'unknown option --n_layers; did you mean --n_layer?'),
    ('train.py', '--max_iters=1e3.5', '--max_iters=1e3.5: max_iters takes an int'),
    ('train.py', '--compile', '--compile needs a value: --compile=True'),
    ('train.py', 'config/train_gpt3.py', 'config/train_gpt3.py: no such config file; options are written --key=value'),
    ('train.py', 'eval_only', 'eval_only: no such config file; an option is set with --eval_only=value'),
    ('sample.py', '--prompt=a', 'unknown option --prompt; --help lists them'),
    ('sample.py', '--temperature=hot', '--temperature=hot: temperature takes a float'),
    ('sample.py', '--start', '--start needs a value: --start=\\n'),
    ('bench.py', '--profil=True', 'unknown option --profil; did you mean --profile?'),
    ('bench.py', '--steps=many', '--steps=many: steps takes an int'),
])
def test_scripts_refuse_an_argument(refused, name, argument, message):
    assert refused(name, argument) == [message]


@pytest.mark.parametrize('argument, message', [
    ('--batch_size=-1', 'batch_size=-1 must be at least 1'),
    ('--batch_size=0', 'batch_size=0 must be at least 1'),
    ('--gradient_accumulation_steps=0', 'gradient_accumulation_steps=0 must be at least 1'),
    ('--eval_interval=0', 'eval_interval=0 must be at least 1'),
    ('--log_interval=0', 'log_interval=0 must be at least 1'),
    ('--eval_iters=0', 'eval_iters=0 must be at least 1'),
    ('--dataset=', 'dataset= is empty: name a folder in data/, or a path to one'),
    ('--max_iters=-1', 'max_iters=-1 must be at least 0'),
    ('--warmup_iters=-1', 'warmup_iters=-1 must be at least 0'),
    ('--learning_rate=0', 'learning_rate=0.0 must be finite and above 0'),
    ('--learning_rate=inf', 'learning_rate=inf must be finite and above 0'),
    ('--min_lr=nan', 'min_lr=nan must be finite and at least 0'),
    ('--min_lr=-1', 'min_lr=-1.0 must be finite and at least 0'),
    ('--weight_decay=-0.1', 'weight_decay=-0.1 must be finite and at least 0'),
    ('--beta2=1', 'beta1=0.9 and beta2=1.0 must lie in [0, 1)'),
    ('--grad_clip=-1', 'grad_clip=-1.0 must be finite and at least 0'),
    ('--n_embd=100', 'n_embd=100 must be a multiple of n_head=12'),
    ('--n_head=0', 'n_head=0 must be at least 1'),
    ('--block_size=0', 'block_size=0 must be at least 1'),
    ('--n_layer=0', 'n_layer=0 must be at least 1'),
    ('--dropout=1', 'dropout=1.0 must lie in [0, 1)'),
    ('--dropout=nan', 'dropout=nan must lie in [0, 1)'),
    ('--dtype=bf16', 'dtype=bf16: choose auto, float32, bfloat16 or float16'),
    ('--device=gpu', 'device=gpu: choose auto, cpu, cuda, cuda:N or mps'),
    ('--backend=ncc', 'backend=ncc: choose auto, nccl or gloo'),
    ('--init_from=foo',
     'init_from=foo: choose scratch, resume, auto, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with '
     'config.json'),
    ('--init_from=', 'init_from=: choose scratch, resume, auto, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder '
                     'with config.json'),
])
def test_train_refuses_a_value(refused, argument, message):
    assert refused('train.py', '--device=cpu', '--dtype=float32', '--min_lr=0', argument) == [message]


def test_train_refuses_a_learning_rate_that_is_no_number(refused):
    assert 'learning_rate=nan must be finite and above 0' in refused('train.py', '--device=cpu', '--learning_rate=nan')


@pytest.mark.parametrize('name', ['train.py', 'sample.py'])
def test_cuda_where_there_is_none(refused, name):
    if torch.cuda.is_available():
        pytest.skip('there is CUDA')
    assert refused(name, '--device=cuda') == [
        'device=cuda is not available here; try --device=auto or --device=cpu']


def test_float16_on_the_cpu(refused):
    assert refused('train.py', '--device=cpu', '--dtype=float16') == [
        'dtype=float16 needs CUDA, device is cpu; try --dtype=auto']


@pytest.mark.parametrize('name', ['train.py', 'sample.py'])
@pytest.mark.parametrize('seed', [10**30, 2**64, -2**63 - 1])
def test_a_seed_too_large_for_the_generator(refused, name, seed):
    line, = refused(name, '--device=cpu', f'--seed={seed}')
    assert line.startswith(f'seed={seed} must ')


TORCHRUN = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'}


def under_torchrun(monkeypatch, **changes):
    """The environment that torchrun would make; None takes a variable away."""
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


def test_accumulation_steps_that_the_processes_cannot_share(refused, monkeypatch):
    under_torchrun(monkeypatch, WORLD_SIZE='3')
    assert refused('train.py', '--device=cpu') == [
        'gradient_accumulation_steps=40 must be a multiple of the 3 processes']


@pytest.mark.parametrize('body', ['datasets = ["owt"]', 'dropouts = (0.1, 0.2)', 'betas = (0.9, 1.0)', 'seeds = {}'])
def test_a_helper_that_can_be_no_option_is_a_note(toy, body):
    toy(toy.file(f'{body}\nseed = 3'))
    assert f'line 1: {body.split()[0]} is no option of toy.py, ignored' in toy.out


@pytest.mark.parametrize('word, value', [('0', False), ('1', True), ('TRUE', True), ('False', False)])
def test_truth_as_a_word_or_a_number(toy, word, value):
    assert toy(f'--bias={word}')['bias'] is value
    assert toy(toy.file(f'bias = {word.capitalize() if word.isalpha() else word}'))['bias'] is value


@pytest.mark.parametrize('value', [None, ''])
@pytest.mark.parametrize('name', ['LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'])
def test_half_of_what_torchrun_sets_is_one_line(monkeypatch, name, value):
    under_torchrun(monkeypatch, **{name: value})
    with pytest.raises(DataError, match=f'^RANK=0 is set, but not {name}: start several processes with torchrun'):
        launched()


@pytest.mark.parametrize('changes', [{'RANK': '1'}, {'RANK': '-1'}, {'RANK': 'a'}, {'WORLD_SIZE': '0'},
                                     {'LOCAL_RANK': '1.5'}])
def test_ranks_that_cannot_be(monkeypatch, changes):
    under_torchrun(monkeypatch, **changes)
    with pytest.raises(DataError, match='^RANK=.*, LOCAL_RANK=.*, WORLD_SIZE=.* do not fit together'):
        launched()


def test_ranks(monkeypatch):
    under_torchrun(monkeypatch, RANK='5', LOCAL_RANK='1', WORLD_SIZE='8')
    assert launched() == (True, 5, 1, 8)
    for rank in (None, ''):  # whatever else a scheduler sets
        under_torchrun(monkeypatch, RANK=rank, WORLD_SIZE='8', LOCAL_RANK='3')
        assert launched() == (False, 0, 0, 1)


def test_all_problems_in_one_list(refused, monkeypatch):
    under_torchrun(monkeypatch, WORLD_SIZE='3')
    assert refused('train.py', '--batch_size=-1', '--eval_interval=0', '--n_embd=100', '--dtype=bf16',
                   '--init_from=foo', '--device=gpu') == [
        'batch_size=-1 must be at least 1',
        'eval_interval=0 must be at least 1',
        'gradient_accumulation_steps=40 must be a multiple of the 3 processes',
        'init_from=foo: choose scratch, resume, auto, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with '
     'config.json',
        'n_embd=100 must be a multiple of n_head=12',
        'device=gpu: choose auto, cpu, cuda, cuda:N or mps',
        'dtype=bf16: choose auto, float32, bfloat16 or float16']


@pytest.mark.parametrize('argument, message', [
    ('--num_samples=0', 'num_samples=0 must be at least 1'),
    ('--max_new_tokens=0', 'max_new_tokens=0 must be at least 1'),
    ('--temperature=-1', 'temperature=-1.0 must be finite and not negative; 0 always takes the likeliest token'),
    ('--temperature=nan', 'temperature=nan must be finite and not negative; 0 always takes the likeliest token'),
    ('--top_k=-1', 'top_k=-1 must not be negative; 0 is off'),
    ('--dtype=bf16', 'dtype=bf16: choose auto, float32, bfloat16 or float16'),
    ('--start=FILE:absent.txt', 'start=FILE:absent.txt: No such file or directory'),
])
def test_sample_refuses_a_value(refused, argument, message):
    assert refused('sample.py', '--device=cpu', argument) == [message]


def test_bench_refuses_a_value(refused):
    assert refused('bench.py', '--steps=0', '--warmup_steps=0') == [
        'warmup_steps=0 must be at least 1', 'steps=0 must be at least 1']


def test_train_from_another_working_directory(refused):
    """The config is found in the repo; what stops the run is the interval."""
    assert refused('train.py', 'config/train_shakespeare_char.py', '--device=cpu', '--eval_interval=0') == [
        'eval_interval=0 must be at least 1']


# -- anything at all: exit code 0 or 2, a line per problem, never a traceback ---------------------------------------

with open(CONFIGURATOR, encoding='utf-8') as source:
    CODE = compile(source.read(), CONFIGURATOR, 'exec')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with toy.py, and configs that are good and bad."""
    folder, back = tmp_path_factory.mktemp('fuzz'), os.getcwd()
    bodies = {'toy.py': TOY, 'good.py': 'seed = 5\n', 'bad.py': 'seed = = 5\n', 'odd.py': 'sede = 5\n'}
    for name, body in bodies.items():
        (folder / name).write_text(body, encoding='utf-8')
    os.chdir(folder)
    yield folder
    os.chdir(back)


def configure(folder, *arguments, body=None):
    """
    The configurator on the toy's options, with streams that encode as a terminal's do; `body` becomes my.py. Returns
    the `config` it leaves, None if it ended the script; asserts what holds for any input.
    """
    if body is not None:
        (folder / 'my.py').write_bytes(body.encode('utf-8', 'surrogatepass'))
    out = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    err = io.TextIOWrapper(io.BytesIO(), 'utf-8', errors='backslashreplace')
    space = {**OPTIONS, '__file__': str(folder / 'toy.py')}
    argv, code = sys.argv, None
    try:
        sys.argv = ['toy.py', *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            exec(CODE, space)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        err.flush()
    said = err.buffer.getvalue().decode()
    assert code in (None, 0, 2)
    assert 'Traceback' not in said
    assert (code == 2) == bool(said), said
    assert re.fullmatch(r'(toy\.py: .+\n)*', said), said
    if code is not None:
        return None
    config = space['config']
    assert {k: type(v) for k, v in config.items()} == {k: type(v) for k, v in OPTIONS.items()}
    assert all(space[k] is v for k, v in config.items())
    return config


LETTERS = string.ascii_letters + string.punctuation.replace('*', '') + ' \n\r\t\0é\N{SNOWMAN}\u2028\udcff\U0001f600'
NAMES = [*OPTIONS, '_hidden', 'later', '', '-', 'help', 'gpus', '__file__', 'options', 'config']
TEXTS = ['1', '-1', '1e3', '2.5', 'None', 'True', 'false', '', 'nan', '-inf', '1e999', '9' * 5000, 'a=b', '--', '0x10',
         "'", '\u0663', '1_0', '\n', '\udcff', 'good.py', '1e308']
WORDS = ['good.py', 'bad.py', 'odd.py', 'absent.py', '--help', 'my.py']
VALUES_IN_A_CONFIG = [
    '3', '-1', '1e3', '2.5', 'True', 'None', '"a"', '"1e3"', '""', '[1]', '1j', 'float("nan")', '1 << 20000',
    '"\\ud800"', 'seed', 'undefined', '1 / 0', 'lambda: 0', 'object()', 'type', '"x" * 999', 'b"x"', 'range(3)', '...']
STATEMENTS = [
    'import math', 'from math import pi', 'import math as seed', 'def f(): return seed', 'def seed(): pass', 'f()',
    'class A: seed = 3', 'for seed in range(3): pass', 'if seed: bias = True', 'if bias:', 'else:', '    seed = 1',
    'del seed', 'seed: int', 'seed += 1', '(seed := 4)', 'with open(__file__) as f: pass', 'raise ValueError("a\\nb")',
    'raise', 'raise KeyError', 'return 3', 'yield', 'await x', 'print("hello")', '"', '(', '\\', '# seed',
    'seed = [seed for seed in (1, 2)]', 'raise SystemExit(3)', 'global seed', 'batch_size, seed = 3, 4',
    'exec("seed = 6")', 'exec("(")', 'assert bias', 'from __future__ import annotations', 'match seed:',
    'seed = int("9" * 5000)', 'try: 1 / 0', 'except Exception: pass', 'raise Exception("\\udcff")']


def misspell(text, rng):
    """One to three random edits."""
    letters = list(text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(letters))
        letters[at:at + rng.randint(0, 2)] = rng.choices(LETTERS, k=rng.randint(0, 2))
    return ''.join(letters)


def test_any_command_line(folder):
    def word():
        name, text = rng.choice(NAMES), rng.choice(TEXTS)
        text = misspell(text, rng) if rng.random() < 0.3 else text
        word = rng.choice([f'--{name}={text}', f'--{name}={text}', f'--{name}', name, text, f'{name}={text}',
                           f'-{name}={text}', rng.choice(WORDS)])
        return misspell(word, rng) if rng.random() < 0.3 else word

    ended = 0
    for case in range(3000):
        rng = random.Random(case)
        config = configure(folder, *(word() for _ in range(rng.randint(0, 4))), body='')
        ended += config is None
    assert 1000 < ended < 2900  # both outcomes are met


def test_any_config_file(folder):
    ended = 0
    for case in range(2000):
        rng = random.Random(case)
        names = [*OPTIONS, 'gpus', 'batchsize', '_x', 'größe']
        body = '\n'.join(rng.choice(STATEMENTS) if rng.random() < 0.4 else
                         f'{rng.choice(names)} = {rng.choice(VALUES_IN_A_CONFIG)}' for _ in range(rng.randint(1, 4)))
        body = misspell(body, rng) if rng.random() < 0.3 else body
        ended += configure(folder, 'my.py', body=body) is None
    assert 600 < ended < 1900


def test_any_text_as_config_file(folder):
    for case in range(1000):
        rng = random.Random(case)
        configure(folder, 'my.py', body=''.join(rng.choices(LETTERS + string.digits, k=rng.randint(1, 8))))


@settings(max_examples=100, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=20), st.integers(), st.floats(allow_nan=False), st.booleans())
def test_any_value_arrives(folder, text, number, real, truth):
    values = dict(start=text, seed=number, learning_rate=real, bias=truth)
    assert configure(folder, *(f'--{key}={value}' for key, value in values.items())) == {**OPTIONS, **values}
    body = ''.join(f'{key} = {value!a}\n' for key, value in values.items() if key != 'learning_rate')
    assert configure(folder, 'my.py', f'--learning_rate={real}', body=body) == {**OPTIONS, **values}
