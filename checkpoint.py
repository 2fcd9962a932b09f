"""
Checkpoints: a model in one safetensors file, which holds no code and runs none.

    save_checkpoint('model.safetensors', model, step=600)
    model, saved = load_checkpoint('model.safetensors')          # saved['step'] is 600

    save_checkpoint('adapter.safetensors', adapted, base='smollm2', base_sha256=weights_sha256(base_model))
    adapted, saved = load_checkpoint('adapter.safetensors', base=lambda name: weights.load(name)[0])

A safetensors file is the length of a header in 8 bytes, the header in JSON, which says where each tensor
lies, and the tensors. Ours hold the model's tensors, by name; a file to resume from also holds the state of
the optimizer, optimizer.NAME.exp_avg and so on, and teacher.NAME. Everything else (the config, the tokenizer,
results, ...) is one JSON text in the header. An adapter (see cwic.add_lora) holds only the tensors in which
it differs from its base, with the base's name and a hash of its weights.

A file is written whole or not at all. One that is damaged, or does not fit, is refused in one line.

Not here: checkpoints in several files; finding the base that an adapter names, which weights.py does.
"""

import hashlib
import json
import mmap
from contextlib import contextmanager
from dataclasses import asdict

import torch

from cwic import GPT, CWICConfig, add_lora, is_threshold, merge_lora
from files import DAMAGED, one_line, write_atomically
from options import is_out_of_memory
from refinements import rotated_weights
from tokenizer import TokenizerError

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
          'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8,
          'BOOL': torch.bool}
LONGEST_HEADER = 100_000_000        # bytes, the format's own limit
KEY = 'cwic'                        # of our JSON text in the header
PARTS = ('optimizer', 'teacher')    # first words in the names of tensors that are not the model's
MOMENTS = ('exp_avg', 'exp_avg_sq')     # a parameter's state in Adam, beside the number of its step


class CheckpointError(Exception):
    """A model's file that cannot be used or written; the message is one line for the user."""


@contextmanager
def reading(path, expected='a GPT-2 or Llama model'):
    """Turns whatever is wrong with a file into a CheckpointError, one line that names the file."""
    try:
        yield
    except (CheckpointError, TokenizerError) as error:
        raise CheckpointError(f'{path}: {error}') from None
    except (MemoryError, OSError, *DAMAGED) as error:
        if is_out_of_memory(error):
            raise CheckpointError(f'{path}: out of memory; end other programs, or use a smaller '
                                  'model') from None
        if isinstance(error, OSError):
            raise CheckpointError(f'{error.filename or path}: cannot be read ({error.strerror})') from None
        raise CheckpointError(f'{path}: truncated, damaged, or not {expected} ({one_line(error)}); '
                              'put a good copy in its place') from None


# -----------------------------------------------------------------------------
# the format, whoever wrote the file


def map_file(path):
    """A file's bytes, not read until used -> an mmap, which has read() as files do, and a uint8 tensor."""
    with open(path, 'rb') as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return mapped, torch.frombuffer(mapped, dtype=torch.uint8)


def read_safetensors(path):
    """
    -> {name: tensor}, whose numbers stay in the file until used; and the metadata, a dict of strings. Call it
    within reading(): torch raises RuntimeError if a tensor's bytes do not make its shape.
    """
    mapped, data = map_file(path)
    start = 8 + int.from_bytes(mapped[:8], 'little')
    if start > LONGEST_HEADER:
        raise ValueError(f'a header of {start - 8:,} bytes')
    header = json.loads(mapped[8:start])
    metadata, tensors = header.pop('__metadata__', {}), {}
    for name, entry in header.items():
        dtype, (begin, end) = DTYPES[entry['dtype']], entry['data_offsets']
        numbers = data[start + begin:start + end]
        if numbers.storage_offset() % dtype.itemsize:       # allowed in a file, but not in memory
            numbers = numbers.clone()
        tensors[name] = numbers.view(dtype).view(entry['shape'])
    return tensors, metadata


