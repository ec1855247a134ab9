"""The report as one self-contained HTML file: it starts with the answer, loads nothing and escapes every string."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import BytecodeCache, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from saeffect.comparison import Comparison
from saeffect.errors import ConfigError
from saeffect.io import atomic_path
from saeffect.lm.tokens import printable_text
from saeffect.report.cards import feature_lists, showcase
from saeffect.report.context import ReportContext
from saeffect.report.figures import DrawnFigure, draw_figures
from saeffect.report.figures.style import inline_svg
from saeffect.report.sections import Evidence, SteeringSection, evidence, steering_section, traced_paragraph
from saeffect.report.tables import TABLES, TableView
from saeffect.report.tables.study import field_label, same_in_every_arm
from saeffect.report.words.causes import crossed_sentences
from saeffect.report.words.learned import learned
from saeffect.report.words.names import Explainer, Term, terms
from saeffect.report.words.numbers import THIN_SPACE

__all__ = [
    "Numbering",
    "number_page",
    "page_environment",
    "page_style",
    "page_tokens",
    "render_body",
    "render_early",
    "render_report",
    "script_hash",
    "write_report",
]

_EARLY_FIGURES = ("learned", "where", "written", "put_back")


class _TemplateCache(BytecodeCache):
    """Templates compiled by this process, shared by the environments of all pages."""

    def __init__(self) -> None:
        self._code: dict[str, tuple[str, Any]] = {}

    def load_bytecode(self, bucket: Any) -> None:
        checksum, code = self._code.get(bucket.key, ("", None))
        bucket.code = code if checksum == bucket.checksum else None

    def dump_bytecode(self, bucket: Any) -> None:
        self._code[bucket.key] = (bucket.checksum, bucket.code)


_TEMPLATE_CACHE = _TemplateCache()
_REFERENCE = re.compile(r"\[\[((?:table|figure):\w+)\]\]")


@dataclass(frozen=True)
class _ExplainedTable:
    """A table of the page (or None), and the terms that first appear there."""

    table: TableView | None
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class _Picture:
    figure: DrawnFigure
    svg: Markup


def write_report(
    comparison: Comparison,
    path: Path | str,
    *,
    context: ReportContext | None = None,
    figures: Sequence[DrawnFigure] | None = None,
) -> Path:
    """Write the report of a study, atomically; ConfigError if the comparison has no answer yet.

    The page loads nothing and can be read without scripts; the same input gives the same bytes. `figures` are those of
    `write_figures` (None: draw them here). Without `context` the page has no list of features.
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
    numbers, values = _content(comparison, context, figures, listed=True)
    script, style = _read("report.js"), page_style()
    return page_environment(numbers).get_template("report.html.j2").render(
        **values,
        features_at="#features",
        style=Markup(style),  # our own files; only they and the figures are not escaped
        script=Markup(script),
        script_hash=script_hash(),
    ) + "\n"  # fmt: skip


def render_body(
    comparison: Comparison, *, context: ReportContext | None = None, features_at: str = "#features"
) -> Markup:
    """The report's sections without head, style, script and list of features, for a page that has its own; the features
    are at `features_at`. Arguments and errors as `write_report`.
    """
    numbers, values = _content(comparison, context or ReportContext(), None, listed=False)
    return Markup(page_environment(numbers).get_template("body.html.j2").render(**values, features_at=features_at))


def render_early(comparison: Comparison, *, context: ReportContext) -> Markup:
    """Like `render_body`, before the comparison is made: the quality of the SAEs, and what changed. Reads only
    `matches`, and arms and roles of `table1`, of `comparison`; gate and settings of `context`.
    """
    explain, tables = Explainer(terms(context)), {}
    for name in ("learned", "openings", "pushed", "gate"):
        view = TABLES[name](comparison, context)
        tables[name] = _ExplainedTable(view, explain.first(view.terms) if view is not None else ())
    further = comparison.matches.further
    figures = draw_figures(comparison, context, only=_EARLY_FIGURES) if further else ()
    drawn = [figure for figure in figures if figure.figure is not None]
    numbers = number_page([entry.table for entry in tables.values() if entry.table is not None], drawn)
    summary = learned(further, context.domain, alpha=context.alpha) if further else None
    template = page_environment(numbers).get_template("early.html.j2")
    pictures = {figure.name: _Picture(figure, Markup(inline_svg(figure))) for figure in drawn}
    return Markup(template.render(learned=summary, tables=tables, pictures=pictures))


