"""The prepare.py scripts against texts read and split here by other means; load_dataset against damage."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pytest

from conftest import linux_only
from data import common
from data.common import DataError, load_dataset
from data.fineweb import prepare as fineweb_script
from data.python import prepare as python_script
from data.text import prepare as text_script
from tokenizer import end_id, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
END = '<|endoftext|>'
# the process is killed where it gives a file its name
DIE_AT = '''
replace = os.replace
os.replace = lambda a, b: os.kill(os.getpid(), 9) if str(b).endswith("{}") else replace(a, b)
'''


@pytest.fixture
def prepare(monkeypatch, capsys):
    """
    Runs the program of a prepare.py with args in this process -> what it prints. With an exit code, and parts
    of the line that it ends in -> that line.
    """
    def prepare(script, *args, code=0, parts=()):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, args)])
        left_with = 0
        try:
            common.run(script.main)
        except SystemExit as e:
            left_with = e.code
        printed, error = capsys.readouterr()
        assert left_with == code and error.count('\n') == (code != 0), error
        assert all(part in error for part in parts), error
        return error if code else printed
    return prepare


def prepare_and_die(script, *args, before='', **env):
    """The same in a process of its own; before: Python code that runs there first, so that it gets killed."""
    code = 'import os, runpy, sys\nsys.argv = sys.argv[1:]\n' + before
    code += '\nrunpy.run_path(sys.argv[0], run_name="__main__")'
    command = [sys.executable, '-c', code, script.__file__, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})
    assert result.returncode == -signal.SIGKILL, result.stderr


def read(folder):
    """-> meta, documents of train, documents of val"""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    encoding = load_tokenizer(meta['tokenizer'])
    assert meta['vocab_size'] == encoding.n_vocab
    splits = []
    for split in ('train', 'val'):
        ids = np.fromfile(folder / f'{split}.bin', np.uint16 if encoding.n_vocab <= 65536 else np.uint32)
        ends = np.flatnonzero(ids == end_id(meta['tokenizer'], encoding))
        assert len(ids) == meta[f'{split}_tokens'] and ends[-1] == len(ids) - 1
        splits.append([encoding.decode(document[:-1].tolist()) for document in np.split(ids, ends[:-1] + 1)])
        assert meta[f'{split}_bytes'] == sum(len(document.encode('utf-8')) for document in splits[-1])
    return meta, *splits


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def content_after_kill(folder):
    return {name: data for name, data in content(folder).items() if not name.endswith(('.partial', '.part'))}


def lines(seed, count):
    rng = random.Random(seed)
    words = 'être ou ne pas être that is the question 数 def return x = 3.14 🙂'.split()
    return ''.join(' '.join(rng.choices(words, k=rng.randrange(1, 12))) + '\n' for _ in range(count))


def write(folder, **texts):
    """Files NAME.txt -> their paths"""
    for name, text in texts.items():
        (folder / f'{name}.txt').write_text(text, encoding='utf-8')
    return [folder / f'{name}.txt' for name in texts]


# ---- python ----

@pytest.fixture(scope='module')
def python_data(tmp_path_factory):
    """As a user runs it, from another folder"""
    folder = tmp_path_factory.mktemp('data') / 'python'
    command = [sys.executable, python_script.__file__, '--out', str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder.parent)
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
    # a few files of the library are copies of one another, then any name that is not left out will do
    left_out = {'test', 'tests', 'idle_test', 'encodings'}
    names = [[[name for name in name_of[text] if not left_out & set(name.split('/'))] for text in split]
             for split in (train, val)]
    assert all(map(all, names)) and len(names[0]) > 300
    for name in ('argparse.py', 'asyncio/tasks.py', 'json/decoder.py', 'unittest/case.py', 'doctest.py'):
        assert [name] in names[0] + names[1]
    # documents come in the order of their names, which makes the files the same on every file system
    for split in names:
        assert all(min(a) < max(b) for a, b in zip(split, split[1:]))
    assert 8e6 < meta['train_bytes'] + meta['val_bytes'] < 14e6
    assert 'train + val' in stdout and f"{meta['train_tokens']:,}" in stdout and str(folder) in stdout


def test_python_split_shares_no_file_and_no_content(python_data):
    meta, train, val = read(python_data[0])
    assert len(set(train)) == len(train) and len(set(val)) == len(val) and not set(train) & set(val)
    assert 0.03 < meta['val_bytes'] / (meta['train_bytes'] + meta['val_bytes']) < 0.12
    assert 3.5 < meta['val_bytes'] / meta['val_tokens'] < 4.1     # GPT-2's pattern at this size: 3.60


def test_python_twice_is_the_same_to_the_byte(python_data, prepare, tmp_path):
    """The first time had another hash seed, in a process of its own: the order of a set would differ."""
    first = content(python_data[0])
    assert set(first) == {'train.bin', 'val.bin', 'meta.json'}      # and no temporary file
    prepare(python_script, '--out', tmp_path / 'again')
    assert content(tmp_path / 'again') == first


def test_python_side_of_a_file_depends_on_its_name_alone():
    """Pinned: if these move, committed tokenizer and validation text are no longer disjoint."""
    val = {'enum.py', 'traceback.py', 'timeit.py', 'json/encoder.py', 'html/parser.py'}
    train = {'argparse.py', 'ast.py', 'json/decoder.py', 'random.py'}
    assert {name for name in val | train if common.in_val(name, 0.08)} == val
    assert python_script.VAL_FRACTION == 0.08


def test_python_sources_that_are_left_out(tmp_path, monkeypatch):
    """From a library and the packages installed beside it; what repeats, in whichever, comes once."""
    monkeypatch.setattr(python_script, 'MIN_BYTES', 0)
    files = {'b.py': 'b = 1\n', 'pkg/a.py': 'ü = 2\n', 'pkg/copy_of_b.py': 'b = 1\n', 'empty.py': ' \n',
             'notes.txt': 'no', 'test/t.py': 't', 'pkg/tests/t.py': 't', 'encodings/cp1250.py': 't',
             '_sysconfigdata_x.py': '/a/path', 'sitecustomize.py': 't', 'crlf.py': 'x = 1\r\ny = 2\r\n',
             'site-packages/torch/t.py': 't = 1\n', 'site-packages/pip/_vendor/t.py': 't = 2\n',
             'site-packages/copy_of_b.py': 'b = 1\n', 'site-packages/table.py': f'x = "{"0" * 400_000}"\n',
             'site-packages/numpy/tests/t.py': 't', 'site-packages/a.py': 'a = 1\n',
             'large.py': '#' * 400_001}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(text.encode('utf-8'))
    (tmp_path / 'latin.py').write_bytes('# coding: latin-1\nx = "é"\n'.encode('latin-1'))
    # tracebacks: an encoding that is none of text, and a link to nowhere
    (tmp_path / 'rot13.py').write_text('# coding: rot13\nk = 1\n')
    (tmp_path / 'nowhere.py').symlink_to(tmp_path / 'gone.py')
    (tmp_path / 'broken.py').write_bytes(b'x = "\xff\xfe"\n')
    (tmp_path / 'unknown.py').write_bytes(b'# coding: klingon\n')
    library = [('b.py', 'b = 1\n'), ('crlf.py', 'x = 1\ny = 2\n'), ('large.py', '#' * 400_001),
               ('latin.py', '# coding: latin-1\nx = "é"\n'), ('pkg/a.py', 'ü = 2\n')]
    packages = [('a.py', 'a = 1\n'), ('torch/t.py', 't = 1\n')]
    assert python_script.find_sources(tmp_path) == library
    assert python_script.find_sources(tmp_path, [tmp_path / 'site-packages']) == library + packages


def test_python_packages_are_those_of_this_environment(tmp_path, monkeypatch, prepare):
    site = tmp_path / 'site-packages'
    site.mkdir()
    for i in range(60):
        (site / f'm{i}.py').write_text(lines(i, 20), encoding='utf-8')
        (site / f'copy_of_m{i}.py').write_text(lines(i, 20), encoding='utf-8')
    monkeypatch.setattr(python_script, 'MIN_BYTES', 0)
    monkeypatch.setattr(sys, 'path', [str(tmp_path), str(site)])
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    prepare(python_script, '--packages', '--out', tmp_path / 'out')
    meta, train, val = read(tmp_path / 'out')
    assert sorted(train + val) == sorted(lines(i, 20) for i in range(60)) and 1 <= len(val) <= 12
    for i in range(60):                 # its name alone decides; of two files of one content, the first's
        assert (lines(i, 20) in val) == common.in_val(f'copy_of_m{i}.py', 0.08)
    assert meta['source'].endswith('and packages')
    first = content(tmp_path / 'out')
    prepare(python_script, '--packages', '--out', tmp_path / 'again')
    assert content(tmp_path / 'again') == first


def test_python_without_sources_is_one_clear_line(tmp_path, monkeypatch, prepare):
    for lib in (tmp_path, tmp_path / 'python311.zip'):      # stripped, zipped
        monkeypatch.setattr(sysconfig, 'get_path', lambda name, lib=lib: str(lib))
        prepare(python_script, '--out', tmp_path / 'out', code=1, parts=['no Python sources', 'data/text/'])
        assert not (tmp_path / 'out').exists()


def test_training_a_tokenizer_without_the_package_is_one_clear_line(monkeypatch, prepare):
    from data.python import train_tokenizer
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    prepare(train_tokenizer, code=1, parts=['pip install tokenizers'])


# ---- writing ----

@pytest.mark.parametrize('moment', ['while writing', 'between the names'])
def test_kill_never_leaves_files_of_two_data_sets(tmp_path, prepare, moment):
    """
    train.bin of one run with meta.json of another trains without complaint on wrong ids. A kill while the new
    files are written must leave the old set; one while they get their names must leave no meta.json to be
    believed. What the killed process left unfinished goes at the next run.
    """
    old_text, new_text = write(tmp_path, a='the old text\n' * 900, b='another, newer text\n' * 900)
    out = tmp_path / 'out'
    prepare(text_script, old_text, '--out', out)
    old = content(out)

    before = {'while writing': 'os.fsync = lambda file: os.kill(os.getpid(), 9)',
              'between the names': DIE_AT.format('val.bin')}[moment]
    prepare_and_die(text_script, new_text, '--out', out, before=before)
    left = content_after_kill(out)
    if moment == 'while writing':
        assert left == old and len(content(out)) == 5
    else:
        assert set(left) == {'train.bin', 'val.bin'} and left['val.bin'] == old['val.bin']

    prepare(text_script, new_text, '--out', out)
    assert ''.join(read(out)[1]).startswith('another, newer text\n') and set(content(out)) == set(old)


def test_an_error_while_writing_leaves_the_old_data_and_no_temporary_file(tmp_path, prepare, monkeypatch):
    """A disk that fills up, as far as the system can pretend: files may not grow beyond 2,000 bytes."""
    import resource
    old_text, new_text = write(tmp_path, a='the old text\n' * 900, b='a newer text\n' * 900)
    prepare(text_script, old_text, '--out', tmp_path / 'out')
    old, limits = content(tmp_path / 'out'), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        prepare(text_script, new_text, '--out', tmp_path / 'out', code=1, parts=['too large', 'are intact'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path / 'out') == old

    def interrupt(fd):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, 'fsync', interrupt)
    prepare(text_script, new_text, '--out', tmp_path / 'out', code=130, parts=['interrupted'])
    assert content(tmp_path / 'out') == old


@linux_only
def test_closed_pipe_or_full_device_as_stdout_is_no_traceback(tmp_path):
    """`prepare.py | head -1` and `> /dev/full` once ended in a traceback; the data is there all the same."""
    book, = write(tmp_path, book=lines(0, 500))
    command = [sys.executable, text_script.__file__, str(book), '--out', str(tmp_path / 'out')]
    gone, stdout = os.pipe()
    os.close(gone)
    result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (141, '')
    with open('/dev/full', 'w', encoding='utf-8') as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr.count('\n') == 1 and 'No space left' in result.stderr
    assert read(tmp_path / 'out')[0]['source'] == 'book.txt'


def test_vocabulary_beyond_16_bits_is_stored_as_uint32(tmp_path, prepare):
    """65,536 ids are the most that uint16 tells apart: one more, and the last would come back as id 0."""
    from test_tokenizer import write_gpt2_dir
    characters = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    characters += [chr(256 + i) for i in range(256 - len(characters))]
    merges = [(a, b) for a in characters for b in characters]
    book, = write(tmp_path, book='some text\n' * 1000)
    for count, dtype in ((2 ** 16 - 257, np.uint16), (2 ** 16 - 256, np.uint32)):
        write_gpt2_dir(tmp_path, merges[:count])
        prepare(text_script, book, '--tokenizer', tmp_path, '--out', tmp_path / 'out')
        _, (train,), (val,) = read(tmp_path / 'out')
        assert train + val == 'some text\n' * 1000
        _, val, meta = load_dataset(tmp_path / 'out', 16)
        assert val.dtype == dtype and val[-1] == meta['vocab_size'] - 1 == 256 + count


# ---- text ----

@pytest.mark.parametrize('tokenizer', ['python4k', 'bytes'])
def test_text_of_one_file_is_cut_after_a_line(tmp_path, prepare, tokenizer):
    text = lines(0, 2000)
    prepare(text_script, *write(tmp_path, book=text), '--out', tmp_path / 'out', '--tokenizer', tokenizer)
    meta, (train,), (val,) = read(tmp_path / 'out')
    assert train + val == text and train.endswith('\n')
    assert 0.09 < len(val) / len(text) <= 0.1
    assert meta['source'] == 'book.txt'


def test_text_of_one_long_line_is_cut_all_the_same(tmp_path, prepare):
    text = lines(0, 2000).replace('\n', ' ') + '\n'
    prepare(text_script, *write(tmp_path, line=text), '--out', tmp_path / 'out')
    _, (train,), (val,) = read(tmp_path / 'out')
    assert train + val == text and 0.09 < len(val) / len(text) <= 0.101


def test_text_of_one_file_with_marked_documents_is_cut_between_two(tmp_path, prepare):
    documents = [lines(i, 30) for i in range(40)]
    stories = f'\n{END}\n'.join(documents) + END
    prepare(text_script, *write(tmp_path, stories=stories), '--out', tmp_path / 'out')
    meta, train, val = read(tmp_path / 'out')
    assert train + val == documents
    assert 0.05 < meta['val_bytes'] / (meta['train_bytes'] + meta['val_bytes']) <= 0.1


def test_the_last_tenth_of_each_file_is_for_validation(tmp_path, prepare):
    texts = [lines(0, 900), lines(1, 800), f'{lines(2, 300)}{END}{lines(3, 300)}{END}{lines(4, 50)}']
    prepare(text_script, *write(tmp_path, a=texts[0], b=texts[1], c=texts[2]), '--out', tmp_path / 'out')
    meta, train, val = read(tmp_path / 'out')
    assert [train[0] + val[0], train[1] + val[1], END.join(train[2:] + val[2:])] == texts
    assert train[2:] == texts[2].split(END)[:2]
    assert 0.06 < meta['val_bytes'] / (meta['train_bytes'] + meta['val_bytes']) <= 0.1


def test_text_with_windows_line_ends_and_byte_order_mark(tmp_path, prepare):
    text = lines(0, 500)
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode('utf-8'))
    prepare(text_script, tmp_path / 'a.txt', '--out', tmp_path / 'out')
    _, (train,), (val,) = read(tmp_path / 'out')
    assert train + val == text


@pytest.fixture
def chat_model(tmp_path):
    """A folder with the tokenizer of a chat model; 'a' is 67 in it, <|im_start|> 1, <|im_end|> 2."""
    from test_tokenizer import SMOLLM_SPECIAL, write_tokenizer_json
    return write_tokenizer_json(tmp_path / 'chat_model', SMOLLM_SPECIAL)


def talk(*texts, **more):
    roles = ['system', 'user', 'assistant'] if len(texts) % 2 else ['user', 'assistant'] * 9
    return json.dumps({'messages': [{'role': role, 'content': text} for role, text in zip(roles, texts)], **more})


def test_dialogues_are_written_in_the_models_template(tmp_path, chat_model, prepare):
    talks = [(f'What is {i}?', f'It is {i}. <|im_end|>\nNo.') for i in range(100)]
    lines = [talk(*texts, source='x') for texts in talks] + ['', talk('Be brief.', 'Hi.', 'Hi!')]
    (tmp_path / 'talks.jsonl').write_text('\r\n'.join(lines), encoding='utf-8-sig')
    write(tmp_path, book='A book is one document.\n' * 100)
    prepare(text_script, tmp_path / 'talks.jsonl', tmp_path / 'book.txt', '--tokenizer', chat_model,
            '--out', tmp_path / 'out')
    _, train, val = read(tmp_path / 'out')
    system = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
    expected = [f'<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n'
                f'<|im_start|>assistant\n{answer}<|im_end|>\n' for question, answer in talks]
    expected += ['<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n'
                 '<|im_start|>assistant\nHi!<|im_end|>\n']
    documents = train + val
    assert sorted(d for d in documents if 'book' not in d) == sorted(expected)
    assert 7 < len([d for d in val if 'book' not in d]) < 13      # whole dialogues, a tenth of them
    # the <|im_end|> that somebody wrote is text
    ids = np.concatenate([np.fromfile(tmp_path / 'out' / f'{split}.bin', np.uint16) for split in ('train', 'val')])
    assert (ids == 2).sum() == 3 * 101


def test_dialogues_that_cannot_be_learned_are_one_line(tmp_path, chat_model, prepare):
    path = tmp_path / 'talks.jsonl'
    for line in ('{', '[]', '{}', '{"messages": 3}', '{"messages": ["x"]}',
                 '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": null}]}',
                 '{"messages": [{"role": "tool", "content": "x"}]}',
                 '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
                 '[' * 100_000):
        path.write_text(talk('a', 'b') + '\n' + line, encoding='utf-8')
        prepare(text_script, path, '--tokenizer', chat_model, '--out', tmp_path / 'out', code=1,
                parts=[f'{path}, line 2: not {{"messages"'])
    path.write_text(talk('a', 'b'), encoding='utf-8')
    prepare(text_script, path, '--out', tmp_path / 'out', code=1,
            parts=['the tokenizer python4k has no chat template for dialogues', '--tokenizer smollm2'])
    assert not (tmp_path / 'out').exists()


def test_a_models_bos_comes_before_every_document(tmp_path, prepare):
    from test_tokenizer import BOS, EOS, PUTS_BOS, LLAMA3_SPECIAL, change_json, write_tokenizer_json
    folder = write_tokenizer_json(tmp_path / 'model', LLAMA3_SPECIAL)
    change_json(folder / 'tokenizer.json', post_processor=PUTS_BOS)
    write(tmp_path, one='b' * 3000, two='a' * 3000)
    prepare(text_script, tmp_path / 'one.txt', tmp_path / 'two.txt', '--tokenizer', folder, '--out', tmp_path / 'out')
    a, b = (ord(letter) - ord('!') for letter in 'ab')
    ids = np.fromfile(tmp_path / 'out' / 'train.bin', np.uint16).tolist()
    assert ids == [BOS, *[b] * 2700, EOS, BOS, *[a] * 2700, EOS]


def test_a_models_name_is_a_tokenizer(tmp_path, prepare):
    """The shipped model could not learn from one's own text: its tokenizer was "unknown"."""
    write(tmp_path, book='It was a dark and stormy night.\n' * 500)
    prepare(text_script, tmp_path / 'book.txt', '--tokenizer', 'smollm2', '--out', tmp_path / 'out')
    heldout = json.loads((ROOT / 'data' / 'heldout' / 'meta.json').read_text(encoding='utf-8'))
    assert read(tmp_path / 'out')[0]['tokenizer'] == heldout['tokenizer']


