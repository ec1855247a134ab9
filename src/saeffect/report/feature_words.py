"""A feature in a few words: the tokens that it promotes most."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from saeffect.text.tokens import printable_token

__all__ = ["feature_words"]


def feature_words(features: pd.DataFrame | None, wanted: object, limit: int = 5) -> Mapping[int, str]:
    """The first top tokens of some features, joined by commas.

    Args:
        features: An arm's feature table; None where it was not handed over.
        wanted: Features, anything that pandas' `isin` takes.
        limit: Tokens a feature.

    Example:
        >>> feature_words(pd.DataFrame({"feature": [7], "top_tokens": [[" drug", " dose", "\\n"]]}), [7], 2)
        {7: 'drug, dose'}
    """
    if features is None or features.empty or "top_tokens" not in features:
        return {}
    rows = features[features["feature"].isin(wanted)]  # type: ignore[arg-type]
    return {
        int(feature): ", ".join(printable_token(str(token)).strip() or "␣" for token in list(tokens)[:limit])
        for feature, tokens in zip(rows["feature"], rows["top_tokens"], strict=True)
    }
