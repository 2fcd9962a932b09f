"""The model against independent truths: numpy, finite differences, brute-force counts, a GPT-2 written another way."""

import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import cwic
from cwic import BANDWIDTH, CWICConfig, GPT, GatedProduct, KVCache, StripedLinear

SMALL = dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=12, stripe_qkv=10, stripe_out=12, stripe_up=7, stripe_down=5, stripe_head=16)


def small_model(seed=0, thresholds=0.5, **changes):
    """A random model with statistics, every parameter random (biases and norms too), thresholds up to `thresholds` sigmas."""
    torch.manual_seed(seed)
    model = GPT(CWICConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith('theta'):
                p.copy_(torch.randn_like(p) * 0.3 + (1 if name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight')) else 0))
        for _, linear in model.linears():
            linear.mu.copy_(torch.randn(linear.n_in) * 0.3)
            linear.sigma.copy_(torch.rand(linear.n_in) + 0.5)
            linear.theta.copy_(torch.rand_like(linear.theta) * thresholds / linear.scale)
    return model.eval()


# -----------------------------------------------------------------------------
# the gate


def test_worked_example():
    """The 4 inputs and 2 stripes of cwic.py's docstring and the README, worked by hand."""
    layer = StripedLinear(4, 4, stripe=2, bias=True)
    mu, W, b = torch.tensor([0.1, 0.2, -0.5, 0.0]), torch.arange(16.).view(4, 4) / 8, torch.tensor([1.0, 2.0, 3.0, 4.0])
    with torch.no_grad():
        layer.mu.copy_(mu), layer.sigma.fill_(1.0), layer.weight.copy_(W), layer.bias.copy_(b)
        layer.theta.copy_(torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0.1, 0.4, 2.0]]) / layer.scale)
    c = torch.tensor([0.9, -0.2, 0.4999, -1.0])          # 0.4999: below 0.5 and above 0.4 whatever the rounding
    y, active, sums = layer.eval()((mu + c)[None, None])
    by_hand = torch.cat([0.9 * W[0, :2] - 1.0 * W[3, :2], -0.2 * W[1, 2:] + 0.4999 * W[2, 2:]]) + mu @ W + b
    assert torch.allclose(y[0, 0], by_hand, atol=1e-6)
    assert active.item() == 8 and layer.dense == 16 and sums is None


@pytest.mark.parametrize('stripe', [1, 3, 4, 7])
def test_gate_backward_is_the_smoothed_step(stripe):
    """
    With the step replaced by a ramp of width bw, finite differences in t must give what backward gives, for y and for
    active, and in c for active. 7 columns: stripes of 3 and 4 leave a narrower last one.
    """
    rng = np.random.default_rng(stripe)
    N, n_in, n_out = 5, 6, 7
    n = math.ceil(n_out / stripe)
    c, W, bw = rng.normal(size=(N, n_in)), rng.normal(size=(n_in, n_out)), rng.uniform(0.5, 1.5, n_in)
    t, mu = rng.uniform(0.1, 1.2, (n, n_in)), rng.normal(size=n_in)
    G, A = rng.normal(size=(N, n_out)), rng.normal(size=N)          # gradients that arrive from above
    columns = [list(range(n_out))[s * stripe:(s + 1) * stripe] for s in range(n)]

    def smoothed(c, t, c_of_y=None):
        loss = 0.0
        for s, cols in enumerate(columns):
            ramp = np.clip((np.abs(c) - t[s]) / bw + 0.5, 0, 1)
            loss_y = 0.0 if c_of_y is None else np.sum(G[:, cols] * ((c_of_y * ramp) @ W[:, cols]))
            loss += loss_y + np.sum(A * len(cols) * ramp.sum(1))
        return loss

    def differences(f, x):
        out = np.zeros_like(x)
        for i in np.ndindex(*x.shape):
            up, down = x.copy(), x.copy()
            up[i] += 1e-6
            down[i] -= 1e-6
            out[i] = (f(up) - f(down)) / 2e-6
        return out

    tensors = [torch.tensor(a, requires_grad=True) for a in (c, t, W)]
    widths = torch.tensor([float(len(cols)) for cols in columns])
    y, active = GatedProduct.apply(tensors[0], torch.tensor(mu), tensors[1], torch.tensor(bw), tensors[2], widths, stripe)
    ((y * torch.tensor(G)).sum() + (active * torch.tensor(A)).sum()).backward()
    dc, dt, dW = (x.grad.numpy() for x in tensors)
    np.testing.assert_allclose(dt, differences(lambda t: smoothed(c, t, c), t), atol=1e-6)
    np.testing.assert_allclose(dc - G @ W.T, differences(lambda c: smoothed(c, t), c), atol=1e-6)
    masked = [mu + np.where(np.abs(c) > t[s], c, 0) for s in range(n)]
    np.testing.assert_allclose(y.detach().numpy(), np.concatenate([masked[s] @ W[:, cols] for s, cols in enumerate(columns)], 1), atol=1e-10)
    np.testing.assert_allclose(dW, np.concatenate([masked[s].T @ G[:, cols] for s, cols in enumerate(columns)], 1), atol=1e-10)


