"""The list of published SAEs: names, where each lies on the hub, and what its files do not say.

It is a copy of SAELens' list, `bundled/published_saes.json.gz`, which scripts/refresh_published_saes.py renews.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saeffect.errors import UnknownName, unknown_name
from saeffect.paths import BUNDLED_FOLDER
from saeffect.sae.formats.gemma_scope import named_by_path

__all__ = ["SAELENS", "PublishedSae", "find_published", "list_source", "published_saes"]

SAELENS = "saelens:"
_UNREADABLE = {
    "gemma_2_transcoder": "transcoder",
    "mwhanna_transcoder": "transcoder",
    "mntss_clt_layer_transcoder": "transcoder of many layers",
    "temporal": "temporal SAE, which reads many tokens at once",
}
_MANY = 8


@dataclass(frozen=True)
class PublishedSae:
    """An SAE in the list.

    Attributes:
        model: The hub id of the model that it was trained on.
        layout: SAELens' name for how its files are laid out.
        path: In the repository; a folder, or a file.
        l0: Active features a token as the authors say, 0 if they do not.
        scale: Factor of the activations that its files leave out, 0 for none.
        overrides: Keys of its cfg.json that count before those in the file.
        neuronpedia_id: Its page at Neuronpedia, "" for none.
    """

    release: str
    id: str
    model: str
    repo: str
    path: str
    layout: str
    l0: float = 0.0
    scale: float = 0.0
    neuronpedia_id: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """What to write in a study file."""
        return f"{SAELENS}{self.release}/{self.id}"

    @property
    def not_read(self) -> str:
        """Why this package does not read it; "" if it does."""
        if self.layout == "gemma_3" and re.search("transcoder|clt", self.path):
            return "transcoder"
        return _UNREADABLE.get(self.layout, "")

    @property
    def hook(self) -> str:
        """The hook as far as its names tell; "" for none."""
        text = f"{self.repo}/{self.path}/"
        named = named_by_path(text).get("hook_name") if self.layout in ("gemma_2", "gemma_3") else None
        if named:
            return str(named)
        known = re.search(
            r"blocks\.(\d+)\.((?:attn\.)?hook_(?:resid_pre|resid_mid|resid_post|attn_out|mlp_out|z))",
            f"{self.id} {self.path}",
        )
        if known:
            return f"blocks.{known[1]}.{'attn.hook_z' if known[2] == 'hook_z' else known[2]}"
        if llama := re.match(r"l(\d+)([ram])_", self.id):
            kind = {"r": "hook_resid_post", "a": "hook_attn_out", "m": "hook_mlp_out"}[llama[2]]
            return f"blocks.{llama[1]}.{kind}"
        layer = re.search(r"layer_?(\d+)", self.id)
        return f"blocks.{layer[1]}.hook_resid_post" if layer and not self.not_read else ""


def published_saes(
    model: str | None = None, *, release: str | None = None, layer: int | None = None, readable: bool = False
) -> list[PublishedSae]:
    """The list, or what it has for a model, in a release, at a block; `readable`: without what is not read here.

    `model` is a hub id, with or without its owner, in any case of letters. UnknownName, with similar ones, for a model
    or release that the list does not have.
    """
    found: Sequence[PublishedSae] = _table()[1]
    if release is not None:
        if release not in _releases():
            raise _unknown("release of SAEs", release, list(_releases()))
        found = list(_releases()[release].values())
    if model is not None:
        wanted = model.lower()
        names = {sae.model for sae in found if wanted in (sae.model.lower(), sae.model.lower().rpartition("/")[2])}
        if not names:
            raise _unknown("published SAE of a model", model, sorted({sae.model for sae in found}))
        found = [sae for sae in found if sae.model in names]
    if layer is not None:
        found = [sae for sae in found if sae.hook.startswith(f"blocks.{layer}.")]
    return [sae for sae in found if not (readable and sae.not_read)]


def find_published(
    name: str | None = None, *, repo: str = "", path: str = "", at: str | None = None
) -> PublishedSae | None:
    """The SAE of a name, `<release>/<id>` (UnknownName, with similar ones, if there is none), or the first with this
    repository and path, or None.
    """
    if name is None:
        return _places().get((repo, path))
    release, _, identity = name.partition("/")
    if release not in _releases():
        if identity:
            fix = f"for an SAE of your own on the hub write hf:{name}."
            raise _unknown("release of SAEs", release, list(_releases()), at=at, fix=fix)
        raise _unknown("release of SAEs", release, list(_releases()), at=at)
    ids = _releases()[release]
    if identity not in ids:
        raise _unknown(
            f"SAE in {release}", identity, list(ids), at=at, fix=f"saeffect saes --release {release} lists them."
        )
    return ids[identity]


def list_source() -> str:
    """Where the list comes from."""
    return _table()[0]


@functools.cache
def _table() -> tuple[str, tuple[PublishedSae, ...]]:
    raw = json.loads(gzip.decompress((BUNDLED_FOLDER / "published_saes.json.gz").read_bytes()))
    found = []
    for release, of in raw["releases"].items():
        for row in of["saes"]:
            identity, path, l0, neuronpedia, scale = (*row, 0, 0, 0, 0)[:5]
            found.append(
                PublishedSae(
                    release,
                    identity,
                    of["model"],
                    of["repo"],
                    path or identity,
                    of["layout"],
                    float(l0),
                    float(scale),
                    neuronpedia or "",
                    of.get("overrides", {}),
                )
            )
    return raw["source"], tuple(found)


@functools.cache
def _releases() -> dict[str, dict[str, PublishedSae]]:
    found: dict[str, dict[str, PublishedSae]] = {}
    for sae in _table()[1]:
        found.setdefault(sae.release, {})[sae.id] = sae
    return found


@functools.cache
def _places() -> dict[tuple[str, str], PublishedSae]:
    return {(sae.repo, sae.path): sae for sae in reversed(_table()[1])}


def _unknown(
    kind: str, name: str, valid: Sequence[str], *, at: str | None = None, fix: str | None = None
) -> UnknownName:
    """As `unknown_name`, with the nearest few of many names."""
    if len(valid) <= _MANY:
        return unknown_name(kind, name, valid, at=at)
    near = difflib.get_close_matches(name, valid, n=5, cutoff=0.3)
    near += [other for other in valid if name and name.lower() in other.lower() and other not in near][
        : _MANY - len(near)
    ]
    similar = f"; similar: {', '.join(near)}" if near else ""
    return UnknownName(
        f"there is no {kind} {name!r} among {len(valid):,}{similar}.", at=at, fix=fix or "saeffect saes lists them."
    )
