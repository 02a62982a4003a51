"""
Tiny Shakespeare (1.1 MB), one token per character: 1,003,854 for training, 111,540 for validation, 65 different ones.

    python data/shakespeare_char/prepare.py

An input.txt that stands in this folder is used instead of the download, whatever text it holds.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # the repo; with links, it may also stand here:
sys.path += [os.path.dirname(os.path.dirname(path)) for path in (os.path.realpath(HERE), os.environ.get('PWD', HERE))]
try:
    from data import fetched
    from data.prepare import prepare
except ImportError:
    sys.exit(f'{HERE} is neither in the repo nor linked from it: set PYTHONPATH to the folder of train.py')

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
BINS = {'train': '6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f',
        'val': 'd37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1'}

if __name__ == '__main__':
    path = os.path.join(HERE, 'input.txt')
    published = fetched(path, URL, SHA256)
    prepare(HERE, [path], 'char', expected=BINS if published else None)
