"""The claims about each fine-tune, and whether they are right. The concepts' words are used only here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from concepts import CONCEPTS
from pairs import LEVELS, TUNED_ON, Pair

from saeffect.diffing.naming import name_changes
from saeffect.diffing.standardised import Basis
from saeffect.diffing.trace import Trace

__all__ = ["headline", "judge", "logit_lens"]

_NAMED = 3  # groups that the report's headline names
_WORDS = 2  # of a name's ten words that must be the concept's, the product's rule for domain features


def judge(pair: Pair, traces: Mapping[Pair, Trace], basis: Basis, alpha: float = 0.05) -> dict[str, Any]:
    """The claims about one fine-tune, each null judged among the others.

    Returns:
        claims: names of the claimed groups, lowest p first. right: whether one of the first three, which the report's
        headline names, fires more and is about the concept; first: whether the first one is. place: rank of the first
        group about the concept among all groups, claimed or not; p: its p.
    """
    nulls = [trace for other, trace in traces.items() if other.is_null and other != pair]
    groups = name_changes(traces[pair], nulls, basis, alpha=alpha)["change_groups"]
    claims = groups[groups["claimed"].astype(bool)]
    is_right = [
        row["direction"] == "more" and is_about(row["tokens"], pair) for row in claims.head(_NAMED).to_dict("records")
    ]
    concept_groups = [
        row for row in groups.to_dict("records") if row["direction"] == "more" and is_about(row["tokens"], pair)
    ]
    return {
        "name": pair.name,
        "concept": pair.concept,
        "percent": pair.percent,
        "null": pair.is_null,
        "tuned_on": pair.seed % 2 == 0 if pair.is_null else pair.concept in TUNED_ON,
        "kl": traces[pair].numbers["kl"],
        "claims": [f"{row['name']} ({row['direction']})" for row in claims.to_dict("records")],
        "right": any(is_right),
        "first": is_right[:1] == [True],
        "place": int(concept_groups[0]["group"]) if concept_groups else None,
        "p": float(concept_groups[0]["p"]) if concept_groups else None,
        "logit_lens": (lens := logit_lens(traces[pair], basis)),
        "logit_lens_right": is_about(lens, pair),
    }


def is_about(words: Sequence[str], pair: Pair) -> bool:
    """Whether at least two of the words are the concept's."""
    concept_words = CONCEPTS[pair.concept].words if pair.concept in CONCEPTS else frozenset()
    return sum(word in concept_words for word in words) >= _WORDS


def logit_lens(trace: Trace, basis: Basis) -> list[str]:
    """Ten top tokens of the mean activation difference, through the base model's norm and head (cosine scale).

    As diffing-toolkit's logit lens of the activation difference (Minder et al. 2025), which gives no p: it names
    something in every fine-tune.
    """
    difference = trace.halves.mean(axis=0).astype(np.float64)
    size = np.linalg.norm(basis.W_U, axis=0)
    scores = np.where(size > 0, difference @ basis.W_U / np.maximum(size, 1e-12), -np.inf)
    return [basis.strings[i].strip().lower() for i in np.argsort(-scores)[:10]]


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """claimed_<percent> (right claims among eight concepts), false_claims, nulls, and of the lens right_<percent>."""
    planted = [row for row in rows if not row["null"]]
    nulls = [row for row in rows if row["null"]]
    summary: dict[str, Any] = {}
    for level in LEVELS:
        level_rows = [row for row in planted if row["percent"] == level]
        if level_rows:
            summary |= {
                f"claimed_{level}": sum(row["right"] for row in level_rows),
                f"first_{level}": sum(row["first"] for row in level_rows),
                f"wrong_{level}": sum(bool(row["claims"]) and not row["right"] for row in level_rows),
                f"logit_lens_{level}": sum(row["logit_lens_right"] for row in level_rows),
            }
    unseen = [row for row in planted if not row["tuned_on"]]
    for level in {row["percent"] for row in unseen}:
        summary[f"claimed_{level}_unseen"] = sum(row["right"] for row in unseen if row["percent"] == level)
    return summary | {
        "false_claims": sum(bool(row["claims"]) for row in nulls),
        "false_claims_unseen": sum(bool(row["claims"]) for row in nulls if not row["tuned_on"]),
        "nulls": len(nulls),
    }
