"""The prepare.py scripts, run as a user runs them (subprocess), against texts read and split here by other means."""

import http.client
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pytest

from data import common
from data.common import DataError
from data.python import prepare as python_prepare
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = {name: ROOT / 'data' / name / 'prepare.py' for name in ('python', 'text', 'shakespeare', 'fineweb')}
END = '<|endoftext|>'


def prepare(name, *args, before='', **kwargs):
    """data/NAME/prepare.py with args in a process of its own; before: Python code to run first in that process"""
    code = f'import os, runpy, sys\nsys.argv = sys.argv[1:]\n{before}\nrunpy.run_path(sys.argv[0], run_name="__main__")'
    command = [sys.executable, '-c', code] if before else [sys.executable]
    return subprocess.run([*command, str(SCRIPT[name]), *map(str, args)], capture_output=True, text=True,
                          encoding='utf-8', timeout=60, **kwargs)


def read(folder):
    """-> meta, text of train, text of val, with the separators"""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    encoding = load_tokenizer(meta['tokenizer'])
    assert meta['vocab_size'] == encoding.n_vocab
    texts = []
    for split in ('train', 'val'):
        ids = np.fromfile(folder / f'{split}.bin', dtype=np.uint16)
        assert len(ids) == meta[f'{split}_tokens']
        # END by itself, so that a literal one in the text would not be taken for it
        documents, document = [], []
        for i in ids.tolist():
            if i == encoding.n_vocab - 1:
                documents.append(encoding.decode(document))
                document = []
            else:
                document.append(i)
        assert not document and meta[f'{split}_bytes'] == sum(len(d.encode('utf-8')) for d in documents)
        texts.append(documents)
    return meta, *texts


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def content_after_kill(folder):
    return {name: data for name, data in content(folder).items() if not name.endswith('.tmp')}


def one_line(result, code, *parts):
    assert result.returncode == code, result.stderr
    assert result.stderr.count('\n') == 1 and 'Traceback' not in result.stderr, result.stderr
    for part in parts:
        assert part in result.stderr


# ---- python ----

@pytest.fixture(scope='module')
def python_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'python'
    result = prepare('python', '--out', folder, cwd=tmp_path_factory.mktemp('elsewhere'))
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_python_corpus_is_the_standard_library_without_its_tests(python_data):
    """Every document is compared with the files as glob and the tokenize module find and read them."""
    folder, stdout = python_data
    meta, train, val = read(folder)
    lib = Path(sysconfig.get_path('stdlib'))
    name_of = {}
    for path in lib.rglob('*.py'):
        if 'site-packages' not in path.parts and 'dist-packages' not in path.parts:
            try:
                with tokenize.open(path) as f:
                    name_of.setdefault(f.read(), []).append(path.relative_to(lib).as_posix())
            except (SyntaxError, UnicodeDecodeError):
                pass
    names = [[name_of[document] for document in documents] for documents in (train, val)]
    # a few files of the library are copies of one another, then any name that is not left out will do
    wanted = [[[name for name in same if not {'test', 'tests', 'idle_test', 'encodings'} & set(name.split('/'))]
               for same in split] for split in names]
    flat = [same for split in wanted for same in split]
    assert all(flat) and len(flat) > 300
    for name in ('argparse.py', 'asyncio/tasks.py', 'json/decoder.py', 'unittest/case.py', 'doctest.py'):
        assert [name] in flat
    # documents come in the order of their names, which makes the files the same on every file system
    for split in wanted:
        assert all(min(a) < max(b) for a, b in zip(split, split[1:]))
    assert 8e6 < meta['train_bytes'] + meta['val_bytes'] < 14e6
    assert 'train + val' in stdout and f"{meta['train_tokens']:,}" in stdout and str(folder) in stdout


def test_python_split_shares_no_file_and_no_content(python_data):
    meta, train, val = read(python_data[0])
    assert len(set(train)) == len(train) and len(set(val)) == len(val) and not set(train) & set(val)
    assert 0.03 < meta['val_bytes'] / (meta['train_bytes'] + meta['val_bytes']) < 0.12
    assert 3.5 < meta['val_bytes'] / meta['val_tokens'] < 4.1     # GPT-2's pattern at this size: 3.60


