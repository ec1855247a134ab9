"""The interventions themselves: every feature, prompt, sample, condition and dose, with its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from saeffect.errors import ShapeMismatch
from saeffect.steering.actions import ActionRow, Actions, actions_of
from saeffect.steering.generate import Progress, generate
from saeffect.steering.operators import Intervention
from saeffect.steering.outcomes import RememberedVectors, TextVectors, join_tokens, measure_texts
from saeffect.steering.placebo import UNSTEERED
from saeffect.steering.plan import Site, SteeringPlan, check_features
from saeffect.steering.sampling import NoiseCell

__all__ = ["TRIAL_COLUMNS", "run_trials"]

TRIAL_COLUMNS = (
    "feature",
    "prompt",
    "sample",
    "condition",
    "dose",
    "coefficient",
    "text",
    "similarity",
    "distinct2",
)


def run_trials(
    site: Site,
    W_dec: Tensor,
    features: pd.DataFrame,
    plan: SteeringPlan,
    *,
    vectors: TextVectors,
    done: pd.DataFrame | None = None,
    on_chunk: Callable[[pd.DataFrame], None] | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Generate with and without intervention and measure the texts.

    Features are worked off in chunks that fill a batch; the chunks follow from the feature table and the plan
    alone, so a run that is resumed with `done` ends with the same numbers as one that was never stopped.
    Unsteered texts do not depend on the feature: each chunk generates them once, in the same batch as the steered
    ones, and measures them against each of its features. So both sides of a difference come from the same matrix
    products, and what changes nothing differs in nothing, also where another batch would be rounded differently.

    Args:
        site: Model, hook and unit of doses.
        W_dec: Decoder, `[d_sae, d_model]`; rows are looked up by feature number.
        features: Columns feature and top_tokens (list of str), and matched (list of int, see `matched_features`)
            if that placebo is planned; with a column members (list of int) each row stands for several features
            steered at once. The whole selection, also on a resume.
        plan: What to run.
        vectors: Where the texts' vectors come from, such as the word vectors of `saeffect.features`.
        done: Rows that an earlier call with equal arguments gave to `on_chunk`.
        on_chunk: Called with the rows of each chunk of features as soon as they are there.
        progress: Called with rows done and in all, resumed ones included, after every token: rows that are under way
            count by their share of tokens.

    Returns:
        One row per feature, prompt, sample, condition and dose, in that order: `TRIAL_COLUMNS`, and
        perplexity if planned. dose in the plan's unit (0 for unsteered), coefficient the multiple of the
        decoder row that has that length (placebos get a vector of equal length; NaN when features are set, not
        added), text the continuation alone, similarity to the feature's top tokens (NaN where undefined),
        distinct2. Conditions that are impossible for a feature have no rows, see `obstacles`.

    Raises:
        SaeffectError: As `check_features`, `Directions`, `generate` and `Intervention.edit`.
    """
    table = check_features(site, W_dec, features, ("top_tokens", *plan.feature_columns))
    run = _Run(site, actions_of(site, W_dec, table, plan), plan, RememberedVectors.of(vectors))
    per_feature = len(plan.conditions) * len(plan.doses) * plan.samples
    n_features = plan.features_at_once
    finished = _finished(done, run, set(table["feature"].tolist()))
    rows_each = len(plan.prompts) * (per_feature + plan.samples)
    total = len(table) * rows_each
    frames: list[pd.DataFrame] = []
    for first in range(0, len(table), n_features):
        chunk = table.iloc[first : first + n_features]
        if done is not None and set(chunk["feature"]) <= finished:
            frames.append(done[done["feature"].isin(chunk["feature"])])
        else:
            frames.append(run.chunk(chunk, _Share(progress, first * rows_each, len(chunk) * rows_each, total)))
            if on_chunk is not None:
                on_chunk(frames[-1])
        if progress is not None:
            progress((first + len(chunk)) * rows_each, total)
    return run.ordered(pd.concat(frames, ignore_index=True))


@dataclass(frozen=True)
class _Share:
    """Tells how far a chunk of features is, `before` rows being done and `rows` its own."""

    progress: Progress | None
    before: int
    rows: int
    total: int

    def __call__(self, share: float) -> None:
        if self.progress is not None:
            self.progress(self.before + int(share * self.rows), self.total)


