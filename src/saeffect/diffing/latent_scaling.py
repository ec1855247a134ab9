"""How much of each feature of a crosscoder there is in either model, and which features belong to one alone.

A crosscoder's decoder lengths alone mislead: a penalty can shrink one of them to nothing, or split a shared concept
over two features. Latent scaling asks the activations instead: by which factor β must the feature's direction d be
scaled to explain best what it should explain in a model, on the tokens where it fires,

    β = d · Σ f y / (‖d‖² Σ f²),

with y the activation without what the other features rebuild ("error"), what the other features rebuild along it
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
"""What a feature can be, in the column `kind`."""

_MIN_STRATUM = 200  # features of like density that are pooled over nulls
# What is summed by row of text: f times the direction's product with error and reconstruction, in each model, with
# another feature's direction, and f².
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
    base, tuned = (side(sae.W_dec.detach(), which) for which in (BASE, TUNED))
    longer = tuned.norm(dim=1) >= base.norm(dim=1)
    return torch.where(longer[:, None], tuned, base)


class LatentScaling:
    """Adds up batches of text; memory does not grow with them."""

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
        kept = torch.ones(base.shape[:2], dtype=torch.bool) if mask is None else mask
        x = torch.cat([base[kept], tuned[kept]], dim=1).float()
        row = kept.nonzero()[:, 0]
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
        other = d.roll(1, dims=0)  # a direction that has nothing to do with the feature, as long as itself
        other = other * (d.norm(dim=1) / other.norm(dim=1).clamp_min(1e-12))[:, None]
        found = torch.zeros(n_rows * self._sae.cfg.d_sae, _N_SUMS, dtype=torch.float64)
        place = row[entries.token] * self._sae.cfg.d_sae + entries.feature
        columns = [torch.zeros_like(f)] * _N_SUMS
        columns[_SQUARE] = f * f
        for which in (BASE, TUNED):
            bias = side(self._sae.b_dec.detach(), which)
            whole, parts = side(x, which) - bias, side(rebuilt, which) - bias
            own = f * entries.per_feature((d * side(self._sae.W_dec.detach(), which)).sum(dim=1))
            columns[_ERROR[which]] = f * (entries.inner(whole - parts, d) + own)
            columns[_REBUILT[which]] = f * (entries.inner(parts, d) - own)
            columns[_OTHER[which]] = f * entries.inner(whole, other)
        found.index_add_(0, place, torch.stack(columns, dim=1).double())
        return found.view(n_rows, self._sae.cfg.d_sae, _N_SUMS).transpose(1, 2)

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
        base, tuned = (side(self._sae.W_dec.detach(), which).norm(dim=1).double().numpy() for which in (BASE, TUNED))
        length = self._directions.norm(dim=1).double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            table: dict[str, FloatArray] = {
                "density": (self._fired / self._n_tokens).numpy(),
                "norm_base": base,
                "norm_tuned": tuned,
                "norm_share": tuned / (base + tuned),
            }
            for name, of in (("error", (_ERROR,)), ("reconstruction", (_REBUILT,)), ("presence", (_ERROR, _REBUILT))):
                sides = [_weights(*(pair[which] for pair in of)) for which in (BASE, TUNED)]
                for which, weights in zip(("base", "tuned"), sides, strict=True):
                    table[f"{name}_{which}"] = self._ratio(weights, _weights(_SQUARE))[0] / length**2
                nu, low, high = self._ratio(*sides)
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
        """From the ratio of the model with less to that with more, which is at most 1 in size, whichever that is."""
        presence = [_weights(_ERROR[which], _REBUILT[which]) for which in (BASE, TUNED)]
        less = table["presence_base"] < table["presence_tuned"]
        ends = [self._ratio(presence[which], presence[1 - which]) for which in (BASE, TUNED)]
        ratio, low, high = (np.where(less, a, b) for a, b in zip(ends[0], ends[1], strict=True))
        most = np.maximum(table["presence_base"], table["presence_tuned"])
        known = most > 0
        lean = [np.where(known, _lean_of(values), np.nan) * np.where(less, 1, -1) for values in (ratio, high, low)]
        other = [self._ratio(_weights(_OTHER[which]), presence[1 - which])[0] for which in (BASE, TUNED)]
        return {
            "lean": lean[0],
            "low": np.where(less, lean[1], lean[2]),
            "high": np.where(less, lean[2], lean[1]),
            "chance": np.where(known, np.abs(np.where(less, other[0], other[1])), np.nan),
        }

    def _contribution(self, length: FloatArray) -> dict[str, FloatArray]:
        per_token = self._acts.numpy() / self._n_tokens / length
        found: dict[str, FloatArray] = {}
        sides = [_weights(_ERROR[which], _REBUILT[which]) for which in (BASE, TUNED)]
        for name, weights in zip(("mean_base", "mean_tuned"), sides, strict=True):
            found[name] = self._ratio(weights, _weights(_SQUARE))[0] * per_token
        ends = self._ratio(sides[TUNED] - sides[BASE], _weights(_SQUARE))
        names = ("difference", "difference_low", "difference_high")
        return found | {name: end * per_token for name, end in zip(names, ends, strict=True)}

    @staticmethod
    def _reasons(table: pd.DataFrame) -> list[str]:
        found = []
        for n_rows, lean, low in table[["n_rows", "lean", "low"]].itertuples(index=False):
            if n_rows == 0:
                found.append("it does not fire on this text")
            elif math.isnan(lean):
                found.append("neither model's activations point along it when it fires")
            elif n_rows == 1:
                found.append("one row of text shows no spread")
            else:
                found.append("too uncertain for an interval" if math.isnan(low) else "")
        return found


def _weights(*which: int) -> FloatArray:
    found = np.zeros(_N_SUMS)
    found[list(which)] = 1.0
    return found


def _lean_of(ratio: FloatArray) -> FloatArray:
    """(1 - ratio) / (1 + |ratio|): 1 for a ratio of 0 or less."""
    return np.asarray((1 - ratio) / (1 + np.abs(ratio)), dtype=np.float64)


@dataclass(frozen=True)
class Cuts:
    """Where shared features end, as null pairs show it.

    Attributes:
        base, tuned: A feature with `lean` below `base` or above `tuned` is called changed.
        absent: The largest share that counts as nothing: what directions of other features show.
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
    leans = [_known(null["lean"]) for null in nulls]
    low, high = _ends(np.concatenate(leans), rate)
    realised = []
    for index, own in enumerate(leans):
        others = [lean for number, lean in enumerate(leans) if number != index]
        ends = _ends(np.concatenate(others), rate) if others else (math.nan, math.nan)
        outside = (own < ends[0]) | (own > ends[1])
        realised.append(float(outside.mean()) if others and len(own) else math.nan)
    chance = np.sort(np.concatenate([_known(null["chance"]) for null in nulls]))
    rank = math.ceil((1 - rate) * (len(chance) + 1))
    absent = float(chance[rank - 1]) if 0 < rank <= len(chance) else 0.0
    return Cuts(low, high, absent, rate, tuple(realised))


