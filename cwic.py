"""
CWIC, "Compute Where It Counts": a GPT that learns which of its weights each token needs.

The outputs of a linear layer are cut into stripes. Each stripe has a threshold t for every input, and uses
only the inputs that are farther than t from their usual value mu:

    m[stripe] = |x - mu| > t[stripe]                            the mask
    y[stripe] = (mu + m[stripe] * (x - mu)) @ W[:, stripe]      a masked input counts as mu
    loss = L + max(target - n_weights / active, 0)^2            active: weights used per token, on average

L is any loss of a language model, n_weights the number of weights that the dense model uses. Thresholds are
trained together with the weights, by gradient descent: step_backward() defines the gradient of m.

A worked example, which is also a test. One token enters a layer of 4 inputs and 4 outputs, cut into 2 stripes
of 2:

    c = x - mu        =  0.9  -0.2   0.5  -1.0      the input, centred on its usual value
    t, stripe 0       =  0.6   0.6   0.6   0.6      |c| > t:  yes no no yes     rows 0, 3 of W[:, 0:2]
    t, stripe 1       =  1.0   0.1   0.4   2.0      |c| > t:  no yes yes no     rows 1, 2 of W[:, 2:4]

8 of the 16 weights are used: active = 2 * 2 + 2 * 2 = 8, a reduction of 2. No row was dropped altogether.

    from cwic import GPT, CWICConfig
    model = GPT(CWICConfig())
    logits, active = model.eval()(tokens)      # active[matrix, batch, position]: the weights that were used

First comes the method, then the GPT around it. To train a model run train.py; to talk to one, chat.py.

Not here: two refinements that are not the paper's (refinements.py), ways to sample (sampling.py), files
(checkpoint.py), dropout, padding, and speed. Here masked weights are multiplied all the same; sparse_kernel.c
skips them.

The method is that of "Compute Where It Counts: High Quality Sparsely Activated LLMs" (Crystal AI, 2025,
github.com/crystal-ai-org/cwic). The blocks are GPT-2's (Radford et al., 2019) and Llama's (Touvron et al.,
2023).
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

BANDWIDTH = 0.1         # sigmas: width of the window around a threshold in which inputs give it gradient
FLOOR = 1e-3            # sigmas: thresholds never fall below this
OBSERVE_EVERY = 7       # one token in 7 is enough; 7 divides no usual context, so every position gets sampled


def reference(x, mu, t, W, stripe):
    """The layer in plain PyTorch. x (N, in), mu (in), t (n, in), W (in, out) -> y (N, out), active (N,)."""
    y, active = [], 0
    for t_stripe, W_stripe in zip(t, W.split(stripe, dim=1)):
        m = (x - mu).abs() > t_stripe                           # (N, in)
        y.append((mu + m * (x - mu)) @ W_stripe)                # (N, stripe); the last stripe may be narrower
        active = active + m.sum(1) * W_stripe.shape[1]          # (N,)
    return torch.cat(y, dim=1), active


# -----------------------------------------------------------------------------
# the mask, and its gradient


def above(a, b):
    """1.0 if a > b, else 0.0. (Bool masks, and converting them, are several times slower on a CPU.)"""
    return torch.gt(a, b, out=a.new_empty(torch.broadcast_shapes(a.shape, b.shape)))


# These two run over the largest tensors (n, N, in) of a layer: addcmul(a, b, c), which is a + b * c, and
# operations in place, whose names end in _, save passes over memory.

def mask_inputs(c, mu, t, dtype):
    """
    The inputs of each stripe, and how many of them are used. c = x - mu (N, in), mu (in), t (n, in) ->
    mu + m * c (n, N, in) in dtype, sum of m (n, N)
    """
    m = above(c.abs(), t[:, None])                                                  # (n, N, in)
    return torch.addcmul(mu, m, c).to(dtype), m.sum(2)


def step_backward(c, t, bw, grad_mc, cost):
    """
    The gradient of the mask. A step has no useful derivative, so m = |c| > t gets one: the slope k of a ramp
    of width bw around t, 0 elsewhere. The loss depends on m in two ways, through the output and through the
    count of weights: grad_mc is its gradient in m * c, and cost its gradient in m, the price of an input that
    a stripe uses.

        k = 1 / bw if ||c| - t| < bw / 2, else 0
        grad_m = grad_mc * c + cost
        dt = -sum over tokens of grad_m * k
        dc = sum over stripes of grad_mc                    through the output: as if nothing were masked
           + sum over stripes of cost * k * sign(c)         through the count

    c (N, in), t (n, in), bw (in), grad_mc (n, N, in), cost (n, N, 1) -> dc (N, in), dt (n, in)
    """
    near = above(bw / 2, (c.abs() - t[:, None]).abs_())             # (n, N, in): k is near / bw
    per_bw = 1 / bw.clamp_min(1e-12)                                # an input that never moves has bw 0
    grad_m = torch.addcmul(cost, grad_mc, c)                        # (n, N, in)
    dt = -grad_m.mul_(near).sum(1) * per_bw
    dc = grad_mc.sum(0, dtype=c.dtype) + (cost * near).sum(0) * c.sign() * per_bw
    return dc, dt


# -----------------------------------------------------------------------------
# the striped linear layer


def by_stripe(columns, stripe):
    """(rows, out) -> (n, rows, stripe): the columns stripe by stripe, the last one padded with zeros."""
    if columns.shape[1] % stripe:
        columns = F.pad(columns, (0, -columns.shape[1] % stripe))
    return columns.view(len(columns), -1, stripe).transpose(0, 1)


def side_by_side(stripes, n_out):
    """(n, rows, stripe) -> (rows, out): the way back, without the padding."""
    return stripes.transpose(0, 1).reshape(stripes.shape[1], -1)[:, :n_out]


def as_count(active):
    """Counts as floats, to which gradients can flow: exact in f64. Apple's GPUs have only f32."""
    return active.to(torch.float32 if active.device.type == 'mps' else torch.float64)


