"""
Several processes of train.py (gloo, on this CPU) against one: the same losses, gradients, statistics and
checkpoint from the same global batch, up to the rounding of sums in another order. A signal to one stops all.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import device
import refinements
import train
from checkpoint import save_checkpoint
from test_cwic import one_thread, small_model        # noqa: F401  one_thread: a fixture
from test_train import ROOT, SCHEDULE, SIZES, Ended, call, equal, files, flags, load, one_line, resume, write_data

# two sequences in a forward pass: one process takes two passes for a step, each of two processes takes one
OPTIONS = flags({**SIZES, **SCHEDULE, 'micro_batch': 2, 'eval_every': 6, 'stripe_up': 24, 'teacher': 0.5})


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def two_processes(*args, signalled=(None, None, None), call=call):
    """
    What two processes end with, the first one first: on one host, as torchrun starts them, but forked, because
    torch takes seconds to import. signalled: (rank, step, signal), sent to that process as it begins that step.
    call: what each of them runs.
    """
    port, context = free_port(), multiprocessing.get_context('fork')
    ended = context.SimpleQueue()

    def child(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost',
                          MASTER_PORT=str(port))
        draw = train.step_starts

        def step_starts(mix, config, step):
            if (rank, step) == signalled[:2]:
                os.kill(os.getpid(), signalled[2])
            return draw(mix, config, step)

        train.step_starts = step_starts
        ended.put((rank, tuple(call(*args))))

    processes = [context.Process(target=child, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    results = {rank: Ended(-signal.SIGKILL, '', '') for rank in range(2)}
    while not ended.empty():
        rank, result = ended.get()
        results[rank] = Ended(*result)
    return results[0], results[1]


def close(a, b, share):
    """The largest difference is less than `share` of the largest value, tensor by tensor."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert float((x - b[name]).abs().max()) <= share * float(x.abs().max()) + 1e-12, name


@pytest.fixture(scope='module')
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp('alone')
    assert call(*OPTIONS, '--data', data, '--out', out).returncode == 0
    return out


def test_two_processes_equal_one(alone, data, tmp_path):
    """
    A whole run, dense and sparse, with a teacher: every loss in the log, to 1e-5 nats; every weight,
    threshold and statistic, to 1e-3 of the largest beside it (Adam makes much of the rounding of keys'
    biases, whose gradient is 0). Only the first process prints and writes.
    """
    first, second = two_processes(*OPTIONS, '--data', data, '--out', tmp_path)
    assert first.returncode == 0 and '2 processes' in first.stdout and second == (0, '', ''), (first, second)
    one, two = load(alone), load(tmp_path)
    assert list(files(tmp_path)) == ['best.safetensors', 'last.safetensors', 'log.csv', 'training.png']
    assert len(one['log']) == len(two['log']) == 3
    for a, b in zip(one['log'], two['log']):
        assert a[0] == b[0] and a[5:] == b[5:]                                  # step; target, learning rate
        assert abs(a[2] - b[2]) < 1e-5 and abs(a[4] - b[4]) < 1e-4 * a[4]       # loss; reduction
    assert one['step'] == two['step'] == 12 and abs(one['val_loss'] - two['val_loss']) < 1e-5
    close(one['model'], two['model'], 1e-3)
    close(one['teacher'], two['teacher'], 1e-3)


@pytest.mark.parametrize('mixed', [False, True])
def test_gradients_of_two_processes_equal_those_of_one(data, tmp_path, mixed):
    """
    After a first step, here a sparse one, Adam's first moment is a tenth of the gradient. mixed: the batch comes
    from two data sets, so that each process has its share of both.
    """
    if mixed:
        (tmp_path / 'other').mkdir()
        other = write_data(tmp_path / 'other', list(b'import os; print(os.name)' * 40))
        data = f'{data}:0.5,{other}:0.5'
    options = [*OPTIONS, '--teacher', 0, '--dense_steps', 0, '--data', data, '--max_steps', 1]
    assert call(*options, '--out', tmp_path / 'one').returncode == 0
    assert [ended.returncode for ended in two_processes(*options, '--out', tmp_path / 'two')] == [0, 0]
    one, two = ({i: x for i, x in load(tmp_path / name)['optimizer'].items() if i.endswith('exp_avg')}
                for name in ('one', 'two'))
    assert len(one) == 21 and all(float(x.abs().max()) > 0 for x in one.values())
    close(one, two, 1e-5)


