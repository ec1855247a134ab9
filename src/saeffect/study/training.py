"""Training recipe of an arm's SAE: the section `training` with the arm's model and hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeffect.errors import ConfigError
from saeffect.lm.loading import BUNDLED
from saeffect.sae.hub import is_sae_name
from saeffect.sae.training.config import SaeRecipe
from saeffect.study.study import Study

__all__ = ["arm_folder", "arm_recipe", "check_training"]

# Keys of a recipe that each arm sets.
_ARM_KEYS = {"model": "arms.<arm>.model", "hook": "arms.<arm>.hook", "saes": "arms.<arm>.sae"}


def arm_recipe(study: Study, arm: str) -> SaeRecipe:
    """The recipe by which an arm's SAE is trained. UnknownName for an unknown arm or key in `training`; ConfigError if
    the study has no section `training`, the arm no hook, or a value is out of range.
    """
    config, section = study.arm(arm), study.config.training
    if section is None:
        raise ConfigError(
            "the study does not say how its SAEs are trained.",
            at=study.at("training"),
            fix="add a section training: a recipe without model and hook.",
        )
    for key, arm_key in _ARM_KEYS.items():
        if key in section:
            raise ConfigError(
                f"training has the key {key}, which is the arm's own.",
                at=study.at("training", key),
                fix=f"say it in {arm_key}.",
            )
    if config.hook is None:
        raise ConfigError(
            f"to train the SAE of {arm}, its hook must be known.",
            at=study.at("arms", arm, "hook"),
            fix="set hook: blocks.<layer>.hook_resid_pre.",
        )
    values = {"bos": study.config.text.bos, **section, "model": config.model, "hook": config.hook}
    recipe = SaeRecipe.read(values, at=study.at("training"))
    if not config.training:
        return recipe
    # Without the arm's changes the recipe is valid, so the error is in them.
    sae_section: dict[str, Any] = {**(section.get("sae") or {}), **config.training}
    return SaeRecipe.read({**values, "sae": sae_section}, at=study.at("arms", arm, "training"))


def arm_folder(study: Study, arm: str) -> Path | None:
    """Where the SAE of an arm is; None for a bundled or published one, or none. UnknownName for an unknown arm."""
    sae = study.arm(arm).sae
    return None if sae is None or sae.startswith(BUNDLED) or is_sae_name(sae) else Path(sae)


def check_training(study: Study) -> str | None:
    """Validate the recipes of all arms, and return a line about them, None for a study without training settings.

    ConfigError if a recipe is wrong, or an arm changes a recipe that does not exist.
    """
    config = study.config
    if config.training is None and not any(arm.training for arm in config.arms.values()):
        return None
    recipes = {name: arm_recipe(study, name) for name in config.arms}
    widths = ", ".join(f"{name} {r.sae.architecture} {r.sae.d_sae:,}" for name, r in recipes.items())
    return f"training: {widths}"
