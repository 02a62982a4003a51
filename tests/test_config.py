"""The options of every script, frozen, so that none appears unnoticed; and what every file in config/ sets."""

import ast
import glob
import math
import os
import re
import sys

import pytest

from tests.conftest import ROOT

GPT2 = dict(n_layer=12, n_head=12, n_embd=768)
TRAIN = dict(
    out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
    init_from='scratch', wandb_log=False, wandb_project='owt', wandb_run_name='gpt2', dataset='openwebtext',
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, **GPT2, dropout=0.0, bias=False,
    learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
    warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='auto', device='auto', dtype='auto', compile=True,
    shard=False, recompute=False, seed=1337, deterministic=False)
SAMPLE = dict(
    init_from='resume', out_dir='out', start='\n', num_samples=10, max_new_tokens=500, temperature=0.8, top_k=200,
    top_p=1.0, stop='', stream=False,
    seed=1337, device='auto', dtype='auto', compile=False)
BENCH = dict(
    mode='train', batch_size=12, block_size=1024, bias=False, real_data=True, seed=1337, device='auto', dtype='auto',
    compile=True, profile=False, without='', estimate=False, gpu='H200',
    compare=False, dataset='openwebtext', **GPT2, dropout=0.0,
    shard=False, recompute=False, deterministic=False, gradient_accumulation_steps=1, warmup_steps=10, steps=20,
    prompt_tokens=16, max_new_tokens=256, top_k=200, vocab_size=50304)
SCRIPTS = {'train.py': TRAIN, 'sample.py': SAMPLE, 'bench.py': BENCH}


@pytest.fixture
def options(monkeypatch, tmp_path):
    """options('train.py', *arguments): `config` after the script's head, down to the configurator's line."""
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.chdir(tmp_path)

    def execute(name, *arguments):
        path = os.path.join(ROOT, name)
        with open(path, encoding='utf-8') as f:
            source = f.read()
        head = source[:source.index('\n', source.index("'configurator.py'"))]
        monkeypatch.setattr(sys, 'argv', [name, *arguments])
        space = {'__file__': path, '__name__': '__main__'}
        exec(compile(head, path, 'exec'), space)
        assert all(space[k] is v or space[k] == v for k, v in space['config'].items())
        return space['config']

    return execute


def typed(values):
    return {key: (type(value), value) for key, value in values.items()}


# -- the scripts ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SCRIPTS)
def test_options_defaults_and_types(options, name):
    """A new option is a decision: it is added here too."""
    assert typed(options(name)) == typed(SCRIPTS[name])
    assert list(options(name)) == list(SCRIPTS[name])  # in the order of --help


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_lists_every_option(script, capsys, name):
    with pytest.raises(SystemExit) as end:
        script(name, '--help')
    assert end.value.code == 0
    out, err = capsys.readouterr()
    listed = re.findall(r"^  --(\w+)=('[^']*'|\S+)", out, re.MULTILINE)
    assert len(listed) == len(SCRIPTS[name])
    assert typed({key: ast.literal_eval(value) for key, value in listed}) == typed(SCRIPTS[name])
    assert f'    python {name}' in out and err == ''


def test_sample_and_bench_mean_the_same_by_a_option_as_train():
    for name in ('sample.py', 'bench.py'):
        for key in TRAIN.keys() & SCRIPTS[name].keys():
            assert type(SCRIPTS[name][key]) is type(TRAIN[key])
    assert {k for k in BENCH if k in TRAIN and BENCH[k] != TRAIN[k]} == {'gradient_accumulation_steps'}
    assert {k for k in SAMPLE if k in TRAIN and SAMPLE[k] != TRAIN[k]} == {'init_from', 'compile'}


@pytest.mark.parametrize('arguments, values', [
    (['--batch_size=32', '--compile=False'], dict(batch_size=32, compile=False)),
    (['--learning_rate=1', '--min_lr=0'], dict(learning_rate=1.0, min_lr=0.0)),
    (['--seed=1e3', '--max_iters', '2e4'], dict(seed=1000, max_iters=20000)),
    (['--compile=false', '--eval_only', 'TRUE'], dict(compile=False, eval_only=True)),
])
def test_train_command_lines(options, arguments, values):
    assert typed(options('train.py', *arguments)) == typed({**TRAIN, **values})


@pytest.mark.parametrize('arguments, values', [
    (['--out_dir=out-shakespeare-char'], dict(out_dir='out-shakespeare-char')),
    (['--init_from=gpt2-xl', '--start=What is the answer to life, the universe, and everything?', '--num_samples=5',
      '--max_new_tokens=100'],
     dict(init_from='gpt2-xl', start='What is the answer to life, the universe, and everything?', num_samples=5,
          max_new_tokens=100)),
    (['--start=FILE:prompt.txt'], dict(start='FILE:prompt.txt')),
    (['--start=42', '--top_k=None', '--temperature=1'], dict(start='42', top_k=0, temperature=1.0)),
    (['--start=a=b'], dict(start='a=b')),
    (['--start='], dict(start='')),
    (['--start', '<|endoftext|>'], dict(start='<|endoftext|>')),
])
def test_sample_command_lines(options, arguments, values):
    assert typed(options('sample.py', *arguments)) == typed({**SAMPLE, **values})


def test_bench_command_line(options):
    assert typed(options('bench.py', '--profile=True')) == typed({**BENCH, 'profile': True})


# -- config/ --------------------------------------------------------------------------------------------------------

EVAL = dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False)
LAPTOP = dict(eval_iters=20, log_interval=1, block_size=64, batch_size=12, n_layer=4, n_head=4, n_embd=128,
              max_iters=2000, lr_decay_iters=2000, dropout=0.0, device='cpu', compile=False)  # the README's flags
