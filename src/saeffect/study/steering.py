"""Stage 6, interventions: a dose search on prompts of its own, then the test of every chosen feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.config import SteeringConfig
from saeffect.errors import Undefined
from saeffect.features.embeddings import load_embeddings
from saeffect.provenance import atomic_path, fingerprint, read_json, write_json
from saeffect.steering import Site, SteeringPlan, choose_dose, direct_effects, effects, run_trials
from saeffect.study.coherence import embeddings_identity
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Say

__all__ = ["dose_inputs", "run_dose_search", "run_steering", "steering_inputs", "tested_features"]

VERSION = 2  # 2: rotary frequencies stay in float32
_FILES = ("interventions", "direct_effects", "effects")


def _plan(config: SteeringConfig, seed: int, *, search: bool, doses: tuple[float, ...]) -> SteeringPlan:
    return SteeringPlan(
        prompts=config.search_prompts if search else config.prompts,
        doses=doses,
        samples=1 if search else config.samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        frequency_penalty=config.frequency_penalty,
        positions=config.positions,
        seed=seed,
        batch_size=config.batch_size,
    )


def dose_inputs(run: RunFolder, config: SteeringConfig) -> dict[str, Any]:
    """What the chosen dose depends on."""
    study = run.study
    arms = _searched(run)
    return {
        "version": VERSION,
        "arms": {name: study.identities[name] for name in arms},
        "tables": run.digest(*(run.arm(n, f) for n in arms for f in ("features.parquet", "selection.parquet"))),
        "gates": run.digest(*(run.arm(name, "gate.json") for name in arms)),
        "embeddings": embeddings_identity(study),
        "seed": study.config.seed,
        "steering": config.model_dump(mode="json", exclude={"prompts", "max_features", "samples"}),
    }


def run_dose_search(run: RunFolder, config: SteeringConfig, say: Say) -> Callable[[], Iterable[Path]]:
    """Write `steering/dose.json` and `steering/dose_search.parquet`.

    Control and treatment are searched alike and one dose serves every arm: arms steered at different
    strengths could not be compared.
    """

    def work() -> Iterable[Path]:
        paths = run.path("steering", "dose_search.parquet"), run.path("steering", "dose.json")
        if len(config.doses) == 1:
            table = pd.DataFrame()
            chosen, reason = config.doses[0], "set in the study file"
        else:
            table = pd.concat([_search_arm(run, name, config, say) for name in _searched(run)], ignore_index=True)
            mean = table.groupby("dose")["score"].mean().dropna() if len(table) else pd.Series(dtype=float)
            chosen = float(mean.idxmax()) if len(mean) else float(sorted(config.doses)[len(config.doses) // 2])
            reason = ""
            if mean.empty:
                reason = "no text of the search had a similarity, so the middle dose was taken"
            elif mean.max() <= 0:
                reason = "no dose made texts more similar to the features' top tokens"
            elif chosen in (min(config.doses), max(config.doses)):
                reason = "the best dose is at the edge of those tried"
        if table.empty:
            table = pd.DataFrame({"arm": pd.Series(dtype=str), "dose": pd.Series(dtype=float)})
        table["chosen"] = table["dose"] == chosen
        run.write_table(paths[0], table)
        write_json(paths[1], {"dose": chosen, "note": reason})
        return paths

    return work


def tested_features(run: RunFolder, arm: str, limit: int | None, *, draw: int = 0) -> pd.DataFrame:
    """The domain features that are steered: all of them, or a random sample that depends on the seed alone."""
    selection = run.read_table(run.arm(arm, "selection.parquet"))
    chosen = selection.loc[selection["is_domain"], "feature"].to_numpy(dtype=np.int64)
    if limit is not None and len(chosen) > limit:
        generator = np.random.default_rng([run.study.config.seed, draw])
        chosen = np.sort(generator.choice(chosen, size=limit, replace=False))
    features = run.read_table(run.arm(arm, "features.parquet"))
    return features[features["feature"].isin(chosen)].reset_index(drop=True)


def steering_inputs(run: RunFolder, arm: str, config: SteeringConfig) -> dict[str, Any]:
    """What an arm's interventions depend on."""
    study = run.study
    files = [run.arm(arm, name) for name in ("features.parquet", "selection.parquet", "gate.json")]
    return {
        "version": VERSION,
        "arm": study.identities[arm],
        "tables": run.digest(*files, run.path("steering", "dose.json")),
        "embeddings": embeddings_identity(study),
        "seed": study.config.seed,
        "alpha": study.config.comparison.alpha,
        "steering": config.model_dump(mode="json", exclude={"search_prompts", "search_features", "doses"}),
    }


