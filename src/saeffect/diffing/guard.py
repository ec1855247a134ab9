"""Has a fine-tune kept its budget? Each rule for a group of features is judged against null fine-tunes.

A group's score is fixed beforehand: the mean over its features of the combined standardised change of
`saeffect.diffing.standardised.among_nulls`, for the fine-tune among the nulls, and for each null among the others.
Without an SAE it is the mean log ratio of the probabilities of its words. With `MANY_NULLS` or more, p is Student's for
one more value among the nulls' scores; this assumes that a group's score is normal over nulls, so the rank of the
fine-tune among them, which does not, is given too. With fewer nulls, p is that rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from saeffect.diffing.budget import ALL_TEXT, Budget
from saeffect.diffing.standardised import among_nulls
from saeffect.diffing.trace import Trace
from saeffect.errors import unknown_name
from saeffect.stats.arguments import FloatArray, IntArray
from saeffect.stats.multiplicity import holm
from saeffect.stats.student import cautious_difference

__all__ = ["MANY_NULLS", "Group", "Rows", "Verdict", "judge", "check_text_sources"]

MANY_NULLS = 10
"""Nulls from which a parametric tail is used: for the fine-tune, and for each null among the others, one fewer."""

Status = Literal["kept", "broken", "unjudged", "reported"]
# Added to sums over a group before their ratio is taken: smaller sums are noise.
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
        p: Of a group, the probability that one more null is as far off; `p_corrected`: by Holm, over the rules.
        rank: Nulls that lie as far from the nulls' mean, plus one, over their number plus one: free of assumptions.
        level: The largest p_corrected that breaks the rule.
        nulls: How many nulls there are. `nulls_judged`: how many of these could be judged, each by the others with the
            fine-tune's kind of p (limits: have a value); `nulls_broken`: how many of the judged break the rule.
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
    nulls_judged: int = 0
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
    check_text_sources(budget, rows.names)
    scores = _group_scores(groups, [trace, *nulls], top_tokens)
    by_tail = len(nulls) >= MANY_NULLS
    tests = [_test_group(budget, name, groups, [trace, *nulls], scores, by_tail=by_tail) for name in budget.groups]
    verdicts = _decide(budget, tests, by_tail=by_tail)
    of_nulls = []  # by null, its verdicts; Student's t holds for one fewer as well, under the same assumption
    for k in range(1, len(nulls) + 1) if len(nulls) > 2 else ():
        null_scores = {name: np.delete(values, 0) for name, values in scores.items()}
        scores_of_null = {name: np.r_[values[k - 1], np.delete(values, k - 1)] for name, values in null_scores.items()}
        traces = [nulls[k - 1], *nulls[: k - 1], *nulls[k:]]
        tests = [_test_group(budget, name, groups, traces, scores_of_null, by_tail=by_tail) for name in budget.groups]
        of_nulls.append([verdict.status for verdict in _decide(budget, tests, by_tail=by_tail)])
    for i, verdict in enumerate(verdicts):
        counts = Counter(statuses[i] for statuses in of_nulls)
        n_judged = counts["kept"] + counts["broken"]
        verdicts[i] = replace(verdict, nulls_judged=n_judged, nulls_broken=counts["broken"])
    return verdicts + _judge_limits(budget, trace, nulls, rows)


def check_text_sources(budget: Budget, names: Sequence[str]) -> None:
    """UnknownName for a limit on a source of text that there is not."""
    for source in budget.texts:
        if source != ALL_TEXT and source not in names:
            raise unknown_name("source of text", source, (*names, ALL_TEXT), at="texts")


def _group_scores(
    groups: Mapping[str, Group], traces: Sequence[Trace], top_tokens: IntArray | None
) -> dict[str, FloatArray]:
    """By group, float64 [1 + n_nulls]: the score of the fine-tune, and of each null among the others."""
    if len(traces) < 4:  # a null needs two others
        return {name: np.full(len(traces), math.nan) for name in groups}
    if top_tokens is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [np.nan_to_num(np.log(t.expected[1] / t.expected[0]), posinf=0.0, neginf=0.0) for t in traces]
        return {name: np.array([values[group.tokens].mean() for values in logs]) for name, group in groups.items()}
    z = [changes["combined"] for changes in among_nulls(traces, top_tokens)]
    return {name: np.array([values[group.features].mean() for values in z]) for name, group in groups.items()}


def _decide(budget: Budget, tests: Sequence[Verdict], *, by_tail: bool) -> list[Verdict]:
    """The verdicts on groups, from their tests, whose p is Student's (`by_tail`) or a rank."""
    rules = list(budget.groups.values())
    # A rule that allows everything is no test; one that cannot be judged has no p.
    tested = [math.nan if rule.may == "either" else verdict.p for rule, verdict in zip(rules, tests, strict=True)]
    n_tested = sum(math.isfinite(p) for p in tested)
    verdicts = []
    for rule, verdict, corrected in zip(rules, tests, holm(tested), strict=True):
        level = budget.alpha if rule.within_nulls is None else 1 - rule.within_nulls
        min_p = 0.0 if by_tail else n_tested / (verdict.nulls + 1)
        if verdict.status == "unjudged" or rule.may == "either":
            verdicts.append(replace(verdict, level=level))
        elif min_p > level:
            bound = f"with {verdict.nulls} nulls and {n_tested} rules no p is below {min(min_p, 1):.2g}"
            reason = f"{bound}, and {level:g} is asked; give more nulls"
            verdicts.append(replace(verdict, status="unjudged", level=level, reason=reason))
        else:
            direction, factor = ("rise", verdict.value) if verdict.score > 0 else ("fall", 1 / verdict.value)
            is_large = rule.at_least == 1 or factor >= rule.at_least  # 1: no smallest change
            broken = corrected <= level and is_large and rule.may != direction
            status: Status = "broken" if broken else "kept"
            verdicts.append(replace(verdict, status=status, p_corrected=float(corrected), level=level))
    return verdicts


