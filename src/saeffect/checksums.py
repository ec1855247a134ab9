"""Detect damaged files by a checksum in their name or metadata, and packed files that would fill the memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saeffect.errors import BadFile, first_line
from saeffect.io import atomic_path, hash_file
from saeffect.paths import refuse_special

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NPZ_ERRORS",
    "add_sealed",
    "has_own_hash",
    "is_sealed",
    "npz_shapes",
    "open_tensors",
    "read_tensors",
    "save_tensors",
    "unpacked_limit",
    "with_hash",
]

_CHECKSUM = "saeffect_crc32"
_ALWAYS_ALLOWED = 1 << 28  # bytes
# What zipfile and numpy raise for files that are not .npz, encrypted (RuntimeError), or packed in an unknown way.
NPZ_ERRORS: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError)
NPZ_ERRORS += (MemoryError, RuntimeError, OSError, zipfile.BadZipFile, zlib.error)


def add_sealed(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Add a file to a folder, atomically, under a name that holds the hash of its content.

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
    """Whether a file that `add_sealed` wrote exists and is undamaged."""
    return not path.is_symlink() and path.is_file() and hash_file(path)[:32] == path.stem.rpartition("-")[2]


def with_hash(head: str, body: str) -> str:
    """`body` below a first line of `head` and the hash of `body`, by which `has_own_hash` detects edits."""
    return f"{head}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def has_own_hash(path: Path, head: str) -> bool:
    """Whether a file of `with_hash` is unedited."""
    first, _, rest = path.read_bytes().partition(b"\n")
    return first == f"{head}{hashlib.sha256(rest).hexdigest()}".encode()


@contextlib.contextmanager
def open_tensors(
    path: Path, what: str, *, fix: str, at: str | None = None, framework: Literal["pt", "numpy"] = "pt"
) -> Iterator[Any]:
    """Open a safetensors file. Raises BadFile if it cannot be read, now or during the block: `what` names the file
    ("this shard"), `at` its place (default: the path), `fix` the remedy.
    """
    from safetensors import SafetensorError, safe_open

    refuse_special(path, path.name)
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BadFile(
            f"{what} cannot be read: {first_line(error).rstrip('.')}.", at=at or str(path), fix=fix
        ) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, atomically, with a checksum in its metadata for `read_tensors`; the same tensors and
    metadata give the same bytes.
    """
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = dict(metadata or {})
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata=entries | {_CHECKSUM: _checksum(stored, entries)})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, whose order the library changes from file to file."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # written in place: the tensors stay where they are
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: Path, what: str = "this file", *, fix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a safetensors file of any program. BadFile as `open_tensors`, or
    if the checksum of `save_tensors` does not match.
    """
    with open_tensors(path, what, fix=fix) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = dict(file.metadata() or {})
    expected = metadata.pop(_CHECKSUM, None)
    if expected is not None and expected != _checksum(tensors, metadata):
        message = f"{what} cannot be read: its content does not have the checksum that it was written with."
        raise BadFile(message, at=str(path), fix=fix)
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 over names, types, shapes and bytes; ten times faster than SHA-256."""
    import torch

    total = zlib.crc32(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def unpacked_limit(packed: int) -> int:
    """The most bytes that `packed` bytes of numbers may unpack to; real ones compress to about a third."""
    return max(_ALWAYS_ALLOWED, 50 * packed)


def npz_shapes(path: Path, names: Sequence[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an .npz file (or of those named), from their headers. ValueError: an array would unpack
    to more than `unpacked_limit`, or holds Python objects; others of `NPZ_ERRORS`: not an .npz file.
    """
    from numpy.lib import format as npy

    shapes: dict[str, tuple[int, ...]] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist() if names is None else [archive.getinfo(f"{name}.npy") for name in names]:
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError(f"{name} is an array of objects, which is a pickle, and pickles are never loaded")
            n_bytes = math.prod(shape) * dtype.itemsize
            if n_bytes > min(unpacked_limit(member.compress_size), member.file_size):
                raise ValueError(f"{name} would take {n_bytes:,} bytes of memory, which the file does not hold")
            shapes[name] = tuple(shape)
    return shapes
