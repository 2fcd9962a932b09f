"""
Bases, the shortlist and fused masks against independent truths: numpy, finite differences, the plain
functions.
"""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

import cwic
import refinements
from test_cwic import (BOTH, check_forward, one_thread, random_tokens,      # noqa: F401  one_thread is a fixture
                       small_model)
from test_train import ROOT

# -----------------------------------------------------------------------------
# the head


@pytest.mark.parametrize('dense', [False, True])
@pytest.mark.parametrize('arch, changes', [
    ('gpt2', {'bases': True}), ('llama', {'bases': True}), ('gpt2', {'shortlist': True}),
    ('llama', {'bases': True, 'shortlist': True})])
def test_forward_against_numpy(arch, changes, dense):
    """Logits and counts, rotations and exact logits included."""
    model = small_model(arch, **changes)
    if 'bases' in changes:
        model.basis.copy_(torch.randn(model.basis.shape))
    if 'shortlist' in changes:
        model.head.margin.data.fill_(0.1 / refinements.MARGIN_SCALE)        # logits are small: a few are exact
    check_forward(model, dense)


def test_margin_gradient_is_that_of_a_ramp():
    """
    The margin's gradient equals finite differences if the step is replaced by a ramp as wide as its
    bandwidth; exact and rough logits get the gradient of the logits they became.
    """
    torch.manual_seed(0)
    rough = torch.randn(50, 400, dtype=torch.float64) * 3
    exact, g, g_active = rough + torch.randn(rough.shape) * 0.3, torch.randn_like(rough), torch.rand(50, dtype=torch.float64)
    gap = rough.max(1, keepdim=True).values - rough

    def smoothed(margin):
        listed = ((margin - gap) / refinements.MARGIN_BANDWIDTH + 0.5).clamp(0, 1)
        return float(((rough + listed * (exact - rough)) * g).sum() + (7 * listed.sum(1) * g_active).sum())

    leaves = [x.clone().requires_grad_() for x in (rough, exact, torch.tensor([3.0]))]
    logits, active = refinements.Shortlist.apply(*leaves, 7)
    ((logits * g).sum() + (active * g_active).sum()).backward()
    listed = gap < 3
    assert torch.equal(logits, torch.where(listed, exact, rough)) and torch.equal(active, 7 * listed.sum(1).double())
    assert torch.equal(leaves[0].grad, torch.where(listed, 0, g)) and torch.equal(leaves[1].grad, torch.where(listed, g, 0))
    slope = (smoothed(3 + 1e-6) - smoothed(3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(float(leaves[2].grad), slope, rtol=1e-4)


# -----------------------------------------------------------------------------
# bases


@BOTH
@pytest.mark.parametrize('rank', [0, 3])
def test_bases_are_principal_components_and_change_nothing_else(arch, rank):
    """
    Dense, the model with bases computes what it did without, LoRA included. The inputs of its head, and those
    of attention's output for each head of values, are no longer correlated, and their variances are the
    eigenvalues that numpy finds. Only these layers have new thresholds and statistics.
    """
    model, tokens = small_model(arch, bases=True, block_size=64), random_tokens(40, 64)
    config, read = model.config, {}
    if rank:
        cwic.add_lora(model, rank)
        for layer, adapter, _ in cwic.adapters(model):
            torch.nn.init.normal_(getattr(layer, adapter).B, std=0.1)
    with torch.no_grad():
        before, inputs = model(tokens, dense=True)[0], {}
        kept = {name: x.clone() for name, x in model.state_dict().items()}
        names = [name for name, _ in model.sparse_layers() if name.endswith(('out', 'head'))]
        model.visit_inputs(tokens, inputs.__setitem__, names)
        refinements.find_bases(model, tokens)
        model.visit_inputs(tokens, read.__setitem__, names)
        after = model(tokens, dense=True)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for name in names:
        heads = 1 if name == 'head' else config.n_kv_head
        for x, y in zip(*(z[name].reshape(-1, heads, config.n_head // heads if heads > 1 else 1,
                                          config.n_embd // (1 if name == 'head' else config.n_head))
                          .transpose(0, 1).flatten(1, 2).double().numpy() for z in (inputs, read))):
            spread = np.cov(y.T)
            np.testing.assert_allclose(spread, np.diag(np.linalg.eigvalsh(np.cov(x.T))), atol=0.02 * spread.max())
    for name, x in model.state_dict().items():
        reads = '.out.' in name or name.startswith('head')
        changed = name.endswith(('basis', 'qkv.bias')) or reads and name.endswith(('mu', 'sigma')) or name.endswith(
            ('weight', 'adapter.A', 'adapter.B')) and ('attn' in name or name.startswith('head'))
        assert not x.any() if reads and name.endswith('theta') else changed or torch.equal(x, kept[name]), name
    for name in names:
        layer, anew = dict(model.sparse_layers())[name], cwic.Thresholds(config.n_embd, 1)
        anew.observe(read[name])
        torch.testing.assert_close(layer.mu, anew.mu, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.sigma, anew.sigma, rtol=1e-4, atol=1e-4)


def test_bases_of_a_sparse_model_are_found_as_it_runs():
    """
    An adapter that got bases later had them found with every weight in use. Inputs that it had learned to
    mask are noise: its KL was .36, where .30 was possible with as much of the head. Here a neuron that is
    always masked has a huge output in one direction, the first component of a dense pass only.
    """
    model, tokens = small_model('llama', bases=True, block_size=64), random_tokens(40, 64)
    neurons = model.blocks[-1].mlp.neurons
    with torch.no_grad():
        neurons.down[0], neurons.theta[0, 0] = 0.0, 1e6
        neurons.down[0, 5] = 1e3
        found = {}
        for dense in (True, False):
            sparse = copy.deepcopy(model)
            refinements.find_bases(sparse, tokens, dense=dense)
            found[dense] = sparse.basis[5].abs()
    assert found[True][-1] > 0.99 and found[False][-1] < 0.9


def test_a_model_without_memory_imports_no_sympy():
    """On the meta device, where checkpoints are checked, torch.eye() imported it: seconds at every start."""
    script = ('import sys, torch, cwic\n'
              "with torch.device('meta'):\n"
              '    model = cwic.GPT(cwic.CWICConfig(bases=True, shortlist=True))\n'
              "print(model.basis.is_meta, 'sympy' in sys.modules)")
    ended = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ['True', 'False']


# -----------------------------------------------------------------------------
# fused masks


@BOTH
def test_fused_masks_compute_the_same(arch):
    """The same masks, outputs and counts to the last bit, and the same gradients."""
    results = []
    for fuse in (False, True):
        model = small_model(arch, stripe_qkv=10).train()
        if fuse:
            refinements.fuse_masks(model)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            logits, active = model(random_tokens(2, 16))
            (logits.square().mean() + 1e-4 * active.sum(0).mean()).backward()
        results.append((logits, active, [p.grad for p in model.parameters()]))
    (logits, active, gradients), (fused_logits, fused_active, fused_gradients) = results
    assert 0 < float(active.detach().sum(0).mean()) < 0.9 * model.n_weights()
    assert torch.equal(logits, fused_logits) and torch.equal(active, fused_active)
    for a, b in zip(gradients, fused_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))


def test_a_compiler_that_fails_later_costs_nothing_but_time(monkeypatch):
    """
    It had worked, then ran out of memory in a backward pass: the steps since the last save were lost, though
    nobody had asked for a compiler. Now the plain functions give the same gradients.
    """
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        if len(graphs) > 1:
            raise MemoryError('Killed\nsignal terminated program cc1plus')
        return graph.forward

    monkeypatch.setattr(torch, 'compile', lambda function, **options: compile(function, backend=backend))
    gradients = []
    for fuse in (False, True):
        model = small_model().train()
        if fuse:
            refinements.fuse_masks(model)
        logits, active = model(random_tokens(2, 16))
        (logits.square().mean() + 1e-4 * active.sum(0).mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert len(graphs) > 1
