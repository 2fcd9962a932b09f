"""Distillation in train.py: it starts at the exact dense model, its loss goes through the head in pieces, and what --init_from implies."""

import csv
import glob
import os
from contextlib import nullcontext

import pytest
import torch

import cwic
import train
from options import parse_options
from test_cwic import small_model
from test_train import ROOT, TINY, data, one_line, run       # data: a fixture

SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, stripe_qkv=16, stripe_out=16, stripe_up=32, stripe_down=16, stripe_head=100)


def dense_model(**changes):
    """A random dense model: thresholds at 0, no statistics yet, far from the uniform predictions of a fresh one."""
    torch.manual_seed(5)
    model = cwic.GPT(cwic.CWICConfig(vocab_size=257, **{**SIZES, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith('theta'):
                p.copy_(torch.randn_like(p) * 0.2 + (name.endswith(('1.weight', '2.weight', 'f.weight'))))
    return model.eval()


@pytest.fixture(scope='module')
def dense_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('dense') / 'dense.pt'
    cwic.save_checkpoint(path, dense_model(), tokenizer={'kind': 'bytes'})
    return str(path)


def batches(count, size=4, vocab=257, block_size=16):
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, vocab, (count, size, block_size + 1), generator=generator)
    return [(r[:, :-1], r[:, 1:]) for r in rows]


def step(model, teacher, tokens, targets, **more):
    """backward() on one batch -> loss, active, sums, gradients."""
    options = dict(dense=False, teacher_share=1.0, price=0.0, share=1.0, recompute=False)
    loss, active, sums = train.backward(model, teacher, tokens, targets, **{**options, **more})
    return [loss, active, *sums, *(p.grad for p in model.parameters())]


# -----------------------------------------------------------------------------
# the start


def test_distillation_starts_at_the_exact_dense_model():
    """
    With warm statistics and thresholds at 0 the sparse model is the dense one computed another way: nothing is skipped, and
    the KL to the teacher is 0 but for rounding. Once a layer inside each block started at another threshold than the others.
    """
    model, tokens = dense_model().train(), batches(1)[0]
    teacher = cwic.dense_copy(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    train.warm_statistics(model, batches(20), 4, nullcontext)
    assert all(float(linear.sigma.min()) > 0 for _, linear in model.linears())
    loss, active, *_ = step(model, teacher, *tokens)
    assert abs(float(loss)) < 1e-9
    assert abs(float(active.sum()) / model.dense() - 1) < 1e-6
    # far from what a wrong start would give
    assert float(step(model, cwic.dense_copy(small_model(vocab_size=257)), *tokens)[0]) > 0.1
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items() if not name.endswith(('mu', 'sigma', 'seen')))
    assert not any(x.requires_grad for x in teacher.parameters())


def test_warm_statistics_do_not_depend_on_the_micro_batch():
    models = [dense_model().train() for _ in range(2)]
    for model, micro_batch in zip(models, (4, 1)):
        train.warm_statistics(model, batches(20), micro_batch, nullcontext)
    for (_, a), (_, b) in zip(models[0].linears(), models[1].linears()):
        torch.testing.assert_close(a.mu, b.mu, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.sigma, b.sigma, rtol=1e-4, atol=1e-5)


def test_the_first_step_of_the_program(dense_checkpoint, data, tmp_path):
    """No dense step, KL alone, thresholds off the floor only by what the first step moves them; and --eval_every shows it in the log."""
    result = run('train.py', *TINY, '--data', data, '--init_from', dense_checkpoint, '--dense_steps', str(train.TrainConfig.dense_steps), '--eval_every', '1',
                 '--out', str(tmp_path), '--max_steps', '1')
    assert result.returncode == 0, result.stderr
    with open(tmp_path / 'log.csv', encoding='utf-8') as f:
        row = next(csv.DictReader(f))
    assert abs(float(row['loss'])) < 1e-8 and abs(float(row['reduction']) - 1) < 1e-6 and float(row['target']) > 1
    model, saved = cwic.load_checkpoint(tmp_path / 'last.pt')
    assert saved['step'] == 1 and saved['options']['dense_steps'] == 0 and saved['options']['teacher'] == 1
    for _, linear in model.linears():
        in_sigmas = linear.theta.detach() * linear.scale
        assert float(in_sigmas.min()) >= cwic.FLOOR * 0.999 and float(in_sigmas.max()) <= cwic.BANDWIDTH / 2 * 1.001
    dense = dense_model()
    assert all(torch.equal(saved['teacher'][name], x) for name, x in dense.named_parameters())


# -----------------------------------------------------------------------------
# the loss, in pieces


@pytest.mark.parametrize('teacher_share', [1.0, 0.3])
@pytest.mark.parametrize('logits_at_once', [1, 16 * 50 * 2, 16 * 50 * 3])
def test_loss_in_pieces_equals_the_plain_one(monkeypatch, teacher_share, logits_at_once):
    """50,257-wide logits of a batch are never held at once; here is the same loss on all of them, in plain autograd: value and every gradient."""
    monkeypatch.setitem(train.LOGITS_AT_ONCE, 'cpu', logits_at_once)
    tokens, targets = batches(1, size=5, vocab=50)[0]
    teacher, rows = cwic.dense_copy(small_model(seed=3)), []
    ours, plain = small_model(thresholds=1.0).train(), small_model(thresholds=1.0).train()
    ours.head.register_forward_hook(lambda module, args, out: rows.append(out[0].shape[:2].numel()))
    price = 1e-4
    got = step(ours, teacher, tokens, targets, teacher_share=teacher_share, price=price)
    assert max(rows) * 50 <= max(logits_at_once, 16 * 50) and sum(rows) == tokens.numel()

    logits, active = plain(tokens)
    with torch.no_grad():
        logits_teacher, _ = teacher(tokens, dense=True)
    p, q = logits.log_softmax(-1), logits_teacher.log_softmax(-1)
    kl = 0.5 * ((p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1)).mean()
    expected = teacher_share * kl - (1 - teacher_share) * p.gather(-1, targets[..., None]).mean()
    (expected + price * active.mean((1, 2)).sum()).backward()
    torch.testing.assert_close(got[0], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], active.mean((1, 2)).detach(), rtol=1e-5, atol=0)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(b.grad.abs().max()))


