"""
CWIC, "Compute Where It Counts": a GPT that learns which of its weights each token can do without.

This is the whole model, to be read from top to bottom: the statistics of a layer's input, the gate, the
striped linear layer, the LM head, bases, GPT-2's block, Llama's block, the losses, adapters, and a plain
generate(). The C kernel and everything else is compared with it. To train a model run train.py; to talk to
one, chat.py.

    from cwic import GPT, CWICConfig
    model = GPT(CWICConfig())
    logits, active = model.eval()(tokens)      # active[matrix, batch, position]: the weights that were used

A worked example, which is also a test. One token enters a layer of 4 inputs and 4 outputs, cut in 2 stripes
of 2:

    c = x - mu        =  0.9  -0.2   0.5  -1.0      the input, centred on its usual value
    t, stripe 0       =  0.5   0.5   0.5   0.5      |c| > t:  yes no no yes     rows 0, 3 of W[:, 0:2]
    t, stripe 1       =  1.0   0.1   0.4   2.0      |c| > t:  no yes yes no     rows 1, 2 of W[:, 2:4]

8 of the 16 weights are used: active = 2 * 2 + 2 * 2 = 8, a reduction of 2. No row was dropped altogether.

Not here: dropout, padding, beam search, files (see checkpoint.py), or speed. sparse_kernel.c is what really
skips the weights.

The method is that of "Compute Where It Counts: High Quality Sparsely Activated LLMs" (Crystal AI, 2025,
github.com/crystal-ai-org/cwic). The blocks are GPT-2's (Radford et al., 2019) and Llama's (Touvron et al.,
2023).
"""

import copy
import functools
import itertools
import math
import sys
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

BANDWIDTH = 0.1         # width of the window in which a threshold feels its inputs, in sigmas
FLOOR = 1e-3            # thresholds never fall below this, in sigmas
OBSERVE_EVERY = 7       # one token in seven, or a few more, is enough for statistics
MARGIN = 4.0            # nats below the likeliest token at which a shortlist ends at first
MARGIN_WINDOW = 0.5     # nats: width of the window in which a margin feels the tokens around it
MARGIN_SCALE = 200.0    # Adam moves a margin so many times faster than other numbers

# -----------------------------------------------------------------------------
# thresholds, and the usual value and the spread of each input, in which they are measured


class Thresholds(nn.Module):
    """
    What everything that skips has in common: one threshold t = theta * scale * sigma for each (stripe, input)
    pair. theta is trained; scale makes Adam move thresholds about as fast, in sigmas, as it moves outputs.
    mu and sigma are observed once, on dense tokens, before anything is skipped. They do not follow what
    training makes of the inputs: what is skipped learns as if it were used, so it may grow and grow, and a
    sigma that grew with it would keep it below its threshold for ever.
    """
    centred = True      # or mu stays 0
    fuse = False        # compile the gate: see GPT.fuse_gates()

    def __init__(self, n_in, stripes):
        super().__init__()
        self.n_in = n_in
        self.scale = 10 * math.sqrt(n_in)
        self.theta = nn.Parameter(torch.zeros(stripes, n_in))   # (n, in)
        self.register_buffer('mu', torch.zeros(n_in))           # usual value of each input
        self.register_buffer('sigma', torch.zeros(n_in))        # spread, as a standard deviation

    def thresholds(self):
        """Absolute thresholds t (n, in): an input is used by a stripe where |x - mu| > t."""
        return self.theta * self.scale * self.sigma

    @torch.no_grad()
    def observe(self, x):
        """
        Sets mu and sigma of each input, robustly, from x (B, T, in). mu is close to the median: the mean of
        what lies near it, a value weighing 1 / max(distance, sigma / 10). (A median itself is some token's
        value, whose c, 0 but for rounding, would be of either sign.) sigma is the mean distance from mu,
        which sqrt(pi / 2) makes a standard deviation where inputs are normal.
        """
        # a number that meets each position of the windows equally often: the first one, where attention parks
        # what it does not need, is unlike all others
        every = next(n for n in itertools.count(OBSERVE_EVERY) if math.gcd(n, x.shape[1]) == 1)
        x = x.flatten(0, 1)[::every].float()                                # (tokens, in)
        if self.centred:
            distance = (x - x.median(0).values).abs()
            weight = 1 / distance.clamp_min(distance.mean(0) / 10).clamp_min(1e-12)
            self.mu.copy_((weight * x).sum(0) / weight.sum(0))
        self.sigma.copy_(math.sqrt(math.pi / 2) * (x - self.mu).abs().mean(0))


def is_threshold(name):
    """Whether a parameter of this name decides what is skipped."""
    return name.endswith(('theta', 'margin'))


@torch.no_grad()
def limit_thresholds(layers, before):
    """
    After an optimiser step: no threshold moves by more than half its window, beyond which it would not feel
    the inputs it just passed, nor below the floor. layers: of Thresholds; before: [theta (n, in) as it was].
    """
    # _foreach: a GPU does the small work of all layers in a few kernels, not in a thousand
    thetas, scales = [layer.theta for layer in layers], [layer.scale for layer in layers]
    moves = torch._foreach_sub(thetas, before)
    torch._foreach_clamp_max_(moves, [BANDWIDTH / 2 / scale for scale in scales])
    torch._foreach_clamp_min_(moves, [-BANDWIDTH / 2 / scale for scale in scales])
    limited = torch._foreach_add(before, moves)
    torch._foreach_clamp_min_(limited, [FLOOR / scale for scale in scales])
    torch._foreach_copy_(thetas, limited)


