"""Stage 3, coherence: equation 1 of the paper on each feature's top tokens."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeffect.features.coherence import coherence
from saeffect.features.embeddings import load_embeddings
from saeffect.io import fingerprint, hash_file
from saeffect.progress import SILENT, Log
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study

__all__ = ["coherence_inputs", "embeddings_identity", "run_coherence"]

VERSION = 1


def coherence_inputs(run: RunFolder, arm: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "features": run.digest(run.arm(arm, "features.parquet")),
        "embeddings": embeddings_identity(run.study),
    }


def run_coherence(run: RunFolder, arm: str, _: Log = SILENT) -> Iterable[Path]:
    """Write `coherence.parquet`."""
    features = run.read_table(run.arm(arm, "features.parquet"))
    vectors = load_embeddings(run.study.config.coherence.embeddings)
    return [run.write_table(run.arm(arm, "coherence.parquet"), coherence(features, embeddings=vectors))]


def embeddings_identity(study: Study) -> str:
    """Hash of the word vectors."""
    name = study.config.coherence.embeddings
    if Path(name).is_file():
        return hash_file(name)
    bundled = Path(str(importlib.resources.files("saeffect"))) / "bundled" / "embeddings"
    return fingerprint([hash_file(file) for file in sorted(bundled.glob(f"{name}*"))])
