"""
baselines.py: every method at "skip nothing" and against counts made without it; and what a comparison leaves.

Models are random and tiny, see test_cwic: what is tested is what methods compute, not how good they are.
"""

import json
import signal
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import baselines
import cwic
import evaluate
import train
import weights
from baselines import METHODS
from cwic import StripedLinear
from data import common
from test_cwic import BOTH, one_thread, small_model     # noqa: F401  one_thread: a fixture, for all

RULES = [name for name, method in METHODS.items() if not (method.learned or method.dense or method.predicts)]
PREDICTS = [name for name, method in METHODS.items() if method.predicts]
SIZES = {'vocab_size': 257, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'n_hidden': 64,
         'stripe_qkv': 32, 'stripe_out': 16, 'stripe_up': 24, 'stripe_down': 16, 'stripe_head': 100}


def changed(name, arch='gpt2', target=1.0):
    """
    (a dense model, what a method makes of it for a target, 8 windows of random tokens); None where the method
    says that it cannot.
    """
    method, sizes = METHODS[name], {**SIZES, 'thresholds': 0.0}
    sizes.update(dict.fromkeys(baselines.STRIPES, method.stripe) if method.stripe else {})
    dense, model = small_model(arch, **sizes), small_model(arch, **sizes)
    if method.gpt2_only and arch == 'llama':
        pytest.raises(baselines.Cannot, method.check, dense, {}, target)
        return None
    tokens = torch.randint(0, 257, (8, 16), generator=torch.Generator().manual_seed(3))
    method.change(model)
    if not (method.learned or method.dense):
        method.limit(model, target, tokens)
    return dense, model.eval().requires_grad_(False), tokens


@pytest.fixture
def inputs():
    """inputs(model, tokens) -> {gate's name: what is gated there (N, in)}, in a pass over the tokens"""
    def record(model, tokens):
        found = {}
        hooks = [gate.register_forward_pre_hook(
            lambda gate, args, name=name: found.update({name: args[-2].detach().flatten(0, 1).numpy()}))
            for name, gate in baselines.gates(model).items()]
        model(tokens)
        for hook in hooks:
            hook.remove()
        return found
    return record


# -----------------------------------------------------------------------------
# each method


@BOTH
@pytest.mark.parametrize('name', METHODS)
def test_skipping_nothing_is_the_dense_model(name, arch):
    if made := changed(name, arch):
        dense, model, tokens = made
        if name == 'R-Sparse':      # to which target 1 leaves less than all, as its low-rank path costs something
            baselines.calibrate(model, (tokens,), {})
        for predictor in getattr(model, 'predictors', ()):                      # which cost something as well
            predictor.least = [-baselines.NEVER] * 4
        expected, everything = dense(tokens, dense=True)
        logits, active = model(tokens)
        assert torch.allclose(logits, expected, atol=2e-4)
        besides = sum(part.A.numel() + part.B.numel() for part in model.modules()
                      if isinstance(part, (baselines.LowRankRest, baselines.Predictor)))
        more = float(active.sum() - everything.sum()) - besides * tokens.numel()
        # learned thresholds begin at 0, and what is exactly 0, where GELU gives up, is not above it
        assert -1e-3 * float(everything.sum()) < more <= 0 if METHODS[name].learned else more == 0
        dense_logits, dense_active = model(tokens, dense=True)
        assert torch.allclose(dense_logits, expected, atol=2e-4) and torch.equal(dense_active, everything)


