"""Tables whose truth is known, through the product's own functions: do the error rates hold?

Every setting is simulated `n` times as a small study of `TESTS` quantities: once with nothing to find, once with
an effect in half of them. Counted are studies that report anything where nothing is (`alarms`), the share of
false findings where half is real (`false_discovery`), intervals that hold the truth (`coverage`), and real
effects that are found (`power`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.diffing.cross_activity import CrossActivity
from saeffect.stats.bootstrap import bootstrap_difference
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.stats.nested import nested_mean, nested_mean_difference
from saeffect.stats.permutation import permutation_test
from saeffect.stats.proportions import newcombe_difference
from saeffect.steering.effects import effects

__all__ = ["SETTINGS", "TESTS", "Rates", "Setting", "Simulated", "rates_of", "simulate"]

FloatArray = npt.NDArray[np.float64]
TESTS = 4  # tests a study, of which half are real in the second run
Q = 0.05


@dataclass(frozen=True, eq=False)
class Simulated:
    """What the product said about `n` studies of `TESTS` tests, each float64 [n, TESTS]; NaN where it said nothing."""

    q: FloatArray
    low: FloatArray
    high: FloatArray


@dataclass(frozen=True)
class Setting:
    """One kind of data through one road of the product.

    Attributes:
        road: Which functions.
        data: Which data.
        effect: Size of the real effects.
        draw: (effects [n, TESTS], rng) to what the product says of each study.
        strict: Whether the method promises its nominal level here. Where it does not, the rates are shown, and
            do not count as failures.
        remark: Why not.
    """

    road: str
    data: str
    effect: float
    draw: Callable[[FloatArray, np.random.Generator], Simulated]
    strict: bool = True
    remark: str = ""

    @property
    def name(self) -> str:
        return f"{self.road}: {self.data}"


@dataclass(frozen=True)
class Rates:
    """Rates of one setting, all from 0 to 1, with how many studies or intervals stand behind each.

    Attributes:
        alarms: Studies of nothing that report something at q = 0.05.
        false_discovery: Mean share of false findings where half of the tests are real.
        coverage: 95 % intervals that hold the truth.
        power: Real effects found at q = 0.05.
        n_studies: Behind each of the first two.
        n_intervals: Behind the coverage; intervals of one study are counted as independent.
    """

    setting: str
    strict: bool
    remark: str
    alarms: float
    false_discovery: float
    coverage: float
    power: float
    n_studies: int
    n_intervals: int


def simulate(setting: Setting, n: int, seed: int) -> dict[str, Any]:
    """Rates of one setting from `n` studies with nothing to find and `n` with something, as plain data."""
    rng = np.random.default_rng(seed)
    nothing = np.zeros((n, TESTS))
    something = nothing.copy()
    something[:, : TESTS // 2] = setting.effect
    return asdict(rates_of(setting, (nothing, setting.draw(nothing, rng)), (something, setting.draw(something, rng))))


def rates_of(setting: Setting, null: tuple[FloatArray, Simulated], mixed: tuple[FloatArray, Simulated]) -> Rates:
    """Counts what both runs of a setting said, given the true effects of each."""
    found, real, tested = mixed[1].q <= Q, mixed[0] != 0, ~np.isnan(mixed[1].q)
    false = (found & ~real).sum(axis=1) / np.maximum(1, found.sum(axis=1))
    has_both = bool((tested & ~real).any())
    held, known = [], []
    for truth, said in (null, mixed):
        known.append(~np.isnan(said.low))
        held.append((said.low <= truth) & (truth <= said.high))
    n_intervals = int(sum(one.sum() for one in known))
    return Rates(
        setting=setting.name,
        strict=setting.strict,
        remark=setting.remark,
        alarms=float((null[1].q <= Q).any(axis=1).mean()),
        false_discovery=float(false.mean()) if has_both else float("nan"),
        coverage=sum(int(one.sum()) for one in held) / n_intervals if n_intervals else float("nan"),
        power=float(found[real & tested].mean()),
        n_studies=len(found),
        n_intervals=n_intervals,
    )


_Noise = Callable[[np.random.Generator, tuple[int, ...]], FloatArray]


# Noise of mean 0 and standard deviation 1.
def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    return rng.standard_normal(shape)


def _lognormal(sigma: float) -> _Noise:
    """Skewness 1.75 for sigma 0.5, 6.2 for sigma 1."""
    mean, sd = np.exp(sigma**2 / 2), np.sqrt((np.exp(sigma**2) - 1) * np.exp(sigma**2))
    return lambda rng, shape: (rng.lognormal(0.0, sigma, shape) - mean) / sd


def _tied(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Counts, four in five of them zero."""
    p, rate = 0.2, 1.0
    draws = (rng.random(shape) < p) * (1 + rng.poisson(rate, shape))
    second = p * (rate + (1 + rate) ** 2)
    mean = p * (1 + rate)
    return np.asarray((draws - mean) / np.sqrt(second - mean**2))


