"""Several features steered at once, as rows of a feature table that `run_trials` understands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from saeffect.errors import EmptySelection, ShapeMismatch

__all__ = ["features_together"]


def features_together(
    features: pd.DataFrame, sets: Sequence[Sequence[int]], matched: Mapping[int, Sequence[int]] | None = None
) -> pd.DataFrame:
    """A table with one row for each set of features that are steered at once.

    Added, a set goes along the sum of its decoder rows, the whole being as long as the dose says; clamped or
    ablated, each of its features is set. Texts are compared with the top tokens of all of them.

    Args:
        features: Columns feature, top_tokens and top_token_ids.
        sets: Which features belong together.
        matched: Placebo features of each feature, nearest first, for the matched placebo of a set: one placebo
            for each member, none twice.

    Returns:
        feature (number of the set, from 0), members (list of int), top_tokens and top_token_ids (the members'
        in turn, each once), and matched (list of lists) if given; empty where a member has none.

    Raises:
        EmptySelection: No sets, or an empty one.
        ShapeMismatch: A feature is not in the table.

    Example:
        >>> table = pd.DataFrame({"feature": [3, 8], "top_tokens": [["a", "b"], ["c", "a"]],
        ...                       "top_token_ids": [[0, 1], [2, 0]]})
        >>> features_together(table, [[3, 8]])["top_tokens"].tolist()
        [['a', 'c', 'b']]
    """
    if not len(sets) or not all(len(some) for some in sets):
        raise EmptySelection("there is no set of features to steer together, or one of them is empty.", at="together")
    table = features.set_index("feature")
    rows = []
    for number, some in enumerate(sets):
        unknown = [f for f in some if f not in table.index]
        if unknown:
            raise ShapeMismatch(f"there is no feature {unknown[0]}; they run to {table.index.max()}.", at="together")
        row: dict[str, Any] = {"feature": number, "members": [int(f) for f in some]}
        for column in ("top_tokens", "top_token_ids"):
            row[column] = _in_turn([list(table.at[f, column]) for f in some])
        if matched is not None:
            row["matched"] = _joint_placebos([list(matched.get(int(f), ())) for f in some])
        rows.append(row)
    return pd.DataFrame(rows)


def _in_turn(lists: Sequence[Sequence[Any]]) -> list[Any]:
    longest = max(map(len, lists))
    found = [some[i] for i in range(longest) for some in lists if i < len(some)]
    return list(dict.fromkeys(found))


def _joint_placebos(lists: Sequence[Sequence[int]]) -> list[list[int]]:
    """As many sets of placebos as each member has; a set has one of each member's, all different."""
    found = []
    for first in range(min(map(len, lists))):
        chosen: list[int] = []
        for placebos in lists:
            fresh: Iterable[int] = (p for p in (*placebos[first:], *placebos[:first]) if p not in chosen)
            chosen += [p for p in [next(iter(fresh), None)] if p is not None]
        if len(chosen) == len(lists):
            found.append(chosen)
    return found
