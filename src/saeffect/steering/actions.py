"""Maps a trial (feature, condition, dose) to the operator applied to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, EmptySelection, Undefined
from saeffect.sae.base import SparseAutoencoder
from saeffect.steering.operators import NO_FEATURE, AddVectors, Operator, SetFeatures
from saeffect.steering.placebos import PLACEBOS, STEERED, UNSTEERED, DrawDirection, redraw_directions
from saeffect.steering.plan import Site, SteeringPlan, check_features

__all__ = ["ActionRow", "Actions", "actions_of", "obstacles"]

Draw = tuple[int, ...]


class ActionRow(NamedTuple):
    """One row of a batch."""

    feature: int
    condition: str
    dose: float
    draw: Draw


@dataclass(frozen=True, eq=False)
class Actions:
    """Operators by feature, condition and dose; made by `actions_of`.

    Under "add" a set of features is pushed along the sum of their decoder rows. Under "clamp" and "ablate" a placebo
    with drawn directions moves each position as far as the features would, along those directions; a placebo feature is
    clamped to the same multiple of its own maximum.

    Attributes:
        table: The checked feature table, sorted by feature.
        members: SAE features of each table row.
        placebo_features: By placebo and feature, the features pushed instead (for sets: sequences), nearest first.
    """

    site: Site
    plan: SteeringPlan
    table: pd.DataFrame
    members: Mapping[int, tuple[int, ...]]
    placebo_features: Mapping[str, Mapping[int, Sequence[Any]]]

    def operator(self, rows: Sequence[ActionRow]) -> Operator:
        """The operator for a batch; "unsteered" rows are left unchanged, bit for bit."""
        if self.plan.operator == "add":
            return AddVectors(torch.stack([self._vector(row) for row in rows]))
        return self._set_features(rows)

    def length(self, feature: int, dose: float) -> float:
        """Length of the added vector, in the activation's units; NaN for "ablate". For "clamp" it is that at a token
        where the feature is off (if the SAE standardises each token, at one of mean norm).
        """
        if self.plan.operator == "ablate":
            return math.nan
        if self.plan.operator == "clamp":
            members = torch.tensor(self.members[feature])
            rows = self._sae.directions(members).detach().float() * self._maxima[members][:, None]
            length, cfg = dose * float(rows.sum(dim=0).norm()), self._sae.cfg
            is_standardised = cfg.normalize_activations == "layer_norm"
            return length * (self.site.mean_norm / math.sqrt(cfg.d_in) if is_standardised else 1.0)
        return dose * (self.site.mean_norm if self.plan.unit == "residual_norm" else self.norm(feature))

    def coefficient(self, feature: int, dose: float) -> float:
        """The multiple of the decoder row that is added; NaN unless the operator is "add"."""
        if self.plan.operator != "add" or self.obstacle(feature, STEERED):
            return 0.0 if dose == 0 else math.nan
        return self.length(feature, dose) / self.norm(feature)

    def norm(self, feature: int) -> float:
        """Norm of the feature's decoder row, or of the sum of its members' rows; `Undefined` for zero."""
        return _vector_length(self._decoder_sum(self.members[feature]), feature)

    def unit(self, feature: int, condition: str, draw: Draw = ()) -> Tensor:
        """Unit vector of the push, float32 `[d_model]`, on the CPU."""
        row = self._decoder_sum(self.pushed_features(feature, condition, draw))
        direction = _placebo_direction(condition)
        if direction is not None:
            return direction(row.cpu(), seed=self.plan.seed, feature=feature, draw=draw)
        return row.cpu() / _vector_length(row, feature)

    def pushed_features(self, feature: int, condition: str, draw: Draw) -> tuple[int, ...]:
        """The SAE features that a trial pushes: the feature's members, or those of its placebo."""
        if condition not in self.placebo_features:
            return self.members[feature]
        placebos = self.placebo_features[condition].get(feature, ())
        if not len(placebos):
            raise EmptySelection(f"feature {feature} has no {PLACEBOS[condition].label} features.", at="placebos")
        placebo = placebos[sum(draw) % len(placebos)]
        return tuple(int(f) for f in placebo) if hasattr(placebo, "__len__") else (int(placebo),)

    def obstacle(self, feature: int, condition: str) -> str:
        """Why a feature cannot be steered under a condition; "" if it can."""
        members = self.members[feature]
        name = f"feature {feature}" if members == (feature,) else f"features {', '.join(map(str, members))}"
        if self.plan.operator == "clamp":
            never_fired = [f for f in members if not float(self._maxima[f]) > 0]
            if never_fired:
                return f"feature {never_fired[0]} never fired on the text, so it has no maximum to clamp it to"
        try:
            self.norm(feature)
        except Undefined:
            return f"the decoder row of {name} is zero, so there is no direction to steer along"
        if condition in self.placebo_features and not len(self.placebo_features[condition].get(feature, ())):
            return f"{name} resembles no feature outside the domain, so there is no {PLACEBOS[condition].label}"
        return ""

    @property
    def _sae(self) -> SparseAutoencoder:
        if self.site.sae is None:
            raise ConfigError(f"the operator {self.plan.operator!r} needs the SAE itself.", at="site", fix="give sae.")
        return self.site.sae

    @property
    def _maxima(self) -> Tensor:
        if self.site.max_acts is None:
            raise ConfigError("clamping needs each feature's largest activation.", at="site", fix="give max_acts.")
        return self.site.max_acts

    def _decoder_sum(self, features: tuple[int, ...]) -> Tensor:
        return self.site.W_dec[list(features)].detach().float().sum(dim=0)

    def _vector(self, row: ActionRow) -> Tensor:
        if row.condition == UNSTEERED:
            return torch.zeros(self.site.W_dec.shape[1])
        return self.length(row.feature, row.dose) * self.unit(row.feature, row.condition, row.draw)

    def _set_features(self, rows: Sequence[ActionRow]) -> SetFeatures:
        sae = self._sae
        pushed = [
            () if r.condition == UNSTEERED else self.pushed_features(r.feature, r.condition, r.draw) for r in rows
        ]
        features = torch.full((len(rows), max(1, *map(len, pushed))), NO_FEATURE, dtype=torch.int64)
        targets = torch.zeros(features.shape)
        for i, (row, ids) in enumerate(zip(rows, pushed, strict=True)):
            features[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            if self.plan.operator == "clamp" and ids:
                if reason := self.obstacle(row.feature, row.condition):
                    raise Undefined(f"{reason}.", at="features", fix="leave it out, or use more text.")
                targets[i, : len(ids)] = row.dose * self._maxima[list(ids)].float()
        drawn_rows = {i: d for i, row in enumerate(rows) if (d := _placebo_direction(row.condition)) is not None}
        directions = None
        if drawn_rows:
            directions = sae.directions(features.clamp_min(0).to(sae.W_dec.device)).detach().float().cpu().clone()
            for i, direction in drawn_rows.items():
                row, decoder_rows = rows[i], directions[i, : len(pushed[i])]
                decoder_rows[:] = redraw_directions(
                    decoder_rows, direction, seed=self.plan.seed, feature=row.feature, draw=row.draw
                )
        return SetFeatures(sae, features, targets, directions, self.site.norm_limit)


def _placebo_direction(condition: str) -> DrawDirection | None:
    return PLACEBOS[condition].direction if condition in PLACEBOS else None


def _vector_length(row: Tensor, feature: int) -> float:
    if not bool(torch.isfinite(row).all()):
        raise BadFile(f"the decoder row of feature {feature} holds NaN or infinity.", at="W_dec")
    length = float(row.norm())
    if length == 0:
        raise Undefined(f"the decoder row of feature {feature} is zero.", at="W_dec", fix="leave this feature out.")
    return length


def actions_of(site: Site, features: pd.DataFrame, plan: SteeringPlan, columns: Sequence[str] = ()) -> Actions:
    """The actions of a plan. The feature table must hold `columns` and those of the planned placebos. ConfigError if
    the operator needs the SAE or the features' maxima, and the site lacks them.
    """
    table = check_features(site, features, (*columns, *plan.placebo_columns))
    ids = table["feature"].tolist()
    members = table["members"] if "members" in table else [[feature] for feature in ids]
    actions = Actions(
        site,
        plan,
        table,
        members={feature: tuple(map(int, ids_of_set)) for feature, ids_of_set in zip(ids, members, strict=True)},
        placebo_features={
            name: dict(zip(ids, map(list, table[column]), strict=True))
            for name in plan.placebos
            if (column := PLACEBOS[name].column)
        },
    )
    if plan.operator != "add":
        _ = actions._sae
    if plan.operator == "clamp":
        _ = actions._maxima
    return actions


def obstacles(site: Site, features: pd.DataFrame, plan: SteeringPlan) -> dict[tuple[int, str], str]:
    """Why features cannot be steered, by (feature, condition); `run_trials` leaves these out."""
    actions = actions_of(site, features, plan)
    reasons = {(feature, c): actions.obstacle(feature, c) for feature in actions.members for c in plan.conditions}
    return {key: reason for key, reason in reasons.items() if reason}
