"""The numbers of one feature's card, each with its label, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeffect.report.words.names import outcome_words
from saeffect.report.words.numbers import (
    amount,
    count,
    fixed,
    interval,
    is_defined,
    is_true,
    p_value,
    signed,
    undefined,
)

__all__ = ["card_numbers"]

Pair = tuple[str, str]
_Row = Mapping[Any, Any]


def card_numbers(row: Mapping[Any, Any]) -> tuple[Pair, ...]:
    """Label-value pairs in reading order: steering, coherence, vocabulary, verdicts, activity.

    Args:
        row: A feature's columns from all tables of its arm; the reasons are `coherence_reason` and `effect_reason`,
            and `outcome_pairs` are further pairs, see `saeffect.report.tables.outcome.outcome_pairs`.
    """
    steering = _steering(row) if is_defined(row.get("p")) else [("Effect", _untested(row))]
    return (*steering, *(row.get("outcome_pairs") or ()), *_meaning(row), *_activity(row))


def _steering(row: _Row) -> list[Pair]:
    low, high = row.get("effect_low"), row.get("effect_high")
    effect = signed(row["effect"]) if is_defined(row.get("effect")) else undefined()
    if is_defined(low) and is_defined(high):
        effect += f" {interval(low, high)}"
    means = [_text(row, name, "?") for name in ("unsteered_mean", "steered_mean", "placebo_mean")]
    direct = _text(row, "direct_effect")
    if is_defined(row.get("direct_placebo")):
        direct += f" (placebo {_text(row, 'direct_placebo')})"
    q = row.get("q")
    return [
        ("Effect: steered − placebo", effect),
        ("p, q", p_value(row["p"]) + (f", {p_value(q)}" if is_defined(q) else "")),
        (f"{_outcome(row)}: unsteered, steered, placebo", ", ".join(means)),
        ("Pairs of texts", _text(row, "n_pairs", unit="count")),
        ("Paper's rule", "pass" if is_true(row.get("paper_pass")) else "no pass"),
        ("Direct effect, nats", direct),
        ("KL, nats", _text(row, "kl")),
    ]


def _outcome(row: _Row) -> str:
    title = outcome_words(str(row.get("outcome") or "similarity")).title
    return title[0].upper() + title[1:]


def _untested(row: _Row) -> str:
    reason = row.get("effect_reason")
    return undefined(reason if isinstance(reason, str) and reason else "this feature was not tested")


def _meaning(row: _Row) -> list[Pair]:
    coherence = row.get("coherence")
    if is_defined(coherence):
        known = row.get("n_known")
        text = fixed(coherence) + (f" ({count(known)} known words)" if is_defined(known) else "")
    else:
        reason = row.get("coherence_reason")
        text = undefined(reason if isinstance(reason, str) else "")
    scales = [_text(row, name, "?", "count") for name in ("matches_dot", "matches_cosine")]
    pairs = [("Coherence", text), ("Words in the vocabulary: dot, cosine", ", ".join(scales))]
    verdicts = [row.get(name) for name in ("n_yes", "n_no", "n_unsure")]
    if any(is_defined(number) and number for number in verdicts):
        yes, no, unsure = (count(number) if is_defined(number) else "0" for number in verdicts)
        pairs.append(("Verdicts", f"{yes} yes, {no} no, {unsure} unsure"))
    return pairs


def _activity(row: _Row) -> list[Pair]:
    density = _share(row.get("density"))
    domain, general = row.get("density_domain"), row.get("density_general")
    if is_defined(domain) and is_defined(general):
        density += f" (domain text {_share(domain)}, general {_share(general)})"
    if is_defined(row.get("mean_activation")):
        activation = f"{_text(row, 'mean_activation')}, {_text(row, 'max_activation', '?')}"
    else:
        activation = undefined("it never fired on the text")
    return [("Density", density), ("Activation: mean, max", activation)]


def _text(row: _Row, name: str, missing: str = "undefined: not measured", unit: str = "") -> str:
    value = row.get(name)
    return amount(value, unit) if is_defined(value) else missing


def _share(value: object) -> str:
    return f"{100 * value:.3g} %" if is_defined(value) else undefined("not measured")
