"""
What a training step costs: dense, as CWIC at a reduction of three, and as CWIC with a teacher.

    python lab/bench.py train                               # the default model of train.py
    python lab/bench.py train --model gpt2-shape --compile

bench.py has the options, and prints and saves the rows that measure_train() returns. All kinds of steps take
turns in rounds, on random ids. Learning rates are 0, so every round measures the same model.

Not here: several processes, for which train.py itself prints tokens/s; evaluations and checkpoints, which it
makes between steps.
"""

import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

import cwic
import train
from cwic import GPT, CWICConfig
from device import check_compile, choose_device, choose_dtype, tune_malloc
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


def time_steps(rows, run, tokens, rounds, teacher):
    """Each row names an engine; adds what a training step of it takes. tokens (B, T + 1): the batch."""
    seconds, synchronize = [[] for _ in rows], getattr(torch, run.device).synchronize
    steps = [replace(run, active=run.active.clone(), teacher=teacher if 'teacher' in row['engine'] else None)
             for row in rows]
    for step in steps:
        step.gradients, step.optimizer_step = train.recorded(step)
    for done in range(rounds + WARM_UP):
        for row, step, times in zip(rows, steps, seconds):
            progress(f'round {done + 1} of {rounds + WARM_UP}: {row["engine"]}')
            step.active.copy_(run.active)
            if run.device == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            start = time.perf_counter()
            dense = row['engine'] == 'dense'
            _, active, _ = train.train_step(step, tokens[:, :-1], tokens[:, 1:], 3.0, dense)
            synchronize()
            times.append(time.perf_counter() - start)
            row['reduction'] = float(run.model.n_weights() / active.sum())
            if run.device == 'cuda':        # of all rounds, as a CUDA graph allocates nothing in replay
                peak = torch.cuda.max_memory_allocated() / 2 ** 30
                row['memory_gib'] = max(row.get('memory_gib', 0.0), peak)
    progress()
    work = tokens[:, 1:].numel()
    for row, times in zip(rows, seconds):
        counted = times[WARM_UP:]
        row['seconds'] = float(np.median(counted))
        row['seconds_over_dense'] = row['seconds'] / rows[0]['seconds']
        row.update(tok_s=work / row['seconds'], tok_s_min=work / max(counted), tok_s_max=work / min(counted))


def measure_train(config, shape):
    """The rows of train. shape: a CWICConfig, or None for train.py's default model."""
    tune_malloc()
    progress('making the model')
    run = make_run(config, shape)
    batch, length, model = run.config.batch_size, run.config.block_size, run.model
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1)).to(run.device)
    progress('setting thresholds')
    calibrate(model, (tokens[:1, :-1],), dict.fromkeys(sparse_layers_of(model), 1 / 3), centred=True)
    name = torch.cuda.get_device_name() if run.device == 'cuda' else f'{torch.get_num_threads()} threads'
    about = dict(device=f'{run.device} ({name})', dtype=str(run.dtype).removeprefix('torch.'), batch=batch,
                 compiled=config.compile, micro_batch=run.config.micro_batch, block_size=length)
    progress()
    print(', '.join(f'{key} {value}' for key, value in about.items()), flush=True)
    teacher = train.frozen_teacher(run)
    train.fuse_masks(run)               # on a CPU, as in a run
    if config.compile:
        run.head_loss = torch.compile(train.head_loss)
        for block in model.blocks:
            block.compile()
    rows = [dict(about, engine=engine) for engine in ('dense', 'cwic', 'cwic + teacher')]
    time_steps(rows, run, tokens, config.rounds, teacher)
    return rows
