"""
Builds sparse_kernel.c for this machine, once, and loads it.

    python build_kernel.py          # builds it if needed, and prints where it is
    kernel = build_kernel.load()    # kernel.lib.decode(...), kernel.ffi.new(...); builds it if needed

The module lies in .kernel/ beside the source or, if that folder cannot be used, in the user's cache folder.
Its name is a hash of what it depends on (source, the compiler's command, flags, Python, CPU). So if any of
them changes, load() builds again, and machines that share a folder do not get each other's code.

Not here: Windows compilers (PyTorch decodes there); cross-compiling; removal of old builds: delete .kernel/.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import cffi
import cffi.recompiler

from files import one_line, read_text, write_atomically
from options import progress

SOURCE = Path(__file__).resolve().with_name('sparse_kernel.c')
CACHE = SOURCE.with_name('.kernel')
NAME = '_sparse_kernel'
X86 = platform.machine().lower() in ('x86_64', 'amd64', 'i686')
NATIVE = '-march=native' if X86 else '-mcpu=native'         # off x86, -march does not tune for this CPU
FLAGS = ['-std=c11', '-O3', '-ffp-contract=fast', '-fopenmp-simd']
LINK = ['-shared', '-fPIC', '-fvisibility=hidden', '-pthread', '-lm']
LINK += ['-undefined', 'dynamic_lookup'] if sys.platform == 'darwin' else []


class KernelUnavailable(Exception):
    """The kernel cannot be built or loaded here; the message says why, and what to do, in one line."""


def compiler():
    """The C compiler's command as a list: $CC, else the first of cc, gcc and clang that is installed."""
    if sys.platform == 'win32':
        raise KernelUnavailable('the kernel is not for Windows: PyTorch decodes there; WSL is faster')
    for command in (os.environ.get('CC', ''), 'cc', 'gcc', 'clang'):
        words = command.split()
        if words and shutil.which(words[0]):
            return words
    raise KernelUnavailable('no C compiler found: install gcc or clang, or name yours in CC')


def run(command, **more):
    """subprocess.run, with the output as text, in English: compile_to() looks for English words in it."""
    return subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace',
                          env={**os.environ, 'LC_ALL': 'C'}, **more)


def cpu():
    """A text that differs between CPUs which cannot run each other's code."""
    if sys.platform == 'darwin':            # platform.processor() is 'arm' for every chip
        return run(['sysctl', '-n', 'machdep.cpu.brand_string']).stdout
    try:
        kinds = 'model name', 'flags', 'Features', 'CPU part'
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            return '\n'.join(sorted({line for line in file if line.startswith(kinds)}))
    except OSError:
        return platform.processor()


def interface(source):
    """The declarations that Python may use: the interface section of the source, without comments."""
    section = source.split('// the structs.', 1)[1].split('// end of interface', 1)[0].split('\n', 1)[1]
    return '\n'.join(line.split('//')[0].rstrip() for line in section.splitlines())


def compile_to(path, source, cc, extra):
    """Compiles source, a text, to a module at path. Raises KernelUnavailable and OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        ffi = cffi.FFI()
        ffi.cdef(interface(source))
        cffi.recompiler.make_c_source(ffi, NAME, source, os.path.join(directory, 'kernel.c'))
        include = [f'-I{p}' for p in {sysconfig.get_path('include'), sysconfig.get_path('platinclude')}]
        built = Path(directory, 'kernel.so')
        for native in ([NATIVE], []):       # some compilers do not know the flag
            flags = [*FLAGS, *native, *extra, *include]
            done = run([*cc, *flags, 'kernel.c', '-o', built, *LINK], cwd=directory)
            if done.returncode == 0 and built.exists():
                write_atomically(path, lambda file: file.write(built.read_bytes()))
                return
    lines = done.stderr.splitlines() or ['no message']
    first = next((line for line in lines if 'error' in line or 'not found' in line), lines[0]).strip()
    remedy = '; install the headers of Python (python3-dev)' if 'Python.h' in done.stderr else ''
    raise KernelUnavailable(f'{cc[0]} failed: {first}{remedy}')


def load(extra=()):
    """
    The kernel as a module with .lib and .ffi, built first if needed. extra: more compiler flags. Raises
    KernelUnavailable.
    """
    cc, source = compiler(), read_text(SOURCE)
    depends = [source, repr((cc, NATIVE, FLAGS, LINK, extra)), sys.version, sysconfig.get_platform(),
               cffi.__version__, cpu()]
    name = f'{NAME}-{hashlib.sha256(repr(depends).encode()).hexdigest()[:16]}.so'
    cache, refused = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), []
    for path in (CACHE / name, Path(cache, 'cwic', name)):
        try:
            if not path.exists():
                progress('building the kernel, once')
                compile_to(path, source, cc, extra)
            spec = importlib.util.spec_from_file_location(NAME, path)
            kernel = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(kernel)
            return kernel
        except (OSError, ImportError) as error:     # a folder that is read-only, not a folder, or noexec
            refused.append(f'{path.parent} ({one_line(error)})')
        finally:
            progress()
    raise KernelUnavailable(f'cannot build and load it in {" or ".join(refused)}; name another folder in '
                            'XDG_CACHE_HOME')


if __name__ == '__main__':
    try:
        print(load().__file__)
    except KeyboardInterrupt:
        sys.exit(130)
    except KernelUnavailable as error:
        sys.exit(f'build_kernel.py: {error}')
