"""`saeffect check`: validate a study without running a model; and the page of its keys."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from saeffect.cli.console import ConsoleProgress, keys_option, show
from saeffect.cli.run import Out, StudyFile

__all__ = ["check", "study_keys"]

_HEAD = """# The keys of a study file

What `saeffect run`, `saeffect check` and the commands of single stages read from a YAML file. Unknown and repeated keys
are refused. What steering does and measures is explained in [steering.md](steering.md), how things are tested in
[statistics.md](statistics.md). This page is what `saeffect check --keys` prints.

Paths in the file are relative to the file; those typed on the command line are relative to the current folder. A name
such as `gpt2` or `org/name` is a hub id, unless a file or folder of that name is beside the study file. Names that come
with the package (`medical`, `glove-wiki-gigaword-100`) are never taken for files: write `./medical` for yours. Paths in
a bundled study are relative to the current folder.
"""


def study_keys() -> str:
    """The keys of a study file as a Markdown page: a table for the file and one per kind of mapping in it."""
    from saeffect import config
    from saeffect.config_keys import keys_table
    from saeffect.steering import BASELINES, OUTCOMES, PLACEBOS

    # Keys whose names are registered, not listed in the model.
    registered: dict[str, Iterable[str]] = {"placebos": PLACEBOS, "baselines": BASELINES, "outcomes": OUTCOMES}

    def names(key: str) -> str:
        return f"Any of {', '.join(registered[key])}." if key in registered else ""

    sections = (
        ("The file", config.StudyConfig),
        ("each of `arms`", config.ArmConfig),
        ("`model`: a name, or a mapping", config.ModelConfig),
        ("`text`", config.TextConfig),
        ("each of `text.sources`", config.TextSource),
        ("`gate`", config.GateConfig),
        ("`features`", config.FeaturesConfig),
        ("`coherence`", config.CoherenceConfig),
        ("`selection`", config.SelectionConfig),
        ("`changes`", config.ChangesConfig),
        ("`put_back`: a mapping, or `null` for a study without it", config.PutBackConfig),
        ("`push`: a mapping, or `null` for a study without it", config.PushConfig),
        ("`steering`: a mapping, or `null` for a study without it", config.SteeringConfig),
        ("`comparison`", config.ComparisonConfig),
    )
    tables = [keys_table(title, model, more=names) for title, model in sections]
    end = "`training` has the keys of a [recipe](recipe.md), without `model` and `hook`.\n"
    return "\n".join([_HEAD, *tables, end])


def check(
    study: StudyFile,
    out: Out = None,
    keys: Annotated[bool, keys_option("Show the keys of a study file.", "saeffect.cli.check:study_keys")] = False,
) -> None:
    """Names, files, shapes, tokenizers, disk, and the design check."""
    del keys
    from saeffect.study.check import check_study
    from saeffect.study.study import Study

    with ConsoleProgress() as log:
        opened = Study.open(study)
        result = check_study(opened, out or Path("runs") / opened.config.name, log)
    for line in result.lines:
        show(f"!!  {line}" if line.startswith("warning: ") else f"ok  {line}")
    show("text: the first rows of each source")
    for line in result.text:
        show(f"    {line}")
    _show_design(result.design)


def _show_design(design: Any) -> None:
    notable = design[design["status"].isin(["flaw", "unknown", "intended"])]
    marks = {"flaw": "!! ", "unknown": "?  ", "intended": "-- "}
    show("design check: in what the arms differ besides the model")
    if notable.empty:
        show("    in nothing")
    arms = [c for c in design.columns if c not in ("field", "differs", "status", "matters")]
    for row in notable.to_dict("records"):
        values = ", ".join(f"{arm}: {row[arm] or 'not recorded'}" for arm in arms)
        show(f"{marks[row['status']]} {row['field']} ({values})")
        show(f"    {row['matters']}")
