"""One synthetic study, drawn and written once for all tests of the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest

from saeffect.comparison import Comparison, MatchTables
from saeffect.report import DrawnFigure, ReportContext, SteeringResults, draw_figures, render_report
from synthetic_changes import first_screen
from synthetic_matches import synthetic_matches
from synthetic_steering import synthetic_steering
from synthetic_study import HOSTILE, compared, synthetic_arms, synthetic_examples

PROMPTS = ("What topic is on your mind?", "Tell me something.", "I think that")
HOSTILE_NAME = "</title><script>window.__pwned = 1</script>"


def _compare(arms: dict) -> Comparison:
    return compared(arms, matches=replace(synthetic_matches(), further=first_screen()))


def _dose_search() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": "control",
            "condition": "steered",
            "dose": [0.2, 0.4, 0.6],
            "n": [8, 8, 8],
            "gain": [0.05, 0.20, 0.25],
            "fluency": [0.98, 0.90, 0.40],
            "score": [0.049, 0.18, 0.10],
            "chosen": [False, True, False],
        }
    )


@pytest.fixture(scope="session")
def arms() -> dict:
    """Three arms; the first domain features of control and treatment promote every hostile token."""
    arms = synthetic_arms(n_features=120, max_tested=10)
    for name, tokens in (("control", HOSTILE[:10]), ("treatment", HOSTILE[-10:])):
        features = arms[name].features
        features.at[int(arms[name].domain[0]), "top_tokens"] = list(tokens)
    return arms


@pytest.fixture(scope="session")
def comparison(arms: dict) -> Comparison:
    return _compare(arms)


@pytest.fixture(scope="session")
def compare_quickly() -> Callable[[dict], Comparison]:
    return _compare


@pytest.fixture(scope="session")
def context(arms: dict) -> ReportContext:
    return ReportContext(
        study=f"demo {HOSTILE_NAME}",
        facts=(("Hook", "blocks.26.hook_resid_pre"), ("Model", HOSTILE_NAME)),
        arms=arms,
        examples=synthetic_examples(n_features=120),
        prompts=PROMPTS,
        steering=synthetic_steering(arms),
        doses=_dose_search(),
        config=f"study: demo  # {HOSTILE_NAME}\n",
        provenance={"versions": {"torch": "2.13"}, "seed": 0},
        domain="medical",
    )


@pytest.fixture(scope="session")
def figures(comparison: Comparison, context: ReportContext) -> tuple[DrawnFigure, ...]:
    return draw_figures(comparison, context)


@pytest.fixture
def unsaved_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn and captioned, but not saved as SVG, which takes most of a page's time."""
    monkeypatch.setattr(DrawnFigure, "svg", '<svg viewBox="0 0 1 1"></svg>')


def _page(comparison: Comparison, context: ReportContext) -> str:
    """The page with unsaved figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrawnFigure, "svg", '<svg viewBox="0 0 1 1"></svg>')
        return render_report(comparison, context=context)


@pytest.fixture(scope="session")
def untested(arms: dict) -> dict:
    """The same arms, none of them steered."""
    return {name: replace(arm, interventions=None, direct_effects=None, effects=None) for name, arm in arms.items()}


@pytest.fixture(scope="session")
def unsteered(untested: dict) -> Comparison:
    return _compare(untested)


@pytest.fixture(scope="session")
def unsteered_page(unsteered: Comparison, untested: dict, context: ReportContext) -> str:
    return _page(unsteered, replace(context, arms=untested, steering=SteeringResults(), doses=None))


@pytest.fixture(scope="session")
def page_without_placebo(arms: dict, context: ReportContext) -> str:
    two = {name: arm for name, arm in arms.items() if arm.role != "placebo"}
    return _page(compared(two, matches=synthetic_matches(placebo=False)), replace(context, arms=two))


@pytest.fixture(scope="session")
def unmatched_page(comparison: Comparison, context: ReportContext) -> str:
    return _page(replace(comparison, matches=MatchTables()), context)


@pytest.fixture(scope="session")
def page(comparison: Comparison, context: ReportContext, figures: tuple[DrawnFigure, ...]) -> str:
    return render_report(comparison, context=context, figures=figures)
