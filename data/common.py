"""
Data sets: writing them, which every data/NAME/prepare.py does with this, and reading them for training.

    spec, encoding = find_tokenizer('python4k')
    pieces = [encoded('train', encoding, spec, ['a document']), encoded('val', encoding, spec, ['another'])]
    write_dataset('data/mine', encoding, spec, pieces, 'my own words')
    train, val, meta = load_dataset('mine', block_size=256)

A data set is a folder with
    train.bin, val.bin    raw token ids, uint16, or uint32 if the vocabulary needs it; before each document
                          stands the tokenizer's BOS, if it has one, and after it the end token
    meta.json             'tokenizer' (spec, see tokenizer.py), 'vocab_size', 'train_tokens', 'val_tokens',
                          'train_bytes', 'val_bytes' (of UTF-8 text, without end tokens), 'source' (one line);
                          and 'window', if both files are made of independent windows of so many tokens
so that bits per byte = loss in nats / ln 2 * val_tokens / val_bytes.

Not here: drawing batches, which train.py does.
"""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import DAMAGED, one_line, read_json, write_atomically
from options import fail, is_out_of_memory, option
from tokenizer import TokenizerError, bos_ids, dialogue_ids, end_id, load_tokenizer, tokenizer_spec

DATA = Path(__file__).resolve().parent
MIN_TOKENS = 256                    # in either split, at least: fewer train and measure nothing


class DataError(Exception):
    """Data that cannot be had, read or written; the message is one line for the user, remedy included."""


