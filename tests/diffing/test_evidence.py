"""What SAEs besides the control's say of a vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from saeffect.diffing.evidence import ALL, SEEN, FurtherSae, further_evidence
from saeffect.diffing.naming import evidence_row
from synthetic_trace import made

FOUND = pd.DataFrame([evidence_row("vocabulary", "medical", "combined", 2.0, 0.01, True, 0.05)]).astype(
    {"group": "Int64"}
)
W_DEC = np.array([[2.0, 0.0], [0.0, 5.0]], dtype=np.float32)


def moved(x: float) -> object:
    return replace(made(), halves=np.array([[x, 9.0], [x, 9.0]], dtype=np.float32))


def sae(name: str, *, base_alone: bool = True, members: tuple[bool, bool] = (True, False)) -> FurtherSae:
    return FurtherSae(name, W_DEC, {"medical": np.array(members)}, base_alone)


NULLS = [moved(x) for x in (-1.0, 0.0, 1.0, 0.0)]


def test_p_and_their_combination_by_hand() -> None:
    """Along the first feature the fine-tune moved by 3, nulls by -1, 0, 1, 0: scale sqrt(2 / 3 · 5 / 4)."""
    table = further_evidence(FOUND, [sae("seed2"), sae("tuned", base_alone=False)], moved(3.0), NULLS, 0.05)
    rows = table.set_index("basis")
    score = 3 / math.sqrt(2 / 3 * 5 / 4)
    p = 2 * student.sf(score, 3)
    assert rows.loc["difference in seed2", "score"] == pytest.approx(score)
    assert rows.loc["difference in seed2", "p"] == pytest.approx(p)
    assert rows.loc["difference in seed2", "agrees"] == (p <= 0.05)
    assert rows.loc["difference in tuned", "score"] == pytest.approx(score)
    assert math.isnan(rows.loc["difference in tuned", "p"])
    assert rows.loc["difference in tuned", "reason"] == SEEN
    assert rows.loc[ALL, "p"] == pytest.approx(min(2 * 0.01, p))


def test_the_other_direction_is_no_support() -> None:
    rows = further_evidence(FOUND, [sae("seed2")], moved(-30.0), NULLS, 0.05).set_index("basis")
    assert rows.loc["difference in seed2", "p"] < 0.01
    assert not rows.loc["difference in seed2", "agrees"]
    assert rows.loc[ALL, "p"] == pytest.approx(0.02)


def test_what_cannot_be_tested_has_a_reason() -> None:
    rows = further_evidence(FOUND, [sae("none", members=(False, False))], moved(3.0), NULLS, 0.05).set_index("basis")
    assert rows.loc["difference in none", "reason"] == "no feature is of this group"
    assert rows.loc[ALL, "p"] == pytest.approx(0.01)
    still = further_evidence(FOUND, [sae("still")], moved(0.0), [moved(0.0)] * 5, 0.05).set_index("basis")
    assert still.loc["difference in still", "reason"] == "the mean activation does not differ"
    assert further_evidence(FOUND.iloc[:0], [sae("seed2")], moved(3.0), NULLS, 0.05).empty
