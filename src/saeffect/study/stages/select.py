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
from saeffect.review.verdicts import read_verdicts, summarise_verdicts
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study

__all__ = ["run_select", "select_inputs", "study_verdicts"]

VERSION = 2


def select_inputs(run: RunFolder) -> dict[str, Any]:
    config = run.study.config.selection
    return {
        "version": VERSION,
        "features": run.digest(*(run.arm(name, "features.parquet") for name in run.study.config.arms)),
        "vocabulary": load_vocabulary(config.vocabulary).sha256,
        "verdicts": hash_file(config.verdicts) if config.verdicts else None,
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


def run_select(run: RunFolder, _: Log = SILENT) -> Iterable[Path]:
    """Write every arm's `selection.parquet`: all at once, so an error leaves none of them."""
    config = run.study.config.selection
    vocabulary = load_vocabulary(config.vocabulary)
    verdicts = study_verdicts(run.study)
    tables = {name: _select(run, name, vocabulary, verdicts) for name in run.study.config.arms}
    if vocabulary.words and not any(table["is_domain"].any() for table in tables.values()):
        _refuse(run, tables, vocabulary)
    return [run.write_table(run.arm(name, "selection.parquet"), table) for name, table in tables.items()]


def _select(run: RunFolder, arm: str, vocabulary: Vocabulary, verdicts: pd.DataFrame | None) -> pd.DataFrame:
    given = None if verdicts is None else summarise_verdicts(verdicts, arm)
    return select(
        run.read_table(run.arm(arm, "features.parquet")),
        vocabulary=vocabulary,
        min_matches=run.study.config.selection.min_matches,
        verdicts=given,
        arm=arm,
    )


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
