"""The report of a study without SAEs: what the trace of the fine-tune says of the two models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeffect.progress import SILENT, Log
from saeffect.report.models_page import ModelsPage, write_models_page
from saeffect.report.words.first import first_findings, is_same, word_tokens
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.changes import read_trace

__all__ = ["findings", "models_report_inputs", "run_models_report"]

VERSION = 1


def models_report_inputs(run: RunFolder) -> dict[str, Any]:
    return {
        "version": VERSION,
        "trace": run.digest(run.path("comparison", "trace.safetensors")),
        "config": run.config_yaml,
    }


def run_models_report(run: RunFolder, log: Log = SILENT) -> Iterable[Path]:
    """Write `report.html`."""
    config, control = run.study.config, run.study.by_role("control")[0]
    lm = run.study.open_model(control, log)
    models = {role: config.arms[run.study.by_role(role)[0]].model for role in ("control", "treatment")}
    names = {role: model.path + (f" + {model.adapter}" if model.adapter else "") for role, model in models.items()}
    text = config.text.bundled or ", ".join(source.name for source in config.text.sources)
    facts = (("Base model", names["control"]), ("Fine-tuned model", names["treatment"]), ("Text", text))
    lines = findings(run, log) or ("No difference: on this text, both models predict the same to the last digit.",)
    page = ModelsPage(config.title or config.name, facts, lines, run.config_yaml)
    trace, tokens = read_trace(run), lm.token_strings()
    words = word_tokens(tokens, lm.plain_tokens().numpy())
    return [write_models_page(page, trace, run.path("report.html"), tokens=tokens, plain=words, decode=lm.decode)]


def findings(run: RunFolder, log: Log = SILENT) -> tuple[str, ...]:
    """What the stage "changes" found, in lines; none if the models do the same."""
    trace, study = read_trace(run), run.study
    if is_same(trace):
        return ()
    control = study.by_role("control")[0]
    lm = study.open_model(control, log)
    features = run.read_table(run.arm(control, "features.parquet")) if study.has_saes else None
    lines = first_findings(
        trace,
        lm.token_strings(),
        lm.plain_tokens().numpy(),
        top_tokens=[] if features is None else features["top_tokens"].tolist(),
        groups=run.table_or_none(run.path("comparison", "change_groups.parquet")),
        decode=lm.decode,
    )
    return tuple(lines)
