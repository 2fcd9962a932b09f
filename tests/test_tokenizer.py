"""Tokenizers against a naive BPE written here, tiktoken's own reader, and random bytes and characters."""

import base64
import json
import random
import socket

import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

import tokenizer
from tokenizer import ENDOFTEXT, TokenizerError, spec_from_dir, load_tokenizer, tokenizer_spec


def naive_bpe(piece, ranks):
    """piece: bytes -> ids: merge the neighbours that make the token of the lowest rank, until none do"""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def read_ranks(path):
    """the file as the format is defined, without our reader"""
    lines = path.read_bytes().split(b'\n')
    assert lines.pop() == b''
    return {base64.b64decode(line.split(b' ')[0]): int(line.split(b' ')[1]) for line in lines}


@pytest.fixture(scope='module')
def python4k():
    return load_tokenizer(tokenizer_spec('python4k'))


def write_gpt2_dir(folder, merges, merges_name='vocab.bpe', vocab_name='encoder.json'):
    """a small tokenizer in GPT-2's two files; merges: pairs of str, in the characters of those files"""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocab = {token: i for i, token in enumerate(alphabet + [a + b for a, b in merges] + [ENDOFTEXT])}
    folder.mkdir(exist_ok=True)
    (folder / vocab_name).write_text(json.dumps(vocab), encoding='utf-8')
    (folder / merges_name).write_text('#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in merges), encoding='utf-8')
    return folder


GPT2_MERGES = [('Ġ', 't'), ('h', 'e'), ('Ġt', 'he'), ('Ċ', 'Ċ'), ('Ã', '©'), ("'", 's'), ('1', '2'), ('12', '3'),
               ('123', '4')]


# ---- python4k ----

def test_python4k_is_a_complete_vocabulary_of_4096(python4k):
    ranks = read_ranks(tokenizer.PYTHON4K_FILE)
    assert sorted(ranks.values()) == list(range(4095))
    assert {bytes([b]) for b in range(256)} <= set(ranks)
    assert python4k.n_vocab == 4096 and python4k.eot_token == 4095
    assert [python4k.decode_single_token_bytes(i) for i in range(4095)] == sorted(ranks, key=ranks.get)
    # each merge joins two tokens that exist before it
    for token, rank in ranks.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        assert rank < 256 or any(ranks.get(a, rank) < rank and ranks.get(b, rank) < rank for a, b in halves)


def test_python4k_cuts_and_merges_as_a_naive_encoder_does(python4k):
    """The pieces are cut by hand here, the merges done by naive_bpe: both of tiktoken's steps are checked."""
    pieces = ['def', ' fibonacci', '(n', '):', '\n    ', 'return', ' self', '._', 'memo', '[n', ']', ' if', ' n', ' >',
              ' 123', '45', ' else', " '", 'data', "'", '\n\n\n', 'class', ' Größe', ':', '  ', '#', ' l', "'été",
              ' \t', '变量', ' =', ' \x00"""', 'Don', "'t", '  ', 'stop', '."""']
    ranks = read_ranks(tokenizer.PYTHON4K_FILE)
    expected = [i for piece in pieces for i in naive_bpe(piece.encode('utf-8'), ranks)]
    assert python4k.encode_ordinary(''.join(pieces)) == expected


def test_a_prompt_is_cut_as_the_same_text_within_a_file():
    """
    A pattern that joins '):' with the newline and indentation after it needs 5% fewer tokens, but then a prompt that
    ends in 'def f(n):' ends in a token that in the training text never stood before a line end: the model goes on
    with anything but a function body. Whatever comes next on a new line, the prompt's own tokens must not change.
    """
    encoding = load_tokenizer(tokenizer_spec('python4k'))
    for prompt in ('def fibonacci(n):', 'class A(B):', 'x = {', '"""Return the sum.', '# a comment', 'import os'):
        whole = encoding.encode_ordinary(prompt + '\n    return n\n')
        alone = encoding.encode_ordinary(prompt)
        assert whole[:len(alone)] == alone


def test_any_bytes_round_trip(python4k):
    rng = random.Random(0)
    ranks = read_ranks(tokenizer.PYTHON4K_FILE)
    for _ in range(200):
        data = rng.randbytes(rng.randrange(1, 60))
        assert python4k.decode_bytes(naive_bpe(data, ranks)) == data


@pytest.mark.parametrize('name', ['python4k', 'bytes'])
def test_any_text_round_trips(name):
    encoding = load_tokenizer(tokenizer_spec(name))
    rng = random.Random(1)
    kinds = [lambda: rng.randrange(128), lambda: rng.randrange(0xD800), lambda: rng.randrange(0xE000, 0x110000),
             lambda: ord(rng.choice(' \n\t\r')), lambda: ord(rng.choice('0123456789_.()'))]
    for _ in range(300):
        text = ''.join(chr(rng.choice(kinds)()) for _ in range(rng.randrange(200)))
        assert encoding.decode_bytes(encoding.encode_ordinary(text)) == text.encode('utf-8')
    text = f'a document may hold {ENDOFTEXT} as plain text'
    assert encoding.eot_token not in encoding.encode_ordinary(text)
    assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize('character', list(' \n=a1_é\x00\u3000'))
def test_long_runs_of_one_character(python4k, character):
    """With a look-ahead in the pattern, as GPT-2's has, the regex engine backtracks: two million blanks crash it."""
    text = character * 2_000_000 + 'a'
    assert python4k.decode(python4k.encode_ordinary(text)) == text


def test_bytes_are_their_own_ids():
    encoding = load_tokenizer(tokenizer_spec('bytes'))
    text = 'naïve → 数\n' * 50
    assert encoding.encode_ordinary(text) == list(text.encode('utf-8'))
    assert encoding.n_vocab == 257 and encoding.eot_token == 256


# ---- specs ----

def test_a_spec_read_from_json_needs_neither_network_nor_file(monkeypatch, tmp_path):
    """A checkpoint that named its tokenizer only was of no use on a machine without network or without our files."""
    text = 'def f(x):\n    return "thé" * 12345  # the end\n'
    folder = write_gpt2_dir(tmp_path / 'gpt2', GPT2_MERGES)
    for name in ('python4k', 'bytes', str(folder)):
        spec = tokenizer_spec(name)
        expected = load_tokenizer(spec).encode_ordinary(text)
        stored = json.dumps(spec)
        with monkeypatch.context() as m:
            m.setattr(socket, 'socket', None)
            m.setattr(tiktoken, 'get_encoding', None)
            m.setattr(tokenizer, 'PYTHON4K_FILE', tmp_path / 'gone')
            encoding = load_tokenizer(json.loads(stored))
            assert encoding.encode_ordinary(text) == expected
            assert encoding.decode(expected) == text


GOOD = tokenizer_spec('python4k')
TOKENS = GOOD['ranks'].split(' ')


@pytest.mark.parametrize('spec', [
    None, [], 'gpt2', {}, {'kind': 'wordpiece'}, {'kind': 'bpe'}, GOOD | {'name': 3}, GOOD | {'pattern': None},
    GOOD | {'pattern': '('}, GOOD | {'ranks': ''}, GOOD | {'ranks': TOKENS}, GOOD | {'ranks': 'é' + GOOD['ranks']},
    GOOD | {'ranks': '*' + GOOD['ranks']}, GOOD | {'ranks': ' '.join(TOKENS[1:])},
    GOOD | {'ranks': ' '.join(TOKENS + TOKENS[-1:])}, GOOD | {'ranks': GOOD['ranks'] + ' '}], ids=range(16))
def test_a_damaged_spec_is_one_clear_line(spec):
    with pytest.raises(TokenizerError, match='^unusable tokenizer .*: prepare the data again') as e:
        load_tokenizer(spec)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('content', [None, b'AA==\n', b'AA== 0\nAQ== 2\n', b'AA== x\n', b'not base64 0\n', b'\xff 0\n'])
def test_a_damaged_tokenizer_file_is_one_clear_line(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tokenizer, 'PYTHON4K_FILE', tmp_path / 'python4k.tiktoken')
    if content is not None:
        (tmp_path / 'python4k.tiktoken').write_bytes(content)
    with pytest.raises(TokenizerError, match='restore it from the repository') as e:
        tokenizer_spec('python4k')
    assert '\n' not in str(e.value)


# ---- gpt2 ----

@pytest.mark.parametrize('names', [('vocab.bpe', 'encoder.json'), ('merges.txt', 'vocab.json')])
def test_gpt2_files_against_tiktokens_own_reader(tmp_path, monkeypatch, names):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    folder = write_gpt2_dir(tmp_path / 'gpt2', GPT2_MERGES, *names)
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / names[0]), str(folder / names[1]))
    encoding = load_tokenizer(spec_from_dir(folder))
    assert {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)} == ranks
    assert encoding.n_vocab == 256 + len(GPT2_MERGES) + 1
    pieces = ['cut', ' the', ' way', ' GPT', '-', '2', ' does', '\n', '\n', 'it', "'s", ' 1234', ' café', ' ', ' x',
              ' ']
    expected = [i for piece in pieces for i in naive_bpe(piece.encode('utf-8'), ranks)]
    assert encoding.encode_ordinary(''.join(pieces)) == expected


