"""build_kernel.py: it builds once, again if something changed, and says in one line why it cannot."""

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import linux_only
import build_kernel

ROOT = Path(__file__).parent.parent
SOURCES = ('sparse_kernel.c', 'build_kernel.py', 'files.py', 'options.py')

WRITES = b'[ -z "$out" ] || echo module > "$out"\n'        # a compiler that finishes at once


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """build_kernel, working on a copy of the source in a directory of its own."""
    monkeypatch.setattr(build_kernel, 'SOURCE', tmp_path / 'sparse_kernel.c')
    monkeypatch.setattr(build_kernel, 'CACHE', tmp_path / '.kernel')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    build_kernel.SOURCE.write_text((ROOT / 'sparse_kernel.c').read_text(encoding='utf-8'), encoding='utf-8')
    return build_kernel


@pytest.fixture
def fake(copy, tmp_path, monkeypatch):
    """fake(lines): makes a shell script of these lines the compiler; $out is the file it should write."""
    def use(lines):
        script = tmp_path / 'fake-cc'
        script.write_bytes(b'#!/bin/sh\nwhile [ "$#" -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n' + lines)
        script.chmod(0o755)
        monkeypatch.setenv('CC', str(script))
        return copy
    return use


def test_builds_once_and_again_when_something_changed(copy, monkeypatch):
    """A module built from older source, with other flags or on another CPU must not be loaded."""
    compiled, compile_to = [], copy.compile_to
    monkeypatch.setattr(copy, 'compile_to', lambda *args: compiled.append(args) or compile_to(*args))
    first = copy.load().__file__
    assert copy.load().__file__ == first and len(compiled) == 1
    copy.SOURCE.write_text(copy.SOURCE.read_text(encoding='utf-8') + '\n// changed\n', encoding='utf-8')
    second = copy.load().__file__
    third = copy.load(('-DPLAIN',)).__file__
    monkeypatch.setattr(copy, 'cpu', lambda: 'another one')
    assert len({first, second, third, copy.load().__file__}) == len(compiled) == 4
    assert len(list(copy.CACHE.iterdir())) == 4             # nothing half built stays behind


