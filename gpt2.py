"""
GPT-2's released weights as a cwic.GPT with every threshold at 0: the dense model that distillation starts from.

    model, tokenizer = gpt2.load('gpt2')            # or gpt2-medium, gpt2-large, gpt2-xl: downloaded once, then cached
    model, tokenizer = gpt2.load('some/folder')     # config.json with model.safetensors or pytorch_model.bin

A folder may also hold the tokenizer, as vocab.bpe and encoder.json or as merges.txt and vocab.json; where it does not,
tiktoken downloads GPT-2's. Loading runs no code from any file: safetensors is a header in JSON before raw numbers, and
torch.load is told to take plain tensors only. The release keeps its linear weights input-major (in, out), as we do; only
the token embedding is turned over, to become the head. Every name, shape and number is checked on the way.

But: no other architectures, no weights in several files, no writing of this format.
"""

import http.client
import json
import os
import shutil

import torch

from cwic import GPT, CWICConfig
from tokenizer import TokenizerError, gpt2_spec_from_dir, load_tokenizer, tokenizer_spec

RELEASES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
FILES = ('config.json', 'vocab.json', 'merges.txt', 'model.safetensors')
URL = 'https://huggingface.co/openai-community/{}/resolve/main/{}'
DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'U8': torch.uint8, 'BOOL': torch.bool}

# what config.json may say of the architecture, and the only values that cwic.GPT can be
ARCHITECTURE = {'model_type': ('gpt2',), 'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'layer_norm_epsilon': (1e-5,),
                'tie_word_embeddings': (True,), 'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
                'add_cross_attention': (False,)}


class GPT2Error(Exception):
    """Weights that cannot be had or used; the message is one line for the user, remedy included."""


# -----------------------------------------------------------------------------
# reading


def read_config(path):
    """config.json -> CWICConfig, one stripe for each width of the model. Raises GPT2Error."""
    try:
        with open(path, encoding='utf-8') as f:
            said = json.load(f)
        for key, usual in ARCHITECTURE.items():
            if said.get(key, usual[0]) not in usual:
                raise GPT2Error(f'{path}: {key} is {said[key]!r}, which is not GPT-2 as released ({usual[0]!r})')
        d, context = said['n_embd'], said['n_positions']
        if (said.get('n_inner') or 4 * d) != 4 * d or said.get('n_ctx', context) != context:
            raise GPT2Error(f'{path}: n_inner must be 4 * n_embd, and n_ctx the same as n_positions')
        return CWICConfig(vocab_size=said['vocab_size'], block_size=context, n_layer=said['n_layer'], n_head=said['n_head'], n_embd=d,
                          stripe_qkv=d, stripe_out=d, stripe_up=d, stripe_down=d, stripe_head=2048)
    except OSError as error:
        raise GPT2Error(f'{path}: {error.strerror}; --init_from takes {", ".join(RELEASES)}, a folder with GPT-2\'s config.json '
                        'and model.safetensors, or a checkpoint such as out/best.pt') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GPT2Error(f'{path}: not the config.json of a GPT-2 ({type(error).__name__}: {error})') from None


