"""
Options from config files and the command line. Not imported: a script executes this file in its own namespace,

    exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), 'configurator.py'), encoding='utf-8').read())

after it has assigned its options, and they change in place. An option is a module-level name without a leading
underscore whose value is a bool, int, float or str; the type of its default is its type.

    python train.py config/some.py --batch_size=32 --compile false       left to right, the later wins
    python train.py --help                                               every option, its default, what it does

It leaves `config`, the dict of all options as given, and functions to check them, which stand first below. `fail` is
the one way out for a user's mistake: a line per problem on stderr, exit code 2.
"""

import ast
import builtins  # a script's own option may be called `compile`; below, that must stay the function
import difflib
import numbers
import os
import re
import sys
import time
import tokenize
import traceback

_script, _first_rank = os.path.realpath(__file__), os.environ.get('RANK', '') in ('', '0')
_mistakes, _BOOLS = [], {'true': True, 'false': False, '1': True, '0': False}
_USUAL = {'lr': 'learning_rate', 'wd': 'weight_decay', 'iters': 'max_iters', 'epochs': 'max_iters'}  # elsewhere


# -- for the script to use ------------------------------------------------------------------------------------------

def fail(*problems):
    """End the script for a user's mistake: one line per problem on stderr, exit code 2."""
    who = os.path.basename(_script) + ('' if _first_rank else f', rank {os.environ["RANK"]}')
    time.sleep(0 if _first_rank else 2)  # torchrun ends all as soon as one ends: what the first met, too, it has said
    print(*(f'{who}: {problem}' for problem in problems), sep='\n', file=sys.stderr)
    sys.exit(2)


def end_if_wrong():
    """Fail with all mistakes noted so far, if there are any."""
    if _mistakes:
        fail(*_mistakes)


def need(right, message):
    """Note a mistake unless something is right."""
    if not right:
        _mistakes.append(message)


def at_least(least, *names):
    """Note each of these options that is smaller than `least`, or not finite."""
    for name in names:
        finite = 'finite and ' if isinstance(config[name], float) else ''
        need(least <= config[name] < float('inf'), f'{name}={config[name]} must be {finite}at least {least}')


def note_mistakes(kind, **arguments):
    """Note what kind(**arguments) has to say against them: the arguments of its ValueError."""
    try:
        kind(**arguments)
    except ValueError as e:
        _mistakes.extend(e.args)


def resolve(device: str, dtype: str) -> tuple[str, str]:
    """What 'auto' means on this machine: the device is cuda, else mps, else cpu; the dtype is bfloat16 where the device
    computes in it natively, float16 on other CUDA cards, float32 elsewhere. Notes what cannot be had here."""
    import torch
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    device = next(kind for kind in there if there[kind]) if device == 'auto' else device
    kind, _, number = device.partition(':')
    if kind not in there:
        need(False, f'device={device}: choose auto, cpu, cuda, cuda:N or mps')
    elif not there[kind]:
        need(False, f'device={device} is not available here; try --device=auto or --device=cpu')
    elif ':' in device:
        need(kind == 'cuda' and number.isdecimal() and int(number) < torch.cuda.device_count(),
             f'device={device}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0')
    need(dtype in ('auto', 'float32', 'bfloat16', 'float16'),
         f'dtype={dtype}: choose auto, float32, bfloat16 or float16')
    need(dtype != 'float16' or kind not in ('cpu', 'mps'),
         f'dtype=float16 needs CUDA, device is {device}; try --dtype=auto')
    if dtype == 'auto' and kind == 'cuda' and there['cuda']:
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':
        native = kind == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        dtype = 'bfloat16' if native else 'float32'
    return device, dtype


def free_memory(device: str) -> int:
    """Bytes that are free on a device; on a CPU an estimate, and no limit where the system does not tell."""
    if device.startswith('cuda'):
        import torch
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open('/proc/meminfo', encoding='ascii') as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):  # not Linux
        return 1 << 62


# -- reading options ------------------------------------------------------------------------------------------------

def _nearest(name, cutoff):
    close = difflib.get_close_matches(name, config, n=1, cutoff=cutoff) or [k for k in config if _one_edit(name, k)]
    return close[0] if close else None


def _one_edit(a, b):
    """Whether one insertion, deletion, substitution or swap of neighbours turns a into b."""
    i = next((i for i, (p, q) in enumerate(zip(a, b)) if p != q), min(len(a), len(b)))
    swapped = a[i:i + 2] == b[i:i + 2][::-1] and a[i + 2:] == b[i + 2:]
    return len(b) > 2 and (swapped or a[i:] == b[i + 1:] or a[i + 1:] in (b[i + 1:], b[i:]))  # 'a' is near to all


