"""
The other ways to skip weights: a survey of what CWIC builds on and is compared with. Each entry of METHODS
comes with its idea, its paper, and when it breaks.

    python lab/baselines.py                 # how good they are; baselines.py says more
    model, saved = weights.load('out/dense/best.safetensors')
    calibrate(model, (tokens,), dict.fromkeys(sparse_layers_of(model), 0.5))    # TEAL at 2x, tokens (B, T)

Nearly all of them are the layer of cwic.py with other thresholds:

    y = (centre + m * (x - centre)) @ W + b,    m = score > threshold

                    score of input i            centre   threshold
    TEAL, CATS      |x_i|                       0        a quantile; CATS: in the MLP only
    WINA            |x_i| * |W_i|               0        a quantile
    SCAP            |x_i - centre_i|            median   a quantile
    CWIC's form     |x_i - centre_i| * |W_i|    median   a quantile; |W_i| within each stripe of columns
    Q-Sparse        |x_i|                       0        the token's K-th largest score
    ProSparse       x_i, with its sign          0        0, which is ReLU; at the end a quantile
    pruning         its mean over all tokens    median   a quantile
    Deja Vu         a predictor's, of a unit    0        a quantile
    CWIC            |x_i - centre_i|            median   learned, for each stripe and input

A method that needs more than thresholds has a layer of its own, and one that trains differently is a subclass
of Method.

Not here: kernels. sparse_kernel.c could skip for all of them but Deja Vu, ShadowLLM and pruning, which leave
out whole heads, neurons or columns.
"""

from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

import cwic
import train
from cwic import CWICConfig, Neurons, StripedLinear, Thresholds
from options import check_options

LEAST = 0.02            # a layer that skips keeps at least this share of its weights
RANK = 32               # of Deja Vu's predictors
LOW_RANK = 0.05         # R-Sparse: weights of the low-rank path, as a share of the matrix's
NEVER = 1e30            # a threshold that no input exceeds
STRIPES = ('stripe_qkv', 'stripe_out', 'stripe_up', 'stripe_down', 'stripe_head')
ONE_STRIPE = dict.fromkeys(STRIPES, 10 ** 9)        # to each matrix, as wide as it is

# -----------------------------------------------------------------------------
# thresholds that are not learned


def sparse_layers_of(module):
    """{name: layer} for every layer with thresholds in a model or a block, in the order of a forward pass."""
    return {name: layer for name, layer in module.named_modules()
            if isinstance(layer, (StripedLinear, Neurons))}


@contextmanager
def hooked(functions):
    """with hooked([(module, function)]): function(module, args) before each forward()."""
    hooks = [module.register_forward_pre_hook(function, prepend=True) for module, function in functions]
    yield
    for hook in hooks:
        hook.remove()


def set_thresholds(layer, x, share, weighed=False, centred=False, static=False):
    """
    Sets a layer's thresholds so that it uses this share of its weights for inputs x (N, in). weighed: scores
    are multiplied by |W_i|. centred: inputs are measured from their median. static: each input has one score,
    its mean.
    """
    linear = isinstance(layer, StripedLinear)       # neurons have neither a centre nor one matrix
    centre = x.median(0).values if centred and linear else torch.zeros_like(layer.mu)
    score, norms = (x - centre).abs(), torch.ones_like(layer.mu)[None]              # (N, in), (1, in)
    if static:
        score = score.mean(0, keepdim=True)
    if weighed and linear:
        W = cwic.by_stripe(layer.adapter(layer.weight), layer.stripe)               # (n, in, stripe)
        norms = W.norm(dim=2).clamp_min(1e-12)
    scores = score * norms[:, None]                                                 # (n, N, in)
    skipped, quantile = round((1 - share) * scores.numel()), -1.0
    if skipped:     # the largest score that is skipped; kthvalue() is slow on a GPU
        quantile = scores.flatten().topk(scores.numel() - skipped + 1, sorted=False).values.min()
    t = torch.where(scores[:, 0] > quantile, -1.0, NEVER) if static else quantile / norms
    layer.mu.copy_(centre)
    layer.sigma.fill_(1.0)
    layer.theta.copy_((t / layer.scale).expand_as(layer.theta))


