"""
Tokenizers: text to token ids and back, always through tiktoken.Encoding; and chat templates, for dialogues.

    python4k     byte-level BPE of 4,096 ids, trained on Python code, kept in data/python/python4k.tiktoken
    bytes        one id per byte, 257 ids
    gpt2         GPT-2's 50,257 ids; tiktoken downloads them once
    DIRECTORY    with a model's files: tokenizer.json, or vocab.bpe + encoder.json, or merges.txt + vocab.json

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
    special     {text: id} of added tokens that text never makes; without it, <|endoftext|> with the last id
    words       {text: id} of added tokens that are ordinary text: found in prompts, and shown
    end         the special token that ends a document; without it, <|endoftext|>
    bos         ids that come before every text ("begin of sequence")
    stop        ids that end a reply, besides those of 'end' and 'template'
    lacks       bytes, in hexadecimal, that no token stands for: they are lost
    template    how a dialogue is written, for chat models; see known_template

Not tried yet with the released files of GPT-2 and Llama 3, only with small vocabularies in their layout.

Not here: training (see data/python/train_tokenizer.py), SentencePiece, other chat templates than SmolLM2's
and Llama 3's.
"""

import base64
import re
from contextlib import contextmanager
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

# only these: a pattern in a stranger's file could hang the regex engine, or crash it
PATTERNS = {'python4k': PYTHON_PATTERN, 'gpt2': GPT2_PATTERN,
            'smollm': SMOLLM_PATTERN, 'llama3': LLAMA3_PATTERN}
LONGEST_BLANK = 10_000      # a look-ahead after a million blanks overflows that engine's stack

BYTES_PATTERN = r'[\s\S]{1,64}'     # nothing merges, so any cuts will do

SMOLLM_SYSTEM = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
# Llama 3's template says this date if it is not told another
LLAMA3_PREFIX = 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'

ENDS = (ENDOFTEXT, '<|end_of_text|>')       # the first of these in a vocabulary ends a document
# other special tokens that vocab.json may hold without saying that they are special
USUAL = ('<s>', '</s>', '<unk>', '<pad>', '<mask>', '[PAD]')
NAMED = tuple(f'{name}_token' for name in ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask'))
GGUF_NORMAL, GGUF_WORD, GGUF_UNUSED = 1, 4, 5


class TokenizerError(Exception):
    """A tokenizer that cannot be had or read; the message is one line for the user, remedy included."""


@contextmanager
def checking(name, remedy):
    """Turns whatever is wrong with a tokenizer into a TokenizerError, one line with the remedy."""
    try:
        yield
    except (OSError, *DAMAGED) as error:
        raise TokenizerError(f'{name} cannot be used ({one_line(error)}): {remedy}') from None


def splitter(texts):
    """-> a pattern with which re.split puts these texts, the longest first, in the odd places of its list"""
    return re.compile('(' + '|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) + ')')


class Encoding(tiktoken.Encoding):
    """
    tiktoken's, for vocabularies that lack some bytes, any number of blanks, and words: added tokens that are
    found in text. special, words: {text: id}.
    """

    def __init__(self, name, pattern, ranks, special, words, lacks=b''):
        added = special | words
        n_vocab = len(ranks) + len(added)
        # tiktoken needs an id for every byte: encode_between_words() drops those beyond the vocabulary
        beyond = {bytes([byte]): n_vocab + i for i, byte in enumerate(lacks)}
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks | beyond, special_tokens=added)
        self.special, self.words, self.max_token_value = special, words, n_vocab - 1
        self.words_in = splitter(words)
        self.special_ids = set(special.values())

    def is_special_token(self, token):
        return token in self.special_ids

    def encode_ordinary(self, text):
        ids = []
        for i, part in enumerate(self.words_in.split(text) if self.words else [text]):
            ids += [self.words[part]] if i % 2 else self.encode_between_words(part)
        return ids

    def encode_between_words(self, text):
        ids = []
        for part in re.split(rf'((?<!\s)\s{{{LONGEST_BLANK},}})', text):
            size = LONGEST_BLANK if part.isspace() else len(part) + 1
            for start in range(0, len(part), size):
                ids += super().encode_ordinary(part[start:start + size])
        return [id for id in ids if id <= self.max_token_value]


