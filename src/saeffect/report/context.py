"""What the report needs to know besides the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from saeffect.comparison import ArmTables
from saeffect.report.steering_results import SteeringResults

__all__ = ["ReportContext"]


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