@torch.no_grad()
def calibrate(module, inputs, shares, **rule):
    """
    Sets the thresholds of a model or a block, in one pass: those of a layer when its input arrives, computed
    by the layers before it, which skip already. shares: {name: share of its weights that a layer uses}; left
    out: all. rule: see set_thresholds(). Returns module(*inputs).
    """
    share_of = {layer: shares.get(name, 1.0) for name, layer in sparse_layers_of(module).items()}

    def arrives(layer, args):
        set_thresholds(layer, args[0].float().flatten(0, 1), share_of[layer], **rule)

    with hooked([(layer, arrives) for layer in share_of]):
        return module(*inputs)


# -----------------------------------------------------------------------------
# what all methods share


class Cannot(Exception):
    """Why a method cannot reach a target, or cannot be applied to a model."""


class Changed(StripedLinear):
    """A copy of a model's layer, sharing its weights, for subclasses with another forward()."""

    def __init__(self, layer):
        super().__init__(layer.n_in, layer.n_out, layer.stripe, bias=False)
        self.weight, self.bias, self.adapter = layer.weight, layer.bias, layer.adapter
        self.to(layer.weight.device)


class Apart(Thresholds):
    """Llama's up and down as two layers that skip inputs. (In CWIC and CATS they share a mask of neurons.)"""

    def __init__(self, neurons):
        n_embd, n_hidden = neurons.up.shape
        super().__init__(n_hidden, 1)
        self.n_weights = neurons.n_weights
        self.up = StripedLinear(n_embd, n_hidden, n_hidden, bias=False)
        self.down = StripedLinear(n_hidden, n_embd, n_embd, bias=False)
        self.up.weight, self.up.adapter = neurons.up, neurons.adapter_up
        self.down.weight, self.down.adapter = neurons.down, neurons.adapter_down
        self.to(neurons.up.device)

    def forward(self, z, x, dense=False):
        h, active_up = self.up(x, dense)
        y, active_down = self.down(h * z, dense)
        return y, active_up + active_down


class Method:
    """
    How a dense model becomes one that skips. start() copies the dense model, change() replaces layers, and
    limit() sets the thresholds. In training, step() is one optimiser step, and follow() is called every few
    steps: it adapts the thresholds to the new weights, and to the target, which rises from 1 to its final
    value. Method(name=value) has other attributes than these:
    """
    rule = {}               # options of set_thresholds()
    kinds = ()              # names of the layers that skip; (): all
    layer = StripedLinear   # their class
    apart = True            # Llama's up and down skip inputs; else they share a mask of neurons
    more = 0.0              # weights that each token uses besides the model's, as a share of those
    options = ONE_STRIPE    # of train.py, in place of the recipe's
    trained = False         # for as many steps as the recipe has
    learned = False         # thresholds are learned; else limit() sets them
    predicts = False        # only predictors are trained: compared at the targets of untrained methods
    is_dense = False        # never skips
    gpt2_only = False       # not written for Llama's blocks

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def skips(self, name):
        return not self.kinds or name.split('.')[-1] in self.kinds

    def skipping(self, model):
        """-> weights in all layers that skip; weights that each token uses besides the model's"""
        return (sum(layer.n_weights for name, layer in sparse_layers_of(model).items() if self.skips(name)),
                self.more * model.n_weights())

    def share(self, model, target):
        """Share of their weights that skipping layers may use for 1 / target in all. Raises Cannot."""
        total, (skipping, more) = model.n_weights(), self.skipping(model)
        fixed = total - skipping + more
        if total / target < fixed + LEAST * skipping:
            raise Cannot(f'at most {total / (fixed + LEAST * skipping):.2f}x: every token uses '
                         f'{fixed / total:.0%} of the weights')
        return min((total / target - fixed) / skipping, 1.0)

    def start(self, model, saved, recipe, given):
        """
        -> train.Run with a copy of the dense model; the recipe's data. saved: what the model's file says;
        given: names of options in the recipe. Raises Cannot.
        """
        if self.gpt2_only and model.config.arch != 'gpt2':
            raise Cannot("written for GPT-2's blocks only")
        self.share(model, recipe.target_reduction)
        own = {'bases': False, 'shortlist': False, **self.options}
        return train.begin(replace(recipe, **own), given | own.keys(), recipe.device)

    def change(self, model):
        for block in model.blocks if self.apart and model.config.arch == 'llama' else ():
            block.mlp.neurons = Apart(block.mlp.neurons)
        for module in list(model.modules()) if self.layer is not StripedLinear else ():
            for name, layer in list(module.named_children()):
                if isinstance(layer, StripedLinear) and self.skips(name):
                    setattr(module, name, self.layer(layer))

    def limit(self, model, target, tokens):
        """From now on the model uses 1 / target of its weights, on average over tokens (B, T)."""
        shares = dict.fromkeys(filter(self.skips, sparse_layers_of(model)), self.share(model, target))
        calibrate(model, (tokens,), shares, **self.rule)

    def follow(self, model, target, final, tokens):
        self.limit(model, target, tokens)

    def step(self, run, tokens, targets, target):
        """tokens, targets (B, T): the batch."""
        train.train_step(run, tokens, targets, target if self.learned else 1.0, dense=self.is_dense)