# -----------------------------------------------------------------------------
# the gate: which weights a token uses, and what its thresholds learn from it


def by_stripe(columns, stripe):
    """(rows, out) -> (n, rows, stripe): the columns stripe by stripe, the last filled up with zeros."""
    if columns.shape[1] % stripe:
        columns = F.pad(columns, (0, -columns.shape[1] % stripe))
    return columns.view(len(columns), -1, stripe).transpose(0, 1)


def side_by_side(stripes, n_out):
    """(n, rows, stripe) -> (rows, out): the way back, without what filled up the last."""
    return stripes.transpose(0, 1).reshape(stripes.shape[1], -1)[:, :n_out]


def stripe_widths(n_out, stripe, device):
    """Columns in each stripe (n): only the last may be narrower."""
    widths = torch.full((math.ceil(n_out / stripe),), stripe, device=device)
    widths[-1] -= -n_out % stripe
    return widths


def above(a, b):
    """1.0 where a > b, else 0.0. (Bool masks, and converting them, are several times slower on a CPU.)"""
    return torch.gt(a, b, out=a.new_empty(torch.broadcast_shapes(a.shape, b.shape)))


def product_dtype(weight):
    """What matrix products compute in: autocast's dtype where it is on, else that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def as_count(active):
    """Exact counts that gradients can flow to: f64, or f32 on Apple's GPUs, which have nothing better."""
    return active.to(torch.float32 if active.device.type == 'mps' else torch.float64)


def gate(c, mu, t, dtype):
    """
    What meets the weights, and how many inputs are used. c = x - mu (N, in), mu (in), t (n, in) ->
    mu + m * c (n, N, in) in dtype, sum of m (n, N)
    """
    mask = above(c.abs(), t[:, None])                                               # (n, N, in)
    return torch.addcmul(mu, mask, c).to(dtype), mask.sum(2)


def step_backward(c, t, bw, d, price):
    """
    The derivative of what is gated. The step m = |c| > t has none that is of use, so one is defined, with a
    window k = 1[ ||c| - t| < bw / 2 ] / bw around each threshold. d is the gradient of m * c, and price that
    of m:

        dc = d + price * k * sign(c)  (d: as if nothing had been skipped)
        dt = -sum over tokens of (d * c + price) * k

    c (N, in), t (n, in), bw (in), d (n, N, in), price (n, N, 1) -> dc (N, in), dt (n, in)
    """
    window = above(bw / 2, (c.abs() - t[:, None]).abs_())                           # (n, N, in)
    per_bw = 1 / bw.clamp_min(1e-12)        # an input that never moves has no window, so nothing to divide
    dt = -torch.addcmul(price, d, c).mul_(window).sum(1) * per_bw
    return d.sum(0, dtype=c.dtype) + (price * window).sum(0) * torch.sign(c) * per_bw, dt


class Fused:
    """
    A function in one pass over memory, not a dozen: compiled when it is first called, and for other dtypes
    when they come. If that fails, for want of memory say, all are called as they are from then on.
    """
    compiler_works = True

    def __init__(self, function):
        self.function, self.compiled = function, torch.compile(function, dynamic=True)

    def __call__(self, *args):
        if Fused.compiler_works:
            try:
                return self.compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:     # that of every compiler among them
                Fused.compiler_works = False
                reason = str(error).strip().splitlines()[0]
                print(f'the gates are not compiled any more, so slower: {reason}', file=sys.stderr)
        return self.function(*args)


fused = functools.cache(Fused)      # fused(gate), fused(step_backward)


class GatedProduct(torch.autograd.Function):
    """
    y[:, stripe] = (mu + m * c) @ W[:, stripe],  c = x - mu,  with the mask m = |c| > t[stripe]; and the
    number of weights that each token used. Only x is kept for backward: masks are cheaper to make again than
    to store.

    x (N, in) f32, mu (in), t (n, in), bw (in), W (in, out); stripe: columns in each stripe but perhaps the
    last; fuse: see fused(). Returns y (N, out) in the dtype of matrix products, active (N,) f64.
    """

    @staticmethod
    def forward(ctx, x, mu, t, bw, W, stripe, fuse):
        ctx.save_for_backward(x, mu, t, bw, W)
        ctx.stripe, ctx.dtype = stripe, product_dtype(W)
        ctx.gate, ctx.through = (fused(gate), fused(step_backward)) if fuse else (gate, step_backward)
        with torch.autocast(x.device.type, enabled=False):
            inputs, count = ctx.gate(x - mu, mu, t, ctx.dtype)                      # (n, N, in), (n, N)
            y = torch.bmm(inputs, by_stripe(W.to(ctx.dtype), stripe))               # (n, N, stripe)
            widths = stripe_widths(W.shape[1], stripe, x.device)                    # (n,)
            return side_by_side(y, W.shape[1]), (widths[:, None] * as_count(count)).sum(0)

    @staticmethod
    def backward(ctx, g, g_active):
        x, mu, t, bw, W = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            c, g = x - mu, by_stripe(g, ctx.stripe)                                 # (N, in), (n, N, stripe)
            inputs, _ = ctx.gate(c, mu, t, ctx.dtype)                               # (n, N, in)
            dW = side_by_side(torch.bmm(inputs.transpose(1, 2), g), W.shape[1]).to(W.dtype)     # (in, out)
            d = torch.bmm(g, by_stripe(W.to(ctx.dtype), ctx.stripe).transpose(1, 2))            # (n, N, in)
            widths = stripe_widths(W.shape[1], ctx.stripe, x.device)                # (n,)
            dx, dt = ctx.through(c, t, bw, d, widths[:, None, None] * g_active.to(x.dtype)[:, None])
            return dx, None, dt, None, dW, None, None


