from __future__ import annotations

import pandas as pd

from saeffect.report.texts import chips, context_runs, representative_trials, text_runs, visible_text
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


def _trials(differences: list[float], dose: float = 0.4) -> pd.DataFrame:
    rows = []
    for sample, difference in enumerate(differences):
        for condition, similarity in (("unsteered", 0.1), ("steered", 0.3 + difference), ("random", 0.3)):
            rows.append(
                {
                    "feature": 7,
                    "prompt": 0,
                    "sample": sample,
                    "condition": condition,
                    "dose": 0.0 if condition == "unsteered" else dose,
                    "text": f"{condition} {sample} drug",
                    "similarity": similarity,
                }
            )
    return pd.DataFrame(rows)


def test_median_best_and_worst_pair_are_shown() -> None:
    shown = representative_trials(_trials([0.3, -0.1, 0.1, 0.2, 0.0]), ["Hello?"], [" drug"])
    assert [(trial.which, trial.difference, trial.prompt) for trial in shown] == [
        ("typical (median)", "+0.100", "Hello? · sample 3"),
        ("best", "+0.300", "Hello? · sample 1"),
        ("worst", "−0.100", "Hello? · sample 2"),
    ]
    texts = ["".join(run.text for run in text.runs) for text in shown[0].texts]
    assert texts == ["unsteered 2 drug", "steered 2 drug", "random 2 drug"]
    assert all(text.runs[-1].level == 1 for text in shown[0].texts)


def test_of_several_doses_that_of_most_texts_is_shown() -> None:
    other = _trials([0.9]).query("condition != 'unsteered'")
    shown = representative_trials(pd.concat([other.assign(dose=7.0, text="another dose"), _trials([0.3, 0.1])]), [], [])
    assert [trial.difference for trial in shown] == ["+0.100", "+0.300"]
    assert all(run.text != "another dose" for trial in shown for text in trial.texts for run in text.runs)


def test_one_pair_is_shown_once() -> None:
    assert [trial.which for trial in representative_trials(_trials([0.2]), [], [])] == ["typical (median)"]
    assert representative_trials(_trials([0.2]), [], [])[0].prompt == "prompt 0 · sample 1"


def test_without_a_placebo_the_unsteered_text_is_the_base() -> None:
    table = _trials([0.0])
    assert representative_trials(table[table["condition"] != "random"], [], [])[0].difference == "+0.200"


def test_undefined_similarities_do_not_hide_the_texts() -> None:
    table = _trials([0.2]).assign(similarity=float("nan"))
    shown = representative_trials(table, [], [])
    assert (shown[0].which, shown[0].difference, shown[0].texts[0].similarity) == (
        "first",
        "undefined",
        "undefined",
    )


def test_nothing_steered_nothing_shown() -> None:
    assert representative_trials(None, [], []) == ()
    assert representative_trials(_trials([0.1]).query("condition == 'unsteered'"), [], []) == ()
