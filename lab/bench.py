"""
How fast the kernel is, compared with the memory it reads from and with other engines.

    python lab/bench.py decode                          # tokens/s, next to PyTorch with every weight
    python lab/bench.py decode --llama_bench PATH --gguf q8_0.gguf,q4_0.gguf        # and next to llama.cpp
    python lab/bench.py decode --model adapters/smollm2.safetensors      # a real model, reading real text
    python lab/bench.py decode --model llama1b-shape --dtypes int8      # 10 GB of memory; 14 GB with f32
    python lab/bench.py prefill                         # prompts of several lengths: time to the first token
    python lab/bench.py train                           # training steps: bench_train.py
    python lab/bench.py loss --model out/best.safetensors       # validation loss with narrower weights

Decoding is limited by memory, and on a shared machine memory bandwidth changes from second to second. So all
cases take turns in rounds, and the bandwidth is measured before and after each case. Every round reads
another text. Results are medians, with the slowest and the fastest round:

    roofline = bytes read per token x tokens/s / bandwidth          1 is as fast as memory allows

The bytes are those of the active weights, of all thresholds, and with int8 of all scales. Keys, values, mu,
biases and norms are not counted.

The shapes have random weights, as speed does not depend on their values, and their thresholds are quantiles
of their inputs. The reduction in the table is counted by the kernel. Other models are measured dense, and
also sparse if they have thresholds of their own.

Not here: several sequences at once.
"""

import os
import signal
import sys

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C while torch is imported, which takes seconds
    if 'train' in sys.argv:
        os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')     # as in train.py

import copy
import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the repository, for the imports below

import build_kernel
import evaluate
import plots
import weights
from checkpoint import CheckpointError
from cwic import GPT, CWICConfig, KVCache
from data import common
from decoder import FORMATS, Decoder, PackedMatrix
from files import write_atomically
from lab.bench_train import measure_train
from lab.methods import calibrate, sparse_layers_of
from options import counted, fail, option, parse_options, printable, progress

PROMPT = 16                     # tokens in the KV cache when decoding begins
PROBE_BYTES = 2 ** 29           # more than most caches hold
SHAPES = {                      # with the stripes that weights.py gives the released models
    'gpt2-shape': CWICConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768,
                             stripe_qkv=768, stripe_out=768, stripe_up=768, stripe_down=768,
                             stripe_head=2048),
    'smollm2-shape': weights.llama_config(vocab_size=49152, context=2048, n_layer=30, n_head=9, n_kv_head=3,
                                          n_embd=576, n_hidden=1536),
    'llama1b-shape': weights.llama_config(vocab_size=128256, context=2048, n_layer=16, n_head=32, n_kv_head=8,
                                          n_embd=2048, n_hidden=8192, rope_theta=500000.0)}


@dataclass
class BenchConfig:
    about = 'Measures speed (decoding, reading prompts, training), or how much loss narrow weights add.'
    what: tuple = option((), 'decode, prefill, train or loss')
    model: str = option('', f'{", ".join(SHAPES)}, or what weights.load takes: smollm2, a checkpoint, ... '
                        'Left out: gpt2-shape; for train its default model, for loss out/best.safetensors')
    reductions: str = option('1,2,3,4,6', 'dense / active weights, for shapes')
    dtypes: str = option('f32,bf16,int8', 'formats of the weights')
    threads: str = option('1,2', 'numbers of threads; loss uses the largest')
    rounds: int = option(7, 'measurements of each case', at_least=1)
    tokens: int = option(32, 'decode: tokens in each measurement', at_least=1)
    prompts: str = option('16,64,256,1000', 'prefill: lengths of the prompts')
    llama_bench: str = option('', "decode, prefill: path of llama.cpp's llama-bench, to compare with")
    gguf: str = option('', 'models for it, separated by commas; on a CPU its fastest format is Q4_0, which '
                       'it repacks')
    data: str = option('', 'folder in data/ whose validation split is read; left out: heldout for a model '
                       "with SmolLM2's tokenizer, else the model's own training data")
    windows: int = option(16, 'loss: sequences to read, each as long as those of training', at_least=1)
    device: str = option('auto', 'train: auto, cpu, cuda or mps; everything else runs on the CPU')
    compile: bool = option(False, 'train: use torch.compile')
    batch: int = option(0, "train: sequences in a step; 0: the preset's, but at most four micro-batches",
                        at_least=0)
    json: str = option('', 'file for all results')
    out: str = option('out', "folder for decode's picture")


