"""bench.py on tiny models: what it counts, reads and writes, and its error messages. Never how fast it is."""

import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

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
def models(tmp_path_factory, data):
    """{architecture: path of a checkpoint of a model that was trained on `data`}"""
    paths = {}
    for arch in ('gpt2', 'llama'):
        paths[arch] = str(tmp_path_factory.mktemp('bench') / f'{arch}.safetensors')
        model = small_model(arch, block_size=64, vocab_size=257)
        save_checkpoint(paths[arch], model, tokenizer={'kind': 'bytes'},
                        options={'data': data, 'block_size': 64})
    return paths


def rows(what, model, folder, *args):
    file = folder / 'rows.json'
    code, out, err = call(what, '--model', model, '--rounds', 2, '--threads', 1, '--json', file, '--out', folder, *args)
    assert code == 0, err
    written = json.loads(file.read_text(encoding='utf-8'))
    assert out.startswith(written['machine']) and all(row['what'] == what for row in written['rows'])
    return written['rows'], err


def counted_reduction(model, data, longest, begin, end):
    """PyTorch's median reduction of two rounds, which read the first and the last `longest` validation tokens."""
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
    Dense, and with the checkpoint's own thresholds, over the tokens after the prompt. Bytes per token are those
    of the active weights and of all thresholds (4 bytes each), with int8 also of a scale for each threshold and
    each column.
    """
    written, _ = rows('decode', models[arch], tmp_path, '--tokens', 20)
    model, _ = load_checkpoint(models[arch])
    reduction = counted_reduction(model, data, 36, 16, 36)
    thresholds = sum(layer.theta.numel() for _, layer in model.sparse_layers())
    columns = sum(layer.down.shape[1] if hasattr(layer, 'down') else layer.n_out for _, layer in model.sparse_layers())
    ours = [row for row in written if row['engine'] == 'cwic']
    assert [row['dtype'] for row in ours] == ['f32', 'f32', 'bf16', 'bf16', 'int8', 'int8']
    for row, sparse in zip(ours, 3 * (False, True)):
        scales = thresholds + columns if row['dtype'] == 'int8' else 0
        expected = reduction if sparse else 1
        # with bf16 and int8, rounding turns a few comparisons around
        assert row['reduction'] == pytest.approx(expected, rel=1e-9 if row['dtype'] == 'f32' else 0.05)
        assert row['thresholds_gb_per_token'] * 1e9 == pytest.approx(4 * (thresholds + scales))
        weights = model.n_weights() / row['reduction'] * BYTES[row['dtype']]    # roughly: medians of two rounds
        assert row['gb_per_token'] * 1e9 == pytest.approx(weights + 4 * (thresholds + scales), rel=1e-3)
        assert row['tok_s_min'] <= row['tok_s'] <= row['tok_s_max'] and row['bandwidth_gb_s'] > 0
    assert [row['dtype'] for row in written if row['engine'] == 'torch'] == ['f32', 'bf16']
    assert (tmp_path / 'bench_decode.png').stat().st_size > 10000


def test_prefill_reads_prompts_of_the_lengths_asked_for(models, data, tmp_path):
    """Cut to the context; the reduction is that of the prompt."""
    written, _ = rows('prefill', models['gpt2'], tmp_path, '--prompts', '5,1000,40', '--dtypes', 'f32')
    model, _ = load_checkpoint(models['gpt2'])
    assert [(row['prompt'], row['engine']) for row in written] == [
        (length, engine) for length in (5, 40, 64) for engine in ('cwic', 'cwic', 'torch', 'torch')]
    for row in written[1::4]:
        assert row['reduction'] == pytest.approx(counted_reduction(model, data, 64, 0, row['prompt']))
        assert row['seconds'] * row['tok_s'] == pytest.approx(row['prompt']) and 'roofline' not in row


def test_every_build_reads_the_same_text(models, data, monkeypatch):
    """
    Once the model wrote its own texts through the kernel, so two builds read different ones. The rounds' texts
    are pieces of validation data: of data/heldout for SmolLM2's tokenizer, else of what the model was trained on.
    """
    model, saved = load_checkpoint(models['gpt2'])
    config, _ = parse_options(bench.BenchConfig, 'lab/bench.py', argv=[])
    monkeypatch.setattr(bench.Decoder, 'step', None)
    heldout, own = (np.fromfile(f'{folder}/val.bin', np.uint16) for folder in (common.DATA / 'heldout', data))

    def pieces(ids, length):
        return [ids[start:start + length].tolist() for start in np.linspace(0, len(ids) - length, 7).astype(int)]

    spec = json.loads((common.DATA / 'heldout' / 'meta.json').read_text(encoding='utf-8'))['tokenizer']
    texts = bench.texts_to_read(config, model, {'tokenizer': spec, 'options': {'data': data}}, 1000)
    assert texts == pieces(heldout, 1000)
    texts = bench.texts_to_read(config, model, saved | {'options': {'data': data}}, 70)
    assert texts == pieces(own, 70)
    with pytest.raises(common.DataError, match=f'{len(own):,} validation tokens; {len(own) + 1:,} are needed'):
        bench.texts_to_read(config, model, saved | {'options': {'data': data}}, len(own))


def test_llama1b_shape_is_that_of_llama_3_2_1b(tmp_path):
    """As its config.json has it, with its 1,235,814,400 parameters; thresholds besides."""
    released = {'model_type': 'llama', 'hidden_size': 2048, 'intermediate_size': 8192, 'num_attention_heads': 32,
                'num_key_value_heads': 8, 'head_dim': 64, 'num_hidden_layers': 16, 'vocab_size': 128256,
                'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5, 'rope_theta': 500000.0,
                'tie_word_embeddings': True}
    (tmp_path / 'config.json').write_text(json.dumps(released), encoding='utf-8')
    assert bench.SHAPES['llama1b-shape'] == bench.weights.read_config(tmp_path / 'config.json', 128256)
    with torch.device('meta'):
        model = cwic.GPT(bench.SHAPES['llama1b-shape'])
    assert sum(p.numel() for name, p in model.named_parameters() if 'theta' not in name) == 1_235_814_400


@BOTH
def test_shapes_reach_the_reductions_asked_for(monkeypatch, tmp_path, arch):
    """Nearly, by quantiles; 1 is dense, with every weight."""
    monkeypatch.setitem(bench.SHAPES, 'gpt2-shape', small_model(arch, block_size=64).config)
    written, _ = rows('decode', 'gpt2-shape', tmp_path, '--reductions', '1,2,4', '--dtypes', 'f32')
    found = [row['reduction'] for row in written if row['engine'] == 'cwic']
    assert found[0] == 1 and found[1:] == pytest.approx([2, 4], rel=0.15)
    assert [row['speed_over_dense'] > 0 for row in written] == [True] * 5


def test_a_crash_of_llama_bench_leaves_the_other_measurements(models, tmp_path):
    """It died of a signal on one file, and all other measurements were lost. Now one line says so, once."""
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


def test_llama_bench_does_not_get_torchs_wait_policy(tmp_path, monkeypatch):
    """In a shell with OMP_WAIT_POLICY=PASSIVE, good for torch, llama.cpp was measured at 53 tokens/s, not 178."""
    program = tmp_path / 'llama-bench'
    program.write_text('#!/bin/sh\necho "[{\\"avg_ts\\": ${OMP_WAIT_POLICY:-7}.0, \\"model_size\\": 1000, '
                       '\\"model_type\\": \\"Q8_0\\"}]"\n', encoding='utf-8')
    program.chmod(0o755)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    assert bench.run_llama(str(program), 'file', 2, [1] * 8, [1] * 8)['tok_s'] == 7


@pytest.fixture(scope='module')
def adapter(models, tmp_path_factory):
    """An adapter of the Llama, with a KL that is not tiny."""
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
def test_loss_through_the_kernel_is_that_of_pytorch(models, data, tmp_path, adapter, kind):
    """Token by token in f32; so is the KL to the base."""
    path = adapter if kind == 'adapter' else models['gpt2']
    (f32, bf16, int8), _ = rows('loss', path, tmp_path, '--windows', 2, '--data', data)
    model, saved = bench.weights.load(path)
    _, val, _ = common.load_dataset(data, 64)
    losses, active, kls, same = [], 0.0, [], []
    for start_at in (0, len(val) - 65):
        window = torch.from_numpy(val[start_at:start_at + 65].astype(int))
        with torch.no_grad():
            logits, used = model(window[None, :-1])
            losses.append(float(torch.nn.functional.cross_entropy(logits[0], window[1:])))
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
    (['decode', '--round', '3'], 2, 'unrecognized arguments: --round'),
    (['decode', '--rounds', '0'], 2, '--rounds must be at least 1'),
    (['decode', '--tokens', '0'], 2, '--tokens must be at least 1'),
    (['loss', '--windows', '0'], 2, '--windows must be at least 1'),
    (['decode', '--threads', '1,two'], 2, '--threads 1,two'),
    (['decode', '--threads', '0'], 2, '--threads 0'),
    (['prefill', '--prompts', ''], 2, '--prompts'),
    (['decode', '--reductions', '0.5'], 2, '--reductions 0.5'),
    (['decode', '--dtypes', 'f32,f64'], 2, 'f32, bf16, int8'),
    (['probe'], 2, 'say what to measure'),
    (['decode', '--json', '{tmp}/file/rows.json'], 2, '--json'),
    (['decode', '--json', '{tmp}'], 2, 'not a file'),
    (['decode', '--out', '{tmp}/file'], 2, '--out'),
    (['decode', '--out', '/proc/nowhere'], 2, '--out'),
    (['decode', '--llama_bench', '/nowhere/llama-bench', '--gguf', '{tmp}/file'], 2, 'no such program'),
    (['decode', '--gguf', '{tmp}/file'], 2, 'go together'),
    (['decode', '--llama_bench', 'sh', '--gguf', '/nowhere'], 2, '--gguf /nowhere: no such file'),
    (['decode', '--model', 'nowhere.safetensors'], 1, 'nowhere.safetensors: no such model'),
    (['decode', '--model', 'gpt3'], 1, 'gpt3: no such model'),
    (['decode', '--model', os.devnull], 1, os.devnull),
    (['decode', '--model', '{model}', '--tokens', '60'], 2, '--tokens 60'),
    (['decode', '--model', '{model}', '--data', 'nowhere'], 1, 'data/nowhere'),
    (['loss', '--model', '{model}', '--data', 'heldout'], 1, 'choose another, --data NAME'),
    (['train', '--model', 'nowhere.safetensors'], 2, 'gpt2-shape'),
    (['train', '--device', 'tpu'], 2, '--device tpu'),
])
def test_what_a_user_gets_wrong_is_one_line(args, code, words, tmp_path, models, monkeypatch):
    """Before anything is measured: once a file that could not be written was reported after minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, 'measure', None)
    (tmp_path / 'file').touch()
    ended, _, err = call(*(arg.format(tmp=tmp_path, model=models['gpt2']) for arg in args))
    assert ended == code and words in err, (ended, err)
    assert err.startswith('bench.py: ') and err.count('\n') == 1


def test_ctrl_c_ends_silently(models, tmp_path):
    """While torch is imported, and while it measures; the exit code is 130."""
    args = ['decode', '--model', models['gpt2'], '--rounds', '300', '--out', tmp_path]
    early, late = start('lab/bench.py', *args), start('lab/bench.py', *args)
    time.sleep(0.3)
    early.send_signal(signal.SIGINT)
    assert late.stdout.readline()
    late.send_signal(signal.SIGINT)
    for process in (early, late):
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT) and err == ''
