"""The steer stage in its other forms: clamping, sets of features, no placebo, one of everything, bad requests."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from saeffect.errors import ConfigError, UnknownName
from saeffect.io import read_json
from saeffect.study.check import check_study
from saeffect.study.run import run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.dose_search import dose_inputs, site_of
from saeffect.study.study import Study

SMALL = {"prompts": ["The river", "My doctor said"], "samples": 1, "max_new_tokens": 4, "max_features": 2}


@pytest.fixture(scope="module")
def prepared(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `study.yaml`, and `run`: all stages before steering."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("study") / "tiny"))
    shutil.rmtree(folder / "run")
    (folder / "before").rename(folder / "run")
    return folder


def steered(prepared: Path, tmp_path: Path, **steering: Any) -> Path:
    """The run directory after the steer stage with these settings."""
    shutil.copytree(prepared / "run", tmp_path / "run")
    run_study(opened(prepared, **steering), tmp_path / "run", stages=("steer",))
    return tmp_path / "run"


def opened(prepared: Path, **steering: Any) -> Study:
    raw = yaml.safe_load((prepared / "study.yaml").read_text())
    raw["steering"] = SMALL | steering
    path = prepared / "changed.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return Study.open(path)


def table(run: Path, name: str, arm: str = "control") -> pd.DataFrame:
    return pd.read_parquet(run / "arms" / arm / f"{name}.parquet")


@pytest.mark.parametrize("change", [{"operator": "clamp"}, {"operator": "ablate"}, {"coefficient": 2.0}])
def test_other_operators_and_sets_of_features(prepared: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    run = steered(prepared, tmp_path, together={"control": [[1, 2], [4, 7, 9]]}, **change)
    effects = table(run, "effects")
    assert len(effects) == 2
    assert (effects.loc[effects["effect"].isna(), "reason"] != "").all()
    # Every placebo that was run is in a table, with how near it is; none is of the domain, nor steered itself.
    placebos = table(run, "matched_placebos")
    selection = table(run, "selection").set_index("feature")
    assert set(placebos["feature"]) == {*effects["feature"], 1, 2, 4, 7, 9}
    assert not (
        selection.loc[placebos["placebo"], "is_domain"] | selection.loc[placebos["placebo"], "in_vocabulary"]
    ).any()
    assert not set(placebos["placebo"]) & {1, 2, 4, 7, 9}
    assert (placebos["distance"] >= 0).all()
    assert placebos["placebo_top_tokens"].map(len).eq(10).all()
    joint = table(run, "together_effects")
    assert [list(some) for some in joint["members"]] == [[1, 2], [4, 7, 9]]
    assert set(table(run, "together")["feature"]) == {0, 1}
    assert not (run / "arms" / "treatment" / "together.parquet").exists()
    sides = table(run, "outcome_effects").set_index("outcome")["alternative"]
    assert sides.loc[["similarity"]].eq("less" if change.get("operator") == "ablate" else "greater").all()
    if change.get("operator") == "ablate":
        baselines = table(run, "baselines")
        said = baselines.loc[baselines["condition"] == "mean_difference", "reason"]
        assert (said != "").all()


def test_site_comes_from_gate_and_features(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "run", tmp_path / "run")
    features = table(tmp_path / "run", "features")
    features.loc[features["feature"] == 3, "max_activation"] = math.nan  # it never fired
    features[::-1].to_parquet(tmp_path / "run" / "arms" / "control" / "features.parquet")
    study = opened(prepared)
    site = site_of(RunFolder(tmp_path / "run", study), study.open_arm("control"))
    gate = read_json(tmp_path / "run" / "arms" / "control" / "gate.json")
    assert (site.mean_norm, site.norm_limit) == (gate["mean_norm"], gate["norm_limit"])
    assert site.max_acts is not None
    assert site.max_acts.tolist() == pytest.approx(features["max_activation"].fillna(0.0).tolist())
    assert site.max_acts[3] == 0, "and so has no maximum to be clamped to"
    assert len(site.W_dec) == len(features)


def test_one_prompt_one_feature_one_sample(prepared: Path, tmp_path: Path) -> None:
    run = steered(prepared, tmp_path, prompts=["The river"], max_features=1, placebos=[])
    effects = table(run, "effects")
    assert len(effects) == 1
    assert effects[["effect", "p", "q"]].isna().all(axis=None)
    assert effects["reason"][0] != ""
    every = table(run, "outcome_effects")
    assert (every["reason"] != "").all()
    assert set(every["placebo"]) == {"matched", "shuffled"}  # asked for or not, what decides has its row and reason


@pytest.mark.parametrize("placebos", [[], ["random"]])
def test_search_runs_the_primary_placebo(prepared: Path, tmp_path: Path, placebos: list[str]) -> None:
    several = {"doses": [0.5, 1.0], "search_prompts": ["My heart"], "search_features": 1, "max_features": 1}
    folder = steered(prepared, tmp_path, placebos=placebos, baselines=[], **several)
    response = pd.read_parquet(folder / "steering" / "dose_response.parquet")
    assert set(response["condition"]) == {"steered", *placebos}
    assert len(response) == 3 * 2 * (1 + len(placebos))
    # Another placebo in the test is another search: the curve must be of the placebo that decides.
    for name, same in ((placebos, True), (["matched"], False), ([*placebos, "matched"], False)):
        study = opened(prepared, placebos=name, baselines=[], **several)
        run = RunFolder(folder, study)
        assert run.is_done("dose search", dose_inputs(run)) == same


def test_a_prompt_without_a_position_to_steer_at(prepared: Path, tmp_path: Path, complains: Any) -> None:
    for key, prompts in (("prompts", ["The river", "x"]), ("search_prompts", ["x"])):
        with complains(ConfigError, f"{prompts[-1]!r} is one token", "positions: all", at=f"steering.{key}"):
            run_study(opened(prepared, positions="prompt", **{key: prompts}), tmp_path / "run")
        check_study(opened(prepared, positions="generated", **{key: prompts}))
    assert not (tmp_path / "run").exists(), "refused before anything is computed"
    check_study(opened(prepared, positions="prompt"))
    with complains(ConfigError, "has no tokens", at="steering.prompts"):
        check_study(opened(prepared, prompts=["The river", ""]))


def test_texts_that_would_run_out_of_positions(prepared: Path, complains: Any) -> None:
    check_study(opened(prepared, prompts=["The river"], max_new_tokens=100))  # of 128
    with complains(ConfigError, "but the model takes 128", "fewer max_new_tokens", at="steering.prompts"):
        check_study(opened(prepared, prompts=["The river"], max_new_tokens=127))


def test_bad_requests(prepared: Path) -> None:
    with pytest.raises(ConfigError, match="no feature 999") as caught:
        check_study(opened(prepared, together={"control": [[1, 999]]}))
    assert "steering.together.control" in (caught.value.at or "")
    with pytest.raises(UnknownName, match="valid: control, placebo, treatment"):
        opened(prepared, together={"contrl": [[1, 2]]})
    with pytest.raises(UnknownName, match="outcom") as unknown:
        check_study(opened(prepared, outcome_encoder="glove-wiki-gigaword-10"))
    assert "outcome_encoder" in (unknown.value.at or "")
