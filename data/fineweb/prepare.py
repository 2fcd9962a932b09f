"""
FineWeb-Edu, the sample of ten billion tokens: text for GPT-2 scale -> train.bin, val.bin, meta.json.

    pip install datasets && python data/fineweb/prepare.py
    python data/fineweb/prepare.py --max_tokens 1000000000          # a tenth of it, about 2 GB

The text is streamed, never stored: 20 GB of disk for all of it (2 bytes a token), a few hundred MB of memory.
If a run stops, for whatever reason, the same command goes on from there, and the result is the same to the
byte: finished tokens wait in train.bin.part and val.bin.part, progress.json tells how many documents they
hold. A hash of its text decides which split a document goes to, so no text is in both.

Not tried yet on the real data set, for want of a network: only on a stand-in for the package `datasets`.

Not here: shuffling (the sample comes shuffled), filtering, several processes, other configurations of the
data set.
"""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import (DataError, append_tokens, encode_documents, find_tokenizer, in_val, load_progress,
                         make_meta, publish, run, save_progress, tokenizer_option, utf8_bytes)
from files import one_line
from options import option, parse_options

DATASET, SAMPLE = 'HuggingFaceFW/fineweb-edu', 'sample-10BT'
BATCH = 2000    # documents between two records of the progress: about 2M tokens, about a second of work


@dataclass
class FinewebConfig:
    about = ("FineWeb-Edu's sample of ten billion tokens, streamed; a run that stops goes on by the same "
             'command.')
    max_tokens: int = option(0, 'stop at so many train tokens; 0: at the end of the data set', at_least=0)
    tokenizer: str = tokenizer_option('gpt2')
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')
    val_fraction: float = option(0.0005, 'share of the documents kept for validation', at_least=0, at_most=1)


def unreadable(e):
    """an exception from the `datasets` package -> DataError"""
    return DataError(f'cannot read {DATASET} ({one_line(e)}): check the network; '
                     'the same command goes on from here')


def open_stream(state):
    """state: state_dict() of the stream after an earlier batch, or None -> iterable. Raises DataError."""
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


def encode_stream(encoding, spec, progress, folder, config):
    """Appends documents to the .part files in folder until there are no more, or enough tokens."""
    dataset = open_stream(progress['stream'])
    rows = iter(dataset)
    tokens = progress['tokens']
    start, first, printed = time.time(), tokens['train'], 0
    while not config.max_tokens or tokens['train'] < config.max_tokens:
        batch = read_batch(rows)
        if not batch:
            break
        for split in tokens:
            documents = [text for text in batch if in_val(text, config.val_fraction) == (split == 'val')]
            ids = encode_documents(encoding, spec, documents)
            append_tokens(folder, split, ids, tokens[split])
            tokens[split] += len(ids)
            progress['bytes'][split] += utf8_bytes(encoding, spec, documents)
        progress['documents'] += len(batch)
        progress['stream'] = dataset.state_dict()
        save_progress(folder, progress)
        if time.time() - printed > 10:
            printed = time.time()
            print(f"{progress['documents']:,} documents, {tokens['train']:,} train tokens, "
                  f"{(tokens['train'] - first) / (printed - start):,.0f} tokens/s", flush=True)


def main():
    config, _ = parse_options(FinewebConfig, 'python data/fineweb/prepare.py')
    folder = Path(config.out)
    settings = {'tokenizer': config.tokenizer, 'val_fraction': config.val_fraction}
    fresh = {'settings': settings, 'documents': 0, 'stream': None, 'complete': False,
             'tokens': {'train': 0, 'val': 0}, 'bytes': {'train': 0, 'val': 0}}
    progress = load_progress(folder, fresh)
    spec, encoding = find_tokenizer(config.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if not progress['complete']:
        encode_stream(encoding, spec, progress, folder, config)
    meta = make_meta(encoding, spec, f'{DATASET} {SAMPLE}', progress['tokens'], progress['bytes'])
    progress['complete'] = True     # from here on a second try only has to rename
    save_progress(folder, progress)
    publish(folder, meta)
    (folder / 'progress.json').unlink()


if __name__ == '__main__':
    run(main)
