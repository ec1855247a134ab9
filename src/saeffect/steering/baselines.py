"""What steering with a feature must beat to be worth it: naming the concept in the prompt, and a plain vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import ConfigError, ShapeMismatch, unknown_name
from saeffect.lm.tokens import normalise_token
from saeffect.steering.actions import Actions, actions_of
from saeffect.steering.encoders import RememberedVectors, TextVectors
from saeffect.steering.generate import Progress, continue_prompts, generate
from saeffect.steering.operators import AddVectors, Intervention
from saeffect.steering.outcomes import join_tokens, measure_texts
from saeffect.steering.placebos import BASELINES, STEERED
from saeffect.steering.plan import Site, SteeringPlan
from saeffect.steering.sampling import NoiseCell
from saeffect.steering.trials import TRIAL_COLUMNS

__all__ = ["BASELINE_COLUMNS", "MeanDifferences", "naming_prompt", "run_baselines"]

BASELINE_COLUMNS = (*TRIAL_COLUMNS, "reason")


def naming_prompt(top_tokens: Sequence[str], prompt: str) -> str:
    """A prompt that names the concept; "" for top tokens without a word.

    Example:
        >>> naming_prompt([" drug", "Ġdose", " Drug"], "What is on your mind?")
        'Talk about drug, dose. What is on your mind?'
    """
    words = [join_tokens([token]) for token in top_tokens if any(map(str.isalnum, token))]
    different: dict[str, str] = {}
    for word in words:
        different.setdefault(normalise_token(word), word)
    named = different.values()
    return f"Talk about {', '.join(named)}. {prompt}" if named else ""


def run_baselines(
    site: Site,
    features: pd.DataFrame,
    plan: SteeringPlan,
    *,
    vectors: TextVectors,
    mean_differences: Mapping[int, Tensor | str],
    baselines: Sequence[str] = tuple(BASELINES),
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Texts of the baselines, with the same prompts and sampling noise as the trials of `run_trials`.

    "prompt": the unsteered model continues "Talk about <top tokens>. <prompt>". "mean_difference": along that
    vector (see `MeanDifferences`) the model is pushed as hard as along the feature, at the same positions.

    Args:
        site: Model, hook, decoder and unit of doses.
        features: Columns feature and top_tokens.
        plan: One dose; prompts, samples, sampling, operator, unit, positions, seed and batch_size are used.
        vectors: As in `run_trials`.
        mean_differences: For each feature the vector, `[d_model]`, or why there is none.
        baselines: Which, of `BASELINES`.
        progress: Called with rows done and in all.

    Returns:
        One row per feature, prompt, sample and baseline: `BASELINE_COLUMNS`. condition is the baseline's name,
        dose 0 for "prompt". Perplexity is that of the text after the plain prompt. Where a baseline is
        impossible text is missing, the measures are NaN, and reason says why; else reason is "".

    Raises:
        UnknownName: No such baseline.
        ConfigError: Several doses.
        SaeffectError: As `run_trials`.
    """
    for name in baselines:
        if name not in BASELINES:
            raise unknown_name("baseline", name, BASELINES, at="baselines")
    if len(plan.doses) != 1:
        raise ConfigError(f"baselines are run at one dose. Got {list(plan.doses)}.", at="doses")
    # Placebos are not run here, so the table need not have their columns.
    actions = actions_of(site, features, plan.model_copy(update={"placebos": ()}), ["top_tokens"])
    table = actions.table
    top = {int(f): list(tokens) for f, tokens in zip(table["feature"], table["top_tokens"], strict=True)}
    run = _Baselines(site, actions, plan, RememberedVectors(vectors), mean_differences, top)
    each = len(table) * len(plan.prompts) * plan.samples
    records: list[dict[str, Any]] = []
    for number, name in enumerate(baselines):

        def report(done: int, total: int, before: int = number * each) -> None:
            if progress is not None:
                progress(before + round(each * done / total), len(baselines) * each)

        records += run.named(report) if name == "prompt" else run.pushed(report)
        report(1, 1)
    result = pd.DataFrame(records, columns=list(BASELINE_COLUMNS))
    order = result.assign(_order=result["condition"].map({name: i for i, name in enumerate(baselines)}))
    order = order.sort_values(["feature", "prompt", "sample", "_order"], kind="stable")
    return order.drop(columns="_order").reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class _Baselines:
    site: Site
    actions: Actions
    plan: SteeringPlan
    vectors: RememberedVectors
    mean_differences: Mapping[int, Tensor | str]
    top_tokens: Mapping[int, Sequence[str]]

    def named(self, progress: Progress) -> list[dict[str, Any]]:
        """Rows of the baseline "prompt": each feature has prompts of its own, all of which go on side by side."""
        plan, lm, name = self.plan, self.site.lm, "prompt"
        prompts = range(len(plan.prompts))
        naming = {(f, p): naming_prompt(top, plan.prompts[p]) for f, top in self.top_tokens.items() for p in prompts}
        possible = [place for place, given in naming.items() if given]
        rows = [(*place, sample) for place in possible for sample in range(plan.samples)]
        outputs = continue_prompts(
            lm,
            [lm.encode_prompt(naming[feature, prompt]) for feature, prompt, _ in rows],
            [NoiseCell(plan.seed, plan.prompts[prompt], sample) for _, prompt, sample in rows],
            plan,
            batch_size=plan.batch_size,
            progress=progress,
        )
        of = dict(zip(rows, outputs, strict=True))
        records = []
        for prompt in prompts:
            features = [f for f, p in possible if p == prompt]
            texts = [of[feature, prompt, sample] for feature in features for sample in range(plan.samples)]
            records += self._measured(features, prompt, name, texts)
            for feature in self.top_tokens:
                if not naming[feature, prompt]:
                    why = "no top token is a word that a prompt could name"
                    records += self._missing(feature, prompt, name, why)
        return records

    def pushed(self, progress: Progress) -> list[dict[str, Any]]:
        """Rows of the baseline "mean_difference", all features of a prompt in one batch."""
        name = "mean_difference"
        vectors = {feature: self._vector(feature) for feature in self.top_tokens}
        known = {feature: vector for feature, vector in vectors.items() if isinstance(vector, Tensor)}
        records = []
        for prompt, text in enumerate(self.plan.prompts):
            for feature, reason in vectors.items():
                records += self._missing(feature, prompt, name, reason) if isinstance(reason, str) else []
            if known:
                records += self._measured(list(known), prompt, name, self._pushed(text, list(known.values())))
            progress(prompt + 1, len(self.plan.prompts))
        return records

    def _vector(self, feature: int) -> Tensor | str:
        if reason := self.actions.obstacle(feature, STEERED):
            return reason
        length = self.actions.length(feature, float(self.plan.doses[0]))
        if not math.isfinite(length):
            return "an ablation takes away another length at each token, so no vector is its equal"
        found = self.mean_differences.get(feature, "no means were measured")
        return found if isinstance(found, str) else length * found.float().cpu() / found.float().cpu().norm()

    def _pushed(self, text: str, vectors: list[Tensor]) -> list[list[int]]:
        """All samples of one prompt along each vector in turn."""
        plan, lm = self.plan, self.site.lm
        cells = [NoiseCell(plan.seed, text, sample) for sample in range(plan.samples)]
        rows = [vector for vector in vectors for _ in cells]
        return generate(
            lm,
            self.site.hook,
            lm.encode_prompt(text),
            cells * len(vectors),
            plan,
            intervention=Intervention(AddVectors(torch.stack(rows)), plan.positions),
            batch_size=plan.batch_size,
        )

    def _measured(self, features: list[int], prompt: int, name: str, outputs: list[list[int]]) -> list[dict[str, Any]]:
        text = self.plan.prompts[prompt]
        places = [(feature, sample) for feature in features for sample in range(self.plan.samples)]
        about = [join_tokens(self.top_tokens[feature]) for feature, _ in places]
        measured = measure_texts(self.site.lm, text, outputs, about, self.vectors)
        return [
            {**self._called(feature, prompt, name), "sample": sample, **found, "reason": ""}
            for (feature, sample), found in zip(places, measured, strict=True)
        ]

    def _missing(self, feature: int, prompt: int, name: str, reason: str) -> list[dict[str, Any]]:
        nothing = {"text": None, "similarity": math.nan, "distinct2": math.nan, "perplexity": math.nan}
        called = self._called(feature, prompt, name)
        return [{**called, "sample": s, **nothing, "reason": reason} for s in range(self.plan.samples)]

    def _called(self, feature: int, prompt: int, name: str) -> dict[str, Any]:
        dose = 0.0 if name == "prompt" else float(self.plan.doses[0])
        return {"feature": feature, "prompt": prompt, "condition": name, "dose": dose, "coefficient": math.nan}


