"""Routes of the review: sign-in, queue, agreement and disagreements."""

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
from saeffect.web.review.state import (
    Answer,
    DisagreementPage,
    Review,
    Screen,
    hidden_verdicts,
    is_unblinded,
    rater_cookie,
    review_of,
    signed_in,
    unblinded_cookie,
)

__all__ = ["router"]

router = APIRouter()

_YEAR = 365 * 24 * 3600
# Screens are short computations: serialised, they finish sooner than threads that compete for the interpreter.
_screen_lock = Lock()
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


def _review(request: Request) -> Review:
    return review_of(request.app.state.site)


def _require_rater(request: Request, review: Review) -> str:
    rater = signed_in(request, review)
    if rater is None:
        raise ConfigError("nobody is signed in here.", fix="open /review and write your name.")
    return rater


def _review_page(request: Request, template: str, rater: str | None, **values: Any) -> Response:
    return page(request, template, judge=rater, count=count, words=_WORDS, **values)


@router.get("/review")
def _start(request: Request, name: str = "") -> Response:
    """Sign-in, progress of all raters, and instructions."""
    review = _review(request)
    rater = signed_in(request, review)
    existing = review.store.find(name) if name and rater is None else None
    all_progress = [review.progress(name_of_rater) for name_of_rater in review.store.raters()]
    progress = review.progress(rater) if rater else None
    return _review_page(
        request,
        "review_start.html.j2",
        rater,
        title="Review",
        subject=review.subject,
        total=len(review.queue.items),
        raters=all_progress,
        own=progress,
        blind=not (review.store.is_not_blind(rater) if rater else is_unblinded(request)),
        name=name,
        known=review.progress(existing) if existing else None,
        hosted=bool(getattr(request.state, "rater", None)),
    )


@router.post("/review/join")
def _join(request: Request, fields: _Fields) -> Response:
    """Sign in by name; a known name must be confirmed."""
    review, name = _review(request), fields.get("name", "")
    existing = review.store.find(name)
    if existing is not None and fields.get("again") != "yes":
        return RedirectResponse(f"/review?name={quote(existing)}", status_code=303)
    rater = review.store.join(name)
    response = RedirectResponse(own_path(fields.get("next", "/review/queue")), status_code=303)
    if is_unblinded(request):
        review.store.mark_not_blind(rater.name)
    response.set_cookie(rater_cookie(request), quote(rater.name), max_age=_YEAR, httponly=True, samesite="strict")
    return response


@router.post("/review/leave")
def _leave(request: Request) -> Response:
    """Let another person use this browser."""
    response = RedirectResponse("/review", status_code=303)
    response.delete_cookie(rater_cookie(request))
    return response


@router.get("/review/queue")
def _queue_page(request: Request) -> Response:
    """The next item."""
    review = _review(request)
    rater = signed_in(request, review)
    if rater is None:
        return RedirectResponse("/review", status_code=303)
    if review.store.find(rater) is None:  # a rater with a token need not sign in
        review.store.join(rater)
    with _screen_lock:
        values = _screen_values(review, rater)
    return _review_page(request, "review_queue.html.j2", rater, title="Review", **values)


@router.post("/review/verdict")
def _judge(request: Request, fields: _Fields) -> Response:
    """Save a verdict, without a script."""
    review = _review(request)
    _save(review, _require_rater(request, review), fields)
    return RedirectResponse("/review/queue", status_code=303)


@router.post("/api/review/verdict")
def _judge_json(request: Request, fields: _Fields) -> Response:
    """Save a verdict; answered once it is on the disk, with the next screen."""
    with _screen_lock:
        review = _review(request)
        rater = _require_rater(request, review)
        verdict = _save(review, rater, fields)
        return _fragment(review, rater, None, f"Saved: {_WORDS[verdict].lower()}.")


@router.post("/features/{arm}/{feature}/verdict")
def _label(request: Request, arm: str, feature: int, fields: _Fields) -> Response:
    """Save a verdict or a better label from a feature's page."""
    review = _review(request)
    rater = _require_rater(request, review)
    review.label(rater, arm, feature, _answer(fields))
    return RedirectResponse(own_path(fields.get("next", "/features")), status_code=303)


@router.post("/review/undo")
def _undo(request: Request) -> Response:
    """Take the latest verdict back, without a script."""
    review = _review(request)
    rater = _require_rater(request, review)
    values = _screen_values(review, rater, review.undo(rater))
    return _review_page(request, "review_queue.html.j2", rater, title="Review", **values)


