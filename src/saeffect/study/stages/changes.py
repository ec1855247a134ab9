"""Stage 6, what changed: the fine-tune's trace, measured through the control's SAE, or without one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeffect.diffing.trace import Trace, Tracer
from saeffect.lm.activations import TokenRows, first_limit
from saeffect.lm.hooks import parse_hook
from saeffect.progress import Log
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study

__all__ = ["changes_inputs", "read_trace", "run_changes", "trace_rows"]

VERSION = 1


def changes_inputs(run: RunFolder) -> dict[str, Any]:
    study = run.study
    arms = {role: study.identities[study.by_role(role)[0]] for role in ("control", "treatment")}
    return {
        "version": VERSION,
        # Of the treatment, the model alone.
        "arms": {name: {k: v for k, v in arm.items() if k != "sae" or name == "control"} for name, arm in arms.items()},
        "text": study.text_identity,
        "changes": study.config.changes.model_dump(),
    }


def run_changes(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `comparison/trace.safetensors`."""
    study = run.study
    treatment = study.by_role("treatment")[0]
    found = _tracer(study, log).trace(study.open_model(treatment, log), treatment)
    path = run.path("comparison", "trace.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return [path]


def read_trace(run: RunFolder) -> Trace:
    """The trace that this stage wrote."""
    return Trace.load(run.path("comparison", "trace.safetensors"))


def trace_rows(study: Study) -> TokenRows:
    """The text of traces: the first rows of the study's, each cut."""
    settings = study.config.changes
    rows = study.rows().head(settings.rows)
    return TokenRows(rows.ids[:, : settings.tokens_per_row], rows.sources, rows.names)


def _tracer(study: Study, log: Log) -> Tracer:
    control = study.by_role("control")[0]
    rows, hook = trace_rows(study), study.hook(control)
    if not study.has_saes:
        lm = study.open_model(control, log)
        parse_hook(hook, lm.n_layers, at=study.at("arms", control, "hook"))
        return Tracer(lm, None, hook, rows, first_limit(lm, hook, rows.ids[:8]), log)
    arm = study.open_arm(control, log)
    return Tracer(arm.lm, arm.sae, hook, rows, arm.norm_limit(study.rows()), log)