def bpe_spec(name, pattern, tokens, **more):
    """tokens: list of bytes, in the order of their merges; more: further fields -> spec dict"""
    return {'kind': 'bpe', 'name': name, 'pattern': pattern,
            'ranks': ' '.join(base64.b64encode(token).decode('ascii') for token in tokens), **more}


def are_ids(ids, n_vocab):
    return all(type(id) is int and 0 <= id < n_vocab for id in ids)


def load_bpe(spec):
    """The Encoding of a spec of kind 'bpe'. Raises what DAMAGED names."""
    if spec['kind'] != 'bpe' or type(spec['name']) is not str:
        raise ValueError('of an unknown kind')
    if spec['pattern'] not in PATTERNS.values():
        raise ValueError('a split pattern that may not be safe')
    tokens = [base64.b64decode(token, validate=True) for token in spec['ranks'].split(' ')]
    special, words = spec.get('special', {ENDOFTEXT: len(tokens)}), spec.get('words', {})
    lacks, added = bytes.fromhex(spec.get('lacks', '')), [*special.values(), *words.values()]
    total, taken = len(tokens) + len(added), set(added)
    if len(taken) != len(added) or not are_ids(added, total):
        raise ValueError('ids of added tokens are repeated, or beyond the vocabulary')
    if special.keys() & words.keys() or '' in words:
        raise ValueError('added words are empty, or special')
    ranks = dict(zip(tokens, (id for id in range(total) if id not in taken), strict=True))
    lacking = {b for b in range(256) if bytes([b]) not in ranks}
    if len(ranks) != len(tokens) or b'' in ranks or lacking != set(lacks):
        raise ValueError('tokens are missing, empty or repeated')
    return Encoding(spec['name'], spec['pattern'], ranks, special, words, lacks)


def load_tokenizer(spec):
    """
    spec: dict made by tokenizer_spec (or read back from meta.json or a checkpoint) -> Encoding, ids 0 to
    n_vocab - 1. Never touches the network or a file. Raises TokenizerError.
    """
    with checking('the tokenizer', 'prepare the data again, or use another checkpoint'):
        if spec['kind'] == 'bytes':
            tokens = {bytes([b]): b for b in range(256)}
            encoding = Encoding('bytes', BYTES_PATTERN, tokens, {ENDOFTEXT: 256}, {})
        else:
            encoding = load_bpe(spec)
        bos, stop = spec.get('bos', []), spec.get('stop', [])
        if type(bos) is not list or type(stop) is not list or not are_ids(bos + stop, encoding.n_vocab):
            raise ValueError('bos and stop are no lists of ids')
        stop_ids(spec, encoding)
        if 'template' in spec:
            for messages in ([], [('system', '')]):     # fails if anything is wrong with the template
                dialogue_ids(spec, encoding, messages)
        return encoding


# -----------------------------------------------------------------------------
# documents and dialogues: special tokens come from nowhere else


def bos_ids(spec):
    """-> the ids that come before every text, often none"""
    return [*spec.get('bos', [])]


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
    special = splitter(encoding.special)
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


def known_template(jinja, added, bos=''):
    """
    jinja: the chat template in a model's files, or ''; added: texts of added tokens; bos: the text for its
    bos_token -> a spec's template, or None if it is not a known one. Its fields:
        begin, message      how a conversation begins; how a message is written
        prefix, system      text before the first system message; that message, if none is given
        strip, stop         whether blanks around a message go; special tokens that end a reply
    """
    if '<|im_start|>' in jinja and {'<|im_start|>', '<|im_end|>'} <= set(added):
        return {'begin': bos if 'bos_token' in jinja else '',
                'message': '<|im_start|>{role}\n{text}<|im_end|>\n', 'prefix': '',
                'system': SMOLLM_SYSTEM if SMOLLM_SYSTEM in jinja else '', 'strip': False,
                'stop': ['<|im_end|>']}
    if '<|start_header_id|>' in jinja and '<|eot_id|>' in added:
        return {'begin': '<|begin_of_text|>',
                'message': '<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>',
                'prefix': LLAMA3_PREFIX if 'Cutting Knowledge' in jinja else '', 'system': '', 'strip': True,
                'stop': ['<|eot_id|>']}
    return None


# -----------------------------------------------------------------------------
# from the files that tokenizers come in


