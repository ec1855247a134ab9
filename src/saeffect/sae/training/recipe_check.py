"""What can be wrong with a recipe, found before anything heavy starts and before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from saeffect.errors import BadFile, ConfigError, EmptySelection, IncompatibleSae, SaeffectError
from saeffect.lm.activations import TokenRows
from saeffect.lm.corpora import read_corpus
from saeffect.lm.harvest import check_disk_space, harvest_bytes
from saeffect.lm.hooks import edited, parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import locate_model, model_shape
from saeffect.sae.formats.saelens import read_sae_config
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.metrics_loggers import LoggerName, check_logger
from saeffect.sae.training.recipe_config import SaeRecipe
from saeffect.sae.training.step import new_sae
from saeffect.sae.training.warm_start import copy_weights

__all__ = ["refuse_before_harvest", "refuse_before_loading", "refuse_unfit_model", "refuse_unwritable_folders"]


def refuse_before_loading(recipe: SaeRecipe, logger: LoggerName = "none") -> None:
    """Everything that can be seen without the model's weights.

    Raises:
        SaeffectError: The logger's package is missing; a text cannot be read; `init_from` is no SAE of this width;
            the model is not there, or is known to have no such block.
    """
    check_logger(logger)
    for index, source in enumerate(recipe.text):
        try:
            next(read_corpus(source.path, field=source.field))
        except SaeffectError as error:
            raise error.placed(f"text.{index}") from None
    model = locate_model(recipe.model, at="model")
    shape = model_shape(model)
    if shape is not None:
        parse_hook(recipe.hook, shape.n_layers, at="hook")
        if shape.n_positions and recipe.context_size > shape.n_positions:
            raise ConfigError(
                f"rows have {recipe.context_size:,} tokens; {recipe.model.path} takes {shape.n_positions:,}.",
                at="context_size",
                fix=f"set context_size to {shape.n_positions} or less.",
            )
    for place, config in _places(recipe):
        if config.init_from is None:
            continue
        cfg = read_sae_config(config.init_from, at=f"{place}.init_from")
        for name, found, wanted in (
            ("d_sae", cfg.d_sae, config.d_sae),
            ("d_in", cfg.d_in, cfg.d_in if shape is None else shape.d_model),
        ):
            if found != wanted:
                raise IncompatibleSae(
                    f"this SAE has {name}={found}, but the one to be trained has {name}={wanted}.",
                    at=f"{place}.init_from",
                    fix="start from an SAE of the same size, trained at a hook of this model.",
                )


def refuse_unfit_model(recipe: SaeRecipe, lm: LanguageModel) -> None:
    """What the loaded model can tell.

    Raises:
        ConfigError: It has no such hook.
        SaeffectError: `init_from` cannot be loaded, or does not fit.
    """
    parse_hook(recipe.hook, lm.n_layers, at="hook")
    try:
        with edited(lm, recipe.hook, lambda x: x):
            pass
    except SaeffectError as error:
        error.at = "hook"
        raise
    for place, config in _places(recipe):
        if config.init_from is not None:
            # The same copy that training begins with, so that nothing can go wrong there that did not here.
            sae = new_sae(config, lm.d_model)
            copy_weights(config.init_from, sae, 1.0, unit_decoder=config.unit_decoder, at=f"{place}.init_from")


def refuse_before_harvest(
    recipe: SaeRecipe, lm: LanguageModel, rows: Iterable[TokenRows], work: Path, *, n_training_rows: int | None
) -> None:
    """What the tokenised text can tell.

    Args:
        recipe: What to train.
        lm: The model.
        rows: All that will be harvested.
        work: Where to.
        n_training_rows: Rows of a pass over the training text; None where only the end will tell.

    Raises:
        EmptySelection: The text is less than one batch.
        ConfigError: The activations do not fit under the cap, or on the disk.
    """
    most = None if n_training_rows is None else n_training_rows * (recipe.context_size - 1)
    if most is not None and most < recipe.sae.batch_size:
        raise EmptySelection(
            f"the text gives at most {most:,} activations, fewer than one batch of {recipe.sae.batch_size:,}.",
            at="sae.batch_size",
            fix="give more text, or a smaller batch_size.",
        )
    total = sum(harvest_bytes(lm, part) for part in rows)
    check_disk_space(work, total, recipe.max_disk_bytes)


def refuse_unwritable_folders(folders: Mapping[str, Path]) -> None:
    """Refuse folders that could not be made or written, without making them.

    Args:
        folders: By the name of the option that gave them.

    Raises:
        BadFile: The nearest folder that is there is a file, or not ours to write.
    """
    for option, folder in folders.items():
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            continue
        why = f"{str(there)!r} is a file" if not there.is_dir() else f"{str(there)!r} may not be written"
        raise BadFile(f"nothing can be put into {str(folder)!r}: {why}.", at=option, fix="choose another folder.")


def _places(recipe: SaeRecipe) -> Iterable[tuple[str, SaeTrainingConfig]]:
    """Key of the recipe and what it says, of each SAE."""
    return [(f"saes.{name}" if name else "sae", config) for name, config in recipe.trainings().items()]
