"""Tables of a run directory, cached until their files change: rows of one feature, and the index over all."""

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
_FEATURE_COLUMNS = ("density", "mean_activation", "max_activation", "decoder_norm")
# Read as dictionary columns: tokens repeat in many contexts.
_DICTIONARY_COLUMNS = ("tokens.list.element", "tokens.list.item", "top_tokens.list.element", "top_tokens.list.item")


@dataclass(frozen=True)
class ArmRoles:
    """The arms of a study: roles by name, the two compared ones, and whether these share one SAE."""

    roles: Mapping[str, str]
    control: str
    treatment: str
    one_sae: bool = False


class SortedTable:
    """A table sorted by feature, for look-ups; without a column `feature` only `table` is of use."""

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
    """The tables of a run by their path in it, read again when a file changes."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.folder = site.folder

    def get(self, name: str) -> SortedTable | None:
        """A table; None if it is missing or cannot be read (see `trouble`)."""
        table = self._read(name)
        return table if isinstance(table, SortedTable) else None

    def trouble(self, name: str) -> str:
        """Why a table cannot be had; "" if it can."""
        table = self._read(name)
        return "" if isinstance(table, SortedTable) else table

    def rows(self, name: str, feature: int) -> list[dict[str, Any]]:
        """The rows of a feature; [] without the table."""
        table = self.get(name)
        return table.rows(feature) if table is not None else []

    def _read(self, name: str) -> SortedTable | str:
        path = self.folder / name  # an absolute path stays as it is

        def read() -> SortedTable | str:
            if not path.is_file():
                return "the stage that writes it has not finished"
            try:
                return SortedTable(pq.read_table(path, read_dictionary=list(_DICTIONARY_COLUMNS)))
            except Exception as error:  # pyarrow raises many kinds
                return f"{name} cannot be read ({first_line(error)}); delete it and run the study again"

        return self._site.cached(f"arrow {name}", [path], read)


def read_index(tables: RunTables, arms: ArmRoles) -> FeatureIndex:
    """The index over the arms that have a feature table; columns of stages that have not run are NaN."""
    parts, missing = [], {}
    for name in arms.roles:
        try:
            trouble = tables.trouble(f"arms/{name}/features.parquet")
            part = None if trouble else _index_arm(tables, name, arms)
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
    for part, first in zip(parts, start, strict=False):
        numbers = np.array([token_names.setdefault(token, len(token_names)) for token in part.tokens] + [-1])
        token_table[first : first + len(part.numbers), : part.table.shape[1]] = numbers[part.table]
    names = {name for part in parts for name in part.columns}
    return FeatureIndex(
        arms=tuple(part.name for part in parts),
        roles=dict(arms.roles),
        start=start,
        numbers=_concat([part.numbers for part in parts], np.int64),
        columns={
            name: _concat([part.columns.get(name, np.full(len(part.numbers), np.nan)) for part in parts], np.float64)
            for name in names
        },
        codes={name: _concat([part.codes[name] for part in parts], np.int8) for name in _CODES},
        tokens=list(token_names),
        token_table=token_table,
        verdicts=Verdicts(
            **{name: _concat([part.verdicts[name] for part in parts], np.int64) for name in _VERDICTS},
            labels=[label for part in parts for label in part.labels],
        ),
        missing=missing,
    )


_CODES = ("domain", "tested", "fate_writes", "fate_fires")
_VERDICTS = ("n_yes", "n_no", "n_unsure")


def _concat(arrays: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype=dtype)


@dataclass(frozen=True, eq=False)
class _ArmPart:
    """One arm's part of the index; `table` holds indices into `tokens`, -1 for none."""

    name: str
    numbers: npt.NDArray[np.int64]
    columns: dict[str, FloatArray]
    codes: dict[str, npt.NDArray[np.int8]]
    tokens: list[str]
    table: npt.NDArray[np.int64]
    verdicts: dict[str, npt.NDArray[np.int64]]
    labels: list[str]


