"""SAEs by name: `saelens:<release>/<id>` and `hf:<owner>/<repository>[@<revision>]/<folder or file>`.

Files are fetched by huggingface_hub only, so that its cache, tokens, mirrors and offline mode apply. The result is a
folder that `saeffect.sae.formats` reads: the one in the hub's cache if it is complete; else one in this package's
cache, completed from the list of published SAEs, or converted from a pickled file of weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeffect.errors import BadFile, ConfigError, IncompatibleSae, NotFound, SaeffectError, Unreachable, first_line
from saeffect.io import fingerprint, read_json, write_json
from saeffect.lm.gguf import cache_folder, cached_folder
from saeffect.paths import user_path
from saeffect.progress import SILENT
from saeffect.published import SAELENS, PublishedSae, find_published
from saeffect.sae.formats.llama_scope import SCALER
from saeffect.sae.formats.saelens import WHITENING
from saeffect.sae.formats.state_dicts import PICKLED

__all__ = ["HF", "forget", "is_sae_name", "locate_sae"]

HF = "hf:"
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+))?")
# Files that make up an SAE in one of the layouts: settings and weights.
_FILES = (
    "cfg.json",
    "config.json",
    "hyperparams.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "model.safetensors",
    "ae.pt",
    "checkpoints/final.safetensors",
    SCALER,
    WHITENING,
)
_SETTINGS = ("cfg.json", "config.json", "hyperparams.json", SCALER, WHITENING)
_INCOMPLETE = ("sae_lens", "llama_scope_r1_distill")  # layouts whose files must be completed from the list
# Layouts whose training texts began as the tokenizer does; Qwen's has no BOS token.
_AS_THE_TOKENIZER = ("dictionary_learning_1", "qwen_scope")
_CHANGES = 1  # raised when what is written to the cache changes
_NOT_ASKED = "the hub must not be asked (HF_HUB_OFFLINE is set)"
_RUN_ONCE = "run once with a connection, or copy the cache of a machine that has it (HF_HOME)."


@dataclass(frozen=True)
class _Location:
    """Where an SAE is on the hub; `published` is its entry in the list."""

    repo: str
    path: str
    revision: str | None
    published: PublishedSae | None


def is_sae_name(source: Path | str) -> bool:
    """Whether this names an SAE on the hub, rather than a folder.

    Example:
        >>> is_sae_name("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre"), is_sae_name("saes/base")
        (True, False)
    """
    return str(source).startswith((SAELENS, HF))


def locate_sae(source: Path | str, *, at: str | None = None) -> Path:
    """The folder of an SAE, fetched on the first call; a path is returned whether or not it exists.

    UnknownName: a release or id that the list does not have. ConfigError: a name of another form, or an impossible
    path. NotFound: no such repository, folder or file, or no permission to read it. Unreachable: not in the cache, and
    the hub cannot be reached or must not be (offline mode). IncompatibleSae: a kind of SAE that is not read. BadFile: a
    pickled file that would run code, or holds no SAE.
    """
    if not is_sae_name(source):
        return user_path(source, at=at)
    return _locate(str(source), at or str(source))


# Cached: a study locates each SAE many times, and the hub should be asked once a process.
@functools.lru_cache(maxsize=256)
def _locate(name: str, at: str) -> Path:
    location = _parse(name, at)
    if location.published is not None and location.published.not_read:
        raise IncompatibleSae(
            f"{name} is a {location.published.not_read}, which is not read.",
            at=at,
            fix=f"saeffect saes --model {location.published.model} lists SAEs of this model.",
        )
    if location.path.endswith(PICKLED):
        return _convert_file(location, name, at)
    folder = _fetch_folder(location, name, at)
    if (folder / "ae.pt").is_file():
        return _convert(folder / "ae.pt", location, name, at)
    published = location.published
    has_additions = (
        published is not None and published.layout in _INCOMPLETE and (published.overrides or published.scale)
    )
    return _complete_settings(folder, location, name) if has_additions else folder


def forget() -> None:
    """Drop the located folders, so that the hub is asked again for every name."""
    _locate.cache_clear()


def _parse(name: str, at: str) -> _Location:
    if name.startswith(SAELENS):
        published = find_published(name.removeprefix(SAELENS), at=at)
        assert published is not None
        return _Location(published.repo, published.path, None, published)
    match = _NAME.fullmatch(name.removeprefix(HF).rstrip("/"))
    if match is None or ".." in name:
        raise ConfigError(
            f"{name!r} names no SAE on the hub.", at=at, fix="write hf:<owner>/<repository>/<folder of the SAE>."
        )
    repo, path = match["repo"], match["path"] or ""
    return _Location(repo, path, match["revision"], find_published(repo=repo, path=path))


def _fetch_folder(location: _Location, name: str, at: str) -> Path:
    """The SAE's folder in the hub's cache, with all of its files that the hub has."""
    from huggingface_hub import snapshot_download

    patterns = [f"{location.path}/{file}" if location.path else file for file in _FILES]
    patterns.append("config.json")  # sparsify's, which names the model
    with _hub_errors(location, name, at):
        snapshot = snapshot_download(location.repo, revision=location.revision, allow_patterns=patterns)
    folder = Path(snapshot) / location.path
    if not any((folder / file).is_file() for file in _FILES if file not in _SETTINGS):
        raise _missing_error(location, name, at)
    return folder


def _fetch_file(location: _Location, file: str, name: str, at: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(location, name, at):
        return Path(hf_hub_download(location.repo, file, revision=location.revision))


def _convert_file(location: _Location, name: str, at: str) -> Path:
    """The converted folder of a single pickled file, with the settings file beside it, if there is one."""
    from huggingface_hub.errors import EntryNotFoundError

    stem = location.path.rpartition(".")[0]
    if location.published is None or location.published.layout == "connor_rob_hook_z":
        try:
            _fetch_file(location, f"{stem}_cfg.json", name, at)
        except SaeffectError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
    return _convert(_fetch_file(location, location.path, name, at), location, name, at)


def _convert(file: Path, location: _Location, name: str, at: str) -> Path:
    from saeffect.sae.convert import convert_sae

    make = functools.partial(convert_sae, file, facts=_facts(location), source_name=name, at=at)
    return _cache(file.resolve(), location, name, make)


def _complete_settings(folder: Path, location: _Location, name: str) -> Path:
    """A folder whose cfg.json is completed from the list; its weights are links to the hub's cache."""
    published = location.published
    assert published is not None

    def make(target: Path) -> None:
        target.mkdir(parents=True)
        for file in folder.iterdir():
            if file.is_file() and file.name not in ("cfg.json",):
                (target / file.name).symlink_to(file.resolve())
        if (folder / "cfg.json").is_file():
            raw = read_json(folder / "cfg.json")
            if not isinstance(raw, dict):
                raise BadFile("cfg.json holds no mapping.", at=name)
            raw |= published.overrides
            if isinstance(raw.get("metadata"), dict):
                raw["metadata"] |= published.overrides
            write_json(target / "cfg.json", raw)
            if raw.get("normalize_activations") not in ("expected_average_only_in", True):
                return
        if published.scale:
            write_json(target / SCALER, {"scaling_factor": published.scale})

    return _cache(folder.resolve(), location, name, make)


