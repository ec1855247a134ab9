"""SAEs on disk: one format a file, all in `FORMATS`.

In comes a folder with weights and a cfg.json (or another file of settings), which is read once; out comes a
`SparseAutoencoder`. A format is a module (or any object) with what `SaeFormat` lists; the first one that `matches`
reads the folder, and SAELens' is the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from saeffect.errors import BadFile, NotFound
from saeffect.io import fingerprint, hash_file, read_json
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats import compact, dictionary_learning, saelens, sparsify
from saeffect.sae.formats.compact import CompactSae, is_compact, load_compact, save_compact
from saeffect.sae.formats.dictionary_learning import save_dictionary_learning
from saeffect.sae.formats.saelens import SPARSITY, WEIGHTS, read_sparsity, save_sae
from saeffect.sae.formats.weights import fill, read_weights

__all__ = [
    "FORMATS",
    "SPARSITY",
    "WEIGHTS",
    "CompactSae",
    "SaeFormat",
    "fill",
    "is_compact",
    "load_compact",
    "load_sae",
    "read_sae_config",
    "read_sparsity",
    "read_weights",
    "save_compact",
    "save_dictionary_learning",
    "save_sae",
    "sae_identity",
    "saved_dtype",
    "weights_file",
]

# Files that people mistake for an SAE, by the end of their name.
_PICKLED = "a pickled file, which can run anybody's code and is never loaded"
_FILES = {
    ".safetensors": "a file of tensors alone, without the cfg.json that says what they are",
    ".npz": "an archive of NumPy arrays, which is not read",
    ".json": "a file of settings alone",
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), _PICKLED),
}


class SaeFormat(Protocol):
    """A format. `raw` is the content of cfg.json, of any type; `where` names the place in errors."""

    weights: str
    """Name of the file of weights."""

    def matches(self, folder: Path, raw: Any) -> bool: ...

    def config(self, folder: Path, raw: Any, where: str) -> SaeConfig: ...

    def load(self, folder: Path, raw: Any, where: str) -> SparseAutoencoder:
        """The SAE; its file of weights exists."""
        ...


#: In the order in which they are asked.
FORMATS: dict[str, SaeFormat] = {
    "compact": compact,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "saelens": saelens,
}


def load_sae(folder: Path | str, *, at: str | None = None) -> SparseAutoencoder:
    """Load an SAE from a folder in any of `FORMATS`, in float32, on the CPU.

    Raises:
        NotFound: A missing file.
        BadFile: Truncated or malformed weights, missing tensors, NaN.
        UnknownName: An architecture that this package does not have.
        IncompatibleSae: Tensors whose shapes contradict cfg.json, or something that this package does not support.
    """
    folder = Path(folder)
    where = at or str(folder)
    raw, how = _opened(folder, where)
    if not (folder / how.weights).is_file():
        how.config(folder, raw, where)
        raise NotFound(
            f"there is no {how.weights} beside cfg.json{_what_lies_in(folder)}.",
            at=where,
            fix="give the folder that holds both.",
        )
    return how.load(folder, raw, where).eval().requires_grad_(False)


def read_sae_config(folder: Path | str, *, at: str | None = None) -> SaeConfig:
    """What cfg.json says about an SAE.

    Raises:
        NotFound: No such folder, or no cfg.json in it.
        BadFile: Not JSON, or without valid sizes.
        UnknownName: An architecture that this package does not have.
        IncompatibleSae: A normalisation or reshaping that this package does not support.
    """
    folder = Path(folder)
    where = at or str(folder)
    raw, how = _opened(folder, where)
    return how.config(folder, raw, where)


def weights_file(folder: Path | str) -> Path:
    """Where a folder keeps, or should keep, its weights. NotFound: no cfg.json; BadFile: it is not JSON."""
    return Path(folder) / _opened(Path(folder), str(folder))[1].weights


def sae_identity(folder: Path) -> str:
    """SHA-256 of the files that decide an SAE: cfg.json and its weights. Errors as `weights_file`."""
    return fingerprint([hash_file(folder / "cfg.json"), hash_file(weights_file(folder))])


def saved_dtype(folder: Path | str) -> str:
    """The dtype in cfg.json, else that of the weights."""
    folder = Path(folder)
    raw, how = _opened(folder, str(folder))
    named = raw.get("dtype") if isinstance(raw, dict) else None
    if named is None:
        decoder = "decoder.weight" if how.weights == dictionary_learning.weights else "W_dec"
        named = read_weights(folder / how.weights, str(folder), shapes={}, required=(decoder,))[decoder].dtype
    return str(named).removeprefix("torch.")


def _opened(folder: Path, where: str) -> tuple[Any, SaeFormat]:
    fix = f"give a folder with cfg.json and {WEIGHTS}."
    if folder.is_file():
        kind = next((words for ending, words in _FILES.items() if folder.name.lower().endswith(ending)), "a file")
        beside = (folder.parent / "cfg.json").is_file()
        raise BadFile(
            f"{folder.name!r} is {kind}; an SAE is a folder.",
            at=where,
            fix=f"give the folder itself: {str(folder.parent)!r}." if beside else fix,
        )
    if not folder.is_dir():
        raise NotFound(f"there is no folder {str(folder)!r}.", at=where, fix=fix)
    if not (folder / "cfg.json").is_file():
        other = folder / dictionary_learning.settings
        raw = read_json(other) if other.is_file() else None
        if dictionary_learning.matches(folder, raw):
            return raw, dictionary_learning
        raise NotFound(f"the folder {folder.name!r} holds no cfg.json{_what_lies_in(folder)}.", at=where, fix=fix)
    raw = read_json(folder / "cfg.json")
    return raw, next(how for how in FORMATS.values() if how.matches(folder, raw))


def _what_lies_in(folder: Path) -> str:
    """What a folder without an SAE holds instead, if known."""
    there = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)) if folder.is_dir() else ()
    for path in there:
        if path.is_dir() and (path / "cfg.json").is_file():
            return f", but folders with one, such as {path.name!r}"
        kind = next((words for ending, words in _FILES.items() if path.name.lower().endswith(ending)), None)
        if kind and path.name not in ("cfg.json", SPARSITY):
            return f"; {path.name!r} there is {kind}"
    return ""
