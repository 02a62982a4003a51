"""
Tiny Shakespeare (1.1 MB) in GPT-2's tokens: 301,966 for training, 36,059 for validation.

    python data/shakespeare/prepare.py

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
BINS = {'train': '502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f',
        'val': '68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b'}

if __name__ == '__main__':
    path = os.path.join(HERE, 'input.txt')
    published = fetched(path, URL, SHA256)
    prepare(HERE, [path], 'gpt2', expected=BINS if published else None)
