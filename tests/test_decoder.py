"""decoder.py: the kernel's whole step against the model in PyTorch, token by token."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import build_kernel
from cwic import GPT, CWICConfig, KVCache, generate
from decoder import Decoder, Packed, TorchDecoder, quantise

torch.set_num_threads(1)        # tiny matrices: more threads only wait for each other, long where a neighbour has their core

try:
    KERNEL = build_kernel.load()
except build_kernel.KernelUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


def random_model(share=None, **changes):
    """
    A small model with odd widths and stripes, random statistics and biases. share: of thresholds that are 0, the others being
    out of reach, so that no rounding can change what is active; None: thresholds like a trained model's.
    """
    torch.manual_seed(0)
    config = CWICConfig(**{**dict(vocab_size=307, block_size=32, n_layer=2, n_head=3, n_embd=51, stripe_qkv=51, stripe_out=20,
                                  stripe_up=204, stripe_down=7, stripe_head=100), **changes})
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        for _, linear in model.linears():
            linear.mu.normal_(0, 0.1)
            linear.sigma.fill_(1)
            t = torch.rand(linear.theta.shape)
            linear.theta.copy_((t if share is None else torch.where(t < share, 0, 1e9)) / linear.scale)
    return model


def random_tokens(model, count):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, count).tolist()


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('share', [0, 0.5, 1])
@pytest.mark.parametrize('threads', [1, 2])
def test_step_equals_the_model(bias, share, threads):
    """Logits of every step to 1e-4 of the largest, all active counts exactly; prints the largest difference."""
    model = random_model(share, bias=bias)
    reference, decoder = TorchDecoder(model), Decoder(model, 'f32', threads)
    tokens, worst = random_tokens(model, 28), 0
    reference.prefill(tokens[:5])
    decoder.prefill(tokens[:5])
    for token in tokens[5:]:
        (want, want_active), (logits, active) = reference.step(token), decoder.step(token)
        assert active.dtype == np.int64 and (active == want_active).all()
        worst = max(worst, np.abs(logits - want).max() / np.abs(want).max())
    print(f'largest difference {worst:.1e}')
    assert worst < 1e-4


def test_thresholds_within_rounding():
    """
    With thresholds everywhere, an input may lie so near one that the order of a sum decides. Each step starts from the same
    cache; where counts differ, the first matrix where they do must have an input that is within rounding of a threshold.
    """
    model = random_model()
    reference, decoder = TorchDecoder(model), Decoder(model, 'f32', 2)
    inputs = {}
    for name, linear in model.linears():
        linear.register_forward_hook(lambda module, args, out, name=name: inputs.__setitem__(name, args[0][0, -1].clone()))
    tokens, equal = random_tokens(model, 200), 0
    reference.prefill(tokens[:1])
    decoder.prefill(tokens[:1])
    for token in tokens[1:]:
        decoder.cache.k.copy_(reference.cache.k)
        decoder.cache.v.copy_(reference.cache.v)
        (logits, active), (want, want_active) = decoder.step(token), reference.step(token)
        if (active == want_active).all():
            equal += 1
            assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()
        else:
            name, linear = model.linears()[int((active != want_active).argmax())]
            assert ((inputs[name] - linear.mu).abs() - linear.thresholds()).abs().min() < 1e-5
    assert equal > 190


@pytest.mark.parametrize('dtype, bound', [('f32', 1e-4), ('bf16', 0.02), ('int8', 0.05)])
def test_formats(dtype, bound):
    """Narrower weights change the logits by little, and thresholds not at all: the first matrix's active set is the same."""
    model = random_model(0.5)
    reference, decoder = TorchDecoder(model), Decoder(model, dtype)
    reference.prefill([1, 2])
    decoder.prefill([1, 2])
    (want, want_active), (logits, active) = reference.step(3), decoder.step(3)
    assert active[0] == want_active[0]
    assert np.abs(logits - want).max() < bound * np.abs(want).max()


def test_quantise():
    """Every weight within half a step of its own (input, stripe) scale; zeros stay zeros; the last stripe may be narrower."""
    weight = torch.randn(9, 23) * torch.logspace(-3, 2, 9)[:, None]
    weight[4, 10:20] = 0
    small, scale = quantise(weight, 10)
    assert small.dtype == torch.int8 and scale.shape == (3, 9)
    wide = scale.repeat_interleave(10, 0)[:23].t()                      # (in, out)
    assert ((small * wide - weight).abs() <= wide * 0.5001).all()
    assert (small[4, 10:20] == 0).all()


