"""
CWIC, "Compute Where It Counts": a GPT that learns which of its weights each token can do without.

This file is the whole model, to be read top to bottom: the statistics of a layer's input, the gate, the striped
linear layer, GPT-2's block built from it, the losses, checkpoints, and a plain generate(). It is the reference that
the C kernel, the chat and the baselines are compared with. To train a model run train.py; to talk to one, chat.py.

    from cwic import GPT, CWICConfig
    model = GPT(CWICConfig())
    logits, active = model.eval()(tokens)      # active[matrix, batch, position]: the weights that were used

A worked example, which is also a test. One token enters a layer of 4 inputs and 4 outputs, cut in 2 stripes of 2:

    c = x - mu        =  0.9  -0.2   0.5  -1.0      the input, centred on its usual value
    t, stripe 0       =  0.5   0.5   0.5   0.5      |c| > t:  yes no no yes     rows 0, 3 of W[:, 0:2]
    t, stripe 1       =  1.0   0.1   0.4   2.0      |c| > t:  no yes yes no     rows 1, 2 of W[:, 2:4]

8 of the 16 weights are used: active = 2 * 2 + 2 * 2 = 8, a reduction of 2. No row was dropped altogether.

But: no dropout, no mixed batches of lengths, no rotary positions, no beam search; nothing here is faster than a dense
model. Skipping for real is sparse_kernel.c's work.

The method: "Compute Where It Counts: Self Optimizing Language Models" (CWIC). The block: GPT-2 (Radford et al., 2019).
"""

import copy
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BANDWIDTH = 0.1         # width of the window in which a threshold feels its inputs, in sigmas
FLOOR = 1e-3            # thresholds never fall below this, in sigmas
MEMORY = 0.98           # how much of the statistics' weight survives one optimiser step
OBSERVE_EVERY = 4       # every fourth position is enough for the statistics, and four times cheaper

# -----------------------------------------------------------------------------
# the usual value and the spread of each input, robustly


