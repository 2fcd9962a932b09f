"""
Checkpoints: what is saved is loaded, adapters included; what is wrong with a file, or a disk, is one line; and
bytes on disk after a kill.
"""

import math
import os
import pickle
import resource
import signal
import time
import zipfile
from dataclasses import asdict

import pytest
import torch

import cwic
from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cwic import GPT, CWICConfig
from test_cwic import (BOTH, SIZES, one_thread, random_tokens,      # noqa: F401  one_thread is a fixture
                       small_model, train_a_little)


@BOTH
def test_checkpoint_round_trip(tmp_path, arch):
    model, tokens = small_model(arch), random_tokens(1, 8)
    save_checkpoint(tmp_path / 'm.pt', model, step=7)
    loaded, saved = load_checkpoint(tmp_path / 'm.pt')
    assert saved['step'] == 7 and not loaded.training and loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model(tokens), loaded(tokens)))
    assert os.listdir(tmp_path) == ['m.pt']


def test_a_frozen_model_is_saved_whole(tmp_path):
    """What is frozen was left out, base or not: a copy only meant to be read could not be loaded again."""
    model, tokens = cwic.dense_copy(small_model()), random_tokens(1, 8)
    save_checkpoint(tmp_path / 'm.pt', model)
    assert torch.equal(load_checkpoint(tmp_path / 'm.pt')[0](tokens)[0], model(tokens)[0])


class RunsCode:
    def __reduce__(self):
        return os.system, ('touch ran',)


def nested(depth):
    """
    A pickle of {'model': {}, 'config': {'block_size': [[[...]]]}}, deeper than pickle itself could write.
    """
    lists = b']' * depth + b'a' * (depth - 1)
    return pickle.dumps({'model': {}}, 2)[:-1] + b'X\x06\0\0\0config}X\x0a\0\0\0block_size' + lists + b'ss.'


@pytest.mark.parametrize('kind', ['missing', 'folder', 'truncated', 'beginning', 'empty', 'a tensor',
                                  'a list', 'foreign', 'code', 'compressed', 'nested'])
