"""
Builds sparse_kernel.c for this machine, once, and loads it.

    python build_kernel.py          # builds it if needed, and prints where it is
    kernel = build_kernel.load()    # kernel.lib.decode(...), kernel.ffi.new(...); builds it if needed

The module lies in .kernel/ beside the source or, if nothing can be built there, in the user's cache folder.
Its name is a hash of everything it depends on (source, flags, compiler, Python, CPU), and its size. So if any
of them changes, load() builds again; machines that share a folder do not get each other's code; and half a
file is never taken for a whole one. Loading a module runs it, so it must belong to this user, and nobody else
may be able to write to it.

Not here: Windows compilers (PyTorch decodes there); cross-compiling; removal of old builds: delete .kernel/.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # so far, Ctrl-C has nothing to lose: it just ends us

import errno
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import cffi
import cffi.recompiler

from files import read_text
from options import progress

SOURCE = Path(__file__).resolve().with_name('sparse_kernel.c')
CACHE = SOURCE.with_name('.kernel')
NAME = '_sparse_kernel'
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LINK = ['-shared', '-fPIC', '-fvisibility=hidden', '-pthread', '-lm']
LINK += ['-undefined', 'dynamic_lookup'] if sys.platform == 'darwin' else []
# the first set of flags that the compiler accepts is used. Off x86, -march=native does not tune for this CPU,
# and some compilers know only one of the two, or neither
NATIVE = ['-march=native', '-mcpu=native']
if platform.machine().lower() not in ('x86_64', 'amd64', 'i686'):
    NATIVE.reverse()
FLAGS = [['-std=c11', '-O3', *native, '-ffp-contract=fast', '-fopenmp-simd']
         for native in ([NATIVE[0]], [NATIVE[1]], [])] + [['-O2']]


class KernelUnavailable(Exception):
    """The kernel cannot be built or loaded here; the message says why, and what to do, in one line."""


def compiler():
    """The C compiler's command as a list: $CC, else the first of cc, gcc and clang that is installed."""
    if sys.platform == 'win32':
        raise KernelUnavailable('the kernel is not for Windows: PyTorch decodes there; WSL is faster')
    for command in (os.environ.get('CC', ''), 'cc', 'gcc', 'clang'):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise KernelUnavailable(f'CC={command}: {str(error).lower()}; correct it, or unset CC') from None
        if words and shutil.which(words[0]):
            return words
    raise KernelUnavailable('no C compiler found: install gcc or clang, or name yours in CC')


def run(command, **more):
    """subprocess.run, with the output as text, in English: failure() looks for English words in it."""
    return subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace',
                          env={**os.environ, 'LC_ALL': 'C'}, **more)


def cpu():
    """A text that differs between CPUs which cannot run each other's code."""
    try:
        if sys.platform == 'darwin':        # platform.processor() is 'arm' for every chip
            return run(['sysctl', '-n', 'machdep.cpu.brand_string']).stdout
        kinds = 'model name', 'flags', 'Features', 'CPU part'
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            return '\n'.join(sorted({line for line in file if line.startswith(kinds)}))
    except OSError:
        return platform.processor()


def interface(source):
    """The declarations that Python may use: the interface section of the source, without comments."""
    section = source.split('// the structs.', 1)[1].split('// end of interface', 1)[0].split('\n', 1)[1]
    return '\n'.join(line.split('//')[0].rstrip() for line in section.splitlines())


def failure(cc, output):
    """A KernelUnavailable with the first error in a compiler's output, and perhaps a remedy."""
    lines = output.splitlines()
    errors = [line for line in lines if 'error' in line or 'not found' in line]
    first = (errors or lines or ['no message'])[0].strip()
    remedy = '; install the headers of Python (python3-dev)' if 'Python.h' in output else ''
    return KernelUnavailable(f'{cc[0]} failed: {first}{remedy}')


def folders():
    """Where a module may lie: beside the source, else in the user's cache folder."""
    cache = os.environ.get('XDG_CACHE_HOME', '')
    return [CACHE, Path(cache if os.path.isabs(cache) else os.path.expanduser('~/.cache'), 'cwic')]


def check_folder(folder):
    """Makes the folder if needed, and makes it private. Raises OSError if it cannot hold a module safely."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(errno.EACCES, 'belongs to another user', str(folder))
    if os.statvfs(folder).f_flag & getattr(os, 'ST_NOEXEC', 0):
        raise PermissionError(errno.EACCES, 'on a disk mounted noexec', str(folder))
    if status.st_mode & OTHERS_WRITE:
        folder.chmod(0o700)


def is_sound(path):
    """Whether a module is whole and belongs to this user, and nobody else could write to it."""
    status = path.stat()
    return (path.stem.endswith(f'-{status.st_size}') and status.st_uid == os.getuid()
            and not status.st_mode & OTHERS_WRITE)


def compile_in(folder, name, source, cc, extra):
    """Compiles source, a text, to a module in folder: its path. Raises KernelUnavailable and OSError."""
    # two processes may build at once: each works in a directory of its own, and the module appears whole
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        ffi = cffi.FFI()
        ffi.cdef(interface(source))
        cffi.recompiler.make_c_source(ffi, NAME, source, os.path.join(directory, 'kernel.c'))
        include = [f'-I{p}' for p in {sysconfig.get_path('include'), sysconfig.get_path('platinclude')}]
        built = Path(directory) / 'kernel.so'
        for flags in FLAGS:
            done = run([*cc, *flags, *extra, *include, 'kernel.c', '-o', built, *LINK], cwd=directory)
            if done.returncode == 0 and built.exists():
                built.chmod(0o700)
                path = folder / f'{name}-{built.stat().st_size}.so'
                with open(built, 'rb') as file:
                    os.fsync(file.fileno())         # or a power cut could leave half of it under this name
                os.replace(built, path)
                return path
    raise failure(cc, done.stderr)


def build(extra=()):
    """
    The path of the kernel's module, which is compiled if that has not been done yet. extra: more compiler
    flags. Raises KernelUnavailable.
    """
    cc = compiler()
    try:
        source = read_text(SOURCE)
        version = run([*cc, '--version']).stdout
    except OSError as error:
        raise KernelUnavailable(f'{error.filename}: {error.strerror}') from None
    depends = [source, repr((cc, FLAGS, LINK, extra)), version, sys.version, sysconfig.get_platform(),
               cffi.__version__, cpu()]
    key = hashlib.sha256('\0'.join(depends).encode()).hexdigest()[:16]
    name = f'{NAME}-{key}'
    refused = []                            # the folders that cannot be used, and why
    for folder in folders():
        try:
            check_folder(folder)
            for path in folder.glob(f'{name}-*.so'):
                if is_sound(path):
                    return path
            progress('building the kernel, once')
            return compile_in(folder, name, source, cc, extra)
        except OSError as error:
            refused.append(f'{folder} ({error.strerror})')
        finally:
            progress()
    raise KernelUnavailable(f'cannot build in {" or ".join(refused)}; name another folder in XDG_CACHE_HOME')


def load(extra=()):
    """The kernel as a module with .lib and .ffi, built first if needed. Raises KernelUnavailable."""
    path = build(extra)
    try:
        spec = importlib.util.spec_from_file_location(NAME, path)
        kernel = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernel)
    except ImportError as error:
        raise KernelUnavailable(f'{path} cannot be loaded: {error}; delete it and try again') from None
    return kernel


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print(build())
    except KeyboardInterrupt:
        sys.exit(130)
    except KernelUnavailable as error:
        sys.exit(f'build_kernel.py: {error}')
