"""Which generated texts a card shows: pairs chosen by rule, so that nobody can pick the flattering one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from saeffect.lm.tokens import normalise_token
from saeffect.report.texts import Run, text_runs, visible_text
from saeffect.report.words.numbers import fixed, is_defined, signed

__all__ = ["Generated", "Trial", "representative_trials"]

_CONDITIONS = (
    ("unsteered", "Unsteered"),
    ("steered", "Steered"),
    ("matched", "Placebo: a feature of another subject"),
    ("random", "Placebo: a random direction"),
)


@dataclass(frozen=True)
class Generated:
    """One generated text: under which condition, how similar to the top tokens, with the top words marked."""

    condition: str
    title: str
    similarity: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Trial:
    """The texts of one prompt and sample side by side, and which pair it is: typical, best or worst.

    `same` says that steering and placebos changed nothing: every text is that of the unsteered model.
    """

    which: str
    prompt: str
    difference: str
    texts: tuple[Generated, ...]
    same: bool = False


def representative_trials(
    table: pd.DataFrame | None, prompts: Sequence[str], top_tokens: Sequence[str]
) -> tuple[Trial, ...]:
    """The typical (median), best and worst pair of one feature, by steered minus placebo similarity.

    Args:
        table: The feature's rows of the interventions; of several doses, the one with most rows is shown.
        prompts: The prompts, in the order of the column `prompt`.
        top_tokens: The feature's top tokens; whole words of them are marked in the texts.
    """
    if table is None or table.empty or not (table["condition"] == "steered").any():
        return ()
    steered_doses = table.loc[table["condition"] == "steered", "dose"]
    dose = steered_doses.mode().iloc[0]
    rows = table[(table["condition"] == "unsteered") | (table["dose"] == dose)]
    rows = rows.drop_duplicates(["prompt", "sample", "condition"]).sort_values(["prompt", "sample"], kind="stable")
    wide = rows.pivot(index=["prompt", "sample"], columns="condition", values="similarity").astype(float)
    base = next((name for name in ("matched", "random", "unsteered") if name in wide.columns), "")
    if base not in wide.columns:
        return ()
    difference = (wide["steered"] - wide[base]).to_numpy(dtype=float)
    words = {word for word in map(normalise_token, top_tokens) if len(word) >= 3}
    return tuple(
        _trial(which, rows, wide.index[place], difference[place], prompts, words)
        for which, place in _places(difference)
    )


def _places(difference: np.ndarray) -> list[tuple[str, int]]:
    """Positions of the median, best and worst pair; fewer where there are fewer pairs."""
    defined = np.flatnonzero(np.isfinite(difference))
    if not len(defined):
        return [("first", 0)]
    order = defined[np.argsort(difference[defined], kind="stable")]
    found = {"typical (median)": int(order[(len(order) - 1) // 2])}
    for which, place in (("best", int(order[-1])), ("worst", int(order[0]))):
        if place not in found.values():
            found[which] = place
    return list(found.items())


def _trial(
    which: str,
    rows: pd.DataFrame,
    pair: tuple[int, int],
    difference: float,
    prompts: Sequence[str],
    words: set[str],
) -> Trial:
    prompt, sample = (int(number) for number in pair)
    chosen = rows[(rows["prompt"] == prompt) & (rows["sample"] == sample)].set_index("condition")
    name = visible_text(prompts[prompt], 120) if 0 <= prompt < len(prompts) else f"prompt {prompt}"
    return Trial(
        which=which,
        prompt=f"{name} · sample {sample + 1}",
        difference=signed(difference) if is_defined(difference) else "undefined",
        texts=tuple(
            Generated(
                condition=condition,
                title=title,
                similarity=fixed(chosen.loc[condition, "similarity"], 2)
                if is_defined(chosen.loc[condition, "similarity"])
                else "undefined",
                runs=text_runs(str(chosen.loc[condition, "text"]), words),
            )
            for condition, title in _CONDITIONS
            if condition in chosen.index
        ),
        same=len(chosen) > 1 and chosen["text"].nunique() == 1,
    )
