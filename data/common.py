"""
Data sets: writing them, which every data/NAME/prepare.py does with this, and reading them for training.

    spec, encoding = find_tokenizer('python4k')
    write_dataset('data/mine', encoding, spec, ['a document'], ['another'], 'my own words')
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

from files import read_json, write_atomically
from options import fail, is_out_of_memory, option
from tokenizer import TokenizerError, bos_ids, dialogue_ids, end_id, load_tokenizer, tokenizer_spec

DATA = Path(__file__).resolve().parent
MIN_TOKENS = 256                    # in either split, at least: fewer train and measure nothing
META = {'tokenizer': dict, 'vocab_size': int, 'train_tokens': int, 'val_tokens': int, 'train_bytes': int,
        'val_bytes': int, 'source': str, 'window': int}
PIECES, PIECE = 64, 2 ** 20         # so many tokens in so many places of a file are checked


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
        fail(f'{e.filename or "disk or stdout"}: {e.strerror or e}; older files are whole', 1)
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


def encode_documents(encoding, spec, documents):
    """documents: list of what document_ids takes -> (tokens,)"""
    dtype = token_dtype(encoding.n_vocab)
    encode = lambda document: np.array(document_ids(spec, encoding, document), dtype)
    with ThreadPoolExecutor() as pool:      # tiktoken works outside Python's lock
        return np.concatenate([np.zeros(0, dtype), *pool.map(encode, documents)])


def utf8_bytes(encoding, spec, documents):
    """Bytes of text in documents, a dialogue's template included."""
    return sum(len(document.encode('utf-8')) if isinstance(document, str) else
               len(encoding.decode_bytes(dialogue_ids(spec, encoding, document, reply=False)))
               for document in documents)


def make_meta(encoding, spec, source, tokens, size):
    """tokens, size: dicts of tokens and bytes of text in 'train' and 'val' -> contents of meta.json"""
    for split in ('train', 'val'):
        if tokens[split] < MIN_TOKENS:
            raise DataError(f'too little text: {tokens[split]} {split} tokens, and at least {MIN_TOKENS} are '
                            'needed; add text, or change the share kept for validation')
    return {'tokenizer': spec, 'vocab_size': encoding.n_vocab, 'source': source,
            'train_tokens': tokens['train'], 'val_tokens': tokens['val'],
            'train_bytes': size['train'], 'val_bytes': size['val']}


def publish(folder, meta):
    """
    Gives the files of a finished data set their names: train.bin.part and val.bin.part, unless an interrupted
    call has renamed them already. meta: contents of meta.json, which is removed first and written last: if it
    is there, it describes the train.bin and val.bin beside it, whenever a kill comes.
    """
    write_atomically(folder / 'meta.json.part', lambda file: file.write(json.dumps(meta).encode('ascii')))
    (folder / 'meta.json').unlink(missing_ok=True)
    for name in ('train.bin', 'val.bin', 'meta.json'):
        if (folder / f'{name}.part').exists():
            os.replace(folder / f'{name}.part', folder / name)
    train, val = meta['train_bytes'], meta['val_bytes']
    print(f"{meta['source']}: {train / 1e6:,.2f} + {val / 1e6:,.2f} MB (train + val)\n"
          f"{folder}: {meta['train_tokens']:,} + {meta['val_tokens']:,} tokens "
          f"of {meta['vocab_size']:,} kinds, {train / meta['train_tokens']:.2f} bytes per token")


def load_progress(folder, fresh):
    """
    How far an interrupted call came: the dict in progress.json, or fresh if there is none. fresh['settings']:
    what both calls must have in common. Raises DataError, also if everything is done already.
    """
    path = folder / 'progress.json'
    if not path.exists():
        if (folder / 'meta.json').exists():
            raise DataError(f'{folder} is prepared already: delete its meta.json to make it anew')
        return fresh
    try:
        progress = read_json(path)
        if progress.keys() != fresh.keys():
            raise ValueError('other keys')
    except (ValueError, AttributeError, RecursionError) as e:
        raise DataError(f'{path} is damaged: delete it to start over') from e
    if progress['settings'] != fresh['settings']:
        raise DataError(f'{path} belongs to a run with {progress["settings"]}: give the same options, '
                        'or delete it to start over')
    return progress


