"""`saeffect train-sae`: train the SAEs of a recipe, or of a study's arm; `saeffect harvest`: what they train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saeffect.cli.console import keys_option, process_log, show
from saeffect.config_file import read_config_file
from saeffect.errors import ConfigError
from saeffect.paths import user_path

__all__ = ["Arm", "Keys", "Recipe", "Work", "harvest", "read_recipe", "train_sae"]


Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file (see --keys), or a study, or bundled:<study>, with --arm.")
]
Arm = Annotated[str | None, typer.Option(help="RECIPE is a study: which of its arms.")]
Work = Annotated[
    Path, typer.Option(help="Folder for activations; SAEs of the same model share them.", parser=user_path)
]
Keys = Annotated[bool, keys_option("Show the keys of a recipe.", "saeffect.sae.training.config:recipe_keys")]


def train_sae(
    recipe: Recipe,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the SAE; with --arm, by default where the study looks for it.", parser=user_path),
    ] = None,
    work: Work = Path("work"),
    arm: Arm = None,
    logger: Annotated[str, typer.Option(help="none, wandb or tensorboard, beside metrics.jsonl.")] = "none",
    keys: Keys = False,
) -> None:
    """Train the SAEs of a recipe, or of a study's arm."""
    del keys
    from saeffect.parallel import is_first
    from saeffect.sae.training.loggers import check_logger
    from saeffect.sae.training.recipe import train_from_recipe

    check_logger(logger)
    config, default_out = read_recipe(recipe, arm)
    folder = out or default_out
    if folder is None:
        raise ConfigError("there is no folder for the SAE.", at="--out", fix="add --out FOLDER.")
    with process_log() as log:
        train_from_recipe(config, folder, work=work, logger=logger, log=log)  # type: ignore[arg-type]
        if is_first():
            for sae_folder in config.folders(folder).values():
                show(f"SAE: {sae_folder.resolve()}")


def read_recipe(recipe: str, arm: str | None) -> tuple[Any, Path | None]:
    """The recipe of a file or of a study's arm, and where the study expects the arm's SAE."""
    from saeffect.sae.training.config import SaeRecipe

    if arm is not None:
        from saeffect.study.study import Study
        from saeffect.study.training import arm_folder, arm_recipe

        study = Study.open(recipe)
        return arm_recipe(study, arm), arm_folder(study, arm)
    raw = {"arms": {}} if recipe.startswith("bundled:") else read_config_file(recipe, "recipe")
    if isinstance(raw, dict) and "arms" in raw:
        raise ConfigError(
            "this is a study, which has several arms.", at=recipe, fix="name the one whose SAE to train: --arm control."
        )
    return SaeRecipe.read(raw, at=recipe), None


def harvest(recipe: Recipe, work: Work = Path("work"), arm: Arm = None, keys: Keys = False) -> None:
    """Harvest the activations that a recipe, or a study's arm, trains on."""
    del keys
    from saeffect.parallel import is_first
    from saeffect.sae.training.recipe import harvest_from_recipe

    config, _ = read_recipe(recipe, arm)
    with process_log() as log:
        folders = harvest_from_recipe(config, work=work, log=log)
        if is_first():
            for folder in folders:
                show(f"activations: {folder.resolve()}")
