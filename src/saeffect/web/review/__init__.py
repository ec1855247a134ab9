"""The review: one candidate a screen, judged blind with one key, by many people."""

from saeffect.web.review.routes import router

__all__ = ["router"]
