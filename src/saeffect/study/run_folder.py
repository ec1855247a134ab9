"""The run directory: finished stages, their fingerprints and their files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from saeffect.errors import BadFile, ConfigError, NotFound
from saeffect.provenance import atomic_path, fingerprint, hash_file, read_json, versions, write_json
from saeffect.study.study import Study

__all__ = ["RunFolder"]


class RunFolder:
    """Reads and writes one run directory. Nothing is written before a first stage has finished.

    Args:
        folder: The directory; it need not exist.
        study: The study that it belongs to.

    Raises:
        ConfigError: The directory belongs to a study of another name.
    """

    def __init__(self, folder: Path | str, study: Study) -> None:
        self.folder = Path(folder)
        self.study = study
        self._manifest: dict[str, Any] = {"stages": {}}
        if (self.folder / "manifest.json").is_file():
            self._manifest = read_json(self.folder / "manifest.json")
            found = self._manifest.get("study")
            if found != study.config.name:
                raise ConfigError(
                    f"this directory holds the run of another study, {found!r}.",
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
        """Read a table that a stage wrote.

        Raises:
            NotFound: The stage has not run.
            BadFile: The file is broken.
        """
        if not path.is_file():
            raise NotFound(
                f"there is no {path.relative_to(self.folder)}.",
                at=str(self.folder),
                fix="run the stage before this one.",
            )
        try:
            return pd.read_parquet(path)
        except Exception as error:  # pyarrow raises many kinds
            raise BadFile(
                f"this table cannot be read: {error}.", at=str(path), fix="delete it and run again."
            ) from error

    def table_or_none(self, path: Path) -> pd.DataFrame | None:
        """A table, or None where the stage had nothing to write."""
        return self.read_table(path) if path.is_file() else None

    @staticmethod
    def write_table(path: Path, table: pd.DataFrame) -> None:
        """Write a table atomically, the same bytes for the same values."""
        with atomic_path(path) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd")

    def digest(self, *paths: Path) -> str:
        """One hash over files that a stage reads; missing ones count as such."""
        return fingerprint([(str(p.relative_to(self.folder)), hash_file(p) if p.is_file() else None) for p in paths])

    def stage(
        self,
        key: str,
        inputs: Any,
        work: Callable[[], Iterable[Path]],
        say: Callable[[str], None],
        *,
        redo: bool = False,
    ) -> bool:
        """Do a stage's work, unless it was done with the same inputs and its files are whole.

        Files that an earlier time left and this one does not are removed, lest they be believed; not if somebody
        changed them.

        Args:
            key: Name of the stage, with the arm for per-arm stages.
            inputs: JSON-able: everything that the stage's numbers depend on.
            work: Does it, and gives the files that it wrote.
            say: Receives a line.
            redo: Do it in any case.

        Returns:
            Whether work was done.
        """
        wanted = fingerprint(inputs)
        if not redo and self.is_done(key, inputs):
            say(f"  {key}: finished before, skipped")
            return False
        started = time.monotonic()
        outputs = {str(p.relative_to(self.folder)): hash_file(p) for p in work()}
        seconds = round(time.monotonic() - started, 1)
        self._remove_outdated(key, outputs)
        note: dict[str, Any] = {"fingerprint": wanted, "outputs": outputs, "seconds": seconds}
        note["versions"] = versions()
        self._manifest["stages"][key] = note
        self._save()
        say(f"  {key}: {seconds:.1f} s")
        return True

    def _remove_outdated(self, key: str, outputs: Mapping[str, str]) -> None:
        before = self._manifest["stages"].get(key, {}).get("outputs", {})
        for name in before.keys() - outputs.keys():
            path = self.folder / name
            if path.is_file() and hash_file(path) == before[name]:
                path.unlink()

    def is_done(self, key: str, inputs: Any) -> bool:
        """Whether a stage was finished with these inputs, and its files are whole."""
        note = self._manifest["stages"].get(key)
        if not note or note["fingerprint"] != fingerprint(inputs):
            return False
        files = ((self.folder / name, digest) for name, digest in note["outputs"].items())
        return all(path.is_file() and hash_file(path) == digest for path, digest in files)

    def provenance(self) -> dict[str, Any]:
        """Versions, seed and input hashes: what made the numbers."""
        return {
            "versions": self._versions(),
            "seed": self.study.config.seed,
            "study_sha256": hashlib.sha256(self.config_yaml().encode()).hexdigest(),
            "text_sha256": self.study.text_identity,
            "arms": {name: dict(identity) for name, identity in self.study.identities.items()},
        }

    def config_yaml(self) -> str:
        """The resolved configuration. Bundled names stay names."""
        plain = self.study.config.model_dump(mode="json")
        return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))

    def _versions(self) -> dict[str, Any]:
        """Versions that made the numbers: one set, or one a stage where they were not all the same."""
        stages = self._manifest["stages"].items()
        made = {key: note["versions"] for key, note in stages if key != "report" and "versions" in note}
        different = {fingerprint(found): found for found in made.values()}
        if not different:
            return versions()
        return next(iter(different.values())) if len(different) == 1 else made

    def _save(self) -> None:
        self._manifest |= {"study": self.study.config.name} | self.provenance()
        with atomic_path(self.folder / "study.yaml") as temporary:
            temporary.write_text(self.config_yaml(), encoding="utf-8")
        write_json(self.folder / "manifest.json", self._manifest)
