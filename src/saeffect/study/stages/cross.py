"""Stage 6b, SAE × model crossed: each arm's SAE read and steered on both models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.comparison import Resampling, Roles
from saeffect.comparison.factorial import CROSSED, CROSSED_COLUMNS, WHOLE_SAE, factorial, no_factorial, paired_change
from saeffect.diffing.nulls import kept_adapters
from saeffect.features.coherence import coherence
from saeffect.features.embeddings import load_embeddings
from saeffect.features.projection import project
from saeffect.features.vocabulary import load_vocabulary
from saeffect.io import hash_file, read_json
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.progress import SILENT, Log
from saeffect.sae.formats import load_sae
from saeffect.sae.metrics import spliced_losses
from saeffect.steering import (
    RememberedVectors,
    Site,
    SteeringPlan,
    direct_effects,
    effects,
    obstacles,
    outcome_named,
    run_trials,
    score_texts,
)
from saeffect.steering.placebos import STEERED
from saeffect.steering.trials import TRIAL_COLUMNS
from saeffect.study.both_models import size_obstacle
from saeffect.study.nulls import nulls_folder
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.crossed_rows import RowSums, by_row, crossed_rows, marker_row
from saeffect.study.stages.dose_search import chosen_dose, encoder_identity, outcome_vectors, site_of, tested_features
from saeffect.study.stages.features import embeddings_identity, features_settings, ranked_tokens, shared_unembedding
from saeffect.study.study import Arm, Study

__all__ = ["cross_inputs", "help_cross", "null_effects", "run_cross"]

VERSION = 4
_TOKENS = 32_768  # of the study's text, to measure activity on: enough, since features vary more than rows of text
_STEERED = {"direct_effect", "steering"}


def cross_inputs(run: RunFolder) -> dict[str, Any]:
    study, config = run.study, run.study.config
    arms = study.pair
    files = ("features.parquet", "selection.parquet", "gate.json")
    steered = _STEERED & set(config.comparison.crossed)
    steered_files = ("interventions.parquet", "direct_effects.parquet") if steered else ()
    return {
        "version": VERSION,
        "asked": list(config.comparison.crossed),
        "arms": {name: study.identities[name] for name in arms},
        "tables": run.digest(*(run.arm(name, file) for name in arms for file in (*files, *steered_files))),
        "dose": run.digest(run.path("steering", "dose.json")) if steered else None,
        "steering": config.steering.model_dump(mode="json", exclude={"format", "system"})
        if steered and config.steering
        else None,
        "encoder": encoder_identity(study) if steered else None,
        "vocabulary": load_vocabulary(config.selection.vocabulary).sha256,
        "features": features_settings(study),
        "embeddings": embeddings_identity(study),
        "text": [study.text_identity, config.gate.tokens],
        "comparison": config.comparison.model_dump(include={"alpha", "n_permutations"}),
        "seed": config.seed,
        "nulls": {name: hash_file(path) for name, path in _kept_nulls(study).items()},
    }


def run_cross(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `comparison/factorial.parquet` and `arms/*/crossed.parquet`, resuming cell by cell."""
    study, groups = run.study, run.study.config.comparison.crossed
    control, treatment = study.pair
    path = run.path("comparison", "factorial.parquet")
    if reason := _obstacle(study):
        log(f"  nothing is crossed: {reason}")
        return [run.write_table(path, no_factorial(groups, reason))]
    tables_by_sae: dict[str, list[pd.DataFrame]] = {control: [], treatment: []}
    crossing = _Crossing(run, log)
    for sae, table in crossing.cell_rows():
        tables_by_sae[sae].append(table)
    tables = {sae: pd.concat(parts, ignore_index=True) for sae, parts in tables_by_sae.items()}
    config = study.config.comparison
    resampling = Resampling(study.config.seed, config.n_boot, config.n_permutations)
    roles, unmeasured = Roles(control, treatment, ()), crossing.unmeasured()
    written = [run.write_table(run.arm(sae, "crossed.parquet"), table) for sae, table in tables.items()]
    nulls = _effects_of_nulls(run, log)
    table = factorial(tables, roles, groups=groups, nulls=nulls, unmeasured=unmeasured, resampling=resampling)
    return [*written, run.write_table(path, table)]


def help_cross(run: RunFolder) -> None:
    """The other processes' share of the stage: generate the texts of their features, cell by cell."""
    if not _obstacle(run.study):
        _Crossing(run, SILENT).all_texts()


