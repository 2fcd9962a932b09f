"""
Tokenizers: text to token ids and back, always through tiktoken.Encoding; and chat templates, for dialogues.

    python4k     byte-level BPE of 4,096 ids, trained on Python code, kept in data/python/python4k.tiktoken
    bytes        one id per byte, 257 ids
    gpt2         GPT-2's 50,257 ids; tiktoken downloads them once
    DIRECTORY    with a model's tokenizer.json

tokenizer_spec(name) turns one of these names into a spec: a dict for JSON, with everything it takes to encode
and decode. Specs are stored in meta.json and in checkpoints, which therefore need no network and no other
file; load_tokenizer(spec) makes the tiktoken.Encoding.

    spec = tokenizer_spec('python4k')
    encoding = load_tokenizer(spec)
    ids = encoding.encode_ordinary('def fibonacci(n):')      # a literal <|endoftext|> is plain text to it
    encoding.decode_bytes(ids)                               # bytes: one token may be half a character

A spec of kind 'bpe' has a name, and
    pattern     how text is cut into pieces before any merging, one of PATTERNS
    ranks       the tokens in the order of their merges, in base64; they have, in this order, the ids that no
                added token has
and some of
    special     {text: id} of added tokens, which text never makes; without it, <|endoftext|> with the last id
    end         the special token that ends a document; without it, <|endoftext|>
    bos         ids that come before every text ("begin of sequence")
    stop        ids that end a reply, besides those of 'end' and 'template'; specs of today have none
    lacks       bytes, in hexadecimal, that no token stands for: they are lost
    template    how a dialogue is written, for chat models; see known_template

Not tried yet with the released files of GPT-2 and Llama 3, only with small vocabularies in their layout.

Not here: training (see data/python/train_tokenizer.py), SentencePiece, vocab.json with merges.txt, other chat
templates than SmolLM2's and Llama 3's. Added tokens are never found in text, whatever a model's files say.
"""

import base64
import re
from pathlib import Path

import tiktoken

from files import DAMAGED, one_line, read_json, read_text

ENDOFTEXT = '<|endoftext|>'
PYTHON4K_FILE = Path(__file__).resolve().parent / 'data' / 'python' / 'python4k.tiktoken'

# A pattern cuts text into pieces; merges never cross a cut. Compared with GPT-2's, this one
#  - joins a word and one punctuation mark before it: '.append', '(self', '_name' (4% fewer tokens);
#  - joins a newline and the indentation after it, but no ':' before it: a prompt that stops after 'def f(n):'
#    is cut as the same line is cut within a file;
#  - cuts after three digits, and not at English contractions, which would make 'd and ef of 'def;
#  - has no look-ahead, so the regex engine needs time linear in the length of any text.
PYTHON_PATTERN = r"(?: |[^\s\p{L}\p{N}])?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

# the pattern of GPT-2's release, with the possessive quantifiers that tiktoken adds for speed (same cuts)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# SmolLM2 first cuts digits apart, then the rest as GPT-2 does: both in one pattern (same cuts)
SMOLLM_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?![^\s\p{N}])|\s"

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

PATTERNS = {'python4k': PYTHON_PATTERN, 'gpt2': GPT2_PATTERN,
            'smollm': SMOLLM_PATTERN, 'llama3': LLAMA3_PATTERN}

BYTES_PATTERN = r'[\s\S]{1,64}'     # nothing merges, so any cuts will do

SMOLLM_SYSTEM = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
# Llama 3's template says this date if it is not told another
LLAMA3_PREFIX = 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'

ENDS = (ENDOFTEXT, '<|end_of_text|>')       # the first of these in a vocabulary ends a document
GGUF_NORMAL = 1                             # type of a token that is not an added one


class TokenizerError(Exception):
    """A tokenizer that cannot be had or read; the message is one line for the user, remedy included."""


class Encoding(tiktoken.Encoding):
    """tiktoken's, for vocabularies that lack some bytes, too. special: {text: id}."""

    def __init__(self, name, pattern, ranks, special):
        n_vocab = len(ranks) + len(special)
        # tiktoken needs an id for every byte: encode_ordinary() drops those beyond the vocabulary
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        beyond = {byte: n_vocab + i for i, byte in enumerate(lacking)}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks | beyond, special_tokens=special)
        self.special, self.max_token_value = special, n_vocab - 1

    def encode_ordinary(self, text):
        return [id for id in super().encode_ordinary(text) if id <= self.max_token_value]


def bpe_spec(name, pattern, tokens, **more):
    """tokens: list of bytes, in the order of their merges; more: further fields -> spec dict"""
    return {'kind': 'bpe', 'name': name, 'pattern': pattern,
            'ranks': ' '.join(base64.b64encode(token).decode('ascii') for token in tokens), **more}