def save_progress(folder, progress):
    write_atomically(folder / 'progress.json', lambda file: file.write(json.dumps(progress).encode('ascii')))


def append_tokens(folder, split, ids, start):
    """
    Writes ids (tokens,) to train.bin.part or val.bin.part after its first `start` tokens; whatever a killed
    run left after those goes. Call save_progress() only then. Raises DataError if there are fewer.
    """
    with open(folder / f'{split}.bin.part', 'ab') as file:
        if file.tell() < start * ids.itemsize:
            raise DataError(f'{file.name} is shorter than progress.json says: delete that one to start over')
        file.truncate(start * ids.itemsize)
        file.write(ids)
        file.flush()
        os.fsync(file.fileno())


def write_dataset(folder, encoding, spec, train, val, source):
    """
    Writes train.bin, val.bin and meta.json into a folder, made if need be; an old data set stays until the
    new one is complete. train, val: lists of documents, see document_ids; source: one line that says what the
    text is. Raises DataError if a split is too small.
    """
    folder, splits = Path(folder), {'train': train, 'val': val}
    ids = {split: encode_documents(encoding, spec, documents) for split, documents in splits.items()}
    meta = make_meta(encoding, spec, source, {split: len(ids[split]) for split in splits},
                     {split: utf8_bytes(encoding, spec, documents) for split, documents in splits.items()})
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for split in splits:
            write_atomically(folder / f'{split}.bin.part', lambda file: file.write(ids[split]))
        publish(folder, meta)
    finally:
        for name in ('train.bin', 'val.bin', 'meta.json'):
            (folder / f'{name}.part').unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# reading


def prepare(name):
    """Makes data/python, which needs nothing. For any other data set, raises DataError with the command."""
    script = DATA / name / 'prepare.py'
    if name == 'python':
        if subprocess.run([sys.executable, script]).returncode:
            raise DataError('data/python could not be prepared: see the line above')
        return
    command = 'python data/text/prepare.py FILE... and then train with --data text'
    if name == 'packages':
        command = 'python data/python/prepare.py --packages'
    elif name == 'heldout':         # it comes with the repository
        command = 'git checkout data/heldout'
    elif script.exists():
        command = f'python data/{name}/prepare.py'
    raise DataError(f'data/{name} is not there, or not prepared; run: {command}')


def check_tokens(ids, split, meta):
    """Raises ValueError if ids (tokens,) do not fit what meta says of them."""
    if len(ids) != meta[f'{split}_tokens'] or len(ids) % meta.get('window', 1):
        raise ValueError(f'{split}.bin has {len(ids):,} tokens, and meta.json says otherwise')
    # every token, or in a file of more than 64M pieces that are spread out: a fraction of a second
    for start in np.linspace(0, max(len(ids) - PIECE, 0), PIECES).astype(np.int64):
        largest = int(ids[start:start + PIECE].max())
        if largest >= meta['vocab_size']:
            raise ValueError(f'{split}.bin has the id {largest:,} in a vocabulary of {meta["vocab_size"]:,}')


def load_dataset(name, block_size):
    """
    data/NAME -> train tokens, val tokens (memory maps), meta. Prepares data/python if it is not there. Raises
    DataError if it is damaged, or too short for windows of block_size tokens and their targets.
    """
    if is_mix(name):
        raise DataError(f'{name} is a mix of data sets; name one of them: --data NAME')
    folder = DATA / name
    if not (folder / 'meta.json').exists():
        prepare(name)
    try:
        meta = read_json(folder / 'meta.json')
        for key, kind in META.items():
            value = meta.get(key, 1 if key == 'window' else None)
            if type(value) is not kind or kind is int and value < 1:
                raise ValueError(f'meta.json has no valid {key}')
        dtype = token_dtype(meta['vocab_size'])
        train, val = (np.memmap(folder / f'{split}.bin', dtype, 'r') for split in ('train', 'val'))
        check_tokens(train, 'train', meta)
        check_tokens(val, 'val', meta)
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        remedy = 'git checkout data/heldout' if name == 'heldout' else 'prepare it again'
        raise DataError(f'data/{name} is damaged ({e}); {remedy}') from e
    if min(len(train), len(val)) < block_size + 1:
        raise DataError(f'data/{name}: {len(train):,} and {len(val):,} tokens are too few for '
                        f'--block_size {block_size}')
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
