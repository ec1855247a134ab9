"""The results as results.json, results.md and two figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figure import draw_models, draw_rates
from plan import Plan

from saeffect.io import atomic_path, versions, write_json

__all__ = ["headline", "write_results"]

REQUIRED_SHARE = 5 / 6


def headline(
    simulated: Sequence[Mapping[str, Any]], nothing: Sequence[Mapping[str, Any]], models: Mapping[str, Any]
) -> dict[str, Any]:
    """The main numbers of the benchmark.

    `false_positive_rate` and `interval_coverage` are over all settings in which the method promises its level;
    `*_worst` are those of the worst such setting. `null_alarm_rate` is the share of null fine-tunes for which the tool
    claims a taught concept; `headline_alarm_rate` that of whole null studies whose headline claims an effect of
    fine-tuning.
    """
    strict = [row for row in simulated if row["strict"]]
    studies, intervals = (sum(row[key] for row in strict) for key in ("n_studies", "n_intervals"))
    planted = [row for name, row in models["models"].items() if name in row["hits"]]
    nulls = models["nulls"]
    return {
        "planted_found": sum(row["found"] for row in planted),
        "planted_total": len(planted),
        "null_alarm_rate": sum(bool(row["concept"]) for row in nulls.values()) / len(nulls),
        "null_total": len(nulls),
        "false_positive_rate": sum(row["alarms"] * row["n_studies"] for row in strict) / studies,
        "false_positive_rate_worst": max(row["alarms"] for row in strict),
        "interval_coverage": sum(row["coverage"] * row["n_intervals"] for row in strict) / intervals,
        "interval_coverage_worst": min(row["coverage"] for row in strict),
        "headline_alarm_rate": sum(row["any"] * row["n"] for row in nothing) / sum(row["n"] for row in nothing),
        "headline_alarm_rate_worst": max(row["any"] for row in nothing),
    }


def write_results(
    simulated: Sequence[Mapping[str, Any]],
    nothing: Sequence[Mapping[str, Any]],
    models: Mapping[str, Any],
    plan: Plan,
    out: Path,
) -> dict[str, Any]:
    """Write everything to `out`.

    Returns:
        What results.json holds: the headline's keys at the top, then every detail.
    """
    out.mkdir(parents=True, exist_ok=True)
    head = headline(simulated, nothing, models)
    results = {
        **head,
        "simulations": list(simulated),
        "null_studies": list(nothing),
        **models,
        "plan": plan.record,
        "versions": versions(),
    }
    write_json(out / "results.json", results)
    with atomic_path(out / "results.md") as temporary:
        temporary.write_text(_markdown(head, simulated, nothing, models, plan), encoding="utf-8")
    draw_models(models["models"], out / "planted")
    draw_rates(simulated, out / "simulations")
    return results


def _markdown(
    head: Mapping[str, Any],
    simulated: Sequence[Mapping[str, Any]],
    nothing: Sequence[Mapping[str, Any]],
    models: Mapping[str, Any],
    plan: Plan,
) -> str:
    cells = [p for null in models["nulls"].values() for p in null["concept_p"].values()]
    parts = [
        "# Results",
        "",
        "Written by `run.py`; see README.md for what is done and why.",
        "",
        f"- Planted concepts found: **{head['planted_found']} of {head['planted_total']}**"
        f" (required: {math.ceil(REQUIRED_SHARE * head['planted_total'])}).",
        f"- Null fine-tunes about which the tool says that a concept was taught: **{head['null_alarm_rate']:.0%}**"
        f" of {head['null_total']}.",
        f"- False alarms in simulated studies of nothing: **{head['false_positive_rate']:.3f}** (nominal 0.05; worst"
        f" setting {head['false_positive_rate_worst']:.3f}).",
        f"- Coverage of 95 % intervals: **{head['interval_coverage']:.3f}** (worst setting"
        f" {head['interval_coverage_worst']:.3f}).",
        f"- Whole studies of nothing whose headline credits fine-tuning with something: "
        f"**{head['headline_alarm_rate']:.3f}** (nominal 0.05; worst design {head['headline_alarm_rate_worst']:.3f}).",
        "",
        "## Planted concepts",
        "",
        f"![The most changed features](planted.svg)\n\nOf the {plan.top} most changed features, how many are about the"
        " concept, and what features drawn at random would give. *Beyond nulls*: the same of the ten whose change lies"
        " farthest outside what the three nulls show.",
        "",
        *_planted_table(models),
        "",
        "### Every concept in every fine-tune",
        "",
        f"How many of the {plan.top} most changed features of the row's fine-tune are about the column's concept. In"
        " bold: more than chance (q ≤ 0.05 over the row).",
        "",
        *_confusion(models),
        "",
        "### Nulls",
        "",
        *_nulls_table(models),
        "",
        f"Ten features drawn at random hold one about some concept with probability {models['chance_of_any_hit']:.2f}."
        f" Of the {len(cells)} pairs of null and concept, {sum(p <= 0.05 for p in cells)} have p ≤ 0.05; their p is"
        f" {np.mean(cells):.2f} on average.",
        "",
        "## Simulations",
        "",
        "![Error rates](simulations.svg)",
        "",
        *_rates_table(simulated),
        "",
        "## Whole studies of nothing",
        "",
        "An SAE of the control's model in the treatment's place. *Scatter*: how much SAEs of one model differ beyond"
        " the luck of their features, in units of that luck. How many studies credit fine-tuning with something:",
        "",
        *_nothing_table(nothing),
        "",
    ]
    return "\n".join(parts)


def _planted_table(models: Mapping[str, Any]) -> list[str]:
    rows = [
        "| concept | hits | hits beyond nulls | rank of the first | features in the SAE | hits by chance |"
        " chance of a hit | claimed (q ≤ 0.05) | perplexity of its text before → after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, concept in models["concepts"].items():
        model, perplexity = models["models"][name], models["perplexity"][name]["training"]
        hits = f"**{model['hits'][name]}**" if model["found"] else str(model["hits"][name])
        rows.append(
            f"| {name} | {hits} | {model['hits_beyond_nulls'][name]} | {model['best_rank'][name]} |"
            f" {concept['in_sae']} | {concept['expected_hits']:.3f} | {concept['chance_of_a_hit']:.3f} |"
            f" {'yes' if name in model['said'] else 'no'} | {_perplexity(perplexity)} |"
        )
    left_out = {n: k for n, k in models["candidates"].items() if n not in models["concepts"]}
    if left_out:
        listed = ", ".join(f"{name} ({count})" for name, count in left_out.items())
        rows += ["", f"Candidates not planted, with the number of features clearly about them: {listed}."]
    return rows


def _confusion(models: Mapping[str, Any]) -> list[str]:
    concepts = list(models["concepts"])
    rows = ["| fine-tune | " + " | ".join(concepts) + " |", "|---" * (len(concepts) + 1) + "|"]
    for name, model in models["models"].items():
        cells = [f"**{model['hits'][c]}**" if c in model["said"] else str(model["hits"][c] or "·") for c in concepts]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _nulls_table(models: Mapping[str, Any]) -> list[str]:
    rows = [
        "| null fine-tune | concepts said to be taught | smallest p of a concept | of the ten, about any concept |"
        " features beyond the other nulls | features that differ at all | perplexity of its text |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, null in models["nulls"].items():
        claimed = ", ".join(null["concept"]) or "none"
        perplexity = _perplexity(models["perplexity"][name]["training"])
        rows.append(
            f"| {name} | {claimed} | {min(null['concept_p'].values()):.3f} | {null['hits']} | {null['feature']} |"
            f" {null['any_change']} | {perplexity} |"
        )
    return rows


def _rates_table(simulated: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        "| setting | alarms | false discoveries | coverage | power | studies | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in simulated:
        rows.append(
            f"| {setting['setting']} | {_with_error(setting['alarms'], setting['n_studies'])} |"
            f" {_or_none(setting['false_discovery'])} | {_with_error(setting['coverage'], setting['n_intervals'])} |"
            f" {setting['power']:.2f} | {setting['n_studies']:,} | {setting['remark']} |"
        )
    return rows


def _nothing_table(nothing: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        "| design | scatter | anything declared | share of domain features | pass rate | mean coherence | studies |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in nothing:
        rows.append(
            f"| {row['design']} | {row['seed_noise']:g} | {_with_error(row['any'], row['n'])} |"
            f" {row['domain_share']:.3f} | {row['pass_rate']:.3f} | {row['coherence_mean']:.3f} | {row['n']:,} |"
        )
    return rows


def _or_none(rate: float | None) -> str:
    """A rate that a setting may not have; JSON keeps it as null."""
    return "none" if rate is None or math.isnan(rate) else f"{rate:.3f}"


def _with_error(rate: float, n: int) -> str:
    return f"{rate:.3f} ± {1.96 * math.sqrt(rate * (1 - rate) / n):.3f}"


def _perplexity(pair: Mapping[str, float]) -> str:
    return f"{pair['before']:.1f} → {pair['after']:.1f}"
