"""`saeffect finetune`: train a LoRA adapter by a recipe file."""

from __future__ import annotations

import contextlib
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from saeffect.cli.console import ConsoleProgress, keys_option, show
from saeffect.config_file import read_config_file
from saeffect.errors import ConfigError, unknown_name
from saeffect.paths import BUNDLED, BUNDLED_FOLDER, user_path

if TYPE_CHECKING:
    from saeffect.lm.finetune import FinetuneConfig
    from saeffect.study.study import Study

__all__ = ["finetune"]


class _NullText(StrEnum):
    own = "own"
    general = "general"


def finetune(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="YAML file (see --keys), or bundled:gpt2-medical-lora.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the adapter; of nulls by default nulls/<recipe>.", parser=user_path)
    ] = None,
    null: Annotated[
        int | None, typer.Option("--null", metavar="K", help="Make K fine-tunes on text that teaches nothing new.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="STUDY", help="Study for which the nulls are measured; adapters are deleted.")
    ] = None,
    null_text: Annotated[
        _NullText, typer.Option(help="What nulls read: the base model's own samples, or the recipe's control_text.")
    ] = _NullText.own,
    keep_adapters: Annotated[
        bool,
        typer.Option("--keep-adapters", help="Keep the nulls' adapters; finished nulls without one are made again."),
    ] = False,
    keys: Annotated[bool, keys_option("Show the keys of a recipe.", "saeffect.lm.finetune:finetune_keys")] = False,
) -> None:
    """Train a LoRA adapter by a recipe file, or nulls of it."""
    del keys
    from saeffect.lm.finetune import FinetuneConfig
    from saeffect.lm.finetune import finetune as train

    config = FinetuneConfig.read(_read_recipe(recipe), at=recipe)
    if null is not None:
        folder = out or Path("nulls") / Path(recipe.removeprefix(BUNDLED)).stem
        _make_nulls(config, folder, null, study, {"text": null_text.value, "keep_adapters": keep_adapters})
        return
    if out is None or study is not None or keep_adapters:
        problem = "give a folder for the adapter" if out is None else "--study and --keep-adapters go with --null"
        raise ConfigError(f"{problem}.", at="--out" if out is None else "--null", fix="see saeffect finetune --help.")
    with ConsoleProgress() as log:
        train(config, out, log=log)
    show(f"adapter: {out.resolve()}")


def _read_recipe(recipe: str) -> Any:
    """The contents of a recipe file; paths in a bundled one are relative to the current folder."""
    if not recipe.startswith(BUNDLED):
        return read_config_file(user_path(recipe), "recipe")
    names = {BUNDLED + file.stem: file for file in sorted((BUNDLED_FOLDER / "recipes").glob("*.yaml"))}
    if recipe not in names:
        raise unknown_name("bundled recipe", recipe, names, at="RECIPE")
    return read_config_file(names[recipe], "recipe", relative_to=Path())


def _make_nulls(config: FinetuneConfig, out: Path, n: int, study: str | None, options: dict[str, Any]) -> None:
    from saeffect.study.nulls import make_nulls
    from saeffect.study.study import Study

    opened = None if study is None else Study.open(study)
    with ConsoleProgress() as log:
        result = make_nulls(config, out, n, study=opened, log=log, **options)
    if result.elsewhere:
        show(f"{len(result.elsewhere)} more are being made by other processes")
    if result.trained:
        show(f"{len(result.trained)} adapters of nulls: {out.resolve()}")
        show("to measure them: the same command with --study STUDY")
    if result.measured:
        show(f"{len(result.measured)} nulls: {out.resolve()}")
        show(f"to use them, write into the study: {_study_line(out, opened)}")


def _study_line(folder: Path, study: Study | None) -> str:
    """The line of a study file that names the folder: relative to the file, unless the study is bundled."""
    path = folder.resolve()
    if study is not None and not study.reference.startswith(BUNDLED):
        with contextlib.suppress(ValueError):  # on another drive
            path = Path(os.path.relpath(path, study.source.resolve().parent))
    return str(yaml.safe_dump({"nulls": path.as_posix()}, width=10_000, allow_unicode=True)).strip()
