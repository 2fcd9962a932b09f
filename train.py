"""
Trains a CWIC model: from scratch, first dense and then ever sparser; or from a pretrained dense model.

    python train.py                                     # a small model of Python code, on any laptop
    python train.py --target_reduction 1                # the same run without sparsity, for comparison
    python train.py config/NAME.toml --lr 5e-4          # a preset, with one option changed
    python train.py --data selfwritten:0.5,people:0.5   # a mix: half of each batch from each data set
    python train.py --resume                            # continues as if the run had never stopped
    torchrun --nproc_per_node 2 train.py                # two processes share the batch of each step

With --init_from, the run starts at the exact dense model and becomes sparse from the first step on, and its
loss is the KL to that model, unless --dense_steps, --teacher and --reverse_kl say otherwise. With --lora_rank
the model's matrices stay frozen: the run learns thresholds and a low-rank change of each matrix, and its
checkpoints hold only those. --init_from such an adapter continues from it, at a higher --lora_rank if wanted.

A run leaves in --out: best.safetensors (the best evaluation that met the compute target, for use),
last.safetensors (all that --resume needs), log.csv and training.png.

A batch depends on the seed and the step alone, so there is no data position and no random state to save:
a resumed run reads what the uninterrupted one would have read, on any number of processes. Each process takes
its share of the sequences; all_reduce() sums gradients, counts and losses; the first process evaluates, logs
and saves. If a process dies, torchrun ends the others, and --resume continues from the last evaluation.
Several hosts need --out on a shared disk.

Not here: an experiment tracker, dropout, sharding of weights or of the optimiser.
"""

import os
import signal

if __name__ == '__main__':
    # until the first step there is nothing to save, so Ctrl-C just ends the program, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # torch's idle threads sleep instead of spinning: ten times as fast if other programs need the cores
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import copy
import math
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import cwic
import plots
import refinements
import weights
from checkpoint import CheckpointError, load_optimizer, reading, save_checkpoint
from cwic import GPT, CWICConfig
from data import common
from device import (CudaGraph, all_reduce, barrier, check_compile, choose_device, choose_dtype, collective,
                    exit_process, join_processes, tune_malloc)
from evaluate import in_replies, measure, mix_windows, rows_at_once
from files import write_atomically
from options import fail, option, parse_options
from starting import BEST, LAST, new_model, pretrained_model, resumed_model

COLUMNS = ['step', 'seconds', 'loss', 'val_loss', 'reduction', 'target', 'lr']      # of log.csv
FILES = (BEST, LAST, 'log.csv', 'training.png')     # what a run leaves in --out
MET = 0.97                  # an evaluation meets the target if it reaches this share of it
OBSERVED = 64               # sequences on which the statistics are observed
FUSE_FROM = 2 ** 18         # tokens of sparse training from which compiling the masks pays, on a CPU