def random_weights(*shape):
    """What GPT-2's weights were at first. On the meta device nothing: torch takes a second to learn how."""
    weights = torch.empty(shape)
    return weights if weights.is_meta else weights.normal_(std=0.02)


class StripedLinear(Thresholds):
    """
    A linear layer, weights input-major, whose every (stripe, input) pair has a learned threshold:

        y[stripe] = (mu + m * (x - mu)) @ W[:, stripe] + b[stripe],       m = |x - mu| > t[stripe]

    A skipped input is thus replaced by its usual value mu, not by zero. (mu @ W + b is the same for all
    tokens: the kernel computes it once, and then reads only the rows of W where m is 1.)
    """

    def __init__(self, n_in, n_out, stripe, bias):
        super().__init__(n_in, stripes=math.ceil(n_out / stripe))
        self.n_out, self.stripe = n_out, min(stripe, n_out)
        self.n_weights = n_in * n_out       # weights a dense layer uses for each token
        self.overhead = 0               # weights that each token needs besides, where thresholds are in use
        self.weight = nn.Parameter(random_weights(n_in, n_out))                 # (in, out)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None          # (out,)
        self.adapter = nn.Identity()    # or a LoRA change of the weight

    def forward(self, x, dense=False):
        """x (B, T, in) -> y (B, T, out), active (B, T): the weights each token used. dense: all of them."""
        y, active = self.product(x, self.adapter(self.weight), dense)
        return (y if self.bias is None else y + self.bias.to(y.dtype)), active

    def product(self, x, weight, dense):
        """As forward(), with this weight (in, out) and no bias."""
        B, T, _ = x.shape
        if dense:
            y, active = x @ weight, as_count(torch.full((B, T), self.n_weights, device=x.device))
        else:
            y, active = GatedProduct.apply(x.float().view(B * T, -1), self.mu, self.thresholds(),
                                           BANDWIDTH * self.sigma, weight, self.stripe, self.fuse)
            y, active = y.view(B, T, -1), active.view(B, T) + self.overhead
        return y, active


# -----------------------------------------------------------------------------
# the LM head: of all tokens roughly how likely they are, of the likeliest exactly


def behind(logits):
    """How far each logit is below the largest of its token, in nats. (N, vocab) -> (N, vocab) f32."""
    return logits.amax(1, keepdim=True).float() - logits.float()


class Shortlist(torch.autograd.Function):
    """
    What is likely by its rough logit is computed again: logits = exact where max(rough) - rough < margin, and
    rough elsewhere; and how many weights each token used for that, n_in for each exact logit. The margin is a
    threshold, and learns like one, from what exact logits change in the loss, and cost, in a window around
    it. Rough logits learn from the loss where they stand, exact ones where they do.

    rough, exact (N, vocab) of one dtype, margin (1,) in nats -> logits (N, vocab), active (N,) f64.
    """

    @staticmethod
    def forward(ctx, rough, exact, margin, n_in):
        ctx.save_for_backward(rough, exact, margin)
        ctx.n_in = n_in
        listed = behind(rough) < margin                                         # (N, vocab)
        return torch.where(listed, exact, rough), as_count(listed.sum(1)) * n_in

    @staticmethod
    def backward(ctx, g, g_active):
        rough, exact, margin = ctx.saved_tensors
        distance = behind(rough)                                                # (N, vocab)
        listed, window = distance < margin, (distance - margin).abs() < MARGIN_WINDOW / 2
        price = ctx.n_in * g_active.float()[:, None]
        change = g.float() * (exact.float() - rough.float()) + price
        d_margin = torch.where(window, change, 0.0).sum() / MARGIN_WINDOW
        return torch.where(listed, 0.0, g), torch.where(listed, g, 0.0), d_margin[None], None


