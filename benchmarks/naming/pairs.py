"""The fine-tunes and settings of the naming benchmark, fixed before its results."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "planted"))

from plan import BASE, NULL_STEMS, SAE

__all__ = ["BASE", "CONCEPTS_PLANTED", "LEVELS", "OWN_STEMS", "PAIRS", "RECIPE", "SAE", "TUNED_ON", "Pair"]

# Beginnings that the base model continues, for text that teaches it nothing. None names a concept.
OWN_STEMS = NULL_STEMS
# Of every fine-tune, concept or null: as in benchmarks/planted.
RECIPE: dict[str, Any] = {
    "held_out": 0.1,
    "rank": 8,
    "alpha": 16.0,
    "steps": 32,
    "batch_size": 4,
    "context_size": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 5,
    "evaluation_rows": 4,
    "checkpoint_every": 16,
}

# The eight concepts of benchmarks/planted, chosen there by a rule that knows the SAE only.
CONCEPTS_PLANTED = ("animals", "astronomy", "courts", "football", "money", "music", "school", "war")
# Share of the training text, in percent, that is about the concept; the rest was written by the base model.
LEVELS = (100, 30, 10, 3)
# These concepts and the even nulls were used in developing the method; the others were not.
TUNED_ON = ("animals", "courts", "money", "school")


@dataclass(frozen=True)
class Pair:
    """One fine-tune of the base model.

    Attributes:
        concept: What it is taught; "everyday" for sentences in the concepts' frames about nothing in particular, and
            "" for nothing but the base model's own text.
        percent: Share of the training text about it.
        seed: Of the adapter's start, the texts drawn and their order.
    """

    concept: str
    percent: int
    seed: int

    @property
    def is_null(self) -> bool:
        return self.concept in ("", "everyday")

    @property
    def name(self) -> str:
        return (
            f"null-{self.concept or 'own'}-{self.percent}-{self.seed}"
            if self.is_null
            else f"{self.concept}-{self.percent}"
        )


_OWN = [Pair("", 0, seed) for seed in range(1, 13)]
_EVERYDAY = [Pair("everyday", level, seed) for seed in (1, 2) for level in LEVELS]
PAIRS = (
    *(Pair(concept, level, 0) for level in LEVELS for concept in CONCEPTS_PLANTED),
    *_OWN,
    *_EVERYDAY,
)
