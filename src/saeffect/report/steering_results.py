"""What the steer stage found, as the report reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

__all__ = ["SteeringResults"]


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
        return next(iter(self.outcomes), "similarity")

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
