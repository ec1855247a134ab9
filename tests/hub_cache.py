"""A cache in the hub's own layout, so that its client reads from it offline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["COMMIT", "HubCache", "hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubCache:
    """Repositories by name; each file is a blob under its hash, and a link in the snapshot of one commit."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def add(self, repo: str, name: str, content: bytes) -> Path:
        """Add a file, and return its place in the snapshot."""
        folder = self.home / ("models--" + repo.replace("/", "--"))
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / COMMIT / name
        for path in (blob, link, folder / "refs" / "main"):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (folder / "refs" / "main").write_text(COMMIT)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        return link

    def add_folder(self, repo: str, name: str, source: Path) -> Path:
        """Add all files of a folder."""
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            self.add(repo, f"{name}/{file.relative_to(source).as_posix()}", file.read_bytes())
        return self.home / ("models--" + repo.replace("/", "--")) / "snapshots" / COMMIT / name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubCache]:
    """An empty cache of the hub, and one of ours; both are forgotten after the test."""
    from huggingface_hub import constants

    from saeffect.sae import hub as of_saes

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SAEFFECT_CACHE", str(tmp_path / "ours"))
    of_saes.forget()
    yield HubCache(tmp_path / "hub")
    of_saes.forget()
