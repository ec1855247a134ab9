"""Contexts for labels: those that a label is made from, and others, active and silent, that it is scored on."""

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
from saeffect.study.both_models import refuse_own_code, special_mask
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Arm, Study

__all__ = ["LabelPlan", "read_contexts"]


@dataclass(frozen=True)
class LabelPlan:
    """How labels are asked for.

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

    Active contexts are around the peak of a sequence in which the feature fires, silent ones around a random position,
    with no activation; all sequences are as likely, but for those that hold a shown context. Shown ones are the run's
    strongest, without those that peak at special tokens; of a rare feature they leave half of the sequences.

    One row a context: feature, kind ("shown", "active", "silent"), tokens, activations (of shown ones). Errors as
    `Study.open_arm`. Memory: 5 bytes a feature and sequence.
    """
    examples = run.read_table(run.arm(arm, "examples.parquet"))
    by_feature = dict(list(examples[examples["feature"].isin(list(features))].groupby("feature")))
    refuse_own_code(run.study, arm)
    opened, rows = run.study.open_arm(arm, log), run.study.rows()
    read = _Reading(run.study, opened, rows.head(plan.rows) if plan.rows else rows, plan.seed)
    read.text(list(features), log)
    found: list[dict[str, Any]] = []
    for i, feature in enumerate(features):
        own = by_feature.get(feature, examples.head(0)).sort_values("rank")
        own = own[[tokens[at] not in read.hidden for tokens, at in zip(own["tokens"], own["position"], strict=True)]]
        fired = int((read.peaks[i] >= 0).sum())
        own = own.head(max(fired - plan.contexts, -(-fired // 2)) if fired else len(own))
        seen = ["".join(tokens) for tokens in own["tokens"]]
        active = read.draw(read.peaks[i] >= 0, seen, plan.contexts)
        others = read.silent[i].copy()
        others[active] = False
        silent = read.draw(others, seen, plan.contexts)
        parts = [("shown", *context) for context in zip(own["tokens"], own["activations"], strict=True)]
        parts += [("active", read.around(row, int(read.peaks[i, row])), []) for row in active]
        parts += [("silent", read.around(row, int(read.centres[row])), []) for row in silent]
        found += [
            {"feature": feature, "kind": kind, "tokens": list(tokens), "activations": [float(a) for a in acts]}
            for kind, tokens, acts in parts
        ]
    return pd.DataFrame(found, columns=["feature", "kind", "tokens", "activations"])


class _Reading:
    """The text and where features fire in it, feature by sequence.

    `peaks` holds the position of the highest activation, -1 for none; `silent` whether there is none around `centres`,
    a random position of each sequence, -1 where no token counts.
    """

    def __init__(self, study: Study, arm: Arm, rows: TokenRows, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._study, self._arm, self._rows, self._window = study, arm, rows, study.config.features.window
        self._order, self._draws = rng.permutation(len(rows)), rng.random(len(rows))
        self._n_bos, self._strings = arm.lm.n_bos(rows.ids[0]), arm.lm.token_strings()
        self._special = special_mask(arm.lm)
        self.hidden = {self._strings[token] for token in self._special.nonzero().flatten().tolist()}
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
                row, places = start + int(i), kept[i].nonzero().flatten()
                centre = int(places[int(self._draws[row] * len(places))])
                peak, at = acts[i].max(dim=0)
                self.peaks[:, row] = torch.where(peak > 0, at, -1).numpy()
                self.centres[row], self._ends[row] = centre, int(counts[i].nonzero().max()) + 1
                window = acts[i, max(0, centre - self._window) : centre + self._window // 3 + 1]
                self.silent[:, row] = (window.amax(dim=0) <= 0).numpy()

    def draw(self, fits: npt.NDArray[np.bool_], seen: Sequence[str], n: int) -> list[int]:
        """Up to `n` random sequences of those that fit and hold none of the texts."""
        found: list[int] = []
        for row in self._order[fits[self._order]].tolist():
            if len(found) == n:
                break
            text = "".join(self._strings[token] for token in self._rows.ids[row, self._n_bos :])
            if not any(part in text for part in seen):
                found.append(row)
        return found

    def around(self, row: int, position: int) -> list[str]:
        """The tokens around a position, as many as a shown context has; a tail that does not count is padding."""
        stop = min(position + self._window // 3 + 1, int(self._ends[row]))
        ids = self._rows.ids[row, self._n_bos :][max(0, position - self._window) : stop]
        return [self._strings[token] for token in ids]
