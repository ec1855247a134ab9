from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from saeffect.comparison import MatchTables
from saeffect.diffing import correspondence
from saeffect.diffing.methods import METHODS, Method
from saeffect.diffing.pair import ModelPair
from saeffect.errors import ConfigError, IncompatibleSae, UnknownName
from saeffect.features.activity import ActivityAccumulator
from saeffect.io import write_json
from saeffect.progress import Log
from saeffect.sae.formats import load_sae, save_compact
from saeffect.study.check import check_study
from saeffect.study.run import run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.compare import read_comparison, run_compare
from saeffect.study.stages.features import open_seed, seed_folders
from saeffect.study.stages.match import read_matches
from saeffect.study.study import Study
from tiny_study import make_sae, make_study


def change_arms(path: Path, **changes: dict[str, Any]) -> Path:
    config = yaml.safe_load(path.read_text())
    for arm, keys in changes.items():
        config["arms"][arm] |= keys
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def compact(folder: Path, into: Path) -> None:
    sae = load_sae(folder)
    activity = ActivityAccumulator(sae.cfg.d_sae, ("text",))
    generator = np.random.default_rng(0)
    statistics = activity.result().assign(density=generator.random(sae.cfg.d_sae) / 10, mean_activation=1.0)
    save_compact(sae, statistics.assign(max_activation=2.0), folder, into)


def stages(lines: list[str]) -> dict[str, bool]:
    """Stage -> whether it was skipped."""
    said = [line.strip() for line in lines if line.startswith("  ") and ": " in line]
    return {line.split(":")[0]: line.endswith("skipped") for line in said}


pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def seeded(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, without_figures: None) -> tuple[Study, RunFolder]:
    """Control with a whole and a compact further SAE, treatment with a whole one."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("seeded") / "tiny"))
    path = folder / "study.yaml"
    for seed, name in enumerate(("control-2", "control-3", "treatment-2"), start=11):
        make_sae(folder / "saes" / name, seed)
    compact(folder / "saes" / "control-3", folder / "saes" / "compact")
    change_arms(
        path,
        control={"more_saes": ["./saes/control-2", "./saes/compact"]},
        treatment={"more_saes": ["./saes/treatment-2"]},
    )
    return Study.open(path), run_study(Study.open(path), folder / "run")


def test_every_table_is_written_and_read_back(seeded) -> None:
    comparison = read_comparison(seeded[1])
    for name in MatchTables.names():
        table = getattr(comparison.matches, name)
        assert (len(table.columns) == 0) == (name == "stagewise"), name
    for name in ("calibration", "power", "regression", "partial_residuals"):
        assert len(getattr(comparison, name).columns), name
    assert (seeded[1].folder / "comparison" / "fates_control.parquet").is_file()
    assert not (seeded[1].folder / "comparison" / "stagewise.parquet").exists()


def test_seeds_have_the_columns_of_an_arm(seeded) -> None:
    _, run = seeded
    seeds = pd.read_parquet(run.arm("control", "seeds.parquet"))
    assert seeds.groupby("sae").size().to_dict() == {"control-2": 96, "compact": 96}
    assert {"top_tokens", "coherence", "is_domain", "matches", "density", "decoder_norm"} <= set(seeds.columns)
    assert seeds["top_tokens"].map(len).eq(10).all()


def matched(tiny_run: Path, path: Path) -> RunFolder:
    """A study run up to `match`; what it shares with `tiny_run` is taken from there."""
    run = Path(shutil.copytree(tiny_run / "before", path.parent / "run"))
    return run_study(Study.open(path), run, stages=("gate", "features", "coherence", "select", "match"))


def test_seed_sae_measured_like_arms_sae(tiny_run, tmp_path) -> None:
    """An arm's own SAE, listed under another folder as a further one, must get the same numbers."""
    path = make_study(tmp_path, steering=None)
    make_sae(tmp_path / "saes" / "copy", 0)
    run = matched(tiny_run, change_arms(path, control={"more_saes": ["./saes/copy"]}))
    own = pd.read_parquet(run.arm("control", "features.parquet"))
    copy = pd.read_parquet(run.arm("control", "seeds.parquet"))
    for column in ("density", "mean_activation", "max_activation", "decoder_norm"):
        np.testing.assert_allclose(copy[column], own[column], rtol=1e-6)
    assert copy["top_tokens"].map(list).tolist() == own["top_tokens"].map(list).tolist()
    scores = pd.read_parquet(run.arm("control", "coherence.parquet"))
    np.testing.assert_allclose(copy["coherence"], scores["coherence"], rtol=1e-9)
    chosen = pd.read_parquet(run.arm("control", "selection.parquet"))
    assert copy["is_domain"].tolist() == chosen["is_domain"].tolist()


