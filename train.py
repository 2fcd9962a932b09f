"""
Trains a CWIC model: first dense, then ever sparser, then sparse for good; or makes a pretrained model sparse.

    python train.py                                     # a small model of Python code, on any laptop
    python train.py --target_reduction 1                # the same run without sparsity, to compare with
    python train.py config/NAME.toml --lr 5e-4          # a preset, with one option changed
    python train.py --data selfwritten:0.5,people:0.5   # a mix, by shares of each batch
    python train.py --resume                            # goes on as if it had never stopped
    python train.py --init_from gpt2 --max_steps 0      # no training: saves GPT-2 as it was released
    torchrun --nproc_per_node 2 train.py                # several processes share each step's batch

With --init_from, sparsity begins at once, at the exact dense model, and the loss is the two-way KL to that
model, unless --dense_steps, --teacher and --reverse_kl say otherwise. With --lora_rank, its matrices stay frozen:
what is learned is thresholds and a low-rank change of each matrix, and checkpoints hold only that.
--init_from such an adapter goes on from it.

Leaves in --out: best.safetensors (the best evaluation that met the compute target, for use), last.safetensors
(all it takes to resume), log.csv and training.png.

A batch depends on the seed and the step alone, so there is no data position and no random state to carry: a
resumed run draws what the uninterrupted one would have drawn, on any number of processes. Each process takes
its share of the sequences of every step; gradients and counts are summed in one place,
all_reduce(). All evaluate, the first one logs and saves. Where one ends, the rest save and end.
Several hosts need --out on a shared disk.

Not here: an experiment tracker, dropout, sharding of weights or of the optimiser.
"""

import os
import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C while torch is imported, for seconds
    # torch's threads would wait for each other spinning: beside other programs that is ten times slower
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import csv
import io
import math
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

import cwic
import plots
import weights
from checkpoint import CheckpointError, load_optimizer, load_teacher, save_checkpoint, weights_sha256
from cwic import GPT, CWICConfig
from data import common
from device import (ProcessGone, CudaGraph, check_compile, choose_device, choose_dtype,
                    local_main_first, join_processes, tune_malloc, leave, all_reduce, together,
                    why_no_compile)
from evaluate import in_replies, measure, mix_windows, rows_at_once
from files import write_atomically
from options import check_options, fail, option, parse_options

COLUMNS = ['step', 'seconds', 'loss', 'val_loss', 'reduction', 'target', 'lr']      # of log.csv
BEST, LAST = 'best.safetensors', 'last.safetensors'
FILES = (BEST, LAST, 'log.csv', 'training.png')                                     # of a run
MET = 0.97                  # an evaluation has met the target from this share of it on
OBSERVED = 64               # windows on which the statistics rest, all of them dense
FUSE_FROM = 2 ** 18         # tokens of sparse training that pay for compiling the gate, on a CPU


