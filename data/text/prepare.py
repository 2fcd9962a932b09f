"""
Text or dialogues of your own, UTF-8 -> train.bin, val.bin, meta.json in this folder.

    python data/text/prepare.py book.txt
    python data/text/prepare.py notes/*.md --tokenizer bytes --out data/notes
    python data/text/prepare.py book.txt talks.jsonl --tokenizer smollm2
    python train.py --data text --init_from smollm2         # the model whose tokenizer that is

The last tenth of each file is for validation. A file is cut between two documents if it marks them with
<|endoftext|>, else after a line. Each file (or marked document) becomes a document. Line ends become '\\n', a
byte order mark is removed.

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

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import DataError, encoded, find_tokenizer, run, tokenizer_option, write_dataset
from files import DAMAGED, one_line, read_text
from options import fail, option, parse_options
from tokenizer import ENDOFTEXT

VAL_FRACTION = 0.1          # of each file


@dataclass
class TextConfig:
    about = ('Text of your own, UTF-8. The last tenth of each file is for validation. Files called .jsonl '
             'hold dialogues, on each line {"messages": [{"role": "user", "content": "..."}, {"role": '
             '"assistant", "content": "..."}]}, which are written in the chat template of the model named '
             'as --tokenizer.')
    files: tuple = option((), 'text files, and .jsonl files of dialogues')
    tokenizer: str = tokenizer_option('python4k')
    out: str = option(str(HERE), 'folder for train.bin, val.bin and meta.json')


def dialogue(line):
    """A line of a .jsonl file -> its messages, a tuple of (role, text). Raises what DAMAGED names."""
    messages = tuple((message['role'], message['content']) for message in json.loads(line)['messages'])
    for i, (role, text) in enumerate(messages):
        if role not in ('user', 'assistant') and (role, i) != ('system', 0) or type(text) is not str:
            raise ValueError('roles are user and assistant, and of the first message also system; a content '
                             'is a string')
    return messages


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


def cut(documents):
    """documents of one file -> those for training, those for validation: about the last tenth of the text"""
    if len(documents) == 1 and isinstance(documents[0], str):
        text = documents[0]
        end = int(len(text) * (1 - VAL_FRACTION))
        end = text.find('\n', end, -1) + 1 or end       # the end of that line, unless it is the last one
        return [text[:end]], [text[end:]]
    ends = np.cumsum([len(text_of(document)) for document in documents])
    end = min(np.searchsorted(ends, ends[-1] * (1 - VAL_FRACTION)) + 1, len(documents) - 1)
    return documents[:end], documents[end:]


def main():
    config, _ = parse_options(TextConfig, 'python data/text/prepare.py')
    if not config.files:
        fail('name the text: python data/text/prepare.py FILE...')
    spec, encoding = find_tokenizer(config.tokenizer)
    paths = [Path(file) for file in config.files]
    train, val = [], []
    for path in paths:
        documents = [document for document in documents_in(path) if text_of(document).strip()]
        if documents:
            of_train, of_val = cut(documents)
            train += of_train
            val += of_val
    if 'template' not in spec and not all(isinstance(document, str) for document in train + val):
        raise DataError(f'the tokenizer {config.tokenizer} has no chat template for dialogues: name a chat '
                        "model's, such as --tokenizer smollm2, or write them as plain text, in a file not "
                        'called .jsonl')
    names = ', '.join(path.name for path in paths[:3])
    source = names + (f' and {len(paths) - 3} more' if len(paths) > 3 else '')
    pieces = [encoded('train', encoding, spec, train), encoded('val', encoding, spec, val)]
    write_dataset(config.out, encoding, spec, pieces, source)


if __name__ == '__main__':
    run(main)
