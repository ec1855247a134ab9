"""A study from beginning to end. Read this first: it is the method section, one stage a paragraph.

Each stage reads files and writes files, and is skipped while the hash of everything its numbers depend on is
unchanged. Killed at any moment, the next run goes on after the last finished stage (interventions: after the last
finished batch of texts) and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saeffect.errors import unknown_name
from saeffect.study.check import check_study
from saeffect.study.coherence import coherence_inputs, run_coherence
from saeffect.study.comparison import comparison_inputs, run_comparison
from saeffect.study.features import features_inputs, run_features
from saeffect.study.gate import gate_inputs, run_gate
from saeffect.study.reporting import report_inputs, run_reporting
from saeffect.study.run_folder import RunFolder
from saeffect.study.selection import run_selection, selection_inputs
from saeffect.study.steering import dose_inputs, run_dose_search, run_steering, steering_inputs
from saeffect.study.study import Say, Study

__all__ = ["STAGES", "run_study"]

STAGES = ("gate", "features", "coherence", "select", "steer", "compare", "report")


def run_study(
    study: Study,
    out: Path | str,
    *,
    stages: Sequence[str] = STAGES,
    redo: bool = False,
    say: Say = lambda line: None,
) -> RunFolder:
    """Run the stages of a study in order, skipping those already done.

    Args:
        study: What to compare.
        out: The run directory.
        stages: Which of `STAGES`; those before them must have been run.
        redo: Do the named stages even if they were done with the same inputs.
        say: Receives lines: `progress <stage> <arm> <done> <total> <unit>`, and others for people.

    Returns:
        The run directory.

    Raises:
        UnknownName: A stage that does not exist.
        SaeffectError: What is wrong with the study; nothing was changed in the directory by the failing stage.
    """
    for name in stages:
        if name not in STAGES:
            raise unknown_name("stage", name, STAGES)
    check_study(study, out, say)
    run = RunFolder(out, study)
    config = study.config
    steering = config.steering
    _open_new_arms(run, stages, say)

    # Does each SAE reconstruct its model at its hook? If not, its features say nothing about the model.
    # Then name every feature by the tokens it promotes, and find where it fires.
    for arm in study.ordered_arms():
        if "gate" in stages:
            run.stage(f"gate {arm}", gate_inputs(study, arm), run_gate(run, arm, say), say, redo=redo)
        if "features" in stages:
            run.stage(f"features {arm}", features_inputs(study, arm), run_features(run, arm, say), say, redo=redo)

    # How alike in meaning are the top tokens of each feature?
    if "coherence" in stages:
        for arm in config.arms:
            run.stage(f"coherence {arm}", coherence_inputs(run, arm), run_coherence(run, arm), say, redo=redo)

    # Which features are about the domain, by vocabulary and by people's verdicts?
    if "select" in stages:
        run.stage("select", selection_inputs(run), run_selection(run), say, redo=redo)

    # Does steering with a feature do what its tokens promise, more than a random direction does?
    # The dose is found on prompts that the test does not use.
    if "steer" in stages and steering is not None:
        run.stage("dose search", dose_inputs(run, steering), run_dose_search(run, steering, say), say, redo=redo)
        for arm in study.ordered_arms():
            inputs = steering_inputs(run, arm, steering)
            run.stage(f"steer {arm}", inputs, run_steering(run, arm, steering, say), say, redo=redo)

    # What differs between control and treatment, and is it more than between two SAEs of the control?
    if "compare" in stages:
        run.stage("compare", comparison_inputs(run), run_comparison(run), say, redo=redo)

    # Tell it.
    if "report" in stages:
        run.stage("report", report_inputs(run), run_reporting(run), say, redo=redo)
    return run


def _open_new_arms(run: RunFolder, stages: Sequence[str], say: Say) -> None:
    """Load the arms that are to be measured once before anything is written: broken weights show only then."""
    study = run.study
    if "gate" in stages:
        # The control last: it is needed first, and the latest model stays in memory.
        for arm in reversed(study.ordered_arms()):
            if not run.is_done(f"gate {arm}", gate_inputs(study, arm)):
                study.open_arm(arm, say)
