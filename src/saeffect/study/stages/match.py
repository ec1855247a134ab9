"""Stage 5, which feature became which: fates beside other seeds, one SAE on two models, absorption, rotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from saeffect.comparison import MatchTables, Resampling
from saeffect.diffing.coactivity import FiringLog
from saeffect.diffing.correspondence import Correspondence, SaeView, correspond
from saeffect.diffing.cross_activity import CrossActivity, PairedOptions
from saeffect.diffing.fates import FateRules
from saeffect.diffing.matching import Matching, Neighbours
from saeffect.diffing.stagewise import stagewise
from saeffect.io import Log, read_json
from saeffect.lm.activations import TokenRows, kept_positions
from saeffect.sae.base import SparseAutoencoder
from saeffect.study.run_folder import KeptRows, RunFolder
from saeffect.study.stages.seeds import SeedSae, open_seeds, seed_identities
from saeffect.study.study import Arm, Study

__all__ = ["match_inputs", "read_matches", "run_match"]

VERSION = 3  # 2: passes as in harvests; 3: intervals of excess counts
BoolArray = npt.NDArray[np.bool_]


def match_inputs(run: RunFolder) -> dict[str, Any]:
    """What the fates depend on."""
    study = run.study
    files = ("features.parquet", "selection.parquet", "seeds.parquet")
    return {
        "version": VERSION,
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
    """Write `comparison/fates_control.parquet` and the other tables of `MatchTables`.

    Each pair of SAEs is kept as soon as it is matched, so a killed run goes on where it was.
    """
    found = _match(run, log, _KeptPairs(run.kept("match", match_inputs(run)), log))
    made = {name: getattr(found, name) for name in MatchTables.names() if len(getattr(found, name).columns)}
    return [run.write_table(run.path("comparison", f"{name}.parquet"), table) for name, table in made.items()]


def read_matches(run: RunFolder) -> MatchTables:
    """Read what the stage wrote; a table that was not made has no columns."""
    tables = {name: run.table_or_none(run.path("comparison", f"{name}.parquet")) for name in MatchTables.names()}
    return MatchTables(**{name: table for name, table in tables.items() if table is not None})


def _match(run: RunFolder, log: Log, keep: _KeptPairs) -> MatchTables:
    study, config = run.study, run.study.config
    control, treatment = study.by_role("control")[0], study.by_role("treatment")[0]
    if study.sae_config(control).d_in != study.sae_config(treatment).d_in:
        log("  the arms' models differ in width, so no feature of one can be compared with one of the other")
        return MatchTables()
    logs, kept, seeds, saes = _Logs(study, log), {}, {}, {}
    for name in study.ordered_arms():
        opened = study.open_arm(name, log)
        seeds[name], saes[name] = open_seeds(study, name), opened.sae
        whole = {one.name: one.sae for one in seeds[name] if one.sae is not None}
        kept[name] = logs.add(opened, {name: opened.sae, **whole})
        if name == treatment:
            cross = logs.cross(opened, saes[control], control, study.hook(control), kept[control])
    both = kept[control] & kept[treatment]
    views = _views(run, {name: log.only(both) for name, log in logs.of.items()}, seeds, saes)
    width = views[control][0].W_dec.shape[1]
    others = [*views[control][1:], *(view for name in study.by_role("placebo") for view in views[name])]
    found = correspond(
        views[control][0],
        views[treatment][0],
        [view for view in others if view.W_dec.shape[1] == width],
        treatment_seeds=views[treatment][1:],
        rules=FateRules(alpha=config.comparison.alpha),
        resampling=Resampling(config.seed, config.comparison.n_boot, config.comparison.n_permutations),
        log=log,
        keep=keep,
    )
    options = PairedOptions(n_permutations=config.comparison.n_permutations, seed=config.seed)
    activity = cross.result(options)
    domain = run.read_table(run.arm(control, "selection.parquet"))["is_domain"]
    turned = _stagewise(run, saes, control, treatment)
    return _tables(found, activity.assign(is_domain=domain.to_numpy(dtype=bool)), turned)


def _tables(found: Correspondence, cross: pd.DataFrame, turned: pd.DataFrame) -> MatchTables:
    return MatchTables(
        fates_control=found.control,
        fates_treatment=found.treatment,
        fate_counts=found.counts,
        fates_null=found.null,
        cross_activity=cross,
        absorption=found.absorption,
        stagewise=turned,
    )


class _KeptPairs:
    """Matchings of pairs of SAEs, a piece each, until the manifest knows the tables."""

    def __init__(self, kept: KeptRows, log: Log) -> None:
        self._kept = kept
        self._found = {tuple(piece.loc[0, _PAIR]): _matching_of(piece) for piece in kept.pieces(log)}

    def read(self, measure: str, a: str, b: str) -> Matching | None:
        return self._found.get((measure, a, b))

    def write(self, measure: str, a: str, b: str, matching: Matching) -> None:
        sides = []
        for name, side in (("forward", matching.forward), ("backward", matching.backward)):
            columns: dict[str, Any] = dict(zip((*_PAIR, "side"), (measure, a, b, name), strict=True))
            columns |= {"reason": list(side.reason), "alone": side.alone}
            columns |= {f"index_{i}": column for i, column in enumerate(side.indices.T)}
            columns |= {f"similarity_{i}": column for i, column in enumerate(side.similarity.T)}
            sides.append(pd.DataFrame(columns))
        self._kept.add(pd.concat(sides, ignore_index=True))


_PAIR = ["measure", "a", "b"]


def _matching_of(piece: pd.DataFrame) -> Matching:
    sides = []
    for _, rows in piece.groupby("side", sort=False):
        indices, similarity = (
            rows[[name for name in rows if name.startswith(f"{kind}_")]].to_numpy() for kind in ("index", "similarity")
        )
        sides.append(Neighbours(indices, similarity, tuple(rows["reason"]), rows["alone"].to_numpy()))
    return Matching(str(piece.loc[0, "measure"]), *sides)


class _Logs:
    """Activations of SAEs on the study's text, one token after the other, kept sparse."""

    def __init__(self, study: Study, log: Log) -> None:
        self._study, self._log = study, log
        self.of: dict[str, FiringLog] = {}

    @torch.inference_mode()
    def add(self, arm: Arm, saes: Mapping[str, SparseAutoencoder]) -> BoolArray:
        """Log SAEs of one arm's model; bool [n_tokens], the tokens that count there."""
        rows = self._study.rows
        limit, kept = arm.norm_limit(rows), []
        self.of |= {name: FiringLog(sae.cfg.d_sae) for name, sae in saes.items()}
        for start, ids, x in self._study.residuals.batches(arm.lm, arm.hook, rows):
            kept.append(kept_positions(x, limit).flatten().numpy())
            for name, sae in saes.items():
                self.of[name].update(sae.encode(x).flatten(0, 1))
            self._log.progress(f"activations {arm.name}", start + len(ids), len(rows), "rows")
        return np.concatenate(kept)

    @torch.inference_mode()
    def cross(self, treatment: Arm, sae: SparseAutoencoder, control: str, hook: str, kept: BoolArray) -> CrossActivity:
        """The control's SAE on the treatment's model, beside what it did on the control's."""
        rows: TokenRows = self._study.rows
        limit, cross = treatment.norm_limit(rows), CrossActivity(sae.cfg.d_sae)
        before = self.of[control].matrix()
        width = rows.context_size
        for start, ids, x in self._study.residuals.batches(treatment.lm, hook, rows):
            tokens = slice(start * width, (start + len(ids)) * width)
            acts = torch.from_numpy(before[tokens].toarray()).view(len(ids), width, -1)
            counts = kept_positions(x, limit) & torch.from_numpy(kept[tokens]).view(len(ids), width)
            cross.update(acts, sae.encode(x), counts)
            self._log.progress(f"cross-activity {treatment.name}", start + len(ids), len(rows), "rows")
        return cross


