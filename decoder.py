"""
Decodes one token at a time through the C kernel, reading only the weights that the token uses.

    model, _ = load_checkpoint('out/best.safetensors')
    decoder = Decoder(model, dtype='bf16', threads=2)
    logits, active = decoder.prefill(tokens)        # a prompt: active (T, M), the weights used of each matrix
    logits, active = decoder.step(token)            # one token more: active (M)

Weights may be kept as f32, as bf16 (half the bytes, so about half the time), or as int8 with a scale for each
(input, stripe) and one for each column; beside narrow weights keys and values are bf16. Thresholds are always
f32, and the constant part of an output, mu @ W + b, comes from f32 weights. A Decoder is a snapshot: it does
not see later changes of the model, nor need it any more.

Not here: several sequences at once, GPUs. TorchDecoder needs no compiler, and is slower than a dense model.
"""

import math
import os

import numpy as np
import torch

import build_kernel
from cwic import KVCache, Neurons, StripedLinear, along, rotary_tables

FORMATS = {'f32': torch.float32, 'bf16': torch.bfloat16, 'int8': torch.int8}    # in sparse_kernel.c's order
MAX_TILE = 2048     # columns that are computed together: they and their sums stay in the first-level cache
MIN_INPUTS = 64     # of a task: with fewer, what is read at once gets too short

# -----------------------------------------------------------------------------
# packing: weights in the order in which the kernel reads them


