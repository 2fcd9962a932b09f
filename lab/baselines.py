"""
Compares the other ways to skip: the same models, the same training, the same count of weights.

    python train.py --target_reduction 1 --out out/dense            # the dense model that all start from
    python lab/baselines.py                                         # every method on that model: hours
    python lab/baselines.py --methods TEAL,CWIC --targets 2,3 --trained_targets 3 --steps 20
    python lab/baselines.py --subject smollm2 --recipe config/smollm2_distill.toml --blimp FILE

Each result is saved in --out at once, so the same command continues where it was stopped. Thresholds are set
on training text, and results are for validation text. Every token is sparse, and the LM head counts.

Not here: the methods, which methods.py surveys, except for variants of CWIC that lack one thing each; and
speed, as few of the methods have a kernel.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C while torch is imported, which takes seconds

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the repository, for the imports below

import cwic
import evaluate
import plots
import train
import weights
from checkpoint import CheckpointError
from cwic import Thresholds
from data import common
from device import choose_device, choose_dtype, tune_malloc
from evaluate import mix_windows
from files import DAMAGED, read_text, write_atomically
from lab.benchmarks import blimp, read_blimp
from lab.methods import LEARNED, METHODS, ONE_STRIPE, STRIPES, Cannot, Changed, Method
from options import fail, option, parse_options, progress
from tokenizer import load_tokenizer

EVERY = 10              # optimiser steps between calibrations in training
CALIBRATION = 32        # windows of training text on which thresholds are set; in training, 8 of them
BLIMP_PAIRS = 200       # of each paradigm

# -----------------------------------------------------------------------------
# CWIC without one of its parts


class Uncentred(Changed):
    """Learned thresholds on |x|, not on |x - mu|."""
    centred = False


class OneThreshold(Changed):
    """One learned threshold for the whole matrix."""

    def thresholds(self):
        return (self.theta[:1, :1] * self.scale * self.sigma.mean()).expand_as(self.theta)


class OwnPrice(Changed):
    """An active weight of this matrix costs `push` times the price."""
    push = torch.tensor(1.0)        # a tensor: torch would compile again for each new number

    def forward(self, x, dense=False):
        y, active = super().forward(x, dense)
        return y, active.detach() + self.push * (active - active.detach())


class OwnTargets(Method):
    """Each matrix has its own flop_loss, with the same target, instead of one for the whole model."""

    def step(self, run, tokens, targets, target):
        # train_step() charges this price for a weight; target + 1 is out of reach, so the price is never 0
        price = cwic.price(run.active.sum(), run.model.n_weights(), target + 1)
        for active, (_, layer) in zip(run.active, run.model.sparse_layers()):
            own = cwic.price(active, layer.n_weights, target) * layer.n_weights / run.model.n_weights()
            layer.push = torch.tensor(own / price)
        train.train_step(run, tokens, targets, target + 1)


ABLATIONS = {
    'CWIC: bases': Method(**LEARNED, options={'bases': True}),
    'CWIC: shortlist': Method(**LEARNED, options={'shortlist': True}),
    'CWIC: one stripe': Method(**LEARNED, options=ONE_STRIPE),
    'CWIC: stripes of 64': Method(**LEARNED, options=dict.fromkeys(STRIPES, 64)),
    'CWIC: no centre': Method(**LEARNED, options={}, layer=Uncentred),
    'CWIC: one threshold': Method(**LEARNED, options={}, layer=OneThreshold, gpt2_only=True),
    'CWIC: own targets': OwnTargets(**LEARNED, options={}, layer=OwnPrice, gpt2_only=True),
    'CWIC: next token': Method(**LEARNED, options={'teacher': 0.0})}
ALL_METHODS = METHODS | ABLATIONS

# -----------------------------------------------------------------------------
# compare


@dataclass
class CompareConfig:
    about = 'Applies every method to one dense model.'
    subject: str = option('out/dense/best.safetensors', 'the dense model: a checkpoint, smollm2, gpt2, ...')
    recipe: str = option('config/distill_small.toml', 'preset of train.py for all training')
    methods: str = option('', f'some of: {", ".join(ALL_METHODS)}; left out: all')
    targets: str = option('1.25,1.5,2,3,4', 'reductions, for methods without training')
    trained_targets: str = option('2,3', 'reductions, for methods with training; ablations get the highest')
    seeds: str = option('1,2,3', 'for each trained method at its highest target; at others only the first')
    steps: int = option(0, 'optimiser steps of training; 0: as many as the recipe has', at_least=0)
    windows: int = option(128, 'windows of validation text', at_least=1)
    blimp: str = option('', f'BLiMP as JSON lines, to measure {BLIMP_PAIRS} pairs of each paradigm as well')
    out: str = option('out/baselines', 'folder for rows.jsonl and table.md')
    picture: str = option('assets/frontier.png', 'file of the picture')
    device: str = option('auto', 'auto, cpu, cuda or mps')


def plan(config):
    """-> [(method, target, seed)] to run, those without training first"""
    try:
        targets = {trained: sorted({float(number) for number in text.split(',')})
                   for trained, text in ((False, config.targets), (True, config.trained_targets))}
        seeds = sorted({int(number) for number in config.seeds.split(',')})
        if min(targets[False] + targets[True]) < 1 or seeds[0] < 0:
            raise ValueError
    except ValueError:
        fail(f'--targets {config.targets} --trained_targets {config.trained_targets} --seeds {config.seeds}: '
             'must be such as 2,3')
    jobs = []
    for name in config.methods.split(',') if config.methods else ALL_METHODS:
        if name not in ALL_METHODS:
            fail(f'--methods {name}: there are {", ".join(ALL_METHODS)}')
        method = ALL_METHODS[name]
        asked = targets[method.trained and not method.predicts][-1 if name in ABLATIONS else 0:]
        for target in [1.0] if name == 'dense' else asked:
            several = method.trained and target == targets[True][-1]
            jobs += [(name, target, seed) for seed in (seeds if several else seeds[:1])]
    return sorted(jobs, key=lambda job: ALL_METHODS[job[0]].trained)


def distil(run, mix, method, calibration, label):
    """Trains run.model, already changed by the method. label: for the line of progress."""
    config, model = run.config, run.model
    if method.learned:
        train.observe(run, mix)
        train.fuse_masks(run)
    for run.step in range(config.steps()):
        target, lr = train.target_at(run.step, config), train.lr_at(run.step, config)
        if not (method.learned or method.is_dense) and run.step % EVERY == 0:
            with run.uncompiled():
                method.follow(model, target, config.target_reduction, calibration[:8])
        for group, share in zip(run.optimizer.param_groups, (1, 1, config.threshold_lr), strict=True):
            group['lr'] = share * lr
        starts = train.step_starts(mix, config, run.step)
        method.step(run, *train.get_batch(mix, starts, config.block_size, run.device), target)
        progress(f'{label}  step {run.step + 1} of {config.steps()}')


def run_method(job, config, recipe, given, teacher, saved, pairs, label):
    """-> the row of a job, (method, target, seed). pairs: BLiMP's, or {}. Raises Cannot."""
    name, target, seed = job
    method, device = ALL_METHODS[name], recipe.device
    torch.compiler.reset()      # torch compiles a block only a few times, and each method has other layers
    run, mix = method.start(teacher, saved, replace(recipe, target_reduction=target, seed=seed), given)
    run.teacher, run.dtype = teacher, getattr(torch, recipe.dtype)
    model, options = run.model, run.config
    method.change(model)
    for layer in model.modules() if not method.learned else ():
        if isinstance(layer, Thresholds):       # the method sets them, so a step of train.py must not
            layer.theta.requires_grad_(False)
    run.optimizer = torch.optim.AdamW(model.parameter_groups(options.lr, options.lr, options.weight_decay),
                                      betas=(0.9, options.beta2), fused=device != 'mps')
    calibration = mix_windows(mix, 'train', CALIBRATION, options.block_size)[:, :-1]
    calibration = torch.from_numpy(calibration).to(device)
    validation = mix_windows(mix, 'val', config.windows, options.block_size)
    if method.trained:
        distil(run, mix, method, calibration, label)
    with run.uncompiled():
        if not (method.learned or method.is_dense):
            method.limit(model, target, calibration)
        results = evaluate.measure(model, validation, teacher, method.is_dense)
        if pairs:
            spec, encoding = saved['tokenizer'], load_tokenizer(saved['tokenizer'])
            by_paradigm, _ = blimp(model, spec, encoding, pairs, method.is_dense)
            results['blimp'] = float(np.mean(list(by_paradigm.values())))
    return {'method': name, 'target': target, 'seed': seed,
            # against the dense model's weights, also if this one is smaller
            'reduction': results['reduction'] * teacher.n_weights() / model.n_weights(),
            **{key: results.get(key) for key in ('val_loss', 'kl', 'agreement', 'blimp')},
            'cv': results['spread'],
            'trained_tokens': method.trained * options.steps() * options.batch_size * options.block_size}


