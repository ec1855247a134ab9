"""Both models of a run, steered with features of one arm as in the study's steering, token by token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.errors import ConfigError
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.residuals import machine_memory
from saeffect.progress import Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae
from saeffect.steering import NoiseCell, Site, SteeringPlan, features_together, stream
from saeffect.steering.actions import actions_of
from saeffect.study.both_models import refuse_remote_code, size_obstacle
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.dose_search import matched_lists_of, matched_placebos, site_of
from saeffect.study.study import Arm
from saeffect.web.play.ask import Ask
from saeffect.web.play.side import Side
from saeffect.web.play.worker import Event, error_fields

__all__ = ["Engine", "features_to_steer"]


class Engine:
    """Loads models and SAEs on first use and keeps them in memory. Not thread-safe, but for `state`.

    `run_of` returns the run directory at each request, since a run may be in progress.
    """

    def __init__(self, run_of: Callable[[], RunFolder]) -> None:
        self._run_of = run_of
        self._run: RunFolder | None = None
        self._lms: dict[str, LanguageModel] = {}
        self._saes: dict[str, SparseAutoencoder] = {}
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"state": "cold"}

    @property
    def state(self) -> dict[str, Any]:
        """`state`: cold, loading, ready or failed (with what, at, fix); `seconds` of loading."""
        with self._lock:
            return dict(self._state)

    def warm(self) -> Iterator[Event]:
        """Load all that the first request needs, and run each model on a few tokens."""
        started = time.monotonic()
        self._set(state="loading")
        try:
            run = self._current_run()
            for name in _side_arms(run):
                yield {"type": "working", "what": f"loading {run.study.arm(name).model.path}"}
                lm = self._lm(run, name)
                if run.study.has_saes:
                    self._sae(run, name)
                lm.plain_tokens()
                lm.token_strings()
                plan = Ask(prompt="A", max_new_tokens=1).plan("A")
                list(stream(lm, "", lm.encode_prompt("Once upon a"), [NoiseCell(0, "A", 0)], plan))
        except Exception as error:
            self._set(state="failed", **error_fields(error))
            raise
        seconds = round(time.monotonic() - started, 2)
        self._set(state="ready", seconds=seconds)
        yield {"type": "done", "seconds": seconds}

    def answer(self, ask: Ask) -> Iterator[Event]:
        """The events of a request; the last one, "done", holds the whole result.

        Errors as `actions_of`; ConfigError for a prompt too long or a chat turn without a template, Undefined for
        features that cannot be steered.
        """
        started = time.monotonic()
        if self.state["state"] != "ready":
            yield from (event for event in self.warm() if event["type"] != "done")
        run = self._current_run()
        sides = self._sides(run, ask)
        yield {"type": "start", "sides": [side.summary() for side in sides], **_scale(run, ask)}
        for side in sides:
            yield {"type": "tokens", "side": side.name, **(side.step() or {})}
        for side in sides:
            yield {"type": "prompt", "side": side.name, "tokens": side.read_prompt()}
        active = list(sides)
        while active:
            for side in list(active):
                step = side.step()
                if step is None:
                    active.remove(side)
                else:
                    yield {"type": "tokens", "side": side.name, **step}
        yield {
            "type": "done",
            "seconds": round(time.monotonic() - started, 2),
            "result": {
                "ask": ask.model_dump(mode="json"),
                "sides": [side.result() for side in sides],
                **_scale(run, ask),
            },
        }

    def _current_run(self) -> RunFolder:
        run = self._run_of()
        if self._run is None or run.study is not self._run.study:
            self._lms, self._saes, self._run = {}, {}, _CachingRunFolder(run.folder, run.study)
        return self._run

    def _lm(self, run: RunFolder, arm: str) -> LanguageModel:
        if arm not in self._lms:
            refuse_remote_code(run.study, arm)
            model = run.study.arm(arm).model
            same = next((lm for name, lm in self._lms.items() if run.study.arm(name).model == model), None)
            if same is None:
                _check_memory(list(self._lms.values()))
            self._lms[arm] = same or run.study.open_model(arm, Log())
        return self._lms[arm]

    def _sae(self, run: RunFolder, arm: str) -> SparseAutoencoder:
        if arm not in self._saes:
            self._saes[arm] = load_sae(run.study.sae_folder(arm), at=run.study.at("arms", arm, "sae"))
        return self._saes[arm]

    def _sides(self, run: RunFolder, ask: Ask) -> list[Side]:
        features = features_to_steer(run, ask)
        sides = []
        for name in _side_arms(run):
            if ask.features and (obstacle := size_obstacle(run.study, ask.arm, name)):
                raise ConfigError(
                    f"{obstacle}, so this feature cannot be added to both.",
                    at=run.study.at("arms", name),
                    fix="let both models write without a feature.",
                )
            lm = self._lm(run, name)
            text = _chat_turn(lm, ask.prompt) if ask.chat else ask.prompt
            plan = ask.plan(text)
            _check_length(lm, text, plan)
            site = self._site(run, ask.arm, lm) if ask.features else None
            actions = actions_of(site, features, plan, ["top_tokens"]) if site and features is not None else None
            sides.append(Side(name, run.study.arm(name).role, lm, site, text, plan, actions, ask.features))
        return sides

    def _site(self, run: RunFolder, arm: str, lm: LanguageModel) -> Site:
        """The arm's site on any model: both get the same vector, in units of the mean norm of the arm's model."""
        config = run.study.arm(arm)
        return site_of(run, Arm(arm, config.role, lm, self._sae(run, arm), run.study.hook(arm)))

    def _set(self, **state: Any) -> None:
        with self._lock:
            self._state = state


class _CachingRunFolder(RunFolder):
    """A run directory whose tables are read again only when their files change."""

    def read_table(self, path: Path) -> pd.DataFrame:
        """As `RunFolder.read_table`; do not change what it returns."""
        status = path.stat() if path.is_file() else None
        stamp = None if status is None else (status.st_ino, status.st_size, status.st_mtime_ns)
        cache: dict[Path, tuple[Any, pd.DataFrame]] = self.__dict__.setdefault("_tables", {})
        if stamp is None or path not in cache or cache[path][0] != stamp:
            cache[path] = (stamp, super().read_table(path))
        return cache[path][1]


def _side_arms(run: RunFolder) -> list[str]:
    """The arms whose models answer: control, then treatment."""
    return [run.study.control, run.study.treatment]


def features_to_steer(run: RunFolder, ask: Ask) -> pd.DataFrame | None:
    """The feature table of a request, as `run_trials` takes it: a feature, or a set of them; None without features.

    ConfigError for a number that the arm does not have.
    """
    if not ask.features:
        return None
    run.study.arm(ask.arm)
    features = run.read_table(run.arm(ask.arm, "features.parquet"))
    unknown = sorted(set(ask.features) - set(features["feature"]))
    if unknown:
        raise ConfigError(
            f"arm {ask.arm} has no feature {unknown[0]}; they run to {features['feature'].max()}.", at="features"
        )
    chosen = list(ask.features)
    placebos = matched_lists_of(matched_placebos(run, ask.arm, chosen)) if ask.placebo == "matched" else {}
    if len(chosen) > 1:
        return features_together(features, [chosen], placebos)
    row = features[features["feature"] == chosen[0]].reset_index(drop=True)
    return row.assign(matched=[placebos.get(chosen[0], [])])


def _scale(run: RunFolder, ask: Ask) -> dict[str, Any]:
    """The largest activation of each feature on the study's text, shown as full tint; 1 for silent ones."""
    if not ask.features:
        return {"scale": []}
    table = run.read_table(run.arm(ask.arm, "features.parquet")).set_index("feature")["max_activation"]
    return {"scale": [round(float(table[f]), 4) if table[f] > 0 else 1.0 for f in ask.features]}


