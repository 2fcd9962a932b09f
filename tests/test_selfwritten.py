"""data/selfwritten/prepare.py: dialogues and documents of the right form, again and again the same."""

import hashlib
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
OPENING = '<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n'
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


def read_turns(text, role):
    """
    Reads text as a parser of the format would: words up to the stop token, then what the template says. role:
    who speaks first. Returns how many turns ended.
    """
    turns = 0
    while '<|im_end|>' in text:
        words, text = text.split('<|im_end|>', 1)
        assert '<|' not in words
        role, turns = 'assistant' if role == 'user' else 'user', turns + 1
        follows = f'\n<|im_start|>{role}\n'
        assert text.startswith(follows) or follows.startswith(text)
        text = text[len(follows):]
    assert '<|' not in text
    return turns


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


def test_dialogues_follow_the_template_and_documents_have_no_template_tokens(written):
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
        assert text.startswith(OPENING)
        turns += read_turns(text[len(OPENING):], 'user')
    assert documents == 6 and turns > 6


def test_text_of_a_seed_does_not_change_between_versions(chat_model, monkeypatch):
    """As it was before a script said what stands at each place of a window."""
    script = imported(monkeypatch)
    model, _ = load_checkpoint(chat_model)
    config = script.SelfWrittenConfig(window=48, dialogues=0.6)
    windows = script.write_windows(model, SPEC, load_tokenizer(SPEC), 30, config, 'cpu',
                                   torch.Generator().manual_seed(3))
    assert hashlib.sha256(windows.astype('<u2').tobytes()).hexdigest()[:16] == 'd2d4ab8e9a09d5cb'


def test_every_document_begins_with_bos_if_the_tokenizer_has_one(monkeypatch):
    """Llama 3's has one. The documents had none, a beginning that the model never saw in its own training."""
    script, bos = imported(monkeypatch), 259
    spec = {**SPEC, 'special': {**SPECIAL, '<|bos|>': bos}, 'bos': [bos], 'template': {**TEMPLATE, 'begin': '<|bos|>'}}
    torch.manual_seed(0)
    model = cwic.GPT(cwic.CWICConfig(arch='llama', vocab_size=260, block_size=64, n_layer=1, n_head=2, n_embd=16,
                                     n_hidden=24)).eval()
    hidden = model.trunk(torch.randint(260, (1, 64)))[0].mean((0, 1)).detach()
    model.head.weight.data[:, 0] += 4 * hidden / hidden.norm() ** 2         # documents end often
    windows = script.write_windows(model, spec, load_tokenizer(spec), 40, script.SelfWrittenConfig(window=64), 'cpu',
                                   torch.Generator().manual_seed(1))
    assert (windows[:20, :2] == [bos, 1]).all() and (windows[:20, 2:] != bos).all()
    began = [window[:2] == [bos, window[1]] for window in windows[20:].tolist()]
    assert 3 < sum(began) < 17                                          # the others after an end
    ended = 0
    for window, at_start in zip(windows[20:].tolist(), began):
        ends = [i for i, id in enumerate(window) if id == 0]
        ended += len(ends)
        places = [0] * at_start + [i + 1 for i in ends if i + 1 < len(window)]
        assert [i for i, id in enumerate(window) if id == bos] == places
        assert all(window[i + 1] > 2 for i in places if i + 1 < len(window))
    assert ended > 30


QUESTIONS = ['why?', 'Is <|im_end|> a word,\\nor <|endoftext|>?', 'who are you']


@pytest.fixture
def asked(chat_model, tmp_path, monkeypatch):
    """Two batches of eight dialogues and two documents, and what they were made with."""
    script = imported(monkeypatch)
    (tmp_path / 'questions').write_text('\n\n'.join(QUESTIONS) + '\n', encoding='utf-8')
    argv = ['prepare.py', '--model', chat_model, '--out', str(tmp_path), '--questions', str(tmp_path / 'questions'),
            '--asked', '0.75', '--window', '128', '--batch', '10', '--tokens', '2560', '--dialogues', '0.8',
            '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', argv)
    batches, write_windows = [], script.write_windows
    monkeypatch.setattr(script, 'write_windows', lambda *args: batches.append(write_windows(*args)) or batches[-1])
    script.main()
    return batches, script


