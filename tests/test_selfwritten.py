"""data/selfwritten/prepare.py: dialogues and documents of the right form, again and again the same."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import cwic
from checkpoint import load_checkpoint, save_checkpoint
from tokenizer import PATTERNS, bpe_spec, load_tokenizer

ROOT = os.path.dirname(os.path.abspath(cwic.__file__))
SCRIPT = os.path.join(ROOT, 'data', 'selfwritten', 'prepare.py')
SPECIAL = {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}
TEMPLATE = {'begin': '', 'message': '<|im_start|>{role}\n{text}<|im_end|>\n', 'prefix': '',
            'system': 'be brief', 'strip': False, 'stop': ['<|im_end|>']}
BYTES = [bytes([b]) for b in range(256)]
SPEC = bpe_spec('tiny', PATTERNS['smollm'], BYTES, special=SPECIAL, template=TEMPLATE)
OPTIONS = ['--window', '96', '--batch', '4', '--tokens', str(3 * 4 * 96), '--device', 'cpu']


@pytest.fixture(scope='module')
def chat_model(tmp_path_factory):
    """A tiny Llama that says stop tokens often, so that turns change many times in a window."""
    torch.manual_seed(0)
    model = cwic.GPT(cwic.CWICConfig(arch='llama', vocab_size=259, block_size=128, n_layer=1, n_head=2,
                                     n_kv_head=1, n_embd=16, n_hidden=24))
    hidden = model.trunk(torch.randint(259, (1, 64)))[0].mean((0, 1))
    for id in (0, 2):
        model.head.weight.data[:, id] += 4 * hidden.detach() / hidden.norm() ** 2
    path = str(tmp_path_factory.mktemp('chat') / 'model.safetensors')
    save_checkpoint(path, model, tokenizer=SPEC)
    return path


def imported(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location('selfwritten', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'selfwritten', script)
    spec.loader.exec_module(script)
    return script


def prepare(out, model, *more):
    command = [sys.executable, SCRIPT, '--model', model, '--out', str(out), *OPTIONS, *more]
    return subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=120,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.fixture(scope='module')
def written(chat_model, tmp_path_factory):
    out = tmp_path_factory.mktemp('written')
    result = prepare(out, chat_model)
    assert result.returncode == 0, result.stderr
    return out


def test_dialogues_follow_the_template_and_documents_hold_no_other_token_of_it(written):
    encoding = load_tokenizer(SPEC)
    meta = json.loads((written / 'meta.json').read_text(encoding='utf-8'))
    windows = [np.fromfile(written / f'{split}.bin', np.uint16).reshape(-1, 96).tolist()
               for split in ('train', 'val')]
    assert meta['window'] == 96 and [len(split) for split in windows] == [6, 6]
    turns = documents = 0
    for window in windows[0] + windows[1]:
        text = encoding.decode(window)
        if window[0] != 1:
            documents += 1
            assert not {1, 2} & set(window)
            continue
        opening = '<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n'
        assert text.startswith(opening)
        # read on as a parser of the format would: words to the stop token, then what the template says
        rest, role = text[len(opening):], 'user'
        while '<|im_end|>' in rest:
            words, rest = rest.split('<|im_end|>', 1)
            assert '<|' not in words
            role, turns = 'assistant' if role == 'user' else 'user', turns + 1
            follows = f'\n<|im_start|>{role}\n'
            assert rest.startswith(follows) or follows.startswith(rest)
            rest = rest[len(follows):]
        assert '<|' not in rest
    assert documents == 6 and turns > 6


def test_the_same_seed_writes_the_same_and_another_seed_does_not(written, chat_model, tmp_path):
    for seed, same in (('1', True), ('2', False)):
        assert prepare(tmp_path / seed, chat_model, '--seed', seed).returncode == 0
        bins = [(folder / 'train.bin').read_bytes() for folder in (tmp_path / seed, written)]
        assert (bins[0] == bins[1]) is same


def test_half_of_the_windows_are_drawn_from_all_that_is_possible_but_answers(chat_model, monkeypatch):
    """
    Of text that was all likely, and documents that all began in mid-air, a sparse SmolLM2 learned to follow
    its base's own style, and lost 9% on BLiMP, whose sentences are short, odd, and follow an end of document.
    """
    script, floors, temperatures = imported(monkeypatch), [], []
    plain_sample = script.sample

    def sample(logits, point, temperature, min_p):
        floors.append(min_p[:, 0].clone())
        temperatures.append(temperature[:, 0].clone())
        return plain_sample(logits, point, temperature, min_p=min_p)

    monkeypatch.setattr(script, 'sample', sample)
    model, saved = load_checkpoint(chat_model)
    config = script.SelfWrittenConfig(window=64, dialogues=0.25)
    windows = script.write_windows(model, SPEC, load_tokenizer(SPEC), 400, config, 'cpu',
                                   torch.Generator().manual_seed(1))
    after_another = windows[100:, 0] == SPECIAL['<|endoftext|>']
    assert (windows[:100, 0] == SPECIAL['<|im_start|>']).all() and 110 < after_another.sum() < 190
    assert (windows[100:, 0] != SPECIAL['<|im_start|>']).all() and (windows[100:, 1][after_another] > 2).all()
    anything = (floors[0] == 0).numpy()
    assert 30 < anything[:100].sum() < 70 and 110 < anything[100:].sum() < 190
    assert 40 < (anything[100:] & after_another).sum() < 110            # two coins, not one
    answered = 0
    for floor, temperature in zip(floors, temperatures):
        answers = (temperature == 0.7).numpy()
        assert not answers[100:].any()
        np.testing.assert_allclose(floor, np.where(anything & ~answers, 0.0, script.MIN_P))
        answered += answers.sum()
    assert answered > 100


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(written, chat_model, tmp_path, monkeypatch):
    """Progress is recorded after the windows; what a kill leaves behind the last record is cut off again."""
    script = imported(monkeypatch)
    argv = ['prepare.py', '--model', chat_model, '--out', str(tmp_path), *OPTIONS]
    monkeypatch.setattr(sys, 'argv', argv)
    record, killed = script.save_progress, []

    def save_progress(folder, progress):
        if progress['batches'] == 2 and not killed:
            killed.append(True)
            raise KeyboardInterrupt         # the second batch is written, the record of it is not
        record(folder, progress)

    monkeypatch.setattr(script, 'save_progress', save_progress)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert os.path.getsize(tmp_path / 'train.bin.part') == 2 * 2 * 96 * 2
    assert not (tmp_path / 'meta.json').exists()
    script.main()
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    assert not (tmp_path / 'progress.json').exists()


def test_what_a_user_gets_wrong_is_one_line(chat_model, written, tmp_path):
    cases = [(prepare(written, chat_model), 'prepared already'),
             (prepare(tmp_path / 'a', str(tmp_path / 'none.safetensors')), 'none.safetensors'),
             (prepare(tmp_path / 'b', chat_model, '--window', '20'), 'window')]
    torch.manual_seed(0)
    plain = cwic.GPT(cwic.CWICConfig(vocab_size=257, block_size=96, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(str(tmp_path / 'plain.safetensors'), plain, tokenizer={'kind': 'bytes'})
    cases.append((prepare(tmp_path / 'c', str(tmp_path / 'plain.safetensors')), 'chat template'))
    (tmp_path / 'd').mkdir()            # this one ended in a traceback
    (tmp_path / 'd' / 'progress.json').write_text('{"batches"', encoding='utf-8')
    cases.append((prepare(tmp_path / 'd', chat_model), 'progress.json is damaged'))
    for result, said in cases:
        assert result.returncode and said in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
