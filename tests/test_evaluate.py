"""evaluate.py: every number against a count made one token at a time."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cwic
import evaluate
import weights
from checkpoint import save_checkpoint
from data.common import DataError, Part, load_dataset
from sampling import sample
from tokenizer import PATTERNS, bpe_spec, load_tokenizer, tokenizer_spec

ROOT = Path(__file__).resolve().parents[1]
SPEC = tokenizer_spec('bytes')


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = cwic.CWICConfig(vocab_size=257, block_size=40, n_layer=1, n_head=2, n_embd=16, stripe_qkv=16)
    model = cwic.GPT(config)
    for _, layer in model.sparse_layers():
        layer.sigma.fill_(1)
        layer.theta.data.uniform_(0, 1 / layer.scale)
    return model.eval().requires_grad_(False)


def test_measure_equals_counting_token_by_token(model):
    tokens = np.random.default_rng(0).integers(0, 257, (3, 13))
    teacher = copy.deepcopy(model)
    results = evaluate.measure(model, tokens, teacher)
    losses, shares, surprises, entropies, kls, same = [], [], [], [], [], []
    for row in torch.from_numpy(tokens):
        logits, active = model(row[None, :-1])
        teacher_p = teacher(row[None, :-1], dense=True)[0][0].softmax(-1)
        for i in range(12):
            p = logits[0, i].softmax(-1)
            losses.append(float(F.cross_entropy(logits[0, i], row[i + 1])))
            kls.append(float((teacher_p[i] * (teacher_p[i] / p).log()).sum()))
            same.append(float(p.argmax() == teacher_p[i].argmax()))
            if i:
                shares.append(float(active[:, 0, i].sum()) / model.n_weights())
                surprises.append(-float(logits[0, i - 1].log_softmax(-1)[row[i]]))
                entropies.append(-float((p * p.log()).sum()))
    assert results['val_loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert results['kl'] == pytest.approx(np.mean(kls), rel=1e-3)
    assert results['agreement'] == pytest.approx(np.mean(same))
    assert results['surprise_correlation'] == pytest.approx(np.corrcoef(shares, surprises)[0, 1], abs=2e-3)
    assert results['entropy_correlation'] == pytest.approx(np.corrcoef(shares, entropies)[0, 1], abs=2e-3)
    # (f32 probabilities of a model that knows nothing hardly differ: hence the tolerance of the correlations)
    assert results['compute_percentiles']['50'] == pytest.approx(np.percentile(shares, 50))
    everything = sum(float(model(torch.from_numpy(row[None, :-1]))[1].sum()) for row in tokens)
    assert results['reduction'] == pytest.approx(model.n_weights() * 36 / everything)


def test_percentiles_count_only_replies(model):
    """The low end of the colour scale used to come from the chat template, which a chat does not show."""
    tokens = np.random.default_rng(0).integers(0, 257, (2, 13))
    replies = np.zeros(tokens.shape, bool)
    replies[0, 3:9], replies[1, 12] = True, True        # the last token is only predicted, never read
    shares = model(torch.from_numpy(tokens[:1, :-1]))[1][:, 0].sum(0)[3:9] / model.n_weights()
    found = evaluate.measure(model, tokens, replies=replies)['compute_percentiles']
    assert found['5'] == pytest.approx(np.percentile(shares, 5))
    nobody = evaluate.measure(model, tokens, replies=np.zeros_like(replies))
    assert nobody == evaluate.measure(model, tokens)


def test_replies_found_in_ids_equal_replies_found_in_the_text():
    """In windows that begin and end anywhere in a dialogue."""
    spec, _, _ = chat_models()
    encoding = load_tokenizer(spec)
    text = ('<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwho is assistant\n?<|im_end|>\n'
            '<|im_start|>assistant\nI am.\n\nYes<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n'
            'so<|endoftext|>and on')
    ids = encoding.encode(text, allowed_special='all')
    for start in range(0, len(ids), 3):
        for end in (start + 2, start + 40, len(ids)):
            window = ids[start:end]
            want, speaking = [], False
            for i, id in enumerate(window):
                before = encoding.decode(window[:i])
                speaking = (speaking or before.endswith('<|im_start|>assistant\n')) and id not in (0, 2)
                want.append(speaking)
            assert evaluate.in_replies(np.array([window]), spec).tolist() == [want]
    assert not evaluate.in_replies(np.zeros((2, 5), np.int64), SPEC).any()


def test_a_dense_model_agrees_with_itself(model):
    tokens = np.random.default_rng(1).integers(0, 257, (2, 9))
    results = evaluate.measure(model, tokens, copy.deepcopy(model), dense=True)
    assert results['kl'] == pytest.approx(0, abs=1e-7)
    assert results['agreement'] == results['reduction'] == 1
    assert set(results['active_share']) == {1.0} and results['surprise_correlation'] == 0


def chat_models():
    """A spec with a chat template, a sparse student, and a dense teacher that sometimes ends its answers."""
    template = {'begin': '', 'message': '<|im_start|>{role}\n{text}<|im_end|>\n', 'strip': False,
                'prefix': '', 'system': 'be brief', 'stop': ['<|im_end|>']}
    special = {'<|endoftext|>': 0, '<|im_start|>': 1, '<|im_end|>': 2}
    spec = bpe_spec('tiny', PATTERNS['smollm'], [bytes([b]) for b in range(256)], special=special,
                    template=template)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = cwic.CWICConfig(vocab_size=259, block_size=160, n_layer=1, n_head=2, n_embd=16, stripe_qkv=16)
        models.append(cwic.GPT(config).eval().requires_grad_(False))
        models[-1].head.weight[:, 2] += 0.6 * seed * models[-1].head.weight[:, 50]
    for _, layer in models[0].sparse_layers():
        layer.sigma.fill_(1)
        layer.theta.data.uniform_(0, 1 / layer.scale)
    return spec, *models


def test_compare_answers_equals_one_pass_per_token():
    """Answers are sampled again without a cache, each token from a pass of its own, and compared in numpy."""
    spec, model, teacher = chat_models()
    encoding, questions = load_tokenizer(spec), ['who?', 'what is it?', 'why?']
    generator, kls, same, active = torch.Generator().manual_seed(1), [], [], []
    for question in questions:
        ids = encoding.encode('<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n'
                              f'{question}<|im_end|>\n<|im_start|>assistant\n', allowed_special='all')
        answer = []
        for _ in range(evaluate.LONGEST_ANSWER):
            logits = teacher(torch.tensor([ids]), dense=True)[0][0, -1]
            student, used = model(torch.tensor([ids]))
            p, q = (x.double().softmax(-1).numpy() for x in (logits, student[0, -1]))
            kls.append((p * np.log(p / q)).sum())
            same.append(p.argmax() == q.argmax())
            active.append(float(used[:, 0, -1].sum()))
            point = torch.rand(1, generator=generator)
            said = torch.tensor([answer], dtype=torch.long)
            answer.append(int(sample(logits[None], point, temperature=0.2, top_p=0.9, repeat_penalty=1.15,
                                     said=said)[0]))
            ids.append(answer[-1])
            if ids[-1] == 2:
                break
    results = evaluate.compare_answers(model, teacher, spec, encoding, questions)
    assert results['questions'] == 3 and results['tokens'] == len(kls) < 3 * evaluate.LONGEST_ANSWER
    assert results['kl'] == pytest.approx(np.mean(kls), rel=1e-4)
    assert results['agreement'] == pytest.approx(np.mean(same))
    assert results['reduction'] == pytest.approx(model.n_weights() / np.mean(active)) and results['reduction'] > 1.1


def test_questions_that_cannot_be_asked_are_one_line(tmp_path, monkeypatch, capsys):
    spec, model, _ = chat_models()
    save_checkpoint(str(tmp_path / 'plain.safetensors'), model, tokenizer=spec)
    (tmp_path / 'empty.txt').write_text('\n\n', encoding='utf-8')
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', str(tmp_path / 'plain.safetensors'), '--questions', 'x.txt'])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert 'is not an adapter of a chat model' in capsys.readouterr().err
    for name, said in (('none.txt', 'cannot be read'), ('empty.txt', 'no questions in it')):
        with pytest.raises(DataError, match=said):
            evaluate.read_questions(str(tmp_path / name))
    assert len(evaluate.read_questions(str(ROOT / 'data' / 'questions.txt'))) == 84
    with pytest.raises(DataError, match='question 2 has .* tokens'):
        evaluate.compare_answers(model, model, spec, load_tokenizer(spec), ['why?', 'why? ' * 50])


def test_text_windows_are_in_order_and_a_short_text_is_refused(tmp_path):
    (tmp_path / 'text').write_text('abcdefghij' * 10, encoding='utf-8')
    windows = evaluate.text_windows(str(tmp_path / 'text'), SPEC, load_tokenizer(SPEC), 4, 20)
    assert windows.shape == (4, 21) and bytes(windows[0].tolist()) == b'abcdefghij' * 2 + b'a'
    with pytest.raises(DataError, match='fewer'):
        evaluate.text_windows(str(tmp_path / 'text'), SPEC, load_tokenizer(SPEC), 4, 100)
    with pytest.raises(DataError, match='read'):
        evaluate.text_windows(str(tmp_path / 'none'), SPEC, load_tokenizer(SPEC), 4, 10)


def test_text_windows_begin_with_bos(tmp_path):
    (tmp_path / 'text').write_text('abcdefghij' * 10, encoding='utf-8')
    spec = SPEC | {'bos': [7]}
    windows = evaluate.text_windows(str(tmp_path / 'text'), spec, load_tokenizer(spec), 4, 20)
    assert bytes(windows[0].tolist()) == b'\7' + b'abcdefghij' * 2


def write_text(folder, data, name='text'):
    (folder / name).write_bytes(data)
    return str(folder / name)


def test_text_files_from_windows_read_like_any_other(tmp_path):
    """A byte order mark and \\r became tokens of the text."""
    text = 'one\ntwo two\n' * 20
    expected = evaluate.text_windows(write_text(tmp_path, text.encode()), SPEC, load_tokenizer(SPEC), 4, 20)
    for encode in (str.encode, lambda text: text.replace('\n', '\r\n').encode('utf-8-sig')):
        path = write_text(tmp_path, encode(text))
        np.testing.assert_array_equal(evaluate.text_windows(path, SPEC, load_tokenizer(SPEC), 4, 20), expected)
        assert evaluate.read_questions(path) == ['one', 'two two'] * 20


def test_validation_windows_start_with_the_data_sets_own_and_stay_inside():
    """Targets used to come from the next window, which is independent, and the last window was never read."""
    data = np.arange(60, dtype=np.uint16)
    assert evaluate.validation_windows(data, {'window': 10}, 3, 6).tolist() == [
        list(range(start, start + 7)) for start in (0, 20, 50)]
    assert evaluate.validation_windows(data, {'window': 10}, 6, 10).tolist() == data.reshape(6, 10).tolist()
    assert evaluate.validation_windows(data, {}, 2, 10)[:, 0].tolist() == [0, 49]


def test_only_reads_all_dialogues_or_all_documents_once():
    """Dialogues are the windows that begin with the template."""
    spec, _, _ = chat_models()
    data = np.arange(100, 200).repeat(4).astype(np.uint16).reshape(50, 8)
    data[::3, 0], data[1::3, 3] = 1, 1
    for kind, expected in (('dialogues', data[::3]), ('documents', np.delete(data, slice(None, None, 3), 0))):
        found = evaluate.windows_of_kind(kind, data.flatten(), {'window': 8}, spec, load_tokenizer(spec), 99, 8)
        assert found.tolist() == expected.tolist()
        few = evaluate.windows_of_kind(kind, data.flatten(), {'window': 8}, spec, load_tokenizer(spec), 5, 8)
        assert len(few) == 5 and all(window in expected.tolist() for window in few.tolist())
    with pytest.raises(DataError, match='--only poems: choose dialogues or documents'):
        evaluate.windows_of_kind('poems', data.flatten(), {'window': 8}, spec, load_tokenizer(spec), 5, 8)
    with pytest.raises(DataError, match='no validation windows that are dialogues'):
        evaluate.windows_of_kind('dialogues', data[1:3].flatten(), {'window': 8}, spec, load_tokenizer(spec), 5, 8)


def test_documents_that_begin_with_bos_are_no_dialogues():
    """In Llama 3's template a dialogue begins with BOS as well: all documents were taken for dialogues."""
    tokens = [bytes([b]) for b in range(256)]
    special = {'<|endoftext|>': 256, '<|bos|>': 257, '<|im_start|>': 258, '<|im_end|>': 259}
    template = {'begin': '<|bos|>', 'message': '<|im_start|>{role} {text}<|im_end|>', 'prefix': '', 'system': '',
                'strip': False, 'stop': ['<|im_end|>']}
    spec = bpe_spec('x', PATTERNS['gpt2'], tokens, special=special, bos=[257], template=template)
    data = np.array([[257, 258, 5, 6], [257, 7, 8, 9], [256, 257, 7, 8], [257, 258, 6, 5]], np.uint16)
    for kind, expected in (('dialogues', data[[0, 3]]), ('documents', data[[1, 2]])):
        found = evaluate.windows_of_kind(kind, data.flatten(), {'window': 4}, spec, load_tokenizer(spec), 99, 4)
        assert found.tolist() == expected.tolist()


