"""Null fine-tunes: p of a change against theirs, with the fine-tune as the unit of chance; their folder and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from saeffect.diffing.matched_null import MIN_STRATUM, NO_STRATUM, strata
from saeffect.diffing.null_ranks import pooled_rank_p
from saeffect.diffing.trace import Trace
from saeffect.errors import ConfigError, EmptySelection, NotFound, ShapeMismatch
from saeffect.io import read_json
from saeffect.stats.arguments import FloatArray

__all__ = [
    "ADAPTER",
    "CARD",
    "NAME",
    "PooledP",
    "kept_adapters",
    "null_card",
    "null_files",
    "pooled_p",
    "read_null",
    "read_nulls",
    "smallest_p",
]


CARD = "nulls.json"
"""In a folder of nulls: which recipe, which texts, and what they were measured on."""
NAME = "null-{}.safetensors"
ADAPTER = "adapters/null-{}/lora"
"""The folder of a null's adapter, deleted once it is measured, unless kept."""
# Prior degrees of freedom with which a feature's variance is shrunk towards that of features of like density, since few
# nulls estimate it poorly. As in limma (Smyth 2004), but fixed.
_PRIOR_FREEDOM = 4.0


class PooledP(NamedTuple):
    """What `pooled_p` gives: p [n], and the features that each was ranked with, int [n], 0 where p is NaN."""

    p: FloatArray
    n_pooled: npt.NDArray[np.int64]


def pooled_p(change: npt.ArrayLike, nulls: npt.ArrayLike, density: npt.ArrayLike) -> PooledP:
    """Two-sided p of each feature's change against the changes in K null fine-tunes; features of like density pooled.

    If the fine-tune were one more null, the K + 1 changes of a feature would be exchangeable. The score of a change is
    its distance from the mean of the others, divided by the spread of all K + 1, which is shrunk towards the spread of
    features of like density (`strata`). The fine-tune's score is ranked among those of the nulls for all features of
    the stratum, so p can be as low as `smallest_p`. It is valid for a feature picked at random among those of its
    density. Features of one fine-tune are dependent, so many small p come at once, which a false discovery rate over
    features does not account for: judge groups by `smallest_p` without pooling.

    Args:
        change: [n], such as tuned minus base; NaN where undefined.
        nulls: [K, n], the same of each null.
        density: [n], how often a feature fires in the base model.

    Returns:
        p; NaN where change, a null's change or density is undefined; at least 0.5 with one null. And how many features
        were pooled: p is not below `smallest_p(K, n_pooled)`.

    Raises `ShapeMismatch`: no nulls, or shapes that do not fit.

    Example:
        >>> pooled_p([5.0, 0.0], [[0.0, 0.1], [0.1, -0.1], [-0.1, 0.0]], [0.1, 0.1]).p.round(3).tolist()
        [0.143, 1.0]
    """
    changes, null_changes = np.asarray(change, dtype=np.float64), np.asarray(nulls, dtype=np.float64)
    traits, shape = np.asarray(density, dtype=np.float64), changes.shape
    if null_changes.ndim != 2 or len(null_changes) == 0 or null_changes.shape[1:] != shape or traits.shape != shape:
        raise ShapeMismatch(
            f"changes of {list(shape)} features with nulls {list(null_changes.shape)} and density {list(traits.shape)};"
            " expected [n], [at least 1, n] and [n].",
            at="nulls",
        )
    table = np.vstack([changes, null_changes])
    usable = ~np.isnan(table).any(axis=0) & ~np.isnan(traits)
    groups = np.full(len(changes), NO_STRATUM)
    groups[usable] = strata(traits[usable, None], MIN_STRATUM)
    p, n_pooled = np.full(len(changes), math.nan), np.zeros(len(changes), dtype=np.int64)
    for group in np.unique(groups[usable]):
        members = groups == group
        p[members] = pooled_rank_p(_standardised_distances(table[:, members]))
        n_pooled[members] = members.sum()
    return PooledP(np.maximum(p, 0.5) if len(null_changes) == 1 else p, n_pooled)


