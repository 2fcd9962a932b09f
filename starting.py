"""
What a training run starts from: a new model, a pretrained one (--init_from), or a run that was stopped
(--resume); which options may then be changed; and the folder that it claims. train.py uses it.

    model, saved, config = starting_model(config, given)        # --init_from
    model, saved, config = resumed_model(config, given)         # --resume

Not here: the files of other people's models (weights.py) and of ours (checkpoint.py).
"""

import os
from dataclasses import asdict, replace

import torch

import cwic
import weights
from checkpoint import CheckpointError, weights_sha256
from cwic import GPT, CWICConfig
from options import check_options, fail

COLUMNS = ['step', 'seconds', 'loss', 'val_loss', 'reduction', 'target', 'lr']      # of log.csv
BEST, LAST = 'best.safetensors', 'last.safetensors'
FILES = (BEST, LAST, 'log.csv', 'training.png')
# options that a resumed run may change: they change what it costs, not what it computes
FREE_TO_CHANGE = {'out', 'resume', 'max_steps', 'device', 'dtype', 'micro_batch', 'recompute', 'compile',
                  'log_every'}


def claim_folder(config):
    """
    Locks --out for this run, as long as the returned file stays open. Ends the program if another run is at
    work there, or was and is neither resumed nor overwritten.
    """
    try:
        os.makedirs(config.out, exist_ok=True)
        lock = open(os.path.join(config.out, '.lock'), 'w', encoding='utf-8')
    except OSError as error:
        fail(f'--out {config.out}: {error.strerror}; choose another', 1)
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f'--out {config.out}: another run is at work there; choose another')
    except (ImportError, OSError):      # Windows, or a disk without locks: two runs are not kept apart
        pass
    if not config.resume:
        if not config.overwrite and any(os.path.exists(os.path.join(config.out, name)) for name in FILES):
            fail(f'--out {config.out} holds a run already: continue it (--resume), choose another, or '
                 'delete it (--overwrite)')
        folder = os.path.dirname(config.init_from) or '.'
        if os.path.isfile(config.init_from) and os.path.samefile(folder, config.out):
            fail(f'--init_from {config.init_from} lies in --out, where this run will write; choose another')
    return lock


def new_model(sizes):
    """A GPT of these sizes, fields of CWICConfig by name. Ends the program if they do not fit together."""
    try:
        return GPT(CWICConfig(**sizes))
    except ValueError as error:
        fail(f'--{error}')


def may_differ(name, size, asked, is_adapter):
    """Whether a run may ask for another value of an option of the model than the one --init_from has."""
    if name == 'block_size':
        return asked <= size            # shorter training sequences; the model's context is unchanged
    if name.startswith('stripe_'):
        return asked <= size or not is_adapter      # finer stripes copy the learned thresholds
    if name in ('bases', 'shortlist'):
        return asked                    # can be added, but not taken away
    return False