@dataclass
class TrainConfig:
    about = 'Trains a CWIC model: from scratch, dense and then sparse, or from a pretrained model.'
    data: str = option('python', 'folder in data/ that holds train.bin, val.bin and meta.json; or a mix of '
                       'several, with shares of the windows: selfwritten:0.5,people:0.5')
    out: str = option('out', 'where checkpoints, the log and the picture go')
    overwrite: bool = option(False, 'start anew in an --out that holds another run, which is deleted')
    init_from: str = option('', 'model to start from: smollm2, gpt2, ..., a folder or GGUF file with such '
                            'weights, or a checkpoint of ours')
    lora_rank: int = option(0, 'with --init_from: freeze its matrices and learn a change of this rank of each; '
                       '0: train all weights', at_least=0)
    resume: bool = option(False, 'go on from last.safetensors in --out, with the options it was started with')
    seed: int = option(1, 'of the initial weights and of the order of the data', at_least=0)
    device: str = option('auto', 'auto, cpu, cuda or mps')
    dtype: str = option('auto', 'of matrix products: auto, float32 or bfloat16')
    # the model
    arch: str = option('gpt2', 'gpt2, or llama: RMSNorm, rotary positions, grouped queries, a gated MLP')
    n_layer: int = option(2, 'blocks')
    n_head: int = option(5, 'attention heads')
    n_kv_head: int = option(0, 'llama: heads of keys and values; 0: as many as --n_head')
    n_embd: int = option(320, 'width')
    n_hidden: int = option(0, 'width of the MLP; 0: 4 times --n_embd')
    block_size: int = option(256, 'tokens in a training window, and in a new model\'s context', at_least=1)
    bias: bool = option(True, 'gpt2: biases in linear layers and norms')
    stripe_qkv: int = option(320, 'columns in a stripe of the query-key-value matrix')
    stripe_out: int = option(320, '... of the attention output matrix')
    stripe_up: int = option(320, '... of the first MLP matrix (llama: of its gate)')
    stripe_down: int = option(320, '... of the second MLP matrix')
    stripe_head: int = option(1024, '... of the LM head')
    bases: bool = option(False, 'with --init_from: head and attention output read the principal components '
                         'of their inputs, of which they can skip more')
    shortlist: bool = option(False, 'the head computes the logits of the likeliest tokens with every weight, '
                             'so that it can skip more for all others')
    # compute
    target_reduction: float = option(3.0, 'dense weights / active weights per token to train for; 1 trains a '
                                     'dense model', at_least=1)
    teacher: float = option(-1.0, 'share of the sparse loss that is KL to the frozen dense model, not '
                            'next-token loss; below 0: 1 with --init_from, else 0', at_least=-1, at_most=1)
    reverse_kl: float = option(0.5, 'share of KL(student || teacher) in that; the rest is '
                               'KL(teacher || student)', at_least=0, at_most=1)
    # the schedule, in optimiser steps
    dense_steps: int = option(700, 'steps before sparsity begins; with --init_from, none', at_least=0)
    ramp_steps: int = option(150, 'steps in which the target rises from 1 to --target_reduction', at_least=0)
    hold_steps: int = option(350, 'steps at the full target', at_least=0)
    max_steps: int = option(-1, 'stop after this step; -1: at the end; 0: save what was read', at_least=-1)
    warmup_steps: int = option(300, 'steps in which the learning rate rises from 0', at_least=1)
    lr: float = option(2e-3, 'peak learning rate, held while dense, then falling along a line', at_least=0)
    final_lr: float = option(0.1, 'the last learning rate, as a share of --lr', at_least=0)
    threshold_lr: float = option(0.1, 'learning rate of the thresholds, as a share of --lr', at_least=0)
    weight_decay: float = option(0.1, 'of matrices', at_least=0)
    beta2: float = option(0.99, "AdamW's second beta", at_least=0, at_most=0.99999)
    clip: float = option(1.0, 'largest norm of the gradient, but for the thresholds; 0: any', at_least=0)
    batch_size: int = option(8, 'sequences in an optimiser step, over all processes', at_least=1,
                             at_most=2 ** 16)
    micro_batch: int = option(8, 'sequences in one forward pass, at most', at_least=1)
    recompute: bool = option(False, 'compute activations again in backward, not keep them: slower, smaller')
    compile: bool = option(False, 'fuse what torch.compile can, and on a GPU replay steps: '
                           'several times as fast there, after a minute')
    # what is reported
    eval_every: int = option(150, 'steps between evaluations, each of which also saves last.safetensors',
                             at_least=1)
    eval_windows: int = option(128, 'windows of validation text, always the same', at_least=1,
                               at_most=2 ** 16)
    log_every: float = option(5.0, 'seconds between lines of output', at_least=0)

    def steps(self):
        return self.dense_steps + self.ramp_steps + self.hold_steps

    def last_step(self):
        return self.steps() if self.max_steps < 0 else min(self.max_steps, self.steps())

    def is_dense(self, step):
        return step < self.dense_steps or self.target_reduction == 1


# options that a resumed run may change: they change what it costs, not what it computes
FREE_TO_CHANGE = {'out', 'resume', 'max_steps', 'device', 'dtype', 'micro_batch', 'recompute', 'compile',
                  'log_every'}


@dataclass(eq=False)
class Run:
    """What a run carries from one step to the next. last.safetensors holds all of it."""
    config: TrainConfig
    model: GPT
    tokenizer: dict
    optimizer: torch.optim.Optimizer
    device: str
    dtype: torch.dtype                  # of matrix products
    active: torch.Tensor                # (matrices,) running mean of each matrix's active weights per token
    teacher: GPT = None
    base: dict = field(default_factory=dict)        # of an adapter: its 'base', and 'base_sha256'
    step: int = 0
    seconds: float = 0.0                # of training so far, evaluations included
    results: dict = field(default_factory=dict)     # of the last evaluation, see evaluate.measure()
    best: dict = field(default_factory=dict)        # those of best.safetensors, and its step
    log: list = field(default_factory=list)         # rows of log.csv
    head_loss: object = None            # head_loss(), or what torch.compile made of it
    gradients: object = None            # gradients(), or a recording of it
    update: object = None               # update(), or a recording of it

    def autocast(self):
        device = self.model.head.weight.device.type
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device, dtype=self.dtype)

    def path(self, name):
        return os.path.join(self.config.out, name)


CARRIED = ('step', 'seconds', 'results', 'best', 'log')         # of a Run, as they are in last.safetensors

# -----------------------------------------------------------------------------
# data and schedules


