# ruff: noqa: T201
"""Ratios, shares of the limit, agreement of losses, and tables, from the measurements."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from measure import limit_tokens_per_second

__all__ = ["agreement", "print_tables", "summarise", "surroundings"]

MAIN = {"l1": "l1-24576-1024", "topk": "topk-24576-1024"}
# Curves that are to agree: the same loss and, for TopK, the same treatment of decoder rows (free, or kept at length 1).
PAIRS = (
    ("saeffect", "sae_lens"),
    ("saeffect", "dictionary_learning_april"),
    ("saeffect", "dictionary_learning"),
    ("saeffect", "sparsify_adam"),
    ("saeffect_free", "sae_lens"),
    ("saeffect_free", "sae_lens_sparse"),
    ("saeffect_free", "plain"),
    ("saeffect_bf16", "saeffect"),
)


def surroundings(threads: int) -> dict[str, Any]:
    """Conditions of the measurement: processor, threads, versions (those of the peers are with each case)."""
    return {
        "processor": _processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def summarise(results: dict[str, Any]) -> dict[str, float | None]:
    """The last line: ratios of tokens a second at batch 1,024 (None where a side was not measured), and extras."""
    speed = results["speed"]
    summary: dict[str, float | None] = {}
    for suffix, ours in (("", "saeffect"), ("_bf16", "saeffect_bf16")):
        summary[f"l1_vs_sae_lens_24576{suffix}"] = _ratio(speed, "l1-24576-1024", ours, "sae_lens")
        summary[f"l1_vs_sae_lens_12288{suffix}"] = _ratio(speed, "l1-12288-1024", ours, "sae_lens")
        summary[f"topk_vs_sparsify_24576{suffix}"] = _ratio(speed, "topk-24576-1024", ours, "sparsify")
        summary[f"topk_vs_sae_lens_24576{suffix}"] = _ratio(speed, "topk-24576-1024", ours, "sae_lens")
    summary["peak_rss_vs_leanest"] = _memory(speed)
    summary["share_of_limit"] = _share_of_limit(speed, MAIN["l1"], "saeffect")
    summary["share_of_limit_bf16"] = _share_of_limit(speed, MAIN["l1"], "saeffect_bf16", "bfloat16")
    summary["topk_share_of_limit"] = _share_of_limit(speed, MAIN["topk"], "saeffect")
    summary["topk_share_of_limit_bf16"] = _share_of_limit(speed, MAIN["topk"], "saeffect_bf16", "bfloat16")
    # Against settings of the peers that are not their defaults.
    summary["topk_vs_sae_lens_sparse_24576"] = _ratio(speed, MAIN["topk"], "saeffect", "sae_lens_sparse")
    summary["topk_vs_sparsify_adam_24576"] = _ratio(speed, MAIN["topk"], "saeffect", "sparsify_adam")
    summary["l1_vs_sae_lens_compiled_24576"] = _ratio(speed, MAIN["l1"], "saeffect", "sae_lens_compiled")
    summary["l1_vs_sae_lens_autocast_24576_bf16"] = _ratio(speed, MAIN["l1"], "saeffect_bf16", "sae_lens_autocast")
    for architecture, exact in results["exactness"].items():
        summary |= {f"{architecture}_{name}": value for name, value in exact.items()}
    for architecture, curves in results["curves"].items():
        summary |= {f"{architecture}_{name}": value for name, value in _curve_summary(curves).items()}
    return {name: None if value is None else float(f"{value:.4g}") for name, value in summary.items()}


def _tokens(speed: dict[str, Any], case: str, key: str) -> float | None:
    contender = speed.get(case, {}).get("contenders", {}).get(key)
    return None if contender is None else float(contender["tokens_per_second"])


def _ratio(speed: dict[str, Any], case: str, ours: str, peer: str) -> float | None:
    a, b = _tokens(speed, case, ours), _tokens(speed, case, peer)
    return None if a is None or b is None else a / b


def _memory(speed: dict[str, Any]) -> float | None:
    """Our float32 step's peak over that of the leanest peer; the larger of the two architectures' ratios."""
    ratios = []
    for case in MAIN.values():
        contenders = speed.get(case, {}).get("contenders", {})
        peers = [c["peak_rss"] for key, c in contenders.items() if not c["ours"] and key != "plain"]
        if peers and "saeffect" in contenders:
            ratios.append(contenders["saeffect"]["peak_rss"] / min(peers))
    return max(ratios, default=None)


def limit(case: dict[str, Any], dtype: str = "float32") -> float:
    """Tokens a second of one dense encoder product and Adam alone, at the rates measured in the same rounds."""
    rates = case["machine"]
    return limit_tokens_per_second(
        case["batch"], case["d_in"], case["d_sae"], rates[f"{dtype}_flop"], rates["copy_bytes"]
    )


def _share_of_limit(speed: dict[str, Any], case: str, key: str, dtype: str = "float32") -> float | None:
    ours = _tokens(speed, case, key)
    return None if ours is None else ours / limit(speed[case], dtype)


def agreement(losses: list[list[float]], reference: list[list[float]]) -> tuple[float, float]:
    """Relative difference of two curves: the largest, and that at the end.

    Example:
        >>> agreement([[0, 4.0, 9], [5, 2.2, 9]], [[0, 4.0, 9], [5, 2.0, 9]])
        (0.1, 0.1)
    """
    differences = [round(abs(a[1] - b[1]) / b[1], 12) for a, b in zip(losses, reference, strict=True)]
    return max(differences), differences[-1]


def _curve_summary(curves: dict[str, Any]) -> dict[str, float]:
    """Largest difference along the curve and difference at the end, for each pair that should agree."""
    summary: dict[str, float] = {}
    contenders = curves["contenders"]
    for ours, other in PAIRS:
        if {ours, other} <= set(contenders):
            largest, last = agreement(contenders[ours]["losses"], contenders[other]["losses"])
            summary[f"loss_{ours}_vs_{other}_max"], summary[f"loss_{ours}_vs_{other}_end"] = largest, last
    return summary


def print_tables(results: dict[str, Any]) -> None:
    """Speed by case, then the end of each curve."""
    for name, case in results["speed"].items():
        print(f"\n{name}: {case['d_sae']:,} features, batch {case['batch']:,}, L0 {case['l0_start']:.0f} at the start")
        print(f"  {'':34}{'tokens/s':>10}{'spread':>14}{'peak GB':>9}{'L0 after':>10}{'of limit':>10}")
        for contender in sorted(case["contenders"].values(), key=lambda c: c["tokens_per_second"]):
            share = contender["tokens_per_second"] / limit(case, contender.get("product_dtype", "float32"))
            slow, fast = (case["batch"] / t for t in (max(contender["seconds"]), min(contender["seconds"])))
            print(
                f"  {contender['label']:34}{contender['tokens_per_second']:10,.0f}{f'{slow:,.0f}–{fast:,.0f}':>14}"
                f"{contender['peak_rss'] / 1e9:9.2f}{contender['l0_after']:10.1f}{share:10.0%}"
            )
        m = case["machine"]
        print(
            f"  limit {limit(case):,.0f} in float32, {limit(case, 'bfloat16'):,.0f} with a bfloat16 product"
            f" (products {m['float32_flop'] / 1e9:,.0f} and {m['bfloat16_flop'] / 1e9:,.0f} GFLOP/s,"
            f" copies {m['copy_bytes'] / 1e9:.0f} GB/s)"
        )
    for name, curves in results["curves"].items():
        print(f"\n{name} loss over {curves['steps']} steps, {curves['d_sae']:,} features, batch {curves['batch']}")
        for contender in curves["contenders"].values():
            first, last = contender["losses"][0], contender["losses"][-1]
            print(f"  {contender['label']:34}{first[1]:10.4f} to {last[1]:10.4f}   L0 {first[2]:.1f} to {last[2]:.1f}")
    print()
