"""Rewrite the list of published SAEs from the one in an installed sae-lens (MIT licence), which is not imported.

    python scripts/refresh_published_saes.py [path of pretrained_saes.yaml]

Without a path the file is looked up in this environment. The result is `src/saeffect/bundled/published_saes.json.gz`.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).parents[1] / "src" / "saeffect" / "bundled" / "published_saes.json.gz"
# TransformerLens' names of models, and their names on the hub.
MODELS = {
    "gpt2-small": "openai-community/gpt2",
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
}


def main() -> None:
    """Write the list."""
    version = importlib.metadata.version("sae-lens")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else _installed()
    raw = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    releases = {name: _release(name, release) for name, release in sorted(raw.items())}
    table = {"source": f"sae-lens {version}, pretrained_saes.yaml, MIT licence", "releases": releases}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    OUT.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    n = sum(len(release["saes"]) for release in releases.values())
    print(f"{OUT}: {len(releases)} releases, {n:,} SAEs, {OUT.stat().st_size:,} bytes")


def _installed() -> Path:
    files = importlib.metadata.files("sae-lens") or []
    return Path(str(next(file for file in files if file.name == "pretrained_saes.yaml").locate()))


def _release(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    # Its SAEs are of the instruction-tuned model, as the repository's name says.
    model = "gemma-2-9b-it" if name == "gemma-scope-9b-it-res" else raw["model"]
    entry = {
        "model": MODELS.get(model, model),
        "repo": raw["repo_id"],
        "layout": raw.get("conversion_func") or "sae_lens",
        "saes": [list(_trimmed(sae)) for sae in raw["saes"]],
    }
    if "/" not in entry["model"]:
        raise SystemExit(f"{name}: {model!r} is no name on the hub; add it to MODELS")
    return entry | ({"overrides": raw["config_overrides"]} if raw.get("config_overrides") else {})


def _trimmed(sae: dict[str, Any]) -> Iterator[Any]:
    """Id, path (0: the id), L0, Neuronpedia's id, factor of the activations; trailing empty ones are dropped."""
    path = sae["path"] if sae["path"] != sae["id"] else 0
    row = [sae["id"], path, sae.get("l0", 0), sae.get("neuronpedia") or 0, sae.get("norm_scaling_factor", 0)]
    while not row[-1]:
        row.pop()
    yield from row


if __name__ == "__main__":
    main()
