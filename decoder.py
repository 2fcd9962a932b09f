"""
Decodes through the C kernel, one token at a time, reading only the weights that each token uses.

    model, _ = load_checkpoint('out/best.safetensors')
    decoder = Decoder(model, dtype='bf16', threads=2)
    logits, active = decoder.prefill(tokens)        # a prompt: active (T, M), the weights used of each matrix
    logits, active = decoder.step(token)            # one more token: active (M)

A prompt is read 64 tokens at a time. Weights that a token skips are not used for it, but each row is still
read, once for 64 tokens.

Weights are kept as f32, as bf16 (half the bytes, so about half the time), or as int8 with a scale for each
(input, stripe) pair and one for each column. With bf16 and int8, keys and values are bf16. Thresholds are
always f32, and the constant part of an output, mu @ W + b, is computed from f32 weights. A Decoder is a
snapshot: it needs the model no longer, and does not see later changes of it.

Not here: several sequences at once, GPUs. TorchDecoder needs no compiler, but is slower than a dense model.
"""

import math
import os
import re
from pathlib import Path

import numpy as np
import torch

import build_kernel
from cwic import KVCache, Neurons, StripedLinear, rotary_tables
from refinements import rotate

FORMATS = {'f32': torch.float32, 'bf16': torch.bfloat16, 'int8': torch.int8}    # in sparse_kernel.c's order
MAX_TILE = 4096     # columns in a tile, at most: long rows read faster; their sums fit the first-level cache
MIN_INPUTS = 64     # inputs for a task, at least: with fewer, the stretches it reads are too short

# -----------------------------------------------------------------------------
# packing: weights in the order in which the kernel reads them