METHODS = {}            # {name: Method}, in the order of the survey that follows

# -----------------------------------------------------------------------------
# without training

# Every token uses every weight.
METHODS['dense'] = Method(is_dense=True)

# Small inputs add little, so each matrix skips those below a quantile (Liu et al., 2024, arXiv 2408.14690).
# Breaks from 2x on, as errors add up from layer to layer; and if inputs are not centred on 0.
METHODS['TEAL'] = Method()


class Greedy(Method):
    """
    TEAL's own allocation: in each block, take 5% of its compute from the matrix that harms the block's output
    least, again and again. Breaks like TEAL: all blocks get the same share, and each sees only itself.
    """

    @torch.no_grad()
    def limit(self, model, target, tokens):
        share, inputs = self.share(model, target), {}
        with hooked([(block, lambda block, args: inputs.update({block: args})) for block in model.blocks]):
            model(tokens[:8], dense=True)
        shares = {'head': share}
        for i, block in enumerate(model.blocks):
            y = block(*inputs[block])[0]
            sizes = {name: layer.n_weights for name, layer in sparse_layers_of(block).items()}
            sparse, best = (*inputs[block][:-1], False), dict.fromkeys(sizes, 1.0)
            while (excess := sum(sizes[name] * (best[name] - share) for name in sizes)) >= 1:
                cut = min(0.05 * sum(sizes.values()), excess)
                trials = [{**best, name: max(best[name] - cut / sizes[name], LEAST)}
                          for name in sizes if best[name] > LEAST]
                best = min(trials, key=lambda trial: float((calibrate(block, sparse, trial)[0] - y).norm()))
            shares.update({f'blocks.{i}.{name}': best[name] for name in sizes})
        calibrate(model, (tokens,), shares)


METHODS['TEAL greedy'] = Greedy()

# Only neurons are skipped, by their activation (Lee et al., 2024, arXiv 2404.08763): a column of up and a
# row of down; in an MLP without a gate only the row. Breaks if more must be skipped than the MLP has.
METHODS['CATS'] = Method(kinds=('neurons', 'down'), apart=False)

# The score of an input is multiplied by the norm of its row of W (Chen et al., 2025, arXiv 2505.19427; they
# take the K largest and make W orthogonal, here there are thresholds). Breaks if all rows have about the
# same norm: then it is TEAL.
METHODS['WINA'] = Method(rule={'weighed': True})

# Inputs are measured from their usual value, whose product goes into the bias (Chua et al., 2024, arXiv
# 2412.07174; they use the mode, here it is the median). Breaks if usual values are 0: then it is TEAL.
METHODS['SCAP'] = Method(rule={'centred': True})


class LowRankRest(Changed):
    """Skipped inputs go through a low-rank copy of the matrix, its largest singular values."""

    def __init__(self, layer):
        super().__init__(layer)
        rank = int(LOW_RANK * layer.n_weights / (layer.n_in + layer.n_out))
        U, S, V = torch.svd_lowrank(layer.weight.detach(), rank, niter=8)
        self.register_buffer('A', U * S)                            # (in, rank)
        self.register_buffer('B', V.t().contiguous())               # (rank, out)

    def forward(self, x, dense=False):
        y, active = super().forward(x, dense)
        rest = 0 * x if dense else torch.where(x.abs() > self.thresholds()[0], 0.0, x)
        return y + rest @ self.A @ self.B, active + (not dense) * (self.A.numel() + self.B.numel())


# TEAL, with a low-rank path for the skipped inputs (Zhang et al., 2025, arXiv 2504.19449; they search for the
# best ranks, here the path has 5%). Breaks if singular values fall slowly, as in small models.
METHODS['R-Sparse'] = Method(layer=LowRankRest, more=LOW_RANK)

