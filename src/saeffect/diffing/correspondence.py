"""Fates by both measures, for the treatment and for every SAE of the control's model that stands in for it.

Two measures are used side by side: the cosine of decoder rows (what a feature writes) and the correlation of
activations on the same text (when it fires). Seeds of the control's model are the null: what matches badly between
them was not moved by fine-tuning. Putting each of them in the treatment's place shows how often that goes wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from torch import Tensor

from saeffect.diffing.absorption import AbsorptionRules, absorption
from saeffect.diffing.coactivity import FiringLog, match_activity
from saeffect.diffing.fates import FateRules, Fates, fates
from saeffect.diffing.matching import NOBODY, Matching, match_decoders
from saeffect.diffing.matching_graph import assign
from saeffect.errors import ConfigError
from saeffect.io import SILENT, Log
from saeffect.stats.arguments import Resampling

__all__ = ["MEASURES", "Correspondence", "Keep", "SaeView", "correspond"]

MEASURES = ("decoder cosine", "activation correlation")
# What the graph of neighbours is made of: as many each way, so twice as many edges a feature at most.
_NEIGHBOURS = 8


@dataclass(frozen=True, eq=False)
class SaeView:
    """What matching needs of one SAE.

    Attributes:
        name: What to call it.
        W_dec: [d_sae, d_in].
        features: One row a feature in order, with `density` and `decoder_norm`.
        log: Its activations on the text, the same tokens for every SAE; None where only the decoder is known.
    """

    name: str
    W_dec: Tensor
    features: pd.DataFrame
    log: FiringLog | None = None

    @property
    def fires(self) -> np.ndarray:
        """Bool [d_sae]: features that fire on the text."""
        return self.features["density"].to_numpy(dtype=np.float64) > 0


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Which feature became which.

    Attributes:
        control: The control's features, by each measure (`measure`): the columns of `Fates.control`; `mutual`, whether
            it and its match are each other's nearest; `assigned`, its partner in the best one-to-one pairing (-1 for
            none) and `assigned_similarity`; `other_seeds_similarity`, its best match in the treatment's further
            SAEs, on average (NaN without any). The fate "absorbed" stands for "gone" where others speak for it.
        treatment: The same of the treatment's features, without the last.
        counts: `Fates.counts` by measure, with rows for absorbed features.
        null: One row per measure, side and ordered pair (`reference`, `stand_in`) of SAEs of the control's model,
            judged by the rest of them, and for the treatment (`stand_in` its name, `is_null` False): features
            `tested`, `low_p` (p at most alpha), `called` (q at most alpha), `drift`, `reason`.
        absorption: As `absorption` gives it, of the features that were gone by one measure; `measure`s that said so.
    """

    control: pd.DataFrame
    treatment: pd.DataFrame
    counts: pd.DataFrame
    null: pd.DataFrame
    absorption: pd.DataFrame


class Keep(Protocol):
    """Where matchings are kept, so that a stopped comparison need not make them again."""

    def read(self, measure: str, a: str, b: str) -> Matching | None:
        """What was kept for these SAEs, by name; None for nothing."""

    def write(self, measure: str, a: str, b: str, matching: Matching) -> None:
        """Keep it."""


