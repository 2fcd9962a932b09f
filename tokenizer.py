"""
Tokenizers: text to token ids and back, always through tiktoken.Encoding.

    python4k     byte-level BPE of 4,096 ids, trained on Python code, kept in data/python/python4k.tiktoken
    bytes        one id per byte, 257 ids
    gpt2         GPT-2's 50,257 ids; tiktoken downloads them once
    DIRECTORY    a tokenizer in GPT-2's own files: vocab.bpe + encoder.json, or merges.txt + vocab.json

tokenizer_spec(name) turns one of these names into a spec: a plain JSON-able dict that holds everything it takes to
encode and decode. Specs are stored in meta.json and in checkpoints, so that both work offline and for ever;
load_tokenizer(spec) makes the tiktoken.Encoding.

    encoding = load_tokenizer(tokenizer_spec('python4k'))
    ids = encoding.encode_ordinary('def fibonacci(n):')      # a literal <|endoftext|> is plain text to it
    encoding.decode_bytes(ids)                               # bytes: one token may be half a character

Every single byte is a token, so any text round-trips. The last id is always <|endoftext|>, which ends a document.

Left out: other special tokens, chat templates, training (see data/python/train_tokenizer.py); a way around GPT-2's
pattern, which makes tiktoken give up on a million blanks in a row (the other two take any text).
"""

import base64
import json
from pathlib import Path

import tiktoken

ENDOFTEXT = '<|endoftext|>'
PYTHON4K_FILE = Path(__file__).resolve().parent / 'data' / 'python' / 'python4k.tiktoken'

# how text is cut into pieces before any merging; a merge never crosses a cut. Compared with GPT-2's:
#  - a word takes one punctuation mark before it along: '.append', '(self', '_name' (4% fewer tokens on Python code);
#  - a newline and the indentation after it are one piece, and ':' is not part of it: a prompt that stops after
#    'def f(n):' is cut as the same line is cut within a file;
#  - at most three digits; no English contractions, which would cut 'def' after the quote into 'd and ef;
#  - no look-ahead, so the regex engine needs time linear in the text, on any text.
PYTHON_PATTERN = r"(?: |[^\s\p{L}\p{N}])?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

# the pattern of GPT-2's release, with the possessive quantifiers that tiktoken adds for speed (same cuts)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# nothing merges, so where the cuts fall is of no consequence
BYTES_PATTERN = r'[\s\S]{1,64}'


class TokenizerError(Exception):
    """A tokenizer that cannot be had or read; the message is one line for the user, remedy included."""


def bpe_spec(name, pattern, tokens):
    """tokens: list of bytes, each token's place in it is its id and the rank of its merge -> spec dict"""
    return {'kind': 'bpe', 'name': name, 'pattern': pattern,
            'ranks': ' '.join(base64.b64encode(token).decode('ascii') for token in tokens)}


def load_tokenizer(spec):
    """
    spec: dict made by tokenizer_spec (or read back from meta.json or a checkpoint) -> tiktoken.Encoding whose
    last id, n_vocab - 1, is <|endoftext|>. Never touches the network or a file. Raises TokenizerError.
    """
    def damaged(reason):
        return TokenizerError(f'unusable tokenizer ({reason}): prepare the data again, or use another checkpoint')

    kind = spec.get('kind') if isinstance(spec, dict) else None
    if kind == 'bytes':
        name, pattern, tokens = 'bytes', BYTES_PATTERN, [bytes([b]) for b in range(256)]
    elif kind == 'bpe':
        name, pattern, ranks = spec.get('name'), spec.get('pattern'), spec.get('ranks')
        if not all(isinstance(field, str) for field in (name, pattern, ranks)):
            raise damaged("'name', 'pattern' and 'ranks' must be strings")
        try:
            tokens = [base64.b64decode(token, validate=True) for token in ranks.split(' ')]
        except ValueError as e:    # binascii.Error is one, and so is a character outside ASCII
            raise damaged(f'ranks are not base64: {e}') from e
    else:
        raise damaged(f"kind 'bpe' or 'bytes' expected, found {kind!r}")

    ranks = {token: rank for rank, token in enumerate(tokens)}
    missing = sum(bytes([b]) not in ranks for b in range(256))
    if missing or len(ranks) != len(tokens) or b'' in ranks:
        raise damaged(f'{missing} of the 256 bytes missing, {len(tokens) - len(ranks)} tokens repeated')
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: len(ranks)})
    except ValueError as e:
        raise damaged('bad split pattern: ' + ' '.join(str(e).split())) from e


