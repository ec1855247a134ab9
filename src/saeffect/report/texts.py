"""Tokens and texts for the page: shortened, marked, hidden characters visible. The template escapes them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from saeffect.lm.tokens import normalise_token, printable_token
from saeffect.report.words.numbers import fixed, is_defined, signed

__all__ = [
    "Chip",
    "Generated",
    "Run",
    "Trial",
    "chips",
    "context_runs",
    "representative_trials",
    "text_runs",
    "visible_text",
]

_TOKENS_BEFORE, _TOKENS_AFTER = 22, 10  # tokens shown around a context's strongest one
_MAX_TOKEN, _MAX_TEXT = 40, 320
_LEVELS = 5
_CONDITIONS = {
    "unsteered": "Unsteered",
    "steered": "Steered",
    "matched": "Placebo: a feature of another subject",
    "random": "Placebo: a random direction",
}
_TRIAL_COLUMNS = ("prompt", "sample", "condition", "dose", "similarity", "text")


@dataclass(frozen=True)
class Chip:
    """A top token: whether it starts a word, its visible text, its weight, and whether it is in the vocabulary."""

    starts_word: bool
    text: str
    weight: str
    in_vocabulary: bool


@dataclass(frozen=True)
class Run:
    """A stretch of text with one mark, from `level` 0 (plain) to 5 (strongest).

    `value` is the activation as text for the tooltip; `strongest` marks the token at the context's maximum.
    """

    text: str
    level: int = 0
    value: str = ""
    strongest: bool = False


@dataclass(frozen=True)
class Generated:
    """One generated text: its condition, its similarity to the top tokens, and the text with top words marked."""

    condition: str
    title: str
    similarity: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Trial:
    """Texts of one prompt and sample: a typical, best or worst pair. `same`: all equal the unsteered text."""

    which: str
    prompt: str
    difference: str
    texts: tuple[Generated, ...]
    same: bool = False


def chips(tokens: Sequence[str], weights: Sequence[float], matched: Collection[str]) -> tuple[Chip, ...]:
    """A feature's top tokens, best first.

    Example:
        >>> chips([" drug", "\\n"], [1.0, 0.5], {" drug"})[1]
        Chip(starts_word=False, text='\\\\n', weight='0.50', in_vocabulary=False)
    """
    words = {normalise_token(token) for token in matched}
    result = []
    for token, weight in zip(tokens, weights, strict=True):
        visible = printable_token(str(token))
        body = visible.lstrip(" ")
        result.append(
            Chip(
                starts_word=len(body) < len(visible) and bool(body),
                text=_shorten(body or "␣" * max(1, len(visible)), _MAX_TOKEN),
                weight=fixed(weight, 2),
                in_vocabulary=normalise_token(str(token)) in words,
            )
        )
    return tuple(result)


def context_runs(
    tokens: Sequence[str], activations: Sequence[float], position: int, *, peak: float | None = None
) -> tuple[Run, ...]:
    """A context around its strongest token (at `position`); neighbours with zero activation are merged. `peak` is the
    activation of the strongest mark, the context's own by default.

    Example:
        >>> [run.level for run in context_runs([" a", " b", " c", " d"], [0, 0, 4.0, 1.0], 2)]
        [0, 5, 2]
    """
    start, stop = max(0, position - _TOKENS_BEFORE), min(len(tokens), position + _TOKENS_AFTER + 1)
    peak = max(map(float, activations), default=0.0) if peak is None else peak
    runs = []
    for index in range(start, stop):
        text = _shorten(printable_token(str(tokens[index])), _MAX_TOKEN)
        strength = float(activations[index])
        level = min(_LEVELS, 1 + int(_LEVELS * strength / peak)) if strength > 0 else 0
        runs.append(Run(text, level, f"{strength:.2f}", index == position) if level else Run(text))
    before, after = [Run("… ")] * (start > 0), [Run(" …")] * (stop < len(tokens))
    return (*before, *_merge_plain(runs), *after)


def _merge_plain(runs: Iterable[Run]) -> list[Run]:
    merged: list[Run] = []
    for run in runs:
        if not run.level and merged and not merged[-1].level:
            merged[-1] = Run(merged[-1].text + run.text)
        elif run.text:
            merged.append(run)
    return merged


def visible_text(text: str, limit: int = _MAX_TEXT) -> str:
    """A generated text on one line: line breaks as ↵, other hidden characters by number, cut at `limit`.

    Example:
        >>> visible_text("one\\ntwo\\u202e")
        'one ↵ twoU+202E'
    """
    return _shorten(printable_token(re.sub(r"\s*\n\s*", " ↵ ", str(text)).strip()), limit)


def text_runs(text: str, words: Collection[str]) -> tuple[Run, ...]:
    """A generated text with the given words (see `normalise_token`) marked: whole words of at least three letters.

    Example:
        >>> [(run.text, run.level) for run in text_runs("Take the drug.", {"drug"})]
        [('Take the ', 0), ('drug', 1), ('.', 0)]
    """
    pieces = re.split(r"(\w+)", visible_text(text))
    return tuple(_merge_plain(Run(piece, int(len(piece) >= 3 and piece.lower() in words)) for piece in pieces))


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def representative_trials(
    table: pd.DataFrame | None, prompts: Sequence[str], top_tokens: Sequence[str]
) -> tuple[Trial, ...]:
    """The typical (median), best and worst pair of one feature, by steered minus placebo similarity, from its rows of
    the interventions; of several doses, the one with most rows is used. Whole words of `top_tokens` are marked.
    """
    if table is None:
        return ()
    rows = list(zip(*(table[name].tolist() for name in _TRIAL_COLUMNS), strict=True))
    doses = [dose for _, _, condition, dose, _, _ in rows if condition == "steered"]
    if not doses:
        return ()
    chosen_dose = max(sorted(set(doses)), key=doses.count)
    pairs: dict[tuple[int, int], dict[str, tuple[float, str]]] = {}
    for prompt, sample, condition, dose, similarity, text in rows:
        if condition == "unsteered" or dose == chosen_dose:
            pairs.setdefault((prompt, sample), {}).setdefault(condition, (similarity, text))
    keys = sorted(pairs)
    texts = [pairs[key] for key in keys]
    reference = next((name for name in ("matched", "random", "unsteered") if any(name in pair for pair in texts)), "")
    if not reference:
        return ()
    no_text = (math.nan, "")
    difference = np.array(
        [pair.get("steered", no_text)[0] - pair.get(reference, no_text)[0] for pair in texts], dtype=np.float64
    )
    words = {word for word in map(normalise_token, top_tokens) if len(word) >= 3}
    trials = []
    for rank, i in _representative_pairs(difference):
        prompt, sample = keys[i]
        name = visible_text(prompts[prompt], 120) if prompt < len(prompts) else f"prompt {prompt}"
        trials.append(
            Trial(
                which=rank,
                prompt=f"{name} · sample {sample + 1}",
                difference=signed(difference[i]) if is_defined(difference[i]) else "undefined",
                texts=_generated(texts[i], words),
                same=len(texts[i]) > 1 and len({text for _, text in texts[i].values()}) == 1,
            )
        )
    return tuple(trials)


def _generated(pair: Mapping[str, tuple[float, str]], words: Collection[str]) -> tuple[Generated, ...]:
    texts = []
    for condition, title in _CONDITIONS.items():
        if condition in pair:
            similarity, text = pair[condition]
            similarity_text = fixed(similarity, 2) if is_defined(similarity) else "undefined"
            texts.append(Generated(condition, title, similarity_text, text_runs(str(text), words)))
    return tuple(texts)


def _representative_pairs(difference: np.ndarray) -> list[tuple[str, int]]:
    """Indices of the median, best and worst pair, without repeats."""
    defined = np.flatnonzero(np.isfinite(difference))
    if not len(defined):
        return [("first", 0)]
    order = defined[np.argsort(difference[defined], kind="stable")]
    pairs = {"typical (median)": int(order[(len(order) - 1) // 2])}
    for rank, index in (("best", int(order[-1])), ("worst", int(order[0]))):
        if index not in pairs.values():
            pairs[rank] = index
    return list(pairs.items())
