"""
Checkpoints: a model in one file of plain tensors and plain values.

    save_checkpoint('model.pt', model, step=600)
    model, saved = load_checkpoint('model.pt')          # saved['step'] is 600

    save_checkpoint('adapter.pt', adapted, base='model.pt')         # see cwic.add_adapters
    adapted, saved = load_checkpoint('adapter.pt', base=lambda name: load_checkpoint(name)[0])

A file holds a dict: 'model', the tensors by name; 'config', the sizes; and whatever else it is given. An
adapter's holds only the tensors in which it differs from its base, and the name of that: thresholds,
statistics, the low-rank change of each matrix, and directions that were found for what a layer reads.

A file is written whole or not at all. No code in it is run, and no length or size in it is trusted.

Not here: checkpoints in several files; files of other people's models, which are weights.py's, as is the
search for the base that an adapter names.
"""

import os
import zipfile
from dataclasses import asdict

import torch

from cwic import GPT, CWICConfig, add_adapters, in_bases, merge_adapters
from files import write_atomically


class CheckpointError(Exception):
    """A checkpoint that cannot be used, said in one line."""


def in_int8(name, tensor):
    """
    An adapter's A (in, rank) or B (rank, out) as {name: int8, its name + '.scale': a number for each of the
    rank terms}, a quarter of the bytes. What it is off by is about 1% of the change, itself small.
    """
    scale = (tensor.abs().amax(int(name.endswith('.B')), keepdim=True) / 127).clamp_min(1e-30)
    return {name: (tensor / scale).round().to(torch.int8), f'{name}.scale': scale}


def save_checkpoint(path, model, narrow=False, **more):
    """
    Writes {'model', 'config', **more} to path, atomically. With base=NAME what is frozen is left out:
    load_checkpoint takes it from that base. narrow: adapters in int8. Raises CheckpointError where a number
    is not finite or the disk does not take it.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and 'base' in more}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise CheckpointError(f'{path} is not written: the model holds numbers that are not finite')
    for name in [name for name in state if narrow and '.adapter' in name]:
        state.update(in_int8(name, state[name]))
    try:
        content = {'model': state, 'config': asdict(model.config), **more}
        write_atomically(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:        # torch says "unexpected pos" of a full disk
        reason = getattr(error, 'strerror', None) or 'the disk may be full'
        raise CheckpointError(f'{path} cannot be written ({reason}); what stood there is whole') from None


def build(config, state, rank=0):
    """
    A model in eval mode made of state, a dict of tensors, without copying them; rank: of its adapters, or 0.
    Shapes are compared first, on a model that takes no memory: lies about sizes cost nothing. Raises
    ValueError.
    """
    if config.n_layer > len(state):
        raise ValueError(f'{config.n_layer} layers cannot be made of {len(state)} tensors')
    with torch.device('meta'):
        model = GPT(config)
        if rank:
            add_adapters(model, rank)
    expected, found = ({name: (tensor.shape, tensor.dtype, tensor.layout) for name, tensor in tensors.items()}
                       for tensors in (model.state_dict(), state))
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise ValueError(f'{name} is missing, unexpected, or of the wrong shape or type')
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_checkpoint(path, device='cpu', base=None, merge=True):
    """
    (model in eval mode, the checkpoint's dict). Runs no code from the file. Raises CheckpointError, in one
    line, where the file is missing, truncated, or not one of ours.

    An adapter holds only what differs from its base, named in saved['base']: base(name) must give that model.
    It is merged, or with merge=False left apart, to be trained on.
    """
    damaged = f'{path}: not a CWIC checkpoint, or a damaged one'
    try:
        with open(path, 'rb') as file:
            # a compressed archive could unfold to anything; torch writes none
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(file).infolist()):
                raise ValueError('compressed')
            file.seek(0)
            saved = torch.load(file, map_location=device, weights_only=True)
        adapts, config, state = saved.get('base', ''), CWICConfig(**saved['config']), dict(saved['model'])
        # a tensor may be a view that repeats one number for ever, or hold none at all
        tensors = state.values()
        if sum(t.nbytes for t in tensors) > os.path.getsize(path) or any(t.is_meta for t in tensors):
            raise ValueError('more numbers than the file holds')
        if not isinstance(adapts, str):
            raise TypeError('a base that is no name')
        rank = state['head.adapter.A'].shape[1] if adapts else 0
        scales = {name: state.pop(name) for name in list(state) if name.endswith('.scale')}
        for name, scale in scales.items():
            name = name.removesuffix('.scale')
            state[name] = state[name].float().mul_(scale)
    except FileNotFoundError:
        raise CheckpointError(f'{path}: no such checkpoint; train one with: python train.py') from None
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror})') from None
    except Exception as error:      # torch.load raises a dozen kinds: truncated, foreign, malicious
        raise CheckpointError(f'{damaged} ({type(error).__name__})') from None
    if adapts:
        if base is None:
            raise CheckpointError(f'{path}: an adapter, which needs its base {adapts!r}')
        frozen = base(adapts).to(device).state_dict()
    try:
        if adapts:
            state = {**{name: in_bases(name, x, state, config) for name, x in frozen.items()}, **state}
        model = build(config, state, rank)
    except Exception as error:      # as many kinds for sizes that no model has
        raise CheckpointError(f'{damaged} ({type(error).__name__})') from None
    if merge:
        merge_adapters(model)
    return model, saved