def _index_arm(tables: RunTables, name: str, arms: ArmRoles) -> _ArmPart:
    features = tables.get(f"arms/{name}/features.parquet")
    assert features is not None  # checked by the caller
    numbers = features.numbers
    tokens, table = _token_lists(features.table["top_tokens"])
    measured = _columns_by_feature(features, numbers, _FEATURE_COLUMNS)
    coherence, selection, effects = (
        _columns_by_feature(_declared_rows(tables.get(f"arms/{name}/{file}.parquet")), numbers, names)
        for file, names in (
            ("coherence", ("coherence",)),
            ("selection", ("matches", "is_domain", "label", *_VERDICTS)),
            ("effects", ("effect", "q", "passed")),
        )
    )
    columns = {column: _numeric(measured, column) for column in _FEATURE_COLUMNS}
    for frame, names in ((coherence, ("coherence",)), (selection, ("matches",)), (effects, ("effect", "q"))):
        columns |= {column: _numeric(frame, column) for column in names if column in frame}
    codes = {code: np.zeros(len(numbers), dtype=np.int8) for code in _CODES}
    domain = _numeric(selection, "is_domain")
    codes["domain"][:] = np.where(domain == 1, CHOICES["domain"].index("yes"), CHOICES["domain"].index("no"))
    codes["tested"][:] = [CHOICES["tested"].index(_tested(value)) for value in _numeric(effects, "passed")]
    if name == arms.control or (arms.one_sae and name == arms.treatment):
        columns |= _change_columns(tables, numbers)
    for by in MEASURES:
        codes[f"fate_{by}"][:] = CHOICES["fate"].index("unknown")
    if side := {arms.control: "control", arms.treatment: "treatment"}.get(name):
        _add_fates(tables, side, numbers, columns, codes)
    labels = [str(label) if isinstance(label, str) else "" for label in selection.get("label", [None] * len(numbers))]
    verdicts = {column: np.nan_to_num(_numeric(selection, column)).astype(np.int64) for column in _VERDICTS}
    return _ArmPart(name, numbers, columns, codes, tokens, table, verdicts, labels)


def _columns_by_feature(
    table: SortedTable | None, numbers: npt.NDArray[np.int64], columns: Sequence[str], **equal_to: str
) -> pd.DataFrame:
    """The present ones of these columns, one row per number: the feature's first row (of those where the columns
    `equal_to` have these texts), or missing values.
    """
    if table is None or "feature" not in table.table.column_names:
        return pd.DataFrame(index=numbers)
    rows = table.table
    for column, value in equal_to.items():
        rows = rows.filter(pc.equal(rows[column], value))
    present = ["feature", *(name for name in columns if name in rows.column_names)]
    return rows.select(present).to_pandas().drop_duplicates("feature").set_index("feature").reindex(numbers)


def _declared_rows(table: SortedTable | None) -> SortedTable | None:
    """The rows of the declared test, or all rows without one."""
    if table is not None and "declared" in table.table.column_names:
        declared = table.table.filter(table.table["declared"])
        return SortedTable(declared) if declared.num_rows else table
    return table


def _numeric(table: pd.DataFrame, column: str) -> FloatArray:
    """A column as float64, NaN where it is missing."""
    return table[column].to_numpy(dtype=np.float64) if column in table else np.full(len(table), np.nan)


def _tested(passed: float) -> str:
    return "untested" if np.isnan(passed) else "passed" if passed else "failed"


def _change_columns(tables: RunTables, numbers: npt.NDArray[np.int64]) -> dict[str, FloatArray]:
    table = tables.get("comparison/changes.parquet")
    columns: dict[str, FloatArray] = {}
    for basis in CHOICES["basis"]:
        rows = _columns_by_feature(table, numbers, ("change", "z", "p", "basis"), basis=basis)
        if "basis" in rows and rows["basis"].notna().any():
            columns |= {f"{name}_{basis}": _numeric(rows, name) for name in ("change", "z", "p")}
    return columns


def _add_fates(
    tables: RunTables,
    side: str,
    numbers: npt.NDArray[np.int64],
    columns: dict[str, FloatArray],
    codes: Mapping[str, npt.NDArray[np.int8]],
) -> None:
    """Fates and matches of one of the two compared arms, by both measures."""
    table = tables.get(f"comparison/fates_{side}.parquet")
    fate_codes = {fate: code for code, fate in enumerate(CHOICES["fate"])}
    absorbed = tables.get("comparison/absorption.parquet") if side == "control" else None
    is_absorbed = _numeric(_columns_by_feature(absorbed, numbers, ("absorbed",)), "absorbed") == 1
    for by, measure in MEASURES.items():
        rows = _columns_by_feature(table, numbers, ("similarity", "match", "fate", "measure"), measure=measure)
        if "measure" in rows and rows["measure"].notna().any():
            columns |= {f"{name}_{by}": _numeric(rows, name) for name in ("similarity", "match")}
            codes[f"fate_{by}"][:] = rows["fate"].map(fate_codes).fillna(fate_codes["unknown"])
        codes[f"fate_{by}"][is_absorbed] = fate_codes["absorbed"]


def _token_lists(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Distinct strings of a column of lists, and indices into them [n, longest list], padded with -1."""
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    flat = array.flatten()
    encoded = flat if pa.types.is_dictionary(flat.type) else flat.dictionary_encode()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    table = np.full((len(array), int(lengths.max(initial=0))), -1, dtype=np.int64)
    filled = np.arange(table.shape[1]) < lengths[:, None]
    table[filled] = encoded.indices.to_numpy(zero_copy_only=False)
    return [str(token) for token in encoded.dictionary.to_pylist()], table