@dataclass
class TrainConfig:
    about = 'Trains a CWIC model: from scratch, dense and then sparse, or from a pretrained model.'
    data: str = option('python', 'folder in data/ with train.bin, val.bin and meta.json; or a mix of several,'
                       ' each with its share of the sequences: selfwritten:0.5,people:0.5')
    out: str = option('out', 'folder for the checkpoints, the log and the picture')
    init_from: str = option('', 'model to start from: smollm2, gpt2, a folder, a GGUF file or a checkpoint')
    lora_rank: int = option(0, 'with --init_from: freeze its matrices and learn a change of this rank for '
                            'each (LoRA); 0: train all weights. An adapter keeps its rank or gets a higher '
                            'one', at_least=0)
    resume: bool = option(False, 'continue the run in --out, with the options it was started with')
    seed: int = option(1, 'seed of the initial weights and of the order of the data', at_least=0)
    device: str = option('auto', 'auto, cpu, cuda or mps')
    dtype: str = option('auto', 'number format of matrix products: auto, float32 or bfloat16')
    # the model
    arch: str = option('gpt2', 'gpt2; or llama: RMSNorm, rotary positions, grouped queries, a gated MLP')
    n_layer: int = option(2, 'number of blocks')
    n_head: int = option(5, 'attention heads per block')
    n_kv_head: int = option(0, 'heads for keys and values; 0: as many as --n_head')
    n_embd: int = option(320, 'width of the model')
    n_hidden: int = option(0, 'width of the MLP; 0: 4 times --n_embd')
    block_size: int = option(256, "tokens in a training sequence, and in a new model's context", at_least=1)
    bias: bool = option(True, 'gpt2: biases in linear layers and norms')
    stripe_qkv: int = option(320, 'columns per stripe of the query-key-value matrix')
    stripe_out: int = option(320, 'columns per stripe of the attention output matrix')
    stripe_up: int = option(320, 'columns per stripe of the first MLP matrix (llama: of its gate)')
    stripe_down: int = option(320, 'columns per stripe of the second MLP matrix')
    stripe_head: int = option(1024, 'columns per stripe of the LM head')
    bases: bool = option(False, 'with --init_from: the head and the attention output read the principal '
                         'components of their inputs, and can skip more of them')
    shortlist: bool = option(False, 'the head uses every weight for the likeliest tokens, so that it can '
                             'skip more for all others')
    # compute
    target_reduction: float = option(3.0, 'dense / active weights per token; 1: a dense model', at_least=1)
    teacher: float = option(0.0, 'share of the KL to the frozen dense model in the sparse loss, the rest '
                            'being next-token loss; with --init_from, 1 unless given', at_least=0, at_most=1)
    reverse_kl: float = option(0.5, 'share of KL(student || teacher) in that KL, the rest being '
                               'KL(teacher || student)', at_least=0, at_most=1)
    # the schedule, in optimiser steps
    dense_steps: int = option(700, 'steps before sparsity; with --init_from, 0 unless given', at_least=0)
    ramp_steps: int = option(150, 'steps over which the target rises to --target_reduction', at_least=0)
    hold_steps: int = option(350, 'steps at the full target', at_least=0)
    max_steps: int = option(0, 'stop after this step; 0: at the end')
    warmup_steps: int = option(300, 'steps over which the learning rate rises from 0', at_least=1)
    lr: float = option(2e-3, 'peak learning rate: held while dense, then falling linearly', at_least=0)
    final_lr: float = option(0.1, 'learning rate at the end, as a share of --lr', at_least=0)
    threshold_lr: float = option(0.1, 'learning rate of the thresholds, as a share of --lr', at_least=0)
    weight_decay: float = option(0.1, 'weight decay of the matrices', at_least=0)
    beta2: float = option(0.99, "AdamW's second beta", at_least=0, at_most=0.99999)
    clip: float = option(1.0, "largest norm of the gradient, thresholds' left out; 0: no limit", at_least=0)
    batch_size: int = option(8, 'sequences per step, over all processes', at_least=1)
    micro_batch: int = option(8, 'sequences per forward pass, at most', at_least=1)
    compile: bool = option(False, 'torch.compile, and CUDA graphs: several times as fast on a GPU')
    # reports
    eval_every: int = option(150, 'steps between evaluations; each also saves last.safetensors', at_least=1)
    eval_windows: int = option(128, 'validation sequences per evaluation, always the same', at_least=1)
    log_every: float = option(5.0, 'seconds between lines of output', at_least=0)

    def steps(self):
        return self.dense_steps + self.ramp_steps + self.hold_steps

    def last_step(self):
        return min(self.max_steps, self.steps()) if self.max_steps > 0 else self.steps()

    def is_dense(self, step):
        return step < self.dense_steps or self.target_reduction == 1


