"""Tables of a run directory, kept in memory while their files stand: rows of one feature, and the index over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeffect.errors import first_line
from saeffect.web.features.index import FeatureIndex, Verdicts
from saeffect.web.features.query import CHOICES, MEASURES

if TYPE_CHECKING:
    from saeffect.web.site import Site

__all__ = ["ArmRoles", "RunTables", "SortedTable", "read_index"]

FloatArray = npt.NDArray[np.float64]
_OF_FEATURES = ("density", "mean_activation", "max_activation", "decoder_norm")
# Read as numbers of a dictionary: a token stands in many contexts.
_DICTIONARIES = ("tokens.list.element", "tokens.list.item", "top_tokens.list.element", "top_tokens.list.item")


@dataclass(frozen=True)
class ArmRoles:
    """The arms of a study: their roles by name, which are compared, and whether these two share one SAE."""

    roles: Mapping[str, str]
    control: str
    treatment: str
    one_sae: bool = False


class SortedTable:
    """A table whose rows are found by feature; without a column `feature` it is only `table`."""

    def __init__(self, table: pa.Table) -> None:
        self.numbers: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        if "feature" in table.column_names:
            numbers = table["feature"].to_numpy()
            if (np.diff(numbers) < 0).any():
                order = np.argsort(numbers, kind="stable")
                table, numbers = table.take(pa.array(order)), numbers[order]
            self.numbers = numbers
        self.table = table.combine_chunks()

    def rows(self, feature: int) -> list[dict[str, Any]]:
        """All rows of a feature, in the table's order."""
        low, high = np.searchsorted(self.numbers, [feature, feature + 1])
        return list(self.table.slice(low, high - low).to_pylist())


class RunTables:
    """The tables of a run by their path in it; a file that was written again is read again."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.folder = site.folder

    def get(self, name: str) -> SortedTable | None:
        """A table, None if it is not there or cannot be read (`trouble` says why)."""
        found = self._read(name)
        return found if isinstance(found, SortedTable) else None

    def trouble(self, name: str) -> str:
        """Why a table is not there; "" if it is."""
        found = self._read(name)
        return "" if isinstance(found, SortedTable) else found

    def rows(self, name: str, feature: int) -> list[dict[str, Any]]:
        """The rows of a feature, none where there is no such table."""
        table = self.get(name)
        return table.rows(feature) if table is not None else []

    def _read(self, name: str) -> SortedTable | str:
        path = self.folder / name  # an absolute path stays as it is

        def read() -> SortedTable | str:
            if not path.is_file():
                return "the stage that writes it has not finished"
            try:
                return SortedTable(pq.read_table(path, read_dictionary=list(_DICTIONARIES)))
            except Exception as error:  # pyarrow raises many kinds
                return f"{name} cannot be read ({first_line(error)}); delete it and run the study again"

        return self._site.cached(f"arrow {name}", [path], read)


def read_index(tables: RunTables, arms: ArmRoles) -> FeatureIndex:
    """The index over the arms whose feature tables are there; what other stages add is NaN until they have run."""
    parts, missing = [], {}
    for name in arms.roles:
        try:
            trouble = tables.trouble(f"arms/{name}/features.parquet")
            part = None if trouble else _arm(tables, name, arms)
        except (KeyError, pa.ArrowException, ValueError) as error:  # a table of another version or shape
            trouble, part = f"its tables are not as this version writes them ({first_line(error)})", None
        if part is None:
            missing[name] = trouble
        else:
            parts.append(part)
    n = sum(len(part.numbers) for part in parts)
    token_names: dict[str, int] = {}
    width = max((part.table.shape[1] for part in parts), default=0)
    token_table = np.full((n, width), -1, dtype=np.int32)
    start = np.cumsum([0, *(len(part.numbers) for part in parts)])
    for part, at in zip(parts, start, strict=False):
        numbers = np.array([token_names.setdefault(token, len(token_names)) for token in part.tokens] + [-1])
        token_table[at : at + len(part.numbers), : part.table.shape[1]] = numbers[part.table]
    names = {name for part in parts for name in part.columns}
    return FeatureIndex(
        arms=tuple(part.name for part in parts),
        roles=dict(arms.roles),
        start=start,
        numbers=_joined([part.numbers for part in parts], np.int64),
        columns={
            name: _joined([part.columns.get(name, np.full(len(part.numbers), np.nan)) for part in parts], np.float64)
            for name in names
        },
        codes={name: _joined([part.codes[name] for part in parts], np.int8) for name in _CODES},
        tokens=list(token_names),
        token_table=token_table,
        verdicts=Verdicts(
            **{name: _joined([part.verdicts[name] for part in parts], np.int64) for name in _VERDICTS},
            labels=[label for part in parts for label in part.labels],
        ),
        missing=missing,
    )


_CODES = ("domain", "tested", "fate_writes", "fate_fires")
_VERDICTS = ("n_yes", "n_no", "n_unsure")


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype=dtype)


@dataclass(frozen=True, eq=False)
class _Arm:
    """The part of the index that one arm gives; `table` holds numbers of `tokens`, -1 for none."""

    name: str
    numbers: npt.NDArray[np.int64]
    columns: dict[str, FloatArray]
    codes: dict[str, npt.NDArray[np.int8]]
    tokens: list[str]
    table: npt.NDArray[np.int64]
    verdicts: dict[str, npt.NDArray[np.int64]]
    labels: list[str]


def _arm(tables: RunTables, name: str, arms: ArmRoles) -> _Arm:
    features = tables.get(f"arms/{name}/features.parquet")
    assert features is not None  # the caller has looked
    numbers = features.numbers
    tokens, table = _token_lists(features.table["top_tokens"])
    measured = _by_feature(features, numbers, _OF_FEATURES)
    coherence, selection, effects = (
        _by_feature(_declared(tables.get(f"arms/{name}/{file}.parquet")), numbers, wanted)
        for file, wanted in (
            ("coherence", ("coherence",)),
            ("selection", ("matches", "is_domain", "label", *_VERDICTS)),
            ("effects", ("effect", "q", "passed")),
        )
    )
    columns = {column: _numeric(measured, column) for column in _OF_FEATURES}
    for found, wanted in ((coherence, ("coherence",)), (selection, ("matches",)), (effects, ("effect", "q"))):
        columns |= {column: _numeric(found, column) for column in wanted if column in found}
    codes = {code: np.zeros(len(numbers), dtype=np.int8) for code in _CODES}
    domain = _numeric(selection, "is_domain")
    codes["domain"][:] = np.where(domain == 1, CHOICES["domain"].index("yes"), CHOICES["domain"].index("no"))
    codes["tested"][:] = [CHOICES["tested"].index(_tested(value)) for value in _numeric(effects, "passed")]
    if name == arms.control or (arms.one_sae and name == arms.treatment):
        columns |= _changes(tables, numbers)
    for by in MEASURES:
        codes[f"fate_{by}"][:] = CHOICES["fate"].index("unknown")
    if side := {arms.control: "control", arms.treatment: "treatment"}.get(name):
        _add_fates(tables, side, numbers, columns, codes)
    labels = [str(label) if isinstance(label, str) else "" for label in selection.get("label", [None] * len(numbers))]
    verdicts = {column: np.nan_to_num(_numeric(selection, column)).astype(np.int64) for column in _VERDICTS}
    return _Arm(name, numbers, columns, codes, tokens, table, verdicts, labels)


def _by_feature(
    table: SortedTable | None, numbers: npt.NDArray[np.int64], wanted: Sequence[str], **only: str
) -> pd.DataFrame:
    """Of these columns those that a table has, a row for each number: the first of the feature's rows, of those with
    these texts in further columns; missing values where there is none.
    """
    if table is None or "feature" not in table.table.column_names:
        return pd.DataFrame(index=numbers)
    found = table.table
    for column, value in only.items():
        found = found.filter(pc.equal(found[column], value))
    known = ["feature", *(name for name in wanted if name in found.column_names)]
    return found.select(known).to_pandas().drop_duplicates("feature").set_index("feature").reindex(numbers)


def _declared(table: SortedTable | None) -> SortedTable | None:
    """The declared test's rows where a table has some."""
    if table is not None and "declared" in table.table.column_names:
        declared = table.table.filter(table.table["declared"])
        return SortedTable(declared) if declared.num_rows else table
    return table


