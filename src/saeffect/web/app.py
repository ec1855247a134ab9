"""The app: its areas, error pages, static files and middleware."""

from __future__ import annotations

import contextlib
import mimetypes
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, FastAPI, Response
from starlette.exceptions import HTTPException

from saeffect.web.access import Access, Raters, attempts
from saeffect.web.access import router as access
from saeffect.web.features.routes import router as features
from saeffect.web.features.routes import warm as warm_features
from saeffect.web.overview.routes import router as overview
from saeffect.web.overview.routes import warm
from saeffect.web.pages import add_error_pages, static_files
from saeffect.web.play.routes import router as play
from saeffect.web.review.routes import router as review
from saeffect.web.security import Guard
from saeffect.web.site import Settings, Site

__all__ = ["AREAS", "Area", "create_app"]


class Area(NamedTuple):
    """A part of the app: its name in the navigation, where it begins, and its routes."""

    title: str
    path: str
    router: APIRouter


# In the order of the navigation. A new area is an import above and a line here.
AREAS = (
    Area("Overview", "/", overview),
    Area("Features", "/features", features),
    Area("Review", "/review", review),
    Area("Playground", "/play", play),
)  # fmt: skip


def create_app(run: Path, settings: Settings | None = None) -> FastAPI:
    """The app over a run directory, which may be empty or unfinished; `app.state.site` is the directory's `Site`."""
    settings = settings or Settings()
    site = Site(run, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warm(site)
        warm_features(site)
        yield
        site.close()

    app = FastAPI(title="saeffect", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.site, app.state.areas = site, [(area.title, area.path) for area in AREAS]
    app.state.raters, app.state.attempts = Raters(site.folder), attempts(settings)
    add_error_pages(app)
    app.include_router(access)
    for area in AREAS:
        app.include_router(area.router)
    app.add_api_route("/static/{name}", _static, methods=["GET"])
    app.add_middleware(Access, settings=settings, raters=app.state.raters, attempts=app.state.attempts)
    app.add_middleware(Guard, settings=settings)
    return app


def _static(name: str) -> Response:
    content = static_files().get(name)
    if content is None:
        raise HTTPException(404)
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return Response(content, media_type=kind, headers={"Cache-Control": "public, max-age=31536000, immutable"})