def windows(mix, starts, block_size, device):
    """
    The training sequences that begin at starts (B, 2), see step_starts(): inputs and targets (B, block_size);
    targets are the inputs one token later.
    """
    tokens = np.stack([mix[part].train[start:start + block_size + 1] for part, start in starts])
    tokens = torch.from_numpy(tokens.astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def step_starts(mix, config, step):
    """
    Where the sequences of one step begin, those of all processes: np.int64 (batch_size, 2), the index of a
    data set in the mix and of a token in it, a function of the seed and the step alone. It is any token, or
    in data that is made of windows, the first of one.
    """
    rng, parts = np.random.default_rng([config.seed, step]), np.zeros(config.batch_size, np.int64)
    if len(mix) > 1:
        # points evenly spread over [0, 1), all moved by one random number: each data set gets its share of
        # the batch, rounded up or down at random, and exact on average
        points = (np.arange(config.batch_size) + rng.random()) / config.batch_size
        parts = np.searchsorted(np.cumsum([part.share for part in mix[:-1]]), points, side='right')
    strides = np.array([part.meta.get('window', 1) for part in mix])
    counts = (np.array([len(part.train) for part in mix]) - config.block_size - 1) // strides + 1
    return np.stack([parts, strides[parts] * rng.integers(0, counts[parts])], 1)


def target_at(step, config):
    """The reduction to train for: 1 while dense, then along a line to its end value, then held."""
    progress = (step + 1 - config.dense_steps) / max(config.ramp_steps, 1)
    return 1 + (config.target_reduction - 1) * min(max(progress, 0.0), 1.0)


def lr_at(step, config):
    """Warm-up, level while dense, then down along a line: the sparse model must still be able to learn."""
    warm = min((step + 1) / config.warmup_steps, 1.0)
    left = 1 - max(step - config.dense_steps, 0) / max(config.steps() - config.dense_steps, 1)
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * left)


# -----------------------------------------------------------------------------
# one optimiser step


def head_loss(model, teacher, hidden, teacher_hidden, targets, dense, teacher_share, reverse_kl):
    """
    The head and the loss of what it predicts. hidden (B, T, d), targets (B, T) -> the loss, a mean over
    tokens, in nats; and the head's active weights (B, T).
    """
    logits, active = model.head(hidden, dense)
    logits, loss = logits.flatten(0, 1), 0.0                            # (B * T, vocab)
    if teacher_share < 1:
        loss = (1 - teacher_share) * cwic.next_token_loss(logits, targets.flatten())
    if teacher_share > 0:
        with torch.no_grad():
            teacher_logits = teacher.head(teacher_hidden, dense=True)[0].flatten(0, 1)
        loss = loss + teacher_share * cwic.kl_loss(logits, teacher_logits, reverse_kl)
    return loss, active


def backward(run, tokens, targets, dense, price):
    """
    Adds the gradients of one micro-batch, tokens and targets (B, T), to those of the step. Only a few
    sequences' logits exist at a time: backward reaches their hidden states before the next come, and the
    trunk when all are there. Returns the loss (nats) and each matrix's active weights (matrices,), both as
    their part of the step's mean.
    """
    config, model = run.config, run.model
    share = len(tokens) / config.batch_size
    teacher_share = 0.0 if dense or run.teacher is None else config.teacher
    hidden, active = model.trunk(tokens, dense=dense, recompute=config.recompute)
    leaf = hidden.detach().requires_grad_()                             # (B, T, d)
    # pieces of one size, or for another one torch.compile would compile again
    count = math.ceil(len(tokens) / rows_at_once(model, tokens.shape[1]))
    while len(tokens) % count:
        count += 1
    teacher_hidden = [None] * count
    if teacher_share:
        with torch.no_grad():
            teacher_hidden = run.teacher.trunk(tokens, dense=True)[0].tensor_split(count)
    total_loss, active_head = 0.0, 0.0
    for piece in zip(leaf.tensor_split(count), teacher_hidden, targets.tensor_split(count)):
        piece_share = share * len(piece[0]) / len(tokens)
        loss, active_piece = run.head_loss(model, run.teacher, *piece, dense, teacher_share,
                                           config.reverse_kl)
        (piece_share * (loss + price * active_piece.mean())).backward()
        total_loss = total_loss + piece_share * loss.detach()
        active_head = active_head + piece_share * active_piece.detach().mean()
    active = share * active.mean((1, 2))                                # (matrices - 1,)
    if dense:
        hidden.backward(leaf.grad)
    else:
        torch.autograd.backward([hidden, price * active.sum()], [leaf.grad, None])
    return total_loss, torch.cat([active.detach(), active_head[None]])  # (matrices,)


def gradients(run, tokens, targets, price, dense):
    """
    Leaves in each .grad what this process's share of a step, tokens and targets (B, T), adds to the gradient.
    price: what each active weight costs, a tensor. Returns loss and active weights as backward() does.
    """
    run.optimizer.zero_grad()
    loss, active = 0.0, 0.0
    for micro_batch in zip(tokens.split(run.config.micro_batch), targets.split(run.config.micro_batch)):
        with run.autocast():
            micro_loss, micro_active = backward(run, *micro_batch, dense, price)
        loss, active = loss + micro_loss, active + micro_active
    return loss, active


