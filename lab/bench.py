"""
How fast the kernel is, against the memory it reads from and against others.

    python lab/bench.py decode                          # tokens/s, beside PyTorch with dense weights
    python lab/bench.py decode --llama_bench PATH --gguf f32.gguf,q8_0.gguf         # and beside llama.cpp
    python lab/bench.py decode --model adapters/smollm2.safetensors      # a real model, reading real text
    python lab/bench.py decode --stripe 64,320,matrix   # what wider stripes gain; the last: one to a matrix
    python lab/bench.py probe                           # what bounds decoding: rows alone, and a token's time
    python lab/bench.py prefill                         # prompts of several lengths: time to the first token
    python lab/bench.py train                           # training steps, on one GPU or several: bench_train.py
    python lab/bench.py loss --model out/best.safetensors        # what narrower weights cost in validation loss

Decoding waits for weights, and memory's speed swings as neighbours come and go. So all cases take turns in
rounds, each with a probe of the bandwidth just before and just after it; every round has a text of its own;
and medians are reported with their spread:

    roofline = bytes read per token x tokens/s / bandwidth          1 is as fast as memory allows

Read are the active weights and all thresholds, with int8 also all scales. The shapes gpt2-shape (124M) and
smollm2-shape (135M) have random weights, on which speed does not depend, and quantiles for thresholds; the
reduction reported is the one counted. Other models are measured dense, and with thresholds of their own if
they have any.

Not here: batches of sequences. Not counted: what else a token reads (keys and values, mu, biases, norms).
"""

import os
import signal
import sys

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C while torch is imported, for seconds
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # the repository, for the imports below

import build_kernel
import cwic
import evaluate
import plots
import weights
from checkpoint import CheckpointError
from cwic import GPT, CWICConfig, KVCache
from data import common
from decoder import FORMATS, Decoder, PackedMatrix, pointer
from device import ProcessGone
from files import write_atomically
from lab.bench_train import measure_train, start_processes
from lab.methods import calibrate, gates, hooked
from options import counted, fail, option, parse_options, printable, progress
from tokenizer import load_tokenizer, start_ids

PROMPT = 16                     # tokens in the cache when decoding begins
PROBE_BYTES = 2 ** 29           # more than most caches hold
WIDTHS = (576, 768, 960, 1536, 2304, 3072)      # columns of rows that are probed, besides a model's own
WIDEST = 2 ** 20                # columns: a stripe that holds any matrix
KINDS = ('qkv', 'out', 'up', 'down', 'head')
SHAPES = {                      # in stripes as weights.py cuts the released models
    'gpt2-shape': CWICConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768,
                             stripe_qkv=768, stripe_out=768, stripe_up=768, stripe_down=768,
                             stripe_head=2048),
    'smollm2-shape': weights.llama_config(vocab_size=49152, context=2048, n_layer=30, n_head=9, n_kv_head=3,
                                          head_dim=64, n_embd=576, n_hidden=1536)}


@dataclass
class BenchConfig:
    about = 'Measures speed: of the kernel, decoding, reading prompts, training; or what narrow weights cost.'
    what: tuple = option((), 'decode, probe, prefill, train or loss')
    model: str = option('', f'{", ".join(SHAPES)}, or all that weights.py loads: smollm2, a checkpoint, ...; '
                        'left out: gpt2-shape, for train its default model, for loss out/best.safetensors')
    stripe: str = option('', 'decode, prefill: columns in the stripes of a shape, or matrix, for one stripe '
                         'to each; left out: as in the released model')
    reductions: str = option('1,2,3,4,6', 'dense / active weights, for shapes')
    dtypes: str = option('f32,bf16,int8', 'formats of the weights')
    threads: str = option('1,2', 'numbers of threads; loss takes the largest')
    rounds: int = option(7, 'measurements of each case', at_least=1)
    tokens: int = option(32, 'decode: tokens in each measurement', at_least=1)
    prompts: str = option('16,64,256,1000', 'prefill: lengths of the prompts')
    llama_bench: str = option('', "decode, prefill: llama.cpp's llama-bench, to compare with")
    gguf: str = option('', 'its models, separated by commas')
    ctranslate2: str = option('', 'decode, prefill: a model converted for CTranslate2, to compare with')
    data: str = option('', 'folder in data/ whose validation split is read; left out: for loss the one the '
                       'model was trained with, else text that the model writes itself')
    windows: int = option(16, 'loss: windows of it, as long as the training windows were', at_least=1)
    device: str = option('auto', 'train: auto, cpu, cuda or mps; all else runs on the CPU')
    compile: bool = option(False, 'train: as torch.compile makes it')
    batch: int = option(0, "train: sequences in a step; 0: the preset's, or four micro-batches", at_least=0)
    processes: int = option(1, 'train: GPUs, or processes of a CPU, that share each step; compared with one',
                            at_least=1)
    json: str = option('', 'file for all results')
    out: str = option('out', 'where the picture of decode goes')


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
# what is measured


