"""Choosing features in the playground: a short list by number, token or label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from saeffect.errors import ConfigError, unknown_name
from saeffect.web.site import Site

__all__ = ["described_features", "find_features"]

_SHOWN, _TOKENS, _LONGEST = 12, 6, 100


def find_features(site: Site, arm: str, words: str) -> list[dict[str, Any]]:
    """Up to twelve features: that of the number, then by label, by how early a top token fits, by how often it fires.

    Without words, those whose steering the run tested and found strongest, else domain features. UnknownName for an
    arm, NotFound where its features are not there yet.
    """
    table = _names(site, arm)
    asked = " ".join(words.casefold().split())[:_LONGEST]
    if not asked:
        return _described(site, arm, _suggested(site, arm, table)[:_SHOWN])
    number = [int(asked)] if asked.isdecimal() and int(asked) in table.index else []
    # Ranks of the first top token that begins with the words, contains them, or none.
    starts, inside = (_first(table["tokens"], asked, whole) for whole in (True, False))
    labelled = table["label"].str.contains(asked, regex=False).to_numpy(dtype=bool)
    rank = np.where(labelled, -1.0, np.where(starts < np.inf, starts, inside + 100))
    order = np.lexsort((-table["density"].to_numpy(), rank))
    found = [int(table.index[i]) for i in order[:_SHOWN] if rank[i] < np.inf]
    return _described(site, arm, list(dict.fromkeys([*number, *found]))[:_SHOWN])


def described_features(site: Site, arm: str, features: Sequence[int]) -> list[dict[str, Any]]:
    """Number, label and top tokens of features; ConfigError for one that the arm does not have."""
    table = _names(site, arm)
    unknown = [f for f in features if f not in table.index]
    if unknown:
        raise ConfigError(f"arm {arm} has no feature {unknown[0]}; they run to {table.index.max()}.", at="features")
    return _described(site, arm, features)


def _names(site: Site, arm: str) -> pd.DataFrame:
    """By feature: tokens (one text a feature, a line a token, lower case), label, density."""
    if arm not in site.arms:
        raise unknown_name("arm", arm, site.arms, at="arm")
    features = site.table("arms", arm, "features.parquet")
    files = [site.path("arms", arm, name) for name in ("features.parquet", "selection.parquet")]

    def make() -> pd.DataFrame:
        tokens = ["\n" + "\n".join(str(t).strip().casefold() for t in row) for row in features["top_tokens"]]
        made = pd.DataFrame({"tokens": tokens, "density": features["density"].fillna(0.0)})
        made.index = pd.Index(features["feature"].astype(int))
        labels = _labels(site, arm)
        return made.assign(label=[labels.get(int(f), "").casefold() for f in made.index])

    return site.cached(f"names of {arm}", files, make)


def _labels(site: Site, arm: str) -> dict[int, str]:
    if not site.has("arms", arm, "selection.parquet"):
        return {}
    table = site.table("arms", arm, "selection.parquet")
    named = table[table["label"].fillna("") != ""]
    return dict(zip(named["feature"].astype(int), named["label"].astype(str), strict=True))


def _first(tokens: pd.Series, asked: str, at_start: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The rank of each feature's first token that fits; infinite where none does."""
    places = tokens.str.find("\n" + asked if at_start else asked)
    ranks = [
        text.count("\n", 0, place + 1) if place >= 0 else np.inf for text, place in zip(tokens, places, strict=True)
    ]
    return np.asarray(ranks, dtype=np.float64)


def _suggested(site: Site, arm: str, table: pd.DataFrame) -> list[int]:
    if site.has("arms", arm, "effects.parquet"):
        effects = site.table("arms", arm, "effects.parquet").sort_values("direct_effect", ascending=False)
        if len(effects):
            return [int(f) for f in effects["feature"]]
    if site.has("arms", arm, "selection.parquet"):
        selection = site.table("arms", arm, "selection.parquet")
        domain = selection.loc[selection["is_domain"], "feature"]
        if len(domain):
            return [int(f) for f in domain]
    return [int(f) for f in table.sort_values("density", ascending=False).index]


def _described(site: Site, arm: str, features: Sequence[int]) -> list[dict[str, Any]]:
    table, labels = site.table("arms", arm, "features.parquet"), _labels(site, arm)
    tokens = table.set_index("feature")["top_tokens"] if len(features) else {}
    return [
        {"feature": int(f), "label": labels.get(int(f), ""), "tokens": [str(t) for t in tokens[f][:_TOKENS]]}
        for f in features
    ]