# CWIC without learning: the difference to CWIC is what learning gains. Breaks like all of the above: no
# threshold knows what the loss needs.
METHODS['CWIC form'] = Method(rule={'weighed': True, 'centred': True}, apart=False, options={})


# -----------------------------------------------------------------------------
# trained as CWIC is: the same tokens, steps, teacher and learning rates

# TEAL, with weights that learn to live with it: thresholds follow, as quantiles of the current inputs. From
# no paper, but the fair rival. Breaks if matrices or tokens differ in what they need: all get the same.
METHODS['TEAL + distillation'] = Method(trained=True)


class TopK(Changed):
    """Uses exactly the K largest inputs of each token; gradients pass straight through."""
    share = 1.0

    def forward(self, x, dense=False):
        count = self.n_in if dense else max(round(self.share * self.n_in), 1)
        largest = torch.zeros_like(x).scatter_(-1, x.abs().topk(count, dim=-1, sorted=False).indices, 1.0)
        y, active = super().forward(x + (x * largest - x).detach(), dense=True)
        # 0 * x: train.py needs a gradient of every count
        return y, torch.full_like(active, count * self.n_out) + 0 * x.sum(-1)


class QSparse(Method):
    """
    The K largest inputs of each token (Wang et al., 2024, arXiv 2407.10969, who also train from scratch, with
    ReLU^2). Breaks if tokens differ: an easy one costs as much as a hard one.
    """

    def limit(self, model, target, tokens):
        share = self.share(model, target)
        for layer in sparse_layers_of(model).values():
            layer.share = share

    def follow(self, model, target, final, tokens):
        self.limit(model, final, tokens)        # at once, as in the paper

METHODS['Q-Sparse'] = QSparse(layer=TopK, trained=True)


class Rectified(Changed):
    """ReLU on the inputs, by degrees: amount 0 leaves them alone, 1 is ReLU."""
    amount = torch.tensor(0.0)      # a tensor: torch would compile again for each new number

    def forward(self, x, dense=False):
        x = x if dense else torch.where(x > 0, x, (1 - self.amount) * x)
        y, active = super().forward(x, dense)
        # the count's gradient is that of L1, in units of the mean: it reaches all inputs, not only those next
        # to a threshold
        l1 = self.n_out * (x.abs() / x.detach().abs().mean().clamp_min(1e-12)).sum(-1)
        return y, active.detach() + l1 - l1.detach()


class ProSparse(Method):
    """
    ReLU after the norms and in the MLP (Mirzadeh et al., 2023, arXiv 2310.04564), an L1 loss that rises, and
    higher thresholds at the end (Song et al., 2024, arXiv 2402.13516); here ReLU comes by degrees. Breaks if
    the head and attention's output are large, as they do not skip.
    """

    def follow(self, model, target, final, tokens):
        for layer in sparse_layers_of(model).values():
            layer.amount = torch.tensor((target - 1) / (final - 1) if final > 1 else 0.0)

    def limit(self, model, target, tokens):
        self.follow(model, target, target, tokens)
        super().limit(model, target, tokens)

    def step(self, run, tokens, targets, target):
        train.train_step(run, tokens, targets, target)      # L1 has CWIC's price as its weight

METHODS['ProSparse'] = ProSparse(kinds=('qkv', 'up', 'down'), layer=Rectified, trained=True, gpt2_only=True)


class Unread(Changed):
    """Some columns are not computed, as no later layer reads them."""
    unread = 0          # how many

    def forward(self, x, dense=False):
        y, active = super().forward(x, dense)
        return y, active if dense else active * (1 - self.unread / self.n_out)


class Pruning(Method):
    """
    Inputs that vary least, times |W|, are replaced by a bias, the same ones for every token, and columns that
    only they would read go too (FLAP, An et al., 2023, arXiv 2312.11983; then distilled). Breaks if tokens
    need different weights, which is why all other methods look at the token.
    """

    def share(self, model, target):
        # the columns of values and neurons shrink twice, to share ** 2: their own inputs are pruned, and so
        # are the rows that read them. Solves simply * share + doubly * share ** 2 = weights / target
        doubly = sum(block.attn.qkv.n_weights / 3 + block.mlp.up.n_weights for block in model.blocks)
        simply = model.n_weights() - doubly
        return ((simply ** 2 + 4 * doubly * model.n_weights() / target) ** 0.5 - simply) / (2 * doubly)

    def limit(self, model, target, tokens):
        pruned = float((model.head.theta > 0).float().mean())
        # pruned inputs stay pruned until the target has risen
        if not pruned or pruned < 1 - self.share(model, target) - 1 / model.head.n_in:
            super().limit(model, target, tokens)
        for block in model.blocks:
            block.attn.qkv.unread = int((block.attn.out.theta[0] > 0).sum())
            block.mlp.up.unread = int((block.mlp.down.theta[0] > 0).sum())