def _convert(key, value):
    """`value`, text of the command line or an object of a config file, in the type of the option. ValueError."""
    kind = type(config[key])
    text = value if isinstance(value, str) else None
    try:
        if kind is str and text is not None:
            return str(text)
        if kind is bool and (type(value) in (bool, int) and value in (0, 1) or (text or '').lower() in _BOOLS):
            return bool(value) if text is None else _BOOLS[text.lower()]
        if kind is int and (value is None or text == 'None'):
            return 0  # top_k=None: off
        if kind in (int, float) and not isinstance(value, bool):
            if text is not None:
                try:
                    value = int(text)
                except ValueError:
                    value = float(text)
            if isinstance(value, numbers.Real) and (kind is float or value == int(value)):
                return kind(value)
    except (ValueError, OverflowError):
        pass
    wants = {bool: 'True or False', int: 'an int', float: 'a float', str: 'a str'}[kind]
    raise ValueError(f'{key}={_shown(value if text is None else text)}: {key} takes {wants}')


def _shown(value):
    """A value as part of a message: one line, and not too long."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode('unicode_escape').decode('ascii') if not text.isprintable() else text
    return text if len(text) <= 80 else text[:77] + '...'


def _put(key, value):
    config[key] = value
    if _first_rank:
        print(f'Overriding: {key} = {value}')


def _run_file(name):
    """Execute a config file with the options in scope and take over what it assigned."""
    path = next((p for p in (name, os.path.join(os.path.dirname(_script), name)) if os.path.isfile(p)), None)
    if path is None:
        if '=' in name and name.split('=')[0] in config:
            return need(False, f'{_shown(name)}: write --{_shown(name)}')
        option, there = _nearest(name, 0.85), os.path.join('config', name)
        hint = f'; an option is set with --{option}=value' if option else '; options are written --key=value'
        hint = f'; did you mean {there}?' if os.path.isfile(os.path.join(os.path.dirname(_script), there)) else hint
        return need(False, f'{_shown(name)}: no such config file{hint}')
    if name.endswith(('.yaml', '.yml', '.json', '.toml')):
        return need(False, f'{_shown(name)}: a config file is Python, with a line for each option: batch_size = 12')
    scope = {**config, '__file__': os.path.abspath(path), '__name__': 'config'}
    try:
        with open(path, encoding='utf-8-sig') as f:
            tree = ast.parse(f.read(), path)
        exec(builtins.compile(tree, path, 'exec'), scope)
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) and e.filename == path else lines[-1] if lines else 1
        what = _shown(e.msg if isinstance(e, SyntaxError) else str(e))
        return need(False, f'{name}, line {line}: {type(e).__name__}: {what}')
    if _first_rank and any('__main__' in ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)):
        print(f'note: {name}: a config file is not run as __main__, what stands under that is skipped')
    line_of = {node.id: node.lineno for node in ast.walk(tree)
               if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for key, value in scope.items():
        where = f'{name}, line {line_of.get(key, 1)}'
        if key in config and (key in line_of or value is not config[key]):
            try:
                _put(key, _convert(key, value))
            except ValueError as e:
                need(False, f'{where}: {e}')
        elif key not in config and key[0] != '_' and not callable(value) and not isinstance(value, type(sys)):
            if not isinstance(value, (tuple, list, dict)) and (near := _nearest(key, 0.85)):
                need(False, f'{where}: unknown option {key}, did you mean {near}?')
            elif _first_rank:
                print(f'note: {where}: {key} is no option of {os.path.basename(_script)}, ignored')


def _run_words(words):
    """Take over the command line: config files, --key=value, --key value."""
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            _run_file(word)
            continue
        key, equals, text = word[2:].partition('=')
        if not equals and words and not words[0].startswith('--'):
            equals, text = ' ', words.pop(0)
        if key not in config:
            near = _USUAL[key] if _USUAL.get(key) in config else _nearest(key, 0.6)
            need(False, f'unknown option --{_shown(key)}; {f"did you mean --{near}?" if near else "--help lists them"}')
        elif not equals:
            need(False, f'--{key} needs a value: --{key}={_shown(type(config[key]) is bool or config[key])}')
        else:
            try:
                _put(key, _convert(key, text))
            except ValueError as e:
                need(False, f'--{e}')


def _show_help():
    """Print the script's docstring, then its options with defaults and comments, read from its source; and end."""
    with open(_script, encoding='utf-8') as f:
        lines = f.readlines()
    comments = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(iter(lines).__next__)
                if t.type == tokenize.COMMENT}
    tree = ast.parse(''.join(lines))
    text = [f'{(ast.get_docstring(tree) or _script).strip()}\n\nOptions, set by --key=value or in a config file:\n']
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in config:
            key = node.targets[0].id
            text.append(f'  {f"--{key}={config[key]!r}":40} {comments.get(node.lineno, "")}'.rstrip())
    try:
        print('\n'.join(text), flush=True)
    except BrokenPipeError:  # `--help | head` has seen enough; Python's own last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


config = {_key: _value for _key, _value in globals().items()
          if _key[0] != '_' and isinstance(_value, (bool, int, float, str))}
if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)  # any character anywhere, each line at once
if any(_word == '--help' or (_word == '-h' and not re.fullmatch('--[^=]+', _before))
       for _before, _word in zip(['', *sys.argv[1:]], sys.argv[1:])):
    _show_help()
_run_words(sys.argv[1:])
end_if_wrong()
config.update({_k: os.path.expanduser(config[_k]) for _k in {*config} & {'out_dir', 'dataset', 'init_from', 'to'}})
globals().update(config)
