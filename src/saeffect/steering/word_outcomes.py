"""Outcomes that count words: the feature's own top tokens, and the domain's words beyond them.

A steered text that repeats the feature's top tokens proves that the model can be made to say what is added to
it. The fairer question is whether it also says *other* words of the domain, which nobody put in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from saeffect.lm.tokens import normalise_token

__all__ = ["keyword_score", "off_list_score", "text_words"]

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def text_words(text: str) -> list[str]:
    """The words of a text, lower case; hyphens and apostrophes within a word stay.

    Example:
        >>> text_words("The patient's X-ray, taken at 9am.")
        ['the', "patient's", 'x-ray', 'taken', 'at', '9am']
    """
    return [word.replace("’", "'") for word in _WORD.findall(text.casefold())]


def keyword_score(text: str, top_tokens: Sequence[str]) -> float:
    """Share of a text's words that are one of the feature's top tokens.

    Returns:
        From 0 to 1; NaN for a text without words, or without top tokens that are words.

    Example:
        >>> keyword_score("Drug trials test a drug", [" drug", "Ġdose"])
        0.4
    """
    words, wanted = text_words(text), _words_of(top_tokens)
    return sum(word in wanted for word in words) / len(words) if words and wanted else math.nan


def off_list_score(text: str, vocabulary: Collection[str], top_tokens: Sequence[str]) -> float:
    """Share of a text's words that are in the domain's vocabulary but not among the feature's top tokens.

    Top tokens are often pieces of words, so a word that begins with one of them (of three letters or more)
    does not count either: " cardi" puts "cardiac" in, so "cardiac" proves nothing.

    Args:
        text: A generated continuation.
        vocabulary: The domain's words, lower case.
        top_tokens: The feature's.

    Returns:
        From 0 to 1; NaN for a text without words, or an empty vocabulary.

    Example:
        >>> off_list_score("A drug for cancer patients", {"drug", "cancer"}, [" drug"])
        0.2
    """
    words = text_words(text)
    if not words or not vocabulary:
        return math.nan
    own = _words_of(top_tokens)
    stems = tuple(token for token in own if len(token) >= 3)
    found = (word for word in words if word in vocabulary)
    return sum(word not in own and not word.startswith(stems) for word in found) / len(words)


def _words_of(top_tokens: Sequence[str]) -> set[str]:
    return {word for token in top_tokens if (word := normalise_token(token)) and any(map(str.isalnum, word))}
