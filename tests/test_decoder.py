"""decoder.py: the kernel's whole step against the model in PyTorch, token by token."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import refinements
from cwic import GPT, CWICConfig, Neurons, add_lora, generate, merge_lora
from decoder import Decoder, PackedMatrix, TorchDecoder, quantise, usable_cores

torch.set_num_threads(1)        # tiny matrices: more threads only wait for each other

SIZES = {'gpt2': dict(n_head=3, n_embd=51, stripe_up=204, stripe_down=7),
         'llama': dict(arch='llama', n_head=6, n_kv_head=2, n_embd=60, n_hidden=101, stripe_up=40)}


def random_model(arch='gpt2', share=None, **changes):
    """
    A small model with odd widths and stripes, random statistics and biases. share: of the thresholds, how many are 0; the
    others are out of reach, so no rounding can change what is active. None: thresholds like a trained model's.
    """
    torch.manual_seed(0)
    config = CWICConfig(**{**dict(vocab_size=307, block_size=32, n_layer=2, stripe_qkv=51, stripe_out=20,
                                  stripe_head=100), **SIZES[arch], **changes})
    model = GPT(config).eval()
    with torch.no_grad():
        if config.bases:
            refinements.find_bases(model, torch.randint(config.vocab_size, (8, config.block_size)))
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        if config.shortlist:
            model.head.margin.fill_(0.5 / refinements.MARGIN_SCALE)
        for _, layer in model.sparse_layers():
            neurons = isinstance(layer, Neurons)
            layer.sigma.fill_(0.05 if neurons and share is None else 1)
            if not neurons:
                layer.mu.normal_(0, 0.1)
            t = torch.rand(layer.theta.shape)
            layer.theta.copy_((t if share is None else torch.where(t < share, 0, 1e9)) / layer.scale)
    return model


def random_tokens(model, count):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, count).tolist()


@pytest.mark.parametrize('changes', [dict(arch='gpt2'), dict(arch='gpt2', bias=False), dict(arch='llama'),
                                     dict(arch='llama', n_kv_head=6), dict(arch='llama', n_kv_head=1),
                                     dict(arch='gpt2', bases=True), dict(arch='llama', bases=True),
                                     dict(arch='gpt2', shortlist=True), dict(arch='llama', shortlist=True, bases=True)])
@pytest.mark.parametrize('share', [0, 0.5, 1])
@pytest.mark.parametrize('dense', [False, True])
def test_step_equals_the_model(changes, share, dense):
    """
    Logits of a prompt and of every step are within 1e-4 of the largest, and all active counts are equal. The kernel
    computes only the last logits of a prompt, so there is no shortlist for the tokens before. Prints the largest difference.
    """
    model = random_model(share=share, **changes)
    no_list = copy.deepcopy(model)
    if model.config.shortlist:
        no_list.head.margin.data.fill_(-1)
    no_list = TorchDecoder(no_list, dense)
    reference, decoder = TorchDecoder(model, dense), Decoder(model, 'f32', 2, dense)
    tokens, worst = random_tokens(model, 28), 0
    for read in [lambda d: d.prefill(tokens[:5]), lambda d: d.extend(tokens[5:9])] + [
            lambda d, token=token: d.step(token) for token in tokens[9:]]:
        (want, want_active), (logits, active) = read(reference), read(decoder)
        _, rough_active = read(no_list)
        if active.ndim > 1:
            want_active[:-1] = rough_active[:-1]
        if model.config.shortlist and not dense:
            listed = (want_active - rough_active).reshape(-1, len(decoder.names))[-1]
            assert not listed[:-1].any() and 0 < listed[-1] <= decoder.n_weights[-1] * (1 if share == 0 else 0.99)
            assert listed[-1] % model.config.n_embd == 0
        assert active.dtype == np.int64 and active.shape == want_active.shape and (active == want_active).all()
        assert not dense or (active == decoder.n_weights).all()
        worst = max(worst, np.abs(logits - want).max() / np.abs(want).max())
    print(f'largest difference {worst:.1e}')
    assert worst < 1e-4


@pytest.mark.parametrize('arch', SIZES)
def test_counts_differ_only_within_rounding_of_a_threshold(arch):
    """
    An input may be so near its threshold that the order of a sum decides. If counts differ, the first matrix in which
    they do must have such an input.
    """
    model = random_model(arch)
    inputs, equal = {}, 0
    for name, layer in model.sparse_layers():
        layer.register_forward_hook(lambda layer, args, out, name=name: inputs.__setitem__(name, args[0][0]))
    for start in range(20):
        tokens = random_tokens(model, 20 + start)[start:]
        (want, want_active), (logits, active) = TorchDecoder(model).prefill(tokens), Decoder(model).prefill(tokens)
        if (active == want_active).all():
            equal += 1
            assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()
            continue
        token, matrix = sorted(np.argwhere(active != want_active).tolist(), key=lambda at: at[1])[0]
        name, layer = model.sparse_layers()[matrix]
        assert ((inputs[name][token] - layer.mu).abs() - layer.thresholds()).abs().min() < 1e-5
    assert equal > 10


@pytest.mark.parametrize('arch, changes', [('gpt2', {}), ('llama', {}), ('llama', {'bases': True, 'shortlist': True})])
@pytest.mark.parametrize('dtype', ['f32', 'bf16', 'int8'])
def test_prefill_equals_steps_to_the_bit(arch, changes, dtype):
    """Whether the kernel reads many tokens at once or one after the other, and with any number of threads."""
    model = random_model(arch, block_size=200, **changes)
    layers = 4 * model.config.n_layer               # without the head: only the last token of a prompt has a shortlist
    tokens = random_tokens(model, 150)                                  # more than the kernel reads in one go
    steps = Decoder(model, dtype, 1)
    actives = [steps.step(token) for token in tokens]
    for threads in (1, 2, 3):
        decoder = Decoder(model, dtype, threads)
        logits, active = decoder.prefill(tokens[:140])
        assert np.array_equal(logits, actives[139][0])
        assert np.array_equal(active[-1], actives[139][1])
        assert np.array_equal(active[:, :layers], [active[:layers] for _, active in actives[:140]])
        assert (active[:, layers] <= [active[layers] for _, active in actives[:140]]).all()
        logits, active = decoder.extend(tokens[140:])
        assert np.array_equal(logits, actives[-1][0]) and np.array_equal(active[-1], actives[-1][1])


@pytest.mark.parametrize('arch, bases', [('gpt2', False), ('llama', False), ('llama', True)])
@pytest.mark.parametrize('dtype, bound', [('f32', 1e-4), ('bf16', 0.02), ('int8', 0.05)])
def test_narrow_weights_change_logits_little_and_thresholds_not_at_all(arch, bases, dtype, bound):
    """So the first matrix uses the same inputs in every format."""
    model = random_model(arch, 0.5, bases=bases)
    reference, decoder = TorchDecoder(model), Decoder(model, dtype)
    (want, want_active), (logits, active) = reference.prefill([1, 2, 3]), decoder.prefill([1, 2, 3])
    assert (active[:, 0] == want_active[:, 0]).all()
    assert np.abs(logits - want).max() < bound * np.abs(want).max()


@pytest.mark.parametrize('scaling', [(), (8.0, 1.0, 4.0, 512.0)])
def test_rotary_positions_keep_their_precision_far_out(scaling):
    """Logits at position 2,000 are within 1e-4 of PyTorch's, with Llama 3's scaling too."""
    model = random_model('llama', 1, block_size=2048, n_layer=1, rope_theta=100000.0, rope_scaling=scaling)
    tokens = random_tokens(model, 2001)
    with torch.no_grad():
        want = model(torch.tensor([tokens]))[0][0, -1].numpy()
    logits, _ = Decoder(model).prefill(tokens)
    assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()


def test_quantise_is_within_half_a_step():
    """Each row reaches 127 in units of its scales; zeros stay zeros."""
    rows = torch.randn(9, 23) * torch.logspace(-3, 2, 9)[:, None] * torch.logspace(2, -1, 23)
    rows[4] = 0
    column_scale = rows.abs().amax(0)
    integers, row_scale = quantise(rows, column_scale)
    scale = row_scale[:, None] * column_scale
    assert ((integers * scale - rows).abs() <= scale * 0.5001).all()
    assert torch.equal(integers, integers.round())
    assert integers.abs().amax(1).tolist() == [127] * 4 + [0] + [127] * 4


def test_a_large_weight_does_not_coarsen_other_stripes_or_columns():
    """In int8 there is a row scale for each (input, stripe) pair, which the stripe's tiles share, and a column scale."""
    model = random_model(vocab_size=9000, stripe_head=4500, n_layer=1)
    with torch.no_grad():
        model.head.weight.clamp_(-1, 1)
        model.head.weight[0] = torch.ones(9000)
        model.head.weight[3, 4400] = 1000                               # in the last of two tiles of the first stripe
        want = model.head.weight[3].abs()
    packed = PackedMatrix(model.head, 'int8')
    assert packed.sizes['tile'] == 2250
    row_scale, column_scale = packed.tensors['row_scale'], packed.tensors['column_scale']
    assert column_scale[4400] == 1000 and (column_scale[:4400] == 1).all()
    assert row_scale.shape == (2, 51) and row_scale[0, 3] == pytest.approx(1 / 127)
    assert row_scale[1, 3] == pytest.approx(float(want[4500:].max()) / 127)


