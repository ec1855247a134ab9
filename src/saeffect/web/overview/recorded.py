"""A study as its run recorded it, whose models and SAEs may be gone."""

from __future__ import annotations

from pathlib import Path

from saeffect.errors import SaeffectError
from saeffect.study.study import Study
from saeffect.web.site import Site

__all__ = ["RecordedStudy", "recorded_study"]


class RecordedStudy(Study):
    """A study that takes hooks and hashes from the manifest, and asks for no SAE to name its folder."""

    def hook(self, name: str) -> str:
        """The recorded hook, else as in a study."""
        recorded = self.identities.get(name, {}).get("hook")
        return recorded or super().hook(name)

    def sae_folder(self, name: str) -> Path:
        """The folder that the study names, also if it is gone."""
        try:
            return super().sae_folder(name)
        except SaeffectError:
            return Path(self.arm(name).sae or "")


def recorded_study(site: Site) -> RecordedStudy:
    """The study of a run directory with what its manifest knows; errors as `Site.study`."""
    study = RecordedStudy(site.study.config, site.study.source)
    arms, text = site.manifest.get("arms"), site.manifest.get("text_sha256")
    if isinstance(arms, dict) and all(isinstance(identity, dict) for identity in arms.values()):
        study.__dict__["identities"] = arms  # where a cached_property keeps its value
    if isinstance(text, str):
        study.__dict__["text_identity"] = text
    return study
