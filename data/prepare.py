"""
Your own texts as a dataset, the bins that train.py reads:

    python data/prepare.py mine my.txt                                   one file: its last tenth becomes val
    python data/prepare.py mine folder/ more.jsonl.gz '2024/*.parquet'   folders and globs, too
    python data/prepare.py mine my.txt --tokenizer=char                  one token a character, for small models

Plain text is .txt and .md, and any other file that is named itself, one document a file; .jsonl and .parquet hold many,
each in the field `text`. All but .parquet may be packed as .gz or .zst. The dataset is the folder data/mine, or a path
with a slash. After a kill, run it again.
"""

import argparse
import itertools
import os
import runpy
import shlex
import sys

REPO = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[:0] = [REPO] * (REPO not in sys.path)
from tqdm import tqdm  # noqa: E402

from data import DataError, bins, codec  # noqa: E402
from data import documents as docs  # noqa: E402


def prepare(folder: str, paths: list[str], tokenizer: str = 'gpt2', val: float = 0.1, seed: int = 1337,
            field: str = 'text', documents: bool | None = None, num_proc: int | None = None, limit: int | None = None,
            is_val=None, empty: bool = False, expected: dict | None = None) -> dict:
    """
    Write the bins of all documents in `paths`, see documents.pieces(). documents: whether to mark the end of each, by
    <|endoftext|>, with char by an empty line; None: where there are several. empty: also of those without text, which
    are left out otherwise. Returns what bins.json holds, and `found`: documents and characters. Raises DataError, also
    if the sha256 of the bins are not those expected.
    """
    files = docs.files_of(paths)
    plain = all(docs.kind(path) in (docs.TEXT, None) for path in files)
    files = files[:limit] if plain else files
    is_val = is_val or (None if plain else docs.random_share(val, seed))
    total, found = sum(map(os.path.getsize, files)), {'documents': 0, 'characters': 0}
    num_proc = num_proc or min(os.cpu_count(), 1 + total // (4 * docs.PIECE))
    documents = not (plain and len(files) == 1) if documents is None else documents

    def each(work, title, **given):
        with tqdm(total=total, unit='B', unit_scale=True, desc=title, delay=1, leave=False) as bar:
            source = docs.pieces(files, field, val, is_val, limit)
            for result, piece in docs.by_all_cores(work, source, {'field': field, 'empty': empty, **given}, num_proc):
                yield result
                bar.update(round(piece.position) - bar.n)
                bar.set_postfix({key: f'{n:,}' for key, n in found.items()}, refresh=False)

    if tokenizer == 'char':
        between = '\n\n' if documents else ''
        codes = codec.CharCodec.of(between + ''.join(set().union(*each(docs.characters_of, 'characters'))))
        end = codes.encode(between)
    else:
        codes = codec.BPECodec(tokenizer)
        end = codes.encode(codec.END_OF_TEXT, special=True)

    def ids():
        for splits, n, size in each(docs.ids_of, 'tokens', tokenizer=codes, end=end if documents else None):
            found.update(documents=found['documents'] + n, characters=found['characters'] + size)
            yield from splits.items()

    stream = ids()
    if not (first := list(itertools.islice(stream, 1))):
        raise DataError(f'{", ".join(map(str, paths))}: there is no text in it')
    index = bins.write(folder, codes, itertools.chain(first, stream))
    bins.report(index, found['characters'], expected)
    return {**index, 'found': found}


def from_hub(folder: str, repo: str, pattern: str, revision: str | None = None, documents: int | None = None,
             tokens: dict | None = None) -> None:
    """The script of a published dataset of parquet files, or of those in the folder that its command line names. With
    `documents`, val is nanoGPT's of OpenWebText, and DataError says if there are not so many, or not so many tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', nargs='?')
    parser.add_argument('--limit', type=int)
    given = parser.parse_args()
    codec.BPECodec().encode('')  # if it cannot be had, that should be known before the download
    if given.folder is None:
        from huggingface_hub import snapshot_download
        try:
            path = snapshot_download(repo, repo_type='dataset', revision=revision, allow_patterns=pattern)
        except Exception as e:  # no network, no such repo, no space, each its own
            raise DataError(f'{repo} could not be fetched ({type(e).__name__}). Without network: fetch its parquet '
                            'files elsewhere and run this with their FOLDER') from e
    paths = [f for f in docs.files_of([given.folder or path]) if docs.kind(f) == docs.PARQUET]
    if (n := docs.count_rows(paths)) < 2:
        raise DataError(f'{given.folder or path} holds {n} documents in parquet: to train and validate takes two')
    is_val = docs.of_permutation(0.0005, 2357, n) if documents else docs.random_share(0.0005, 2357)
    index = prepare(folder, paths, limit=given.limit, is_val=is_val, empty=True)
    got = {split: entry['tokens'] for split, entry in index['splits'].items()}
    if not given.folder and not given.limit and tokens and (n, got) != (documents, tokens):
        raise DataError(f'expected {documents:,} documents, {tokens}: the source or the tokenizer has changed')


def advice(index: dict, name: str) -> str:
    """The two commands to run next, with a config that fits, and how often that one reads the text."""
    train, val = (index['splits'][split]['tokens'] for split in ('train', 'val'))
    config = 'finetune_shakespeare' if index['tokenizer'] == 'gpt2' and train < 100_000_000 else 'train_gpt2'
    if index['tokenizer'] == 'char':
        import torch
        large = torch.cuda.is_available() or torch.backends.mps.is_available()
        config = 'train_shakespeare_char' if large else 'train_shakespeare_char_cpu'
    given = {'block_size': 1024, **runpy.run_path(os.path.join(REPO, 'config', f'{config}.py'))}
    block, fits = given['block_size'], min(train, val) - 1
    tokens = given['max_iters'] * given['gradient_accumulation_steps'] * given['batch_size'] * min(block, fits)
    if fits < 8:
        raise DataError(f'train has {train} tokens and val {val}: too few to train on; add text')
    out_dir = f'--out_dir=out-{os.path.basename(name)}'
    options = [f'--dataset={name}', out_dir, *['--init_from=gpt2'] * (config == 'finetune_shakespeare'),
               *[f'--block_size={fits}'] * (fits < block)]
    return (f'config/{config}.py reads {tokens:,} tokens, the train part {tokens / train:,.1f} times\n\n'
            f'    python train.py config/{config}.py {shlex.join(options)}\n'
            f'    python sample.py {shlex.quote(out_dir)}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', help='of the dataset, a folder in data/; or a path to one, with a slash')
    parser.add_argument('paths', nargs='+', help='files, folders, globs')
    parser.add_argument('--tokenizer', default='gpt2', help='gpt2, char, or another encoding of tiktoken by its name')
    parser.add_argument('--field', default='text', help='of a record in .jsonl, or column in .parquet')
    parser.add_argument('--val', type=float, default=0.1, help='share held back: the end of plain text, else documents')
    parser.add_argument('--seed', type=int, default=1337, help='which documents are held back')
    parser.add_argument('--documents', choices=('True', 'False'), help='mark the end of each, by <|endoftext|>, with '
                        'char by an empty line; default: if there are several')
    parser.add_argument('--num_proc', type=int, help='processes that tokenize; default: all cores')
    parser.add_argument('--limit', type=int, help='read so many documents only')
    given = vars(parser.parse_args())
    name = given.pop('name')
    if not 0 < given['val'] < 1 or any(n is not None and n < 1 for n in (given['num_proc'], given['limit'])):
        parser.error('--val must lie between 0 and 1, --num_proc and --limit be at least 1')
    if name in ('', '.', '..') or given['seed'] < 0:
        parser.error(f'{name!r} is no name for a dataset, or --seed={given["seed"]} is negative')
    folder = os.path.abspath(name) if os.sep in name else os.path.join(REPO, 'data', name)
    name = os.path.basename(folder) if os.path.dirname(folder) == os.path.join(REPO, 'data') else folder
    given['documents'] = {'True': True, 'False': False}.get(given['documents'])
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if 'prepare.py' in there or ('train.bin' in there and 'bins.json' not in there):
        raise DataError(f'{folder} has a prepare.py of its own, or bins of another program: choose another name')
    if 'train.bin.tmp' in there:
        print(f'note: an earlier run in {folder} was not finished; starting again')
    index = prepare(folder, **given)
    print(f'{index["found"]["documents"]:,} document(s) in {os.path.relpath(folder)}', advice(index, name), sep='\n')
