"""A feature in a few words: its number and first top tokens, for rows and axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from saeffect.report.context import ReportContext
from saeffect.text.tokens import printable_token

__all__ = ["feature_names", "first_tokens"]

_LONGEST_TOKEN = 16


def first_tokens(tokens: Sequence[str], limit: int = 2) -> str:
    """A feature's first top tokens, each visible and cut to length.

    Example:
        >>> first_tokens([" insulin", " dose", " drug"]), first_tokens(["\\n", " "])
        ('insulin, dose', '\\\\n, ␣')
    """
    shown = []
    for token in list(tokens)[:limit]:
        text = printable_token(str(token)).strip() or "␣"
        shown.append(text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…")
    return ", ".join(shown)


def feature_names(context: ReportContext, arm: str, limit: int = 3) -> Mapping[int, str]:
    """By feature of an arm, its first top tokens; empty for an arm that the report does not know."""
    if arm not in context.arms:
        return {}
    features = context.arms[arm].features
    return {
        int(feature): first_tokens(list(tokens), limit)
        for feature, tokens in zip(features["feature"], features["top_tokens"], strict=True)
    }