def damage_order(folder):
    write_gpt2_dir(folder, GPT2_MERGES[::-1])
    (folder / 'vocab.bpe').write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in GPT2_MERGES), encoding='utf-8')


@pytest.mark.parametrize('damage', [
    damage_order,
    lambda folder: (folder / 'vocab.bpe').write_text('#version: 0.2\n', encoding='utf-8'),
    lambda folder: (folder / 'vocab.bpe').write_bytes(b'\xff\xfe'),
    lambda folder: (folder / 'encoder.json').write_text('{"a": 0, "b"', encoding='utf-8'),
    lambda folder: (folder / 'encoder.json').write_text('[1, 2]', encoding='utf-8'),
    lambda folder: (folder / 'encoder.json').write_text('{"a": 0}', encoding='utf-8'),
    lambda folder: (folder / 'encoder.json').unlink()], ids=range(7))
def test_damaged_gpt2_files_are_one_clear_line(tmp_path, damage):
    folder = write_gpt2_dir(tmp_path / 'gpt2', GPT2_MERGES)
    damage(folder)
    with pytest.raises(TokenizerError, match='fetch both again|put vocab.bpe and encoder.json') as e:
        spec_from_dir(folder)
    assert '\n' not in str(e.value)


def test_gpt2_without_network_says_which_files_to_fetch(monkeypatch):
    def offline(name):
        raise ConnectionError('Max retries exceeded\n(Caused by ...)')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(TokenizerError, match='go online once, or put vocab.bpe and encoder.json') as e:
        tokenizer_spec('gpt2')
    assert '\n' not in str(e.value)


def test_gpt2_by_tiktoken_is_stored_whole(monkeypatch, tmp_path):
    """get_encoding gives an Encoding of the same small vocabulary here; the spec must hold all of its tokens."""
    small = load_tokenizer(spec_from_dir(write_gpt2_dir(tmp_path / 'gpt2', GPT2_MERGES)))
    monkeypatch.setattr(tiktoken, 'get_encoding', {'gpt2': small}.__getitem__)
    assert tokenizer_spec('gpt2') == spec_from_dir(tmp_path / 'gpt2')


def test_the_gpt2_pattern_is_tiktokens():
    from tiktoken_ext import openai_public
    assert tokenizer.GPT2_PATTERN == openai_public.r50k_pat_str


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(TokenizerError, match="'gpt5': choose python4k, bytes, gpt2, or a directory"):
        tokenizer_spec('gpt5')
