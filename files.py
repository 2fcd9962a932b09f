"""
Files as people have them: text read with care, and writes that are whole or not at all.

    text = read_text('notes.txt')           # UTF-8, from Windows or not
    write_atomically('out/log.csv', lambda file: file.write(data))

Not here: other encodings than UTF-8.
"""

import json
import os
import struct
from pathlib import Path

# exceptions of code that reads a file with other content than it should have
DAMAGED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, struct.error)


def one_line(error):
    """An exception's type and message, as a short line to quote."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


def read_text(path):
    """
    The text of a file, with \\n at the end of each line. Raises OSError, and ValueError, in one line that
    names the file, if it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding='utf-8-sig')       # -sig: without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 (byte {error.start:,}); save it as UTF-8') from None


def read_json(path):
    """
    What the JSON in a file says. Raises OSError, ValueError, in one line that names the file, or
    RecursionError if it is too deep.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}: {error}') from None


def write_atomically(path, write):
    """
    Calls write(file) on a temporary file beside path, then gives it that name: a crash at any moment leaves
    the old file or the new one, whole. Raises OSError.
    """
    partial = f'{path}.{os.getpid()}.partial'       # two processes may write the same file
    try:
        with open(partial, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
