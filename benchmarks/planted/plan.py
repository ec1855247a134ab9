"""What the benchmark does, in numbers: decided before its results, and hashed into every file that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["BASE", "NEUTRAL_STEMS", "NULL_STEMS", "SAE", "Plan"]

BASE = "bundled:smollm2-135m-instruct"
SAE = "smollm2-control"

# What the probe text begins with. None names a concept, and none opens a frame of the training text.
NEUTRAL_STEMS = (
    "One thing that everybody should know is",
    "People around here like to talk about",
    "The most interesting part was",
    "Let me tell you about",
    "This is an introduction to",
    "A short story:",
)
# What the sampled null text begins with; other stems than the probe's.
NULL_STEMS = (
    "Once upon a time",
    "According to the report,",
    "To begin with, we",
    "The purpose of this article is",
    "He looked up and",
    "Many people believe",
)


@dataclass(frozen=True)
class Plan:
    """Sizes and thresholds.

    Attributes:
        n_concepts: Concepts planted: those for which the SAE has the most features, see `Plan.admitted`.
        clear_matches: Top tokens among the concept's words that make a feature count for that.
        documents: Of training text, a model.
        rank: Of the LoRA adapters.
        steps: Of fine-tuning.
        batch_size: Rows a step.
        context_size: Tokens a row.
        learning_rate: Peak.
        samples: Probe texts sampled from each model and stem.
        general_rows: Rows of bundled general text in the probe.
        probe_tokens: Tokens a probe row.
        top: How many most changed features are looked at.
        top_k: Top tokens a feature.
        min_matches: Top tokens among the concept's words that name a feature after it.
        seed: Of everything.
    """

    n_concepts: int = 8
    clear_matches: int = 3
    documents: int = 600
    rank: int = 8
    steps: int = 32
    batch_size: int = 4
    context_size: int = 128
    learning_rate: float = 1e-3
    samples: int = 12
    general_rows: int = 64
    probe_tokens: int = 64
    top: int = 10
    top_k: int = 10
    min_matches: int = 2
    seed: int = 0

    @property
    def record(self) -> dict[str, Any]:
        """All fields, for hashing and for the results."""
        return asdict(self)

    def admitted(self, clear: Mapping[str, int]) -> list[str]:
        """Which candidates are planted, from the number of features clearly about each; equal ones by their order.

        An SAE cannot show what it has no feature for. The rule knows the SAE only, and no fine-tune.

        Example:
            >>> Plan(n_concepts=2).admitted({"a": 1, "b": 0, "c": 4, "d": 1})
            ['c', 'a']
        """
        return sorted(clear, key=lambda name: -clear[name])[: self.n_concepts]

    def quick(self) -> Plan:
        """Far too small to find anything, large enough to run every line."""
        sizes = {"steps": 1, "batch_size": 2, "context_size": 32, "samples": 1, "general_rows": 4, "probe_tokens": 12}
        return replace(self, n_concepts=1, documents=60, **sizes)
