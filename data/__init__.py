"""Everything on disk: token bins, tokenizers, checkpoints, logs. One folder a dataset, with its prepare.py."""

import contextlib
import errno
import os
import sys
import time


class DataError(Exception):
    """
    A file or setting that cannot be used. The message names it and says what to do; it is for the user.
    Under torchrun all ranks meet the same mistake and rank 0 alone reports it, unless it is in what `one_rank` read.
    """

    def __init__(self, message: str, one_rank: bool = False):
        super().__init__(message)
        self.one_rank = one_rank


@contextlib.contextmanager
def writing(*paths: str):
    """What is written inside may fill the disk: then the unfinished `.tmp` of these paths goes, with a DataError."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, getattr(errno, 'EDQUOT', None)):
            raise
        for path in paths:
            with contextlib.suppress(OSError):
                os.remove(path + '.tmp')
        raise DataError(f'{paths[0]} could not be written ({e.strerror}): free some space', one_rank=True) from e


def _say(kind, error, trace, otherwise=sys.excepthook):
    """A DataError that reaches the top of a script is one line and exit code 2; all else keeps its traceback."""
    if not issubclass(kind, DataError):
        return otherwise(kind, error, trace)
    if error.one_rank or os.environ.get('RANK', '0') == '0':
        print(error, file=sys.stderr)
    else:
        time.sleep(1)  # torchrun ends all ranks as soon as one ends: the first must have spoken by then
    raise SystemExit(2)


sys.excepthook = _say
