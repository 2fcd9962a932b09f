"""train.py: what a step computes, however it is cut; resuming, stopping, failing; and the whole program, then the chat."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import cwic
import train
from options import parse_options
from test_cwic import small_model

ROOT = os.path.dirname(os.path.abspath(cwic.__file__))
TINY = ['--n_layer', '1', '--n_head', '2', '--n_embd', '16', '--block_size', '16', '--stripe_qkv', '16', '--stripe_out', '16', '--stripe_up', '32', '--stripe_down', '16',
        '--stripe_head', '100', '--dense_steps', '4', '--ramp_steps', '4', '--hold_steps', '4', '--warmup_steps', '2', '--eval_every', '4', '--eval_windows', '4', '--batch_size', '4',
        '--micro_batch', '4', '--dtype', 'float32', '--device', 'cpu']


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A data set of bytes: the same few lines, again and again."""
    folder = tmp_path_factory.mktemp('data')
    text = 'def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(i)\n' * 60
    for split in ('train', 'val'):
        np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tofile(folder / f'{split}.bin')
    meta = {'tokenizer': {'kind': 'bytes'}, 'vocab_size': 257, 'train_tokens': len(text), 'val_tokens': len(text), 'train_bytes': len(text), 'val_bytes': len(text), 'source': 'a test'}
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return str(folder)


def run(program, *args, cwd=None, env=None, **more):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})}
    return subprocess.run([sys.executable, os.path.join(ROOT, program), *args], capture_output=True, text=True, encoding='utf-8', env=env, cwd=cwd, timeout=120, **more)


def one_line(result, code):
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and 'Traceback' not in result.stderr, result.stderr
    return result.stderr


# -----------------------------------------------------------------------------
# one step


