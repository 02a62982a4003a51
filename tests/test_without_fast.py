"""Without fast.py everything still works, and gives the same numbers."""

import os
import re
import shutil
import sys

import pytest

from .conftest import ROOT, TINY, flags, run

LOSS = re.compile(r'loss (\d+\.\d{4})')


@pytest.fixture(scope='module')
def copy(tmp_path_factory) -> str:
    """The sources of this repo, but for fast.py and the tests that are about it."""
    folder = str(tmp_path_factory.mktemp('copy'))
    for entry in os.scandir(ROOT):
        if entry.is_file() and entry.name != 'fast.py':
            shutil.copy(entry.path, folder)
    made = ('__pycache__', '*.bin', '*.tmp', 'bins.json', 'meta.pkl', 'input.txt')
    about_it = ('test_fast.py', 'test_without_fast.py', 'test_texts.py')
    for name in ('assets', 'config', 'data', 'tests'):
        shutil.copytree(os.path.join(ROOT, name), os.path.join(folder, name),
                        ignore=shutil.ignore_patterns(*made, *about_it))
    # nor may it be found elsewhere, by way of PYTHONPATH
    assert "No module named 'fast'" in run(sys.executable, '-c', 'import fast', cwd=folder).stderr
    return folder


@pytest.mark.slow
def test_scripts_give_the_same_numbers(script, copy, dataset, tmp_path, capsys):
    def both(name: str, **options) -> tuple[str, str]:
        """What a script of this repo prints, and that of the copy."""
        assert script(name, *flags(**options, out_dir=tmp_path / 'here'))['fast'] is not None
        other = run(os.path.join(copy, name), *flags(**options, out_dir=tmp_path / 'there'))
        assert other.returncode == 0, other.stderr
        return capsys.readouterr().out, other.stdout

    losses, others = map(LOSS.findall, both('train.py', **{**TINY, 'max_iters': 4, 'dataset': dataset}))
    assert losses == others
    assert len(losses) == 4 + 2 * 2  # of the updates, and of the evaluations before and after them
    printed = both('sample.py', device='cpu', dtype='float32', start='a', num_samples=2, max_new_tokens=40,
                   temperature=0)
    text, other = (out.partition(' updates\n')[2] for out in printed)
    assert text == other
    assert len(text) > 2 * 40


@pytest.mark.slow
def test_all_other_tests_pass(copy):
    done = run(sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', cwd=copy, timeout=900,
               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 500