def test_text_errors_are_one_line_with_the_remedy(tmp_path, prepare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path(), good=lines(0, 500), empty=' \n', tiny='too little\n' * 10, blocked='where --out should go')
    Path('latin.txt').write_bytes('café\n'.encode('latin-1') * 500)

    def offline(name):
        raise ConnectionError('no route')
    monkeypatch.setattr('tiktoken.get_encoding', offline)
    for code, parts, args in [
            (1, ['missing.txt', 'No such file'], ['missing.txt']),
            (1, ['cannot read', 'Is a directory'], ['.']),
            (1, ['too little text: 0 train tokens'], ['empty.txt']),
            (1, ['too little text'], ['tiny.txt']),
            (1, ['latin.txt: not UTF-8 (byte 3)', 'iconv -f ENCODING'], ['good.txt', 'latin.txt']),
            (1, ['klingon: unknown tokenizer', 'bytes, gpt2', 'smollm2'], ['good.txt', '--tokenizer', 'klingon']),
            (1, ['gpt2'], ['good.txt', '--tokenizer', 'gpt2']),
            (1, ['blocked.txt', 'Not a directory'], ['good.txt', '--out', 'blocked.txt/out']),
            (2, ['FILE'], []),
            (2, ['unrecognized arguments: --tokeniser'], ['good.txt', '--tokeniser', 'bytes'])]:
        prepare(text_script, '--out', 'out', *args, code=code, parts=parts)
        assert not Path('out').exists() or not os.listdir('out')


