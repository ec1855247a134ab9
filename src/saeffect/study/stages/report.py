"""The report: tables, figures and one page; for a study without SAEs, a page of the trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.comparison import ArmTables
from saeffect.config import SteeringConfig, TextConfig
from saeffect.config_chat import prompt_text
from saeffect.io import read_json
from saeffect.progress import SILENT, Log
from saeffect.report import ReportContext, SteeringResults, write_figures, write_report, write_tables
from saeffect.report.models_page import ModelsPage, first_findings, is_same, word_tokens, write_models_page
from saeffect.report.tables.learned import pushed_view
from saeffect.report.words.causes import what_a_push_writes
from saeffect.report.words.learned import learned
from saeffect.report.words.numbers import plural
from saeffect.steering.outcomes import OUTCOMES
from saeffect.steering.placebos import control_label
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.changes import CHANGE_TABLES
from saeffect.study.stages.compare import ARM_FILES, arm_tables, compare_inputs, read_comparison
from saeffect.study.stages.dose_search import chosen_dose
from saeffect.study.stages.push import PUSH_TABLES
from saeffect.study.stages.select import stored_verdicts
from saeffect.study.stages.trace import read_trace, trace_path

__all__ = [
    "findings",
    "gate_measures",
    "models_report_inputs",
    "report_context",
    "report_inputs",
    "run_models_report",
    "run_report",
]

VERSION = 8


def report_inputs(run: RunFolder) -> dict[str, Any]:
    files = [run.path("comparison", "answer.json"), run.path("comparison", "contrasts.parquet")]
    files += [run.path("steering", "dose.json")]
    files += [run.arm(name, file) for name in run.study.config.arms for file in (*ARM_FILES, "examples.parquet")]
    if stored_verdicts(run) is not None:
        files.append(run.path("comparison", "verdicts.parquet"))
    return {
        "version": VERSION,
        "comparison": compare_inputs(run),
        "files": run.digest(*files, *(run.path("steering", f"dose_{name}.parquet") for name in ("search", "response"))),
        "config": run.config_yaml,
        "provenance": run.provenance(),
    }


def run_report(run: RunFolder, _: Log = SILENT) -> Iterable[Path]:
    """Write `tables/`, `figures/` and `report.html`."""
    comparison = read_comparison(run)
    context = report_context(run)
    tables = write_tables(comparison, run.path("tables"), context=context)
    figures = write_figures(comparison, run.path("figures"), context=context)
    page = write_report(comparison, run.path("report.html"), context=context, figures=figures)
    drawn = [figure.name for figure in figures if figure.figure is not None]
    return [*tables, *sorted(run.path("figures", name + end) for name in drawn for end in (".svg", ".png")), page]


def report_context(run: RunFolder, arms: Mapping[str, ArmTables] | None = None) -> ReportContext:
    """What the report shows besides the comparison; `arms` are the run's `arm_tables` (None: read them)."""
    config, arms = run.study.config, arms or arm_tables(run)
    doses = run.table_or_none(run.path("steering", "dose_search.parquet")) if config.steering else None
    return ReportContext(
        study=config.name,
        title=config.title,
        facts=_study_facts(run, arms),
        arms=arms,
        examples={name: run.read_table(run.arm(name, "examples.parquet")) for name in config.arms},
        prompts=[prompt_text(prompt) for prompt in config.steering.prompts] if config.steering else (),
        gate=gate_measures(run, {name: arm.facts.dead_share for name, arm in arms.items()}),
        steering=_steering_results(run),
        doses=doses if doses is not None and len(doses) else None,
        config=run.config_yaml,
        provenance=run.provenance(),
        domain=config.selection.subject,
        min_matches=config.selection.min_matches,
        top_k=config.features.top_k,
        alpha=config.comparison.alpha,
        projection=config.features.projection,
        max_features=500,
        verdicts=stored_verdicts(run),
    )


def gate_measures(run: RunFolder, dead_shares: Mapping[str, float | None]) -> pd.DataFrame:
    """The gate's measurements and the share of dead features, a row an arm."""
    gates = {name: read_json(run.arm(name, "gate.json")) for name in dead_shares}
    measures = ("explained_variance", "ce_loss_score", "l0", "l2_ratio")
    return pd.DataFrame(
        {"arm": name}
        | {measure: gate[measure] for measure in measures}
        | {"dead_share": dead_shares[name], "n_tokens": gate["tokens"]}
        | {f"perplexity_{source}": value for source, value in gate["perplexity"].items()}
        for name, gate in gates.items()
    )


def _study_facts(run: RunFolder, arms: Mapping[str, ArmTables]) -> tuple[tuple[str, str], ...]:
    config = run.study.config
    control, treatment = run.study.pair
    gate = read_json(run.arm(control, "gate.json"))
    facts = [
        ("Base model", str(arms[control].facts.model)),
        ("Fine-tuned model", str(arms[treatment].facts.model)),
        ("Hook", run.study.hook(control)),
        ("Text", _text_words(config.text, gate["text_shortage"])),
    ]
    if config.features.tokens != ("all",):
        scripts = f"of the scripts {', '.join(config.features.tokens)}"
        facts.append(("Top tokens", "known to the word vectors" if "embeddings" in config.features.tokens else scripts))
    if config.steering is not None:
        steering, (dose, _) = config.steering, chosen_dose(run)
        facts.append(("Steering", _steered(steering)))
        facts.append(("Dose", _dose_words(steering, dose, gate["mean_norm"])))
        facts.append(("Tested against", _placebo_words(steering)))
        facts.append(("Declared outcomes", ", ".join(OUTCOMES[name].label for name in steering.outcomes)))
    facts.append(("Seed", str(config.seed)))
    return tuple(facts)