@pytest.mark.parametrize('teacher_share', [0.0, 0.5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(teacher_share):
    """
    The flop loss was once squared per micro-batch and not divided by their number, so accumulation changed the objective.
    1 x 8 sequences and 4 x 2 must give the same loss, compute, statistics and gradients, thresholds included.
    """
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 50, (8, 16)), torch.randint(0, 50, (8, 16))
    results = []
    for micro_batch in (8, 2):
        model, teacher = small_model(thresholds=1.0).train(), small_model(seed=3) if teacher_share else None
        loss, active, sums = 0.0, 0.0, None
        for i in range(0, 8, micro_batch):
            loss_part, active_part, sums_part = train.backward(model, teacher, tokens[i:i + micro_batch], targets[i:i + micro_batch], dense=False, teacher_share=teacher_share,
                                                               price=cwic.price(1500.0, model.dense(), 3.0), share=micro_batch / 8, recompute=False)
            loss, active = loss + loss_part, active + active_part
            sums = sums_part if sums is None else [a + b for a, b in zip(sums, sums_part)]
        results.append([loss, active, *sums, *(p.grad for p in model.parameters())])
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_gradient_is_that_of_the_loss_written_plainly():
    """backward() goes through the head a few sequences at a time; here is the same loss in three lines of autograd."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 50, (4, 16)), torch.randint(0, 50, (4, 16))
    ours, plain = small_model(thresholds=1.0).train(), small_model(thresholds=1.0).train()
    active = 2000.0
    train.backward(ours, None, tokens, targets, dense=False, teacher_share=0.0, price=cwic.price(active, ours.dense(), 3.0), share=1.0, recompute=False)
    logits, counts = plain(tokens)
    # the flop loss at the mean that the price was taken at: same slope, value of the mean itself irrelevant
    mean = counts.sum(0).mean()
    flop = (3.0 - plain.dense() / (mean - mean.detach() + active)) ** 2
    (cwic.next_token_loss(logits.flatten(0, 1), targets.flatten()) + flop).backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(b.grad.abs().max()))


def test_target_ramps_then_holds_while_the_learning_rate_lives():
    """The learning rate once reached 0 exactly when the ramp ended, so the last compute target never trained."""
    config = train.TrainConfig()
    targets = [train.target_at(step, config) for step in range(config.steps())]
    assert targets[:config.dense_steps] == [1.0] * config.dense_steps
    assert targets[-config.hold_steps:] == [config.target_reduction] * config.hold_steps and config.hold_steps >= 0.2 * config.steps()
    assert np.all(np.diff(targets) >= 0)
    assert train.lr_at(config.steps() - config.hold_steps, config) > 0.5 * config.lr and train.lr_at(config.steps() - 1, config) > 0


def test_every_step_draws_its_own_windows():
    """Resuming once replayed the first batches. Windows depend on seed and step; each ends inside the data."""
    config = train.TrainConfig(batch_size=64)
    data = np.zeros(config.block_size + 10)
    drawn = [tuple(train.step_starts(data, config, step)) for step in range(20)]
    assert len(set(drawn)) == 20 and drawn == [tuple(train.step_starts(data, config, step)) for step in range(20)]
    assert max(map(max, drawn)) + config.block_size + 1 <= len(data) and min(map(min, drawn)) == 0


def test_evaluation_leaves_the_model_as_it_was(data):
    """A validation loop that forgot eval() polluted the statistics."""
    model = cwic.GPT(cwic.CWICConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    _, val, _ = train.load_data(data, 16)
    measured = train.evaluate(model, val, train.TrainConfig(block_size=16, eval_windows=6), 'cpu', False)
    assert model.training and all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    # thresholds are 0: (nearly) everything is used, and the loss is that of a plain pass over the same windows
    starts = np.linspace(0, len(val) - 17, 6).astype(int)
    tokens = torch.tensor(np.stack([val[s:s + 17] for s in starts]).astype(np.int64))
    with torch.no_grad():
        logits, _ = model.eval()(tokens[:, :-1], dense=True)
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    assert abs(measured['loss'] - float(expected)) < 1e-5 and abs(measured['reduction'] - 1) < 1e-3


# -----------------------------------------------------------------------------
# the program


@pytest.fixture(scope='session')
def finished(data, tmp_path_factory):
    """A whole tiny run, uninterrupted, half of whose sparse loss comes from its frozen dense copy."""
    out = tmp_path_factory.mktemp('finished')
    return out, run('train.py', *TINY, '--data', data, '--teacher', '0.5', '--out', str(out))


def test_a_whole_run_leaves_what_it_promises(finished):
    out, result = finished
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(out)) == ['best.pt', 'last.pt', 'log.csv', 'training.png']
    rows = list(csv.DictReader(open(out / 'log.csv', encoding='utf-8')))
    assert [row['step'] for row in rows] == ['4', '8', '10', '12'] and rows[-1]['val_loss'] and rows[2]['val_loss'] == ''
    assert (out / 'training.png').read_bytes().startswith(b'\x89PNG')
    for words in ('parameters', 'dense weights per token', 'cpu', 'tok/s', 'left', 'validation loss', 'reduction', 'spread'):
        assert words in result.stdout
    _, saved = cwic.load_checkpoint(out / 'best.pt')
    assert saved['tokenizer'] == {'kind': 'bytes'} and set(saved['compute_percentiles']) >= {'5', '50', '95'}
    assert 'optimizer' not in saved and len(saved['active_share']) == 5


def test_train_then_chat(finished):
    out, _ = finished
    result = run('chat.py', '--ckpt', str(out / 'best.pt'), '--prompt', 'def add(', '--max_tokens', '12')
    assert result.returncode == 0, result.stderr
    assert result.stdout and '\x1b' not in result.stdout and 'Traceback' not in result.stderr


def state(path):
    saved = torch.load(path, weights_only=True)
    saved['seconds'] = None
    for name in train.FREE_TO_CHANGE:
        del saved['options'][name]
    saved['log'] = [row[:1] + row[2:] for row in saved['log']]              # all but the seconds
    return saved


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize('stop_after', [2, 9])
def test_resumed_equals_uninterrupted(finished, data, tmp_path, stop_after):
    """
    Ctrl-C in the dense phase and in the sparse one: exit code 130, a line that says how to go on, and then, bit for bit, the
    weights, optimiser, statistics and log of the run that was never stopped. It was not so at first: loading an optimiser's
    state replaces its parameter groups, and the loop went on setting the learning rate of the old ones. The teacher is in
    neither model nor optimiser: without it in the checkpoint a run resumed at step 9 would learn from nothing.
    """
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *TINY, '--data', data, '--teacher', '0.5', '--out', str(tmp_path), '--log_every', '0'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=env, cwd=tmp_path)
    for line in process.stdout:
        if line.startswith(f'step     {stop_after}/'):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and '--resume' in rest and errors == ''
    stopped = torch.load(tmp_path / 'last.pt', weights_only=True)['step']
    assert stop_after <= stopped < 12
    result = run('train.py', '--resume', '--out', str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert equal(state(tmp_path / 'last.pt'), state(finished[0] / 'last.pt'))


@pytest.mark.parametrize('program', ['train.py', 'chat.py'])
def test_ctrl_c_while_it_starts(tmp_path, program):
    """Torch takes seconds to import, and Ctrl-C in them once printed forty lines of its insides."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and 'Traceback' not in errors and errors.count('\n') <= 1


def test_nothing_to_resume(finished):
    assert 'nothing to resume' in one_line(run('train.py', '--resume', '--out', str(finished[0])), 0)


def test_best_is_never_replaced_by_a_worse_one(finished):
    """best_val_loss was once overwritten by a worse value on resume; and a dense model must not pass for the best sparse one."""
    out, _ = finished
    rows = [row for row in csv.DictReader(open(out / 'log.csv', encoding='utf-8')) if row['val_loss']]
    best = torch.load(out / 'best.pt', weights_only=True)
    met = [row for row in rows if int(row['step']) >= 8 and int(row['step']) == best['step']]
    assert len(met) == 1 and float(met[0]['val_loss']) == best['val_loss'] == torch.load(out / 'last.pt', weights_only=True)['best_loss']


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
    options = [*TINY, '--data', data, '--out', str(tmp_path), '--eval_every', '1']
    result = run('train.py', *options, '--lr', '1e30', '--warmup_steps', '1')
    assert 'step' in one_line(result, 1) and 'lower --lr' in result.stderr
    if os.path.exists(tmp_path / 'last.pt'):
        model, _ = cwic.load_checkpoint(tmp_path / 'last.pt')
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_target_1_trains_a_dense_model(data, tmp_path):
    result = run('train.py', *TINY, '--data', data, '--target_reduction', '1', '--out', str(tmp_path))
    assert result.returncode == 0, result.stderr
    model, saved = cwic.load_checkpoint(tmp_path / 'best.pt')
    assert saved['reduction'] == 1 and all(float(linear.theta.detach().abs().max()) == 0 for _, linear in model.linears())


@pytest.mark.parametrize('args, code, words', [
    (['--learning_rate=1'], 2, 'unknown option learning_rate'),
    (['--lrr', '1'], 2, 'did you mean lr?'),
    (['--lr', 'fast'], 2, '--lr'),
    (['--lr=a=b'], 2, '--lr'),
    (['--resume=maybe'], 2, '--resume'),
    (['--n_head', '7'], 2, '--n_embd (320) must be a multiple of n_head (7)'),
    (['--stripe_up', '0'], 2, '--stripe_up must be at least 1'),
    (['--batch_size', '6'], 2, '--batch_size 6'),
    (['--target_reduction', '0.5'], 2, '--target_reduction'),
    (['--device', 'abacus'], 2, '--device abacus'),
    (['--data', 'nowhere'], 2, 'data/nowhere is not there'),
    (['nowhere.toml'], 2, 'preset nowhere.toml'),
])
def test_what_a_user_gets_wrong_is_one_line(args, code, words, tmp_path):
    """A bad option used to be a blank AssertionError, and config files were run as code."""
    assert words in one_line(run('train.py', *args, cwd=tmp_path), code)


def test_resuming_what_is_not_there_or_damaged_is_one_line(tmp_path):
    assert 'cannot resume' in one_line(run('train.py', '--resume', '--out', str(tmp_path)), 1)
    (tmp_path / 'last.pt').write_bytes(b'PK\x03\x04 half a file')
    assert 'damaged' in one_line(run('train.py', '--resume', '--out', str(tmp_path)), 1)


def test_resuming_with_other_options_is_refused(finished):
    """Where the option asked for is the default too: that was once taken for no option at all, and passed over in silence."""
    for name, value, shown in (('--lr', '0.5', '--lr 0.5'), ('--n-layer=2', '--log_every=1', '--n_layer 2')):
        assert f'{shown}: the run was started with' in one_line(run('train.py', '--resume', '--out', str(finished[0]), name, value), 2)


def test_a_resumed_run_may_turn_off_what_its_preset_turned_on(monkeypatch):
    """A preset that compiles, resumed where there is no compiler: --compile no is the default, but it is also an order."""
    saved = dataclasses.asdict(train.TrainConfig(compile=True, recompute=True, lr=0.5))
    monkeypatch.setattr(sys, 'argv', ['train.py', '--resume', '--compile', 'no'])
    merged = train.options_to_resume(train.TrainConfig(resume=True, compile=False), saved)
    assert (merged.compile, merged.recompute, merged.lr, merged.resume) == (False, True, 0.5, True)


def test_options_come_from_preset_then_flags(tmp_path):
    (tmp_path / 'a.toml').write_text('lr = 0.5\nbias = false\nn_layer = 3\n', encoding='utf-8')
    config = parse_options(train.TrainConfig, 'train', presets=True, argv=[str(tmp_path / 'a.toml'), '--n_layer=4', '--resume'])
    assert (config.lr, config.bias, config.n_layer, config.resume, config.n_head) == (0.5, False, 4, True, train.TrainConfig().n_head)


def test_help_shows_every_option_with_its_default():
    shown = run('train.py', '--help').stdout
    for name, default in vars(train.TrainConfig()).items():
        assert f'--{name}' in shown and f'default: {default}' in ' '.join(shown.split())
