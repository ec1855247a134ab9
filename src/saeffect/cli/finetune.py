"""`saeffect finetune`: train a LoRA adapter by a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeffect.cli.console import ConsoleProgress, keys_option, show
from saeffect.config_file import read_config_file
from saeffect.paths import user_path

__all__ = ["finetune"]


def _keys() -> str:
    from saeffect.lm.finetune import finetune_keys

    return finetune_keys()


def finetune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file (see --keys).", parser=user_path)],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.", parser=user_path)],
    keys: Annotated[bool, keys_option("Show the keys of a recipe.", _keys)] = False,
) -> None:
    """Train a LoRA adapter by a recipe file."""
    del keys
    from saeffect.lm.finetune import FinetuneConfig
    from saeffect.lm.finetune import finetune as train

    config = FinetuneConfig.read(read_config_file(recipe, "recipe"), at=str(recipe))
    with ConsoleProgress() as log:
        train(config, out, log=log)
    show(f"adapter: {out.resolve()}")
