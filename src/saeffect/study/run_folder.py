"""The run directory: finished stages, their fingerprints and their files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from saeffect.checksums import add_sealed, has_own_hash, is_sealed, with_hash
from saeffect.errors import BadFile, ConfigError, NotFound
from saeffect.io import atomic_path, fingerprint, hash_file, read_json, remove_leftovers, versions, write_json
from saeffect.progress import SILENT, Log
from saeffect.study.results import read_table
from saeffect.study.study import Study

__all__ = ["PartialTable", "RunFolder", "delete_pieces", "read_manifest", "read_table"]

_FOLDERS = ("arms", "comparison", "figures", "partial", "steering", "tables")
# A run writes these only after its manifest and study; its first stage writes gate.json alone.
_WITH_MANIFEST = ("manifest.json", "comparison", "figures", "report.html", "steering", "tables")
_TABLES_OF_ARMS = "arms/*/*.parquet"
_HEAD = "# The study as saeffect ran it. SHA-256 of the lines below: "


class RunFolder:
    """Reads and writes one run directory, which need not exist; nothing is written before the first stage has finished.

    `damage` lists unusable parts of the manifest, a line each. ConfigError if the directory belongs to a study of
    another name.
    """

    def __init__(self, folder: Path | str, study: Study) -> None:
        self.folder, self.study = Path(folder), study
        self.damage: tuple[str, ...] = ()
        self._manifest = self._read_manifest()
        recorded = self._manifest.get("study", study.config.name)
        if recorded != study.config.name:
            raise ConfigError(
                f"this directory holds the run of another study, {recorded!r}.",
                at=str(self.folder),
                fix="choose another --out.",
            )

    def path(self, *parts: str) -> Path:
        """A path inside the directory."""
        return self.folder.joinpath(*parts)

    def arm(self, name: str, file: str) -> Path:
        """A file of an arm."""
        return self.folder / "arms" / name / file

    def read_table(self, path: Path) -> pd.DataFrame:
        """Read a table of a stage; NotFound if the stage has not run, BadFile if the file is broken."""
        if not path.is_file():
            name = path.relative_to(self.folder)
            raise NotFound(f"there is no {name}.", at=str(self.folder), fix="run the stage before this one.")
        return read_table(path)

    def table_or_none(self, path: Path) -> pd.DataFrame | None:
        """A table, or None if the stage wrote none; a file that the manifest does not list is ignored."""
        name = str(path.relative_to(self.folder))
        is_listed = any(name in entry["outputs"] for entry in self._manifest["stages"].values())
        return self.read_table(path) if is_listed and path.is_file() else None

    def partial(self, key: str, inputs: Any) -> PartialTable:
        """Finished pieces of a stage's work, for resuming; deleted when the stage is in the manifest."""
        return PartialTable(self._partial_folder(key), fingerprint(inputs))

    @staticmethod
    def write_table(path: Path, table: pd.DataFrame) -> Path:
        """Write a table atomically (same values, same bytes) and return its path."""
        with atomic_path(path) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd")
        return path

    def digest(self, *paths: Path) -> str:
        """One hash over files that a stage reads, missing ones included."""
        return fingerprint([(str(p.relative_to(self.folder)), hash_file(p) if p.is_file() else None) for p in paths])

    def stage(self, key: str, inputs: Any, work: Callable[[], Iterable[Path]], log: Log, *, redo: bool = False) -> bool:
        """Do a stage's work, which returns the files it wrote, unless it was done with the same inputs (everything that
        its numbers depend on, JSON-able) and its files are undamaged; True if work was done. Files of an earlier run of
        the stage that are not written again are removed, unless somebody changed them.
        """
        if not redo and self.is_done(key, inputs):
            delete_pieces(self._partial_folder(key))
            log(f"  {key}: finished before, skipped")
            return False
        made_with, started = fingerprint(inputs), time.monotonic()
        outputs = {str(p.relative_to(self.folder)): hash_file(p) for p in work()}
        seconds = round(time.monotonic() - started, 1)
        self._remove_outdated(key, outputs)
        entry = {"fingerprint": made_with, "outputs": outputs, "seconds": seconds, "versions": versions()}
        self._manifest["stages"][key] = entry
        self._save()
        # Only now: a stage killed earlier resumes from them.
        delete_pieces(self._partial_folder(key))
        log(f"  {key}: {seconds:.1f} s")
        return True

    def refuse_foreign(self) -> None:
        """ConfigError for a changed or foreign `study.yaml`, results without manifest and study, or a linked folder."""
        for folder in self._folders():
            if folder.is_symlink():
                raise ConfigError(
                    "this is a link, so the run would write and delete in another folder; expected a folder.",
                    at=str(folder),
                    fix="remove the link, or choose another --out.",
                )
        study_file = self.path("study.yaml")
        is_ours = study_file.is_file() and not study_file.is_symlink() and has_own_hash(study_file, _HEAD)
        foreign = [] if is_ours or not os.path.lexists(study_file) else [study_file]
        if not is_ours and "study" not in self._manifest:
            foreign += [self.path(name) for name in _WITH_MANIFEST if os.path.lexists(self.path(name))]
            foreign += sorted(self.folder.glob(_TABLES_OF_ARMS))
        if foreign:
            raise ConfigError(
                f"{foreign[0].name!r} is not as a run of a study left it, and a run would write over it.",
                at=str(foreign[0]),
                fix="choose another --out, or move it elsewhere.",
            )

    def remove_leftovers(self) -> None:
        """Delete temporary files of a killed run. Only safe for the sole writer."""
        for folder in (self.folder, *self._folders()):
            remove_leftovers(folder)

    def delete_partial(self) -> None:
        """Delete the pieces of all stages, once every stage is done or no longer part of the study."""
        folder = self.path("partial")
        for stage in folder.iterdir() if folder.is_dir() else ():
            delete_pieces(stage)
        with contextlib.suppress(OSError):
            folder.rmdir()

    def _folders(self) -> list[Path]:
        """The folders that a run writes to, outer ones first."""
        outer = [self.path(name) for name in _FOLDERS]
        nested = [self.path(name) for name in ("arms", "partial")]
        return outer + [inner for folder in nested if folder.is_dir() for inner in folder.iterdir() if inner.is_dir()]

    def _partial_folder(self, key: str) -> Path:
        return self.path("partial", key.replace(" ", "-"))

    def _remove_outdated(self, key: str, outputs: Mapping[str, str]) -> None:
        previous = self._manifest["stages"].get(key, {}).get("outputs", {})
        for name in previous.keys() - outputs.keys():
            path = self.output(name)
            # Whatever the manifest says, files outside these folders, such as verdicts, stay.
            inside = path is not None and path.relative_to(self.folder).parts[0] in _FOLDERS
            if path is not None and inside and hash_file(path) == previous[name]:
                path.unlink()

    def output(self, name: str) -> Path | None:
        """The file of this name in the manifest; None if missing, outside the directory, or behind a link."""
        path = self.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        parts = [path, *(part for part in path.parents if self.folder in part.parents)]
        try:
            return path if path.is_file() and not any(part.is_symlink() for part in parts) else None
        except (OSError, ValueError):  # not a valid path
            return None

    def is_done(self, key: str, inputs: Any) -> bool:
        """Whether a stage was finished with these inputs, and its files are undamaged."""
        entry = self._manifest["stages"].get(key)
        if not entry or entry["fingerprint"] != fingerprint(inputs):
            return False
        files = [(self.output(name), digest) for name, digest in entry["outputs"].items()]
        return all(path is not None and hash_file(path) == digest for path, digest in files)

    def refuse_changed(self, *keys: str) -> None:
        """BadFile if a file that one of these stages wrote was changed; stages that have not run are skipped."""
        for key in keys:
            for name, digest in self._manifest["stages"].get(key, {}).get("outputs", {}).items():
                path = self.output(name)
                if path is None or hash_file(path) != digest:
                    fix = "run the study again: what is damaged is made anew."
                    raise BadFile(f"{name} is not as the run wrote it.", at=str(self.folder), fix=fix)

    def provenance(self) -> dict[str, Any]:
        """Versions, seed and input hashes behind the numbers."""
        return {
            "versions": self._versions(),
            "seed": self.study.config.seed,
            "study_sha256": hashlib.sha256(self.config_yaml.encode()).hexdigest(),
            "text_sha256": self.study.text_identity,
            "arms": {name: dict(identity) for name, identity in self.study.identities.items()},
        }

    @functools.cached_property
    def config_yaml(self) -> str:
        """The resolved configuration. Bundled names stay names."""
        values = self.study.config.model_dump(mode="json")
        return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100))

    def _versions(self) -> dict[str, Any]:
        """Versions behind the numbers: one set, or one per stage if they differ."""
        by_stage = {key: entry["versions"] for key, entry in self._manifest["stages"].items() if key != "report"}
        distinct = {fingerprint(versions_): versions_ for versions_ in by_stage.values()} or {"": versions()}
        return next(iter(distinct.values())) if len(distinct) == 1 else by_stage

    def _save(self) -> None:
        self._manifest |= {"study": self.study.config.name} | self.provenance()
        config = self.config_yaml
        with atomic_path(self.folder / "study.yaml") as temporary:
            temporary.write_text(with_hash(_HEAD, config), encoding="utf-8")
        write_json(self.folder / "manifest.json", self._manifest)

    def _read_manifest(self) -> dict[str, Any]:
        """The usable part of the manifest; a stage that is not in it is done again."""
        path = self.folder / "manifest.json"
        if not path.is_file():
            return {"stages": {}}
        manifest: Any = None
        with contextlib.suppress(BadFile):
            manifest = read_json(path)
        if not _is_manifest(manifest):
            self.damage = ("manifest.json is damaged, so it is not known which stages are done: all are done again",)
            return {"stages": {}}
        usable = {key: entry for key, entry in manifest["stages"].items() if _is_stage_entry(entry)}
        damaged = [key for key in manifest["stages"] if key not in usable]
        self.damage = tuple(f"manifest.json is damaged at {key!r}: this stage is done again" for key in damaged)
        return {"study": manifest["study"], "stages": usable}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run. NotFound: there is none; BadFile: it is damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        fix = "give the run directory: what --out named, or runs/<name>."
        raise NotFound("there is no manifest.json, so this is no run of a study.", at=str(folder), fix=fix)
    manifest = read_json(path)
    arms = manifest.get("arms") if _is_manifest(manifest) else None
    if not (
        isinstance(arms, dict)
        and all(isinstance(arm, dict) for arm in arms.values())
        and all(_is_stage_entry(entry) for entry in manifest["stages"].values())
    ):
        raise BadFile("the manifest is damaged.", at=str(path), fix="run the study again.")
    return dict(manifest)


