"""What a run says about itself: its times, log.jsonl in its out_dir, and wandb if asked for."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from data import nobody_reads, writing


def speaker(hung_up: Callable[[], None]) -> Callable:
    """print(); where nobody reads it any more, as after `| head`, hung_up() is called once and nothing more is said."""
    def say(*words) -> None:
        try:
            print(*words)
        except BrokenPipeError:
            nobody_reads()
            hung_up()
    return say


class RunLog:
    """
    One JSON object a line: {"kind": "run", ...} at each start, then "train" and "eval" records, each with its "iter".
    Resumed at update `resumed_at`, it first drops the records from there on, so that no step stands there twice.
    With path None it does nothing, which is what every rank but the first wants. Raises DataError on a full disk.
    """

    def __init__(self, path: str | None, header: dict, resumed_at: int = 0, wandb: dict | None = None):
        self.path, self.run = path, None
        if path is None:
            return
        kept = _before(path, resumed_at) if resumed_at else []
        with writing(path), open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(kept)
        os.replace(path + '.tmp', path)
        if wandb:
            self.run = _start_wandb(wandb, header)
        self.write('run', iter=resumed_at, **header)

    def write(self, kind: str, **record) -> None:
        """Append one record; a number that is not finite becomes its name, since JSON has no word for it."""
        if self.path is None:
            return
        record = {k: repr(v) if isinstance(v, float) and v - v != 0 else v for k, v in record.items()}
        with writing(self.path), open(self.path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'kind': kind, **record}, default=str) + '\n')
        if kind == 'eval':
            sent = ('iter', 'train/loss', 'val/loss', 'lr', 'mfu')
            self._wandb('log', {k: v for k, v in record.items() if k in sent})

    def close(self) -> None:
        self._wandb('finish')

    def _wandb(self, what: str, *values) -> None:
        """Let wandb do something; if it fails, the run goes on without it."""
        try:
            if self.run:
                getattr(self.run, what)(*values)
        except Exception as e:  # its process was killed, its disk is full, ...
            self.run = None
            with contextlib.suppress(Exception):  # or it would complain again when Python ends
                sys.modules['wandb'].teardown()
            print(f'wandb failed ({type(e).__name__}: {" ".join(str(e).split())[:120]}); the run goes on without it')


def _before(path: str, resumed_at: int) -> list[str]:
    """The lines of an earlier log that stand before an update; a last line cut short by a kill is dropped too."""
    kept = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            for line in f:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                step = record.get('iter') if isinstance(record, dict) else None
                if type(step) is int and (record.get('kind') == 'run' or step < resumed_at):
                    kept.append(line.rstrip('\n') + '\n')
    return kept


def versions() -> dict:
    """The Python and, in a git checkout, the commit that are running: for a run's header."""
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        done = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):  # no git
        commit = None
    return {'commit': commit, 'python': sys.version.split()[0]}


def _start_wandb(settings: dict, config: dict):
    """A wandb run, or None with one line that says why; the local log goes on either way."""
    try:
        import wandb
        return wandb.init(config=config, settings=wandb.Settings(init_timeout=30), **settings)
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