@pytest.mark.parametrize('arch', SIZES)
@pytest.mark.parametrize('make', [TorchDecoder, Decoder])
def test_a_full_context_slides_as_in_generate(make, arch):
    """100 greedy tokens in a context of 32 are those of generate()."""
    model = random_model(arch, 0.5)
    prompt = random_tokens(model, 7)
    decoder = make(model)
    logits, active = decoder.prefill(prompt)
    active = active[-1]
    for token, want in generate(model, prompt, 100):
        assert int(logits.argmax()) == token
        assert (active == want.numpy()).all()
        logits, active = decoder.step(token)


@pytest.mark.parametrize('make', [TorchDecoder, Decoder])
def test_extend_equals_steps_across_the_end_of_the_context(make):
    """The same window, logits and counts."""
    model = random_model(share=0.5)
    tokens = random_tokens(model, 90)
    one, other = make(model), make(model)
    steps = [one.step(token) for token in tokens]
    logits, active = other.extend(tokens)
    assert one.window == other.window and len(one.window) < 32
    assert np.allclose(logits, steps[-1][0], atol=1e-4) and (active == [active for _, active in steps]).all()


def test_only_the_end_of_a_long_prompt_is_read_and_counted():
    model = random_model(share=1)
    tokens = random_tokens(model, 50)
    decoder = Decoder(model)
    logits, active = decoder.prefill(tokens)
    assert active.shape == (32, 9)
    with torch.no_grad():
        want, _ = model(torch.tensor([tokens[-32:]]))
    assert np.allclose(logits, want[0, -1], atol=1e-4)
    again, _ = decoder.prefill(tokens)                                  # the old sequence is forgotten
    assert np.array_equal(again, logits)