def observe(x, mu, sigma, mask=None):
    """
    What one batch says about the centre and spread of each input, as sums, so that batches can be added up.

    The centre is a weighted mean in which a value weighs 1 / max(|x - mu|, 0.1 sigma): repeated, this settles near the
    median (it is Weiszfeld's iteration, kept from dividing by zero: Huber's centre at 0.1 sigma). Before there is
    a sigma every value weighs 1.

    x (B, T, in); mu, sigma (in); mask (B, T), true for tokens that count, or None for all.
    Returns sums over tokens (4, in): weight, weight * (x - mu), |x - mu|, number of tokens.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        c = x[:, ::OBSERVE_EVERY].float() - mu                  # (B, T / 4, in)
        distance = c.abs()
        weight = torch.where(sigma > 0, sigma / distance.clamp_min(0.1 * sigma).clamp_min(1e-12), 1.0)
        counted = torch.ones_like(c) if mask is None else mask[:, ::OBSERVE_EVERY, None].expand_as(c).float()
        weight = weight * counted
        return torch.stack([weight.sum((0, 1)), (weight * c).sum((0, 1)), (distance * counted).sum((0, 1)), counted.sum((0, 1))])


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


class GatedProduct(torch.autograd.Function):
    """
    y[:, stripe] = (mu + m * c) @ W[:, stripe],  with the mask m = |c| > t[stripe] of that stripe, strict; and the number of
    weights each token used. The step has no useful derivative, so backward defines one. With a window
    k = 1[ | |c| - t | < bw / 2 ] / bw around each threshold:

        from y         dc = g @ W^T as if nothing had been masked,     dt = -sum over tokens of (g @ W^T) * c * k
        from active    dc = +width * k * sign(c) * g,                  dt = -sum over tokens of width * k * g

    Only c is kept for backward: masks are cheaper to make again than to store. Masks are numbers, 0 or 1, and one buffer
    holds first the mask and then the window: on a CPU fresh memory costs more than the arithmetic, on a GPU torch.compile
    sees through it.

    c (N, in) f32, mu (in), t (n, in), bw (in), W (in, out), widths (n): columns in each stripe; stripe: in each but the last.
    Returns y (N, out) in the dtype of autocast (or of W), active (N,) f32, exact up to 2^24.
    """

    @staticmethod
    def forward(ctx, c, mu, t, bw, W, widths, stripe):
        device = c.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else W.dtype
        ctx.save_for_backward(c, mu, t, bw, W, widths)
        ctx.stripe, ctx.dtype = stripe, dtype
        with torch.autocast(device, enabled=False):
            mask = torch.gt(c.abs(), t[:, None], out=c.new_empty(len(t), *c.shape))             # (n, N, in)
            active = (widths[:, None] * mask.sum(2)).sum(0)                                     # (N,)
            masked = torch.addcmul(mu, mask, c, out=mask).to(dtype)                             # (n, N, in)
            return side_by_side(torch.bmm(masked, by_stripe(W.to(dtype), stripe)), W.shape[1]), active

    @staticmethod
    def backward(ctx, g, g_active):
        c, mu, t, bw, W, widths = ctx.saved_tensors
        with torch.autocast(c.device.type, enabled=False):
            magnitude, g = c.abs(), by_stripe(g, ctx.stripe)                                    # (N, in), (n, N, stripe)
            mask = torch.gt(magnitude, t[:, None], out=c.new_empty(len(t), *c.shape))           # (n, N, in)
            masked = torch.addcmul(mu, mask, c, out=mask).to(ctx.dtype)                         # (n, N, in)
            dW = side_by_side(torch.bmm(masked.transpose(1, 2), g), W.shape[1]).to(W.dtype)     # (in, out)
            pull = torch.bmm(g, by_stripe(W.to(ctx.dtype), ctx.stripe).transpose(1, 2))         # (n, N, in)
            window = torch.lt(torch.sub(magnitude, t[:, None], out=mask).abs_(), bw / 2, out=mask)      # k * bw
            inverse = 1 / bw.clamp_min(1e-12)               # an input that never moves has no window, so nothing to divide
            price = widths[:, None, None] * g_active[:, None]                                   # (n, N, 1)
            dt = -torch.addcmul(price, pull, c).mul_(window).sum(1) * inverse                   # (n, in)
            dc = pull.sum(0, dtype=c.dtype) + window.mul_(price).sum(0) * torch.sign(c) * inverse
            return dc, None, dt, None, dW, None, None


class StripedLinear(nn.Module):
    """
    A linear layer, weights input-major, whose every (stripe, input) pair has a learned threshold:

        y[stripe] = (mu + m * c) @ W[:, stripe] + b[stripe],       c = x - mu,  m = |c| > t[stripe]

    A skipped input is thus replaced by its usual value mu, not by zero. (So mu @ W + b is the same for all tokens: the
    kernel computes it once, and then reads only the rows of W where m is 1.) theta is what is trained; t = theta *
    scale * sigma, where scale makes Adam move thresholds about as fast, in sigmas, as it moves outputs.
    """

    def __init__(self, n_in, n_out, stripe, bias):
        super().__init__()
        self.n_in, self.n_out, self.stripe = n_in, n_out, min(stripe, n_out)
        self.dense = n_in * n_out                                           # weights a dense layer uses for each token
        self.scale = 10 * math.sqrt(n_in)
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * 0.02)         # (in, out)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None      # (out,)
        self.theta = nn.Parameter(torch.zeros(math.ceil(n_out / self.stripe), n_in))    # (n, in)
        widths = [min(self.stripe, n_out - first) for first in range(0, n_out, self.stripe)]
        self.register_buffer('widths', torch.tensor(widths, dtype=torch.float32), persistent=False)
        self.register_buffer('mu', torch.zeros(n_in))                       # centre of each input
        self.register_buffer('sigma', torch.zeros(n_in))                    # spread, as a standard deviation
        self.register_buffer('seen', torch.zeros(2, n_in))                  # the weight that mu and sigma rest on

    def thresholds(self):
        """Absolute thresholds t (n, in): an input is used by a stripe where |x - mu| > t."""
        return self.theta * self.scale * self.sigma

    def forward(self, x, dense=False, mask=None):
        """
        x (B, T, in) -> y (B, T, out), active (B, T), and observe()'s sums (4, in), or None where nothing is learned of
        the input: in eval mode, and in dense mode, where thresholds and statistics play no part.
        """
        B, T, _ = x.shape
        if dense:
            y = x @ self.weight
            return (y if self.bias is None else y + self.bias), x.new_full((B, T), self.dense, dtype=torch.float32), None
        sums = observe(x, self.mu, self.sigma, mask) if self.training else None
        c = x.float() - self.mu                                             # (B, T, in)
        y, active = GatedProduct.apply(c.view(B * T, -1), self.mu, self.thresholds(), BANDWIDTH * self.sigma, self.weight, self.widths, self.stripe)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(B, T, -1), active.view(B, T), sums

    @torch.no_grad()
    def update_statistics(self, sums):
        """
        Folds the sums of a whole optimiser step (4, in) into mu and sigma. Both are means over all tokens so far, older
        ones weighing less; dividing by the weight actually seen leaves no bias towards the zeros they started from.
        """
        weight, pull, distance, count = sums
        self.seen.mul_(MEMORY).add_(torch.stack([weight, count]))
        self.mu += pull / self.seen[0].clamp_min(1e-12)
        self.sigma += (math.sqrt(math.pi / 2) * distance - count * self.sigma) / self.seen[1].clamp_min(1e-12)


# -----------------------------------------------------------------------------
# GPT-2


@dataclass
class CWICConfig:
    vocab_size: int = 4096
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 192
    bias: bool = True           # in linear layers and norms; the head never has one
    stripe_qkv: int = 192       # columns to a stripe, for each kind of matrix
    stripe_out: int = 192
    stripe_up: int = 192
    stripe_down: int = 192
    stripe_head: int = 1024

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})')
        for name, size in asdict(self).items():
            if name != 'bias' and size < 1:
                raise ValueError(f'{name} must be at least 1, not {size}')


class KVCache:
    """Keys and values of the tokens so far. k, v (n_layer, batch, n_head, block_size, head_dim); length in tokens."""

    def __init__(self, config, batch=1, device='cpu'):
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k, self.v, self.length = torch.zeros(shape, device=device), torch.zeros(shape, device=device), 0


class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.qkv = StripedLinear(config.n_embd, 3 * config.n_embd, config.stripe_qkv, config.bias)
        self.out = StripedLinear(config.n_embd, config.n_embd, config.stripe_out, config.bias)

    def forward(self, x, cache, dense, mask):
        B, T, d = x.shape
        qkv, active_qkv, sums_qkv = self.qkv(x, dense, mask)
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in qkv.split(d, dim=2))     # (B, heads, T, d / heads)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            past, now = cache.length, cache.length + T
            cache.k[self.layer, :, :, past:now], cache.v[self.layer, :, :, past:now] = k, v
            visible = torch.ones(T, now, dtype=torch.bool, device=x.device).tril(past)             # (T, past + T)
            y = F.scaled_dot_product_attention(q, cache.k[self.layer, :, :, :now], cache.v[self.layer, :, :, :now], visible)
        y, active_out, sums_out = self.out(y.transpose(1, 2).reshape(B, T, d), dense, mask)
        return y, [active_qkv, active_out], [sums_qkv, sums_out]


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.up = StripedLinear(config.n_embd, 4 * config.n_embd, config.stripe_up, config.bias)
        self.down = StripedLinear(4 * config.n_embd, config.n_embd, config.stripe_down, config.bias)

    def forward(self, x, dense, mask):
        h, active_up, sums_up = self.up(x, dense, mask)
        y, active_down, sums_down = self.down(F.gelu(h, approximate='tanh'), dense, mask)
        return y, [active_up, active_down], [sums_up, sums_down]


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache, dense, mask):
        y, active_attn, sums_attn = self.attn(self.ln_1(x), cache, dense, mask)
        x = x + y
        y, active_mlp, sums_mlp = self.mlp(self.ln_2(x), dense, mask)
        return x + y, active_attn + active_mlp, sums_attn + sums_mlp


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        # the token embedding is the head read the other way: row i of its transpose is token i
        self.head = StripedLinear(config.n_embd, config.vocab_size, config.stripe_head, bias=False)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for block in self.blocks:       # GPT-2: what adds to the residual stream starts smaller, the deeper the model
            for linear in (block.attn.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def linears(self):
        """[(name, StripedLinear)], in the order of every active count: 0.qkv, 0.out, 0.up, 0.down, 1.qkv, ..., head."""
        inner = [(f'{i}.{name}', linear) for i, block in enumerate(self.blocks) for name, linear in
                 (('qkv', block.attn.qkv), ('out', block.attn.out), ('up', block.mlp.up), ('down', block.mlp.down))]
        return inner + [('head', self.head)]

    def dense(self):
        """Weights that a dense model uses for each token, over all linear layers, head included."""
        return sum(linear.dense for _, linear in self.linears())

    def trunk(self, tokens, cache=None, dense=False, mask=None, recompute=False):
        """
        All but the head. tokens (B, T) -> hidden (B, T, d), [active (B, T)] and [sums (4, in)], one for each matrix.
        recompute: keep no activations inside blocks, compute them again in backward. Blocks return what they observe
        and change nothing, so computing one twice counts nothing twice.
        """
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        x = F.embedding(tokens, self.head.weight.t()) + self.wpe(positions)                        # (B, T, d)
        active, sums = [], []
        for block in self.blocks:
            if recompute:
                x, active_block, sums_block = checkpoint(block, x, cache, dense, mask, use_reentrant=False)
            else:
                x, active_block, sums_block = block(x, cache, dense, mask)
            active += active_block
            sums += sums_block
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.ln_f(x), active, sums

    def forward(self, tokens, cache=None, dense=False):
        """
        tokens (B, T) -> logits (B, T, vocab) f32, active (matrices, B, T) f32: the weights each matrix used for each token,
        counted in the pass that made the logits. With a KVCache, tokens follow those already in it, and join them.
        dense: leave the thresholds out; every weight is used.
        """
        hidden, active, _ = self.trunk(tokens, cache, dense)
        logits, active_head, _ = self.head(hidden, dense)
        return logits.float(), torch.stack(active + [active_head])

    def update_statistics(self, sums):
        """sums: for each matrix (4, in), added up over the micro-batches and ranks of one optimiser step."""
        for (_, linear), linear_sums in zip(self.linears(), sums, strict=True):
            linear.update_statistics(linear_sums)

    def parameter_groups(self, lr, weight_decay):
        """Three groups for AdamW: matrices, decayed; biases, norms; and the thresholds, never decayed."""
        thetas = [p for name, p in self.named_parameters() if name.endswith('theta')]
        matrices = [p for name, p in self.named_parameters() if p.dim() > 1 and not name.endswith('theta')]
        others = [p for p in self.parameters() if p.dim() <= 1]
        return [dict(params=matrices, lr=lr, weight_decay=weight_decay), dict(params=others, lr=lr, weight_decay=0.0),
                dict(params=thetas, lr=lr, weight_decay=0.0)]

    @torch.no_grad()
    def limit_thresholds(self, before):
        """
        After an optimiser step: no threshold moves by more than half its window, beyond which it would no longer feel the
        inputs it just passed, nor below the floor. before: the thetas as they were, in the order of linears().
        """
        for (_, linear), old in zip(self.linears(), before, strict=True):
            step = (linear.theta - old).clamp_(-BANDWIDTH / 2 / linear.scale, BANDWIDTH / 2 / linear.scale)
            linear.theta.copy_((old + step).clamp_min_(FLOOR / linear.scale))


# -----------------------------------------------------------------------------
# the losses


def next_token_loss(logits, targets):
    """Mean cross-entropy in nats. logits (N, vocab), targets (N,)."""
    return F.cross_entropy(logits.float(), targets)


def two_way_kl(logits, teacher_logits):
    """
    (KL(teacher || student) + KL(student || teacher)) / 2, mean over tokens, in nats. logits (N, vocab), both.
    Written out it is sum (p - q) (log p - log q) / 2, and the logits may stand for the logs: p - q sums to nothing.
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    difference = logits.softmax(-1) - teacher_logits.softmax(-1)
    return (difference * (logits - teacher_logits)).sum(-1).mean() / 2


