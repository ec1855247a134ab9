"""Routes of the overview: the report of a run directory, built from its tables, and the files of the report.

Models and SAEs are not needed: what the run recorded of them replaces them.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from markupsafe import Markup

from saeffect.comparison import ArmFacts, Comparison
from saeffect.errors import BadFile, NotFound, SaeffectError
from saeffect.report import ReportContext
from saeffect.report.html import render_body, render_early, script_hash
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.compare import arm_facts, arm_tables, read_comparison
from saeffect.study.stages.match import read_matches
from saeffect.study.stages.report import gate_measures, report_context
from saeffect.study.study import Study
from saeffect.web.overview.state import headline, recorded_study, run_state
from saeffect.web.pages import page
from saeffect.web.site import Site

__all__ = ["router", "warm"]

_MAX_FEATURES = 60  # features per arm among which the report picks its examples


@dataclass(frozen=True)
class _Content:
    """A page's part of the report: facts below the title, the sections, or the problem with them."""

    facts: tuple[tuple[str, str], ...] = ()
    body: Markup = field(default_factory=Markup)
    problem: SaeffectError | None = None


class _ContentBuilder:
    """Builds reports in a thread, one at a time, again when a stage has finished."""

    def __init__(self, site: Site) -> None:
        self._site, self._lock = site, threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="overview")
        self._version, self._latest = "", Future[_Content]()
        site.on_close(lambda: self._pool.shutdown(wait=False, cancel_futures=True))

    def get(self, version: str, wait: float) -> _Content | None:
        """The report of a version of the directory; None if it is not ready after `wait` seconds."""
        with self._lock:
            if version != self._version:
                self._latest.cancel()
                self._version, self._latest = version, self._pool.submit(_content_of, self._site)
            latest = self._latest
        try:
            return latest.result(timeout=wait)
        except FutureTimeout:
            return None


def _content_of(site: Site) -> _Content:
    """The report of the stages so far; a problem with files is part of the content."""
    if not site.stages:
        return _Content()
    try:
        run = RunFolder(site.folder, recorded_study(site))
        if not run.study.has_saes:
            return _Content()
        return _full_content(run) if "compare" in site.stages else _early_content(run)
    except SaeffectError as error:
        return _Content(problem=error)
    except Exception as error:  # tables of another version: missing columns, other types
        problem = BadFile(
            f"the tables do not fit together ({type(error).__name__}: {error}).",
            at=str(site.folder),
            fix="the run may be of another version of saeffect, or damaged: run the study again.",
        )
        return _Content(problem=problem)


def _facts(study: Study, name: str, measured: dict[str, Any]) -> ArmFacts:
    """An arm's facts; if its model or SAE is gone, those that the report needs."""
    try:
        return arm_facts(study, name, measured)
    except SaeffectError:
        arm = study.config.arms[name]
        facts = dict.fromkeys(ArmFacts.__dataclass_fields__)
        return ArmFacts(
            **{**facts, "role": arm.role, "model": arm.model.full_name, "dead_share": measured["dead_share"]}
        )


def _full_content(run: RunFolder) -> _Content:
    comparison = read_comparison(run)
    context = replace(report_context(run, arm_tables(run, _facts)), max_features=_MAX_FEATURES)
    return _Content(tuple(context.facts), render_body(comparison, context=context, features_at="/features"))


def _early_content(run: RunFolder) -> _Content:
    config, names = run.study.config, run.study.ordered_arms()
    dead: dict[str, float | None] = {}
    for name in names:
        features = run.table_or_none(run.arm(name, "features.parquet"))
        if features is None:  # the gate table compares all arms
            return _Content()
        dead[name] = float((features["n_active"] == 0).mean())
    context = ReportContext(
        study=config.name,
        gate=gate_measures(run, dead),
        domain=config.selection.subject,
        alpha=config.comparison.alpha,
    )
    arms = pd.DataFrame({"arm": names, "role": [config.arms[name].role for name in names]})
    empty = {name: pd.DataFrame() for name in Comparison.table_names()}
    comparison = Comparison(**{**empty, "table1": arms}, matches=read_matches(run))
    return _Content(body=render_early(comparison, context=context))


router = APIRouter()

_WAIT_SECONDS = 0.25  # a page waits this long for its report, else loads it later
# Files of the run are sandboxed: no scripts, no access to the app.
_FILE_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_KINDS = {".csv": "text/csv", ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png"}


@router.get("/")
def _overview_page(request: Request) -> Response:
    site: Site = request.app.state.site
    state = run_state(site)
    content = _Content() if state.condition == "empty" else _builder(site).get(state.version, _WAIT_SECONDS)
    return page(
        request,
        "overview/page.html.j2",
        title=state.title or "No study yet",
        state=state,
        content=content or _Content(),
        pending=content is None,
        headline=headline(site) if content is None or not content.body else "",
        files=_files(site),
        folder=str(site.folder),
    )


@router.get("/api/progress")
def _progress(request: Request) -> dict[str, Any]:
    """The `RunState`, and whether the report of its version is ready."""
    site: Site = request.app.state.site
    state = run_state(site)
    ready = state.condition == "empty" or _builder(site).get(state.version, 0.0) is not None
    return state.as_json(ready)


@router.get("/report")
def _report(request: Request) -> Response:
    """The report as the run wrote it, sandboxed."""
    file = request.app.state.site.path("report.html")
    if not file.is_file():
        fix = "let the study run to its end; the overview shows what there is so far."
        raise NotFound("this run has written no report yet.", fix=fix)
    policy = _FILE_POLICY.replace("sandbox;", "sandbox allow-scripts allow-popups;") + f"; script-src '{script_hash()}'"
    return FileResponse(file, media_type="text/html", headers={"Content-Security-Policy": policy})


@router.get("/files/{folder}/{name}")
def _file(request: Request, folder: str, name: str) -> Response:
    """A table or figure of the report, as a download."""
    site: Site = request.app.state.site
    if f"{folder}/{name}" not in {path for names in _files(site).values() for path in names}:
        raise NotFound("there is no such file of the report.", fix="the overview lists them.")
    file = site.path(folder, name)
    headers = {"Content-Security-Policy": _FILE_POLICY}
    return FileResponse(file, media_type=_KINDS[file.suffix], filename=name, headers=headers)


def _files(site: Site) -> dict[str, list[str]]:
    """By folder, the paths of the report's tables and figures."""
    files = {}
    for folder, kinds in (("tables", {".csv", ".json"}), ("figures", {".svg", ".png"})):
        directory = site.path(folder)
        names = [path.name for path in directory.iterdir() if path.suffix in kinds] if directory.is_dir() else []
        files[folder] = [f"{folder}/{name}" for name in sorted(names) if site.has(folder, name)]
    return files


def warm(site: Site) -> None:
    """Start building the report before the first request."""
    with contextlib.suppress(SaeffectError):
        state = run_state(site)
        if state.condition != "empty":
            _builder(site).get(state.version, 0.0)


def _builder(site: Site) -> _ContentBuilder:
    return site.cached("overview", (), lambda: _ContentBuilder(site))