class MaskedProduct(torch.autograd.Function):
    """
    The layer as in reference(), all stripes at once, with the mask's gradient. Only x is kept for backward:
    masks are cheaper to compute again than to store.

    x (N, in) f32, mu (in), t (n, in), bw (in), W (in, out); functions: mask_inputs and step_backward, plain
    or compiled -> y (N, out) in the dtype of matrix products, active (N,) f64.
    """

    @staticmethod
    def forward(ctx, x, mu, t, bw, W, stripe, functions):
        ctx.save_for_backward(x, mu, t, bw, W)
        ctx.mask_inputs, ctx.step_backward = functions
        device, ctx.stripe = x.device.type, stripe
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype
        with torch.autocast(device, enabled=False):
            inputs, count = ctx.mask_inputs(x - mu, mu, t, ctx.dtype)               # (n, N, in), (n, N)
            y = torch.bmm(inputs, by_stripe(W.to(ctx.dtype), stripe))               # (n, N, stripe)
            widths = by_stripe(x.new_ones(1, W.shape[1]), stripe).sum(2)            # (n, 1)
            return side_by_side(y, W.shape[1]), (widths * as_count(count)).sum(0)

    @staticmethod
    def backward(ctx, g, g_active):
        x, mu, t, bw, W = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            c, g = x - mu, by_stripe(g, ctx.stripe)                                 # (N, in), (n, N, stripe)
            inputs, _ = ctx.mask_inputs(c, mu, t, ctx.dtype)                        # (n, N, in)
            dW = side_by_side(torch.bmm(inputs.transpose(1, 2), g), W.shape[1]).to(W.dtype)     # (in, out)
            grad_mc = torch.bmm(g, by_stripe(W.to(ctx.dtype), ctx.stripe).transpose(1, 2))      # (n, N, in)
            # an input that is used costs one weight in each column of the stripe
            widths = by_stripe(x.new_ones(1, W.shape[1]), ctx.stripe).sum(2)        # (n, 1)
            cost = widths[:, None] * g_active.to(x.dtype)[:, None]                  # (n, N, 1)
            dx, dt = ctx.step_backward(c, t, bw, grad_mc, cost)
            return dx, None, dt, None, dW, None, None


