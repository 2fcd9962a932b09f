"""
What a training run starts from: a new model, a pretrained one (--init_from), or a run that was stopped
(--resume); and which options may then be changed. train.py uses it.

    model, saved, config = pretrained_model(config, given)      # --init_from
    model, saved, config = resumed_model(config, given)         # --resume

given: the names of the options that the user gave, see options.py. Each of these functions ends the program
if options do not fit, and raises CheckpointError if a file cannot be used.

Not here: the files of other people's models (weights.py) and of ours (checkpoint.py).
"""

import os
from dataclasses import asdict, replace

import cwic
import weights
from checkpoint import reading, weights_sha256
from cwic import GPT, CWICConfig
from options import check_options, fail

BEST, LAST = 'best.safetensors', 'last.safetensors'
# options that a resumed run may change: they change what it costs, not what it computes
FREE_TO_CHANGE = {'out', 'resume', 'max_steps', 'device', 'dtype', 'micro_batch', 'compile', 'log_every'}


def new_model(sizes):
    """A GPT of these sizes, fields of CWICConfig by name. Ends the program if they do not fit together."""
    try:
        return GPT(CWICConfig(**sizes))
    except ValueError as error:
        fail(f'--{error}')


def resized(model, sizes):
    """
    A model of these sizes with the weights of this one, which may lack bases or a shortlist, or have no
    thresholds yet and other stripes. If bases are added, the head loses its statistics, so that observe() in
    train.py finds both.
    """
    new = new_model({name: sizes[name] for name in asdict(model.config)})
    if 'lora_rank' in sizes:
        cwic.add_lora(new, sizes['lora_rank'])
    shapes = {name: x.shape for name, x in new.state_dict().items()}
    state = {name: x for name, x in model.state_dict().items() if x.shape == shapes[name]}
    new.load_state_dict(state, strict=False)
    if new.config.bases and not model.config.bases:
        new.head.sigma.zero_()
    return new


def pretrained_model(config, given):
    """--init_from -> (model, what else its file says, the options with its sizes and all it implies)."""
    source = config.init_from
    model, saved = weights.load(source, merge=False)
    sizes, is_adapter = asdict(model.config), 'base' in saved
    if is_adapter:              # this run continues from it
        sizes.update(init_from=saved['base'], lora_rank=model.head.adapter.A.shape[1])
    elif any(float(layer.theta.detach().max()) > 0 for _, layer in model.sparse_layers()):
        fail(f'--init_from {source}: is sparse already; start from a dense model, such as one trained with '
             '--target_reduction 1')
    for name in sorted(given & sizes.keys() - {'init_from'}):
        asked, size = getattr(config, name), sizes[name]
        fits = (name == 'block_size' and asked < size               # sequences shorter than the context
                or name in ('bases', 'shortlist') and asked         # they can be added
                or name == 'lora_rank' and asked > size             # a change can get more terms
                or name.startswith('stripe_') and not is_adapter)   # no thresholds are learned yet
        if asked != size and not fits:
            fail(f'--{name} {asked}: {source} has {size}; give that, or leave the option out')
        if name != 'block_size':
            sizes[name] = asked
    if is_adapter and sizes['lora_rank'] > model.head.adapter.A.shape[1]:
        cwic.widen_lora(model, sizes['lora_rank'])
    if any(sizes[name] != size for name, size in asdict(model.config).items()):
        model = resized(model, sizes)
    if config.lora_rank and not is_adapter:
        saved.update(base=source, base_sha256=weights_sha256(model))
        cwic.add_lora(model, config.lora_rank)
    unless_given = {'block_size': sizes.pop('block_size'), 'dense_steps': 0, 'teacher': 1.0}
    sizes.update({name: value for name, value in unless_given.items() if name not in given})
    options = {name: sizes[name] for name in sizes.keys() & asdict(config).keys()}
    return model, saved, replace(config, **options)


def resumed_model(config, given):
    """last.safetensors -> (model, what else the file says, its options with those changed that may be)."""
    path = os.path.join(config.out, LAST)
    if not os.path.exists(path):
        fail(f'--resume: no run in {config.out}; start one without --resume', 1)
    model, saved = weights.load(path, merge=False)
    with reading(path, 'a run to resume'):
        old = check_options(type(config), saved['options'])
    for name in sorted(given - FREE_TO_CHANGE):
        asked, had = getattr(config, name), getattr(old, name)
        if asked != had:
            fail(f'--{name} {asked}: the run was started with {had}; leave the option out, or choose another '
                 '--out')
    names = given & FREE_TO_CHANGE | {'out', 'resume', 'max_steps'}
    return model, saved, replace(old, **{name: getattr(config, name) for name in names})
