"""
Refinements of CWIC that are ours and not the paper's: bases and a shortlist make more of the same number of
weights, fused masks save time. None is needed to understand the method, which is cwic.py.

    python train.py config/distill_small.toml --bases --shortlist       # a pretrained model gets both

Bases. A layer masks those inputs that are close to their usual values. The variance of an input is spread
over all its coordinates, but most of it lies along a few principal components. So two kinds of layers read
rotated inputs, x @ R, whose coordinates are principal components of x; more of them can be masked.

    head                R is (d, d), model.basis. The rotation costs each token d * d weights, counted in the
                        head. Embeddings are tied to the head, so they are rotated back.
    attention output    one R (D, D) for each head of keys and values, attn.basis. It costs nothing: R is
                        multiplied into the columns of qkv that make values, its inverse into the rows of out.

Shortlist. Nearly all of tens of thousands of logits need only be good enough to show that their tokens are
unlikely, for which few of the head's weights do. Those near the top are computed again with every weight:

    logit = exact if max(rough) - rough < margin, else rough

The margin is one number for all tokens, and is learned as thresholds are.

Not here: bases for the other layers. Their inputs come straight from the residual stream, so every change
from one basis to another would cost d * d weights.
"""

import torch
import torch.nn as nn

from cwic import StripedLinear, Thresholds, as_count, statistics

MARGIN = 4.0                # nats: a margin before training
MARGIN_BANDWIDTH = 0.5      # nats: how wide the range around a margin is from which it learns
MARGIN_SCALE = 200.0        # how many times faster Adam moves a margin, in nats, than other numbers

# -----------------------------------------------------------------------------
# the head


class Shortlist(torch.autograd.Function):
    """
    logits = exact if max(rough) - rough < margin, else rough; and the weights used for exact logits, n_in
    each. Rough and exact logits get the gradient of the logits they became. The margin's gradient is defined
    as that of any threshold, by step_backward in cwic.py.

    rough, exact (N, vocab) of one dtype, margin (1,) in nats -> logits (N, vocab), active (N,) f64
    """

    @staticmethod
    def forward(ctx, rough, exact, margin, n_in):
        ctx.save_for_backward(rough, exact, margin)
        ctx.n_in = n_in
        listed = gap_to_max(rough) < margin                                     # (N, vocab)
        return torch.where(listed, exact, rough), as_count(listed.sum(1)) * n_in

    @staticmethod
    def backward(ctx, g, g_active):
        rough, exact, margin = ctx.saved_tensors
        gap = gap_to_max(rough)                                                 # (N, vocab)
        listed, near = gap < margin, (gap - margin).abs() < MARGIN_BANDWIDTH / 2
        cost = ctx.n_in * g_active.float()[:, None]                             # of an exact logit
        grad_listed = g.float() * (exact.float() - rough.float()) + cost
        d_margin = torch.where(near, grad_listed, 0.0).sum() / MARGIN_BANDWIDTH
        return torch.where(listed, 0.0, g), torch.where(listed, g, 0.0), d_margin[None], None


def gap_to_max(logits):
    """How far each logit is below the largest of its token, in nats. (N, vocab) -> (N, vocab) f32."""
    return logits.amax(1, keepdim=True).float() - logits.float()