class Arena:
    """
    One block of memory for all weights and thresholds. It is so large that numpy asks for huge pages: the
    fewer pages there are, the faster the processor translates addresses. Each tensor starts on a cache line.
    """

    def __init__(self, size):
        block = torch.from_numpy(np.empty(size + 64, np.uint8))
        self.rest = block[-block.data_ptr() % 64:]

    def empty(self, shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        taken, self.rest = self.rest[:size], self.rest[-(-size // 64) * 64:]
        return taken.view(dtype).view(shape)


def packed_bytes(layer, dtype):
    """Bytes that a PackedMatrix takes of an Arena, at most: six tensors, all but the weights in f32."""
    numbers = 2 * layer.theta.numel() + layer.n_in + 2 * (layer.n_weights // layer.n_in)
    return layer.n_weights * FORMATS[dtype].itemsize + 4 * numbers + 6 * 64


def largest(weights, dim):
    """The largest magnitude in each column (dim 0) or row (dim 1) of weights (in, out)."""
    return torch.maximum(weights.amax(dim), -weights.amin(dim)).clamp_min(1e-30)


def quantise(rows, column_scale):
    """rows (in, columns), about row_scale * column_scale * integers -> integers up to 127, row_scale (in)."""
    rows = rows / column_scale
    row_scale = largest(rows, 1) / 127
    return rows.div_(row_scale[:, None]).round_(), row_scale


def pack_neurons(up, down, dtype, empty):
    """
    up (d, neurons), down (neurons, d) -> weight (neurons, 2, d): each neuron's column of up, then its row of
    down; row_scale (neurons), column_scale (d), both None unless dtype is int8.
    """
    up, row_scale, column_scale = up.t(), None, None
    if dtype == 'int8':
        column_scale = largest(down, 0)
        (up, up_scale), (down, down_scale) = quantise(up, 1), quantise(down, column_scale)
        row_scale = up_scale * down_scale
    weight = empty((len(down), 2, down.shape[1]), dtype=FORMATS[dtype])
    weight[:, 0], weight[:, 1] = up, down
    return weight, row_scale, column_scale


def pack_tiles(weights, stripe, tile, dtype, empty):
    """
    weights (in, out) -> weight (in * out), tile after tile, each row by row; row_scale (stripes, in),
    column_scale (out), both None unless dtype is int8.
    """
    weight, row_scales, start = empty((weights.numel(),), dtype=FORMATS[dtype]), [], 0
    column_scale = largest(weights, 0) if dtype == 'int8' else None
    for first in range(0, weights.shape[1], stripe):
        columns = weights[:, first:first + stripe]                                              # (in, stripe)
        if dtype == 'int8':
            columns, row_scale = quantise(columns, column_scale[first:first + stripe])
            row_scales.append(row_scale)
        for rows in columns.split(tile, dim=1):                                                 # (in, tile)
            weight[start:start + rows.numel()].view(rows.shape).copy_(rows)
            start += rows.numel()
    return weight, torch.stack(row_scales) if row_scales else None, column_scale


class PackedMatrix:
    """
    A StripedLinear or Neurons as the kernel's Matrix: its sizes and its tensors, whose values may be changed
    later. dense: use thresholds that skip nothing; empty(shape, dtype=) allocates memory; tasks: how many to
    cut a product into, at most 4. Raises ValueError if the layer is not f32.

    In int8 a weight is row_scale * column_scale * integer. With row scales alone, a few columns much larger
    than the others would coarsen every row: SmolLM2-135M would be ten times as far from itself in f32, in KL.
    """

    @torch.no_grad()
    def __init__(self, layer, dtype='f32', dense=False, empty=torch.empty, tasks=2):
        if any(tensor.dtype != torch.float32 for tensor in layer.state_dict().values()):
            raise ValueError('only a model in f32 can be packed')
        n_in, thresholds, mu = layer.n_in, layer.thresholds(), layer.mu
        if dense:
            thresholds, mu = torch.full_like(thresholds, -1), torch.zeros_like(mu)
        if isinstance(layer, Neurons):
            up, down = layer.adapter_up(layer.up), layer.adapter_down(layer.down)
            n_out = stripe = tile = down.shape[1]
            base = torch.zeros(n_out)
            weight, row_scale, column_scale = pack_neurons(up, down, dtype, empty)
        else:
            weights, n_out, stripe = layer.adapter(layer.weight), layer.n_out, layer.stripe
            tile = math.ceil(stripe / math.ceil(stripe / MAX_TILE))             # about equally wide
            base = torch.zeros(n_out) if layer.bias is None else layer.bias
            if mu.any():
                base = mu @ weights + base
            weight, row_scale, column_scale = pack_tiles(weights, stripe, tile, dtype, empty)
        tiles = math.ceil(stripe / tile) * math.ceil(n_out / stripe)
        splits = max(1, min(math.ceil(tasks / tiles), n_in // MIN_INPUTS))
        self.sizes = dict(n_in=n_in, n_out=n_out, stripe=stripe, tile=tile, splits=splits)
        self.sums = tiles * splits * tile               # numbers that the tasks write
        self.tensors = dict(weight=weight)
        others = dict(thresholds=thresholds, mu=mu, row_scale=row_scale, column_scale=column_scale, base=base)
        for name, values in others.items():             # the kernel expects them in this order, contiguous
            if values is not None:
                self.tensors[name] = empty(tuple(values.shape), dtype=torch.float32).copy_(values)

    def struct(self, ffi):
        """The fields of a Matrix, for ffi.new('Matrix *', ...); valid while self exists."""
        return {**self.sizes, **{name: pointer(ffi, tensor) for name, tensor in self.tensors.items()}}


def pointer(ffi, tensor):
    return ffi.cast('void *', tensor.data_ptr())


# -----------------------------------------------------------------------------
# decoders: one in PyTorch, and one through the kernel


class ContextWindow:
    """
    window: the tokens that a decoder has read and still sees, at most block_size. A subclass has
    forward(tokens), which reads more tokens, as many as fit: tokens (T) -> logits np.float32 (vocab) of the
    last one, active np.int64 (T, M). names: those of the M matrices; n_weights: their weights, np.int64 (M).
    """

    def __init__(self, model):
        self.config, self.window = model.config, []
        self.names = [name for name, _ in model.sparse_layers()]
        self.n_weights = np.array([layer.n_weights for _, layer in model.sparse_layers()], np.int64)

    def reset(self):
        """Forgets all tokens."""
        self.window = []

    def prefill(self, tokens):
        """
        Starts a new sequence with a prompt, a list of token ids. Only its last block_size tokens are read.
        Returns logits np.float32 (vocab) of the last token, and active np.int64 (T, M): the weights of each
        matrix that each of the T tokens read used. Raises ValueError if there are no tokens, or unknown ones.
        """
        self.check(tokens)
        self.reset()
        return self.extend(tokens[-self.config.block_size:])

    def extend(self, tokens):
        """
        Reads more tokens, and returns the same as prefill. Whenever the context is full, only half of it is
        kept: the last block_size // 2 tokens, the next one included, are read again from position 0.
        """
        self.check(tokens)
        actives = []
        while tokens:
            read = tokens[:self.config.block_size - len(self.window)]
            if read:
                logits, active = self.forward(read)
                self.window += read
            else:
                read = tokens[:1]
                logits, active = self.prefill((self.window + read)[-max(self.config.block_size // 2, 1):])
            actives.append(active[-len(read):])
            tokens = tokens[len(read):]
        return logits, np.concatenate(actives)

    def step(self, token):
        """Reads one more token, as extend does. Returns logits np.float32 (vocab) and active np.int64 (M)."""
        logits, active = self.extend([int(token)])
        return logits, active[0]

    def check(self, tokens):
        if not tokens:
            raise ValueError('a prompt needs at least one token')
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f'token {token} is not one of the {self.config.vocab_size} this model knows')


class TorchDecoder(ContextWindow):
    """A Decoder in plain PyTorch, for machines without a C compiler. dense: use every weight."""

    def __init__(self, model, dense=False):
        super().__init__(model)
        self.model, self.dense, self.cache = model.eval(), dense, KVCache(model.config)

    @torch.no_grad()
    def forward(self, tokens):
        self.cache.length = len(self.window)
        logits, active = self.model(torch.tensor([tokens]), self.cache, self.dense)
        return logits[0, -1].numpy(), active[:, 0].t().numpy().astype(np.int64)


def usable_cores(root='/'):
    """
    How many cores this process may keep busy: those it may run on, or fewer if its cgroup (a container's,
    say) has a quota of CPU time. More threads would wait for each other. root: of the file system.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        groups = Path(root, 'proc/self/cgroup').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return cores
    for group in re.findall('^0::/(.*)', groups, re.M):
        folder = Path(root, 'sys/fs/cgroup', group)
        for folder in (folder, *folder.parents):        # each may limit everything below it
            try:
                quota, period = (folder / 'cpu.max').read_text(encoding='utf-8').split()
                cores = min(cores, max(round(int(quota) / int(period)), 1))
            except (OSError, ValueError):               # 'max 100000': no limit
                pass
    return cores


class Decoder(ContextWindow):
    """
    dtype: of the weights, 'f32', 'bf16' or 'int8'; threads: by default every usable core, up to 8; dense: use
    every weight. With more than two threads, sums are taken in more parts, so the last bits of logits may
    differ. Of a prompt only the last token's logits are computed, so no shortlist is counted for the others.
    Raises build_kernel.KernelUnavailable, and ValueError for an impossible dtype or number of threads.
    """

    def __init__(self, model, dtype='f32', threads=None, dense=False):
        if dtype not in FORMATS:
            raise ValueError(f'dtype must be one of {", ".join(FORMATS)}, not {dtype}')
        kernel = build_kernel.load()
        super().__init__(model)
        self.lib, self.ffi, self.dtype = kernel.lib, kernel.ffi, dtype
        self.overhead = 0 if dense or not self.config.bases else model.head.rotation_weights
        self.kept = []                                  # tensors must live as long as C points to them

        layers, d = dict(model.sparse_layers()), self.config.n_embd
        if self.config.bases:
            layers['basis'] = StripedLinear(d, d, d, bias=False)
            layers['basis'].weight.data = model.basis.float()
        embeds = self.config.bases or self.config.shortlist     # else the embeddings are the head's columns
        size = sum(packed_bytes(layer, dtype) for layer in layers.values())
        if embeds:
            size += model.head.n_weights * FORMATS[dtype].itemsize + 64
        empty = Arena(size).empty
        threads = min(usable_cores(), 8) if threads is None else threads
        tasks = 2 if threads <= 2 else 4                # no more, as their sums have to be added up
        self.packed = {name: PackedMatrix(layer, dtype, dense or name == 'basis', empty, tasks)
                       for name, layer in layers.items()}
        fields = self.model_fields(model)
        if embeds:
            fields.update(self.embedding_fields(model, empty))
        if self.config.shortlist and not dense:
            fields['margin'] = model.head.margin_in_nats()
        self.c_model = self.ffi.new('Model *', fields)
        self.state = self.new_state()
        self.set_threads(threads)

    def keep(self, tensor):
        """A pointer to the tensor, which lives as long as self."""
        self.kept.append(tensor.detach())
        return pointer(self.ffi, self.kept[-1])

    def norm_fields(self, norm):
        names = {'weight': 'gain', 'bias': 'bias'}
        return {names[name]: self.keep(p.clone()) for name, p in norm.named_parameters()}

    def layer_fields(self, block, i):
        matrices = {field: self.packed[f'{i}.{name}'].struct(self.ffi)
                    for field, name in zip(('qkv', 'out', 'up', 'down'), self.config.matrices)}
        return dict(matrices, ln_1=self.norm_fields(block.ln_1), ln_2=self.norm_fields(block.ln_2))

    def model_fields(self, model):
        """The fields of the kernel's Model, but for a shortlist's margin and embeddings of their own."""
        c = self.config
        sizes = 'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'norm_eps'
        fields = {name: getattr(c, name) for name in sizes}
        fields.update(arch=('gpt2', 'llama').index(c.arch), dtype=list(FORMATS).index(self.dtype))
        if c.arch == 'gpt2':
            fields['wpe'] = self.keep(model.wpe.weight.clone())
        else:
            fields['cos'], fields['sin'] = map(self.keep, rotary_tables(c, torch.arange(c.block_size)))
        layers = [self.layer_fields(block, i) for i, block in enumerate(model.blocks)]
        self.kept.append(self.ffi.new('Layer[]', layers))
        fields.update(layers=self.kept[-1], ln_f=self.norm_fields(model.ln_f))
        fields.update({name: self.packed[name].struct(self.ffi) for name in ('head', 'basis')
                       if name in self.packed})
        return fields

    @torch.no_grad()
    def embedding_fields(self, model, empty):
        """The fields of embeddings (vocab, d) of their own, not rotated into the head's basis."""
        embedding = model.head.adapter(model.head.weight).t()
        if self.config.bases:
            embedding = rotate(embedding, model.basis.t())
        packed = pack_tiles(embedding, self.config.n_embd, self.config.n_embd, self.dtype, empty)
        names = 'embedding', 'embedding_row_scale', 'embedding_column_scale'
        return {name: self.keep(tensor) for name, tensor in zip(names, packed) if tensor is not None}

    def new_state(self):
        """The kernel's State: an empty KV cache, and scratch memory."""
        c, chunk, block = self.config, self.lib.CHUNK, self.lib.BLOCK
        shapes = dict(k=(c.n_layer, c.n_kv_head, math.ceil(c.block_size / block), c.head_dim, block),
                      v=(c.n_layer, c.n_kv_head, c.block_size, math.ceil(c.head_dim / block) * block),
                      x=(chunk, c.n_embd), h=(chunk, c.n_embd), attn_out=(chunk, c.n_embd),
                      qkv=(chunk, (c.n_head + 2 * c.n_kv_head) * c.head_dim), hidden=(chunk, c.n_hidden))
        kv = torch.float32 if self.dtype == 'f32' else torch.bfloat16
        return self.ffi.new('State *', {
            name: self.keep(torch.zeros(shape, dtype=kv if name in 'kv' else torch.float32))
            for name, shape in shapes.items()})

    def set_threads(self, threads):
        """Sets the number of threads, 1 to 1024. A system short of threads gives fewer: see self.threads."""
        if not 1 <= threads <= 1024:
            raise ValueError(f'threads must be 1 to 1024, not {threads}')
        longest = max([packed.sizes['n_in'] for packed in self.packed.values()] + [self.config.block_size])
        team = self.lib.team_new(threads, longest, max(packed.sums for packed in self.packed.values()))
        if team == self.ffi.NULL:
            raise MemoryError('no memory for the threads of the kernel')
        self.team = self.ffi.gc(team, self.lib.team_free)
        self.threads = self.lib.team_size(team)

    def forward(self, tokens):
        tokens, chunk = np.array(tokens, np.uint32), self.lib.CHUNK
        logits = np.empty(self.config.vocab_size, np.float32)
        active = np.empty((len(tokens), len(self.names)), np.int64)
        buffer = self.ffi.from_buffer
        for start in range(0, len(tokens), chunk):      # Python notices a Ctrl-C between two chunks
            read, counts = tokens[start:start + chunk], active[start:start + chunk]
            position = len(self.window) + start
            if self.lib.decode(self.team, self.c_model, self.state, buffer('uint32_t[]', read), len(read),
                               position, buffer('float[]', logits), buffer('int64_t[]', counts)):
                raise ValueError(f'{len(read)} tokens at position {position} were refused')
        active[:, -1] += self.overhead
        return logits, active
