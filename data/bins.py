"""
Token bins: the on-disk format, and the batches drawn from it.

A dataset folder holds train.bin and val.bin, raw little-endian uint16 token ids without a header (uint32 for
vocabularies above 65,536), meta.pkl for character models, and bins.json, which says what should be there:

    {"finished": true, "tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16", "meta_sha256": null,
     "splits": {"train": {"tokens": 301966, "sha256": "502a..."}, "val": {...}}}

Batches are a function of (seed, step), never of a stream: nothing has to be saved to resume, evaluation cannot disturb
training, and any number of processes sees the same data.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Iterable, Iterator

import numpy as np

from data import DataError, codec, lock, unless_it_fails, unlock, writing

DTYPES = {'uint16': '<u2', 'uint32': '<u4'}
HASHED_AT_OPEN = 1 << 26  # bytes; smaller bins are checked against their sha256 whenever they are opened


# -- writing --------------------------------------------------------------------------------------------------------

def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_index(folder: str, index: dict) -> None:
    path = os.path.join(folder, 'bins.json')
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        json.dump(index, f, indent=1)
        _sync(f)
    os.replace(path + '.tmp', path)


def write(folder: str, tokenizer, mixed: Iterable[tuple[str, np.ndarray]] = (), **splits: Iterable[np.ndarray]) -> dict:
    """
    Write the bins of a dataset: one split per keyword, each an iterable of arrays of token ids, or train and val
    `mixed`, as pairs of a split's name and an array. Each is consumed once and never held whole. tokenizer: a codec,
    for its vocabulary. Readers refuse the folder until all of it is complete, and a failure leaves what was there.
    Returns the index in bins.json. DataError for an id outside the vocabulary, a full disk, or a folder in use.
    """
    dtype = 'uint16' if tokenizer.vocab_size <= 1 << 16 else 'uint32'
    mixed = itertools.chain(mixed, ((split, ids) for split, arrays in splits.items() for ids in arrays))
    meta, splits = os.path.join(folder, 'meta.pkl'), list(splits) or ['train', 'val']
    names = [os.path.join(folder, f'{split}.bin') for split in splits] + [meta] * hasattr(tokenizer, 'meta')
    index = {'finished': False, 'tokenizer': tokenizer.name, 'vocab_size': tokenizer.vocab_size,
             'dtype': dtype, 'meta_sha256': None, 'splits': {}}
    try:
        os.makedirs(folder, exist_ok=True)
        lock(folder, 'wait for its end')
    except OSError as e:
        raise DataError(f'{folder} cannot be written ({e.strerror}): choose another') from e
    with contextlib.ExitStack() as stack, writing(*names, os.path.join(folder, 'bins.json')):
        stack.callback(unlock, folder)
        with unless_it_fails(os.path.join(folder, 'bins.json')):
            _write_index(folder, index)
            files = {split: stack.enter_context(open(name + '.tmp', 'wb')) for split, name in zip(splits, names)}
            counts, digests = dict.fromkeys(splits, 0), {split: hashlib.sha256() for split in splits}
            for split, ids in mixed:
                ids = np.asarray(ids)
                if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                    bad = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
                    raise DataError(f'{split}: token id {bad}, vocabulary {tokenizer.vocab_size}')
                raw = np.ascontiguousarray(ids, DTYPES[dtype])
                files[split].write(raw)
                digests[split].update(raw)
                counts[split] += len(ids)
            for split, file in files.items():
                _sync(file)
                file.close()
                index['splits'][split] = {'tokens': counts[split], 'sha256': digests[split].hexdigest()}
            if meta in names:
                raw = pickle.dumps(tokenizer.meta(), protocol=4)
                with open(meta + '.tmp', 'wb') as f:
                    f.write(raw)
                    _sync(f)
                index['meta_sha256'] = hashlib.sha256(raw).hexdigest()
        with contextlib.suppress(FileNotFoundError):
            os.remove(meta)  # perhaps of another tokenizer
        for name in names:
            os.replace(name + '.tmp', name)
        index['finished'] = True
        _write_index(folder, index)
    return index


def report(index: dict, characters: int | None = None, expected: dict | None = None) -> None:
    """Print what was written; compare with the `expected` sha256 per split, DataError if one differs."""
    if characters is not None:
        print(f'length of the text in characters: {characters:,}')
    print(f'tokenizer {index["tokenizer"]}, vocabulary {index["vocab_size"]:,}')
    for split, entry in index['splits'].items():
        print(f'{split} has {entry["tokens"]:,} tokens, sha256 {entry["sha256"]}')
        if expected and entry['sha256'] != expected[split]:
            raise DataError(f'{split}.bin should have sha256 {expected[split]}: the tokenizer is another one')


# -- reading --------------------------------------------------------------------------------------------------------

def draw(n: int, *key) -> np.ndarray:
    """n random uint64 that depend on the key alone (Salmon et al. 2011: Philox, a counter-based generator)."""
    digest = hashlib.sha256('/'.join(map(str, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], 'little')).random_raw(n)


def _read_index(folder: str, prepare: str) -> dict:
    """bins.json, checked; or, for folders without one, the same dict on the evidence of the files."""
    path = os.path.join(folder, 'bins.json')
    try:
        with open(path, encoding='utf-8') as f:
            index = json.load(f)
    except FileNotFoundError:
        if {f'{name}.tmp' for name in ('train.bin', 'val.bin', 'meta.pkl', 'bins.json')} & set(os.listdir(folder)):
            raise DataError(f'{folder} is half-written (it holds .tmp files): run {prepare}') from None
        state = codec.of_folder(folder)
        return {'tokenizer': state.name, 'vocab_size': state.vocab_size, 'dtype': 'uint16', 'splits': {}}
    except (ValueError, OSError, RecursionError) as e:
        raise DataError(f'{path} cannot be read ({type(e).__name__}): run {prepare} again') from e
    try:
        size, meta = index['vocab_size'], index['meta_sha256']
        own = index['tokenizer'] in ('char', 'tokens')  # then meta.pkl holds them
        right = (type(index['tokenizer']) is str and type(size) is int and size > 0
                 and (index['tokenizer'] != 'gpt2' or size == codec.BPECodec.vocab_size)
                 and (meta is None or own and type(meta) is str) and index['dtype'] in DTYPES
                 and (not index['finished'] or {'train', 'val'} <= set(index['splits']))
                 and all(type(e['tokens']) is int and type(e['sha256']) is str for e in index['splits'].values()))
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise DataError(f'{path} is damaged: run {prepare} again')
    if index['finished'] is not True:
        raise DataError(f'{folder} is unfinished, what prepared it was interrupted: run {prepare} again')
    return index


class Bins:
    """
    A dataset, opened and checked: `tokenizer`, `vocab_size`, `state` (the codec, for a checkpoint). `dataset` is the
    name of a folder beside this file, or a path. Raises DataError naming the file, and which prepare.py to run.
    """

    def __init__(self, dataset: str, block_size: int):
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), dataset)  # absolute: as it is
        folder = folder if os.path.isdir(folder) and dataset[:1] != '.' else dataset  # ./mine: from here
        if os.path.abspath(folder).startswith(os.getcwd() + os.sep):
            folder = os.path.relpath(folder)  # shorter in messages
        self.folder, self.block_size, own = folder, block_size, os.path.join(folder, 'prepare.py')
        self.prepare = f'python {own if os.path.exists(own) else f"data/prepare.py {dataset} YOUR_TEXT"}'
        self.mend = f'run {self.prepare} again; or, if another program wrote the file, remove bins.json'
        if not os.path.isdir(folder):
            raise DataError(f'dataset {folder} is neither a folder in data/ nor a path to one')
        index = _read_index(folder, self.prepare)
        self.tokenizer, self.vocab_size = index['tokenizer'], index['vocab_size']
        self.own = self.tokenizer in ('char', 'tokens')  # others get a model of a multiple of 64, which is faster
        self.model_vocab_size = self.vocab_size if self.own else -(-self.vocab_size // 64) * 64
        self.state = self._codec_state(index)
        self.files, self.digests, self.known = {}, {}, self.vocab_size  # an id from `known` on is reported, once
        self.tokens = {split: self._open(split, index) for split in ('train', 'val')}

    def _codec_state(self, index: dict) -> dict:
        if not self.own:
            return {'tokenizer': self.tokenizer}
        path = os.path.join(self.folder, 'meta.pkl')
        if not os.path.exists(path):
            raise DataError(f'{path} is missing: run {self.prepare} again')
        with open(path, 'rb') as f:
            if index.get('meta_sha256') not in (None, hashlib.sha256(f.read()).hexdigest()):
                raise DataError(f'{path} is not the file that bins.json describes: {self.mend}')
        chars = codec.read_meta(path)
        if chars.vocab_size != self.vocab_size:
            raise DataError(f'{path} has {chars.vocab_size} tokens, not {self.vocab_size}: run {self.prepare} again')
        return chars.state()

    def _open(self, split: str, index: dict) -> np.ndarray:
        """The tokens of a split as a read-only memory map."""
        path = os.path.join(self.folder, f'{split}.bin')
        if not os.path.isfile(path):
            raise DataError(f'{path} is missing: run {self.prepare}')
        width, size = np.dtype(DTYPES[index['dtype']]).itemsize, os.path.getsize(path)
        if size % width:
            raise DataError(f'{path} is damaged, {size:,} bytes are no multiple of {width}: run {self.prepare} again')
        entry = index['splits'].get(split, {'tokens': size // width, 'sha256': None})
        if size // width != entry['tokens']:
            raise DataError(f'{path} has {size // width:,} tokens, bins.json says {entry["tokens"]:,}: {self.mend}')
        if entry['tokens'] < self.block_size + 1:
            raise DataError(f'{path} has {entry["tokens"]:,} tokens; block_size={self.block_size} needs '
                            f'{self.block_size + 1:,}: take a smaller --block_size or more text')
        self.files[split] = file = open(path, 'rb', buffering=0)
        head = file.read(1024) if not entry['sha256'] else b''  # int32: every second uint16 is 0
        every_second = np.frombuffer(head[:len(head) // 4 * 4], '<u2')[1::2]
        if head.startswith((b'\x93NUMPY', b'\x88\xd8\x34\x01')) or (len(every_second) > 16 and not every_second.any()):
            raise DataError(f'{path} does not look like uint16 token ids: int32 or int64, or with a header? Write them '
                            'by numpy.array(ids, numpy.uint16).tofile(...), or by data.bins.write')
        some = ((file.seek(at), file.read(128))[1] for at in range(0, size, 1 + size // 64))
        sampled = f'sampled {size} {hashlib.sha256(b"".join(some)).hexdigest()}'  # bins.json may come and go
        self.digests |= {split: entry['sha256'] or sampled, f'{split} sampled': sampled}
        tokens = np.memmap(file, DTYPES[index['dtype']], 'r')
        if entry['sha256'] and size <= HASHED_AT_OPEN and hashlib.sha256(tokens).hexdigest() != entry['sha256']:
            raise DataError(f'{path} is not the file that bins.json describes (sha256 differs): {self.mend}')
        if hasattr(os, 'posix_fadvise'):  # sequences lie anywhere: reading ahead would fetch 30 times as much
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return tokens

    def _sequences(self, split: str, raw: np.ndarray) -> tuple:
        """Inputs and targets, int64 tensors, (n, block_size) each, at the places that n random uint64 select."""
        import torch  # here, since who only writes bins can do without it
        path, tokens, file = os.path.join(self.folder, f'{split}.bin'), self.tokens[split], self.files[split]
        offsets = (raw % np.uint64(len(tokens) - self.block_size)).astype(np.int64)
        rows = np.empty((len(raw), self.block_size + 1), tokens.dtype)
        for row, offset in zip(rows, offsets.tolist()):  # in a file cut meanwhile, the memory map would be a SIGBUS
            file.seek(offset * tokens.itemsize)
            if file.readinto(row) < row.nbytes:
                raise DataError(f'{path} was cut short while it was read: run {self.prepare} again', one_rank=True)
        if (most := rows.max(initial=0)) >= self.known:
            r, t = np.argwhere(rows == most)[0]
            found = f'{path} holds token id {most} at offset {offsets[r] + t:,}; vocab_size is {self.vocab_size}'
            if most >= self.model_vocab_size:
                raise DataError(f'{found}: run {self.prepare} again', one_rank=True)
            self.known = self.model_vocab_size
            print(f'note: {found}, but the model has room for it')
        return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))

    def train_batch(self, seed: int, step: int, part: int, parts: int, batch_size: int) -> tuple:
        """Micro-batch `part` of the `parts` of update `step`: (x, y), int64 tensors, (batch_size, block_size) each."""
        raw = draw(parts * batch_size, seed, 'train', step)
        return self._sequences('train', raw[part * batch_size:(part + 1) * batch_size])

    def eval_batches(self, split: str, count: int, batch_size: int, rank: int = 0,
                     world_size: int = 1) -> Iterator[tuple]:
        """
        The share of `rank` in the first `count` evaluation sequences of a split, the same ones in every run: yields
        (x, y, n) where n <= batch_size sequences count and the rest, for a fixed shape, has targets -1.
        """
        mine = draw(count, 'eval', split)[rank::world_size]
        for i in range(0, -(-count // world_size), batch_size):  # as many on every rank, perhaps with n == 0
            n = len(mine[i:i + batch_size])
            x, y = self._sequences(split, np.resize(mine[i:i + batch_size], batch_size))
            y[n or batch_size:] = -1
            yield x, y, n
