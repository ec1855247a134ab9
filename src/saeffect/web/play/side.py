"""One model's texts in the playground: unsteered, steered and placebo in one batch, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import Undefined
from saeffect.lm.hooks import capture, edited
from saeffect.lm.language_model import LanguageModel
from saeffect.steering import Intervention, NoiseCell, Sampling, Site, SteeringPlan, stream
from saeffect.steering.actions import ActionRow, Actions
from saeffect.steering.placebos import PLACEBOS, STEERED, UNSTEERED

__all__ = ["Side"]

_DRAW = (0, 0)  # prompt and sample of a plan with one of each


@dataclass
class _Row:
    condition: str
    label: str
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    acts: list[list[float]] = field(default_factory=list)
    shown: str = ""
    ended: bool = False


class Side:
    """One model's texts, all in one batch: unsteered, steered, placebo; without a site unsteered alone."""

    def __init__(
        self,
        name: str,
        role: str,
        lm: LanguageModel,
        site: Site | None,
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
            self._add_conditions(actions, feature)
            action_rows = [ActionRow(feature, row.condition, plan.doses[0], _DRAW) for row in self.rows]
            intervention = Intervention(actions.operator(action_rows), plan.positions)
            self._length = actions.length(feature, plan.doses[0])
        # One step more than shown, since reading the last token gives its activation.
        sampling = Sampling(
            **{key: getattr(plan, key) for key in Sampling.model_fields} | {"max_new_tokens": self._n + 1}
        )
        cells = [NoiseCell(plan.seed, text, _DRAW[1]) for _ in self.rows]
        hook = site.hook if site else ""  # without a site nothing is edited
        self._steps = stream(lm, hook, self._prompt_ids, cells, sampling, intervention=intervention)

    def _add_conditions(self, actions: Actions, feature: int) -> None:
        """Add a row per condition that can be run; Undefined if the features cannot be steered."""
        if reason := actions.obstacle(feature, STEERED):
            raise Undefined(f"{reason}.", at="features", fix="choose another feature, or another operator.")
        self.rows.append(_Row(STEERED, "steered"))
        for name in actions.plan.placebos:
            if reason := actions.obstacle(feature, name):
                self.notes.append(reason)
                continue
            label = PLACEBOS[name].label
            if PLACEBOS[name].column:
                pushed = actions.pushed_features(feature, name, _DRAW)
                label += f" {', '.join(map(str, pushed))}"
            self.rows.append(_Row(name, label))

    def summary(self) -> dict[str, Any]:
        """Model and conditions, for the page."""
        return {
            **{"name": self.name, "role": self._role, "model": self._lm.name, "notes": self.notes},
            "length": None if self._length != self._length else round(self._length, 3),
            "rows": [{"condition": row.condition, "label": row.label} for row in self.rows],
        }

    @torch.inference_mode()
    def step(self) -> dict[str, Any] | None:
        """One more token of each text: `pieces` (None after its end), `acts` of the previous tokens, and `rest`, the
        remainder of a character that the text was cut in; None at the end.
        """
        residual: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            residual[:] = [x[:, -1]]
            return x

        if all(row.ended for row in self.rows):
            return None
        # Recorded before the intervention: the activation due to the text alone.
        with edited(self._lm, self._site.hook, record) if self._site else nullcontext():
            ids = next(self._steps, None)
        has_tokens = max((len(row.ids) for row in self.rows), default=0) > 0
        acts = self._activations(residual[-1]) if has_tokens and residual else [[] for _ in self.rows]
        pieces: list[str | None] = []
        new_acts: list[list[float] | None] = []
        previous = [row.shown for row in self.rows]
        for i, row in enumerate(self.rows):
            is_read = not row.ended and len(row.acts) < len(row.ids)
            new_acts.append(acts[i] if is_read else None)
            if is_read:
                row.acts.append(acts[i])
            pieces.append(self._extend(row, None if ids is None else ids[i]))
        ends = zip(self.rows, previous, pieces, strict=True)
        rest = [row.shown[len(old) :] if piece is None else "" for row, old, piece in ends]
        return {"pieces": pieces, "acts": new_acts, "rest": rest}

    def _extend(self, row: _Row, token: int | None) -> str | None:
        if row.ended or token is None or len(row.ids) == self._n:
            is_final = row.ended or not row.ids
            row.ended = True
            if not is_final:
                self._finish(row)
            return None
        row.ids.append(token)
        text = self._lm.decode(row.ids)
        # A character may span several tokens; it is shown with the last one.
        piece = "" if text.endswith("\ufffd") or not text.startswith(row.shown) else text[len(row.shown) :]
        row.shown += piece
        row.pieces.append(piece)
        return piece

    def _finish(self, row: _Row) -> None:
        """Append the rest of an incomplete character to the last piece."""
        text = self._lm.decode(row.ids)
        if text.startswith(row.shown):
            row.pieces[-1], row.shown = row.pieces[-1] + text[len(row.shown) :], text

    @torch.inference_mode()
    def read_prompt(self) -> list[tuple[str, list[float]]]:
        """The prompt's tokens and their activations."""
        names = self._lm.token_strings()
        acts: list[list[float]] = [[] for _ in self._prompt_ids]
        if self._site is not None:
            acts = self._activations(capture(self._lm, self._site.hook, torch.tensor([self._prompt_ids]))[0])
        self._prompt = list(zip([names[i] for i in self._prompt_ids], acts, strict=True))
        return self._prompt

    def _activations(self, x: Tensor) -> list[list[float]]:
        """Activations of the features, [rows, features]; 0 at attention sinks, where the SAE does not apply."""
        assert self._site is not None and self._site.sae is not None
        sae = self._site.sae
        acts = sae.on(x.device).encode(x)[:, self._features]
        acts[x.float().norm(dim=1) > self._site.norm_limit] = 0.0
        return [[round(value, 4) for value in row] for row in acts.tolist()]

    def result(self) -> dict[str, Any]:
        """The finished texts: tokens as (piece, activations)."""
        result = self.summary() | {"prompt": self._prompt}
        for row, fields in zip(self.rows, result["rows"], strict=True):
            acts = row.acts + [[0.0] * len(self._features)] * (len(row.ids) - len(row.acts))
            fields |= {"text": row.shown, "tokens": list(zip(row.pieces, acts, strict=True))}
        return result
