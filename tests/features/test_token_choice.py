from __future__ import annotations

import pytest

from saeffect.config import SCRIPTS, FeaturesConfig
from saeffect.errors import UnknownName
from saeffect.features.embeddings import WordVectors
from saeffect.features.token_choice import choosable_tokens, script_of

TOKENS = [" fever", "ing", "naïve", "Ｆｕｌｌ", "ﬁne", "жар", "fжар", "熱", "カー", "\ufffd", " 42", ".", ""]


def test_a_token_counts_if_all_its_letters_are_of_the_scripts() -> None:
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


def test_all_is_all_and_embeddings_are_words_with_a_direction() -> None:
    assert choosable_tokens(TOKENS, ("all",)).all()
    vectors = WordVectors.from_rows(["fever", "жар", "ing"], [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], name="toy")
    chosen = choosable_tokens([" Fever", "▁жар", "ing", "x"], ("embeddings",), vectors)
    assert chosen.tolist() == [True, True, False, False]


def test_every_script_of_the_list_is_the_name_of_some_letter() -> None:
    letters = "aλжաაאعሀᠠᎠकবਕકକதతకകසกລབကខ漢ひカ한ㄅ"
    assert [script_of(letter) for letter in letters[:2]] == ["latin", "greek"]
    assert {script_of(letter) for letter in letters} | {"kannada"} == set(SCRIPTS)


def test_scripts_in_a_study_file() -> None:
    assert FeaturesConfig.read({}, at="x").tokens == ("all",)
    assert FeaturesConfig.read({"tokens": "latin"}, at="x").tokens == ("latin",)
    assert FeaturesConfig.read({"tokens": ["latin", "greek"]}, at="x").tokens == ("latin", "greek")
    for wrong in ("latn", ["latin", "all"]):
        with pytest.raises(UnknownName, match="latin"):
            FeaturesConfig.read({"tokens": wrong}, at="x")