class Thresholds(nn.Module):
    """
    The base of StripedLinear and Neurons: a threshold t = theta * scale * sigma for each (stripe, input)
    pair. theta is trained; mu and sigma are observed, once. Adam moves every parameter by about the learning
    rate in a step, and so an output, the sum of n_in products, by about sqrt(n_in) times that. The scale lets
    t, in sigmas, keep up with it.
    """
    centred = True                              # else mu stays 0
    functions = mask_inputs, step_backward      # refinements.fuse_masks() sets compiled ones

    def __init__(self, n_in, stripes):
        super().__init__()
        self.n_in = n_in
        self.scale = 10 * math.sqrt(n_in)
        self.theta = nn.Parameter(torch.zeros(stripes, n_in))   # (n, in)
        self.register_buffer('mu', torch.zeros(n_in))           # usual value of each input
        self.register_buffer('sigma', torch.zeros(n_in))        # its spread, as a standard deviation

    def thresholds(self):
        """t (n, in): a stripe uses an input if |x - mu| > t."""
        return self.theta * self.scale * self.sigma

    @torch.no_grad()
    def observe(self, x):
        """Sets mu and sigma from x (B, T, in)."""
        mu, sigma = statistics(x, self.centred)
        self.mu.copy_(mu)
        self.sigma.copy_(sigma)


class StripedLinear(Thresholds):
    """
    A linear layer with a mask, and a bias if wanted. W is stored (in, out): the weights of one input lie side
    by side. mu @ W + b is the same for all tokens: the kernel computes it once, and then reads only the rows
    of W for which m is 1.
    """

    def __init__(self, n_in, n_out, stripe, bias):
        super().__init__(n_in, stripes=math.ceil(n_out / stripe))
        self.n_out, self.stripe = n_out, min(stripe, n_out)
        self.n_weights = n_in * n_out                                           # used by a dense layer
        self.weight = nn.Parameter(random_weights(n_in, n_out))                 # (in, out)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None          # (out,)
        self.adapter = nn.Identity()                                            # or LoRA

    def forward(self, x, dense=False):
        """x (B, T, in) -> y (B, T, out), active (B, T): the weights each token used. dense: all of them."""
        W = self.adapter(self.weight)
        if dense:
            y, active = x @ W, as_count(torch.full(x.shape[:2], self.n_weights, device=x.device))
        else:
            y, active = self.masked_product(x, W)
        return (y if self.bias is None else y + self.bias.to(y.dtype)), active

    def masked_product(self, x, W):
        """x (B, T, in), W (in, out) -> y (B, T, out), active (B, T)"""
        B, T, _ = x.shape
        y, active = MaskedProduct.apply(x.float().view(B * T, -1), self.mu, self.thresholds(),
                                        BANDWIDTH * self.sigma, W, self.stripe, self.functions)
        return y.view(B, T, -1), active.view(B, T)


# -----------------------------------------------------------------------------
# the shared mask of gated MLPs: a neuron that is masked needs neither its column of up nor its row of down


class MaskedNeurons(torch.autograd.Function):
    """
    a = h * z if |z| > t, else 0; and the weights each token used, `width` for each active neuron.

    z, h (N, neurons), t, bw (neurons) -> a (N, neurons) in h's dtype, active (N,) f64
    """

    @staticmethod
    def forward(ctx, z, h, t, bw, width, functions):
        ctx.save_for_backward(z, h, t, bw)
        ctx.width, (_, ctx.step_backward) = width, functions
        m = above(z.abs(), t)                                                   # (N, neurons)
        return (m * z * h).to(h.dtype), as_count(m.sum(1)) * width

    @staticmethod
    def backward(ctx, g, g_active):
        z, h, t, bw = ctx.saved_tensors
        dh = above(z.abs(), t) * z * g
        cost = ctx.width * g_active.to(z.dtype)                                 # (N,)
        dz, dt = ctx.step_backward(z, t[None], bw, (g * h)[None], cost[None, :, None])
        return dz, dh.to(h.dtype), dt[0], None, None, None


class Neurons(Thresholds):
    """
    Up and down of a gated MLP: y = (m * z * up(x)) @ down,  m = |z| > t. z comes from the gate, one number
    for each neuron, and is usually close to 0: it is not centred.
    """
    centred = False

    def __init__(self, n_embd, n_hidden):
        super().__init__(n_hidden, stripes=1)
        self.n_weights = 2 * n_embd * n_hidden                                  # used by a dense layer
        self.up = nn.Parameter(random_weights(n_embd, n_hidden))                # (d, neurons)
        self.down = nn.Parameter(random_weights(n_hidden, n_embd))              # (neurons, d)
        self.adapter_up, self.adapter_down = nn.Identity(), nn.Identity()       # or LoRA

    def forward(self, z, x, dense=False):
        """z (B, T, neurons), x (B, T, d) -> y (B, T, d), active (B, T)"""
        h, down = x @ self.adapter_up(self.up), self.adapter_down(self.down)
        if dense:
            return (h * z) @ down, as_count(torch.full(x.shape[:2], self.n_weights, device=x.device))
        a, active = MaskedNeurons.apply(z.float().flatten(0, 1), h.flatten(0, 1), self.thresholds()[0],
                                        BANDWIDTH * self.sigma, 2 * x.shape[2], self.functions)
        return a.view_as(h) @ down, active.view(x.shape[:2])