def test_a_mix_is_validated_in_proportion_on_windows_of_one_length():
    mix = [Part('a', 0.75, None, np.arange(60, dtype=np.uint16), {'window': 10}),
           Part('b', 0.25, None, np.arange(100, 200, dtype=np.uint16), {})]
    assert evaluate.mix_windows(mix, 'val', 4, 10).tolist() == [
        *(list(range(start, start + 10)) for start in (0, 20, 50)), list(range(100, 110))]


def test_load_dataset_refuses_a_mix():
    with pytest.raises(DataError, match='a:0.5,b:0.5 is a mix of data sets; name one of them: --data NAME'):
        load_dataset('a:0.5,b:0.5', 8)


def test_data_of_another_tokenizer_is_refused():
    """SmolLM2 read ids of data/python as its own, and was evaluated on nonsense."""
    with pytest.raises(DataError, match='data/heldout was made with another tokenizer'):
        evaluate.data_windows('heldout', '', SPEC, load_tokenizer(SPEC), 4, 20)


@pytest.mark.parametrize('adapter, val_loss, reduction, kl, agreement', [
    ('smollm2', 1.2681, 2.990, 0.1766, 0.8190), ('smollm2_2x', 1.1681, 2.005, 0.0942, 0.8630)])
def test_the_shipped_adapters_are_as_good_as_their_readme_says(adapter, val_loss, reduction, kl, agreement):
    """On four held-out windows of text that their base wrote: two dialogues and two documents."""
    model, saved = weights.load(str(ROOT / 'adapters' / f'{adapter}.safetensors'))
    teacher, _ = weights.load(saved['base'])
    _, data, meta = load_dataset('heldout', 512)
    spec, encoding = saved['tokenizer'], load_tokenizer(saved['tokenizer'])
    assert meta['tokenizer'] == spec
    windows = np.concatenate([evaluate.windows_of_kind(kind, data, meta, spec, encoding, 2, 512)
                              for kind in ('dialogues', 'documents')])
    results = evaluate.measure(model, windows, teacher)
    figures = f'| {reduction:.2f}x, {kl:.3f}, {agreement:.0%} |'.replace(' 0.', ' .')
    assert figures in (ROOT / 'adapters' / 'README.md').read_text(encoding='utf-8')
    # processors round differently, which decides about inputs near a threshold: 2% of the KL of 2,048 tokens
    expected = dict(val_loss=val_loss, reduction=reduction, agreement=agreement)
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=0.01)
    assert results['kl'] == pytest.approx(kl, rel=0.04)


@pytest.mark.parametrize('options, line', [
    (['--windows', '0'], '--windows must be at least 1'),       # it ended in numpy's traceback
    (['--questions', 'q.txt', '--dense'], 'leave --dense out'),
    (['--text', 'a.txt', '--data', 'heldout'], 'give one of --data, --text and --questions')])
def test_options_that_do_not_fit_together_are_one_line(options, line, monkeypatch, capsys):
    """--dense beside --questions was silently ignored: the results were taken for the dense model's."""
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', 'adapters/smollm2.safetensors', *options])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code and line in capsys.readouterr().err
