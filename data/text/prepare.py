"""
Text of your own, UTF-8 -> train.bin, val.bin, meta.json in this directory.

    python data/text/prepare.py book.txt
    python data/text/prepare.py notes/*.md --tokenizer bytes --out data/notes --val_fraction 0.1

Several files are split by file: no file is in both train and val. One file is cut in two near its end: between two
documents if it marks them with <|endoftext|>, else after a line. Each file (or marked document) becomes a document;
one that repeats an earlier one to the letter is dropped. Line ends become '\\n', a byte order mark goes.

The python4k tokenizer suits code and English; bytes suits any language and needs the smallest model; gpt2 is English.

Left out: other encodings, cleaning, text larger than memory (see data/fineweb/prepare.py for a way to stream).
"""

import hashlib
import sys
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the two imports below
from data.common import DataError, Options, check_vocab, run, write_dataset
from tokenizer import ENDOFTEXT, load_tokenizer, tokenizer_spec


def read_documents(paths):
    """paths: list of Path -> list, one entry per file that has any, of its documents (list of str), none twice"""
    files, seen = [], set()
    for path in paths:
        try:
            text = path.read_text(encoding='utf-8-sig')
        except UnicodeDecodeError as e:
            raise DataError(f'{path} is not UTF-8 text (byte 0x{e.object[e.start]:02x} at {e.start:,}): save it as '
                            'UTF-8, for instance: iconv -f latin1 -t utf-8 OLD > NEW') from e
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


def split_one(documents, val_fraction):
    """documents of one file -> (train, val) lists: its last val_fraction, to the nearest boundary after the cut"""
    if len(documents) == 1:
        text = documents[0]
        cut = int(len(text) * (1 - val_fraction))
        cut = text.find('\n', cut, -1) + 1 or cut       # the end of that line; within the last line, anywhere
        return [text[:cut]], [text[cut:]]
    ends = list(accumulate(map(len, documents)))
    cut = min(bisect_left(ends, ends[-1] * (1 - val_fraction)) + 1, len(documents) - 1)
    return documents[:cut], documents[cut:]


def split_files(files, val_fraction):
    """files: at least two lists of documents -> (train, val) lists of documents, no file in both, order kept"""
    size = [sum(map(len, documents)) for documents in files]
    # a shuffle that depends on the content alone, not on names or on the order given
    digest = [hashlib.sha256(''.join(documents).encode('utf-8')).hexdigest() for documents in files]
    left, val = sum(size) * val_fraction, set()
    for i in sorted(range(len(files)), key=lambda i: digest[i]):
        if size[i] <= left:
            left -= size[i]
            val.add(i)
    val = val or {size.index(min(size))}            # a few large files: the smallest one
    split = [], []
    for i, documents in enumerate(files):
        split[i in val].extend(documents)
    return split


def main():
    options = Options(__doc__)
    options.add_argument('files', nargs='+', type=Path, metavar='FILE', help='UTF-8 text files')
    options.add_tokenizer('python4k')
    options.add_out(HERE)
    options.add_val_fraction(0.1)
    options = options.parse_args()

    spec = tokenizer_spec(options.tokenizer)
    encoding = load_tokenizer(spec)
    check_vocab(encoding)       # before the work, not after it
    files = read_documents(options.files)
    if len(files) > 1:
        train, val = split_files(files, options.val_fraction)
    else:
        train, val = split_one(files[0], options.val_fraction)
    names = [path.name for path in options.files]
    source = ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
    write_dataset(options.out, encoding, spec, train, val, source)


if __name__ == '__main__':
    run(main)
