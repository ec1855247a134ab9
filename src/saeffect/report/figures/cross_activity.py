"""The control's SAE on both models. Which of its features fire more, which less?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from saeffect.comparison import Comparison
from saeffect.diffing.cross_activity import change_scores, most_changed
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import INK, MUTED, ArmStyle, DrawnFigure, clean_axes, new_figure, safe_text
from saeffect.report.words.names import feature_words
from saeffect.report.words.numbers import count

__all__ = ["cross_activity"]

_DOMAIN, _OTHERS = "#009e73", "#9aa4ae"  # green as the domain's words in the lists
_REACH = 3.0  # powers of two; what changed more is drawn on the edge
_NAMED, _APART = 3, 0.42


def cross_activity(comparison: Comparison, styles: Mapping[str, ArmStyle], context: ReportContext) -> DrawnFigure:
    """Each feature's change against how much it fired, domain features in colour."""
    del styles
    cross = comparison.matches.cross_activity
    if cross.empty:
        raise Undefined("the control's SAE was not applied to the treatment's model.")
    rows = _drawable(cross, context.alpha)
    if rows.empty:
        raise Undefined("no feature of the control's SAE fires in both models on this text.")
    figure = new_figure(3.9)
    ax = figure.add_subplot()
    _points(ax, rows[~rows["domain"]], _OTHERS, 1.6, 0.55)
    _points(ax, rows[rows["domain"]], _DOMAIN, 3.4, 0.95)
    _named(ax, rows, context)
    _finish(ax, rows, context)
    found = rows[rows["found"]]
    domain = found[found["domain"]]
    return DrawnFigure(
        name="cross_activity",
        title="Which features fire more after fine-tuning",
        caption=(
            "Each dot is a feature of the control's SAE, applied to both models on the same text: to the right it "
            "fires more, above the line more strongly in the fine-tuned model. "
            f"Green: {context.domain} features. Filled: q ≤ {context.alpha:g} (signs flipped by row of text); hollow: "
            f"not. {_left_out(cross, rows)}{_where_intervals(cross, context)}"
        ),
        alt=(
            f"{count((found['ratio'] > 0).sum())} of {count(len(rows))} features fire more strongly in the fine-tuned "
            f"model and {count((found['ratio'] < 0).sum())} more weakly; of the {count(rows['domain'].sum())} "
            f"{context.domain} features {count((domain['ratio'] > 0).sum())} and {count((domain['ratio'] < 0).sum())}."
        ),
        figure=figure,
        source="comparison/cross_activity.parquet, columns mean_control, mean_treatment, q, is_domain",
    )


def _where_intervals(cross: pd.DataFrame, context: ReportContext) -> str:
    """Where the numbers of single features stand: in a table, if there is one of the most changed."""
    if most_changed(cross, alpha=context.alpha).empty:
        return "No feature changed clearly enough to be listed."
    return "[[table:cross]] has the intervals of the most changed ones."


def _drawable(cross: pd.DataFrame, alpha: float) -> pd.DataFrame:
    rows = cross[(cross["mean_control"] > 0) & (cross["mean_treatment"] > 0)]
    domain = rows["is_domain"].astype(bool) if "is_domain" in rows else pd.Series(False, index=rows.index)
    return pd.DataFrame(
        {
            "feature": rows["feature"],
            "level": np.log10(rows["mean_control"].to_numpy(dtype=float)),
            "ratio": np.log2((rows["mean_treatment"] / rows["mean_control"]).to_numpy(dtype=float)),
            "found": (rows["q"] <= alpha).to_numpy(dtype=bool),
            "domain": domain.to_numpy(dtype=bool),
            "score": change_scores(rows),
        }
    ).reset_index(drop=True)


def _points(ax: Axes, rows: pd.DataFrame, colour: str, size: float, alpha: float) -> None:
    # Dots that fall on one spot are drawn once: thousands of them would weigh down the page.
    seen = rows.assign(x=(rows["level"] / 0.02).round(), y=(rows["ratio"] / 0.03).round())
    seen = seen.drop_duplicates(["x", "y", "found"])
    for found in (False, True):
        some = seen[seen["found"] == found]
        y = some["ratio"].clip(-_REACH, _REACH)
        face = colour if found else "none"
        ax.plot(some["level"], y, "o", color=colour, markerfacecolor=face, markersize=size, alpha=alpha,
                markeredgewidth=0.5)  # fmt: skip


def _named(ax: Axes, rows: pd.DataFrame, context: ReportContext) -> None:
    """Words beside the most changed domain features of either direction, none on top of another."""
    domain = rows[rows["domain"] & rows["found"]]
    words = feature_words(context, "control", set(domain["feature"].astype(int)), 2)
    taken: list[float] = []
    middle = float(rows["level"].median())
    for ways in (domain[domain["ratio"] > 0], domain[domain["ratio"] < 0]):
        n = 0
        for row in ways.sort_values("score", key=np.abs, ascending=False, kind="stable").itertuples():
            y = float(np.clip(row.ratio, -_REACH, _REACH))
            if n == _NAMED or int(row.feature) not in words:
                continue
            if any(abs(y - other) < _APART for other in taken):
                continue
            right = row.level > middle
            ax.annotate(safe_text(words[int(row.feature)], 24), (row.level, y), xytext=(-5 if right else 5, 0),
                        textcoords="offset points", ha="right" if right else "left", va="center", size=7.8, color=INK,
                        bbox={"facecolor": "#ffffff", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip
            taken.append(y)
            n += 1


def _finish(ax: Axes, rows: pd.DataFrame, context: ReportContext) -> None:
    ax.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    reach = min(_REACH, max(1.0, float(rows["ratio"].abs().max()))) * 1.06
    ax.set_ylim(-reach, reach)
    ax.set_yticks(np.arange(-int(reach), int(reach) + 1))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2.0**value:g}×"))
    lowest, highest = int(np.floor(rows["level"].min())), int(np.ceil(rows["level"].max()))
    ax.set_xticks(np.arange(lowest, highest + 1))
    ax.set_xlim(float(rows["level"].min()) - 0.15, float(rows["level"].max()) + 0.15)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10.0**value:g}"))
    ax.set_xlabel("activation per token before fine-tuning")
    ax.set_ylabel("after / before")
    ax.text(0.0, 1.02, f"● {safe_text(context.domain, 20)} features", transform=ax.transAxes, color=_DOMAIN, size=8.5)
    ax.text(1.0, 1.02, "● all others", transform=ax.transAxes, color=MUTED, size=8.5, ha="right")
    clean_axes(ax, grid="y")


def _left_out(cross: pd.DataFrame, rows: pd.DataFrame) -> str:
    fires = (cross["mean_control"] > 0) | (cross["mean_treatment"] > 0)
    missing = int(fires.sum()) - len(rows)
    beyond = int((rows["ratio"].abs() > _REACH).sum())
    text = f"Not drawn: {count(missing)} that fire in one model only. " if missing else ""
    return text + (f"On the edge: {count(beyond)} that changed more than 8×. " if beyond else "")
