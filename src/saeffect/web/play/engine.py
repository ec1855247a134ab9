"""Both models of a run, steered with features of one arm: the texts of the study's own steering, token by token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import ConfigError, Undefined
from saeffect.lm.hooks import capture, edited
from saeffect.lm.language_model import LanguageModel
from saeffect.progress import Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae
from saeffect.steering import Intervention, NoiseCell, Sampling, Site, SteeringPlan, features_together, stream
from saeffect.steering.actions import ActionRow, Actions, actions_of
from saeffect.steering.placebos import PLACEBOS, STEERED, UNSTEERED
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.steering_plan import matched_lists_of, matched_placebos, site_of
from saeffect.study.study import Arm
from saeffect.web.play.ask import Ask
from saeffect.web.play.worker import Event, described

__all__ = ["Engine", "features_to_steer"]

_DRAW = (0, 0)  # of a plan with one prompt and one sample


class Engine:
    """Loads models and SAEs on first use and keeps them; used by the worker's thread alone, but for `state`.

    `run_of` gives the run directory, anew for each request, so that a run may be written meanwhile.
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
        """`state`: cold, loading, ready or failed (then what, at, fix); `seconds` that loading took."""
        with self._lock:
            return dict(self._state)

    def warm(self) -> Iterator[Event]:
        """Load everything that a first answer needs, and let each model read a few tokens."""
        started = time.monotonic()
        self._set(state="loading")
        try:
            run = self._fresh()
            for name in _sides_of(run):
                yield {"type": "working", "what": f"loading {run.study.arm(name).model.path}"}
                lm = self._lm(run, name)
                self._sae(run, name)
                lm.plain_tokens()
                lm.token_strings()
                text = Ask(prompt="A", max_new_tokens=1)
                for _ in stream(
                    lm, run.study.hook(name), lm.encode_prompt("Once upon a"), [_cell("", 0)], text.plan("A")
                ):
                    pass
        except Exception as error:
            self._set(state="failed", **described(error))
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
        run = self._fresh()
        sides = self._sides(run, ask)
        yield {"type": "start", "sides": [side.described() for side in sides], **_scale(run, ask)}
        for side in sides:
            yield {"type": "tokens", "side": side.name, **side.step()}
        for side in sides:
            yield {"type": "prompt", "side": side.name, "tokens": side.read_prompt()}
        going = list(sides)
        while going:
            for side in list(going):
                found = side.step()
                if found is None:
                    going.remove(side)
                else:
                    yield {"type": "tokens", "side": side.name, **found}
        yield {
            "type": "done",
            "seconds": round(time.monotonic() - started, 2),
            "result": {
                "ask": ask.model_dump(mode="json"),
                "sides": [side.result() for side in sides],
                **_scale(run, ask),
            },
        }

    def _fresh(self) -> RunFolder:
        run = self._run_of()
        if self._run is None or run.study is not self._run.study:
            self._lms, self._saes = {}, {}
        self._run = run
        return run

    def _lm(self, run: RunFolder, arm: str) -> LanguageModel:
        if arm not in self._lms:
            model = run.study.arm(arm).model
            same = next((lm for name, lm in self._lms.items() if run.study.arm(name).model == model), None)
            self._lms[arm] = same or run.study.open_model(arm, Log())
        return self._lms[arm]

    def _sae(self, run: RunFolder, arm: str) -> SparseAutoencoder:
        if arm not in self._saes:
            self._saes[arm] = load_sae(run.study.sae_folder(arm), at=run.study.at("arms", arm, "sae"))
        return self._saes[arm]

    def _sides(self, run: RunFolder, ask: Ask) -> list[_Side]:
        features = features_to_steer(run, ask)
        sides = []
        for name in _sides_of(run):
            lm = self._lm(run, name)
            text = _chat_turn(lm, ask.prompt) if ask.chat else ask.prompt
            plan = ask.plan(text)
            _require_room(lm, text, plan)
            site = self._site(run, ask.arm or name, lm)
            actions = None if features is None else actions_of(site, features, plan, ["top_tokens"])
            sides.append(_Side(name, run.study.arm(name).role, lm, site, text, plan, actions, ask.features))
        return sides

    def _site(self, run: RunFolder, arm: str, lm: LanguageModel) -> Site:
        """The arm's own site on any model: the same push in both, in units of the mean norm of the arm's model."""
        config = run.study.arm(arm)
        return site_of(run, Arm(arm, config.role, lm, self._sae(run, arm), run.study.hook(arm)))

    def _set(self, **state: Any) -> None:
        with self._lock:
            self._state = state


