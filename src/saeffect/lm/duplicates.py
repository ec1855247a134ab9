"""Documents that stand on both sides of a split, also where case, spaces or a few words differ."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saeffect.errors import SaeffectError
from saeffect.lm.corpora import is_held_out

__all__ = ["Duplicates", "find_duplicates"]

_WORD = re.compile(r"\w+")
_LENGTH = 13  # words of a run, as those who clean test sets of language models count
_SHARE = 0.5  # of a document's runs
_MOST = 40_000_000  # characters that are looked at
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Duplicates:
    """What of the held-out documents the training documents hold too.

    Attributes:
        held_out: Number of held-out documents.
        found: Number of those of which at least half the runs of 13 words stand in a training document (of shorter
            ones: all words, in their order).
        example: The beginning of the first of them.
    """

    held_out: int
    found: int
    example: str

    def words(self) -> str:
        """A warning in words; "" if there is nothing to warn of."""
        if not self.found:
            return ""
        return (
            f"{self.found:,} of {self.held_out:,} held-out documents stand in the training text too, but for small"
            f" changes (such as {self.example!r}): what is measured on them is too good"
        )


def find_duplicates(texts: Iterable[str], share: float) -> Duplicates:
    """Compare the held-out documents of a text, those of `is_held_out(text, share)`, with the others; equal
    documents are on one side anyway. Of a long text the first 40 million characters are compared.
    """
    training: list[NDArray[np.uint64]] = []
    held_out: list[tuple[str, NDArray[np.uint64]]] = []
    seen = 0
    for text in _readable(texts):
        runs = _runs(text)
        if is_held_out(text, share):
            held_out.append((" ".join(text[:200].split())[:60], runs))
        else:
            training.append(runs)
        seen += len(text)
        if seen > _MOST:
            break
    known = np.unique(np.concatenate(training)) if training else np.zeros(0, dtype=np.uint64)
    found = [head for head, runs in held_out if len(runs) and np.isin(runs, known).mean() >= _SHARE]
    return Duplicates(len(held_out), len(found), found[0] if found else "")


def _readable(texts: Iterable[str]) -> Iterator[str]:
    """The texts up to one that cannot be read, which whoever uses them says."""
    with contextlib.suppress(SaeffectError):
        yield from texts


def _runs(text: str) -> NDArray[np.uint64]:
    """A number for each run of `_LENGTH` words (of a shorter text, for all of it)."""
    words = _WORD.findall(text.casefold())
    codes = np.fromiter((hash(word) & (2**64 - 1) for word in words), dtype=np.uint64, count=len(words))
    length = min(_LENGTH, len(codes))
    mixed = np.zeros(max(0, len(codes) - length + 1) if length else 0, dtype=np.uint64)
    for at in range(length):
        mixed = mixed * _MIX + codes[at : at + len(mixed)]
    return mixed