BABY = dict(
    out_dir='out-shakespeare-char', eval_interval=250, eval_iters=200, log_interval=10, always_save_checkpoint=False,
    wandb_project='shakespeare-char', wandb_run_name='mini-gpt', dataset='shakespeare_char',
    gradient_accumulation_steps=1, batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
    learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100)
CONFIGS = {  # what differs from the defaults of train.py; all else stays
    'train_shakespeare_char': BABY,
    'train_shakespeare_char_cpu': {
        **BABY, **LAPTOP, 'out_dir': 'out-shakespeare-char-cpu', 'wandb_run_name': 'tiny-cpu'},
    'train_pydoc_char': {
        **BABY, **LAPTOP, 'out_dir': 'out-pydoc-char', 'dataset': 'pydoc_char', 'wandb_project': 'pydoc-char',
        'wandb_run_name': 'tiny', 'log_interval': 10, 'max_iters': 1000, 'lr_decay_iters': 1000, 'warmup_iters': 50,
        'learning_rate': 4e-3, 'device': 'auto'},
    'train_gpt2': dict(
        wandb_log=True, wandb_project='owt', wandb_run_name='gpt2-124M', batch_size=12, block_size=1024,
        gradient_accumulation_steps=40, max_iters=600000, lr_decay_iters=600000, eval_interval=1000, eval_iters=200,
        log_interval=10, weight_decay=1e-1),
    'finetune_shakespeare': dict(
        out_dir='out-shakespeare', eval_interval=5, eval_iters=40, wandb_project='shakespeare', dataset='shakespeare',
        init_from='gpt2-xl', always_save_checkpoint=False, batch_size=1, gradient_accumulation_steps=32, max_iters=20,
        learning_rate=3e-5, decay_lr=False),
    'eval_gpt2': dict(EVAL, init_from='gpt2'),
    'eval_gpt2_medium': dict(EVAL, init_from='gpt2-medium'),
    'eval_gpt2_large': dict(EVAL, init_from='gpt2-large'),
    'eval_gpt2_xl': dict(EVAL, init_from='gpt2-xl'),
}
OURS = ('train_shakespeare_char_cpu', 'train_pydoc_char')
FILES = sorted(os.path.basename(path).removesuffix('.py') for path in glob.glob(os.path.join(ROOT, 'config', '*.py')))


def test_every_config_is_listed_here():
    assert [name for name in FILES if not name.startswith('__')] == sorted(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_values(options, capsys, name):
    """The whole of `config` is compared, so a config also sets nothing else."""
    config = options('train.py', f'config/{name}.py')
    if name == 'finetune_shakespeare':
        assert re.fullmatch(r'ft-\d+(\.\d+)?', config['wandb_run_name'])
        config['wandb_run_name'] = TRAIN['wandb_run_name']
    assert typed(config) == typed({**TRAIN, **CONFIGS[name]})
    out, err = capsys.readouterr()
    assert 'note:' not in out and err == ''


@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in OURS])
def test_config_writes_out_what_the_reference_lists(name, options, capsys):
    """Also a value that is equal to its default."""
    options('train.py', f'config/{name}.py')
    assert CONFIGS[name].keys() <= set(re.findall('^Overriding: (\\w+) = ', capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize('name', CONFIGS)
def test_config_header_names_its_command(name):
    with open(os.path.join(ROOT, 'config', f'{name}.py'), encoding='utf-8') as f:
        source = f.read()
    header = source[:source.index('\n\n')].splitlines()
    assert all(line.startswith('# ') for line in header)
    command, = [line for line in header if f'train.py config/{name}.py' in line]
    assert re.match('#   (torchrun |python )', command)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_knows_its_dataset(options, name):
    assert os.path.isfile(os.path.join(ROOT, 'data', options('train.py', f'config/{name}.py')['dataset'], 'prepare.py'))


def test_laptop_config_is_the_command_of_the_readme(options):
    flags = [f'--{key}={value}' for key, value in LAPTOP.items()]
    typed_out = options('train.py', 'config/train_shakespeare_char.py', *flags)
    config = options('train.py', 'config/train_shakespeare_char_cpu.py')
    assert {k for k in config if config[k] != typed_out[k]} == {'out_dir', 'wandb_run_name'}


def test_gpt2_config_is_half_a_million_tokens_a_step(options):
    config = options('train.py', 'config/train_gpt2.py')
    assert config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps'] == 491_520


def test_micro_steps_of_every_torchrun_command_divide(options):
    commands = []
    for name in ('README.md', 'train.py'):
        with open(os.path.join(ROOT, name), encoding='utf-8') as f:
            commands += re.findall(r'^ +(torchrun .*?train\.py[^#\n]*)', f.read(), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        launch, _, arguments = command.partition('train.py')
        processes = math.prod(map(int, re.findall(r'--(?:nproc_per_node|nnodes)=(\d+)', launch)))
        config = options('train.py', *arguments.split())
        assert config['gradient_accumulation_steps'] % processes == 0, command
        assert config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps'] == 491_520


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('other', ['sample.py', 'bench.py'])
def test_config_is_no_mistake_for_another_script(options, capsys, name, other):
    """What that script does not have is a note; what it has is taken over."""
    config = options(other, f'config/{name}.py')
    wanted = {**SCRIPTS[other], **{k: v for k, v in CONFIGS[name].items() if k in SCRIPTS[other]}}
    assert typed(config) == typed(wanted)
    strangers = {k for k in CONFIGS[name] if k not in wanted}
    notes = re.findall(rf'^note: config/{name}.py, line \d+: (\w+) is no option of {other}, ignored$',
                       capsys.readouterr().out, re.MULTILINE)
    assert strangers <= {*notes, *TRAIN} and set(notes) <= TRAIN.keys() - wanted.keys()