@dataclass(eq=False)
class Run:
    """The state of a run between two steps. last.safetensors holds all of it."""
    config: TrainConfig
    model: GPT
    tokenizer: dict
    optimizer: torch.optim.Optimizer
    device: str
    dtype: torch.dtype                  # of matrix products
    active: torch.Tensor                # (matrices,) running mean of the active weights per token
    teacher: GPT = None
    base: dict = field(default_factory=dict)        # an adapter's 'base' and 'base_sha256'
    step: int = 0
    seconds: float = 0.0                # of training so far, evaluations included
    results: dict = field(default_factory=dict)     # of the last evaluation, see evaluate.measure()
    best: dict = field(default_factory=dict)        # the results in best.safetensors, and their step
    log: list = field(default_factory=list)         # rows of log.csv
    head_loss: object = None            # head_loss(), compiled or not
    gradients: object = None            # gradients(), or its CudaGraph
    optimizer_step: object = None       # optimizer_step(), or its CudaGraph

    def autocast(self):
        device = self.model.head.weight.device.type
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device, dtype=self.dtype)

    def uncompiled(self):
        """A context without torch.compile, for shapes that no step has."""
        return torch.compiler.set_stance('force_eager') if self.config.compile else nullcontext()

    def path(self, name):
        return os.path.join(self.config.out, name)


CARRIED = ('step', 'seconds', 'results', 'best', 'log')     # fields of a Run, as they are in last.safetensors

# -----------------------------------------------------------------------------
# data and schedules


def step_starts(mix, config, step):
    """
    Where the sequences of a step begin: np.int64 (batch_size, 2), the index of a data set in the mix and the
    index of a token in it. It depends on the seed and the step alone. A sequence may begin at any token, or,
    in data that is made of windows, at the first token of one.
    """
    rng = np.random.default_rng([config.seed, step])
    parts = np.zeros(config.batch_size, np.int64)
    if len(mix) > 1:
        # evenly spaced points in [0, 1), all shifted by one random number: each data set gets its share of
        # the batch, rounded up or down at random, and exact on average
        points = (np.arange(config.batch_size) + rng.random()) / config.batch_size
        parts = np.searchsorted(np.cumsum([part.share for part in mix[:-1]]), points, side='right')
    strides = np.array([part.meta.get('window', 1) for part in mix])
    counts = (np.array([len(part.train) for part in mix]) - config.block_size - 1) // strides + 1
    return np.stack([parts, strides[parts] * rng.integers(0, counts[parts])], 1)


def get_batch(mix, starts, block_size, device):
    """starts (B, 2), see step_starts() -> tokens and targets, one token later, (B, block_size) each."""
    tokens = np.stack([mix[part].train[start:start + block_size + 1] for part, start in starts])
    tokens = torch.from_numpy(tokens.astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def target_at(step, config):
    """The reduction to train for: 1 while dense, then rising linearly to its final value, then held."""
    progress = (step + 1 - config.dense_steps) / max(config.ramp_steps, 1)
    return 1 + (config.target_reduction - 1) * min(max(progress, 0.0), 1.0)


def lr_at(step, config):
    """Warm-up, constant while dense, then falling linearly: the sparse model must still be able to learn."""
    warm = min((step + 1) / config.warmup_steps, 1.0)
    left = 1 - max(step - config.dense_steps, 0) / max(config.steps() - config.dense_steps, 1)
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * left)


# -----------------------------------------------------------------------------
# one optimiser step


def head_loss(model, teacher, hidden, teacher_hidden, targets, dense, teacher_share, reverse_kl):
    """hidden (B, T, d), targets (B, T) -> mean loss (nats), the head's active weights per token (B, T)."""
    logits, active = model.head(hidden, dense)
    logits, loss = logits.flatten(0, 1), 0.0                            # (B * T, vocab)
    if teacher_share < 1:
        loss = (1 - teacher_share) * F.cross_entropy(logits.float(), targets.flatten())
    if teacher_share > 0:
        with torch.no_grad():
            teacher_logits = teacher.head(teacher_hidden, dense=True)[0].flatten(0, 1)
        loss = loss + teacher_share * cwic.kl_loss(logits, teacher_logits, reverse_kl)
    return loss, active