def test_python_train_bin_is_the_concatenated_sources(python_data):
    meta = json.loads((python_data[0] / 'meta.json').read_text(encoding='utf-8'))
    encoding = load_tokenizer(meta['tokenizer'])
    sources = python_prepare.find_sources(Path(sysconfig.get_path('stdlib')))
    for split, wanted in (('train', False), ('val', True)):
        text = ''.join(text + END for name, text in sources if python_prepare.in_val(name) == wanted)
        ids = np.fromfile(python_data[0] / f'{split}.bin', dtype=np.uint16)
        assert encoding.decode_bytes(ids.tolist()) == text.encode('utf-8')


def test_python_twice_is_the_same_to_the_byte(python_data, tmp_path):
    first = content(python_data[0])
    assert set(first) == {'train.bin', 'val.bin', 'meta.json'}      # and no temporary file
    # another hash seed: an order that came from a set would differ
    assert prepare('python', '--out', tmp_path / 'again', env=os.environ | {'PYTHONHASHSEED': '7'}).returncode == 0
    assert content(tmp_path / 'again') == first


def test_python_side_of_a_file_depends_on_its_name_alone():
    """Pinned: if these move, committed tokenizer and validation text are no longer disjoint."""
    val = {name for name in ('argparse.py', 'enum.py', 'traceback.py', 'timeit.py', 'ast.py', 'json/encoder.py',
                             'json/decoder.py', 'html/parser.py', 'random.py') if python_prepare.in_val(name)}
    assert val == {'enum.py', 'traceback.py', 'timeit.py', 'json/encoder.py', 'html/parser.py'}


def test_python_sources_that_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(python_prepare, 'MIN_BYTES', 0)
    files = {'b.py': 'b = 1\n', 'pkg/a.py': 'ü = 2\n', 'pkg/copy_of_b.py': 'b = 1\n', 'empty.py': ' \n',
             'notes.txt': 'no', 'test/t.py': 't', 'pkg/tests/t.py': 't', 'encodings/cp1250.py': 't',
             '_sysconfigdata_x.py': '/a/path', 'sitecustomize.py': 't', 'crlf.py': 'x = 1\r\ny = 2\r\n'}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode('utf-8'))
    (tmp_path / 'latin.py').write_bytes('# coding: latin-1\nx = "é"\n'.encode('latin-1'))
    (tmp_path / 'broken.py').write_bytes(b'x = "\xff\xfe"\n')
    (tmp_path / 'unknown.py').write_bytes(b'# coding: klingon\n')
    assert python_prepare.find_sources(tmp_path) == [
        ('b.py', 'b = 1\n'), ('crlf.py', 'x = 1\ny = 2\n'), ('latin.py', '# coding: latin-1\nx = "é"\n'),
        ('pkg/a.py', 'ü = 2\n')]


def test_python_without_sources_is_one_clear_line(tmp_path):
    for lib in (tmp_path, tmp_path / 'python311.zip'):      # stripped, zipped
        result = prepare('python', '--out', tmp_path / 'out', before='import sysconfig; get = sysconfig.get_path\n'
                         f'sysconfig.get_path = lambda name: {str(lib)!r} if name == "stdlib" else get(name)')
        one_line(result, 1, 'no Python sources', 'data/text/prepare.py')
        assert not (tmp_path / 'out').exists()


def test_training_a_tokenizer_without_the_package_is_one_clear_line():
    code = 'import runpy, sys\nsys.modules["tokenizers"] = None\nsys.argv = sys.argv[1:]\n' \
           'runpy.run_path(sys.argv[0], run_name="__main__")'
    script = ROOT / 'data' / 'python' / 'train_tokenizer.py'
    result = subprocess.run([sys.executable, '-c', code, str(script)], capture_output=True, text=True, timeout=60)
    one_line(result, 1, 'pip install tokenizers')


# ---- writing ----

