"""
The model against independent truths: numpy, finite differences, brute-force counts, both blocks written
again.
"""

import math

import numpy as np
import pytest
import torch

import cwic
import refinements
from cwic import BANDWIDTH, GPT, CWICConfig, MaskedNeurons, MaskedProduct, KVCache, Neurons, StripedLinear

# widths that stripes do not divide, several heads, and an MLP that is not 4 times as wide
SIZES = {'vocab_size': 50, 'block_size': 16, 'n_layer': 2, 'n_head': 4, 'n_embd': 16, 'n_hidden': 28,
         'stripe_qkv': 10, 'stripe_out': 16, 'stripe_up': 9, 'stripe_down': 5, 'stripe_head': 16}
LLAMA = {'arch': 'llama', 'n_kv_head': 2, 'rope_theta': 100.0}
PLAIN = cwic.mask_inputs, cwic.step_backward      # functions that are not compiled
BOTH = pytest.mark.parametrize('arch', ['gpt2', 'llama'])


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """Matrices are tiny here: threads would spend the time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(arch='gpt2', seed=0, thresholds=1.0, **changes):
    """
    Random in every parameter (biases and norms too), with statistics; thresholds up to `thresholds` sigmas.
    """
    torch.manual_seed(seed)
    model = GPT(CWICConfig(**{**SIZES, **(LLAMA if arch == 'llama' else {}), **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1 if 'ln_' in name and name.endswith('weight') else 0))
        for _, layer in model.sparse_layers():
            if isinstance(layer, StripedLinear):
                layer.mu.copy_(torch.randn(layer.n_in) * 0.3)
            layer.sigma.copy_(torch.rand(layer.n_in) + 0.5)
            layer.theta.copy_(torch.rand_like(layer.theta) * thresholds / layer.scale)
    return model.eval()


def random_tokens(*shape, seed=0):
    return torch.randint(0, SIZES['vocab_size'], shape, generator=torch.Generator().manual_seed(seed))


def differences(f, x):
    """The gradient of f at x, by finite differences."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        right, left = x.copy(), x.copy()
        right[i] += 1e-6
        left[i] -= 1e-6
        gradient[i] = (f(right) - f(left)) / 2e-6
    return gradient


# -----------------------------------------------------------------------------
# the mask and its gradient


