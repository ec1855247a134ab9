"""Routes of the feature browser: the list and its parts, one feature, both as JSON, and reading both models."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from threading import Lock, Thread
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from saeffect.errors import NotFound, SaeffectError
from saeffect.report.words.numbers import count
from saeffect.web.features.catalogue import Catalogue, catalogue
from saeffect.web.features.index import SearchResult
from saeffect.web.features.job import reading_job
from saeffect.web.features.query import Query
from saeffect.web.features.record import plain
from saeffect.web.features.rows import feature_address, list_view, options
from saeffect.web.features.view import feature_view
from saeffect.web.pages import environment, page
from saeffect.web.review.state import hidden_verdicts, review_of, signed_in
from saeffect.web.site import Site

__all__ = ["router", "warm"]

router = APIRouter()
_Page = Callable[..., Response]
# Pages are short computations: serialised, they finish sooner than threads that compete for the interpreter.
_page_lock = Lock()


def _one_at_a_time(make_page: _Page) -> _Page:
    """The page function, run by one thread at a time."""

    @functools.wraps(make_page)
    def locked(*args: Any, **values: Any) -> Response:
        with _page_lock:
            return make_page(*args, **values)

    return locked


def warm(site: Site) -> None:
    """Read the tables in a thread before the first request."""

    def read() -> None:
        with contextlib.suppress(SaeffectError):
            data = catalogue(site)
            list_view(data.index, Query(), data.index.find(Query()))
            data.index.find(Query(q="a"))
            for arm in data.index.arms:
                for number in data.index.numbers[data.index.slice(arm)][:1].tolist():
                    feature_view(data.record(arm, number), data.study)

    Thread(target=read, daemon=True, name="feature tables").start()


def _catalogue(request: Request) -> Catalogue:
    """The catalogue, without verdicts where they are hidden."""
    return catalogue(request.app.state.site, blind=hidden_verdicts(request) is not None)


def _search(request: Request) -> tuple[Catalogue, Query, SearchResult]:
    """The catalogue, and the query of the address with its result."""
    data = _catalogue(request)
    query = Query.read(request.query_params)
    return data, query, data.index.find(query)


@router.get("/features")
@_one_at_a_time
def _list_page(request: Request) -> Response:
    """The list of features with its filters."""
    data, query, result = _search(request)
    title = f"Features: {query.q}" if query.q else "Features"
    view = list_view(data.index, query, result)
    choices = options(query, result)
    values: dict[str, Any] = {"view": view, "options": choices, "query": query, "hidden": hidden_verdicts(request)}
    return page(request, "features.html.j2", title=title, count=count, **values)


@router.get("/api/features/rows")
@_one_at_a_time
def _rows(request: Request) -> Response:
    """The rows alone, for the page's script; errors are JSON."""
    data, query, result = _search(request)
    view = list_view(data.index, query, result)
    return HTMLResponse(environment().get_template("feature_rows.html.j2").render(view=view, count=count))


@router.get("/api/features")
@_one_at_a_time
def _list_json(request: Request) -> Response:
    """The list as JSON: a page of features with all columns of the index."""
    data, _, result = _search(request)
    index = data.index
    rows = [
        {
            "arm": index.arm_of(position),
            "feature": int(index.numbers[position]),
            "label": index.verdicts.labels[position],
            "model_label": index.model_labels.get(position, {}).get("label", ""),
            "top_tokens": index.top_tokens(position),
            "verdict": index.code("verdict", position),
            **{name: index.code(name, position) for name in index.codes},
            **{name: index.value(name, position) for name in sorted(index.columns)},
        }
        for position in result.positions.tolist()
    ]
    return JSONResponse(plain({"total": result.total, "page": result.page, "pages": result.pages, "features": rows}))


@router.get("/features/{arm}/{feature}")
@_one_at_a_time
def _feature_page(request: Request, arm: str, feature: str) -> Response:
    """The page of a feature."""
    site: Site = request.app.state.site
    data, number = _catalogue(request), _number(arm, feature)
    record, query = data.record(arm, number), Query.read(request.query_params)
    before, after, rank = data.index.neighbours(query, data.index.position(arm, number))
    numbers, arm_of = data.index.numbers, data.index.arm_of
    neighbours = [None if i is None else feature_address(arm_of(i), int(numbers[i]), query) for i in (before, after)]
    total = data.index.find(query).total
    view = feature_view(record, data.study)
    rater = signed_in(request, review_of(site))
    proposal = {"label": record["label"], "verdict": "yes" if record["domain"]["is_domain"] else "no"}
    verdicts = record["verdicts"]["given"]
    own_verdicts = [v for v in verdicts if v["rater"] == rater and v["role"] == "rater"]
    return page(
        request,
        "feature.html.j2",
        title=view["title"],
        view=view,
        record=record,
        query=query,
        neighbours=neighbours,
        position=f"{count(rank)} of {count(total)}" if rank else "",
        job=reading_job(site).state,
        count=count,
        hidden=hidden_verdicts(request),
        rater=rater,
        own=(own_verdicts or [proposal])[-1],
        subject=data.study.config.selection.subject,
        here=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        areas_here={path for _, path in request.app.state.areas},
    )


@router.get("/api/features/{arm}/{feature}")
def _feature_json(request: Request, arm: str, feature: str) -> Response:
    """The record of a feature as a JSON file."""
    record = _catalogue(request).record(arm, _number(arm, feature))
    text = json.dumps(plain(record), ensure_ascii=False, indent=1, allow_nan=False)
    # Headers are ASCII; names of arms need not be.
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in arm)
    headers = {"Content-Disposition": f'attachment; filename="{name}-{feature}.json"'}
    # Lone surrogates, as in a cut token, have no UTF-8.
    return Response(text.encode("utf-8", "replace"), media_type="application/json", headers=headers)


@router.get("/api/both-models")
def _reading_state(request: Request) -> dict[str, Any]:
    """The state of reading both models."""
    return reading_job(request.app.state.site).state


@router.post("/api/both-models", status_code=202)
def _start_reading(request: Request) -> dict[str, Any]:
    """Start reading the study's text with both models; returns the state."""
    job = reading_job(request.app.state.site)
    job.start()
    return job.state


def _number(arm: str, feature: str) -> int:
    if not (feature.isascii() and feature.isdigit() and len(feature) <= 12):
        raise NotFound(f"{feature[:60]!r} is no number of a feature.", at=arm[:60], fix="look for it in the list.")
    return int(feature)
