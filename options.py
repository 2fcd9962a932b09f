"""
Command lines: each program's options, and its --help, come from a dataclass. Also fail() and progress(), with
which every program writes to stderr.

    @dataclass
    class TrainConfig:
        about = 'Trains a model.'
        lr: float = option(1e-3, 'peak learning rate', at_least=0)

    config, given = parse_options(TrainConfig, 'python train.py', presets=True)

This takes --lr 1e-3 and --lr=1e-3, and --resume or --no-resume. If an option is given twice, the last one
counts. A preset is a TOML file with values by the same names, which flags override. `given` is the set of
names that came from a flag or the preset, even with the default value. Other words go to the field of type
tuple, if there is one.

Whatever a user gets wrong ends in one line and exit code 2.

Not here: sub-commands, short flags, environment variables, code in presets.
"""

import argparse
import os
import shutil
import sys
import tomllib
from contextlib import suppress
from dataclasses import field, fields

from files import read_text

# How chat.py samples replies, and evaluate.py the answers on which it compares models (see sampling.py): a
# low temperature and nucleus sampling, as SmolLM2's makers advise, and a penalty that keeps small models out
# of loops.
SAMPLING = {'temperature': 0.2, 'top_k': 0, 'top_p': 0.9, 'min_p': 0.0, 'repeat_penalty': 1.15}

LARGEST = 2 ** 63 - 1       # of torch's whole numbers
# names of types, in errors
NAMES = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a string, in quotes'}


def option(default, help, at_least=-LARGEST, at_most=LARGEST):
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
    """Whether an exception means that memory ran out; torch and the system say so in words only."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ('out of memory', "can't allocate", 'cannot allocate'))


def read_value(option, value):
    """
    value: of an option, a dataclass field, or its text -> the value, checked. Raises ValueError: 'NAME must
    be ..., not ...'.
    """
    kind, least, most = option.type, option.metadata['at_least'], option.metadata['at_most']
    if kind in (int, float):
        with suppress(ValueError):
            value = kind(str(value))
    if type(value) is not kind:
        raise ValueError(f'{option.name} must be {NAMES[kind]}, not {value!r:.80}')
    if kind in (int, float):
        if not value >= least:      # nan is not
            raise ValueError(f'{option.name} must be at least {least}, not {value}')
        if not value <= most:
            raise ValueError(f'{option.name} must be at most {most}, not {value}')
    return value


def check_options(cls, values):
    """
    {name: value} of all options -> an instance of the dataclass cls. Other names are those of options that an
    earlier version had, and are left out. Raises ValueError.
    """
    for option in fields(cls):
        if option.name not in values:
            raise ValueError(f'{option.name} is missing')
    return cls(**{option.name: read_value(option, values[option.name]) for option in fields(cls)})


def read_preset(path):
    """A TOML file -> {name: value}. Ends the program if it is none."""
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        fail(f'preset {path}: {error.strerror}')
    except (ValueError, RecursionError) as error:
        fail(f'preset {path}: not TOML: {error}')


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line."""

    def error(self, message):
        fail(f'{message}; see --help')


def parse_options(cls, program, presets=False, argv=None):
    """
    argv, a list of strings, by default the command line's -> an instance of the dataclass cls, and the set of
    names that were given. program: the command, for --help.
    """
    words = ['[PRESET.toml]'] * presets + [f'{f.name.upper()} ...' for f in fields(cls) if f.type is tuple]
    parser = Parser(usage=' '.join([program, *words, '[--option value ...]']), description=cls.about,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if presets:
        parser.add_argument('preset', nargs='?', help='a TOML file with options by name; flags override it')
    for f in fields(cls):
        default = 'none' if f.default in ('', None) else f.default
        text = f'{f.metadata["help"]} (default: {default})'.replace('%', '%%')
        if f.type is tuple:
            parser.add_argument(f.name, nargs='*', help=f.metadata['help'])
        elif f.type is bool:
            parser.add_argument(f'--{f.name}', action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(f'--{f.name}', metavar=f.type.__name__.upper(), help=text)
    # intermixed: a preset may stand anywhere among the flags
    given, options = vars(parser.parse_intermixed_args(argv)), {f.name: f for f in fields(cls)}
    if 'preset' in given:
        given = read_preset(given.pop('preset')) | given
    try:
        for name, value in given.items():
            if name not in options:
                raise ValueError(f'{name}, in the preset, is no option; see --help')
            given[name] = tuple(value) if options[name].type is tuple else read_value(options[name], value)
        return cls(**given), set(given)
    except ValueError as error:
        fail(f'--{error}')
