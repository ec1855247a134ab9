"""Routes of the review: who judges, the queue, agreement, and what raters differ on."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from threading import Lock
from typing import Annotated, Any
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from saeffect.errors import ConfigError
from saeffect.report.tables.review import agreement_view, model_label_view, rater_view
from saeffect.report.words.numbers import count
from saeffect.review.verdicts import VERDICTS
from saeffect.web.access import own_path
from saeffect.web.pages import environment, page
from saeffect.web.review.desk import (
    Desk,
    Judged,
    Screen,
    Splits,
    desk_of,
    has_looked,
    looked_cookie,
    rater_cookie,
    signed_in,
    veil,
)

__all__ = ["router"]

router = APIRouter()

_YEAR = 365 * 24 * 3600
# Screens are short computations: one after the other they are ready sooner than when threads compete for them.
_turn = Lock()
_WORDS = {"yes": "Yes", "no": "No", "unsure": "Unsure"}


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, or of a JSON object."""
    body = await request.body()
    try:
        text = body.decode()
        if request.headers.get("content-type", "").startswith("application/json"):
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("an object was expected")
            return {str(key): str(value) for key, value in fields.items() if value is not None}
        return {key: values[-1] for key, values in parse_qs(text, keep_blank_values=True, max_num_fields=20).items()}
    except (ValueError, RecursionError) as error:
        raise ConfigError("this is no form of ours.", fix="open the page again.") from error


_Fields = Annotated[dict[str, str], Depends(_form)]


def _desk(request: Request) -> Desk:
    return desk_of(request.app.state.site)


def _required(request: Request, desk: Desk) -> str:
    rater = signed_in(request, desk)
    if rater is None:
        raise ConfigError("nobody is signed in here.", fix="open /review and write your name.")
    return rater


def _show(request: Request, template: str, rater: str | None, **values: Any) -> Response:
    return page(request, template, judge=rater, count=count, words=_WORDS, **values)


@router.get("/review")
def _start(request: Request, name: str = "") -> Response:
    """Who is judging, how far everybody is, and what to do."""
    desk = _desk(request)
    rater = signed_in(request, desk)
    known = desk.store.find(name) if name and rater is None else None
    everybody = [desk.progress(other) for other in desk.store.raters()]
    own = desk.progress(rater) if rater else None
    return _show(
        request,
        "review_start.html.j2",
        rater,
        title="Review",
        subject=desk.subject,
        total=len(desk.queue.items),
        raters=everybody,
        own=own,
        blind=not (desk.store.is_not_blind(rater) if rater else has_looked(request)),
        name=name,
        known=desk.progress(known) if known else None,
        hosted=bool(getattr(request.state, "rater", None)),
    )


@router.post("/review/join")
def _join(request: Request, fields: _Fields) -> Response:
    """Sign in by name; a name that somebody had before must be confirmed."""
    desk, name = _desk(request), fields.get("name", "")
    known = desk.store.find(name)
    if known is not None and fields.get("again") != "yes":
        return RedirectResponse(f"/review?name={quote(known)}", status_code=303)
    rater = desk.store.join(name)
    answer = RedirectResponse(own_path(fields.get("next", "/review/queue")), status_code=303)
    if has_looked(request):
        desk.store.mark_not_blind(rater.name)
    answer.set_cookie(rater_cookie(request), quote(rater.name), max_age=_YEAR, httponly=True, samesite="strict")
    return answer


@router.post("/review/leave")
def _leave(request: Request) -> Response:
    """Let another person use this browser."""
    answer = RedirectResponse("/review", status_code=303)
    answer.delete_cookie(rater_cookie(request))
    return answer


@router.get("/review/queue")
def _queue(request: Request) -> Response:
    """The next item."""
    desk = _desk(request)
    rater = signed_in(request, desk)
    if rater is None:
        return RedirectResponse("/review", status_code=303)
    if desk.store.find(rater) is None:  # who has a token need not sign in
        desk.store.join(rater)
    with _turn:
        shown = _screen_values(desk, rater)
    return _show(request, "review_queue.html.j2", rater, title="Review", **shown)


@router.post("/review/verdict")
def _judge(request: Request, fields: _Fields) -> Response:
    """Save a verdict, without a script."""
    desk = _desk(request)
    _save(desk, _required(request, desk), fields)
    return RedirectResponse("/review/queue", status_code=303)


@router.post("/api/review/verdict")
def _judge_here(request: Request, fields: _Fields) -> Response:
    """Save a verdict; answered once it is on the disk, with the next screen."""
    with _turn:
        desk = _desk(request)
        rater = _required(request, desk)
        said = _save(desk, rater, fields)
        return _fragment(desk, rater, None, f"Saved: {_WORDS[said].lower()}.")


