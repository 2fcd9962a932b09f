"""
Builds sparse_kernel.c for this machine, once, and loads it.

    python build_kernel.py          # builds, and says where
    kernel = build_kernel.load()    # kernel.lib.decode(...), kernel.ffi.new(...); builds first if needed

The module lies in .kernel/ beside the source or, if nothing can be built there, in the user's cache folder.
Its name is made of everything it depends on: source, flags, compiler, Python and CPU; and of its size.
Whatever changes, load() builds again: two machines that share a directory do not get each other's code, and
half a file is not taken for a whole one. A module that is loaded runs, so it must belong to this user, and
nobody else may be able to write to it.

Not here: Windows compilers (PyTorch decodes there), cross-compiling, clearing of old builds: delete .kernel/
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C before there is anything to lose just ends

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

SOURCE = Path(__file__).with_name('sparse_kernel.c')
CACHE = SOURCE.with_name('.kernel')
NAME = '_sparse_kernel'
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
LINK = ['-shared', '-fPIC', '-fvisibility=hidden', '-pthread', '-lm']
LINK += ['-undefined', 'dynamic_lookup'] if sys.platform == 'darwin' else []
# the first set of flags that the compiler takes. Off x86, -march=native alone does not tune for this CPU, and
# some compilers know one of the two, or neither
NATIVE = ['-march=native', '-mcpu=native']
if platform.machine().lower() not in ('x86_64', 'amd64', 'i686'):
    NATIVE.reverse()
FLAGS = [['-std=c11', '-O3', *native, '-ffp-contract=fast', '-fopenmp-simd']
         for native in ([NATIVE[0]], [NATIVE[1]], [])] + [['-O2']]


class KernelUnavailable(Exception):
    """The kernel cannot be had here; says why, and what to do, in one line."""


def compiler():
    """The C compiler's command as a list: $CC, else the first of cc, gcc, clang that there is."""
    if sys.platform == 'win32':
        raise KernelUnavailable('the kernel is not for Windows: PyTorch decodes there; faster: use WSL')
    for command in (os.environ.get('CC', ''), 'cc', 'gcc', 'clang'):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise KernelUnavailable(f'CC={command}: {str(error).lower()}; correct it, or unset CC') from None
        if words and shutil.which(words[0]):
            return words
    raise KernelUnavailable('no C compiler found: install gcc or clang, or name yours in CC')


def run(command, **more):
    """subprocess.run with the output as text, and that in English: first_error() looks for words in it."""
    return subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace',
                          env={**os.environ, 'LC_ALL': 'C'}, **more)


def cpu():
    """What distinguishes this CPU from one that could not run code made for it."""
    try:
        if sys.platform == 'darwin':        # where platform.processor() is 'arm' for every chip
            return run(['sysctl', '-n', 'machdep.cpu.brand_string']).stdout
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as f:
            kinds = ('model name', 'flags', 'Features', 'CPU part')
            return '\n'.join(sorted({line for line in f if line.startswith(kinds)}))
    except OSError:
        return platform.processor()


def interface(source):
    """The declarations that Python may use: the interface section of the source, without comments."""
    section = source.split('// the structs.', 1)[1].split('// end of interface', 1)[0].split('\n', 1)[1]
    return '\n'.join(line.split('//')[0].rstrip() for line in section.splitlines())


def first_error(output):
    lines = output.splitlines()
    errors = [line for line in lines if 'error' in line or 'not found' in line]
    return (errors or lines or ['no message'])[0].strip()


def folders():
    """Where a module may lie: beside the source, else in the user's cache folder."""
    cache = os.environ.get('XDG_CACHE_HOME', '')
    cache = cache if os.path.isabs(cache) else os.path.expanduser('~/.cache')
    return [CACHE, Path(cache, 'cwic')]


def check_folder(folder):
    """Makes the folder, or makes it private. Raises OSError if no module may be loaded from it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(errno.EACCES, 'belongs to another user', str(folder))
    if os.statvfs(folder).f_flag & getattr(os, 'ST_NOEXEC', 0):
        raise PermissionError(errno.EACCES, 'on a disk mounted noexec', str(folder))
    if status.st_mode & OTHERS_WRITE:
        folder.chmod(0o700)


def is_sound(path):
    """Whether a module is whole, belongs to this user, and nobody else could write to it."""
    status = path.stat()
    return (path.stem.endswith(f'-{status.st_size}') and status.st_uid == os.getuid()
            and not status.st_mode & OTHERS_WRITE)


def compile_in(folder, name, source, cc, extra):
    """Compiles source, a text, to a module of this name in folder. Raises KernelUnavailable and OSError."""
    # two processes may build at once: each does in a directory of its own, and the module appears whole
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
                    os.fsync(file.fileno())         # or a power cut may leave a name without all of it
                os.replace(built, path)
                return path
    hint = '; install the headers of Python (python3-dev)' if 'Python.h' in done.stderr else ''
    raise KernelUnavailable(f'{cc[0]} failed: {first_error(done.stderr)}{hint}')


def build(extra=()):
    """
    Compiles the kernel unless that has been done, and returns the module's path. extra: more compiler flags.
    Raises KernelUnavailable, in one line.
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
    refused = []                            # why each folder cannot be used
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
