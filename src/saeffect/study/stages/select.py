"""Stage 4, selection: domain features have enough top tokens in the vocabulary and were not rejected by people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.errors import ConfigError, EmptySelection
from saeffect.features.vocabulary import Vocabulary, load_vocabulary, select
from saeffect.io import hash_file
from saeffect.progress import SILENT, Log
from saeffect.review.store import STORE, VerdictStore
from saeffect.review.verdicts import read_verdicts, summarise_verdicts
from saeffect.study.review import standing_verdicts, store_digest
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study

__all__ = ["run_select", "select_inputs", "stored_verdicts", "study_verdicts", "write_selection"]

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
    on_features = None if verdicts is None else verdicts[verdicts["kind"] == "feature"]
    return {
        name: select(
            run.read_table(run.arm(name, "features.parquet")),
            vocabulary=vocabulary,
            min_matches=config.min_matches,
            verdicts=None if on_features is None else summarise_verdicts(on_features, name),
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
        judged = f"{len(candidates) - missing} of {len(candidates)} candidates are judged"
        log(f"  the review is not finished: {judged}, so domain features are the vocabulary's")
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