class GatedMLP(nn.Module):
    """Llama's MLP: (silu(gate(x)) * up(x)) @ down. The gate is a StripedLinear."""

    def __init__(self, config):
        super().__init__()
        self.gate = StripedLinear(config.n_embd, config.n_hidden, config.stripe_up, bias=False)
        self.neurons = Neurons(config.n_embd, config.n_hidden)

    def forward(self, x, dense):
        """x (B, T, d) -> y (B, T, d), [active (B, T) of the gate, of the neurons]"""
        z, active_gate = self.gate(x, dense)
        y, active_neurons = self.neurons(F.silu(z), x, dense)
        return y, [active_gate, active_neurons]


# -----------------------------------------------------------------------------
# mu; sigma, the unit of thresholds; and how far thresholds may move


def statistics(x, centred):
    """
    The usual value and the spread of each input, robust against outliers. x (B, T, in) -> mu, sigma (in).

    mu is the mean of values weighted by 1 / distance from the median; no distance counts as less than a tenth
    of the mean one. (The median itself is one token's value, whose c would be rounding noise.) sigma is the
    mean distance from mu, times sqrt(pi / 2): the standard deviation of a normal distribution. If not
    centred, mu is 0.

    Once observed, on dense tokens, they stay. Masked inputs still get a gradient and may drift; a running
    sigma would follow them and never unmask them.
    """
    x = x.flatten(0, 1)[::OBSERVE_EVERY].float()                                # (tokens, in)
    mu = torch.zeros_like(x[0])
    if centred:
        distance = (x - x.median(0).values).abs()
        weight = 1 / distance.clamp_min(distance.mean(0) / 10).clamp_min(1e-12)
        mu = (weight * x).sum(0) / weight.sum(0)
    return mu, math.sqrt(math.pi / 2) * (x - mu).abs().mean(0)


def is_threshold(name):
    """Whether the parameter of this name is a threshold: that of a mask, or a shortlist's margin."""
    return name.endswith(('theta', 'margin'))


@torch.no_grad()
def limit_thresholds(layers, before):
    """
    After an optimiser step: limits each threshold's move to half its bandwidth, so that it cannot jump past
    inputs without learning from them, and keeps it above the floor. before: theta (n, in) of each layer
    before the step.
    """
    # _foreach: on a GPU a few kernels for all layers, instead of a thousand small ones
    thetas, scales = [layer.theta for layer in layers], [layer.scale for layer in layers]
    moves = torch._foreach_sub(thetas, before)
    torch._foreach_clamp_max_(moves, [BANDWIDTH / 2 / scale for scale in scales])
    torch._foreach_clamp_min_(moves, [-BANDWIDTH / 2 / scale for scale in scales])
    limited = torch._foreach_add(before, moves)
    torch._foreach_clamp_min_(limited, [FLOOR / scale for scale in scales])
    torch._foreach_copy_(thetas, limited)


# -----------------------------------------------------------------------------
# compute as a loss


def flop_loss(active, n_weights, target):
    """
    max(target - reduction, 0)^2, reduction = n_weights / active. active: a tensor, the mean over all tokens
    of an optimiser step. It is the mean that counts: a model may spend more on one token, less on another.
    """
    # if nothing is active any more, there is nothing left to push on
    return (target - n_weights / active.clamp_min(1e-9 * n_weights)).clamp_min(0.0) ** 2


def price(active, n_weights, target):
    """
    The price of one active weight: the slope of flop_loss in active, a number. The loss of a mean is not the
    mean of losses, so micro-batches cannot each compute their own; but each can pay this one price for every
    weight it uses.
    """
    active = torch.tensor(float(active), dtype=torch.float64, requires_grad=True)
    return float(torch.autograd.grad(flop_loss(active, n_weights, target), active)[0])