def null_effects(run: RunFolder, lm: LanguageModel, log: Log = SILENT) -> dict[str, float]:
    """(c,n) − (c,c) by quantity, for a further fine-tune n of the control's model: `nulls` of `factorial`.

    Measured as by the cross stage, which must have run, without the quantities of steered texts.
    """
    study, (control, _) = run.study, run.study.pair
    sae = load_sae(study.sae_folder(control), at=study.at("arms", control, "sae"))
    cell = Arm(control, study.arm(control).role, lm, sae, study.hook(control))
    parts = {str(part["quantity"][0]): part for part in _Crossing(run, log).without_texts(cell, lm.name)}
    crossed = run.read_table(run.arm(control, "crossed.parquet"))
    on_base = crossed[crossed["model"] == control].groupby("quantity")
    return {name: paired_change(on_base.get_group(name), part, CROSSED[name]) for name, part in parts.items()}


def _kept_nulls(study: Study) -> dict[str, Path]:
    folder = nulls_folder(study)
    return {} if folder is None else kept_adapters(folder)


def _effects_of_nulls(run: RunFolder, log: Log) -> dict[str, list[float]]:
    """`null_effects` of the null fine-tunes whose adapters were kept, by quantity; each is kept for a resumed run."""
    study = run.study
    if not (nulls := _kept_nulls(study)):
        return {}
    saved = run.partial("cross nulls", cross_inputs(run))
    base, model = study.open_arm(study.control, log).lm, study.config.arms[study.control].model
    done = {str(piece.loc[0, "null"]): piece for piece in saved.pieces(log)}
    for name, weights in nulls.items():
        if name not in done:
            log(f"  {name} with the control's SAE")
            tuned = load_language_model(model.model_copy(update={"adapter": str(weights.parent.resolve())}))
            tuned = replace(tuned, tokenizer=base.tokenizer, shared=base.shared, prepend_bos=base.prepend_bos)
            changes = null_effects(run, tuned, log)
            done[name] = pd.DataFrame({"null": name, "quantity": list(changes), "value": list(changes.values())})
            saved.add(done[name])
    effects: dict[str, list[float]] = {}
    for piece in done.values():
        for row in piece.itertuples():
            effects.setdefault(str(row.quantity), []).append(float(row.value))
    return effects


def _obstacle(study: Study) -> str:
    """Why the SAE of one arm cannot be put on the other's model; "" if it can."""
    control, treatment = study.pair
    if reason := size_obstacle(study, control, treatment) or size_obstacle(study, treatment, control):
        return f"{reason}, so the SAEs cannot be exchanged"
    if treatment in study.differences:
        return f"the models' tokenizers differ: the treatment's {study.differences[treatment].words()}"
    return ""