def update(run, rates, dense):
    """
    Moves the parameters, along gradients that are summed by now. rates: the learning rate of each group of
    them, as numbers, or as a tensor where this is recorded. Returns the norm of the gradient, and that of the
    thresholds', which is not part of it.
    """
    *others, thresholds = [group['params'] for group in run.optimizer.param_groups]
    norm = torch.nn.utils.clip_grad_norm_(sum(others, []), run.config.clip or math.inf)
    threshold_norm = torch.nn.utils.get_total_norm([p.grad for p in thresholds if not dense])
    learned = [layer for _, layer in run.model.sparse_layers() if layer.theta.requires_grad]
    before = [layer.theta.detach().clone() for layer in learned]
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        # AdamW refuses to be recorded unless it is capturable, and warns where it need not be
        group.update(lr=rate, capturable=norm.is_cuda and torch.cuda.is_current_stream_capturing())
    run.optimizer.step()
    if learned and not dense:
        cwic.limit_thresholds(learned, before)
    return norm, threshold_norm


def recorded(run):
    """gradients(), update(): on a GPU and with --compile, from their fourth call on replayed as recorded."""
    replayed = run.config.compile and run.model.head.weight.is_cuda
    return [CudaGraph(work) if replayed else work for work in (gradients, update)]


def train_step(run, tokens, targets, target, dense=False, stop=False):
    """
    One optimiser step on this process's share of the batch, tokens and targets (B, T); target: the reduction
    to train for. Changes the model, the optimiser and run.active. Returns the step's loss in nats, the active
    weights of each matrix (matrices,), both over all processes, and whether any process wants to stop. Raises
    ProcessGone before anything is changed. Ends the program where the loss or its gradient is not finite.
    """
    model, rates = run.model, [float(group['lr']) for group in run.optimizer.param_groups]
    if isinstance(run.update, CudaGraph):
        rates = torch.tensor(rates, device=run.device)
    # the loss of compute, flop_loss(run.active), has one slope for all: what each active weight costs
    price = 0.0 if dense else cwic.price(run.active.sum(), model.n_weights(), target)
    loss, active = run.gradients(run, tokens, targets, run.active.new_tensor(price), dense)
    stop = torch.tensor(float(stop), device=run.device)
    all_reduce([p.grad for p in model.parameters() if p.grad is not None] + [loss, active, stop])
    norm, threshold_norm = run.update(run, rates, dense)
    if not dense:
        # one batch's count is noise, and flop_loss, bent as it is, would mistake noise for missing reduction
        run.active.lerp_(active.to(run.active), 0.1)
    # a process that is alone waits for its GPU here, and not earlier: it has been told all the step takes
    if not math.isfinite(loss + norm + threshold_norm):
        fail(f'step {run.step + 1}: the loss is {float(loss)}, the norm of its gradient {float(norm)}; '
             'stopped, and what was saved before is whole. Try a lower --lr', 1)
    return float(loss), active, bool(stop)


def observed(model):
    """Whether every layer has statistics."""
    return all(float(layer.sigma.max()) > 0 for _, layer in model.sparse_layers())


def observe(run, mix):
    """
    Finds the bases, if the model is to have some, and sets the statistics of all layers that have none yet;
    then every process has the first one's model. Raises ProcessGone.
    """
    config = replace(run.config, batch_size=OBSERVED)
    starts = step_starts(mix, config, 2 ** 31)                          # of a step that never comes
    tokens, _ = windows(mix, starts, config.block_size, run.device)
    with run.autocast():
        if run.config.bases:
            sparse = any(layer.sigma.any() for _, layer in run.model.sparse_layers())       # an adapter, from before
            run.model.find_bases(tokens, dense=not sparse)
            run.optimizer.state.clear()     # what Adam knows, it knows of the matrices before
        run.model.observe(tokens)
    # all read the same windows, but not on the same kind of GPU: which way a component points is chance.
    # Through the CPU, where the end of another process is seen
    for tensor in run.model.state_dict().values():
        message = tensor.cpu()
        together(dist.broadcast, message, 0)
        tensor.copy_(message)
    if not observed(run.model):
        fail('the inputs of a layer never change, so its thresholds could not learn: is a layer all 0?', 1)


def fuse_gates(run):
    """Compiles the model's gates, and nothing else, where that works and pays. Returns whether it will."""
    config = run.config
    tokens = (config.steps() - config.dense_steps) * config.batch_size * config.block_size
    pays = run.device == 'cpu' and not config.compile and tokens >= FUSE_FROM and not why_no_compile('cpu')
    if pays:
        run.model.fuse_gates()
    return pays


def frozen_teacher(run):
    """The dense model that the student starts from: a copy, less the student's adapters."""
    teacher = cwic.dense_copy(run.model)
    for block in teacher.blocks if run.config.compile else ():
        block.compile()
    return teacher


