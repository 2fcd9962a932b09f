"""
Trains python4k.tiktoken: byte-level BPE on the train split of data/python/prepare.py. Run once, result
committed.

    pip install tokenizers && python data/python/train_tokenizer.py

4,096 ids: the 256 bytes, 3,839 merges, and <|endoftext|>, id 4095, which is not in the file but added by
tokenizer.py. Text is cut into pieces by PYTHON_PATTERN in tokenizer.py: if that changes, run this again. On
the standard library of Python 3.11 a token stands for 3.78 bytes; with GPT-2's pattern and as many ids, for
3.63.

`tokenizers` counts and merges; the result is written in tiktoken's format only if tiktoken then cuts every
file of the corpus, validation included, exactly as `tokenizers` does (tiktoken knows tokens by rank, not by
the pair that made them).

Not here: other corpora, other vocabulary sizes.
"""

import base64
import json
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import DataError, in_val, run
from files import write_atomically
from data.python.prepare import VAL_FRACTION, find_sources
from options import parse_options
from tokenizer import PYTHON4K_FILE, PYTHON_PATTERN, bpe_spec, gpt2_byte_of, load_tokenizer

MERGES = 4096 - 256 - 1


@dataclass
class TokenizerConfig:
    about = 'Trains python4k.tiktoken on the train split of data/python/prepare.py. There are no options.'


def main():
    parse_options(TokenizerConfig, 'python data/python/train_tokenizer.py')
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as e:
        raise DataError('this needs a package that nothing else here does: pip install tokenizers') from e

    sources = find_sources(Path(sysconfig.get_path('stdlib')))
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Split(Regex(PYTHON_PATTERN), 'isolated')
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    bpe.train_from_iterator((text for name, text in sources if not in_val(name, VAL_FRACTION)),
                            trainers.BpeTrainer(vocab_size=256 + MERGES, show_progress=False,
                                                initial_alphabet=byte_level.alphabet()))

    # `tokenizers`, like GPT-2, writes each byte as one printable character
    byte_of = gpt2_byte_of()
    merges = json.loads(bpe.to_str())['model']['merges']
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes(byte_of[c] for c in left + right) for left, right in merges]
    if len(tokens) != 256 + MERGES:
        raise DataError(f'{len(merges)} merges, not {MERGES}: the corpus is too small')

    encoding = load_tokenizer(bpe_spec('python4k', PYTHON_PATTERN, tokens))
    size = count = 0
    for name, text in sources:
        ours = encoding.decode_tokens_bytes(encoding.encode_ordinary(text))
        theirs = [bytes(byte_of[c] for c in token) for token in bpe.encode(text).tokens]
        if ours != theirs:
            raise DataError(f'{name} is cut differently by tiktoken: these merges cannot be written as ranks')
        size, count = size + len(text.encode('utf-8')), count + len(ours)

    lines = [base64.b64encode(token) + b' %d\n' % rank for rank, token in enumerate(tokens)]
    write_atomically(PYTHON4K_FILE, lambda file: file.write(b''.join(lines)))
    print(f'{PYTHON4K_FILE}: {len(tokens):,} tokens, {size / count:.3f} bytes per token; '
          f'all {len(sources)} files cut alike by tiktoken and tokenizers')


if __name__ == '__main__':
    run(main)
