"""Everything on disk: token bins, tokenizers, checkpoints, logs. One folder a dataset, with its prepare.py."""

import contextlib
import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = errno.ENOSPC, errno.EFBIG, getattr(errno, 'EDQUOT', errno.ENOSPC)  # errors that some space would mend
NAMES = 'ckpt.pt', 'last.pt'  # of checkpoints: best or latest; and whatever is newer than it
SILENCE = 40  # seconds after which a host of several counts as lost
_locks = {}  # by path: the open files whose locks this process holds


class DataError(Exception):
    """
    A file or setting that cannot be used. The message names it and says what to do; it is for the user. Under torchrun
    rank 0's appears at once, another rank's after 2 s, if rank 0 has not ended the run by then; with one_rank at once.
    """

    def __init__(self, message: str, one_rank: bool = False):
        super().__init__(message)
        self.one_rank = one_rank


@contextlib.contextmanager
def writing(*paths: str):
    """What is written inside may fill the disk: then the `.tmp` of these paths is removed, with a DataError."""
    try:
        yield
    except OSError as e:
        if e.errno not in FULL:
            raise
        for path in paths:
            with contextlib.suppress(OSError):
                os.remove(path + '.tmp')
        raise DataError(f'{paths[0]} could not be written ({e.strerror}): free some space', one_rank=True) from e


def lock(folder: str, otherwise: str = 'choose another with --out_dir') -> None:
    """
    Make the folder this process's own until unlock() or its end, however it ends; DataError if it is another's, with
    what to do `otherwise`, OSError if it cannot be written. On Windows, and where the file system has no locks, it only
    says who is there.
    """
    path = os.path.realpath(os.path.join(folder, 'run.lock'))
    if path not in _locks:
        file = open(path, 'a+', encoding='utf-8')
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(f'{folder} belongs to {file.read()}, which is still at work: {otherwise}') from None
        except OSError:
            pass
        if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            file.close()  # its owner ended in between, and took the file away
            return lock(folder, otherwise)
        file.truncate(0)
        print(f'process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}', end='', file=file, flush=True)
        _locks[path] = file


def unlock(folder: str) -> None:
    """Give the folder back, if this process has it."""
    path = os.path.realpath(os.path.join(folder, 'run.lock'))
    if file := _locks.pop(path, None):
        with contextlib.suppress(OSError):
            os.remove(path)
        file.close()


def launched() -> tuple[bool, int, int, int]:
    """
    Whether torchrun started this process; its rank, its rank on this machine, and the number of processes: False, 0, 0,
    1 without it. RANK decides; a WORLD_SIZE alone, as schedulers set it, means nothing. DataError if RANK is there and
    the rest is not, or is no number.
    """
    if not os.environ.get('RANK'):
        return False, 0, 0, 1
    missing = [name for name in ('LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing:
        raise DataError(f'RANK={os.environ["RANK"]} is set, but not {", ".join(missing)}: start several processes with '
                        'torchrun, which sets them all, or unset RANK for one', one_rank=True)
    try:
        rank, local_rank, processes = (int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
        if 0 <= rank < processes and local_rank >= 0:
            return True, rank, local_rank, processes
    except ValueError:
        pass
    raise DataError('RANK={RANK}, LOCAL_RANK={LOCAL_RANK}, WORLD_SIZE={WORLD_SIZE} do not fit together: start several '
                    'processes with torchrun'.format_map(os.environ), one_rank=True)


def join_ranks(device: str, backend: str, local_rank: int) -> tuple[str, str]:
    """Make the process group; returns this rank's device, and the backend that is chosen. All restarts by one torchrun
    share a store, in which ranks would find those of before (pytorch issue 167288); so on one machine each has a part
    of its own. Several machines count restarts each for itself: there only the rendezvous c10d finds together again."""
    import torch
    import torch.distributed as dist
    store, rank, processes = next(dist.rendezvous('env://'))
    hosts = int(os.environ.get('GROUP_WORLD_SIZE', 0))  # 0: not started by torchrun
    store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store) if hosts == 1 else store
    if device.startswith('cuda'):
        device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)
    backend = backend if backend != 'auto' else 'nccl' if device.startswith('cuda') else 'gloo'
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes,
                            device_id=torch.device(device) if backend == 'nccl' else None)
    if hosts > 1 and local_rank == 0:
        _watch_hosts(store.clone(), int(os.environ['GROUP_RANK']), hosts)
    return device, backend


def _watch_hosts(store, this: int, count: int) -> None:
    """From now on, end this process if another host is silent for SILENCE seconds, its network or power gone: a
    collective would wait for its timeout, many minutes. torchrun then ends or restarts the others."""
    silent = dict.fromkeys(range(count), 0)  # seconds, counted here: a process that is stopped does not count

    def exchange():
        heard = {}
        with contextlib.suppress(RuntimeError):  # the store's own host is gone: nobody is heard any more
            while True:
                store.set(f'host {this}', str(time.time()))
                for host in range(count):
                    if (said := store.get(f'host {host}')) != heard.get(host):
                        heard[host], silent[host] = said, 0
                time.sleep(SILENCE / 20)

    def wait():
        while max(silent.values()) < SILENCE:
            time.sleep(1)
            for host in silent:
                silent[host] += 1
        host = max(silent, key=silent.get)
        print(f'host {host} has been silent for {SILENCE} s: this one ends, too', file=sys.__stderr__, flush=True)
        os._exit(1)

    for work in (exchange, wait):
        threading.Thread(target=work, daemon=True).start()