def _is_manifest(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("stages"), dict) and isinstance(value.get("study"), str)


def _is_stage_entry(value: Any) -> bool:
    """Whether this is a valid manifest entry of a stage."""
    if not isinstance(value, dict) or not isinstance(value.get("fingerprint"), str):
        return False
    tables = (value.get("outputs"), value.get("versions"))
    return all(isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) for table in tables)


_PIECE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.parquet")


class PartialTable:
    """Pieces of a table, one file each, named by `made_with` (of everything that the rows depend on) and the hash of
    their content. Every process reads all pieces, so a run may resume with another number of processes.
    """

    def __init__(self, folder: Path, made_with: str) -> None:
        self._folder, self._made_with = folder, made_with[:16]

    def read(self, log: Log = SILENT) -> pd.DataFrame | None:
        """All intact pieces as one table; None if there are none."""
        pieces = list(self.pieces(log))
        return pd.concat(pieces, ignore_index=True) if pieces else None

    def pieces(self, log: Log = SILENT) -> Iterator[pd.DataFrame]:
        """The intact pieces one by one."""
        for file in sorted(self._folder.glob(f"{self._made_with}-*.parquet")):
            if is_sealed(file):
                yield pd.read_parquet(file)
            else:
                log(f"  {file.name} is damaged, so what it holds is made again")

    def add(self, rows: pd.DataFrame) -> None:
        """Keep a piece; BadFile if it cannot be written."""
        content = io.BytesIO()
        rows.to_parquet(content, index=False)
        add_sealed(self._folder, self._made_with, ".parquet", content.getvalue())


def delete_pieces(folder: Path) -> None:
    """Delete all pieces in a folder, whatever their fingerprint, and the folder if it is then empty."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for file in folder.iterdir():
        if _PIECE.fullmatch(file.name) and not file.is_dir():
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