# -----------------------------------------------------------------------------
# the beginning of a run


def new_model(sizes):
    try:
        return GPT(CWICConfig(**sizes))
    except ValueError as error:
        fail(f'--{error}')


def with_stripes(model, sizes):
    """
    A model of these sizes: each stripe begins as the one in which it lay. If this one is to have bases, its
    head's statistics are gone, for all that to be found.
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
    """--init_from -> (model, what else its file says, the options with its sizes and what it implies)."""
    source = config.init_from
    try:
        model, saved = weights.load(source, merge=False)
    except (CheckpointError, weights.WeightsError) as error:
        fail(f'--init_from {source}: {error}', 1)
    sizes, base = asdict(model.config), saved.get('base')
    if base:                    # an adapter: goes on from where it stands
        sizes.update(init_from=base, lora_rank=model.head.adapter.A.shape[1])
    elif any(float(layer.theta.detach().max()) > 0 for _, layer in model.sparse_layers()):
        fail(f'--init_from {source}: is sparse already; start from a dense model, such as one trained with '
             '--target_reduction 1')
    for name in sorted(given & sizes.keys() - {'init_from'}):
        asked = getattr(config, name)
        if name == 'block_size' and asked <= sizes[name]:
            continue                    # so long are the training windows; the model's context stays
        finer = name.startswith('stripe_') and (asked <= sizes[name] or not base)
        if asked != sizes[name] and not finer and not (name in ('bases', 'shortlist') and asked):
            fail(f'--{name} {asked}: {source} has {sizes[name]}; leave the option out')
        sizes[name] = asked
    if any(sizes[name] != size for name, size in asdict(model.config).items()):
        model = with_stripes(model, sizes)
    if config.lora_rank and not base:
        saved.update(base=source, base_sha256=weights_sha256(model))
        cwic.add_lora(model, config.lora_rank)
    implied = {**sizes, 'dense_steps': 0, 'teacher': 1.0 if config.teacher < 0 else config.teacher}
    options = TrainConfig.__dataclass_fields__.keys() - (given & {'dense_steps', 'block_size'})
    return model, saved, replace(config, **{name: implied[name] for name in options & implied.keys()})


def resumed_model(config, given):
    """last.safetensors -> (model, what else it says, its options, changed by those given now)."""
    try:
        model, saved = weights.load(os.path.join(config.out, LAST), merge=False)
        old = check_options(TrainConfig, saved.get('options', {}))
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
    """Raises an error unless this can be said of a run, in last.safetensors. n_matrices: of its model."""
    def numbers(xs, count):
        return type(xs) is list and len(xs) == count and all(type(x) in (int, float) for x in xs)

    def measured(x):        # as evaluate.measure() returns it
        names = ['val_loss', 'spread', 'reduction', 'surprise_correlation', 'entropy_correlation',
                 *x.keys() & {'kl', 'agreement'}]
        return (numbers([x[name] for name in names], len(names)) and x['reduction'] > 0
                and numbers(x['active_share'], n_matrices)
                and numbers([x['compute_percentiles'][p] for p in ('5', '95')], 2))

    def logged(row):        # its fourth number, val_loss, may be missing
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


def restore(run, saved):
    """Puts all that last.safetensors holds but the model where it was. Ends the program if it is no run."""
    config = run.config
    try:
        check_carried(saved, config, len(run.active))
        for name in CARRIED:
            setattr(run, name, saved[name])
        run.active = run.active.new_tensor(saved['active'])
        load_optimizer(run.model, run.optimizer, saved['optimizer'])
        if not run.optimizer.state and run.step not in (0, config.dense_steps):
            raise ValueError("Adam's state is missing")
        if run.step > config.dense_steps and not config.is_dense(run.step):
            fuse_gates(run)
            run.teacher = frozen_teacher(run) if config.teacher else None
            if config.teacher and not run.base:         # an adapter's teacher is its base, which is at hand
                load_teacher(run.teacher, saved['teacher'])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f'cannot resume: {LAST} does not hold a run ({error}); is it a {BEST}?', 1)


def begin(config, given, device):
    """
    -> Run: a new one, one from a pretrained model, or a resumed one; and its data, a list of common.Part, or
    None where none is needed.
    """
    torch.manual_seed(config.seed)
    model, saved, mix = None, {}, None
    if config.resume:
        model, saved, config = resumed_model(config, given)
    elif config.init_from:
        model, saved, config = starting_model(config, given)
    else:
        config = replace(config, teacher=max(config.teacher, 0.0))
    tokenizer = saved.get('tokenizer')
    if config.max_steps or config.resume or model is None:
        mix = common.load_mix(config.data, config.block_size)
        meta = mix[0].meta
        if model is None:
            names = asdict(config).keys() & CWICConfig.__dataclass_fields__.keys()
            sizes = {name: getattr(config, name) for name in names}
            model, tokenizer = new_model({**sizes, 'vocab_size': meta['vocab_size']}), meta['tokenizer']
        if tokenizer != meta['tokenizer']:
            theirs, ours = map(common.tokenizer_name, (meta['tokenizer'], tokenizer))
            fail(f'data/{mix[0].name} was made with the tokenizer {theirs}, but the model has {ours} (or '
                 'another of that name); choose other --data, or prepare some: python data/text/prepare.py '
                 f'--tokenizer {ours} FILE... and then --data text')
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(config.lr, config.lr, config.weight_decay),
                                  betas=(0.9, config.beta2), fused=device != 'mps')
    exact = torch.float32 if device == 'mps' else torch.float64
    active = torch.tensor([layer.n_weights for _, layer in model.sparse_layers()], dtype=exact, device=device)
    base = {name: saved[name] for name in ('base', 'base_sha256') if name in saved}
    run = Run(config, model, tokenizer, optimizer, device, torch.float32, active, base=base,
              head_loss=head_loss, gradients=gradients, update=update)
    if config.compile:
        check_compile(device)
        run.head_loss = torch.compile(head_loss)
        for block in model.blocks:
            block.compile()
    shares = saved.get('active_share')
    if config.resume:
        restore(run, saved)
    elif type(shares) is list and [type(x) is float and 0 < x < 2 for x in shares] == [True] * len(active):
        run.active *= torch.tensor(shares).to(active)       # of an adapter, which is sparse already
    return run, mix


# -----------------------------------------------------------------------------
# what a run leaves


def claim_folder(config):
    """
    Makes --out this run's own, for as long as what is returned is kept. Ends the program where another run is
    at work there, or has been and is neither to be resumed nor overwritten.
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
    except (ImportError, OSError):      # Windows, or a disk without locks: nothing keeps two runs apart
        pass
    if not config.resume:
        if not config.overwrite and any(os.path.exists(os.path.join(config.out, name)) for name in FILES):
            fail(f'--out {config.out} holds a run already: go on with it (--resume), choose another, or '
                 'delete it (--overwrite)')
        folder = os.path.dirname(config.init_from) or '.'
        if os.path.isfile(config.init_from) and os.path.samefile(folder, config.out):
            fail(f'--init_from {config.init_from} lies in --out, where this run will write; choose another')
    return lock


