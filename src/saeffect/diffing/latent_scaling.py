"""How strongly each feature of a crosscoder is present in either model, and which features belong to one model only.

Decoder norms alone mislead: a penalty can shrink one of them to nothing, or split a shared concept into two features.
Latent scaling uses the activations instead: the factor β by which the feature's direction d must be scaled to best
explain its target y in a model, on the tokens where it fires,

    β = d · Σ f y / (‖d‖² Σ f²),

with y the activation minus the reconstruction by the other features ("error"), that reconstruction
("reconstruction"), or both together ("presence"). ν = β of the base model / β of the tuned one. Source: Minder et al.
(2025), Overcoming Sparsity Artifacts in Crosscoders; in closed form, in one pass, with intervals over rows of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.diffing.matched_null import conformal_p, strata
from saeffect.errors import ConfigError, EmptySelection, IncompatibleSae, ShapeMismatch
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.crosscoder import BASE, TUNED, side
from saeffect.sae.entries import SparseEntries
from saeffect.stats.arguments import FloatArray
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.stats.student import fieller

__all__ = ["KINDS", "Cuts", "LatentScaling", "against_nulls", "directions", "null_cuts"]

KINDS = ("shared", "more in tuned", "more in base", "tuned only", "base only")
"""Values of the column `kind`."""

_MIN_STRATUM = 200  # features of like density that are pooled over nulls
# Sums by row of text, each in base and tuned: f · (d · error), f · (d · reconstruction), f · (activation · another
# feature's direction); and f².
_ERROR, _REBUILT, _OTHER, _SQUARE = (0, 1), (2, 3), (4, 5), 6
_N_SUMS = 7


def directions(sae: SparseAutoencoder) -> Tensor:
    """The direction of each feature, float32 `[d_sae, d_model]`: its longer decoder row of the two.

    IncompatibleSae for an SAE of one model.
    """
    if not sae.sides:
        raise IncompatibleSae(
            f"latent scaling needs a crosscoder, and this is a {sae.label} SAE.",
            fix="train one: architecture: crosscoder, with both models in the recipe.",
        )
    base, tuned = (side(sae.W_dec.detach(), model) for model in (BASE, TUNED))
    longer = tuned.norm(dim=1) >= base.norm(dim=1)
    return torch.where(longer[:, None], tuned, base)


class LatentScaling:
    """Sums over batches of text, in constant memory."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self._sae, self._directions = sae, directions(sae)
        n = sae.cfg.d_sae
        self._totals = torch.zeros(_N_SUMS, n, dtype=torch.float64)
        self._products = torch.zeros(_N_SUMS, _N_SUMS, n, dtype=torch.float64)  # summed over rows of text
        self._acts, self._fired, self._rows = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
        self._n_tokens = 0

    @torch.inference_mode()
    def add(self, base: Tensor, tuned: Tensor, mask: Tensor | None = None) -> None:
        """Add both models' activations at the hook of the same rows of text, `[n_rows, n_tokens, d_model]`.

        `mask`, bool `[n_rows, n_tokens]`, says which tokens count. ShapeMismatch if shapes differ or do not fit.
        """
        if base.shape != tuned.shape or base.ndim != 3 or 2 * base.shape[2] != self._sae.cfg.d_in:
            raise ShapeMismatch(
                f"activations are {tuple(base.shape)} and {tuple(tuned.shape)}; expected the same"
                f" [n_rows, n_tokens, {self._sae.cfg.d_in // 2}]."
            )
        counted = torch.ones(base.shape[:2], dtype=torch.bool) if mask is None else mask
        x = torch.cat([base[counted], tuned[counted]], dim=1).float()
        row = counted.nonzero()[:, 0]
        acts = self._sae.encode(x)
        token, feature = acts.nonzero(as_tuple=True)
        entries = SparseEntries(token, feature, acts[token, feature], (len(x), self._sae.cfg.d_sae))
        sums = self._sums(entries, x, self._sae.decode(acts), row, len(base))
        self._totals += sums.sum(dim=0)
        self._products += torch.einsum("rif,rjf->ijf", sums, sums)
        self._rows += (sums[:, _SQUARE] > 0).sum(dim=0)
        self._acts += entries.feature_sums(entries.values).double()
        self._fired += entries.counts()
        self._n_tokens += len(x)

    def _sums(self, entries: SparseEntries, x: Tensor, rebuilt: Tensor, row: Tensor, n_rows: int) -> Tensor:
        """By row of text, float64 `[n_rows, _N_SUMS, d_sae]`."""
        d, f = self._directions, entries.values
        unrelated = d.roll(1, dims=0)  # another feature's direction, scaled to the length of d
        unrelated = unrelated * (d.norm(dim=1) / unrelated.norm(dim=1).clamp_min(1e-12))[:, None]
        sums = torch.zeros(n_rows * self._sae.cfg.d_sae, _N_SUMS, dtype=torch.float64)
        cell = row[entries.token] * self._sae.cfg.d_sae + entries.feature
        columns = [torch.zeros_like(f)] * _N_SUMS
        columns[_SQUARE] = f * f
        for model in (BASE, TUNED):
            bias = side(self._sae.b_dec.detach(), model)
            x_model, rebuilt_model = side(x, model) - bias, side(rebuilt, model) - bias
            own_part = f * entries.per_feature((d * side(self._sae.W_dec.detach(), model)).sum(dim=1))
            columns[_ERROR[model]] = f * (entries.inner(x_model - rebuilt_model, d) + own_part)
            columns[_REBUILT[model]] = f * (entries.inner(rebuilt_model, d) - own_part)
            columns[_OTHER[model]] = f * entries.inner(x_model, unrelated)
        sums.index_add_(0, cell, torch.stack(columns, dim=1).double())
        return sums.view(n_rows, self._sae.cfg.d_sae, _N_SUMS).transpose(1, 2)

    def result(self) -> pd.DataFrame:
        """One row a feature.

        `feature`; `density`, `n_rows` (of text on which it fires); `norm_base`, `norm_tuned` (decoder lengths) and
        `norm_share` (tuned of both); for t in error, reconstruction and presence: `t_base`, `t_tuned` (β), `t_nu` with
        `t_low`, `t_high` (95 %, over rows); `lean` = (tuned - base) / (|tuned| + |base|) of the presence, from -1 (base
        alone) over 0 to 1 (tuned alone), with `low`, `high`; `mean_base`, `mean_tuned` (length that the feature adds
        along its direction, mean per token) and their `difference` with `difference_low`, `difference_high`; `chance`
        (presence of another feature's direction in the model that has less of this one, as a share of this one in the
        model that has more); `reason` where something is NaN. EmptySelection without a token.
        """
        if not self._n_tokens:
            raise EmptySelection("no token counts, so there is nothing to scale.", at="text")
        base, tuned = (side(self._sae.W_dec.detach(), model).norm(dim=1).double().numpy() for model in (BASE, TUNED))
        length = self._directions.norm(dim=1).double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            table: dict[str, FloatArray] = {
                "density": (self._fired / self._n_tokens).numpy(),
                "norm_base": base,
                "norm_tuned": tuned,
                "norm_share": tuned / (base + tuned),
            }
            targets = {"error": (_ERROR,), "reconstruction": (_REBUILT,), "presence": (_ERROR, _REBUILT)}
            for name, terms in targets.items():
                weights_by_model = [_select(*(pair[model] for pair in terms)) for model in (BASE, TUNED)]
                for model, weights in zip(("base", "tuned"), weights_by_model, strict=True):
                    table[f"{name}_{model}"] = self._ratio(weights, _select(_SQUARE))[0] / length**2
                nu, low, high = self._ratio(*weights_by_model)
                table |= {f"{name}_nu": nu, f"{name}_low": low, f"{name}_high": high}
            table |= self._lean(table)
            table |= self._contribution(length)
        frame = pd.DataFrame(table)
        frame.insert(0, "feature", np.arange(len(frame)))
        frame.insert(2, "n_rows", self._rows.long().numpy())
        return frame.assign(reason=pd.Series(self._reasons(frame), dtype="str"))

    def _ratio(self, top: FloatArray, bottom: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The ratio of two weighted sums, and its interval."""
        totals, products = self._totals.numpy(), self._products.numpy()
        sums = (top @ totals, bottom @ totals)
        squares = [np.einsum("i,ijf,j->f", a, products, b) for a, b in ((top, top), (top, bottom), (bottom, bottom))]
        low, high = fieller(sums, (squares[0], squares[1], squares[2]), self._rows.numpy())
        return sums[0] / sums[1], low, high

    def _lean(self, table: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """The columns lean, low, high and chance, from the ratio of the smaller presence to the larger one."""
        presence = [_select(_ERROR[model], _REBUILT[model]) for model in (BASE, TUNED)]
        less = table["presence_base"] < table["presence_tuned"]
        ratios = [self._ratio(presence[model], presence[1 - model]) for model in (BASE, TUNED)]
        ratio, low, high = (np.where(less, a, b) for a, b in zip(ratios[0], ratios[1], strict=True))
        larger = np.maximum(table["presence_base"], table["presence_tuned"])
        present = larger > 0
        sign = np.where(less, 1, -1)
        # 1 for a ratio of 0 or less
        lean = [np.where(present, (1 - r) / (1 + np.abs(r)), np.nan) * sign for r in (ratio, high, low)]
        unrelated = [self._ratio(_select(_OTHER[model]), presence[1 - model])[0] for model in (BASE, TUNED)]
        return {
            "lean": lean[0],
            "low": np.where(less, lean[1], lean[2]),
            "high": np.where(less, lean[2], lean[1]),
            "chance": np.where(present, np.abs(np.where(less, unrelated[0], unrelated[1])), np.nan),
        }

    def _contribution(self, length: FloatArray) -> dict[str, FloatArray]:
        per_token = self._acts.numpy() / self._n_tokens / length
        columns: dict[str, FloatArray] = {}
        presence = [_select(_ERROR[model], _REBUILT[model]) for model in (BASE, TUNED)]
        for name, weights in zip(("mean_base", "mean_tuned"), presence, strict=True):
            columns[name] = self._ratio(weights, _select(_SQUARE))[0] * per_token
        values = self._ratio(presence[TUNED] - presence[BASE], _select(_SQUARE))
        names = ("difference", "difference_low", "difference_high")
        return columns | {name: value * per_token for name, value in zip(names, values, strict=True)}

    @staticmethod
    def _reasons(table: pd.DataFrame) -> list[str]:
        reasons = []
        for n_rows, lean, low in table[["n_rows", "lean", "low"]].itertuples(index=False):
            if n_rows == 0:
                reasons.append("it does not fire on this text")
            elif math.isnan(lean):
                reasons.append("neither model's activations point along it when it fires")
            elif n_rows == 1:
                reasons.append("one row of text shows no spread")
            else:
                reasons.append("too uncertain for an interval" if math.isnan(low) else "")
        return reasons


def _select(*sums: int) -> FloatArray:
    weights = np.zeros(_N_SUMS)
    weights[list(sums)] = 1.0
    return weights


@dataclass(frozen=True)
class Cuts:
    """Thresholds of shared features, from null pairs.

    Attributes:
        base, tuned: A feature with `lean` below `base` or above `tuned` is called changed.
        absent: The largest share that counts as absent, from directions of other features.
        rate: Share of the nulls' features that may be called changed, at both ends together.
        realised: That share in each null with cuts taken from the other nulls; NaN for a single null.
    """

    base: float
    tuned: float
    absent: float
    rate: float
    realised: tuple[float, ...]


def null_cuts(nulls: Sequence[pd.DataFrame], *, rate: float = 0.05) -> Cuts:
    """Cuts from `LatentScaling.result` of crosscoders of the base model and null fine-tunes of it.

    A new feature of a null falls outside with a chance of at most `rate`, half of it at each end (conformal
    prediction); with too few features the cuts are -1 and 1. EmptySelection without nulls; ConfigError for a rate not
    between 0 and 1.

    Example:
        >>> null = pd.DataFrame({"lean": np.linspace(-0.1, 0.1, 199), "chance": np.linspace(0, 0.2, 199)})
        >>> cuts = null_cuts([null], rate=0.05)
        >>> round(cuts.base, 3), round(cuts.tuned, 3), round(cuts.absent, 2)
        (-0.096, 0.096, 0.19)
    """
    if not 0 < rate < 1:
        raise ConfigError(f"a rate of false alarms is between 0 and 1. Got {rate} instead.", at="rate")
    if not nulls:
        raise EmptySelection(
            "there are no nulls to take cuts from.",
            fix="train crosscoders on the base model and fine-tunes that teach nothing new.",
        )
    leans = [_not_nan(null["lean"]) for null in nulls]
    low, high = _cut_ends(np.concatenate(leans), rate)
    realised = []
    for index, null_leans in enumerate(leans):
        others = [lean for number, lean in enumerate(leans) if number != index]
        cuts = _cut_ends(np.concatenate(others), rate) if others else (math.nan, math.nan)
        outside = (null_leans < cuts[0]) | (null_leans > cuts[1])
        realised.append(float(outside.mean()) if others and len(null_leans) else math.nan)
    chance = np.sort(np.concatenate([_not_nan(null["chance"]) for null in nulls]))
    rank = math.ceil((1 - rate) * (len(chance) + 1))
    absent = float(chance[rank - 1]) if 0 < rank <= len(chance) else 0.0
    return Cuts(low, high, absent, rate, tuple(realised))


def _cut_ends(values: FloatArray, rate: float) -> tuple[float, float]:
    ordered = np.sort(values)
    outside = math.floor(rate / 2 * (len(ordered) + 1))
    return (float(ordered[outside - 1]), float(ordered[-outside])) if outside else (-1.0, 1.0)


def _not_nan(values: pd.Series[Any]) -> FloatArray:
    numbers = np.asarray(values, dtype=np.float64)
    return numbers[~np.isnan(numbers)]


def against_nulls(table: pd.DataFrame, nulls: Sequence[pd.DataFrame], *, rate: float = 0.05) -> pd.DataFrame:
    """`LatentScaling.result` with `change` (the lean), `p`, `q` and `kind`, one of `KINDS`.

    `p` is two-sided: the rank of the lean among the leans of features of like density in all nulls. A feature is called
    of one model only if it is outside the cuts, and its share in the other model is at most `Cuts.absent`.
    Without nulls, p and q are NaN, `kind` is empty, and the reason says so.
    """
    result = table.assign(change=table["lean"])
    if not nulls:
        reason = np.where(result["reason"] == "", "there are no null fine-tunes to judge by", result["reason"])
        return result.assign(p=np.nan, q=np.nan, kind="", reason=pd.Series(reason, dtype="str"))
    null = pd.concat(list(nulls), ignore_index=True)
    density = np.concatenate([result["density"].to_numpy(), null["density"].to_numpy()])
    groups = strata(density[:, None], _MIN_STRATUM * (1 + len(nulls)))
    own_groups, null_groups = groups[: len(result)], groups[len(result) :]
    tails = [
        conformal_p(sign * result["lean"].to_numpy(), own_groups, sign * null["lean"].to_numpy(), null_groups)
        for sign in (1, -1)
    ]
    p = np.minimum(1.0, 2 * np.minimum(tails[0], tails[1]))
    return result.assign(p=p, q=benjamini_hochberg(p), kind=_kinds(result, null_cuts(nulls, rate=rate)))


def _kinds(table: pd.DataFrame, cuts: Cuts) -> pd.Series[Any]:
    nu, lean = (np.asarray(table[name], dtype=np.float64) for name in ("presence_nu", "lean"))
    with np.errstate(divide="ignore", invalid="ignore"):
        absent = np.where(lean > 0, nu, 1 / nu) <= cuts.absent
    kinds = np.full(lean.shape, KINDS[0], dtype=object)
    for outside, more, only in ((lean > cuts.tuned, KINDS[1], KINDS[3]), (lean < cuts.base, KINDS[2], KINDS[4])):
        kinds[outside], kinds[outside & absent] = more, only
    kinds[np.isnan(lean)] = ""
    return pd.Series(kinds, index=table.index, dtype="str")
