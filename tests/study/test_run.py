from __future__ import annotations

import hashlib
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import yaml

from saeffect.errors import ConfigError, InUse
from saeffect.io import read_json, sole_writer
from saeffect.progress import Log
from saeffect.study.check import check_study
from saeffect.study.run import STAGES, _method, run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study

DOCS = Path(__file__).parents[2] / "docs"


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, without_figures: None) -> tuple[Path, Path]:
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("study") / "tiny"))
    run_study(Study.open(folder / "study.yaml"), folder / "run")  # the report names the folder
    return folder / "study.yaml", folder / "run"


def test_files_page_lists_every_table_and_column(finished: tuple[Path, Path]) -> None:
    page = (DOCS / "files.md").read_text(encoding="utf-8")
    for path in sorted(finished[1].rglob("*.parquet")):
        assert f"`{path.name}`" in page, path
        line = next(line for line in page.splitlines() if line.startswith(f"| `{path.name}`"))
        missing = [column for column in pd.read_parquet(path) if f"`{column}`" not in line]
        own = {"design.parquet", "together.parquet"}  # a column an arm
        assert not missing or path.name in own or "as " in line, f"{path.name}: {missing}"
    for path in [p for p in finished[1].rglob("*.json") if p.parent.name != "tables"]:
        assert path.name in page, path


