"""What the changed features cause: put back to the other model's activations, how much of the change do they undo?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from saeffect.config import PutBackConfig
from saeffect.diffing.cross_activity import change_scores
from saeffect.diffing.put_back import BothRead, FeatureSet, outcomes, read, sets_of_changed, sets_of_group
from saeffect.diffing.put_back_shares import OWN_WRITING, put_back_table
from saeffect.diffing.trace import OPENINGS, SAMPLES
from saeffect.errors import placed
from saeffect.lm.activations import TokenRows
from saeffect.lm.language_model import LanguageModel
from saeffect.progress import Log
from saeffect.steering.generate import continue_prompts
from saeffect.steering.sampling import NoiseCell, Sampling
from saeffect.study.run_folder import PartialTable, RunFolder
from saeffect.study.study import Arm, Study
from saeffect.study.texts import study_rows

__all__ = ["put_back_inputs", "put_back_rows", "run_put_back"]

VERSION = 3
_ALL = "all named groups"


def put_back_inputs(run: RunFolder) -> dict[str, Any]:
    study = run.study
    return {
        "version": VERSION,
        "arms": {"control": study.identities[study.control], "treatment": study.identities[study.treatment]},
        "text": study.text_identity,
        "changes": run.digest(*(run.path("comparison", f"{name}.parquet") for name in ("changes", "change_groups"))),
        "read": study.config.changes.model_dump(),
        "put_back": _settings(study).model_dump(),
        "seed": study.config.seed,
    }


def run_put_back(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `comparison/put_back.parquet`, resuming after the last finished batch of rows; nothing if it cannot be."""
    study = run.study
    control, treatment = study.pair
    order, n_read = _order(run)
    rows, is_fresh = put_back_rows(study, n_read)
    if len(rows) < 2:
        log("  one row of text cannot both choose features and measure what they cause")
        return []
    base, tuned = study.open_arm(control, log), study.open_model(treatment, log)
    if (tuned.d_model, tuned.n_layers) != (base.lm.d_model, base.lm.n_layers):
        log("  the arms' models differ in size, so no activation of one can be put into the other")
        return []
    rows = _with_own_writing(rows, tuned, study.config.seed)
    activations = [read(lm, base.hook, rows, log) for lm in (base.lm, tuned)]
    both = BothRead.of(rows, activations[0], activations[1], base.norm_limit(rows))
    forward, reverse = _sets(run, both, base, order if is_fresh else None)
    saved = run.partial("put back", put_back_inputs(run))
    results = [
        _measured(tuned, "tuned", base, both, forward, saved, log),
        _measured(base.lm, "base", base, both, reverse, saved, log),
    ]
    table = put_back_table(pd.concat(results), rows, [*forward, *(group for group in reverse if group not in forward)])
    table["chosen_on"] = "other text" if is_fresh else "the other half of the rows"
    return [run.write_table(run.path("comparison", "put_back.parquet"), table)]


def put_back_rows(study: Study, n_read: int) -> tuple[TokenRows, bool]:
    """So many rows of each source as the study says, each cut; and whether none is among the first `n_read`, on which
    features were chosen. If fewer than two rows of some source are left behind them, rows are taken from the beginning.
    """
    config, text = _settings(study), study.rows()
    if n_read:
        wanted = (n_read + config.rows * len(text.names)) * text.context_size
        longer = study.config.text.model_copy(update={"tokens": max(wanted, study.config.text.tokens)})
        control = study.control
        with placed(study.at("text")):
            text = study_rows(longer, lambda: study.open_model(control), prepend_bos=study.prepend_bos)
    is_unread = np.arange(len(text)) >= n_read
    is_fresh = n_read > 0 and all((is_unread & (text.sources == i)).sum() >= 2 for i in np.unique(text.sources))
    usable = is_unread if is_fresh else np.ones(len(text), dtype=bool)
    picked = [np.flatnonzero(usable & (text.sources == i))[: config.rows] for i in range(len(text.names))]
    return text.part(np.sort(np.concatenate(picked)), config.tokens_per_row), is_fresh


