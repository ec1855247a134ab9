"""The help of commands: placeholders instead of types, and commands listed by purpose."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "CommandGroup"]


class Command(TyperCommand):
    """A command whose help lists each argument once, and shows an option's value as its metavar, N, or the name."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(_name(param) if param.required else f"[{_name(param)}]" for param in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        params: list[Any] = self.get_params(ctx)
        for param in params:
            if param.param_type_name == "argument":
                rows["argument"].append((_name(param), param.help or ""))
                continue
            if not param.is_flag:
                param.metavar = _name(param)
            if record := param.get_help_record(ctx):
                rows["option"].append(record)
        for title, entries in rows.items():
            if entries:
                with formatter.section(f"{title.capitalize()}s"):
                    formatter.write_dl(entries)


class CommandGroup(TyperGroup):
    """Commands listed by `rich_help_panel`, in the order in which these are first used."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        del ctx
        sections: dict[str, list[Any]] = {}
        for command in self.commands.values():
            sections.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(command)
        width = max(map(len, self.commands), default=0)
        for title, commands in sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (f"{command.name:<{width}}", command.get_short_help_str(formatter.width - width - 6))
                        for command in commands
                    ]
                )


def _name(param: Any) -> str:
    number = isinstance(param.default, int | float)
    return str(param.metavar or ("N" if number else param.name.upper().replace("_", "-")))