def save(run, name):
    """Writes best.safetensors, which is for use, or last.safetensors, with all it takes to go on."""
    config = run.config
    saved = dict(run.results, tokenizer=run.tokenizer, options=asdict(config), step=run.step)
    if run.base:
        saved.update(run.base, base=weights.base_for(run.path(name), run.base['base']))
    if name == LAST:
        saved.update({name: getattr(run, name) for name in CARRIED}, active=run.active.tolist(),
                     optimizer=run.optimizer, teacher=None if run.base else run.teacher)
    try:
        save_checkpoint(run.path(name), run.model, narrow=name == BEST, **saved)
    except CheckpointError as error:
        fail(error, 1)


def save_last(run):
    """last.safetensors, and log.csv with the rows so far."""
    save(run, LAST)
    text = io.StringIO(newline='')
    csv.writer(text).writerows([COLUMNS] + run.log)
    try:
        write_atomically(run.path('log.csv'), lambda file: file.write(text.getvalue().encode()))
    except OSError as error:
        fail(f'{run.path("log.csv")} cannot be written ({error.strerror}); the checkpoints are whole', 1)


def clock(seconds):
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def announce(run, mix, world_size, why):
    """What will be done, on what, in a few lines."""
    config = run.config
    total = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = [f'model   {total:,} parameters' + (f', {trained:,} of them trained' if trained < total else '')
             + f'; {run.model.n_weights():,} dense weights per token'
             + (f'; from {config.init_from}' if config.init_from else '')]
    if mix is not None:
        tokens = config.batch_size * config.block_size
        threads = f', {torch.get_num_threads()} threads' if run.device == 'cpu' else ''
        processes = f', {world_size} processes' if world_size > 1 else ''
        for part in mix:
            share = f'{100 * part.share:.3g}% from ' if len(mix) > 1 else ''
            lines.append(f'data    {share}data/{part.name}: {len(part.train):,} tokens to train on, '
                         f'{len(part.val):,} to validate; vocabulary of {part.meta["vocab_size"]:,}')
        lines += [f'plan    {config.dense_steps} steps dense, {config.ramp_steps} towards '
                  f'{config.target_reduction:g}x less compute, {config.hold_steps} there; {tokens:,} tokens '
                  f'each, {tokens * config.steps():,} in all',
                  f'device  {run.device}{threads}{processes}; {config.dtype} ({why})']
    if config.compile:
        lines.append('compile the first step of each phase will take a minute or so')
    if config.resume:
        lines.append(f'resumed at step {run.step} of {config.steps()}')
    print('\n'.join(lines), flush=True)


