"""The cross stage: four cells of a tiny study, what it reuses, how it resumes, and when it says why not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from saeffect.comparison.factorial import CROSSED, CROSSED_COLUMNS, EFFECTS, FACTORIAL_COLUMNS, WHOLE_SAE
from saeffect.errors import ConfigError, UnknownName
from saeffect.io import read_json
from saeffect.lm.finetune import FinetuneConfig
from saeffect.progress import SILENT, Log
from saeffect.study import nulls
from saeffect.study import run as method
from saeffect.study.both_models import both_models_files, read_both_models
from saeffect.study.check import check_study
from saeffect.study.nulls import make_nulls
from saeffect.study.run import run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages import cross
from saeffect.study.study import Study
from tiny_study import BEFORE_STEERING, make_model, make_sae, only_figures

STEERING = {
    "prompts": ["The river", "My doctor said", "In the garden"],
    "samples": 1,
    "max_new_tokens": 3,
    "max_features": 3,
    "doses": [0.5],
    "baselines": [],
}
ALL = ["direct_effect", "activity", "coherence", "reconstruction", "steering"]


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study, run up to the cross stage and with it."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("study") / "tiny"))
    shutil.rmtree(folder / "run")
    (folder / "before").rename(folder / "run")
    study = changed(folder, "study", steering=STEERING, comparison={"n_permutations": 200, "crossed": ALL})
    run_study(study, folder / "run", stages=(*BEFORE_STEERING, "steer", "cross"))
    return folder


def changed(folder: Path, name: str, **changes: Any) -> Study:
    raw = yaml.safe_load((folder / "study.yaml").read_text()) | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return Study.open(path)


def crossed(run: Path, arm: str, quantity: str) -> pd.DataFrame:
    table = pd.read_parquet(run / "arms" / arm / "crossed.parquet")
    return table[table["quantity"] == quantity]


def test_every_quantity_in_every_cell(folder: Path) -> None:
    split = pd.read_parquet(folder / "run" / "comparison" / "factorial.parquet")
    assert list(split.columns) == list(FACTORIAL_COLUMNS)
    assert split[["quantity", "effect"]].to_numpy().tolist() == [[q, e] for q in CROSSED for e in EFFECTS]
    for arm in ("control", "treatment"):
        table = pd.read_parquet(folder / "run" / "arms" / arm / "crossed.parquet")
        assert list(table.columns) == list(CROSSED_COLUMNS)
        tested = set(pd.read_parquet(folder / "run" / "arms" / arm / "effects.parquet")["feature"])
        assert set(table["feature"]) == {*tested, WHOLE_SAE}
        assert set(zip(table["quantity"], table["model"], strict=True)) == {
            (q, m) for q in CROSSED for m in ("control", "treatment")
        }
        assert not table.duplicated(["feature", "model", "quantity"]).any()
    direct = split[split["quantity"] == "direct_effect"].set_index("effect")
    assert direct.loc["model", "n_prompts"] == 3
    assert direct["estimate"].notna().all()


def test_own_cells_are_what_the_other_stages_measured(folder: Path) -> None:
    run = folder / "run"
    for arm in ("control", "treatment"):
        gate = read_json(run / "arms" / arm / "gate.json")
        for quantity in ("explained_variance", "ce_loss_score"):
            rows = crossed(run, arm, quantity).set_index("model")
            assert rows.loc[arm, "value"] == pytest.approx(gate[quantity], abs=0.005)
            assert np.mean(rows.loc[arm, "values"]) == pytest.approx(rows.loc[arm, "value"])
        features = pd.read_parquet(run / "arms" / arm / "features.parquet").set_index("feature")
        coherence = pd.read_parquet(run / "arms" / arm / "coherence.parquet").set_index("feature")["coherence"]
        for quantity, expected in (
            ("density", features["density"]),
            ("activation", features["density"] * features["mean_activation"].fillna(0.0)),
            ("coherence", coherence),
        ):
            rows = crossed(run, arm, quantity)
            rows = rows[rows["model"] == arm].set_index("feature")
            assert rows["value"].to_numpy() == pytest.approx(expected[rows.index].to_numpy(), rel=1e-3, nan_ok=True)


def test_cells_use_the_controls_trials_and_dose(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    norms, cells = [], []
    steer, push = cross.run_trials, cross.direct_effects
    monkeypatch.setattr(
        cross, "run_trials", lambda site, *a, **k: (norms.append(site.mean_norm), steer(site, *a, **k))[1]
    )
    monkeypatch.setattr(
        cross, "direct_effects", lambda site, *a, **k: (cells.append(site.mean_norm), push(site, *a, **k))[1]
    )
    study = Study.open(folder / "study.yaml")
    run_study(study, tmp_path / "run", stages=("cross",), redo=True)
    of_control = read_json(folder / "run" / "arms" / "control" / "gate.json")["mean_norm"]
    assert norms == [of_control] * 3
    assert cells == [of_control] * 3
    run, arm = tmp_path / "run", "control"
    effects = pd.read_parquet(run / "arms" / arm / "effects.parquet").set_index("feature")
    rows = crossed(run, arm, "direct_effect")
    rows = rows[rows["model"] == arm].set_index("feature")
    beyond = effects["direct_effect"] - effects["direct_placebo"]
    assert rows["value"].to_numpy() == pytest.approx(beyond[rows.index].to_numpy(), nan_ok=True)
    passed = crossed(run, arm, "pass_rate")
    passed = passed[passed["model"] == arm].set_index("feature")["value"]
    assert passed.dropna().astype(bool).tolist() == effects.loc[passed.dropna().index, "passed"].tolist()
    for name in ("comparison/factorial", "arms/control/crossed", "arms/treatment/crossed"):
        ours, first = (pd.read_parquet(place / f"{name}.parquet") for place in (run, folder / "run"))
        pd.testing.assert_frame_equal(ours, first)


def test_a_null_is_measured_as_the_treatment_is(folder: Path) -> None:
    study = Study.open(folder / "study.yaml")
    run = RunFolder(folder / "run", study)
    found = cross.null_effects(run, study.open_arm("treatment").lm)
    split = pd.read_parquet(folder / "run" / "comparison" / "factorial.parquet")
    model = split[split["effect"] == "model"].set_index("quantity")
    assert set(found) == set(CROSSED) - {"steering_effect", "pass_rate"}
    for quantity in ("direct_effect", "density", "explained_variance"):
        assert found[quantity] == pytest.approx(model.loc[quantity, "mean_ct"] - model.loc[quantity, "mean_cc"])


def test_kept_adapters_of_nulls_are_crossed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nulls, "_BATCH", 6)
    monkeypatch.setattr(nulls, "_TEXT_LENGTH", 48)
    shutil.copytree(folder / "run", tmp_path / "run")
    recipe = {"model": str(folder / "base"), "text": str(folder / "text.jsonl"), "rank": 2, "steps": 4, "batch_size": 2}
    recipe |= {"context_size": 16, "evaluation_rows": 2, "control_text": str(folder / "other.jsonl"), "held_out": 0.2}
    crossed = {"n_permutations": 200, "crossed": ["activity"]}
    study = changed(folder, "nulls", nulls="./nulls", changes={"rows": 8, "tokens_per_row": 16}, comparison=crossed)
    for k in (1, 2):
        make_nulls(FinetuneConfig.read(recipe, at=""), folder / "nulls", k, study=study, keep_adapters=True)
        cross.run_cross(RunFolder(tmp_path / "run", study), SILENT)
        split = pd.read_parquet(tmp_path / "run" / "comparison" / "factorial.parquet")
        of_model = split[split["effect"] == "model"].set_index("quantity")
        assert (of_model["n_nulls"] == k).all(), "one more null, one more pass"
        assert of_model.loc["density", "null_p"] in (1 / (k + 1), 2 / (k + 1), 1.0)
        moved = (of_model["mean_ct"] - of_model["mean_cc"]).abs()
        assert (of_model["null_mean"].abs() < moved).all(), "a few steps of a LoRA moves less than another model"


def test_a_stopped_stage_resumes_with_equal_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    study = changed(folder, "cheap", comparison={"n_permutations": 200, "crossed": ["reconstruction"]})
    run_study(study, tmp_path / "run", stages=("cross",))
    whole = pd.read_parquet(tmp_path / "run" / "comparison" / "factorial.parquet")
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(folder / "run", tmp_path / "run")
    calls: list[str] = []
    measure = cross.spliced_losses

    def third_fails(*arguments: Any, **more: Any) -> Any:
        calls.append("")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **more)

    monkeypatch.setattr(cross, "spliced_losses", third_fails)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "run", stages=("cross",))
    run_study(study, tmp_path / "run", stages=("cross",))
    assert len(calls) == 5, "two cells are kept, the third is begun again"
    pd.testing.assert_frame_equal(whole, pd.read_parquet(tmp_path / "run" / "comparison" / "factorial.parquet"))
    assert set(whole["quantity"]) == {"explained_variance", "ce_loss_score"}


def test_models_of_other_width_are_not_crossed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    make_model(folder / "wide", 2, hidden=64)
    make_sae(folder / "saes" / "wide", 4, d_in=64)
    arms = yaml.safe_load((folder / "study.yaml").read_text())["arms"]
    arms["treatment"] |= {"model": "./wide", "sae": "./saes/wide"}
    arms.pop("placebo")
    study = changed(folder, "wide", arms=arms, steering=None, comparison={"crossed": ["activity", "coherence"]})
    run_study(
        study,
        tmp_path / "wide",
        stages=(*BEFORE_STEERING, "cross"),
    )
    split = pd.read_parquet(tmp_path / "wide" / "comparison" / "factorial.parquet")
    assert set(split["quantity"]) == {"density", "activation", "coherence"}
    assert split["estimate"].isna().all()
    assert split["reason"].str.contains("differ in width").all()
    assert not (tmp_path / "wide" / "arms" / "control" / "crossed.parquet").exists()


def test_models_of_other_depth_end_their_study(folder: Path, tmp_path: Path) -> None:
    """The control's SAE reads a block that the treatment's model lacks: compared, but nothing is read on both."""
    make_model(folder / "shallow", 2, layers=2)
    make_sae(folder / "saes" / "deep", 4, hook_name="blocks.2.hook_resid_pre")
    make_sae(folder / "saes" / "shallow", 5)
    arms = yaml.safe_load((folder / "study.yaml").read_text())["arms"]
    arms["control"]["sae"] = "./saes/deep"
    arms["treatment"] |= {"model": "./shallow", "sae": "./saes/shallow"}
    arms.pop("placebo")
    lines: list[str] = []
    study = changed(folder, "depth", arms=arms)
    assert any("width or depth (control 32 × 3, treatment 32 × 2)" in line for line in check_study(study).lines)
    with only_figures():
        run_study(study, tmp_path / "run", log=Log(lines.append))
    depth = "the models differ in depth (control's SAE reads blocks.2.hook_resid_pre, and the model of treatment has 2"
    assert any(depth in line and "no feature of one" in line for line in lines)
    assert not (tmp_path / "run" / "comparison" / "cross_activity.parquet").exists()
    split = pd.read_parquet(tmp_path / "run" / "comparison" / "factorial.parquet")
    assert split["estimate"].isna().all()
    assert split["reason"].str.startswith(depth).all()
    assert "differ in depth" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    read_both_models(tmp_path / "run")
    reasons = {arm: pd.read_parquet(both_models_files(tmp_path / "run", arm, other)[0])["reason"].unique().tolist()
               for arm, other in (("control", "treatment"), ("treatment", "control"))}  # fmt: skip
    assert reasons == {"control": [f"{depth} blocks)"], "treatment": [""]}
    arms = {"control": arms["treatment"] | {"role": "control"}, "treatment": arms["control"] | {"role": "treatment"}}
    assert "the model of control has 2 blocks" in cross._obstacle(changed(folder, "reverse", arms=arms))


def test_only_where_it_is_asked_for(folder: Path, complains: Any) -> None:
    study = changed(folder, "without", comparison={})
    assert "cross" not in [step.stage for step in method._method(study)]
    with complains(UnknownName, "activitie", "valid: activity, coherence", at="comparison.crossed"):
        changed(folder, "wrong", comparison={"crossed": ["activitie"]})
    with complains(ConfigError, "direct_effect needs the section steering"):
        changed(folder, "unsteered", steering=None, comparison={"crossed": ["direct_effect"]})
