"""Text, and its way to token ids and back: GPT-2's byte-pair encoding, or one id per character."""

import functools
import hashlib
import io
import os
import pickle
import pickletools
import re

import numpy as np

from data import DataError

END_OF_TEXT = '<|endoftext|>'
# Where GPT-2's pattern always ends a piece: before white space, and before the last of several. Long texts are cut
# there, which bounds the memory and keeps runs of white space below the million that overflows tiktoken's stack; the
# ids stay the same. (\x1c-\x1f are space to Python alone.)
SPACE, OTHER = r'[^\S\x1c-\x1f]', r'[\S\x1c-\x1f]'
CUT = re.compile(f'(?<={OTHER})(?={SPACE})|(?<={SPACE})(?={SPACE}{OTHER})')


def read_text(path: str, url: str | None = None, sha256: str | None = None) -> tuple[str, bool]:
    """
    The text of a UTF-8 file, newlines as \\n, and whether it is the published one. A missing file is fetched from
    `url` and must then have the given hash; a file that is there is used whatever it holds, with a line that says so.
    Raises DataError; nothing half-written stays behind.
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
        raw = f.read()
    if not raw:
        raise DataError(f'{path} is empty: put a text there, or remove it to fetch the published one')
    published = hashlib.sha256(raw).hexdigest() == sha256
    if not published:
        print(f'note: {path} is not the published text; going on with it as it is')
    try:
        return raw.decode('utf-8').removeprefix('\ufeff').replace('\r\n', '\n'), published
    except UnicodeDecodeError as e:
        raise DataError(f'{path} is not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start:,}') from None


class GPT2Codec:
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2) through tiktoken."""
    name = 'gpt2'
    vocab_size = 50257
    end_of_text = 50256  # stands between documents

    @functools.cached_property
    def bpe(self):
        """tiktoken's encoder, loaded when it is first needed: training on bins never does."""
        import tiktoken
        try:
            return tiktoken.get_encoding('gpt2')
        except Exception as e:  # requests, urllib3, tiktoken and the file system each raise their own
            raise DataError(
                f'the GPT-2 tokenizer could not be loaded ({type(e).__name__}). Without network: fetch vocab.bpe and '
                'encoder.json from https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/ elsewhere, save '
                'them as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 in '
                'one folder, and set TIKTOKEN_CACHE_DIR to its absolute path') from e

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of `text`, uint16. '<|endoftext|>' in it stays text unless special=True, which makes it the id 50256."""
        text = text.encode('utf-8', 'replace').decode('utf-8')  # lone surrogates cannot be tokenized
        if special:
            return np.array(self.bpe.encode(text, allowed_special={END_OF_TEXT}), np.uint16)
        ids, start = [], 0
        while len(text) - start > 1 << 19:
            cut = CUT.search(text, start + (1 << 19))
            end = cut.start() if cut else len(text)
            ids.append(self.bpe.encode_to_numpy(text[start:end], disallowed_special=()).astype(np.uint16))
            start = end
        ids.append(self.bpe.encode_to_numpy(text[start:], disallowed_special=()).astype(np.uint16))
        return np.concatenate(ids)

    def decode(self, ids) -> str:
        """Text of a sequence of ids; bytes that are no UTF-8 become U+FFFD. DataError for an id that has no text."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids) -> bytes:
        """UTF-8 bytes of a sequence of ids, which may begin or end inside a character."""
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise DataError(f'token id {bad[0]} is not in the GPT-2 vocabulary of {self.vocab_size}')
        return self.bpe.decode_bytes(ids)

    def state(self) -> dict:
        return {'tokenizer': self.name}


class CharCodec:
    """One id per character: position of the character in `chars`."""
    name = 'char'
    end_of_text = None

    def __init__(self, chars: str):
        self.chars = chars
        self.vocab_size = len(chars)
        self.itos = dict(enumerate(chars))
        self.ids = {c: i for i, c in self.itos.items()}

    @classmethod
    def of(cls, text: str) -> 'CharCodec':
        """The characters that occur in `text`, sorted."""
        return cls(''.join(sorted(set(text))))

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of `text`, uint16 or, for large alphabets, uint32. DataError naming a character that has no id."""
        if unknown := sorted(set(text) - set(self.ids)):
            raise DataError(f'character {unknown[0]!r} is not among the {self.vocab_size} known ones: {self.chars!r}')
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return np.fromiter(map(self.ids.__getitem__, text), dtype, len(text))

    def decode(self, ids) -> str:
        """Text of a sequence of ids. DataError for an id that has no character."""
        try:
            return ''.join(map(self.itos.__getitem__, map(int, ids)))
        except KeyError as e:
            raise DataError(f'token id {e} is not in the vocabulary of {self.vocab_size} characters') from None

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode('utf-8', 'replace')

    def state(self) -> dict:
        return {'tokenizer': self.name, 'chars': self.chars}

    def meta(self) -> dict:
        """What meta.pkl holds: plain dicts, as older scripts read them."""
        return {'vocab_size': self.vocab_size, 'itos': dict(enumerate(self.chars)), 'stoi': self.ids}


def from_state(state: dict) -> GPT2Codec | CharCodec:
    """The codec that .state() of another described; what a checkpoint stores. DataError for anything else."""
    if state == {'tokenizer': 'gpt2'}:
        return GPT2Codec()
    chars = state.get('chars') if isinstance(state, dict) and state.get('tokenizer') == 'char' else None
    if chars and type(chars) is str:
        return CharCodec(chars)
    raise DataError('the tokenizer stored here is unknown; expected gpt2 or char')


class _Plain(pickle.Unpickler):
    """Builds dict, str and int, which need no class look-up; whatever asks for one is refused before it runs."""

    def __init__(self, raw: bytes):
        for op, argument, _ in pickletools.genops(raw):
            if 'PUT' in op.name and int(argument) > len(raw):  # a memo of that size would be allocated
                raise pickle.UnpicklingError(f'{op.name} {argument} is not allowed here')
        super().__init__(io.BytesIO(raw))

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed here')


def read_meta(path: str) -> CharCodec:
    """The character codec of a meta.pkl. Runs no code from the file. DataError says to prepare again."""
    again = f'run python {os.path.join(os.path.dirname(path), "prepare.py")} again'
    try:
        with open(path, 'rb') as f:
            meta = _Plain(f.read()).load()
    except Exception as e:  # a broken pickle raises nearly anything
        raise DataError(f'{path} cannot be read ({type(e).__name__}: {e}): {again}') from e
    itos = meta.get('itos') if isinstance(meta, dict) else None
    n = meta.get('vocab_size') if isinstance(meta, dict) else None
    if type(n) is not int or not isinstance(itos, dict) or n < 1:
        raise DataError(f'{path} has no vocab_size or no itos: {again}')
    if (set(map(type, itos)) != {int} or len(itos) != n or sorted(itos) != list(range(n))
            or any(type(c) is not str or len(c) != 1 for c in itos.values())
            or len(set(itos.values())) != n):
        raise DataError(f'{path} does not give one character to each of {n} ids: {again}')
    return CharCodec(''.join(itos[i] for i in range(n)))


def of_folder(folder: str) -> GPT2Codec | CharCodec:
    """The codec of a dataset folder: its meta.pkl, or GPT-2's BPE where there is none."""
    meta = os.path.join(folder, 'meta.pkl')
    return read_meta(meta) if os.path.exists(meta) else GPT2Codec()
