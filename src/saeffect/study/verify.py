"""Recompute the numbers of a finished run from its stored tables, and name each that disagrees. No model is run.

What no model is needed for is done again in a scratch copy, in the order of the study, each on what was recomputed
before: coherence, domain features, effects of steering, comparison, answer, report. So a changed number is named where
it stands and, unless it was measured, nowhere else. Measured files are held against the hashes in the manifest.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.errors import ConfigError, NotFound, SaeffectError
from saeffect.io import hash_file, read_json, versions
from saeffect.progress import SILENT, Log
from saeffect.study.run_folder import RunFolder, read_manifest, read_table
from saeffect.study.stages.compare import run_compare
from saeffect.study.stages.dose_search import chosen_dose
from saeffect.study.stages.features import run_coherence
from saeffect.study.stages.report import run_models_report, run_report
from saeffect.study.stages.select import run_select, stored_verdicts, write_selection
from saeffect.study.stages.steer import effect_tables
from saeffect.study.study import Study

__all__ = ["Disagreement", "Verified", "differing", "verify"]

_RTOL, _ATOL = 1e-7, 1e-12  # sums on another processor differ in the last digits
_SHOWN = 60  # characters of a value
_KEYS = ("quantity", "comparison", "arm", "a", "b", "feature", "outcome", "placebo", "group", "basis", "name")
_PICTURE = re.compile(r"<svg.*?</svg>|data:[a-z/+-]+;base64,[A-Za-z0-9+/=]*", re.DOTALL)


@dataclass(frozen=True)
class Disagreement:
    """A file of the run, the place in it, and what is wrong there."""

    file: str
    place: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.place, self.what) if part)


@dataclass(frozen=True)
class Verified:
    """What was found, in the order of the study: a file's own change before what follows from it. How many files were
    compared with the manifest's hashes, how many recomputed, with how many values; and versions that may explain
    disagreements.
    """

    disagreements: tuple[Disagreement, ...]
    files: int
    recomputed: int
    values: int
    note: str


def verify(folder: Path | str, log: Log = SILENT) -> Verified:
    """Check a finished run; writes nothing to it. NotFound: no run there, or a file that the study names (an SAE, a
    word list) is gone. ConfigError: the run was not finished. BadFile: a table that cannot be read.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    study = Study.open(place / "study.yaml")
    for stage in ("compare", "report") if study.has_saes else ("report",):
        if stage not in manifest["stages"]:
            fix = "run it: saeffect run STUDY."
            raise ConfigError(f"the run is not finished: there is no {stage}.", at=str(place), fix=fix)
    found = list(_changed(RunFolder(place, study), manifest))
    counts = {"recomputed": 0, "values": 0}
    with tempfile.TemporaryDirectory(prefix="saeffect-verify-") as scratch:
        copy = Path(scratch) / "run"
        shutil.copytree(
            place,
            copy,
            copy_function=_link,
            ignore=shutil.ignore_patterns(".saeffect-*", "partial", "verdicts.sqlite*"),
        )
        run = RunFolder(copy, study)
        for name, work in _recomputed(run, log):
            log(f"  {name}")
            try:
                written = list(work())
            except SaeffectError as error:
                # A table that was changed, not one that the run was finished with.
                if isinstance(error, NotFound) or not found:
                    raise
                found.append(Disagreement(name, "", f"cannot be recomputed: {error.message}"))
                break
            for path in written:
                stored = place / path.relative_to(copy)
                seen, lines = differing(stored, path)
                counts["recomputed"] += 1
                counts["values"] += seen
                found += [Disagreement(str(path.relative_to(copy)), *line) for line in lines]
    files = sum(len(note["outputs"]) for note in manifest["stages"].values())
    return Verified(tuple(found), files, counts["recomputed"], counts["values"], _other_versions(manifest))


def _link(source: str, target: str) -> None:
    """A file of the scratch copy; writing replaces the link, never what it points to."""
    Path(target).symlink_to(Path(source).absolute())


def _changed(run: RunFolder, manifest: dict[str, Any]) -> Iterator[Disagreement]:
    """Files that are not as their stage wrote them."""
    for key, note in manifest["stages"].items():
        for name, digest in note["outputs"].items():
            path = run.output(name)
            if path is None:
                yield Disagreement(name, "", f"is missing; the stage {key!r} wrote it")
            elif hash_file(path) != digest:
                yield Disagreement(name, "", f"is not as the stage {key!r} wrote it")


def _recomputed(run: RunFolder, log: Log) -> Iterator[tuple[str, Callable[[], Iterable[Path]]]]:
    """The stages that need no model, in the study's order, each when its turn comes."""
    if not run.study.has_saes:
        yield "report", lambda: run_models_report(run, log)
        return
    arms = list(run.study.config.arms)
    for arm in arms:
        yield f"coherence {arm}", partial(run_coherence, run, arm, log)
    # People may have gone on judging since: what counts are the verdicts that the run was made with.
    said = None if run.study.config.selection.verdicts else stored_verdicts(run)
    yield "select", (lambda: run_select(run, log)) if said is None else partial(write_selection, run, said)
    for arm in arms if run.study.config.steering is not None else ():
        yield f"effects of steering, {arm}", partial(_steering, run, arm)
    yield "compare", lambda: run_compare(run, log)
    yield "report", lambda: run_report(run, log)


