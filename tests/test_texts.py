"""What the README files say of the code is so: names, options, places, lengths."""

import ast
import functools
import glob
import os
import re

import pytest
import torch

from tests import options
from tests.conftest import ROOT

IDEAS = """transformer, attention, multi-head, causal mask, flash attention, embeddings, positional encoding, MLP, GELU,
LayerNorm, objective, cross-entropy, AdamW, weight decay groups, schedule, accumulation, clipping, DDP, process
coordination, BPE, vocabulary, memory mapping, bins, batches, split, sampling, temperature, top-k, top-p, KV cache,
compilation, device, config files, overrides, type checks, initialisation, mixed precision, memory, checkpoint, resume,
pretrained loading""".replace('\n', ' ').split(', ')
NEW = {'peft', 'enable_gqa=True'}
READMES = ('README.md', 'tests/README.md', 'config/README.md')


def read(path: str) -> str:
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def section(path: str, title: str) -> str:
    return re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', read(path), re.DOTALL | re.MULTILINE)[1]


@functools.cache
def names_in(path: str) -> set[str]:
    """What a file defines, methods as Class.method, and every name and attribute that it uses."""
    tree = ast.parse(read(path))
    found = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))}
    kinds = ast.ClassDef, ast.FunctionDef
    found |= {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    return found | {f'{c.name}.{f.name}' for c in tree.body if isinstance(c, ast.ClassDef)
                    for f in c.body if isinstance(f, kinds)}


def test_every_idea_has_its_place():
    rows = re.findall(r'^\| ([^|`]+) \| (\S+\.py) \| (.+) \|$', section('tests/README.md', 'Where each idea stands'),
                      re.MULTILINE)
    ideas = [idea for cell, _, _ in rows for idea in re.split(', |: | of ', cell)]
    assert [idea for idea in IDEAS if idea not in ideas] == []
    for idea, path, names in rows:
        assert (found := re.findall('`(.+?)`', names)), idea
        assert [name for name in found if name not in names_in(path)] == [], (idea, path)


def test_where_would_it_go_names_what_is_there():
    known = names_in('model.py')
    names = re.findall(r'`([\w.]+)`', section('tests/README.md', 'Where would it go'))
    assert len(names) > 15
    for name in names:
        path = name.replace('nn.', 'torch.nn.').split('.')[1:] if name.startswith(('nn.', 'torch.')) else None
        there = functools.reduce(lambda a, b: getattr(a, b, None), path, torch) if path else name in known
        assert there or name in NEW or any(k.endswith(f'.{name}') for k in known), name


def test_the_tables_of_options_are_those_of_the_scripts():
    readme = read('config/README.md')
    assert options.renewed(readme) == readme, 'run python tests/options.py'
    assert '| `learning_rate` | float | `0.0006` |' in readme and '| `num_proc` |' in readme
    assert re.findall(r'^\| `\w+` \|.*\|  \|$', readme, re.MULTILINE) == [], 'options without a meaning'


def test_words():
    rows = re.findall(r'^\| [^|]+ \| [^|]+ \|$', section('config/README.md', 'Words'), re.MULTILINE)
    assert 20 <= len(rows) - 1 <= 30


@pytest.mark.parametrize('path', READMES)
def test_links_lead_somewhere(path):
    text = read(path)
    for target in re.findall(r'\]\(([^)]+)\)', text.replace('\n', ' ')) + re.findall(r'src="([^"]+)"', text):
        file, _, anchor = target.partition('#')
        if file.startswith('http'):
            continue
        file = os.path.normpath(os.path.join(os.path.dirname(path), file)) if file else path
        assert os.path.exists(os.path.join(ROOT, file)), target
        if anchor:
            titles = re.findall(r'^#+ (.+)$', read(file), re.MULTILINE)
            assert anchor in [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles], target


@pytest.mark.parametrize('path', READMES)
def test_files_that_are_named_are_there(path):
    there = {os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, '**', '*.py'), recursive=True)}
    endings = {os.path.basename(p) for p in there}
    named = set(re.findall(r'(?<![\w/.<-])((?:config|data|tests)/[\w/]+\.py|(?:train|model|fast|sample|bench|export|'
                           r'configurator|test_\w+)\.py)', read(path)))
    assert named and [n for n in named if n not in there and n not in endings] == []


def test_readme_is_a_page():
    text = read('README.md')
    assert text.count('\n') <= 220 and len(text.split()) <= 2200
