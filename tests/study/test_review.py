"""Verdicts of the app in a study: nothing before the review is finished, then vocabulary and verdicts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from command_line import call
from saeffect.errors import NotFound
from saeffect.progress import Log
from saeffect.review.store import NOT_BLIND, STORE, Verdict, VerdictStore
from saeffect.study.review import import_verdicts, read_queue
from saeffect.study.run import run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.compare import compare_inputs
from saeffect.study.study import Study
from saeffect.study.verify import _recomputations
from tiny_study import TWO_ARMS, make_study

STAGES = ("gate", "features", "coherence", "select")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("review")
    run_study(Study.open(make_study(folder, arms=TWO_ARMS, steering=None)), folder / "run", stages=STAGES)
    return folder


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> tuple[Study, Path]:
    shutil.copytree(finished / "run", tmp_path / "run")
    return Study.open(finished / "study.yaml"), tmp_path / "run"


def select(study: Study, run: Path) -> list[str]:
    lines: list[str] = []
    run_study(study, run, stages=("select",), log=Log(lines.append))
    return [line for line in lines if line.startswith("  ")]


def judge(run: Path, verdict: str = "yes", *, but: int = 0) -> None:
    items = read_queue(run).items
    with VerdictStore(run / STORE) as store:
        given = [Verdict(i.arm, i.feature, i.seen, verdict, kind=i.kind) for i in items]
        store.record("ann", *given[: len(given) - but] if but else given)


def domain(run: Path) -> dict[str, set[int]]:
    tables = {arm: pd.read_parquet(run / "arms" / arm / "selection.parquet") for arm in ("control", "treatment")}
    return {arm: set(table.loc[table["is_domain"], "feature"]) for arm, table in tables.items()}


def test_an_unfinished_review_changes_nothing(study: tuple[Study, Path]) -> None:
    before = domain(study[1])
    candidate = read_queue(study[1]).candidates[0]
    with VerdictStore(study[1] / STORE) as store:
        store.record("ann", Verdict(candidate.arm, candidate.feature, candidate.seen, "no"))
    n = len(read_queue(study[1]).candidates)
    assert any(f"1 of {n} candidates are judged" in line for line in select(*study))
    assert domain(study[1]) == before
    assert not (study[1] / "comparison" / "verdicts.parquet").exists()


def test_selection_follows_finished_reviews(study: tuple[Study, Path]) -> None:
    before = domain(study[1])
    assert "skipped" in select(*study)[-1]
    judge(study[1])
    with VerdictStore(study[1] / STORE) as store:
        first = next(item for item in read_queue(study[1]).candidates if item.arm == "control")
        store.record("ann", Verdict("control", first.feature, first.seen, "no"))
    assert "skipped" not in select(*study)[-1]
    assert "skipped" in select(*study)[-1]
    assert domain(study[1]) == {**before, "control": before["control"] - {first.feature}}
    run = RunFolder(study[1], study[0])
    assert compare_inputs(run)["verdicts"]
    with VerdictStore(study[1] / STORE) as store:
        store.record("ben", Verdict("control", first.feature, first.seen, "yes", role="adjudicator"))
    assert "skipped" not in select(*study)[-1]
    assert domain(study[1]) == before


def test_verify_uses_the_runs_own_verdicts(study: tuple[Study, Path]) -> None:
    judge(study[1])
    select(*study)
    before = domain(study[1])
    judge(study[1], "no")
    work = dict(_recomputations(RunFolder(study[1], study[0]), Log()))["select"]
    list(work())
    assert domain(study[1]) == before


def test_verdicts_on_removed_features_are_kept_unused(study: tuple[Study, Path]) -> None:
    judge(study[1])
    with VerdictStore(study[1] / STORE) as store:
        store.record("ann", Verdict("control", 3, "of other tokens", "yes"))
        said = len(store.history())
    assert any("1 verdicts are on features that this run no longer has" in line for line in select(*study))
    with VerdictStore(study[1] / STORE) as store:
        assert len(store.history()) == said


def test_export_and_import_by_the_command_line(study: tuple[Study, Path], tmp_path: Path, capsys: Any) -> None:
    run, file, other = study[1], tmp_path / "out.csv", tmp_path / "other"
    shutil.copytree(run, other)
    assert call(["verdicts", "export", str(run), str(file)]) == 2
    assert "nobody has judged" in capsys.readouterr().err
    judge(run)
    with VerdictStore(run / STORE) as store:
        item = read_queue(run).candidates[0]
        store.record("ben", Verdict(item.arm, item.feature, item.seen, "no", "a, b", "why", role="adjudicator"))
        store.record("cem", Verdict(item.arm, item.feature, item.seen, "no", source=NOT_BLIND))
    assert call(["verdicts", "export", str(run), str(file)]) == 0
    assert call(["verdicts", "import", str(other), str(file)]) == 0
    assert "imported." in capsys.readouterr().out
    columns = ["arm", "feature", "rater", "role", "verdict", "label", "note"]
    with VerdictStore(run / STORE) as ours, VerdictStore(other / STORE) as theirs:
        a, b = (s.current().query("kind == 'feature'")[columns].reset_index(drop=True) for s in (ours, theirs))
        pd.testing.assert_frame_equal(a, b)
        assert theirs.current().set_index("rater").loc["cem", "source"] == NOT_BLIND
    assert import_verdicts(other, file) == (0, len(b))


def test_an_import_of_unknown_features_changes_nothing(study: tuple[Study, Path], tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_text("feature,arm,rater,verdict,label,note\n1,control,ann,yes,,\n99999,control,ann,yes,,\n")
    with pytest.raises(NotFound, match="1 verdicts are on features that this run does not have: 99999 of control"):
        import_verdicts(study[1], file)
    assert not (study[1] / STORE).exists()
    with pytest.raises(NotFound, match="no features to review"):
        import_verdicts(tmp_path / "nowhere", file)
