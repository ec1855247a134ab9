"""Stage 4, selection: domain features have enough top tokens in the vocabulary and were not rejected by people; and the
review of a run: its queue, and what people said in it that still holds for the features as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.errors import ConfigError, EmptySelection, NotFound
from saeffect.features.vocabulary import Vocabulary, load_vocabulary, select
from saeffect.io import fingerprint, hash_file
from saeffect.progress import SILENT, Log
from saeffect.review.queue import Queue, fingerprint_tokens, make_queue
from saeffect.review.store import NOT_BLIND, STORE, Given, VerdictStore
from saeffect.review.verdicts import ADJUDICATION, BLIND, COLUMNS, read_verdicts, summarise_verdicts, write_verdicts
from saeffect.study.run_folder import RunFolder, read_table
from saeffect.study.study import Study

__all__ = [
    "Standing",
    "read_queue",
    "run_select",
    "select_inputs",
    "standing_verdicts",
    "store_digest",
    "import_verdicts",
    "stored_verdicts",
    "study_verdicts",
    "write_selection",
    "export_verdicts",
]

_FEATURES, _SELECTION = ["feature", "top_tokens", "n_active"], ["feature", "in_vocabulary", "matches"]


@dataclass(frozen=True, eq=False)
class Standing:
    """Verdicts on the features as they are: `verdicts` with `COLUMNS`, `BLIND`, kind; `gone`: on how many older ones.

    The rater of an adjudication begins with `ADJUDICATION`.
    """

    verdicts: pd.DataFrame
    gone: int

    def missing(self, candidates: Collection[tuple[str, int]]) -> int:
        """How many of the candidates (arm, feature) nobody has judged."""
        own = self.verdicts[self.verdicts["kind"] == "feature"]
        return len(set(candidates) - set(zip(own["arm"], own["feature"], strict=True)))


def read_queue(folder: Path | str) -> Queue:
    """The review queue of a run directory; NotFound before its select stage has finished."""
    return make_queue({arm: _arm_table(folder, arm) for arm in _arms(folder)})


def standing_verdicts(store: VerdictStore, features: Mapping[str, pd.DataFrame]) -> Standing:
    """The verdicts of a store that were given on these features (by arm: feature, top_tokens)."""
    said = store.current()
    tokens = dict[tuple[str, int], str]()
    for arm, table in features.items():
        wanted = set(said.loc[(said["arm"] == arm) & (said["kind"] == "feature"), "feature"])
        own = table[table["feature"].isin(wanted)]
        tokens |= {
            (arm, int(f)): fingerprint_tokens(tuple(t)) for f, t in zip(own["feature"], own["top_tokens"], strict=True)
        }
    places = zip(said["arm"], said["feature"], strict=True)
    same = pd.Series([tokens.get(place) for place in places], index=said.index, dtype=object) == said["seen"]
    kept = said[same | (said["kind"] == "shuffled")]
    decided = kept["role"] == "adjudicator"
    rater = kept["rater"].where(~decided, ADJUDICATION + " " + kept["rater"])
    table = kept.assign(rater=rater, **{BLIND: kept["source"] != NOT_BLIND})
    table = table[[*COLUMNS, "kind", BLIND]].reset_index(drop=True)
    return Standing(table, len(said) - len(kept))


def store_digest(folder: Path | str) -> str | None:
    """A hash of what stands in the run's store; None if it holds nothing. Errors as `VerdictStore`."""
    with VerdictStore(Path(folder) / STORE) as store:
        said = store.current()
    return fingerprint(said[["id", *COLUMNS, "kind", "role", "seen"]].values.tolist()) if len(said) else None


def export_verdicts(folder: Path | str, file: Path | str) -> tuple[int, int]:
    """Write the verdicts on a run's features to a CSV file; how many, and how many are on features that are gone.

    NotFound if there is no run, or nobody has judged; else as `VerdictStore` and `write_verdicts`.
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
    """Add the verdicts of a CSV file to the run's store, all or none; how many were new, and how many there before.

    A verdict that differs from the rater's own goes on top of it: the history keeps both. NotFound: no such file or
    run, or one of its features is not in the run; others as `read_verdicts` and `VerdictStore`.
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
        said = store.current()
        before = {(r.role, r.rater, r.arm, r.feature, r.seen): (r.verdict, r.label, r.note) for r in said.itertuples()}
        added = []
        for row in table.itertuples():
            arm, number, rater = str(row.arm), int(row.feature), str(row.rater)
            decides = rater.startswith(ADJUDICATION)
            rater = rater.removeprefix(ADJUDICATION).strip() or "adjudicator" if decides else rater
            given = Given(
                arm,
                number,
                fingerprint_tokens(tokens[arm][number]),
                str(row.verdict),
                str(row.label),
                str(row.note),
                role="adjudicator" if decides else "rater",
                source=Path(file).name if row.blind else NOT_BLIND,
            )
            key = (given.role, store.find(rater) or rater, arm, number, given.seen)
            if before.get(key) != (given.verdict, given.label, given.note):
                added.append((rater, given))
        if added:
            store.record_many(added)
    return len(added), len(table) - len(added)


def _arms(folder: Path | str) -> list[str]:
    """The arms of a run directory that have a selection."""
    found = sorted(path.parent.name for path in Path(folder).glob("arms/*/selection.parquet"))
    if not found:
        fix = "give a run directory, such as runs/<name>, whose select stage has finished."
        raise NotFound("there are no features to review here.", at=str(folder), fix=fix)
    return found


