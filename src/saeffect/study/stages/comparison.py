"""Stage 7, the comparison: control against treatment, beside control against placebo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.comparison import Comparison, compare
from saeffect.diffing.methods import table_names
from saeffect.io import read_json, write_json
from saeffect.report import with_answer
from saeffect.study.arm_tables import ARM_FILES, arm_tables
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.coherence import embeddings_identity
from saeffect.study.stages.matching import read_matches

__all__ = ["comparison_inputs", "read_comparison", "run_comparison"]

# 2: seeds, calibration, power, regression, matching. 3: by chance, threats. 4: SAEs decide. 5: traces.
# 6: a placebo that equals the control shows no noise; why nothing was tested; texts without a similarity.
# 7: judgements as a table.
VERSION = 7
_TABLES = Comparison.table_names()


def comparison_inputs(run: RunFolder) -> dict[str, Any]:
    """What the comparison depends on."""
    config = run.study.config
    return {
        "version": VERSION,
        "arms": {name: arm.model_dump(mode="json") for name, arm in config.arms.items()},
        "identities": dict(run.study.identities),
        "tables": run.digest(
            *(run.arm(name, file) for name in config.arms for file in ARM_FILES), run.path("steering", "dose.json")
        ),
        "matches": run.digest(*(run.path("comparison", f"{name}.parquet") for name in table_names())),
        "verdicts": config.selection.verdicts is not None,
        "steered": config.steering is not None,
        "embeddings": embeddings_identity(run.study),
        "min_matches": config.selection.min_matches,
        "comparison": config.comparison.model_dump(),
        "seed": config.seed,
    }


def run_comparison(run: RunFolder) -> Callable[[], Iterable[Path]]:
    """Write `comparison/*.parquet` and `comparison/answer.json`."""

    def work() -> Iterable[Path]:
        config, arms = run.study.config, arm_tables(run)
        min_matches, alpha, tests = config.selection.min_matches, config.comparison.alpha, config.comparison.tests
        found = compare(
            arms,
            min_matches=min_matches,
            alpha=alpha,
            seed=config.seed,
            n_boot=config.comparison.n_boot,
            n_permutations=config.comparison.n_permutations,
            tests=tests,
            matches=read_matches(run),
        )
        found = with_answer(found, arms, tests=tests, min_matches=min_matches, alpha=alpha)
        paths = []
        for name in _TABLES:
            paths.append(run.path("comparison", f"{name}.parquet"))
            run.write_table(paths[-1], getattr(found, name))
        paths.append(run.path("comparison", "answer.json"))
        write_json(paths[-1], dict(found.answer))
        return paths

    return work


def read_comparison(run: RunFolder) -> Comparison:
    """Read a finished comparison back.

    Raises:
        NotFound: It has not been made.
    """
    tables: dict[str, pd.DataFrame] = {
        name: run.read_table(run.path("comparison", f"{name}.parquet")) for name in _TABLES
    }
    return Comparison(**tables, matches=read_matches(run), answer=read_json(run.path("comparison", "answer.json")))