@pytest.mark.parametrize('dense', [False, True])
def test_recomputing_changes_nothing(dense):
    """
    Statistics were once updated only inside a recomputed pass, or twice with one. Blocks return what they saw, so loss, compute,
    statistics and gradients are the same to the last bit, and the statistics move once.
    """
    tokens, targets = batches(1, vocab=50)[0]
    results = []
    for recompute in (False, True):
        model = small_model(thresholds=1.0).train()
        teacher = cwic.dense_copy(small_model(seed=3))
        before = [linear.mu.clone() for _, linear in model.linears()]
        got = train.backward(model, teacher, tokens, targets, dense=dense, teacher_share=0.0 if dense else 0.5,
                             price=0.0 if dense else 1e-4, share=1.0, recompute=recompute)
        assert all(torch.equal(mu, linear.mu) for mu, (_, linear) in zip(before, model.linears()))
        loss, active, sums = got
        if not dense:
            model.update_statistics(sums)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss, active, *([] if dense else sums), *gradients, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize('sequences, at_once, pieces', [(4, 3, [2, 2]), (5, 2, [2, 2, 1]), (4, 9, [4])])
def test_pieces_are_of_one_size_where_they_can_be(monkeypatch, sequences, at_once, pieces):
    """16 sequences once went through the head as 5, 5, 5 and 1, and torch.compile compiled again for the last, for any size and slower."""
    monkeypatch.setitem(train.LOGITS_AT_ONCE, 'cpu', 16 * 50 * at_once)
    model, seen = small_model(thresholds=1.0).train(), []
    model.head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    step(model, None, *batches(1, size=sequences, vocab=50)[0], teacher_share=0.0)
    assert seen == pieces


