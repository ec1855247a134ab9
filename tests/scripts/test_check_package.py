"""What the check of wheel and sdist notices."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = [
    "src/saeffect/a.py",
    "src/saeffect/py.typed",
    "README.md",
    "LICENSE",
    "tests/reference/paper.csv",
    "tests/t.py",
]
WHEEL = ["saeffect/a.py", "saeffect/py.typed", "saeffect-1.dist-info/METADATA", "saeffect-1.dist-info/licenses/LICENSE"]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("check_package", ROOT / "scripts" / "check_package.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_right_wheel(script: Any) -> None:
    assert script.wheel_complaints(WHEEL, TRACKED, 10) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([*WHEEL, "saeffect/__pycache__/a.pyc"], "stray file: saeffect/__pycache__/a.pyc"),
        ([*WHEEL, "tests/t.py"], "stray file: tests/t.py"),
        (WHEEL[1:], "missing: saeffect/a.py"),
        ([WHEEL[0], *WHEEL[2:]], "no type information: saeffect/py.typed"),
        (WHEEL[:-1], "no licence: dist-info/licenses/LICENSE"),
    ],
)
def test_a_wrong_wheel(script: Any, names: list[str], said: str) -> None:
    assert said in script.wheel_complaints(names, TRACKED, 10)


def test_a_wheel_that_no_index_takes(script: Any) -> None:
    assert script.wheel_complaints(WHEEL, TRACKED, 123_000_000) == ["the wheel has 123 MB, over 100"]


def test_an_sdist_has_the_sources_and_nothing_without_a_licence(script: Any) -> None:
    right = ["PKG-INFO", *(name for name in TRACKED if not name.startswith("tests"))]
    assert script.sdist_complaints(right, TRACKED, 10) == []
    wrong = script.sdist_complaints([*right, "tests/reference/paper.csv"], TRACKED, 10)
    assert wrong == ["stray file: tests/reference/paper.csv"]


def test_what_the_sdist_takes_is_what_the_check_wants(script: Any) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert sorted(f"{name}/" if (ROOT / name).is_dir() else name for name in included) == sorted(script.SOURCES)
    assert (ROOT / "src" / "saeffect" / "py.typed").is_file()
