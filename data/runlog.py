"""
A run: the folder it owns, and what it says: its times, log.jsonl, loss.png, and wandb if asked for.

    python data/runlog.py out-a out-b       the curves of two runs in one picture
"""

import contextlib
import datetime
import glob
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

if (repo := os.path.dirname(os.path.dirname(os.path.realpath(__file__)))) not in sys.path:
    sys.path.insert(0, repo)
from data import NAMES, DataError, curves, lock, writing  # noqa: E402

PATIENCE = {'log': 30, 'finish': 600}  # seconds that wandb may take


def claim(folder: str, fresh: bool = False) -> list[str]:
    """
    Make an out_dir ready for a run: create it, see that it can be written and is no other process's, remove what a
    killed save left. A fresh run renames the files of an earlier one, a.b to a.prev.b, or a.prev2.b if that is taken,
    and so on; their new names are returned. Raises DataError.
    """
    names = [os.path.splitext(name) for name in (*NAMES, 'log.jsonl', 'loss.png')]
    moved = []
    try:
        os.makedirs(folder, exist_ok=True)
        lock(folder)
        taken = set(os.listdir(folder))
        tags = (f'.prev{n}' if n > 1 else '.prev' for n in itertools.count(1))
        tag = next(tag for tag in tags if not taken & {stem + tag + ending for stem, ending in names})
        for stem, ending in names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, stem + ending + '.tmp'))
            if fresh and stem + ending in taken:
                os.replace(os.path.join(folder, stem + ending), os.path.join(folder, stem + tag + ending))
                moved.append(stem + tag + ending)
    except OSError as e:
        raise DataError(f'out_dir={folder} cannot be written ({e.strerror}): choose another with --out_dir') from e
    return moved


class RunLog:
    """
    One JSON object a line: {"kind": "run", ...} at each start, then "train" and "eval" records, each with its "iter".
    Resumed at update `resumed_at`, it first drops what came after that, and an evaluation there is logged once only.
    With path None it does nothing, which is what every rank but rank 0 wants. wandb, if asked for, gets all but "run";
    by `wandb_id` a later process goes on with that run. With matplotlib installed, loss.png beside the log is drawn at
    the end, and at evaluations as far as that takes no more than a fiftieth of the time. Raises DataError on a full
    disk, or if the folder is gone.
    """

    def __init__(self, path: str | None, header: dict, resumed_at: int = 0, wandb: dict | None = None):
        self.path, self.run, self.wandb_id = path, None, (wandb or {}).get('id')
        self.undrawn, self.draw_at = False, time.perf_counter() + 60  # what is not in loss.png yet; when to draw again
        if path is None:
            return
        kept, self.evaluated = _before(path, resumed_at) if resumed_at else ([], None)
        with writing(path), open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(kept)
        os.replace(path + '.tmp', path)
        if wandb:
            self.run = _start_wandb(wandb, header)
            self.wandb_id = self.run.id if self.run else self.wandb_id
        self.write('run', iter=resumed_at, **header)

    def write(self, kind: str, **record) -> None:
        """Append one record; a number that is not finite becomes its name, since JSON has no word for it."""
        if self.path is None or (kind == 'eval' and record['iter'] == self.evaluated):
            return
        record = {k: repr(v) if isinstance(v, float) and v - v != 0 else v for k, v in record.items()}
        with writing(self.path), open(self.path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'kind': kind, **record}, default=str) + '\n')
        if kind != 'run':
            self.undrawn = True
            self._wandb('log', record)
        if kind == 'eval' and time.perf_counter() > self.draw_at:
            self._draw()

    def close(self) -> None:
        self._draw()
        self._wandb('finish')

    def _draw(self) -> None:
        if self.undrawn:
            took, self.undrawn = curves.redraw(os.path.dirname(self.path)), False
            self.draw_at = time.perf_counter() + 50 * took

    def _wandb(self, what: str, *values) -> None:
        """Let wandb do something, in a thread, since it may hang; if it fails, the run goes on without it."""
        failed = []

        def work():
            try:
                getattr(self.run, what)(*values)
            except Exception as e:  # its process was killed, its disk is full, ...
                failed.append(e)

        if not self.run:
            return
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE[what])
        if thread.is_alive():
            failed.append(TimeoutError(f'no answer for {PATIENCE[what]} s'))
            _kill_child('wandb-core')  # or it would hang again when Python ends
        if failed:
            self.run = None
            with contextlib.suppress(Exception, SystemExit):  # or it would complain again when Python ends
                sys.modules['wandb'].teardown()
            why = f'{type(failed[0]).__name__}: {" ".join(str(failed[0]).split())[:120]}'
            print(f'wandb failed ({why}); the run goes on without it')


