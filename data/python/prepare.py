"""
Python code: the standard library of the Python that runs this script -> train.bin, val.bin, meta.json.

    python data/python/prepare.py

About 10 MB of code and docstrings, no network, a few seconds, the same bytes each time on the same Python. The split
is by file, on a hash of its path: no file is in both, and one that keeps its name keeps its side in every Python, so
that what the tokenizer beside this script was trained on (train files of one version) is not validated on in another.

Left out of the corpus:
  - tests (more than all the rest, and repetitive), installed packages, this machine's build settings and site hooks;
  - tables and generated text: encodings/ (character maps and one boilerplate page per codec), html/entities.py,
    pydoc_data/topics.py (the manual as 750 kB of string literals, 15,000 quoted lines);
  - files that do not decode, empty ones, and any file whose content came before.
"""

import hashlib
import os
import platform
import sys
import sysconfig
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))    # the repository, for the two imports below
from data.common import DataError, Options, run, write_dataset
from tokenizer import load_tokenizer, tokenizer_spec

SKIP_FOLDERS = {'test', 'tests', 'idle_test', 'encodings', 'site-packages', 'dist-packages', 'lib-dynload'}
SKIP_FILES = {'html/entities.py', 'pydoc_data/topics.py', 'sitecustomize.py', 'usercustomize.py'}
SKIP_PREFIXES = ('_sysconfigdata', '_sysconfig_vars', 'config-')
VAL_FRACTION = 0.08         # of the files: 5 to 8% of the bytes on Python 3.10 to 3.13
MIN_BYTES = 1_000_000       # a stripped-down Python keeps a few files only


def in_val(name):
    """name: path relative to the library, with '/' -> bool, the same on every machine"""
    return int(hashlib.sha256(name.encode('utf-8')).hexdigest()[:8], 16) < VAL_FRACTION * 2 ** 32


def find_sources(lib):
    """lib: Path of a standard library -> list of (name, text), sorted by name. Raises DataError."""
    paths = {}
    for folder, subfolders, files in os.walk(lib):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in SKIP_FOLDERS]
        for path in (Path(folder, file) for file in files if file.endswith('.py')):
            name = path.relative_to(lib).as_posix()
            if name not in SKIP_FILES and not name.startswith(SKIP_PREFIXES):
                paths[name] = path

    sources, seen = [], set()
    for name in sorted(paths):
        try:
            with tokenize.open(paths[name]) as f:   # heeds a file's own 'coding:' line
                text = f.read()
        except (SyntaxError, UnicodeDecodeError):   # unknown or wrong encoding
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            sources.append((name, text))

    if sum(len(text) for _, text in sources) < MIN_BYTES:
        raise DataError(f'no Python sources to speak of in {lib}: run this with a Python whose standard library is '
                        'there as .py files, or use text of your own: python data/text/prepare.py FILE...')
    return sources


def main():
    options = Options(__doc__)
    options.add_out(HERE)
    options = options.parse_args()

    spec = tokenizer_spec('python4k')
    sources = find_sources(Path(sysconfig.get_path('stdlib')))
    train = [text for name, text in sources if not in_val(name)]
    val = [text for name, text in sources if in_val(name)]
    write_dataset(options.out, load_tokenizer(spec), spec, train, val,
                  f'standard library of Python {platform.python_version()}')


if __name__ == '__main__':
    run(main)
