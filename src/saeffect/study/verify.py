"""Recompute the numbers of a finished run from its stored tables, and name each that disagrees. No model is run.

Everything that needs no model is recomputed in a scratch copy, in the order of the study, each step from the recomputed
results of earlier ones: coherence, domain features, effects of steering, comparison, answer, report. So a changed
number is reported only in its own file, unless it was measured. Measured files are compared with the manifest's hashes.
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
from saeffect.study.results import read_table
from saeffect.study.run_folder import RunFolder, read_manifest
from saeffect.study.stages.compare import run_compare
from saeffect.study.stages.dose_search import chosen_dose
from saeffect.study.stages.features import run_coherence
from saeffect.study.stages.push import write_pushed_words
from saeffect.study.stages.report import run_models_report, run_report
from saeffect.study.stages.select import run_select, stored_verdicts, write_selection
from saeffect.study.stages.steer import effect_tables
from saeffect.study.study import Study

__all__ = ["Disagreement", "Verified", "compare_files", "verify"]

_RTOL, _ATOL = 1e-7, 1e-12  # sums on another processor differ in the last digits
_SHOWN = 60  # characters of a value
_KEYS = ("quantity", "comparison", "arm", "a", "b", "feature", "outcome", "placebo", "group", "basis", "name", "word")
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
    """Disagreements, in the order of the study; numbers of files compared with the manifest's hashes, of files
    recomputed, and of their values; and a note on package versions that may explain disagreements.
    """

    disagreements: tuple[Disagreement, ...]
    files: int
    recomputed: int
    values: int
    note: str


def verify(folder: Path | str, log: Log = SILENT) -> Verified:
    """Check a finished run; writes nothing to it. NotFound: no run there, or a file that the study names (an SAE, a
    word list) is missing. ConfigError: the run is not finished. BadFile: a table that cannot be read.
    """
    run_folder = Path(folder)
    manifest = read_manifest(run_folder)
    study = Study.open(run_folder / "study.yaml")
    for stage in ("compare", "report") if study.has_saes else ("report",):
        if stage not in manifest["stages"]:
            fix = "run it: saeffect run STUDY."
            raise ConfigError(f"the run is not finished: there is no {stage}.", at=str(run_folder), fix=fix)
    disagreements = list(_changed_files(RunFolder(run_folder, study), manifest))
    counts = {"recomputed": 0, "values": 0}
    with tempfile.TemporaryDirectory(prefix="saeffect-verify-") as scratch:
        copy = Path(scratch) / "run"
        shutil.copytree(
            run_folder,
            copy,
            # Writing replaces a link, never the file that it points to.
            copy_function=lambda source, target: Path(target).symlink_to(Path(source).absolute()),
            ignore=shutil.ignore_patterns(".saeffect-*", "partial", "verdicts.sqlite*"),
        )
        run = RunFolder(copy, study)
        for name, work in _recomputations(run, log):
            log(f"  {name}")
            try:
                written = list(work())
            except SaeffectError as error:
                # A changed table causes this; an unchanged one cannot, or the run would not have finished.
                if isinstance(error, NotFound) or not disagreements:
                    raise
                disagreements.append(Disagreement(name, "", f"cannot be recomputed: {error.message}"))
                break
            for path in written:
                stored = run_folder / path.relative_to(copy)
                n_values, lines = compare_files(stored, path)
                counts["recomputed"] += 1
                counts["values"] += n_values
                disagreements += [Disagreement(str(path.relative_to(copy)), *line) for line in lines]
    files = sum(len(note["outputs"]) for note in manifest["stages"].values())
    return Verified(tuple(disagreements), files, counts["recomputed"], counts["values"], _other_versions(manifest))


def _changed_files(run: RunFolder, manifest: dict[str, Any]) -> Iterator[Disagreement]:
    """Files that were changed or removed after their stage wrote them."""
    for key, note in manifest["stages"].items():
        for name, digest in note["outputs"].items():
            path = run.output(name)
            if path is None:
                yield Disagreement(name, "", f"is missing; the stage {key!r} wrote it")
            elif hash_file(path) != digest:
                yield Disagreement(name, "", f"is not as the stage {key!r} wrote it")


def _recomputations(run: RunFolder, log: Log) -> Iterator[tuple[str, Callable[[], Iterable[Path]]]]:
    """The stages that need no model, by name, in the study's order."""
    if run.study.config.push is not None:
        yield "words of the push", partial(write_pushed_words, run)
    if not run.study.has_saes:
        yield "report", lambda: run_models_report(run, log)
        return
    arms = list(run.study.config.arms)
    for arm in arms:
        yield f"coherence {arm}", partial(run_coherence, run, arm, log)
    # Newer verdicts may exist; the run was made with the stored ones.
    verdicts = None if run.study.config.selection.verdicts else stored_verdicts(run)
    yield "select", (lambda: run_select(run, log)) if verdicts is None else partial(write_selection, run, verdicts)
    for arm in arms if run.study.config.steering is not None else ():
        yield f"effects of steering, {arm}", partial(_recompute_effects, run, arm)
    yield "compare", lambda: run_compare(run, log)
    yield "report", lambda: run_report(run, log)


def _recompute_effects(run: RunFolder, arm: str) -> Iterator[Path]:
    """An arm's effects from its texts' scores."""
    trials = run.table_or_none(run.arm(arm, "interventions.parquet"))
    if trials is None:
        return
    direct = run.table_or_none(run.arm(arm, "direct_effects.parquet"))
    for name, table in effect_tables(run.study, trials, direct, dose=chosen_dose(run)[0]).items():
        path = run.arm(arm, f"{name}.parquet")
        stored = run.read_table(path)
        if len(stored) == len(table):  # why a feature could not be steered needs the model
            table["reason"] = stored["reason"]
        yield run.write_table(path, table)