@pytest.mark.parametrize('dense', [False, True])
def test_compiling_changes_nothing(dense):
    """
    torch.compile must find one graph in a block and one in the head with its loss, custom backward included, and get the
    same numbers from them.
    """
    tokens, targets = batches(1, vocab=50)[0]
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, teacher = small_model(thresholds=1.0).train(), cwic.dense_copy(small_model(seed=3))
        options = dict(backend='aot_eager', fullgraph=True)         # all of the compiler but its last part, which writes C++
        for block in [*model.blocks, *teacher.blocks] if compiled else ():
            block.compile(**options)
        head_loss = torch.compile(train.head_loss, **options) if compiled else train.head_loss
        got = [train.backward(model, teacher, tokens, targets, dense=dense, teacher_share=0.0 if dense else 0.5, price=0.0 if dense else 1e-4,
                              share=0.5, recompute=False, head_loss=head_loss) for _ in range(2)]
        (first, *_), (loss, active, sums) = got
        assert float(first) == float(loss)
        results.append([loss, active, *([] if dense else sums), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_compile_as_an_option(dense_checkpoint, data, tmp_path):
    """It reaches the model, the teacher and the head; where torch.compile cannot work the program ends before it has trained."""
    command = ['train.py', *TINY, '--data', data, '--init_from', dense_checkpoint, '--max_steps', '2', '--compile', '--out']
    result = run(*command, str(tmp_path), env=dict(TORCHDYNAMO_DISABLE='1'))
    assert result.returncode == 0 and 'compile' in result.stdout, result.stderr
    error = one_line(run(*command, str(tmp_path / 'none'), env=dict(CXX='no-such-compiler', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache'))), 1)
    assert error.startswith('train.py: --compile: does not work here') and 'C++ compiler' in error and not (tmp_path / 'none' / 'last.pt').exists()


# -----------------------------------------------------------------------------
# what --init_from implies


def test_options_implied_by_a_dense_model(dense_checkpoint):
    model, tokenizer, config = train.starting_model(train.TrainConfig(init_from=dense_checkpoint))
    assert tokenizer == {'kind': 'bytes'} and (config.dense_steps, config.teacher) == (0, 1.0)
    assert all(getattr(config, name) == size == getattr(model.config, name) for name, size in SIZES.items())
    _, _, config = train.starting_model(train.TrainConfig(init_from=dense_checkpoint, teacher=0.0, dense_steps=7, lr=0.5))
    assert (config.teacher, config.dense_steps, config.lr) == (0.0, 7, 0.5)


def test_other_stripes_leave_the_function_as_it_is(dense_checkpoint):
    tokens = batches(1)[0][0]
    model, _, config = train.starting_model(train.TrainConfig(init_from=dense_checkpoint, stripe_up=24, stripe_head=7))
    assert (config.stripe_up, config.stripe_head, config.stripe_qkv) == (24, 7, 16)
    assert model.blocks[0].mlp.up.theta.shape == (3, 16) and model.head.theta.shape == (37, 16) and model.blocks[0].attn.qkv.theta.shape == (3, 16)
    torch.testing.assert_close(model.eval()(tokens)[0], dense_model()(tokens)[0])


def test_a_run_of_ours_can_be_distilled_to_less_compute(data, tmp_path):
    """The whole way: a dense run, then the sparse copy of it, which ends at its target; and what it learned from goes along in last.pt."""
    out = str(tmp_path / 'teacher')
    dense = run('train.py', *TINY, '--data', data, '--target_reduction', '1', '--hold_steps', '40', '--eval_every', '48', '--out', out)
    assert dense.returncode == 0, dense.stderr
    result = run('train.py', '--init_from', os.path.join(out, 'best.pt'), '--data', data, '--out', str(tmp_path / 'sparse'),
                 '--target_reduction', '2', '--ramp_steps', '150', '--hold_steps', '100', '--warmup_steps', '10', '--threshold_lr', '1',
                 '--lr', '3e-3', '--dtype', 'float32', '--eval_every', '250', '--eval_windows', '8')
    assert result.returncode == 0, result.stderr
    assert cwic.load_checkpoint(tmp_path / 'sparse' / 'best.pt')[1]['reduction'] > 1.9
    teacher, last = cwic.load_checkpoint(os.path.join(out, 'best.pt'))[0], cwic.load_checkpoint(tmp_path / 'sparse' / 'last.pt')[1]
    assert torch.equal(last['teacher']['head.weight'], teacher.head.weight)


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'config', '*.toml'))), ids=os.path.basename)
def test_presets_are_valid(path):
    """Every option exists and has the right type, and its comment says where it runs and how long."""
    config = parse_options(train.TrainConfig, 'train', presets=True, argv=[path])
    config.check()
    assert config.out != 'out' and config.batch_size % config.micro_batch == 0
    with open(path, encoding='utf-8') as f:
        text = f.read()
    assert text.startswith('# ') and ('minutes' in text or 'hours' in text)
