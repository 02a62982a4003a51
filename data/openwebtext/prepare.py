"""
OpenWebText (Gokaslan and Cohen 2019, an open copy of GPT-2's training text) in GPT-2's tokens: 8,013,769 documents,
9,035,582,198 tokens for training and 4,434,897 for validation, 18 GB.

    python data/openwebtext/prepare.py           fetches its parquet files from the hub; goes on where that was cut off
    python data/openwebtext/prepare.py FOLDER    reads *.parquet with a column `text` below FOLDER; no network

Documents keep their order, and each ends with <|endoftext|>. Those in val are the original's: the first 0.05% of a
permutation of seed 2357. --limit=N reads N documents only.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the repo; with links, it may also stand here:
sys.path += [os.path.dirname(os.path.dirname(path)) for path in (os.path.realpath(HERE), os.environ.get('PWD', HERE))]
try:
    from data.prepare import from_hub
except ImportError:
    sys.exit(f'{HERE} is neither in the repo nor linked from it: set PYTHONPATH to the folder of train.py')

if __name__ == '__main__':  # main holds a loading script, which nothing runs today; this pull request holds parquet
    from_hub(HERE, 'Skylion007/openwebtext', '**/*.parquet', revision='refs/pr/18', documents=8_013_769,
             tokens={'train': 9_035_582_198, 'val': 4_434_897})