@pytest.mark.parametrize('moment', ['while writing', 'between the names'])
def test_a_kill_leaves_the_old_data_or_none_never_a_mixture(tmp_path, moment):
    """
    train.bin of one run with meta.json of another trains without complaint on wrong ids. A kill while the new files
    are written must leave the old set; one while they get their names must leave no meta.json to be believed.
    """
    (tmp_path / 'a.txt').write_text('the old text\n' * 900, encoding='utf-8')
    (tmp_path / 'b.txt').write_text('another, newer text\n' * 900, encoding='utf-8')
    out = tmp_path / 'out'
    assert prepare('text', tmp_path / 'a.txt', '--out', out).returncode == 0
    old = content(out)

    die = 'os.kill(os.getpid(), 9)'
    before = {'while writing': f'import json\njson.dumps = lambda *args: {die}',
              'between the names': 'replace = os.replace\n'
              f'os.replace = lambda a, b: {die} if str(b).endswith("val.bin") else replace(a, b)'}[moment]
    assert prepare('text', tmp_path / 'b.txt', '--out', out, before=before).returncode == -signal.SIGKILL
    left = content_after_kill(out)
    if moment == 'while writing':
        assert left == old
    else:
        assert set(left) == {'train.bin', 'val.bin'} and left['val.bin'] == old['val.bin']

    assert prepare('text', tmp_path / 'b.txt', '--out', out).returncode == 0
    assert ''.join(read(out)[1]).startswith('another, newer text\n')


def test_an_error_while_writing_leaves_the_old_data_and_no_temporary_file(tmp_path):
    (tmp_path / 'a.txt').write_text('the old text\n' * 900, encoding='utf-8')
    assert prepare('text', tmp_path / 'a.txt', '--out', tmp_path / 'out').returncode == 0
    old = content(tmp_path / 'out')
    (tmp_path / 'a.txt').write_text('a newer text\n' * 900, encoding='utf-8')
    for error, code in (('OSError(28, "No space left on device")', 1), ('KeyboardInterrupt()', 130)):
        result = prepare('text', tmp_path / 'a.txt', '--out', tmp_path / 'out', before=f'def full(fd): raise {error}\n'
                         'os.fsync = full')
        one_line(result, code, 'No space left' if code == 1 else 'interrupted')
        assert content(tmp_path / 'out') == old


def test_ids_must_fit_16_bits(tmp_path):
    """65,536 ids are the most that uint16 tells apart; one more would come back as id 0."""
    characters = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    characters += [chr(256 + i) for i in range(256 - len(characters))]
    merges = [(a, b) for a in characters for b in characters]
    (tmp_path / 'a.txt').write_text('some text\n' * 1000, encoding='utf-8')
    for count, fits in ((2 ** 16 - 257, True), (2 ** 16 - 256, False)):
        tokens = characters + [a + b for a, b in merges[:count]] + [END]
        (tmp_path / 'encoder.json').write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding='utf-8')
        (tmp_path / 'vocab.bpe').write_text('\n'.join(f'{a} {b}' for a, b in merges[:count]), encoding='utf-8')
        result = prepare('text', tmp_path / 'a.txt', '--tokenizer', tmp_path, '--out', tmp_path / 'out')
        if fits:
            assert result.returncode == 0, result.stderr
            assert np.fromfile(tmp_path / 'out' / 'val.bin', dtype=np.uint16)[-1] == 65535
        else:
            one_line(result, 1, 'a vocabulary of 65,537 does not fit', 'choose a smaller tokenizer')


# ---- text ----

def lines(seed, count):
    rng = random.Random(seed)
    words = 'être ou ne pas être that is the question 数 def return x = 3.14 🙂'.split()
    return ''.join(' '.join(rng.choices(words, k=rng.randrange(1, 12))) + '\n' for _ in range(count))