# -----------------------------------------------------------------------------
# That is CWIC; the rest is a GPT.


@dataclass
class CWICConfig:
    """Sizes of a model. Raises ValueError, in one line that begins with the option's name, if impossible."""
    arch: str = 'gpt2'          # or 'llama'
    vocab_size: int = 4096
    block_size: int = 256       # context, in tokens
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0          # heads of keys and values, each for a group of query heads; 0: n_head
    n_embd: int = 192
    n_hidden: int = 0           # width of the MLP; 0: 4 * n_embd
    bias: bool = True           # GPT-2: in linear layers and norms; the head never has one, nor has Llama
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0     # Llama: the slowest rotation takes about 2 pi * rope_theta positions
    rope_scaling: tuple = ()        # Llama 3: factor, low_freq_factor, high_freq_factor, original context
    stripe_qkv: int = 192       # columns in a stripe, for each kind of matrix
    stripe_out: int = 192
    stripe_up: int = 192        # Llama: of the gate
    stripe_down: int = 192      # GPT-2 only
    stripe_head: int = 1024
    bases: bool = False         # these two: see refinements.py
    shortlist: bool = False

    def __post_init__(self):
        if self.arch not in ('gpt2', 'llama'):
            raise ValueError(f'arch must be gpt2 or llama, not {self.arch!r}')
        self.n_kv_head, self.n_hidden = self.n_kv_head or self.n_head, self.n_hidden or 4 * self.n_embd
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not (type(value) in (int, float) and value > 0):      # nor nan
                raise ValueError(f'{field.name} must be a number above 0, not {value!r}')
        self.bias = self.bias and self.arch == 'gpt2'
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f'n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}), '
                             f'and that of n_kv_head ({self.n_kv_head})')
        if self.arch == 'llama' and self.head_dim % 2:
            raise ValueError(f'n_embd / n_head ({self.head_dim}) must be even, for rotary positions')

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def matrices(self):
        """The names of a block's sparse layers, in the order of every active count."""
        return ('qkv', 'out', 'up', 'down') if self.arch == 'gpt2' else ('qkv', 'out', 'gate', 'neurons')


def random_weights(*shape, std=0.02):
    """Initial weights. Left out on the meta device, where the first normal_() costs a second."""
    weights = torch.empty(shape)
    return weights if weights.is_meta else weights.normal_(std=std)


def norm(config):
    """GPT-2's LayerNorm, or Llama's RMSNorm."""
    if config.arch == 'gpt2':
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps)


def rotary_tables(config, positions):
    """
    positions (T,) -> cos, sin (T, head_dim / 2), f32: the angles by which RoPE turns queries and keys (Su et
    al., 2021). With Llama 3's rope_scaling, pairs that turn less than low_freq_factor times in the original
    context are slowed down by factor, those that turn more than high_freq_factor times are left alone, and
    those between are slowed down in part.
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


def apply_rope(heads, cos, sin):
    """
    heads (B, heads, T, head_dim), cos, sin (T, head_dim / 2) -> heads, turned. Each number of the first half
    makes a pair with its counterpart in the second half.
    """
    first, second = heads.float().chunk(2, dim=3)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3).to(heads.dtype)


class KVCache:
    """Keys and values so far. k, v (n_layer, batch, n_kv_head, block_size, head_dim); length in tokens."""

    def __init__(self, config, batch=1, device='cpu', dtype=torch.float32):
        shape = (config.n_layer, batch, config.n_kv_head, config.block_size, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0


class Attention(nn.Module):
    """Causal attention. In Llama, groups of query heads may share one head of keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.widths = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.qkv = StripedLinear(config.n_embd, sum(self.widths), config.stripe_qkv, config.bias)
        self.out = StripedLinear(config.n_embd, config.n_embd, config.stripe_out, config.bias)

    def forward(self, x, rotary, cache, dense):
        """x (B, T, d); rotary: Llama's tables, or None -> y (B, T, d), [active (B, T) of qkv, of out]"""
        qkv, active_qkv = self.qkv(x, dense)
        q, k, v = (z.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for z in qkv.split(self.widths, dim=2))
        if rotary is not None:                                              # q, k, v (B, heads, T, head_dim)
            q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
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
    """GPT-2's MLP: down(gelu(up(x)))."""

    def __init__(self, config):
        super().__init__()
        self.up = StripedLinear(config.n_embd, config.n_hidden, config.stripe_up, config.bias)
        self.down = StripedLinear(config.n_hidden, config.n_embd, config.stripe_down, config.bias)

    def forward(self, x, dense):
        """x (B, T, d) -> y (B, T, d), [active (B, T) of up, of down]"""
        h, active_up = self.up(x, dense)
        y, active_down = self.down(F.gelu(h, approximate='tanh'), dense)
        return y, [active_up, active_down]


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)): the same in GPT-2 and Llama."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = norm(config)
        self.mlp = MLP(config) if config.arch == 'gpt2' else GatedMLP(config)

    def forward(self, x, rotary, cache, dense):
        """x (B, T, d) -> x (B, T, d), a list of four active (B, T), in the order of config.matrices"""
        y, active_attn = self.attn(self.ln_1(x), rotary, cache, dense)
        x = x + y
        y, active_mlp = self.mlp(self.ln_2(x), dense)
        return x + y, active_attn + active_mlp