def _arm_table(folder: Path | str, arm: str) -> pd.DataFrame:
    features = read_table(Path(folder) / "arms" / arm / "features.parquet", _FEATURES)
    return features.merge(read_table(Path(folder) / "arms" / arm / "selection.parquet", _SELECTION), on="feature")


def _tokens(folder: Path | str, arm: str) -> dict[int, tuple[str, ...]]:
    table = read_table(Path(folder) / "arms" / arm / "features.parquet", _FEATURES[:2])
    return {int(f): tuple(t) for f, t in zip(table["feature"], table["top_tokens"], strict=True)}


VERSION = 2


def select_inputs(run: RunFolder) -> dict[str, Any]:
    config = run.study.config.selection
    return {
        "version": VERSION,
        "features": run.digest(*(run.arm(name, "features.parquet") for name in run.study.config.arms)),
        "vocabulary": load_vocabulary(config.vocabulary).sha256,
        "verdicts": hash_file(config.verdicts) if config.verdicts else store_digest(run.folder),
        "min_matches": config.min_matches,
    }


def study_verdicts(study: Study) -> pd.DataFrame | None:
    """The study's verdicts, checked; None if it names no file."""
    path = study.config.selection.verdicts
    if path is None:
        return None
    verdicts = read_verdicts(path, arms=list(study.config.arms))
    unjudged = [name for name in study.config.arms if not (verdicts["arm"] == name).any()]
    if unjudged:
        raise ConfigError(
            f"there is no verdict on {', '.join(unjudged)}; domain features would mean another thing there.",
            at=str(path),
            fix="have every arm reviewed, take the arm out of the study, or leave selection.verdicts out.",
        )
    return verdicts


def run_select(run: RunFolder, log: Log = SILENT) -> Iterable[Path]:
    """Write every arm's `selection.parquet` and, if people have judged, `comparison/verdicts.parquet`.

    The verdicts are those of the file that the study names, or else of the review in this run directory, once somebody
    has judged each candidate: half a review would leave out features for no other reason than their turn.
    """
    verdicts = study_verdicts(run.study)
    if verdicts is not None:
        return write_selection(run, verdicts.assign(kind="feature"))
    return write_selection(run, _reviewed(run, log))


def stored_verdicts(run: RunFolder) -> pd.DataFrame | None:
    """The verdicts that the run's domain features rest on, with `kind`, as the select stage left them; or None."""
    return run.table_or_none(run.path("comparison", "verdicts.parquet"))


def write_selection(run: RunFolder, verdicts: pd.DataFrame | None) -> list[Path]:
    """Write all tables of the stage at once, so an error leaves none of them."""
    tables = _selections(run, verdicts)
    config = run.study.config.selection
    vocabulary = load_vocabulary(config.vocabulary)
    if vocabulary.words and not any(table["is_domain"].any() for table in tables.values()):
        _refuse(run, tables, vocabulary)
    written = [run.write_table(run.arm(name, "selection.parquet"), table) for name, table in tables.items()]
    if verdicts is not None:
        written.append(run.write_table(run.path("comparison", "verdicts.parquet"), verdicts))
    return written


def _selections(run: RunFolder, verdicts: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """By arm, its features with what the vocabulary and people say."""
    config = run.study.config.selection
    vocabulary = load_vocabulary(config.vocabulary)
    own = None if verdicts is None else verdicts[verdicts["kind"] == "feature"]
    return {
        name: select(
            run.read_table(run.arm(name, "features.parquet")),
            vocabulary=vocabulary,
            min_matches=config.min_matches,
            verdicts=None if own is None else summarise_verdicts(own, name),
            arm=name,
        )
        for name in run.study.config.arms
    }


def _reviewed(run: RunFolder, log: Log) -> pd.DataFrame | None:
    """The verdicts of the run's own review; None while some candidates have none."""
    if not run.path(STORE).is_file():
        return None
    features = {name: run.read_table(run.arm(name, "features.parquet")) for name in run.study.config.arms}
    with VerdictStore(run.path(STORE)) as store:
        standing = standing_verdicts(store, features)
    if standing.gone:
        log(f"  {standing.gone} verdicts are on features that this run no longer has; they stay in {STORE}")
    chosen = {name: table.loc[table["in_vocabulary"], "feature"] for name, table in _selections(run, None).items()}
    candidates = [(name, int(feature)) for name, features in chosen.items() for feature in features]
    missing = standing.missing(candidates)
    if missing:
        said = f"{len(candidates) - missing} of {len(candidates)} candidates are judged"
        log(f"  the review is not finished: {said}, so domain features are the vocabulary's")
        return None
    return standing.verdicts


def _refuse(run: RunFolder, tables: dict[str, pd.DataFrame], vocabulary: Vocabulary) -> None:
    most = max(int(table["matches"].max()) for table in tables.values())
    listed = sum(int(table["in_vocabulary"].sum()) for table in tables.values())
    config = run.study.config.selection
    raise EmptySelection(
        f"no arm has a domain feature: {listed} have {config.min_matches} top tokens in the vocabulary"
        f" {vocabulary.name!r} (the most that any has is {most})"
        + (" and people said yes to none of these." if listed else "."),
        at=run.study.at("selection"),
        fix="lower min_matches, choose another vocabulary or features.projection, or look at the verdicts.",
    )
