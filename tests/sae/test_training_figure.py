from __future__ import annotations

import json
import math
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from saeffect.errors import BadFile, EmptySelection, NotFound
from saeffect.progress import SILENT
from saeffect.sae.training import figure as training_figure
from saeffect.sae.training.figure import save_training_figure
from saeffect.sae.training.log import TrainingLog

RESERVED = {"step", "tokens", "kind", "seconds", "event"}


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # between matplotlib and newer releases of what it uses
        yield


def write(folder: Path, *rows: dict[str, Any], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    filled = [{"step": i, "tokens": (i + 1) * 2000, "kind": "train", "seconds": i} | row for i, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled) + tail)
    return folder


def training(folder: Path, n: int = 40, **more: Any) -> Path:
    rows: list[dict[str, Any]] = []
    for i in range(n):
        mse, l1 = 5 + 100 * math.exp(-i), 2 + i / n
        rows.append(
            {"loss": mse + l1, "mse": mse, "l1": l1, "l0": 40 + i, "explained_variance": 1 - mse / 110, "dead": i}
            | more
        )
        if i % 10 == 9:
            rows.append(
                {
                    "kind": "evaluation",
                    "explained_variance": 0.7,
                    "ce_loss_score": 0.9,
                    "l2_ratio": 0.95,
                    "mean_log10_density": -2.5,
                }
            )
            rows.append({"kind": "event", "event": "resampled", "n_features": 300})
    return write(folder, *rows)


def texts(folder: Path) -> set[str]:
    root = ElementTree.parse(folder / "training.svg").getroot()
    return {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}


TITLES = {
    "loss", "explained variance", "active features a token (l0)", "dead features", "CE loss score",
    "l2 ratio, out / in", "mean log10 density",
}  # fmt: skip


def test_every_metric_has_a_panel_and_last_value(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    assert save_training_figure(training(tmp_path)) == tmp_path / "training.png"
    assert dict(matplotlib.rcParams) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "training.png", "training.svg"]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    found = texts(tmp_path)
    assert found >= TITLES
    assert {"total", "mse", "l1", "training batch", "held-out text"} <= found
    assert {"held out 0.700", "held out 0.900", "held out −2.50", "ends at 79.0", "ends at 39"} <= found
    assert "dead features resampled (1,200 in all)" in found
    assert "tokens (thousands)" in found


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (5_000, "tokens"),
        (90_000, "tokens (thousands)"),
        (61_440_000, "tokens (millions)"),
        (4 * 10**9, "tokens (billions)"),
    ],
)
def test_tokens_are_counted_in_a_unit_that_fits(tmp_path: Path, tokens: int, words: str) -> None:
    save_training_figure(write(tmp_path, {"mse": 2}, {"mse": 1, "tokens": tokens}))
    assert words in texts(tmp_path)


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    save_training_figure(write(tmp_path, {"mse": 3, "explained_variance": 0.1}, {"mse": 2, "explained_variance": 0.5}))
    assert texts(tmp_path) & TITLES == {"loss", "explained variance"}
    assert "held-out text" not in texts(tmp_path)


