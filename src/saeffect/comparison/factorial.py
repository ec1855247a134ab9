"""SAE × model, crossed: what the model does with the SAE held fixed, what the SAE does with the model held fixed.

Each arm's SAE is read and steered on both models. Write (s, m) for the SAE of arm s on the model of arm m, c for the
control and t for the treatment. The paper compares (t,t) with (c,c), where both differ. That difference is split:

- model: ½[(c,t) − (c,c) + (t,t) − (t,c)], the same features in two models, paired;
- dictionary: ½[(t,c) − (c,c) + (t,t) − (c,t)], the features of two SAEs, which are not the same features;
- both: (t,t) − (c,c), which is model + dictionary exactly;
- rest: ½[(t,t) − (t,c) − (c,t) + (c,c)], half of how much the model's effect depends on the SAE:
  (c,t) − (c,c) is model − rest, and (t,t) − (t,c) is model + rest.

Intervals are over features and prompts (or rows of text) together, see `two_way_mean`. They hold for these two SAEs:
none includes the noise of SAE seeds, which matters for the dictionary's effect alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.comparison.arms import Roles
from saeffect.errors import ShapeMismatch
from saeffect.stats.arguments import FloatArray, Resampling
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.nested import complete_tables, two_way_mean
from saeffect.stats.permutation import permutation_test, sign_flip_many
from saeffect.stats.proportions import bounded_mean, newcombe_difference, paired_difference, sum_of_independent
from saeffect.stats.student import cautious_difference

__all__ = [
    "CROSSED",
    "CROSSED_COLUMNS",
    "EFFECTS",
    "FACTORIAL_COLUMNS",
    "WHOLE_SAE",
    "Cells",
    "CrossedQuantity",
    "against_nulls",
    "factorial",
    "no_factorial",
    "paired_change",
    "split_cells",
]

EFFECTS = ("model", "dictionary", "rest", "both")
CROSSED_COLUMNS = ("feature", "model", "quantity", "value", "values", "unit", "reason")
FACTORIAL_COLUMNS = (
    *("quantity", "label", "effect", "estimate", "low", "high", "p", "unit", "n_features", "n_prompts", "reason"),
    *("error", "freedom", "mean_cc", "mean_ct", "mean_tc", "mean_tt", "null_mean", "null_p", "n_nulls"),
)
WHOLE_SAE = -1
"""In place of a feature's number, for what an SAE has as a whole."""

_WEIGHTS = {"model": (0.5, 0.5), "dictionary": (-1.0, 1.0), "rest": (-0.5, 0.5), "both": (-1.0, 1.0)}


@dataclass(frozen=True)
class CrossedQuantity:
    """One quantity that is measured in all four cells.

    Attributes:
        group: Its word in a study's `comparison.crossed`.
        kind: "table": a number for every feature and prompt (or row of text); "features": one a feature; "share": of
            features, each 0 or 1; "whole": a number for every row of text, of the SAE as a whole.
        over: What features are crossed with: "prompts", "rows of text" or "".
    """

    name: str
    label: str
    unit: str
    group: str
    kind: Literal["table", "features", "share", "whole"]
    over: str = ""


_ALL = (
    CrossedQuantity("direct_effect", "Direct effect beyond placebo", "nats", "direct_effect", "table", "prompts"),
    CrossedQuantity(
        "steering_effect", "Effect of steering beyond placebo", "cosine similarity", "steering", "table", "prompts"
    ),
    CrossedQuantity("pass_rate", "Share of features that pass", "share", "steering", "share"),
    CrossedQuantity("density", "Density", "share of tokens", "activity", "table", "rows of text"),
    CrossedQuantity("activation", "Mean activation a token", "activation", "activity", "table", "rows of text"),
    CrossedQuantity("coherence", "Coherence", "coherence", "coherence", "features"),
    CrossedQuantity("explained_variance", "Explained variance", "share", "reconstruction", "whole", "rows of text"),
    CrossedQuantity("ce_loss_score", "CE loss score", "share", "reconstruction", "whole", "rows of text"),
)
CROSSED: dict[str, CrossedQuantity] = {quantity.name: quantity for quantity in _ALL}
"""Every crossed quantity by name, in the order of the table."""