def load_tokenizer(spec):
    """
    spec: dict made by tokenizer_spec (or read back from meta.json or a checkpoint) -> Encoding, ids 0 to
    n_vocab - 1. Never touches the network or a file. Raises TokenizerError.
    """
    try:
        if spec['kind'] == 'bytes':
            tokens = {bytes([b]): b for b in range(256)}
            return Encoding('bytes', BYTES_PATTERN, tokens, {ENDOFTEXT: 256})
        tokens = [base64.b64decode(token) for token in spec['ranks'].split(' ')]
        special = spec.get('special', {ENDOFTEXT: len(tokens)})
        free = sorted(set(range(len(tokens) + len(special))) - set(special.values()))
        ranks = dict(zip(tokens, free, strict=True))    # raises ValueError if an id is repeated, or too large
        return Encoding(spec['name'], spec['pattern'], ranks, special)
    except DAMAGED as error:
        raise TokenizerError(f'the tokenizer cannot be used ({one_line(error)}): prepare the data again, or '
                             'use another checkpoint') from None


# -----------------------------------------------------------------------------
# documents and dialogues: special tokens come from nowhere else


def bos_ids(spec):
    """-> the ids that come before every text, often none"""
    return spec.get('bos', [])


def start_ids(spec, encoding):
    """-> the ids after which a text begins: BOS, or else the end of another document"""
    return bos_ids(spec) or [end_id(spec, encoding)]


def end_id(spec, encoding):
    """-> the id that ends a document"""
    return encoding.special[spec.get('end', ENDOFTEXT)]


def stop_ids(spec, encoding):
    """-> the ids that end a reply, a set with end_id in it"""
    stops = spec['template']['stop'] if 'template' in spec else []
    return {end_id(spec, encoding), *spec.get('stop', []), *(encoding.special[text] for text in stops)}


def written_ids(encoding, pieces):
    """
    pieces: strings, in turn from the template and from a message -> ids. Only the template's can make special
    tokens. Between two of those, text is encoded in one go, as it was when the model learned it.
    """
    special = re.compile('(' + '|'.join(map(re.escape, encoding.special)) + ')')
    ids, plain = [], ''
    for i, piece in enumerate(pieces):
        for j, part in enumerate([piece] if i % 2 else special.split(piece)):
            if j % 2:
                ids, plain = ids + encoding.encode_ordinary(plain) + [encoding.special[part]], ''
            else:
                plain += part
    return ids + encoding.encode_ordinary(plain)


def dialogue_ids(spec, encoding, messages, begin=True, reply=True):
    """
    messages: [(role, text)], role 'system', 'user' or 'assistant' -> ids, as spec['template'] has it.
    begin: this is the start of a conversation. reply: end where the assistant's reply begins.
    """
    template, messages = spec['template'], list(messages)
    before, after = template['message'].split('{text}')
    pieces = [template['begin'] if begin else '']
    if begin and (template['prefix'] or template['system']) and (not messages or messages[0][0] != 'system'):
        messages.insert(0, ('system', template['system']))
    for i, (role, text) in enumerate(messages):
        text = text.strip() if template['strip'] else text
        pieces[-1] += before.replace('{role}', role)
        pieces += [template['prefix'] + text if begin and i == 0 and role == 'system' else text, after]
    if reply:
        pieces[-1] += before.replace('{role}', 'assistant')
    return written_ids(encoding, pieces)


def known_template(jinja, special):
    """
    jinja: the chat template in a model's files, or ''; special: its special tokens -> a spec's template, or
    None if it is not a known one. Its fields:
        begin, message      how a conversation begins; how a message is written
        prefix, system      text before the first system message; that message, if none is given
        strip, stop         whether blanks around a message go; special tokens that end a reply
    """
    if '<|im_start|>' in jinja and '<|im_end|>' in special:
        return {'begin': '', 'message': '<|im_start|>{role}\n{text}<|im_end|>\n', 'prefix': '',
                'system': SMOLLM_SYSTEM if SMOLLM_SYSTEM in jinja else '', 'strip': False,
                'stop': ['<|im_end|>']}
    if '<|start_header_id|>' in jinja and '<|eot_id|>' in special:
        return {'begin': '<|begin_of_text|>',
                'message': '<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>',
                'prefix': LLAMA3_PREFIX if 'Cutting Knowledge' in jinja else '', 'system': '', 'strip': True,
                'stop': ['<|eot_id|>']}
    return None


# -----------------------------------------------------------------------------
# from the files that tokenizers come in


