"""Commands that make what a study needs: a fine-tuned adapter, activations, SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saeffect.cli.console import Narrator
from saeffect.cli.processes import processes
from saeffect.errors import BadFile, ConfigError, NotFound

__all__ = ["finetune", "harvest", "register", "train_sae"]

_File = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; its keys are described in the docs.")]
_Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file (see --keys), or a study, or bundled:<study>, with --arm.")
]
_Arm = Annotated[str | None, typer.Option(help="RECIPE is a study: which of its arms.")]
_Work = Annotated[Path, typer.Option(help="Folder for activations; SAEs of the same model share them.")]

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


def finetune(recipe: _File, out: Annotated[Path, typer.Option(help="Folder for the adapter.")]) -> None:
    """Train a LoRA adapter by a recipe file."""
    from saeffect.models.finetune import FinetuneConfig
    from saeffect.models.finetune import finetune as train

    config = FinetuneConfig.read(_yaml(recipe), at=str(recipe))
    with Narrator() as say:
        train(config, out, say=say)
    typer.echo(f"adapter: {out.resolve()}")


def _show_keys(wanted: bool) -> None:
    if wanted:
        from saeffect.sae.recipe_keys import recipe_keys

        typer.echo(recipe_keys(), nl=False)
        raise typer.Exit


def train_sae(
    recipe: _Recipe,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the SAE; with --arm, by default where the study looks for it.")
    ] = None,
    work: _Work = Path("work"),
    arm: _Arm = None,
    logger: Annotated[str, typer.Option(help="none, wandb or tensorboard, beside metrics.jsonl.")] = "none",
    keys: Annotated[
        bool, typer.Option("--keys", help="Show the keys of a recipe.", callback=_show_keys, is_eager=True)
    ] = False,
) -> None:
    """Train the SAEs of a recipe, or of a study's arm."""
    del keys
    from saeffect.processes import is_first
    from saeffect.sae.metrics_loggers import check_logger
    from saeffect.sae.recipe import train_from_recipe

    check_logger(logger)
    config, usual = _read(recipe, arm)
    folder = out or usual
    if folder is None:
        raise ConfigError("there is no folder for the SAE.", at="--out", fix="add --out FOLDER.")
    with processes() as say:
        train_from_recipe(config, folder, work=work, logger=logger, say=say)  # type: ignore[arg-type]
        if is_first():
            for place in config.folders(folder).values():
                typer.echo(f"SAE: {place.resolve()}")


def harvest(recipe: _Recipe, work: _Work = Path("work"), arm: _Arm = None) -> None:
    """Harvest the activations that a recipe, or a study's arm, trains on."""
    from saeffect.processes import is_first
    from saeffect.sae.recipe import harvest_from_recipe

    config, _ = _read(recipe, arm)
    with processes() as say:
        folders = harvest_from_recipe(config, work=work, say=say)
        if is_first():
            for place in folders:
                typer.echo(f"activations: {place.resolve()}")


def _read(recipe: str, arm: str | None) -> tuple[Any, Path | None]:
    """(the recipe, where a study looks for its SAE)"""
    from saeffect.sae.recipe import SaeRecipe

    if arm is not None:
        from saeffect.study.study import Study
        from saeffect.study.training import arm_folder, arm_recipe

        study = Study.open(recipe)
        return arm_recipe(study, arm), arm_folder(study, arm)
    raw = {"arms": {}} if recipe.startswith(_BUNDLED) else _yaml(Path(recipe))
    if isinstance(raw, dict) and "arms" in raw:
        raise ConfigError(
            "this is a study, which has several arms.", at=recipe, fix="name the one whose SAE to train: --arm control."
        )
    return SaeRecipe.read(raw, at=recipe), None


def _yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise NotFound(f"there is no recipe file {str(path)!r}.", at=str(path), fix="check the path.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadFile(f"this is not YAML in UTF-8: {error}.", at=str(path)) from error