@pytest.mark.parametrize('error', [
    MemoryError(), OSError(12, 'Cannot allocate memory'), RuntimeError('a fault of ours'),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")])
def test_out_of_memory_is_one_line_with_the_programs_own_remedy(error, capsys):
    def main():
        raise error
    if 'ours' in str(error):        # anything else keeps its traceback
        with pytest.raises(RuntimeError, match='a fault of ours'):
            common.run(main)
        return
    with pytest.raises(SystemExit, match='1'):
        common.run(main, memory='take less')
    assert capsys.readouterr().err.endswith('out of memory; take less\n')


# ---- fineweb ----

FAKE_DATASETS = '''
"""Stands in for the `datasets` package: 9,000 documents, some twice, served in order; FAKE_AT breaks it."""
import os
import random

def document(i):
    rng = random.Random(i % 8900)
    return ' '.join(rng.choices(['data', 'für', 'the', 'of', 'school', '数'], k=rng.randrange(3, 12)))

def stream():
    for i in range(9000):
        if i + 1 == int(os.environ.get('FAKE_AT', 0)):
            raise RuntimeError('connection lost\\nafter five tries')
        with open(os.environ['FAKE_LOG'], 'a', encoding='utf-8') as f:
            f.write(f'{i}\\n')
        yield {'text': document(i), 'id': i}

def load_dataset(path, name, split, streaming):
    assert (path, name, split, streaming) == ('HuggingFaceFW/fineweb-edu', 'sample-10BT', 'train', True)
    return stream()
'''


@pytest.fixture
def fineweb(tmp_path, monkeypatch, prepare):
    """Runs the script with that package -> the documents that it asked for. at: it loses its connection there."""
    (tmp_path / 'datasets.py').write_text(FAKE_DATASETS, encoding='utf-8')
    spec = importlib.util.spec_from_file_location('datasets', tmp_path / 'datasets.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, 'datasets', module)
    monkeypatch.setattr(fineweb_script, 'VAL_FRACTION', 0.05)

    def fineweb(*args, at=0, **expected):
        log = tmp_path / 'log'
        log.write_text('', encoding='utf-8')
        monkeypatch.setenv('FAKE_AT', str(at))
        monkeypatch.setenv('FAKE_LOG', str(log))
        prepare(fineweb_script, '--tokenizer', 'python4k', '--out', tmp_path / 'out', *args, **expected)
        return [int(line) for line in log.read_text(encoding='utf-8').split()]
    fineweb.documents = [module.document(i) for i in range(9000)]
    return fineweb


def test_fineweb_holds_every_document_once_in_order(fineweb, tmp_path):
    fineweb()
    assert set(content(tmp_path / 'out')) == {'train.bin', 'val.bin', 'meta.json'}
    meta, train, val = read(tmp_path / 'out')
    assert len(train) + len(val) == 9000 and 0.03 < len(val) / 9000 < 0.07
    # the split is by content, so a document and its repetition are on the same side
    assert not set(train) & set(val)
    for split in (train, val):
        kept = set(split)
        assert split == [document for document in fineweb.documents if document in kept]


def test_fineweb_stops_at_max_tokens_and_reads_no_further(fineweb, tmp_path):
    asked = fineweb('--max_tokens', '30000')
    tokens = read(tmp_path / 'out')[0]['train_tokens']
    assert 30000 <= tokens < 30000 + 2000 * 30 and len(asked) in (2000, 4000)


def test_fineweb_errors_are_one_line_with_the_remedy(fineweb, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ValueError('no such host\n\nat all')
    with monkeypatch.context() as m:
        m.setattr('datasets.load_dataset', offline)
        fineweb(code=1, parts=['ValueError: no such host at all', 'check the network'])
        m.setitem(sys.modules, 'datasets', None)
        fineweb(code=1, parts=['pip install datasets'])
    fineweb('--max_token', '5', code=2, parts=['--max_token'])
    assert not os.listdir(tmp_path / 'out')


def test_a_lost_connection_does_not_lose_what_has_arrived(fineweb, tmp_path, capsys):
    """An hour of streaming ended with one line and an empty folder. Two batches of 2,000 were whole here."""
    fineweb(at=5000)
    _, train, val = read(tmp_path / 'out')
    assert sorted(train + val) == sorted(fineweb.documents[:4000])


def test_ctrl_c_while_writing_keeps_the_pieces_so_far(tmp_path, capsys):
    spec, encoding = common.find_tokenizer('bytes')

    def pieces():
        for split in ('val', 'train'):
            yield common.encoded(split, encoding, spec, ['x' * 1000])
        raise KeyboardInterrupt

    common.write_dataset(tmp_path / 'out', encoding, spec, common.until_stopped(pieces()), 'a test')
    assert [len(ids) for ids in read(tmp_path / 'out')[1:]] == [1, 1]
    assert 'stopped early (Ctrl-C)' in capsys.readouterr().out


# ---- reading ----

def dataset(folder, **meta):
    """A whole data set of 3 x 1,000 tokens of 257 kinds; meta: fields to be otherwise, None: left out"""
    rng = np.random.default_rng(0)
    for split, count in (('train', 2000), ('val', 1000)):
        rng.integers(0, 257, count).astype(np.uint16).tofile(folder / f'{split}.bin')
    meta = {'tokenizer': {'kind': 'bytes'}, 'vocab_size': 257, 'train_tokens': 2000, 'val_tokens': 1000,
            'train_bytes': 2000, 'val_bytes': 1000, 'source': 'noise', **meta}
    meta = {key: value for key, value in meta.items() if value is not None}
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')


def refused(folder, block_size=16):
    with pytest.raises(DataError) as e:
        load_dataset(folder, block_size)
    assert '\n' not in str(e.value) and len(str(e.value)) < 300
    return str(e.value)


def test_a_data_set_comes_back_as_it_was_written(tmp_path, prepare):
    text = lines(0, 500)
    prepare(text_script, *write(tmp_path, book=text), '--out', tmp_path)
    train, val, meta = load_dataset(tmp_path, 256)
    encoding = load_tokenizer(meta['tokenizer'])
    assert encoding.decode(train[:-1].tolist()) + encoding.decode(val[:-1].tolist()) == text
    assert train[-1] == val[-1] == end_id(meta['tokenizer'], encoding)
    assert meta == json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))
    dataset(tmp_path, window=100)
    assert load_dataset(tmp_path, 100)[2]['window'] == 100


@pytest.mark.parametrize('meta', [{'vocab_size': None}, {'train_tokens': 1999}, {'val_tokens': 10 ** 30},
                                  {'vocab_size': 70000}])          # read as 32 bits
def test_meta_that_does_not_fit_is_one_line(tmp_path, meta):
    """`{}` in meta.json was a KeyError, and a file cut short went unseen."""
    dataset(tmp_path, **meta)
    assert 'is damaged' in refused(tmp_path)


@pytest.mark.parametrize('name, data', [
    ('meta.json', b'{}'), ('meta.json', b'[]'), ('meta.json', b'{"vocab'), ('meta.json', b'[' * 100_000),
    ('meta.json', b'\xff\xfe'), ('val.bin', b'123'), ('val.bin', b''), ('train.bin', None)])
def test_damaged_files_are_one_line(tmp_path, name, data):
    dataset(tmp_path)
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert 'is damaged' in refused(tmp_path) and 'prepare it again' in refused(tmp_path)


def test_data_that_is_too_short_for_the_context(tmp_path):
    dataset(tmp_path)
    assert 'too few for --block_size 1000' in refused(tmp_path, 1000)
    assert len(load_dataset(tmp_path, 999)[1]) == 1000
    dataset(tmp_path, window=100)
    assert 'windows of 100 tokens' in refused(tmp_path, 101)


def test_data_that_is_not_there_says_how_to_make_it(monkeypatch, tmp_path):
    for name, command in (('nowhere', 'python data/text/prepare.py FILE... and then use --data text'),
                          ('fineweb', 'python data/fineweb/prepare.py'), ('packages', '--packages')):
        monkeypatch.setattr(common, 'DATA', tmp_path)
        (tmp_path / 'fineweb').mkdir(exist_ok=True)
        (tmp_path / 'fineweb' / 'prepare.py').touch()
        assert f'data/{name} is not there' in refused(name) and command in refused(name)
    # --out data/talks, and then --data data/talks: it looked for data/data/talks
    assert refused('data/talks') == 'data/talks: give the folder without data/: --data talks'


def test_python_is_prepared_when_it_is_asked_for(monkeypatch, tmp_path, capfd):
    (tmp_path / 'python').mkdir()
    (tmp_path / 'python' / 'prepare.py').write_text('print("preparing")\nexit(1)', encoding='utf-8')
    monkeypatch.setattr(common, 'DATA', tmp_path)
    assert 'see the line above' in refused('python') and 'preparing' in capfd.readouterr().out


def test_missing_heldout_data_names_git_checkout(tmp_path, monkeypatch):
    """Damaged held-out text was to be prepared again, by a program that there is not."""
    monkeypatch.setattr(common, 'DATA', tmp_path)
    with pytest.raises(DataError, match='not there.*git checkout data/heldout'):
        load_dataset('heldout', 512)
    shutil.copytree(ROOT / 'data' / 'heldout', tmp_path / 'heldout')
    assert len(load_dataset('heldout', 512)[1]) == 2 * 192 * 512
    (tmp_path / 'heldout' / 'val.bin').write_bytes(b'x')
    with pytest.raises(DataError, match='is damaged.*git checkout data/heldout'):
        load_dataset('heldout', 512)
