from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import Forked, script
from saeffect.errors import NotFound, UnknownName
from saeffect.progress import SILENT
from saeffect.sae.training.log import TrainingLog
from saeffect.sae.training.loggers import check_logger


def open_log(folder: Path, **changes: Any) -> TrainingLog:
    settings: dict[str, Any] = {
        "total_steps": 100,
        "batch_size": 8,
        "first_step": 0,
        "config": {"k": 32, "where": Path("x")},
    }
    return TrainingLog(folder, log=SILENT, **settings | changes)


def test_unknown_logger_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="none, tensorboard, wandb") as caught:
        open_log(tmp_path / "sae", logger="wandbb")
    assert "'wandb'" in str(caught.value.fix)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_says_what_to_install(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotFound) as caught:
        open_log(tmp_path / "sae", logger=name)
    assert f'"saeffect[{name}]"' in str(caught.value.fix)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(NotFound):
        check_logger("wandb")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard(tmp_path: Path) -> None:
    with open_log(tmp_path, logger="tensorboard") as log:
        log.metrics(0, {"mse": 4.0, "l0": float("nan")})
        log.metrics(1, {"mse": 3.5})
        assert events(tmp_path)["train/mse"] == [(0, 4.0), (1, 3.5)]  # at once: a kill loses nothing
        log.metrics(10, {"mse": 3.0}, kind="evaluation")
        log.event(10, "resampled", n_features=5)
        log.metrics(20, {"mse": 99.0})
    with open_log(tmp_path, logger="tensorboard", first_step=15) as log:
        log.metrics(20, {"mse": 2.0})
    found = events(tmp_path)
    assert found["train/mse"] == [(0, 4.0), (1, 3.5), (20, 2.0)]
    assert found["evaluation/mse"] == [(10, 3.0)]
    assert found["resampled/n_features"] == [(10, 5.0)]
    assert "train/l0" not in found


def test_new_tensorboard_gets_earlier_rows(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.metrics(0, {"mse": 4.0})
        log.metrics(20, {"mse": 99.0})
    with open_log(tmp_path, logger="tensorboard", first_step=15) as log:
        log.metrics(20, {"mse": 2.0})
    assert events(tmp_path)["train/mse"] == [(0, 4.0), (20, 2.0)]


def test_new_training_hides_the_old_curve(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with open_log(tmp_path, logger="tensorboard") as log:
            log.metrics(0, {"mse": value})
            log.metrics(5, {"mse": value})
    assert events(tmp_path)["train/mse"] == [(0, 2.0), (5, 2.0)]


WANDB = """
import os, sys
from pathlib import Path
from saeffect.progress import Log
from saeffect.sae.training.log import TrainingLog
folder, first = Path(sys.argv[1]), int(sys.argv[2])
os.chdir(folder.parent)
with TrainingLog(folder, total_steps=100, batch_size=8, first_step=first, config={"k": 32},
                 log=Log(lambda line: print(line, file=sys.stderr)), logger="wandb") as log:
    log.metrics(first + 9, {"mse": first + 1.5, "l0": float("nan")})
    log.metrics(first + 9, {"mse": 0.25}, kind="evaluation")
    log.metrics(first + 19, {"mse": first + 2.5})
    if first == 0:
        log.event(19, "resampled", n_features=3)
"""


def run_wandb(folder: Path, first: int, **env: str) -> tuple[int | None, str, str]:
    return Forked(script, [WANDB, folder, str(first)], {"WANDB_MODE": "offline"} | env).end()


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of an offline run: a LevelDB log, here of less than one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    at = 7
    while at < len(data):
        size, whole = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        assert whole == 1, "a record over two blocks"
        record = Record()
        record.ParseFromString(data[at + 7 : at + 7 + size])
        yield record
        at += 7 + size


def wandb_history(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(path):
        if record.HasField("history"):
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


def test_weights_and_biases_offline_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    for first in (0, 15):
        code, out, err = run_wandb(folder, first)
        assert code == 0, err
        assert out == ""  # its chatter would disturb what we print
        said = err.splitlines()
        assert "wandb sync" in said[0] and all(line.startswith(("held-out", "step")) for line in said[1:])
    identity = (folder / "wandb" / "run_id.txt").read_text().strip()
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert [run.name.rsplit("-", 1)[1] for run in runs] == [identity, identity]
    first, second = (wandb_history(run / f"run-{identity}.wandb") for run in runs)
    wanted = ("_step", "train/mse", "evaluation/mse", "resampled/n_features", "train/tokens")
    assert [{k: v for k, v in row.items() if k in wanted} for row in first] == [
        {"_step": 9, "train/mse": 1.5, "evaluation/mse": 0.25, "train/tokens": 80},
        {"_step": 19, "train/mse": 2.5, "resampled/n_features": 3, "train/tokens": 160},
    ]
    assert [(row["_step"], row["train/mse"]) for row in second] == [(24, 16.5), (34, 17.5)]
    assert "train/l0" not in first[0]
    run = next(r.run for r in wandb_records(runs[0] / f"run-{identity}.wandb") if r.HasField("run"))
    assert (run.display_name, run.project) == ("sae", "saeffect")
    assert {u.key: u.value_json for u in run.config.update}["k"] == "32"


def test_weights_and_biases_without_login_says_what_to_do(tmp_path: Path) -> None:
    online = {"WANDB_MODE": "online", "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    code, _, said = run_wandb(tmp_path / "sae", 0, **online)
    assert code == 1
    assert "ConfigError" in said and "WANDB_MODE=offline" in said
    assert not (tmp_path / "sae" / "metrics.jsonl").exists()


def test_a_damaged_record_of_the_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "run_id.txt").write_text("../../x y\n")
    _, _, said = run_wandb(folder, 15)
    assert "BadFile" in said and "run_id.txt" in said
    assert run_wandb(folder, 0)[0] == 0  # a new training has an id of its own