def factorial(
    crossed: Mapping[str, pd.DataFrame],
    roles: Roles,
    *,
    groups: Iterable[str] = ("direct_effect", "activity", "coherence", "reconstruction", "steering"),
    nulls: Mapping[str, Sequence[float]] | None = None,
    unmeasured: str = "",
    resampling: Resampling | None = None,
) -> pd.DataFrame:
    """The effects of model and dictionary on every quantity of the requested `groups` (a study's `comparison.crossed`).

    Args:
        crossed: By arm (control and treatment), its SAE on both models, `CROSSED_COLUMNS`: feature; model (an arm's
            name); quantity; value (mean of `values`, or of one number a feature that number); values (list of float, by
            prompt or row of text, the same ones everywhere; empty where there are none); unit; reason.
        nulls: By quantity, (c,n) − (c,c) of null fine-tunes n: see `against_nulls`.
        unmeasured: Why features' quantities were not measured: the `reason` of cells without values.
        resampling: For p of shares.

    Returns:
        One row per quantity and effect: quantity; label; effect (of `EFFECTS`, see the module); estimate with its 95 %
            interval low, high and two-sided p; unit; n_features of both SAEs (0 for a whole SAE) and n_prompts or rows
            of text (0 where there are none) behind it; reason; error and freedom (NaN for shares); mean_cc, mean_ct,
            mean_tc, mean_tt, the cells, first letter the SAE; null_mean, null_p and n_nulls, in rows of the model's
            effect.

    `ShapeMismatch` if a column is missing, or the cells have other numbers of values.
    """
    wanted, resampling = set(groups), resampling or Resampling()
    rows: list[dict[str, Any]] = []
    for quantity in CROSSED.values():
        if quantity.group in wanted:
            cells = _cells(crossed, roles, quantity)
            if not cells.available and unmeasured:
                cells = replace(cells, reason=unmeasured)
            rows += split_cells(quantity, cells, resampling, (nulls or {}).get(quantity.name, ()))
    return pd.DataFrame(rows, columns=list(FACTORIAL_COLUMNS))


def no_factorial(groups: Iterable[str], reason: str) -> pd.DataFrame:
    """The table of `factorial` where nothing could be measured, with the `reason`."""
    wanted, no_cells = set(groups), Cells((), (), reason)
    rows = [
        row
        for quantity in CROSSED.values()
        if quantity.group in wanted
        for row in split_cells(quantity, no_cells, Resampling())
    ]
    return pd.DataFrame(rows, columns=list(FACTORIAL_COLUMNS))


def against_nulls(value: float, nulls: Sequence[float]) -> Estimate:
    """Distance of one fine-tune's number from the numbers of null fine-tunes.

    Value: the number minus the nulls' mean, with a 95 % interval for one more null (Student's t; NaN for fewer than
    two, or equal ones). p: the share of all K + 1 numbers that lie at least as far from their mean, never below
    1 / (K + 1).

    Example:
        >>> excess = against_nulls(-0.8, [0.1, 0.0, -0.1, 0.0])
        >>> round(excess.value, 6), excess.p, excess.high < 0
        (-0.8, 0.2, True)
    """
    numbers = np.array([*nulls, value], dtype=np.float64)
    if not len(nulls) or not np.isfinite(numbers).all():
        return undefined("no null fine-tune was measured" if not len(nulls) else "a value is not finite", len(nulls))
    distance = np.abs(numbers - numbers.mean())
    p = float((distance >= distance[-1] * (1 - 1e-12)).mean())
    excess = cautious_difference(numbers[:-1], numbers[-1:])
    reason = "one null shows no spread" if len(nulls) == 1 else excess.reason
    return replace(excess, n=len(nulls), p=p, reason=reason)


