"""What SAEs besides the control's say of a vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import synthetic_traces
from saeffect.diffing.naming import ALL, SEEN, FurtherSae, further_evidence, name_changes
from saeffect.diffing.standardised import Basis
from saeffect.diffing.trace import Trace
from synthetic_traces import D_SAE, D_VOCAB, TOP_TOKENS

RNG = np.random.default_rng(5)
W_DEC = RNG.normal(size=(D_SAE, 4)).astype(np.float32)
MEMBERS = W_DEC[:, 0] / np.linalg.norm(W_DEC, axis=1) > 0.7


def moved(seed: int, by: float = 0.0) -> Trace:
    """The mean activation moved at random, and by so much along the members."""
    halves = np.random.default_rng(seed).normal(size=4) + by * np.array([1.0, 0, 0, 0])
    return replace(synthetic_traces.trace(seed, numbers={"kl": 0.1}), halves=np.tile(halves, (2, 1)).astype(np.float32))


NULLS = [moved(seed) for seed in range(1, 13)]


def found(trace: Trace) -> pd.DataFrame:
    basis = Basis(W_DEC, np.eye(4, D_VOCAB, dtype=np.float32), TOP_TOKENS, [f"w{i}" for i in range(D_VOCAB)])
    return name_changes(trace, NULLS, basis, declared={"medical": MEMBERS})["evidence"]


def sae(name: str, *, base_alone: bool = True, members: np.ndarray = MEMBERS) -> FurtherSae:
    return FurtherSae(name, 3 * W_DEC, {"medical": members}, base_alone)


def test_only_saes_of_the_base_model_are_tested() -> None:
    """On the control's own features, however long, score and p are those of its mean difference."""
    trace = moved(0, by=4.0)
    first = found(trace)
    table = further_evidence(first, [sae("seed2"), sae("tuned", base_alone=False)], trace, NULLS, 0.05)
    rows = table[table["kind"] == "vocabulary"].set_index("basis")
    own = rows.loc["difference"]
    assert own["agrees"]
    assert rows.loc["difference in seed2", ["score", "p"]].to_list() == pytest.approx([own["score"], own["p"]])
    assert rows.loc["difference in tuned", "score"] == pytest.approx(own["score"])
    assert math.isnan(rows.loc["difference in tuned", "p"])
    assert rows.loc["difference in tuned", "reason"] == SEEN
    low, high = sorted([rows.loc["combined", "p"], own["p"]])
    assert rows.loc[ALL, "p"] == pytest.approx(min(2 * low, high))


def test_moving_everything_does_not_credit_the_vocabulary() -> None:
    trace = replace(moved(0), halves=30 * moved(0).halves)
    table = further_evidence(found(trace), [sae("seed2")], trace, NULLS, 0.05).set_index("basis")
    assert table.loc["difference in seed2", "p"] > 0.05


def test_the_other_direction_is_no_support() -> None:
    trace = moved(0, by=-8.0)
    first = found(trace)
    first.loc[first["kind"] == "vocabulary", "score"] = 1.0
    rows = further_evidence(first, [sae("seed2")], trace, NULLS, 0.05)
    rows = rows[rows["kind"] == "vocabulary"].set_index("basis")
    assert rows.loc["difference in seed2", "p"] < 0.05
    assert not rows.loc["difference in seed2", "agrees"]
    assert rows.loc[ALL, "p"] == pytest.approx(min(1.0, 2 * rows.loc["combined", "p"]))


def test_what_cannot_be_tested_has_a_reason() -> None:
    trace = moved(0)
    first = found(trace)
    rows = further_evidence(first, [sae("none", members=MEMBERS & False)], trace, NULLS, 0.05).set_index("basis")
    assert rows.loc["difference in none", "reason"] == "no feature is of this group"
    assert rows.loc[ALL, "p"] == rows.loc["combined", "p"].iloc[-1]
    still = [replace(one, halves=np.zeros_like(one.halves)) for one in (trace, *NULLS)]
    rows = further_evidence(first, [sae("still")], still[0], still[1:], 0.05).set_index("basis")
    assert rows.loc["difference in still", "reason"] == "the mean activation does not differ"
    assert further_evidence(first.iloc[:0], [sae("seed2")], trace, NULLS, 0.05).empty
