"""The figure of the results: speed against the limit, losses over the same steps, differences of losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_summary import MAIN, PAIRS, limit

__all__ = ["draw"]

OURS, PEER, PLAIN, GREY = "#0b6e69", "#b9c4cc", "#8b9aa5", "#4a4a4a"
COLOURS = {
    "sae_lens": "#c0504d",
    "sae_lens_sparse": "#e0a030",
    "dictionary_learning": "#8f6bb1",
    "dictionary_learning_april": "#c48fd0",
    "sparsify_adam": "#5b8bd0",
    "plain": "#8b9aa5",
    "saeffect": OURS,
    "saeffect_free": "#4fb3a8",
    "saeffect_bf16": "#14403d",
}
TITLES = {"l1": "L1", "topk": "TopK"}


def draw(results: dict[str, Any], stem: Path) -> None:
    """Write `stem`.svg and `stem`.png, L1 left and TopK right; parts that were not measured stay empty."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "saeffect"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(3, 2, figsize=(11.5, 10.6), height_ratios=(1.35, 1, 0.8), layout="constrained")
        for column, architecture in enumerate(("l1", "topk")):
            case = results["speed"].get(MAIN[architecture]) or _any_case(results, architecture)
            curves = results["curves"].get(architecture)
            for row, (part, data) in enumerate(((_bars, case), (_losses, curves), (_differences, curves))):
                if data is None:
                    axes[row][column].set_axis_off()
                else:
                    part(axes[row][column], data, TITLES[architecture])
        figure.get_layout_engine().set(rect=(0, 0.1, 1, 0.9))  # room for the legends below
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"), dpi=150)
        plt.close(figure)


def _any_case(results: dict[str, Any], architecture: str) -> dict[str, Any] | None:
    return next((case for name, case in results["speed"].items() if name.startswith(architecture)), None)


def _bars(ax: Any, case: dict[str, Any], title: str) -> None:
    contenders = sorted(case["contenders"].items(), key=lambda item: item[1]["tokens_per_second"])
    speeds = [contender["tokens_per_second"] for _, contender in contenders]
    limits = {"float32": limit(case), "bfloat16": limit(case, "bfloat16")}
    x_max = 1.08 * max(*speeds, *limits.values())
    for dtype, value in limits.items():
        ax.axvline(value, color=OURS, linestyle="--" if dtype == "float32" else ":", linewidth=1, zorder=1)
        text = f"limit with\n{dtype}\nproduct"
        style = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        ax.annotate(text, (value, -0.45), **style, fontsize=7.5, color=OURS).set_in_layout(False)
    for row, (speed, (key, contender)) in enumerate(zip(speeds, contenders, strict=True)):
        ax.barh(
            row, speed, color=OURS if contender["ours"] else PLAIN if key == "plain" else PEER, height=0.72, zorder=2
        )
        spread = [case["batch"] / seconds for seconds in (max(contender["seconds"]), min(contender["seconds"]))]
        ax.plot(spread, (row, row), color=GREY if not contender["ours"] else "#cfe3e1", linewidth=1.2, zorder=3)
        text = f"{speed:,.0f}   {contender['peak_rss'] / 1e9:.2f} GB"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        ax.text(max(spread[1], speed) + 0.012 * x_max, row, text, va="center", color=GREY, fontsize=8, bbox=box)
    ax.set_yticks(range(len(contenders)), [contender["label"] for _, contender in contenders])
    ax.set_xlim(0, x_max)
    ax.set_ylim(-0.6, len(contenders) - 0.4)
    ax.set_xlabel("tokens/s (median; thin line: range of steps) and peak memory")
    ax.set_title(f"{title}: {case['d_sae']:,} features, batch {case['batch']:,}", loc="left", fontweight="bold")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.tick_params(axis="y", length=0)


def _losses(ax: Any, curves: dict[str, Any], title: str) -> None:
    for key, contender in curves["contenders"].items():
        steps, mses = [row[0] for row in contender["losses"]], [row[1] for row in contender["losses"]]
        dash = {"saeffect": (0, (5, 3)), "saeffect_free": (0, (2, 2)), "saeffect_bf16": (0, (1, 4))}.get(key, "-")
        width = 2.0 if contender["ours"] else 1.3
        ax.plot(steps, mses, color=COLOURS[key], linestyle=dash, linewidth=width, label=contender["label"])
    ax.set_ylabel("squared error a token")
    ax.set_xlabel(f"steps of {curves['batch']:,} tokens")
    ax.set_title(f"{title}: loss, {curves['d_sae']:,} features", loc="left", fontweight="bold")
    ax.legend(frameon=False, fontsize=7.5, loc="upper right").set_in_layout(False)


def _differences(ax: Any, curves: dict[str, Any], title: str) -> None:
    contenders = curves["contenders"]
    for ours, other in PAIRS:
        if not {ours, other} <= set(contenders):
            continue
        rows = list(zip(contenders[ours]["losses"], contenders[other]["losses"], strict=True))[1:]
        differences = [max(abs(a[1] - b[1]) / b[1], 1e-9) for a, b in rows]
        pair = f"{contenders[ours]['label']} / {contenders[other]['label']}"
        colour = COLOURS[ours if other == "saeffect" else other]
        ax.plot([a[0] for a, _ in rows], differences, color=colour, linewidth=1.3, label=pair)
    ax.axhline(5e-3, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yscale("log")
    ax.set_ylim(3e-10, 1)
    ax.set_ylabel("relative difference")
    ax.set_xlabel("steps (dotted: 0.5 %)")
    ax.set_title(f"{title}: how far two losses are apart", loc="left", fontweight="bold")
    # Below the axes and not part of the layout, or long names would squeeze the panels.
    legend = ax.legend(
        frameon=False, fontsize=6.2, ncols=2, columnspacing=0.8, loc="upper right", bbox_to_anchor=(1, -0.3)
    )
    legend.set_in_layout(False)
