"""
Where texts come from: files, folders and globs of text (.txt, .md), .jsonl and .parquet, also as .gz and .zst, are read
in pieces of some MB and tokenized by all cores. Ids arrive in the order of the documents, and nothing is written.
"""

import codecs
import contextlib
import glob
import gzip
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from data import DataError, codec

TEXT, LINES, PARQUET = ('.txt', '.md'), ('.jsonl', '.ndjson'), ('.parquet',)
PIECE = 1 << 21  # bytes of text that are read, and tokenized by one process, at once


class Piece(NamedTuple):
    """Some documents, of which the last may go on in the next piece."""
    path: str
    first: int  # the number of its first document, or line, in the file
    texts: list[str] | bytes | tuple[int, int, int]  # bytes: lines of JSON; numbers: see _row_ranges()
    count: int  # of documents
    goes_on: bool
    val: np.ndarray | None  # (count,) bool: which are held back
    position: float  # bytes of all files up to here, for the bar


# -- reading --------------------------------------------------------------------------------------------------------

def files_of(paths: Iterable[str]) -> list[str]:
    """The files that paths, folders (all below them, sorted) and globs mean. Raises DataError if one means none."""
    found, other = [], []
    for path in paths:
        if os.path.isdir(path):
            below = glob.glob(os.path.join(glob.escape(path), '**'), recursive=True)
            below = sorted(filter(os.path.isfile, below))
            files = [f for f in below if kind(f)]
            other += [os.path.splitext(f)[1] or 'no ending' for f in below if not kind(f)]
        else:
            files = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not files:
            raise DataError(f'{path}: no such file, or no {", ".join(TEXT + LINES + PARQUET)} (.gz, .zst) in it')
        found += files
    if other:
        print(f'note: {len(other)} other files are left out ({", ".join(sorted(set(other))[:9])})')
    once = {}  # whatever ways lead to a file, or its end would come into val, and a copy of it into train
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def kind(path: str) -> tuple[str, ...] | None:
    name = path.lower().removesuffix('.gz').removesuffix('.zst')
    return next((kind for kind in (TEXT, LINES, PARQUET) if name.endswith(kind)), None)


def _chunks(path: str) -> Iterator[tuple[bytes, float]]:
    """The bytes of a file, decompressed, in pieces; and how much of the file has been read."""
    try:
        with open(path, 'rb') as raw:
            file = gzip.open(raw) if path.lower().endswith('.gz') else raw
            if path.lower().endswith('.zst'):
                import pyarrow
                file = pyarrow.CompressedInputStream(raw, 'zstd')
            while chunk := file.read(PIECE):
                yield chunk, raw.tell()
    except (EOFError, OSError, zlib.error) as e:
        raise DataError(f'{path} cannot be read to its end ({e})') from e


def _texts(path: str) -> Iterator[tuple[str, bool, float]]:
    """A text file in pieces, cut where GPT-2's tokens always end; whether it goes on; how much has been read."""
    decode, held, read, seen, chunk = codecs.getincrementaldecoder('utf-8-sig')().decode, '', 0, 0, b''
    try:
        for chunk, seen in _chunks(path):
            known, text = max(0, len(held) - 2), (held + decode(chunk)).replace('\r\n', '\n')
            cut = codec.CUT.search(text, max(known, len(text) - (1 << 16))) or codec.CUT.search(text, known)
            held, read = text[cut.start():] if cut else text, read + len(chunk)
            if cut:
                yield text[:cut.start()], True, seen
        chunk = b''
        held += decode(chunk, True)
    except UnicodeDecodeError as e:
        at = read + len(chunk) - len(e.object) + e.start
        raise DataError(f'{path} is not UTF-8 (byte 0x{e.object[e.start]:02x} at offset {at:,}): convert it') from None
    yield held, False, seen