class MeanDifferences:
    """For each feature: mean activation of the model where the feature fires, minus that on general text.

    Wu et al. (2025, AxBench) found this vector, which needs no SAE, ahead of SAE features in steering.

    Args:
        features: Which features.
        d_model: Width of the activations.
    """

    def __init__(self, features: Sequence[int], d_model: int) -> None:
        self.features = tuple(int(f) for f in features)
        self._there = torch.zeros(len(self.features), d_model, dtype=torch.float64)
        self._n_there = torch.zeros(len(self.features), dtype=torch.int64)
        self._general = torch.zeros(d_model, dtype=torch.float64)
        self._n_general = 0

    def add(self, x: Tensor, feature_acts: Tensor, general: Tensor) -> None:
        """Take in some tokens.

        Args:
            x: Activations of the model, `[n_tokens, d_model]`, any float dtype.
            feature_acts: Of the features in order, `[n_tokens, n_features]`.
            general: Which tokens are of the text to compare with, bool `[n_tokens]`.

        Raises:
            ShapeMismatch: The shapes do not fit.
        """
        if feature_acts.shape != (len(x), len(self.features)) or general.shape != (len(x),):
            raise ShapeMismatch(
                f"{len(x)} tokens, but activations of shape {tuple(feature_acts.shape)} for"
                f" {len(self.features)} features and a mask of {tuple(general.shape)}."
            )
        wide, fires = x.double(), feature_acts > 0
        self._there += fires.double().T @ wide
        self._n_there += fires.sum(dim=0)
        self._general += wide[general].sum(dim=0)
        self._n_general += int(general.sum())

    def vector(self, feature: int) -> Tensor | str:
        """The difference, float32 `[d_model]`; or why there is none."""
        place = self.features.index(int(feature))
        n = int(self._n_there[place])
        if not n or not self._n_general:
            return "the feature never fired on the text" if not n else "there is no text to compare with"
        found = self._there[place] / n - self._general / self._n_general
        if not float(found.norm()) > 0:
            return "the two means are equal"
        return found.float()
