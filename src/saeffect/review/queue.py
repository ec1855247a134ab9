"""What raters are asked, and in which order: candidates and decoys from all arms, shuffled for each rater.

Candidates are the features that the vocabulary picks. Decoys look the same and should get a no: features without a word
of the vocabulary, and *shuffled* ones, whose tokens come from ten different candidates, so that they hold as many words
of the domain but belong together by nothing. Yes to a decoy is a false positive.
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
_FEWEST = 4  # decoys of each kind, where there are so many
_CONTEXTS = 4

Decoy = Literal["", "other", "shuffled"]


@dataclass(frozen=True)
class Item:
    """One screen: a rater may see `tokens`, and the contexts (arm, feature, rank) to show. `seen` is the
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
        """What the store knows it by."""
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
        """What the store knows the items by."""
        return frozenset(item.key for item in self.items)

    def of_rater(self, rater: str, store: VerdictStore) -> tuple[Item, ...]:
        """The items as this rater gets them: always the same order, another one for each rater."""
        return tuple(self._named(rater, store).values())

    def open_items(self, rater: str, store: VerdictStore) -> list[Item]:
        """The items that this rater has not judged, in their order."""
        judged = store.judged(rater)
        return [item for item in self.of_rater(rater, store) if item.key not in judged]

    def name(self, item: Item, rater: str, store: VerdictStore) -> str:
        """What the browser calls an item: 16 digits that tell neither arm nor number nor whether it is a decoy."""
        return _hidden_name(store.secret(), rater, item)

    def find(self, name: str, rater: str, store: VerdictStore) -> Item:
        """The item of this name; NotFound if the run was made again and no longer has it."""
        found = self._named(rater, store).get(name)
        if found is None:
            raise NotFound(
                "this feature is no longer part of the review: the run was made again since it was shown.",
                fix="go on with the next one. Verdicts on features as they were are kept in the history.",
            )
        return found

    def _named(self, rater: str, store: VerdictStore) -> dict[str, Item]:
        """The rater's items by their hidden names, which order them."""
        key = store.secret(), rater
        if key not in self._known:
            self._known[key] = dict(sorted({_hidden_name(key[0], rater, item): item for item in self.items}.items()))
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[tuple[Any, str], dict[str, Item]]:
        """Kept, since a verdict is a matter of milliseconds and a thousand hashes are not."""
        return {}


def make_queue(arms: Mapping[str, pd.DataFrame], *, decoys: float = DECOYS, seed: int = 0) -> Queue:
    """The queue of a run, from one row a feature of each arm: feature, top_tokens, n_active, in_vocabulary, matches.
    Decoys of each kind per candidate, at least four if there are any, are drawn by `seed`, the same for all raters.
    """
    candidates = [
        _feature_item(arm, row, "") for arm, table in arms.items() for row in _rows(table[table["in_vocabulary"]])
    ]
    if not candidates:
        return Queue(())
    rng = np.random.default_rng(seed)
    wanted = max(_FEWEST, round(decoys * len(candidates))) if decoys > 0 else 0
    others = [
        _feature_item(arm, row, "other")
        for arm, table in arms.items()
        for row in _rows(table[(table["matches"] == 0) & (table["n_active"] > 0)])
    ]
    picked = rng.permutation(len(others))[:wanted]
    return Queue((*candidates, *(others[i] for i in sorted(picked)), *_shuffled(candidates, wanted, rng)))


def fingerprint_tokens(tokens: Sequence[str]) -> str:
    """A short hash of the tokens that a person judged, in order."""
    return hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _rows(table: pd.DataFrame) -> list[tuple[int, tuple[str, ...]]]:
    return [
        (int(feature), tuple(tokens)) for feature, tokens in zip(table["feature"], table["top_tokens"], strict=True)
    ]


def _feature_item(arm: str, row: tuple[int, tuple[str, ...]], decoy: Decoy) -> Item:
    feature, tokens = row
    contexts = tuple((arm, feature, rank) for rank in range(_CONTEXTS))
    return Item("feature", arm, feature, fingerprint_tokens(tokens), decoy, tokens, contexts)


def _shuffled(candidates: Sequence[Item], wanted: int, rng: np.random.Generator) -> list[Item]:
    """Decoys that take each token, and each context, from another candidate; none if too few candidates differ."""
    found = []
    for number in range(wanted):
        order = [candidates[i] for i in rng.permutation(len(candidates))]
        length = len(order[0].tokens)
        tokens: list[str] = []
        for item in order:
            place = len(tokens)
            if place == length:
                break
            if place < len(item.tokens) and item.tokens[place].strip().lower() not in {
                token.strip().lower() for token in tokens
            }:
                tokens.append(item.tokens[place])
        if len(tokens) < length or length < 2 or len(order) <= length:
            return []
        contexts = tuple(item.contexts[rank] for rank, item in enumerate(order[:_CONTEXTS]))
        seen = fingerprint_tokens(tokens)
        found.append(Item("shuffled", order[0].arm, number, seen, "shuffled", tuple(tokens), contexts))
    return found


def _hidden_name(secret: bytes, rater: str, item: Item) -> str:
    text = "\0".join(map(str, (rater.casefold(), *item.key)))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=secret, digest_size=8).hexdigest()
