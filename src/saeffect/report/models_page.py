"""Two models without an SAE: the first findings as lines of text, and the page on both models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from markupsafe import Markup

from saeffect.diffing.trace import OPENINGS, SAMPLES, Trace
from saeffect.io import atomic_path
from saeffect.report.html import page_environment, page_style
from saeffect.report.tables.view import TableView
from saeffect.report.words.numbers import p_text, plural

__all__ = ["ModelsPage", "first_findings", "is_same", "more_expected", "word_tokens", "write_models_page"]

_MAX_ROWS = 20


@dataclass(frozen=True)
class ModelsPage:
    """The page besides the trace: heading, models and text, lines of findings, the study file, and if the base model
    was pushed along the mean difference, a sentence on that and the texts.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    findings: Sequence[str]
    config: str
    push: str = ""
    pushed: TableView | None = None


def write_models_page(
    page: ModelsPage,
    trace: Trace,
    path: Path,
    *,
    tokens: Sequence[str],
    plain: npt.NDArray[np.bool_],
    decode: Callable[[list[int]], str],
) -> Path:
    """Write the page, atomically: one file that loads nothing. `tokens` [d_vocab] are those of all ids, `plain` bool
    [d_vocab] says which are words, `decode` gives the text of a list of ids.
    """
    words = {
        verb: [_word_row(trace, tokens, int(i)) for i in more_expected(trace, plain, less=verb == "less")[:_MAX_ROWS]]
        for verb in ("more", "less")
    }
    order = np.argsort(-trace.openings, kind="stable")
    rows = [(opening * SAMPLES, OPENINGS[opening], float(trace.openings[opening])) for opening in order.tolist()]
    written = [
        (opening, f"{kl:.3g}", decode(trace.base_texts[row].tolist()), decode(trace.texts[row].tolist()))
        for row, opening, kl in rows
    ]
    layers = [(str(layer), f"{100 * change:.1f}") for layer, change in enumerate(trace.layers.tolist())]
    # The style is our own file; all else is escaped.
    values: dict[str, Any] = {"page": page, "words": words, "written": written, "layers": layers}
    content = page_environment().get_template("models.html.j2").render(style=Markup(page_style()), **values)
    with atomic_path(path) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8", newline="\n")
    return path


def _word_row(trace: Trace, tokens: Sequence[str], i: int) -> tuple[str, str, str, str]:
    base, tuned = (100 * float(p) for p in trace.expected[:, i])
    return tokens[i].strip(), f"{base:.3f}", f"{tuned:.3f}", f"{tuned / base:.2g}"


_MAX_ITEMS = 8  # words, features
_MIN_FIRINGS = 20  # tokens on which a listed feature fires at least, in one of the models
_N_TOKENS = 4  # tokens a feature


def is_same(trace: Trace) -> bool:
    """Whether the two models are equal: all predictions and activations are, to the last digit."""
    return trace.numbers["kl"] == 0 and not trace.layers.any()


