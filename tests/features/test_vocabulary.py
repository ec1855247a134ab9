"""Word lists: loading, matching, selecting features, and choosing tokens by script or by word vectors."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from saeffect.config import SCRIPTS, FeaturesConfig
from saeffect.errors import BadFile, ConfigError, EmptySelection, NotFound, UnknownName
from saeffect.features.embeddings import WordVectors
from saeffect.features.vocabulary import (
    Vocabulary,
    _script_of,
    bundled_vocabularies,
    choosable_tokens,
    count_matches,
    load_vocabulary,
    select,
)

WORDS = Vocabulary("test", frozenset({"cancer", "tumor", "nurse"}), sha256="")
FOLDER = resources.files("saeffect") / "bundled" / "vocabularies"
HOSTILE = ["<script>", "\u202ecancer", "=cmd|' /C calc'!A0", "\n", "\ufffd", "", " "]


def _features() -> pd.DataFrame:
    """Four features: 3, 1, 0 and 2 matches under the study's own projection."""
    own = [
        [" cancer", "Ġcancer", " Nurse", " crab"],
        ["▁Tumor", " cancers", " hospital", " tumoral"],
        HOSTILE,
        ["CANCER", " cancer", " a", " b"],
    ]
    dot = [[" cancer", " nurse"], [" tumor", " nurse"], [], [" a"]]
    return pd.DataFrame({"feature": [4, 9, 11, 30], "top_tokens": own, "top_tokens_dot": dot, "top_tokens_cosine": own})


def domain_features(selection: pd.DataFrame) -> list[int]:
    return selection.loc[selection["is_domain"], "feature"].tolist()


def _verdicts(**columns: list[object]) -> pd.DataFrame:
    base = {"n_no": 0, "n_unsure": 0, "label": ""}
    return pd.DataFrame(columns).assign(**{k: v for k, v in base.items() if k not in columns})


# --- the bundled list -----------------------------------------------------------------------------


def test_medical_list_is_clean() -> None:
    lines = (FOLDER / "medical.txt").read_text(encoding="utf-8").splitlines()
    words = [line for line in lines if line and not line.startswith("#")]
    assert len(words) >= 1800
    assert len(words) == len(set(words))
    assert all(re.fullmatch(r"[a-z]+", word) for word in words)
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("#"):
            sections.append([])
        elif line:
            sections[-1].append(line)
    assert all(section == sorted(section) for section in sections)
    assert load_vocabulary("medical").words == frozenset(words)


def test_card_agrees_with_the_list() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    words = load_vocabulary("medical").words
    rows = re.findall(r"^\| [^|]+ \| ([a-z, \n]+) \|$", card, flags=re.MULTILINE)
    left_out = [word for row in rows for word in row.split(", ") if word != "words"]
    assert {"mouse", "cell", "back", "face", "temple", "who", "culture", "labor", "agent"} <= set(left_out)
    assert not words & set(left_out)
    assert f"{len(words):,} lower-case English words" in card
    assert f"{len(left_out)} words of the table" in card


@pytest.mark.parametrize("token", [" cancer", "ĠTumour", "▁diabetes", "FDA", " Physicians", "vaccine", " kidney"])
def test_medical_tokens_are_in(token: str) -> None:
    assert token in load_vocabulary("medical")


@pytest.mark.parametrize("token", [" mouse", " Who", " hearth", "otherapy", " canc", "", " ", "\n", "<script>"])
def test_others_are_not(token: str) -> None:
    assert token not in load_vocabulary("medical")


# --- loading --------------------------------------------------------------------------------------


def test_loads_comments_marks_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    data = "\ufeff# head\r\nCancer\r\n\r\nĠtumor # growth\r\n  œdème \r\ncancer\r\n".encode()
    path.write_bytes(data)
    vocabulary = load_vocabulary(path)
    assert vocabulary.words == {"cancer", "tumor", "œdème"}
    assert len(vocabulary) == 3
    assert vocabulary.sha256 == hashlib.sha256(data).hexdigest()
    assert vocabulary.name == str(path)


def test_a_file_in_the_current_folder_needs_no_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("crab\n")
    (tmp_path / "medical").write_text("crab\n")
    monkeypatch.chdir(tmp_path)
    assert load_vocabulary("mine").words == {"crab"}
    assert load_vocabulary("./medical").words == {"crab"}
    assert len(load_vocabulary("medical")) > 1000


@pytest.mark.parametrize(
    ("data", "position"),
    [
        ("cancer\ntumör\n".encode("latin-1"), 10),
        ("cancer\n".encode("utf-16"), 0),
        ("ab\n".encode("utf-16-be"), 0),
    ],
)
def test_another_encoding_is_refused_with_its_place(tmp_path: Path, data: bytes, position: int) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=f"at position {position} ") as caught:
        load_vocabulary(str(path))
    assert "UTF-8" in (caught.value.fix or "")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "\ufeff"])
def test_an_empty_list_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EmptySelection, match="not one word"):
        load_vocabulary(path)


