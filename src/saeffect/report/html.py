"""The report: one self-contained HTML file, answer first, that loads nothing and trusts no string."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from saeffect.comparison import Comparison
from saeffect.io import atomic_path
from saeffect.lm.tokens import printable_text
from saeffect.report.context import ReportContext
from saeffect.report.evidence import Evidence, chance_views, evidence, fate_views, threat_views
from saeffect.report.feature_cards import feature_lists, showcase
from saeffect.report.figures import DrawnFigure, draw_figures
from saeffect.report.figures.style import inline_svg
from saeffect.report.numbering import Numbering, number_page
from saeffect.report.sources import sourced, sourced_figure
from saeffect.report.steering_section import SteeringSection, steering_section, steering_views
from saeffect.report.tables.paper import at_a_glance, contrast_table, paper_table_1, paper_table_2
from saeffect.report.tables.study import design_table, field_label, gate_table, same_in_every_arm
from saeffect.report.tables.view import TableView
from saeffect.report.traced import traced_paragraph
from saeffect.report.words.terms import Explainer, Term, terms

__all__ = ["render_report", "write_report"]

_TEMPLATES = ("report.html.j2", "pieces.html.j2", "chance.html.j2", "steering.html.j2", "fates.html.j2")
_TERMS_ALONE = ("showcase", "forest", "features")  # sections that use terms, and have no table of their own


@dataclass(frozen=True)
class _Explained:
    """A table or figure of the page, and the terms that appear in it for the first time."""

    table: TableView | None
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class _Picture:
    """A figure as the template places it."""

    figure: DrawnFigure
    svg: Markup


def write_report(
    comparison: Comparison,
    path: Path | str,
    *,
    context: ReportContext | None = None,
    figures: Sequence[DrawnFigure] | None = None,
) -> Path:
    """Write the report of a study, atomically.

    The page holds its own styles, pictures and script; it opens from a disk or a mail, loads nothing, and needs no
    script to be read. The same input gives the same bytes.

    Args:
        comparison: What was found.
        path: The file, for instance `runs/mine/report.html`.
        context: The study around the comparison; without it the report has no list of features.
        figures: What `write_figures` returned, to draw them once only.

    Returns:
        `path`, as a `Path`.
    """
    page = render_report(comparison, context=context, figures=figures)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return Path(path)


def render_report(
    comparison: Comparison,
    *,
    context: ReportContext | None = None,
    figures: Sequence[DrawnFigure] | None = None,
) -> str:
    """The report as a string; see `write_report`."""
    context = context or ReportContext()
    drawn = tuple(figures) if figures is not None else draw_figures(comparison, context)
    order = [str(name) for name in comparison.table1["arm"]]
    lists = feature_lists(context, order)
    script, style = _read("report.js"), _read("report.css") + _read("evidence.css")
    words, tables = evidence(comparison, context), _tables(comparison, context)
    steering = steering_section(comparison, context)
    views = [one.table for one in tables.values() if one.table is not None]
    pictures = _pictures(_shown(drawn, words, [view.name for view in views], steering))
    numbers = number_page(views, [one.figure for one in pictures.values()])
    return _environment(numbers).get_template("report.html.j2").render(
        context=context,
        title=context.title or f"What fine-tuning changed: {context.study}",
        answer=comparison.answer,
        paragraph=traced_paragraph(comparison.answer, _anchors(views)),
        evidence=words,
        tables=tables,
        pictures=pictures,
        design_summary=_design_summary(comparison),
        same=same_in_every_arm(comparison),
        steering=steering,
        lists=lists,
        showcase=showcase(lists),
        glossary=sorted(terms(context).values(), key=lambda term: term.name.lower()),
        provenance=tuple(_flat(context.provenance)),
        style=Markup(style),  # our own files: the only strings that are not escaped, with the figures
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    ) + "\n"  # fmt: skip


def _environment(numbers: Numbering) -> Environment:
    environment = Environment(
        loader=DictLoader({name: _read(name) for name in _TEMPLATES}),
        autoescape=True,
        finalize=_seen,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["numbers"] = numbers.labels
    environment.filters["refer"] = numbers.refer
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True}
    return environment


def _seen(value: Any) -> Any:
    """What a template writes, without anything that acts on the page around it; markup stays markup."""
    if isinstance(value, str):
        return type(value)(printable_text(value))
    return value


def _read(name: str) -> str:
    return resources.files("saeffect.report").joinpath("templates", name).read_text(encoding="utf-8")


def _tables(comparison: Comparison, context: ReportContext) -> dict[str, _Explained]:
    """Every table in page order, each with the terms that it is the first to use."""
    explain = Explainer(terms(context))
    views: list[tuple[TableView | None, tuple[str, ...], str]] = [
        (
            at_a_glance(comparison),
            (
                "feature",
                "top_tokens",
                "domain_feature",
                "pass",
                "coherence",
                "interval",
                "pp",
                "placebo_arm",
                "sae_noise",
                "false_alarm",
                "verdict",
            ),
            "glance",
        ),
        *chance_views(comparison, context),
        *steering_views(comparison, context),
        (None, ("feature", "top_tokens", "effect", "similarity", "pass"), "showcase"),
        (
            paper_table_1(comparison, context),
            ("dot_cosine", "paper_rule", "q"),
            "table1",
        ),
        (paper_table_2(comparison, context), ("coherence", "normalised", "coverage"), "table2"),
        (
            contrast_table(comparison),
            (
                "p",
                "newcombe",
                "fisher",
                "bootstrap",
                "hierarchical",
                "permutation",
                "did",
                "cliffs_delta",
                "activation",
                "density",
                "direct_effect",
            ),
            "contrasts",
        ),
        (None, ("coherence", "density", "activation", "direct_effect", "kl", "p", "q"), "features"),
        *fate_views(comparison, context),
        *threat_views(comparison, context),
        (design_table(comparison), (), "design"),
        (gate_table(comparison, context), ("explained_variance", "ce_loss_score", "l0", "dead"), "gate"),
    ]
    return {
        name: _Explained(sourced(view), explain.first(keys) if view is not None or name in _TERMS_ALONE else ())
        for view, keys, name in views
    }


def _shown(
    drawn: Sequence[DrawnFigure], words: Evidence, tables: Collection[str], steering: SteeringSection
) -> list[DrawnFigure]:
    """Figures that the page places: one that could not be drawn is left out where a sentence says the same."""
    said = {"fates_by_decoder", "fates_by_activation"} if words.limits["fates"] else set()
    missing = set()
    if steering.doses and "doses" not in tables:
        missing.add("doses")
    if "cross" not in tables:
        missing.add("cross_activity")
    return [one for one in drawn if one.name not in said and not (one.name in missing and one.figure is None)]


def _anchors(views: Sequence[TableView]) -> set[str]:
    """Ids that a number of the answer may link to."""
    rows = {f"row-{view.name}-{row.key}" for view in views for row in view.rows if row.key}
    return rows | {f"table-{view.name}" for view in views} | {"activity-summary"}


def _pictures(figures: Sequence[DrawnFigure]) -> dict[str, _Picture]:
    # matplotlib escaped every text when it wrote the SVG, and `inline_svg` adds none of its own.
    return {
        figure.name: _Picture(sourced_figure(figure), Markup(inline_svg(figure) if figure.figure else ""))
        for figure in figures
    }


def _design_summary(comparison: Comparison) -> str:
    """One line above the design check: how many differences there are that could pass for an effect."""
    table = comparison.design
    if "status" not in table.columns:
        return f"{int(table['differs'].sum())} properties differ between the arms."
    flaws = [field_label(name) for name in table.loc[table["status"] == "flaw", "field"]]
    unknown = int((table["status"] == "unknown").sum())
    if flaws:
        text = f"Besides the model, the arms differ in {', '.join(flaws)}: each of these could pass for an effect."
    else:
        text = "Besides the model, nothing that is recorded differs between the arms in a way that matters."
    if unknown:
        text += f" {unknown} {'property was' if unknown == 1 else 'properties were'} not recorded for every arm."
    return text


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as label-value pairs, sorted by label."""
    pairs: list[tuple[str, str]] = []
    for key in sorted(values, key=str):
        label, value = f"{prefix}{key}", values[key]
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{label} · ")
        elif isinstance(value, list | tuple):
            pairs.append((label, ", ".join(str(item) for item in value)))
        else:
            pairs.append((label, str(value)))
    return pairs