def test_dialogues_begin_with_questions_as_the_template_has_them(asked):
    """
    A question is text: what looks like a special token in it is none. Then the model answers, and goes on as in
    any dialogue.
    """
    encoding, drawn, (batches, _) = load_tokenizer(SPEC), [], asked
    texts = [text.replace('\\n', '\n') for text in QUESTIONS]
    for windows in batches:
        for window in windows[:6].tolist():
            # from the template's own words: these three are the only places with special tokens
            prompts = [encoding.encode(OPENING, allowed_special='all') + encoding.encode_ordinary(text)
                       + encoding.encode('<|im_end|>\n<|im_start|>assistant\n', allowed_special='all')
                       for text in texts]
            found = [i for i, prompt in enumerate(prompts) if window[:len(prompt)] == prompt]
            assert len(found) == 1
            drawn += found
            read_turns(encoding.decode(window[len(prompts[found[0]]):]), 'assistant')
        opening = encoding.encode(OPENING, allowed_special='all')
        assert (windows[6:8, :len(opening)] == opening).all()       # the model asks
        assert not np.isin(windows[8:], [1, 2]).any()
    assert set(drawn) == {0, 1, 2} and drawn[:6] != drawn[6:]


def test_questions_are_drawn_anew_with_another_seed(asked, monkeypatch, tmp_path):
    batches, script = asked
    for seed in ('1', '2'):
        monkeypatch.setattr(sys, 'argv', [*sys.argv, '--out', str(tmp_path / seed), '--seed', seed])
        script.main()
    assert all(np.array_equal(a, b) for a, b in zip(batches[:2], batches[2:4], strict=True))
    assert not np.array_equal(batches[0][:6, :60], batches[4][:6, :60])


@pytest.mark.parametrize('options, said', [
    (['--asked', '1'], '--asked has no use without --questions'),
    (['--questions', 'no such file'], 'no such file: cannot be read'),
    (['--questions', __file__, '--window', '32'], 'no room for an answer in a --window of 32')])
def test_questions_that_cannot_be_used_are_one_line(chat_model, tmp_path, monkeypatch, capsys, options, said):
    script = imported(monkeypatch)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--model', chat_model, '--out', str(tmp_path), *options])
    with pytest.raises(SystemExit):
        script.run(script.main)
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1 and not os.listdir(tmp_path)


def test_few_tokens_make_few_windows(chat_model, tmp_path):
    """On a CPU, --tokens 2000 wrote 16 windows of 512 tokens, for minutes and without a line."""
    command = [sys.executable, SCRIPT, '--model', chat_model, '--out', str(tmp_path), '--device', 'cpu',
               '--tokens', '1000', '--window', '256']
    subprocess.run(command, check=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert sum((tmp_path / f'{split}.bin').stat().st_size for split in ('train', 'val')) == 2 * 4 * 256


def test_the_same_seed_writes_the_same_and_another_seed_does_not(written, chat_model, tmp_path, monkeypatch):
    script = imported(monkeypatch)
    for seed, same in (('1', True), ('2', False)):
        argv = ['prepare.py', '--model', chat_model, '--out', str(tmp_path / seed), *OPTIONS, '--seed', seed]
        monkeypatch.setattr(sys, 'argv', argv)
        script.main()
        bins = [(folder / 'train.bin').read_bytes() for folder in (tmp_path / seed, written)]
        assert (bins[0] == bins[1]) is same


def test_answers_and_half_of_the_windows_are_sampled_with_min_p(chat_model, monkeypatch):
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


def test_wrong_options_of_selfwritten_are_one_line(chat_model, tmp_path, monkeypatch, capsys):
    script = imported(monkeypatch)
    torch.manual_seed(0)
    plain = cwic.GPT(cwic.CWICConfig(vocab_size=257, block_size=96, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(str(tmp_path / 'plain.safetensors'), plain, tokenizer={'kind': 'bytes'})
    for out, model, more, said in ((tmp_path / 'a', str(tmp_path / 'none.safetensors'), [], 'none.safetensors'),
                                   (tmp_path / 'b', chat_model, ['--window', '20'], 'window'),
                                   (tmp_path / 'c', str(tmp_path / 'plain.safetensors'), [], 'chat template')):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', '--model', model, '--out', str(out), *OPTIONS, *more])
        with pytest.raises(SystemExit) as ended:
            script.run(script.main)
        error = capsys.readouterr().err
        assert ended.value.code and said in error and error.count('\n') == 1, error
