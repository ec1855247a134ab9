"""YAML, read strictly."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeffect.config_file import read_config_file
from saeffect.errors import BadFile, ConfigError, NotFound

BILLIONS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{there}: &{there} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, there in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = BILLIONS.replace("[x, x, x, x, x, x, x, x, x]", "{x: 1}").replace("[*", "{<<: [*").replace("]", "]}")


def _file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_plain_values_anchors_and_merges_are_read(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: [2.5, true, null]}\nb: {<<: *a, x: 3}\nc: {<<: [{x: 1}, {x: 2, z: 0}]}\nd: *a\n"
    first = {"x": 1, "y": [2.5, True, None]}
    assert read_config_file(_file(tmp_path, "\ufeff" + text), "study") == {
        **{"a": first, "b": {"x": 3, "y": first["y"]}, "c": {"x": 1, "z": 0}, "d": first}
    }
    assert read_config_file(_file(tmp_path, ""), "study") is None


def test_repeated_key_error_names_both_lines(tmp_path: Path, complains: Callable[..., Any]) -> None:
    path = _file(tmp_path, "name: a\nselection:\n  min_matches: 1\n  domain: x\n  min_matches: 2\n")
    with complains(ConfigError, "'min_matches' is there twice, on lines 3 and 5", at=f"{path}, line 5"):
        read_config_file(path, "study")


@pytest.mark.parametrize(
    ("text", "part", "place"),
    [
        (BILLIONS, "100,000 values", "line 1"),
        (MERGED, "100,000 values", "line 1"),
        ("a: 1\nb: &b [*b]\n", "part of", "line 2"),
        ("a: &a\n  b: *a\n", "part of", "line 1"),
        ("a: &a {<<: *a}\n", "part of", "line 1"),
        ("a: " + "[" * 100_000, "deep", "s.yaml"),
        ("- " * 3000, "deep", "s.yaml"),
        ("a: " + "[" * 60 + "]" * 60, "deep", "line 1"),
        ("a: 1\nb: 2024-02-31\n", "no such date", "line 2"),
        ("seed: " + "9" * 5000, "no such date or number", "line 1"),
        ("seed: 0x" + "f" * 5000, "no such date or number", "line 1"),
        ('a: "\\ud83d"', "half a character", "line 1"),
        ('a: "\\UFFFFFFFF"', "not YAML", "s.yaml"),
        ("a: !!bool perhaps", "no such date or number", "line 1"),
        ("a: !!python/name:os.system x", "tag", "line 1"),
        ("a: !!set {x, y}", "plain value", "line 1"),
        ("? [a]\n: 1\n", "plain value", "line 1"),
        ("a: {<<: 3}", "only mappings", "line 1"),
        ("a: 1\n---\nb: 2\n", "not YAML", "line 2"),
        ("a: 1\nb: {", "not YAML", "line 2"),
        ("a: \x1b", "not YAML", "s.yaml"),
        ("a: caf\xe9".encode("latin-1"), "not UTF-8", "s.yaml"),
    ],
)
def test_arbitrary_content_raises_saeffect_error(
    text: str | bytes, part: str, place: str, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    started = time.process_time()
    with complains(BadFile, part, at=place):
        read_config_file(_file(tmp_path, text), "study")
    assert time.process_time() - started < 20


def test_files_that_are_none(tmp_path: Path, complains: Callable[..., Any]) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with complains(BadFile, "pipe"):
        read_config_file(tmp_path / "pipe.yaml", "recipe")
    with complains(BadFile, "is a directory"):
        read_config_file(tmp_path, "recipe")
    with complains(NotFound, "no recipe file", "there are others"):
        read_config_file(tmp_path / "none.yaml", "recipe", fix="there are others.")
    with complains(ConfigError, "can be no path"):
        read_config_file("a\0b", "recipe")
    with complains(BadFile, "10,000,001 bytes"):
        read_config_file(_file(tmp_path, "a" * 10_000_001), "recipe")


def test_paths_in_it_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("x")
    path = _file(tmp_path, "text: text.txt\n")
    monkeypatch.chdir("/")
    assert read_config_file(path, "recipe") == {"text": str(tmp_path / "text.txt")}