def spec_from_file(path, name, pattern):
    """a file in tiktoken's format, 'base64-of-the-token rank' on each line, ranks 0, 1, 2, ... -> spec dict"""
    try:
        lines = Path(path).read_text(encoding='ascii').splitlines()
        tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
        if [int(line.split()[1]) for line in lines] != list(range(len(lines))):
            raise ValueError('ranks are not 0, 1, 2, ...')
    except OSError as e:
        raise TokenizerError(f'cannot read the tokenizer {path}: {e.strerror}; restore it from the repository') from e
    except (ValueError, IndexError) as e:
        raise TokenizerError(f'{path} is not a tiktoken file ({e}); restore it from the repository') from e
    return bpe_spec(name, pattern, tokens)


def gpt2_byte_of():
    """-> dict of the character that stands for a byte in GPT-2's files, to that byte"""
    # printable bytes stand for themselves, the others got the characters from U+0100 on
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def gpt2_spec_from_dir(folder):
    """
    folder: str or Path of a directory with vocab.bpe + encoder.json (the names in GPT-2's release) or
    merges.txt + vocab.json (the same two files, as released with the weights elsewhere) -> spec dict.
    Raises TokenizerError where they are missing or do not belong together.
    """
    folder = Path(folder)
    for merges_name, vocab_name in (('vocab.bpe', 'encoder.json'), ('merges.txt', 'vocab.json')):
        if (folder / merges_name).is_file() and (folder / vocab_name).is_file():
            break
    else:
        raise TokenizerError(f'no tokenizer in {folder}: put vocab.bpe and encoder.json there '
                             '(or merges.txt and vocab.json)')

    byte_of = gpt2_byte_of()
    try:
        vocab = json.loads((folder / vocab_name).read_text(encoding='utf-8'))
        lines = (folder / merges_name).read_text(encoding='utf-8').split('\n')
        first = 1 if lines[0].startswith('#version') else 0
        merges = [''.join(line.split(' ')) for line in lines[first:] if line]
        # tiktoken takes a token's id for the rank of its merge, so the two files must agree on the order
        singles = sorted(byte_of, key=lambda character: vocab[character])
        written = singles + merges + [ENDOFTEXT]
        if [vocab.get(token) for token in written] != list(range(len(vocab))):
            raise ValueError('ids and merges differ in order or number')
        tokens = [bytes(byte_of[character] for character in token) for token in written[:-1]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise TokenizerError(f'{merges_name} and {vocab_name} in {folder} are damaged or not a pair '
                             f'({type(e).__name__}: {e}): fetch both again') from e
    return bpe_spec('gpt2', GPT2_PATTERN, tokens)


def tokenizer_spec(name):
    """name: 'python4k', 'bytes', 'gpt2' or a directory -> spec dict (see load_tokenizer). Raises TokenizerError."""
    if name == 'python4k':
        return spec_from_file(PYTHON4K_FILE, name, PYTHON_PATTERN)
    if name == 'bytes':
        return {'kind': 'bytes'}
    if name == 'gpt2':
        try:
            encoding = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as e:    # no network (requests' errors are OSErrors); a broken download
            raise TokenizerError('the gpt2 tokenizer cannot be downloaded: go online once, or put vocab.bpe and '
                                 'encoder.json of GPT-2 in a directory and name that directory as the tokenizer') from e
        return bpe_spec(name, GPT2_PATTERN, [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])
    if Path(name).is_dir():
        return gpt2_spec_from_dir(name)
    raise TokenizerError(f"unknown tokenizer '{name}': choose python4k, bytes, gpt2, or a directory that holds "
                         'vocab.bpe and encoder.json')