@pytest.mark.parametrize('make', [TorchDecoder, Decoder])
def test_window_slides_as_in_the_reference(make):
    """Past the context length nothing crashes nor drifts: 100 greedy tokens in a context of 32 are generate()'s, compute too."""
    model = random_model(0.5)
    prompt = random_tokens(model, 7)
    decoder = make(model)
    logits, active = decoder.prefill(prompt)
    active = active[-1]
    for token, want in generate(model, prompt, 100):
        assert int(logits.argmax()) == token
        assert (active == want.numpy()).all()
        logits, active = decoder.step(token)


def test_prompt_longer_than_the_context():
    """The last block_size tokens of a long prompt are read, and no more is claimed to have been."""
    model = random_model(1)
    tokens = random_tokens(model, 50)
    decoder = Decoder(model)
    logits, active = decoder.prefill(tokens)
    assert active.shape == (32, 9)
    with torch.no_grad():
        want, _ = model(torch.tensor([tokens[-32:]]))
    assert np.allclose(logits, want[0, -1], atol=1e-4)
    again, _ = decoder.prefill(tokens)                                  # a new sequence each time, the old one forgotten
    assert np.array_equal(again, logits)


@pytest.mark.parametrize('dtype', ['f32', 'bf16', 'int8'])
def test_same_bits_however_many_threads(dtype):
    model = random_model()
    decoders = [Decoder(model, dtype, threads) for threads in (1, 2, 3)]
    for decoder in decoders:
        decoder.prefill([5])
    for token in random_tokens(model, 20):
        steps = [decoder.step(token) for decoder in decoders]
        assert all(np.array_equal(logits, steps[0][0]) and (active == steps[0][1]).all() for logits, active in steps)


def test_is_a_snapshot_made_anew_each_time():
    """
    A cached mu @ W went stale when weights changed after it was made. Here it belongs to the decoder, not to the model: a new
    decoder has the new weights, the bias and mu included.
    """
    model = random_model(0.5)
    Decoder(model).prefill([1])
    with torch.no_grad():
        for _, linear in model.linears():
            linear.mu.add_(0.5)
            linear.weight.mul_(1.5)
            if linear.bias is not None:
                linear.bias.add_(1)
    reference, decoder = TorchDecoder(model), Decoder(model)
    reference.prefill([1])
    decoder.prefill([1])
    assert np.allclose(decoder.step(2)[0], reference.step(2)[0], atol=1e-4)


def test_long_context_and_tiny_models():
    """A context wider than any layer, one head, one layer, stripes of 1 and of everything: the scratch buffers must still fit."""
    for changes in (dict(block_size=600, n_embd=8, n_head=1, n_layer=1, vocab_size=3), dict(n_embd=1, n_head=1, stripe_qkv=1),
                    dict(stripe_head=1, stripe_up=1), dict(stripe_qkv=9999, stripe_head=9999, vocab_size=5000), dict(block_size=1)):
        model = random_model(0.5, **changes)
        reference, decoder = TorchDecoder(model), Decoder(model, threads=2)
        reference.prefill([0])
        decoder.prefill([0])
        for token in random_tokens(model, min(model.config.block_size, 300)):
            (want, want_active), (logits, active) = reference.step(token), decoder.step(token)
            assert (active == want_active).all() and np.allclose(logits, want, atol=1e-4, rtol=1e-4)


def test_what_is_refused():
    """What cannot be is refused in Python, before a pointer is made of it."""
    model = random_model()
    decoder = Decoder(model)
    for wrong in (dict(dtype='f16'), dict(threads=0), dict(threads=5000)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Decoder(model, **wrong)
    with pytest.raises(ValueError, match='at least one token'):
        decoder.prefill([])
    for token in (-1, 307):
        with pytest.raises(ValueError, match='not one of the 307'):
            decoder.prefill([token])
        decoder.prefill([1])
        with pytest.raises(ValueError, match='not one of the 307'):
            decoder.step(token)
    decoder.cache = KVCache(CWICConfig(block_size=5))
    with pytest.raises(ValueError, match='cache must be'):
        decoder.step(1)
    with pytest.raises(ValueError, match='weight must be f32'):
        Packed(KERNEL.ffi, random_model().double().head, 'f32')


def test_many_decoders_and_one_thread_too_many():
    """Threads end with their decoder; more threads than cores only take turns."""
    model = random_model()
    before = len(list(Path('/proc/self/task').iterdir())) if Path('/proc/self/task').exists() else 0
    for _ in range(10):
        decoder = Decoder(model, threads=5)
        decoder.prefill([1])
        decoder.step(2)
        del decoder
    if before:
        assert len(list(Path('/proc/self/task').iterdir())) <= before + 5
