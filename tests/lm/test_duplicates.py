from __future__ import annotations

import re

import numpy as np

from saeffect.lm.corpora import find_duplicates, is_held_out

WORDS = [f"word{i}" for i in range(400)]


def _documents(n: int, length: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, length)) for _ in range(n)]


def _found(texts: list[str], share: float) -> int:
    counts = re.match(r"(\d+) of \d+ held-out documents are", find_duplicates(texts, share))
    assert counts is not None
    return int(counts[1])


def test_different_documents_are_no_duplicates() -> None:
    assert find_duplicates(_documents(300, 40), 0.2) == ""


def test_equal_documents_are_on_one_side() -> None:
    assert find_duplicates(_documents(100, 40) * 3, 0.3) == ""


def test_near_duplicates_are_found() -> None:
    plain = _documents(200, 60)
    changed = [text.upper().replace(" ", "  ") for text in plain]
    split = [(a, b) for a, b in zip(plain, changed, strict=True) if is_held_out(a, 0.3) != is_held_out(b, 0.3)]
    assert _found([*plain, *changed], 0.3) == len(split) > 20
    longer = [f"{text} and this was added later on" for text in plain]
    assert _found([*plain, *longer], 0.3) > 20


def test_short_documents_count_as_a_whole() -> None:
    texts = [f"Question {i}?" for i in range(200)]
    assert find_duplicates(texts, 0.3) == ""
    assert _found([*texts, *(text.lower() for text in texts)], 0.3) > 20
