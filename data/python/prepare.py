"""
Python code: the standard library of the Python that runs this script -> train.bin, val.bin, meta.json.

    python data/python/prepare.py
    python data/python/prepare.py --packages        # and every installed package: data/packages, for a GPU

About 10 MB of code and docstrings, no network, a few seconds, the same bytes each time on the same Python.
With --packages ten times as much, if torch, sympy, numpy and the like are installed (100 MB, 33 million
tokens in 6 seconds); the text depends on what is installed, and its licences are the packages' own.

The split is by file, by a hash of its path: no file is in both splits, and one that keeps its name stays in
its split in every version of Python. So the tokenizer beside this script, trained on the train files of one
version, has not seen another version's validation text.

Not in the corpus:
  - tests (more than all the rest, and repetitive), copies of packages inside others (_vendor), this machine's
    build settings and site hooks;
  - tables and generated text: encodings/ (character maps and a boilerplate page per codec), html/entities.py,
    pydoc_data/topics.py (the manual as 750 kB of string literals), and a package's largest files;
  - files that cannot be read or do not decode, empty ones, and any file whose content came before.
"""

import os
import platform
import sys
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the imports below
from data.common import DataError, encoded, find_tokenizer, in_val, run, write_dataset
from options import option, parse_options

SITE = ('site-packages', 'dist-packages')       # names of folders with installed packages
SKIP_FOLDERS = {'test', 'tests', 'idle_test', 'encodings', '_vendor', 'lib-dynload', *SITE}
SKIP_FILES = {'html/entities.py', 'pydoc_data/topics.py', 'sitecustomize.py', 'usercustomize.py'}
SKIP_PREFIXES = ('_sysconfigdata', '_sysconfig_vars', 'config-')
VAL_FRACTION = 0.08         # of the files: 5 to 8% of the bytes on Python 3.10 to 3.13
MIN_BYTES = 1_000_000       # a stripped-down Python keeps a few files only
MAX_BYTES = 400_000         # of a package's file


@dataclass
class PythonConfig:
    about = 'Python code: the standard library of the Python that runs this, and its packages if asked for.'
    packages: bool = option(False, 'also every installed package; their licences are their own')
    out: str = option('', 'folder for train.bin, val.bin and meta.json; '
                          'none: data/python, or data/packages with --packages')


def find_sources(library, packages=()):
    """
    library: Path of a standard library; packages: Paths of folders with installed packages -> list of (name,
    text), by name within each folder. Raises DataError.
    """
    sources, seen = [], set()
    for root in (library, *packages):
        print(f'reading the .py files in {root}', flush=True)
        paths = []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in SKIP_FOLDERS]
            paths += [Path(folder, file) for file in files if file.endswith('.py')]
        for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
            if name in SKIP_FILES or name.startswith(SKIP_PREFIXES):
                continue
            try:
                with tokenize.open(path) as f:      # follows a file's own 'coding:' line
                    text = f.read()
            except (OSError, SyntaxError, UnicodeError, LookupError):
                continue
            if text.strip() and text not in seen and (root == library or path.stat().st_size <= MAX_BYTES):
                seen.add(text)
                sources.append((name, text))
    if sum(len(text) for _, text in sources) < MIN_BYTES:
        raise DataError(f'no Python sources to speak of in {library}: run this with a Python whose standard '
                        'library is there as .py files, or use text of your own: '
                        'python data/text/prepare.py FILE...')
    return sources


def main():
    config, _ = parse_options(PythonConfig, 'python data/python/prepare.py')
    spec, encoding = find_tokenizer('python4k')
    folders = [Path(folder) for folder in sys.path if Path(folder).name in SITE] if config.packages else []
    sources = find_sources(Path(sysconfig.get_path('stdlib')), folders)
    texts = {'train': [], 'val': []}
    for name, text in sources:
        texts['val' if in_val(name, VAL_FRACTION) else 'train'].append(text)
    source = f'standard library of Python {platform.python_version()}' + ' and packages' * config.packages
    out = config.out or (HERE.parent / 'packages' if config.packages else HERE)
    pieces = [encoded(split, encoding, spec, texts[split]) for split in texts]
    write_dataset(out, encoding, spec, pieces, source)


if __name__ == '__main__':
    run(main)
