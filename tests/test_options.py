"""options.py: what is given is what arrives, however it is written; what is wrong is one line naming it."""

import io
import random
import re
import sys
import unicodedata
from dataclasses import asdict, dataclass

import pytest

from options import counted, fail, option, parse_options, printable, progress


@dataclass
class Config:
    about = 'Does nothing.'
    lr: float = option(1e-3, 'peak learning rate', at_least=0)
    teacher: float = option(-1.0, 'share, 100% at most', at_most=1)
    n_layer: int = option(2, 'blocks', at_least=1)
    bias: bool = option(True, 'biases')
    resume: bool = option(False, 'go on')
    out: str = option('out', 'folder')
    prompt: str = option(None, 'text')


@dataclass
class Listed:
    about = 'Takes files.'
    files: tuple = option((), 'text files')
    name: str = option('x', 'a name')


def parse(*argv, cls=Config, presets=True):
    return parse_options(cls, 'python program.py', presets=presets, argv=argv)


def refused(capsys, *argv, **more):
    """The one line that argv ends in."""
    with pytest.raises(SystemExit) as e:
        parse(*argv, **more)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count('\n') == 1 and error.endswith('\n')
    return error


@pytest.fixture
def preset(tmp_path):
    def preset(content, name='preset.toml'):
        (tmp_path / name).write_text(content, encoding='utf-8')
        return str(tmp_path / name)
    return preset


VALUES = {'lr': [1e-3, 0.5, 3.0], 'teacher': [-1.0, -1e-3, 0.25], 'n_layer': [2, 7, 10 ** 12],
          'bias': [True, False], 'resume': [True, False], 'out': ['out', '-1', 'a=b', 'ü "x"', ''],
          'prompt': ['--lr 3', '=', 'yes']}


def as_toml(value):
    return f"'{value}'" if isinstance(value, str) else str(value).lower()


def as_words(name, value, rng):
    """An option in one of the ways to write it."""
    if isinstance(value, bool):
        return [f'--{name}' if value else f'--no-{name}']
    dash = str(value).startswith('-') and ' ' not in str(value)
    return [f'--{name}={value}'] if dash or rng.random() < 0.5 else [f'--{name}', str(value)]


def test_random_options_arrive_from_presets_and_flags(preset):
    """Values, some of them defaults, in a preset and in flags of every spelling, against merged dicts."""
    rng = random.Random(0)
    for _ in range(300):
        names = [rng.sample(list(VALUES), rng.randrange(5)) for _ in range(2)]
        in_preset, in_flags = ({name: rng.choice(VALUES[name]) for name in some} for some in names)
        path = preset('\n'.join(f'{name} = {as_toml(value)}' for name, value in in_preset.items()))
        argv = [[path], *(as_words(name, value, rng) for name, value in in_flags.items())]
        rng.shuffle(argv)
        config, given = parse(*(word for words in argv for word in words))
        assert asdict(config) == asdict(Config()) | in_preset | in_flags
        assert given == in_preset.keys() | in_flags.keys()


def test_a_preset_may_stand_anywhere_once(preset, capsys):
    """`train.py --lr 5e-4 x.toml` once trained the default model: a preset after a flag was swallowed."""
    path = preset('n_layer = 3\nlr = 1')
    for argv in ([path, '--lr', '5e-4'], ['--lr', '5e-4', path], ['--resume', path, '--lr=5e-4']):
        config, given = parse(*argv)
        assert (config.n_layer, config.lr) == (3, 5e-4) and {'n_layer', 'lr'} <= given
    assert f'unrecognized arguments: {path}' in refused(capsys, path, '--lr', '5e-4', path)
    assert 'preset maybe: No such file' in refused(capsys, '--resume', 'maybe')
    assert f'unrecognized arguments: {path}' in refused(capsys, '--lr', '5e-4', path, presets=False)


def test_given_is_told_apart_from_default():
    """--dense_steps 700 was dropped in silence where 700 was the default."""
    assert parse('--n_layer', '2', '--bias') == (Config(), {'n_layer', 'bias'})
    assert parse() == (Config(), set())


def test_last_of_two_flags_counts():
    assert parse('--lr', '1', '--resume', '--lr=2', '--no-resume')[0] == Config(lr=2.0)


def test_words_go_to_the_tuple_field():
    files = ('a.txt', 'b.txt', '7')
    for argv in (['a.txt', 'b.txt', '7', '--name', 'y'], ['a.txt', '--name', 'y', 'b.txt', '7']):
        assert parse(*argv, cls=Listed, presets=False) == (Listed(files, 'y'), {'files', 'name'})


