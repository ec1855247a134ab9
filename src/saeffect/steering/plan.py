"""Inputs of all steps of steering: site, plan and feature table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import pandas as pd
from pydantic import Field, field_validator
from torch import Tensor

from saeffect.config import InterventionConfig, SamplingConfig, SteeringConfig
from saeffect.errors import EmptySelection, IncompatibleSae, ShapeMismatch, unknown_name
from saeffect.lm.architectures import hook_width
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SparseAutoencoder
from saeffect.steering.outcomes import OUTCOMES
from saeffect.steering.placebos import BASELINES, PLACEBOS, STEERED
from saeffect.steering.sampling import Sampling

__all__ = ["Site", "SteeringPlan", "check_features", "check_names", "features_together"]


@dataclass(frozen=True, eq=False)
class Site:
    """Where a model is steered.

    Attributes:
        hook: TransformerLens name.
        W_dec: Decoder, `[d_sae, d_model]` (or the hook's width), any float dtype.
        mean_norm: Mean Euclidean norm of the activation at the hook, in its units: the unit of doses.
        sae: Needed to clamp and to ablate.
        max_acts: Largest activation of every feature on text, float32 `[d_sae]`; needed to clamp.
        norm_limit: Longest activation in the SAE's training; longer ones are not clamped or ablated, see `SetFeatures`.
    """

    lm: LanguageModel
    hook: str
    W_dec: Tensor
    mean_norm: float
    sae: SparseAutoencoder | None = None
    max_acts: Tensor | None = None
    norm_limit: float = math.inf

    def __post_init__(self) -> None:
        width = hook_width(self.lm, self.hook)
        if self.W_dec.ndim != 2 or self.W_dec.shape[1] != width:
            raise IncompatibleSae(
                f"the decoder has shape {tuple(self.W_dec.shape)}, but {self.hook} of {self.lm.name} is {width} wide.",
                at="W_dec",
                fix="use the SAE that was trained on this model and hook.",
            )


class SteeringPlan(Sampling, InterventionConfig):
    """Which interventions are run: the keys of a study's steering section, and those below.

    Attributes:
        doses: Depend on `operator`; negative adds push away.
        samples: Repetitions of each prompt, each with its own noise.
        operator: "add": a vector along the decoder row, of length dose x `Site.mean_norm`. "clamp": the feature's
            activation is set to dose x its maximum. "ablate": it is set to 0; the dose is 1.
        unit: Of doses of "add": "residual_norm", or "coefficient": multiples of the decoder row, as in the paper.
        protocol: "paper" samples and scores texts as the paper's code did (see `Sampling.as_published`), and changes no
            other key.

    `ConfigError`: values out of range, or that contradict each other; `UnknownName`: no such operator, unit, placebo,
    positions.
    """

    placebos: tuple[str, ...] = ("random",)
    unit: Literal["residual_norm", "coefficient"] = "residual_norm"
    seed: int = Field(0, ge=0)

    @field_validator("placebos")
    @classmethod
    def _check_placebos(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in PLACEBOS]
        if unknown:
            raise unknown_name("placebo", unknown[0], PLACEBOS, at="placebos")
        return value

    @classmethod
    def from_section(cls, section: SteeringConfig, *, seed: int, **changes: Any) -> Self:
        """The plan of a study's steering section, with some keys changed."""
        keys = (*InterventionConfig.model_fields, *SamplingConfig.model_fields)
        values = {key: getattr(section, key) for key in keys} | {"unit": section.unit, "seed": seed}
        return cls(**values | changes)

    @property
    def features_at_once(self) -> int:
        """How many features fill a batch, beside one unsteered row a sample; at least 1."""
        rows_per_feature = len(self.conditions) * len(self.doses) * self.samples
        return max(1, (self.batch_size - self.samples) // rows_per_feature)

    @property
    def prompts_together(self) -> list[list[int]]:
        """Numbers of prompts that are continued together: of all, or of one if the positions are relative to it."""
        numbers = list(range(len(self.prompts)))
        return [numbers] if self.positions == "all" else [[number] for number in numbers]

    @property
    def placebo_columns(self) -> tuple[str, ...]:
        """Columns of the feature table that the placebos need."""
        return tuple(column for name in self.placebos if (column := PLACEBOS[name].column))

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions of steered trials: "steered", then the placebos."""
        return (STEERED, *self.placebos)


def check_names(section: SteeringConfig) -> None:
    """`UnknownName` for an unregistered placebo, baseline or outcome of a steering section."""
    registries: dict[str, Mapping[str, object]] = {"placebos": PLACEBOS, "baselines": BASELINES, "outcomes": OUTCOMES}
    for key, registry in registries.items():
        for name in getattr(section, key):
            if name not in registry:
                raise unknown_name(key.removesuffix("s"), name, registry, at=key)


def check_features(site: Site, features: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The checked feature table, sorted by feature. With a column members (list of int) each row is a set of features
    steered at once, and feature is its number. `EmptySelection`: no features;
    `ShapeMismatch`: a column is missing, a feature is repeated, or the decoder has no such row.
    """
    missing = [name for name in ("feature", *columns) if name not in features]
    if missing:
        raise ShapeMismatch(f"the feature table lacks the column(s) {', '.join(missing)}.", at="features")
    if features.empty:
        raise EmptySelection("there are no features to steer.", fix="loosen the selection, or use another vocabulary.")
    table = features.sort_values("feature", kind="stable").reset_index(drop=True)
    ids = table["feature"]
    if ids.duplicated().any():
        raise ShapeMismatch(f"feature {ids[ids.duplicated()].iloc[0]} is in the table twice.", at="features")
    steered = table["members"].explode() if "members" in table else ids
    if steered.isna().any():
        raise ShapeMismatch("a set of features to steer together is empty.", at="features")
    if steered.min() < 0 or steered.max() >= len(site.W_dec):
        raise ShapeMismatch(
            f"features run from {steered.min()} to {steered.max()}, but the decoder has {len(site.W_dec)} rows.",
            at="features",
        )
    return table


def features_together(
    features: pd.DataFrame, sets: Sequence[Sequence[int]], matched: Mapping[int, Sequence[int]] | None = None
) -> pd.DataFrame:
    """A table with one row for each set of features steered at once, for `run_trials`.

    Under "add" a set is pushed along the sum of its decoder rows, its length given by the dose; under "clamp" and
    "ablate" each feature is set. `features` needs columns feature, top_tokens and top_token_ids; `matched` lists
    placebo features of each feature, nearest first: a set gets one of each member's, none twice. Columns: feature
    (number of the set, from 0), members (list of int), top_tokens and top_token_ids (the members' in turn, each once),
    and, if given, matched (list of lists; empty if a member has none). `EmptySelection`: no sets, or an empty one;
    `ShapeMismatch`: a feature is not in the table.
    """
    if not len(sets) or not all(len(members) for members in sets):
        raise EmptySelection("there is no set of features to steer together, or one of them is empty.", at="together")
    table = features.set_index("feature")
    rows = []
    for number, members in enumerate(sets):
        unknown = [f for f in members if f not in table.index]
        if unknown:
            raise ShapeMismatch(f"there is no feature {unknown[0]}; they run to {table.index.max()}.", at="together")
        row: dict[str, Any] = {"feature": number, "members": [int(f) for f in members]}
        for column in ("top_tokens", "top_token_ids"):
            row[column] = _interleave([list(table.at[f, column]) for f in members])
        if matched is not None:
            row["matched"] = _joint_placebos([list(matched.get(int(f), ())) for f in members])
        rows.append(row)
    return pd.DataFrame(rows)


def _interleave(lists: Sequence[Sequence[Any]]) -> list[Any]:
    interleaved = [values[i] for i in range(max(map(len, lists))) for values in lists if i < len(values)]
    return list(dict.fromkeys(interleaved))


def _joint_placebos(lists: Sequence[Sequence[int]]) -> list[list[int]]:
    """Sets with one placebo of each member, all different; at most as many as the member with the fewest has."""
    sets = []
    for first in range(min(map(len, lists))):
        chosen: list[int] = []
        for placebos in lists:
            unused = [p for p in (*placebos[first:], *placebos[:first]) if p not in chosen]
            chosen += unused[:1]
        if len(chosen) == len(lists):
            sets.append(chosen)
    return sets
