"""The review of a run: its queue, the verdicts that still apply to its features, and their export and import."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from saeffect.errors import NotFound
from saeffect.io import fingerprint
from saeffect.review.queue import Queue, fingerprint_tokens, make_queue
from saeffect.review.store import NOT_BLIND, STORE, Verdict, VerdictStore
from saeffect.review.verdicts import ADJUDICATION, BLIND, COLUMNS, read_verdicts, write_verdicts
from saeffect.study.results import read_table

__all__ = ["Standing", "export_verdicts", "import_verdicts", "read_queue", "standing_verdicts", "store_digest"]

_FEATURES, _SELECTION = ["feature", "top_tokens", "n_active"], ["feature", "in_vocabulary", "matches"]


@dataclass(frozen=True, eq=False)
class Standing:
    """`verdicts` on the run's present features, with `COLUMNS`, `BLIND` and kind (the rater of an adjudication begins
    with `ADJUDICATION`); and how many others are on features that are `gone`, replaced by a later run.
    """

    verdicts: pd.DataFrame
    gone: int

    def missing(self, candidates: Collection[tuple[str, int]]) -> int:
        """How many of the candidates (arm, feature) have no verdict."""
        judged = self.verdicts[self.verdicts["kind"] == "feature"]
        return len(set(candidates) - set(zip(judged["arm"], judged["feature"], strict=True)))


def read_queue(folder: Path | str) -> Queue:
    """The review queue of a run directory; NotFound before its select stage has finished."""
    return make_queue({arm: _arm_table(folder, arm) for arm in _arms(folder)})


def standing_verdicts(store: VerdictStore, features: Mapping[str, pd.DataFrame]) -> Standing:
    """The verdicts of a store that were given on these features (by arm: feature, top_tokens)."""
    current = store.current()
    tokens = dict[tuple[str, int], str]()
    for arm, table in features.items():
        judged = set(current.loc[(current["arm"] == arm) & (current["kind"] == "feature"), "feature"])
        rows = table[table["feature"].isin(judged)]
        tokens |= {
            (arm, int(f)): fingerprint_tokens(tuple(t))
            for f, t in zip(rows["feature"], rows["top_tokens"], strict=True)
        }
    keys = zip(current["arm"], current["feature"], strict=True)
    unchanged = pd.Series([tokens.get(key) for key in keys], index=current.index, dtype=object) == current["seen"]
    valid = current[unchanged | (current["kind"] == "shuffled")]
    is_adjudicated = valid["role"] == "adjudicator"
    rater = valid["rater"].where(~is_adjudicated, ADJUDICATION + " " + valid["rater"])
    table = valid.assign(rater=rater, **{BLIND: valid["source"] != NOT_BLIND})
    table = table[[*COLUMNS, "kind", BLIND]].reset_index(drop=True)
    return Standing(table, len(current) - len(valid))


def store_digest(folder: Path | str) -> str | None:
    """A hash of the current verdicts in the run's store; None if there are none. Errors as `VerdictStore`."""
    with VerdictStore(Path(folder) / STORE) as store:
        current = store.current()
    return fingerprint(current[["id", *COLUMNS, "kind", "role", "seen"]].values.tolist()) if len(current) else None


def export_verdicts(folder: Path | str, file: Path | str) -> tuple[int, int]:
    """Write the verdicts on a run's features to a CSV file; returns their number, and that of verdicts on features that
    are gone.

    NotFound if there is no run or no verdict; other errors as `VerdictStore` and `write_verdicts`.
    """
    features = {arm: _arm_table(folder, arm) for arm in _arms(folder)}
    with VerdictStore(Path(folder) / STORE) as store:
        standing = standing_verdicts(store, features)
    table = standing.verdicts[standing.verdicts["kind"] == "feature"]
    if table.empty:
        raise NotFound("nobody has judged a feature of this run.", at=str(folder), fix="judge: saeffect serve RUN.")
    write_verdicts(table, file)
    return len(table), standing.gone


def import_verdicts(folder: Path | str, file: Path | str) -> tuple[int, int]:
    """Add the verdicts of a CSV file to the run's store, all or none; returns how many were new and how many were not.

    A verdict that differs from the rater's earlier one replaces it; the history keeps both. NotFound: no such file or
    run, or a feature that is not in the run; other errors as `read_verdicts` and `VerdictStore`.
    """
    arms = _arms(folder)
    table = read_verdicts(file, arms=arms)
    tokens = {arm: _tokens(folder, arm) for arm in arms}
    unknown = [
        f"{row.feature} of {row.arm}" for row in table.itertuples() if int(row.feature) not in tokens[str(row.arm)]
    ]
    if unknown:
        raise NotFound(
            f"{len(unknown)} verdicts are on features that this run does not have: {', '.join(unknown[:5])}"
            + (" …." if len(unknown) > 5 else "."),
            at=str(file),
            fix="import verdicts that were given on these SAEs. Nothing was imported.",
        )
    with VerdictStore(Path(folder) / STORE) as store:
        existing = {
            (r.role, r.rater, r.arm, r.feature, r.seen): (r.verdict, r.label, r.note)
            for r in store.current().itertuples()
        }
        added = []
        for row in table.itertuples():
            arm, number, rater = str(row.arm), int(row.feature), str(row.rater)
            is_adjudicator = rater.startswith(ADJUDICATION)
            if is_adjudicator:
                rater = rater.removeprefix(ADJUDICATION).strip() or "adjudicator"
            given = Verdict(
                arm,
                number,
                fingerprint_tokens(tokens[arm][number]),
                str(row.verdict),
                str(row.label),
                str(row.note),
                role="adjudicator" if is_adjudicator else "rater",
                source=Path(file).name if row.blind else NOT_BLIND,
            )
            key = (given.role, store.find(rater) or rater, arm, number, given.seen)
            if existing.get(key) != (given.verdict, given.label, given.note):
                added.append((rater, given))
        if added:
            store.record_many(added)
    return len(added), len(table) - len(added)


def _arms(folder: Path | str) -> list[str]:
    """The arms of a run directory that have a selection."""
    arms = sorted(path.parent.name for path in Path(folder).glob("arms/*/selection.parquet"))
    if not arms:
        fix = "give a run directory, such as runs/<name>, whose select stage has finished."
        raise NotFound("there are no features to review here.", at=str(folder), fix=fix)
    return arms


def _arm_table(folder: Path | str, arm: str) -> pd.DataFrame:
    features = read_table(Path(folder) / "arms" / arm / "features.parquet", _FEATURES)
    return features.merge(read_table(Path(folder) / "arms" / arm / "selection.parquet", _SELECTION), on="feature")


def _tokens(folder: Path | str, arm: str) -> dict[int, tuple[str, ...]]:
    table = read_table(Path(folder) / "arms" / arm / "features.parquet", _FEATURES[:2])
    return {int(f): tuple(t) for f, t in zip(table["feature"], table["top_tokens"], strict=True)}
