"""The documentation: its commands, YAML and error texts are the program's, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import saeffect
from saeffect.cli.app import app
from saeffect.config import StudyConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^ {4}(saeffect .*)$", re.MULTILINE)


def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    found = dict(group.commands)
    for name, command in group.commands.items():
        found |= {f"{name} {sub}": inner for sub, inner in getattr(command, "commands", {}).items()}
    return found


COMMANDS = _commands()


def _lines(text: str) -> Iterator[str]:
    for language, block in BLOCK.findall(text):
        if language in ("", "bash", "sh", "console"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from INDENTED.findall(text)


def _calls(text: str) -> Iterator[list[str]]:
    """Arguments of every call of the program, also by `python -m` or torchrun."""
    for line in _lines(text):
        match = re.search(r"(?:^\s*\$?\s*|-m )saeffect (.*)", line)
        if match:
            try:
                yield shlex.split(match[1], comments=True)
            except ValueError:  # a quotation goes on in the next line
                yield match[1].split()


def _wrong(arguments: list[str]) -> str:
    """What the program would not know; "" if nothing."""
    if not arguments or arguments[0].startswith("-") or arguments[0] in ("…", "...", "COMMAND"):
        return ""
    name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in COMMANDS else arguments[0]
    if name not in COMMANDS:
        return f"no command {name}"
    known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    return ", ".join(sorted(given - known - {"--help"}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    wrong = {" ".join(call): _wrong(call) for call in _calls(page.read_text(encoding="utf-8"))}
    assert {call: what for call, what in wrong.items() if what} == {}


def test_a_wrong_option_would_be_seen() -> None:
    text = "```\nsaeffect run study.yaml --outt x   # comment\ntorchrun -m saeffect nothing\n```\n    saeffect run a --redo\n"
    assert [_wrong(call) for call in _calls(text)] == ["--outt", "no command nothing", ""]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_study_files_and_their_parts_are_valid(page: Path) -> None:
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language not in ("yaml", "yml"):
            continue
        values = yaml.safe_load(block)
        if not isinstance(values, dict):
            continue
        if "arms" in values:
            StudyConfig.read(values, at=page.name)
            continue
        for key, value in values.items():
            if key in (
                "gate",
                "features",
                "coherence",
                "selection",
                "steering",
                "comparison",
                "put_back",
                "push",
                "changes",
            ):
                whole = {"name": "x", "arms": _ARMS, "text": {"bundled": "smollm2-sampled"}, key: value}
                StudyConfig.read(whole, at=page.name)


_ARMS = {role: {"role": role, "model": "m", "sae": f"./{role}"} for role in ("control", "treatment")}


def test_errors_by_text_are_those_of_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    heads = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert len(heads) >= 25
    assert [head for head in heads if head not in source and head != "No space left on device"] == []


def test_api_page_lists_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}
    assert set(saeffect.__all__) - {"__version__"} <= documented


@pytest.mark.real  # ten seconds, not a model
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="pip install 'saeffect[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "tutorial.html", "api.html", "commands.html", "paper.html"} <= pages
    html = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html"))
    outside = set(re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', html))
    assert outside == set(), "a page asks another server"


def test_the_guard_s_table_is_that_of_its_benchmark() -> None:
    def rows(path: str) -> list[str]:
        return [
            line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if re.match(r"\| \w+-\d+ ", line)
        ]

    shown = rows("docs/guard.md")
    assert len(shown) == 16
    assert shown == rows("benchmarks/results/guard.md")
