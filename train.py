"""
Trains a CWIC model: first dense, then ever sparser, then sparse for good; or makes one of a dense model there is.

    python train.py                                     # the default: a small model of Python code, on any laptop
    python train.py --target_reduction 1                # the same run without sparsity, to compare with
    python train.py config/NAME.toml --lr 5e-4          # a preset, with one option changed
    python train.py --resume                            # goes on from out/last.pt as if it had never stopped
    python train.py --init_from gpt2 --max_steps 0      # no training: out/best.pt is GPT-2 as released, for chat.py
    torchrun --nproc_per_node 2 train.py                # several processes share each step's batch

From --init_from, sparsity begins at once, at the exact dense model, and the loss is the two-way KL to it, unless
--dense_steps and --teacher say otherwise.

Leaves in --out: best.pt (the best validation loss among evaluations that met the compute target), last.pt (all it takes
to resume), log.csv and training.png.

A batch depends on the seed and the step alone, so there is no data position and no random state to carry: a resumed run
draws what the uninterrupted one would have drawn, on any number of processes.

Several processes: each takes its share of the sequences of every step, and what they add up, in one visible place, is
that of the whole step; all evaluate, the first one logs and saves. Several hosts need --out on a shared file system.

But: no experiment tracker, no dropout, no DDP wrapper, no sharding of weights or optimiser.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C in the seconds that torch takes to import just ends

import csv
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import cwic
import gpt2
from cwic import GPT, CWICConfig
from device import check_compile, choose_device, choose_dtype, keep_memory
from options import fail, given_options, option, parse_options
from report import COLUMNS, clock, plot, summary

HERE = os.path.dirname(os.path.abspath(__file__))
# no more logits than this, or one sequence's, exist at a time: what a CPU's cache likes, what keeps a GPU busy
LOGITS_AT_ONCE = {'cpu': 2 ** 22, 'cuda': 2 ** 28, 'mps': 2 ** 26}


@dataclass
class TrainConfig:
    """Trains a CWIC model: from scratch, dense first and then sparse; or from a dense model, by distillation."""
    data: str = option('python', 'folder in data/ that holds train.bin, val.bin and meta.json')
    out: str = option('out', 'where checkpoints, the log and the picture go')
    init_from: str = option('', 'dense model to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder with such weights, or a .pt of ours')
    resume: bool = option(False, 'go on from last.pt in --out, with the options it was started with')
    seed: int = option(1, 'of the initial weights and of the order of the data')
    device: str = option('auto', 'auto, cpu, cuda or mps')
    dtype: str = option('auto', 'of matrix products: auto, float32 or bfloat16')
    # the model
    n_layer: int = option(2, 'blocks')
    n_head: int = option(5, 'attention heads')
    n_embd: int = option(320, 'width')
    block_size: int = option(256, 'context, in tokens')
    bias: bool = option(True, 'biases in linear layers and norms')
    stripe_qkv: int = option(320, 'columns in a stripe of the query-key-value matrix')
    stripe_out: int = option(320, '... of the attention output matrix')
    stripe_up: int = option(320, '... of the first MLP matrix')
    stripe_down: int = option(320, '... of the second MLP matrix')
    stripe_head: int = option(1024, '... of the LM head')
    # compute
    target_reduction: float = option(3.0, 'dense weights / active weights per token to train for; 1 trains a dense model')
    teacher: float = option(-1.0, 'share of the sparse loss that is KL to the frozen dense model, not next-token loss; -1: 1 with --init_from, else 0')
    # the schedule, in optimiser steps
    dense_steps: int = option(700, 'steps before sparsity begins; none with --init_from, unless changed')
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
        for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'micro_batch', 'warmup_steps', 'eval_every', 'eval_windows'):
            if getattr(self, name) < 1:
                fail(f'--{name} must be at least 1')
        if self.target_reduction < 1 or self.teacher != -1 and not 0 <= self.teacher <= 1:
            fail('--target_reduction must be at least 1, and --teacher from 0 to 1')
        if self.steps() < 1 or min(self.dense_steps, self.ramp_steps, self.hold_steps) < 0:
            fail('--dense_steps, --ramp_steps and --hold_steps must not be negative, nor all 0')

    def steps(self):
        return self.dense_steps + self.ramp_steps + self.hold_steps


# options that a resumed run may change: they change what it costs, not what it computes
FREE_TO_CHANGE = ('out', 'resume', 'max_steps', 'device', 'dtype', 'micro_batch', 'recompute', 'compile', 'log_every')


def options_to_resume(config, saved):
    """The options that the run was started with, but for those given now that it may change; those it may not are refused."""
    merged, names = dict(saved, resume=True), given_options()
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        given = f.name in names or value != f.default       # on the command line, or by a preset
        if f.name in ('out', 'max_steps') or given and f.name in FREE_TO_CHANGE:
            merged[f.name] = value
        elif given and value != saved.get(f.name, f.default):
            fail(f'--{f.name} {value}: the run was started with {saved.get(f.name, f.default)}; leave the option out, or start afresh in another --out')
    return TrainConfig(**merged)


# -----------------------------------------------------------------------------
# the dense model to start from


def starting_model(config):
    """--init_from -> (model, its tokenizer's spec, the options for it: its sizes, and what distillation implies)."""
    source = config.init_from
    try:
        if os.path.isfile(source) or source.endswith('.pt'):
            model, saved = cwic.load_checkpoint(source)
            tokenizer = saved['tokenizer']
        else:
            model, tokenizer = gpt2.load(source)
    except (cwic.CheckpointError, gpt2.GPT2Error) as error:
        fail(f'--init_from {source}: {error}', 1)
    except KeyboardInterrupt:
        fail('interrupted; the same command goes on with what has arrived', 130)
    if any(float(linear.theta.detach().max()) > 0 for _, linear in model.linears()):
        fail(f'--init_from {source}: is sparse already; start from a dense model, such as one trained with --target_reduction 1')
    sizes = asdict(model.config)
    for f in fields(TrainConfig):
        given = getattr(config, f.name)
        if f.name in sizes and given not in (f.default, sizes[f.name]):
            if not f.name.startswith('stripe_'):
                fail(f'--{f.name} {given}: {source} has {sizes[f.name]}; leave the option out')
            sizes[f.name] = given
    if sizes != asdict(model.config):       # other stripes: all but the thresholds, which are 0, stays as it is
        dense, model = model, GPT(CWICConfig(**sizes))
        model.load_state_dict({name: x for name, x in dense.state_dict().items() if not name.endswith('theta')}, strict=False)
    del sizes['vocab_size']
    dense_steps = 0 if config.dense_steps == TrainConfig.dense_steps else config.dense_steps
    return model, tokenizer, replace(config, **sizes, dense_steps=dense_steps, teacher=1.0 if config.teacher == -1 else config.teacher)


# -----------------------------------------------------------------------------
# data


def load_data(name, block_size):
    """(train tokens, validation tokens, meta) of data/NAME; prepares the python corpus if it is not there."""
    folder = os.path.join(HERE, 'data', name)
    prepare = os.path.join(folder, 'prepare.py')
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        if name != 'python':
            command = f'python data/{name}/prepare.py' if os.path.exists(prepare) else 'python data/text/prepare.py FILE... and then train with --data text'
            fail(f'data/{name} is not there, or not prepared; run: {command}')
        if subprocess.run([sys.executable, prepare]).returncode:
            fail('data/python could not be prepared: see the line above', 1)
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        train, val = (np.memmap(os.path.join(folder, f'{split}.bin'), dtype=np.uint16, mode='r') for split in ('train', 'val'))
    except (OSError, ValueError) as error:
        fail(f'data/{name} is damaged ({error}); prepare it again with data/{name}/prepare.py')
    if min(len(train), len(val)) < block_size + 2:
        fail(f'data/{name}: {len(train):,} and {len(val):,} tokens are too few for --block_size {block_size}')
    return train, val, meta


def check_tokenizer(name, meta, tokenizer):
    """Ends the program where the data set speaks another vocabulary than the model."""
    if meta['tokenizer'] != tokenizer:
        of_data, of_model = (spec.get('name', spec['kind']) for spec in (meta['tokenizer'], tokenizer))
        fail(f'data/{name} was made with the tokenizer {of_data}, but the model has {of_model} (or another of that name); choose other --data, '
             f'or prepare some: python data/text/prepare.py --tokenizer {of_model} FILE... and then --data text')


def windows(data, starts, block_size, device):
    """Inputs and targets (len(starts), block_size); targets are the inputs one token later."""
    rows = np.stack([data[start:start + block_size + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows).to(device)
    return rows[:, :-1], rows[:, 1:]


def step_starts(data, config, step):
    """Where the sequences of one optimiser step begin, those of all processes: a function of the seed and the step alone."""
    return np.random.default_rng([config.seed, step]).integers(0, len(data) - config.block_size, size=config.batch_size)


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


def head_loss(model, teacher, hidden, teacher_hidden, targets, dense, teacher_share):
    """
    The head and the loss of what it predicts. hidden (B, T, d), targets (B, T) -> the loss, a mean over tokens, in nats;
    the head's active weights (B, T); observe()'s sums.
    """
    logits, active, sums = model.head(hidden, dense)
    logits, loss = logits.flatten(0, 1), 0.0                            # (B * T, vocab)
    if teacher_share < 1:
        loss = (1 - teacher_share) * cwic.next_token_loss(logits, targets.flatten())
    if teacher_share > 0:
        with torch.no_grad():
            teacher_logits = teacher.head(teacher_hidden, dense=True)[0].flatten(0, 1)
        loss = loss + teacher_share * cwic.two_way_kl(logits, teacher_logits)
    return loss, active, sums


def backward(model, teacher, tokens, targets, *, dense, teacher_share, price, share, recompute, head_loss=head_loss):
    """
    Adds to the gradients those of one micro-batch, which holds `share` of the step's tokens. Only a few sequences' logits
    exist at a time: backward reaches their hidden states before the next come, and the trunk when all are there.
    head_loss: the function above, or what torch.compile made of it.

    Returns the loss (nats) and each matrix's active weights (matrices,), both as their part of the step's mean, and the
    sums of observe() for each matrix.
    """
    hidden, active, sums = model.trunk(tokens, dense=dense, recompute=recompute)
    leaf = hidden.detach().requires_grad_()                             # (B, T, d)
    rows = max(1, LOGITS_AT_ONCE[tokens.device.type] // (tokens.shape[1] * model.config.vocab_size))
    parts = math.ceil(len(tokens) / rows)       # of one size where they can be: for another, torch.compile compiles again
    teacher_parts = [None] * parts
    if teacher is not None:
        with torch.no_grad():
            teacher_parts = teacher.trunk(tokens, dense=True)[0].tensor_split(parts)
    loss, active_head, sums_head = 0.0, 0.0, None
    for some, teacher_some, targets_some in zip(leaf.tensor_split(parts), teacher_parts, targets.tensor_split(parts)):
        some_share = share * len(some) / len(tokens)
        part, active_some, sums_some = head_loss(model, teacher, some, teacher_some, targets_some, dense, teacher_share)
        (some_share * (part + price * active_some.mean())).backward()
        loss = loss + some_share * part.detach()
        active_head = active_head + some_share * active_some.detach().mean()
        sums_head = sums_some if sums_head is None else sums_head + sums_some
    active = share * torch.stack([a.mean() for a in active])            # (matrices - 1,)
    if dense:
        hidden.backward(leaf.grad)
    else:
        torch.autograd.backward([hidden, price * active.sum()], [leaf.grad, None])
    return loss, torch.cat([active.detach(), active_head[None]]), sums + [sums_head]


def sum_over_processes(tensors):
    """Sums tensors over all processes, in place, as one message."""
    if dist.is_initialized():
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


@torch.no_grad()
def warm_statistics(model, batches, micro_batch, autocast):
    """Before sparsity begins the statistics must stand: thresholds are measured in sigmas. Changes no weight."""
    for tokens, _ in batches:
        sums = None
        for some in tokens.split(micro_batch):
            with autocast():
                hidden, _, sums_some = model.trunk(some)
            sums_some.append(cwic.observe(hidden, model.head.mu, model.head.sigma))
            sums = sums_some if sums is None else [a + b for a, b in zip(sums, sums_some)]
        sum_over_processes(sums)
        model.update_statistics(sums)
    if any(float(linear.sigma.max()) == 0 for _, linear in model.linears()):
        fail('the statistics of some layer stayed at 0, so its thresholds could not learn', 1)


@torch.no_grad()
def evaluate(model, data, config, device, dense):
    """
    Validation on --eval_windows fixed windows, in eval mode and f32. Returns a dict: loss (nats per token), reduction, active (the
    share of each matrix's weights, in the order of linears()), spread (the standard deviation of the compute of a token,
    over its mean), entropy_correlation (of a token's compute with the entropy of what the model predicts from it), and
    compute_percentiles, of a token's share of dense compute.
    """
    model.eval()
    count = config.eval_windows
    starts = np.linspace(0, len(data) - config.block_size - 1, count).astype(np.int64)
    loss, active, shares, entropies = 0.0, 0.0, [], []
    rows = max(1, min(config.micro_batch, LOGITS_AT_ONCE[torch.device(device).type] // (config.block_size * model.config.vocab_size)))
    for some in np.array_split(starts, math.ceil(count / rows)):
        tokens, targets = windows(data, some, config.block_size, device)
        logits, active_some = model(tokens, dense=dense)
        active_some = active_some.cpu().double()        # not every GPU has doubles
        loss += float(cwic.next_token_loss(logits.flatten(0, 1), targets.flatten())) * len(some) / count
        active = active + active_some.mean((1, 2)) * len(some) / count         # (matrices,)
        shares.append(active_some.sum(0).flatten() / model.dense())
        logp = logits.log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1).flatten().cpu().double())
    model.train()
    shares, entropies = torch.cat(shares), torch.cat(entropies)
    spread = float(shares.std() / shares.mean())
    return dict(loss=loss, reduction=float(1 / shares.mean()), spread=spread,
                active=[float(a) / linear.dense for a, (_, linear) in zip(active, model.linears())],
                entropy_correlation=float(torch.corrcoef(torch.stack([shares, entropies]))[0, 1]) if spread else 0.0,
                compute_percentiles={str(p): float(np.percentile(shares, p)) for p in (1, 5, 25, 50, 75, 95, 99)})


# -----------------------------------------------------------------------------


def main():
    config = parse_options(TrainConfig, 'python train.py', presets=True)
    config.check()
    keep_memory()
    last, best, log_path = (os.path.join(config.out, name) for name in ('last.pt', 'best.pt', 'log.csv'))
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    say = print if rank == 0 else lambda *args, **more: None
    kind = choose_device(config.device)
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if kind == 'cuda' and world > 1 else kind
    model = tokenizer = None
    if world > 1:
        if kind == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', timeout=timedelta(hours=1))
        if os.environ['LOCAL_RANK'] != '0':
            dist.barrier()      # until the first process of this host has downloaded and prepared what is missing
    if config.resume:
        try:
            model, saved = cwic.load_checkpoint(last)
        except cwic.CheckpointError as error:
            fail(f'cannot resume: {error}', 1)
        config, tokenizer = options_to_resume(config, saved['options']), saved['tokenizer']
    elif config.init_from:
        model, tokenizer, config = starting_model(config)
    else:
        config = replace(config, teacher=max(config.teacher, 0.0))
    if config.batch_size % (config.micro_batch * world):
        fail(f'--batch_size {config.batch_size} must be a multiple of --micro_batch times processes ({config.micro_batch} x {world})')
    last_step = config.steps() if config.max_steps < 0 else min(config.max_steps, config.steps())
    if last_step or not config.init_from:       # without a step to do, a model that has a tokenizer needs no data
        train_data, val_data, meta = load_data(config.data, config.block_size)
        tokenizer = tokenizer or meta['tokenizer']
        check_tokenizer(config.data, meta, tokenizer)
    if world > 1 and os.environ['LOCAL_RANK'] == '0':
        dist.barrier()
    dtype, why = choose_dtype(config.dtype, kind)
    autocast = nullcontext if dtype == torch.float32 else lambda: torch.autocast(kind, dtype=dtype)
    os.makedirs(config.out, exist_ok=True)

    torch.manual_seed(config.seed)
    if model is None:
        try:
            sizes = {f.name: getattr(config, f.name) for f in fields(CWICConfig) if f.name != 'vocab_size'}
            model = GPT(CWICConfig(vocab_size=meta['vocab_size'], **sizes))
        except ValueError as error:
            fail(f'--{error}')
    model.to(device).train()
    linears = [linear for _, linear in model.linears()]
    optimizer = torch.optim.AdamW(model.parameter_groups(config.lr, config.weight_decay), betas=(0.9, config.beta2), fused=kind != 'mps')
    # everything a run carries from one step to the next; active: mean weights each matrix used in the last step
    step, seconds, rows, best_loss, teacher = 0, 0.0, [], math.inf, None
    active = torch.tensor([float(linear.dense) for linear in linears], device=device)       # (matrices,)
    measured = None

    def frozen_copy():
        copy = cwic.dense_copy(model)
        for block in copy.blocks if config.compile else ():
            block.compile()
        return copy

    if config.resume:
        optimizer.load_state_dict(saved['optimizer'])       # puts new groups in the place of the old
        step, seconds, rows, best_loss, active = (saved[name] for name in ('step', 'seconds', 'log', 'best_loss', 'active'))
        active = active.to(device)
        if saved['teacher'] is not None:
            teacher = frozen_copy()
            teacher.load_state_dict(saved['teacher'])
        if step >= last_step:
            fail(f'{last} has already done all its {step} steps; there is nothing to resume', 0)
    *weight_groups, threshold_group = optimizer.param_groups

    def save(path, **more):
        if rank == 0:
            results = {} if measured is None else dict(measured, val_loss=measured['loss'])
            try:
                cwic.save_checkpoint(path, model, **dict(results, active_share=results.pop('active', None)), tokenizer=tokenizer, data=config.data,
                                     step=step, options=asdict(config), **more)
            except OSError as error:
                fail(f'{path} cannot be written ({error.strerror}); what stood there before is whole', 1)

    def save_last():
        save(last, optimizer=optimizer.state_dict(), teacher=None if teacher is None else teacher.state_dict(), seconds=seconds, log=rows,
             best_loss=best_loss, active=active)

    parameters, tokens_per_step = sum(p.numel() for p in model.parameters()), config.batch_size * config.block_size
    say(f'model   {parameters:,} parameters; {model.dense():,} dense weights per token' + (f'; from {config.init_from}' if config.init_from else ''))
    if last_step == 0:
        save(best)
        say(f'no step to do: saved as it is; talk to it: python chat.py --ckpt {best}')
        return
    say(f'data    data/{config.data}: {len(train_data):,} tokens to train on, {len(val_data):,} to validate; vocabulary of {meta["vocab_size"]:,}')
    say(f'plan    {config.dense_steps} steps dense, {config.ramp_steps} towards {config.target_reduction:g}x less compute, {config.hold_steps} there; '
        f'{tokens_per_step:,} tokens each, {tokens_per_step * config.steps():,} in all')
    threads = f', {torch.get_num_threads()} threads' if kind == 'cpu' else ''
    say(f'device  {kind}{threads}{f", {world} processes" if world > 1 else ""}; {str(dtype).removeprefix("torch.")} ({why})', flush=True)
    if config.resume:
        say(f'resumed at step {step} of {config.steps()}')
    head, uncompiled = head_loss, nullcontext
    if config.compile:
        say('compile the first step of each phase will take a minute or so', flush=True)
        check_compile(device)
        head, uncompiled = torch.compile(head_loss), lambda: torch.compiler.set_stance('force_eager')
        for block in model.blocks:
            block.compile()

    # Ctrl-C is a wish to stop after this step, said once; all processes stop at the same one
    interrupts = []
    previous_handler = signal.signal(signal.SIGINT, lambda *_: (interrupts.append(1), signal.signal(signal.SIGINT, previous_handler)))
    log_file = open(log_path if rank == 0 else os.devnull, 'w', newline='', encoding='utf-8')
    log = csv.writer(log_file)
    log.writerows([COLUMNS] + rows)
    printed_time, printed_step, step_seconds, phases_begun = time.perf_counter(), step, {}, set()

    while step < last_step:
        started = time.perf_counter()
        dense = step < config.dense_steps or config.target_reduction == 1
        if not dense and step == config.dense_steps:
            if config.teacher:
                teacher = frozen_copy()
            warm = (windows(train_data, step_starts(train_data, config, 2 ** 31 + i)[rank::world], config.block_size, device) for i in range(20))
            with uncompiled():
                warm_statistics(model, warm, config.micro_batch, autocast)
        target = target_at(step, config)
        price = 0.0 if dense else cwic.price(float(active.sum()), model.dense(), target)
        for group in weight_groups:
            group['lr'] = lr_at(step, config)
        threshold_group['lr'] = config.threshold_lr * lr_at(step, config)

        # gradients, the loss, the compute and the statistics of the whole step, however it is cut
        optimizer.zero_grad()
        loss, active, sums = torch.zeros((), device=device), torch.zeros_like(active), None
        starts = step_starts(train_data, config, step)[rank::world]
        for i in range(0, len(starts), config.micro_batch):
            tokens, targets = windows(train_data, starts[i:i + config.micro_batch], config.block_size, device)
            with autocast():
                loss_part, active_part, sums_part = backward(
                    model, teacher, tokens, targets, dense=dense, teacher_share=0.0 if dense else config.teacher, price=price,
                    share=len(tokens) / config.batch_size, recompute=config.recompute, head_loss=head)
            loss, active = loss + loss_part, active + active_part
            sums = sums_part if sums is None or dense else [a + b for a, b in zip(sums, sums_part)]
        stop = torch.tensor(float(len(interrupts)), device=device)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        sum_over_processes(gradients + [loss, active, stop] + ([] if dense else sums))
        norm = torch.nn.utils.clip_grad_norm_([p for group in weight_groups for p in group['params']], config.clip)
        if not math.isfinite(float(loss)) or not math.isfinite(float(norm)):
            at = f'{last} holds the model of the last evaluation' if os.path.exists(last) else 'nothing was saved yet'
            fail(f'step {step + 1}: the loss is {float(loss)}, the norm of its gradient {float(norm)}; stopped. {at}. Try a lower --lr', 1)

        thetas = [linear.theta.detach().clone() for linear in linears]
        optimizer.step()
        if not dense:
            model.limit_thresholds(thetas)
            model.update_statistics(sums)
        step += 1
        if dense in phases_begun:       # the first step of a phase may be compiling for a minute, and says nothing of the others
            took = time.perf_counter() - started
            step_seconds[dense] = 0.9 * step_seconds.get(dense, took) + 0.1 * took
        phases_begun.add(dense)

        # evaluation, checkpoints, the log
        evaluated = step % config.eval_every == 0 or step == config.steps()
        if evaluated:
            with uncompiled():
                measured = evaluate(model, val_data, config, device, dense)
        seconds += time.perf_counter() - started
        if evaluated or step % 10 == 0:
            row = [step, round(seconds, 2), float(loss), measured['loss'] if evaluated else None, model.dense() / float(active.sum()), target, lr_at(step - 1, config)]
            rows.append(row)
            log.writerow(row)
            log_file.flush()
        if evaluated:
            met = step >= config.dense_steps + config.ramp_steps and measured['reduction'] >= 0.97 * config.target_reduction
            if met and measured['loss'] < best_loss or step == config.steps() and best_loss == math.inf:
                best_loss = measured['loss']
                save(best)
            save_last()
        now = time.perf_counter()
        if evaluated or now - printed_time >= config.log_every:
            left = {True: max(min(config.dense_steps, last_step) - step, 0), False: max(last_step - max(step, config.dense_steps), 0)}
            if config.target_reduction == 1:
                left = {True: last_step - step, False: 0}
            dense_seconds = step_seconds.get(True, step_seconds.get(False, math.nan))
            eta = left[True] * dense_seconds + left[False] * step_seconds.get(False, 1.4 * dense_seconds)
            say(f'step {step:5d}/{config.steps()}  loss {float(loss):.4f}  ' + (f'val {measured["loss"]:.4f}  ' if evaluated else ' ' * 12)
                + f'reduction {model.dense() / float(active.sum()):.2f}x (target {target:.2f}x)  {(step - printed_step) * tokens_per_step / (now - printed_time):7,.0f} tok/s' + (f'  {clock(eta)} left' if math.isfinite(eta) else ''), flush=True)
            printed_time, printed_step = now, step
        if float(stop) or step == last_step < config.steps():
            save_last()
            say(f'\n{"interrupted" if float(stop) else "stopped"} at step {step}, which is saved; go on with: python train.py --resume' + ('' if config.out == 'out' else f' --out {config.out}'))
            sys.exit(130 if float(stop) else 0)

    log_file.close()
    if rank == 0:
        plot(rows, measured, os.path.join(config.out, 'training.png'))
        print('\n' + '\n'.join(summary(measured, meta, config, seconds)))
        print(f'files: {best}, {last}, {log_path}, {os.path.join(config.out, "training.png")}')
        print('talk to it: python chat.py' + ('' if config.out == 'out' else f' --ckpt {best}'))
    if world > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        fail('interrupted; what was saved before is whole', 130)
