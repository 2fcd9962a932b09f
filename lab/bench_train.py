"""
What a training step costs: dense, as CWIC that skips two thirds, and that with a teacher; and whether a GPU,
or several processes, compute what they should.

    python lab/bench.py train                               # the default model of train.py
    python lab/bench.py train --model gpt2-shape --compile
    python lab/bench.py train --processes 2                 # two GPUs, or processes of a CPU, against one

bench.py has the options, prints the rows of measure_train() and saves them. All kinds of steps take turns in
rounds, on random ids; learning rates are 0, so every round measures the same model.

Not here: what train.py does between steps, which are evaluations and checkpoints.
"""

import copy
import os
import socket
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import cwic
import train
from cwic import GPT, CWICConfig
from device import (all_reduce, barrier, check_compile, choose_device, choose_dtype, collective,
                    join_processes, tune_malloc)
from lab.methods import calibrate, gates
from options import fail, parse_options, progress

PRESETS = {'gpt2-shape': 'gpt2_124m_scratch.toml', 'smollm2-shape': 'smollm2_distill.toml'}     # of train.py
WARM_UP = 4         # rounds that are not counted: they compile, take memory, and are recorded


def make_run(config, shape=None):
    """
    A train.Run in which nothing moves: of train.py's defaults, or of a preset with a model of this shape, a
    CWICConfig. config: bench.BenchConfig.
    """
    if config.model not in ('', *PRESETS):
        fail(f'--model {config.model}: training is measured of {", ".join(PRESETS)}, or the default')
    preset = [str(Path(__file__).resolve().parents[1] / 'config' / PRESETS[config.model])] if config.model else []
    options, _ = parse_options(train.TrainConfig, 'python train.py', presets=True, argv=preset)
    batch = config.batch or min(options.batch_size, 4 * options.micro_batch)
    options = replace(options, batch_size=batch, teacher=1.0, compile=config.compile)
    device = choose_device(config.device)
    if config.compile:
        check_compile(device)
    torch.manual_seed(0)
    sizes = {f.name: getattr(options, f.name) for f in fields(CWICConfig) if hasattr(options, f.name)}
    model = GPT(shape or CWICConfig(**sizes))
    if options.lora_rank:
        cwic.add_lora(model, options.lora_rank)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0, 0.0, 0.0), fused=device != 'mps')
    active = torch.tensor([float(layer.n_weights) for _, layer in model.sparse_layers()], device=device)
    return train.Run(options, model, {}, optimizer, device, choose_dtype('auto', device)[0], active,
                     head_loss=train.head_loss, gradients=train.gradients,
                     optimizer_step=train.optimizer_step)


