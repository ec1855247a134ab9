"""What the report needs to know besides the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from saeffect.comparison import ArmTables

__all__ = ["ReportContext", "SteeringResults"]


@dataclass(frozen=True, eq=False)
class SteeringResults:
    """The tables of the steer stage, and how it steered. Every table may be missing.

    Attributes:
        operator: "add", "clamp" or "ablate".
        unit: What a dose of "add" counts: "residual_norm" or "coefficient".
        dose: The dose of the test; None where none is known.
        dose_note: What speaks against trusting the choice of the dose, or how it came about; "" for nothing.
        best_doses: Each searched arm's own best dose, None where no dose had a score.
        outcomes: Declared before the run, the deciding one first.
        placebo: The control that decides.
        placebos: The controls that were asked for; empty for none.
        n_prompts: Prompts of the test; 0 where unknown.
        samples: Texts a prompt.
        outcome_effects: For each arm a row per feature, outcome and placebo, see `saeffect.steering.outcome_effects`.
        baseline_effects: The same with baseline in the place of placebo.
        together_effects: For each arm a row a set of features steered at once: set, members, and the columns of
            `saeffect.steering.effects`.
        dose_response: A row per arm, feature and dose, see `saeffect.steering.dose_response`; None for none.
    """

    operator: str = "add"
    unit: str = "residual_norm"
    dose: float | None = None
    dose_note: str = ""
    best_doses: Mapping[str, float | None] = field(default_factory=dict)
    outcomes: Sequence[str] = ("similarity",)
    placebo: str = "matched"
    placebos: Sequence[str] = ("random", "matched")
    n_prompts: int = 0
    samples: int = 0
    outcome_effects: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    baseline_effects: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    together_effects: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    dose_response: pd.DataFrame | None = None

    @property
    def deciding(self) -> str:
        """The outcome that decides what passes."""
        return self.outcomes[0]

    def declared(self, outcome: str) -> bool:
        """Whether an outcome was declared before the run; all others are exploratory."""
        return outcome in self.outcomes

    def in_order(self, found: Sequence[str]) -> list[str]:
        """Outcomes with the declared ones first, in the order of their declaration.

        Example:
            >>> SteeringResults(outcomes=("off_list", "similarity")).in_order(["kl", "similarity", "off_list"])
            ['off_list', 'similarity', 'kl']
        """
        first = [name for name in self.outcomes if name in found]
        return first + [name for name in found if name not in first]


@dataclass(frozen=True, eq=False)
class ReportContext:
    """The study around a comparison. Every part may be missing; the report then says so and goes on.

    Attributes:
        study: Name of the study.
        title: Heading of the report; made from the name when empty.
        facts: Label and value pairs for the line under the title: models, hook, text, prompts, dose.
        arms: Tables of each arm, by name: the source of the list of features.
        examples: Each arm's max-activating contexts, by name: feature, rank, activation, position, tokens,
            activations, source.
        prompts: The prompts that were steered on, in the order of the interventions' `prompt` column.
        gate: Quality of each arm's SAE, one row an arm, with a column `arm`; read off the arms' facts when missing.
        steering: What the steer stage found besides the arms' own tables; None when it is not known.
        doses: The dose search: `arm` (optional), `dose`, any numeric columns, and `chosen` (bool).
        config: The resolved study file, YAML text.
        provenance: Versions, hashes and seeds; may be nested.
        domain: What the vocabulary is about, in a word, for instance "medical".
        min_matches: Top tokens in the vocabulary that make a domain feature.
        top_k: Top tokens a feature.
        alpha: Highest q at which a feature passed.
        projection: Scale of the top tokens, "cosine" or "dot".
        max_features: Features listed for each arm; the rest are in the tables.
        max_contexts: Contexts shown a feature.
    """

    study: str = "study"
    title: str = ""
    facts: Sequence[tuple[str, str]] = ()
    arms: Mapping[str, ArmTables] = field(default_factory=dict)
    examples: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    gate: pd.DataFrame | None = None
    steering: SteeringResults | None = None
    doses: pd.DataFrame | None = None
    config: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    domain: str = "domain"
    min_matches: int = 2
    top_k: int = 10
    alpha: float = 0.05
    projection: str = "cosine"
    max_features: int = 200
    max_contexts: int = 4

    def arm_of(self, role: str) -> ArmTables | None:
        """The first arm of a role; None where the report knows none."""
        return next((arm for arm in self.arms.values() if arm.role == role), None)
