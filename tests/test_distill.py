"""
train.py from a pretrained model: it starts at the exact dense model, its loss goes through the head in
pieces, what --init_from implies, adapters, and torch.compile.
"""

import csv
import glob
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

import cwic
import evaluate
import refinements
import starting
import train
import weights
from checkpoint import load_checkpoint, save_checkpoint
from options import parse_options
import test_train
from test_cwic import BOTH, one_thread, small_model         # noqa: F401  one_thread is a fixture
from test_train import (ROOT, SCHEDULE, SIZES, batch, call, equal, flags, load, new_run, one_line, resume,
                        trained)


def dense_model(arch='gpt2', **changes):
    """
    Random and dense: thresholds at 0, no statistics yet, far from the uniform predictions of a fresh model.
    """
    torch.manual_seed(5)
    llama = {'arch': 'llama', 'n_kv_head': 1} if arch == 'llama' else {}
    sizes = {'vocab_size': 257, **SIZES, **llama, **changes}
    model = cwic.GPT(cwic.CWICConfig(**sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith('theta'):
                p.copy_(torch.randn_like(p) * 0.2 + (name.endswith(('1.weight', '2.weight', 'f.weight'))))
    return model.eval()


@pytest.fixture(scope='session')
def dense(tmp_path_factory):
    """{arch: the path of such a model}"""
    folder = tmp_path_factory.mktemp('dense')
    for arch in ('gpt2', 'llama'):
        save_checkpoint(folder / f'{arch}.safetensors', dense_model(arch), tokenizer={'kind': 'bytes'})
    return {arch: str(folder / f'{arch}.safetensors') for arch in ('gpt2', 'llama')}


def distil(source, data, out, *args):
    """A small run from a model, without dense steps."""
    schedule = {name: value for name, value in SCHEDULE.items() if name != 'dense_steps'}
    return call('--init_from', source, *flags(schedule), '--data', data, '--out', out, *args)


# -----------------------------------------------------------------------------
# the start


@BOTH
@pytest.mark.parametrize('rank', [0, 3])
def test_distillation_starts_at_the_exact_dense_model(arch, rank):
    """
    With statistics and thresholds at 0, nothing is skipped, and the KL to the teacher is 0 up to rounding. One
    layer of each block once started at another threshold; and LoRA with a B that is not 0 would start elsewhere.
    """
    model = dense_model(arch).train()
    if rank:
        cwic.add_lora(model, rank)
    run = new_run(model, batch_size=4, teacher=1.0)
    run.teacher = train.frozen_teacher(run)
    assert not any(x.requires_grad for x in run.teacher.parameters())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.observe(batch(64, vocab=257)[0])
    assert all(float(layer.sigma.min()) > 0 for _, layer in model.sparse_layers())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items()
               if not name.endswith(('mu', 'sigma')))
    loss, active = train.gradients(run, *batch(vocab=257), dense=False, price=0.0)
    assert abs(float(loss)) < 1e-9 and abs(float(active.sum()) / model.n_weights() - 1) < 1e-6
    # far from what a wrong start would give
    run.teacher = small_model(arch, vocab_size=257)
    assert float(train.gradients(run, *batch(vocab=257), dense=False, price=0.0)[0]) > 0.1


def test_the_first_step_of_a_run_is_dense_and_moves_thresholds_a_little(dense, data, tmp_path):
    """No dense step, the KL alone, and thresholds that moved by no more than one step from their floor."""
    assert distil(dense['gpt2'], data, tmp_path, '--eval_every', 1, '--max_steps', 1).returncode == 0
    with open(tmp_path / 'log.csv', encoding='utf-8') as f:
        row = next(csv.DictReader(f))
    assert abs(float(row['loss'])) < 1e-8 and abs(float(row['reduction']) - 1) < 1e-6
    assert float(row['target']) > 1
    model, saved = load_checkpoint(tmp_path / 'last.safetensors')
    assert saved['step'] == 1 and saved['options']['dense_steps'] == 0 and saved['options']['teacher'] == 1
    for _, layer in model.sparse_layers():
        in_sigmas = layer.theta.detach() * layer.scale
        assert cwic.FLOOR * 0.999 <= float(in_sigmas.min())
        assert float(in_sigmas.max()) <= cwic.BANDWIDTH / 2 * 1.001
    assert all(torch.equal(saved['teacher'][name], x) for name, x in dense_model().named_parameters())


def test_a_sparse_step_leaves_the_statistics():
    """
    Masked inputs still get gradient and may drift: some neurons of SmolLM2 grew a hundredfold. Running statistics
    followed them, thresholds too, so they were never used again, and from step 1,400 on the KL rose.
    """
    run = new_run(small_model(), small_model(seed=3), batch_size=4)
    run.model.observe(batch()[0])
    before = [x.clone() for _, layer in run.model.sparse_layers() for x in (layer.mu, layer.sigma)]
    train.train_step(run, *batch(), target=3.0)
    after = [x for _, layer in run.model.sparse_layers() for x in (layer.mu, layer.sigma)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# -----------------------------------------------------------------------------
# the loss, in pieces


@pytest.mark.parametrize('teacher_share, reverse', [(1.0, 0.5), (0.3, 0.5), (1.0, 0.0), (0.3, 0.2)])
@pytest.mark.parametrize('logits_at_once', [1, 16 * 50 * 2, 16 * 50 * 3])
def test_loss_in_pieces_equals_the_plain_one(monkeypatch, teacher_share, reverse, logits_at_once):
    """The logits of a batch never exist all at once; here they do: the loss and every gradient are the same."""
    monkeypatch.setitem(evaluate.LOGITS_AT_ONCE, 'cpu', logits_at_once)
    (tokens, targets), teacher, sizes = batch(5), small_model(seed=3), []
    run = new_run(small_model(), teacher, batch_size=5, teacher=teacher_share, reverse_kl=reverse)
    plain, price = small_model().train(), 1e-4
    run.model.head.register_forward_hook(lambda module, args, out: sizes.append(out[0].shape[:2].numel()))
    loss, active = train.gradients(run, tokens, targets, dense=False, price=price)
    assert max(sizes) * 50 <= max(logits_at_once, 16 * 50) and sum(sizes) == tokens.numel()

    logits, counts = plain(tokens)
    with torch.no_grad():
        logits_teacher, _ = teacher(tokens, dense=True)
    p, q = logits.log_softmax(-1), logits_teacher.log_softmax(-1)
    kl = (reverse * p.exp() * (p - q) + (1 - reverse) * q.exp() * (q - p)).sum(-1).mean()
    expected = teacher_share * kl - (1 - teacher_share) * p.gather(-1, targets[..., None]).mean()
    (expected + price * counts.mean((1, 2)).sum()).backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(active, counts.mean((1, 2)).detach(), rtol=1e-5, atol=0)
    for ours, theirs in zip(run.model.parameters(), plain.parameters(), strict=True):
        atol = 1e-5 * float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=atol)


@pytest.mark.parametrize('sequences, at_once, pieces', [(4, 3, [2, 2]), (6, 4, [3, 3]), (5, 2, [1] * 5), (4, 9, [4])])
def test_the_head_runs_on_pieces_of_one_size(monkeypatch, sequences, at_once, pieces):
    """
    16 sequences went through the head as 5, 5, 5 and 1, and torch.compile compiled again for the last piece; 64
    went as 10 and six times 9, for which it made slower code that takes any size.
    """
    monkeypatch.setitem(evaluate.LOGITS_AT_ONCE, 'cpu', 16 * 50 * at_once)
    run, seen = new_run(small_model()), []
    run.model.head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    train.gradients(run, *batch(sequences), dense=False, price=0.0)
    assert seen == pieces


# -----------------------------------------------------------------------------
# what --init_from implies


def started(**options):
    """(model, options) of a run that was given these options."""
    model, saved, config = starting.pretrained_model(train.TrainConfig(**options), set(options))
    assert saved['tokenizer'] == {'kind': 'bytes'}
    return model, config


@BOTH
def test_init_from_keeps_options_that_were_given(arch, dense):
    """Given values that equal a default were silently ignored: --dense_steps 700, --stripe_up 320."""
    model, config = started(init_from=dense[arch])
    assert (config.dense_steps, config.teacher, config.init_from) == (0, 1.0, dense[arch])
    sizes = asdict(model.config)
    assert {name: getattr(config, name) for name in sizes if hasattr(config, name)} == {
        name: size for name, size in sizes.items() if hasattr(config, name)}
    default = train.TrainConfig()
    model, config = started(init_from=dense[arch], dense_steps=default.dense_steps, teacher=0.0,
                             stripe_up=default.stripe_up, block_size=8)
    assert (config.dense_steps, config.teacher, config.stripe_up) == (700, 0.0, 320)
    # shorter training sequences; the model's context is unchanged
    assert config.block_size == 8 and model.config.block_size == 16


def test_sizes_other_than_the_model_has_are_refused(dense, capsys):
    """--block_size 256 once trained at 16, because 256 is the default."""
    for name, value in (('block_size', 256), ('n_embd', 320), ('bias', False), ('arch', 'llama')):
        with pytest.raises(SystemExit):
            started(init_from=dense['gpt2'], **{name: value})
        assert f'--{name} {value}: {dense["gpt2"]} has' in capsys.readouterr().err


def test_other_stripes_do_not_change_a_dense_model(dense):
    model, config = started(init_from=dense['gpt2'], stripe_up=24, stripe_head=7)
    assert (config.stripe_up, config.stripe_head, config.stripe_qkv) == (24, 7, 16)
    assert model.blocks[0].mlp.up.theta.shape == (3, 16) and model.head.theta.shape == (37, 16)
    assert model.blocks[0].attn.qkv.theta.shape == (3, 16)
    tokens = batch(vocab=257)[0]
    torch.testing.assert_close(model.eval()(tokens)[0], dense_model()(tokens)[0])


def test_sequences_may_be_shorter_than_the_context(dense, data, tmp_path):
    """As for SmolLM2: sequences of 512 tokens, a context of 2,048. That holds for a resumed run too."""
    more = ['--block_size', 8, '--max_steps', 5, '--weight_decay', 0]
    assert distil(dense['gpt2'], data, tmp_path, *more).returncode == 0
    assert resume(tmp_path).returncode == 0
    saved = load(tmp_path)
    assert saved['options']['block_size'] == 8 and saved['config']['block_size'] == 16
    assert torch.equal(saved['model']['wpe.weight'][8:], dense_model().wpe.weight[8:])          # never read


def test_sparse_or_zero_models_and_other_tokenizers_are_refused(dense, data, tmp_path):
    """A sparse model, one whose weights are all 0, another tokenizer than that of the data, or none."""
    assert distil(dense['gpt2'], data, tmp_path / 'a').returncode == 0
    ended = distil(tmp_path / 'a' / 'best.safetensors', data, tmp_path / 'b')
    assert 'is sparse already' in one_line(ended, 2)
    zeros = dense_model().requires_grad_(False)
    for p in zeros.parameters():
        p.zero_()
    for i, (tokenizer, code, words) in enumerate((
            ({'kind': 'bytes'}, 1, 'is a layer all 0?'),
            ({'kind': 'bpe', 'name': 'other'}, 2, 'the model has other'),
            (None, 2, 'the model has None'), (7, 2, 'the model has 7'))):
        save_checkpoint(tmp_path / 'zeros.safetensors', zeros, tokenizer=tokenizer)
        assert words in one_line(distil(tmp_path / 'zeros.safetensors', data, tmp_path / str(i)), code)


def test_a_dense_run_distils_to_its_target(data, tmp_path):
    """A dense run, then a sparse copy of it, which reaches its target and saves its teacher."""
    sizes = {**SIZES, **SCHEDULE, 'target_reduction': 1, 'hold_steps': 40, 'eval_every': 48}
    assert call(*flags(sizes), '--data', data, '--out', tmp_path / 'dense').returncode == 0
    ended = distil(tmp_path / 'dense' / 'best.safetensors', data, tmp_path / 'sparse', *flags({
        'target_reduction': 2, 'ramp_steps': 150, 'hold_steps': 100, 'warmup_steps': 10, 'threshold_lr': 1,
        'lr': 3e-3, 'eval_every': 250, 'eval_windows': 8}))
    assert ended.returncode == 0 and load(tmp_path / 'sparse', 'best.safetensors')['reduction'] > 1.9
    teacher = load(tmp_path / 'dense', 'best.safetensors')['model']
    assert torch.equal(load(tmp_path / 'sparse')['teacher']['head.weight'], teacher['head.weight'])


# -----------------------------------------------------------------------------
# adapters


def base_of(name):
    return load_checkpoint(name)[0]


@pytest.fixture(scope='session', params=['gpt2', 'llama'])
def adapter(request, dense, data, tmp_path_factory):
    """(folder, path of its base) of a whole run with --lora_rank 3."""
    out = tmp_path_factory.mktemp(f'adapter_{request.param}')
    ended = distil(dense[request.param], data, out, '--lora_rank', 3)
    assert ended.returncode == 0 and 'of them trained' in ended.stdout, ended
    return out, dense[request.param]


def test_an_adapter_file_holds_only_what_was_trained(adapter):
    """No weights of the base, as model or as teacher, are in its files; and the base has not changed by a bit."""
    out, base = adapter
    for file in ('best.safetensors', 'last.safetensors'):
        saved = load(out, file)
        assert os.path.normpath(out / saved['base']) == base and not os.path.isabs(saved['base'])
        assert all(name.removesuffix('.scale').endswith(('.A', '.B', 'theta', 'mu', 'sigma'))
                   for name in saved['model'])
    sizes = [x.shape for name, x in saved['model'].items() if '.adapter' in name or name.endswith('theta')]
    optimizer = [x.shape for name, x in saved['optimizer'].items() if name.endswith('exp_avg')]
    assert sorted(optimizer) == sorted(sizes) and not saved['teacher']
    assert load(out, 'best.safetensors')['model']['head.adapter.A'].dtype == torch.int8
    model, _ = weights.load(str(out / 'last.safetensors'), merge=False)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    original = base_of(base).state_dict()
    assert len(frozen) >= 9 and all(torch.equal(p, original[name]) for name, p in frozen.items())
    assert any(float(x.abs().max()) > 0 for name, x in saved['model'].items() if name.endswith('.B'))


def test_a_merged_adapter_computes_with_w_plus_ab(adapter):
    """
    The loaded model computes with W + A @ B, here in numpy's double from the tensors of file and base.
    """
    out, base = adapter
    saved, original = load(out)['model'], base_of(base).state_dict()
    merged, _ = weights.load(str(out / 'last.safetensors'))
    apart, _ = weights.load(str(out / 'last.safetensors'), merge=False)
    changed = 0
    for name, p in merged.named_parameters():
        layer, _, matrix = name.rpartition('.')
        key = f'{layer}.adapter' + ('' if matrix == 'weight' else f'_{matrix}')
        expected = saved.get(name, original.get(name)).double().numpy()
        if f'{key}.A' in saved and not name.endswith(('theta', 'bias')):
            expected = expected + saved[f'{key}.A'].double().numpy() @ saved[f'{key}.B'].double().numpy()
            changed += 1
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert changed == sum(2 if isinstance(layer, cwic.Neurons) else 1 for _, layer in merged.sparse_layers())
    tokens = batch(vocab=257)[0]
    with torch.no_grad():
        for x, y in zip(merged(tokens), apart(tokens)):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_resumed_adapter_equals_the_uninterrupted_one(adapter, data, tmp_path):
    out, base = adapter
    assert distil(base, data, tmp_path, '--lora_rank', 3, '--max_steps', 3).returncode == 0
    assert resume(tmp_path).returncode == 0
    assert equal(trained(tmp_path), trained(out))


def test_a_run_continues_from_an_adapter(adapter, data, tmp_path):
    """
    A long run in pieces: each continues from the thresholds, statistics and LoRA of the last, with the same
    base as teacher, and starts with the reduction that the last one reached.
    """
    out, base = adapter
    source, saved = out / 'best.safetensors', load(out, 'best.safetensors')
    argv = ['--init_from', str(source), '--data', data]
    begun, _ = train.begin(*parse_options(train.TrainConfig, 'train', argv=argv), 'cpu')
    config, state = begun.config, begun.model.state_dict()
    assert (config.init_from, config.lora_rank, config.dense_steps, config.teacher) == (base, 3, 0, 1.0)
    for name, x in saved['model'].items():
        if not name.endswith('.scale'):
            assert equal(state[name], x.float() * saved['model'].get(f'{name}.scale', 1.0))
    reduction = begun.model.n_weights() / float(begun.active.sum())
    assert abs(reduction - saved['reduction']) < 1e-6 and reduction > 1.1
    assert distil(source, data, tmp_path, '--ramp_steps', 0, '--hold_steps', 2).returncode == 0
    assert os.path.normpath(tmp_path / load(tmp_path)['base']) == base and load(tmp_path, 'best.safetensors')['reduction'] > 1.1
    for name, value in (('lora_rank', 2), ('stripe_up', 8), ('n_layer', 2)):
        ended = distil(source, data, tmp_path / 'b', f'--{name}', value)
        assert f'--{name} {value}: {source} has' in one_line(ended, 2)


def test_a_run_continues_at_a_higher_rank_with_the_same_model(adapter, data, tmp_path):
    """More terms A @ B join those that are learned, and change nothing until they are trained."""
    source = adapter[0] / 'best.safetensors'
    begun, _ = train.begin(*parse_options(train.TrainConfig, 'train', argv=[
        '--init_from', str(source), '--data', data, '--lora_rank', '5']), 'cpu')
    for (layer, name, _), (old, _, _) in zip(cwic.adapters(begun.model),
                                             cwic.adapters(weights.load(str(source), merge=False)[0])):
        A, B, old_B = getattr(layer, name).A, getattr(layer, name).B, getattr(old, name).B
        assert A.shape[1] == len(B) == 5 and A[:, 3:].all() and equal(B[:3], old_B) and not B[3:].any()
    tokens = batch(vocab=257)[0]
    with torch.no_grad():
        torch.testing.assert_close(begun.model.eval()(tokens)[0], weights.load(str(source))[0](tokens)[0])
    more = ['--lora_rank', 5, '--ramp_steps', 0, '--hold_steps', 2]
    assert distil(source, data, tmp_path, *more).returncode == 0
    assert load(tmp_path, 'best.safetensors')['model']['head.adapter.B'][3:].any()


@BOTH
def test_an_adapter_with_bases_and_a_shortlist_starts_dense_and_resumes(arch, dense, data, tmp_path, monkeypatch):
    """
    Only its file holds the bases: loading it rotates the base's matrices again. It can be resumed, and another
    run can continue from it. An adapter without bases can get some, of its inputs as it runs, or a shortlist.
    """
    find, looked = refinements.find_bases, []
    monkeypatch.setattr(refinements, 'find_bases', lambda model, tokens, dense: looked.append(dense) or
                        find(model, tokens, dense))
    more = ['--lora_rank', 3, '--bases', '--shortlist', '--eval_every', 1]
    assert distil(dense[arch], data, tmp_path / 'a', *more).returncode == 0
    with open(tmp_path / 'a' / 'log.csv', encoding='utf-8') as f:
        row = next(csv.DictReader(f))
    assert abs(float(row['loss'])) < 1e-6
    model, saved = weights.load(str(tmp_path / 'a' / 'last.safetensors'))
    assert saved['config']['bases'] and not torch.equal(model.basis, refinements.identity(16, 16))
    tokens = batch(vocab=257)[0]
    begun, _ = train.begin(*parse_options(train.TrainConfig, 'train', argv=[
        '--init_from', str(tmp_path / 'a' / 'last.safetensors'), '--data', data]), 'cpu')
    assert begun.config.bases
    with torch.no_grad():
        torch.testing.assert_close(begun.model.eval()(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-4)
        teacher = train.frozen_teacher(begun)(tokens, dense=True)[0]
        torch.testing.assert_close(teacher, base_of(dense[arch])(tokens, dense=True)[0], rtol=1e-4, atol=1e-4)
    assert distil(dense[arch], data, tmp_path / 'b', *more, '--max_steps', 3).returncode == 0
    assert resume(tmp_path / 'b').returncode == 0
    again = weights.load(str(tmp_path / 'b' / 'last.safetensors'))[0]
    for x, y in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert distil(dense[arch], data, tmp_path / 'without', '--lora_rank', 3).returncode == 0
    ended = distil(tmp_path / 'without' / 'best.safetensors', data, tmp_path / 'c', '--bases')
    assert ended.returncode == 0 and not torch.equal(load(tmp_path / 'c')['model']['basis'], refinements.identity(16, 16))
    assert looked == [True, True, False]
    ended = distil(tmp_path / 'without' / 'best.safetensors', data, tmp_path / 'e', '--shortlist')
    assert ended.returncode == 0 and 'head.margin' in load(tmp_path / 'e')['model']
    refused = distil(tmp_path / 'a' / 'best.safetensors', data, tmp_path / 'd', '--no-bases')
    assert '--bases False' in one_line(refused, 2)
    assert 'say which with --init_from' in one_line(call('--bases', '--data', data, '--out', tmp_path / 'd'), 2)


# -----------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize('arch, dense, rank, one_stripe', [
    ('gpt2', True, 0, False), ('gpt2', False, 0, False), ('gpt2', False, 3, True), ('llama', False, 3, True)])
