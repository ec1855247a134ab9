"""The share of what a whole activation does that is done by some of its features, with intervals over texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from saeffect.diffing.put_back import FeatureSet
from saeffect.lm.activations import TokenRows
from saeffect.stats.arguments import FloatArray
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.student import mean_interval, ratio_of_means

__all__ = ["COLUMNS", "OWN_WRITING", "put_back_table"]

OWN_WRITING = "own writing"
"""Source of the rows that the fine-tuned model wrote itself."""

COLUMNS = (
    *("edited", "source", "measure", "features", "n_features", "kind", "share", "low", "high", "p"),
    *("effect", "effect_low", "effect_high", "whole", "n_rows", "n_tokens", "reason"),
)


def put_back_table(outcomes: pd.DataFrame, rows: TokenRows, sets: Sequence[FeatureSet]) -> pd.DataFrame:
    """Shares from the pieces that `outcomes` gave for these rows and sets, of one edited model or both.

    One row per edited model ("tuned", which got the base model's values, or "base"), source of text, measure, set and
    kind. Measures: "loss", the cross-entropy of the text; "kl", how far the predictions are from those with the whole
    activation put back. Kinds: "own", "matched", and "difference" (own minus matched).

    share: what putting the set back does, over what putting the whole activation back does (of KL: the part of the
    distance that is gone), with a 95 % interval over rows of text (Fieller); p (Student's t over rows, two-sided) for
    no effect. effect: the same in nats a token, with Student's interval; whole: the effect of the whole. `features`
    "whole" is the whole activation, and "model" the other model's own loss, whose share is above 1 if blocks behind the
    hook were changed as well. n_features is <NA> for these. n_tokens: predictions averaged over. reason: "" where share
    has an interval.
    """
    records = []
    for edited in dict.fromkeys(outcomes["edited"]):
        results = outcomes[outcomes["edited"] == edited]
        if not (results["features"] == "whole").any():
            continue
        other = outcomes[(outcomes["edited"] != edited) & (outcomes["features"] == "none")]
        for number, source in enumerate(rows.names):
            source_rows = np.flatnonzero(rows.sources == number)
            if not len(source_rows):
                continue
            shared = {"edited": edited, "source": source, "n_rows": len(source_rows)}
            shared["n_tokens"] = len(source_rows) * (rows.context_size - 1)
            of_other = other.set_index("row")["loss"].reindex(source_rows).to_numpy() if len(other) else None
            for record in _of_source(results[results["row"].isin(source_rows)], sets, of_other):
                records.append(shared | record)
    table = pd.DataFrame(records, columns=list(COLUMNS))
    return table.astype({"n_features": "Int64", "reason": "str"})


def _of_source(found: pd.DataFrame, sets: Sequence[FeatureSet], other: FloatArray | None) -> Iterator[dict[str, Any]]:
    keys = ["features", "n_features", "kind"]
    for measure in ("loss", "kl"):
        values = {key: rows.sort_values("row")[measure].to_numpy() for key, rows in found.groupby(keys)}
        none, sign = values["none", 0, "own"], 1.0 if measure == "loss" else -1.0
        whole = sign * (values["whole", -1, "own"] - none)
        yield _record(measure, ("whole", None, "own"), whole, whole)
        if measure == "loss" and other is not None:
            yield _record(measure, ("model", None, "own"), other - none, whole)
        effects: dict[tuple[str, int], FloatArray] = {}
        for one in sets:
            key = one.name, one.n, one.kind
            if one.reason and (one.name, one.n) in effects:
                yield _record(measure, key, np.full(len(none), math.nan), whole, one.reason)
            if key not in values:
                continue
            effect = sign * (values[key] - none)
            yield _record(measure, key, effect, whole)
            if one.kind == "own":
                effects[one.name, one.n] = effect
            elif (one.name, one.n) in effects:
                yield _record(measure, (*key[:2], "difference"), effects[one.name, one.n] - effect, whole)


def _record(
    measure: str, key: tuple[str, int | None, str], effect: FloatArray, whole: FloatArray, reason: str = ""
) -> dict[str, Any]:
    share = undefined(reason, len(effect)) if reason else _share(effect, whole, measure)
    nats = undefined(reason, len(effect)) if reason else mean_interval(effect)
    return {
        **dict(zip(("features", "n_features", "kind"), key, strict=True)),
        "measure": measure,
        **{"share": share.value, "low": share.low, "high": share.high, "p": share.p},
        **{"effect": nats.value, "effect_low": nats.low, "effect_high": nats.high},
        "whole": float(whole.mean()),
        "reason": share.reason,
    }


def _share(effect: FloatArray, whole: FloatArray, measure: str) -> Estimate:
    if not whole.any():
        return undefined("the whole activation changes nothing: both models have the same here", len(whole))
    share = ratio_of_means(effect, whole)
    if math.isnan(share.value) and len(whole) > 1:
        what = "loss" if measure == "loss" else "predictions"
        around = mean_interval(whole)
        reason = (
            f"what the whole activation does to the {what}, {around.value:+.3g} nats a token"
            f" [{around.low:.3g}, {around.high:.3g}], is not clear of zero"
        )
        return undefined(reason, len(whole))
    return share
