"""GGUF files: which of a folder is the model, what its header says, and its weights converted once and kept.

Converting 270 million parameters takes transformers minutes of processor time, so the outcome is kept in the cache as a
transformers folder, under the hash of the file, the number format and the versions of what converted it.
"""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from saeffect.errors import BadFile, ConfigError, NotFound, first_line
from saeffect.io import SILENT, Log, fingerprint, hash_file
from saeffect.lm.cached_folder import cache_folder, cached

__all__ = ["choose_gguf", "converted_folder", "gguf_header", "make_savable"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def gguf_header(path: Path, *, at: str | None = None) -> dict[str, Any]:
    """Numbers and strings of a GGUF file's header, up to its tokenizer; nothing else of the file is read.

    Raises:
        BadFile: It is no GGUF file of version 2 or 3, or truncated.
    """
    found: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("it does not begin as one of version 2 or 3 does")
            for _ in range(count):
                key = _string(file)
                if key.startswith("tokenizer."):
                    break
                found[key] = _value(file, struct.unpack("<I", file.read(4))[0])
    except (ValueError, KeyError, struct.error, OSError) as error:
        raise BadFile(
            f"{path.name} is no GGUF file that can be read: {first_line(error)}.",
            at=at or str(path),
            fix="copy or download it again.",
        ) from error
    return found


def choose_gguf(place: Path, *, at: str | None = None) -> Path:
    """The model among the GGUF files of a folder, or the file itself.

    Files that hold something else, such as an adapter or an image encoder, are passed over by what their header says.

    Raises:
        NotFound: There is no model among them.
        ConfigError: There are several, and nothing says which one is meant.
        BadFile: One of them is no GGUF file.
    """
    files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    headers = {file: gguf_header(file, at=at) for file in files}
    models = [file for file, header in headers.items() if _is_model(header)]
    if len(models) == 1:
        return models[0]
    if not models:
        kinds = ", ".join(f"{file.name} ({header.get('general.type', 'no model')})" for file, header in headers.items())
        raise NotFound(f"this is no language model: {kinds}.", at=at, fix="give the .gguf file of the model itself.")
    raise ConfigError(
        f"the folder {place.name!r} holds {len(models)} models: {', '.join(file.name for file in models)}.",
        at=at,
        fix=f"say which one, for example {models[0].name}; one split into several files must be joined first.",
    )


def converted_folder(path: Path, dtype: torch.dtype, convert: Callable[[Path], None], *, log: Log = SILENT) -> Path:
    """Folder of a GGUF model's weights as transformers reads them, made on the first call and kept.

    Args:
        path: The GGUF file.
        dtype: Number format of the converted weights.
        convert: Writes the converted model into an empty folder.
        log: Receives one line before the conversion.

    Raises:
        BadFile: The cache cannot be written to, or has no room.
    """
    number_format = str(dtype).removeprefix("torch.")
    made_by = {name: importlib.metadata.version(name) for name in ("transformers", "gguf")}
    source = hash_file(path)
    home = cache_folder() / "converted"

    def make(target: Path) -> None:
        log(f"converting {path.name} to {number_format} (once, kept in {home})")
        convert(target)

    note = {"source": path.name, "sha256": source, "dtype": number_format, **made_by}
    return cached(home / fingerprint([source, number_format, made_by])[:32], make, note=note, log=log)


def make_savable(model: Any) -> None:
    """Let a model that transformers read from a GGUF file be saved: its weights are plain tensors by then, and
    transformers refuses what it still believes to be quantised."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _is_model(header: dict[str, Any]) -> bool:
    return header.get("general.type", "model") == "model" and header.get("general.architecture") not in (None, "clip")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return struct.unpack("<" + _SCALARS[kind], file.read(struct.calcsize("<" + _SCALARS[kind])))[0]
    inner, length = struct.unpack("<IQ", file.read(12))
    if inner in (_STRING, _ARRAY):
        for _ in range(length):
            _value(file, inner)
    else:
        file.seek(length * struct.calcsize("<" + _SCALARS[inner]), 1)
    return None


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 20:
        raise ValueError(f"a text of {length} bytes in its header")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("it ends within its header")
    return data.decode("utf-8", errors="replace")
