"""Trials: texts and direct effects of every feature, prompt, sample, condition and dose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from saeffect.config_chat import prompt_name
from saeffect.errors import ShapeMismatch
from saeffect.lm.language_model import LanguageModel
from saeffect.parallel import from_all, is_first, join, rank_and_world
from saeffect.steering.actions import ActionRow, Actions, actions_of
from saeffect.steering.generate import Progress, continue_prompts
from saeffect.steering.operators import Intervention
from saeffect.steering.outcomes import RememberedVectors, TextVectors, join_tokens, measure_texts
from saeffect.steering.placebos import UNSTEERED
from saeffect.steering.plan import Site, SteeringPlan
from saeffect.steering.prompt_pass import read_prompts
from saeffect.steering.sampling import NoiseCell

__all__ = [
    "TRIAL_COLUMNS",
    "direct_effects",
    "features_of_process",
    "kl_divergence",
    "next_log_probabilities",
    "run_trials",
    "sort_trials",
]

TRIAL_COLUMNS = (
    *("feature", "prompt", "sample", "condition", "dose", "coefficient"),
    *("text", "similarity", "distinct2", "perplexity"),
)


def run_trials(
    site: Site,
    features: pd.DataFrame,
    plan: SteeringPlan,
    *,
    vectors: TextVectors,
    done: pd.DataFrame | None = None,
    on_chunk: Callable[[pd.DataFrame], None] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Generate with and without intervention and measure the texts.

    Features run in chunks that depend on the feature table and the plan alone, so a resumed run gives the same numbers.
    Each chunk generates its unsteered texts in the batch of the steered ones, so both sides of a difference round
    alike. Processes started by `torchrun` share the chunks; all need equal arguments, and each gets the whole table.

    Args:
        features: Columns feature and top_tokens (list of str), those of the planned placebos, such as matched (list of
            int), and optionally members (see `features_together`). The whole selection, also on a resume.
        done: Rows that an earlier call with equal arguments gave to `on_chunk`, in any process.
        on_chunk: Called with the rows of each finished chunk; two processes must not write the same file.
        progress: Called in the first process after every token with (done, total) in rows, resumed ones included.

    One row per feature, prompt, sample, condition and dose, in that order: `TRIAL_COLUMNS`. dose in the plan's unit (0
    for unsteered); coefficient, the multiple of the decoder row of that length (placebos get a vector of equal length;
    NaN when features are set, not added); text, the continuation alone; similarity to the feature's top tokens (NaN
    where undefined); distinct2; perplexity. Impossible conditions have no rows, see `obstacles`. `Interrupted` if
    another process is gone.
    """
    needed = ["top_tokens", "top_token_ids"] if plan.as_published else ["top_tokens"]
    actions = actions_of(site, features, plan, needed)
    run = _TrialRun(actions, RememberedVectors(vectors))
    if join() == 1:
        return run.table(actions.table, done, on_chunk, progress)
    own_features = actions.table.iloc[features_of_process(len(actions.table), plan, *rank_and_world())]
    rows = run.table(own_features, done, on_chunk, progress if is_first() else None) if len(own_features) else None
    trials = pd.concat([part for part in from_all(rows) if part is not None], ignore_index=True)
    # The rows of a feature come from one process, in order.
    return trials.sort_values("feature", kind="stable", ignore_index=True)