@pytest.mark.parametrize("name", ["files.md", "tutorial.md"])
def test_the_page_s_python_runs(
    name: str, finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for run in ("mine", "smollm2-medical"):
        Path("runs", run).symlink_to(finished[1])
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    assert blocks and len(names["effects"]) > 0


def test_every_file_of_the_design_is_there(finished: tuple[Path, Path]) -> None:
    names = set(tree(finished[1]))
    for arm in ("control", "treatment", "placebo"):
        for file in (
            "features",
            "examples",
            "coherence",
            "selection",
            "interventions",
            "direct_effects",
            "effects",
            "outcome_effects",
            "baselines",
            "baseline_effects",
        ):
            assert f"arms/{arm}/{file}.parquet" in names
    assert {"steering/dose.json", "steering/dose_search.parquet", "steering/dose_response.parquet"} <= names
    assert {"study.yaml", "manifest.json", "report.html", "comparison/answer.json"} <= names
    assert {"tables/table1.csv", "tables/table1.json", "tables/table2.csv"} <= names
    assert not any(n.startswith("partial/") or n.split("/")[-1].startswith(".") for n in names)


def test_second_run_skips_every_stage(finished: tuple[Path, Path]) -> None:
    path, run = finished
    before = tree(run)
    lines: list[str] = []
    run_study(Study.open(path), run, log=Log(lines.append))
    stages = [line for line in lines if line.startswith("  ")]
    assert len(stages) == 20
    assert all(line.endswith("skipped") for line in stages)
    assert tree(run) == before


def test_killed_run_resumes_to_same_numbers(finished: tuple[Path, Path], tmp_path: Path) -> None:
    path, run = finished

    class Killed(BaseException):
        pass

    def killer(when: str):
        def stop(report: object) -> None:
            if str(report).startswith(when):
                raise Killed

        return Log(stop, stop)

    stages = STAGES[: STAGES.index("report")]
    for when in ("features treatment:", "steer treatment:", "  compare"):
        with pytest.raises(Killed):
            run_study(Study.open(path), tmp_path / "run", stages=stages, log=killer(when))
    run_study(Study.open(path), tmp_path / "run", stages=stages)
    first, second = tree(run), tree(tmp_path / "run")
    del second["manifest.json"]
    assert second.items() <= first.items()
    assert not [name for name in first.keys() - second.keys() if name.startswith(("arms/", "comparison/", "steering/"))]


def test_pieces_stay_until_the_manifest_is_saved(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = finished
    shutil.copytree(run, tmp_path / "run")
    again = partial(run_study, Study.open(path), tmp_path / "run", stages=("steer",))
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again(redo=True)
    # The dose search came first, so it was the one that was stopped; now an arm.
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_remove_outdated", lambda self, key, outputs: key == "steer placebo" and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again(redo=True)
    kept = sorted((tmp_path / "run" / "partial" / "steer-placebo").iterdir())
    assert kept
    # One of them is damaged: it alone is made again.
    damaged = bytearray(kept[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept[0].write_bytes(damaged)
    (tmp_path / "run" / "arms" / "placebo" / "effects.parquet").unlink()
    lines: list[str] = []
    again(log=Log(lines.append))
    assert sum("is damaged, so what it holds is made again" in line for line in lines) == 1
    first, second = tree(run), tree(tmp_path / "run")
    del first["manifest.json"], second["manifest.json"]
    assert first == second


def test_second_run_in_one_directory_is_refused(finished: tuple[Path, Path]) -> None:
    path, run = finished
    before = tree(run)
    with sole_writer(run), pytest.raises(InUse, match="another process"):
        run_study(Study.open(path), run, stages=["report"], redo=True)
    assert tree(run) == before


def test_changed_threshold_redoes_dependent_stages(finished: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(finished[0].parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / finished[0].name
    path.write_text(path.read_text().replace("min_matches: 1", "min_matches: 2"), encoding="utf-8")
    lines: list[str] = []
    study = Study.open(path)
    run = run_study(study, tmp_path / "run", stages=("gate", "features", "coherence", "select"), log=Log(lines.append))
    skipped = {line.strip().split(":")[0] for line in lines if line.endswith("skipped")}
    assert {"gate control", "features control", "coherence control"} <= skipped
    assert "select" not in skipped
    done = {step.key for step in _method(study) if run.is_done(step.key, step.read_inputs(run))}
    assert "select" in done
    assert not {"dose search", "steer control", "compare", "report"} & done


def test_damaged_table_is_made_again(finished: tuple[Path, Path], tmp_path: Path) -> None:
    path, run = finished
    table = run / "arms" / "control" / "coherence.parquet"
    good = table.read_bytes()
    table.write_bytes(good[:100])
    lines: list[str] = []
    run_study(Study.open(path), run, log=Log(lines.append))
    assert table.read_bytes() == good
    assert sum(not line.endswith("skipped") for line in lines if line.startswith("  ")) == 1


def test_features_table_columns(finished: tuple[Path, Path]) -> None:
    features = pd.read_parquet(finished[1] / "arms" / "control" / "features.parquet")
    assert {
        "feature",
        "top_tokens",
        "top_weights",
        "decoder_norm",
        "density",
        "mean_activation",
        "max_activation",
    } <= set(features.columns)
    assert {"projection_mean", "projection_std", "projection_skewness", "projection_kurtosis"} <= set(features.columns)
    assert features["top_tokens"].map(len).eq(10).all()
    assert not features["top_tokens"].explode().eq("<|endoftext|>").any()


def test_manifest_records_versions_and_seed(finished: tuple[Path, Path]) -> None:
    manifest = read_json(finished[1] / "manifest.json")
    assert manifest["seed"] == 0
    assert {"torch", "saeffect", "python"} <= set(manifest["versions"])
    assert set(manifest["arms"]) == {"control", "treatment", "placebo"}
    assert all(len(stage["fingerprint"]) == 64 for stage in manifest["stages"].values())


@pytest.fixture(scope="module")
def unsteered_once(finished: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unsteered") / "study"
    shutil.copytree(finished[0].parent, folder)
    config = yaml.safe_load((folder / "study.yaml").read_text()) | {"steering": None}
    (folder / "study.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    run_study(Study.open(folder / "study.yaml"), folder / "run")
    return folder


@pytest.fixture
def unsteered(unsteered_once: Path, tmp_path: Path) -> Path:
    """A folder with the study without steering, and its finished run in place of one with steering."""
    return Path(shutil.copytree(unsteered_once, tmp_path / "study"))


def test_stage_refuses_results_of_another_study(unsteered: Path) -> None:
    path, run = unsteered / "study.yaml", unsteered / "run"
    with pytest.raises(ConfigError, match="gate"):
        run_study(Study.open(path), unsteered / "new", stages=("compare",))
    before = tree(run)
    path.write_text(path.read_text().replace("min_matches: 1", "min_matches: 2"), encoding="utf-8")
    with pytest.raises(ConfigError, match="select") as caught:
        run_study(Study.open(path), run, stages=("compare",))
    assert "saeffect select" in (caught.value.fix or "")
    assert tree(run) == before
    for stages in (("select",), ("match", "changes", "put-back"), ("compare",)):
        run_study(Study.open(path), run, stages=stages)


def test_without_steering_earlier_interventions_are_unread(unsteered: Path) -> None:
    assert (unsteered / "run" / "arms" / "control" / "effects.parquet").exists()
    contrasts = pd.read_parquet(unsteered / "run" / "comparison" / "contrasts.parquet")
    assert contrasts.loc[contrasts["quantity"] == "pass_rate", "estimate"].isna().all()


def test_sae_metadata_reaches_design_check(unsteered: Path) -> None:
    cfg = unsteered / "saes" / "treatment" / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"training_tokens": 1', '"training_tokens": 2'), encoding="utf-8")
    design = check_study(Study.open(unsteered / "study.yaml")).design.set_index("field")
    assert design.loc["training_tokens", "status"] == "flaw"


def test_verdicts_select_and_must_cover_every_arm(unsteered: Path) -> None:
    path, run = unsteered / "study.yaml", unsteered / "run"
    lines = ["feature,arm,rater,verdict,label,note"]
    for arm in ("control", "treatment", "placebo"):
        table = pd.read_parquet(run / "arms" / arm / "selection.parquet")
        lines += [f"{table.loc[table['in_vocabulary'], 'feature'].iloc[0]},{arm},ann,yes,,"]
    verdicts = unsteered / "verdicts.csv"
    verdicts.write_text("\n".join(lines[:-1]), encoding="utf-8")
    changed = path.read_text().replace("min_matches: 1", "min_matches: 1\n  verdicts: ./verdicts.csv")
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(ConfigError, match="placebo"):
        run_study(Study.open(path), run)
    verdicts.write_text("\n".join(lines), encoding="utf-8")
    run_study(Study.open(path), run, stages=("select", "match", "changes", "put-back", "compare"))
    table = pd.read_parquet(run / "comparison" / "table1.parquet").set_index("arm")
    assert (table["domain_features"] == 1).all()
    assert (table["in_vocabulary"] > 1).all()


def test_steer_tests_against_both_placebos(finished: tuple[Path, Path]) -> None:
    run = finished[1]
    arm = run / "arms" / "control"
    trials = pd.read_parquet(arm / "interventions.parquet")
    assert set(trials["condition"]) == {"unsteered", "steered", "random", "matched"}
    measured = {"keyword_score", "off_list", "similarity_shuffled", "shuffled_feature", "perplexity", "distinct2"}
    assert measured <= set(trials.columns)
    assert (trials["shuffled_feature"] != trials["feature"]).all()
    effects = pd.read_parquet(arm / "effects.parquet")
    assert (effects["placebo"] == "matched").all()
    assert effects["declared"].all()
    every = pd.read_parquet(arm / "outcome_effects.parquet")
    assert set(every["outcome"]) >= {"similarity", "off_list", "keyword_score", "direct_effect", "kl", "perplexity"}
    assert set(every.loc[every["declared"], "outcome"]) == {"similarity", "off_list"}
    assert set(every["placebo"]) == {"matched", "random", "shuffled"}
    primary = every[every["primary"]].set_index("feature")
    pd.testing.assert_series_equal(primary["effect"], effects.set_index("feature")["effect"])
    assert (every.loc[every["effect"].isna(), "reason"] != "").all()


def test_every_arm_has_baselines_and_a_dose_response(finished: tuple[Path, Path]) -> None:
    run = finished[1]
    baselines = pd.read_parquet(run / "arms" / "treatment" / "baselines.parquet")
    assert set(baselines["condition"]) == {"prompt", "mean_difference"}
    assert baselines["feature"].nunique() == 2
    against = pd.read_parquet(run / "arms" / "treatment" / "baseline_effects.parquet")
    assert set(against["baseline"]) == {"prompt", "mean_difference"}
    response = pd.read_parquet(run / "steering" / "dose_response.parquet")
    assert set(response["arm"]) == {"control", "treatment", "placebo"}
    assert set(response["dose"]) == {0.5, 1.0}
    # A placebo for every feature at every dose, none of which is anybody's best.
    at_each = response.groupby(["arm", "feature", "dose"])["condition"].agg(tuple)
    assert (at_each == ("steered", "matched")).all()
    assert not response.loc[response["condition"] == "matched", "best"].any()
    assert response["direct_effect"].notna().all()
    assert response.groupby(["arm", "feature"])["best"].sum().max() == 1
    dose = read_json(run / "steering" / "dose.json")
    assert set(dose["best"]) == {"control", "treatment", "placebo"}
    search = pd.read_parquet(run / "steering" / "dose_search.parquet")
    assert set(search["arm"]) == {"control", "treatment"}
    assert len(search) == 2 * 2 * 2
    assert set(search.loc[search["chosen"], "condition"]) == {"steered"}
    own = search[search["condition"] == "steered"].groupby("dose")["score"].mean()
    assert dose["dose"] == own.idxmax()


def test_without_gain_no_feature_is_steered(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = finished
    run = tmp_path / "run"
    shutil.copytree(done, run)
    monkeypatch.setattr("saeffect.study.stages.dose_search.best_dose", lambda table: None)
    lines: list[str] = []
    run_study(Study.open(path), run, stages=["steer"], redo=True, log=Log(lines.append))
    run_study(Study.open(path), run, log=Log(lines.append))
    dose = read_json(run / "steering" / "dose.json")
    assert dose["dose"] is None
    assert dose["note"].startswith("no dose of the search made texts more similar to the features' top tokens")
    assert f"  warning: no feature is steered: {dose['note']}" in lines
    assert len(pd.read_parquet(run / "steering" / "dose_search.parquet").query("not chosen")) == 8
    assert not list(run.glob("arms/*/interventions.parquet")) + list(run.glob("arms/*/effects.parquet"))
    contrasts = pd.read_parquet(run / "comparison" / "contrasts.parquet").set_index(["quantity", "comparison"])
    assert contrasts.loc[("pass_rate", "fine-tuning"), "reason"] == dose["note"]
    assert math.isfinite(contrasts.loc[("domain_share", "fine-tuning"), "estimate"])  # the rest of the study stands
    answer = read_json(run / "comparison" / "answer.json")
    assert any(f"No feature was tested by steering ({dose['note']})" in one for one in answer["sentences"])
    assert any(dose["note"] in one for one in answer["caveats"])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "No dose was chosen" in page
    assert "none: the search found no gain, so no feature was steered" in page