@pytest.mark.parametrize('argv, words', [
    (['--learning_rate=1'], 'unrecognized arguments: --learning_rate=1; see --help'),
    (['--n_lay', '1'], 'unrecognized arguments: --n_lay'),
    (['--lr'], 'argument --lr: expected one argument'),
    (['--prompt', '--resume'], 'argument --prompt: expected one argument'),
    (['--lr', 'fast'], "--lr must be a number, not 'fast'"),
    (['--lr', 'nan'], '--lr must be at least 0, not nan'),
    (['--lr', 'inf'], '--lr must be at most 9223372036854775807, not inf'),
    (['--lr', '-1'], '--lr must be at least 0, not -1'),
    (['--teacher', '1.5'], '--teacher must be at most 1, not 1.5'),
    (['--n_layer', '0'], '--n_layer must be at least 1, not 0'),
    (['--n_layer', '2.0'], "--n_layer must be a whole number, not '2.0'"),
    (['--n_layer', '9' * 19], '--n_layer must be at most'),
    (['--n_layer', '9' * 5000], '--n_layer must be a whole number'),
    (['--resume=maybe'], 'argument --resume/--no-resume'),
])
def test_wrong_command_line_is_one_line(argv, words, capsys):
    """A bad option used to be a blank AssertionError; --lr nan trained a model of nan."""
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize('content, words', [
    ('n_layers = 3', '--n_layers, in the preset, is no option'),
    ('n_layer = 3.0', '--n_layer must be a whole number, not 3.0'),
    ('n_layer = true', '--n_layer must be a whole number, not True'),
    ('n_layer = 0', '--n_layer must be at least 1, not 0'),
    ('n_layer = [1, 2]', '--n_layer must be a whole number, not [1, 2]'),
    ('lr = nan', '--lr must be at least 0, not nan'),
    ('lr = 1979-05-27', '--lr must be a number, not datetime.date'),
    ('out = 3', '--out must be a string, in quotes, not 3'),
    ('bias = "no"', "--bias must be true or false, not 'no'"),
    ('[model]\nlr = 1', '--model, in the preset, is no option'),
    ('lr = ', 'not TOML'),
    ('lr = 1\nlr = 2', 'not TOML'),
    ('import os', 'not TOML'),
])
def test_wrong_preset_is_one_line(content, words, preset, capsys):
    """Presets were once run as code."""
    assert words in refused(capsys, preset(content))


def test_a_preset_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / 'binary.toml').write_bytes(b'\xff\xfe\0')
    assert 'not TOML' in refused(capsys, str(tmp_path / 'binary.toml'))
    assert 'Is a directory' in refused(capsys, str(tmp_path))


def test_lines_cannot_steer_a_terminal(preset, capsys):
    """A TOML key or a tensor's name with an escape sequence in it once reached the terminal by fail()."""
    assert printable('a\nb\r\n  c\u2028d') == 'a b c d'
    assert printable('\x1b]0;x\x07 \x9b \u202e \udc80 é 数') == '\\x1b]0;x\\x07 \\x9b \\u202e \\udc80 é 数'
    for code in range(0x3000):
        if unicodedata.category(chr(code)) in ('Cc', 'Cf', 'Zl', 'Zp'):
            assert chr(code) not in printable(f'a{chr(code)}b')
    assert '\x1b' not in refused(capsys, preset('"\\u001b[31m" = 1')) + refused(capsys, '--lr', '\x1b[31m')
    with pytest.raises(SystemExit):
        fail('of two\nlines', 1)
    assert capsys.readouterr().err.count('\n') == 1


def test_help_shows_every_option_with_its_default(capsys):
    for cls, words in ((Config, '[PRESET.toml]'), (Listed, 'FILES ...')):
        with pytest.raises(SystemExit) as e:
            parse('--name=x' if cls is Listed else '--lr=1', '-h', cls=cls, presets=cls is Config)
        shown = capsys.readouterr().out
        assert e.value.code == 0 and f'python program.py {words}' in shown and cls.about in shown
        for name, value in asdict(cls()).items():
            default = f'(default: {"none" if value is None else value})'
            assert name == 'files' or f'--{name}' in shown and default in ' '.join(shown.split())


def test_sys_argv_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['program.py', '--lr', '7'])
    assert parse_options(Config, 'python program.py')[0].lr == 7


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_line_that_goes_away_again(monkeypatch, capsys):
    """Programs were silent for minutes. On a terminal stderr says how far they are, never wider than that; in a file, nothing."""
    monkeypatch.setenv('COLUMNS', '30')
    assert list(counted([1, 2], 'windows')) == [1, 2] and capsys.readouterr().err == ''
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert list(counted([1, 2], 'windows')) == [1, 2]
    assert sys.stderr.getvalue() == '\r\x1b[Kwindows: 0 of 2\r\x1b[Kwindows: 1 of 2\r\x1b[K'
    sys.stderr = Terminal()
    progress('x' * 50)
    assert sys.stderr.getvalue() == '\r\x1b[K' + 'x' * 29
    with pytest.raises(SystemExit):
        for item in counted([1, 2], 'windows'):
            fail('no such window')
    assert re.search(r'windows: 0 of 2\r\x1b\[K[^\r]*: no such window\n\r\x1b\[K$', sys.stderr.getvalue())
    monkeypatch.setattr(sys, 'stderr', None)                # closed, as 2>&- has it
    progress('x')


def test_a_preset_from_windows_is_read(tmp_path, capsys):
    """A byte order mark was "not TOML"."""
    (tmp_path / 'preset.toml').write_bytes('n_layer = 3\r\nlr = 1\r\n'.encode('utf-8-sig'))
    config, given = parse(str(tmp_path / 'preset.toml'))
    assert (config.n_layer, config.lr) == (3, 1) and given == {'n_layer', 'lr'}