def test_processes_start_from_the_same_bases(data, tmp_path):
    """
    Each process once found its own, and the sign of a component is chance: on another kind of GPU it may
    differ. Here the second process finds all of them with the other sign.
    """
    def call_with_others(*args):
        pca_basis = refinements.pca_basis
        if os.environ['RANK'] == '1':
            refinements.pca_basis = lambda x: -pca_basis(x)
        return call(*args)

    torch.manual_seed(5)
    dense = small_model('llama', thresholds=0.0, vocab_size=257, n_layer=1)
    for _, layer in dense.sparse_layers():
        layer.sigma.zero_()
    save_checkpoint(tmp_path / 'dense.safetensors', dense, tokenizer={'kind': 'bytes'})
    options = ['--init_from', tmp_path / 'dense.safetensors', '--lora_rank', 3, '--bases', '--block_size', 16, '--batch_size', 4,
               '--ramp_steps', 2, '--hold_steps', 4, '--dtype', 'float32', '--device', 'cpu', '--data', data]
    assert call(*options, '--out', tmp_path / 'one').returncode in (0, 1)       # its target met or not
    both = two_processes(*options, '--out', tmp_path / 'two', call=call_with_others)
    assert both[0].returncode in (0, 1) and both[1] == (0, '', ''), both
    close(load(tmp_path / 'one')['model'], load(tmp_path / 'two')['model'], 1e-3)


def test_resume_works_on_another_number_of_processes(alone, data, tmp_path):
    """Two processes, stopped while dense; one, stopped while sparse; two again: as one, never stopped."""
    stopped = two_processes(*OPTIONS, '--data', data, '--out', tmp_path, '--max_steps', 3)
    assert [ended.returncode for ended in stopped] == [0, 0]
    assert load(tmp_path)['step'] == 3 and not load(tmp_path)['teacher']
    assert resume(tmp_path, '--max_steps', 7).returncode == 0
    assert load(tmp_path)['step'] == 7 and load(tmp_path)['teacher']
    assert [ended.returncode for ended in two_processes('--resume', '--out', tmp_path)] == [0, 0]
    one, two = load(alone), load(tmp_path)
    assert two['step'] == 12 and [row[0] for row in two['log']] == [row[0] for row in one['log']]
    assert all(abs(a[2] - b[2]) < 1e-5 for a, b in zip(one['log'], two['log']))
    close(one['model'], two['model'], 1e-3)


def test_a_batch_may_be_shared_unevenly(data, tmp_path):
    """3 sequences are shared as 2 and 1. This was once refused, even by `torchrun --nproc_per_node 2 train.py`."""
    options = [*OPTIONS, '--batch_size', 3, '--data', data]
    assert call(*options, '--out', tmp_path / 'one').returncode == 0
    assert [ended.returncode for ended in two_processes(*options, '--out', tmp_path / 'two')] == [0, 0]
    close(load(tmp_path / 'one')['model'], load(tmp_path / 'two')['model'], 1e-3)


