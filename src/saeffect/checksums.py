"""Damage that shows: files that hold the checksum of their own content, in their name or in their metadata."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saeffect.errors import BadFile, first_line
from saeffect.io import atomic_path, hash_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_sealed", "is_sealed", "open_tensors", "read_tensors", "save_tensors"]

_CHECKSUM = "saeffect_crc32"


def add_sealed(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Add a file to a folder, atomically, under a name that holds the hash of its content, so that damage shows.

    Example:
        >>> import tempfile
        >>> path = add_sealed(Path(tempfile.mkdtemp()), "part", ".txt", b"whole")
        >>> is_sealed(path), path.write_text("holed"), is_sealed(path)
        (True, 5, False)
    """
    path = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def is_sealed(path: Path) -> bool:
    """Whether a file that `add_sealed` made is there as it was made."""
    return not path.is_symlink() and path.is_file() and hash_file(path)[:32] == path.stem.rpartition("-")[2]


@contextlib.contextmanager
def open_tensors(
    path: Path, what: str, *, fix: str, at: str | None = None, framework: Literal["pt", "numpy"] = "pt"
) -> Iterator[Any]:
    """A safetensors file, open; one that cannot be read, now or while the block lasts, is one error.

    Args:
        path: The file.
        what: It is, for the message: "this shard".
        fix: What to do about a damaged one.
        at: Where, for the message; the path by default.
        framework: Whose tensors it gives.

    Raises:
        BadFile: It is truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BadFile(
            f"{what} cannot be read: {first_line(error).rstrip('.')}.", at=at or str(path), fix=fix
        ) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically, with a checksum in its metadata that `read_tensors` looks at."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    noted = dict(metadata or {})
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata=noted | {_CHECKSUM: _checksum(whole, noted)})


def read_tensors(path: Path, what: str = "this file", *, fix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a safetensors file of `save_tensors` or any other program.

    Raises:
        BadFile: As `open_tensors`; or it is not what was written: some bits in it have changed.
    """
    with open_tensors(path, what, fix=fix) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = dict(file.metadata() or {})
    wanted = metadata.pop(_CHECKSUM, None)
    if wanted is not None and wanted != _checksum(tensors, metadata):
        message = f"{what} cannot be read: its content does not have the checksum that it was written with."
        raise BadFile(message, at=str(path), fix=fix)
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 over names, types, shapes and bytes; it costs a tenth of SHA-256, and shards are read again and again."""
    import torch

    total = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