def spec_from_file(path, name, pattern):
    """a file in tiktoken's format, 'base64-of-the-token rank' on each line, ranks 0, 1, ... -> spec dict"""
    with checking(path, 'restore it from the repository'):
        lines = read_text(path).splitlines()
        tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
        if [int(line.split()[1]) for line in lines] != list(range(len(lines))):
            raise ValueError('ranks are not 0, 1, 2, ...')
    return bpe_spec(name, pattern, tokens)


def gpt2_byte_of():
    """-> {character: byte}: in the files of byte-level BPE, one character stands for each byte"""
    # printable bytes stand for themselves, characters from U+0100 on for the others
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def byte_level_spec(name, vocab, merges, special, words, jinja='', bos='', begin=(), eos=()):
    """
    name: of the pattern; vocab: {token: id}, in gpt2_byte_of's characters; merges: 'a b' or [a, b], in order;
    special, words: {text: id}; jinja, bos: see known_template; begin: ids before every text; eos: ids that
    end a text -> spec dict. Raises TokenizerError, or what DAMAGED names.
    """
    added, byte_of = special | words, gpt2_byte_of()
    template = known_template(jinja, added, bos)
    text_of = {id: text for text, id in added.items()}
    ends = [text for text in (*ENDS, *map(text_of.get, eos), '</s>') if text in added]
    if not ends:
        raise TokenizerError('no special token ends a document; name one as eos_token in '
                             'tokenizer_config.json')
    end = next((text for text in ends if text in special), ends[0])
    # tokens that end a document or make up a template are special whatever the files say: else users could
    # write them
    ours = {end, *re.findall(r'<\|\w+\|>', template['message'] if template else '')}
    special = special | {text: id for text, id in words.items() if text in ours}
    words = {text: id for text, id in words.items() if text not in special}
    ordinary = sorted(vocab.keys() - added.keys(), key=vocab.get)
    merged = [''.join(merge).replace(' ', '') for merge in merges]
    order = [vocab[token] for token in merged]      # an id twice: a token may be merged from several pairs
    # tiktoken merges in the order of ids, so that must be the order of merges
    if order != sorted(order) or {token for token in ordinary if len(token) > 1} != set(merged):
        raise ValueError('ids and merges differ in order or number')
    if sorted((vocab | added).values()) != list(range(len(vocab | added))):
        raise ValueError('ids are repeated or missing')
    tokens = [bytes(byte_of[character] for character in token) for token in ordinary]
    spec = bpe_spec(name, PATTERNS[name], tokens)
    if added != {ENDOFTEXT: len(tokens)}:
        spec |= {'special': special, 'end': end,
                 'lacks': bytes(byte for character, byte in byte_of.items() if character not in vocab).hex()}
    known = {end, *(template['stop'] if template else [])}
    # an id beyond the vocabulary is never produced, so it ends nothing
    stop = {id for id in eos if 0 <= id < len(vocab | added)} - {special[text] for text in known}
    more = {'words': words, 'bos': list(begin), 'stop': sorted(stop), 'template': template}
    return spec | {key: value for key, value in more.items() if value}


def read_settings(path):
    """The JSON object in a file, {} if there is none."""
    return read_json(path) if path.is_file() else {}


def eos_ids(folder):
    """eos_token_id in config.json and generation_config.json, an id or a list -> the ids that end a text"""
    ids = []
    for name in ('config.json', 'generation_config.json'):
        eos = read_settings(folder / name).get('eos_token_id')
        ids += [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(id) is int for id in ids):
        raise ValueError(f'eos_token_id {ids!r:.80} is no id')
    return ids


def begin_ids(processor):
    """post_processor of tokenizer.json -> the ids that it puts before a text. Raises TokenizerError."""
    kind = processor['type'] if processor else 'ByteLevel'
    if kind == 'ByteLevel':         # adds no tokens
        return []
    if kind == 'Sequence':
        return [id for step in processor['processors'] for id in begin_ids(step)]
    pieces = processor['single'] if kind == 'TemplateProcessing' else []
    if [*map(list, pieces)] != [['SpecialToken']] * (len(pieces) - 1) + [['Sequence']]:
        raise TokenizerError(f'post_processor {kind!r:.40} puts tokens after a text, or in it, which is not '
                             'supported; remove them from tokenizer.json')
    tokens = [processor['special_tokens'][piece['SpecialToken']['id']] for piece in pieces[:-1]]
    return [id for token in tokens for id in token['ids']]