def _trials(
    noise: _Noise, prompts: int, samples: int, shared: float = 0.0
) -> Callable[[FloatArray, np.random.Generator], Simulated]:
    """Steered, placebo and unsteered similarities of prompts × samples; the road is `steering.effects`.

    `shared` is the standard deviation of what the steered direction does to all samples of a prompt.
    """

    def draw(effect: FloatArray, rng: np.random.Generator) -> Simulated:
        n = effect.size
        shape = (n, prompts, samples)
        common = rng.standard_normal(shape)  # prompt and sampling noise, which all three conditions share
        by_prompt = shared * rng.standard_normal((n, prompts, 1))
        texts = {
            "unsteered": common,
            "steered": common + noise(rng, shape) + by_prompt + effect.reshape(n, 1, 1),
            "random": common + noise(rng, shape),
        }
        index = np.indices(shape).reshape(3, -1)
        table = pd.concat(
            pd.DataFrame(
                {
                    "feature": index[0],
                    "prompt": index[1],
                    "sample": index[2],
                    "condition": condition,
                    "dose": 0.0 if condition == "unsteered" else 1.0,
                    "similarity": values.ravel(),
                }
            )
            for condition, values in texts.items()
        )
        found = effects(table)
        p, low, high = (found[c].to_numpy().reshape(effect.shape) for c in ("p", "effect_low", "effect_high"))
        return Simulated(_q(p), low, high)

    return draw


def _q(p: FloatArray) -> FloatArray:
    """q within each study: the tables above hold all studies at once, only to be fast."""
    return np.stack([benjamini_hochberg(row) for row in p])


def _activity(
    noise: _Noise, rows: int, tokens: int, shared: float
) -> Callable[[FloatArray, np.random.Generator], Simulated]:
    """Activations of one SAE on two models; tokens of a row share `shared` of standard deviation."""

    def draw(effect: FloatArray, rng: np.random.Generator) -> Simulated:
        n = effect.size
        cross = CrossActivity(n)
        for _ in range(rows):
            own = [
                5.0 + noise(rng, (1, tokens, n)) + shared * noise(rng, (1, 1, n)) for _ in range(2)
            ]  # 5: few are cut off at 0, so the true difference is known
            pair = [torch.from_numpy(np.maximum(values, 1e-3)) for values in (own[0], own[1] + effect.ravel())]
            cross.update(*pair)
        found = cross.result(n_permutations=999)
        p, low, high = (found[c].to_numpy().reshape(effect.shape) for c in ("p", "low", "high"))
        return Simulated(_q(p), low, high)

    return draw


def _two_arms(noise: _Noise, n_a: int, n_b: int) -> Callable[[FloatArray, np.random.Generator], Simulated]:
    """Coherence of two arms' features: bootstrap interval and permutation p, as the contrasts take them."""

    def draw(effect: FloatArray, rng: np.random.Generator) -> Simulated:
        said = np.empty((3, *effect.shape))
        a, b = noise(rng, (*effect.shape, n_a)), noise(rng, (*effect.shape, n_b)) + effect[..., None]
        for at in np.ndindex(*effect.shape):
            # One seed for all would give all studies the same luck.
            seeds = rng.integers(2**31, size=2).tolist()
            interval = bootstrap_difference(a[at], b[at], n_boot=600, seed=seeds[0])
            p = permutation_test(a[at], b[at], n_permutations=599, seed=seeds[1])
            said[:, *at] = p, interval.low, interval.high
        return Simulated(_q(said[0]), said[1], said[2])

    return draw


def _shares(base: float, n_a: int, n_b: int) -> Callable[[FloatArray, np.random.Generator], Simulated]:
    """Two shares: Newcombe's interval and Fisher's test. The effect is the difference of the true shares."""

    def draw(effect: FloatArray, rng: np.random.Generator) -> Simulated:
        said = np.empty((3, *effect.shape))
        a = rng.binomial(n_a, base, effect.shape)
        b = rng.binomial(n_b, base + effect)
        known: dict[tuple[int, int], tuple[float, float, float]] = {}
        for at in np.ndindex(*effect.shape):
            key = (int(a[at]), int(b[at]))
            if key not in known:
                interval = newcombe_difference(key[0], n_a, key[1], n_b)
                known[key] = (interval.p, interval.low, interval.high)
            said[:, *at] = known[key]
        return Simulated(_q(said[0]), said[1], said[2])

    return draw