def read_safetensors(path):
    """
    A dict of name -> tensor, in the order of the file, whose numbers are read from the disk only when they are used. The
    format: 8 bytes with the length of the header, the header in JSON, the numbers, little-endian. Raises GPT2Error.
    """
    size = os.path.getsize(path)
    try:
        with open(path, 'rb') as f:
            length = int.from_bytes(f.read(8), 'little')
            if not 0 < length <= size - 8:
                raise ValueError(f'a header of {length:,} bytes in a file of {size:,}')
            header = json.loads(f.read(length).decode('utf-8'))
        header.pop('__metadata__', None)
        entries = []
        for name, entry in header.items():
            begin, end = map(int, entry['data_offsets'])
            entries.append((begin, end, name, DTYPES[entry['dtype']], torch.Size(entry['shape'])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GPT2Error(f'{path}: truncated, or not a safetensors file ({type(error).__name__}: {error}); fetch it again') from None
    numbers = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)[8 + length:]     # mapped, not read
    tensors = {}
    for begin, end, name, dtype, shape in sorted(entries, key=lambda entry: entry[:3]):
        if not 0 <= begin <= end or end - begin != shape.numel() * dtype.itemsize:
            raise GPT2Error(f'{path}: {name} has {end - begin:,} bytes, which do not make {dtype} {tuple(shape)}; fetch it again')
        if end > len(numbers):
            raise GPT2Error(f'{path}: truncated in {name}: it ends at byte {8 + length + end:,} of a file of {size:,}; fetch it again')
        part = numbers[begin:end]
        # numbers in a file may lie at any byte, a tensor's may not
        part = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        tensors[name] = part.view(dtype).view(shape)
    return tensors


def read_bin(path):
    """pytorch_model.bin -> a dict of name -> tensor. Raises GPT2Error."""
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # a dozen kinds for a file that is truncated, foreign or malicious
        raise GPT2Error(f'{path}: truncated, or something other than plain tensors ({type(error).__name__}); nothing in it was run. '
                        'Fetch it again, or model.safetensors in its place') from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise GPT2Error(f'{path}: not a dictionary of tensors')
    return tensors


def read_tokenizer(folder, vocab_size):
    """The tokenizer's spec (see tokenizer.py): from its files in the folder, or else tiktoken's own. Raises GPT2Error."""
    here = any(os.path.exists(os.path.join(folder, name)) for name in ('vocab.bpe', 'encoder.json', 'merges.txt', 'vocab.json'))
    try:
        spec = gpt2_spec_from_dir(folder) if here else tokenizer_spec('gpt2')
    except TokenizerError as error:
        raise GPT2Error(str(error) if here else f'no network for the tokenizer: fetch vocab.json and merges.txt from the place of the weights, or '
                        f'vocab.bpe and encoder.json, and put them in {folder}') from None
    if load_tokenizer(spec).n_vocab != vocab_size:
        raise GPT2Error(f'{folder}: a tokenizer of {load_tokenizer(spec).n_vocab:,} ids, but config.json says vocab_size {vocab_size:,}')
    return spec


# -----------------------------------------------------------------------------
# the release's names, and ours


def layout(config):
    """{name in the release: (name in cwic.GPT, shape in the release)}, in the order of the model."""
    d = config.n_embd
    names = {'wte.weight': ('head.weight', (config.vocab_size, d)), 'wpe.weight': ('wpe.weight', (config.block_size, d))}
    for i in range(config.n_layer):
        for theirs, ours, shape in (('ln_1', 'ln_1', (d,)), ('attn.c_attn', 'attn.qkv', (d, 3 * d)), ('attn.c_proj', 'attn.out', (d, d)),
                                    ('ln_2', 'ln_2', (d,)), ('mlp.c_fc', 'mlp.up', (d, 4 * d)), ('mlp.c_proj', 'mlp.down', (4 * d, d))):
            names[f'h.{i}.{theirs}.weight'] = (f'blocks.{i}.{ours}.weight', shape)
            names[f'h.{i}.{theirs}.bias'] = (f'blocks.{i}.{ours}.bias', shape[-1:])
    names['ln_f.weight'], names['ln_f.bias'] = ('ln_f.weight', (d,)), ('ln_f.bias', (d,))
    return names


def fill(model, tensors, path):
    """Copies tensors, under the release's names, into the model; whatever does not fit raises GPT2Error with the first name."""
    # with a language-model head on it, the release's names start with 'transformer.'
    tensors = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
    state = model.state_dict()      # its tensors are the model's own
    for name, (ours, shape) in layout(model.config).items():
        tensor = tensors.get(name)
        if tensor is None:
            raise GPT2Error(f'{path}: {name} is missing')
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise GPT2Error(f'{path}: {name} is {tensor.dtype} {tuple(tensor.shape)} where floating point {shape} belongs')
        if not torch.isfinite(tensor).all():
            raise GPT2Error(f'{path}: {name} holds a number that is not finite; fetch it again')
        state[ours].copy_(tensor.t() if name == 'wte.weight' else tensor)
    for name, tensor in tensors.items():
        if name == 'lm_head.weight' and not torch.equal(tensor, tensors['wte.weight']):
            raise GPT2Error(f'{path}: lm_head.weight differs from wte.weight, but GPT-2 ties them')
        # attn.bias and attn.masked_bias are not weights: the causal mask was once saved along
        if name not in layout(model.config) and name != 'lm_head.weight' and not name.endswith(('.attn.bias', '.attn.masked_bias')):
            raise GPT2Error(f'{path}: {name} is no part of GPT-2')


# -----------------------------------------------------------------------------
# loading


def load_folder(folder):
    """(model in eval mode, tokenizer spec) from config.json and the weights beside it. Raises GPT2Error."""
    config = read_config(os.path.join(folder, 'config.json'))
    for file, read in (('model.safetensors', read_safetensors), ('pytorch_model.bin', read_bin)):
        path = os.path.join(folder, file)
        if os.path.isfile(path):
            break
    else:
        raise GPT2Error(f'{folder}: neither model.safetensors nor pytorch_model.bin beside config.json; put one of them there')
    tokenizer = read_tokenizer(folder, config.vocab_size)
    model = GPT(config)
    try:
        fill(model, read(path), path)
    except OSError as error:
        raise GPT2Error(f'{path}: cannot be read ({error.strerror})') from None
    return model.eval(), tokenizer


def load(source):
    """
    source: one of RELEASES, or a folder -> (model in eval mode, tokenizer spec). A release is downloaded into a folder
    that gets its final name only when everything in it has been read and checked; after an interruption, finished
    files stay. Raises GPT2Error.
    """
    if source not in RELEASES:
        return load_folder(source)
    folder = os.path.join(torch.hub.get_dir(), 'cwic', source)
    if os.path.isdir(folder):
        return load_folder(folder)
    unfinished = folder + '.unfinished'
    try:
        os.makedirs(unfinished, exist_ok=True)
        for file in FILES:
            if not os.path.exists(os.path.join(unfinished, file)):
                print(f'downloading {file} of {source} to {folder}', flush=True)
                torch.hub.download_url_to_file(URL.format(source, file), os.path.join(unfinished, file))
    except (OSError, http.client.HTTPException) as error:
        raise GPT2Error(f'cannot download {source} ({error}): fetch {", ".join(FILES)} from {URL.format(source, "")} elsewhere, '
                        f'put them in {folder}, and run the same command again') from None
    try:
        loaded = load_folder(unfinished)
        os.rename(unfinished, folder)
    except (GPT2Error, OSError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise GPT2Error(f'{source} arrived damaged and was deleted ({error}); run the same command again') from None
    return loaded
