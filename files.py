"""
Files as people have them: text read with care, and writes that are whole or not at all.

    text = read_text('notes.txt')           # UTF-8 or UTF-16, from Windows or not; refuses binary data
    for line in read_lines(sys.stdin.buffer): ...                   # the same for a stream, as it arrives
    write_atomically('out/log.csv', lambda file: file.write(data))

Not here: guessing other encodings.
"""

import codecs
import errno
import io
import json
import os
import stat
import struct

LONGEST_JSON = 64 * 2 ** 20     # bytes: a tokenizer.json has some 10 MB
# exceptions of code that reads a file with other content than it should have
DAMAGED = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, struct.error)


def one_line(error):
    """An exception's type and message, as a short line to quote."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


def encoding_of(start):
    """The encoding of a text whose first bytes are `start`: what its byte order mark says, else UTF-8."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 'utf-16'
    return 'utf-8-sig' if start.startswith(codecs.BOM_UTF8) else 'utf-8'


def check_text(text, name):
    """text, with \\n at the end of each line. Raises ValueError if it holds a NUL, so is not text."""
    if '\0' in text:
        raise ValueError(f'{name}: holds a NUL byte, so it is not text; save it as UTF-8')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def open_regular(path):
    """Opens a file for reading bytes. Raises OSError, also for pipes and devices, which may never end."""
    # without O_NONBLOCK, opening a pipe waits until somebody writes to it
    flag = getattr(os, 'O_NONBLOCK', 0)
    file = open(path, 'rb', opener=lambda path, flags: os.open(path, flags | flag))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, 'not a regular file', str(path))
    return file


def first_bytes(path, count):
    """The beginning of a file, which tells its format."""
    with open_regular(path) as file:
        return file.read(count)


def read_text(path, most=None):
    """
    The text of a file; most: bytes it may have. Raises OSError, and ValueError, in one line that names the
    file, if it is too large or not text.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f'{path}: {size:,} bytes, more than the {most:,} that are read')
        data = file.read()
    return decode_text(data, path)


def decode_text(data, name):
    """The text in the bytes of a file called name. Raises ValueError if it is not text."""
    try:
        return check_text(data.decode(encoding_of(data[:3])), name)
    except UnicodeDecodeError as error:
        raise ValueError(f'{name}: not UTF-8 (byte {error.start:,}); save it as UTF-8') from None


def read_json(path):
    """What the JSON in a file says. Raises OSError, ValueError, or RecursionError if it is too deep."""
    return json.loads(read_text(path, LONGEST_JSON))


def read_lines(stream, name='stdin'):
    """
    Yields the lines of a binary stream as they arrive, without their ends. A byte that is not UTF-8 becomes
    U+FFFD. Raises ValueError if it is not text.
    """
    text = io.TextIOWrapper(stream, encoding=encoding_of(stream.peek(3)), errors='replace')
    for line in text:
        yield check_text(line, name).rstrip('\n')


def is_dead(pid):
    """Whether no such process runs. Without /proc nobody can tell, and every process is taken to be alive."""
    return os.path.exists('/proc/self') and not os.path.exists(f'/proc/{pid}')


def write_atomically(path, write):
    """
    Calls write(file) on a temporary file beside path, then gives it that name: a crash at any moment leaves
    the old file or the new one, whole. Removes the temporary files of killed processes. Raises OSError.
    """
    folder, name = os.path.split(os.path.abspath(path))
    for other in os.listdir(folder):
        owner = other.removeprefix(f'{name}.').removesuffix('.partial')
        if other == f'{name}.{owner}.partial' and owner.isdigit() and is_dead(owner):
            os.remove(os.path.join(folder, other))
    partial = f'{path}.{os.getpid()}.partial'
    try:
        with open(partial, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