@pytest.mark.parametrize('tokenizer', ['python4k', 'bytes'])
def test_text_of_one_file_is_cut_after_a_line(tmp_path, tokenizer):
    text = lines(0, 2000)
    (tmp_path / 'book.txt').write_text(text, encoding='utf-8')
    result = prepare('text', 'book.txt', '--tokenizer', tokenizer, '--val_fraction=0.2', '--out', 'out', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    meta, (train,), (val,) = read(tmp_path / 'out')
    assert train + val == text and train.endswith('\n')
    assert 0.19 < len(val) / len(text) <= 0.2
    assert meta['source'] == 'book.txt'


def test_text_of_one_long_line_is_cut_all_the_same(tmp_path):
    text = lines(0, 2000).replace('\n', ' ') + '\n'
    (tmp_path / 'line.txt').write_text(text, encoding='utf-8')
    assert prepare('text', tmp_path / 'line.txt', '--out', tmp_path / 'out').returncode == 0
    _, (train,), (val,) = read(tmp_path / 'out')
    assert train + val == text and 0.09 < len(val) / len(text) <= 0.101


def test_text_of_one_file_with_marked_documents_is_cut_between_two(tmp_path):
    documents = [lines(i, 30) for i in range(40)]
    (tmp_path / 'stories.txt').write_text(f'\n{END}\n'.join(documents + documents[:3]) + END, encoding='utf-8')
    assert prepare('text', tmp_path / 'stories.txt', '--out', tmp_path / 'out').returncode == 0
    meta, train, val = read(tmp_path / 'out')
    assert train + val == documents         # the repeated ones, which would have come in val, are gone
    assert 0.05 < meta['val_bytes'] / (meta['train_bytes'] + meta['val_bytes']) <= 0.1


def test_text_of_many_files_is_split_by_file(tmp_path):
    texts = {f'{i}.txt': lines(i, 20 + 5 * i) for i in range(30)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    (tmp_path / 'again.txt').write_text(texts['3.txt'], encoding='utf-8')
    assert prepare('text', *texts, 'again.txt', '--out', 'out', cwd=tmp_path).returncode == 0
    meta, train, val = read(tmp_path / 'out')
    assert not set(train) & set(val) and sorted(train + val) == sorted(texts.values())
    assert 0.03 < meta['val_bytes'] / (meta['train_bytes'] + meta['val_bytes']) <= 0.1
    assert meta['source'] == '0.txt, 1.txt, 2.txt and 28 more'
    # which files are kept for validation depends neither on the order they are named in nor on where they are
    assert prepare('text', *(tmp_path / name for name in sorted(texts)), '--out', tmp_path / 'other').returncode == 0
    assert sorted(read(tmp_path / 'other')[2]) == sorted(val)


def test_text_of_two_large_files_keeps_the_smaller_one_for_validation(tmp_path):
    (tmp_path / 'a.txt').write_text(lines(0, 900), encoding='utf-8')
    (tmp_path / 'b.txt').write_text(lines(1, 300), encoding='utf-8')
    assert prepare('text', tmp_path / 'b.txt', tmp_path / 'a.txt', '--out', tmp_path / 'out').returncode == 0
    assert read(tmp_path / 'out')[1:] == ([lines(0, 900)], [lines(1, 300)])


def test_text_with_windows_line_ends_and_byte_order_mark(tmp_path):
    text = lines(0, 500)
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode('utf-8'))
    assert prepare('text', tmp_path / 'a.txt', '--out', tmp_path / 'out').returncode == 0
    _, (train,), (val,) = read(tmp_path / 'out')
    assert train + val == text


def test_text_errors_are_one_line_with_the_remedy(tmp_path):
    (tmp_path / 'good.txt').write_text(lines(0, 500), encoding='utf-8')
    (tmp_path / 'empty.txt').write_text(' \n', encoding='utf-8')
    (tmp_path / 'tiny.txt').write_text('too little\n' * 10, encoding='utf-8')
    (tmp_path / 'latin.txt').write_bytes('café\n'.encode('latin-1') * 500)
    (tmp_path / 'blocked').write_text('a file where the directory should go', encoding='utf-8')
    offline = 'import tiktoken\ndef offline(name): raise ConnectionError("no route")\ntiktoken.get_encoding = offline'
    for code, parts, args in [
            (1, ['missing.txt', 'No such file'], ['missing.txt']),
            (1, ['cannot read'], [tmp_path]),
            (1, ['no text'], ['empty.txt']),
            (1, ['too little text'], ['tiny.txt']),
            (1, ['latin.txt is not UTF-8', '0xe9 at 3', 'iconv'], ['good.txt', 'latin.txt']),
            (1, ["unknown tokenizer 'klingon'", 'python4k, bytes, gpt2'], ['good.txt', '--tokenizer', 'klingon']),
            (1, ['gpt2', 'go online once, or put vocab.bpe'], ['good.txt', '--tokenizer', 'gpt2']),
            (1, ['blocked'], ['good.txt', '--out', 'blocked/out']),
            (2, ['FILE'], []),
            (2, ['--val_fraction', "'1.5'"], ['good.txt', '--val_fraction', '1.5']),
            (2, ['--val_fraction', "'many'"], ['good.txt', '--val_fraction=many']),
            (2, ['tokeniser', 'tokenizer'], ['good.txt', '--tokeniser', 'bytes'])]:
        result = prepare('text', '--out', 'out', *args, cwd=tmp_path, before=offline)
        one_line(result, code, *parts)
        assert not (tmp_path / 'out').exists()


# ---- shakespeare ----

@pytest.fixture
def shakespeare(tmp_path, monkeypatch):
    """the script as a module whose own directory is a temporary one; opened: the addresses that were asked for"""
    spec = importlib.util.spec_from_file_location('shakespeare_prepare', SCRIPT['shakespeare'])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.opened = []
    monkeypatch.setattr(module, 'HERE', tmp_path / 'shakespeare')
    monkeypatch.setattr(sys, 'argv', ['prepare.py'])
    (tmp_path / 'shakespeare').mkdir()
    return module


def serve(module, monkeypatch, answer):
    def urlopen(url, timeout):
        module.opened.append(url)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)
    monkeypatch.setattr(module.urllib.request, 'urlopen', urlopen)


