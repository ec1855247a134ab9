"""`saeffect export`: features of a finished run as steering vectors, control vectors, lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeffect.cli.console import show
from saeffect.cli.run import RunFolder
from saeffect.errors import ConfigError
from saeffect.paths import user_path

__all__ = ["export"]


def export(
    run: RunFolder,
    out: Annotated[
        Path,
        typer.Option(
            help="File to write; its ending is the format: .safetensors, .gguf, .json or .csv.", parser=user_path
        ),
    ],
    arm: Annotated[str, typer.Option(help="Whose SAE the features are of.")] = "treatment",
    feature: Annotated[list[int] | None, typer.Option(help="A feature's number; give it again for more.")] = None,
    group: Annotated[str | None, typer.Option(help="domain, steered, or changed:N of the groups that changed.")] = None,
    dose: Annotated[
        float | None, typer.Option(help="In mean residual norms; by default that of the run's test.")
    ] = None,
) -> None:
    """Write features of a run for another program; several go into one vector or list."""
    from saeffect.study.export import FORMATS, export_features, group_of
    from saeffect.study.run_folder import RunFolder as Folder
    from saeffect.study.study import Study

    formats = {item.suffix: item for item in FORMATS.values()}
    if out.suffix not in formats:
        raise ConfigError(f"the ending {out.suffix!r} is no format.", at="--out", fix=f"use {', '.join(formats)}.")
    if bool(feature) == bool(group):
        raise ConfigError(
            "give features or a group.", at="--feature", fix="for example --feature 12, or --group domain."
        )
    folder = Folder(run, Study.open(run / "study.yaml"))
    chosen = list(feature or ()) or group_of(folder, arm, str(group))
    file_format = formats[out.suffix]
    export_features(folder, arm, chosen, out, kind=file_format.name, dose=dose)
    n_features = len(set(chosen))
    show(f"{out}: {file_format.label}, {n_features} feature{'s' if n_features > 1 else ''} of {arm}")
