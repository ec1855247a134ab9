from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from saeffect.errors import NotFound
from saeffect.review.queue import Queue, make_queue
from saeffect.review.store import STORE, Verdict, VerdictStore


def arm(first: str, n: int = 60, chosen: int = 30) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "feature": range(n),
            "top_tokens": [[f" {first}{i}.{rank}" for rank in range(5)] for i in range(n)],
            "n_active": [0 if i == n - 1 else 3 for i in range(n)],
            "in_vocabulary": [i < chosen for i in range(n)],
            "matches": [2 if i < chosen else int(i == chosen) for i in range(n)],
        }
    )


@pytest.fixture
def queue() -> Queue:
    return make_queue({"control": arm("c"), "treatment": arm("t")})


@pytest.fixture
def store(tmp_path: Path) -> VerdictStore:
    store = VerdictStore(tmp_path / STORE)
    store.join("ann")
    store.join("ben")
    return store


def test_all_candidates_and_both_kinds_of_decoys_are_asked(queue: Queue) -> None:
    assert len(queue.candidates) == 60
    others = [item for item in queue.items if item.decoy == "other"]
    shuffled = [item for item in queue.items if item.decoy == "shuffled"]
    assert (len(others), len(shuffled)) == (6, 6)
    # Neither a feature with one word of the vocabulary, nor one that never fires.
    assert all(item.feature not in (30, 59) and item.feature > 30 for item in others)
    assert {item.arm for item in others} == {"control", "treatment"}


def test_shuffled_decoys_mix_tokens_of_different_candidates(queue: Queue) -> None:
    for item in queue.items:
        if item.decoy == "shuffled":
            sources = {token.split(".")[0] for token in item.tokens}
            assert len(sources) == 5
            assert [token.split(".")[1] for token in item.tokens] == list("01234")
            assert len({(arm, feature) for arm, feature, _ in item.contexts}) == len(item.contexts) == 4


def test_decoys_depend_on_the_seed_not_on_the_rater(queue: Queue) -> None:
    arms = {"control": arm("c"), "treatment": arm("t")}
    assert make_queue(arms).items == queue.items
    assert make_queue(arms, seed=1).items != queue.items
    assert make_queue(arms, decoys=0).items == queue.candidates


def test_each_rater_has_a_fixed_order(queue: Queue, store: VerdictStore) -> None:
    ann, ben = queue.of_rater("ann", store), queue.of_rater("ben", store)
    assert set(ann) == set(ben) == set(queue.items)
    assert ann != ben
    assert queue.of_rater("ann", store) == ann
    # Decoys lie among the candidates, not at an end.
    places = [place for place, item in enumerate(ann) if item.decoy]
    assert max(places) - min(places) > len(ann) / 3


def test_names_of_items_tell_nothing_and_find_the_item(queue: Queue, store: VerdictStore) -> None:
    names = {queue.name(item, "ann", store) for item in queue.items}
    assert len(names) == len(queue.items)
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)
    item = queue.items[3]
    assert queue.find(queue.name(item, "ann", store), "ann", store) == item
    with pytest.raises(NotFound, match="no longer part"):
        queue.find(queue.name(item, "ann", store), "ben", store)


def test_judged_items_return_only_with_other_tokens(queue: Queue, store: VerdictStore) -> None:
    first = queue.open_items("ann", store)[0]
    store.record("ann", Verdict(first.arm, first.feature, first.seen, "yes", kind=first.kind))
    assert queue.open_items("ann", store)[0] != first
    assert len(queue.open_items("ann", store)) == len(queue.items) - 1
    assert len(queue.open_items("ben", store)) == len(queue.items)
    store.undo("ann")
    assert queue.open_items("ann", store)[0] == first
    candidate = queue.candidates[0]
    store.record("ann", Verdict(candidate.arm, candidate.feature, "of other tokens", "yes"))
    assert candidate in queue.open_items("ann", store)


def test_too_few_candidates_give_no_shuffled_decoys() -> None:
    few = make_queue({"control": arm("c", chosen=3)})
    assert [item.decoy for item in few.items].count("shuffled") == 0
    assert [item.decoy for item in few.items].count("other") == 4
    assert make_queue({"control": arm("c", chosen=0)}).items == ()
