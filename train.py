"""
Trains a CWIC model: first dense, then ever sparser, then sparse for good; or makes a pretrained dense model sparse.

    python train.py                                     # the default: a small model of Python code, on any laptop
    python train.py --target_reduction 1                # the same run without sparsity, to compare with
    python train.py config/NAME.toml --lr 5e-4          # a preset, with one option changed
    python train.py --resume                            # goes on from out/last.pt as if it had never stopped
    python train.py --init_from gpt2 --max_steps 0      # no training: out/best.pt is GPT-2 as released, for chat.py
    torchrun --nproc_per_node 2 train.py                # several processes share each step's batch

With --init_from, sparsity begins at once, at the exact dense model, and the loss is the two-way KL to that model, unless
--dense_steps and --teacher say otherwise. With --rank, its matrices stay frozen: what is learned is thresholds and a
low-rank change of each matrix, and checkpoints hold only that.

Leaves in --out: best.pt (the best evaluation that met the compute target, for use), last.pt (all it takes to resume),
log.csv and training.png.

A batch depends on the seed and the step alone, so there is no data position and no random state to carry: a resumed run
draws what the uninterrupted one would have drawn, on any number of processes. Each process takes its share of the
sequences of every step; gradients, statistics and counts are summed in one place, sum_over_processes(). All evaluate,
the first one logs and saves. Several hosts need --out on a shared file system.

Not here: an experiment tracker, dropout, sharding of weights or of the optimiser.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C in the seconds that torch takes to import just ends

import csv
import io
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import cwic
import plots
import weights
from cwic import GPT, CheckpointError, CWICConfig
from data.common import DataError, load_dataset
from device import check_compile, choose_device, choose_dtype, keep_memory
from options import fail, option, parse_options

COLUMNS = ['step', 'seconds', 'loss', 'val_loss', 'reduction', 'target', 'lr']      # of log.csv
RESULTS = ('val_loss', 'reduction', 'active_share', 'spread', 'surprise_correlation', 'entropy_correlation', 'compute_percentiles',
           'kl', 'agreement')                           # of an evaluation: see evaluate()
MET = 0.97                  # an evaluation has met the target from this share of it on
WARM_BATCHES, CENTRING_BATCHES = 20, 4      # that the statistics see before sparsity begins; the first only find the centres
# no more logits than this, or one sequence's, exist at a time: what a CPU's cache likes, what keeps a GPU busy
LOGITS_AT_ONCE = {'cpu': 2 ** 22, 'cuda': 2 ** 28, 'mps': 2 ** 26}


@dataclass
class TrainConfig:
    """Trains a CWIC model: from scratch, dense first and then sparse; or from a pretrained dense model, by distillation."""
    data: str = option('python', 'folder in data/ that holds train.bin, val.bin and meta.json')
    out: str = option('out', 'where checkpoints, the log and the picture go')
    overwrite: bool = option(False, 'start anew in an --out that holds another run, which is deleted')
    init_from: str = option('', 'model to start from: smollm2, gpt2, ..., a folder or GGUF file with such weights, or a .pt of ours')
    rank: int = option(0, 'with --init_from: freeze its matrices and learn a change of this rank of each; 0: train all weights')
    resume: bool = option(False, 'go on from last.pt in --out, with the options it was started with')
    seed: int = option(1, 'of the initial weights and of the order of the data')
    device: str = option('auto', 'auto, cpu, cuda or mps')
    dtype: str = option('auto', 'of matrix products: auto, float32 or bfloat16')
    # the model
    arch: str = option('gpt2', 'gpt2, or llama: RMSNorm, rotary positions, grouped queries, a gated MLP')
    n_layer: int = option(2, 'blocks')
    n_head: int = option(5, 'attention heads')
    n_kv_head: int = option(0, 'llama: heads of keys and values; 0: as many as --n_head')
    n_embd: int = option(320, 'width')
    n_hidden: int = option(0, 'width of the MLP; 0: 4 times --n_embd')
    block_size: int = option(256, 'length of the training windows, and context of a new model, in tokens')
    bias: bool = option(True, 'gpt2: biases in linear layers and norms')
    stripe_qkv: int = option(320, 'columns in a stripe of the query-key-value matrix')
    stripe_out: int = option(320, '... of the attention output matrix')
    stripe_up: int = option(320, '... of the first MLP matrix (llama: of its gate)')
    stripe_down: int = option(320, '... of the second MLP matrix')
    stripe_head: int = option(1024, '... of the LM head')
    # compute
    target_reduction: float = option(3.0, 'dense weights / active weights per token to train for; 1 trains a dense model')
    teacher: float = option(-1.0, 'share of the sparse loss that is KL to the frozen dense model, not next-token loss; -1: 1 with --init_from, else 0')
    # the schedule, in optimiser steps
    dense_steps: int = option(700, 'steps before sparsity begins; with --init_from none, unless asked for')
    ramp_steps: int = option(150, 'steps in which the target rises from 1 to --target_reduction')
    hold_steps: int = option(350, 'steps at the full target')
    max_steps: int = option(-1, 'stop after this step; -1: when the schedule ends, 0: save what --init_from read')
    warmup_steps: int = option(300, 'steps in which the learning rate rises from 0')
    lr: float = option(2e-3, 'peak learning rate, held while dense, then falling along a line')
    final_lr: float = option(0.1, 'the last learning rate, as a share of --lr')
    threshold_lr: float = option(0.1, 'learning rate of the thresholds, as a share of that of the others')
    weight_decay: float = option(0.1, 'of matrices')
    beta2: float = option(0.99, 'AdamW\'s second beta')
    clip: float = option(1.0, 'largest norm of the gradient of everything but the thresholds')
    batch_size: int = option(8, 'sequences in an optimiser step, over all processes')
    micro_batch: int = option(8, 'sequences in one forward pass')
    recompute: bool = option(False, 'compute activations again in backward rather than keep them: slower, smaller')
    compile: bool = option(False, 'fuse what torch.compile can: twice as fast on a GPU, after a minute of compiling')
    # what is reported
    eval_every: int = option(150, 'steps between evaluations, each of which also saves last.pt')
    eval_windows: int = option(128, 'windows of validation text in an evaluation, always the same')
    log_every: float = option(5.0, 'seconds between lines of output')

    def check(self):
        """Ends the program with one line where a value cannot work."""
        for names, lowest in ((('block_size', 'batch_size', 'micro_batch', 'warmup_steps', 'eval_every', 'eval_windows', 'target_reduction'), 1),
                              (('rank', 'seed', 'dense_steps', 'ramp_steps', 'hold_steps', 'lr', 'final_lr', 'threshold_lr', 'weight_decay',
                                'clip', 'log_every'), 0)):
            for name in names:
                if getattr(self, name) < lowest:
                    fail(f'--{name} must be at least {lowest}, not {getattr(self, name)}')
        if self.teacher != -1 and not 0 <= self.teacher <= 1 or not 0 <= self.beta2 < 1:
            fail('--teacher must be from 0 to 1, and --beta2 from 0 to just below 1')
        if self.steps() < 1:
            fail('--dense_steps, --ramp_steps and --hold_steps must not all be 0')
        if self.rank and not (self.init_from or self.resume):
            fail('--rank changes a pretrained model: say which with --init_from')

    def steps(self):
        return self.dense_steps + self.ramp_steps + self.hold_steps

    def last_step(self):
        return self.steps() if self.max_steps < 0 else min(self.max_steps, self.steps())

    def is_dense(self, step):
        return step < self.dense_steps or self.target_reduction == 1


# options that a resumed run may change: they change what it costs, not what it computes
FREE_TO_CHANGE = ('out', 'resume', 'max_steps', 'device', 'dtype', 'micro_batch', 'recompute', 'compile', 'log_every')


@dataclass
class Run:
    """What a run carries from one step to the next. last.pt holds all of it."""
    config: TrainConfig
    model: GPT
    tokenizer: dict
    optimizer: torch.optim.Optimizer
    device: str
    dtype: torch.dtype                  # of matrix products
    active: torch.Tensor                # (matrices,) running mean of the weights that each matrix uses per token
    teacher: GPT = None
    step: int = 0
    seconds: float = 0.0                # of training so far, evaluations and saving included
    best: float = math.inf              # loss of best.pt
    results: dict = field(default_factory=dict)     # of the last evaluation
    log: list = field(default_factory=list)         # rows of log.csv
    head_loss: object = None            # head_loss(), or what torch.compile made of it

    def autocast(self):
        return torch.autocast(self.model.head.weight.device.type, dtype=self.dtype) if self.dtype != torch.float32 else nullcontext()

    def path(self, name):
        return os.path.join(self.config.out, name)


# -----------------------------------------------------------------------------
# data


def windows(data, starts, block_size, device):
    """Inputs and targets (len(starts), block_size); targets are the inputs one token later."""
    tokens = np.stack([data[start:start + block_size + 1] for start in starts]).astype(np.int64)
    tokens = torch.from_numpy(tokens).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def places(data, block_size, meta):
    """How many windows can begin in the data, and the step from one to the next: any token, or where data is made of windows."""
    stride = meta.get('window', 1)
    return (len(data) - block_size - 1) // stride + 1, stride


def step_starts(data, meta, config, step):
    """Where the sequences of one optimiser step begin, those of all processes: a function of the seed and the step alone."""
    count, stride = places(data, config.block_size, meta)
    return stride * np.random.default_rng([config.seed, step]).integers(0, count, size=config.batch_size)


# -----------------------------------------------------------------------------
# schedules


def target_at(step, config):
    """The reduction to train for: 1 while dense, then along a line to its end value, then held."""
    progress = (step + 1 - config.dense_steps) / max(config.ramp_steps, 1)
    return 1 + (config.target_reduction - 1) * min(max(progress, 0.0), 1.0)


def lr_at(step, config):
    """Warm-up, then level while dense, then down along a line: the model learns to be sparse while it can still learn."""
    warm = min((step + 1) / config.warmup_steps, 1.0)
    left = 1 - max(step - config.dense_steps, 0) / max(config.steps() - config.dense_steps, 1)
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * left)


# -----------------------------------------------------------------------------
# one optimiser step


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number."""