def _numeric(table: pd.DataFrame, column: str) -> FloatArray:
    """A column as float64, NaN where it is missing."""
    return table[column].to_numpy(dtype=np.float64) if column in table else np.full(len(table), np.nan)


def _tested(passed: float) -> str:
    return "untested" if np.isnan(passed) else "passed" if passed else "failed"


def _changes(tables: RunTables, numbers: npt.NDArray[np.int64]) -> dict[str, FloatArray]:
    table = tables.get("comparison/changes.parquet")
    found: dict[str, FloatArray] = {}
    for basis in CHOICES["basis"]:
        rows = _by_feature(table, numbers, ("change", "z", "p", "basis"), basis=basis)
        if "basis" in rows and rows["basis"].notna().any():
            found |= {f"{name}_{basis}": _numeric(rows, name) for name in ("change", "z", "p")}
    return found


def _add_fates(
    tables: RunTables,
    side: str,
    numbers: npt.NDArray[np.int64],
    columns: dict[str, FloatArray],
    codes: Mapping[str, npt.NDArray[np.int8]],
) -> None:
    """Fates and matches of one of the two compared arms, by both measures."""
    table = tables.get(f"comparison/fates_{side}.parquet")
    known = {fate: code for code, fate in enumerate(CHOICES["fate"])}
    absorbed = tables.get("comparison/absorption.parquet") if side == "control" else None
    is_absorbed = _numeric(_by_feature(absorbed, numbers, ("absorbed",)), "absorbed") == 1
    for by, measure in MEASURES.items():
        rows = _by_feature(table, numbers, ("similarity", "match", "fate", "measure"), measure=measure)
        if "measure" in rows and rows["measure"].notna().any():
            columns |= {f"{name}_{by}": _numeric(rows, name) for name in ("similarity", "match")}
            codes[f"fate_{by}"][:] = rows["fate"].map(known).fillna(known["unknown"])
        codes[f"fate_{by}"][is_absorbed] = known["absorbed"]


def _token_lists(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Distinct strings of a column of lists, and their numbers [n, longest], -1 behind the end of a shorter list."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    flat = array.flatten()
    encoded = flat if pa.types.is_dictionary(flat.type) else flat.dictionary_encode()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    table = np.full((len(array), int(lengths.max(initial=0))), -1, dtype=np.int64)
    inside = np.arange(table.shape[1]) < lengths[:, None]
    table[inside] = encoded.indices.to_numpy(zero_copy_only=False)
    return [str(token) for token in encoded.dictionary.to_pylist()], table