def machine():
    """CPU, cores, versions, compiler and date, in one line."""
    name = re.search(r'model name\s*: (.*)', build_kernel.cpu())
    try:
        command = [*build_kernel.compiler(), '--version']
        compiler = subprocess.run(command, capture_output=True, text=True).stdout.split('\n')[0]
    except (OSError, build_kernel.KernelUnavailable):
        compiler = 'no compiler'
    return printable(f'{name[1] if name else platform.machine()}, {os.cpu_count()} cores; '
                     f'Python {platform.python_version()}, torch {torch.__version__}, {compiler}; '
                     f'{time.strftime("%d %B %Y")}')


# -----------------------------------------------------------------------------
# models, texts, thresholds


def choose_model(config):
    """-> (model in eval mode, what else its file says, {} for a shape)"""
    name = config.model or 'gpt2-shape'
    if name not in SHAPES:
        return weights.load(name)
    progress('making the model')
    torch.manual_seed(0)
    return GPT(SHAPES[name]).eval(), {}


def read_dataset(config, saved, length):
    """
    Validation tokens for a model, more than length of them, and their meta. saved: what the model's file
    says. Raises DataError.
    """
    options = saved.get('options') or {}
    for name in [config.data] if config.data else ['heldout', options.get('data', 'python')]:
        _, val, meta = common.load_dataset(name, 1)
        if meta['tokenizer'] == saved['tokenizer']:
            if len(val) <= length:
                raise common.DataError(f'data/{name} has {len(val):,} validation tokens; {length + 1:,} are '
                                       'needed: choose another, --data NAME')
            return val, meta
    raise common.DataError(f'data/{name} was made with another tokenizer than the model has; choose another, '
                           '--data NAME')


def texts_to_read(config, model, saved, length):
    """
    One text for each round, as some texts need twice the compute of others: lists of token ids of this
    length, evenly spread over the validation data. They begin anywhere, as the first tokens of a dialogue
    are always the same and cheap. For a shape, random ids.
    """
    if not saved:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (config.rounds, length), generator=generator).tolist()
    data, _ = read_dataset(config, saved, length)
    starts = np.linspace(0, len(data) - length, config.rounds).astype(np.int64)
    return [data[start:start + length].tolist() for start in starts]


class Setting:
    """
    The part of a packed model that depends on its thresholds, dense or with those it has now: packed weights
    can then be measured at several reductions.
    """

    @torch.no_grad()
    def __init__(self, model, dense):
        self.tensors = {}       # {matrix: {name: tensor}}
        self.margin = model.head.margin_in_nats() if model.config.shortlist and not dense else 0.0
        for name, layer in model.sparse_layers():
            tensors = PackedMatrix(layer, dense=dense).tensors
            self.tensors[name] = {key: tensors[key] for key in ('thresholds', 'mu', 'base')}

    def apply(self, decoder):
        for name, tensors in self.tensors.items():
            for key, values in tensors.items():
                decoder.packed[name].tensors[key].copy_(values)
        decoder.c_model.margin = self.margin


def make_settings(model, saved, reductions):
    """A Setting for each reduction of a shape; for another model a dense one, and a sparse one if it is."""
    if saved:
        sparse = any(float(layer.theta.detach().max()) > 0 for _, layer in model.sparse_layers())
        return [Setting(model, dense) for dense in (True, False) if dense or sparse]
    settings, tokens = [], torch.randint(model.config.vocab_size, (8, PROMPT + 32))
    for reduction in counted(reductions, 'reductions calibrated'):
        if reduction > 1:
            calibrate(model, (tokens,), dict.fromkeys(sparse_layers_of(model), 1 / reduction), centred=True)
        settings.append(Setting(model, reduction == 1))
    return settings


# -----------------------------------------------------------------------------
# engines: each reads a prompt, then tokens one at a time. These are timed, or if there are none, the prompt


class Failed(Exception):
    """Why another engine could not be measured, in one line."""


def sample(tok_s, weights, thresholds=0, reduction=1.0, **more):
    """One measurement as part of a row. weights, thresholds: bytes read for each token."""
    return dict(more, tok_s=tok_s, reduction=reduction, gb_per_token=(weights + thresholds) / 1e9,
                thresholds_gb_per_token=thresholds / 1e9)