def gpt2_byte_of():
    """-> {character: byte}: in the files of byte-level BPE, one character stands for each byte"""
    # printable bytes stand for themselves, characters from U+0100 on for the others
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_spec(name, vocab, merges, special, jinja, bos):
    """
    name: of the pattern; vocab: {token: id}, in gpt2_byte_of's characters; merges: 'a b' or [a, b], in order;
    special: {text: id} of added tokens; jinja: see known_template; bos: ids before every text -> spec dict.
    Raises TokenizerError, or what DAMAGED names.
    """
    ends = [text for text in ENDS if text in special]
    if not ends:
        raise TokenizerError(f'no {" or ".join(ENDS)}, which would end a document')
    if sorted((vocab | special).values()) != list(range(len(vocab | special))):
        raise ValueError('ids are repeated or missing')
    # tiktoken merges in the order of ids, so that must be the order of merges
    order = [vocab[''.join(merge).replace(' ', '')] for merge in merges]
    if order != sorted(order):
        raise ValueError('ids and merges differ in order')
    byte_of, template = gpt2_byte_of(), known_template(jinja, special)
    ordinary = sorted(vocab.keys() - special.keys(), key=vocab.get)
    tokens = [bytes(byte_of[character] for character in token) for token in ordinary]
    spec = bpe_spec(name, PATTERNS[name], tokens)
    if special != {ENDOFTEXT: len(tokens)}:
        lacks = bytes(byte for character, byte in byte_of.items() if character not in vocab)
        spec.update(special=special, end=ends[0], lacks=lacks.hex())
    if bos:
        spec['bos'] = bos
    if template:
        spec['template'] = template
    return spec


def bos_of(processor):
    """post_processor of tokenizer.json, or None -> the ids that it puts before a text"""
    steps = processor.get('processors', [processor]) if processor else []
    return [id for step in steps for piece in step.get('single', []) if 'SpecialToken' in piece
            for id in step['special_tokens'][piece['SpecialToken']['id']]['ids']]


def spec_from_json(folder):
    """tokenizer.json, and the chat template beside it -> spec dict. Raises as byte_level_spec does."""
    data = read_json(folder / 'tokenizer.json')
    cut = data['pre_tokenizer'] or {'type': 'SentencePiece'}
    cuts = [step['pattern']['Regex'] if step['type'] == 'Split' else step['type']
            for step in cut.get('pretokenizers', [cut])]
    known = {'gpt2': ['ByteLevel'], 'smollm': ['Digits', 'ByteLevel'],
             'llama3': [LLAMA3_PATTERN, 'ByteLevel']}
    name = next((name for name in known if known[name] == cuts), None)
    if name is None:
        raise TokenizerError(f'text is cut otherwise than for GPT-2, SmolLM2 or Llama 3: {cuts!r:.100}')
    jinja = ''
    if (folder / 'chat_template.jinja').exists():           # where newer models have it
        jinja = read_text(folder / 'chat_template.jinja')
    elif (folder / 'tokenizer_config.json').exists():
        jinja = str(read_json(folder / 'tokenizer_config.json').get('chat_template'))
    special = {token['content']: token['id'] for token in data['added_tokens']}
    return byte_level_spec(name, data['model']['vocab'], data['model']['merges'], special, jinja,
                           bos_of(data.get('post_processor')))


def spec_from_gguf(metadata):
    """metadata: {key: value} of a GGUF file -> spec dict. Raises as byte_level_spec does."""
    settings = {key.removeprefix('tokenizer.ggml.'): value for key, value in metadata.items()}
    name = {'smollm': 'smollm', 'llama-bpe': 'llama3'}.get(settings.get('pre'))
    if settings.get('model') != 'gpt2' or name is None:
        kind = f"{settings.get('model')!r:.40}, {settings.get('pre')!r:.40}"
        raise TokenizerError(f'a tokenizer of kind {kind}; supported is byte-level BPE as in SmolLM2 (gpt2, '
                             'smollm) and Llama 3 (gpt2, llama-bpe)')
    vocab = {text: id for id, text in enumerate(settings['tokens'])}
    special = {text: id for text, id in vocab.items() if settings['token_type'][id] != GGUF_NORMAL}
    # Llama 3's first files did not say that a text begins with BOS
    bos = [settings['bos_token_id']] if settings.get('add_bos_token', name == 'llama3') else []
    return byte_level_spec(name, vocab, settings['merges'], special,
                           settings.get('tokenizer.chat_template', ''), bos)


def tokenizer_spec(name):
    """
    name: 'python4k', 'bytes', 'gpt2' or a directory -> spec dict. Raises TokenizerError, or, for a directory
    with damaged files, OSError or what DAMAGED names.
    """
    if name == 'python4k':      # 'base64-of-the-token rank' on each line
        tokens = [base64.b64decode(line.split()[0]) for line in read_text(PYTHON4K_FILE).splitlines()]
        return bpe_spec(name, PYTHON_PATTERN, tokens)
    if name == 'bytes':
        return {'kind': 'bytes'}
    if name == 'gpt2':
        try:
            encoding = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as e:    # no network (requests raises OSErrors), or a broken download
            raise TokenizerError('the gpt2 tokenizer cannot be downloaded: go online once, or put '
                                 "GPT-2's tokenizer.json in a directory and name that") from e
        tokens = [encoding.decode_single_token_bytes(id) for id in range(encoding.eot_token)]
        return bpe_spec(name, GPT2_PATTERN, tokens)
    if Path(name, 'tokenizer.json').exists():
        return spec_from_json(Path(name))
    raise TokenizerError('unknown tokenizer: choose python4k, bytes, gpt2, a model such as smollm2, or a '
                         'directory that holds tokenizer.json')
