"""Tables of a run directory, kept in memory while their files stand: rows of one feature, and the index over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
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
    at = _Places(features.numbers)
    tokens, table = _token_lists(features.table["top_tokens"])
    columns = {column: _floats(features.table, column) for column in _OF_FEATURES}
    for file, wanted in (("coherence", ("coherence",)), ("selection", ("matches",)), ("effects", ("effect", "q"))):
        found = _declared(tables.get(f"arms/{name}/{file}.parquet"))
        columns |= {column: at.put(found, column) for column in wanted if found is not None and column in found[1]}
    selection, effects = (_declared(tables.get(f"arms/{name}/{file}.parquet")) for file in ("selection", "effects"))
    n = len(features.numbers)
    codes = {code: np.zeros(n, dtype=np.int8) for code in _CODES}
    domain = at.put(selection, "is_domain")
    codes["domain"][:] = np.where(domain == 1, CHOICES["domain"].index("yes"), CHOICES["domain"].index("no"))
    passed = at.put(effects, "passed")
    codes["tested"][:] = [CHOICES["tested"].index(_tested(value)) for value in passed]
    if name == arms.control or (arms.one_sae and name == arms.treatment):
        columns |= _changes(tables, at)
    side = {arms.control: "control", arms.treatment: "treatment"}.get(name)
    for by in MEASURES:
        codes[f"fate_{by}"][:] = CHOICES["fate"].index("unknown")
    if side:
        _add_fates(tables, side, at, columns, codes)
    labels = [""] * n
    if selection is not None and "label" in selection[1]:
        for place, label in zip(at.of(selection[0]), selection[1]["label"].to_pylist(), strict=True):
            if label and place >= 0:
                labels[place] = str(label)
    verdicts = {column: np.nan_to_num(at.put(selection, column)).astype(np.int64) for column in _VERDICTS}
    return _Arm(name, features.numbers, columns, codes, tokens, table, verdicts, labels)


_Rows = tuple[npt.NDArray[np.int64], dict[str, pa.ChunkedArray]]


class _Places:
    """Where features stand among the arm's numbers [n], which are sorted."""

    def __init__(self, numbers: npt.NDArray[np.int64]) -> None:
        self._numbers = numbers

    def of(self, features: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The place of each, -1 for none."""
        at = np.minimum(np.searchsorted(self._numbers, features), max(0, len(self._numbers) - 1))
        return np.where(self._numbers[at] == features, at, -1) if len(self._numbers) else np.full(len(features), -1)

    def put(self, rows: _Rows | None, column: str) -> FloatArray:
        """A column of some rows as float64 [n], NaN where there is no row."""
        values = np.full(len(self._numbers), np.nan)
        if rows is not None and column in rows[1]:
            at = self.of(rows[0])
            values[at[at >= 0]] = _numeric(rows[1][column])[at >= 0]
        return values


def _numeric(column: pa.ChunkedArray) -> FloatArray:
    return np.asarray(pc.cast(column, pa.float64()).to_numpy(), dtype=np.float64)


def _floats(table: pa.Table, column: str) -> FloatArray:
    if column not in table.column_names:
        return np.full(table.num_rows, np.nan)
    return _numeric(table[column])


def _rows(table: SortedTable | None, **only: str) -> _Rows | None:
    """The first row of each feature, of those with the wanted texts in some columns."""
    if table is None or "feature" not in table.table.column_names:
        return None
    found = table.table
    for column, value in only.items():
        found = found.filter(pc.equal(found[column], value))
    numbers = found["feature"].to_numpy()
    first = np.concatenate([[True], np.diff(numbers) != 0]) if len(numbers) else np.empty(0, dtype=bool)
    found = found.filter(pa.array(first))
    return found["feature"].to_numpy(), {name: found[name] for name in found.column_names}


def _declared(table: SortedTable | None) -> _Rows | None:
    """The first row of each feature, of the declared test where tests are."""
    if table is not None and "declared" in table.table.column_names:
        declared = table.table.filter(table.table["declared"])
        table = SortedTable(declared) if declared.num_rows else table
    return _rows(table)


def _tested(passed: float) -> str:
    return "untested" if np.isnan(passed) else "passed" if passed else "failed"


def _changes(tables: RunTables, at: _Places) -> dict[str, FloatArray]:
    table = tables.get("comparison/changes.parquet")
    found = {}
    for basis in CHOICES["basis"]:
        rows = _rows(table, basis=basis)
        if rows is not None and len(rows[0]):
            found |= {f"{name}_{basis}": at.put(rows, name) for name in ("change", "z", "p")}
    return found


def _add_fates(
    tables: RunTables,
    side: str,
    at: _Places,
    columns: dict[str, FloatArray],
    codes: Mapping[str, npt.NDArray[np.int8]],
) -> None:
    """Fates and matches of one of the two compared arms, by both measures."""
    table = tables.get(f"comparison/fates_{side}.parquet")
    known = {fate: code for code, fate in enumerate(CHOICES["fate"])}
    for by, measure in MEASURES.items():
        rows = _rows(table, measure=measure)
        if rows is None or not len(rows[0]):
            continue
        columns |= {f"{name}_{by}": at.put(rows, name) for name in ("similarity", "match")}
        places = at.of(rows[0])
        fates = [known.get(fate or "unknown", known["unknown"]) for fate in rows[1]["fate"].to_pylist()]
        codes[f"fate_{by}"][places[places >= 0]] = np.array(fates, dtype=np.int8)[places >= 0]
    absorbed = _rows(tables.get("comparison/absorption.parquet")) if side == "control" else None
    if absorbed is not None and len(absorbed[0]):
        which = at.put(absorbed, "absorbed") == 1
        for by in MEASURES:
            codes[f"fate_{by}"][which] = known["absorbed"]


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
