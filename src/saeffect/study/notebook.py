"""What a notebook does by single calls: match and steer features, train SAEs, compare and report a finished run.

`docs/python.md` uses each of them once, and a test runs that page.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from saeffect.comparison import Comparison
from saeffect.diffing.matching import NO_MATCH, match_decoders
from saeffect.lm.activations import TokenRows, kept_positions
from saeffect.lm.hooks import capture
from saeffect.progress import SILENT, Log
from saeffect.report import write_figures
from saeffect.report import write_report as write_page
from saeffect.sae.training.config import SaeRecipe
from saeffect.sae.training.recipe import train_from_recipe
from saeffect.steering import Site, SteeringPlan, load_text_vectors, run_trials
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.compare import compare_arms
from saeffect.study.stages.report import report_context
from saeffect.study.study import Arm

__all__ = ["compare", "match_features", "steer", "train_sae", "write_report"]

_ROWS = 8  # of text in one pass of the model


def match_features(control: Arm, treatment: Arm) -> pd.DataFrame:
    """For each feature of the control, the treatment's feature whose decoder row has the highest cosine to its own.

    Decoder rows can be compared if both SAEs read the same hook of models with a common ancestor. Two SAEs of one
    model, trained from different seeds, share few features: read the cosines beside those of a placebo arm.

    Args:
        control: Any arm.
        treatment: Another of the same width.

    Returns:
        One row a feature of the control: feature; match (number in the treatment's SAE; <NA> for none); cosine, and
        runner_up, that of the second nearest; mutual (the match's nearest is this feature); reason ("" when all is
        defined).

    Raises:
        ShapeMismatch: The decoders differ in width.
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
    """Generate texts with each feature's direction added, along placebos and unsteered, from the same random numbers.

    Args:
        arm: Model, SAE and hook.
        features: Rows of the feature table: columns feature and top_tokens (list of str).
        rows: Text on which the hook's mean norm, the unit of doses, and each feature's largest activation are measured.
        embeddings: Word vectors, or a text encoder, for the similarity of texts to top tokens.
        **plan: Of `SteeringPlan`: prompts, doses, operator, placebos, samples, max_new_tokens, seed and so on.

    Returns:
        The trials, one row per feature, prompt, sample, condition and dose, as `effects` takes them.

    Raises:
        ConfigError: A value of the plan is out of range.
        SaeffectError: As `saeffect.steering.run_trials`.
    """
    return run_trials(_site(arm, rows), features, SteeringPlan(**plan), vectors=load_text_vectors(embeddings))


def _site(arm: Arm, rows: TokenRows) -> Site:
    """Where the arm is steered, measured on the text, attention sinks left out."""
    limit = arm.norm_limit(rows)
    largest = torch.zeros(arm.sae.cfg.d_sae)
    norm, count = 0.0, 0
    n_bos = arm.lm.n_bos(rows.ids[0])
    for ids in torch.from_numpy(rows.ids.astype("int64")).split(_ROWS):
        x = capture(arm.lm, arm.hook, ids).cpu()[:, n_bos:]
        x = x[kept_positions(x, limit)].float()
        largest = torch.maximum(largest, arm.sae.encode(x).max(0).values)
        norm, count = norm + float(x.norm(dim=1).sum()), count + len(x)
    return Site(arm.lm, arm.hook, arm.W_dec, norm / count, arm.sae, largest, limit.limit)


def train_sae(
    recipe: SaeRecipe | Mapping[str, Any], out: Path | str, *, work: Path | str = "work", log: Log = SILENT
) -> Mapping[str, Any]:
    """Train the SAE of a recipe, or go on with it, and write it with its model card.

    Args:
        recipe: Keys as in a recipe file, see `docs/recipe.md`.
        out: Folder for the SAE.
        work: Folder for activations; SAEs of the same model share them.
        log: Receives lines and progress.

    Returns:
        The measurements on held-out text that the model card shows.

    Raises:
        ConfigError: A value of the recipe is out of range.
        UnknownName: A key that a recipe does not have.
        SaeffectError: As `saeffect.sae.training.recipe.train_from_recipe`.
    """
    checked = recipe if isinstance(recipe, SaeRecipe) else SaeRecipe.read(dict(recipe), at="recipe")
    return train_from_recipe(checked, out, work=work, log=log)


def compare(run: RunFolder, *, seed: int | None = None, **settings: Any) -> Comparison:
    """Compare the arms of a finished run again, from its tables and without a model; nothing is written.

    Args:
        run: As `run_study` returns it.
        seed: Of resamples; the study's own if None.
        **settings: Keys of the study's `comparison` section to change: alpha, n_boot, n_permutations, tests.

    Raises:
        ConfigError: A setting is out of range.
        UnknownName: A setting, or a declared test, that does not exist.
        NotFound: A table of the run is missing.
    """
    own = run.study.config.comparison
    changed = type(own).read(own.model_dump() | settings, at="comparison")
    return compare_arms(run, changed, seed=run.study.config.seed if seed is None else seed)


def write_report(run: RunFolder, comparison: Comparison, path: Path | str) -> Path:
    """Write the report of a run with this comparison in place of its own, as one self-contained page.

    Args:
        run: As `run_study` returns it.
        comparison: As `compare` gives.
        path: Of the page; replaced if there.
    """
    context = report_context(run)
    with tempfile.TemporaryDirectory() as folder:
        figures = write_figures(comparison, Path(folder), context=context)
        return write_page(comparison, path, context=context, figures=figures)