def test_metrics_of_all_times_nan_are_left_out(tmp_path: Path) -> None:
    save_training_figure(write(tmp_path, {"l0": None, "dead": 4}, {"l0": float("nan"), "dead": 5}))
    assert texts(tmp_path) & TITLES == {"dead features"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, as matplotlib holds them."""
    figures: list[Any] = []
    draw = training_figure._draw

    def keep(*arguments: Any) -> Any:
        figures.append(draw(*arguments))
        return figures[-1]

    monkeypatch.setattr(training_figure, "_draw", keep)
    return figures


def panel(figure: Any, title: str) -> Any:
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def test_what_is_drawn_is_what_was_measured(tmp_path: Path, drawn: list[Any]) -> None:
    write(
        tmp_path,
        {"dead": 7, "tokens": 1_000_000},
        {"dead": None, "tokens": 2_000_000},
        {"tokens": 3_000_000},
        {"dead": 3, "tokens": 4_000_000},
        {"dead": 5, "tokens": 4_000_000, "kind": "evaluation"},
        {"kind": "event", "event": "resampled", "n_features": 2, "tokens": 2_500_000},
    )
    save_training_figure(tmp_path)
    event, curve, dots = panel(drawn[0], "dead features").lines
    assert set(event.get_xdata()) == {2.5}
    assert list(curve.get_xdata()) == [1, 2, 4]
    assert [curve.get_ydata()[0], curve.get_ydata()[2]] == [7, 3] and math.isnan(curve.get_ydata()[1])
    assert (list(dots.get_xdata()), list(dots.get_ydata()), dots.get_marker()) == ([4], [5], "o")


def test_a_bad_start_does_not_flatten_the_curve(tmp_path: Path, drawn: list[Any]) -> None:
    values = [-900.0, -3.0, 0.2, *[0.5 + i / 200 for i in range(60)]]
    save_training_figure(write(tmp_path, *({"explained_variance": v, "mse": 1 - v} for v in values)))
    low, high = panel(drawn[0], "explained variance").get_ylim()
    assert low == 0 and 1 < high < 1.1
    assert panel(drawn[0], "loss").get_yscale() == "log"


def test_bad_training_keeps_the_full_axis(tmp_path: Path, drawn: list[Any]) -> None:
    save_training_figure(write(tmp_path, *({"explained_variance": v} for v in (-4.0, -3.0, -2.0))))
    assert panel(drawn[0], "explained variance").get_ylim()[0] <= -4


def test_loss_part_of_zeros_is_left_out(tmp_path: Path) -> None:
    save_training_figure(write(tmp_path, *({"mse": 50.0, "auxiliary": 0.9 if i == 7 else 0.0} for i in range(30))))
    assert "mse" in texts(tmp_path) and "auxiliary" not in texts(tmp_path)


def test_zeros_on_a_logarithmic_scale(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"mse": 100 / (i + 1), "auxiliary": 0.0 if i < 20 else 0.3, "l0": 0.0} for i in range(40)]
    save_training_figure(write(tmp_path, *rows))
    assert panel(drawn[0], "loss").get_ylim()[0] > 0
    assert panel(drawn[0], "active features a token (l0)").get_yscale() == "linear"


@pytest.mark.parametrize("kind", ["train", "evaluation"])
def test_one_row_is_one_visible_dot(tmp_path: Path, kind: str, drawn: list[Any]) -> None:
    save_training_figure(write(tmp_path, {"kind": kind, "loss": 3.0, "mse": 3.0, "explained_variance": 0.5, "dead": 0}))
    for ax in drawn[0].axes:
        assert any(line.get_marker() == "o" for line in ax.lines), ax.get_title(loc="left")


@pytest.mark.parametrize("n_panels", [1, 2, 5])
def test_any_number_of_panels(tmp_path: Path, n_panels: int, drawn: list[Any]) -> None:
    metrics = ["loss", "explained_variance", "l0", "dead", "ce_loss_score", "l2_ratio", "mean_log10_density"]
    save_training_figure(write(tmp_path, *(dict.fromkeys(metrics[:n_panels], 0.5 + i) for i in range(3))))
    assert len(drawn[0].axes) == n_panels
    boxes = [ax.get_position() for ax in drawn[0].axes]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert sum(box.width for box in boxes) == pytest.approx(
        max(box.width for box in boxes[1:] or boxes) * n_panels, rel=0.2 if n_panels % 2 == 0 or n_panels == 1 else 1
    )


def test_the_bytes_are_equal_each_time(tmp_path: Path) -> None:
    folder = training(tmp_path)
    first = [save_training_figure(folder).read_bytes(), (folder / "training.svg").read_bytes()]
    assert [save_training_figure(folder).read_bytes(), (folder / "training.svg").read_bytes()] == first


def test_unfinished_log_can_be_drawn(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"total_steps": 9, "batch_size": 4, "config": {}, "log": SILENT}
    with TrainingLog(tmp_path, first_step=0, **settings) as log:
        log.metrics(0, {"mse": float("inf"), "l0": 3.0})
        log.event(0, "resampled", n_features=2)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "mse": 0.')
        save_training_figure(tmp_path)
    assert texts(tmp_path) & TITLES == {"active features a token (l0)"}


@pytest.mark.parametrize(
    "text", ["", '{"step": 0, "ki', '{"step": 3, "kind": "event", "event": "resampled", "tokens": 4}\n']
)
def test_nothing_measured_yet(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(EmptySelection, match="nothing has been measured"):
        save_training_figure(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("row", [{"speed": 3.0}, {"l0": None}, {"l0": "many"}, {"l0": 3, "tokens": None}])
def test_nothing_that_can_be_drawn(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(EmptySelection, match="finite"):
        save_training_figure(write(tmp_path, row))


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"metrics\.jsonl"):
        save_training_figure(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(BadFile, match="line 2"):
        save_training_figure(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "sae", {"mse": 3.0})
    (folder / "training.svg").mkdir()
    with pytest.raises(BadFile, match="cannot be written"):
        save_training_figure(folder)