class GPT(nn.Module):
    """
    GPT-2 or Llama, every matrix of which is a sparse layer. Token embeddings are tied to the head: the
    embedding of token i is column i of the head's weight.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.arch == 'gpt2':
            positions = random_weights(config.block_size, config.n_embd)
            self.wpe = nn.Embedding.from_pretrained(positions, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        if config.bases or config.shortlist:
            import refinements
            self.head = refinements.Head(config)
        else:
            self.head = StripedLinear(config.n_embd, config.vocab_size, config.stripe_head, bias=False)
        if config.bases:
            refinements.add_bases(self)
            self.rotate = refinements.rotate
        for name, weight in self.named_parameters():
            # the deeper the model, the less each layer adds to the residual stream at first
            adds = name.endswith(('attn.out.weight', 'mlp.down.weight', 'mlp.neurons.down'))
            if adds and not weight.is_meta:
                weight.data.div_(math.sqrt(2 * config.n_layer))

    def sparse_layers(self):
        """[(name, StripedLinear or Neurons)], in the order of every active count: 0.qkv, 0.out, ..., head."""
        layers = [(f'{i}.{name}', getattr(part, name)) for i, block in enumerate(self.blocks)
                  for part, name in zip((block.attn, block.attn, block.mlp, block.mlp), self.config.matrices)]
        return layers + [('head', self.head)]

    def n_weights(self):
        """Weights that a dense model uses for each token: with the head, without embeddings and norms."""
        return sum(layer.n_weights for _, layer in self.sparse_layers())

    def trunk(self, tokens, cache=None, dense=False):
        """All but the head. tokens (B, T) -> hidden (B, T, d), active (matrices - 1, B, T)."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        x, rotary = F.embedding(tokens, self.head.adapter(self.head.weight).t()), None          # (B, T, d)
        if self.config.bases:
            x = self.rotate(x, self.basis.t())          # from the head's basis back to the stream's
        if self.config.arch == 'gpt2':
            x = x + self.wpe(positions)
        else:
            rotary = rotary_tables(self.config, positions)
        active = []
        for block in self.blocks:
            x, active_block = block(x, rotary, cache, dense)
            active += active_block
        if cache is not None:
            cache.length += tokens.shape[1]
        hidden = self.ln_f(x)
        return self.rotate(hidden, self.basis) if self.config.bases else hidden, torch.stack(active)

    def forward(self, tokens, cache=None, dense=False):
        """
        tokens (B, T) -> logits (B, T, vocab) f32, active (matrices, B, T) f64: the weights each matrix used
        for each token, counted in the pass that made the logits. With a KVCache, tokens follow those already
        in it, and join them. dense: every weight is used, thresholds play no part.
        """
        hidden, active = self.trunk(tokens, cache, dense)
        logits, active_head = self.head(hidden, dense)
        return logits.float(), torch.cat([active, active_head[None]])

    def visit_inputs(self, tokens, visit, names, dense=True):
        """Calls visit(name, input) for the sparse layers of these names, in one pass over tokens (B, T)."""
        layers = dict(self.sparse_layers())
        hooks = [layers[name].register_forward_pre_hook(lambda _, args, name=name: visit(name, args[0]))
                 for name in names if name != 'head']
        hidden, _ = self.trunk(tokens, dense=dense)     # without the head, whose logits would fill the memory
        for hook in hooks:
            hook.remove()
        if 'head' in names:
            visit('head', hidden)

    @torch.no_grad()
    def observe(self, tokens):
        """Sets mu and sigma of every layer that has none yet, in one dense pass over tokens (B, T)."""
        layers = {name: layer for name, layer in self.sparse_layers() if not layer.sigma.any()}
        self.visit_inputs(tokens, lambda name, x: layers[name].observe(x), layers)

    def parameter_groups(self, lr, threshold_lr, weight_decay):
        """
        AdamW's parameter groups: [matrices, which are decayed; biases and norms; thresholds]. Frozen
        parameters are left out.
        """
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        thresholds = [p for name, p in trained if is_threshold(name)]
        matrices = [p for name, p in trained if not is_threshold(name) and p.dim() > 1]
        others = [p for name, p in trained if not is_threshold(name) and p.dim() <= 1]
        return [{'params': matrices, 'lr': lr, 'weight_decay': weight_decay},
                {'params': others, 'lr': lr, 'weight_decay': 0.0},
                {'params': thresholds, 'lr': threshold_lr, 'weight_decay': 0.0}]


