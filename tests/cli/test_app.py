"""How commands end."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from saeffect.cli import app as command_line
from saeffect.cli.check import study_keys
from saeffect.cli.console import ConsoleProgress, show, show_error
from saeffect.cli.run import STAGE_HELP
from saeffect.errors import BadFile
from saeffect.lm.finetune import finetune_keys
from saeffect.sae.training.config import recipe_keys
from saeffect.study.run import STAGES

ROOT = Path(__file__).parents[2]
ACTING = "\x1b[2J\u202egnp.exe\x9b31m\x07\ud83d"
SHOWN = "U+001B[2JU+202Egnp.exeU+009B31mU+0007U+D83D"


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException | None]]:
    """A command that raises what is put into the list."""
    raised: list[BaseException | None] = []

    def command() -> None:
        if raised[0] is not None:
            raise raised[0]

    app = typer.Typer()
    app.command("first")(command)
    app.command("second")(command)
    monkeypatch.setattr(command_line, "app", app)
    monkeypatch.setattr(sys, "argv", ["saeffect", "first"])
    yield raised


def test_ctrl_c_is_reported_with_exit_code_130(ends: list[BaseException | None], capsys: pytest.CaptureFixture) -> None:
    ends.append(KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip().startswith("Interrupted: stopped. What is finished is kept")


def test_only_first_process_reports_ctrl_c(
    ends: list[BaseException | None], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    ends.append(KeyboardInterrupt())
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip() == ""


def test_other_ends(ends: list[BaseException | None]) -> None:
    ends.append(None)
    command_line.main()
    ends[0] = typer.Exit(3)
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 3


def _typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["saeffect", *arguments])
    try:
        command_line.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_alone_it_shows_its_help_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _typed(monkeypatch) == 0
    told = capsys.readouterr()
    assert told.out.count("Usage:") == 1 and "train-sae" in told.out and told.err == ""
    assert _typed(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("saeffect 0.")
    assert _typed(monkeypatch, "nothing") == 2
    assert capsys.readouterr().err.count("Usage:") == 1


@pytest.mark.parametrize("command", ["", *typer.main.get_command(command_line.app).commands, "verdicts import"])  # type: ignore[attr-defined]
def test_help_fits_a_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert _typed(monkeypatch, *command.split(), "--help") == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, [usage, *lines])) <= 80
    assert "{" not in usage
    for line in lines:
        assert not re.search(r"<(str|int|Path|list|float)\b", line), line
        assert not (command in ("", "verdicts") and line.endswith("...")), f"cut off: {line}"
        entry = re.match(r"  (\S.*?)  +\S", line)
        assert entry is None or len(entry[1]) <= 26, f"leaves no room for the words: {line}"


def test_usage_names_what_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert _typed(monkeypatch, "gate", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].endswith("gate [OPTIONS] STUDY|MODEL [SAE]")
    assert "--tokens N " in shown and "--text TEXT " in shown and "--tuned MODEL " in shown


def test_commands_are_listed_by_purpose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _typed(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"\n{title}") for title in ("Compare", "Finished runs:", "SAEs and", "Stages of a study")]
    assert places == sorted(places)
    assert places[1] < shown.index("\n  verdicts ") < places[2] < shown.index("\n  gate ") < places[3]


def test_a_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else `python -m pytest` names the program
    monkeypatch.setenv("_SAEFFECT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "saeffect fine")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert _typed(monkeypatch) == 0
    assert capsys.readouterr().out.split() == ["finetune"]


@pytest.mark.parametrize(
    ("command", "page", "keys"),
    [
        ("check", "study.md", study_keys),
        ("train-sae", "recipe.md", recipe_keys),
        ("harvest", "recipe.md", recipe_keys),
        ("finetune", "finetune.md", finetune_keys),
    ],
)
def test_keys_option_shows_the_docs_page(
    command: str, page: str, keys: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _typed(monkeypatch, command, "--keys") == 0
    shown = capsys.readouterr().out
    assert shown == keys()  # type: ignore[operator]
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == shown, f"saeffect {command} --keys > docs/{page}"
    assert "|  |" not in shown, "a key without a description"


def test_every_stage_has_a_command() -> None:
    assert tuple(STAGE_HELP) == STAGES


def test_impossible_path_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["check", "a" * 5000],
        ["train-sae", "~nobody-of-that-name"],
        ["run", "s.yaml", "--out", "a" * 5000],
    ):
        assert _typed(monkeypatch, *arguments) == 2
        assert "can be no path" in capsys.readouterr().err


def test_shown_text_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(f"{ACTING}\nמשפט\t👨‍👩‍👧")
    with ConsoleProgress() as log:
        log(ACTING)
        log.progress(ACTING, 1, 2, "rows")
    show_error(str(BadFile(ACTING, at=ACTING, fix=ACTING)))
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}\nמשפט\t👨‍👩‍👧\n"
    assert err.count(SHOWN) == 4
    assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(out + err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_full_disk_under_the_log_is_an_error(
    stream: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        with ConsoleProgress() as log:
            log("a line")
        show("a result")

    app = typer.Typer()
    app.command("first")(command)
    app.command("second")(command)
    monkeypatch.setattr(command_line, "app", app)
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, stream, full)
        assert _typed(monkeypatch, "first") == 2
    shown = capsys.readouterr()
    assert ("standard output cannot be written: No space left on device." in shown.err) == (stream == "stdout")
    assert "Traceback" not in shown.err and "a result" not in shown.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_full_disk_under_the_help_is_an_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert _typed(monkeypatch, *arguments) == 2
    assert "standard output cannot be written: No space left on device." in capsys.readouterr().err


def test_closed_pipe_ends_silently(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert _typed(monkeypatch, "--version") == 141
    assert capsys.readouterr().err == ""


def test_a_name_of_any_length_fills_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(str(BadFile("a" * 100_000, at="b" * 100_000, fix="c")))
    first, second, third = capsys.readouterr().err.splitlines()
    assert (first[-1], second[-1], third) == ("…", "…", "  fix: c")
    assert len(first) == len(second) == 2_001


def test_commands_print_through_the_console_alone() -> None:
    folder = Path(command_line.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and path.name != "console.py":
                assert ast.unparse(node.func) not in ("typer.echo", "typer.secho", "print"), f"{path}:{node.lineno}"
