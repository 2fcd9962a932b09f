"""bench_train.py: what it reports and which options it takes. Error messages are in test_bench.py."""

import json

import pytest
import torch

from lab import bench
from lab import bench_train
from options import parse_options
from test_bench import call
from test_cwic import one_thread, small_model     # noqa: F401  one_thread: a fixture, for all


def test_train_measures_every_kind_of_step_and_changes_no_weight(tmp_path, monkeypatch):
    """
    Dense, CWIC at a reduction of about three, and that with a teacher. If steps changed weights or statistics,
    later rounds would measure another model than the first.
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


@pytest.mark.parametrize('name, preset, length, batch, rank', [
    ('gpt2-shape', 'gpt2_124m_distill.toml', 48, 64, 0),            # the preset leaves the length to the model
    ('smollm2-shape', 'smollm2_distill.toml', 512, 64, 64),
    ('llama1b-shape', 'smollm2_distill.toml', 512, 64, 64)])
def test_shapes_train_with_their_presets_options(monkeypatch, name, preset, length, batch, rank):
    """Length, batches and LoRA are the preset's, sizes the shape's, and nothing moves."""
    monkeypatch.setattr(bench_train, 'choose_dtype', lambda *args: (torch.float32, ''))
    shape = small_model('llama', block_size=48).config
    config, _ = parse_options(bench.BenchConfig, 'lab/bench.py', argv=['--device', 'cpu', '--model', name])
    assert bench_train.PRESETS[name] == preset and name in bench.SHAPES
    run = bench_train.make_run(config, shape)
    assert run.model.config == shape and run.config.block_size == length
    assert run.config.batch_size == batch and not run.config.compile
    assert (run.model.head.adapter.A.shape[1] if rank else 0) == rank == run.config.lora_rank
    assert all(group['lr'] == 0 for group in run.optimizer.param_groups)