def run(main, memory='end other programs, or take less at once'):
    """
    Calls main() and turns errors that users can cause into one line on stderr and a non-zero exit code.
    memory: the remedy if it runs out.
    """
    try:
        if sys.stdout is not None:      # None: it was closed before the start
            sys.stdout.reconfigure(errors='replace')    # a file's name may hold what the terminal cannot show
        main()
        print(end='', flush=True)
    except (DataError, TokenizerError) as e:
        fail(e, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # for what Python still writes at its end
        sys.exit(141)
    except (OSError, MemoryError, RuntimeError) as e:
        if is_out_of_memory(e):
            fail(f'out of memory; {memory}', 1)
        if not isinstance(e, OSError):
            raise
        name = e.filename2 or e.filename or 'disk or stdout'
        fail(f'{name}: {e.strerror or e}; files saved earlier are intact', 1)
    except KeyboardInterrupt:
        fail('interrupted; run the same command again', 130)


# -----------------------------------------------------------------------------
# writing


def in_val(text, fraction):
    """Whether text, a document or its name, is for validation: a hash decides, on every machine alike."""
    return int(hashlib.sha256(text.encode('utf-8')).hexdigest()[:8], 16) < fraction * 2 ** 32


def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 2 ** 16 else np.uint32


def tokenizer_option(default):
    return option(default, "python4k, bytes, gpt2, a model's name, folder or .gguf file, or a folder with a "
                           "tokenizer's files")


def find_tokenizer(name):
    """What tokenizer_option() takes -> spec, Encoding. Raises DataError or TokenizerError."""
    if name in ('python4k', 'bytes', 'gpt2'):
        spec = tokenizer_spec(name)
    else:
        import weights      # imports torch, which takes seconds
        try:
            spec = weights.tokenizer_of(name)
        except weights.CheckpointError as e:
            raise DataError(str(e)) from None
    return spec, load_tokenizer(spec)


def document_ids(spec, encoding, document):
    """document: str, or a dialogue, a tuple of (role, text) -> ids, with BOS, if there is one, and the end"""
    if isinstance(document, str):
        # a literal '<|endoftext|>' inside a document is plain text
        ids = bos_ids(spec) + encoding.encode_ordinary(document)
    else:
        ids = dialogue_ids(spec, encoding, document, reply=False)
    return [*ids, end_id(spec, encoding)]


def encoded(split, encoding, spec, documents):
    """documents: list of what document_ids takes -> a piece for write_dataset"""
    dtype = token_dtype(encoding.n_vocab)
    encode = lambda document: np.array(document_ids(spec, encoding, document), dtype)
    with ThreadPoolExecutor() as pool:      # tiktoken works outside Python's lock
        ids = np.concatenate([np.zeros(0, dtype), *pool.map(encode, documents)])
    size = sum(len(document.encode('utf-8')) if isinstance(document, str) else
               len(encoding.decode_bytes(dialogue_ids(spec, encoding, document, reply=False)))
               for document in documents)       # of a dialogue, the template counts too
    return split, ids, size


def write_dataset(folder, encoding, spec, pieces, source, **more):
    """
    Writes train.bin, val.bin and meta.json into a folder, made if need be; an old data set stays until the
    new one is complete. pieces: iterable of (split, ids of type token_dtype(), bytes of text), each of which
    goes to the end of train.bin or val.bin; source: one line that says what the text is; more: for meta.json.
    Raises DataError if a split is too small.
    """
    folder, splits = Path(folder), ('train', 'val')
    folder.mkdir(parents=True, exist_ok=True)
    tokens, size = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    parts = {split: open(folder / f'{split}.bin.part', 'wb') for split in splits}
    try:
        for split, ids, count in pieces:
            parts[split].write(ids)
            tokens[split] += len(ids)
            size[split] += count
        for split in splits:
            if tokens[split] < MIN_TOKENS:
                raise DataError(f'too little text: {tokens[split]} {split} tokens, and at least {MIN_TOKENS} '
                                'are needed; add text')
            parts[split].flush()
            os.fsync(parts[split].fileno())
        # if meta.json is there, it describes the files beside it, whenever a kill comes
        (folder / 'meta.json').unlink(missing_ok=True)
        for split in splits:
            os.replace(folder / f'{split}.bin.part', folder / f'{split}.bin')
    finally:
        for split in splits:
            parts[split].close()
            (folder / f'{split}.bin.part').unlink(missing_ok=True)
    meta = {'tokenizer': spec, 'vocab_size': encoding.n_vocab, 'source': source, **more}
    for split in splits:
        meta.update({f'{split}_tokens': tokens[split], f'{split}_bytes': size[split]})
    write_atomically(folder / 'meta.json', lambda file: file.write(json.dumps(meta).encode('ascii')))
    print(f"{source}: {size['train'] / 1e6:,.2f} + {size['val'] / 1e6:,.2f} MB (train + val)\n"
          f"{folder}: {tokens['train']:,} + {tokens['val']:,} tokens, vocabulary of {encoding.n_vocab:,}, "
          f"{size['train'] / tokens['train']:.2f} bytes per token")


def until_stopped(pieces):
    """
    Yields pieces, for write_dataset, until there are no more, or Ctrl-C or a DataError stops them: hours of
    work must not be lost, so the pieces so far make the data set.
    """
    some = False
    try:
        for piece in pieces:
            yield piece
            some = True
    except (KeyboardInterrupt, DataError) as e:
        if not some:
            raise
        print(f'stopped early ({str(e) or "Ctrl-C"}): the text so far makes the data set')


# -----------------------------------------------------------------------------
# reading


def prepare(name):
    """Makes data/python, which needs nothing. For any other data set, raises DataError with the command."""
    if name == 'python':
        if subprocess.run([sys.executable, DATA / 'python' / 'prepare.py']).returncode:
            raise DataError('data/python could not be prepared: see the line above')
        return
    commands = {'packages': 'python data/python/prepare.py --packages',
                'selfwritten': 'python data/selfwritten/prepare.py, on a GPU; or use --data heldout',
                'heldout': 'git checkout data/heldout'}
    if (DATA / name / 'prepare.py').exists():
        commands.setdefault(name, f'python data/{name}/prepare.py')
    command = commands.get(name, 'python data/text/prepare.py FILE... and then use --data text')
    raise DataError(f'data/{name} is not there, or not prepared; run: {command}')


def load_dataset(name, block_size):
    """
    data/NAME -> train tokens, val tokens (memory maps), meta. Prepares data/python if it is not there. Raises
    DataError if it is damaged, or too short for windows of block_size tokens and their targets.
    """
    if is_mix(name):
        raise DataError(f'{name} is a mix of data sets; name one of them: --data NAME')
    if str(name).startswith('data/'):
        raise DataError(f'{name}: give the folder without data/: --data {name.removeprefix("data/")}')
    folder = DATA / name
    if not (folder / 'meta.json').exists():
        prepare(name)
    try:
        meta = read_json(folder / 'meta.json')
        train, val = (np.memmap(folder / f'{split}.bin', token_dtype(meta['vocab_size']), 'r')
                      for split in ('train', 'val'))
        if (len(train), len(val)) != (meta['train_tokens'], meta['val_tokens']):
            raise ValueError(f'{len(train):,} and {len(val):,} tokens, and meta.json says otherwise')
    except (OSError, *DAMAGED) as e:
        remedy = 'git checkout data/heldout' if name == 'heldout' else 'prepare it again'
        raise DataError(f'data/{name} is damaged ({one_line(e)}); {remedy}') from e
    if min(len(train), len(val)) < block_size + 1:
        raise DataError(f'data/{name}: {len(train):,} and {len(val):,} tokens are too few for '
                        f'--block_size {block_size}; add text, or give a smaller one')
    if meta.get('window', block_size) < block_size:
        raise DataError(f'data/{name} is made of windows of {meta["window"]} tokens, too short for '
                        f'--block_size {block_size}')
    return train, val, meta


class Part(NamedTuple):
    """One data set of a mix."""
    name: str
    share: float            # of the windows
    train: np.ndarray       # token ids
    val: np.ndarray
    meta: dict


def is_mix(text):
    """Whether --data is a mix, such as 'selfwritten:0.5,people:0.5', and not the name of one data set."""
    return not {':', ','}.isdisjoint(str(text))


def read_shares(text):
    """'selfwritten:0.5,people:0.5' -> [('selfwritten', 0.5), ('people', 0.5)]; one name has a share of 1."""
    if not is_mix(text):
        return [(text, 1.0)]
    shares = []
    for item in text.split(','):
        name, _, share = item.rpartition(':')
        try:
            shares.append((name.strip(), float(share)))
        except ValueError:
            shares.append(('', 0.0))
        if not shares[-1][0] or not 0 < shares[-1][1] <= 1:
            raise DataError(f'--data {text}: {item!r} is not NAME:SHARE, with a share above 0 and at most 1; '
                            'a mix is written selfwritten:0.5,people:0.5')
    total = sum(share for _, share in shares)
    if abs(total - 1) > 1e-3:
        raise DataError(f'--data {text}: the shares add up to {total:g}; they must add up to 1')
    return [(name, share / total) for name, share in shares]


def tokenizer_name(spec):
    return spec.get('name', spec.get('kind')) if isinstance(spec, dict) else spec


def load_mix(text, block_size):
    """
    --data, the name of one data set or a mix of several -> [Part]. Raises DataError as load_dataset() does,
    and if they have different tokenizers.
    """
    mix = [Part(name, share, *load_dataset(name, block_size)) for name, share in read_shares(text)]
    first = mix[0]
    for part in mix[1:]:
        if part.meta['tokenizer'] != first.meta['tokenizer']:
            raise DataError(f'data/{first.name} and data/{part.name} were made with different tokenizers '
                            f'({tokenizer_name(first.meta["tokenizer"])} and '
                            f'{tokenizer_name(part.meta["tokenizer"])}, or two of one name); a mix needs one')
    return mix
