"""`saeffect gate`: is this SAE good on this model, and on its fine-tune? Or, with one argument, a study's stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from saeffect.cli.console import ConsoleProgress, show, show_table
from saeffect.cli.diff import Chat, Field, Positions, Texts
from saeffect.cli.run import Out, stage_command
from saeffect.errors import ConfigError, unknown_name
from saeffect.lm.tokens import printable_text
from saeffect.paths import user_path

if TYPE_CHECKING:
    from saeffect.study.pair_gate import PairGate

__all__ = ["gate"]

_BOS = ("auto", "always", "never")
_COLUMNS = {"base": "base", "tuned": "fine-tuned", "trained": "when trained"}
_ROWS = {  # quantities of the gate's table: label and number format
    "explained_variance": ("explained variance", "{:.3f}"),
    "ce_loss_score": ("CE loss score", "{:.3f}"),
    "ce_clean": ("loss of the model, nats a token", "{:.3f}"),
    "ce_sae": ("  with the SAE in its place", "{:.3f}"),
    "ce_zero": ("  with zeros there", "{:.3f}"),
    "l0": ("active features a token (l0)", "{:,.1f}"),
    "l2_ratio": ("length out / in", "{:.3f}"),
    "mean_norm": ("mean length of activations", "{:,.1f}"),
    "first_norm": ("  at the first position", "{:,.1f}"),
    "sink_share": ("tokens at sinks, first left out", "{:.2%}"),
    "features_fired": ("features that fired", "{:,.0f}"),
}
_BARS = "▁▂▃▄▅▆▇█"
_stage = stage_command("gate")


def gate(
    study: Annotated[
        str, typer.Argument(metavar="STUDY|MODEL", help="A study file; or, before SAE, a model as in saeffect diff.")
    ],
    sae: Annotated[
        str | None,
        typer.Argument(metavar="SAE", help="Folder, bundled:<name>, saelens:<release>/<id> or hf:org/name/folder."),
    ] = None,
    tuned: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The fine-tuned model, or a PEFT adapter alone.")
    ] = None,
    text: Texts = None,
    field: Field = None,
    chat: Chat = False,
    positions: Positions = None,
    hook: Annotated[str | None, typer.Option(help="Where to read; by default where the SAE was trained.")] = None,
    bos: Annotated[str, typer.Option(help="Whether texts begin with BOS: auto, always or never.")] = "auto",
    tokens: Annotated[int, typer.Option(help="Tokens to measure on.", min=256)] = 4_096,
    save: Annotated[
        Path | None, typer.Option(help="File for all numbers, as JSON.", parser=user_path, metavar="FILE")
    ] = None,
    mend: Annotated[
        Path | None,
        typer.Option(help="Folder for the SAE with the changes that mend it.", parser=user_path, metavar="FOLDER"),
    ] = None,
    out: Out = None,
    redo: Annotated[bool, typer.Option("--redo", help="Of a study: do it even if it was done.")] = False,
) -> None:
    """Judge an SAE on a model and its fine-tune, or run this stage of a study."""
    if sae is None:
        _refuse_any({"--tuned": tuned, "--text": text, "--hook": hook, "--save": save, "--mend": mend})
        _stage(study, out, redo)
        return
    if bos not in _BOS:
        raise unknown_name("choice of BOS", bos, _BOS, at="--bos")
    for option, path, expected in (("--save", save, "a file"), ("--mend", mend, "a folder")):
        if path is not None and path.exists() and path.is_dir() != (expected == "a folder"):
            raise ConfigError(f"{str(path)!r} is not {expected}.", at=option, fix="choose another place.")
    from saeffect.io import write_json
    from saeffect.study.pair_gate import GateRequest, gate_pair

    options = (field, chat or bool(positions), tuple(positions or ("all",)), hook, bos, tokens)
    request = GateRequest(study, sae, tuned, tuple(text or ()), *options)  # type: ignore[arg-type]
    with ConsoleProgress() as log:
        result = gate_pair(request, log=log)
    _show_result(result, study, sae, tuned)
    if save is not None:
        write_json(save, result.as_dict())
    if mend is not None:
        _save_mended(result, mend)
    if not result.ok:
        raise typer.Exit(1)


def _refuse_any(options: Mapping[str, object]) -> None:
    """ConfigError for an option that needs an SAE."""
    for option, value in options.items():
        if value:
            fix = "write saeffect gate MODEL SAE; with one argument it is a study."
            raise ConfigError("there is no SAE.", at=option, fix=fix)


def _save_mended(result: PairGate, folder: Path) -> None:
    from saeffect.sae.formats import save_sae
    from saeffect.sae.mismatch import mended

    if result.mismatch is None:
        show("nothing to mend in the SAE itself: no folder was written")
        return
    save_sae(mended(result.mismatch), folder)
    show(f"the SAE with these changes: {folder.resolve()}")


def _show_result(result: PairGate, model: str, sae: str, tuned: str | None) -> None:
    cfg, rows = result.sae.cfg, result.rows
    k = f", k = {cfg.k}" if cfg.k else ""
    show(f"SAE    {sae}: {result.sae.label}, {cfg.d_in:,} × {cfg.d_sae:,}{k}")
    show(f"hook   {result.hook}")
    show(f"model  {model}" + (f"; fine-tuned: {tuned}" if tuned else ""))
    has_bos = result.on_text["base"]["prepend_bos"]
    bos_word, other = ("with", "without") if has_bos else ("without", "with")
    counted = "" if rows.counts is None else f", of which {int(rows.counts.sum()):,} count"
    size = f"{rows.ids.size:,} tokens in rows of {rows.context_size}{counted}"
    show(f"text   {', '.join(rows.names)}: {size}, {bos_word} BOS")
    if cfg.metadata.get("prepend_bos") not in (None, has_bos):
        show(f"       !! the SAE was trained on texts {other} BOS, as its cfg.json says (prepend_bos)")
    show()
    _show_table(result)
    show()
    _show_positions(result)
    show()
    for line in _verdict(result):
        show(line)


def _show_table(result: PairGate) -> None:
    values = result.table()
    columns = [name for name in values if not values[name].isna().all()]
    table = Table("", *(_COLUMNS[name] for name in columns), box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    minimum = {
        "explained_variance": result.limits.min_explained_variance,
        "ce_loss_score": result.limits.min_ce_loss_score,
    }
    for name, (label, number_format) in _ROWS.items():
        cells = []
        for column in columns:
            value = float(values.loc[name, column])
            style = "bold red" if name in minimum and column in result.fits and not value >= minimum[name] else ""
            cells.append(Text("" if math.isnan(value) else number_format.format(value), style=style))
        table.add_row(f"{label} (at least {minimum[name]:g})" if name in minimum else label, *cells)
    for source in result.on_text["base"]["perplexity"]:
        perplexities = (result.on_text.get(name, {}).get("perplexity", {}).get(source) for name in columns)
        label = printable_text(f"perplexity on {source}")
        table.add_row(Text(label), *("" if value is None else f"{value:,.1f}" for value in perplexities))
    show_table(table)


def _show_positions(result: PairGate) -> None:
    """Show a table with a column for each range of positions; bars are explained variance from 0 to 1."""
    table = result.by_position()
    names = [f"{a:,.0f}" if a == b else f"{a:,.0f}-{b:,.0f}" for a, b in _rows_of(table, "base", "first", "last")]
    grid = Table("by position", *names, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    for label, quantity, formatter in _BY_POSITION:
        values = table[table["first"] > 0][quantity].dropna()
        if (quantity == "sink_share" and not (values > 0).any()) or (quantity == "l0" and values.nunique() < 2):
            continue  # nothing to see, as with TopK, whose l0 is k everywhere
        grid.add_row(label, *[""] * len(names))
        for model in result.fits:
            grid.add_row(f"  {_COLUMNS[model]}", *(formatter(value) for (value,) in _rows_of(table, model, quantity)))
    show_table(grid)


def _rows_of(table: Any, model: str, *columns: str) -> list[tuple[float, ...]]:
    part = table[table["model"] == model]
    return [tuple(row) for row in part[list(columns)].to_numpy()]


def _bar(value: float) -> str:
    if math.isnan(value):
        return "-"
    level = min(len(_BARS) - 1, max(0, int(value * len(_BARS))))
    return f"{_BARS[level]}{value:.2f}".replace("0.", ".") if value > -10 else f"{_BARS[0]}<-9"


def _length(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _formatter(number_format: str) -> Callable[[float], str]:
    return lambda value: "-" if math.isnan(value) else number_format.format(value)


_BY_POSITION: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("explained variance", "explained_variance", _bar),
    ("loss added, nats", "ce_increase", _formatter("{:+.2f}")),
    ("active features", "l0", _length),
    ("length", "mean_norm", _length),
    ("at sinks", "sink_share", _formatter("{:.0%}")),
)


def _verdict(result: PairGate) -> list[str]:
    failed = [_COLUMNS[name] for name in result.fits if result.failed(name)]
    models = " and ".join(_COLUMNS[name] for name in result.fits)
    if result.ok:
        return [f"The SAE fits: {models}. No other way to read it is better."]
    lines = [
        f"The SAE does not fit: {' and '.join(failed)}." if failed else "The SAE fits, but something is not right."
    ]
    for change in result.changes:
        lines += [f"  found: {change.found}", f"  fix:   {change.fix}"]
    if result.mismatch is not None:
        score = "" if math.isnan(result.score_after) else f", CE loss score {result.score_after:.3f}"
        lines.append(f"  then:  explained variance {result.mismatch.after:.3f}{score}; --mend FOLDER saves such an SAE")
    if not result.changes:
        lines.append(
            "  No change that was tried mends it: another hook, scale, centring, normalisation, bias, BOS, TopK."
        )
    return lines
