"""The first page: the answer, tables and figures of the report, and how far the study is."""

from __future__ import annotations

from saeffect.web.overview.routes import router, warm

__all__ = ["router", "warm"]