def test_contrasts_over_seeds(seeded) -> None:
    contrasts = read_comparison(seeded[1]).contrasts
    row = contrasts[(contrasts["quantity"] == "domain_share_seeds") & (contrasts["comparison"] == "all seeds")].iloc[0]
    assert (row["saes_a"], row["saes_b"]) == (4, 2)
    assert row["remark"] == ""
    assert row["declared"]
    shares = []
    for arm in ("control", "placebo"):
        own = pd.read_parquet(seeded[1].arm(arm, "selection.parquet"))
        shares.append(own["is_domain"].mean())
    shares += list(pd.read_parquet(seeded[1].arm("control", "seeds.parquet")).groupby("sae")["is_domain"].mean())
    assert row["value_a"] == pytest.approx(np.mean(shares))
    plain = contrasts[(contrasts["quantity"] == "domain_share") & (contrasts["comparison"] == "fine-tuning")].iloc[0]
    assert "does not hold the noise of SAE training" in plain["remark"]


def test_fates_are_judged_by_three_other_seeds(seeded) -> None:
    matches = read_matches(seeded[1])
    assert set(matches.fates_control["measure"]) == {"decoder cosine", "activation correlation"}
    assert len(matches.fates_control) == 2 * 96
    fates = set(matches.fates_control["fate"])
    assert fates <= {"kept", "moved", "gone", "absorbed", "unclear", ""}
    null = matches.fates_null
    # decoders: control, control-2, compact, placebo; activations: the compact one has none
    pairs = null[null["is_null"]].groupby("measure")["stand_in"].size()
    assert pairs.to_dict() == {"decoder cosine": 2 * 4 * 3, "activation correlation": 2 * 3 * 2}
    assert (null["called"] <= null["tested"]).all()
    assert matches.fates_control["other_seeds_similarity"].notna().any()


def test_calibration_counts_all_control_sae_pairs(seeded) -> None:
    table = read_comparison(seeded[1]).calibration.set_index(["test", "rule"])
    assert table.loc[("domain_share", "the interval excludes zero"), "tests"] == 4 * 3 / 2
    assert table.loc[("domain_share", "more than SAE noise"), "tests"] == 4  # each in turn
    assert table.loc[("pass_rate", "the interval excludes zero"), "tests"] <= 1  # only two were steered
    assert table.loc[("pass_rate", "more than SAE noise"), "verdict"] == "cannot be judged"
    assert table.loc[("cross-activity", "q at most alpha"), "findings"] == 0


