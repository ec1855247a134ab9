"""Baselines for steering with a feature: naming the concept in the prompt, and a mean-difference vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from saeffect.config_chat import Prompt, prompt_name
from saeffect.errors import ConfigError, ShapeMismatch, unknown_name
from saeffect.lm.tokens import normalise_token
from saeffect.steering.actions import Actions, actions_of
from saeffect.steering.generate import Progress, continue_prompts
from saeffect.steering.operators import AddVectors, Intervention
from saeffect.steering.outcomes import RememberedVectors, TextVectors, join_tokens, measure_texts
from saeffect.steering.placebos import BASELINES, STEERED
from saeffect.steering.plan import Site, SteeringPlan
from saeffect.steering.sampling import NoiseCell
from saeffect.steering.trials import TRIAL_COLUMNS, sort_trials

__all__ = ["BASELINE_COLUMNS", "MeanDifferences", "naming_prompt", "run_baselines"]

BASELINE_COLUMNS = (*TRIAL_COLUMNS, "reason")


def naming_prompt(top_tokens: Sequence[str], prompt: Prompt) -> Prompt:
    """The prompt with a request to talk about the top tokens (in a chat: in its last user turn); "" if none is a word.

    Example:
        >>> naming_prompt([" drug", "Ġdose", " Drug"], "What is on your mind?")
        'Talk about drug, dose. What is on your mind?'
    """
    words = [join_tokens([token]) for token in top_tokens if any(map(str.isalnum, token))]
    by_word: dict[str, str] = {}
    for word in words:
        by_word.setdefault(normalise_token(word), word)
    if not by_word:
        return ""
    request = f"Talk about {', '.join(by_word.values())}."
    if isinstance(prompt, str):
        return f"{request} {prompt}"
    last = max((i for i, message in enumerate(prompt) if message.role == "user"), default=len(prompt) - 1)
    request_turn = prompt[last].model_copy(update={"content": f"{request} {prompt[last].content}"})
    return (*prompt[:last], request_turn, *prompt[last + 1 :])


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
    """Texts of the baselines, with the prompts and sampling noise of `run_trials`.

    "prompt": the unsteered model continues "Talk about <top tokens>. <prompt>". "mean_difference": the model is pushed
    along that vector (see `MeanDifferences`) as far as along the feature, at the same positions. The plan has one dose;
    its placebos are not run. `mean_differences` holds for each feature the vector, `[d_model]`, or why there is none.

    One row per feature, prompt, sample and baseline: `BASELINE_COLUMNS`. condition is the baseline's name, dose is 0
    for "prompt". Perplexity is that of the text after the plain prompt. Where a baseline is impossible, text is
    missing, measures are NaN and reason says why. `UnknownName` for another baseline, `ConfigError` for several doses.
    """
    for name in baselines:
        if name not in BASELINES:
            raise unknown_name("baseline", name, BASELINES, at="baselines")
    if len(plan.doses) != 1:
        raise ConfigError(f"baselines are run at one dose. Got {list(plan.doses)}.", at="doses")
    actions = actions_of(site, features, plan.model_copy(update={"placebos": ()}), ["top_tokens"])
    table = actions.table
    top = {int(f): list(tokens) for f, tokens in zip(table["feature"], table["top_tokens"], strict=True)}
    run = _Baselines(actions, RememberedVectors(vectors), mean_differences, top)
    n_texts = len(table) * len(plan.prompts) * plan.samples
    records: list[dict[str, Any]] = []
    for number, name in enumerate(baselines):

        def report(done: int, total: int, before: int = number * n_texts) -> None:
            if progress is not None:
                progress(before + round(n_texts * done / total), len(baselines) * n_texts)

        records += run.records(name, run.prompted_texts(report) if name == "prompt" else run.steered_texts(report))
        report(1, 1)
    return sort_trials(pd.DataFrame(records, columns=list(BASELINE_COLUMNS)), baselines)


Texts = dict[tuple[int, Prompt, int], list[int] | str]
"""Token ids by feature, prompt and sample, or the reason why there are none."""


@dataclass(frozen=True, eq=False)
class _Baselines:
    actions: Actions
    vectors: TextVectors
    mean_differences: Mapping[int, Tensor | str]
    top_tokens: Mapping[int, Sequence[str]]

    def prompted_texts(self, progress: Progress) -> Texts:
        """The baseline "prompt": each feature has its own prompts."""
        plan, lm = self.actions.plan, self.actions.site.lm
        keys = [(f, text, sample) for f in self.top_tokens for text in plan.prompts for sample in range(plan.samples)]
        naming = {(f, text): naming_prompt(self.top_tokens[f], text) for f, text, _ in keys}
        possible = [(f, text, sample) for f, text, sample in keys if naming[f, text]]
        outputs = continue_prompts(
            lm,
            [lm.encode_prompt(naming[f, text]) for f, text, _ in possible],
            [NoiseCell(plan.seed, prompt_name(text), sample) for _, text, sample in possible],
            plan,
            batch_size=plan.batch_size,
            progress=progress,
        )
        reason = "no top token is a word that a prompt could name"
        return dict.fromkeys(keys, reason) | dict(zip(possible, outputs, strict=True))

    def steered_texts(self, progress: Progress) -> Texts:
        """The baseline "mean_difference", all features together."""
        plan, site = self.actions.plan, self.actions.site
        vectors = {feature: self._steering_vector(feature) for feature in self.top_tokens}
        rows = [(f, sample, v) for f, v in vectors.items() if isinstance(v, Tensor) for sample in range(plan.samples)]
        texts: Texts = {
            (feature, text, sample): reason
            for feature, reason in vectors.items()
            if isinstance(reason, str)
            for text in plan.prompts
            for sample in range(plan.samples)
        }
        for numbers in plan.prompts_together if rows else ():
            prompts = [plan.prompts[number] for number in numbers]
            keys = [(feature, text, sample) for text in prompts for feature, sample, _ in rows]
            ids = {text: site.lm.encode_prompt(text) for text in prompts}
            operator = AddVectors(torch.stack([v for *_, v in rows] * len(prompts)))

            def report(done: int, total: int, before: int = numbers[0], n: int = len(numbers)) -> None:
                progress(before * total + n * done, len(plan.prompts) * total)

            outputs = continue_prompts(
                site.lm,
                [ids[text] for _, text, _ in keys],
                [NoiseCell(plan.seed, prompt_name(text), sample) for _, text, sample in keys],
                plan,
                hook=site.hook,
                intervention=Intervention(operator, plan.positions, site.lm.prompt_parts(prompts[0])),
                batch_size=plan.batch_size,
                progress=report,
            )
            texts |= dict(zip(keys, outputs, strict=True))
        return texts

    def _steering_vector(self, feature: int) -> Tensor | str:
        if reason := self.actions.obstacle(feature, STEERED):
            return reason
        length = self.actions.length(feature, self.actions.plan.doses[0])
        if not math.isfinite(length):
            return "an ablation takes away another length at each token, so no vector is its equal"
        difference = self.mean_differences.get(feature, "no means were measured")
        if isinstance(difference, str):
            return difference
        vector = difference.float().cpu()
        return length * vector / vector.norm()

    def records(self, name: str, texts: Texts) -> list[dict[str, Any]]:
        plan = self.actions.plan
        settings = {"condition": name, "dose": 0.0 if name == "prompt" else plan.doses[0], "coefficient": math.nan}
        undefined = {"text": None, "similarity": math.nan, "distinct2": math.nan, "perplexity": math.nan}
        records = []
        for prompt, text in enumerate(plan.prompts):
            keys = [(feature, sample) for feature in self.top_tokens for sample in range(plan.samples)]
            outputs = {key: texts[key[0], text, key[1]] for key in keys}
            generated = {key: ids for key, ids in outputs.items() if not isinstance(ids, str)}
            references = [join_tokens(self.top_tokens[feature]) for feature, _ in generated]
            measured = measure_texts(self.actions.site.lm, text, list(generated.values()), references, self.vectors)
            measures = dict(zip(generated, measured, strict=True))
            for (feature, sample), output in outputs.items():
                row = {"feature": feature, "prompt": prompt, "sample": sample} | settings
                reason = output if isinstance(output, str) else ""
                records.append(row | measures.get((feature, sample), undefined) | {"reason": reason})
        return records


class MeanDifferences:
    """Mean activation of the model where a feature fires, minus that on general text (Wu et al. 2025, AxBench)."""

    def __init__(self, features: Sequence[int], d_model: int) -> None:
        self.features = tuple(int(f) for f in features)
        self._active_sum = torch.zeros(len(self.features), d_model, dtype=torch.float64)
        self._n_active = torch.zeros(len(self.features), dtype=torch.int64)
        self._general_sum = torch.zeros(d_model, dtype=torch.float64)
        self._n_general = 0

    def add(self, x: Tensor, feature_acts: Tensor, general: Tensor) -> None:
        """Add `x` `[n_tokens, d_model]`, `feature_acts` `[n_tokens, n_features]`; `general`: bool, general text."""
        if feature_acts.shape != (len(x), len(self.features)) or general.shape != (len(x),):
            raise ShapeMismatch(
                f"{len(x)} tokens, but activations of shape {tuple(feature_acts.shape)} for"
                f" {len(self.features)} features and a mask of {tuple(general.shape)}."
            )
        x64, fires = x.double(), feature_acts > 0
        self._active_sum += fires.double().T @ x64
        self._n_active += fires.sum(dim=0)
        self._general_sum += x64[general].sum(dim=0)
        self._n_general += int(general.sum())

    def vector(self, feature: int) -> Tensor | str:
        """The difference, float32 `[d_model]`, or why there is none."""
        index = self.features.index(int(feature))
        n = int(self._n_active[index])
        if not n or not self._n_general:
            return "the feature never fired on the text" if not n else "there is no text to compare with"
        difference = self._active_sum[index] / n - self._general_sum / self._n_general
        if not float(difference.norm()) > 0:
            return "the two means are equal"
        return difference.float()
