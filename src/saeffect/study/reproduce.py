"""The figures of Gupta & Sica (2024), computed again from the files that they published. No model is run.

Their repository (github.com/seansica/sae-vector-steering) has no licence, so its files do not come with this package;
the user gives a copy. Our functions compute the figures: equation 1, coverage, the statistics of the comparison.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.errors import BadFile, NotFound
from saeffect.features.coherence import coherence
from saeffect.features.embeddings import DEFAULT_EMBEDDINGS, WordVectors, load_embeddings
from saeffect.io import read_json
from saeffect.lm.tokens import normalise_token
from saeffect.paths import decode_utf8, read_bytes
from saeffect.stats.arguments import FloatArray

__all__ = ["AGREES", "DIFFERS", "NO_FILE", "ROUNDED", "UNPUBLISHED", "reproduce"]

AGREES, DIFFERS, NO_FILE, UNPUBLISHED = "agrees", "differs", "no file here", "not published"
ROUNDED = "agrees, from rounded figures"
_REPOSITORY = "https://github.com/seansica/sae-vector-steering"
_FEATURES, _COHERENCE, _RUNS = "features", "coherence", "runs"
# File names in their repository, and of single files copied from it.
_NAMES = {
    (_FEATURES, "control"): ("features_medical_baseline.json", "paper_features_baseline.json"),
    (_FEATURES, "treatment"): ("features_medical_finetuned.json", "paper_features_finetuned.json"),
    (_COHERENCE, "control"): ("coherence_scores_medical_features_baseline.csv", "paper_coherence_baseline.csv"),
    (_COHERENCE, "treatment"): ("coherence_scores_medical_features_finetuned.csv", "paper_coherence_finetuned.csv"),
}
_RUN_FOLDERS = {"control": "baseline", "treatment": "fine-tuned"}
_D_SAE = 24_576
_SCORES = re.compile(r"Semantic Similarity - Baseline:\s*(-?[\d.]+)\s*\|\s*Steered:\s*(-?[\d.]+)")
_ARMS = ("control", "treatment")


@dataclass(frozen=True)
class _Row:
    """A figure: the paper's as printed, ours (NaN without files), and ours from the paper's rounded figures."""

    place: str
    figure: str
    arm: str
    paper: str
    ours: float
    note: str = ""
    from_rounded: float = math.nan
    published: bool = True

    @property
    def verdict(self) -> str:
        if math.isnan(self.ours):
            return NO_FILE if self.published else UNPUBLISHED
        decimals = len(self.paper.partition(".")[2])
        target = float(self.paper)
        if round(self.ours, decimals) == target:
            return AGREES
        return ROUNDED if round(self.from_rounded, decimals) == target else DIFFERS


def reproduce(folder: Path | str, *, embeddings: str | Path | WordVectors = DEFAULT_EMBEDDINGS) -> pd.DataFrame:
    """Every figure of the paper that its published files allow: the paper's, ours, and whether they agree.

    `folder` is a copy of the authors' repository, or any folder with some of its files (searched by name).

    One row a figure: place (in the paper), figure, arm, paper (as printed, str), ours (float; percentages from 0 to
    100; NaN without files), verdict, note. The verdict compares at the printed digits: `AGREES`; `ROUNDED`, if the
    paper computed it from figures that it had rounded; `DIFFERS`; `NO_FILE`; `UNPUBLISHED`. NotFound if none of the
    files is there, BadFile for one of another form.
    """
    vectors = embeddings if isinstance(embeddings, WordVectors) else load_embeddings(embeddings)
    files = _Published(Path(folder), vectors)
    if not files.files_by_kind:
        raise NotFound(
            "none of the paper's published files is here.",
            at=str(folder),
            fix=f"git clone {_REPOSITORY} and give its folder; the package may not bring the files, which have no"
            " licence.",
        )
    groups: tuple[Callable[[_Published], Iterator[_Row]], ...] = (_counts, _scores, _weights, _coverage, _steering)
    rows = [row for group in groups for row in group(files)]
    columns = {name: [getattr(row, name) for row in rows] for name in ("place", "figure", "arm", "paper", "ours")}
    return pd.DataFrame(columns | {"verdict": [r.verdict for r in rows], "note": [r.note for r in rows]})


@dataclass(frozen=True)
class _Published:
    """The published files that are present, read on first use."""

    folder: Path
    vectors: WordVectors

    @cached_property
    def files_by_kind(self) -> dict[tuple[str, str], list[Path]]:
        """Paths by (kind, arm)."""
        if not self.folder.is_dir():
            raise NotFound(f"there is no folder {str(self.folder)!r}.", at="FILES", fix=f"git clone {_REPOSITORY}")
        by_name = {path.name: path for path in sorted(self.folder.rglob("*"), reverse=True)}
        files_by_kind = {key: [by_name[name] for name in names if name in by_name] for key, names in _NAMES.items()}
        for arm, name in _RUN_FOLDERS.items():
            files_by_kind[_RUNS, arm] = sorted(self.folder.glob(f"**/{name}/*/feature_*.txt"))
        return {key: paths for key, paths in files_by_kind.items() if paths}

    @cached_property
    def features(self) -> dict[str, pd.DataFrame]:
        """By arm: feature, top_tokens, top_weights, medical_weights."""
        return {arm: _features(paths[0]) for (kind, arm), paths in self.files_by_kind.items() if kind == _FEATURES}

    @cached_property
    def published_scores(self) -> dict[str, FloatArray]:
        """By arm, the coherence that they computed."""
        return {arm: _scores_of(paths[0]) for (kind, arm), paths in self.files_by_kind.items() if kind == _COHERENCE}

    @cached_property
    def scores(self) -> dict[str, FloatArray]:
        """By arm, coherence by our equation 1 from their tokens and weights; else the column that they published."""
        ours = {
            arm: coherence(table, embeddings=self.vectors)["coherence"].dropna().to_numpy(dtype=np.float64)
            for arm, table in self.features.items()
        }
        return self.published_scores | ours

    @cached_property
    def similarities(self) -> dict[str, FloatArray]:
        """By arm, [n_features, 2]: similarity of the unsteered and of the steered text, in the runs' files."""
        return {arm: _similarities(paths) for (kind, arm), paths in self.files_by_kind.items() if kind == _RUNS}


