"""
bench_train.py on one process: what a training step's benchmark reports, and that it sees wrong gradients.
Several processes are in test_distributed.py; what a user gets wrong, in test_bench.py.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from lab import bench
from lab import bench_train
from options import parse_options
from test_bench import call
from test_cwic import one_thread, small_model     # noqa: F401  one_thread: a fixture, for all


def test_train_reports_every_kind_of_step_and_moves_nothing(tmp_path, monkeypatch):
    """
    Dense, CWIC at about the third of the compute that it says it measures, and that with a teacher. If steps
    moved weights or statistics, later rounds would measure another model than the first.
    """
    after, train_step = [], bench_train.train.train_step

    def step(run, *args):
        result = train_step(run, *args)
        after.append({name: x.clone() for name, x in run.model.state_dict().items()})
        return result

    monkeypatch.setattr(bench_train.train, 'train_step', step)
    file = tmp_path / 'rows.json'
    code, out, err = call('train', '--rounds', 1, '--batch', 1, '--device', 'cpu', '--json', file)
    assert code == 0, err
    dense, sparse, taught = json.loads(file.read_text(encoding='utf-8'))['rows']
    assert [row['engine'] for row in (dense, sparse, taught)] == ['dense', 'cwic', 'cwic + teacher']
    assert (dense['batch'], dense['block_size']) == (1, 256) and 'batch 1' in out and 'block_size 256' in out
    assert dense['reduction'] == pytest.approx(1) and 2 < sparse['reduction'] < 4.5
    assert taught['reduction'] == sparse['reduction']
    assert sparse['seconds_over_dense'] == pytest.approx(dense['tok_s'] / sparse['tok_s'])
    assert dense['tok_s'] * dense['seconds'] == pytest.approx(256) and dense['tok_s_min'] <= dense['tok_s']
    assert len(after) == 3 * (1 + bench_train.WARM_UP)
    for name, x in after[0].items():
        assert torch.equal(x, after[-1][name]), name


def test_a_shape_is_trained_as_its_preset_says(monkeypatch):
    """The model has the shape's sizes, batches are the preset's; of the chat model's preset also its adapter."""
    monkeypatch.setattr(bench_train, 'choose_dtype', lambda *args: (torch.float32, ''))
    shape = small_model('llama', block_size=16).config
    config, _ = parse_options(bench.BenchConfig, 'lab/bench.py', argv=['--device', 'cpu', '--model', 'smollm2-shape'])
    run = bench_train.make_run(config, shape)
    assert run.model.config == shape and (run.config.batch_size, run.config.micro_batch) == (64, 32)
    assert run.model.head.adapter.A.shape[1] == 39
    assert all(group['lr'] == 0 for group in run.optimizer.param_groups)


def test_disagreement_sees_a_gradient_that_is_wrong(monkeypatch):
    """0 where both sides are this CPU; not where one weight is another on the other side."""
    monkeypatch.setattr(bench_train, 'choose_dtype', lambda *args: (torch.float32, ''))
    run = bench_train.make_run(parse_options(bench.BenchConfig, 'lab/bench.py', argv=['--device', 'cpu'])[0])
    run.model = small_model(block_size=64)
    tokens = torch.randint(0, 50, (1, 65))
    assert bench_train.disagreement(run, tokens) == [0, 0, 0]
    copies = []

    def deepcopy(model):
        copies.append(copy.deepcopy(model))
        if len(copies) == 2:
            copies[1].head.weight.data[0, 0] += 0.1
        return copies[-1]

    monkeypatch.setattr(bench_train, 'copy', SimpleNamespace(deepcopy=deepcopy))
    loss, *gradients = bench_train.disagreement(run, tokens)
    assert loss > 0 and min(gradients) > 1e-5