@router.post("/features/{arm}/{feature}/verdict")
def _label(request: Request, arm: str, feature: int, fields: _Fields) -> Response:
    """Save a verdict or a better label from a feature's page."""
    desk = _desk(request)
    rater = _required(request, desk)
    desk.label(rater, arm, feature, _judged(fields))
    return RedirectResponse(own_path(fields.get("next", "/features")), status_code=303)


@router.post("/review/undo")
def _undo(request: Request) -> Response:
    """Take the latest verdict back, without a script."""
    desk = _desk(request)
    rater = _required(request, desk)
    shown = _screen_values(desk, rater, desk.undo(rater))
    return _show(request, "review_queue.html.j2", rater, title="Review", **shown)


@router.post("/api/review/undo")
def _undo_here(request: Request) -> Response:
    """Take the latest verdict back; answered with its screen."""
    with _turn:
        desk = _desk(request)
        rater = _required(request, desk)
        screen = desk.undo(rater)
        said = "Taken back." if screen else "There is nothing to take back."
        return _fragment(desk, rater, screen, said)


@router.post("/review/look")
def _look(request: Request, fields: _Fields) -> Response:
    """Show from now on what others said; the verdicts that this person gives afterwards are marked."""
    desk = _desk(request)
    rater = signed_in(request, desk)
    answer = RedirectResponse(own_path(fields.get("next", "/review")), status_code=303)
    if rater is None:
        answer.set_cookie(looked_cookie(request), "yes", max_age=_YEAR, httponly=True, samesite="strict")
    else:
        desk.store.mark_not_blind(rater)
    return answer


@router.get("/review/agreement")
def _agreement(request: Request) -> Response:
    """How far raters agree, behind the veil."""
    desk = _desk(request)
    hidden, rater = veil(request), signed_in(request, desk)
    tables: tuple[Any, ...] = ()
    if hidden is None:
        agreed, raters = desk.agreement()
        source = "verdicts.sqlite, what stands now"
        labels = model_label_view(desk.model_labels(rater), "labels/*.parquet") if rater else None
        tables = tuple(view for view in (agreement_view(agreed, source), rater_view(raters, source), labels) if view)
    numbers = {f"table:{table.name}": f"Table {place}" for place, table in enumerate(tables, 1)}
    values = {"title": "Agreement", "hidden": hidden, "tables": tables, "numbers": numbers}
    return _show(request, "review_agreement.html.j2", rater, **values)


@router.get("/review/disagreements")
def _disagreements(request: Request, page: Annotated[int, Query(ge=1)] = 1) -> Response:
    """The features on which raters differ, behind the veil."""
    desk = _desk(request)
    hidden, rater = veil(request), signed_in(request, desk)
    splits = desk.splits(rater or "", page) if hidden is None else Splits((), 0, 0)
    return _show(
        request,
        "review_disagreements.html.j2",
        rater,
        title="Disagreements",
        subject=desk.subject,
        hidden=hidden,
        splits=splits,
        requests=[secrets.token_hex(8) for _ in splits.shown],
    )


@router.post("/review/adjudicate")
def _adjudicate(request: Request, fields: _Fields) -> Response:
    """Decide on a feature on which raters differ."""
    desk = _desk(request)
    rater = _required(request, desk)
    desk.adjudicate(rater, fields.get("item", ""), _judged(fields), request=fields.get("request", "")[:64])
    place = fields.get("page", "")
    behind = f"?page={place}" if place.isascii() and place.isdigit() else ""
    return RedirectResponse(f"/review/disagreements{behind}", status_code=303)


def _save(desk: Desk, rater: str, fields: Mapping[str, str]) -> str:
    said = _judged(fields)
    desk.judge(rater, fields.get("item", ""), said, request=fields.get("request", "")[:64])
    return said.verdict


def _judged(fields: Mapping[str, str]) -> Judged:
    verdict = fields.get("verdict", "")
    if verdict not in VERDICTS:
        raise ConfigError(f"there is no verdict {verdict[:20]!r}.", fix=f"say one of: {', '.join(VERDICTS)}.")
    return Judged(verdict, fields.get("label", ""), fields.get("note", "").replace("\r\n", "\n"))


def _screen_values(desk: Desk, rater: str, screen: Screen | None = None) -> dict[str, Any]:
    """What the template of a screen needs: this one, else the next."""
    own, left = desk.now(rater)
    return {
        "screen": screen or left,
        "own": own,
        "subject": desk.subject,
        "labels": desk.store.labels(rater),
        "request_name": secrets.token_hex(8),
    }


def _fragment(desk: Desk, rater: str, screen: Screen | None, said: str) -> Response:
    values = _screen_values(desk, rater, screen)
    html = environment().get_template("review_screen.html.j2").render(values | {"count": count, "words": _WORDS})
    own = values["own"]
    all_done = own.total and values["screen"] is None
    spoken = f"{said} That was all." if all_done else f"{said} {count(own.done)} of {count(own.total)}."
    return JSONResponse({"html": html, "said": spoken})