class Arena:
    """
    One block of memory for all that is read for each token, so large that numpy asks for huge pages: where
    there are fewer, the processor finds an address faster. What is taken from it starts on a cache line.
    """

    def __init__(self, size):
        block = torch.from_numpy(np.empty(size + 64, np.uint8))
        self.rest = block[-block.data_ptr() % 64:]

    def empty(self, shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        taken, self.rest = self.rest[:size], self.rest[-(-size // 64) * 64:]
        return taken.view(dtype).view(shape)


def largest(weights, dim):
    """The largest magnitude in each column (dim 0) or row (dim 1) of weights (in, out)."""
    return torch.maximum(weights.amax(dim), -weights.amin(dim)).clamp_min(1e-30)


def quantise(rows, column_scale):
    """rows (in, columns) = row_scale * column_scale * integers -> integers up to 127, as f32; row_scale."""
    rows = rows / column_scale
    row_scale = largest(rows, 1) / 127
    return rows.div_(row_scale[:, None]).round_(), row_scale


class PackedMatrix:
    """
    A StripedLinear or Neurons as the kernel's Matrix: its sizes, and the tensors that its pointers point to,
    all of which may be changed later. dense: with thresholds that skip nothing. empty(shape, dtype=): where
    memory comes from; tasks: how many there should be for threads to share, at most 4. Raises ValueError
    where the layer is not f32.

    In int8 a weight is row_scale * column_scale * integer. With row scales alone, a few columns that are much
    larger than the others coarsen all: the KL of SmolLM2-135M to itself in f32 was ten times what it is now.
    """

    @torch.no_grad()
    def __init__(self, layer, dtype='f32', dense=False, empty=torch.empty, tasks=2):
        if any(tensor.dtype != torch.float32 for tensor in layer.state_dict().values()):
            raise ValueError('only a model in f32 can be packed')
        n_in, int8, thresholds, mu = layer.n_in, dtype == 'int8', layer.thresholds(), layer.mu
        row_scale = column_scale = None
        if dense:
            thresholds, mu = torch.full_like(thresholds, -1), torch.zeros_like(mu)
        if isinstance(layer, Neurons):
            # for each neuron its column of up, and next to it its row of down
            up, down = layer.adapter_up(layer.up).t(), layer.adapter_down(layer.down)       # (neurons, d)
            n_out = stripe = tile = down.shape[1]
            if int8:
                column_scale = largest(down, 0)
                (up, up_scale), (down, down_scale) = quantise(up, 1), quantise(down, column_scale)
                row_scale = up_scale * down_scale
            weight, base = empty((n_in, 2, n_out), dtype=FORMATS[dtype]), torch.zeros(n_out)
            weight[:, 0], weight[:, 1] = up, down
        else:
            # tile after tile, each row by row
            unpacked, n_out, stripe = layer.adapter(layer.weight), layer.n_out, layer.stripe
            tile = math.ceil(stripe / math.ceil(stripe / MAX_TILE))             # equal ones, none too wide
            base = torch.zeros(n_out) if layer.bias is None else layer.bias
            if mu.any():
                base = mu @ unpacked + base
            if int8:
                column_scale, row_scale = largest(unpacked, 0), torch.empty(thresholds.shape)
            weight, start = empty((n_in * n_out,), dtype=FORMATS[dtype]), 0
            for i, columns in enumerate(unpacked.split(stripe, dim=1)):                     # (in, stripe)
                if int8:
                    columns, row_scale[i] = quantise(columns, column_scale[i * stripe:(i + 1) * stripe])
                for rows in columns.split(tile, dim=1):                                     # (in, tile)
                    weight[start:start + rows.numel()].view(rows.shape).copy_(rows)
                    start += rows.numel()
        tiles = math.ceil(stripe / tile) * math.ceil(n_out / stripe)
        splits = max(1, min(math.ceil(tasks / tiles), n_in // MIN_INPUTS))
        self.sizes = dict(n_in=n_in, n_out=n_out, stripe=stripe, tile=tile, splits=splits)
        self.sums = tiles * splits * tile               # numbers that its tasks leave behind
        self.tensors = dict(weight=weight)
        for name, values in dict(thresholds=thresholds, mu=mu, row_scale=row_scale, column_scale=column_scale,
                                 base=base).items():
            if values is not None:
                self.tensors[name] = empty(tuple(values.shape), dtype=torch.float32).copy_(values)

    def struct(self, ffi):
        """For ffi.new('Matrix *', ...), good as long as self is kept."""
        return {**self.sizes, **{name: pointer(ffi, tensor) for name, tensor in self.tensors.items()}}


def pointer(ffi, tensor):
    return ffi.cast('void *', tensor.data_ptr())


# -----------------------------------------------------------------------------


class Window:
    """
    What decoders have in common: the tokens they have read, of which the context holds block_size.
    names: M matrices; dense: the weights of each, np.int64 (M).
    """

    def __init__(self, model):
        self.config, self.window = model.config, []
        self.names = [name for name, _ in model.gated()]
        self.dense = np.array([layer.dense for _, layer in model.gated()], np.int64)

    def reset(self):
        """Forgets the tokens so far."""
        self.window = []

    def prefill(self, tokens):
        """
        Reads a prompt, a list of T >= 1 token ids of which a model can keep the last block_size, as the start
        of a new sequence. Returns logits np.float32 (vocab) of its last token and active np.int64 (T', M),
        what each token that was read used, T' = min(T, block_size). Raises ValueError for no tokens, or
        unknown ones.
        """
        self.check(tokens)
        self.reset()
        return self.extend(tokens[-self.config.block_size:])

    def extend(self, tokens):
        """
        Reads more tokens, and returns what prefill does. Whenever the context is full the window first
        becomes its own last half, the next token included, and is read again from position 0.
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
        """Reads one token more, as extend does. Returns logits np.float32 (vocab) and active np.int64 (M)."""
        logits, active = self.extend([int(token)])
        return logits, active[0]

    def check(self, tokens):
        if not tokens:
            raise ValueError('a prompt needs at least one token')
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f'token {token} is not one of the {self.config.vocab_size} this model knows')


class TorchDecoder(Window):
    """
    A Decoder in plain PyTorch, for where no kernel can be built: the same results, computed by the model.
    With dense=True every weight is used.
    """

    def __init__(self, model, dense=False):
        super().__init__(model)
        self.model, self.use_all, self.cache = model.eval(), dense, KVCache(model.config)

    @torch.no_grad()
    def forward(self, tokens):
        """tokens, which follow those of the window -> logits (vocab) of the last one, active (T, M)."""
        self.cache.length = len(self.window)
        logits, active = self.model(torch.tensor([tokens]), self.cache, self.use_all)
        return logits[0, -1].numpy(), active[:, 0].t().numpy().astype(np.int64)


class Decoder(Window):
    """
    dtype: of the weights, 'f32', 'bf16' or 'int8'; threads: default, every core up to 8. With dense=True
    every weight is used. Sums are taken in two parts, for more than two threads in four, so that logits may
    differ in their last bits. Of a prompt it computes the logits of the last token alone, so for those before
    no shortlist is counted. Raises build_kernel.KernelUnavailable, and ValueError for a dtype or a number
    of threads that cannot be.
    """

    def __init__(self, model, dtype='f32', threads=None, dense=False):
        if dtype not in FORMATS:
            raise ValueError(f'dtype must be one of {", ".join(FORMATS)}, not {dtype}')
        kernel = build_kernel.load()
        super().__init__(model)
        self.lib, self.ffi, self.dtype, c = kernel.lib, kernel.ffi, dtype, model.config
        self.overhead = 0 if dense else model.head.overhead
        self.kept = []                                  # what C points to has to outlive the pointers

        layers = dict(model.gated())
        if c.bases:
            layers['basis'] = StripedLinear(c.n_embd, c.n_embd, c.n_embd, bias=False)
            layers['basis'].weight.data = model.basis.float()
        size = sum(layer.dense * FORMATS[dtype].itemsize + 6 * 64       # and thresholds, scales, mu and base
                   + 4 * (2 * layer.theta.numel() + layer.n_in + 2 * (layer.dense // layer.n_in))
                   for layer in layers.values())
        embeds = c.bases or c.shortlist     # else embeddings are read where the head has its columns
        size += (model.head.dense * FORMATS[dtype].itemsize + 64) * embeds
        empty = Arena(size).empty
        threads = min(os.cpu_count() or 1, 8) if threads is None else threads
        tasks = 2 if threads <= 2 else 4                # no more: what they find has to be added up
        self.packed = {name: PackedMatrix(layer, dtype, dense or name == 'basis', empty, tasks)
                       for name, layer in layers.items()}
        matrix = {name: packed.struct(self.ffi) for name, packed in self.packed.items()}

        def keep(tensor):
            self.kept.append(tensor.detach())
            return pointer(self.ffi, self.kept[-1])

        def norm(module):
            bias = getattr(module, 'bias', None)
            bias = self.ffi.NULL if bias is None else keep(bias.clone())
            return dict(gain=keep(module.weight.clone()), bias=bias)

        def layer(i):
            matrices = dict(zip(('qkv', 'out', 'up', 'down'), (matrix[f'{i}.{name}'] for name in c.matrices)))
            return dict(matrices, ln_1=norm(model.blocks[i].ln_1), ln_2=norm(model.blocks[i].ln_2))

        if c.arch == 'gpt2':
            positions = dict(wpe=keep(model.wpe.weight.clone()))
        else:
            positions = dict(zip(('cos', 'sin'), map(keep, rotary_tables(c, torch.arange(c.block_size)))))
        of_state, more = torch.float32 if dtype == 'f32' else torch.bfloat16, {}
        if embeds:
            embedding = model.head.adapter(model.head.weight).t()                               # (vocab, d)
            embedding = along(embedding, model.basis.t()) if c.bases else embedding
            if dtype == 'int8':
                column_scale = largest(embedding, 0)
                embedding, row_scale = quantise(embedding, column_scale)
                more = dict(embedding_row_scale=keep(row_scale), embedding_column_scale=keep(column_scale))
            more['embedding'] = keep(empty(tuple(embedding.shape), dtype=FORMATS[dtype]).copy_(embedding))
        if c.bases:
            more['basis'] = matrix['basis']
        if c.shortlist and not dense:
            more['margin'] = model.head.margin_in_nats()
        self.kept.append(self.ffi.new('Layer[]', [layer(i) for i in range(c.n_layer)]))
        sizes = 'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_hidden', 'norm_eps'
        self.c_model = self.ffi.new('Model *', dict(
            {name: getattr(c, name) for name in sizes}, **positions, arch=('gpt2', 'llama').index(c.arch),
            dtype=list(FORMATS).index(dtype), layers=self.kept[-1], ln_f=norm(model.ln_f),
            head=matrix['head'], **more))
        batch, unit = self.lib.BATCH, self.lib.BLOCK
        shapes = dict(k=(c.n_layer, c.n_kv_head, math.ceil(c.block_size / unit), c.head_dim, unit),
                      v=(c.n_layer, c.n_kv_head, c.block_size, math.ceil(c.head_dim / unit) * unit),
                      x=(batch, c.n_embd), h=(batch, c.n_embd), mixed=(batch, c.n_embd),
                      qkv=(batch, (c.n_head + 2 * c.n_kv_head) * c.head_dim), hidden=(batch, c.n_hidden))
        self.state = self.ffi.new('State *', {
            name: keep(torch.zeros(shape, dtype=of_state if name in 'kv' else torch.float32))
            for name, shape in shapes.items()})
        self.set_threads(threads)

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
        tokens, buffer, batch = np.array(tokens, np.uint32), self.ffi.from_buffer, self.lib.BATCH
        logits = np.empty(self.config.vocab_size, np.float32)
        active = np.empty((len(tokens), len(self.names)), np.int64)
        for start in range(0, len(tokens), batch):      # Python may see a Ctrl-C in between
            read, position = tokens[start:start + batch], len(self.window) + start
            if self.lib.decode(self.team, self.c_model, self.state, buffer('uint32_t[]', read), len(read),
                               position, buffer('float[]', logits),
                               buffer('int64_t[]', active[start:start + batch])):
                raise ValueError(f'{len(read)} tokens at position {position} were refused')
        active[:, -1] += self.overhead
        return logits, active
