"""The report of a run directory, put together from its tables: words, tables and figures are the report's own.

What a run recorded of models and SAEs stands in for them, so a report can be read where they no longer are.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from markupsafe import Markup

from saeffect.comparison import ArmFacts, Comparison
from saeffect.errors import BadFile, SaeffectError
from saeffect.report import ReportContext
from saeffect.report.html import render_body, render_early
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.compare import arm_facts, arm_tables, read_comparison
from saeffect.study.stages.match import read_matches
from saeffect.study.stages.report import gate_measures, report_context
from saeffect.study.study import Study
from saeffect.web.overview.recorded import recorded_study
from saeffect.web.site import Site

__all__ = ["Content", "ContentMaker", "content_of"]

_SHOWN = 60  # features per arm among which the report picks those whose texts it shows


@dataclass(frozen=True)
class Content:
    """What a page shows of a report: facts below the title, the sections, and why there are none."""

    facts: tuple[tuple[str, str], ...] = ()
    body: Markup = field(default_factory=Markup)
    problem: SaeffectError | None = None


class ContentMaker:
    """Puts reports together in a thread, one at a time, anew when a stage has finished."""

    def __init__(self, site: Site) -> None:
        self._site, self._lock = site, threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="overview")
        self._version, self._latest = "", Future[Content]()
        site.on_close(lambda: self._pool.shutdown(wait=False, cancel_futures=True))

    def get(self, version: str, wait: float) -> Content | None:
        """The report of a version of the directory; None if it is not ready after `wait` seconds."""
        with self._lock:
            if version != self._version:
                self._latest.cancel()
                self._version, self._latest = version, self._pool.submit(content_of, self._site)
            latest = self._latest
        try:
            return latest.result(timeout=wait)
        except NotYet:
            return None


def content_of(site: Site) -> Content:
    """The report as far as the run has come; a problem of its files is part of the content."""
    if not site.stages:
        return Content()
    try:
        run = RunFolder(site.folder, recorded_study(site))
        if not run.study.has_saes:
            return Content()
        return _whole(run) if "compare" in site.stages else _early(run)
    except SaeffectError as error:
        return Content(problem=error)
    except Exception as error:  # tables of another version: missing columns, other types
        problem = BadFile(
            f"the tables do not fit together ({type(error).__name__}: {error}).",
            at=str(site.folder),
            fix="the run may be of another version of saeffect, or damaged: run the study again.",
        )
        return Content(problem=problem)


def _facts(study: Study, name: str, measured: dict[str, Any]) -> ArmFacts:
    """An arm's facts; those that the report shows, if its model or SAE is gone."""
    try:
        return arm_facts(study, name, measured)
    except SaeffectError:
        arm = study.config.arms[name]
        model = arm.model.path + (f" + {arm.model.adapter}" if arm.model.adapter else "")
        known = dict.fromkeys(ArmFacts.__dataclass_fields__)
        return ArmFacts(**{**known, "role": arm.role, "model": model, "dead_share": measured["dead_share"]})


def _whole(run: RunFolder) -> Content:
    comparison = read_comparison(run)
    context = replace(report_context(run, arm_tables(run, _facts)), max_features=_SHOWN)
    return Content(tuple(context.facts), render_body(comparison, context=context, features_at="/features"))


def _early(run: RunFolder) -> Content:
    config, names = run.study.config, run.study.ordered_arms()
    dead: dict[str, float | None] = {}
    for name in names:
        features = run.table_or_none(run.arm(name, "features.parquet"))
        if features is None:  # the gate table compares all arms
            return Content()
        dead[name] = float((features["n_active"] == 0).mean())
    context = ReportContext(
        study=config.name,
        gate=gate_measures(run, dead),
        domain=config.selection.subject,
        alpha=config.comparison.alpha,
    )
    arms = pd.DataFrame({"arm": names, "role": [config.arms[name].role for name in names]})
    nothing = {name: pd.DataFrame() for name in Comparison.table_names()}
    comparison = Comparison(**{**nothing, "table1": arms}, matches=read_matches(run))
    return Content(body=render_early(comparison, context=context))
