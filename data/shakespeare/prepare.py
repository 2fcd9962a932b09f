"""
Tiny Shakespeare: 1.1 MB of plays -> train.bin, val.bin, meta.json.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --tokenizer gpt2 --out data/shakespeare_gpt2

Downloaded once, to input.txt beside this script. The last tenth is for validation, cut after a line, so with
bytes (the default; the text is ASCII) losses compare with those that others report per character.

Not here: other texts (see data/text/prepare.py).
"""

import http.client
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import DataError, find_tokenizer, run, tokenizer_option, write_dataset
from files import write_atomically
from data.text.prepare import cut, read_documents
from options import option, parse_options

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SIZE = 1_115_394    # bytes


@dataclass
class ShakespeareConfig:
    about = 'Tiny Shakespeare, 1.1 MB of plays, downloaded once; the last tenth is for validation.'
    tokenizer: str = tokenizer_option('bytes')
    out: str = option('', 'folder for train.bin, val.bin and meta.json; none: that of this script')


def download(path):
    """URL -> path, whole or not at all. Raises DataError."""
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            data = response.read()
        if len(data) != SIZE:
            raise OSError(f'{len(data):,} bytes came, not {SIZE:,}')
    except (OSError, http.client.HTTPException) as e:
        raise DataError(f'cannot download Tiny Shakespeare ({e}): fetch {URL} elsewhere, '
                        f'and put it at {path}') from e
    write_atomically(path, lambda file: file.write(data))


def main():
    config, _ = parse_options(ShakespeareConfig, 'python data/shakespeare/prepare.py')
    spec, encoding = find_tokenizer(config.tokenizer)
    text = HERE / 'input.txt'
    if not text.exists():
        download(text)
    train, val = cut(read_documents([text])[0], 0.1)
    write_dataset(config.out or HERE, encoding, spec, train, val, 'Tiny Shakespeare')


if __name__ == '__main__':
    run(main)