def _chat_turn(lm: LanguageModel, prompt: str) -> str:
    """The prompt as a user's turn, up to the start of the model's answer."""
    if not getattr(lm.tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer of {lm.name} has no chat template.", at="chat", fix="give the prompt as plain text."
        )
    turns = [{"role": "user", "content": prompt}]
    return str(lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _check_memory(loaded: list[LanguageModel]) -> None:
    """ConfigError if another model like those in memory will not fit beside them."""
    sizes = [sum(p.nbytes for p in lm.model.parameters()) for lm in loaded if lm.device.type == "cpu"]
    memory = machine_memory()
    if sizes and sum(sizes) + max(sizes) > memory:
        raise ConfigError(
            f"two models of {max(sizes) / 1e9:.1f} GB each do not fit into this machine's {memory / 1e9:.0f} GB.",
            at="the playground",
            fix="serve the run on a machine with more memory, or with a GPU.",
        )


def _check_length(lm: LanguageModel, text: str, plan: SteeringPlan) -> None:
    n, limit = len(lm.encode_prompt(text)) + plan.max_new_tokens, lm.n_positions
    if limit is not None and n > limit:
        raise ConfigError(
            f"prompt and answer would have {n:,} tokens; {lm.name} reads {limit:,}.", at="prompt", fix="shorten it."
        )
