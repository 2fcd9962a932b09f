"""
How fast the kernel is, against the memory it reads from and against others.

    python bench.py kernel              # each matrix alone: share of the memory roofline
    python bench.py decode              # tokens/s, beside PyTorch with dense weights
    python bench.py decode --llama_bench PATH --gguf gpt2-f32.gguf,gpt2-q8_0.gguf
    python bench.py train               # a CWIC training step against the same step dense
    python bench.py train --model gpt2 --compile        # ... of a 124M model, on a GPU
    python bench.py decode --model out/best.pt
    python bench.py loss                # what narrower weights cost: validation loss of each format

Reading weights is what decoding waits for, and memory's speed swings as neighbours come and go. So every measurement has
a bandwidth probe just before and just after it, all cases take turns in rounds, and medians are reported with their
spread:

    roofline = bytes of weights per token x tokens/s / bandwidth             1 is as fast as memory allows

The model is GPT-2's smallest (124M) in shape, its weights random: speed does not depend on them. Thresholds are set
layer by layer, from the inputs of random tokens, to the quantile that leaves 1 / reduction of each input's values active;
the reduction reported is the one counted. With --model a checkpoint is measured with its own thresholds, and dense.

But: batch 1, decoding only; what is counted as read are weights, not thresholds, scales, or the KV cache.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import build_kernel
from cwic import GPT, CheckpointError, CWICConfig, KVCache, dense_copy, load_checkpoint
from decoder import Decoder
from device import check_compile, choose_device, choose_dtype, keep_memory
from options import fail, option, parse_options

HERE = Path(__file__).parent
GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
BYTES = {'f32': 4, 'bf16': 2, 'int8': 1}
PROMPT = 16             # tokens in the cache when decoding begins


@dataclass
class BenchConfig:
    """Measures speed. The first argument says of what: kernel, decode or train; or loss, what narrower weights cost."""
    model: str = option('', 'gpt2, in shape only, or a checkpoint of ours; left out: gpt2, but for train its default model, for loss out/best.pt')
    stripe: int = option(768, 'columns in a stripe of the gpt2 shape')
    reductions: str = option('1,2,3,4,6', 'dense / active weights, for the gpt2 shape')
    dtypes: str = option('f32,bf16,int8', 'formats of the weights')
    threads: str = option('1,2', 'numbers of threads')
    rounds: int = option(7, 'measurements of each case')
    tokens: int = option(16, 'tokens decoded in each measurement')
    llama_bench: str = option('', 'llama.cpp\'s llama-bench, to compare with')
    gguf: str = option('', 'its models, separated by commas')
    data: str = option('python', 'folder in data/ whose val.bin the loss is measured on')
    windows: int = option(16, 'windows of it, each as long as the context')
    device: str = option('auto', 'for train: auto, cpu, cuda or mps; all else runs on the CPU')
    compile: bool = option(False, 'for train: as torch.compile makes it')
    batch: int = option(0, 'for train: sequences in a step; 0: as many as train.py would take')
    json: str = option('', 'file for every row, as JSON')
    out: str = option('out', 'where the pictures go')


def machine():
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            name = next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    version = subprocess.run([*build_kernel.compiler(), '--version'], capture_output=True, text=True).stdout
    return (f'{name}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, '
            + version.splitlines()[0])


# -----------------------------------------------------------------------------
# what is measured


def gpt2_shape(stripe, seed=0):
    torch.manual_seed(seed)
    stripes = {f'stripe_{name}': stripe for name in ('qkv', 'out', 'up', 'down', 'head')}
    return GPT(CWICConfig(**GPT2, **stripes)).eval()


@torch.no_grad()
def calibrate(model, reduction, tokens, check):
    """
    Sets statistics and thresholds of every layer from the inputs that tokens (B, T) give it, the layers before being set;
    then all of them so that check (B', T), other tokens, gets the reduction asked for.
    """
    def set_thresholds(linear, args):
        x = args[0].flatten(0, 1)                                           # (B * T, in)
        linear.mu.copy_(x.mean(0))
        linear.sigma.fill_(1)
        t = torch.full_like(linear.mu, -1)                                  # everything is active
        if reduction > 1:
            t = torch.quantile((x - linear.mu).abs(), 1 - 1 / reduction, dim=0)
        linear.theta.copy_((t / linear.scale).expand_as(linear.theta))

    hooks = [linear.register_forward_pre_hook(set_thresholds) for _, linear in model.linears()]
    model(tokens)
    for hook in hooks:
        hook.remove()
    # other tokens find it a little too sparse or too dense, layer upon layer: one factor for all thresholds mends that
    linears, low, high = [linear for _, linear in model.linears()], 0.6, 1.6
    thetas = [linear.theta.clone() for linear in linears]
    for _ in range(7 if reduction > 1 else 0):
        middle = (low + high) / 2
        for linear, theta in zip(linears, thetas):
            linear.theta.copy_(theta * middle)
        too_sparse = model.dense() / model(check)[1].sum(0)[:, PROMPT:].mean() > reduction
        low, high = (low, middle) if too_sparse else (middle, high)


class Setting:
    """What differs between reductions: thresholds, mu and base of every matrix; and a prompt's cache, read with them."""

    @torch.no_grad()
    def __init__(self, model, prompt):
        self.arrays, self.cache, self.inputs, hooks = [], KVCache(model.config), {}, []
        for name, linear in model.linears():
            base = linear.mu @ linear.weight + (0 if linear.bias is None else linear.bias)
            self.arrays.append([a.detach().numpy().copy() for a in (linear.thresholds(), linear.mu, base)])
            hooks.append(linear.register_forward_pre_hook(
                lambda module, args, name=name: self.inputs.__setitem__(name, args[0][0, -1].numpy())))
        model(prompt, self.cache)           # and keeps what its last token gave each matrix, for measuring that alone
        for hook in hooks:
            hook.remove()

    def put_into(self, decoder):
        for packed, arrays in zip(decoder.packed.values(), self.arrays):
            for old, new in zip(packed.arrays[1:4], arrays):
                old[:] = new
        decoder.cache = self.cache


class Probe:
    """How many GB/s the decoder's own threads can read at this moment, from more memory than any cache holds."""

    def __init__(self):
        self.data = np.ones(32 << 20, np.uint64)                            # 256 MiB

    def __call__(self, decoder):
        start = time.perf_counter()
        decoder.lib.read_all(decoder.team, decoder.ffi.from_buffer('uint64_t[]', self.data), self.data.size)
        return self.data.nbytes / (time.perf_counter() - start) / 1e9


def decode(decoder, tokens):
    """Seconds per token, and active weights per token, for tokens after the prompt in the cache."""
    decoder.cache.length, active = PROMPT, 0
    start = time.perf_counter()
    for token in tokens:
        active += decoder.step(token)[1].sum()
    return (time.perf_counter() - start) / len(tokens), active / len(tokens)


def run_matrices(decoder, kind, inputs):
    """The same for all matrices of one kind alone, one after the other."""
    linears = [(name, linear) for name, linear in decoder.model.linears() if name.split('.')[-1] == kind]
    structs = [decoder.ffi.new('Linear *', decoder.packed[name].struct) for name, _ in linears]
    x = [np.ascontiguousarray(inputs[name]) for name, _ in linears]
    y, active = np.empty(linears[0][1].n_out, np.float32), np.empty((len(linears), 1), np.int64)
    number = {'f32': decoder.lib.F32, 'bf16': decoder.lib.BF16, 'int8': decoder.lib.INT8}[decoder.dtype]
    buffer = decoder.ffi.from_buffer
    arguments = [(decoder.team, struct, number, buffer('float[]', one), buffer('float[]', y), buffer('int64_t[]', count))
                 for struct, one, count in zip(structs, x, active)]
    start = time.perf_counter()
    for a in arguments:
        decoder.lib.matvec(*a)
    return time.perf_counter() - start, active.sum()


@torch.no_grad()
def torch_decode(model, dtype, tokens):
    """Seconds per token of the dense model in PyTorch, with a KV cache."""
    cache = KVCache(model.config)
    cache.k, cache.v, cache.length = cache.k.to(dtype), cache.v.to(dtype), PROMPT
    start = time.perf_counter()
    for token in tokens:
        model(torch.tensor([[token]]), cache, dense=True)
    return (time.perf_counter() - start) / len(tokens)


def llama_decode(config, gguf, threads):
    """(tokens/s, bytes of the model, its format) of llama.cpp."""
    command = [config.llama_bench, '-m', gguf, '-p', '0', '-n', str(config.tokens), '-d', str(PROMPT), '-t', str(threads),
               '-r', '1', '-o', 'json']
    try:
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[0]
    except OSError as error:
        fail(f'--llama_bench {config.llama_bench}: {error.strerror}')
    except (subprocess.CalledProcessError, ValueError, IndexError):
        fail(f'{gguf} could not be measured; to see why, run: ' + ' '.join(command), 1)
    return row['avg_ts'], row['model_size'], row['model_type'].split()[-1]


# -----------------------------------------------------------------------------


def make_settings(config):
    """The model, and {reduction asked for: Setting}."""
    if config.model not in ('', 'gpt2'):
        model, _ = load_checkpoint(config.model)
        prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
        own = Setting(model, prompt)
        for _, linear in model.linears():
            linear.theta.data.fill_(-1)
        return model, {1.0: Setting(model, prompt), 'its own': own}
    model, settings = gpt2_shape(config.stripe), {}
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    samples = torch.randint(model.config.vocab_size, (26, PROMPT + config.tokens))
    for reduction in [float(r) for r in config.reductions.split(',')]:
        calibrate(model, reduction, samples[2:], samples[:2])
        settings[reduction] = Setting(model, prompt)
    return model, settings


def make_cases(what, config, settings):
    """Everything to be measured, each a dict that will become a row."""
    threads, dtypes = [int(t) for t in config.threads.split(',')], config.dtypes.split(',')
    matrices = ['qkv', 'out', 'up', 'down', 'head'] if what == 'kernel' else ['']
    cases = [dict(engine='cwic', matrix=matrix, dtype=dtype, threads=t, asked=r)
             for matrix in matrices for dtype in dtypes for t in threads for r in settings]
    if what == 'decode':
        cases += [dict(engine='torch', dtype=dtype, threads=t) for dtype in ('f32', 'bf16') for t in threads]
        files = config.gguf.split(',') if config.llama_bench and config.gguf else []
        cases += [dict(engine='llama.cpp', gguf=file, threads=t) for file in files for t in threads]
    return [dict(case, speeds=[], bandwidths=[], rooflines=[]) for case in cases]


def measure(what, config):
    """The rows of the table: every case in every round, between two probes."""
    model, settings = make_settings(config)
    cases = make_cases(what, config, settings)
    decoders = {dtype: Decoder(model, dtype, 1) for dtype in config.dtypes.split(',')}
    narrow = GPT(model.config).eval()
    narrow.load_state_dict(model.state_dict())
    dense_models = {'f32': (model, torch.float32), 'bf16': (narrow.bfloat16(), torch.bfloat16)}
    dense = next(iter(decoders.values())).dense
    names = [name.split('.')[-1] for name, _ in model.linears()]
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, config.tokens).tolist()
    probe = Probe()
    for done in range(config.rounds):
        print(f'\rround {done + 1} of {config.rounds}', end='', file=sys.stderr, flush=True)
        for case in cases:
            decoder = decoders[case['dtype']] if case['engine'] == 'cwic' else next(iter(decoders.values()))
            if decoder.threads != case['threads']:
                decoder.hire(case['threads'])
            if case['engine'] == 'cwic':
                settings[case['asked']].put_into(decoder)
            torch.set_num_threads(case['threads'])
            before, case['reduction'] = probe(decoder), 1.0
            if case['engine'] == 'torch':
                seconds = torch_decode(*dense_models[case['dtype']], tokens)
                gb = float(dense.sum()) * BYTES[case['dtype']] / 1e9
            elif case['engine'] == 'llama.cpp':
                speed, size, case['dtype'] = llama_decode(config, case['gguf'], case['threads'])
                seconds, gb = 1 / speed, size / 1e9
            else:
                if what == 'decode':
                    seconds, active = decode(decoder, tokens)
                else:
                    seconds, active = run_matrices(decoder, case['matrix'], settings[case['asked']].inputs)
                whole = sum(d for d, name in zip(dense, names) if case['matrix'] in ('', name))
                case['reduction'], gb = float(whole / active), float(active) * BYTES[case['dtype']] / 1e9
            bandwidth = (before + probe(decoder)) / 2
            case['gb_per_token'] = gb
            case['speeds'].append(1 / seconds)
            case['bandwidths'].append(bandwidth)
            case['rooflines'].append(gb / seconds / bandwidth)
    print(file=sys.stderr)
    rows = []
    for case in cases:
        speed = float(np.median(case['speeds']))
        keys = ('engine', 'matrix', 'dtype', 'threads', 'reduction', 'gb_per_token')
        rows.append(dict(what=what, **{key: case[key] for key in keys if case.get(key)}, tok_s=speed, seconds=1 / speed,
                         tok_s_min=min(case['speeds']), tok_s_max=max(case['speeds']),
                         bandwidth_gb_s=float(np.median(case['bandwidths'])), roofline=float(np.median(case['rooflines']))))
    return rows