# -----------------------------------------------------------------------------
# distillation


def kl_loss(logits, teacher_logits, reverse):
    """
    (1 - reverse) KL(teacher || student) + reverse KL(student || teacher), mean over tokens, in nats: at 1/2
    the two-way KL, at 0 the KL of evaluate.py. logits (N, vocab), both.
    """
    logq, logp = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    weight = (1 - reverse) * logp.exp() - reverse * logq.exp()
    return (weight * (logp - logq)).sum(-1).mean()


# -----------------------------------------------------------------------------
# LoRA: a pretrained model stays frozen; thresholds are learned, and a low-rank change of each matrix


class LoRA(nn.Module):
    """W -> W + A @ B (Hu et al., 2021), at first W, as B starts at 0. A (in, rank), B (rank, out)."""

    def __init__(self, weight, rank):
        super().__init__()
        n_in, n_out = weight.shape
        self.A = nn.Parameter(random_weights(n_in, rank, std=1 / math.sqrt(n_in)))
        self.B = nn.Parameter(torch.zeros(rank, n_out))

    def forward(self, weight):
        return weight + self.A @ self.B


def adapters(model):
    """[(layer, name of an adapter in it, name of the matrix that it changes)] of the whole model."""
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
def widen_lora(model, rank):
    """Raises the rank of each change. The new rows of B start at 0, so that A @ B stays the same at first."""
    for layer, adapter, matrix in adapters(model):
        old, new = getattr(layer, adapter), LoRA(getattr(layer, matrix), rank)
        new.A[:, :old.A.shape[1]], new.B[:old.B.shape[0]] = old.A, old.B
        setattr(layer, adapter, new)


@torch.no_grad()
def merge_lora(model):
    """Adds every change to its matrix, for good. The model computes the same, and nothing in it is frozen."""
    model.requires_grad_(True)
    for layer, adapter, matrix in adapters(model):
        setattr(layer, matrix, nn.Parameter(getattr(layer, adapter)(getattr(layer, matrix))))
        setattr(layer, adapter, nn.Identity())


# -----------------------------------------------------------------------------
# generation, the plain way: the reference for the decoder


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=0.0, generator=None):
    """
    Continues a list of token ids, yielding (token, active (matrices,)) one at a time; active belongs to the
    pass that produced the token. When the context is full, its last half becomes the new context and is read
    again from position 0. temperature 0 takes the likeliest token.
    """
    block_size, device = model.config.block_size, model.head.weight.device
    context, cache = list(tokens)[-block_size:], KVCache(model.config, device=device)
    for _ in range(max_new_tokens):
        if len(context) > block_size:
            context, cache.length = context[-max(block_size // 2, 1):], 0
        logits, active = model(torch.tensor([context[cache.length:]], device=device), cache)
        logits = logits[0, -1].cpu()
        token = int(logits.argmax())
        if temperature > 0:
            mass = (logits / temperature).softmax(0).cumsum(0)
            token = int(torch.searchsorted(mass, torch.rand(1, generator=generator) * mass[-1], right=True))
        context.append(token)
        yield token, active[:, 0, -1]
