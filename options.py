"""
Command lines made from dataclasses: one for each program, which is also where its --help comes from.

    @dataclass
    class TrainConfig:
        about = 'Trains a model.'
        lr: float = option(1e-3, 'peak learning rate', at_least=0)

    config, given = parse_options(TrainConfig, 'python train.py', presets=True)

takes --lr 1e-3 and --lr=1e-3, and - for _ in names; an on/off option may stand alone. Where an option is
given twice, the last one counts. A preset, a TOML file of the same names, may stand anywhere among the flags,
which override it. `given` is the set of names that the flags or the preset gave, even with the default value.

Words that belong to no option are the preset, or else go to the field of type tuple, if there is one.
Whatever a user gets wrong ends in one line and exit code 2.

Also what every program says on stderr: fail(), and progress() while it works.

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

# How chat.py draws its replies, and evaluate.py the answers on which it compares models (see cwic.sample): a
# low temperature and nucleus sampling, as SmolLM2's makers advise; and a penalty, without which small models
# fall into loops.
SAMPLING = {'temperature': 0.2, 'top_k': 0, 'top_p': 0.9, 'min_p': 0.0, 'repeat_penalty': 1.15}

BOOLEANS = {'yes': True, 'true': True, 'on': True, '1': True,
            'no': False, 'false': False, 'off': False, '0': False}
# of each type of option: how a user calls it; and the types that a preset may give it as
KINDS = {bool: ('yes or no', (bool,)), int: ('a whole number', (int,)),
         float: ('a finite number', (float, int)), str: ('a string, in quotes', (str,))}


def option(default, help, at_least=None, at_most=None):
    """A dataclass field with a default, a line of help, and perhaps bounds on what may be given."""
    return field(default=default, metadata={'help': help, 'at_least': at_least, 'at_most': at_most})


def printable(text):
    """text as one line that cannot steer a terminal: what does not print is shown as its escape sequence."""
    line = ' '.join(line.strip() for line in str(text).splitlines())
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in line)


def progress(text=''):
    """
    On a terminal, shows text as a line of stderr that the next call overwrites; without text, clears it. For
    all work that may take longer than five seconds.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns        # a longer line could not be overwritten
        print(f'\r\033[K{text[:columns - 1]}', end='', file=sys.stderr, flush=True)


def counted(items, what):
    """Yields the items of a list, and shows how many are done: counted(windows, 'windows')."""
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
    words = str(error).lower()
    said = any(said in words for said in ("can't allocate memory", 'cannot allocate memory', 'out of memory'))
    return (isinstance(error, MemoryError) or getattr(error, 'errno', None) == errno.ENOMEM
            or isinstance(error, RuntimeError) and said)


def read_value(option, text):
    """What text gives to an option, a dataclass field. Raises ValueError: 'must be ..., not ...'."""
    kind, least, most = option.type, option.metadata['at_least'], option.metadata['at_most']
    needed = KINDS[kind][0]
    try:
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
        # no option makes sense as nan, as infinity, or beyond 64 bits
        right = abs(value) < 2 ** 63 if kind is int else math.isfinite(value) if kind is float else True
    except (ValueError, KeyError):
        right = False
    if right and least is not None and value < least:
        right, needed = False, f'at least {least}'
    if right and most is not None and value > most:
        right, needed = False, f'at most {most}'
    if not right:
        raise ValueError(f'must be {needed}, not {text}')
    return value


def check_value(option, value):
    """What a typed value, from a preset or a checkpoint, gives to an option. Raises ValueError likewise."""
    needed, types = KINDS[option.type]
    if type(value) not in types:
        raise ValueError(f'must be {needed}, not {value!r:.80}')
    return read_value(option, str(value))


def check_options(cls, values):
    """An instance of the dataclass cls, from {name: value} of all its options. Raises ValueError."""
    options, checked = {f.name: f for f in fields(cls)}, {}
    for name in sorted(options.keys() ^ values.keys()):
        raise ValueError(f'{name:.80} is ' + ('missing' if name in options else 'no option'))
    for name, value in values.items():
        try:
            checked[name] = check_value(options[name], value)
        except ValueError as error:
            raise ValueError(f'{name} {error}') from None
    return cls(**checked)


def unknown(name, names):
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f'unknown option {name}' + (f'; did you mean {near[0]}?' if near else '; see --help')


def read_preset(path, options):
    """The values in a TOML file, by name. options: dict of name to dataclass field."""
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
    """What --help prints. words: how the words that belong to no option are called."""
    about = textwrap.wrap(cls.about, 110)       # data, as python -OO drops docstrings
    lines = [' '.join(['usage:', program, *words, '[--option value ...]']), '', *about, '']
    for f in fields(cls):
        default = '' if f.type is tuple else f' (default: {"none" if f.default in ("", None) else f.default})'
        name = f'  {f.name.upper()} ...' if f.type is tuple else f'  --{f.name} {f.type.__name__.upper()}'
        text = textwrap.wrap(f.metadata['help'] + default, 80)
        lines += [f'{name:28}  {text[0]}', *(' ' * 30 + line for line in text[1:])]
    return '\n'.join(lines)


def parse_options(cls, program, presets=False, argv=None):
    """
    (an instance of the dataclass cls, the set of names that were given) from argv, a list of strings, or from
    the command line. program: how it is called, for --help.
    """
    options = {f.name: f for f in fields(cls) if f.type is not tuple}
    listed = next((f.name for f in fields(cls) if f.type is tuple), '')
    argv, flags, words = list(sys.argv[1:] if argv is None else argv), {}, []
    while argv:
        word = argv.pop(0)
        if word in ('-h', '--help'):
            called = ['[PRESET.toml]'] if presets else [f'{listed.upper()} ...'] if listed else []
            print(help_text(cls, program, called))
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