@pytest.mark.parametrize(
    "line",
    ["\u200bCancer\u200d", '"cancer"', "“cancer”", "'Cancer'", " 'cancer' # quoted", "\ufeffcancer", "can\u00adcer"],
)
def test_invisible_characters_are_ignored(tmp_path: Path, line: str) -> None:
    (tmp_path / "words.txt").write_text(f"fever\n{line}\n", encoding="utf-8")
    vocabulary = load_vocabulary(tmp_path / "words.txt")
    assert vocabulary.words == {"fever", "cancer"} and " cancer" in vocabulary


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_match_in_either_normal_form(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    (tmp_path / "words.txt").write_text(unicodedata.normalize(form, "bénigne\nœdème\n"), encoding="utf-8")
    vocabulary = load_vocabulary(tmp_path / "words.txt")
    for other in ("NFC", "NFD"):
        assert unicodedata.normalize(other, " Bénigne") in vocabulary  # type: ignore[arg-type]


def test_words_that_no_token_is() -> None:
    tokens = ["ĠCancer", " tum", "or", "Nurse"]
    assert WORDS.unmatched(tokens) == ["tumor"]
    assert WORDS.unmatched([]) == ["cancer", "nurse", "tumor"]


def test_comma_between_digits_is_no_separator(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("1,25-dihydroxyvitamin\n")
    assert load_vocabulary(tmp_path / "words.txt").words == {"1,25-dihydroxyvitamin"}


@pytest.mark.parametrize("line", ["heart attack", "cancer,12", "cancer;12", "cancer\t12", '"cancer","Krebs"', "a|b"])
def test_two_words_on_a_line_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(f"cancer\n{line}\n")
    with pytest.raises(BadFile) as caught:
        load_vocabulary(path)
    assert caught.value.at == f"{path}, line 2"


def test_missing_files_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_vocabulary(tmp_path / "none")
    with pytest.raises(NotFound):
        load_vocabulary("none.txt")
    with pytest.raises(BadFile):
        load_vocabulary(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadFile, match="pipe"):
        load_vocabulary(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match="can be no path"):
        load_vocabulary("~nobody-of-that-name/words.txt")
    with pytest.raises(UnknownName) as caught:
        load_vocabulary("medica")
    assert caught.value.fix == "did you mean 'medical'?"
    assert "medical" in bundled_vocabularies()


# --- counting -------------------------------------------------------------------------------------


def test_tokens_differing_by_case_both_count() -> None:
    # Feature 53 of the paper's control model: six of its ten tokens count, two of which spell "disease".
    tokens = ["Ġillness", "Ġillnesses", "Ġsickness", "Ġdisease", "Ġailments", "ĠDisease", "Ġdiseases"]
    tokens += ["Ġail", "Ġinfection", "Ġinjury"]
    published = Vocabulary("paper", frozenset({"illness", "illnesses", "disease", "diseases", "infection"}), sha256="")
    found = count_matches([tokens], published)
    assert found.counts.tolist() == [6]
    assert found.matched == [["Ġillness", "Ġillnesses", "Ġdisease", "ĠDisease", "Ġdiseases", "Ġinfection"]]


def test_only_whole_words_match() -> None:
    assert count_matches([[" cancers", "ancer", "nurse.", " can cer", *HOSTILE]], WORDS).counts.tolist() == [0]


def test_no_feature_and_arrays_from_parquet() -> None:
    none = count_matches([], WORDS)
    assert none.counts.dtype == np.int64
    assert (none.counts.tolist(), none.matched) == ([], [])
    assert count_matches([np.array([" nurse", "x"], dtype=object)], WORDS).counts.tolist() == [1]


def test_a_flat_list_of_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="one list of tokens a feature"):
        count_matches([" cancer"], WORDS)


# --- selecting ------------------------------------------------------------------------------------


def test_selection_by_hand() -> None:
    selection = select(_features().set_index(pd.Index([7, 7, 1, 0])), vocabulary=WORDS)
    assert list(selection.columns) == [
        "feature", "matches", "matched", "matches_dot", "matches_cosine", "in_vocabulary",
        "n_yes", "n_no", "n_unsure", "label", "is_domain",
    ]  # fmt: skip
    assert selection["feature"].tolist() == [4, 9, 11, 30]
    assert selection["matches"].tolist() == [3, 1, 0, 2]
    assert selection["matched"].tolist() == [
        [" cancer", "Ġcancer", " Nurse"],
        ["▁Tumor"],
        [],
        ["CANCER", " cancer"],
    ]
    assert selection["matches_dot"].tolist() == [2, 2, 0, 0]
    assert selection["matches_cosine"].tolist() == [3, 1, 0, 2]
    assert selection["in_vocabulary"].tolist() == [True, False, False, True]
    assert selection["is_domain"].tolist() == [True, False, False, True]
    assert selection["n_yes"].tolist() == [0, 0, 0, 0]
    assert selection["label"].tolist() == ["", "", "", ""]
    assert domain_features(selection) == [4, 30]
    assert domain_features(select(_features(), vocabulary=WORDS, min_matches=1)) == [4, 9, 30]
    assert domain_features(select(_features(), vocabulary=WORDS, min_matches=4)) == []


def test_verdicts_narrow_the_vocabulary_and_never_widen_it() -> None:
    verdicts = _verdicts(
        feature=[30, 9, 4],
        n_yes=[1, 2, 2],
        n_no=[1, 0, 1],
        label=["", "x", "=2+2"],
        majority=[False, True, True],
    )
    selection = select(_features(), vocabulary=WORDS, verdicts=verdicts, arm="control")
    assert selection["in_vocabulary"].tolist() == [True, False, False, True]
    assert selection["is_domain"].tolist() == [True, False, False, False]
    assert selection["n_yes"].tolist() == [2, 2, 0, 1]
    assert selection["n_no"].tolist() == [1, 0, 0, 1]
    assert selection["label"].tolist() == ["=2+2", "x", "", ""]
    assert selection["n_yes"].dtype == np.int64
    assert selection["is_domain"].dtype == bool


def test_a_feature_without_verdict_is_no_domain_feature() -> None:
    verdicts = _verdicts(feature=[4], n_yes=[1], majority=[True])
    assert domain_features(select(_features(), vocabulary=WORDS, verdicts=verdicts)) == [4]
    nobody = verdicts.iloc[:0]
    assert domain_features(select(_features(), vocabulary=WORDS, verdicts=nobody)) == []


def test_verdicts_on_other_features_are_refused() -> None:
    verdicts = _verdicts(feature=[4, 5], n_yes=[1, 1], majority=[True, True])
    with pytest.raises(ConfigError, match=r"does not have: 5\.") as caught:
        select(_features(), vocabulary=WORDS, verdicts=verdicts, arm="control")
    assert caught.value.at == "arms.control"
    twice = _verdicts(feature=[4, 4], n_yes=[1, 1], majority=[True, True])
    with pytest.raises(ConfigError, match="twice"):
        select(_features(), vocabulary=WORDS, verdicts=twice)


@pytest.mark.parametrize("min_matches", [0, -1, 1.5, True, "2"])
def test_min_matches_must_be_a_positive_integer(min_matches: object) -> None:
    with pytest.raises(ConfigError, match="min_matches"):
        select(_features(), vocabulary=WORDS, min_matches=min_matches)  # type: ignore[arg-type]


def test_missing_columns_are_named() -> None:
    with pytest.raises(ConfigError, match="lacks the columns: top_tokens_dot"):
        select(_features().drop(columns="top_tokens_dot"), vocabulary=WORDS)


def test_an_empty_table_selects_nothing() -> None:
    selection = select(_features().iloc[:0], vocabulary=WORDS)
    assert len(selection) == 0
    assert domain_features(selection) == []


# --- which tokens can be top tokens ----------------------------------------------------------------

TOKENS = [" fever", "ing", "naïve", "Ｆｕｌｌ", "ﬁne", "жар", "fжар", "熱", "カー", "\ufffd", " 42", ".", ""]


def test_tokens_of_some_scripts() -> None:
    chosen = choosable_tokens(TOKENS, ["latin"]).tolist()
    assert [token for token, is_in in zip(TOKENS, chosen, strict=True) if not is_in] == [
        "жар",
        "fжар",
        "熱",
        "カー",
        "\ufffd",
    ]
    both = choosable_tokens(TOKENS, ["latin", "cyrillic"]).tolist()
    assert [token for token, is_in in zip(TOKENS, both, strict=True) if not is_in] == ["熱", "カー", "\ufffd"]


def test_tokens_that_the_vectors_know() -> None:
    assert choosable_tokens(TOKENS, ("all",)).all()
    vectors = WordVectors.from_rows(["fever", "жар", "ing"], [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], name="toy")
    chosen = choosable_tokens([" Fever", "▁жар", "ing", "x"], ("embeddings",), vectors)
    assert chosen.tolist() == [True, True, False, False]


def test_every_script_has_a_letter() -> None:
    letters = "aλжաაאعሀᠠᎠकবਕકକதతకകසกລབကខ漢ひカ한ㄅ"
    assert [_script_of(letter) for letter in letters[:2]] == ["latin", "greek"]
    assert {_script_of(letter) for letter in letters} | {"kannada"} == set(SCRIPTS)


def test_scripts_in_a_study_file() -> None:
    assert FeaturesConfig.read({}, at="x").tokens == ("all",)
    assert FeaturesConfig.read({"tokens": "latin"}, at="x").tokens == ("latin",)
    assert FeaturesConfig.read({"tokens": ["latin", "greek"]}, at="x").tokens == ("latin", "greek")
    for wrong in ("latn", ["latin", "all"]):
        with pytest.raises(UnknownName, match="latin"):
            FeaturesConfig.read({"tokens": wrong}, at="x")
