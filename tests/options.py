"""
Write the tables of options in config/README.md, as the scripts themselves know them:

    python tests/options.py
"""

import argparse
import ast
import contextlib
import io
import os
import re
import runpy
import sys
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = os.path.join(ROOT, 'config', 'README.md')
GROUPS = {  # the options of train.py; those of other scripts that are called the same belong there, too
    'model': 'n_layer n_head n_embd block_size dropout bias vocab_size',
    'data and batches': 'dataset batch_size gradient_accumulation_steps real_data',
    'training': 'init_from max_iters learning_rate decay_lr warmup_iters lr_decay_iters min_lr weight_decay beta1 '
                'beta2 grad_clip seed deterministic',
    'evaluation, files, logs': 'out_dir eval_interval eval_iters eval_only always_save_checkpoint log_interval '
                               'wandb_log wandb_project wandb_run_name to',
    'system': 'device dtype compile backend shard recompute',
    'text': 'start num_samples max_new_tokens temperature top_k top_p stop stream',
    'what is timed': 'mode steps warmup_steps profile compare without prompt_tokens estimate gpu',
}


def of_script(name: str) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each option that `--help` of a script lists. Runs no more of it than its options."""
    path = os.path.join(ROOT, name)
    with open(path, encoding='utf-8') as f:
        body = ast.parse(f.read()).body
    end = next(i for i, node in enumerate(body) if 'configurator.py' in ast.unparse(node))
    head = ast.Module([node for node in body[:end + 1] if isinstance(node, ast.Assign | ast.Expr)], [])
    with (contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit),
          mock.patch.object(sys, 'argv', [name, '--help'])):
        exec(compile(head, path, 'exec'), {'os': os, '__file__': path})
    return re.findall(r"^  --(\w+)=('.*?'(?= {2}|$)|\S+) *(.*)$", said.getvalue(), re.MULTILINE)


def of_parser(name: str) -> list[tuple[str, str, str, str]]:
    """The same of a script that uses argparse, and the type; arguments without a name in capitals."""
    with mock.patch.object(argparse.ArgumentParser, 'parse_args', autospec=True, side_effect=StopIteration) as parse:
        try:
            runpy.run_path(os.path.join(ROOT, name), run_name='__main__')
        except StopIteration:
            pass
    actions = [a for a in parse.call_args.args[0]._actions if a.dest != 'help']
    return [(a.dest if a.option_strings else a.dest.upper(), '' if a.default is None else repr(a.default), a.help,
             ' or '.join(a.choices) if a.choices else (a.type or str).__name__) for a in actions]


def table(options: list[tuple[str, ...]]) -> list[str]:
    def row(key, default, meaning, kind=None):
        kind = kind or type(ast.literal_eval(default)).__name__
        return f'| `{key}` | {kind} | {f"`{default}`" if default else ""} | {meaning.replace("|", "&#124;")} |'
    return ['| option | type | default | meaning |', '|---|---|---|---|', *(row(*option) for option in options), '']


def text() -> str:
    """All tables, in markdown."""
    lines = []
    for script in ('train.py', 'sample.py', 'bench.py', 'export.py'):
        options, lines = of_script(script), [*lines, f'### {script}', '']
        for group, names in GROUPS.items():
            if found := [option for option in options if option[0] in names.split()]:
                lines += [f'{group.capitalize()}:', '', *table(found)]
        assert (rest := {key for key, *_ in options} - set(' '.join(GROUPS.values()).split())) == set(), rest
    for script in ('data/prepare.py', 'data/runlog.py'):
        lines += [f'### {script}', '', *table(of_parser(script))]
    return '\n'.join(lines)


def renewed(readme: str) -> str:
    """The README with these tables between its two marks."""
    marks = r'(<!-- python tests/options.py -->\n\n).*(<!-- end -->)'
    return re.sub(marks, lambda m: m[1] + text() + '\n' + m[2], readme, flags=re.DOTALL)


if __name__ == '__main__':
    with open(README, encoding='utf-8') as f:
        new = renewed(f.read())
    with open(README, 'w', encoding='utf-8') as f:
        f.write(new)