def _ends(values: FloatArray, rate: float) -> tuple[float, float]:
    ordered = np.sort(values)
    outside = math.floor(rate / 2 * (len(ordered) + 1))
    return (float(ordered[outside - 1]), float(ordered[-outside])) if outside else (-1.0, 1.0)


def _known(values: pd.Series[Any]) -> FloatArray:
    numbers = np.asarray(values, dtype=np.float64)
    return numbers[~np.isnan(numbers)]


def against_nulls(table: pd.DataFrame, nulls: Sequence[pd.DataFrame], *, rate: float = 0.05) -> pd.DataFrame:
    """`LatentScaling.result` with `change` (the lean), `p`, `q` and `kind`, one of `KINDS`.

    `p` is two-sided: how far out the lean is among the nulls' leans of features of like density, all nulls together. A
    feature is of one model only if it is outside the cuts, and in the other model there is no more of it than chance.
    Without nulls, p and q are NaN, `kind` is empty, and the reason says so.
    """
    found = table.assign(change=table["lean"])
    if not nulls:
        why = np.where(found["reason"] == "", "there are no null fine-tunes to judge by", found["reason"])
        return found.assign(p=np.nan, q=np.nan, kind="", reason=pd.Series(why, dtype="str"))
    null = pd.concat(list(nulls), ignore_index=True)
    density = np.concatenate([found["density"].to_numpy(), null["density"].to_numpy()])
    groups = strata(density[:, None], _MIN_STRATUM * (1 + len(nulls)))
    own, theirs = groups[: len(found)], groups[len(found) :]
    tails = [
        conformal_p(sign * found["lean"].to_numpy(), own, sign * null["lean"].to_numpy(), theirs) for sign in (1, -1)
    ]
    p = np.minimum(1.0, 2 * np.minimum(tails[0], tails[1]))
    return found.assign(p=p, q=benjamini_hochberg(p), kind=_kinds(found, null_cuts(nulls, rate=rate)))


def _kinds(table: pd.DataFrame, cuts: Cuts) -> pd.Series[Any]:
    nu, lean = (np.asarray(table[name], dtype=np.float64) for name in ("presence_nu", "lean"))
    with np.errstate(divide="ignore", invalid="ignore"):
        absent = np.where(lean > 0, nu, 1 / nu) <= cuts.absent
    found = np.full(lean.shape, KINDS[0], dtype=object)
    for outside, some, alone in ((lean > cuts.tuned, KINDS[1], KINDS[3]), (lean < cuts.base, KINDS[2], KINDS[4])):
        found[outside], found[outside & absent] = some, alone
    found[np.isnan(lean)] = ""
    return pd.Series(found, index=table.index, dtype="str")