def _cache(source: Path, location: _Location, name: str, make: Any) -> Path:
    """The folder in this package's cache that `make` writes from `source`, a path in the hub's cache."""
    scale, overrides = (location.published.scale, location.published.overrides) if location.published else (0, {})
    key = fingerprint([_CHANGES, location.repo, location.path, str(source), scale, dict(overrides)])[:32]
    note = {"source": name, "repository": location.repo, "path": location.path}
    return cached_folder(cache_folder() / "saes" / key, make, note=note, log=SILENT)


def _facts(location: _Location) -> dict[str, Any]:
    """Facts from the list about a state dict, see `sae_of_state_dict`; none for a file that is not in it."""
    published = location.published
    if published is None:
        return {}
    metadata: dict[str, Any] = {"model_name": published.model}
    if published.layout not in _AS_THE_TOKENIZER:
        metadata["prepend_bos"] = True
    if published.hook:
        metadata["hook_name"] = published.hook
    if published.neuronpedia_id:
        metadata["neuronpedia_id"] = published.neuronpedia_id
    facts: dict[str, Any] = {"metadata": metadata}
    if published.layout == "qwen_scope":
        k = re.search(r"L0_(\d+)$", published.repo)
        facts |= {"architecture": "topk", "k": int(k[1]) if k else None, "subtracts_b_dec": False}
    return facts


@contextmanager
def _hub_errors(location: _Location, name: str, at: str) -> Iterator[None]:
    """Turn errors of the hub's client into SaeffectErrors."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:
        error_type: type[SaeffectError] = NotFound
        fix: str | None = "check the name on the hub."
        if isinstance(error, errors.GatedRepoError):
            message = f"{location.repo} asks for agreement to its terms before it can be read."
            fix = f"accept them at https://huggingface.co/{location.repo}, then log in: hf auth login."
        elif isinstance(error, errors.RevisionNotFoundError):
            message = f"{location.repo} has no revision {location.revision!r}."
        elif isinstance(error, errors.RepositoryNotFoundError):
            message = f"the hub has no repository {location.repo!r} that you can read."
            fix = "check the name; for a private one log in: hf auth login."
        elif isinstance(error, errors.HFValidationError):
            error_type, fix = ConfigError, None
            message = f"{location.repo!r} is not a valid repository name: {first_line(error)}"
        elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            why = _NOT_ASKED if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            error_type, message, fix = Unreachable, f"{name} is not in the hub's cache, and {why}.", _RUN_ONCE
        elif isinstance(error, errors.EntryNotFoundError):
            message = f"{location.repo} has no file {location.path!r}."
        else:
            error_type, message = Unreachable, f"{name} could not be fetched: {first_line(error)}"
            fix = "check the connection; HF_ENDPOINT names a mirror, HF_HOME a cache."
        raise error_type(message, at=at, fix=fix) from error


def _missing_error(location: _Location, name: str, at: str) -> SaeffectError:
    from huggingface_hub import constants

    what = f"the folder {location.path!r}" if location.path else "the repository's main folder"
    if constants.HF_HUB_OFFLINE:
        absent = f"{name} is not in the hub's cache ({location.repo} is, without an SAE in {what})"
        return Unreachable(f"{absent}, and {_NOT_ASKED}.", at=at, fix=_RUN_ONCE)
    folders = _list_sae_folders(location.repo, location.revision)
    listing = f" It has: {', '.join(folders[:6])}{', ...' if len(folders) > 6 else ''}." if folders else ""
    return NotFound(
        f"{location.repo} has no SAE in {what}.{listing}",
        at=at,
        fix="write hf:<owner>/<repository>/<folder>, with the folder of one SAE.",
    )


def _list_sae_folders(repo: str, revision: str | None) -> Sequence[str]:
    """Folders of a repository that hold an SAE; none if the hub cannot list them."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # of many kinds; only a hint in the message is lost
        return ()
    last = tuple(file for file in _FILES if file not in _SETTINGS)
    return sorted({file.rpartition("/")[0] for file in files if file.endswith(last)} - {""})
