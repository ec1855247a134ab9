"""SAEs on disk: one format a file, all in `FORMATS`.

The input is a folder with weights and a cfg.json (or another file of settings), which is read once, or the name of an
SAE on the hub (see `saeffect.sae.hub`); the output is a `SparseAutoencoder`. A format is a module (or any object) with
the members of `SaeFormat`; the first one that `matches` reads the folder, and SAELens' is the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from saeffect.errors import BadFile, NotFound
from saeffect.io import fingerprint, hash_file, read_json
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats import compact, dictionary_learning, saelens, sparsify
from saeffect.sae.formats.compact import is_compact, load_compact, save_compact
from saeffect.sae.formats.dictionary_learning import save_dictionary_learning
from saeffect.sae.formats.gemma_scope import GemmaScope
from saeffect.sae.formats.llama_scope import SCALER, LlamaScope
from saeffect.sae.formats.saelens import SPARSITY, WEIGHTS, read_sparsity, save_sae
from saeffect.sae.formats.state_dicts import PICKLED
from saeffect.sae.formats.weights import decoder_dtype

__all__ = [
    "FORMATS",
    "SPARSITY",
    "WEIGHTS",
    "SaeFormat",
    "is_compact",
    "load_compact",
    "load_sae",
    "read_sae_config",
    "read_sparsity",
    "save_compact",
    "save_dictionary_learning",
    "save_sae",
    "sae_identity",
    "saved_dtype",
]

# Files that users pass in place of an SAE's folder, by suffix: what each is, and what to do with it.
_CONVERT = "if it is an SAE's state dict, convert it: saeffect convert-sae {file} --out FOLDER."
_NOT_FOLDERS = {
    "params.npz": ("Gemma Scope's weights, which are read from their folder", "give the folder itself: {folder}."),
    "params.safetensors": ("Gemma Scope 2's weights, which are read from their folder", "give the folder: {folder}."),
    ".safetensors": ("a file of tensors alone, without the cfg.json that says what they are", ""),
    ".npz": ("an archive of NumPy arrays, of which only Gemma Scope's params.npz is read", ""),
    ".json": ("a file of settings alone", ""),
    **dict.fromkeys(PICKLED, ("a pickled file, which can run anybody's code and is never loaded as it is", _CONVERT)),
}


class SaeFormat(Protocol):
    """A format. `raw` is the parsed cfg.json, of any type; `where` is the location named in errors. A format with
    another file of settings names it in `settings`; with "" there it has none, and `raw` is None.
    """

    weights: str
    """Name of the file of weights."""

    def matches(self, folder: Path, raw: Any) -> bool: ...

    def config(self, folder: Path, raw: Any, where: str) -> SaeConfig: ...

    def load(self, folder: Path, raw: Any, where: str) -> SparseAutoencoder:
        """The SAE; its file of weights exists."""
        ...


#: In the order in which they are tried.
FORMATS: dict[str, SaeFormat] = {
    "compact": compact,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": GemmaScope("params.npz"),
    "gemma_scope_2": GemmaScope("params.safetensors"),
    "llama_scope": LlamaScope("hyperparams.json", "checkpoints/final.safetensors"),
    "llama_scope_r1": LlamaScope("config.json", WEIGHTS),
    "saelens": saelens,
}


def load_sae(folder: Path | str, *, at: str | None = None) -> SparseAutoencoder:
    """Load an SAE from a folder in any of `FORMATS`, or by name, in float32, on the CPU.

    NotFound: a missing file. BadFile: truncated or malformed weights, missing tensors, NaN. UnknownName: another
    architecture. IncompatibleSae: shapes that contradict cfg.json, or something that is not supported.
    """
    where = at or str(folder)
    folder = _folder_of(folder, at)
    raw, sae_format = _find_format(folder, where)
    if not (folder / sae_format.weights).is_file():
        sae_format.config(folder, raw, where)
        raise NotFound(
            f"there is no {sae_format.weights} beside cfg.json{_folder_hint(folder)}.",
            at=where,
            fix="give the folder that holds both.",
        )
    return sae_format.load(folder, raw, where).eval().requires_grad_(False)


def read_sae_config(folder: Path | str, *, at: str | None = None) -> SaeConfig:
    """An SAE's configuration, from cfg.json.

    NotFound: no such folder, or no cfg.json in it. BadFile: not JSON, or without valid sizes. UnknownName: another
    architecture. IncompatibleSae: a normalisation or reshaping that is not supported.
    """
    where = at or str(folder)
    folder = _folder_of(folder, at)
    raw, sae_format = _find_format(folder, where)
    return sae_format.config(folder, raw, where)


def sae_identity(folder: Path) -> str:
    """SHA-256 of an SAE's settings and weights. NotFound: no settings; BadFile: they are not JSON."""
    sae_format = _find_format(folder, str(folder))[1]
    files = [folder / settings for settings in (_settings_file(sae_format), sae_format.weights) if settings]
    if (folder / SCALER).is_file():
        files.append(folder / SCALER)
    return fingerprint([hash_file(file) for file in files])


def saved_dtype(folder: Path | str) -> str:
    """The dtype in cfg.json, else that of the decoder."""
    folder = _folder_of(folder, None)
    raw, sae_format = _find_format(folder, str(folder))
    dtype = raw.get("dtype") if isinstance(raw, dict) else None
    if dtype is None:
        dtype = decoder_dtype(folder / sae_format.weights, str(folder))
    return str(dtype).removeprefix("torch.")


def _folder_of(source: Path | str, at: str | None) -> Path:
    from saeffect.sae.hub import locate_sae

    return locate_sae(source, at=at)


def _settings_file(sae_format: SaeFormat) -> str:
    return str(getattr(sae_format, "settings", "cfg.json"))


def _find_format(folder: Path, where: str) -> tuple[Any, SaeFormat]:
    fix = f"give a folder with cfg.json and {WEIGHTS}."
    if folder.is_file():
        kind, advice = _file_kind(folder) or ("a file", "")
        has_config = (folder.parent / "cfg.json").is_file()
        hint = advice.format(file=folder.name, folder=repr(str(folder.parent)))
        raise BadFile(
            f"{folder.name!r} is {kind}; an SAE is a folder.",
            at=where,
            fix=f"give the folder itself: {str(folder.parent)!r}." if has_config else hint or fix,
        )
    if not folder.is_dir():
        raise NotFound(f"there is no folder {str(folder)!r}.", at=where, fix=fix)
    contents: dict[str, Any] = {"": None}
    for sae_format in FORMATS.values():
        settings = _settings_file(sae_format)
        if settings not in contents and (folder / settings).is_file():
            contents[settings] = read_json(folder / settings)
        if settings in contents and sae_format.matches(folder, contents[settings]):
            return contents[settings], sae_format
    raise NotFound(f"the folder {folder.name!r} holds no cfg.json{_folder_hint(folder)}.", at=where, fix=fix)


def _file_kind(path: Path) -> tuple[str, str] | None:
    return next((words for ending, words in _NOT_FOLDERS.items() if path.name.lower().endswith(ending)), None)


def _folder_hint(folder: Path) -> str:
    """The part of an error that says what a folder without an SAE holds instead, if known."""
    children = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)) if folder.is_dir() else ()
    for path in children:
        if path.is_dir() and ((path / "cfg.json").is_file() or (path / "params.npz").is_file()):
            return f", but folders with one, such as {path.name!r}"
        kind = _file_kind(path)
        if kind and path.name not in ("cfg.json", SPARSITY):
            return f"; {path.name!r} there is {kind[0]}"
    return ""
