"""
methods.py: every method with nothing skipped is the dense model, and counts are those of a plain loop.

Models are random and tiny: tested is what the methods compute, not how good they are.
"""

import numpy as np
import pytest
import torch

import evaluate
from lab import methods
import train
from lab.baselines import ALL_METHODS
from cwic import StripedLinear
from lab.methods import METHODS
from test_cwic import BOTH, one_thread, small_model     # noqa: F401  one_thread: a fixture, for all

RULES = [name for name, method in METHODS.items() if not (method.learned or method.is_dense or method.predicts)]
PREDICTS = [name for name, method in METHODS.items() if method.predicts]
SIZES = {'vocab_size': 257, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'n_hidden': 64,
         'stripe_qkv': 32, 'stripe_out': 16, 'stripe_up': 24, 'stripe_down': 16, 'stripe_head': 100}


def changed(name, arch='gpt2', target=1.0):
    """
    -> (a dense model, the same model made sparse by a method, 8 windows of random tokens); None if the method
    cannot be applied.
    """
    method, sizes = ALL_METHODS[name], {**SIZES, 'thresholds': 0.0}
    sizes.update({key: value for key, value in method.options.items() if key in methods.STRIPES})
    dense, model = small_model(arch, **sizes), small_model(arch, **sizes)
    if method.gpt2_only and arch == 'llama':
        pytest.raises(methods.Cannot, method.start, dense, {}, train.TrainConfig(), set())
        return None
    tokens = torch.randint(0, 257, (8, 16), generator=torch.Generator().manual_seed(3))
    method.change(model)
    if not (method.learned or method.is_dense):
        method.limit(model, target, tokens)
    return dense, model.eval().requires_grad_(False), tokens


@pytest.fixture
def inputs():
    """inputs(model, tokens) -> {layer's name: its masked input (N, in)}, in a pass over the tokens"""
    def record(model, tokens):
        found = {}
        hooks = [gate.register_forward_pre_hook(
            lambda gate, args, name=name: found.update({name: args[0].detach().flatten(0, 1).numpy()}))
            for name, gate in methods.sparse_layers_of(model).items()]
        model(tokens)
        for hook in hooks:
            hook.remove()
        return found
    return record


@BOTH
@pytest.mark.parametrize('name', ALL_METHODS)
def test_skipping_nothing_is_the_dense_model(name, arch):
    if made := changed(name, arch):
        dense, model, tokens = made
        if name == 'R-Sparse':      # at target 1 it skips a little, to pay for its low-rank path
            methods.calibrate(model, (tokens,), {})
        for predictor in getattr(model, 'predictors', ()):                      # as they cost something, too
            predictor.least = [-methods.NEVER] * 4
        expected, everything = dense(tokens, dense=True)
        logits, active = model(tokens)
        assert torch.allclose(logits, expected, atol=2e-4)
        besides = sum(part.A.numel() + part.B.numel() for part in model.modules()
                      if isinstance(part, (methods.LowRankRest, methods.Predictor)))
        more = float(active.sum() - everything.sum()) - besides * tokens.numel()
        # learned thresholds begin at 0, and an input that is exactly 0, such as GELU's, is not above that
        assert -1e-3 * float(everything.sum()) < more <= 0 if ALL_METHODS[name].learned else more == 0
        dense_logits, dense_active = model(tokens, dense=True)
        assert torch.allclose(dense_logits, expected, atol=2e-4) and torch.equal(dense_active, everything)