_ALLOWED = {
    "rise": "may rise, not fall",
    "fall": "may fall, not rise",
    "either": "may do either",
    "neither": "may neither rise nor fall",
}


def _test_group(
    budget: Budget,
    name: str,
    groups: Mapping[str, Group],
    traces: Sequence[Trace],
    scores: Mapping[str, FloatArray],
    *,
    by_tail: bool,
) -> Verdict:
    """A verdict with score and p of the first trace; its status is "reported", or "unjudged" without p."""
    rule, group, (score, *others) = budget.groups[name], groups[name], scores[name]
    n = len(others)
    at_least = f" by a factor of {rule.at_least:g}" if rule.at_least > 1 else ""
    beyond = "" if rule.within_nulls is None else f" beyond {100 * rule.within_nulls:g} % of nulls"
    verdict = Verdict(
        f"group {name}",
        _ALLOWED[rule.may] + at_least + beyond,
        "unjudged",
        limit=rule.at_least,
        nulls=n,
        members=len(group.features),
    )
    if n < 3:
        few = ("without nulls it cannot be told from what any fine-tune does", "one null shows no spread")
        return replace(verdict, reason=f"cannot be judged: {(*few, 'two nulls show too little of their spread')[n]}")
    test, spread = cautious_difference(others, [score]), float(np.std(others, ddof=1))
    if not spread > 0 or not math.isfinite(test.p):
        return replace(verdict, reason="cannot be judged: the group is silent in all models")
    distances = np.abs(scores[name] - scores[name].mean())
    rank = float((distances >= distances[0] * (1 - 1e-12)).mean())
    basis, factor = _largest_factor(group, traces, rises=test.value > 0)
    where = {"read": "reading the text", "written": "in what it writes", "expected": "as words it expects"}[basis]
    return replace(
        verdict,
        status="reported",
        value=factor,
        score=test.value / spread,
        p=test.p if by_tail else rank,
        rank=rank,
        reason=f"{factor:.2f} times the median null, {where}",
    )


def _largest_factor(group: Group, traces: Sequence[Trace], *, rises: bool) -> tuple[str, float]:
    """The basis on which the group as a whole changed most in this direction, and its factor beyond the median null."""
    factors = {}
    for basis, floor in _FLOORS.items():
        members = group.tokens if basis == "expected" else group.features
        if len(members):
            sums = np.stack([getattr(t, basis)[:2, members].sum(axis=1, dtype=np.float64) for t in traces]) + floor
            ratios = np.log(sums[:, 1] / sums[:, 0])
            factors[basis] = float(ratios[0] - np.median(ratios[1:]))
    basis = max(factors, key=lambda name: factors[name] if rises else -factors[name])
    return basis, math.exp(factors[basis])


def _judge_limits(budget: Budget, trace: Trace, nulls: Sequence[Trace], rows: Rows) -> list[Verdict]:
    verdicts = []
    for source, limits in budget.texts.items():
        for kind, limit in (("kl", limits.kl), ("perplexity_ratio", limits.perplexity_ratio)):
            if limit is None:
                continue
            value = _limit_value(trace, kind, source, rows)
            of_nulls = np.array([_limit_value(null, kind, source, rows) for null in nulls])
            n_judged, n_above = int(np.isfinite(of_nulls).sum()), int((of_nulls > limit).sum())
            unit = " nats" if kind == "kl" else ""
            label = f"{kind.replace('_', ' ')} {source}"
            verdict = Verdict(label, f"at most {limit:g}{unit}", "unjudged", value, limit, nulls=len(nulls))
            verdict = replace(verdict, nulls_judged=n_judged, nulls_broken=n_above)
            if not math.isfinite(value):
                verdicts.append(replace(verdict, reason=f"no token of {source!r} counts"))
            else:
                status: Status = "broken" if value > limit else "kept"
                verdicts.append(replace(verdict, status=status, reason="measured on this text as it is"))
    return verdicts


def _limit_value(trace: Trace, kind: str, source: str, rows: Rows) -> float:
    if kind == "kl":
        kl = trace.kl if source == ALL_TEXT else trace.kl[rows.sources == rows.names.index(source)]
        return float(np.nanmean(kl)) if np.isfinite(kl).any() else math.nan
    suffix = "" if source == ALL_TEXT else f"_{source}"
    losses = [trace.numbers.get(f"loss_{model}{suffix}", math.nan) for model in ("tuned", "base")]
    return math.exp(losses[0] - losses[1])
