"""`saeffect label`: labels of a run's features by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from saeffect.cli.console import ConsoleProgress, show
from saeffect.cli.run import RunFolder
from saeffect.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from saeffect.study.label import Cost

__all__ = ["label"]

_MAX_LABELS = 50


def label(
    run: RunFolder,
    arm: Annotated[str | None, typer.Option(help="Whose features; the treatment's by default.")] = None,
    features: Annotated[
        str, typer.Option(help="Numbers such as 12,55, or a group: domain, steered, or changed:N of what changed.")
    ] = "domain",
    domain: Annotated[bool, typer.Option("--domain", help="The arm's domain features, as by default.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Features of a group at most.")] = 50,
    contexts: Annotated[int, typer.Option(min=1, help="Of each kind, active and silent, to score a label on.")] = 10,
    per_request: Annotated[int, typer.Option(min=1, help="Contexts in one request.")] = 5,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests at a time.")] = 4,
    thinking: Annotated[int, typer.Option(min=0, help="Tokens that a model may think before each answer.")] = 0,
    price: Annotated[
        tuple[float, float] | None, typer.Option(metavar="IN OUT", help="Prices of a million tokens, in and out.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send without asking.")] = False,
) -> None:
    """Label features by a language model, after its cost is confirmed."""
    from saeffect.study.label import label as label_run
    from saeffect.study.label import label_file
    from saeffect.study.label_contexts import LabelPlan

    if domain and features != "domain":
        raise ConfigError("features and --domain exclude each other.", at="--features", fix="leave one of them out.")
    parts = [part.strip() for part in features.split(",")]
    chosen = [int(part) for part in parts] if all(part.isascii() and part.isdigit() for part in parts) else features
    plan = LabelPlan(contexts=contexts, per_request=per_request, parallel=parallel, thinking=thinking)

    with ConsoleProgress() as log:
        labels = label_run(
            run,
            arm=arm,
            features=chosen,
            limit=limit,
            plan=plan,
            confirm=lambda cost: _confirm(cost, price, log, yes=yes),
            log=log,
        )
    if labels.empty:
        show("Nothing was sent.")
        return
    _show_labels(labels)
    show(f"In {label_file(run, 'ARM').parent.resolve()}, apart from people's labels; saeffect serve shows both.")


def _confirm(cost: Cost, price: tuple[float, float] | None, log: ConsoleProgress, *, yes: bool) -> bool:
    with log.paused():
        _show_cost(cost, price)
        try:
            return yes or not cost.requests or typer.confirm("Send?")
        except typer.Abort:  # no terminal, or Ctrl-C
            raise ConfigError("nothing was sent, as nobody said yes.", at="--yes", fix="add --yes.") from None


def _show_cost(cost: Cost, price: tuple[float, float] | None) -> None:
    from saeffect.report.words.numbers import count, plural

    show(f"To {cost.url}, model {cost.model}: top tokens and contexts of {plural(cost.n_features, 'feature')},")
    show(f"and {count(cost.n_contexts)} contexts more to score their labels on. Nothing else of the run is sent.")
    answered = f"; {count(cost.kept)} were answered before" if cost.kept else ""
    show(f"At most {plural(cost.requests, 'request')}{answered}.")
    if cost.requests:
        total = (cost.tokens_in * price[0] + cost.tokens_out * price[1]) / 1e6 if price else 0
        at_most = f": at most about {total:,.4g} at these prices" if price else ""
        show(f"About {count(cost.tokens_in)} tokens in, at most {count(cost.tokens_out)} out{at_most}.")


def _show_labels(labels: pd.DataFrame) -> None:
    from saeffect.report.words.numbers import count, fixed, interval, plural
    from saeffect.stats.student import mean_interval

    for row in labels.head(_MAX_LABELS).to_dict("records"):
        score = "undefined" if row["reason"] else f"{fixed(row['accuracy'], 2)} {interval(row['low'], row['high'], 2)}"
        show(f"{row['feature']:>7}  {score:<18}  {row['label']}" + (f" ({row['reason']})" if row["reason"] else ""))
    if len(labels) > _MAX_LABELS:
        show(f"… and {count(len(labels) - _MAX_LABELS)} more.")
    accuracies = labels["accuracy"].dropna().to_numpy()
    mean = mean_interval(accuracies)
    interval_text = f" {interval(mean.low, mean.high, 2)}" if mean.defined else ""
    n = len(accuracies)
    average = f"{fixed(mean.value, 2)}{interval_text} on average over {count(n)}" if n else "undefined for all"
    n_labels = int((labels["label"] != "").sum())
    show(f"{plural(n_labels, 'label')}. Detection (balanced accuracy, 0.5 is chance): {average}.")