def test_worked_example():
    """The 4 inputs and 2 stripes of cwic.py's docstring, worked by hand."""
    layer = StripedLinear(4, 4, stripe=2, bias=True).eval()
    mu, b = torch.tensor([0.1, 0.2, -0.5, 0.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    W = torch.arange(16.).view(4, 4) / 8
    with torch.no_grad():
        layer.mu.copy_(mu), layer.sigma.fill_(1.0), layer.weight.copy_(W), layer.bias.copy_(b)
        layer.theta.copy_(torch.tensor([[0.6, 0.6, 0.6, 0.6], [1.0, 0.1, 0.4, 2.0]]) / layer.scale)
    c = torch.tensor([0.9, -0.2, 0.5, -1.0])
    y, active = layer((mu + c)[None, None])
    by_hand = torch.cat([0.9 * W[0, :2] - 1.0 * W[3, :2], -0.2 * W[1, 2:] + 0.5 * W[2, 2:]]) + mu @ W + b
    assert torch.allclose(y[0, 0], by_hand, atol=1e-6)
    assert active.item() == 8 and layer.n_weights == 16


@pytest.mark.parametrize('stripe', [3, 4, 12])
def test_striped_linear_computes_the_reference(stripe):
    """Outputs, counts, and the gradient of W; stripes of 3 and 4 do not divide 10."""
    torch.manual_seed(stripe)
    layer = StripedLinear(6, 10, stripe, bias=False)
    layer.mu.normal_(), layer.sigma.uniform_(0.5, 1.5)
    layer.theta.data.uniform_(0, 1.0 / layer.scale)
    x = torch.randn(1, 40, 6)
    y, active = layer(x)
    W = layer.weight.detach().clone().requires_grad_()
    expected, expected_active = cwic.reference(x[0], layer.mu, layer.thresholds().detach(), W, layer.stripe)
    torch.testing.assert_close(y[0], expected)
    assert torch.equal(active[0], expected_active.double()) and 0.2 < float(active.detach().mean()) / 60 < 0.9
    g = torch.randn(40, 10)
    torch.testing.assert_close(torch.autograd.grad(y[0], layer.weight, g)[0], torch.autograd.grad(expected, W, g)[0])


@pytest.mark.parametrize('stripe', [1, 3, 4, 7])
def test_mask_gradient_is_that_of_a_ramp(stripe):
    """
    With the step replaced by a ramp of width bw, finite differences in t must equal backward's gradient, for
    y and for active, and those in x for active. 7 columns: stripes of 3 and 4 leave a narrower last one.
    """
    rng = np.random.default_rng(stripe)
    N, n_in, n_out = 5, 6, 7
    stripes = [list(range(n_out))[i:i + stripe] for i in range(0, n_out, stripe)]
    x, mu, W = rng.normal(size=(N, n_in)), rng.normal(size=n_in), rng.normal(size=(n_in, n_out))
    t, bw = rng.uniform(0.1, 1.2, (len(stripes), n_in)), rng.uniform(0.5, 1.5, n_in)
    G, A = rng.normal(size=(N, n_out)), rng.normal(size=N)          # gradients that arrive from above

    def smoothed(x, t, with_y):
        loss = 0.0
        for s, columns in enumerate(stripes):
            ramp = np.clip((np.abs(x - mu) - t[s]) / bw + 0.5, 0, 1)
            loss += np.sum(A * len(columns) * ramp.sum(1))
            loss += np.sum(G[:, columns] * (((x - mu) * ramp) @ W[:, columns])) if with_y else 0.0
        return loss

    x_, t_, W_ = (torch.tensor(a, requires_grad=True) for a in (x, t, W))
    y, active = MaskedProduct.apply(x_, torch.tensor(mu), t_, torch.tensor(bw), W_, stripe, PLAIN)
    ((y * torch.tensor(G)).sum() + (active * torch.tensor(A)).sum()).backward()
    np.testing.assert_allclose(t_.grad, differences(lambda t: smoothed(x, t, with_y=True), t), atol=1e-6)
    # from y, x gets the gradient it would get if nothing were masked
    dx = differences(lambda x: smoothed(x, t, with_y=False), x)
    np.testing.assert_allclose(x_.grad.numpy() - G @ W.T, dx, atol=1e-6)
    expected_y, expected_active, dW = np.zeros((N, n_out)), np.zeros(N), np.zeros((n_in, n_out))
    for s, columns in enumerate(stripes):
        mask = np.abs(x - mu) > t[s]
        inputs = np.where(mask, x, mu)
        expected_y[:, columns], dW[:, columns] = inputs @ W[:, columns], inputs.T @ G[:, columns]
        expected_active += len(columns) * mask.sum(1)
    np.testing.assert_allclose(y.detach(), expected_y, atol=1e-12)
    np.testing.assert_allclose(W_.grad, dW, atol=1e-12)
    np.testing.assert_array_equal(active.detach(), expected_active)


def test_shared_mask_gradient_is_that_of_a_ramp():
    """The same for Llama's neurons: a = h * z if |z| > t, 10 weights for each active one."""
    rng = np.random.default_rng(0)
    z, h, G, A = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), rng.normal(size=5)
    t, bw = rng.uniform(0.1, 1.2, 8), rng.uniform(0.5, 1.5, 8)

    def smoothed(z, t, with_a):
        ramp = np.clip((np.abs(z) - t) / bw + 0.5, 0, 1)
        return np.sum(A * 10 * ramp.sum(1)) + (np.sum(G * h * z * ramp) if with_a else 0.0)

    z_, h_, t_ = (torch.tensor(a, requires_grad=True) for a in (z, h, t))
    a, active = MaskedNeurons.apply(z_, h_, t_, torch.tensor(bw), 10, PLAIN)
    ((a * torch.tensor(G)).sum() + (active * torch.tensor(A)).sum()).backward()
    mask = np.abs(z) > t
    np.testing.assert_allclose(t_.grad, differences(lambda t: smoothed(z, t, with_a=True), t), atol=1e-6)
    dz = differences(lambda z: smoothed(z, t, with_a=False), z)
    np.testing.assert_allclose(z_.grad.numpy() - G * h, dz, atol=1e-6)
    np.testing.assert_allclose(h_.grad, G * z * mask, atol=1e-12)
    np.testing.assert_allclose(a.detach(), z * h * mask, atol=1e-12)
    np.testing.assert_array_equal(active.detach(), 10 * mask.sum(1))


def test_input_that_never_moves_gives_no_nan():
    """sigma 0 means a bandwidth of 0; dividing by it made every gradient of the layer NaN."""
    striped, neurons = StripedLinear(3, 4, 2, bias=True), Neurons(4, 3)
    for layer in (striped, neurons):
        layer.sigma.copy_(torch.tensor([1.0, 0.0, 2.0]))
    x, z = torch.zeros(1, 5, 4, requires_grad=True), torch.zeros(1, 5, 3, requires_grad=True)
    for layer, (y, active) in ((striped, striped(z)), (neurons, neurons(z, x))):
        (y.sum() + active.sum()).backward()
        assert all(torch.isfinite(p.grad).all() for p in [z, *layer.parameters()])


def test_nan_is_not_masked():
    """|nan| > t is false, but a diverged run must be seen: NaN reaches the output."""
    layer = StripedLinear(3, 4, 2, bias=False)
    y, _ = layer(torch.tensor([[[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]]]))
    assert torch.isnan(y[0, 0]).all() and torch.isfinite(y[0, 1]).all()


@BOTH
def test_thresholds_below_every_input_are_the_dense_model(arch):
    """
    Logits, and the gradient of every weight: if no input is near its threshold, the mask leaves no trace.
    """
    model, tokens = small_model(arch, thresholds=0.0), random_tokens(2, 16)
    gradients = []
    for dense in (True, False):
        with torch.no_grad():
            for _, layer in model.sparse_layers():
                layer.theta.fill_(1.0 if dense else -1.0)       # dense mode must not look at it
        model.zero_grad()
        logits, active = model(tokens, dense=dense)
        logits.square().mean().backward()
        assert active.dtype == torch.float64 and active.sum(0).unique().tolist() == [model.n_weights()]
        gradients.append({name: p.grad for name, p in model.named_parameters() if not name.endswith('theta')})
        gradients[-1]['logits'] = logits.detach()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).abs().max() < 1e-5 * expected.abs().max(), name


