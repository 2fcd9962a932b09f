"""bench.py as a program, on a tiny model: what it counts, what it writes, and what it says when it cannot. Never how fast."""

import json
import os

import numpy as np
import pytest
import torch

import bench
import cwic
from test_cwic import small_model
from test_train import one_line, run


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('bench') / 'tiny.pt'
    cwic.save_checkpoint(path, small_model(block_size=64, thresholds=1.0))
    return str(path)


def test_decode_counts_what_the_model_counts(checkpoint, tmp_path):
    """Rows for its own thresholds and for none; bytes per token are those of the weights in use, not of the whole model."""
    file = tmp_path / 'rows.json'
    result = run('bench.py', 'decode', '--model', checkpoint, '--rounds', '1', '--tokens', '4', '--threads', '1', '--dtypes', 'f32,int8',
                 '--json', str(file), '--out', str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.load(open(file, encoding='utf-8'))
    rows = written['rows']
    assert written['machine'] and (tmp_path / 'bench_decode.png').stat().st_size > 10000
    keys = {'what', 'engine', 'dtype', 'threads', 'reduction', 'tok_s', 'tok_s_min', 'tok_s_max', 'gb_per_token', 'bandwidth_gb_s', 'roofline', 'seconds'}
    assert all(keys <= row.keys() and row['what'] == 'decode' for row in rows)
    ours = {(row['dtype'], row['reduction'] > 1.01): row for row in rows if row['engine'] == 'cwic'}
    assert len(ours) == 4 and [row['dtype'] for row in rows if row['engine'] == 'torch'] == ['f32', 'bf16']
    dense = small_model(block_size=64).dense()
    for (dtype, sparse), row in ours.items():
        size = {'f32': 4, 'int8': 1}[dtype]
        assert abs(row['gb_per_token'] * 1e9 - size * dense / row['reduction']) < 1e-3
        assert sparse or row['reduction'] == 1


def test_loss_is_that_of_the_model(checkpoint, tmp_path):
    """Token by token through the kernel in f32, it is the loss of one pass of PyTorch."""
    np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16).tofile(tmp_path / 'val.bin')
    file = tmp_path / 'rows.json'
    result = run('bench.py', 'loss', '--model', checkpoint, '--data', str(tmp_path), '--windows', '2', '--json', str(file))
    assert result.returncode == 0, result.stderr
    data = np.fromfile(tmp_path / 'val.bin', np.uint16).astype(np.int64)
    model, losses = small_model(block_size=64, thresholds=1.0), []
    with torch.no_grad():
        for start in np.linspace(0, 2000 - 65, 2).astype(int):
            logits, _ = model(torch.tensor(data[None, start:start + 64]))
            losses.append(float(cwic.next_token_loss(logits[0], torch.tensor(data[start + 1:start + 65]))))
    f32, bf16, int8 = json.load(open(file, encoding='utf-8'))['rows']
    assert abs(f32['loss'] - np.mean(losses)) < 1e-3 and abs(bf16['loss'] - f32['loss']) < 0.1 and abs(int8['loss'] - f32['loss']) < 0.1


def test_train_reports_every_kind_of_step(tmp_path):
    """Dense, CWIC at the third of the compute that it says it measures, and CWIC with a teacher, beside one another."""
    result = run('bench.py', 'train', '--rounds', '1', '--batch', '2', '--json', str(tmp_path / 'rows.json'))
    assert result.returncode == 0, result.stderr
    dense, sparse, taught = json.load(open(tmp_path / 'rows.json', encoding='utf-8'))['rows']
    assert (dense['engine'], sparse['engine'], taught['engine']) == ('dense', 'cwic', 'cwic + teacher') and (dense['batch'], dense['block_size']) == (2, 256)
    assert f'{sparse["seconds"] / dense["seconds"]:.2f}x the dense step' in result.stdout
    assert abs(dense['reduction'] - 1) < 1e-6 and 2 < sparse['reduction'] < 4.5 and taught['reduction'] == sparse['reduction']


def test_disagreement_sees_a_gradient_that_is_wrong(monkeypatch):
    """0 where both sides are this CPU; not where one weight is another on the other side."""
    model, tokens = small_model(block_size=64, thresholds=1.0), torch.randint(0, 50, (1, 65))
    assert bench.disagreement(model, tokens) == [0, 0]
    other = cwic.dense_copy(model)
    other.head.weight[0, 0] += 0.1
    monkeypatch.setattr(bench, 'dense_copy', lambda model: other)
    assert min(bench.disagreement(model, tokens)) > 1e-4


@pytest.mark.parametrize('args, code, words', [
    ([], 2, 'say what to measure'),
    (['speed'], 2, 'say what to measure'),
    (['decode', '--round', '3'], 2, 'did you mean rounds?'),
    (['decode', '--model', 'nowhere.pt'], 1, 'nowhere.pt'),
    (['train', '--model', 'nowhere.pt'], 2, '--model gpt2'),
    (['decode', '--model', os.devnull, '--dtypes', 'f64'], 1, os.devnull),
])
def test_what_a_user_gets_wrong_is_one_line(args, code, words, tmp_path):
    assert words in one_line(run('bench.py', *args, cwd=tmp_path), code)
