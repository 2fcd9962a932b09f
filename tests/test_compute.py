"""compute.py: kinds of tokens on handmade lines, and every number against a plain count."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from lab import compute
import cwic
from checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from data import common
from test_cwic import BOTH, one_thread, small_model     # noqa: F401  one_thread: a fixture, for all
from test_selfwritten import SPEC
from tokenizer import load_tokenizer

# stripes do not end where q, k and v do: 32, 32, 32 or, for Llama, 32, 16, 16 columns
SIZES = {'vocab_size': 257, 'block_size': 16, 'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'n_hidden': 64,
         'stripe_qkv': 24, 'stripe_out': 16, 'stripe_up': 24, 'stripe_down': 16, 'stripe_head': 100}


def windows_of(seed=0, count=4):
    return np.random.default_rng(seed).integers(0, 257, (count, 17))


def test_kinds_of_tokens_of_python():
    code = 'def add(a):\n    # a note\n    x = 10 + a\n    return "in a" + x'
    expected = ['first token', 'new name', 'operator', 'new name', 'operator', 'operator', 'indentation',
                'comment', 'comment', 'indentation', 'new name', 'operator', 'number', 'operator',
                'name seen before', 'indentation', 'keyword', 'string', 'string', 'operator', 'name seen before']
    pieces = ['def', ' add', '(', 'a', ')', ':', '\n    ', '# a', ' note', '\n    ', 'x', ' =', ' 10', ' +',
              ' a', '\n    ', 'return', ' "in', ' a"', ' +', ' x']
    assert ''.join(pieces) == code
    assert compute.kinds_of_tokens([p.encode() for p in pieces], compute.PYTHON) == expected


def test_kinds_of_tokens_of_dialogue():
    """A character of two bytes, cut between them, once shifted all kinds after it by one."""
    tokens = [('<|im_start|>', 'first token'), ('system', 'template'), ('\n', 'template'), ('You', 'template'),
              ('<|im_end|>', 'template'), ('\n', 'template'), ('<|im_start|>', 'template'),
              ('user', 'template'), ('\n', 'template'), ('Is', 'function word'), (' Al', 'name'),
              ('ma', 'name'), (' older', 'content word'), (' than', 'function word'), (' 42', 'digits'),
              ('?', 'punctuation'), (' Caf', 'content word'), (b'\xc3', 'content word'),
              (b'\xa9', 'content word'), (' in', 'function word'), (' Paris', 'name'), (',', 'punctuation'),
              ('\n\n', 'space'), ('Then', 'function word'), (' 7', 'digits'), (b'\xff', 'punctuation'),
              ('<|im_end|>', 'template')]
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece, _ in tokens]
    assert compute.kinds_of_tokens(pieces, compute.PROSE) == [kind for _, kind in tokens]


@BOTH
def test_compute_loss_entropy_and_gain_of_single_tokens(arch):
    """Against a pass that ends at the token; the teacher is another model, as for an adapter."""
    model, teacher, windows = small_model(arch, **SIZES), small_model(arch, seed=5, **SIZES), windows_of()
    found = compute.measure(model, teacher, windows)
    for w, t in ((0, 0), (1, 7), (3, 15)):
        read = torch.from_numpy(windows[w:w + 1, :t + 1])
        p = torch.softmax(model(read)[0][0, t].double(), 0)
        q = torch.softmax(teacher(read, dense=True)[0][0, t].double(), 0)
        target = int(windows[w, t + 1])
        assert found['share'][w, t] == pytest.approx(model(read)[1][:, 0, t].sum().item() / model.n_weights(), rel=1e-6)
        assert found['loss'][w, t] == pytest.approx(-math.log(float(p[target].detach())), abs=1e-4)
        assert found['entropy'][w, t] == pytest.approx(-sum(x * math.log(x) for x in p.tolist()), abs=1e-4)
        assert found['gain'][w, t] == pytest.approx(math.log((q[target] / p[target]).item()), abs=1e-4)
    same = compute.measure(model, model, windows)
    assert abs(same['gain']).max() > 0.1 and np.array_equal(same['share'], found['share'])


@BOTH
def test_matrices_and_heads_against_a_loop(arch):
    model, windows = small_model(arch, thresholds=3.0, **SIZES), windows_of(count=2)
    for block in model.blocks:      # else a head is rarely skipped entirely
        block.attn.out.theta.data[:, :8] = 2 / block.attn.out.scale
    found = compute.measure(model, model, windows)
    inputs = {}
    for i, block in enumerate(model.blocks):
        block.attn.out.register_forward_pre_hook(
            lambda gate, args, i=i: inputs.update({i: args[0].detach().flatten(0, 1).numpy()}))
    active = model(torch.from_numpy(windows[:, :-1]))[1].detach()
    for i, block in enumerate(model.blocks):
        gate, silent = block.attn.out, np.zeros(4)
        t, mu = gate.thresholds().detach().numpy(), gate.mu.numpy()
        for x in inputs[i]:
            for head in range(4):
                some = slice(8 * head, 8 * head + 8)
                silent[head] += not any((np.abs(x - mu)[some] > stripe[some]).any() for stripe in t)
        assert found['heads'][i].tolist() == pytest.approx((silent / 32).tolist()) and silent[0] > 0
    assert found['active_share'] == pytest.approx([float(count.sum()) / 32 / layer.n_weights for count, (_, layer)
                                                   in zip(active, model.sparse_layers())])


def test_means_and_correlations():
    share = np.array([[0.1, 0.2, 0.3, 0.5, 0.7], [0.3, 0.2, 0.1, 0.1, 0.5]])
    found = {'share': share, 'loss': np.arange(10.0).reshape(2, 5), 'entropy': share ** 2, 'gain': -share}
    kinds = np.array([['first token', 'a', 'b', 'b', 'a'], ['first token', 'b', 'b', 'b', 'a']])
    rows = compute.by_kind(kinds, found)
    assert [row[:2] for row in rows] == [('a', 3), ('b', 5), ('first token', 2)]
    assert rows[0][2:] == pytest.approx((1.4 / 3, (0 + 3 + 8) / 3, -1.4 / 3))
    assert rows[1][2:] == pytest.approx((0.24, (1 + 2 + 5 + 6 + 7) / 5, -0.24)) and np.isnan(rows[2][3])
    assert compute.by_position(share) == [(0, 0, pytest.approx(0.2)), (1, 1, pytest.approx(0.2)),
                                          (2, 3, pytest.approx(0.25)), (4, 4, pytest.approx(0.6))]
    values = np.array([[5.0, 1, 2, 9, 8], [7, 3, 4, 6, 0]])
    assert compute.by_value(values, share, bins=2) == [
        pytest.approx((2, np.mean([.5, .2, .3, .2, .1]), *np.percentile([.5, .2, .3, .2, .1], (10, 90)))),
        pytest.approx((7, np.mean([.1, .1, .3, .7, .5]), *np.percentile([.1, .1, .3, .7, .5], (10, 90))))]
    expected = np.corrcoef([.2, .3, .5, .7, .2, .1, .1, .5], [0, 1, 2, 3, 5, 6, 7, 8])[0, 1]
    found_all = compute.correlations(found, kinds != '')
    assert found_all['surprise of the token read'] == pytest.approx(expected)
    assert found_all['what every weight would gain'] == pytest.approx(-1)
    expected = np.corrcoef([.3, .5, .2, .1, .1], [1, 2, 5, 6, 7])[0, 1]
    assert compute.correlations(found, kinds == 'b')['surprise of the token read'] == pytest.approx(expected)
    expected = np.corrcoef([.3, .5, .2, .1, .1], [2, 3, 6, 7, 8])[0, 1]
    assert compute.correlations(found, kinds == 'b')['loss of the prediction'] == pytest.approx(expected)
    found['share'] = np.full((2, 5), 0.5)           # as in a dense model
    assert set(compute.correlations(found, kinds != '').values()) == {0.0}


# -----------------------------------------------------------------------------
# the program

MESSAGE = '<|im_start|>{role}\n{text}<|im_end|>\n'


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(...) runs it on data of bytes in independent windows of 16."""
    random = np.random.default_rng(0)
    ids = random.integers(97, 123, (40, 16)).astype(np.uint16)
    meta = {'tokenizer': {'kind': 'bytes'}, 'vocab_size': 257, 'source': 'a test', 'window': 16}
    for split in ('train', 'val'):
        ids.tofile(tmp_path / f'{split}.bin')
        meta.update({f'{split}_tokens': ids.size, f'{split}_bytes': ids.size})
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    save_checkpoint(tmp_path / 'sparse.safetensors', small_model(**SIZES), tokenizer={'kind': 'bytes'},
                    options={'block_size': 16, 'data': str(tmp_path)})

    def call(*more):
        monkeypatch.setattr(sys, 'argv', ['lab/compute.py', *more])
        common.run(compute.main)
    return call