def run_steering(run: RunFolder, arm: str, config: SteeringConfig, say: Say) -> Callable[[], Iterable[Path]]:
    """Write `interventions.parquet`, `direct_effects.parquet` and `effects.parquet` of an arm.

    Texts are kept chunk by chunk while they are generated, so a killed run goes on where it was.
    """

    def work() -> Iterable[Path]:
        chosen = tested_features(run, arm, config.max_features)
        if chosen.empty:
            say(f"  arm {arm} has no domain features, so nothing is steered")
            for name in _FILES:  # of an earlier run that had some
                run.arm(arm, f"{name}.parquet").unlink(missing_ok=True)
            return []
        dose = float(read_json(run.path("steering", "dose.json"))["dose"])
        plan = _plan(config, run.study.config.seed, search=False, doses=(dose,))
        site, W_dec = _site(run, arm, say)
        vectors = load_embeddings(run.study.config.coherence.embeddings)
        kept = _Chunks(run.arm(arm, f"partial-{fingerprint(steering_inputs(run, arm, config))[:16]}"))
        trials = run_trials(
            site,
            W_dec,
            chosen,
            plan,
            vectors=vectors,
            done=kept.read(),
            on_chunk=kept.add,
            progress=lambda done, total: say(f"progress steer {arm} {done} {total} texts"),
        )
        direct = direct_effects(site, W_dec, chosen, plan)
        comparison = run.study.config.comparison
        result = effects(trials, direct, alpha=comparison.alpha, seed=run.study.config.seed)
        paths = []
        for name, table in zip(_FILES, (trials, direct, result), strict=True):
            paths.append(run.arm(arm, f"{name}.parquet"))
            run.write_table(paths[-1], table)
        kept.remove()
        return paths

    return work


def _searched(run: RunFolder) -> list[str]:
    return run.study.by_role("control") + run.study.by_role("treatment")


def _site(run: RunFolder, arm: str, say: Say) -> tuple[Site, Any]:
    opened = run.study.open_arm(arm, say)
    mean_norm = float(read_json(run.arm(arm, "gate.json"))["mean_norm"])
    return Site(opened.lm, opened.hook, mean_norm), opened.W_dec


def _search_arm(run: RunFolder, arm: str, config: SteeringConfig, say: Say) -> pd.DataFrame:
    chosen = tested_features(run, arm, config.search_features, draw=1)
    if chosen.empty:
        return pd.DataFrame()
    site, W_dec = _site(run, arm, say)
    try:
        choice = choose_dose(
            site,
            W_dec,
            chosen,
            _plan(config, run.study.config.seed, search=True, doses=config.doses),
            test_prompts=config.prompts,
            vectors=load_embeddings(run.study.config.coherence.embeddings),
            progress=lambda done, total: say(f"progress dose {arm} {done} {total} texts"),
        )
    except Undefined as error:
        say(f"  dose search, arm {arm}: {error.message}")
        return pd.DataFrame()
    return choice.table.assign(arm=arm)


class _Chunks:
    """Finished pieces of an arm's interventions, one file each, until the whole is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> pd.DataFrame | None:
        files = sorted(self._folder.glob("chunk-*.parquet"))
        return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True) if files else None

    def add(self, rows: pd.DataFrame) -> None:
        index = len(list(self._folder.glob("chunk-*.parquet"))) if self._folder.is_dir() else 0
        with atomic_path(self._folder / f"chunk-{index:05d}.parquet") as temporary:
            rows.to_parquet(temporary, index=False)

    def remove(self) -> None:
        for file in self._folder.glob("*") if self._folder.is_dir() else ():
            file.unlink()
        if self._folder.is_dir():
            self._folder.rmdir()