def flop_loss(active, dense, target):
    """max(target - reduction, 0)^2, where reduction = dense / active; active: the mean over all tokens of the step."""
    return max(target - dense / active, 0.0) ** 2


def price(active, dense, target):
    """
    The slope of flop_loss in active: what one active weight costs. The loss of a mean is not the mean of losses, so a step
    cut into micro-batches must not take the loss of each; but each can pay this one price for every weight it used.
    """
    return 2 * max(target - dense / active, 0.0) * dense / active ** 2


# -----------------------------------------------------------------------------
# checkpoints: plain tensors and plain values in one file


class CheckpointError(Exception):
    """A checkpoint that cannot be used, said in one line."""


def save_checkpoint(path, model, **more):
    """Writes {'model', 'config', **more} to path so that a crash at any moment leaves the old file or the new, whole."""
    partial = f'{path}.{os.getpid()}.partial'
    try:
        with open(partial, 'wb') as f:
            torch.save({'model': model.state_dict(), 'config': asdict(model.config), **more}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_checkpoint(path, device='cpu'):
    """
    (model in eval mode, the checkpoint's dict). Runs no code from the file. Raises CheckpointError, in one line, where the
    file is missing, truncated, or not one of ours.
    """
    try:
        file = open(path, 'rb')
    except FileNotFoundError:
        raise CheckpointError(f'{path}: no such checkpoint; train one with: python train.py') from None
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror})') from None
    try:
        with file:
            saved = torch.load(file, map_location=device, weights_only=True)
        model = GPT(CWICConfig(**saved['config']))
        model.load_state_dict(saved['model'])
    except Exception as error:      # torch.load raises a dozen kinds for a file that is truncated, foreign or malicious
        raise CheckpointError(f'{path}: not a CWIC checkpoint, or a damaged one ({type(error).__name__})') from None
    return model.to(device).eval(), saved


def dense_copy(model):
    """A frozen copy to learn from, in eval mode: run it with dense=True."""
    return copy.deepcopy(model).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# generation, the plain way: the reference for the decoder


def sample(logits, temperature, top_k, generator):
    """logits (vocab,) -> a token id. Greedy at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -math.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=0.0, top_k=None, generator=None, cached=True):
    """
    Continues a list of token ids, yielding (token, active (matrices,)) one at a time; active belongs to the pass that
    produced the token. When the context is full, the window becomes its own last half and is read again from position 0.
    cached=False computes every window anew: the same tokens, slowly.
    """
    block_size = model.config.block_size
    window = list(tokens)[-block_size:]
    cache = KVCache(model.config, device=model.wpe.weight.device)
    for _ in range(max_new_tokens):
        if len(window) > block_size:
            window, cache.length = window[-(block_size // 2):], 0
        if not cached:
            cache.length = 0
        logits, active = model(torch.tensor([window[cache.length:]], device=model.wpe.weight.device), cache)
        token = sample(logits[0, -1], temperature, top_k, generator)
        window.append(token)
        yield token, active[:, 0, -1]