def _text_words(text: TextConfig, shortage: str) -> str:
    words = text.label
    if text.format == "chat":
        words += f"; conversations, tokens at positions: {', '.join(text.positions)}"
    return f"{words} (only {shortage})" if shortage else words


def _steered(steering: SteeringConfig) -> str:
    kind = "chat" if all(isinstance(prompt, tuple) for prompt in steering.prompts) else "prompt"
    where = "" if steering.positions == "all" else f", at positions: {steering.positions}"
    return f"{plural(len(steering.prompts), kind)} × {plural(steering.samples, 'text')}{where}"


def _placebo_words(steering: SteeringConfig) -> str:
    """The placebos in words, that of the primary test first."""
    names = sorted(steering.placebos, key=lambda name: name != steering.primary_placebo)
    return ", ".join(map(control_label, names)) or "nothing: no placebo"


def _dose_words(steering: SteeringConfig, dose: float | None, mean_norm: float) -> str:
    if dose is None:
        return "none: the search found no gain, so no feature was steered"
    if steering.operator == "ablate":
        return "features switched off"
    if steering.operator == "clamp":
        return f"features clamped to {dose:g} × their maximum"
    if steering.unit == "coefficient":
        return f"{dose:g} × the decoder row"
    return f"{dose:g} × the mean residual norm ({mean_norm:.0f})"


def _steering_results(run: RunFolder) -> SteeringResults | None:
    """The steer stage's tables and settings; None for a study without steering."""
    config = run.study.config.steering
    if config is None:
        return None
    search = read_json(run.path("steering", "dose.json"))
    dose, note = chosen_dose(run)
    response = run.table_or_none(run.path("steering", "dose_response.parquet"))
    return SteeringResults(
        operator=config.operator,
        unit=config.unit,
        dose=dose,
        dose_note=note,
        best_doses=search.get("best") or {},
        outcomes=config.outcomes,
        placebo=config.primary_placebo,
        placebos=config.placebos,
        n_prompts=len(config.prompts),
        samples=config.samples,
        outcome_effects=_tables_by_arm(run, "outcome_effects"),
        baseline_effects=_tables_by_arm(run, "baseline_effects"),
        together_effects=_tables_by_arm(run, "together_effects"),
        dose_response=response if response is not None and len(response) else None,
    )


def _tables_by_arm(run: RunFolder, name: str) -> Mapping[str, pd.DataFrame]:
    tables = {arm: run.table_or_none(run.arm(arm, f"{name}.parquet")) for arm in run.study.config.arms}
    return {arm: table for arm, table in tables.items() if table is not None and len(table)}


MODELS_VERSION = 1


def models_report_inputs(run: RunFolder) -> dict[str, Any]:
    return {
        "version": MODELS_VERSION,
        "trace": run.digest(trace_path(run)),
        "push": run.digest(*(run.path("comparison", f"{name}.parquet") for name in PUSH_TABLES)),
        "config": run.config_yaml,
    }


def run_models_report(run: RunFolder, log: Log = SILENT) -> Iterable[Path]:
    """Write `report.html`."""
    config, arms = run.study.config, run.study.config.arms
    lm = run.study.open_model(run.study.control, log)
    base, tuned = (arms[name].model.full_name for name in run.study.pair)
    facts = (("Base model", base), ("Fine-tuned model", tuned), ("Text", config.text.label))
    lines = findings(run, log) or ("No difference: on this text, both models predict the same to the last digit.",)
    tables = _change_tables(run)
    words = tables.get("difference_words")
    push = "" if words is None else what_a_push_writes(words, config.comparison.alpha)
    page = ModelsPage(config.title or config.name, facts, lines, run.config_yaml, push, pushed_view(tables))
    trace, tokens = read_trace(run), lm.token_strings()
    words = word_tokens(tokens, lm.plain_tokens().numpy())
    return [write_models_page(page, trace, run.path("report.html"), tokens=tokens, plain=words, decode=lm.decode)]


def findings(run: RunFolder, log: Log = SILENT) -> tuple[str, ...]:
    """The findings of the stage "changes", as lines of text, what was learned first; none if the models predict the
    same.
    """
    trace, study = read_trace(run), run.study
    if is_same(trace):
        return ()
    control = study.control
    lm = study.open_model(control, log)
    features = run.read_table(run.arm(control, "features.parquet")) if study.has_saes else None
    present = _change_tables(run)
    headline = learned(present, study.config.selection.subject, alpha=study.config.comparison.alpha).headline
    lines = first_findings(
        trace,
        lm.token_strings(),
        lm.plain_tokens().numpy(),
        top_tokens=[] if features is None else features["top_tokens"].tolist(),
        groups=present.get("change_groups"),
        decode=lm.decode,
    )
    return (headline, *lines) if headline else tuple(lines)


def _change_tables(run: RunFolder) -> dict[str, pd.DataFrame]:
    """Those of the stages "changes" and "push", as far as there are any."""
    names = (*CHANGE_TABLES, *PUSH_TABLES)
    tables = {name: run.table_or_none(run.path("comparison", f"{name}.parquet")) for name in names}
    return {name: table for name, table in tables.items() if table is not None}
