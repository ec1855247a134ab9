"""`saeffect saes`: published SAEs that can be named in a study; `saeffect convert-sae`: pickled ones made readable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeffect.cli.console import show
from saeffect.errors import ConfigError
from saeffect.paths import user_path

if TYPE_CHECKING:
    from saeffect.published import PublishedSae

__all__ = ["convert_sae_command", "saes"]

_KINDS = {"hook_resid_pre": "resid_pre", "hook_resid_post": "resid_post", "hook_resid_mid": "resid_mid"}
_WIDTH = 80  # of a terminal


def saes(
    model: Annotated[
        str | None, typer.Option(help="SAEs of this model, such as google/gemma-2-2b or gemma-2-2b.")
    ] = None,
    release: Annotated[str | None, typer.Option(help="Every SAE of this release, by the name to write.")] = None,
    layer: Annotated[int | None, typer.Option(help="Only SAEs of this block, from 0.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also transcoders and other kinds, which are not read.")
    ] = False,
) -> None:
    """Published SAEs: models; or a model's releases; or a release's SAEs."""
    from saeffect.published import list_source, published_saes

    listed = published_saes(model, release=release, layer=layer, readable=not everything)
    all_kinds = published_saes(model, release=release, layer=layer)
    if release is not None or (layer is not None and model is not None):
        _show_saes(listed)
    elif model is not None:
        _show_releases(listed)
    else:
        _show_models(listed)
    n_hidden = len(all_kinds) - len(listed)
    if n_hidden:
        show(f"{n_hidden:,} transcoders and other kinds are left out, as they are not read (--all).")
    show(f"From {list_source()}.")


def convert_sae_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A pickled state dict (.pt), a folder with ae.pt or any SAE, or a name as in a study.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the SAE, in SAELens' layout.", parser=user_path)],
    hook: Annotated[str | None, typer.Option(help="Where it reads, such as blocks.8.hook_resid_post.")] = None,
    model: Annotated[str | None, typer.Option(help="The hub id of the model that it was trained on.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Active features of a TopK SAE that does not say.")] = None,
) -> None:
    """Write an SAE in SAELens' layout; from a pickled file weights alone are read, and nothing is run."""
    from saeffect.lm.hooks import parse_hook
    from saeffect.sae.convert import convert_sae
    from saeffect.sae.formats import read_sae_config

    if hook is not None:
        parse_hook(hook, at="--hook")
    recorded = {"hook_name": hook, "model_name": model}
    facts = {"k": k, "metadata": {key: value for key, value in recorded.items() if value}}
    folder = convert_sae(source, out, facts=facts)
    cfg = read_sae_config(folder)
    show(f"SAE: {folder.resolve()}")
    hook_text = cfg.hook_name or "a hook that its files do not name: add hook: to the study's arm"
    show(f"{cfg.architecture}, {cfg.d_in:,} wide, {cfg.d_sae:,} features, reads {hook_text}")


def _show_models(saes: list[PublishedSae]) -> None:
    from collections import Counter

    if not saes:
        raise ConfigError("no published SAE reads there.", at="--layer", fix="leave --layer out.")
    counts = Counter(sae.model for sae in saes)
    show("Published SAEs by model:")
    rows = []
    for name, n in sorted(counts.items(), key=lambda item: item[0].lower()):
        releases = len({sae.release for sae in saes if sae.model == name})
        rows.append((name, f"{n:>6,} in {releases} release{'s' if releases > 1 else ''}"))
    _show_columns(rows)
    show("A model's releases: saeffect saes --model NAME.")


def _show_releases(saes: list[PublishedSae]) -> None:
    by_release: dict[str, list[PublishedSae]] = {}
    for sae in saes:
        by_release.setdefault(sae.release, []).append(sae)
    rows = []
    for release, group in by_release.items():
        reads = sorted({_KINDS.get(kind := sae.hook.partition(".")[2].partition(".")[2], kind) for sae in group})
        blocks = sorted({int(sae.hook.split(".")[1]) for sae in group if sae.hook})
        where = f"{', '.join(filter(None, reads)) or '-'}  blocks {_ranges(blocks)}"
        rows.append((release, f"{len(group):>4,}  {where}{_l0(group)}"))
    _show_columns(rows)
    if by_release:
        first = next(iter(by_release.values()))[0]
        show(f"In a study: sae: {first.name}")
        show("A release's SAEs: saeffect saes --release NAME. One block's of all: --layer N.")
    else:
        show("None that are read.")


def _show_columns(rows: list[tuple[str, str]]) -> None:
    """Show names and facts in two columns of `_WIDTH` characters; facts go below a name that is too long."""
    room = _WIDTH - 2 - max((len(facts) for _, facts in rows), default=0)
    width = max((len(name) for name, _ in rows if len(name) <= room), default=0)
    for name, facts in rows:
        fits = len(name) <= width
        if not fits:
            show(name)
        show(f"{name if fits else '':<{width}}  {facts}")


def _show_saes(saes: list[PublishedSae]) -> None:
    by_release: dict[str, list[PublishedSae]] = {}
    for sae in saes:
        by_release.setdefault(sae.release, []).append(sae)
    for group in by_release.values():
        show(group[0].name.removesuffix(group[0].id))
        facts = [f"not read: {sae.not_read}" if sae.not_read else sae.hook + _l0([sae]) for sae in group]
        _show_columns([(f"  {sae.id}", text) for sae, text in zip(group, facts, strict=True)])
    if saes:
        show("In a study, release and SAE:")
        show(f"  sae: {saes[0].name}")
    else:
        show("None that are read.")


def _l0(saes: list[PublishedSae]) -> str:
    values = sorted(sae.l0 for sae in saes if sae.l0)
    if not values:
        return ""
    return f"  l0 {values[0]:g}" + (f" to {values[-1]:g}" if values[-1] != values[0] else "")


def _ranges(numbers: list[int]) -> str:
    """Rising whole numbers, with consecutive ones as ranges.

    Example:
        >>> _ranges([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "-"
