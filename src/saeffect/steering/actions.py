"""From what a trial is called (feature, condition, dose) to what is done to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import ConfigError, Undefined
from saeffect.sae.base import SparseAutoencoder
from saeffect.steering.feature_operators import NO_FEATURE, SetFeatures
from saeffect.steering.operators import AddVectors, Operator
from saeffect.steering.placebo import STEERED, UNSTEERED, Directions, turned_at_random
from saeffect.steering.plan import Site, SteeringPlan

__all__ = ["ActionRow", "Actions", "actions_of", "obstacles"]


class ActionRow(NamedTuple):
    """One row of a batch: which feature, under which condition, how strongly, and on which prompt and sample."""

    feature: int
    condition: str
    dose: float
    draw: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Actions:
    """Operators by feature, condition and dose; made by `actions_of`.

    Under "clamp" and "ablate" a random placebo is pushed at each position as far as the feature would be, but
    along a random direction (several features as far as all of them together); a matched placebo feature is clamped
    to the same multiple of its own maximum.

    Attributes:
        site: Model, hook, and what is there.
        directions: Decoder rows, placebo features and random directions.
        plan: Gives the operator and the unit of doses.
    """

    site: Site
    directions: Directions
    plan: SteeringPlan

    def operator(self, rows: Sequence[ActionRow]) -> Operator:
        """What is done to a batch, one row of it each; "unsteered" rows are left as they are, bit for bit.

        Raises:
            SaeffectError: A row is impossible, see `obstacle`.
        """
        if self.plan.operator == "add":
            return AddVectors(torch.stack([self._vector(row) for row in rows]))
        return self._setting(rows)

    def length(self, feature: int, dose: float) -> float:
        """Length of what a dose adds, in the activation's units; for "clamp", to a token where the feature is off.

        NaN for "ablate": what it takes away is another length at each token. An SAE that standardises each token
        puts its features back on the token's own scale; here that is a token of the mean norm.
        """
        if self.plan.operator == "ablate":
            return float("nan")
        if self.plan.operator == "clamp":
            sae, maxima = self._sae, self._maxima
            members = torch.tensor(self.directions.of(feature, STEERED))
            rows = sae.directions(members).detach().float() * maxima[members][:, None]
            return dose * float(rows.sum(dim=0).norm()) * self._token_scale
        return dose * (self.site.mean_norm if self.plan.unit == "residual_norm" else self.directions.norm(feature))

    def coefficient(self, feature: int, dose: float) -> float:
        """The multiple of the decoder row that is added; NaN unless the operator is "add"."""
        if self.plan.operator != "add" or self.obstacle(feature, STEERED):
            return 0.0 if dose == 0 else float("nan")
        return self.length(feature, dose) / self.directions.norm(feature)

    def obstacle(self, feature: int, condition: str) -> str:
        """Why a feature cannot be steered under a condition, "" if it can."""
        members = self.directions.of(feature, STEERED)
        called = f"feature {feature}" if members == (feature,) else f"features {', '.join(map(str, members))}"
        if self.plan.operator == "clamp":
            silent = [f for f in members if not float(self._maxima[f]) > 0]
            if silent:
                return f"feature {silent[0]} never fired on the text, so it has no maximum to clamp it to"
        try:
            self.directions.norm(feature)
        except Undefined:
            return f"the decoder row of {called} is zero, so there is no direction to steer along"
        if condition == "matched" and not len(self.directions.matched.get(feature, ())):
            return f"{called} resembles no feature outside the domain, so there is no matched placebo"
        return ""

    @property
    def _sae(self) -> SparseAutoencoder:
        if self.site.sae is None:
            raise ConfigError(f"the operator {self.plan.operator!r} needs the SAE itself.", at="site", fix="give sae.")
        return self.site.sae

    @property
    def _token_scale(self) -> float:
        cfg = self._sae.cfg
        return self.site.mean_norm / math.sqrt(cfg.d_in) if cfg.normalize_activations == "layer_norm" else 1.0

    @property
    def _maxima(self) -> Tensor:
        if self.site.max_acts is None:
            raise ConfigError("clamping needs each feature's largest activation.", at="site", fix="give max_acts.")
        return self.site.max_acts

    def _vector(self, row: ActionRow) -> Tensor:
        if row.condition == UNSTEERED:
            return torch.zeros(self.directions.W_dec.shape[1])
        return self.length(row.feature, row.dose) * self.directions.unit(row.feature, row.condition, row.draw)

    def _setting(self, rows: Sequence[ActionRow]) -> SetFeatures:
        sae = self._sae
        members = [() if r.condition == UNSTEERED else self.directions.of(r.feature, r.condition, r.draw) for r in rows]
        features = torch.full((len(rows), max(1, *map(len, members))), NO_FEATURE, dtype=torch.int64)
        targets = torch.zeros(features.shape)
        for i, (row, some) in enumerate(zip(rows, members, strict=True)):
            if not some:
                continue
            features[i, : len(some)] = torch.tensor(some)
            if self.plan.operator == "clamp":
                if reason := self.obstacle(row.feature, row.condition):
                    raise Undefined(f"{reason}.", at="features", fix="leave it out, or use more text.")
                targets[i, : len(some)] = row.dose * self._maxima[list(some)].float()
        along = None
        if any(row.condition == "random" for row in rows):
            along = sae.directions(features.clamp_min(0).to(sae.W_dec.device)).detach().float().cpu().clone()
            for i, row in enumerate(rows):
                if row.condition == "random":
                    own = along[i, : len(members[i])]
                    along[i, : len(own)] = turned_at_random(own, self.plan.seed, row.feature, row.draw)
        return SetFeatures(sae, features, targets, along, self.site.norm_limit)


def actions_of(site: Site, W_dec: Tensor, features: pd.DataFrame, plan: SteeringPlan) -> Actions:
    """The actions of a plan on a feature table that `check_features` let pass.

    Args:
        site: Model, hook, and what is there.
        W_dec: Decoder, `[d_sae, d_model]`.
        features: Columns feature; matched (its placebo features, see `matched_features`) if that placebo is
            planned; members (list of int) where rows stand for several features at once.
        plan: What is to be run.

    Raises:
        ConfigError: The operator needs the SAE or the features' maxima, and the site has them not.
    """
    ids = [int(f) for f in features["feature"]]

    def lists(column: str) -> Mapping[int, Sequence[int]]:
        return dict(zip(ids, map(list, features[column]), strict=True)) if column in features else {}

    matched = lists("matched") if plan.feature_columns else {}
    made = Actions(site, Directions(W_dec, plan.seed, matched, lists("members")), plan)
    if plan.operator != "add":
        _ = made._sae
    if plan.operator == "clamp":
        _ = made._maxima
    return made


def obstacles(site: Site, W_dec: Tensor, features: pd.DataFrame, plan: SteeringPlan) -> dict[tuple[int, str], str]:
    """Which features cannot be steered under which condition, and why; `run_trials` leaves these out.

    Returns:
        Reason by (feature, condition).
    """
    made = actions_of(site, W_dec, features, plan)
    found = {(int(f), c): made.obstacle(int(f), c) for f in features["feature"] for c in plan.conditions}
    return {key: reason for key, reason in found.items() if reason}
