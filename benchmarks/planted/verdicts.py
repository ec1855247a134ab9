"""What the comparisons say about each fine-tune, concept by concept, and how often they cry wolf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from fine_tunes import NULLS
from plan import Plan
from scoring import Named, chance, concept_tests, excess_p, most_changed, score

from saeffect.stats import benjamini_hochberg

__all__ = ["judge"]

ALPHA = 0.05


def judge(
    changes: Mapping[str, pd.DataFrame], named: Named, top_tokens: Sequence[Sequence[str]], plan: Plan
) -> dict[str, Any]:
    """Verdicts as plain data: `models` (one entry a fine-tune), `concepts` (chance levels), `nulls` (alarms).

    Args:
        changes: By fine-tune, as `compare` gives them: concepts, then nulls.
        named: Features about each planted concept.
        top_tokens: Of every feature.
        plan: Sizes and thresholds.
    """
    n_features = len(top_tokens)
    models = {name: _model(table, name, named, top_tokens, plan) for name, table in changes.items()}
    concepts = {}
    for name, members in named.items():
        expected, at_least_one = chance(int(members.sum()), n_features, plan.top)
        concepts[name] = {"in_sae": int(members.sum()), "expected_hits": expected, "chance_of_a_hit": at_least_one}
    return {"models": models, "concepts": concepts, "nulls": _alarms(changes, models)}


def _model(
    table: pd.DataFrame, name: str, named: Named, top_tokens: Sequence[Sequence[str]], plan: Plan
) -> dict[str, Any]:
    top, sizes = most_changed(table, plan.top), score(table)
    tests = concept_tests(top, named, np.isfinite(sizes))
    features = [
        {
            "feature": i,
            "score": float(sizes[i]),
            "mean_control": float(table["mean_control"][i]),
            "mean_treatment": float(table["mean_treatment"][i]),
            "q": float(table["q"][i]),
            "tokens": list(top_tokens[i]),
            "concepts": [concept for concept, members in named.items() if members[i]],
        }
        for i in top
    ]
    ranks: dict[str, int | None] = {}
    order = np.argsort(-np.nan_to_num(np.abs(sizes), nan=-1.0), kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(1, len(order) + 1)
    for concept, members in named.items():
        ranks[concept] = int(place[members].min()) if members.any() else None
    hits = dict(zip(tests["concept"], tests["hits"].tolist(), strict=True))
    alarms = tests.loc[tests["q"] <= ALPHA, "concept"].tolist()
    return {
        "top": features,
        "hits": hits,
        "best_rank": ranks,
        "p": dict(zip(tests["concept"], tests["p"].tolist(), strict=True)),
        "said": alarms,  # concepts that the most changed features are about, beyond chance
        "changed_share": float((table["q"] <= ALPHA).mean()),
        "found": bool(name in hits and hits[name] > 0),
    }


def _alarms(changes: Mapping[str, pd.DataFrame], models: Mapping[str, Any]) -> dict[str, Any]:
    """Three kinds of alarm on the nulls.

    `concept` (the primary one): the most changed features are about some concept beyond chance, at q = 0.05 over the
    concepts. `feature`: some feature's change is beyond the other nulls', at q = 0.05 over the features. `any_change`:
    some feature differs between the two models at all, at q = 0.05 over the features.
    """
    nulls = [name for name in NULLS if name in changes]
    sizes = {name: score(changes[name]) for name in nulls}
    found: dict[str, Any] = {}
    for name in nulls:
        others = [sizes[other] for other in nulls if other != name]
        p = excess_p(sizes[name], others, changes[name]["density_control"].to_numpy(dtype=np.float64))
        q = benjamini_hochberg(p)
        found[name] = {
            "concept": models[name]["said"],
            "concept_p": models[name]["p"],
            "feature": int((q <= ALPHA).sum()),
            "any_change": int((changes[name]["q"] <= ALPHA).sum()),
        }
    return found