def run_kernel(decoder, setting, threads, prompt, tokens):
    setting.apply(decoder)
    if decoder.threads != threads:
        decoder.set_threads(threads)
    start = time.perf_counter()
    _, active = decoder.prefill(prompt)
    if tokens:
        start = time.perf_counter()
        active = [decoder.step(token)[1] for token in tokens]
    seconds = time.perf_counter() - start
    count, active = len(active), max(int(np.sum(active)), 1)
    tensors = [packed.tensors for packed in decoder.packed.values()]
    thresholds = sum(x[key].nbytes for x in tensors for key in ('thresholds', 'row_scale', 'column_scale')
                     if key in x)
    return sample(count / seconds, active / count * FORMATS[decoder.dtype].itemsize, thresholds,
                  int(decoder.n_weights.sum()) * count / active)


@torch.no_grad()
def run_torch(model, threads, prompt, tokens):
    """PyTorch with every weight. Like the others it computes a prompt's logits for the last token only."""
    torch.set_num_threads(threads)
    dtype = model.head.weight.dtype
    cache, start = KVCache(model.config, dtype=dtype), time.perf_counter()
    for i, ids in enumerate([prompt, *([token] for token in tokens)]):
        if i == 1:
            start = time.perf_counter()
        hidden, _ = model.trunk(torch.tensor([ids]), cache, dense=True)
        model.head(hidden[:, -1:], dense=True)
    return sample(len(tokens or prompt) / (time.perf_counter() - start), model.n_weights() * dtype.itemsize)


def run_llama(program, file, threads, prompt, tokens):
    """llama.cpp, which makes up its own text. Raises Failed."""
    lengths = ['-p', 0, '-n', len(tokens), '-d', len(prompt)] if tokens else ['-p', len(prompt), '-n', 0]
    command = [*map(str, [program, '-m', file, *lengths, '-t', threads]), '-r', '1', '-o', 'json']
    # a shell may have OMP_WAIT_POLICY=PASSIVE for torch's sake, which makes llama.cpp 3 times slower
    environment = {name: value for name, value in os.environ.items() if name != 'OMP_WAIT_POLICY'}
    try:
        done = subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace',
                              env=environment)
        row = json.loads(done.stdout)[0]
        return sample(row['avg_ts'], row['model_size'], dtype=row['model_type'].split()[-1])
    except OSError as error:
        raise Failed(f'{program}: {error.strerror}') from None
    except (ValueError, LookupError, TypeError):
        raise Failed(f'ended with code {done.returncode}; to see why, run: {" ".join(command)}') from None


# -----------------------------------------------------------------------------
# decode, prefill


