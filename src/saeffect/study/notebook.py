"""Steps of a study as functions for notebooks (see `docs/python.md`): match and steer features, put them back, train,
compare, report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from saeffect.comparison import Comparison
from saeffect.diffing.matching import NO_MATCH, match_decoders
from saeffect.diffing.put_back import SIZES, BothRead, outcomes, read, sets_of_changed
from saeffect.diffing.put_back_shares import put_back_table
from saeffect.lm.activations import TokenRows, run_pass
from saeffect.progress import SILENT, Log
from saeffect.report import write_report as write_page
from saeffect.sae.training.config import SaeRecipe
from saeffect.sae.training.recipe import train_from_recipe
from saeffect.steering import Site, SteeringPlan, load_text_vectors, run_trials
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.compare import compare_arms
from saeffect.study.stages.report import report_context
from saeffect.study.study import Arm

__all__ = ["compare", "match_features", "put_back", "steer", "train_sae", "write_report"]

_ROWS = 8  # of text in one pass of the model


def match_features(control: Arm, treatment: Arm) -> pd.DataFrame:
    """For each feature of the control, the treatment's feature whose decoder row has the highest cosine with it.

    Only meaningful if both SAEs read the same hook of models with a common ancestor. SAEs of one model from different
    seeds share few features, so compare the cosines with those of a placebo arm. ShapeMismatch if the decoders differ
    in width.

    Returns:
        One row per control feature: feature; match (number in the treatment's SAE; <NA> for none); cosine, and
        runner_up, that of the second nearest; mutual (the match's nearest is this feature); reason ("" when all is
        defined).
    """
    matching = match_decoders(control.W_dec, treatment.W_dec)
    nearest = matching.forward
    match = pd.Series(nearest.match, dtype="Int64").mask(nearest.match == NO_MATCH)
    return pd.DataFrame(
        {
            "feature": range(matching.n_a),
            "match": match,
            "cosine": nearest.best,
            "runner_up": nearest.runner_up,
            "mutual": matching.mutual,
            "reason": nearest.reason,
        }
    )


@torch.inference_mode()
def steer(
    arm: Arm,
    features: pd.DataFrame,
    rows: TokenRows,
    *,
    embeddings: str = "glove-wiki-gigaword-100",
    **plan: Any,
) -> pd.DataFrame:
    """Trials for `effects`: texts steered along each feature, along placebos and unsteered, with common random numbers.

    One row per feature, prompt, sample, condition and dose. ConfigError if a value of the plan is out of range; other
    errors as `saeffect.steering.run_trials`.

    Args:
        features: Rows of the feature table: columns feature and top_tokens (list of str).
        rows: Text for the hook's mean norm (the unit of doses) and each feature's largest activation.
        embeddings: Word vectors or text encoder for the similarity of texts to top tokens.
        **plan: Fields of `SteeringPlan`: prompts, doses, operator, placebos, samples, max_new_tokens, seed and so on.
    """
    return run_trials(_site(arm, rows), features, SteeringPlan(**plan), vectors=load_text_vectors(embeddings))


def _site(arm: Arm, rows: TokenRows) -> Site:
    """The steering site of the arm, measured on the text without attention sinks."""
    limit = arm.norm_limit(rows)
    largest = torch.zeros(arm.sae.cfg.d_sae)
    norm, count = 0.0, 0
    for start in range(0, len(rows), _ROWS):
        counts = rows.counts_of(start, _ROWS)
        x = run_pass(arm.lm, arm.hook, rows.ids[start : start + _ROWS], limit, counts)[0].float()
        largest = torch.maximum(largest, arm.sae.encode(x).max(0).values)
        norm, count = norm + float(x.norm(dim=1).sum()), count + len(x)
    return Site(arm.lm, arm.hook, arm.W_dec, norm / count, arm.sae, largest, limit.limit)


def put_back(
    control: Arm,
    treatment: Arm,
    rows: TokenRows,
    *,
    sizes: Sequence[int] = SIZES,
    order: Sequence[int] | None = None,
    seed: int = 0,
    log: Log = SILENT,
) -> pd.DataFrame:
    """The share of fine-tuning's effect at the control's hook that the most changed features carry.

    The control's SAE reads both models. Each set of features is put back into the fine-tuned model, and the reverse.
    `rows` are the units of the intervals, so many short ones are best. `order` ranks all features, most changed first,
    by other text; without it, features are chosen on one half of the rows and measured on the other.

    Returns what `saeffect.diffing.put_back_shares.put_back_table` does; errors as `sets_of_changed` and `outcomes`.
    """
    sae, hook = control.sae, control.hook
    texts = read(control.lm, hook, rows, log), read(treatment.lm, hook, rows, log)
    both = BothRead.of(rows, *texts, control.norm_limit(rows))
    sets = sets_of_changed(both, sae, sizes=sizes, order=order, seed=seed)
    parts = [
        *outcomes(treatment.lm, sae, hook, both, sets, edited="tuned", log=log),
        *outcomes(control.lm, sae, hook, both, sets, edited="base", log=log),
    ]
    return put_back_table(pd.concat(parts), rows, sets)


def train_sae(
    recipe: SaeRecipe | Mapping[str, Any], out: Path | str, *, work: Path | str = "work", log: Log = SILENT
) -> Mapping[str, Any]:
    """Train the SAE of a recipe, or resume, and write it to `out`; returns the model card's held-out measurements.

    `recipe` has the keys of a recipe file, see `docs/recipe.md`; `work` is the folder of activations, which SAEs of the
    same model share. ConfigError for a value out of range, UnknownName for an unknown key; other errors as
    `saeffect.sae.training.recipe.train_from_recipe`.
    """
    checked = recipe if isinstance(recipe, SaeRecipe) else SaeRecipe.read(dict(recipe), at="recipe")
    return train_from_recipe(checked, out, work=work, log=log)


def compare(run: RunFolder, *, seed: int | None = None, **settings: Any) -> Comparison:
    """Compare the arms of a finished run again, from its tables; runs no model and writes nothing.

    `settings` replace keys of the `comparison` section (alpha, n_boot, n_permutations, tests); `seed`, for resampling,
    is the study's own if None. ConfigError for a setting out of range, UnknownName for an unknown setting or declared
    test, NotFound if a table of the run is missing.
    """
    section = run.study.config.comparison
    replaced = type(section).read(section.model_dump() | settings, at="comparison")
    return compare_arms(run, replaced, seed=run.study.config.seed if seed is None else seed)


def write_report(run: RunFolder, comparison: Comparison, path: Path | str) -> Path:
    """Write the report of a run with this comparison instead of its own, as one self-contained HTML page."""
    return write_page(comparison, path, context=report_context(run))
