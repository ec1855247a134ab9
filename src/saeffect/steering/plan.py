"""What is to be steered, where, and how often: the inputs that all steps of this package share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from torch import Tensor

from saeffect.errors import ConfigError, EmptySelection, IncompatibleSae, ShapeMismatch, unknown_name
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SparseAutoencoder
from saeffect.steering.operators import POSITIONS, Positions
from saeffect.steering.placebo import PLACEBOS, STEERED
from saeffect.steering.sampling import Sampling

__all__ = ["OPERATORS", "UNITS", "OperatorName", "Site", "SteeringPlan", "Unit", "check_features", "mean_residual_norm"]

OperatorName = Literal["add", "clamp", "ablate"]
OPERATORS: tuple[OperatorName, ...] = ("add", "clamp", "ablate")
Unit = Literal["residual_norm", "coefficient"]
UNITS: tuple[Unit, ...] = ("residual_norm", "coefficient")


@dataclass(frozen=True, eq=False)
class Site:
    """Where a model is steered.

    Attributes:
        lm: The model.
        hook: TransformerLens name.
        mean_norm: Mean Euclidean norm of the activation there, in the activation's units: the unit of doses.
        sae: The SAE at the hook; needed to clamp and to ablate.
        max_acts: Largest activation of every feature on text, float32 `[d_sae]`; needed to clamp.
        norm_limit: Longest activation that the SAE was trained on; clamping and ablating leave longer ones, the
            attention sinks, as they are (see `SetFeatures`).
    """

    lm: LanguageModel
    hook: str
    mean_norm: float
    sae: SparseAutoencoder | None = None
    max_acts: Tensor | None = None
    norm_limit: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean_norm) and self.mean_norm > 0):
            raise ConfigError(f"the mean norm at {self.hook} must be above 0 and finite. Got {self.mean_norm}.")
        if not self.norm_limit > 0:
            raise ConfigError(f"the norm limit at {self.hook} must be above 0. Got {self.norm_limit}.")


def mean_residual_norm(lm: LanguageModel, hook: str, input_ids: Tensor) -> float:
    """Mean norm of the activation at a hook, without each row's first position.

    The first position of a text holds an activation tens of times larger than the others in most models.

    Args:
        lm: The model.
        hook: TransformerLens name.
        input_ids: Token ids, int64 `[batch, sequence]`, at least two a row, no padding.

    Raises:
        ShapeMismatch: Rows of fewer than two tokens.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ShapeMismatch(f"token ids have shape {tuple(input_ids.shape)}; expected [batch, at least 2].")
    return float(capture(lm, hook, input_ids)[:, 1:].float().norm(dim=-1).mean())


