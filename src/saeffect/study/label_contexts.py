"""Contexts for labels: those that a label is made from, and further active and silent ones that it is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.lm.activations import TokenRows
from saeffect.progress import SILENT, Log
from saeffect.study.both_models import refuse_remote_code, special_mask
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Arm, Study

__all__ = ["LabelPlan", "read_contexts"]


@dataclass(frozen=True)
class LabelPlan:
    """How labels are made and scored.

    Attributes:
        contexts: Of each kind, active and silent, that a label is scored on.
        rows: Of the study's text that are read for them; all if None.
        seed: Draws and shuffles them.
        per_request: How many are in one request; with 1 no answer depends on another context.
        parallel: Requests at a time.
        thinking: Tokens that a model may think before each answer.
    """

    contexts: int = 10
    rows: int | None = None
    seed: int = 0
    per_request: int = 5
    parallel: int = 4
    thinking: int = 0


def read_contexts(
    run: RunFolder, arm: str, features: Sequence[int], plan: LabelPlan, log: Log = SILENT
) -> pd.DataFrame:
    """Read the study's text with an arm's model and SAE, and draw the contexts of some features.

    An active context surrounds the peak of a sequence in which the feature fires, a silent one a random position
    without activation; all sequences are equally likely, except those with a shown context, which are left out. Shown
    contexts are the run's strongest that do not peak at special tokens; a rare feature's take at most half of its
    sequences.

    One row a context: feature, kind ("shown", "active", "silent"), tokens, activations (of shown ones). Errors as
    `Study.open_arm`. Memory: 5 bytes a feature and sequence.
    """
    examples = run.read_table(run.arm(arm, "examples.parquet"))
    by_feature = dict(list(examples[examples["feature"].isin(list(features))].groupby("feature")))
    refuse_remote_code(run.study, arm)
    opened, rows = run.study.open_arm(arm, log), run.study.rows()
    reading = _Reading(run.study, opened, rows.head(plan.rows) if plan.rows else rows, plan.seed)
    reading.text(list(features), log)
    contexts: list[tuple[Any, ...]] = []
    for i, feature in enumerate(features):
        top = by_feature.get(feature, examples.head(0)).sort_values("rank")
        peaks = [tokens[position] for tokens, position in zip(top["tokens"], top["position"], strict=True)]
        top = top[np.array([token not in reading.special_strings for token in peaks], dtype=bool)]  # perhaps none
        fired = int((reading.peaks[i] >= 0).sum())
        top = top.head(max(fired - plan.contexts, -(-fired // 2)) if fired else len(top))
        excluded = ["".join(tokens) for tokens in top["tokens"]]
        active = reading.draw(reading.peaks[i] >= 0, excluded, plan.contexts)
        silent_rows = reading.silent[i].copy()
        silent_rows[active] = False
        silent = reading.draw(silent_rows, excluded, plan.contexts)
        kinds = [("shown", *context) for context in zip(top["tokens"], top["activations"], strict=True)]
        kinds += [("active", reading.around(row, int(reading.peaks[i, row])), []) for row in active]
        kinds += [("silent", reading.around(row, int(reading.centres[row])), []) for row in silent]
        contexts += [(feature, kind, list(tokens), [float(a) for a in acts]) for kind, tokens, acts in kinds]
    return pd.DataFrame(contexts, columns=["feature", "kind", "tokens", "activations"])


class _Reading:
    """The text, and by feature and sequence where the features fire.

    `peaks` holds the position of the highest activation, -1 for none; `silent` whether there is no activation around
    `centres`, a random position of each sequence (-1 if no token counts).
    """

    def __init__(self, study: Study, arm: Arm, rows: TokenRows, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._study, self._arm, self._rows, self._window = study, arm, rows, study.config.features.window
        self._order, self._draws = rng.permutation(len(rows)), rng.random(len(rows))
        self._n_bos, self._strings = arm.lm.n_bos(rows.ids[0]), arm.lm.token_strings()
        self._special = special_mask(arm.lm)
        self.special_strings = {self._strings[token] for token in self._special.nonzero().flatten().tolist()}
        self.centres: npt.NDArray[np.int32] = np.full(len(rows), -1, dtype=np.int32)
        self._ends = np.zeros(len(rows), dtype=np.int32)

    @torch.inference_mode()
    def text(self, features: list[int], log: Log) -> None:
        """Read all rows."""
        arm, rows = self._arm, self._rows
        self.peaks = np.full((len(features), len(rows)), -1, dtype=np.int32)
        self.silent = np.zeros(self.peaks.shape, dtype=bool)
        for start, ids, x, kept_rows, _ in arm.read(rows, self._study.residuals, log, f"contexts, {arm.name}"):
            counts = kept_rows[:, self._n_bos :]
            kept = counts & ~self._special[ids[:, self._n_bos :]]
            acts = arm.sae.encode(x[:, self._n_bos :])[..., features].masked_fill(~kept[..., None], 0)
            for i in np.flatnonzero(kept.any(dim=1).numpy()):
                row, positions = start + int(i), kept[i].nonzero().flatten()
                centre = int(positions[int(self._draws[row] * len(positions))])
                peak, position = acts[i].max(dim=0)
                self.peaks[:, row] = torch.where(peak > 0, position, -1).numpy()
                self.centres[row], self._ends[row] = centre, int(counts[i].nonzero().max()) + 1
                window = acts[i, max(0, centre - self._window) : centre + self._window // 3 + 1]
                self.silent[:, row] = (window.amax(dim=0) <= 0).numpy()

    def draw(self, candidates: npt.NDArray[np.bool_], excluded: Sequence[str], n: int) -> list[int]:
        """Up to `n` random sequences among the candidates that hold none of the excluded texts."""
        drawn: list[int] = []
        for row in self._order[candidates[self._order]].tolist():
            if len(drawn) == n:
                break
            text = "".join(self._strings[token] for token in self._rows.ids[row, self._n_bos :])
            if not any(shown in text for shown in excluded):
                drawn.append(row)
        return drawn

    def around(self, row: int, position: int) -> list[str]:
        """The tokens around a position, as many as in a shown context, without padding."""
        stop = min(position + self._window // 3 + 1, int(self._ends[row]))
        ids = self._rows.ids[row, self._n_bos :][max(0, position - self._window) : stop]
        return [self._strings[token] for token in ids]