def test_all_processes_use_the_dtype_of_the_first(data, tmp_path, monkeypatch):
    """Each process once measured for itself, so two might have computed in different dtypes."""
    monkeypatch.setattr(device, 'product_seconds',
                        lambda dtype: 2.0 if (dtype == torch.float32) == (os.environ['RANK'] == '0') else 1.0)
    for dtype in ('auto', 'bfloat16'):
        options = [*OPTIONS, '--dtype', dtype, '--max_steps', 2]
        ended = two_processes(*options, '--data', data, '--out', tmp_path / dtype)
        assert [e.returncode for e in ended] == [0, 0]
    assert 'bfloat16 (as asked)' in ended[0].stdout
    assert equal(load(tmp_path / 'auto')['model'], load(tmp_path / 'bfloat16')['model'])


@pytest.mark.parametrize('args, words', [
    (['--resume'], 'no run in'),                            # before anything is shared
    (['--batch_size', 1], 'too small to be shared by 2 processes'),
    (['--data', 'nowhere'], 'data/nowhere is not there'),
    (['--init_from', 'nowhere.safetensors'], 'no such model'),
])
def test_a_wrong_option_ends_all_processes(data, tmp_path, args, words):
    """With one line each: the traceback of the second, which waited, once hid what the first had said."""
    first, second = two_processes(*OPTIONS, '--data', data, '--out', tmp_path, *args)
    assert words in first.stderr and one_line(first, first.returncode) and one_line(second, second.returncode)
    assert first.returncode and second.returncode and not files(tmp_path)


def test_a_file_that_the_first_process_cannot_write_ends_all(data, tmp_path):
    """Only the first process writes; the others must not wait for it for ever."""
    assert call(*OPTIONS, '--data', data, '--out', tmp_path, '--max_steps', 3).returncode == 0
    (tmp_path / 'log.csv').unlink()
    (tmp_path / 'log.csv' / 'in the way').mkdir(parents=True)
    first, second = two_processes('--resume', '--out', tmp_path)
    assert str(tmp_path / 'log.csv') in one_line(first, 1) and load(tmp_path)['step'] == 6
    assert 'another process has ended' in one_line(second, 1)


@pytest.mark.parametrize('rank, number', [(0, signal.SIGINT), (1, signal.SIGTERM), (0, signal.SIGHUP)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(alone, data, tmp_path, rank, number):
    """The step that has begun is finished and saved, and one process alone can continue from it."""
    first, second = two_processes(*OPTIONS, '--data', data, '--out', tmp_path, signalled=(rank, 7, number))
    assert 'stopped at step 8, which is saved' in first.stdout and first.returncode == 130, first
    assert second == (130, '', '') and load(tmp_path)['step'] == 8
    assert resume(tmp_path).returncode == 0
    close(load(alone)['model'], load(tmp_path)['model'], 1e-3)


def test_resume_continues_from_the_last_evaluation_after_a_kill(alone, data, tmp_path):
    """The process that is left says one line; evaluations are after steps 6 and 12."""
    first, _ = two_processes(*OPTIONS, '--data', data, '--out', tmp_path, signalled=(1, 8, signal.SIGKILL))
    assert 'another process has ended' in one_line(first, 1) and load(tmp_path)['step'] == 6
    assert resume(tmp_path).returncode == 0
    close(load(alone)['model'], load(tmp_path)['model'], 1e-3)


def test_ctrl_c_in_torchrun_saves(data, tmp_path):
    """As users start it: both processes stop at the same step, and the run can be resumed."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', 2, '--master_port',
               free_port(), Path(ROOT) / 'train.py', *OPTIONS, '--data', data, '--out', tmp_path,
               *flags({'hold_steps': 10 ** 6, 'log_every': 0, 'eval_every': 10 ** 6})]
    torchrun = subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        seen = next(line for line in torchrun.stdout if line.startswith('step'))
        torchrun.send_signal(signal.SIGINT)
        printed, _ = torchrun.communicate(timeout=60)
    finally:
        torchrun.terminate()
    step = load(tmp_path)['step']
    assert f'stopped at step {step}, which is saved' in printed and step >= int(seen[4:].split('/')[0])
    assert resume(tmp_path, '--max_steps', step + 1).returncode == 0 and load(tmp_path)['step'] == step + 1
