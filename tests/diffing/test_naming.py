"""Naming what changed: standardised changes, groups, and their p against null fine-tunes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.diffing.coactivity import FiringLog, coactivation
from saeffect.diffing.naming import name_changes
from saeffect.diffing.standardised import (
    BASES,
    FEWEST_NULLS,
    Basis,
    GroupTests,
    among_nulls,
    group_tests,
    raw_changes,
)
from saeffect.diffing.trace import Trace
from saeffect.errors import BadFile, ShapeMismatch

D_SAE, D_IN, D_VOCAB = 240, 16, 300


def make_trace(
    seed: int,
    *,
    moved: list[int] | None = None,
    by: float = 0.0,
    d_sae: int = D_SAE,
    shift: np.ndarray | None = None,
) -> Trace:
    """A fine-tune that changes every mean by some 10 %, and those of some features by more; the mean activation in any
    direction, and by `shift` beside.
    """
    rng, base = np.random.default_rng(seed), np.random.default_rng(0)
    means = {name: base.exponential(1.0, d_sae) for name in ("read", "written")}
    expected = base.dirichlet(np.ones(D_VOCAB))

    def tuned(x: np.ndarray, moved: list[int]) -> np.ndarray:
        new = x * np.exp(0.1 * rng.normal(size=len(x)))
        new[moved] *= math.exp(by)
        return new

    arrays = {
        name: np.stack([x, tuned(x, moved or []), np.full(d_sae, 0.1), np.full(d_sae, 0.1)]).astype(np.float32)
        for name, x in means.items()
    }
    words = [f * 1 for f in moved or []]
    return Trace(
        f"fine-tune {seed}",
        "same",
        **arrays,
        expected=np.stack([expected, tuned(expected, words)]).astype(np.float32),
        positions=np.zeros((4, D_IN), dtype=np.float32),
        halves=np.tile(rng.normal(size=D_IN) + (0 if shift is None else shift), (2, 1)).astype(np.float32),
        kl=np.zeros((2, 4), dtype=np.float32),
        layers=np.zeros(2, dtype=np.float32),
        early=np.zeros((2, 1, D_IN), dtype=np.float32),
        openings=np.zeros(1, dtype=np.float32),
        texts=np.zeros((100, 30), dtype=np.int32),
        base_texts=np.zeros((1, 4), dtype=np.int32),
        numbers={"n_tokens": 3000.0, "kl": 0.1},
    )


@pytest.fixture
def basis() -> Basis:
    """Features 0 to 7 lie close together and promote the words 0 to 7."""
    rng = np.random.default_rng(1)
    W_dec = rng.normal(size=(D_SAE, D_IN)).astype(np.float32)
    W_dec[:8] = W_dec[0] + 0.2 * rng.normal(size=(8, D_IN))
    top = rng.integers(8, D_VOCAB, size=(D_SAE, 3))
    top[:8] = [[i, (i + 1) % 8, (i + 2) % 8] for i in range(8)]
    strings = [f" word{i}" for i in range(D_VOCAB)]
    return Basis(W_dec, rng.normal(size=(D_IN, D_VOCAB)).astype(np.float32), top, strings)


@pytest.fixture
def nulls() -> list[Trace]:
    return [make_trace(100 + i) for i in range(8)]


def test_a_group_that_changed_is_claimed_by_its_words(basis: Basis, nulls: list[Trace]) -> None:
    tables = name_changes(make_trace(1, moved=list(range(8)), by=0.5), nulls, basis)
    first = tables["change_groups"].iloc[0]
    assert first["claimed"]
    assert first["direction"] == "more"
    assert first["p"] < 0.01
    assert set(first["features"]) <= set(range(8))
    assert set(first["tokens"]) <= {f"word{i}" for i in range(8)}


def test_rests_of_words_name_no_group(basis: Basis, nulls: list[Trace]) -> None:
    pieces = {0: "plete", 1: "Rist", 2: "–", 3: "word4"}  # the last one also follows a space elsewhere
    rests = replace(basis, strings=[pieces.get(i, text) for i, text in enumerate(basis.strings)])
    first = name_changes(make_trace(1, moved=list(range(8)), by=0.5), nulls, rests)["change_groups"].iloc[0]
    assert "plete" not in first["tokens"]
    assert set(first["tokens"]) <= {"rist", "–", *(f"word{i}" for i in range(4, 8))}
    assert replace(basis, strings=["ab", "cd"]).stands_alone("ab"), "this tokenizer shows no spaces"


def test_a_group_that_fires_less_is_claimed_as_less(basis: Basis, nulls: list[Trace]) -> None:
    groups = name_changes(make_trace(1, moved=list(range(8)), by=-0.5), nulls, basis)["change_groups"]
    assert groups["direction"].iloc[0] == "less"
    assert groups["claimed"].iloc[0]


def test_nothing_is_claimed_of_a_further_null(basis: Basis, nulls: list[Trace]) -> None:
    groups = name_changes(make_trace(200), nulls, basis)["change_groups"]
    assert not groups["claimed"].any()
    assert (groups["reason"] == "null fine-tunes reach as much").all()
    assert groups["n_features"].sum() == len({f for row in groups["features"] for f in row})


def test_few_nulls_give_no_p_and_the_reason(basis: Basis, nulls: list[Trace]) -> None:
    tables = name_changes(make_trace(1), nulls[: FEWEST_NULLS - 1], basis)
    assert len(tables["change_groups"]) == 0
    assert tables["changes"]["z"].isna().all()
    assert "4 null fine-tunes" in tables["changes"]["reason"].iloc[0]


def test_a_declared_group_is_tested_without_a_search(basis: Basis, nulls: list[Trace]) -> None:
    declared = {"taught": np.arange(D_SAE) < 8, "other": np.arange(D_SAE) >= 200, "none": np.zeros(D_SAE, dtype=bool)}
    table = name_changes(make_trace(1, moved=list(range(8)), by=0.2), nulls, basis, declared=declared)[
        "declared_changes"
    ].set_index(["name", "basis"])
    assert table.loc[("taught", "combined"), "p"] < 0.01
    assert table.loc[("other", "combined"), "p"] > 0.05
    assert math.isnan(table.loc[("none", "read"), "p"])
    assert table.loc[("none", "read"), "reason"] == "no feature is of this group"


def test_standardised_changes_by_hand() -> None:
    """Two features in one stratum; roots of their means change by 1 and 0; the nulls scatter about 0."""

    def trace(read: tuple[float, float]) -> Trace:
        one = make_trace(0, d_sae=2)
        rows = np.array([[1.0, 1.0], read, [0.1, 0.1], [0.1, 0.1]], dtype=np.float32)
        return replace(one, read=rows, written=rows)

    top = np.zeros((2, 1), dtype=np.int64)
    nulls = [trace((1.0, 4.0)), trace((1.0, 0.0)), trace((1.0, 1.0))]  # changes of roots: 0 0 0 and 1 -1 0
    z = among_nulls([trace((4.0, 1.0)), *nulls], top)[0]
    # Variances 0 and 1, pooled 1/2: scales sqrt(1/4 · 4/3) and sqrt(3/4 · 4/3) = 1.
    plain = np.array([1 / math.sqrt(1 / 3), 0.0])
    spread = np.median(np.abs(plain - np.median(plain))) * 1.4826
    assert z["read"] == pytest.approx(plain / max(1.0, spread))


def test_changes_on_each_basis_by_hand() -> None:
    """Roots of means; logarithms of probabilities, each top token by itself; the length along a direction."""
    rows = np.array([[1.0, 4.0], [9.0, 0.0], [0.1, 0.1], [0.1, 0.1]], dtype=np.float32)
    expected = np.array([[0.1, 0.4, 0.5, 0.0], [0.2, 0.1, 0.7, 0.0]], dtype=np.float32)
    halves = np.zeros((2, D_IN), dtype=np.float32)
    halves[:, 0] = [1.0, 3.0]
    trace = replace(make_trace(0, d_sae=2), read=rows, written=rows[:, ::-1], expected=expected, halves=halves)
    found = raw_changes(trace, np.array([[0, 1], [2, 3]]), np.eye(2, D_IN))
    assert found["read"].tolist() == [2.0, -2.0]
    assert found["written"].tolist() == [-2.0, 2.0]
    # ln 2 and -ln 4, not the logarithm of 0.3 / 0.5; of a token that is never expected, 0.
    assert found["expected"] == pytest.approx([-math.log(2) / 2, math.log(1.4) / 2], abs=1e-6)
    assert found["difference"].tolist() == [2.0, 0.0]
    assert set(raw_changes(trace, np.array([[0], [1]]))) == {"read", "written", "expected"}


def test_features_that_hardly_fire_are_not_judged() -> None:
    def trace(tokens: float, mean: float) -> Trace:
        one = make_trace(0, d_sae=2)
        n = one.numbers["n_tokens"]
        read = np.array([[1.0, 0.0], [1.0, mean], [0.1, 0.0], [0.1, tokens / n]], dtype=np.float32)
        return replace(one, read=read, written=read)

    top = np.zeros((2, 1), dtype=np.int64)
    nulls = [trace(2, 0.01), trace(0, 0.0), trace(1, 0.005)]
    for tokens, judged in ((9, False), (10, True)):
        fine_tune = trace(tokens, 5.0)
        z, *others = among_nulls([fine_tune, *nulls], top)
        assert np.isfinite(z["read"]).tolist() == [True, judged]
        assert np.isfinite(z["combined"]).all()
        # One model with so many tokens is enough for all of them to be judged.
        assert all(np.isfinite(found["read"]).all() == judged for found in others)
    z = among_nulls([trace(9, 5.0), *nulls], top)[0]
    assert z["combined"][1] == pytest.approx(z["expected"][1] / math.sqrt(3))


def test_p_counts_the_nulls_that_reach_the_score() -> None:
    tests = GroupTests(np.zeros((1, 1)), np.array([2.0, 3.0, 4.0, 5.0]))
    assert tests.p(4.0) == pytest.approx(3 / 5)
    assert tests.p(1.0) == 1.0
    # Above all: Student's t of a further logarithm.
    logs = np.log([2.0, 3.0, 4.0, 5.0])
    t = (math.log(100) - logs.mean()) / (logs.std(ddof=1) * math.sqrt(5 / 4))
    from scipy.stats import t as student

    assert tests.p(100.0) == pytest.approx(student.sf(t, 3))


def test_the_mean_difference_alone_names_a_group(basis: Basis, nulls: list[Trace]) -> None:
    tables = name_changes(make_trace(1, shift=6 * basis.directions[:8].sum(axis=0)), nulls, basis)
    groups = tables["change_groups"].set_index("group")
    taught = {number for number, row in groups.iterrows() if set(row["features"]) <= set(range(8))}
    rows = tables["evidence"].set_index(["group", "basis"])
    shown = rows[rows["agrees"]].reset_index()
    assert {"difference"} <= set(shown[shown["group"].isin(taught)]["basis"])
    assert not {"read", "written", "expected"} & set(shown["basis"])


def test_evidence_has_each_basis_and_their_sum(basis: Basis, nulls: list[Trace]) -> None:
    """p of a basis counts the search over all groups there: by hand for the first group."""
    trace = make_trace(1, moved=list(range(8)), by=0.5)
    tables = name_changes(trace, nulls, basis, declared={"taught": np.arange(D_SAE) < 8})
    first = tables["change_groups"].iloc[0]
    evidence = tables["evidence"]
    own = evidence[evidence["group"] == first["group"]].set_index("basis")
    assert list(own.index) == ["combined", *BASES]
    assert own.loc["combined", "p"] == first["p"]
    assert own.loc["combined", "score"] == first["score"]
    assert own.loc["read", "agrees"] == (own.loc["read", "p"] <= 0.05)
    z, *others = among_nulls([trace, *nulls], basis.top_tokens, basis.directions)
    read = group_tests(z["read"], np.array([other["read"] for other in others]), basis)
    place = [1, 3, 8].index(first["n_features"]), first["features"][0]
    assert own.loc["read", "p"] == read.p(abs(read.scores[place]))
    taught = evidence[evidence["kind"] == "vocabulary"].set_index("basis")
    assert set(taught["name"]) == {"taught"}
    assert taught.loc["combined", "agrees"]
    assert taught.loc["difference", "group"] is pd.NA


def test_a_basis_on_which_nothing_changes_agrees_with_nothing(basis: Basis, nulls: list[Trace]) -> None:
    still = [replace(one, halves=np.zeros_like(one.halves)) for one in (make_trace(1), *nulls)]
    rows = name_changes(still[0], still[1:], basis)["evidence"]
    mine = rows[rows["basis"] == "difference"]
    assert (mine["p"] == 1).all()
    assert not mine["agrees"].any()


def test_what_fires_together_is_grouped(basis: Basis) -> None:
    """Features 100 and 101 share no direction, but fire on the same 20 tokens of 200."""
    acts = torch.zeros(200, D_SAE)
    acts[:20, 100:102] = 1 + torch.rand(20, 1)
    acts[30:50, 102] = 1.0
    log = FiringLog(D_SAE)
    log.update(acts)
    first, block = next(coactivation(log))
    assert first == 0
    assert block[100, 101] == pytest.approx(1.0)
    assert block[100, 102] == 0  # they never fire together
    assert block[100, 0] == 0  # it never fires
    known = replace(basis, firing=log)
    assert 101 in known.neighbours[100, :8]
    assert 101 not in basis.neighbours[100, :8]
    assert known.neighbours[0].tolist() == basis.neighbours[0].tolist()


def test_neighbours_are_found_by_the_decoder(basis: Basis) -> None:
    near = basis.neighbours[:, :8]
    assert near[:, 0].tolist() == list(range(D_SAE))
    assert set(near[0]) == set(range(8))


def test_a_null_of_another_study_is_refused(basis: Basis, nulls: list[Trace]) -> None:
    with pytest.raises(BadFile, match="measured with another"):
        among_nulls([make_trace(1), *nulls, replace(nulls[0], made_by="other")], basis.top_tokens)
    with pytest.raises(ShapeMismatch, match="at least two"):
        among_nulls([make_trace(1), *nulls[:1]], basis.top_tokens)


@pytest.mark.simulation
def test_false_claims_are_as_rare_as_promised(basis: Basis) -> None:
    """200 further nulls against 20: at most alpha of them are claimed for anything, within Monte-Carlo error."""
    claims = 0
    for study in range(200):
        nulls = [make_trace(1000 * study + i) for i in range(1, 21)]
        claims += bool(name_changes(make_trace(1000 * study), nulls, basis)["change_groups"]["claimed"].any())
    assert claims <= 200 * 0.05 + 2.5 * math.sqrt(200 * 0.05 * 0.95)
