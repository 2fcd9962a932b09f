"""
Decodes one token at a time through the C kernel, reading only the weights that the token uses.

    model, _ = load_checkpoint('out/best.pt')
    decoder = Decoder(model, dtype='bf16', threads=2)
    logits, active = decoder.prefill(tokens)            # a prompt: active (T, M), the weights that each matrix used
    logits, active = decoder.step(token)                # one token more: active (M)

Weights may be kept as f32, as bf16 (half the bytes, so about half the time), or as int8 with a scale for each (input,
stripe). Thresholds are f32 always, and the constant part of each output, mu @ W + b, is made from the f32 weights.

A Decoder is a snapshot: it does not notice when the model changes later, and no longer needs it.

Not here: batches of sequences, GPUs. TorchDecoder does the same without a compiler, and slower than a dense model.
"""

import math
import os

import numpy as np
import torch

import build_kernel
from cwic import KVCache, Neurons, rotary_tables

FORMATS = {'f32': torch.float32, 'bf16': torch.bfloat16, 'int8': torch.int8}    # of weights, numbered as in sparse_kernel.c
MAX_TILE = 4096         # columns that are computed together: their sums stay in the first-level cache
MIN_TASKS = 4           # that a matrix is cut into, for threads to share it evenly
MIN_INPUTS = 64         # of a task: with fewer, what is read at once gets too short

# -----------------------------------------------------------------------------
# packing: weights in the order in which the kernel reads them


