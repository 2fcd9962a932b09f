"""
The other ways to skip: a survey of what CWIC builds on and is compared with, each in a few lines.

    python lab/baselines.py compare         # how good they are; baselines.py says more
    model, saved = weights.load('out/dense/best.safetensors')
    calibrate(model, (tokens,), dict.fromkeys(gates(model), 0.5))       # TEAL at 2x, on tokens (B, T)

Begin at the end, with METHODS: the idea of each, its paper, where it breaks. Nearly every one is the layer of
cwic.py with thresholds that come from somewhere else:

    y = (centre + m * (x - centre)) @ W + b,    m = score > threshold

                    score of input i            centre   threshold
    TEAL, CATS      |x_i|                       0        a quantile; for CATS in the MLP only
    WINA            |x_i| * |W_i|               0        a quantile
    SCAP            |x_i - centre_i|            median   a quantile
    CWIC's form     |x_i - centre_i| * |W_i|    median   a quantile; |W_i| within each stripe of columns
    Q-Sparse        |x_i|                       0        the K-th largest of the token
    ProSparse       x_i, with its sign          0        0, which is ReLU; then a quantile
    pruning         its mean over all tokens    median   a quantile
    Deja Vu         a predictor's, of a unit    0        a quantile
    CWIC            |x_i - centre_i|            median   learned, for each stripe and input

Those that need more have a layer of their own, and those that train otherwise a kind of Method.

Not here: kernels. sparse_kernel.c skips inputs; for each method METHODS says what could skip its pattern.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

import cwic
import train
from cwic import CWICConfig, Neurons, StripedLinear, Thresholds

ONE = 10 ** 9           # columns to a stripe: all that the matrix has
LEAST = 0.02            # what skips keeps at least this share of its weights
RANK = 32               # of Deja Vu's predictors
LOW_RANK = 0.05         # R-Sparse: share of a matrix's weights in the path that takes what is skipped
NEVER = 1e30            # a threshold that no input exceeds
STRIPES = ('stripe_qkv', 'stripe_out', 'stripe_up', 'stripe_down', 'stripe_head')

# -----------------------------------------------------------------------------
# thresholds that are not learned


def gates(module):
    """{name: layer} of all that decides what to skip, in the order in which a token meets them."""
    return {name: gate for name, gate in module.named_modules() if isinstance(gate, (StripedLinear, Neurons))}


def uncompiled():
    """with uncompiled(): for what runs too rarely, or through hooks, for which all is compiled anew."""
    return torch.compiler.set_stance('force_eager')


@contextmanager
def hooked(functions):
    """with hooked([(module, function)]): function(module, args) before each forward()."""
    hooks = [module.register_forward_pre_hook(function, prepend=True) for module, function in functions]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def calibrate(module, inputs, shares, weighed=False, centred=False, static=False):
    """
    Sets the thresholds of a model or a block so that each gate uses a share of its weights for these inputs.
    One pass does: a gate is set when its input arrives, which those before it have thinned out already.
    shares: {name: share}, and gates that are not in it skip nothing. weighed, centred: as in the table above;
    static: each input's score is its mean. Returns module(*inputs).
    """
    def set_thresholds(share, gate, args):
        x, linear = args[0].float().flatten(0, 1), isinstance(gate, StripedLinear)
        centre = x.median(0).values if centred and linear else torch.zeros_like(gate.mu)
        score, norms = (x - centre).abs(), torch.ones_like(gate.mu)[None]               # (N, in), (1, in)
        if static:
            score = score.mean(0, keepdim=True)
        if weighed and linear:
            W = cwic.by_stripe(gate.adapter(gate.weight), gate.stripe)                  # (n, in, stripe)
            norms = W.norm(dim=2).clamp_min(1e-12)
        scores = score * norms[:, None]                                                 # (n, N, in)
        skipped, quantile = round((1 - share) * scores.numel()), -1.0
        if skipped:     # the largest score of these; kthvalue() would find it, but is slow on a GPU
            quantile = scores.flatten().topk(scores.numel() - skipped + 1, sorted=False).values.min()
        t = torch.where(scores[:, 0] > quantile, -1.0, NEVER) if static else quantile / norms
        gate.mu.copy_(centre)
        gate.sigma.fill_(1.0)
        gate.theta.copy_((t / gate.scale).expand_as(gate.theta))

    training, shares = module.training, {gate: shares.get(name, 1.0) for name, gate in gates(module).items()}
    with hooked([(gate, partial(set_thresholds, share)) for gate, share in shares.items()]):
        y = module.eval()(*inputs)
    module.train(training)
    return y


# -----------------------------------------------------------------------------
# layers that are more than thresholds


class Changed(StripedLinear):
    """A layer of a model, with its weights, that is to have another forward()."""

    def __init__(self, layer):
        super().__init__(layer.n_in, layer.n_out, layer.stripe, bias=False)
        self.weight, self.bias, self.adapter = layer.weight, layer.bias, layer.adapter
        self.to(layer.weight.device)


class Apart(Thresholds):
    """Llama's up and down as two layers that skip inputs. (CWIC and CATS skip neurons: one mask for both.)"""

    def __init__(self, neurons):
        n_embd, n_hidden = neurons.up.shape
        super().__init__(n_hidden, 1)
        self.n_weights = neurons.n_weights
        self.up = StripedLinear(n_embd, n_hidden, ONE, bias=False)
        self.down = StripedLinear(n_hidden, n_embd, ONE, bias=False)
        self.up.weight, self.up.adapter = neurons.up, neurons.adapter_up
        self.down.weight, self.down.adapter = neurons.down, neurons.adapter_down
        self.to(neurons.up.device)

    def forward(self, z, x, dense=False):
        h, active_up = self.up(x, dense)
        y, active_down = self.down(h * z, dense)
        return y, active_up + active_down