@dataclass(frozen=True, eq=False)
class _Run:
    site: Site
    actions: Actions
    plan: SteeringPlan
    vectors: TextVectors

    def chunk(self, features: pd.DataFrame, done: _Share) -> pd.DataFrame:
        """All rows of some features."""
        plan = self.plan

        def so_far(tokens: int, of: int) -> None:
            done((prompt + tokens / of) / len(plan.prompts))

        references = {int(f): join_tokens(t) for f, t in zip(features["feature"], features["top_tokens"], strict=True)}
        layout = [
            (feature, sample, condition, float(dose))
            for feature in references
            for sample in range(plan.samples)
            for condition in self.conditions(feature)
            for dose in plan.doses
        ]
        twins = [(feature, sample, UNSTEERED, 0.0) for feature in references for sample in range(plan.samples)]
        # The first feature's stand for all: nothing is done to them.
        generated = twins[: plan.samples] + layout
        records: list[dict[str, Any]] = []
        for prompt in range(len(plan.prompts)):
            outputs = self._generate(prompt, [ActionRow(f, c, d, (prompt, s)) for f, s, c, d in generated], so_far)
            unsteered = outputs[: plan.samples] * len(references)
            records += self._measure(prompt, twins + layout, unsteered + outputs[plan.samples :], references)
        return self.ordered(pd.DataFrame(records))

    def conditions(self, feature: int) -> list[str]:
        """The planned conditions that are possible for a feature."""
        return [c for c in self.plan.conditions if not self.actions.obstacle(feature, c)]

    def _generate(self, prompt: int, rows: list[ActionRow], progress: Progress) -> list[list[int]]:
        plan = self.plan
        text = plan.prompts[prompt]
        return generate(
            self.site.lm,
            self.site.hook,
            self.site.lm.encode_prompt(text),
            [NoiseCell(plan.seed, text, sample) for _, sample in (row.draw for row in rows)],
            plan.sampling,
            intervention=Intervention(self.actions.operator(rows), plan.positions),
            batch_size=plan.batch_size,
            progress=progress,
        )

    def _measure(
        self,
        prompt: int,
        layout: list[tuple[int, int, str, float]],
        outputs: list[list[int]],
        references: dict[int, str],
    ) -> list[dict[str, Any]]:
        plan = self.plan
        about = [references[feature] for feature, *_ in layout]
        measured = measure_texts(
            self.site.lm, plan.prompts[prompt], outputs, about, self.vectors, with_perplexity=plan.perplexity
        )
        return [
            {"feature": feature, "prompt": prompt, "sample": sample, "condition": condition, "dose": dose}
            | {"coefficient": self.actions.coefficient(feature, dose)}
            | found
            for (feature, sample, condition, dose), found in zip(layout, measured, strict=True)
        ]

    def ordered(self, trials: pd.DataFrame) -> pd.DataFrame:
        """Rows in the promised order, columns in the promised types."""
        columns = [*TRIAL_COLUMNS, *(["perplexity"] if self.plan.perplexity else [])]
        missing = [name for name in columns if name not in trials]
        if missing:
            raise ShapeMismatch(f"the finished trials lack the column(s) {', '.join(missing)}.", at="done")
        rank = {condition: i for i, condition in enumerate((UNSTEERED, *self.plan.conditions))}
        ranked = trials[columns].assign(_rank=trials["condition"].map(rank))
        ranked = ranked.sort_values(["feature", "prompt", "sample", "_rank", "dose"], kind="stable")
        numbers = {"feature": "int64", "prompt": "int64", "sample": "int64"}
        return ranked.drop(columns="_rank").astype(numbers).reset_index(drop=True)


def _finished(done: pd.DataFrame | None, run: _Run, known: set[int]) -> set[int]:
    """Features of which `done` has exactly the planned rows."""
    if done is None or done.empty:
        return set()
    plan = run.plan
    keys = ["prompt", "sample", "condition", "dose"]
    finished: set[int] = set()
    for feature in done["feature"].unique().tolist():
        if int(feature) not in known:
            continue
        settings = [(UNSTEERED, 0.0)] + [(c, float(d)) for c in run.conditions(int(feature)) for d in plan.doses]
        wanted = {
            (prompt, sample, condition, dose)
            for prompt in range(len(plan.prompts))
            for sample in range(plan.samples)
            for condition, dose in settings
        }
        rows = done.loc[done["feature"] == feature, keys]
        found = list(rows.itertuples(index=False, name=None))
        if len(found) == len(wanted) and set(found) == wanted:
            finished.add(int(feature))
    return finished
