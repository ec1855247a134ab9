"""How far a study is: each stage, what the running one is at, whether anybody is running it; and the study as its run
recorded it, whose models and SAEs may be gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saeffect.errors import SaeffectError
from saeffect.io import fingerprint, read_json
from saeffect.progress import duration
from saeffect.study.progress_file import RunProgress, read_progress
from saeffect.study.run import stage_keys
from saeffect.study.study import Study
from saeffect.web.site import Site

__all__ = ["RecordedStudy", "RunState", "StageState", "headline", "recorded_study", "run_state"]


@dataclass(frozen=True)
class StageState:
    """A stage: `status` is "done", "running", "waiting", or "earlier" (done before, and to be looked at again)."""

    key: str
    status: str
    seconds: str = ""


@dataclass(frozen=True)
class RunState:
    """A run directory at this moment.

    Attributes:
        condition: "empty" (no study yet), "running", "stopped" (half-finished, and nobody goes on) or "finished".
        title: Title of the study, else its name; "" if empty.
        stages: All stages in their order.
        doing: What the running stage is at, in words; "" if it does not say.
        share: Done share of that, from 0 to 1; None if it does not say.
        n_done: Finished stages.
        version: Changes when a stage has finished.
    """

    condition: str
    title: str
    stages: tuple[StageState, ...]
    doing: str
    share: float | None
    n_done: int
    version: str

    def outline(self, ready: bool) -> str:
        """Changes when the page has to: what else changes is only how far a stage is."""
        return fingerprint([self.version, self.condition, ready, [asdict(stage) for stage in self.stages]])[:16]

    def as_json(self, ready: bool) -> dict[str, Any]:
        """All of it, for a page's script; `ready` says whether its report is."""
        return asdict(self) | {"ready": ready, "outline": self.outline(ready)}


def run_state(site: Site) -> RunState:
    """The state of a site's run directory; SaeffectError if there is a study that cannot be read."""
    progress = read_progress(site.folder)
    if progress is not None and not progress.is_alive():
        progress = None
    notes = site.stages
    made = {key: str(note.get("fingerprint")) for key, note in notes.items()}
    version = fingerprint([made, str(site.manifest.get("study_sha256"))])[:16]
    if progress is None and not site.has("study.yaml"):
        return RunState("empty", "", (), "", None, 0, version)
    if progress is not None:
        title, keys = progress.title or progress.study, progress.stages
    else:
        study = recorded_study(site)
        title, keys = study.config.title or study.config.name, stage_keys(study)
    stages = _stages(keys, notes, progress.stage if progress else "")
    n_done = sum(stage.status == "done" for stage in stages)
    condition = "running" if progress else "finished" if n_done == len(stages) else "stopped"
    doing, share = _doing(progress) if progress else ("", None)
    return RunState(condition, title, stages, doing, share, n_done, version)


def _stages(keys: tuple[str, ...], notes: Mapping[str, Mapping[str, Any]], running: str) -> tuple[StageState, ...]:
    at = keys.index(running) if running in keys else len(keys)
    found = []
    for i, key in enumerate(keys):
        note = notes.get(key)
        if i == at:
            status = "running"
        elif note is None:
            status = "waiting"
        else:
            status = "done" if i < at else "earlier"
        seconds = note.get("seconds") if note is not None and i != at else None
        found.append(
            StageState(
                key, status, duration(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else ""
            )
        )
    return tuple(found)


def _doing(progress: RunProgress) -> tuple[str, float | None]:
    if progress.total <= 0 or not progress.what:
        return "", None
    share = min(1.0, max(0.0, progress.done / progress.total))
    text = f"{progress.what}: {progress.done:,} of {progress.total:,} {progress.unit}"
    took = progress.updated - progress.started
    if 0.02 < share < 1 and took > 2:
        text += f", about {duration(took * (1 - share) / share)} left"
    silent = time.time() - progress.updated
    if silent > 120:
        text += f" (last heard of {duration(silent)} ago)"
    return text, share


def headline(site: Site) -> str:
    """The answer in a sentence as the comparison left it; "" if there is none yet."""
    try:
        answer = read_json(site.path("comparison", "answer.json"))
        return str(answer.get("learned") or answer["headline"])
    except (SaeffectError, OSError, KeyError, AttributeError):
        return ""


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
