"""
FineWeb-Edu, sample-10BT (Penedo et al. 2024: web pages that teach something, what GPT-2 is trained on today) in GPT-2's
tokens: about ten billion, 20 GB.

    python data/fineweb_edu/prepare.py           fetches its parquet files from the hub; goes on where that was cut off
    python data/fineweb_edu/prepare.py FOLDER    reads *.parquet with a column `text` below FOLDER; no network

Documents keep their order, and each ends with <|endoftext|>; 0.05% of them become val. --limit=N reads N only.
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

if __name__ == '__main__':
    from_hub(HERE, 'HuggingFaceFW/fineweb-edu', 'sample/10BT/*.parquet')
