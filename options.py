"""
Options for our programs: one dataclass each, from which the command line and --help are made.

    @dataclass
    class TrainConfig:
        lr: float = option(1e-3, 'peak learning rate')

    config = parse_options(TrainConfig, 'python train.py', presets=True)

takes --lr 1e-3 and --lr=1e-3, and - for _ in names; on/off options also take a bare --name. A preset, a TOML file of the
same names, may stand before the flags, which override it. Whatever a user gets wrong ends in one line and exit code 2.

But: no sub-commands, no short flags, no environment variables, no code in presets.
"""

import argparse
import difflib
import os
import re
import sys
import tomllib
from dataclasses import field, fields


def option(default, help):
    """A dataclass field with a default and a line of help."""
    return field(default=default, metadata={'help': help})


def fail(message, code=2):
    """Ends the program with one line on stderr."""
    print(f'{os.path.basename(sys.argv[0])}: {message}', file=sys.stderr)
    sys.exit(code)


def boolean(text):
    if text.lower() in ('true', 'yes', 'on', '1'):
        return True
    if text.lower() in ('false', 'no', 'off', '0'):
        return False
    raise ValueError(text)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(message.replace('argument ', '', 1))


def read_preset(path, names):
    try:
        with open(path, 'rb') as f:
            preset = tomllib.load(f)
    except OSError as error:
        fail(f'preset {path}: {error.strerror}')
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f'preset {path}: not TOML: {error}')
    for name in preset:
        if name not in names:
            fail(f'preset {path}: ' + unknown(name, names))
    return [f'--{name}={value}' for name, value in preset.items()]


def unknown(name, names):
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f'unknown option {name}' + (f'; did you mean {near[0]}?' if near else '; see --help')


def given_options():
    """The names of the options on the command line: those that were asked for, even where the value is the default."""
    return {word[2:].split('=')[0].replace('-', '_') for word in sys.argv[1:] if word.startswith('--')}


def parse_options(cls, program, presets=False, argv=None):
    """An instance of the dataclass cls from the command line (argv: a list of strings, else the program's own)."""
    argv = [re.sub(r'^--[\w-]+', lambda name: '--' + name[0][2:].replace('-', '_'), word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = OneLineParser(prog=program, allow_abbrev=False, description=cls.__doc__,
                           formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120))
    if presets:
        parser.add_argument('preset', nargs='?', help='a TOML file of options, such as those in config/')
    for f in fields(cls):
        kind = boolean if f.type is bool else f.type
        bare = dict(nargs='?', const=True) if f.type is bool else {}
        parser.add_argument(f'--{f.name}', type=kind, default=f.default, metavar=f.type.__name__.upper(),
                            help=f'{f.metadata["help"]} (default: {"none" if f.default in ("", None) else f.default})'.replace('%', '%%'), **bare)
    names = [f.name for f in fields(cls)]
    if presets and argv and not argv[0].startswith('-'):
        argv = read_preset(argv[0], names) + argv[1:]
    known, rest = parser.parse_known_args(argv)
    for word in rest:
        fail(unknown(word.lstrip('-').split('=')[0], names) if word.startswith('-') else f'unexpected argument {word}; see --help')
    return cls(**{name: getattr(known, name) for name in names})