METHODS['pruning'] = Pruning(layer=Unread, rule=dict(weighed=True, centred=True, static=True), trained=True,
                             gpt2_only=True)


# -----------------------------------------------------------------------------
# predictors: what will matter is guessed before it is computed


class Chosen(Changed):
    """
    Uses the columns (of qkv or up) or rows (of out or down) of the heads or neurons that a Predictor chose.
    The mask is applied to rows only: a column that no row reads makes no difference.
    """
    mask = 1.0          # of rows: (B, T, in), 1.0 or 0.0
    share = 1.0         # (B, T), of heads or neurons that are used
    more = 0            # weights of the predictor, counted here

    def forward(self, x, dense=False):
        y, active = super().forward(x if dense else x * self.mask, dense=True)
        return y, active if dense else active * self.share + self.more


class Predictor(torch.nn.Module):
    """
    Scores heads and neurons from the residual stream at an earlier place, through two small matrices. pairs:
    [(layer whose columns compute them, layer whose rows read them, how many there are)]
    """

    def __init__(self, n_embd, pairs):
        super().__init__()
        self.pairs, self.counts = pairs, [count for *_, count in pairs]     # in tuples: not submodules
        self.A = torch.nn.Parameter(torch.randn(n_embd, RANK) / n_embd ** 0.5)              # (d, rank)
        self.B = torch.nn.Parameter(torch.zeros(RANK, sum(self.counts)))                    # (rank, units)
        self.least = [-NEVER] * len(pairs)      # units with a larger score are chosen
        pairs[0][1].more = self.A.numel() + self.B.numel()

    def forward(self, x):
        """x (B, T, d) -> for each pair, scores (B, T, heads or neurons)"""
        x = torch.nn.functional.layer_norm(x.to(self.A.dtype), x.shape[2:])
        return ((x @ self.A).relu() @ self.B).split(self.counts, dim=2)

    def set_least(self, x, share):
        """From now on this share of the units is chosen, on average over x (B, T, d)."""
        for i, scores in enumerate(self(x)):
            skipped = max(round((1 - share) * scores.numel()), 1)
            self.least[i] = float(scores.flatten().kthvalue(skipped).values)

    def choose(self, place, args):
        """A hook that runs before place.forward(*args): sets the masks and shares of the chosen layers."""
        for (columns, rows, count), scores, least in zip(self.pairs, self(args[0]), self.least):
            chosen = (scores > least).float()
            rows.mask = chosen.repeat_interleave(rows.n_in // count, dim=2)
            rows.share = columns.share = chosen.mean(2)


class DejaVu(Method):
    """
    Predictors read the stream one block early and choose the heads and neurons whose output will be largest
    (Liu et al., 2023, arXiv 2310.17157; if a token uses a head, keys and values are computed for all tokens
    before it). Breaks without ReLU, as few neurons are silent; and the LM head does not skip.
    """
    kinds = ('qkv', 'out', 'up', 'down')
    layer = Chosen
    trained = predicts = gpt2_only = True

    def places(self, model):
        """[(module whose input a predictor reads, its pairs: see Predictor)]"""
        heads, neurons = model.config.n_head, model.config.n_hidden
        return [(model.blocks[max(i - 1, 0)], [(block.attn.qkv, block.attn.out, heads),
                                               (block.mlp.up, block.mlp.down, neurons)])
                for i, block in enumerate(model.blocks)]

    def importance(self, outputs, slopes):
        """Outputs of units (B, T, units, width), and the loss's gradient for them -> (B, T, units)"""
        return outputs.norm(dim=3)

    def skipping(self, model):
        places = self.places(model)
        pairs = [pair for _, pairs in places for pair in pairs]
        return (sum(columns.n_weights + rows.n_weights for columns, rows, _ in pairs),
                RANK * (len(places) * model.config.n_embd + sum(count for *_, count in pairs)))

    def change(self, model):
        super().change(model)
        model.requires_grad_(False)         # only predictors learn
        model.predictors = torch.nn.ModuleList()
        for place, pairs in self.places(model):
            model.predictors.append(Predictor(model.config.n_embd, pairs).to(model.head.weight.device))
            place.register_forward_pre_hook(model.predictors[-1].choose)

    @torch.no_grad()
    def limit(self, model, target, tokens):
        share = self.share(model, target)
        hooks = [(place, lambda place, args, predictor=predictor: predictor.set_least(args[0], share))
                 for (place, _), predictor in zip(self.places(model), model.predictors)]
        with hooked(hooks):                 # they run before the predictors' own
            model(tokens)

    def follow(self, model, target, final, tokens):
        pass                                # nothing is skipped in training

    def step(self, run, tokens, targets, target):
        """Predictors learn which units are the most important for a token, as many as will be used."""
        model, places, read, outputs = run.model, self.places(run.model), {}, {}
        share, losses = self.share(model, run.config.target_reduction), []
        hooks = [(place, lambda place, args: read.update({place: args[0].detach()})) for place, _ in places]
        hooks += [(rows, lambda rows, args: outputs.update({rows: args[0].requires_grad_()}))
                  for _, pairs in places for _, rows, _ in pairs]
        with run.uncompiled(), run.autocast(), hooked(hooks):
            logits, _ = model(tokens, dense=True)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        slopes = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values()))))
        for (place, pairs), predictor in zip(places, model.predictors):
            for (_, rows, count), scores in zip(pairs, predictor(read[place])):
                both = (x.detach().float().unflatten(2, (count, -1)) for x in (outputs[rows], slopes[rows]))
                most = self.importance(*both).topk(max(round(share * count), 1), dim=2).indices
                wanted = torch.zeros_like(scores).scatter_(2, most, 1.0)            # (B, T, count)
                losses.append(torch.nn.functional.binary_cross_entropy_with_logits(scores, wanted))
        run.optimizer.zero_grad()
        sum(losses).backward()
        run.optimizer.step()