class Head(StripedLinear):
    """The head of a model with bases, a shortlist, or both."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.vocab_size, config.stripe_head, bias=False)
        self.rotation_weights = config.n_embd ** 2 if config.bases else 0       # used by each token
        start = torch.full((1,), MARGIN / MARGIN_SCALE)
        self.margin = nn.Parameter(start) if config.shortlist else None         # nats / MARGIN_SCALE

    def margin_in_nats(self):
        """The margin as a number; 0 without a shortlist."""
        return 0.0 if self.margin is None else float(self.margin.detach()) * MARGIN_SCALE

    def forward(self, x, dense=False):
        """x (B, T, d), rotated -> logits (B, T, vocab), active (B, T)"""
        if dense:
            return super().forward(x, dense)
        W = self.adapter(self.weight)
        logits, active = self.masked_product(x, W)
        active = active + self.rotation_weights
        if self.margin is None:
            return logits, active
        exact = (x @ W).to(logits.dtype)
        logits, more = Shortlist.apply(logits.flatten(0, 1), exact.flatten(0, 1), self.margin * MARGIN_SCALE,
                                       self.n_in)
        return logits.view_as(exact), active + more.view(active.shape)


# -----------------------------------------------------------------------------
# bases


def identity(*shape):
    """Bases that change nothing, (..., d, d). In bf16, which makes files smaller."""
    basis = torch.zeros(shape, dtype=torch.bfloat16)
    basis.diagonal(dim1=-2, dim2=-1).fill_(1)       # on the meta device eye() would import sympy: seconds
    return basis


def pca_basis(x):
    """The principal components of x (N, d), as columns (d, d)."""
    return torch.linalg.eigh(x.double().t().cov())[1].bfloat16()


def rotate(x, basis):
    """x (..., d) @ basis (d, d), in the dtype of x: coordinates along the columns of the basis."""
    return (x @ basis.to(x.dtype)).to(x.dtype)


def add_bases(model):
    """Gives a new model its bases, at first the identity."""
    config = model.config
    model.register_buffer('basis', identity(config.n_embd, config.n_embd))
    for block in model.blocks:
        block.attn.register_buffer('basis', identity(config.n_kv_head, config.head_dim, config.head_dim))


def rotate_input(weight, basis):
    """
    weight (in, out) -> the same for an input that is rotated. basis (n, D, D), for n groups of D inputs.
    (Rounded to bf16, a basis is not quite orthogonal, hence solve() and not its transpose.)
    """
    return torch.linalg.solve(basis, weight.unflatten(0, basis.shape[:2])).flatten(0, 1)


def rotate_values(weight, basis):
    """weight (..., out) of qkv -> the same with rotated values, its last columns. basis (kv heads, D, D)"""
    width = basis.shape[0] * basis.shape[1]
    queries_keys, values = weight.split([weight.shape[-1] - width, width], dim=-1)
    values = values.unflatten(-1, basis.shape[:2])[..., None, :] @ basis        # (..., kv heads, 1, D)
    return torch.cat([queries_keys, values.flatten(-3)], dim=-1)


def rotated_weights(model, with_lora=True):
    """
    Multiplies the bases of a model into its weights, so that it computes the same when dense. Yields
    (parameter, its new values). with_lora: LoRA's too; those in an adapter's file are rotated already, while
    its base is not. Raises torch.linalg.LinAlgError if a basis has no inverse.
    """
    def rotated(function, basis, *parameters):
        return [(p, function(p.detach().float().cpu(), basis.float().cpu()).to(p))
                for p in parameters if p is not None]

    def lora(layer, name):
        return getattr(layer.adapter, name, None) if with_lora else None

    head = model.head
    yield from rotated(rotate_input, model.basis[None], head.weight, lora(head, 'A'))
    for block in model.blocks:
        qkv, out, basis = block.attn.qkv, block.attn.out, block.attn.basis      # (kv heads, D, D)
        yield from rotated(rotate_values, basis, qkv.weight, qkv.bias, lora(qkv, 'B'))
        basis = basis.repeat_interleave(model.config.n_head // len(basis), dim=0)           # (heads, D, D)
        yield from rotated(rotate_input, basis, out.weight, lora(out, 'A'))


@torch.no_grad()
def find_bases(model, tokens, dense=True):
    """
    Sets the bases of a model whose bases are still the identity, from what its layers read on tokens (B, T),
    and rotates its weights. Layers that read rotated inputs get new statistics, and thresholds of 0.

    dense: with every weight in use. A model that is sparse already must be observed as it runs: inputs that
    it has learned to mask have drifted, and this noise would take the place of components.
    """
    config, found = model.config, {}

    def find(name, x):
        x = x.float().cpu()                                                                 # (B, T, d)
        if name == 'head':
            basis = pca_basis(x.flatten(0, 1))
            model.basis.copy_(basis)
        else:                   # one basis for all heads that share values
            x = x.unflatten(2, (config.n_kv_head, -1, config.head_dim))
            basis = torch.stack([pca_basis(x[:, :, head].flatten(0, 2)) for head in range(config.n_kv_head)])
            model.blocks[int(name.split('.')[0])].attn.basis.copy_(basis)                   # (kv heads, D, D)
        found[name] = statistics(rotate(x, basis).flatten(2), centred=True)

    layers = {name: layer for name, layer in model.sparse_layers() if name.endswith(('out', 'head'))}
    model.visit_inputs(tokens, find, layers, dense)
    for p, rotated in rotated_weights(model):
        p.copy_(rotated)
    for name, layer in layers.items():
        mu, sigma = found[name]
        layer.mu.copy_(mu)
        layer.sigma.copy_(sigma)
        layer.theta.zero_()


# -----------------------------------------------------------------------------
# fused masks


def fuse_masks(model):
    """
    Compiles mask_inputs and step_backward, which then pass over memory once, not a dozen times: on a CPU they
    take half the time, after some seconds. If the compiler fails later, for want of memory say, torch warns,
    and calls the plain functions.
    """
    torch._dynamo.config.suppress_errors = True
    functions = tuple(torch.compile(function, dynamic=True) for function in Thresholds.functions)
    for _, layer in model.sparse_layers():
        layer.functions = functions
