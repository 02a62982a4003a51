"""
OpenWebText (Gokaslan and Cohen 2019, an open copy of GPT-2's training text) in GPT-2's tokens: 8,013,769 documents,
9,035,582,198 tokens for training and 4,434,897 for validation, 18 GB.

    python data/openwebtext/prepare.py           fetches parquet files from the hub (datasets' cache takes 54 GB)
    python data/openwebtext/prepare.py FOLDER    reads *.parquet with a column `text` below FOLDER; no network

Documents are shuffled, then tokenized by all cores and streamed to disk in order: memory stays bounded, and any number
of cores writes the same files. Each document ends with <|endoftext|>.
"""

import glob
import multiprocessing
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the repo; with links, it may also stand here:
sys.path += [os.path.dirname(os.path.dirname(path)) for path in (os.path.realpath(HERE), os.environ.get('PWD', HERE))]
import numpy as np  # noqa: E402
from datasets import load_dataset  # noqa: E402
from datasets.exceptions import DatasetGenerationError  # noqa: E402
from tqdm import tqdm  # noqa: E402

try:
    from data import DataError, bins, codec
except ImportError:
    sys.exit(f'{HERE} is neither in the repo nor linked from it: set PYTHONPATH to the folder of train.py')

DOCUMENTS = 8_013_769
TOKENS = {'train': 9_035_582_198, 'val': 4_434_897}
gpt2 = codec.GPT2Codec()


def tokens_of(texts: list[str]) -> np.ndarray:
    """Ids of some documents, each with its end-of-text; null is an empty one."""
    return np.concatenate([np.append(gpt2.encode(text or ''), np.uint16(gpt2.end_of_text)) for text in texts])


def tokenized(documents, pool, title):
    """Arrays of ids, in the order of the documents, at most a few hundred documents in flight."""
    with tqdm(total=len(documents), unit=' docs', desc=title) as bar:
        batches = (documents[i:i + 64]['text'] for i in range(0, len(documents), 64))
        window = []
        for batch in batches:
            window.append((len(batch), pool.apply_async(tokens_of, (batch,))))
            if len(window) == 4 * pool._processes:
                n, result = window.pop(0)
                yield result.get()
                bar.update(n)
        for n, result in window:
            yield result.get()
            bar.update(n)


if __name__ == '__main__':
    gpt2.encode('')  # if the tokenizer cannot be had, that should be known before the download
    if sys.argv[1:]:
        files = sorted(glob.glob(os.path.join(glob.escape(sys.argv[1]), '**', '*.parquet'), recursive=True))
        if not files:
            raise DataError(f'no *.parquet below {sys.argv[1]}')
        try:
            documents = load_dataset('parquet', data_files=[glob.escape(file) for file in files], split='train',
                                     columns=['text'])
        except (ValueError, DatasetGenerationError) as e:
            why = str(e.__cause__ or e).splitlines()[0]
            raise DataError(f'{sys.argv[1]}: its parquet files need a column `text` ({why})') from e
        if len(documents) < 2:
            raise DataError(f'{sys.argv[1]} holds {len(documents)} documents: it takes two, to train and to validate')
    else:  # main holds a loading script, which datasets no longer runs; this pull request holds its text as parquet
        try:
            documents = load_dataset('Skylion007/openwebtext', revision='refs/pr/18', split='train')
        except OSError as e:  # ConnectionError is one
            raise DataError(f'OpenWebText could not be fetched ({type(e).__name__}). Without network: fetch its '
                            'parquet files elsewhere and run this with their FOLDER') from e
        if len(documents) != DOCUMENTS:
            raise DataError(f'{len(documents):,} documents, expected {DOCUMENTS:,}: the source has changed')
    split = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    with multiprocessing.get_context('spawn').Pool(os.cpu_count()) as pool:
        index = bins.write(HERE, gpt2, train=tokenized(split['train'], pool, 'train'),
                           val=tokenized(split['test'], pool, 'val'))
    bins.report(index)
    if not sys.argv[1:] and {k: e['tokens'] for k, e in index['splits'].items()} != TOKENS:
        raise DataError(f'expected {TOKENS}: the source or the tokenizer has changed')