class Head(StripedLinear):
    """
    The LM head: a StripedLinear, with a shortlist if it is to have one. Of tens of thousands of logits nearly
    all need only be good enough to say that their tokens are unlikely, for which few weights do. The
    others are computed again, with every weight of their columns.
    """

    def __init__(self, config):
        super().__init__(config.n_embd, config.vocab_size, config.stripe_head, bias=False)
        start = torch.full((1,), MARGIN / MARGIN_SCALE)
        self.margin = nn.Parameter(start) if config.shortlist else None         # nats / MARGIN_SCALE

    def margin_in_nats(self):
        """How far below the largest logit the shortlist ends, a number; 0: there is none."""
        return 0.0 if self.margin is None else float(self.margin.detach()) * MARGIN_SCALE

    def forward(self, x, dense=False):
        weight = self.adapter(self.weight)
        logits, active = self.product(x, weight, dense)
        if self.margin is None or dense:
            return logits, active
        exact = (x @ weight).to(logits.dtype)
        logits, more = Shortlist.apply(logits.flatten(0, 1), exact.flatten(0, 1), self.margin * MARGIN_SCALE,
                                       self.n_in)
        return logits.view_as(exact), active + more.view(active.shape)


# -----------------------------------------------------------------------------
# bases: what a layer reads may be measured along other directions than those in which it comes


def axes(d):
    """The basis that changes nothing (d, d). bf16: files are smaller."""
    return torch.eye(d, dtype=torch.bfloat16)


def along(x, basis):
    """x (..., d), measured along the columns of basis (d, d)."""
    return (x @ basis.to(x.dtype)).to(x.dtype)


def principal(x):
    """Of numbers x (N, d), the directions (d, d) along which they are not correlated."""
    return torch.linalg.eigh(x.double().t().cov())[1].bfloat16()


def in_bases(name, matrix, bases, config):
    """
    What a matrix, or an adapter's part of one, becomes with these bases, so that the model computes the same
    when dense. name: in the state_dict, where bases have their places, too; those that read or write nothing
    along a basis stay. (Rounded, bases are not quite at right angles, so what reads gets their inverse.)
    """
    basis = bases.get('basis' if name.startswith('head.') else name.partition('attn.')[0] + 'attn.basis')
    if basis is None:
        return matrix
    basis, new = basis.float().cpu(), matrix.detach().float().cpu()
    if name in ('head.weight', 'head.adapter.A'):
        new = torch.linalg.solve(basis, new)
    elif name.endswith(('qkv.weight', 'qkv.adapter.B', 'qkv.bias')):
        width = basis.shape[0] * basis.shape[1]                                     # kv heads * D
        queries_keys, values = new.split([new.shape[-1] - width, width], dim=-1)
        values = values.unflatten(-1, basis.shape[:2])[..., None, :] @ basis    # (..., kv heads, 1, D)
        new = torch.cat([queries_keys, values.flatten(-3)], dim=-1)
    elif name.endswith(('out.weight', 'out.adapter.A')):
        basis = basis.repeat_interleave(config.n_head // config.n_kv_head, dim=0)   # heads share values
        new = torch.linalg.solve(basis, new.unflatten(0, (config.n_head, -1))).flatten(0, 1)
    return new.to(matrix)


# -----------------------------------------------------------------------------
# GPT-2


@dataclass
class CWICConfig:
    arch: str = 'gpt2'          # or 'llama'
    vocab_size: int = 4096
    block_size: int = 256       # context, in tokens
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0          # Llama: heads of keys and values, each for a group of queries; 0: n_head
    n_embd: int = 192
    n_hidden: int = 0           # width of the MLP; 0: 4 * n_embd
    bias: bool = True           # GPT-2: in linear layers and norms; the head never has one, nor has Llama
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0     # Llama: the slowest rotation takes about 2 pi * rope_theta positions
    rope_scaling: tuple = ()        # Llama 3: factor, low_freq_factor, high_freq_factor, original context
    stripe_qkv: int = 192       # columns to a stripe, for each kind of matrix
    stripe_out: int = 192
    stripe_up: int = 192        # Llama: of the gate
    stripe_down: int = 192      # GPT-2 only
    stripe_head: int = 1024
    bases: bool = False         # out and head read the principal components of their inputs: find_bases()
    shortlist: bool = False     # the head computes the logits of the likeliest tokens with every weight

    def __post_init__(self):
        if self.arch not in ('gpt2', 'llama'):
            raise ValueError(f'arch must be gpt2 or llama, not {self.arch!r}')
        self.n_kv_head, self.n_hidden = self.n_kv_head or self.n_head, self.n_hidden or 4 * self.n_embd
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type and not (field.type is float and type(value) is int):
                raise ValueError(f'{field.name} must be of type {field.type.__name__}, not {value!r}')
            if field.type in (int, float) and not 0 < value < 2 ** 40:          # nor nan
                raise ValueError(f'{field.name} must be a number above 0, not {value}')
        if self.rope_scaling and [type(value) in (int, float) for value in self.rope_scaling] != [True] * 4:
            raise ValueError(f'rope_scaling must be 4 numbers, not {self.rope_scaling}')
        self.bias = self.bias and self.arch == 'gpt2'
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f'n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}), '
                             f'and that of n_kv_head ({self.n_kv_head})')
        if self.arch == 'gpt2' and self.n_kv_head != self.n_head:
            raise ValueError('n_kv_head is an option of --arch llama')
        if self.arch == 'llama' and self.head_dim % 2:
            raise ValueError(f'n_embd / n_head ({self.head_dim}) must be even, for rotary positions')

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def matrices(self):
        """The names of what has thresholds in each layer, in the order of every active count."""
        return ('qkv', 'out', 'up', 'down') if self.arch == 'gpt2' else ('qkv', 'out', 'gate', 'neurons')


