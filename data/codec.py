"""Text, and its way to token ids and back: byte-pair encodings, one id per character, or tokens of one's own."""

import functools
import io
import os
import pickle
import pickletools
import re

import numpy as np

from data import DataError

END_OF_TEXT = '<|endoftext|>'
# Where GPT-2's pattern always ends a piece: before white space, and before the last of several. Long texts are cut
# there: the same ids, less memory, no million of spaces, on which tiktoken fails. (\x1c-\x1f: space to Python alone.)
SPACE, OTHER = r'[^\S\x1c-\x1f]', r'[\S\x1c-\x1f]'
CUT = re.compile(f'(?<={OTHER})(?={SPACE})|(?<={SPACE})(?={SPACE}{OTHER})')


class BPECodec:
    """Byte-pair encoding by tiktoken: GPT-2's (Radford et al. 2019, section 2.2), or another that it knows by name.
    DataError if that cannot be had. GPT-2's is loaded when it is first needed, and training never needs it."""
    name = 'gpt2'
    vocab_size = 50257
    end_of_text = 50256  # stands between documents
    default_prompt = END_OF_TEXT

    def __init__(self, name: str = 'gpt2'):
        if name != 'gpt2':
            self.name = name
            self.vocab_size, self.end_of_text = self.bpe.n_vocab, self.bpe.eot_token

    @functools.cached_property
    def bpe(self):
        """tiktoken's encoder."""
        import tiktoken
        try:
            return tiktoken.get_encoding(self.name)
        except ValueError as e:
            known = ', '.join(sorted(tiktoken.list_encoding_names()))
            raise DataError(f'tokenizer {self.name}: choose char, or one that tiktoken knows: {known}') from e
        except Exception as e:  # requests, urllib3, tiktoken and the file system each raise their own
            raise DataError(
                f'the tokenizer {self.name} could not be loaded ({type(e).__name__}). Without network: fetch its files '
                'elsewhere; for gpt2 vocab.bpe and encoder.json from '
                'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/, saved as '
                '6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 in one folder; '
                'and set TIKTOKEN_CACHE_DIR to its absolute path') from e

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids, uint16, or uint32 for large vocabularies; '<|endoftext|>' is an id with special=True only, else text."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        if not text.isascii():  # lone surrogates cannot be tokenized
            text = text.encode('utf-8', 'replace').decode('utf-8')
        if special:
            return np.array(self.bpe.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=()), dtype)
        if len(text) <= 1 << 19:
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(dtype)
        ids, start = [], 0
        while len(text) - start > 1 << 19:
            cut = CUT.search(text, start + (1 << 19))
            end = cut.start() if cut else len(text)
            ids.append(self.bpe.encode_to_numpy(text[start:end], disallowed_special=()).astype(dtype))
            start = end
        ids.append(self.bpe.encode_to_numpy(text[start:], disallowed_special=()).astype(dtype))
        return np.concatenate(ids)

    def decode(self, ids) -> str:
        """Text of a sequence of ids; bytes that are no UTF-8 become U+FFFD. DataError for an id that has no text."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids) -> bytes:
        """UTF-8 bytes of a sequence of ids, which may begin or end inside a character."""
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise DataError(f'token id {bad[0]} is not in the vocabulary of {self.name}, {self.vocab_size}')
        try:
            return self.bpe.decode_bytes(ids)
        except KeyError:  # some encodings have ids without a text between those of their special tokens
            unused = set(ids) - set(self.bpe._mergeable_ranks.values()) - set(self.bpe._special_tokens.values())
            return self.bpe.decode_bytes([i for i in ids if i not in unused])

    def state(self) -> dict:
        return {'tokenizer': self.name}


class CharCodec:
    """One id per character: position of the character in `chars`."""
    name = 'char'
    end_of_text = None

    def __init__(self, chars: str):
        self.chars = chars
        self.vocab_size = len(chars)
        self.default_prompt = '\n' if '\n' in chars else chars[:1]
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


class TokenCodec:
    """Tokens of one's own, such as words: texts[i] is the text of id i, None where it has none. `raw`: the texts are
    bytes, kept as str with surrogates for those above 127. Where no id has a text, a text is ids such as '12 7 3'."""
    name, end_of_text = 'tokens', None

    def __init__(self, texts: list[str | None], raw: bool = False):
        self.texts, self.raw, self.vocab_size = texts, raw, len(texts)
        self.itos = {i: text for i, text in enumerate(texts) if text}
        self.ids = {text: i for i, text in self.itos.items()}
        self.longest_first = re.compile('|'.join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or '(?!)')
        self.default_prompt = '\n' if '\n' in self.ids else next(iter(self.ids), '0 ')

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of `text`, uint32, the longest token that fits first. DataError naming what has no id."""
        if self.ids:
            text = text.encode('utf-8', 'surrogateescape').decode('ascii', 'surrogateescape') if self.raw else text
            pieces = self.longest_first.findall(text)
            if ''.join(pieces) != text:
                known = len(os.path.commonprefix((''.join(pieces), text)))
                raise DataError(f'no token is at the beginning of {text[known:known + 20]!r}: {list(self.ids)[:9]}...')
            return np.array([self.ids[piece] for piece in pieces], np.uint32)
        if unknown := [word for word in text.split() if not word.isdecimal() or int(word) >= self.vocab_size]:
            raise DataError(f'{unknown[0]!r} is no id: this dataset has {self.vocab_size}, and no text for any')
        return np.array(list(map(int, text.split())), np.uint32)

    def decode(self, ids) -> str:
        """Texts of a sequence of ids, joined as they are; <i> where id i has none."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_bytes(self, ids) -> bytes:
        if not self.ids:
            return ''.join(f'{i} ' for i in ids).encode()
        text = ''.join(f'<{i}>' if self.texts[i] is None else self.texts[i] for i in map(int, ids))
        return text.encode('ascii', 'surrogateescape') if self.raw else text.encode('utf-8', 'replace')

    def state(self) -> dict:
        return {'tokenizer': self.name, 'texts': self.texts, 'raw': self.raw}

    def meta(self) -> dict:
        """What a meta.pkl holds."""
        as_they_are = (lambda text: text.encode('ascii', 'surrogateescape')) if self.raw else str
        return {'vocab_size': self.vocab_size, 'itos': {i: as_they_are(text) for i, text in self.itos.items()}}


def from_state(state: dict) -> BPECodec | CharCodec | TokenCodec:
    """The codec that .state() of another described; what a checkpoint stores. DataError for anything else."""
    kind = state.get('tokenizer') if isinstance(state, dict) else None
    if kind == 'char' and type(state.get('chars')) is str and state['chars']:
        return CharCodec(state['chars'])
    texts = state.get('texts') if kind == 'tokens' else None
    if isinstance(texts, list) and texts and all(text is None or type(text) is str for text in texts):
        return TokenCodec(texts, bool(state.get('raw')))
    if type(kind) is str and kind not in ('char', 'tokens') and len(state) == 1:
        return BPECodec(kind)
    raise DataError('the tokenizer stored here is unknown; expected a name that tiktoken knows, char or tokens')


class _Plain(pickle.Unpickler):
    """Builds dict, str, int and the like, and numpy's numbers; whatever asks for another class is refused."""

    def __init__(self, raw: bytes):
        for op, argument, _ in pickletools.genops(raw):
            if 'PUT' in op.name and int(argument) > len(raw):  # a memo of that size would be allocated
                raise pickle.UnpicklingError(f'{op.name} {argument} is not allowed here')
        super().__init__(io.BytesIO(raw))

    def find_class(self, module, name):
        if (module.replace('_core', 'core'), name) in (('numpy.core.multiarray', 'scalar'), ('numpy', 'dtype')):
            return np.dtype if name == 'dtype' else _scalar
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed here')