@dataclass(frozen=True, eq=False)
class Cells:
    """Values of the control's and of the treatment's SAE, in the control's and in the treatment's model.

    Each is a complete float64 [n_features, n_prompts] (one column without prompts, one row for a whole SAE). `reason`:
    what was left out, or why the cells are empty.
    """

    on_control: tuple[FloatArray, ...]
    on_treatment: tuple[FloatArray, ...]
    reason: str = ""

    @property
    def available(self) -> bool:
        return len(self.on_control) == 2 and all(table.size for table in self.on_control)

    def means(self) -> dict[str, float]:
        names = ("mean_cc", "mean_tc", "mean_ct", "mean_tt")
        if not self.available:
            return dict.fromkeys(names, math.nan)
        tables = (*self.on_control, *self.on_treatment)
        return {name: float(table.mean()) for name, table in zip(names, tables, strict=True)}

    def tables(self, effect: str) -> list[FloatArray]:
        """One table per SAE; the sum of their means, weighted by `_WEIGHTS`, is the effect."""
        pairs = list(zip(self.on_control, self.on_treatment, strict=True))
        if effect in ("model", "rest"):
            return [after - before for before, after in pairs]
        if effect == "dictionary":
            return [(before + after) / 2 for before, after in pairs]
        return [pairs[0][0], pairs[1][1]]


def _cells(crossed: Mapping[str, pd.DataFrame], roles: Roles, quantity: CrossedQuantity) -> Cells:
    models, measured, reasons = (roles.control, roles.treatment), [], []
    for sae in models:
        table = crossed[sae]
        missing = [name for name in CROSSED_COLUMNS if name not in table]
        if missing:
            raise ShapeMismatch(f"the crossed table lacks the column(s) {', '.join(missing)}.", at=sae)
        rows = table[table["quantity"] == quantity.name]
        reasons += [reason for reason in rows["reason"] if reason]
        measured.append(_paired_matrices([rows[rows["model"] == model] for model in models], quantity))
    if not all(len(part) for pair in measured for part in pair):
        return Cells((), (), reasons[0] if reasons else f"no {quantity.name.replace('_', ' ')} was measured")
    if len({part.shape[1] for pair in measured for part in pair}) > 1:
        raise ShapeMismatch(f"the cells of {quantity.name} have other numbers of values.", at="values")
    complete_rows, columns = complete_tables([before + after for before, after in measured])
    complete = [
        [part[np.ix_(rows, columns)] for part in pair] for pair, rows in zip(measured, complete_rows, strict=True)
    ]
    n_dropped = (
        sum(len(pair[0]) for pair in measured) - sum(map(len, complete_rows)),
        measured[0][0].shape[1] - len(columns),
    )
    dropped = zip(("features", quantity.over), n_dropped, strict=True)
    notes = [f"{what} left out, being undefined in a cell: {n}" for what, n in dropped if n]
    cause = f"; {reasons[0]}" if notes and reasons else ""
    before, after = zip(*complete, strict=True)
    return Cells(before, after, "; ".join(notes) + cause)


def paired_change(before: pd.DataFrame, after: pd.DataFrame, quantity: CrossedQuantity) -> float:
    """Mean of after − before over the features and columns of `values` that are defined in both, from two cells of one
    SAE, `CROSSED_COLUMNS` of this quantity; NaN without any.
    """
    values = _paired_matrices([before, after], quantity)
    if not len(values[0]):
        return math.nan
    change = values[1] - values[0]
    rows, columns = complete_tables([change])
    complete = change[np.ix_(rows[0], columns)]
    return float(complete.mean()) if complete.size else math.nan


def _paired_matrices(cells: Sequence[pd.DataFrame], quantity: CrossedQuantity) -> list[FloatArray]:
    """Values of two cells of one SAE, of the features that both have."""
    parts = [rows.set_index("feature").sort_index() for rows in cells]
    common = parts[0].index.intersection(parts[1].index)
    return [_matrix(part.loc[common], quantity) for part in parts]


def _matrix(rows: pd.DataFrame, quantity: CrossedQuantity) -> FloatArray:
    """Values of one cell, float64 [n_features, n_prompts]."""
    if quantity.over and len(rows):
        lists = [np.asarray(list(values), dtype=np.float64) for values in rows["values"]]
        longest = max(map(len, lists))
        return np.stack([values if len(values) else np.full(longest, math.nan) for values in lists])
    return np.asarray(rows["value"].to_numpy(dtype=np.float64)[:, None])