def test_a_decoder_is_a_snapshot_of_the_model():
    """
    A cached mu @ W went stale when the weights changed later. Now it belongs to the decoder: a new one has the new weights,
    bias and mu, and an old one keeps the old ones.
    """
    model = random_model(share=0.5)
    old = Decoder(model)
    before, _ = old.prefill([1, 2])
    with torch.no_grad():
        for _, layer in model.sparse_layers():
            layer.mu.add_(0.5)
            layer.weight.mul_(1.5)
            if layer.bias is not None:
                layer.bias.add_(1)
    assert np.allclose(Decoder(model).prefill([1, 2])[0], TorchDecoder(model).prefill([1, 2])[0], atol=1e-4)
    assert np.array_equal(old.prefill([1, 2])[0], before)


@pytest.mark.parametrize('arch', SIZES)
def test_lora_is_merged_when_packed(arch):
    model = random_model(arch, 0.5)
    add_lora(model, 3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('.B'):
                p.normal_(0, 0.1)
    logits, _ = Decoder(model).prefill([1, 2, 3])
    assert np.allclose(logits, TorchDecoder(model).prefill([1, 2, 3])[0], atol=1e-4)
    merge_lora(model)
    assert np.allclose(logits, Decoder(model).prefill([1, 2, 3])[0], atol=1e-4)


@pytest.mark.parametrize('arch', SIZES)
def test_long_context_and_tiny_models(arch):
    """A context wider than any layer, one layer, stripes of 1 and of everything: scratch memory must suffice."""
    tiny = dict(n_embd=1, n_head=1, n_hidden=1) if arch == 'gpt2' else dict(n_embd=2, n_head=1, n_kv_head=1, n_hidden=1)
    for changes in (dict(block_size=600, n_embd=8, n_head=1, n_kv_head=1, n_layer=1, vocab_size=3), dict(tiny, stripe_qkv=1),
                    dict(stripe_head=1, stripe_up=1), dict(stripe_qkv=9999, stripe_head=9999, vocab_size=5000),
                    dict(block_size=1), dict(n_embd=200, n_head=2, n_kv_head=2, stripe_up=9999, stripe_down=9999)):
        model = random_model(arch, 0.5, **changes)
        reference, decoder = TorchDecoder(model), Decoder(model, threads=2)
        for token in random_tokens(model, min(model.config.block_size, 300)):
            (want, want_active), (logits, active) = reference.step(token), decoder.step(token)
            assert (active == want_active).all() and np.allclose(logits, want, atol=1e-4, rtol=1e-4)


def test_impossible_arguments_are_refused_and_the_window_stays():
    """They are refused in Python, before they reach C."""
    model = random_model()
    for wrong in (dict(dtype='f16'), dict(threads=0), dict(threads=5000)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Decoder(model, **wrong)
    with pytest.raises(ValueError, match='only a model in f32'):
        Decoder(random_model().double())
    for decoder in (Decoder(model), TorchDecoder(model)):
        want = decoder.prefill([1, 2, 3])[0]
        for wrong, message in (([], 'at least one token'), ([1, -1], 'not one of the 307'), ([307], 'not one of the 307')):
            for read in (decoder.prefill, decoder.extend):
                with pytest.raises(ValueError, match=message):
                    read(wrong)
        with pytest.raises(ValueError, match='not one of the 307'):
            decoder.step(307)
        assert decoder.window == [1, 2, 3]
        logits = decoder.step(4)[0]
        decoder.prefill([1, 2, 3])
        assert np.array_equal(decoder.step(4)[0], logits) and not np.array_equal(logits, want)


def test_threads_end_with_their_decoder_or_when_their_number_changes():
    """More threads than cores only take turns."""
    model = random_model()
    threads = lambda: len(list(Path('/proc/self/task').iterdir())) if Path('/proc/self/task').exists() else 0
    before = threads()
    for _ in range(10):
        decoder = Decoder(model, threads=5)
        decoder.prefill([1])
        decoder.set_threads(3)
        assert decoder.threads == 3 and (not before or threads() == before + 2)
        decoder.step(2)
        del decoder
    assert threads() == before


@pytest.mark.parametrize('group, limits, cores', [
    ('0::/', {}, 6), ('0::/', {'': 'max 100000'}, 6), ('0::/', {'': '50000 100000'}, 1), ('0::/', {'': '900000 100000'}, 6),
    ('12:cpu:/old\n0::/a/b', {'a': '200000 100000', 'a/b': 'max 100000'}, 2),
    ('0::/a/b', {'a': '400000 100000', 'a/b': '250000 100000', 'c': '100000 100000'}, 2), ('12:cpu:/old', {'': '50000 100000'}, 6)])
def test_threads_respect_a_containers_cpu_quota(group, limits, cores, tmp_path, monkeypatch):
    """Two threads under a quota of half a core ran at 0.69 of the speed of one."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(6)))
    assert usable_cores(tmp_path) == 6                      # no cgroups
    (tmp_path / 'proc' / 'self').mkdir(parents=True)
    (tmp_path / 'proc' / 'self' / 'cgroup').write_text(group + '\n', encoding='utf-8')
    for name, text in limits.items():
        (tmp_path / 'sys' / 'fs' / 'cgroup' / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'sys' / 'fs' / 'cgroup' / name / 'cpu.max').write_text(text + '\n', encoding='utf-8')
    assert usable_cores(tmp_path) == cores
