"""
What every data/NAME/prepare.py shares: options, errors, encoding documents, writing a data set.

A data set is a directory with
    train.bin, val.bin    raw uint16 token ids; after each document comes the id of <|endoftext|>
    meta.json             'tokenizer' (spec, see tokenizer.py), 'vocab_size', 'train_tokens', 'val_tokens',
                          'train_bytes', 'val_bytes' (of UTF-8 text, without the separators), 'source'
so that bits per byte = loss in nats / ln 2 * val_tokens / val_bytes.

Left out: token ids of more than 16 bits.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from options import OneLineParser, fail, unknown
from tokenizer import TokenizerError

MAX_VOCAB = 2 ** 16     # what uint16 can tell apart
MIN_TOKENS = 256        # less than that in either split trains or measures nothing


class DataError(Exception):
    """Data that cannot be had, read or written; the message is one line for the user, remedy included."""


class Options(OneLineParser):
    """The command line of a prepare.py: the module's docstring is its --help, an error is one line (exit code 2)."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self):
        options, rest = self.parse_known_args()
        if rest:
            fail(unknown(rest[0].lstrip('-').split('=')[0], list(vars(options))))
        return options

    def add_tokenizer(self, default):
        self.add_argument('--tokenizer', default=default, metavar='NAME',
                          help=f"python4k, bytes, gpt2, or a directory with GPT-2's two files (default: {default})")

    def add_out(self, default):
        self.add_argument('--out', type=Path, default=default, metavar='DIR',
                          help='where train.bin, val.bin and meta.json go (default: beside this script)')

    def add_val_fraction(self, default):
        self.add_argument('--val_fraction', type=fraction, default=default, metavar='X',
                          help=f'share of the text kept for validation (default: {default})')


def fraction(text):
    """option type: a number strictly between 0 and 1, as a share of the text"""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a number between 0 and 1 expected, found '{text}'")
    return value


def run(main):
    """Calls main() and turns what a user can cause into one line on stderr and a non-zero exit code."""
    sys.stdout.reconfigure(errors='replace')    # a file's name may have characters that the terminal lacks
    try:
        main()
    except (DataError, TokenizerError) as e:
        fail(str(e), 1)
    except OSError as e:
        fail(f'{e.filename or "input or output"}: {e.strerror or e}', 1)
    except KeyboardInterrupt:
        fail('interrupted; run the same command again', 130)


def check_vocab(encoding):
    """encoding: tiktoken.Encoding. Raises DataError if its ids do not fit 16 bits."""
    if encoding.n_vocab > MAX_VOCAB:
        raise DataError(f'a vocabulary of {encoding.n_vocab:,} does not fit the 16-bit token files '
                        f'(at most {MAX_VOCAB:,}): choose a smaller tokenizer')


def encode_documents(encoding, documents):
    """documents: list of str -> (tokens,) uint16, each document followed by <|endoftext|>"""
    check_vocab(encoding)
    end = np.array([encoding.n_vocab - 1], dtype=np.uint32)
    parts = []
    for document in documents:
        # a literal '<|endoftext|>' inside a document is plain text (disallowed_special=())
        parts += [encoding.encode_to_numpy(document, disallowed_special=()), end]
    return np.concatenate(parts).astype(np.uint16) if parts else np.zeros(0, dtype=np.uint16)


def utf8_bytes(documents):
    return sum(len(document.encode('utf-8')) for document in documents)


def temporary(path):
    """path: Path -> the name it has until it is complete; the process id keeps two runs at once apart"""
    return path.with_name(f'{path.name}.{os.getpid()}.tmp')


def write_file(path, data):
    """data: bytes or a contiguous array. On return they are on the disk, not just in its cache."""
    with open(path, 'wb') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def replace_file(path, data):
    """Writes data to path, which is the old file or the whole new one at any moment."""
    try:
        write_file(temporary(path), data)
        os.replace(temporary(path), path)
    finally:
        temporary(path).unlink(missing_ok=True)


def make_meta(encoding, spec, source, tokens, size):
    """tokens, size: dicts with the tokens and the bytes of text in 'train' and 'val' -> contents of meta.json"""
    for split in ('train', 'val'):
        if tokens[split] < MIN_TOKENS:
            raise DataError(f'too little text: {tokens[split]} {split} tokens where {MIN_TOKENS} are the least; '
                            'add text, or change the share kept for validation')
    return {'tokenizer': spec, 'vocab_size': encoding.n_vocab, 'train_tokens': tokens['train'],
            'val_tokens': tokens['val'], 'train_bytes': size['train'], 'val_bytes': size['val'], 'source': source}


def publish(folder, complete, meta):
    """
    Gives a finished data set its names. complete: dict of final name -> Path of the finished token file; one that is
    gone has its final name already, from a call that was cut short. meta: contents of meta.json. That one goes first
    and comes back last, so that where there is one, train.bin and val.bin are its own, wherever a kill falls.
    """
    meta_file = folder / 'meta.json'
    try:
        write_file(temporary(meta_file), json.dumps(meta).encode('ascii'))
        meta_file.unlink(missing_ok=True)
        for name, path in complete.items():
            if path.exists():
                os.replace(path, folder / name)
        os.replace(temporary(meta_file), meta_file)
    finally:
        temporary(meta_file).unlink(missing_ok=True)
    print(f"{meta['source']}: {meta['train_bytes'] / 1e6:,.2f} + {meta['val_bytes'] / 1e6:,.2f} MB (train + val)\n"
          f"{folder}: {meta['train_tokens']:,} + {meta['val_tokens']:,} tokens of {meta['vocab_size']:,} kinds, "
          f"{meta['train_bytes'] / meta['train_tokens']:.2f} bytes per token")


def write_dataset(folder, encoding, spec, train, val, source):
    """
    folder: Path, made if need be; train, val: lists of str, the documents of the two splits; source: one line saying
    what the text is. Writes train.bin, val.bin and meta.json: an old data set stays until the new one is complete.
    Raises DataError when a split is too small.
    """
    splits = {'train': train, 'val': val}
    bins = {split: encode_documents(encoding, documents) for split, documents in splits.items()}
    meta = make_meta(encoding, spec, source, {split: len(ids) for split, ids in bins.items()},
                     {split: utf8_bytes(documents) for split, documents in splits.items()})
    folder.mkdir(parents=True, exist_ok=True)
    complete = {f'{split}.bin': temporary(folder / f'{split}.bin') for split in bins}
    try:
        for split, ids in bins.items():
            write_file(complete[f'{split}.bin'], ids)
        publish(folder, complete, meta)
    finally:
        for path in complete.values():
            path.unlink(missing_ok=True)
