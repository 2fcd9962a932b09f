"""
Command lines: each program's options, and its --help, come from a dataclass. Also fail() and progress(), with
which every program writes to stderr.

    @dataclass
    class TrainConfig:
        about = 'Trains a model.'
        lr: float = option(1e-3, 'peak learning rate', at_least=0)

    config, given = parse_options(TrainConfig, 'python train.py', presets=True)

This takes --lr 1e-3 and --lr=1e-3, and - for _ in names; yes may be left out: --resume. If an option is given
twice, the last one counts. A preset, a TOML file with values by the same names, may stand anywhere among the
flags, which override it. `given` is the set of names that came from a flag or the preset, even with the
default value. Other words go to the field of type tuple, if there is one.

Whatever a user gets wrong ends in one line and exit code 2.

Not here: sub-commands, short flags, environment variables, code in presets.
"""

import difflib
import errno
import math
import os
import shutil
import sys
import textwrap
import tomllib
from dataclasses import field, fields

from files import LONGEST_JSON, read_text

# How chat.py samples replies, and evaluate.py the answers on which it compares models (see sampling.py): a
# low temperature and nucleus sampling, as SmolLM2's makers advise, and a penalty that keeps small models out
# of loops.
SAMPLING = {'temperature': 0.2, 'top_k': 0, 'top_p': 0.9, 'min_p': 0.0, 'repeat_penalty': 1.15}

BOOLEANS = {'yes': True, 'true': True, 'on': True, '1': True,
            'no': False, 'false': False, 'off': False, '0': False}
# for each type of option: its name in errors, and the types that a preset may give
KINDS = {bool: ('yes or no', (bool,)), int: ('a whole number', (int,)),
         float: ('a finite number', (float, int)), str: ('a string, in quotes', (str,))}


def option(default, help, at_least=None, at_most=None):
    """A dataclass field with a default, a line of help, and perhaps bounds."""
    return field(default=default, metadata={'help': help, 'at_least': at_least, 'at_most': at_most})


def printable(text):
    """text as one line that cannot steer a terminal: characters that do not print become escape sequences."""
    line = ' '.join(line.strip() for line in str(text).splitlines())
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in line)


def progress(text=''):
    """
    On a terminal, shows text as a line of stderr that the next call overwrites, or clears if it has no text.
    For all work that may take longer than five seconds.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns        # a longer line could not be overwritten
        print(f'\r\033[K{text[:columns - 1]}', end='', file=sys.stderr, flush=True)


def counted(items, what):
    """Yields the items of a list and shows how many are done: counted(windows, 'windows')."""
    try:
        for done, item in enumerate(items):
            progress(f'{what}: {done} of {len(items)}')
            yield item
    finally:
        progress()


def fail(message, code=2):
    """Ends the program with one line on stderr."""
    progress()
    print(printable(f'{os.path.basename(sys.argv[0])}: {message}'), file=sys.stderr)
    sys.exit(code)


def is_out_of_memory(error):
    """Whether an exception means that memory ran out; torch says so in words only."""
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        return "can't allocate memory" in text or 'cannot allocate memory' in text or 'out of memory' in text
    return isinstance(error, MemoryError) or getattr(error, 'errno', None) == errno.ENOMEM


def read_value(option, text):
    """text -> the value of an option, a dataclass field. Raises ValueError: 'must be ..., not ...'."""
    kind, least, most = option.type, option.metadata['at_least'], option.metadata['at_most']
    try:
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
        if kind is int and abs(value) >= 2 ** 63 or kind is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f'must be {KINDS[kind][0]}, not {text}') from None
    if least is not None and value < least:
        raise ValueError(f'must be at least {least}, not {text}')
    if most is not None and value > most:
        raise ValueError(f'must be at most {most}, not {text}')
    return value


def check_value(option, value):
    """The same for a value that has a type, from a preset or a checkpoint."""
    needed, types = KINDS[option.type]
    if type(value) not in types:
        raise ValueError(f'must be {needed}, not {value!r:.80}')
    return read_value(option, str(value))


def check_options(cls, values):
    """
    {name: value} of all options -> an instance of the dataclass cls. Other names are those of options that an
    earlier version had, and are left out. Raises ValueError.
    """
    checked = {}
    for option in fields(cls):
        if option.name not in values:
            raise ValueError(f'{option.name} is missing')
        try:
            checked[option.name] = check_value(option, values[option.name])
        except ValueError as error:
            raise ValueError(f'{option.name} {error}') from None
    return cls(**checked)


def unknown(name, names):
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f'unknown option {name}' + (f'; did you mean {near[0]}?' if near else '; see --help')


def read_preset(path, options):
    """A TOML file -> {name: value}. options: {name: dataclass field}."""
    try:
        preset = tomllib.loads(read_text(path, LONGEST_JSON))
    except OSError as error:
        fail(f'preset {path}: {error.strerror}')
    except (ValueError, RecursionError) as error:
        fail(f'preset {path}: not TOML: {error}')
    values = {}
    for name, value in preset.items():
        if name not in options:
            fail(f'preset {path}: {unknown(name, options)}')
        try:
            values[name] = check_value(options[name], value)
        except ValueError as error:
            fail(f'preset {path}: {name} {error}')
    return values


def help_text(cls, program, words):
    """The text of --help. words: names for the arguments that are no options."""
    about = textwrap.wrap(cls.about, 110)      # not the docstring, which python -OO drops
    lines = [' '.join(['usage:', program, *words, '[--option value ...]']), '', *about, '']
    for f in fields(cls):
        default = '' if f.type is tuple else f' (default: {"none" if f.default in ("", None) else f.default})'
        name = f'  {f.name.upper()} ...' if f.type is tuple else f'  --{f.name} {f.type.__name__.upper()}'
        text = textwrap.wrap(f.metadata['help'] + default, 80)
        lines += [f'{name:28}  {text[0]}', *(' ' * 30 + line for line in text[1:])]
    return '\n'.join(lines)


def parse_options(cls, program, presets=False, argv=None):
    """
    argv, a list of strings, by default the command line's -> an instance of the dataclass cls, and the set of
    names that were given. program: the command, for --help.
    """
    options = {f.name: f for f in fields(cls) if f.type is not tuple}
    listed = next((f.name for f in fields(cls) if f.type is tuple), '')
    argv, flags, words = list(sys.argv[1:] if argv is None else argv), {}, []
    while argv:
        word = argv.pop(0)
        if word in ('-h', '--help'):
            words = ['[PRESET.toml]'] * presets + [f'{listed.upper()} ...'] * bool(listed)
            print(help_text(cls, program, words))
            sys.exit(0)
        if not word.startswith('-'):
            words.append(word)
            continue
        name, equals, text = word.partition('=')
        name = name.strip('-').replace('-', '_')
        if name not in options or not word.startswith('--'):
            fail(unknown(name, options))
        if not equals and options[name].type is bool:
            text = argv.pop(0) if argv and argv[0].lower() in BOOLEANS else 'yes'
        elif not equals:
            if not argv or argv[0].startswith('--'):
                fail(f'--{name} needs a value; if that begins with --, write --{name}=VALUE')
            text = argv.pop(0)
        try:
            flags[name] = read_value(options[name], text)
        except ValueError as error:
            fail(f'--{name} {error}')
    values = {}
    if presets and words:
        values = read_preset(words.pop(0), options)
    elif listed and words:
        values, words = {listed: tuple(words)}, []
    if words:
        fail(f'unexpected argument {words[0]}' + ('; there can be one preset' if presets else '; see --help'))
    values.update(flags)
    return cls(**values), set(values)