def test_shakespeare_is_downloaded_once(shakespeare, monkeypatch):
    text = ('To be, or not to be: that is the question.\n' * 26000)[:shakespeare.SIZE]
    serve(shakespeare, monkeypatch, text.encode('ascii'))
    for _ in range(2):
        shakespeare.main()
        meta, (train,), (val,) = read(shakespeare.HERE)
        assert train + val == text and meta['vocab_size'] == 257
        assert meta['val_bytes'] == pytest.approx(shakespeare.SIZE / 10, abs=50)
    assert shakespeare.opened == [shakespeare.URL]
    assert set(content(shakespeare.HERE)) == {'input.txt', 'train.bin', 'val.bin', 'meta.json'}


@pytest.mark.parametrize('answer', [ConnectionError('no route'), http.client.IncompleteRead(b'half'),
                                    b'<html>please log in to the airport wifi</html>'])
def test_shakespeare_that_cannot_be_had_says_what_to_fetch(shakespeare, monkeypatch, capsys, answer):
    """A login page, saved as the text, was trained on; a file cut short stayed in place of the whole one."""
    serve(shakespeare, monkeypatch, answer)
    with pytest.raises(SystemExit) as e:
        common.run(shakespeare.main)
    error = capsys.readouterr().err
    assert e.value.code == 1 and error.count('\n') == 1
    assert f'fetch {shakespeare.URL}' in error and str(shakespeare.HERE / 'input.txt') in error
    assert content(shakespeare.HERE) == {}


# ---- fineweb ----

FAKE_DATASETS = '''
"""Stands in for the `datasets` package: 9,000 documents, some of them twice, served in order; FAKE_AT breaks it."""
import os, random

def document(i):
    rng = random.Random(i % 8900)
    return ' '.join(rng.choices(['data', 'für', 'the', 'of', 'school', '数'], k=rng.randrange(3, 12)))

class Stream:
    position = 0
    def state_dict(self):
        return {'position': self.position}
    def load_state_dict(self, state):
        self.position = state['position']
    def __iter__(self):
        while self.position < 9000:
            self.position += 1
            if self.position == int(os.environ.get('FAKE_AT', 0)):
                if os.environ['FAKE_HOW'] == 'kill':
                    os.kill(os.getpid(), 9)
                raise RuntimeError('connection lost\\nafter five tries')
            with open(os.environ['FAKE_LOG'], 'a', encoding='utf-8') as f:
                f.write(f'{self.position - 1}\\n')
            yield {'text': document(self.position - 1), 'id': self.position}

def load_dataset(path, name, split, streaming):
    assert (path, name, split, streaming) == ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', True)
    return Stream()
'''


@pytest.fixture
def fineweb(tmp_path):
    (tmp_path / 'fake').mkdir()
    (tmp_path / 'fake' / 'datasets.py').write_text(FAKE_DATASETS, encoding='utf-8')

    def fineweb(*args, at=0, how='', **kwargs):
        env = os.environ | {'PYTHONPATH': str(tmp_path / 'fake'), 'FAKE_AT': str(at), 'FAKE_HOW': how,
                            'FAKE_LOG': str(tmp_path / 'log')}
        (tmp_path / 'log').write_text('', encoding='utf-8')
        result = prepare('fineweb', '--tokenizer', 'python4k', '--val_fraction', '0.05', *args, env=env, **kwargs)
        result.asked = [int(line) for line in (tmp_path / 'log').read_text(encoding='utf-8').split()]
        return result
    return fineweb


