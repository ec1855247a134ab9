"""Verdicts on each fine-tune, concept by concept, and false alarms on the nulls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from concepts import CONCEPTS
from fine_tunes import NULLS
from plan import Plan
from scoring import Named, beyond, chance, concept_tests, excess_p, most_changed

from saeffect.diffing.cross_activity import change_scores
from saeffect.lm.tokens import normalise_token
from saeffect.stats.multiplicity import benjamini_hochberg

__all__ = ["judge"]

ALPHA = 0.05


def judge(
    changes: Mapping[str, pd.DataFrame], named: Named, top_tokens: Sequence[Sequence[str]], plan: Plan
) -> dict[str, Any]:
    """Verdicts as plain data: `models` (one entry a fine-tune), `concepts` (chance levels of each,
    and of any together), `nulls` (alarms).

    Args:
        changes: By fine-tune, as `compare` gives them: concepts, then nulls.
        named: Features about each planted concept.
        top_tokens: Of every feature.
        plan: Sizes and thresholds.
    """
    n_features = len(top_tokens)
    models = {name: _model(table, name, named, top_tokens, plan) for name, table in changes.items()}
    nulls = {name: change_scores(changes[name]) for name in NULLS if name in changes}
    for name, model in models.items():
        # A null is held against the other two.
        beyond_nulls = beyond(change_scores(changes[name]), [scores for null, scores in nulls.items() if null != name])
        top = most_changed(beyond_nulls, plan.top)
        model["hits_beyond_nulls"] = {concept: int(members[top].sum()) for concept, members in named.items()}
    concepts = {}
    for name, members in named.items():
        expected, at_least_one = chance(int(members.sum()), n_features, plan.top)
        concepts[name] = {"in_sae": int(members.sum()), "expected_hits": expected, "chance_of_a_hit": at_least_one}
    about_any = np.any(list(named.values()), axis=0)
    return {
        "models": models,
        "concepts": concepts,
        "chance_of_any_hit": chance(int(about_any.sum()), n_features, plan.top)[1],
        "nulls": _alarms(changes, models),
    }


def _model(
    table: pd.DataFrame, name: str, named: Named, top_tokens: Sequence[Sequence[str]], plan: Plan
) -> dict[str, Any]:
    sizes = change_scores(table)
    top = most_changed(sizes, plan.top)
    density = table["density_control"].to_numpy(dtype=np.float64)
    tests = concept_tests(sizes, density, named, plan.top).set_index("concept")
    features = [
        {
            "feature": i,
            "score": float(sizes[i]),
            "mean_control": float(table["mean_control"][i]),
            "mean_treatment": float(table["mean_treatment"][i]),
            "q": float(table["q"][i]),
            "tokens": list(top_tokens[i]),
            "concepts": [concept for concept, members in named.items() if members[i]],
            "matched": {
                concept: [token for token in top_tokens[i] if normalise_token(token) in CONCEPTS[concept].words]
                for concept, members in named.items()
                if members[i]
            },
        }
        for i in top
    ]
    hits = tests["hits"].to_dict()
    return {
        "top": features,
        "hits": hits,
        "best_rank": {concept: _whole(rank) for concept, rank in tests["best_rank"].items()},
        "p": tests["p"].to_dict(),
        "said": tests.index[tests["q"] <= ALPHA].tolist(),  # concepts whose features changed beyond chance
        "changed_share": float((table["q"] <= ALPHA).mean()),
        "found": bool(hits.get(name, 0) > 0),
    }


def _whole(rank: Any) -> int | None:
    return None if pd.isna(rank) else int(rank)


def _alarms(changes: Mapping[str, pd.DataFrame], models: Mapping[str, Any]) -> dict[str, Any]:
    """Four kinds of alarm on the nulls.

    `concept` (the primary one): some concept's features changed beyond chance, at q = 0.05 over the concepts.
    `hits`: of the most changed features, how many are about any concept. `feature`: how many features' changes are
    beyond the other nulls', at q = 0.05 over the features. `any_change`: how many features differ between the two
    models at all, at q = 0.05 over the features.
    """
    nulls = [name for name in NULLS if name in changes]
    sizes = {name: change_scores(changes[name]) for name in nulls}
    alarms: dict[str, Any] = {}
    for name in nulls:
        others = [sizes[other] for other in nulls if other != name]
        p = excess_p(sizes[name], others, changes[name]["density_control"].to_numpy(dtype=np.float64))
        q = benjamini_hochberg(p)
        alarms[name] = {
            "concept": models[name]["said"],
            "concept_p": models[name]["p"],
            "hits": sum(bool(feature["concepts"]) for feature in models[name]["top"]),
            "feature": int((q <= ALPHA).sum()),
            "any_change": int((changes[name]["q"] <= ALPHA).sum()),
        }
    return alarms