def split_cells(
    quantity: CrossedQuantity, cells: Cells, resampling: Resampling, nulls: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """The rows of `factorial` of one quantity, one an effect."""
    means, rows = cells.means(), list[dict[str, Any]]()
    for effect in EFFECTS:
        error = freedom = math.nan
        if not cells.available:
            estimate = undefined(cells.reason)
        elif quantity.kind == "share":
            estimate = _SHARES[effect](cells, resampling)
        else:
            tables, weights = cells.tables(effect), _WEIGHTS[effect]
            if quantity.kind == "whole":  # all cells have the same rows of text: one number a row
                result = two_way_mean([(weights[0] * tables[0] + weights[1] * tables[1]).T])
            else:
                result = two_way_mean(tables, weights)
            estimate, error, freedom = result.estimate, result.error, result.freedom
            if effect in ("model", "rest") and not any(table.any() for table in tables):
                estimate = undefined("no value differs between the models", estimate.n, 0.0)
        n_columns = cells.on_control[0].shape[1] if cells.available and quantity.over else 0
        n_features = sum(map(len, cells.on_control)) if cells.available and quantity.kind != "whole" else 0
        row: dict[str, Any] = {
            "quantity": quantity.name,
            "label": quantity.label,
            "effect": effect,
            "unit": quantity.unit,
        }
        row |= {"estimate": estimate.value, "low": estimate.low, "high": estimate.high, "p": estimate.p}
        row |= {"n_features": n_features, "n_prompts": n_columns, "error": error, "freedom": freedom, **means}
        reasons = (cells.reason, estimate.reason) if cells.available else (estimate.reason,)
        row["reason"] = "; ".join(filter(None, reasons))
        rows.append(row | _null_columns(means["mean_ct"] - means["mean_cc"], nulls if effect == "model" else ()))
    return rows


def _null_columns(value: float, nulls: Sequence[float]) -> dict[str, Any]:
    estimate = against_nulls(value, nulls)
    mean = value - estimate.value if len(nulls) else math.nan
    return {"null_mean": mean, "null_p": estimate.p, "n_nulls": len(nulls)}


# Shares of features: the two SAEs have different features, so their shares are independent.
def _model_share(cells: Cells, resampling: Resampling) -> Estimate:
    parts, changes = _paired_changes(cells)
    estimate = sum_of_independent(parts, _WEIGHTS["model"])
    # Under the null a feature's change has a random sign; features of the smaller SAE weigh more.
    weighted = np.concatenate([change[change != 0] / len(change) for change in changes])
    seed, n = resampling.seed_for("crossed", "model"), resampling.n_permutations
    p = sign_flip_many(weighted[None], alternative="two-sided", n_permutations=n, seed=seed)
    return replace(estimate, p=float(p[0]) if len(weighted) else 1.0)


def _rest_share(cells: Cells, resampling: Resampling) -> Estimate:
    parts, changes = _paired_changes(cells)
    return _add_permutation_p(sum_of_independent(parts, _WEIGHTS["rest"]), changes, resampling, "rest")


def _dictionary_share(cells: Cells, resampling: Resampling) -> Estimate:
    values = [table[:, 0] for table in cells.tables("dictionary")]
    estimate = sum_of_independent([bounded_mean(part) for part in values], _WEIGHTS["dictionary"])
    return _add_permutation_p(estimate, values, resampling, "dictionary")


def _both_share(cells: Cells, _: Resampling) -> Estimate:
    a, b = cells.tables("both")
    return newcombe_difference(int(a.sum()), len(a), int(b.sum()), len(b))


def _paired_changes(cells: Cells) -> tuple[list[Estimate], list[FloatArray]]:
    pairs = [(before[:, 0], after[:, 0]) for before, after in zip(cells.on_control, cells.on_treatment, strict=True)]
    return [paired_difference(*pair) for pair in pairs], [after - before for before, after in pairs]


def _add_permutation_p(
    estimate: Estimate, parts: Sequence[npt.NDArray[np.float64]], resampling: Resampling, name: str
) -> Estimate:
    seed = resampling.seed_for("crossed", name)
    p = permutation_test(parts[0], parts[1], n_permutations=resampling.n_permutations, seed=seed)
    return replace(estimate, p=p)


_SHARES: Mapping[str, Callable[[Cells, Resampling], Estimate]] = {
    "model": _model_share,
    "dictionary": _dictionary_share,
    "rest": _rest_share,
    "both": _both_share,
}
