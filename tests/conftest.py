"""What several files of tests share."""

import os

# before torch is imported: its threads would wait for each other spinning, on cores that others need
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import sys

import pytest

linux_only = pytest.mark.skipif(sys.platform != 'linux', reason="needs Linux's /proc, /dev/full or nm")


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """The path of a data set of bytes: the same few lines of code, again and again."""
    from test_train import write_data
    text = 'def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(i)\n' * 60
    return write_data(tmp_path_factory.mktemp('data'), list(text.encode()))