class _Crossing:
    """Measures the cells: first those of the control's model, of each model first that of the control's SAE."""

    def __init__(self, run: RunFolder, log: Log) -> None:
        self._run, self._log, self._study = run, log, run.study
        self._groups = set(run.study.config.comparison.crossed)
        self._arms = run.study.pair

    def cells(self) -> Iterator[tuple[Arm, str]]:
        """Each cell: an arm with the name and SAE of one arm and the model of another, and that other arm's name."""
        for model in self._arms:
            lm = self._study.open_arm(model, self._log).lm
            for name in self._arms:
                sae = load_sae(self._study.sae_folder(name), at=self._study.at("arms", name, "sae"))
                yield Arm(name, self._study.arm(name).role, lm, sae, self._study.hook(name)), model

    def cell_rows(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """The rows of each cell, with the name of its SAE's arm; all but steered texts are kept for a resumed run."""
        texts = self.all_texts()
        saved = self._run.partial("cross", self._inputs)
        done = {tuple(piece.loc[0, ["sae", "model"]]): piece for piece in saved.pieces(self._log)}
        for cell, model in self.cells():
            key = cell.name, model
            rows = done.get(key)
            if rows is None:
                rows = pd.concat([marker_row(model), *self.without_texts(cell, model)], ignore_index=True)
                rows = rows.assign(sae=cell.name)
                saved.add(rows)
            parts = [rows[rows["quantity"] != ""].drop(columns="sae")]
            if key in texts:
                parts += self._steered(cell, model, texts[key])
            yield cell.name, pd.concat(parts, ignore_index=True)[list(CROSSED_COLUMNS)]

    def all_texts(self) -> dict[tuple[str, str], pd.DataFrame]:
        """Trials by SAE and model; empty unless steering is crossed. Every process makes this call, which shares the
        work between them, and gets all trials.
        """
        if "steering" not in self._groups or self._dose is None:
            return {}
        cells = ((cell, model) for cell, model in self.cells() if len(self._chosen[cell.name]))
        return {(cell.name, model): self._texts(cell, model) for cell, model in cells}

    def _texts(self, cell: Arm, model: str) -> pd.DataFrame:
        """Trials of a cell: those of the steer stage if dose and noise are the same, else generated here."""
        trials = self._from_steer_stage(cell, model, "interventions")
        if trials is not None:
            return trials[list(TRIAL_COLUMNS)]
        # Every process reads the same pieces, and takes its share of what is missing.
        saved = self._run.partial(f"cross {cell.name} {model}", self._inputs)
        return run_trials(
            self._site(cell),
            self._chosen[cell.name],
            self._plan,
            vectors=self._vectors,
            done=saved.read(self._log),
            on_chunk=saved.add,
            progress=partial(self._log.progress, f"steer {cell.name}'s SAE on {model}", unit="texts"),
        )

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        return cross_inputs(self._run)

    @cached_property
    def _chosen(self) -> dict[str, pd.DataFrame]:
        """By arm, the features that the steer stage tests; all domain features where nothing is steered."""
        config = self._study.config.steering
        if config is not None:
            return {name: tested_features(self._run, name, config.max_features) for name in self._arms}
        chosen = {}
        for name in self._arms:
            selection = self._run.read_table(self._run.arm(name, "selection.parquet"))
            features = self._run.read_table(self._run.arm(name, "features.parquet"))
            of_domain = features["feature"].isin(selection.loc[selection["is_domain"], "feature"])
            chosen[name] = features[of_domain].reset_index(drop=True)
        return chosen

    @cached_property
    def _dose(self) -> float | None:
        return chosen_dose(self._run)[0]

    @cached_property
    def _plan(self) -> SteeringPlan:
        config, dose = self._study.steering, self._dose
        assert dose is not None  # else nothing is steered
        placebos = (config.primary_placebo,)
        return SteeringPlan.from_section(config, seed=self._study.config.seed, doses=(dose,), placebos=placebos)

    @cached_property
    def _vectors(self) -> RememberedVectors:
        return RememberedVectors(outcome_vectors(self._study))

    def _norm(self, arm: str) -> float:
        return float(read_json(self._run.arm(arm, "gate.json"))["mean_norm"])

    def _site(self, cell: Arm) -> Site:
        """The steering site of a cell; every cell's unit of dose is the mean norm of the control's model."""
        return replace(site_of(self._run, cell), mean_norm=self._norm(self._arms[0]))

    def _from_steer_stage(self, cell: Arm, model: str, table: str) -> pd.DataFrame | None:
        """The steer stage's table of a cell, if its doses had the same unit; else None."""
        config = self._study.steering
        in_norms = config.operator == "add" and config.unit == "residual_norm"
        same = cell.name == model and config.primary_placebo in config.placebos
        if not same or (in_norms and self._norm(model) != self._norm(self._arms[0])):
            return None
        return self._run.table_or_none(self._run.arm(model, f"{table}.parquet"))

    def unmeasured(self) -> str:
        """Why quantities of features were not measured; "" if they were."""
        empty = [name for name, chosen in self._chosen.items() if chosen.empty]
        if empty:
            return f"{' and '.join(empty)}: no domain feature"
        steered = _STEERED & self._groups
        return chosen_dose(self._run)[1] if steered and self._dose is None else ""

    def without_texts(self, cell: Arm, model: str) -> Iterator[pd.DataFrame]:
        """The rows of a cell, without those of steered texts."""
        chosen = self._chosen[cell.name]
        self._log(f"  {cell.name}'s SAE on the model of {model}")
        if "direct_effect" in self._groups and len(chosen) and self._dose is not None:
            direct = self._from_steer_stage(cell, model, "direct_effects")
            if direct is None:
                what = f"direct effects, {cell.name}'s SAE on {model}"
                progress = partial(self._log.progress, what, unit="pushes")
                direct = direct_effects(self._site(cell), chosen, self._plan, progress=progress)
            yield crossed_rows("direct_effect", model, self._beyond_placebo(direct, "delta_logprob"))
        if self._groups & {"activity", "reconstruction"}:
            yield from self._on_text(cell, model, chosen["feature"].tolist())
        if "coherence" in self._groups and len(chosen):
            yield self._coherence(cell, model, chosen["feature"].tolist())

    def _beyond_placebo(self, trials: pd.DataFrame, column: str) -> pd.DataFrame:
        """Steered minus placebo, averaged over samples: a row a feature, a column a prompt."""
        placebo, prompts = self._study.steering.primary_placebo, range(len(self._plan.prompts))
        at_dose = trials[trials["dose"] == self._dose]
        features = np.unique(at_dose["feature"].to_numpy(dtype=np.int64))
        sides = []
        for condition in (STEERED, placebo):
            rows = at_dose[at_dose["condition"] == condition]
            means = rows.groupby(["feature", "prompt"])[column].mean().unstack("prompt")
            sides.append(means.reindex(index=features, columns=prompts))
        return sides[0] - sides[1]

    def _steered(self, cell: Arm, model: str, texts: pd.DataFrame) -> Iterator[pd.DataFrame]:
        config, chosen, seed = self._study.steering, self._chosen[cell.name], self._study.config.seed
        yield crossed_rows("steering_effect", model, self._beyond_placebo(texts, "similarity"))
        words = load_vocabulary(self._study.config.selection.vocabulary).words
        scored = score_texts(texts, chosen, vectors=self._vectors, vocabulary=words, seed=seed)
        direct = None
        if outcome_named(config.outcomes[0]).direct:
            direct = direct_effects(self._site(cell), chosen, self._plan)
        tested = effects(
            scored,
            direct,
            alpha=self._study.config.comparison.alpha,
            seed=seed,
            dose=self._dose,
            placebo=config.primary_placebo,
            outcome=outcome_named(config.outcomes[0]).under(config.operator),
            obstacles=obstacles(self._site(cell), chosen, self._plan),
        )
        passed = tested["passed"].astype(np.float64).where(tested["p"].notna())
        yield crossed_rows("pass_rate", model, passed.set_axis(tested["feature"]), tested["reason"].tolist())

    @torch.inference_mode()
    def _coherence(self, cell: Arm, model: str, features: list[int]) -> pd.DataFrame:
        """Coherence of the tokens that features promote through the model's unembedding."""
        config = self._study.config.features
        valid = ranked_tokens(self._study, cell.lm)
        W_U = shared_unembedding(cell.lm)
        top = project(cell.added(features), W_U, config.top_k, config.projection, valid=valid)
        strings = cell.lm.token_strings()
        tokens = [[strings[i] for i in row] for row in top.indices.tolist()]
        table = pd.DataFrame({"feature": features, "top_tokens": tokens, "top_weights": top.weights.tolist()})
        scored = coherence(table, embeddings=load_embeddings(self._study.config.coherence.embeddings))
        return crossed_rows("coherence", model, scored.set_index("feature")["coherence"], scored["reason"].tolist())

    @torch.inference_mode()
    def _on_text(self, cell: Arm, model: str, features: list[int]) -> Iterator[pd.DataFrame]:
        """Activity of features and reconstruction by the SAE, on the first rows of the study's text."""
        rows, groups = self._study.rows(), self._groups
        gate_rows = rows.head(max(1, self._study.config.gate.tokens // rows.context_size))
        n_rows = min(len(rows), max(1, _TOKENS // rows.context_size)) if "activity" in groups else len(gate_rows)
        activity: list[npt.NDArray[np.float64]] = []
        sums = RowSums()
        for start, ids, x, mask, _ in cell.read(rows, self._study.residuals):
            sae = cell.sae.on(cell.lm.device)
            acts = sae.encode(x)[..., features].clamp(min=0).double() * mask[..., None]
            per_token = torch.stack([(acts > 0).double().sum(dim=1), acts.sum(dim=1)]) / mask.sum(dim=1)[:, None]
            activity.append(per_token.numpy())
            if "reconstruction" in groups and start < len(gate_rows):
                sums.add(x[: len(gate_rows) - start].float(), sae(x[: len(gate_rows) - start].float()), mask)
            self._log.progress(f"{cell.name}'s SAE on {model}", start + len(ids), n_rows, "rows")
            if start + len(ids) >= n_rows:
                break
        if "activity" in groups and features:
            for name, values in zip(("density", "activation"), np.concatenate(activity, axis=1), strict=True):
                yield crossed_rows(name, model, pd.DataFrame(values[:n_rows].T, index=features))
        if "reconstruction" in groups:
            losses = spliced_losses(
                cell.lm, cell.sae, cell.hook, gate_rows.ids, cell.norm_limit(rows), counts=gate_rows.counts
            ).by_row
            saved = by_row(losses["zero"] - losses["sae"], losses["zero"] - losses["clean"])
            for name, values in (("explained_variance", 1 - sums.unexplained()), ("ce_loss_score", saved)):
                yield crossed_rows(name, model, pd.DataFrame(values[None], index=[WHOLE_SAE]))
