"""Routes of the review: who judges, the queue, agreement, and what raters differ on."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import parse_qs, quote, unquote

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from saeffect.errors import ConfigError
from saeffect.report.tables.review import agreement_view, model_label_view, rater_view
from saeffect.report.words.numbers import count
from saeffect.review.verdicts import VERDICTS
from saeffect.web.pages import environment, page
from saeffect.web.review.desk import Desk, Judged, Progress, Screen, Splits, desk_of

__all__ = ["router"]

router = APIRouter()

_YEAR = 365 * 24 * 3600
_WORDS = {"yes": "Yes", "no": "No", "unsure": "Unsure"}
_SHOWN = 50  # disagreements a page


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


def _cookie(request: Request) -> str:
    return f"rater-{request.app.state.site.settings.port}"  # browsers share cookies between ports


def _rater(request: Request, desk: Desk) -> str | None:
    """Who is judging: the owner of the token, or else who the browser says."""
    owner = getattr(request.state, "rater", None)
    if owner:
        return desk.store.find(owner) or str(owner)
    said = unquote(request.cookies.get(_cookie(request), ""))
    return desk.store.find(said) if said else None


def _required(request: Request, desk: Desk) -> str:
    rater = _rater(request, desk)
    if rater is None:
        raise ConfigError("nobody is signed in here.", fix="open /review and write your name.")
    return rater


def _show(request: Request, template: str, rater: str | None, **values: Any) -> Response:
    return page(request, template, judge=rater, count=count, words=_WORDS, **values)


@router.get("/review")
def _start(request: Request, name: str = "") -> Response:
    """Who is judging, how far everybody is, and what to do."""
    desk = _desk(request)
    rater = _rater(request, desk)
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
    answer = RedirectResponse("/review/queue", status_code=303)
    answer.set_cookie(_cookie(request), quote(rater.name), max_age=_YEAR, httponly=True, samesite="strict")
    return answer


@router.post("/review/leave")
def _leave(request: Request) -> Response:
    """Let another person use this browser."""
    answer = RedirectResponse("/review", status_code=303)
    answer.delete_cookie(_cookie(request))
    return answer


@router.get("/review/queue")
def _queue(request: Request) -> Response:
    """The next item."""
    desk = _desk(request)
    rater = _rater(request, desk)
    if rater is None:
        return RedirectResponse("/review", status_code=303)
    if desk.store.find(rater) is None:  # who has a token need not sign in
        desk.store.join(rater)
    shown = _screen_values(desk, rater, desk.next_screen(rater))
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
    desk = _desk(request)
    rater = _required(request, desk)
    said = _save(desk, rater, fields)
    return _fragment(desk, rater, desk.next_screen(rater), f"Saved: {_WORDS[said].lower()}.")


@router.post("/review/undo")
def _undo(request: Request) -> Response:
    """Take the latest verdict back, without a script."""
    desk = _desk(request)
    rater = _required(request, desk)
    shown = _screen_values(desk, rater, desk.undo(rater) or desk.next_screen(rater))
    return _show(request, "review_queue.html.j2", rater, title="Review", **shown)


@router.post("/api/review/undo")
def _undo_here(request: Request) -> Response:
    """Take the latest verdict back; answered with its screen."""
    desk = _desk(request)
    rater = _required(request, desk)
    screen = desk.undo(rater)
    said = "Taken back." if screen else "There is nothing to take back."
    return _fragment(desk, rater, screen or desk.next_screen(rater), said)


@router.get("/review/agreement")
def _agreement(request: Request) -> Response:
    """How far raters agree; not before one has judged everything oneself."""
    desk = _desk(request)
    rater = _rater(request, desk)
    blind = _still_blind(desk, rater)
    tables: tuple[Any, ...] = ()
    if blind is None:
        agreed, raters = desk.agreement()
        source = "verdicts.sqlite, what stands now"
        labels = model_label_view(desk.model_labels(rater), "labels/*.parquet") if rater else None
        tables = tuple(view for view in (agreement_view(agreed, source), rater_view(raters, source), labels) if view)
    numbers = {f"table:{table.name}": f"Table {place}" for place, table in enumerate(tables, 1)}
    return _show(
        request, "review_agreement.html.j2", rater, title="Agreement", blind=blind, tables=tables, numbers=numbers
    )


@router.get("/review/disagreements")
def _disagreements(request: Request) -> Response:
    """The features on which raters differ; not before one has judged everything oneself."""
    desk = _desk(request)
    rater = _rater(request, desk)
    blind = _still_blind(desk, rater)
    splits = desk.splits(rater or "", _SHOWN) if blind is None else Splits((), 0, 0)
    return _show(
        request,
        "review_disagreements.html.j2",
        rater,
        title="Disagreements",
        subject=desk.subject,
        blind=blind,
        splits=splits.shown,
        total=splits.total,
        left=splits.left,
        began=rater is not None and desk.progress(rater).done > 0,
        requests=[secrets.token_hex(8) for _ in splits.shown],
    )


@router.post("/review/adjudicate")
def _adjudicate(request: Request, fields: _Fields) -> Response:
    """Decide on a feature on which raters differ."""
    desk = _desk(request)
    rater = _required(request, desk)
    desk.adjudicate(rater, fields.get("item", ""), _judged(fields), request=fields.get("request", "")[:64])
    return RedirectResponse("/review/disagreements", status_code=303)


def _still_blind(desk: Desk, rater: str | None) -> Progress | None:
    """The progress of somebody who has begun and not finished, who must not see what others said; else None."""
    own = desk.progress(rater) if rater else None
    return own if own and 0 < own.done < own.total else None


def _save(desk: Desk, rater: str, fields: Mapping[str, str]) -> str:
    said = _judged(fields)
    desk.judge(rater, fields.get("item", ""), said, request=fields.get("request", "")[:64])
    return said.verdict


def _judged(fields: Mapping[str, str]) -> Judged:
    verdict = fields.get("verdict", "")
    if verdict not in VERDICTS:
        raise ConfigError(f"there is no verdict {verdict[:20]!r}.", fix=f"say one of: {', '.join(VERDICTS)}.")
    return Judged(verdict, fields.get("label", ""), fields.get("note", "").replace("\r\n", "\n"))


def _screen_values(desk: Desk, rater: str, screen: Screen | None) -> dict[str, Any]:
    return {
        "screen": screen,
        "own": desk.progress(rater),
        "subject": desk.subject,
        "labels": desk.labels(rater),
        "request_name": secrets.token_hex(8),
    }


def _fragment(desk: Desk, rater: str, screen: Screen | None, said: str) -> Response:
    values = _screen_values(desk, rater, screen)
    html = environment().get_template("review_screen.html.j2").render(values | {"count": count, "words": _WORDS})
    own = values["own"]
    spoken = f"{said} {count(own.done)} of {count(own.total)}." if screen or not own.total else f"{said} That was all."
    return JSONResponse({"html": html, "said": spoken})