def more_expected(trace: Trace, plain: npt.NDArray[np.bool_], *, less: bool = False) -> npt.NDArray[np.int64]:
    """Ids of the `plain` tokens (bool [d_vocab]) that the tuned model expects more than the base model, most telling
    first.

    By p log(p / q), their share of the divergence of the mean predictions, where positive; `less` swaps the models.
    """
    base, tuned = trace.expected.astype(np.float64)[:: -1 if less else 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where((tuned > base) & (base > 0) & plain, tuned * np.log(tuned / base), 0.0)
    order = np.argsort(-share, kind="stable")
    return order[share[order] > 0]


def word_tokens(tokens: Sequence[str], plain: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Bool [d_vocab]: the plain tokens with two letters or more."""
    return plain & np.array([sum(map(str.isalpha, token)) > 1 for token in tokens])


def first_findings(
    trace: Trace,
    tokens: Sequence[str],
    plain: npt.NDArray[np.bool_],
    *,
    top_tokens: Sequence[Sequence[str]] = (),
    groups: pd.DataFrame | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> list[str]:
    """Lines of findings, the plainest first; arguments as in `more_expected`.

    `top_tokens` are those of each feature of the SAE, [d_sae], empty without one; `groups` the table `change_groups`,
    if it was made; `decode` gives the text of a list of ids (None: the tokens joined).
    """
    words = word_tokens(tokens, plain)
    lines = [_perplexity_line(trace), _distance_line(trace)]
    for less, verb in ((False, "more"), (True, "less")):
        ids = more_expected(trace, words, less=less)[:_MAX_ITEMS]
        if len(ids):
            lines.append(f"words expected {verb} often: " + ", ".join(_word_ratio(trace, tokens, int(i)) for i in ids))
    if len(top_tokens):
        lines += _claimed_group_lines(groups) or _changed_feature_lines(trace, top_tokens)
    lines += _opening_lines(trace, tokens, decode)
    return lines


def _perplexity_line(trace: Trace) -> str:
    numbers = trace.numbers
    names = [key.removeprefix("loss_base_") for key in numbers if key.startswith("loss_base_")]
    parts = []
    for name in names:
        base, tuned = (math.exp(numbers[f"loss_{which}_{name}"]) for which in ("base", "tuned"))
        parts.append(f"{base:.4g} → {tuned:.4g} on {name}")
    return f"perplexity: {', '.join(parts)}"


def _distance_line(trace: Trace) -> str:
    last, largest = len(trace.layers) - 1, int(np.argmax(trace.layers))
    location = "" if largest == last else f", most after block {largest} ({100 * trace.layers[largest]:.0f} %)"
    return (
        f"predictions: KL {trace.numbers['kl']:.3g} nats a token; the residual stream moves by"
        f" {100 * trace.layers[last]:.0f} % of its length after the last block{location}"
    )


def _word_ratio(trace: Trace, tokens: Sequence[str], i: int) -> str:
    base, tuned = trace.expected[:, i]
    return f"{tokens[i].strip()} (× {tuned / base:.2g})"


def _claimed_group_lines(groups: pd.DataFrame | None) -> list[str]:
    """The claimed groups of features, if any."""
    if groups is None or groups.empty:
        return []
    claimed = groups[groups["claimed"].astype(bool)]
    return [
        f"clearly {row.direction} than in null fine-tunes: {row.name}"
        f" ({plural(row.n_features, 'feature')}; {p_text(row.p)})"
        for row in claimed.head(_MAX_ITEMS).itertuples(index=False)
    ]


def _changed_feature_lines(trace: Trace, top_tokens: Sequence[Sequence[str]]) -> list[str]:
    """Features whose mean activation on the text changed most, by ratio, among those that fire often enough."""
    base, tuned, density_base, density_tuned = trace.read.astype(np.float64)
    fires = np.maximum(density_base, density_tuned) * trace.numbers["n_tokens"] >= _MIN_FIRINGS
    floor = np.median(base[fires]) / 10 if fires.any() else 0.0  # else features near 0 would lead every list
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.where(fires, np.log((tuned + floor) / (base + floor)), 0.0)
    lines = []
    for order, verb in ((np.argsort(-change, kind="stable"), "more"), (np.argsort(change, kind="stable"), "less")):
        features = [int(f) for f in order[:_MAX_ITEMS] if (change[f] > 0) == (verb == "more") and change[f] != 0]
        if features:
            ratios = [f"× {tuned[f] / base[f]:.2g}" if base[f] > 0 else "new" for f in features]
            labels = [" ".join(token.strip() for token in top_tokens[f][:_N_TOKENS]) for f in features]
            items = [f"{f} ({label}: {ratio})" for f, label, ratio in zip(features, labels, ratios, strict=True)]
            lines.append(f"features that fire {verb}: {', '.join(items)}")
    return lines


def _opening_lines(trace: Trace, tokens: Sequence[str], decode: Callable[[list[int]], str] | None) -> list[str]:
    """The texts of both models after the opening at which they differ most."""
    opening = int(np.argmax(trace.openings))

    def text(rows: npt.NDArray[np.int32]) -> str:
        ids = rows[opening * SAMPLES].tolist()
        written = decode(ids) if decode is not None else "".join(tokens[i] for i in ids)
        return repr(" ".join(written.split())[:90])

    return [
        f"after {OPENINGS[opening]!r} the base model writes {text(trace.base_texts)}",
        f"{'':6}and the fine-tuned one {text(trace.texts)}",
    ]