@dataclass(frozen=True)
class SteeringPlan:
    """Which interventions are run.

    Attributes:
        prompts: What the model continues; at least one, no two alike.
        doses: How strongly, see `operator`; negative adds push away.
        samples: Repetitions of each prompt, each with noise of its own.
        max_new_tokens: Length of a continuation, in tokens.
        temperature: See `Sampling`, as for the next three.
        top_p: Mass of the tokens that may be drawn.
        frequency_penalty: Logits taken off for each earlier occurrence.
        allow_end: Whether texts may end before `max_new_tokens`.
        positions: "all", "generated" or "prompt", see `Intervention`.
        placebos: Kinds of placebo, see `PLACEBOS`; empty for none.
        seed: For sampling noise and random directions.
        batch_size: Rows generated at once.
        perplexity: Whether trials also get a column `perplexity` (costs about a tenth more time).
        operator: "add": a vector along the decoder row, of length dose x `Site.mean_norm`. "clamp": the
            feature's activation is set to dose x its maximum. "ablate": it is set to 0; the dose is 1.
        unit: What a dose of "add" counts: "residual_norm", or "coefficient": multiples of the decoder row, as
            in the paper.
    """

    prompts: tuple[str, ...]
    doses: tuple[float, ...]
    samples: int = 4
    max_new_tokens: int = 50
    temperature: float = 1.0
    top_p: float = 0.3
    frequency_penalty: float = 1.0
    allow_end: bool = False
    positions: Positions = "all"
    placebos: tuple[str, ...] = ("random",)
    seed: int = 0
    batch_size: int = 64
    perplexity: bool = False
    operator: OperatorName = "add"
    unit: Unit = "residual_norm"

    def __post_init__(self) -> None:
        # Lists come from YAML; a frozen plan must not share them.
        for name in ("prompts", "doses", "placebos"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("prompts", "doses"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be at least one, all different. Got {list(values)}.", at=name)
        if not all(math.isfinite(dose) for dose in self.doses):
            raise ConfigError(f"doses must be finite. Got {list(self.doses)}.", at="doses")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1. Got {getattr(self, name)}.", at=name)
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0. Got {self.seed}.", at="seed")
        if self.positions not in POSITIONS:
            raise unknown_name("choice of positions", self.positions, POSITIONS, at="positions")
        if self.operator not in OPERATORS:
            raise unknown_name("operator", self.operator, OPERATORS, at="operator")
        if self.unit not in UNITS:
            raise unknown_name("unit of doses", self.unit, UNITS, at="unit")
        if self.operator == "clamp" and min(self.doses) < 0:
            raise ConfigError(f"a feature cannot be clamped below 0. Got doses {list(self.doses)}.", at="doses")
        if self.operator == "ablate" and self.doses != (1.0,):
            raise ConfigError(f"an ablation has the one dose 1. Got {list(self.doses)}.", at="doses")
        for placebo in self.placebos:
            if placebo not in PLACEBOS:
                raise unknown_name("placebo", placebo, PLACEBOS, at="placebos")
        _ = self.sampling  # its checks belong to the plan's

    @property
    def sampling(self) -> Sampling:
        """How continuations are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.frequency_penalty, self.allow_end)

    @property
    def features_at_once(self) -> int:
        """How many features fill a batch, beside one unsteered row a sample; at least 1."""
        each = len(self.conditions) * len(self.doses) * self.samples
        return max(1, (self.batch_size - self.samples) // each)

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """What the feature table must hold for the placebos."""
        return ("matched",) if "matched" in self.placebos else ()

    @property
    def conditions(self) -> tuple[str, ...]:
        """What is added: the feature's direction, then the placebos."""
        return (STEERED, *dict.fromkeys(self.placebos))


def check_features(site: Site, W_dec: Tensor, features: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """The feature table sorted by feature, after checking that it can be steered.

    With a column members (list of int) each row stands for several features steered at once, and feature is
    any number to call them by.

    Raises:
        EmptySelection: There are no features.
        ShapeMismatch: A column is missing, a feature is there twice, or `W_dec` has no such row.
        IncompatibleSae: `W_dec` is of another width than the model.
    """
    missing = [name for name in ("feature", *columns) if name not in features]
    if missing:
        raise ShapeMismatch(f"the feature table lacks the column(s) {', '.join(missing)}.", at="features")
    if features.empty:
        raise EmptySelection("there are no features to steer.", fix="loosen the selection, or use another vocabulary.")
    if W_dec.ndim != 2 or W_dec.shape[1] != site.lm.d_model:
        raise IncompatibleSae(
            f"the decoder has shape {tuple(W_dec.shape)}, but {site.hook} of {site.lm.name} is {site.lm.d_model} wide.",
            at="W_dec",
            fix="use the SAE that was trained on this model and hook.",
        )
    table = features.sort_values("feature", kind="stable").reset_index(drop=True)
    ids = table["feature"]
    if ids.duplicated().any():
        raise ShapeMismatch(f"feature {ids[ids.duplicated()].iloc[0]} is in the table twice.", at="features")
    steered = table["members"].explode() if "members" in table else ids
    if steered.isna().any():
        raise ShapeMismatch("a set of features to steer together is empty.", at="features")
    if steered.min() < 0 or steered.max() >= len(W_dec):
        raise ShapeMismatch(
            f"features run from {steered.min()} to {steered.max()}, but the decoder has {len(W_dec)} rows.",
            at="features",
        )
    return table
