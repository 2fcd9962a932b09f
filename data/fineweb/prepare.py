"""
FineWeb-Edu, the sample of ten billion tokens: text for GPT-2 scale -> train.bin, val.bin, meta.json.

    pip install datasets && python data/fineweb/prepare.py
    python data/fineweb/prepare.py --max_tokens 1000000000          # a tenth of it, about 2 GB

The text is streamed, never stored: 20 GB of disk for all of it (2 bytes a token), a few hundred MB of memory.
A run that stops, whatever the reason, is taken up where it was by the same command, and the result is the same to the
byte: finished tokens wait in train.bin.part and val.bin.part, progress.json tells how many documents they hold.
Which split a document goes to is a hash of its text, so a repeated one never comes in both.

Left out: shuffling (the sample comes shuffled), filtering, several processes, other configurations of the data set.
"""

import hashlib
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import (DataError, Options, check_vocab, encode_documents, make_meta, publish, replace_file, run,
                         utf8_bytes)
from tokenizer import load_tokenizer, tokenizer_spec

DATASET, SAMPLE = 'HuggingFaceFW/fineweb-edu', 'sample-10BT'
BATCH = 2000    # documents between two records of the progress: about 2M tokens, a second or so of work


def unreadable(e):
    """an exception from the `datasets` package -> DataError"""
    reason = ' '.join(str(e).split())[:200]
    return DataError(f'cannot read {DATASET} ({type(e).__name__}: {reason}): check the network; '
                     'the same command goes on from here')


def open_stream(state):
    """state: what state_dict() said after an earlier batch, or None -> iterable data set. Raises DataError."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise DataError('streaming this data set needs a package that nothing else does: pip install datasets') from e
    try:
        dataset = load_dataset(DATASET, name=SAMPLE, split='train', streaming=True)
        if state is not None:
            dataset.load_state_dict(state)      # opens the file it was in; the ones before are not read again
        return dataset
    except Exception as e:      # offline, server busy, ...: the packages below raise a dozen unrelated kinds
        raise unreadable(e) from e


def read_batch(rows):
    """rows: iterator over an open stream -> list of at most BATCH texts, empty at the end. Raises DataError."""
    try:
        return [row['text'] for row in itertools.islice(rows, BATCH)]
    except Exception as e:      # as above
        raise unreadable(e) from e


def in_val(text, val_fraction):
    return int(hashlib.sha256(text.encode('utf-8')).hexdigest()[:8], 16) < val_fraction * 2 ** 32


def load_progress(path, settings):
    """progress.json -> dict, or a fresh one where there is none. Raises DataError if it is of another data set."""
    if not path.exists():
        return {'settings': settings, 'documents': 0, 'stream': None, 'complete': False,
                'tokens': {'train': 0, 'val': 0}, 'bytes': {'train': 0, 'val': 0}}
    try:
        progress = json.loads(path.read_text(encoding='utf-8'))
        old = progress['settings']
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f'{path} is damaged: delete it to start over') from e
    if old != settings:
        raise DataError(f'{path} is of a run with {old}: give the same options, or delete it to start over')
    return progress


def encode_stream(encoding, progress, progress_file, parts, options):
    """Appends documents to parts (dict of split -> file open to append), until there are no more, or enough."""
    for split, f in parts.items():
        if f.tell() < 2 * progress['tokens'][split]:
            raise DataError(f'{f.name} is shorter than {progress_file} says: delete the latter to start over')
        f.truncate(2 * progress['tokens'][split])       # what a kill left after the last record

    dataset = open_stream(progress['stream'])
    rows = iter(dataset)
    start, first, printed = time.time(), progress['tokens']['train'], 0
    with ThreadPoolExecutor() as pool:      # tiktoken works outside Python's lock
        while not options.max_tokens or progress['tokens']['train'] < options.max_tokens:
            batch = read_batch(rows)
            if not batch:
                break
            for text, ids in zip(batch, pool.map(lambda text: encode_documents(encoding, [text]), batch)):
                split = 'val' if in_val(text, options.val_fraction) else 'train'
                parts[split].write(ids)
                progress['tokens'][split] += len(ids)
                progress['bytes'][split] += utf8_bytes([text])
            progress['documents'] += len(batch)
            progress['stream'] = dataset.state_dict()
            # tokens first, then the record that counts them: after a kill in between, the batch is done again
            for f in parts.values():
                f.flush()
                os.fsync(f.fileno())
            replace_file(progress_file, json.dumps(progress).encode('ascii'))
            if time.time() - printed > 10:
                printed, done = time.time(), progress['tokens']['train']
                print(f"{progress['documents']:,} documents, {done:,} train tokens, "
                      f"{(done - first) / (printed - start):,.0f} tokens/s", flush=True)


def main():
    options = Options(__doc__)
    options.add_tokenizer('gpt2')
    options.add_out(HERE)
    options.add_val_fraction(0.0005)
    options.add_argument('--max_tokens', type=int, default=0, metavar='N',
                         help='stop at the first batch of documents that brings N train tokens (default: 0, all)')
    options = options.parse_args()

    folder, progress_file = options.out, options.out / 'progress.json'
    if (folder / 'meta.json').exists() and not progress_file.exists():
        raise DataError(f'{folder} is prepared already: delete its meta.json to make it anew')
    spec = tokenizer_spec(options.tokenizer)
    encoding = load_tokenizer(spec)
    check_vocab(encoding)
    folder.mkdir(parents=True, exist_ok=True)

    progress = load_progress(progress_file, {'tokenizer': options.tokenizer, 'val_fraction': options.val_fraction})
    parts = {split: folder / f'{split}.bin.part' for split in ('train', 'val')}
    if not progress['complete']:
        with open(parts['train'], 'ab') as train, open(parts['val'], 'ab') as val:
            encode_stream(encoding, progress, progress_file, {'train': train, 'val': val}, options)
    meta = make_meta(encoding, spec, f'{DATASET} {SAMPLE}', progress['tokens'], progress['bytes'])
    progress['complete'] = True     # from here on a second try only has to rename
    replace_file(progress_file, json.dumps(progress).encode('ascii'))
    publish(folder, {f'{split}.bin': path for split, path in parts.items()}, meta)
    progress_file.unlink()


if __name__ == '__main__':
    run(main)