def _lines(path: str) -> Iterator[tuple[bytes, int, float]]:
    """A .jsonl file, some whole lines at a time; how many; how much of the file has been read."""
    held, seen = [], 0
    for chunk, seen in _chunks(path):
        head, newline, tail = chunk.rpartition(b'\n')
        if newline:
            lines, held = b''.join([*held, head]), []
            yield lines, lines.count(b'\n') + 1, seen
        held.append(tail)
    if any(held):
        yield b''.join(held), 1, seen


@contextlib.contextmanager
def _parquet(path: str, field: str) -> Iterator:
    """A parquet file that has a column `field`, open. DataError if it has not, or is none."""
    import pyarrow
    import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            if field not in file.schema_arrow.names:
                raise DataError(f'{path} has no column {field}, but {", ".join(file.schema_arrow.names)}: choose one '
                                'with --field')
            yield file
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f'{path} cannot be read as parquet ({str(e).splitlines()[0]})') from e


def _row_ranges(path: str, field: str) -> Iterator[tuple[tuple[int, int, int] | list, int, float]]:
    """Parts of a parquet file, each with its number of rows and how much has been read: (row group, first row in it,
    rows to read at once), or, of a large group, the texts themselves."""
    with _parquet(path, field) as file:
        done, all_rows = 0, max(1, file.metadata.num_rows)
        for g in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(g)
            columns = map(group.column, range(group.num_columns))
            size = max(1, sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field))
            large = size > 32 * PIECE  # to find a part, a process has to read those before it
            step, at_once = (max(1, n * PIECE * group.num_rows // size) for n in (4 if large else 8, 1))
            batches = file.iter_batches(step, row_groups=[g], columns=[field], use_threads=False)  # lazily
            for start in range(0, group.num_rows, step):
                n = min(step, group.num_rows - start)
                done += n
                texts = next(batches).column(0).to_pylist() if large else (g, start, at_once)
                yield texts, n, os.path.getsize(path) * done / all_rows


def _rows(path: str, field: str, group: int, start: int, at_once: int) -> Iterator:
    """The rows of a row group from `start` on, read where they are tokenized, so many at once."""
    with _parquet(path, field) as file:
        for batch in file.iter_batches(at_once, row_groups=[group], columns=[field], use_threads=False):
            if start < len(batch):
                yield from batch.column(0).slice(start).to_pylist()
            start = max(0, start - len(batch))


def count_rows(files: list[str], field: str = 'text') -> int:
    """Documents in some parquet files, by what they say of themselves."""
    n = 0
    for path in files:
        with _parquet(path, field) as file:
            n += file.metadata.num_rows
    return n


def random_share(val: float, seed: int) -> Callable[[int, int], np.ndarray]:
    """is_val(first, count) of pieces(): each document with probability val; and always the second one, so that val is
    never empty. The same documents, whatever pieces they come in."""
    def is_val(first: int, count: int) -> np.ndarray:
        random = np.random.Philox(key=seed).advance(first).random_raw(4 * count)[::4]  # four numbers an advance
        return (random < val * 2.0 ** 64) | (np.arange(first, first + count) == 1)
    return is_val


def of_permutation(val: float, seed: int, n: int) -> Callable[[int, int], np.ndarray]:
    """is_val(first, count) of pieces(): the documents that datasets' train_test_split(val, seed=seed) puts in test."""
    held = np.zeros(n, bool)
    held[np.random.default_rng(seed).permutation(n)[:math.ceil(val * n)]] = True
    return lambda first, count: held[first:first + count]


def pieces(files: list[str], field: str, val: float, is_val: Callable | None, limit: int | None) -> Iterator[Piece]:
    """
    All documents, in order. Held back for val are those that is_val(first, count) names; or, if all files are plain
    text and it is None, the last `val` of the characters, as if the files were one text.
    """
    number, before, cut, at = 0, 0.0, None, 0
    if is_val is None:  # one more pass, to count
        cut = int((1 - val) * sum(len(text) for path in files for text, _, _ in _texts(path)))
    for path in files:
        start = number
        if kind(path) in (LINES, PARQUET):
            for texts, count, seen in _lines(path) if kind(path) == LINES else _row_ranges(path, field):
                count = count if limit is None else min(count, limit - number)
                if not count:
                    return
                yield Piece(path, number - start, texts, count, False, is_val(number, count), before + seen)
                number += count
        elif limit is None or number < limit:
            held = is_val(number, 1) if is_val else np.zeros(1, bool)
            for text, goes_on, seen in _texts(path):
                head = len(text) if is_val else min(max(cut - at, 0), len(text))
                at += len(text)
                if head:
                    yield Piece(path, 0, [text[:head]], 1, goes_on or head < len(text), held, before + seen)
                if head < len(text):
                    yield Piece(path, 0, [text[head:]], 1, goes_on, ~held, before + seen)
            number += 1
        before += os.path.getsize(path)


# -- tokenizing -----------------------------------------------------------------------------------------------------

_given = {}  # in each process: the tokenizer, what ends a document, the field of a record


def _in_a_process(given: dict) -> None:
    _given.update(given)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started them


def _documents(piece: Piece) -> Iterator[tuple[int, str]]:
    """Number in the piece and text of each, or of those that are not empty. DataError names what cannot be read."""
    texts, field = piece.texts, _given['field']
    if isinstance(texts, bytes):
        texts = texts.split(b'\n')
    elif isinstance(texts, tuple):
        texts = _rows(piece.path, field, *texts)
    for i, text in enumerate(itertools.islice(texts, piece.count)):
        line = f'{piece.path}, line {piece.first + i + 1}'
        if isinstance(piece.texts, bytes):
            try:
                record = json.loads(text) if text.strip() else {field: ''}
            except (ValueError, RecursionError) as e:
                raise DataError(f'{line} is no JSON ({e}): each line must be one object') from None
            if not isinstance(record, dict):
                raise DataError(f'{line} has no fields, but {type(record).__name__}')
            if field not in record:
                raise DataError(f'{line} has no field {field} ({", ".join(record)}): choose one with --field')
            text = record[field]
        elif isinstance(text, bytes):  # a column of parquet that does not say that it is text
            try:
                text = text.decode()
            except UnicodeDecodeError:
                raise DataError(f'{line}: {field} is not UTF-8') from None
        if not (text is None or isinstance(text, str)):
            raise DataError(f'{line}: {field} is no text, but {type(text).__name__}; choose another with --field')
        if text or _given['empty']:
            yield i, text or ''


def characters_of(piece: Piece) -> tuple[set[str], Piece]:
    """The characters that occur."""
    return set().union(*(set(text) for _, text in _documents(piece))), piece._replace(texts=[])


def ids_of(piece: Piece) -> tuple[tuple[dict[str, np.ndarray], int, int], Piece]:
    """Ids of the splits, how many documents end, how many characters there are."""
    tokenizer, end, ids, n, size = _given['tokenizer'], _given['end'], {'train': [], 'val': []}, 0, 0
    for i, text in _documents(piece):
        ends = not (piece.goes_on and i == piece.count - 1)
        split = ids['val' if piece.val[i] else 'train']
        split.append(tokenizer.encode(text))
        n, size = n + ends, size + len(text)
        if ends and end is not None:
            split.append(end)
    joined = {split: np.concatenate(arrays) for split, arrays in ids.items() if arrays}
    return (joined, n, size), piece._replace(texts=[], val=None)


def by_all_cores(work: Callable, source: Iterable[Piece], given: dict, processes: int) -> Iterator:
    """work(piece) of each, in order; at most a few pieces wait, so memory stays bounded."""
    if processes == 1:
        _given.update(given)
        yield from map(work, source)
        return
    method = 'fork' if sys.platform == 'linux' else 'spawn'  # forked processes need not import anything
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context(method), _in_a_process, (given,))
    waiting = deque()
    try:
        for piece in source:
            waiting.append(pool.submit(work, piece))
            if len(waiting) > 3 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as e:
        raise DataError('a process that tokenizes was ended from outside, perhaps for want of memory: run this again, '
                        f'with fewer than --num_proc={processes}') from e
    finally:
        pool.shutdown(cancel_futures=True)
