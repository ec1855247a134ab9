"""Stage 2, the feature table: top tokens, projection moments, decoder norm, activity, contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from saeffect.activations.harvest import TokenRows, kept_positions
from saeffect.features.table import ActivationBatch, FeatureOptions, FeatureTables, extract_tables
from saeffect.models.unembedding import unembedding
from saeffect.study.residuals import Residuals
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Arm, Say, Study

__all__ = ["extract_features", "features_inputs", "run_features"]

VERSION = 3  # 2: rotary frequencies stay in float32; 3: passes as in harvests


def features_inputs(study: Study, arm: str) -> dict[str, Any]:
    """What the feature table depends on."""
    return {
        "version": VERSION,
        "arm": study.identities[arm],
        "text": study.text_identity,
        "features": study.config.features.model_dump(),
    }


def run_features(run: RunFolder, arm: str, say: Say) -> Callable[[], Iterable[Path]]:
    """Write `features.parquet` and `examples.parquet`."""

    def work() -> Iterable[Path]:
        opened = run.study.open_arm(arm, say)
        rows = run.study.rows()
        config = run.study.config.features
        options = FeatureOptions(config.top_k, config.projection, rows.names, config.examples, config.window)
        tables = extract_features(opened, rows, options, residuals=run.study.residuals, say=say)
        paths = run.arm(arm, "features.parquet"), run.arm(arm, "examples.parquet")
        run.write_table(paths[0], tables.features)
        run.write_table(paths[1], tables.examples)
        return paths

    return work


@torch.inference_mode()
def extract_features(
    arm: Arm,
    rows: TokenRows,
    options: FeatureOptions | None = None,
    *,
    residuals: Residuals | None = None,
    say: Say = lambda line: None,
) -> FeatureTables:
    """The feature table of an arm and its max-activating contexts.

    Args:
        arm: Model and SAE.
        rows: Text on which activity is measured.
        options: How many top tokens, on which scale, and so on.
        residuals: Remembers activations between arms that share a model.
        say: Receives lines of progress.
    """
    return extract_tables(
        arm.sae,
        unembedding(arm.lm),
        arm.lm.token_strings(),
        _batches(arm, rows, residuals or Residuals(), say),
        options=options or FeatureOptions(sources=rows.names),
        valid=arm.lm.plain_tokens(),
    )


def _batches(arm: Arm, rows: TokenRows, residuals: Residuals, say: Say) -> Iterator[ActivationBatch]:
    limit = arm.norm_limit(rows)
    for start, ids, x in residuals.batches(arm.lm, arm.hook, rows):
        sources = [rows.names[i] for i in rows.sources[start : start + len(ids)]]
        # BOS is no text: it stands in no context either.
        n_bos, kept = arm.lm.n_bos(rows.ids[start]), kept_positions(x, limit)
        yield ActivationBatch(ids[:, n_bos:], arm.sae.encode(x[:, n_bos:]), sources, kept[:, n_bos:])
        say(f"progress features {arm.name} {start + len(ids)} {len(rows)} rows")
