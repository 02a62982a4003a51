"""Files damaged at random: refused with a DataError, or what was read is what was written. Never anything else."""

import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch

from data import DataError, bins, checkpoint, codec

from .conftest import save


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A copy with a few bytes changed, cut out, put in, doubled, or the end lost."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(raw) + 1)
        n = rng.choice((1, 1, 2, 8, 64))
        how = rng.randrange(5)
        if how == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            raw[at:at + n] = rng.randbytes(len(raw[at:at + n]))
        elif how == 2:
            del raw[at:at + n]
        elif how == 3:
            raw[at:at] = rng.choice((rng.randbytes(n), bytes(raw[at:at + n]), b'0', b'-', b'"', b'{', b'e9'))
        elif rng.random() < 0.1:
            del raw[at:]
    return bytes(raw)


def put(path, raw: bytes) -> None:
    with open(path, 'wb') as f:
        f.write(raw)


def get(path) -> bytes:
    with open(path, 'rb') as f:
        return f.read()


@pytest.fixture
def folder(dataset, tmp_path) -> str:
    return shutil.copytree(dataset, tmp_path / 'bins')


def read(folder):
    opened = bins.Bins(str(folder), 16)
    return opened.vocab_size, opened.state, {split: tokens.tobytes() for split, tokens in opened.tokens.items()}


def change(value, rng: random.Random):
    """A JSON value of another kind or size."""
    return rng.choice((None, True, False, 0, -1, 1 << 70, 1.5, '', 'gpt2', 'char', 'uint32', [], {}, [value],
                       {'a': value}, str(value), 'x' * 1000, float('nan')))


@pytest.mark.parametrize('name, cases', [('bins.json', 1500), ('train.bin', 200), ('val.bin', 200), ('meta.pkl', 500)])
def test_a_dataset_with_damaged_bytes(folder, name, cases):
    rng, path = random.Random(name), folder / name
    wanted, whole = read(folder), get(path)
    refused = 0
    for _ in range(cases):
        put(path, damaged(whole, rng))
        try:
            assert read(folder) == wanted
        except DataError:
            refused += 1
    assert refused > cases / 2


def test_bins_json_with_other_values(folder):
    rng, path = random.Random(2), folder / 'bins.json'
    wanted, whole = read(folder), json.loads(get(path))
    for _ in range(1000):
        index = json.loads(json.dumps(whole))
        place = rng.choice((index, index['splits'], index['splits']['train'], index['splits']['val']))
        key = rng.choice(sorted(place))
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = change(place[key], rng)
        put(path, json.dumps(index).encode())
        try:
            assert read(folder) == wanted
        except DataError:
            pass
    for raw in (b'', b'[]', b'null', b'3', b'"x"', b'[' * 100000, b'\xff\xfe', b'{"finished": true}'):
        put(path, raw)
        with pytest.raises(DataError):
            read(folder)


def test_meta_pkl_alone(tmp_path):
    """Nothing vouches for it: whatever opens must at least be a codec that inverts itself."""
    rng, path = random.Random(5), tmp_path / 'meta.pkl'
    for protocol in (0, 2, 4):
        whole = pickle.dumps(codec.CharCodec('\nabcdef').meta(), protocol)
        for _ in range(800):
            put(path, damaged(whole, rng))
            try:
                chars = codec.read_meta(str(path))
            except DataError:
                continue
            if isinstance(chars, codec.CharCodec):
                ids = np.arange(chars.vocab_size)
                assert (chars.encode(chars.decode(ids)) == ids).all()
            else:  # tokens of one's own may share a text, or have none
                ids = [i for i, text in enumerate(chars.texts) if text]
                assert chars.decode(chars.encode(chars.decode(ids))) == chars.decode(ids) or not ids


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def test_checkpoints_with_damaged_bytes(tmp_path):
    """Headers, directory and records of the zip alike; its tail, where the directory is, more often than the rest."""
    rng, path = random.Random(6), str(tmp_path / 'ckpt.pt')
    torch.manual_seed(0)
    saved = {'model': {'a.weight': torch.randn(9, 7), 'b': torch.randn(3)}, 'model_args': {'n_layer': 1, 'bias': False},
             'iter_num': 5, 'best_val_loss': 1.5, 'config': {'out_dir': 'x'}}
    save(path, saved)
    whole = get(path)
    refused = 0
    for i in range(1500):
        cut = rng.randrange(len(whole)) if i % 2 else len(whole) - rng.randrange(1200)
        put(path, whole[:cut] + damaged(whole[cut:] or whole[-1:], rng))
        try:
            assert same(saved, checkpoint.load(path))
        except DataError as e:
            refused += 1
            assert os.path.basename(path) in str(e)
    assert refused > 1000