def script_hash() -> str:
    """The hash of the report's script, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(_read("report.js").encode()).digest()).decode()


def _content(
    comparison: Comparison, context: ReportContext, figures: Sequence[DrawnFigure] | None, *, listed: bool
) -> tuple[Numbering, dict[str, Any]]:
    """The numbering of tables and figures, and the values of the templates; `listed`: with the list of features."""
    if not comparison.answer["headline"]:
        raise ConfigError("the comparison has not been put into words.", at="comparison", fix="call with_answer first.")
    drawn = tuple(figures) if figures is not None else draw_figures(comparison, context)
    lists = feature_lists(context, [str(name) for name in comparison.table1["arm"]], for_showcase=not listed)
    sentences, tables = evidence(comparison, context), _tables(comparison, context)
    steering, further = steering_section(comparison, context), comparison.matches.further
    views = [entry.table for entry in tables.values() if entry.table is not None]
    pictures = _pictures(drawn, sentences, [view.name for view in views], steering)
    return number_page(views, [picture.figure for picture in pictures.values()]), {
        "context": context,
        "title": context.title or f"What fine-tuning changed: {context.study}",
        "answer": comparison.answer,
        "one_sae": any(arm.facts.same_sae for arm in context.arms.values()),
        "crossed": crossed_sentences(further["factorial"]) if "factorial" in further else [],
        "learned": learned(further, context.domain, alpha=context.alpha),
        "paragraph": traced_paragraph(comparison.answer, _anchors(views)),
        "evidence": sentences,
        "threats": len(comparison.threats),
        "tables": tables,
        "pictures": pictures,
        "design_summary": _design_summary(comparison),
        "same": same_in_every_arm(comparison),
        "steering": steering,
        "lists": lists,
        "showcase": showcase(lists),
        "glossary": sorted(terms(context).values(), key=lambda term: term.name.lower()),
        "provenance": tuple(_flatten(context.provenance)),
    }


def page_style(*, tokens: bool = True) -> str:
    """The style sheet of a page, by default with its `page_tokens`."""
    return (page_tokens() if tokens else "") + _read("report.css") + _read("evidence.css")


def page_tokens() -> str:
    """The colours and type that the report and the web app share, as a style sheet."""
    return _read("tokens.css")


def page_environment(numbers: Numbering | None = None) -> Environment:
    """The templates, which escape every string; `numbers` are the labels of a page's tables and figures."""
    numbers = numbers or Numbering({})
    environment = Environment(
        loader=PackageLoader("saeffect.report"),
        bytecode_cache=_TEMPLATE_CACHE,
        autoescape=True,
        finalize=_make_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["numbers"] = numbers.labels
    environment.globals["placed"] = {"tables": set[str](), "figures": set[str]()}  # shown on the page so far
    environment.filters["refer"] = numbers.refer
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True}
    return environment


def _make_visible(value: Any) -> Any:
    """Make control and bidirectional characters visible in a template's output; markup stays markup."""
    if not isinstance(value, str):
        return value
    visible = printable_text(value)
    return value if visible is value else type(value)(visible)


def _read(name: str) -> str:
    return resources.files("saeffect.report").joinpath("templates", name).read_text(encoding="utf-8")


def _tables(comparison: Comparison, context: ReportContext) -> dict[str, _ExplainedTable]:
    """Tables (and sections without one) in page order, each with the terms that it is the first to use."""
    steered = bool((comparison.table1["tested"] > 0).any())
    forest = ("forest", "interval", "pass", "q", *(("common_noise",) if context.steering else ()))
    sections = {
        "outcomes": ("forest", forest if steered else ()),
        "table1": ("showcase", ("feature", "top_tokens", "effect", "similarity", "pass")),
        "fates": ("features", ("coherence", "density", "activation", "direct_effect", "kl", "p", "q")),
    }
    explain = Explainer(terms(context))
    tables = {}
    for name, make_view in TABLES.items():
        if name in sections:
            section, keys = sections[name]
            tables[section] = _ExplainedTable(None, explain.first(keys))
        view = make_view(comparison, context)
        tables[name] = _ExplainedTable(view, explain.first(view.terms) if view is not None else ())
    return tables