def _views(
    run: RunFolder,
    logs: Mapping[str, FiringLog],
    seeds: Mapping[str, list[SeedSae]],
    saes: Mapping[str, SparseAutoencoder],
) -> dict[str, list[SaeView]]:
    """Each arm's SAEs, its own first."""
    views = {}
    columns = ["feature", "density", "decoder_norm"]
    for name, further in seeds.items():
        features = run.read_table(run.arm(name, "features.parquet"))[columns]
        views[name] = [SaeView(name, saes[name].W_dec.detach(), features, logs.get(name))]
        table = run.read_table(run.arm(name, "seeds.parquet")) if further else pd.DataFrame()
        for one in further:
            mine = table[table["sae"] == one.name][columns].reset_index(drop=True)
            views[name].append(SaeView(one.name, one.W_dec, mine, logs.get(one.name)))
    return views


def _started_from(study: Study, arm: str) -> str | None:
    """Name of the folder of the SAE that an arm's SAE was trained on from; None if from none, or nobody says."""
    said = study.config.arms[arm].training.get("init_from")
    if said:
        return Path(str(said)).name
    note = study.sae_folder(arm) / "training.json"
    recipe = read_json(note).get("recipe") if note.is_file() else None
    started = ((recipe or {}).get("sae") or {}).get("init_from")
    return Path(str(started)).name if started else None


def _stagewise(run: RunFolder, saes: Mapping[str, SparseAutoencoder], control: str, treatment: str) -> pd.DataFrame:
    """How far features turned, where the treatment's SAE was trained on from the control's; no columns otherwise."""
    study = run.study
    start = study.sae_folder(control).name
    same = [name for name in saes if name != control and _started_from(study, name) == start]
    same = [name for name in same if saes[name].W_dec.shape == saes[control].W_dec.shape]
    if treatment not in same:
        return pd.DataFrame()
    features = run.read_table(run.arm(control, "features.parquet"))
    nulls = [saes[name] for name in same if name in study.by_role("placebo")]
    return stagewise(saes[control], saes[treatment], nulls, features=features)
