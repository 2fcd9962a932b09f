"""
What a training step costs: dense, as CWIC at a reduction of three, and as CWIC with a teacher.

    python lab/bench.py train                               # the default model of train.py
    python lab/bench.py train --model gpt2-shape --compile
    python lab/bench.py train --processes 2                 # two GPUs, or processes on a CPU, and one alone

bench.py has the options, and prints and saves the rows that measure_train() returns. All kinds of steps take
turns in rounds, on random ids. Learning rates are 0, so every round measures the same model.

Not here: evaluations and checkpoints, which train.py makes between steps. tests/test_distributed.py checks
that several processes compute the same as one.
"""

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
from device import (barrier, check_compile, choose_device, choose_dtype, collective, join_processes,
                    tune_malloc)
from lab.methods import calibrate, sparse_layers_of
from options import fail, parse_options, progress

PRESETS = {'gpt2-shape': 'gpt2_124m_distill.toml', 'smollm2-shape': 'smollm2_distill.toml',      # of train.py
           'llama1b-shape': 'smollm2_distill.toml'}
WARM_UP = 4         # rounds that are not counted: they compile, allocate memory, and record CUDA graphs


def make_run(config, shape=None):
    """
    A train.Run with learning rates of 0: of train.py's default model, or of a shape, a CWICConfig, with the
    options of its preset. config: a bench.BenchConfig.
    """
    if config.model not in ('', *PRESETS):
        fail(f'--model {config.model}: train measures {", ".join(PRESETS)}, or the default')
    root = Path(__file__).resolve().parents[1]
    preset = [str(root / 'config' / PRESETS[config.model])] if config.model else []
    options, given = parse_options(train.TrainConfig, 'python train.py', presets=True, argv=preset)
    batch = config.batch or min(options.batch_size, 4 * options.micro_batch)
    options = replace(options, batch_size=batch, teacher=1.0, compile=config.compile)
    if shape and 'block_size' not in given:
        options = replace(options, block_size=shape.block_size)
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
    """with alone(): this process trains as if there were no other."""
    all_reduce, train.all_reduce = train.all_reduce, lambda tensors: None
    yield
    train.all_reduce = all_reduce


def time_steps(rows, run, tokens, rounds, rank, teacher=None):
    """
    Each row names an engine and a number of processes; adds what a training step of it takes.
    tokens (B, T + 1): this process's share of the batch.
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
                if run.device == 'cuda':        # of all rounds, as a CUDA graph allocates nothing in replay
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


def measure_train(config, shape):
    """
    The rows of train. With --processes: dense and CWIC, each by all processes, with a batch for each of them,
    and by the first process alone.
    """
    tune_malloc()
    _, rank, world_size = join_processes(choose_device(config.device))
    progress('making the model')
    run = make_run(config, shape)
    batch, length, model, choice = run.config.batch_size, run.config.block_size, run.model, [run.dtype]
    collective(dist.broadcast_object_list, choice)      # on a CPU each process has measured which is faster
    run.dtype = choice[0]
    tokens = torch.randint(model.config.vocab_size, (batch * world_size, length + 1)).to(run.device)
    progress('setting thresholds')
    calibrate(model, (tokens[:1, :-1],), dict.fromkeys(sparse_layers_of(model), 1 / 3), centred=True)
    model.train()
    name = torch.cuda.get_device_name() if run.device == 'cuda' else f'{torch.get_num_threads()} threads'
    about = dict(device=f'{run.device} ({name})', dtype=str(run.dtype).removeprefix('torch.'), batch=batch,
                 compiled=config.compile, micro_batch=run.config.micro_batch, block_size=length)
    progress()
    if rank == 0:
        print(', '.join(f'{key} {value}' for key, value in about.items()), flush=True)
    teacher = train.frozen_teacher(run) if world_size == 1 else None
    train.fuse_masks(run)               # on a CPU, as in a run
    if config.compile:
        run.head_loss = torch.compile(train.head_loss)
        for block in model.blocks:
            block.compile()
    engines = ('dense', 'cwic', 'cwic + teacher') if world_size == 1 else ('dense', 'cwic')
    rows = [dict(about, engine=engine, processes=processes) for engine in engines
            for processes in sorted({world_size, 1}, reverse=True)]
    time_steps(rows, run, tokens[rank * batch:(rank + 1) * batch], config.rounds, rank, teacher)
    if world_size > 1:
        dist.destroy_process_group()
        if rank > 0:
            sys.exit(0)
        for many, one in zip(rows[::2], rows[1::2]):
            many['speed_over_one'] = many['tok_s'] / one['tok_s']
    for row in rows:
        dense = next(r for r in rows if r['processes'] == row['processes'])
        row['seconds_over_dense'] = row['seconds'] / dense['seconds']
    return rows
