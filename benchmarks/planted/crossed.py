"""SAE × model, crossed: do the intervals of `saeffect.comparison.factorial` keep their level?

    python benchmarks/planted/crossed.py --work <folder>

Studies have nothing to find: in each of the four cells, features differ in how strongly they push and in what the
model does to them, prompts in what they do to the models and to the SAEs. Counted are, for each of the four effects,
studies whose p is at most 0.05 (nominal: 0.05) and intervals that hold the truth (nominal: 0.95), and how often an
effect of the given size is found. An effect only shifts a table, so level and power of tables come from the same
studies; shares are drawn anew. Results: crossed.md and crossed.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from saeffect.comparison.factorial import CROSSED, EFFECTS, Cells, split_cells
from saeffect.io import fingerprint, hash_file, read_json, write_json
from saeffect.stats.arguments import Resampling

_HERE = Path(__file__).parent
_CELLS = (("c", "c"), ("c", "t"), ("t", "c"), ("t", "t"))

FloatArray = npt.NDArray[np.float64]
Simulated = dict[tuple[str, str], FloatArray]
_Noise = Callable[[np.random.Generator, tuple[int, ...]], FloatArray]


@dataclass(frozen=True)
class Setting:
    """One kind of data.

    Attributes:
        name: In the table.
        quantity: In `CROSSED`.
        size: Of the effects whose power is asked for.
        draw: From a generator, and an effect of the model, to the four cells.
        note: Where the level is not promised, or not nominal by design.
    """

    name: str
    quantity: str
    size: float
    draw: Callable[[np.random.Generator, float], Simulated]
    note: str = ""


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    return rng.standard_normal(shape)


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Skewness 1.75, mean 0, standard deviation 1."""
    mean, sd = np.exp(0.125), np.sqrt((np.exp(0.25) - 1) * np.exp(0.25))
    return np.asarray((rng.lognormal(0.0, 0.5, shape) - mean) / sd)