def test_compiling_changes_nothing(arch, dense, rank, one_stripe):
    """
    torch.compile must find one graph in a block and one in the head with its loss, custom backward included,
    and compute the same numbers. With one stripe per matrix a gradient once had the wrong shape, (576) for
    (1, 576).
    """
    stripes = {f'stripe_{name}': 999 for name in ('qkv', 'out', 'up', 'down', 'head')} if one_stripe else {}
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, frozen = small_model(arch, shortlist=bool(rank), **stripes), small_model(arch, seed=3)
        run = new_run(model, frozen, batch_size=8, teacher=0.5)
        if rank:
            cwic.add_lora(model, rank)
        if compiled:
            options = dict(backend='aot_eager', fullgraph=True)     # all of the compiler but what writes C++
            run.head_loss = torch.compile(train.head_loss, **options)
            for block in [*model.blocks, *frozen.blocks]:
                block.compile(**options)
        for _ in range(2):
            loss, active = train.gradients(run, *batch(), price=0.0 if dense else 1e-4, dense=dense)
        gradients = [p.grad for p in run.model.parameters() if p.requires_grad and p.grad is not None]
        assert dense or run.model.head.theta.grad.shape == run.model.head.theta.shape
        results.append([loss, active, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_compile_reaches_head_and_every_block(dense, data, tmp_path, monkeypatch):
    """Also the blocks of the teacher."""
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda f: compiled.append(f) or f)
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module: compiled.append(module))
    ended = distil(dense['gpt2'], data, tmp_path, '--max_steps', 2, '--compile')
    assert ended.returncode == 0 and 'compile takes a minute' in ended.stdout, ended
    assert len(compiled) == 4 and compiled[1] is train.head_loss
    assert [type(x) for x in compiled[2:]] == [cwic.Block, cwic.Block] and compiled[2] is not compiled[3]


def test_compile_without_a_compiler_is_one_line(data, tmp_path):
    """It was a hundred lines of torch, after the data was read and the model made."""
    env = {'CXX': 'no-such-compiler', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    ended = test_train.run('train.py', '--data', data, '--block_size', 16, '--compile', '--out', tmp_path,
                           env=env)
    assert 'C++ compiler' in one_line(ended, 1) and '--compile: does not work here' in ended.stderr


@pytest.mark.parametrize('path', sorted(glob.glob(f'{ROOT}/config/*.toml')), ids=os.path.basename)
def test_presets_are_valid(path):
    """Every option exists and has the right type, and its comment says where it runs and how long."""
    config, given = parse_options(train.TrainConfig, 'train', presets=True, argv=[path])
    assert config.out != 'out' and config.batch_size % config.micro_batch == 0 and 'target_reduction' in given
    with open(path, encoding='utf-8') as f:
        text = f.read()
    assert text.startswith('# ') and ('minutes' in text or 'hours' in text)
