"""bench.py, on tiny models: what it counts, what it writes, and what it says when it cannot. Never how fast."""

import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab import bench
import cwic
from checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from data import common
from options import parse_options
from test_cwic import BOTH, one_thread, small_model     # noqa: F401  one_thread: a fixture, for all
from test_train import start

BYTES = {'f32': 4, 'bf16': 2, 'int8': 1}


def call(*args):
    """-> (exit code, stdout, stderr) of bench.py with these arguments, in this process"""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    out.reconfigure = lambda **more: None
    sys.argv = ['lab/bench.py', *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            common.run(bench.main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    """Half a gigabyte would take most of the time."""
    monkeypatch.setattr(bench, 'PROBE_BYTES', 2 ** 20)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """{architecture: path of a checkpoint whose tokens are bytes}"""
    paths = {}
    for arch in ('gpt2', 'llama'):
        paths[arch] = str(tmp_path_factory.mktemp('bench') / f'{arch}.safetensors')
        model = small_model(arch, block_size=64, vocab_size=257)
        save_checkpoint(paths[arch], model, tokenizer={'kind': 'bytes'})
    return paths


def rows(what, model, folder, *args):
    file = folder / 'rows.json'
    code, out, err = call(what, '--model', model, '--rounds', 2, '--threads', 1, '--json', file, '--out', folder, *args)
    assert code == 0, err
    written = json.loads(file.read_text(encoding='utf-8'))
    assert out.startswith(written['machine']) and all(row['what'] == what for row in written['rows'])
    return written['rows'], err


def counted_reduction(model, data, longest, begin, end):
    """What two rounds find, by PyTorch, in these tokens of the validation split's first and last `longest` ones."""
    _, val, _ = common.load_dataset(data, 1)
    texts = torch.from_numpy(np.stack([val[:longest], val[len(val) - longest:]]).astype(int))[:, :end]
    with torch.no_grad():
        _, active = model(texts)
    first, last = model.n_weights() / active.sum(0)[:, begin:].mean(1)
    assert abs(float(first / last) - 1) > 1e-4
    return float(first + last) / 2


@BOTH
def test_decode_counts_what_the_model_counts(models, data, tmp_path, arch):
    """
    Dense, and with the checkpoint's own thresholds; counted over the tokens after the prompt. Bytes per token
    are those of the weights in use, of every threshold (4 bytes each), and with int8 of a scale beside each and of
    one for each column.
    """
    written, _ = rows('decode', models[arch], tmp_path, '--tokens', 20, '--data', data)
    model, _ = load_checkpoint(models[arch])
    reduction = counted_reduction(model, data, 36, 16, 36)
    thresholds = sum(layer.theta.numel() for _, layer in model.sparse_layers())
    columns = sum(layer.down.shape[1] if hasattr(layer, 'down') else layer.n_out for _, layer in model.sparse_layers())
    ours = [row for row in written if row['engine'] == 'cwic']
    assert [row['dtype'] for row in ours] == ['f32', 'f32', 'bf16', 'bf16', 'int8', 'int8']
    for row, sparse in zip(ours, 3 * (False, True)):
        scales = thresholds + columns if row['dtype'] == 'int8' else 0
        expected = reduction if sparse else 1
        # in bf16 and int8 what follows the first matrices is rounded, and so are a few comparisons
        assert row['reduction'] == pytest.approx(expected, rel=1e-9 if row['dtype'] == 'f32' else 0.05)
        assert row['thresholds_gb_per_token'] * 1e9 == pytest.approx(4 * (thresholds + scales))
        weights = model.n_weights() / row['reduction'] * BYTES[row['dtype']]        # but for what a mean is off by
        assert row['gb_per_token'] * 1e9 == pytest.approx(weights + 4 * (thresholds + scales), rel=1e-3)
        assert row['tok_s_min'] <= row['tok_s'] <= row['tok_s_max'] and row['bandwidth_gb_s'] > 0
    assert [row['dtype'] for row in written if row['engine'] == 'torch'] == ['f32', 'bf16']
    assert (tmp_path / 'bench_decode.png').stat().st_size > 10000


@pytest.mark.parametrize('dtype', BYTES)
def test_rows_alone_are_counted_as_they_are_read(monkeypatch, dtype):
    """
    A third of them, at random; every output is the sum of its stripe's active rows, so they have really been
    added up; bytes are those of these rows, and of every threshold and scale. A probe that skipped rows it
    counts, or read others, would tell a speed that no decoder has.
    """
    kernel = bench.build_kernel.load()
    memory = torch.full((2 ** 20,), 0x3c, dtype=torch.uint8)
    rows = bench.RowsAlone(kernel, memory, dtype, 48, 1 / 3)
    stripes, inputs = rows.tensors['thresholds'].shape
    assert inputs == 1024 and stripes == 2 ** 20 // (1024 * 48 * BYTES[dtype])
    used = (rows.tensors['thresholds'] < 1).sum(1)                      # (stripes)
    assert float(used.sum()) / (stripes * inputs) == pytest.approx(1 / 3, rel=0.1)
    outputs = []
    monkeypatch.setattr(bench.torch, 'empty', lambda *shape: outputs.append(torch.zeros(*shape)) or outputs[-1])
    found = rows(2)
    weight = {'f32': torch.float32, 'bf16': torch.bfloat16, 'int8': torch.int8}[dtype]
    value = float(memory[:4].view(weight)[0])
    assert outputs[0].view(stripes, 48).numpy() == pytest.approx(used[:, None].expand(-1, 48).numpy() * value, rel=1e-3)
    thresholds = stripes * inputs * (8 if dtype == 'int8' else 4)
    assert found['thresholds_gb_per_token'] * 1e9 == pytest.approx(thresholds)
    assert found['gb_per_token'] * 1e9 == pytest.approx(int(used.sum()) * 48 * BYTES[dtype] + thresholds)
    assert found['reduction'] == pytest.approx(stripes * inputs / int(used.sum()))


@BOTH
def test_probe_accounts_for_all_of_a_token(monkeypatch, tmp_path, arch):
    """
    Parts and the rest add up to the token, whatever they are: what no part explains must not be lost. Rows are
    probed of the widths that a model's own matrices have, Llama's neurons with up and down side by side.
    """
    monkeypatch.setitem(bench.SHAPES, 'gpt2-shape', small_model(arch, block_size=64).config)
    monkeypatch.setattr(bench, 'WIDTHS', (80,))
    written, _ = rows('probe', 'gpt2-shape', tmp_path, '--reductions', '2,4', '--dtypes', 'f32,int8', '--threads', '1,2')
    parts = {part: [row for row in written if row['part'] == part] for part in ('rows', 'token')}
    assert sum(map(len, parts.values())) == len(written)
    config = bench.SHAPES['gpt2-shape']
    expected = {80, config.n_embd * (2 if arch == 'llama' else 1)}      # of down
    assert expected < {row['columns'] for row in parts['rows']}
    # in the memory that the model takes, far less than a megabyte, of which a cache holds what it held while decoding
    assert {row['columns'] for row in parts['rows'] if row['megabytes'] == 1} == {80}
    assert [(row['dtype'], row['threads']) for row in parts['token']] == [
        (dtype, threads) for threads in (2, 1) for dtype in ('f32', 'int8') for _ in range(2)]
    for row in parts['token']:
        of_token = sum(row[f'{part}_us'] for part in ('layers', 'head', 'thresholds', 'hand_over', 'between', 'rest'))
        assert of_token == pytest.approx(row['token_us']) == pytest.approx(1e6 / row['tok_s'])
        assert row['layers_us'] > 0 and row['head_us'] > 0
        assert row['stream_us'] == pytest.approx(row['token_us'] * row['roofline'])
        assert row['possible'] == pytest.approx(row['stream_us'] / (row['token_us'] - row['rest_us']))
    for row in parts['rows']:
        assert row['read_gb_s'] > 0 and row['bandwidth_gb_s'] > 0


def test_prefill_reads_prompts_as_long_as_asked_for(models, data, tmp_path):
    """... or as the context is; the reduction is that of the prompt."""
    written, _ = rows('prefill', models['gpt2'], tmp_path, '--prompts', '5,1000,40', '--dtypes', 'f32', '--data', data)
    model, _ = load_checkpoint(models['gpt2'])
    assert [(row['prompt'], row['engine']) for row in written] == [
        (length, engine) for length in (5, 40, 64) for engine in ('cwic', 'cwic', 'torch', 'torch')]
    for row in written[1::4]:
        assert row['reduction'] == pytest.approx(counted_reduction(model, data, 64, 0, row['prompt']))
        assert row['seconds'] * row['tok_s'] == pytest.approx(row['prompt']) and 'roofline' not in row


def test_text_that_the_model_writes_itself(models):
    """
    Without --data. Each round has another; they begin with the end token, after which documents begin, and are
    always the same. (When there was one for all rounds, a reduction of 2.5 or of 4.3 was a matter of luck.)
    """
    model, saved = load_checkpoint(models['gpt2'])
    config, _ = parse_options(bench.BenchConfig, 'lab/bench.py', argv=[])
    texts = bench.texts_to_read(config, model, saved, 70)
    assert len(texts) == config.rounds == len({str(text) for text in texts})
    assert all(text[0] == 256 and len(text) == 70 and len(set(text)) > 20 for text in texts)
    assert texts == bench.texts_to_read(config, model, saved, 70)


@BOTH
def test_a_shape_gets_the_reductions_asked_for(monkeypatch, tmp_path, arch):
    """... nearly, by quantiles; with 1 it is dense. Stripes are as wide as asked for, one after the other."""
    monkeypatch.setitem(bench.SHAPES, 'gpt2-shape', small_model(arch, block_size=64).config)
    written, _ = rows('decode', 'gpt2-shape', tmp_path, '--reductions', '1,2,4', '--dtypes', 'f32', '--stripe', '8,matrix')
    assert [row.get('stripe') for row in written] == 3 * [8] + 3 * ['matrix'] + 2 * [None]
    wide = written[3:6]
    written = written[:3] + written[6:]
    found = [row['reduction'] for row in written if row['engine'] == 'cwic']
    assert found[0] == 1 and found[1:] == pytest.approx([2, 4], rel=0.15)
    assert [row['speed_over_dense'] > 0 for row in written] == [True] * 5
    counts = [round(row['thresholds_gb_per_token'] * 1e9 / 4) for row in written[:3]]
    for count, stripe in ((counts, 8), ([round(row['thresholds_gb_per_token'] * 1e9 / 4) for row in wide], 2 ** 20)):
        model, _ = bench.choose_model(parse_options(bench.BenchConfig, 'lab/bench.py', argv=[])[0], stripe)
        assert count == 3 * [sum(layer.theta.numel() for _, layer in model.sparse_layers())]
    assert counts == 3 * [sum(layer.n_in * -(-layer.n_out // 8) if hasattr(layer, 'n_out') else layer.n_in
                              for _, layer in model.sparse_layers())]


def test_another_engine_that_crashes_is_left_out(models, tmp_path):
    """
    llama.cpp died of a signal on one file, and with it went every measurement of the others. Now it is one
    line, said once, and the rest is measured.
    """
    program = tmp_path / 'llama-bench'
    program.write_text('#!/bin/sh\ncase "$*" in *good*) ;; *) kill -SEGV $$;; esac\necho '
                       '\'[{"avg_ts": 50.0, "model_size": 1000, "model_type": "gpt2 0.1B Q8_0"}]\'\n', encoding='utf-8')
    program.chmod(0o755)
    for name in ('good.gguf', 'bad.gguf'):
        (tmp_path / name).touch()
    for what, more in (('decode', []), ('prefill', ['--prompts', '8,16'])):
        written, err = rows(what, models['gpt2'], tmp_path, '--dtypes', 'f32', '--llama_bench', program,
                            '--gguf', f'{tmp_path}/bad.gguf,{tmp_path}/good.gguf', *more)
        assert err.count('\n') == 1 and f'{tmp_path}/bad.gguf is left out: ended with code -11' in err
        theirs = [row for row in written if row['engine'] == 'llama.cpp']
        assert [(row['dtype'], row['tok_s']) for row in theirs] == [('Q8_0', 50.0)] * (2 if more else 1)


def test_other_engines_threads_may_spin(tmp_path, monkeypatch):
    """In a shell with OMP_WAIT_POLICY=PASSIVE, good for torch, llama.cpp was measured at 53 tokens/s, not 178."""
    program = tmp_path / 'llama-bench'
    program.write_text('#!/bin/sh\necho "[{\\"avg_ts\\": ${OMP_WAIT_POLICY:-7}.0, \\"model_size\\": 1000, '
                       '\\"model_type\\": \\"Q8_0\\"}]"\n', encoding='utf-8')
    program.chmod(0o755)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    assert bench.run_llama(str(program), 'file', 2, [1] * 8, [1] * 8)['tok_s'] == 7


class SlowGenerator:
    """CTranslate2's interface: 20 ms for a prompt, and 2 for each token after the first."""
    compute_type = 'int8_float32'

    def __init__(self, folder, intra_threads):
        pass

    def generate_batch(self, prompts, max_length, min_length, include_prompt_in_result):
        assert max_length == min_length and set(map(type, prompts[0])) == {str}
        time.sleep(0.02 + 0.002 * (max_length - 1))


def test_ctranslate2(models, data, tmp_path, monkeypatch):
    (tmp_path / 'vocabulary.json').write_text(json.dumps([f't{i}' for i in range(257)]), encoding='utf-8')
    (tmp_path / 'model.bin').write_bytes(bytes(1000))
    options = '--dtypes', 'f32', '--data', data, '--ctranslate2', tmp_path
    monkeypatch.setitem(sys.modules, 'ctranslate2', None)
    written, err = rows('decode', models['gpt2'], tmp_path, *options)
    assert f'{tmp_path} is left out' in err and {row['engine'] for row in written} == {'cwic', 'torch'}
    monkeypatch.setitem(sys.modules, 'ctranslate2', SimpleNamespace(Generator=SlowGenerator))
    row = rows('decode', models['gpt2'], tmp_path, *options)[0][-1]
    assert row['dtype'] == 'int8_float32' and row['gb_per_token'] == pytest.approx(1e-6)
    assert 200 < row['tok_s'] < 700             # 500, but for the moods of the system's clock and other programs
    row = rows('prefill', models['gpt2'], tmp_path, '--prompts', 10, *options)[0][-1]
    assert 100 < row['tok_s'] <= 10 / 0.02


def test_huge_pages_are_those_of_the_weights(monkeypatch):
    """Of the region in which they lie, not of others."""
    weights = torch.zeros(100)
    where = weights.data_ptr()
    decoder = SimpleNamespace(packed={'head': SimpleNamespace(tensors={'weight': weights})})
    smaps = ''.join(f'{low:x}-{high:x} rw-p 00000000 00:00 0 \nSize: 9 kB\nRss:   80 kB\n'
                    f'AnonHugePages:  {huge} kB\nVmFlags: rd wr\n'
                    for low, high, huge in ((16, 4096, 80), (where - 64, where + 4096, 60), (where + 4096, where + 8192, 0)))
    monkeypatch.setattr(bench.Path, 'read_text', lambda path, **more: smaps)
    assert bench.on_huge_pages(decoder) == '75%'


@pytest.fixture(scope='module')
def adapter(models, tmp_path_factory):
    """An adapter of the Llama, far enough from it."""
    path = str(tmp_path_factory.mktemp('adapter') / 'adapter.safetensors')
    model, _ = load_checkpoint(models['llama'])
    cwic.add_lora(model, 2)
    with torch.no_grad():
        for layer, name, _ in cwic.adapters(model):
            getattr(layer, name).B.normal_(std=0.05)
    save_checkpoint(path, model, base=models['llama'], base_sha256=weights_sha256(model),
                    tokenizer={'kind': 'bytes'})
    return path


@pytest.mark.parametrize('kind', ['gpt2', 'adapter'])
def test_loss_is_that_of_the_model(models, data, tmp_path, adapter, kind):
    """Token by token through the kernel in f32, it is that of one pass of PyTorch; so is the KL to the base."""
    path = adapter if kind == 'adapter' else models['gpt2']
    (f32, bf16, int8), _ = rows('loss', path, tmp_path, '--windows', 2, '--data', data)
    model, saved = bench.weights.load(path)
    _, val, _ = common.load_dataset(data, 64)
    losses, active, kls, same = [], 0.0, [], []
    for start_at in (0, len(val) - 65):
        window = torch.from_numpy(val[start_at:start_at + 65].astype(int))
        with torch.no_grad():
            logits, used = model(window[None, :-1])
            losses.append(float(cwic.next_token_loss(logits[0], window[1:])))
            active += float(used.sum()) / 128
            if kind == 'adapter':
                base = load_checkpoint(models['llama'])[0](window[None, :-1], dense=True)[0]
                kls.append(float(torch.nn.functional.kl_div(logits[0].log_softmax(-1), base[0].log_softmax(-1),
                                                            log_target=True, reduction='batchmean')))
                same.append(float((base.argmax(-1) == logits.argmax(-1)).float().mean()))
    assert f32['loss'] == pytest.approx(sum(losses) / 2, abs=1e-4) and f32['loss_over_first'] == 0
    assert f32['reduction'] == pytest.approx(model.n_weights() / active, rel=1e-6)
    for row in (bf16, int8):
        assert abs(row['loss'] - f32['loss']) < 0.1 and row['loss_over_first'] == row['loss'] - f32['loss']
    assert ('kl' in f32) == (kind == 'adapter')
    if kind == 'adapter':
        assert f32['kl'] == pytest.approx(sum(kls) / 2, rel=1e-3) and f32['kl'] > 0.01
        assert f32['agreement'] == pytest.approx(sum(same) / 2)


@pytest.mark.parametrize('args, code, words', [
    ([], 2, 'say what to measure'),
    (['speed'], 2, 'say what to measure'),
    (['decode', 'train'], 2, 'say what to measure'),
    (['decode', '--round', '3'], 2, 'did you mean rounds?'),
    (['decode', '--rounds', '0'], 2, '--rounds must be at least 1'),
    (['decode', '--tokens', '0'], 2, '--tokens must be at least 1'),
    (['loss', '--windows', '0'], 2, '--windows must be at least 1'),
    (['decode', '--threads', '1,two'], 2, '--threads 1,two'),
    (['decode', '--threads', '0'], 2, '--threads 0'),
    (['prefill', '--prompts', ''], 2, '--prompts'),
    (['decode', '--reductions', '0.5'], 2, '--reductions 0.5'),
    (['decode', '--dtypes', 'f32,f64'], 2, 'f32, bf16, int8'),
    (['decode', '--stripe', '64,wide'], 2, '--stripe 64,wide'),
    (['probe', '--model', '{model}'], 2, 'gpt2-shape or smollm2-shape'),
    (['decode', '--json', '{tmp}/file/rows.json'], 2, '--json'),
    (['decode', '--json', '{tmp}'], 2, 'not a file'),
    (['decode', '--out', '{tmp}/file'], 2, '--out'),
    (['decode', '--out', '/proc/nowhere'], 2, '--out'),
    (['decode', '--llama_bench', '/nowhere/llama-bench', '--gguf', '{tmp}/file'], 2, 'no such program'),
    (['decode', '--gguf', '{tmp}/file'], 2, 'go together'),
    (['decode', '--ctranslate2', '/nowhere'], 2, '/nowhere: no such file'),
    (['decode', '--model', 'nowhere.safetensors'], 1, 'nowhere.safetensors: no such checkpoint'),
    (['decode', '--model', 'gpt3'], 1, 'gpt3: no such model'),
    (['decode', '--model', os.devnull], 1, os.devnull),
    (['decode', '--model', '{model}', '--tokens', '60'], 2, '--tokens 60'),
    (['decode', '--model', '{model}', '--data', 'nowhere'], 1, 'data/nowhere'),
    (['loss', '--model', '{model}', '--data', 'python'], 1, 'another tokenizer'),
    (['train', '--model', 'nowhere.safetensors'], 2, 'gpt2-shape'),
    (['train', '--device', 'tpu'], 2, '--device tpu'),
])
def test_what_a_user_gets_wrong_is_one_line(args, code, words, tmp_path, models, monkeypatch):
    """Before anything is measured: what cannot be written was only said after minutes of measuring."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, 'measure', None)
    (tmp_path / 'file').touch()
    ended, _, err = call(*(arg.format(tmp=tmp_path, model=models['gpt2']) for arg in args))
    assert ended == code and words in err, (ended, err)
    assert err.startswith('bench.py: ') and err.count('\n') == 1


def test_ctrl_c(models, tmp_path):
    """While torch is imported, and while it measures: nothing is said, and the shell sees 130."""
    args = ['decode', '--model', models['gpt2'], '--rounds', '300', '--out', tmp_path]
    early, late = start('lab/bench.py', *args), start('lab/bench.py', *args)
    time.sleep(0.3)
    early.send_signal(signal.SIGINT)
    assert late.stdout.readline() and 'huge pages' in late.stdout.readline()
    late.send_signal(signal.SIGINT)
    for process in (early, late):
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT) and err == ''