def test_bad_files_are_one_line(tmp_path, kind, monkeypatch):
    """
    Metadata was once pickled, so loading a stranger's checkpoint ran the stranger's code. Of a file with only
    its beginning, the message was "cannot be read (Invalid argument)": torch seeks before the start of it. A
    tensor was an IndexError.
    """
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'm.pt'
    save_checkpoint(path, small_model())
    whole = path.read_bytes()
    if kind in ('missing', 'folder'):
        path.unlink()
        if kind == 'folder':
            path.mkdir()
    elif kind in ('truncated', 'beginning', 'empty'):
        path.write_bytes(whole[:{'truncated': -1000, 'beginning': 5000, 'empty': 0}[kind]])
    elif kind == 'compressed':
        with zipfile.ZipFile(path) as stored:
            entries = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as deflated:
            for name, content in entries.items():
                deflated.writestr(name, content)
    elif kind == 'nested':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('m/data.pkl', nested(20000))
            archive.writestr('m/version', '3\n')
    else:
        torch.save({'a tensor': torch.zeros(3), 'a list': [1], 'foreign': {'weights': torch.zeros(3)},
                    'code': {'model': RunsCode(), 'config': SIZES}}[kind], path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert '\n' not in str(error.value) and str(path) in str(error.value)
    expected = {'missing': 'no such checkpoint', 'folder': 'cannot be read (Is a directory)'}
    assert expected.get(kind, 'damaged') in str(error.value) and not os.path.exists('ran')


def peak_memory():
    """The most memory this process held at once since the last call, in bytes."""
    with open('/proc/self/status', encoding='utf-8') as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM'))
    with open('/proc/self/clear_refs', 'w', encoding='utf-8') as file:
        file.write('5')
    return peak


@pytest.mark.filterwarnings('ignore:Sparse CSR tensor support is in beta')
@BOTH
def test_lies_about_sizes_are_one_line_and_cost_nothing(tmp_path, arch):
    """
    A file of some KB said n_layer=10**9, or n_embd=16384, and took gigabytes before a shape was compared.
    Others came as far as the first forward pass with a size that was a string, or a tensor of ten billion
    numbers that are all the same one.
    """
    path, model = tmp_path / 'm.pt', small_model(arch)
    state, config = model.state_dict(), asdict(model.config)

    # a size of another type, or beyond reason; 0 or nothing is harmless where it stands for the usual size
    wrong = ['6', None, [], [1], (1, 2), True, 10 ** 30, 0, -1, math.nan, {}, torch.tensor(6)]
    lies = [{name: value} for name in config for value in wrong
            if name != 'bias' and (value or name not in ('n_kv_head', 'n_hidden'))]
    lies += [{name: 16.5} for name in config if isinstance(config[name], int) and name != 'bias']
    lies += [{'n_layer': 10 ** 9}, {'n_layer': 3}, {'n_embd': 16384}, {'vocab_size': 10 ** 9}, {'unknown': 1}]
    cases = [(state, {**config, **lie}) for lie in lies]

    # tensors that are missing, too many, of another shape or type, or no tensors at all
    less = dict(list(state.items())[:-1])
    cases += [(bad, config) for bad in (None, [], 'abc', {}, {1: 2}, {'head.weight': 5}, less)]
    cases += [({**state, 'head.mu': bad}, config) for bad in (
        torch.zeros(17), torch.zeros(16, 1), torch.zeros(16).half(), torch.zeros(16).long(),
        torch.zeros(16).to_sparse(), torch.zeros(16, device='meta'))]
    cases += [({**state, 'more': torch.zeros(1)}, config),
              ({**state, 'blocks.0.attn.out.weight': torch.eye(16).to_sparse_csr()}, config)]

    # every tensor of a huge model, in a file of some KB: one number each, over and over
    stripes = {name: 10 ** 6 for name in config if name.startswith('stripe')}
    huge = {**config, 'n_embd': 16384, 'n_hidden': 65536, **stripes}
    with torch.device('meta'):
        shapes = {name: tensor.shape for name, tensor in GPT(CWICConfig(**huge)).state_dict().items()}
    cases.append(({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, huge))

    peak_memory()
    before = peak_memory()
    for bad_state, bad_config in cases:
        torch.save({'model': bad_state, 'config': bad_config}, path)
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match='^[^\n]*damaged[^\n]*$'):
            load_checkpoint(path)
            pytest.fail(f'was loaded: {bad_config}')
        assert time.perf_counter() - start < 3
    assert len(cases) > 200 and peak_memory() - before < 100e6


def test_nothing_that_is_not_finite_is_ever_written(tmp_path):
    """A step that diverged was saved over the good last.pt, and --resume then failed for ever."""
    path = tmp_path / 'm.pt'
    save_checkpoint(path, small_model())
    whole = path.read_bytes()
    for name, bad in (('head.weight', math.nan), ('ln_f.bias', math.inf), ('head.sigma', -math.inf)):
        model = small_model()
        model.state_dict()[name].view(-1)[-1] = bad
        with pytest.raises(CheckpointError, match='not written: .* not finite'):
            save_checkpoint(path, model)
        assert path.read_bytes() == whole and os.listdir(tmp_path) == ['m.pt']


def test_a_disk_that_does_not_take_it(tmp_path):
    """
    A disk that is nearly full gave torch's RuntimeError as a traceback. A limit on the size of files stands
    in for it, at many sizes: at some torch notices, at others the file does.
    """
    path, (soft, hard) = tmp_path / 'm.pt', resource.getrlimit(resource.RLIMIT_FSIZE)
    model = small_model(n_hidden=1000)
    save_checkpoint(path, model, step=0)
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 20):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            with pytest.raises(CheckpointError) as error:
                save_checkpoint(path, model, step=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert 'cannot be written' in str(error.value) and '\n' not in str(error.value)
        assert path.read_bytes() == whole and os.listdir(tmp_path) == ['m.pt']
    for impossible in (tmp_path / 'no' / 'such' / 'm.pt', path / 'm.pt', tmp_path):
        with pytest.raises(CheckpointError, match='cannot be written'):
            save_checkpoint(impossible, model)


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    """*.PID.partial files stayed for ever: 46 of them after 200 kills."""
    dead, living = 2 ** 31 - 1, os.getppid()
    stay = {f'm.pt.{living}.partial', f'other.pt.{dead}.partial', 'm.pt.x.partial'}
    for name in stay | {f'm.pt.{dead}.partial'}:
        (tmp_path / name).write_bytes(b'half')
    save_checkpoint(tmp_path / 'm.pt', small_model())
    assert set(os.listdir(tmp_path)) == stay | {'m.pt'}


@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')
def test_a_kill_in_the_middle_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL at many different moments of a process that does nothing but save: what is there must load."""
    path, left, model = tmp_path / 'm.pt', 0, GPT(CWICConfig(n_embd=192, n_head=3))
    save_checkpoint(path, model, step=0)
    for attempt in range(12):
        last = load_checkpoint(path)[1]['step']
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            while True:
                last += 1
                save_checkpoint(path, model, step=last)
        time.sleep(0.02 + 0.013 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert load_checkpoint(path)[1]['step'] >= last
        left += len(os.listdir(tmp_path)) - 1
    assert left >= 1                            # some kills did come in the middle,
    assert len(os.listdir(tmp_path)) <= 2       # and what they left was cleared away


# -----------------------------------------------------------------------------
# adapters


@BOTH
@pytest.mark.parametrize('rank', [3, 20])
def test_adapter_is_saved_loaded_and_merged(arch, rank, tmp_path):
    """
    The file holds only what was trained, and gives the model whose weights are W + A @ B, computed here by
    hand; merged or not, it trains on. A rank above the narrowest width (20 > 16) was read off the shapes
    wrongly.
    """
    path, tokens = tmp_path / 'a.pt', random_tokens(1, 16)
    model = small_model(arch)
    cwic.add_adapters(model, rank)
    train_a_little(model)
    expected, expected_active = model(tokens)
    save_checkpoint(path, model, base='the base', rank=rank)
    for merge in (True, False):
        loaded, saved = load_checkpoint(path, base={'the base': small_model(arch)}.get, merge=merge)
        logits, active = loaded(tokens)
        assert torch.allclose(logits, expected, atol=1e-4)
        assert torch.allclose(active, expected_active, atol=28)         # one input or neuron, by rounding
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert saved['model'].keys() == model.state_dict().keys() - set(frozen) and 'head.weight' in frozen
        by_hand = small_model(arch, seed=9)
        state = model.state_dict()
        by_hand.load_state_dict(state, strict=False)        # thresholds and matrices, without their changes
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                layer, _, matrix = name.rpartition('.')
                adapter = f'{layer}.adapter' if matrix == 'weight' else f'{layer}.adapter_{matrix}'
                if f'{adapter}.A' in state:
                    p += state[f'{adapter}.A'] @ state[f'{adapter}.B']
        assert torch.allclose(by_hand(tokens)[0], logits, atol=1e-4)
        # training goes on: of the adapter with its base frozen, or of all weights
        names = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert names == {name for name, p in loaded.named_parameters() if merge or name not in frozen}
        before = {name: p.clone() for name, p in loaded.named_parameters()}
        train_a_little(loaded)
        assert {name for name, p in loaded.named_parameters() if not torch.equal(before[name], p)} == names


def test_adapter_in_int8_is_smaller_and_as_good(tmp_path):
    """Each rank term to 8 bits of its largest: a rounding error of 1 / 254 of that, or less."""
    model, tokens = small_model(), random_tokens(1, 16)
    cwic.add_adapters(model, 8)
    train_a_little(model)
    save_checkpoint(tmp_path / 'wide.pt', model, base='b')
    save_checkpoint(tmp_path / 'narrow.pt', model, narrow=True, base='b')
    wide, narrow = (load_checkpoint(tmp_path / name, base=lambda name: small_model())
                    for name in ('wide.pt', 'narrow.pt'))
    saved = narrow[1]['model']
    assert {t.dtype for name, t in saved.items() if name.endswith(('.A', '.B'))} == {torch.int8}
    assert {t.dtype for name, t in saved.items() if not name.endswith(('.A', '.B'))} == {torch.float32}
    unmerged, _ = load_checkpoint(tmp_path / 'narrow.pt', base=lambda name: small_model(), merge=False)
    for name, p in model.named_parameters():
        if name.endswith(('.A', '.B')):
            largest = p.abs().amax(0 if name.endswith('.A') else 1, keepdim=True)
            assert ((unmerged.state_dict()[name] - p).abs() <= largest / 254 * 1.001).all()
    a, b = wide[0](tokens, dense=True)[0], narrow[0](tokens, dense=True)[0]
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 1e-2


@pytest.mark.parametrize('kind', ['no base', 'other base', 'odd base', 'huge rank', 'huge scale',
                                  'adapter missing'])
def test_adapter_that_does_not_fit_is_one_line(tmp_path, kind):
    model, path = small_model(), tmp_path / 'a.pt'
    cwic.add_adapters(model, 3)
    save_checkpoint(path, model, base='the base')
    saved = torch.load(path)
    if kind == 'odd base':
        saved['base'] = ['the base']
    elif kind == 'huge rank':       # one number, 16 billion times
        saved['model'] |= {'head.adapter.A': torch.zeros(1, 1).expand(16, 10 ** 9)}
    elif kind == 'huge scale':      # would make of 3 numbers 3 billion
        saved['model'] |= {'head.adapter.A.scale': torch.zeros(16, 1, 1).expand(16, 10 ** 7, 1)}
    elif kind == 'adapter missing':
        del saved['model']['blocks.1.mlp.down.adapter.B']
    torch.save(saved, path)
    n_hidden = 36 if kind == 'other base' else 28
    base = None if kind == 'no base' else lambda name: small_model(n_hidden=n_hidden)
    with pytest.raises(CheckpointError, match="needs its base 'the base'" if base is None else 'damaged'):
        load_checkpoint(path, base=base)
