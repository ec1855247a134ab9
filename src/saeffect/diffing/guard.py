"""Has a fine-tune kept its budget? Each rule for a group of features is judged against fine-tunes that taught nothing.

A group's score is fixed beforehand. Each basis (`read`, `written`, `expected`) gives one number: the mean over the
group of its features' (or words') changes, each in units of how much features of like activity change in nulls. The
score is the sum of the three, each divided by its standard deviation over the nulls. Adding one constant to a feature's
change in every fine-tune changes nothing: what all of them do to a group cancels.

With `MANY_NULLS` or more, p is Student's for one more value among the nulls' scores (assumption: a group's score is
normal over nulls; the rank of the fine-tune among them stands beside it). With fewer, p is that rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from saeffect.diffing.budget import ALL_TEXT, Budget, GroupRule
from saeffect.diffing.trace import Trace
from saeffect.errors import IncompatibleModels, unknown_name
from saeffect.stats.arguments import FloatArray, IntArray
from saeffect.stats.multiplicity import holm
from saeffect.stats.student import cautious_difference

__all__ = ["BASES", "MANY_NULLS", "Group", "Rows", "Verdict", "judge"]

BASES = ("read", "written", "expected")
MANY_NULLS = 10
"""Nulls from which a parametric tail is used."""

Status = Literal["kept", "broken", "unjudged", "reported"]
_NEIGHBOURS = 256  # features of like activity that share a scale
# Added to activations and probabilities: below this a ratio is noise.
_FLOORS = {"read": 1e-3, "written": 1e-3, "expected": 1e-7}


@dataclass(frozen=True)
class Group:
    """Features of the SAE and ids of tokens that a rule is about; either may be empty."""

    features: IntArray
    tokens: IntArray


@dataclass(frozen=True)
class Rows:
    """Which source each row of the text is from: int64 [n_rows], index into names."""

    sources: npt.NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """One rule, judged.

    Attributes:
        rule: Its name, such as "group medical" or "kl general".
        allowed: What the budget says of it, in words.
        status: "reported": the budget allows everything. "unjudged": it could not be judged, and `reason` says why.
        value: Of a group, by what factor it changed beyond the median null, in the basis where it changed most; of a
            limit, the KL in nats or the ratio of perplexities.
        limit: Of a limit, the largest value; of a group, the smallest factor that matters.
        score: Of a group, in standard deviations of the nulls; NaN for limits.
        p: Of a group, before correction: how likely one more null would be as far off.
        p_corrected: The same after Holm's correction over the budget's rules.
        rank: Nulls that lie as far from the nulls' mean, plus one, over their number plus one: free of assumptions.
        level: At which p_corrected breaks the rule; NaN for limits.
        nulls: How many nulls it was judged against.
        nulls_broken: How many of these break the rule, each judged by the others (limits: that exceed the limit).
        members: Features of the group.
        reason: What went into the verdict, or why there is none.
    """

    rule: str
    allowed: str
    status: Status
    value: float = math.nan
    limit: float = math.nan
    score: float = math.nan
    p: float = math.nan
    p_corrected: float = math.nan
    rank: float = math.nan
    level: float = math.nan
    nulls: int = 0
    nulls_broken: int = 0
    members: int = 0
    reason: str = ""


def judge(
    budget: Budget, groups: Mapping[str, Group], trace: Trace, nulls: Sequence[Trace], rows: Rows
) -> list[Verdict]:
    """Every rule of a budget, groups first.

    Args:
        groups: The features and tokens behind each of `budget.groups`.
        trace: Of the fine-tune.
        nulls: Of fine-tunes that taught nothing; may be empty.
        rows: The sources of the text's rows.

    Raises:
        IncompatibleModels: A null was measured with another base model, SAE, hook or text.
        UnknownName: A limit on a text that there is not.
    """
    for null in nulls:
        if null.made_by != trace.made_by:
            raise IncompatibleModels(
                f"the null {null.name!r} was measured with another base model, SAE, hook or text, or with other rows of"
                " it, so the fine-tune cannot be compared with it.",
                at="nulls",
                fix="give the base model, SAE and text that the nulls were made with, or make nulls for these.",
            )
    found = _judge_groups(budget, groups, trace, nulls)
    if len(nulls) > 2:
        broken = {name: 0 for name in budget.groups}
        for k, null in enumerate(nulls):
            others = [*nulls[:k], *nulls[k + 1 :]]
            for name, verdict in zip(budget.groups, _judge_groups(budget, groups, null, others), strict=True):
                broken[name] += verdict.status == "broken"
        found = [replace(v, nulls_broken=n) for v, n in zip(found, broken.values(), strict=True)]
    return found + _judge_limits(budget, trace, nulls, rows)


def _judge_groups(
    budget: Budget, groups: Mapping[str, Group], trace: Trace, nulls: Sequence[Trace]
) -> list[Verdict]:
    scored = _Scores(trace, nulls)
    first = [_score(name, rule, groups[name], scored) for name, rule in budget.groups.items()]
    # What is only reported is no test; what cannot be judged has no p.
    tested = [math.nan if rule.may == "either" else v.p for rule, v in zip(budget.groups.values(), first, strict=True)]
    n_tested = sum(math.isfinite(p) for p in tested)
    verdicts = []
    for rule, verdict, corrected in zip(budget.groups.values(), first, holm(tested), strict=True):
        level = budget.alpha if rule.within_nulls is None else 1 - rule.within_nulls
        least = _least_p(len(nulls)) * n_tested
        if verdict.status == "unjudged" or rule.may == "either":
            verdicts.append(replace(verdict, level=level))
        elif least > level:
            short = f"with {len(nulls)} nulls and {n_tested} rules no p is below {min(least, 1):.2g}, and {level:g} is asked"
            verdicts.append(replace(verdict, status="unjudged", reason=f"{short}; give more nulls"))
        else:
            credited = corrected <= level and _matters(rule, verdict)
            status: Status = "broken" if credited and _forbidden(rule, verdict.score) else "kept"
            verdicts.append(replace(verdict, status=status, p_corrected=float(corrected), level=level))
    return verdicts


def _least_p(n_nulls: int) -> float:
    """The smallest p that so many nulls can give."""
    return 0.0 if n_nulls >= MANY_NULLS else 1 / (n_nulls + 1)


def _forbidden(rule: GroupRule, score: float) -> bool:
    return rule.may != ("rise" if score > 0 else "fall")


def _matters(rule: GroupRule, verdict: Verdict) -> bool:
    """Whether the change is large enough for the user; with no smallest change any credited one is."""
    factor = verdict.value if verdict.score > 0 else 1 / verdict.value
    return rule.at_least == 1 or factor >= rule.at_least


def _score(name: str, rule: GroupRule, group: Group, scored: _Scores) -> Verdict:
    """A verdict with score and p, "reported" for now; "unjudged" where there is no p."""
    allowed = {
        "rise": "may rise, not fall",
        "fall": "may fall, not rise",
        "either": "may do either",
        "neither": "may neither rise nor fall",
    }[rule.may]
    if rule.at_least > 1:
        allowed += f" by a factor of {rule.at_least:g}"
    head = Verdict(
        f"group {name}", allowed, "unjudged", limit=rule.at_least, nulls=scored.n_nulls, members=len(group.features)
    )
    if scored.n_nulls < 2:
        why = "one null shows no spread" if scored.n_nulls else "without nulls it cannot be told from what any does"
        return replace(head, reason=f"cannot be judged: {why}")
    score, others = scored.of(group)
    test = cautious_difference(others, [score])
    spread = float(np.std(others, ddof=1))
    if not spread > 0 or not math.isfinite(score):
        return replace(head, reason="the group is silent, in the base model and in the fine-tuned ones")
    rank = scored.rank(score, others)
    basis, factor = scored.factor(group, rises=test.value > 0)
    p = test.p if scored.n_nulls >= MANY_NULLS else rank
    said = {"read": "reading the text", "written": "in what it writes", "expected": "as words it expects"}[basis]
    return replace(
        head,
        status="reported",
        value=factor,
        score=test.value / spread,
        p=p,
        rank=rank,
        reason=f"{factor:.2f} times the median null, {said}",
    )


class _Scores:
    """The scores of groups, for one fine-tune among nulls."""

    def __init__(self, trace: Trace, nulls: Sequence[Trace]) -> None:
        self._traces = [trace, *nulls]
        self.n_nulls = len(nulls)
        self._levels: dict[str, FloatArray] = {}
        self._changes: dict[str, FloatArray] = {}
        for basis in BASES:
            levels = np.stack([getattr(t, basis)[:2] for t in self._traces]).astype(np.float64)
            if levels.shape[2] == 0:  # without an SAE
                continue
            self._levels[basis] = levels
            changes = np.log((levels[:, 1] + _FLOORS[basis]) / (levels[:, 0] + _FLOORS[basis]))
            if self.n_nulls > 1:
                changes = changes / _pooled_scale(changes[1:], levels[0, 0])
            self._changes[basis] = changes

    def of(self, group: Group) -> tuple[float, FloatArray]:
        """The score of the fine-tune, and of the nulls, float64 [n_nulls]."""
        total = np.zeros(len(self._traces))
        for basis, changes in self._changes.items():
            members = group.tokens if basis == "expected" else group.features
            if len(members):
                means = changes[:, members].mean(axis=1)
                spread = float(np.std(means[1:], ddof=1))
                total += means / spread if spread > 0 else 0.0
        return float(total[0]), total[1:]

    @staticmethod
    def rank(score: float, others: FloatArray) -> float:
        """Two-sided: every one of the fine-tune and the nulls is held against the mean of all of them."""
        everyone = np.array([score, *others])
        far = np.abs(everyone - everyone.mean())
        return float((far >= far[0] * (1 - 1e-12)).mean())

    def factor(self, group: Group, *, rises: bool) -> tuple[str, float]:
        """The basis in which the group as a whole changed most in this direction, and by what factor beyond nulls."""
        found = {}
        for basis, levels in self._levels.items():
            members = group.tokens if basis == "expected" else group.features
            if len(members):
                sums = levels[:, :, members].sum(axis=2)
                ratios = np.log((sums[:, 1] + _FLOORS[basis]) / (sums[:, 0] + _FLOORS[basis]))
                found[basis] = float(ratios[0] - np.median(ratios[1:]))
        basis = max(found, key=lambda name: found[name] if rises else -found[name])
        return basis, math.exp(found[basis])


def _pooled_scale(changes: FloatArray, activity: FloatArray) -> FloatArray:
    """How much features of like activity change in nulls: [n] from changes [n_nulls, n] and activity [n].

    The standard deviation over nulls of each feature, then its median over the neighbours in order of activity.
    """
    from scipy.ndimage import median_filter

    order = np.argsort(activity, kind="stable")
    own = np.std(changes, axis=0, ddof=1)[order]
    smooth = median_filter(own, size=min(_NEIGHBOURS, len(own)), mode="nearest")
    scale = np.empty_like(own)
    scale[order] = smooth
    return np.maximum(scale, 1e-9)


def _judge_limits(budget: Budget, trace: Trace, nulls: Sequence[Trace], rows: Rows) -> list[Verdict]:
    verdicts = []
    for source, limits in budget.texts.items():
        if source != ALL_TEXT and source not in rows.names:
            raise unknown_name("source of text", source, (*rows.names, ALL_TEXT), at="texts")
        for kind, most in (("kl", limits.kl), ("perplexity_ratio", limits.perplexity_ratio)):
            if most is None:
                continue
            value = _measured(trace, kind, source, rows)
            over = sum(_measured(null, kind, source, rows) > most for null in nulls)
            unit = " nats" if kind == "kl" else ""
            label = f"{kind.replace('_', ' ')} {source}"
            head = Verdict(label, f"at most {most:g}{unit}", "unjudged", value, most, nulls=len(nulls), nulls_broken=over)
            if not math.isfinite(value):
                verdicts.append(replace(head, reason=f"no token of {source!r} counts"))
            else:
                status: Status = "broken" if value > most else "kept"
                said = "measured on this text as it is" if nulls else "measured on this text as it is; no nulls beside it"
                verdicts.append(replace(head, status=status, reason=said))
    return verdicts


def _measured(trace: Trace, kind: str, source: str, rows: Rows) -> float:
    if kind == "kl":
        mine = trace.kl if source == ALL_TEXT else trace.kl[rows.sources == rows.names.index(source)]
        return float(np.nanmean(mine)) if np.isfinite(mine).any() else math.nan
    end = "" if source == ALL_TEXT else f"_{source}"
    losses = [trace.numbers.get(f"loss_{which}{end}", math.nan) for which in ("tuned", "base")]
    return math.exp(losses[0] - losses[1])
