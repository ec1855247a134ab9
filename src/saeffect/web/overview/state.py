"""Progress of a study: its stages, the running one, whether a process is running it; and the study as its run recorded
it, whose models and SAEs may be gone.
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
    """A stage: `status` is "done", "running", "waiting", or "earlier" (done before, to be checked again)."""

    key: str
    status: str
    seconds: str = ""


@dataclass(frozen=True)
class RunState:
    """A run directory at this moment.

    Attributes:
        condition: "empty" (no study yet), "running", "stopped" (unfinished, and no process runs it) or "finished".
        title: Title of the study, else its name; "" if empty.
        stages: All stages in their order.
        doing: Progress of the running stage in words; "" if unknown.
        share: Its done share, from 0 to 1; None if unknown.
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
        """A hash of all but the progress within a stage: when it changes, the page reloads."""
        return fingerprint([self.version, self.condition, ready, [asdict(stage) for stage in self.stages]])[:16]

    def as_json(self, ready: bool) -> dict[str, Any]:
        """The state for a page's script; `ready`: whether the report is."""
        return asdict(self) | {"ready": ready, "outline": self.outline(ready)}


def run_state(site: Site) -> RunState:
    """The state of a site's run directory; SaeffectError if there is a study that cannot be read."""
    progress = read_progress(site.folder)
    if progress is not None and not progress.is_alive():
        progress = None
    records = site.stages
    fingerprints = {key: str(note.get("fingerprint")) for key, note in records.items()}
    version = fingerprint([fingerprints, str(site.manifest.get("study_sha256"))])[:16]
    if progress is None and not site.has("study.yaml"):
        return RunState("empty", "", (), "", None, 0, version)
    if progress is not None:
        title, keys = progress.title or progress.study, progress.stages
    else:
        study = recorded_study(site)
        title, keys = study.config.title or study.config.name, stage_keys(study)
    stages = _stages(keys, records, progress.stage if progress else "")
    n_done = sum(stage.status == "done" for stage in stages)
    condition = "running" if progress else "finished" if n_done == len(stages) else "stopped"
    doing, share = _progress_text(progress) if progress else ("", None)
    return RunState(condition, title, stages, doing, share, n_done, version)


def _stages(keys: tuple[str, ...], records: Mapping[str, Mapping[str, Any]], running: str) -> tuple[StageState, ...]:
    i_running = keys.index(running) if running in keys else len(keys)
    states = []
    for i, key in enumerate(keys):
        record = records.get(key)
        if i == i_running:
            status = "running"
        elif record is None:
            status = "waiting"
        else:
            status = "done" if i < i_running else "earlier"
        seconds = record.get("seconds") if record is not None and i != i_running else None
        states.append(
            StageState(
                key, status, duration(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else ""
            )
        )
    return tuple(states)


def _progress_text(progress: RunProgress) -> tuple[str, float | None]:
    if progress.total <= 0 or not progress.what:
        return "", None
    share = min(1.0, max(0.0, progress.done / progress.total))
    text = f"{progress.what}: {progress.done:,} of {progress.total:,} {progress.unit}"
    elapsed = progress.updated - progress.started
    if 0.02 < share < 1 and elapsed > 2:
        text += f", about {duration(elapsed * (1 - share) / share)} left"
    silence = time.time() - progress.updated
    if silence > 120:
        text += f" (last heard of {duration(silence)} ago)"
    return text, share


def headline(site: Site) -> str:
    """The comparison's answer in a sentence; "" if there is none yet."""
    try:
        answer = read_json(site.path("comparison", "answer.json"))
        return str(answer.get("learned") or answer["headline"])
    except (SaeffectError, OSError, KeyError, AttributeError):
        return ""


class RecordedStudy(Study):
    """A study with hooks and hashes from the manifest, whose SAEs need not exist."""

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
    """The study of a run directory with the data of its manifest; errors as `Site.study`."""
    study = RecordedStudy(site.study.config, site.study.source)
    arms, text = site.manifest.get("arms"), site.manifest.get("text_sha256")
    if isinstance(arms, dict) and all(isinstance(identity, dict) for identity in arms.values()):
        study.__dict__["identities"] = arms  # where a cached_property keeps its value
    if isinstance(text, str):
        study.__dict__["text_identity"] = text
    return study
