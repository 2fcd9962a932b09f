"""
Decodes one token at a time through the C kernel, reading only the weights that the token uses.

    model, _ = load_checkpoint('out/best.pt')
    decoder = Decoder(model, dtype='bf16', threads=2)
    logits, active = decoder.prefill(tokens)            # the prompt, in one batched pass of PyTorch: active (T, M)
    logits, active = decoder.step(token)                # one token, in C: active (M), the weights each matrix used

Weights may be kept as f32, as bf16 (half the bytes, so about half the time), or as int8 with a scale for each (input,
stripe). Thresholds are f32 always, and the constant part of each output, mu @ W + b, is made from the f32 weights.

A Decoder is a snapshot: it does not notice when the model changes later. The prompt is read by the model itself, in f32.

But: one sequence, no batches, CPU only. TorchDecoder does the same without a compiler, and slower than a dense model.
"""

import os

import numpy as np
import torch

import build_kernel
from cwic import GPT, KVCache

DTYPES = {'f32': (0, torch.float32), 'bf16': (1, torch.bfloat16), 'int8': (2, torch.int8)}      # as in sparse_kernel.c
MAX_TILE = 2048         # columns; the kernel takes no wider tile
PIECES = 4              # that a matrix should at least come in, for threads to share evenly
MIN_PART = 64           # inputs in a part: with fewer, what is read at once gets too short

# -----------------------------------------------------------------------------
# packing: weights in the order in which the kernel reads them


def quantise(weight, stripe):
    """weight (in, out) -> int8 (in, out), scale (n, in): one scale for each input and stripe, weight = scale * int8."""
    parts = weight.split(stripe, dim=1)
    scale = torch.stack([part.abs().amax(1) / 127 for part in parts])                   # (n, in)
    small = [part / s.clamp_min(1e-30)[:, None] for part, s in zip(parts, scale)]
    return torch.cat(small, dim=1).round().to(torch.int8), scale


def as_array(tensor, dtype=np.float32):
    """A contiguous array of its own: numpy puts large ones on huge pages, which the processor finds faster."""
    array = np.empty(tuple(tensor.shape), dtype)
    torch.from_numpy(array).copy_(tensor.detach())
    return array


