"""Routes of the overview."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from saeffect.web.pages import page

__all__ = ["router"]

router = APIRouter()


@router.get("/")
def _overview(request: Request) -> Response:
    """The overview."""
    site = request.app.state.site
    study = site.study
    return page(request, "overview.html.j2", title=study.config.title or study.config.name, stages=site.stages)
