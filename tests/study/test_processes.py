"""Many processes end with the files of one: together, killed and another number of them, stopped, broken."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from processes import Forked, command, ranks
from saeffect.study.run import run_study
from saeffect.study.study import Study
from study.test_run import tree

# One feature a batch, so that each process has several; long enough to be killed in the middle.
STEERING = {
    "prompts": ["The river", "My doctor said"],
    "search_prompts": ["My heart"],
    "doses": [0.5, 1.0],
    "search_features": 2,
    "max_features": 4,
    "samples": 2,
    "max_new_tokens": 16,
    "top_p": 1.0,
    "baseline_features": 1,
    "batch_size": 6,
    "together": {"control": [[1, 2]]},
}


@pytest.fixture(scope="module")
def prepared(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `study.yaml`, `before` (all stages before steering) and `alone` (steering too, by one process)."""
    folder = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("study") / "tiny"))
    values = yaml.safe_load((folder / "study.yaml").read_text()) | {"steering": STEERING}
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    shutil.copytree(folder / "before", folder / "alone")
    run_study(Study.open(folder / "study.yaml"), folder / "alone", stages=("steer",))
    return folder


def side_by_side(*arguments: tuple[str | Path, ...]) -> list[Forked]:
    """A process for each set of arguments, as torchrun starts them, but nobody looks after them."""
    return [Forked(command, its, variables) for its, variables in zip(arguments, ranks(len(arguments)), strict=True)]


def files(run: Path) -> dict[str, str]:
    found = tree(run)
    del found["manifest.json"]  # holds how long each stage took
    return found


def test_interrupted_processes_end_with_one_process_files(prepared: Path, tmp_path: Path) -> None:
    """Two processes are killed, two get Ctrl-C, and three end what was begun."""
    run = tmp_path / "run"
    shutil.copytree(prepared / "before", run)
    arguments = ("steer", prepared / "study.yaml", "--out", run)
    both = side_by_side(arguments, arguments)
    both[0].wait_until(lambda: any(run.glob("partial/steer-control/[!.]*.parquet")))
    for one in both:
        one.process.kill()
        one.end()
    assert not (run / "arms/control/interventions.parquet").exists()

    together = side_by_side(arguments, arguments)
    together[0].wait_until(lambda: any(run.glob("partial/steer-placebo/[!.]*.parquet")))
    for one in together:  # as torchrun passes it on
        os.kill(one.process.pid, signal.SIGINT)
    codes, _, shown = zip(*(one.end() for one in together), strict=True)
    assert set(codes) == {130}, shown
    errors = "".join(shown)
    assert errors.count("Interrupted: stopped. What is finished is kept") == 1, errors
    assert (run / "arms/control/interventions.parquet").exists()
    kept = list(run.glob("partial/steer-placebo/[!.]*"))
    assert kept or (run / "arms/placebo/interventions.parquet").exists()  # on a quick machine it was just finished

    codes, _, shown = zip(*(process.end() for process in side_by_side(*[arguments] * 3)), strict=True)
    assert codes == (0, 0, 0), shown
    assert sum(errors.count("steer treatment: ") for errors in shown) == 1, "the first process alone shows anything"
    assert not any(piece.exists() for piece in kept)
    assert files(run) == files(prepared / "alone")


def test_error_of_all_is_shown_once(prepared: Path, tmp_path: Path) -> None:
    text = (prepared / "study.yaml").read_text()
    broken = prepared / "broken.yaml"
    broken.write_text(text.replace("./saes/placebo", "./saes/nowhere"))
    arguments = ("run", broken, "--out", tmp_path / "run")
    first, second = side_by_side(arguments, arguments)
    code, heard, said = first.end()
    second.process.kill()  # as torchrun does when one has failed
    assert (code, heard) == (2, "")
    assert said.count("NotFound: there is no SAE folder") == 1
    assert "at:  broken.yaml, arms.placebo.sae" in said
    assert second.end()[1:] == ("", ""), "it waits, so that the first is heard"
    assert not (tmp_path / "run").exists()


def test_error_of_one_stops_all(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "before", tmp_path / "run")
    shutil.copytree(prepared / "before", tmp_path / "elsewhere")
    first, second = side_by_side(
        ("steer", prepared / "study.yaml", "--out", tmp_path / "run", "--redo"),
        ("steer", prepared / "study.yaml", "--out", tmp_path / "elsewhere"),
    )
    code, _, said = second.end()
    assert code == 2, said
    assert "ConfigError: the processes see different files" in said
    assert "at:  " + str(tmp_path / "elsewhere") in said
    code, _, said = first.end()
    assert code == 130, said
    assert "Interrupted: this process stops because another one of the same run did" in said
    assert not any((tmp_path / "run").glob("arms/*/interventions.parquet"))
