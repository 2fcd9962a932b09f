"""
Checkpoints: what is saved is loaded, adapters included; what is wrong with a file, or a disk, is one line; and
bytes on disk after a kill.
"""

import json
import math
import os
import resource
import signal
import struct
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import linux_only
import cwic
from checkpoint import (CheckpointError, load_checkpoint, read_safetensors, save_checkpoint, weights_sha256,
                        write_safetensors)
from cwic import GPT, CWICConfig
from test_cwic import (BOTH, SIZES, one_thread, random_tokens,      # noqa: F401  one_thread is a fixture
                       small_model, train_a_little)


@BOTH
def test_checkpoint_round_trip(tmp_path, arch):
    model, tokens = small_model(arch), random_tokens(1, 8)
    save_checkpoint(tmp_path / 'm.safetensors', model, step=7)
    loaded, saved = load_checkpoint(tmp_path / 'm.safetensors')
    assert saved['step'] == 7 and not loaded.training and loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model(tokens), loaded(tokens)))
    assert os.listdir(tmp_path) == ['m.safetensors']


def test_a_frozen_model_is_saved_whole(tmp_path):
    """What is frozen was left out, base or not: a copy only meant to be read could not be loaded again."""
    model, tokens = small_model().requires_grad_(False), random_tokens(1, 8)
    save_checkpoint(tmp_path / 'm.safetensors', model)
    assert torch.equal(load_checkpoint(tmp_path / 'm.safetensors')[0](tokens)[0], model(tokens)[0])


