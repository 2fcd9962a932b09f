import pytest

from files import read_text


@pytest.mark.parametrize('data', [
    'one\ntwo\u00e9\n'.encode(), b'\xef\xbb\xbfone\r\ntwo\xc3\xa9\r\n'], ids=['utf-8', 'bom and crlf'])
def test_text_from_windows_reads_as_any_other(tmp_path, data):
    """A \\r and a BOM stayed in prompts and changed the answer."""
    (tmp_path / 'text').write_bytes(data)
    assert read_text(tmp_path / 'text') == 'one\ntwo\u00e9\n'


def test_binary_data_is_refused_as_text(tmp_path):
    (tmp_path / 'text').write_bytes(b'abc\xff')
    with pytest.raises(ValueError, match='text: not UTF-8 .byte 3.; save it as UTF-8'):
        read_text(tmp_path / 'text')