METHODS['Deja Vu'] = DejaVu()


class ShadowLLM(DejaVu):
    """
    One predictor for all layers, after the first attention; importance is |a * dL/da| (Akhauri et al., 2024,
    arXiv 2406.16635). Breaks like Deja Vu, and if only later layers know what a token needs.
    """

    def places(self, model):
        pairs = [pair for _, pairs in super().places(model) for pair in pairs]
        return [(model.blocks[0].ln_2, pairs[1:])]      # after the first attention, which is not skipped

    def importance(self, outputs, slopes):
        return (outputs * slopes).sum(3).abs()

METHODS['ShadowLLM'] = ShadowLLM()


# -----------------------------------------------------------------------------
# what they are measured against


class SmallerDense(Method):
    """Why not a dense model of that size? Breaks if the original training cannot be repeated."""

    def start(self, model, saved, recipe, given):
        """It reads as many tokens as the others, the dense model's training included."""
        try:
            old = check_options(train.TrainConfig, saved.get('options', {}))
        except ValueError as error:
            raise Cannot(f'the training of this model cannot be repeated: {error}') from None
        config = asdict(model.config)
        for n_embd in range(model.config.n_embd, 0, -2 * model.config.n_head):
            config.update(n_embd=n_embd, n_hidden=model.config.n_hidden * n_embd // model.config.n_embd)
            with torch.device('meta'):
                if cwic.GPT(CWICConfig(**config)).n_weights() <= model.n_weights() / recipe.target_reduction:
                    break
        sizes = {name: config[name] for name in config.keys() & asdict(old).keys()}
        steps = old.dense_steps + recipe.ramp_steps + recipe.hold_steps
        config = replace(old, **sizes, init_from='', data=recipe.data, out=recipe.out, seed=recipe.seed,
                         resume=False, target_reduction=1.0, dense_steps=steps)
        return train.begin(config, set(), recipe.device)

METHODS['smaller dense'] = SmallerDense(is_dense=True, trained=True)


# Learned thresholds, and one price for an active weight anywhere in the model. Breaks if steps are few: a
# threshold moves by at most a twentieth of a sigma in each.
LEARNED = {'trained': True, 'learned': True, 'apart': False}
METHODS['CWIC'] = Method(**LEARNED, options={})
