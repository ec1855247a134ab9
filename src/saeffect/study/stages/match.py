"""Matching features: fates compared with other seeds, one SAE on two models, absorption, rotations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from saeffect.comparison import MatchTables, Resampling
from saeffect.diffing.coactivity import FiringLog
from saeffect.diffing.cross_activity import beside_nulls
from saeffect.diffing.matching import Matching, Neighbours
from saeffect.diffing.methods import METHODS, measure_all, table_names
from saeffect.diffing.pair import ActsOfBoth, ModelPair, ResidualBatch, SaeView
from saeffect.io import read_json
from saeffect.lm.activations import TokenRows, kept_positions
from saeffect.progress import Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.stats.arguments import BoolArray
from saeffect.study.both_models import size_obstacle
from saeffect.study.run_folder import PartialTable, RunFolder
from saeffect.study.stages.changes import CHANGE_TABLES
from saeffect.study.stages.features import SeedSae, open_seeds, seed_identities
from saeffect.study.stages.push import PUSH_TABLES
from saeffect.study.study import Arm, Study

__all__ = ["match_inputs", "matched_tables", "read_matches", "run_match"]

VERSION = 3


def match_inputs(run: RunFolder) -> dict[str, Any]:
    study = run.study
    files = ("features.parquet", "selection.parquet", "seeds.parquet")
    return {
        "version": VERSION,
        "methods": list(METHODS),
        "arms": dict(study.identities),
        "saes": seed_identities(study),
        "roles": {name: arm.role for name, arm in study.config.arms.items()},
        "tables": run.digest(*(run.arm(name, file) for name in study.config.arms for file in files)),
        "text": study.text_identity,
        "comparison": study.config.comparison.model_dump(include={"alpha", "n_boot", "n_permutations"}),
        "started_from": {name: _started_from(study, name) for name in study.config.arms},
        "seed": study.config.seed,
    }


def run_match(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `comparison/fates_control.parquet` and the tables of the other diffing methods, resuming pair by pair."""
    tables = _measure(run, log, _FinishedPairs(run.partial("match", match_inputs(run)), log))
    names = [name for name in table_names() if name in tables]
    return [run.write_table(run.path("comparison", f"{name}.parquet"), tables[name]) for name in names]


def matched_tables() -> tuple[str, ...]:
    """Names of all tables about differences between the models: of this stage, and of "changes" and those after it."""
    return (*table_names(), *CHANGE_TABLES, "put_back", *PUSH_TABLES, "factorial")


def read_matches(run: RunFolder) -> MatchTables:
    """Read `matched_tables`; a missing one has no columns. Activity is put beside null fine-tunes, if there are any."""
    read = {name: run.table_or_none(run.path("comparison", f"{name}.parquet")) for name in matched_tables()}
    tables = {name: table for name, table in read.items() if table is not None}
    declared = {name: tables.pop(name) for name in MatchTables.names() if name in tables}
    if "cross_activity" in declared and "changes" in tables:
        declared["cross_activity"] = beside_nulls(declared["cross_activity"], tables["changes"])
    return MatchTables(**declared, further=tables)


def _measure(run: RunFolder, log: Log, keep: _FinishedPairs) -> dict[str, pd.DataFrame]:
    study, config = run.study, run.study.config
    control, treatment = study.pair
    if obstacle := size_obstacle(study, control, treatment):
        log(f"  {obstacle}, so no feature of one can be compared with one of the other")
        return {}
    logs, counted, seeds, saes = _FiringLogs(study, log), {}, {}, {}
    for name in study.ordered_arms():
        opened = study.open_arm(name, log)
        seeds[name], saes[name] = open_seeds(study, name), opened.sae
        whole = {seed.name: seed.sae for seed in seeds[name] if seed.sae is not None}
        counted[name] = logs.add(opened, {name: opened.sae, **whole})
    views = _views(run, logs.common({name: counted[name] for name in (control, treatment)}), seeds, saes)
    other_views = [
        *views[control][1:],
        *(view for name in study.ordered_arms() if name not in study.pair for view in views[name]),
    ]
    width = views[control][0].W_dec.shape[1]
    selection = run.read_table(run.arm(control, "selection.parquet"))
    return measure_all(
        ModelPair(
            control=views[control][0],
            treatment=views[treatment][0],
            others=[view for view in other_views if view.W_dec.shape[1] == width],
            treatment_seeds=views[treatment][1:],
            is_domain=selection["is_domain"].to_numpy(dtype=bool),
            acts_of_both=lambda: logs.acts_of_both(study.open_arm(treatment), saes[control], control, counted[control]),
            residuals=lambda name: logs.residuals(study.open_arm(name)),
            alpha=config.comparison.alpha,
            resampling=Resampling(config.seed, config.comparison.n_boot, config.comparison.n_permutations),
            log=log,
            store=keep,
        )
    )


