"""Commands that make what a study needs: a fine-tuned adapter, an SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saeffect.cli.console import Narrator
from saeffect.errors import BadFile, NotFound

__all__ = ["finetune", "register", "train_sae"]

_Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; its keys are described in the docs.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("finetune", help="Train a LoRA adapter and measure what it does to perplexity.")(finetune)
    app.command("train-sae", help="Harvest activations and train a sparse autoencoder on them.")(train_sae)


def finetune(recipe: _Recipe, out: Annotated[Path, typer.Option(help="Folder for the adapter.")]) -> None:
    """Train a LoRA adapter by a recipe file."""
    from saeffect.models.finetune import FinetuneConfig
    from saeffect.models.finetune import finetune as train

    config = FinetuneConfig.read(_yaml(recipe), at=str(recipe))
    with Narrator() as say:
        train(config, out, say=say)
    typer.echo(f"adapter: {out.resolve()}")


def train_sae(
    recipe: _Recipe,
    out: Annotated[Path, typer.Option(help="Folder for the SAE.")],
    work: Annotated[Path, typer.Option(help="Folder for activations; arms of the same model share them.")] = Path(
        "work"
    ),
) -> None:
    """Train an SAE by a recipe file."""
    from saeffect.sae.recipe import SaeRecipe, train_from_recipe

    config = SaeRecipe.read(_yaml(recipe), at=str(recipe))
    with Narrator() as say:
        train_from_recipe(config, out, work=work, say=say)
    typer.echo(f"SAE: {out.resolve()}")


def _yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise NotFound(f"there is no recipe file {str(path)!r}.", at=str(path))
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadFile(f"this is not YAML in UTF-8: {error}.", at=str(path)) from error