def test_program_reads_windows_without_the_next_ones_first_token(program, tmp_path, monkeypatch, capsys):
    """In independent windows, the token after the last one belongs to another text."""
    seen, measure = [], compute.measure
    monkeypatch.setattr(compute, 'measure', lambda model, teacher, windows: seen.append(windows) or
                        measure(model, teacher, windows))
    program(str(tmp_path / 'sparse.safetensors'), '--windows', '5', '--device', 'cpu', '--picture', str(tmp_path / 'p.png'))
    data = np.fromfile(tmp_path / 'val.bin', np.uint16).reshape(-1, 16)
    assert seen[0].shape == (5, 16) and all(window.tolist() in data.tolist() for window in seen[0])
    out = capsys.readouterr().out
    model = load_checkpoint(tmp_path / 'sparse.safetensors')[0]
    _, active = model(torch.from_numpy(seen[0][:, :-1]))
    assert f'75 tokens, which use {float(active.detach().sum()) / 75 / model.n_weights():.1%} of the weights' in out
    assert (tmp_path / 'p.png').read_bytes().startswith(b'\x89PNG')


def test_dialogues_are_the_windows_that_begin_with_the_template(tmp_path, monkeypatch, capsys):
    """Every third one here; documents may hold the template's tokens, but not at their beginning."""
    ids = np.random.default_rng(0).integers(100, 120, (30, 16)).astype(np.uint16)
    ids[::3, :6], ids[1::3, 3] = load_tokenizer(SPEC).encode('<|im_start|>user\n', allowed_special='all'), 1
    meta = {'tokenizer': SPEC, 'vocab_size': 259, 'source': 'a test', 'window': 16}
    for split in ('train', 'val'):
        ids.tofile(tmp_path / f'{split}.bin')
        meta.update({f'{split}_tokens': ids.size, f'{split}_bytes': ids.size})
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    save_checkpoint(tmp_path / 'chat.safetensors', small_model(**{**SIZES, 'vocab_size': 259}), tokenizer=SPEC,
                    options={'block_size': 16, 'data': str(tmp_path)})
    seen, measure = [], compute.measure
    monkeypatch.setattr(compute, 'measure', lambda model, teacher, windows: seen.append(windows) or
                        measure(model, teacher, windows))
    monkeypatch.setattr(sys, 'argv', ['lab/compute.py', str(tmp_path / 'chat.safetensors'), '--only', 'dialogues', '--device', 'cpu'])
    common.run(compute.main)
    assert len(seen[0]) >= 9 and all(window.tolist() in ids[::3].tolist() for window in seen[0])
    kinds = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:] if '%' in line]
    assert {'template', 'content', 'first'} <= set(kinds)


