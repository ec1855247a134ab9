"""`saeffect harvest`: write the training activations of a recipe, or a study's arm, to disk."""

from __future__ import annotations

from pathlib import Path

from saeffect.cli.console import process_log, show
from saeffect.cli.train_sae import Arm, Keys, Recipe, Work, read_recipe

__all__ = ["harvest"]


def harvest(recipe: Recipe, work: Work = Path("work"), arm: Arm = None, keys: Keys = False) -> None:
    """Harvest the activations that a recipe, or a study's arm, trains on."""
    del keys
    from saeffect.parallel import is_first
    from saeffect.sae.training.recipe import harvest_from_recipe

    config, _ = read_recipe(recipe, arm)
    with process_log() as log:
        folders = harvest_from_recipe(config, work=work, log=log)
        if is_first():
            for place in folders:
                show(f"activations: {place.resolve()}")