def _with_own_writing(rows: TokenRows, tuned: LanguageModel, seed: int) -> TokenRows:
    """`rows`, then what the fine-tuned model writes after each opening, as the source `OWN_WRITING`.

    The base model is the worse at predicting it, by the KL between the two if nothing is cut off the distribution, so
    the share of the loss is defined there: on other text half the tokens may have become likelier and half less so.
    """
    width = rows.context_size
    prompts = [tuned.encode_prompt(opening)[: width - 1] for opening in OPENINGS]
    sampling = Sampling(max_new_tokens=width - 1, temperature=1.0, top_p=1.0, frequency_penalty=0.0)
    cells = [NoiseCell(seed, opening, SAMPLES) for opening in OPENINGS]  # a sample behind those of the trace
    texts = continue_prompts(tuned, prompts, cells, sampling)
    written = np.array([[*prompt, *text][:width] for prompt, text in zip(prompts, texts, strict=True)], dtype=np.int32)
    counts = None
    if rows.counts is not None:
        is_written = np.arange(width) >= np.array([len(prompt) for prompt in prompts])[:, None]
        counts = np.concatenate([rows.counts, is_written])
    sources = np.concatenate([rows.sources, np.full(len(written), len(rows.names))])
    return TokenRows(np.concatenate([rows.ids, written]), sources, (*rows.names, OWN_WRITING), counts)


def _settings(study: Study) -> PutBackConfig:
    assert study.config.put_back is not None
    return study.config.put_back


def _order(run: RunFolder) -> tuple[list[int] | None, int]:
    """Features by how much they changed on the first rows of the text, and how many rows those are; None, 0 if unknown.

    From the table of what changed on equal text, where the study has it.
    """
    table = run.table_or_none(run.path("comparison", "changes.parquet"))
    if table is None:
        return None, 0
    rows = table[table["basis"] == "read"].sort_values("feature")
    means = rows.rename(columns={"base": "mean_control", "tuned": "mean_treatment", "change": "difference"})
    scores = np.nan_to_num(np.abs(change_scores(means)), nan=-1.0)
    return np.argsort(-scores, kind="stable").tolist(), _n_changes_rows(run.study)


def _n_changes_rows(study: Study) -> int:
    """Rows of text on which changes were found."""
    return min(study.config.changes.rows, len(study.rows()))


def _sets(
    run: RunFolder, both: BothRead, control: Arm, order: list[int] | None
) -> tuple[list[FeatureSet], list[FeatureSet]]:
    """What is put back into the fine-tuned model, and into the base model: there named groups only all together."""
    config, seed, sae = _settings(run.study), run.study.config.seed, control.sae
    sizes = (*config.sizes, *(n for n in config.sizes_reversed if n not in config.sizes))
    changed = sets_of_changed(both, sae, sizes=sizes, order=order, seed=seed)
    named: list[FeatureSet] = []
    if order is not None:  # else the groups come from the rows that are measured
        for name, features in _named(run).items():
            named += sets_of_group(both, sae, name, features, seed=seed)
    reverse = (*config.sizes_reversed, sae.cfg.d_sae)
    forward = [group for group in changed if group.n in (*config.sizes, sae.cfg.d_sae)]
    together = [group for group in named if group.name == _ALL]
    return [*forward, *named], [*(group for group in changed if group.n in reverse), *(together or named)]


def _named(run: RunFolder) -> dict[str, list[int]]:
    """Groups that the study claims to have changed, the surest first, and all of them together."""
    table = run.table_or_none(run.path("comparison", "change_groups.parquet"))
    if table is None or table.empty:
        return {}
    groups: dict[str, list[int]] = {}
    for row in table[table["claimed"].astype(bool)].to_dict("records"):
        name = str(row["name"])
        groups[f"{name} ({row['group']})" if name in groups else name] = [int(feature) for feature in row["features"]]
    named = dict(list(groups.items())[: _settings(run.study).groups])
    if len(groups) > 1:
        named[_ALL] = sorted({feature for members in groups.values() for feature in members})
    return named


def _measured(
    lm: LanguageModel,
    edited: Literal["tuned", "base"],
    control: Arm,
    both: BothRead,
    sets: list[FeatureSet],
    saved: PartialTable,
    log: Log,
) -> pd.DataFrame:
    finished = saved.read(log)
    pieces = [] if finished is None else [finished[finished["edited"] == edited]]
    done = {int(row) for piece in pieces for row in piece["row"]}
    for piece in outcomes(lm, control.sae, control.hook, both, sets, edited=edited, done=done, log=log):
        saved.add(piece)
        pieces.append(piece)
    return pd.concat(pieces, ignore_index=True)