def pack(header, data=b'', length=None):
    """A safetensors file by its definition. header: a dict, or its bytes; length: what the file says of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def unpack(path):
    """-> header, a dict, and the bytes that follow it"""
    content = Path(path).read_bytes()
    end = 8 + struct.unpack('<Q', content[:8])[0]
    return json.loads(content[8:end]), content[end:]


NUMBERS = {'F64': np.float64, 'F32': np.float32, 'I8': np.int8, 'I64': np.int64, 'BF16': np.uint16}


def read_file(path):
    """A checkpoint, by hand -> all that its JSON says, and its tensors by name in 'model', 'optimizer', 'teacher'."""
    header, data = unpack(path)
    saved = {**json.loads(header.pop('__metadata__')['cwic']), 'model': {}, 'optimizer': {}, 'teacher': {}}
    for name, entry in header.items():
        numbers = np.frombuffer(data[slice(*entry['data_offsets'])], NUMBERS[entry['dtype']]).copy()
        tensor = torch.from_numpy(numbers.reshape(entry['shape']))
        part, _, rest = name.partition('.')
        part, rest = (part, rest) if part in ('optimizer', 'teacher') else ('model', name)
        saved[part][rest] = tensor.view(torch.bfloat16) if entry['dtype'] == 'BF16' else tensor
    return saved


def write_file(path, saved):
    """The other way round: whatever it is, it gets written."""
    tensors = {('' if part == 'model' else f'{part}.') + name: x
               for part in ('model', 'optimizer', 'teacher') for name, x in saved[part].items()}
    said = {key: x for key, x in saved.items() if key not in ('model', 'optimizer', 'teacher')}
    write_safetensors(path, tensors, {'cwic': json.dumps(said)})


def test_written_safetensors_has_the_bytes_of_the_format(tmp_path):
    """
    Another reader must find every tensor, aligned, in one piece with the next, and none but them: this one knows
    nothing of ours, and the bytes of each are numpy's.
    """
    tensors = {'a': torch.tensor([1, -2, 3], dtype=torch.int8), 'b': torch.arange(6.).reshape(2, 3).t(),
               'c': torch.tensor(5, dtype=torch.int64), 'd': torch.tensor([1.5, -2]).bfloat16(),
               'e': torch.zeros(0, 4), 'f': torch.tensor([0.1], dtype=torch.float64)}
    write_safetensors(tmp_path / 'x', tensors, {'format': 'pt'})
    header, data = unpack(tmp_path / 'x')
    assert header.pop('__metadata__') == {'format': 'pt'} and header.keys() == tensors.keys()
    assert (len((tmp_path / 'x').read_bytes()) - len(data)) % 8 == 0
    expected = {'a': ('I8', np.array([1, -2, 3], np.int8)), 'b': ('F32', np.array([[0, 3], [1, 4], [2, 5]], np.float32)),
                'c': ('I64', np.array(5)), 'd': ('BF16', np.array([0x3fc0, 0xc000], np.uint16)),
                'e': ('F32', np.zeros((0, 4), np.float32)), 'f': ('F64', np.array([0.1]))}
    free = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
        kind, numbers = expected[name]
        begin, end = entry['data_offsets']
        assert (entry['dtype'], entry['shape'], begin) == (kind, list(numbers.shape), free)
        assert data[begin:end] == numbers.tobytes() and begin % numbers.itemsize == 0
        free = end
    assert free == len(data)
    again, metadata = read_safetensors(tmp_path / 'x')
    assert metadata == {'format': 'pt'} and all(torch.equal(x, again[name]) and x.dtype == again[name].dtype
                                                for name, x in tensors.items())


def entry(begin, end, shape=None, dtype='F32'):
    return {'dtype': dtype, 'shape': [(end - begin) // 4] if shape is None else shape, 'data_offsets': [begin, end]}


@pytest.mark.parametrize('content', [
    pack({'a': entry(0, 8)}, bytes(7)), pack({'a': entry(0, 8, [1])}, bytes(8)), pack({'a': entry(0, 6, [2])}, bytes(8)),
    pack({'a': entry(8, 0, [2])}, bytes(8)),
    pack({'a': entry(0, 2 ** 70, [2 ** 68])}, bytes(8)), pack({'a': entry(0, 0, [2 ** 40, 2 ** 40, 0])}),
    pack({'a': entry(0, 8, [2.0])}, bytes(8)), pack({'a': entry(0, 8, [2], 'F8_E4M3')}, bytes(8)),
    pack({'a': {**entry(0, 8), 'data_offsets': [0, 4, 8]}}, bytes(8)), pack({'a': 3}), pack({'a': {}}), pack(b'[]'), pack(b''),
    pack(b'{"a": ' * 50_000), pack({'__metadata__': {'cwic': 3}}), pack(b'\xff' * 50),
    pack(b'{}', length=101_000_000), pack(b'{}', length=2 ** 64 - 1), b'', b'x'], ids=range(20))
def test_a_damaged_safetensors_file_is_one_line(tmp_path, content):
    """Sizes beyond the file, below zero or beyond 64 bits; what is not JSON, or JSON that no parser gets to the end of."""
    (tmp_path / 'm.safetensors').write_bytes(content)
    with pytest.raises(CheckpointError, match='^[^\n]*m.safetensors: truncated, damaged, or not a CWIC checkpoint[^\n]*$'):
        load_checkpoint(tmp_path / 'm.safetensors')


def test_a_header_of_more_than_100_mb_is_refused(tmp_path):
    with open(tmp_path / 'm.safetensors', 'wb') as file:        # a hole on the disk
        file.write(pack(b'{', length=101_000_000))
        file.truncate(102_000_000)
    with pytest.raises(CheckpointError, match='a header of 101,000,000 bytes'):
        load_checkpoint(tmp_path / 'm.safetensors')


@pytest.mark.parametrize('kind, says', [
    ('missing', 'cannot be read (No such file'), ('folder', 'cannot be read (Is a directory)'), ('truncated', 'damaged'),
    ('beginning', 'damaged'), ('foreign', "for other people's weights name the folder"), ('a list', 'damaged'),
    ('no config', 'KeyError')])
def test_bad_files_are_one_line(tmp_path, kind, says):
    """Each was once a traceback."""
    path = tmp_path / 'm.safetensors'
    save_checkpoint(path, small_model(), step=7)
    whole, saved = path.read_bytes(), read_file(path)
    texts = {'a list': '[1]', 'no config': '{}'}
    if kind in texts:
        write_safetensors(path, saved['model'], {'cwic': texts[kind]})
    elif kind == 'foreign':
        write_safetensors(path, saved['model'], {'format': 'pt'})
    elif kind in ('missing', 'folder'):
        path.unlink()
        if kind == 'folder':
            path.mkdir()
    else:
        path.write_bytes(whole[:{'truncated': -1000, 'beginning': 5000}[kind]])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert '\n' not in str(error.value) and str(path) in str(error.value) and says in str(error.value)


@pytest.mark.parametrize('name, bad', [('head.weight', math.nan), ('ln_f.bias', math.inf), ('head.sigma', -math.inf)])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, bad):
    """They loaded without a word."""
    save_checkpoint(tmp_path / 'm.safetensors', small_model())
    saved = read_file(tmp_path / 'm.safetensors')
    saved['model'][name].view(-1)[-1] = bad
    write_file(tmp_path / 'm.safetensors', saved)
    with pytest.raises(CheckpointError, match=f'{name} holds a number that is not finite'):
        load_checkpoint(tmp_path / 'm.safetensors')


def test_out_of_memory_is_not_called_damage(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / 'm.safetensors', small_model())
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")):
        def fail(*_, **__):
            raise error
        monkeypatch.setattr(torch.Tensor, 'clone', fail)
        with pytest.raises(CheckpointError, match='out of memory'):
            load_checkpoint(tmp_path / 'm.safetensors')


def peak_memory():
    """The most memory this process held at once since the last call, in bytes."""
    with open('/proc/self/status', encoding='utf-8') as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM'))
    with open('/proc/self/clear_refs', 'w', encoding='utf-8') as file:
        file.write('5')
    return peak


@linux_only
@BOTH
def test_false_sizes_are_one_line_and_take_no_memory(tmp_path, arch):
    """
    A file of some KB said n_layer=10**9, or n_embd=16384, and took gigabytes before a shape was compared.
    """
    path, model = tmp_path / 'm.safetensors', small_model(arch)
    state, config = model.state_dict(), asdict(model.config)

    # 0 is harmless where it stands for the usual size
    lies = [{name: value} for name, size in config.items() for value in (0, -1)
            if type(size) in (int, float) and (value or name not in ('n_kv_head', 'n_hidden'))]
    lies += [{'n_layer': 10 ** 9}, {'n_layer': 3}, {'n_embd': 16384}, {'vocab_size': 10 ** 9}, {'unknown': 1},
             {'bases': True}, {'shortlist': True}, {'norm_eps': 'x'}, {'rope_theta': None}]
    cases = [(state, {**config, **lie}) for lie in lies]

    # tensors that are missing, too many, or of another shape
    less = dict(list(state.items())[:-1])
    cases += [(bad, config) for bad in ({}, less, {**state, 'more': torch.zeros(1)})]
    cases += [({**state, 'head.mu': bad}, config) for bad in (
        torch.zeros(17), torch.zeros(16, 1), torch.zeros(0))]

    peak_memory()
    before = peak_memory()
    for bad_state, bad_config in cases:
        write_safetensors(path, bad_state, {'cwic': json.dumps({'config': bad_config})})
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match='^[^\n]*damaged[^\n]*$'):
            load_checkpoint(path)
            pytest.fail(f'was loaded: {bad_config}')
        assert time.perf_counter() - start < 3
    assert len(cases) > 35 and peak_memory() - before < 100e6


def test_save_refuses_numbers_that_are_not_finite(tmp_path):
    """A step that diverged was saved over the good last.safetensors, and --resume then failed for ever."""
    path = tmp_path / 'm.safetensors'
    save_checkpoint(path, small_model())
    whole = path.read_bytes()
    for name, bad in (('head.weight', math.nan), ('ln_f.bias', math.inf), ('head.sigma', -math.inf)):
        model = small_model()
        model.state_dict()[name].view(-1)[-1] = bad
        with pytest.raises(CheckpointError, match='not written: .* not finite'):
            save_checkpoint(path, model)
        assert path.read_bytes() == whole and os.listdir(tmp_path) == ['m.safetensors']


def test_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    """
    A disk that is nearly full gave a traceback. A limit on the size of files stands in for it, at many sizes.
    """
    path, (soft, hard) = tmp_path / 'm.safetensors', resource.getrlimit(resource.RLIMIT_FSIZE)
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
        assert path.read_bytes() == whole and os.listdir(tmp_path) == ['m.safetensors']
    for impossible in (tmp_path / 'no' / 'such' / 'm.safetensors', path / 'm.safetensors', tmp_path):
        with pytest.raises(CheckpointError, match='cannot be written'):
            save_checkpoint(impossible, model)


@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')
def test_kill_during_save_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL at many different moments of a process that does nothing but save: what is there must load."""
    path, model = tmp_path / 'm.safetensors', GPT(CWICConfig(n_embd=192, n_head=3))
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
    assert len(os.listdir(tmp_path)) > 1        # some kills did come in the middle


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
    path, tokens = tmp_path / 'a.safetensors', random_tokens(1, 16)
    model = small_model(arch)
    cwic.add_lora(model, rank)
    train_a_little(model)
    expected, expected_active = model(tokens)
    save_checkpoint(path, model, base='the base', base_sha256=weights_sha256(small_model(arch)), rank=rank)
    for merge in (True, False):
        loaded, saved = load_checkpoint(path, base={'the base': small_model(arch)}.get, merge=merge)
        logits, active = loaded(tokens)
        assert torch.allclose(logits, expected, atol=1e-4)
        assert torch.allclose(active, expected_active, atol=28)         # one input or neuron, by rounding
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert read_file(path)['model'].keys() == model.state_dict().keys() - set(frozen) and 'head.weight' in frozen
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
    cwic.add_lora(model, 8)
    train_a_little(model)
    base = {'base': 'b', 'base_sha256': weights_sha256(small_model())}
    save_checkpoint(tmp_path / 'wide.safetensors', model, **base)
    save_checkpoint(tmp_path / 'narrow.safetensors', model, narrow=True, **base)
    wide, narrow = (load_checkpoint(tmp_path / name, base=lambda name: small_model())
                    for name in ('wide.safetensors', 'narrow.safetensors'))
    saved = read_file(tmp_path / 'narrow.safetensors')['model']
    assert {t.dtype for name, t in saved.items() if name.endswith(('.A', '.B'))} == {torch.int8}
    assert {t.dtype for name, t in saved.items() if not name.endswith(('.A', '.B'))} == {torch.float32}
    unmerged, _ = load_checkpoint(tmp_path / 'narrow.safetensors', base=lambda name: small_model(), merge=False)
    for name, p in model.named_parameters():
        if name.endswith(('.A', '.B')):
            largest = p.abs().amax(0 if name.endswith('.A') else 1, keepdim=True)
            assert ((unmerged.state_dict()[name] - p).abs() <= largest / 254 * 1.001).all()
    a, b = wide[0](tokens, dense=True)[0], narrow[0](tokens, dense=True)[0]
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 1e-2