def _features(path: Path) -> pd.DataFrame:
    raw = read_json(path)
    if not raw:
        raise _wrong_format(path, "features")
    try:
        return pd.DataFrame(
            {
                "feature": [int(key) for key in raw],
                "top_tokens": [[str(item["word"]) for item in row["top_words"]] for row in raw.values()],
                "top_weights": [[float(item["activation"]) for item in row["top_words"]] for row in raw.values()],
                "medical_weights": [[float(x["activation"]) for x in row["medical_words"]] for row in raw.values()],
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _wrong_format(path, "features with top_words and medical_words") from error


def _scores_of(path: Path) -> FloatArray:
    rows = list(csv.DictReader(decode_utf8(read_bytes(path, "coherence"), at=str(path)).splitlines()))
    if not rows:
        raise _wrong_format(path, "features, one a line")
    try:
        return np.array([float(row["coherence_score"]) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong_format(path, "a column coherence_score of numbers") from error


def _similarities(paths: list[Path]) -> FloatArray:
    matches = [_SCORES.search(decode_utf8(read_bytes(path, "run"), at=str(path))) for path in paths]
    for path, match in zip(paths, matches, strict=True):
        if match is None:
            raise _wrong_format(path, "a line 'Semantic Similarity - Baseline: ... | Steered: ...'")
    return np.array([[float(match[1]), float(match[2])] for match in matches if match])


def _wrong_format(path: Path, expected: str) -> BadFile:
    return BadFile(f"this is not the published file: expected {expected}.", at=str(path), fix="copy it again.")


def _number(values: dict[str, Any], arm: str, number: Callable[[Any], float]) -> float:
    return float(number(values[arm])) if arm in values else math.nan


def _counts(files: _Published) -> Iterator[_Row]:
    """Table 1 and Figure 1: how many features, and their tokens in the medical list."""
    printed = {"control": ("101", "0.39"), "treatment": ("111", "0.43")}
    for arm in _ARMS:
        n = _number(files.features, arm, len)
        yield _Row("Table 1", "medical features", arm, printed[arm][0], n)
        note = f"of {_D_SAE:,} features"
        yield _Row("Table 1", "medical features, %", arm, printed[arm][1], 100 * (n / _D_SAE), note)

    n_medical = {arm: [*map(len, table["medical_weights"])] for arm, table in files.features.items()}
    for arm in _ARMS:
        yield _Row("Figure 1", "fewest medical tokens of a feature", arm, "2", _number(n_medical, arm, min))
    n_with_seven = _number(n_medical, "treatment", lambda counts: sum(n >= 7 for n in counts))
    note = "the text says that no feature of the fine-tuned model has 7 or more"
    yield _Row("Figure 1", "features with 7 or more", "treatment", "0", n_with_seven, note)


def _scores(files: _Published) -> Iterator[_Row]:
    """Table 2 and the ranges beside it."""
    printed = {
        "control": {"mean": "0.5438", "median": "0.5648", "lowest": "0.1130", "highest": "0.7641"},
        "treatment": {"mean": "0.3511", "median": "0.3196", "lowest": "0.0615", "highest": "0.6793"},
    }
    numbers: dict[str, Callable[[FloatArray], float]] = {
        "mean": np.mean, "median": np.median, "lowest": np.min, "highest": np.max,
    }  # fmt: skip
    values: dict[str, dict[str, float]] = {arm: {} for arm in _ARMS}
    for arm in _ARMS:
        for name, number in numbers.items():
            values[arm][name] = _number(files.scores, arm, number)
            place = "Table 2" if name in ("mean", "median") else "Results"
            yield _Row(place, f"{name} coherence", arm, printed[arm][name], values[arm][name])
    note = ""
    if "control" in files.scores and "treatment" not in files.scores:
        values["treatment"] = {name: float(value) for name, value in printed["treatment"].items()}
        note = "with the paper's own figures for the fine-tuned model, whose files are not here"
    control, treatment = values["control"], values["treatment"]
    for name, paper in (("mean", "0.1927"), ("median", "0.2452")):
        yield _Row("Table 2", f"difference of the {name}s", "both", paper, control[name] - treatment[name], note)
    ranges = [arm["highest"] - arm["lowest"] for arm in (control, treatment)]
    normalised = (control["mean"] - treatment["mean"]) / (sum(ranges) / 2)
    yield _Row("Results", "normalised mean difference", "both", "0.3037", normalised, note)


def _weights(files: _Published) -> Iterator[_Row]:
    """Mean and variance of the weights of the tokens in the medical list, which the paper calls activations."""
    printed = {"control": ("2.166", "0.633"), "treatment": ("0.794", "0.018")}
    weights = {arm: np.concatenate(list(table["medical_weights"])) for arm, table in files.features.items()}
    means, variances = {}, {}
    for arm in _ARMS:
        means[arm] = _number(weights, arm, np.mean)
        variances[arm] = _number(weights, arm, np.var)
        yield _Row("Word analysis", "mean activation", arm, printed[arm][0], means[arm])
        note = "divided by n, of the tokens in the medical list"
        yield _Row("Word analysis", "variance of activations", arm, printed[arm][1], variances[arm], note)
    for name, paper, values, index in (("mean", "63.34", means, 0), ("variance", "97.16", variances, 1)):
        ours = 100 * (1 - values["treatment"] / values["control"])
        rounded = 100 * (1 - float(printed["treatment"][index]) / float(printed["control"][index]))
        yield _Row("Word analysis", f"{name} lower by, %", "both", paper, ours, from_rounded=rounded)


def _coverage(files: _Published) -> Iterator[_Row]:
    """The share of top tokens that the word vectors know. The authors' code counts only tokens made of letters."""

    def words(table: pd.DataFrame) -> list[str]:
        normalised = [normalise_token(token) for tokens in table["top_tokens"] for token in tokens]
        return [word for word in normalised if word.isalpha()]

    def coverage(tokens: Iterable[str]) -> float:
        return 100 * float(np.mean([files.vectors.row(word) >= 0 for word in tokens]))

    note = "of top tokens that are letters alone"
    unique = _number(files.features, "control", lambda table: coverage(set(words(table))))
    total = _number(files.features, "control", lambda table: coverage(words(table)))
    yield _Row("Discussion", "coverage, unique, %", "control", "84.51", unique, note)
    yield _Row("Discussion", "coverage, total, %", "control", "89.99", total, note)


def _steering(files: _Published) -> Iterator[_Row]:
    """Table 1's lower half, whose runs were not published, and the appendix, whose runs were."""
    unpublished = "the texts behind this figure were not published"
    table = (("passing", "100", "93"), ("mean similarity, steered", "0.6118", "0.5165"),
             ("mean similarity, unsteered", "0.4634", "0.4651"))  # fmt: skip
    for name, *values in table:
        for arm, paper in zip(_ARMS, values, strict=True):
            yield _Row("Table 1", name, arm, paper, math.nan, unpublished, published=False)

    notes = {
        "control": "a coin passes half; the published notebook compares with the fine-tuned model's tokens",
        "treatment": "the first fine-tune, by LoRA",
    }
    for arm, features, passing, share in (("control", "311", "307", "98"), ("treatment", "451", "307", "68")):
        n = _number(files.similarities, arm, len)
        won = _number(files.similarities, arm, lambda scores: (scores[:, 1] > scores[:, 0]).sum())
        yield _Row("Appendix", "features steered", arm, features, n, notes[arm])
        yield _Row("Appendix", "passing", arm, passing, won, notes[arm])
        yield _Row("Appendix", "passing, %", arm, share, 100 * (won / n), notes[arm])
