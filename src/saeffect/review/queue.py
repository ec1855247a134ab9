"""The features that raters judge, and their order: candidates and decoys from all arms, shuffled for each rater.

Candidates are the features that the vocabulary selects. Decoys look the same and should get a no: features without a
word of the vocabulary, and *shuffled* ones, whose tokens come from ten different candidates: as many domain words, but
unrelated. A yes to a decoy is a false positive.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from saeffect.errors import NotFound
from saeffect.review.store import VerdictStore

__all__ = ["DECOYS", "Item", "Queue", "fingerprint_tokens", "make_queue"]

DECOYS = 0.1  # of each kind, as a share of the candidates
_MIN_DECOYS = 4  # decoys of each kind, where there are so many
_N_CONTEXTS = 4

Decoy = Literal["", "other", "shuffled"]


@dataclass(frozen=True)
class Item:
    """One screen: the `tokens` and `contexts` (arm, feature, rank) that a rater sees. `seen` is their
    `fingerprint_tokens`; `decoy` is "" for a candidate, "other" for a feature without words of the vocabulary, or
    "shuffled".
    """

    kind: Literal["feature", "shuffled"]
    arm: str
    feature: int
    seen: str
    decoy: Decoy
    tokens: tuple[str, ...]
    contexts: tuple[tuple[str, int, int], ...]

    @functools.cached_property
    def key(self) -> tuple[str, str, int, str]:
        """Its key in the store."""
        return self.kind, self.arm, self.feature, self.seen


@dataclass(frozen=True, eq=False)
class Queue:
    """All items, in the order of arms and features; each rater gets an order of their own."""

    items: tuple[Item, ...]

    @property
    def candidates(self) -> tuple[Item, ...]:
        """The items that are no decoys."""
        return tuple(item for item in self.items if not item.decoy)

    @functools.cached_property
    def keys(self) -> frozenset[tuple[str, str, int, str]]:
        """Keys of the items in the store."""
        return frozenset(item.key for item in self.items)

    def of_rater(self, rater: str, store: VerdictStore) -> tuple[Item, ...]:
        """The items in this rater's order, which never changes."""
        return tuple(self._by_hidden_name(rater, store).values())

    def open_items(self, rater: str, store: VerdictStore) -> list[Item]:
        """The items that this rater has not judged, in their order."""
        judged = store.judged(rater)
        return [item for item in self.of_rater(rater, store) if item.key not in judged]

    def name(self, item: Item, rater: str, store: VerdictStore) -> str:
        """The item's name in the browser: 16 hex digits that hide arm, number and whether it is a decoy."""
        return _hidden_name(store.secret(), rater, item)

    def find(self, name: str, rater: str, store: VerdictStore) -> Item:
        """The item of this name; NotFound if the run was made again and no longer has it."""
        item = self._by_hidden_name(rater, store).get(name)
        if item is None:
            raise NotFound(
                "this feature is no longer part of the review: the run was made again since it was shown.",
                fix="go on with the next one. Verdicts on features as they were are kept in the history.",
            )
        return item

    def _by_hidden_name(self, rater: str, store: VerdictStore) -> dict[str, Item]:
        """The rater's items by their hidden names, which order them."""
        key = store.secret(), rater
        if key not in self._cache:
            self._cache[key] = dict(sorted({_hidden_name(key[0], rater, item): item for item in self.items}.items()))
        return self._cache[key]

    @functools.cached_property
    def _cache(self) -> dict[tuple[Any, str], dict[str, Item]]:
        """Cached: hashing a thousand names takes longer than recording a verdict."""
        return {}


def make_queue(arms: Mapping[str, pd.DataFrame], *, decoys: float = DECOYS, seed: int = 0) -> Queue:
    """The queue of a run, from one row a feature of each arm: feature, top_tokens, n_active, in_vocabulary, matches.
    Decoys of each kind per candidate, at least four if there are any, are drawn by `seed`, the same for all raters.
    """
    candidates = [
        _feature_item(arm, row, "")
        for arm, table in arms.items()
        for row in _numbered_tokens(table[table["in_vocabulary"]])
    ]
    if not candidates:
        return Queue(())
    rng = np.random.default_rng(seed)
    n_decoys = max(_MIN_DECOYS, round(decoys * len(candidates))) if decoys > 0 else 0
    non_domain = [
        _feature_item(arm, row, "other")
        for arm, table in arms.items()
        for row in _numbered_tokens(table[(table["matches"] == 0) & (table["n_active"] > 0)])
    ]
    picked = rng.permutation(len(non_domain))[:n_decoys]
    return Queue((*candidates, *(non_domain[i] for i in sorted(picked)), *_shuffled_decoys(candidates, n_decoys, rng)))


def fingerprint_tokens(tokens: Sequence[str]) -> str:
    """A short hash of the tokens that a person judged, in order."""
    return hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _numbered_tokens(table: pd.DataFrame) -> list[tuple[int, tuple[str, ...]]]:
    return [
        (int(feature), tuple(tokens)) for feature, tokens in zip(table["feature"], table["top_tokens"], strict=True)
    ]


def _feature_item(arm: str, row: tuple[int, tuple[str, ...]], decoy: Decoy) -> Item:
    feature, tokens = row
    contexts = tuple((arm, feature, rank) for rank in range(_N_CONTEXTS))
    return Item("feature", arm, feature, fingerprint_tokens(tokens), decoy, tokens, contexts)


def _shuffled_decoys(candidates: Sequence[Item], n_decoys: int, rng: np.random.Generator) -> list[Item]:
    """Decoys whose tokens and contexts each come from another candidate; [] if too few candidates differ."""
    decoys = []
    for number in range(n_decoys):
        order = [candidates[i] for i in rng.permutation(len(candidates))]
        length = len(order[0].tokens)
        tokens: list[str] = []
        for item in order:
            position = len(tokens)
            if position == length:
                break
            if position < len(item.tokens) and item.tokens[position].strip().lower() not in {
                token.strip().lower() for token in tokens
            }:
                tokens.append(item.tokens[position])
        if len(tokens) < length or length < 2 or len(order) <= length:
            return []
        contexts = tuple(item.contexts[rank] for rank, item in enumerate(order[:_N_CONTEXTS]))
        seen = fingerprint_tokens(tokens)
        decoys.append(Item("shuffled", order[0].arm, number, seen, "shuffled", tuple(tokens), contexts))
    return decoys


def _hidden_name(secret: bytes, rater: str, item: Item) -> str:
    text = "\0".join(map(str, (rater.casefold(), *item.key)))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=secret, digest_size=8).hexdigest()