def agreed(what: dict, model) -> None:
    """All ranks must start alike: DataError on each of them that names the first entry of `what` that differs, options
    aside that may differ, or the weights, for which a sum of norms stands."""
    import torch
    import torch.distributed as dist
    size = sum(torch.linalg.vector_norm(p.detach(), dtype=torch.float64).item() for p in model.parameters())
    what = {**what, 'weights': f'{size:.6g}'}
    everyone = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, what)
    except RuntimeError as e:
        raise DataError('another rank ended at the start; it says why', one_rank=True) from e
    for rank, theirs in enumerate(everyone):
        for key, first in everyone[0].items():
            if theirs[key] != first and key not in ('out_dir', 'device', 'dataset') and not key.startswith('wandb_'):
                theirs, first = (f'{value!s:.60}' for value in (theirs[key], first))
                raise DataError(f'rank {rank} started with {key}={theirs}, rank 0 with {key}={first}: all of them '
                                'need the same options, data and checkpoint')


def versions() -> dict:
    """The Python, the torch and, in a git checkout, the commit that are running: for a run's header."""
    import torch
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        done = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):  # no git
        commit = None
    return {'commit': commit, 'python': sys.version.split()[0], 'torch': torch.__version__}


def fetched(path: str, url: str, sha256: str) -> bool:
    """
    See that a file is there, if need be from `url`, where it must have the given hash; a file that is there is used
    whatever it holds. Whether it is the published one, with a line if not. Raises DataError, and leaves no half file.
    """
    if not os.path.exists(path):
        import torch  # the download checks the hash before the file gets its name
        print(f'fetching {url}', flush=True)
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
        except Exception as e:  # HTTP status, no network, cut short, wrong hash, disk
            raise DataError(f'{path} could not be fetched ({type(e).__name__}: {e}). Without network: save {url} there '
                            'by other means, or any UTF-8 text of your own, and run this again') from e
    with open(path, 'rb') as f:
        published = hashlib.sha256(f.read()).hexdigest() == sha256
    if not published:
        print(f'note: {path} is not the published text; going on with it as it is')
    return published


def nobody_reads() -> None:
    """After a BrokenPipeError, as by `| head`: what is printed from now on goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Stop:
    """
    Whether the process has been asked for an orderly end, as its truth value: by SIGTERM, SIGINT, SIGUSR1 (Slurm warns
    so) or SIGHUP (its terminal is gone), or because nobody reads what say() prints. A second signal ends it at once.
    Signals count between listen() and forget(), which puts back what was there; those that are ignored stay so.
    """

    def __init__(self, speaks: bool):
        self.speaks, self.asked, self.before = speaks, False, {}

    def __bool__(self) -> bool:
        return self.asked

    def say(self, *words) -> None:
        """print(), in one process of all."""
        try:
            if self.speaks:
                print(*words)
        except OSError:  # its reader has ended, as `head` does, or its terminal was closed
            nobody_reads()
            self.asked = True

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only there Python takes signals; a run goes on without them
        for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
            number = getattr(signal, name, None)  # Windows lacks two of them
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        self.asked = True
        with contextlib.suppress(OSError):
            if self.speaks:  # print() is not safe in here
                os.write(2, b'finishing this update; a second signal quits at once\n')
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)

    def forget(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave(status=0, at_once: bool = False) -> None:
    """
    End the process with a status, or with a message and 1; with 0 and not at_once it returns. at_once: without Python's
    own end, in which gloo's thread may drop its last Python object too late ("terminate called", exit code -6).
    """
    if at_once:
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(status, str) else status)
    if status:
        sys.exit(status)


def _say(kind, error, trace, otherwise=sys.excepthook):
    """What reaches the top of a script: a DataError is one line and exit code 2; Ctrl-C, and an output that nobody
    reads any more, a quiet end with the code that such a signal gives other tools; memory that is not there a line; all
    else keeps its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(130)
    if issubclass(kind, BrokenPipeError):
        nobody_reads()
        raise SystemExit(141)
    rank, text = os.environ.get('RANK') or '0', str(error)
    if issubclass(kind, MemoryError) or kind.__name__ == 'OutOfMemoryError' or "can't allocate memory" in text:
        what = (text or kind.__name__).splitlines()[0]
        error = f'out of memory ({what}): take a smaller model, --batch_size or --block_size'
    elif not issubclass(kind, DataError):
        if os.environ.get('TORCHELASTIC_ERROR_FILE'):  # torchrun's report then shows the traceback
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler
            try:
                raise error.with_traceback(trace)
            except Exception as e:  # it reads the traceback of what is being handled
                get_error_handler().record_exception(e)
        return otherwise(kind, error, trace)
    elif rank != '0' and not error.one_rank:
        time.sleep(2)  # torchrun ends all ranks as soon as one ends: if the first met the same, it has spoken by now
    # not to sys.stderr: torch.distributed puts a buffer there, which would be lost with the SystemExit
    print(f'rank {rank}: {error}' if rank != '0' else error, file=sys.__stderr__, flush=True)
    leave(2, at_once=bool(os.environ.get('RANK')))


if not hasattr(sys, 'ps1'):  # a person at a prompt, or a notebook, has a better use for what an error says
    sys.excepthook = _say
