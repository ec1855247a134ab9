"""The list of published SAEs: their names, locations on the hub, and facts that their files leave out.

It is a copy of SAELens' list, `bundled/published_saes.json.gz`, updated by scripts/refresh_published_saes.py. It lies
outside of `saeffect.sae`, which imports torch, so that listing names takes no seconds.
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

__all__ = ["SAELENS", "PublishedSae", "find_published", "list_source", "named_by_path", "published_saes"]

SAELENS = "saelens:"
_UNREADABLE = {
    "gemma_2_transcoder": "transcoder",
    "mwhanna_transcoder": "transcoder",
    "mntss_clt_layer_transcoder": "transcoder of many layers",
    "temporal": "temporal SAE, which reads many tokens at once",
}
_MANY = 8
# Hook by a part of the path: of Gemma Scope's repositories, of Gemma Scope 2's folders.
_SITES = {
    "res": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "att": "attn.hook_z",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "attn.hook_z",
}
_FIRST = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att)\b")
_SECOND = re.compile(r"gemma-scope-2-(\d+[mb])-(pt|it)\b")
_SITE = re.compile(r"/(resid_post|mlp_out|attn_out)(?:_all)?/")


@dataclass(frozen=True)
class PublishedSae:
    """An SAE in the list.

    Attributes:
        model: The hub id of the model that it was trained on.
        layout: SAELens' name for the layout of its files.
        path: A folder or a file in the repository.
        l0: Active features a token as its authors report, 0 if unknown.
        scale: Factor of the activations that is missing in its files, 0 for none.
        overrides: Keys that replace those of its cfg.json.
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
        """The name for study files and commands."""
        return f"{SAELENS}{self.release}/{self.id}"

    @property
    def not_read(self) -> str:
        """The kind of SAE, if this package does not read it; "" if it does."""
        if self.layout == "gemma_3" and re.search("transcoder|clt", self.path):
            return "transcoder"
        return _UNREADABLE.get(self.layout, "")

    @property
    def hook(self) -> str:
        """The hook, parsed from its names; "" if they do not contain it."""
        text = f"{self.repo}/{self.path}/"
        hook = named_by_path(text).get("hook_name") if self.layout in ("gemma_2", "gemma_3") else None
        if hook:
            return str(hook)
        match = re.search(
            r"blocks\.(\d+)\.((?:attn\.)?hook_(?:resid_pre|resid_mid|resid_post|attn_out|mlp_out|z))",
            f"{self.id} {self.path}",
        )
        if match:
            return f"blocks.{match[1]}.{'attn.hook_z' if match[2] == 'hook_z' else match[2]}"
        if llama := re.match(r"l(\d+)([ram])_", self.id):
            kind = {"r": "hook_resid_post", "a": "hook_attn_out", "m": "hook_mlp_out"}[llama[2]]
            return f"blocks.{llama[1]}.{kind}"
        layer = re.search(r"layer_?(\d+)", self.id)
        return f"blocks.{layer[1]}.hook_resid_post" if layer and not self.not_read else ""


def published_saes(
    model: str | None = None, *, release: str | None = None, layer: int | None = None, readable: bool = False
) -> list[PublishedSae]:
    """The listed SAEs, if given those of a model, of a release, at a block; `readable`: only those read here.

    `model` is a hub id, with or without its owner, in any case. UnknownName, with similar names, for a model or release
    that is not listed.
    """
    saes: Sequence[PublishedSae] = _read_list()[1]
    if release is not None:
        if release not in _releases():
            raise _unknown_error("release of SAEs", release, list(_releases()))
        saes = list(_releases()[release].values())
    if model is not None:
        model_name = model.lower()
        names = {sae.model for sae in saes if model_name in (sae.model.lower(), sae.model.lower().rpartition("/")[2])}
        if not names:
            raise _unknown_error("published SAE of a model", model, sorted({sae.model for sae in saes}))
        saes = [sae for sae in saes if sae.model in names]
    if layer is not None:
        saes = [sae for sae in saes if sae.hook.startswith(f"blocks.{layer}.")]
    return [sae for sae in saes if not (readable and sae.not_read)]