def head_loss(model, teacher, hidden, teacher_hidden, targets, dense, teacher_share):
    """
    The head and the loss of what it predicts. hidden (B, T, d), targets (B, T) -> the loss, a mean over tokens, in nats;
    and what the head used.
    """
    logits, used = model.head(hidden, dense)
    logits, loss = logits.flatten(0, 1), 0.0                            # (B * T, vocab)
    if teacher_share < 1:
        loss = (1 - teacher_share) * cwic.next_token_loss(logits, targets.flatten())
    if teacher_share > 0:
        with torch.no_grad():
            teacher_logits = teacher.head(teacher_hidden, dense=True)[0].flatten(0, 1)
        loss = loss + teacher_share * cwic.two_way_kl(logits, teacher_logits)
    return loss, used


def backward(run, tokens, targets, dense, price):
    """
    Adds the gradients of one micro-batch, which holds `share` of the step's tokens, to those of the step. Only a few
    sequences' logits exist at a time: backward reaches their hidden states before the next come, and the trunk when all
    are there. Returns the loss (nats) and each matrix's active weights (matrices,), both as their part of the step's mean,
    and the sums of observe() for each matrix.
    """
    config, model = run.config, run.model
    share = len(tokens) / config.batch_size
    teacher_share = 0.0 if dense or run.teacher is None else config.teacher
    hidden, used = model.trunk(tokens, dense=dense, recompute=config.recompute)
    leaf = hidden.detach().requires_grad_()                             # (B, T, d)
    sequences = max(1, LOGITS_AT_ONCE[tokens.device.type] // (tokens.shape[1] * model.config.vocab_size))
    pieces = math.ceil(len(tokens) / sequences)     # of one size where they can be: for another, torch.compile compiles again
    teacher_hidden = [None] * pieces
    if teacher_share:
        with torch.no_grad():
            teacher_hidden = run.teacher.trunk(tokens, dense=True)[0].tensor_split(pieces)
    total_loss, active_head, sums_head = 0.0, 0.0, None
    for hidden_piece, teacher_piece, targets_piece in zip(leaf.tensor_split(pieces), teacher_hidden, targets.tensor_split(pieces)):
        piece_share = share * len(hidden_piece) / len(tokens)
        loss, (active, sums) = run.head_loss(model, run.teacher, hidden_piece, teacher_piece, targets_piece, dense, teacher_share)
        (piece_share * (loss + price * active.mean())).backward()
        total_loss = total_loss + piece_share * loss.detach()
        active_head = active_head + piece_share * active.detach().mean()
        sums_head = sums if sums_head is None else sums_head + sums
    active = share * torch.stack([active.mean() for active, _ in used])                     # (matrices - 1,)
    if dense:
        hidden.backward(leaf.grad)
    else:
        torch.autograd.backward([hidden, price * active.sum()], [leaf.grad, None])
    return total_loss, torch.cat([active.detach(), active_head[None]]), [sums for _, sums in used] + [sums_head]


def sum_over_processes(tensors):
    """Sums tensors over all processes, in place, as one message for each dtype."""
    if dist.is_initialized():
        for dtype in {t.dtype for t in tensors}:
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            for t, total in zip(same, flat.split([t.numel() for t in same])):
                t.copy_(total.view_as(t))


def train_step(run, tokens, targets, target, dense=False, stop=False):
    """
    One optimiser step on this process's share of the batch, tokens and targets (B, T); target: the reduction to train for.
    Changes the model, the optimiser and run.active. Returns the step's loss in nats, the active weights of each matrix
    (matrices,), both over all processes, and whether any process wants to stop. Raises Diverged before anything is changed.
    """
    config, model = run.config, run.model
    run.optimizer.zero_grad()
    # the loss of compute, flop_loss(run.active), has one slope for all: what each active weight costs
    price = 0.0 if dense else cwic.price(run.active.sum(), model.dense(), target)
    loss, active, sums = 0.0, 0.0, None
    for tokens_micro, targets_micro in zip(tokens.split(config.micro_batch), targets.split(config.micro_batch)):
        with run.autocast():
            loss_micro, active_micro, sums_micro = backward(run, tokens_micro, targets_micro, dense, price)
        loss, active = loss + loss_micro, active + active_micro
        sums = sums_micro if sums is None or dense else [a + b for a, b in zip(sums, sums_micro)]
    stop = torch.tensor(float(stop), device=run.device)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sum_over_processes(gradients + [loss, active, stop] + ([] if dense else sums))
    *weight_groups, _ = run.optimizer.param_groups
    norm = torch.nn.utils.clip_grad_norm_([p for group in weight_groups for p in group['params']], config.clip)
    if not math.isfinite(float(loss)) or not math.isfinite(float(norm)):
        raise Diverged(f'the loss is {float(loss)}, the norm of its gradient {float(norm)}')
    before = [layer.theta.detach().clone() for _, layer in model.gated()]
    run.optimizer.step()
    if not dense:
        for (_, layer), theta, layer_sums in zip(model.gated(), before, sums, strict=True):
            layer.limit_thresholds(theta)
            layer.update_statistics(layer_sums)
        # one batch's count is noise, and flop_loss, bent as it is, would mistake noise for missing reduction
        run.active.lerp_(active.to(run.active), 0.1)
    return float(loss), active, bool(stop)


@torch.no_grad()
def warm_statistics(run, batches):
    """Before sparsity begins the statistics must stand: thresholds are measured in sigmas. batches: of tokens (B, T)."""
    model = run.model
    for i, tokens in enumerate(batches):
        totals = None
        for tokens_micro in tokens.split(run.config.micro_batch):
            with run.autocast():
                hidden, used = model.trunk(tokens_micro)
            sums = [s for _, s in used] + [cwic.observe(hidden, model.head.mu, model.head.sigma)]
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums)]
        sum_over_processes(totals)
        for (_, layer), layer_sums in zip(model.gated(), totals, strict=True):
            if i < CENTRING_BATCHES:
                layer.seen.zero_()      # a spread measured around a centre that is still wrong is too large: forget it
            layer.update_statistics(layer_sums)
    if any(float(layer.sigma.max()) == 0 for _, layer in model.gated()):
        fail('the statistics of a layer stayed at 0, so its thresholds could not learn: is a layer of the model all zeros?', 1)


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(run, data, meta, dense):
    """
    Validation on --eval_windows fixed windows, in eval mode and f32. Returns a dict: val_loss (nats per token), reduction,
    active_share (of each matrix's weights, in the order of gated()), spread (the standard deviation of the compute of a
    token, over its mean), compute_percentiles (of a token's share of dense compute), and the correlation of a token's
    compute with the surprise of that token (-log p, given before it was read) and with the entropy of what is predicted
    from it. With a teacher also kl, KL(teacher || student) in nats, and agreement, how often both find the same token likeliest.
    """
    config, model = run.config, run.model
    model.eval()
    count, stride = places(data, config.block_size, meta)
    starts = stride * np.linspace(0, count - 1, config.eval_windows).astype(np.int64)
    sequences = max(1, min(config.micro_batch, LOGITS_AT_ONCE[torch.device(run.device).type] // (config.block_size * model.config.vocab_size)))
    totals, shares, entropies, surprises = {'val_loss': 0.0, 'active': 0.0, 'kl': 0.0, 'agreement': 0.0}, [], [], []
    for batch in np.array_split(starts, math.ceil(len(starts) / sequences)):
        tokens, targets = windows(data, batch, config.block_size, run.device)
        logits, active = model(tokens, dense=dense)                                         # (B, T, vocab), (matrices, B, T)
        logp, active = logits.log_softmax(-1), active.cpu().double()                        # not every GPU has doubles
        surprise = -logp.gather(-1, targets[:, :, None])[:, :, 0]                           # (B, T), of the token that follows
        sums = {'val_loss': surprise.sum(), 'active': active.sum((1, 2))}
        if run.teacher is not None:
            teacher_logp = run.teacher(tokens, dense=True)[0].log_softmax(-1)
            sums['kl'] = (teacher_logp.exp() * (teacher_logp - logp)).sum()
            sums['agreement'] = (teacher_logp.argmax(-1) == logp.argmax(-1)).sum()
        totals = {name: total + sums.get(name, torch.zeros(())).cpu().double() for name, total in totals.items()}
        shares.append((active.sum(0) / model.dense())[:, 1:])                               # the first token surprises nobody
        entropies.append(-(logp.exp() * logp).sum(-1)[:, 1:].cpu().double())
        surprises.append(surprise[:, :-1].cpu().double())
    model.train()
    tokens = len(starts) * config.block_size
    shares, entropies, surprises = (torch.cat(x).flatten() for x in (shares, entropies, surprises))
    spread = float(shares.std() / shares.mean())
    with_surprise, with_entropy = torch.corrcoef(torch.stack([shares, surprises, entropies]))[0, 1:].tolist() if spread > 1e-9 else (0.0, 0.0)
    active = totals['active'] / tokens
    results = dict(val_loss=float(totals['val_loss'] / tokens), reduction=float(model.dense() / active.sum()), spread=spread,
                   active_share=[float(a) / layer.dense for a, (_, layer) in zip(active, model.gated())],
                   surprise_correlation=with_surprise, entropy_correlation=with_entropy,
                   compute_percentiles={str(p): float(np.percentile(shares, p)) for p in (1, 5, 25, 50, 75, 95, 99)})
    if run.teacher is not None:
        results.update(kl=float(totals['kl'] / tokens), agreement=float(totals['agreement'] / tokens))
    return results


# -----------------------------------------------------------------------------
# beginning, saving and ending a run


def resumed_options(config, given):
    """The saved run and its options, but for those given now that it may change; those it may not are refused."""
    try:
        model, saved = weights.load(os.path.join(config.out, 'last.pt'), merge=False)
        options = saved['options']
        old = TrainConfig(**{f.name: options[f.name] for f in fields(TrainConfig) if f.name in options})
        for name in ('optimizer', 'step', 'seconds', 'log', 'best', 'active', 'tokenizer'):
            saved[name]
    except (CheckpointError, weights.WeightsError) as error:
        fail(f'cannot resume: {error}', 1)
    except (KeyError, TypeError) as error:
        fail(f'cannot resume: {config.out}/last.pt does not hold a run ({error} is missing); it may be a best.pt', 1)
    for name in given:
        if name not in FREE_TO_CHANGE and getattr(config, name) != getattr(old, name):
            fail(f'--{name} {getattr(config, name)}: the run was started with {getattr(old, name)}; leave the option out, '
                 'or start afresh in another --out')
    free = {name: getattr(config, name) for name in FREE_TO_CHANGE if name in given}
    return model, saved, replace(old, **{**free, 'out': config.out, 'resume': True, 'max_steps': config.max_steps})


def starting_model(config, given):
    """--init_from -> (model, its tokenizer's spec, the options with its sizes and with what distillation implies)."""
    source = config.init_from
    try:
        model, saved = weights.load(source, merge=False)
    except (CheckpointError, weights.WeightsError) as error:
        fail(f'--init_from {source}: {error}', 1)
    except KeyboardInterrupt:
        fail('interrupted; the same command goes on with what has arrived', 130)
    if 'base' in saved:         # an adapter: goes on where it stands, towards its base
        config = replace(config, rank=saved['rank'], init_from=saved['base'])
    elif any(float(layer.theta.detach().max()) > 0 for _, layer in model.gated()):
        fail(f'--init_from {source}: is sparse already; start from a dense model, such as one trained with --target_reduction 1')
    sizes = asdict(model.config)
    for name in given & sizes.keys():
        asked = getattr(config, name)
        if name == 'block_size' and asked <= sizes[name]:       # of the training windows; the model's context stays
            continue
        if asked != sizes[name] and not name.startswith('stripe_'):
            fail(f'--{name} {asked}: {source} has {sizes[name]}; leave the option out')
        sizes[name] = asked
    block_size = config.block_size if 'block_size' in given else sizes['block_size']
    if sizes != asdict(model.config):       # other stripes: all but the thresholds, which are 0, stays as it is
        dense, model = model, GPT(CWICConfig(**sizes))
        model.load_state_dict({name: x for name, x in dense.state_dict().items() if not name.endswith('theta')}, strict=False)
    if config.rank and 'base' not in saved:
        cwic.add_adapters(model, config.rank)
    known = {name: value for name, value in sizes.items() if name in TrainConfig.__dataclass_fields__}
    return model, saved['tokenizer'], replace(config, **{
        **known, 'block_size': block_size, 'dense_steps': config.dense_steps if 'dense_steps' in given else 0,
        'teacher': config.teacher if config.teacher >= 0 else 1.0})


def new_model(config, vocab_size):
    try:
        return GPT(CWICConfig(vocab_size=vocab_size, **{name: getattr(config, name) for name in CWICConfig.__dataclass_fields__
                                                       if name in TrainConfig.__dataclass_fields__}))
    except ValueError as error:
        fail(f'--{error}')


def claim_folder(config):
    """
    Makes --out this run's own; whatever is returned must be kept until the end. Ends the program where another run is at
    work there, or has been and is neither to be resumed nor overwritten.
    """
    try:
        os.makedirs(config.out, exist_ok=True)
        lock = open(os.path.join(config.out, '.lock'), 'w', encoding='utf-8')
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:             # Windows: nothing keeps two runs apart
            pass
        except BlockingIOError:
            fail(f'--out {config.out}: another run is at work there; choose another --out')
        old = [name for name in ('best.pt', 'last.pt', 'log.csv', 'training.png') if os.path.exists(os.path.join(config.out, name))]
        if old and not config.resume:
            if not config.overwrite:
                fail(f'--out {config.out} holds a run already: go on with it (--resume), choose another --out, or delete it (--overwrite)')
            for name in old:
                os.remove(os.path.join(config.out, name))
    except OSError as error:
        fail(f'--out {config.out}: {error.strerror}; choose another', 1)
    return lock


def save(run, name):
    """Writes best.pt, which is for use, or last.pt, which also holds what it takes to go on."""
    config, more = run.config, {}
    if config.rank:
        more = {'base': config.init_from, 'rank': config.rank}
    if name == 'last.pt':
        # the teacher of an adapter is its base, which is at hand
        teacher = None if run.teacher is None or config.rank else run.teacher.state_dict()
        more.update(optimizer=run.optimizer.state_dict(), teacher=teacher, seconds=run.seconds, log=run.log, best=run.best, active=run.active)
    try:
        cwic.save_checkpoint(run.path(name), run.model, narrow=name == 'best.pt', tokenizer=run.tokenizer, data=config.data, step=run.step,
                             options=asdict(config), **run.results, **more)
    except CheckpointError as error:
        fail(str(error), 1)


def write_log(run):
    """log.csv, whole: the rows so far."""
    text = io.StringIO(newline='')
    csv.writer(text).writerows([COLUMNS] + run.log)
    try:
        cwic.write_atomically(run.path('log.csv'), lambda file: file.write(text.getvalue().encode()))
    except OSError as error:
        fail(f'{run.path("log.csv")} cannot be written ({error.strerror}); checkpoints saved before are whole', 1)


def clock(seconds):
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def finish(run, meta):
    """The picture and the closing lines of a finished run. They describe best.pt. Ends with an error where its target was not met."""
    config = run.config
    try:
        _, best = weights.load(run.path('best.pt'))
        plots.training(run.log, best, run.model.config.matrices, run.path('training.png'))
    except (CheckpointError, weights.WeightsError, OSError) as error:
        fail(f'no picture was drawn: {error}', 1)
    loss, reduction, percentiles = best['val_loss'], best['reduction'], best['compute_percentiles']
    bits = f' ({loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]:.3f} bits per byte)' if meta.get('val_bytes') else ''
    print(f'\ndone in {clock(run.seconds)}: best.pt, of step {best["step"]}: validation loss {loss:.4f} nats per token{bits}, '
          f'reduction {reduction:.2f}x (target {config.target_reduction:g}x)')
    if 'kl' in best:
        print(f'against the teacher: KL {best["kl"]:.4f} nats, the same likeliest token {100 * best["agreement"]:.1f}% of the time')
    if config.target_reduction > 1:
        print(f'compute per token: {100 / reduction:.1f}% of dense on average, 5th to 95th percentile {100 * percentiles["5"]:.1f}% to '
              f'{100 * percentiles["95"]:.1f}%; spread {100 * best["spread"]:.1f}%')
        print(f'correlation of a token\'s compute with its surprise {best["surprise_correlation"]:+.2f}, '
              f'with the entropy of what follows {best["entropy_correlation"]:+.2f}')
    print('files: ' + ', '.join(run.path(name) for name in ('best.pt', 'last.pt', 'log.csv', 'training.png')))
    print('talk to it: python chat.py' + ('' if config.out == 'out' else f' --ckpt {run.path("best.pt")}'))
    if reduction < MET * config.target_reduction:
        fail(f'target not met: {reduction:.2f}x where {config.target_reduction:g}x was asked for; give it more --hold_steps, '
             'or a higher --threshold_lr', 1)


# -----------------------------------------------------------------------------


def join_processes(config):
    """(device, rank, world): one process alone, or what torchrun says of this one among many."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = choose_device(config.device)
    if world > 1:
        nccl = device == 'cuda'
        if nccl:
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if nccl else 'gloo', timeout=timedelta(hours=1))
    return device, rank, world


def first_on_its_host_first(action):
    """action(), by the first process of each host before the others: what it downloads or prepares is there for them."""
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if dist.is_initialized() and not first:
        dist.barrier()
    result = action()
    if dist.is_initialized() and first:
        dist.barrier()
    return result


def begin(config, given, device, world):
    """-> (Run, train tokens, validation tokens, the data's meta): a new run, one from a pretrained model, or a resumed one."""
    model = tokenizer = saved = meta = train_data = val_data = None
    if config.resume:
        model, saved, config = resumed_options(config, given)
        tokenizer = saved['tokenizer']
    elif config.init_from:
        model, tokenizer, config = starting_model(config, given)
    else:
        config = replace(config, teacher=max(config.teacher, 0.0))
    if config.batch_size % (config.micro_batch * world):
        fail(f'--batch_size {config.batch_size} must be a multiple of --micro_batch times processes ({config.micro_batch} x {world})')
    if config.last_step() or model is None:     # without a step to do, a model that has a tokenizer needs no data
        try:
            train_data, val_data, meta = load_dataset(config.data, config.block_size)
        except DataError as error:
            fail(error, 1)
        if tokenizer is not None and meta['tokenizer'] != tokenizer:
            of_data, of_model = (spec.get('name', spec['kind']) for spec in (meta['tokenizer'], tokenizer))
            fail(f'data/{config.data} was made with the tokenizer {of_data}, but the model has {of_model} (or another of that name); choose other '
                 f'--data, or prepare some: python data/text/prepare.py --tokenizer {of_model} FILE... and then --data text')
        tokenizer = tokenizer or meta['tokenizer']
    torch.manual_seed(config.seed)
    model = (model or new_model(config, meta['vocab_size'])).to(device).train()
    dtype, why = choose_dtype(config.dtype, torch.device(device).type)
    if dist.is_initialized():           # measured by each, decided by the first
        choice = [dtype, why]
        dist.broadcast_object_list(choice)
        dtype, why = choice
    config = replace(config, dtype=str(dtype).removeprefix('torch.'))       # a resumed run does not measure again
    optimizer = torch.optim.AdamW(model.parameter_groups(config.lr, config.lr, config.weight_decay), betas=(0.9, config.beta2), fused=device != 'mps')
    dense = torch.tensor([float(layer.dense) for _, layer in model.gated()], dtype=torch.float32 if device == 'mps' else torch.float64)
    run = Run(config, model, tokenizer, optimizer, device, dtype, active=dense.to(device), head_loss=head_loss)
    if saved is not None:
        optimizer.load_state_dict(saved['optimizer'])
        run.step, run.seconds, run.log, run.best = (saved[name] for name in ('step', 'seconds', 'log', 'best'))
        run.active = saved['active'].to(run.active)
        run.results = {name: saved[name] for name in RESULTS if name in saved}
        if saved['teacher'] is not None or config.rank and config.teacher and run.step > config.dense_steps:
            run.teacher = frozen_teacher(run)
            if saved['teacher'] is not None:
                run.teacher.load_state_dict(saved['teacher'])
    return run, why, train_data, val_data, meta


def frozen_teacher(run):
    """The dense model that the student starts from: a copy, less the student's adapters."""
    teacher = cwic.dense_copy(run.model)
    if run.config.compile:
        for block in teacher.blocks:
            block.compile()
    return teacher


def announce(run, why, train_data, val_data, meta, world):
    """What will be done, on what, in a few lines."""
    config, model = run.config, run.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f'model   {total:,} parameters' + (f', {trained:,} of them trained' if trained < total else '')
          + f'; {model.dense():,} dense weights per token' + (f'; from {config.init_from}' if config.init_from else ''))
    if meta is not None:
        tokens = config.batch_size * config.block_size
        print(f'data    data/{config.data}: {len(train_data):,} tokens to train on, {len(val_data):,} to validate; vocabulary of {meta["vocab_size"]:,}')
        print(f'plan    {config.dense_steps} steps dense, {config.ramp_steps} towards {config.target_reduction:g}x less compute, {config.hold_steps} '
              f'there; {tokens:,} tokens each, {tokens * config.steps():,} in all')
        threads = f', {torch.get_num_threads()} threads' if run.device == 'cpu' else ''
        print(f'device  {run.device}{threads}{f", {world} processes" if world > 1 else ""}; {config.dtype} ({why})')
    if config.resume:
        print(f'resumed at step {run.step} of {config.steps()}')
    if config.compile and meta is not None:
        print('compile the first step of each phase will take a minute or so')
    sys.stdout.flush()


class Progress:
    """The line printed every few seconds: speed since the last one, and the time left at the pace of the steps so far."""

    def __init__(self, run):
        self.run, self.time, self.step, self.pace = run, time.perf_counter(), run.step, {}      # pace: seconds a step, by phase
        self.phases_begun = set()

    def took(self, dense, seconds):
        if dense in self.phases_begun:      # the first step of a phase may be compiling, and says nothing of the others
            self.pace[dense] = 0.9 * self.pace.get(dense, seconds) + 0.1 * seconds
        self.phases_begun.add(dense)

    def seconds_left(self):
        config, step, last = self.run.config, self.run.step, self.run.config.last_step()
        dense_left = last - step if config.target_reduction == 1 else max(min(config.dense_steps, last) - step, 0)
        dense_pace = self.pace.get(True, self.pace.get(False, math.nan))
        return dense_left * dense_pace + (last - step - dense_left) * self.pace.get(False, 1.4 * dense_pace)

    def line(self, loss, reduction, target, evaluated):
        run, now = self.run, time.perf_counter()
        speed = (run.step - self.step) * run.config.batch_size * run.config.block_size / (now - self.time)
        left = self.seconds_left()
        self.time, self.step = now, run.step
        return (f'step {run.step:5d}/{run.config.steps()}  loss {loss:.4f}  ' + (f'val {run.results["val_loss"]:.4f}  ' if evaluated else ' ' * 12)
                + (f'kl {run.results["kl"]:.4f}  ' if evaluated and 'kl' in run.results else '')
                + f'reduction {reduction:.2f}x (target {target:.2f}x)  {speed:7,.0f} tok/s' + (f'  {clock(left)} left' if math.isfinite(left) else ''))


def train(run, train_data, val_data, meta, rank, world):
    """The loop: steps, evaluations, checkpoints, the log. Returns True when the schedule is done, False where it was stopped before."""
    config, model = run.config, run.model
    main_process, uncompiled = rank == 0, nullcontext
    if config.compile:
        check_compile(run.device)
        run.head_loss, uncompiled = torch.compile(head_loss), lambda: torch.compiler.set_stance('force_eager')
        for block in model.blocks:
            block.compile()

    # Ctrl-C, SIGTERM or a closed stdout is a wish to stop after this step; all processes stop at the same one
    wishes = []
    signal.signal(signal.SIGTERM, lambda *_: wishes.append('terminated'))
    signal.signal(signal.SIGINT, lambda *_: (wishes.append('interrupted'), signal.signal(signal.SIGINT, signal.default_int_handler)))
    if main_process:
        write_log(run)
    progress = Progress(run)
    while run.step < config.last_step():
        started, dense = time.perf_counter(), config.is_dense(run.step)
        if not dense and run.step == config.dense_steps:
            run.teacher = frozen_teacher(run) if config.teacher else None
            with uncompiled():
                if all(float(layer.seen.max()) == 0 for _, layer in model.gated()):
                    warm_statistics(run, (windows(train_data, step_starts(train_data, meta, config, 2 ** 31 + i)[rank::world], config.block_size,
                                                  run.device)[0] for i in range(WARM_BATCHES)))
        target = target_at(run.step, config)
        lr = lr_at(run.step, config)
        *weight_groups, threshold_group = run.optimizer.param_groups
        for group in weight_groups:
            group['lr'] = lr
        threshold_group['lr'] = config.threshold_lr * lr
        tokens, targets = windows(train_data, step_starts(train_data, meta, config, run.step)[rank::world], config.block_size, run.device)
        try:
            loss, active, stop = train_step(run, tokens, targets, target, dense, stop=bool(wishes))
        except Diverged as error:
            at = f'{run.path("last.pt")} holds an earlier step' if os.path.exists(run.path('last.pt')) else 'nothing was saved yet'
            fail(f'step {run.step + 1}: {error}; stopped. {at}. Try a lower --lr', 1)
        run.step += 1
        progress.took(dense, time.perf_counter() - started)
        reduction = model.dense() / max(float(active.sum()), 1.0)

        evaluated = run.step % config.eval_every == 0 or run.step == config.steps()
        if evaluated:
            with uncompiled():
                run.results = evaluate(run, val_data, meta, dense)
            if not math.isfinite(run.results['val_loss']):
                fail(f'step {run.step}: the validation loss is {run.results["val_loss"]}; stopped. What was saved before is whole. Try a lower --lr', 1)
        run.seconds += time.perf_counter() - started
        if evaluated or run.step % 10 == 0:
            run.log.append([run.step, round(run.seconds, 2), loss, run.results['val_loss'] if evaluated else None, reduction, target, lr])
        if evaluated and main_process:
            score = run.results.get('kl', run.results['val_loss'])
            met = run.step >= config.dense_steps + config.ramp_steps and run.results['reduction'] >= MET * config.target_reduction
            if met and score < run.best or run.step == config.steps() and run.best == math.inf:
                run.best = score
                save(run, 'best.pt')
            save(run, 'last.pt')
            write_log(run)
        if main_process and (evaluated or time.perf_counter() - progress.time >= config.log_every):
            try:
                print(progress.line(loss, reduction, target, evaluated), flush=True)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                wishes.append('stdout was closed')
        if stop or run.step == config.last_step() < config.steps():
            if main_process:
                save(run, 'last.pt')
                write_log(run)
                print(f'\n{wishes[0] if wishes else "interrupted" if stop else "stopped"} at step {run.step}, which is saved; go on with: python train.py --resume'
                      + ('' if config.out == 'out' else f' --out {config.out}'), file=sys.stderr if stop else sys.stdout)
            sys.exit(130 if stop else 0)


def main():
    config, given = parse_options(TrainConfig, 'python train.py', presets=True)
    config.check()
    keep_memory()
    device, rank, world = join_processes(config)
    lock = claim_folder(config) if rank == 0 else None      # noqa: F841  kept until the program ends
    run, why, train_data, val_data, meta = first_on_its_host_first(lambda: begin(config, given, device, world))
    if rank == 0:
        announce(run, why, train_data, val_data, meta, world)
    if not run.config.last_step():
        save(run, 'best.pt')
        print(f'no step to do: saved as it is; talk to it: python chat.py --ckpt {run.path("best.pt")}')
        return
    train(run, train_data, val_data, meta, rank, world)
    if rank == 0:
        finish(run, meta)
    if world > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        fail('interrupted; what was saved before is whole', 130)