@router.post("/api/review/undo")
def _undo_json(request: Request) -> Response:
    """Take the latest verdict back; answered with its screen."""
    with _screen_lock:
        review = _review(request)
        rater = _require_rater(request, review)
        screen = review.undo(rater)
        message = "Taken back." if screen else "There is nothing to take back."
        return _fragment(review, rater, screen, message)


@router.post("/review/look")
def _look(request: Request, fields: _Fields) -> Response:
    """Show the verdicts of others from now on; later verdicts of this person are marked."""
    review = _review(request)
    rater = signed_in(request, review)
    response = RedirectResponse(own_path(fields.get("next", "/review")), status_code=303)
    if rater is None:
        response.set_cookie(unblinded_cookie(request), "yes", max_age=_YEAR, httponly=True, samesite="strict")
    else:
        review.store.mark_not_blind(rater)
    return response


@router.get("/review/agreement")
def _agreement(request: Request) -> Response:
    """Agreement of the raters, unless hidden."""
    review = _review(request)
    hidden, rater = hidden_verdicts(request), signed_in(request, review)
    tables: tuple[Any, ...] = ()
    if hidden is None:
        agreement, raters = review.agreement()
        source = "verdicts.sqlite, what stands now"
        labels = model_label_view(review.model_labels(rater), "labels/*.parquet") if rater else None
        tables = tuple(view for view in (agreement_view(agreement, source), rater_view(raters, source), labels) if view)
    numbers = {f"table:{table.name}": f"Table {i}" for i, table in enumerate(tables, 1)}
    values = {"title": "Agreement", "hidden": hidden, "tables": tables, "numbers": numbers}
    return _review_page(request, "review_agreement.html.j2", rater, **values)


@router.get("/review/disagreements")
def _disagreements(request: Request, page: Annotated[int, Query(ge=1)] = 1) -> Response:
    """The features on which raters differ, unless hidden."""
    review = _review(request)
    hidden, rater = hidden_verdicts(request), signed_in(request, review)
    disagreements = review.disagreement_page(rater or "", page) if hidden is None else DisagreementPage((), 0, 0)
    return _review_page(
        request,
        "review_disagreements.html.j2",
        rater,
        title="Disagreements",
        subject=review.subject,
        hidden=hidden,
        disagreements=disagreements,
        requests=[secrets.token_hex(8) for _ in disagreements.rows],
    )


@router.post("/review/adjudicate")
def _adjudicate(request: Request, fields: _Fields) -> Response:
    """Decide on a feature on which raters differ."""
    review = _review(request)
    rater = _require_rater(request, review)
    review.adjudicate(rater, fields.get("item", ""), _answer(fields), request=fields.get("request", "")[:64])
    page_number = fields.get("page", "")
    query = f"?page={page_number}" if page_number.isascii() and page_number.isdigit() else ""
    return RedirectResponse(f"/review/disagreements{query}", status_code=303)


def _save(review: Review, rater: str, fields: Mapping[str, str]) -> str:
    answer = _answer(fields)
    review.judge(rater, fields.get("item", ""), answer, request=fields.get("request", "")[:64])
    return answer.verdict


def _answer(fields: Mapping[str, str]) -> Answer:
    verdict = fields.get("verdict", "")
    if verdict not in VERDICTS:
        raise ConfigError(f"there is no verdict {verdict[:20]!r}.", fix=f"say one of: {', '.join(VERDICTS)}.")
    return Answer(verdict, fields.get("label", ""), fields.get("note", "").replace("\r\n", "\n"))


def _screen_values(review: Review, rater: str, screen: Screen | None = None) -> dict[str, Any]:
    """The values of the screen template, for this screen or else the next."""
    progress, upcoming = review.next_screen(rater)
    return {
        "screen": screen or upcoming,
        "own": progress,
        "subject": review.subject,
        "labels": review.store.labels(rater),
        "request_name": secrets.token_hex(8),
    }


def _fragment(review: Review, rater: str, screen: Screen | None, message: str) -> Response:
    values = _screen_values(review, rater, screen)
    html = environment().get_template("review_screen.html.j2").render(values | {"count": count, "words": _WORDS})
    progress = values["own"]
    all_done = progress.total and values["screen"] is None
    status = f"{message} That was all." if all_done else f"{message} {count(progress.done)} of {count(progress.total)}."
    return JSONResponse({"html": html, "said": status})
