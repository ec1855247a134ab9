"""The study files that come with the package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from saeffect.errors import unknown_name
from saeffect.lm.loading import BUNDLED

__all__ = ["bundled_folder", "bundled_studies", "bundled_study"]


def bundled_studies() -> list[str]:
    """Names of the bundled studies."""
    return sorted(path.stem for path in bundled_folder().glob("*.yaml"))


def bundled_folder() -> Path:
    """The folder of the bundled study files."""
    return Path(str(importlib.resources.files("saeffect"))) / "bundled" / "studies"


def bundled_study(name: str) -> Path:
    """The file of a bundled study; UnknownName if there is none."""
    stem = name.removeprefix(BUNDLED)
    if stem not in bundled_studies():
        raise unknown_name("bundled study", name, [BUNDLED + s for s in bundled_studies()])
    return bundled_folder() / f"{stem}.yaml"
