"""Has a fine-tune kept its budget? Each rule for a group of features is judged against fine-tunes that taught nothing.

A group's score is fixed beforehand: the mean over its features of the combined standardised change of
`saeffect.diffing.standardised.among_nulls`, for the fine-tune among the nulls, and for each null among the others.
Without an SAE it is the mean logarithm of how much more its words are expected. With `MANY_NULLS` or more, p is
Student's for one more value among the nulls' scores (assumption: a group's score is normal over nulls; the rank of
the fine-tune among them, free of it, stands beside). With fewer, p is that rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from saeffect.diffing.budget import ALL_TEXT, Budget, GroupRule
from saeffect.diffing.standardised import among_nulls
from saeffect.diffing.trace import Trace
from saeffect.errors import unknown_name
from saeffect.stats.arguments import FloatArray, IntArray
from saeffect.stats.multiplicity import holm
from saeffect.stats.student import cautious_difference

__all__ = ["MANY_NULLS", "Group", "Rows", "Verdict", "judge", "refuse_other_texts"]

MANY_NULLS = 10
"""Nulls from which a parametric tail is used."""

Status = Literal["kept", "broken", "unjudged", "reported"]
# Added to sums over a group before a ratio is taken: below these it is noise.
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
        rule, allowed: Its name, such as "group medical" or "kl general", and what the budget says of it, in words.
        status: "reported": the budget allows everything. "unjudged": it could not be judged, and `reason` says why.
        value: Of a group, by what factor it changed beyond the median null, in the basis where it changed most; of a
            limit, the KL in nats or the ratio of perplexities.
        limit: Of a limit, the largest value; of a group, the smallest factor that matters.
        score: Of a group, in standard deviations of the nulls; NaN for limits, as `level`.
        p: Of a group, how likely one more null would be as far off; `p_corrected` after Holm's correction over the
            rules.
        rank: Nulls that lie as far from the nulls' mean, plus one, over their number plus one: free of assumptions.
        level: At which p_corrected breaks the rule.
        nulls, nulls_broken: How many nulls there are, and how many of these break the rule, each judged by the others
            (limits: exceed the limit).
        members: Features of the group.
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
    budget: Budget,
    groups: Mapping[str, Group],
    trace: Trace,
    nulls: Sequence[Trace],
    rows: Rows,
    top_tokens: IntArray | None = None,
) -> list[Verdict]:
    """Every rule of a budget, groups first, for the trace of a fine-tune beside those of nulls (perhaps none).

    `top_tokens`, int64 [d_sae, k], are ids of the tokens that each feature promotes; None without an SAE.
    `BadFile` if a null was measured with something else; `UnknownName` for a limit on a text that there is not.
    """
    refuse_other_texts(budget, rows.names)
    scores = _scores(groups, [trace, *nulls], top_tokens)
    found = _corrected(budget, [_tested(budget, name, groups, [trace, *nulls], scores) for name in budget.groups])
    broken = [0] * len(found)
    for k in range(1, len(nulls) + 1) if len(nulls) > 2 else ():
        others = {name: np.delete(all_of, 0) for name, all_of in scores.items()}
        alone = {name: np.r_[own[k - 1], np.delete(own, k - 1)] for name, own in others.items()}
        traces = [nulls[k - 1], *nulls[: k - 1], *nulls[k:]]
        verdicts = _corrected(budget, [_tested(budget, name, groups, traces, alone) for name in budget.groups])
        broken = [n + (verdict.status == "broken") for n, verdict in zip(broken, verdicts, strict=True)]
    found = [replace(verdict, nulls_broken=n) for verdict, n in zip(found, broken, strict=True)]
    return found + _judge_limits(budget, trace, nulls, rows)


def refuse_other_texts(budget: Budget, names: Sequence[str]) -> None:
    """UnknownName for a limit on a source of text that there is not."""
    for source in budget.texts:
        if source != ALL_TEXT and source not in names:
            raise unknown_name("source of text", source, (*names, ALL_TEXT), at="texts")


def _scores(groups: Mapping[str, Group], traces: Sequence[Trace], top_tokens: IntArray | None) -> dict[str, FloatArray]:
    """By group, float64 [1 + n_nulls]: the score of the fine-tune, and of each null among the others."""
    if len(traces) < 4:  # a null needs two others
        return {name: np.full(len(traces), math.nan) for name in groups}
    if top_tokens is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [np.nan_to_num(np.log(t.expected[1] / t.expected[0]), posinf=0.0, neginf=0.0) for t in traces]
        return {name: np.array([change[group.tokens].mean() for change in logs]) for name, group in groups.items()}
    z = [found["combined"] for found in among_nulls(traces, top_tokens)]
    return {name: np.array([change[group.features].mean() for change in z]) for name, group in groups.items()}


def _corrected(budget: Budget, first: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts on groups, from scores and p."""
    rules = list(budget.groups.values())
    # What is only reported is no test; what cannot be judged has no p.
    tested = [math.nan if rule.may == "either" else v.p for rule, v in zip(rules, first, strict=True)]
    n_tested = sum(math.isfinite(p) for p in tested)
    verdicts = []
    for rule, verdict, corrected in zip(rules, first, holm(tested), strict=True):
        level = budget.alpha if rule.within_nulls is None else 1 - rule.within_nulls
        least = _least_p(verdict.nulls) * n_tested
        if verdict.status == "unjudged" or rule.may == "either":
            verdicts.append(replace(verdict, level=level))
        elif least > level:
            short = f"with {verdict.nulls} nulls and {n_tested} rules no p is below {min(least, 1):.2g}"
            why = f"{short}, and {level:g} is asked; give more nulls"
            verdicts.append(replace(verdict, status="unjudged", level=level, reason=why))
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