def test_two_processes_can_build_at_once(tmp_path):
    """Both load a whole module, and one is left."""
    for name in SOURCES:
        (tmp_path / name).write_text((ROOT / name).read_text(encoding='utf-8'), encoding='utf-8')
    code = 'import build_kernel; k = build_kernel.load(); print(k.lib.team_size(k.lib.team_new(1, 8, 8)))'
    both = [subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    assert [p.communicate() for p in both] == [('1\n', '')] * 2
    assert len(list((tmp_path / '.kernel').iterdir())) == 1


@linux_only
def test_functions_are_hidden_from_the_linker():
    """A function called step crashed on its first call, which went to an old function of that name in the C library."""
    done = subprocess.run(['nm', '-D', '--defined-only', build_kernel.load().__file__], capture_output=True, text=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert names and names <= {'PyInit__sparse_kernel', '_cffi_pypyinit__sparse_kernel'}


def test_a_missing_compiler_is_one_line(copy, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CC', raising=False)
    with pytest.raises(copy.KernelUnavailable, match='^no C compiler found: install gcc or clang, or name yours in CC$'):
        copy.load()


def test_broken_source_is_one_line(copy):
    """The first error that the compiler prints."""
    copy.SOURCE.write_text(copy.SOURCE.read_text(encoding='utf-8') + '\nint broken( {\n', encoding='utf-8')
    with pytest.raises(copy.KernelUnavailable) as caught:
        copy.load()
    assert '\n' not in str(caught.value) and 'error' in str(caught.value)


def test_a_compiler_need_not_write_utf8(fake):
    """A German compiler in a Latin-1 locale wrote 0xfc for a letter, and chat.py ended with exit code 2."""
    kernel = fake(b"printf 'cc: error: \\374bel\\n' >&2; exit 1\n")
    with pytest.raises(kernel.KernelUnavailable, match='fake-cc failed: cc: error: \ufffdbel$'):
        kernel.load()


def test_the_compiler_is_asked_for_english(fake):
    """The first line that says "error" is shown. A German compiler said "Fehler", and its line "In function" was shown."""
    kernel = fake(b"""[ "$LC_ALL" = C ] && word=error || word=Fehler
                  echo "In function: $word" >&2; exit 1
                  """)
    with pytest.raises(kernel.KernelUnavailable, match='In function: error$'):
        kernel.load()


@pytest.mark.parametrize('lines', [b'exit 0\n', WRITES, b'kill -9 $$\n', b'exit 1\n'])
def test_a_failed_build_of_any_kind_is_one_line(lines, fake):
    """A compiler that succeeds but writes nothing, or no module; that is killed; that fails and says nothing."""
    kernel = fake(lines)
    with pytest.raises(kernel.KernelUnavailable) as caught:
        kernel.load()
    assert '\n' not in str(caught.value) and ('fake-cc failed' in str(caught.value) or 'cannot build and load' in str(caught.value))


@pytest.mark.parametrize('unusable', ['not a folder', 'noexec', 'read-only'])
def test_an_unusable_checkout_builds_in_the_users_cache(unusable, copy, tmp_path, monkeypatch):
    """
    A chat in a read-only checkout or a noexec one decoded in PyTorch, a hundred times slower. If the cache folder is no
    better, one line says why for both.
    """
    bad, module_from_spec, mkdir = [copy.CACHE], importlib.util.module_from_spec, Path.mkdir

    def load_from(spec):        # what Python raises if the system refuses to map the module
        if Path(spec.origin).parent in bad:
            raise ImportError(f'{spec.origin}: failed to map segment from shared object')
        return module_from_spec(spec)

    def make(path, *args, **more):
        if path in bad:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *args, **more)

    if unusable == 'not a folder':
        copy.CACHE.write_text('a file', encoding='utf-8')
    if unusable == 'noexec':
        monkeypatch.setattr(importlib.util, 'module_from_spec', load_from)
    if unusable == 'read-only':
        monkeypatch.setattr(Path, 'mkdir', make)
    path = Path(copy.load().__file__)
    assert path.parent == tmp_path / 'cache' / 'cwic' and path.parent.stat().st_mode & 0o777 == 0o700
    bad.append(path.parent)
    if unusable == 'not a folder':
        shutil.rmtree(path.parent)
        path.parent.write_text('a file', encoding='utf-8')
    if unusable == 'read-only':
        path.unlink()
    why = {'not a folder': 'File exists', 'noexec': 'failed to map', 'read-only': 'Read-only'}[unusable]
    with pytest.raises(copy.KernelUnavailable, match='^cannot build and load it in .*; name another folder in XDG_CACHE_HOME$') as caught:
        copy.load()
    assert str(caught.value).count(why) == 2


def test_the_chips_of_macs_are_told_apart(tmp_path, monkeypatch):
    """platform.processor() is arm on all of Apple's chips: a module built for an M4 crashed on an M1."""
    (tmp_path / 'sysctl').write_text('#!/bin/sh\necho "Apple M1: $*"\n', encoding='utf-8')
    (tmp_path / 'sysctl').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert build_kernel.cpu() == 'Apple M1: -n machdep.cpu.brand_string\n'


def test_windows_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(build_kernel.KernelUnavailable, match='Windows.*PyTorch.*WSL'):
        build_kernel.load()


def test_command_line_prints_the_module_or_the_remedy(tmp_path):
    """A link to build_kernel.py from another folder used to look for sparse_kernel.c beside the link."""
    (tmp_path / 'link.py').symlink_to(ROOT / 'build_kernel.py')
    command = [sys.executable, str(tmp_path / 'link.py')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ''
    assert done.stdout.strip() == build_kernel.load().__file__
    command = [sys.executable, str(ROOT / 'build_kernel.py')]
    done = subprocess.run(command, capture_output=True, text=True, env={'PATH': ''})
    assert done.returncode == 1 and done.stderr.startswith('build_kernel.py: no C compiler') and done.stderr.count('\n') == 1


