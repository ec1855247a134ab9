"""Coherence: by hand on toy vectors, at its edges, against a plain loop, and against the paper's figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeffect.errors import BadFile, ConfigError, ShapeMismatch, UnknownName
from saeffect.features.coherence import EPSILON, coherence, coherence_score, unique_coverage
from saeffect.features.embeddings import WordVectors, load_embeddings
from saeffect.lm.tokens import normalise_token

REFERENCE = Path(__file__).parents[1] / "reference"

# Cosines by hand: cat-dog 0.6, cat-car 0, dog-car 0.8, and 1 - 0.6 for the opposite of cat.
TOY = WordVectors.from_rows(["cat", "dog", "car", "tac", "zero"], [[2, 0], [3, 4], [0, 5], [-1, 0], [0, 0]], name="toy")


def table(*features: tuple[list[str], list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "feature": np.arange(len(features)) * 10,
            "top_tokens": [tokens for tokens, _ in features],
            "top_weights": [weights for _, weights in features],
        }
    )


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    data = json.loads((REFERENCE / "paper_features_baseline.json").read_text(encoding="utf-8"))
    with (REFERENCE / "paper_coherence_baseline.csv").open(encoding="utf-8", newline="") as file:
        scores = {row["feature_id"]: float(row["coherence_score"]) for row in csv.DictReader(file)}
    assert set(scores) == set(data) and len(scores) == 101
    return pd.DataFrame(
        {
            "feature": [int(key) for key in data],
            "top_tokens": [[item["word"] for item in row["top_words"]] for row in data.values()],
            "top_weights": [[item["activation"] for item in row["top_words"]] for row in data.values()],
            "published": [scores[key] for key in data],
        }
    )


class TestScore:
    @pytest.mark.parametrize(
        ("tokens", "weights", "expected"),
        [
            (["cat", "dog"], [3, 2], 0.6),
            (["cat", "dog", "car"], [3, 2, 1], (6 * 0.6 + 3 * 0.0 + 2 * 0.8) / 11),
            (["cat", "dog", "car"], [1, 1, 1], 1.4 / 3),
            (["Ġcat", " Dog", "▁CAR"], [1, 1, 1], 1.4 / 3),
            (["cat", "xyzzy", "dog"], [3, 100, 2], 0.6),
            (["cat", "tac"], [1, 5], -1.0),
            (["cat", "Ġcat", " Cat"], [3, 2, 1], 1.0),  # the same word thrice stays three items
            (["cat", "Cat", "car"], [1, 1, 1], 1 / 3),
            (["cat", "dog"], [-3, -2], 0.6),
            (["cat", "dog"], [-3, 2], 0.6),
            (["cat", "dog", "car"], [3, 2, -1], (6 * 0.6 - 3 * 0.0 - 2 * 0.8) / (6 - 3 - 2)),
            (["cat", "dog", "car"], [3, 2, 0], 0.6),
        ],
    )
    def test_by_hand(self, tokens: list[str], weights: list[float], expected: float) -> None:
        assert coherence_score(tokens, weights, embeddings=TOY) == pytest.approx(expected, abs=1e-7)

    def test_epsilon_is_in_the_denominator(self) -> None:
        weights = [2e-3, 1e-3]  # product 2e-6, so that epsilon moves the result by half a percent
        expected = 0.6 * 2e-6 / (2e-6 + 1e-8)
        assert coherence_score(["cat", "dog"], weights, embeddings=TOY) == pytest.approx(expected, rel=1e-9)
        assert EPSILON == 1e-8

    def test_arrays_and_tuples_are_as_good_as_lists(self) -> None:
        tokens, weights = np.array(["cat", "dog"]), np.array([3, 2], dtype=np.float32)
        assert coherence_score(tokens, weights, embeddings=TOY) == pytest.approx(0.6)
        assert coherence_score(tuple(tokens), tuple(weights), embeddings=TOY) == pytest.approx(0.6)

    def test_returns_a_plain_float(self) -> None:
        assert type(coherence_score(["cat", "dog"], [1, 1], embeddings=TOY)) is float

    def test_names_and_paths_load(self, tmp_path: Path) -> None:
        path = tmp_path / "v.txt"
        path.write_text("cat 2 0\ndog 3 4\n")
        assert coherence_score(["cat", "dog"], [1, 1], embeddings=path) == pytest.approx(0.6)
        with pytest.raises(UnknownName, match="glove-wiki-gigaword-100"):
            coherence_score(["cat", "dog"], [1, 1], embeddings="glove")


class TestUndefined:
    @pytest.mark.parametrize(
        ("tokens", "weights", "n_known", "reason"),
        [
            ([], [], 0, "0 of the top tokens"),
            (["xyzzy", "plugh"], [1, 1], 0, "0 of the top tokens"),
            (["cat"], [1], 1, "1 of the top tokens"),
            (["cat", "xyzzy"], [1, 1], 1, "1 of the top tokens"),
            (["cat", "zero"], [1, 1], 1, "1 of the top tokens"),  # a zero vector has no direction
            (["cat", "dog"], [0, 0], 2, "vanish"),
            (["cat", "dog"], [1e-5, 1e-5], 2, "vanish"),  # the equation would give 0.006
            (["cat", "dog", "car"], [2, 2, -1], 3, "cancel"),  # 4 - 2 - 2
            (["cat", "dog"], [np.nan, 1], 2, "NaN"),
            (["cat", "dog"], [np.inf, 1], 2, "infinite"),
            (["cat", "dog", "car"], [np.inf, 1, -np.inf], 3, "infinite"),
            (["cat", "dog"], [1e200, 1e200], 2, "overflow"),
        ],
    )
    def test_is_nan_with_a_reason(self, tokens: list[str], weights: list[float], n_known: int, reason: str) -> None:
        assert np.isnan(coherence_score(tokens, weights, embeddings=TOY))
        row = coherence(table((["cat", "dog", "car"], [1, 1, 1]), (tokens, weights)), embeddings=TOY).iloc[1]
        assert np.isnan(row.coherence)
        assert row.n_known == n_known
        assert reason in row.reason

    def test_nan_weight_of_unknown_token_is_ignored(self) -> None:
        assert coherence_score(["cat", "dog", "xyzzy"], [3, 2, np.nan], embeddings=TOY) == pytest.approx(0.6)

    def test_hostile_tokens_are_just_unknown(self) -> None:
        hostile = [
            "<script>alert(1)</script>",
            "\u202eevil\u202c",
            "\n",
            "",
            "Ġ",
            "\ufffd",
            "\x00",
            "a" * 10_000,
            "💊",
        ]
        tokens = [*hostile, "cat", "dog"]
        result = coherence(table((tokens, [1.0] * len(tokens)), (hostile, [1.0] * 9)), embeddings=TOY)
        assert result["n_known"].tolist() == [2, 0]
        assert result["coherence"][0] == pytest.approx(0.6)
        assert np.isnan(result["coherence"][1])


class TestMisuse:
    def test_one_weight_a_token(self) -> None:
        with pytest.raises(ShapeMismatch, match="Got 3 for 2 tokens"):
            coherence_score(["cat", "dog"], [1, 2, 3], embeddings=TOY)

    @pytest.mark.parametrize("tokens", ["cat", b"cat", None, 3.5, [None, "cat"], ["cat", 7], [b"cat", "dog"]])
    def test_tokens_must_be_strings(self, tokens: object) -> None:
        with pytest.raises(ConfigError, match="string"):
            coherence_score(tokens, [1, 2, 3], embeddings=TOY)  # type: ignore[arg-type]

    def test_missing_columns(self) -> None:
        with pytest.raises(BadFile, match="'top_weights'"):
            coherence(table().drop(columns="top_weights"), embeddings=TOY)
        with pytest.raises(BadFile, match="'top_tokens'"):
            unique_coverage(pd.DataFrame({"feature": [1]}), embeddings=TOY)


class TestTable:
    def test_columns_types_and_index(self) -> None:
        features = table((["cat", "dog"], [1, 1]), (["cat", "dog", "car"], [3, 2, 1]), (["cat"], [1]))
        features.index = pd.Index(["x", "y", "z"])
        result = coherence(features, embeddings=TOY)
        assert list(result.columns) == ["feature", "coherence", "n_known", "reason"]
        assert list(result.index) == ["x", "y", "z"]
        assert result["feature"].tolist() == [0, 10, 20]
        assert result["n_known"].tolist() == [2, 3, 1] and result["n_known"].dtype == np.int64
        np.testing.assert_allclose(result["coherence"], [0.6, 5.2 / 11, np.nan], atol=1e-8)
        assert result["reason"].tolist()[:2] == ["", ""]

    def test_no_features(self) -> None:
        result = coherence(table(), embeddings=TOY)
        assert len(result) == 0 and list(result.columns) == ["feature", "coherence", "n_known", "reason"]

    def test_table_equals_loop_over_pairs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("saeffect.features.coherence._NUMBERS_PER_BATCH", 100)
        features, embeddings = random_features(50, seed=3)
        result = coherence(features, embeddings=embeddings)
        for row, tokens, weights in zip(
            result["coherence"], features["top_tokens"], features["top_weights"], strict=True
        ):
            np.testing.assert_allclose(row, by_pairs(tokens, weights, embeddings), rtol=1e-9)

    def test_each_token_is_looked_up_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked_up = []

        def counting(token: str) -> str:
            looked_up.append(token)
            return normalise_token(token)

        monkeypatch.setattr("saeffect.features.coherence.normalise_token", counting)
        features, embeddings = random_features(300, seed=0)
        coherence(features, embeddings=embeddings)
        assert sorted(looked_up) == sorted({token for tokens in features["top_tokens"] for token in tokens})

    def test_weights_of_very_different_size_do_not_cancel(self) -> None:
        # The product that counts is 1, beside squares of 1e16.
        assert coherence_score(["cat", "dog"], [1e8, 1e-8], embeddings=TOY) == pytest.approx(0.6, rel=1e-7)
        assert coherence_score(["dog", "xyzzy", "cat"], [1e-8, 3, 1e8], embeddings=TOY) == pytest.approx(0.6, rel=1e-7)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.floats(0, 6))
    def test_agrees_with_pairs_for_weights_of_both_signs(self, seed: int, orders: float) -> None:
        rng = np.random.default_rng(seed)
        features, embeddings = random_features(5, seed=seed)
        weights = rng.normal(size=(5, 10)) * 10.0 ** rng.uniform(0, orders, (5, 10))
        features["top_weights"] = weights.tolist()
        result = coherence(features, embeddings=embeddings)
        for value, tokens, row in zip(result["coherence"], features["top_tokens"], weights, strict=True):
            size = np.abs(np.outer(row, row)).sum()
            known = [w for token, w in zip(tokens, row, strict=True) if normalise_token(token) in embeddings]
            total = (sum(known) ** 2 - sum(w * w for w in known)) / 2
            if np.isfinite(value) and abs(total) > 1e-5 * size:
                np.testing.assert_allclose(value, by_pairs(tokens, list(row), embeddings), rtol=1e-8, atol=1e-8)


class TestProperties:
    weights = st.lists(st.floats(0.1, 10), min_size=2, max_size=10)

    @settings(max_examples=50, deadline=None)
    @given(weights, st.floats(0.1, 1000), st.integers(0, 2**32 - 1))
    def test_the_scale_of_the_weights_does_not_matter(self, weights: list[float], scale: float, seed: int) -> None:
        tokens = np.random.default_rng(seed).choice(["cat", "dog", "car", "tac"], len(weights)).tolist()
        plain = coherence_score(tokens, weights, embeddings=TOY)
        scaled = coherence_score(tokens, [scale * w for w in weights], embeddings=TOY)
        assert scaled == pytest.approx(plain, abs=2e-4)  # epsilon, where the products are 1e-4

    @settings(max_examples=50, deadline=None)
    @given(weights, st.integers(0, 2**32 - 1))
    def test_bounds_and_order(self, weights: list[float], seed: int) -> None:
        rng = np.random.default_rng(seed)
        tokens = rng.choice(["cat", "dog", "car", "tac", "xyzzy"], len(weights)).tolist()
        value = coherence_score(tokens, weights, embeddings=TOY)
        assert np.isnan(value) or -1 <= value <= 1
        order = rng.permutation(len(weights))
        shuffled = coherence_score([tokens[i] for i in order], [weights[i] for i in order], embeddings=TOY)
        assert shuffled == pytest.approx(value, abs=1e-12, nan_ok=True)


class TestCoverage:
    def test_by_hand(self) -> None:
        features = table((["cat", "Ġcat", "xyzzy"], [1, 1, 1]), (["Dog", "zero", "xyzzy", "plugh"], [1, 1, 1, 1]))
        assert unique_coverage(features, embeddings=TOY) == pytest.approx(2 / 5)  # cat dog | xyzzy plugh zero

    def test_nothing_to_cover(self) -> None:
        assert np.isnan(unique_coverage(table(([], [])), embeddings=TOY))


class TestPaper:
    """The figures that the authors published for the 101 medical features of their baseline model."""

    def test_each_feature(self, published: pd.DataFrame) -> None:
        result = coherence(published, embeddings="glove-wiki-gigaword-100")
        # 1e-3 is what we promise; half precision costs 3e-5 of it.
        np.testing.assert_allclose(result["coherence"], published["published"], rtol=0, atol=5e-5)
        for row in published.itertuples():
            assert coherence_score(row.top_tokens, row.top_weights) == pytest.approx(row.published, abs=5e-5)

    def test_table_2(self, published: pd.DataFrame) -> None:
        values = coherence(published)["coherence"]
        assert round(values.mean(), 4) == 0.5438
        assert round(values.median(), 4) == 0.5648

    def test_words_that_are_left_out_are_pieces_of_words(self, published: pd.DataFrame) -> None:
        glove = load_embeddings()
        words = {normalise_token(token) for tokens in published["top_tokens"] for token in tokens}
        missing = {word for word in words if word not in glove}
        assert {"reatment", "opsy", "carcin", "schizophren"} <= missing
        assert unique_coverage(published) == pytest.approx(1 - len(missing) / len(words))
        assert unique_coverage(published) > 0.7


def random_features(n: int, *, seed: int, dim: int = 8) -> tuple[pd.DataFrame, WordVectors]:
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(500)]
    embeddings = WordVectors.from_rows(words, rng.normal(size=(500, dim)), name="random")
    tokens = [[f"ĠW{i}" for i in row] for row in rng.integers(0, 600, size=(n, 10))]  # one in six is unknown
    weights = rng.uniform(0.5, 4, size=(n, 10)).tolist()
    return pd.DataFrame({"feature": np.arange(n), "top_tokens": tokens, "top_weights": weights}), embeddings


def by_pairs(tokens: list[str], weights: list[float], embeddings: WordVectors) -> float:
    """The equation as one would write it first: a loop over pairs."""
    known = [
        (vector.astype(float), weight)
        for token, weight in zip(tokens, weights, strict=True)
        if (vector := embeddings.get(normalise_token(token))) is not None
    ]
    above = below = 0.0
    for i, (a, w_a) in enumerate(known):
        for b, w_b in known[i + 1 :]:
            above += w_a * w_b * float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))
            below += w_a * w_b
    return above / (below + 1e-8)
