"""
Text of your own, UTF-8 -> train.bin, val.bin, meta.json in this folder.

    python data/text/prepare.py book.txt
    python data/text/prepare.py notes/*.md --tokenizer bytes --out data/notes --val_fraction 0.1

Many files are split by file: no file is in both train and val. Where that cannot come near the share asked
for, as with one file or a few large ones, each file is cut in two near its end: between two documents if it
marks them with <|endoftext|>, else after a line. Each file (or marked document) becomes a document; one that
repeats an earlier one to the letter is dropped. Line ends become '\\n', a byte order mark goes.

The python4k tokenizer suits code and English; bytes suits any language and needs the smallest model; gpt2 is
English.

Not here: other encodings, cleaning, text larger than memory (see data/fineweb/prepare.py for a way to
stream).
"""

import hashlib
import sys
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import DataError, run, write_dataset
from options import fail, option, parse_options
from tokenizer import ENDOFTEXT, load_tokenizer, tokenizer_spec


@dataclass
class TextConfig:
    """
    Text of your own, UTF-8: many files are split by file, few are each cut in two near the end, between
    documents marked with <|endoftext|> or else after a line.
    """
    files: tuple = option((), 'text files')
    tokenizer: str = option('python4k', "python4k, bytes, gpt2, or a folder with a tokenizer's files")
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')
    val_fraction: float = option(0.1, 'share of the text kept for validation', at_least=0, at_most=1)


def decode(data, path):
    """bytes -> text. Raises DataError where they are not UTF-8."""
    if data.startswith((b'\xff\xfe', b'\xfe\xff')) or b'\0' in data:
        raise DataError(f'{path} is not UTF-8 text (it may be UTF-16): save it as UTF-8, for instance: '
                        'iconv -f utf-16 -t utf-8 OLD > NEW')
    try:
        return data.decode('utf-8-sig').replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as e:
        raise DataError(f'{path} is not UTF-8 text (byte 0x{data[e.start]:02x} at {e.start:,}): save it '
                        'as UTF-8, for instance: iconv -f latin1 -t utf-8 OLD > NEW') from e


def read_documents(paths):
    """paths: list of Path -> list, one entry per file that has any, of its documents (str), none twice"""
    files, seen = [], set()
    for path in paths:
        try:
            text = decode(path.read_bytes(), path)
        except OSError as e:
            raise DataError(f'cannot read {path}: {e.strerror}; name existing text files') from e
        # a marked document may have any number of blank lines around it: one newline at its end is enough
        marked = [part.strip('\n') + '\n' for part in text.split(ENDOFTEXT)] if ENDOFTEXT in text else [text]
        documents = []
        for document in marked:
            if document.strip() and document not in seen:
                seen.add(document)
                documents.append(document)
        if documents:
            files.append(documents)
    if not files:
        raise DataError('no text: the files named are empty')
    return files


def cut(documents, val_fraction):
    """documents of one file -> (train, val) lists: its last val_fraction, from a boundary on"""
    if len(documents) == 1:
        text = documents[0]
        end = int(len(text) * (1 - val_fraction))
        end = text.find('\n', end, -1) + 1 or end       # the end of that line; within the last line, anywhere
        return [text[:end]], [text[end:]]
    ends = list(accumulate(map(len, documents)))
    end = min(bisect_left(ends, ends[-1] * (1 - val_fraction)) + 1, len(documents) - 1)
    return documents[:end], documents[end:]


def split(files, val_fraction):
    """files: lists of documents -> (train, val) lists of documents, in the order given"""
    size = [sum(map(len, documents)) for documents in files]
    # a shuffle that depends on the content alone, not on names or on the order given
    digest = [hashlib.sha256(''.join(documents).encode('utf-8')).hexdigest() for documents in files]
    left, val = sum(size) * val_fraction, set()
    for i in sorted(range(len(files)), key=lambda i: digest[i]):
        if size[i] <= left:
            left -= size[i]
            val.add(i)
    if left > sum(size) * val_fraction / 2:         # too few files to come near
        pieces = [cut(documents, val_fraction) for documents in files]
    else:
        pieces = [([], documents) if i in val else (documents, []) for i, documents in enumerate(files)]
    return tuple([document for piece in pieces for document in piece[side]] for side in (0, 1))


def main():
    config, _ = parse_options(TextConfig, 'python data/text/prepare.py')
    if not config.files:
        fail('name the text: python data/text/prepare.py FILE...')
    spec = tokenizer_spec(config.tokenizer)
    encoding = load_tokenizer(spec)
    paths = [Path(file) for file in config.files]
    train, val = split(read_documents(paths), config.val_fraction)
    names = [path.name for path in paths]
    source = ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
    write_dataset(config.out, encoding, spec, train, val, source)


if __name__ == '__main__':
    run(main)