def gradients(run, tokens, targets, price, dense):
    """
    The forward and backward passes over this process's share of a step, tokens and targets (B, T): leaves the
    gradients in each .grad. price: what an active weight costs, a tensor. Returns this process's part of the
    step's mean loss (nats), and of its mean active weights per token (matrices,).

    The head's (B, T, vocab) logits are a step's largest tensors, so the head runs forward and backward a few
    rows at a time, on a copy of `hidden` cut off from the graph; the trunk then runs backward once.
    """
    config, model = run.config, run.model
    teacher_share = 0.0 if dense or run.teacher is None else config.teacher
    run.optimizer.zero_grad()
    loss, active, active_head = 0.0, 0.0, 0.0
    for inputs, labels in zip(tokens.split(config.micro_batch), targets.split(config.micro_batch)):
        with run.autocast():
            hidden, active_trunk = model.trunk(inputs, dense=dense)
            leaf = hidden.detach().requires_grad_()                     # (B, T, d)
            # pieces of equal size, as torch.compile would compile again for another one
            pieces = math.ceil(len(inputs) / rows_at_once(model, inputs.shape[1]))
            while len(inputs) % pieces:
                pieces += 1
            rows = len(inputs) // pieces
            teacher_hidden = [None] * pieces
            if teacher_share:
                with torch.no_grad():
                    teacher_hidden = run.teacher.trunk(inputs, dense=True)[0].split(rows)
            for piece in zip(leaf.split(rows), teacher_hidden, labels.split(rows)):
                piece_loss, piece_active = run.head_loss(model, run.teacher, *piece, dense, teacher_share,
                                                         config.reverse_kl)
                share = rows / config.batch_size                        # of the step's sequences
                (share * (piece_loss + price * piece_active.mean())).backward()
                loss = loss + share * piece_loss.detach()
                active_head = active_head + share * piece_active.detach().mean()
            active_trunk = len(inputs) / config.batch_size * active_trunk.mean((1, 2))      # (matrices - 1,)
            if dense:
                hidden.backward(leaf.grad)
            else:
                torch.autograd.backward([hidden, price * active_trunk.sum()], [leaf.grad, None])
            active = active + active_trunk.detach()
    return loss, torch.cat([active, active_head[None]])


def optimizer_step(run, rates, dense):
    """
    Clips the gradients, summed by now, and moves the parameters. rates: the learning rate of each parameter
    group, as numbers, or as a tensor in a CudaGraph. Returns the norm of the gradient without the thresholds,
    and that of the thresholds' gradient.
    """
    *others, thresholds = [group['params'] for group in run.optimizer.param_groups]
    norm = torch.nn.utils.clip_grad_norm_(sum(others, []), run.config.clip or math.inf)
    threshold_norm = torch.nn.utils.get_total_norm([p.grad for p in thresholds if not dense])
    learned = [layer for _, layer in run.model.sparse_layers() if layer.theta.requires_grad]
    before = [layer.theta.detach().clone() for layer in learned]
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        # AdamW must be capturable to be recorded, and warns if it is capturable without need
        group.update(lr=rate, capturable=norm.is_cuda and torch.cuda.is_current_stream_capturing())
    run.optimizer.step()
    if learned and not dense:
        cwic.limit_thresholds(learned, before)
    return norm, threshold_norm


def recorded(run):
    """gradients() and optimizer_step(): with --compile on a GPU as CUDA graphs, else as they are."""
    replay = run.config.compile and run.model.head.weight.is_cuda
    return [CudaGraph(function) if replay else function for function in (gradients, optimizer_step)]


