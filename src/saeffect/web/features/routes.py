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
from saeffect.web.features.index import Found
from saeffect.web.features.job import reading
from saeffect.web.features.query import Query
from saeffect.web.features.record import plain
from saeffect.web.features.rows import feature_address, list_view, options
from saeffect.web.features.view import feature_view
from saeffect.web.pages import environment, page
from saeffect.web.review.desk import desk_of, signed_in, veil
from saeffect.web.site import Site

__all__ = ["router", "warm"]

router = APIRouter()
_Page = Callable[..., Response]
# Pages are short computations: one after the other they are ready sooner than when threads compete for the interpreter.
_turn = Lock()


def _in_turn(made: _Page) -> _Page:
    """The page, made while no other page of this area is."""

    @functools.wraps(made)
    def wait(*args: Any, **values: Any) -> Response:
        with _turn:
            return made(*args, **values)

    return wait


def warm(site: Site) -> None:
    """Read the tables in a thread, so that the first reader need not wait for them."""

    def read() -> None:
        with contextlib.suppress(SaeffectError):
            found = catalogue(site)
            list_view(found.index, Query(), found.index.find(Query()))
            found.index.find(Query(q="a"))
            for arm in found.index.arms:
                for number in found.index.numbers[found.index.slice(arm)][:1].tolist():
                    feature_view(found.record(arm, number), found.study)

    Thread(target=read, daemon=True, name="feature tables").start()


def _catalogue(request: Request) -> Catalogue:
    """What the pages of a run read from; without what people said where that is hidden."""
    return catalogue(request.app.state.site, blind=veil(request) is not None)


def _asked(request: Request) -> tuple[Catalogue, Query, Found]:
    """What the pages of a run read from, and the answer to the query in the address."""
    found = _catalogue(request)
    query = Query.read(request.query_params)
    return found, query, found.index.find(query)


@router.get("/features")
@_in_turn
def _list(request: Request) -> Response:
    """The list of features: filters, and the first answer."""
    found, query, answer = _asked(request)
    title = f"Features: {query.q}" if query.q else "Features"
    view = list_view(found.index, query, answer)
    choices = options(query, answer)
    values: dict[str, Any] = {"view": view, "options": choices, "query": query, "count": count, "hidden": veil(request)}
    return page(request, "features.html.j2", title=title, **values)


@router.get("/api/features/rows")
@_in_turn
def _rows(request: Request) -> Response:
    """The list alone, for the script that follows each keystroke; errors are JSON."""
    found, query, answer = _asked(request)
    view = list_view(found.index, query, answer)
    return HTMLResponse(environment().get_template("feature_rows.html.j2").render(view=view, count=count))


@router.get("/api/features")
@_in_turn
def _list_json(request: Request) -> Response:
    """The list as JSON: a page of features with all columns of the index."""
    found, _, answer = _asked(request)
    index = found.index
    rows = [
        {
            "arm": index.arm_of(place),
            "feature": int(index.numbers[place]),
            "label": index.verdicts.labels[place],
            "model_label": index.model_labels.get(place, {}).get("label", ""),
            "top_tokens": index.top_tokens(place),
            "verdict": index.code("verdict", place),
            **{name: index.code(name, place) for name in index.codes},
            **{name: index.value(name, place) for name in sorted(index.columns)},
        }
        for place in answer.places.tolist()
    ]
    return JSONResponse(plain({"total": answer.total, "page": answer.page, "pages": answer.pages, "features": rows}))


@router.get("/features/{arm}/{feature}")
@_in_turn
def _feature(request: Request, arm: str, feature: str) -> Response:
    """The page of a feature."""
    site: Site = request.app.state.site
    found, number = _catalogue(request), _number(arm, feature)
    record, query = found.record(arm, number), Query.read(request.query_params)
    before, after, rank = found.index.around(query, found.index.place(arm, number))
    neighbours = [
        None if place is None else feature_address(found.index.arm_of(place), int(found.index.numbers[place]), query)
        for place in (before, after)
    ]
    total = found.index.find(query).total
    view = feature_view(record, found.study)
    rater = signed_in(request, desk_of(site))
    proposed = {"label": record["label"], "verdict": "yes" if record["domain"]["is_domain"] else "no"}
    said = [given for given in record["verdicts"]["given"] if given["rater"] == rater and given["role"] == "rater"]
    return page(
        request,
        "feature.html.j2",
        title=view["title"],
        view=view,
        record=record,
        query=query,
        neighbours=neighbours,
        position=f"{count(rank)} of {count(total)}" if rank else "",
        job=reading(site).state,
        count=count,
        hidden=veil(request),
        rater=rater,
        own=(said or [proposed])[-1],
        subject=found.study.config.selection.subject,
        here=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        areas_here={path for _, path in request.app.state.areas},
    )


@router.get("/api/features/{arm}/{feature}")
def _feature_json(request: Request, arm: str, feature: str) -> Response:
    """All about a feature as a JSON file."""
    record = _catalogue(request).record(arm, _number(arm, feature))
    text = json.dumps(plain(record), ensure_ascii=False, indent=1, allow_nan=False)
    # A header holds Latin letters only, and an arm may be called otherwise.
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in arm)
    headers = {"Content-Disposition": f'attachment; filename="{name}-{feature}.json"'}
    # A lone half of a character, as a cut token may hold, has no UTF-8.
    return Response(text.encode("utf-8", "replace"), media_type="application/json", headers=headers)


@router.get("/api/both-models")
def _reading_state(request: Request) -> dict[str, Any]:
    """How far the reading of both models is."""
    return reading(request.app.state.site).state


@router.post("/api/both-models", status_code=202)
def _start_reading(request: Request) -> dict[str, Any]:
    """Read the study's text with both models, once; the answer to a form is a way back to its page."""
    job = reading(request.app.state.site)
    job.start()
    return job.state


def _number(arm: str, feature: str) -> int:
    if not (feature.isascii() and feature.isdigit() and len(feature) <= 12):
        raise NotFound(f"{feature[:60]!r} is no number of a feature.", at=arm[:60], fix="look for it in the list.")
    return int(feature)
