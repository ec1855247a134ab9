"""Fates by two measures: cosine of decoder rows (what a feature writes), correlation of activations (when it fires)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np
import pandas as pd

from saeffect.diffing.absorption import absorption
from saeffect.diffing.coactivity import match_activity
from saeffect.diffing.fates import Fates, fates
from saeffect.diffing.matching import NO_MATCH, Matching, assign, match_decoders
from saeffect.diffing.pair import ModelPair, SaeView
from saeffect.errors import ConfigError

__all__ = ["MEASURES", "measure"]

MEASURES = ("decoder cosine", "activation correlation")


def measure(pair: ModelPair) -> dict[str, pd.DataFrame]:
    """Match the control's SAE with the treatment's, relative to other SAEs of the control's model.

    Returns:
        fates_control: The control's features, by each measure (`measure`): the columns of `Fates.control`; `mutual`,
            whether it and its match are each other's nearest; `assigned`, its partner in the best one-to-one pairing
            (-1 for none) and `assigned_similarity`; `other_seeds_similarity`, its mean best match in the treatment's
            further SAEs (NaN without any). "absorbed" replaces "gone" where `absorption` finds parents.
        fates_treatment: The same of the treatment's features, without the last.
        fate_counts: `Fates.counts` by measure, with rows for absorbed features.
        fates_null: One row per measure, side and ordered pair (`reference`, `stand_in`) of SAEs of the control's model,
            judged by the rest of them, and for the treatment (`stand_in` its name, `is_null` False): features `tested`,
            `low_p` (p at most alpha), `called` (q at most alpha), `drift`, `reason`. Without other SAEs there is no
            fate.
        absorption: As `absorption` gives it, of the features gone by a measure; `measures` names these.

    Raises `ConfigError`: two SAEs of one name; `ShapeMismatch`: decoders of different width, or logs of different text.
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
