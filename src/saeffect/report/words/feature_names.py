"""A feature in a few words: its number and first top tokens, for rows and axes."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from saeffect.lm.tokens import printable_token
from saeffect.report.context import ReportContext

__all__ = ["feature_names", "feature_words", "first_tokens"]

_LONGEST_TOKEN = 16


def first_tokens(tokens: Sequence[str], limit: int = 2, longest: int | None = _LONGEST_TOKEN) -> str:
    """A feature's first top tokens, each visible and cut to length; whole without one.

    Tokens that differ in capitals or a leading space only are one word here.

    Example:
        >>> first_tokens([" insulin", " Insulin", " dose", " drug"]), first_tokens(["\\n", " "])
        ('insulin, dose', '\\\\n, ␣')
    """
    shown: dict[str, str] = {}
    for token in tokens:
        text = printable_token(str(token)).strip() or "␣"
        shown.setdefault(text.lower(), text)
        if len(shown) == limit:
            break
    return ", ".join(
        text if longest is None or len(text) <= longest else text[: longest - 1] + "…" for text in shown.values()
    )


def feature_names(context: ReportContext, arm: str, limit: int = 3) -> Mapping[int, str]:
    """By feature of an arm, its first top tokens; empty for an arm that the report does not know."""
    if arm not in context.arms:
        return {}
    features = context.arms[arm].features
    return {
        int(feature): first_tokens(list(tokens), limit)
        for feature, tokens in zip(features["feature"], features["top_tokens"], strict=True)
    }


def feature_words(context: ReportContext, role: str, wanted: Container[int], limit: int = 5) -> Mapping[int, str]:
    """By number, the first top tokens, whole, of those features of a role's arm that are wanted."""
    arm = context.arm_of(role)
    if arm is None or "top_tokens" not in arm.features:
        return {}
    return {
        int(feature): first_tokens(list(tokens), limit, longest=None)
        for feature, tokens in zip(arm.features["feature"], arm.features["top_tokens"], strict=True)
        if int(feature) in wanted
    }
