"""Which of many short strings contain a word, and how well: whole, at its start or inside; fast enough for each key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from saeffect.lm.tokens import printable_token

__all__ = ["EXACT", "INSIDE", "PREFIX", "StringSearch", "TokenSearch", "search_form"]

FloatArray = npt.NDArray[np.float64]

INSIDE, PREFIX, EXACT = 1.0, 2.0, 3.0
"""Grades of a hit; 0 is none."""
_END = 10  # the line feed, which no searched string holds


def search_form(text: str) -> str:
    """The form in which tokens, labels and words are compared: hidden characters visible, trimmed, lower case.

    Example:
        >>> search_form("ĠHeart"), search_form("\\n"), search_form("  ")
        ('heart', '\\\\n', '␣␣')
    """
    shown = printable_token(text)
    return shown.strip().lower() or "␣" * len(shown)


class StringSearch:
    """Finds a word in `strings` (of `search_form`), all at once in one buffer of bytes.

    Example:
        >>> StringSearch(["heart", "hearty", "sweetheart", "liver"]).grades("heart").tolist()
        [3.0, 2.0, 1.0, 0.0]
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode("utf-8", "replace") for string in strings]
        self._n = len(encoded)
        self._bytes = np.frombuffer(b"\n" + b"".join(part + b"\n" for part in encoded), dtype=np.uint8)
        lengths = np.fromiter((len(part) + 1 for part in encoded), dtype=np.int64, count=self._n)
        # The string to which each byte belongs; the line feed in front to none.
        self._owner = np.concatenate([[-1], np.repeat(np.arange(self._n), lengths)]).astype(np.int32)

    def grades(self, word: str) -> FloatArray:
        """Float64 [n]: `EXACT`, `PREFIX`, `INSIDE`, or 0 where a string does not contain the word."""
        found = np.zeros(self._n)
        wanted = np.frombuffer(word.encode("utf-8", "replace"), dtype=np.uint8)
        if not len(wanted) or _END in wanted or len(wanted) >= len(self._bytes):
            return found
        at = np.flatnonzero(self._bytes[: len(self._bytes) - len(wanted)] == wanted[0])
        for offset in range(1, len(wanted)):
            at = at[self._bytes[at + offset] == wanted[offset]]
        starts = self._bytes[at - 1] == _END
        ends = self._bytes[at + len(wanted)] == _END
        # In this order the better grade is written last.
        for grade, here in ((INSIDE, at), (PREFIX, at[starts]), (EXACT, at[starts & ends])):
            found[self._owner[here]] = grade
        return found


class TokenSearch:
    """Finds features by their top tokens; of equal grades the feature that promotes the token more comes first.

    `tokens` are distinct strings, `table` [n_features, k] holds their numbers, best first, and -1 for none.
    """

    def __init__(self, tokens: Sequence[str], table: npt.NDArray[np.int32]) -> None:
        forms = [search_form(token) for token in tokens]
        self._text = StringSearch(forms)
        self._by_rank = np.where(table < 0, len(forms), table).T.copy()

    def scores(self, word: str, *, whole: bool = False) -> FloatArray:
        """Float64 [n_features]: the best grade of a feature's tokens plus at most 0.9 for its rank; 0 for none.

        `whole`: only tokens that are the word.
        """
        grades = np.append(self._text.grades(word), 0.0)  # the last one is that of no token
        hit = grades >= (EXACT if whole else INSIDE)
        # In hundredths and 16 bits: many features hold a word of one letter, and each key must be answered at once.
        hundredths, k = (100 * grades * hit).astype(np.int16), len(self._by_rank)
        best = np.zeros(self._by_rank.shape[1], dtype=np.int16)
        for rank, tokens in enumerate(self._by_rank if hit.any() else ()):
            value = hundredths + hit * np.int16(90 * (1 - rank / k))
            np.maximum(best, value.take(tokens), out=best)
        return best / 100.0