def compare_files(stored: Path, recomputed: Path) -> tuple[int, list[tuple[str, str]]]:
    """The number of values in a file, and where the two files differ: (place, what)."""
    if not stored.is_file():
        return 0, [("", "is missing")]
    if stored.suffix == ".parquet":
        return _compare_tables(read_table(stored), pd.read_parquet(recomputed))
    if stored.suffix == ".csv":
        as_text: dict[str, Any] = {"dtype": str, "keep_default_na": False}
        return _compare_tables(pd.read_csv(stored, **as_text), pd.read_csv(recomputed, **as_text))
    if stored.suffix == ".json":
        lines = list(_compare_values(read_json(stored), read_json(recomputed), ""))
        return 1, lines[:1]
    if stored.suffix == ".html":
        return _compare_pages(stored.read_text(encoding="utf-8"), recomputed.read_text(encoding="utf-8"))
    return 0, []  # pictures


def _compare_tables(stored: pd.DataFrame, fresh: pd.DataFrame) -> tuple[int, list[tuple[str, str]]]:
    if list(stored.columns) != list(fresh.columns):
        different = sorted({*stored.columns} ^ {*fresh.columns})
        return 0, [("", f"other columns: {', '.join(map(str, different)) or 'in another order'}")]
    if len(stored) != len(fresh):
        return 0, [("", f"{len(stored)} rows, recomputed {len(fresh)}")]
    differences = []
    for column in stored.columns:
        rows = np.flatnonzero([not _is_same(a, b) for a, b in zip(stored[column], fresh[column], strict=True)])
        for row in rows[:1]:
            more = f" (and {len(rows) - 1} more in this column)" if len(rows) > 1 else ""
            pair = f"is {_format_value(stored[column].iloc[row])}, recomputed {_format_value(fresh[column].iloc[row])}"
            differences.append((_row_name(fresh, int(row)), f"{column} {pair}{more}"))
    return stored.size, differences


def _row_name(table: pd.DataFrame, row: int) -> str:
    keys = [key for key in _KEYS if key in table][:4]
    return ", ".join(f"{key} {table[key].iloc[row]}" for key in keys) or f"row {row + 1}"


def _compare_values(stored: Any, fresh: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(stored, dict) and isinstance(fresh, dict) and stored.keys() == fresh.keys():
        for key in fresh:
            yield from _compare_values(stored[key], fresh[key], f"{place}.{key}" if place else str(key))
    elif isinstance(stored, list) and isinstance(fresh, list) and len(stored) == len(fresh):
        for index, pair in enumerate(zip(stored, fresh, strict=True)):
            yield from _compare_values(*pair, f"{place}[{index}]")
    elif not _is_same(stored, fresh):
        yield place, f"is {_format_value(stored, fresh)}, recomputed {_format_value(fresh, stored)}"


def _is_same(stored: Any, fresh: Any) -> bool:
    if isinstance(stored, list | tuple | np.ndarray) and isinstance(fresh, list | tuple | np.ndarray):
        return len(stored) == len(fresh) and all(map(_is_same, stored, fresh))
    numbers = (bool, np.bool_, str, type(None))
    if isinstance(stored, numbers) or isinstance(fresh, numbers):
        return bool(stored == fresh) or _is_same_number(stored, fresh)
    if pd.isna(stored) or pd.isna(fresh):
        return bool(pd.isna(stored) and pd.isna(fresh))
    return math.isclose(stored, fresh, rel_tol=_RTOL, abs_tol=_ATOL) or stored == fresh


def _is_same_number(stored: Any, fresh: Any) -> bool:
    """Whether two texts of a CSV are the same number up to rounding."""
    try:
        return math.isclose(float(stored), float(fresh), rel_tol=_RTOL, abs_tol=_ATOL)
    except (TypeError, ValueError):
        return False


def _format_value(value: Any, other: Any = None) -> str:
    """A value; of a long text, the part where it begins to differ from `other`."""
    text = repr(value.item() if isinstance(value, np.generic) else value)
    if len(text) <= _SHOWN:
        return text
    n_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, repr(other), strict=False)))
    start = max(0, n_same - _SHOWN // 2)
    return f"{'…' if start else ''}{text[start : start + _SHOWN]}…"


def _compare_pages(stored: str, fresh: str) -> tuple[int, list[tuple[str, str]]]:
    """Compare the words and numbers of two pages; pictures are drawn from tables that are compared themselves."""
    stored_lines, fresh_lines = (re.split(r"\n|(?<=>)", _PICTURE.sub("", page)) for page in (stored, fresh))
    for line, (a, b) in enumerate(zip(stored_lines, fresh_lines, strict=False), start=1):
        if a != b:
            return len(fresh_lines), [(f"piece {line}", f"is {_format_value(a, b)}, recomputed {_format_value(b, a)}")]
    return len(fresh_lines), [] if len(stored_lines) == len(fresh_lines) else [
        ("", "is longer or shorter than recomputed")
    ]


def _other_versions(manifest: dict[str, Any]) -> str:
    """Packages whose versions have changed since the run."""
    current = versions()
    recorded = [note.get("versions", {}) for note in manifest["stages"].values()]
    packages = {item for entry in recorded for item in entry.items()}
    different = sorted(f"{k} {v} (now {current.get(k, 'none')})" for k, v in packages if current.get(k) != v)
    return f"made with {', '.join(different)}" if different else ""
