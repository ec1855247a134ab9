"""Tokens and generated texts as the page shows them: cut to length, marked, every odd character visible.

Nothing here writes HTML. Strings stay strings until the template escapes them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from saeffect.lm.tokens import normalise_token, printable_token

__all__ = ["Chip", "Run", "chips", "context_runs", "text_runs", "visible_text"]

_BEFORE, _AFTER = 22, 10  # tokens of a context shown around its strongest one
_LONGEST_TOKEN = 40
_LONGEST_TEXT = 320
_LEVELS = 5


@dataclass(frozen=True)
class Chip:
    """A top token: whether it starts a word, its visible text, its weight, and whether it is in the vocabulary."""

    starts_word: bool
    text: str
    weight: str
    in_vocabulary: bool


@dataclass(frozen=True)
class Run:
    """A stretch of text with one mark: `level` 0 is plain, 1 to 5 stronger and stronger.

    `value` is the activation in words for the tooltip; `strongest` marks the token that the context was chosen for.
    """

    text: str
    level: int = 0
    value: str = ""
    strongest: bool = False


def chips(tokens: Sequence[str], weights: Sequence[float], matched: Collection[str]) -> tuple[Chip, ...]:
    """A feature's top tokens, best first.

    Example:
        >>> chips([" drug", "\\n"], [1.0, 0.5], {" drug"})[1]
        Chip(starts_word=False, text='\\\\n', weight='0.50', in_vocabulary=False)
    """
    words = {normalise_token(token) for token in matched}
    found = []
    for token, weight in zip(tokens, weights, strict=True):
        shown = printable_token(str(token))
        body = shown.lstrip(" ")
        found.append(
            Chip(
                starts_word=len(body) < len(shown) and bool(body),
                text=_shortened(body or "␣" * max(1, len(shown)), _LONGEST_TOKEN),
                weight=f"{float(weight):.2f}",
                in_vocabulary=normalise_token(str(token)) in words,
            )
        )
    return tuple(found)


def context_runs(tokens: Sequence[str], activations: Sequence[float], position: int) -> tuple[Run, ...]:
    """A context around its strongest token, neighbours without activation merged.

    Args:
        tokens: The context's tokens.
        activations: The feature's activation on each; what is not above zero is plain.
        position: Index of the strongest token.

    Example:
        >>> [run.level for run in context_runs([" a", " b", " c", " d"], [0, 0, 4.0, 1.0], 2)]
        [0, 5, 2]
    """
    start, stop = max(0, position - _BEFORE), min(len(tokens), position + _AFTER + 1)
    peak = max((float(value) for value in activations), default=0.0)
    runs: list[Run] = [Run("… ")] if start > 0 else []
    plain = ""
    for index in range(start, stop):
        text = _shortened(printable_token(str(tokens[index])), _LONGEST_TOKEN)
        strength = float(activations[index])
        if not strength > 0 or peak <= 0:
            plain += text
            continue
        if plain:
            runs.append(Run(plain))
            plain = ""
        level = min(_LEVELS, 1 + int(_LEVELS * strength / peak))
        runs.append(Run(text, level, f"{strength:.2f}", index == position))
    if plain:
        runs.append(Run(plain))
    if stop < len(tokens):
        runs.append(Run(" …"))
    return tuple(runs)


def visible_text(text: str, limit: int = _LONGEST_TEXT) -> str:
    """A generated text on one line: line breaks as ↵, other hidden characters by number, cut at `limit`.

    Example:
        >>> visible_text("one\\ntwo\\u202e")
        'one ↵ twoU+202E'
    """
    joined = re.sub(r"\s*\n\s*", " ↵ ", str(text)).strip()
    return _shortened(printable_token(joined), limit)


def text_runs(text: str, words: Collection[str]) -> tuple[Run, ...]:
    """A generated text with the given words marked (level 1), whole words of three letters or more.

    Args:
        text: Any string.
        words: Lower-case words, as `normalise_token` gives them.

    Example:
        >>> [(run.text, run.level) for run in text_runs("Take the drug.", {"drug"})]
        [('Take the ', 0), ('drug', 1), ('.', 0)]
    """
    runs: list[Run] = []
    plain = ""
    for piece in re.split(r"(\w+)", visible_text(text)):
        if len(piece) >= 3 and piece.lower() in words:
            if plain:
                runs.append(Run(plain))
            runs.append(Run(piece, 1))
            plain = ""
        else:
            plain += piece
    if plain:
        runs.append(Run(plain))
    return tuple(runs)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