def _tied(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Four in five the same, mean 0, standard deviation 1."""
    draws = (rng.random(shape) < 0.2) * (1 + rng.poisson(1.0, shape))
    return np.asarray((draws - 0.4) / np.sqrt(0.2 * 5 - 0.16))


def _table(
    features: tuple[int, int], prompts: int, noise: _Noise, *, of_features: float = 0.6, of_prompts: float = 0.4
) -> Callable[[np.random.Generator, float], Simulated]:
    """Features and prompts crossed; how far the model's part varies over features and over prompts."""

    def draw(rng: np.random.Generator, effect: float) -> Simulated:
        by_prompt, by_both = noise(rng, (2, prompts)), noise(rng, (2, 2, prompts))
        cells = {}
        for s, sae in enumerate("ct"):
            n = features[s]
            push, change = 5 + noise(rng, (n, 1)), of_features * noise(rng, (n, 1))
            for m, model in enumerate("ct"):
                shared = of_prompts * (by_prompt[m] + 0.6 * by_both[m, s])
                cells[sae, model] = push + m * (change + effect) + shared + 0.7 * noise(rng, (n, prompts))
        return cells

    return draw


def _alone(features: tuple[int, int], noise: _Noise) -> Callable[[np.random.Generator, float], Simulated]:
    """Features without prompts."""

    def draw(rng: np.random.Generator, effect: float) -> Simulated:
        cells = {}
        for n, sae in zip(features, "ct", strict=True):
            cells[sae, "c"] = noise(rng, (n, 1))
            cells[sae, "t"] = cells[sae, "c"] + 0.6 * noise(rng, (n, 1)) + effect
        return cells

    return draw


def _whole(rows: int, noise: _Noise) -> Callable[[np.random.Generator, float], Simulated]:
    def draw(rng: np.random.Generator, effect: float) -> Simulated:
        text = noise(rng, (1, rows))  # rows that are hard for all
        return {(s, m): 0.7 + text + 0.3 * noise(rng, (1, rows)) + effect * (m == "t") for s, m in _CELLS}

    return draw


def _shares(features: tuple[int, int]) -> Callable[[np.random.Generator, float], Simulated]:
    """Features that pass more or less easily, in both models, each model with luck of its own."""

    def draw(rng: np.random.Generator, effect: float) -> Simulated:
        cells = {}
        for n, sae in zip(features, "ct", strict=True):
            ease = rng.beta(2.0, 2.0, (n, 1))
            for model in "ct":
                cells[sae, model] = (rng.random((n, 1)) < ease * (1 + 2 * effect * (model == "t"))).astype(np.float64)
        return cells

    return draw


_SHARED = "few different values: careful"
_CAREFUL = "careful by design: neither source is taken to be smaller than what its means show"
_PROMPTS = _table((24, 24), 6, _normal, of_features=0.1, of_prompts=1.0)
_FEATURES = _table((24, 24), 6, _normal, of_features=1.0, of_prompts=0.05)
_NEITHER = _table((24, 24), 6, _normal, of_features=0.0, of_prompts=0.0)
SETTINGS = (
    Setting("normal, 24 + 24 features × 6 prompts", "direct_effect", 0.6, _table((24, 24), 6, _normal)),
    Setting("normal, 36 + 20 × 12", "direct_effect", 0.4, _table((36, 20), 12, _normal)),
    Setting("skewed, 24 + 24 × 12", "direct_effect", 0.4, _table((24, 24), 12, _skewed)),
    Setting("prompts matter most, 24 + 24 × 6", "direct_effect", 1.5, _PROMPTS),
    Setting("features matter most, 24 + 24 × 6", "direct_effect", 0.6, _FEATURES),
    Setting("neither matters, 24 + 24 × 6", "direct_effect", 0.3, _NEITHER, _CAREFUL),
    Setting("few, 6 + 8 × 4", "direct_effect", 1.0, _table((6, 8), 4, _normal)),
    Setting("four in five zero, 24 + 24 × 64 rows", "density", 0.4, _table((24, 24), 64, _tied)),
    Setting("features alone, skewed, 24 + 24", "coherence", 0.6, _alone((24, 24), _skewed)),
    Setting("rows alone, 20 rows of text", "explained_variance", 0.3, _whole(20, _normal)),
    Setting("pass rate, 24 + 24", "pass_rate", -0.25, _shares((24, 24)), _SHARED),
    Setting("pass rate, 36 + 12", "pass_rate", -0.25, _shares((36, 12)), _SHARED),
)


def rates(setting: Setting, n: int, seed: int) -> list[dict[str, Any]]:
    """One row an effect: alarms, coverage, power (of the model's effect, and of dictionary or both of its size)."""
    rng = np.random.default_rng(seed)
    null = [_split(setting, setting.draw(rng, 0.0), rng) for _ in range(n)]
    share = setting.quantity == "pass_rate"
    moved = [_split(setting, setting.draw(rng, setting.size), rng) for _ in range(n)] if share else null
    rows = []
    for place, effect in enumerate(EFFECTS):
        p, low, high = (np.array([found[place, k] for found in null]) for k in range(3))
        if share:
            found = np.mean([one[place, 0] <= 0.05 for one in moved]) if effect == "model" else np.nan
        else:
            shift = setting.size if effect != "rest" else setting.size / 2
            found = np.mean((low + shift > 0) | (high + shift < 0))
        row = {"setting": setting.name, "quantity": setting.quantity, "effect": effect, "n": n, "size": setting.size}
        row |= {"alarms": float(np.nanmean(p <= 0.05)), "coverage": float(np.mean((low <= 0) & (high >= 0)))}
        rows.append(row | {"power": None if np.isnan(found) else float(found), "note": setting.note})
    return rows


def _split(setting: Setting, cells: Simulated, rng: np.random.Generator) -> FloatArray:
    """p, low and high of the four effects, [4, 3]."""
    known = CROSSED[setting.quantity]
    both = [tuple(cells[sae, model] for sae in "ct") for model in "ct"]
    rows = split_cells(known, Cells(*both), Resampling(int(rng.integers(2**31)), n_permutations=199))
    return np.array([[row["p"], row["low"], row["high"]] for row in rows])


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """crossed.json and crossed.md."""
    n = rows[0]["n"]
    lines = [
        "# SAE × model, crossed: error rates",
        "",
        f"{n:,} simulated studies a setting, by `crossed.py`; nominal: alarms 0.05, coverage 0.95. Monte-Carlo error of"
        f" a rate of 0.05: ±{1.96 * np.sqrt(0.05 * 0.95 / n):.3f}. Power: effects of the given size that are found (of"
        " the rest half that size).",
        "",
        "| data | quantity | effect | alarms | coverage | size | power |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        power = "" if row["power"] is None else f"{row['power']:.2f}"
        lines.append(
            f"| {row['setting']} | {row['quantity']} | {row['effect']} | {row['alarms']:.3f} | {row['coverage']:.3f}"
            f" | {row['size']:g} | {power} |"
        )
    notes = dict.fromkeys(f"- {row['setting']}: {row['note']}." for row in rows if row["note"])
    (out / "crossed.md").write_text("\n".join([*lines, "", *notes, ""]), encoding="utf-8")
    write_json(out / "crossed.json", {"studies": n, "rates": rows})


def main() -> None:
    """Simulate what is not in the folder yet, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for finished settings")
    parser.add_argument("--out", type=Path, default=_HERE)
    parser.add_argument("--studies", type=int, default=2000)
    options = parser.parse_args()
    code, rows = hash_file(Path(__file__)), []
    for number, setting in enumerate(SETTINGS):
        path = options.work / f"{fingerprint([setting.name, options.studies, code])[:16]}.json"
        started = time.monotonic()
        if not path.is_file():
            write_json(path, rates(setting, options.studies, number))
        rows += read_json(path)
        alarms = ", ".join(f"{row['effect']} {row['alarms']:.3f}" for row in rows[-len(EFFECTS) :])
        print(f"{setting.name}: {alarms} ({time.monotonic() - started:.0f} s)", flush=True)  # noqa: T201
    write(rows, options.out)


if __name__ == "__main__":
    main()
