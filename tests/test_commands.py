"""Everything that the command line does is a function of the same name, with types."""

from __future__ import annotations

import inspect
from pathlib import Path

import typer

from saeffect import commands
from saeffect.cli.app import app
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study
from tiny_study import make_study


def _names() -> set[str]:
    group = typer.main.get_command(app)
    found = set()
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name}_{sub}" for sub in inner} if inner else {name}
    return {name.replace("-", "_") for name in found}


def test_every_command_is_a_typed_function() -> None:
    assert set(commands.__all__) == _names()
    for name in commands.__all__:
        function = getattr(commands, name)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, name
        untyped = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
        assert not untyped, name


def test_command_list_fits_80_columns() -> None:
    group = typer.main.get_command(app)
    widest = max(map(len, group.commands))
    for name, command in group.commands.items():
        said = command.get_short_help_str(80 - 6 - widest)
        assert said and not said.endswith("..."), f"{name}: {said}"


def test_the_page_names_each_of_them() -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in commands.__all__)


def test_a_stage(tmp_path: Path) -> None:
    study = Study.open(make_study(tmp_path))
    commands.run(study, tmp_path / "run", stages=("gate",))
    done = commands.features(study, tmp_path / "run")
    assert isinstance(done, RunFolder) and (tmp_path / "run" / "arms" / "control" / "features.parquet").is_file()
