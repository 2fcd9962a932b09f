"""
FineWeb-Edu, the sample of ten billion tokens: text for GPT-2 scale -> train.bin, val.bin, meta.json.

    pip install datasets && python data/fineweb/prepare.py
    python data/fineweb/prepare.py --max_tokens 1000000000          # a tenth of it, about 2 GB

The text is streamed, never stored: 20 GB of disk for all of it (2 bytes a token), a few hundred MB of memory.
A run that stops, whatever the reason, is taken up where it was by the same command, and the result is the
same to the byte: finished tokens wait in train.bin.part and val.bin.part, progress.json tells how many
documents they hold. Which split a document goes to is a hash of its text, so a repeated one never comes in
both.

Not here: shuffling (the sample comes shuffled), filtering, several processes, other configurations of the
data set.
"""

import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import (DataError, encode_documents, find_tokenizer, in_val, load_progress, make_meta,
                         publish, run, save_progress, token_dtype, utf8_bytes)
from options import option, parse_options
from tokenizer import load_tokenizer

DATASET, SAMPLE = 'HuggingFaceFW/fineweb-edu', 'sample-10BT'
BATCH = 2000    # documents between two records of the progress: about 2M tokens, a second or so of work


@dataclass
class FinewebConfig:
    about = ("FineWeb-Edu's sample of ten billion tokens, streamed; a run that stops goes on by the same "
             'command.')
    max_tokens: int = option(0, 'stop once so many train tokens are there; 0: at the end', at_least=0)
    tokenizer: str = option('gpt2', "python4k, bytes, gpt2, a model's name, folder or .gguf file, or a "
                            "folder with a tokenizer's files")
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')
    val_fraction: float = option(0.0005, 'share of the documents kept for validation', at_least=0, at_most=1)


def unreadable(e):
    """an exception from the `datasets` package -> DataError"""
    reason = ' '.join(str(e).split())[:200]
    return DataError(f'cannot read {DATASET} ({type(e).__name__}: {reason}): check the network; '
                     'the same command goes on from here')


def open_stream(state):
    """state: what state_dict() said after an earlier batch, or None -> iterable. Raises DataError."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise DataError('streaming needs a package that nothing else here does: pip install datasets') from e
    try:
        dataset = load_dataset(DATASET, name=SAMPLE, split='train', streaming=True)
        if state is not None:
            dataset.load_state_dict(state)      # opens the file it was in; the ones before are not read again
        return dataset
    except Exception as e:      # offline, server busy, ...: the packages below raise a dozen unrelated kinds
        raise unreadable(e) from e


def read_batch(rows):
    """rows: iterator over an open stream -> list of up to BATCH texts, empty at the end. Raises DataError."""
    try:
        return [row['text'] for row in itertools.islice(rows, BATCH)]
    except Exception as e:      # as above
        raise unreadable(e) from e


def encode_stream(encoding, spec, progress, folder, parts, config):
    """Appends documents to parts (dict of split to open file) until there are no more, or enough."""
    for split, f in parts.items():
        end = progress['tokens'][split] * token_dtype(encoding.n_vocab)().itemsize
        if f.tell() < end:
            raise DataError(f'{f.name} is shorter than progress.json says: delete that one to start over')
        f.truncate(end)         # what a kill left after the last record

    dataset = open_stream(progress['stream'])
    rows = iter(dataset)
    start, first, printed = time.time(), progress['tokens']['train'], 0
    while not config.max_tokens or progress['tokens']['train'] < config.max_tokens:
        batch = read_batch(rows)
        if not batch:
            break
        for split, f in parts.items():
            documents = [text for text in batch if in_val(text, config.val_fraction) == (split == 'val')]
            ids = encode_documents(encoding, spec, documents)
            f.write(ids)
            progress['tokens'][split] += len(ids)
            progress['bytes'][split] += utf8_bytes(encoding, spec, documents)
        progress['documents'] += len(batch)
        progress['stream'] = dataset.state_dict()
        # tokens first, then the record that counts them: after a kill in between, the batch is done again
        for f in parts.values():
            f.flush()
            os.fsync(f.fileno())
        save_progress(folder, progress)
        if time.time() - printed > 10:
            printed, done = time.time(), progress['tokens']['train']
            print(f"{progress['documents']:,} documents, {done:,} train tokens, "
                  f"{(done - first) / (printed - start):,.0f} tokens/s", flush=True)


def main():
    config, _ = parse_options(FinewebConfig, 'python data/fineweb/prepare.py')
    folder = Path(config.out)
    settings = {'tokenizer': config.tokenizer, 'val_fraction': config.val_fraction}
    fresh = {'settings': settings, 'documents': 0, 'stream': None, 'complete': False,
             'tokens': {'train': 0, 'val': 0}, 'bytes': {'train': 0, 'val': 0}}
    progress = load_progress(folder, fresh)
    spec = find_tokenizer(config.tokenizer)
    encoding = load_tokenizer(spec)
    folder.mkdir(parents=True, exist_ok=True)
    if not progress['complete']:
        with open(folder / 'train.bin.part', 'ab') as train, open(folder / 'val.bin.part', 'ab') as val:
            encode_stream(encoding, spec, progress, folder, {'train': train, 'val': val}, config)
    meta = make_meta(encoding, spec, f'{DATASET} {SAMPLE}', progress['tokens'], progress['bytes'])
    progress['complete'] = True     # from here on a second try only has to rename
    save_progress(folder, progress)
    publish(folder, meta)
    (folder / 'progress.json').unlink()


if __name__ == '__main__':
    run(main)
