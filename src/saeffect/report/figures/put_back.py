"""How much of what fine-tuning does at the hook the most changed features carry: a curve over their number."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from saeffect.comparison import Comparison
from saeffect.diffing.put_back_shares import OWN_WRITING
from saeffect.errors import Undefined
from saeffect.report.context import ReportContext
from saeffect.report.figures.style import (
    DASHED,
    GRID,
    INK,
    MUTED,
    ROLE_STYLES,
    Drawing,
    clean_axes,
    new_figure,
    safe_text,
)
from saeffect.report.words.numbers import count, is_defined, percent
from saeffect.report.words.put_back import text_name, what_it_causes

__all__ = ["draw_shares", "put_back"]

_MEASURES = {"loss": "of the change in loss", "kl": "of the change in predictions (KL)"}
_LEAST, _MOST = -0.25, 1.3  # shares beyond are cut off


def put_back(comparison: Comparison, context: ReportContext) -> Drawing:
    """The study's `draw_shares`."""
    table = comparison.matches.further.get("put_back")
    if table is None or table.empty:
        raise Undefined("no features were put back.")
    return draw_shares(table, subject=context.domain)


def draw_shares(table: pd.DataFrame, *, source: str = "domain", subject: str = "medical", n_named: int = 20) -> Drawing:
    """Share carried by the most changed features over their number, beside matched features and the whole activation.

    `table` is that of `saeffect.diffing.put_back_shares.put_back_table`; `source` is the text, and `subject` what to
    call it; the alternative text names the shares of `n_named` features. Undefined where no share is.
    """
    rows = table[(table["edited"] == "tuned") & table["source"].isin([source, OWN_WRITING])]
    curves = rows[(rows["features"] == "changed") & (rows["source"] == source)]
    if curves.empty:
        raise Undefined(f"no features were put back on text of the source {source!r}.")
    # Of what the model writes itself the share is drawn where the text has none.
    drawn: dict[str, pd.DataFrame] = {}
    for measure in _MEASURES:
        for on in (source, OWN_WRITING):
            mine = rows[(rows["features"] == "changed") & (rows["measure"] == measure) & (rows["source"] == on)]
            if measure not in drawn and _has_share(mine):
                drawn[measure] = mine
    if not drawn:
        raise Undefined(f"{curves['reason'].iloc[0]}.")
    figure = new_figure(0.55 + 2.25 * len(drawn))
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (measure, mine) in zip(panels, drawn.items(), strict=True):
        on = str(mine["source"].iloc[0])
        of_text = rows[(rows["measure"] == measure) & (rows["features"] == "whole") & (rows["source"] == on)]
        _curve(ax, mine)
        ax.set_title(f"Share {_MEASURES[measure]} on {text_name(on, safe_text(subject, 20))}", size=8.8)
        ax.text(0.01, 1.0, f" the whole activation: {abs(of_text['whole'].iloc[0]):.2g} nats a token", size=7.8,
                color=MUTED, transform=ax.get_yaxis_transform(), va="bottom")  # fmt: skip
    panels[-1].set_xlabel("features put back, the most changed first")
    missing = [_MEASURES[measure] for measure in _MEASURES if measure not in drawn]
    reasons = curves[~curves["measure"].isin(drawn)]["reason"]
    return Drawing(
        figure,
        "While the fine-tuned model reads, features at the hook get the values that they have in the base model, and "
        "the rest of the model runs as it is. Orange: the features that changed most, found on other text. Grey: as "
        "many others that fire as often and as strongly, drawn anew for each text. At the dashed line the whole "
        "activation is put back; what all features leave to it is what the SAE does not rebuild. Bands: 95 % intervals "
        f"over {count(curves['n_rows'].iloc[0])} texts."
        + (f" The share {missing[0]} is undefined: {reasons.iloc[0]}." if missing else ""),
        what_it_causes(table, subject, n_named, source)
        or f"All features carry {percent(curves['share'].iloc[-1], 0)}.",
    )


def _has_share(rows: pd.DataFrame) -> bool:
    return bool((rows["kind"] == "own").any() and is_defined(rows.loc[rows["kind"] == "own", "share"].iloc[0]))


def _curve(ax: Axes, rows: pd.DataFrame) -> None:
    own = rows[rows["kind"] == "own"].sort_values("n_features")
    matched = rows[(rows["kind"] == "matched") & rows["share"].notna()].sort_values("n_features")
    style = ROLE_STYLES["treatment"]
    n_all = int(own["n_features"].iloc[-1])
    ax.axhline(0, color=GRID, linewidth=0.8)
    ax.axhline(1, **DASHED)
    for mine, colour, marker, name in ((matched, MUTED, None, "matched"), (own, style.colour, "o", "most changed")):
        if mine.empty:
            continue
        x, share, low, high = (mine[c].to_numpy(dtype=np.float64) for c in ("n_features", "share", "low", "high"))
        ax.fill_between(x, low.clip(_LEAST, _MOST), high.clip(_LEAST, _MOST), color=colour, alpha=0.22, linewidth=0)
        ax.plot(x, share.clip(_LEAST, _MOST), color=colour, marker=marker, markersize=4, linewidth=1.4)
        # Matched sets end before all features, so there is room behind them.
        up = name == "most changed"
        place = len(x) // 2 if up else -1
        ax.annotate(name, (x[place], share.clip(_LEAST, _MOST)[place]), xytext=(-4, 8) if up else (6, 0),
                    textcoords="offset points", ha="right" if up else "left", va="bottom" if up else "center",
                    color=colour if up else INK, size=8.2)  # fmt: skip
    ends = rows.loc[rows["kind"] != "difference", ["low", "high"]].to_numpy(dtype=np.float64)
    least, most = np.nanmin(ends, initial=0.0), np.nanmax(ends, initial=1.0)
    ax.set_ylim(max(_LEAST, min(-0.05, least - 0.03)), min(_MOST, max(1.16, most + 0.05)))
    ax.set_xscale("log")
    ticks = own["n_features"].astype(int).tolist()
    ax.set_xticks(ticks, [*(f"{n:,}" for n in ticks[:-1]), f"all\n{n_all:,}"])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %".replace("-", "−"))
    clean_axes(ax, grid="y")