class LowRankRest(Changed):
    """What is skipped goes through the matrix's largest singular values: the same weights for every token."""

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


class TopK(Changed):
    """The largest inputs of each token, exactly so many, and gradients straight through."""
    share = 1.0

    def forward(self, x, dense=False):
        count = self.n_in if dense else max(round(self.share * self.n_in), 1)
        largest = torch.zeros_like(x).scatter_(-1, x.abs().topk(count, dim=-1, sorted=False).indices, 1.0)
        y, active = super().forward(x + (x * largest - x).detach(), dense=True)
        # train.py asks for the gradient of every count: here it is 0
        return y, torch.full_like(active, count * self.n_out) + 0 * x.sum(-1)


class Rectified(Changed):
    """ReLU on the way in, or as much of one as `amount` says."""
    amount = torch.tensor(0.0)      # for each number, torch would compile anew

    def forward(self, x, dense=False):
        x = x if dense else torch.where(x > 0, x, (1 - self.amount) * x)
        y, active = super().forward(x, dense)
        # where the count's own gradient sees what is next to a threshold, L1, in units of the mean, sees all
        l1 = self.n_out * (x.abs() / x.detach().abs().mean().clamp_min(1e-12)).sum(-1)
        return y, active.detach() + l1 - l1.detach()


class Unread(Changed):
    """Some columns are not computed: nothing reads them."""
    unread = 0

    def forward(self, x, dense=False):
        y, active = super().forward(x, dense)
        return y, active if dense else active * (1 - self.unread / self.n_out)


class Chosen(Changed):
    """Columns of qkv or up, or rows of out or down, for the heads or neurons that a Predictor has chosen."""
    mask = 1.0          # of rows: (B, T, in), 1.0 or 0.0; what columns make and no row reads need not be made
    share = 1.0         # (B, T), of the heads or neurons
    more = 0            # weights of the predictor, counted here

    def forward(self, x, dense=False):
        y, active = super().forward(x if dense else x * self.mask, dense=True)
        return y, active if dense else active * self.share + self.more