def choose_model(config, stripe=0):
    """-> (model in eval mode, what else its file says: nothing of a shape); stripe: of a shape, 0: its own"""
    name = config.model or 'gpt2-shape'
    if name not in SHAPES:
        return weights.load(name)
    torch.manual_seed(0)
    return GPT(replace(SHAPES[name], **{f'stripe_{kind}': stripe for kind in KINDS if stripe})).eval(), {}


def read_dataset(name, saved, length):
    """Tokens of the validation split of data/NAME, and its meta. Raises DataError."""
    _, val, meta = common.load_dataset(name, length)
    if meta['tokenizer'] != saved['tokenizer']:
        raise common.DataError(f'data/{name} was made with another tokenizer than the model has')
    return val, meta


def texts_to_read(config, model, saved, count):
    """
    A text for each round, as one may take half the compute of another: lists of so many token ids. Random for
    a shape, else from --data, evenly spread, or documents that the model writes.
    """
    generator = torch.Generator().manual_seed(0)
    if not saved:
        return torch.randint(model.config.vocab_size, (config.rounds, count), generator=generator).tolist()
    if config.data:
        data, meta = read_dataset(config.data, saved, count)
        window = meta.get('window', 1)
        starts = np.linspace(0, (len(data) - count) // window, config.rounds).astype(np.int64) * window
        return [data[start:start + count].tolist() for start in starts]
    decoder, spec = Decoder(model, 'int8'), saved['tokenizer']
    texts = [start_ids(spec, load_tokenizer(spec)) for _ in range(config.rounds)]
    for text in counted(texts, 'texts written'):
        logits, _ = decoder.prefill(text)       # begins anew
        while len(text) < count:
            point = torch.rand(1, generator=generator)
            # as documents are drawn in data/selfwritten
            text += cwic.sample(torch.from_numpy(logits)[None], point, 1.0, min_p=0.05)[0].tolist()
            logits, _ = decoder.step(text[-1])
    return texts


class Setting:
    """
    One way to use a model, dense or with the thresholds it has now: what the kernel gets for it besides the
    weights, and what each matrix is multiplied with after a prompt, a list of token ids.
    """

    @torch.no_grad()
    def __init__(self, model, dense, prompt):
        self.tensors, self.inputs = {}, {}
        self.margin = 0.0 if dense else model.head.margin_in_nats()

        def remember(name, layer, args):        # x, dense; of neurons x, z, dense: z comes first
            self.inputs[name] = [x[0, -1].clone() for x in args[-2::-1]]

        for name, layer in model.sparse_layers():
            tensors = PackedMatrix(layer, dense=dense).tensors
            self.tensors[name] = {key: tensors[key] for key in ('thresholds', 'mu', 'base')}
        with hooked([(layer, partial(remember, name)) for name, layer in model.sparse_layers()]):
            model(torch.tensor([prompt]), dense=dense)

    def prepare(self, decoder, threads):
        if decoder.threads != threads:
            decoder.set_threads(threads)
        for name, tensors in self.tensors.items():
            for key, values in tensors.items():
                decoder.packed[name].tensors[key].copy_(values)
        decoder.c_model.margin = self.margin


def make_settings(model, saved, reductions, prompt):
    """A shape at each of the reductions; another model dense, and as it is."""
    if saved:
        sparse = any(float(layer.theta.detach().max()) > 0 for _, layer in model.sparse_layers())
        return [Setting(model, dense, prompt) for dense in (True, False) if dense or sparse]
    settings, tokens = [], torch.randint(model.config.vocab_size, (24, PROMPT + 32))
    for reduction in counted(reductions, 'reductions calibrated'):
        calibrate(model, (tokens,), dict.fromkeys(gates(model), 1 / reduction), centred=True)
        settings.append(Setting(model, reduction == 1, prompt))
    return settings


def on_huge_pages(decoder):
    """How much of the memory around a decoder's weights lies on huge pages, in words."""
    tensors = [packed.tensors['weight'] for packed in decoder.packed.values()]
    middle = (tensors[0].data_ptr() + tensors[-1].data_ptr()) // 2
    try:
        regions = Path('/proc/self/smaps').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return 'unknown'
    for low, high, region in re.findall(r'^([0-9a-f]+)-([0-9a-f]+) (.*?)^VmFlags', regions, re.M | re.S):
        if int(low, 16) <= middle < int(high, 16):
            kib = {name: int(number) for name, number in re.findall(r'(\w+): +(\d+) kB', region)}
            return f'{100 * kib["AnonHugePages"] / kib["Rss"]:.0f}%'
    return 'unknown'


# -----------------------------------------------------------------------------
# one measurement of each engine


class Failed(Exception):
    """Another engine that could not be measured, in one line."""


def reading(tok_s, weights, thresholds=0, reduction=1.0, **more):
    """What stands in a row. weights, thresholds: bytes that are read for each token."""
    return dict(more, tok_s=tok_s, reduction=reduction, gb_per_token=(weights + thresholds) / 1e9,
                thresholds_gb_per_token=thresholds / 1e9)


def kernel_reading(decoder, active, tokens, seconds):
    """active: weights that so many tokens used, together."""
    tensors = [packed.tensors for packed in decoder.packed.values()]
    thresholds = sum(x[key].nbytes for x in tensors for key in ('thresholds', 'row_scale', 'column_scale')
                     if key in x)
    weights = active / tokens * FORMATS[decoder.dtype].itemsize
    return reading(tokens / seconds, weights, thresholds, int(decoder.n_weights.sum()) * tokens / max(active, 1))


def run_matrices(decoder, setting, threads):
    """All matrices, one after the other, with nothing between them: a pass over them counts as a token."""
    setting.prepare(decoder, threads)
    ffi, y = decoder.ffi, torch.empty(max(packed.sizes['n_out'] for packed in decoder.packed.values()))
    active, calls, inputs = torch.zeros(len(decoder.names), dtype=torch.int64), [], []
    for name, count in zip(decoder.names, active):
        inputs.append([x.clone() for x in setting.inputs[name]])
        x, h = [*(pointer(ffi, x) for x in inputs[-1]), ffi.NULL][:2]
        calls.append((decoder.team, ffi.new('Matrix *', decoder.packed[name].struct(ffi)),
                      list(FORMATS).index(decoder.dtype), 1, x, h, pointer(ffi, y), pointer(ffi, count)))
    decoder.lib.multiply_alone(*calls[-1])          # wakes the threads
    start = time.perf_counter()
    for call in calls:
        decoder.lib.multiply_alone(*call)
    seconds = time.perf_counter() - start
    return kernel_reading(decoder, int(active.sum()), 1, seconds)


def run_kernel(decoder, setting, threads, prompt, tokens):
    """Reads a prompt and then tokens, one at a time: these are timed, or where there are none, the prompt."""
    setting.prepare(decoder, threads)
    start = time.perf_counter()
    _, active = decoder.prefill(prompt)
    if tokens:
        start = time.perf_counter()
        active = [decoder.step(token)[1] for token in tokens]
    seconds = time.perf_counter() - start
    return kernel_reading(decoder, int(np.sum(active)), len(active), seconds)


@torch.no_grad()
def run_torch(model, threads, prompt, tokens):
    """The same in PyTorch, with every weight. As elsewhere a prompt gets logits for its last token only."""
    torch.set_num_threads(threads)
    dtype = model.head.weight.dtype
    cache, start = KVCache(model.config, dtype=dtype), time.perf_counter()
    for i, ids in enumerate([prompt, *([token] for token in tokens)]):
        if i == 1:
            start = time.perf_counter()
        hidden, _ = model.trunk(torch.tensor([ids]), cache, dense=True)
        model.head(hidden[:, -1:], dense=True)
    return reading(len(tokens or prompt) / (time.perf_counter() - start), model.n_weights() * dtype.itemsize)


def run_llama(program, file, threads, prompt, tokens):
    """The same in llama.cpp. Raises Failed."""
    lengths = ['-p', 0, '-n', len(tokens), '-d', len(prompt)] if tokens else ['-p', len(prompt), '-n', 0]
    command = [*map(str, [program, '-m', file, *lengths, '-t', threads]), '-r', '1', '-o', 'json']
    # its threads wait for each other spinning; told otherwise, as torch is in some shells, they are slow
    spinning = {name: value for name, value in os.environ.items() if name != 'OMP_WAIT_POLICY'}
    try:
        done = subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace', env=spinning)
        row = json.loads(done.stdout)[0]
        return reading(row['avg_ts'], row['model_size'], dtype=row['model_type'].split()[-1])
    except OSError as error:
        raise Failed(f'{program}: {error.strerror}') from None
    except (ValueError, LookupError, TypeError):
        raise Failed(f'ended with code {done.returncode}; to see why, run: {" ".join(command)}') from None


def run_ctranslate2(folder, threads, prompt, tokens):
    """The same in CTranslate2. Raises Failed."""
    def seconds(count):
        start = time.perf_counter()
        generator.generate_batch([words], max_length=count, min_length=count, include_prompt_in_result=False)
        return time.perf_counter() - start

    try:
        import ctranslate2
        generator = ctranslate2.Generator(folder, intra_threads=threads)
        vocabulary = json.loads(Path(folder, 'vocabulary.json').read_text(encoding='utf-8'))
        words = [vocabulary[token] for token in prompt]
        # the prompt, and one token that needs no step; at first also the memory for it
        prefill = min(seconds(1) for _ in range(3))
        speed = len(tokens) / (seconds(1 + len(tokens)) - prefill) if tokens else len(prompt) / prefill
        return reading(speed, Path(folder, 'model.bin').stat().st_size, dtype=generator.compute_type)
    except (ImportError, OSError, ValueError, LookupError, RuntimeError) as error:
        raise Failed(error) from None


# -----------------------------------------------------------------------------
# decode, prefill


def measure(cases, rounds):
    """
    cases: [(labels, run)], where labels is a dict for the row, and run(round) makes a measurement. All in
    every round, each between two probes of the memory -> rows, of medians. What fails is said, and left out.
    """
    numbers = torch.from_numpy(np.ones(PROBE_BYTES // 4, np.float32))

    def bandwidth(threads):
        torch.set_num_threads(threads)
        start = time.perf_counter()
        numbers.sum()
        return numbers.nbytes / (time.perf_counter() - start) / 1e9

    measured, failed = [[] for _ in cases], set()
    for done in range(rounds):
        for i, (labels, run) in enumerate(cases):
            if labels.get('model') in failed:
                continue
            progress(f'round {done + 1} of {rounds}, case {i + 1} of {len(cases)}')
            before = bandwidth(labels['threads'])
            time.sleep(0.02)        # so long torch's threads may keep a core busy
            try:
                sample = run(done)
            except Failed as error:
                failed.add(labels['model'])
                progress()
                print(printable(f'{labels["model"]} is left out: {error}'), file=sys.stderr)
                continue
            sample['bandwidth_gb_s'] = (before + bandwidth(labels['threads'])) / 2
            sample['roofline'] = sample['gb_per_token'] * sample['tok_s'] / sample['bandwidth_gb_s']
            measured[i].append(sample)
    progress()
    rows = []
    for (labels, _), samples in zip(cases, measured):
        if labels.get('model') not in failed:
            row = dict(labels, dtype=samples[0].pop('dtype', labels.get('dtype')))
            for key in samples[0]:
                row[key] = float(np.median([sample[key] for sample in samples]))
            speeds = [sample['tok_s'] for sample in samples]
            rows.append(dict(row, tok_s_min=min(speeds), tok_s_max=max(speeds)))
    return rows


def listed(name, text, kind=int, most=2 ** 20):
    """'1,2' -> [1, 2]. Ends the program where that cannot be."""
    try:
        values = [kind(word) for word in text.split(',')]
    except ValueError:
        values = []
    if not values or not all(1 <= value <= most for value in values):
        fail(f'--{name} {text}: must be numbers from 1 to {most}, separated by commas')
    return values


def other_engines(config):
    """[(labels, run)], run still without threads and what to read. Ends the program where one is missing."""
    files = [file for file in config.gguf.split(',') if file]
    if bool(config.llama_bench) != bool(files):
        fail('--llama_bench and --gguf go together: the program, and the models for it')
    if config.llama_bench and not shutil.which(config.llama_bench):
        fail(f'--llama_bench {config.llama_bench}: no such program')
    for path in (*files, config.ctranslate2):
        if path and not os.path.exists(path):
            fail(f'{path}: no such file')
    runs = [('llama.cpp', file, partial(run_llama, config.llama_bench, file)) for file in files]
    if config.ctranslate2:
        runs.append(('CTranslate2', config.ctranslate2, partial(run_ctranslate2, config.ctranslate2)))
    return [(dict(engine=engine, model=model), run) for engine, model, run in runs]


def measure_speed(config):
    """The rows of decode or prefill."""
    threads, prompts = listed('threads', config.threads, most=1024), listed('prompts', config.prompts)
    reductions, others = listed('reductions', config.reductions, float), other_engines(config)
    stripes = listed('stripe', config.stripe.replace('matrix', str(WIDEST))) if config.stripe else [0]
    engines, work, end = [], [], PROMPT + config.tokens
    for stripe in stripes:
        model, saved = choose_model(config, stripe)
        context = model.config.block_size
        if end > context:
            fail(f'--tokens {config.tokens}: too many after a prompt of {PROMPT}, in a context of {context}')
        prompts = sorted({min(length, context) for length in prompts})
        longest = max(PROMPT, *prompts) if config.what[0] == 'prefill' else end
        texts = texts_to_read(config, model, saved, longest)
        settings = make_settings(model, saved, reductions, texts[0][:PROMPT])
        labels = {'stripe': 'matrix' if stripe == WIDEST else stripe} if stripe else {}
        for dtype in config.dtypes.split(','):
            progress(f'packing the model in {dtype}')
            decoder = Decoder(model, dtype, max(threads))
            progress()
            print(f'{dtype}: {on_huge_pages(decoder)} of the packed weights on huge pages', flush=True)
            engines += [(dict(labels, engine='cwic', dtype=dtype), partial(run_kernel, decoder, setting))
                        for setting in settings]
    narrow = copy.deepcopy(model).bfloat16()
    engines += [({'engine': 'torch', 'dtype': dtype}, partial(run_torch, dense))
                for dtype, dense in (('f32', model), ('bf16', narrow))] + others
    work = [({}, PROMPT, end)]          # up to where a text is prompt, and up to where it is decoded
    if config.what[0] == 'prefill':
        work = [({'prompt': length}, length, length) for length in prompts]

    def case(labels, prompt, end, run, threads):
        return labels, lambda done: run(threads, texts[done][:prompt], texts[done][prompt:end])

    cases = [case(dict(labels, **engine, threads=t), prompt, end, run, t)
             for labels, prompt, end in work for engine, run in engines for t in threads]
    rows = measure(cases, config.rounds)
    key = lambda r: [r.get(name) for name in ('prompt', 'engine', 'stripe', 'dtype', 'threads')]
    dense = {str(key(r)): r['tok_s'] for r in rows if r['reduction'] < 1.01}
    for r in rows:
        if config.what[0] == 'prefill':           # tokens share what is read
            del r['gb_per_token'], r['thresholds_gb_per_token'], r['roofline']
            r['seconds'] = r['prompt'] / r['tok_s']
        if str(key(r)) in dense:
            r['speed_over_dense'] = r['tok_s'] / dense[str(key(r))]
    return rows


# -----------------------------------------------------------------------------
# probe


ROWS = 1024         # to a stripe: few, to be shared evenly; many, for where a stripe begins to count little


class RowsAlone:
    """
    Rows of so many columns, packed like those of a matrix and added up by the same loop, of which a share is
    active at random: as many as memory holds, and nothing else to do.
    """

    def __init__(self, kernel, memory, dtype, columns, share):
        stripes = len(memory) // (ROWS * columns * FORMATS[dtype].itemsize) or 1
        self.kernel, self.dtype, n_out = kernel, dtype, stripes * columns
        self.sizes = dict(n_in=ROWS, n_out=n_out, stripe=columns, tile=columns, splits=1)
        thresholds = torch.where(torch.rand(stripes, ROWS) < share, -1.0, torch.inf)
        self.tensors = dict(weight=memory, thresholds=thresholds, row_scale=torch.ones_like(thresholds),
                            mu=torch.zeros(ROWS), column_scale=torch.ones(n_out), base=torch.zeros(n_out))

    def __call__(self, threads):
        lib, ffi = self.kernel.lib, self.kernel.ffi
        team = ffi.gc(lib.team_new(threads, ROWS, self.sizes['n_out']), lib.team_free)
        matrix = dict(self.sizes, **{name: pointer(ffi, tensor) for name, tensor in self.tensors.items()})
        x, y, active = torch.ones(ROWS), torch.empty(self.sizes['n_out']), torch.zeros(1, dtype=torch.int64)
        call = (team, ffi.new('Matrix *', matrix), list(FORMATS).index(self.dtype), 1, pointer(ffi, x),
                ffi.NULL, pointer(ffi, y), pointer(ffi, active))
        for _ in range(2):              # the first time wakes the threads
            start = time.perf_counter()
            lib.multiply_alone(*call)
            seconds = time.perf_counter() - start
        thresholds = self.tensors['thresholds'].nbytes * (2 if self.dtype == 'int8' else 1)
        return reading(1 / seconds, int(active) * FORMATS[self.dtype].itemsize, thresholds,
                       ROWS * self.sizes['n_out'] / int(active))


def where_time_goes(measured, model, columns):
    """
    The rows of probe from what was measured: of rows alone, how fast they arrive; of a token, its parts in
    microseconds. columns: {matrix: of its rows}.
    """
    kept = 'part', 'dtype', 'threads', 'columns', 'megabytes', 'reduction', 'bandwidth_gb_s', 'roofline'
    us = {(r['part'], r['dtype'], r['threads']): 1e6 / r['tok_s'] for r in measured}    # of what is silent
    rows, share = [], {}
    for r in measured:
        row = {key: r[key] for key in kept if key in r}
        if r['part'] == 'rows':
            rows.append(dict(row, read_gb_s=r['gb_per_token'] * r['tok_s']))
            share[r['dtype'], r['threads'], r['asked'], r['columns'], r['megabytes']] = r['roofline']
        if r['part'] == 'token':
            key, token, of_rows = (r['dtype'], r['threads']), 1e6 / r['tok_s'], {'layers': 0.0, 'head': 0.0}
            for name, layer in model.sparse_layers():       # what rows alone would take, memory being as fast as now
                gigabytes = layer.n_weights / r['reduction'] * FORMATS[r['dtype']].itemsize / 1e9
                speed = share[*key, r['asked'], columns[name], r['megabytes']] * r['bandwidth_gb_s']
                of_rows['head' if name == 'head' else 'layers'] += 1e6 * gigabytes / speed
            silent, stream = us['silent', *key], token * r['roofline']
            thresholds = us['silent, matrices', *key] - us['narrow, matrices', *key]
            hand_over = us['narrow', *key] - us['narrow', r['dtype'], 1]
            explained = sum(of_rows.values()) + silent
            rows.append(dict(row, tok_s=r['tok_s'], possible=stream / explained, token_us=token,
                             stream_us=stream, layers_us=of_rows['layers'], head_us=of_rows['head'],
                             thresholds_us=thresholds, hand_over_us=hand_over,
                             between_us=silent - thresholds - hand_over, rest_us=token - explained))
    return sorted(rows, key=lambda row: (row['part'], -row['threads']))


def measure_probe(config):
    """
    The rows of probe, in two parts. 'rows': how fast rows arrive that are skipped at random, beside memory
    that is read from end to end. 'token': where the time of a token goes, found by taking away. A decoder in
    which no input is active shows what all but rows takes; its matrices without what stands between them,
    what thresholds and sums do; a narrow model as deep, on several threads and on one, what handing over work
    does. With what rows alone take this should add up to a token: the rest is what no part explains.
    """
    threads = listed('threads', config.threads, most=1024)
    reductions = listed('reductions', config.reductions, float)
    if (config.model or 'gpt2-shape') not in SHAPES:
        fail(f'--model {config.model}: a probe is made of {" or ".join(SHAPES)}')
    kernel, (model, _) = build_kernel.load(), choose_model(config)
    n_embd = 16 * model.config.n_head
    small = GPT(replace(model.config, n_embd=n_embd, n_hidden=n_embd,
                        vocab_size=min(n_embd, model.config.vocab_size))).eval()
    text = torch.randint(small.config.vocab_size, (PROMPT + config.tokens,)).tolist()
    read = text[:PROMPT], text[PROMPT:]
    settings = make_settings(model, {}, reductions, read[0])
    silent, silent_small = Setting(model, False, read[0]), Setting(small, False, read[0])
    for tensors in (*silent.tensors.values(), *silent_small.tensors.values()):
        tensors['thresholds'].fill_(torch.inf)
    memory = torch.from_numpy(np.full(PROBE_BYTES, 0x3c, np.uint8))         # .0115 as f32 and as bf16
    cases, columns = [], {}
    for dtype in config.dtypes.split(','):
        progress(f'packing the model in {dtype}')
        decoder, narrow = Decoder(model, dtype, max(threads)), Decoder(small, dtype, max(threads))
        for name, layer in model.sparse_layers():       # a row of neurons is one of up and one of down
            sizes = decoder.packed[name].sizes
            columns[name] = sizes['tile'] * (layer.n_weights // (sizes['n_in'] * sizes['n_out']))
        # half a gigabyte, of which no cache helps; and as much as the model has, of which one may hold a part
        size = min(model.n_weights() * FORMATS[dtype].itemsize, PROBE_BYTES)
        sizes = sorted({(PROBE_BYTES, width) for width in WIDTHS} | {(size, c) for c in columns.values()})
        alone = [(dict(asked=reduction, columns=width, megabytes=size // 10 ** 6),
                  RowsAlone(kernel, memory[:size], dtype, width, 1 / reduction))
                 for reduction in reductions for size, width in sizes]
        for t in sorted({1, *threads}):
            add = lambda part, run, *more, **labels: cases.append(
                (dict(labels, part=part, dtype=dtype, threads=t), lambda done: run(*more)))
            add('narrow', run_kernel, narrow, silent_small, t, *read)
            if t in threads:
                add('narrow, matrices', run_matrices, narrow, silent_small, t)
                add('silent', run_kernel, decoder, silent, t, *read)
                add('silent, matrices', run_matrices, decoder, silent, t)
                for labels, rows in alone:
                    add('rows', rows, t, **labels)
                for reduction, setting in zip(reductions, settings):
                    add('token', run_kernel, decoder, setting, t, *read, asked=reduction,
                        megabytes=size // 10 ** 6)
    return where_time_goes(measure(cases, config.rounds), model, columns)


# -----------------------------------------------------------------------------
# loss


def through(decoder):
    """What computes a model's logits (B, T, vocab) and active (M, B, T) of tokens (B, T) one at a time."""
    def forward(tokens, dense):
        logits, active = [], []
        for sequence in tokens.tolist():
            decoder.reset()
            for token in sequence:
                for values, of_token in zip((logits, active), decoder.step(token)):
                    values.append(torch.from_numpy(of_token))
        shape = *tokens.shape, -1
        return torch.stack(logits).view(shape), torch.stack(active).view(shape).permute(2, 0, 1)
    return forward


def measure_loss(config):
    """
    The rows of loss: validation loss (nats per token) and reduction in each format, token by token through
    the kernel; of an adapter also KL(base || model) and how often both find the same token likeliest.
    """
    threads, rows = max(listed('threads', config.threads, most=1024)), []
    model, saved = weights.load(config.model or 'out/best.safetensors')
    options = saved.get('options') or {}
    length = min(options.get('block_size', 512), model.config.block_size)
    text, meta = read_dataset(config.data or options.get('data', 'python'), saved, length)
    windows = evaluate.validation_windows(text, meta, config.windows, length)       # (windows, T + 1)
    base = weights.load(saved['base'])[0] if saved.get('base') else None
    for dtype in config.dtypes.split(','):
        progress(f'packing the model in {dtype}')
        decoder = Decoder(model, dtype, threads)
        model.forward = through(decoder)
        found = evaluate.measure(model, windows, base)
        rows.append(dict(engine='cwic', dtype=dtype, threads=decoder.threads, loss=found['val_loss'],
                         **{key: found[key] for key in ('reduction', 'kl', 'agreement') if key in found}))
        rows[-1]['loss_over_first'] = rows[-1]['loss'] - rows[0]['loss']
    return rows


# -----------------------------------------------------------------------------

COLUMNS = (             # title, key in a row, width, format: those that rows have are printed
    ('engine', 'engine', '<14', ''), ('prompt', 'prompt', '>6', ''), ('stripe', 'stripe', '>6', ''),
    ('dtype', 'dtype', '<12', ''), ('processes', 'processes', '>9', ''),
    ('threads', 'threads', '>7', ''), ('columns', 'columns', '>7', ''), ('of MB', 'megabytes', '>6', ''),
    ('reduction', 'reduction', '>9', '.2f'),
    ('loss', 'loss', '>7', '.4f'), ('change', 'loss_over_first', '>7', '+.4f'),
    ('KL to base', 'kl', '>10', '.4f'), ('agreement', 'agreement', '>9', '.3f'),
    ('tok/s', 'tok_s', '>8', '.1f'), ('min', 'tok_s_min', '>8', '.1f'), ('max', 'tok_s_max', '>8', '.1f'),
    ('x dense', 'speed_over_dense', '>7', '.2f'), ('seconds', 'seconds', '>7', '.3f'),
    ('x dense', 'seconds_over_dense', '>7', '.2f'), ('x one', 'speed_over_one', '>7', '.2f'),
    ('message', 'message_share', '>7', '.1%'),
    ('GiB', 'memory_gib', '>5', '.1f'), ('GB/token', 'gb_per_token', '>8', '.3g'),
    ('thresholds', 'thresholds_gb_per_token', '>10', '.3g'), ('GB/s', 'bandwidth_gb_s', '>5', '.1f'),
    ('rows GB/s', 'read_gb_s', '>9', '.1f'), ('roofline', 'roofline', '>8', '.2f'),
    ('possible', 'possible', '>8', '.2f'), ('us: token', 'token_us', '>9', '.0f'),
    ('streamed', 'stream_us', '>8', '.0f'), ('rows', 'layers_us', '>5', '.0f'),
    ('head', 'head_us', '>5', '.0f'),
    ('thresholds, sums', 'thresholds_us', '>16', '.0f'), ('hand-over', 'hand_over_us', '>9', '.0f'),
    ('norms, attention', 'between_us', '>16', '.0f'), ('rest', 'rest_us', '>5', '.0f'))


def table(rows):
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    print(' '.join(f'{title:{width}}' for title, _, width, _ in columns))
    for row in rows:
        cells = [(format(row[key], form) if key in row else '', width) for _, key, width, form in columns]
        print(' '.join(f'{cell:{width}}' for cell, width in cells))


MEASURES = dict(decode=measure_speed, probe=measure_probe, prefill=measure_speed, loss=measure_loss,
                train=lambda config: measure_train(config, SHAPES.get(config.model)))


def check_file(name, path):
    """Ends the program, before anything is measured, where a file could not be written."""
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
    if config.processes > 1 and what != 'train':
        fail('--processes is an option of train')
    if config.processes > 1 and 'RANK' not in os.environ:
        start_processes(config)
    if not set(config.dtypes.split(',')) <= FORMATS.keys():
        fail(f'--dtypes {config.dtypes}: choose from {", ".join(FORMATS)}, separated by commas')
    picture = os.path.join(config.out, f'bench_{what}.png') if what == 'decode' else ''
    for name, path in (('json', config.json), ('out', picture)):
        if path:
            check_file(name, path)
    try:
        if os.environ.get('RANK', '0') == '0':
            print(machine(), flush=True)
        rows = [dict(row, what=what) for row in MEASURES[what](config)]
    except (build_kernel.KernelUnavailable, CheckpointError, weights.WeightsError, ValueError) as error:
        fail(error, 1)
    except torch.OutOfMemoryError:
        fail('out of memory; a smaller --batch takes less', 1)
    except ProcessGone as why:
        fail(f'another process has ended; see what it said ({why})', 1)
    except KeyboardInterrupt:
        progress()
        sys.exit(130)
    for part in dict.fromkeys(row.get('part') for row in rows):
        table([row for row in rows if row.get('part') == part])
    if config.json:
        text = json.dumps({'machine': machine(), 'rows': rows}, indent=1)
        write_atomically(config.json, lambda file: file.write(text.encode()))
    if picture:
        plots.speed(rows, picture, machine())


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    common.run(main)
