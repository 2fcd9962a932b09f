"""build_kernel.py: building once, building again when something changed, and saying in one line why it cannot."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import build_kernel

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """build_kernel, made to work on a copy of the source in a directory of its own."""
    monkeypatch.setattr(build_kernel, 'SOURCE', tmp_path / 'sparse_kernel.c')
    monkeypatch.setattr(build_kernel, 'CACHE', tmp_path / '.kernel')
    build_kernel.SOURCE.write_text((ROOT / 'sparse_kernel.c').read_text(encoding='utf-8'), encoding='utf-8')
    return build_kernel


def test_builds_once_and_again_when_something_changed(copy, monkeypatch):
    """A module that was built from older source, or with other flags, must not be taken for the present one."""
    first = copy.build()
    written = first.stat().st_mtime_ns
    assert copy.build() == first and first.stat().st_mtime_ns == written
    copy.SOURCE.write_text(copy.SOURCE.read_text(encoding='utf-8') + '\n// changed\n', encoding='utf-8')
    second = copy.build()
    third = copy.build(('-DPLAIN',))
    monkeypatch.setattr(copy, 'cpu', lambda: 'another one')
    assert len({first, second, third, copy.build()}) == 4
    assert [p.name for p in copy.CACHE.iterdir() if p.is_dir()] == []       # nothing half built stays behind


def test_half_a_module_is_built_anew(copy):
    """A power cut left the first half of a module under its final name, and every start crashed while loading it."""
    path = copy.build()
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert copy.load().lib.CHUNK > 0
    assert path.stat().st_size == len(whole)


def test_two_processes_at_once(tmp_path):
    """Two processes that build at the same time: both load a whole module."""
    for name in ('sparse_kernel.c', 'build_kernel.py'):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding='utf-8'), encoding='utf-8')
    code = 'import build_kernel; k = build_kernel.load(); print(k.lib.team_size(k.lib.team_new(1, 8, 8)))'
    both = [subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    assert [p.communicate() for p in both] == [('1\n', '')] * 2
    assert len(list((tmp_path / '.kernel').iterdir())) == 1


def test_functions_are_our_own():
    """
    A function called step crashed on its first call: the C library has one of the same name, from a time before
    POSIX, and the module's call went there. Our functions are hidden from the linker: no name can be taken over.
    """
    done = subprocess.run(['nm', '-D', '--defined-only', str(build_kernel.build())], capture_output=True, text=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert names and names <= {'PyInit__sparse_kernel', '_cffi_pypyinit__sparse_kernel'}


def test_no_compiler(copy, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CC', raising=False)
    with pytest.raises(copy.KernelUnavailable, match='^no C compiler found: install gcc or clang, or name yours in CC$'):
        copy.load()


def test_broken_compiler_and_broken_source(copy, monkeypatch):
    """Of all a compiler prints, the first line that says what is wrong; of a CC that no shell understands, why."""
    copy.SOURCE.write_text(copy.SOURCE.read_text(encoding='utf-8') + '\nint broken( {\n', encoding='utf-8')
    with pytest.raises(copy.KernelUnavailable) as caught:
        copy.build()
    assert '\n' not in str(caught.value) and 'error' in str(caught.value)
    monkeypatch.setenv('CC', 'gcc "-O2')
    with pytest.raises(copy.KernelUnavailable, match='^CC=gcc "-O2: no closing quotation; correct it, or unset CC$'):
        copy.build()


def test_cache_that_cannot_be_written(copy):
    copy.CACHE.write_text('a file where the directory should be', encoding='utf-8')
    with pytest.raises(copy.KernelUnavailable, match='cannot build in'):
        copy.build()


def test_command_line():
    """python build_kernel.py says where the module is, or in one line what to do, and exits with 1."""
    command = [sys.executable, str(ROOT / 'build_kernel.py')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and Path(done.stdout.strip()).exists() and done.stderr == ''
    done = subprocess.run(command, capture_output=True, text=True, env={'PATH': ''})
    assert done.returncode == 1 and done.stderr.startswith('build_kernel.py: no C compiler') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('seconds', [0.1, 0.2, 0.4])
def test_ctrl_c(tmp_path, seconds):
    """
    Ctrl-C while it imports printed a traceback of cffi's; while it compiles too. It says nothing, and leaves nothing.

    (Not after 0.02 seconds, when a slow Python has not begun with the file, and may swallow it itself.)
    """
    for name in ('sparse_kernel.c', 'build_kernel.py'):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding='utf-8'), encoding='utf-8')
    process = subprocess.Popen([sys.executable, str(tmp_path / 'build_kernel.py')], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode in (130, -signal.SIGINT) and out == ''
    # before its first line is done, which imports signal, nothing can be said
    assert 'build_kernel.py' not in err or '\n    import signal\n' in err
    assert not (tmp_path / '.kernel').exists() or list((tmp_path / '.kernel').iterdir()) == []
