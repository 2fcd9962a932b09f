"""
FineWeb-Edu, the sample of ten billion tokens: text for GPT-2 scale -> train.bin, val.bin, meta.json.

    pip install datasets && python data/fineweb/prepare.py
    python data/fineweb/prepare.py --max_tokens 1000000000          # a tenth of it, about 2 GB

The text is streamed, never stored: 20 GB of disk for all of it (2 bytes a token), a few hundred MB of memory.
A hash of its text decides which split a document goes to, so no text is in both. If the connection is
lost, or on Ctrl-C, the data set is made of what has arrived.

Not tried yet on the real data set, for want of a network: only on a stand-in for the package `datasets`.

Not here: going on with such a part, shuffling (the sample comes shuffled), filtering, several processes,
other configurations of the data set.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import (DataError, encoded, find_tokenizer, in_val, run, tokenizer_option, until_stopped,
                         write_dataset)
from files import one_line
from options import option, parse_options, progress

DATASET, SAMPLE = 'HuggingFaceFW/fineweb-edu', 'sample-10BT'
BATCH = 2000                # documents encoded at once: about 2M tokens, about a second of work
VAL_FRACTION = 0.0005       # of the documents


@dataclass
class FinewebConfig:
    about = "FineWeb-Edu's sample of ten billion tokens, streamed."
    max_tokens: int = option(0, 'stop at so many train tokens; 0: at the end of the data set', at_least=0)
    tokenizer: str = tokenizer_option('gpt2')
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')


def batches():
    """Yields lists of BATCH texts. Raises DataError."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise DataError('streaming needs a package that nothing else here does: pip install datasets') from e
    try:
        rows = iter(load_dataset(DATASET, name=SAMPLE, split='train', streaming=True))
        while batch := [row['text'] for row in itertools.islice(rows, BATCH)]:
            yield batch
    except Exception as e:      # offline, server busy, ...: the packages below raise a dozen unrelated kinds
        raise DataError(f'cannot read {DATASET} ({one_line(e)}): check the network, and try again') from e


def pieces(encoding, spec, max_tokens):
    """Yields what write_dataset takes, until there is no more text, or enough of it."""
    documents = tokens = 0
    for batch in batches():
        for split in ('train', 'val'):
            texts = [text for text in batch if in_val(text, VAL_FRACTION) == (split == 'val')]
            piece = encoded(split, encoding, spec, texts)
            tokens += len(piece[1]) * (split == 'train')
            yield piece
        documents += len(batch)
        progress(f'{documents:,} documents, {tokens:,} train tokens')
        if max_tokens and tokens >= max_tokens:
            break
    progress()


def main():
    config, _ = parse_options(FinewebConfig, 'python data/fineweb/prepare.py')
    spec, encoding = find_tokenizer(config.tokenizer)
    text = until_stopped(pieces(encoding, spec, config.max_tokens))
    write_dataset(config.out, encoding, spec, text, f'{DATASET} {SAMPLE}')


if __name__ == '__main__':
    run(main)