def weights_used(gate, x):
    """Weights that one token uses in a gate, x (in,): counted one (stripe, input) pair after the other."""
    if isinstance(gate, baselines.TopK):
        return max(round(gate.share * gate.n_in), 1) * gate.n_out
    if isinstance(gate, baselines.Rectified):
        x = np.maximum(x, 0)
    t, mu = gate.thresholds().detach().numpy(), gate.mu.numpy()
    if not isinstance(gate, StripedLinear):
        return int((np.abs(x) > t[0]).sum()) * gate.dense // gate.n_in
    used = 0
    for column in range(gate.n_out):
        if column >= gate.n_out - getattr(gate, 'unread', 0):       # which ones makes no difference to the count
            break
        used += int((np.abs(x - mu) > t[column // gate.stripe]).sum())
    return used + (gate.A.numel() + gate.B.numel() if isinstance(gate, baselines.LowRankRest) else 0)


@BOTH
@pytest.mark.parametrize('name', RULES)
def test_reduction_is_what_a_plain_count_gives_and_meets_the_target(name, arch, inputs):
    target = 1.15 if name == 'CATS' else 1.8
    if made := changed(name, arch, target):
        _, model, tokens = made
        found, gates = inputs(model, tokens), baselines.gates(model)
        counted = sum(weights_used(gate, x) for name, gate in gates.items() for x in found[name])
        windows = np.concatenate([tokens.numpy(), np.zeros((8, 1), np.int64)], axis=1)
        reduction = evaluate.measure(model, windows)['reduction']
        assert reduction == pytest.approx(model.dense() * tokens.numel() / counted, rel=1e-9)
        # ReLU may already skip more than its share
        assert reduction >= 1.75 if name == 'ProSparse' else reduction == pytest.approx(target, rel=0.03)


@BOTH
@pytest.mark.parametrize('share', [1.0, 0.5, 0.31])
def test_teals_thresholds_hit_their_quantile(arch, share, inputs):
    _, model, tokens = changed('TEAL', arch)
    baselines.calibrate(model, (tokens,), dict.fromkeys(baselines.gates(model), share))
    found, gates = inputs(model, tokens), baselines.gates(model)
    for name, gate in gates.items():
        t = np.unique(gate.thresholds().detach().numpy())
        assert len(t) == 1 and (t > 0) == (share < 1)       # one for the matrix
        # of inputs that others have thinned out already: equal ones may lie on the threshold
        assert np.mean(np.abs(found[name]) > t) == pytest.approx(share, abs=2 / found[name].size)


def test_scores(inputs):
    """WINA's, SCAP's and CWIC's form keep the pairs whose score is largest, as numpy finds them."""
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


def test_top_k_keeps_k_whatever_is_equal():
    layer = baselines.TopK(StripedLinear(10, 6, 6, bias=True))
    layer.share = 0.4
    x = torch.tensor([[[0., 0, 0, 0, 0, 0, 0, 0, 0, 0], [1., -1, 1, -1, 1, 1, 1, 1, 1, 1],
                       [0.1, -9, 0.2, 8, 0.3, 0, 7, 0.1, -6, 0.4]]], requires_grad=True)
    y, active = layer(x)
    assert active.tolist() == [[24, 24, 24]]
    kept = torch.tensor([0., -9, 0, 8, 0, 0, 7, 0, -6, 0])
    assert torch.allclose(y[0, 2], kept @ layer.weight + layer.bias, atol=1e-5)
    # as many ones go through where all are equal, and gradients go through everywhere
    layer.weight.data.fill_(1.0)
    assert sorted(layer(x.detach().abs())[0][0, 1].tolist()) == [4.0] * 6
    layer(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 6.0))


def test_low_rank_path_takes_exactly_what_is_skipped():
    torch.manual_seed(0)
    layer = StripedLinear(24, 40, 40, bias=False).eval()
    sparse = baselines.LowRankRest(layer).eval()
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
    Work once counted as skipped was still done. Here: whatever stands in pruned rows, and in columns that
    only pruned rows would read, changes nothing but what is constant, and no token has its own pattern.
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


def test_what_is_pruned_stays_pruned():
    _, model, tokens = changed('pruning', target=2.0)
    masks = [gate.theta.clone() for gate in baselines.gates(model).values()]
    for gate in baselines.gates(model).values():
        gate.weight.data.copy_(torch.randn_like(gate.weight))
    METHODS['pruning'].limit(model, 2.0, tokens)
    assert all(torch.equal(gate.theta, mask) for gate, mask in zip(baselines.gates(model).values(), masks))
    METHODS['pruning'].limit(model, 3.0, tokens)
    assert not any(torch.equal(gate.theta, mask) for gate, mask in zip(baselines.gates(model).values(), masks))


@BOTH
def test_greedy_moves_compute_within_a_block_to_where_its_output_suffers_less(arch, inputs):
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
    assert all(not isinstance(gate, baselines.Rectified) for gate in (model.head, model.blocks[0].attn.out))


def test_own_targets_charge_each_matrix_the_slope_of_its_own_loss(monkeypatch):
    _, model, _ = changed('CWIC: own targets')
    total, target, paid = model.dense(), 3.0, {}
    run = train.Run(None, model, {}, None, 'cpu', torch.float32,
                    torch.tensor([layer.dense * (0.3 + 0.05 * i) for i, (_, layer) in enumerate(model.gated())]))
    monkeypatch.setattr(train, 'train_step', lambda run, tokens, targets, target:
                        paid.update(price=cwic.price(run.active.sum(), total, target)))
    METHODS['CWIC: own targets'].step(run, None, None, target)
    for active, (_, layer) in zip(run.active.tolist(), model.gated()):
        def loss(active):
            return layer.dense / total * max(target - layer.dense / active, 0) ** 2
        slope = (loss(active + 0.01) - loss(active - 0.01)) / 0.02
        assert layer.push * paid['price'] == pytest.approx(slope, rel=1e-3, abs=1e-9)
        x = torch.randn(1, 3, layer.n_in, requires_grad=True)
        layer.sigma.fill_(1.0), layer.theta.fill_(0.5 / layer.scale).requires_grad_(True)
        layer(x)[1][0].sum().backward()
        own, layer.theta.grad, push = layer.theta.grad, None, layer.push
        layer.push = 1.0
        layer(x)[1][0].sum().backward()
        assert torch.allclose(own, push * layer.theta.grad, atol=1e-3)


@pytest.mark.parametrize('name', PREDICTS)
def test_chosen_heads_and_neurons_are_all_that_is_used_and_counted(name, monkeypatch):
    """
    Scores again, in numpy, from the stream where each predictor reads; then the dense model with what is not
    chosen set to 0, and a count of heads and neurons one by one, predictors included.
    """
    monkeypatch.setattr(baselines, 'RANK', 4)
    dense, model, tokens = changed(name, target=1.5)
    for predictor in model.predictors:      # those that have learned nothing find all alike
        torch.nn.init.normal_(predictor.B)
    METHODS[name].limit(model, 1.5, tokens)
    streams, masks = {}, {}
    place = model.blocks[0].ln_2 if name == 'ShadowLLM' else model.blocks[0]    # where two blocks are all
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
            masks[block, part] = scores[:, :, column:column + units] > least + 1e-6     # one is least
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
    assert used == pytest.approx(dense.dense() * 128 / 1.5, rel=0.03)


def training_run(model, target):
    config = train.TrainConfig(target_reduction=target)
    optimizer = torch.optim.AdamW(model.predictors.requires_grad_(True).parameters(), lr=0.01)
    return train.Run(config, model, {}, optimizer, 'cpu', torch.float32, torch.zeros(9))


@pytest.mark.parametrize('name', PREDICTS)
def test_predictors_learn_what_matters_most(name, monkeypatch):
    monkeypatch.setattr(baselines, 'RANK', 16)
    dense, model, tokens = changed(name, target=1.4)
    weights_before = {name: p.clone() for name, p in model.named_parameters() if 'predictor' not in name}
    seen, importance = [], type(METHODS[name]).importance
    monkeypatch.setattr(type(METHODS[name]), 'importance', lambda self, *args: seen.append(importance(self, *args)) or seen[-1])
    run, share = training_run(model, 1.4), METHODS[name].share(model, 1.4)

    def hits():
        """Of the neurons that a token needs most in the last MLP, what share is scored highest?"""
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
    """By finite differences: how the loss changes with how loud a neuron is, at one token."""
    _, model, tokens = changed('ShadowLLM', target=1.2)
    seen, targets = [], tokens.roll(-1, 1)
    importance = baselines.ShadowLLM.importance
    monkeypatch.setattr(baselines.ShadowLLM, 'importance', lambda self, *args: seen.append(importance(self, *args)) or seen[-1])
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


def test_what_cannot_be_reached_says_so():
    dense = small_model(thresholds=0.0, **SIZES)
    never = sum(layer.dense for name, layer in dense.gated() if not name.endswith('down')) / dense.dense()
    with pytest.raises(baselines.Cannot, match=f'at most 1.*x: every token uses {never:.0%}'):
        METHODS['CATS'].check(dense, {}, 2.0)
    with pytest.raises(baselines.Cannot, match='not at hand'):
        METHODS['smaller dense'].check(dense, {}, 2.0)


# -----------------------------------------------------------------------------
# a comparison


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
    """
    A folder with a dense checkpoint, a recipe, and data: training text of bytes below 128, validation text of
    the others.
    """
    folder = tmp_path_factory.mktemp('comparison')
    random = np.random.default_rng(0)
    meta = {'tokenizer': {'kind': 'bytes'}, 'vocab_size': 257, 'source': 'a test'}
    for split, least in (('train', 0), ('val', 128)):
        random.integers(least, least + 128, 3000).astype(np.uint16).tofile(folder / f'{split}.bin')
        meta.update({f'{split}_tokens': 3000, f'{split}_bytes': 3000})
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    options = train.TrainConfig(**{**SIZES_OF_RUN, 'dense_steps': 3, 'ramp_steps': 1, 'hold_steps': 1})
    cwic.save_checkpoint(folder / 'dense.pt', small_model(thresholds=0.0, **SIZES), tokenizer={'kind': 'bytes'},
                         options=asdict(options), val_loss=5.0)
    (folder / 'recipe.toml').write_text(
        f'data = {str(folder)!r}\nramp_steps = 3\nhold_steps = 9\nblock_size = 16\nbatch_size = 4\n'
        'lr = 1e-3\ndtype = "float32"\n', encoding='utf-8')
    return folder


SIZES_OF_RUN = {**{name: value for name, value in SIZES.items() if name != 'vocab_size'},
                'batch_size': 4, 'device': 'cpu', 'dtype': 'float32'}


def compare(setting, out, *more):
    """The program, in this process; returns the rows that it leaves, but for what time they took."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ['baselines.py', 'compare', '--subject', str(setting / 'dense.pt'), '--out', str(out),
                '--recipe', str(setting / 'recipe.toml'), '--picture', str(out) + '.png', '--device', 'cpu',
                '--windows', '4', *more]
    try:
        common.run(baselines.main)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)
    with open(out / 'rows.jsonl', encoding='utf-8') as f:
        return [{key: value for key, value in json.loads(line).items() if key != 'seconds'} for line in f]


def test_quick_comparison_of_all_methods(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baselines, 'RANK', 2)
    rows = compare(setting, tmp_path / 'out', '--quick')
    assert [r['method'] for r in rows if 'cannot' in r] == ['CATS', 'ShadowLLM']
    rows = {r['method']: r for r in rows if 'cannot' not in r}
    assert rows.keys() == METHODS.keys() - {'CATS', 'ShadowLLM'}
    for name, r in rows.items():
        assert r.keys() >= {'subject', 'method', 'target', 'reduction', 'val_loss', 'kl', 'agreement', 'blimp',
                            'cv', 'seed', 'trained_tokens'}
        assert r['trained_tokens'] == (2 * 4 * 16 if METHODS[name].trained else 0)
        assert np.isfinite([r['reduction'], r['val_loss'], r['kl'], r['cv']]).all()
    assert rows['dense']['kl'] == pytest.approx(0, abs=1e-6) and rows['dense']['reduction'] == 1
    assert rows['TEAL']['kl'] > 1e-3 and rows['Q-Sparse']['cv'] == rows['pruning']['cv'] == 0
    assert rows['TEAL + distillation']['val_loss'] != rows['TEAL']['val_loss']
    out = capsys.readouterr().out
    table = (tmp_path / 'out' / 'table.md').read_text(encoding='utf-8')
    assert table in out and '20/20' in out and ' left' in out
    assert f'| Q-Sparse | 2x | {rows["Q-Sparse"]["reduction"]:.2f} | {rows["Q-Sparse"]["kl"]:.4f} |' in table
    assert '| CATS | 2x | cannot: at most' in table
    assert (tmp_path / 'out.png').read_bytes().startswith(b'\x89PNG')


def test_a_smaller_model_is_counted_against_the_dense_one(setting, tmp_path, monkeypatch):
    """Its own reduction is 1: every weight that it has is used."""
    models, measure = [], evaluate.measure
    monkeypatch.setattr(evaluate, 'measure', lambda model, *args: models.append(model) or measure(model, *args))
    row, = compare(setting, tmp_path / 'out', '--methods', 'smaller dense', '--trained_targets', '2', '--seeds', '1')
    small, dense = (sum(layer.dense for _, layer in model.gated())
                    for model in (models[-1], weights.load(str(setting / 'dense.pt'))[0]))
    assert row['reduction'] == pytest.approx(dense / small) and row['reduction'] >= 2
    assert row['trained_tokens'] == (5 + 12) * 4 * 16       # the dense model's steps, and the recipe's


def test_thresholds_are_set_on_other_text_than_results_are_for(setting, tmp_path, monkeypatch):
    """Thresholds calibrated on the text they are evaluated on look better than they are."""
    seen = {'calibrate': set(), 'measure': set()}
    calibrate, measure = baselines.calibrate, evaluate.measure

    def spied_calibrate(module, inputs, *more):
        if isinstance(module, cwic.GPT):
            seen['calibrate'].update(inputs[0].unique().tolist())
        return calibrate(module, inputs, *more)

    def spied_measure(model, tokens, *more):
        seen['measure'].update(np.unique(tokens).tolist())
        return measure(model, tokens, *more)
    monkeypatch.setattr(baselines, 'calibrate', spied_calibrate)
    monkeypatch.setattr(evaluate, 'measure', spied_measure)
    monkeypatch.setattr(baselines, 'RANK', 2)
    for spied in ('limit', 'step'):
        method = getattr(baselines.DejaVu, spied)
        monkeypatch.setattr(baselines.DejaVu, spied, lambda self, what, *more, method=method: seen['calibrate'].update(
            torch.cat([x.flatten() for x in more if isinstance(x, torch.Tensor)]).tolist()) or method(self, what, *more))
    compare(setting, tmp_path / 'out', '--quick', '--methods', 'TEAL,SCAP,TEAL + distillation,pruning,Deja Vu')
    assert seen['calibrate'] and max(seen['calibrate']) < 128 <= min(seen['measure'])


def test_a_llama_and_an_adapter(setting, tmp_path):
    """As the chat model is compared: matrices frozen, a low-rank change of each learned."""
    dense = small_model('llama', thresholds=0.0, **SIZES)
    cwic.save_checkpoint(tmp_path / 'llama.pt', dense, tokenizer={'kind': 'bytes'})
    recipe = (setting / 'recipe.toml').read_text(encoding='utf-8') + 'rank = 2\n'
    (tmp_path / 'rank.toml').write_text(recipe, encoding='utf-8')
    rows = compare(setting, tmp_path / 'out', '--quick', '--subject', str(tmp_path / 'llama.pt'),
                   '--recipe', str(tmp_path / 'rank.toml'), '--targets', '1.3')
    reasons = {r['method']: r['cannot'] for r in rows if 'cannot' in r}
    assert reasons.keys() == {name for name, method in METHODS.items() if method.gpt2_only} | {'smaller dense'}
    done = {r['method']: r for r in rows if 'cannot' not in r}
    assert done.keys() == METHODS.keys() - reasons.keys() and done['dense']['kl'] == pytest.approx(0, abs=1e-6)
    for name in ('TEAL', 'CATS', 'WINA', 'R-Sparse'):
        assert done[name]['reduction'] == pytest.approx(1.3, rel=0.1) and done[name]['kl'] > 1e-4


@pytest.mark.parametrize('name', ['TEAL + distillation', 'pruning'])
def test_training_moves_weights_and_leaves_thresholds_to_the_method(name, setting, tmp_path, monkeypatch):
    """A step of train.py lifts thresholds to their floor and follows the statistics of its batch."""
    followed, steps, train_step, follow = {}, [], train.train_step, type(METHODS[name]).follow

    def spied_follow(self, model, *more):
        follow(self, model, *more)
        followed.update({name: x.clone() for name, x in model.state_dict().items() if 'theta' in name or '.mu' in name})

    def spied_step(run, *more, **options):
        state = run.model.state_dict()
        assert all(torch.equal(state[name], x) for name, x in followed.items())
        before = run.model.head.weight.clone()
        train_step(run, *more, **options)
        steps.append(float((run.model.head.weight - before).detach().abs().max()))
    monkeypatch.setattr(type(METHODS[name]), 'follow', spied_follow)
    monkeypatch.setattr(train, 'train_step', spied_step)
    compare(setting, tmp_path / 'out', '--methods', name, '--trained_targets', '2', '--seeds', '1')
    assert len(steps) == 12 and min(steps) > 0 and len(followed) == 2 * 9


@pytest.mark.parametrize('name', ['Q-Sparse', 'ProSparse', 'Deja Vu', 'CWIC'])
def test_nothing_is_compiled_again_in_the_middle_of_training(name, setting, tmp_path, monkeypatch):
    """
    A number that changes from step to step, kept as a number in a layer, once had torch compile all blocks at
    every change, up to its limit, and from there on run them uncompiled: ten times slower than all others.
    """
    compiled, before_step, really_compile, step = [], [], torch.compile, type(METHODS[name]).step

    def spied_step(self, *args):
        before_step.append(len(compiled))
        step(self, *args)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: really_compile(
        function, backend=lambda graph, inputs: compiled.append(graph) or graph.forward))
    monkeypatch.setattr(train, 'check_compile', lambda device: None)
    monkeypatch.setattr(type(METHODS[name]), 'step', spied_step)
    monkeypatch.setattr(baselines, 'RANK', 2)
    monkeypatch.setattr(baselines, 'EVERY', 2)
    recipe = (setting / 'recipe.toml').read_text(encoding='utf-8')
    (tmp_path / 'compile.toml').write_text(recipe + 'compile = true\n', encoding='utf-8')
    compare(setting, tmp_path / 'out', '--quick', '--methods', name, '--steps', '8',
            '--recipe', str(tmp_path / 'compile.toml'))
    torch.compiler.reset()
    if name == 'Deja Vu':       # it looks into its blocks
        assert not compiled
    else:
        assert len(before_step) == 8 and 0 == before_step[0] < before_step[2] == len(compiled)


def test_resuming_changes_nothing(setting, tmp_path, monkeypatch, capsys):
    more = ['--methods', 'dense,TEAL,CWIC,TEAL + distillation', '--targets', '1.5,2', '--trained_targets', '2',
            '--seeds', '1,2', '--steps', '4']
    whole = compare(setting, tmp_path / 'whole', *more)
    run_method, done = baselines.run_method, []

    def interrupted(job, *args):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(job)
        return run_method(job, *args)
    monkeypatch.setattr(baselines, 'run_method', interrupted)
    with pytest.raises(SystemExit) as ended:
        compare(setting, tmp_path / 'parts', *more)
    assert ended.value.code == 130 and 'interrupted' in capsys.readouterr().err
    monkeypatch.setattr(baselines, 'run_method', run_method)
    assert compare(setting, tmp_path / 'parts', *more) == whole and '3 runs to do' in capsys.readouterr().out
    assert len(whole) == 7 and whole[3]['kl'] != whole[4]['kl']         # two seeds
    assert compare(setting, tmp_path / 'parts', *more) == whole


def test_parts_made_apart_make_a_whole(setting, tmp_path, capsys):
    """Methods and seeds shared out among processes, each with its --out; then their rows in one file, in any order."""
    parts = [['--methods', 'TEAL,CATS'], ['--methods', 'TEAL + distillation', '--seeds', '2', '--trained_targets', '2'],
             ['--methods', 'CATS,TEAL + distillation', '--seeds', '1']]
    (tmp_path / 'whole').mkdir()
    with open(tmp_path / 'whole' / 'rows.jsonl', 'w', encoding='utf-8') as f:
        for i, part in enumerate(parts):
            compare(setting, tmp_path / str(i), '--quick', '--targets', '1.5,2', '--trained_targets', '1.5,2', *part)
            f.write((tmp_path / str(i) / 'rows.jsonl').read_text(encoding='utf-8'))
    capsys.readouterr()
    more = ['--quick', '--methods', 'TEAL,CATS,TEAL + distillation', '--targets', '1.5,2', '--trained_targets', '1.5,2',
            '--seeds', '1,2']
    rows = compare(setting, tmp_path / 'whole', *more)
    assert '0 runs to do' in capsys.readouterr().out and (tmp_path / 'whole.png').exists()
    expected = compare(setting, tmp_path / 'once', *more)
    assert sorted(map(str, rows)) == sorted(map(str, expected)) and len(rows) == 2 + 2 + 3
    assert (tmp_path / 'whole' / 'table.md').read_text() == (tmp_path / 'once' / 'table.md').read_text()


def test_ablations_alone_have_a_table_and_no_picture(setting, tmp_path, capsys):
    """The picture of no method at all ended in a traceback, after an hour of training."""
    compare(setting, tmp_path / 'out', '--quick', '--methods', 'CWIC: no centre')
    assert '| CWIC: no centre |' in capsys.readouterr().out and not (tmp_path / 'out.png').exists()


def test_what_a_user_gets_wrong_is_one_line(setting, tmp_path, capsys):
    compare(setting, tmp_path / 'out', '--methods', 'TEAL', '--targets', '2')
    sparse = small_model(thresholds=1.0, **SIZES)
    cwic.save_checkpoint(tmp_path / 'sparse.pt', sparse, tokenizer={'kind': 'bytes'})
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'rows.jsonl').write_text('hello\n', encoding='utf-8')
    capsys.readouterr()
    for out, more, says in (('out', ['--methods', 'TEEL'], 'there are dense, TEAL'),
                            ('out', ['--targets', '2,x'], 'must be such as 2,3'),
                            ('out', ['--targets', '0.5'], 'must be such as 2,3'),
                            ('out', ['--windows', '5'], 'with other options'),
                            ('foreign', [], 'not what this program writes'),
                            ('out', ['--subject', str(tmp_path / 'sparse.pt')], 'is sparse already'),
                            ('out', ['--subject', str(tmp_path / 'none.pt')], 'no such checkpoint'),
                            ('out', ['--recipe', str(tmp_path / 'none.toml')], 'none.toml')):
        with pytest.raises(SystemExit) as ended:
            compare(setting, tmp_path / out, *more)
        error = capsys.readouterr().err
        assert ended.value.code in (1, 2) and error.count('\n') == 1 and says in error, error