class KVCache:
    """Keys and values so far. k, v (n_layer, batch, n_kv_head, block_size, head_dim); length in tokens."""

    def __init__(self, config, batch=1, device='cpu', dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_kv_head, config.block_size, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.widths = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.qkv = StripedLinear(config.n_embd, sum(self.widths), config.stripe_qkv, config.bias)
        self.out = StripedLinear(config.n_embd, config.n_embd, config.stripe_out, config.bias)
        if config.bases:        # of the values of each head; they are in qkv's and out's weights already
            self.register_buffer('basis', axes(self.head_dim).repeat(config.n_kv_head, 1, 1))

    def forward(self, x, rotary, cache, dense):
        """x (B, T, d); rotary: Llama's tables, or None -> y (B, T, d), [active of qkv, of out]."""
        qkv, active_qkv = self.qkv(x, dense)
        q, k, v = (z.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for z in qkv.split(self.widths, dim=2))
        if rotary is not None:                                              # q, k, v (B, heads, T, head_dim)
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mask, past = None, 0
        if cache is not None:
            past, now = cache.length, cache.length + x.shape[1]
            cache.k[self.layer, :, :, past:now], cache.v[self.layer, :, :, past:now] = k, v
            k, v = (z[self.layer, :, :, :now].to(q.dtype) for z in (cache.k, cache.v))
            if past and x.shape[1] > 1:
                mask = torch.ones(x.shape[1], now, dtype=torch.bool, device=x.device).tril(past)
        grouped = k.shape[1] < q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not past, enable_gqa=grouped)
        y, active_out = self.out(y.transpose(1, 2).flatten(2), dense)
        return y, [active_qkv, active_out]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = StripedLinear(config.n_embd, config.n_hidden, config.stripe_up, config.bias)
        self.down = StripedLinear(config.n_hidden, config.n_embd, config.stripe_down, config.bias)

    def forward(self, x, dense):
        h, active_up = self.up(x, dense)
        y, active_down = self.down(F.gelu(h, approximate='tanh'), dense)
        return y, [active_up, active_down]


class Block(nn.Module):
    """GPT-2's: x + attn(ln(x)), then x + mlp(ln(x)). Llama's is the same, of other pieces."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = norm(config)
        self.mlp = MLP(config) if config.arch == 'gpt2' else GatedMLP(config)

    def forward(self, x, rotary, cache, dense):
        y, active_attn = self.attn(self.ln_1(x), rotary, cache, dense)
        x = x + y
        y, active_mlp = self.mlp(self.ln_2(x), dense)
        return x + y, active_attn + active_mlp


def norm(config):
    if config.arch == 'gpt2':
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps)


# -----------------------------------------------------------------------------
# what Llama's block has besides: rotary positions, and a gated MLP whose up and down share one mask


def rotary_tables(config, positions):
    """
    positions (T,) -> cos, sin (T, head_dim / 2), f32: by how much pairs of a head's numbers turn (Su et al.,
    2021). rope_scaling, as in Llama 3: what turns less than low_freq_factor times in the original context is
    slowed down by factor, what turns more than high_freq_factor times is left alone, and what lies between is
    slowed down in part.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    speed = 1.0 / config.rope_theta ** (pairs / config.head_dim)           # radians per position
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        turns = context * speed / (2 * math.pi)                             # in the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)                   # 1: fast, left alone; 0: slow
        speed = keep * speed + (1 - keep) * speed / factor
    angles = positions[:, None].float() * speed
    return angles.cos(), angles.sin()


def rotate(heads, cos, sin):
    """heads (B, heads, T, head_dim): number j of the first half and number j of the second turn together."""
    first, second = heads.float().chunk(2, dim=3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3).to(heads.dtype)


class GatedNeurons(torch.autograd.Function):
    """
    a = h * z where |z| > t, else 0: what neurons hand on, and how many weights each token used of them,
    `width` for each active neuron. What is gated is z.  z, h (N, neurons), t, bw (neurons); fuse: see fused()
    -> a as h, active (N,) f64.
    """

    @staticmethod
    def forward(ctx, z, h, t, bw, width, fuse):
        ctx.save_for_backward(z, h, t, bw)
        ctx.width, ctx.through = width, fused(step_backward) if fuse else step_backward
        mask = above(z.abs(), t)                                                # (N, neurons)
        return (mask * z * h).to(h.dtype), as_count(mask.sum(1)) * width

    @staticmethod
    def backward(ctx, g, g_active):
        z, h, t, bw = ctx.saved_tensors
        dh = above(z.abs(), t) * z * g
        price = ctx.width * g_active.to(z.dtype)
        dz, dt = ctx.through(z, t[None], bw, (g * h)[None], price[None, :, None])
        return dz, dh.to(h.dtype), dt[0], None, None, None