def _steering(run: RunFolder, arm: str) -> Iterator[Path]:
    """An arm's effects from its texts' scores."""
    trials = run.table_or_none(run.arm(arm, "interventions.parquet"))
    if trials is None:
        return
    direct = run.table_or_none(run.arm(arm, "direct_effects.parquet"))
    for name, table in effect_tables(run.study, trials, direct, dose=chosen_dose(run)[0]).items():
        path = run.arm(arm, f"{name}.parquet")
        stored = run.read_table(path)
        if len(stored) == len(table):  # why a feature could not be steered, only the model says
            table["reason"] = stored["reason"]
        yield run.write_table(path, table)


def differing(stored: Path, recomputed: Path) -> tuple[int, list[tuple[str, str]]]:
    """How many values a file holds, and where two of them differ: (place, what)."""
    if not stored.is_file():
        return 0, [("", "is missing")]
    if stored.suffix == ".parquet":
        return _tables(read_table(stored), pd.read_parquet(recomputed))
    if stored.suffix == ".csv":
        kept: dict[str, Any] = {"dtype": str, "keep_default_na": False}
        return _tables(pd.read_csv(stored, **kept), pd.read_csv(recomputed, **kept))
    if stored.suffix == ".json":
        lines = list(_values(read_json(stored), read_json(recomputed), ""))
        return 1, lines[:1]
    if stored.suffix == ".html":
        return _pages(stored.read_text(encoding="utf-8"), recomputed.read_text(encoding="utf-8"))
    return 0, []  # pictures


def _tables(stored: pd.DataFrame, fresh: pd.DataFrame) -> tuple[int, list[tuple[str, str]]]:
    if list(stored.columns) != list(fresh.columns):
        other = sorted({*stored.columns} ^ {*fresh.columns})
        return 0, [("", f"other columns: {', '.join(map(str, other)) or 'in another order'}")]
    if len(stored) != len(fresh):
        return 0, [("", f"{len(stored)} rows, recomputed {len(fresh)}")]
    found = []
    for column in stored.columns:
        unlike = np.flatnonzero([not _same(a, b) for a, b in zip(stored[column], fresh[column], strict=True)])
        for row in unlike[:1]:
            more = f" (and {len(unlike) - 1} more in this column)" if len(unlike) > 1 else ""
            pair = f"is {_shown(stored[column].iloc[row])}, recomputed {_shown(fresh[column].iloc[row])}"
            found.append((_row_name(fresh, int(row)), f"{column} {pair}{more}"))
    return stored.size, found


def _row_name(table: pd.DataFrame, row: int) -> str:
    keys = [key for key in _KEYS if key in table][:4]
    return ", ".join(f"{key} {table[key].iloc[row]}" for key in keys) or f"row {row + 1}"


def _values(stored: Any, fresh: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(stored, dict) and isinstance(fresh, dict) and stored.keys() == fresh.keys():
        for key in fresh:
            yield from _values(stored[key], fresh[key], f"{place}.{key}" if place else str(key))
    elif isinstance(stored, list) and isinstance(fresh, list) and len(stored) == len(fresh):
        for index, pair in enumerate(zip(stored, fresh, strict=True)):
            yield from _values(*pair, f"{place}[{index}]")
    elif not _same(stored, fresh):
        yield place, f"is {_shown(stored, fresh)}, recomputed {_shown(fresh, stored)}"


def _same(stored: Any, fresh: Any) -> bool:
    if isinstance(stored, list | tuple | np.ndarray) and isinstance(fresh, list | tuple | np.ndarray):
        return len(stored) == len(fresh) and all(map(_same, stored, fresh))
    numbers = (bool, np.bool_, str, type(None))
    if isinstance(stored, numbers) or isinstance(fresh, numbers):
        return bool(stored == fresh) or _as_number(stored, fresh)
    if pd.isna(stored) or pd.isna(fresh):
        return bool(pd.isna(stored) and pd.isna(fresh))
    return math.isclose(stored, fresh, rel_tol=_RTOL, abs_tol=_ATOL) or stored == fresh


def _as_number(stored: Any, fresh: Any) -> bool:
    """Whether two texts, of a CSV, are the same number up to rounding."""
    try:
        return math.isclose(float(stored), float(fresh), rel_tol=_RTOL, abs_tol=_ATOL)
    except (TypeError, ValueError):
        return False


def _shown(value: Any, other: Any = None) -> str:
    """A value; of two long texts the part where they begin to differ."""
    text = repr(value.item() if isinstance(value, np.generic) else value)
    if len(text) <= _SHOWN:
        return text
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, repr(other), strict=False)))
    start = max(0, alike - _SHOWN // 2)
    return f"{'…' if start else ''}{text[start : start + _SHOWN]}…"


def _pages(stored: str, fresh: str) -> tuple[int, list[tuple[str, str]]]:
    """The words and numbers of two pages; pictures are drawn from tables that were compared."""
    ours, theirs = (re.split(r"\n|(?<=>)", _PICTURE.sub("", page)) for page in (stored, fresh))
    for line, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1):
        if a != b:
            return len(theirs), [(f"piece {line}", f"is {_shown(a, b)}, recomputed {_shown(b, a)}")]
    return len(theirs), [] if len(ours) == len(theirs) else [("", "is longer or shorter than recomputed")]


def _other_versions(manifest: dict[str, Any]) -> str:
    """Packages that were other versions when the run was made."""
    now = versions()
    made = [note.get("versions", {}) for note in manifest["stages"].values()]
    other = sorted({f"{k} {v} (now {now.get(k, 'none')})" for note in made for k, v in note.items() if now.get(k) != v})
    return f"made with {', '.join(other)}" if other else ""
