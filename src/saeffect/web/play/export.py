"""Downloads of features for other programs, as `saeffect export` writes them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fastapi import APIRouter, Query, Request, Response

from saeffect.errors import ConfigError, unknown_name
from saeffect.study.export import FORMATS, export_features, group_of

__all__ = ["router"]

router = APIRouter()
_TYPES = {".json": "application/json", ".csv": "text/csv; charset=utf-8"}
_MOST = 5_000


@router.get("/api/export")
def _export(
    request: Request,
    arm: str,
    format: str,
    feature: list[int] = Query(default=[]),  # noqa: B008
    group: str = "",
    dose: float | None = None,
) -> Response:
    """A file of features of an arm: `?arm=…&feature=…&feature=…&format=safetensors&dose=…`, or `group=domain`."""
    run = request.app.state.site.run
    run.study.arm(arm)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS, at="format")
    if bool(feature) == bool(group):
        raise ConfigError("give features or a group.", at="feature", fix="for example feature=12, or group=domain.")
    chosen = feature or group_of(run, arm, group)
    if len(chosen) > _MOST:
        raise ConfigError(
            f"{len(chosen):,} features are too many for one file.", at="group", fix="use saeffect export."
        )
    found = FORMATS[format]
    named = group.replace(":", "-") or "-".join(map(str, chosen[:4])) + ("-and-more" if len(chosen) > 4 else "")
    with tempfile.TemporaryDirectory(prefix="saeffect-") as folder:
        file = Path(folder) / f"file{found.suffix}"
        export_features(run, arm, chosen, file, kind=format, dose=dose if found.has_dose else None)
        data = file.read_bytes()
    # Names of arms may hold anything; a header may not.
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in f"{arm}-{named}")
    return Response(
        data,
        media_type=_TYPES.get(found.suffix, "application/octet-stream"),
        headers={"Content-Disposition": f'attachment; filename="{name}{found.suffix}"'},
    )
