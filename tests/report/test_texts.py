from __future__ import annotations

from saeffect.report.texts import chips, context_runs, text_runs, visible_text
from synthetic_study import HOSTILE


def test_chips_mark_vocabulary_words_in_either_notation() -> None:
    found = chips(["Ġcancer", " the", "itis"], [3.0, 2.0, 1.0], [" cancer"])
    assert [chip.in_vocabulary for chip in found] == [True, False, False]
    assert [(chip.starts_word, chip.text) for chip in found] == [
        (True, "cancer"),
        (True, "the"),
        (False, "itis"),
    ]


def test_a_token_of_spaces_can_be_seen() -> None:
    assert chips(["  "], [1.0], [])[0].text == "␣␣"


def test_no_hostile_token_keeps_a_character_that_acts() -> None:
    for chip in chips(list(HOSTILE), [1.0] * len(HOSTILE), []):
        assert not set(chip.text) & {"\n", "\t", "\u202e", "\u202c", "\u200b"}
        assert len(chip.text) <= 40


def test_context_keeps_what_surrounds_the_strongest_token() -> None:
    tokens = [f" w{i}" for i in range(100)]
    activations = [0.0] * 100
    activations[50], activations[52] = 2.0, 1.0
    runs = context_runs(tokens, activations, 50)
    text = "".join(run.text for run in runs)
    assert text == "… " + "".join(tokens[28:61]) + " …"
    assert [(run.text, run.level, run.strongest) for run in runs if run.level] == [
        (" w50", 5, True),
        (" w52", 3, False),
    ]


def test_a_dead_context_is_plain() -> None:
    assert [run.level for run in context_runs([" a", " b"], [0.0, 0.0], 0)] == [0]


def test_whole_words_only_are_marked() -> None:
    runs = text_runs("Drugs and a drug, DRUG.", {"drug", "a"})
    assert [run.text for run in runs if run.level] == ["drug", "DRUG"]
    assert "".join(run.text for run in runs) == "Drugs and a drug, DRUG."


def test_long_texts_are_cut_and_say_so() -> None:
    assert len(visible_text("x" * 1000)) == 320
    assert visible_text("x" * 1000).endswith("…")
