"""
Knobs from config files and the command line. Not imported: a script executes this file in its own namespace,

    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

after it has assigned its knobs, and they change in place. A knob is a module-level name, without a leading
underscore, whose value is a bool, int, float or str; the type of its default is its type.

    python train.py config/some.py --batch_size=32 --compile false       left to right, the later wins
    python train.py --help                                               every knob, its default, what it does

It leaves two names in the script: `config`, the dict of all knobs as given, and `fail(*problems)`, the one way
out for a user's mistake: a line per problem on stderr, exit code 2.
"""


def _configure(space):
    """Apply sys.argv to the knobs in the namespace `space`; return (config, fail)."""
    import ast
    import builtins  # a script's own knob may be called `compile`; in here that must stay the function
    import difflib
    import io
    import numbers
    import os
    import re
    import sys
    import time
    import tokenize
    import traceback

    script = os.path.abspath(space['__file__'])
    first_rank = os.environ.get('RANK', '0') == '0'
    scalars = (bool, int, float, str)
    knobs = {k: v for k, v in space.items() if k[0] != '_' and isinstance(v, scalars)}
    problems = []
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that lacks a character ends no run

    def fail(*problems):
        """End the script for a user's mistake: one line per problem on stderr (rank 0 alone), exit code 2."""
        for problem in problems if first_rank else ():
            print(f'{os.path.basename(script)}: {problem}', file=sys.stderr)
        sys.stdout.flush()
        if not first_rank:
            time.sleep(1)  # torchrun ends all ranks as soon as one ends: the first must have spoken by then
        sys.exit(2)

    def nearest(name, cutoff):
        close = difflib.get_close_matches(name, knobs, n=1, cutoff=cutoff)
        return close[0] if close else next((k for k in knobs if one_edit(name, k)), None)

    def one_edit(a, b):
        """Whether one insertion, deletion, substitution or swap of neighbours turns a into b."""
        if len(b) < 3:  # a name of one or two letters is one edit from everything
            return False
        i = next((i for i, (p, q) in enumerate(zip(a, b)) if p != q), min(len(a), len(b)))
        return (a[i + 1:] == b[i + 1:] or a[i + 1:] == b[i:] or a[i:] == b[i + 1:]
                or (a[i:i + 2] == b[i:i + 2][::-1] and a[i + 2:] == b[i + 2:]))

    def convert(key, value):
        """`value`, text of the command line or an object of a config file, in the type of the knob. ValueError."""
        kind = type(knobs[key])
        text = value if isinstance(value, str) else None
        try:
            if kind is str and text is not None:
                return str(text)
            if kind is bool and isinstance(value, bool):
                return value
            if kind is bool and text is not None and text.lower() in ('true', 'false'):
                return text.lower() == 'true'
            if kind is int and (value is None or text == 'None'):
                return 0  # top_k=None: off
            if kind in (int, float) and not isinstance(value, bool):
                if text is not None:
                    try:
                        value = int(text)
                    except ValueError:
                        value = float(text)
                if kind is float and isinstance(value, numbers.Real):
                    return float(value)
                if isinstance(value, numbers.Real) and value == int(value):
                    return int(value)
        except (ValueError, OverflowError):
            pass
        wants = {bool: 'True or False', int: 'an int', float: 'a float', str: 'a str'}[kind]
        raise ValueError(f'{key}={shown(value if text is None else text)}: {key} takes {wants}')

    def shown(value):
        text = value if isinstance(value, str) else repr(value)
        text = text.encode('unicode_escape').decode('ascii') if not text.isprintable() else text
        return text if len(text) <= 80 else text[:77] + '...'

    def put(key, value):
        knobs[key] = value
        if first_rank:
            print(f'Overriding: {key} = {value}')

    def run_file(name):
        """Execute a config file with the knobs in scope and take over what it assigned."""
        here = next((p for p in (name, os.path.join(os.path.dirname(script), name)) if os.path.isfile(p)), None)
        if here is None:
            if '=' in name and name.split('=')[0] in knobs:
                return problems.append(f'{shown(name)}: write --{shown(name)}')
            knob = nearest(name, 0.85)
            hint = f'; a knob is set with --{knob}=value' if knob else '; knobs are written --key=value'
            return problems.append(f'{shown(name)}: no such config file{hint}')
        scope = {**knobs, '__file__': os.path.abspath(here), '__name__': 'config'}
        try:
            with open(here, encoding='utf-8-sig') as f:
                source = f.read()
            tree = ast.parse(source, here)
            exec(builtins.compile(tree, here, 'exec'), scope)
        except (Exception, SystemExit) as e:
            lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == here]
            line = e.lineno if isinstance(e, SyntaxError) and e.filename == here else lines[-1] if lines else 1
            what = e.msg if isinstance(e, SyntaxError) else str(e)
            return problems.append(f'{name}, line {line}: {type(e).__name__}: {shown(what)}')
        line_of = {node.id: node.lineno for node in ast.walk(tree)
                   if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        for key, value in scope.items():
            where = f'{name}, line {line_of.get(key, 1)}'
            if key in knobs:
                if key not in line_of and value is knobs[key]:
                    continue
                try:
                    put(key, convert(key, value))
                except ValueError as e:
                    problems.append(f'{where}: {e}')
            elif key[0] != '_' and not callable(value) and not isinstance(value, type(sys)):
                if nearest(key, 0.85):
                    problems.append(f'{where}: unknown knob {key}, did you mean {nearest(key, 0.85)}?')
                elif first_rank:
                    print(f'note: {where}: {key} is no knob of {os.path.basename(script)}, ignored')

    def show_help():
        """The script's docstring, then its knobs with defaults and comments, read from its source."""
        with open(script, encoding='utf-8') as f:
            source = f.read()
        comments = {t.start[0]: t.string.lstrip('# ') for t in tokenize.generate_tokens(io.StringIO(source).readline)
                    if t.type == tokenize.COMMENT}
        tree = ast.parse(source)
        lines = [f'{(ast.get_docstring(tree) or script).strip()}\n\nKnobs, set by --key=value or in a config file:\n']
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in knobs:
                key = node.targets[0].id
                lines.append(f'  {f"--{key}={knobs[key]!r}":40} {comments.get(node.lineno, "")}'.rstrip())
        try:
            print('\n'.join(lines), flush=True)
        except BrokenPipeError:  # `--help | head` has seen enough; Python's own last flush must not complain either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

    words = sys.argv[1:]
    if any(w == '--help' or (w == '-h' and not re.fullmatch('--[^=]+', p)) for p, w in zip(['', *words], words)):
        show_help()
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            run_file(word)
            continue
        key, equals, text = word[2:].partition('=')
        if not equals and words and not words[0].startswith('--'):
            equals, text = ' ', words.pop(0)
        if key not in knobs:
            near = nearest(key, 0.6)
            hint = f'did you mean --{near}?' if near else '--help lists them'
            problems.append(f'unknown knob --{shown(key)}; {hint}')
        elif not equals:
            problems.append(f'--{key} needs a value: --{key}={shown(type(knobs[key]) is bool or knobs[key])}')
        else:
            try:
                put(key, convert(key, text))
            except ValueError as e:
                problems.append(f'--{e}')
    if problems:
        fail(*problems)
    space.update(knobs)
    return dict(knobs), fail


config, fail = _configure(globals())
del _configure
