"""Commands that make what a study needs: a fine-tuned adapter, activations, SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saeffect.cli.console import ConsoleProgress, show
from saeffect.cli.processes import processes
from saeffect.config_file import read_config_file
from saeffect.errors import ConfigError
from saeffect.paths import user_path

__all__ = ["finetune", "harvest", "register", "train_sae"]

_File = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file (see --keys).", parser=user_path)]
_Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file (see --keys), or a study, or bundled:<study>, with --arm.")
]
_Arm = Annotated[str | None, typer.Option(help="RECIPE is a study: which of its arms.")]
_Work = Annotated[
    Path, typer.Option(help="Folder for activations; SAEs of the same model share them.", parser=user_path)
]

_BUNDLED = "bundled:"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("finetune", help="Train a LoRA adapter and measure what it does to perplexity.")(finetune)
    app.command(
        "train-sae",
        help="Train sparse autoencoders on a model's activations. Stopped, the same command goes on. Many processes:"
        " torchrun --nproc-per-node=N -m saeffect train-sae ...",
    )(train_sae)
    app.command("harvest", help="Write a model's activations to disk, for train-sae; also under torchrun.")(harvest)


def _finetune_keys(wanted: bool) -> None:
    if wanted:
        from saeffect.lm.finetune import finetune_keys

        show(finetune_keys().rstrip("\n"))
        raise typer.Exit


def _recipe_keys(wanted: bool) -> None:
    if wanted:
        from saeffect.sae.training.config import recipe_keys

        show(recipe_keys().rstrip("\n"))
        raise typer.Exit


_Keys = Annotated[bool, typer.Option("--keys", help="Show the keys of a recipe.", callback=_recipe_keys, is_eager=True)]


def finetune(
    recipe: _File,
    out: Annotated[Path, typer.Option(help="Folder for the adapter.", parser=user_path)],
    keys: Annotated[
        bool, typer.Option("--keys", help="Show the keys of a recipe.", callback=_finetune_keys, is_eager=True)
    ] = False,
) -> None:
    """Train a LoRA adapter by a recipe file."""
    del keys
    from saeffect.lm.finetune import FinetuneConfig
    from saeffect.lm.finetune import finetune as train

    config = FinetuneConfig.read(read_config_file(recipe, "recipe"), at=str(recipe))
    with ConsoleProgress() as log:
        train(config, out, log=log)
    show(f"adapter: {out.resolve()}")


def train_sae(
    recipe: _Recipe,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the SAE; with --arm, by default where the study looks for it.", parser=user_path),
    ] = None,
    work: _Work = Path("work"),
    arm: _Arm = None,
    logger: Annotated[str, typer.Option(help="none, wandb or tensorboard, beside metrics.jsonl.")] = "none",
    keys: _Keys = False,
) -> None:
    """Train the SAEs of a recipe, or of a study's arm."""
    del keys
    from saeffect.parallel import is_first
    from saeffect.sae.training.loggers import check_logger
    from saeffect.sae.training.recipe import train_from_recipe

    check_logger(logger)
    config, usual = _read(recipe, arm)
    folder = out or usual
    if folder is None:
        raise ConfigError("there is no folder for the SAE.", at="--out", fix="add --out FOLDER.")
    with processes() as log:
        train_from_recipe(config, folder, work=work, logger=logger, log=log)  # type: ignore[arg-type]
        if is_first():
            for place in config.folders(folder).values():
                show(f"SAE: {place.resolve()}")


def harvest(recipe: _Recipe, work: _Work = Path("work"), arm: _Arm = None, keys: _Keys = False) -> None:
    """Harvest the activations that a recipe, or a study's arm, trains on."""
    del keys
    from saeffect.parallel import is_first
    from saeffect.sae.training.recipe import harvest_from_recipe

    config, _ = _read(recipe, arm)
    with processes() as log:
        folders = harvest_from_recipe(config, work=work, log=log)
        if is_first():
            for place in folders:
                show(f"activations: {place.resolve()}")


def _read(recipe: str, arm: str | None) -> tuple[Any, Path | None]:
    """(the recipe, where a study looks for its SAE)"""
    from saeffect.sae.training.config import SaeRecipe

    if arm is not None:
        from saeffect.study.study import Study
        from saeffect.study.training import arm_folder, arm_recipe

        study = Study.open(recipe)
        return arm_recipe(study, arm), arm_folder(study, arm)
    raw = {"arms": {}} if recipe.startswith(_BUNDLED) else read_config_file(recipe, "recipe")
    if isinstance(raw, dict) and "arms" in raw:
        raise ConfigError(
            "this is a study, which has several arms.", at=recipe, fix="name the one whose SAE to train: --arm control."
        )
    return SaeRecipe.read(raw, at=recipe), None