def resized(model, sizes):
    """
    A model of these sizes with the weights of this one. Each new stripe starts with the thresholds of the
    old stripe at its place. If bases are added, the head loses its statistics, so that observe() finds them.
    """
    new = new_model({name: sizes[name] for name in asdict(model.config)})
    if sizes.get('lora_rank'):
        cwic.add_lora(new, sizes['lora_rank'])
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith('theta')}
    new.load_state_dict(state, strict=False)
    for (_, layer), (_, old) in zip(new.sparse_layers(), model.sparse_layers()):
        if isinstance(layer, cwic.StripedLinear):
            layer.theta.data = old.theta.data[torch.arange(len(layer.theta)) * layer.stripe // old.stripe]
        else:
            layer.theta.data = old.theta.data
    if new.config.bases and not model.config.bases:
        new.head.sigma.zero_()
    return new


def starting_model(config, given):
    """--init_from -> (model, what else its file says, the options with its sizes and all it implies)."""
    source = config.init_from
    try:
        model, saved = weights.load(source, merge=False)
    except (CheckpointError, weights.WeightsError) as error:
        fail(f'--init_from {source}: {error}', 1)
    sizes, base = asdict(model.config), saved.get('base')
    if base:                    # an adapter, from which this run continues
        sizes.update(init_from=base, lora_rank=model.head.adapter.A.shape[1])
    elif any(float(layer.theta.detach().max()) > 0 for _, layer in model.sparse_layers()):
        fail(f'--init_from {source}: is sparse already; start from a dense model, such as one trained with '
             '--target_reduction 1')
    for name in sorted(given & sizes.keys() - {'init_from'}):
        asked = getattr(config, name)
        if asked != sizes[name] and not may_differ(name, sizes[name], asked, bool(base)):
            fail(f'--{name} {asked}: {source} has {sizes[name]}; leave the option out')
        if name != 'block_size':
            sizes[name] = asked
    if any(sizes[name] != size for name, size in asdict(model.config).items()):
        model = resized(model, sizes)
    if config.lora_rank and not base:
        saved.update(base=source, base_sha256=weights_sha256(model))
        cwic.add_lora(model, config.lora_rank)
    implied = {**sizes, 'dense_steps': 0, 'teacher': 1.0 if config.teacher < 0 else config.teacher}
    options = asdict(config).keys() - (given & {'dense_steps', 'block_size'})
    return model, saved, replace(config, **{name: implied[name] for name in options & implied.keys()})


def resumed_model(config, given):
    """last.safetensors -> (model, what else the file says, its options with those changed that may be)."""
    try:
        model, saved = weights.load(os.path.join(config.out, LAST), merge=False)
        old = check_options(type(config), saved.get('options', {}))
        sizes = {name: getattr(old, name, size) for name, size in asdict(model.config).items()}
        if old.block_size > model.config.block_size \
                or CWICConfig(**{**sizes, 'block_size': model.config.block_size}) != model.config:
            raise ValueError('options of another model')
    except (CheckpointError, weights.WeightsError) as error:
        fail(f'cannot resume: {error}', 1)
    except ValueError as error:
        fail(f'cannot resume: {LAST} does not hold a run ({error})', 1)
    for name in sorted(given - FREE_TO_CHANGE):
        asked, had = getattr(config, name), getattr(old, name)
        if asked != had:
            fail(f'--{name} {asked}: the run was started with {had}; leave the option out, or choose another '
                 '--out')
    names = given & FREE_TO_CHANGE | {'out', 'resume', 'max_steps'}
    return model, saved, replace(old, **{name: getattr(config, name) for name in names})


def check_carried(saved, config, n_matrices):
    """Raises an error if last.safetensors says of its run what cannot be. n_matrices: in its model."""
    def numbers(xs, count):
        return type(xs) is list and len(xs) == count and all(type(x) in (int, float) for x in xs)

    def measured(x):        # as evaluate.measure() returns it
        names = ['val_loss', 'spread', 'reduction', 'surprise_correlation', 'entropy_correlation',
                 *x.keys() & {'kl', 'agreement'}]
        return (numbers([x[name] for name in names], len(names)) and x['reduction'] > 0
                and numbers(x['active_share'], n_matrices)
                and numbers([x['compute_percentiles'][p] for p in ('5', '95')], 2))

    def logged(row):        # the fourth number, val_loss, may be missing
        return (type(row) is list and numbers(row[:3] + row[4:], len(COLUMNS) - 1)
                and (row[3] is None or numbers(row[3:4], 1)))

    step, results, best, log = (saved[name] for name in ('step', 'results', 'best', 'log'))
    fits = {
        'step': type(step) is int and 0 <= step <= config.steps(),
        'seconds': numbers([saved['seconds']], 1) and saved['seconds'] >= 0,
        'active': numbers(saved['active'], n_matrices) and min(saved['active']) >= 0,
        'results': results == {} or measured(results),
        'best': best == {} and step < config.steps() or measured(best) and type(best['step']) is int,
        'log': type(log) is list and all(map(logged, log))}
    if not all(fits.values()):
        raise ValueError(', '.join(name for name, fit in fits.items() if not fit))