def correspond(
    control: SaeView,
    treatment: SaeView,
    others: Sequence[SaeView],
    *,
    treatment_seeds: Sequence[SaeView] = (),
    rules: FateRules | None = None,
    resampling: Resampling | None = None,
    log: Log = SILENT,
    keep: Keep | None = None,
) -> Correspondence:
    """Match the control's SAE with the treatment's, relative to other SAEs of the control's model.

    Args:
        control: The control's SAE.
        treatment: The treatment's.
        others: SAEs of the control's model from other seeds; without any, no fate is called.
        treatment_seeds: Further SAEs of the treatment's model.
        rules: The defaults if None.
        resampling: Seed and number of resamples.
        log: Receives progress, in pairs of SAEs.
        keep: Where matchings are looked for and kept; nowhere if None.

    Raises:
        ConfigError: Two SAEs of one name.
        ShapeMismatch: Decoders of different width, or logs of different text.
    """
    rules, resampling = rules or FateRules(), resampling or Resampling()
    names = [view.name for view in (control, treatment, *others, *treatment_seeds)]
    if len(set(names)) < len(names):
        raise ConfigError(f"every SAE needs a name of its own. Got {', '.join(names)}.", at="name")
    pieces = []
    for measure in MEASURES:
        usable = [view for view in others if measure == MEASURES[0] or view.log is not None]
        if measure == MEASURES[1] and (control.log is None or treatment.log is None):
            continue
        pairs = _Pairs(measure, 1 + len(usable) + len(usable) * (len(usable) + 1) // 2, log, keep)
        found = _fates_of(pairs, control, treatment, usable, rules, resampling)
        pieces.append(_measured(pairs, control, treatment, treatment_seeds, found))
        pieces[-1]["null"] = _nulls(pairs, [control, *usable], (control, treatment, found), rules, resampling)
    tables = {name: pd.concat([piece[name] for piece in pieces], ignore_index=True) for name in pieces[0]}
    absorbed = _absorbed(tables["control"], control, treatment, resampling.seed, log)
    return Correspondence(
        _relabelled(tables["control"], absorbed),
        tables["treatment"],
        _recounted(tables["counts"], tables["control"], absorbed),
        tables["null"],
        absorbed,
    )


class _Pairs:
    """Matchings between SAEs by one measure, each made once and read either way."""

    def __init__(self, measure: str, total: int, log: Log, keep: Keep | None) -> None:
        self.measure = measure
        self._kept: dict[tuple[str, str], Matching] = {}
        self._total, self._log, self._keep = total, log, keep

    def of(self, a: SaeView, b: SaeView) -> Matching:
        if (b.name, a.name) in self._kept:
            return self._kept[b.name, a.name].reversed()
        if (a.name, b.name) not in self._kept:
            self._kept[a.name, b.name] = self._made(a, b)
            done = len(self._kept)
            self._log.progress(f"match {self.measure}", done, max(done, self._total), "pairs")
        return self._kept[a.name, b.name]

    def _made(self, a: SaeView, b: SaeView) -> Matching:
        found = None if self._keep is None else self._keep.read(self.measure, a.name, b.name)
        if found is None:
            found = self._matched(a, b)
            if self._keep is not None:
                self._keep.write(self.measure, a.name, b.name, found)
        return found

    def _matched(self, a: SaeView, b: SaeView) -> Matching:
        if self.measure == MEASURES[0]:
            return match_decoders(a.W_dec, b.W_dec, n=_NEIGHBOURS, use_a=a.fires, use_b=b.fires)
        if a.log is None or b.log is None:
            raise ConfigError("to correlate activations, both SAEs' are needed.", at="log")
        return match_activity(a.log, b.log, n=_NEIGHBOURS)


def _fates_of(
    pairs: _Pairs,
    reference: SaeView,
    stand_in: SaeView,
    rest: Sequence[SaeView],
    rules: FateRules,
    resampling: Resampling,
) -> Fates:
    return fates(
        pairs.of(reference, stand_in),
        [pairs.of(reference, one) for one in rest],
        control_features=reference.features,
        treatment_features=stand_in.features,
        placebo_features=[one.features for one in rest],
        rules=rules,
        resampling=resampling,
    )


def _measured(
    pairs: _Pairs, control: SaeView, treatment: SaeView, treatment_seeds: Sequence[SaeView], found: Fates
) -> dict[str, pd.DataFrame]:
    """The tables of one measure, with mutual neighbours and the best pairing."""
    matching = pairs.of(control, treatment)
    paired = assign(matching)
    usable = [view for view in treatment_seeds if pairs.measure == MEASURES[0] or view.log is not None]
    best = np.array([_best(pairs.of(control, view)) for view in usable])
    control_table = found.control.assign(
        mutual=_mutual(matching.forward.match, matching.backward.match),
        assigned=paired.b_of_a,
        assigned_similarity=paired.similarity,
        other_seeds_similarity=best.mean(axis=0) if usable else np.nan,
    )
    backward = np.full(matching.n_b, np.nan)
    partners = paired.a_of_b
    backward[partners != NOBODY] = paired.similarity[partners[partners != NOBODY]]
    treatment_table = found.treatment.assign(
        mutual=_mutual(matching.backward.match, matching.forward.match),
        assigned=partners,
        assigned_similarity=backward,
    )
    tables = {"control": control_table, "treatment": treatment_table, "counts": found.counts}
    return {name: _labelled(table, pairs.measure) for name, table in tables.items()}


def _best(matching: Matching) -> np.ndarray:
    """Similarity of each feature's nearest; to correlate with nobody is to be at 0."""
    alone = matching.forward.alone & (matching.measure == MEASURES[1])
    return np.where(alone, 0.0, matching.forward.best)


def _labelled(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    table = table.copy()
    table.insert(0, "measure", pd.Series([measure] * len(table), dtype="str"))
    return table


def _mutual(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    found = there != NOBODY
    mutual = np.zeros(len(there), dtype=bool)
    mutual[found] = back[there[found]] == np.flatnonzero(found)
    return mutual


def _nulls(
    pairs: _Pairs,
    saes: Sequence[SaeView],
    real: tuple[SaeView, SaeView, Fates],
    rules: FateRules,
    resampling: Resampling,
) -> pd.DataFrame:
    """Calls for every ordered pair of SAEs of the control's model, beside the treatment's."""
    rows = [*_calls(pairs.measure, real[0].name, real[1].name, real[2], rules, is_null=False)]
    for reference in saes:
        for stand_in in saes:
            rest = [one for one in saes if one is not reference and one is not stand_in]
            if stand_in is reference or not rest:
                continue
            found = _fates_of(pairs, reference, stand_in, rest, rules, resampling)
            rows += _calls(pairs.measure, reference.name, stand_in.name, found, rules, is_null=True)
    return pd.DataFrame(rows)


def _calls(
    measure: str, reference: str, stand_in: str, found: Fates, rules: FateRules, *, is_null: bool
) -> Iterator[dict[str, object]]:
    for side, table in (("control", found.control), ("treatment", found.treatment)):
        tested = table["p"].notna()
        reasons = table.loc[~tested, "reason"]
        yield {
            "measure": measure,
            "side": side,
            "reference": reference,
            "stand_in": stand_in,
            "is_null": is_null,
            "tested": int(tested.sum()),
            "low_p": int((table["p"] <= rules.alpha).sum()),
            "called": int((table["q"] <= rules.alpha).sum()),
            "drift": found.drift,
            "reason": "" if tested.any() or reasons.empty else str(reasons.mode().iloc[0]),
        }


def _absorbed(control_table: pd.DataFrame, control: SaeView, treatment: SaeView, seed: int, log: Log) -> pd.DataFrame:
    gone = control_table[control_table["fate"] == "gone"]
    measures = gone.groupby("feature")["measure"].agg(" and ".join)
    if control.log is None or treatment.log is None:
        columns = ["feature", "measures", "absorbed", "absorbed_by", "cosine", "recall", "reason"]
        return pd.DataFrame(columns=columns).astype({"feature": "int64", "absorbed": "bool"})
    if len(measures):
        log(f"  looking for parents of {len(measures)} features without a counterpart")
    found = absorption(
        measures.index.to_numpy(dtype=np.int64),
        control=control.log,
        treatment=treatment.log,
        W_dec_control=control.W_dec,
        W_dec_treatment=treatment.W_dec,
        rules=AbsorptionRules(seed=seed),
    )
    found.insert(1, "measures", pd.Series(measures.to_list(), dtype="str"))
    return found


def _relabelled(control_table: pd.DataFrame, absorbed: pd.DataFrame) -> pd.DataFrame:
    spoken_for = set(absorbed.loc[absorbed["absorbed"], "feature"])
    is_absorbed = (control_table["fate"] == "gone") & control_table["feature"].isin(spoken_for)
    return control_table.assign(fate=control_table["fate"].mask(is_absorbed, "absorbed"))


def _recounted(counts: pd.DataFrame, control_table: pd.DataFrame, absorbed: pd.DataFrame) -> pd.DataFrame:
    """A row for absorbed features behind the one of the gone, which are fewer by as many."""
    fate = _relabelled(control_table, absorbed)
    frames = []
    for measure, group in counts.groupby("measure", sort=False):
        rows = group.copy()
        n = int(((fate["measure"] == measure) & (fate["fate"] == "absorbed")).sum())
        gone = (rows["side"] == "control") & (rows["fate"] == "gone")
        rows.loc[gone, "called"] -= n
        nothing = dict.fromkeys(("n_treatment", "n_placebo", "excess", "low", "high"), np.nan)
        known = bool(rows.loc[gone, "called"].notna().all())
        row = {
            **rows[gone].iloc[0].to_dict(),
            "fate": "absorbed",
            "called": float(n) if known else np.nan,
            **nothing,
            "reason": "only features that are called gone are looked at, so there is no count by similarity alone",
        }
        frames += [rows[rows["side"] == "control"], pd.DataFrame([row]), rows[rows["side"] != "control"]]
    return pd.concat(frames, ignore_index=True)[list(counts.columns)]