def train_step(run, tokens, targets, target, dense=False, stop=False):
    """
    One optimiser step on this process's share of the batch, tokens and targets (B, T); target: the reduction
    to train for. Changes the model, the optimiser and run.active. Returns, over all processes, the loss
    (nats), the active weights per token (matrices,), and whether any process was asked to stop. Ends the
    program if the loss or its gradient is not finite.
    """
    model, rates = run.model, [float(group['lr']) for group in run.optimizer.param_groups]
    if isinstance(run.optimizer_step, CudaGraph):
        rates = torch.tensor(rates, device=run.device)
    # the slope of flop_loss: all micro-batches and processes pay the same price for an active weight
    price = 0.0 if dense else cwic.price(run.active.sum(), model.n_weights(), target)
    # two functions, as all_reduce() stands between them: each is recorded as a CUDA graph of its own
    loss, active = run.gradients(run, tokens, targets, run.active.new_tensor(price), dense)
    stop = torch.tensor(float(stop), device=run.device)
    all_reduce([p.grad for p in model.parameters() if p.grad is not None] + [loss, active, stop])
    norm, threshold_norm = run.optimizer_step(run, rates, dense)
    if not dense:
        # flop_loss is convex, so noise in one batch's count would bias the price: a running mean has less
        run.active.lerp_(active.to(run.active), 0.1)
    # the first line of a step that waits for the GPU
    if not math.isfinite(loss + norm + threshold_norm):
        fail(f'step {run.step + 1}: the loss is {float(loss)}, the norm of its gradient {float(norm)}; '
             'stopped. Earlier checkpoints are intact. Try a lower --lr', 1)
    return float(loss), active, bool(stop)


# -----------------------------------------------------------------------------
# the first sparse step


def observed(model):
    """Whether every layer has statistics."""
    return all(float(layer.sigma.max()) > 0 for _, layer in model.sparse_layers())


def observe(run, mix):
    """
    Finds the bases, if the model is to have some, and the statistics of all layers that have none yet; then
    every process gets the model of the first one. Ends the program if a layer's inputs never change.
    """
    config = replace(run.config, batch_size=OBSERVED)
    starts = step_starts(mix, config, 2 ** 31)                          # of a step that never comes
    tokens, _ = get_batch(mix, starts, config.block_size, run.device)
    with run.autocast(), run.uncompiled():
        if run.config.bases:
            # an adapter is observed as it runs, sparse; a dense model has no statistics yet
            sparse = any(layer.sigma.any() for _, layer in run.model.sparse_layers())
            refinements.find_bases(run.model, tokens, dense=not sparse)
            run.optimizer.state.clear()     # Adam's moments belong to the old basis
        run.model.observe(tokens)
    # all read the same tokens, but on another kind of GPU a component may come out with the other sign
    for tensor in run.model.state_dict().values():
        collective(dist.broadcast, tensor, 0)
    if not observed(run.model):
        fail('the inputs of a layer never change, so its thresholds could not learn: is a layer all 0?', 1)


def fuse_masks(run):
    """Compiles the model's masks, and nothing else, if that pays. Returns whether it does."""
    config = run.config
    tokens = (config.steps() - config.dense_steps) * config.batch_size * config.block_size
    pays = run.device == 'cpu' and not config.compile and tokens >= FUSE_FROM
    if pays:
        refinements.fuse_masks(run.model)
    return pays


def frozen_teacher(run):
    """The dense model that the student starts from: a copy of the student, without its LoRA."""
    teacher = copy.deepcopy(run.model).eval().requires_grad_(False)
    for layer, adapter, _ in cwic.adapters(teacher):
        setattr(layer, adapter, torch.nn.Identity())
    for block in teacher.blocks if run.config.compile else ():
        block.compile()
    return teacher


# -----------------------------------------------------------------------------
# the beginning of a run


