"""What changed, by name: groups of features that changed more than in null fine-tunes, if there are any.

Each trace gives every feature a change on four bases: how much it fires on the same text (`read`), on what each model
writes (`written`), how much more its top tokens are expected (`expected`), and the mean activation difference along its
direction (`difference`). A change is measured in units of its spread over null fine-tunes of the same recipe. Groups of
features are fixed beforehand, by the decoder and by coactivation in the base model; the p of each group counts the
search over all of them. Bases are combined by summing. The sum is compared with the same sum in the
nulls, so p holds however bases depend on each other (nonparametric combination, Pesarin & Salmaso 2010).

Do other SAEs of a study agree? Nulls keep the mean activation difference, so it can be projected on the features of any
SAE at the same hook. An SAE trained on the base model alone gives one more test against the nulls. One trained with the
fine-tuned model does not: its features were fitted to this fine-tune, and nulls have no such SAE. Its result is
reported without a p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import stdtr

from saeffect.diffing.matching import unit_rows
from saeffect.diffing.standardised import (
    BASES,
    FEWEST_NULLS,
    FEWEST_TOKENS,
    SIZES,
    Basis,
    GroupTests,
    among_nulls,
    difference_along,
    differences_among_nulls,
    group_tests,
)
from saeffect.diffing.trace import Trace
from saeffect.stats.arguments import FloatArray, IntArray
from saeffect.stats.multiplicity import benjamini_hochberg, simes

__all__ = ["ALL", "SEEN", "FurtherSae", "further_evidence", "name_changes"]


ALL = "all"
"""The basis of the row that combines all others."""
SEEN = "seen, not tested: trained with the fine-tuned model, and nulls have no SAE of their own"
_N_GROUPS = 40  # groups in the table
_TOO_RARE = f"fires on fewer than {FEWEST_TOKENS} tokens in every model"


def name_changes(
    trace: Trace,
    nulls: Sequence[Trace],
    basis: Basis,
    *,
    declared: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    alpha: float = 0.05,
    measured: Sequence[Mapping[str, FloatArray]] | None = None,
) -> dict[str, pd.DataFrame]:
    """Which features, and which groups of them, changed more than in the nulls.

    `declared` groups were chosen before, bool [d_sae] by name, and are tested without a search. `measured` is
    `among_nulls` of all traces, where it is known already.

    Returns:
        changes: A row a feature and basis (`BASES`, "combined"): feature, basis, base, tuned (means there; NaN for
            "difference" and "combined"), change (their difference), z (see `among_nulls`), reason.
        change_groups: The highest groups that do not overlap: group (from 1), name (its tokens), features, n_features,
            direction ("more" or "less"), score, p (counts the search over all groups), q, share (of all change of mean
            activation on the text, in these features), claimed (p at most alpha), reason.
        declared_changes: A row a declared group and basis: name, basis, n_features, z (mean over its features),
            null_low, null_high (range of the nulls'), p (two-sided), reason.
        evidence: A row a group or declared group, and basis: see `_evidence_row`.
        null_groups: A row a null: null, highest (score of any group), kl.
        change_numbers: A row a number of `Trace.numbers`: name ("kl", or "perplexity" and the source of text), base,
            tuned (NaN for kl), change (of the logarithm), null_low, null_high, p (two-sided), reason.
    """
    changes = _changes_by_basis(trace, basis)
    declared = declared or {}
    if len(nulls) < FEWEST_NULLS:
        n = f"{len(nulls)} null fine-tune{'' if len(nulls) == 1 else 's'}"
        reason = f"{n}; {FEWEST_NULLS} or more are needed to say what is usual"
        return {
            "changes": changes.assign(z=np.nan, reason=reason),
            "change_groups": _empty_table(_GROUP_COLUMNS),
            "declared_changes": _declared_table(declared, {}, [], reason),
            "evidence": _empty_table(_EVIDENCE_COLUMNS),
            "null_groups": _empty_table(_NULL_COLUMNS),
            "change_numbers": _number_changes(trace, [], reason),
        }
    z, *others = measured if measured is not None else among_nulls([trace, *nulls], basis.top_tokens, basis.directions)
    changes["z"] = np.concatenate([z[name] for name in (*BASES, "combined")])
    by_basis = {
        name: group_tests(np.nan_to_num(z[name]), np.nan_to_num([other[name] for other in others]), basis)
        for name in ("combined", *BASES)
    }
    tests = by_basis["combined"]
    groups = _top_groups(trace, tests, z["combined"], basis, alpha)
    declared_changes = _declared_table(declared, z, others, "")
    null_rows = {"null": [n.name for n in nulls], "highest": tests.highest, "kl": [n.numbers["kl"] for n in nulls]}
    return {
        "changes": changes.assign(reason=np.where(changes["z"].isna(), _TOO_RARE, "")),
        "change_groups": groups,
        "declared_changes": declared_changes,
        "evidence": _evidence_table(groups, by_basis, declared_changes, basis, alpha),
        "null_groups": pd.DataFrame(null_rows),
        "change_numbers": _number_changes(trace, nulls, ""),
    }


def _declared_table(
    declared: Mapping[str, npt.NDArray[np.bool_]],
    z: Mapping[str, FloatArray],
    null_z: Sequence[Mapping[str, FloatArray]],
    reason_for_all: str,
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for name, members in declared.items():
        for basis in ("combined", *BASES):
            row: dict[str, Any] = {"name": name, "basis": basis, "n_features": int(members.sum())}
            reason = reason_for_all or ("" if members.any() else "no feature is of this group")
            judged = np.zeros_like(members) if reason else members & np.isfinite(z[basis])
            reason = reason or ("" if judged.any() else f"every feature {_TOO_RARE}")
            row["z"] = math.nan if reason else float(z[basis][judged].mean())
            null_means = [float(null[basis][judged].mean()) for null in null_z if not reason]
            rows.append(row | _compare_with_nulls(row["z"], null_means, reason))
    return pd.DataFrame(rows, columns=list(_DECLARED_COLUMNS))


def _number_changes(trace: Trace, nulls: Sequence[Trace], reason: str) -> pd.DataFrame:
    def change(numbers: Mapping[str, float], source: str | None) -> float:
        if source is None:
            return math.log(max(numbers["kl"], 1e-12))
        return numbers[f"loss_tuned{source}"] - numbers[f"loss_base{source}"]

    rows = []
    for source in (None, *(key.removeprefix("loss_base") for key in trace.numbers if key.startswith("loss_base"))):
        row: dict[str, Any] = {"name": "kl" if source is None else f"perplexity{source.replace('_', ' ')}"}
        for model in ("base", "tuned"):
            row[model] = math.nan if source is None else math.exp(trace.numbers[f"loss_{model}{source}"])
        row |= {"change": change(trace.numbers, source)}
        null_changes = [change(null.numbers, source) for null in nulls]
        rows.append(row | _compare_with_nulls(row["change"], null_changes, reason))
    return pd.DataFrame(rows)


def _compare_with_nulls(value: float, nulls: Sequence[float], reason: str = "") -> dict[str, Any]:
    """null_low, null_high, p, reason: the range of the nulls' numbers, and the two-sided p of one more null, by
    Student's t; NaN if there is a `reason`.
    """
    low = high = p = math.nan
    if not reason:
        null = np.array(nulls)
        low, high = float(null.min()), float(null.max())
        t = (value - float(null.mean())) / max(float(null.std(ddof=1)) * math.sqrt(1 + 1 / len(null)), 1e-12)
        p = 2 * float(stdtr(len(null) - 1, -abs(t)))
    return {"null_low": low, "null_high": high, "p": p, "reason": reason}


def _changes_by_basis(trace: Trace, basis: Basis) -> pd.DataFrame:
    expected = trace.expected.astype(np.float64)[:, basis.top_tokens].mean(axis=2)
    means = {"read": trace.read[:2], "written": trace.written[:2], "expected": expected}
    n = len(basis.W_dec)
    undefined = np.full((2, n), np.nan)
    parts = []
    for name in (*BASES, "combined"):
        base, tuned = means.get(name, undefined)
        parts.append(pd.DataFrame({"feature": np.arange(n), "basis": name, "base": base, "tuned": tuned}))
    table = pd.concat(parts, ignore_index=True)
    table["change"] = table["tuned"] - table["base"]
    table.loc[table["basis"] == "difference", "change"] = difference_along(trace, basis.directions)
    return table


def _evidence_table(
    groups: pd.DataFrame, tests: Mapping[str, GroupTests], declared: pd.DataFrame, basis: Basis, alpha: float
) -> pd.DataFrame:
    sizes = [min(size, basis.neighbours.shape[1]) for size in SIZES]
    rows = []
    for group in groups.to_dict("records"):
        cell = sizes.index(group["n_features"]), group["features"][0]
        for name, group_test in tests.items():
            score = float(group_test.scores[cell])
            same_sign = np.sign(score) == np.sign(group["score"])
            rows.append(_evidence_row("group", group["name"], name, score, group_test.p(abs(score)), same_sign, alpha))
            rows[-1]["group"] = group["group"]
    combined_z = {row["name"]: row["z"] for row in declared.to_dict("records") if row["basis"] == "combined"}
    for row in declared.to_dict("records"):
        same_sign = np.sign(row["z"]) == np.sign(combined_z[row["name"]])
        rows.append(_evidence_row("vocabulary", row["name"], row["basis"], row["z"], row["p"], same_sign, alpha))
        rows[-1]["reason"] = row["reason"]
    return pd.DataFrame(rows, columns=list(_EVIDENCE_COLUMNS)).astype({"group": "Int64"})


def _evidence_row(
    kind: str, name: str, basis: str, score: float, p: float, same: bool | np.bool_, alpha: float
) -> dict[str, Any]:
    """A row of `evidence`: kind ("group", "vocabulary"), name, group (its number), basis, score (of a group as in
    change_groups, else z), p (of a group counts the search on this basis), agrees (p at most alpha, and the `same`
    direction as all bases together), reason (why p is NaN).
    """
    row = {"kind": kind, "name": name, "group": None, "basis": basis, "score": score, "p": p}
    return row | {"agrees": bool(same and p <= alpha), "reason": ""}


def _top_groups(trace: Trace, tests: GroupTests, z: FloatArray, basis: Basis, alpha: float) -> pd.DataFrame:
    abs_change = np.abs(trace.read[1].astype(np.float64) - trace.read[0])
    listed = np.zeros(len(z), dtype=bool)
    rows: list[dict[str, Any]] = []
    for flat in np.argsort(-np.abs(tests.scores), axis=None, kind="stable"):
        size, first = divmod(int(flat), tests.scores.shape[1])
        members = basis.neighbours[first, : SIZES[size]]
        if listed[members].any():  # its score would count a listed change again
            continue
        listed[members] = True
        score = float(tests.scores[size, first])
        tokens = _group_tokens(members, z * np.sign(score), basis)
        p = tests.p(abs(score))
        rows.append(
            {
                "group": len(rows) + 1,
                "name": ", ".join(sorted(tokens, key=lambda word: len(word) < 3 or not word.isalpha())[:3]),
                "tokens": tokens,
                "features": members.tolist(),
                "n_features": len(members),
                "direction": "more" if score > 0 else "less",
                "score": score,
                "p": p,
                "share": float(abs_change[members].sum() / abs_change.sum()) if abs_change.sum() > 0 else math.nan,
                "claimed": p <= alpha,
                "reason": "" if p <= alpha else "null fine-tunes reach as much",
            }
        )
        if len(rows) == _N_GROUPS:
            break
    table = pd.DataFrame(rows)
    table.insert(list(table).index("p") + 1, "q", benjamini_hochberg(table["p"].to_numpy()))
    return table


def _group_tokens(members: IntArray, z: FloatArray, basis: Basis) -> list[str]:
    """Ten words for a group: its members' top tokens, weighted by z² of the member and by rank, without those that
    only go on with a word, unless there are no others.
    """
    weight = np.clip(z[members], 0.0, None) ** 2
    votes: dict[str, float] = {}
    for feature, feature_weight in zip(members, weight, strict=True):
        for rank, token in enumerate(basis.top_tokens[feature]):
            word = basis.strings[token].strip().lower()
            votes[word] = votes.get(word, 0.0) + float(feature_weight) / (rank + 1)
    words = sorted((word for word in votes if word), key=lambda word: -votes[word])
    return ([word for word in words if basis.stands_alone(word)] or words)[:10]


@dataclass(frozen=True, eq=False)
class FurtherSae:
    """Decoder rows [d_sae, d_in] at the hook of the traces, and which features are of each vocabulary, bool [d_sae].

    Attributes:
        base_alone: Whether it was trained on the base model alone.
    """

    name: str
    W_dec: npt.NDArray[np.float32]
    members: Mapping[str, npt.NDArray[np.bool_]]
    base_alone: bool


def further_evidence(
    evidence: pd.DataFrame, saes: Sequence[FurtherSae], trace: Trace, nulls: Sequence[Trace], alpha: float
) -> pd.DataFrame:
    """The table `evidence` of `name_changes`, with rows of kind "vocabulary" added for further SAEs and for `ALL`.

    For an SAE the basis is "difference in <name>": score and p are as those of "difference", on its own features. `ALL`
    combines the p of "combined" and of all tested further SAEs by `simes`; its score is NaN.
    """
    rows = []
    combined_rows = evidence[(evidence["kind"] == "vocabulary") & (evidence["basis"] == "combined")]
    for combined in combined_rows.to_dict("records"):
        name, p = combined["name"], [combined["p"]]
        for sae in saes:
            score, sae_p, reason = _test_further_sae(sae, name, [trace, *nulls])
            same_sign = np.sign(score) == np.sign(combined["score"])
            row = _evidence_row("vocabulary", name, f"difference in {sae.name}", score, sae_p, same_sign, alpha)
            rows.append(row | {"reason": reason})
            p.append(sae_p if same_sign or math.isnan(sae_p) else 1.0)
        rows.append(_evidence_row("vocabulary", name, ALL, math.nan, simes(p), True, alpha))
    if not rows:
        return evidence
    return pd.concat([evidence, pd.DataFrame(rows).astype({"group": "Int64"})], ignore_index=True)


def _test_further_sae(sae: FurtherSae, vocabulary: str, traces: Sequence[Trace]) -> tuple[float, float, str]:
    """Score, p and reason."""
    members = sae.members[vocabulary]
    if not members.any():
        return math.nan, math.nan, "no feature is of this group"
    z = differences_among_nulls(traces, unit_rows(sae.W_dec.astype(np.float64)))
    score, *null_scores = z[:, members].mean(axis=1)
    if not np.any(z):
        return math.nan, math.nan, "the mean activation does not differ"
    if not sae.base_alone:
        return float(score), math.nan, SEEN
    return float(score), _compare_with_nulls(score, null_scores)["p"], ""


_GROUP_COLUMNS: Mapping[str, Any] = {
    **{"group": "int64", "name": "str", "tokens": object, "features": object, "n_features": "int64"},
    **{"direction": "str", "score": float, "p": float, "q": float, "share": float, "claimed": bool, "reason": "str"},
}
_DECLARED_COLUMNS = ("name", "basis", "n_features", "z", "null_low", "null_high", "p", "reason")
_EVIDENCE_COLUMNS: Mapping[str, Any] = {
    **{"kind": "str", "name": "str", "group": "Int64", "basis": "str", "score": float, "p": float},
    **{"agrees": bool, "reason": "str"},
}
_NULL_COLUMNS: Mapping[str, Any] = {"null": "str", "highest": float, "kl": float}


def _empty_table(columns: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in columns.items()})
