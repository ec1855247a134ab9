"""A finished run in Python: answer, tables, figures, and what a notebook shows; a study made without a file."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import saeffect as sx
from saeffect.config import StudyConfig
from saeffect.errors import BadFile, ConfigError, NotFound, UnknownName
from saeffect.study.finished import open_run
from tiny_study import only_figures

STUDY: dict[str, Any] = {
    "name": "mine",
    "title": "A <b>title</b>",
    "arms": {
        "control": {"role": "control", "model": "./base", "sae": "./saes/control"},
        "treatment": {"role": "treatment", "model": "./tuned", "sae": "./saes/treatment"},
    },
    "text": {"sources": [{"name": "general", "path": "./general.jsonl"}]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for name in ("comparison", "arms/control", "figures", "steering"):
        (run / name).mkdir(parents=True)
    (run / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (run / "report.html").write_text("<html></html>")
    answer = {
        "headline": "Nothing <script>alert(1)</script> changed.",
        "learned": "",
        "paragraph": "",
        "caveats": ["one"],
    }
    (run / "comparison" / "answer.json").write_text(json.dumps(answer))
    table = pd.DataFrame({"arm": ["control", "treatment"], "role": ["control", "treatment"], "tested": [3, 4]})
    table.to_parquet(run / "comparison" / "table1.parquet")
    pd.DataFrame({"feature": [0, 1]}).to_parquet(run / "arms" / "control" / "features.parquet")
    (run / "figures" / "contrasts.svg").write_text("<svg></svg>")
    return run


def test_a_study_opened_from_its_run_gives_tables_and_figures(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")
    study = sx.Study.open(folder)
    assert study.config.name == "mine"
    assert study.tables["table1"]["tested"].tolist() == [3, 4]
    assert study.figures["contrasts"].svg == "<svg></svg>"


def test_a_study_that_has_not_run_has_no_tables(folder: Path) -> None:
    with pytest.raises(NotFound, match=r"when it has run(.|\n)*Study\.open\('runs/"):
        sx.Study.open(folder / "study.yaml").tables


def test_tables_and_figures_by_name(folder: Path) -> None:
    results = sx.open_run(folder)
    assert set(results.tables) == {"table1", "control/features"}
    assert results.tables["table1"]["tested"].tolist() == [3, 4]
    assert results.figures["contrasts"].svg == results.figures["contrasts"]._repr_svg_() == "<svg></svg>"
    assert results.headline.startswith("Nothing")
    assert results.answer["caveats"] == ["one"]
    assert results.study.config.name == "mine"
    assert repr(results).endswith("2 tables, 1 figures")
    assert repr(results.tables) == "tables: table1, control/features"


def test_a_notebook_shows_it_escaped(folder: Path) -> None:
    shown = open_run(folder)._repr_html_()
    assert "<h3>A &lt;b&gt;title&lt;/b&gt;</h3>" in shown
    assert "<script>" not in shown
    assert "tested" in shown and "role" not in shown


def test_wrong_names_and_folders(folder: Path, tmp_path: Path, complains: Any) -> None:
    results = open_run(folder)
    with complains(UnknownName, "table 'tabel1'", "did you mean 'table1'"):
        results.tables["tabel1"]
    with complains(UnknownName, "figure 'doses'"):
        results.figures["doses"]
    with complains(NotFound, "no finished run", at=str(tmp_path)):
        open_run(tmp_path)
    (folder / "comparison" / "table1.parquet").write_bytes(b"no table")
    with complains(BadFile, "cannot be read", at="table1.parquet"):
        results.tables["table1"]


def test_a_study_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    study = sx.Study.of(STUDY)
    assert study.config == sx.Study.open("study.yaml").config
    assert study.config.arms["control"].sae == str(tmp_path / "saes" / "control")
    assert sx.Study.of(StudyConfig.read(STUDY, at="")).config == study.config
    with complains(UnknownName, "'armz'", at="mine"):
        sx.Study.of(STUDY | {"armz": {}}, name="mine")
    with complains(UnknownName, "placebo", at="steering"):
        sx.Study.of(STUDY | {"steering": {"placebos": ["mached"]}})
    with complains(ConfigError, "exactly one control"):
        sx.Study.of(STUDY | {"arms": {}} | {"arms": {"a": STUDY["arms"]["control"], "b": STUDY["arms"]["control"]}})


NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


def code_cells(name: str) -> list[dict[str, Any]]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def execute(name: str) -> list[Any]:
    """Run a notebook's cells in the current folder; the values that it shows."""
    names: dict[str, Any] = {}
    shown = []
    for cell in code_cells(name):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), name, "eval"), names))
    return shown


def test_the_notebooks_run(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Your own pair first, on tiny models; then the demo's, on what that one left."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path, dirs_exist_ok=True)
    with only_figures("coherence", "contrasts"):
        *_, run, effects, figure = execute("own-pair")
        assert "<h3>mine</h3>" in run._repr_html_()
        assert len(effects) and "<svg" in figure._repr_svg_()
        Path("runs/mine").rename("runs/smollm2-medical")
        assert len(execute("demo")[-1])  # its last table


@pytest.mark.parametrize("name", ["demo", "own-pair"])
def test_the_notebooks_were_executed(name: str) -> None:
    code = code_cells(name)
    assert all(cell["execution_count"] for cell in code), "execute it anew and save it"
    assert any(cell["outputs"] for cell in code)
    assert not any("/tmp/" in json.dumps(cell["outputs"]) for cell in code)