def test_study_options_reach_compare(seeded, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = seeded[1], {}

    def spy(arms, **options):
        seen.update(options)
        raise InterruptedError

    monkeypatch.setattr("saeffect.study.stages.compare.compare", spy)
    with pytest.raises(InterruptedError):
        run_compare(run)
    config = run.study.config
    wanted = config.comparison.model_dump(include={"tests", "alpha", "n_boot", "n_permutations"})
    wanted |= {"min_matches": config.selection.min_matches, "seed": config.seed}
    assert {name: value for name, value in seen.items() if name != "matches"} == wanted
    assert not seen["matches"].fates_control.empty


def test_the_answer_speaks_of_all_of_it(seeded) -> None:
    answer = read_comparison(seeded[1]).answer
    everything = " ".join(answer["sentences"])
    for words in (
        "Matched by what they write",
        "Matched by when they fire",
        "features that fire,",
        "four chances in five",
    ):
        assert words in everything, words
    assert "false alarms" in everything


def test_new_seed_redoes_only_dependent_stages(seeded, tmp_path) -> None:
    study, run = seeded
    lines: list[str] = []
    run_study(Study.open(study.source), run.folder, log=Log(lines.append))
    assert all(stages(lines).values())
    config = yaml.safe_load(study.source.read_text())
    config["arms"]["treatment"]["more_saes"] = []
    changed = study.source.with_name("fewer.yaml")
    changed.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    shutil.copytree(run.folder, tmp_path / "run")
    lines.clear()
    run_study(Study.open(changed), tmp_path / "run", log=Log(lines.append))
    skipped = stages(lines)
    assert skipped["gate treatment"]
    assert skipped["features treatment"]
    assert skipped["seeds control"]
    assert skipped["steer treatment"]
    assert not skipped["match"]
    assert not skipped["compare"]


def residual_difference(pair: ModelPair) -> dict[str, pd.DataFrame]:
    """A diffing method from outside the package: how far the mean residual moved along each feature."""
    means = [
        torch.cat([batch.x[batch.mask].float() for batch in pair.residuals(view.name)]).mean(dim=0)
        for view in (pair.control, pair.treatment)
    ]
    change = (pair.control.W_dec @ (means[1] - means[0])).numpy()
    table = pd.DataFrame(
        {"feature": range(len(change)), "change": change, "p": np.nan, "q": np.nan, "reason": "no null"}
    )
    return {"residual_difference": table}


def test_same_model_twice_differs_in_nothing(tiny_run, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    further = Method(residual_difference, ("residual_difference",), interval=None)
    monkeypatch.setitem(METHODS, "residual_difference", further)
    path = change_arms(make_study(tmp_path, steering=None), treatment={"model": "./base"})
    matches = read_matches(matched(tiny_run, path))
    assert (matches.cross_activity["difference"] == 0).all()
    assert not (matches.cross_activity["q"] <= 0.05).any()
    assert (matches.further["residual_difference"]["change"] == 0).all()


def test_without_a_placebo_nothing_is_called(tiny_run, tmp_path) -> None:
    path = make_study(tmp_path, steering=None)
    config = yaml.safe_load(path.read_text())
    del config["arms"]["placebo"]
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    matched(tiny_run, path)
    run = run_study(Study.open(path), tmp_path / "run", stages=("changes", "put-back", "compare"))
    comparison = read_comparison(run)
    assert set(comparison.matches.fates_control["fate"]) == {""}
    assert comparison.matches.fates_control["reason"].str.contains("no placebo arm").any()
    assert comparison.matches.fate_counts["called"].isna().all()
    calibrated = comparison.calibration[comparison.calibration["test"] != "cross-activity"]
    assert (calibrated["verdict"] == "cannot be judged").all()
    assert (calibrated["reason"] != "").all()
    said = " ".join(comparison.answer["sentences"])
    assert "kept, moved, gone or new: there is no placebo arm" in said
    assert "It cannot be said how often" in said


def test_a_warm_start_is_noticed(tiny_run, tmp_path) -> None:
    path = make_study(tmp_path, steering=None)
    for arm in ("treatment", "placebo"):
        write_json(tmp_path / "saes" / arm / "training.json", {"recipe": {"sae": {"init_from": "control"}}})
    turned = read_matches(matched(tiny_run, path)).stagewise
    assert len(turned) == 96
    assert turned["null_rotation"].notna().all()


def test_names_of_seeds_are_unlike_all_others(tmp_path) -> None:
    path = make_study(tmp_path)
    for place in ("a/control", "b/twice", "c/twice"):
        make_sae(tmp_path / place, 5)
    change_arms(path, control={"more_saes": ["./a/control", "./b/twice", "./c/twice"]})
    assert list(seed_folders(Study.open(path), "control")) == [
        "control/control",
        "control/twice",
        "control/twice (3)",
    ]


def test_compact_seed_has_decoder_and_statistics(tmp_path) -> None:
    make_sae(tmp_path / "whole", 3)
    compact(tmp_path / "whole", tmp_path / "small")
    one = open_seed("small", tmp_path / "small")
    assert one.sae is None
    assert one.statistics is not None
    assert set(one.statistics.columns) == {"feature", "density", "mean_activation", "max_activation"}
    np.testing.assert_allclose(one.W_dec.numpy(), open_seed("whole", tmp_path / "whole").W_dec.numpy(), atol=0.01)


def test_seed_of_another_kind_is_refused(tmp_path) -> None:
    path = make_study(tmp_path)
    make_sae(tmp_path / "saes" / "control", 0, prepend_bos=False)
    make_sae(tmp_path / "saes" / "wide", 3, d_sae=128)
    make_sae(tmp_path / "saes" / "begun", 3, prepend_bos=True)
    for name, said in (("wide", "d_sae=128, but the arm's own has 96"), ("begun", "prepend_bos=True, but the arm's")):
        change_arms(path, control={"more_saes": [f"./saes/{name}"]})
        with pytest.raises(IncompatibleSae, match=said) as caught:
            check_study(Study.open(path))
        assert "arms.control.more_saes.0" in str(caught.value.at)


def test_repeated_seed_and_unknown_test_are_refused(tmp_path) -> None:
    path = change_arms(make_study(tmp_path), control={"more_saes": ["./saes/control"]})
    with pytest.raises(ConfigError, match="is there twice"):
        Study.open(path)
    path = make_study(tmp_path, comparison={"tests": ["domain_shard"]})
    with pytest.raises(UnknownName, match="domain_shard") as caught:
        check_study(Study.open(path))
    assert "domain_share" in str(caught.value)


def test_a_killed_matching_makes_no_pair_twice(seeded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, whole = seeded
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    before = {
        name: pd.read_parquet(folder / "comparison" / f"{name}.parquet") for name in ("fates_control", "fates_null")
    }
    made: list[str] = []
    make = correspondence._Matchings._match

    def counted(pairs, a, b):
        made.append(f"{pairs.measure} {a.name} {b.name}")
        if len(made) == 4:
            raise KeyboardInterrupt
        return make(pairs, a, b)

    monkeypatch.setattr(correspondence._Matchings, "_match", counted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, folder, stages=["match"], redo=True)
    kept = sorted(folder.glob("partial/match/*.parquet"))
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:-40])  # what is damaged is made anew
    run_study(study, folder, stages=["match"], redo=True)
    assert len(set(made)) == len(made) - 2  # the one that was under way, and the damaged one
    assert not (folder / "partial" / "match").exists()
    for name, table in before.items():
        pd.testing.assert_frame_equal(pd.read_parquet(folder / "comparison" / f"{name}.parquet"), table)