def _sides_of(run: RunFolder) -> list[str]:
    """The arms whose models answer: control, then treatment."""
    return [run.study.by_role("control")[0], run.study.by_role("treatment")[0]]


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
    """The largest activation of each feature on the study's text: what a full tint means. 1 for silent ones."""
    if not ask.features:
        return {"scale": []}
    table = run.read_table(run.arm(ask.arm, "features.parquet")).set_index("feature")["max_activation"]
    return {"scale": [round(float(table[f]), 4) if table[f] > 0 else 1.0 for f in ask.features]}


def _cell(text: str, seed: int) -> NoiseCell:
    return NoiseCell(seed, text, _DRAW[1])


def _chat_turn(lm: LanguageModel, prompt: str) -> str:
    """The prompt as a user's turn, up to where the model answers."""
    if not getattr(lm.tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer of {lm.name} has no chat template.", at="chat", fix="give the prompt as plain text."
        )
    turns = [{"role": "user", "content": prompt}]
    return str(lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _require_room(lm: LanguageModel, text: str, plan: SteeringPlan) -> None:
    n, most = len(lm.encode_prompt(text)) + plan.max_new_tokens, lm.n_positions
    if most is not None and n > most:
        raise ConfigError(
            f"prompt and answer would have {n:,} tokens; {lm.name} reads {most:,}.", at="prompt", fix="shorten it."
        )


@dataclass
class _Row:
    condition: str
    label: str
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    acts: list[list[float]] = field(default_factory=list)
    shown: str = ""
    ended: bool = False


class _Side:
    """One model's texts, all in one batch: unsteered, steered, placebo."""

    def __init__(
        self,
        name: str,
        role: str,
        lm: LanguageModel,
        site: Site,
        text: str,
        plan: SteeringPlan,
        actions: Actions | None,
        features: Sequence[int],
    ) -> None:
        self.name, self._role, self._lm, self._site, self._features = name, role, lm, site, list(features)
        self._n = plan.max_new_tokens
        self.rows = [_Row(UNSTEERED, "unsteered")]
        self.notes: list[str] = []
        self._prompt_ids = lm.encode_prompt(text)
        self._prompt: list[tuple[str, list[float]]] = []
        intervention, self._length = None, 0.0
        if actions is not None:
            feature = int(actions.table["feature"].iloc[0])
            self._choose(actions, feature)
            acted = [ActionRow(feature, row.condition, plan.doses[0], _DRAW) for row in self.rows]
            intervention = Intervention(actions.operator(acted), plan.positions)
            self._length = actions.length(feature, plan.doses[0])
        # One step more than is shown: reading the last token gives its activation.
        sampling = Sampling(
            **{key: getattr(plan, key) for key in Sampling.model_fields} | {"max_new_tokens": self._n + 1}
        )
        cells = [_cell(text, plan.seed) for _ in self.rows]
        self._steps = stream(lm, site.hook, self._prompt_ids, cells, sampling, intervention=intervention)

    def _choose(self, actions: Actions, feature: int) -> None:
        """The conditions that can be run; Undefined if the features cannot be steered at all."""
        if reason := actions.obstacle(feature, STEERED):
            raise Undefined(f"{reason}.", at="features", fix="choose another feature, or another operator.")
        self.rows.append(_Row(STEERED, "steered"))
        for name in actions.plan.placebos:
            if reason := actions.obstacle(feature, name):
                self.notes.append(reason)
                continue
            label = PLACEBOS[name].label
            if PLACEBOS[name].column:
                pushed = actions.pushed(feature, name, _DRAW)
                label += f" {', '.join(map(str, pushed))}"
            self.rows.append(_Row(name, label))

    def described(self) -> dict[str, Any]:
        """For the page: whose model it is, and its texts."""
        return {
            **{"name": self.name, "role": self._role, "model": self._lm.name, "notes": self.notes},
            "length": None if self._length != self._length else round(self._length, 3),
            "rows": [{"condition": row.condition, "label": row.label} for row in self.rows],
        }

    @torch.inference_mode()
    def step(self) -> dict[str, Any] | None:
        """A token more in each text: `pieces` (None after its end), `acts` of the tokens before; None at the end."""
        seen: list[Tensor] = []

        def listen(x: Tensor) -> Tensor:
            seen[:] = [x[:, -1]]
            return x

        if all(row.ended for row in self.rows):
            return None
        # Before the edit of the stream, so what is seen is what the text itself brings about.
        with edited(self._lm, self._site.hook, listen):
            ids = next(self._steps, None)
        begun = max((len(row.ids) for row in self.rows), default=0) > 0
        acts = self._activations(seen[-1]) if begun and seen else []
        pieces: list[str | None] = []
        fresh: list[list[float] | None] = []
        for i, row in enumerate(self.rows):
            told = not row.ended and len(row.acts) < len(row.ids)
            fresh.append(acts[i] if told else None)
            if told:
                row.acts.append(acts[i])
            pieces.append(self._extend(row, None if ids is None else ids[i]))
        return {"pieces": pieces, "acts": fresh}

    def _extend(self, row: _Row, token: int | None) -> str | None:
        if row.ended or token is None or len(row.ids) == self._n:
            last = row.ended or not row.ids
            row.ended = True
            return None if last else self._rest(row)
        row.ids.append(token)
        text = self._lm.decode(row.ids)
        # A character may take several tokens; it is shown with its last one.
        piece = "" if text.endswith("\ufffd") or not text.startswith(row.shown) else text[len(row.shown) :]
        row.shown += piece
        row.pieces.append(piece)
        return piece

    def _rest(self, row: _Row) -> str | None:
        """What is left of a character that never came to its end; it joins the last piece."""
        text = self._lm.decode(row.ids)
        if text == row.shown or not text.startswith(row.shown):
            return None
        left = text[len(row.shown) :]
        row.pieces[-1], row.shown = row.pieces[-1] + left, text
        return None

    @torch.inference_mode()
    def read_prompt(self) -> list[tuple[str, list[float]]]:
        """The prompt's tokens and their activations."""
        names = self._lm.token_strings()
        x = capture(self._lm, self._site.hook, torch.tensor([self._prompt_ids]))[0]
        acts = self._activations(x)
        self._prompt = list(zip([names[i] for i in self._prompt_ids], acts, strict=True))
        return self._prompt

    def _activations(self, x: Tensor) -> list[list[float]]:
        """Of the chosen features, `[rows, features]`; 0 at attention sinks, where the SAE's mean nothing."""
        sae = self._site.sae
        if not self._features or sae is None:
            return [[] for _ in range(len(x))]
        acts = sae.encode(x.to(sae.W_dec.device))[:, self._features]
        acts[x.to(acts.device).float().norm(dim=1) > self._site.norm_limit] = 0.0
        return [[round(value, 4) for value in row] for row in acts.tolist()]

    def result(self) -> dict[str, Any]:
        """The finished texts: tokens as (piece, activations)."""
        found = self.described() | {"prompt": self._prompt}
        for row, shown in zip(self.rows, found["rows"], strict=True):
            acts = row.acts + [[0.0] * len(self._features)] * (len(row.ids) - len(row.acts))
            shown |= {"text": row.shown, "tokens": list(zip(row.pieces, acts, strict=True))}
        return found
