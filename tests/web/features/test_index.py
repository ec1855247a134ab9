"""The list of features in memory: what is found, in which order, and how many each filter would leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saeffect.errors import ConfigError, NotFound, UnknownName
from saeffect.web.features.index import FeatureIndex, Verdicts
from saeffect.web.features.query import Query, StringSearch, TokenSearch
from saeffect.web.features.tables import ArmRoles, RunTables, read_index
from saeffect.web.site import Site

ARMS = ArmRoles({"control": "control", "treatment": "treatment", "placebo": "placebo"}, "control", "treatment")


def found(index: FeatureIndex, **query: Any) -> list[tuple[str, int]]:
    positions = index.find(Query(**query)).positions.tolist()
    return [(index.arm_of(place), int(index.numbers[place])) for place in positions]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tokens = [
        [" heart", "Heart", " lung"],
        [" sweetheart", " heart", " dear"],
        ["hearth", " fire", "ash"],
        [" 12", "a"],
    ]
    features = pd.DataFrame(
        {
            "feature": [0, 1, 2, 12],
            "top_tokens": tokens,
            "top_weights": [[1.0] * len(row) for row in tokens],
            "density": [0.1, 0.01, 0.001, np.nan],
            "mean_activation": [1.0, 2.0, 3.0, np.nan],
            "decoder_norm": 1.0,
        }
    )
    for arm in ARMS.roles:
        folder = tmp_path / "arms" / arm
        folder.mkdir(parents=True)
        features.to_parquet(folder / "features.parquet", index=False)
    control = tmp_path / "arms" / "control"
    pd.DataFrame({"feature": [2, 0, 1], "coherence": [0.3, 0.1, np.nan]}).to_parquet(control / "coherence.parquet")
    selection = {"feature": [0, 1, 2, 12], "matches": [2, 0, 0, 0], "is_domain": [True, False, False, False]}
    votes = {"n_yes": [2, 0, 1, 0], "n_no": [1, 3, 1, 0], "n_unsure": [0, 0, 0, 1], "label": ["organ", "", "", "blood"]}
    pd.DataFrame(selection | votes).to_parquet(control / "selection.parquet")
    effects = {"feature": [0, 0, 1], "effect": [9.0, 0.5, -0.5], "passed": [True, True, False]}
    pd.DataFrame(effects | {"declared": [False, True, True], "q": 0.1}).to_parquet(control / "effects.parquet")
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    change = {
        "feature": [0, 1, 2, 12] * 2,
        "basis": ["combined"] * 4 + ["read"] * 4,
        "change": [np.nan] * 4 + [1, 2, 3, 4.0],
    }
    z, p = [1.0, -5.0, 3.0, np.nan] * 2, [0.5, 0.001, 0.01, np.nan] * 2
    pd.DataFrame(change | {"z": z, "p": p}).to_parquet(comparison / "changes.parquet")
    fates = {
        "measure": ["decoder cosine"] * 3,
        "feature": [0, 1, 2],
        "match": [1, 2, -1],
        "similarity": [0.9, 0.5, 0.1],
    }
    pd.DataFrame(fates | {"fate": ["kept", "moved", "gone"]}).to_parquet(comparison / "fates_control.parquet")
    return tmp_path


@pytest.fixture
def index(run: Path) -> FeatureIndex:
    return read_index(RunTables(Site(run)), ARMS)


def test_exact_hits_rank_before_prefixes_before_substrings(index: FeatureIndex) -> None:
    assert found(index, q="heart", arm="control") == [("control", 0), ("control", 1), ("control", 2)]
    assert found(index, q="EART", arm="control") == [("control", 0), ("control", 1), ("control", 2)]
    assert found(index, q='"hearth"', arm="control") == [("control", 2)]
    assert found(index, q="heart dear", arm="control") == [("control", 1)]
    assert found(index, q="heart nothing") == []


def test_numbers_and_labels_are_found_too(index: FeatureIndex) -> None:
    assert found(index, q="12", arm="control") == [("control", 12)]
    assert found(index, q="1", arm="control") == [("control", 1), ("control", 12)]
    assert found(index, q="blood") == [("control", 12)]
    assert {number for _, number in found(index, q="#2")} == {2}


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ({"domain": "yes"}, [0]),
        ({"fate": "gone"}, [2]),
        ({"verdict": "yes"}, [0]),
        ({"verdict": "no"}, [1]),
        ({"verdict": "disputed"}, [2]),
        ({"verdict": "unsure"}, [12]),
        ({"tested": "passed"}, [0]),
        ({"tested": "failed"}, [1]),
        ({"effect_min": 0.0}, [0]),
        ({"p_max": 0.01}, [1, 2]),
        ({"direction": "less"}, [1]),
        ({"coherence_min": 0.2}, [2]),
        ({"coherence_max": 0.2}, [0]),
        ({"density_min": 0.01, "density_max": 0.01}, [1]),
        ({"sort": "coherence"}, [2, 0, 1, 12]),
        ({"sort": "-coherence"}, [0, 2, 1, 12]),
        ({"sort": "feature"}, [0, 1, 2, 12]),
        ({"sort": "change"}, [1, 2, 0, 12]),
        ({"sort": "p"}, [1, 2, 0, 12]),
        ({"sort": "change", "basis": "read"}, [1, 2, 0, 12]),
    ],
)
def test_filters_and_orders(index: FeatureIndex, query: dict[str, Any], numbers: list[int]) -> None:
    assert found(index, arm="control", **query) == [("control", number) for number in numbers]


def test_an_effect_is_that_of_the_declared_test(index: FeatureIndex) -> None:
    assert index.value("effect", index.position("control", 0)) == 0.5


def test_counts_say_what_each_value_would_leave(index: FeatureIndex) -> None:
    counts = index.find(Query(arm="control", fate="gone")).counts
    assert counts["fate"] == {"kept": 1, "moved": 1, "gone": 1, "unknown": 1}
    assert counts["domain"] == {"no": 1}
    assert counts["arm"] == {"control": 1, "treatment": 0, "placebo": 0}
    for name in ("domain", "fate", "verdict", "tested"):
        for value, n in index.find(Query()).counts[name].items():
            assert len(found(index, **{name: value})) == n, (name, value)


def test_pages_and_neighbours_follow_the_order(index: FeatureIndex) -> None:
    query = Query(arm="control", sort="feature", page=9)
    assert index.find(query).page == 1
    before, after, rank = index.neighbours(query, index.position("control", 1))
    assert (before, after, rank) == (index.position("control", 0), index.position("control", 2), 2)
    assert index.neighbours(query, index.position("placebo", 0)) == (None, None, 0)


def test_new_verdicts_change_the_answers(index: FeatureIndex) -> None:
    n = len(index)
    votes = np.zeros(n, dtype=np.int64)
    yes = votes.copy()
    yes[index.position("placebo", 2)] = 1
    later = index.with_verdicts(Verdicts(yes, votes, votes, ["x"] * n))
    assert found(later, verdict="yes") == [("placebo", 2)]
    assert found(index, verdict="yes") == [("control", 0)]


def test_unknown_names_list_what_there_is(index: FeatureIndex) -> None:
    with pytest.raises(UnknownName, match="placebo"):
        index.find(Query(arm="other"))
    with pytest.raises(NotFound, match="up to 12"):
        index.position("control", 13)
    with pytest.raises(UnknownName, match="kept"):
        Query.read({"fate": "lost"})
    for wrong in ({"coherence_min": "x"}, {"coherence_min": "nan"}, {"page": "0"}, {"page": "x"}, {"q": "x" * 201}):
        with pytest.raises(ConfigError):
            Query.read(wrong)


def test_an_address_gives_the_query_again() -> None:
    query = Query(q='"a b" é&', arm="control", fate="gone", coherence_min=0.25, sort="-p", page=3)
    params = dict(pair.split("=") for pair in query.address().split("&"))
    from urllib.parse import unquote_plus

    assert Query.read({name: unquote_plus(value) for name, value in params.items()}) == query
    assert Query().address() == ""


def test_arms_without_features_and_damaged_tables_are_reasons(run: Path) -> None:
    (run / "arms" / "placebo" / "features.parquet").unlink()
    (run / "arms" / "treatment" / "features.parquet").write_bytes(b"PAR1 no")
    (run / "arms" / "control" / "coherence.parquet").write_bytes(b"")
    index = read_index(RunTables(Site(run)), ARMS)
    assert index.arms == ("control",) and set(index.missing) == {"placebo", "treatment"}
    assert "cannot be read" in index.missing["treatment"]
    assert np.isnan(index.value("coherence", 0))
    with pytest.raises(NotFound, match="has not finished"):
        index.find(Query(arm="placebo"))


def test_a_run_without_any_features_gives_an_empty_list(tmp_path: Path) -> None:
    index = read_index(RunTables(Site(tmp_path)), ARMS)
    assert len(index) == 0 and found(index, q="heart", fate="gone") == []


def test_search_agrees_with_python_on_many_strings() -> None:
    generator = np.random.default_rng(0)
    strings = ["".join(generator.choice(list("abé ")) for _ in range(generator.integers(0, 6))) for _ in range(500)]
    search = StringSearch(strings)
    for word in ("a", "ab", "é", "éa", " ", "abab", "b"):
        wanted = [3.0 if s == word else 2.0 if s.startswith(word) else 1.0 if word in s else 0.0 for s in strings]
        assert search.grades(word).tolist() == wanted, word
    table = generator.integers(-1, 500, size=(80, 4)).astype(np.int32)
    names = [string.strip() for string in strings]
    scores = TokenSearch(names, table).scores("ab")
    assert [score > 0 for score in scores] == [any(t >= 0 and "ab" in names[t] for t in row) for row in table.tolist()]