COLUMNS = {'reduction': ('reduction', '.2f'), 'kl': ('KL to dense', '.4f'), 'val_loss': ('loss', '.4f'),
           'agreement': ('top-1 agreement', '.1%'), 'blimp': ('BLiMP', '.1%'),
           'cv': ('spread of compute', '.1%'), 'trained_tokens': ('tokens trained on', ',.0f')}


def table(rows):
    """Markdown, a line for each method and target; for several seeds, the median and the extremes."""
    def cell(same, key):
        values, form = [r[key] for r in same if r.get(key) is not None], COLUMNS[key][1]
        if len(set(values)) < 2:
            return f'{values[0]:{form}}' if values else ''
        return f'{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})'

    groups, lines = {}, []      # groups: {(subject, number of the method, target): rows}
    for r in rows:
        groups.setdefault((r['subject'], list(ALL_METHODS).index(r['method']), r['target']), []).append(r)
    for (subject, number, target), same in sorted(groups.items()):
        if f'{subject}:' not in lines:
            titles = ['method', 'target', *(title for title, _ in COLUMNS.values())]
            lines += ['', f'{subject}:', '', f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
        cells = [cell(same, key) for key in COLUMNS]
        if 'cannot' in same[0]:
            cells = [f'cannot: {same[0]["cannot"]}', *cells[1:]]
        lines += [f'| {same[0]["method"]} | {target:g}x | {" | ".join(cells)} |']
    return '\n'.join(lines[1:]) + '\n'


def earlier_rows(path, config, settings):
    """
    The rows in rows.jsonl. Ends the program if the file is no comparison, or if this subject was compared
    with other settings.
    """
    if not os.path.exists(path):
        return []
    try:
        rows = [json.loads(line) for line in read_text(path).splitlines()]
        others = [r for r in rows if r['subject'] == config.subject and r['settings'] != settings]
    except DAMAGED:
        fail(f'{path}: not written by this program; choose another --out, or delete it', 1)
    if others:
        fail(f'--out {config.out} holds a comparison of {config.subject} with other options, or of another '
             'model of that name; choose another --out, or delete it', 1)
    return rows


def read_recipe(config):
    """-> TrainConfig of all training, with as many steps as --steps says; the names that the preset gave"""
    recipe, given = parse_options(train.TrainConfig, 'train.py', presets=True, argv=[config.recipe])
    of_recipe = recipe.ramp_steps + recipe.hold_steps
    steps = config.steps or of_recipe
    ramp = round(steps * recipe.ramp_steps / of_recipe)
    recipe = replace(recipe, ramp_steps=ramp, hold_steps=steps - ramp,
                     warmup_steps=min(recipe.warmup_steps, steps), init_from=config.subject, out=config.out,
                     device=choose_device(config.device))
    return recipe, given


def compare(config):
    recipe, given = read_recipe(config)
    if config.subject == CompareConfig.subject and not os.path.exists(config.subject):
        fail(f'{config.subject} is not there: python train.py --target_reduction 1 --out out/dense', 1)
    plots.check_picture(config.picture)
    pairs = read_blimp(config.blimp, BLIMP_PAIRS) if config.blimp else {}
    model, saved = weights.load(config.subject)
    if any(float(layer.theta.detach().max()) > 0 for _, layer in model.sparse_layers()):
        fail(f'--subject {config.subject} is sparse already; for a dense model: '
             'python train.py --target_reduction 1 --out out/dense', 1)
    # what results depend on, besides method, target and seed
    settings = {'recipe': config.recipe, 'steps': recipe.ramp_steps + recipe.hold_steps,
                'windows': config.windows, 'blimp_pairs': config.blimp and BLIMP_PAIRS,
                'dense': saved.get('val_loss')}
    files = [os.path.join(config.out, name) for name in ('rows.jsonl', 'table.md')]
    rows = earlier_rows(files[0], config, settings)
    finished = {(r['method'], r['target'], r.get('seed')) for r in rows if r['subject'] == config.subject}
    jobs = [job for job in plan(config) if job not in finished]
    dtype, why = choose_dtype(recipe.dtype, recipe.device)
    recipe.dtype = str(dtype).removeprefix('torch.')
    print(f'{len(jobs)} runs to do on {recipe.device}; {recipe.dtype} ({why})', flush=True)
    os.makedirs(config.out, exist_ok=True)
    model.to(recipe.device).requires_grad_(False)
    for block in model.blocks if recipe.compile else ():
        block.compile()
    for i, job in enumerate(jobs):
        label = '{:3}/{}  {:19} {:4g}x'.format(i + 1, len(jobs), *job)
        progress(label)
        try:
            row = run_method(job, config, recipe, given, model, saved, pairs, label)
            said = f'reduction {row["reduction"]:.2f}x  kl {row["kl"]:.4f}  loss {row["val_loss"]:.4f}'
        except Cannot as error:
            row = dict(zip(('method', 'target', 'seed'), job), cannot=str(error))
            said = f'cannot: {error}'
        progress()
        print(f'{label}  {said}', flush=True)
        rows.append({'subject': config.subject, 'settings': settings, **row})
        lines = ''.join(json.dumps(r) + '\n' for r in rows)
        write_atomically(files[0], lambda file: file.write(lines.encode()))
    text = table(rows)
    write_atomically(files[1], lambda file: file.write(text.encode()))
    if plots.frontier(rows, config.picture):        # there is none of ablations alone
        files.append(config.picture)
    print(f'\n{text}\nfiles: {", ".join(files)}')


def main():
    config, _ = parse_options(CompareConfig, 'python lab/baselines.py')
    tune_malloc()
    try:
        compare(config)
    except CheckpointError as error:
        fail(error, 1)
    except torch.OutOfMemoryError:
        fail('out of memory; a smaller micro_batch in the --recipe, or fewer --windows, take less', 1)


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    common.run(main)
