"""What the mean activation difference makes the base model write, beside the differences of null fine-tunes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.config import PushConfig
from saeffect.diffing.trace import OPENINGS
from saeffect.diffing.written import difference_size, difference_steering, steered_words
from saeffect.progress import Log
from saeffect.study.nulls import study_tracer
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.trace import nulls_identity, read_trace, study_nulls, trace_path

__all__ = ["PUSH_TABLES", "push_inputs", "run_push", "write_pushed_words"]

VERSION = 1
PUSH_TABLES = ("difference_texts", "difference_words")
"""The texts, and the words in them."""


def push_inputs(run: RunFolder) -> dict[str, Any]:
    study = run.study
    return {
        "version": VERSION,
        "control": study.identities[study.control],
        "trace": run.digest(trace_path(run)),
        "nulls": nulls_identity(study),
        "push": _settings(run).model_dump(),
        "alpha": study.config.comparison.alpha,
    }


def run_push(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `PUSH_TABLES`, resuming after the last finished opening; nothing without a trace or a difference."""
    study, config = run.study, _settings(run)
    if not trace_path(run).is_file():
        log("  there is no mean difference to push along: the arms' models differ in size")
        return []
    trace = read_trace(run)
    if not difference_size(trace) > 0:
        log("  there is no mean difference to push along: the models are the same at the hook")
        return []
    tracer = study_tracer(study, log)
    nulls = study_nulls(study, tracer)[: config.nulls]
    saved = run.partial("push", push_inputs(run))
    texts = {str(piece["opening"].iloc[0]): piece for piece in saved.pieces(log)}
    n_texts = (1 + len(nulls)) * len(config.doses) * config.samples
    pieces = difference_steering(
        tracer.base, tracer.hook, trace, nulls, doses=config.doses, samples=config.samples, done=list(texts)
    )
    for piece in pieces:
        saved.add(piece)
        texts[str(piece["opening"].iloc[0])] = piece
        log.progress("pushed along the mean difference", n_texts * len(texts), n_texts * len(OPENINGS), "texts")
    table = pd.concat([texts[opening] for opening in OPENINGS], ignore_index=True)
    return [run.write_table(_path(run, "texts"), table), _write_words(run, table)]


def write_pushed_words(run: RunFolder) -> Iterable[Path]:
    """Write `difference_words` from the stored texts, if there are any."""
    texts = run.table_or_none(_path(run, "texts"))
    return [] if texts is None else [_write_words(run, texts)]


def _write_words(run: RunFolder, texts: pd.DataFrame) -> Path:
    return run.write_table(_path(run, "words"), steered_words(texts, alpha=run.study.config.comparison.alpha))


def _path(run: RunFolder, what: str) -> Path:
    return run.path("comparison", f"difference_{what}.parquet")


def _settings(run: RunFolder) -> PushConfig:
    assert run.study.config.push is not None
    return run.study.config.push
