"""Features of a finished run as files for other programs, from the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from command_line import call
from saeffect.errors import BadFile, ConfigError, EmptySelection, NotFound
from saeffect.steering import SteeringPlan
from saeffect.steering.actions import ActionRow, actions_of
from saeffect.study.export import FORMATS, export_features, feature_list, group_of, neuronpedia_list, vector_of
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.dose_search import site_of
from saeffect.study.study import Study


@pytest.fixture(scope="module")
def run(site_run: Path) -> RunFolder:
    return RunFolder(site_run, Study.open(site_run / "study.yaml"))


@pytest.mark.parametrize("features", [(5,), (3, 9, 5)])
def test_the_vector_is_what_steering_adds(run: RunFolder, features: tuple[int, ...]) -> None:
    found = vector_of(run, "treatment", features, 0.7)
    table = feature_list(run, "treatment", features).head(1)
    table["members"] = [list(features)]
    plan = SteeringPlan(prompts=("a",), doses=(0.7,), placebos=())
    actions = actions_of(site_of(run, run.study.open_arm("treatment")), table, plan)
    operator = actions.operator([ActionRow(int(table["feature"].iloc[0]), "steered", 0.7, (0, 0))])
    assert torch.allclose(found.vector, operator.vectors[0], atol=1e-6)  # type: ignore[attr-defined]
    assert found.norm == pytest.approx(0.7 * found.mean_norm) and found.features == features
    assert found.hook == "blocks.1.hook_resid_pre"


def test_groups(run: RunFolder) -> None:
    selection = run.read_table(run.arm("control", "selection.parquet"))
    assert group_of(run, "control", "domain") == selection.loc[selection["is_domain"], "feature"].tolist()
    assert (
        group_of(run, "control", "steered") == run.read_table(run.arm("control", "effects.parquet"))["feature"].tolist()
    )
    with pytest.raises(ConfigError, match="valid: changed:1, domain, steered"):
        group_of(run, "control", "all")
    with pytest.raises((ConfigError, NotFound, EmptySelection)):
        group_of(run, "treatment", "changed:1")


@pytest.mark.parametrize("name", ["gate.json", "selection.parquet"])
def test_a_run_that_was_changed_is_not_exported(run: RunFolder, tmp_path: Path, name: str) -> None:
    changed = RunFolder(Path(shutil.copytree(run.folder, tmp_path / "run")), run.study)
    (changed.folder / "arms" / "control" / name).write_text("[1]")
    for kind, found in FORMATS.items():
        with pytest.raises(BadFile, match=f"{name} is not as the run wrote it"):
            export_features(changed, "control", [1], tmp_path / f"x{found.suffix}", kind=kind)
    with pytest.raises(BadFile, match="is not as the run wrote it"):
        group_of(changed, "control", "domain")


def test_the_list_has_the_keys_of_neuronpedia(run: RunFolder) -> None:
    found = neuronpedia_list(run, "control", [2, 7])
    assert [row["index"] for row in found["features"]] == ["2", "7"] and found["isPublicSource"] is False
    row = found["features"][0]
    assert row["modelId"] == "base" and row["layer"] == "1-resid-pre-control"
    assert len(row["pos_str"]) == len(row["pos_values"]) == 10
    for example in (example for row in found["features"] for example in row["activations"]):
        assert example["maxValue"] == max(example["values"]) == example["values"][example["maxValueTokenIndex"]]
    json.dumps(found, allow_nan=False)


def test_the_command_writes_every_format(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for found in FORMATS.values():
        out = tmp_path / f"out{found.suffix}"
        wanted = ["--arm", "treatment", "--feature", "4", "--feature", "8", "--out", str(out)]
        code = call(["export", str(run.folder), *wanted])
        # The tiny SAE reads what enters block 1, which llama.cpp does not steer.
        assert code == (2 if found.name == "gguf" else 0) and out.exists() == (found.name != "gguf")
    assert "2 features of treatment" in capsys.readouterr().out
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["feature"] for row in rows] == ["4", "8"] and {row["arm"] for row in rows} == {"treatment"}
    known = feature_list(run, "treatment", [4])["top_tokens"][0]
    assert json.loads(rows[0]["top_tokens"]) == list(known)
    assert all(isinstance(i, int) for i in json.loads(rows[0]["top_token_ids"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x.txt", "--feature", "1"], "no format"),
        (["--out", "x.csv"], "features or a group"),
        (["--out", "x.csv", "--feature", "1", "--group", "domain"], "features or a group"),
        (["--out", "x.csv", "--feature", "100000"], "no feature 100000"),
        (["--out", "x.csv", "--feature", "1", "--arm", "nobody"], "no arm 'nobody'"),
        (["--out", "x.csv", "--feature", "1", "--dose", "1"], "no dose"),
        (["--out", "x.safetensors", "--feature", "1", "--dose", "0"], "other than 0"),
    ],
)
def test_wrong_input_writes_nothing(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    out = str(tmp_path / arguments[1])
    assert call(["export", str(run.folder), "--out", out, *arguments[2:]]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_label_is_no_formula(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saeffect.study import export

    table = feature_list(run, "control", [1])
    table["label"] = ["=HYPERLINK(1)"]
    monkeypatch.setattr(export, "feature_list", lambda *_: table)
    export_features(run, "control", [1], tmp_path / "a.csv", kind="csv")
    assert "'=HYPERLINK(1)" in (tmp_path / "a.csv").read_text(encoding="utf-8")