_ALLOWED = {
    "rise": "may rise, not fall",
    "fall": "may fall, not rise",
    "either": "may do either",
    "neither": "may neither rise nor fall",
}


def _tested(
    budget: Budget, name: str, groups: Mapping[str, Group], traces: Sequence[Trace], scores: Mapping[str, FloatArray]
) -> Verdict:
    """A verdict with score and p of the first trace among the others: "reported" for now, "unjudged" without a p."""
    rule, group, (own, *others) = budget.groups[name], groups[name], scores[name]
    n = len(others)
    least = f" by a factor of {rule.at_least:g}" if rule.at_least > 1 else ""
    head = Verdict(
        f"group {name}",
        _ALLOWED[rule.may] + least,
        "unjudged",
        limit=rule.at_least,
        nulls=n,
        members=len(group.features),
    )
    if n < 3:
        few = {0: "without nulls it cannot be told from what any fine-tune does", 1: "one null shows no spread"}
        return replace(head, reason=f"cannot be judged: {few.get(n, 'two nulls show too little of their spread')}")
    test, spread = cautious_difference(others, [own]), float(np.std(others, ddof=1))
    if not spread > 0 or not math.isfinite(test.p):
        return replace(head, reason="cannot be judged: the group is silent in all models")
    everyone = np.abs(scores[name] - scores[name].mean())
    rank = float((everyone >= everyone[0] * (1 - 1e-12)).mean())
    basis, factor = _factor(group, traces, rises=test.value > 0)
    said = {"read": "reading the text", "written": "in what it writes", "expected": "as words it expects"}[basis]
    return replace(
        head,
        status="reported",
        value=factor,
        score=test.value / spread,
        p=test.p if n >= MANY_NULLS else rank,
        rank=rank,
        reason=f"{factor:.2f} times the median null, {said}",
    )


def _factor(group: Group, traces: Sequence[Trace], *, rises: bool) -> tuple[str, float]:
    """The basis in which the group as a whole changed most in this direction, and by what factor beyond nulls."""
    found = {}
    for basis, floor in _FLOORS.items():
        members = group.tokens if basis == "expected" else group.features
        if len(members):
            sums = np.stack([getattr(t, basis)[:2, members].sum(axis=1, dtype=np.float64) for t in traces]) + floor
            ratios = np.log(sums[:, 1] / sums[:, 0])
            found[basis] = float(ratios[0] - np.median(ratios[1:]))
    basis = max(found, key=lambda name: found[name] if rises else -found[name])
    return basis, math.exp(found[basis])


def _judge_limits(budget: Budget, trace: Trace, nulls: Sequence[Trace], rows: Rows) -> list[Verdict]:
    verdicts = []
    for source, limits in budget.texts.items():
        for kind, most in (("kl", limits.kl), ("perplexity_ratio", limits.perplexity_ratio)):
            if most is None:
                continue
            value = _measured(trace, kind, source, rows)
            over = sum(_measured(null, kind, source, rows) > most for null in nulls)
            unit = " nats" if kind == "kl" else ""
            label = f"{kind.replace('_', ' ')} {source}"
            head = Verdict(
                label, f"at most {most:g}{unit}", "unjudged", value, most, nulls=len(nulls), nulls_broken=over
            )
            if not math.isfinite(value):
                verdicts.append(replace(head, reason=f"no token of {source!r} counts"))
            else:
                status: Status = "broken" if value > most else "kept"
                verdicts.append(replace(head, status=status, reason="measured on this text as it is"))
    return verdicts


def _measured(trace: Trace, kind: str, source: str, rows: Rows) -> float:
    if kind == "kl":
        mine = trace.kl if source == ALL_TEXT else trace.kl[rows.sources == rows.names.index(source)]
        return float(np.nanmean(mine)) if np.isfinite(mine).any() else math.nan
    end = "" if source == ALL_TEXT else f"_{source}"
    losses = [trace.numbers.get(f"loss_{which}{end}", math.nan) for which in ("tuned", "base")]
    return math.exp(losses[0] - losses[1])