def text_of_token(token):
    """A token in a tokenizer's settings, which is its text or a dict of its properties -> its text"""
    return token['content'] if isinstance(token, dict) else token


def spec_from_files(folder, name, vocab, merges, added, begin=()):
    """
    added: [{'content', 'id', 'special', ...}]; the rest as for byte_level_spec -> spec dict, in which the
    other files of the folder count, too. Raises as byte_level_spec does.
    """
    settings = {}
    for file in ('special_tokens_map.json', 'tokenizer_config.json'):
        settings |= read_settings(folder / file)
    named = {key: text_of_token(settings[key]) for key in NAMED if settings.get(key) is not None}
    others = settings.get('additional_special_tokens') or []
    special_texts = {*named.values(), *map(text_of_token, others)}
    for key in ('add_prefix_space', 'add_eos_token'):
        if settings.get(key):
            raise TokenizerError(f'tokenizer_config.json: {key} is not supported; set it to false')
    # if two files have the same token, the first one's properties count
    more = [{'id': int(id), **token} for id, token in settings.get('added_tokens_decoder', {}).items()]
    more += [{'content': text, 'id': id, 'special': text in special_texts}
             for text, id in read_settings(folder / 'added_tokens.json').items()]
    special, words = {}, {}
    for token in added + more:
        text, id = token['content'], token['id']
        if (special | words).get(text, id) != id:
            raise ValueError(f'{text!r:.40} has two ids')
        if token.get('special') or text in special_texts or text in special:
            special[text] = id
            continue
        words[text] = id
        for flag in ('single_word', 'lstrip', 'rstrip'):
            if token.get(flag):
                raise TokenizerError(f'the added token {text!r:.40} is {flag}, which is not supported')
    if not added:       # GPT-2's two files do not say which tokens are special
        special |= {text: vocab[text] for text in (*special_texts, *ENDS, *USUAL) if text in vocab}
    bos = named.get('bos_token', ENDOFTEXT if ENDOFTEXT in special else '')
    if settings.get('add_bos_token') and not begin:
        begin = [special[bos]]
    jinja = folder / 'chat_template.jinja'
    # some files hold a list of templates
    jinja = read_text(jinja) if jinja.is_file() else str(settings.get('chat_template', ''))
    eos = [special[text] for text in [named.get('eos_token')] if text in special]
    return byte_level_spec(name, vocab, merges, special, words, jinja, bos, begin, eos + eos_ids(folder))


def spec_from_json(folder):
    """tokenizer.json, and the settings beside it -> spec dict. Raises as byte_level_spec does."""
    data = read_json(folder / 'tokenizer.json')
    model, cut, normalizer, cuts = data['model'], data['pre_tokenizer'], data.get('normalizer'), []
    keys = ('byte_fallback', 'dropout', 'continuing_subword_prefix', 'end_of_word_suffix')
    unsupported = [key for key in keys if model.get(key)]
    if normalizer and normalizer != {'type': 'Sequence', 'normalizers': []}:
        unsupported += ['normalizer']
    # GPT-2's own file does not say its type
    if model.get('type', 'BPE') != 'BPE' or unsupported:
        raise TokenizerError('SentencePiece, or something else than byte-level BPE as in GPT-2, SmolLM2 and '
                             f'Llama 3 ({", ".join(unsupported) or model["type"]!r:.80})')
    for step in cut.get('pretokenizers', [cut]):
        if step['type'] == 'ByteLevel' and not step['add_prefix_space']:
            cuts += ['gpt2'] if step.get('use_regex', True) else ['bytes']
        elif step['type'] == 'Digits' and step['individual_digits']:
            cuts += ['digits']
        else:
            cuts += [step['pattern']['Regex'] if step.get('behavior') == 'Isolated' else step]
    known = {'gpt2': ['gpt2'], 'smollm': ['digits', 'gpt2'], 'llama3': [LLAMA3_PATTERN, 'bytes']}
    name = next((name for name in known if known[name] == cuts), None)
    if name is None:
        raise TokenizerError(f'text is cut otherwise than for GPT-2, SmolLM2 or Llama 3: {cuts!r:.100}')
    return spec_from_files(folder, name, model['vocab'], model['merges'], data['added_tokens'],
                           begin_ids(data.get('post_processor')))


