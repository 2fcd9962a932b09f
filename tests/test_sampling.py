"""sampling.py: the frequencies of tokens against exact probabilities, written out one step after the other."""

import math

import numpy as np
import pytest
import torch

from sampling import sample


def exact_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probability of each token, one step after the other as in the docstring."""
    p = np.exp(logits / temperature - np.max(logits / temperature))
    p /= p.sum()
    kept = sorted(range(len(p)), key=lambda i: -p[i])[:top_k or None]
    total, enough = sum(p[i] for i in kept), []
    for i in kept:
        if not enough or sum(p[j] for j in enough) < top_p * total:
            enough.append(i)
    chances = np.array([p[i] if i in enough and p[i] >= min_p * p.max() else 0.0 for i in range(len(p))])
    return chances / chances.sum()


@pytest.mark.parametrize('options', [
    {}, {'temperature': 0.5}, {'temperature': 3.0}, {'top_k': 1}, {'top_k': 4}, {'top_k': 100},
    {'top_p': 0.7}, {'top_p': 0.0}, {'min_p': 0.1}, {'min_p': 1.0},
    {'top_k': 8, 'top_p': 0.9, 'min_p': 0.05, 'temperature': 1.5}])
def test_sampled_frequencies_are_the_exact_ones(options):
    """
    Points at equal distances instead of random ones: tokens come as often as they should, to 1 in 20,000.
    """
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 2
    options = {'temperature': 1.0, **options}
    points = (torch.arange(20000) + 0.5) / 20000
    ids, p = sample(logits.expand(20000, 12), points, **options)
    frequencies = np.bincount(ids, minlength=12) / 20000
    exact = exact_distribution(logits.double().numpy(), **options)
    np.testing.assert_allclose(frequencies, exact, atol=1.1 / 20000)
    np.testing.assert_allclose(p, logits.softmax(-1)[ids], rtol=1e-6)      # whatever the options


def test_temperature_and_min_p_for_each_row_and_greedy():
    logits, points = torch.arange(12.) / 4, (torch.arange(10) + 0.5) / 10
    apart = [sample(logits.expand(10, 12), points, t, top_k=5)[0] for t in (0.5, 2.0)]
    temperatures = torch.tensor([0.5] * 10 + [2.0] * 10)[:, None]
    together, _ = sample(logits.expand(20, 12), points.repeat(2), temperatures, top_k=5)
    assert together.tolist() == torch.cat(apart).tolist() and not apart[0].equal(apart[1])
    floors = torch.tensor([0.0, 0.5]).repeat_interleave(10)[:, None]
    apart = [sample(logits.expand(10, 12), points, 1.0, min_p=min_p)[0] for min_p in (0.0, 0.5)]
    together, _ = sample(logits.expand(20, 12), points.repeat(2), 1.0, min_p=floors)
    assert together.tolist() == torch.cat(apart).tolist() and not apart[0].equal(apart[1])
    # a point is a place between 0 and 1, where each token has its stretch, the lower end included
    stretches = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(3, 5)
    assert sample(stretches, torch.tensor([0.0, 0.5, 1 - 2 ** -24]), 1.0)[0].tolist() == [1, 3, 3]
    ids, p = sample(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([0.999]))       # greedy
    assert ids.tolist() == [1] and abs(float(p) - 1 / (2 + math.exp(-1) + math.exp(-2))) < 1e-6


@pytest.mark.parametrize('options', [{}, {'top_k': 40}, {'top_p': .99}, {'min_p': .01}, {'temperature': .1}])
def test_tokens_of_probability_0_are_never_drawn(options):
    """
    They are the first, the last and some between, and 50,000 probabilities in f32 do not quite sum to 1.
    """
    logits = torch.randn(50000, generator=torch.Generator().manual_seed(0))
    logits[:100], logits[20000:20100], logits[-100:] = -math.inf, -math.inf, -math.inf
    points = torch.cat([torch.tensor([0.0, 1e-45, 1e-8, 0.5, 1 - 2 ** -24, 1 - 1e-6]), torch.rand(20)])
    _, p = sample(logits.expand(len(points), -1), points, **{'temperature': 1.0, **options})
    assert (p > 0).all()


@pytest.mark.parametrize('temperature', [0.2, 1.0, 5.0])
def test_nucleus_sampling_of_a_large_vocabulary_equals_a_full_sort(temperature):
    """Only tokens that may be kept are sorted: a full sort took twice as long as the model."""
    logits = torch.randn(50000, generator=torch.Generator().manual_seed(0)) * 3
    q = (logits.double() / temperature).softmax(-1)
    order = q.argsort(descending=True)
    nucleus = order[:int((q[order].cumsum(0) < 0.9).sum()) + 1]
    points = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    mass = q[nucleus].cumsum(0)
    want = nucleus[torch.searchsorted(mass, points * mass[-1])]
    ids, _ = sample(logits.expand(50, -1), points, temperature, top_p=0.9)
    assert (ids == want).double().mean() > 0.97         # sums in f32 shift a border now and then


def test_repeat_penalty_is_for_the_last_tokens_of_each_row():
    """Greedy, against a loop: positive logits are divided, negative ones multiplied, once however often said."""
    logits, said = torch.randn(40, 30), torch.randint(30, (40, 70))
    said[:, :6] = 29                # too long ago
    ids, p = sample(logits, torch.rand(40), repeat_penalty=1.7, said=said)
    for row, lately, id in zip(logits.tolist(), said[:, 6:].tolist(), ids.tolist()):
        new = [x if i not in lately else x / 1.7 if x > 0 else x * 1.7 for i, x in enumerate(row)]
        assert id == int(np.argmax(new))
    assert p.equal(logits.softmax(-1).gather(-1, ids[:, None])[:, 0])
    none = torch.zeros(40, 0, dtype=torch.long)
    assert sample(logits, torch.rand(40), repeat_penalty=1.7, said=none)[0].equal(logits.argmax(-1))


def test_the_same_random_number_gives_the_same_token():
    """Sampled one row at a time or all at once, with the same points: this is how two models are compared."""
    logits, points = torch.randn(30, 20), torch.rand(30)
    ids, _ = sample(logits, points, temperature=0.8, top_p=0.9)
    for row, point, token in zip(logits, points, ids):
        assert sample(row[None], point[None], temperature=0.8, top_p=0.9)[0].item() == token
