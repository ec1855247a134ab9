"""Who judges in a browser, and whether it may show what others said.

That stays hidden, all over the app, until one has judged everything or says that one will not judge blind. This is
written down, and the verdicts that follow are marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from fastapi import Request

from saeffect.errors import SaeffectError
from saeffect.review.store import STORE
from saeffect.web.review.desk import Desk, Progress, desk_of

__all__ = ["Veil", "has_looked", "looked_cookie", "rater_cookie", "signed_in", "veil"]


@dataclass(frozen=True)
class Veil:
    """What others said is hidden: from whom (None: nobody is signed in), and on which page."""

    own: Progress | None
    here: str


def rater_cookie(request: Request) -> str:
    """Holds the name of who is judging; browsers share cookies between ports."""
    return f"rater-{request.app.state.site.settings.port}"


def looked_cookie(request: Request) -> str:
    """Says that this browser has shown what others said to somebody who was not signed in."""
    return f"looked-{request.app.state.site.settings.port}"


def signed_in(request: Request, desk: Desk) -> str | None:
    """Who is judging: the owner of the token, or else who the browser says."""
    owner = getattr(request.state, "rater", None)
    if owner:
        return desk.store.find(owner) or str(owner)
    said = unquote(request.cookies.get(rater_cookie(request), ""))
    return desk.store.find(said) if said else None


def has_looked(request: Request) -> bool:
    """Whether somebody who was not signed in has looked in this browser."""
    return looked_cookie(request) in request.cookies


def veil(request: Request) -> Veil | None:
    """None where verdicts may be shown: there are none, or one has judged everything or has looked before."""
    site, hosted = request.app.state.site, getattr(request.state, "rater", None) is not None
    if not hosted and not (site.folder / STORE).exists():
        return None
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    if not hosted and rater_cookie(request) not in request.cookies:
        return None if has_looked(request) else Veil(None, here)
    try:
        desk = desk_of(site)
        rater = signed_in(request, desk)
        if rater is None:
            return None if has_looked(request) else Veil(None, here)
        return None if desk.sees(rater) else Veil(desk.progress(rater), here)
    except SaeffectError:  # the review says what is wrong with it
        return Veil(None, here)
