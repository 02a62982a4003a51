"""Everything on disk: token bins, tokenizers, checkpoints, logs. One folder a dataset, with its prepare.py."""

import atexit
import contextlib
import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = errno.ENOSPC, errno.EFBIG, getattr(errno, 'EDQUOT', errno.ENOSPC)  # errors that some space would mend
NAMES = 'ckpt.pt', 'last.pt'  # of checkpoints: best or latest; and whatever is newer than it
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
    """What is written inside may fill the disk, or have no place any more: DataError. Whatever fails, the `.tmp` of
    these paths are removed."""
    try:
        yield
    except BaseException as e:
        for path in paths:
            with contextlib.suppress(OSError):
                os.remove(path + '.tmp')
        if not isinstance(e, OSError) or not (e.errno in FULL or str(e.filename).startswith(paths)):
            raise
        hint = ': free some space' if e.errno in FULL else ''
        raise DataError(f'{paths[0]} could not be written ({e.strerror}){hint}', one_rank=True) from e


@contextlib.contextmanager
def unless_it_fails(path: str):
    """What is done inside may replace this small file; if it fails, the file is again what it was."""
    before = path + '.before.tmp'
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(path, before)
    try:
        yield
    except BaseException:
        if os.path.exists(before):
            os.replace(before, path)
        raise
    with contextlib.suppress(FileNotFoundError):
        os.remove(before)


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


def leave(status=0, at_once: bool = False) -> None:
    """
    End the process with a status, or with a message and 1; with 0 and not at_once it returns. at_once: without Python's
    own end, in which gloo's thread may drop its last Python object too late ("terminate called", exit code -6); but
    with any other status than 0 the with statements it stands in have their ends first.
    """
    if at_once:
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 0:
            os._exit(0)
        atexit.register(os._exit, status)
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
