"""Fates by two measures: cosine of decoder rows (what a feature writes), correlation of activations (when it fires).

Also absorption: features of the other SAE that together fire where a lost feature fired, and write what it wrote.
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
    by_measure = [_measure_tables(name, pair) for name in (MEASURES if with_logs else MEASURES[:1])]
    tables = {name: pd.concat([piece[name] for piece in by_measure], ignore_index=True) for name in by_measure[0]}
    absorbed = _find_absorbed(tables["fates_control"], pair)
    control = tables["fates_control"]
    has_parents = control["feature"].isin(absorbed.loc[absorbed["absorbed"], "feature"])
    control = control.assign(fate=control["fate"].mask((control["fate"] == "gone") & has_parents, "absorbed"))
    counts = _count_absorbed(tables["fate_counts"], control)
    return {**tables, "fates_control": control, "fate_counts": counts, "absorption": absorbed}


class _Matchings:
    """Matchings between SAEs by one measure, each computed once."""

    def __init__(self, name: str, pair: ModelPair, total: int) -> None:
        self.measure = name
        self._cache: dict[tuple[str, str], Matching] = {}
        self._total, self._pair = total, pair

    def matching(self, a: SaeView, b: SaeView) -> Matching:
        if (b.name, a.name) in self._cache:
            return self._cache[b.name, a.name].reversed()
        if (a.name, b.name) not in self._cache:
            store = self._pair.store
            matching = store.read(self.measure, a.name, b.name) if store else None
            if matching is None:
                matching = self._match(a, b)
                if store:
                    store.write(self.measure, a.name, b.name, matching)
            self._cache[a.name, b.name] = matching
            done = len(self._cache)
            self._pair.log.progress(f"match {self.measure}", done, max(done, self._total), "pairs")
        return self._cache[a.name, b.name]

    def _match(self, a: SaeView, b: SaeView) -> Matching:
        if self.measure == MEASURES[0]:
            return match_decoders(a.W_dec, b.W_dec, use_a=a.fires, use_b=b.fires)
        if a.firing is None or b.firing is None:
            raise ConfigError("to correlate activations, both SAEs' are needed.", at="firing")
        return match_activity(a.firing, b.firing)

    def fates(self, reference: SaeView, other: SaeView, rest: Sequence[SaeView]) -> Fates:
        """Fates of the features of `reference` in `other`, with the `rest` as placebos."""
        return fates(
            self.matching(reference, other),
            [self.matching(reference, view) for view in rest],
            control_features=reference.features,
            treatment_features=other.features,
            placebo_features=[view.features for view in rest],
            alpha=self._pair.alpha,
            resampling=self._pair.resampling,
        )


def _measure_tables(name: str, pair: ModelPair) -> dict[str, pd.DataFrame]:
    """The tables of one measure, with mutual neighbours and the best pairing."""
    others, seeds = (
        [view for view in views if name == MEASURES[0] or view.firing is not None]
        for views in (pair.others, pair.treatment_seeds)
    )
    matchings = _Matchings(name, pair, 1 + len(others) + len(others) * (len(others) + 1) // 2)
    result = matchings.fates(pair.control, pair.treatment, others)
    matching = matchings.matching(pair.control, pair.treatment)
    pairing = assign(matching)
    seed_similarity = np.array([matchings.matching(pair.control, view).forward.best for view in seeds])
    similarity_of_b = np.full(matching.n_b, np.nan)
    has_partner = pairing.a_of_b != NO_MATCH
    similarity_of_b[has_partner] = pairing.similarity[pairing.a_of_b[has_partner]]
    tables = {
        "fates_control": result.control.assign(
            mutual=matching.mutual,
            assigned=pairing.b_of_a,
            assigned_similarity=pairing.similarity,
            other_seeds_similarity=seed_similarity.mean(axis=0) if seeds else np.nan,
        ),
        "fates_treatment": result.treatment.assign(
            mutual=matching.reversed().mutual, assigned=pairing.a_of_b, assigned_similarity=similarity_of_b
        ),
        "fate_counts": result.counts.copy(),
    }
    for table in tables.values():
        table.insert(0, "measure", pd.Series([name] * len(table), dtype="str"))
    return {**tables, "fates_null": _null_calls(matchings, pair, others, result)}


def _null_calls(matchings: _Matchings, pair: ModelPair, others: Sequence[SaeView], real: Fates) -> pd.DataFrame:
    """Called features for every ordered pair of SAEs of the control's model, and for the treatment's SAE."""
    rows = [*_calls(matchings.measure, pair.control, pair.treatment, real, pair.alpha, is_null=False)]
    saes = [pair.control, *others]
    for reference, held_out in permutations(saes, 2):
        rest = [view for view in saes if view is not reference and view is not held_out]
        if rest:
            result = matchings.fates(reference, held_out, rest)
            rows += _calls(matchings.measure, reference, held_out, result, pair.alpha, is_null=True)
    return pd.DataFrame(rows)


def _calls(
    name: str, reference: SaeView, other: SaeView, result: Fates, alpha: float, *, is_null: bool
) -> Iterator[dict[str, object]]:
    for side, table in (("control", result.control), ("treatment", result.treatment)):
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
            "drift": result.drift,
            "reason": "" if tested.any() or reasons.empty else str(reasons.mode().iloc[0]),
        }


def _find_absorbed(control_table: pd.DataFrame, pair: ModelPair) -> pd.DataFrame:
    gone = control_table[control_table["fate"] == "gone"]
    measures = gone.groupby("feature")["measure"].agg(" and ".join)
    if pair.control.firing is None or pair.treatment.firing is None:
        columns = ["feature", "measures", "absorbed", "absorbed_by", "cosine", "recall", "reason"]
        return pd.DataFrame(columns=columns).astype({"feature": "int64", "absorbed": "bool"})
    if len(measures):
        pair.log(f"  looking for parents of {len(measures)} features without a counterpart")
    features = measures.index.to_numpy(dtype=np.int64)
    absorbed = absorption(features, pair.control, pair.treatment, seed=pair.resampling.seed)
    absorbed.insert(1, "measures", pd.Series(measures.to_list(), dtype="str"))
    return absorbed


def _count_absorbed(counts: pd.DataFrame, control_table: pd.DataFrame) -> pd.DataFrame:
    """Add a row for absorbed features, and subtract them from the gone ones."""
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


_PARENTS_TRIED = 16  # candidates: features that fire most often where the lost feature fired
_MAX_PARENTS = 4  # candidates in the sum
_MIN_ACTIVE = 10  # tokens on which the lost feature must have fired
_MIN_COACTIVE = 5  # tokens that a candidate must share with it
_MIN_LIFT = 2.0  # rate of a candidate on these tokens over its density: one that fires everywhere explains nothing
_MIN_RECALL = 0.5  # share of the tokens on which a parent must fire
_MIN_COSINE = 0.6  # between the lost decoder row and the best non-negative sum of the parents' rows
_ALPHA = 0.05  # highest p of that cosine, among cosines of other features' rows with the same candidates
_NULL_FEATURES = 199  # these other features, drawn at random
_NOT_ABSORBED: dict[str, Any] = {
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
    its decoder row; `cosine_p`, rank of that cosine among those of other control features with the same candidates;
    `reason`, why it is not called absorbed. Numbers are NaN where it fired too seldom or nothing fires with it.

    Raises `ShapeMismatch` if the logs are missing or of different text, or the decoders differ in width.
    """
    if control.firing is None or treatment.firing is None or control.firing.n_tokens != treatment.firing.n_tokens:
        raise ShapeMismatch("both SAEs' logs are needed, and they must be of the same text.", at="treatment")
    if control.W_dec.shape[1] != treatment.W_dec.shape[1]:
        raise ShapeMismatch(
            f"the decoders are {control.W_dec.shape[1]} and {treatment.W_dec.shape[1]} wide.", at="treatment"
        )
    acts_control, acts_treatment = control.firing.matrix().tocsc(), treatment.firing.matrix().tocsr()
    density = np.bincount(acts_treatment.indices, minlength=treatment.firing.d_sae) / max(1, treatment.firing.n_tokens)
    null_features = np.random.default_rng(seed).permutation(control.firing.d_sae)[: _NULL_FEATURES + 1]
    rows_control, rows_treatment = (
        unit_rows(view.W_dec.detach().double().cpu().numpy()) for view in (control, treatment)
    )
    rows = []
    for feature in np.asarray(features, dtype=np.int64).tolist():
        start, end = acts_control.indptr[feature : feature + 2]
        coactive = acts_treatment[np.sort(acts_control.indices[start:end])]
        row: dict[str, Any] = {"feature": feature, "n_active": int(end - start), **_NOT_ABSORBED}
        if end - start < _MIN_ACTIVE:
            row["reason"] = f"it fires on {end - start} tokens, and {_MIN_ACTIVE} are needed"
        else:
            null = rows_control[null_features[null_features != feature][:_NULL_FEATURES]]
            row |= _find_parents(rows_control[feature], null, coactive, rows_treatment, density)
        rows.append(row)
    columns = ["feature", "n_active", *_NOT_ABSORBED]
    return pd.DataFrame(rows, columns=columns).astype({"feature": "int64", "n_active": "int64", "absorbed": "bool"})