def _standardised_distances(table: FloatArray) -> FloatArray:
    """[K + 1, n] of one stratum: |distance from the mean of the others|, in units of the spread of all."""
    n_tunes = len(table)
    distance = (table - table.mean(axis=0)) * n_tunes / (n_tunes - 1)
    variance = table.var(axis=0, ddof=1)
    typical = float(variance.mean())
    if typical == 0:
        return np.zeros_like(table)
    df = n_tunes - 1
    return np.abs(distance) / np.sqrt((_PRIOR_FREEDOM * typical + df * variance) / (_PRIOR_FREEDOM + df))


def smallest_p(n_nulls: int, n_pooled: int = 1) -> float:
    """The smallest p that `n_nulls` nulls can give, over `n_pooled` features ranked together.

    Example:
        >>> smallest_p(19), smallest_p(1), round(smallest_p(20, 200), 6)
        (0.05, 0.5, 0.00025)
    """
    return 1.0 if n_nulls < 1 else 0.5 if n_nulls == 1 else 1 / (1 + n_nulls * n_pooled)


def null_card(folder: Path) -> dict[str, Any]:
    """The content of `CARD` in a folder of nulls; {} if there is none, or if it is no mapping."""
    path = folder / CARD
    card = read_json(path) if path.is_file() else {}
    return card if isinstance(card, dict) else {}


def null_files(folder: Path) -> dict[int, Path]:
    """The traces of nulls in a folder, by number."""
    files = {}
    for path in folder.glob(NAME.format("*")):
        number = path.stem.removeprefix("null-")
        if number.isdecimal():
            files[int(number)] = path
    return dict(sorted(files.items()))


def kept_adapters(folder: Path) -> dict[str, Path]:
    """The weights of the adapters that were kept of the measured nulls in a folder, by name."""
    files = {f"null-{k}": folder / ADAPTER.format(k) / "adapter_model.safetensors" for k in null_files(folder)}
    return {name: path for name, path in files.items() if path.is_file()}


def read_nulls(
    folder: Path, made_by: str | None = None, *, measured: Mapping[str, str] | None = None, at: str | None = None
) -> list[Trace]:
    """Read the traces of a folder of nulls, by rising number.

    Args:
        made_by: Of the tracer that they are to be compared with, see `Trace.made_by`; None takes any.
        measured: `Tracer.measured_on` of it, to say what differs.
        at: Where the folder is named, for error messages.

    Raises:
        NotFound: No such folder.
        EmptySelection: No traces in it.
        BadFile: A damaged trace, or one that is none.
        ConfigError: A trace measured on another base model, SAE, hook or text.
    """
    make = "make nulls: saeffect finetune RECIPE --null 20 --study STUDY --out FOLDER."
    if not folder.is_dir():
        raise NotFound(f"there is no folder of nulls {str(folder)!r}.", at=at, fix=make)
    files = null_files(folder)
    if not files:
        raise EmptySelection(f"the folder {str(folder)!r} holds no null-<number>.safetensors.", at=at, fix=make)
    return [read_null(path, made_by, measured=measured, at=at) for path in files.values()]


def read_null(path: Path, made_by: str | None, *, measured: Mapping[str, str] | None, at: str | None) -> Trace:
    """Read one trace of a folder of nulls; arguments and errors as in `read_nulls`."""
    null = Trace.load(path)
    noted = null_card(path.parent).get("measured_on")
    noted = noted if isinstance(noted, dict) else {}
    differing = [key for key, value in (measured or {}).items() if key in noted and noted[key] != value]
    if differing or (made_by is not None and null.made_by != made_by):
        basis = f"another {' and '.join(differing)}" if differing else "another base model, SAE, hook or text"
        raise ConfigError(
            f"{path.name} was measured on {basis} than this study has, so it cannot be compared.",
            at=at or str(path.parent),
            fix="measure the nulls again: saeffect finetune RECIPE --null K --study STUDY, into a new folder, or into"
            " this one without its null-*.safetensors (its adapters, where kept, are not trained again).",
        )
    return null