def start_processes(config):
    """Becomes torchrun, which runs this same command line in every process."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    os.environ.setdefault('OMP_NUM_THREADS', str(max(os.cpu_count() // config.processes, 1)))
    os.execv(sys.executable, [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node',
                              str(config.processes), '--master_port', str(port), *sys.argv])


@contextmanager
def alone():
    """Inside, this process trains as if there were no other."""
    summed, train.all_reduce = train.all_reduce, lambda tensors: None
    yield
    train.all_reduce = summed


# -----------------------------------------------------------------------------
# is it right? Gradients are compared: {name: gradient}, with the loss


def difference(a, b):
    """
    [|difference of the losses| / loss, and ||difference|| / ||gradient|| of the tensor in which that is
    largest, of weights and of thresholds], of two pairs (loss, gradients).
    """
    worst = [float(abs(a[0] - b[0]) / b[0]), 0.0, 0.0]
    for name, gradient in b[1].items():
        kind = 2 if cwic.is_threshold(name) else 1
        share = (a[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
        worst[kind] = max(worst[kind], float(share))
    return worst


def disagreement(run, tokens):
    """
    The difference of a CWIC step in f32 here from the same on the CPU. In a sparse model it is more than
    rounding: one of its millions of comparisons turns out the other way, and changes what follows. Weights
    moved by 3e-7 of themselves, on one CPU, do as much.
    """
    found = []
    for device in (run.device, 'cpu'):
        model = copy.deepcopy(run.model).to(device).train()
        inputs, targets = tokens[:1, :64].to(device), tokens[:1, 1:65].to(device)
        same = replace(run, model=model, dtype=torch.float32)
        loss, _ = train.gradients(same, inputs, targets, price=1e-9, dense=False)
        found.append((loss.cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()
                                   if p.grad is not None}))
    return difference(*found)


def gradients(run, tokens, micro_batch):
    """
    (loss, {name: gradient}) of one CWIC step on this process's share of the batch, tokens (B, T + 1). The
    target is 1, at which compute costs nothing: its price would drown all else in a threshold's gradient.
    """
    options = replace(run.config, micro_batch=micro_batch, clip=0.0)
    run = replace(run, config=options, active=run.active.clone())
    loss = train.train_step(run, tokens[:, :-1], tokens[:, 1:], target=1.0)[0]
    return loss, {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def compare_with_one(run, tokens, rank, world_size):
    """
    {case: two differences} of a step on tokens (4 * world_size, T + 1): all processes, each with its share,
    against the first alone; and, to compare with, that one against itself with another micro-batch. In f32
    and in bf16; with thresholds at their floor, where all but the tiniest inputs are used, and as they are,
    where what is rounded otherwise may use other inputs. Only the first process has a result.
    """
    run = replace(run, config=replace(run.config, batch_size=len(tokens)))
    as_they_are = [layer.theta.detach().clone() for _, layer in run.model.sparse_layers()]
    cases = {}
    for inputs in ('all inputs', 'a third'):
        for (_, layer), theta in zip(run.model.sparse_layers(), as_they_are):
            floor = torch.full_like(theta, cwic.FLOOR / layer.scale)
            layer.theta.data.copy_(floor if inputs == 'all inputs' else theta)
        for dtype in (torch.float32, torch.bfloat16):
            run = replace(run, dtype=dtype)
            shared = gradients(run, tokens.chunk(world_size)[rank], 2)
            if rank == 0:
                with alone():
                    one, otherwise = gradients(run, tokens, 2), gradients(run, tokens, 4)
                case = f'{str(dtype).removeprefix("torch.")}, {inputs}'
                cases[case] = [difference(shared, one), difference(otherwise, one)]
                ours, theirs = ('loss {:.1e}, weights {:.1e}, thresholds {:.1e}'.format(*values)
                                for values in cases[case])
                print(f'{case}: relative differences of {world_size} processes to one at most {ours}; of one '
                      f'process with other micro-batches {theirs}', flush=True)
    return cases


# -----------------------------------------------------------------------------
# how fast?


def time_steps(rows, run, tokens, rounds, rank, teacher=None):
    """
    Fills rows, which name an engine and a number of processes, with what a training step of each takes, in
    turns; tokens (B, T + 1) are this process's share.
    """
    seconds, synchronize = [[] for _ in rows], getattr(torch, run.device).synchronize
    steps = [replace(run, config=replace(run.config, batch_size=len(tokens) * row['processes']),
                     active=run.active.clone(), teacher=teacher if 'teacher' in row['engine'] else None)
             for row in rows]
    for step in steps:
        step.gradients, step.optimizer_step = train.recorded(step)
    for done in range(rounds + WARM_UP):
        for row, step, times in zip(rows, steps, seconds):
            progress(f'round {done + 1} of {rounds + WARM_UP}: {row["engine"]}')
            processes = row['processes']
            if rank < processes:
                step.active.copy_(run.active)
                if run.device == 'cuda':
                    torch.cuda.reset_peak_memory_stats()
                synchronize()
                start = time.perf_counter()
                with nullcontext() if processes > 1 else alone():
                    active = train.train_step(step, tokens[:, :-1], tokens[:, 1:], 3.0,
                                              row['engine'] == 'dense')[1]
                synchronize()
                times.append(time.perf_counter() - start)
                row['reduction'] = float(run.model.n_weights() / active.sum())
                if run.device == 'cuda':        # what is replayed takes no memory anew
                    peak = torch.cuda.max_memory_allocated() / 2 ** 30
                    row['memory_gib'] = max(row.get('memory_gib', 0.0), peak)
            barrier()
    progress()
    for row, times in zip(rows, seconds):
        if times:
            counted, work = times[WARM_UP:], row['processes'] * tokens[:, 1:].numel()
            row['seconds'] = float(np.median(counted))
            row.update(tok_s=work / row['seconds'], tok_s_min=work / max(counted),
                       tok_s_max=work / min(counted))


def message_seconds(run, rounds):
    """What the message takes that sums as many numbers as all gradients have, over all processes."""
    message, times = [torch.zeros_like(p) for p in run.model.parameters()], []
    for _ in range(rounds + WARM_UP):
        barrier()
        start = time.perf_counter()
        all_reduce(message)
        getattr(torch, run.device).synchronize()
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times[WARM_UP:]))
    if dist.get_rank() == 0:
        print(f'a message of {sum(p.nbytes for p in message) / 1e6:.0f} MB takes {1e3 * seconds:.2f} ms',
              flush=True)
    return seconds


def measure_train(config, shape):
    """
    The rows of train. With --processes: dense and CWIC by all processes and by the first alone, each process
    with a batch of its own; what of it is the message; and first, whether all compute what one does. On one
    GPU, first whether it computes what a CPU does.
    """
    tune_malloc()
    device, rank, world_size = join_processes(choose_device(config.device))
    progress('making the model')
    run = make_run(config, shape)
    batch, length, model, choice = run.config.batch_size, run.config.block_size, run.model, [run.dtype]
    collective(dist.broadcast_object_list, choice)                    # on a CPU, measured by each
    run.dtype = choice[0]
    tokens = torch.randint(model.config.vocab_size, (max(batch, 4) * world_size, length + 1)).to(device)
    checks, check = {}, world_size == 1 and run.device != 'cpu'
    progress('checking gradients and setting thresholds')
    if check:
        _, checks['all active'], _ = disagreement(run, tokens)      # there are no statistics yet
    calibrate(model, (tokens[:1, :-1],), dict.fromkeys(gates(model), 1 / 3), centred=True)
    if check:
        _, checks['sparse: all else'], checks['sparse: thresholds'] = disagreement(run, tokens)
    for x in model.state_dict().values():
        collective(dist.broadcast, x, 0)
    model.train()
    name = torch.cuda.get_device_name() if run.device == 'cuda' else f'{torch.get_num_threads()} threads'
    about = dict(device=f'{run.device} ({name})', dtype=str(run.dtype).removeprefix('torch.'), batch=batch,
                 compiled=config.compile, micro_batch=run.config.micro_batch, block_size=length)
    progress()
    if rank == 0:
        print(', '.join(f'{key} {value}' for key, value in (about | checks).items()), flush=True)
    about['differences'] = compare_with_one(run, tokens[:4 * world_size], rank, world_size) if world_size > 1 else checks
    teacher = train.frozen_teacher(run) if world_size == 1 else None
    train.fuse_gates(run)               # as a run does: on a CPU
    if config.compile:
        run.head_loss = torch.compile(train.head_loss)
        for block in model.blocks:
            block.compile()
    rows = [dict(about, engine=engine, processes=processes) for engine in ('dense', 'cwic', 'cwic + teacher')
            for processes in ((world_size, 1) if world_size > 1 else (1,)) if teacher or 'teacher' not in engine]
    time_steps(rows, run, tokens[rank * batch:(rank + 1) * batch], config.rounds, rank, teacher)
    if world_size > 1:
        seconds = message_seconds(run, config.rounds)
        dist.destroy_process_group()
        if rank > 0:
            sys.exit(0)
        for many, one in zip(rows[::2], rows[1::2]):
            many.update(speed_over_one=many['tok_s'] / one['tok_s'], message_share=seconds / many['seconds'])
    for row in rows:
        dense = next(r for r in rows if r['processes'] == row['processes'])
        row['seconds_over_dense'] = row['seconds'] / dense['seconds']
    return rows