def test_an_adapter_is_compared_with_its_base(program, tmp_path, monkeypatch):
    """The adapter itself, run dense, is a model that nobody trained."""
    base = small_model(thresholds=0.0, **SIZES)
    save_checkpoint(tmp_path / 'base.safetensors', base, tokenizer={'kind': 'bytes'})
    cwic.add_lora(base, 2)
    for layer, adapter, _ in cwic.adapters(base):
        torch.nn.init.normal_(getattr(layer, adapter).B)
    save_checkpoint(tmp_path / 'adapter.safetensors', base, base=str(tmp_path / 'base.safetensors'),
                    base_sha256=weights_sha256(base), tokenizer={'kind': 'bytes'},
                    options={'block_size': 16, 'data': str(tmp_path)})
    teachers, measure = [], compute.measure
    monkeypatch.setattr(compute, 'measure', lambda model, teacher, windows: teachers.append((model, teacher)) or
                        measure(model, teacher, windows))
    program(str(tmp_path / 'adapter.safetensors'), '--windows', '2', '--device', 'cpu')
    model, teacher = teachers[0]
    plain = small_model(thresholds=0.0, **SIZES)
    assert torch.equal(teacher.head.weight, plain.head.weight) and not torch.equal(model.head.weight, plain.head.weight)


def test_what_a_user_gets_wrong_is_one_line(program, tmp_path, capsys):
    path = str(tmp_path / 'sparse.safetensors')
    for more, says in (([str(tmp_path / 'none.safetensors')], 'no such model'), ([path, path], 'give one checkpoint'),
                       ([path, '--only', 'dialogues'], 'no validation windows that are dialogues'), ([path, '--windows', '0'], 'at least 1'),
                       ([path, '--data', 'python'], 'another tokenizer'),
                       ([path, '--picture', 'tokens.foo'], 'must end in .png, .svg or .pdf')):
        with pytest.raises(SystemExit) as ended:
            program(*more)
        error = capsys.readouterr().err
        assert ended.value.code in (1, 2) and error.count('\n') == 1 and says in error, error