@pytest.fixture
def fake_documents(tmp_path, fineweb):
    spec = importlib.util.spec_from_file_location('fake_datasets', tmp_path / 'fake' / 'datasets.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [module.document(i) for i in range(9000)]


def test_fineweb_holds_every_document_once_in_order(fineweb, fake_documents, tmp_path):
    result = fineweb('--out', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    assert set(content(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}
    meta, train, val = read(tmp_path / 'out')
    assert len(train) + len(val) == 9000 and 0.03 < len(val) / 9000 < 0.07
    # the split is by content, so a document and its repetition are on the same side
    assert not set(train) & set(val)
    for split in (train, val):
        assert split == [document for document in fake_documents if document in set(split)]


@pytest.mark.parametrize('how', ['kill', 'raise'])
def test_fineweb_goes_on_after_a_kill_or_a_lost_connection(fineweb, tmp_path, how):
    """The result is the same to the byte as without the interruptions, and what was finished is not asked for again."""
    assert fineweb('--out', tmp_path / 'whole').returncode == 0
    for at, first in ((1500, 0), (5000, 0), (8500, 4000)):
        result = fineweb('--out', tmp_path / 'out', at=at, how=how)
        assert result.asked[0] == first
        if how == 'kill':
            assert result.returncode == -signal.SIGKILL
        else:
            one_line(result, 1, 'RuntimeError: connection lost after five tries', 'the same command goes on')
        assert not (tmp_path / 'out' / 'meta.json').exists()
    # a kill between tokens and record: more tokens in the file than the record knows of
    with open(tmp_path / 'out' / 'train.bin.part', 'ab') as f:
        f.write(b'\x01\x02\x03')
    result = fineweb('--out', tmp_path / 'out')
    assert result.returncode == 0 and result.asked[0] == 8000
    assert content_after_kill(tmp_path / 'out') == content(tmp_path / 'whole')


def test_fineweb_killed_between_the_final_names_finishes_at_the_next_run(fineweb, tmp_path):
    assert fineweb('--out', tmp_path / 'whole').returncode == 0
    die = 'replace = os.replace\n' \
          'os.replace = lambda a, b: os.kill(os.getpid(), 9) if str(b).endswith("val.bin") else replace(a, b)'
    assert fineweb('--out', tmp_path / 'out', before=die).returncode == -signal.SIGKILL
    assert set(content_after_kill(tmp_path / 'out')) == {'train.bin', 'val.bin.part', 'progress.json'}
    result = fineweb('--out', tmp_path / 'out')
    assert result.returncode == 0 and result.asked == []
    assert content_after_kill(tmp_path / 'out') == content(tmp_path / 'whole')


def test_fineweb_stops_at_max_tokens_and_reads_no_further(fineweb, tmp_path):
    result = fineweb('--out', tmp_path / 'out', '--max_tokens', '30000')
    assert result.returncode == 0, result.stderr
    tokens = read(tmp_path / 'out')[0]['train_tokens']
    assert 30000 <= tokens < 30000 + 2000 * 30 and len(result.asked) in (2000, 4000)


def test_fineweb_errors_are_one_line_with_the_remedy(fineweb, tmp_path):
    out = ['--out', tmp_path / 'out']
    one_line(fineweb(*out, before='sys.modules["datasets"] = None'), 1, 'pip install datasets')
    offline = 'import datasets\ndef offline(*args, **kwargs): raise ValueError("no such host\\n\\nat all")\n' \
              'datasets.load_dataset = offline'
    one_line(fineweb(*out, before=offline), 1, 'ValueError: no such host at all', 'check the network')
    one_line(fineweb(*out, '--max_token', '5'), 2, 'max_tokens')
    assert fineweb(*out, at=5000, how='kill').returncode == -signal.SIGKILL
    one_line(fineweb(*out, '--tokenizer', 'bytes'), 1, "'tokenizer': 'python4k'", 'the same options')
    os.truncate(tmp_path / 'out' / 'train.bin.part', 10)
    one_line(fineweb(*out), 1, 'train.bin.part is shorter', 'start over')
    (tmp_path / 'out' / 'progress.json').write_text('{"sett', encoding='utf-8')
    one_line(fineweb(*out), 1, 'progress.json is damaged', 'start over')
    (tmp_path / 'out' / 'progress.json').unlink()
    assert fineweb(*out).returncode == 0
    one_line(fineweb(*out), 1, 'prepared already')