class Progress:
    """The line printed every few seconds: the speed since the last one, the time left at the usual pace."""

    def __init__(self, run):
        self.run, self.time, self.step = run, time.perf_counter(), run.step
        self.paces = []                 # seconds for the work of a dense step, line by line

    def work(self, step):
        """Of all steps before this one, in dense steps: a sparse one takes about 1.5 times as long."""
        dense = step if self.run.config.target_reduction == 1 else min(step, self.run.config.dense_steps)
        return dense + 1.5 * (step - dense)

    def line(self, loss, reduction, target, evaluated):
        run, config, seconds = self.run, self.run.config, time.perf_counter() - self.time
        speed = (run.step - self.step) * config.batch_size * config.block_size / seconds
        self.paces.append(seconds / (self.work(run.step) - self.work(self.step)))
        self.time, self.step = self.time + seconds, run.step
        # a median: some lines' time is that of compiling or evaluating
        left = float(np.median(self.paces[-9:])) * (self.work(config.last_step()) - self.work(run.step))
        return (f'step {run.step:5d}/{config.steps()}  loss {loss:.4f}  '
                + (f'val {run.results["val_loss"]:.4f}  ' if evaluated else ' ' * 12)
                + (f'kl {run.results["kl"]:.4f}  ' if evaluated and 'kl' in run.results else '')
                + f'reduction {reduction:.2f}x (target {target:.2f}x)  {speed:7,.0f} tok/s  '
                + f'{clock(left)} left')


def finish(run, mix):
    """The picture and the closing lines, both of the best checkpoint. An error if its target was not met."""
    config, best = run.config, run.best
    loss, reduction = best['val_loss'], best['reduction']
    # each part of a mix has its share of the tokens
    bytes_per_token = sum(part.share * part.meta['val_bytes'] / part.meta['val_tokens'] for part in mix)
    bits = loss / math.log(2) / bytes_per_token
    lines = [f'\ndone in {clock(run.seconds)}: {BEST}, of step {best["step"]}: validation loss {loss:.4f} '
             f'nats per token ({bits:.3f} bits per byte), reduction {reduction:.2f}x '
             f'(target {config.target_reduction:g}x)']
    if 'kl' in best:
        lines.append(f'against the teacher: KL {best["kl"]:.4f} nats, the same likeliest token '
                     f'{100 * best["agreement"]:.1f}% of the time')
    if config.target_reduction > 1:
        low, high = (100 * best['compute_percentiles'][p] for p in ('5', '95'))
        lines += [f'compute per token: {100 / reduction:.1f}% of dense on average, 5th to 95th percentile '
                  f'{low:.1f}% to {high:.1f}%; spread {100 * best["spread"]:.1f}%',
                  f"correlation of a token's compute with its surprise {best['surprise_correlation']:+.2f}, "
                  f"with the entropy of what follows {best['entropy_correlation']:+.2f}"]
    lines += ['files: ' + ', '.join(map(run.path, FILES)),
              f'talk to it: python chat.py --ckpt {run.path(BEST)}']
    print('\n'.join(lines), flush=True)
    try:
        plots.training(run.log, best, run.model.config.matrices, run.path('training.png'))
    except OSError as error:
        fail(f'{run.path("training.png")} cannot be written ({error.strerror}); --resume draws it again', 1)
    if reduction < MET * config.target_reduction:
        fail(f'target not met: {reduction:.2f}x where {config.target_reduction:g}x was asked for; give it '
             'more --hold_steps, or a higher --threshold_lr', 1)


# -----------------------------------------------------------------------------


def wishes_to_stop():
    """A list to which Ctrl-C, SIGTERM and the end of a terminal add. A second Ctrl-C ends at once."""
    wishes = []

    def interrupted(*_):
        wishes.append('interrupted')
        signal.signal(signal.SIGINT, lambda *_: fail('interrupted; what was saved before is whole', 130))

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, lambda *_: wishes.append('terminated'))
    # Windows has no such signal; nohup ignores it
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: wishes.append('terminal gone'))
    return wishes


