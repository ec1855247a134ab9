"""Hooks of the documentation's build: the page of commands, links that leave docs/, pages that do not exist yet."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")
_COMMANDS = "commands.md"


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that do not exist yet."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def on_pre_build(config: Any) -> None:
    """Remove scripts from other servers, which the theme adds for search from a folder."""
    config.extra["polyfills"] = [script for script in config.extra.get("polyfills", []) if "://" not in script]


def _existing(entries: list[Any], docs: Path) -> list[Any]:
    existing: list[Any] = []
    for entry in entries:
        ((title, target),) = entry.items()
        value = _existing(target, docs) if isinstance(target, list) else target
        if value if isinstance(value, list) else (docs / target).is_file() or target == _COMMANDS:
            existing.append({title: value})
    return existing


def on_files(files: Any, config: Any) -> Any:
    """Add the page of commands, made from their own help."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, _COMMANDS, content=commands_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files outside docs/ by their names."""
    return _OUTSIDE.sub(lambda match: f"{match[1]} (`{match[2]}` in the repository)", markdown)


def commands_page() -> str:
    """Every command with its arguments and options."""
    import typer

    from saeffect.cli.app import app

    group: Any = typer.main.get_command(app)
    parts = ["# Commands", "", "What `saeffect COMMAND --help` says."]
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        for title, subcommand in [(f"{name} {sub}", c) for sub, c in inner.items()] if inner else [(name, command)]:
            parts += ["", f"## saeffect {title}", "", subcommand.help or "", "", *_options(subcommand)]
    return "\n".join(parts) + "\n"


def _options(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_option = parameter.param_type_name == "option"
        shown = " ".join(parameter.opts) if is_option else parameter.metavar or parameter.name.upper()
        meaning = (getattr(parameter, "help", None) or "").replace("|", r"\|")
        rows.append(f"| `{shown}` | {meaning} |")
    return ["| option | meaning |", "|---|---|", *rows] if rows else []