class Neurons(Thresholds):
    """
    Llama's up and down: y = (up(x) * z * m) @ down,  m = |z| > t, where z is what the gate says to each
    neuron. One threshold decides for a column of up and a row of down. z is usually close to 0: no centre.
    """
    centred = False

    def __init__(self, n_embd, n_hidden):
        super().__init__(n_hidden, 1)
        self.n_weights = 2 * n_embd * n_hidden
        self.up = nn.Parameter(random_weights(n_embd, n_hidden))                # (d, neurons)
        self.down = nn.Parameter(random_weights(n_hidden, n_embd))              # (neurons, d)
        self.adapter_up, self.adapter_down = nn.Identity(), nn.Identity()

    def forward(self, x, z, dense=False):
        """x (B, T, d), z (B, T, neurons) -> y (B, T, d), active (B, T)."""
        h, down = x @ self.adapter_up(self.up), self.adapter_down(self.down)
        if dense:
            return (h * z) @ down, as_count(torch.full(x.shape[:2], self.n_weights, device=x.device))
        a, active = GatedNeurons.apply(z.float().flatten(0, 1), h.flatten(0, 1), self.thresholds()[0],
                                       BANDWIDTH * self.sigma, 2 * x.shape[2], self.fuse)
        return a.view_as(h) @ down, active.view(x.shape[:2])


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = StripedLinear(config.n_embd, config.n_hidden, config.stripe_up, bias=False)
        self.neurons = Neurons(config.n_embd, config.n_hidden)

    def forward(self, x, dense):
        z, active_gate = self.gate(x, dense)
        y, active_neurons = self.neurons(x, F.silu(z), dense)
        return y, [active_gate, active_neurons]


