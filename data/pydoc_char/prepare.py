"""
Python's own reference manual, about 0.47 MB of English that every CPython carries, one token per character.
Needs no network. The text differs a little between Python versions, so there is no checksum.

    python data/pydoc_char/prepare.py
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the repo; with links, it may also stand here:
sys.path += [os.path.dirname(os.path.dirname(path)) for path in (os.path.realpath(HERE), os.environ.get('PWD', HERE))]
from pydoc_data.topics import topics  # noqa: E402

try:
    from data import bins, codec
except ImportError:
    sys.exit(f'{HERE} is neither in the repo nor linked from it: set PYTHONPATH to the folder of train.py')

text = '\n\n'.join(topics[name] for name in sorted(topics))
chars = codec.CharCodec.of(text)
ids = chars.encode(text)
cut = int(0.9 * len(ids))
bins.report(bins.write(HERE, chars, train=[ids[:cut]], val=[ids[cut:]]), len(text))
