from __future__ import annotations

from pathlib import Path

import pytest

from saeffect.errors import BadFile, NotFound
from saeffect.paths import decode_utf8, read_bytes


def test_byte_order_mark_is_dropped_and_text_kept() -> None:
    assert decode_utf8("\ufeffœdème\n".encode(), at="f") == "œdème\n"


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("abc\ndé".encode("latin-1"), "byte 0xe9 at position 5 (line 2)"),
        ("abc".encode("utf-16"), "byte 0xff at position 0 (line 1); it looks like UTF-16"),
        ("abc".encode("utf-16-le"), "byte 0x00 at position 1 (line 1)"),
        (b"\xef\xbb\xbfab\xff", "byte 0xff at position 5 (line 1)"),
    ],
)
def test_other_encodings_name_the_byte(data: bytes, place: str) -> None:
    with pytest.raises(BadFile) as caught:
        decode_utf8(data, at="words.txt")
    assert place in caught.value.message
    assert caught.value.at == "words.txt"
    assert "UTF-8" in (caught.value.fix or "")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no verdicts file 'a\.csv'"):
        read_bytes(tmp_path / "a.csv", "verdicts")
    with pytest.raises(BadFile, match="is a directory"):
        read_bytes(tmp_path, "verdicts")