def _nested(noise: _Noise, seeds: int, features: int) -> Callable[[FloatArray, np.random.Generator], Simulated]:
    """Effects of features within SAE seeds, two arms. There is no p: found is what leaves 0 out, and no q is taken."""
    labels = pd.DataFrame({"sae_seed": np.repeat(np.arange(seeds), features), "feature": np.arange(seeds * features)})

    def draw(effect: FloatArray, rng: np.random.Generator) -> Simulated:
        said = np.full((3, *effect.shape), np.nan)
        shape = (*effect.shape, seeds, features)
        arms = [noise(rng, shape) + noise(rng, (*shape[:-1], 1)) for _ in range(2)]
        arms[1] = arms[1] + effect[..., None, None]
        pairs = list(enumerate(arms))
        for study in range(len(effect)):
            at = (study, 0)  # one test a study: it has no p that a q could be made of
            a, b = (nested_mean(arm[at].ravel(), labels, n_boot=1000, seed=study + i * len(effect)) for i, arm in pairs)
            interval = nested_mean_difference(a, b)
            outside = interval.low > 0 or interval.high < 0
            said[:, *at] = (0.0 if outside else 1.0), interval.low, interval.high
        return Simulated(said[0], said[1], said[2])

    return draw


_FEW = "fewer than six prompts: texts of one prompt count as independent, which they are here and seldom elsewhere"
_HEAVY = "skewness 6: far beyond what bounded outcomes such as cosines show"
_STEERING, _CROSS, _ARMS, _SEEDS = "steering effects", "cross-activity", "two arms", "SAE seeds"
_MILD, _WILD = _lognormal(0.5), _lognormal(1.0)
SETTINGS: tuple[Setting, ...] = (
    Setting(_STEERING, "normal, 12 prompts × 2 samples", 1.0, _trials(_normal, 12, 2)),
    Setting(_STEERING, "skewed, 12 × 2", 1.0, _trials(_MILD, 12, 2)),
    Setting(_STEERING, "four in five zero, 12 × 2", 1.0, _trials(_tied, 12, 2)),
    Setting(_STEERING, "very skewed, 12 × 2", 1.0, _trials(_WILD, 12, 2), False, _HEAVY),
    Setting(_STEERING, "normal, 4 × 2 (eight pairs)", 1.5, _trials(_normal, 4, 2), False, _FEW),
    Setting(_STEERING, "clustered by prompt, 12 × 2", 1.5, _trials(_normal, 12, 2, 0.7)),
    Setting(_STEERING, "clustered and skewed, 12 × 4", 1.5, _trials(_MILD, 12, 4, 0.7)),
    Setting(_CROSS, "normal, 24 rows", 0.4, _activity(_normal, 24, 8, 0.0)),
    Setting(_CROSS, "very skewed, 24 rows", 0.4, _activity(_WILD, 24, 8, 0.0)),
    Setting(_CROSS, "clustered by row, 24 rows", 1.0, _activity(_normal, 24, 8, 1.0)),
    Setting(_CROSS, "four in five zero, 24 rows", 0.4, _activity(_tied, 24, 8, 0.0)),
    Setting(_ARMS, "normal, 40 and 60 features", 0.7, _two_arms(_normal, 40, 60)),
    Setting(_ARMS, "skewed, 40 and 60", 0.7, _two_arms(_MILD, 40, 60)),
    Setting(_ARMS, "four in five zero, 40 and 60", 0.7, _two_arms(_tied, 40, 60)),
    Setting(_ARMS, "very skewed, 40 and 60", 0.7, _two_arms(_WILD, 40, 60), False, _HEAVY),
    Setting("two shares", "10 % of 400 features each", 0.1, _shares(0.1, 400, 400)),
    Setting(_SEEDS, "normal, 5 seeds × 20 features", 2.5, _nested(_normal, 5, 20)),
    Setting(_SEEDS, "normal, 24 seeds × 8 features", 1.0, _nested(_normal, 24, 8)),
    Setting(_SEEDS, "skewed, 24 × 8", 1.0, _nested(_MILD, 24, 8)),
)