@BOTH
def test_autocast_products_in_bf16_with_masks_in_f32(arch):
    """
    Under autocast masks still come from f32 values, so counts of a layer are exactly those without it. Dense
    output with a bias was f32 where sparse output was bf16: a teacher and its student computed in different
    types.
    """
    model = small_model(arch, n_embd=64, n_hidden=96)
    x, z = torch.randn(2, 8, 64), torch.randn(2, 8, 96)
    for name, layer in model.sparse_layers():
        inputs = {'down': (z,), 'neurons': (z, x)}.get(name.split('.')[-1], (x,))
        y, active = layer(*inputs)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y16, active16 = layer(*inputs)
            dense16, _ = layer(*inputs, dense=True)
            y16.float().square().sum().backward()
        assert y16.dtype == dense16.dtype == torch.bfloat16 and torch.equal(active, active16), name
        assert (y16 - y).norm() / y.norm() < 2e-2, name
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters()), name


@BOTH
def test_compiled_model_with_one_stripe_has_the_same_gradients(arch):
    """With one stripe to a matrix, compiled backward once gave theta a gradient of [576] for [1, 576]."""
    model = small_model(arch, n_layer=1, **{name: 4096 for name in SIZES if name.startswith('stripe')})
    gradients = []
    for forward in (model, torch.compile(model, backend='aot_eager')):
        model.zero_grad()
        logits, active = forward(random_tokens(2, 16))
        (logits.square().mean() + 1e-3 * active.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert gradients[1][name].shape == expected.shape, name
        assert torch.allclose(gradients[1][name], expected, rtol=1e-4, atol=1e-5), name


def test_an_input_at_its_threshold_is_skipped():
    """
    The compare is strict, here and in the kernel: an input that is always 0, with a threshold of 0, is free.
    """
    striped, neurons = StripedLinear(3, 4, 2, bias=False).eval(), Neurons(4, 3).eval()
    for layer in (striped, neurons):
        layer.sigma.copy_(torch.tensor([1.0, 1.0, 0.0]))
        layer.theta.data.copy_(torch.tensor([0.5, 0.25, 7.0]) / layer.scale)
    t = striped.thresholds().detach()[0]                            # 0.5, 0.25, 0
    for z, expected in ((t, 0), (-t, 0), (t * 1.001, 2), (t + 0.001, 3)):
        assert int(striped(z[None, None])[1][0]) == 4 * expected
        assert int(neurons(z[None, None], torch.ones(1, 1, 4))[1][0]) == 8 * expected


def test_counts_are_exact_above_f32():
    """Counts were f32, exact to 2^24 only: of this layer's 33,558,527 weights one too many was counted."""
    layer = StripedLinear(4097, 8191, 1000, bias=False).eval()
    with torch.no_grad():
        for dense in (True, False):
            _, active = layer(torch.ones(1, 1, 4097), dense)
            assert int(active) == 4097 * 8191
    ones, zeros = torch.ones(1, 10001), torch.zeros(10001)
    assert int(MaskedNeurons.apply(ones, ones, zeros, zeros, 2 * 2049, PLAIN)[1]) == 10001 * 2 * 2049


# -----------------------------------------------------------------------------
# statistics


def observed(layer, x):
    layer.observe(torch.tensor(x, dtype=torch.float32))
    return layer.mu.numpy(), layer.sigma.numpy()


def written_out(x):
    """observe() for the values of one input, one after the other."""
    distances = [abs(value - np.median(x)) for value in x]
    weights = [1 / max(distance, sum(distances) / len(x) / 10) for distance in distances]
    mu = sum(w * value for w, value in zip(weights, x)) / sum(weights)
    return mu, math.sqrt(math.pi / 2) * sum(abs(value - mu) for value in x) / len(x)


def test_statistics_against_numpy():
    """Skewed values with wild outliers, which move the mean far off; then a normal distribution."""
    rng = np.random.default_rng(1)
    skewed = np.where(rng.random((21, 201, 2)) < 0.02, 300.0, rng.gamma(1.0, 1.0, (21, 201, 2)))
    mu, sigma = observed(StripedLinear(2, 1, 1, bias=False), skewed)
    for i in range(2):
        expected = written_out(skewed[..., i].flat[::cwic.OBSERVE_EVERY])
        np.testing.assert_allclose([mu[i], sigma[i]], expected, rtol=1e-4)
    assert mu.max() < 1.5 and np.mean(skewed) > 6
    mu, sigma = observed(StripedLinear(1, 1, 1, bias=False), rng.normal(3.0, 2.0, (210, 400, 1)))
    assert abs(mu[0] - 3.0) < 0.1 and abs(sigma[0] - 2.0) < 0.05


@pytest.mark.parametrize('T', [16, 17, 64, 256])
def test_statistics_sample_every_position_equally(T):
    """
    Every fourth position was looked at, always from 0, so a model's attention sink weighed four times; then
    offsets were spread over the flattened batch, which for 17 positions looked at 0, 4, 8, ... of every
    sequence all the same.
    """
    layer = Neurons(1, T)
    layer.observe(torch.eye(T).expand(7, T, T))     # input i is 1 at position i only: its mean counts the looks
    torch.testing.assert_close(layer.sigma, torch.full((T,), math.sqrt(math.pi / 2) / T))


@BOTH
def test_statistics_change_only_in_observe(arch):
    """
    Earlier code updated statistics inside forward, under conditions: a validation loop polluted them, and in
    most settings they silently stayed 0. Here forward changes nothing at all, and observe() all of them, to
    those of each layer's inputs in a dense pass.
    """
    model, tokens = small_model(arch).train(), random_tokens(7, 15)         # of which 15 are observed
    before = {name: b.clone() for name, b in model.named_buffers()}
    model(tokens), model(tokens, dense=True), model.eval()(tokens)
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    model.observe(tokens)                                                   # layers that have statistics keep them
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    for _, layer in model.sparse_layers():
        layer.sigma.zero_()
    model.observe(tokens)
    unchanged = {name for name, b in model.named_buffers() if torch.equal(before[name], b)}
    assert unchanged == {name for name in before if name.endswith('neurons.mu')}
    with torch.no_grad():
        hidden = model.trunk(tokens, dense=True)[0].flatten(0, 1)[::cwic.OBSERVE_EVERY]         # (15, d)
        mus = [written_out(column)[0] for column in hidden.double().numpy().T]
        np.testing.assert_allclose(model.head.mu, mus, rtol=1e-4, atol=1e-5)
        inputs = model.blocks[0].ln_1(model.head.weight.t()[tokens] + (model.wpe.weight[:15] if arch == 'gpt2' else 0))
    mus = [written_out(column)[0] for column in inputs.flatten(0, 1)[::cwic.OBSERVE_EVERY].double().numpy().T]
    np.testing.assert_allclose(model.blocks[0].attn.qkv.mu, mus, rtol=1e-4, atol=1e-5)


def test_neurons_are_not_centred():
    """Their spread is that of |z| around 0, however far from 0 the values are."""
    mu, sigma = observed(Neurons(1, 1), np.full((2, 70, 1), -3.0))
    assert mu[0] == 0 and abs(sigma[0] - 3.0 * math.sqrt(math.pi / 2)) < 1e-5


# -----------------------------------------------------------------------------
# the model


def rotary_frequencies(config):
    """As published with Llama 3.1: by wavelength, in three cases."""
    d, frequencies = config.n_embd // config.n_head, []
    for i in range(d // 2):
        frequency = config.rope_theta ** (-2 * i / d)
        if config.rope_scaling:
            factor, low, high, context = config.rope_scaling
            wavelength = 2 * math.pi / frequency
            if wavelength > context / low:
                frequency /= factor
            elif wavelength > context / high:
                smooth = (context / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def forward_in_numpy(model, tokens, dense=False):
    """
    The forward pass of GPT-2 and Llama for one sequence, thresholds included, written anew from the papers
    and their released code: one output column, one head, one neuron at a time, rotations as complex numbers,
    in f64. Returns logits (T, vocab) and the weights used (matrices, T).
    """
    config = model.config
    p = {name: x.double().numpy() for name, x in model.state_dict().items()}
    T, counts, d = len(tokens), [], config.n_embd // config.n_head

    def thresholds(name):
        theta, sigma = p[f'{name}.theta'], p[f'{name}.sigma']
        return -np.ones_like(theta) if dense else theta * 10 * math.sqrt(len(sigma)) * sigma

    def norm(x, name):
        if config.arch == 'llama':
            return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.norm_eps) * p[f'{name}.weight']
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return z * p[f'{name}.weight'] + p.get(f'{name}.bias', 0)

    def linear(x, name, stripe):
        W, mu, t, columns = p[f'{name}.weight'], p[f'{name}.mu'], thresholds(name), []
        counts.append(np.zeros(T))
        for column in range(W.shape[1]):
            used = np.abs(x - mu) > t[column // stripe]
            counts[-1] += used.sum(1)
            columns.append(np.where(used, x, mu) @ W[:, column])
        return np.stack(columns, 1) + p.get(f'{name}.bias', 0)

    def attention(x, name):
        qkv, outputs = linear(x, f'{name}.qkv', config.stripe_qkv), []
        q, k, v = np.split(qkv, [config.n_head * d, (config.n_head + config.n_kv_head) * d], axis=1)
        for head in range(config.n_head):
            shared = head // (config.n_head // config.n_kv_head)
            qh, kh, vh = q[:, head * d:][:, :d], k[:, shared * d:][:, :d], v[:, shared * d:][:, :d]
            if config.arch == 'llama':
                turn = np.exp(1j * np.outer(np.arange(T), rotary_frequencies(config)))
                qh, kh = ((z[:, :d // 2] + 1j * z[:, d // 2:]) * turn for z in (qh, kh))
            scores = np.real(qh @ kh.conj().T) / math.sqrt(d)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ vh)
        return linear(np.hstack(outputs), f'{name}.out', config.stripe_out)

    def mlp(x, name):
        if config.arch == 'gpt2':
            h = linear(x, f'{name}.up', config.stripe_up)
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
            return linear(h, f'{name}.down', config.stripe_down)
        z = linear(x, f'{name}.gate', config.stripe_up)
        z, t, y = z / (1 + np.exp(-z)), thresholds(f'{name}.neurons')[0], np.zeros_like(x)
        counts.append(np.zeros(T))
        for neuron in range(config.n_hidden):
            up, down = p[f'{name}.neurons.up'][:, neuron], p[f'{name}.neurons.down'][neuron]
            used = np.abs(z[:, neuron]) > t[neuron]
            y += np.outer(used * z[:, neuron] * (x @ up), down)
            counts[-1] += used * (len(up) + len(down))
        return y

    basis = p.get('basis', np.eye(config.n_embd))
    x = (basis @ p['head.weight']).T[tokens] + (p['wpe.weight'][:T] if config.arch == 'gpt2' else 0)
    for i in range(config.n_layer):
        x = x + attention(norm(x, f'blocks.{i}.ln_1'), f'blocks.{i}.attn')
        x = x + mlp(norm(x, f'blocks.{i}.ln_2'), f'blocks.{i}.mlp')
    x = norm(x, 'ln_f') @ basis
    logits = linear(x, 'head', config.stripe_head)
    counts[-1] += basis.size if config.bases and not dense else 0
    if config.shortlist and not dense:
        listed = logits > logits.max(1, keepdims=True) - refinements.MARGIN_SCALE * p['head.margin']
        logits[listed] = (x @ p['head.weight'])[listed]
        counts[-1] += config.n_embd * listed.sum(1)
    return logits, np.stack(counts)


def check_forward(model, dense):
    """Logits and counts of a small_model() against forward_in_numpy()."""
    tokens = random_tokens(2, 12)
    logits, active = model(tokens, dense=dense)
    assert active.shape == (9, 2, 12) and len(model.sparse_layers()) == 9
    for b in range(2):
        expected, counts = forward_in_numpy(model, tokens[b].numpy(), dense)
        np.testing.assert_allclose(logits[b].detach(), expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(active[:, b].detach(), counts)
        counts[-1] -= model.config.n_embd ** 2 if model.config.bases and not dense else 0
        share = counts.mean(1) / [layer.n_weights for _, layer in model.sparse_layers()]
        assert (share == 1).all() if dense else (0.1 < share).all() and (share < 0.95).all()


@pytest.mark.parametrize('dense', [False, True])
@pytest.mark.parametrize('arch, changes', [
    ('gpt2', {}), ('gpt2', {'bias': False, 'n_kv_head': 2}), ('llama', {}), ('llama', {'n_kv_head': 4}),
    ('llama', {'n_kv_head': 1, 'rope_scaling': (8.0, 1.0, 4.0, 16), 'norm_eps': 1e-2})])
def test_forward_against_numpy(arch, changes, dense):
    """
    Logits and counts. Every weight used is counted one by one: earlier code counted padded columns. Biases
    are random: the fast path of earlier code added them twice, which shows only in models that have some.
    """
    model = small_model(arch, **changes)
    check_forward(model, dense)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    assert model.n_weights() == sum(p.numel() for name, p in matrices.items()
                                    if not name.endswith('theta') and not name.startswith('wpe'))


def test_rotation_with_the_scaling_of_llama_3():
    """
    With Llama-3.2-1B's own numbers, and beyond its original context of 8,192. Halves of a head turn together.
    """
    scaled = {'n_embd': 256, 'rope_theta': 500000.0, 'rope_scaling': (32.0, 1.0, 4.0, 8192)}
    config = CWICConfig(**{**SIZES, **LLAMA, **scaled})
    positions = torch.tensor([0, 1, 2000, 20000])
    cos, sin = cwic.rotary_tables(config, positions)
    angles = np.outer(positions, rotary_frequencies(config))
    np.testing.assert_allclose(cos[:3], np.cos(angles[:3]), atol=3e-4)
    np.testing.assert_allclose(sin[:3], np.sin(angles[:3]), atol=3e-4)
    heads = torch.randn(2, 4, 4, 64)
    turned = (heads[..., :32].numpy() + 1j * heads[..., 32:].numpy()) * (cos.numpy() + 1j * sin.numpy())
    turned = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(cwic.apply_rope(heads, cos, sin), turned, atol=1e-6)
    # so far out f32 has no digits left for the fast ones
    np.testing.assert_allclose(sin[3, 8:], np.sin(angles[3, 8:]), atol=3e-3)


@BOTH
def test_same_answer_in_any_order_of_train_eval_load_and_to(arch):
    """Earlier code kept mu @ W, which went stale after train, eval, load_state_dict or .to()."""
    source, tokens = small_model(arch, seed=1), random_tokens(1, 8)
    expected, expected_active = source(tokens)
    model = small_model(arch, seed=2, thresholds=0.3)
    model(tokens)
    model.train()(tokens)
    model.eval()(tokens)
    model.load_state_dict(source.state_dict())
    logits, active = model.to(torch.float64).to(torch.float32)(tokens)
    assert torch.equal(logits, expected) and torch.equal(active, expected_active)
    assert torch.equal(model.train()(tokens)[0], expected)


@BOTH
def test_every_layer_starts_at_the_same_threshold(arch):
    """
    A threshold option once did not reach one inner layer, so one matrix per block started elsewhere. Weights
    start at .02, but those that add to the residual stream smaller, the deeper the model.
    """
    model = GPT(CWICConfig(**{**SIZES, 'n_embd': 64, 'n_hidden': 100, 'n_layer': 8}, arch=arch))
    for name, p in model.named_parameters():
        if p.dim() > 1 and not name.endswith('theta'):
            smaller = name.endswith(('attn.out.weight', 'mlp.down.weight', 'neurons.down'))
            assert abs(float(p.detach().std()) / (0.02 / 4 if smaller else 0.02) - 1) < 0.1, name
    for _, layer in model.sparse_layers():
        layer.sigma.fill_(1.0)
        stripes = 1 if isinstance(layer, Neurons) else math.ceil(layer.n_out / layer.stripe)
        assert torch.equal(layer.thresholds(), torch.zeros(stripes, layer.n_in))
        assert layer.scale == 10 * math.sqrt(layer.n_in)


@BOTH
@pytest.mark.parametrize('block_size', [16, 1])
def test_cached_generation_equals_uncached(arch, block_size):
    """
    Token for token, compute for compute, also past the context, which slides twice and more: against a loop
    that reads the whole context for each token, and draws with numpy. With a context of one token it slides at
    every step, to its own half: that was no token at all.
    """
    model = small_model(arch, block_size=block_size)
    for seed in range(2):
        context = random_tokens(5, seed=seed).tolist()
        said = list(cwic.generate(model, context, 30, 0.7, torch.Generator().manual_seed(seed)))
        context, generator = context[-block_size:], torch.Generator().manual_seed(seed)
        assert len(said) == 30
        for token, active in said:
            if len(context) > block_size:
                context = context[-max(block_size // 2, 1):]
            logits, expected = model(torch.tensor([context]))
            p = np.exp(logits[0, -1].detach().double().numpy() / 0.7)
            assert token == np.searchsorted(p.cumsum() / p.sum(), torch.rand(1, generator=generator).item())
            assert torch.allclose(active, expected[:, 0, -1], atol=28)      # an input at its threshold, by rounding
            context.append(token)


def test_generate_is_greedy_by_default_and_reads_each_token_once():
    model, prompt, read = small_model(), random_tokens(6).tolist(), []
    hook = model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    generated = list(cwic.generate(model, prompt, 8))
    hook.remove()
    assert read == [6] + [1] * 7
    for token, active in generated:
        logits, expected = model(torch.tensor([prompt]))
        assert token == int(logits[0, -1].argmax()) and torch.equal(active, expected[:, 0, -1])
        prompt.append(token)


@BOTH
def test_cache_in_pieces_equals_one_pass(arch):
    """
    Prefilling two sequences in pieces, then token by token: the logits and the compute of one pass over all.
    """
    model, tokens = small_model(arch), random_tokens(2, 12)
    whole, whole_active = model(tokens)
    cache = KVCache(model.config, batch=2)
    pieces = [model(piece, cache) for piece in tokens.split([5, 4, 1, 1, 1], dim=1)]
    assert torch.allclose(torch.cat([logits for logits, _ in pieces], 1), whole, atol=1e-4)
    assert torch.equal(torch.cat([active for _, active in pieces], 2), whole_active)
    assert cache.length == 12 and cache.k.shape == (2, 2, model.config.n_kv_head, 16, 4)


@pytest.mark.parametrize('changes', [
    {'n_layer': 0}, {'n_head': 3}, {'n_kv_head': 3}, {'n_kv_head': -1}, {'stripe_head': 0}, {'norm_eps': 0.0},
    {'norm_eps': math.nan}, {'arch': 'bert'}, {'arch': 'llama', 'n_embd': 12},
    {'arch': 'llama', 'rope_theta': -1.0}])
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ValueError, match=next(reversed(changes))):
        CWICConfig(**{**SIZES, **changes})


# -----------------------------------------------------------------------------
# losses and the optimiser's groups


def test_kl_loss_against_its_definition():
    a, b = torch.randn(2, 6, 11, dtype=torch.float64)
    q, p = a.softmax(-1), b.softmax(-1)         # student, teacher
    forward, backward = ((x * (x / y).log()).sum(-1).mean() for x, y in ((p, q), (q, p)))
    for reverse, expected in ((0.5, (forward + backward) / 2), (0, forward), (1, backward)):
        assert abs(float(cwic.kl_loss(a, b, reverse)) - float(expected)) < 1e-5
        assert float(cwic.kl_loss(a, a, reverse)) == 0


def test_price_is_the_slope_of_the_flop_loss():
    """And when nothing at all was active, training ended with a ZeroDivisionError."""
    def loss(active):
        return max(3 - 1000 / active, 0) ** 2

    for active in (300.0, 334.0, 500.0, 1000.0):
        assert float(cwic.flop_loss(torch.tensor(active), 1000, 3)) == pytest.approx(loss(active), rel=1e-4)
        slope = (loss(active + 1e-4) - loss(active - 1e-4)) / 2e-4
        assert cwic.price(active, 1000, 3) == pytest.approx(slope, rel=1e-5, abs=1e-12)
    assert cwic.price(300.0, 1000, 3) == 0                                  # beyond the target: no price
    assert cwic.price(0.0, 1000, 3) == 0 == float(cwic.flop_loss(torch.tensor(0.0), 1000, 3))


@BOTH
def test_thresholds_are_never_decayed_and_each_parameter_is_in_one_group(arch):
    """Weight decay on thresholds pulled them to 0 against the compute loss."""
    model = small_model(arch)
    model.ln_f.requires_grad_(False)
    matrices, others, thetas = model.parameter_groups(1e-3, 1e-2, 0.1)
    assert matrices['weight_decay'] == 0.1 and others['weight_decay'] == thetas['weight_decay'] == 0
    assert matrices['lr'] == others['lr'] == 1e-3 and thetas['lr'] == 1e-2
    assert {id(p) for p in thetas['params']} == {id(layer.theta) for _, layer in model.sparse_layers()}
    assert all(p.dim() == 2 for p in matrices['params']) and all(p.dim() == 1 for p in others['params'])
    grouped = [id(p) for group in (matrices, others, thetas) for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(grouped) < len(list(model.parameters()))


def test_a_threshold_moves_at_most_half_its_bandwidth_and_stays_above_the_floor():
    """One large step once carried thresholds far past every input they had felt, for good."""
    layer = StripedLinear(1000, 2, 1, bias=False)
    before = torch.rand(2, 1000) * 0.2 / layer.scale
    wanted = before + torch.randn(2, 1000) * 0.1 / layer.scale
    with torch.no_grad():
        layer.theta.copy_(wanted)
    cwic.limit_thresholds([layer], [before])
    most = BANDWIDTH / 2 / layer.scale
    expected = np.clip(wanted.numpy(), before.numpy() - most, before.numpy() + most)
    expected = np.maximum(expected, np.float32(cwic.FLOOR / layer.scale))
    np.testing.assert_allclose(layer.theta.detach(), expected, rtol=1e-6)
    assert (wanted - before > most).any() and expected.min() == np.float32(cwic.FLOOR / layer.scale)


# -----------------------------------------------------------------------------
# LoRA


def train_a_little(model):
    """Three optimiser steps, on anything."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 1e-3, 0.1))
    for seed in range(3):
        tokens = random_tokens(2, 16, seed=seed)
        logits, active = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + 1e-4 * active.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@BOTH
def test_lora_trains_and_its_base_does_not(arch):
    """At first nothing changes; in three steps thresholds and adapters do, and not a bit of anything else."""
    base, model, tokens = small_model(arch), small_model(arch), random_tokens(1, 16)
    cwic.add_lora(model, rank=3)
    assert all(torch.equal(a, b) for a, b in zip(model(tokens), base(tokens)))
    train_a_little(model)
    state, old = model.state_dict(), base.state_dict()
    changed = {name for name in old if not torch.equal(state[name], old[name])}
    assert changed == {name for name in old if name.endswith('theta')}
    assert all(state[name].abs().max() > 0 for name in state if name.endswith('.B'))