def test_input_that_never_moves_gives_no_nan():
    """sigma 0 means a window of width 0; dividing by it made every gradient of the layer NaN."""
    layer = StripedLinear(3, 4, 2, bias=True).train()
    layer.sigma.copy_(torch.tensor([1.0, 0.0, 2.0]))
    x = torch.zeros(1, 5, 3, requires_grad=True)
    y, active, _ = layer(x)
    (y.sum() + active.sum()).backward()
    assert all(torch.isfinite(g).all() for g in (x.grad, layer.theta.grad, layer.weight.grad))


def test_autocast_products_in_bf16_with_masks_in_f32():
    """Under autocast the mask must still come from f32 values: active counts are exactly those without it."""
    layer = small_model(n_embd=64, thresholds=2.0).blocks[0].mlp.up
    x = torch.randn(2, 8, 64)
    y, active, _ = layer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y16, active16, _ = layer(x)
    assert y16.dtype == torch.bfloat16 and torch.equal(active, active16)
    assert (y16 - y).norm() / y.norm() < 2e-2


# -----------------------------------------------------------------------------
# counting


def test_active_counts_against_brute_force():
    """
    Every weight of every matrix and token counted one by one, from recorded inputs. Earlier code counted padded columns;
    here widths do not divide, and the dense count must be the number of weights that exist.
    """
    model = small_model(thresholds=1.5)
    inputs = {}
    for name, linear in model.linears():
        linear.register_forward_hook(lambda module, args, out, name=name: inputs.__setitem__(name, args[0]))
    tokens = torch.randint(0, 50, (2, 9))
    _, active = model(tokens)
    for (name, linear), counted in zip(model.linears(), active):
        x, t = inputs[name].detach().numpy(), linear.thresholds().detach().numpy()
        for b, p in np.ndindex(2, 9):
            used = 0
            for out in range(linear.n_out):
                used += int((np.abs(x[b, p] - linear.mu.numpy()) > t[out // linear.stripe]).sum())
            assert counted[b, p].item() == used, name
    assert active.shape == (9, 2, 9)
    assert model.dense() == sum(linear.weight.numel() for _, linear in model.linears())


def test_dense_mode_counts_every_weight():
    model = small_model()
    _, active = model(torch.randint(0, 50, (1, 4)), dense=True)
    assert active.sum(0).unique().tolist() == [model.dense()]


# -----------------------------------------------------------------------------
# statistics


def centre_and_spread(batches, memory):
    """What observe() and update_statistics() say they do, in numpy, one value at a time."""
    mu, sigma, weight_sum, count_sum = 0.0, 0.0, 0.0, 0.0
    for batch in batches:
        weights = [1.0 if sigma == 0 else sigma / max(abs(x - mu), 0.1 * sigma) for x in batch]
        pull, distance = sum(w * (x - mu) for w, x in zip(weights, batch)), sum(abs(x - mu) for x in batch)
        weight_sum, count_sum = memory * weight_sum + sum(weights), memory * count_sum + len(batch)
        mu += pull / weight_sum
        sigma += (math.sqrt(math.pi / 2) * distance - len(batch) * sigma) / count_sum
    return mu, sigma


def observed(layer, batches, masks=None):
    for i, batch in enumerate(batches):
        x = torch.zeros(batch.shape[0], cwic.OBSERVE_EVERY * batch.shape[1], 1)       # every fourth position is looked at
        x[:, ::cwic.OBSERVE_EVERY, 0] = torch.tensor(batch)
        mask = None
        if masks is not None:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[:, ::cwic.OBSERVE_EVERY] = torch.tensor(masks[i])
        layer.update_statistics(cwic.observe(x, layer.mu, layer.sigma, mask))
    return float(layer.mu), float(layer.sigma)


def test_statistics_against_numpy():
    rng = np.random.default_rng(0)
    batches = [rng.gamma(1.0, 1.0, size=(2, 25)).astype(np.float32) for _ in range(30)]
    got = observed(StripedLinear(1, 1, 1, False), batches)
    expected = centre_and_spread([b.ravel().astype(float) for b in batches], cwic.MEMORY)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_centre_is_close_to_the_median_and_spread_to_a_standard_deviation():
    """Skewed values with wild outliers: the mean would be far off; of a normal distribution sigma is the deviation."""
    rng = np.random.default_rng(1)
    skewed = [np.where(rng.random((4, 100)) < 0.02, 300.0, rng.gamma(1.0, 1.0, (4, 100))).astype(np.float32) for _ in range(400)]
    mu, _ = observed(StripedLinear(1, 1, 1, False), skewed)
    assert abs(mu - np.median(np.stack(skewed))) < 0.15 and np.mean(skewed) > 6
    normal = [rng.normal(3.0, 2.0, (4, 100)).astype(np.float32) for _ in range(300)]
    mu, sigma = observed(StripedLinear(1, 1, 1, False), normal)
    assert abs(mu - 3.0) < 0.05 and abs(sigma - 2.0) < 0.05


def test_masked_tokens_do_not_count():
    """
    Padding once leaked into the weights of the robust centre: with half the tokens padded it came out at 2.30, not 0.53.
    A padded batch with its mask must give what the batch without padding gives.
    """
    rng = np.random.default_rng(2)
    batches = [rng.gamma(1.0, 1.0, size=(3, 20)).astype(np.float32) for _ in range(20)]
    padded = [np.concatenate([b, np.full_like(b, 50.0)], axis=1) for b in batches]
    masks = [np.concatenate([np.ones_like(b), np.zeros_like(b)], axis=1).astype(bool) for b in batches]
    np.testing.assert_allclose(observed(StripedLinear(1, 1, 1, False), padded, masks), observed(StripedLinear(1, 1, 1, False), batches), rtol=1e-5)


def test_statistics_change_in_training_only_and_on_request_only():
    """
    Earlier code updated statistics inside forward, under conditions: a validation loop polluted them, and in most
    settings they silently stayed 0. Here forward changes nothing at all, and eval mode observes nothing.
    """
    model = small_model()
    before = {name: b.clone() for name, b in model.named_buffers()}
    tokens = torch.randint(0, 50, (2, 16))
    _, _, sums = model.eval().trunk(tokens)
    assert sums == [None] * 8
    model.train()(tokens)
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    _, _, sums = model.trunk(tokens)
    model.update_statistics(sums + [model.head(torch.randn(2, 16, 12))[2]])
    assert {name for name, b in model.named_buffers() if torch.equal(before[name], b)} == {name for name in before if name.endswith('widths')}


# -----------------------------------------------------------------------------
# the model


def gpt2_in_numpy(model, tokens):
    """GPT-2's forward pass for one sequence, written anew from the paper and its released code, in f64."""
    p = {name: x.detach().numpy().astype(np.float64) for name, x in model.named_parameters()}
    d, heads = model.config.n_embd, model.config.n_head

    def norm(x, name):
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return z * p[name + '.weight'] + p[name + '.bias']

    def affine(x, name):
        return x @ p[name + '.weight'] + p[name + '.bias']

    x = p['head.weight'].T[tokens] + p['wpe.weight'][:len(tokens)]
    T = len(tokens)
    for i in range(model.config.n_layer):
        q, k, v = np.split(affine(norm(x, f'blocks.{i}.ln_1'), f'blocks.{i}.attn.qkv'), 3, axis=-1)
        heads_out = []
        for h in range(heads):
            cols = slice(h * d // heads, (h + 1) * d // heads)
            scores = q[:, cols] @ k[:, cols].T / math.sqrt(d // heads)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads_out.append(weights / weights.sum(-1, keepdims=True) @ v[:, cols])
        x = x + affine(np.concatenate(heads_out, -1), f'blocks.{i}.attn.out')
        h = affine(norm(x, f'blocks.{i}.ln_2'), f'blocks.{i}.mlp.up')
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        x = x + affine(h, f'blocks.{i}.mlp.down')
    return norm(x, 'ln_f') @ p['head.weight']


@pytest.mark.parametrize('dense', [False, True])
def test_zero_thresholds_are_plain_gpt2(dense):
    """
    With statistics set and biases random: the fast path of earlier code added the bias twice, which shows only in
    models that have one. Dense mode must be the same function.
    """
    model = small_model(thresholds=0.0)
    tokens = torch.randint(0, 50, (1, 16))
    logits, _ = model(tokens, dense=dense)
    expected = gpt2_in_numpy(model, tokens[0].numpy())
    np.testing.assert_allclose(logits[0].detach().numpy(), expected, atol=2e-4 * np.abs(expected).max())


def test_same_answer_in_any_order_of_train_eval_load_and_to():
    """Earlier code cached mu @ W and went stale after train, eval, load_state_dict or .to(): nothing may be cached."""
    source, tokens = small_model(seed=1, thresholds=1.0), torch.randint(0, 50, (1, 8))
    expected, expected_active = source(tokens)
    model = small_model(seed=2, thresholds=0.3)
    model(tokens)
    model.train()(tokens)
    model.eval()(tokens)
    model.load_state_dict(source.state_dict())
    logits, active = model.to(torch.float64).to(torch.float32)(tokens)
    assert torch.equal(logits, expected) and torch.equal(active, expected_active)
    assert torch.equal(model.train()(tokens)[0], expected)


def test_every_layer_starts_at_the_same_threshold():
    """A threshold option once did not reach one inner layer, so one matrix per block started elsewhere."""
    model = GPT(CWICConfig(**SMALL))
    for _, linear in model.linears():
        linear.sigma.fill_(1.0)
        assert torch.equal(linear.thresholds(), torch.zeros(math.ceil(linear.n_out / linear.stripe), linear.n_in))
        assert linear.scale == 10 * math.sqrt(linear.n_in)


@pytest.mark.parametrize('length', [3, 40])
def test_cached_generation_equals_uncached(length):
    """Token for token, compute for compute, also past the context of 16, where the window slides twice and more."""
    model = small_model(thresholds=1.0)
    for seed in range(3):
        prompt = torch.randint(0, 50, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        runs = [list(cwic.generate(model, prompt, length, temperature=1.0, top_k=10, generator=torch.Generator().manual_seed(seed), cached=cached))
                for cached in (True, False)]
        assert [token for token, _ in runs[0]] == [token for token, _ in runs[1]]
        for (_, a), (_, b) in zip(*runs):
            assert torch.allclose(a, b, atol=12 * 48)       # an input at its threshold may fall either side by rounding


def test_cache_in_pieces_equals_one_pass():
    """Prefilling in two pieces, then token by token, gives the logits of one pass over everything."""
    model, tokens = small_model(thresholds=1.0), torch.randint(0, 50, (1, 12))
    whole, whole_active = model(tokens)
    cache = KVCache(model.config)
    parts = [model(piece, cache) for piece in (tokens[:, :5], tokens[:, 5:9], tokens[:, 9:10], tokens[:, 10:11], tokens[:, 11:])]
    assert torch.allclose(torch.cat([logits for logits, _ in parts], 1), whole, atol=1e-4)
    assert torch.equal(torch.cat([active for _, active in parts], 2), whole_active)
    assert cache.length == 12


# -----------------------------------------------------------------------------
# losses and the optimiser's groups


def test_two_way_kl_against_its_definition():
    a, b = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    p, q = a.softmax(-1), b.softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    assert abs(float(cwic.two_way_kl(a, b)) - float(expected)) < 1e-5
    assert float(cwic.two_way_kl(a, a)) == 0


def test_price_is_the_slope_of_the_flop_loss():
    for active in (300.0, 500.0, 1000.0):
        slope = (cwic.flop_loss(active + 1e-4, 1000, 3) - cwic.flop_loss(active - 1e-4, 1000, 3)) / 2e-4
        assert abs(slope - cwic.price(active, 1000, 3)) < 1e-6 * max(abs(slope), 1e-3)
    assert cwic.price(300.0, 1000, 3) == 0                                  # beyond the target nothing pushes


def test_thresholds_are_never_decayed_and_every_parameter_is_in_one_group():
    """Weight decay on thresholds pulled them to 0 against the compute loss."""
    model = small_model()
    matrices, others, thetas = model.parameter_groups(1e-3, 0.1)
    assert matrices['weight_decay'] == 0.1 and others['weight_decay'] == thetas['weight_decay'] == 0
    assert {id(p) for p in thetas['params']} == {id(linear.theta) for _, linear in model.linears()}
    everything = [id(p) for group in (matrices, others, thetas) for p in group['params']]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_a_threshold_moves_at_most_half_a_window_and_stays_above_the_floor():
    """One large step once carried thresholds far past every input they had felt, for good."""
    model = small_model(thresholds=0.5)
    before = [linear.theta.detach().clone() for _, linear in model.linears()]
    with torch.no_grad():
        for _, linear in model.linears():
            linear.theta += torch.randn_like(linear.theta)
    model.limit_thresholds(before)
    for (_, linear), old in zip(model.linears(), before):
        moved = (linear.theta - old).detach() * linear.scale
        assert moved.abs().max() <= BANDWIDTH / 2 + 1e-5 and float(linear.theta.detach().min() * linear.scale) >= cwic.FLOOR * 0.999


# -----------------------------------------------------------------------------
# checkpoints


def test_checkpoint_round_trip(tmp_path):
    model = small_model(thresholds=1.0)
    cwic.save_checkpoint(tmp_path / 'm.pt', model, step=7)
    again, saved = cwic.load_checkpoint(tmp_path / 'm.pt')
    tokens = torch.randint(0, 50, (1, 8))
    assert saved['step'] == 7 and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model(tokens), again(tokens)))
    assert os.listdir(tmp_path) == ['m.pt']


class RunsCode:
    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.parametrize('kind', ['missing', 'truncated', 'beginning', 'empty', 'foreign', 'wrong sizes', 'code'])
def test_bad_checkpoints_are_one_line(tmp_path, kind, monkeypatch):
    """
    Metadata was once pickled, so loading a stranger's checkpoint ran the stranger's code. And of a file with only its
    beginning, the message once was "cannot be read (Invalid argument)": torch seeks before the start of it.
    """
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'm.pt'
    if kind == 'truncated':
        cwic.save_checkpoint(path, small_model())
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == 'beginning':
        cwic.save_checkpoint(path, small_model())
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'foreign':
        torch.save({'weights': torch.zeros(3)}, path)
    elif kind == 'wrong sizes':
        torch.save({'model': small_model().state_dict(), 'config': {**SMALL, 'n_embd': 24, 'bias': True}}, path)
    elif kind == 'code':
        torch.save({'model': RunsCode(), 'config': SMALL}, path)
    with pytest.raises(cwic.CheckpointError) as error:
        cwic.load_checkpoint(path)
    assert '\n' not in str(error.value) and str(path) in str(error.value)
    assert ('no such checkpoint' if kind == 'missing' else 'damaged') in str(error.value)
    assert not os.path.exists('ran')


def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL at many different moments of a process that does nothing but save: what is there must load."""
    path = tmp_path / 'm.pt'
    script = ('import sys; sys.path.insert(0, sys.argv[1]); import torch, cwic\n'
              'model = cwic.GPT(cwic.CWICConfig(n_embd=192, n_head=3))\n'
              'step = 0\n'
              'while True:\n    step += 1\n    cwic.save_checkpoint(sys.argv[2], model, step=step)\n    print(step, flush=True)\n')
    root = os.path.dirname(os.path.abspath(cwic.__file__))
    steps = []
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, '-c', script, root, str(path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()                                           # one save is complete
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append(cwic.load_checkpoint(path)[1]['step'])
    assert min(steps) >= 1