def spec_from_vocab(folder, merges_name, vocab_name):
    """the two files of GPT-2's release -> spec dict. Raises as byte_level_spec does."""
    lines = read_text(folder / merges_name).split('\n')
    merges = [line for line in lines[lines[0].startswith('#version'):] if line]
    return spec_from_files(folder, 'gpt2', read_json(folder / vocab_name), merges, [])


def spec_from_gguf(metadata):
    """metadata: {key: value} of a GGUF file -> spec dict. Raises TokenizerError."""
    settings = {key.removeprefix('tokenizer.ggml.'): value for key, value in metadata.items()}
    name = {'gpt-2': 'gpt2', 'smollm': 'smollm', 'llama-bpe': 'llama3'}.get(settings.get('pre'))
    if settings.get('model') != 'gpt2' or name is None:
        kind = f"{settings.get('model')!r:.40}, {settings.get('pre')!r:.40}"
        raise TokenizerError(f'a tokenizer of kind {kind}; supported is byte-level BPE as in GPT-2 '
                             '(gpt2, gpt-2), SmolLM2 (gpt2, smollm) and Llama 3 (gpt2, llama-bpe)')
    if settings.get('add_eos_token'):
        raise TokenizerError('add_eos_token is not supported; convert the model again without it')
    with checking('its tokenizer', 'fetch the file again'):
        tokens = list(zip(settings['tokens'], settings['token_type'], strict=True))
        while tokens and tokens[-1][1] == GGUF_UNUSED:      # padding
            tokens.pop()
        vocab = {text: id for id, (text, _) in enumerate(tokens)}
        words = {text: vocab[text] for text, kind in tokens if kind == GGUF_WORD}
        special = {text: vocab[text] for text, kind in tokens if kind not in (GGUF_NORMAL, GGUF_WORD)}
        # Llama 3's first files did not say that a text begins with BOS
        adds_bos, usual = settings.get('add_bos_token', name == 'llama3'), vocab.get('<|begin_of_text|>')
        bos = settings.get('bos_token_id', usual)
        if adds_bos and not are_ids([bos], len(vocab)):
            raise ValueError('no bos_token_id')
        bos_text = tokens[bos][0] if are_ids([bos], len(vocab)) else ''
        eos = [settings[key] for key in ('eos_token_id', 'eot_token_id') if key in settings]
        jinja, begin = settings.get('tokenizer.chat_template', ''), [bos] if adds_bos else []
        return byte_level_spec(name, vocab, settings['merges'], special, words, jinja, bos_text, begin, eos)


def spec_from_dir(folder):
    """folder: str or Path of a directory with a model's tokenizer -> spec dict. Raises TokenizerError."""
    folder = Path(folder)
    with checking(f'the tokenizer in {folder}', 'fetch its files again'):
        if (folder / 'tokenizer.json').is_file():
            return spec_from_json(folder)
        for names in (('vocab.bpe', 'encoder.json'), ('merges.txt', 'vocab.json')):
            if all((folder / name).is_file() for name in names):
                return spec_from_vocab(folder, *names)
    raise TokenizerError(f'no tokenizer in {folder}: put tokenizer.json there, or vocab.bpe and encoder.json')


def tokenizer_spec(name):
    """name: 'python4k', 'bytes', 'gpt2' or a directory -> spec dict. Raises TokenizerError."""
    if name == 'python4k':
        return spec_from_file(PYTHON4K_FILE, name, PYTHON_PATTERN)
    if name == 'bytes':
        return {'kind': 'bytes'}
    if name == 'gpt2':
        try:
            encoding = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as e:    # no network (requests raises OSErrors), or a broken download
            raise TokenizerError('the gpt2 tokenizer cannot be downloaded: go online once, or put vocab.bpe '
                                 'and encoder.json of GPT-2 in a directory and name that') from e
        tokens = [encoding.decode_single_token_bytes(id) for id in range(encoding.eot_token)]
        return bpe_spec(name, GPT2_PATTERN, tokens)
    if Path(name).is_dir():
        return spec_from_dir(name)
    raise TokenizerError(f"unknown tokenizer '{name}': choose python4k, bytes, gpt2, a model such as "
                         'smollm2, or a directory that holds tokenizer.json, or vocab.bpe and encoder.json')
