"""Checks of arguments: a wrong shape or kind raises a `SaeffectError`; for data that do not define a result (no values,
NaN among them) `fault` gives the reason."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from saeffect.errors import ConfigError, ShapeMismatch, Undefined

__all__ = [
    "LEVEL",
    "BoolArray",
    "FloatArray",
    "IntArray",
    "Resampling",
    "Seed",
    "check_resamples",
    "fault",
    "generator",
    "sample",
]

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.int64]
Seed: TypeAlias = int | np.random.Generator

LEVEL = 0.95
"""Confidence of every interval."""
_MIN_RESAMPLES = 40  # 2 / (1 - LEVEL)


@dataclass(frozen=True)
class Resampling:
    """How much a study resamples, and from which seed.

    Example:
        >>> Resampling(seed=1).seed_for("coherence") == Resampling(seed=2).seed_for("coherence")
        False
    """

    seed: int = 0
    n_boot: int = 2_000
    n_permutations: int = 10_000

    def seed_for(self, *names: str) -> int:
        """The seed of the number with these names: adding a row to a table does not change the other rows."""
        key = zlib.crc32("|".join(names).encode())
        return int(np.random.SeedSequence([self.seed, key]).generate_state(1)[0])


def sample(values: npt.ArrayLike, name: str = "values", *, ndim: int = 1) -> FloatArray:
    """The values as a float64 array of `ndim` dimensions; NaN is allowed here, `fault` reports it.

    Raises `Undefined` for what is not a number, `ShapeMismatch` for another number of dimensions.

    Example:
        >>> sample([True, 2])
        array([1., 2.])
    """
    raw: Any = values
    try:
        if hasattr(raw, "isna"):  # a Series; before pandas 3 its <NA> does not become NaN by itself
            raw = raw.to_numpy(dtype=np.float64, na_value=np.nan)
        array = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise Undefined(f"{name} must be numbers in an array of {ndim} dimension(s): {error}.", at=name) from error
    if array.ndim != ndim:
        raise ShapeMismatch(f"{name} must have {ndim} dimension(s), got shape {array.shape}.", at=name)
    return array


def fault(values: FloatArray, name: str = "values") -> str:
    """Why these values cannot be summarised, or "" when they can.

    Example:
        >>> fault(np.array([1.0, np.nan, 3.0]), "coherence")
        'coherence: 1 of 3 values are NaN'
        >>> fault(np.array([]))
        'values: there are none'
        >>> fault(np.array([1.0]))
        ''
    """
    if values.size == 0:
        return f"{name}: there are none"
    n_nan = int(np.isnan(values).sum())
    if n_nan:
        return f"{name}: {n_nan} of {values.size} values are NaN"
    n_infinite = int(np.isinf(values).sum())
    if n_infinite:
        return f"{name}: {n_infinite} of {values.size} values are infinite"
    return ""


def generator(seed: Seed) -> np.random.Generator:
    """A new random generator for an integer seed; a generator is used (and moved on) as it is.

    Raises `ConfigError` when the seed is neither a non-negative integer nor a generator.
    """
    if isinstance(seed, np.random.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ConfigError(f"seed must be a non-negative integer or a numpy Generator, got {seed!r}.", at="seed")
    return np.random.default_rng(int(seed))


def check_resamples(n_boot: int) -> None:
    """Raise `ConfigError` for so few resamples that none is expected beyond either end of a 95 % interval."""
    if isinstance(n_boot, bool) or not isinstance(n_boot, int | np.integer) or n_boot < _MIN_RESAMPLES:
        raise ConfigError(
            f"n_boot must be an integer of at least {_MIN_RESAMPLES} for a 95 % interval, got {n_boot!r}.",
            at="n_boot",
            fix="2000 is usual.",
        )
