from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from saeffect.errors import BadFile, NotFound
from saeffect.io import (
    atomic_path,
    fingerprint,
    hash_file,
    hash_folder,
    read_json,
    remove_leftovers,
    versions,
    write_json,
)


def test_atomic_path_replaces_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    with atomic_path(target) as temporary:
        temporary.write_text("second")
        assert target.read_text() == "first"
    assert target.read_text() == "second"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_failed_atomic_write_keeps_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = (
        "import os, sys; from saeffect.io import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n    t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], env=_env(), check=False)
    assert done.returncode == -9
    assert target.read_text() == "old"


def test_remove_leftovers_removes_nothing_else(tmp_path: Path) -> None:
    mine = [
        ".a.12345678.json",
        ".notes",
        ".env.abcdefgh.txt",
        "a.json",
        ".tmpAbc123",
        ".tmpZero01",
        ".saeffect-writing-link.abcdefgh",
    ]
    for name in mine[:-1]:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".tmpZero01").write_bytes(bytes(2_000_000) + b"mine")
    (tmp_path / mine[-1]).symlink_to(tmp_path / "a.json")
    with atomic_path(tmp_path / "a.json") as temporary:
        left = temporary.name
    (tmp_path / left).write_text("half")
    (tmp_path / ".tmpXyz789").write_bytes(save({"of safetensors": torch.zeros(1)})[:40])
    (tmp_path / ".tmpSized1").write_bytes(bytes(2_000_000))  # killed before the first byte was written
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(mine)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["tempfile.mkstemp", "pathlib.Path.write_text", "os.fsync", "pathlib.Path.mkdir"])
def test_a_full_disk_is_told_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any], code: int, call: str
) -> None:
    (tmp_path / "a.json").write_text("old")

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(call, refused)
    with complains(BadFile, os.strerror(code), "free some space", at=str(tmp_path / "a.json")):
        write_json(tmp_path / "a.json", 1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_full_disk_under_safetensors(tmp_path: Path, complains: Callable[..., Any]) -> None:
    from safetensors import SafetensorError

    with complains(BadFile, "No space left on device", "free some space"), atomic_path(tmp_path / "a"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), atomic_path(tmp_path / "a"):
        raise SafetensorError("Error while serializing: some tensors share memory")


def test_read_errors_are_not_write_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "copy" / "a") as temporary:
        temporary.write_bytes((tmp_path / "elsewhere" / "b").read_bytes())


def test_json_is_sorted_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"b": [1.5, float("nan"), (float("inf"),)], "a": np.float32(0.5), 3: torch.tensor(2), "é": True}
    write_json(path, value)
    assert read_json(path) == {"b": [1.5, None, [None]], "a": 0.5, "3": 2, "é": True}
    assert path.read_text(encoding="utf-8").startswith('{\n  "3": 2,\n  "a": 0.5,\n')
    assert "é" in path.read_text(encoding="utf-8")
    assert "NaN" not in path.read_text(encoding="utf-8")


def test_bad_json(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_json(tmp_path / "none.json")
    for content in (b'{"a": ', b"\xff\xfe{}", b""):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(BadFile, match=r"a\.json"):
            read_json(tmp_path / "a.json")
    with pytest.raises(BadFile, match="is a directory"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BadFile, match="a pipe or a device"):
        read_json(tmp_path / "pipe.json")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b" / "c").write_bytes(b"two")
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    assert hash_folder(tmp_path / "a") == hash_file(tmp_path / "a")
    before = hash_folder(tmp_path)
    assert hash_folder(tmp_path) == before
    (tmp_path / "b" / "c").rename(tmp_path / "b" / "d")
    renamed = hash_folder(tmp_path)
    (tmp_path / "b" / "d").write_bytes(b"TWO")
    assert len({before, renamed, hash_folder(tmp_path)}) == 3


def test_a_missing_folder_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        hash_folder(tmp_path / "none")


def test_fingerprint_depends_on_content_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})
    assert fingerprint(1) != fingerprint("1")


def test_versions_name_what_makes_the_numbers() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert json.dumps(found)


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