class Predictor(torch.nn.Module):
    """
    Scores heads and neurons by the residual stream at an earlier place, through two small matrices. pairs:
    [(layer whose columns make them, layer whose rows read them, how many)]
    """

    def __init__(self, n_embd, pairs):
        super().__init__()
        self.pairs, self.counts = pairs, [count for *_, count in pairs]     # tuples: layers are the model's
        self.A = torch.nn.Parameter(torch.randn(n_embd, RANK) / n_embd ** 0.5)              # (d, rank)
        self.B = torch.nn.Parameter(torch.zeros(RANK, sum(self.counts)))                    # (rank, units)
        self.least = [-NEVER] * len(pairs)      # scores above are chosen
        pairs[0][1].more = self.A.numel() + self.B.numel()

    def forward(self, x):
        """x (B, T, d) -> a list of scores (B, T, heads or neurons), one of each pair"""
        x = torch.nn.functional.layer_norm(x.to(self.A.dtype), x.shape[2:])
        return ((x @ self.A).relu() @ self.B).split(self.counts, dim=2)

    def choose(self, place, args):
        """Tells the layers, before this place's forward(args)."""
        for (columns, rows, count), scores, least in zip(self.pairs, self(args[0]), self.least):
            chosen = (scores > least).float()
            rows.mask = chosen.repeat_interleave(rows.n_in // count, dim=2)
            rows.share = columns.share = chosen.mean(2)


# -----------------------------------------------------------------------------
# methods: a dense model in, a model that skips out


class Cannot(Exception):
    """Why a method cannot be had at a target, or for a model."""


@dataclass
class Method:
    """
    start() makes a copy of the dense model, change() gives it other layers where the method has some, limit()
    sets what is skipped. In training, follow() has that keep up with the weights, and with the target, which
    rises from 1 to its final value; step() is one optimiser step.
    """
    weighed: bool = False       # these three: see calibrate()
    centred: bool = False
    static: bool = False
    kinds: tuple = ()           # of gates that skip; (): all
    apart: bool = True          # Llama's up and down skip inputs; else neurons
    stripe: int = ONE           # columns to a stripe; 0: as the recipe has it
    bases: bool = False         # head and attention output read principal components
    shortlist: bool = False     # the head computes the likeliest tokens' logits with every weight
    layer: type = StripedLinear     # what layers become
    trained: bool = False       # for the recipe's steps
    predicts: bool = False      # only what chooses is trained: at the targets of methods without training
    learned: bool = False       # the thresholds too; otherwise limit() sets them
    teacher: bool = True        # the dense model; else the text teaches
    dense: bool = False         # nothing is skipped
    gpt2_only: bool = False     # not written for Llama's blocks
    kernel: str = 'ours'        # what can skip this pattern in fact

    def skips(self, name):
        return not self.kinds or name.split('.')[-1] in self.kinds

    def skipping(self, model):
        """-> the weights of all that skips; what each token uses besides the model's weights"""
        skipping = sum(gate.n_weights for name, gate in gates(model).items() if self.skips(name))
        return skipping, LOW_RANK * model.n_weights() if self.layer is LowRankRest else 0

    def share(self, model, target):
        """What share of its weights all that skips must use, for 1 / target of the whole. Raises Cannot."""
        total, (skipping, more) = model.n_weights(), self.skipping(model)
        fixed = total - skipping + more
        if total / target < fixed + LEAST * skipping:
            raise Cannot(f'at most {total / (fixed + LEAST * skipping):.2f}x: every token uses '
                         f'{fixed / total:.0%} of the weights')
        return min((total / target - fixed) / skipping, 1.0)

    def check(self, model, saved, target):
        """Raises Cannot where this dense model cannot be brought to the target. saved: what its file says."""
        if self.gpt2_only and model.config.arch != 'gpt2':
            raise Cannot("written for GPT-2's blocks only")
        self.share(model, target)

    def start(self, model, saved, recipe, given):
        """-> train.Run of a copy of the dense model, and the recipe's data"""
        own = {'bases': self.bases, 'shortlist': self.shortlist,
               **(dict.fromkeys(STRIPES, self.stripe) if self.stripe else {})}
        recipe = recipe if self.teacher else replace(recipe, teacher=0.0)
        return train.begin(replace(recipe, **own), given | own.keys(), recipe.device)

    def change(self, model):
        for block in model.blocks if self.apart and model.config.arch == 'llama' else ():
            block.mlp.neurons = Apart(block.mlp.neurons)
        for module in list(model.modules()) if self.layer is not StripedLinear else ():
            for name, layer in list(module.named_children()):
                if isinstance(layer, StripedLinear) and self.skips(name):
                    setattr(module, name, self.layer(layer))

    def limit(self, model, target, tokens):
        """From now on the model uses 1 / target of its weights for tokens (B, T) of training text."""
        shares = dict.fromkeys(filter(self.skips, gates(model)), self.share(model, target))
        calibrate(model, (tokens,), shares, self.weighed, self.centred, self.static)

    def follow(self, model, target, final, tokens):
        self.limit(model, target, tokens)

    def step(self, run, tokens, targets, target):
        """tokens, targets (B, T): the batch."""
        train.train_step(run, tokens, targets, target if self.learned else 1.0, dense=self.dense)


class Greedy(Method):

    @torch.no_grad()
    def limit(self, model, target, tokens):
        share, inputs = self.share(model, target), {}
        with hooked([(block, lambda block, args: inputs.update({block: args})) for block in model.blocks]):
            model(tokens[:8], dense=True)
        shares = {'head': share}
        for i, block in enumerate(model.blocks):
            y, sizes = block(*inputs[block])[0], {name: gate.n_weights for name, gate in gates(block).items()}
            sparse, best = (*inputs[block][:-1], False), dict.fromkeys(sizes, 1.0)
            while (excess := sum(sizes[name] * (best[name] - share) for name in sizes)) >= 1:
                cut = min(0.05 * sum(sizes.values()), excess)
                trials = [{**best, name: max(best[name] - cut / sizes[name], LEAST)}
                          for name in sizes if best[name] > LEAST]
                best = min(trials, key=lambda trial: float((calibrate(block, sparse, trial)[0] - y).norm()))
            shares.update({f'blocks.{i}.{name}': best[name] for name in sizes})
        calibrate(model, (tokens,), shares)


class QSparse(Method):

    def limit(self, model, target, tokens):
        share = self.share(model, target)
        for layer in gates(model).values():
            layer.share = share

    def follow(self, model, target, final, tokens):
        self.limit(model, final, tokens)        # as in the paper; for each K, torch would compile anew


class ProSparse(Method):

    def follow(self, model, target, final, tokens):
        for layer in gates(model).values():
            layer.amount = torch.tensor((target - 1) / (final - 1) if final > 1 else 0.0)

    def limit(self, model, target, tokens):
        self.follow(model, target, target, tokens)
        super().limit(model, target, tokens)

    def step(self, run, tokens, targets, target):
        train.train_step(run, tokens, targets, target)      # L1's weight is the price of CWIC


class Pruning(Method):

    def share(self, model, target):
        # of values and neurons, columns that only pruned rows could read, share ** 2 is used and not share
        doubly = sum(block.attn.qkv.n_weights / 3 + block.mlp.up.n_weights for block in model.blocks)
        simply = model.n_weights() - doubly
        return ((simply ** 2 + 4 * doubly * model.n_weights() / target) ** 0.5 - simply) / (2 * doubly)

    def limit(self, model, target, tokens):
        pruned = float((model.head.theta > 0).float().mean())
        if not pruned or pruned < 1 - self.share(model, target) - 1 / model.head.n_in:      # else it stays
            super().limit(model, target, tokens)
        for block in model.blocks:
            block.attn.qkv.unread = int((block.attn.out.theta[0] > 0).sum())
            block.mlp.up.unread = int((block.mlp.down.theta[0] > 0).sum())


class DejaVu(Method):

    def places(self, model):
        """[(module before which a predictor reads, its pairs: see Predictor)]; here, a block early"""
        heads, neurons = model.config.n_head, model.config.n_hidden
        return [(model.blocks[max(i - 1, 0)], [(block.attn.qkv, block.attn.out, heads),
                                               (block.mlp.up, block.mlp.down, neurons)])
                for i, block in enumerate(model.blocks)]

    def importance(self, said, slopes):
        """What each unit says (B, T, units, width), and the loss's gradient for that -> (B, T, units)"""
        return said.norm(dim=3)

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

    def limit(self, model, target, tokens):
        share = self.share(model, target)

        def set_least(predictor, _, args):      # before it chooses, and of what earlier choices have left
            for i, scores in enumerate(predictor(args[0])):
                skipped = max(round((1 - share) * scores.numel()), 1)
                predictor.least[i] = float(scores.flatten().kthvalue(skipped).values)

        places = zip(self.places(model), model.predictors)
        with torch.no_grad(), hooked([(place, partial(set_least, p)) for (place, _), p in places]):
            model(tokens)

    def follow(self, model, target, final, tokens):
        pass                                # in training nothing is skipped

    def step(self, run, tokens, targets, target):
        """Predictors learn which units are among the most important of a token, as many as will be used."""
        model, places, read, said = run.model, self.places(run.model), {}, {}
        share, losses = self.share(model, run.config.target_reduction), []
        hooks = [(place, lambda place, args: read.update({place: args[0].detach()})) for place, _ in places]
        hooks += [(rows, lambda rows, args: said.update({rows: args[0].requires_grad_()}))
                  for _, pairs in places for _, rows, _ in pairs]
        with uncompiled(), run.autocast(), hooked(hooks):
            logits, _ = model(tokens, dense=True)
            loss = cwic.next_token_loss(logits.flatten(0, 1), targets.flatten())
        slopes = dict(zip(said, torch.autograd.grad(loss, list(said.values()))))
        for (place, pairs), predictor in zip(places, model.predictors):
            for (_, rows, count), scores in zip(pairs, predictor(read[place])):
                both = (x.detach().float().unflatten(2, (count, -1)) for x in (said[rows], slopes[rows]))
                most = self.importance(*both).topk(max(round(share * count), 1), dim=2).indices
                wanted = torch.zeros_like(scores).scatter_(2, most, 1.0)            # (B, T, count)
                losses.append(torch.nn.functional.binary_cross_entropy_with_logits(scores, wanted))
        run.optimizer.zero_grad()
        sum(losses).backward()
        run.optimizer.step()


class ShadowLLM(DejaVu):

    def places(self, model):
        pairs = [pair for _, pairs in super().places(model) for pair in pairs]
        return [(model.blocks[0].ln_2, pairs[1:])]      # after the first attention, which all tokens use

    def importance(self, said, slopes):
        return (said * slopes).sum(3).abs()


class SmallerDense(Method):

    def check(self, model, saved, target):
        if 'options' not in saved:
            raise Cannot('the text that this model was trained on is not at hand')

    def start(self, model, saved, recipe, given):
        """It sees all tokens that the others' weights have seen, the dense model's training included."""
        old, config = train.TrainConfig(**saved['options']), asdict(model.config)
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


TRAINED = {'trained': True}
LEARNED = {'trained': True, 'learned': True, 'apart': False}
PREDICTED = {'trained': True, 'predicts': True, 'kinds': ('qkv', 'out', 'up', 'down'), 'layer': Chosen,
             'gpt2_only': True, 'kernel': 'heads and neurons'}
METHODS = {
    'dense': Method(dense=True, kernel='any'),

    # without training

    # Small inputs add little: each matrix skips those below a quantile (Liu et al., 2024, arXiv 2408.14690).
    # Breaks from 2x on, as errors add up from layer to layer; and where inputs do not centre on 0.
    'TEAL': Method(),
    # TEAL's own allocation: in each block, cut 5% of it from the matrix where the block's output suffers
    # least, again and again. Breaks like TEAL: all blocks are given the same, and each looks at itself alone.
    'TEAL greedy': Greedy(),
    # Only neurons skip, by their activation (Lee et al., 2024, arXiv 2404.08763): a column of up and a row of
    # down, or without a gate only the row. Breaks where more than that is to be skipped.
    'CATS': Method(kinds=('neurons', 'down'), apart=False),
    # An input matters as much as the row of W that it meets (Chen et al., 2025, arXiv 2505.19427; thresholds
    # here, the K largest there, where W is made orthogonal too). Breaks where rows are alike: it is TEAL.
    'WINA': Method(weighed=True),
    # What counts is the distance from the usual value, whose product goes into the bias (Chua et al., 2024,
    # arXiv 2412.07174; the mode there, the median here). Breaks where the usual values are 0: it is TEAL.
    'SCAP': Method(centred=True),
    # TEAL, and a low-rank path for what it skips (Zhang et al., 2025, arXiv 2504.19449; a search divides the
    # compute there, the path has 5% here). Breaks where singular values fall slowly, as in small models.
    'R-Sparse': Method(layer=LowRankRest, kernel='ours, and two small products'),
    # All that CWIC has but learning. What CWIC gains over it, learning gains. Breaks as all of these do:
    # nobody asks what the loss needs.
    'CWIC form': Method(weighed=True, centred=True, stripe=0, apart=False),

    # trained as CWIC is: the same tokens, steps, teacher and learning rates

    # TEAL whose weights learn to live with it: thresholds follow, the quantile of what they see. No paper's,
    # but the fair rival. Breaks where matrices or tokens differ in what they need: they get the same share.
    'TEAL + distillation': Method(**TRAINED),
    # The K largest inputs of each token (Wang et al., 2024, arXiv 2407.10969, there also from scratch, with
    # ReLU^2). Breaks where tokens differ: an easy one costs as much as a hard one.
    'Q-Sparse': QSparse(**TRAINED, layer=TopK, kernel='ours, after a sort'),
    # ReLU after the norms and in the MLP (Mirzadeh et al., 2023, arXiv 2310.04564), L1 that rises, and in the
    # end higher thresholds (Song et al., 2024, arXiv 2402.13516); ReLU comes by degrees here. Breaks where
    # head and attention's output are large: they do not skip.
    'ProSparse': ProSparse(**TRAINED, kinds=('qkv', 'up', 'down'), layer=Rectified, gpt2_only=True),
    # Inputs that deviate least, times |W|, become a bias, for every token the same ones; what only they read
    # goes too (FLAP, An et al., 2023, arXiv 2312.11983; then distilled). Breaks where tokens need different
    # weights, which is why all others look at the token.
    'pruning': Pruning(**TRAINED, weighed=True, centred=True, static=True, layer=Unread, gpt2_only=True,
                       kernel='any'),
    # Predictors that read the stream one block early choose heads and neurons, those that will say most (Liu
    # et al., 2023, arXiv 2310.17157; keys and values of a head are made when a token asks for them, for all
    # tokens before it). Breaks without ReLU, as few neurons say nothing; and the model's head does not skip.
    'Deja Vu': DejaVu(**PREDICTED),
    # One predictor for all, after the first attention; what matters is |a * dL/da| (Akhauri et al., 2024,
    # arXiv 2406.16635). Breaks like Deja Vu, and where only later layers know what a token needs.
    'ShadowLLM': ShadowLLM(**PREDICTED),
    # Why not a dense model of that size? Breaks where its training cannot be had again.
    'smaller dense': SmallerDense(**TRAINED, dense=True, kernel='any'),
    # Learned thresholds, and one price for the active weights of the whole model. Breaks where steps are few:
    # a threshold moves by a twentieth of a sigma in each, at most.
    'CWIC': Method(**LEARNED, stripe=0)}