def _scalar(dtype: np.dtype, raw: bytes) -> int:
    """An integer that was pickled as one of numpy's."""
    if type(raw) is not bytes or dtype.kind not in 'iu' or len(raw) != dtype.itemsize:
        raise pickle.UnpicklingError('a number of numpy is no integer')
    return int(np.frombuffer(raw, dtype)[0])


def read_meta(path: str) -> CharCodec | TokenCodec:
    """The codec of a meta.pkl: of characters if each id has one, else of tokens. Runs no code. Raises DataError."""
    again = 'prepare the dataset again'
    try:
        with open(path, 'rb') as f:
            meta = _Plain(f.read()).load()
    except Exception as e:  # a broken pickle raises nearly anything
        raise DataError(f'{path} cannot be read ({type(e).__name__}: {e}): {again}') from e
    n, itos = (meta.get('vocab_size'), meta.get('itos', {})) if isinstance(meta, dict) else (None, None)
    itos = dict(enumerate(itos)) if isinstance(itos, (list, tuple)) else itos
    if type(n) is not int or not 1 <= n < 1 << 24 or not isinstance(itos, dict):
        raise DataError(f'{path} has no vocab_size below 2^24, or an itos that is no dict or list: {again}')
    known = itos.values()
    if any(type(i) is not int or not 0 <= i < n for i in itos) or any(type(t) not in (str, bytes) for t in known):
        raise DataError(f'{path} gives texts to ids that are not below vocab_size={n}, or no texts: {again}')
    if len(itos) == n == len(set(known)) and all(type(t) is str and len(t) == 1 for t in known):
        return CharCodec(''.join(itos[i] for i in range(n)))
    raw = any(type(t) is bytes for t in known)
    if raw:
        itos = {i: (t if type(t) is bytes else t.encode()).decode('ascii', 'surrogateescape') for i, t in itos.items()}
    return TokenCodec([itos.get(i) for i in range(n)], raw)


def of_folder(folder: str) -> BPECodec | CharCodec | TokenCodec:
    """The codec of a dataset, or a model in transformers' format: by meta.pkl, else GPT-2's. Or DataError."""
    if os.path.exists(meta := os.path.join(folder, 'meta.pkl')):
        return read_meta(meta)
    path = next((p for n in ('tokenizer.json', 'vocab.json') if os.path.exists(p := os.path.join(folder, n))), None)
    if path:
        with open(path, encoding='utf-8', errors='replace') as f:
            gpt2 = re.search(r'"(\u0120|\\u0120)gazed":\s*50255\b', f.read())  # its last token but <|endoftext|>
        if not gpt2:
            raise DataError(f'{path} is not GPT-2\'s tokenizer, and the meta.pkl that export.py writes is not there')
    return BPECodec()


def of_checkpoint(checkpoint: dict) -> BPECodec | CharCodec | TokenCodec:
    """The codec that a checkpoint stores; of an older one, that of its dataset, if that is in data/."""
    if 'codec' in checkpoint:
        return from_state(checkpoint['codec'])
    folder = str(checkpoint.get('config', {}).get('dataset', ''))
    return of_folder(os.path.join(os.path.dirname(os.path.realpath(__file__)), folder))