def _pictures(
    drawn: Iterable[DrawnFigure], sentences: Evidence, tables: Collection[str], steering: SteeringSection
) -> dict[str, _Picture]:
    """Figures of the page, without undrawn ones whose reason a sentence gives already."""
    explained = {"fates_by_decoder", "fates_by_activation"} if sentences.limits["fates"] else set()
    unmentioned = {"doses"} if steering.doses and "doses" not in tables else set()
    unmentioned |= set() if "cross" in tables else {"cross_activity"}
    unmentioned |= {"learned", "where", "written", "put_back", "crossed"}  # not measured: no mention
    return {
        figure.name: _Picture(figure, Markup(inline_svg(figure) if figure.figure else ""))
        for figure in drawn
        if figure.name not in explained and (figure.figure is not None or figure.name not in unmentioned)
    }  # safe as markup: matplotlib escapes text in SVG, and `inline_svg` adds none


def _anchors(views: Sequence[TableView]) -> set[str]:
    rows = {f"row-{view.name}-{row.key}" for view in views for row in view.rows if row.key}
    return rows | {f"table-{view.name}" for view in views} | {"activity-summary"}


def _design_summary(comparison: Comparison) -> str:
    """One sentence above the design check: how many differences could be mistaken for an effect."""
    table = comparison.design
    flaws = [field_label(name) for name in table.loc[table["status"] == "flaw", "field"]]
    unknown = int((table["status"] == "unknown").sum())
    text = "Besides the model, nothing that is recorded differs between the arms in a way that matters."
    if flaws:
        text = f"Besides the model, the arms differ in {', '.join(flaws)}: each of these could pass for an effect."
    if unknown:
        text += f" {unknown} {'property was' if unknown == 1 else 'properties were'} not recorded for every arm."
    return text


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key in sorted(values, key=str):
        label, value = f"{prefix}{key}", values[key]
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{label} · ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            pairs.append((label, text))
    return pairs


@dataclass(frozen=True)
class Numbering:
    """Labels of a page, e.g. `labels["table:power"]` is "Table 4"; a text refers to it as `[[table:power]]`."""

    labels: Mapping[str, str]

    def refer(self, text: str) -> Markup:
        """A text with its references as links and no break before "%"; everything else is escaped.

        Example:
            >>> Numbering({"table:power": "Table 4"}).refer("See [[table:power]] & more.")
            Markup('See <a class="ref" href="#table-power">Table\\xa04</a> &amp; more.')
        """
        pieces = _REFERENCE.split(text.replace(" %", f"{THIN_SPACE}%"))  # alternately text and name
        return Markup("").join(self._link(piece) if i % 2 else escape(piece) for i, piece in enumerate(pieces))

    def _link(self, key: str) -> Markup:
        if key not in self.labels:
            return Markup("a part that this report lacks")
        label = self.labels[key].replace(" ", "\u00a0")
        return Markup('<a class="ref" href="#{}">{}</a>').format(key.replace(":", "-"), label)


def number_page(tables: Iterable[TableView], figures: Iterable[DrawnFigure]) -> Numbering:
    """Number tables and figures in page order; figures of one group share a number and differ by letter."""
    labels = {f"table:{view.name}": f"Table {n}" for n, view in enumerate(tables, start=1)}
    groups = groupby(figures, key=lambda figure: figure.group or figure.name)
    for n, (_, group) in enumerate(groups, start=1):
        members = list(group)
        for index, figure in enumerate(members):
            labels[f"figure:{figure.name}"] = f"Figure {n}{_letter(index) if len(members) > 1 else ''}"
    return Numbering(labels)


def _letter(index: int) -> str:
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)
