"""
Several processes of train.py (gloo, on this CPU) against one: the same losses, gradients, statistics and checkpoint on the same
global batch, to the rounding of sums taken in another order; and no process left hanging when another fails.
"""

import os
import socket
import subprocess
import sys

import pytest
import torch

import cwic
import train
from test_train import ROOT, TINY, data, run       # data: a fixture

# two sequences in a forward pass: one process takes two passes for a step, each of two processes takes one
OPTIONS = [*TINY, '--micro_batch', '2', '--teacher', '0.5', '--eval_every', '6', '--stripe_up', '24']


def run_together(*args, world=2):
    """As torchrun starts them on one host. -> [(exit code, stdout, stderr)] in the order of ranks."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        env = dict(os.environ, OMP_NUM_THREADS='1', RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                   MASTER_ADDR='localhost', MASTER_PORT=str(port))
        processes.append(subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *args], env=env, text=True, encoding='utf-8',
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def load(folder):
    return torch.load(os.path.join(folder, 'last.pt'), weights_only=True)


def close(a, b, share):
    """The largest difference is less than `share` of the largest value, tensor by tensor."""
    for name, x in a.items():
        assert float((x - b[name]).abs().max()) <= share * float(x.abs().max()) + 1e-12, name


@pytest.fixture(scope='module')
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('alone')
    assert run('train.py', *OPTIONS, '--data', data, '--out', str(out)).returncode == 0
    return str(out)


def test_two_processes_equal_one(alone, data, tmp_path):
    """
    A whole run, dense and sparse, with a teacher: every loss in the log, to 1e-5 nats; every weight,
    threshold and statistic, to 1e-3 of the largest beside it (Adam makes much of the rounding of keys' biases, whose gradient is 0). The first
    process alone speaks and writes.
    """
    results = run_together(*OPTIONS, '--data', data, '--out', str(tmp_path))
    assert [code for code, _, _ in results] == [0, 0], results
    assert '2 processes' in results[0][1] and results[1][1] == ''
    one, two = load(alone), load(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'last.pt', 'log.csv', 'training.png']
    assert len(one['log']) == len(two['log']) == 3
    for a, b in zip(one['log'], two['log']):
        assert a[0] == b[0] and a[5:] == b[5:]                                  # step; target, learning rate
        assert abs(a[2] - b[2]) < 1e-5 and abs(a[4] - b[4]) < 1e-4 * a[4]       # loss; reduction
    assert one['step'] == two['step'] == 12 and abs(one['val_loss'] - two['val_loss']) < 1e-5
    close(one['model'], two['model'], 1e-3)
    close(one['teacher'], two['teacher'], 1e-3)


def test_gradients_of_two_processes_equal_those_of_one(data, tmp_path):
    """After one step the optimiser's running mean is a tenth of the gradient; the step is sparse, so those of the thresholds are there too."""
    options = [*OPTIONS, '--teacher', '0', '--dense_steps', '0', '--data', data, '--max_steps', '1']
    assert run('train.py', *options, '--out', str(tmp_path / 'one')).returncode == 0
    assert [code for code, _, _ in run_together(*options, '--out', str(tmp_path / 'two'))] == [0, 0]
    one, two = (load(tmp_path / name)['optimizer']['state'] for name in ('one', 'two'))
    assert one.keys() == two.keys() and len(one) == 21 and all(float(x['exp_avg'].abs().max()) > 0 for x in one.values())
    close({i: x['exp_avg'] for i, x in one.items()}, {i: x['exp_avg'] for i, x in two.items()}, 1e-5)


def test_resume_on_another_number_of_processes(alone, data, tmp_path):
    """Two processes, stopped while dense; one, stopped while sparse; two again: the same run as that of one process, never stopped."""
    out = ['--out', str(tmp_path)]
    assert [code for code, _, _ in run_together(*OPTIONS, *out, '--data', data, '--max_steps', '3')] == [0, 0]
    assert load(tmp_path)['step'] == 3 and load(tmp_path)['teacher'] is None
    assert run('train.py', '--resume', *out, '--max_steps', '7').returncode == 0
    assert load(tmp_path)['step'] == 7 and load(tmp_path)['teacher'] is not None
    assert [code for code, _, _ in run_together('--resume', *out)] == [0, 0]
    one, two = load(alone), load(tmp_path)
    assert two['step'] == 12 and [row[0] for row in two['log']] == [row[0] for row in one['log']]
    assert all(abs(a[2] - b[2]) < 1e-5 for a, b in zip(one['log'], two['log']))
    close(one['model'], two['model'], 1e-3)


def test_processes_draw_disjoint_parts_of_one_batch():
    config = train.TrainConfig(batch_size=8)
    whole = train.step_starts(range(10 ** 6), config, 3)
    parts = [list(whole[rank::2]) for rank in range(2)]
    assert not set(parts[0]) & set(parts[1]) and sorted(parts[0] + parts[1]) == sorted(whole)


@pytest.mark.parametrize('args, words', [
    (['--resume'], 'cannot resume'),                        # before anything is shared
    (['--batch_size', '6'], 'must be a multiple of --micro_batch times processes (2 x 2)'),
])
def test_a_wrong_option_ends_all_processes(data, tmp_path, args, words):
    results = run_together(*OPTIONS, '--data', data, '--out', str(tmp_path), *args)
    assert all(code for code, _, _ in results) and words in results[0][2]


def test_a_failure_of_the_first_process_alone_ends_all(data, tmp_path):
    """It alone writes: where it cannot, the others must not wait for it for ever."""
    (tmp_path / 'last.pt' / 'in the way').mkdir(parents=True)
    results = run_together(*OPTIONS, '--data', data, '--out', str(tmp_path))
    assert all(code for code, _, _ in results)
    assert 'last.pt cannot be written' in results[0][2] and 'Traceback' not in results[0][2]
    assert not [name for name in os.listdir(tmp_path) if 'partial' in name]
