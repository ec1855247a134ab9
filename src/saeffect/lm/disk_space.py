"""Room on the disk: refuse what will not fit before it is begun."""

from __future__ import annotations

import shutil
from pathlib import Path

from saeffect.errors import ConfigError

__all__ = ["refuse_without_room"]


def refuse_without_room(folder: Path, expected: int, max_bytes: int | None = None) -> None:
    """Refuse to fill a folder beyond a cap, or beyond what the disk has free.

    Args:
        folder: Where the files go; what lies there already counts as a part of them.
        expected: Bytes of all files when they are done.
        max_bytes: The cap; None for none.

    Raises:
        ConfigError: The files will not fit; the message gives both sizes.
    """
    if max_bytes is not None and expected > max_bytes:
        raise ConfigError(
            f"the activations take {_size(expected)}; the cap is {_size(max_bytes)}.",
            at="max_bytes",
            fix="raise the cap, harvest fewer tokens, or stream the activations instead.",
        )
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    missing = expected - sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if missing > free:
        raise ConfigError(
            f"the activations take {_size(missing)} more; the disk has {_size(free)} free.",
            at=str(folder),
            fix="make room, harvest fewer tokens, or stream the activations instead.",
        )


def _size(n_bytes: int) -> str:
    """A number of bytes for people.

    Example:
        >>> _size(1_530_000_000), _size(40_000_000), _size(9_800)
        ('1.53 GB', '40 MB', '9,800 bytes')
    """
    if n_bytes >= 10**9:
        return f"{n_bytes / 1e9:,.2f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 10**7 else f"{n_bytes:,} bytes"