def disagreement(model, tokens):
    """
    ||gradients here - gradients on the CPU|| / ||gradients on the CPU|| of one CWIC step in f32: of the weights, and of the
    thresholds. In a sparse model it is more than rounding: one of its millions of comparisons turns out the other way, and so
    changes what follows. Weights moved by 3e-7 of themselves, all else on one CPU, do as much.
    """
    import train
    gradients = []
    for twin in (model, dense_copy(model).cpu()):
        twin.train().requires_grad_().zero_grad()
        some = tokens[:1, :65].to(twin.wpe.weight.device)
        train.backward(twin, None, some[:, :-1], some[:, 1:], dense=False, teacher_share=0.0, price=1e-9, share=1.0, recompute=False)
        gradients.append({name: p.grad.cpu() for name, p in twin.named_parameters()})
    here, on_cpu = ([torch.cat([g.flatten() for name, g in one.items() if name.endswith('theta') == thetas]) for thetas in (False, True)]
                    for one in gradients)
    return [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(here, on_cpu)]


def measure_train(config):
    """
    Seconds of an optimiser step: dense, CWIC with thresholds that skip two thirds, and that with a dense teacher. The model
    is train.py's default; or what config/gpt2_124m_scratch.toml has, where a step of each of eight GPUs is 4 micro-batches.
    Tokens are random.
    """
    import train
    if config.model not in ('', 'gpt2'):
        fail(f'--model {config.model}: training is measured without it, or with --model gpt2')
    preset = [str(HERE / 'config/gpt2_124m_scratch.toml')] if config.model == 'gpt2' else []
    options = parse_options(train.TrainConfig, 'python bench.py train', presets=True, argv=preset)
    keep_memory()
    device = choose_device(config.device)
    dtype, _ = choose_dtype('auto', device)
    sizes = {name: getattr(options, name) for name in CWICConfig.__dataclass_fields__ if name != 'vocab_size'}
    vocab_size = GPT2['vocab_size'] if preset else CWICConfig.vocab_size
    torch.manual_seed(0)
    model = GPT(CWICConfig(vocab_size=vocab_size, **sizes)).to(device)
    batch = config.batch or options.batch_size // (8 if preset else 1)
    tokens = torch.randint(vocab_size, (batch, options.block_size + 1)).to(device)
    in_use = disagreement(model, tokens)[:1] if device != 'cpu' else []        # no statistics yet: every input is in use
    calibrate(model, 3.0, tokens[:1, :-1], tokens[:1, :-1].flip(1))
    sparse = disagreement(model, tokens) if device != 'cpu' else []
    teacher, head_loss = dense_copy(model), train.head_loss
    model.train()
    if config.compile:
        check_compile(device)
        head_loss = torch.compile(head_loss)
        for block in [*model.blocks, *teacher.blocks]:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0, 0.0), fused=device != 'mps')     # all the work, but nothing moves
    nothing_seen = [torch.zeros(4, linear.n_in, device=device) for _, linear in model.linears()]
    name = torch.cuda.get_device_name() if device == 'cuda' else f'{device}, {torch.get_num_threads()} threads'
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    cases = [dict(what='train', engine=mode, dtype=str(dtype).split('.')[-1], device=device, device_name=name, compiled=config.compile,
                  batch=batch, block_size=options.block_size, micro_batch=options.micro_batch, disagreement=in_use + sparse,
                  memory_gib=0.0, all_seconds=[])
             for mode in ('dense', 'cwic', 'cwic + teacher')]
    for done in range(config.rounds + 2):
        for case in cases:
            dense = case['engine'] == 'dense'
            if device == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            start = time.perf_counter()
            optimizer.zero_grad()
            for some in tokens.split(options.micro_batch):
                with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                    _, active, _ = train.backward(
                        model, teacher if 'teacher' in case['engine'] else None, some[:, :-1], some[:, 1:], dense=dense, price=1e-12,
                        teacher_share=float('teacher' in case['engine']), share=1.0, recompute=False, head_loss=head_loss)
            before = [linear.theta.detach().clone() for _, linear in model.linears()]
            optimizer.step()
            if not dense:
                model.limit_thresholds(before)
                model.update_statistics(nothing_seen)
            synchronize()
            if done > 1:                                                    # the first rounds compile and warm up
                case['all_seconds'].append(time.perf_counter() - start)
            case['reduction'] = float(model.dense() / active.sum())         # of the last micro-batch
            if device == 'cuda':
                case['memory_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30
    count = batch * options.block_size
    for case in cases:
        seconds = case.pop('all_seconds')
        median = float(np.median(seconds))
        case.update(seconds=median, tok_s=count / median, tok_s_min=count / max(seconds), tok_s_max=count / min(seconds))
    return cases


def measure_loss(config):
    """Validation loss (nats per token) and reduction of a checkpoint in each format, token by token through the kernel."""
    model, _ = load_checkpoint(config.model or 'out/best.pt')
    length = model.config.block_size
    try:
        data = np.memmap(HERE / 'data' / config.data / 'val.bin', np.uint16, 'r')
    except OSError as error:
        fail(f'data/{config.data}/val.bin: {error.strerror}; run: python data/{config.data}/prepare.py', 1)
    starts = np.linspace(0, len(data) - length - 1, config.windows).astype(np.int64)
    rows = []
    for dtype in config.dtypes.split(','):
        decoder = Decoder(model, dtype, max(int(t) for t in config.threads.split(',')))
        loss, active, start_time = 0.0, 0, time.perf_counter()
        for start in starts:
            decoder.reset()
            for token, target in zip(data[start:start + length].tolist(), data[start + 1:start + length + 1].tolist()):
                logits, used = decoder.step(token)
                loss -= float(torch.from_numpy(logits).double().log_softmax(0)[target])
                active += used.sum()
        count = len(starts) * length
        rows.append(dict(what='loss', engine='cwic', dtype=dtype, threads=decoder.threads, loss=loss / count,
                         reduction=float(decoder.dense.sum() * count / active), seconds=time.perf_counter() - start_time))
    return rows


def table(rows):
    if rows[0]['what'] == 'loss':
        for r in rows:
            change = r['loss'] - rows[0]['loss']
            print(f'{r["dtype"]:5} loss {r["loss"]:.4f} nats ({change:+.4f} against {rows[0]["dtype"]}), '
                  f'reduction {r["reduction"]:.3f}')
        return
    if rows[0]['what'] == 'train':
        r = rows[0]
        print(f'{r["device_name"]}; {r["batch"]} x {r["block_size"]} tokens, at most {r["micro_batch"]} sequences at once; {r["dtype"]}, '
              + ('compiled' if r['compiled'] else 'not compiled'))
        for r in rows:
            memory = f', {r["memory_gib"]:.1f} GiB' if r['memory_gib'] else ''
            print(f'{r["engine"]:14} {r["seconds"]:.4f} s a step, {r["tok_s"]:7.0f} tok/s ({r["tok_s_min"]:.0f} to {r["tok_s_max"]:.0f}), '
                  f'{r["seconds"] / rows[0]["seconds"]:.2f}x the dense step, reduction {r["reduction"]:.2f}{memory}')
        if r['disagreement']:
            print('gradients of a step in float32 are within {:.0e} of the CPU\'s with every input in use; sparse, where a comparison may turn, '
                  'within {:.0e} (weights) and {:.0e} (thresholds)'.format(*r['disagreement']))
        return
    print('engine    matrix dtype threads reduction    tok/s      min      max x dense GB/token  GB/s roofline')
    key = lambda r: (r.get('matrix'), r['engine'], r['dtype'], r['threads'])
    dense = {key(r): r['tok_s'] for r in rows if r['reduction'] < 1.01}
    for r in rows:
        gain = f'{r["tok_s"] / dense[key(r)]:7.2f}' if key(r) in dense else ' ' * 7
        print(f'{r["engine"]:9} {r.get("matrix", ""):6} {r["dtype"]:5} {r["threads"]:7} {r["reduction"]:9.2f} '
              f'{r["tok_s"]:8.1f} {r["tok_s_min"]:8.1f} {r["tok_s_max"]:8.1f} {gain} '
              f'{r["gb_per_token"]:8.4f} {r["bandwidth_gb_s"]:5.1f} {r["roofline"]:8.2f}')


def plot(what, rows, path):
    """Speed over reduction, a line for each dtype and number of threads; other engines as level lines."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    colours = {'f32': '#1f4e9c', 'bf16': '#2c8c4c', 'int8': '#b8431f'}
    ours = [r for r in rows if r['engine'] == 'cwic' and r.get('matrix', 'up') == 'up']
    most = max(r['threads'] for r in rows)
    for dtype, threads in dict.fromkeys((r['dtype'], r['threads']) for r in ours):
        line = [r for r in ours if (r['dtype'], r['threads']) == (dtype, threads)]
        style = dict(color=colours[dtype], ls='-' if threads == most else ':', marker='o', ms=4,
                     label=f'{dtype}, {threads} thread' + 's' * (threads > 1))
        reduction, speed = [r['reduction'] for r in line], np.array([r['tok_s'] for r in line])
        spread = [speed - [r['tok_s_min'] for r in line], [r['tok_s_max'] for r in line] - speed]
        left.errorbar(reduction, speed, spread, capsize=2, **style)
        right.plot(reduction, [r['roofline'] for r in line], **style)
    others = sorted((r for r in rows if r['engine'] != 'cwic' and r['threads'] == most), key=lambda r: r['tok_s'])
    for i, r in enumerate(others):
        left.axhline(r['tok_s'], color='0.7', lw=1, zorder=0)
        left.annotate(f'{r["engine"]} {r["dtype"]}', (0.99 - 0.17 * (i % 4), r['tok_s']), va='bottom', ha='right',
                      xycoords=('axes fraction', 'data'), fontsize=8, color='0.4')
    whole = what == 'decode'
    subject, unit = ('Decoding', 'tokens per second') if whole else ('All up matrices, alone', 'passes per second')
    left.set(title=f'{subject}: median and spread', xlabel='reduction (dense / active weights)', ylabel=unit, ylim=0)
    right.set(title='Share of the memory roofline', xlabel='reduction (dense / active weights)',
              ylabel='bytes of weights x speed / bandwidth', ylim=0)
    right.axhline(1, color='0.7', lw=1, zorder=0)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(machine(), fontsize=8, color='0.4')
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    argv = sys.argv[1:]
    what = argv.pop(0) if argv and not argv[0].startswith('-') else ''
    config = parse_options(BenchConfig, 'python bench.py kernel|decode|train|loss', argv=argv)
    measures = {'kernel': lambda: measure(what, config), 'decode': lambda: measure(what, config),
                'train': lambda: measure_train(config), 'loss': lambda: measure_loss(config)}
    if what not in measures:
        fail('say what to measure: python bench.py kernel, decode, train or loss')
    try:
        print(machine())
        rows = measures[what]()
    except (build_kernel.KernelUnavailable, CheckpointError, ValueError) as error:
        fail(error, 1)
    table(rows)
    if what in ('kernel', 'decode'):
        os.makedirs(config.out, exist_ok=True)
        plot(what, rows, os.path.join(config.out, f'bench_{what}.png'))
    if config.json:
        with open(config.json, 'w', encoding='utf-8') as f:
            json.dump({'machine': machine(), 'rows': rows}, f, indent=1)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