def write_safetensors(path, tensors, metadata=None):
    """Writes {name: tensor} and metadata, a dict of str, atomically, one tensor at a time. Raises OSError."""
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    # the widest numbers first, so that all are aligned
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    if metadata:
        header['__metadata__'] = metadata
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = {'dtype': names[x.dtype], 'shape': list(x.shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)

    def write(file):
        file.write(len(text).to_bytes(8, 'little') + text)
        for x in tensors.values():
            file.write(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    write_atomically(path, write)


# -----------------------------------------------------------------------------
# checkpoints


def in_int8(name, tensor):
    """
    An adapter's A (in, rank) or B (rank, out) as {name: int8, its name + '.scale': a number for each of the
    rank terms}: a quarter of the bytes, and an error of about 1% of the change, which is small itself.
    """
    scale = (tensor.abs().amax(int(name.endswith('.B')), keepdim=True) / 127).clamp_min(1e-30)
    return {name: (tensor / scale).round().to(torch.int8), f'{name}.scale': scale}


def weights_sha256(model):
    """
    A hash of a model's weights, without thresholds and adapters: SHA-256 of their names, shapes and numbers,
    in the order of their names. In bf16, which halves the time; smaller differences go unseen.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not is_threshold(name) and '.adapter' not in name:
            digest.update(f'{name} {list(p.shape)}\n'.encode())
            digest.update(p.detach().cpu().bfloat16().view(torch.int16).numpy())
    return digest.hexdigest()


def is_finite(x):
    return bool(torch.isfinite(torch.stack(x.aminmax())).all())     # faster than to ask of each number


def save_checkpoint(path, model, narrow=False, optimizer=None, teacher=None, **facts):
    """
    Writes the model, its config and facts, which JSON can hold, atomically; to resume from it, also the state
    of the optimizer, an AdamW, and the teacher. If the facts name a base, with its base_sha256, the frozen
    weights are left out: load_checkpoint takes them from the base. narrow: adapters in int8. Raises
    CheckpointError if a number is not finite or the disk does not take the file.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and 'base' in facts}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    for name in [name for name in tensors if narrow and '.adapter' in name]:
        tensors.update(in_int8(name, tensors[name]))
    if optimizer:
        for name, p in model.named_parameters():
            tensors.update({f'optimizer.{name}.{key}': x for key, x in optimizer.state.get(p, {}).items()})
    if teacher:
        tensors.update({f'teacher.{name}': x for name, x in teacher.state_dict().items()})
    if not all(map(is_finite, tensors.values())):
        raise CheckpointError(f'{path} is not written: it would hold numbers that are not finite')
    try:
        write_safetensors(path, tensors, {KEY: json.dumps({'config': asdict(model.config), **facts})})
    except OSError as error:
        raise CheckpointError(f'{path} cannot be written ({error.strerror}); the old file is whole') from None


def read_checkpoint(path):
    """
    -> (config, the model's tensors, the rest: a dict, in which 'optimizer' and 'teacher' are dicts of
    tensors). Tensors stay in the file. Call it within reading().
    """
    tensors, metadata = read_safetensors(path)
    if KEY not in metadata:
        raise CheckpointError("not a CWIC checkpoint; for other people's weights name the folder, which also "
                              'holds config.json and a tokenizer')
    saved = json.loads(metadata[KEY])
    for part in PARTS:
        saved[part] = {name.removeprefix(f'{part}.'): tensors.pop(name) for name in list(tensors)
                       if name.startswith(f'{part}.')}
    sizes = saved['config']
    return CWICConfig(**{**sizes, 'rope_scaling': tuple(sizes['rope_scaling'])}), tensors, saved


def load_checkpoint(path, base=None, merge=True):
    """
    -> (model in eval mode, the rest of the file, a dict). Raises CheckpointError, in one line, if the file is
    missing, damaged, or not one of ours.

    An adapter holds only its differences from its base, named in saved['base']: base(name) must give that
    model. The adapter is merged into it, or with merge=False left apart, to be trained on.
    """
    with reading(path, 'a CWIC checkpoint'):
        config, tensors, saved = read_checkpoint(path)
        frozen = {}
        if 'base' in saved:
            dense = base(saved['base'])
            if weights_sha256(dense) != saved['base_sha256']:
                raise CheckpointError(f'its base {saved["base"]!r:.80} holds other weights than it was '
                                      'trained on; put those back')
            frozen = dense.state_dict()
        state = frozen | {name: x.clone() for name, x in tensors.items() if not name.endswith('.scale')}
        for name in [name for name in state if f'{name}.scale' in tensors]:     # adapters in int8
            state[name] = state[name].float().mul_(tensors[f'{name}.scale'])
        if config.n_layer > len(state):
            raise ValueError(f'{config.n_layer} layers cannot be made of {len(state)} tensors')
        with torch.device('meta'):      # without memory, so that wrong sizes cost none
            model = GPT(config)
            if frozen:
                add_lora(model, tensors['head.adapter.A'].shape[1])
        model.load_state_dict(state, assign=True)       # raises RuntimeError unless names and shapes fit
        if frozen and config.bases:     # LoRA in the file is rotated already, its base is not
            for p, rotated in rotated_weights(model, with_lora=False):
                p.data = rotated
        for name, x in model.state_dict().items():
            if not is_finite(x):
                raise CheckpointError(f'damaged, {name} holds a number that is not finite')
        if merge:
            merge_lora(model)
    return model.eval(), saved


def load_optimizer(model, optimizer, tensors):
    """
    Puts saved['optimizer'], the tensors, into a new AdamW for this model. Raises KeyError or ValueError
    unless they fit: torch itself would not notice, and write beyond their ends.
    """
    names, state = {p: name for name, p in model.named_parameters()}, {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group['params']):
        if f'{names[p]}.step' in tensors:       # parameters that have not been trained yet have no state
            state[i] = {key: tensors[f'{names[p]}.{key}'].clone() for key in ('step', *MOMENTS)}
            if any((state[i][key].shape, state[i][key].dtype) != (p.shape, p.dtype) for key in MOMENTS):
                raise ValueError(f"Adam's state does not fit {names[p]}")
    optimizer.load_state_dict({'state': state, 'param_groups': optimizer.state_dict()['param_groups']})
