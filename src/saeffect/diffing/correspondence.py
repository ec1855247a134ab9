"""Fates by two measures: cosine of decoder rows (what a feature writes), correlation of activations (when it fires).

And absorption: features of the other SAE that together fire where a lost one fired and write what it wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from saeffect.diffing.coactivity import match_activity
from saeffect.diffing.fates import Fates, fates
from saeffect.diffing.matching import NO_MATCH, Matching, assign, match_decoders, unit_rows
from saeffect.diffing.pair import ModelPair, SaeView
from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.stats.arguments import FloatArray, IntArray

__all__ = ["MEASURES", "absorption", "measure"]

MEASURES = ("decoder cosine", "activation correlation")


def measure(pair: ModelPair) -> dict[str, pd.DataFrame]:
    """Match the control's SAE with the treatment's, relative to other SAEs of the control's model.

    Returns:
        fates_control: The control's features, by each measure (`measure`): the columns of `Fates.control`; `mutual`,
            whether it and its match are each other's nearest; `assigned`, its partner in the best one-to-one pairing
            (-1 for none) and `assigned_similarity`; `other_seeds_similarity`, its mean best match in the treatment's
            further SAEs. "absorbed" replaces "gone" where `absorption` finds parents.
        fates_treatment: The same of the treatment's features, without the last.
        fate_counts: `Fates.counts` by measure, with rows for absorbed features.
        fates_null: One row per measure, side and ordered pair (`reference`, `stand_in`) of SAEs of the control's model,
            judged by the rest of them, and for the treatment (`is_null` False): features `tested`, `low_p` (p at most
            alpha), `called` (q at most alpha), `drift`, `reason`. Without other SAEs there is no fate.
        absorption: As `absorption` gives it, of the features gone by a measure; `measures` names these.

    `ConfigError`: two SAEs of one name; `ShapeMismatch`: decoders of different width, or logs of different text.
    """
    names = [view.name for view in (pair.control, pair.treatment, *pair.others, *pair.treatment_seeds)]
    if len(set(names)) < len(names):
        raise ConfigError(f"every SAE needs a name of its own. Got {', '.join(names)}.", at="name")
    with_logs = pair.control.firing is not None and pair.treatment.firing is not None
    pieces = [_by_measure(name, pair) for name in (MEASURES if with_logs else MEASURES[:1])]
    tables = {name: pd.concat([piece[name] for piece in pieces], ignore_index=True) for name in pieces[0]}
    absorbed = _absorbed(tables["fates_control"], pair)
    control = _relabelled(tables["fates_control"], absorbed)
    counts = _recounted(tables["fate_counts"], control)
    return {**tables, "fates_control": control, "fate_counts": counts, "absorption": absorbed}


class _Pairs:
    """Matchings between SAEs by one measure, each made once."""

    def __init__(self, name: str, pair: ModelPair, total: int) -> None:
        self.measure = name
        self._made: dict[tuple[str, str], Matching] = {}
        self._total, self._pair = total, pair

    def between(self, a: SaeView, b: SaeView) -> Matching:
        if (b.name, a.name) in self._made:
            return self._made[b.name, a.name].reversed()
        if (a.name, b.name) not in self._made:
            keep = self._pair.keep
            found = keep.read(self.measure, a.name, b.name) if keep else None
            if found is None:
                found = self._matched(a, b)
                if keep:
                    keep.write(self.measure, a.name, b.name, found)
            self._made[a.name, b.name] = found
            done = len(self._made)
            self._pair.log.progress(f"match {self.measure}", done, max(done, self._total), "pairs")
        return self._made[a.name, b.name]

    def _matched(self, a: SaeView, b: SaeView) -> Matching:
        if self.measure == MEASURES[0]:
            return match_decoders(a.W_dec, b.W_dec, use_a=a.fires, use_b=b.fires)
        if a.firing is None or b.firing is None:
            raise ConfigError("to correlate activations, both SAEs' are needed.", at="firing")
        return match_activity(a.firing, b.firing)

    def fates(self, reference: SaeView, other: SaeView, rest: Sequence[SaeView]) -> Fates:
        """What became of the features of `reference` in `other`, beside the `rest`."""
        return fates(
            self.between(reference, other),
            [self.between(reference, view) for view in rest],
            control_features=reference.features,
            treatment_features=other.features,
            placebo_features=[view.features for view in rest],
            alpha=self._pair.alpha,
            resampling=self._pair.resampling,
        )


def _by_measure(name: str, pair: ModelPair) -> dict[str, pd.DataFrame]:
    """The tables of one measure, with mutual neighbours and the best pairing."""
    others, seeds = (
        [view for view in views if name == MEASURES[0] or view.firing is not None]
        for views in (pair.others, pair.treatment_seeds)
    )
    pairs = _Pairs(name, pair, 1 + len(others) + len(others) * (len(others) + 1) // 2)
    found = pairs.fates(pair.control, pair.treatment, others)
    matching = pairs.between(pair.control, pair.treatment)
    paired = assign(matching)
    best = np.array([pairs.between(pair.control, view).forward.best for view in seeds])
    similarity_of_b = np.full(matching.n_b, np.nan)
    has_partner = paired.a_of_b != NO_MATCH
    similarity_of_b[has_partner] = paired.similarity[paired.a_of_b[has_partner]]
    tables = {
        "fates_control": found.control.assign(
            mutual=matching.mutual,
            assigned=paired.b_of_a,
            assigned_similarity=paired.similarity,
            other_seeds_similarity=best.mean(axis=0) if seeds else np.nan,
        ),
        "fates_treatment": found.treatment.assign(
            mutual=matching.reversed().mutual, assigned=paired.a_of_b, assigned_similarity=similarity_of_b
        ),
        "fate_counts": found.counts.copy(),
    }
    for table in tables.values():
        table.insert(0, "measure", pd.Series([name] * len(table), dtype="str"))
    return {**tables, "fates_null": _nulls(pairs, pair, others, found)}


def _nulls(pairs: _Pairs, pair: ModelPair, others: Sequence[SaeView], real: Fates) -> pd.DataFrame:
    """Calls for every ordered pair of SAEs of the control's model, and for the treatment's."""
    rows = [*_calls(pairs.measure, pair.control, pair.treatment, real, pair.alpha, is_null=False)]
    saes = [pair.control, *others]
    for reference, held_out in permutations(saes, 2):
        rest = [view for view in saes if view is not reference and view is not held_out]
        if rest:
            found = pairs.fates(reference, held_out, rest)
            rows += _calls(pairs.measure, reference, held_out, found, pair.alpha, is_null=True)
    return pd.DataFrame(rows)


def _calls(
    name: str, reference: SaeView, other: SaeView, found: Fates, alpha: float, *, is_null: bool
) -> Iterator[dict[str, object]]:
    for side, table in (("control", found.control), ("treatment", found.treatment)):
        tested = table["p"].notna()
        reasons = table.loc[~tested, "reason"]
        yield {
            "measure": name,
            "side": side,
            "reference": reference.name,
            "stand_in": other.name,
            "is_null": is_null,
            "tested": int(tested.sum()),
            "low_p": int((table["p"] <= alpha).sum()),
            "called": int((table["q"] <= alpha).sum()),
            "drift": found.drift,
            "reason": "" if tested.any() or reasons.empty else str(reasons.mode().iloc[0]),
        }


def _absorbed(control_table: pd.DataFrame, pair: ModelPair) -> pd.DataFrame:
    gone = control_table[control_table["fate"] == "gone"]
    measures = gone.groupby("feature")["measure"].agg(" and ".join)
    if pair.control.firing is None or pair.treatment.firing is None:
        columns = ["feature", "measures", "absorbed", "absorbed_by", "cosine", "recall", "reason"]
        return pd.DataFrame(columns=columns).astype({"feature": "int64", "absorbed": "bool"})
    if len(measures):
        pair.log(f"  looking for parents of {len(measures)} features without a counterpart")
    found = absorption(measures.index.to_numpy(dtype=np.int64), pair.control, pair.treatment, seed=pair.resampling.seed)
    found.insert(1, "measures", pd.Series(measures.to_list(), dtype="str"))
    return found


def _relabelled(control_table: pd.DataFrame, absorbed: pd.DataFrame) -> pd.DataFrame:
    has_parents = set(absorbed.loc[absorbed["absorbed"], "feature"])
    is_absorbed = (control_table["fate"] == "gone") & control_table["feature"].isin(has_parents)
    return control_table.assign(fate=control_table["fate"].mask(is_absorbed, "absorbed"))


def _recounted(counts: pd.DataFrame, control_table: pd.DataFrame) -> pd.DataFrame:
    """Adds a row for absorbed features and subtracts them from the gone ones."""
    frames = []
    for name, group in counts.groupby("measure", sort=False):
        rows = group.copy()
        n = int(((control_table["measure"] == name) & (control_table["fate"] == "absorbed")).sum())
        gone = (rows["side"] == "control") & (rows["fate"] == "gone")
        rows.loc[gone, "called"] -= n
        row = {
            **rows[gone].iloc[0].to_dict(),
            "fate": "absorbed",
            "called": float(n) if bool(rows.loc[gone, "called"].notna().all()) else np.nan,
            **dict.fromkeys(("n_treatment", "n_placebo", "excess", "low", "high"), np.nan),
            "reason": "only features that are called gone are looked at, so there is no count by similarity alone",
        }
        frames += [rows[rows["side"] == "control"], pd.DataFrame([row]), rows[rows["side"] != "control"]]
    return pd.concat(frames, ignore_index=True)[list(counts.columns)]


_PARENTS_TRIED = 16  # features that fire most often where it fired, to build its direction from
_MAX_PARENTS = 4  # of those, the most that may be needed
_MIN_ACTIVE = 10  # tokens on which the feature must have fired
_MIN_COACTIVE = 5  # tokens that a candidate must share with it
_MIN_LIFT = 2.0  # times as often as elsewhere a candidate must fire there: one that fires everywhere explains nothing
_MIN_RECALL = 0.5  # share of its tokens on which a parent must fire
_MIN_COSINE = 0.6  # between its decoder row and the best sum (no negative weights) of the parents' rows
_ALPHA = 0.05  # highest p of that cosine among those of other features' rows and the same candidates
_NULL_FEATURES = 199  # such other features, drawn at random
_EMPTY: dict[str, Any] = {
    "absorbed": False,
    "absorbed_by": [],
    "weights": [],
    "recall": math.nan,
    "recall_each": [],
    "chance_recall": math.nan,
    "cosine": math.nan,
    "cosine_p": math.nan,
    "reason": "",
}


def absorption(
    features: Sequence[int] | IntArray, control: SaeView, treatment: SaeView, *, seed: int = 0
) -> pd.DataFrame:
    """Look for the parents of control features without a counterpart (idea: Chanin et al. 2024, A is for Absorption).

    The SAEs need firing logs of the same tokens; `seed` draws the features to compare with. One row a feature, in the
    order given: `feature`; `n_active`, tokens on which it fired; `absorbed`; `absorbed_by`, treatment features, the
    largest part first; `weights` of their unit rows in the sum; `recall`, the share of its tokens on which any of them
    fires; `recall_each`; `chance_recall`, if each fired independently at its overall density; `cosine` of the sum with
    its decoder row; `cosine_p`, rank of that cosine among those of other control features built from the same
    candidates; `reason`, why it is not called absorbed. Numbers are NaN where it fired too seldom or nothing fires with
    it.

    Raises `ShapeMismatch` if the logs are missing or of different text, or the decoders differ in width.
    """
    if control.firing is None or treatment.firing is None or control.firing.n_tokens != treatment.firing.n_tokens:
        raise ShapeMismatch("both SAEs' logs are needed, and they must be of the same text.", at="treatment")
    if control.W_dec.shape[1] != treatment.W_dec.shape[1]:
        raise ShapeMismatch(
            f"the decoders are {control.W_dec.shape[1]} and {treatment.W_dec.shape[1]} wide.", at="treatment"
        )
    fired_before, fires_now = control.firing.matrix().tocsc(), treatment.firing.matrix().tocsr()
    density = np.bincount(fires_now.indices, minlength=treatment.firing.d_sae) / max(1, treatment.firing.n_tokens)
    others = np.random.default_rng(seed).permutation(control.firing.d_sae)[: _NULL_FEATURES + 1]
    before, now = (unit_rows(view.W_dec.detach().double().cpu().numpy()) for view in (control, treatment))
    rows = []
    for feature in np.asarray(features, dtype=np.int64).tolist():
        start, end = fired_before.indptr[feature : feature + 2]
        here = fires_now[np.sort(fired_before.indices[start:end])]
        row: dict[str, Any] = {"feature": feature, "n_active": int(end - start), **_EMPTY}
        if end - start < _MIN_ACTIVE:
            row["reason"] = f"it fires on {end - start} tokens, and {_MIN_ACTIVE} are needed"
        else:
            null = before[others[others != feature][:_NULL_FEATURES]]
            row |= _parents(before[feature], null, here, now, density)
        rows.append(row)
    columns = ["feature", "n_active", *_EMPTY]
    return pd.DataFrame(rows, columns=columns).astype({"feature": "int64", "n_active": "int64", "absorbed": "bool"})


def _parents(row: FloatArray, null: FloatArray, here: Any, now: FloatArray, density: FloatArray) -> dict[str, Any]:
    """Parents of one feature from what fires `here`, the tokens on which it fired (CSR [n_active, d_sae])."""
    together = np.bincount(here.indices, minlength=here.shape[1])
    recall = together / here.shape[0]
    possible = np.flatnonzero((together >= _MIN_COACTIVE) & (recall >= _MIN_LIFT * density))
    if not len(possible):
        return {"reason": "no feature fires with it more often than elsewhere"}
    # Ties by number, so that the choice is reproducible.
    candidates = possible[np.argsort(-recall[possible], kind="stable")][:_PARENTS_TRIED]
    weights, cosine, chosen = _build(row, now[candidates])
    if not len(chosen):
        return {"cosine": 0.0, "cosine_p": 1.0, "recall": 0.0, "reason": "those that fire with it point elsewhere"}
    built_null = np.array([_build(other, now[candidates])[1] for other in null])
    cosine_p = (1 + int((built_null >= cosine - 1e-12).sum())) / (1 + len(null))
    parents = candidates[chosen]
    union = float((np.diff(here[:, parents].indptr) > 0).mean())
    reasons = [
        (union >= _MIN_RECALL, f"they fire on {100 * union:.0f} % of its tokens only"),
        (cosine >= _MIN_COSINE, f"their sum has a cosine of only {cosine:.2f} with it"),
        (cosine_p <= _ALPHA, "their sum fits other features as well"),
    ]
    reason = next((text for holds, text in reasons if not holds), "")
    return {
        "absorbed": not reason,
        "absorbed_by": parents.tolist(),
        "weights": weights.tolist(),
        "recall": union,
        "recall_each": recall[parents].tolist(),
        "chance_recall": float(1 - np.prod(1 - density[parents])),
        "cosine": cosine,
        "cosine_p": cosine_p,
        "reason": reason,
    }


def _build(row: FloatArray, parts: FloatArray) -> tuple[FloatArray, float, IntArray]:
    """The best sum of at most `_MAX_PARENTS` parts: weights, its cosine with the unit `row`, and which parts."""
    from scipy.optimize import nnls

    weights = nnls(parts.T, row)[0]
    chosen = np.argsort(-weights, kind="stable")[:_MAX_PARENTS]
    chosen = chosen[weights[chosen] > 1e-9]
    if not len(chosen):
        return np.empty(0), 0.0, chosen
    weights = nnls(parts[chosen].T, row)[0]
    order = np.argsort(-weights, kind="stable")
    order = order[weights[order] > 1e-9]
    chosen, weights = chosen[order], weights[order]
    total = weights @ parts[chosen]
    length = float(np.linalg.norm(total))
    return weights, float(total @ row / length) if length > 0 else 0.0, chosen