@pytest.mark.parametrize('kind, says', [
    ('other base', 'holds other weights than'), ('no hash', 'damaged'), ('other rank', 'damaged'), ('huge scale', 'damaged'),
    ('nan scale', 'not finite'), ('adapter missing', 'damaged'), ('no adapter', 'damaged'), ('singular', 'singular')])
def test_adapter_that_does_not_fit_is_one_line(tmp_path, kind, says):
    """One of these made 3 billion numbers of 3; a base with other weights of the same sizes was taken in silence."""
    model, path = small_model(bases=kind == 'singular'), tmp_path / 'a.safetensors'
    cwic.add_lora(model, 3)
    save_checkpoint(path, model, narrow=True, base='the base', base_sha256=weights_sha256(small_model()))
    saved = read_file(path)
    state, A = saved['model'], 'head.adapter.A'
    if kind == 'no hash':
        del saved['base_sha256']
    elif kind == 'other rank':
        state[A] = torch.zeros(16, 4, dtype=torch.int8)
    elif kind == 'huge scale':      # would make of 3 numbers 3 million
        state[f'{A}.scale'] = torch.zeros(16, 10 ** 6, 1)
    elif kind == 'nan scale':
        state[f'{A}.scale'][0, 1] = math.nan
    elif kind == 'adapter missing':
        del state['blocks.1.mlp.down.adapter.B']
    elif kind == 'no adapter':
        del state[A]
    elif kind == 'singular':
        state['basis'].zero_()
    write_file(path, saved)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, base=lambda name: small_model(seed=4 if kind == 'other base' else 0))
    assert says in str(error.value) and '\n' not in str(error.value)
