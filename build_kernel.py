"""
Builds sparse_kernel.c for this machine, once, and loads it.

    python build_kernel.py          # builds, and says where
    kernel = build_kernel.load()    # kernel.lib.decode(...), kernel.ffi.new(...); builds first where needed

The module lies in .kernel/ beside the source. Its name is made of everything it depends on: source, flags,
compiler, Python and CPU; and of its size. Whatever changes, load() builds again: two machines that share a
directory do not get each other's code, and half a file is not taken for a whole one.

Not here: Windows compilers (PyTorch decodes there), cross-compiling, clearing of old builds: delete .kernel/
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C before there is anything to lose just ends

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import cffi
import cffi.recompiler

SOURCE = Path(__file__).with_name('sparse_kernel.c')
CACHE = SOURCE.with_name('.kernel')
NAME = '_sparse_kernel'
LINK = ['-shared', '-fPIC', '-fvisibility=hidden', '-pthread', '-lm']
LINK += ['-undefined', 'dynamic_lookup'] if sys.platform == 'darwin' else []
# the first set of flags that the compiler takes: -march=native is -mcpu=native to some, and unknown to others
FLAGS = [['-std=c11', '-O3', *native, '-ffp-contract=fast', '-fopenmp-simd']
         for native in (['-march=native'], ['-mcpu=native'], [])] + [['-O2']]


class KernelUnavailable(Exception):
    """The kernel cannot be had here; says why, and what to do, in one line."""


def compiler():
    """The C compiler's command as a list: $CC, else the first of cc, gcc, clang that there is."""
    for command in (os.environ.get('CC', ''), 'cc', 'gcc', 'clang'):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise KernelUnavailable(f'CC={command}: {str(error).lower()}; correct it, or unset CC') from None
        if words and shutil.which(words[0]):
            return words
    raise KernelUnavailable('no C compiler found: install gcc or clang, or name yours in CC')


def cpu():
    """What distinguishes this CPU from one that could not run code made for it."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
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


def build(extra=()):
    """
    Compiles the kernel unless that has been done, and returns the module's path. extra: more compiler flags.
    Raises KernelUnavailable, in one line.
    """
    cc = compiler()
    try:
        source = SOURCE.read_text(encoding='utf-8')
        version = subprocess.run([*cc, '--version'], capture_output=True, text=True).stdout
    except OSError as error:
        raise KernelUnavailable(f'{error.filename}: {error.strerror}') from None
    depends = [source, repr((cc, FLAGS, LINK, extra)), version, sys.version, sysconfig.get_platform(),
               cffi.__version__, cpu()]
    key = hashlib.sha256('\0'.join(depends).encode()).hexdigest()[:16]
    try:
        for path in CACHE.glob(f'{NAME}-{key}-*.so'):
            if path.stem.endswith(f'-{path.stat().st_size}'):
                return path
        CACHE.mkdir(exist_ok=True)
        # two processes may build at once: each does in a directory of its own, and the module appears whole
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            ffi = cffi.FFI()
            ffi.cdef(interface(source))
            cffi.recompiler.make_c_source(ffi, NAME, source, os.path.join(directory, 'kernel.c'))
            include = [f'-I{p}' for p in {sysconfig.get_path('include'), sysconfig.get_path('platinclude')}]
            built = Path(directory) / 'kernel.so'
            for flags in FLAGS:
                done = subprocess.run([*cc, *flags, *extra, *include, 'kernel.c', '-o', built, *LINK],
                                      cwd=directory, capture_output=True, text=True)
                if done.returncode == 0:
                    path = CACHE / f'{NAME}-{key}-{built.stat().st_size}.so'
                    with open(built, 'rb') as file:
                        os.fsync(file.fileno())         # or a power cut may leave a name without all of it
                    os.replace(built, path)
                    return path
    except OSError as error:
        raise KernelUnavailable(f'cannot build in {CACHE}: {error.strerror}; make it writable') from None
    hint = '; install the headers of Python (python3-dev)' if 'Python.h' in done.stderr else ''
    raise KernelUnavailable(f'{cc[0]} failed: {first_error(done.stderr)}{hint}')


def load(extra=()):
    """The kernel as a module with .lib and .ffi, built first where needed. Raises KernelUnavailable."""
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
