"""
Text or dialogues of your own, UTF-8 -> train.bin, val.bin, meta.json in this folder.

    python data/text/prepare.py book.txt
    python data/text/prepare.py notes/*.md --tokenizer bytes --out data/notes --val_fraction 0.1
    python data/text/prepare.py book.txt talks.jsonl --tokenizer smollm2
    python train.py --data text --init_from smollm2         # the model whose tokenizer that is

Many files are split by file: no file is in both train and val. If that cannot come near the share asked for,
as with one file or a few large ones, each file is cut in two near its end: between two documents if it marks
them with <|endoftext|>, else after a line. Each file (or marked document) becomes a document; one that
repeats an earlier one to the letter is dropped. Line ends become '\\n', a byte order mark goes.

A file whose name ends in .jsonl holds dialogues, one on each line, such as

    {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]}

perhaps with a message of the role system before them. Each dialogue becomes a document, written in the chat
template of the model whose tokenizer is used; keys beside "messages" are not read. A model without a template
learns from dialogues written as plain text, with the same words around each turn. If they look like

    User: Hello.
    Assistant: Hello!

talk to it with: python chat.py --turn_template 'User: {prompt}\\nAssistant:' --stop '\\nUser:'

The python4k tokenizer suits code and English; bytes suits any language and needs the smallest model; gpt2 is
English. A model to go on from needs its own.

Not here: other encodings, cleaning, text larger than memory (see data/fineweb/prepare.py for a way to
stream), learning from the assistant's messages alone.
"""

import hashlib
import json
import sys
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import DataError, find_tokenizer, run, tokenizer_option, write_dataset
from files import DAMAGED, one_line, read_text
from options import fail, option, parse_options
from tokenizer import ENDOFTEXT


@dataclass
class TextConfig:
    about = ('Text of your own, UTF-8: many files are split by file, few are each cut in two near the '
             'end, between documents marked with <|endoftext|> or else after a line. Files called .jsonl'
             ' hold dialogues, on each line {"messages": [{"role": "user", "content": "..."}, {"role": '
             '"assistant", "content": "..."}]}, which are written in the chat template of the model '
             'named as --tokenizer.')
    files: tuple = option((), 'text files, and .jsonl files of dialogues')
    tokenizer: str = tokenizer_option('python4k')
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')
    val_fraction: float = option(0.1, 'share of the text kept for validation', at_least=0, at_most=1)


def dialogue(line):
    """A line of a .jsonl file -> its messages, a tuple of (role, text). Raises what DAMAGED names."""
    messages = json.loads(line)['messages']
    for i, message in enumerate(messages):
        if message.keys() != {'role', 'content'} or type(message['content']) is not str:
            raise ValueError('a message has a role and a content, both strings')
        if message['role'] not in ('user', 'assistant') and (message['role'], i) != ('system', 0):
            raise ValueError(f'the role {message["role"]!r:.40}: roles are user and assistant, and of the '
                             'first message also system')
    if not messages:
        raise ValueError('no messages')
    return tuple((message['role'], message['content']) for message in messages)


def documents_in(path):
    """The documents of a file, str or dialogues. Raises DataError."""
    try:
        text = read_text(path)
        if path.suffix == '.jsonl':
            lines = [(number, line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
            try:
                for number, line in lines:
                    yield dialogue(line)
            except DAMAGED as e:
                raise DataError(f'{path}, line {number}: not {{"messages": [{{"role": ..., "content": ...}}, '
                                f'...]}} ({one_line(e)})') from None
        elif ENDOFTEXT in text:
            # a marked document may have blank lines around it: one newline at its end is enough
            yield from (part.strip('\n') + '\n' for part in text.split(ENDOFTEXT))
        else:
            yield text
    except OSError as e:
        raise DataError(f'cannot read {path}: {e.strerror}; name existing text files') from e
    except ValueError as e:
        raise DataError(f'{e}, for instance: iconv -f ENCODING -t utf-8 OLD > NEW, with latin1 or utf-16le '
                        'for ENCODING') from e


def text_of(document):
    """The text of a document; of a dialogue that of its messages."""
    return document if isinstance(document, str) else '\n'.join(text for _, text in document)


def read_documents(paths):
    """paths: list of Path -> list, one entry per file that has any, of its documents, none of them twice"""
    files, seen = [], set()
    for path in paths:
        documents = []
        for document in documents_in(path):
            if text_of(document).strip() and document not in seen:
                seen.add(document)
                documents.append(document)
        if documents:
            files.append(documents)
    if not files:
        raise DataError('no text: the files named are empty')
    return files


def cut(documents, val_fraction):
    """documents of one file -> (train, val) lists: val is about its last val_fraction"""
    if len(documents) == 1 and isinstance(documents[0], str):
        text = documents[0]
        end = int(len(text) * (1 - val_fraction))
        end = text.find('\n', end, -1) + 1 or end       # the end of that line, unless it is the last one
        return [text[:end]], [text[end:]]
    ends = list(accumulate(len(text_of(document)) for document in documents))
    end = min(bisect_left(ends, ends[-1] * (1 - val_fraction)) + 1, len(documents) - 1)
    return documents[:end], documents[end:]


def split(files, val_fraction):
    """files: lists of documents -> (train, val) lists of documents, in the order given"""
    texts = [''.join(map(text_of, documents)) for documents in files]
    size = [len(text) for text in texts]
    # shuffled by content alone, not by names or the order given
    digest = [hashlib.sha256(text.encode('utf-8')).hexdigest() for text in texts]
    left, val = sum(size) * val_fraction, set()
    for i in sorted(range(len(files)), key=lambda i: digest[i]):
        if size[i] <= left:
            left -= size[i]
            val.add(i)
    if left > sum(size) * val_fraction / 2:         # too few files to come near that share
        pieces = [cut(documents, val_fraction) for documents in files]
    else:
        pieces = [([], documents) if i in val else (documents, []) for i, documents in enumerate(files)]
    return tuple([document for piece in pieces for document in piece[side]] for side in (0, 1))


def main():
    config, _ = parse_options(TextConfig, 'python data/text/prepare.py')
    if not config.files:
        fail('name the text: python data/text/prepare.py FILE...')
    spec, encoding = find_tokenizer(config.tokenizer)
    paths = [Path(file) for file in config.files]
    files = read_documents(paths)
    if 'template' not in spec and not all(isinstance(document, str) for file in files for document in file):
        raise DataError(f'the tokenizer {config.tokenizer} has no chat template for dialogues: name a chat '
                        "model's, such as --tokenizer smollm2, or write them as plain text, in a file not "
                        'called .jsonl')
    train, val = split(files, config.val_fraction)
    names = [path.name for path in paths]
    source = ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
    write_dataset(config.out, encoding, spec, train, val, source)


if __name__ == '__main__':
    run(main)