# -----------------------------------------------------------------------------
# the model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.arch == 'gpt2':
            positions = random_weights(config.block_size, config.n_embd)
            self.wpe = nn.Embedding.from_pretrained(positions, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        # the token embedding is the head read the other way: row i of its transpose is token i
        self.head = Head(config)
        if config.bases:
            self.register_buffer('basis', axes(config.n_embd))      # (d, d), of the head's input
            self.head.overhead = config.n_embd ** 2
        for name, weight in self.named_parameters():
            # the more layers, the smaller is what each adds to the residual stream at first
            adds = name.endswith(('attn.out.weight', 'mlp.down.weight', 'mlp.neurons.down'))
            if adds and not weight.is_meta:
                weight.data.div_(math.sqrt(2 * config.n_layer))

    def sparse_layers(self):
        """[(name, StripedLinear or Neurons)], in the order of every active count: 0.qkv, 0.out, ..., head."""
        layers = [(f'{i}.{name}', getattr(part, name)) for i, block in enumerate(self.blocks)
                  for part, name in zip((block.attn, block.attn, block.mlp, block.mlp), self.config.matrices)]
        return layers + [('head', self.head)]

    def n_weights(self):
        """Weights that a dense model uses for each token, head included, embeddings and norms not."""
        return sum(layer.n_weights for _, layer in self.sparse_layers())

    def trunk(self, tokens, cache=None, dense=False, recompute=False):
        """
        All but the head. tokens (B, T) -> hidden (B, T, d), active (matrices - 1, B, T). recompute: keep no
        activations inside blocks, compute them again in backward.
        """
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        x, rotary = F.embedding(tokens, self.head.adapter(self.head.weight).t()), None          # (B, T, d)
        if self.config.bases:
            x = along(x, self.basis.t())                                        # from components to numbers
        if self.config.arch == 'gpt2':
            x = x + self.wpe(positions)
        else:
            rotary = rotary_tables(self.config, positions)
        active = []
        for block in self.blocks:
            if recompute:
                # torch's checkpoints are inputs that are kept, to begin anew from; nothing here is random
                x, active_block = torch.utils.checkpoint.checkpoint(
                    block, x, rotary, cache, dense, use_reentrant=False, preserve_rng_state=False)
            else:
                x, active_block = block(x, rotary, cache, dense)
            active += active_block
        if cache is not None:
            cache.length += tokens.shape[1]
        hidden = self.ln_f(x)
        return along(hidden, self.basis) if self.config.bases else hidden, torch.stack(active)

    def forward(self, tokens, cache=None, dense=False):
        """
        tokens (B, T) -> logits (B, T, vocab) f32, active (matrices, B, T) f64: the weights each matrix used
        for each token, counted in the pass that made the logits. With a KVCache, tokens follow those already
        in it, and join them. dense: every weight is used, thresholds play no part.
        """
        hidden, active = self.trunk(tokens, cache, dense)
        logits, active_head = self.head(hidden, dense)
        return logits.float(), torch.cat([active, active_head[None]])

    def fuse_gates(self):
        """From now on all gates are compiled: on a CPU, half the time they take, after some seconds."""
        for _, layer in self.sparse_layers():
            layer.fuse = True

    def inputs(self, tokens, look, names, dense=True):
        """Calls look(name, input) for the layers of these names, on one pass over tokens (B, T)."""
        layers = dict(self.sparse_layers())
        hooks = [layers[name].register_forward_pre_hook(
                    lambda _, args, name=name: look(name, args[-2]))        # x or z
                 for name in names if name != 'head']
        hidden, _ = self.trunk(tokens, dense=dense)
        for hook in hooks:
            hook.remove()
        if 'head' in names:
            look('head', hidden)

    @torch.no_grad()
    def observe(self, tokens):
        """Sets the statistics of every layer that has none, on one dense pass over tokens (B, T)."""
        layers = {name: layer for name, layer in self.sparse_layers() if not layer.sigma.any()}
        self.inputs(tokens, lambda name, x: layers[name].observe(x), layers)

    @torch.no_grad()
    def find_bases(self, tokens, dense=True):
        """
        Finds the bases of a model that is to have some, on tokens (B, T): the principal components of what
        its head reads, and of what attention gathers from the values of each head. In a pretrained model few
        of them hold most of what differs between tokens, while every number holds some of it: so more can be
        skipped. For attention that is free, as the matrices before and after take the change; for the head
        each token pays d * d weights. Of what reads along them, statistics are new, and thresholds back at 0.

        dense: with every weight in use. A model that is sparse already is to be looked at as it runs, as what
        it has learned to skip is noise, which would take the place of components.
        """
        config, bases = self.config, {}
        readers = {name: layer for name, layer in self.sparse_layers() if name.endswith(('out', 'head'))}
        found = {name: Thresholds(config.n_embd, len(layer.theta)) for name, layer in readers.items()}

        def find(name, x):
            x = x.float().cpu()                                                         # (B, T, d)
            if name == 'head':
                basis = bases['basis'] = principal(x.flatten(0, 1))
            else:               # of the heads that share values, all at once
                x = x.unflatten(2, (config.n_kv_head, -1, config.head_dim))
                basis = torch.stack([principal(x[:, :, head].flatten(0, 2)) for head in range(x.shape[2])])
                bases[f'blocks.{name.split(".")[0]}.attn.basis'] = basis                # (kv heads, D, D)
            found[name].observe(along(x, basis).flatten(2))

        self.inputs(tokens, find, readers, dense)
        for name, tensor in self.state_dict().items():
            tensor.copy_(bases[name] if name in bases else in_bases(name, tensor, bases, config))
        for name, layer in readers.items():     # theta, mu and sigma; weights are not in found
            layer.load_state_dict(found[name].state_dict(), strict=False)

    def parameter_groups(self, lr, threshold_lr, weight_decay):
        """
        What AdamW trains: matrices, decayed; biases and norms; thresholds, never decayed. Frozen: left out.
        """
        trained = [(is_threshold(name), p) for name, p in self.named_parameters() if p.requires_grad]
        thresholds = [p for threshold, p in trained if threshold]
        matrices = [p for threshold, p in trained if p.dim() > 1 and not threshold]
        others = [p for threshold, p in trained if p.dim() <= 1 and not threshold]
        return [{'params': matrices, 'lr': lr, 'weight_decay': weight_decay},
                {'params': others, 'lr': lr, 'weight_decay': 0.0},
                {'params': thresholds, 'lr': threshold_lr, 'weight_decay': 0.0}]


# -----------------------------------------------------------------------------
# the losses


def next_token_loss(logits, targets):
    """Mean cross-entropy in nats. logits (N, vocab), targets (N,)."""
    return F.cross_entropy(logits.float(), targets)


def kl_loss(logits, teacher_logits, reverse):
    """
    (1 - reverse) KL(teacher || student) + reverse KL(student || teacher), mean over tokens, in nats: at 1/2
    the two-way KL, at 0 what evaluate.py measures. logits (N, vocab), both.
    """
    logq, logp = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    weight = (1 - reverse) * logp.exp() - reverse * logq.exp()
    return (weight * (logp - logq)).sum(-1).mean()


def flop_loss(active, dense, target):
    """
    max(target - reduction, 0)^2, where reduction = dense / active; active: a tensor, the mean over all tokens
    of a step. Once nothing at all is active there is nothing to push on.
    """
    return (target - dense / active.clamp_min(1e-9 * dense)).clamp_min(0.0) ** 2


def price(active, dense, target):
    """
    What one active weight costs: the slope of flop_loss in active, a number. The loss of a mean is not the
    mean of losses, so micro-batches must not each take theirs; but each can pay this one price for every
    weight it used.
    """
    active = torch.tensor(float(active), dtype=torch.float64, requires_grad=True)
    return float(torch.autograd.grad(flop_loss(active, dense, target), active)[0])


# -----------------------------------------------------------------------------
# adapters: a pretrained model stays as it is; thresholds are learned, and a small change of each matrix


class LoRA(nn.Module):
    """W + A @ B (Hu et al., "LoRA", 2021), at first W, as B starts at 0. A (in, rank), B (rank, out)."""

    def __init__(self, weight, rank):
        super().__init__()
        n_in, n_out = weight.shape
        self.A = nn.Parameter(torch.empty(n_in, rank, device=weight.device))
        self.B = nn.Parameter(torch.zeros(rank, n_out, device=weight.device))
        if not weight.is_meta:
            nn.init.normal_(self.A, std=1 / math.sqrt(n_in))

    def forward(self, weight):
        return weight + self.A @ self.B


def adapters(model):
    """[(layer, attribute that adapts a matrix, attribute that is this matrix)] of the whole model."""
    names = {'adapter': 'weight', 'adapter_up': 'up', 'adapter_down': 'down'}
    return [(layer, adapter, names[adapter]) for _, layer in model.sparse_layers()
            for adapter in names if hasattr(layer, adapter)]


def add_lora(model, rank):
    """Freezes all of the model but its thresholds, and gives each matrix a change of this rank to train."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_threshold(name))
    for layer, adapter, matrix in adapters(model):
        setattr(layer, adapter, LoRA(getattr(layer, matrix), rank))


@torch.no_grad()
def merge_lora(model):
    """Adds every change to its matrix, for good. The model computes the same, and nothing in it is frozen."""
    model.requires_grad_(True)
    for layer, adapter, matrix in adapters(model):
        setattr(layer, matrix, nn.Parameter(getattr(layer, adapter)(getattr(layer, matrix))))
        setattr(layer, adapter, nn.Identity())


def dense_copy(model):
    """A frozen copy to learn from, less adapters, in eval mode: run it with dense=True."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    for layer, adapter, _ in adapters(teacher):
        setattr(layer, adapter, nn.Identity())
    return teacher


# -----------------------------------------------------------------------------
# generation, the plain way: the reference for the decoder


REPEAT_WINDOW = 64      # tokens


def likeliest(q, top_k, top_p):
    """
    q (B, vocab): probabilities -> those that top_k and top_p keep, in falling order, then 0; and their ids.
    Both are (B, n). Of equal ones the lower id comes first.
    """
    n = top_k
    if not top_k:
        # all tokens below the floor hold less than 1 - top_p together: none of them is kept, so none needs
        # sorting, which for a whole vocabulary takes longer than the model
        floor = (1 - top_p) / q.shape[-1]
        n = int((q >= floor).sum(-1).max())
    ids = q.topk(min(max(n, 1), q.shape[-1])).indices.sort().values                 # (B, n)
    kept, order = q.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    total = (kept if top_k else q).sum(-1, keepdim=True)
    return torch.where(kept.cumsum(-1) - kept < top_p * total, kept, 0.0), ids.gather(-1, order)


def sample(logits, point, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, said=None):
    """
    Draws a token for each row. point (B,): uniform random numbers from 0 to 1, one for each row, needed or
    not, so that two models which are given the same ones can be compared token by token. Kept are the top_k
    likeliest tokens (0: all), of these the fewest that hold top_p of the probability, and of these what has
    at least min_p times the probability of the likeliest. temperature: a number, greedy at 0, or one above 0
    for each row (B, 1); min_p likewise. said (B, n): the ids of the text so far. Those among its last
    REPEAT_WINDOW become less likely: their logits are divided by repeat_penalty if positive, else multiplied.

    logits (B, vocab) -> ids (B,), and their probability (B,) under the model, before the penalty, the
    temperature and the like.
    """
    logits = logits.float()
    p = logits.softmax(-1)                                                          # (B, vocab)
    if repeat_penalty != 1 and said is not None:
        said = said[:, -REPEAT_WINDOW:]
        old = logits.gather(-1, said)                                               # (B, n)
        logits = logits.scatter(-1, said, torch.where(old > 0, old / repeat_penalty, old * repeat_penalty))
    if isinstance(temperature, (int, float)) and temperature == 0:
        ids = logits.argmax(-1)
    else:
        q, order = (logits / temperature).softmax(-1), None
        if top_k or top_p < 1:
            q, order = likeliest(q, top_k, top_p)                                   # (B, n)
        if torch.is_tensor(min_p) or min_p:
            q = torch.where(q >= min_p * q.amax(-1, keepdim=True), q, 0.0)
        mass = q.cumsum(-1)
        ids = torch.searchsorted(mass, point[:, None].to(mass) * mass[:, -1:], right=True)[:, 0]
        ids = ids.clamp_max(q.shape[-1] - 1)
        # rounding may lead past the last token that was kept
        ids = torch.where(q.gather(-1, ids[:, None])[:, 0] > 0, ids, q.argmax(-1))
        ids = ids if order is None else order.gather(-1, ids[:, None])[:, 0]
    return ids, p.gather(-1, ids[:, None])[:, 0]


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=0.0, generator=None, cached=True):
    """
    Continues a list of token ids, yielding (token, active (matrices,)) one at a time; active belongs to the
    pass that produced the token. When the context is full, the window becomes its own last half and is read
    again from position 0. cached=False computes every window anew: the same tokens, slowly. Raises ValueError
    for an empty list.
    """
    if not tokens:
        raise ValueError('there must be at least one token to continue from')
    block_size, device = model.config.block_size, model.head.weight.device
    window = list(tokens)[-block_size:]
    cache = KVCache(model.config, device=device)
    for _ in range(max_new_tokens):
        if len(window) > block_size:
            window, cache.length = window[-max(block_size // 2, 1):], 0
        if not cached:
            cache.length = 0
        logits, active = model(torch.tensor([window[cache.length:]], device=device), cache)
        token = int(sample(logits[:, -1], torch.rand(1, generator=generator).to(device), temperature)[0])
        window.append(token)
        yield token, active[:, 0, -1]