def restore(run, saved):
    """Sets all of a run but its model from last.safetensors. Raises CheckpointError if it holds no run."""
    config = run.config
    with reading(run.path(LAST), 'a run to resume'):
        for name in CARRIED:
            setattr(run, name, saved[name])
        run.active = run.active.new_tensor(saved['active'])
        load_optimizer(run.model, run.optimizer, saved['optimizer'])
        if run.step > config.dense_steps and not config.is_dense(run.step):
            fuse_masks(run)
            run.teacher = frozen_teacher(run) if config.teacher else None
            if config.teacher and not run.base:         # an adapter's teacher is its base
                run.teacher.load_state_dict(saved['teacher'])


def begin(config, given, device):
    """
    -> a Run, which is new, starts from a pretrained model, or is resumed; and its data, a list of
    common.Part. Raises CheckpointError and common.DataError, and ends the program if options do not fit.
    """
    torch.manual_seed(config.seed)
    model, saved = None, {}
    if config.resume:
        model, saved, config = resumed_model(config, given)
    elif config.init_from:
        model, saved, config = pretrained_model(config, given)
    mix = common.load_mix(config.data, config.block_size)
    meta = mix[0].meta
    if model is None:
        names = asdict(config).keys() & CWICConfig.__dataclass_fields__.keys()
        sizes = {name: getattr(config, name) for name in names}
        model = new_model({**sizes, 'vocab_size': meta['vocab_size']})
    tokenizer = saved.get('tokenizer', meta['tokenizer'])
    if tokenizer != meta['tokenizer']:
        theirs, ours = map(common.tokenizer_name, (meta['tokenizer'], tokenizer))
        fail(f'data/{mix[0].name} was made with the tokenizer {theirs}, but the model has {ours} (or another '
             'of that name); choose other --data, or prepare some: python data/text/prepare.py '
             f'--tokenizer {ours} FILE... and then --data text')
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(config.lr, config.lr, config.weight_decay),
                                  betas=(0.9, config.beta2), fused=device != 'mps')
    exact = torch.float32 if device == 'mps' else torch.float64
    active = torch.tensor([layer.n_weights for _, layer in model.sparse_layers()], dtype=exact, device=device)
    base = {name: saved[name] for name in ('base', 'base_sha256') if name in saved}
    run = Run(config, model, tokenizer, optimizer, device, torch.float32, active, base=base,
              head_loss=head_loss, gradients=gradients, optimizer_step=optimizer_step)
    if config.compile:
        check_compile(device)
        run.head_loss = torch.compile(head_loss)
        for block in model.blocks:
            block.compile()
    if config.resume:
        restore(run, saved)
    elif 'active_share' in saved:
        run.active *= torch.tensor(saved['active_share']).to(active)    # an adapter is sparse already
    return run, mix


# -----------------------------------------------------------------------------
# files


def save(run, name):
    """Writes best.safetensors, for use, or last.safetensors, with all that --resume needs."""
    config = run.config
    saved = dict(run.results, tokenizer=run.tokenizer, options=asdict(config), step=run.step)
    if run.base:
        saved.update(run.base, base=weights.base_for(run.path(name), run.base['base']))
    if name == LAST:
        saved.update({name: getattr(run, name) for name in CARRIED}, active=run.active.tolist(),
                     optimizer=run.optimizer, teacher=None if run.base else run.teacher)
    save_checkpoint(run.path(name), run.model, narrow=name == BEST, **saved)


def save_last(run):
    """Writes last.safetensors, and log.csv with the rows so far."""
    save(run, LAST)
    lines = [','.join('' if x is None else str(x) for x in row) for row in [COLUMNS, *run.log]]
    write_atomically(run.path('log.csv'), lambda file: file.write('\n'.join([*lines, '']).encode('ascii')))


def save_best(run):
    """
    Writes best.safetensors after the best evaluation that met the target; until one has met it, after each
    one from the end of the ramp on, so that a run that is lost leaves something.
    """
    config, results = run.config, run.results
    score, goal = 'kl' if 'kl' in results else 'val_loss', MET * config.target_reduction
    had_met, met = run.best.get('reduction', 0.0) >= goal, results['reduction'] >= goal
    better = met and results[score] < run.best.get(score, math.inf)
    if run.step >= config.dense_steps + config.ramp_steps and (better or not had_met):
        run.best = {**results, 'step': run.step}
        save(run, BEST)