def bandwidth(numbers, threads):
    """GB/s at which this many threads read all the numbers."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - start) / 1e9


def median_row(labels, samples):
    """The row of one case: its labels, the medians of its samples, and the extremes of their speed."""
    row = dict(labels, dtype=samples[0].pop('dtype', labels.get('dtype')))
    for key in samples[0]:
        row[key] = float(np.median([found[key] for found in samples]))
    speeds = [found['tok_s'] for found in samples]
    return dict(row, tok_s_min=min(speeds), tok_s_max=max(speeds))


def measure(cases, rounds):
    """
    cases: [(labels, run)], where labels is a dict, and run(round) measures once. Runs all of them in every
    round, each between two measurements of the bandwidth -> rows. A case that fails is reported once and left
    out.
    """
    numbers = torch.from_numpy(np.ones(PROBE_BYTES // 4, np.float32))   # from numpy: on huge pages
    measured, failed = [[] for _ in cases], set()
    for done in range(rounds):
        for i, (labels, run) in enumerate(cases):
            if labels.get('model') in failed:
                continue
            progress(f'round {done + 1} of {rounds}, case {i + 1} of {len(cases)}')
            before = bandwidth(numbers, labels['threads'])
            time.sleep(0.02)        # torch's threads may spin that long, and keep a core busy
            try:
                found = run(done)
            except Failed as error:
                failed.add(labels['model'])
                progress()
                print(printable(f'{labels["model"]} is left out: {error}'), file=sys.stderr)
                continue
            found['bandwidth_gb_s'] = (before + bandwidth(numbers, labels['threads'])) / 2
            found['roofline'] = found['gb_per_token'] * found['tok_s'] / found['bandwidth_gb_s']
            measured[i].append(found)
    progress()
    return [median_row(labels, samples) for (labels, _), samples in zip(cases, measured)
            if labels.get('model') not in failed]


def listed(name, text, kind=int, most=2 ** 20):
    """'1,2' -> [1, 2]. Ends the program if it is no such list."""
    try:
        values = [kind(word) for word in text.split(',')]
    except ValueError:
        values = []
    if not values or not all(1 <= value <= most for value in values):
        fail(f'--{name} {text}: must be numbers from 1 to {most}, separated by commas')
    return values


# below, an engine is a pair of labels and run(threads, prompt, tokens)


def llama_engines(config):
    """Ends the program if llama-bench or a model is missing."""
    files = [file for file in config.gguf.split(',') if file]
    if bool(config.llama_bench) != bool(files):
        fail('--llama_bench and --gguf go together: the program, and the models for it')
    if config.llama_bench and not shutil.which(config.llama_bench):
        fail(f'--llama_bench {config.llama_bench}: no such program')
    for file in files:
        if not os.path.exists(file):
            fail(f'--gguf {file}: no such file')
    return [(dict(engine='llama.cpp', model=file), partial(run_llama, config.llama_bench, file))
            for file in files]


def kernel_engines(config, model, saved, threads):
    settings, engines = make_settings(model, saved, listed('reductions', config.reductions, float)), []
    for dtype in config.dtypes.split(','):
        progress(f'packing the model in {dtype}')
        decoder = Decoder(model, dtype, threads)
        engines += [(dict(engine='cwic', dtype=dtype), partial(run_kernel, decoder, setting))
                    for setting in settings]
    return engines


def measure_speed(config):
    """The rows of decode or prefill."""
    prefill, end = config.what[0] == 'prefill', PROMPT + config.tokens
    threads, prompts = listed('threads', config.threads, most=1024), listed('prompts', config.prompts)
    listed('reductions', config.reductions, float)
    others = llama_engines(config)
    model, saved = choose_model(config)
    context = model.config.block_size
    if end > context:
        fail(f'--tokens {config.tokens}: too many after a prompt of {PROMPT}, in a context of {context}')
    prompts = sorted({min(length, context) for length in prompts})
    texts = texts_to_read(config, model, saved, prompts[-1] if prefill else end)
    # before anything is packed: copying takes memory for a second model in f32
    in_torch = [({'engine': 'torch', 'dtype': dtype}, partial(run_torch, dense))
                for dtype, dense in (('f32', model), ('bf16', copy.deepcopy(model).bfloat16()))]
    engines = kernel_engines(config, model, saved, max(threads)) + in_torch + others
    # which part of a text is the prompt, and where it ends
    work = [({'prompt': length}, length, length) for length in prompts] if prefill else [({}, PROMPT, end)]

    def case(labels, prompt, end, run, threads):
        return labels, lambda done: run(threads, texts[done][:prompt], texts[done][prompt:end])

    cases = [case(dict(labels, **engine, threads=t), prompt, end, run, t)
             for labels, prompt, end in work for engine, run in engines for t in threads]
    return finish_rows(measure(cases, config.rounds), prefill)


def finish_rows(rows, prefill):
    """Adds how fast a row is compared with the dense one of the same kind; for prefill, seconds."""
    def kind(row):
        return tuple(row.get(name) for name in ('prompt', 'engine', 'dtype', 'threads'))

    dense = {kind(row): row['tok_s'] for row in rows if row['reduction'] < 1.01}
    for row in rows:
        if prefill:         # many tokens share what is read: bytes per token would be wrong
            del row['gb_per_token'], row['thresholds_gb_per_token'], row['roofline']
            row['seconds'] = row['prompt'] / row['tok_s']
        if kind(row) in dense:
            row['speed_over_dense'] = row['tok_s'] / dense[kind(row)]
    return rows


# -----------------------------------------------------------------------------
# loss


def kernel_forward(decoder):
    """forward(tokens (B, T), dense) -> logits (B, T, vocab), active (M, B, T), one token at a time."""
    def forward(tokens, dense):
        logits, active = [], []
        for sequence in tokens.tolist():
            decoder.reset()
            for token in sequence:
                logits_of_token, active_of_token = decoder.step(token)
                logits.append(torch.from_numpy(logits_of_token))
                active.append(torch.from_numpy(active_of_token))
        shape = *tokens.shape, -1
        return torch.stack(logits).view(shape), torch.stack(active).view(shape).permute(2, 0, 1)
    return forward


def measure_loss(config):
    """
    The rows of loss: validation loss (nats per token) and reduction in each format, token by token through
    the kernel; for an adapter also KL(base || model) and top-1 agreement with the base.
    """
    threads, rows = max(listed('threads', config.threads, most=1024)), []
    model, saved = weights.load(config.model or 'out/best.safetensors')
    length = min((saved.get('options') or {}).get('block_size', 512), model.config.block_size)
    text, meta = read_dataset(config, saved, length)
    windows = evaluate.validation_windows(text, meta, config.windows, length)       # (windows, T + 1)
    base = weights.load(saved['base'])[0] if saved.get('base') else None
    for dtype in config.dtypes.split(','):
        progress(f'packing the model in {dtype}')
        decoder = Decoder(model, dtype, threads)
        model.forward = kernel_forward(decoder)
        found = evaluate.measure(model, windows, base)
        rows.append(dict(engine='cwic', dtype=dtype, threads=decoder.threads, loss=found['val_loss'],
                         **{key: found[key] for key in ('reduction', 'kl', 'agreement') if key in found}))
        rows[-1]['loss_over_first'] = rows[-1]['loss'] - rows[0]['loss']
    return rows


# -----------------------------------------------------------------------------

COLUMNS = (             # title, key in a row, width, format; a column without values is not printed
    ('engine', 'engine', '<14', ''), ('prompt', 'prompt', '>6', ''),
    ('dtype', 'dtype', '<12', ''), ('threads', 'threads', '>7', ''),
    ('reduction', 'reduction', '>9', '.2f'), ('loss', 'loss', '>7', '.4f'),
    ('change', 'loss_over_first', '>7', '+.4f'), ('KL to base', 'kl', '>10', '.4f'),
    ('agreement', 'agreement', '>9', '.3f'), ('tok/s', 'tok_s', '>8', '.1f'),
    ('min', 'tok_s_min', '>8', '.1f'), ('max', 'tok_s_max', '>8', '.1f'),
    ('x dense', 'speed_over_dense', '>7', '.2f'), ('seconds', 'seconds', '>7', '.3f'),
    ('x dense', 'seconds_over_dense', '>7', '.2f'),
    ('GiB', 'memory_gib', '>5', '.1f'), ('GB/token', 'gb_per_token', '>8', '.3g'),
    ('thresholds', 'thresholds_gb_per_token', '>10', '.3g'), ('GB/s', 'bandwidth_gb_s', '>5', '.1f'),
    ('roofline', 'roofline', '>8', '.2f'))


def print_table(rows):
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    print(' '.join(f'{title:{width}}' for title, _, width, _ in columns))
    for row in rows:
        cells = [(format(row[key], form) if key in row else '', width) for _, key, width, form in columns]
        print(' '.join(f'{cell:{width}}' for cell, width in cells))


MEASURES = dict(decode=measure_speed, prefill=measure_speed, loss=measure_loss,
                train=lambda config: measure_train(config, SHAPES.get(config.model)))


def check_file(name, path):
    """Ends the program, before anything is measured, if the file could not be written."""
    folder = os.path.dirname(path) or '.'
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, 'not a file')
    except OSError as error:
        fail(f'--{name}: {path} cannot be written ({error.strerror}); choose another')


def main():
    config, _ = parse_options(BenchConfig, 'python lab/bench.py')
    what = config.what[0] if len(config.what) == 1 else ''
    if what not in MEASURES:
        fail(f'say what to measure, one of {", ".join(MEASURES)}; for example: python lab/bench.py decode')
    if not set(config.dtypes.split(',')) <= FORMATS.keys():
        fail(f'--dtypes {config.dtypes}: choose from {", ".join(FORMATS)}, separated by commas')
    picture = os.path.join(config.out, f'bench_{what}.png') if what == 'decode' else ''
    for name, path in (('json', config.json), ('out', picture)):
        if path:
            check_file(name, path)
    try:
        print(machine(), flush=True)
        rows = [dict(row, what=what) for row in MEASURES[what](config)]
    except (build_kernel.KernelUnavailable, CheckpointError, ValueError) as error:
        fail(error, 1)
    except torch.OutOfMemoryError:
        fail('out of memory; a smaller --batch takes less', 1)
    except KeyboardInterrupt:
        progress()
        sys.exit(130)
    print_table(rows)
    if config.json:
        text = json.dumps({'machine': machine(), 'rows': rows}, indent=1)
        write_atomically(config.json, lambda file: file.write(text.encode()))
    if picture:
        plots.speed(rows, picture, machine())


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    common.run(main)