def find_published(
    name: str | None = None, *, repo: str = "", path: str = "", at: str | None = None
) -> PublishedSae | None:
    """The SAE of a name, `<release>/<id>` (UnknownName, with similar ones, if there is none), or the first with this
    repository and path, or None.
    """
    if name is None:
        return _by_path().get((repo, path))
    release, _, identity = name.partition("/")
    if release not in _releases():
        if identity:
            fix = f"for an SAE of your own on the hub write hf:{name}."
            raise _unknown_error("release of SAEs", release, list(_releases()), at=at, fix=fix)
        raise _unknown_error("release of SAEs", release, list(_releases()), at=at)
    ids = _releases()[release]
    if identity not in ids:
        raise _unknown_error(
            f"SAE in {release}", identity, list(ids), at=at, fix=f"saeffect saes --release {release} lists them."
        )
    return ids[identity]


def list_source() -> str:
    """The origin of the list."""
    return _read_list()[0]


def named_by_path(path: str) -> dict[str, Any]:
    """`model_name` and `hook_name`, as far as a path with forward slashes contains them.

    Example:
        >>> named_by_path("google/gemma-scope-9b-it-res/layer_20/width_16k/average_l0_47")
        {'model_name': 'google/gemma-2-9b-it', 'hook_name': 'blocks.20.hook_resid_post'}
    """
    metadata: dict[str, Any] = {}
    layer, site = re.search(r"layer_(\d+)", path), None
    if first := _FIRST.search(path):
        metadata["model_name"] = f"google/gemma-2-{first[1]}{'-it' if first[2] == 'it' else ''}"
        site = _SITES[first[3]]
        if "/embedding/" in f"{path}/":
            return metadata | {"hook_name": "blocks.0.hook_resid_pre", "of_embedding": True}
    elif second := _SECOND.search(path):
        # The smallest base model has no suffix on the hub.
        plain = second[1] == "270m" and second[2] == "pt"
        metadata["model_name"] = f"google/gemma-3-{second[1]}{'' if plain else '-' + second[2]}"
        site = _SITES[match[1]] if (match := _SITE.search(f"{path}/")) else None
    if layer and site:
        metadata["hook_name"] = f"blocks.{layer[1]}.{site}"
    return metadata


@functools.cache
def _read_list() -> tuple[str, tuple[PublishedSae, ...]]:
    raw = json.loads(gzip.decompress((BUNDLED_FOLDER / "published_saes.json.gz").read_bytes()))
    saes = []
    for release, fields in raw["releases"].items():
        for row in fields["saes"]:
            identity, path, l0, neuronpedia, scale = (*row, 0, 0, 0, 0)[:5]
            files = fields["model"], fields["repo"], path or identity, fields["layout"]
            facts = float(l0), float(scale), neuronpedia or "", fields.get("overrides", {})
            saes.append(PublishedSae(release, identity, *files, *facts))
    return raw["source"], tuple(saes)


@functools.cache
def _releases() -> dict[str, dict[str, PublishedSae]]:
    releases: dict[str, dict[str, PublishedSae]] = {}
    for sae in _read_list()[1]:
        releases.setdefault(sae.release, {})[sae.id] = sae
    return releases


@functools.cache
def _by_path() -> dict[tuple[str, str], PublishedSae]:
    return {(sae.repo, sae.path): sae for sae in reversed(_read_list()[1])}


def _unknown_error(
    kind: str, name: str, valid: Sequence[str], *, at: str | None = None, fix: str | None = None
) -> UnknownName:
    """As `unknown_name`, with only the most similar of many names."""
    if len(valid) <= _MANY:
        return unknown_name(kind, name, valid, at=at)
    close = difflib.get_close_matches(name, valid, n=5, cutoff=0.3)
    close += [other for other in valid if name and name.lower() in other.lower() and other not in close]
    similar = f"; similar: {', '.join(close[:_MANY])}" if close else ""
    return UnknownName(
        f"there is no {kind} {name!r} among {len(valid):,}{similar}.", at=at, fix=fix or "saeffect saes lists them."
    )