def features_of_process(n_features: int, plan: SteeringPlan, rank: int, world: int) -> list[int]:
    """Positions, in order of feature number, of the features that a process steers: every `world`-th chunk."""
    return [i for i in range(n_features) if i // plan.features_at_once % world == rank]


@dataclass(frozen=True, eq=False)
class _TrialRun:
    actions: Actions
    vectors: TextVectors

    @property
    def plan(self) -> SteeringPlan:
        return self.actions.plan

    def table(
        self,
        features: pd.DataFrame,
        done: pd.DataFrame | None,
        on_chunk: Callable[[pd.DataFrame], None] | None,
        progress: Progress | None,
    ) -> pd.DataFrame:
        """The trials of some features, chunk by chunk."""
        plan, n_chunk = self.plan, self.plan.features_at_once
        rows_each = len(plan.prompts) * plan.samples * (1 + len(plan.conditions) * len(plan.doses))
        finished = self._finished(done)
        frames: list[pd.DataFrame] = []
        for first in range(0, len(features), n_chunk):
            chunk = features.iloc[first : first + n_chunk]

            def report(share: float, before: int = first, n: int = len(chunk)) -> None:
                if progress is not None:
                    progress(before * rows_each + int(share * n * rows_each), len(features) * rows_each)

            if done is not None and set(chunk["feature"]) <= finished:
                frames.append(done[done["feature"].isin(chunk["feature"])])
            else:
                frames.append(self._chunk(chunk, report))
                if on_chunk is not None:
                    on_chunk(frames[-1])
            report(1.0)
        return self._sorted(pd.concat(frames, ignore_index=True))

    def _chunk(self, features: pd.DataFrame, report_share: Callable[[float], None]) -> pd.DataFrame:
        plan, samples = self.plan, range(self.plan.samples)
        references = self._references(features)
        steered = [
            (feature, sample, condition, float(dose))
            for feature in references
            for sample in samples
            for condition in self._conditions(feature)
            for dose in plan.doses
        ]
        unsteered = [(feature, sample, UNSTEERED, 0.0) for feature in references for sample in samples]
        # Features share the first one's unsteered rows, except as published, where each has its own noise.
        shared = 1 if plan.as_published else len(references)
        generated = (unsteered if plan.as_published else unsteered[: plan.samples]) + steered
        # Measuring takes about as long as generating.
        by_prompt = self._texts(generated, lambda share: report_share(share / 2))
        records: list[dict[str, Any]] = []
        for prompt, (text, outputs) in enumerate(zip(plan.prompts, by_prompt, strict=True)):
            n_unsteered = len(unsteered) // shared
            texts = outputs[:n_unsteered] * shared + outputs[n_unsteered:]
            layout = unsteered + steered
            layout_references = [references[feature] for feature, *_ in layout]
            measured = measure_texts(
                self.actions.site.lm, text, texts, layout_references, self.vectors, with_prompt=plan.as_published
            )
            records += [
                {"feature": feature, "prompt": prompt, "sample": sample, "condition": condition, "dose": dose}
                | {"coefficient": self.actions.coefficient(feature, dose)}
                | measures
                for (feature, sample, condition, dose), measures in zip(layout, measured, strict=True)
            ]
            report_share((1 + (prompt + 1) / len(plan.prompts)) / 2)
        return self._sorted(pd.DataFrame(records))

    def _texts(
        self, rows: Sequence[tuple[int, int, str, float]], report_share: Callable[[float], None]
    ) -> list[list[list[int]]]:
        """Token ids of the texts of (feature, sample, condition, dose), by prompt."""
        plan, site = self.plan, self.actions.site
        texts: list[list[int]] = []
        for numbers in plan.prompts_together:

            def report(done: int, total: int, before: int = numbers[0], n: int = len(numbers)) -> None:
                report_share((before + n * done / total) / len(plan.prompts))

            ids = {prompt: site.lm.encode_prompt(plan.prompts[prompt]) for prompt in numbers}
            parts = site.lm.prompt_parts(plan.prompts[numbers[0]])
            actions = [ActionRow(f, c, d, (prompt, s)) for prompt in numbers for f, s, c, d in rows]
            texts += continue_prompts(
                site.lm,
                [ids[action.draw[0]] for action in actions],
                [self._noise(action) for action in actions],
                plan,
                hook=site.hook,
                intervention=Intervention(self.actions.operator(actions), plan.positions, parts),
                batch_size=plan.batch_size,
                progress=report,
            )
        return [texts[i : i + len(rows)] for i in range(0, len(texts), len(rows))]

    def _noise(self, row: ActionRow) -> NoiseCell:
        key = prompt_name(self.plan.prompts[row.draw[0]])
        noise_key = f"{key}\n{row.feature} {row.condition} {row.dose}" if self.plan.as_published else key
        return NoiseCell(self.plan.seed, noise_key, row.draw[1])

    def _references(self, features: pd.DataFrame) -> dict[int, str]:
        """The text that the texts of each feature are compared with: its top tokens."""
        if self.plan.as_published:
            to_strings = self.actions.site.lm.tokenizer.convert_ids_to_tokens
            ids = zip(features["feature"], features["top_token_ids"], strict=True)
            return {int(f): " ".join(to_strings([int(i) for i in ids_of_feature])) for f, ids_of_feature in ids}
        return {int(f): join_tokens(t) for f, t in zip(features["feature"], features["top_tokens"], strict=True)}

    def _conditions(self, feature: int) -> list[str]:
        return [c for c in self.plan.conditions if not self.actions.obstacle(feature, c)]

    def _sorted(self, trials: pd.DataFrame) -> pd.DataFrame:
        missing = [name for name in TRIAL_COLUMNS if name not in trials]
        if missing:
            raise ShapeMismatch(f"the finished trials lack the column(s) {', '.join(missing)}.", at="done")
        ordered = sort_trials(trials[list(TRIAL_COLUMNS)], (UNSTEERED, *self.plan.conditions))
        return ordered.astype(dict.fromkeys(("feature", "prompt", "sample"), "int64"))

    def _finished(self, done: pd.DataFrame | None) -> set[int]:
        """Features of which `done` has exactly the planned rows."""
        finished: set[int] = set()
        if done is None or done.empty:
            return finished
        cells = [(prompt, s) for prompt in range(len(self.plan.prompts)) for s in range(self.plan.samples)]
        for feature, rows in done[done["feature"].isin(list(self.actions.members))].groupby("feature"):
            number = int(feature)  # type: ignore[call-overload]
            settings = [(c, float(dose)) for c in self._conditions(number) for dose in self.plan.doses]
            planned = [(*cell, *setting) for cell in cells for setting in [(UNSTEERED, 0.0), *settings]]
            present = rows[["prompt", "sample", "condition", "dose"]].itertuples(index=False, name=None)
            if sorted(present) == sorted(planned):
                finished.add(number)
        return finished


def direct_effects(
    site: Site, features: pd.DataFrame, plan: SteeringPlan, *, progress: Progress | None = None
) -> pd.DataFrame:
    """How much steering raises the log-probability of a feature's top tokens as the next token; without sampling.

    `features` need top_token_ids (list of int) in place of top_tokens. The random placebo of a prompt is that of its
    sample 0. One row per feature, prompt, condition and dose, in that order: feature, prompt, condition, dose,
    delta_logprob (nats; mean over the top tokens of steered minus unsteered log-probability; NaN without top tokens),
    kl (nats; of the steered distribution from the unsteered one). Impossible conditions have no rows, see `obstacles`.
    """
    actions = actions_of(site, features, plan, ["top_token_ids"])
    table = actions.table
    top = {int(f): [int(i) for i in ids] for f, ids in zip(table["feature"], table["top_token_ids"], strict=True)}
    possible = [(f, c) for f in top for c in plan.conditions if not actions.obstacle(f, c)]
    layout = [(f, condition, dose) for f, condition in possible for dose in plan.doses]
    n_at_once = max(1, plan.batch_size - 1)
    records: list[dict[str, Any]] = []
    for prompt, text in enumerate(plan.prompts):
        prompt_ids = site.lm.encode_prompt(text)
        for first in range(0, len(layout), n_at_once):
            batch = layout[first : first + n_at_once]
            rows = [ActionRow(batch[0][0], UNSTEERED, 0.0, (prompt, 0))]
            rows += [ActionRow(*steered, (prompt, 0)) for steered in batch]
            intervention = Intervention(actions.operator(rows), plan.positions, site.lm.prompt_parts(text))
            n_bos = 0 if plan.as_published else None
            log_p = next_log_probabilities(site.lm, site.hook, prompt_ids, intervention, n_bos=n_bos)
            kl = kl_divergence(log_p[0], log_p[1:]).tolist()
            for row, (feature, condition, dose) in enumerate(batch):
                ids = top[feature]
                delta = float((log_p[row + 1, ids] - log_p[0, ids]).double().mean()) if ids else math.nan
                records.append(
                    {"feature": feature, "prompt": prompt, "condition": condition, "dose": float(dose)}
                    | {"delta_logprob": delta, "kl": kl[row]}
                )
            if progress is not None:
                progress(len(records), len(layout) * len(plan.prompts))
    result = pd.DataFrame(records, columns=["feature", "prompt", "condition", "dose", "delta_logprob", "kl"])
    return sort_trials(result, plan.conditions)


@torch.inference_mode()
def next_log_probabilities(
    lm: LanguageModel, hook: str, prompt_ids: Sequence[int], intervention: Intervention, *, n_bos: int | None = None
) -> Tensor:
    """Log-probabilities (nats) of every token after the prompt, one row per row of the intervention, float32;
    `n_bos` tokens in front are left alone, by default those that are BOS.
    """
    n_bos = lm.n_bos(prompt_ids) if n_bos is None else n_bos
    edit = intervention.edit(len(prompt_ids), n_bos)
    logits, _ = read_prompts(lm, hook, [prompt_ids] * intervention.operator.n_rows, edit, room=0)
    return logits.log_softmax(dim=-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row of q `[rows, d_vocab]` from p, `[d_vocab]` or as q, nats, at least 0.

    Example:
        >>> p = torch.tensor([0.5, 0.5]).log()
        >>> q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> [round(x, 4) for x in kl_divergence(p, q).tolist()]  # second: ln 2 - (ln 3) / 2
        [0.0, 0.1438]
    """
    p = log_p.exp()
    # Tokens of probability 0 under p add nothing, also where q is 0.
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(log_q))
    return terms.sum(dim=-1).clamp_min(0)


def sort_trials(rows: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Rows by feature, prompt, sample (if any), condition in the given order, and dose."""
    keys = [name for name in ("feature", "prompt", "sample") if name in rows]
    rank = rows["condition"].map({condition: i for i, condition in enumerate(conditions)})
    ordered = rows.assign(_rank=rank).sort_values([*keys, "_rank", "dose"], kind="stable", ignore_index=True)
    return ordered.drop(columns="_rank")