def train(run, mix, rank, world_size):
    """The loop, until the last step or a wish to stop before it. Returns that: 'interrupted', ..., or ''."""
    config, model = run.config, run.model
    val_tokens = mix_windows(mix, 'val', config.eval_windows, config.block_size)
    replies = in_replies(val_tokens, run.tokenizer)
    uncompiled = (lambda: torch.compiler.set_stance('force_eager')) if config.compile else nullcontext
    wishes, stop, progress = wishes_to_stop(), False, Progress(run)
    run.gradients, run.update = recorded(run)

    def batch(step):
        """This process's share of a step: inputs, targets (B, T)."""
        starts = np.array_split(step_starts(mix, config, step), world_size)[rank]
        return windows(mix, starts, config.block_size, run.device)

    def say(line):
        if rank:
            return
        try:
            print(line, flush=True)
        except OSError as error:            # nobody reads on, or the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            wishes.append(f'stdout failed ({error.strerror})')

    while run.step < config.last_step() and not stop:
        started, dense, target = time.perf_counter(), config.is_dense(run.step), target_at(run.step, config)
        lr = lr_at(run.step, config)
        for group, share in zip(run.optimizer.param_groups, (1, 1, config.threshold_lr), strict=True):
            group['lr'] = share * lr
        try:
            if run.step == config.dense_steps and not dense:
                if fuse_gates(run):
                    say('sparse from here on; the gates are compiled first, for ten seconds or less')
                if not observed(model):             # unlike most adapters
                    with uncompiled():
                        observe(run, mix)
                run.teacher = frozen_teacher(run) if config.teacher else None
            loss, active, stop = train_step(run, *batch(run.step), target, dense, stop=bool(wishes))
        except ProcessGone as why:
            save_last(run)              # by whichever are left: all have the same to save
            fail(f'another process has ended; step {run.step} is saved, go on with --resume ({why})', 1)
        run.step += 1

        evaluated = run.step % config.eval_every == 0 or run.step == config.steps()
        if evaluated:
            with uncompiled():
                run.results = measure(model, val_tokens, run.teacher, dense, replies)
            if not math.isfinite(run.results['val_loss']):
                fail(f'step {run.step}: the validation loss is {run.results["val_loss"]}; stopped, and what '
                     'was saved before is whole. Try a lower --lr', 1)
        run.seconds += time.perf_counter() - started
        reduction = model.n_weights() / max(float(active.sum()), 1.0)
        if evaluated or run.step % 10 == 0:
            val_loss = run.results['val_loss'] if evaluated else None
            run.log.append([run.step, round(run.seconds, 2), loss, val_loss, reduction, target, lr])
        if evaluated:
            score = 'kl' if 'kl' in run.results else 'val_loss'
            met = (run.step >= config.dense_steps + config.ramp_steps
                   and run.results['reduction'] >= MET * config.target_reduction)
            better = (met and run.results[score] < run.best.get(score, math.inf)
                      or run.step == config.steps() and not run.best)
            run.best = {**run.results, 'step': run.step} if better else run.best
            if rank == 0:
                if better:
                    save(run, BEST)
                save_last(run)
        if evaluated or time.perf_counter() - progress.time >= config.log_every:
            say(progress.line(loss, reduction, target, evaluated))
    if rank == 0 and (stop or run.step < config.steps()):
        save_last(run)
    return (wishes or ['interrupted'])[0] if stop else ''


def main():
    config, given = parse_options(TrainConfig, 'python train.py', presets=True)
    if not config.steps():
        fail('--dense_steps, --ramp_steps and --hold_steps must not all be 0')
    if config.lora_rank and not config.init_from and not config.resume:
        fail('--lora_rank changes a pretrained model: say which with --init_from')
    if config.bases and not config.init_from and not config.resume:
        fail('--bases are those of a pretrained model: say which with --init_from')
    tune_malloc()
    device, rank, world_size = join_processes(choose_device(config.device))
    lock = claim_folder(config) if rank == 0 else None      # noqa: F841  kept until the program ends
    run, mix = local_main_first(lambda: begin(config, given, device))
    config = run.config
    if config.batch_size < world_size:
        fail(f'--batch_size {config.batch_size} is too small to be shared by {world_size} processes')
    choice = [choose_dtype(config.dtype, torch.device(device).type)]
    together(dist.broadcast_object_list, choice)                    # measured by each, decided by the first
    run.dtype, why = choice[0]
    config.dtype = str(run.dtype).removeprefix('torch.')            # a resumed run does not measure again
    if rank == 0:
        announce(run, mix, world_size, why)
        for name in FILES if config.overwrite and not config.resume else ():
            if os.path.exists(run.path(name)):
                os.remove(run.path(name))
    if not config.max_steps and not config.resume:
        if rank == 0:
            save(run, BEST)
            print(f'no step to do: saved as it is; talk to it: python chat.py --ckpt {run.path(BEST)}')
        return
    wish = train(run, mix, rank, world_size)
    if rank == 0 and (wish or run.step < config.steps()):
        with suppress(OSError):             # a terminal that is gone
            print(f'\n{wish or "stopped"} at step {run.step}, which is saved; go on with: '
                  f'python train.py --resume --out {config.out}', flush=True,
                  file=sys.stderr if wish else sys.stdout)
    elif rank == 0:
        finish(run, mix)
    sys.exit(130 if wish else 0)


def program():
    """main(), and one line for what may end it."""
    try:
        common.run(main, memory='a smaller --micro_batch takes less, and so does --recompute')
    except ProcessGone as why:
        fail(f'another process has ended; see what it said ({why})', 1)


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program()
    except SystemExit as end:
        leave(end.code)
    leave(0)
