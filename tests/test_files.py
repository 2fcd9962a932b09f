import io
import os
import subprocess
import sys

import pytest

from files import read_lines, read_text


@pytest.mark.parametrize('data', [
    'one\ntwo\u00e9\n'.encode(), b'\xef\xbb\xbfone\r\ntwo\xc3\xa9\r\n', 'one\r\ntwo\u00e9\r\n'.encode('utf-16'),
    b'\xfe\xff' + 'one\ntwo\u00e9\n'.encode('utf-16-be')], ids=['utf-8', 'bom and crlf', 'utf-16', 'utf-16-be'])
def test_text_from_windows_reads_as_any_other(tmp_path, data):
    """A \\r and a BOM stayed in prompts and changed the answer; UTF-16 became rubbish with exit code 0."""
    (tmp_path / 'text').write_bytes(data)
    assert read_text(tmp_path / 'text') == 'one\ntwo\u00e9\n'
    assert list(read_lines(io.BufferedReader(io.BytesIO(data)))) == ['one', 'two\u00e9']


@pytest.mark.parametrize('data, said', [(b'a\0b', 'NUL'), ('abc'.encode('utf-16-le'), 'NUL'), (b'abc\xff', 'byte 3')])
def test_binary_data_is_refused_as_text(tmp_path, data, said):
    (tmp_path / 'text').write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_text(tmp_path / 'text')


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    (tmp_path / 'text').write_bytes(b'12345')
    assert read_text(tmp_path / 'text', most=5) == '12345'
    with pytest.raises(ValueError, match='5 bytes'):
        read_text(tmp_path / 'text', most=4)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    """A FIFO without a writer blocked for ever, /dev/zero took six gigabytes."""
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', '/dev/zero'):
        with pytest.raises(OSError, match='not a regular file'):
            read_text(path)


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc')
def test_a_folder_in_place_of_a_file_leaves_no_descriptor_open(tmp_path):
    """Each attempt to read a folder left one open, until there were no more."""
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(10):
        with pytest.raises(IsADirectoryError):
            read_text(tmp_path)
    assert len(os.listdir('/proc/self/fd')) == before


def test_read_lines_yields_each_line_as_it_arrives():
    """A program that waits for each reply before it sends the next prompt must not wait for ever."""
    code = 'import sys; from files import read_lines\nfor line in read_lines(sys.stdin.buffer): print(line, flush=True)'
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as echo:
        for line in (b'first\n', b'second\n'):
            echo.stdin.write(line)
            echo.stdin.flush()
            assert echo.stdout.readline() == line
        echo.stdin.close()