def _find_parents(
    row: FloatArray, null: FloatArray, coactive: Any, rows_treatment: FloatArray, density: FloatArray
) -> dict[str, Any]:
    """Parents of one feature, from the activations `coactive` [n_active, d_sae] on the tokens on which it fired."""
    n_coactive = np.bincount(coactive.indices, minlength=coactive.shape[1])
    recall = n_coactive / coactive.shape[0]
    eligible = np.flatnonzero((n_coactive >= _MIN_COACTIVE) & (recall >= _MIN_LIFT * density))
    if not len(eligible):
        return {"reason": "no feature fires with it more often than elsewhere"}
    # Ties by number, so that the choice is reproducible.
    candidates = eligible[np.argsort(-recall[eligible], kind="stable")][:_PARENTS_TRIED]
    weights, cosine, chosen = _fit_row(row, rows_treatment[candidates])
    if not len(chosen):
        return {"cosine": 0.0, "cosine_p": 1.0, "recall": 0.0, "reason": "those that fire with it point elsewhere"}
    null_cosines = np.array([_fit_row(null_row, rows_treatment[candidates])[1] for null_row in null])
    cosine_p = (1 + int((null_cosines >= cosine - 1e-12).sum())) / (1 + len(null))
    parents = candidates[chosen]
    joint_recall = float((np.diff(coactive[:, parents].indptr) > 0).mean())
    reasons = [
        (joint_recall >= _MIN_RECALL, f"they fire on {100 * joint_recall:.0f} % of its tokens only"),
        (cosine >= _MIN_COSINE, f"their sum has a cosine of only {cosine:.2f} with it"),
        (cosine_p <= _ALPHA, "their sum fits other features as well"),
    ]
    reason = next((message for holds, message in reasons if not holds), "")
    return {
        "absorbed": not reason,
        "absorbed_by": parents.tolist(),
        "weights": weights.tolist(),
        "recall": joint_recall,
        "recall_each": recall[parents].tolist(),
        "chance_recall": float(1 - np.prod(1 - density[parents])),
        "cosine": cosine,
        "cosine_p": cosine_p,
        "reason": reason,
    }


def _fit_row(row: FloatArray, parts: FloatArray) -> tuple[FloatArray, float, IntArray]:
    """The non-negative sum of at most `_MAX_PARENTS` parts nearest to the unit `row`: weights, cosine, chosen parts."""
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