class Arena:
    """
    One block of memory for all that the kernel reads: large enough that numpy asks for huge pages, on which the processor
    finds addresses faster. What is taken from it starts on a cache line.
    """

    def __init__(self, size):
        block = torch.from_numpy(np.empty(size + 64, np.uint8))
        self.rest = block[-block.data_ptr() % 64:]

    def empty(self, shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        taken, self.rest = self.rest[:size], self.rest[-(-size // 64) * 64:]
        return taken.view(dtype).view(shape)


def row_scale(rows, dtype):
    """rows f32 (in, columns) -> scale f32 (in), by which the largest of each row becomes 127; None but for int8."""
    if dtype == 'int8':
        return (torch.maximum(rows.amax(1), -rows.amin(1)) / 127).clamp_min(1e-30)


def pack_rows(rows, scale, packed):
    """Writes rows f32 (in, columns) into packed (in, columns) of any format; packed * scale is what they were."""
    packed.copy_(rows if scale is None else (rows / scale[:, None]).round_())


class PackedMatrix:
    """
    A StripedLinear or Neurons as the kernel's Matrix: sizes, and the tensors that its pointers point to, by name. All but
    the weights may be changed later. dense: with thresholds that skip nothing. empty(shape, dtype=): what memory comes from.
    Raises ValueError where the layer is not f32.
    """

    @torch.no_grad()
    def __init__(self, layer, dtype='f32', dense=False, empty=torch.empty):
        if any(tensor.dtype != torch.float32 for tensor in layer.state_dict().values()):
            raise ValueError('a model must be f32 to be packed')
        n_in, thresholds, mu = layer.n_in, layer.thresholds(), layer.mu
        if dense:
            thresholds, mu = torch.full_like(thresholds, -1), torch.zeros_like(mu)
        if isinstance(layer, Neurons):
            both = layer.adapter_up(layer.up).t(), layer.adapter_down(layer.down)           # (neurons, d) each
            n_out = stripe = tile = both[0].shape[1]
            weight, scales = empty((n_in, 2, n_out), dtype=FORMATS[dtype]), [row_scale(rows, dtype) for rows in both]
            for i, (rows, scale) in enumerate(zip(both, scales)):
                pack_rows(rows, scale, weight[:, i])
            scale, base = (scales[0] * scales[1] if dtype == 'int8' else None), torch.zeros(n_out)
        else:
            unpacked, n_out, stripe = layer.adapter(layer.weight), layer.n_out, layer.stripe
            tile = math.ceil(stripe / math.ceil(stripe / MAX_TILE))                         # equal ones, none too wide
            weight, scales, start = empty((n_in * n_out,), dtype=FORMATS[dtype]), [], 0
            for columns in unpacked.split(stripe, dim=1):                                   # (in, stripe)
                scales.append(row_scale(columns, dtype))
                for rows in columns.split(tile, dim=1):                                     # (in, tile)
                    pack_rows(rows, scales[-1], weight[start:start + rows.numel()].view(rows.shape))
                    start += rows.numel()
            scale = torch.stack(scales) if dtype == 'int8' else None
            base = (0 if layer.bias is None else layer.bias) + (mu @ unpacked if mu.any() else torch.zeros(n_out))
        tiles = math.ceil(stripe / tile) * math.ceil(n_out / stripe)
        splits = max(1, min(math.ceil(MIN_TASKS / tiles), n_in // MIN_INPUTS))
        self.sizes = dict(n_in=n_in, n_out=n_out, stripe=stripe, tile=tile, splits=splits)
        self.sums = tiles * splits * tile           # numbers that its tasks leave behind
        self.arrays = dict(weight=weight)
        for name, values in dict(scale=scale, thresholds=thresholds, mu=mu, base=base).items():
            if values is not None:
                self.arrays[name] = empty(tuple(values.shape), dtype=torch.float32).copy_(values)

    def struct(self, ffi):
        """For ffi.new('Matrix *', ...), as long as self lives."""
        return {**self.sizes, **{name: pointer(ffi, tensor) for name, tensor in self.arrays.items()}}


def pointer(ffi, tensor):
    return ffi.cast('void *', tensor.data_ptr())


# -----------------------------------------------------------------------------


class TorchDecoder:
    """
    A Decoder in plain PyTorch, for where no kernel can be built: the same methods and results, computed by the model.
    names: M matrices; dense: the weights each has, np.int64 (M). With dense=True thresholds play no part.
    """

    def __init__(self, model, dense=False):
        self.model, self.config, self.all_weights = model.eval(), model.config, dense
        self.names = [name for name, _ in model.gated()]
        self.dense = np.array([layer.dense for _, layer in model.gated()], np.int64)
        self.cache, self.window = KVCache(model.config), []

    @torch.no_grad()
    def forward(self, tokens):
        """tokens, which follow those in the cache -> logits np.float32 (vocab) of the last one, active np.int64 (T, M)."""
        logits, active = self.model(torch.tensor([tokens]), self.cache, self.all_weights)
        return logits[0, -1].numpy(), active[:, 0].t().numpy().astype(np.int64)

    def reset(self):
        """Forgets the sequence so far."""
        self.cache.length, self.window = 0, []

    def check(self, tokens):
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f'token {token} is not one of the {self.config.vocab_size} this model knows')

    def prefill(self, tokens):
        """
        Reads a prompt, a list of T >= 1 token ids of which a model can keep the last block_size, as the start of a new
        sequence. Returns logits np.float32 (vocab) of its last token and active np.int64 (T', M), the weights used by
        each token that was read, T' = min(T, block_size). Raises ValueError for no tokens, or unknown ones.
        """
        tokens = [int(token) for token in tokens][-self.config.block_size:]
        if not tokens:
            raise ValueError('a prompt needs at least one token')
        self.check(tokens)
        self.reset()
        logits, active = self.forward(tokens)
        self.window = tokens
        return logits, active

    def step(self, token):
        """
        Reads one more token. Returns logits np.float32 (vocab) and active np.int64 (M). Where the context is full the
        window first becomes its own last half, this token included, and is read again from position 0.
        """
        token = int(token)
        self.check([token])
        if len(self.window) == self.config.block_size:
            logits, active = self.prefill((self.window + [token])[-max(self.config.block_size // 2, 1):])
        else:
            logits, active = self.forward([token])
            self.window.append(token)
        return logits, active[-1]


class Decoder(TorchDecoder):
    """
    The same through the kernel. dtype: of the weights, 'f32', 'bf16' or 'int8'; threads: default, every core up to 8.
    Raises build_kernel.KernelUnavailable, and ValueError for a dtype or a number of threads that cannot be.
    """

    def __init__(self, model, dtype='f32', threads=None, dense=False):
        if dtype not in FORMATS:
            raise ValueError(f'dtype must be one of {", ".join(FORMATS)}, not {dtype}')
        kernel = build_kernel.load()
        super().__init__(model, dense)
        self.lib, self.ffi, self.dtype, self.model, c = kernel.lib, kernel.ffi, dtype, None, model.config
        layers = dict(model.gated())
        weights = sum(layer.dense * FORMATS[dtype].itemsize for layer in layers.values())
        others = sum(2 * layer.theta.numel() + layer.n_in + layer.dense // layer.n_in for layer in layers.values())
        arena = Arena(weights + 4 * others + 64 * 5 * len(layers))
        self.packed = {name: PackedMatrix(layer, dtype, dense, arena.empty) for name, layer in layers.items()}
        struct = {name: packed.struct(self.ffi) for name, packed in self.packed.items()}
        self.keep = []                          # what C points to has to outlive the pointers

        def keep(tensor):
            self.keep.append(tensor.detach().clone().contiguous())
            return pointer(self.ffi, self.keep[-1])

        def norm(module):
            bias = getattr(module, 'bias', None)
            return dict(gain=keep(module.weight), bias=self.ffi.NULL if bias is None else keep(bias))

        def block(i, module):
            matrices = {field: struct[f'{i}.{name}'] for field, name in zip(('qkv', 'out', 'up', 'down'), c.matrices)}
            return dict(ln_1=norm(module.ln_1), ln_2=norm(module.ln_2), **matrices)

        blocks = self.ffi.new('Block[]', [block(i, module) for i, module in enumerate(model.blocks)])
        sizes = {name: getattr(c, name) for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd',
                                                     'n_hidden', 'norm_eps')}
        if c.arch == 'gpt2':
            positions = dict(arch=self.lib.GPT2, wpe=keep(model.wpe.weight))
        else:
            positions = dict(zip(('cos', 'sin'), map(keep, rotary_tables(c, torch.arange(c.block_size)))), arch=self.lib.LLAMA)
        self.c_model = self.ffi.new('Model *', dict(
            **sizes, **positions, dtype=list(FORMATS).index(dtype), blocks=blocks, ln_f=norm(model.ln_f), head=struct['head']))
        working = dict(x=c.n_embd, h=c.n_embd, qkv=(c.n_head + 2 * c.n_kv_head) * c.head_dim, mixed=c.n_embd, hidden=c.n_hidden)
        self.state = self.ffi.new('State *', dict({name: keep(torch.zeros(size)) for name, size in working.items()},
                                                  k=pointer(self.ffi, self.cache.k), v=pointer(self.ffi, self.cache.v)))
        self.keep.append(blocks)
        self.set_threads(min(os.cpu_count() or 1, 8) if threads is None else threads)

    def set_threads(self, threads):
        """How many threads work, from 1 to 1024; a system short of them may give fewer: see .threads."""
        if not 1 <= threads <= 1024:
            raise ValueError(f'threads must be 1 to 1024, not {threads}')
        longest = max([packed.sizes['n_in'] for packed in self.packed.values()] + [self.config.block_size])
        team = self.lib.team_new(threads, longest, max(packed.sums for packed in self.packed.values()))
        if team == self.ffi.NULL:
            raise MemoryError('no memory for the threads of the kernel')
        self.team = self.ffi.gc(team, self.lib.team_free)
        self.threads = self.lib.team_size(team)

    def forward(self, tokens):
        logits, active = np.empty(self.config.vocab_size, np.float32), np.empty((len(tokens), len(self.names)), np.int64)
        for token, row in zip(tokens, active):
            if self.lib.decode_token(self.team, self.c_model, self.state, token, self.cache.length,
                                     self.ffi.from_buffer('float[]', logits), self.ffi.from_buffer('int64_t[]', row)):
                raise ValueError(f'token {token} at position {self.cache.length} was refused')
            self.cache.length += 1
        return logits, active
