"""The page on two models without an SAE: findings, words, what both write after neutral openings, and layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from saeffect.diffing.trace import OPENINGS, SAMPLES, Trace
from saeffect.io import atomic_path
from saeffect.report.html import page_environment, page_style
from saeffect.report.words.first import more_expected

__all__ = ["ModelsPage", "write_models_page"]

_WORDS = 20


@dataclass(frozen=True)
class ModelsPage:
    """What the page says besides the trace: heading, models and text, findings in lines, and the study file."""

    title: str
    facts: Sequence[tuple[str, str]]
    findings: Sequence[str]
    config: str


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
        verb: [_word(trace, tokens, int(i)) for i in more_expected(trace, plain, less=verb == "less")[:_WORDS]]
        for verb in ("more", "less")
    }
    order = np.argsort(-trace.openings, kind="stable")
    rows = [(opening * SAMPLES, OPENINGS[opening], float(trace.openings[opening])) for opening in order.tolist()]
    written = [
        (opening, f"{kl:.3g}", decode(trace.base_texts[row].tolist()), decode(trace.texts[row].tolist()))
        for row, opening, kl in rows
    ]
    layers = [(str(layer), f"{100 * moved:.1f}") for layer, moved in enumerate(trace.layers.tolist())]
    # The style is our own file; all else is escaped.
    values: dict[str, Any] = {"page": page, "words": words, "written": written, "layers": layers}
    content = page_environment().get_template("models.html.j2").render(style=Markup(page_style()), **values)
    with atomic_path(path) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8", newline="\n")
    return path


def _word(trace: Trace, tokens: Sequence[str], i: int) -> tuple[str, str, str, str]:
    base, tuned = (100 * float(p) for p in trace.expected[:, i])
    return tokens[i].strip(), f"{base:.3f}", f"{tuned:.3f}", f"{tuned / base:.2g}"