# -----------------------------------------------------------------------------
# what a run prints


def clock(seconds):
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def announce(run, mix, world_size, why):
    """Prints what will be trained, on what data and on what device. why: the reason for the dtype."""
    config = run.config
    total = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = [f'model   {total:,} parameters' + (f', {trained:,} of them trained' if trained < total else '')
             + f'; {run.model.n_weights():,} dense weights per token'
             + (f'; from {config.init_from}' if config.init_from else '')]
    for part in mix:
        share = f'{100 * part.share:.3g}% from ' if len(mix) > 1 else ''
        lines.append(f'data    {share}data/{part.name}: {len(part.train):,} tokens to train on, '
                     f'{len(part.val):,} to validate; vocabulary of {part.meta["vocab_size"]:,}')
    tokens = config.batch_size * config.block_size
    count = torch.get_num_threads()
    threads = f', {count} thread{"s" * (count > 1)}' if run.device == 'cpu' else ''
    processes = f', {world_size} processes' if world_size > 1 else ''
    lines += [f'plan    {config.dense_steps} steps dense, {config.ramp_steps} towards '
              f'{config.target_reduction:g}x less compute, {config.hold_steps} there; {tokens:,} tokens '
              f'each, {tokens * config.steps():,} in all',
              f'device  {run.device}{threads}{processes}; {config.dtype} ({why})']
    if config.compile:
        lines.append('compile takes a minute or so in the first step of each phase')
    if config.resume:
        lines.append(f'resumed at step {run.step} of {config.steps()}')
    print('\n'.join(lines), flush=True)


def finish(run, mix):
    """The closing lines and the picture, of the best checkpoint; exit code 1 if that missed the target."""
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
    plots.training(run.log, best, run.model.config.matrices, run.path('training.png'))
    if reduction < MET * config.target_reduction:
        fail(f'target not met: {reduction:.2f}x instead of {config.target_reduction:g}x; give it more '
             '--hold_steps, or a higher --threshold_lr', 1)


# -----------------------------------------------------------------------------
# the loop


def stop_signals():
    """
    Returns a list to which Ctrl-C, SIGTERM and a terminal that closes add from now on. After the first of
    them, Ctrl-C ends the program at once.
    """
    received = []

    def receive(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, receive)
    signal.signal(signal.SIGTERM, receive)
    # Windows has no such signal; nohup ignores it
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, receive)
    return received