class Packed:
    """A StripedLinear as the kernel's Linear. struct: for ffi.new; arrays: what its pointers point to."""

    def __init__(self, ffi, linear, dtype):
        n_in, n_out, stripe = linear.n_in, linear.n_out, linear.stripe
        weight, thresholds, mu = linear.weight.detach(), linear.thresholds().detach(), linear.mu
        n = -(-n_out // stripe)
        checked = (('weight', weight, (n_in, n_out)), ('thresholds', thresholds, (n, n_in)), ('mu', mu, (n_in,)))
        for name, tensor, shape in checked:
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(f'{name} must be f32 {shape}, not {tensor.dtype} {tuple(tensor.shape)}')
        base = mu @ weight if linear.bias is None else mu @ weight + linear.bias.detach()
        tile = -(-stripe // -(-stripe // MAX_TILE))                                     # equal tiles, none too wide
        pieces = -(-stripe // tile) * n
        parts = max(1, min(-(-PIECES // pieces), n_in // MIN_PART))
        scale = None
        if dtype == 'int8':
            weight, scale = quantise(weight, stripe)
        # tile after tile, each row by row: (in, width) of one tile lie together
        tiles = [t.reshape(-1) for s in weight.split(stripe, dim=1) for t in s.split(tile, dim=1)]
        flat = torch.cat(tiles).to(DTYPES[dtype][1])
        kind = {'f32': np.float32, 'bf16': np.uint16, 'int8': np.int8}[dtype]
        flat = as_array(flat.view(torch.uint16) if dtype == 'bf16' else flat, kind)
        self.room = pieces * parts * tile
        self.arrays = [flat, as_array(thresholds), as_array(mu), as_array(base)]
        if scale is not None:
            self.arrays.append(as_array(scale))
        pointers = [ffi.from_buffer('float[]', array) for array in self.arrays[1:]]
        self.struct = dict(n_in=n_in, n_out=n_out, stripe=stripe, tile=tile, parts=parts, weight=ffi.from_buffer(flat),
                           thresholds=pointers[0], mu=pointers[1], base=pointers[2],
                           scale=ffi.NULL if scale is None else pointers[3])


# -----------------------------------------------------------------------------


class TorchDecoder:
    """
    A Decoder in plain PyTorch, for where no kernel can be built: the same methods and results, computed by the model.
    names: M matrices; dense: the weights each has, np.int64 (M).
    """

    def __init__(self, model):
        self.model, self.config = model.eval(), model.config
        self.names = [name for name, _ in model.linears()]
        self.dense = np.array([linear.dense for _, linear in model.linears()], np.int64)
        self.reset()

    def reset(self):
        """Forgets the sequence so far."""
        self.cache, self.window = KVCache(self.config), []

    @torch.no_grad()
    def forward(self, tokens):
        """tokens, which follow those in the cache -> logits of the last one np.float32 (vocab), active np.int64 (T, M)."""
        logits, active = self.model(torch.tensor([tokens]), self.cache)
        self.window += tokens
        return logits[0, -1].numpy(), active[:, 0].t().numpy().astype(np.int64)

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
        return self.forward(tokens)

    def step(self, token):
        """
        Reads one more token. Returns logits np.float32 (vocab) and active np.int64 (M). Where the context is full the
        window first becomes its own last half, this token included, and is read again from position 0.
        """
        self.check([token])
        if self.cache.length == self.config.block_size:
            keep = max(self.config.block_size // 2, 1)
            logits, active = self.prefill((self.window + [int(token)])[-keep:])
            return logits, active[-1]
        return self.one(int(token))

    def one(self, token):
        logits, active = self.forward([token])
        return logits, active[0]


class Decoder(TorchDecoder):
    """
    The same through the kernel. dtype: of the weights, 'f32', 'bf16' or 'int8'; threads: default, every core up to 8.
    Raises build_kernel.KernelUnavailable, and ValueError for a dtype or a number of threads that cannot be.
    """

    def __init__(self, model, dtype='f32', threads=None):
        if dtype not in DTYPES:
            raise ValueError(f'dtype must be one of {", ".join(DTYPES)}, not {dtype}')
        kernel = build_kernel.load()
        self.lib, ffi, c = kernel.lib, kernel.ffi, model.config
        super().__init__(model)
        self.ffi, self.dtype = ffi, dtype
        self.packed = packed = {name: Packed(ffi, linear, dtype) for name, linear in model.linears()}
        self.keep = []                                          # what C points to has to outlive its struct

        def pointer(tensor):
            self.keep.append(as_array(tensor))
            return ffi.from_buffer('float[]', self.keep[-1])

        def norm(ln):
            return dict(gain=pointer(ln.weight), bias=ffi.NULL if ln.bias is None else pointer(ln.bias))

        def matrices(i):
            return {name: packed[f'{i}.{name}'].struct for name in ('qkv', 'out', 'up', 'down')}

        blocks = ffi.new('Block[]', [dict(ln_1=norm(block.ln_1), ln_2=norm(block.ln_2), **matrices(i))
                                     for i, block in enumerate(model.blocks)])
        self.c_model = ffi.new('Model *', dict(
            dtype=DTYPES[dtype][0], vocab_size=c.vocab_size, block_size=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, wte=pointer(model.head.weight.t()), wpe=pointer(model.wpe.weight), blocks=blocks,
            ln_f=norm(model.ln_f), head=packed['head'].struct))
        room = {name: np.zeros(size, np.float32) for name, size in
                dict(x=c.n_embd, mixed=c.n_embd, qkv=3 * c.n_embd, hidden=4 * c.n_embd).items()}
        self.state = ffi.new('State *', {name: ffi.from_buffer('float[]', array) for name, array in room.items()})
        self.keep += [blocks, room]
        self.hire(min(os.cpu_count() or 1, 8) if threads is None else threads)

    def hire(self, threads):
        """Changes the number of threads, from 1 to 1024; a system short of them may give fewer: see .threads."""
        if not 1 <= threads <= 1024:
            raise ValueError(f'threads must be 1 to 1024, not {threads}')
        widest = max([linear.n_in for _, linear in self.model.linears()] + [self.config.block_size])
        team = self.lib.team_new(threads, widest, max(p.room for p in self.packed.values()))
        if team == self.ffi.NULL:
            raise MemoryError('no memory for the threads of the kernel')
        self.team = self.ffi.gc(team, self.lib.team_free)
        self.threads = self.lib.team_size(team)

    def one(self, token):
        c, ffi, cache = self.config, self.ffi, self.cache
        shape = (c.n_layer, 1, c.n_head, c.block_size, c.n_embd // c.n_head)
        for tensor in (cache.k, cache.v):       # the only pointers that are not of our own making
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(f'the cache must be contiguous f32 {shape}')
        self.state.k = ffi.cast('float *', cache.k.data_ptr())
        self.state.v = ffi.cast('float *', cache.v.data_ptr())
        logits, active = np.empty(c.vocab_size, np.float32), np.empty(len(self.names), np.int64)
        if self.lib.decode_token(self.team, self.c_model, self.state, token, cache.length,
                         ffi.from_buffer('float[]', logits), ffi.from_buffer('int64_t[]', active)):
            raise ValueError(f'token {token} at position {cache.length} was refused')
        cache.length += 1
        self.window.append(token)
        return logits, active