def weights_used(gate, x):
    """Weights that one token uses in a layer, x (in,): counted for one (stripe, input) pair after the other."""
    if isinstance(gate, methods.TopK):
        return max(round(gate.share * gate.n_in), 1) * gate.n_out
    if isinstance(gate, methods.Rectified):
        x = np.maximum(x, 0)
    t, mu = gate.thresholds().detach().numpy(), gate.mu.numpy()
    if not isinstance(gate, StripedLinear):
        return int((np.abs(x) > t[0]).sum()) * gate.n_weights // gate.n_in
    used = 0
    for column in range(gate.n_out):
        if column >= gate.n_out - getattr(gate, 'unread', 0):       # which columns does not matter for the count
            break
        used += int((np.abs(x - mu) > t[column // gate.stripe]).sum())
    return used + (gate.A.numel() + gate.B.numel() if isinstance(gate, methods.LowRankRest) else 0)


@BOTH
@pytest.mark.parametrize('name', RULES)
def test_reduction_equals_a_plain_count_and_meets_the_target(name, arch, inputs):
    target = 1.15 if name == 'CATS' else 1.8
    if made := changed(name, arch, target):
        _, model, tokens = made
        found, layers = inputs(model, tokens), methods.sparse_layers_of(model)
        counted = sum(weights_used(layer, x) for name, layer in layers.items() for x in found[name])
        windows = np.concatenate([tokens.numpy(), np.zeros((8, 1), np.int64)], axis=1)
        reduction = evaluate.measure(model, windows)['reduction']
        assert reduction == pytest.approx(model.n_weights() * tokens.numel() / counted, rel=1e-9)
        # ReLU may already skip more than its share
        assert reduction >= 1.75 if name == 'ProSparse' else reduction == pytest.approx(target, rel=0.03)


@BOTH
@pytest.mark.parametrize('share', [1.0, 0.5, 0.31])
def test_teals_thresholds_hit_their_quantile(arch, share, inputs):
    _, model, tokens = changed('TEAL', arch)
    methods.calibrate(model, (tokens,), dict.fromkeys(methods.sparse_layers_of(model), share))
    found, layers = inputs(model, tokens), methods.sparse_layers_of(model)
    for name, layer in layers.items():
        t = np.unique(layer.thresholds().detach().numpy())
        assert len(t) == 1 and (t > 0) == (share < 1)       # one for the matrix
        # earlier layers skip already, so inputs may be equal, and lie on the threshold
        assert np.mean(np.abs(found[name]) > t) == pytest.approx(share, abs=2 / found[name].size)


def test_pairs_with_the_largest_scores_are_kept(inputs):
    """WINA's, SCAP's and CWIC's form, with scores computed in numpy."""
    for name in ('WINA', 'SCAP', 'CWIC form'):
        _, model, tokens = changed(name, target=2.0)
        gate, found = model.blocks[0].attn.qkv, inputs(model, tokens)
        x, W = found['blocks.0.attn.qkv'], gate.weight.detach().numpy()
        centre = 0 if name == 'WINA' else np.sort(x, axis=0)[(len(x) - 1) // 2]
        stripes = [W[:, i:i + gate.stripe] for i in range(0, gate.n_out, gate.stripe)]
        assert len(stripes) == (3 if name == 'CWIC form' else 1)
        norms = [1 if name == 'SCAP' else np.sqrt((stripe ** 2).sum(1)) for stripe in stripes]
        scores = np.stack([np.abs(x - centre) * norm for norm in norms])            # (n, N, in)
        kept = scores > np.sort(scores, axis=None)[scores.size // 2 - 1]
        mask = np.abs(x - gate.mu.numpy()) > gate.thresholds().detach().numpy()[:, None]
        assert np.mean(mask != kept) < 2e-4 and mask.mean() == pytest.approx(0.5, abs=1e-3)


def test_top_k_keeps_k_inputs_even_if_some_are_equal():
    layer = methods.TopK(StripedLinear(10, 6, 6, bias=True))
    layer.share = 0.4
    x = torch.tensor([[[0., 0, 0, 0, 0, 0, 0, 0, 0, 0], [1., -1, 1, -1, 1, 1, 1, 1, 1, 1],
                       [0.1, -9, 0.2, 8, 0.3, 0, 7, 0.1, -6, 0.4]]], requires_grad=True)
    y, active = layer(x)
    assert active.tolist() == [[24, 24, 24]]
    kept = torch.tensor([0., -9, 0, 8, 0, 0, 7, 0, -6, 0])
    assert torch.allclose(y[0, 2], kept @ layer.weight + layer.bias, atol=1e-5)
    # of equal inputs K go through, and the gradient of every input
    layer.weight.data.fill_(1.0)
    assert sorted(layer(x.detach().abs())[0][0, 1].tolist()) == [4.0] * 6
    layer(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 6.0))


def test_low_rank_path_takes_exactly_what_is_skipped():
    torch.manual_seed(0)
    layer = StripedLinear(24, 40, 40, bias=False).eval()
    sparse = methods.LowRankRest(layer).eval()
    sparse.sigma.fill_(1.0)
    sparse.theta.data.fill_(0.8 / sparse.scale)
    x, W = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32), layer.weight.detach().numpy()
    U, S, V = np.linalg.svd(W, full_matrices=False)
    rank = int(0.05 * 24 * 40 / 64)
    assert sparse.A.shape == (24, 0) if rank == 0 else (24, rank)
    kept = np.where(np.abs(x) > 0.8, x, 0)
    y, active = sparse(torch.from_numpy(x)[None])
    expected = kept @ W + (x - kept) @ (U[:, :rank] * S[:rank]) @ V[:rank]
    np.testing.assert_allclose(y[0].detach(), expected, atol=1e-4)
    assert active[0].tolist() == [int((row != 0).sum()) * 40 + rank * 64 for row in kept]


def test_pruned_columns_are_never_read():
    """
    Work was once counted as skipped but still done. So: the values of columns that only pruned rows would read
    change nothing, and all tokens have the same pattern.
    """
    _, model, tokens = changed('pruning', target=2.5)
    before, active = model(tokens)
    assert float(active.std((1, 2)).max()) == 0
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        dead_values, dead_neurons = attn.out.theta[0] > 0, mlp.down.theta[0] > 0
        assert attn.qkv.unread == dead_values.sum() > 0 and mlp.up.unread == dead_neurons.sum() > 0
        attn.qkv.weight.data[:, 64:][:, dead_values] = 9.0
        mlp.up.weight.data[:, dead_neurons] = -9.0
    assert torch.equal(model(tokens)[0], before)


def test_pruned_inputs_stay_pruned_until_the_target_rises():
    _, model, tokens = changed('pruning', target=2.0)
    masks = [gate.theta.clone() for gate in methods.sparse_layers_of(model).values()]
    for gate in methods.sparse_layers_of(model).values():
        gate.weight.data.copy_(torch.randn_like(gate.weight))
    METHODS['pruning'].limit(model, 2.0, tokens)
    assert all(torch.equal(gate.theta, mask) for gate, mask in zip(methods.sparse_layers_of(model).values(), masks))
    METHODS['pruning'].limit(model, 3.0, tokens)
    assert not any(torch.equal(gate.theta, mask) for gate, mask in zip(methods.sparse_layers_of(model).values(), masks))


@BOTH
def test_greedy_lowers_the_error_of_a_block_at_the_same_compute(arch, inputs):
    _, uniform, tokens = changed('TEAL', arch, target=2.0)
    dense, greedy, _ = changed('TEAL greedy', arch, target=2.0)
    errors, shares = [], []
    for model in (uniform, greedy):
        caught = {}
        hook = model.blocks[0].register_forward_pre_hook(lambda block, args: caught.update(args=args))
        model(tokens)
        hook.remove()
        *args, _ = caught['args']
        y, active = model.blocks[0](*args, False)
        errors.append(float((y - model.blocks[0](*args, True)[0]).norm()))
        shares.append([float(count.mean()) for count in active])
    assert errors[1] < errors[0] and sum(shares[0]) == pytest.approx(sum(shares[1]), rel=0.01)
    assert max(abs(a - b) for a, b in zip(*shares)) > 100


def test_relu_comes_by_degrees():
    model = small_model(thresholds=0.0, **SIZES).requires_grad_(False)
    METHODS['ProSparse'].change(model)
    layer, x = model.blocks[0].mlp.up, torch.tensor([[[-2.0] * 16 + [3.0] * 16]])
    for target, slope in ((1.0, 1.0), (1.5, 0.5), (2.0, 0.0)):
        METHODS['ProSparse'].follow(model, target, 2.0, None)
        expected = torch.where(x < 0, slope * x, x) @ layer.weight + layer.bias
        y, active = layer(x)
        assert torch.allclose(y, expected, atol=1e-5) and active.item() == (16 if slope == 0 else 32) * 64
    assert all(not isinstance(gate, methods.Rectified) for gate in (model.head, model.blocks[0].attn.out))


@pytest.mark.parametrize('name', PREDICTS)
def test_chosen_heads_and_neurons_are_all_that_is_used_and_counted(name, monkeypatch):
    """
    Against scores computed in numpy from the stream that each predictor reads, the dense model with unchosen
    units set to 0, and a count of heads and neurons one by one, predictors included.
    """
    monkeypatch.setattr(methods, 'RANK', 4)
    dense, model, tokens = changed(name, target=1.5)
    for predictor in model.predictors:      # untrained ones give all units the same score
        torch.nn.init.normal_(predictor.B)
    METHODS[name].limit(model, 1.5, tokens)
    streams, masks = {}, {}
    place = model.blocks[0].ln_2 if name == 'ShadowLLM' else model.blocks[0]    # for both of the two blocks
    place.register_forward_pre_hook(lambda _, args: streams.update(x=args[0].detach().double().numpy()))
    logits, active = model(tokens)
    x = streams['x']
    x = (x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + 1e-5)
    where = [(block, part) for block in range(2) for part in ('heads', 'neurons')]
    where = where[1:] if name == 'ShadowLLM' else where
    for predictor in model.predictors:
        A, B = predictor.A.detach().double().numpy(), predictor.B.detach().double().numpy()
        scores, column = np.maximum(x @ A, 0) @ B, 0                            # (8, 16, units)
        for least in predictor.least:
            block, part = where.pop(0)
            units = 2 if part == 'heads' else 64
            masks[block, part] = scores[:, :, column:column + units] > least + 1e-6     # one equals it
            column += units
        assert column == B.shape[1]
    assert not where
    used = sum(predictor.A.numel() + predictor.B.numel() for predictor in model.predictors) * 128
    used += 128 * 32 * 257
    for block in range(2):
        heads = masks.get((block, 'heads'), np.ones((8, 16, 2), bool))
        used += int(heads.sum()) * 4 * 32 * 16 + int(masks[block, 'neurons'].sum()) * 2 * 32
        for layer, mask in ((dense.blocks[block].attn.out, heads.repeat(16, axis=2)),
                            (dense.blocks[block].mlp.down, masks[block, 'neurons'])):
            layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * torch.from_numpy(mask), args[1]))
    assert float(active.sum()) == pytest.approx(used, rel=1e-9)
    assert torch.allclose(logits, dense(tokens, dense=True)[0], atol=2e-4)
    assert used == pytest.approx(dense.n_weights() * 128 / 1.5, rel=0.03)


def training_run(model, target):
    config = train.TrainConfig(target_reduction=target)
    optimizer = torch.optim.AdamW(model.predictors.requires_grad_(True).parameters(), lr=0.01)
    return train.Run(config, model, {}, optimizer, 'cpu', torch.float32, torch.zeros(9))


@pytest.mark.parametrize('name', PREDICTS)
def test_predictors_learn_what_matters_most(name, monkeypatch):
    monkeypatch.setattr(methods, 'RANK', 16)
    dense, model, tokens = changed(name, target=1.4)
    weights_before = {name: p.clone() for name, p in model.named_parameters() if 'predictor' not in name}
    seen, importance = [], type(METHODS[name]).importance
    monkeypatch.setattr(type(METHODS[name]), 'importance', lambda self, *args: seen.append(importance(self, *args)) or seen[-1])
    run, share = training_run(model, 1.4), METHODS[name].share(model, 1.4)

    def hits():
        """Share of the last MLP's most important neurons that also have the highest scores."""
        seen.clear()
        METHODS[name].step(run, tokens, tokens.roll(-1, 1), 1.4)
        reads = {}
        place = METHODS[name].places(model)[-1][0]
        hook = place.register_forward_pre_hook(lambda _, args: reads.update(x=args[0]))
        model(tokens, dense=True)
        hook.remove()
        scores, count = model.predictors[-1](reads['x'])[-1], round(share * 64)
        top = [x.topk(count, dim=2).indices.flatten(0, 1).tolist() for x in (scores, seen[-1])]
        return np.mean([len(set(a) & set(b)) / count for a, b in zip(*top)])

    before = hits()
    for _ in range(250):
        METHODS[name].step(run, tokens, tokens.roll(-1, 1), 1.4)
    assert 1 - hits() < 0.7 * (1 - before) and 1 - hits() < 0.7 * (1 - share)
    assert all(torch.equal(p, weights_before[key]) for key, p in model.named_parameters() if 'predictor' not in key)


def test_shadowllms_importance_is_a_times_its_gradient(monkeypatch):
    """By finite differences of the loss, with one unit's output scaled at one token."""
    _, model, tokens = changed('ShadowLLM', target=1.2)
    seen, targets = [], tokens.roll(-1, 1)
    importance = methods.ShadowLLM.importance
    monkeypatch.setattr(methods.ShadowLLM, 'importance', lambda self, *args: seen.append(importance(self, *args)) or seen[-1])
    METHODS['ShadowLLM'].step(training_run(model, 1.2), tokens, targets, 1.2)
    assert [x.shape for x in seen] == [(8, 16, 64), (8, 16, 2), (8, 16, 64)]
    model.double()

    def loss(layer, some, factor):
        def scale(_, args):
            x = args[0].clone()
            x[2, 5, some] *= factor
            return x, args[1]
        hook = layer.register_forward_pre_hook(scale)
        value = torch.nn.functional.cross_entropy(model(tokens, dense=True)[0].double().flatten(0, 1), targets.flatten())
        hook.remove()
        return float(value)

    for found, layer, some in ((seen[0][2, 5, 9], model.blocks[0].mlp.down, slice(9, 10)),
                               (seen[1][2, 5, 1], model.blocks[1].attn.out, slice(16, 32)),
                               (seen[2][2, 5, 30], model.blocks[1].mlp.down, slice(30, 31))):
        slope = (loss(layer, some, 1.03) - loss(layer, some, 0.97)) / 0.06
        assert float(found) == pytest.approx(abs(slope), rel=0.02, abs=2e-6)


def test_a_target_out_of_reach_is_refused_with_the_reason():
    dense, recipe = small_model(thresholds=0.0, **SIZES), train.TrainConfig(target_reduction=2.0)
    never = sum(layer.n_weights for name, layer in dense.sparse_layers() if not name.endswith('down')) / dense.n_weights()
    with pytest.raises(methods.Cannot, match=f'at most 1.*x: every token uses {never:.0%}'):
        METHODS['CATS'].start(dense, {}, recipe, set())
    for options, reason in (({}, '.* is missing'), ({**vars(recipe), 'lr': 'x'}, 'lr must be a number')):
        with pytest.raises(methods.Cannot, match=f'cannot be repeated: {reason}'):
            METHODS['smaller dense'].start(dense, {'options': options}, recipe, set())