def _before(path: str, resumed_at: int) -> tuple[list[str], int | None]:
    """The lines of an earlier log up to a number of updates, and that number if its evaluation is there; a last line
    cut short by a kill is dropped too."""
    kept, evaluated = [], None
    if os.path.exists(path):
        with open(path, encoding='utf-8-sig', errors='replace') as f:
            for line in f:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                step, kind = (record.get('iter'), record.get('kind')) if isinstance(record, dict) else (None, None)
                here = kind == 'eval' and step == resumed_at
                evaluated = step if here else evaluated
                if type(step) is int and (kind == 'run' or here or step < resumed_at):
                    kept.append(line.rstrip('\n') + '\n')
    return kept, evaluated


def _kill_child(name: str) -> None:
    try:
        subprocess.run(['pkill', '-KILL', '-P', str(os.getpid()), name])
    except FileNotFoundError:  # a slim container has none
        for path in glob.glob('/proc/[0-9]*/stat'):
            with contextlib.suppress(OSError), open(path, encoding='utf-8', errors='replace') as f:
                pid, program, _, parent, *_ = f.read().split()
                if (program, parent) == (f'({name})', str(os.getpid())):  # no numbers where a name has spaces
                    os.kill(int(pid), signal.SIGKILL)


def _start_wandb(settings: dict, config: dict):
    """A wandb run, or None with one line that says why; the local log goes on either way. Where names are not given, a
    run on other data than OpenWebText is called by its out_dir, in a project called by its dataset."""
    options = config.get('config', {})
    if (settings['project'], settings['name']) == ('owt', 'gpt2') and options.get('dataset') != 'openwebtext':
        names = {'project': options.get('dataset'), 'name': options.get('out_dir')}
        settings = {**settings, **{key: os.path.basename(os.path.abspath(name or key)) for key, name in names.items()}}
    try:
        import wandb
        run = wandb.init(config=config, resume='allow', settings=wandb.Settings(init_timeout=30), **settings)
        run.define_metric('*', step_metric='iter')
        return run
    except ImportError:
        why = 'wandb is not installed (pip install wandb)'
    except Exception as e:  # UsageError: no key; CommError: no network
        why = (f'wandb could not start ({type(e).__name__}: {" ".join(str(e).split())[:120]}); '
               'WANDB_MODE=offline needs neither key nor network')
    print(f'{why}. The run is logged to log.jsonl only.')
    return None


class Stopwatch:
    """
    The time that updates take, from update `iter_num` on, without what happens while it is paused. `mfu_of` gives the
    model FLOPs utilisation that belongs to so many seconds an update; `mfu` is its running mean, -1.0 at first.
    """

    def __init__(self, iter_num: int, mfu_of: Callable[[float], float]):
        self.started_at, self.lap_at, self.mfu_of = iter_num, iter_num, mfu_of
        self.mfu, self.dt, self.pause = -1.0, 0.0, 0.0
        self.spent, self.since = 0.0, time.perf_counter()  # seconds of this lap before `since`, and when that is

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count; `pause` is how long it took the last time."""
        began = time.perf_counter()
        self.spent += began - self.since
        yield
        self.since = time.perf_counter()
        self.pause = self.since - began

    def lap(self, iter_num: int) -> float:
        """Seconds an update, mean of those since the last lap."""
        now = time.perf_counter()
        self.dt = (self.spent + now - self.since) / (iter_num - self.lap_at)
        self.lap_at, self.spent, self.since = iter_num, 0.0, now
        if iter_num - self.started_at > 5:  # the first few are slower: compilation, caches
            mfu = self.mfu_of(self.dt)
            self.mfu = mfu if self.mfu < 0 else 0.9 * self.mfu + 0.1 * mfu
        return self.dt

    def left(self, max_iters: int, eval_interval: int) -> str:
        """How long the rest will take, for the end of a log line; nothing yet after the first update."""
        if self.lap_at - self.started_at <= 1:
            return ''
        seconds = (max_iters - self.lap_at) * (self.dt + self.pause / eval_interval)
        return f', {datetime.timedelta(seconds=int(seconds))} left'


if __name__ == '__main__':
    curves.main()