def train(run, mix, rank, world_size):
    """
    The training loop. Returns whether a signal stopped it. Ends the program if a loss is not finite or a
    layer cannot learn.
    """
    config, model = run.config, run.model
    val_tokens = mix_windows(mix, 'val', config.eval_windows, config.block_size)
    replies = in_replies(val_tokens, run.tokenizer)
    run.gradients, run.optimizer_step = recorded(run)
    signals, stop = stop_signals(), False
    printed_at, printed_step = time.perf_counter(), run.step
    while run.step < config.last_step() and not stop:
        started, dense = time.perf_counter(), config.is_dense(run.step)
        target, lr = target_at(run.step, config), lr_at(run.step, config)
        for group, share in zip(run.optimizer.param_groups, (1, 1, config.threshold_lr), strict=True):
            group['lr'] = share * lr
        if run.step == config.dense_steps and not dense:
            if fuse_masks(run) and rank == 0:
                print('sparse from here on; compiling the masks first takes some seconds', flush=True)
            if not observed(model):             # most adapters have their statistics already
                observe(run, mix)
            run.teacher = frozen_teacher(run) if config.teacher else None
        starts = np.array_split(step_starts(mix, config, run.step), world_size)[rank]
        tokens, targets = get_batch(mix, starts, config.block_size, run.device)
        loss, active, stop = train_step(run, tokens, targets, target, dense, stop=bool(signals))
        run.step += 1
        if rank > 0:
            continue            # the first process evaluates, logs and saves; the others wait at the next sum

        evaluated = run.step % config.eval_every == 0 or run.step == config.steps()
        if evaluated:
            with run.uncompiled():
                run.results = measure(model, val_tokens, run.teacher, dense, replies)
            if not math.isfinite(run.results['val_loss']):
                fail(f'step {run.step}: the validation loss is {run.results["val_loss"]}; stopped. Earlier '
                     'checkpoints are intact. Try a lower --lr', 1)
        now = time.perf_counter()
        run.seconds += now - started
        reduction = model.n_weights() / max(float(active.sum()), 1.0)
        if evaluated or run.step % 10 == 0:
            val_loss = run.results['val_loss'] if evaluated else None
            run.log.append([run.step, round(run.seconds, 2), loss, val_loss, reduction, target, lr])
        if evaluated:
            save_best(run)
        if evaluated or stop or run.step == config.last_step():
            save_last(run)
        if evaluated or now - printed_at >= config.log_every:
            tokens_read = (run.step - printed_step) * config.batch_size * config.block_size
            left = run.seconds / run.step * (config.last_step() - run.step)
            with suppress(OSError):             # a run goes on if nobody reads what it prints
                print(f'step {run.step:5d}/{config.steps()}  loss {loss:.4f}  '
                      + (f'val {run.results["val_loss"]:.4f}  ' if evaluated else ' ' * 12)
                      + (f'kl {run.results["kl"]:.4f}  ' if evaluated and 'kl' in run.results else '')
                      + f'reduction {reduction:.2f}x (target {target:.2f}x)  '
                      + f'{tokens_read / (now - printed_at):7,.0f} tok/s  {clock(left)} left', flush=True)
            printed_at, printed_step = now, run.step
    return stop


def main():
    config, given = parse_options(TrainConfig, 'python train.py', presets=True)
    if not config.steps():
        fail('--dense_steps, --ramp_steps and --hold_steps must not all be 0')
    if (config.lora_rank or config.bases) and not config.init_from and not config.resume:
        fail('--lora_rank and --bases change a pretrained model: say which with --init_from')
    if not config.resume and any(os.path.exists(os.path.join(config.out, name)) for name in FILES):
        fail(f'--out {config.out} holds a run already: continue it (--resume), choose another, or delete it')
    tune_malloc()
    device, rank, world_size = join_processes(choose_device(config.device))
    if rank > 0:
        barrier()           # the first process downloads and prepares what is missing
    run, mix = begin(config, given, device)
    if rank == 0:
        barrier()
    config = run.config
    os.makedirs(config.out, exist_ok=True)      # a run that cannot begin leaves no empty folder
    if config.batch_size < world_size:
        fail(f'--batch_size {config.batch_size} is too small to be shared by {world_size} processes')
    choice = [choose_dtype(config.dtype, torch.device(device).type)]
    collective(dist.broadcast_object_list, choice)      # each process measures, the first one decides
    run.dtype, why = choice[0]
    config.dtype = str(run.dtype).removeprefix('torch.')            # a resumed run does not measure again
    if rank == 0:
        announce(run, mix, world_size, why)
    stopped = train(run, mix, rank, world_size)
    if rank == 0 and run.step == config.steps():
        finish(run, mix)
    elif rank == 0:
        print(f'\nstopped at step {run.step}, which is saved; continue with: '
              f'python train.py --resume --out {config.out}', flush=True)
    sys.exit(130 if stopped else 0)


def program():
    """main(), with one line for each error that a user can cause."""
    try:
        common.run(main, memory='a smaller --micro_batch takes less')
    except CheckpointError as error:
        fail(error, 1)


if __name__ == '__main__':
    try:
        program()
    except SystemExit as end:
        exit_process(end.code)
    exit_process(0)