class _FinishedPairs:
    """Matchings of pairs of SAEs, one piece each, kept for resuming until the stage is done."""

    def __init__(self, saved: PartialTable, log: Log) -> None:
        self._saved = saved
        self._matchings = {tuple(piece.loc[0, _PAIR_COLUMNS]): _read_matching(piece) for piece in saved.pieces(log)}

    def read(self, measure: str, a: str, b: str) -> Matching | None:
        return self._matchings.get((measure, a, b))

    def write(self, measure: str, a: str, b: str, matching: Matching) -> None:
        sides = []
        for name, side in (("forward", matching.forward), ("backward", matching.backward)):
            columns: dict[str, Any] = dict(zip((*_PAIR_COLUMNS, "side"), (measure, a, b, name), strict=True))
            columns |= {"reason": list(side.reason)}
            columns |= {f"index_{i}": column for i, column in enumerate(side.indices.T)}
            columns |= {f"similarity_{i}": column for i, column in enumerate(side.similarity.T)}
            sides.append(pd.DataFrame(columns))
        self._saved.add(pd.concat(sides, ignore_index=True))


_PAIR_COLUMNS = ["measure", "a", "b"]


def _read_matching(piece: pd.DataFrame) -> Matching:
    sides = []
    for _, rows in piece.groupby("side", sort=False):
        indices, similarity = (
            rows[[name for name in rows if name.startswith(f"{kind}_")]].to_numpy() for kind in ("index", "similarity")
        )
        sides.append(Neighbours(indices, similarity, tuple(rows["reason"])))
    return Matching(str(piece.loc[0, "measure"]), *sides)


class _FiringLogs:
    """Sparse activations of SAEs on every token of the study's text."""

    def __init__(self, study: Study, log: Log) -> None:
        self._study, self._log = study, log
        self.by_sae: dict[str, FiringLog] = {}

    @torch.inference_mode()
    def add(self, arm: Arm, saes: Mapping[str, SparseAutoencoder]) -> BoolArray:
        """Log SAEs of one arm's model; returns bool [n_tokens], the tokens that count."""
        rows = self._study.rows()
        counted = []
        self.by_sae |= {name: FiringLog(sae.cfg.d_sae) for name, sae in saes.items()}
        for _, _, x, mask, _ in arm.read(rows, self._study.residuals, self._log, f"activations {arm.name}"):
            counted.append(mask.flatten().numpy())
            for name, sae in saes.items():
                acts = sae.on(arm.lm.device).encode(x.to(arm.lm.device))
                self.by_sae[name].update(acts.flatten(0, 1))
        return np.concatenate(counted)

    def common(self, counted: Mapping[str, BoolArray]) -> dict[str, FiringLog]:
        """The logs, cut to tokens that count in all these arms."""
        in_all = np.logical_and.reduce(list(counted.values()))
        return {name: log.only(in_all) for name, log in self.by_sae.items()}

    @torch.inference_mode()
    def acts_of_both(
        self, treatment: Arm, sae: SparseAutoencoder, control: str, counted: BoolArray
    ) -> Iterator[ActsOfBoth]:
        """Activations of the control's SAE on the treatment's and on the control's model."""
        rows: TokenRows = self._study.rows()
        limit, control_acts, width = treatment.norm_limit(rows), self.by_sae[control].matrix(), rows.context_size
        for start, ids, x in self._study.residuals.batches(treatment.lm, self._study.hook(control), rows):
            tokens = slice(start * width, (start + len(ids)) * width)
            acts = torch.from_numpy(control_acts[tokens].toarray()).view(len(ids), width, -1)
            mask = kept_positions(x, limit) & torch.from_numpy(counted[tokens]).view(len(ids), width)
            yield ActsOfBoth(acts, sae.on(treatment.lm.device).encode(x), mask)
            self._log.progress(f"cross-activity {treatment.name}", start + len(ids), len(rows), "rows")

    @torch.inference_mode()
    def residuals(self, arm: Arm) -> Iterator[ResidualBatch]:
        for _, ids, x, mask, _ in arm.read(self._study.rows(), self._study.residuals):
            yield ResidualBatch(ids, x, mask)


def _views(
    run: RunFolder,
    logs: Mapping[str, FiringLog],
    seeds: Mapping[str, list[SeedSae]],
    saes: Mapping[str, SparseAutoencoder],
) -> dict[str, list[SaeView]]:
    """Each arm's SAEs, its own first."""
    views = {}
    columns = ["feature", "density", "decoder_norm"]
    control_sae = run.study.sae_folder(run.study.control).name
    for name, seed_saes in seeds.items():
        features = run.read_table(run.arm(name, "features.parquet"))[columns]
        is_warm_start = _started_from(run.study, name) == control_sae
        views[name] = [SaeView(name, saes[name].W_dec.detach(), features, logs.get(name), saes[name], is_warm_start)]
        table = run.read_table(run.arm(name, "seeds.parquet")) if seed_saes else pd.DataFrame()
        for seed in seed_saes:
            statistics = table[table["sae"] == seed.name][columns].reset_index(drop=True)
            views[name].append(SaeView(seed.name, seed.W_dec, statistics, logs.get(seed.name), seed.sae))
    return views


def _started_from(study: Study, arm: str) -> str | None:
    """Folder name of the SAE from which an arm's SAE was initialised; None if none or not recorded."""
    configured = study.config.arms[arm].training.get("init_from")
    if configured:
        return Path(str(configured)).name
    training_file = study.sae_folder(arm) / "training.json"
    recipe = read_json(training_file).get("recipe") if training_file.is_file() else None
    init_from = ((recipe or {}).get("sae") or {}).get("init_from")
    return Path(str(init_from)).name if init_from else None
