"""Do other SAEs of a study agree on a vocabulary? The mean activation difference along their features of it.

Nulls keep the mean activation difference, so it can be laid along the features of any SAE at the same hook. An SAE that
saw the base model alone is one more test against the nulls. One that was trained with the fine-tuned model is not: its
features were made to follow this fine-tune, and nulls have no such SAE. What it shows is reported without a p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.diffing.matching import unit_rows
from saeffect.diffing.naming import beside_nulls, evidence_row
from saeffect.diffing.standardised import differences_among_nulls
from saeffect.diffing.trace import Trace
from saeffect.stats.multiplicity import simes

__all__ = ["ALL", "SEEN", "FurtherSae", "further_evidence"]

ALL = "all"
"""The basis of the row that holds all others together."""
SEEN = "seen, not tested: trained with the fine-tuned model, and nulls have no SAE of their own"


@dataclass(frozen=True, eq=False)
class FurtherSae:
    """Decoder rows [d_sae, d_in] at the hook of the traces, and which features are of each vocabulary, bool [d_sae].

    Attributes:
        base_alone: Whether it was trained on the base model alone.
    """

    name: str
    W_dec: npt.NDArray[np.float32]
    members: Mapping[str, npt.NDArray[np.bool_]]
    base_alone: bool


def further_evidence(
    found: pd.DataFrame, saes: Sequence[FurtherSae], trace: Trace, nulls: Sequence[Trace], alpha: float
) -> pd.DataFrame:
    """`found`, the table `evidence` of `name_changes`, with rows of kind "vocabulary" for further SAEs and for `ALL`.

    For an SAE the basis is "difference in <name>": score and p are as those of "difference", on its own features. `ALL`
    combines the p of "combined" and of all tested further SAEs by `simes`; its score is NaN.
    """
    rows = []
    of_words = found[(found["kind"] == "vocabulary") & (found["basis"] == "combined")]
    for own in of_words.to_dict("records"):
        name, p = own["name"], [own["p"]]
        for sae in saes:
            score, mine, reason = _tested(sae, name, [trace, *nulls])
            same = np.sign(score) == np.sign(own["score"])
            row = evidence_row("vocabulary", name, f"difference in {sae.name}", score, mine, same, alpha)
            rows.append(row | {"reason": reason})
            p.append(mine if same or math.isnan(mine) else 1.0)
        rows.append(evidence_row("vocabulary", name, ALL, math.nan, simes(p), True, alpha))
    return found if not rows else pd.concat([found, pd.DataFrame(rows).astype({"group": "Int64"})], ignore_index=True)


def _tested(sae: FurtherSae, vocabulary: str, traces: Sequence[Trace]) -> tuple[float, float, str]:
    """Score, p and reason."""
    members = sae.members[vocabulary]
    if not members.any():
        return math.nan, math.nan, "no feature is of this group"
    z = differences_among_nulls(traces, unit_rows(sae.W_dec.astype(np.float64)))
    own, *others = z[:, members].mean(axis=1)
    if not np.any(z):
        return math.nan, math.nan, "the mean activation does not differ"
    return (float(own), beside_nulls(own, others)["p"], "") if sae.base_alone else (float(own), math.nan, SEEN)
